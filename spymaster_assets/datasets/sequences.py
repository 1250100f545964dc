"""Sequence windows: the one-minute bars before each decision, seen from the level."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from spymaster_assets.contract import Contract
from spymaster_assets.datasets.matrix import encode
from spymaster_assets.errors import ArtifactError, ContractError, refusing
from spymaster_assets.settings import MINUTE_NS, SequenceSettings
from spymaster_assets.store import Artifact, ArtifactStore

KEYS: dict[str, tuple[str, int]] = {
    "X": ("f4", 3),
    "mask": ("u1", 2),
    "static": ("f4", 2),
    "y_break": ("i1", 1),
    "y_strength": ("f4", 1),
    "event_id": ("U", 1),
    "ts_ns": ("i8", 1),
    "seq_feature_names": ("U", 1),
    "static_feature_names": ("U", 1),
}
"""Keys of a sequence dataset with dtype and number of dimensions."""
MAX_NPZ_RATIO, MIN_NPZ_BYTES = 256, 64 << 20
"""An npz may unpack to this many times its size, or to this many bytes; more is refused before anything is unpacked."""
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


def build_sequences(
    signals: pl.DataFrame, context: pl.DataFrame, contract: Contract, settings: SequenceSettings, delay: str
) -> dict[str, NDArray[Any]]:
    """Arrays of a session (KEYS): X (n, T, C), mask (n, T), static (n, S), labels of `delay`, ids and names.

    signals: rows of the contract; context: one row per closed one-minute bar (see signals.context). A window holds the last T bars closed
    at the decision, left-padded with 0 where mask is 0. A channel value that is not defined yet is 0 with mask 1.
    Raises ContractError where a window could reach past the decision: a row decides at another time than t0 + 60 s, bars are out of order.
    """
    steps = settings.length_bars
    static_columns = [c.name for c in contract.features("A", delay)]
    static, static_names = encode(signals, contract, static_columns, "A", delay)
    end_ns = context["end_ns"].to_numpy()
    if not (np.diff(end_ns) > 0).all() or (end_ns < context["start_ns"].to_numpy() + MINUTE_NS).any():
        raise ContractError("context bars are out of order, or end before their minute is over", where="context end_ns")
    last = np.searchsorted(end_ns, signals["decision_ns"].to_numpy(), side="right") - 1
    index = last[:, None] + np.arange(-steps + 1, 1)[None, :]
    mask = index >= 0
    at = np.maximum(index, 0)
    sign = signals["direction_sign"].to_numpy().astype(np.float64)[:, None]
    level = signals["level_price"].to_numpy()[:, None]
    channels = _channels(context, at, sign, level)
    if tuple(channels) != contract.sequence_channels:
        raise ContractError(
            "sequence channels differ from features.json", expected=", ".join(contract.sequence_channels)
        )
    X = np.stack(list(channels.values()), axis=-1).astype(np.float32)
    X[~np.isfinite(X)] = 0.0
    X[~mask] = 0.0
    outcome = signals[f"outcome_{delay}"].to_numpy()
    y_break = np.select([outcome == "BREAK", outcome == "BOUNCE"], [1, 0], default=-1).astype(np.int8)
    strength = signals[f"strength_signed_{delay}"].fill_null(float("nan")).to_numpy().astype(np.float32)
    return {
        "X": X,
        "mask": mask.astype(np.uint8),
        "static": static,
        "y_break": y_break,
        "y_strength": strength,
        "event_id": np.array(signals["event_id"].to_list(), dtype=np.str_) if signals.height else np.empty(0, "U1"),
        "ts_ns": signals["ts_ns"].to_numpy().astype(np.int64),
        "seq_feature_names": np.array(list(channels), dtype=np.str_),
        "static_feature_names": np.array(static_names, dtype=np.str_),
    }


def _channels(
    context: pl.DataFrame, at: NDArray[np.int64], sign: NDArray[np.float64], level: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Channel values (n, T) by name: formulas of features.json, seen in the direction of approach."""

    def bars(name: str) -> NDArray[np.float64]:
        values = context[name].to_numpy().astype(np.float64)
        return values[at] if len(values) else np.zeros(at.shape)

    close, sma_200, sma_400 = bars("close"), bars("sma_200"), bars("sma_400")
    return {
        "dist_to_level": sign * (level - close),
        "return": sign * bars("return_usd"),
        "range": bars("range_usd"),
        "log_volume": np.log1p(bars("volume")),
        "volatility": bars("volatility"),
        "dist_to_sma_200": sign * (close - sma_200),
        "dist_to_sma_400": sign * (close - sma_400),
        "sma_spread": sign * (sma_200 - sma_400),
        "sma_200_slope_5bar": sign * bars("sma_200_slope_5bar"),
        "sma_400_slope_5bar": sign * bars("sma_400_slope_5bar"),
    }


def to_npz_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Compressed npz bytes, equal for equal arrays (np.savez stamps the time)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=3) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", _ZIP_TIME)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, member.getvalue())
    return buffer.getvalue()


def npz_arrays(data: bytes, where: str, keys: Mapping[str, tuple[str, int]]) -> dict[str, NDArray[Any]]:
    """Arrays of npz bytes, never unpickled; raise ArtifactError unless keys, dtypes and dimensions are those of `keys`."""
    with (
        refusing(ArtifactError, "not a readable npz", where=where, remedy="materialize it again"),
        zipfile.ZipFile(io.BytesIO(data)) as archive,
    ):
        members = {m.filename: m for m in archive.infolist()}
        if sorted(members) != sorted(f"{k}.npy" for k in keys) or len(archive.infolist()) != len(keys):
            names = ", ".join(sorted(members))[:300]
            raise ArtifactError(f"npz keys are {names}", where=where, expected=", ".join(sorted(keys)))
        if sum(m.file_size for m in members.values()) > max(MAX_NPZ_RATIO * len(data), MIN_NPZ_BYTES):
            raise ValueError("it unpacks to more than any dataset has")
        return {k: _read_array(archive, members[f"{k}.npy"], k, *keys[k], where) for k in keys}


def _read_array(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, dtype: str, dimensions: int, where: str
) -> NDArray[Any]:
    """One array of an npz; its header is held against what is expected and against the member's size before it takes memory."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed by method {member.compress_type}")
    with archive.open(member) as f:
        version = np.lib.format.read_magic(f)
        if version != (1, 0):
            raise ValueError(f"{name} is of npy version {version}")
        shape, fortran_order, found = np.lib.format.read_array_header_1_0(f)
        right = found.kind == "U" if dtype == "U" else found == np.dtype(dtype)
        if not right or len(shape) != dimensions or fortran_order:
            raise ArtifactError(
                f"{name} is {found} with {len(shape)} dimensions", where=where, expected=f"{dtype}, {dimensions}"
            )
        size = math.prod(shape) * found.itemsize
        if min(shape) < 0 or size != member.file_size - f.tell():
            raise ValueError(f"{name} claims the shape {shape} in {member.file_size} bytes")
        data = f.read()  # to the end, so that the checksum is verified
    if len(data) != size:
        raise ValueError(f"{name} holds {len(data)} of {size} bytes")
    return np.frombuffer(bytearray(data), found).reshape(shape)


def from_npz_bytes(data: bytes, where: str = "sequence dataset") -> dict[str, NDArray[Any]]:
    """Arrays of a sequence dataset; raise ArtifactError on damage, pickles, other keys or shapes that do not fit together."""
    arrays = npz_arrays(data, where, KEYS)
    n, steps, channels = arrays["X"].shape
    shapes = {
        "mask": (n, steps),
        "static": (n, len(arrays["static_feature_names"])),
        **{k: (n,) for k in ("y_break", "y_strength", "event_id", "ts_ns")},
        "seq_feature_names": (channels,),
    }
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ArtifactError(
                f"{name} has shape {arrays[name].shape}", where=where, expected=f"{shape} to fit X {arrays['X'].shape}"
            )
    return arrays


def sequence_name(key: str) -> str:
    """File name of a session's sequence dataset."""
    return f"sequence_dataset_{key}.npz"


def read_sequences(store: ArtifactStore, key: str) -> tuple[dict[str, NDArray[Any]], Artifact]:
    """Arrays (KEYS) of one session's sequence dataset and their artifact."""
    artifact = store.load("sequence_dataset", key)
    path = artifact.path(sequence_name(key))
    return from_npz_bytes(artifact.read(path.name), str(path)), artifact
