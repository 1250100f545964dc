"""market_files, ohlcv_bars: what a session's input is, and its bars."""

from typing import Any

import dagster as dg
import polars as pl

from spymaster_assets.assets.common import Made, check_each, each_partition
from spymaster_assets.assets.windows import keyed_by_session, session_partitions
from spymaster_assets.errors import MissingInputError
from spymaster_assets.market.bars import bars_name, read_bars, session_bars
from spymaster_assets.market.files import (
    FRONT_SESSIONS,
    FileEntry,
    SessionFiles,
    read_registration,
    register_session,
    seen_files,
    session_inputs,
)
from spymaster_assets.market.session_truth import session_truth
from spymaster_assets.market.tape import load_session_records
from spymaster_assets.partitions import calendar_of
from spymaster_assets.resources import ArtifactRoot, MarketSource
from spymaster_assets.settings import TIMEFRAMES_MIN, Settings, fingerprint
from spymaster_assets.signals.context import SessionBars
from spymaster_assets.store import dump_json
from spymaster_assets.tables import parquet_bytes

MIN_REGULAR_COVERAGE = 0.98
"""Share of regular-hours minutes with a record below which the coverage check warns."""


def market_assets(settings: Settings) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Assets and checks of the group 'market' for one deployment."""
    partitions = session_partitions(settings)
    calendar = calendar_of(settings.symbol)
    common = keyed_by_session(settings, "market")

    @dg.asset(
        **common,
        kinds={"databento", "json"},
        code_version=fingerprint(calendar.rules, settings.dataset, "2"),
        description="What input a session has: files with hashes, sizes, counts, coverage and the contract in front. "
        "Refuses truncated, corrupt, disordered or twice-delivered files.",
    )
    def market_files(
        context: dg.AssetExecutionContext, artifacts: ArtifactRoot, source: MarketSource
    ) -> dg.MaterializeResult[Any]:
        def make(key: str) -> Made:
            previous = previous_registration(settings, source.entries, key)
            found = register_session(source.entries, calendar, settings.instrument, key, previous, settings.dataset)
            shown = found.to_json()
            artifact = artifacts.store.publish(
                "market_files",
                key,
                {"files.json": dump_json(shown)},
                inputs={f["name"]: f["sha256"] for f in shown["files"]},
                metadata=seen_inputs(settings, source, key),
                settings=settings.of(),
            )
            return Made(
                artifact,
                {
                    "schema": shown["schema"],
                    "simulated": shown["simulated"],
                    "files": dg.MetadataValue.json(shown["files"]),
                    "records": sum(f["session_record_count"] for f in shown["files"]),
                    "coverage_regular": shown["coverage_regular"],
                    "coverage_premarket": shown["coverage_premarket"],
                    "front": dg.MetadataValue.json(shown["front"]),
                    "contracts": dg.MetadataValue.json(shown["contracts"]),
                },
            )

        return each_partition(context, make)

    @dg.asset(
        **common,
        deps=[market_files],
        kinds={"parquet", "numba"},
        code_version=fingerprint(calendar.rules, TIMEFRAMES_MIN, "2"),
        description="Bars of 1, 2, 5, 10, 15, 20, 25, 30, 45 and 60 minutes, anchored at the session start, of every outright that traded. "
        "Prices are int64 in 1e-9 points.",
    )
    def ohlcv_bars(
        context: dg.AssetExecutionContext, artifacts: ArtifactRoot, source: MarketSource
    ) -> dg.MaterializeResult[Any]:
        def make(key: str) -> Made:
            registration, registered = read_registration(artifacts.store, key)
            session = calendar.session(key)
            bars = session_bars(
                load_session_records(source.folder, registration, session=session), session, registration
            )
            artifact = artifacts.store.publish(
                "ohlcv_bars",
                key,
                {bars_name(key): parquet_bytes(bars, 3)},
                inputs={"market_files": registered.sha256},
                settings=settings.of(),
            )
            minutes = SessionBars(session, bars).front(1)
            regular = minutes.filter(
                pl.col("start_ns").is_between(session.regular_open_ns, session.regular_close_ns - 1)
            )
            return Made(
                artifact,
                {
                    "dagster/row_count": bars.height,
                    "minutes": minutes.height,
                    "regular_minutes": regular.height,
                    "volume": int(minutes["volume"].sum()),
                },
            )

        return each_partition(context, make)

    @dg.asset_check(
        asset=market_files, partitions_def=partitions, description="Every regular-hours minute has a record."
    )
    def regular_hours_are_covered(
        context: dg.AssetCheckExecutionContext, artifacts: ArtifactRoot
    ) -> dg.AssetCheckResult:
        thin: dict[str, Any] = {}
        for key in context.partition_keys:
            found = artifacts.store.load("market_files", key).json("files.json")
            if found["coverage_regular"] < MIN_REGULAR_COVERAGE:
                thin[key] = {
                    "coverage": found["coverage_regular"],
                    "missing_minutes": len(found["missing_regular_minutes"]),
                }
        return dg.AssetCheckResult(
            passed=not thin,
            severity=dg.AssetCheckSeverity.WARN,
            metadata={"thin_sessions": dg.MetadataValue.json(thin)},
        )

    @dg.asset_check(
        asset=market_files,
        partitions_def=partitions,
        description="Two calendars and the tape agree on when regular hours end, or a reviewed override and the tape do.",
    )
    def session_ends_agree(context: dg.AssetCheckExecutionContext, artifacts: ArtifactRoot) -> dg.AssetCheckResult:
        odd: dict[str, Any] = {}
        for key in context.partition_keys:
            last_ns = artifacts.store.load("market_files", key).json("files.json")["last_regular_ns"]
            truth = session_truth(calendar, key, last_ns)
            if truth.faults:
                odd[key] = truth.to_json()
        return dg.AssetCheckResult(
            passed=not odd,
            severity=dg.AssetCheckSeverity.WARN,
            description="; ".join(f"{key}: {', '.join(t['faults'])}" for key, t in odd.items()) or None,
            metadata={"sessions": dg.MetadataValue.json(odd)},
        )

    @dg.asset_check(
        asset=ohlcv_bars, partitions_def=partitions, description="All timeframes agree with the one-minute bars."
    )
    def bars_agree(context: dg.AssetCheckExecutionContext, artifacts: ArtifactRoot) -> dg.AssetCheckResult:
        return check_each(context, lambda key: bar_faults(read_bars(artifacts.store, key)[0]))

    return [market_files, ohlcv_bars, regular_hours_are_covered, session_ends_agree, bars_agree]


def seen_inputs(settings: Settings, source: MarketSource, key: str) -> dict[str, Any]:
    """Manifest entries of an artifact that is made from files: `seen_files` of the session's, as they lay there."""
    files = session_inputs(source.entries, source.flat, calendar_of(settings.symbol), settings.instrument, key)
    return seen_files(files)


def previous_registration(
    settings: Settings, entries: tuple[FileEntry, ...], key: str, depth: int = FRONT_SESSIONS
) -> SessionFiles | None:
    """Registration of the session before, read from its files so that the order of materialization cannot matter.

    Only futures need it: its volumes name the front month, and its own front, which the session before it names, tells of a roll.
    None without files, as for the first session of a folder.
    """
    if not settings.instrument.is_future or depth == 0:
        return None
    calendar = calendar_of(settings.symbol)
    before = calendar.previous(key)
    try:
        earlier = previous_registration(settings, entries, before, depth - 1)
        return register_session(entries, calendar, settings.instrument, before, earlier, settings.dataset)
    except MissingInputError:
        return None


def bar_faults(bars: pl.DataFrame) -> list[str]:
    """Where bars contradict themselves: prices outside their range, or timeframes with another volume or extreme."""
    faults = []
    odd = bars.filter(
        (pl.col("low_e9") > pl.min_horizontal("open_e9", "close_e9"))
        | (pl.col("high_e9") < pl.max_horizontal("open_e9", "close_e9"))
    ).height
    if odd:
        faults.append(f"{odd} bars open or close outside their range")
    totals = bars.group_by("instrument_id", "timeframe_min").agg(
        pl.col("volume").sum(), pl.col("high_e9").max(), pl.col("low_e9").min()
    )
    spread = totals.group_by("instrument_id").agg(pl.col("volume", "high_e9", "low_e9").n_unique())
    return faults + [
        f"timeframes disagree in {column}" for column in ("volume", "high_e9", "low_e9") if (spread[column] > 1).any()
    ]
