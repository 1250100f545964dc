"""DBN files in: headers without trust in names, records straight into arrays, every fault as one typed error."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import databento_dbn
import numpy as np
import zstandard
from numpy.typing import NDArray

from spymaster_assets.errors import MarketDataError, refusing

TRADE_DTYPE = np.dtype(
    [
        ("length", "u1"), ("rtype", "u1"), ("publisher_id", "<u2"), ("instrument_id", "<u4"), ("ts_event", "<u8"),
        ("price", "<i8"), ("size", "<u4"), ("action", "S1"), ("side", "S1"), ("flags", "u1"), ("depth", "u1"),
        ("ts_recv", "<u8"), ("ts_in_delta", "<i4"), ("sequence", "<u4"),
    ]
)  # fmt: skip
"""Record of the schema `trades`: 48 bytes in all DBN versions."""
OHLCV_DTYPE = np.dtype(
    [
        ("length", "u1"), ("rtype", "u1"), ("publisher_id", "<u2"), ("instrument_id", "<u4"), ("ts_event", "<u8"),
        ("open", "<i8"), ("high", "<i8"), ("low", "<i8"), ("close", "<i8"), ("volume", "<u8"),
    ]
)  # fmt: skip
"""Record of the ohlcv schemas: 56 bytes in all DBN versions; ts_event is the bar's start."""
SCHEMAS: dict[str, tuple[np.dtype, int]] = {
    "trades": (TRADE_DTYPE, 0x00),
    "ohlcv-1s": (OHLCV_DTYPE, 0x20),
    "ohlcv-1m": (OHLCV_DTYPE, 0x21),
}
"""Schemas of a session's tape or bars: record layout and record type."""


def _mbp(levels: int) -> np.dtype:
    """Layout of a market-by-price record: the head of a trade, then price, size and order count of both sides, best first."""
    head = [(name, TRADE_DTYPE[name].str) for name in TRADE_DTYPE.names or ()]
    sides = [
        (f"{side}_{part}_{level:02}", kind)
        for level in range(levels)
        for part, kind in (("px", "<i8"), ("sz", "<u4"), ("ct", "<u4"))
        for side in ("bid", "ask")
    ]
    return np.dtype(head + sides)


MBP1_DTYPE = _mbp(1)
"""Record of the schema `mbp-1`: 80 bytes in all DBN versions."""
MBP10_DTYPE = _mbp(10)
"""Record of the schema `mbp-10`: 368 bytes in all DBN versions."""
MBO_DTYPE = np.dtype(
    [
        ("length", "u1"), ("rtype", "u1"), ("publisher_id", "<u2"), ("instrument_id", "<u4"), ("ts_event", "<u8"),
        ("order_id", "<u8"), ("price", "<i8"), ("size", "<u4"), ("flags", "u1"), ("channel_id", "u1"),
        ("action", "S1"), ("side", "S1"), ("ts_recv", "<u8"), ("ts_in_delta", "<i4"), ("sequence", "<u4"),
    ]
)  # fmt: skip
"""Record of the schema `mbo`: 56 bytes in all DBN versions."""
BOOK_SCHEMAS: dict[str, tuple[np.dtype, int]] = {
    "mbp-10": (MBP10_DTYPE, 0x0A),
    "mbp-1": (MBP1_DTYPE, 0x01),
    "mbo": (MBO_DTYPE, 0xA0),
}
"""Schemas of the order book: record layout and record type."""
LAYOUTS = SCHEMAS | BOOK_SCHEMAS
"""Every schema that can be read."""
BAR_SECONDS = {"ohlcv-1s": 1, "ohlcv-1m": 60}
UNDEFINED_PRICE = np.iinfo(np.int64).max
UNDEFINED_TIME = np.iinfo(np.uint64).max
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_MAGIC = range(0x184D2A50, 0x184D2A60)
_MAX_BLOCK = 128 << 10
_GROWTH = 8 << 20
_ALWAYS_ALLOWED, _MAX_RATIO = 1 << 28, 256
_FRAME_HEADER = 18
_MIN_HEADER, _MAX_HEADER = 120, 1 << 28
CHUNK_RECORDS = 4096
"""Records that `stream_records` holds at a time: 1.5 MB of mbp-10, which stays in the cache."""
_REMEDY = "download the file again and compare its size and hash with the vendor's"


@dataclass(frozen=True)
class Symbol:
    """One instrument id of a file with its raw symbol and the days for which the mapping holds (end excluded)."""

    instrument_id: int
    raw_symbol: str
    start_date: date
    end_date: date


@dataclass(frozen=True)
class DbnHeader:
    """What a DBN file says of itself; start_ns and end_ns are the requested range (end_ns None when open)."""

    path: Path
    version: int
    dataset: str
    schema: str
    start_ns: int
    end_ns: int | None
    symbols: tuple[Symbol, ...]
    ts_out: bool
    compressed: bool
    data_offset: int


def read_header(path: Path) -> DbnHeader:
    """Header of a `.dbn` or `.dbn.zst` file, told apart by content; reads the first bytes only.

    Raises MarketDataError when the file is empty, is not DBN or its header is damaged.
    """
    with _typed(path), path.open("rb") as f:
        magic = f.read(4)
        if not magic:
            raise MarketDataError("the file is empty", where=str(path), expected="a DBN file", remedy=_REMEDY)
        f.seek(0)
        compressed = magic == _ZSTD_MAGIC
        if compressed:
            with zstandard.ZstdDecompressor().stream_reader(f, read_across_frames=True) as reader:
                return _parse_header(path, reader.read, compressed)
        return _parse_header(path, f.read, compressed)


def read_records(path: Path, schemas: Mapping[str, tuple[np.dtype, int]] = LAYOUTS) -> NDArray[np.void]:
    """All records of a file as a structured array, in file order; `schemas` holds the accepted layouts and record types.

    Raises MarketDataError when the file is truncated, corrupt, of an unknown schema, out of receive order or holds impossible
    prices. The whole file is decompressed once, into one buffer that the array views.
    """
    with _typed(path):
        raw = path.read_bytes()
        header = read_header(path)
        _require_schema(header, schemas)
        buffer = _decompress(path, raw) if header.compressed else np.frombuffer(raw, np.uint8)
        records = _view(path, buffer, header, schemas)
        _refuse_disorder(path, records, header)
        return records


def stream_records(
    path: Path, schemas: Mapping[str, tuple[np.dtype, int]] = LAYOUTS, chunk_records: int = CHUNK_RECORDS
) -> Iterator[NDArray[np.void]]:
    """Records of a file in file order, up to chunk_records at a time; each array views one buffer that the next overwrites.

    Raises MarketDataError when the schema is not in `schemas` or the file is truncated or corrupt. zstd frames are walked to their
    ends before the first record is handed out; the order of records is left to the caller.
    """
    with _typed(path), path.open("rb") as file:
        header = read_header(path)
        _require_schema(header, schemas)
        dtype, rtype, stride = _layout(header, schemas)
        total = None
        reader: Any = file
        if header.compressed:
            descriptor = file.fileno()
            sizes = list(_frame_sizes(path, os.fstat(descriptor).st_size, lambda at, n: os.pread(descriptor, n, at)))
            total = None if None in sizes else sum(s for s in sizes if s is not None)
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        _read_exactly(path, reader.read, header.data_offset)
        buffer = np.empty(chunk_records * stride, np.uint8)
        done = 0
        while filled := _fill(reader, buffer.data):
            _refuse_partial(path, done + filled, stride)
            records = buffer[:filled].view(dtype)
            _refuse_alien(path, records, rtype, stride, header.schema, done // stride)
            yield records
            done += filled
        if total is not None and header.data_offset + done != total:
            raise _short(path, header.data_offset + done, total)


def file_sha256(path: Path) -> str:
    """SHA-256 of an input file's bytes; raise MarketDataError when it cannot be read."""
    with _typed(path), path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    """Guard of what is read and hashed inside; raise MarketDataError when a file was replaced, written to or removed meanwhile."""
    before = [_identity(path) for path in paths]
    yield
    for path, identity in zip(paths, before, strict=True):
        if _identity(path) != identity:
            raise MarketDataError(
                "the file changed while it was read",
                where=str(path),
                expected="the same size, time and inode before and after",
                remedy="wait until its delivery is complete, then materialize again",
            )


def _identity(path: Path) -> tuple[int, ...] | None:
    """What a file that is replaced or written to does not keep; None when there is none."""
    try:
        told = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    return told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns


def time_field(schema: str) -> str:
    """Field that orders a schema's records: start time of bars, receive time of all others."""
    return "ts_event" if schema.startswith("ohlcv") else "ts_recv"


def _require_schema(header: DbnHeader, schemas: Mapping[str, tuple[np.dtype, int]]) -> None:
    if header.schema not in schemas:
        raise MarketDataError(
            f"schema {header.schema!r} is not read here",
            where=str(header.path),
            expected=f"one of {', '.join(schemas)}",
            remedy="keep other schemas in another folder",
        )


def _layout(header: DbnHeader, schemas: Mapping[str, tuple[np.dtype, int]]) -> tuple[np.dtype, int, int]:
    """Record layout, record type and bytes a record, the send time that may follow it included."""
    dtype, rtype = schemas[header.schema]
    if header.ts_out:
        dtype = _with_send_time(dtype)
    return dtype, rtype, dtype.itemsize


def _parse_header(path: Path, read, compressed: bool) -> DbnHeader:  # type: ignore[no-untyped-def]
    prefix = _read_exactly(path, read, 8)
    if prefix[:3] != b"DBN":
        raise MarketDataError(
            "not a DBN file: it has no DBN header", where=str(path), expected="bytes 'DBN' first", remedy=_REMEDY
        )
    version, length = prefix[3], struct.unpack("<I", prefix[4:])[0]
    if version not in (1, 2, 3):
        raise MarketDataError(f"DBN version {version} is unknown", where=str(path), expected="1, 2 or 3")
    if not _MIN_HEADER <= length <= _MAX_HEADER:  # the library panics below the fixed fields and five counts
        raise MarketDataError(
            f"header claims {length} bytes",
            where=str(path),
            expected=f"{_MIN_HEADER} bytes to 256 MiB",
            remedy=_REMEDY,
        )
    body = _read_exactly(path, read, length)
    meta = databento_dbn.Metadata.decode(prefix + body)
    if meta.schema is None:
        raise MarketDataError("the file names no schema", where=str(path), expected=f"one of {', '.join(SCHEMAS)}")
    end = meta.end
    return DbnHeader(
        path=path,
        version=version,
        dataset=str(meta.dataset),
        schema=str(meta.schema),
        start_ns=int(meta.start),
        end_ns=None if end in (None, 0, UNDEFINED_TIME) else int(end),
        symbols=_symbols(meta),
        ts_out=bool(meta.ts_out),
        compressed=compressed,
        data_offset=8 + length,
    )


def _symbols(meta: databento_dbn.Metadata) -> tuple[Symbol, ...]:
    by_id = str(meta.stype_out) == "instrument_id"
    out = []
    for name, intervals in meta.mappings.items():
        for part in intervals:
            other = str(part["symbol"])
            number, text = (other, name) if by_id else (name, other)
            if number.isdigit():
                out.append(Symbol(int(number), text, part["start_date"], part["end_date"]))
    return tuple(sorted(out, key=lambda s: (s.instrument_id, s.start_date)))


def _read_exactly(path: Path, read, n: int) -> bytes:  # type: ignore[no-untyped-def]
    data = b""
    while len(data) < n:
        piece = read(n - len(data))
        if not piece:
            raise MarketDataError(f"the header ends after {len(data)} of {n} bytes", where=str(path), remedy=_REMEDY)
        data += piece
    return data


def _decompress(path: Path, raw: bytes) -> NDArray[np.uint8]:
    """Decompressed bytes of all frames, in one array; refuses a frame that does not end."""
    sizes = list(_frame_sizes(path, len(raw), lambda at, n: raw[at : at + n]))
    total = sum(s for s in sizes if s is not None)
    exact = None not in sizes
    limit = max(_ALWAYS_ALLOWED, _MAX_RATIO * len(raw))
    if total > limit:
        raise _bomb(path, total, limit)
    out = np.empty(total if exact else max(_GROWTH, 8 * len(raw)), np.uint8)
    filled = 0
    with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as reader:
        while True:
            filled += _fill(reader, out.data[filled:])
            if exact or filled < len(out):
                break
            if filled > limit:
                raise _bomb(path, filled, limit)
            out = np.resize(out, 2 * len(out))
    if exact and filled != total:
        raise _short(path, filled, total)
    return out[:filled]


def _bomb(path: Path, size: int, limit: int) -> MarketDataError:
    return MarketDataError(
        f"decompresses to {size} bytes or more, which no market data does",
        where=str(path),
        expected=f"at most {limit} bytes",
        remedy=_REMEDY,
    )


def _fill(reader: Any, view: memoryview) -> int:
    """Read until the view is full or the input ends; return the bytes read."""
    filled = 0
    while filled < len(view):
        n = reader.readinto(view[filled:])
        if n == 0:
            break
        filled += n
    return filled


def _short(path: Path, found: int, total: int) -> MarketDataError:
    return MarketDataError(f"decompresses to {found} of {total} bytes", where=str(path), remedy=_REMEDY)


def _frame_sizes(path: Path, end: int, read: Callable[[int, int], bytes]) -> Iterator[int | None]:
    """Declared content size of each zstd frame, None where not declared; walks block headers to prove that each frame ends."""
    at = 0
    while at < end:
        head = read(at, _FRAME_HEADER)
        if len(head) >= 8 and struct.unpack_from("<I", head)[0] in _SKIPPABLE_MAGIC:
            at += 8 + struct.unpack_from("<I", head, 4)[0]
            if at > end:
                raise _truncated(path, end, "the file ends inside a skippable frame")
            continue
        if head[:4] != _ZSTD_MAGIC or len(head) < 5:
            raise _truncated(path, at, "a zstd frame starts there but its header is damaged or cut off")
        descriptor = head[4]
        single = bool(descriptor & 0x20)
        dictionary = (0, 1, 2, 4)[descriptor & 3]
        flag = descriptor >> 6
        size_bytes = (1 if single else 0, 2, 4, 8)[flag]
        size_at = 5 + (0 if single else 1) + dictionary
        position = at + size_at + size_bytes
        if position > end:
            raise _truncated(path, at + size_at, "the file ends inside a frame header")
        size = (
            int.from_bytes(head[size_at : size_at + size_bytes], "little") + (256 if flag == 1 else 0)
            if size_bytes
            else None
        )
        blocks, last = 0, False
        while not last:
            blocks += 1
            if position + 3 > end:
                raise _truncated(path, position, "the file ends where a block should begin")
            block = int.from_bytes(read(position, 3), "little")
            last = bool(block & 1)
            position += 3 + (1 if (block >> 1) & 3 == 1 else block >> 3)
        position += 4 if descriptor & 4 else 0
        if position > end:
            raise _truncated(path, end, "the file ends inside a block")
        if size is not None and size > blocks * _MAX_BLOCK:  # or a damaged header would have us allocate exabytes
            raise _truncated(path, at, f"a frame of {blocks} blocks claims to hold {size} bytes")
        yield size
        at = position


def _truncated(path: Path, at: int, reason: str) -> MarketDataError:
    return MarketDataError(
        f"truncated or corrupt zstd data: {reason}",
        where=f"{path}, byte {at}",
        expected="complete frames",
        remedy=_REMEDY,
    )


def _view(
    path: Path, buffer: NDArray[np.uint8], header: DbnHeader, schemas: Mapping[str, tuple[np.dtype, int]]
) -> NDArray[np.void]:
    dtype, rtype, stride = _layout(header, schemas)
    body = buffer[header.data_offset :]
    _refuse_partial(path, len(body), stride)
    records = np.frombuffer(body.data, dtype)
    _refuse_alien(path, records, rtype, stride, header.schema)
    return records


def _refuse_partial(path: Path, size: int, stride: int) -> None:
    if size % stride:
        raise MarketDataError(
            f"the last record is cut off: {size} bytes of records",
            where=str(path),
            expected=f"a multiple of {stride}",
            remedy=_REMEDY,
        )


def _refuse_alien(path: Path, records: NDArray[np.void], rtype: int, stride: int, schema: str, first: int = 0) -> None:
    """Refuse records of another type or length than the schema has; first: number of records[0] in the file."""
    odd = (records["rtype"] != rtype) | (records["length"] != stride // 4)
    if odd.any():
        at = int(odd.argmax())
        raise MarketDataError(
            f"record {first + at} has type {int(records['rtype'][at])} and length {int(records['length'][at])}",
            where=str(path),
            expected=f"type {rtype} and length {stride // 4} as schema {schema} has",
            remedy=_REMEDY,
        )


def _with_send_time(dtype: np.dtype) -> np.dtype:
    """The layout of records that end in the 8 bytes of ts_out, without a field for it."""
    fields = dict(dtype.fields or {})
    return np.dtype(
        {
            "names": list(fields),
            "formats": [field[0] for field in fields.values()],
            "offsets": [field[1] for field in fields.values()],
            "itemsize": dtype.itemsize + 8,
        }
    )


def _refuse_disorder(path: Path, records: NDArray[np.void], header: DbnHeader) -> None:
    if not len(records):
        return
    field = time_field(header.schema)
    times = records[field]
    back = times[1:] < times[:-1]
    if back.any():
        at = int(back.argmax()) + 1
        raise MarketDataError(
            f"{field} runs backwards at record {at}: {int(times[at])} after {int(times[at - 1])}",
            where=str(path),
            expected="records in receive order",
            remedy="a file was joined from pieces or delivered twice; download it again",
        )
    if header.schema in ("trades", "tbbo", "tcbbo"):
        bad = (records["price"] == UNDEFINED_PRICE) | (times == UNDEFINED_TIME)
        reason = "an undefined price or time"
    elif not header.schema.startswith("ohlcv"):  # an empty level, an empty side or a clear has no price
        bad = times == UNDEFINED_TIME
        reason = "an undefined time"
    else:
        o, h, low, c = (records[n] for n in ("open", "high", "low", "close"))
        bad = (h == UNDEFINED_PRICE) | (low > o) | (low > c) | (h < o) | (h < c)
        reason = "an undefined price, or open or close outside [low, high]"
    if bad.any():
        raise MarketDataError(f"record {int(bad.argmax())} has {reason}", where=str(path), remedy=_REMEDY)


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises, a Rust panic included, into one MarketDataError."""
    try:
        with refusing(
            MarketDataError,
            "cannot be decoded",
            where=str(path),
            expected="a whole DBN file",
            remedy=_REMEDY,
            but=(OSError,),
        ):
            yield
    except FileNotFoundError:
        raise MarketDataError("no such file", where=str(path), remedy="check SPYMASTER_DBN_DIR") from None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> MarketDataError:
    return MarketDataError(
        f"cannot be read: {error.strerror or error}", where=str(path), remedy="mend its permissions or disk"
    )
