"""The barrier at a touch: what the defending side of the book adds, cancels and loses to fills near the level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from spymaster_assets.market.book import BookSnapshots
from spymaster_assets.market.dbn import UNDEFINED_PRICE
from spymaster_assets.market.instruments import Instrument
from spymaster_assets.market.tape import SessionTape
from spymaster_assets.settings import NS, BarrierSettings
from spymaster_assets.signals.coverage import Coverage

STATES = ("VACUUM", "WALL", "ABSORPTION", "CONSUMED", "WEAK", "NEUTRAL")
"""Barrier states by code, as features.json lists them; code -1 is null."""
_VACUUM, _WALL, _ABSORPTION, _CONSUMED, _WEAK, _NEUTRAL = range(6)
_EPSILON = 1e-6
_UNDEFINED = int(UNDEFINED_PRICE)


@dataclass(frozen=True)
class BarrierFeatures:
    """Arrays (n,), NaN (state -1) where the book cannot tell.

    state: index into STATES. added, cancelled, filled, delta_liq: contracts of the size of one ES contract. replenishment_ratio,
    wall_ratio: 1. snapshot_count: usable
    snapshots in the window; pair_count: consecutive ones in both of which the zone is seen; baseline_count: usable snapshots of the
    baseline. complete: the window was neither cut short nor has it a hole.
    """

    state: NDArray[np.int8]
    added: NDArray[np.float64]
    cancelled: NDArray[np.float64]
    filled: NDArray[np.float64]
    delta_liq: NDArray[np.float64]
    replenishment_ratio: NDArray[np.float64]
    wall_ratio: NDArray[np.float64]
    snapshot_count: NDArray[np.int64]
    pair_count: NDArray[np.int64]
    baseline_count: NDArray[np.int64]
    complete: NDArray[np.bool_]

    def columns(self) -> dict[str, Any]:
        """The barrier columns of features.json; null as None (state) or NaN."""
        return {
            "barrier_state": [STATES[code] if code >= 0 else None for code in self.state],
            "barrier_delta_liq": self.delta_liq,
            "barrier_delta_liq_nonzero": _nonzero(self.delta_liq),
            "barrier_delta_liq_log": np.sign(self.delta_liq) * np.log1p(np.abs(self.delta_liq)),
            "barrier_replenishment_ratio": self.replenishment_ratio,
            "wall_ratio": self.wall_ratio,
            "wall_ratio_nonzero": _nonzero(self.wall_ratio),
            "wall_ratio_log": np.log1p(self.wall_ratio),
        }


def barrier_features(
    book: BookSnapshots,
    tape: SessionTape,
    start_ns: NDArray[np.int64],
    price_e9: NDArray[np.int64],
    direction_sign: NDArray[np.int8],
    instrument: Instrument,
    settings: BarrierSettings | None = None,
    end_ns: NDArray[np.int64] | None = None,
) -> BarrierFeatures:
    """Barrier features of touches at (start_ns, price_e9), arrays (n,), from snapshots in [start, start + window_s).

    direction_sign +1 (from below) makes the ask defend, -1 the bid. end_ns, arrays (n,), ends windows sooner. A window ends where the
    last bucket that fits into it ends, so input cut off at the window's end gives the same values. Rules and their differences from
    the source (level-touch rules, docs/method.md, barrier):

    * depth of the zone, level -+ zone_usd, is compared between consecutive snapshots as far as both see it: an mbp-10 book shows ten
      levels, and depth that merely comes into view was not added;
    * of depth lost, up to the volume of aggressors in the zone between the two snapshots was filled and the rest cancelled; no
      contract is counted twice, so delta_liq is the net change of depth;
    * wall_ratio is the size per tick of the zone at the last snapshot, from the best price or the level, whichever is nearer to the
      approach, as far as seen, over the size per tick of that side in [start - baseline_s, start);
    * sizes are divided by what the instrument's unit is of an ES contract, so that one set of thresholds serves SPY shares and MES too;
    * a snapshot whose defending side is empty is not usable, and a touch without a pair of usable ones has no values;
    * more than max_gap_s without a snapshot within a window are a hole: what was added and lost in it is not known. So long a silence
      within the baseline leaves no wall_ratio. A silence that began before either counts from where it begins.
    """
    s = settings or BarrierSettings()
    sign = np.ascontiguousarray(direction_sign, np.int64)
    full_ns = start_ns + s.window_s * NS
    stop_ns = full_ns if end_ns is None else np.minimum(full_ns, end_ns)
    first = np.searchsorted(book.ts_ns, start_ns, side="left")
    last_ns = _whole_buckets(stop_ns, book.bucket_ns)
    last = np.searchsorted(book.ts_ns, last_ns, side="left")
    base_start_ns, base_last_ns = start_ns - s.baseline_s * NS, _whole_buckets(start_ns, book.bucket_ns)
    base_first = np.searchsorted(book.ts_ns, base_start_ns, side="left")
    base_last = np.maximum(base_first, np.searchsorted(book.ts_ns, base_last_ns, side="left"))
    measured = _barriers(
        book.ts_ns,
        (book.bid_px_e9, book.ask_px_e9),
        (book.bid_sz, book.ask_sz),
        tape.ts_ns,
        tape.price_e9,
        tape.size,
        tape.side,
        first,
        last,
        np.ascontiguousarray(price_e9, np.int64),
        sign,
        round(s.zone_usd * instrument.spy_dollar_e9),
        instrument.tick_e9,
    )
    added, cancelled, filled, depth, wall_ticks, snapshots, pairs = measured
    seen = pairs > 0
    units = instrument.units_per_es_contract
    # in whole contracts, so that rounding does not depend on how much of a loss the trades explain
    delta = (added - cancelled - filled) / units
    ratio = added / units / ((cancelled + filled) / units + _EPSILON)
    added, cancelled, filled, depth = (v / units for v in (added, cancelled, filled, depth))
    baseline, baseline_count = _baseline(book, base_first, base_last, sign, instrument.tick_e9)
    baseline = baseline / units
    coverage = Coverage.of(book.ts_ns, s.max_gap_s * NS)
    observed = coverage.heard(base_start_ns, base_last_ns)
    usable = seen & observed & (wall_ticks > 0) & (baseline_count >= s.baseline_min_snapshots) & (baseline > 0)
    wall = np.divide(depth, wall_ticks * baseline, out=np.full(len(sign), np.nan), where=usable)
    return BarrierFeatures(
        state=np.where(seen, _states(added, cancelled, filled, delta, ratio, depth, wall_ticks > 0, s), -1).astype(
            np.int8
        ),
        added=np.where(seen, added, np.nan),
        cancelled=np.where(seen, cancelled, np.nan),
        filled=np.where(seen, filled, np.nan),
        delta_liq=np.where(seen, delta, np.nan),
        replenishment_ratio=np.where(seen, ratio, np.nan),
        wall_ratio=wall,
        snapshot_count=snapshots,
        pair_count=pairs,
        baseline_count=baseline_count,
        complete=(stop_ns == full_ns) & coverage.heard(start_ns, last_ns),
    )


def _whole_buckets(ts_ns: NDArray[np.int64], bucket_ns: int) -> NDArray[np.int64]:
    """Start of the bucket of each time: a bucket that is still open then does not have its last book yet."""
    return ts_ns // bucket_ns * bucket_ns


def _nonzero(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isnan(values), np.nan, (values != 0).astype(np.float64))


def _states(added, cancelled, filled, delta, ratio, depth, depth_seen, s: BarrierSettings):  # type: ignore[no-untyped-def]
    """State of each touch: the first rule that holds."""
    big, churn = s.delta_contracts, added + cancelled + filled
    rules = [
        ((ratio < s.replenishment_low) & (delta < -big), _VACUUM),
        ((ratio > s.replenishment_high) & (delta > big), _WALL),
        ((delta < -big) & (filled > cancelled), _CONSUMED),
        ((delta > 0) & (ratio > 1.0), _ABSORPTION),
        (depth_seen & (depth < s.weak_depth_contracts), _WEAK),
        ((np.abs(delta) < s.quiet_delta_contracts) & (churn > s.churn_contracts), _ABSORPTION),
    ]
    return np.select([rule for rule, _ in rules], [code for _, code in rules], _NEUTRAL)


def _baseline(
    book: BookSnapshots, first: NDArray[np.int64], last: NDArray[np.int64], sign: NDArray[np.int64], tick_e9: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Size per tick of the defending side over snapshots [first, last) and how many of them are usable.

    Sums of integers, so a window's value does not depend on where the input begins or ends.
    """
    mean = np.full(len(sign), np.nan)
    count = np.zeros(len(sign), np.int64)
    for side, px, sz in ((-1, book.bid_px_e9, book.bid_sz), (1, book.ask_px_e9, book.ask_sz)):
        rows = sign == side
        defined = px != _UNDEFINED
        deepest = np.where(defined, side * px, np.iinfo(np.int64).min).max(axis=1, initial=np.iinfo(np.int64).min)
        usable = defined[:, 0]
        ticks = np.where(usable, (np.where(usable, deepest - side * px[:, 0], 0)) // tick_e9 + 1, 0)
        sizes = np.where(usable, sz.sum(axis=1), 0)
        totals = [np.concatenate([[0], np.cumsum(v)]) for v in (sizes, ticks, usable.astype(np.int64))]
        size, span, n = (t[last[rows]] - t[first[rows]] for t in totals)
        mean[rows] = np.divide(size, span, out=np.full(len(size), np.nan), where=span > 0)
        count[rows] = n
    return mean, count


@njit(cache=True)
def _barriers(  # type: ignore[no-untyped-def]
    ts, prices, sizes, trade_ts, trade_price, trade_size, trade_side, first, last, level, sign, zone, tick
):
    """Added, cancelled, filled contracts, depth and ticks of the zone at the last usable snapshot, usable snapshots, pairs.

    Prices are multiplied by the sign, so on both sides a larger one lies deeper in the book.
    """
    n = len(level)
    added = np.zeros(n, np.int64)
    cancelled = np.zeros(n, np.int64)
    filled = np.zeros(n, np.int64)
    depth = np.zeros(n, np.int64)
    ticks = np.zeros(n, np.int64)
    snapshots = np.zeros(n, np.int64)
    pairs = np.zeros(n, np.int64)
    for i in range(n):
        s = sign[i]
        px, sz = prices[1 if s > 0 else 0], sizes[1 if s > 0 else 0]
        low = s * level[i] - zone
        high = s * level[i] + zone
        before = -1
        view_before = 0
        trade = 0
        for k in range(first[i], last[i]):
            if px[k, 0] == _UNDEFINED:
                continue
            snapshots[i] += 1
            view = _view(px, k, s)
            if before < 0:
                trade = np.searchsorted(trade_ts, ts[k], side="right")
            else:
                passive = 0
                while trade < len(trade_ts) and trade_ts[trade] <= ts[k]:
                    if trade_side[trade] == s and abs(trade_price[trade] - level[i]) <= zone:
                        passive += trade_size[trade]
                    trade += 1
                both = min(high, view, view_before)
                if both >= low:
                    pairs[i] += 1
                    change = _depth(px, sz, k, s, low, both) - _depth(px, sz, before, s, low, both)
                    if change > 0:
                        added[i] += change
                    else:
                        taken = min(-change, passive)
                        filled[i] += taken
                        cancelled[i] += -change - taken
            before = k
            view_before = view
        if before >= 0:
            top = min(high, view_before)
            bottom = max(low, min(s * px[before, 0], s * level[i]))
            depth[i] = _depth(px, sz, before, s, low, top)
            if top >= bottom:
                ticks[i] = top // tick + (-bottom) // tick + 1
    return added, cancelled, filled, depth, ticks, snapshots, pairs


@njit(cache=True)
def _view(px, k, s):  # type: ignore[no-untyped-def]
    """Deepest price up to which snapshot k shows everything: without limit while a level is empty."""
    deepest = s * px[k, 0]
    for j in range(px.shape[1]):
        if px[k, j] == _UNDEFINED:
            return np.int64(_UNDEFINED)
        deepest = max(deepest, s * px[k, j])
    return deepest


@njit(cache=True)
def _depth(px, sz, k, s, low, high):  # type: ignore[no-untyped-def]
    """Size of the levels of snapshot k that lie in [low, high]."""
    total = 0
    for j in range(px.shape[1]):
        if px[k, j] != _UNDEFINED and low <= s * px[k, j] <= high:
            total += sz[k, j]
    return total
