"""The same inputs give the same bytes: in another folder, another process, another order of partitions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from spymaster_assets.partitions import MODEL_ASSETS, REPORT_ASSET, SESSION_ASSETS, all_sessions, scheduled_asof
from spymaster_assets.settings import CONFIG_NAME
from spymaster_assets.store import ArtifactStore
from spymaster_assets_tests.graph.conftest import Demo

REBUILD = """
import json, sys
from spymaster_assets.automation.shadow import rebuild
from spymaster_assets.partitions import resolve
from spymaster_assets.settings import Settings

settings = resolve(Settings.load())
for assets, keys in json.load(sys.stdin):
    for key in keys:
        rebuild(settings, assets, key)
"""


def test_another_folder_process_and_order_give_equal_hashes(demo: Demo, tmp_path: Path) -> None:
    asof = scheduled_asof(demo.settings)[0]
    sessions = all_sessions(demo.settings)
    sessions = sessions[: sessions.index(asof) + demo.settings.split.retrain_every_sessions]
    root, dbn = tmp_path / "elsewhere" / "store", tmp_path / "market"
    shutil.copytree(demo.settings.dbn_dir, dbn)
    root.mkdir(parents=True)
    config = json.loads((demo.root / CONFIG_NAME).read_text())
    (root / CONFIG_NAME).write_text(json.dumps({**config, "dbn_dir": str(dbn)}))
    # the newest session first, then the oldest, then inwards: never the order of the first build
    order = [k for pair in zip(reversed(sessions), sessions, strict=True) for k in pair]
    order = list(dict.fromkeys(order))
    first = SESSION_ASSETS[:2]  # levels read the bars of sessions before
    plan = [(first, order), (SESSION_ASSETS[2:], order[::-1]), ((*MODEL_ASSETS, REPORT_ASSET), [asof])]
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SPYMASTER_", "DAGSTER_"))},
        "SPYMASTER_DATA_DIR": str(root),
        "PYTHONHASHSEED": "4321",
        "TZ": "Asia/Tokyo",
        "OMP_NUM_THREADS": "2",
        "POLARS_MAX_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", REBUILD],
        input=json.dumps(plan), env=env, cwd=tmp_path, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    again = ArtifactStore(root)
    compared = 0
    for assets, keys in plan:
        for asset in assets:
            for key in keys:
                one, other = demo.store.load(asset, key), again.load(asset, key)
                assert (one.sha256, dict(one.inputs)) == (other.sha256, dict(other.inputs)), (asset, key)
                compared += 1
    assert compared == len(SESSION_ASSETS) * len(sessions) + len(MODEL_ASSETS) + 1
