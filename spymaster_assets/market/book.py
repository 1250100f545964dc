"""The order book: one snapshot per bucket of time out of mbp files, and mbp-10 records out of single orders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numba import njit
from numpy.typing import NDArray

from spymaster_assets.errors import ArtifactError, MarketDataError, refusing
from spymaster_assets.market.dbn import (
    BOOK_SCHEMAS,
    CHUNK_RECORDS,
    MBO_DTYPE,
    MBP1_DTYPE,
    MBP10_DTYPE,
    UNDEFINED_PRICE,
    read_header,
    stream_records,
)
from spymaster_assets.tables import parquet_bytes, read_parquet, require_schema

BUCKET_MS = 250
"""Default length of a bucket: the last book of each is kept (level-touch rules, docs/method.md)."""
LEVELS = 10
LAST_OF_EVENT = 128
"""Flag of the last record of a venue event."""
_MS = 1_000_000
_UNDEFINED = int(UNDEFINED_PRICE)
_NO_END = np.iinfo(np.int64).max
_HEAD = dict(MBP1_DTYPE.fields or {})
_ACTION = int(_HEAD["action"][1])
_ID_HALF = int(_HEAD["instrument_id"][1]) // 4
_RECV_WORD = int(_HEAD["ts_recv"][1]) // 8
_BID_WORD = int(_HEAD["bid_px_00"][1]) // 8
_SIZE_HALF = int(_HEAD["bid_sz_00"][1]) // 4
_LEVEL_WORDS = 4
"""A level takes 32 bytes: bid price, ask price, then sizes and order counts of both in 4 bytes each."""
_FILLED, _PENDING, _BUCKET, _LAST, _DONE = range(5)
_RECORDS, _OTHERS, _CROSSED, _UNDEFINED_TOP, _REVERSALS, _CLEARS, _FIRST = range(5, 12)
_STATE = 12


@dataclass(frozen=True)
class BookCounts:
    """What the records were like: how many of the contract and of others, and how many of the contract's had each oddity.

    crossed: best bid at or above best ask. undefined_top: no best bid or no best ask. reversals: received before its predecessor.
    clears: action R. first_ns and last_ns: receive times, None without records.
    """

    records: int
    other_records: int
    crossed: int
    undefined_top: int
    reversals: int
    clears: int
    first_ns: int | None
    last_ns: int | None


@dataclass(frozen=True)
class BookSnapshots:
    """The last book of each bucket that has an update, in time order; arrays (n,) and (n, levels), best level first.

    ts_ns: receive time of the update that made it, when it is known. Prices in 1e-9 points, UNDEFINED_PRICE with size 0 where the
    level is empty. A bucket is bucket_ns long and starts at a multiple of it.
    """

    ts_ns: NDArray[np.int64]
    bid_px_e9: NDArray[np.int64]
    bid_sz: NDArray[np.int64]
    ask_px_e9: NDArray[np.int64]
    ask_sz: NDArray[np.int64]
    counts: tuple[BookCounts, ...]
    bucket_ns: int

    def __len__(self) -> int:
        return len(self.ts_ns)

    @property
    def levels(self) -> int:
        """Levels a side: 10 or 1."""
        return int(self.bid_px_e9.shape[1])

    @classmethod
    def join(cls, parts: Sequence[BookSnapshots]) -> BookSnapshots:
        """Snapshots of consecutive files as one; raise MarketDataError when one begins before its predecessor ends.

        Raises ValueError without parts or when their buckets or levels differ.
        """
        if len({(p.bucket_ns, p.levels) for p in parts}) != 1:
            raise ValueError("snapshots to join must have the same bucket and number of levels")
        for before, after in pairwise(parts):
            if len(before) and len(after) and after.ts_ns[0] <= before.ts_ns[-1]:
                raise MarketDataError(
                    f"book snapshots from {int(after.ts_ns[0])} follow ones up to {int(before.ts_ns[-1])}",
                    expected="files in time order that do not overlap",
                    remedy="delete the file that repeats the other",
                )
        arrays = ("ts_ns", "bid_px_e9", "bid_sz", "ask_px_e9", "ask_sz")
        joined = {name: np.concatenate([getattr(p, name) for p in parts]) for name in arrays}
        return cls(**joined, counts=tuple(c for p in parts for c in p.counts), bucket_ns=parts[0].bucket_ns)


def book_to_parquet(book: BookSnapshots) -> bytes:
    """A row a snapshot: ts_ns and price and size a side and level, null where the level is empty; bucket and counts in the metadata."""
    columns: dict[str, Any] = {"ts_ns": book.ts_ns}
    for side, prices, sizes in (("bid", book.bid_px_e9, book.bid_sz), ("ask", book.ask_px_e9, book.ask_sz)):
        for level in range(book.levels):
            columns[f"{side}_px_e9_{level:02}"] = prices[:, level]
            columns[f"{side}_sz_{level:02}"] = sizes[:, level]
    priced = pl.col("^.*_px_e9_.*$")
    frame = pl.DataFrame(columns).with_columns(pl.when(priced != UNDEFINED_PRICE).then(priced))
    about = {"bucket_ns": book.bucket_ns, "levels": book.levels, "counts": [asdict(c) for c in book.counts]}
    return parquet_bytes(frame, 1, metadata={"book": json.dumps(about)})


def book_from_parquet(data: bytes, where: str = "book") -> BookSnapshots:
    """Inverse of `book_to_parquet`; raise ArtifactError when the bytes are damaged or are no book."""
    frame, metadata = read_parquet(data, where)
    with refusing(ArtifactError, "no book as it was written", where=where, remedy="materialize book_snapshots again"):
        about = json.loads(metadata["book"])
        levels, bucket_ns = int(about["levels"]), int(about["bucket_ns"])
        counts = tuple(BookCounts(**c) for c in about["counts"])
        if levels not in (1, 10) or bucket_ns < 1:
            raise ValueError(f"{levels} levels, buckets of {bucket_ns} ns")
    names = [
        f"{side}_{part}_{level:02}" for side in ("bid", "ask") for level in range(levels) for part in ("px_e9", "sz")
    ]
    prices = [n for n in names if "_px_" in n]
    require_schema(frame, dict.fromkeys(["ts_ns", *names], pl.Int64()), where, prices)

    def side(name: str, empty: int) -> NDArray[np.int64]:
        chosen = frame.select(pl.col(f"^{name}_.*$").fill_null(empty))
        return np.ascontiguousarray(chosen.to_numpy()).reshape(frame.height, levels)

    return BookSnapshots(
        frame["ts_ns"].to_numpy(),
        side("bid_px_e9", UNDEFINED_PRICE),
        side("bid_sz", 0),
        side("ask_px_e9", UNDEFINED_PRICE),
        side("ask_sz", 0),
        counts,
        bucket_ns,
    )


def book_snapshots(
    path: Path,
    instrument_id: int,
    *,
    bucket_ms: int = BUCKET_MS,
    start_ns: int = 0,
    end_ns: int | None = None,
    chunk_records: int = CHUNK_RECORDS,
) -> BookSnapshots:
    """Last book per bucket of one contract in an mbp-10 or mbp-1 file, from updates received in [start_ns, end_ns).

    The file is decoded a chunk at a time. A record received before its predecessor counts as received with it, so that no snapshot is
    known earlier than all that it rests on. Raises MarketDataError when the file is truncated, corrupt or of another schema.
    """
    schemas = {name: BOOK_SCHEMAS[name] for name in ("mbp-10", "mbp-1")}
    chunks = stream_records(path, schemas, chunk_records)
    thinner = _Thinner(instrument_id, 1 if read_header(path).schema == "mbp-1" else LEVELS, bucket_ms, start_ns, end_ns)
    for records in chunks:
        thinner.feed(records, str(path))
        if thinner.done:
            break
    return thinner.result()


def snapshots_of_records(
    records: NDArray[np.void],
    instrument_id: int,
    *,
    bucket_ms: int = BUCKET_MS,
    start_ns: int = 0,
    end_ns: int | None = None,
) -> BookSnapshots:
    """As `book_snapshots`, from MBP10_DTYPE or MBP1_DTYPE records in memory; raise ValueError for records of another kind."""
    names = records.dtype.names or ()
    if "bid_px_00" not in names:
        raise ValueError(f"records of the fields {', '.join(names)} hold no book")
    levels = LEVELS if f"bid_px_{LEVELS - 1:02}" in names else 1
    thinner = _Thinner(instrument_id, levels, bucket_ms, start_ns, end_ns)
    thinner.feed(np.ascontiguousarray(records), "records in memory")
    return thinner.result()


class _Thinner:
    """Keeps the last book of each bucket over chunks of records; `state` carries everything from one chunk to the next."""

    def __init__(self, instrument_id: int, levels: int, bucket_ms: int, start_ns: int, end_ns: int | None) -> None:
        if bucket_ms < 1:
            raise ValueError(f"bucket_ms must be at least 1, not {bucket_ms}")
        self.levels, self.instrument_id = levels, instrument_id
        self.limits = (bucket_ms * _MS, start_ns, _NO_END if end_ns is None else end_ns)
        self.state = np.zeros(_STATE, np.int64)
        self.ts = np.empty(0, np.int64)
        self.books = [np.empty((0, levels), np.int64) for _ in range(4)]

    @property
    def done(self) -> bool:
        """True once a record lies at or after the end."""
        return bool(self.state[_DONE])

    def feed(self, records: NDArray[np.void], where: str) -> None:
        """Take the next records, in file order."""
        self._reserve(int(self.state[_FILLED]) + len(records) + 1)
        octets = records.view(np.uint8).reshape(len(records), records.dtype.itemsize)
        fault = _thin(
            octets.view(np.int64), octets.view(np.uint32), octets, self.instrument_id, *self.limits, self.levels,
            self.state, self.ts, *self.books,
        )  # fmt: skip
        if fault >= 0:
            raise MarketDataError(
                "a book record has an undefined receive time",
                where=f"{where}, instrument {self.instrument_id}, after {int(self.state[_RECORDS])} of its records",
                remedy="download the file again",
            )

    def result(self) -> BookSnapshots:
        """What was kept so far."""
        n = int(self.state[_FILLED] + self.state[_PENDING])
        s = [int(v) for v in self.state]
        some = s[_RECORDS] > 0
        counts = BookCounts(
            s[_RECORDS], s[_OTHERS], s[_CROSSED], s[_UNDEFINED_TOP], s[_REVERSALS], s[_CLEARS],
            s[_FIRST] if some else None, s[_LAST] if some else None,
        )  # fmt: skip
        bid_px, bid_sz, ask_px, ask_sz = (b[:n].copy() for b in self.books)
        return BookSnapshots(self.ts[:n].copy(), bid_px, bid_sz, ask_px, ask_sz, (counts,), self.limits[0])

    def _reserve(self, rows: int) -> None:
        """Room for `rows` snapshots: every record of a chunk may end a bucket."""
        if rows > len(self.ts):
            more = max(rows, 2 * len(self.ts)) - len(self.ts)
            self.ts = np.concatenate([self.ts, np.empty(more, np.int64)])
            self.books = [np.concatenate([b, np.empty((more, self.levels), np.int64)]) for b in self.books]


@njit(cache=True)
def _thin(  # type: ignore[no-untyped-def]
    words, halves, octets, instrument_id, bucket_ns, start_ns, end_ns, levels, state, ts, bid_px, bid_sz, ask_px, ask_sz
):
    """One chunk; the three views of it are of 8, 4 and 1 bytes an item. Returns the first record without a time, or -1."""
    last_row = -1  # record of this chunk that holds the current bucket's book, not copied out yet
    for i in range(len(words)):
        if halves[i, _ID_HALF] != instrument_id:
            state[_OTHERS] += 1
            continue
        now = words[i, _RECV_WORD]
        if now < 0:
            return i
        before = state[_LAST]
        reversed_ = now < before
        now = max(now, before)
        if now >= end_ns:
            state[_DONE] = 1
            break
        if now < start_ns:
            continue
        state[_LAST] = now
        if state[_RECORDS] == 0:
            state[_FIRST] = now
        state[_RECORDS] += 1
        if reversed_:
            state[_REVERSALS] += 1
        if octets[i, _ACTION] == 82:  # R
            state[_CLEARS] += 1
        bid = words[i, _BID_WORD]
        ask = words[i, _BID_WORD + 1]
        if bid == _UNDEFINED or ask == _UNDEFINED:
            state[_UNDEFINED_TOP] += 1
        elif bid >= ask:
            state[_CROSSED] += 1
        bucket = now // bucket_ns
        if state[_PENDING] and bucket != state[_BUCKET]:
            if last_row >= 0:
                _keep(words, halves, last_row, state[_FILLED], levels, bid_px, bid_sz, ask_px, ask_sz)
            state[_FILLED] += 1
        state[_PENDING] = 1
        state[_BUCKET] = bucket
        ts[state[_FILLED]] = now
        last_row = i
    if last_row >= 0:  # the buffer is about to be overwritten
        _keep(words, halves, last_row, state[_FILLED], levels, bid_px, bid_sz, ask_px, ask_sz)
    return -1


@njit(cache=True)
def _keep(words, halves, i, row, levels, bid_px, bid_sz, ask_px, ask_sz):  # type: ignore[no-untyped-def]
    for k in range(levels):
        word = _BID_WORD + _LEVEL_WORDS * k
        half = _SIZE_HALF + 2 * _LEVEL_WORDS * k
        bid_px[row, k] = words[i, word]
        ask_px[row, k] = words[i, word + 1]
        bid_sz[row, k] = 0 if words[i, word] == _UNDEFINED else halves[i, half]
        ask_sz[row, k] = 0 if words[i, word + 1] == _UNDEFINED else halves[i, half + 1]


_FAULTS = (
    "",
    "cancels an order that is not in the book",
    "cancels more than is left of the order",
    "adds an order that is in the book already",
    "puts an order without a price or a side into the book",
)
_LEVEL_FIELDS = [
    [f"{side}_{part}_{k:02}" for k in range(LEVELS)] for part in ("px", "sz", "ct") for side in ("bid", "ask")
]


def build_mbp10(mbo_records: NDArray[np.void]) -> NDArray[np.void]:
    """MBP10_DTYPE records from the MBO_DTYPE records of one contract, which begin with an empty book, a clear or a snapshot.

    A trade makes a record with the book as it stands, before the fills are taken out of it. Any other venue event makes one record, with
    the head of its last mbo record (flag LAST_OF_EVENT), if it leaves the ten best levels of a side other than it found them; so a
    snapshot that is not ended by that flag makes none. Fills (F) change nothing: the cancel or modify that follows does. A modify of
    an order that is not in the book adds it, as the vendor's rules have it; `depth` is 0. Raises MarketDataError when the records
    name more than one contract or cannot be the complete orders of a book.
    """
    ids = np.unique(mbo_records["instrument_id"])
    if len(ids) > 1:
        raise MarketDataError(
            f"single orders of {len(ids)} contracts: {', '.join(str(i) for i in ids[:5])}",
            expected="the records of one instrument_id",
        )
    action, side, flags, size = (
        np.ascontiguousarray(mbo_records[name].view(kind) if kind else mbo_records[name])
        for name, kind in (("action", np.uint8), ("side", np.uint8), ("flags", None), ("size", None))
    )
    # Dense numbers for orders and prices: the kernel needs no hash map, and a price's neighbours are the next numbers.
    _, order = np.unique(mbo_records["order_id"], return_inverse=True)
    prices, price = np.unique(mbo_records["price"], return_inverse=True)
    orders = int(order.max()) + 1 if len(order) else 0
    columns = (action, side, flags, size.astype(np.int64), order, price, prices, orders)
    count, fault, at = _replay(*columns, np.empty(0, np.int64), np.empty((0, 6, LEVELS), np.int64))
    if fault:
        raise MarketDataError(
            f"mbo record {at} {_FAULTS[fault]}",
            where=f"order {int(mbo_records['order_id'][at])}, sequence {int(mbo_records['sequence'][at])}",
            expected="every order from an empty book, a clear or a snapshot on",
            remedy="download the day from its start",
        )
    source, books = np.empty(count, np.int64), np.empty((count, 6, LEVELS), np.int64)
    _replay(*columns, source, books)
    out = np.zeros(count, MBP10_DTYPE)
    for name in MBO_DTYPE.names or ():
        if name in (MBP10_DTYPE.names or ()):
            out[name] = mbo_records[name][source]
    out["length"], out["rtype"] = MBP10_DTYPE.itemsize // 4, BOOK_SCHEMAS["mbp-10"][1]
    for n, names in enumerate(_LEVEL_FIELDS):
        for k, name in enumerate(names):
            out[name] = books[:, n, k]
    return out


@njit(cache=True)
def _replay(action, side, flags, size, order, price, prices, orders, source, books):  # type: ignore[no-untyped-def]
    """Play the orders; write record numbers and books where `source` has room. Returns records made, fault and its record.

    A book is (6, levels): prices, sizes and counts of bid and ask, bid first.
    """
    held_side = np.full(orders, -1, np.int8)
    held_price = np.zeros(orders, np.int64)
    held_size = np.zeros(orders, np.int64)
    total = np.zeros((2, len(prices)), np.int64)
    count = np.zeros((2, len(prices)), np.int64)
    best = np.array([-1, len(prices)])  # an index at or beyond the best price: bids from above, asks from below
    edge = np.array([-1, len(prices)])  # index of the last level shown; a change beyond it cannot be seen
    shown = np.zeros((6, LEVELS), np.int64)
    now = np.zeros((6, LEVELS), np.int64)
    _show(total, count, prices, best, edge, now)
    shown[:] = now
    stale = False  # `now` is older than the book
    made = 0
    for i in range(len(action)):
        a = action[i]
        if a == 84:  # T
            if stale:
                _show(total, count, prices, best, edge, now)
                stale = False
            if made < len(source):
                source[made] = i
                books[made] = now
            made += 1
        elif a == 82:  # R
            held_side[:] = -1
            total[:] = 0
            count[:] = 0
            best[0], best[1] = -1, len(prices)
            stale = True
        elif a == 65 or a == 67 or a == 77:  # A, C, M
            o = order[i]
            if a == 67:
                if held_side[o] < 0:
                    return made, 1, i
                if size[i] > held_size[o]:
                    return made, 2, i
            elif prices[price[i]] == _UNDEFINED or (side[i] != 65 and side[i] != 66):
                return made, 4, i
            elif a == 65 and held_side[o] >= 0:
                return made, 3, i
            if held_side[o] >= 0:  # take out what is cancelled, or the whole order before it is put back
                s, p = held_side[o], held_price[o]
                gone = size[i] if a == 67 else held_size[o]
                whole = gone == held_size[o]
                total[s, p] -= gone
                held_size[o] -= gone
                if whole:
                    count[s, p] -= 1
                    held_side[o] = -1
                stale = stale or (p >= edge[0] if s == 0 else p <= edge[1])
            if a != 67:
                s = 0 if side[i] == 66 else 1
                p = price[i]
                held_side[o], held_price[o], held_size[o] = s, p, size[i]
                total[s, p] += size[i]
                count[s, p] += 1
                best[s] = max(best[s], p) if s == 0 else min(best[s], p)
                stale = stale or (p >= edge[0] if s == 0 else p <= edge[1])
        if flags[i] & LAST_OF_EVENT:
            if stale:
                _show(total, count, prices, best, edge, now)
                stale = False
            if not np.array_equal(now, shown):
                if made < len(source):
                    source[made] = i
                    books[made] = now
                made += 1
                shown[:] = now
    return made, 0, -1


@njit(cache=True)
def _show(total, count, prices, best, edge, now):  # type: ignore[no-untyped-def]
    """The ten best levels of both sides into `now`; moves best and edge to where they are."""
    for s in range(2):
        step = -1 if s == 0 else 1
        limit = -1 if s == 0 else len(prices)
        p = best[s]
        while p != limit and count[s, p] == 0:
            p += step
        best[s] = p
        edge[s] = limit
        k = 0
        while p != limit and k < LEVELS:
            if count[s, p]:
                now[s, k], now[2 + s, k], now[4 + s, k] = prices[p], total[s, p], count[s, p]
                k += 1
                edge[s] = p
            p += step
        if k < LEVELS:
            edge[s] = limit  # every level is shown
        while k < LEVELS:
            now[s, k], now[2 + s, k], now[4 + s, k] = _UNDEFINED, 0, 0
            k += 1
