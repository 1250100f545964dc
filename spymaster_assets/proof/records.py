"""Which records of a DBN file lie in which windows of time: indices, counts and byte offsets, read a chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spymaster_assets.market.dbn import BAR_SECONDS, read_header, stream_records, time_field
from spymaster_assets.proof.cutting import layouts_of
from spymaster_assets.settings import NS

_CHUNK_RECORDS = 1 << 14


@dataclass(frozen=True)
class Window:
    """A time [start_ns, end_ns) and what it was read for: its records are those received then, or bars that end in (start_ns, end_ns]."""

    use: str
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class RecordRange:
    """Records first to last (both included, numbered from 0 in file order) of a window, None when there is none.

    records: how many; of_contract: how many of the instrument asked for. first_byte, end_byte: their bytes in the decompressed file,
    end excluded.
    """

    use: str
    start_ns: int
    end_ns: int
    first: int | None = None
    last: int | None = None
    records: int = 0
    of_contract: int | None = None
    first_byte: int | None = None
    end_byte: int | None = None


def record_ranges(path: Path, windows: Sequence[Window], instrument_id: int | None = None) -> tuple[RecordRange, ...]:
    """The range of each window; a record received before its predecessor counts as received with it, as in the order book.

    Reads no further than the last window. Raises MarketDataError when the file is damaged.
    """
    header = read_header(path)
    field, length_ns = time_field(header.schema), BAR_SECONDS.get(header.schema, 0) * NS
    limits = np.array([[w.start_ns, w.end_ns] for w in windows], np.int64)
    if length_ns:  # of a bar the file states the start
        limits += 1 - length_ns
    found = [
        RecordRange(w.use, w.start_ns, w.end_ns, of_contract=None if instrument_id is None else 0) for w in windows
    ]
    done, latest_ns, stride = 0, 0, 0
    for chunk in stream_records(path, layouts_of(header), _CHUNK_RECORDS):
        stride = chunk.dtype.itemsize
        times = np.maximum.accumulate(np.maximum(chunk[field].astype(np.int64), latest_ns))
        mine = chunk["instrument_id"] == (instrument_id or 0)
        for n, (first, end) in enumerate(np.searchsorted(times, limits).tolist()):
            if end > first:
                found[n] = _extended(found[n], done + first, done + end, int(mine[first:end].sum()))
        done += len(chunk)
        latest_ns = int(times[-1])
        if latest_ns >= limits[:, 1].max():
            break
    return tuple(
        r
        if r.first is None or r.last is None
        else replace(
            r, first_byte=header.data_offset + r.first * stride, end_byte=header.data_offset + (r.last + 1) * stride
        )
        for r in found
    )


def _extended(known: RecordRange, first: int, end: int, mine: int) -> RecordRange:
    return replace(
        known,
        first=first if known.first is None else known.first,
        last=end - 1,
        records=known.records + end - first,
        of_contract=None if known.of_contract is None else known.of_contract + mine,
    )
