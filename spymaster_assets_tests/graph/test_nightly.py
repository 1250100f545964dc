"""The nightly sensor: what is due, once each, after a restart too, and off when configured off."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from spymaster_assets.automation.nightly import DATA_JOB, MODEL_JOB, REPORT_JOB, due_requests, nightly_sensor
from spymaster_assets.definitions import build_definitions
from spymaster_assets.market.files import scan_folder
from spymaster_assets.partitions import MODEL_ASSETS, all_sessions, calendar_of, scheduled_asof
from spymaster_assets.settings import NightlySettings, Settings
from spymaster_assets.store import ArtifactStore
from spymaster_assets_tests.graph.conftest import Demo

LATER = datetime(2030, 1, 1, tzinfo=UTC)


def due(settings: Settings, now: datetime) -> list[str]:
    entries = scan_folder(settings.dbn_dir)
    return [r.key for r in due_requests(settings, ArtifactStore(settings.root), entries, now)]


def closing(settings: Settings, key: str, minutes: int) -> datetime:
    close_ns = calendar_of(settings.symbol).session(key).close_ns
    return datetime.fromtimestamp(close_ns / 1e9, UTC) + timedelta(minutes=minutes)


def pretend(settings: Settings, asset: str, keys: list[str]) -> None:
    for key in keys:
        ArtifactStore(settings.root).publish(asset, key, {"x.json": b"{}"})


def test_data_is_due_when_its_close_and_the_grace_have_passed(broken: Settings) -> None:
    keys = all_sessions(broken)
    assert due(broken, closing(broken, keys[1], 29)) == [f"{DATA_JOB}:{keys[0]}"]
    assert due(broken, closing(broken, keys[1], 30)) == [f"{DATA_JOB}:{keys[0]}", f"{DATA_JOB}:{keys[1]}"]


def test_a_session_without_its_whole_input_waits(broken: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "late"
    shutil.copytree(broken.dbn_dir, folder)
    keys = all_sessions(broken)
    for path in folder.glob(f"*{keys[2].replace('-', '')}*"):
        path.unlink()
    asked = due(replace(broken, dbn_dir=folder), LATER)
    assert f"{DATA_JOB}:{keys[2]}" not in asked
    assert asked == [f"{DATA_JOB}:{k}" for k in keys if k != keys[2]]


def test_made_sessions_are_not_asked_for_again(broken: Settings) -> None:
    keys = all_sessions(broken)
    pretend(broken, "sequence_dataset", keys[:4])
    assert due(broken, LATER)[0] == f"{DATA_JOB}:{keys[4]}"


def test_models_when_their_whole_history_is_in_and_reports_when_the_tests_are(broken: Settings) -> None:
    keys, folds = all_sessions(broken), scheduled_asof(broken)
    at = keys.index(folds[0])
    pretend(broken, "sequence_dataset", keys[: at - 1])
    assert not any(k.startswith(MODEL_JOB) for k in due(broken, LATER))
    pretend(broken, "sequence_dataset", [keys[at - 1]])
    assert f"{MODEL_JOB}:{folds[0]}" in due(broken, LATER)
    for asset in MODEL_ASSETS[:-1]:
        pretend(broken, asset, [folds[0]])
    assert f"{MODEL_JOB}:{folds[0]}" in due(broken, LATER)
    pretend(broken, MODEL_ASSETS[-1], [folds[0]])
    assert not any(k == f"{MODEL_JOB}:{folds[0]}" or k.startswith(REPORT_JOB) for k in due(broken, LATER))
    pretend(broken, "sequence_dataset", keys[at : at + broken.split.retrain_every_sessions])
    assert f"{REPORT_JOB}:{folds[0]}" in due(broken, LATER)
    pretend(broken, "calibration_report", [folds[0]])
    assert f"{REPORT_JOB}:{folds[0]}" not in due(broken, LATER)


def test_nothing_is_due_after_the_whole_demo(demo: Demo) -> None:
    assert due(demo.settings, LATER) == []


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as made:
        yield made


def tick(settings: Settings, instance: dg.DagsterInstance) -> dg.SensorExecutionData:
    definitions = build_definitions(settings)
    jobs = {name: definitions.resolve_job_def(name) for name in (DATA_JOB, MODEL_JOB, REPORT_JOB)}
    sensor = nightly_sensor(settings, jobs, clock=lambda: LATER)
    with dg.build_sensor_context(instance=instance, definitions=definitions) as context:
        return sensor.evaluate_tick(context)


def test_a_tick_asks_for_few_and_the_next_for_the_rest(broken: Settings, instance: dg.DagsterInstance) -> None:
    keys = all_sessions(broken)
    first = tick(broken, instance).run_requests or []
    limit = broken.nightly.max_sessions_per_tick
    assert [r.run_key for r in first] == [f"{DATA_JOB}:{k}" for k in keys[:limit]]
    assert [r.partition_key for r in first] == keys[:limit]
    for request in first:  # what the daemon does with a request
        instance.create_run_for_job(
            build_definitions(broken).resolve_job_def(DATA_JOB), tags={**request.tags}, run_config={}
        )
    # a new process has no memory of the last tick but the instance's runs
    second = tick(broken, instance).run_requests or []
    assert [r.partition_key for r in second] == keys[limit : 2 * limit]


def test_off_means_off(broken: Settings, instance: dg.DagsterInstance) -> None:
    off = replace(broken, nightly=NightlySettings(enabled=False))
    said = tick(off, instance)
    assert not said.run_requests
    assert "disabled by configuration" in (said.skip_message or "")
    assert nightly_sensor(off, {}).default_status == dg.DefaultSensorStatus.STOPPED
    assert Settings.load({"SPYMASTER_NIGHTLY": "0", "SPYMASTER_DATA_DIR": str(broken.root)}).nightly.enabled is False


def test_an_unreadable_folder_is_said_and_nothing_is_asked(broken: Settings, instance: dg.DagsterInstance) -> None:
    said = tick(replace(broken, dbn_dir=broken.root / "absent"), instance)
    assert not said.run_requests
    assert "cannot be read" in (said.skip_message or "")
