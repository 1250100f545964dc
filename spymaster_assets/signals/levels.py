"""Price levels as they were known when each one-minute bar opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from spymaster_assets.contract import Contract
from spymaster_assets.errors import ArtifactError, MarketDataError, refusing
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.instruments import Instrument
from spymaster_assets.settings import MINUTE_NS, OptionSettings, SignalSettings
from spymaster_assets.signals.context import (
    CONTEXT_COLUMNS,
    SMA_LENGTHS,
    Roll,
    SessionBars,
    TwoMinuteHistory,
    last_at,
    minute_context,
    regular_hours_sigma,
    take,
    two_minute_history,
)
from spymaster_assets.signals.options import OptionFeed, option_coverage, strike_levels, wall_levels
from spymaster_assets.store import Artifact, dump_json
from spymaster_assets.tables import parquet_bytes

LEVEL_COLUMNS = ("start_ns", "level_kind", "level_kind_name", "level_price_e9", "strike_e9")
OPTION_KINDS = ("STRIKE", "CALL_WALL", "PUT_WALL")
"""Kinds that exist only with an option feed; every other kind is read off the bars."""
_TABLE = dict(zip(LEVEL_COLUMNS, (pl.Int64(), pl.Int8(), pl.String(), pl.Int64(), pl.Int64()), strict=True))
CONTEXT_SCHEMA = {
    name: pl.Int64() if name.endswith(("_ns", "_e9")) or name == "volume" else pl.Float64() for name in CONTEXT_COLUMNS
}
_TWO_MINUTE = {"end_ns": pl.Int64(), "close_e9": pl.Float64()}


@dataclass(frozen=True)
class LevelSet:
    """Levels of one session: `table` (LEVEL_COLUMNS, one row per regular-hours bar and level), `context` (see minute_context),
    the history behind the averages, rolls in the window and the warm-up volatility ($ per sqrt(minute), None without warm-up).

    strike_e9 is the strike, in the options' own 1e-9 dollars, that a level of OPTION_KINDS stands for, else null: where strikes are not
    quoted in the instrument's points its price moves with the basis while it stays the same strike.
    """

    table: pl.DataFrame
    context: pl.DataFrame
    history: TwoMinuteHistory
    rolls: tuple[Roll, ...]
    warmup_sigma: float | None


def build_levels(
    current: SessionBars,
    warmup: Sequence[SessionBars],
    instrument: Instrument,
    settings: SignalSettings,
    contract: Contract,
    observed_until_ns: int,
    options: OptionFeed | None = None,
    option_settings: OptionSettings | None = None,
) -> LevelSet:
    """Levels and minute context of a session from its bars and those of the sessions before it (oldest first).

    With `options` there are walls and strikes too. Only bars closed, and option trades received, by observed_until_ns are read.
    Raises MarketDataError when the session has no regular-hours bar.
    """
    history = two_minute_history(warmup, current, observed_until_ns)
    context = minute_context(current, history, settings, instrument.spy_dollar_e9, observed_until_ns)
    session = current.session
    regular = context.filter(
        (pl.col("start_ns") >= session.regular_open_ns) & (pl.col("start_ns") < session.regular_close_ns)
    )
    if (
        regular.height == 0
        and session.regular_close_ns > session.regular_open_ns
        and observed_until_ns >= session.regular_close_ns
    ):
        raise MarketDataError(
            f"session {session.key} has no bar in regular hours",
            where=f"[{session.regular_open_ns}, {session.regular_close_ns}) ns",
            remedy="check the input's coverage in market_files, or add a calendar override",
        )
    start = regular["start_ns"].to_numpy()
    prices = key_levels(start, context, history, session, settings, instrument.spy_dollar_e9)
    table = _long_table(start, prices, contract)
    rounds = _round_levels(start, context, instrument, settings, contract)
    parts = [table, rounds]
    if options is not None:
        parts += _option_levels(
            start,
            context,
            options.cut(observed_until_ns),
            session,
            instrument,
            option_settings or OptionSettings(),
            contract,
        )
    table = pl.concat(parts).sort("start_ns", "level_kind", "level_price_e9")
    return LevelSet(table, context, history, history.rolls, regular_hours_sigma(warmup, instrument.spy_dollar_e9))


def key_levels(
    start_ns: NDArray[np.int64],
    context: pl.DataFrame,
    history: TwoMinuteHistory,
    session: Session,
    settings: SignalSettings,
    spy_dollar_e9: int,
) -> dict[str, NDArray[np.float64]]:
    """Level price (1e-9 points, NaN where not known yet) by kind at each bar start, from bars closed by then.

    PM: extremes of 04:00-09:30. OR: extremes of the first 15 regular minutes, known from their end. SESSION: extremes since the
    session start. VWAP: volume-weighted price since the regular open. SMA_n: mean of the last n two-minute closes.
    """
    end = context["end_ns"].to_numpy()
    bar_start = context["start_ns"].to_numpy()
    high = context["high_e9"].to_numpy().astype(np.float64)
    low = context["low_e9"].to_numpy().astype(np.float64)
    closed = last_at(end, start_ns)
    out: dict[str, NDArray[np.float64]] = {}

    premarket = (bar_start >= session.premarket_open_ns) & (end <= session.regular_open_ns)
    opening_end_ns = session.regular_open_ns + settings.opening_range_min * MINUTE_NS
    opening = (bar_start >= session.regular_open_ns) & (end <= opening_end_ns)
    for name, mask, known_ns in (("PM", premarket, session.regular_open_ns), ("OR", opening, opening_end_ns)):
        known = (start_ns >= known_ns) & mask.any()
        out[f"{name}_HIGH"] = np.where(known, high[mask].max(initial=-np.inf), np.nan)
        out[f"{name}_LOW"] = np.where(known, low[mask].min(initial=np.inf), np.nan)

    out["SESSION_HIGH"] = take(np.maximum.accumulate(high), closed)
    out["SESSION_LOW"] = take(np.minimum.accumulate(low), closed)

    at = history.index_at(start_ns)
    for length in SMA_LENGTHS:
        out[f"SMA_{length}"] = take(history.sma(length), at)

    in_regular = bar_start >= session.regular_open_ns
    volume = np.where(in_regular, context["volume"].to_numpy(), 0).astype(np.float64)
    notional = np.cumsum(np.where(in_regular, context["vwap"].to_numpy(), 0.0) * volume)
    traded = np.cumsum(volume)
    with np.errstate(invalid="ignore", divide="ignore"):
        out["VWAP"] = take(np.where(traded > 0, notional / traded * spy_dollar_e9, np.nan), closed)
    return out


def level_matrix(table: pl.DataFrame, start_ns: NDArray[np.int64], kinds: Sequence[str]) -> NDArray[np.float64]:
    """(len(start_ns), len(kinds)) level prices in 1e-9 points from a level table, NaN where a kind is absent."""
    slots, slot = np.unique(start_ns, return_inverse=True)
    dense = np.full((len(slots), len(kinds)), np.nan)
    for k, kind in enumerate(kinds):
        rows = table.filter((pl.col("level_kind_name") == kind) & pl.col("start_ns").is_in(slots.tolist()))
        dense[np.searchsorted(slots, rows["start_ns"].to_numpy()), k] = rows["level_price_e9"].to_numpy()
    return dense[slot]


def _long_table(
    start_ns: NDArray[np.int64], prices: dict[str, NDArray[np.float64]], contract: Contract
) -> pl.DataFrame:
    parts = []
    for kind, values in prices.items():
        known = np.isfinite(values)
        parts.append(_rows(start_ns[known], kind, np.rint(values[known]).astype(np.int64), contract))
    return pl.concat(parts)


def _round_levels(
    start_ns: NDArray[np.int64],
    context: pl.DataFrame,
    instrument: Instrument,
    settings: SignalSettings,
    contract: Contract,
) -> pl.DataFrame:
    """Multiples of the round spacing around the last close before each bar."""
    spacing = round(settings.round_spacing_usd * instrument.spy_dollar_e9)
    closed = last_at(context["end_ns"].to_numpy(), start_ns)
    known = closed >= 0
    start, last = start_ns[known], context["close_e9"].to_numpy()[closed[known]]
    steps = np.arange(-settings.round_reach_spacings, settings.round_reach_spacings + 1)
    nearest = np.rint(last / spacing).astype(np.int64)
    price = ((nearest[:, None] + steps[None, :]) * spacing).ravel()
    return _rows(np.repeat(start, len(steps)), "ROUND", price.astype(np.int64), contract)


def _option_levels(
    start_ns: NDArray[np.int64],
    context: pl.DataFrame,
    options: OptionFeed,
    session: Session,
    instrument: Instrument,
    settings: OptionSettings,
    contract: Contract,
) -> list[pl.DataFrame]:
    """Walls and strikes as known when each bar starts, in points; strikes only near the last close, and only while no trade since the
    open can be missing: which strikes passed the volume would not be known."""
    basis = options.basis
    until_ns = min(options.until_ns, session.regular_close_ns)
    parts = []
    for kind, series in wall_levels(options.flow, session, settings, until_ns, options.from_ns).items():
        strike_e9 = take(series.price_e9, last_at(series.known_ns, start_ns))
        known = np.isfinite(strike_e9) & (start_ns <= until_ns)
        points = basis.to_points_e9(strike_e9[known], start_ns[known])
        parts.append(_rows(start_ns[known], kind, np.rint(points).astype(np.int64), contract, strike_e9[known]))
    strikes = strike_levels(options.flow, session, settings, until_ns)
    closed = last_at(context["end_ns"].to_numpy(), start_ns)
    coverage = option_coverage(options.flow, session.regular_open_ns, until_ns, settings, options.from_ns)
    whole = coverage.unbroken(session.regular_open_ns, start_ns)
    if len(strikes.price_e9) and len(start_ns):
        count = np.searchsorted(strikes.known_ns, start_ns, side="right")
        points = basis.to_points_e9(
            np.tile(strikes.price_e9, len(start_ns)), np.repeat(start_ns, len(strikes.price_e9))
        ).reshape(len(start_ns), -1)
        last = np.where(closed >= 0, context["close_e9"].to_numpy()[np.maximum(closed, 0)], 0)
        reach = settings.strike_reach_usd * instrument.spy_dollar_e9
        near = np.abs(points - last[:, None]) <= reach
        near &= (np.arange(points.shape[1])[None, :] < count[:, None]) & ((closed >= 0) & whole)[:, None]
        row, column = np.nonzero(near)
        price = np.rint(points[row, column]).astype(np.int64)
        parts.append(_rows(start_ns[row], "STRIKE", price, contract, strikes.price_e9[column]))
    return parts


def _rows(
    start_ns: NDArray[np.int64],
    kind: str,
    price_e9: NDArray[np.int64],
    contract: Contract,
    strike_e9: NDArray[np.float64] | None = None,
) -> pl.DataFrame:
    return pl.DataFrame({"start_ns": start_ns, "level_price_e9": price_e9}).select(
        pl.col("start_ns").cast(pl.Int64),
        pl.lit(contract.level_codes[kind], dtype=pl.Int8).alias("level_kind"),
        pl.lit(kind).alias("level_kind_name"),
        pl.col("level_price_e9").cast(pl.Int64),
        pl.lit(None if strike_e9 is None else pl.Series(strike_e9)).cast(pl.Int64).alias("strike_e9"),
    )


def levels_to_files(levels: LevelSet, warmup_sessions: Sequence[str]) -> dict[str, bytes]:
    """Files of the levels artifact: levels, context and two_minute Parquet tables and levels.json."""
    two_minute = pl.DataFrame({"end_ns": levels.history.end_ns, "close_e9": levels.history.close_e9})
    return {
        "levels.parquet": parquet_bytes(levels.table, 3),
        "context.parquet": parquet_bytes(levels.context, 3),
        "two_minute.parquet": parquet_bytes(two_minute, 3),
        "levels.json": dump_json(
            {
                "rolls": [asdict(r) for r in levels.rolls],
                "warmup_sigma": levels.warmup_sigma,
                "warmup_sessions": list(warmup_sessions),
            }
        ),
    }


def levels_from_files(artifact: Artifact) -> LevelSet:
    """Read a levels artifact back; its hashes are verified on the way. Raises ArtifactError when it is damaged."""
    meta = artifact.json("levels.json")
    two_minute = artifact.frame("two_minute.parquet", _TWO_MINUTE, ())
    with refusing(ArtifactError, "levels.json is not as it was written", where=str(artifact.folder)):
        rolls = tuple(Roll(**r) for r in meta["rolls"])
        sigma = None if meta["warmup_sigma"] is None else float(meta["warmup_sigma"])
    return LevelSet(
        artifact.frame("levels.parquet", _TABLE, ("strike_e9",)),
        artifact.frame("context.parquet", CONTEXT_SCHEMA),
        TwoMinuteHistory(two_minute["end_ns"].to_numpy(), two_minute["close_e9"].to_numpy(), rolls),
        rolls,
        sigma,
    )
