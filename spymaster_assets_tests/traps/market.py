"""The SIMULATED input of the catalogue: a month of trades, quotes and releases with a clock change, a roll, a holiday and a half day."""

from __future__ import annotations

from functools import cache

import numpy as np
import polars as pl

from spymaster_assets.market.calendar import Session, TradingCalendar
from spymaster_assets.market.instruments import instrument
from spymaster_assets.proof.detect import EventTable
from spymaster_assets.settings import MINUTE_NS, NS

CALENDAR = TradingCalendar(instrument("SPY"))
SESSIONS: tuple[Session, ...] = tuple(CALENDAR.session(k) for k in CALENDAR.sessions("2024-11-01", "2024-12-02"))
"""The clocks change on 2024-11-03; 2024-11-28 is a holiday, 2024-11-29 a half day."""
BAR_NS = 30 * MINUTE_NS
VALID_FROM, ASOF, LATER_ASOF = 9, 13, 17
"""Index of the first validation session, of the as-of session, and of the one at which models are made again."""
ROLL = 11
"""Index of the first session in which the next contract trades more."""
NEWS = ("claims", "prices", "jobs")


def opens_ns(index: int) -> int:
    """Regular open of a session of the catalogue."""
    return SESSIONS[index].regular_open_ns


def edges() -> list[int]:
    """Times at which rules change: opens, closes, last bars, label ends, as-of times, the clock change, the roll and the half day."""
    out = []
    for n in (ASOF, 0, len(SESSIONS) - 2, LATER_ASOF, ROLL, 1, VALID_FROM, len(SESSIONS) - 1):
        session = SESSIONS[n]
        out += [session.regular_open_ns, session.regular_close_ns, session.regular_close_ns - BAR_NS]
    return out


@cache
def inputs(seed: int = 5) -> dict[str, EventTable]:
    """Trades (about 9 a half hour, in cents), quotes and releases in the order of their receipt."""
    rng = np.random.default_rng(seed)
    return {"trades": _trades(rng), "quotes": _quotes(rng), "releases": _releases(rng)}


def _trades(rng: np.random.Generator) -> EventTable:
    parts = []
    cents = 50_000
    for n, session in enumerate(SESSIONS):
        bars = (session.regular_close_ns - session.regular_open_ns) // BAR_NS
        count = 9 * bars
        ts = np.sort(rng.integers(session.regular_open_ns, session.regular_close_ns, count))
        ts[:: count // bars] = session.regular_open_ns + BAR_NS * np.arange(len(ts[:: count // bars]))  # on the edge
        ts = np.sort(ts)
        late_ns = rng.integers(NS // 1000, NS // 20, count) + (rng.random(count) < 0.01) * 5 * MINUTE_NS
        steps = rng.normal(0, 14, count) + 12 * np.sin(np.arange(count) / 25 + n)
        price = cents + np.rint(np.cumsum(steps)).astype(np.int64)
        cents = int(price[-1])
        share = 0.15 if n < ROLL else 0.8
        following = rng.random(count) < share
        parts.append(
            pl.DataFrame(
                {
                    "recv_ns": ts,
                    "event_ns": ts - late_ns,
                    "contract": np.where(following, "H5", "Z4"),
                    "price": np.maximum(price + 35 * following, 1_000),
                    "size": rng.geometric(0.02, count),
                    "venue": rng.choice(["A", "B", "C", "D"], count, p=[0.4, 0.3, 0.2, 0.1]),
                }
            )
        )
    frame = pl.concat(parts).with_row_index("id").with_columns(pl.col("id").cast(pl.Int64))
    return EventTable(frame, prices=("price",), sizes=("size",), groups=("contract", "venue"), id="id")


def _quotes(rng: np.random.Generator) -> EventTable:
    first, last = SESSIONS[0].regular_open_ns, SESSIONS[-1].regular_close_ns
    ts = np.concatenate([rng.integers(s.regular_open_ns, s.regular_close_ns, 40) for s in SESSIONS])
    ts = np.sort(np.clip(ts, first, last))
    bid = 50_000 + np.rint(np.cumsum(rng.normal(0, 20, len(ts)))).astype(np.int64)
    frame = pl.DataFrame(
        {
            "recv_ns": ts,
            "event_ns": ts - rng.integers(NS // 1000, NS // 100, len(ts)),
            "bid": bid,
            "ask": bid + rng.integers(1, 6, len(ts)),
            "depth": rng.integers(1, 500, len(ts)),
        }
    ).with_columns(
        pl.when(pl.Series(rng.random(len(ts)) < 0.1)).then(None).otherwise(pl.col(c)).alias(c) for c in ("bid", "ask")
    )
    return EventTable(frame, prices=("bid", "ask"), sizes=("depth",), nullable=("bid", "ask"))


def _releases(rng: np.random.Generator) -> EventTable:
    rows = []
    for n, session in enumerate(SESSIONS):
        for name in NEWS:
            value = float(np.round(rng.normal(100, 5), 2))
            period_ns = session.open_ns
            told_ns = session.regular_open_ns + int(rng.integers(1, 5 * 3600)) * NS
            rows.append((told_ns, period_ns, name, value, 0))
            if n + 2 < len(SESSIONS):  # revised two sessions later
                later_ns = SESSIONS[n + 2].regular_open_ns + int(rng.integers(1, 3600)) * NS
                rows.append((later_ns, period_ns, name, value + float(np.round(rng.normal(0, 1), 2)), 1))
    schema = {"recv_ns": pl.Int64, "event_ns": pl.Int64, "series": pl.String, "value": pl.Float64, "revision": pl.Int64}
    frame = pl.DataFrame(rows, schema=schema, orient="row").sort("recv_ns")
    return EventTable(frame, prices=("value",), groups=("series",), nullable=("value",))
