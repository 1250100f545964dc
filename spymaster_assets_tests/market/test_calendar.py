"""Sessions on the days that calendars get wrong."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from spymaster_assets.errors import ConfigError
from spymaster_assets_tests.builders import CALENDARS, session_of


def utc(ts_ns: int) -> str:
    return datetime.fromtimestamp(ts_ns / 1e9, UTC).strftime("%Y-%m-%dT%H:%M")


@pytest.mark.parametrize(
    ("symbol", "key", "open_", "regular_open", "regular_close", "close"),
    [
        ("SPY", "2024-03-08", "2024-03-08T09:00", "2024-03-08T14:30", "2024-03-08T21:00", "2024-03-09T01:00"),
        ("SPY", "2024-03-11", "2024-03-11T08:00", "2024-03-11T13:30", "2024-03-11T20:00", "2024-03-12T00:00"),
        ("SPY", "2024-07-03", "2024-07-03T08:00", "2024-07-03T13:30", "2024-07-03T17:00", "2024-07-03T21:00"),
        ("SPY", "2024-11-29", "2024-11-29T09:00", "2024-11-29T14:30", "2024-11-29T18:00", "2024-11-29T22:00"),
        ("ES", "2024-03-11", "2024-03-10T22:00", "2024-03-11T13:30", "2024-03-11T20:00", "2024-03-11T21:00"),
        ("ES", "2013-09-02", "2013-09-01T22:00", "2013-09-02T13:30", "2013-09-02T15:30", "2013-09-02T15:30"),
        ("ES", "2025-01-09", "2025-01-08T23:00", "2025-01-09T14:30", "2025-01-09T14:30", "2025-01-09T14:30"),
        ("MYM", "2025-05-26", "2025-05-25T22:00", "2025-05-26T13:30", "2025-05-26T17:00", "2025-05-26T17:00"),
        ("MYM", "2025-06-19", "2025-06-18T22:00", "2025-06-19T13:30", "2025-06-19T17:00", "2025-06-19T17:00"),
        ("ES", "2026-06-19", "2026-06-18T22:00", "2026-06-19T13:30", "2026-06-19T17:00", "2026-06-19T17:00"),
    ],
)
def test_hours(symbol: str, key: str, open_: str, regular_open: str, regular_close: str, close: str) -> None:
    s = session_of(symbol, key)
    assert [utc(t) for t in (s.open_ns, s.regular_open_ns, s.regular_close_ns, s.close_ns)] == [
        open_,
        regular_open,
        regular_close,
        close,
    ]


def test_days_without_a_session() -> None:
    spy = CALENDARS["SPY"]
    assert spy.non_sessions("2024-03-25", "2024-04-05") == ["2024-03-29"]
    assert spy.non_sessions("2025-01-06", "2025-01-10") == ["2025-01-09"]
    assert spy.next("2024-03-28") == "2024-04-01"
    assert spy.previous("2024-04-01") == "2024-03-28"
    assert len(spy.sessions("2024-02-20", "2024-05-17")) == 63
    with pytest.raises(ConfigError, match=r"2024-03-29 is not a session.*2024-03-28 and 2024-04-01"):
        spy.session("2024-03-29")


def test_steps_past_either_end_are_typed() -> None:
    spy = CALENDARS["SPY"]
    for step in (spy.next, spy.previous):
        with pytest.raises(ConfigError, match="no session 100000"):
            step("2024-03-28", 100_000)


def test_every_session_of_ten_years_is_in_order() -> None:
    for calendar in CALENDARS.values():
        last_close = 0
        for key in calendar.sessions("2014-01-01", "2024-12-31"):
            s = calendar.session(key)
            assert (
                last_close <= s.open_ns <= s.premarket_open_ns < s.regular_open_ns <= s.regular_close_ns <= s.close_ns
            )
            last_close = s.close_ns
