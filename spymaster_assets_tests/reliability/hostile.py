"""A corpus of hostile files for every loader, built from seeds of our own making, and its run: one forked process a file.

`python -m spymaster_assets_tests.reliability.hostile FOLDER` prints one JSON line a file: name, outcome, seconds, peak growth in MiB.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xgboost as xgb
import zstandard

from spymaster_assets.contract import load_contract
from spymaster_assets.datasets.sequences import KEYS, from_npz_bytes, to_npz_bytes
from spymaster_assets.datasets.splits import SplitManifest
from spymaster_assets.errors import SpymasterError
from spymaster_assets.market.book import book_from_parquet
from spymaster_assets.market.dbn import read_header, read_records, stream_records
from spymaster_assets.market.files import SessionFiles
from spymaster_assets.models.patchtst import CHECKPOINT, METADATA, PatchTST
from spymaster_assets.models.trees import BoostedTrees, Bundle
from spymaster_assets.proof.members import first_difference
from spymaster_assets.retrieval.index import ARRAYS, INDEX, RetrievalIndex
from spymaster_assets.settings import RetrievalSettings
from spymaster_assets.signals.build import SignalSet, signals_from_parquet, signals_to_parquet
from spymaster_assets.signals.levels import levels_from_files
from spymaster_assets.signals.options import flow_from_parquet
from spymaster_assets.store import MANIFEST, ArtifactStore, dump_json
from spymaster_assets_tests.builders import FOLD, dbn_bytes, trades
from spymaster_assets_tests.models.test_patchtst import SMALL, data
from spymaster_assets_tests.reliability.faults import forked, read_whole

LIMIT_S, LIMIT_BYTES = 20, 6 << 30
Files = dict[str, bytes]


class Payload:
    """Unpickling it creates the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def _files(folder: Path) -> Files:
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    for name, content in files.items():  # what differs can be told of anything
        assert first_difference(name, content, content + b"!")
    return files


def _load_dbn(folder: Path) -> None:
    path = folder / "a.dbn"
    read_header(path)
    read_records(path)
    for _ in stream_records(path):
        pass


LOADERS: dict[str, Callable[[Path], object]] = {
    "sequences": lambda f: from_npz_bytes(_files(f)["a.npz"]),
    "retrieval": lambda f: RetrievalIndex.load(_files(f)),
    "trees": lambda f: BoostedTrees.load(_files(f)),
    "patchtst": lambda f: PatchTST.load(_files(f)),
    "signals": lambda f: signals_from_parquet(_files(f)["a.parquet"], load_contract()),
    "book": lambda f: book_from_parquet(_files(f)["a.parquet"]),
    "flow": lambda f: flow_from_parquet(_files(f)["a.parquet"]),
    "levels": lambda f: levels_from_files(ArtifactStore(f).load("levels", "k")),
    "store": lambda f: read_whole(ArtifactStore(f).load("bars", "k")),
    "json": lambda f: ArtifactStore(f).load("bars", "k").json("calibration.json"),
    "split": lambda f: SplitManifest.from_json(ArtifactStore(f).load("bars", "k").json("split.json")),
    "registration": lambda f: SessionFiles.from_json(ArtifactStore(f).load("bars", "k").json("files.json")),
    "dbn": _load_dbn,
}


def build(folder: Path, canary: Path) -> None:
    """Write the corpus below `folder`, one folder a case named `loader.what`; cases called `good` must load."""
    cases: dict[str, Files] = {}
    parts = (_npz_cases, _tree_cases, _patchtst_cases, _parquet_cases, _dbn_cases)
    evil = pickle.dumps(Payload(canary))
    for part in parts:
        for name, files in part(evil):
            assert name not in cases, name
            cases[name] = files
    for name, files in cases.items():
        (folder / name).mkdir(parents=True)
        for file, content in files.items():
            (folder / name / file).write_bytes(content)
    _store_cases(folder, evil)


def _cuts(content: bytes) -> Iterator[tuple[str, bytes]]:
    for share in (0, 10, 50, 90, 99):
        yield f"cut_at_{share}_percent", content[: len(content) * share // 100]
    yield "one_byte_short", content[:-1]


def _npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def _header(shape: str, descr: str = "'<f4'", order: str = "False", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\x01\x00" else "<I", len(text)) + text


def _zip(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _npz_cases(evil: bytes) -> Iterator[tuple[str, Files]]:
    n, steps = 6, 8
    arrays = {
        "X": np.ones((n, steps, 2), np.float32),
        "mask": np.ones((n, steps), np.uint8),
        "static": np.ones((n, 3), np.float32),
        "y_break": np.zeros(n, np.int8),
        "y_strength": np.zeros(n, np.float32),
        "event_id": np.array([f"e{i}" for i in range(n)]),
        "ts_ns": np.arange(n, dtype=np.int64),
        "seq_feature_names": np.array(["a", "b"]),
        "static_feature_names": np.array(["c", "d", "e"]),
    }
    assert set(arrays) == set(KEYS)
    members = {f"{k}.npy": _npy(v) for k, v in arrays.items()}
    good = to_npz_bytes(arrays)
    index_arrays = {
        "X": np.ones((30, 2), np.float32),
        "center": np.zeros(2, np.float32),
        "scale": np.ones(2, np.float32),
        "kind": np.zeros(30, np.int8),
        "sign": np.ones(30, np.int8),
        "outcome": np.array(["BREAK"] * 30),
        "strength": np.zeros(30),
        "event_id": np.array([f"e{i}" for i in range(30)]),
        "date": np.array(["2024-02-01"] * 30),
    }
    meta = {
        "settings": asdict(RetrievalSettings()),
        "delay": "4min",
        "columns": ["atr", "volatility"],
        "encoded": ["atr", "volatility"],
        "kept": [0, 1],
        "asof_open_ns": FOLD.first_test_decision_ns,
        "contract_sha256": "0" * 64,
    }
    yield "sequences.good", {"a.npz": good}
    yield "retrieval.good", {ARRAYS: to_npz_bytes(index_arrays), INDEX: dump_json(meta)}
    for what, content in _cuts(good):
        yield f"sequences.{what}", {"a.npz": content}
    flipped = bytearray(good)
    flipped[100] ^= 4
    objects = _npy(np.array([1, None], dtype=object), allow_pickle=True)
    whole: dict[str, bytes] = {
        "pickle": evil,
        "flipped_bit": bytes(flipped),
        "npy_alone": members["X.npy"],
        "object_array": _zip({**members, "X.npy": objects}),
        "pickled_member": _zip({**members, "X.npy": _header("(1,)", "'|O'") + evil}),
        "pickle_as_member": _zip({**members, "X.npy": evil}),
        "structured_objects": _zip({**members, "X.npy": _header("(1, 1, 1)", "[('a', '|O')]") + evil}),
        "missing_member": _zip({k: v for k, v in members.items() if k != "mask.npy"}),
        "extra_member": _zip({**members, "more.npy": members["mask.npy"]}),
        "parent_folder": _zip({**{k: v for k, v in members.items() if k != "X.npy"}, "../X.npy": members["X.npy"]}),
        "absolute_name": _zip({**{k: v for k, v in members.items() if k != "X.npy"}, "/etc/X.npy": members["X.npy"]}),
        "long_name": _zip({**members, "n" * 60_000: b""}),
        "wrong_dtype": to_npz_bytes({**arrays, "X": arrays["X"].astype(np.float64)}),
        "swapped_bytes": to_npz_bytes({**arrays, "X": arrays["X"].astype(">f4")}),
        "wrong_rank": to_npz_bytes({**arrays, "X": arrays["X"].reshape(-1)}),
        "shapes_that_do_not_fit": to_npz_bytes({**arrays, "mask": np.ones((n + 1, steps), np.uint8)}),
        "lzma": _zip(members, zipfile.ZIP_LZMA),
        "bzip2": _zip(members, zipfile.ZIP_BZIP2),
        "empty_archive": _zip({}),
        "nested_header": _zip({**members, "X.npy": _header("(" * 4000 + ")" * 4000)}),
        "header_of_code": _zip({**members, "X.npy": _header("__import__('os').system('true')")}),
        "version_3": _zip({**members, "X.npy": _header("(1, 1, 1)", version=b"\x03\x00") + b"0000"}),
        "bomb": _zip({**members, "X.npy": _header("(40000, 120, 30)") + bytes(4 * 40_000 * 120 * 30)}),
    }
    for what, shape in {
        "huge_shape": "(1000000, 1000000, 1000)",
        "negative_shape": "(-1, 8, 2)",
        "overflowing_shape": "(4294967296, 4294967296, 4)",
        "shape_beyond_int64": "(99999999999999999999999, 1, 1)",
        "float_shape": "(6.0, 8, 2)",
        "shape_of_bools": "(True, 96, 1)",
        "wrong_count": "(6, 8, 3)",
    }.items():
        whole[what] = _zip({**members, "X.npy": _header(shape) + arrays["X"].tobytes()})
    doubled = io.BytesIO()
    with zipfile.ZipFile(doubled, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(zipfile.ZipInfo("Y.npy"), members["X.npy"])
    whole["repeated_member"] = doubled.getvalue().replace(b"Y.npy", b"X.npy")
    for what, content in whole.items():
        yield f"sequences.{what}", {"a.npz": content}

    def index(what: str, new: Mapping[str, Any] = {}, **described: Any) -> tuple[str, Files]:
        text = json.dumps({**meta, **described}).encode()
        return f"retrieval.{what}", {ARRAYS: to_npz_bytes({**index_arrays, **new}), INDEX: text}

    for what, content in _cuts(to_npz_bytes(index_arrays)):
        yield f"retrieval.{what}", {ARRAYS: content, INDEX: dump_json(meta)}
    yield "retrieval.pickle", {ARRAYS: evil, INDEX: dump_json(meta)}
    yield "retrieval.missing_index", {ARRAYS: to_npz_bytes(index_arrays)}
    yield "retrieval.index_is_pickle", {ARRAYS: to_npz_bytes(index_arrays), INDEX: evil}
    yield "retrieval.index_is_deep", {ARRAYS: to_npz_bytes(index_arrays), INDEX: b"[" * 100_000}
    yield index("nan_in_X", {"X": np.full((30, 2), np.nan, np.float32)})
    yield index("zero_scale", {"scale": np.zeros(2, np.float32)})
    yield index("short_outcome", {"outcome": index_arrays["outcome"][:-1]})
    yield index("kept_out_of_range", kept=[0, 99])
    yield index("kept_negative", kept=[-1, 1])
    yield index("kept_huge", kept=[0, 10**30])
    yield index("huge_k", settings={**meta["settings"], "k": 10**12})  # type: ignore[dict-item]
    yield index("text_k", settings={**meta["settings"], "k": "20"})  # type: ignore[dict-item]
    yield index("unknown_setting", settings={**meta["settings"], "__class__": "x"})  # type: ignore[dict-item]
    yield index("no_time", asof_open_ns=None)
    yield index("columns_no_list", columns="ab")
    yield index("nan_in_json", min=float("nan"))


def _tree_cases(evil: bytes) -> Iterator[tuple[str, Files]]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 3)).astype(np.float32)
    names = ["fa", "fb", "fc"]
    params = {"objective": "binary:logistic", "max_depth": 3, "nthread": 1, "seed": 1}
    booster = xgb.train(params, xgb.DMatrix(X, (X[:, 0] > 0).astype(float), feature_names=names), 4)
    model = bytes(booster.save_raw("ubj"))
    name = "direction_4min_stage_a_full"

    def files(model: bytes, **changed: Any) -> Files:
        import hashlib

        meta = {
            "head": "direction",
            "delay": "4min",
            "stage": "A",
            "ablation": "full",
            "features": names,
            "feature_columns": ["distance"],
            "model_sha256": hashlib.sha256(model).hexdigest(),
            "contract_sha256": "0" * 64,
            **changed,
        }
        owner = BoostedTrees()
        owner.bundles, owner.first_test_decision_ns = (Bundle(model, meta),), FOLD.first_test_decision_ns
        index = {**json.loads(owner.save()["metadata.json"]), "bundles": [name]}
        return {
            "metadata.json": json.dumps(index).encode(),
            f"{name}.ubj": model,
            f"{name}.json": json.dumps(meta).encode(),
        }

    def patched(what: str, key: bytes, at: int, new: bytes, occurrence: int = 0) -> tuple[str, Files]:
        """The bytes `at` after a key's name replaced, with the hash computed again."""
        found = -1
        for _ in range(occurrence + 1):
            found = model.index(key, found + 1)
        place = found + len(key) + at
        return f"trees.{what}", files(model[:place] + new + model[place + len(new) :])

    good = files(model)
    yield "trees.good", good
    flipped = bytearray(model)
    flipped[len(model) // 2] ^= 1
    yield "trees.wrong_hash", {**good, f"{name}.ubj": bytes(flipped)}
    for what, content in _cuts(model):
        yield f"trees.{what}", files(content)
    first = 5 + 8  # after the name: '[$l#L', then the length in 8 bytes
    i4 = struct.pack
    yield patched("child_out_of_range", b"left_children", first, i4(">i", 2**30))
    yield patched("child_negative", b"left_children", first, i4(">i", -7))
    yield patched("child_is_root", b"left_children", first, i4(">i", 0))
    yield patched("child_is_shared", b"right_children", first, i4(">i", 1))
    yield patched("split_out_of_range", b"split_indices", first, i4(">i", 2**30))
    yield patched("split_negative", b"split_indices", first, i4(">i", -1))
    yield patched("root_with_parent", b"parents", first, i4(">i", 1))
    yield patched("nan_weight", b"base_weights", first, i4(">f", float("nan")))
    yield patched("infinite_threshold", b"split_conditions", first, i4(">f", float("inf")))
    yield patched("categorical_split", b"split_type", first, b"\x01")
    yield patched("huge_array", b"left_children", 5, i4(">q", 2**40))
    yield patched("negative_array", b"left_children", 5, i4(">q", -1))
    yield patched("other_element_type", b"left_children", 2, b"L")
    yield patched("unknown_marker", b"left_children", 0, b"Z")
    yield patched("num_nodes", b"num_nodesSL\x00\x00\x00\x00\x00\x00\x00", 1, b"9")
    yield patched("num_trees", b"num_treesSL\x00\x00\x00\x00\x00\x00\x00\x01", 0, b"9")
    yield patched("num_class", b"num_classSL\x00\x00\x00\x00\x00\x00\x00\x01", 0, b"9")
    yield patched("num_target", b"num_targetSL\x00\x00\x00\x00\x00\x00\x00\x01", 0, b"9")
    yield patched("other_booster", b"nameSL\x00\x00\x00\x00\x00\x00\x00\x06", 0, b"dart__")
    yield patched("other_objective", b"binary:", 0, b"softmax:")
    yield patched("other_features", b"feature_names[#L\x00\x00\x00\x00\x00\x00\x00\x03SL\x00\x00\x00\x00\x00\x00\x00\x02", 0, b"zz")  # fmt: skip  # noqa: E501
    yield "trees.trailing_bytes", files(model + b"}")
    yield "trees.deep", files(b"{L" + i4(">q", 1) + b"a" + (b"[#L" + i4(">q", 1)) * 100_000)
    yield "trees.pickle", files(evil)
    yield "trees.json_model", files(bytes(booster.save_raw("json")))
    yield "trees.deprecated_model", files(b"binf" + bytes(500))
    yield "trees.empty", files(b"")
    yield "trees.index_is_pickle", {**good, "metadata.json": evil}
    yield "trees.missing_model", {k: v for k, v in good.items() if not k.endswith(".ubj")}
    yield "trees.features_is_text", files(model, features="fa")
    yield "trees.other_name", files(model, head="../../direction")
    yield "trees.hash_is_a_number", files(model, model_sha256=10**64)
    index = json.loads(good["metadata.json"])
    for what, bundles in {
        "parent_folder": ["../../x"],
        "absolute": ["/etc/passwd"],
        "nul": ["a\0b"],
        "long_name": ["n" * 100_000],
    }.items():
        yield f"trees.{what}", {**good, "metadata.json": json.dumps({**index, "bundles": bundles}).encode()}
    odd = {**index, "settings": {**index["settings"], "threads": "all"}}
    yield "trees.settings_of_other_types", {**good, "metadata.json": json.dumps(odd).encode()}


def _patchtst_cases(evil: bytes) -> Iterator[tuple[str, Files]]:
    network = PatchTST(replace(SMALL, epochs=1))
    network.fit(data(200, 0), data(80, 1), FOLD)
    good = network.save()
    content = torch.load(io.BytesIO(good[CHECKPOINT]), weights_only=True)

    def saved(value: Any, **kwargs: Any) -> Files:
        buffer = io.BytesIO()
        torch.save(value, buffer, **kwargs)
        return {**good, CHECKPOINT: buffer.getvalue()}

    def edited(state: Mapping[str, Any] = {}, **changed: Any) -> Files:
        return saved({**content, **changed, "state": {**content["state"], **state}})

    yield "patchtst.good", good
    for what, cut in _cuts(good[CHECKPOINT]):
        yield f"patchtst.{what}", {**good, CHECKPOINT: cut}
    with zipfile.ZipFile(io.BytesIO(good[CHECKPOINT])) as archive:
        members = {m: archive.read(m) for m in archive.namelist()}
    program = next(m for m in members if m.endswith("data.pkl"))
    weight = content["state"]["classify.weight"]
    yield "patchtst.pickle", {**good, CHECKPOINT: evil}
    yield "patchtst.pickle_inside", {**good, CHECKPOINT: _zip({**members, program: evil}, zipfile.ZIP_STORED)}
    yield "patchtst.legacy_format", saved(content, _use_new_zipfile_serialization=False)
    yield "patchtst.packed", {**good, CHECKPOINT: _zip(members)}
    yield (
        "patchtst.missing_tensor_file",
        {
            **good,
            CHECKPOINT: _zip({k: v for k, v in members.items() if not k.endswith("/0")}, zipfile.ZIP_STORED),
        },
    )
    yield "patchtst.safetensors_name", {"model.safetensors": evil, METADATA: good[METADATA]}
    yield "patchtst.whole_module", saved(network.network)
    yield "patchtst.no_dict", saved([1, 2])
    yield "patchtst.missing_tensor", saved({**content, "state": dict(list(content["state"].items())[1:])})
    yield "patchtst.extra_tensor", edited({"more": torch.zeros(3)})
    yield "patchtst.other_shape", edited({"classify.weight": weight.T.contiguous()})
    yield "patchtst.other_dtype", edited({"classify.weight": weight.double()})
    yield "patchtst.nan", edited({"classify.weight": torch.full_like(weight, float("nan"))})
    yield "patchtst.sparse", edited({"classify.weight": weight.to_sparse()})
    yield "patchtst.expanded", edited({"classify.weight": torch.zeros(1).expand(10**6, 10**6)})
    yield "patchtst.quantized", edited({"classify.weight": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)})
    yield "patchtst.list_for_tensor", edited({"classify.weight": weight.tolist()})
    yield "patchtst.zero_scale", saved(
        {**content, "scaler": {**content["scaler"], "channel_scale": torch.zeros_like(content["scaler"]["channel_scale"])}}
    )  # fmt: skip
    for field, value in {
        "layers": 10**9,
        "d_model": 10**8,
        "heads": 0,
        "ffn_dim": -1,
        "patch_length": 0,
        "patch_stride": 0,
        "static_dim": "32",
        "dropout": "x",
        "unknown": 1,
    }.items():
        yield f"patchtst.settings_{field}", edited(settings={**content["settings"], field: value})
    for steps in (10**15, -1, 0, "64", None):
        yield f"patchtst.steps_{steps}", edited(steps=steps)
    yield "patchtst.names_no_list", edited(channel_names="abc")
    yield "patchtst.metadata_pickle", {**good, METADATA: evil}
    yield "patchtst.metadata_list", {**good, METADATA: b"[]"}
    yield "patchtst.metadata_nan", {**good, METADATA: good[METADATA].rstrip()[:-1] + b', "x": NaN}'}
    yield "patchtst.metadata_missing", {CHECKPOINT: good[CHECKPOINT]}


def _parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def _parquet_cases(evil: bytes) -> Iterator[tuple[str, Files]]:
    contract = load_contract()
    frame = pl.DataFrame(schema=contract.schema)
    good = signals_to_parquet(SignalSet(frame, {"contract_sha256": contract.sha256}))
    meta = {"spymaster.contract_sha256": json.dumps(contract.sha256)}
    arrow = frame.to_arrow(compat_level=pl.CompatLevel.oldest())

    def signals(table: pa.Table) -> Files:
        return {"a.parquet": _parquet(table.replace_schema_metadata(meta))}

    many = 200_000_000
    runs = pa.table({"a": pa.array(np.zeros(1, np.int64)).take(pa.array(np.zeros(1, np.int64)))})
    text = pa.table({"event_id": pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int32)), ["x" * 1_000_000])})  # fmt: skip
    cases: dict[str, Files] = {
        "good": {"a.parquet": good},
        "pickle": {"a.parquet": evil},
        "renamed_column": signals(arrow.rename_columns(["evil", *arrow.column_names[1:]])),
        "missing_column": signals(arrow.drop_columns([arrow.column_names[0]])),
        "extra_column": signals(arrow.append_column("evil", pa.array([], pa.int64()))),
        "wrong_dtype": signals(arrow.set_column(1, arrow.column_names[1], pa.array([], pa.string()))),
        "other_contract": {"a.parquet": _parquet(arrow.replace_schema_metadata({"spymaster.contract_sha256": '"0"'}))},
        "metadata_no_json": {"a.parquet": _parquet(arrow.replace_schema_metadata({"spymaster.contract_sha256": "{"}))},
        "no_metadata": {"a.parquet": _parquet(arrow.replace_schema_metadata(None))},
        "nested_column": signals(pa.table({"event_id": [[[[1]]]]})),
        "dictionary_bomb": signals(text),
        "claimed_rows": {"a.parquet": _claim_rows(_parquet(runs, compression="none"), many)},
    }
    cases |= {what: {"a.parquet": content} for what, content in _cuts(good)}
    for at in (len(good) - 40, len(good) - 6):  # in the footer, and in its length
        changed = bytearray(good)
        changed[at : at + 4] = b"\xff\xff\xff\xff"
        cases[f"overwritten_at_{at}"] = {"a.parquet": bytes(changed)}
    for what, files in cases.items():
        yield f"signals.{what}", files
    for loader in ("book", "flow"):
        other = pa.table({"ts_ns": pa.array([1, None], pa.int64())})
        yield f"{loader}.other_columns", {"a.parquet": _parquet(other)}
        yield f"{loader}.pickle", {"a.parquet": evil}
        yield f"{loader}.empty", {"a.parquet": b""}
    for what, about in {
        "no_json": "{",
        "huge_levels": json.dumps({"levels": 10**9, "bucket_ns": 1, "counts": []}),
        "negative_bucket": json.dumps({"levels": 1, "bucket_ns": -1, "counts": []}),
        "counts_no_list": json.dumps({"levels": 1, "bucket_ns": 1, "counts": 5}),
    }.items():
        yield f"book.{what}", {"a.parquet": _parquet(pa.table({"ts_ns": [1]}).replace_schema_metadata({"book": about}))}


def _claim_rows(content: bytes, rows: int) -> bytes:
    """The footer of a one-row file claims more rows: thrift compact, the row counts as zigzag varints."""
    footer = struct.unpack("<I", content[-8:-4])[0]
    start = len(content) - 8 - footer
    varint, value = b"", rows << 1
    while value:
        varint += bytes([(value & 0x7F) | (0x80 if value > 0x7F else 0)])
        value >>= 7
    changed = content[start:-8].replace(b"\x16\x02", b"\x16" + varint)
    return content[:start] + changed + struct.pack("<I", len(changed)) + b"PAR1"


def _dbn_cases(evil: bytes) -> Iterator[tuple[str, Files]]:
    good = dbn_bytes(trades(np.arange(500) * 1_000 + 1_700_000_000_000_000_000, np.full(500, 5 * 10**11)))
    plain = zstandard.ZstdDecompressor().decompressobj().decompress(good)
    header = 8 + struct.unpack("<I", plain[4:8])[0]
    bomb = zstandard.ZstdCompressor(level=1).compress(plain[:header] + plain[header : header + 48] * 30_000_000)
    cases = {
        "good": good,
        "pickle": evil,
        "huge_header": b"DBN\x03" + struct.pack("<I", 2**32 - 1) + bytes(100),
        "bomb": bomb,
        "bad_version": b"DBN\x09" + plain[4:],
        "header_of_zeros": plain[:8] + bytes(header - 8) + plain[header:],
        "alien_record": plain[: header + 1] + b"\x99" + plain[header + 2 :],
        "part_of_a_record": plain[:-7],
        "runs_backwards": plain[:header] + plain[-48:] + plain[header:],
        "damaged_frame": good[:40] + b"\xff" * 20 + good[60:],
    }
    cases |= {f"{what}": content for what, content in _cuts(good)}
    for what, content in cases.items():
        yield f"dbn.{what}", {"a.dbn": content}


def _store_cases(folder: Path, evil: bytes) -> None:
    """Manifests and artifact folders, edited after they were published."""

    def case(name: str, edit: Callable[[Path, dict[str, Any]], Any], files: Mapping[str, bytes] | None = None) -> None:
        root = folder / name
        home = ArtifactStore(root).publish("bars", "k", files or {"a.bin": b"1" * 100}).folder.parent
        manifest = json.loads((home / MANIFEST).read_bytes())
        told = edit(home, manifest)
        if told is not None:
            (home / MANIFEST).write_bytes(told if isinstance(told, bytes) else json.dumps(told).encode())

    case("store.good", lambda home, m: None)
    texts = {
        "pickle": evil, "empty": b"", "list": b"[]", "deep": b"[" * 200_000, "deep_object": b'{"a":' * 200_000,
        "nan": b'{"a": NaN}', "infinity": b'{"a": 1e999}', "huge_int": b'{"a": ' + b"9" * 100_000 + b"}",
        "binary": bytes(range(256)), "surrogate": b'{"asset": "\\ud800"}', "utf16": '{"a": 1}'.encode("utf-16"),
    }  # fmt: skip
    for what, text in texts.items():
        case(f"store.manifest_{what}", lambda home, m, text=text: text)
    case("store.repeated_key", lambda home, m: json.dumps(m)[:-1].encode() + b', "version": "0123456789abcdef"}')
    for what, version in {
        "parent": "../../bars",
        "absolute": "/etc",
        "nul": "a\0b",
        "long": "v" * 5000,
        "other": "0" * 16,
        "number": 10**30,
        "null": None,
    }.items():
        case(f"store.version_{what}", lambda home, m, v=version: {**m, "version": v})
    names = {
        "parent": "../a.bin",
        "absolute": "/etc/passwd",
        "nul": "a\0",
        "long": "n" * 5000,
        "dot": ".",
        "lock": ".lock",
    }
    for what, name in names.items():
        case(f"store.file_{what}", lambda home, m, n=name: {**m, "files": {n: m["files"]["a.bin"]}})
    for what, changed in {
        "files_list": {"files": ["a.bin"]},
        "no_files": {"files": {}},
        "hash_number": {"files": {"a.bin": 5}},
        "short_hash": {"files": {"a.bin": "ab"}},
        "inputs_list": {"inputs": []},
        "inputs_of_numbers": {"inputs": {"a": 1}},
        "metadata_text": {"metadata": "x"},
        "other_asset": {"asset": "levels"},
        "other_key": {"key": "j"},
        "sha_number": {"sha256": 1},
        "wrong_hash": {"files": {"a.bin": "0" * 64}},
        "wrong_content_hash": {"sha256": "0" * 64},
    }.items():
        case(f"store.{what}", lambda home, m, c=changed: {**m, **c})
    case("store.missing_field", lambda home, m: {k: v for k, v in m.items() if k != "inputs"})

    def of(home: Path, manifest: dict[str, Any]) -> Path:
        return home / manifest["version"] / "a.bin"

    def linked(home: Path, manifest: dict[str, Any]) -> None:
        path = of(home, manifest)
        (home / "aside").write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(home / "aside")

    def linked_folder(home: Path, manifest: dict[str, Any]) -> None:
        (home / manifest["version"]).rename(home / "aside")
        (home / manifest["version"]).symlink_to(home / "aside")

    def linked_manifest(home: Path, manifest: dict[str, Any]) -> None:
        (home / MANIFEST).rename(home / "aside")
        (home / MANIFEST).symlink_to(home / "aside")

    def piped(home: Path, manifest: dict[str, Any]) -> None:
        of(home, manifest).unlink()
        os.mkfifo(of(home, manifest))

    def endless(home: Path, manifest: dict[str, Any]) -> None:
        with of(home, manifest).open("wb") as f:
            f.truncate(1 << 40)

    case("store.link_out", linked)
    case("store.linked_folder", linked_folder)
    case("store.pipe", piped)
    case("store.sparse_terabyte", endless)
    case("store.altered", lambda home, m: of(home, m).write_bytes(b"2" * 100) and None)
    case("store.missing_file", lambda home, m: of(home, m).unlink())
    case("store.manifest_is_a_folder", lambda home, m: ((home / MANIFEST).unlink(), (home / MANIFEST).mkdir(), None)[2])
    case("store.manifest_is_a_link", linked_manifest)

    def published(name: str, asset: str, files: Mapping[str, bytes]) -> None:
        # past `publish`, which would refuse text that is no JSON: hashes are right, as an attacker would make them
        import hashlib

        from spymaster_assets.store import _version

        digests = {n: hashlib.sha256(c).hexdigest() for n, c in files.items()}
        home = folder / name / asset / "k"
        (home / _version(digests)).mkdir(parents=True)
        for n, c in files.items():
            (home / _version(digests) / n).write_bytes(c)
        manifest = {
            "asset": asset, "key": "k", "version": _version(digests), "sha256": "0" * 64, "files": digests, "inputs": {},
            "metadata": {}, "provenance": {},
        }  # fmt: skip
        (home / MANIFEST).write_text(json.dumps(manifest))

    no_json = {k: v for k, v in texts.items() if k not in ("surrogate", "utf16")}
    for what, text in {**no_json, "repeated_key": b'{"heads": 1, "heads": 2}'}.items():
        published(f"json.{what}", "bars", {"calibration.json": text})
    split = {
        "asof": "2024-02-07", "window": "rolling", "train": ["2024-02-01"], "validation": ["2024-02-05"],
        "test": ["2024-02-07"], "embargoed": [], "purged": [], "inputs": {}, "rows": {},
        "first_test_decision_ns": 1_707_316_260_000_000_000,
    }  # fmt: skip
    published("split.good", "bars", {"split.json": json.dumps(split).encode()})
    for what, changed in {
        "unknown_field": {"evil": 1},
        "train_number": {"train": 5},
        "train_of_numbers": {"train": [1]},
        "overlap": {"validation": ["2024-02-01"]},
        "purged_of_texts": {"purged": ["x"]},
        "no_test": {"test": []},
    }.items():
        published(f"split.{what}", "bars", {"split.json": json.dumps({**split, **changed}).encode()})
    entry = {
        "name": "a.dbn", "sha256": "0" * 64, "size_bytes": 1, "dataset": "d", "schema": "trades", "version": 3,
        "record_count": 1, "session_record_count": 1, "first_ns": 1, "last_ns": 2,
    }  # fmt: skip
    for what, name in {"parent": "../../secret.dbn", "absolute": "/etc/a.dbn", "nul": "a\0.dbn", "no_dbn": "passwd"}.items():  # fmt: skip
        raw = {"files": [{**entry, "name": name}], "missing_regular_minutes": [], "contracts": [], "front": {}}
        published(f"registration.{what}", "bars", {"files.json": json.dumps(raw).encode()})
    table = _parquet(pa.table({"start_ns": [1]}))
    levels = {"levels.json": b'{"rolls": [], "warmup_sigma": null}', "two_minute.parquet": table}
    published("levels.other_tables", "levels", {**levels, "levels.parquet": table, "context.parquet": table})
    published("levels.pickle", "levels", {**levels, "two_minute.parquet": evil})
    published("levels.missing_table", "levels", levels)


def run(folder: Path, name: str) -> dict[str, Any]:
    """Load one case in a forked process under limits; `outcome` is 'loaded', the typed error's name, or how it went wrong."""
    told = folder / f"{name}.outcome"

    def attempt() -> None:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, 2)  # what Rust panics and C++ print
        signal.alarm(LIMIT_S)
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = "loaded"
        try:
            LOADERS[name.split(".")[0]](folder / name)
        except SpymasterError as error:
            outcome = type(error).__name__
        except BaseException as error:
            outcome = f"escaped as {type(error).__name__}: {error}"[:300]
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        told.write_text(json.dumps({"outcome": outcome, "grown_mib": grown}))

    began = time.monotonic()
    status = os.waitpid(forked(attempt), 0)[1]
    found = {"name": name, "seconds": round(time.monotonic() - began, 2)}
    if status:
        how = f"died of signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit status {status}"
        return {**found, "outcome": how, "grown_mib": 0}
    return {**found, **json.loads(told.read_text())}


if __name__ == "__main__":
    corpus, witness = Path(sys.argv[1]) / "corpus", Path(sys.argv[1]) / "canary"
    shutil.rmtree(corpus, ignore_errors=True)
    assert os.waitpid(forked(lambda: build(corpus, witness)), 0)[1] == 0, "the corpus cannot be built"
    for one in sorted(p.name for p in corpus.iterdir()):
        print(json.dumps(run(corpus, one)), flush=True)
