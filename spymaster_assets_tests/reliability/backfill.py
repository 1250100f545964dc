"""A backfill through the graph that is killed again and again: what is left must be whole, and the end equal to an undisturbed run.

`python -m spymaster_assets_tests.reliability.backfill FOLDER KILLS` prints the outcome as JSON. This process only imports and forks, so
that a killed child dies while it computes or publishes and not while it imports.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np

import spymaster_assets.models.patchtst  # noqa: F401 - the models' assets import it late
from spymaster_assets.assets.common import QUIET
from spymaster_assets.definitions import build_definitions
from spymaster_assets.market.simulate_book import write_full_market
from spymaster_assets.partitions import MODEL_ASSETS, SESSION_ASSETS, calendar_of
from spymaster_assets.settings import (
    LabelSettings,
    PatchTSTSettings,
    RetrievalSettings,
    Settings,
    SplitSettings,
    TreeSettings,
)
from spymaster_assets.store import ArtifactStore, git_revision
from spymaster_assets_tests.reliability.faults import forked, kill_at, leftovers, verified, watched

SEED = 20_240_201
PUBLISHING = ("mkdir", "write", "fsync", "rename", "replace", "unlink", "rmdir")
_MEAN_SHARE = 0.08
"""Mean time between kills as a share of an undisturbed run: a backfill is resumed about twelve times before it ends."""


def settings_of(folder: Path, root: Path) -> Settings:
    """Five simulated sessions of all feeds, one fold, models small enough to be fitted in a second."""
    return Settings(
        root=root,
        dbn_dir=folder / "dbn",
        first_session="2024-02-01",
        last_session="2024-02-07",
        simulated=True,
        label=LabelSettings(mode="volatility"),
        split=SplitSettings(train_sessions=3, validation_sessions=1, embargo_sessions=0, retrain_every_sessions=1),
        tree=replace(TreeSettings(), rounds=10, early_stopping_rounds=3, min_class_rows=3),
        patchtst=replace(PatchTSTSettings(), epochs=1, min_train_rows=10, min_class_rows=3),
        retrieval=replace(RetrievalSettings(), min_candidates=10),
    )


def backfill(settings: Settings) -> None:
    """Materialize every partition that is missing, assets in the graph's order, as one run each."""
    store = ArtifactStore(settings.root)
    sessions = calendar_of(settings.symbol).sessions(settings.first_session, settings.last_session)
    job = build_definitions(settings).resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:
        for assets, keys in ((SESSION_ASSETS, sessions), (MODEL_ASSETS, sessions[-1:])):
            for asset in assets:
                missing = [k for k in keys if not store.exists(asset, k)]
                if missing:
                    span = {"start": missing[0], "end": missing[-1]}
                    job.execute_in_process(
                        instance=instance,
                        asset_selection=[dg.AssetKey(asset)],
                        tags={f"dagster/asset_partition_range_{k}": v for k, v in span.items()},
                        run_config=QUIET,
                    )


def campaign(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill `kills` backfills, half at a random time and half before a random system call of a publication, and compare the ends."""
    began = time.monotonic()
    write = settings_of(folder, folder)
    calendar = calendar_of("SPY")
    sessions = [calendar.session(k) for k in calendar.sessions(write.first_session, write.last_session)]
    _wait(forked(lambda: _quietly(lambda: write_full_market(write.dbn_dir, write.instrument, sessions, 7))), "market")
    git_revision()  # cached here, or every child would start git

    def undisturbed() -> None:
        with watched(lambda n, name: None, PUBLISHING) as seen:
            backfill(settings_of(folder, folder / "undisturbed"))
        (folder / "calls").write_text(str(len(seen)))

    _wait(forked(lambda: _quietly(lambda: backfill(settings_of(folder, folder / "warm")))), "first run")
    started = time.monotonic()
    _wait(forked(lambda: _quietly(undisturbed)), "undisturbed run")
    length_s, calls = time.monotonic() - started, int((folder / "calls").read_text())
    expected = verified(ArtifactStore(folder / "undisturbed"))

    rng = np.random.default_rng(seed)
    settings = settings_of(folder, folder / "killed")
    store = ArtifactStore(settings.root)
    told: dict[str, Any] = {"kills": 0, "aimed": 0, "rounds": 0, "with_leftovers": 0, "artifacts": len(expected)}
    while told["kills"] < kills or told["rounds"] == 0:
        shutil.rmtree(settings.root, ignore_errors=True)
        done = False
        known: dict[str, str] = {}
        while not done:
            live = told["kills"] < kills
            aimed = live and bool(rng.random() < 0.5)
            point = int(rng.exponential(_MEAN_SHARE * calls)) if aimed else -1
            pid = forked(lambda n=point: _quietly(lambda: _killed(settings, n)))  # type: ignore[misc]
            if live and not aimed:
                time.sleep(min(float(rng.exponential(_MEAN_SHARE * length_s)), length_s))
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    os.killpg(pid, signal.SIGKILL)
                else:
                    pid = 0
            status = os.waitpid(pid, 0)[1] if pid else 0
            done = status == 0
            if not done:
                assert os.WIFSIGNALED(status), f"the backfill failed with status {status}"
                assert os.WTERMSIG(status) == signal.SIGKILL
                told["kills"] += 1
                told["aimed"] += aimed
            now = verified(store)
            assert known.items() <= now.items(), "an artifact that was published is gone or changed"
            known = now
            told["with_leftovers"] += bool(leftovers(store))
        assert known == expected, {k: (known.get(k), v) for k, v in expected.items() if known.get(k) != v}
        hidden = [p for p in leftovers(store) if "/." in p]
        assert not hidden, hidden
        told["rounds"] += 1
        print(told, file=sys.stderr, flush=True)
    return {**told, "undisturbed_s": round(length_s, 1), "calls": calls, "wall_s": round(time.monotonic() - began)}


def _killed(settings: Settings, point: int) -> None:
    with watched(kill_at(point), PUBLISHING):
        backfill(settings)


def _quietly(work: Any) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    work()


def _wait(pid: int, what: str) -> None:
    assert os.waitpid(pid, 0)[1] == 0, f"{what} failed"


if __name__ == "__main__":
    os.environ["SPYMASTER_TRACKING"] = "off"
    print(json.dumps(campaign(Path(sys.argv[1]), int(sys.argv[2]), SEED)))
