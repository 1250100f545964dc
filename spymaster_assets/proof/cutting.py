"""Copies of DBN input that end at a time, or whose records after it are altered: the futures that a replay tries."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
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

Future = Literal["cut", "altered"]
_END_OFFSET = 34
"""Of the requested end in a DBN header: 8 bytes of prefix, 16 of dataset, 2 of schema, 8 of start; the same in all versions."""
PRICES = ("price", "open", "high", "low", "close")
_SHIFT_E9 = 370_000_000
"""How far prices are moved after the time: no multiple of a usual level's distance."""


def write_future(entries: Sequence[FileEntry], target: Path, at_ns: int, future: Future) -> None:
    """Write each file as it would be if input ended at at_ns ('cut'), or were another after it ('altered').

    Known before at_ns are records received before it and bars that had ended by then. Files that end before are linked, files that
    begin after are left out when cutting. Raises MarketDataError on damage.
    """
    target.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        mark = entry.path.parent / SIMULATED_MARK
        if mark.is_file() and not (target / SIMULATED_MARK).exists():
            os.symlink(mark, target / SIMULATED_MARK)
        path = target / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.header.end_ns is not None and entry.header.end_ns <= at_ns:
            os.symlink(entry.path, path)
        elif future == "altered" or entry.header.start_ns < at_ns:
            write_atomic(path, _rewritten(entry.path, at_ns, future))


def _rewritten(path: Path, at_ns: int, future: Future) -> bytes:
    header = read_header(path)
    raw = path.read_bytes()
    if header.compressed:
        raw = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(raw)
    head = bytearray(raw[: header.data_offset])
    records = _records(path)
    length_ns = BAR_SECONDS.get(header.schema, 0) * NS
    known = records[time_field(header.schema)].astype(np.int64) + length_ns
    before = known <= at_ns if length_ns else known < at_ns
    if future == "cut":
        records = records[before]
        struct.pack_into("<Q", head, _END_OFFSET, at_ns)
    else:
        records = records.copy()
        _alter(records, ~before)
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


def _records(path: Path) -> NDArray[np.void]:
    return read_records(path, layouts_of(read_header(path)))


def _alter(records: NDArray[np.void], after: NDArray[np.bool_]) -> None:
    """Move every price after the time and double every size, in place; undefined prices stay."""
    for name in records.dtype.names or ():
        if name in PRICES or name.startswith(("bid_px", "ask_px")):
            prices = records[name]
            prices[after & (prices < np.iinfo(np.int64).max)] += _SHIFT_E9
        elif name in ("size", "volume"):
            records[name][after] *= 2


def write_past(entries: Sequence[FileEntry], target: Path, before_ns: int) -> None:
    """Write each file as if all before before_ns had been otherwise: prices moved up in even minutes and down in odd ones, sizes
    and quantities doubled; no record is dropped, so that coverage is the same. Raises MarketDataError on damage."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        mark = entry.path.parent / SIMULATED_MARK
        if mark.is_file() and not (target / SIMULATED_MARK).exists():
            os.symlink(mark, target / SIMULATED_MARK)
        path = target / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.header.start_ns >= before_ns:
            os.symlink(entry.path, path)
        else:
            write_atomic(path, _with_another_past(entry.path, before_ns))


def _with_another_past(path: Path, before_ns: int) -> bytes:
    header = read_header(path)
    raw = path.read_bytes()
    if header.compressed:
        raw = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(raw)
    records = _records(path).copy()
    known = records[time_field(header.schema)].astype(np.int64)
    before = known < before_ns
    shift = np.where(before, (1 - 2 * (known // MINUTE_NS % 2)) * _SHIFT_E9, 0)
    for name in records.dtype.names or ():
        if name in PRICES or name.startswith(("bid_px", "ask_px")):
            prices = records[name]
            records[name] = np.where(prices < np.iinfo(np.int64).max, prices + shift, prices)
        elif name in ("size", "volume", "quantity") or name.startswith(("bid_sz", "ask_sz")):
            records[name][before] *= 2
    body = raw[: header.data_offset] + records.view(f"V{records.dtype.itemsize}").tobytes()
    return zstandard.ZstdCompressor(level=1).compress(body) if header.compressed else body
