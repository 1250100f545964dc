"""The one contract that every model follows: fit, predict, save, load, and which data it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

_ROWS = ("X", "mask", "static", "y_break", "y_strength", "event_id", "ts_ns", "session")


@dataclass(frozen=True)
class SequenceData:
    """Sequences of n touches.

    X (n, T, C) float32, mask (n, T) uint8 with 1 for observed steps, static (n, S) float32, y_break (n,) int8 (1 BREAK, 0 BOUNCE, -1
    other), y_strength (n,) float32 SPY dollars or NaN, event_id (n,), ts_ns (n,) int64, session (n,).
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
        """Sessions one after another."""
        return cls(
            **{n: np.concatenate([getattr(p, n) for p in parts]) for n in _ROWS},
            channel_names=parts[0].channel_names,
            static_names=parts[0].static_names,
        )

    def select(self, rows: NDArray[Any]) -> SequenceData:
        """Rows by mask or index."""
        return replace(self, **{n: getattr(self, n)[rows] for n in _ROWS})

    def __len__(self) -> int:
        return len(self.event_id)


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
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[Literal["tabular", "sequence"]]

    @abstractmethod
    def fit(self, train: Any, validation: Any) -> FitReport:
        """Fit on train; validation serves early stopping and the report, nothing else."""

    @abstractmethod
    def predict(self, data: Any) -> pl.DataFrame:
        """One row per event and head: event_id, head, delay, stage, p (probability or SPY dollars)."""

    @abstractmethod
    def save(self) -> dict[str, bytes]:
        """Files of the fitted model by name."""

    @classmethod
    @abstractmethod
    def load(cls, files: Mapping[str, bytes]) -> Self:
        """Rebuild from `save` files; raise ModelError when they are damaged or of another shape."""


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
