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
    null, and so are signed volumes, as they are where no trade has a known side. Raises MarketDataError on a record outside the session.
    """
    _refuse_outside(records, session, registration.schema)
    frames: list[pl.DataFrame] = []
    for contract in registration.contracts:
        mine = (
            records if len(registration.contracts) == 1 else records[records["instrument_id"] == contract.instrument_id]
        )
        if len(mine) and (mine["instrument_id"] != contract.instrument_id).any():
            mine = mine[mine["instrument_id"] == contract.instrument_id]
        if not len(mine):
            continue
        minute = (
            _minutes_of_trades(mine, session) if registration.schema == "trades" else _minutes_of_bars(mine, session)
        )
        frames += [_frame(minute, t, session, contract.instrument_id, registration, mine) for t in TIMEFRAMES_MIN]
    if not frames:
        return pl.DataFrame(schema=BAR_SCHEMA)
    return pl.concat(frames).sort("instrument_id", "timeframe_min", "start_ns")


def _refuse_outside(records: NDArray[np.void], session: Session, schema: str) -> None:
    if not len(records):
        return
    times = records[time_field(schema)]
    if int(times.min()) < session.open_ns or int(times.max()) >= session.close_ns:
        raise MarketDataError(
            f"records from {int(times.min())} to {int(times.max())} are not all of session {session.key}",
            expected=f"times in [{session.open_ns}, {session.close_ns}) ns",
            remedy="read them with load_session_records",
        )


_Minutes = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Slot (n,), prices open high low close (n, 4), volume count buy sell (n, 4), notional (n,) in 1e-9 points x size."""


def _minutes_of_trades(records: NDArray[np.void], session: Session) -> _Minutes:
    slots = (session.close_ns - session.open_ns + MINUTE_NS - 1) // MINUTE_NS
    filled, prices, sums, notional = _accumulate_trades(
        records["ts_recv"],
        records["price"],
        records["size"],
        records["side"].view(np.uint8),
        session.open_ns,
        MINUTE_NS,
        slots,
    )
    at = np.flatnonzero(filled)
    return at, prices[at], sums[at], notional[at]


def _minutes_of_bars(records: NDArray[np.void], session: Session) -> _Minutes:
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
    records: NDArray[np.void],
) -> pl.DataFrame:
    slot, prices, sums, notional = minute
    if timeframe > 1:
        slot, prices, sums, notional = _aggregate(slot // timeframe, prices, sums, notional)
    length_ns = timeframe * MINUTE_NS
    start = session.open_ns + slot * length_ns
    trades = registration.schema == "trades"
    sided = trades and bool(((records["side"] == b"A") | (records["side"] == b"B")).any())
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
        "buy_volume": sums[:, _BUY] if sided else None,
        "sell_volume": sums[:, _SELL] if sided else None,
        "is_front": np.full(len(slot), instrument_id == registration.front_id),
    }
    return pl.DataFrame(columns, schema=BAR_SCHEMA)


@njit(cache=True)
def _accumulate_trades(ts, price, size, side, open_ns, length_ns, slots):  # type: ignore[no-untyped-def]
    filled = np.zeros(slots, np.bool_)
    prices = np.zeros((slots, _PRICES), np.int64)
    sums = np.zeros((slots, 4), np.int64)
    notional = np.zeros(slots)
    for k in range(len(ts)):
        s = (np.int64(ts[k]) - open_ns) // length_ns
        p = price[k]
        q = np.int64(size[k])
        if not filled[s]:
            filled[s] = True
            prices[s, 0] = p
            prices[s, 1] = p
            prices[s, 2] = p
        else:
            if p > prices[s, 1]:
                prices[s, 1] = p
            if p < prices[s, 2]:
                prices[s, 2] = p
        prices[s, 3] = p
        sums[s, _VOLUME] += q
        sums[s, _COUNT] += 1
        if side[k] == 66:  # b"B": a buyer took the offer
            sums[s, _BUY] += q
        elif side[k] == 65:  # b"A": a seller hit the bid
            sums[s, _SELL] += q
        notional[s] += float(p) * q
    return filled, prices, sums, notional
