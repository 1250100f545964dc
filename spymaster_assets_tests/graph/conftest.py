"""A small demo, run once: 16 simulated sessions and two folds, every asset materialized through Dagster."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import dagster as dg
import pytest
from rich.console import Console

from spymaster_assets.automation import demo as demo_module
from spymaster_assets.definitions import build_definitions
from spymaster_assets.partitions import resolve
from spymaster_assets.settings import PatchTSTSettings, Settings, SplitSettings
from spymaster_assets.store import ArtifactStore


@dataclass(frozen=True)
class Demo:
    """What a run of the demo left."""

    root: Path
    report: Path
    printed: str
    settings: Settings
    definitions: dg.Definitions
    store: ArtifactStore
    instance: dg.DagsterInstance


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    root = tmp_path_factory.mktemp("demo")
    out = io.StringIO()
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "SIMULATED_SESSIONS", 16)
        patch.setattr(
            demo_module,
            "SIMULATED_SPLIT",
            SplitSettings(train_sessions=8, validation_sessions=2, embargo_sessions=1, retrain_every_sessions=2),
        )
        # canaries are materialized and replayed many times here; a smaller network keeps that to seconds
        small = PatchTSTSettings(layers=1, d_model=16, heads=2, ffn_dim=32)
        patch.setattr(demo_module, "Settings", partial(Settings, patchtst=small))
        report = demo_module.run_demo(root, None, console=Console(file=out, width=80))
    settings = resolve(Settings.load({"SPYMASTER_DATA_DIR": str(root)}))
    with dg.DagsterInstance.get() as instance:
        yield Demo(root, report, out.getvalue(), settings, build_definitions(settings), ArtifactStore(root), instance)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def broken(demo: Demo, tmp_path: Path) -> Settings:
    """The demo's settings with an empty store and its own DBN folder."""
    return replace(demo.settings, root=tmp_path)
