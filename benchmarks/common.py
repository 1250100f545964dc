"""The session that the benchmarks share, and how they take times."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import zstandard

from spymaster_assets.market.calendar import Session, TradingCalendar
from spymaster_assets.market.instruments import Instrument, instrument
from spymaster_assets.market.simulate import LevelRule, write_market

TRADES = 2_000_000
SPY: Instrument = instrument("SPY")
CALENDAR = TradingCalendar(SPY)


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Shortest of several runs; the first, which may compile, is not counted."""
    work()
    return once(work, repeats)


def once(work: Callable[[], object], repeats: int = 1) -> float:
    """Shortest of `repeats` runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def line(what: str, took_s: float, ratio: float, of: str, goal: str = "") -> None:
    """One result."""
    print(f"{what:<58} {1000 * took_s:9.1f} ms  {ratio:8.2f}x {of}{f'  (goal {goal})' if goal else ''}", flush=True)


@cache
def sessions() -> tuple[Session, ...]:
    """Four sessions: three of warm-up and the measured one."""
    return tuple(CALENDAR.session(k) for k in CALENDAR.sessions("2024-02-01", "2024-02-06"))


@cache
def market() -> Path:
    """A folder of SIMULATED DBN files: three small sessions, then one of 2 million trades."""
    folder = Path(tempfile.mkdtemp(prefix="spymaster-bench-"))
    write_market(folder / "warmup", SPY, sessions()[:3], seed=7)
    write_market(folder / "measured", SPY, sessions()[3:], seed=7, rule=LevelRule(trades_per_session=TRADES))
    return folder


def big_file() -> Path:
    """The file of 2 million trades."""
    return next((market() / "measured").glob("*.dbn.zst"))


def decompress(path: Path) -> int:
    """Decompress a whole file piece by piece into one buffer and do nothing with it."""
    piece, total = bytearray(1 << 20), 0
    with zstandard.ZstdDecompressor().stream_reader(path.read_bytes()) as reader:
        while n := reader.readinto(piece):
            total += n
    return total
