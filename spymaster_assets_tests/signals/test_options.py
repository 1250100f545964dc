"""Greeks against textbooks, dealer gamma against plain loops, sides against an exchange's own, and nothing from after t0."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from datetime import UTC, date, datetime
from pathlib import Path
from statistics import NormalDist

import databento
import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from spymaster_assets.errors import MarketDataError
from spymaster_assets.market.dbn import UNDEFINED_PRICE, read_records
from spymaster_assets.market.options import (
    STATISTICS_DTYPES,
    OpenInterest,
    OptionDefinitions,
    OptionTrades,
    quotes_before,
    read_open_interest,
)
from spymaster_assets.settings import MINUTE_NS, NS, OptionSettings
from spymaster_assets.signals import options as opt
from spymaster_assets_tests.builders import CALENDARS, session_of

S = OptionSettings()
SPY = CALENDARS["SPY"]
DAY = "2025-06-11"
SESSION = session_of("SPY", DAY)
OPEN, CLOSE = SESSION.regular_open_ns, SESSION.regular_close_ns
DOLLAR = 10**9
N = NormalDist()


def scalar_price(spot: float, strike: float, years: float, vol: float, call: bool, o: OptionSettings = S) -> float:
    """Black-Scholes as the textbook prints it."""
    d1 = (math.log(spot / strike) + (o.rate - o.dividend_yield + vol * vol / 2) * years) / (vol * math.sqrt(years))
    d2 = d1 - vol * math.sqrt(years)
    carried, discounted = spot * math.exp(-o.dividend_yield * years), strike * math.exp(-o.rate * years)
    if call:
        return carried * N.cdf(d1) - discounted * N.cdf(d2)
    return discounted * N.cdf(-d2) - carried * N.cdf(-d1)


def scalar_gamma(spot: float, strike: float, years: float, vol: float) -> float:
    d1 = (math.log(spot / strike) + (S.rate + vol * vol / 2) * years) / (vol * math.sqrt(years))
    return N.pdf(d1) / (spot * vol * math.sqrt(years))


def one(values: object, *more: float, call: bool = True, o: OptionSettings = S):  # type: ignore[no-untyped-def]
    """A vectorised function on one row."""
    return values(*(np.array([float(v)]) for v in more), np.array([call]), o)  # type: ignore[operator]


def option_trades(ts_ns: np.ndarray, price_usd: np.ndarray, **columns: object) -> OptionTrades:
    n = len(ts_ns)
    base: dict = {
        "contract": np.zeros(n, np.int64),
        "strike_e9": np.full(n, 600 * DOLLAR),
        "is_call": np.ones(n, bool),
        "expiry": np.full(n, date.fromisoformat(DAY).toordinal()),
        "size": np.ones(n, np.int64),
        "bid_e9": np.full(n, UNDEFINED_PRICE),
        "ask_e9": np.full(n, UNDEFINED_PRICE),
        "side": np.zeros(n, np.int8),
        "symbols": ("X",),
    }
    price_e9 = np.rint(np.asarray(price_usd) * DOLLAR).astype(np.int64)
    return OptionTrades(ts_ns=np.asarray(ts_ns, np.int64), price_e9=price_e9, **{**base, **columns})


class TestBlackScholes:
    def test_hull_prices(self) -> None:
        """Hull, Options, Futures and Other Derivatives, example 15.6: call 4.76, put 0.81."""
        o = OptionSettings(rate=0.1)
        assert one(opt.black_scholes, 42, 40, 0.5, 0.2, o=o).price[0] == pytest.approx(4.76, abs=0.005)
        assert one(opt.black_scholes, 42, 40, 0.5, 0.2, call=False, o=o).price[0] == pytest.approx(0.81, abs=0.005)

    def test_hull_greeks(self) -> None:
        """Hull, chapter 19: S = 49, K = 50, r = 5 %, 20 %, 0.3846 years: delta 0.522, gamma 0.066, vega 12.1."""
        g = one(opt.black_scholes, 49, 50, 0.3846, 0.2, o=OptionSettings(rate=0.05))
        assert (round(g.delta[0], 3), round(g.gamma[0], 3), round(g.vega[0], 1)) == (0.522, 0.066, 12.1)

    def test_dividend_yield(self) -> None:
        """Hull, example 17.1: index 930, strike 900, two months, r 8 %, q 3 %, 20 %: 51.83."""
        o = OptionSettings(rate=0.08, dividend_yield=0.03)
        assert one(opt.black_scholes, 930, 900, 2 / 12, 0.2, o=o).price[0] == pytest.approx(51.83, abs=0.01)

    @given(
        spot=st.floats(50, 900), ratio=st.floats(0.7, 1.4), years=st.floats(1e-5, 2), vol=st.floats(0.01, 3),
        q=st.floats(0, 0.05),
    )  # fmt: skip
    @settings(deadline=None, max_examples=80)
    def test_put_call_parity(self, spot: float, ratio: float, years: float, vol: float, q: float) -> None:
        o = OptionSettings(dividend_yield=q)
        strike = spot * ratio
        call, put = (one(opt.black_scholes, spot, strike, years, vol, call=c, o=o) for c in (True, False))
        forward = spot * math.exp(-q * years) - strike * math.exp(-S.rate * years)
        assert call.price[0] - put.price[0] == pytest.approx(forward, abs=1e-10 * spot)
        assert call.delta[0] - put.delta[0] == pytest.approx(math.exp(-q * years), abs=1e-12)
        assert call.gamma[0] == put.gamma[0]
        assert call.vega[0] == put.vega[0]
        assert call.price[0] == pytest.approx(scalar_price(spot, strike, years, vol, True, o), abs=1e-10 * spot)

    def test_greeks_are_slopes_of_the_price(self) -> None:
        for call in (True, False):
            g = one(opt.black_scholes, 600, 602, 0.003, 0.18, call=call)

            def price(ds: float, dv: float, call: bool = call) -> float:
                return float(one(opt.black_scholes, 600 + ds, 602, 0.003, 0.18 + dv, call=call).price[0])

            assert g.delta[0] == pytest.approx((price(1e-3, 0) - price(-1e-3, 0)) / 2e-3, rel=1e-6)
            assert g.gamma[0] == pytest.approx((price(0.05, 0) - 2 * price(0, 0) + price(-0.05, 0)) / 0.05**2, rel=1e-4)
            assert g.vega[0] == pytest.approx((price(0, 1e-5) - price(0, -1e-5)) / 2e-5, rel=1e-6)

    def test_missing_inputs_are_nan(self) -> None:
        for row in ((np.nan, 600, 0.1, 0.2), (600, 600, 0, 0.2), (600, 600, 0.1, np.nan), (600, 0, 0.1, 0.2)):
            g = one(opt.black_scholes, *row)
            assert all(np.isnan(getattr(g, f.name)[0]) for f in fields(g))


class TestImpliedVolatility:
    @given(
        deviations=st.floats(-6, 6), years=st.floats(-6, 0.3).map(lambda e: 10.0**e), call=st.booleans(),
        vol=st.floats(math.log(0.01), math.log(5)).map(math.exp),
    )  # fmt: skip
    @settings(deadline=None, max_examples=300)
    def test_round_trip(self, deviations: float, years: float, vol: float, call: bool) -> None:
        vol = min(max(vol, 0.01), 5.0)
        strike = 600 * math.exp(min(max(deviations * vol * math.sqrt(years), -3.0), 3.0))
        g = one(opt.black_scholes, 600, strike, years, vol, call=call)
        # an in-the-money price keeps its time value only to the last digits of the whole
        assume(g.vega[0] * vol > 1e-5 and g.price[0] > 0)
        found, status, _ = one(opt.implied_greeks, g.price[0], 600, strike, years, call=call)
        assert opt.IV_STATUS[status[0]] == "ok"
        assert found[0] == pytest.approx(vol, rel=1e-6)
        again = one(opt.black_scholes, 600, strike, years, found[0], call=call).price[0]
        assert again == pytest.approx(g.price[0], abs=1e-9)

    def test_agrees_with_a_root_finder(self) -> None:
        for strike, price, call in (
            (690.0, 3.03, True),
            (696.0, 0.16, True),
            (689.0, 0.34, False),
            (640.0, 0.01, False),
        ):
            expected = brentq(lambda v, k=strike, p=price, c=call: scalar_price(692.3, k, 0.0027, v, c) - p, 0.01, 5.0)
            found, _, _ = one(opt.implied_greeks, price, 692.3, strike, 0.0027, call=call)
            assert found[0] == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize(
        ("price", "spot", "strike", "years", "call", "status"),
        [
            (9.99, 610, 600, 0.001, True, "below_intrinsic"),
            (0.0, 600, 600, 0.001, True, "below_intrinsic"),
            (-0.05, 600, 610, 0.001, True, "below_intrinsic"),
            (1.0, 600, 600, 0.0, True, "no_time_left"),
            (1.0, 600, 600, -0.1, True, "no_time_left"),
            (1.0, np.nan, 600, 0.1, True, "no_spot"),
            (601.0, 600, 600, 0.1, True, "outside_bounds"),
            (400.0, 600, 600, 0.1, True, "outside_bounds"),
            (10.1, 600, 610, 1e-7, False, "outside_bounds"),
            (0.01, 600, 600, 0.01, True, "below_intrinsic"),
            (1e-5, 600, 600, 1e-9, False, "outside_bounds"),
            (np.nan, 600, 600, 0.1, True, "below_intrinsic"),
        ],
    )
    def test_failures_have_a_reason(
        self, price: float, spot: float, strike: float, years: float, call: bool, status: str
    ) -> None:
        found, code, greeks = one(opt.implied_greeks, price, spot, strike, years, call=call)
        assert opt.IV_STATUS[code[0]] == status
        assert all(np.isnan(v[0]) for v in (found, *vars(greeks).values()))


class TestTimeAndSpot:
    def years(self, when: str, expiry: str, symbol: str = "SPY") -> float:
        ts = np.array([round(datetime.fromisoformat(when).timestamp()) * NS])
        days = np.array([date.fromisoformat(expiry).toordinal()])
        return float(opt.years_to_expiry(ts, days, CALENDARS[symbol])[0]) * 252 * 6.5

    @pytest.mark.parametrize(
        ("when", "expiry", "hours"),
        [
            ("2025-06-11T13:30:00+00:00", "2025-06-11", 6.5),  # summer: 16:00 in New York is 20:00 UTC
            ("2025-06-11T19:00:00+00:00", "2025-06-11", 1.0),
            ("2025-12-19T19:00:00+00:00", "2025-12-19", 2.0),  # winter: 21:00 UTC
            ("2025-06-11T08:00:00+00:00", "2025-06-11", 6.5),  # the night is no trading time
            ("2025-06-11T20:00:01+00:00", "2025-06-11", 0.0),
            ("2025-07-03T13:30:00+00:00", "2025-07-03", 3.5),  # half day
            ("2025-07-03T16:00:00+00:00", "2025-07-07", 7.5),  # over a holiday and a weekend
            ("2025-06-13T19:00:00+00:00", "2025-06-16", 7.5),
            ("2025-06-16T19:00:00+00:00", "2025-06-05", 0.0),  # long expired
            ("2025-06-13T19:00:00+00:00", "2025-06-14", 1.0),  # an expiry on a Saturday ends with Friday
        ],
    )
    def test_hours_of_trading_left(self, when: str, expiry: str, hours: float) -> None:
        assert self.years(when, expiry) == pytest.approx(hours, abs=1e-9)

    def test_an_expiry_beyond_the_calendar(self) -> None:
        with pytest.raises(MarketDataError, match="outside the calendar of SPY"):
            self.years("2025-06-11T13:30:00+00:00", "2099-01-02")

    def test_no_trades(self) -> None:
        assert len(opt.years_to_expiry(np.empty(0, np.int64), np.empty(0, np.int64), SPY)) == 0

    def test_spot_is_strictly_before(self) -> None:
        found = opt.spot_at_e9(np.array([9, 10, 11, 20, 21]), np.array([10, 20, 20]), np.array([1, 2, 3]))
        assert found.tolist() == [UNDEFINED_PRICE, UNDEFINED_PRICE, 1, 1, 3]
        assert opt.spot_at_e9(np.array([9]), np.empty(0, np.int64), np.empty(0, np.int64)).tolist() == [UNDEFINED_PRICE]


class TestAggressor:
    def test_tick_rule_by_contract_with_the_last_sign_carried(self) -> None:
        contract = np.array([0, 0, 1, 0, 0, 1, 0, 0])
        price = [1.00, 1.00, 9.00, 1.05, 1.05, 8.90, 1.01, 1.01]
        found = opt.infer_aggressor(option_trades(np.arange(8), np.array(price), contract=contract))
        assert found.tolist() == [0, 0, 0, 1, 1, -1, -1, -1]

    def test_quotes_come_first_then_the_midpoint_then_the_tick(self) -> None:
        u = UNDEFINED_PRICE / DOLLAR
        rows = [  # price, bid, ask -> side
            (1.10, 1.00, 1.10, 1),
            (1.20, 1.00, 1.10, 1),
            (1.00, 1.00, 1.10, -1),
            (0.90, 1.00, 1.10, -1),
            (1.06, 1.00, 1.10, 1),
            (1.04, 1.00, 1.10, -1),
            (1.05, 1.00, 1.10, 1),  # midpoint, price rose
            (1.05, 1.00, 1.10, 1),  # midpoint, carried
            (1.04, 1.04, 1.04, -1),  # locked: no quote, price fell
            (1.03, 1.05, 1.00, -1),  # crossed: no quote
            (1.04, u, 1.04, 1),
            (1.04, 1.04, u, -1),
            (1.04, u, 1.10, 1),  # below the ask alone says nothing, price rose
            (1.03, u, u, -1),
        ]
        price, bid, ask, side = (np.array(c) for c in zip(*rows, strict=True))

        def e9(v: np.ndarray) -> np.ndarray:
            return np.where(v == u, UNDEFINED_PRICE, np.rint(np.where(v == u, 0, v) * DOLLAR).astype(np.int64))

        found = opt.infer_aggressor(option_trades(np.arange(len(rows)), price, bid_e9=e9(bid), ask_e9=e9(ask)))
        assert found.tolist() == side.tolist()

    def test_the_feed_knows_best(self) -> None:
        side = np.array([0, -1, 0, 1], np.int8)
        found = opt.infer_aggressor(option_trades(np.arange(4), np.array([1.0, 1.1, 1.2, 1.1]), side=side))
        assert found.tolist() == [0, -1, 1, 1]

    def test_against_the_true_side_of_an_exchange(self, real_data: Path) -> None:
        """ES on CME tells each trade's true side and its book: the rules are measured against it, side withheld."""
        stem = real_data / "es-book-2023" / "glbx-mdp3-20231225"
        if not Path(f"{stem}.mbp-10.dbn.zst").is_file():
            pytest.skip("the ES book of 2023-12-25 is not there")
        t = read_records(Path(f"{stem}.trades.dbn.zst"))
        book = databento.DBNStore.from_file(f"{stem}.mbp-10.dbn.zst").to_ndarray(schema="mbp-10")
        true = (t["side"] == b"B").astype(int) - (t["side"] == b"A").astype(int)
        ts, zeros = t["ts_recv"].astype(np.int64), np.zeros(len(t), np.int64)
        bid, ask = quotes_before(
            ts,
            zeros,
            book["ts_recv"].astype(np.int64),
            np.zeros(len(book), np.int64),
            book["bid_px_00"].astype(np.int64),
            book["ask_px_00"].astype(np.int64),
        )
        blind = option_trades(ts, t["price"] / DOLLAR, size=t["size"].astype(np.int64))
        rates = {}
        for name, trades in (("tick rule", blind), ("quotes", replace(blind, bid_e9=bid, ask_e9=ask))):
            found = opt.infer_aggressor(trades)
            rates[name] = float((found == true)[true != 0].mean())
        print(f"\naggressor right, of {int((true != 0).sum())} ES trades: {rates}")
        assert rates["quotes"] > 0.995
        assert 0.70 < rates["tick rule"] < 0.80, "the tick rule is right in about three of four trades, not more"


def random_flow(seed: int, n: int, from_ns: int = OPEN, span_min: int = 60) -> opt.OptionFlow:
    """Trades on strikes from 590 to 610 at times with many ties, dealer gamma in round figures."""
    rng = np.random.default_rng(seed)
    ts = np.sort(from_ns + rng.integers(0, span_min * 20, n) * 3 * NS)
    nothing = np.full(n, np.nan)
    return opt.OptionFlow(
        ts_ns=ts,
        strike_e9=rng.integers(590, 611, n) * DOLLAR,
        is_call=rng.random(n) < 0.5,
        size=rng.integers(1, 50, n),
        aggressor=rng.integers(-1, 2, n).astype(np.int8),
        spot_e9=np.full(n, 600 * DOLLAR),
        years=nothing,
        volatility=nothing,
        iv_status=np.zeros(n, np.int8),
        delta=nothing,
        gamma=nothing,
        vega=nothing,
        dealer_gamma=rng.integers(-8, 9, n) * 512.0,  # sums of these are exact in any order
    )


def touches(seed: int, n: int, span_min: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    t0 = np.sort(OPEN + rng.integers(0, span_min, n) * MINUTE_NS)
    return t0, rng.integers(58_800, 61_200, n) * 10**7


def plain_features(flow: opt.OptionFlow, from_ns: int, until_ns: int, t0: int, level: int) -> dict[str, object]:
    """The same features with one loop over all trades and no shortcut."""

    def total(after: int, up_to: int) -> float:
        s = 0.0
        for ts, strike, g in zip(flow.ts_ns, flow.strike_e9, flow.dealer_gamma, strict=True):
            if after < ts <= up_to and abs(int(strike) - level) <= 2 * DOLLAR:
                s += g
        return s

    seen = [ts for ts in flow.ts_ns if from_ns <= ts < until_ns and ts <= t0]
    if not seen or not from_ns <= t0 < until_ns:
        return {"gamma_exposure": math.nan, "fuel_effect": None, "gamma_bucket": "UNKNOWN", "velocity": math.nan,
                "impulse": math.nan, "accel_1m": math.nan, "accel_3m": math.nan}  # fmt: skip
    m = MINUTE_NS
    exposure = total(OPEN - 1, t0) if from_ns <= OPEN else math.nan

    def flow_over(from_min: int, to_min: int = 0) -> float:
        return total(t0 - from_min * m, t0 - to_min * m) if t0 - from_min * m >= max(from_ns, OPEN) else math.nan

    velocity, baseline = flow_over(5) / 5, flow_over(20) / 20
    impulse = 0.0 if abs(baseline) <= 1e-6 else (velocity - baseline) / abs(baseline)
    return {
        "gamma_exposure": exposure,
        "fuel_effect": None
        if math.isnan(exposure)
        else "AMPLIFY"
        if exposure < -10_000
        else "DAMPEN"
        if exposure > 10_000
        else "NEUTRAL",
        "gamma_bucket": "UNKNOWN" if math.isnan(exposure) else "SHORT_GAMMA" if exposure < 0 else "LONG_GAMMA",
        "velocity": velocity,
        "impulse": impulse,
        "accel_1m": flow_over(1) - flow_over(2, 1),
        "accel_3m": (flow_over(3) - flow_over(6, 3)) / 3,
    }


class TestDealerFeatures:
    @pytest.mark.parametrize(("seed", "late_min"), [(0, 0), (1, -30), (2, 2), (3, 20)])
    def test_equals_a_plain_loop(self, seed: int, late_min: int) -> None:
        """A feed that begins after the open knows flows as soon as their windows lie in it, and no sum since the open."""
        flow = random_flow(seed, 900)
        t0, level = touches(seed + 100, 60)
        from_ns, until_ns = OPEN + late_min * MINUTE_NS, OPEN + 55 * MINUTE_NS
        found = opt.dealer_features(opt.gamma_ledger(flow, OPEN, until_ns, S, from_ns), t0, level, S)
        effects = set()
        for n in range(len(t0)):
            expected = plain_features(flow, from_ns, until_ns, int(t0[n]), int(level[n]))
            effects.add(expected["fuel_effect"])
            assert found.fuel_effect[n] == expected["fuel_effect"]
            assert found.gamma_bucket[n] == expected["gamma_bucket"]
            for name, column in (
                ("gamma_exposure", found.gamma_exposure),
                ("velocity", found.gamma_flow_velocity),
                ("impulse", found.gamma_flow_impulse),
                ("accel_1m", found.gamma_flow_accel_1m),
                ("accel_3m", found.gamma_flow_accel_3m),
            ):
                assert column[n] == pytest.approx(expected[name], rel=1e-12, nan_ok=True), (name, n)
        assert effects >= ({"AMPLIFY", "DAMPEN"} if late_min <= 0 else {None})
        assert np.isfinite(found.gamma_exposure).any() == (late_min <= 0)
        assert np.isfinite(found.gamma_flow_impulse).any()
        assert found.dealer_pressure == pytest.approx(np.tanh(-found.gamma_flow_velocity / 50_000), nan_ok=True)
        assert found.dealer_pressure_accel == pytest.approx(np.tanh(-found.gamma_flow_accel_1m / 50_000), nan_ok=True)

    def test_bands_and_the_instant_of_the_touch_are_included(self) -> None:
        flow = replace(
            random_flow(0, 4),
            ts_ns=np.array([OPEN, OPEN + 10, OPEN + 10, OPEN + 11]),
            strike_e9=np.array([602, 598, 597, 600]) * DOLLAR,
            dealer_gamma=np.array([1.0, 2.0, 4.0, 8.0]),
        )
        ledger = opt.gamma_ledger(flow, OPEN, CLOSE, S)
        t, level = np.array([OPEN - 1, OPEN + 9, OPEN + 10, OPEN + 11]), np.full(4, 600 * DOLLAR)
        assert opt.net_gamma(ledger, level, t, 2 * DOLLAR).tolist() == [0.0, 1.0, 3.0, 11.0]
        assert opt.net_gamma(ledger, level - 1, t, 2 * DOLLAR).tolist() == [0.0, 0.0, 2.0, 10.0]

    def test_no_coverage_is_missing_and_an_empty_band_is_zero(self) -> None:
        flow = random_flow(1, 50, span_min=10)
        level = np.array([600, 600, 600, 500]) * DOLLAR
        t0 = np.array([OPEN - MINUTE_NS, OPEN + 30 * MINUTE_NS, OPEN + 10 * MINUTE_NS, OPEN + 10 * MINUTE_NS])
        f = opt.dealer_features(opt.gamma_ledger(flow, OPEN, OPEN + 30 * MINUTE_NS, S), t0, level, S)
        assert np.isnan(f.gamma_exposure).tolist() == [True, True, False, False]
        assert f.gamma_exposure[3] == 0.0
        assert f.fuel_effect[[0, 1, 3]].tolist() == [None, None, "NEUTRAL"]
        assert f.gamma_bucket[[0, 1, 3]].tolist() == ["UNKNOWN", "UNKNOWN", "LONG_GAMMA"]
        assert np.isfinite(f.gamma_flow_velocity).tolist() == [False, False, True, True]
        assert np.isnan(f.gamma_flow_impulse).all(), "twenty minutes before have not been seen yet"
        nothing = opt.gamma_ledger(random_flow(1, 0), OPEN, CLOSE, S)
        assert np.isnan(opt.dealer_features(nothing, t0, level, S).gamma_exposure).all()
        assert np.isnan(opt.gamma_flip_e9(nothing, level, t0, 5 * DOLLAR)).all()

    def test_the_flip_lies_between_the_strikes_of_the_first_change(self) -> None:
        flow = replace(
            random_flow(0, 5),
            ts_ns=OPEN + np.arange(5),
            strike_e9=np.array([598, 599, 601, 603, 620]) * DOLLAR,
            dealer_gamma=np.array([-5.0, 3.0, 9.0, -1.0, -9.0]),
        )
        ledger = opt.gamma_ledger(flow, OPEN, CLOSE, S)
        t, at = OPEN + np.arange(4), np.full(4, 600 * DOLLAR)
        late = opt.gamma_ledger(flow, OPEN, CLOSE, S, OPEN + 1)
        assert np.isnan(opt.gamma_flip_e9(late, at, t, 5 * DOLLAR)).all(), "the feed does not reach back to the open"
        found = opt.gamma_flip_e9(ledger, at, t, 5 * DOLLAR)
        assert np.isnan(found[:2]).all(), "two strikes are too few, though their signs differ"
        assert found[2:].tolist() == pytest.approx([598.625e9, 598.625e9])
        assert opt.gamma_flip_e9(ledger, at + 2 * DOLLAR, t, 3 * DOLLAR)[3] == pytest.approx(602.8e9)
        assert np.isnan(opt.gamma_flip_e9(ledger, at + 8 * DOLLAR, t, 5 * DOLLAR)[3])

    def test_dealer_gamma_has_the_sign_of_who_sold(self) -> None:
        """Customers who buy leave dealers short gamma, whatever the right."""
        trades = option_trades(
            OPEN + np.arange(1, 5) * NS,
            np.array([1.0, 1.1, 1.0, 1.2]),
            is_call=np.array([True, True, False, False]),
            contract=np.array([0, 0, 1, 1]),
            size=np.array([5, 5, 5, 5]),
        )
        flow = opt.option_flow(trades, np.array([OPEN]), np.array([600 * DOLLAR]), SPY, S)
        assert flow.aggressor.tolist() == [0, 1, 0, 1]
        assert (flow.gamma > 0).all()
        assert flow.dealer_gamma.tolist() == pytest.approx([0.0, -500 * flow.gamma[1], 0.0, -500 * flow.gamma[3]])
        assert flow.status_counts["ok"] == 4


class TestLevels:
    def test_walls_equal_a_plain_loop(self) -> None:
        flow = random_flow(5, 700, from_ns=OPEN - 3 * MINUTE_NS, span_min=40)
        until = OPEN + 35 * MINUTE_NS + 1
        walls = opt.wall_levels(flow, SESSION, S, until)
        for name, right in (("CALL_WALL", True), ("PUT_WALL", False)):
            known, price = walls[name].known_ns, walls[name].price_e9
            assert known.tolist() == [OPEN + k * MINUTE_NS for k in range(1, 36)]
            for end, wall in zip(known, price, strict=True):
                sums: dict[int, float] = {}
                for ts, strike, call, g in zip(
                    flow.ts_ns, flow.strike_e9, flow.is_call, flow.dealer_gamma, strict=True
                ):
                    if call == right and max(OPEN, end - 5 * MINUTE_NS) <= ts < end:
                        sums[strike] = sums.get(strike, 0.0) + g
                low = min(sums.values(), default=0.0)
                expected = min(k for k, v in sums.items() if v == low) if low < 0 else math.nan
                assert wall == pytest.approx(expected, nan_ok=True)
            assert np.isfinite(price).any()

    def test_a_wall_needs_its_minutes_in_the_feed(self) -> None:
        flow = replace(random_flow(5, 2000, span_min=40), dealer_gamma=np.full(2000, -1.0))
        begins = OPEN + 7 * MINUTE_NS + NS
        late = flow.ts_ns >= begins
        flow = opt.OptionFlow(**{f.name: getattr(flow, f.name)[late] for f in fields(flow)})
        for series in opt.wall_levels(flow, SESSION, S, OPEN + 20 * MINUTE_NS, begins).values():
            # the first five minutes that lie wholly in the feed are 8..12
            assert np.isfinite(series.price_e9).tolist() == [False] * 12 + [True] * 8

    def test_no_selling_no_wall(self) -> None:
        flow = replace(random_flow(5, 200), dealer_gamma=np.zeros(200))
        assert all(np.isnan(s.price_e9).all() for s in opt.wall_levels(flow, SESSION, S).values())
        assert all(len(s.known_ns) == 390 for s in opt.wall_levels(random_flow(1, 0), SESSION, S).values())
        half = session_of("SPY", "2025-07-03")
        assert len(opt.wall_levels(random_flow(1, 0), half, S)["CALL_WALL"].known_ns) == 210

    def test_a_strike_is_known_once_enough_has_traded(self) -> None:
        flow = replace(
            random_flow(0, 5),
            ts_ns=OPEN + np.array([0, 59, 60, 125, 126]) * NS,
            strike_e9=np.array([601, 600, 600, 601, 602]) * DOLLAR,
            size=np.array([101, 100, 1, 5, 100]),
        )
        found = opt.strike_levels(flow, SESSION, S)
        assert ((found.known_ns - OPEN) // MINUTE_NS).tolist() == [1, 2]
        assert found.price_e9.tolist() == [601e9, 600e9]
        assert len(opt.strike_levels(flow, SESSION, S, OPEN + MINUTE_NS - 1).known_ns) == 0
        assert len(opt.strike_levels(flow, SESSION, S, OPEN + MINUTE_NS).known_ns) == 1
        assert len(opt.strike_levels(random_flow(0, 0), SESSION, S).known_ns) == 0


def market(seed: int, n: int = 1500) -> tuple[OptionTrades, np.ndarray, np.ndarray]:
    """Priced 0DTE trades of an hour with quotes for some, and the underlying's tape."""
    rng = np.random.default_rng(seed)
    spot_ts = np.sort(OPEN - MINUTE_NS + rng.integers(0, 61 * 60 * NS, 4000))
    spot = np.rint(60_000 + np.cumsum(rng.normal(0, 1.5, 4000))).astype(np.int64) * 10**7
    ts = np.sort(OPEN + rng.integers(0, 60 * 60 * NS, n))
    strike = rng.integers(594, 607, n)
    call = rng.random(n) < 0.5
    now = opt.spot_at_e9(ts, spot_ts, spot) / DOLLAR
    years = opt.years_to_expiry(ts, np.full(n, date.fromisoformat(DAY).toordinal()), SPY)
    fair = opt.black_scholes(now, strike.astype(float), years, rng.uniform(0.08, 0.4, n), call, S).price
    cents = np.maximum(np.rint(fair * 100), 1).astype(np.int64)
    quoted = rng.random(n) < 0.5
    trades = option_trades(
        ts,
        cents / 100,
        strike_e9=strike * DOLLAR,
        is_call=call,
        contract=(strike - 594) * 2 + call,
        size=rng.integers(1, 80, n),
        bid_e9=np.where(quoted, (cents - rng.integers(0, 4, n)) * 10**7, UNDEFINED_PRICE),
        ask_e9=np.where(quoted, (cents + rng.integers(0, 4, n)) * 10**7, UNDEFINED_PRICE),
        symbols=tuple(str(k) for k in range(26)),
    )
    return trades, spot_ts, spot


@pytest.mark.parametrize("seed", range(4))
def test_nothing_after_t0_matters(seed: int) -> None:
    """Other prices, sizes, strikes, sides and spots after t0, and trades added or missing: not a bit changes before."""
    trades, spot_ts, spot = market(seed)
    rng = np.random.default_rng(seed + 50)
    t0 = OPEN + int(rng.integers(21, 50)) * MINUTE_NS
    late, spot_late = trades.ts_ns > t0, spot_ts > t0
    n = len(trades)
    changed = replace(
        trades,
        price_e9=np.where(late, rng.integers(1, 900, n) * 10**7, trades.price_e9),
        size=np.where(late, rng.integers(1, 9000, n), trades.size),
        strike_e9=np.where(late, rng.integers(580, 640, n) * DOLLAR, trades.strike_e9),
        is_call=np.where(late, rng.random(n) < 0.5, trades.is_call),
        side=np.where(late, rng.integers(-1, 2, n), 0).astype(np.int8),
        bid_e9=np.where(late, UNDEFINED_PRICE, trades.bid_e9),
        ask_e9=np.where(late, 10**7, trades.ask_e9),
    )
    other = np.where(spot_late, spot[::-1] * 2, spot)
    variants = [
        (trades, spot_ts, spot),
        (changed, spot_ts, other),
        (changed.take(~late | (rng.random(n) < 0.3)), spot_ts[~spot_late], spot[~spot_late]),
        (trades.take(~late), spot_ts[~spot_late], spot[~spot_late]),
    ]
    at = np.arange(OPEN, t0 + 1, MINUTE_NS // 4)
    level = rng.integers(59_700, 60_300, len(at)) * 10**7
    seen = []
    for option, ts, price in variants:
        flow = opt.option_flow(option, ts, price, SPY, S)
        ledger = opt.gamma_ledger(flow, OPEN, CLOSE, S)
        features = opt.dealer_features(ledger, at, level, S)
        early = flow.ts_ns <= t0
        columns = [getattr(flow, f.name)[early].tobytes() for f in fields(flow)]
        columns += [
            v.tobytes() if (v := getattr(features, f.name)).dtype != object else repr(v.tolist()).encode()
            for f in fields(features)
        ]
        columns.append(opt.gamma_flip_e9(ledger, level, at, 5 * DOLLAR).tobytes())
        for series in (*opt.wall_levels(flow, SESSION, S).values(), opt.strike_levels(flow, SESSION, S)):
            before = series.known_ns <= t0
            columns += [series.known_ns[before].tobytes(), series.price_e9[before].tobytes()]
        seen.append(columns)
        if option is trades:
            assert flow.status_counts["ok"] > 0.8 * n
            assert np.isfinite(features.gamma_flow_impulse).any()
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_gamma_of_a_real_chain(real_data: Path) -> None:
    """Last prints of the SPY chain of 2026-02-11: volatility by a root finder, gamma and sums by plain loops."""
    path = real_data / "spy-options" / "spy_chain_20260211.csv"
    if not path.is_file():
        pytest.skip("the SPY chain of 2026-02-11 is not there")
    chain = (
        pl.read_csv(path, infer_schema_length=None)
        .with_columns(pl.col("lastTradeDate").str.to_datetime("%Y-%m-%d %H:%M:%S%z", time_unit="ns"))
        .filter(
            (pl.col("expirationDate") <= "2026-02-13")
            & (pl.col("lastTradeDate") >= datetime(2026, 2, 11, tzinfo=UTC))
            & (pl.col("volume") > 0)
        )
        .sort("lastTradeDate", "contractSymbol")
    )
    session = session_of("SPY", "2026-02-11")
    spot_usd = float(chain["underlyingPrice"][0])
    n = chain.height
    trades = option_trades(
        chain["lastTradeDate"].dt.timestamp("ns").to_numpy(),
        chain["lastPrice"].to_numpy(),
        contract=np.arange(n),
        strike_e9=np.rint(chain["strike"].to_numpy() * DOLLAR).astype(np.int64),
        is_call=(chain["optionType"] == "call").to_numpy(),
        expiry=np.array([date.fromisoformat(d).toordinal() for d in chain["expirationDate"]]),
        size=chain["volume"].cast(pl.Int64).to_numpy(),
        bid_e9=np.rint(chain["bid"].to_numpy() * DOLLAR).astype(np.int64),
        ask_e9=np.rint(chain["ask"].to_numpy() * DOLLAR).astype(np.int64),
        symbols=tuple(chain["contractSymbol"]),
    )
    spot_e9 = np.array([round(spot_usd * DOLLAR)])
    flow = opt.option_flow(trades, np.array([session.regular_open_ns - NS]), spot_e9, SPY, S)
    print(f"\n{n} contracts, volatility: {flow.status_counts}")
    assert flow.status_counts["ok"] > 0.75 * n

    dealer = []
    spot = spot_e9[0] / DOLLAR
    for i, row in enumerate(chain.iter_rows(named=True)):
        days = sum(SPY.session(k).regular_minutes for k in SPY.sessions("2026-02-12", row["expirationDate"]))
        seconds = days * 60 + (session.regular_close_ns - int(trades.ts_ns[i])) / NS
        years = seconds / (252 * 6.5 * 3600)
        call, bid, ask, last = row["optionType"] == "call", row["bid"], row["ask"], row["lastPrice"]

        def miss(vol: float, row: dict = row, years: float = years, call: bool = call) -> float:
            return scalar_price(spot, row["strike"], years, vol, call) - row["lastPrice"]

        gamma = 0.0
        if miss(0.01) * miss(5.0) < 0:
            vol = brentq(miss, 0.01, 5.0, xtol=1e-14)
            if flow.iv_status[i] == 0:
                assert flow.volatility[i] == pytest.approx(vol, rel=1e-4)
            gamma = scalar_gamma(spot, row["strike"], years, vol)
        side = 0
        if bid < ask:
            if last >= ask or (last > bid and round(2e4 * last) > round(1e4 * (bid + ask))):
                side = 1
            elif last <= bid or round(2e4 * last) < round(1e4 * (bid + ask)):
                side = -1
        dealer.append(-side * row["volume"] * gamma * 100)

    level = np.array([685.0, 690.0, 692.3, 695.0, 700.0])
    t0 = np.full(5, int(trades.ts_ns[-1]))
    ledger = opt.gamma_ledger(flow, session.regular_open_ns, session.regular_close_ns, S)
    found = opt.dealer_features(ledger, t0, np.rint(level * DOLLAR).astype(np.int64), S)
    expected = [
        sum(
            g
            for g, k, ts in zip(dealer, chain["strike"], trades.ts_ns, strict=True)
            if abs(k - x) <= 2 and session.regular_open_ns <= ts <= t0[0]
        )
        for x in level
    ]
    print(f"gamma exposure at {level.tolist()}: {np.rint(found.gamma_exposure).tolist()}")
    assert found.gamma_exposure == pytest.approx(expected, rel=1e-6)
    assert (np.abs(found.gamma_exposure) > 1000).any()


class TestPressures:
    def test_values(self) -> None:
        a = np.array([-100_000.0, 0.0, 250_000.0, np.nan])
        assert opt.gamma_pressure(a, S) == pytest.approx([math.tanh(1), 0, math.tanh(-2.5), math.nan], nan_ok=True)
        assert opt.gamma_pressure_accel(a / 2, S) == pytest.approx(
            [math.tanh(1), 0, math.tanh(-2.5), math.nan], nan_ok=True
        )

    def test_liquidity(self) -> None:
        found = opt.liquidity_pressure(np.array([-200.0, 0, 1e9]), np.array([0.0, 2.0, 9.0]), S)
        assert found == pytest.approx([(math.tanh(1) + 1) / 2, 0.0, -1.0])

    def test_net_needs_all_five(self) -> None:
        parts = [np.array([v, 1.0, 0.0]) for v in (0.5, 0.1, -0.3, 0.2, 0.4)]
        assert opt.net_break_pressure(*parts) == pytest.approx([0.18, 1.0, 0.0])
        assert np.isnan(opt.net_break_pressure(*parts[:4], np.array([np.nan, 0, 0]))[0])


class TestOpenInterest:
    def test_gamma_of_what_is_open_equals_a_plain_loop(self) -> None:
        rng = np.random.default_rng(3)
        n, strikes = 400, np.arange(498, 504) * 10**9
        flow = opt.OptionFlow(
            ts_ns=np.sort(rng.integers(0, 10**6, n)),
            strike_e9=rng.choice(strikes, n),
            is_call=rng.random(n) < 0.5,
            size=np.ones(n, np.int64),
            aggressor=np.ones(n, np.int8),
            spot_e9=np.full(n, 500 * 10**9),
            years=np.full(n, 0.001),
            volatility=np.full(n, 0.2),
            iv_status=np.zeros(n, np.int8),
            delta=np.full(n, 0.5),
            gamma=np.where(rng.random(n) < 0.2, np.nan, rng.random(n)),
            vega=np.ones(n),
            dealer_gamma=np.zeros(n),
        )
        interest = OpenInterest(np.repeat(strikes, 2), np.tile([True, False], 6), rng.integers(1, 900, 12))
        level = rng.choice(strikes, 50) + rng.integers(-3, 3, 50) * 10**8
        at = rng.integers(-10, 10**6, 50)
        got = opt.open_interest_gamma(flow, interest, level, at, 2 * 10**9, 100.0)
        for i in range(50):
            total = None
            for strike, call, count in zip(interest.strike_e9, interest.is_call, interest.contracts, strict=True):
                mine = (
                    (flow.strike_e9 == strike)
                    & (flow.is_call == call)
                    & (flow.ts_ns <= at[i])
                    & np.isfinite(flow.gamma)
                )
                if abs(int(strike) - int(level[i])) <= 2 * 10**9 and mine.any():
                    total = (total or 0.0) + (1 if call else -1) * count * 100.0 * flow.gamma[mine][-1]
            assert np.isnan(got[i]) if total is None else got[i] == pytest.approx(total)

    def test_real_statistics_tell_one_number_for_all_venues(self, real_data: Path) -> None:
        folder = real_data / "dbn-schemas"
        path = folder / "py-OPRA.PILLAR__test_data.statistics.dbn.zst"
        records = read_records(path, {"statistics": (STATISTICS_DTYPES[3], 0x18)})
        number = int(records["instrument_id"][0])
        day = date(2025, 2, 20)
        definitions = OptionDefinitions(
            np.array([number]), np.array([b"X"]), np.array([5 * 10**9]), np.array([True]),
            np.array([day.toordinal()]), np.array([True]),
        )  # fmt: skip
        end_ns = int(records["ts_recv"].max()) + 1
        found = read_open_interest(path, definitions, day, end_ns)
        assert found.contracts.tolist() == [57924]
        assert len(read_open_interest(path, definitions, day, int(records["ts_recv"].min())).contracts) == 0
        assert len(read_open_interest(path, definitions, date(2025, 2, 21), end_ns).contracts) == 0
