"""The main job end to end: input, every asset through Dagster, a table of results and one HTML report."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from spymaster_assets.assets.common import QUIET, progress_listeners
from spymaster_assets.errors import ConfigError
from spymaster_assets.evaluation.report import best_baselines
from spymaster_assets.market.contracts import is_outright
from spymaster_assets.market.files import FileEntry, covers, recorded_sessions, scan_folder
from spymaster_assets.market.instruments import INSTRUMENTS
from spymaster_assets.market.simulate import read_mark
from spymaster_assets.market.simulate_book import write_full_market
from spymaster_assets.partitions import all_sessions, calendar_of, resolve, scheduled_asof
from spymaster_assets.settings import LabelSettings, Settings, SplitSettings
from spymaster_assets.store import REPORT_KEY, ArtifactStore

SIMULATED_FIRST_SESSION = "2024-02-01"
SIMULATED_SESSIONS = 30
SIMULATED_SEED = 7
SIMULATED_SPLIT = SplitSettings(train_sessions=14, validation_sessions=4, embargo_sessions=1, retrain_every_sessions=5)
_LABELS = {"dollars": "$1 and $2", "volatility": "volatility-scaled thresholds"}


def run_demo(root: Path, data: Path | None, symbol: str | None = None, console: Console | None = None) -> Path:
    """Materialize the whole graph under `root` and return the report's path.

    data: a folder of DBN files; None writes and uses a simulated market of 30 sessions. Labels are volatility-scaled.
    """
    console = console or Console()
    warnings.filterwarnings("ignore")
    for noisy in ("dagster", "alembic", "mlflow", "wandb"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    began = time.monotonic()
    settings = _simulated(root, console) if data is None else _real(root, data, symbol)
    settings.write()
    home = root / "dagster_home"
    home.mkdir(parents=True, exist_ok=True)
    (home / "dagster.yaml").write_bytes(_instance_config())
    os.environ["SPYMASTER_DATA_DIR"], os.environ["DAGSTER_HOME"] = str(root), str(home)
    from spymaster_assets.definitions import build_definitions

    definitions = build_definitions(settings)
    sessions, folds = all_sessions(settings), scheduled_asof(settings)
    if not folds:
        raise ConfigError(
            f"{len(sessions)} sessions are too few for one fold",
            where=f"{settings.first_session}..{settings.last_session}",
            expected=f"more than {settings.split.history_sessions}",
            remedy="add DBN files, or set SPYMASTER_TRAIN_SESSIONS lower",
        )
    kind = "SIMULATED market" if settings.simulated else f"{settings.dbn_dir.name}"
    console.print(
        f"[bold]{settings.symbol}[/], {kind}: {len(sessions)} sessions {sessions[0]} to {sessions[-1]}, "
        f"as of {', '.join(folds)}; labels: {_LABELS[settings.label.mode]}"
    )
    if settings.missing_sessions:
        console.print(
            f"[yellow]No input for {len(settings.missing_sessions)} sessions between:[/] {', '.join(settings.missing_sessions)}. Windows "
            "count the sessions that there are; averages start anew after a gap.",
            soft_wrap=True,
        )
    with dg.DagsterInstance.get() as instance, _progress(console, len(sessions), len(folds)):
        span = {"dagster/asset_partition_range_start": sessions[0], "dagster/asset_partition_range_end": sessions[-1]}
        _run(definitions, "session_data", instance, tags=span)
        for asof in folds:
            _run(definitions, "asof_models", instance, partition_key=asof)
            _run(definitions, "fold_report", instance, partition_key=asof)
        job = definitions.resolve_implicit_global_asset_job_def()
        chosen = [dg.AssetKey("walk_forward_report")]
        _check(
            job.execute_in_process(instance=instance, asset_selection=chosen, run_config=QUIET, raise_on_error=False)
        )
    report = ArtifactStore(root).load("walk_forward_report", REPORT_KEY)
    _show(console, report.json("report.json"), settings)
    path = report.path("report.html")
    console.print(f"\nReport: [bold]{path}[/]  ({time.monotonic() - began:.0f} s)", soft_wrap=True)
    console.print(f"Look around: SPYMASTER_DATA_DIR={root} make ui", soft_wrap=True)
    return path


def _simulated(root: Path, console: Console) -> Settings:
    calendar = calendar_of("SPY")
    first = SIMULATED_FIRST_SESSION
    last = calendar.next(first, SIMULATED_SESSIONS - 1)
    settings = Settings(
        root=root,
        dbn_dir=root / "dbn",
        first_session=first,
        last_session=last,
        simulated=True,
        label=LabelSettings(mode="volatility"),
        split=SIMULATED_SPLIT,
    )
    sessions = calendar.sessions(first, last)
    mark = read_mark(settings.dbn_dir)
    if not mark or mark.get("sessions") != sessions or mark.get("seed") != SIMULATED_SEED:
        console.print(f"Writing a simulated market: {len(sessions)} sessions of trades, order book and options")
        write_full_market(
            settings.dbn_dir, settings.instrument, [calendar.session(k) for k in sessions], SIMULATED_SEED
        )
    return settings


def _real(root: Path, data: Path, symbol: str | None) -> Settings:
    entries = scan_folder(data)
    configured = Settings.load({**os.environ, "SPYMASTER_DATA_DIR": str(root)})
    settings = resolve(
        Settings(
            root=root,
            dbn_dir=data.resolve(),
            symbol=symbol or _guess_symbol(entries),
            label=LabelSettings(mode="volatility"),
            dataset=configured.dataset,
            split=configured.split,
        )
    )
    calendar = calendar_of(settings.symbol)
    latest = max(e.header.end_ns or e.header.start_ns for e in entries)
    covered = []
    key = settings.first_session
    while calendar.session(key).regular_open_ns < latest:
        if covers(entries, calendar.session(key), settings.instrument, settings.dataset):
            covered.append(key)
        key = calendar.next(key)
    if not covered:
        raise ConfigError("the files cover no session", where=str(data), expected=f"sessions of {settings.symbol}")
    # a header may state a range that its records leave partly empty, so the records decide
    between = calendar.sessions(covered[0], covered[-1])
    recorded = set(recorded_sessions(entries, calendar, settings.instrument, between, settings.dataset))
    if not recorded.intersection(covered):
        raise ConfigError("no session holds a record of the instrument", where=str(data), expected=settings.symbol)
    first, last = (f(k for k in covered if k in recorded) for f in (min, max))
    missing = tuple(k for k in between if first <= k <= last and k not in recorded)
    return replace(settings, first_session=first, last_session=last, missing_sessions=missing)


def _guess_symbol(entries: tuple[FileEntry, ...]) -> str:
    names = {s.raw_symbol for e in entries for s in e.header.symbols}
    for symbol, profile in sorted(INSTRUMENTS.items()):
        if any(is_outright(n, profile) for n in names):
            return symbol
    raise ConfigError(
        f"no known instrument among {', '.join(sorted(names)[:5])}",
        expected=", ".join(sorted(INSTRUMENTS)),
        remedy="pass --instrument",
    )


def _run(definitions: dg.Definitions, job: str, instance: dg.DagsterInstance, **arguments: Any) -> None:
    result = definitions.resolve_job_def(job).execute_in_process(
        instance=instance, run_config=QUIET, raise_on_error=False, **arguments
    )
    _check(result)


def _check(result: dg.ExecuteInProcessResult) -> None:
    """Raise what failed, with the asset's own words."""
    if result.success:
        return
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data
            error = data.error
            while error is not None and error.cause is not None:
                error = error.cause
            raise dg.Failure(f"{event.step_key}: {error.message.strip() if error else 'failed'}")
    raise dg.Failure("the run failed")


def _instance_config() -> bytes:
    path = Path(__file__).resolve().parents[2] / "dagster.yaml"
    return path.read_bytes() if path.is_file() else b"telemetry:\n  enabled: false\n"


@contextmanager
def _progress(console: Console, sessions: int, folds: int) -> Iterator[None]:
    """A bar for each asset, moved by the assets themselves."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def moved(asset: str, key: str, done: int, of: int) -> None:
            total = of if of > 1 else folds
            if asset not in tasks:
                tasks[asset] = progress.add_task(asset, total=max(total, 1))
            progress.advance(tasks[asset])

        progress_listeners.append(moved)
        try:
            yield
        finally:
            progress_listeners.remove(moved)


def _show(console: Console, report: dict[str, Any], settings: Settings) -> None:
    title = "Test sessions, all folds together" + (" [red](SIMULATED MARKET)[/]" if settings.simulated else "")
    # narrow enough for a terminal of 80 columns
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("head, delay, stage", "model"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "base\nrate", "AUC", "skill", "skill 95 %", "best\nbase", "ECE"):
        table.add_column(name, justify="right", no_wrap=True)
    best = best_baselines(report["heads"])
    unscored: list[str] = []
    models = [e for e in report["heads"] if not e["baseline"]]
    for e in sorted(models, key=lambda e: (e["head"], e["delay"], e["stage"], e["model"])):
        m, interval = e["metrics"], e["intervals"].get("skill")
        key = (e["head"], e["delay"], e["stage"])
        if e["reason"]:
            unscored.append(f"{' '.join(key)} {e['model']}: {e['reason']}")
            continue
        numbers = [m.get("base_rate"), m.get("auc"), m["skill"]]
        table.add_row(
            " ".join(key),
            e["model"],
            str(m["n"]),
            *("" if v is None else f"{v:.3f}" for v in numbers),
            f"{interval[0]:+.3f} {interval[1]:+.3f}" if interval else "",
            f"{best[key]:.3f}" if key in best else "",
            "" if m.get("ece") is None else f"{m['ece']:.3f}",
            style="bold green" if interval and interval[0] > max(best.get(key, 0.0), 0.0) else None,
        )
    console.print(table)
    held = sum(
        row["published"] and all(c["verdict"] == "holds" for c in row["cells"].values()) for row in report["canaries"]
    )
    console.print(f"Canaries hold in {held} of {len(report['canaries'])} folds.")
    for line in unscored:
        console.print(f"not scored: {line}", style="dim")
    console.print(
        f"{report['trials']} trials in {len(report['folds'])} folds. Skill is 1 - score / score of the training base rate; 0 or less is "
        "no edge. Best base: best skill of logistic regression, time of day and random neighbours; green: interval above it."
    )
