"""Touches: a level met by a one-minute bar, one event an episode, with the side it was approached from."""

from __future__ import annotations

import numpy as np
import polars as pl
from numba import njit
from numpy.typing import NDArray

from spymaster_assets.market.instruments import Instrument
from spymaster_assets.settings import MINUTE_NS, SignalSettings
from spymaster_assets.signals.levels import OPTION_KINDS

_THOUSANDTH_E9 = 1_000_000
_PREFERENCE = (pl.col("level_kind_name") == "ROUND", pl.col("level_kind"))
_KEY = (
    pl.when(pl.col("level_kind_name") == "ROUND")
    .then("tick")
    .when(pl.col("level_kind_name") == "STRIKE")
    .then("strike_e9")
    .otherwise(0)
)
"""Tells apart the levels of a kind that has many at once; of the other kinds there is one at a time."""


def find_touches(
    table: pl.DataFrame, context: pl.DataFrame, instrument: Instrument, settings: SignalSettings
) -> pl.DataFrame:
    """One row per touch episode: start_ns, level_kind, level_kind_name, level_price_e9, strike_e9, bar (row of `context`), tick,
    of_options, direction_sign, hidden.

    A bar meets a level when low - touch band <= level <= high + touch band. Where kinds share a price in one bar one stands for
    all: the first code, ROUND last, since a strike on a round dollar says more. An episode goes on while contacts come within the
    cool-down and the level stays where the episode began: within the monitor band or, for a level of the options, at the same strike
    whatever the basis makes of its price. Its event is the first contact whose bar closes within the monitor band. The side is that of
    the last close before the bar that differs from the level (UP: below it).

    Levels of the bars and of the options (of_options) make episodes of their own, so that an option feed does not change what is known
    of the others; of both families' events at one price in one bar all but one are `hidden`: they count in the history, and are no rows.
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
        .with_columns(
            pl.Series("bar", rows[met]),
            pl.Series("tick", tick),
            pl.col("level_kind_name").is_in(OPTION_KINDS).alias("of_options"),
        )
        .sort(*_PREFERENCE, "start_ns", "level_price_e9")
        .unique(["of_options", "start_ns", "tick"], keep="first", maintain_order=True)
        .with_columns(_KEY.alias("key"))
        .sort("level_kind", "key", "start_ns")
    )
    bar = contacts["bar"].to_numpy()
    price = contacts["level_price_e9"].to_numpy()
    chosen = _episode_events(
        contacts["level_kind"].to_numpy().astype(np.int64),
        contacts["key"].to_numpy().astype(np.int64),
        contacts["start_ns"].to_numpy(),
        price,
        strikes(contacts),
        np.abs(close[bar] - price) <= monitor,
        settings.cool_down_min * MINUTE_NS,
        monitor,
    )
    sign = _approach_sign(close, bar, price)
    return (
        contacts.with_columns(pl.Series("direction_sign", sign, dtype=pl.Int8))
        .filter(pl.Series(chosen))
        .sort(*_PREFERENCE)
        .with_columns((~pl.struct("start_ns", "tick").is_first_distinct()).alias("hidden"))
        .sort("start_ns", "level_kind", "level_price_e9")
        .drop("key")
    )


def strikes(touches: pl.DataFrame) -> NDArray[np.int64]:
    """strike_e9 (n,) of a level or touch table, 0 for a level that is no strike."""
    return touches["strike_e9"].fill_null(0).to_numpy()


@njit(cache=True, inline="always")
def _moved(price, strike, i, j, band):  # type: ignore[no-untyped-def]
    """Whether row i is at another level than row j of its kind: another strike, or a price further than `band` away."""
    return strike[i] != strike[j] if strike[i] > 0 else abs(price[i] - price[j]) > band


@njit(cache=True)
def _episode_events(kind, key, start_ns, price, strike, inside, cool_down_ns, band):  # type: ignore[no-untyped-def]
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
            or _moved(price, strike, i, origin, band)
        )
        if fresh:
            done = False
            origin = i
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
def attempts(group, start_ns, price, strike, gap_ns, band):  # type: ignore[no-untyped-def]
    """(index, cluster, first) of each event in its attempt cluster; rows sorted by time, `group` small codes.

    A new cluster starts after gap_ns or when the level moved from the touch before, by more than `band` or (strike above 0) to
    another strike; `first` is the row of the cluster's first touch. Touches of one bar do not count for each other: neither is certain
    before it closes.
    """
    n = len(start_ns)
    groups = 0
    for i in range(n):
        groups = max(groups, group[i] + 1)
    last = np.full(groups, -1, np.int64)
    before = np.full(n, -1, np.int64)
    index = np.zeros(n, np.int32)
    cluster = np.zeros(n, np.int32)
    first = np.zeros(n, np.int64)
    for i in range(n):
        j = last[group[i]]
        if j >= 0 and start_ns[j] == start_ns[i]:
            j = before[j]
        before[i] = j
        if j >= 0 and start_ns[i] - start_ns[j] <= gap_ns and not _moved(price, strike, i, j, band):
            index[i], cluster[i], first[i] = index[j] + 1, cluster[j], first[j]
        else:
            index[i], first[i] = 1, i
            cluster[i] = cluster[j] + 1 if j >= 0 else 1
        last[group[i]] = i
    return index, cluster, first


def event_ids(symbol: str, session: str, touches: pl.DataFrame) -> pl.Series:
    """Deterministic ids `SYMBOL_session_KIND_tick_SIDE_t0`; of a STRIKE the strike in thousandths, as in option symbols, for the tick."""
    return touches.select(
        pl.concat_str(
            pl.lit(symbol),
            pl.lit(session),
            "level_kind_name",
            pl.when(pl.col("level_kind_name") == "STRIKE")
            .then(pl.col("strike_e9") // _THOUSANDTH_E9)
            .otherwise("tick")
            .cast(pl.String),
            pl.when(pl.col("direction_sign") > 0).then(pl.lit("UP")).otherwise(pl.lit("DOWN")),
            pl.col("start_ns").cast(pl.String),
            separator="_",
        ).alias("event_id")
    ).to_series()
