"""XGBoost's UBJ bytes judged before XGBoost sees them: edited ones make it crash or hang the process."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spymaster_assets.errors import ModelError, refusing

OBJECTIVES: dict[str, dict[str, Any]] = {
    "binary:logistic": {"name": "binary:logistic", "reg_loss_param": {"scale_pos_weight": "1"}},
    "reg:absoluteerror": {"name": "reg:absoluteerror"},
}
"""Objectives of the heads, with all that their models say of them."""
_NUMBERS = {"i": ">i1", "U": ">u1", "I": ">i2", "l": ">i4", "L": ">i8", "d": ">f4", "D": ">f8"}
_MAX_DEPTH = 12
_ROOT = 2**31 - 1
"""What XGBoost writes as the parent of a root."""
_NODE_ARRAYS = {
    "base_weights": "f4",
    "default_left": "u1",
    "left_children": "i4",
    "loss_changes": "f4",
    "parents": "i4",
    "right_children": "i4",
    "split_conditions": "f4",
    "split_indices": "i4",
    "split_type": "u1",
    "sum_hessian": "f4",
}
_CATEGORIES = ("categories", "categories_nodes", "categories_segments", "categories_sizes")


def check_ubj(data: bytes, features: Sequence[str], where: str) -> None:
    """Raise ModelError unless the bytes are whole boosted trees over these features: every index in range, every tree a tree.

    Layout: https://xgboost.readthedocs.io/en/stable/tutorials/saving_model.html, as version 3 writes gbtree without categories.
    """
    with refusing(ModelError, "not an XGBoost model as it was trained", where=where, remedy="train it again"):
        _check_model(read_ubj(data), list(features))


def read_ubj(data: bytes) -> Any:
    """Content of a UBJ file as XGBoost writes it, read in bounds; raise ValueError on anything else."""
    reader = _Reader(data)
    model = reader.value(0)
    _require(reader.at == len(data), "bytes follow the model")
    return model


def _check_model(model: Any, features: list[str]) -> None:
    learner, version = _fields(model, "learner", "version")
    _require(_integers(version) and len(version) == 3, "version")
    attributes, names, types, booster, param, objective = _fields(
        learner,
        "attributes",
        "feature_names",
        "feature_types",
        "gradient_booster",
        "learner_model_param",
        "objective",
    )
    _require(attributes == {} and types == [], "attributes or feature types")
    _require(names == features, "other features than its description names")
    _require(objective in OBJECTIVES.values(), "an objective that no head has")
    base = param.pop("base_score")
    count = str(len(features))
    _require(
        param == {"boost_from_average": "1", "num_class": "0", "num_feature": count, "num_target": "1"}, "parameters"
    )
    _require(base[:1] == "[" and base[-1:] == "]" and math.isfinite(float(base[1:-1])), "base_score")
    inner, name = _fields(booster, "model", "name")
    _require(name == "gbtree", "a booster that no head has")
    cats, tree_param, starts, info, trees = _fields(
        inner, "cats", "gbtree_model_param", "iteration_indptr", "tree_info", "trees"
    )
    _require(all(not len(part) for part in _fields(cats, "enc", "feature_segments", "sorted_idx")), "categories")
    n = len(trees)
    _require(tree_param == {"num_parallel_tree": "1", "num_trees": str(n)}, "number of trees")
    _require(_integers(starts) and list(starts) == list(range(n + 1)), "iterations")
    _require(_integers(info) and list(info) == [0] * n, "tree groups")
    for number, tree in enumerate(trees):
        _check_tree(tree, number, count)


def _check_tree(tree: Any, number: int, features: str) -> None:
    part = dict(zip(_NODE_ARRAYS, _fields(tree, *_NODE_ARRAYS, but=(*_CATEGORIES, "id", "tree_param")), strict=True))
    nodes = len(part["parents"])
    sizes = {"num_deleted": "0", "num_feature": features, "num_nodes": str(nodes), "size_leaf_vector": "1"}
    _require(tree["id"] == number and tree["tree_param"] == sizes, f"tree {number}: sizes")
    _require(all(not len(tree[name]) for name in _CATEGORIES), f"tree {number}: categories")
    for name, dtype in _NODE_ARRAYS.items():
        values = part[name]
        right = isinstance(values, np.ndarray) and values.dtype == np.dtype(dtype) and len(values) == nodes
        _require(right and bool(np.isfinite(values).all()), f"tree {number}: {name}")
    left, other, parents, split = (
        part[name].astype(np.int64) for name in ("left_children", "right_children", "parents", "split_indices")
    )
    inner = np.flatnonzero(left != -1)
    children = np.concatenate([left[inner], other[inner]])
    # children after their parents, each node but the root the child of exactly one: no cycle, nothing out of reach
    tidy = (
        nodes > 0
        and parents[0] == _ROOT
        and bool((other[left == -1] == -1).all())
        and bool((children > np.tile(inner, 2)).all())
        and np.array_equal(np.sort(children), np.arange(1, nodes))
        and np.array_equal(parents[children], np.tile(inner, 2))
    )
    _require(tidy, f"tree {number}: its nodes are no tree")
    _require(
        bool(((split >= 0) & (split < int(features))).all()), f"tree {number}: split on a feature that is not there"
    )
    _require(not part["split_type"].any() and bool((part["default_left"] <= 1).all()), f"tree {number}: split types")


def _fields(value: Any, *names: str, but: Sequence[str] = ()) -> list[Any]:
    _require(isinstance(value, dict) and set(value) == {*names, *but}, f"fields other than {', '.join(names)}")
    return [value[name] for name in names]


def _integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int for v in values)


def _require(right: bool, what: str) -> None:
    if not right:
        raise ValueError(what)


class _Reader:
    """UBJSON as XGBoost writes it, read in bounds: https://ubjson.org/type-reference/."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def value(self, depth: int) -> Any:
        _require(depth < _MAX_DEPTH, "nested too deeply")
        kind = self.marker()
        if kind == "{":
            found: dict[str, Any] = {}
            while self.peek() != "}":
                name = self.text()
                _require(name not in found, f"{name} is repeated")
                found[name] = self.value(depth + 1)
            self.at += 1
            return found
        if kind == "[":
            return self.array(depth)
        if kind == "S":
            return self.text()
        _require(kind in _NUMBERS, f"marker {kind!r} at byte {self.at - 1}")
        return np.frombuffer(self.take(np.dtype(_NUMBERS[kind]).itemsize), _NUMBERS[kind])[0].item()

    def array(self, depth: int) -> list[Any] | NDArray[Any]:
        kind = None
        if self.peek() == "$":
            self.at += 1
            kind = self.marker()
            _require(kind in _NUMBERS, f"arrays of {kind!r}")
        _require(self.marker() == "#", "an array without its length")
        n = self.length()
        if kind is None:
            return [self.value(depth + 1) for _ in range(n)]
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(n * dtype.itemsize), dtype).astype(dtype.newbyteorder("="))

    def text(self) -> str:
        return self.take(self.length()).decode()

    def length(self) -> int:
        _require(self.marker() == "L", "a length of another type")
        n = int(struct.unpack(">q", self.take(8))[0])
        _require(0 <= n <= len(self.data), f"a length of {n}")
        return n

    def marker(self) -> str:
        return chr(self.take(1)[0])

    def peek(self) -> str:
        _require(self.at < len(self.data), "the bytes end early")
        return chr(self.data[self.at])

    def take(self, n: int) -> bytes:
        _require(self.at + n <= len(self.data), "the bytes end early")
        self.at += n
        return self.data[self.at - n : self.at]
