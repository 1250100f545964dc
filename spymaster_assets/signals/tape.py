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

    NaN in imbalance, volumes and sweep where trades near the level have no known side; NaN velocity below two trades.
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
    return TapeFeatures(imbalance, buys, sells, velocity, (last - first).astype(np.int64), sweep)


@njit(cache=True)
def _tape_windows(ts, price, size, side, first, last, t0, level, band, dollar_e9, max_gap, min_trades, min_notional):  # type: ignore[no-untyped-def]
    n = len(t0)
    imbalance = np.full(n, np.nan)
    buys = np.full(n, np.nan)
    sells = np.full(n, np.nan)
    velocity = np.full(n, np.nan)
    sweep = np.full(n, np.nan)
    for i in range(n):
        a, b = first[i], last[i]
        buy = 0.0
        sell = 0.0
        near = 0
        unknown = 0
        swept = False
        run_side = 0
        run_count = 0
        run_notional = 0.0
        run_ts = 0
        sum_t = 0.0
        sum_p = 0.0
        for k in range(a, b):
            sum_t += (ts[k] - t0[i]) * 1e-9
            sum_p += (price[k] - level[i]) / dollar_e9
            if abs(price[k] - level[i]) > band:
                continue
            near += 1
            if side[k] > 0:
                buy += size[k]
            elif side[k] < 0:
                sell += size[k]
            else:
                unknown += 1
            if side[k] != 0 and side[k] == run_side and ts[k] - run_ts <= max_gap:
                run_count += 1
                run_notional += float(price[k]) * size[k]
            else:
                run_side = side[k]
                run_count = 1
                run_notional = float(price[k]) * size[k]
            run_ts = ts[k]
            if run_side != 0 and run_count >= min_trades and run_notional >= min_notional:
                swept = True
        m = b - a
        if m >= 2:
            mean_t = sum_t / m
            mean_p = sum_p / m
            covariance = 0.0
            variance = 0.0
            for k in range(a, b):
                dt = (ts[k] - t0[i]) * 1e-9 - mean_t
                covariance += dt * ((price[k] - level[i]) / dollar_e9 - mean_p)
                variance += dt * dt
            if variance > 0.0:
                velocity[i] = covariance / variance
        if near == 0 or unknown < near:
            buys[i] = buy
            sells[i] = sell
            imbalance[i] = (buy - sell) / (buy + sell) if buy + sell > 0.0 else 0.0
            sweep[i] = 1.0 if swept else 0.0
    return imbalance, buys, sells, velocity, sweep
