"""Where the level stands: distances, moving averages, confluence with other levels, approach."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
from numba import njit
from numpy.typing import NDArray

from spymaster_assets.settings import MINUTE_NS, SignalSettings
from spymaster_assets.signals.context import SMA_LENGTHS, TwoMinuteHistory, slope, take

EPSILON = 1e-6
CONFLUENCE_WEIGHTS: dict[str, float] = {
    "PM_HIGH": 1.0,
    "PM_LOW": 1.0,
    "OR_HIGH": 0.9,
    "OR_LOW": 0.9,
    "SESSION_HIGH": 0.6,
    "SESSION_LOW": 0.6,
    "SMA_200": 0.8,
    "SMA_400": 0.8,
    "VWAP": 0.7,
}
"""Key levels of the bars and how much each counts; their sum scales confluence_pressure."""
WALL_WEIGHTS: dict[str, float] = {"CALL_WALL": 1.0, "PUT_WALL": 1.0}
"""Key levels of the options: a column of their own, since they exist only with that feed."""


def moving_averages(
    level: NDArray[np.float64],
    start_ns: NDArray[np.int64],
    volatility: NDArray[np.float64],
    history: TwoMinuteHistory,
    settings: SignalSettings,
    spy_dollar_e9: int,
) -> dict[str, NDArray[np.float64]]:
    """SMA columns of the contract at t0 (SPY dollars, $ per minute); NaN until the averages exist."""
    at = history.index_at(start_ns)
    before = history.index_at(start_ns - settings.sma_velocity_min * MINUTE_NS)
    out: dict[str, NDArray[np.float64]] = {}
    for length in SMA_LENGTHS:
        average = history.sma(length) / spy_dollar_e9
        now = take(average, at)
        out[f"sma_{length}"] = now
        out[f"dist_to_sma_{length}"] = level - now
        out[f"sma_{length}_slope"] = slope(average, at, settings.sma_slope_bars)
        out[f"sma_{length}_slope_5bar"] = slope(average, at, settings.sma_slope_short_bars)
        out[f"mean_reversion_pressure_{length}"] = (level - now) / (volatility + EPSILON)
        out[f"mean_reversion_velocity_{length}"] = -(now - take(average, before)) / settings.sma_velocity_min
    out["sma_spread"] = out["sma_200"] - out["sma_400"]
    return out


def confluence(
    level: NDArray[np.float64],
    own_kind: NDArray[np.str_],
    others: NDArray[np.float64],
    weights: Mapping[str, float],
    band_usd: float,
) -> dict[str, NDArray[np.float64]]:
    """Other key levels near the level: `others` is (n, len(weights)) SPY dollars, NaN where absent; own kind is left out."""
    distance = np.abs(others - level[:, None])
    distance[own_kind[:, None] == np.array(list(weights))[None, :]] = np.nan
    near = distance <= band_usd
    score = np.where(near, np.array(list(weights.values())) * (1.0 - distance / band_usd), 0.0).sum(axis=1)
    some = np.isfinite(distance).any(axis=1)
    nearest = np.where(np.isfinite(distance), distance, np.inf).min(axis=1)
    return {
        "confluence_count": near.sum(axis=1).astype(np.float64),
        "confluence_weighted_score": score,
        "confluence_min_distance": np.where(some, nearest, np.nan),
        "confluence_pressure": score / sum(weights.values()),
    }


def confluence_alignment(
    sign: NDArray[np.int8],
    dist_200: NDArray[np.float64],
    dist_400: NDArray[np.float64],
    slope_200: NDArray[np.float64],
    slope_400: NDArray[np.float64],
) -> NDArray[np.float64]:
    """+1 where the averages favour a break, -1 where they oppose it, 0 else; NaN without both SMAs and slopes.

    UP: +1 below both SMAs, both slopes < 0 and slope_200 > slope_400; -1 above both, both slopes > 0 and slope_200 < slope_400.
    DOWN: +1 above both, both slopes > 0 and slope_200 > slope_400; -1 below both, both slopes < 0 and slope_200 < slope_400.
    """
    s = sign.astype(np.float64)
    against = (s * dist_200 < 0) & (s * dist_400 < 0) & (s * slope_200 < 0) & (s * slope_400 < 0)
    along = (s * dist_200 > 0) & (s * dist_400 > 0) & (s * slope_200 > 0) & (s * slope_400 > 0)
    value = np.where(against & (slope_200 > slope_400), 1.0, np.where(along & (slope_200 < slope_400), -1.0, 0.0))
    missing = ~np.isfinite(dist_200 + dist_400 + slope_200 + slope_400)
    return np.where(missing, np.nan, value)


def approach(
    context: pl.DataFrame, bar: NDArray[np.int64], sign: NDArray[np.int8], lookback_min: int
) -> dict[str, NDArray[np.float64]]:
    """Speed and distance of the last `lookback_min` minutes of closes, touch bar included; + is toward the level."""
    start = context["start_ns"].to_numpy()
    close = context["close"].to_numpy()
    first = np.searchsorted(start, start[bar] - lookback_min * MINUTE_NS, side="right")
    change = close[bar] - close[first]
    minutes = (start[bar] - start[first]) / MINUTE_NS
    with np.errstate(invalid="ignore", divide="ignore"):
        velocity = np.where(minutes > 0, sign * change / minutes, np.nan)
    rising, falling = _runs(close)
    return {
        "approach_velocity": velocity,
        "approach_bars": np.where(sign > 0, rising[bar], falling[bar]).astype(np.float64),
        "approach_distance": np.abs(change),
    }


@njit(cache=True)
def _runs(close):  # type: ignore[no-untyped-def]
    """Lengths of the runs of rising and of falling closes that end at each bar."""
    n = len(close)
    rising = np.zeros(n, np.int32)
    falling = np.zeros(n, np.int32)
    for i in range(1, n):
        if close[i] > close[i - 1]:
            rising[i] = rising[i - 1] + 1
        elif close[i] < close[i - 1]:
            falling[i] = falling[i - 1] + 1
    return rising, falling
