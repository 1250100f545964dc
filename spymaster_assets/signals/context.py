"""What is known when each one-minute bar closes: returns, range, volatility, ATR and moving averages across sessions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from spymaster_assets.market.calendar import Session
from spymaster_assets.settings import MINUTE_NS, SignalSettings

SMA_LENGTHS = (200, 400)
"""Two-minute closes in each moving average."""
CONTEXT_COLUMNS = (
    "start_ns",
    "end_ns",
    "open_e9",
    "high_e9",
    "low_e9",
    "close_e9",
    "close",
    "return_usd",
    "range_usd",
    "volume",
    "vwap",
    "volatility",
    "atr",
    "sma_200",
    "sma_400",
    "sma_200_slope_5bar",
    "sma_400_slope_5bar",
)


@dataclass(frozen=True)
class Roll:
    """A contract change between two sessions: earlier prices are shifted by `gap_e9` (new minus old, at `at_ns`).

    gap_e9 is None when the two contracts share no minute, so that nothing before the roll may be used.
    """

    session: str
    from_id: int
    to_id: int
    gap_e9: int | None
    at_ns: int | None

    def to_json(self) -> dict[str, Any]:
        """JSON-able form for reports and metadata."""
        return {
            "session": self.session,
            "from_instrument_id": self.from_id,
            "to_instrument_id": self.to_id,
            "adjustment": "difference at the last common regular-hours minute of the session before",
            "gap_points": None if self.gap_e9 is None else self.gap_e9 / 1e9,
            "at_ns": self.at_ns,
        }


@dataclass(frozen=True)
class SessionBars:
    """The bars of one session, all outrights, with its hours."""

    session: Session
    bars: pl.DataFrame

    def front(self, timeframe_min: int) -> pl.DataFrame:
        """Bars of the contract in front for one timeframe, sorted by start."""
        return self.bars.filter(pl.col("is_front") & (pl.col("timeframe_min") == timeframe_min)).sort("start_ns")

    @property
    def front_id(self) -> int | None:
        """Instrument id of the contract in front; None when it has no bar."""
        ids = self.bars.filter("is_front")["instrument_id"]
        return int(ids[0]) if len(ids) else None


@dataclass(frozen=True)
class TwoMinuteHistory:
    """Roll-adjusted two-minute closes of the warm-up sessions and the session itself: end_ns and close_e9, int64 (n,)."""

    end_ns: NDArray[np.int64]
    close_e9: NDArray[np.float64]
    rolls: tuple[Roll, ...]

    def sma(self, length: int) -> NDArray[np.float64]:
        """Mean of the last `length` closes at each bar, 1e-9 points; NaN until they exist. Windows are summed in full."""
        out = np.full(len(self.close_e9), np.nan)
        if len(self.close_e9) >= length:
            windows = np.lib.stride_tricks.sliding_window_view(self.close_e9, length)
            out[length - 1 :] = windows.sum(axis=1) / length
        return out

    def index_at(self, times_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index of the last bar closed at each time, -1 when there is none."""
        return last_at(self.end_ns, times_ns)


def find_rolls(history: Sequence[SessionBars], current: SessionBars) -> tuple[Roll, ...]:
    """Contract changes between consecutive sessions of `history` followed by `current`, oldest first."""
    chain = [*history, current]
    rolls = []
    for before, after in itertools.pairwise(chain):
        old, new = before.front_id, after.front_id
        if old is None or new is None or old == new:
            continue
        minute = before.bars.filter(
            (pl.col("timeframe_min") == 1) & (pl.col("end_ns") <= before.session.regular_close_ns)
        ).select("instrument_id", "start_ns", "close_e9")
        common = minute.filter(pl.col("instrument_id") == old).join(
            minute.filter(pl.col("instrument_id") == new), on="start_ns", suffix="_new"
        )
        if common.height == 0:
            rolls.append(Roll(after.session.key, old, new, None, None))
        else:
            last = common.sort("start_ns").row(-1, named=True)
            rolls.append(
                Roll(after.session.key, old, new, last["close_e9_new"] - last["close_e9"], last["start_ns"] + MINUTE_NS)
            )
    return tuple(rolls)


def two_minute_history(
    history: Sequence[SessionBars], current: SessionBars, observed_until_ns: int
) -> TwoMinuteHistory:
    """Two-minute closes of warm-up sessions and the session, shifted by the roll gaps so that no average spans a raw splice."""
    rolls = find_rolls(history, current)
    by_session = {r.session: r for r in rolls}
    ends: list[NDArray[np.int64]] = []
    closes: list[NDArray[np.float64]] = []
    shift = 0
    for part in [current, *reversed(history)]:
        frame = part.front(2)
        if part is current:
            frame = frame.filter(pl.col("end_ns") <= observed_until_ns)
        ends.append(frame["end_ns"].to_numpy())
        closes.append((frame["close_e9"] + shift).to_numpy().astype(np.float64))
        roll = by_session.get(part.session.key)
        if roll is not None:
            if roll.gap_e9 is None:
                break
            shift += roll.gap_e9
    return TwoMinuteHistory(np.concatenate(ends[::-1]).astype(np.int64), np.concatenate(closes[::-1]), rolls)


def rolling_windows(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """(n, length) view of trailing windows, NaN before the first value; recomputed in full so that a replay is bit-equal."""
    padded = np.concatenate([np.full(length - 1, np.nan), values])
    return np.lib.stride_tricks.sliding_window_view(padded, length)


def average_true_range(
    high: NDArray[np.float64], low: NDArray[np.float64], close: NDArray[np.float64], length: int
) -> NDArray[np.float64]:
    """Mean true range of the last `length` bars, shorter at the start; the first bar has no previous close."""
    previous = np.concatenate([close[:1], close[:-1]])
    true_range = np.maximum(high, previous) - np.minimum(low, previous)
    windows = rolling_windows(true_range, length)
    count = np.minimum(np.arange(1, len(close) + 1), length)
    return np.where(np.isnan(windows), 0.0, windows).sum(axis=1) / count


def rolling_std(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Standard deviation (ddof 1) of the last `length` values; NaN until they exist."""
    windows = rolling_windows(values, length)
    mean = windows.mean(axis=1, keepdims=True)
    return np.sqrt(((windows - mean) ** 2).sum(axis=1) / (length - 1))


def minute_context(
    current: SessionBars,
    history: TwoMinuteHistory,
    settings: SignalSettings,
    spy_dollar_e9: int,
    observed_until_ns: int,
) -> pl.DataFrame:
    """One row per closed one-minute bar of the session (columns CONTEXT_COLUMNS), values as known at its end_ns.

    Prices end in _e9 (1e-9 points) or are SPY dollars; volatility is $ per sqrt(minute), slopes $ per minute.
    """
    frame = current.front(1).filter(pl.col("end_ns") <= observed_until_ns)
    price = {
        k: frame[f"{k}_e9"].to_numpy().astype(np.float64) / spy_dollar_e9 for k in ("open", "high", "low", "close")
    }
    close = price["close"]
    change = np.diff(close, prepend=np.nan)
    at = history.index_at(frame["end_ns"].to_numpy())
    columns: dict[str, Any] = {
        **{name: frame[name] for name in ("start_ns", "end_ns", "open_e9", "high_e9", "low_e9", "close_e9")},
        "close": close,
        "return_usd": change,
        "range_usd": price["high"] - price["low"],
        "volume": frame["volume"],
        "vwap": frame["vwap"].to_numpy() * (1e9 / spy_dollar_e9),
        "volatility": rolling_std(change, settings.vol_bars),
        "atr": average_true_range(price["high"], price["low"], close, settings.atr_bars),
    }
    for length in SMA_LENGTHS:
        average = history.sma(length) / spy_dollar_e9
        columns[f"sma_{length}"] = take(average, at)
        columns[f"sma_{length}_slope_5bar"] = slope(average, at, settings.sma_slope_short_bars)
    return pl.DataFrame(columns).select(CONTEXT_COLUMNS)


def last_at(known_ns: NDArray[np.int64], times_ns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index (n,) of the last of ascending known_ns that is not after each time, -1 when there is none."""
    return np.searchsorted(known_ns, times_ns, side="right").astype(np.int64) - 1


def take(values: NDArray[np.float64], index: NDArray[np.int64]) -> NDArray[np.float64]:
    """values[index] with NaN where the index is negative."""
    if not len(values):
        return np.full(len(index), np.nan)
    return np.where(index >= 0, values[np.maximum(index, 0)], np.nan)


def slope(average: NDArray[np.float64], index: NDArray[np.int64], bars: int) -> NDArray[np.float64]:
    """Change of a two-minute average over `bars` bars, per minute."""
    return (take(average, index) - take(average, index - bars)) / (2.0 * bars)


def regular_hours_sigma(history: Sequence[SessionBars], spy_dollar_e9: int) -> float | None:
    """Standard deviation of one-minute close differences in the regular hours of the warm-up sessions, $ per sqrt(minute)."""
    parts = []
    for past in history:
        frame = past.front(1).filter(
            (pl.col("start_ns") >= past.session.regular_open_ns) & (pl.col("end_ns") <= past.session.regular_close_ns)
        )
        parts.append(np.diff(frame["close_e9"].to_numpy().astype(np.float64)) / spy_dollar_e9)
    changes = np.concatenate(parts) if parts else np.empty(0)
    return float(changes.std(ddof=1)) if len(changes) > 1 else None
