"""How fast a simulated market is written: a tenth of the full profile, from seed to five DBN files on disk."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import databento
import zstandard

from spymaster_assets.market.calendar import TradingCalendar
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.simulate import write_market
from spymaster_assets.market.simulate_book import PROFILES, simulate_book, simulate_options, write_full_market
from spymaster_assets.settings import NS

SHARE = 0.1
REPEATS = 3
TARGET_PER_S = 500_000


def best_s(action: Callable[[], object]) -> float:
    """Shortest wall time of a few runs, seconds; the first call, which compiles, is not counted."""
    action()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print records a second of the simulation alone, of writing, and of the compression that writing contains."""
    spy = instrument("SPY")
    session = TradingCalendar(spy).session("2024-02-01")
    profile = PROFILES["full"].scaled(SHARE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        took = best_s(lambda: write_full_market(folder / "book", spy, [session], 1, profile))
        paths = sorted((folder / "book").glob("*.dbn.zst"))
        stored = {p: databento.DBNStore.from_file(p).to_ndarray() for p in paths}
        records = sum(len(a) for a in stored.values())
        size = sum(a.nbytes for a in stored.values())
        raw = [a.tobytes() for a in stored.values()]
        print(
            f"Profile {profile.name}: {records:,} records, {size / 1e6:.0f} MB raw, {sum(p.stat().st_size for p in paths) / 1e6:.1f} MB"
        )
        for path, array in stored.items():
            print(f"  {path.name:36s} {len(array):10,} records {path.stat().st_size / 1e6:8.1f} MB")
        print(f"write_full_market          {records / took:12,.0f} records/s (target {TARGET_PER_S:,})")
        compressing = best_s(lambda: [zstandard.ZstdCompressor(level=1).compress(part) for part in raw])
        print(
            f"zstd level 1 of the same   {records / compressing:12,.0f} records/s: {took / compressing:.2f} x its time"
        )
        made = simulate_book(session, spy, 1, 500 * NS, profile)
        alone = best_s(lambda: simulate_book(session, spy, 1, 500 * NS, profile))
        print(f"simulate_book, no file     {made.book_records / alone:12,.0f} mbp-10 records/s")
        options = simulate_options(session, spy, 1, made, profile)
        alone = best_s(lambda: simulate_options(session, spy, 1, made, profile))
        print(f"simulate_options, no file  {(len(options.trades) + len(options.quotes)) / alone:12,.0f} records/s")
        took = best_s(lambda: write_market(folder / "trades", spy, [session], 1))
        trades = len(databento.DBNStore.from_file(next((folder / "trades").glob("*.dbn.zst"))).to_ndarray())
        print(f"write_market, trades only  {trades / took:12,.0f} records/s")
    print(f"Peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main()
