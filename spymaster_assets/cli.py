"""`spymaster`: demo, simulated market, proofs, explanations and the state of a deployment. Assets themselves are run through `dagster`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table

from spymaster_assets.contract import load_contract
from spymaster_assets.errors import ConfigError, MissingInputError, SpymasterError
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.simulate import write_market
from spymaster_assets.market.simulate_book import PROFILES, write_full_market
from spymaster_assets.partitions import (
    MODEL_ASSETS,
    REPORT_ASSET,
    SESSION_ASSETS,
    all_sessions,
    calendar_of,
    resolve,
    scheduled_asof,
)
from spymaster_assets.settings import Settings
from spymaster_assets.store import ArtifactStore, dump_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a fault the user can act on is printed without a traceback and ends with 1."""
    parser = argparse.ArgumentParser(prog="spymaster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="run the whole graph and write the report")
    demo.add_argument("--root", type=Path, default=Path("data/demo"), help="artifact root")
    demo.add_argument("--data", type=Path, help="folder of DBN files; a simulated market without it")
    demo.add_argument("--instrument", help="profile; guessed from the files without it")
    simulate = commands.add_parser("simulate", help="write a simulated market as DBN files")
    simulate.add_argument("folder", type=Path)
    simulate.add_argument("--first", default="2024-02-01", help="first session")
    simulate.add_argument("--sessions", type=_positive, default=30)
    simulate.add_argument("--seed", type=_seed, default=7)
    simulate.add_argument("--instrument", default="SPY")
    simulate.add_argument(
        "--profile",
        choices=("trades", *PROFILES),
        default="trades",
        help="trades: trades alone; small, full: order book and option trades too, at about 0.1 and 5 million book records a session",
    )
    prove = commands.add_parser(
        "prove", help="rebuild stored artifacts with another future and compare what was known before it"
    )
    prove.add_argument(
        "--session",
        action="append",
        default=[],
        help="a session to replay (default: the newest, and the newest DST change, roll and half day)",
    )
    prove.add_argument(
        "--asof",
        action="append",
        default=[],
        help="an as-of session to refit (default: the newest with models, and the newest with a report)",
    )
    prove.add_argument(
        "--cuts", type=_positive, help="times at which a session is replayed (default: SPYMASTER_PROVE_CUTS)"
    )
    prove.add_argument("--seed", type=_seed, default=0)
    prove.add_argument("--record", action="store_true", help="record the results as asset checks below DAGSTER_HOME")
    history = commands.add_parser(
        "history",
        help="rebuild a session with other pasts and compare the history that each feature needs with its contract",
    )
    history.add_argument("--session", help="a session to replay (default: the newest with signals)")
    history.add_argument(
        "--touches", type=_positive, default=4, help="touches before which every declared window is tried"
    )
    history.add_argument("--seed", type=_seed, default=0)
    explain = commands.add_parser(
        "explain", help="an event from its predictions to the models, its row, the bars and the DBN records behind it"
    )
    explain.add_argument("event_id", help="from the column event_id of a signals or predictions file")
    explain.add_argument(
        "--asof", action="append", default=[], help="only these as-of sessions (default: all that hold it)"
    )
    explain.add_argument(
        "--head",
        nargs="+",
        default=[],
        metavar="WORD",
        help="words of the predictions to tell of, such as trees direction 4min B",
    )
    explain.add_argument("--values", action="store_true", help="every column of the signal row")
    explain.add_argument(
        "--rederive", action="store_true", help="recompute all of it from the DBN files and compare bits"
    )
    explain.add_argument(
        "--refit", action="store_true", help="with the models too, from stored signals; implies --rederive"
    )
    explain.add_argument("--json", action="store_true", help="for machines; times in UTC ns")
    commands.add_parser("status", help="which sessions and as-of models are made")
    options = parser.parse_args(arguments)
    try:
        if options.command == "demo":
            from spymaster_assets.automation.demo import run_demo

            run_demo(options.root.resolve(), options.data, options.instrument)
        elif options.command == "simulate":
            profile = instrument(options.instrument)
            calendar = calendar_of(profile.symbol)
            keys = calendar.sessions(options.first, calendar.next(options.first, options.sessions - 1))
            market = [calendar.session(k) for k in keys]
            if options.profile == "trades":
                paths = write_market(options.folder, profile, market, options.seed)
            else:
                paths = write_full_market(options.folder, profile, market, options.seed, options.profile)
            Console().print(f"{len(keys)} SIMULATED sessions in {options.folder}, {len(paths)} files")
        elif options.command == "history":
            return _history(resolve(Settings.load()), options)
        elif options.command == "prove":
            return _prove(resolve(Settings.load()), options)
        elif options.command == "explain":
            return _explain(resolve(Settings.load()), options)
        else:
            _status(resolve(Settings.load()))
    except SpymasterError as error:
        Console(stderr=True).print(f"[red]{type(error).__name__}[/]: {error}", soft_wrap=True)
        return 1
    return 0


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _seed(text: str) -> int:
    return _at_least(text, 0)


def _prove(settings: Settings, options: argparse.Namespace) -> int:
    from spymaster_assets.automation.prove import prove, telling_asofs
    from spymaster_assets.automation.replay_checks import CHECK, record, verdicts
    from spymaster_assets.proof.cuts import telling_sessions

    if options.record and not os.environ.get("DAGSTER_HOME"):
        raise ConfigError(
            "DAGSTER_HOME is not set", expected="the folder of dagster.yaml", remedy="export DAGSTER_HOME"
        )
    store, console = ArtifactStore(settings.root), Console()
    named = bool(options.session or options.asof)
    chosen = {} if named else telling_sessions(store, calendar_of(settings.symbol))
    sessions = options.session or list(chosen)
    asofs = options.asof or ([] if named else telling_asofs(store))
    told = ", ".join(f"{k} ({chosen[k]})" if k in chosen else k for k in sessions)
    console.print(f"Sessions: {told or 'none'}. As of: {', '.join(asofs) or 'none'}.")
    replays = prove(settings, sessions, asofs, options.cuts or settings.prove.cuts, options.seed, console)
    found = verdicts(replays)
    table = Table(title=CHECK, title_justify="left")
    for name in ("asset", "partition"):
        table.add_column(name)
    for name in ("replays", "values compared", "differences"):
        table.add_column(name, justify="right")
    for (asset, key), verdict in found.items():
        style = None if verdict.holds else "red"
        differing = len(verdict.differences) if verdict.compared or verdict.differences else "not tried"
        counts = (verdict.replays, f"{verdict.compared:,}", differing)
        table.add_row(asset, key, *map(str, counts), style=style)
    console.print(table)
    for replay in replays:
        for difference in replay.differences:
            console.print(replay.told(difference), style="red", soft_wrap=True, markup=False)
    for untried in dict.fromkeys(u for r in replays for u in r.untried):
        console.print(f"not tried: {untried}", style="yellow", soft_wrap=True, markup=False)
    if options.record:
        record(found)
    failed = sum(bool(r.differences) for r in replays)
    tried = [r for r in replays if r.compared]
    compared = sum(sum(r.compared.values()) for r in tried)
    console.print(f"{len(tried)} replays, {compared:,} values compared, {failed} replays differ")
    return 1 if failed else 0


def _history(settings: Settings, options: argparse.Namespace) -> int:
    from spymaster_assets.automation.warmup import pasts_of, replay_pasts
    from spymaster_assets.proof.history import HOLDS, NEEDS_MORE, judge

    store, console = ArtifactStore(settings.root), Console()
    made = [options.session] if options.session else store.keys("signals")[-1:]
    if not made:
        raise MissingInputError(
            "no session has stored signals",
            where=str(settings.root),
            remedy="dagster asset materialize --select '+sequence_dataset' --partition <session>",
        )
    pasts = pasts_of(settings, made[0], options.touches, options.seed)
    found = judge(replay_pasts(settings, made[0], pasts, console), load_contract())
    table = Table(
        title=f"History of features: session {made[0]}, {len(pasts)} other pasts", title_justify="left", box=None
    )
    for name in found.columns:
        table.add_column(name, justify="right" if name == "compared" else "left", no_wrap=True)
    for row in found.rows():
        style = {HOLDS: None, NEEDS_MORE: "red"}.get(row[-1], "dim")
        table.add_row(*map(str, row), style=style)
    console.print(table)
    short = found.filter(pl.col("verdict") == NEEDS_MORE).height
    console.print(f"{short} of {found.height} features need more history than features.json declares")
    return 1 if short else 0


def _explain(settings: Settings, options: argparse.Namespace) -> int:
    from spymaster_assets.proof.explain import explain
    from spymaster_assets.proof.show import checks_table, tree

    console = Console()
    found = explain(settings, options.event_id, options.asof, options.head)
    if not options.json:
        console.print(tree(found, options.values))
    checks = []
    if options.rederive or options.refit:
        from spymaster_assets.automation.rederive import rederive

        with Console(stderr=True).status("recomputing from the DBN files"):
            checks = rederive(settings, found, options.refit)
    if options.json:
        told = {**asdict(found), "rederived": [{**asdict(c), "equal": c.equal} for c in checks]}
        sys.stdout.write(dump_json(told).decode())
    elif checks:
        console.print(checks_table(checks))
    return 0 if all(c.equal for c in checks) else 1


def _status(settings: Settings) -> None:
    store = ArtifactStore(settings.root)
    sessions, folds = all_sessions(settings), scheduled_asof(settings)
    table = Table(title=f"{settings.symbol} in {settings.root}", title_justify="left")
    for name in ("asset", "made", "of", "first missing"):
        table.add_column(name)
    for assets, keys in ((SESSION_ASSETS, sessions), ((*MODEL_ASSETS, REPORT_ASSET), folds)):
        for asset in assets:
            missing = [k for k in keys if not store.exists(asset, k)]
            table.add_row(asset, str(len(keys) - len(missing)), str(len(keys)), missing[0] if missing else "")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
