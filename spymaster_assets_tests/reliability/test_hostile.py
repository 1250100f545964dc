"""A corpus of hostile files for every loader: all refused with the typed error, nothing run, no process lost, memory bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from spymaster_assets_tests.reliability.hostile import LOADERS

MAX_GROWTH_MIB = 1024
TYPED = {"ArtifactError", "ContractError", "MarketDataError", "MissingInputError", "ModelError", "SplitError"}


def test_every_hostile_file_is_refused(tmp_path: Path) -> None:
    # a process that only imports and forks: a fork of one that has computed would inherit locks of threads that do not exist
    command = [sys.executable, "-m", "spymaster_assets_tests.reliability.hostile", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    hostile = [one for one in told if not one["name"].endswith(".good")]
    assert {one["name"] for one in told if one not in hostile} == {
        one["name"] for one in told if one["outcome"] == "loaded"
    }
    assert [one for one in hostile if one["outcome"] not in TYPED] == []
    assert len(hostile) >= 250
    assert {one["name"].split(".")[0] for one in hostile} == set(LOADERS)
    assert [one for one in told if one["grown_mib"] > MAX_GROWTH_MIB] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus"], "a payload ran or a name left its folder"
