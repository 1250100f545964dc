"""Faults at a chosen system call of a publication: the process dies there, or the call fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from spymaster_assets.errors import ArtifactError
from spymaster_assets.store import MANIFEST, Artifact, ArtifactStore, content_hash

CALLS = (
    "mkdir",
    "open",
    "write",
    "fsync",
    "rename",
    "replace",
    "read",
    "fstat",
    "unlink",
    "rmdir",
    "scandir",
    "listdir",
)
"""System calls of a publication and of a read, as the os module names them."""


@contextmanager
def watched(at_call: Callable[[int, str], None], calls: tuple[str, ...] = CALLS) -> Iterator[list[str]]:
    """Call at_call(n, name) before the n-th (from 0) of `calls`; yields the names in order as they come."""
    seen: list[str] = []
    before = {name: getattr(os, name) for name in calls}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            at_call(len(seen) - 1, name)
            return before[name](*args, **kwargs)

        return call

    for name in calls:
        setattr(os, name, wrapped(name))
    try:
        yield seen
    finally:
        for name, original in before.items():
            setattr(os, name, original)


def kill_at(n: int) -> Callable[[int, str], None]:
    """The whole process group dies before the n-th call."""

    def die(now: int, _: str) -> None:
        if now == n:
            os.killpg(0, signal.SIGKILL)

    return die


def fail_at(n: int, code: int) -> Callable[[int, str], None]:
    """The n-th call fails with an errno."""

    def fail(now: int, _: str) -> None:
        if now == n:
            raise OSError(code, os.strerror(code))

    return fail


def forked(work: Callable[[], None]) -> int:
    """Start `work` in a process group of its own and return its id; its exit status is 0 unless it raises."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        work()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def read_whole(artifact: Artifact) -> dict[str, bytes]:
    """Every file of an artifact; raise ArtifactError when they are not the ones that its content hash was taken of."""
    files = artifact.contents()
    if content_hash(files) != artifact.sha256:
        raise ArtifactError("the files are not those of the content hash", where=str(artifact.folder))
    return files


def verified(store: ArtifactStore) -> dict[str, str]:
    """Content hash of every published artifact (asset/key), after every file of each was read and verified."""
    found = {}
    for path in sorted(store.root.glob(f"*/*/{MANIFEST}")):
        artifact = store.load(path.parent.parent.name, path.parent.name)
        read_whole(artifact)
        found[f"{artifact.asset}/{artifact.key}"] = artifact.sha256
    return found


def leftovers(store: ArtifactStore) -> list[str]:
    """What lies in the store and no reader can see: temporary names and versions that no manifest names."""
    found = []
    for home in (p for p in store.root.glob("*/*") if p.is_dir()):
        manifest = home / MANIFEST
        version = store.load(home.parent.name, home.name).folder.name if manifest.is_file() else None
        found += [str(p.relative_to(store.root)) for p in home.iterdir() if p.name not in (MANIFEST, ".lock", version)]
    return found
