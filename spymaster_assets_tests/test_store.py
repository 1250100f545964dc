"""Artifacts: published whole, verified on read, equal content hash whatever the time."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from spymaster_assets.errors import ArtifactError, MissingInputError, MixedSettingsError
from spymaster_assets.store import MANIFEST, REPORT_KEY, ArtifactStore, content_hash, dump_json


def test_publish_then_read_returns_the_bytes(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    artifact = store.publish("bars", "2024-05-06", {"a.bin": b"abc"}, inputs={"file": "1"}, metadata={"rows": 3})
    again = store.load("bars", "2024-05-06")
    assert again == artifact
    assert again.read("a.bin") == b"abc"
    assert again.inputs == {"file": "1"}
    assert store.keys("bars") == ["2024-05-06"]


def test_keys_are_partitions_and_not_what_somebody_put_beside_them(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    for key in ("2024-02-23", "2024-02-22"):
        store.publish("signals", key, {"a": b"1"})
    for name in ("2024-02-23.bak", "old", "2024-02-23 (copy)", "20240223"):
        shutil.copytree(tmp_path / "signals" / "2024-02-23", tmp_path / "signals" / name)
    (tmp_path / "signals" / "2024-02-26").mkdir()  # nothing published yet
    assert store.keys("signals") == ["2024-02-22", "2024-02-23"]
    store.publish("walk_forward_report", REPORT_KEY, {"a": b"1"})
    assert store.keys("walk_forward_report") == [REPORT_KEY]
    assert store.keys("nothing") == []


def test_altered_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    artifact = store.publish("bars", "k", {"a.bin": b"abc"})
    artifact.path("a.bin").write_bytes(b"abd")
    with pytest.raises(ArtifactError, match=r"altered.*materialize bars \[k\] again"):
        store.load("bars", "k").read("a.bin")


def test_missing_partition_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="--select bars --partition 2024-05-06"):
        ArtifactStore(tmp_path).load("bars", "2024-05-06")


def test_require_names_every_missing_partition(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.publish("bars", "2024-05-06", {"a": b"1"})
    with pytest.raises(MissingInputError, match=r"2 of 3 partitions: 2024-05-07, 2024-05-08"):
        store.require("bars", ["2024-05-06", "2024-05-07", "2024-05-08"])


def test_provenance_is_outside_the_content_hash() -> None:
    one = dump_json({"auc": 0.5, "provenance": {"created_at": "2024"}})
    two = dump_json({"auc": 0.5, "provenance": {"created_at": "2025"}})
    other = dump_json({"auc": 0.6, "provenance": {"created_at": "2024"}})
    assert content_hash({"m.json": one}) == content_hash({"m.json": two}) != content_hash({"m.json": other})


def test_failed_write_leaves_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(tmp_path)
    store.publish("bars", "k", {"a.bin": b"old"})

    def full_disk(path: Path, data: bytes) -> None:
        path.write_bytes(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spymaster_assets.store._write_synced", full_disk)
    with pytest.raises(ArtifactError, match="No space left"):
        store.publish("bars", "k", {"a.bin": b"new"})
    monkeypatch.undo()
    assert store.load("bars", "k").read("a.bin") == b"old"
    assert not [p for p in (tmp_path / "bars" / "k").iterdir() if p.name.startswith(".") and p.is_dir()]
    store.publish("bars", "k", {"a.bin": b"new"})
    assert store.load("bars", "k").read("a.bin") == b"new"


def _publish_many(root: Path, value: int) -> None:
    for _ in range(20):
        ArtifactStore(root).publish("bars", "k", {"a.bin": bytes([value]) * 1000, "b.bin": bytes([value])})


def test_concurrent_writers_never_mix_files(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("spawn").Process(target=_publish_many, args=(tmp_path, v)) for v in (1, 2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
        assert p.exitcode == 0
    artifact = ArtifactStore(tmp_path).load("bars", "k")
    assert set(artifact.read("a.bin")) == set(artifact.read("b.bin"))


def test_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        dump_json({"auc": float("nan")})
    assert json.loads(dump_json({"b": 1, "a": 2})) == {"a": 2, "b": 1}


def test_torn_manifest_is_a_typed_error(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.publish("bars", "k", {"a": b"1"})
    (tmp_path / "bars" / "k" / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="manifest"):
        store.load("bars", "k")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def test_a_manifest_records_the_settings_of_everything_that_was_read(store: ArtifactStore) -> None:
    bars = store.publish("bars", "d1", {"a.bin": b"1"}, settings={"symbol": "SPY"})
    touches = store.publish(
        "touches", "d1", {"a.bin": b"2"}, inputs={"bars": bars.sha256}, settings={"label.mode": "dollars"}
    )
    split = store.publish(
        "split", "d2", {"a.bin": b"3"}, inputs={"touches[d1]": touches.sha256, "spy.dbn": "0", "gone": "0"}
    )
    assert dict(split.settings) == {"label.mode": "dollars", "symbol": "SPY"}
    assert store.load("split", "d2").settings == split.settings
    again = store.publish("touches", "d1", {"a.bin": b"2"}, settings={"label.mode": "volatility"})
    assert (again.sha256, again.folder) == (touches.sha256, touches.folder)
    assert store.load("touches", "d1").settings == {"label.mode": "volatility"}


def test_different_settings_are_not_read_together(store: ArtifactStore) -> None:
    for key, mode in (("2024-02-01", "dollars"), ("2024-02-02", "dollars"), ("2024-02-05", "volatility")):
        made = store.publish(
            "touches", key, {"a.bin": b"1"}, settings={"label.mode": mode, "tree.threads": len(key + mode)}
        )
    message = (
        r'^label.mode differs: "dollars" in touches\[2024-02-01, 2024-02-02\], "volatility" in touches\[2024-02-05\];'
        r'.*remedy: make it one: dagster asset materialize --select touches --partition 2024-02-05 for "dollars", or'
    )
    with pytest.raises(MixedSettingsError, match=message):
        store.require("touches", store.keys("touches"))
    assert len(store.require("touches", store.keys("touches")[:2])) == 2
    # what is made now is right, what it reads must be made again
    with pytest.raises(MixedSettingsError, match=r'--select touches --partition 2024-02-05 for "dollars"'):
        store.publish(
            "split",
            "x",
            {"a.bin": b"1"},
            inputs={"touches[2024-02-05]": made.sha256},
            settings={"label.mode": "dollars"},
        )
    assert not store.exists("split", "x")


def test_an_artifact_that_does_not_tell_its_settings_is_not_read_with_one_that_does(store: ArtifactStore) -> None:
    store.publish("touches", "d1", {"a.bin": b"1"})
    store.publish("touches", "d2", {"a.bin": b"1"}, settings={"label.mode": "dollars"})
    with pytest.raises(MixedSettingsError, match=r"not recorded in touches\[d1\]"):
        store.require("touches", ["d1", "d2"])
