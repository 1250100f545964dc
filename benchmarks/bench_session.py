"""A whole simulated session, order book and options too, from DBN files to the signals Parquet."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import databento

from benchmarks.common import CALENDAR, SPY, line, once
from spymaster_assets.contract import load_contract
from spymaster_assets.market.bars import session_bars
from spymaster_assets.market.basis import identity_basis
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.feeds import book_files, load_book, load_option_trades, option_source
from spymaster_assets.market.files import register_session, scan_folder
from spymaster_assets.market.simulate_book import write_full_market
from spymaster_assets.market.tape import SessionTape, load_session_records
from spymaster_assets.settings import BookSettings, LabelSettings, OptionSettings, SignalSettings
from spymaster_assets.signals.build import SignalSet, build_signals, signals_to_parquet
from spymaster_assets.signals.context import SessionBars
from spymaster_assets.signals.levels import build_levels
from spymaster_assets.signals.options import OptionFeed, option_flow

KEY = "2024-02-01"
CONTRACT = load_contract()
_MEASURE_MEMORY = "--memory"


def signals_of(folder: Path, session: Session) -> SignalSet:
    """Every step between the files and the signals, as the assets take them."""
    entries = scan_folder(folder)
    registration = register_session(entries, CALENDAR, SPY, session.key, None)
    records = load_session_records(folder, registration, session=session)
    bars = SessionBars(session, session_bars(records, session, registration))
    tape = SessionTape.of_records(records)
    book = load_book(book_files(entries, session, SPY), session, registration.front_id, BookSettings())
    source = option_source(entries, folder, session, SPY)
    assert source is not None
    trades = load_option_trades(source, session)
    flow = option_flow(trades, tape.ts_ns, tape.price_e9, CALENDAR, OptionSettings())
    options = OptionFeed(flow, source.root, source.from_ns, source.until_ns, identity_basis(), SPY.spy_dollar_e9)
    known_ns = registration.observed_until_ns
    levels = build_levels(bars, [], SPY, SignalSettings(), CONTRACT, known_ns, options)
    return build_signals(
        levels, tape, session, SPY, registration.front_id, SignalSettings(), LabelSettings(mode="volatility"), CONTRACT, known_ns,
        True, book, options,
    )  # fmt: skip


def decode(folder: Path) -> int:
    """Decode each file with the vendor's library alone."""
    return sum(len(databento.DBNStore.from_file(p).to_ndarray()) for p in sorted(folder.glob("*.dbn.zst")))


def peak_memory_mb() -> int:
    """High-water mark of this process; getrusage would count what its parent held when it was started."""
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(text for text in status.read_text().splitlines() if text.startswith("VmHWM"))
        return int(peak.split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 * 1024 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print the ratio and the peak memory of a fresh process that does it once."""
    session = CALENDAR.session(KEY)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_full_market(folder, SPY, [session], 1, "full")
        made = signals_of(folder, session)
        reference = min(once(lambda: decode(folder)) for _ in range(3))
        took = min(once(lambda: signals_to_parquet(signals_of(folder, session))) for _ in range(3))
        records = decode(folder)
        print(
            f"{records:,} records in {len(list(folder.glob('*.dbn.zst')))} files, {made.frame.height} touches; SIMULATED, profile full"
        )
        line("DBNStore.to_ndarray of all files", reference, 1.0, "itself")
        line("files to signals Parquet, all feeds", took, took / reference, "to_ndarray", "<= 1.2")
        command = [sys.executable, "-m", "benchmarks.bench_session", _MEASURE_MEMORY, name]
        peak = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout.strip()
        print(f"peak memory of a process that does it once: {peak} MB  (goal < 3000)")


if __name__ == "__main__":
    if sys.argv[1:2] == [_MEASURE_MEMORY]:
        signals_to_parquet(signals_of(Path(sys.argv[2]), CALENDAR.session(KEY)))
        print(peak_memory_mb())
    else:
        main()
