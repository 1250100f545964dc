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
Mask = NDArray[np.bool_]


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
    """Rows of `frame` and from when on each is certain: known_ns (n,) int64 UTC ns, the row's own existence included.

    column_ns holds the times (n,) of columns with times of their own; `name` is the column that names a row in messages. With `key` a
    column may be known while its row is not certain (a level, before its bar has ended): all rows that share a key's values are there or
    not in one piece, and are compared if both tables hold them.
    """

    frame: pl.DataFrame
    known_ns: Times
    column_ns: Mapping[str, Times] = field(default_factory=dict)
    name: str | None = None
    key: tuple[str, ...] = ()

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

    def uncertain(self, cut_ns: int) -> pl.DataFrame:
        """`row` and key of the rows of which at cut_ns some column was known, but not yet that they exist; none without a key."""
        early = [times <= cut_ns for times in self.column_ns.values()] if self.key else []
        mask = (self.known_ns > cut_ns) & np.any(early, axis=0) if early else np.zeros(self.frame.height, bool)
        return self.frame.select(*self.key, pl.int_range(pl.len()).alias("row")).filter(mask)


def compare(asset: str, key: str, stored: KnownTable, replayed: KnownTable | None, cut_ns: int) -> Result:
    """Differences in what was known at cut_ns, one a column at most, and how many values were compared.

    Values are compared by their bytes, rows by their number and order, columns by their presence and type. Rows that were certain must be
    in both; of others that are (see KnownTable.key), columns that were known must be equal. A table that could not be replayed (None)
    differs if any of its rows was certain.
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
    for part in ((seen, again), _in_both(stored, replayed, cut_ns)):
        more, values = _own_times(asset, key, stored, replayed, part, cut_ns)
        # a column that differs in rows that were certain is told once
        found += [d for d in more if d.column not in {f.column for f in found}]
        count += values
    return found, count


def _in_both(stored: KnownTable, replayed: KnownTable, cut_ns: int) -> tuple[Mask, Mask]:
    """Rows of each table that were not certain, though some of their columns were known, and whose key the other holds too."""
    held = [t.uncertain(cut_ns) for t in (stored, replayed)]
    masks = []
    for table, one, other in zip((stored, replayed), held, reversed(held), strict=True):
        mask = np.zeros(table.frame.height, bool)
        if one.height and one.schema == other.schema:
            mask[one.join(other, on=list(stored.key), how="semi")["row"].to_numpy()] = True
        masks.append(mask)
    return masks[0], masks[1]


def _own_times(
    asset: str, key: str, stored: KnownTable, replayed: KnownTable, part: tuple[Mask, Mask], cut_ns: int
) -> Result:
    """`compare` of the columns with times of their own, in some rows of each table."""
    one, other = (_rows(t.frame, mask) for t, mask in zip((stored, replayed), part, strict=True))
    names = one[stored.name] if stored.name else None
    found: list[Difference] = []
    count = 0
    for column, times in stored.column_ns.items():
        known, later = times[part[0]] <= cut_ns, replayed.column_ns.get(column, replayed.known_ns)[part[1]] <= cut_ns
        if column in other.columns and len(known) == len(later) and (known != later).any():
            at = int(np.flatnonzero(known != later)[0])
            said = ("known" if k else "not yet known" for k in (known[at], later[at]))
            found.append(Difference(asset, key, column, _row(names, at), *said))
            continue
        values, rest = _rows(one.select(column), known), _rows(other, later)
        found += _series(asset, key, column, values[column], rest, None if names is None else names.filter(known))
        count += int(known.sum())
    return found, count


def _rows(frame: pl.DataFrame, seen: Mask) -> pl.DataFrame:
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
