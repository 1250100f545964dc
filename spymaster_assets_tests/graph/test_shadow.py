"""Rebuilding in a shadow store on a disk that fails: no word about the asset, and nothing left behind."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from spymaster_assets.automation.shadow import RebuildFailed, files_near, rebuild, shadow_of
from spymaster_assets.errors import ArtifactError
from spymaster_assets.partitions import all_sessions, calendar_of
from spymaster_assets.proof.cutting import write_future
from spymaster_assets_tests.graph.conftest import Demo
from spymaster_assets_tests.reliability.faults import watched


def test_a_full_disk_is_no_fault_of_an_asset(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = all_sessions(demo.settings)[3]
    session = calendar_of("SPY").session(key)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(_: int, __: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rebuilt(at_ns: int) -> None:
        with shadow_of(demo.settings) as shadow:
            write_future(files_near(demo.settings, session), shadow.dbn_dir, at_ns, "cut")
            with watched(full if at_ns > session.open_ns else lambda n, name: None, ("fsync",)):
                rebuild(shadow, ["market_files"], key)

    with pytest.raises(RebuildFailed, match="no SPY record"):
        rebuilt(session.open_ns)
    with pytest.raises(ArtifactError, match=r"could not be made.*No space left.*TMPDIR"):
        rebuilt(session.close_ns)
    assert list(tmp_path.iterdir()) == []
