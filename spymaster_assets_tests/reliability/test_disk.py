"""Full disks and read errors at every system call: the typed error, the artifact before it whole, nothing temporary left."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spymaster_assets.automation.shadow import lend, shadow_of
from spymaster_assets.errors import ArtifactError, MarketDataError, MissingInputError, SpymasterError
from spymaster_assets.market.dbn import file_sha256, read_header, read_records, stream_records
from spymaster_assets.market.files import scan_folder
from spymaster_assets.proof.cutting import write_flat_future, write_future, write_past
from spymaster_assets.settings import Settings
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


AT_NS = 1_700_000_000_000_000_000
IN_SHADOW = ("mkdir", "open", "write", "fsync", "rename", "replace", "symlink", "link", "scandir", "unlink", "rmdir")


@pytest.fixture
def replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A deployment with two DBN files, a flat file and an artifact, and a folder of its own for what is temporary."""
    settings = Settings(root=tmp_path / "root", dbn_dir=tmp_path / "root" / "dbn")
    settings.dbn_dir.mkdir(parents=True)
    for n, name in enumerate(("earlier", "later")):
        first_ns = AT_NS + (n - 1) * 10**9
        tape = trades(np.arange(2_000) * 400_000 + first_ns, np.full(2_000, 5 * 10**11))
        stated = {"start_ns": first_ns, "end_ns": first_ns + 10**9}
        (settings.dbn_dir / f"{name}.dbn.zst").write_bytes(dbn_bytes(tape, **stated))
    rows = ["price,size,sip_timestamp", *(f"1.5,2,{AT_NS + k}" for k in range(-3, 3))]
    (settings.dbn_dir / "flat.csv").write_text("\n".join(rows) + "\n")
    ArtifactStore(settings.root).publish("bars", "k", OLD)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return settings


def replay_files(settings: Settings) -> None:
    """All that a replay puts into its shadow store before the graph runs."""
    entries = scan_folder(settings.dbn_dir)
    with shadow_of(settings) as shadow:
        write_future(entries, shadow.dbn_dir, AT_NS + 10**8, "up")
        write_flat_future([settings.dbn_dir / "flat.csv"], settings.dbn_dir, shadow.dbn_dir, AT_NS, "up")
        lend(ArtifactStore(settings.root), shadow.root, "bars", ["k"])
        (shadow.root / "past").mkdir()
        write_past(entries, shadow.root / "past", AT_NS + 10**8)
        assert len(scan_folder(shadow.dbn_dir)) == len(scan_folder(shadow.root / "past")) == 2


def left_of(settings: Settings) -> list[Path]:
    return list(settings.root.with_name("temporary").iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_fault_at_every_call_of_a_replay_leaves_no_shadow(replayed: Settings, code: int) -> None:
    calls = positions(IN_SHADOW, lambda: replay_files(replayed))
    assert {"mkdir", "open", "write", "symlink", "link", "unlink", "rmdir"} <= set(calls)
    assert left_of(replayed) == []
    failed = 0
    for n in range(len(calls)):
        fault = None
        with watched(fail_at(n, code), IN_SHADOW):
            try:
                replay_files(replayed)
            except (ArtifactError, MarketDataError) as error:
                fault = error
        if fault:
            failed += 1
            assert os.strerror(code) in str(fault)
        assert left_of(replayed) == [], calls[n]
    assert failed > len(calls) // 3
    assert read_whole(ArtifactStore(replayed.root).load("bars", "k")) == OLD


@pytest.mark.parametrize("write", [write_future, write_past])
def test_a_fault_at_every_write_and_read_of_a_copy(
    replayed: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None]
) -> None:
    """Neither goes through `os`: what a copy writes, and what it is made of, is opened by `Path.open`."""
    entries, before, at = scan_folder(replayed.dbn_dir), Path.open, 0
    more = ("up",) if write is write_future else ()
    seen: list[str] = []

    def touched(name: str, path: Path) -> None:
        seen.append(name)
        if len(seen) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    class Watched:
        def __init__(self, path: Path, file: Any) -> None:
            self.path, self.file = path, file

        def write(self, data: bytes) -> int:
            touched("write", self.path)
            return int(self.file.write(data))

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    def opened(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        touched(mode, self)
        file = before(self, mode, *args, **kwargs)  # type: ignore[call-overload]
        return Watched(self, file) if mode == "wb" else file

    monkeypatch.setattr(Path, "open", opened)
    write(entries, tmp_path / "whole", AT_NS + 10**8, *more)
    calls = list(seen)
    assert calls.count("wb") >= 1
    assert {"wb", "rb", "write"} <= set(calls)
    for at in range(1, len(calls) + 1):
        seen.clear()
        error = MarketDataError if calls[at - 1] == "rb" else ArtifactError
        with pytest.raises(error, match="No space left"):
            write(entries, tmp_path / str(at), AT_NS + 10**8, *more)
        written = [p for p in (tmp_path / str(at)).rglob("*") if not p.is_symlink()]
        assert all(p.read_bytes() == (tmp_path / "whole" / p.name).read_bytes() for p in written)


def test_flat_files_that_cannot_be_read_or_written(replayed: Settings, tmp_path: Path) -> None:
    folder = replayed.dbn_dir
    with pytest.raises(MarketDataError, match=r"gone\.csv.*disk"):
        write_flat_future([folder / "gone.csv"], folder, tmp_path / "out", AT_NS, "up")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"file.*TMPDIR"):
        write_flat_future([folder / "flat.csv"], folder, tmp_path / "file", AT_NS, "up")


def test_a_replay_on_a_disk_that_is_really_full(
    replayed: Settings, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(7)
    tape = trades(np.arange(60_000) + AT_NS, rng.integers(10**11, 10**12, 60_000))
    (replayed.dbn_dir / "later.dbn.zst").write_bytes(dbn_bytes(tape, start_ns=AT_NS, end_ns=AT_NS + 10**9))
    monkeypatch.setattr(tempfile, "tempdir", str(full_disk))
    with pytest.raises(ArtifactError, match=r"No space left.*TMPDIR"):
        replay_files(replayed)
    assert list(full_disk.iterdir()) == []
