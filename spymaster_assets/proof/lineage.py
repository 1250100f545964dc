"""The chain of hashes from an artifact down to its DBN files: what each was made from, against what is there now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spymaster_assets.contract import FEATURES_PATH, load_contract
from spymaster_assets.errors import ArtifactError, MissingInputError, SpymasterError
from spymaster_assets.market.dbn import SCHEMAS, file_sha256
from spymaster_assets.market.files import FileEntry, lies_inside, scan_flat, scan_folder, session_inputs, unseen_files
from spymaster_assets.partitions import FILE_ASSETS, MODEL_ASSETS, REPORT_ASSET, SESSION_ASSETS, calendar_of
from spymaster_assets.proof.faults import told
from spymaster_assets.settings import Settings
from spymaster_assets.store import INPUT_NAME, Artifact, ArtifactStore, content_hash

State = Literal["equal", "stale", "altered", "missing", "changed", "unreadable"]
FILE, LATE_FILE, CONTRACT, EXPLANATION = "file", "late file", "contract", "explanation"
_ASSETS = {*SESSION_ASSETS, *MODEL_ASSETS, REPORT_ASSET}


@dataclass(frozen=True)
class Link:
    """One recorded input of the artifact asset[key], and the SHA-256 found for it now (None when it cannot be trusted or is gone).

    kind is the input's asset, 'file', 'late file' or 'contract'. state: equal; stale, the input was made anew, or the file came, since;
    altered, its files are not what its manifest says, or it names a file outside the folder; missing; changed, the file has other bytes
    than were read; unreadable.
    """

    asset: str
    key: str
    kind: str
    input: str
    recorded: str
    found: str | None
    state: State
    remedy: str


def chain(
    store: ArtifactStore, settings: Settings, starts: Iterable[tuple[str, str]], faults: list[str]
) -> tuple[Link, ...]:
    """Every link reachable from the starting partitions (asset, key), nearest first; each artifact and file is read and hashed once.

    A start that is missing or altered is a link of the explanation itself. Files of the sessions that came later are stale links, last;
    `faults` takes the words of a folder that cannot be looked through for them.
    """
    known: dict[tuple[str, str], Artifact | SpymasterError] = {}
    files: dict[tuple[str, str], State] = {}
    links = []
    for start in dict.fromkeys(starts):
        known[start] = _looked_up(store, *start)
        if isinstance(fault := known[start], SpymasterError):
            links.append(
                Link(
                    EXPLANATION, start[1], start[0], partition_name(*start), "", None, _fault_state(fault), fault.remedy
                )
            )
    waiting = [a for a in known.values() if isinstance(a, Artifact)]
    while waiting:
        artifact = waiting.pop(0)
        for name, recorded in artifact.inputs.items():
            asset, key = source = input_of(artifact, name)
            if asset == FILE:
                if (name, recorded) not in files:
                    files[name, recorded] = file_state(settings.dbn_dir, name, recorded)
                links.append(_file_link(artifact, name, recorded, files[name, recorded]))
            elif asset == CONTRACT:
                links.append(_link(artifact, CONTRACT, FEATURES_PATH.name, recorded, load_contract().sha256))
            else:
                if source not in known:
                    known[source] = found = _looked_up(store, asset, key)
                    waiting += [found] if isinstance(found, Artifact) else []
                links.append(_artifact_link(artifact, asset, partition_name(asset, key), recorded, known[source]))
    read = [a for a in known.values() if isinstance(a, Artifact) and a.asset in FILE_ASSETS]
    return (*links, *(told(faults, _late_links, settings, read) or ()))


def file_state(folder: Path, name: str, recorded: str) -> State:
    """Whether a file is there with the bytes that were recorded; no file outside the folder is opened."""
    if not lies_inside(name):
        return "altered"
    try:
        if not (folder / name).is_file():
            return "missing"
        return "equal" if file_sha256(folder / name) == recorded else "changed"
    except (SpymasterError, OSError):
        return "unreadable"


def _late_links(settings: Settings, read: Sequence[Artifact]) -> list[Link]:
    """A link for each file that lies there of a session and that one of its artifacts did not see; raise as `scan_folder` does.

    Files that an artifact recorded are left out: the link of their hash tells of them.
    """
    entries, flat = scan_folder(settings.dbn_dir), scan_flat(settings.dbn_dir)
    calendar, recorded = calendar_of(settings.symbol), {(a.key, name) for a in read for name in a.inputs}
    late: dict[tuple[str, str], Link] = {}
    for artifact in read:
        files = session_inputs(entries, flat, calendar, settings.instrument, artifact.key)
        for file in unseen_files(files, artifact.metadata):
            of_tape = isinstance(file, FileEntry) and file.header.schema in SCHEMAS
            if (artifact.key, file.name) in recorded or (artifact.asset == SESSION_ASSETS[0] and not of_tape):
                continue  # what is no tape bears on the other feeds, whose manifests are asked where they are in the chain
            remedy = _again(",".join(SESSION_ASSETS), artifact.key)
            link = Link(artifact.asset, artifact.key, LATE_FILE, file.name, "", None, "stale", remedy)
            late.setdefault((artifact.key, file.name), link)
    return list(late.values())


def verified(store: ArtifactStore, asset: str, key: str) -> Artifact:
    """Handle of an artifact whose files were all read and whose content hash is that of its manifest; raise ArtifactError if not."""
    artifact = store.load(asset, key)
    found = content_hash(artifact.contents())
    if found != artifact.sha256:
        raise ArtifactError(
            f"the manifest of {partition_name(asset, key)} was altered",
            where=str(artifact.folder.parent),
            expected=f"content hash {found}",
            remedy=f"materialize {asset} [{key}] again",
        )
    return artifact


def input_of(artifact: Artifact, name: str) -> tuple[str, str]:
    """(asset, key) that a recorded input's name stands for; asset is 'file' with the name as key, or 'contract'."""
    if (match := INPUT_NAME.fullmatch(name)) and match[1] in _ASSETS:
        return match[1], match[2] or artifact.key
    return (CONTRACT, "") if name == CONTRACT else (FILE, name)


def partition_name(asset: str, key: str) -> str:
    """`asset[key]`, as manifests name an input of another partition."""
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
    remedy = {
        "equal": "",
        "altered": _again(artifact.asset, artifact.key),
        "unreadable": f"mend the file's permissions or disk, or {_again(f'{artifact.asset}+', artifact.key)}",
    }.get(state, f"put the file back as it was, or {_again(f'{artifact.asset}+', artifact.key)}")
    found = recorded if state == "equal" else None
    return Link(artifact.asset, artifact.key, FILE, name, recorded, found, state, remedy)


def _looked_up(store: ArtifactStore, asset: str, key: str) -> Artifact | SpymasterError:
    try:
        return verified(store, asset, key)
    except SpymasterError as error:
        return error


def _fault_state(fault: SpymasterError) -> State:
    return "missing" if isinstance(fault, MissingInputError) else "altered"
