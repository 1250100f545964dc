"""Typed errors: each says what is wrong, where, what was expected and how to fix it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SpymasterError(Exception):
    """A fault that the user can act on; the message holds what, where, expected and remedy."""

    def __init__(self, what: str, *, where: str = "", expected: str = "", remedy: str = "") -> None:
        self.what, self.where, self.expected, self.remedy = what, where, expected, remedy
        parts = [what]
        if where:
            parts.append(f"where: {where}")
        if expected:
            parts.append(f"expected: {expected}")
        if remedy:
            parts.append(f"remedy: {remedy}")
        super().__init__("; ".join(parts))


class ConfigError(SpymasterError):
    """A setting or environment variable is missing or contradictory."""


class MarketDataError(SpymasterError):
    """A DBN file or folder cannot be trusted: truncated, corrupt, out of order, delivered twice or unknown."""


class MissingInputError(SpymasterError):
    """A partition or file that this step reads does not exist."""


class ContractError(SpymasterError):
    """A table or request contradicts features.json."""


class ArtifactError(SpymasterError):
    """A stored artifact is missing its manifest, torn, altered or of another shape than expected."""


class MixedSettingsError(SpymasterError):
    """Artifacts that would be read together were made with different settings."""


class SplitError(SpymasterError):
    """A walk-forward split would be empty, overlapping, out of order or larger than the history."""


class ModelError(SpymasterError):
    """A model cannot be fitted, registered, saved or loaded as asked."""


class CanaryError(SpymasterError):
    """A canary of an as-of session failed, or was run on another split or other models: its scores may not be published."""


class TrackingError(SpymasterError):
    """An experiment tracker is configured so that it cannot log."""


@contextmanager
def refusing(
    error: type[SpymasterError],
    what: str,
    *,
    where: str,
    expected: str = "",
    remedy: str = "",
    but: tuple[type[BaseException], ...] = (),
) -> Iterator[None]:
    """Turn whatever a reader raises on damaged bytes, a Rust panic included, into one `error`; that error itself and `but` pass."""
    passing: tuple[type[BaseException], ...] = (error, KeyboardInterrupt, SystemExit, GeneratorExit, *but)
    try:
        yield
    except passing:
        raise
    except BaseException as cause:  # a pyo3 PanicException is no Exception
        reason = f"{type(cause).__name__}: {cause}"[:500]
        raise error(f"{what}: {reason}", where=where, expected=expected, remedy=remedy) from cause
