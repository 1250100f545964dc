"""Whether an artifact that was made with another future holds the same values for all that was known before it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from spymaster_assets.contract import Contract
from spymaster_assets.market.book import book_from_parquet
from spymaster_assets.settings import NS
from spymaster_assets.signals.build import signals_from_parquet
from spymaster_assets.store import Artifact


@dataclass(frozen=True)
class Difference:
    """The first row of a column that differs, though it was known at the time of the cut."""

    asset: str
    key: str
    column: str
    row: str
    stored: str
    replayed: str

    def __str__(self) -> str:
        return f"{self.asset} [{self.key}] column {self.column} at {self.row}: stored {self.stored}, replayed {self.replayed}"


def differences(stored: Artifact, replayed: Artifact, cut_ns: int, contract: Contract) -> tuple[list[Difference], int]:
    """Differences of one session artifact in what was known at cut_ns, one a column at most, and how many values were compared.

    Values are compared by their bytes. Assets without rows in time (market_files, spot_basis) compare nothing. Raises ArtifactError when
    signals follow another contract.
    """
    return _COMPARE.get(stored.asset, _nothing)(stored, replayed, cut_ns, contract)


Result = tuple[list[Difference], int]
Pair = tuple[pl.DataFrame, pl.DataFrame]


def _nothing(stored: Artifact, replayed: Artifact, cut_ns: int, contract: Contract) -> Result:
    return [], 0


def _bars(stored: Artifact, replayed: Artifact, cut_ns: int, contract: Contract) -> Result:
    return _frames(
        stored, _both(stored, replayed, f"bars_{stored.key}.parquet", pl.col("end_ns") <= cut_ns), "start_ns"
    )


def _levels(stored: Artifact, replayed: Artifact, cut_ns: int, contract: Contract) -> Result:
    # a level is known when its bar starts, and listed when that bar has ended
    context = _both(stored, replayed, "context.parquet", pl.col("end_ns") <= cut_ns)
    found, count = _frames(stored, context, "start_ns")
    last_ns = context[0]["start_ns"][-1] if context[0].height else 0
    more, rows = _frames(stored, _both(stored, replayed, "levels.parquet", pl.col("start_ns") <= last_ns), "start_ns")
    return found + more, count + rows


def _book(stored: Artifact, replayed: Artifact, cut_ns: int, contract: Contract) -> Result:
    if "book.parquet" not in stored.files:
        return [], 0
    bucket_ns = book_from_parquet(stored.read("book.parquet")).bucket_ns
    over = pl.col("ts_ns") < cut_ns // bucket_ns * bucket_ns  # the bucket of the cut is still open
    return _frames(stored, _both(stored, replayed, "book.parquet", over), "ts_ns")


def _flow(stored: Artifact, replayed: Artifact, cut_ns: int, contract: Contract) -> Result:
    if "flow.parquet" not in stored.files:
        return [], 0
    return _frames(stored, _both(stored, replayed, "flow.parquet", pl.col("ts_ns") < cut_ns), "ts_ns")


def _signals(stored: Artifact, replayed: Artifact, cut_ns: int, contract: Contract) -> Result:
    name = f"signals_{stored.key}.parquet"
    one, other = (
        signals_from_parquet(a.read(name), contract, str(a.folder / name)).frame.filter(pl.col("decision_ns") <= cut_ns)
        for a in (stored, replayed)
    )
    found, count = _frames(stored, (one.select("event_id"), other.select("event_id")), "event_id")
    if found:
        return found, count
    for column in contract.columns:
        known = one["ts_ns"] + column.known_after_s * NS <= cut_ns
        parts = (one.filter(known).select(column.name), other.filter(known).select(column.name))
        more, rows = _frames(stored, parts, None, one.filter(known)["event_id"].to_list())
        found += more
        count += rows
    return found, count


def _sequences(stored: Artifact, replayed: Artifact, cut_ns: int, contract: Contract) -> Result:
    name = f"sequence_dataset_{stored.key}.npz"
    one, other = (_npz(a, name) for a in (stored, replayed))
    decided = one["ts_ns"] + 60 * NS <= cut_ns
    rows = int(decided.sum())
    found = []
    for array in ("event_id", "X", "mask", "static"):
        a, b = one[array][decided], other[array][:rows]
        # the width of a text array is that of its longest row, be it known yet or not
        same = np.array_equal(a, b) if a.dtype.kind == "U" else a.shape == b.shape and a.tobytes() == b.tobytes()
        if not same:
            at = next((i for i in range(min(len(a), len(b))) if a[i].tobytes() != b[i].tobytes()), len(b))
            row = str(one["event_id"][decided][at]) if at < rows else "end"
            found.append(Difference(stored.asset, stored.key, array, row, f"{a.shape}", f"{b.shape}"))
    return found, rows * 4


_COMPARE: dict[str, Callable[[Artifact, Artifact, int, Contract], Result]] = {
    "ohlcv_bars": _bars,
    "book_snapshots": _book,
    "option_flow": _flow,
    "levels": _levels,
    "signals": _signals,
    "sequence_dataset": _sequences,
}


def _both(stored: Artifact, replayed: Artifact, name: str, known: pl.Expr) -> Pair:
    """The known rows of a Parquet file of both artifacts; a replay without the file has none."""
    one = _parquet(stored, name)
    other = _parquet(replayed, name) if name in replayed.files else one.clear()
    return one.filter(known), other.filter(known)


def _frames(stored: Artifact, pair: Pair, index: str | None, names: list[str] | None = None) -> Result:
    one, other = pair
    found = []
    for column in one.columns:
        a, b = one[column], other[column] if column in other.columns else None
        if b is None or a.dtype != b.dtype:
            found.append(
                Difference(
                    stored.asset, stored.key, column, "all rows", str(a.dtype), str(b.dtype if b is not None else None)
                )
            )
            continue
        if len(a) == len(b) and a.equals(b, null_equal=True) and _same_bits(a, b):
            continue
        at = next((i for i in range(min(len(a), len(b))) if not _equal(a[i], b[i])), min(len(a), len(b)))
        row = (
            names[at] if names and at < len(names) else f"{one[index][at]}" if index and at < len(one) else f"row {at}"
        )
        values = (str(s[at]) if at < len(s) else "no row" for s in (a, b))
        found.append(Difference(stored.asset, stored.key, column, row, *values))
    return found, one.height * one.width


def _same_bits(a: pl.Series, b: pl.Series) -> bool:
    """-0.0 and 0.0 are equal numbers but not equal bytes."""
    return not a.dtype.is_float() or a.fill_null(0.0).to_numpy().tobytes() == b.fill_null(0.0).to_numpy().tobytes()


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b) or (a is None and b is None) or (a != a and b != b)


def _parquet(artifact: Artifact, name: str) -> pl.DataFrame:
    return pl.read_parquet(io.BytesIO(artifact.read(name)))


def _npz(artifact: Artifact, name: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(artifact.read(name)), allow_pickle=False) as arrays:
        return {k: arrays[k] for k in arrays.files}
