"""SIGKILL at any moment: what was published stays whole, what was not is made again, and the end is the same.

8 kills of a backfill in the ordinary suite; SPYMASTER_KILLS=200 (`make nightly`) for the campaign.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spymaster_assets.partitions import MODEL_ASSETS, SESSION_ASSETS
from spymaster_assets.store import ArtifactStore
from spymaster_assets_tests.reliability.faults import forked, kill_at, leftovers, read_whole, verified, watched

KILLS = int(os.environ.get("SPYMASTER_KILLS", "8"))
OLD = {"a.bin": b"old" * 1000, "b.json": b'{"old": 1}\n'}
NEW = {"a.bin": b"new" * 70_000, "b.json": b'{"new": 1}\n'}
PUBLISHING = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir")


def test_a_publication_killed_before_every_call(tmp_path: Path) -> None:
    counted = ArtifactStore(tmp_path / "count")
    counted.publish("bars", "k", OLD)
    with watched(lambda n, name: None, PUBLISHING) as calls:
        counted.publish("bars", "k", NEW)
    seen = set()
    for n in range(len(calls)):
        store = ArtifactStore(tmp_path / str(n))
        store.publish("bars", "k", OLD)

        def killed(store: ArtifactStore = store, n: int = n) -> None:
            with watched(kill_at(n), PUBLISHING):
                store.publish("bars", "k", NEW)

        status = os.waitpid(forked(killed), 0)[1]
        assert os.WTERMSIG(status) == signal.SIGKILL
        files = read_whole(store.load("bars", "k"))
        assert files in (OLD, NEW)
        seen.add(files == NEW)
        assert read_whole(store.publish("bars", "k", NEW)) == NEW
        assert [p for p in leftovers(store) if "/." in p] == [], f"left before call {n}, {calls[n]}"
        store.publish("bars", "k", {"c": b"last"})
        assert len(leftovers(store)) <= 1
    assert seen == {True, False}
    assert verified(counted).keys() == {"bars/k"}


@pytest.mark.slow
def test_a_backfill_killed_at_random_ends_as_if_undisturbed(tmp_path: Path) -> None:
    # a process of its own: a fork of one that has computed would inherit locks of threads that do not exist
    command = [sys.executable, "-m", "spymaster_assets_tests.reliability.backfill", str(tmp_path), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600 + 20 * KILLS, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] >= KILLS
    assert told["artifacts"] == len(SESSION_ASSETS) * 5 + len(MODEL_ASSETS)
    assert told["rounds"] >= 1
