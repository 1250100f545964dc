"""The tape at a touch: signed volume near the level, price velocity and sweeps in [t0, t0 + window)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from spymaster_assets.market.instruments import PRICE_SCALE, Instrument
from spymaster_assets.market.tape import SessionTape
from spymaster_assets.settings import NS, SignalSettings


@dataclass(frozen=True)
class TapeFeatures:
    """Arrays (n,): imbalance [-1, 1], buy and sell volume, velocity $/s, trade count, sweep 0/1.

    NaN in imbalance, volumes and sweep where no side was known yet or none of the trades near the level has one; NaN velocity below two
    trades.
    """

    imbalance: NDArray[np.float64]
    buy_volume: NDArray[np.float64]
    sell_volume: NDArray[np.float64]
    velocity: NDArray[np.float64]
    trade_count: NDArray[np.int64]
    sweep: NDArray[np.float64]


def tape_features(
    tape: SessionTape,
    start_ns: NDArray[np.int64],
    price_e9: NDArray[np.int64],
    instrument: Instrument,
    settings: SignalSettings,
) -> TapeFeatures:
    """Tape features of touches at (start_ns, price_e9); see TapeFeatures for shapes and units."""
    first = np.searchsorted(tape.ts_ns, start_ns, side="left")
    last = np.searchsorted(tape.ts_ns, start_ns + settings.tape_window_s * NS, side="left")
    values = _tape_windows(
        tape.ts_ns,
        tape.price_e9,
        tape.size,
        tape.side,
        first,
        last,
        start_ns,
        price_e9,
        round(settings.tape_band_usd * instrument.spy_dollar_e9),
        float(instrument.spy_dollar_e9),
        settings.sweep_max_gap_ms * 1_000_000,
        settings.sweep_min_trades,
        instrument.sweep_min_notional_usd / instrument.point_value_usd * PRICE_SCALE,
    )
    imbalance, buys, sells, velocity, sweep = values
    unknown = ~side_known(tape, start_ns + settings.tape_window_s * NS)
    for of_sides in (imbalance, buys, sells, sweep):
        of_sides[unknown] = np.nan
    return TapeFeatures(imbalance, buys, sells, velocity, (last - first).astype(np.int64), sweep)


def side_known(tape: SessionTape, until_ns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether a trade whose aggressor is known came before each time (n,): a feed without sides never has one."""
    sided = tape.side != 0
    first = int(sided.argmax()) if len(sided) else 0
    return until_ns > tape.ts_ns[first] if sided.any() else np.zeros(len(until_ns), bool)


@njit(cache=True)
def _tape_windows(ts, price, size, side, first, last, t0, level, band, dollar_e9, max_gap, min_trades, min_notional):  # type: ignore[no-untyped-def]
    n = len(t0)
    imbalance = np.full(n, np.nan)
    buys = np.full(n, np.nan)
    sells = np.full(n, np.nan)
    velocity = np.full(n, np.nan)
    sweep = np.full(n, np.nan)
    window = price[:0].copy()
    bought = sold = sideless = np.zeros(0, np.int64)
    notional = np.zeros(0)
    for i in range(n):
        a, b = first[i], last[i]
        if i > 0 and first[i - 1] == a and last[i - 1] == b and t0[i - 1] == t0[i]:
            velocity[i] = velocity[i - 1]  # touches of one minute share their window
        else:
            velocity[i] = _slope(ts, price, a, b, t0[i], dollar_e9)
            window = price[a:b].copy()
            bought = np.where(side[a:b] > 0, size[a:b], 0)
            sold = np.where(side[a:b] < 0, size[a:b], 0)
            notional = window * size[a:b].astype(np.float64)
            sideless = np.where(side[a:b] == 0, 1, 0)
        buy = np.int64(0)
        sell = np.int64(0)
        near = 0
        unknown = 0
        bottom = level[i] - band
        top = level[i] + band
        for k in range(len(window)):  # without branches, so that it is vectorized
            inside = (window[k] >= bottom) & (window[k] <= top)
            near += 1 if inside else 0
            buy += bought[k] if inside else 0
            sell += sold[k] if inside else 0
            unknown += sideless[k] if inside else 0
        if near == 0 or unknown < near:
            buys[i] = buy
            sells[i] = sell
            imbalance[i] = (buy - sell) / (buy + sell) if buy + sell > 0 else 0.0
            swept = _swept(ts[a:b], window, notional, side[a:b], bottom, top, max_gap, min_trades, min_notional)
            sweep[i] = 1.0 if swept else 0.0
    return imbalance, buys, sells, velocity, sweep


@njit(cache=True)
def _swept(ts, price, notional, side, bottom, top, max_gap, min_trades, min_notional):  # type: ignore[no-untyped-def]
    """Whether trades within [bottom, top] hold a run of one side, gaps up to max_gap, of enough trades and notional."""
    run_side = np.int8(0)
    run_count = 0
    run_notional = 0.0
    run_ts = np.int64(0)
    for k in range(len(ts)):
        if price[k] < bottom or price[k] > top:
            continue
        # selections instead of branches: sides are unpredictable and a mispredicted branch costs more
        goes_on = (side[k] == run_side) & (ts[k] - run_ts <= max_gap)
        run_count = (run_count if goes_on else 0) + 1
        run_notional = (run_notional if goes_on else 0.0) + notional[k]
        run_side = side[k]
        run_ts = ts[k]
        if (run_notional >= min_notional) & (run_count >= min_trades) & (run_side != 0):
            return True
    return False


@njit(cache=True)
def _slope(ts, price, a, b, t0, dollar_e9):  # type: ignore[no-untyped-def]
    """Least-squares slope of price on time of trades [a, b), $/s; NaN below two trades or when all share one time."""
    m = b - a
    if m < 2:
        return np.nan
    origin = price[a]
    sum_t = 0.0
    sum_p = 0.0
    for k in range(a, b):
        sum_t += (ts[k] - t0) * 1e-9
        sum_p += (price[k] - origin) / dollar_e9
    mean_t = sum_t / m
    mean_p = sum_p / m
    covariance = 0.0
    variance = 0.0
    for k in range(a, b):
        dt = (ts[k] - t0) * 1e-9 - mean_t
        covariance += dt * ((price[k] - origin) / dollar_e9 - mean_p)
        variance += dt * dt
    return covariance / variance if variance > 0.0 else np.nan
