"""`spymaster prove`: rebuild stored artifacts through the graph itself with another future, and compare what was known before."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import dagster as dg
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from spymaster_assets.assets.signals import warmup_sessions
from spymaster_assets.contract import load_contract
from spymaster_assets.errors import ConfigError, MissingInputError
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.files import scan_folder
from spymaster_assets.partitions import MODEL_ASSETS, SESSION_ASSETS, all_sessions, calendar_of
from spymaster_assets.proof.compare import Difference, differences
from spymaster_assets.proof.cutting import Future, write_future
from spymaster_assets.settings import MINUTE_NS, NS, Settings
from spymaster_assets.signals.build import signals_from_parquet
from spymaster_assets.store import ArtifactStore

_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@dataclass(frozen=True)
class Replay:
    """One rebuilt partition: what was tried, how many values were compared and what differed, upstream assets first."""

    key: str
    future: str
    at_ns: int
    compared: int
    differences: tuple[Difference, ...]


def cuts_of(
    session: Session, settings: Settings, count: int, seed: int, touches_ns: NDArray[np.int64] | None = None
) -> list[int]:
    """`count` distinct times in regular hours, ns: edges where rules change, then in turn random ones and moments at which a column of a
    stored touch (touches_ns: their t0) has just become known, where a window that reaches too far shows."""
    opens, closes = session.regular_open_ns, session.regular_close_ns
    opening = opens + settings.signal.opening_range_min * MINUTE_NS
    edges = [
        opening,
        closes - 1,
        opens + MINUTE_NS,
        opening + 1,
        closes - settings.label.look_forward_s * NS,
        opening - 1,
    ]
    chosen = dict.fromkeys([t for t in edges if opens < t < closes][: max(count // 4, 1)])
    known_after = sorted({c.known_after_s for c in load_contract().role("feature")} - {0})
    rng = np.random.default_rng([seed, opens // MINUTE_NS])
    while closes > opens + count and len(chosen) < count:
        at_ns = int(rng.integers(opens + 1, closes))
        if touches_ns is not None and len(touches_ns) and len(chosen) % 2:
            at_ns = int(rng.choice(touches_ns)) + int(rng.choice(known_after)) * NS
        if opens < at_ns < closes:
            chosen[at_ns] = None
    return list(chosen)


def replay_session(settings: Settings, key: str, at_ns: int, future: Future) -> Replay:
    """Rebuild a session's assets in a shadow store with input that ends, or is another, from at_ns on.

    Raises ArtifactError when a stored artifact is missing, dagster.Failure when the graph fails on the altered input.
    """
    store, contract = ArtifactStore(settings.root), load_contract()
    session = calendar_of(settings.symbol).session(key)
    with _shadow(settings) as shadow:
        entries = scan_folder(settings.dbn_dir)
        near = [e for e in entries if e.overlaps(session.open_ns - 10 * 86_400 * NS, session.close_ns)]
        write_future(near, shadow.dbn_dir, at_ns, future)
        _copy(store, shadow.root, "ohlcv_bars", warmup_sessions(settings, key))
        _run(shadow, SESSION_ASSETS, key)
        replayed = ArtifactStore(shadow.root)
        # a tape that is cut is only known to be complete up to its last record
        known_ns = min(at_ns, replayed.load("market_files", key).json("files.json")["observed_until_ns"])
        found: list[Difference] = []
        compared = 0
        for asset in SESSION_ASSETS:
            more, count = differences(store.load(asset, key), replayed.load(asset, key), known_ns, contract)
            found += more
            compared += count
    return Replay(key, future, at_ns, compared, tuple(found))


def replay_models(settings: Settings, asof: str) -> Replay:
    """Rebuild an as-of session's split and models where no later session, nor the as-of session itself, exists; compare their bytes."""
    store = ArtifactStore(settings.root)
    earlier = [k for k in all_sessions(settings) if k < asof]
    with _shadow(settings) as shadow:
        for asset in ("signals", "sequence_dataset", "levels"):
            _copy(store, shadow.root, asset, [k for k in earlier if store.exists(asset, k)])
        _run(shadow, MODEL_ASSETS, asof)
        replayed = ArtifactStore(shadow.root)
        found = []
        for asset in MODEL_ASSETS:
            one, other = store.load(asset, asof), replayed.load(asset, asof)
            if one.sha256 != other.sha256:
                file = next((f for f in one.files if one.files[f] != other.files.get(f)), "files")
                found.append(Difference(asset, asof, file, "content", one.sha256[:12], other.sha256[:12]))
    at_ns = calendar_of(settings.symbol).session(asof).open_ns
    return Replay(asof, "without later sessions", at_ns, len(MODEL_ASSETS), tuple(found))


def prove(
    settings: Settings,
    sessions: Sequence[str],
    asofs: Sequence[str],
    cuts: int,
    seed: int = 0,
    console: Console | None = None,
) -> list[Replay]:
    """Replay `cuts` times a session, half with the input cut off and half with another future, and each as-of session once.

    Raises ConfigError when nothing is named, MissingInputError when a named session has no stored signals.
    """
    console = console or Console()
    warnings.filterwarnings("ignore")
    store, calendar = ArtifactStore(settings.root), calendar_of(settings.symbol)
    if not sessions and not asofs:
        raise ConfigError("nothing to prove", expected="--session or --asof, or artifacts in the store")
    if missing := [k for k in sessions if not store.exists("signals", k)]:
        raise MissingInputError(
            f"{len(missing)} sessions have no stored signals: {', '.join(missing[:5])}",
            where=str(settings.root),
            remedy="dagster asset materialize --select '+sequence_dataset' --partition <session>",
        )
    jobs: list[tuple[str, int, Future]] = []
    for key in sessions:
        stored = signals_from_parquet(store.load("signals", key).read(f"signals_{key}.parquet"), load_contract())
        touches_ns = stored.frame["ts_ns"].to_numpy()
        for n, at_ns in enumerate(cuts_of(calendar.session(key), settings, cuts, seed, touches_ns)):
            jobs.append((key, at_ns, "cut" if n % 2 == 0 else "altered"))
    done = [
        replay_session(settings, key, at_ns, future)
        for key, at_ns, future in track(jobs, "sessions replayed", console=console, disable=not jobs)
    ]
    done += [
        replay_models(settings, k) for k in track(asofs, "as-of models rebuilt", console=console, disable=not asofs)
    ]
    return done


@contextmanager
def _shadow(settings: Settings) -> Iterator[Settings]:
    with tempfile.TemporaryDirectory(prefix="spymaster-shadow-") as name:
        root = Path(name)
        (root / "dbn").mkdir()
        yield replace(settings, root=root, dbn_dir=root / "dbn")


def _copy(store: ArtifactStore, root: Path, asset: str, keys: Sequence[str]) -> None:
    for artifact in store.require(asset, keys):
        shutil.copytree(artifact.folder.parent, root / asset / artifact.key)


@contextmanager
def _untracked() -> Iterator[None]:
    """A replay is no experiment: nothing of it is logged to MLflow or W&B."""
    before = os.environ.get("SPYMASTER_TRACKING")
    os.environ["SPYMASTER_TRACKING"] = "off"
    try:
        yield
    finally:
        if before is None:
            del os.environ["SPYMASTER_TRACKING"]
        else:
            os.environ["SPYMASTER_TRACKING"] = before


def _run(shadow: Settings, assets: Sequence[str], key: str) -> None:
    from spymaster_assets.definitions import build_definitions

    with _untracked(), dg.DagsterInstance.ephemeral() as instance:
        job = build_definitions(shadow).resolve_implicit_global_asset_job_def()
        result = job.execute_in_process(
            instance=instance,
            partition_key=key,
            asset_selection=[dg.AssetKey(a) for a in assets],
            run_config=_QUIET,
            raise_on_error=False,
        )
    if not result.success:
        failed = next(e for e in result.all_events if e.is_step_failure)
        raise dg.Failure(
            f"{failed.step_key}: {failed.step_failure_data.user_failure_data or failed.step_failure_data.error}"
        )
