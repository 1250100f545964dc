"""Levels know only bars that had closed, and no average spans a contract change unadjusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from spymaster_assets.settings import MINUTE_NS
from spymaster_assets.signals.context import find_rolls
from spymaster_assets_tests.builders import Built, build_folder


@pytest.fixture(scope="module")
def spy(real_data: Path) -> list[Built]:
    return build_folder(real_data / "spy-ohlcv-1m", "SPY", "2024-03-07", "2024-03-12")


def level(built: Built, kind: str) -> pl.DataFrame:
    return built.levels.table.filter(pl.col("level_kind_name") == kind).sort("start_ns")


def test_every_level_against_a_plain_loop_over_closed_bars(spy: list[Built]) -> None:
    built = spy[-1]
    session, bars = built.session, built.bars.front(1).to_dicts()
    closes = [c for b in spy[-4:] for c in b.bars.front(2).select("end_ns", "close_e9").rows()]
    for n in (0, 1, 14, 15, 16, 100, 389):
        t = session.regular_open_ns + n * MINUTE_NS
        closed = [b for b in bars if b["end_ns"] <= t]
        pre = [
            b for b in closed if session.premarket_open_ns <= b["start_ns"] and b["end_ns"] <= session.regular_open_ns
        ]
        first = [
            b for b in closed if session.regular_open_ns <= b["start_ns"] < session.regular_open_ns + 15 * MINUTE_NS
        ]
        regular = [b for b in closed if b["start_ns"] >= session.regular_open_ns]
        volume = sum(b["volume"] for b in regular)
        averages = [c for end, c in closes if end <= t]
        expected = {
            "PM_HIGH": max(b["high_e9"] for b in pre),
            "PM_LOW": min(b["low_e9"] for b in pre),
            "OR_HIGH": max(b["high_e9"] for b in first) if n >= 15 else None,
            "OR_LOW": min(b["low_e9"] for b in first) if n >= 15 else None,
            "SESSION_HIGH": max(b["high_e9"] for b in closed),
            "SESSION_LOW": min(b["low_e9"] for b in closed),
            "VWAP": sum(b["vwap"] * b["volume"] for b in regular) / volume * 1e9 if volume else None,
            "SMA_200": sum(averages[-200:]) / 200,
            "SMA_400": sum(averages[-400:]) / 400,
        }
        for kind, value in expected.items():
            found = level(built, kind).filter(pl.col("start_ns") == t)["level_price_e9"].to_list()
            if value is None:
                assert found == [], (kind, n)
            else:
                assert found == [pytest.approx(value, abs=2)], (kind, n)


def test_round_levels_surround_the_last_close(spy: list[Built]) -> None:
    rows = level(spy[-1], "ROUND")
    assert (rows["level_price_e9"] % 10**9 == 0).all()
    assert (rows.group_by("start_ns").len()["len"] == 11).all()


def test_a_roll_shifts_earlier_closes_and_keeps_raw_prices(real_data: Path) -> None:
    built = build_folder(real_data / "mym-ohlcv-1m", "MYM", "2025-06-12", "2025-06-17")
    last = built[-1]
    (roll,) = last.levels.rolls
    before = built[-2].bars.bars.filter(
        (pl.col("timeframe_min") == 1) & (pl.col("end_ns") <= built[-2].session.regular_close_ns)
    )
    old, new = (
        before.filter(pl.col("instrument_id") == i).select("start_ns", "close_e9") for i in (roll.from_id, roll.to_id)
    )
    last_common = old.join(new, on="start_ns", suffix="_new").sort("start_ns").tail(1)
    assert roll.gap_e9 == (last_common["close_e9_new"] - last_common["close_e9"])[0] == 325 * 10**9
    assert roll.at_ns is not None
    assert roll.at_ns <= built[-2].session.close_ns < last.session.open_ns
    raw = np.concatenate([b.bars.front(2)["close_e9"].to_numpy() for b in built])
    shifted = last.levels.history.close_e9
    own = last.bars.front(2).height
    assert np.array_equal(shifted[-own:], raw[-own:])
    earlier = raw[:-own][-len(shifted) + own :]
    assert np.array_equal(shifted[:-own], earlier + 325 * 10**9)
    jumps = np.abs(np.diff(shifted)) / 1e9
    assert jumps[len(shifted) - own - 1] < 60
    assert find_rolls([b.bars for b in built[:-2]], built[-2].bars) == ()


def test_no_common_minute_means_no_history_before_the_roll(real_data: Path) -> None:
    from dataclasses import replace

    built = build_folder(real_data / "mym-ohlcv-1m", "MYM", "2025-06-12", "2025-06-17")
    only_old = replace(built[-2].bars, bars=built[-2].bars.bars.filter("is_front"))
    from spymaster_assets.signals.context import two_minute_history

    history = two_minute_history([built[-3].bars, only_old], built[-1].bars, built[-1].session.close_ns)
    assert history.rolls[0].gap_e9 is None
    assert len(history.end_ns) == built[-1].bars.front(2).height
