"""The signals table of one session: touches with every feature and label of features.json."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spymaster_assets.contract import STAGE_A_DECISION_S, Contract, load_contract
from spymaster_assets.errors import ArtifactError, refusing
from spymaster_assets.market.book import BookSnapshots
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.instruments import Instrument
from spymaster_assets.market.tape import SessionTape
from spymaster_assets.settings import (
    DELAYS_S,
    MINUTE_NS,
    NS,
    BarrierSettings,
    LabelSettings,
    OptionSettings,
    SignalSettings,
)
from spymaster_assets.signals import labels as lab
from spymaster_assets.signals import touches as tch
from spymaster_assets.signals import trend
from spymaster_assets.signals.barrier import BarrierFeatures, barrier_features
from spymaster_assets.signals.levels import LevelSet, level_matrix
from spymaster_assets.signals.options import (
    OptionFeed,
    dealer_features,
    gamma_flip_e9,
    gamma_ledger,
    gamma_pressure,
    gamma_pressure_accel,
    liquidity_pressure,
    net_break_pressure,
    open_interest_gamma,
)
from spymaster_assets.signals.tape import TapeFeatures, side_known, tape_features
from spymaster_assets.store import Artifact, ArtifactStore
from spymaster_assets.tables import read_parquet, require_schema

ATR_SCALED = ("distance", "distance_signed", "dist_to_pm_high", "dist_to_pm_low", "dist_to_sma_200", "dist_to_sma_400",
              "confluence_min_distance", "approach_distance")  # fmt: skip
"""Columns with `_atr` and `_pct` twins."""
_META = "spymaster."


@dataclass(frozen=True)
class SignalSet:
    """The signals `frame` (columns of the contract) and its `metadata` (JSON-able; stored in the Parquet file)."""

    frame: pl.DataFrame
    metadata: dict[str, Any]


def build_signals(
    levels: LevelSet,
    tape: SessionTape | None,
    session: Session,
    instrument: Instrument,
    instrument_id: int,
    signal: SignalSettings,
    label: LabelSettings,
    contract: Contract,
    observed_until_ns: int,
    simulated: bool = False,
    book: BookSnapshots | None = None,
    options: OptionFeed | None = None,
    barrier: BarrierSettings | None = None,
    option: OptionSettings | None = None,
) -> SignalSet:
    """Signals of a session from its levels and, where the feed exists, its trades (None: bars only), order book and options.

    Reads nothing after observed_until_ns; a label whose window ends later or after the regular close, or has a gap, is undefined. Why
    labels are undefined is counted in the metadata. Raises ContractError when a window of the settings is wider than features.json
    declares.
    """
    barrier = barrier or BarrierSettings()
    contract.require_windows(signal, barrier, label)
    context = levels.context
    touches = tch.find_touches(levels.table, context, instrument, signal).filter(
        pl.col("start_ns") + MINUTE_NS <= session.regular_close_ns
    )
    dollar = instrument.spy_dollar_e9
    t0 = touches["start_ns"].to_numpy()
    bar = touches["bar"].to_numpy().astype(np.int64)
    level_e9 = touches["level_price_e9"].to_numpy()
    sign = touches["direction_sign"].to_numpy()
    level = level_e9 / dollar
    spot = context["close"].to_numpy()[bar]
    volatility = context["volatility"].to_numpy()[bar]

    columns: dict[str, Any] = {
        "event_id": tch.event_ids(instrument.symbol, session.key, touches),
        "ts_ns": t0,
        "decision_ns": t0 + STAGE_A_DECISION_S * NS,
        **{f"confirm_ts_ns_{d}": t0 + s * NS for d, s in DELAYS_S.items()},
        "label_known_ns": lab.label_known_ns(t0, label.look_forward_s, session.regular_close_ns),
        "spot": spot,
        "previous_spot": context["close"].to_numpy()[np.maximum(bar - 1, 0)],
        "level_price": level,
        "level_price_e9": level_e9,
        "level_kind": touches["level_kind"],
        "level_kind_name": touches["level_kind_name"],
        "direction": np.where(sign > 0, "UP", "DOWN"),
        "direction_sign": sign,
        "distance": np.abs(level - spot),
        "distance_signed": level - spot,
        "atr": context["atr"].to_numpy()[bar],
        "volatility": volatility,
    }
    columns |= _context(touches, levels, session, level, signal, dollar)
    columns |= trend.moving_averages(level, t0, volatility, levels.history, signal, dollar)
    own_kind = touches["level_kind_name"].to_numpy().astype(str)

    def confluence(weights: dict[str, float]) -> dict[str, NDArray[np.float64]]:
        others = level_matrix(levels.table, t0, tuple(weights)) / dollar
        return trend.confluence(level, own_kind, others, weights, signal.confluence_band_usd)

    columns |= confluence(trend.CONFLUENCE_WEIGHTS)
    columns["confluence_alignment"] = trend.confluence_alignment(
        sign, columns["dist_to_sma_200"], columns["dist_to_sma_400"], columns["sma_200_slope"], columns["sma_400_slope"]
    )
    columns |= trend.approach(context, bar, sign, signal.lookback_min)
    first_of_cluster = _attempts(touches, columns, signal, dollar)  # its rows may be hidden: they go at the end
    for name in ATR_SCALED:
        columns[f"{name}_atr"] = columns[name] / (columns["atr"] + trend.EPSILON)
        columns[f"{name}_pct"] = columns[name] / (spot + trend.EPSILON)
    columns["reversion_pressure"] = _reversion_pressure(sign, columns)
    if tape is not None:
        columns |= _tape_columns(tape_features(tape, t0, level_e9, instrument, signal), sign, first_of_cluster, signal)

    option = option or OptionSettings()
    if book is not None:
        no_trades = SessionTape.empty() if tape is None else tape
        end_ns = np.full(len(t0), observed_until_ns)
        measured_book = barrier_features(book, no_trades, t0, level_e9, sign, instrument, barrier, end_ns)
        sides_known = side_known(no_trades, t0 + barrier.window_s * NS)
        columns |= _book_columns(measured_book, sides_known, first_of_cluster, option)
    if options is not None:
        wall_score = confluence(trend.WALL_WEIGHTS)["confluence_weighted_score"]
        columns |= _option_columns(options.cut(observed_until_ns), t0, level_e9, wall_score, session, option)
    if tape is not None and book is not None and options is not None:
        columns["net_break_pressure"] = net_break_pressure(
            *(columns[f"{name}_pressure"] for name in ("liquidity", "tape", "gamma", "reversion", "confluence"))
        )

    shown = ~touches["hidden"].to_numpy()
    features = pl.DataFrame(columns, nan_to_null=True).filter(shown)
    t0, level_e9, level, sign, volatility = (v[shown] for v in (t0, level_e9, level, sign, volatility))
    sigma = _label_sigma(volatility, levels.warmup_sigma)
    limits = lab.thresholds_usd(label, sigma)
    outcomes: dict[str, Any] = {"label_sigma": sigma, "threshold_1": limits[:, 0], "threshold_2": limits[:, 1]}
    path = lab.Path.of_trades(tape) if tape is not None else lab.Path.of_bars(context)
    defined_until_ns = min(session.regular_close_ns, observed_until_ns)
    forward_ns = label.look_forward_s * NS
    limits_e9 = lab.to_e9(limits, dollar)
    measured = {
        delay: lab.measure(
            path, t0 + seconds * NS, level_e9, limits_e9, forward_ns, defined_until_ns, dollar, label.max_missing_min
        )
        for delay, seconds in DELAYS_S.items()
    }
    for delay, excursions in measured.items():
        outcomes |= lab.label_columns(delay, excursions, sign, limits, level)

    frame = features.hstack(pl.DataFrame(outcomes, nan_to_null=True)).with_columns(
        pl.lit(session.key).alias("date"),
        pl.lit(instrument.symbol).alias("symbol"),
        pl.lit(instrument_id, dtype=pl.Int64).alias("instrument_id"),
        pl.lit(path.source).alias("label_source"),
    )
    frame = contract.conform(frame).sort("ts_ns", "level_kind", "level_price_e9")
    rates = lab.base_rates(
        path, context, t0, level_e9, sigma, label, session.regular_open_ns, defined_until_ns, dollar, measured
    )
    feeds = {
        "bars": True,
        "trades": tape is not None,
        "side": tape is not None and bool((tape.side != 0).any()),
        "book": book is not None,
        "options": options is not None,
        "open_interest": options is not None and options.open_interest is not None,
    }
    metadata = {
        "schema_version": contract.schema_version,
        "contract_sha256": contract.sha256,
        "session": session.key,
        "symbol": instrument.symbol,
        "label_mode": label.mode,
        "label_source": path.source,
        "simulated": simulated,
        "rows": frame.height,
        "base_rates": rates,
        "undefined_labels": {delay: excursions.undefined() for delay, excursions in measured.items()},
        "feeds": sorted(name for name, there in feeds.items() if there),
        "rolls": [r.to_json() for r in levels.rolls],
        "null_share": {
            c.name: round(frame[c.name].null_count() / max(frame.height, 1), 4) for c in contract.role("feature")
        },
    }
    return SignalSet(frame, metadata)


def signals_to_parquet(signals: SignalSet) -> bytes:
    """Parquet bytes (zstd) with the metadata in the file's schema; equal for equal input."""
    table = signals.frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    meta = {f"{_META}{k}": json.dumps(v, sort_keys=True) for k, v in signals.metadata.items()}
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(meta), buffer, compression="zstd", compression_level=3, write_statistics=False
    )
    return buffer.getvalue()


def signals_from_parquet(data: bytes, contract: Contract, where: str = "signals") -> SignalSet:
    """Read `signals_to_parquet` bytes; raise ArtifactError when they are damaged or were written under another contract."""
    frame, raw = read_parquet(data, where)
    with refusing(ArtifactError, "not a signals file", where=where, remedy="materialize signals again"):
        metadata = {k.removeprefix(_META): json.loads(v) for k, v in raw.items() if k.startswith(_META)}
    if metadata.get("contract_sha256") != contract.sha256:
        raise ArtifactError(
            "signals were written under another features.json",
            where=where,
            expected=f"contract {contract.sha256[:12]}, schema {contract.schema_version}",
            remedy="materialize signals again",
        )
    require_schema(frame, contract.schema, where)
    return SignalSet(frame, metadata)


def signals_name(key: str) -> str:
    """File name of a session's signals."""
    return f"signals_{key}.parquet"


def read_signals(store: ArtifactStore, key: str) -> tuple[SignalSet, Artifact]:
    """Signals of one session and their artifact."""
    artifact = store.load("signals", key)
    path = artifact.path(signals_name(key))
    return signals_from_parquet(artifact.read(path.name), load_contract(), str(path)), artifact


def _context(
    touches: pl.DataFrame,
    levels: LevelSet,
    session: Session,
    level: NDArray[np.float64],
    signal: SignalSettings,
    spy_dollar_e9: int,
) -> dict[str, Any]:
    t0 = touches["start_ns"].to_numpy()
    premarket = level_matrix(levels.table, t0, ("PM_HIGH", "PM_LOW")) / spy_dollar_e9
    since_open = (t0 - session.regular_open_ns) // MINUTE_NS
    return {
        "minutes_since_open": since_open,
        "minutes_to_close": (session.regular_close_ns - t0) // MINUTE_NS,
        "is_first_15m": since_open < signal.first_minutes_min,
        "dist_to_pm_high": level - premarket[:, 0],
        "dist_to_pm_low": level - premarket[:, 1],
    }


def _attempts(
    touches: pl.DataFrame, columns: dict[str, Any], signal: SignalSettings, spy_dollar_e9: int
) -> NDArray[np.int64]:
    """Add prior touches and attempt numbers to `columns`; return the row of each attempt cluster's first touch."""
    t0 = touches["start_ns"].to_numpy()
    level_e9 = touches["level_price_e9"].to_numpy()
    band = round(signal.attempt_band_usd * spy_dollar_e9)
    group = touches["level_kind"].to_numpy().astype(np.int64) * 2 + (touches["direction_sign"].to_numpy() > 0)
    gap_ns = signal.attempt_gap_min * MINUTE_NS
    index, cluster, first = tch.attempts(group, t0, level_e9, tch.strikes(touches), gap_ns, band)
    columns["prior_touches"] = prior = np.zeros(len(t0), np.int32)
    of_options, hidden = touches["of_options"].to_numpy(), touches["hidden"].to_numpy()
    for rows, counted in ((~of_options, ~of_options), (of_options, ~hidden)):
        if rows.any():
            earlier = tch.prior_touches(t0[counted], level_e9[counted], band)
            prior[rows & counted] = earlier[rows[counted]]
    columns["attempt_index"] = index
    columns["attempt_cluster_id"] = cluster
    return np.asarray(first)


def _tape_columns(
    tape: TapeFeatures, sign: NDArray[np.int8], first: NDArray[np.int64], signal: SignalSettings
) -> dict[str, Any]:
    velocity = np.clip(tape.velocity / signal.tape_velocity_norm_usd_per_s, -1.0, 1.0)
    return {
        "tape_imbalance": tape.imbalance,
        "tape_buy_vol": tape.buy_volume,
        "tape_sell_vol": tape.sell_volume,
        "tape_velocity": tape.velocity,
        "tape_trade_count": tape.trade_count,
        "sweep_detected": tape.sweep,
        "tape_pressure": np.clip(sign * (tape.imbalance + velocity) / 2.0, -1.0, 1.0),
        "tape_velocity_trend": tape.velocity - tape.velocity[first],
        "tape_imbalance_trend": tape.imbalance - tape.imbalance[first],
    }


def _book_columns(
    barrier: BarrierFeatures, sides_known: NDArray[np.bool_], first: NDArray[np.int64], option: OptionSettings
) -> dict[str, Any]:
    """Barrier columns of whole windows; one that is cut short or has a hole tells nothing comparable and is null.

    Without sides a fill cannot be told from a cancellation: the state rests on that, the other columns do not.
    """
    columns = barrier.columns()
    state = pl.Series(columns.pop("barrier_state"), dtype=pl.String)
    columns = {name: np.where(barrier.complete, values, np.nan) for name, values in columns.items()}
    columns["barrier_state"] = pl.select(pl.when(pl.Series(barrier.complete & sides_known)).then(state)).to_series()
    replenishment, delta = columns["barrier_replenishment_ratio"], columns["barrier_delta_liq"]
    return columns | {
        "liquidity_pressure": liquidity_pressure(delta, columns["wall_ratio"], option),
        "barrier_replenishment_trend": replenishment - replenishment[first],
        "barrier_delta_liq_trend": delta - delta[first],
    }


def _option_columns(
    options: OptionFeed,
    t0: NDArray[np.int64],
    level_e9: NDArray[np.int64],
    wall_score: NDArray[np.float64],
    session: Session,
    option: OptionSettings,
) -> dict[str, Any]:
    ledger = gamma_ledger(options.flow, session.regular_open_ns, options.until_ns, option, options.from_ns)
    strike_e9 = options.basis.to_strike_e9(level_e9, t0)
    dealers = dealer_features(ledger, t0, strike_e9, option, options.dollar_e9)
    columns: dict[str, Any] = {f.name: getattr(dealers, f.name) for f in fields(dealers)}
    for name in ("fuel_effect", "gamma_bucket"):
        columns[name] = pl.Series(columns[name].tolist(), dtype=pl.String)
    flip = gamma_flip_e9(ledger, strike_e9, t0, round(option.flip_range_usd * options.dollar_e9))
    if options.open_interest is not None:
        band = round(option.strike_range_usd * options.dollar_e9)
        interest = open_interest_gamma(options.flow, options.open_interest, strike_e9, t0, band, option.multiplier)
        columns["open_interest_gamma"] = np.where(ledger.covers(t0), interest, np.nan)
    return columns | {
        "dist_to_gamma_flip": (strike_e9 - flip) / options.dollar_e9,
        "wall_confluence": np.where(ledger.tells(t0 - option.wall_min * MINUTE_NS, t0), wall_score, np.nan),
        "gamma_pressure": gamma_pressure(dealers.gamma_exposure, option),
        "gamma_pressure_accel": gamma_pressure_accel(dealers.gamma_flow_accel_3m, option),
    }


def _reversion_pressure(sign: NDArray[np.int8], columns: dict[str, Any]) -> NDArray[np.float64]:
    """tanh(-sign x mean of the finite mean-reversion pressures); NaN when neither average exists."""
    both = np.stack([columns["mean_reversion_pressure_200"], columns["mean_reversion_pressure_400"]])
    count = np.isfinite(both).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(np.isfinite(both), both, 0.0).sum(axis=0) / count
    return np.tanh(-sign * mean)


def _label_sigma(volatility: NDArray[np.float64], warmup_sigma: float | None) -> NDArray[np.float64]:
    """Root mean square of the recent and the warm-up volatility, or the one that exists: the last 20 minutes alone are the
    premarket's at the open, which would make every threshold trivially small."""
    past = np.full(len(volatility), np.nan if warmup_sigma is None else warmup_sigma)
    both = np.stack([volatility, past])
    count = np.isfinite(both).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.sqrt(np.where(np.isfinite(both), both**2, 0.0).sum(axis=0) / count))
