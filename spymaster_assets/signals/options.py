"""Option prints to dealer flow: implied volatility, greeks, aggressor, gamma near a level, walls and pressures, all as of t0."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from datetime import date, timedelta

import numpy as np
import polars as pl
from numba import njit
from numpy.typing import NDArray

from spymaster_assets.errors import MarketDataError
from spymaster_assets.market.basis import SpotBasis
from spymaster_assets.market.calendar import Session, TradingCalendar
from spymaster_assets.market.dbn import UNDEFINED_PRICE
from spymaster_assets.market.instruments import PRICE_SCALE
from spymaster_assets.market.options import EPOCH_ORDINAL, OpenInterest, OptionTrades
from spymaster_assets.settings import DAY_NS, MINUTE_NS, NS, TRADING_YEAR_S, OptionSettings
from spymaster_assets.signals.coverage import Coverage
from spymaster_assets.tables import parquet_bytes, read_parquet

IV_STATUS = ("ok", "below_intrinsic", "no_time_left", "not_converged", "outside_bounds", "no_spot")
"""What became of an implied volatility, by status code; all but the first leave NaN."""
_OK, _BELOW_INTRINSIC, _NO_TIME, _NOT_CONVERGED, _OUTSIDE, _NO_SPOT = range(len(IV_STATUS))
_MIN_FLIP_STRIKES = 3
_FLAT_BASELINE = 1e-6
_MAX_STEPS = 100
_SETTLED = 1e-3
"""Each step cuts an error e to the order of e^4: after one this small, relative to s, what is left is floating point's."""
_SQRT_2 = math.sqrt(2.0)
_SQRT_2PI = math.sqrt(2.0 * math.pi)


@dataclass(frozen=True)
class Greeks:
    """Black-Scholes values (n,): price $, delta, gamma per $, vega $ per 1.00 of volatility; NaN where an input is."""

    price: NDArray[np.float64]
    delta: NDArray[np.float64]
    gamma: NDArray[np.float64]
    vega: NDArray[np.float64]


_FLOW_SCHEMA: dict[str, pl.DataType] = {
    "ts_ns": pl.Int64(),
    "strike_e9": pl.Int64(),
    "is_call": pl.Boolean(),
    "size": pl.Int64(),
    "aggressor": pl.Int8(),
    "spot_e9": pl.Int64(),
    "years": pl.Float64(),
    "volatility": pl.Float64(),
    "iv_status": pl.Int8(),
    **dict.fromkeys(("delta", "gamma", "vega", "dealer_gamma"), pl.Float64()),
}


@dataclass(frozen=True)
class OptionFlow:
    """Option trades with what they did to dealers, arrays (n,) in receive order.

    aggressor: +1, -1, 0 unknown. spot_e9: underlying before the print, UNDEFINED_PRICE before its first. years: regular-hours
    time left. volatility, delta, gamma, vega: NaN where iv_status (code of IV_STATUS) is not 0. dealer_gamma: share delta per
    dollar, -aggressor x size x gamma x multiplier, 0 where aggressor or gamma is unknown.
    """

    ts_ns: NDArray[np.int64]
    strike_e9: NDArray[np.int64]
    is_call: NDArray[np.bool_]
    size: NDArray[np.int64]
    aggressor: NDArray[np.int8]
    spot_e9: NDArray[np.int64]
    years: NDArray[np.float64]
    volatility: NDArray[np.float64]
    iv_status: NDArray[np.int8]
    delta: NDArray[np.float64]
    gamma: NDArray[np.float64]
    vega: NDArray[np.float64]
    dealer_gamma: NDArray[np.float64]

    @property
    def status_counts(self) -> dict[str, int]:
        """Number of trades by IV_STATUS."""
        counts = np.bincount(self.iv_status, minlength=len(IV_STATUS))
        return dict(zip(IV_STATUS, counts.tolist(), strict=True))


@dataclass(frozen=True)
class OptionFeed:
    """A session's flow of options on `root`, the time [from_ns, until_ns) that the feed covers, and the way from points to strikes."""

    flow: OptionFlow
    root: str
    from_ns: int
    until_ns: int
    basis: SpotBasis
    dollar_e9: int
    """One SPY dollar in the unit of the strikes, 1e-9."""
    open_interest: OpenInterest | None = None

    def cut(self, until_ns: int) -> OptionFeed:
        """What had been received before until_ns."""
        n = int(np.searchsorted(self.flow.ts_ns, until_ns, side="left"))
        flow = OptionFlow(**{f.name: getattr(self.flow, f.name)[:n] for f in fields(self.flow)})
        return replace(self, flow=flow, until_ns=min(self.until_ns, until_ns))


@dataclass(frozen=True)
class GammaLedger:
    """Dealer gamma by strike and time since open_ns: strike_e9 (m,) ascending; trades of strike k are rows offset[k]:offset[k + 1] of
    ts_ns and total (n,), the running sum of the strike. `coverage` says from when to when and with which holes the feed was there."""

    strike_e9: NDArray[np.int64]
    offset: NDArray[np.int64]
    ts_ns: NDArray[np.int64]
    total: NDArray[np.float64]
    open_ns: int
    coverage: Coverage

    def covers(self, t_ns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the running sums are known at each time: the feed was there at open_ns, reaches it and has had no hole."""
        return self.coverage.unbroken(self.open_ns, t_ns + 1)

    def tells(self, after_ns: NDArray[np.int64], t_ns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the flow of (after, t] is known, of which what lies before open_ns is none: as `covers`, for holes of that time."""
        return self.coverage.unbroken(np.maximum(after_ns, self.open_ns), t_ns + 1)


@dataclass(frozen=True)
class LevelSeries:
    """Prices of a dynamic level (k,): price_e9 (1e-9 dollars, NaN where there is none) holds from known_ns on, ascending."""

    known_ns: NDArray[np.int64]
    price_e9: NDArray[np.float64]


# --- time, spot and aggressor -----------------------------------------------------------------------------------------


def years_to_expiry(
    ts_ns: NDArray[np.int64], expiry: NDArray[np.int64], calendar: TradingCalendar
) -> NDArray[np.float64]:
    """Regular-hours seconds from each time (n,) to the close of its expiry's session, in years of 252 x 6.5 hours.

    expiry: date ordinals (n,); one without a session ends with the session before. 0 after the close; nights and weekends are
    no trading time. Raises MarketDataError for an expiry beyond the calendar.
    """
    if len(ts_ns) == 0:
        return np.empty(0)
    # a day early, since the UTC date of an evening is the next day's
    first = int(ts_ns.min() // DAY_NS) + EPOCH_ORDINAL - 1
    last = date.fromordinal(max(int(expiry.max()), first))
    keys = calendar.sessions(date.fromordinal(first - 10).isoformat(), last.isoformat())
    if not keys or not calendar.sessions(last.isoformat(), (last + timedelta(days=10)).isoformat()):
        raise MarketDataError(
            f"expiry {last} is outside the calendar of {calendar.instrument.symbol}",
            expected="an expiry within a year from now",
            remedy="select nearer expiries",
        )
    sessions = [calendar.session(k) for k in keys]
    opens = np.array([s.regular_open_ns for s in sessions], np.int64)
    length = np.array([s.regular_close_ns for s in sessions], np.int64) - opens
    days = np.array([date.fromisoformat(k).toordinal() for k in keys], np.int64)
    before = np.concatenate(([0], np.cumsum(length)))
    at = np.searchsorted(opens, ts_ns, side="right") - 1
    passed = np.where(at >= 0, before[at] + np.minimum(ts_ns - opens[at], length[at]), 0)
    end = before[np.searchsorted(days, expiry, side="right")]
    return np.maximum(end - passed, 0) / (NS * TRADING_YEAR_S)


def spot_at_e9(
    ts_ns: NDArray[np.int64], underlying_ts_ns: NDArray[np.int64], underlying_price_e9: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Price (n,) of the last underlying trade received strictly before each time, UNDEFINED_PRICE before the first.

    underlying_*: (u,) in receive order, price in 1e-9 points.
    """
    if len(underlying_ts_ns) == 0:
        return np.full(len(ts_ns), UNDEFINED_PRICE, np.int64)
    at = np.searchsorted(underlying_ts_ns, ts_ns, side="left") - 1
    return np.where(at >= 0, underlying_price_e9[at], UNDEFINED_PRICE)


def infer_aggressor(trades: OptionTrades) -> NDArray[np.int8]:
    """Side (n,) of each trade's aggressor: +1 buyer, -1 seller, 0 unknown, from nothing later than the trade.

    In this order: what the feed says; at or above the ask +1, at or below the bid -1, above or below the midpoint +1 or -1
    (Lee and Ready 1991), if the quote is neither locked nor crossed; at the midpoint or without a quote the contract's last
    price change (tick rule), 0 before its first.
    """
    contracts = 1 + int(trades.contract.max(initial=-1))
    side = _infer_aggressor(
        trades.contract, trades.price_e9, trades.bid_e9, trades.ask_e9, trades.side, contracts, UNDEFINED_PRICE
    )
    return np.asarray(side)


@njit(cache=True)
def _infer_aggressor(contract, price, bid, ask, side, contracts, undefined):  # type: ignore[no-untyped-def]
    n = len(price)
    out = np.zeros(n, np.int8)
    last_price = np.full(contracts, undefined, np.int64)
    tick = np.zeros(contracts, np.int8)
    for i in range(n):
        c = contract[i]
        p = price[i]
        if last_price[c] != undefined:
            if p > last_price[c]:
                tick[c] = 1
            elif p < last_price[c]:
                tick[c] = -1
        last_price[c] = p
        if side[i] != 0:
            out[i] = side[i]
            continue
        has_bid = bid[i] != undefined
        has_ask = ask[i] != undefined
        found = 0
        if not (has_bid and has_ask and bid[i] >= ask[i]):
            if has_ask and p >= ask[i]:
                found = 1
            elif has_bid and p <= bid[i]:
                found = -1
            elif has_bid and has_ask:
                twice = 2 * p - bid[i] - ask[i]
                if twice > 0:
                    found = 1
                elif twice < 0:
                    found = -1
        out[i] = found if found != 0 else tick[c]
    return out


# --- Black-Scholes ----------------------------------------------------------------------------------------------------


def black_scholes(
    spot: NDArray[np.float64],
    strike: NDArray[np.float64],
    years: NDArray[np.float64],
    volatility: NDArray[np.float64],
    is_call: NDArray[np.bool_],
    settings: OptionSettings,
) -> Greeks:
    """Price and greeks of European options, arrays (n,): spot and strike in $, years, volatility a year (0.2 is 20 %).

    NaN where an input is not a positive number.
    """
    values = _black_scholes(spot, strike, years, volatility, is_call, settings.rate, settings.dividend_yield)
    return Greeks(*values)


def implied_greeks(
    price: NDArray[np.float64],
    spot: NDArray[np.float64],
    strike: NDArray[np.float64],
    years: NDArray[np.float64],
    is_call: NDArray[np.bool_],
    settings: OptionSettings,
) -> tuple[NDArray[np.float64], NDArray[np.int8], Greeks]:
    """Volatility (n,) that gives each price ($), within the settings' bounds, its status (n,), a code of IV_STATUS, and the greeks there.

    Volatility and greeks, whose price is the one given, are NaN where the status is not 0; a price at or above the option's largest
    possible value is outside the bounds.
    """
    terms = (settings.rate, settings.dividend_yield, settings.min_volatility, settings.max_volatility)
    volatility, status, delta, gamma, vega = _implied(price, spot, strike, years, is_call, *terms)
    return volatility, status, Greeks(np.where(status == _OK, price, np.nan), delta, gamma, vega)


@njit(cache=True, inline="always")
def _cdf(x):  # type: ignore[no-untyped-def]
    return 0.5 * math.erfc(-x / _SQRT_2)


@njit(cache=True, inline="always")
def _tail(z):  # type: ignore[no-untyped-def]
    """N(-z) e^(z^2 / 2) for z >= 0: Hart (1968) 5666 as given by West (2005), a third of the time of erfc."""
    if z > 7.0:
        return 0.5 * math.erfc(z / _SQRT_2) * math.exp(0.5 * z * z) if z < 25.0 else 1.0 / (_SQRT_2PI * z)
    p = 3.52624965998911e-02 * z + 0.700383064443688
    p = ((((p * z + 6.37396220353165) * z + 33.912866078383) * z + 112.079291497871) * z + 221.213596169931) * z
    q = 8.83883476483184e-02 * z + 1.75566716318264
    q = ((((q * z + 16.064177579207) * z + 86.7807322029461) * z + 296.564248779674) * z + 637.333633378831) * z
    return (p + 220.206867912376) / ((q + 793.826512519948) * z + 440.413735824752)


@njit(cache=True, inline="always")
def _greeks_at(spot, carried, d1, s, root, sign):  # type: ignore[no-untyped-def]
    bell = math.exp(-0.5 * d1 * d1)
    tail = bell * _tail(abs(d1))
    density = bell / _SQRT_2PI
    delta = sign * carried / spot * (tail if sign * d1 < 0.0 else 1.0 - tail)
    return delta, carried * density / (spot * spot * s), carried * density * root


@njit(cache=True)
def _black_scholes(spot, strike, years, volatility, is_call, rate, dividend):  # type: ignore[no-untyped-def]
    n = len(spot)
    price = np.full(n, np.nan)
    delta = np.full(n, np.nan)
    gamma = np.full(n, np.nan)
    vega = np.full(n, np.nan)
    for i in range(n):
        if not (spot[i] > 0.0 and strike[i] > 0.0 and years[i] > 0.0 and volatility[i] > 0.0):
            continue
        root = math.sqrt(years[i])
        s = volatility[i] * root
        d1 = (math.log(spot[i] / strike[i]) + (rate - dividend) * years[i]) / s + 0.5 * s
        carried = spot[i] * math.exp(-dividend * years[i])
        discounted = strike[i] * math.exp(-rate * years[i])
        sign = 1.0 if is_call[i] else -1.0
        price[i] = sign * (carried * _cdf(sign * d1) - discounted * _cdf(sign * (d1 - s)))
        delta[i], gamma[i], vega[i] = _greeks_at(spot[i], carried, d1, s, root, sign)
    return price, delta, gamma, vega


@njit(cache=True, inline="always")
def _scaled_price(x, s, up):  # type: ignore[no-untyped-def]
    """Out-of-the-money value over discounted sqrt(forward x strike) and its slope in s; x = -|ln(F/K)|, up = e^(x/2)."""
    d1 = x / s + 0.5 * s
    # up e^(-d1^2/2) = e^(-x/2) e^(-d2^2/2): one exponential serves both normal distributions and the slope
    common = up * math.exp(-0.5 * d1 * d1)
    if d1 > 0.0:
        return up - common * (_tail(d1) + _tail(s - d1)), common / _SQRT_2PI
    return common * (_tail(-d1) - _tail(s - d1)), common / _SQRT_2PI


@njit(cache=True)
def _implied(price, spot, strike, years, is_call, rate, dividend, lowest, highest):  # type: ignore[no-untyped-def]
    # Solved for s = volatility x sqrt(years) on the logarithm of the scaled out-of-the-money value, whose slope neither
    # vanishes in the wings nor explodes at the money: Householder steps of fourth order (as in Jaeckel 2015), kept inside a
    # bracket that every step narrows.
    n = len(price)
    out = np.full(n, np.nan)
    delta = np.full(n, np.nan)
    gamma = np.full(n, np.nan)
    vega = np.full(n, np.nan)
    status = np.zeros(n, np.int8)
    for i in range(n):
        if not (spot[i] > 0.0):
            status[i] = _NO_SPOT
            continue
        if not (years[i] > 0.0):
            status[i] = _NO_TIME
            continue
        log_moneyness = math.log(spot[i] / strike[i]) + (rate - dividend) * years[i]
        x = -abs(log_moneyness)
        up = math.exp(0.5 * x)
        down = 1.0 / up
        carried = spot[i] * math.exp(-dividend * years[i])
        # the discounted root of forward x strike is carried / e^(ln(F/K) / 2)
        value = price[i] / carried * (down if log_moneyness > 0.0 else up)
        if (log_moneyness > 0.0) == is_call[i]:
            value -= down - up  # put-call parity: work on the out-of-the-money twin
        if not (value > 0.0):
            status[i] = _BELOW_INTRINSIC
            continue
        if value >= up:
            status[i] = _OUTSIDE
            continue
        root = math.sqrt(years[i])
        low = lowest * root
        high = highest * root
        s = min(max(_first_guess(x, value, up, down), low), high)
        code = _NOT_CONVERGED
        for _ in range(_MAX_STEPS):
            have, slope = _scaled_price(x, s, up)
            if have > 0.0 and slope > 0.0:
                miss = math.log(have / value)
                if miss > 0.0:
                    high = s
                else:
                    low = s
                ratio = slope / have
                inverse = 1.0 / s
                k = x * x * inverse * inverse * inverse
                second = k - 0.25 * s  # of the value, over its slope; k' is -3 k / s - 1/4
                third = second * second - 3.0 * k * inverse - 0.25
                h2 = second - ratio
                h3 = third - 3.0 * ratio * second + 2.0 * ratio * ratio
                newton = -miss / ratio
                gain = (1.0 + 0.5 * h2 * newton) / (1.0 + newton * (h2 + h3 * newton / 6.0))
                # far from the root the correction may explode: then it is a bounded Newton step
                step = newton * min(max(gain, 0.5), 2.0)
                new = s + step
                if abs(step) <= _SETTLED * s:
                    s = min(max(new, lowest * root), highest * root)
                    code = _OK if abs(new - s) <= 1e-9 * s else _OUTSIDE
                    break
            else:  # the value underflows: volatility is far higher
                low = s
                new = low
            if not (low < new < high):
                new = math.sqrt(low * high)
            if high - low <= 1e-12 * high:
                code = _OUTSIDE  # the bracket closed on one of its ends
                break
            s = new
        if code == _OK:
            out[i] = s / root
            d1 = log_moneyness / s + 0.5 * s
            sign = 1.0 if is_call[i] else -1.0
            delta[i], gamma[i], vega[i] = _greeks_at(spot[i], carried, d1, s, root, sign)
        status[i] = code
    return out, status, delta, gamma, vega


@njit(cache=True, inline="always")
def _first_guess(x, value, up, down):  # type: ignore[no-untyped-def]
    """Close to s for the small s of short expiries: the normal model's volatility, which has a rational form (Jaeckel 2017),
    with the first term of what sets the two models apart."""
    width = down - up
    if width < 1e-9:
        s = value * _SQRT_2PI
    else:
        p = -value / width
        if p < -0.001882039271:
            g = 1.0 / (p - 0.5)
            g2 = g * g
            over = 0.032114372355 - g2 * (0.016969777977 - g2 * (2.6207332461e-3 - 9.6066952861e-5 * g2))
            under = 1.0 - g2 * (0.6635646938 - g2 * (0.14528712196 - 0.010472855461 * g2))
            z = -g * (1.0 / _SQRT_2PI + over / under * g2)
        else:
            h = math.sqrt(-math.log(-p))
            over = 9.4883409779 - h * (9.6320903635 - h * (0.58556997323 + 2.1464093351 * h))
            z = -over / (1.0 - h * (0.65174820867 + h * (1.5120247828 + 6.6437847132e-5 * h)))
        s = -x / z
    return s + s * s * s / 24.0


# --- dealer flow ------------------------------------------------------------------------------------------------------


def option_flow(
    trades: OptionTrades,
    underlying_ts_ns: NDArray[np.int64],
    underlying_price_e9: NDArray[np.int64],
    calendar: TradingCalendar,
    settings: OptionSettings,
) -> OptionFlow:
    """Aggressor, spot, volatility, greeks and dealer gamma of each trade, from nothing later than the trade.

    underlying_*: trades (u,) of what the strikes are quoted in, receive order. Select the expiries before (one day's for 0DTE).
    """
    aggressor = infer_aggressor(trades)
    spot_e9 = spot_at_e9(trades.ts_ns, underlying_ts_ns, underlying_price_e9)
    spot = np.where(spot_e9 == UNDEFINED_PRICE, np.nan, spot_e9 / PRICE_SCALE)
    strike = trades.strike_e9 / PRICE_SCALE
    years = years_to_expiry(trades.ts_ns, trades.expiry, calendar)
    volatility, status, greeks = implied_greeks(
        trades.price_e9 / PRICE_SCALE, spot, strike, years, trades.is_call, settings
    )
    gamma = np.where(np.isfinite(greeks.gamma), greeks.gamma, 0.0)
    return OptionFlow(
        ts_ns=trades.ts_ns,
        strike_e9=trades.strike_e9,
        is_call=trades.is_call,
        size=trades.size,
        aggressor=aggressor,
        spot_e9=spot_e9,
        years=years,
        volatility=volatility,
        iv_status=status,
        delta=greeks.delta,
        gamma=greeks.gamma,
        vega=greeks.vega,
        # 0.0 - x: a trade without a side has no flow, not one of minus zero
        dealer_gamma=(0.0 - aggressor * trades.size * gamma * settings.multiplier).astype(np.float64),
    )


def flow_to_parquet(flow: OptionFlow) -> bytes:
    """A row a trade, columns as in OptionFlow; spot_e9 is null before the underlying's first trade."""
    frame = pl.DataFrame({f.name: getattr(flow, f.name) for f in fields(flow)})
    return parquet_bytes(frame.with_columns(pl.when(pl.col("spot_e9") != UNDEFINED_PRICE).then("spot_e9")), 1)


def flow_from_parquet(data: bytes, where: str = "option flow") -> OptionFlow:
    """Inverse of `flow_to_parquet`; raise ArtifactError when the bytes are damaged or no flow."""
    frame, _ = read_parquet(data, where, _FLOW_SCHEMA, ("spot_e9",))
    frame = frame.with_columns(pl.col("spot_e9").fill_null(UNDEFINED_PRICE))
    return OptionFlow(**{f.name: frame[f.name].to_numpy() for f in fields(OptionFlow)})


def option_coverage(
    flow: OptionFlow, open_ns: int, until_ns: int, settings: OptionSettings, from_ns: int | None = None
) -> Coverage:
    """Coverage, from open_ns on, of a feed of the time [from_ns, until_ns), from_ns being open_ns unless given.

    A silence longer than max_gap_min is a hole: the trades of that time are missing, not absent. Sums that begin at open_ns are known
    while it is unbroken from there.
    """
    from_ns = open_ns if from_ns is None else max(open_ns, from_ns)
    first, last = np.searchsorted(flow.ts_ns, [from_ns, until_ns])
    return Coverage.of(flow.ts_ns[first:last], settings.max_gap_min * MINUTE_NS, from_ns, until_ns)


def gamma_ledger(
    flow: OptionFlow, open_ns: int, until_ns: int, settings: OptionSettings, from_ns: int | None = None
) -> GammaLedger:
    """Running dealer gamma by strike of the trades received in [open_ns, until_ns) by a feed that begins at from_ns (default: open_ns).

    A strike's sums are added up in receive order, so that later trades cannot change earlier sums by a bit.
    """
    first, last = np.searchsorted(flow.ts_ns, [open_ns, until_ns])
    ts_ns, strike = flow.ts_ns[first:last], flow.strike_e9[first:last]
    order = np.argsort(strike, kind="stable")
    strikes, start = np.unique(strike[order], return_index=True)
    offset = np.append(start, len(order)).astype(np.int64)
    return GammaLedger(
        strike_e9=strikes,
        offset=offset,
        ts_ns=ts_ns[order],
        total=_running_totals(flow.dealer_gamma[first:last][order], offset),
        open_ns=open_ns,
        coverage=option_coverage(flow, open_ns, until_ns, settings, from_ns),
    )


@njit(cache=True)
def _running_totals(gamma, offset):  # type: ignore[no-untyped-def]
    out = np.empty(len(gamma))
    for k in range(len(offset) - 1):
        total = 0.0
        for i in range(offset[k], offset[k + 1]):
            total += gamma[i]
            out[i] = total
    return out


def net_gamma(
    ledger: GammaLedger, level_e9: NDArray[np.int64], t_ns: NDArray[np.int64], band_e9: int
) -> NDArray[np.float64]:
    """Dealer gamma (n,) of strikes within band_e9 of each level from trades received up to t_ns, that instant included."""
    return np.asarray(_net_gamma(ledger.strike_e9, ledger.offset, ledger.ts_ns, ledger.total, level_e9, t_ns, band_e9))


@njit(cache=True)
def _total_at(offset, ts, total, k, t):  # type: ignore[no-untyped-def]
    low = offset[k]
    high = offset[k + 1]
    while low < high:
        middle = (low + high) // 2
        if ts[middle] <= t:
            low = middle + 1
        else:
            high = middle
    return low - offset[k], total[low - 1] if low > offset[k] else 0.0


@njit(cache=True)
def _net_gamma(strikes, offset, ts, total, level, t_ns, band):  # type: ignore[no-untyped-def]
    out = np.zeros(len(level))
    for i in range(len(level)):
        k = np.searchsorted(strikes, level[i] - band)
        while k < len(strikes) and strikes[k] <= level[i] + band:
            out[i] += _total_at(offset, ts, total, k, t_ns[i])[1]
            k += 1
    return out


def gamma_flip_e9(
    ledger: GammaLedger, reference_e9: NDArray[np.int64], t_ns: NDArray[np.int64], range_e9: int
) -> NDArray[np.float64]:
    """Price (n,), 1e-9 dollars, where dealer gamma by strike first changes sign, upward from reference - range, as of t_ns.

    Linear between the two strikes around the change; only strikes within range_e9 that traded by t_ns count. NaN below three
    of them, without a change, or without coverage.
    """
    flip = _gamma_flip(
        ledger.strike_e9, ledger.offset, ledger.ts_ns, ledger.total, reference_e9, t_ns, range_e9, _MIN_FLIP_STRIKES
    )
    return np.where(ledger.covers(t_ns), flip, np.nan)


@njit(cache=True)
def _gamma_flip(strikes, offset, ts, total, reference, t_ns, reach, needed):  # type: ignore[no-untyped-def]
    out = np.full(len(reference), np.nan)
    for i in range(len(reference)):
        k = np.searchsorted(strikes, reference[i] - reach)
        traded = 0
        found = np.nan
        last_strike = 0
        last = 0.0
        while k < len(strikes) and strikes[k] <= reference[i] + reach:
            count, value = _total_at(offset, ts, total, k, t_ns[i])
            if count > 0:
                traded += 1
                if value != 0.0:
                    if last * value < 0.0 and math.isnan(found):
                        found = last_strike + (strikes[k] - last_strike) * (last / (last - value))
                    last_strike = strikes[k]
                    last = value
            k += 1
        if traded >= needed:
            out[i] = found
    return out


def open_interest_gamma(
    flow: OptionFlow,
    interest: OpenInterest,
    level_e9: NDArray[np.int64],
    t_ns: NDArray[np.int64],
    band_e9: int,
    multiplier: float,
) -> NDArray[np.float64]:
    """Share delta per dollar (n,) of the contracts open near each level: open interest x gamma x multiplier, calls plus, puts minus.

    The sign is the usual assumption that dealers are long calls and short puts. A contract's gamma is that of its last trade up to t_ns
    whose volatility could be solved; contracts without one are left out, and NaN says that there was none at all.
    """
    solved = np.isfinite(flow.gamma)
    key = flow.strike_e9[solved] * 2 + flow.is_call[solved]
    order = np.argsort(key, kind="stable")
    wanted = interest.strike_e9 * 2 + interest.is_call
    first, last = (np.searchsorted(key[order], wanted, side=side) for side in ("left", "right"))
    weight = np.where(interest.is_call, 1.0, -1.0) * interest.contracts * multiplier
    return np.asarray(
        _interest_gamma(
            flow.ts_ns[solved][order],
            flow.gamma[solved][order],
            first,
            last,
            interest.strike_e9,
            weight,
            level_e9,
            t_ns,
            band_e9,
        )
    )


@njit(cache=True)
def _interest_gamma(ts, gamma, first, last, strike, weight, level, t_ns, band):  # type: ignore[no-untyped-def]
    out = np.full(len(level), np.nan)
    for i in range(len(level)):
        for c in range(len(strike)):
            if abs(strike[c] - level[i]) > band:
                continue
            k = first[c] + np.searchsorted(ts[first[c] : last[c]], t_ns[i], side="right") - 1
            if k >= first[c]:
                out[i] = (0.0 if np.isnan(out[i]) else out[i]) + weight[c] * gamma[k]
    return out


@dataclass(frozen=True)
class DealerFeatures:
    """Features of touches, arrays (n,): the columns of the groups fuel and dealer_velocity in features.json by their names.

    fuel_effect holds None and numbers NaN without coverage, gamma_bucket then says UNKNOWN; a flow whose windows begin before
    the open or the feed does, or meet a hole, is NaN too, rather than a sum over a shorter time. What sums since the open is NaN from a
    hole on, and always where the feed begins later.
    """

    gamma_exposure: NDArray[np.float64]
    fuel_effect: NDArray[np.object_]
    gamma_bucket: NDArray[np.object_]
    gamma_flow_velocity: NDArray[np.float64]
    gamma_flow_impulse: NDArray[np.float64]
    gamma_flow_accel_1m: NDArray[np.float64]
    gamma_flow_accel_3m: NDArray[np.float64]
    dealer_pressure: NDArray[np.float64]
    dealer_pressure_accel: NDArray[np.float64]


def dealer_features(
    ledger: GammaLedger,
    t0_ns: NDArray[np.int64],
    level_e9: NDArray[np.int64],
    settings: OptionSettings,
    dollar_e9: int = PRICE_SCALE,
) -> DealerFeatures:
    """Dealer gamma near each level (n,) from trades received up to t0_ns (n,), and its flow over windows (t0 - w, t0].

    dollar_e9: one SPY dollar in the unit of strikes and levels, both 1e-9. See DealerFeatures for what is missing when.
    """
    band = round(settings.strike_range_usd * dollar_e9)
    held: dict[int, NDArray[np.float64]] = {}

    def flow(from_min: int, to_min: int) -> NDArray[np.float64]:
        for minutes in (from_min, to_min):
            if minutes not in held:
                held[minutes] = net_gamma(ledger, level_e9, t0_ns - minutes * MINUTE_NS, band)
        after_ns = t0_ns - from_min * MINUTE_NS
        whole = (after_ns >= ledger.open_ns) & ledger.tells(after_ns, t0_ns)
        return np.where(whole, held[to_min] - held[from_min], np.nan)

    def acceleration(minutes: int) -> NDArray[np.float64]:
        return (flow(minutes, 0) - flow(2 * minutes, minutes)) / minutes

    exposure = np.where(ledger.covers(t0_ns), net_gamma(ledger, level_e9, t0_ns, band), np.nan)
    velocity = flow(settings.flow_min, 0) / settings.flow_min
    baseline = flow(settings.flow_baseline_min, 0) / settings.flow_baseline_min
    flat = np.abs(baseline) <= _FLAT_BASELINE
    with np.errstate(invalid="ignore", divide="ignore"):
        impulse = np.where(flat, 0.0, (velocity - baseline) / np.abs(baseline))
    short = acceleration(settings.flow_accel_short_min)
    return DealerFeatures(
        gamma_exposure=exposure,
        fuel_effect=_fuel_effect(exposure, settings.fuel_threshold),
        gamma_bucket=np.where(
            np.isnan(exposure), "UNKNOWN", np.where(exposure < 0, "SHORT_GAMMA", "LONG_GAMMA")
        ).astype(object),
        gamma_flow_velocity=velocity,
        gamma_flow_impulse=impulse,
        gamma_flow_accel_1m=short,
        gamma_flow_accel_3m=acceleration(settings.flow_accel_long_min),
        dealer_pressure=np.tanh(-velocity / settings.flow_norm),
        dealer_pressure_accel=np.tanh(-short / settings.flow_accel_norm),
    )


def _fuel_effect(exposure: NDArray[np.float64], threshold: float) -> NDArray[np.object_]:
    """AMPLIFY: dealers are short gamma and chase; DAMPEN: they are long and lean against moves; None where unknown."""
    out = np.where(exposure < -threshold, "AMPLIFY", np.where(exposure > threshold, "DAMPEN", "NEUTRAL")).astype(object)
    out[np.isnan(exposure)] = None
    return out


# --- levels -----------------------------------------------------------------------------------------------------------


def wall_levels(
    flow: OptionFlow,
    session: Session,
    settings: OptionSettings,
    until_ns: int | None = None,
    from_ns: int | None = None,
) -> dict[str, LevelSeries]:
    """CALL_WALL and PUT_WALL, one price a closed minute of regular hours; [from_ns, until_ns) is the feed's time (default: all).

    A wall is, per right, the strike with the most negative dealer gamma flow over the last wall_min closed minutes (fewer at
    the open): where customers bought most gamma and dealers are short. None (NaN) where no strike is negative or the feed was not there
    in all of those minutes; the lower strike on a tie. Known when the minute closes, from trades received before that.
    """
    edges = _closed_minutes(session, until_ns)
    open_ns = session.regular_open_ns
    coverage = option_coverage(
        flow, open_ns, session.regular_close_ns if until_ns is None else until_ns, settings, from_ns
    )
    unbroken = coverage.unbroken(np.maximum(edges - settings.wall_min * MINUTE_NS, open_ns), edges)
    out = {}
    for name, right in (("CALL_WALL", flow.is_call), ("PUT_WALL", ~flow.is_call)):
        strikes, table = _by_minute_and_strike(flow, right, flow.dealer_gamma, session.regular_open_ns, len(edges))
        rolled = np.zeros_like(table)
        for back in range(
            min(settings.wall_min, len(edges))
        ):  # summed afresh: a running difference would leave residues
            rolled[back:] += table[: len(edges) - back]
        price = np.full(len(edges), np.nan)
        if len(strikes):
            best = rolled.argmin(axis=1)
            negative = (rolled[np.arange(len(edges)), best] < 0) & unbroken
            price[negative] = strikes[best[negative]]
        out[name] = LevelSeries(edges, price)
    return out


def strike_levels(
    flow: OptionFlow, session: Session, settings: OptionSettings, until_ns: int | None = None
) -> LevelSeries:
    """STRIKE: each strike (k,) whose volume since the regular open, puts and calls together, passed strike_min_volume contracts.

    Known at the close of the minute in which it did; several may become known at once, the lower strike first. It is the volume that was
    seen: whether that is all of it is `option_coverage`'s to say.
    """
    edges = _closed_minutes(session, until_ns)
    everything = np.ones(len(flow.ts_ns), bool)
    size = flow.size.astype(np.float64)
    strikes, table = _by_minute_and_strike(flow, everything, size, session.regular_open_ns, len(edges))
    if not len(edges) or not len(strikes):
        return LevelSeries(np.empty(0, np.int64), np.empty(0))
    passed = table.cumsum(axis=0) > settings.strike_min_volume
    hit = passed.any(axis=0)
    known = edges[passed.argmax(axis=0)[hit]]
    order = np.argsort(known, kind="stable")
    return LevelSeries(known[order], strikes[hit][order].astype(np.float64))


def _closed_minutes(session: Session, until_ns: int | None) -> NDArray[np.int64]:
    """Ends of the regular-hours minutes that had closed by until_ns."""
    ends = np.arange(session.regular_open_ns + MINUTE_NS, session.regular_close_ns + 1, MINUTE_NS, dtype=np.int64)
    return ends if until_ns is None else ends[ends <= until_ns]


def _by_minute_and_strike(
    flow: OptionFlow, rows: NDArray[np.bool_], values: NDArray[np.float64], open_ns: int, minutes: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Strikes (m,) ascending and sums (minutes, m) of `values` over the selected rows."""
    rows = rows & (flow.ts_ns >= open_ns) & (flow.ts_ns < open_ns + minutes * MINUTE_NS)
    strikes, column = np.unique(flow.strike_e9[rows], return_inverse=True)
    cell = (flow.ts_ns[rows] - open_ns) // MINUTE_NS * len(strikes) + column
    table = np.bincount(cell, weights=values[rows], minlength=minutes * len(strikes)).astype(np.float64)
    return strikes, table.reshape(minutes, len(strikes))


# --- pressures --------------------------------------------------------------------------------------------------------


def gamma_pressure(gamma_exposure: NDArray[np.float64], settings: OptionSettings) -> NDArray[np.float64]:
    """tanh(-gamma_exposure / exposure_norm), (n,) in [-1, 1]: positive where dealers are short gamma and chase a break."""
    return np.tanh(-gamma_exposure / settings.exposure_norm)


def gamma_pressure_accel(gamma_flow_accel_3m: NDArray[np.float64], settings: OptionSettings) -> NDArray[np.float64]:
    """tanh(-gamma_flow_accel_3m / flow_accel_norm), (n,) in [-1, 1]."""
    return np.tanh(-gamma_flow_accel_3m / settings.flow_accel_norm)


def liquidity_pressure(
    delta_liq: NDArray[np.float64], wall_ratio: NDArray[np.float64], settings: OptionSettings
) -> NDArray[np.float64]:
    """Mean (n,) of tanh(-delta_liq / norm), contracts, and 1 - wall_ratio / norm, each and together within [-1, 1]."""
    drain = np.tanh(-delta_liq / settings.delta_liquidity_norm)
    thin = np.clip(1.0 - wall_ratio / settings.wall_ratio_norm, -1.0, 1.0)
    return np.clip((drain + thin) / 2.0, -1.0, 1.0)


def net_break_pressure(
    liquidity: NDArray[np.float64],
    tape: NDArray[np.float64],
    gamma: NDArray[np.float64],
    reversion: NDArray[np.float64],
    confluence: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Mean (n,) of the five pressures within [-1, 1]; NaN where one is missing, since a mean of fewer is another quantity."""
    return np.clip((liquidity + tape + gamma + reversion + confluence) / 5.0, -1.0, 1.0)
