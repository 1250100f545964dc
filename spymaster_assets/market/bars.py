"""Bars of every timeframe, anchored at the session start, from trades or finer bars in one pass."""

from __future__ import annotations

import numpy as np
import polars as pl
from numba import njit
from numpy.typing import NDArray

from spymaster_assets.errors import MarketDataError
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.dbn import time_field
from spymaster_assets.market.files import SessionFiles
from spymaster_assets.settings import MINUTE_NS, TIMEFRAMES_MIN
from spymaster_assets.store import Artifact, ArtifactStore

BAR_SCHEMA: dict[str, pl.DataType] = {
    "instrument_id": pl.Int64(),
    "timeframe_min": pl.Int16(),
    "start_ns": pl.Int64(),
    "end_ns": pl.Int64(),
    "open_e9": pl.Int64(),
    "high_e9": pl.Int64(),
    "low_e9": pl.Int64(),
    "close_e9": pl.Int64(),
    "volume": pl.Int64(),
    "trade_count": pl.Int64(),
    "vwap": pl.Float64(),
    "buy_volume": pl.Int64(),
    "sell_volume": pl.Int64(),
    "is_front": pl.Boolean(),
}
_PRICES = 4
_VOLUME, _COUNT, _BUY, _SELL = range(4)


def session_bars(records: NDArray[np.void], session: Session, registration: SessionFiles) -> pl.DataFrame:
    """Bars (columns BAR_SCHEMA) of every outright of a session, sorted by instrument, timeframe and start; empty bars do not exist.

    records: TRADE_DTYPE or OHLCV_DTYPE in receive order. A trade belongs to the bar of its receive time: a bar holds what was known
    when it closed. vwap is in points; from ohlcv input it is the volume-weighted typical price (high + low + close) / 3, trade counts are
    null, and so are signed volumes, as they are until a trade of the contract has a known side. Raises MarketDataError on a record outside
    the session or out of order.
    """
    _refuse_outside(records, session, registration.schema)
    frames: list[pl.DataFrame] = []
    for contract in registration.contracts:
        of = _minutes_of_trades if registration.schema == "trades" else _minutes_of_bars
        minute = of(records, session, contract.instrument_id)
        if not len(minute[0]):
            continue
        frames += [_frame(minute, t, session, contract.instrument_id, registration) for t in TIMEFRAMES_MIN]
    if not frames:
        return pl.DataFrame(schema=BAR_SCHEMA)
    return pl.concat(frames).sort("instrument_id", "timeframe_min", "start_ns")


def bars_name(key: str) -> str:
    """File name of a session's bars."""
    return f"bars_{key}.parquet"


def read_bars(store: ArtifactStore, key: str) -> tuple[pl.DataFrame, Artifact]:
    """Bars (columns BAR_SCHEMA) of one session and their artifact."""
    artifact = store.load("ohlcv_bars", key)
    return artifact.frame(bars_name(key), BAR_SCHEMA), artifact


def _refuse_outside(records: NDArray[np.void], session: Session, schema: str) -> None:
    if not len(records):
        return
    first_ns, last_ns, ordered = _extremes(records[time_field(schema)])
    if not ordered:
        raise MarketDataError(
            f"records of session {session.key} are out of order",
            expected="records in receive order",
            remedy="read them with load_session_records",
        )
    if first_ns < session.open_ns or last_ns >= session.close_ns:
        raise MarketDataError(
            f"records from {first_ns} to {last_ns} are not all of session {session.key}",
            expected=f"times in [{session.open_ns}, {session.close_ns}) ns",
            remedy="read them with load_session_records",
        )


_Minutes = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Slot (n,), prices open high low close (n, 4), volume count buy sell (n, 4), notional (n,) in 1e-9 points x size."""


def _minutes_of_trades(records: NDArray[np.void], session: Session, instrument_id: int) -> _Minutes:
    slots = (session.close_ns - session.open_ns + MINUTE_NS - 1) // MINUTE_NS
    return _accumulate_trades(
        records["ts_recv"],
        records["price"],
        records["size"],
        records["side"].view(np.uint8),
        records["instrument_id"],
        instrument_id,
        session.open_ns,
        MINUTE_NS,
        slots,
    )


def _minutes_of_bars(records: NDArray[np.void], session: Session, instrument_id: int) -> _Minutes:
    records = records[records["instrument_id"] == instrument_id]
    slot = (records["ts_event"].astype(np.int64) - session.open_ns) // MINUTE_NS
    prices = np.stack([records[n] for n in ("open", "high", "low", "close")], axis=1)
    volume = records["volume"].astype(np.int64)
    typical = (prices[:, 1].astype(np.float64) + prices[:, 2] + prices[:, 3]) / 3.0
    sums = np.zeros((len(slot), 4), np.int64)
    sums[:, _VOLUME] = volume
    return _aggregate(slot, prices, sums, typical * volume)


def _aggregate(
    slot: NDArray[np.int64], prices: NDArray[np.int64], sums: NDArray[np.int64], notional: NDArray[np.float64]
) -> _Minutes:
    """Join consecutive rows of equal slot; rows are sorted by slot."""
    if not len(slot):
        return slot, prices, sums, notional
    starts = np.flatnonzero(np.diff(slot, prepend=slot[0] - 1))
    ends = np.append(starts[1:], len(slot)) - 1
    joined = np.stack(
        [
            prices[starts, 0],
            np.maximum.reduceat(prices[:, 1], starts),
            np.minimum.reduceat(prices[:, 2], starts),
            prices[ends, 3],
        ],
        axis=1,
    )
    return slot[starts], joined, np.add.reduceat(sums, starts, axis=0), np.add.reduceat(notional, starts)


def _frame(
    minute: _Minutes,
    timeframe: int,
    session: Session,
    instrument_id: int,
    registration: SessionFiles,
) -> pl.DataFrame:
    slot, prices, sums, notional = minute
    if timeframe > 1:
        slot, prices, sums, notional = _aggregate(slot // timeframe, prices, sums, notional)
    length_ns = timeframe * MINUTE_NS
    start = session.open_ns + slot * length_ns
    trades = registration.schema == "trades"
    # known from the bar on that has a first side: a later one must not turn what was null into 0
    sided = np.maximum.accumulate(sums[:, _BUY] + sums[:, _SELL]) > 0
    volume = sums[:, _VOLUME]
    with np.errstate(invalid="ignore", divide="ignore"):
        vwap = np.where(volume > 0, notional / volume / 1e9, prices[:, 3] / 1e9)
    columns = {
        "instrument_id": np.full(len(slot), instrument_id, np.int64),
        "timeframe_min": np.full(len(slot), timeframe, np.int16),
        "start_ns": start,
        "end_ns": start + length_ns,
        "open_e9": prices[:, 0],
        "high_e9": prices[:, 1],
        "low_e9": prices[:, 2],
        "close_e9": prices[:, 3],
        "volume": volume,
        "trade_count": sums[:, _COUNT] if trades else None,
        "vwap": vwap,
        "buy_volume": pl.Series(sums[:, _BUY]).set(pl.Series(~sided), None),
        "sell_volume": pl.Series(sums[:, _SELL]).set(pl.Series(~sided), None),
        "is_front": np.full(len(slot), instrument_id == registration.front_id),
    }
    return pl.DataFrame(columns, schema=BAR_SCHEMA)


@njit(cache=True)
def _extremes(times):  # type: ignore[no-untyped-def]
    """Smallest and largest time, and whether times never fall, in one pass over a strided column."""
    low = high = times[0]
    ordered = True
    for k in range(1, len(times)):
        low = min(low, times[k])
        ordered &= times[k] >= high
        high = max(high, times[k])
    return low, high, ordered


@njit(cache=True)
def _accumulate_trades(ts, price, size, side, ids, instrument_id, open_ns, length_ns, slots):  # type: ignore[no-untyped-def]
    """Rows of the slots that traded; a slot's sums stay in registers until the next slot begins."""
    at = np.empty(slots, np.int64)
    prices = np.empty((slots, _PRICES), np.int64)
    sums = np.empty((slots, 4), np.int64)
    notional = np.empty(slots)
    row = -1
    until = np.int64(-1)
    first = high = low = last = np.int64(0)
    volume = count = buys = sells = np.int64(0)
    value = 0.0
    for k in range(len(ts)):
        if ids[k] != instrument_id:
            continue
        t = np.int64(ts[k])
        p = price[k]
        if t >= until:
            if row >= 0:
                _put(row, prices, sums, notional, first, high, low, last, volume, count, buys, sells, value)
            row += 1
            at[row] = (t - open_ns) // length_ns
            until = open_ns + (at[row] + 1) * length_ns
            first = high = low = p
            volume = count = buys = sells = np.int64(0)
            value = 0.0
        high = max(high, p)
        low = min(low, p)
        last = p
        q = np.int64(size[k])
        volume += q
        count += 1
        # sides alternate unpredictably: products cost less than mispredicted branches
        buys += q * (side[k] == 66)  # b"B": a buyer took the offer
        sells += q * (side[k] == 65)  # b"A": a seller hit the bid
        value += float(p) * q
    if row >= 0:
        _put(row, prices, sums, notional, first, high, low, last, volume, count, buys, sells, value)
    row += 1
    return at[:row], prices[:row], sums[:row], notional[:row]


@njit(cache=True, inline="always")
def _put(row, prices, sums, notional, first, high, low, last, volume, count, buys, sells, value):  # type: ignore[no-untyped-def]
    prices[row, 0], prices[row, 1], prices[row, 2], prices[row, 3] = first, high, low, last
    sums[row, _VOLUME], sums[row, _COUNT], sums[row, _BUY], sums[row, _SELL] = volume, count, buys, sells
    notional[row] = value
