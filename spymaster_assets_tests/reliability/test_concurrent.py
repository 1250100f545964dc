"""Many processes publish one partition while others read it: every reader sees one whole version."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spymaster_assets.errors import ArtifactError
from spymaster_assets.store import Artifact, ArtifactStore
from spymaster_assets_tests.reliability.faults import forked, leftovers, read_whole, verified

WRITERS, READERS, PUBLICATIONS = 4, 2, 25


def content(value: int) -> dict[str, bytes]:
    """Three files that can only belong together."""
    return {name: bytes([value]) * (5_000 * n + 1) for n, name in enumerate(("a.bin", "b.bin", "c.bin"))}


def whole_or_replaced(artifact: Artifact) -> dict[str, bytes] | None:
    """The artifact's files, or None when two newer versions came while they were read, so that loading again must help."""
    try:
        return read_whole(artifact)
    except ArtifactError as error:
        if "load it again" not in error.remedy:
            raise
        return None


def reading(store: ArtifactStore, stop: Path) -> Callable[[], None]:
    def work() -> None:
        whole = retried = 0
        while not (stop.exists() and whole):
            artifact = store.load("bars", "k")
            files = whole_or_replaced(artifact)
            if files is None:
                retried += 1
                continue
            whole += 1
            assert files == content(files["a.bin"][0])
        assert retried <= whole

    return work


@pytest.mark.parametrize("same", [True, False], ids=["equal content", "different content"])
def test_writers_and_readers_of_one_partition(tmp_path: Path, same: bool) -> None:
    store, stop = ArtifactStore(tmp_path / "store"), tmp_path / "stop"
    store.publish("bars", "k", content(0))

    def writing(n: int) -> Callable[[], None]:
        def work() -> None:
            for turn in range(PUBLICATIONS):
                value = 1 if same else 1 + (turn * WRITERS + n) % 7
                made = store.publish("bars", "k", content(value), inputs={"writer": str(n)})
                assert made.inputs == {"writer": str(n)}, "another process's artifact was handed out"

        return work

    readers = [forked(reading(store, stop)) for _ in range(READERS)]
    writers = [forked(writing(n)) for n in range(WRITERS)]
    assert [os.waitpid(pid, 0)[1] for pid in writers] == [0] * WRITERS
    stop.touch()
    assert [os.waitpid(pid, 0)[1] for pid in readers] == [0] * READERS
    assert list(verified(store)) == ["bars/k"]
    assert [p for p in leftovers(store) if "/." in p] == []
    assert len(leftovers(store)) <= 1  # the version before, kept for its readers


def test_a_reader_keeps_its_version_through_the_next_publication(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    held = store.publish("bars", "k", content(1))
    store.publish("bars", "k", content(2))
    assert read_whole(held) == content(1)
    store.publish("bars", "k", content(2))  # equal bytes replace nothing
    assert read_whole(held) == content(1)
    store.publish("bars", "k", content(3))
    with pytest.raises(ArtifactError, match="load it again"):
        read_whole(held)
    assert read_whole(store.load("bars", "k")) == content(3)


def test_a_writer_waits_for_the_one_before(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    store.publish("bars", "k", content(1))
    before = os.fsync

    def slow() -> None:
        os.fsync = lambda fd: (time.sleep(0.02), before(fd))[1]  # type: ignore[assignment]
        store.publish("bars", "k", content(2))

    pids = [forked(slow) for _ in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert read_whole(store.load("bars", "k")) == content(2)
