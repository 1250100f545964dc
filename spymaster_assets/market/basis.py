"""From the instrument's points to the dollars in which option strikes are quoted, minute by minute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from spymaster_assets.market.instruments import Instrument
from spymaster_assets.settings import MINUTE_NS

MAX_AGE_MIN = 5
"""A ratio of two prices further apart in time than this is no basis."""


@dataclass(frozen=True)
class SpotBasis:
    """Points per strike dollar: ratio (k,) holds from known_ns (k,) on, fallback before the first.

    source: 'identity' (strikes are quoted in the instrument's own points), 'measured' (both prices are known) or 'fallback' (a fixed
    ratio, because the other feed is missing).
    """

    source: str
    known_ns: NDArray[np.int64]
    ratio: NDArray[np.float64]
    fallback: float

    def at(self, ts_ns: NDArray[np.int64]) -> NDArray[np.float64]:
        """Ratio (n,) known at each time."""
        index = np.searchsorted(self.known_ns, ts_ns, side="right") - 1
        if not len(self.ratio):
            return np.full(len(ts_ns), self.fallback)
        return np.where(index >= 0, self.ratio[np.maximum(index, 0)], self.fallback)

    def to_strike_e9(self, price_e9: NDArray[np.int64], ts_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Prices (n,) in 1e-9 strike dollars, by the ratio known at ts_ns (n,)."""
        if self.source == "identity":
            return price_e9
        return np.rint(price_e9 / self.at(ts_ns)).astype(np.int64)

    def to_points_e9(self, strike_e9: NDArray[np.float64], ts_ns: NDArray[np.int64]) -> NDArray[np.float64]:
        """Strike prices (n,), NaN allowed, in 1e-9 points."""
        return strike_e9 if self.source == "identity" else strike_e9 * self.at(ts_ns)

    def to_frame(self) -> pl.DataFrame:
        """Columns known_ns and ratio."""
        return pl.DataFrame({"known_ns": self.known_ns, "ratio": self.ratio})


def option_roots(instrument: Instrument) -> tuple[str, ...]:
    """Roots of the options whose dealers are watched, best first: the instrument's own, else SPY's, which expire every day."""
    return tuple(dict.fromkeys((instrument.root, "SPY")))


def identity_basis() -> SpotBasis:
    """Basis of an instrument that strikes are quoted in."""
    return SpotBasis("identity", np.empty(0, np.int64), np.empty(0), 1.0)


def measured_basis(
    instrument: Instrument, own_minutes: pl.DataFrame, other_minutes: pl.DataFrame | None, until_ns: int
) -> SpotBasis:
    """Ratio of the closes of both instruments' one-minute bars, known at the end of each minute in which both traded.

    own_minutes, other_minutes: bars with end_ns and close_e9; only those closed by until_ns are read. Without the other feed the fixed
    ratio of the instrument's profile is used and the source says 'fallback'.
    """
    fixed = instrument.points_per_spy_dollar
    if other_minutes is None or other_minutes.height == 0:
        return SpotBasis("fallback", np.empty(0, np.int64), np.empty(0), fixed)
    both = (
        own_minutes.filter(pl.col("end_ns") <= until_ns)
        .select("end_ns", "close_e9")
        .sort("end_ns")
        .join_asof(
            other_minutes.filter(pl.col("end_ns") <= until_ns)
            .select("end_ns", pl.col("close_e9").alias("other_e9"))
            .sort("end_ns"),
            on="end_ns",
            strategy="backward",
            tolerance=MAX_AGE_MIN * MINUTE_NS,
        )
        .drop_nulls()
    )
    ratio = (both["close_e9"] / both["other_e9"]).to_numpy()
    if not len(ratio):
        return SpotBasis("fallback", np.empty(0, np.int64), np.empty(0), fixed)
    return SpotBasis("measured", both["end_ns"].to_numpy(), ratio, fixed)
