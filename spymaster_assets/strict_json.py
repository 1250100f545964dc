"""JSON objects as they were meant: no repeated key, no number that is not finite."""

from __future__ import annotations

import json
import math
from typing import Any


def parse_object(data: bytes | str) -> dict[str, Any]:
    """A JSON object; raise ValueError (or RecursionError, for endless nesting) on anything else, repeated keys or infinite numbers."""
    parsed = json.loads(data, object_pairs_hook=_distinct, parse_constant=_finite, parse_float=_finite)
    if not isinstance(parsed, dict):
        raise ValueError(f"{type(parsed).__name__} where an object should be")
    return parsed


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)[:80]!r} is repeated")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value
