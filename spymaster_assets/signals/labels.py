"""Outcome labels: what price does in the look-forward after confirmation, measured from the level.

From trades where there are trades, from one-minute bars otherwise. A window that is not wholly inside regular hours and
observed input, or that a gap of the tape reaches into, stays undefined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numba import njit
from numpy.typing import NDArray

from spymaster_assets.market.tape import SessionTape
from spymaster_assets.settings import DELAYS_S, MINUTE_NS, NS, REACH_HORIZONS_S, LabelSettings
from spymaster_assets.signals.coverage import Coverage

OUTCOMES = ("CHOP", "BREAK", "BOUNCE", "UNDEFINED")
UNDEFINED_WHY = ("after the end of regular hours or input", "missing minutes", "no price", "no threshold")
"""Why a window is incomplete, the first that holds; codes from 1 in `Excursions.why`."""
_BLOCK = 128


@dataclass(frozen=True)
class Path:
    """A price path to measure labels on: one point a trade, or one a bar with its range.

    time_ns is when a point is known (trade time, bar end), from_ns when it begins (trade time, bar start); high, low and close in
    1e-9 points, int64 (n,). A trade has all three equal.
    """

    source: str
    from_ns: NDArray[np.int64]
    time_ns: NDArray[np.int64]
    high_e9: NDArray[np.int64]
    low_e9: NDArray[np.int64]
    close_e9: NDArray[np.int64]

    @cached_property
    def block_extremes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Highest high and lowest low of each block of points."""
        return _block_extremes(self.high_e9, self.low_e9, _BLOCK)

    def observed(self, t1_ns: NDArray[np.int64], end_ns: NDArray[np.int64], max_missing_min: int) -> NDArray[np.bool_]:
        """Whether no more than max_missing_min minutes in a row are without a point, of those from the minute before t1 (n,), whose price
        is the anchor, to end (n,); minutes outside have no say."""
        minutes_ns = self.from_ns // MINUTE_NS * MINUTE_NS
        spoken = minutes_ns[np.flatnonzero(np.diff(minutes_ns, prepend=-1))]
        # as if the minute before the first had a point: n missing ones lie between two that are n + 1 apart
        before_ns = (t1_ns - 1) // MINUTE_NS * MINUTE_NS - MINUTE_NS
        return Coverage.of(spoken, (max_missing_min + 1) * MINUTE_NS).heard(before_ns, end_ns)

    @classmethod
    def of_trades(cls, tape: SessionTape) -> Path:
        """Path of trade prints."""
        p = tape.price_e9
        return cls("trades", tape.ts_ns, tape.ts_ns, p, p, p)

    @classmethod
    def of_bars(cls, context: pl.DataFrame) -> Path:
        """Path of closed one-minute bars."""
        c = {n: context[n].to_numpy() for n in ("start_ns", "end_ns", "high_e9", "low_e9", "close_e9")}
        return cls("bars", c["start_ns"], c["end_ns"], c["high_e9"], c["low_e9"], c["close_e9"])


@dataclass(frozen=True)
class Excursions:
    """Raw result a delay, arrays (n,): why a window is incomplete (0 where it is complete, else from 1 into UNDEFINED_WHY), anchor and
    last price (SPY dollars, NaN where unknown), farthest moves beyond the level up and down (SPY dollars), seconds from t1 to the
    crossings of threshold 1 and 2 up and down (NaN if never)."""

    why: NDArray[np.int8]
    anchor: NDArray[np.float64]
    last: NDArray[np.float64]
    up: NDArray[np.float64]
    down: NDArray[np.float64]
    crossed_up: NDArray[np.float64]
    crossed_down: NDArray[np.float64]

    @property
    def complete(self) -> NDArray[np.bool_]:
        """Which windows are complete."""
        return self.why == 0

    def undefined(self) -> dict[str, int]:
        """How many windows are incomplete, by the reasons that occur."""
        counts = np.bincount(self.why, minlength=len(UNDEFINED_WHY) + 1)[1:]
        return {reason: int(n) for reason, n in zip(UNDEFINED_WHY, counts, strict=True) if n}


def measure(
    path: Path,
    t1_ns: NDArray[np.int64],
    level_e9: NDArray[np.int64],
    thresholds_e9: NDArray[np.int64],
    look_forward_ns: int,
    defined_until_ns: int,
    spy_dollar_e9: int,
    max_missing_min: int,
) -> Excursions:
    """Excursions from `level_e9` in (t1, t1 + look_forward]; thresholds_e9 is (n, 2), a negative one is undefined.

    The anchor is the last price known at t1 (a trade, or the close of a bar that has ended) and counts as the path's first
    point, so that a level already left behind is crossed at 0 s. A bar's crossing is dated to its close.
    A window is incomplete that ends after defined_until_ns, that more than max_missing_min minutes in a row without a point reach into
    (`Path.observed`), or that has no point or no threshold.
    """
    end_ns = t1_ns + look_forward_ns
    first = np.searchsorted(path.from_ns, t1_ns, side="right" if path.source == "trades" else "left")
    last = np.searchsorted(path.time_ns, end_ns, side="right")
    anchor_at = np.searchsorted(path.time_ns, t1_ns, side="right") - 1
    has_anchor = anchor_at >= 0
    closes = path.close_e9 if len(path.close_e9) else np.zeros(1, np.int64)
    anchor = closes[np.maximum(anchor_at, 0)]
    faults = [
        end_ns > defined_until_ns,
        ~path.observed(t1_ns, end_ns, max_missing_min),
        (last <= first) | ~has_anchor,
        (thresholds_e9 < 0).any(axis=1),
    ]
    why = np.select(faults, range(1, len(faults) + 1), 0).astype(np.int8)
    complete = why == 0
    block_high, block_low = path.block_extremes
    high, low, crossed_up, crossed_down = _scan(
        path.high_e9, path.low_e9, path.time_ns, block_high, block_low, _BLOCK,
        first, last, t1_ns, anchor, level_e9, thresholds_e9, complete,
    )  # fmt: skip
    dollar = float(spy_dollar_e9)
    final = closes[np.maximum(last - 1, 0)]
    nan = np.nan
    return Excursions(
        why,
        np.where(has_anchor & (t1_ns <= defined_until_ns), anchor / dollar, nan),
        np.where(complete, final / dollar, nan),
        np.where(complete, np.maximum(high - level_e9, 0) / dollar, nan),
        np.where(complete, np.maximum(level_e9 - low, 0) / dollar, nan),
        crossed_up,
        crossed_down,
    )


@njit(cache=True)
def _block_extremes(high, low, block):  # type: ignore[no-untyped-def]
    n = (len(high) + block - 1) // block
    block_high = np.empty(n, np.int64)
    block_low = np.empty(n, np.int64)
    for b in range(n):
        a = b * block
        z = min(a + block, len(high))
        top = high[a]
        bottom = low[a]
        for k in range(a + 1, z):
            if high[k] > top:
                top = high[k]
            if low[k] < bottom:
                bottom = low[k]
        block_high[b] = top
        block_low[b] = bottom
    return block_high, block_low


@njit(cache=True)
def _scan(high, low, time_ns, block_high, block_low, block, first, last, t1, anchor, level, thresholds, complete):  # type: ignore[no-untyped-def]
    """Extremes and first crossings per window; a whole block is skipped unless it holds an open crossing."""
    n = len(t1)
    top_out = np.zeros(n, np.int64)
    bottom_out = np.zeros(n, np.int64)
    up = np.full((n, 2), np.nan)
    down = np.full((n, 2), np.nan)
    for i in range(n):
        if not complete[i]:
            continue
        top = anchor[i]
        bottom = anchor[i]
        for j in range(2):
            if anchor[i] >= level[i] + thresholds[i, j]:
                up[i, j] = 0.0
            if anchor[i] <= level[i] - thresholds[i, j]:
                down[i, j] = 0.0
        k = first[i]
        while k < last[i]:
            if k % block == 0 and k + block <= last[i]:
                b = k // block
                open_crossing = False
                for j in range(2):
                    if np.isnan(up[i, j]) and block_high[b] >= level[i] + thresholds[i, j]:
                        open_crossing = True
                    if np.isnan(down[i, j]) and block_low[b] <= level[i] - thresholds[i, j]:
                        open_crossing = True
                if not open_crossing:
                    top = max(top, block_high[b])
                    bottom = min(bottom, block_low[b])
                    k += block
                    continue
            stop = min(last[i], (k // block + 1) * block)
            while k < stop:
                top = max(top, high[k])
                bottom = min(bottom, low[k])
                for j in range(2):
                    if np.isnan(up[i, j]) and high[k] >= level[i] + thresholds[i, j]:
                        up[i, j] = (time_ns[k] - t1[i]) / 1e9
                    if np.isnan(down[i, j]) and low[k] <= level[i] - thresholds[i, j]:
                        down[i, j] = (time_ns[k] - t1[i]) / 1e9
                k += 1
        top_out[i] = top
        bottom_out[i] = bottom
    return top_out, bottom_out, up, down


def thresholds_usd(settings: LabelSettings, sigma: NDArray[np.float64], mode: str | None = None) -> NDArray[np.float64]:
    """(n, 2) thresholds in SPY dollars; sigma is $ per sqrt(minute). Mode 'volatility': multiple x sigma x sqrt(look-forward minutes)."""
    mode = settings.mode if mode is None else mode
    if mode == "dollars":
        return np.tile([settings.threshold_1_usd, settings.threshold_2_usd], (len(sigma), 1))
    scale = sigma * np.sqrt(settings.look_forward_s / 60.0)
    return np.stack([settings.volatility_multiple_1 * scale, settings.volatility_multiple_2 * scale], axis=1)


def to_e9(usd: NDArray[np.float64], spy_dollar_e9: int) -> NDArray[np.int64]:
    """SPY dollars to 1e-9 points; -1 where not finite or not positive."""
    good = np.isfinite(usd) & (usd > 0)
    return np.where(good, np.rint(np.where(good, usd, 0.0) * spy_dollar_e9), -1).astype(np.int64)


def label_columns(
    delay: str, e: Excursions, sign: NDArray[np.int8], thresholds: NDArray[np.float64], level: NDArray[np.float64]
) -> dict[str, Any]:
    """Label and resolution columns of one confirmation delay; undefined values are NaN or None, never 0.

    sign (n,) approach side, thresholds (n, 2) and level (n,) SPY dollars. First crossing of threshold_2 wins; both inside one bar: the
    larger excursion, recorded as ambiguous.
    """
    rising = sign > 0
    brk = np.where(rising[:, None], e.crossed_up, e.crossed_down)
    bnc = np.where(rising[:, None], e.crossed_down, e.crossed_up)
    excursion_max = np.where(rising, e.up, e.down)
    excursion_min = np.where(rising, e.down, e.up)
    strength = excursion_max - excursion_min
    b2 = np.where(np.isnan(brk[:, 1]), np.inf, brk[:, 1])
    r2 = np.where(np.isnan(bnc[:, 1]), np.inf, bnc[:, 1])
    tied = np.isfinite(b2) & (b2 == r2)
    code = np.select(
        [~e.complete, tied & (strength > 0), tied & (strength < 0), tied, b2 < r2, r2 < b2],
        [3, 1, 2, 0, 1, 2],
        default=0,
    )
    out: dict[str, Any] = {
        f"outcome_{delay}": np.array(OUTCOMES)[code],
        f"anchor_spot_{delay}": e.anchor,
        f"future_price_{delay}": e.last,
        f"excursion_max_{delay}": excursion_max,
        f"excursion_min_{delay}": excursion_min,
        f"strength_signed_{delay}": strength,
        f"strength_abs_{delay}": np.maximum(excursion_max, excursion_min),
        f"ambiguous_{delay}": _known(tied, e.complete),
    }
    with np.errstate(invalid="ignore"):
        resolved = np.abs(e.anchor - level) >= thresholds[:, 1]
    out[f"already_resolved_{delay}"] = _known(resolved, np.isfinite(e.anchor) & np.isfinite(thresholds[:, 1]))
    for k in (0, 1):
        either = np.fmin(brk[:, k], bnc[:, k])
        out[f"tradeable_{k + 1}_{delay}"] = _known(np.isfinite(either), e.complete)
        for side, name, times in (
            ("", "threshold", either),
            ("_break", "break", brk[:, k]),
            ("_bounce", "bounce", bnc[:, k]),
        ):
            out[f"time_to_{name}_{k + 1}_{delay}"] = times
            for horizon in REACH_HORIZONS_S:
                with np.errstate(invalid="ignore"):
                    out[f"t{k + 1}{side}_{horizon}_{delay}"] = _known(times <= horizon, e.complete)
    return out


def _known(values: NDArray[np.bool_], where: NDArray[np.bool_]) -> pl.Series:
    """Boolean series that is null outside `where`."""
    return pl.Series(values, dtype=pl.Boolean).set(pl.Series(~where), None)


def base_rates(
    path: Path,
    context: pl.DataFrame,
    start_ns: NDArray[np.int64],
    level_e9: NDArray[np.int64],
    sigma: NDArray[np.float64],
    settings: LabelSettings,
    regular_open_ns: int,
    defined_until_ns: int,
    spy_dollar_e9: int,
    measured: Mapping[str, Excursions],
) -> dict[str, Any]:
    """How often each threshold is reached, in both label modes: per confirmation delay for the touches, and from every regular minute.

    measured: the touches' excursions by delay under the settings' own mode.
    Returns {mode: {'2min': {n, reached_1, reached_2}, ..., 'any_minute': {...}}}; counts, so that sessions can be added up.
    """
    forward_ns = settings.look_forward_s * NS
    minute = context.filter(
        (pl.col("start_ns") >= regular_open_ns) & (pl.col("end_ns") + forward_ns <= defined_until_ns)
    )
    out: dict[str, Any] = {}
    for mode in ("dollars", "volatility"):
        rates: dict[str, Any] = {}
        jobs = [(delay, start_ns + seconds * NS, level_e9, sigma) for delay, seconds in DELAYS_S.items()]
        jobs.append(
            ("any_minute", minute["end_ns"].to_numpy(), minute["close_e9"].to_numpy(), minute["volatility"].to_numpy())
        )
        for name, t1, level, spread in jobs:
            if mode == settings.mode and name in measured:
                e = measured[name]
            else:
                limits = to_e9(thresholds_usd(settings, spread, mode), spy_dollar_e9)
                e = measure(
                    path, t1, level, limits, forward_ns, defined_until_ns, spy_dollar_e9, settings.max_missing_min
                )
            reached = np.isfinite(e.crossed_up) | np.isfinite(e.crossed_down)
            rates[name] = {
                "n": int(e.complete.sum()),
                "reached_1": int((reached[:, 0] & e.complete).sum()),
                "reached_2": int((reached[:, 1] & e.complete).sum()),
            }
        out[mode] = rates
    return out


def label_known_ns(start_ns: NDArray[np.int64], look_forward_s: int, regular_close_ns: int) -> NDArray[np.int64]:
    """When all labels of a touch are complete, or are known to stay undefined because the session ends."""
    return np.minimum(
        start_ns + (max(DELAYS_S.values()) + look_forward_s) * NS, np.maximum(regular_close_ns, start_ns + MINUTE_NS)
    )
