"""Copies of the input that end at a time, or whose records after it are altered or turn out to be late: the futures that a replay tries."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import zstandard
from numpy.typing import NDArray

from spymaster_assets.errors import ArtifactError, MarketDataError, refusing
from spymaster_assets.market.dbn import (
    BAR_SECONDS,
    LAYOUTS,
    UNDEFINED_PRICE,
    DbnHeader,
    read_header,
    stream_records,
    time_field,
)
from spymaster_assets.market.files import SIMULATED_MARK, FileEntry
from spymaster_assets.market.options import (
    CONSOLIDATED_QUOTE_SCHEMAS,
    DEFINITION_DTYPES,
    QUOTED_TRADE_SCHEMAS,
    STATISTICS_DTYPES,
)
from spymaster_assets.proof.history import PAST_SHIFT_E9
from spymaster_assets.settings import MINUTE_NS, NS
from spymaster_assets.store import write_atomic

Future = Literal["cut", "up", "late", "sizes", "shuffled", "down", "dropped", "sides", "altered"]
FUTURES: tuple[Future, ...] = ("cut", "up", "late", "sizes", "shuffled", "down", "dropped", "sides")
"""What a session is replayed with, by the names of `proof.detect.FUTURES`: input ends at the time; prices after it are higher or lower,
each record's by a share of its own; sizes are others, blocks among them; prices, sizes and sides are shuffled within an instrument; half
of the records are missing; aggressors are others (detect: renamed); records after it tell of events before it. 'altered' is prices,
sizes and sides at once."""
NEVER_OF_BARS: frozenset[Future] = frozenset({"late", "sides"})
"""Bars have neither a receive time nor a side."""
_LATEST_S = 1800
"""How far before the time late records tell of, at most."""
_END_OFFSET = 34
"""Of the requested end in a DBN header: 8 bytes of prefix, 16 of dataset, 2 of schema, 8 of start; the same in all versions."""
PRICES = ("price", "open", "high", "low", "close")
_SIZES = ("size", "volume", "quantity")
_MOVED_BY = 0.01
"""Largest share by which a record's prices are moved."""
_MOVED_AT_ONCE_BY = 0.0002
"""The same until the minute of the time is over: a touch whose bar has begun may then still be one, so that its columns are compared."""
_BLOCK_SHARE, _BLOCK_FACTOR, _FACTOR = 0.02, 3_000, 3
"""Sizes grow by the factor, a few of them so much that totals and ranks hang on them alone."""
_ANY_SIDE = np.array([b"A", b"B", b"N"])
_PAST_SIZES = 2
_SILENT_NS = 10 * MINUTE_NS
"""How long the book of another past says nothing before it ends."""
_WHOLE_BOOKS = frozenset({"mbp-10", "mbp-1"})
"""Schemas of which a record may be missing: of single orders a cancel would have nothing to cancel."""
_REMEDY = "mend its permissions or disk, or download it again"
_CHUNK = 1 << 16
"""Records held at a time: 24 MB of mbp-10."""
Change = Callable[[NDArray[np.void]], NDArray[np.bool_]]
"""Alters records in place and tells which of them (n,) are kept."""


def write_future(
    entries: Sequence[FileEntry],
    target: Path,
    at_ns: int,
    future: Future,
    until_ns: int | None = None,
    within_ns: tuple[int, int] | None = None,
) -> None:
    """Write each file as it would be if what is known from at_ns on did not exist or were another, as `future` says, the same each time.

    Known before at_ns are records received before it and bars that had ended by then. 'late' moves the event time of every second later
    record before at_ns and alters it; bars have no receive time and stay. With until_ns nothing from then on is touched; records outside
    within_ns are left out. Files that end before are linked, files that begin after are left out when cutting. A file is never held
    whole. Raises MarketDataError when a file is damaged or cannot be read, ArtifactError when the disk does not take its copy.
    """
    for entry in entries:
        schema = entry.header.schema
        before = entry.header.end_ns is not None and entry.header.end_ns <= at_ns
        with writing(target):
            path = _place(entry, target)
            if (
                before
                or (until_ns is not None and entry.header.start_ns >= until_ns)
                or (schema in BAR_SECONDS and future in NEVER_OF_BARS)
            ):
                os.symlink(entry.path, path)
            elif future != "cut" or entry.header.start_ns < at_ns:
                rng = np.random.default_rng([at_ns // NS, zlib.crc32(entry.name.encode())])
                change = partial(_changed, schema, at_ns, future, until_ns, within_ns, rng)
                _rewrite(entry.path, path, change, at_ns if future == "cut" else None)


def write_past(entries: Sequence[FileEntry], target: Path, before_ns: int, silent: bool = False) -> None:
    """Write each file as if all before before_ns had been otherwise: prices moved up in even minutes and down in odd ones, sizes
    and quantities doubled, and a book that says nothing in the ten minutes before; no record of another feed is dropped, so that its
    coverage is the same. With `silent` nothing but that silence is another. Raises like `write_future`."""
    for entry in entries:
        with writing(target):
            path = _place(entry, target)
            if entry.header.start_ns >= before_ns or (silent and entry.header.schema not in _WHOLE_BOOKS):
                os.symlink(entry.path, path)
            else:
                _rewrite(entry.path, path, partial(_with_another_past, entry.header.schema, before_ns, silent))


def write_flat_future(paths: Sequence[Path], folder: Path, target: Path, at_ns: int, future: Future) -> None:
    """The same of flat files of option trades below `folder`: cut, with half of the rows missing, or with other prices and sizes."""
    for path in paths:
        with refusing(MarketDataError, "cannot be read", where=str(path), expected="a flat file", remedy=_REMEDY):
            # every cell stays text, or a price would be written with other digits
            frame = pl.read_csv(path, infer_schema=False)
        after = pl.col("sip_timestamp").cast(pl.Int64) >= at_ns
        if future == "cut":
            frame = frame.filter(~after)
        elif future == "dropped":
            frame = frame.filter(~after | (pl.int_range(pl.len()) % 2 == 0))
        else:
            sign = -1 if future == "down" else 1
            rng = np.random.default_rng([at_ns // NS, zlib.crc32(path.name.encode())])
            share = pl.lit(pl.Series(1 + sign * _MOVED_BY * rng.uniform(0.2, 1, frame.height)))
            price = (pl.col("price").cast(pl.Float64) * share).cast(pl.String)
            size = (pl.col("size").cast(pl.Int64) * _FACTOR + 1).cast(pl.String)
            frame = frame.with_columns(
                size=pl.when(after).then(size).otherwise("size"), price=pl.when(after).then(price).otherwise("price")
            )
        text = frame.write_csv().encode()
        with writing(target):
            write_atomic(
                target / path.relative_to(folder), gzip.compress(text, mtime=0) if path.name.endswith(".gz") else text
            )


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what a disk raises while a replay writes below `target` into one ArtifactError."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"cannot write what a replay needs: {error.strerror or error}",
            where=str(error.filename or target),
            expected="room for a copy of the session's files and artifacts",
            remedy="free disk space or set TMPDIR to a folder that has it; stored artifacts are untouched",
        ) from error


def _place(entry: FileEntry, target: Path) -> Path:
    """Where a copy of the file belongs; the mark of a simulated market goes with it."""
    mark, path = entry.path.parent / SIMULATED_MARK, target / entry.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if mark.is_file() and not (target / SIMULATED_MARK).exists():
        os.symlink(mark, target / SIMULATED_MARK)
    return path


def _rewrite(source: Path, target: Path, change: Change, end_ns: int | None = None) -> None:
    """Copy a file chunk by chunk through `change`; end_ns replaces the end that its header states."""
    header = read_header(source)
    head = _head(source, header)
    if end_ns is not None:
        struct.pack_into("<Q", head, _END_OFFSET, end_ns)
    try:
        with (
            target.open("wb") as file,
            (
                zstandard.ZstdCompressor(level=1).stream_writer(file, closefd=False)
                if header.compressed
                else nullcontext(file)
            ) as out,
        ):
            out.write(bytes(head))
            for records in stream_records(source, layouts_of(header), _CHUNK):
                # whole records: a copy of fields would leave what lies between them to chance
                whole = records.view(f"V{records.dtype.itemsize}").copy()
                out.write(whole[change(whole.view(records.dtype))].tobytes())
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _head(source: Path, header: DbnHeader) -> bytearray:
    """Decompressed bytes of a file's header."""
    with (
        refusing(MarketDataError, "cannot be read", where=str(source), expected="a whole DBN file", remedy=_REMEDY),
        source.open("rb") as raw,
    ):
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) if header.compressed else raw
        return bytearray(reader.read(header.data_offset))


def _changed(
    schema: str,
    at_ns: int,
    future: Future,
    until_ns: int | None,
    within_ns: tuple[int, int] | None,
    rng: np.random.Generator,
    records: NDArray[np.void],
) -> NDArray[np.bool_]:
    length_ns = BAR_SECONDS.get(schema, 0) * NS
    times = records[time_field(schema)].astype(np.int64)
    known = times + length_ns
    after = known > at_ns if length_ns else known >= at_ns
    if until_ns is not None:
        after &= known < until_ns
    # the minute that is under way, none if the time lies between two
    soon = times < -(-at_ns // MINUTE_NS) * MINUTE_NS
    kept = np.ones(len(records), bool) if within_ns is None else (times >= within_ns[0]) & (times < within_ns[1])
    if future == "cut":
        kept &= ~after
    elif future == "dropped" and schema not in ("definition", "mbo"):  # what never came cannot be cancelled or traded
        kept &= ~after | (rng.random(len(records)) < 0.5)
    elif future == "shuffled":
        _shuffle(records, after, schema, rng, apart=soon & (length_ns == 0))
    elif future != "dropped":
        if future == "late":
            after = after & (np.arange(len(records)) % 2 == 0)
            if "ts_event" in (records.dtype.names or ()):  # a layout without it is never asked for it
                ago_ns = (np.arange(int(after.sum())) % _LATEST_S + 1) * NS
                records["ts_event"][after] = (at_ns - ago_ns).astype(np.uint64)
        if future in ("up", "down", "late", "altered"):
            sign = {"up": 1, "down": -1}.get(future) or rng.choice([-1, 1], len(records))
            share = sign * np.where(soon, _MOVED_AT_ONCE_BY, _MOVED_BY) * rng.uniform(0.2, 1, len(records))
            _reprice(records, after, lambda prices: np.rint(prices * (1 + share[after])).astype(np.int64))
        if future in ("sizes", "late", "altered") and schema != "mbo":  # more than an order has cannot be cancelled
            _resize(records, after, np.where(rng.random(len(records)) < _BLOCK_SHARE, _BLOCK_FACTOR, _FACTOR), 1)
        if future in ("sides", "late", "altered") and schema != "mbo" and "side" in (records.dtype.names or ()):
            records["side"][after] = rng.choice(_ANY_SIDE, int(after.sum()))
    return kept


def _with_another_past(schema: str, before_ns: int, silent: bool, records: NDArray[np.void]) -> NDArray[np.bool_]:
    known = records[time_field(schema)].astype(np.int64)
    where = known < before_ns
    if not silent:
        shift_e9 = (1 - 2 * (known // MINUTE_NS % 2)) * PAST_SHIFT_E9
        _reprice(records, where, lambda prices: prices + shift_e9[where])
        _resize(records, where, np.full(len(records), _PAST_SIZES), 0)
    return ~where | (known < before_ns - _SILENT_NS) | (schema not in _WHOLE_BOOKS)


def layouts_of(header: DbnHeader) -> dict[str, tuple[np.dtype, int]]:
    """Record layout and type of every schema that input may have, in the file's DBN version."""
    return {
        **LAYOUTS,
        **QUOTED_TRADE_SCHEMAS,
        **CONSOLIDATED_QUOTE_SCHEMAS,
        "definition": (DEFINITION_DTYPES[header.version], 0x13),
        "statistics": (STATISTICS_DTYPES[header.version], 0x18),
    }


def _reprice(
    records: NDArray[np.void], where: NDArray[np.bool_], price: Callable[[NDArray[np.int64]], NDArray[np.int64]]
) -> None:
    """Other prices for some records, in place; undefined ones stay, and bars keep their order of low, open, close and high."""
    for name in records.dtype.names or ():
        if name in PRICES or name.startswith(("bid_px", "ask_px")):
            before = records[name][where]
            defined = before < UNDEFINED_PRICE
            records[name][where] = np.where(defined, price(np.where(defined, before, 0)), before)


def _resize(records: NDArray[np.void], where: NDArray[np.bool_], factor: NDArray[np.int64], more: int) -> None:
    """Sizes and quantities of some records times `factor` plus `more`, in place; empty and undefined ones stay."""
    for name in records.dtype.names or ():
        if name in _SIZES or name.startswith(("bid_sz", "ask_sz")):
            before = records[name][where]
            most = np.iinfo(before.dtype).max
            told = (before > 0) & (before < most)
            grown = np.minimum(before.astype(np.float64) * factor[where] + more, most // 2)
            records[name][where] = np.where(told, np.maximum(grown, 1).astype(before.dtype), before)


def _shuffle(
    records: NDArray[np.void],
    where: NDArray[np.bool_],
    schema: str,
    rng: np.random.Generator,
    apart: NDArray[np.bool_],
) -> None:
    """Give prices, sizes and sides of some records to others of the same instrument, in place, those that are `apart` among themselves;
    only prices of single orders."""
    at = np.flatnonzero(where)
    ids, own = records["instrument_id"][at], apart[at]
    to, of = at[np.lexsort((own, ids))], at[np.lexsort((rng.random(len(at)), own, ids))]
    for name in records.dtype.names or ():
        priced = name in PRICES or name.startswith(("bid_px", "ask_px"))
        if priced or (schema != "mbo" and (name in (*_SIZES, "side") or name.startswith(("bid_sz", "ask_sz")))):
            records[name][to] = records[name][of]
