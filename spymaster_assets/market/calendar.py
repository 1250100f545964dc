"""Trading sessions: a calendar library proposes days and closes, a reviewed override file wins, wall times are New York's."""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import exchange_calendars
import pandas as pd

from spymaster_assets.errors import ConfigError
from spymaster_assets.market.instruments import Instrument
from spymaster_assets.settings import MINUTE_NS, NS

NEW_YORK = ZoneInfo("America/New_York")
OVERRIDES_PATH = Path(__file__).with_name("calendar_overrides.json")
FIRST_DAY = "2006-01-02"
PREMARKET_OPEN, REGULAR_OPEN, REGULAR_CLOSE = time(4, 0), time(9, 30), time(16, 0)
HALF_DAY_EXTENDED_CLOSE = time(17, 0)
"""After-hours trading of US equities ends three hours early on a half day."""
CME_HOLIDAY_HALT, CME_HALF_DAY_CLOSE = time(13, 0), time(13, 15)
"""CME equity-index futures stop then when New York stocks are closed, or close early; the calendar library misses some."""


@dataclass(frozen=True)
class Session:
    """One trading session; times are int64 UTC ns. Regular hours are [regular_open_ns, regular_close_ns), empty when equal."""

    key: str
    open_ns: int
    close_ns: int
    premarket_open_ns: int
    regular_open_ns: int
    regular_close_ns: int
    early_close: bool
    source: str

    @property
    def regular_minutes(self) -> int:
        """Length of regular hours in minutes."""
        return (self.regular_close_ns - self.regular_open_ns) // MINUTE_NS


class TradingCalendar:
    """Sessions of one instrument, from 2006 to a year from now."""

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument

    @cached_property
    def _keys(self) -> list[str]:
        days = {d.date().isoformat() for d in _library(self.instrument.calendar).sessions}
        for day, entry in _overrides(self.instrument.calendar).items():
            if entry["change"] == "closed":
                days.discard(day)
            else:
                days.add(day)
        return sorted(days)

    @property
    def rules(self) -> dict[str, Any]:
        """What of the profile and the reviewed overrides decides whose records a session holds and when it runs (JSON-able)."""
        names = ("symbol", "root", "kind", "calendar", "session_open", "session_close")
        profile = {name: getattr(self.instrument, name) for name in names}
        return {**profile, "overrides": _overrides(self.instrument.calendar)}

    def sessions(self, first: str, last: str) -> list[str]:
        """Session keys from `first` to `last`, both included, sorted."""
        return self._keys[bisect_left(self._keys, first) : bisect_left(self._keys, last + "\uffff")]

    def non_sessions(self, first: str, last: str) -> list[str]:
        """Weekdays from `first` to `last` without a session."""
        day, end = date.fromisoformat(first), date.fromisoformat(last)
        known = set(self.sessions(first, last))
        out = []
        while day <= end:
            if day.weekday() < 5 and day.isoformat() not in known:
                out.append(day.isoformat())
            day += timedelta(days=1)
        return out

    def next(self, key: str, n: int = 1) -> str:
        """The n-th session after `key`."""
        at = self._index(key) + n
        if at >= len(self._keys):
            raise ConfigError(f"no session {n} after {key}", expected=f"sessions up to {self._keys[-1]}")
        return self._keys[at]

    def previous(self, key: str, n: int = 1) -> str:
        """The n-th session before `key`."""
        at = self._index(key) - n
        if at < 0:
            raise ConfigError(f"no session {n} before {key}", expected=f"sessions from {FIRST_DAY} on")
        return self._keys[at]

    def session(self, key: str) -> Session:
        """The session of a trading date; raise ConfigError naming its neighbours when there is none."""
        self._index(key)
        return _session(self.instrument, key)

    def _index(self, key: str) -> int:
        at = bisect_left(self._keys, key)
        if at == len(self._keys) or self._keys[at] != key:
            near = self._keys[max(0, at - 1) : at + 1]
            raise ConfigError(
                f"{key} is not a session of {self.instrument.symbol}",
                where=f"calendar {self.instrument.calendar}",
                expected=f"a trading session; the nearest are {' and '.join(near)}",
                remedy=f"add a reviewed entry to {OVERRIDES_PATH.name} if the market did trade",
            )
        return at


@cache
def _library(name: str) -> Any:
    end = datetime.now(UTC).date() + timedelta(days=365)
    return exchange_calendars.get_calendar(name, start=FIRST_DAY, end=end.isoformat())


@cache
def _overrides(calendar: str) -> dict[str, dict[str, str]]:
    entries = json.loads(OVERRIDES_PATH.read_text())["overrides"]
    return {e["session"]: e for e in entries if e["calendar"] == calendar}


@cache
def _session(instrument: Instrument, key: str) -> Session:
    day = date.fromisoformat(key)
    opens = time.fromisoformat(instrument.session_open)
    closes = time.fromisoformat(instrument.session_close)
    open_day = day - timedelta(days=1) if opens > closes else day
    override = _overrides(instrument.calendar).get(key)
    proposed = proposed_close(instrument, key)
    source = f"exchange_calendars {instrument.calendar}"
    if override is not None:
        proposed, source = time.fromisoformat(override["close"]), f"override: {override['source']}"
    early = proposed is not None
    if instrument.is_future:
        close = proposed or closes
        regular_close = min(close, REGULAR_CLOSE)
    else:
        regular_close = proposed or REGULAR_CLOSE
        close = HALF_DAY_EXTENDED_CLOSE if early else closes
    regular_close = max(regular_close, REGULAR_OPEN)
    return Session(
        key=key,
        open_ns=_ns(open_day, opens),
        close_ns=_ns(day, close),
        premarket_open_ns=_ns(day, PREMARKET_OPEN),
        regular_open_ns=_ns(day, REGULAR_OPEN),
        regular_close_ns=_ns(day, regular_close),
        early_close=early,
        source=source,
    )


def proposed_close(instrument: Instrument, key: str) -> time | None:
    """Early close of a session in New York wall time, None for a full one."""
    stocks = _library("XNYS")
    stamp = pd.Timestamp(key)
    stocks_trade = stocks.is_session(stamp)
    if not instrument.is_future:
        local = stocks.session_close(stamp).tz_convert(NEW_YORK).time() if stocks_trade else REGULAR_CLOSE
        return local if local < REGULAR_CLOSE else None
    library = _library(instrument.calendar)
    candidates = []
    if library.is_session(stamp):
        local = library.session_close(stamp).tz_convert(NEW_YORK).time()
        if local < REGULAR_CLOSE:
            candidates.append(local)
    if not stocks_trade:
        candidates.append(CME_HOLIDAY_HALT)
    elif stocks.session_close(stamp).tz_convert(NEW_YORK).time() < REGULAR_CLOSE:
        candidates.append(CME_HALF_DAY_CLOSE)
    return min(candidates, default=None)


def full_regular_close_ns(key: str) -> int:
    """16:00 New York of a date, whatever the calendar says of it."""
    return _ns(date.fromisoformat(key), REGULAR_CLOSE)


def _ns(day: date, wall: time) -> int:
    return int(datetime.combine(day, wall, NEW_YORK).timestamp()) * NS
