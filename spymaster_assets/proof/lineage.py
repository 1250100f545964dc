"""The chain of hashes from an artifact down to its DBN files: what each was made from, against what is there now."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spymaster_assets.contract import FEATURES_PATH, load_contract
from spymaster_assets.errors import ArtifactError, MissingInputError, SpymasterError
from spymaster_assets.partitions import MODEL_ASSETS, REPORT_ASSET, SESSION_ASSETS
from spymaster_assets.store import Artifact, ArtifactStore, content_hash, file_sha256

State = Literal["equal", "stale", "altered", "missing", "changed"]
FILE, CONTRACT = "file", "contract"
_ASSETS = {*SESSION_ASSETS, *MODEL_ASSETS, REPORT_ASSET}
_PARTITION = re.compile(r"^(\w+)\[([^\]]+)\]$")


@dataclass(frozen=True)
class Link:
    """One recorded input of the artifact asset[key], and the SHA-256 found for it now (None when it is gone).

    kind is the input's asset, 'file' or 'contract'. state: equal; stale, the input was made anew since; altered, its files are not what
    its manifest says; missing; changed, the file has other bytes than were read.
    """

    asset: str
    key: str
    kind: str
    input: str
    recorded: str
    found: str | None
    state: State
    remedy: str


def chain(store: ArtifactStore, dbn_dir: Path, starts: Iterable[tuple[str, str]]) -> tuple[Link, ...]:
    """Every link reachable from the starting partitions (asset, key), nearest first; each artifact and file is read and hashed once.

    Raises MissingInputError or ArtifactError when a start is missing or altered; further down that is a link's state.
    """
    waiting = [verified(store, asset, key) for asset, key in dict.fromkeys(starts)]
    known: dict[str, Artifact | SpymasterError] = {_name(a.asset, a.key): a for a in waiting}
    files: dict[str, str | None] = {}
    links = []
    while waiting:
        artifact = waiting.pop(0)
        for name, recorded in artifact.inputs.items():
            asset, key = input_of(artifact, name)
            if asset == FILE:
                if name not in files:
                    files[name] = file_sha256(dbn_dir / name) if (dbn_dir / name).is_file() else None
                links.append(_file_link(artifact, name, recorded, files[name]))
            elif asset == CONTRACT:
                links.append(_link(artifact, CONTRACT, FEATURES_PATH.name, recorded, load_contract().sha256))
            else:
                full = _name(asset, key)
                if full not in known:
                    try:
                        known[full] = verified(store, asset, key)
                    except (ArtifactError, MissingInputError) as error:
                        known[full] = error
                    else:
                        waiting.append(known[full])
                links.append(_artifact_link(artifact, asset, full, recorded, known[full]))
    return tuple(links)


def verified(store: ArtifactStore, asset: str, key: str) -> Artifact:
    """Handle of an artifact whose files were all read and whose content hash is that of its manifest; raise ArtifactError if not."""
    artifact = store.load(asset, key)
    found = content_hash({name: artifact.read(name) for name in artifact.files})
    if found != artifact.sha256:
        raise ArtifactError(
            f"the manifest of {_name(asset, key)} was altered",
            where=str(artifact.folder.parent),
            expected=f"content hash {found}",
            remedy=f"materialize {asset} [{key}] again",
        )
    return artifact


def input_of(artifact: Artifact, name: str) -> tuple[str, str]:
    """(asset, key) that a recorded input's name stands for; asset is 'file' with the name as key, or 'contract'."""
    if match := _PARTITION.match(name):
        return match[1], match[2]
    if name in _ASSETS:
        return name, artifact.key
    return (CONTRACT, "") if name == CONTRACT else (FILE, name)


def _name(asset: str, key: str) -> str:
    return f"{asset}[{key}]"


def _again(asset: str, key: str) -> str:
    return f"dagster asset materialize --select {asset} --partition {key}"


def _link(artifact: Artifact, kind: str, name: str, recorded: str, found: str) -> Link:
    stale = found != recorded
    remedy = _again(artifact.asset, artifact.key) if stale else ""
    return Link(artifact.asset, artifact.key, kind, name, recorded, found, "stale" if stale else "equal", remedy)


def _artifact_link(artifact: Artifact, kind: str, name: str, recorded: str, found: Artifact | SpymasterError) -> Link:
    if isinstance(found, Artifact):
        return _link(artifact, kind, name, recorded, found.sha256)
    state: State = "missing" if isinstance(found, MissingInputError) else "altered"
    return Link(artifact.asset, artifact.key, kind, name, recorded, None, state, found.remedy)


def _file_link(artifact: Artifact, name: str, recorded: str, found: str | None) -> Link:
    state: State = "missing" if found is None else "equal" if found == recorded else "changed"
    remedy = f"put the file back as it was, or {_again(f'{artifact.asset}+', artifact.key)}" if state != "equal" else ""
    return Link(artifact.asset, artifact.key, FILE, name, recorded, found, state, remedy)
