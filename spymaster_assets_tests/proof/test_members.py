"""The first differing member of two files of a fitted artifact."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
import xgboost

from spymaster_assets.proof.members import first_difference


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def checkpoint(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def network(weights: torch.Tensor) -> bytes:
    scaler = {"center": torch.zeros(1), "scale": torch.ones(1)}
    return checkpoint({"state": {"w": weights}, "scaler": scaler, "channel_names": ["a"], "static_names": []})


def trees(n: int) -> bytes:
    x = np.random.default_rng(0).normal(size=(200, 2))
    return bytes(xgboost.train({"max_depth": 2}, xgboost.DMatrix(x, label=x[:, n]), num_boost_round=2).save_raw("ubj"))


@pytest.mark.parametrize(
    ("one", "other", "member"),
    [
        ({"scaler": {"center": [1.0, 2.0]}}, {"scaler": {"center": [1.0, 2.5]}}, "scaler.center[1]"),
        ({"kept": ["a", "b"]}, {"kept": ["a"]}, "kept length"),
        ({"best_round": 3, "n": 1}, {"n": 1}, "best_round"),
        ({"n": 1}, {"n": 1, "more": 2}, "more"),
        ({"n": 1}, {"n": 1.0}, "n"),
        ([1, {"x": None}], [1, {"x": 0}], "[1].x"),
    ],
)
def test_a_json_path_is_named(one: Any, other: Any, member: str) -> None:
    found = first_difference("split.json", json.dumps(one).encode(), json.dumps(other).encode())
    assert found is not None
    assert found[0] == member


def test_provenance_is_no_difference() -> None:
    one, other = (json.dumps({"n": 1, "provenance": {"created_at": t}}).encode() for t in "ab")
    assert first_difference("meta.json", one, other) is None


def test_an_array_and_its_element_are_named_by_bytes() -> None:
    a = np.array([[0.0, np.nan], [1.0, 2.0]])
    b = a.copy()
    b[1, 0] = -1.0
    assert first_difference("index.npz", npz(y=a, X=a), npz(y=a, X=b)) == ("X[1, 0]", "1.0", "-1.0")
    c = a.copy()
    c[0, 0] = -0.0
    assert first_difference("index.npz", npz(X=a), npz(X=c)) == ("X[0, 0]", "0.0", "-0.0")
    found = first_difference("index.npz", npz(X=a), npz(X=a[:1]))
    assert found is not None
    assert found[0] == "X"


def test_a_tensor_is_named() -> None:
    one, other = (network(torch.tensor([1.0, x])) for x in (2.0, 3.0))
    assert first_difference("model.pt", one, other) == ("state.w[1]", "2.0", "3.0")


def test_a_node_of_a_tree_is_named() -> None:
    one, other = trees(0), trees(1)
    found = first_difference("head.ubj", one, other)
    assert found is not None
    assert found[0].startswith("learner.")
    assert first_difference("head.ubj", one, one) is None


def test_other_files_are_named_by_the_first_byte() -> None:
    assert first_difference("a.bin", b"abc", b"abd") == ("byte 2", "3 bytes", "3 bytes")
    assert first_difference("a.bin", b"abc", b"abcd") == ("byte 3", "3 bytes", "4 bytes")


@pytest.mark.parametrize("name", ["head.ubj", "model.pt", "index.npz", "split.json"])
def test_damaged_files_are_compared_too(name: str) -> None:
    good = {
        "head.ubj": trees(0),
        "model.pt": network(torch.arange(64.0)),
        "index.npz": npz(X=np.arange(64.0), n=np.arange(3)),
        "split.json": json.dumps({"n": list(range(64))}).encode(),
    }[name]
    rng = np.random.default_rng(3)
    for at in rng.integers(0, len(good), 120):
        bad = bytearray(good)
        bad[at] ^= int(rng.integers(1, 256))
        found = first_difference(name, good, bytes(bad))
        assert found is not None
        assert len(found) == 3
    assert first_difference("deep.json", b"[" * 50_000, good) is not None
    bomb = npz(X=np.zeros(1_000)).replace(b"(1000,)", b"(9**9,)")
    assert first_difference("index.npz", good, bomb) is not None
