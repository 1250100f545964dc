"""What cannot be read for an explanation becomes a fault in words instead of the end of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from spymaster_assets.errors import SpymasterError

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
