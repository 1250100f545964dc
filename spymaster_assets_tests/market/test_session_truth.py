"""Session ends: proposals of two calendars, the tape's last word, and overrides that win."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from spymaster_assets.market.calendar import Session
from spymaster_assets.market.files import register_session, scan_folder
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.session_truth import SessionTruth, session_truth
from spymaster_assets.settings import MINUTE_NS
from spymaster_assets_tests.builders import CALENDARS


def truth_on_tape(folder: Path, symbol: str, key: str) -> SessionTruth:
    registration = register_session(scan_folder(folder), CALENDARS[symbol], instrument(symbol), key, None)
    return session_truth(CALENDARS[symbol], key, registration.last_regular_ns)


def test_labor_day_2013_by_override_and_tape(real_data: Path) -> None:
    found = truth_on_tape(real_data / "es-trades-2013", "ES", "2013-09-02")
    assert (found.first, found.second, found.used) == ("13:00", "11:30", "11:30")
    assert found.tape in ("11:29", "11:30")
    assert found.override is not None
    assert found.faults == ()


@pytest.mark.parametrize(("key", "close"), [("2025-05-26", "13:00"), ("2025-06-19", "13:00"), ("2025-06-18", "16:00")])
def test_holidays_of_2025(real_data: Path, key: str, close: str) -> None:
    found = truth_on_tape(real_data / "mym-ohlcv-1m", "MYM", key)
    assert (found.first, found.second, found.used, found.tape, found.faults) == (close, close, close, close, ())


def test_day_of_mourning_2025_is_an_override() -> None:
    session = CALENDARS["ES"].session("2025-01-09")
    found = session_truth(CALENDARS["ES"], "2025-01-09", None)
    assert found.used == "09:30"
    assert found.faults == ()
    assert session.regular_minutes == 0
    assert "2025-01-09" not in CALENDARS["SPY"].sessions("2025-01-08", "2025-01-10")


def test_juneteenth_2026_and_half_days() -> None:
    assert session_truth(CALENDARS["ES"], "2026-06-19", at("ES", "2026-06-19", 0)).faults == ()
    for symbol in ("SPY", "ES"):
        assert session_truth(CALENDARS[symbol], "2024-07-03", at(symbol, "2024-07-03", 0)).faults == ()


def at(symbol: str, key: str, minutes: int) -> int:
    return CALENDARS[symbol].session(key).regular_close_ns + minutes * MINUTE_NS


@pytest.mark.parametrize("minutes", [-200, -6, 6])
def test_a_tape_that_ends_elsewhere_is_told(minutes: int) -> None:
    found = session_truth(CALENDARS["ES"], "2024-07-03", at("ES", "2024-07-03", minutes))
    assert len(found.faults) == 1
    assert "the tape ends at" in found.faults[0]


def test_calendars_that_disagree_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_override(key: str) -> Session:
        return replace(real(key), source="exchange_calendars CMES")

    calendar = CALENDARS["ES"]
    real = calendar.session
    monkeypatch.setattr(calendar, "session", without_override)
    found = session_truth(calendar, "2013-09-02", calendar.session("2013-09-02").regular_close_ns)
    assert found.faults == ("the calendars disagree: 13:00 and 11:30",)
