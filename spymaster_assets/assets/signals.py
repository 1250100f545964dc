"""levels, signals: what is known of each level, its touches, their features and labels."""

from typing import Any

import dagster as dg
import polars as pl

from spymaster_assets.assets.common import Made, check_each, each_partition, require_one_origin
from spymaster_assets.assets.feeds import option_settings, read_basis, read_book, read_options
from spymaster_assets.assets.windows import keyed_by_session, session_partitions, warmup_window
from spymaster_assets.contract import load_contract
from spymaster_assets.evaluation import plots
from spymaster_assets.market.bars import read_bars
from spymaster_assets.market.files import read_registration
from spymaster_assets.market.tape import SessionTape, load_tape
from spymaster_assets.partitions import calendar_of
from spymaster_assets.resources import ArtifactRoot, MarketSource
from spymaster_assets.settings import DELAYS_S, Settings, fingerprint
from spymaster_assets.signals.build import build_signals, read_signals, signals_name, signals_to_parquet
from spymaster_assets.signals.checks import feed_faults, signal_faults
from spymaster_assets.signals.context import SessionBars
from spymaster_assets.signals.levels import build_levels, levels_from_files, levels_to_files


def signal_assets(settings: Settings) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Assets and checks of the group 'signals' for one deployment."""
    partitions = session_partitions(settings)
    calendar = calendar_of(settings.symbol)
    profile = settings.instrument
    contract = load_contract()
    level_settings = settings.of("signal", "option")
    touch_settings = settings.of("signal", "barrier", "option", "label")
    common = keyed_by_session(settings, "signals")

    @dg.asset(
        **common,
        deps=[
            dg.AssetDep("ohlcv_bars", partition_mapping=warmup_window(settings)),
            "market_files",
            "option_flow",
            "spot_basis",
        ],
        kinds={"parquet"},
        code_version=fingerprint(
            calendar.rules, profile.points_per_spy_dollar, level_settings, contract.level_codes, "4"
        ),
        description="Levels as they were known when each regular-hours minute opened, and the minute context behind them; "
        "averages reach over warm-up sessions and are adjusted at contract rolls.",
    )
    def levels(context: dg.AssetExecutionContext, artifacts: ArtifactRoot) -> dg.MaterializeResult[Any]:
        def make(key: str) -> Made:
            registration, registered = read_registration(artifacts.store, key)
            bars, own = read_bars(artifacts.store, key)
            warmup_keys = warmup_sessions(settings, key)
            options, option_artifact = read_options(artifacts.store, key, settings.instrument)
            basis = read_basis(artifacts.store, key)[1]
            warmup = []
            inputs = {
                f"ohlcv_bars[{key}]": own.sha256,
                "market_files": registered.sha256,
                "option_flow": option_artifact.sha256,
                "spot_basis": basis.sha256,
            }
            before = artifacts.store.require("ohlcv_bars", warmup_keys)
            require_one_origin(registered, own, option_artifact, basis, *before)
            for earlier in before:
                frame, _ = read_bars(artifacts.store, earlier.key)
                warmup.append(SessionBars(calendar.session(earlier.key), frame))
                inputs[f"ohlcv_bars[{earlier.key}]"] = earlier.sha256
            found = build_levels(
                SessionBars(calendar.session(key), bars),
                warmup,
                settings.instrument,
                settings.signal,
                contract,
                registration.observed_until_ns,
                options,
                settings.option,
            )
            artifact = artifacts.store.publish(
                "levels", key, levels_to_files(found, warmup_keys), inputs=inputs, settings=level_settings
            )
            kinds = found.table.group_by("level_kind_name").len().sort("len", descending=True)
            return Made(
                artifact,
                {
                    "dagster/row_count": found.table.height,
                    "warmup_sessions": dg.MetadataValue.json(warmup_keys),
                    "warmup_is_complete": len(warmup_keys) == settings.signal.sma_warmup_sessions,
                    "rolls": dg.MetadataValue.json([r.to_json() for r in found.rolls]),
                    "rows_by_kind": dg.MetadataValue.json(dict(kinds.iter_rows())),
                },
            )

        return each_partition(context, make)

    @dg.asset(
        **common,
        deps=[levels, "ohlcv_bars", "market_files", "book_snapshots", "option_flow", "spot_basis"],
        kinds={"parquet", "numba"},
        code_version=fingerprint(
            calendar.rules,
            profile,
            touch_settings,
            contract.sha256,
            "4",
        ),
        description="One row per touch episode with all features and labels of features.json, with schema version and contract hash "
        "in the file.",
    )
    def signals(
        context: dg.AssetExecutionContext, artifacts: ArtifactRoot, source: MarketSource
    ) -> dg.MaterializeResult[Any]:
        def make(key: str) -> Made:
            session = calendar.session(key)
            registration, registered = read_registration(artifacts.store, key)
            level_artifact = artifacts.store.load("levels", key)
            level_set = levels_from_files(level_artifact)
            tape: SessionTape | None = None
            if registration.schema == "trades":
                tape = load_tape(source.folder, registration, session=session)
            bars, bar_artifact = read_bars(artifacts.store, key)
            book, book_artifact = read_book(artifacts.store, key)
            options, option_artifact = read_options(artifacts.store, key, settings.instrument)
            basis = read_basis(artifacts.store, key)[1]
            require_one_origin(level_artifact, registered, bar_artifact, book_artifact, option_artifact, basis)
            made = build_signals(
                level_set,
                tape,
                session,
                settings.instrument,
                registration.front_id,
                settings.signal,
                settings.label,
                contract,
                registration.observed_until_ns,
                registration.simulated or settings.simulated,
                book,
                options,
                settings.barrier,
                option_settings(settings.option, profile, options.root if options else None),
            )
            artifact = artifacts.store.publish(
                "signals",
                key,
                {signals_name(key): signals_to_parquet(made)},
                inputs={
                    "levels": level_artifact.sha256,
                    "market_files": registered.sha256,
                    "book_snapshots": book_artifact.sha256,
                    "option_flow": option_artifact.sha256,
                    "spot_basis": basis.sha256,
                    "contract": contract.sha256,
                },
                settings={**touch_settings, "simulated": made.metadata["simulated"]},
            )
            minutes = SessionBars(session, bars).front(1)
            title = f"{settings.symbol} {key}: {made.frame.height} touches"
            chart = plots.session_chart(minutes, made.frame, level_set.table, session, title, settings.simulated)
            return Made(
                artifact,
                {
                    "dagster/row_count": made.frame.height,
                    "chart": dg.MetadataValue.md(plots.png_markdown(chart)),
                    "feeds": dg.MetadataValue.json(made.metadata["feeds"]),
                    "label_source": made.metadata["label_source"],
                    "label_mode": made.metadata["label_mode"],
                    "label_balance": dg.MetadataValue.md(
                        plots.png_markdown(plots.label_balance(label_counts(made.frame), settings.simulated))
                    ),
                    "base_rates": dg.MetadataValue.md(base_rate_table(made.metadata["base_rates"])),
                    "undefined_labels": dg.MetadataValue.json(made.metadata["undefined_labels"]),
                    "null_share": dg.MetadataValue.json(
                        {k: v for k, v in made.metadata["null_share"].items() if v > 0}
                    ),
                    "simulated": settings.simulated,
                },
            )

        return each_partition(context, make)

    @dg.asset_check(
        asset=signals,
        partitions_def=partitions,
        description="Columns, dtypes, value sets and ids follow features.json.",
    )
    def signals_follow_the_contract(
        context: dg.AssetCheckExecutionContext, artifacts: ArtifactRoot
    ) -> dg.AssetCheckResult:
        return check_each(context, lambda key: contract.violations(read_signals(artifacts.store, key)[0].frame))

    @dg.asset_check(
        asset=signals, partitions_def=partitions, description="Geometry, hours and label logic of every touch hold."
    )
    def signals_hold_invariants(context: dg.AssetCheckExecutionContext, artifacts: ArtifactRoot) -> dg.AssetCheckResult:
        def faults(key: str) -> list[str]:
            found = read_signals(artifacts.store, key)[0]
            return signal_faults(found.frame, calendar.session(key), settings.signal)

        return check_each(context, faults)

    @dg.asset_check(
        asset=signals, partitions_def=partitions, description="Nulls are where a feed is missing, and only there."
    )
    def nulls_match_the_feeds(context: dg.AssetCheckExecutionContext, artifacts: ArtifactRoot) -> dg.AssetCheckResult:
        def faults(key: str) -> list[str]:
            found = read_signals(artifacts.store, key)[0]
            return feed_faults(found.frame, contract, set(found.metadata["feeds"]))

        return check_each(context, faults, dg.AssetCheckSeverity.WARN)

    return [levels, signals, signals_follow_the_contract, signals_hold_invariants, nulls_match_the_feeds]


def warmup_sessions(settings: Settings, key: str) -> list[str]:
    """The sessions before `key` that its averages reach back to, oldest first; fewer at the first partitions and after a missing one."""
    calendar = calendar_of(settings.symbol)
    keys: list[str] = []
    while len(keys) < settings.signal.sma_warmup_sessions:
        before = calendar.previous(keys[0] if keys else key)
        if before < settings.first_session or before in settings.missing_sessions:
            break
        keys.insert(0, before)
    return keys


def base_rate_table(rates: dict[str, dict[str, dict[str, int]]]) -> str:
    """Markdown table of how often each threshold is reached."""
    lines = ["| labels | from | n | threshold 1 | threshold 2 |", "|---|---|---|---|---|"]
    for mode, delays in rates.items():
        for delay, r in delays.items():
            shares = [f"{r[k] / r['n']:.1%}" if r["n"] else "" for k in ("reached_1", "reached_2")]
            lines.append(f"| {mode} | {delay.replace('_', ' ')} | {r['n']} | {shares[0]} | {shares[1]} |")
    return "\n".join(lines)


def label_counts(frame: pl.DataFrame) -> dict[str, dict[str, int]]:
    """{delay: {outcome: rows}} of a signals frame."""
    return {
        delay: {str(r[0]): int(r[1]) for r in frame[f"outcome_{delay}"].value_counts(sort=True).iter_rows()}
        for delay in DELAYS_S
    }
