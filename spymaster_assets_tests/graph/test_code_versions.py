"""Code versions: a changed value of the instrument or the calendar marks the assets that read it, and no other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from spymaster_assets.definitions import build_definitions
from spymaster_assets.market import calendar as calendar_module
from spymaster_assets.market.calendar import OVERRIDES_PATH
from spymaster_assets.market.instruments import INSTRUMENTS
from spymaster_assets.partitions import calendar_of
from spymaster_assets.settings import Settings

FILES = {
    "market_files",
    "ohlcv_bars",
    "book_snapshots",
    "spot_basis",
    "option_flow",
    "levels",
    "signals",
    "split_manifest",
}


def versions(root: Path, symbol: str) -> dict[str, str]:
    calendar_of.cache_clear()
    calendar_module._overrides.cache_clear()
    settings = Settings(
        root=root, dbn_dir=root / "dbn", symbol=symbol, first_session="2024-02-01", last_session="2024-02-09"
    )
    graph = build_definitions(settings).resolve_asset_graph()
    return {key.to_user_string(): graph.get(key).code_version or "" for key in graph.get_all_asset_keys()}


@pytest.fixture(autouse=True)
def fresh_calendars() -> Iterator[None]:
    yield
    calendar_of.cache_clear()
    calendar_module._overrides.cache_clear()


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {asset for asset in before if before[asset] != after[asset]}


@pytest.mark.parametrize(
    ("field", "value", "readers"),
    [
        ("tick_e9", 500_000_000, {"signals"}),
        ("sweep_min_notional_usd", 1.0, {"signals"}),
        ("point_value_usd", 51.0, {"option_flow", "signals"}),
        ("points_per_spy_dollar", 10.5, {"spot_basis", "option_flow", "levels", "signals"}),
        ("session_close", "16:30", FILES),
        ("calendar", "XNYS", FILES),
        ("root", "EX", FILES),
    ],
)
def test_a_changed_profile_marks_its_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: object, readers: set[str]
) -> None:
    before = versions(tmp_path, "ES")
    monkeypatch.setitem(INSTRUMENTS, "ES", replace(INSTRUMENTS["ES"], **{field: value}))
    assert changed(before, versions(tmp_path, "ES")) == readers


def test_a_changed_profile_of_another_instrument_marks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = versions(tmp_path, "ES")
    monkeypatch.setitem(INSTRUMENTS, "NQ", replace(INSTRUMENTS["NQ"], session_close="16:30"))
    assert changed(before, versions(tmp_path, "ES")) == set()
    # the basis of a future reads SPY's session too
    monkeypatch.setitem(INSTRUMENTS, "SPY", replace(INSTRUMENTS["SPY"], session_close="19:00"))
    assert changed(before, versions(tmp_path, "ES")) == {"spot_basis"}


@pytest.mark.parametrize(
    ("calendar", "symbol", "readers"), [("CMES", "ES", FILES), ("CMES", "SPY", set()), ("XNYS", "ES", {"spot_basis"})]
)
def test_a_reviewed_override_marks_the_assets_of_its_calendar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calendar: str, symbol: str, readers: set[str]
) -> None:
    before = versions(tmp_path, symbol)
    content = json.loads(OVERRIDES_PATH.read_text())
    content["overrides"].append(
        {"calendar": calendar, "session": "2024-02-06", "change": "early_close", "close": "13:00", "source": "test"}
    )
    path = tmp_path / "overrides.json"
    path.write_text(json.dumps(content))
    monkeypatch.setattr(calendar_module, "OVERRIDES_PATH", path)
    assert changed(before, versions(tmp_path, symbol)) == readers
