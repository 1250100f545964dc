"""The command line as a user runs it, in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spymaster_assets.cli import main
from spymaster_assets.store import ArtifactStore


def test_simulate_then_materialize_then_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(tmp_path / "dbn"), "--sessions", "2"]) == 0
    env = {**os.environ, "SPYMASTER_DATA_DIR": str(tmp_path), "DAGSTER_HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "spymaster_assets.definitions"]
    chosen = ["--select", "market_files,ohlcv_bars", "--partition", "2024-02-01"]
    done = subprocess.run([*command, *chosen], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ArtifactStore(tmp_path).keys("ohlcv_bars") == ["2024-02-01"]
    bad = subprocess.run(
        [*command, "--select", "market_files", "--partition", "2024-02-03"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert bad.returncode != 0, "a Saturday is no partition"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPYMASTER_DATA_DIR", str(tmp_path))
        capsys.readouterr()
        assert main(["status"]) == 0
    assert "ohlcv_bars" in capsys.readouterr().out


def test_a_fault_is_one_line_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spymaster.json").write_text(json.dumps({"symbol": "NOPE"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPYMASTER_DATA_DIR", str(tmp_path))
        assert main(["status"]) == 1
    said = capsys.readouterr().err
    assert "ConfigError" in said
    assert "NOPE" in said
    assert "Traceback" not in said


def test_a_folder_without_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--root", str(tmp_path / "out"), "--data", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("prove --seed -1", "--seed: '-1' is not a whole number of at least 0"),
        ("prove --cuts -5", "--cuts: '-5' is not a whole number of at least 1"),
        ("prove --cuts 0", "at least 1"),
        ("prove --cuts many", "--cuts: 'many' is not a whole number"),
        ("history --touches -1", "--touches: '-1' is not a whole number of at least 1"),
        ("history --seed 1.5", "--seed: '1.5' is not"),
        ("simulate nowhere --sessions 0", "--sessions: '0' is not"),
        ("simulate nowhere --seed -7", "--seed: '-7' is not"),
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
