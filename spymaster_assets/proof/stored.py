"""What an explanation reads of the store; what cannot be read becomes a fault in words instead of the end of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from spymaster_assets.contract import load_contract
from spymaster_assets.datasets.splits import SplitManifest
from spymaster_assets.errors import SpymasterError
from spymaster_assets.signals.build import SignalSet, signals_from_parquet
from spymaster_assets.store import Artifact, ArtifactStore

P = ParamSpec("P")
T = TypeVar("T")


def told(faults: list[str], read: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T | None:
    """What `read` gives for its arguments, or None with the words of its error added to `faults` once."""
    try:
        return read(*args, **kwargs)
    except SpymasterError as error:
        if str(error) not in faults:
            faults.append(str(error))
        return None


def signals_of(store: ArtifactStore, key: str) -> tuple[SignalSet, Artifact]:
    """Signals of a session and their artifact."""
    artifact = store.load("signals", key)
    name = f"signals_{key}.parquet"
    return signals_from_parquet(artifact.read(name), load_contract(), str(artifact.folder / name)), artifact


def split_of(store: ArtifactStore, asof: str) -> SplitManifest:
    """The split as of a session."""
    return SplitManifest.from_json(store.load("split_manifest", asof).json("split.json"))


def files_of(artifact: Artifact) -> dict[str, bytes]:
    """Every file of an artifact, verified."""
    return {name: artifact.read(name) for name in artifact.files}
