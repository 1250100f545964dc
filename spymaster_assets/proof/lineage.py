"""The chain of hashes from an artifact down to its DBN files: what each was made from, against what is there now."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spymaster_assets.contract import FEATURES_PATH, load_contract
from spymaster_assets.errors import ArtifactError, MissingInputError, SpymasterError
from spymaster_assets.market.dbn import file_sha256
from spymaster_assets.partitions import MODEL_ASSETS, REPORT_ASSET, SESSION_ASSETS
from spymaster_assets.store import Artifact, ArtifactStore, content_hash

State = Literal["equal", "stale", "altered", "missing", "changed"]
FILE, CONTRACT, EXPLANATION = "file", "contract", "explanation"
_ASSETS = {*SESSION_ASSETS, *MODEL_ASSETS, REPORT_ASSET}
_PARTITION = re.compile(r"^(\w+)\[([^\]]+)\]$")


@dataclass(frozen=True)
class Link:
    """One recorded input of the artifact asset[key], and the SHA-256 found for it now (None when it cannot be trusted or is gone).

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

    A start that is missing or altered is a link of the explanation itself.
    """
    known: dict[tuple[str, str], Artifact | SpymasterError] = {}
    files: dict[tuple[str, str], State] = {}
    links = []
    for start in dict.fromkeys(starts):
        known[start] = _looked_up(store, *start)
        if isinstance(fault := known[start], SpymasterError):
            links.append(
                Link(EXPLANATION, start[1], start[0], _name(*start), "", None, _fault_state(fault), fault.remedy)
            )
    waiting = [a for a in known.values() if isinstance(a, Artifact)]
    while waiting:
        artifact = waiting.pop(0)
        for name, recorded in artifact.inputs.items():
            asset, key = source = input_of(artifact, name)
            if asset == FILE:
                if (name, recorded) not in files:
                    files[name, recorded] = file_state(dbn_dir / name, recorded)
                links.append(_file_link(artifact, name, recorded, files[name, recorded]))
            elif asset == CONTRACT:
                links.append(_link(artifact, CONTRACT, FEATURES_PATH.name, recorded, load_contract().sha256))
            else:
                if source not in known:
                    known[source] = found = _looked_up(store, asset, key)
                    waiting += [found] if isinstance(found, Artifact) else []
                links.append(_artifact_link(artifact, asset, _name(asset, key), recorded, known[source]))
    return tuple(links)


def file_state(path: Path, recorded: str) -> State:
    """Whether a file is there with the bytes that were recorded."""
    if not path.is_file():
        return "missing"
    return "equal" if file_sha256(path) == recorded else "changed"


def verified(store: ArtifactStore, asset: str, key: str) -> Artifact:
    """Handle of an artifact whose files were all read and whose content hash is that of its manifest; raise ArtifactError if not."""
    artifact = store.load(asset, key)
    found = content_hash(artifact.contents())
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
    return Link(artifact.asset, artifact.key, kind, name, recorded, None, _fault_state(found), found.remedy)


def _file_link(artifact: Artifact, name: str, recorded: str, state: State) -> Link:
    remedy = f"put the file back as it was, or {_again(f'{artifact.asset}+', artifact.key)}" if state != "equal" else ""
    found = recorded if state == "equal" else None
    return Link(artifact.asset, artifact.key, FILE, name, recorded, found, state, remedy)


def _looked_up(store: ArtifactStore, asset: str, key: str) -> Artifact | SpymasterError:
    try:
        return verified(store, asset, key)
    except SpymasterError as error:
        return error


def _fault_state(fault: SpymasterError) -> State:
    return "missing" if isinstance(fault, MissingInputError) else "altered"
