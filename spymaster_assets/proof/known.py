"""Tables whose rows and columns say when they were known, and whether two of them agree on all that was known by a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

Times = NDArray[np.int64]


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


Result = tuple[list[Difference], int]


@dataclass(frozen=True)
class KnownTable:
    """Rows of `frame` and from when on each may be read: known_ns (n,) int64 UTC ns, the row's own existence included.

    column_ns holds the times (n,) of columns with times of their own; `name` is the column that names a row in messages.
    """

    frame: pl.DataFrame
    known_ns: Times
    column_ns: Mapping[str, Times] = field(default_factory=dict)
    name: str | None = None

    @classmethod
    def fitted(cls, files: Mapping[str, bytes], known_ns: int) -> KnownTable:
        """A fitted object as its named bytes, all known at the as-of time."""
        frame = pl.DataFrame(
            {"file": sorted(files), "content": [files[name] for name in sorted(files)]},
            schema={"file": pl.String, "content": pl.Binary},
        )
        return cls(frame, np.full(frame.height, known_ns, np.int64), name="file")

    def times(self) -> Times:
        """All distinct times (k,) at which something of the table becomes known, sorted."""
        return np.unique(np.concatenate([self.known_ns, *self.column_ns.values()]))


def compare(asset: str, key: str, stored: KnownTable, replayed: KnownTable | None, cut_ns: int) -> Result:
    """Differences in what was known at cut_ns, one a column at most, and how many values were compared.

    Values are compared by their bytes, rows by their number and order, columns by their presence and type. A table that could not be
    replayed (None) differs if any of its rows was known.
    """
    seen = stored.known_ns <= cut_ns
    rows = int(seen.sum())
    if replayed is None:
        gone = Difference(asset, key, "all columns", "all rows", f"{rows} rows", "could not be made")
        return [gone] if rows else [], rows
    again = replayed.known_ns <= cut_ns
    one, other = _rows(stored.frame, seen), _rows(replayed.frame, again)
    names = one[stored.name] if stored.name else None
    found: list[Difference] = []
    count = 0
    together = [c for c in one.columns if c not in stored.column_ns]
    for column in together:
        found += _series(asset, key, column, one[column], other, names)
        count += rows
    for column in other.columns:
        # without a known row the columns of an empty table say nothing
        if rows and column not in one.columns:
            found.append(Difference(asset, key, column, "all rows", "no column", str(other[column].dtype)))
    if one.height != other.height and not found:
        found.append(Difference(asset, key, "rows", "end", f"{one.height} rows", f"{other.height} rows"))
    if stored.column_ns and found:
        return found, count  # columns with times of their own can only be compared row by row
    for column, times in stored.column_ns.items():
        known = times[seen] <= cut_ns
        if column in replayed.column_ns:
            later = replayed.column_ns[column][again] <= cut_ns
            if not np.array_equal(known, later):
                at = int(np.flatnonzero(known != later)[0])
                said = ("known" if k else "not yet known" for k in (known[at], later[at]))
                found.append(Difference(asset, key, column, _row(names, at), *said))
                continue
        part, rest = _rows(one.select(column), known), _rows(other, known)
        found += _series(asset, key, column, part[column], rest, None if names is None else names.filter(known))
        count += int(known.sum())
    return found, count


def _rows(frame: pl.DataFrame, seen: NDArray[np.bool_]) -> pl.DataFrame:
    """The rows seen; tables in the order of time are only sliced."""
    count = int(seen.sum())
    return frame.head(count) if seen[:count].all() else frame.filter(seen)


def _series(
    asset: str, key: str, column: str, a: pl.Series, other: pl.DataFrame, names: pl.Series | None
) -> list[Difference]:
    b = other[column] if column in other.columns else None
    if b is None or a.dtype != b.dtype:
        kinds = (str(s.dtype) if s is not None else "no column" for s in (a, b))
        return [Difference(asset, key, column, "all rows", *kinds)] if len(a) else []
    if len(a) == len(b) and a.equals(b, null_equal=True) and _same_bits(a, b):
        return []
    least = min(len(a), len(b))
    at = next((i for i in range(least) if not _equal(a[i], b[i])), least)
    values = (_shown(s[at]) if at < len(s) else "no row" for s in (a, b))
    return [Difference(asset, key, column, _row(names, at), *values)]


def _row(names: pl.Series | None, at: int) -> str:
    return f"{names[at]}" if names is not None and at < len(names) else f"row {at}"


def _same_bits(a: pl.Series, b: pl.Series) -> bool:
    """-0.0 and 0.0 are equal numbers but not equal bytes."""
    return not a.dtype.is_float() or a.to_numpy().tobytes() == b.to_numpy().tobytes()


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()
    if isinstance(a, pl.Series) and isinstance(b, pl.Series):
        return a.equals(b, null_equal=True)
    return bool(a == b)


def _shown(value: Any) -> str:
    """A value as text that tells it from another: floats in full, bytes by their hash."""
    if isinstance(value, bytes):
        return f"SHA-256 {hashlib.sha256(value).hexdigest()[:12]}"
    return repr(value) if isinstance(value, float) else str(value)
