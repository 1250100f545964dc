"""Book decoding against the vendor's decoder: a generated mbp-10 file, both in this process, one thread."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace

import databento
import databento_dbn
import numpy as np
import zstandard
from numpy.typing import NDArray

from spymaster_assets.market.book import book_snapshots, build_mbp10
from spymaster_assets.market.dbn import MBO_DTYPE, MBP10_DTYPE

RECORDS = 1_000_000
INSTRUMENT_ID = 17077
OPEN_NS = 1_718_027_400_000_000_000
TICK_E9 = 250_000_000
REPEATS = 3


def generate(count: int, rng: np.random.Generator) -> NDArray[np.void]:
    """MBP10_DTYPE records of a walking market: every record changes one size, one in forty moves the price; 5 ms apart on average."""
    out = np.zeros(count, MBP10_DTYPE)
    out["length"], out["rtype"], out["publisher_id"], out["instrument_id"] = 92, 10, 1, INSTRUMENT_ID
    out["ts_recv"] = OPEN_NS + np.cumsum(rng.exponential(5e6, count)).astype(np.uint64)
    out["ts_event"] = out["ts_recv"] - np.uint64(150_000)
    out["sequence"] = np.arange(count)
    out["action"] = rng.choice(np.array([b"A", b"C", b"M", b"T"]), count, p=[0.4, 0.35, 0.2, 0.05])
    out["side"] = rng.choice(np.array([b"A", b"B"]), count)
    out["flags"] = 130
    out["size"] = rng.integers(1, 20, count)
    best = 20_000 + np.cumsum(np.where(rng.random(count) < 1 / 40, rng.integers(-1, 2, count), 0))
    level = rng.integers(0, 20, count)
    change = rng.integers(-5, 6, count)
    for k in range(10):
        for side, sign in (("bid", -1), ("ask", 1)):
            hit = level == 2 * k + (sign > 0)
            out[f"{side}_px_{k:02}"] = (best + sign * k + (sign > 0)) * TICK_E9
            out[f"{side}_sz_{k:02}"] = np.maximum(1, 60 + 10 * k + np.cumsum(np.where(hit, change, 0)))
            out[f"{side}_ct_{k:02}"] = out[f"{side}_sz_{k:02}"] // 3 + 1
    out["price"] = out["bid_px_00"]
    return out


def write(path: Path, records: NDArray[np.void], schema: str) -> None:
    """Write the records as one zstd frame, as the vendor does."""
    day = date(1970, 1, 1) + timedelta(days=int(records["ts_recv"][0]) // 86_400_000_000_000)
    interval = SimpleNamespace(start_date=day, end_date=day + timedelta(days=2), symbol=str(INSTRUMENT_ID))
    header = databento_dbn.Metadata(
        dataset="GLBX.MDP3",
        start=int(records["ts_recv"][0]),
        end=int(records["ts_recv"][-1]) + 1,
        stype_in=databento_dbn.SType.RAW_SYMBOL,
        stype_out=databento_dbn.SType.INSTRUMENT_ID,
        schema=databento_dbn.Schema.from_str(schema),
        symbols=["ESM4"],
        partial=[],
        not_found=[],
        mappings=[SimpleNamespace(raw_symbol="ESM4", intervals=[interval])],
        version=3,
    ).encode()
    with path.open("wb") as f, zstandard.ZstdCompressor().stream_writer(f) as writer:
        writer.write(bytes(header))
        writer.write(records.view(np.uint8).data)


def generate_mbo(count: int, rng: np.random.Generator) -> NDArray[np.void]:
    """MBO_DTYPE records: a book of about 2,000 orders that come and go near a price."""
    out = np.zeros(count, MBO_DTYPE)
    out["length"], out["rtype"], out["instrument_id"], out["flags"] = 14, 160, INSTRUMENT_ID, 128
    out["ts_recv"] = OPEN_NS + np.arange(count) * 1_000_000
    number = np.arange(count)
    life = 4_000
    cancels = (number >= life) & (number % 2 == 1)  # of the order that was added life - 1 records ago
    adds = np.where(cancels, number - life + 1, number)
    ask = rng.integers(0, 2, count)
    price = (20_000 + ask + (2 * ask - 1) * np.minimum(rng.geometric(0.1, count), 100)) * TICK_E9
    out["order_id"], out["action"] = adds + 1, np.where(cancels, b"C", b"A")
    out["side"], out["price"], out["size"] = np.where(ask[adds], b"A", b"B"), price[adds], 1 + adds % 9
    return out


def best_of(run: Callable[[], object]) -> float:
    """Shortest time of REPEATS runs, seconds, after one run that compiles and warms the file cache."""
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main(count: int = RECORDS) -> None:
    """Print times, ratios and memory for `count` records."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "book.mbp-10.dbn.zst"
        write(path, generate(count, rng), "mbp-10")
        kept = len(book_snapshots(path, INSTRUMENT_ID))  # compiled from here on
        before = _reset_peak()
        book_snapshots(path, INSTRUMENT_ID)
        grown = _status_mib("VmHWM") - before
        ours = best_of(lambda: book_snapshots(path, INSTRUMENT_ID))
        theirs = best_of(lambda: databento.DBNStore.from_file(path).to_ndarray())
        size = path.stat().st_size
    print(f"mbp-10: {count:,} records, {count * 368 / 2**20:,.0f} MiB, {size / 2**20:,.0f} MiB compressed")
    print(f"  book_snapshots       {ours:7.3f} s  {count / ours / 1e6:6.2f} M records/s  {kept:,} snapshots")
    print(f"  DBNStore.to_ndarray  {theirs:7.3f} s  {count / theirs / 1e6:6.2f} M records/s")
    print(f"  ratio {ours / theirs:.2f}; the peak of memory grew by {grown:,.0f} MiB while book_snapshots ran")
    orders = generate_mbo(count, rng)
    build = best_of(lambda: build_mbp10(orders))
    print(f"mbo: build_mbp10 of {count:,} records {build:.3f} s, {count / build / 1e6:.2f} M records/s")


def _reset_peak() -> float:
    """Let the peak of resident memory start from what is resident now; return that, MiB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mib("VmRSS")


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
