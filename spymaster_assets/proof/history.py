"""How much history a feature needs: the stretch before t0 outside which another past leaves its value as it is, to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from spymaster_assets.contract import Contract, History
from spymaster_assets.settings import MINUTE_NS

PAST_SHIFT_E9 = 370_000_000
"""How far the prices of an altered past are moved, up in even minutes and down in odd ones, so that differences move too."""
LONGEST_WINDOW_MIN = 30
"""A value that depends on more than the longest declared window of minutes depends on the session."""
HOLDS, NEEDS_MORE, DECLARES_MORE, UNSEEN = "holds", "needs more", "declares more", "never changed"


@dataclass(frozen=True)
class Past:
    """Another past: everything before start_ns is altered, but not the kept_sessions warm-up sessions that come last.

    silent: the book says nothing before start_ns and all else is as it was, so that every touch stays one.
    """

    start_ns: int
    kept_sessions: int | None = None
    """None where the past begins within the session."""
    silent: bool = False


def changes(
    stored: pl.DataFrame, replayed: pl.DataFrame, past: Past, bar_start_ns: NDArray[np.int64], contract: Contract
) -> pl.DataFrame:
    """Which values changed with the past: one row per feature and touch that both tables hold and that begins after it.

    bar_start_ns (m,): starts of the session's one-minute bars, ascending. Touches are compared where their level has the same price to
    the bit, so what is found is the history beyond that of the level itself. Columns: feature; changed; minutes and bars from the
    altered past to t0, null where it ends before the session; sessions, how many unaltered sessions lie between, null where it ends
    within.
    """
    both = stored.filter(pl.col("ts_ns") >= past.start_ns).join(
        replayed, on=["event_id", "level_price_e9"], suffix="_other", coalesce=False
    )
    t0 = both["ts_ns"].to_numpy()
    within = past.kept_sessions is None
    bars = np.searchsorted(bar_start_ns, t0) - np.searchsorted(bar_start_ns, past.start_ns)
    distance = {
        "minutes": pl.Series(-((past.start_ns - t0) // MINUTE_NS) if within else [None] * len(t0), dtype=pl.Int64),
        "bars": pl.Series(bars if within else [None] * len(t0), dtype=pl.Int64),
        "sessions": pl.Series([past.kept_sessions] * len(t0), dtype=pl.Int64),
    }
    parts = [
        pl.DataFrame(
            {
                "feature": pl.repeat(column.name, both.height, eager=True),
                "changed": both[column.name].ne_missing(both[f"{column.name}_other"]),
                **distance,
            }
        )
        for column in contract.role("feature", "context")
    ]
    return pl.concat(parts)


def judge(found: pl.DataFrame, contract: Contract) -> pl.DataFrame:
    """Per feature what it declares, what was found and the verdict: columns feature, declared, found, compared, verdict.

    found: rows of `changes`. 'needs more': a value changed though the altered past lay outside the declared history. 'declares more': of
    the touches for which only the last part of the declared history was altered none changed. 'never changed': nor did any other.
    """
    rows = []
    for column in contract.role("feature", "context"):
        assert column.history is not None
        own = found.filter(pl.col("feature") == column.name)
        changed = own.filter("changed")
        verdict = HOLDS
        if changed.filter(_outside(column.history)).height:
            verdict = NEEDS_MORE
        elif not changed.height:
            verdict = UNSEEN if column.history.reaches else HOLDS
        elif not changed.filter(_last_part(column.history)).height and own.filter(_last_part(column.history)).height:
            verdict = DECLARES_MORE
        rows.append((column.name, column.history.text, _found(changed, column.history), own.height, verdict))
    return pl.DataFrame(rows, ["feature", "declared", "found", "compared", "verdict"], orient="row")


def shift_prices(bars: pl.DataFrame) -> pl.DataFrame:
    """Bars with every price moved by PAST_SHIFT_E9, up in even minutes and down in odd ones."""
    up = 1 - 2 * (pl.col("start_ns") // MINUTE_NS % 2)
    prices = [c for c in bars.columns if c.endswith("_e9")]
    return bars.with_columns(pl.col(p) + up * PAST_SHIFT_E9 for p in prices)


def _outside(history: History) -> pl.Expr:
    """Rows whose altered past lies wholly before the declared history."""
    if history.unit == "warmup":
        return pl.lit(False)
    earlier = pl.col("sessions").is_not_null()
    return earlier if history.unit == "session" else earlier | (pl.col(history.unit) >= history.count)


def _last_part(history: History) -> pl.Expr:
    """Rows that can tell the declared history from the next shorter one."""
    if history.unit == "warmup":
        return pl.col("sessions").is_not_null()
    if history.unit == "session":
        return pl.col("minutes") >= LONGEST_WINDOW_MIN
    return pl.col(history.unit) == history.count - 1


def _found(changed: pl.DataFrame, history: History) -> str:
    farthest = changed.select(pl.col("sessions", "minutes", "bars").max() + 1).row(0, named=True)
    if farthest["sessions"] is not None:
        return f"{farthest['sessions']} session{'s' if farthest['sessions'] > 1 else ''}"
    if farthest["minutes"] is None:
        return ""
    return f"{farthest['bars']}bars" if history.unit == "bars" else f"{farthest['minutes']}min"
