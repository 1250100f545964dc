"""Two values bit for bit, and the first pair of many that differs."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Check:
    """One thing made twice: how many values were compared, and where it differs first with both values ('' where nothing does)."""

    what: str
    values: int
    where: str = ""
    stored: str = ""
    rederived: str = ""

    @property
    def equal(self) -> bool:
        """True when every bit is."""
        return not self.where


def compared(what: str, pairs: Iterable[tuple[str, Any, Any]], values: int) -> Check:
    """Check of (where, stored, rederived) values: the first pair whose bits differ, as hex."""
    for where, one, other in pairs:
        a, b = bits(one), bits(other)
        if a != b:
            return Check(what, values, where, a, b)
    return Check(what, values)


def bits(value: Any) -> str:
    """A value's bits as hex: floats as IEEE 754 big-endian, integers in two's complement or as 0x..., text as UTF-8; 'null' for None."""
    if value is None:
        return "null"
    if isinstance(value, np.generic):
        return np.asarray(value, value.dtype.newbyteorder(">")).tobytes().hex()
    if isinstance(value, int):
        return hex(value)
    return struct.pack(">d", value).hex() if isinstance(value, float) else str(value).encode().hex()


def unequal(name: str, a: NDArray[Any], b: NDArray[Any]) -> Iterator[tuple[str, Any, Any]]:
    """The first element whose bytes differ, as (name[index], value, value); shapes and dtypes that differ are one pair."""
    if a.shape != b.shape or a.dtype != b.dtype:
        yield name, f"{a.dtype}{a.shape}", f"{b.dtype}{b.shape}"
        return
    one, other = (np.ascontiguousarray(v).reshape(-1).view(np.uint8).reshape(v.size, v.dtype.itemsize) for v in (a, b))
    differ = (one != other).any(axis=1)
    if differ.any():
        at = np.unravel_index(int(differ.argmax()), a.shape) if a.shape else ()
        where = f"{name}[{', '.join(str(int(i)) for i in at)}]" if at else name
        yield where, a[at], b[at]
