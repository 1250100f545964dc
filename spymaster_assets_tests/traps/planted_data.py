"""Leaks in features, labels, joins, resampling and calendars: one honest asset of a pipeline replaced by a mistaken one."""

from __future__ import annotations

from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import polars as pl

from spymaster_assets.proof.known import KnownTable
from spymaster_assets_tests.traps.graphs import at_end, leak
from spymaster_assets_tests.traps.market import BAR_NS
from spymaster_assets_tests.traps.pipelines import (
    BAR,
    HORIZON,
    HOURS,
    LABELS,
    QUOTES,
    SIGNALS,
    TOUCHES,
    at_start,
    bar_frame,
    feature_frame,
    label_frame,
    touch_frame,
    with_session,
)

BASE = ("session", "opens_ns", "closes_ns", "end_ns", "close", "ret_1", "ret_3", "vol_6", "flow", "spread")


def with_feature(bars: KnownTable, flow: pl.Expr) -> KnownTable:
    """The usual features with another one as `flow`."""
    frame = feature_frame(bars.frame).with_columns(bars.frame.select(flow.alias("flow")))
    return at_end(frame.select(BASE))


# features


@leak("features", SIGNALS, at="features")
def next_bar_return(bars: KnownTable) -> KnownTable:
    """shift(-1) where shift(1) was meant."""
    return with_feature(bars, pl.col("close").shift(-1) / pl.col("close") - 1)


@leak("features", SIGNALS, at="features")
def centred_mean(bars: KnownTable) -> KnownTable:
    """A smoothing window that is centred."""
    return with_feature(bars, pl.col("close").rolling_mean(5, center=True))


@leak("features", SIGNALS, at="features")
def filled_backward(bars: KnownTable) -> KnownTable:
    """Start-up nulls of a rolling mean filled from the first value that follows."""
    return with_feature(bars, pl.col("volume").rolling_mean(4).over("session").backward_fill())


@leak("features", SIGNALS, at="features")
def session_high(bars: KnownTable) -> KnownTable:
    """Distance to the high of the daily bar, which is that of the whole day."""
    return with_feature(bars, pl.col("high").max().over("session") - pl.col("close"))


@leak("features", SIGNALS, at="features")
def volume_rank_of_day(bars: KnownTable) -> KnownTable:
    """Rank of a bar's volume among all bars of its day."""
    return with_feature(bars, pl.col("volume").rank("ordinal").over("session") / 13)


@leak("features", SIGNALS, at="features")
def volume_profile(bars: KnownTable) -> KnownTable:
    """Distance to the price at which most was traded, profile over the whole day."""
    busiest = pl.col("close").sort_by("volume", descending=True).first().over("session")
    return with_feature(bars, busiest - pl.col("close"))


@leak("features", SIGNALS, at="features")
def faint(bars: KnownTable) -> KnownTable:
    """The next return enters in the twelfth decimal."""
    ahead = pl.col("close").shift(-1) / pl.col("close") - 1
    return with_feature(bars, pl.col("volume_a") / pl.col("volume") + 1e-12 * ahead)


@leak("features", SIGNALS, at="features")
def on_half_days(bars: KnownTable) -> KnownTable:
    """The whole day's volume as denominator, but on short days only."""
    short = pl.col("closes_ns") - pl.col("opens_ns") < 6 * 3_600_000_000_000
    day = (
        pl.when(short)
        .then(pl.col("volume").sum().over("session"))
        .otherwise(pl.col("volume").cum_sum().over("session"))
    )
    return with_feature(bars, pl.col("volume") / day)


@leak("features", SIGNALS, at="features")
def only_up(bars: KnownTable) -> KnownTable:
    """The higher of this close and the next low: blind to a fall."""
    return with_feature(bars, pl.max_horizontal("close", pl.col("low").shift(-1)) - pl.col("close"))


@leak("features", SIGNALS, at="features")
def only_down(bars: KnownTable) -> KnownTable:
    """Whether the bar's low holds in the next bar: blind to a rise."""
    return with_feature(bars, (pl.col("low").shift(-1) >= pl.col("low")).cast(pl.Float64))


@leak("features", SIGNALS, at="features")
def null_before_gap(bars: KnownTable) -> KnownTable:
    """Values are honest, but missing where no bar follows in the session."""
    follows = pl.col("start_ns").shift(-1).over("session").is_not_null()
    return with_feature(bars, pl.when(follows).then(pl.col("volume_a") / pl.col("volume")))


@leak("features", SIGNALS, at="features")
def integers_when_whole(bars: KnownTable) -> KnownTable:
    """Downcast to the smallest type that holds all values, today's and later ones."""
    frame = feature_frame(bars.frame).with_columns((bars.frame["volume"]).shrink_dtype().alias("flow"))
    return at_end(frame.select(BASE))


@leak("features", SIGNALS, at="features")
def days_by_volume(bars: KnownTable) -> KnownTable:
    """Every value is honest, but days are listed by what they trade in the end."""
    frame = feature_frame(bars.frame).with_columns(bars.frame["volume"])
    day = pl.col("volume").sum().over("session")
    return at_end(frame.sort(day, "end_ns").select(BASE))


@leak("features", TOUCHES, at="touches")
def distance_of_own_bar(bars: KnownTable) -> KnownTable:
    """Declared known when the touch bar starts, measured from its close."""
    frame = touch_frame(bars.frame)
    return at_start(frame.with_columns((pl.col("level") - pl.col("close")).alias("distance")), "distance")


@leak("features", TOUCHES, at="touches")
def busy_touches_before(bars: KnownTable) -> KnownTable:
    """Touches so far whose bar traded more than 350: its own bar is counted."""
    busy = (pl.col("volume") > 350).cum_sum().over("session")
    return at_start(touch_frame(bars.frame).with_columns(busy.alias("before")))


@leak("features", TOUCHES, at="touches")
def side_of_own_bar(bars: KnownTable) -> KnownTable:
    """The side of the level that the touch bar closes on, declared as that of the approach."""
    side = (pl.col("level") - pl.col("close")).sign()
    return at_start(touch_frame(bars.frame).with_columns(side.alias("side")))


# labels


@leak("labels", LABELS, at="labels")
def longer_than_declared(bars: KnownTable) -> KnownTable:
    """Measured over four bars, declared complete after three."""
    ahead = pl.col("close").shift(-HORIZON - 1).over("session")
    out = bars.frame.with_columns(ahead=ahead, known=pl.col("end_ns").shift(-HORIZON).over("session"))
    return at_end(
        out.select(
            "end_ns",
            (pl.col("ahead") / pl.col("close") - 1).alias("y"),
            (pl.col("ahead") > pl.col("close")).cast(pl.Int64).alias("up"),
            pl.col("known").alias("label_known_ns"),
        ).drop_nulls(),
        "label_known_ns",
    )


@leak("labels", LABELS, at="labels")
def declared_early(bars: KnownTable) -> KnownTable:
    """Declared known when the bar that decides it starts."""
    out = label_frame(bars.frame).with_columns(pl.col("label_known_ns") - BAR_NS)
    return at_end(out, "label_known_ns")


@leak("labels", LABELS, at="labels")
def threshold_of_sample(bars: KnownTable) -> KnownTable:
    """Up means more than a quarter of the whole sample's standard deviation."""
    out = label_frame(bars.frame)
    return at_end(
        out.with_columns((pl.col("y") > 0.25 * pl.col("y").std()).cast(pl.Int64).alias("up")), "label_known_ns"
    )


@leak("labels", LABELS, at="labels")
def balanced_by_median(bars: KnownTable) -> KnownTable:
    """Classes made equal by splitting at the median of all labels."""
    out = label_frame(bars.frame)
    return at_end(out.with_columns((pl.col("y") > pl.col("y").median()).cast(pl.Int64).alias("up")), "label_known_ns")


@leak("labels", LABELS, at="labels")
def over_night(bars: KnownTable) -> KnownTable:
    """Without `over('session')` the last bars of a day look into the next morning, declared known by the clock."""
    ahead = pl.col("close").shift(-HORIZON)
    out = bars.frame.select(
        "end_ns",
        (ahead / pl.col("close") - 1).alias("y"),
        (ahead > pl.col("close")).cast(pl.Int64).alias("up"),
        (pl.col("end_ns") + HORIZON * BAR_NS).alias("label_known_ns"),
    ).drop_nulls()
    return at_end(out, "label_known_ns")


@leak("labels", LABELS, at="labels")
def barrier_time(bars: KnownTable) -> KnownTable:
    """Declared known when the barrier was touched, yet the outcome is the excursion over the whole horizon."""
    out = label_frame(bars.frame).join(bars.frame.select("end_ns", "close"), on="end_ns", maintain_order="left")
    nexts = bars.frame.select(
        "end_ns",
        pl.col("high").shift(-1).over("session").alias("first_high"),
        pl.col("end_ns").shift(-1).over("session").alias("first_ns"),
        pl.max_horizontal(*(pl.col("high").shift(-k).over("session") for k in range(1, HORIZON + 1))).alias("most"),
    )
    out = out.join(nexts, on="end_ns", maintain_order="left")
    hit = pl.col("first_high") > pl.col("close") + 20
    return at_end(
        out.select(
            "end_ns",
            (pl.col("most") / pl.col("close") - 1).alias("y"),
            "up",
            pl.when(hit).then("first_ns").otherwise("label_known_ns").alias("label_known_ns"),
        ),
        "label_known_ns",
    )


@leak("labels", LABELS, at="labels")
def settled_at_close(bars: KnownTable) -> KnownTable:
    """Rows that are undecided within the horizon take the close of the day."""
    out = label_frame(bars.frame).join(
        bars.frame.select("end_ns", "close", last=pl.col("close").last().over("session")),
        on="end_ns",
        maintain_order="left",
    )
    still = pl.col("y").abs() < 0.0005
    y = pl.when(still).then(pl.col("last") / pl.col("close") - 1).otherwise("y")
    return at_end(out.select("end_ns", y.alias("y"), "up", "label_known_ns"), "label_known_ns")


@leak("labels", LABELS, at="labels")
def only_if_it_trades_on(bars: KnownTable) -> KnownTable:
    """A row exists only if the bar after its horizon is a busy one."""
    busy = (bars.frame["volume"].shift(-HORIZON - 1) > 200).fill_null(True)
    kept = bars.frame.filter(busy).select("end_ns")
    return at_end(label_frame(bars.frame).join(kept, on="end_ns", how="semi", maintain_order="left"), "label_known_ns")


# joins


@leak("joins", QUOTES, at="quoted")
def forward_join(bars: KnownTable, quotes: pl.DataFrame) -> KnownTable:
    """join_asof with strategy forward: the first quote after the bar."""
    left = bars.frame.select("session", "end_ns", "close")
    right = quotes.select("recv_ns", "bid", "ask", "depth")
    return at_end(left.join_asof(right, left_on="end_ns", right_on="recv_ns", strategy="forward"))


@leak("joins", QUOTES, at="quoted")
def nearest_join(bars: KnownTable, quotes: pl.DataFrame) -> KnownTable:
    """join_asof with strategy nearest: now and then a quote after the bar."""
    left = bars.frame.select("session", "end_ns", "close")
    right = quotes.select("recv_ns", "bid", "ask", "depth")
    return at_end(left.join_asof(right, left_on="end_ns", right_on="recv_ns", strategy="nearest"))


@leak("joins", QUOTES, at="quoted")
def by_event_time(bars: KnownTable, quotes: pl.DataFrame) -> KnownTable:
    """Joined by when quotes were made, not when they were received."""
    left = bars.frame.select("session", "end_ns", "close").with_columns((pl.col("end_ns") - 1).alias("at_ns"))
    right = quotes.select("event_ns", "bid", "ask", "depth").sort("event_ns")
    return at_end(left.join_asof(right, left_on="at_ns", right_on="event_ns", strategy="backward").drop("at_ns"))


@leak("joins", QUOTES, at="quoted")
def by_date(bars: KnownTable, quotes: pl.DataFrame) -> KnownTable:
    """The day's last quote joined to every bar of that day."""
    day = with_session(quotes).group_by("session", maintain_order=True).agg(pl.col("bid", "ask", "depth").last())
    return at_end(
        bars.frame.select("session", "end_ns", "close").join(day, on="session", how="left", maintain_order="left")
    )


@leak("joins", QUOTES, at="quoted")
def filled_from_later(bars: KnownTable, quotes: pl.DataFrame) -> KnownTable:
    """Honest join; missing quotes are then filled backward after they were filled forward."""
    left = bars.frame.select("session", "end_ns", "close").with_columns((pl.col("end_ns") - 1).alias("at_ns"))
    right = quotes.select("recv_ns", "bid", "ask", "depth")
    out = left.join_asof(right, left_on="at_ns", right_on="recv_ns", strategy="backward").drop("at_ns")
    filled = pl.col("bid", "ask", "depth").forward_fill(limit=1).backward_fill()
    return at_end(out.with_columns(filled))


def released(bars: KnownTable, releases: pl.DataFrame) -> KnownTable:
    """Bars with the last figure of each series received before their end."""
    out = bars.frame.select("end_ns", (pl.col("end_ns") - 1).alias("at_ns"))
    for name in ("claims", "jobs", "prices"):
        part = releases.filter(pl.col("series") == name).select("recv_ns", pl.col("value").alias(name))
        out = out.join_asof(part, left_on="at_ns", right_on="recv_ns", strategy="backward").drop("recv_ns")
    return at_end(out.select("end_ns", "claims", "jobs", "prices"))


def surprise(released: KnownTable) -> KnownTable:
    """Change of the sum of figures since the bar before."""
    total = pl.col("claims") + pl.col("jobs") + pl.col("prices")
    return at_end(released.frame.select("end_ns", total.diff().alias("surprise")))


RELEASES = {"bars": QUOTES["bars"], "released": released, "surprise": surprise}


@leak("joins", RELEASES, at="released")
def by_reference_period(bars: KnownTable, releases: pl.DataFrame) -> KnownTable:
    """Figures joined by the period that they describe, hours before they were published."""
    out = bars.frame.select("end_ns")
    first = releases.filter(pl.col("revision") == 0).sort("event_ns")
    for name in ("claims", "jobs", "prices"):
        part = first.filter(pl.col("series") == name).select("event_ns", pl.col("value").alias(name))
        out = out.join_asof(part, left_on="end_ns", right_on="event_ns", strategy="backward").drop("event_ns")
    return at_end(out.select("end_ns", "claims", "jobs", "prices"))


@leak("joins", RELEASES, at="released")
def revised_figures(bars: KnownTable, releases: pl.DataFrame) -> KnownTable:
    """The latest revision of a figure under the date of its first publication."""
    final = releases.group_by("series", "event_ns", maintain_order=True).agg(
        pl.col("recv_ns").first(), pl.col("value").last()
    )
    return released(bars, final.sort("recv_ns"))


@leak("joins", RELEASES, at="released")
def pivoted(bars: KnownTable, releases: pl.DataFrame) -> KnownTable:
    """A pivot makes a column of every series that there ever is."""
    wide = releases.with_row_index().pivot(
        "series", index=["index", "recv_ns"], values="value", aggregate_function="last"
    )
    wide = wide.drop("index").with_columns(pl.exclude("recv_ns").forward_fill())
    out = bars.frame.select("end_ns", (pl.col("end_ns") - 1).alias("at_ns"))
    return at_end(
        out.join_asof(wide, left_on="at_ns", right_on="recv_ns", strategy="backward").drop("at_ns", "recv_ns")
    )


# resampling


@leak("resampling", SIGNALS, at="bars")
def stamped_at_start(trades: pl.DataFrame) -> KnownTable:
    """group_by_dynamic labels a bar by its left edge, and the label is taken for the time at which it is known."""
    out = bar_frame(trades)
    return KnownTable(out, out["start_ns"].to_numpy(), name="start_ns")


@leak("resampling", SIGNALS, at="bars")
def closed_right(trades: pl.DataFrame) -> KnownTable:
    """Bars (start, end]: what is received at the very end belongs to the bar that is read at that time."""
    return at_end(bar_frame(trades.with_columns(pl.col("recv_ns") - 1)))


@leak("resampling", SIGNALS, at="bars")
def binned_by_event_time(trades: pl.DataFrame) -> KnownTable:
    """Trades are put into bars by when they happened: late reports change bars that are over."""
    return at_end(bar_frame(trades.with_columns(recv_ns=pl.col("event_ns")).sort("recv_ns")))


@leak("resampling", SIGNALS, at="bars")
def corrected(trades: pl.DataFrame) -> KnownTable:
    """Deduplicated by number, the last version kept in the place of the first."""
    last = trades.group_by("id", maintain_order=True).agg(pl.col("recv_ns").first(), pl.exclude("id", "recv_ns").last())
    return at_end(bar_frame(last.sort("recv_ns", maintain_order=True)))


@leak("resampling", SIGNALS, at="features")
def hourly_broadcast(bars: KnownTable) -> KnownTable:
    """Aggregated to two bars and joined back to both of them."""
    pair = (pl.col("end_ns") - pl.col("opens_ns") - 1) // (2 * BAR_NS)
    hour = bars.frame.with_columns(pair.alias("pair"))
    mean = hour.select(pl.col("volume").mean().over("session", "pair")).to_series()
    return at_end(feature_frame(bars.frame).with_columns(mean.alias("flow")).select(BASE))


@leak("resampling", SIGNALS, at="features")
def interpolated(bars: KnownTable) -> KnownTable:
    """Hourly values drawn as a line between known points, half an hour before the second is known."""
    pair = (pl.col("end_ns") - pl.col("opens_ns")) // BAR_NS % 2 == 0
    return with_feature(bars, pl.when(pair).then(pl.col("close")).interpolate())


@leak("resampling", SIGNALS, at="features")
def daily_at_midnight(bars: KnownTable) -> KnownTable:
    """pandas: the day's last close, stamped at midnight of that day, reindexed forward onto the bars."""
    index = pd.to_datetime(bars.frame["end_ns"].to_numpy())
    close = pd.Series(bars.frame["close"].to_numpy(), index=index)
    daily = close.resample("1D").last().dropna().reindex(index, method="ffill")
    frame = feature_frame(bars.frame).with_columns(pl.Series("flow", daily.to_numpy(dtype=np.float64)))
    return at_end(frame.select(BASE))


@leak("resampling", SIGNALS, at="bars")
def volume_bars(trades: pl.DataFrame) -> KnownTable:
    """Volume bars whose size is the whole sample's volume divided by 250."""
    ordered = with_session(trades).drop("start_ns", "end_ns")
    bucket = ordered["size"].sum() // 250
    out = ordered.with_columns((pl.col("size").cum_sum() // bucket).alias("bucket"))
    made = out.group_by("bucket", maintain_order=True).agg(
        pl.col("session", "opens_ns", "closes_ns").first(),
        pl.col("recv_ns").first().alias("start_ns"),
        *BAR,
    )
    # a bar is over when the next one begins
    return at_end(made.with_columns((pl.col("start_ns").shift(-1) + 1).alias("end_ns")).drop_nulls().drop("bucket"))


@leak("resampling", SIGNALS, at="bars")
def largest_of_hour(trades: pl.DataFrame) -> KnownTable:
    """The price of the hour's largest trade beside both of its half hours."""
    inside = with_session(trades)
    hour = (pl.col("start_ns") - pl.col("opens_ns")) // (2 * BAR_NS)
    largest = inside.group_by("session", hour.alias("hour"), maintain_order=True).agg(
        pl.col("price").sort_by("size").last().alias("largest")
    )
    out = bar_frame(trades).with_columns(hour.alias("hour"))
    return at_end(out.join(largest, on=["session", "hour"], how="left", maintain_order="left").drop("hour"))


# calendars


def with_close(bars: KnownTable, closes: pl.Expr) -> KnownTable:
    """Bars with the minutes to a close."""
    return at_end(
        bars.frame.select("session", "end_ns", "close", ((closes - pl.col("end_ns")) / 6e10).alias("to_close"))
    )


@leak("calendars", HOURS, at="hours")
def close_from_last_bar(bars: KnownTable) -> KnownTable:
    """The close of a day is where its data end."""
    return with_close(bars, pl.col("end_ns").max().over("session"))


@leak("calendars", HOURS, at="hours")
def half_day_by_count(bars: KnownTable) -> KnownTable:
    """A half day is one with fewer than 13 bars."""
    short = pl.len().over("session") < 13
    half = pl.col("opens_ns") + 7 * BAR_NS
    return with_close(bars, pl.when(short).then(half).otherwise(pl.col("opens_ns") + 13 * BAR_NS))


@leak("calendars", HOURS, at="hours")
def last_day_of_month(bars: KnownTable) -> KnownTable:
    """The last trading day of a month is its last date in the data."""
    month = pl.col("session").str.slice(0, 7)
    last = pl.col("session") == pl.col("session").max().over(month)
    return with_close(bars, pl.col("closes_ns") + last.cast(pl.Int64) * 60_000_000_000)


@leak("calendars", HOURS, at="hours")
def days_to_the_end(bars: KnownTable) -> KnownTable:
    """Days to expiry counted to the last session of the sample."""
    left = pl.col("session").rank("dense").max() - pl.col("session").rank("dense")
    return with_close(bars, pl.col("closes_ns") + left.cast(pl.Int64) * 86_400_000_000_000)


@leak("calendars", HOURS, at="hours")
def before_a_holiday(bars: KnownTable) -> KnownTable:
    """A holiday is near where the next record is more than a day away."""
    gap = pl.col("start_ns").shift(-1) - pl.col("end_ns") > 86_400_000_000_000
    return with_close(bars, pl.col("closes_ns") + gap.fill_null(False).cast(pl.Int64))


@leak("calendars", HOURS, at="hours")
def fixed_offset(bars: KnownTable) -> KnownTable:
    """Ends of bars go through New York wall time and back with winter's offset: an hour early before the clocks change."""
    wall = [
        pd.Timestamp(int(t), tz="UTC").tz_convert(ZoneInfo("America/New_York")).tz_localize(None)
        for t in bars.frame["end_ns"]
    ]
    utc = (pd.DatetimeIndex(wall) + pd.Timedelta(hours=5)).as_unit("ns").asi8
    known = bars.frame["end_ns"].to_numpy() - (utc - bars.frame["end_ns"].to_numpy())
    frame = with_close(bars, pl.col("closes_ns")).frame
    return KnownTable(frame, known, name="end_ns")


def front_bars(trades: pl.DataFrame, volumes: pl.DataFrame, at: str) -> KnownTable:
    """Bars of the contract that `volumes` (session, contract, size) says is in front, in the session named by `at`."""
    front = volumes.sort("size", "contract").group_by("session", maintain_order=True).agg(pl.col("contract").last())
    inside = with_session(trades).join(front, left_on=at, right_on="session", suffix="_front", maintain_order="left")
    chosen = inside.filter(pl.col("contract") == pl.col("contract_front")).select(trades.columns)
    return at_end(bar_frame(chosen))


@leak("calendars", SIGNALS, at="bars")
def front_by_own_day(trades: pl.DataFrame) -> KnownTable:
    """The front month of a day is the contract that traded most on that day."""
    day = with_session(trades).group_by("session", "contract", maintain_order=True).agg(pl.col("size").sum())
    return front_bars(trades, day, "session")


@leak("calendars", SIGNALS, at="bars")
def roll_adjusted(trades: pl.DataFrame) -> KnownTable:
    """A continuous price: all before the roll is shifted by the roll's gap, known only then."""
    day = with_session(trades)
    first = day.filter(pl.col("contract") == "H5").group_by("session", maintain_order=True).agg(pl.len())
    rolled = first.filter(pl.col("len") > 60)["session"].min()
    if rolled is None:
        return at_end(bar_frame(trades))
    there = day.filter(pl.col("session") == rolled)
    gap = sum(
        sign * there.filter(pl.col("contract") == name)["price"].median()  # type: ignore[operator]
        for name, sign in (("H5", 1), ("Z4", -1))
        if there.filter(pl.col("contract") == name).height
    )
    rolls_ns = int(there["opens_ns"][0])
    before = pl.col("recv_ns") < rolls_ns
    return at_end(
        bar_frame(
            trades.with_columns(pl.when(before).then(pl.col("price") + int(gap)).otherwise("price").alias("price"))
        )
    )
