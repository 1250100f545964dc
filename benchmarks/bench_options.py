"""Implied volatility and greeks of 0.3 M option trades, and dealer features of 5,000 touches, against plain Python loops."""

from __future__ import annotations

import math
from datetime import date
from statistics import NormalDist
from time import perf_counter

import numpy as np

from spymaster_assets.market.calendar import TradingCalendar
from spymaster_assets.market.dbn import UNDEFINED_PRICE
from spymaster_assets.market.instruments import PRICE_SCALE, instrument
from spymaster_assets.market.options import OptionTrades
from spymaster_assets.settings import MINUTE_NS, OptionSettings
from spymaster_assets.signals.options import (
    OptionFlow,
    black_scholes,
    dealer_features,
    gamma_ledger,
    implied_greeks,
    option_flow,
    spot_at_e9,
    years_to_expiry,
)

TRADES, TOUCHES, SAMPLE, TOUCH_SAMPLE = 300_000, 5_000, 5_000, 20
DAY = "2025-06-11"
GOAL = 50.0
REPEATS = 5
_ROOT_2PI = math.sqrt(2 * math.pi)
NORMAL = NormalDist()


def market(seed: int = 7) -> tuple[OptionTrades, np.ndarray, np.ndarray, TradingCalendar]:
    """Trades of a 0DTE session around a random-walk spot, priced at a smile and rounded to the cent."""
    rng = np.random.default_rng(seed)
    calendar = TradingCalendar(instrument("SPY"))
    session = calendar.session(DAY)
    seconds = (session.regular_close_ns - session.regular_open_ns) // 10**9
    spot_ts = session.regular_open_ns + np.arange(seconds, dtype=np.int64) * 10**9
    spot = np.rint(60_000 + np.cumsum(rng.normal(0, 2.2, seconds))).astype(np.int64) * 10**7
    ts = np.sort(session.regular_open_ns + 1 + rng.integers(0, (seconds - 120) * 10**9, TRADES))
    now = spot_at_e9(ts, spot_ts, spot) / PRICE_SCALE
    expiry = np.full(TRADES, date.fromisoformat(DAY).toordinal())
    years = years_to_expiry(ts, expiry, calendar)
    strike = np.rint(now + rng.laplace(0, 3.0, TRADES))
    call = rng.random(TRADES) < 0.5
    smile = 0.15 + 0.5 * np.abs(strike / now - 1) * rng.uniform(0.5, 1.5, TRADES)
    price = black_scholes(now, strike, years, smile, call, OptionSettings()).price
    unknown = np.full(TRADES, UNDEFINED_PRICE)
    contracts, contract = np.unique(strike * 2 + call, return_inverse=True)
    trades = OptionTrades(
        ts_ns=ts,
        contract=contract.astype(np.int64),
        strike_e9=strike.astype(np.int64) * PRICE_SCALE,
        is_call=call,
        expiry=expiry,
        price_e9=np.maximum(np.rint(price * 100), 1).astype(np.int64) * 10**7,
        size=rng.integers(1, 50, TRADES),
        bid_e9=unknown,
        ask_e9=unknown,
        side=np.zeros(TRADES, np.int8),
        symbols=tuple(str(c) for c in contracts),
    )
    return trades, spot_ts, spot, calendar


def scalar_row(
    price: float, spot: float, strike: float, years: float, call: bool, rate: float
) -> tuple[float, float, float, float]:
    """Volatility (Newton from 30 %, bisection where it leaves 1 %..500 %), delta, gamma and vega of one trade, without a wasted
    operation."""
    root, discounted = math.sqrt(years), strike * math.exp(-rate * years)
    log_moneyness = math.log(spot / strike)
    sign = 1.0 if call else -1.0

    def value(vol: float) -> tuple[float, float]:
        d1 = (log_moneyness + (rate + 0.5 * vol * vol) * years) / (vol * root)
        n1 = 0.5 * math.erfc(-sign * d1 / math.sqrt(2))
        n2 = 0.5 * math.erfc(-sign * (d1 - vol * root) / math.sqrt(2))
        return sign * (spot * n1 - discounted * n2), d1

    low, high, vol = 0.01, 5.0, 0.3
    if not value(low)[0] < price < value(high)[0]:
        return math.nan, math.nan, math.nan, math.nan
    for _ in range(100):
        have, d1 = value(vol)
        low, high = (low, vol) if have > price else (vol, high)
        vega = spot * math.exp(-0.5 * d1 * d1) / _ROOT_2PI * root
        new = vol - (have - price) / vega if vega > 1e-12 else 0.0
        if not low < new < high:
            new = 0.5 * (low + high)
        if abs(new - vol) < 1e-10 * vol:
            break
        vol = new
    d1 = value(vol)[1]
    density = math.exp(-0.5 * d1 * d1) / _ROOT_2PI
    delta = sign * 0.5 * math.erfc(-sign * d1 / math.sqrt(2))
    return vol, delta, density / (spot * vol * root), spot * density * root


def textbook_row(
    price: float, spot: float, strike: float, years: float, call: bool, rate: float
) -> tuple[float, float, float, float]:
    """The same as `scalar_row`, written as a textbook does: one function a formula."""

    def d1(vol: float) -> float:
        return (math.log(spot / strike) + (rate + 0.5 * vol * vol) * years) / (vol * math.sqrt(years))

    def value(vol: float) -> float:
        a, b, discounted = d1(vol), d1(vol) - vol * math.sqrt(years), strike * math.exp(-rate * years)
        if call:
            return spot * NORMAL.cdf(a) - discounted * NORMAL.cdf(b)
        return discounted * NORMAL.cdf(-b) - spot * NORMAL.cdf(-a)

    def vega(vol: float) -> float:
        return spot * NORMAL.pdf(d1(vol)) * math.sqrt(years)

    low, high, vol = 0.01, 5.0, 0.3
    if not value(low) < price < value(high):
        return math.nan, math.nan, math.nan, math.nan
    for _ in range(100):
        miss = value(vol) - price
        low, high = (low, vol) if miss > 0 else (vol, high)
        new = vol - miss / vega(vol) if vega(vol) > 1e-12 else 0.0
        if not low < new < high:
            new = 0.5 * (low + high)
        if abs(new - vol) < 1e-10 * vol:
            break
        vol = new
    delta = NORMAL.cdf(d1(vol)) if call else NORMAL.cdf(d1(vol)) - 1.0
    return vol, delta, NORMAL.pdf(d1(vol)) / (spot * vol * math.sqrt(years)), vega(vol)


def plain_exposure(flow: OptionFlow, t0: int, level: int, band: int) -> float:
    """Dealer gamma near one level up to one time, by one loop over all trades."""
    total = 0.0
    for ts, strike, gamma in zip(flow.ts_ns.tolist(), flow.strike_e9.tolist(), flow.dealer_gamma.tolist(), strict=True):
        if ts <= t0 and abs(strike - level) <= band:
            total += gamma
    return total


def main() -> None:
    """Print the ratios; raise AssertionError when results differ."""
    settings = OptionSettings()
    trades, spot_ts, spot, calendar = market()
    years = years_to_expiry(trades.ts_ns, trades.expiry, calendar)
    now = spot_at_e9(trades.ts_ns, spot_ts, spot) / PRICE_SCALE
    price, strike = trades.price_e9 / PRICE_SCALE, trades.strike_e9 / PRICE_SCALE

    fast_s, repeats = math.inf, REPEATS
    for _ in range(repeats + 1):  # the first run compiles
        start = perf_counter()
        volatility, status, greeks = implied_greeks(price, now, strike, years, trades.is_call, settings)
        fast_s = min(fast_s, perf_counter() - start)

    rows = np.random.default_rng(1).choice(TRADES, SAMPLE, replace=False)
    columns = [a[rows].tolist() for a in (price, now, strike, years, trades.is_call)]
    slow_s, results = {}, {}
    for name, function in (("lean", scalar_row), ("textbook", textbook_row)):
        best = math.inf
        for _ in range(3):
            start = perf_counter()
            results[name] = [function(*row, rate=settings.rate) for row in zip(*columns, strict=True)]
            best = min(best, perf_counter() - start)
        slow_s[name] = best * TRADES / SAMPLE
    scalar = np.array(results["lean"])
    assert np.allclose(scalar, np.array(results["textbook"]), rtol=1e-6, atol=1e-9, equal_nan=True)
    # a volatility that the price hardly depends on is not determined by it to ten digits
    both = np.isfinite(scalar[:, 0]) & (status[rows] == 0) & (greeks.vega[rows] > 1e-3)
    assert np.allclose(scalar[both, 0], volatility[rows][both], rtol=1e-6)
    assert np.allclose(scalar[both, 2], greeks.gamma[rows][both], rtol=1e-5)
    print(
        f"volatility and greeks, {TRADES:,} trades: {fast_s * 1e3:.0f} ms, {fast_s / TRADES * 1e9:.0f} ns a trade; "
        f"{both.sum():,} of {SAMPLE:,} rows compared"
    )
    for name, seconds in slow_s.items():
        print(f"  {name} scalar Python loop, scaled: {seconds:.2f} s, ratio {seconds / fast_s:.0f}x (goal {GOAL:.0f}x)")

    flow = option_flow(trades, spot_ts, spot, calendar, settings)
    start = perf_counter()
    flow = option_flow(trades, spot_ts, spot, calendar, settings)
    flow_s = perf_counter() - start
    session = calendar.session(DAY)
    rng = np.random.default_rng(2)
    t0 = np.sort(session.regular_open_ns + rng.integers(1, 380, TOUCHES) * MINUTE_NS)
    level = np.rint(spot_at_e9(t0, spot_ts, spot) / PRICE_SCALE).astype(np.int64) * PRICE_SCALE
    features_s = math.inf
    for _ in range(repeats + 1):
        start = perf_counter()
        ledger = gamma_ledger(flow, session.regular_open_ns, session.regular_close_ns, settings)
        features = dealer_features(ledger, t0, level, settings)
        features_s = min(features_s, perf_counter() - start)
    some = np.linspace(0, TOUCHES - 1, TOUCH_SAMPLE).astype(np.int64)
    start = perf_counter()
    plain = [plain_exposure(flow, int(t0[i]), int(level[i]), 2 * PRICE_SCALE) for i in some]
    plain_s = (perf_counter() - start) * TOUCHES / TOUCH_SAMPLE
    assert np.allclose(plain, features.gamma_exposure[some], rtol=1e-9, atol=1e-6)
    print(
        f"flow of {TRADES:,} trades (spot, time, side, volatility, greeks): {flow_s * 1e3:.0f} ms; {flow.status_counts}"
    )
    print(
        f"dealer features, {TOUCHES:,} touches: {features_s * 1e3:.0f} ms with the ledger; exposure alone by a loop over trades "
        f"{plain_s:.0f} s ({TOUCH_SAMPLE} touches, scaled); ratio {plain_s / features_s:.0f}x"
    )


if __name__ == "__main__":
    main()
