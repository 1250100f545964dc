"""Artifacts on disk: published whole or not at all, hashed, and verified on every read.

`<root>/<asset>/<key>/manifest.json` points at `<root>/<asset>/<key>/<version>/<files>`. The manifest is replaced
atomically after its files are synced, so a reader sees the old artifact or the new one and never a mixture.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from spymaster_assets.errors import ArtifactError, MissingInputError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """A verified handle: `sha256` is the content hash (time and revision left out), `inputs` maps upstream names to theirs."""

    asset: str
    key: str
    folder: Path
    sha256: str
    files: Mapping[str, str]
    inputs: Mapping[str, str]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Path of one file of the artifact; raise ArtifactError when the manifest does not list it."""
        if name not in self.files:
            raise ArtifactError(
                f"{self.asset}[{self.key}] holds no file {name!r}",
                where=str(self.folder),
                expected=", ".join(self.files),
            )
        return self.folder / name

    def read(self, name: str) -> bytes:
        """Bytes of one file after its SHA-256 was checked; raise ArtifactError on a missing or altered file."""
        path = self.path(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ArtifactError(
                f"cannot read {path.name}: {error.strerror}",
                where=str(path),
                remedy=f"materialize {self.asset} [{self.key}] again",
            ) from error
        if hashlib.sha256(data).hexdigest() != self.files[name]:
            raise ArtifactError(
                f"{path.name} was altered after it was published",
                where=str(path),
                expected=f"SHA-256 {self.files[name]}",
                remedy=f"materialize {self.asset} [{self.key}] again",
            )
        return data

    def json(self, name: str) -> Any:
        """Parsed JSON of one verified file."""
        return json.loads(self.read(name))


class ArtifactStore:
    """A folder of artifacts; safe against crashes and concurrent writers of the same key."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def publish(
        self,
        asset: str,
        key: str,
        files: Mapping[str, bytes],
        *,
        inputs: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Write `files` (name -> bytes) as the artifact `asset[key]`: temporary folder, fsync, rename, manifest last."""
        if not files:
            raise ArtifactError(f"{asset}[{key}] has no files to publish")
        inputs = dict(sorted((inputs or {}).items()))
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
        content = content_hash(files)
        version = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]
        home = self.root / asset / key
        manifest = {
            "asset": asset,
            "key": key,
            "version": version,
            "sha256": content,
            "files": digests,
            "inputs": inputs,
            "metadata": dict(metadata or {}),
            "provenance": provenance(),
        }
        try:
            home.mkdir(parents=True, exist_ok=True)
            with _locked(home / ".lock"):
                self._replace(home, version, files, digests, manifest)
        except OSError as error:
            raise ArtifactError(
                f"cannot publish {asset}[{key}]: {error.strerror or error}",
                where=str(home),
                remedy="free disk space or mend permissions, then materialize again; the artifact before it is untouched",
            ) from error
        return self.load(asset, key)

    @staticmethod
    def _replace(
        home: Path, version: str, files: Mapping[str, bytes], digests: Mapping[str, str], manifest: dict[str, Any]
    ) -> None:
        """Publish one version under the key's lock; the version before it stays for readers that hold its manifest."""
        try:
            previous = json.loads((home / MANIFEST).read_bytes())["version"]
        except (OSError, ValueError, KeyError):
            previous = None
        target = home / version
        if not _intact(target, digests):
            temporary = home / f".{version}-{uuid.uuid4().hex}"
            temporary.mkdir()
            try:
                for name, data in files.items():
                    _write_synced(temporary / name, data)
                _sync_folder(temporary)
                if target.exists():
                    target.rename(home / f".torn-{uuid.uuid4().hex}")
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        write_atomic(home / MANIFEST, dump_json(manifest))
        for stale in home.iterdir():
            if stale.is_dir() and stale.name not in (version, previous):
                shutil.rmtree(stale, ignore_errors=True)

    def load(self, asset: str, key: str) -> Artifact:
        """Handle of `asset[key]`; raise MissingInputError when it was never published, ArtifactError when torn."""
        path = self.root / asset / key / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise MissingInputError(
                f"{asset} has no partition {key}",
                where=str(path.parent),
                remedy=f"dagster asset materialize --select {asset} --partition {key}",
            ) from None
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"manifest of {asset}[{key}] cannot be read: {error}", where=str(path), remedy="materialize it again"
            ) from error
        return Artifact(
            asset=asset,
            key=key,
            folder=path.parent / manifest["version"],
            sha256=manifest["sha256"],
            files=manifest["files"],
            inputs=manifest["inputs"],
            metadata=manifest["metadata"],
            provenance=manifest["provenance"],
        )

    def exists(self, asset: str, key: str) -> bool:
        """True when `asset[key]` was published."""
        return (self.root / asset / key / MANIFEST).is_file()

    def keys(self, asset: str) -> list[str]:
        """Published keys of an asset, sorted."""
        folder = self.root / asset
        return sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []

    def require(self, asset: str, keys: Iterable[str]) -> list[Artifact]:
        """Handles of several partitions; raise MissingInputError that names every missing one."""
        keys = list(keys)
        missing = [k for k in keys if not self.exists(asset, k)]
        if missing:
            raise MissingInputError(
                f"{asset} lacks {len(missing)} of {len(keys)} partitions: {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}",
                where=str(self.root / asset),
                remedy=f"dagster asset materialize --select {asset} --partition-range {missing[0]}...{missing[-1]}",
            )
        return [self.load(asset, k) for k in keys]


def content_hash(files: Mapping[str, bytes]) -> str:
    """SHA-256 over file names and bytes; the top-level key `provenance` of a JSON file is left out (it holds time and revision)."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        if name.endswith(".json"):
            parsed = json.loads(data)
            if isinstance(parsed, dict) and parsed.pop("provenance", None) is not None:
                data = dump_json(parsed)
        digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return digest.hexdigest()


def dump_json(value: Any) -> bytes:
    """Canonical JSON bytes; NaN and infinities are refused, since a reader would choke on them."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False, default=_plain) + "\n").encode()


def provenance() -> dict[str, Any]:
    """Time (UTC, ISO 8601) and git revision of this process, kept outside every content hash."""
    return {"created_at": datetime.now(UTC).isoformat(timespec="seconds"), "git_revision": git_revision()}


@cache
def git_revision() -> str:
    """Commit of the source tree with '-dirty' when it has changes, or 'unknown' outside a repository."""
    folder = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
        if head.returncode != 0:
            return "unknown"
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, timeout=10
        )
        return head.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` through a synced temporary file and a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        _write_synced(temporary, data)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive advisory lock; the kernel drops it when the process dies."""
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _intact(folder: Path, digests: Mapping[str, str]) -> bool:
    return all((folder / n).is_file() and file_sha256(folder / n) == d for n, d in digests.items())


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # NumPy scalars
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"not JSON: {type(value)}")
