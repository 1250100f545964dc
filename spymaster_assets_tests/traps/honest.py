"""Honest graphs: the pipelines themselves, and variants that look like a leak and are none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import polars as pl
from sklearn.decomposition import PCA
from sklearn.model_selection import KFold, train_test_split

from spymaster_assets.proof.known import KnownTable
from spymaster_assets_tests.traps.graphs import Graph, Node, at_end, fitted, honest, keep
from spymaster_assets_tests.traps.market import BAR_NS, CALENDAR, SESSIONS
from spymaster_assets_tests.traps.pipelines import (
    ASOF_NS,
    CALIBRATION,
    HORIZON,
    HOURS,
    LABELS,
    MODEL,
    NEIGHBOURS,
    PARTS,
    QUOTES,
    SIGNALS,
    TOUCHES,
    VALID_NS,
    X,
    at_start,
    bar_frame,
    before,
    feature_frame,
    label_frame,
    matrix,
    touch_frame,
    with_session,
)
from spymaster_assets_tests.traps.planted_data import BASE, RELEASES, front_bars, with_close, with_feature
from spymaster_assets_tests.traps.planted_learning import (
    ASOFS,
    CACHED,
    ENCODED,
    SELECTED,
    STOPPED,
    UNIVERSE,
    complete,
    fit_scaler,
    known_at,
    rate_of,
    stacked,
    standard,
)

PIPELINES: Mapping[str, Mapping[str, Node]] = {
    "pipeline_signals": SIGNALS,
    "pipeline_touches": TOUCHES,
    "pipeline_labels": LABELS,
    "pipeline_parts": PARTS,
    "pipeline_model": MODEL,
    "pipeline_calibration": CALIBRATION,
    "pipeline_neighbours": NEIGHBOURS,
    "pipeline_quotes": QUOTES,
    "pipeline_releases": RELEASES,
    "pipeline_hours": HOURS,
    "pipeline_cached": CACHED,
    "pipeline_stopped": STOPPED,
    "pipeline_selected": SELECTED,
    "pipeline_universe": UNIVERSE,
}
for _name, _nodes in PIPELINES.items():
    keep(Graph(_name, "honest", _nodes, None, "A pipeline as it is, into which leaks are planted elsewhere."))


@honest(SIGNALS, at="features")
def shifted_back(bars: KnownTable) -> KnownTable:
    """shift(+1) and diff look back."""
    return with_feature(bars, pl.col("close").shift(1).log() - pl.col("close").shift(2).log())


@honest(SIGNALS, at="features")
def expanding_z(bars: KnownTable) -> KnownTable:
    """Standardized by the mean and deviation of all bars so far, in running sums."""
    v, n = pl.col("volume").cast(pl.Float64), pl.int_range(1, pl.len() + 1)
    mean = v.cum_sum() / n
    deviation = ((v * v).cum_sum() / n - mean * mean).clip(1e-9).sqrt()
    return with_feature(bars, (v - mean) / deviation)


@honest(SIGNALS, at="features")
def exponential_mean(bars: KnownTable) -> KnownTable:
    """An exponentially weighted mean, by recursion from the first bar."""
    return with_feature(bars, pl.col("close").cast(pl.Float64).ewm_mean(half_life=5))


@honest(SIGNALS, at="features")
def rolling_by_add_and_remove(bars: KnownTable) -> KnownTable:
    """Rolling variance and quantile, updated by what enters and leaves the window."""
    close = pl.col("close").cast(pl.Float64)
    return with_feature(bars, close.rolling_var(7) + close.rolling_quantile(0.3, window_size=9))


@honest(SIGNALS, at="features")
def numpy_prefix_sums(bars: KnownTable) -> KnownTable:
    """Windows from differences of a cumulative sum, whose rounding hangs on the past alone."""
    total = np.concatenate([[0.0], np.cumsum(bars.frame["close"].to_numpy() / 3.0)])
    at = np.arange(1, len(total))
    mean = (total[at] - total[np.maximum(at - 5, 0)]) / np.minimum(at, 5)
    return at_end(feature_frame(bars.frame).with_columns(pl.Series("flow", mean)).select(BASE))


@honest(SIGNALS, at="features")
def pandas_rolling(bars: KnownTable) -> KnownTable:
    """pandas: rolling skewness, then filled forward."""
    skew = pd.Series(bars.frame["close"].to_numpy().astype(np.float64)).rolling(8).skew().ffill()
    return at_end(feature_frame(bars.frame).with_columns(pl.Series("flow", skew.to_numpy())).select(BASE))


@honest(SIGNALS, at="features")
def high_so_far(bars: KnownTable) -> KnownTable:
    """The session's high up to the bar."""
    return with_feature(bars, pl.col("high").cum_max().over("session") - pl.col("close"))


@honest(SIGNALS, at="features")
def rank_so_far(bars: KnownTable) -> KnownTable:
    """Rank of a bar's volume among the bars of its day so far."""
    days = [p["volume"].to_numpy() for p in bars.frame.partition_by("session", maintain_order=True)]
    rank = np.concatenate([(np.tril(v[None, :] <= v[:, None])).sum(axis=1) for v in days]) if days else np.empty(0)
    return at_end(feature_frame(bars.frame).with_columns(pl.Series("flow", rank / 13, dtype=pl.Float64)).select(BASE))


@honest(SIGNALS, at="features")
def daily_bar_of_yesterday(bars: KnownTable) -> KnownTable:
    """Daily high and close used from the next session on."""
    day = bars.frame.group_by("session", maintain_order=True).agg(pl.col("high").max(), pl.col("close").last())
    day = day.select("session", (pl.col("close") / pl.col("high")).shift(1).alias("flow"))
    frame = feature_frame(bars.frame).drop("flow").join(day, on="session", how="left", maintain_order="left")
    return at_end(frame.select(BASE))


@honest(SIGNALS, at="features")
def known_later(bars: KnownTable) -> KnownTable:
    """The next bar's return, declared known when that bar has ended."""
    frame = feature_frame(bars.frame).with_columns(
        (bars.frame["close"].shift(-1) / bars.frame["close"] - 1).alias("flow"),
        bars.frame["end_ns"].shift(-1).fill_null(2**62).alias("later_ns"),
    )
    return KnownTable(frame.select(BASE), frame["end_ns"].to_numpy(), {"flow": frame["later_ns"].to_numpy()}, "end_ns")


@honest(TOUCHES, at="touches")
def distance_at_the_end(bars: KnownTable) -> KnownTable:
    """Distance from the touch bar's close, declared known when that bar has ended."""
    made = at_start(touch_frame(bars.frame))
    return replace(made, frame=made.frame.with_columns((pl.col("level") - pl.col("close")).alias("distance")))


@honest(TOUCHES, at="touches")
def only_if_it_closes_near(bars: KnownTable) -> KnownTable:
    """Whether there is a row hangs on its bar's close, what is known of it before that bar does not."""
    near = (pl.col("close") / pl.col("level") - 1).abs() < 0.001
    return at_start(touch_frame(bars.frame).filter(near))


@honest(SIGNALS, at="bars")
def reversed_twice(trades: pl.DataFrame) -> KnownTable:
    """Work on a reversed tape and turn it round again."""
    back = trades.reverse().with_columns((pl.col("size") * 1).alias("size"))
    return at_end(bar_frame(back.reverse()))


@honest(SIGNALS, at="bars")
def first_version(trades: pl.DataFrame) -> KnownTable:
    """Deduplicated by number, the first version kept."""
    return at_end(bar_frame(trades.unique("id", keep="first", maintain_order=True)))


@honest(SIGNALS, at="bars")
def waits_for_late_reports(trades: pl.DataFrame) -> KnownTable:
    """Bars by event time of what was received ten minutes after their end, declared known then."""
    wait_ns = BAR_NS // 3
    by_event = with_session(trades.with_columns(at=pl.col("event_ns")), "at").filter(
        pl.col("recv_ns") < pl.col("end_ns") + wait_ns
    )
    kept = by_event.sort("recv_ns").select(
        "id", pl.col("at").alias("recv_ns"), "event_ns", "contract", "price", "size", "venue"
    )
    out = bar_frame(kept.sort("recv_ns", maintain_order=True))
    return at_end(out.with_columns(pl.col("end_ns") + wait_ns))


@honest(SIGNALS, at="bars")
def front_by_yesterday(trades: pl.DataFrame) -> KnownTable:
    """The front month of a session is the contract that traded most in the one before."""
    day = with_session(trades).group_by("session", "contract", maintain_order=True).agg(pl.col("size").sum())
    nexts = {s.key: n.key for s, n in pairwise(SESSIONS)}
    moved = day.with_columns(pl.col("session").replace_strict(nexts, default=None)).drop_nulls()
    return front_bars(trades, moved, "session")


@honest(LABELS, at="labels")
def wall_clock_horizon(bars: KnownTable) -> KnownTable:
    """Return to the last close at most 90 minutes later, known at that time and not before."""
    ends = bars.frame["end_ns"].to_numpy()
    until = np.minimum(ends + HORIZON * BAR_NS, bars.frame["closes_ns"].to_numpy())
    at = np.searchsorted(ends, until, side="right") - 1
    close = bars.frame["close"].to_numpy()
    out = pl.DataFrame(
        {
            "end_ns": ends,
            "y": close[at] / close - 1,
            "up": (close[at] > close).astype(np.int64),
            "label_known_ns": until,
        }
    )
    return at_end(out.filter(pl.col("label_known_ns") > pl.col("end_ns")), "label_known_ns")


@honest(LABELS, at="labels")
def first_barrier(bars: KnownTable) -> KnownTable:
    """Which barrier comes first, declared known in the bar that touches it, or at the end of the horizon."""
    out = label_frame(bars.frame).join(
        bars.frame.select("end_ns", "session", "close"), on="end_ns", maintain_order="left"
    )
    hits = [
        pl.when((pl.col("close").shift(-k).over("session") / pl.col("close") - 1).abs() > 0.001).then(
            pl.struct(
                (pl.col("close").shift(-k).over("session") / pl.col("close") - 1).alias("y"),
                pl.col("end_ns").shift(-k).over("session").alias("t"),
            )
        )
        for k in range(1, HORIZON + 1)
    ]
    first = bars.frame.select("end_ns", pl.coalesce(hits).alias("hit"))
    out = out.join(first, on="end_ns", maintain_order="left")
    # rows near the close are left out whatever happens: a row may not exist because it resolved early
    return at_end(
        out.select(
            "end_ns",
            pl.coalesce(pl.col("hit").struct.field("y"), pl.lit(0.0)).alias("y"),
            (pl.col("hit").struct.field("y").fill_null(0.0) > 0).cast(pl.Int64).alias("up"),
            "label_known_ns",
        ),
        "label_known_ns",
    )


@honest(LABELS, at="labels")
def threshold_of_past(bars: KnownTable) -> KnownTable:
    """Up means more than a share of the deviation of labels complete before, by running sums."""
    out = label_frame(bars.frame).sort("label_known_ns")
    past = (pl.col("y") ** 2).cum_sum() / pl.int_range(1, pl.len() + 1)
    return at_end(out.with_columns((pl.col("y") > 0.25 * past.sqrt()).cast(pl.Int64).alias("up")), "label_known_ns")


@honest(PARTS, at="train")
def shuffled_inside_past(rows: KnownTable) -> KnownTable:
    """train_test_split of rows that were all complete before."""
    part = before(rows.frame, VALID_NS)
    index = np.sort(train_test_split(np.arange(part.height), test_size=0.3, random_state=0)[0])
    return known_at(part[index], VALID_NS)


@honest(PARTS, at="train")
def sampled_by_hash(rows: KnownTable) -> KnownTable:
    """A sample by the hash of each row's time, which no other row can change."""
    part = before(rows.frame, VALID_NS)
    digest = [hashlib.sha256(str(t).encode()).digest()[0] < 128 for t in part["end_ns"]]
    return known_at(part.filter(pl.Series(digest)), VALID_NS)


@honest(PARTS, at="train")
def share_of_sessions(rows: KnownTable) -> KnownTable:
    """The first 45 % of the calendar's sessions, whatever data there are."""
    last = SESSIONS[int(0.45 * len(SESSIONS))]
    return known_at(before(rows.frame, last.regular_open_ns), last.regular_open_ns)


@honest(MODEL, at="scaler")
def rotated_on_past(rows: KnownTable) -> KnownTable:
    """Principal axes of the past."""
    past = matrix(before(rows.frame, ASOF_NS))
    axes = PCA(2, svd_solver="full").fit(past)
    return fitted(ASOF_NS, mean=axes.mean_.tolist(), std=(np.abs(axes.components_).sum(axis=0) + 0.1).tolist())


@honest(MODEL, at="scaler")
def partial_fits(rows: KnownTable) -> KnownTable:
    """Scaler of the last five sessions before the as-of session."""
    past = before(rows.frame, ASOF_NS)
    keys = past["session"].unique(maintain_order=True).tail(5).to_list()
    return fitted(ASOF_NS, **standard(matrix(past.filter(pl.col("session").is_in(keys)))))


@honest(ENCODED, at="features")
def encoded_out_of_fold(bars: KnownTable) -> KnownTable:
    """The hour is encoded by its mean return so far, the current bar excluded."""
    hour = ((pl.col("end_ns") - pl.col("opens_ns")) // BAR_NS).alias("hour")
    move = (pl.col("close") / pl.col("open") - 1).alias("move")
    frame = bars.frame.with_columns(hour, move)
    so_far = (pl.col("move").cum_sum().shift(1) / pl.int_range(pl.len())).over("hour").fill_nan(None).fill_null(0.0)
    zeros = (pl.lit(0.0).alias(c) for c in X[1:])
    return at_end(frame.select("session", "opens_ns", "closes_ns", "end_ns", "close", so_far.alias(X[0]), *zeros))


@honest(PARTS, at="train")
def cross_fitted(rows: KnownTable) -> KnownTable:
    """Target encoding by cross-fitting inside the training part."""
    part = before(rows.frame, VALID_NS)
    up = part["up"].to_numpy()
    encoded = np.empty(part.height)
    for fit, held in KFold(5, shuffle=True, random_state=1).split(up):
        encoded[held] = up[fit].mean()
    return known_at(part.with_columns(pl.Series("encoded", encoded)), VALID_NS)


@honest(NEIGHBOURS, at="neighbours")
def online_index(features: KnownTable, rows: KnownTable) -> KnownTable:
    """An index that grows with every label that is completed, also during the test."""
    return rate_of(features, rows, complete, k=9)


@honest(NEIGHBOURS, at="neighbours")
def index_of_asof(features: KnownTable, rows: KnownTable) -> KnownTable:
    """An index that ends at the as-of session."""
    return rate_of(features, rows, lambda t, r: (r["label_known_ns"].to_numpy() < ASOF_NS)[None, :] & (t > 0))


@honest(CACHED, at="artifacts")
def keyed_by_asof(rows: KnownTable) -> KnownTable:
    """A backfill from the newest on, with a cache keyed by the as-of time."""
    cache: dict[int, dict[str, list[float]]] = {}
    return stacked({t: cache.setdefault(t, fit_scaler(rows.frame, t)) for t in reversed(ASOFS)})


@honest(CACHED, at="artifacts")
def last_before(rows: KnownTable) -> KnownTable:
    """Every session loads the newest artifact that is not younger than itself."""
    store = {t: fit_scaler(rows.frame, t) for t in reversed(ASOFS) if rows.frame["label_known_ns"].max() is not None}
    return stacked({t: store[max(k for k in store if k <= t)] for t in ASOFS})


@honest(QUOTES, at="quoted")
def filled_forward(bars: KnownTable, quotes: pl.DataFrame) -> KnownTable:
    """Missing quotes take the last that was there; the start stays missing."""
    left = bars.frame.select("session", "end_ns", "close").with_columns((pl.col("end_ns") - 1).alias("at_ns"))
    right = quotes.select("recv_ns", pl.col("bid", "ask").forward_fill(), "depth")
    return at_end(left.join_asof(right, left_on="at_ns", right_on="recv_ns", strategy="backward").drop("at_ns"))


@honest(RELEASES, at="released")
def revisions_as_received(bars: KnownTable, releases: pl.DataFrame) -> KnownTable:
    """First figures and revisions, each from its receipt on; the columns are those of a fixed list."""
    out = bars.frame.select("end_ns", (pl.col("end_ns") - 1).alias("at_ns"))
    for name in ("claims", "jobs", "prices"):
        part = releases.filter((pl.col("series") == name) & pl.col("value").is_not_null())
        part = part.sort("recv_ns", maintain_order=True).select("recv_ns", pl.col("value").alias(name))
        out = out.join_asof(part, left_on="at_ns", right_on="recv_ns", strategy="backward").drop("recv_ns")
    return at_end(out.select("end_ns", "claims", "jobs", "prices"))


@honest(HOURS, at="hours")
def early_closes_of_calendar(bars: KnownTable) -> KnownTable:
    """Half days from the calendar, which is published long before."""
    early = {s.key: CALENDAR.session(s.key).early_close for s in SESSIONS}
    short = pl.col("session").replace_strict(early, return_dtype=pl.Boolean)
    end = pl.col("opens_ns") + pl.when(short).then(7 * BAR_NS).otherwise(13 * BAR_NS)
    return with_close(bars, end)


@honest(HOURS, at="hours")
def sessions_left_in_calendar(bars: KnownTable) -> KnownTable:
    """Sessions to the end of the month, by the calendar."""
    keys = [s.key for s in SESSIONS]
    left = {k: sum(o > k and o[:7] == k[:7] for o in keys) for k in keys}
    days = pl.col("session").replace_strict(left, return_dtype=pl.Int64)
    return with_close(bars, pl.col("closes_ns") + days * 86_400_000_000_000)
