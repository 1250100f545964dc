"""Touches: a level met by a one-minute bar, one event an episode, with the side it was approached from."""

from __future__ import annotations

import numpy as np
import polars as pl
from numba import njit
from numpy.typing import NDArray

from spymaster_assets.market.instruments import Instrument
from spymaster_assets.settings import MINUTE_NS, SignalSettings

STATIC_KINDS = ("ROUND", "STRIKE")
"""Kinds with many prices at once: each price is a level of its own. Of the other kinds there is one at a time."""


def find_touches(
    table: pl.DataFrame, context: pl.DataFrame, instrument: Instrument, settings: SignalSettings
) -> pl.DataFrame:
    """One row per touch episode: start_ns, level_kind, level_kind_name, level_price_e9, bar (row of `context`), direction_sign.

    A bar meets a level when low - touch band <= level <= high + touch band. Where kinds share a price in one bar one stands for
    all: the first code, ROUND last, since a strike on a round dollar says more. An episode goes on while contacts come within the
    cool-down and the level stays within the monitor band of where the episode began; its event is the first contact whose bar closes
    within the monitor band. The side is that of the last close before the bar that differs from the level (UP: below it).
    """
    starts = context["start_ns"].to_numpy()
    rows = np.searchsorted(starts, table["start_ns"].to_numpy())
    level = table["level_price_e9"].to_numpy()
    close = context["close_e9"].to_numpy()
    band = round(settings.touch_band_usd * instrument.spy_dollar_e9)
    monitor = round(settings.monitor_band_usd * instrument.spy_dollar_e9)
    low, high = context["low_e9"].to_numpy(), context["high_e9"].to_numpy()
    met = (low[rows] - band <= level) & (level <= high[rows] + band) & (rows > 0)
    tick = (level[met] + instrument.tick_e9 // 2) // instrument.tick_e9
    contacts = (
        table.filter(met)
        .with_columns(pl.Series("bar", rows[met]), pl.Series("tick", tick))
        .sort(pl.col("level_kind_name") == "ROUND", "level_kind", "start_ns", "level_price_e9")
        .unique(["start_ns", "tick"], keep="first", maintain_order=True)
        .with_columns(
            pl.when(pl.col("level_kind_name").is_in(STATIC_KINDS)).then(pl.col("tick")).otherwise(0).alias("price_key")
        )
        .sort("level_kind", "price_key", "start_ns")
    )
    bar = contacts["bar"].to_numpy()
    price = contacts["level_price_e9"].to_numpy()
    chosen = _episode_events(
        contacts["level_kind"].to_numpy().astype(np.int64),
        contacts["price_key"].to_numpy().astype(np.int64),
        contacts["start_ns"].to_numpy(),
        price,
        np.abs(close[bar] - price) <= monitor,
        settings.cool_down_min * MINUTE_NS,
        monitor,
    )
    sign = _approach_sign(close, bar, price)
    return (
        contacts.with_columns(pl.Series("direction_sign", sign, dtype=pl.Int8))
        .filter(pl.Series(chosen))
        .sort("start_ns", "level_kind", "level_price_e9")
        .drop("price_key")
    )


@njit(cache=True)
def _episode_events(kind, key, start_ns, price, inside, cool_down_ns, band):  # type: ignore[no-untyped-def]
    """Mask of event rows in contacts sorted by (kind, key, start)."""
    n = len(kind)
    out = np.zeros(n, np.bool_)
    done = False
    origin = 0
    for i in range(n):
        fresh = (
            i == 0
            or kind[i] != kind[i - 1]
            or key[i] != key[i - 1]
            or start_ns[i] - start_ns[i - 1] > cool_down_ns
            or abs(price[i] - origin) > band
        )
        if fresh:
            done = False
            origin = price[i]
        if not done and inside[i]:
            out[i] = True
            done = True
    return out


@njit(cache=True)
def _approach_sign(close, bar, price):  # type: ignore[no-untyped-def]
    """+1 when the last different close before the bar is below the level, -1 above or when there is none."""
    out = np.empty(len(bar), np.int8)
    for i in range(len(bar)):
        j = bar[i] - 1
        while j >= 0 and close[j] == price[i]:
            j -= 1
        out[i] = 1 if j >= 0 and close[j] < price[i] else -1
    return out


@njit(cache=True)
def prior_touches(start_ns, price, band):  # type: ignore[no-untyped-def]
    """Number of earlier events (start before this one's) within `band` of the level; inputs sorted by start."""
    n = len(start_ns)
    out = np.zeros(n, np.int32)
    for i in range(n):
        count = 0
        for j in range(i):
            if start_ns[j] < start_ns[i] and abs(price[j] - price[i]) <= band:
                count += 1
        out[i] = count
    return out


@njit(cache=True)
def attempts(group, start_ns, price, gap_ns, band):  # type: ignore[no-untyped-def]
    """(index, cluster, first) of each event in its attempt cluster; rows sorted by time, `group` small codes.

    A new cluster starts after gap_ns or when the level moved by more than `band` from the touch before; `first` is the row
    of the cluster's first touch.
    """
    n = len(start_ns)
    groups = 0
    for i in range(n):
        groups = max(groups, group[i] + 1)
    last = np.full(groups, -1, np.int64)
    index = np.zeros(n, np.int32)
    cluster = np.zeros(n, np.int32)
    first = np.zeros(n, np.int64)
    for i in range(n):
        j = last[group[i]]
        if j >= 0 and start_ns[i] - start_ns[j] <= gap_ns and abs(price[i] - price[j]) <= band:
            index[i], cluster[i], first[i] = index[j] + 1, cluster[j], first[j]
        else:
            index[i], first[i] = 1, i
            cluster[i] = cluster[j] + 1 if j >= 0 else 1
        last[group[i]] = i
    return index, cluster, first


def event_ids(symbol: str, session: str, touches: pl.DataFrame) -> pl.Series:
    """Deterministic ids `SYMBOL_session_KIND_tick_SIDE_t0`, unique because one price stands for all kinds in a bar."""
    return touches.select(
        pl.concat_str(
            pl.lit(symbol),
            pl.lit(session),
            "level_kind_name",
            pl.col("tick").cast(pl.String),
            pl.when(pl.col("direction_sign") > 0).then(pl.lit("UP")).otherwise(pl.lit("DOWN")),
            pl.col("start_ns").cast(pl.String),
            separator="_",
        ).alias("event_id")
    ).to_series()


def signed(direction_sign: NDArray[np.int8], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """values seen in the direction of approach."""
    return direction_sign.astype(np.float64) * values
