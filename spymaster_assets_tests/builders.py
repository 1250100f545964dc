"""Small markets for tests: records, DBN files, sessions turned into bars, levels and signals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace

import databento_dbn
import numpy as np
import polars as pl
import zstandard
from numpy.typing import NDArray

from spymaster_assets.contract import load_contract
from spymaster_assets.datasets.splits import SplitManifest
from spymaster_assets.errors import MissingInputError
from spymaster_assets.market.bars import session_bars
from spymaster_assets.market.basis import identity_basis
from spymaster_assets.market.book import BookSnapshots
from spymaster_assets.market.calendar import Session, TradingCalendar
from spymaster_assets.market.dbn import OHLCV_DTYPE, TRADE_DTYPE
from spymaster_assets.market.feeds import (
    book_files,
    load_book,
    load_open_interest,
    load_option_trades,
    option_source,
)
from spymaster_assets.market.files import SessionFiles, register_session, scan_folder
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.tape import SessionTape, load_session_records
from spymaster_assets.settings import (
    DELAYS_S,
    MINUTE_NS,
    NS,
    BarrierSettings,
    BookSettings,
    LabelSettings,
    OptionSettings,
    SignalSettings,
)
from spymaster_assets.signals.build import SignalSet, build_signals
from spymaster_assets.signals.context import SessionBars
from spymaster_assets.signals.levels import LevelSet, build_levels
from spymaster_assets.signals.options import OptionFeed, option_flow

CONTRACT = load_contract()
CALENDARS = {s: TradingCalendar(instrument(s)) for s in ("SPY", "ES", "MYM")}
VOLATILITY = LabelSettings(mode="volatility")


def trades(
    ts_ns: Sequence[int] | NDArray[np.int64],
    price_e9: Sequence[int] | NDArray[np.int64],
    size: Sequence[int] | int = 100,
    side: str | Sequence[str] = "N",
    instrument_id: int | Sequence[int] = 1,
) -> NDArray[np.void]:
    """TRADE_DTYPE records with ts_event = ts_recv and a running sequence."""
    records = np.zeros(len(ts_ns), TRADE_DTYPE)
    records["length"] = 12
    records["instrument_id"] = instrument_id
    records["ts_event"] = records["ts_recv"] = np.asarray(ts_ns, np.uint64)
    records["price"], records["size"] = price_e9, size
    records["action"] = b"T"
    records["side"] = np.array([s.encode() for s in side]) if not isinstance(side, str) else side.encode()
    records["sequence"] = np.arange(1, len(ts_ns) + 1)
    return records


def ohlcv(
    ts_ns: Sequence[int], prices_e9: Sequence[Sequence[int]], volume: Sequence[int], instrument_id: int = 1
) -> NDArray[np.void]:
    """OHLCV_DTYPE one-minute records."""
    records = np.zeros(len(ts_ns), OHLCV_DTYPE)
    records["length"], records["rtype"], records["instrument_id"] = 14, 0x21, instrument_id
    records["ts_event"] = np.asarray(ts_ns, np.uint64)
    for n, name in enumerate(("open", "high", "low", "close")):
        records[name] = [p[n] for p in prices_e9]
    records["volume"] = volume
    return records


def dbn_bytes(
    records: NDArray[np.void],
    schema: str = "trades",
    symbols: dict[int, str] | None = None,
    start_ns: int | None = None,
    end_ns: int | None = None,
    version: int = 3,
    compress: bool = True,
    dataset: str = "XNAS.ITCH",
) -> bytes:
    """A DBN file of the records."""
    field = "ts_event" if schema.startswith("ohlcv") else "ts_recv"
    start = int(records[field][0]) if start_ns is None else start_ns
    end = int(records[field][-1]) + 1 if end_ns is None else end_ns
    day = date(1970, 1, 1) + timedelta(days=start // 86_400_000_000_000)
    mappings = [
        SimpleNamespace(
            raw_symbol=name,
            intervals=[SimpleNamespace(start_date=day, end_date=day + timedelta(days=2), symbol=str(i))],
        )
        for i, name in (symbols or {1: "SPY"}).items()
    ]
    header = databento_dbn.Metadata(
        dataset=dataset,
        start=start,
        end=end,
        stype_in=databento_dbn.SType.RAW_SYMBOL,
        stype_out=databento_dbn.SType.INSTRUMENT_ID,
        schema=databento_dbn.Schema.from_str(schema),
        symbols=list((symbols or {1: "SPY"}).values()),
        partial=[],
        not_found=[],
        mappings=mappings,
        version=version,
    ).encode()
    data = bytes(header) + records.tobytes()
    return zstandard.ZstdCompressor().compress(data) if compress else data


def touch_times(dates: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Time columns of touches on these dates, one a minute from 15:00 UTC on, their labels complete 16 minutes later."""
    day_ns = np.array(dates, "datetime64[ns]").astype(np.int64)
    ts_ns = day_ns + (15 * 60 + np.arange(len(dates)) % 240) * MINUTE_NS
    return {
        "ts_ns": ts_ns,
        "decision_ns": ts_ns + MINUTE_NS,
        **{f"confirm_ts_ns_{d}": ts_ns + s * NS for d, s in DELAYS_S.items()},
        "label_known_ns": ts_ns + 16 * MINUTE_NS,
    }


MONTH_OF_SEED = {0: "2024-01", 1: "2024-02"}
"""Rows that models learn from are drawn with seed 0, rows that stop them early with seed 1, rows that they are asked about with others."""


def dates_of(n: int, seed: int) -> list[str]:
    """Dates of n rows drawn with a seed: the 2nd to the 11th of the month of its part, in order."""
    return [f"{MONTH_OF_SEED.get(seed, '2024-03')}-{2 + i * 10 // n:02d}" for i in range(n)]


FOLD = SplitManifest(
    asof="2024-03-02",
    window="rolling",
    train=tuple(f"2024-01-{d:02d}" for d in range(2, 12)),
    validation=tuple(f"2024-02-{d:02d}" for d in range(2, 12)),
    test=tuple(f"2024-03-{d:02d}" for d in range(2, 12)),
    embargoed=(),
    first_test_decision_ns=int(touch_times(["2024-03-02"])["decision_ns"][0]),
)
"""The fold of rows that are dated by `dates_of`."""


def session_of(symbol: str, key: str) -> Session:
    """The calendar's session."""
    return CALENDARS[symbol].session(key)


def minute_tape(start_ns: int, prices_usd: Sequence[float], per_minute: int = 4, side: str = "N") -> NDArray[np.void]:
    """Trades that walk in a straight line from one minute's price to the next, `per_minute` a minute, prices on the cent."""
    path = np.asarray(prices_usd, np.float64)
    at = np.arange((len(path) - 1) * per_minute) / per_minute
    values = np.interp(at, np.arange(len(path)), path)
    return trades(
        start_ns + (at * 60e9).astype(np.int64), np.rint(values * 100).astype(np.int64) * 10_000_000, side=side
    )


@dataclass(frozen=True)
class Built:
    """One session, from files to signals."""

    session: Session
    registration: SessionFiles
    bars: SessionBars
    levels: LevelSet
    signals: SignalSet


def build_folder(
    folder: Path,
    symbol: str,
    first: str,
    last: str,
    *,
    label: LabelSettings = VOLATILITY,
    signal: SignalSettings | None = None,
    cut_ns: int | None = None,
) -> list[Built]:
    """Signals of each session of a folder of DBN files; cut_ns ends the last session's input at a time, as if it came later."""
    profile, calendar = instrument(symbol), CALENDARS[symbol]
    entries = scan_folder(folder)
    out: list[Built] = []
    previous = None
    keys = calendar.sessions(first, last)
    for key in keys:
        session = calendar.session(key)
        try:
            registration = register_session(entries, calendar, profile, key, previous)
        except MissingInputError:
            previous = None
            continue
        until = cut_ns if key == keys[-1] else None
        if until is not None:
            registration = replace(registration, observed_until_ns=min(until, registration.observed_until_ns))
        out.append(
            build_one(
                folder, symbol, session, registration, [b.bars for b in out], label, signal or SignalSettings(), until
            )
        )
        previous = registration
    return out


def build_one(
    folder: Path,
    symbol: str,
    session: Session,
    registration: SessionFiles,
    earlier: Sequence[SessionBars],
    label: LabelSettings = VOLATILITY,
    signal: SignalSettings | None = None,
    until_ns: int | None = None,
    barrier: BarrierSettings | None = None,
    option: OptionSettings | None = None,
) -> Built:
    """One session from its registration and the bars of the sessions before."""
    profile, signal = instrument(symbol), signal or SignalSettings()
    records = load_session_records(folder, registration, session=session, until_ns=until_ns)
    bars = SessionBars(session, session_bars(records, session, registration))
    tape = None
    if registration.schema == "trades":
        tape = SessionTape.of_records(records[records["instrument_id"] == registration.front_id])
    book, options = feeds_of(folder, symbol, session, registration, tape, until_ns)
    known_ns = registration.observed_until_ns
    warmup = earlier[-signal.sma_warmup_sessions :]
    levels = build_levels(bars, warmup, profile, signal, CONTRACT, known_ns, options, option)
    signals = build_signals(
        levels,
        tape,
        session,
        profile,
        registration.front_id,
        signal,
        label,
        CONTRACT,
        known_ns,
        False,
        book,
        options,
        barrier,
        option,
    )
    return Built(session, registration, bars, levels, signals)


def feeds_of(
    folder: Path,
    symbol: str,
    session: Session,
    registration: SessionFiles,
    tape: SessionTape | None,
    until_ns: int | None = None,
) -> tuple[BookSnapshots | None, OptionFeed | None]:
    """Order book and option flow of a session where the folder has them; until_ns ends both as if the rest came later."""
    profile, entries = instrument(symbol), scan_folder(folder)
    book, options = None, None
    if files := book_files(entries, session, profile):
        whole = load_book(files, session, registration.front_id, BookSettings())
        n = len(whole)
        if until_ns is not None:  # a bucket that is still open has another last book than when it is over
            n = int(np.searchsorted(whole.ts_ns, until_ns // whole.bucket_ns * whole.bucket_ns))
        arrays = {k: getattr(whole, k)[:n] for k in ("ts_ns", "bid_px_e9", "bid_sz", "ask_px_e9", "ask_sz")}
        book = replace(whole, **arrays)
    if tape is not None and (source := option_source(entries, folder, session, profile)):
        trades = load_option_trades(source, session)
        if until_ns is not None:
            trades = trades.take(trades.ts_ns < until_ns)
        flow = option_flow(trades, tape.ts_ns, tape.price_e9, CALENDARS[symbol], OptionSettings())
        until = source.until_ns if until_ns is None else min(until_ns, source.until_ns)
        options = OptionFeed(
            flow,
            source.root,
            source.from_ns,
            until,
            identity_basis(),
            profile.spy_dollar_e9,
            load_open_interest(source, session),
        )
    return book, options


def concat(built: Sequence[Built]) -> pl.DataFrame:
    """All signals rows."""
    return pl.concat([b.signals.frame for b in built])
