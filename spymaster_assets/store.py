"""Artifacts on disk: published whole or not at all, hashed, and verified on every read.

`<root>/<asset>/<key>/manifest.json` points at `<root>/<asset>/<key>/<version>/<files>`. The manifest is replaced
atomically after its files are synced, so a reader sees the old artifact or the new one and never a mixture.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from spymaster_assets.errors import ArtifactError, MissingInputError, MixedSettingsError, refusing
from spymaster_assets.settings import WHERE_IT_RUNS
from spymaster_assets.strict_json import parse_object
from spymaster_assets.tables import read_parquet

MANIFEST = "manifest.json"
MAX_FILE_BYTES = 2 << 30
"""Largest file of an artifact; one that claims more is refused before it is read."""
REPORT_KEY = "latest"
"""Key of an artifact without partitions."""
INPUT_NAME = re.compile(r"(\w+)(?:\[([^\]]+)\])?")
"""How a manifest names an artifact among its inputs: the asset, and its key where that is another than the artifact's own."""
_LOCK = ".lock"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=-]{0,199}")
_PARTITION = re.compile(r"\d{4}-\d\d-\d\d")
_VERSION, _SHA256 = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.(?:[0-9a-f]{16}|torn|manifest\.json)-[0-9a-f]{32}")


@dataclass(frozen=True)
class Artifact:
    """A verified handle: `sha256` is the content hash (time and revision left out), `inputs` maps upstream names to theirs, `settings`
    are those that it and everything before it was made with, by dotted name."""

    asset: str
    key: str
    folder: Path
    sha256: str
    files: Mapping[str, str]
    inputs: Mapping[str, str]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

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
        """Bytes of one file after its SHA-256 was checked; raise ArtifactError on a missing or altered file or a link."""
        path = self.path(name)
        remedy = f"materialize {self.asset} [{self.key}] again"
        try:
            if self.folder.is_symlink():
                raise OSError(errno.ELOOP, "its folder is a link")
            data = _read_plain(path)
        except (OSError, MemoryError) as error:
            if isinstance(error, FileNotFoundError):
                remedy = f"load it again, since a newer version may have replaced it; else {remedy}"
            reason = getattr(error, "strerror", None) or repr(error)
            raise ArtifactError(f"cannot read {path.name}: {reason}", where=str(path), remedy=remedy) from error
        if hashlib.sha256(data).hexdigest() != self.files[name]:
            raise ArtifactError(
                f"{path.name} was altered after it was published",
                where=str(path),
                expected=f"SHA-256 {self.files[name]}",
                remedy=remedy,
            )
        return data

    def contents(self) -> dict[str, bytes]:
        """Bytes of every file by name; see `read`."""
        return {name: self.read(name) for name in self.files}

    def json(self, name: str) -> dict[str, Any]:
        """JSON object of one verified file; raise ArtifactError when it holds anything else."""
        return json_object(self.read(name), str(self.path(name)))

    def frame(
        self, name: str, schema: Mapping[str, Any] | None = None, nullable: Collection[str] | None = None
    ) -> pl.DataFrame:
        """Table of one verified Parquet file; see `read_parquet`."""
        return read_parquet(self.read(name), str(self.path(name)), schema, nullable)[0]


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
        settings: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Write `files` (name -> bytes) as the artifact `asset[key]`: temporary folder, fsync, rename, manifest last.

        The manifest records its `settings` with those of the stored artifacts that `inputs` name; raise MixedSettingsError when they
        contradict each other.
        """
        if not files:
            raise ArtifactError(f"{asset}[{key}] has no files to publish")
        home = self._home(asset, key)
        for name, data in files.items():
            if not _NAME.fullmatch(name) or len(data) > MAX_FILE_BYTES:
                raise ArtifactError(
                    f"{asset}[{key}] cannot hold the file {name[:80]!r} of {len(data)} bytes",
                    expected=f"a plain name, up to {MAX_FILE_BYTES} bytes",
                )
        inputs = dict(sorted((inputs or {}).items()))
        own = Artifact(asset, key, home, "", {}, inputs, settings=settings or {})
        agreed = agreed_settings([own, *self._read_for(own)], kept=own)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
        content = content_hash(files)
        version = _version(digests)
        manifest = {
            "asset": asset,
            "key": key,
            "version": version,
            "sha256": content,
            "files": digests,
            "inputs": inputs,
            "settings": agreed,
            "metadata": dict(metadata or {}),
            "provenance": provenance(),
        }
        described = dump_json(manifest)
        try:
            home.mkdir(parents=True, exist_ok=True)
            with _locked(home / _LOCK):
                self._replace(home, version, files, digests, described)
        except OSError as error:
            raise ArtifactError(
                f"cannot publish {asset}[{key}]: {error.strerror or error}",
                where=str(home),
                remedy="free disk space or mend permissions, then materialize again; the artifact before it is untouched",
            ) from error
        # what was written here, even when another process has replaced it by now
        return _described(asset, key, home, json.loads(described))

    @staticmethod
    def _replace(
        home: Path, version: str, files: Mapping[str, bytes], digests: Mapping[str, str], manifest: bytes
    ) -> None:
        """Publish one version under the key's lock; the version before it stays for readers that hold its manifest."""
        _sweep(home, lambda name: bool(_TEMPORARY.fullmatch(name)))  # of processes that died: the lock is held here
        previous = _current_version(home)
        target = home / version
        made = False
        try:
            if not _intact(target, digests):
                temporary, torn = (home / f".{name}-{uuid.uuid4().hex}" for name in (version, "torn"))
                try:
                    temporary.mkdir()
                    for name, data in files.items():
                        _write_synced(temporary / name, data)
                    _sync_folder(temporary)
                    if os.path.lexists(target):
                        target.rename(torn)
                    temporary.rename(target)
                    made = True
                    _sync_folder(home)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
                    shutil.rmtree(torn, ignore_errors=True)
            write_atomic(home / MANIFEST, manifest)
        except OSError:
            if made and _current_version(home) != version:
                shutil.rmtree(target, ignore_errors=True)
            raise
        if version != previous:  # equal bytes replace nothing: the version before them still has its readers
            _sweep(home, lambda name: bool(_VERSION.fullmatch(name)) and name not in (version, previous))

    def load(self, asset: str, key: str) -> Artifact:
        """Handle of `asset[key]`; raise MissingInputError when it was never published, ArtifactError when torn or forged."""
        home = self._home(asset, key)
        path = home / MANIFEST
        try:
            manifest = json_object(_read_plain(path), str(path))
        except FileNotFoundError:
            raise MissingInputError(
                f"{asset} has no partition {key}",
                where=str(home),
                remedy=f"dagster asset materialize --select {asset} --partition {key}",
            ) from None
        except (OSError, MemoryError, ArtifactError) as error:
            raise ArtifactError(
                f"manifest of {asset}[{key}] cannot be read: {error}", where=str(path), remedy="materialize it again"
            ) from error
        return _described(asset, key, home, manifest)

    def _home(self, asset: str, key: str) -> Path:
        for part in (asset, key):
            if not _NAME.fullmatch(part):
                raise ArtifactError(f"{part[:80]!r} cannot name an artifact", expected="letters, digits and _ - . =")
        return self.root / asset / key

    def exists(self, asset: str, key: str) -> bool:
        """True when `asset[key]` was published; raise ArtifactError when that cannot be told."""
        path = self._home(asset, key) / MANIFEST
        try:
            return path.is_file()
        except OSError as error:
            raise ArtifactError(
                f"cannot look for {asset}[{key}]: {error.strerror}",
                where=str(path),
                remedy="mend its permissions or disk",
            ) from error

    def keys(self, asset: str) -> list[str]:
        """Published keys of an asset, sorted; a folder of another name than a partition has, such as a copy, is none."""
        folder = self.root / asset
        names = (p.parent.name for p in folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else ()
        return sorted(name for name in names if _PARTITION.fullmatch(name) or name == REPORT_KEY)

    def require(self, asset: str, keys: Iterable[str]) -> list[Artifact]:
        """Handles of several partitions; raise MissingInputError that names every missing one, MixedSettingsError when their settings
        differ."""
        keys = list(keys)
        missing = [k for k in keys if not self.exists(asset, k)]
        if missing:
            raise MissingInputError(
                f"{asset} lacks {len(missing)} of {len(keys)} partitions: {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}",
                where=str(self.root / asset),
                remedy=f"dagster asset materialize --select {asset} --partition-range {missing[0]}...{missing[-1]}",
            )
        found = [self.load(asset, k) for k in keys]
        agreed_settings(found)
        return found

    def _read_for(self, artifact: Artifact) -> Iterator[Artifact]:
        """The stored artifacts among its inputs, as far as they still are what was read."""
        for name, sha256 in artifact.inputs.items():
            if not (match := INPUT_NAME.fullmatch(name)):  # a file
                continue
            with suppress(MissingInputError, ArtifactError):
                found = self.load(match[1], match[2] or artifact.key)
                if found.sha256 == sha256:
                    yield found


def agreed_settings(artifacts: Sequence[Artifact], kept: Artifact | None = None) -> dict[str, Any]:
    """Settings of artifacts that are read together; raise MixedSettingsError when a value differs, or only some of one asset have it.

    The remedy is to make again what differs from `kept`, or else from the most.
    """
    agreed: dict[str, Any] = {}
    mixed: dict[str, dict[str, list[Artifact]]] = {}
    for name in sorted({n for a in artifacts for n in a.settings}):
        assets = {a.asset for a in artifacts if name in a.settings}
        holders: dict[str, list[Artifact]] = {}
        for artifact in artifacts:
            if artifact.asset in assets:
                told = json.dumps(artifact.settings[name]) if name in artifact.settings else "not recorded"
                holders.setdefault(told, []).append(artifact)
        agreed[name] = next(a.settings[name] for a in artifacts if name in a.settings)
        if len(holders) > 1 and name not in WHERE_IT_RUNS:
            mixed[name] = holders
    if not mixed:
        return agreed
    name, holders = next(iter(mixed.items()))
    right = next((v for v, of in holders.items() if kept in of), max(holders, key=lambda v: len(holders[v])))
    others = [a for value, of in holders.items() if value != right for a in of]
    keys = sorted(a.key for a in others)
    raise MixedSettingsError(
        f"{name} differs: "
        + ", ".join(f"{value} in {_partitions(of)}" for value, of in holders.items())
        + (f"; so do {', '.join([*mixed][1:])}" if len(mixed) > 1 else ""),
        where=str(others[0].folder.parent),
        expected="one value in all that is read together",
        remedy=f"make it one: dagster asset materialize --select {','.join(sorted({a.asset for a in others}))} "
        + (f"--partition {keys[0]}" if keys[0] == keys[-1] else f"--partition-range {keys[0]}...{keys[-1]}")
        + f" for {right}, or materialize the others again",
    )


def _partitions(artifacts: Iterable[Artifact]) -> str:
    """Names of artifacts, partitions of one asset together: signals[2024-02-01, 2024-02-02]."""
    keys: dict[str, list[str]] = {}
    for artifact in artifacts:
        keys.setdefault(artifact.asset, []).append(artifact.key)
    return ", ".join(f"{asset}[{', '.join(sorted(of))}]" for asset, of in keys.items())


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


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object; raise ArtifactError on anything else, repeated keys, numbers that are not finite or endless nesting."""
    with refusing(ArtifactError, "not the JSON that was published", where=where, remedy="materialize it again"):
        return parse_object(data)


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


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive advisory lock; the kernel drops it when the process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _described(asset: str, key: str, home: Path, manifest: Mapping[str, Any]) -> Artifact:
    """Handle of what a manifest says, once every field is what `publish` writes."""
    files, version = manifest.get("files"), manifest.get("version")
    texts = all(isinstance(v, str) for part in ("files", "inputs") for v in _values(manifest.get(part)))
    fault = None
    if (manifest.get("asset"), manifest.get("key")) != (asset, key):
        fault = "belongs to another partition"
    elif not all(isinstance(manifest.get(k), dict) for k in ("files", "inputs", "metadata", "provenance")) or not texts:
        fault = "lacks fields or has them of another type"
    elif not isinstance(manifest.get("settings", {}), dict):
        fault = "has settings of another type"
    elif not files or not all(_NAME.fullmatch(n) and _SHA256.fullmatch(d) for n, d in files.items()):
        fault = "names files or hashes that no publication has"
    elif not isinstance(version, str) or version != _version(files):
        fault = "points at a version that is not made of its files"
    elif not isinstance(manifest.get("sha256"), str) or not _SHA256.fullmatch(manifest["sha256"]):
        fault = "has no content hash"
    if fault:
        raise ArtifactError(
            f"manifest of {asset}[{key}] {fault}",
            where=str(home / MANIFEST),
            expected="a manifest as it was published",
            remedy=f"materialize {asset} [{key}] again",
        )
    return Artifact(
        asset=asset,
        key=key,
        folder=home / str(version),
        sha256=manifest["sha256"],
        files=manifest["files"],
        inputs=manifest["inputs"],
        metadata=manifest["metadata"],
        provenance=manifest["provenance"],
        settings=manifest.get("settings", {}),
    )


def _values(part: Any) -> Iterable[Any]:
    return part.values() if isinstance(part, dict) else ()


def _version(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(sorted(digests.items()))).encode()).hexdigest()[:16]


def _current_version(home: Path) -> str | None:
    """Version that a key's manifest names; None without a manifest that can be read."""
    with suppress(OSError, ArtifactError):
        version = json_object(_read_plain(home / MANIFEST), "").get("version")
        return version if isinstance(version, str) else None
    return None


def _sweep(home: Path, stale: Callable[[str], bool]) -> None:
    """Delete what has a stale name; what cannot be deleted now is swept the next time."""
    with suppress(OSError):
        for path in home.iterdir():
            if stale(path.name):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def _intact(folder: Path, digests: Mapping[str, str]) -> bool:
    try:
        return not folder.is_symlink() and all(
            hashlib.sha256(_read_plain(folder / n)).hexdigest() == d for n, d in digests.items()
        )
    except OSError:
        return False


def _read_plain(path: Path) -> bytes:
    """Bytes of a regular file; raise OSError for links, devices, pipes and files larger than any artifact."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        if status.st_size > MAX_FILE_BYTES:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes are more than any artifact has")
        pieces = []
        while piece := os.read(descriptor, max(status.st_size, 1 << 16)):
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
