"""The nightly sensor: what is due, once each, after a restart too, and off when configured off."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.instigation_logger import InstigationLogger
from dagster._core.launcher import DefaultRunLauncher
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._daemon.monitoring import run_monitoring

from spymaster_assets.assets.common import QUIET
from spymaster_assets.automation.demo import _instance_config
from spymaster_assets.automation.nightly import (
    DATA_JOB,
    MODEL_JOB,
    REPORT_JOB,
    Request,
    Stands,
    Turn,
    Wait,
    due_requests,
    nightly_sensor,
)
from spymaster_assets.definitions import build_definitions
from spymaster_assets.market.dbn import read_header, read_records
from spymaster_assets.market.files import SEEN_INPUTS, inputs_fingerprint, scan_flat, scan_folder, session_inputs
from spymaster_assets.partitions import (
    MODEL_ASSETS,
    REPORT_ASSET,
    SESSION_ASSETS,
    all_sessions,
    calendar_of,
    scheduled_asof,
)
from spymaster_assets.settings import NightlySettings, Settings
from spymaster_assets.store import ArtifactStore
from spymaster_assets_tests.builders import dbn_bytes
from spymaster_assets_tests.graph.conftest import Demo

LATER = datetime(2030, 1, 1, tzinfo=UTC)


def requests(settings: Settings, now: datetime) -> list[Request]:
    return [found for found in judged(settings, now) if isinstance(found, Request)]


def judged(
    settings: Settings, now: datetime, turn_of: Callable[[Request], Turn] = lambda request: Turn(1)
) -> list[Request | Wait | Stands]:
    files = scan_folder(settings.dbn_dir), scan_flat(settings.dbn_dir)
    return list(due_requests(settings, ArtifactStore(settings.root), *files, now, turn_of))


def due(settings: Settings, now: datetime) -> list[str]:
    return [r.name for r in requests(settings, now)]


def closing(settings: Settings, key: str, minutes: int) -> datetime:
    close_ns = calendar_of(settings.symbol).session(key).close_ns
    return datetime.fromtimestamp(close_ns / 1e9, UTC) + timedelta(minutes=minutes)


def pretend(settings: Settings, assets: Sequence[str], keys: list[str], content: bytes = b"{}") -> None:
    """Artifacts as if made from the session's files and the signals of the window."""
    store, calendar = ArtifactStore(settings.root), calendar_of(settings.symbol)
    entries, sessions = scan_folder(settings.dbn_dir), all_sessions(settings)
    for asset, key in product(assets, keys):
        inputs = {}
        if asset in (*MODEL_ASSETS, REPORT_ASSET):
            before = sessions[: sessions.index(key)]
            inputs = {
                f"signals[{k}]": store.load("signals", k).sha256 for k in before[-settings.split.history_sessions :]
            }
        files = session_inputs(entries, (), calendar, settings.instrument, key)
        seen = {SEEN_INPUTS: inputs_fingerprint(files)}
        store.publish(asset, key, {"x.json": content}, inputs=inputs, metadata=seen)


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
    pretend(broken, SESSION_ASSETS, keys[:4])
    assert due(broken, LATER)[0] == f"{DATA_JOB}:{keys[4]}"
    pretend(broken, SESSION_ASSETS[:-1], keys[4:5])
    assert due(broken, LATER)[0] == f"{DATA_JOB}:{keys[4]}"  # its last asset is not there


def test_models_when_their_whole_history_is_in_and_reports_when_the_tests_are(broken: Settings) -> None:
    keys, folds = all_sessions(broken), scheduled_asof(broken)
    at = keys.index(folds[0])
    pretend(broken, SESSION_ASSETS, keys[: at - 1])
    assert not any(k.startswith(MODEL_JOB) for k in due(broken, LATER))
    pretend(broken, SESSION_ASSETS, [keys[at - 1]])
    assert f"{MODEL_JOB}:{folds[0]}" in due(broken, LATER)
    pretend(broken, MODEL_ASSETS[:-1], [folds[0]])
    assert f"{MODEL_JOB}:{folds[0]}" in due(broken, LATER)
    pretend(broken, MODEL_ASSETS, [folds[0]])
    assert not any(k == f"{MODEL_JOB}:{folds[0]}" or k.startswith(REPORT_JOB) for k in due(broken, LATER))
    pretend(broken, SESSION_ASSETS, keys[at : at + broken.split.retrain_every_sessions])
    assert f"{REPORT_JOB}:{folds[0]}" in due(broken, LATER)
    pretend(broken, [REPORT_ASSET], [folds[0]])
    assert f"{REPORT_JOB}:{folds[0]}" not in due(broken, LATER)


def test_models_and_reports_whose_signals_changed_are_due_again(broken: Settings) -> None:
    keys, folds = all_sessions(broken), scheduled_asof(broken)
    pretend(broken, SESSION_ASSETS, keys)
    pretend(broken, (*MODEL_ASSETS, REPORT_ASSET), folds)
    assert due(broken, LATER) == []
    before = broken.split.history_sessions
    pretend(broken, ["signals"], keys[:1], b'{"other": 1}')
    inside = [k for k in folds if keys[0] in keys[keys.index(k) - before : keys.index(k)]]
    assert inside
    assert due(broken, LATER) == [f"{MODEL_JOB}:{k}" for k in inside]
    pretend(broken, MODEL_ASSETS, inside)
    assert due(broken, LATER) == [f"{REPORT_JOB}:{k}" for k in inside]


def test_a_session_is_due_again_when_an_earlier_ones_bars_changed(broken: Settings) -> None:
    keys = all_sessions(broken)
    pretend(broken, SESSION_ASSETS, keys)
    store = ArtifactStore(broken.root)
    bars = {f"ohlcv_bars[{keys[0]}]": store.load("ohlcv_bars", keys[0]).sha256}
    levels = store.load("levels", keys[1])
    store.publish("levels", keys[1], {"x.json": b"{}"}, inputs=bars, metadata=levels.metadata)
    assert not any(k.startswith(DATA_JOB) for k in due(broken, LATER))
    pretend(broken, ["ohlcv_bars"], keys[:1], b'{"other": 1}')
    assert [k for k in due(broken, LATER) if k.startswith(DATA_JOB)] == [f"{DATA_JOB}:{keys[1]}"]


def test_late_and_changed_files_make_a_session_due_again_until_it_is_remade(demo: Demo, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(demo.root, root)
    settings = replace(demo.settings, root=root, dbn_dir=root / "dbn")
    keys = all_sessions(settings)
    key, day = keys[3], keys[3].replace("-", "")
    assert due(settings, LATER) == []
    late = [*settings.dbn_dir.glob(f"*{day}.mbp-10*"), *settings.dbn_dir.glob(f"*opt-{day}*")]
    assert len(late) == 4
    away = tmp_path / "away"
    away.mkdir()
    for path in late:
        shutil.move(path, away / path.name)
    again = requests(settings, LATER)
    assert [r.name for r in again] == [f"{DATA_JOB}:{key}"]
    with_feeds = ArtifactStore(root).load("signals", key).sha256
    materialize(settings, key)
    without = ArtifactStore(root).load("signals", key).sha256
    assert without != with_feeds
    # the models learnt from signals that are no more
    assert due(settings, LATER) == [f"{MODEL_JOB}:{k}" for k in scheduled_asof(settings) if k > key]
    for path in late:
        shutil.move(away / path.name, path)
    back = requests(settings, LATER)
    assert back[0].name == f"{DATA_JOB}:{key}"
    assert back[0].inputs != again[0].inputs
    materialize(settings, key)
    assert ArtifactStore(root).load("signals", key).sha256 == with_feeds
    assert due(settings, LATER) == []
    # delivered again: other bytes of the same size; then, remade, the same again
    book = next(settings.dbn_dir.glob(f"*{day}.mbp-10*"))
    os.utime(book, ns=(book.stat().st_atime_ns, book.stat().st_mtime_ns + 1))
    assert due(settings, LATER) == [f"{DATA_JOB}:{key}"]
    flat = settings.dbn_dir / f"{keys[5]}.csv.gz"
    flat.write_bytes(b"")
    assert due(settings, LATER) == [f"{DATA_JOB}:{key}", f"{DATA_JOB}:{keys[5]}"]


def test_a_session_whose_trades_are_gone_stands_and_is_named(
    demo: Demo, tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(demo.root, root)
    settings = replace(demo.settings, root=root, dbn_dir=root / "dbn")
    gone, short = all_sessions(settings)[3:5]
    next(settings.dbn_dir.glob(f"spy-{gone.replace('-', '')}.trades*")).unlink()
    path = next(settings.dbn_dir.glob(f"spy-{short.replace('-', '')}.trades*"))
    session, symbols = calendar_of("SPY").session(short), {s.instrument_id: "SPY" for s in read_header(path).symbols}
    half = read_records(path)[:1000]
    path.write_bytes(dbn_bytes(half, symbols=symbols, start_ns=session.open_ns, end_ns=session.regular_open_ns + 1))
    changed = "made from other files than are there, which do not cover regular hours"
    assert judged(settings, LATER) == [Stands(gone, "made from files that are gone"), Stands(short, changed)]
    said = evaluated(settings, instance).skip_message
    assert said == f"nothing is asked for; made from files that are gone: {gone}; {changed}: {short}"


def materialize(settings: Settings, key: str) -> None:
    with dg.instance_for_test() as instance:
        job = build_definitions(settings).resolve_job_def(DATA_JOB)
        assert job.execute_in_process(instance=instance, partition_key=key, run_config=QUIET).success


def test_a_file_that_may_still_be_written_is_waited_for(broken: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "growing"
    shutil.copytree(broken.dbn_dir, folder)
    settings, keys = replace(broken, dbn_dir=folder), all_sessions(broken)
    path = next(folder.glob(f"*{keys[1].replace('-', '')}.mbp-10*"))
    written = closing(settings, keys[-1], 3000)
    os.utime(path, (written.timestamp(), written.timestamp()))
    assert f"{DATA_JOB}:{keys[1]}" not in due(settings, written + timedelta(minutes=4))
    assert f"{DATA_JOB}:{keys[0]}" in due(settings, written + timedelta(minutes=4))
    assert f"{DATA_JOB}:{keys[1]}" in due(settings, written + timedelta(minutes=5))


def test_nothing_is_due_after_the_whole_demo(demo: Demo) -> None:
    assert due(demo.settings, LATER) == []


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as made:
        yield made


def tick(settings: Settings, instance: dg.DagsterInstance, now: datetime | None = None) -> list[dg.RunRequest]:
    return list(evaluated(settings, instance, now).run_requests or [])


def evaluated(settings: Settings, instance: dg.DagsterInstance, now: datetime | None = None) -> dg.SensorExecutionData:
    """A tick, in an hour unless told: files are settled and failed runs may be asked for again, those under way are not lost."""
    now = now or datetime.now(UTC) + timedelta(hours=1)
    definitions = build_definitions(settings)
    jobs = {name: definitions.resolve_job_def(name) for name in (DATA_JOB, MODEL_JOB, REPORT_JOB)}
    sensor = nightly_sensor(settings, jobs, clock=lambda: now)
    with dg.build_sensor_context(instance=instance, definitions=definitions) as context:
        return sensor.evaluate_tick(context)


def started(settings: Settings, instance: dg.DagsterInstance, request: dg.RunRequest) -> dg.DagsterRun:
    """What the daemon does with a request."""
    job = build_definitions(settings).resolve_job_def(request.job_name or "")
    return instance.create_run_for_job(job, tags={**request.tags}, run_config={})


def test_a_tick_asks_for_few_and_the_next_for_the_rest(broken: Settings, instance: dg.DagsterInstance) -> None:
    keys = all_sessions(broken)
    first = tick(broken, instance)
    limit = broken.nightly.max_sessions_per_tick
    assert [r.partition_key for r in first] == keys[:limit]
    assert [r.run_key for r in first] == [r.key(1) for r in requests(broken, LATER)[:limit]]
    for request in first:
        started(broken, instance, request)
    # a new process has no memory of the last tick but the instance's runs
    assert [r.partition_key for r in tick(broken, instance)] == keys[limit : 2 * limit]


def test_a_failed_run_is_asked_again_a_few_times_and_not_at_once(
    broken: Settings, instance: dg.DagsterInstance
) -> None:
    one = replace(broken, nightly=NightlySettings(max_sessions_per_tick=1, retry_min=30, settle_min=0))
    key = all_sessions(one)[0]
    asked = []
    for attempt in range(3):
        (request,) = tick(one, instance)
        assert request.partition_key == key, attempt
        asked.append(request.run_key)
        run = started(one, instance, request)
        assert all(r.partition_key != key for r in tick(one, instance))  # it is under way
        instance.report_run_failed(run)
        soon = datetime.now(UTC) + timedelta(minutes=1)
        assert all(r.partition_key != key for r in tick(one, instance, soon))
    assert len(set(asked)) == 3
    for _ in range(3):
        assert all(r.partition_key != key for r in tick(one, instance)), "used up"


def test_runs_that_succeeded_use_up_no_attempts(broken: Settings, instance: dg.DagsterInstance, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(broken.dbn_dir, folder)
    one = replace(broken, dbn_dir=folder, nightly=NightlySettings(max_sessions_per_tick=1, max_attempts=2))
    key, keys = all_sessions(one)[0], set()
    path = next(folder.glob(f"spy-{key.replace('-', '')}.trades*"))
    first_ns = path.stat().st_mtime_ns
    ends = ("failed", "success", "other", "failed", "success", "other", "canceled", "failed")
    for end in ends:
        (request,) = tick(one, instance)
        assert request.partition_key == key, end
        keys.add(request.run_key)
        run = started(one, instance, request)
        if end == "failed":
            instance.report_run_failed(run)
        elif end == "canceled":
            instance.report_run_canceled(run)
        else:  # the file is another, and then as it was
            succeed(instance, run)
            os.utime(path, ns=(first_ns, first_ns + (1 if end == "success" else 0)))
    assert len(keys) == len(ends)  # Dagster skips a key that it has seen
    assert tick(one, instance)[0].partition_key != key


def succeed(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    instance.report_dagster_event(dg.DagsterEvent("PIPELINE_SUCCESS", run.job_name), run.run_id)


def test_a_run_that_leaves_its_work_due_is_not_asked_for_again(
    broken: Settings, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    shutil.copytree(broken.dbn_dir, folder)
    settings = replace(broken, dbn_dir=folder, nightly=NightlySettings(max_sessions_per_tick=1))
    keys, fold = all_sessions(settings), scheduled_asof(settings)[0]
    key = keys[0]
    pretend(settings, SESSION_ASSETS, keys)
    store = ArtifactStore(settings.root)
    store.publish("book_snapshots", key, {"x.json": b"{}"}, metadata={SEEN_INPUTS: "other files"})
    store.publish("signals", key, {"x.json": b"{}"}, inputs={"levels": "0" * 64}, metadata={})
    (request,) = tick(settings, instance)
    assert (request.job_name, request.partition_key) == (DATA_JOB, key)
    run = started(settings, instance, request)
    succeed(instance, run)
    left = f"{DATA_JOB}:{key}: made by run {run.run_id[:8]}, yet still due: "
    left += f"book_snapshots saw other files, signals was made from another levels [{key}]"
    soon = tick(settings, instance, datetime.now(UTC) + timedelta(minutes=1))
    assert fold not in [r.partition_key for r in soon]  # what this tick read may be older than what the run made
    # like a session that was given up it stands, and its models are made; each of their runs leaves them due
    for asof in scheduled_asof(settings):
        (model,) = tick(settings, instance)
        assert (model.job_name, model.partition_key) == (MODEL_JOB, asof)
        succeed(instance, started(settings, instance, model))
    for hours in (1, 24, 1000):
        said = evaluated(settings, instance, datetime.now(UTC) + timedelta(hours=hours))
        assert not said.run_requests
        assert left in (said.skip_message or "")
        assert f"{MODEL_JOB}:{fold}: made by run " in (said.skip_message or "")
        assert f"yet still due: {MODEL_ASSETS[0]} is missing" in (said.skip_message or "")
    path = next(folder.glob(f"spy-{key.replace('-', '')}.mbp-10*"))
    os.utime(path, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns + 1))
    (again,) = tick(settings, instance)
    assert again.partition_key == key
    assert again.tags["spymaster/inputs"] != request.tags["spymaster/inputs"]


def test_what_is_lost_or_made_by_hand_after_a_run_is_asked_for_again(
    demo: Demo, tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(demo.root, root)
    twice = NightlySettings(max_sessions_per_tick=1, max_attempts=2)
    settings = replace(demo.settings, root=root, dbn_dir=root / "dbn", nightly=twice)
    key, store = all_sessions(settings)[3], ArtifactStore(root)

    def asked() -> dg.RunRequest | None:
        found = tick(settings, instance)
        return found[0] if found and found[0].job_name == DATA_JOB else None

    def run(request: dg.RunRequest | None) -> None:
        assert request is not None
        job = build_definitions(settings).resolve_job_def(DATA_JOB)
        assert job.execute_in_process(
            instance=instance, partition_key=request.partition_key, tags=request.tags, run_config=QUIET
        ).success

    shutil.rmtree(root / "signals" / key)
    run(asked())
    assert asked() is None
    registered = store.load("market_files", key)
    files = {name: registered.read(name) for name in registered.files}
    store.publish("market_files", key, files, inputs=registered.inputs, metadata={SEEN_INPUTS: "as a fault leaves it"})
    assert asked() is None
    said = evaluated(settings, instance).skip_message or ""
    assert f"{DATA_JOB}:{key}: made by run " in said
    assert "yet still due: market_files saw other files" in said
    instance.report_runless_asset_event(dg.AssetMaterialization("levels", partition=key))  # by hand
    run(asked())
    assert asked() is None
    # lost again: the second run in a row on the same input was the last
    shutil.rmtree(root / "signals" / key)
    assert asked() is None
    assert "yet still due: signals is missing" in (evaluated(settings, instance).skip_message or "")


def test_new_input_of_a_session_that_was_given_up_is_tried_again(
    broken: Settings, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(broken.dbn_dir, folder)
    once = NightlySettings(max_sessions_per_tick=100, max_attempts=1)
    settings = replace(broken, dbn_dir=folder, nightly=once)
    key = all_sessions(settings)[0]
    path = next(folder.glob(f"spy-{key.replace('-', '')}.trades*"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    first = tick(settings, instance)
    assert first[0].partition_key == key
    for request in first:
        instance.report_run_failed(started(settings, instance, request))
    for _ in range(3):  # the truncated file is no endless loop
        said = evaluated(settings, instance)
        assert not said.run_requests
        assert f"{DATA_JOB}:{key}: given up after 1 failed runs on the same input" in (said.skip_message or "")
    path.write_bytes(whole)
    assert [r.partition_key for r in tick(settings, instance)] == [key]


def test_a_run_whose_worker_was_killed_is_asked_for_again(broken: Settings, instance: dg.DagsterInstance) -> None:
    one = replace(broken, nightly=NightlySettings(max_sessions_per_tick=1, settle_min=0, max_run_min=90))
    (request,) = tick(one, instance)
    assert request.tags["dagster/max_runtime"] == "5400"
    run = started(one, instance, request)
    begin(instance, run)
    began = datetime.now(UTC)
    before, after = (tick(one, instance, began + timedelta(minutes=m)) for m in (89, 91))
    assert before[0].partition_key != request.partition_key
    assert after[0].partition_key == request.partition_key
    assert after[0].run_key not in (None, request.run_key)
    # a run that was created and never launched
    started(one, instance, after[0])
    assert tick(one, instance, began + timedelta(minutes=89))[0].partition_key != request.partition_key
    assert tick(one, instance, began + timedelta(minutes=92))[0].partition_key == request.partition_key
    # a run that queues is started in its turn, however late
    origin = RemoteJobOrigin(RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("here"), "graph"), DATA_JOB)
    job = build_definitions(one).resolve_job_def(DATA_JOB)
    queued = dg.DagsterRunStatus.QUEUED
    instance.create_run_for_job(job, tags={**request.tags}, remote_job_origin=origin, status=queued)
    assert tick(one, instance, began + timedelta(days=3))[0].partition_key != request.partition_key


def begin(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """What a worker reports first."""
    instance.report_dagster_event(dg.DagsterEvent("PIPELINE_START", run.job_name), run.run_id)


def test_what_holds_a_request_is_said(broken: Settings, instance: dg.DagsterInstance) -> None:
    settings = replace(broken, nightly=NightlySettings(max_sessions_per_tick=100))
    asked = tick(settings, instance)
    runs = [started(settings, instance, r) for r in asked]
    instance.report_run_failed(runs[0])
    said = evaluated(settings, instance, datetime.now(UTC) + timedelta(minutes=10)).skip_message or ""
    assert f"{DATA_JOB}:{asked[0].partition_key}: its last run has just ended" in said
    for run, request in zip(runs[1:], asked[1:], strict=True):
        assert f"{DATA_JOB}:{request.partition_key}: run {run.run_id[:8]} of " in said


def test_the_instance_ends_runs_whose_worker_is_gone(
    broken: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dagster.yaml").write_bytes(_instance_config())
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert instance.run_monitoring_enabled
        assert isinstance(instance.run_launcher, DefaultRunLauncher)
        nightly, by_hand = (
            started(broken, instance, dg.RunRequest(job_name=DATA_JOB, tags=tags))
            for tags in (tick(broken, instance)[0].tags, {})
        )
        for run in (nightly, by_hand):
            begin(instance, run)
        never = started(broken, instance, dg.RunRequest(job_name=DATA_JOB))
        context: Any = SimpleNamespace(instance=instance, create_request_context=lambda: None)

        def unfinished(after_s: float) -> set[str]:
            monkeypatch.setattr(run_monitoring, "get_current_timestamp", lambda: time.time() + after_s)
            assert not any(run_monitoring.execute_run_monitoring_iteration(context, logging.getLogger("test")))
            return {r.run_id for r in instance.get_runs() if not r.is_finished}

        assert unfinished(590) == {nightly.run_id, by_hand.run_id, never.run_id}
        assert unfinished(610) == {nightly.run_id, by_hand.run_id}
        assert unfinished(broken.nightly.max_run_min * 60 + 1) == {by_hand.run_id}
        assert unfinished(86_401) == set()


def test_models_do_not_wait_for_a_session_that_was_given_up(broken: Settings) -> None:
    keys, folds = all_sessions(broken), scheduled_asof(broken)
    pretend(broken, SESSION_ASSETS, keys)
    stale = ArtifactStore(broken.root)
    stale.publish("book_snapshots", keys[0], {"x.json": b"{}"}, metadata={SEEN_INPUTS: "other files"})
    assert due(broken, LATER)[0] == f"{DATA_JOB}:{keys[0]}"
    assert f"{MODEL_JOB}:{folds[0]}" not in due(broken, LATER)
    left = judged(broken, LATER, lambda r: Turn(gave_up=True, why="given up") if r.partition == keys[0] else Turn(1))
    assert isinstance(left[0], Request)
    assert left[0].name == f"{MODEL_JOB}:{folds[0]}"


def test_what_a_fold_waits_for_is_named(broken: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(broken.dbn_dir, folder)
    settings, keys, folds = replace(broken, dbn_dir=folder), all_sessions(broken), scheduled_asof(broken)
    before = keys[: keys.index(folds[0])]
    given_up, growing, absent = before[2], before[4], before[5]
    pretend(settings, SESSION_ASSETS, [k for k in keys if k not in (given_up, growing, absent)])
    now = closing(settings, keys[-1], 3000)
    path = next(folder.glob(f"spy-{growing.replace('-', '')}.trades*"))
    os.utime(path, (now.timestamp(), now.timestamp()))
    next(folder.glob(f"spy-{absent.replace('-', '')}.trades*")).unlink()

    def turn_of(request: Request) -> Turn:
        return Turn(gave_up=True, why="given up") if request.partition == given_up else Turn(1)

    found = judged(settings, now, turn_of)
    assert all(isinstance(w, Wait) for w in found)
    assert [w.name for w in found] == [f"{MODEL_JOB}:{k}" for k in folds]
    assert isinstance(found[0], Wait)
    assert list(found[0].sessions) == [given_up, growing, absent]
    assert str(found[0]) == (
        f"{MODEL_JOB}:{folds[0]} waits for {given_up} (given up), "
        f"{growing} (a file may still be growing, it was written less than 5 min ago), "
        f"{absent} (its files do not cover regular hours)"
    )


def test_a_report_that_is_due_waits_for_its_tests_and_one_whose_tests_are_to_come_is_not_due(broken: Settings) -> None:
    keys, fold = all_sessions(broken), scheduled_asof(broken)[0]
    at = keys.index(fold)
    last = at + broken.split.retrain_every_sessions - 1
    pretend(broken, SESSION_ASSETS, keys[:last])
    pretend(broken, MODEL_ASSETS, [fold])
    assert judged(broken, closing(broken, keys[last], 0)) == []
    asked, wait = judged(broken, closing(broken, keys[last], 60))[:2]
    assert asked.name == f"{DATA_JOB}:{keys[last]}"
    assert wait == Wait(f"{REPORT_JOB}:{fold}", {keys[last]: "its run is due"})


def test_a_session_that_was_given_up_is_said_whether_runs_are_asked_for_or_not(
    broken: Settings, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(broken, nightly=NightlySettings(max_attempts=1))
    keys, fold = all_sessions(broken), scheduled_asof(broken)[0]
    pretend(settings, SESSION_ASSETS, [k for k in keys[:-1] if k != keys[3]])
    asked = tick(settings, instance)
    assert [r.partition_key for r in asked] == [keys[3], keys[-1]]
    instance.report_run_failed(started(settings, instance, asked[0]))
    waits = f"{MODEL_JOB}:{fold} waits for {keys[3]} (given up after 1 failed runs on the same input)"
    logged: list[str] = []
    monkeypatch.setattr(InstigationLogger, "info", lambda self, text: logged.append(text))
    assert [r.partition_key for r in tick(settings, instance)] == [keys[-1]]
    assert len(logged) == 1
    assert waits in logged[0]
    pretend(settings, SESSION_ASSETS, keys[-1:])
    said = evaluated(settings, instance)
    assert not said.run_requests
    assert waits in (said.skip_message or "")


def test_off_means_off(broken: Settings, instance: dg.DagsterInstance) -> None:
    off = replace(broken, nightly=NightlySettings(enabled=False))
    said = evaluated(off, instance)
    assert not said.run_requests
    assert "disabled by configuration" in (said.skip_message or "")
    assert nightly_sensor(off, {}).default_status == dg.DefaultSensorStatus.STOPPED
    assert Settings.load({"SPYMASTER_NIGHTLY": "0", "SPYMASTER_DATA_DIR": str(broken.root)}).nightly.enabled is False


def test_an_unreadable_folder_is_said_and_nothing_is_asked(broken: Settings, instance: dg.DagsterInstance) -> None:
    said = evaluated(replace(broken, dbn_dir=broken.root / "absent"), instance)
    assert not said.run_requests
    assert "cannot be read" in (said.skip_message or "")
