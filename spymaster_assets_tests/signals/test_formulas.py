"""Each formula on numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.tape import SessionTape
from spymaster_assets.settings import LabelSettings, SignalSettings
from spymaster_assets.signals import labels as lab
from spymaster_assets.signals import touches as tch
from spymaster_assets.signals import trend
from spymaster_assets.signals.context import TwoMinuteHistory, average_true_range, rolling_std, slope
from spymaster_assets.signals.tape import tape_features
from spymaster_assets_tests.builders import trades

SPY = instrument("SPY")
S = SignalSettings()
MIN = 60 * 10**9


def usd(*values: float) -> np.ndarray:
    return np.array([round(v * 1e9) for v in values], np.int64)


class TestContext:
    def test_atr_is_a_mean_of_true_ranges(self) -> None:
        high, low, close = np.array([10.0, 12.0, 11.0]), np.array([9.0, 10.5, 8.0]), np.array([9.5, 11.5, 8.5])
        # ranges: 1; max(12, 9.5) - min(10.5, 9.5) = 2.5; max(11, 11.5) - min(8, 11.5) = 3.5
        assert average_true_range(high, low, close, 2) == pytest.approx([1.0, 1.75, 3.0])

    def test_std_needs_a_full_window(self) -> None:
        values = np.array([np.nan, 1.0, 3.0, 5.0])
        found = rolling_std(values, 3)
        assert np.isnan(found[:3]).all()
        assert found[3] == pytest.approx(2.0)

    def test_sma_and_slope(self) -> None:
        history = TwoMinuteHistory(np.arange(1, 7, dtype=np.int64) * 2 * MIN, np.array([1.0, 2, 3, 4, 5, 6]), ())
        average = history.sma(2)
        assert np.isnan(average[0])
        assert average[1:] == pytest.approx([1.5, 2.5, 3.5, 4.5, 5.5])
        at = history.index_at(np.array([2 * MIN - 1, 2 * MIN, 12 * MIN]))
        assert at.tolist() == [-1, 0, 5]
        assert slope(average, at, 4)[2] == pytest.approx((5.5 - 1.5) / 8)


class TestTape:
    def window(self, rows: list[tuple[float, float, int, str]]) -> SessionTape:
        t0 = 1_000 * MIN
        return SessionTape.of_records(
            trades(
                [t0 + round(s * 1e9) for s, *_ in rows],
                usd(*(r[1] for r in rows)),
                [r[2] for r in rows],
                [r[3] for r in rows],
            )
        )

    def features(self, rows: list[tuple[float, float, int, str]], level: float = 500.0):  # type: ignore[no-untyped-def]
        return tape_features(self.window(rows), np.array([1_000 * MIN]), usd(level), SPY, S)

    def test_imbalance_counts_the_band_and_the_window(self) -> None:
        f = self.features(
            [
                (0, 500.0, 600, "B"),
                (10, 500.5, 250, "A"),
                (20, 500.51, 999, "A"),
                (30, 499.6, 7, "N"),
                (60, 500.0, 999, "A"),
            ]
        )
        assert (f.buy_volume[0], f.sell_volume[0]) == (600, 250)
        assert f.imbalance[0] == pytest.approx(350 / 850)  # 0.4118
        assert f.trade_count[0] == 4

    def test_no_trade_near_is_zero_and_no_side_is_missing(self) -> None:
        assert self.features([(1, 510.0, 5, "B")]).imbalance[0] == 0.0
        unknown = self.features([(1, 500.0, 5, "N"), (2, 500.0, 5, "N")])
        assert np.isnan(unknown.imbalance[0])
        assert np.isnan(unknown.sweep[0])

    def test_velocity_is_a_least_squares_slope(self) -> None:
        f = self.features([(0, 500.0, 1, "N"), (1, 500.1, 1, "N"), (2, 500.1, 1, "N"), (3, 500.4, 1, "N")])
        assert f.velocity[0] == pytest.approx(np.polyfit([0, 1, 2, 3], [0, 0.1, 0.1, 0.4], 1)[0])
        assert np.isnan(self.features([(0, 500.0, 1, "B")]).velocity[0])

    def test_sweep_is_one_sided_fast_and_large(self) -> None:
        big = [(1.00, 500.0, 1500, "B"), (1.05, 500.01, 1500, "B"), (1.14, 500.02, 1500, "B")]  # $2.25 M in 140 ms
        assert self.features(big).sweep[0] == 1.0
        assert self.features([*big[:2], (1.14, 500.02, 1500, "A")]).sweep[0] == 0.0
        assert self.features([*big[:2], (1.16, 500.02, 1500, "B")]).sweep[0] == 0.0
        assert self.features([(t, p, 100, s) for t, p, _, s in big]).sweep[0] == 0.0


class TestConfluence:
    def test_weights_decay_with_distance_and_own_kind_is_left_out(self) -> None:
        weights = {"PM_HIGH": 1.0, "VWAP": 0.7, "OR_LOW": 0.9}
        found = trend.confluence(
            np.array([500.0]), np.array(["VWAP"]), np.array([[500.1, 500.0, 499.0]]), weights, 0.20
        )
        assert found["confluence_count"][0] == 1
        assert found["confluence_weighted_score"][0] == pytest.approx(1.0 * 0.5)
        assert found["confluence_min_distance"][0] == pytest.approx(0.1)
        assert found["confluence_pressure"][0] == pytest.approx(0.5 / 2.6)
        alone = trend.confluence(
            np.array([500.0]), np.array(["VWAP"]), np.array([[np.nan, 500.0, np.nan]]), weights, 0.20
        )
        assert np.isnan(alone["confluence_min_distance"][0])

    def test_alignment(self) -> None:
        def say(sign: int, d2: float, d4: float, s2: float, s4: float) -> float:
            return float(
                trend.confluence_alignment(np.array([sign], np.int8), *(np.array([v]) for v in (d2, d4, s2, s4)))[0]
            )

        assert say(1, -1, -2, -0.1, -0.2) == 1.0
        assert say(1, 1, 2, 0.1, 0.2) == -1.0
        assert say(1, 1, -2, 0.1, 0.2) == 0.0
        assert np.isnan(say(1, np.nan, 1, 1, 1))

    @pytest.mark.parametrize(
        ("d", "s", "expected"), [((1, 2), (0.3, 0.1), 1.0), ((-1, -2), (-0.3, -0.1), -1.0), ((1, 2), (0.1, 0.3), 0.0)]
    )
    def test_alignment_from_above(self, d: tuple[float, float], s: tuple[float, float], expected: float) -> None:
        """DOWN: +1 above both SMAs, both slopes > 0, slope_200 > slope_400; -1 below both, both < 0, slope_200 < slope_400."""
        found = trend.confluence_alignment(np.array([-1], np.int8), *(np.array([float(v)]) for v in (*d, *s)))
        assert found[0] == expected


class TestTouches:
    def context(self, bars: list[tuple[float, float, float]]) -> pl.DataFrame:
        n = np.arange(len(bars), dtype=np.int64)
        low, high, close = (usd(*(b[k] for b in bars)) for k in range(3))
        return pl.DataFrame(
            {"start_ns": n * MIN, "end_ns": (n + 1) * MIN, "low_e9": low, "high_e9": high, "close_e9": close}
        )

    def table(self, rows: list[tuple[int, str, float]]) -> pl.DataFrame:
        codes = {"PM_HIGH": 0, "SESSION_HIGH": 4, "ROUND": 8}
        return pl.DataFrame(
            {
                "start_ns": np.array([r[0] * MIN for r in rows], np.int64),
                "level_kind": pl.Series([codes[r[1]] for r in rows], dtype=pl.Int8),
                "level_kind_name": [r[1] for r in rows],
                "level_price_e9": usd(*(r[2] for r in rows)),
                "strike_e9": pl.Series([None] * len(rows), dtype=pl.Int64),
            }
        ).sort("start_ns", "level_kind", "level_price_e9")

    def test_one_event_an_episode_and_the_side_of_the_close_before(self) -> None:
        bars = [
            (498, 499, 498.5),
            (499, 499.95, 499.9),
            (499.8, 500.2, 500.1),
            *[(501, 502, 501.5)] * 11,
            (499.95, 501, 500.1),
        ]
        table = self.table([(n, "PM_HIGH", 500.0) for n in range(len(bars))])
        found = tch.find_touches(table, self.context(bars), SPY, S)
        assert (found["start_ns"] // MIN).to_list() == [1, 14]
        assert found["direction_sign"].to_list() == [1, -1]

    def test_a_bar_that_runs_through_is_no_event_until_it_closes_near(self) -> None:
        bars = [(498, 499, 498.5), (499, 501.5, 501.4), (499.9, 501.4, 500.2)]
        found = tch.find_touches(self.table([(n, "PM_HIGH", 500.0) for n in range(3)]), self.context(bars), SPY, S)
        assert (found["start_ns"] // MIN).to_list() == [2]
        assert found["direction_sign"].to_list() == [-1]

    def test_kinds_at_one_price_are_one_event(self) -> None:
        bars = [(498, 499, 498.5), (499, 500.0, 499.9)]
        rows = [(1, "ROUND", 500.0), (1, "PM_HIGH", 500.0), (1, "SESSION_HIGH", 500.0)]
        found = tch.find_touches(self.table(rows), self.context(bars), SPY, S)
        assert found["level_kind_name"].to_list() == ["PM_HIGH"]

    def test_a_tie_looks_further_back(self) -> None:
        bars = [(501, 502, 501.5), (499.9, 500.1, 500.0), (499.9, 500.1, 500.0)]
        found = tch.find_touches(self.table([(2, "PM_HIGH", 500.0)]), self.context(bars), SPY, S)
        assert found["direction_sign"].to_list() == [-1]

    def test_prior_touches_are_earlier_only(self) -> None:
        start = np.array([0, 0, 5, 9], np.int64)
        assert tch.prior_touches(start, usd(500, 500.05, 500.1, 501), round(0.1e9)).tolist() == [0, 0, 2, 0]

    def test_attempts_restart_after_a_gap_or_a_move(self) -> None:
        start = np.array([0, 5, 21, 22, 23], np.int64) * MIN
        index, cluster, first = tch.attempts(
            np.array([0, 0, 0, 1, 0]),
            start,
            usd(500, 500.05, 500.05, 500.05, 500.2),
            np.zeros(5, np.int64),
            15 * MIN,
            round(0.1e9),
        )
        assert index.tolist() == [1, 2, 1, 1, 1]
        assert cluster.tolist() == [1, 1, 2, 1, 3]
        assert first.tolist() == [0, 0, 2, 3, 4]

    def test_touches_of_one_bar_do_not_count_for_each_other(self) -> None:
        start = np.array([0, 5, 5, 9], np.int64) * MIN
        price = usd(500, 500, 505, 505)
        index, cluster, first = tch.attempts(np.zeros(4, np.int64), start, price, price, 15 * MIN, round(0.1e9))
        assert index.tolist() == [1, 2, 1, 2]
        assert cluster.tolist() == [1, 1, 2, 2]
        assert first.tolist() == [0, 0, 2, 2]
        alone = tch.attempts(np.zeros(2, np.int64), start[[0, 2]], price[[0, 2]], price[[0, 2]], 15 * MIN, round(0.1e9))
        assert [a[1] for a in alone] == [index[2], cluster[2], 1]


class TestLabels:
    def labels(self, path: lab.Path, level: float, sign: int, defined_until: int = 10**6 * MIN) -> dict:
        limits = np.array([[1.0, 2.0]])
        e = lab.measure(
            path, np.array([100 * MIN]), usd(level), lab.to_e9(limits, 10**9), 8 * MIN, defined_until, 10**9, 8
        )
        found = lab.label_columns("4min", e, np.array([sign], np.int8), limits, np.array([level]))
        return {k: (v.to_list() if isinstance(v, pl.Series) else v.tolist())[0] for k, v in found.items()}

    def ticks(self, *rows: tuple[float, float]) -> lab.Path:
        return lab.Path.of_trades(
            SessionTape.of_records(trades([100 * MIN + round(s * 1e9) for s, _ in rows], usd(*(p for _, p in rows))))
        )

    def bars(self, *rows: tuple[int, float, float, float]) -> lab.Path:
        start = np.array([(100 + m) * MIN for m, *_ in rows], np.int64)
        high, low, close = (usd(*(r[k] for r in rows)) for k in (1, 2, 3))
        return lab.Path("bars", start, start + MIN, high, low, close)

    def test_first_crossing_wins(self) -> None:
        path = self.ticks((-5, 500.1), (30, 501.2), (90.5, 502.0), (200, 497.5), (481, 490.0))
        found = self.labels(path, 500.0, 1)
        assert found["outcome_4min"] == "BREAK"
        assert found["anchor_spot_4min"] == pytest.approx(500.1)
        assert (found["time_to_break_1_4min"], found["time_to_break_2_4min"]) == (30.0, 90.5)
        assert (found["time_to_bounce_2_4min"], found["time_to_threshold_2_4min"]) == (200.0, 90.5)
        assert (found["excursion_max_4min"], found["excursion_min_4min"]) == (2.0, 2.5)
        assert (found["strength_signed_4min"], found["strength_abs_4min"]) == (-0.5, 2.5)
        assert found["future_price_4min"] == 497.5
        assert (found["t1_60_4min"], found["t2_60_4min"], found["t2_120_4min"], found["t2_bounce_300_4min"]) == (
            True,
            False,
            True,
            True,
        )
        assert self.labels(path, 500.0, -1)["outcome_4min"] == "BOUNCE"

    def test_nothing_crossed_is_chop(self) -> None:
        found = self.labels(self.ticks((-1, 500.0), (10, 500.5)), 500.0, 1)
        assert found["outcome_4min"] == "CHOP"
        assert found["tradeable_1_4min"] is False
        assert np.isnan(found["time_to_threshold_1_4min"])

    def test_an_incomplete_window_is_undefined_everywhere(self) -> None:
        for path, until in (
            (self.ticks((-1, 500.0), (10, 505.0)), 107 * MIN),
            (self.ticks((-1, 500.0)), 200 * MIN),
            (self.ticks(), 200 * MIN),
        ):
            found = self.labels(path, 500.0, 1, until)
            assert found["outcome_4min"] == "UNDEFINED"
            assert found["tradeable_2_4min"] is None
            assert found["t1_60_4min"] is None
            assert np.isnan(found["strength_signed_4min"])

    def test_a_level_left_behind_is_resolved_at_zero_seconds(self) -> None:
        found = self.labels(self.ticks((-1, 502.5), (10, 502.6)), 500.0, 1)
        assert found["already_resolved_4min"] is True
        assert found["time_to_break_2_4min"] == 0.0
        assert self.labels(self.ticks((-1, 501.9), (10, 502.6)), 500.0, 1)["already_resolved_4min"] is False

    def test_bars_date_a_crossing_to_their_close_and_span_eight_minutes(self) -> None:
        quiet = [(m, 500.2, 499.9, 500.0) for m in range(-1, 8)]
        path = self.bars(*quiet[:3], (2, 502.1, 500.0, 502.0), *quiet[4:], (8, 520.0, 500.0, 510.0))
        found = self.labels(path, 500.0, 1)
        assert found["time_to_break_2_4min"] == 180.0
        assert found["excursion_max_4min"] == pytest.approx(2.1)
        assert found["ambiguous_4min"] is False

    def test_both_sides_in_one_bar_are_recorded_as_ambiguous(self) -> None:
        found = self.labels(
            self.bars((-1, 500.1, 499.9, 500.0), (0, 502.5, 497.0, 500.0), (7, 500.1, 499.9, 500.0)), 500.0, 1
        )
        assert (found["outcome_4min"], found["ambiguous_4min"]) == ("BOUNCE", True)
        tie = self.labels(
            self.bars((-1, 500.1, 499.9, 500.0), (0, 503.0, 497.0, 500.0), (7, 500.1, 499.9, 500.0)), 500.0, 1
        )
        assert (tie["outcome_4min"], tie["ambiguous_4min"]) == ("CHOP", True)

    def test_thresholds(self) -> None:
        sigma = np.array([0.1, np.nan])
        assert lab.thresholds_usd(LabelSettings(), sigma).tolist() == [[1.0, 2.0], [1.0, 2.0]]
        scaled = lab.thresholds_usd(LabelSettings(mode="volatility"), sigma)
        assert scaled[0] == pytest.approx([0.75 * 0.1 * 8**0.5, 1.5 * 0.1 * 8**0.5])
        assert lab.to_e9(scaled, 10**9)[1].tolist() == [-1, -1]
