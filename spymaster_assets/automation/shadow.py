"""A store of its own for rebuilt artifacts: what is put into it, and runs of the graph on it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import dagster as dg

from spymaster_assets.assets.common import QUIET
from spymaster_assets.errors import ArtifactError
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.files import FileEntry, scan_folder
from spymaster_assets.proof.cutting import writing
from spymaster_assets.settings import NS, Settings
from spymaster_assets.store import MANIFEST, Artifact, ArtifactStore, dump_json, write_atomic

_DISK_FAULT = re.compile(r"ArtifactError: cannot publish|MarketDataError: cannot be read: ")
"""What an asset says when a disk and not its input is at fault."""
REACH_NS = 10 * 86_400 * NS
"""How far before a session files are taken along: earlier sessions name the front month."""


def files_near(settings: Settings, session: Session, until_ns: int | None = None) -> list[FileEntry]:
    """DBN files that a session (or what follows it until until_ns) may be made of."""
    entries = scan_folder(settings.dbn_dir)
    return [e for e in entries if e.overlaps(session.open_ns - REACH_NS, until_ns or session.close_ns)]


@contextmanager
def shadow_of(settings: Settings) -> Iterator[Settings]:
    """Settings whose store and DBN folder are empty and vanish at the end, whatever comes.

    Raises ArtifactError when the disk does not take what is put there, or does not let go of it.
    """
    with writing(Path(tempfile.gettempdir())):
        root = Path(tempfile.mkdtemp(prefix="spymaster-shadow-"))
        try:
            (root / "dbn").mkdir()
            yield replace(settings, root=root, dbn_dir=root / "dbn")
        finally:
            _remove(root)


def _remove(root: Path) -> None:
    for _ in range(2):  # an entry that the disk kept once
        shutil.rmtree(root, ignore_errors=True)
    if os.path.lexists(root):
        raise ArtifactError("a replay's folder cannot be removed", where=str(root), remedy="delete it")


def lend(store: ArtifactStore, root: Path, asset: str, keys: Sequence[str]) -> None:
    """Put stored artifacts into another store; raise MissingInputError that names what is missing, ArtifactError when the disk fails."""
    for artifact in store.require(asset, keys):
        home = root / asset / artifact.key
        with writing(home):
            home.mkdir(parents=True)
            try:
                _lend(artifact, home)
            except OSError:
                newer = store.load(asset, artifact.key)
                if newer.folder == artifact.folder:
                    raise
                _lend(newer, home)  # the version was swept after the handle was taken


def _lend(artifact: Artifact, home: Path) -> None:
    """Files and the manifest of one handle: that of the disk may be of a newer version by now."""
    target = home / artifact.folder.name
    try:
        shutil.copytree(artifact.folder, target, copy_function=_link)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    names = ("asset", "key", "sha256", "files", "inputs", "settings", "metadata", "provenance")
    manifest = {n: getattr(artifact, n) for n in names} | {"version": artifact.folder.name}
    write_atomic(home / MANIFEST, dump_json(manifest))


def _link(source: str, target: str) -> None:
    """A second name of a file, since published files are never written to; a copy where the disk is another."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class RebuildFailed(dg.Failure):
    """Assets that could not be made, each with its own words; what does not depend on them was made."""

    def __init__(self, words: Mapping[str, str]) -> None:
        self.words = words
        super().__init__("; ".join(f"{asset}: {why}" for asset, why in words.items()))


def rebuild(settings: Settings, assets: Sequence[str], key: str | None) -> None:
    """Make assets of one partition (None: that have none) through the graph, without their checks and without experiment tracking.

    Raises RebuildFailed with the assets' own words, ArtifactError when it was the disk that failed: that says nothing about an asset.
    """
    from spymaster_assets.definitions import build_definitions

    job = build_definitions(settings).resolve_implicit_global_asset_job_def()
    chosen = job.get_subset(asset_selection={dg.AssetKey(a) for a in assets}, asset_check_selection=set())
    with _untracked(), dg.DagsterInstance.ephemeral() as instance:
        result = chosen.execute_in_process(instance=instance, partition_key=key, run_config=QUIET, raise_on_error=False)
    if not result.success:
        failed = [e.step_failure_data for e in result.all_events if e.is_step_failure]
        words = [str(f.user_failure_data or f.error) for f in failed]
        if refused := next(filter(_DISK_FAULT.search, words), None):
            raise ArtifactError(
                f"a replay could not be made: {refused}",
                where=str(settings.root),
                remedy="free disk space or set TMPDIR to a folder that has it, then replay again",
            )
        raise RebuildFailed(
            dict(zip((str(e.step_key) for e in result.all_events if e.is_step_failure), words, strict=True))
        )


@cache
def _parents(settings: Settings) -> Mapping[str, tuple[str, ...]]:
    from spymaster_assets.definitions import build_definitions

    graph = build_definitions(settings).resolve_asset_graph()
    return {
        key.to_user_string(): tuple(sorted(k.to_user_string() for k in graph.get(key).parent_keys))
        for key in graph.get_all_asset_keys()
    }


def nearest_upstream(settings: Settings, asset: str, among: frozenset[str]) -> str | None:
    """The asset of `among` that lies the fewest dependencies above `asset` in the graph (by name where several do); None without one."""
    parents = _parents(settings)
    level, seen = set(parents[asset]), {asset}
    while level:
        if found := sorted(level & among):
            return found[0]
        seen |= level
        level = {p for child in level for p in parents[child]} - seen
    return None


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
