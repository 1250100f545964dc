"""Canaries through Dagster: a sabotaged pipeline fails them and calibration_report refuses its session, whatever run it is in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import dagster as dg
import numpy as np
import polars as pl
import pytest

from spymaster_assets.assets import datasets as datasets_module
from spymaster_assets.assets import models as models_module
from spymaster_assets.assets.canaries import require_canaries
from spymaster_assets.assets.common import QUIET
from spymaster_assets.definitions import build_definitions
from spymaster_assets.errors import CanaryError
from spymaster_assets.partitions import MODEL_ASSETS, scheduled_asof
from spymaster_assets.settings import Settings
from spymaster_assets.store import ArtifactStore, dump_json
from spymaster_assets_tests.graph.conftest import Demo

Read = Callable[[ArtifactStore, str], tuple]


@pytest.fixture
def copied(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The demo's sessions and models of its first fold, without canaries, reports or trackers."""
    monkeypatch.setenv("SPYMASTER_TRACKING", "off")
    asof = scheduled_asof(demo.settings)[0]
    for asset in ("signals", "sequence_dataset"):
        shutil.copytree(demo.root / asset, tmp_path / asset)
    for asset in MODEL_ASSETS:
        if asset != "canaries":
            shutil.copytree(demo.root / asset / asof, tmp_path / asset / asof)
    return replace(demo.settings, root=tmp_path)


def run(settings: Settings, *assets: str) -> dg.ExecuteInProcessResult:
    with dg.DagsterInstance.ephemeral() as instance:
        return (
            build_definitions(settings)
            .resolve_implicit_global_asset_job_def()
            .execute_in_process(
                instance=instance,
                partition_key=scheduled_asof(settings)[0],
                asset_selection=[dg.AssetKey(a) for a in assets],
                run_config=QUIET,
                raise_on_error=False,
            )
        )


def said(result: dg.ExecuteInProcessResult) -> str:
    data = next(e for e in result.all_events if e.is_step_failure).step_failure_data
    return str(data.user_failure_data or data.error)


def leak_rows(honest: Read, settings: Settings) -> Read:
    """The last training session also delivers the validation sessions' rows."""
    split = datasets_module.read_split(ArtifactStore(settings.root), scheduled_asof(settings)[0])[0]

    def read(store: ArtifactStore, key: str) -> tuple:
        found, artifact = honest(store, key)
        if key == split.train[-1]:
            rows = [found.frame, *(honest(store, k)[0].frame for k in split.validation)]
            found = replace(found, frame=pl.concat(rows))
        return found, artifact

    return read


def leak_column(honest: Read, settings: Settings) -> Read:
    """A feature that claims to be known at the touch holds the move that follows."""

    def read(store: ArtifactStore, key: str) -> tuple:
        found, artifact = honest(store, key)
        future = pl.col("strength_signed_4min").alias("approach_velocity")
        return replace(found, frame=found.frame.with_columns(future)), artifact

    return read


def leak_windows(honest: Read, settings: Settings) -> Read:
    """The last training session also delivers the validation sessions' windows."""
    split = datasets_module.read_split(ArtifactStore(settings.root), scheduled_asof(settings)[0])[0]

    def read(store: ArtifactStore, key: str) -> tuple:
        arrays, artifact = honest(store, key)
        if key == split.train[-1]:
            parts = [arrays, *(honest(store, k)[0] for k in split.validation)]
            arrays = {k: v if k.endswith("names") else np.concatenate([p[k] for p in parts]) for k, v in arrays.items()}
        return arrays, artifact

    return read


def late_windows(honest: Read, settings: Settings) -> Read:
    """The last bar of a window is as far from the level as the price after confirmation."""

    def read(store: ArtifactStore, key: str) -> tuple:
        arrays, artifact = honest(store, key)
        X = arrays["X"].copy()
        X[:, -1, arrays["seq_feature_names"].tolist().index("dist_to_level")] = -np.nan_to_num(arrays["y_strength"])
        return {**arrays, "X": X}, artifact

    return read


@pytest.mark.parametrize(
    ("module", "reader", "leak", "caught_by"),
    [
        (datasets_module, "read_signals", leak_rows, {"shuffled_labels", "noise_trees", "noise_retrieval"}),
        (datasets_module, "read_signals", leak_column, {"production_columns"}),
        (models_module, "read_sequences", leak_windows, {"shuffled_labels_patchtst"}),
        (models_module, "read_sequences", late_windows, {"production_sequences"}),
    ],
)
def test_a_sabotaged_pipeline_is_not_published(
    copied: Settings,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    reader: str,
    leak: Callable[[Read, Settings], Read],
    caught_by: set[str],
) -> None:
    monkeypatch.setattr(module, reader, leak(getattr(module, reader), copied))
    store, asof = ArtifactStore(copied.root), scheduled_asof(copied)[0]
    together = run(copied, "canaries", "calibration_report")
    assert not together.success
    evaluated = {e.check_name: e for e in together.get_asset_check_evaluations()}
    assert not evaluated["canaries_hold"].passed
    assert evaluated["canaries_hold"].severity == dg.AssetCheckSeverity.ERROR
    assert set(store.load("canaries", asof).json("canaries.json")["failed"]) == caught_by
    assert not store.exists("calibration_report", asof)
    alone = run(copied, "calibration_report")
    assert not alone.success
    assert "CanaryError" in said(alone)
    assert all(name in said(alone) for name in caught_by)
    assert not store.exists("calibration_report", asof)


def test_honest_again_it_is_published_with_equal_canaries(copied: Settings, demo: Demo) -> None:
    asof = scheduled_asof(copied)[0]
    unknown = run(copied, "calibration_report")
    assert f"materialize --select canaries --partition {asof}" in said(unknown)
    assert run(copied, "canaries", "calibration_report").success
    store = ArtifactStore(copied.root)
    for asset in ("canaries", "calibration_report"):
        assert store.load(asset, asof).sha256 == demo.store.load(asset, asof).sha256
    assert store.load("calibration_report", asof).inputs["canaries"] == store.load("canaries", asof).sha256


def test_canaries_of_another_split_are_refused(demo: Demo) -> None:
    split = demo.store.load("split_manifest", scheduled_asof(demo.settings)[0])
    assert require_canaries(demo.store, split).json("canaries.json")["failed"] == []
    with pytest.raises(CanaryError, match="another split"):
        require_canaries(demo.store, replace(split, sha256="0" * 64))


def test_a_fold_that_failed_later_leaves_the_walk_forward_report(demo: Demo, copied: Settings) -> None:
    store, folds = ArtifactStore(copied.root), scheduled_asof(demo.settings)
    for asset in ("market_files", "ohlcv_bars", "levels", "split_manifest", "canaries", "calibration_report"):
        shutil.copytree(demo.root / asset, copied.root / asset, dirs_exist_ok=True)
    failed = store.load("canaries", folds[0])
    report = failed.json("canaries.json")
    report["failed"] = ["shuffled_labels"]
    for canary in report["canaries"]:
        if canary["canary"] == "shuffled_labels":
            canary["verdict"] = "failed"
    files = {"canaries.json": dump_json(report), "canaries.png": failed.read("canaries.png")}
    store.publish("canaries", folds[0], files, inputs=failed.inputs, settings=failed.settings)
    with dg.DagsterInstance.ephemeral() as instance:
        job = build_definitions(copied).resolve_implicit_global_asset_job_def()
        chosen = [dg.AssetKey("walk_forward_report")]
        assert job.execute_in_process(instance=instance, asset_selection=chosen, run_config=QUIET).success
    made = store.load("walk_forward_report", "latest")
    summary = made.json("report.json")
    assert summary["folds"] == folds[1:]
    assert [row["published"] for row in summary["canaries"]] == [False, True]
    assert '<span class="down">failed</span>' in made.read("report.html").decode()
