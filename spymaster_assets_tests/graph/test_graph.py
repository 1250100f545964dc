"""The graph as Dagster runs it: materializations, metadata, checks, partitions, faults."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from mlflow import MlflowClient

from spymaster_assets import store as store_module
from spymaster_assets.assets.common import QUIET
from spymaster_assets.automation.replay_checks import CHECK
from spymaster_assets.contract import load_contract
from spymaster_assets.definitions import build_definitions
from spymaster_assets.market.simulate import write_market
from spymaster_assets.partitions import (
    MODEL_ASSETS,
    REPORT_ASSET,
    SESSION_ASSETS,
    all_sessions,
    calendar_of,
    scheduled_asof,
)
from spymaster_assets.settings import Settings
from spymaster_assets.store import REPORT_KEY, ArtifactStore
from spymaster_assets.tracking import TrackingSettings
from spymaster_assets_tests.graph.conftest import Demo


def events(demo: Demo, asset: str) -> list[dg.AssetMaterialization]:
    records = demo.instance.fetch_materializations(dg.AssetKey(asset), limit=100).records
    return [r.asset_materialization for r in records if r.asset_materialization]


def test_every_asset_is_materialized_for_every_partition(demo: Demo) -> None:
    sessions, folds = all_sessions(demo.settings), scheduled_asof(demo.settings)
    assert (len(sessions), len(folds)) == (16, 2)
    for assets, keys in ((SESSION_ASSETS, sessions), ((*MODEL_ASSETS, REPORT_ASSET), folds)):
        for asset in assets:
            assert demo.store.keys(asset) == keys
            assert {e.partition for e in events(demo, asset)} == set(keys)
    assert len(events(demo, "walk_forward_report")) == 1


def test_metadata_that_people_look_at(demo: Demo) -> None:
    wanted = {
        "market_files": {"records", "coverage_regular", "coverage_premarket", "front", "simulated"},
        "ohlcv_bars": {"dagster/row_count", "regular_minutes", "volume"},
        "book_snapshots": {"dagster/row_count", "coverage_regular", "crossed_records", "present"},
        "option_flow": {"dagster/row_count", "coverage_regular", "implied_volatility", "present"},
        "spot_basis": {"source"},
        "levels": {"dagster/row_count", "rows_by_kind", "rolls"},
        "signals": {"dagster/row_count", "chart", "label_balance", "base_rates", "null_share", "simulated"},
        "sequence_dataset": {"dagster/row_count"},
        "split_manifest": {"folds", "purged", "embargoed", "test_sessions"},
        "patchtst_model": {"loss", "metrics", "simulated"},
        "tree_bundles": {"validation", "gain", "skipped", "simulated"},
        "canaries": {"verdicts", "intervals", "failed", "simulated"},
        "calibration_report": {"reliability", "scores", "simulated"},
        "walk_forward_report": {"fold_strip", "scores", "report", "simulated"},
    }
    for asset, names in wanted.items():
        for event in events(demo, asset):
            assert names <= set(event.metadata), (asset, sorted(event.metadata))
            assert "path" in event.metadata or "report" in event.metadata
    chart = events(demo, "signals")[0].metadata["chart"].value
    assert "data:image/png;base64," in str(chart)


def test_all_checks_ran_and_hold(demo: Demo) -> None:
    names = {
        (key.asset_key.to_user_string(), key.name)
        for checks in demo.definitions.asset_checks or []
        for key in checks.check_keys
        if key.name != CHECK  # replays have a job of their own
    }
    assert len(names) >= 8
    seen = set()
    for record in demo.instance.event_log_storage.get_event_records(
        dg.EventRecordsFilter(dg.DagsterEventType.ASSET_CHECK_EVALUATION), limit=1000
    ):
        event = record.event_log_entry.dagster_event
        assert event is not None
        check = event.asset_check_evaluation_data
        if check.check_name == CHECK:
            continue
        seen.add((check.asset_key.to_user_string(), check.check_name))
        assert check.passed, (check.asset_key, check.check_name, check.metadata)
    assert names == seen


def test_groups_and_lineage(demo: Demo) -> None:
    graph = demo.definitions.resolve_asset_graph()
    groups = {key.to_user_string(): graph.get(key).group_name for key in graph.get_all_asset_keys()}
    assert set(groups.values()) == {"market", "signals", "datasets", "models", "proof"}
    upstream = {k: {p.to_user_string() for p in graph.get(dg.AssetKey(k)).parent_keys} for k in groups}
    assert upstream["ohlcv_bars"] == {"market_files"}
    assert {"book_snapshots", "option_flow"} <= upstream["signals"]
    assert "signals" in upstream["split_manifest"]
    assert "split_manifest" in upstream["patchtst_model"]
    assert upstream["canaries"] == {"split_manifest", "signals", "sequence_dataset"}
    assert "canaries" in upstream["calibration_report"]
    assert upstream["walk_forward_report"] == {"calibration_report", "canaries"}


def test_partitions_are_sessions(demo: Demo) -> None:
    keys = demo.definitions.resolve_assets_def("signals").partitions_def.get_partition_keys()
    assert keys == all_sessions(demo.settings)
    assert all(date.fromisoformat(k).weekday() < 5 for k in keys)
    assert "2024-02-19" not in keys  # Presidents' Day


def test_the_report_is_the_same_at_another_revision(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    before = demo.store.load("walk_forward_report", REPORT_KEY)
    monkeypatch.setattr(store_module, "git_revision", lambda: "f" * 40)
    with dg.instance_for_test() as instance:
        assert (
            demo.definitions.resolve_implicit_global_asset_job_def()
            .execute_in_process(
                instance=instance, asset_selection=[dg.AssetKey("walk_forward_report")], run_config=QUIET
            )
            .success
        )
    after = demo.store.load("walk_forward_report", REPORT_KEY)
    assert after.provenance["git_revision"] == "f" * 40 != before.provenance["git_revision"]
    assert after.sha256 == before.sha256


def test_one_bad_file_fails_its_session_and_no_other(demo: Demo, tmp_path: Path) -> None:
    folder = tmp_path / "dbn"
    shutil.copytree(demo.settings.dbn_dir, folder)
    sessions = all_sessions(demo.settings)[:3]
    victim = next(p for p in sorted(folder.glob("spy-2*.trades.dbn.zst")) if sessions[1].replace("-", "") in p.name)
    victim.write_bytes(victim.read_bytes()[:-5000])
    settings = replace(demo.settings, root=tmp_path / "root", dbn_dir=folder)
    definitions = build_definitions(settings)
    with dg.instance_for_test() as instance:
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey("market_files")],
            tags={
                "dagster/asset_partition_range_start": sessions[0],
                "dagster/asset_partition_range_end": sessions[-1],
            },
            run_config=QUIET,
            raise_on_error=False,
        )
        assert not result.success
        failure = next(e for e in result.all_events if e.is_step_failure).step_failure_data
        assert f"[{sessions[1]}]" in str(failure.user_failure_data or failure.error)
        assert victim.name in str(failure.user_failure_data or failure.error)
        recorded = instance.fetch_materializations(dg.AssetKey("market_files"), limit=10).records
    assert {r.partition_key for r in recorded} == {sessions[0], sessions[2]}
    assert ArtifactStore(tmp_path / "root").keys("market_files") == [sessions[0], sessions[2]]


def test_a_missing_upstream_names_what_to_run(broken: Settings) -> None:
    definitions = build_definitions(broken)
    key = all_sessions(broken)[0]
    with dg.instance_for_test() as instance:
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            partition_key=key,
            asset_selection=[dg.AssetKey("ohlcv_bars")],
            run_config=QUIET,
            raise_on_error=False,
        )
    failure = next(e for e in result.all_events if e.is_step_failure).step_failure_data
    assert f"dagster asset materialize --select market_files --partition {key}" in str(
        failure.user_failure_data or failure.error
    )


def test_signals_tell_their_contract_in_the_file(demo: Demo) -> None:
    key = all_sessions(demo.settings)[-1]
    path = demo.store.load("signals", key).path(f"signals_{key}.parquet")
    metadata = pl.read_parquet_metadata(path)
    contract = load_contract()
    assert contract.schema_version in json.dumps(metadata)
    assert contract.sha256 in json.dumps(metadata)


def test_models_judge_later_sessions_only(demo: Demo) -> None:
    for asof in scheduled_asof(demo.settings):
        split = demo.store.load("split_manifest", asof).json("split.json")
        report = demo.store.load("calibration_report", asof).json("calibration.json")
        assert max(split["train"] + split["validation"]) < asof <= min(report["test_sessions"])
        neighbours = demo.store.load("retrieval_index", asof)
        assert neighbours.files


@pytest.mark.parametrize("asset", ["patchtst_model", "tree_bundles", "retrieval_index", "calibration_report"])
def test_training_assets_are_tracked_under_one_name(demo: Demo, asset: str) -> None:
    client = MlflowClient(tracking_uri=TrackingSettings.from_env(demo.root, {}).mlflow_uri)
    for asof in scheduled_asof(demo.settings):
        run = client.get_run(demo.store.load(asset, asof).metadata["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        assert run.data.tags["asof"] == asof
        assert run.data.tags["simulated"] == "true"
        assert run.data.metrics
        assert {"dataset_hash", "git_revision"} <= set(run.data.tags)


def test_missing_feeds_are_stated_and_their_columns_null(broken: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "trades-only"
    calendar = calendar_of("SPY")
    keys = all_sessions(broken)[:2]
    write_market(folder, broken.instrument, [calendar.session(k) for k in keys], 1)
    settings = replace(broken, dbn_dir=folder, first_session=keys[0], last_session=keys[-1])
    with dg.instance_for_test() as instance:
        assert (
            build_definitions(settings)
            .resolve_job_def("session_data")
            .execute_in_process(
                instance=instance,
                tags={"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]},
                run_config=QUIET,
            )
            .success
        )
    store = ArtifactStore(settings.root)
    for key in keys:
        assert store.load("book_snapshots", key).json("feed.json")["present"] is False
        assert store.load("option_flow", key).json("feed.json")["present"] is False
        path = store.load("signals", key).path(f"signals_{key}.parquet")
        frame = pl.read_parquet(path)
        for column in ("barrier_state", "gamma_exposure", "gamma_bucket", "net_break_pressure"):
            assert frame[column].null_count() == frame.height > 0
        assert frame["tape_imbalance"].null_count() < frame.height
