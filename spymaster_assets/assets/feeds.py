"""book_snapshots, option_flow, spot_basis: the optional feeds of a session, or the statement that they are missing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from spymaster_assets.assets.common import Made, check_each, each_partition, require_one_origin
from spymaster_assets.assets.market import MIN_REGULAR_COVERAGE, seen_inputs
from spymaster_assets.assets.windows import keyed_by_session, session_partitions
from spymaster_assets.errors import MissingInputError
from spymaster_assets.market.bars import read_bars, session_bars
from spymaster_assets.market.basis import SpotBasis, identity_basis, measured_basis
from spymaster_assets.market.book import BookSnapshots, book_from_parquet, book_to_parquet
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.dbn import file_sha256, unchanged
from spymaster_assets.market.feeds import (
    book_files,
    load_book,
    load_open_interest,
    load_option_trades,
    minute_coverage,
    option_source,
)
from spymaster_assets.market.files import FileEntry, SessionFiles, register_session
from spymaster_assets.market.instruments import PRICE_SCALE, Instrument, instrument
from spymaster_assets.market.options import OpenInterest
from spymaster_assets.market.tape import load_session_records, load_tape
from spymaster_assets.partitions import calendar_of
from spymaster_assets.resources import ArtifactRoot, MarketSource
from spymaster_assets.settings import OptionSettings, Settings, fingerprint
from spymaster_assets.signals.context import SessionBars
from spymaster_assets.signals.options import OptionFeed, flow_from_parquet, flow_to_parquet, option_flow
from spymaster_assets.store import Artifact, ArtifactStore, dump_json
from spymaster_assets.tables import parquet_bytes

BOOK, FLOW, INTEREST, BASIS, ABOUT = (
    "book.parquet",
    "flow.parquet",
    "open_interest.parquet",
    "basis.parquet",
    "feed.json",
)
MAX_UNSOLVED_SHARE = 0.2
"""Share of option trades without a volatility over which the option check warns."""
MAX_CROSSED_SHARE = 0.01
"""Share of book records with bid at or above ask over which the book check warns."""


def feed_assets(settings: Settings) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Assets and checks of the optional feeds, in the group 'market', for one deployment."""
    partitions = session_partitions(settings)
    calendar = calendar_of(settings.symbol)
    spy = calendar_of("SPY")
    profile = settings.instrument
    book_settings, flow_settings = settings.of("book"), settings.of("option")
    common = keyed_by_session(settings, "market")

    @dg.asset(
        **common,
        deps=["market_files"],
        kinds={"databento", "numba"},
        code_version=fingerprint(calendar.rules, book_settings, settings.dataset, "1"),
        description="The last book of each 250 ms over regular hours with a margin, from mbp-10, mbo or mbp-1 files; without them the "
        "statement that the feed is missing.",
    )
    def book_snapshots(
        context: dg.AssetExecutionContext, artifacts: ArtifactRoot, source: MarketSource
    ) -> dg.MaterializeResult[Any]:
        def make(key: str) -> Made:
            session = calendar.session(key)
            registered = artifacts.store.load("market_files", key)
            files = book_files(source.entries, session, profile, settings.dataset)
            about: dict[str, Any] = {"present": bool(files), "simulated": settings.simulated}
            content: dict[str, bytes] = {}
            inputs = {"market_files": registered.sha256}
            if files:
                front = SessionFiles.from_json(registered.json("files.json")).front
                with unchanged(*(e.path for e in files)):
                    book = load_book(files, session, front.instrument_id, settings.book, front.raw_symbol)
                    inputs |= {e.name: file_sha256(e.path) for e in files}
                content[BOOK] = book_to_parquet(book)
                about |= book_coverage(book, session) | {"schema": files[0].header.schema}
            artifact = artifacts.store.publish(
                "book_snapshots",
                key,
                {ABOUT: dump_json(about), **content},
                inputs=inputs,
                metadata=seen_inputs(settings, source, key),
                settings=book_settings,
            )
            return Made(artifact, {"dagster/row_count": about.get("snapshots", 0), **_shown(about)})

        return each_partition(context, make)

    @dg.asset(
        **common,
        deps=["ohlcv_bars"],
        kinds={"parquet"},
        code_version=fingerprint(calendar.rules, spy.rules, profile.points_per_spy_dollar, "1"),
        description="Points per SPY dollar, minute by minute, where both prices are there; else a fixed ratio, labelled as the fallback.",
    )
    def spot_basis(
        context: dg.AssetExecutionContext, artifacts: ArtifactRoot, source: MarketSource
    ) -> dg.MaterializeResult[Any]:
        def make(key: str) -> Made:
            bars, own = read_bars(artifacts.store, key)
            minutes = SessionBars(calendar.session(key), bars).front(1)
            other, inputs = (None, {}) if settings.symbol == "SPY" else _spy_minutes(source, key)
            basis = (
                identity_basis()
                if settings.symbol == "SPY"
                else measured_basis(profile, minutes, other, calendar.session(key).close_ns)
            )
            about = {"source": basis.source, "fallback": basis.fallback, "minutes": len(basis.ratio)}
            artifact = artifacts.store.publish(
                "spot_basis",
                key,
                {ABOUT: dump_json(about), BASIS: parquet_bytes(basis.to_frame())},
                inputs={"ohlcv_bars": own.sha256, **inputs},
                metadata=seen_inputs(settings, source, key),
                settings=settings.of(),
            )
            shown = dict(about)
            if len(basis.ratio):
                shown |= {"first_ratio": float(basis.ratio[0]), "last_ratio": float(basis.ratio[-1])}
            return Made(artifact, shown)

        return each_partition(context, make)

    @dg.asset(
        **common,
        name="option_flow",
        deps=["market_files", "ohlcv_bars", spot_basis],
        kinds={"databento", "numba"},
        code_version=fingerprint(
            calendar.rules,
            flow_settings,
            settings.dataset,
            option_settings(settings.option, profile, profile.root).multiplier,
            "3",
        ),
        description="0DTE option trades with aggressor, spot at the time, implied volatility, greeks and dealer gamma, from DBN files and "
        "their definitions or a flat CSV file; without them the statement that the feed is missing.",
    )
    def option_flow_(
        context: dg.AssetExecutionContext, artifacts: ArtifactRoot, source: MarketSource
    ) -> dg.MaterializeResult[Any]:
        def make(key: str) -> Made:
            session = calendar.session(key)
            registered = artifacts.store.load("market_files", key)
            files = option_source(source.entries, source.folder, session, profile, settings.dataset)
            about: dict[str, Any] = {"present": files is not None, "simulated": settings.simulated}
            content: dict[str, bytes] = {}
            inputs = {"market_files": registered.sha256}
            if files is not None:
                basis, basis_artifact = read_basis(artifacts.store, key)
                own = files.root == profile.root
                inputs["spot_basis"] = basis_artifact.sha256
                registration = SessionFiles.from_json(registered.json("files.json"))
                ts_ns, price_e9, bars = _underlying(artifacts.store, source.folder, registration, session)
                inputs |= {a.asset: a.sha256 for a in bars}
                require_one_origin(registered, basis_artifact, *bars)
                if not own:
                    price_e9 = basis.to_strike_e9(price_e9, ts_ns)
                with unchanged(*files.files):
                    trades, interest = load_option_trades(files, session), load_open_interest(files, session)
                    inputs |= {p.relative_to(source.folder).as_posix(): file_sha256(p) for p in files.files}
                flow = option_flow(
                    trades, ts_ns, price_e9, calendar, option_settings(settings.option, profile, files.root)
                )
                content[FLOW] = flow_to_parquet(flow)
                if interest is not None:
                    content[INTEREST] = parquet_bytes(pl.DataFrame(vars(interest)))
                share, missing = minute_coverage(flow.ts_ns, session)
                about |= {
                    "schema": files.schema,
                    "root": files.root,
                    "from_ns": files.from_ns,
                    "until_ns": files.until_ns,
                    "trades": len(trades),
                    "undefined_trades": trades.undefined,
                    "contracts": len(trades.symbols),
                    "open_interest_contracts": None if interest is None else len(interest.contracts),
                    "implied_volatility": flow.status_counts,
                    "side_known_share": round(float((flow.aggressor != 0).mean()), 6) if len(trades) else None,
                    "coverage_regular": share,
                    "missing_regular_minutes": len(missing),
                }
            artifact = artifacts.store.publish(
                "option_flow",
                key,
                {ABOUT: dump_json(about), **content},
                inputs=inputs,
                metadata=seen_inputs(settings, source, key),
                settings=flow_settings,
            )
            return Made(artifact, {"dagster/row_count": about.get("trades", 0), **_shown(about)})

        return each_partition(context, make)

    @dg.asset_check(
        asset=book_snapshots,
        partitions_def=partitions,
        description="Where there is a book: no missing minute, no late start, next to no crossed state.",
    )
    def book_is_whole(context: dg.AssetCheckExecutionContext, artifacts: ArtifactRoot) -> dg.AssetCheckResult:
        return _check_present(context, artifacts.store, "book_snapshots", _book_faults)

    @dg.asset_check(
        asset=option_flow_,
        partitions_def=partitions,
        description="Where there are option trades: minutes without one, trades without a definition, volatilities that could not be "
        "solved.",
    )
    def options_are_covered(context: dg.AssetCheckExecutionContext, artifacts: ArtifactRoot) -> dg.AssetCheckResult:
        return _check_present(context, artifacts.store, "option_flow", _option_faults)

    return [book_snapshots, spot_basis, option_flow_, book_is_whole, options_are_covered]


def option_settings(option: OptionSettings, profile: Instrument, root: str | None) -> OptionSettings:
    """Settings with the contract's multiplier: 100 shares, or for options on the future itself what one is worth in SPY shares."""
    if root != profile.root or not profile.is_future:
        return option
    return replace(option, multiplier=profile.point_value_usd * profile.points_per_spy_dollar**2)


def book_coverage(book: BookSnapshots, session: Session) -> dict[str, Any]:
    """What people and checks want to know of a session's book: counts, crossed share, minutes without a snapshot, first snapshot."""
    share, missing = minute_coverage(book.ts_ns, session)
    records = sum(c.records for c in book.counts)
    return {
        "snapshots": len(book),
        "levels": book.levels,
        "records": records,
        "crossed_records": sum(c.crossed for c in book.counts),
        "undefined_top_records": sum(c.undefined_top for c in book.counts),
        "reversals": sum(c.reversals for c in book.counts),
        "clears": sum(c.clears for c in book.counts),
        "first_ns": int(book.ts_ns[0]) if len(book) else None,
        "starts_late_s": max(0.0, (int(book.ts_ns[0]) - session.regular_open_ns) / 1e9) if len(book) else None,
        "coverage_regular": share,
        "missing_regular_minutes": len(missing),
    }


def read_book(store: ArtifactStore, key: str) -> tuple[BookSnapshots | None, Artifact]:
    """Book of a session, None when the feed is missing, and its artifact."""
    artifact = store.load("book_snapshots", key)
    present = artifact.json(ABOUT)["present"]
    return (book_from_parquet(artifact.read(BOOK), str(artifact.path(BOOK))) if present else None), artifact


def read_basis(store: ArtifactStore, key: str) -> tuple[SpotBasis, Artifact]:
    """Basis of a session and its artifact."""
    artifact = store.load("spot_basis", key)
    about = artifact.json(ABOUT)
    frame = artifact.frame(BASIS, {"known_ns": pl.Int64(), "ratio": pl.Float64()}, ())
    basis = SpotBasis(about["source"], frame["known_ns"].to_numpy(), frame["ratio"].to_numpy(), about["fallback"])
    return basis, artifact


def read_options(store: ArtifactStore, key: str, profile: Instrument) -> tuple[OptionFeed | None, Artifact]:
    """Option feed of a session, None when it is missing, and its artifact."""
    artifact = store.load("option_flow", key)
    about = artifact.json(ABOUT)
    if not about["present"]:
        return None, artifact
    own = about["root"] == profile.root
    basis = identity_basis() if own else read_basis(store, key)[0]
    if basis.source == "fallback":  # a guessed ratio would put every strike at a wrong price: better no option columns
        return None, artifact
    feed = OptionFeed(
        flow_from_parquet(artifact.read(FLOW), str(artifact.path(FLOW))),
        about["root"],
        about["from_ns"],
        about["until_ns"],
        basis,
        profile.spy_dollar_e9 if own else PRICE_SCALE,
        _interest(artifact),
    )
    return feed, artifact


def _interest(artifact: Artifact) -> OpenInterest | None:
    if INTEREST not in artifact.files:
        return None
    schema = {"strike_e9": pl.Int64(), "is_call": pl.Boolean(), "contracts": pl.Int64()}
    frame = artifact.frame(INTEREST, schema, ())
    return OpenInterest(*(frame[c].to_numpy() for c in schema))


def _underlying(
    store: ArtifactStore, folder: Path, registration: SessionFiles, session: Session
) -> tuple[np.ndarray, np.ndarray, tuple[Artifact, ...]]:
    """Times and prices of the contract in front, from its trades or else its bars, and the bars' artifact if they were read."""
    if registration.schema == "trades":
        tape = load_tape(folder, registration, session=session)
        return tape.ts_ns, tape.price_e9, ()
    bars, artifact = read_bars(store, session.key)
    minutes = SessionBars(session, bars).front(1)
    return minutes["end_ns"].to_numpy(), minutes["close_e9"].to_numpy(), (artifact,)


def _spy_minutes(source: MarketSource, key: str) -> tuple[pl.DataFrame | None, dict[str, str]]:
    """One-minute bars of SPY on the same date, None when the folder has no SPY."""
    calendar = calendar_of("SPY")
    if key not in calendar.sessions(key, key):
        return None, {}
    entries: tuple[FileEntry, ...] = source.entries
    try:
        registration = register_session(entries, calendar, instrument("SPY"), key, None)
    except MissingInputError:
        return None, {}
    session = calendar.session(key)
    bars = session_bars(load_session_records(source.folder, registration, session=session), session, registration)
    return SessionBars(session, bars).front(1), {f.name: f.sha256 for f in registration.files}


def _book_faults(about: dict[str, Any]) -> list[str]:
    faults = []
    if not about["snapshots"]:
        return ["the files hold no snapshot of the contract in front"]
    if about["coverage_regular"] < MIN_REGULAR_COVERAGE:
        faults.append(f"{about['missing_regular_minutes']} regular-hours minutes without a snapshot")
    if about["starts_late_s"] > 60:
        faults.append(f"starts {about['starts_late_s']:.0f} s after the regular open")
    if about["crossed_records"] > MAX_CROSSED_SHARE * max(about["records"], 1):
        faults.append(f"{about['crossed_records']} of {about['records']} records have bid at or above ask")
    if about["reversals"]:
        faults.append(f"{about['reversals']} records were received before their predecessor")
    return faults


def _option_faults(about: dict[str, Any]) -> list[str]:
    faults = []
    if about["coverage_regular"] < MIN_REGULAR_COVERAGE:
        faults.append(f"{about['missing_regular_minutes']} regular-hours minutes without an option trade")
    if about["undefined_trades"]:
        faults.append(f"{about['undefined_trades']} option trades have no definition and were left out")
    unsolved = about["trades"] - about["implied_volatility"]["ok"]
    if unsolved > MAX_UNSOLVED_SHARE * max(about["trades"], 1):
        faults.append(
            f"{unsolved} of {about['trades']} volatilities could not be solved: {about['implied_volatility']}"
        )
    return faults


def _check_present(
    context: dg.AssetCheckExecutionContext,
    store: ArtifactStore,
    asset: str,
    faults_of: Callable[[dict[str, Any]], list[str]],
) -> dg.AssetCheckResult:
    """Faults of each session that has the feed; a feed that is missing is stated, not warned of."""

    def faults(key: str) -> list[str]:
        about = store.load(asset, key).json(ABOUT)
        return faults_of(about) if about["present"] else []

    return check_each(context, faults, dg.AssetCheckSeverity.WARN)


def _shown(about: dict[str, Any]) -> dict[str, Any]:
    return {k: dg.MetadataValue.json(v) if isinstance(v, dict) else v for k, v in about.items() if v is not None}
