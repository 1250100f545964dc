"""Whether a feed was there all through a window, from the times at which it said something."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_TIMES = np.iinfo(np.int64)


@dataclass(frozen=True)
class Coverage:
    """Holes of a feed, in time order: each reaches to until_ns (k,) and is known for one from known_ns (k,) on, when the feed has been
    silent for the longest gap that is allowed. What lies before first_ns, when it first spoke, and after the last time is a hole too."""

    first_ns: int
    known_ns: NDArray[np.int64]
    until_ns: NDArray[np.int64]
    max_gap_ns: int

    @classmethod
    def of(
        cls, ts_ns: NDArray[np.int64], max_gap_ns: int, from_ns: int = int(_TIMES.min), until_ns: int = int(_TIMES.max)
    ) -> Coverage:
        """Coverage of a feed of the time [from_ns, until_ns) that spoke at the times ts_ns (n,), ascending and within it."""
        if not len(ts_ns):
            return cls(_TIMES.max, np.array([_TIMES.min]), np.array([_TIMES.max]), max_gap_ns)
        at = np.flatnonzero(np.diff(ts_ns) > max_gap_ns)
        return cls(
            int(ts_ns[0]),
            np.concatenate([[_TIMES.min], ts_ns[at] + max_gap_ns, [min(ts_ns[-1] + max_gap_ns, until_ns)]]),
            np.concatenate([[max(ts_ns[0] - max_gap_ns, from_ns)], ts_ns[at + 1], [_TIMES.max]]),
            max_gap_ns,
        )

    def unbroken(self, from_ns: NDArray[np.int64] | int, to_ns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether no hole known at to_ns (n,) reaches into [from_ns, to_ns); nothing from to_ns on has a say."""
        known = np.searchsorted(self.known_ns, to_ns, side="left")
        over = np.searchsorted(self.until_ns, from_ns, side="right")
        return np.asarray((known <= over) & (to_ns > self.first_ns))

    def heard(self, from_ns: NDArray[np.int64], to_ns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """As `unbroken`, by what was said in [from_ns, to_ns) alone: a silence that began before from_ns counts from there."""
        late_ns = from_ns + self.max_gap_ns
        return np.asarray((to_ns <= late_ns) | ((self.first_ns <= late_ns) & self.unbroken(late_ns, to_ns)))
