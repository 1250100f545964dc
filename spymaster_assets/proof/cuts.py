"""When a replay cuts, and which sessions are worth one: where rules change, where something has just become known, and at random."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import polars as pl
from numpy.typing import NDArray

from spymaster_assets.contract import Contract
from spymaster_assets.market.calendar import NEW_YORK, Session, TradingCalendar
from spymaster_assets.market.contracts import front_known_ns
from spymaster_assets.market.files import SessionFiles
from spymaster_assets.settings import MINUTE_NS, NS, Settings
from spymaster_assets.store import ArtifactStore


def known_moments(signals: pl.DataFrame, contract: Contract) -> NDArray[np.int64]:
    """Times at which a feature or the labels of a stored touch have just become known, ns, sorted; a reach that is too far shows there."""
    delays = sorted({c.known_after_s for c in contract.role("feature")})
    features = [(signals["ts_ns"] + s * NS).to_numpy() for s in delays]
    return np.unique(np.concatenate([*features, signals["label_known_ns"].drop_nulls().to_numpy()]).astype(np.int64))


def cuts_of(
    session: Session,
    settings: Settings,
    count: int,
    seed: int,
    from_ns: int,
    moments_ns: NDArray[np.int64] | None = None,
) -> list[int]:
    """`count` distinct times of a session from from_ns on, ns: half of them edges at most, the others in turn moments and random.

    Edges: regular open and close, opening range end, the last start of a label, before the open and after the close. Every eighth random
    time lies anywhere in the session, the others in regular hours.
    """
    opens, closes = session.regular_open_ns, session.regular_close_ns
    opening = opens + settings.signal.opening_range_min * MINUTE_NS
    edges = [
        opening,
        closes - 1,
        opens + MINUTE_NS,
        closes + MINUTE_NS,
        (from_ns + opens) // 2,
        closes - settings.label.look_forward_s * NS,
        opens,
        opening + 1,
        opening - 1,
        opens + 1,
        closes,
        session.close_ns - 1,
    ]
    first, last = max(from_ns, session.open_ns) + 1, session.close_ns - 1
    chosen = dict.fromkeys([t for t in edges if first <= t <= last][: max(count // 2, 1)])
    rng = np.random.default_rng([seed, opens // MINUTE_NS])
    moments = np.empty(0, np.int64) if moments_ns is None else moments_ns[(moments_ns >= first) & (moments_ns <= last)]
    inner = (max(opens + 1, first), closes) if closes > max(opens + 1, first) else (first, last)
    drawn = 0
    while len(chosen) < min(count, last - first):
        drawn += 1
        if len(moments) and drawn % 2:
            at_ns = int(rng.choice(moments))
        else:
            at_ns = int(rng.integers(first, last)) if drawn % 8 == 0 else int(rng.integers(*inner))
        chosen[at_ns] = None
    return list(chosen)


def cuttable_from_ns(registered: SessionFiles, session: Session) -> int:
    """From when on a session can be cut: the first record of a front that trades before the regular open and was named by the session
    before, else the time by which the front has to be known, whenever its own first record is.
    """
    if registered.front.basis != "pre_open" and registered.first_ns < session.regular_open_ns:
        return registered.first_ns
    return front_known_ns(min(c.first_ns for c in registered.contracts), session.regular_open_ns)


def telling_sessions(store: ArtifactStore, calendar: TradingCalendar) -> dict[str, str]:
    """{session: why} of those that are replayed where none is named: the newest, and the newest DST change, roll and half day."""
    keys = store.keys("signals")
    if not keys:
        return {}
    told = {keys[-1]: "newest"}
    for why, is_one in (("DST change", _changes_clocks), ("roll", _rolls), ("half day", _is_short)):
        if found := next((k for k in reversed(keys) if is_one(store, calendar, k)), None):
            told[found] = f"{told[found]}, {why}" if found in told else why
    return told


def _changes_clocks(store: ArtifactStore, calendar: TradingCalendar, key: str) -> bool:
    """The first session after the clocks have changed."""
    times = (calendar.session(k).regular_open_ns for k in (calendar.previous(key), key))
    before, now = (datetime.fromtimestamp(t / NS, UTC).astimezone(NEW_YORK).utcoffset() for t in times)
    return before != now


def _rolls(store: ArtifactStore, calendar: TradingCalendar, key: str) -> bool:
    return store.load("market_files", key).json("files.json")["front"]["rolled_from"] is not None


def _is_short(store: ArtifactStore, calendar: TradingCalendar, key: str) -> bool:
    return calendar.session(key).early_close
