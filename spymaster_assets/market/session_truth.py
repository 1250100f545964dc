"""When a session really ended: two calendar libraries propose, the tape decides, a reviewed override wins, disagreement is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime, time
from functools import cache
from typing import Any

import pandas_market_calendars

from spymaster_assets.market.calendar import NEW_YORK, REGULAR_CLOSE, REGULAR_OPEN, TradingCalendar, proposed_close
from spymaster_assets.settings import MINUTE_NS, NS

SECOND_LIBRARY = {"XNYS": "NYSE", "CMES": "CME Globex Equity"}
"""Calendar of pandas_market_calendars for each one of exchange_calendars."""
TOLERANCE_MIN = 5
"""The tape may fall silent this long before a close, or trail this far behind one."""
CLOSED = "closed"


@dataclass(frozen=True)
class SessionTruth:
    """Ends of regular hours on a session's date, New York wall time 'HH:MM' or 'closed'.

    first, second: what the libraries propose. tape: that of the last record within the full regular day. used: what the graph goes by.
    override: its source, if there is one. faults: sentences; empty when all agree or the override and the tape do.
    """

    session: str
    first: str
    second: str
    tape: str
    used: str
    override: str | None
    faults: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def session_truth(calendar: TradingCalendar, key: str, last_regular_ns: int | None) -> SessionTruth:
    """Compare the proposals for a session with the time of the last record before 16:00 New York (None: no record after 09:30)."""
    session = calendar.session(key)
    used = _wall(session.regular_close_ns)
    first = proposed_close(calendar.instrument, key) or REGULAR_CLOSE
    first_text = max(first, REGULAR_OPEN).strftime("%H:%M")
    second_text = second_proposal(calendar.instrument.calendar, key)
    override = session.source.removeprefix("override: ") if session.source.startswith("override") else None
    end_ns = session.regular_open_ns if last_regular_ns is None else last_regular_ns
    faults = []
    if override is None and first_text != second_text:
        faults.append(f"the calendars disagree: {first_text} and {second_text}")
    if abs(end_ns - session.regular_close_ns) > TOLERANCE_MIN * MINUTE_NS:
        faults.append(
            f"the tape ends at {_wall(end_ns)}, regular hours at {used}: input is missing or the calendar is wrong"
        )
    return SessionTruth(key, first_text, second_text, _wall(end_ns), used, override, tuple(faults))


def second_proposal(calendar_name: str, key: str) -> str:
    """End of regular hours that pandas_market_calendars proposes for a date, 'HH:MM' or 'closed'."""
    schedule = _schedule(SECOND_LIBRARY[calendar_name], key[:4])
    close = schedule.get(key)
    if close is None:
        return CLOSED
    return max(min(close, REGULAR_CLOSE), REGULAR_OPEN).strftime("%H:%M")


@cache
def _schedule(name: str, year: str) -> dict[str, time]:
    frame = pandas_market_calendars.get_calendar(name).schedule(f"{year}-01-01", f"{year}-12-31", tz="America/New_York")
    return {day.date().isoformat(): close.time() for day, close in frame["market_close"].items()}


def _wall(ts_ns: int) -> str:
    return datetime.fromtimestamp(ts_ns // NS, UTC).astimezone(NEW_YORK).strftime("%H:%M")
