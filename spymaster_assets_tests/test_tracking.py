"""Runs in a real MLflow store (SQLite) and in W&B offline files, under one name."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from spymaster_assets.errors import TrackingError
from spymaster_assets.tracking import TrackingSettings, flatten, run_name, track


def settings(root: Path, **env: str) -> TrackingSettings:
    return TrackingSettings.from_env(root, env)


def test_a_run_has_one_name_in_both_trackers(tmp_path: Path) -> None:
    s = settings(tmp_path, WANDB_MODE="offline")
    name = run_name("patchtst", "2.0.0", "2024-03-01", "2024-03-20", 42)
    params = {"tree": {"depth": 4}, "sessions": ["a", "b"], "long": "x" * 2000}
    with track(s, experiment="spymaster_patchtst", run_name=name, params=params, tags={"dataset_hash": "abc"}) as run:
        run.log_metrics({"auc": 0.6, "empty": None, "nan": float("nan")})
        run.log_metrics({"loss": 1.0}, step=0)
        run.log_metrics({"loss": 0.5}, step=1)
        run.log_artifact(b"{}", "run_metadata.json")
    client = MlflowClient(tracking_uri=s.mlflow_uri)
    stored = client.get_run(run.ids["mlflow_run_id"])
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == name == "patchtst-v2.0.0-2024-03-01_2024-03-20-42"
    assert stored.data.params == {"tree.depth": "4", "sessions": "a,b"}
    assert stored.data.metrics == {"auc": 0.6, "loss": 0.5}
    assert stored.data.tags["dataset_hash"] == "abc"
    assert {f.path for f in client.list_artifacts(stored.info.run_id)} == {"run_metadata.json", "params_long.json"}
    assert client.get_experiment(stored.info.experiment_id).name == "spymaster_patchtst"
    offline = list((tmp_path / "wandb").glob(f"offline-run-*-{run.ids['wandb_run_id']}/run-*.wandb"))
    assert len(offline) == 1
    assert name.encode() in offline[0].read_bytes()


def test_a_failing_body_marks_the_run_failed(tmp_path: Path) -> None:
    s = settings(tmp_path, SPYMASTER_TRACKING="mlflow")
    ids = {}

    def fail() -> None:
        with track(s, experiment="e", run_name="n", params={}, tags={}) as run:
            ids.update(run.ids)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert MlflowClient(tracking_uri=s.mlflow_uri).get_run(ids["mlflow_run_id"]).info.status == "FAILED"


def test_wandb_online_without_a_key_fails_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrackingError, match=r"no key.*WANDB_API_KEY.*WANDB_MODE=offline"):
        settings(tmp_path, WANDB_MODE="online").check()
    (tmp_path / "wandb.txt").write_text("0123\n")
    settings(tmp_path, WANDB_MODE="online").check()


def test_a_store_that_cannot_be_reached_is_a_typed_error(tmp_path: Path) -> None:
    s = settings(tmp_path, MLFLOW_TRACKING_URI="sqlite:////dev/null/mlflow.db", SPYMASTER_TRACKING="mlflow")
    with pytest.raises(TrackingError, match="MLflow at"), track(s, experiment="e", run_name="n", params={}, tags={}):
        pass


def test_names_come_from_the_environment(tmp_path: Path) -> None:
    s = settings(
        tmp_path, MLFLOW_EXPERIMENT_NAME="mine", WANDB_PROJECT="p", WANDB_ENTITY="team", SPYMASTER_TRACKING="off"
    )
    assert (s.experiment, s.wandb_project, s.wandb_entity, s.trackers) == ("mine", "p", "team", ())
    with pytest.raises(TrackingError, match="unknown tracker"):
        settings(tmp_path, SPYMASTER_TRACKING="mlfow")


def test_flatten_opens_dictionaries_and_joins_lists() -> None:
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": "1", "a.c": "1,2", "d": "None"}
