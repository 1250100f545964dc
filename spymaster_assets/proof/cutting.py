"""Copies of the input that end at a time, or whose records after it are altered or turn out to be late: the futures that a replay tries."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import zstandard
from numpy.typing import NDArray

from spymaster_assets.market.dbn import BAR_SECONDS, LAYOUTS, DbnHeader, read_header, read_records, time_field
from spymaster_assets.market.files import SIMULATED_MARK, FileEntry
from spymaster_assets.market.options import (
    CONSOLIDATED_QUOTE_SCHEMAS,
    DEFINITION_DTYPES,
    QUOTED_TRADE_SCHEMAS,
    STATISTICS_DTYPES,
)
from spymaster_assets.settings import MINUTE_NS, NS
from spymaster_assets.store import write_atomic

Future = Literal["cut", "altered", "late"]
FUTURES: tuple[Future, ...] = ("cut", "altered", "late")
"""Input ends at the time; is another after it; brings records after it that tell of events before it."""
_LATEST_S = 1800
"""How far before the time late records tell of, at most."""
_END_OFFSET = 34
"""Of the requested end in a DBN header: 8 bytes of prefix, 16 of dataset, 2 of schema, 8 of start; the same in all versions."""
PRICES = ("price", "open", "high", "low", "close")
_SHIFT_E9 = 370_000_000
"""How far prices are moved after the time: no multiple of a usual level's distance."""


def write_future(
    entries: Sequence[FileEntry], target: Path, at_ns: int, future: Future, until_ns: int | None = None
) -> None:
    """Write each file as it would be if input ended at at_ns ('cut'), were another after it ('altered') or late after it ('late').

    Known before at_ns are records received before it and bars that had ended by then. 'late' moves the event time of every second later
    record before at_ns and alters it; bars have no receive time and stay. With until_ns nothing from then on is touched. Files that end
    before are linked, files that begin after are left out when cutting. Raises MarketDataError on damage.
    """
    for entry in entries:
        path = _place(entry, target)
        before = entry.header.end_ns is not None and entry.header.end_ns <= at_ns
        if (
            before
            or (until_ns is not None and entry.header.start_ns >= until_ns)
            or (future == "late" and entry.header.schema in BAR_SECONDS)
        ):
            os.symlink(entry.path, path)
        elif future != "cut" or entry.header.start_ns < at_ns:
            write_atomic(path, _rewritten(entry.path, at_ns, future, until_ns))


def write_past(entries: Sequence[FileEntry], target: Path, before_ns: int) -> None:
    """Write each file as if all before before_ns had been otherwise: prices moved up in even minutes and down in odd ones, sizes
    and quantities doubled; no record is dropped, so that coverage is the same. Raises MarketDataError on damage."""
    for entry in entries:
        path = _place(entry, target)
        if entry.header.start_ns >= before_ns:
            os.symlink(entry.path, path)
        else:
            write_atomic(path, _with_another_past(entry.path, before_ns))


def write_flat_future(paths: Sequence[Path], folder: Path, target: Path, at_ns: int, future: Future) -> None:
    """The same of flat files of option trades below `folder`; they hold no event time, so a late one is an altered one."""
    for path in paths:
        # every cell stays text, or a price would be written with other digits
        frame = pl.read_csv(path, infer_schema=False)
        after = pl.col("sip_timestamp").cast(pl.Int64) >= at_ns
        if future == "cut":
            frame = frame.filter(~after)
        else:
            doubled = pl.when(after).then((pl.col("size").cast(pl.Int64) * 2).cast(pl.String)).otherwise("size")
            dearer = pl.when(after).then((pl.col("price").cast(pl.Float64) + 0.37).cast(pl.String)).otherwise("price")
            frame = frame.with_columns(size=doubled, price=dearer)
        text = frame.write_csv().encode()
        write_atomic(
            target / path.relative_to(folder), gzip.compress(text, mtime=0) if path.name.endswith(".gz") else text
        )


def _place(entry: FileEntry, target: Path) -> Path:
    """Where a copy of the file belongs; the mark of a simulated market goes with it."""
    mark, path = entry.path.parent / SIMULATED_MARK, target / entry.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if mark.is_file() and not (target / SIMULATED_MARK).exists():
        os.symlink(mark, target / SIMULATED_MARK)
    return path


def _rewritten(path: Path, at_ns: int, future: Future, until_ns: int | None) -> bytes:
    header, head, records = _parts(path)
    length_ns = BAR_SECONDS.get(header.schema, 0) * NS
    known = records[time_field(header.schema)].astype(np.int64) + length_ns
    after = known > at_ns if length_ns else known >= at_ns
    if until_ns is not None:
        after &= known < until_ns
    if future == "cut":
        records = records[~after]
        struct.pack_into("<Q", head, _END_OFFSET, at_ns)
    else:
        records = records.copy()
        if future == "late":
            after = after & (np.arange(len(records)) % 2 == 0)
            if "ts_event" in (records.dtype.names or ()):  # a layout without it is never asked for it
                ago_ns = (np.arange(int(after.sum())) % _LATEST_S + 1) * NS
                records["ts_event"][after] = (at_ns - ago_ns).astype(np.uint64)
        _alter(records, after)
    return _file(header, head, records)


def _with_another_past(path: Path, before_ns: int) -> bytes:
    header, head, records = _parts(path)
    records = records.copy()
    known = records[time_field(header.schema)].astype(np.int64)
    _alter(records, known < before_ns, 1 - 2 * (known // MINUTE_NS % 2), ("bid_sz", "ask_sz", "quantity"))
    return _file(header, head, records)


def _parts(path: Path) -> tuple[DbnHeader, bytearray, NDArray[np.void]]:
    """Header, its bytes and the records of a file."""
    header = read_header(path)
    raw = path.read_bytes()
    if header.compressed:
        raw = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(raw)
    return header, bytearray(raw[: header.data_offset]), read_records(path, layouts_of(header))


def _file(header: DbnHeader, head: bytearray, records: NDArray[np.void]) -> bytes:
    body = bytes(head) + records.view(f"V{records.dtype.itemsize}").tobytes()
    return zstandard.ZstdCompressor(level=1).compress(body) if header.compressed else body


def layouts_of(header: DbnHeader) -> dict[str, tuple[np.dtype, int]]:
    """Record layout and type of every schema that input may have, in the file's DBN version."""
    return {
        **LAYOUTS,
        **QUOTED_TRADE_SCHEMAS,
        **CONSOLIDATED_QUOTE_SCHEMAS,
        "definition": (DEFINITION_DTYPES[header.version], 0x13),
        "statistics": (STATISTICS_DTYPES[header.version], 0x18),
    }


def _alter(
    records: NDArray[np.void],
    where: NDArray[np.bool_],
    sign: NDArray[np.int64] | int = 1,
    doubled: tuple[str, ...] = (),
) -> None:
    """Move the prices of some records by sign x 0.37 and double their sizes, and fields that begin with `doubled`, in place; undefined
    prices stay."""
    shift_e9 = np.broadcast_to(sign * np.int64(_SHIFT_E9), where.shape)
    for name in records.dtype.names or ():
        if name in PRICES or name.startswith(("bid_px", "ask_px")):
            moved = where & (records[name] < np.iinfo(np.int64).max)
            records[name][moved] += shift_e9[moved]
        elif name in ("size", "volume") or (doubled and name.startswith(doubled)):
            records[name][where] *= 2
