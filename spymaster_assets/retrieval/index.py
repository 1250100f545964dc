"""Exact nearest neighbours of a touch among past touches whose label was known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numba import njit
from numpy.typing import NDArray

from spymaster_assets.contract import Contract, decision_after_s, load_contract
from spymaster_assets.datasets.matrix import encode
from spymaster_assets.datasets.sequences import npz_arrays, to_npz_bytes
from spymaster_assets.datasets.splits import SplitManifest, check_decided, check_fold, require_times
from spymaster_assets.errors import ArtifactError, ModelError, refusing
from spymaster_assets.settings import RetrievalSettings, settings_from
from spymaster_assets.store import dump_json, json_object

ARRAYS, INDEX = "retrieval_index.npz", "retrieval_index.json"
FILTERS = ("kind and direction", "direction", "all")
"""Candidate sets, tried in this order until one is large enough."""
_KEYS: dict[str, tuple[str, int]] = {
    "X": ("f4", 2),
    "center": ("f4", 1),
    "scale": ("f4", 1),
    "kind": ("i1", 1),
    "sign": ("i1", 1),
    "outcome": ("U", 1),
    "strength": ("f8", 1),
    "event_id": ("U", 1),
    "date": ("U", 1),
}
_EPSILON = 1e-6


@dataclass(frozen=True)
class RetrievalIndex:
    """Past touches in a robustly scaled space.

    X (m, f) float32 scaled, center and scale (f,), kind codes and approach signs (m,), outcome text, strength in SPY dollars, event_id and
    date of each; `meta` is JSON-able (columns, delay, as-of time, settings).
    """

    X: NDArray[np.float32]
    center: NDArray[np.float32]
    scale: NDArray[np.float32]
    kind: NDArray[np.int8]
    sign: NDArray[np.int8]
    outcome: NDArray[np.str_]
    strength: NDArray[np.float64]
    event_id: NDArray[np.str_]
    date: NDArray[np.str_]
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        """Raise ContractError when the index compares a label, or a column that is not known at its decision."""
        decision_s = decision_after_s(self.meta["settings"]["stage"], self.meta["delay"])
        load_contract().require_known(self.meta["columns"], decision_s)

    def query(self, frame: pl.DataFrame, contract: Contract) -> tuple[pl.DataFrame, pl.DataFrame]:
        """(summary, neighbours) of signals rows.

        summary, one row a touch: event_id, p_tradeable_2, p_break, p_bounce (of all neighbours), p_break_given_tradeable (null when no
        neighbour was tradeable), strength_signed, similarity 1 / (1 + mean distance per sqrt(feature)), entropy (nats) of break, bounce and
        rest, effective_n, filter. neighbours: event_id, rank, neighbour_id, date, distance, weight, outcome, strength_signed. Raises
        SplitError when a touch was decided before the as-of time: it would see labels that were not known.
        """
        settings = RetrievalSettings(**self.meta["settings"])
        check_decided(frame, self.meta["asof_open_ns"], "this index")
        X, names = encode(frame, contract, self.meta["columns"], settings.stage, self.meta["delay"])
        if list(names) != self.meta["encoded"]:
            raise ModelError(
                "the index was built on other columns", expected=f"contract {self.meta['contract_sha256'][:12]}"
            )
        scaled = _scale(X[:, self.meta["kept"]], self.center, self.scale)
        dates, day = np.unique(self.date, return_inverse=True)
        at, distance, used = _nearest(
            scaled,
            frame["level_kind"].to_numpy().astype(np.int8),
            frame["direction_sign"].to_numpy().astype(np.int8),
            self.X,
            self.kind,
            self.sign,
            day.astype(np.int64),
            len(dates),
            settings.k,
            settings.max_per_session,
            settings.min_candidates,
        )
        found = at >= 0
        weight = np.where(found, 1.0 / (distance + _EPSILON), 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            weight /= weight.sum(axis=1, keepdims=True)
        outcome = np.where(found, self.outcome[np.maximum(at, 0)], "")
        breaks = (weight * (outcome == "BREAK")).sum(axis=1)
        bounces = (weight * (outcome == "BOUNCE")).sum(axis=1)
        tradeable = breaks + bounces
        shares = np.stack([breaks, bounces, 1.0 - tradeable], axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            entropy = -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1.0)), 0.0).sum(axis=1)
            given = np.where(tradeable > 0, breaks / tradeable, np.nan)
            mean_distance = np.where(found, distance, 0.0).sum(axis=1) / found.sum(axis=1)
        summary = pl.DataFrame(
            {
                "event_id": frame["event_id"],
                "p_tradeable_2": tradeable,
                "p_break": breaks,
                "p_bounce": bounces,
                "p_break_given_tradeable": given,
                "strength_signed": (weight * np.where(found, self.strength[np.maximum(at, 0)], 0.0)).sum(axis=1),
                "similarity": 1.0 / (1.0 + mean_distance / np.sqrt(max(self.X.shape[1], 1))),
                "entropy": entropy,
                "effective_n": 1.0 / (weight**2).sum(axis=1),
                "filter": np.array(FILTERS)[used],
            },
            nan_to_null=True,
        )
        row, rank = np.nonzero(found)
        one = at[row, rank]
        neighbours = pl.DataFrame(
            {
                "event_id": frame["event_id"].gather(row),
                "rank": rank + 1,
                "neighbour_id": self.event_id[one],
                "date": self.date[one],
                "distance": distance[row, rank],
                "weight": weight[row, rank],
                "outcome": self.outcome[one],
                "strength_signed": self.strength[one],
            }
        )
        return summary, neighbours

    def null_rates(self, frame: pl.DataFrame) -> pl.DataFrame:
        """What random neighbours from the same candidates would say: event_id, p_tradeable_2, p_break_given_tradeable.

        The null that retrieval must beat: same filters and fallback, no distance.
        """
        check_decided(frame, self.meta["asof_open_ns"], "this index")
        least = self.meta["settings"]["min_candidates"]
        past = pl.DataFrame({"level_kind": self.kind, "direction_sign": self.sign, "outcome": self.outcome})
        rates = [pl.len().alias("n"), pl.col("outcome").is_in(["BREAK", "BOUNCE"]).mean().alias("tradeable"),
                 (pl.col("outcome") == "BREAK").mean().alias("breaks")]  # fmt: skip
        rows = frame.select("event_id", pl.col("level_kind").cast(pl.Int8), pl.col("direction_sign").cast(pl.Int8))
        rows = rows.join(
            past.group_by("level_kind", "direction_sign").agg(rates), on=["level_kind", "direction_sign"], how="left"
        )
        rows = rows.join(past.group_by("direction_sign").agg(rates), on="direction_sign", how="left", suffix="_side")
        rows = rows.join(past.select(rates), how="cross", suffix="_all")

        def pick(name: str) -> pl.Expr:
            side = pl.when(pl.col("n_side") >= least).then(f"{name}_side").otherwise(f"{name}_all")
            return pl.when(pl.col("n") >= least).then(name).otherwise(side)

        tradeable = pick("tradeable")
        return rows.select(
            "event_id",
            tradeable.alias("p_tradeable_2"),
            pl.when(tradeable > 0).then(pick("breaks") / tradeable).alias("p_break_given_tradeable"),
        )

    def save(self) -> dict[str, bytes]:
        """Arrays as npz (no pickle) and the description as JSON."""
        return {ARRAYS: to_npz_bytes({k: getattr(self, k) for k in _KEYS}), INDEX: dump_json(self.meta)}

    @classmethod
    def load(cls, files: Mapping[str, bytes], where: str = "retrieval index") -> RetrievalIndex:
        """Inverse of `save`; raise ArtifactError or ModelError on damage or shapes that do not fit."""
        with refusing(
            ModelError,
            "not a retrieval index",
            where=where,
            remedy="materialize retrieval_index again",
            but=(ArtifactError,),
        ):
            arrays = npz_arrays(files[ARRAYS], where, _KEYS)
            meta = json_object(files[INDEX], f"{where}, {INDEX}")
        m, f = arrays["X"].shape
        for name in ("kind", "sign", "outcome", "strength", "event_id", "date"):
            if arrays[name].shape != (m,):
                raise ModelError(f"{name} has shape {arrays[name].shape}", where=where, expected=f"({m},)")
        if arrays["center"].shape != (f,) or arrays["scale"].shape != (f,):
            raise ModelError("the scaler does not fit the columns", where=where, expected=f"({f},)")
        _refuse_edited(arrays, meta, where)
        return cls(**arrays, meta=meta)


def _refuse_edited(arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any], where: str) -> None:
    """Raise ModelError when values or the description are ones that `build_index` cannot have made."""
    with refusing(ModelError, "the index was edited", where=where, remedy="materialize retrieval_index again"):
        if not all(np.isfinite(arrays[k]).all() for k in ("X", "center", "scale")) or (arrays["scale"] <= 0).any():
            raise ValueError("values that are not finite or a scale that is not positive")
        settings = settings_from(RetrievalSettings, meta["settings"])
        if not 1 <= settings.k <= max(len(arrays["X"]), 1) or settings.max_per_session < 1:
            raise ValueError(f"k = {settings.k} of {len(arrays['X'])} rows, {settings.max_per_session} a session")
        for name in ("columns", "encoded"):
            if not isinstance(meta[name], list) or not all(isinstance(v, str) for v in meta[name]):
                raise ValueError(f"{name} is no list of names")
        kept = meta["kept"]
        if not isinstance(kept, list) or not all(type(v) is int and 0 <= v < len(meta["encoded"]) for v in kept):
            raise ValueError("kept names columns that are not there")
        if sorted(set(kept)) != kept or len(kept) != arrays["X"].shape[1]:
            raise ValueError(f"{len(kept)} kept columns for {arrays['X'].shape[1]} features")
        if type(meta["asof_open_ns"]) is not int or meta["asof_open_ns"] <= 0:
            raise ValueError("asof_open_ns is no time, so that no touch could be refused")
        for name in ("delay", "contract_sha256"):
            if not isinstance(meta[name], str):
                raise ValueError(f"{name} is no text")


def build_index(
    rows: pl.DataFrame, fold: SplitManifest, contract: Contract, settings: RetrievalSettings, delay: str
) -> RetrievalIndex:
    """Index signals rows of a fold's train and validation sessions with a defined outcome of `delay`.

    Raises SplitError on a row that the fold lets no model learn from (`splits.check_fold`), ModelError with fewer rows than neighbours.
    """
    require_times(rows, "the rows of the index")
    train = pl.col("date").is_in(list(fold.train))
    check_fold(fold, rows.filter(train), rows.filter(~train))
    return fit_index_unchecked(rows, fold.first_test_decision_ns, contract, settings, delay)


def fit_index_unchecked(
    rows: pl.DataFrame, first_query_ns: int, contract: Contract, settings: RetrievalSettings, delay: str
) -> RetrievalIndex:
    """The index itself, for touches decided at first_query_ns or later, of rows that were judged before, as `build_index` does."""
    outcome = f"outcome_{delay}"
    rows = rows.filter(pl.col(outcome) != "UNDEFINED").sort("ts_ns", "event_id")
    if rows.height < settings.k:
        raise ModelError(
            f"{rows.height} rows with an outcome", expected=f"at least k = {settings.k}", remedy="use a longer window"
        )
    columns = [c.name for c in contract.features(settings.stage, delay) if c.dtype != "string"]
    X, names = encode(rows, contract, columns, settings.stage, delay)
    finite = np.where(np.isfinite(X), X, np.nan).astype(np.float64)
    filled = np.flatnonzero(np.isfinite(finite).any(axis=0))
    low, center, high = np.full((3, X.shape[1]), np.nan)
    low[filled], center[filled], high[filled] = np.nanquantile(finite[:, filled], [0.25, 0.5, 0.75], axis=0)
    spread = np.full(X.shape[1], np.nan)
    spread[filled] = np.nanstd(finite[:, filled], axis=0)
    scale = np.where(high - low > _EPSILON, high - low, spread)
    kept = np.flatnonzero(np.isfinite(scale) & (scale > _EPSILON))
    center, scale = center[kept].astype(np.float32), scale[kept].astype(np.float32)
    return RetrievalIndex(
        X=_scale(X[:, kept], center, scale),
        center=center,
        scale=scale,
        kind=rows["level_kind"].to_numpy().astype(np.int8),
        sign=rows["direction_sign"].to_numpy().astype(np.int8),
        outcome=np.array(rows[outcome].to_list(), dtype=np.str_),
        strength=rows[f"strength_signed_{delay}"].to_numpy().astype(np.float64),
        event_id=np.array(rows["event_id"].to_list(), dtype=np.str_),
        date=np.array(rows["date"].to_list(), dtype=np.str_),
        meta={
            "settings": dict(vars(settings)),
            "delay": delay,
            "asof_open_ns": first_query_ns,
            "columns": columns,
            "encoded": list(names),
            "kept": kept.tolist(),
            "dropped_constant": [n for i, n in enumerate(names) if i not in set(kept.tolist())],
            "contract_sha256": contract.sha256,
            "schema_version": contract.schema_version,
            "rows": rows.height,
            "filters": list(FILTERS),
        },
    )


def _scale(X: NDArray[np.float32], center: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """(X - center) / scale with missing values at the centre."""
    scaled = (X - center) / scale
    return np.where(np.isfinite(scaled), scaled, np.float32(0.0)).astype(np.float32)


@njit(cache=True)
def _nearest(Q, q_kind, q_sign, X, kind, sign, day, days, k, per_day, least):  # type: ignore[no-untyped-def]
    """Row and distance of the k nearest with at most per_day a session, and the filter used; ties go to the earlier row."""
    n, m, f = len(Q), len(X), X.shape[1]
    at = np.full((n, k), -1, np.int64)
    distance = np.full((n, k), np.inf)
    used = np.zeros(n, np.int64)
    every = np.empty(m)
    for i in range(n):
        level = 0
        while level < 2:
            count = 0
            for j in range(m):
                if sign[j] == q_sign[i] and (level == 1 or kind[j] == q_kind[i]):
                    count += 1
            if count >= least:
                break
            level += 1
        used[i] = level
        for j in range(m):
            if (level < 2 and sign[j] != q_sign[i]) or (level == 0 and kind[j] != q_kind[i]):
                every[j] = np.inf
                continue
            total = 0.0
            for c in range(f):
                gap = np.float64(Q[i, c]) - np.float64(X[j, c])
                total += gap * gap
            every[j] = np.sqrt(total)
        order = np.argsort(every, kind="mergesort")
        taken = np.zeros(days, np.int64)
        filled = 0
        for j in order:
            if filled == k or not np.isfinite(every[j]):
                break
            if taken[day[j]] < per_day:
                taken[day[j]] += 1
                at[i, filled] = j
                distance[i, filled] = every[j]
                filled += 1
    return at, distance, used
