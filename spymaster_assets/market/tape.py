"""The records of a session, cut to it and put together from its files in receive order."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spymaster_assets.errors import MarketDataError
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.dbn import BAR_SECONDS, file_sha256, read_records, time_field, unchanged
from spymaster_assets.market.files import SessionFiles
from spymaster_assets.settings import NS


@dataclass(frozen=True)
class SessionTape:
    """Trades of one contract in receive order, arrays (n,): receive time, price in 1e-9 points, size, side.

    side is that of the aggressor: +1 buyer, -1 seller, 0 unknown.
    """

    ts_ns: NDArray[np.int64]
    price_e9: NDArray[np.int64]
    size: NDArray[np.int64]
    side: NDArray[np.int8]

    @classmethod
    def empty(cls) -> SessionTape:
        """No trades."""
        none = np.empty(0, np.int64)
        return cls(none, none, none, np.empty(0, np.int8))

    @classmethod
    def of_records(cls, records: NDArray[np.void]) -> SessionTape:
        """Columns of TRADE_DTYPE records."""
        side = records["side"].view(np.uint8)  # bytes compare several times faster than strings
        return cls(
            records["ts_recv"].astype(np.int64),
            records["price"].astype(np.int64),
            records["size"].astype(np.int64),
            (side == ord("B")).view(np.int8) - (side == ord("A")).view(np.int8),
        )


def load_session_records(
    dbn_dir: Path, registration: SessionFiles, *, session: Session, until_ns: int | None = None
) -> NDArray[np.void]:
    """All records of a session from its registered files, in receive order (stable).

    With until_ns only what was known by then: trades received before it, bars that had closed.
    Raises MarketDataError when a file changed since it was registered.
    """
    field = time_field(registration.schema)
    end_ns = session.close_ns
    if until_ns is not None:
        length_ns = BAR_SECONDS.get(registration.schema, 0) * NS
        end_ns = min(end_ns, until_ns - length_ns + 1 if length_ns else until_ns)
    end_ns = max(end_ns, session.open_ns)
    parts = []
    for file in registration.files:
        path = dbn_dir / file.name
        with unchanged(path):
            there = os.path.lexists(path)
            if not there or file_sha256(path) != file.sha256:
                raise MarketDataError(
                    f"{file.name} {'changed' if there else 'vanished'} since it was registered",
                    where=str(path),
                    expected=f"SHA-256 {file.sha256}",
                    remedy=f"dagster asset materialize --select market_files --partition {registration.session}",
                )
            records = read_records(path)
        first, last = np.searchsorted(records[field], np.array([session.open_ns, end_ns], np.uint64))
        parts.append(records[first:last])
    if len(parts) == 1:
        return parts[0]
    records = np.concatenate(parts)
    return records[np.argsort(records[field], kind="stable")]


def load_tape(dbn_dir: Path, registration: SessionFiles, *, session: Session) -> SessionTape:
    """Trades of the contract in front; see `load_session_records`."""
    records = load_session_records(dbn_dir, registration, session=session)
    ids = records["instrument_id"]
    if len(ids) and not (ids == registration.front_id).all():
        records = records[ids == registration.front_id]
    return SessionTape.of_records(records)
