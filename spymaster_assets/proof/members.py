"""Where two files of a fitted artifact first differ: a JSON path, an array, a tensor, a node of a tree."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from spymaster_assets.datasets.sequences import MAX_NPZ_RATIO, MIN_NPZ_BYTES
from spymaster_assets.errors import ArtifactError, refusing
from spymaster_assets.models.ubj import read_ubj
from spymaster_assets.proof.known import Difference, Result
from spymaster_assets.store import Artifact

Found = tuple[str, str, str]
"""Member, and its value in either file."""


def fitted_differences(stored: Artifact, replayed: Artifact) -> Result:
    """The first differing member of each file of two artifacts, and how many bytes were compared.

    The provenance of a JSON file (time, revision) is left out, as it is from the content hash.
    """
    one, other = ({name: a.read(name) for name in a.files} for a in (stored, replayed))
    return file_differences(stored.asset, stored.key, one, other)


def file_differences(asset: str, key: str, stored: Mapping[str, bytes], replayed: Mapping[str, bytes]) -> Result:
    """The same of named files."""
    found, compared = [], 0
    for name in sorted({*stored, *replayed}):
        if name not in stored or name not in replayed:
            told = ("there", "missing") if name in stored else ("missing", "there")
            found.append(Difference(asset, key, name, "file", *told))
            continue
        compared += len(stored[name])
        if differs := first_difference(name, stored[name], replayed[name]):
            found.append(Difference(asset, key, name, *differs))
    return found, compared


def first_difference(name: str, one: bytes, other: bytes) -> Found | None:
    """First member in which two files of a name differ; None when none does but for provenance."""
    if one == other:
        return None
    read = _READERS.get(name[name.rfind(".") :])
    if read is None:
        return _first_byte(one, other)
    try:
        with refusing(ArtifactError, "not what its name says", where=name):
            return _between(name, read(one), read(other)) or (
                None if name.endswith(".json") else _first_byte(one, other)
            )
    except ArtifactError:  # damaged or forged: what its members are cannot be told
        return _first_byte(one, other)


def members(name: str, data: bytes) -> Any:
    """What a file of a fitted artifact holds, told by its ending; raise ArtifactError when it is damaged or of a kind without members."""
    read = _READERS.get(name[name.rfind(".") :])
    with refusing(ArtifactError, "not what its name says", where=name, remedy="materialize it again"):
        if read is None:
            raise ValueError("a file without members")
        return read(data)


def first_unequal(one: Any, other: Any) -> Found | None:
    """First place in which two nested values (dicts, lists, arrays, plain values) differ by a bit; None when none does."""
    return _walk("", one, other)


def _between(name: str, a: Any, b: Any) -> Found | None:
    if name.endswith(".json") and isinstance(a, dict) and isinstance(b, dict):
        a.pop("provenance", None)
        b.pop("provenance", None)
    return _walk("", a, b)


def _first_byte(one: bytes, other: bytes) -> Found:
    length = min(len(one), len(other))
    a, b = (np.frombuffer(x[:length], np.uint8) for x in (one, other))
    at = int(np.argmax(a != b)) if (a != b).any() else length
    return f"byte {at}", f"{len(one)} bytes", f"{len(other)} bytes"


def _walk(path: str, a: Any, b: Any) -> Found | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in (*a, *(k for k in b if k not in a)):
            inside = f"{path}.{key}" if path else str(key)
            if key not in a or key not in b:
                return inside, _short(a.get(key, "missing")), _short(b.get(key, "missing"))
            if found := _walk(inside, a[key], b[key]):
                return found
        return None
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        for n, (x, y) in enumerate(zip(a, b, strict=False)):
            if found := _walk(f"{path}[{n}]", x, y):
                return found
        return None if len(a) == len(b) else (f"{path} length", str(len(a)), str(len(b)))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.shape != b.shape or a.dtype != b.dtype:
            return path, f"{a.dtype} {a.shape}", f"{b.dtype} {b.shape}"
        # bytes of each element, so that NaN equals NaN and -0.0 does not equal 0.0
        x, y = (np.ascontiguousarray(v).reshape(-1).view(f"V{v.dtype.itemsize}") for v in (a, b))
        if not (x != y).any():
            return None
        at = int(np.argmax(x != y))
        inside = ", ".join(str(int(i)) for i in np.unravel_index(at, a.shape)) if a.ndim else ""
        return f"{path}[{inside}]", str(a.reshape(-1)[at]), str(b.reshape(-1)[at])
    same = type(a) is type(b) and (a == b or (a != a and b != b))
    return None if same else (path or "value", _short(a), _short(b))


def _short(value: Any) -> str:
    return text if len(text := str(value)) <= 80 else f"{text[:77]}..."


def _npz(data: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(m.file_size for m in archive.infolist()) > max(MAX_NPZ_RATIO * len(data), MIN_NPZ_BYTES):
            raise ValueError("it unpacks to more than any artifact has")
        # array by array, each from its own bytes: a header that claims more has nothing to read it from
        return {m.filename.removesuffix(".npy"): _npy(archive.read(m)) for m in archive.infolist()}


def _npy(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another npy version")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or fortran_order:
        raise ValueError("no plain array")
    return np.frombuffer(data[file.tell() :], dtype).reshape(shape)


def _checkpoint(data: bytes) -> Any:
    from spymaster_assets.models.patchtst import read_checkpoint

    return _arrays(read_checkpoint(data))


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _arrays(v) for k, v in value.items()}
    return value.numpy() if hasattr(value, "numpy") else value


_READERS: dict[str, Callable[[bytes], Any]] = {
    ".json": json.loads,
    ".npz": _npz,
    ".ubj": read_ubj,
    ".pt": _checkpoint,
}
