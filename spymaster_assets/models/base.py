"""The one contract that every model follows: fit, predict, save, load, and which data it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, TypeVar, final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from spymaster_assets.contract import STAGE_A_DECISION_S, load_contract
from spymaster_assets.datasets.splits import SplitManifest, check_decided, check_fold
from spymaster_assets.errors import ContractError
from spymaster_assets.settings import NS

_ROWS = ("X", "mask", "static", "y_break", "y_strength", "event_id", "ts_ns", "session")


@dataclass(frozen=True)
class SequenceData:
    """Sequences of n touches.

    X (n, T, C) float32, mask (n, T) uint8 with 1 for observed steps, static (n, S) float32, y_break (n,) int8 (1 BREAK, 0 BOUNCE, -1
    other), y_strength (n,) float32 SPY dollars or NaN, event_id (n,), ts_ns (n,) int64, session (n,). Raises ContractError when a static
    feature is a label or known after the decision of stage A, or a channel is not one of features.json.
    """

    X: NDArray[np.float32]
    mask: NDArray[np.uint8]
    static: NDArray[np.float32]
    y_break: NDArray[np.int8]
    y_strength: NDArray[np.float32]
    event_id: NDArray[np.str_]
    ts_ns: NDArray[np.int64]
    session: NDArray[np.str_]
    channel_names: tuple[str, ...]
    static_names: tuple[str, ...]

    def __post_init__(self) -> None:
        require_sequence_features(self.channel_names, self.static_names)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], session: str) -> SequenceData:
        """From the arrays of a sequence dataset."""
        return cls(
            **{k: arrays[k] for k in _ROWS if k != "session"},
            session=np.full(len(arrays["event_id"]), session),
            channel_names=tuple(arrays["seq_feature_names"].tolist()),
            static_names=tuple(arrays["static_feature_names"].tolist()),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[SequenceData]) -> SequenceData:
        """Sessions one after another; raise ContractError when their features differ."""
        names = [(*p.channel_names, *p.static_names) for p in parts]
        if len(set(names)) > 1:
            odd = sorted(set().union(*names) - set(names[0]).intersection(*names))
            raise ContractError(
                f"the sessions differ in their features or their order: {', '.join(odd)}",
                remedy="materialize sequence_dataset again",
            )
        return cls(
            **{n: np.concatenate([getattr(p, n) for p in parts]) for n in _ROWS},
            channel_names=parts[0].channel_names,
            static_names=parts[0].static_names,
        )

    def select(self, rows: NDArray[Any]) -> SequenceData:
        """Rows by mask or index."""
        return replace(self, **{n: getattr(self, n)[rows] for n in _ROWS})

    def times(self) -> pl.DataFrame:
        """Rows as `splits.TIMES`; a label counts as complete when the contract's last label is."""
        known_s = max(c.known_after_s for c in load_contract().role("label"))
        return pl.DataFrame(
            {
                "event_id": self.event_id.tolist(),
                "date": self.session.tolist(),
                "decision_ns": self.ts_ns + STAGE_A_DECISION_S * NS,
                "label_known_ns": self.ts_ns + known_s * NS,
            },
            schema_overrides={"event_id": pl.String, "date": pl.String},
        )

    def __len__(self) -> int:
        return len(self.event_id)


def require_sequence_features(channel_names: Sequence[str], static_names: Sequence[str]) -> None:
    """Raise ContractError unless the channels are the contract's and the static features are known when stage A decides."""
    contract = load_contract()
    if odd := [c for c in channel_names if c not in contract.sequence_channels]:
        raise ContractError(
            f"{odd[0]} is no sequence channel", where="features.json", expected=", ".join(contract.sequence_channels)
        )
    # a text column is encoded as name=value
    contract.require_known([name.partition("=")[0] for name in static_names], STAGE_A_DECISION_S)


@dataclass(frozen=True)
class FitReport:
    """What fitting found: metrics (nested, JSON-able), history {name: value per epoch or round}, skipped heads with the reason."""

    metrics: dict[str, Any]
    history: dict[str, list[float]] = field(default_factory=dict)
    best_epoch: int = 0
    skipped: tuple[dict[str, Any], ...] = ()


Data = TypeVar("Data", pl.DataFrame, SequenceData)


class Model(ABC):
    """A model family. `needs` names the data it takes: 'tabular' is a signals frame, 'sequence' a SequenceData.

    save() gives files without pickle; load() verifies what it is given and raises ModelError, and save() of the result is equal bytes.
    A family writes _fit and _predict: fit and predict stand before them, so that none can learn from the future or be asked about its past.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[Literal["tabular", "sequence"]]

    first_test_decision_ns: int = 0
    """No decision that the model may be asked about is earlier; set by fit and load, kept by save."""

    @final
    def fit(self, train: Any, validation: Any, fold: SplitManifest) -> FitReport:
        """Fit on train; validation serves early stopping and the report, nothing else.

        Raises SplitError, naming part and row, unless both are what the fold lets a model learn from (`splits.check_fold`).
        """
        check_fold(fold, _times(train), _times(validation))
        self.first_test_decision_ns = fold.first_test_decision_ns
        return self._fit(train, validation)

    @final
    def predict(self, data: Any) -> pl.DataFrame:
        """One row per event and head: event_id, head, delay, stage, p (probability or SPY dollars).

        Raises SplitError when a row was decided before the first test decision of the fold that the model was fitted on.
        """
        check_decided(_times(data), self.first_test_decision_ns, f"this {self.name} model")
        return self._predict(data)

    @abstractmethod
    def _fit(self, train: Any, validation: Any) -> FitReport: ...

    @abstractmethod
    def _predict(self, data: Any) -> pl.DataFrame: ...

    @abstractmethod
    def save(self) -> dict[str, bytes]:
        """Files of the fitted model by name."""

    @classmethod
    @abstractmethod
    def load(cls, files: Mapping[str, bytes]) -> Self:
        """Rebuild from `save` files; raise ModelError when they are damaged or of another shape."""


def _times(data: pl.DataFrame | SequenceData) -> pl.DataFrame:
    return data.times() if isinstance(data, SequenceData) else data


def prediction_frame(
    event_id: NDArray[np.str_] | pl.Series, head: str, delay: str, stage: str, p: NDArray[np.floating[Any]]
) -> pl.DataFrame:
    """Predictions of one head in the shape that `Model.predict` returns."""
    return pl.DataFrame({"event_id": event_id}).with_columns(
        pl.lit(head).alias("head"),
        pl.lit(delay).alias("delay"),
        pl.lit(stage).alias("stage"),
        pl.Series("p", np.asarray(p, np.float64)),
    )
