"""Invariants that a day's signals must hold, as sentences about what broke."""

from __future__ import annotations

import polars as pl

from spymaster_assets.contract import Contract
from spymaster_assets.market.calendar import Session
from spymaster_assets.settings import DELAYS_S, NS, SignalSettings

_TOLERANCE_USD = 1e-6
_NEED_HISTORY = ("dist_to_", "sma_", "mean_reversion_", "confluence_", "reversion_pressure")
"""Columns that stay null for a whole session when warm-up sessions or the premarket are missing."""


def signal_faults(frame: pl.DataFrame, session: Session, settings: SignalSettings) -> list[str]:
    """Breaches of the intraday invariants; an empty list when all hold.

    Order, hours, geometry of the level (distance, side of approach, monitor band), consistency of labels, bounded ratios.
    """
    tests: dict[str, pl.Expr] = {
        "t0 lies outside regular hours": ~pl.col("ts_ns").is_between(
            session.regular_open_ns, session.regular_close_ns - 60 * NS
        ),
        "distance differs from |level - spot|": (
            pl.col("distance") - (pl.col("level_price") - pl.col("spot")).abs()
        ).abs()
        > _TOLERANCE_USD,
        "the touch bar closed outside the monitor band": pl.col("distance")
        > settings.monitor_band_usd + _TOLERANCE_USD,
        "UP but the close before was above the level": (pl.col("direction") == "UP")
        & (pl.col("previous_spot") > pl.col("level_price") + _TOLERANCE_USD),
        "DOWN but the close before was below the level": (pl.col("direction") == "DOWN")
        & (pl.col("previous_spot") < pl.col("level_price") - _TOLERANCE_USD),
        "tape_imbalance outside [-1, 1]": pl.col("tape_imbalance").abs() > 1.0,
        "label_known_ns is not after the decision": pl.col("label_known_ns") < pl.col("decision_ns"),
    }
    for delay, seconds in DELAYS_S.items():
        tests[f"confirm_ts_ns_{delay} is not t0 + {seconds} s"] = (
            pl.col(f"confirm_ts_ns_{delay}") - pl.col("ts_ns") != seconds * NS
        )
        undefined = pl.col(f"outcome_{delay}") == "UNDEFINED"
        tests[f"outcome_{delay} is UNDEFINED but tradeable_2 is not null, or the reverse"] = (
            undefined != pl.col(f"tradeable_2_{delay}").is_null()
        )
        for k in (1, 2):
            tests[f"tradeable_{k}_{delay} disagrees with time_to_threshold_{k}_{delay}"] = (
                pl.col(f"tradeable_{k}_{delay}").fill_null(False)
                != pl.col(f"time_to_threshold_{k}_{delay}").is_not_null()
            )
        tests[f"outcome_{delay} is BREAK or BOUNCE without a crossing of threshold_2"] = pl.col(
            f"outcome_{delay}"
        ).is_in(["BREAK", "BOUNCE"]) & ~pl.col(f"tradeable_2_{delay}").fill_null(False)
    counts = frame.select(e.fill_null(False).sum().alias(n) for n, e in tests.items()).row(0, named=True)
    faults = [f"{name}: {count} rows" for name, count in counts.items() if count]
    if not frame["ts_ns"].is_sorted():
        faults.append("rows are not sorted by ts_ns")
    return faults


def feed_faults(frame: pl.DataFrame, contract: Contract, feeds: set[str]) -> list[str]:
    """Columns that hold values though a feed they need is absent, or are wholly null though all their feeds are there."""
    out: list[str] = []
    if frame.height == 0:
        return out
    for column in contract.role("feature"):
        nulls = frame[column.name].null_count()
        if not set(column.feeds) <= feeds and nulls < frame.height:
            out.append(f"{column.name} holds values without the feeds {sorted(set(column.feeds) - feeds)}")
        elif set(column.feeds) <= feeds and nulls == frame.height and not column.name.startswith(_NEED_HISTORY):
            out.append(f"{column.name} is null in every row though its feeds {list(column.feeds)} are there")
    return out
