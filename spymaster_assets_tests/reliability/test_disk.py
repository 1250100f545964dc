"""Full disks and read errors at every system call: the typed error, the artifact before it whole, nothing temporary left."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from spymaster_assets.errors import ArtifactError, MarketDataError, MissingInputError, SpymasterError
from spymaster_assets.market.dbn import file_sha256, read_header, read_records, stream_records
from spymaster_assets.market.files import scan_folder
from spymaster_assets.store import ArtifactStore
from spymaster_assets_tests.builders import dbn_bytes, trades
from spymaster_assets_tests.reliability.faults import fail_at, forked, leftovers, read_whole, watched

OLD = {"a.bin": b"old" * 1000, "b.json": b'{"old": 1}\n'}
NEW = {"a.bin": b"new" * 70_000, "b.json": b'{"new": 1}\n', "c.bin": b"more"}
LAST = {"a.bin": b"last"}
WRITING = ("mkdir", "open", "write", "fsync", "rename", "replace", "read", "fstat")


def positions(calls: tuple[str, ...], work: Callable[[], object]) -> list[str]:
    """Names of the system calls that `work` makes."""
    with watched(lambda n, name: None, calls) as seen:
        work()
    return list(seen)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("first", [True, False], ids=["first", "replacing"])
def test_a_fault_at_every_call_of_a_publication(tmp_path: Path, code: int, first: bool) -> None:
    def prepared(name: str) -> ArtifactStore:
        store = ArtifactStore(tmp_path / name)
        if not first:
            store.publish("bars", "k", OLD)
        return store

    counted = prepared("count")
    calls = positions(WRITING, lambda: counted.publish("bars", "k", NEW))
    assert {"mkdir", "open", "write", "fsync", "rename", "replace"} <= set(calls)
    assert calls.count("fsync") == 7  # three files, their folder, the key's folder, the manifest and the folder again
    failed = 0
    for n in range(len(calls)):
        store = prepared(str(n))
        fault = None
        with watched(fail_at(n, code), WRITING):
            try:
                store.publish("bars", "k", NEW)
            except ArtifactError as error:
                fault = error
        if fault:
            failed += 1
            assert str(store.root / "bars" / "k") in fault.where
            assert os.strerror(code) in str(fault)
            assert "materialize" in fault.remedy
        # a fault while the folder is synced last leaves the new artifact, whole; every other fault the one before
        if store.exists("bars", "k"):
            assert read_whole(store.load("bars", "k")) in (OLD, NEW)
        else:
            assert first
        assert [p for p in leftovers(store) if "/." in p] == []
        assert read_whole(store.publish("bars", "k", NEW)) == NEW
        assert read_whole(store.publish("bars", "k", LAST)) == LAST
        assert read_whole(store.load("bars", "k")) == LAST
    assert failed > len(calls) // 2


def test_a_failed_publication_frees_its_space(tmp_path: Path) -> None:
    store, counted = ArtifactStore(tmp_path / "store"), ArtifactStore(tmp_path / "count")
    for one in (store, counted):
        one.publish("bars", "k", OLD)
    calls = positions(WRITING, lambda: counted.publish("bars", "k", NEW))
    with pytest.raises(ArtifactError), watched(fail_at(calls.index("replace"), errno.ENOSPC), WRITING):
        store.publish("bars", "k", NEW)
    assert leftovers(store) == []
    assert read_whole(store.load("bars", "k")) == OLD


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOENT, errno.ESTALE])
def test_a_fault_at_every_call_of_a_read(tmp_path: Path, code: int) -> None:
    store = ArtifactStore(tmp_path)
    store.publish("bars", "k", NEW)
    reading = ("open", "read", "fstat", *(() if code == errno.ENOENT else ("stat",)))
    calls = positions(reading, lambda: read_whole(store.load("bars", "k")))
    for n in range(len(calls)):
        with pytest.raises((ArtifactError, MissingInputError)) as caught, watched(fail_at(n, code), reading):
            read_whole(store.load("bars", "k"))
        assert str(tmp_path) in caught.value.where
        assert "materialize" in caught.value.remedy
    assert read_whole(store.load("bars", "k")) == NEW


def test_a_file_that_vanishes_or_is_no_file(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    artifact = store.publish("bars", "k", NEW)
    path = artifact.path("a.bin")
    spoils: tuple[Callable[[], object], ...] = (
        path.unlink,
        path.mkdir,
        lambda: (path.rmdir(), os.mkfifo(path)),
        lambda: (path.unlink(), path.symlink_to("c.bin")),
    )
    for spoil in spoils:
        spoil()
        with pytest.raises(ArtifactError, match=r"a\.bin.*materialize bars \[k\] again"):
            artifact.read("a.bin")
    assert read_whole(store.publish("bars", "k", NEW)) == NEW
    shutil.rmtree(artifact.folder)
    with pytest.raises(ArtifactError, match="load it again"):
        artifact.read("a.bin")
    assert read_whole(store.publish("bars", "k", NEW)) == NEW


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; skipped where this user may not mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=64", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(full_disk: Path) -> None:
    store = ArtifactStore(full_disk)
    store.publish("bars", "k", {"a.bin": os.urandom(20_000)})
    before = read_whole(store.load("bars", "k"))
    for size in (150_000, 240_000, 1_000_000):
        files = {"a.bin": os.urandom(size), "b.bin": os.urandom(size)}
        with pytest.raises(ArtifactError, match="No space left"):
            store.publish("bars", "k", files)
        assert read_whole(store.load("bars", "k")) == before
        assert leftovers(store) == []

    def use_up_inodes() -> None:
        for n in range(100):
            store.publish("bars", f"k{n}", {"a.bin": b"1"})

    with pytest.raises(ArtifactError, match="No space left"):
        use_up_inodes()
    assert read_whole(store.load("bars", "k")) == before
    for folder in full_disk.glob("bars/k?*"):
        shutil.rmtree(folder)
    store.publish("bars", "k", {"a.bin": b"small"})
    assert store.load("bars", "k").read("a.bin") == b"small"


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.publish("bars", "k", OLD)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with pytest.raises(ArtifactError, match="File too large"):
            store.publish("bars", "k", NEW)

    assert os.waitpid(forked(limited), 0)[1] == 0
    assert read_whole(store.load("bars", "k")) == OLD
    assert leftovers(store) == []


READERS: dict[str, Callable[[Path], object]] = {
    "read_header": read_header,
    "read_records": read_records,
    "stream_records": lambda path: sum(len(chunk) for chunk in stream_records(path)),
    "file_sha256": file_sha256,
    "scan_folder": lambda path: scan_folder(path.parent),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOENT])
def test_a_dbn_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, code: int
) -> None:
    path = tmp_path / "spy.trades.dbn.zst"
    path.write_bytes(
        dbn_bytes(trades(np.arange(5_000) * 1_000 + 1_700_000_000_000_000_000, np.full(5_000, 5 * 10**11)))
    )
    READERS[reader](path)
    opened: list[int] = []
    before = Path.open

    def failing(self: Path, *args: object, **kwargs: object) -> object:
        if self == path:
            opened.append(1)
            if len(opened) == fails:
                raise OSError(code, os.strerror(code), str(path))
        return before(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", failing)
    fails = 0
    READERS[reader](path)
    for fails in range(1, len(opened) + 1):  # noqa: B007 - read by `failing`
        opened.clear()
        with pytest.raises(MarketDataError, match=r"spy\.trades\.dbn\.zst.*(disk|SPYMASTER_DBN_DIR)"):
            READERS[reader](path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc")
def test_a_disk_error_in_the_middle_of_a_dbn_file() -> None:
    # reading /proc/self/mem at 0 gives a real EIO from the kernel
    for read in (read_header, read_records, file_sha256):
        with pytest.raises(MarketDataError, match="Input/output error"):
            read(Path("/proc/self/mem"))


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.dbn").write_bytes(
        dbn_bytes(trades([1_700_000_000_000_000_000], [5 * 10**11]), compress=False)
    )
    assert [e.name for e in scan_folder(tmp_path)] == ["deep/a.dbn"]
    before = os.scandir

    def failing(path: object = ".") -> object:
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return before(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(SpymasterError, match=r"cannot be read.*Permission denied"):
        scan_folder(tmp_path)
