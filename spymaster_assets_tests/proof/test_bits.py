"""Bits as hex, and the first place where two things differ."""

from __future__ import annotations

import numpy as np
import pytest

from spymaster_assets.proof.bits import bits, compared, unequal


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, "3ff0000000000000"),
        (-0.0, "8000000000000000"),
        (np.float32(1.0), "3f800000"),
        (np.int8(-1), "ff"),
        (255, "0xff"),
        (True, "0x1"),
        ("UP", "5550"),
        (None, "null"),
    ],
)
def test_bits(value: object, expected: str) -> None:
    assert bits(value) == expected


def test_the_first_differing_pair_is_told() -> None:
    pairs = [("a", 1.0, 1.0), ("b", 0.0, -0.0), ("c", 1, 2)]
    check = compared("row", pairs, 3)
    assert not check.equal
    assert (check.where, check.stored, check.rederived) == ("b", "0" * 16, "8" + "0" * 15)
    assert compared("row", pairs[:1], 1).equal


def test_arrays_differ_by_bytes_at_the_first_index() -> None:
    a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    b = a.copy()
    assert not list(unequal("X", a, b))
    b[1, 2, 3], b[1, 0, 2] = 0.0, np.nan
    assert [where for where, _, _ in unequal("X", a, b)] == ["X[1, 0, 2]"]
    nan = np.full(2, np.nan)
    assert not list(unequal("X", nan, nan.copy())), "the same NaN is the same bits"
    assert [where for where, _, _ in unequal("y", np.asarray(np.int8(1)), np.asarray(np.int8(0)))] == ["y"]
    assert [where for where, _, _ in unequal("X", a, a[:1])] == ["X"]
