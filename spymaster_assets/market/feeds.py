"""The optional feeds of a session: which files bring its order book and its option trades, and how far they reach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spymaster_assets.errors import MarketDataError
from spymaster_assets.market.basis import option_roots
from spymaster_assets.market.book import BookSnapshots, book_snapshots, build_mbp10, snapshots_of_records
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.dbn import BOOK_SCHEMAS, read_records
from spymaster_assets.market.files import (
    FileEntry,
    minutes_seen,
    reach_ns,
    refuse_datasets,
    scan_flat,
    share_seen,
    symbols_of,
)
from spymaster_assets.market.instruments import Instrument
from spymaster_assets.market.options import (
    CONSOLIDATED_QUOTE_SCHEMAS,
    QUOTED_TRADE_SCHEMAS,
    VENUE_QUOTE_SCHEMAS,
    OpenInterest,
    OptionTrades,
    is_option_trades_csv,
    names_option,
    option_trades_from_csv,
    option_trades_from_dbn,
    read_definitions,
    read_open_interest,
)
from spymaster_assets.settings import MINUTE_NS, BookSettings

BOOK_PREFERENCE = ("mbp-10", "mbo", "mbp-1")
QUOTE_PREFERENCE = (*CONSOLIDATED_QUOTE_SCHEMAS, *VENUE_QUOTE_SCHEMAS)


@dataclass(frozen=True)
class OptionSource:
    """Files of a session's option trades: DBN files with their definitions and, if there are, quotes, or one flat CSV file."""

    trades: tuple[Path, ...]
    definitions: tuple[Path, ...]
    quotes: tuple[Path, ...]
    statistics: tuple[Path, ...]
    root: str
    schema: str
    from_ns: int
    until_ns: int

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return (*self.trades, *self.quotes, *self.definitions, *self.statistics)


def book_files(
    entries: Sequence[FileEntry], session: Session, instrument: Instrument, dataset: str = ""
) -> tuple[FileEntry, ...]:
    """Files that hold the instrument's order book in the session, of the best schema there is (mbp-10, mbo, mbp-1), oldest first.

    Raises MarketDataError when they are of several datasets and none of these is the one named.
    """
    found = [e for e in _overlapping(entries, session) if e.header.schema in BOOK_SCHEMAS and e.may_hold(instrument)]
    found = [e for e in found if e.header.dataset == dataset] or found
    best = next((s for s in BOOK_PREFERENCE if any(e.header.schema == s for e in found)), None)
    found = [e for e in found if e.header.schema == best]
    refuse_datasets(found, f"the {best} order book of session {session.key}")
    return tuple(sorted(found, key=lambda e: (e.header.start_ns, e.name)))


def load_book(
    files: Sequence[FileEntry],
    session: Session,
    instrument_id: int,
    settings: BookSettings,
    raw_symbol: str | None = None,
) -> BookSnapshots:
    """Snapshots of one contract over regular hours with their margin; files of consecutive times are joined.

    With raw_symbol each file's own mapping gives the id: another dataset than the tape's numbers its instruments differently.

    Raises MarketDataError when a file is damaged or files overlap.
    """
    start_ns = session.regular_open_ns - settings.before_open_min * MINUTE_NS
    end_ns = session.regular_close_ns + settings.after_close_min * MINUTE_NS
    parts = []
    front_id = instrument_id
    for entry in files:
        mapped = {name: number for number, name in symbols_of([entry.header], session.key).items()}
        instrument_id = mapped.get(raw_symbol or "", front_id)
        if entry.header.schema == "mbo":
            orders = read_records(entry.path, {"mbo": BOOK_SCHEMAS["mbo"]})
            records = build_mbp10(orders[orders["instrument_id"] == instrument_id])
            part = snapshots_of_records(
                records, instrument_id, bucket_ms=settings.bucket_ms, start_ns=start_ns, end_ns=end_ns
            )
        else:
            part = book_snapshots(
                entry.path, instrument_id, bucket_ms=settings.bucket_ms, start_ns=start_ns, end_ns=end_ns
            )
        parts.append(part)
    return BookSnapshots.join(parts)


def option_source(
    entries: Sequence[FileEntry], dbn_dir: Path, session: Session, instrument: Instrument, dataset: str = ""
) -> OptionSource | None:
    """Where the session's option trades are, of the instrument's own options or else of SPY's; None when there are none.

    A root counts when the definition files of a dataset that know it define an option on it that expires on the session's day; then
    every file of that dataset counts that brings trades of such an id, whatever else is in it. Without DBN files a flat file of
    option trades whose name holds the session's date serves (`YYYY-MM-DD.csv.gz`). Raises MarketDataError when two flat files claim
    the session, two definition files contradict each other, or several datasets bring options on one root and none of these is the
    one named.
    """
    # regular hours, not the session: daily files are cut at midnight UTC, which lies inside sessions
    candidates = [e for e in entries if e.overlaps(session.regular_open_ns, session.regular_close_ns)]
    day = date.fromisoformat(session.key)
    for root in option_roots(instrument):
        brought = {
            name: source
            for name in dict.fromkeys(e.header.dataset for e in candidates if e.header.schema == "definition")
            if (source := _dbn_source([e for e in candidates if e.header.dataset == name], session, root))
        }
        if dataset in brought:
            return brought[dataset]
        trades = {path for source in brought.values() for path in source.trades}
        refuse_datasets([e for e in candidates if e.path in trades], f"the {root} option feed of session {session.key}")
        if brought:
            return next(iter(brought.values()))
    csv = [f.path for f in scan_flat(dbn_dir) if f.is_of(session.key) and is_option_trades_csv(f.path)]
    if len(csv) > 1:
        csv = [p for p in csv if names_option(p, "SPY", day)]
    if len(csv) > 1:
        raise MarketDataError(
            "two flat files bring the option trades of one session",
            where=", ".join(p.name for p in csv),
            expected=f"one file for {session.key}",
            remedy="delete the one that repeats the other",
        )
    # a flat file states no range: it is the whole day's
    return OptionSource(tuple(csv), (), (), (), "SPY", "csv", session.open_ns, session.close_ns) if csv else None


def _dbn_source(entries: Sequence[FileEntry], session: Session, root: str) -> OptionSource | None:
    """The source that files of one dataset make, None when they define no option on the root that expires that day or bring no trades."""
    defined = [e for e in entries if e.header.schema == "definition"]
    chain = [e.path for e in defined if read_definitions(e.path, root).wanted.any()]
    if not chain:
        return None
    found = read_definitions(chain, root)
    today = found.expiry == date.fromisoformat(session.key).toordinal()
    expiring = set(found.instrument_id[found.wanted & today].tolist())
    if not expiring:
        return None
    mine = [e for e in entries if not e.header.symbols or any(s.instrument_id in expiring for s in e.header.symbols)]
    trades = [e for e in mine if e.header.schema == "trades" or e.header.schema in QUOTED_TRADE_SCHEMAS]
    if not trades:
        return None
    schemas = sorted({e.header.schema for e in trades})
    quoted = next((s for s in QUOTE_PREFERENCE if any(e.header.schema == s for e in mine)), None)
    from_ns, until_ns = _reach(trades, session)
    return OptionSource(
        tuple(e.path for e in trades),
        tuple(chain),
        tuple(e.path for e in mine if e.header.schema == quoted) if "trades" in schemas else (),
        tuple(e.path for e in mine if e.header.schema == "statistics"),
        root,
        "+".join(schemas),
        from_ns,
        until_ns,
    )


def _reach(trades: Sequence[FileEntry], session: Session) -> tuple[int, int]:
    """From when to when the stated ranges reach without a gap, within the session."""
    from_ns = max(min(e.header.start_ns for e in trades), session.open_ns)
    return from_ns, min(reach_ns(trades, from_ns, session.close_ns), session.close_ns)


def load_option_trades(source: OptionSource, session: Session) -> OptionTrades:
    """Trades of the source's options that expire on the session's day (0DTE), received within the session.

    Raises MarketDataError when a file is damaged or repeats another.
    """
    expiry = date.fromisoformat(session.key)
    names = [path.name for path in source.trades]
    if not source.definitions:
        flat = [option_trades_from_csv(path, source.root, expiry) for path in source.trades]
        trades = OptionTrades.join(flat, names)
        return trades.take((trades.ts_ns >= session.open_ns) & (trades.ts_ns < session.close_ns))
    # cut before the parts meet: what a file of several days says of the others is neither a fault nor a repeat of this one
    received_ns = (session.open_ns, session.close_ns)
    parts = [
        option_trades_from_dbn(path, source.definitions, source.root, expiry, source.quotes, received_ns)
        for path in source.trades
    ]
    return OptionTrades.join(parts, names)


def load_open_interest(source: OptionSource, session: Session) -> OpenInterest | None:
    """Open interest of the options that expire on the session's day, as published before the regular open; None without the feed."""
    if not source.statistics:
        return None
    definitions = read_definitions(source.definitions, source.root)
    return read_open_interest(source.statistics, definitions, date.fromisoformat(session.key), session.regular_open_ns)


def minute_coverage(ts_ns: NDArray[np.int64], session: Session) -> tuple[float, list[int]]:
    """Share of regular-hours minutes with an event, and the starts (ns) of those without."""
    seen = minutes_seen(ts_ns, session.regular_open_ns, session.regular_close_ns)
    missing = session.regular_open_ns + np.flatnonzero(~seen) * MINUTE_NS
    return share_seen(seen), missing.astype(np.int64).tolist()


def _overlapping(entries: Iterable[FileEntry], session: Session) -> list[FileEntry]:
    return [e for e in entries if e.overlaps(session.open_ns, session.close_ns)]
