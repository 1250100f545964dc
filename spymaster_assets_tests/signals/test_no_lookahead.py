"""Ending a session's input at any time leaves every earlier value equal, bit for bit."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from spymaster_assets.errors import ContractError
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.simulate import write_market
from spymaster_assets.market.simulate_book import PROFILES, write_full_market
from spymaster_assets.settings import NS, BarrierSettings, OptionSettings, SignalSettings
from spymaster_assets.signals.build import signals_from_parquet, signals_to_parquet
from spymaster_assets.signals.checks import feed_faults, signal_faults
from spymaster_assets_tests.builders import CALENDARS, CONTRACT, VOLATILITY, Built, build_folder, build_one

SESSIONS = CALENDARS["SPY"].sessions("2024-02-01", "2024-02-06")


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dbn")
    write_market(folder, instrument("SPY"), [CALENDARS["SPY"].session(k) for k in SESSIONS], seed=3)
    return folder


def assert_known_values_equal(full: pl.DataFrame, cut: pl.DataFrame, cut_ns: int) -> int:
    """Compare every value known by the cut; return how many rows were compared."""
    known = full.filter(pl.col("decision_ns") <= cut_ns)
    assert cut["event_id"].to_list() == known["event_id"].to_list()
    for column in CONTRACT.columns:
        rows = pl.Series(known["ts_ns"] + column.known_after_s * NS <= cut_ns)
        if column.name == "label_known_ns":
            rows = pl.Series([True] * known.height)
        one, other = known[column.name].filter(rows), cut[column.name].filter(rows)
        assert one.equals(other, null_equal=True), (column.name, cut_ns)
        if column.dtype == "float64":
            assert one.to_numpy().tobytes() == other.to_numpy().tobytes(), column.name
    return known.height


def cut_twenty_times(folder: Path, symbol: str, built: list[Built], seed: int) -> None:
    last = built[-1]
    rng = np.random.default_rng(seed)
    cuts = rng.integers(last.session.regular_open_ns, last.session.regular_close_ns, 18).tolist()
    cuts += [last.session.regular_open_ns + 15 * 60 * NS, last.session.regular_close_ns - 1]
    compared = 0
    for cut_ns in cuts:
        registration = replace(last.registration, observed_until_ns=min(cut_ns, last.registration.observed_until_ns))
        again = build_one(
            folder, symbol, last.session, registration, [b.bars for b in built[:-1]], VOLATILITY, None, cut_ns
        )
        compared += assert_known_values_equal(last.signals.frame, again.signals.frame, cut_ns)
    assert compared > 100


def test_simulated_trades(simulated: Path) -> None:
    cut_twenty_times(simulated, "SPY", build_folder(simulated, "SPY", SESSIONS[0], SESSIONS[-1]), 0)


@pytest.fixture(scope="module")
def all_feeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feeds")
    profile = PROFILES["full"].scaled(0.06)
    write_full_market(folder, instrument("SPY"), [CALENDARS["SPY"].session(k) for k in SESSIONS], 5, profile)
    return folder


def test_simulated_order_book_and_options(all_feeds: Path) -> None:
    built = build_folder(all_feeds, "SPY", SESSIONS[0], SESSIONS[-1])
    frame = built[-1].signals.frame
    assert built[-1].signals.metadata["feeds"] == ["bars", "book", "options", "side", "trades"]
    assert feed_faults(frame, CONTRACT, set(built[-1].signals.metadata["feeds"])) == []
    for column in ("barrier_state", "wall_ratio", "gamma_exposure", "dealer_pressure", "net_break_pressure"):
        assert frame[column].null_count() < frame.height / 2, column
    assert {"CALL_WALL", "PUT_WALL", "STRIKE"} & set(frame["level_kind_name"])
    cut_twenty_times(all_feeds, "SPY", built, 4)


GROUPS: dict = {
    "signal": SignalSettings(),
    "barrier": BarrierSettings(),
    "option": OptionSettings(),
    "label": VOLATILITY,
}
WHOLE_NUMBERS = [
    (name, f.name) for name, group in GROUPS.items() for f in fields(group) if type(getattr(group, f.name)) is int
]
REFUSED = {"tape_window_s", "window_s", "look_forward_s", "atr_bars", "vol_bars", "lookback_min", "baseline_s"}


@pytest.fixture(scope="module")
def one_session(all_feeds: Path) -> Built:
    return build_folder(all_feeds, "SPY", SESSIONS[0], SESSIONS[0])[-1]


@pytest.mark.parametrize(("group", "name"), WHOLE_NUMBERS)
def test_no_setting_opens_a_window_to_the_future(all_feeds: Path, one_session: Built, group: str, name: str) -> None:
    """Four times as much of anything that is counted is refused, or what was known at a decision stays what it was."""
    groups = {**GROUPS, group: replace(GROUPS[group], **{name: 4 * getattr(GROUPS[group], name)})}

    def build(until_ns: int | None = None) -> pl.DataFrame:
        registration = one_session.registration
        if until_ns is not None:
            registration = replace(registration, observed_until_ns=until_ns)
        parts = groups["label"], groups["signal"], until_ns, groups["barrier"], groups["option"]
        return build_one(all_feeds, "SPY", one_session.session, registration, [], *parts).signals.frame

    if name in REFUSED:
        with pytest.raises(ContractError, match=rf"{group}\.{name} = "):
            build()
        return
    full = build()
    cut_ns = int(full["ts_ns"][full.height // 2]) + 90 * NS
    assert assert_known_values_equal(full, build(cut_ns), cut_ns) > 20


def test_options_on_the_future_itself(tmp_path: Path) -> None:
    session = CALENDARS["ES"].session("2024-02-01")
    write_full_market(tmp_path, instrument("ES"), [session], 5, PROFILES["full"].scaled(0.04))
    built = build_folder(tmp_path, "ES", "2024-02-01", "2024-02-01")[-1]
    frame = built.signals.frame
    assert {"book", "options"} <= set(built.signals.metadata["feeds"])
    opens_ns = session.regular_open_ns
    assert frame.filter(pl.col("gamma_exposure").is_null())["ts_ns"].to_list() in (
        [],
        [opens_ns],
    )  # no trade before the open
    assert frame["dist_to_gamma_flip"].drop_nulls().abs().max() <= 6.0
    assert frame["barrier_state"].null_count() < frame.height / 2
    assert feed_faults(frame, CONTRACT, set(built.signals.metadata["feeds"])) == []


def test_real_bars_on_the_session_after_the_clocks_change(real_data: Path) -> None:
    folder = real_data / "spy-ohlcv-1m"
    cut_twenty_times(folder, "SPY", build_folder(folder, "SPY", "2024-03-06", "2024-03-11"), 1)


def test_real_trades(real_data: Path) -> None:
    folder = real_data / "spy-trades"
    cut_twenty_times(folder, "SPY", build_folder(folder, "SPY", "2013-10-07", "2013-10-09"), 2)


def test_real_futures_over_a_roll(real_data: Path) -> None:
    folder = real_data / "mym-ohlcv-1m"
    cut_twenty_times(folder, "MYM", build_folder(folder, "MYM", "2025-06-12", "2025-06-17"), 3)


def test_half_day_futures_session_without_wall_street(real_data: Path) -> None:
    built = build_folder(real_data / "mym-ohlcv-1m", "MYM", "2025-05-21", "2025-05-26")[-1]
    frame = built.signals.frame
    assert frame.height > 0
    assert (frame["ts_ns"] < built.session.regular_close_ns).all()
    assert frame["minutes_to_close"].max() <= 210
    late = frame.filter(pl.col("ts_ns") + (240 + 480) * NS > built.session.regular_close_ns)
    assert (late["outcome_4min"] == "UNDEFINED").all()


def test_invariants_contract_and_bytes(simulated: Path, real_data: Path) -> None:
    for folder, symbol, first, last, feeds in (
        (simulated, "SPY", SESSIONS[0], SESSIONS[-1], {"bars", "trades", "side"}),
        (real_data / "spy-ohlcv-1m", "SPY", "2024-04-01", "2024-04-05", {"bars"}),
        (real_data / "spy-trades", "SPY", "2013-10-07", "2013-10-09", {"bars", "trades"}),
        (real_data / "es-trades-2013", "ES", "2013-09-02", "2013-09-03", {"bars", "trades"}),
        (real_data / "mym-ohlcv-1m", "MYM", "2025-06-16", "2025-06-20", {"bars"}),
    ):
        for built in build_folder(folder, symbol, first, last):
            frame = built.signals.frame
            assert signal_faults(frame, built.session, SignalSettings()) == []
            assert CONTRACT.violations(frame) == []
            assert feed_faults(frame, CONTRACT, feeds) == []
            data = signals_to_parquet(built.signals)
            assert data == signals_to_parquet(built.signals)
            again = signals_from_parquet(data, CONTRACT)
            assert again.frame.equals(frame)
            assert again.metadata["schema_version"] == CONTRACT.schema_version
            assert again.metadata["contract_sha256"] == CONTRACT.sha256


def test_a_random_minute_of_2024_moves_a_dollar_one_time_in_fifteen(real_data: Path) -> None:
    """Known base rates of the sample: $1 within 8 minutes 6.5 %, $2 0.7 %."""
    totals = np.zeros(3)
    for built in build_folder(real_data / "spy-ohlcv-1m", "SPY", "2024-02-20", "2024-05-17"):
        rates = built.signals.metadata["base_rates"]["dollars"]["any_minute"]
        totals += [rates["n"], rates["reached_1"], rates["reached_2"]]
    assert totals[1] / totals[0] == pytest.approx(0.065, abs=0.0005)
    assert totals[2] / totals[0] == pytest.approx(0.007, abs=0.0002)
