"""When a replay cuts, and which sessions are worth one: where rules change, where something has just become known, and at random."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Moments:
    """Times of a session's touches at which a replay tells most, UTC ns, sorted: decided_ns, when a row has just become certain and a
    reach of one bar too far shows; touching_ns, within the touch bars, where what is declared known at t0 shows; known_ns, when any
    feature or the labels have just become known."""

    decided_ns: NDArray[np.int64]
    touching_ns: NDArray[np.int64]
    known_ns: NDArray[np.int64]

    def between(self, first_ns: int, last_ns: int) -> Moments:
        """Those from first_ns to last_ns."""
        times = (self.decided_ns, self.touching_ns, self.known_ns)
        return Moments(*(t[(t >= first_ns) & (t <= last_ns)] for t in times))


INTO_BAR_S = (1, 30)
"""How far into a touch bar a replay cuts."""


def known_moments(signals: pl.DataFrame, contract: Contract) -> Moments:
    """Moments of a session from its stored signals."""
    t0_ns = signals["ts_ns"].to_numpy()
    after_s = sorted({c.known_after_s for c in contract.role("feature")})
    decided = [signals["decision_ns"].to_numpy()]
    touching = [t0_ns + s * NS for s in INTO_BAR_S]
    known = [*(t0_ns + s * NS for s in after_s), signals["label_known_ns"].drop_nulls().to_numpy()]
    return Moments(*(np.unique(np.concatenate(times)) for times in (decided, touching, known)))


def cuts_of(
    session: Session,
    settings: Settings,
    count: int,
    seed: int,
    from_ns: int,
    moments: Moments | None = None,
) -> list[int]:
    """`count` distinct times of a session from from_ns on, ns: half of them edges at most, of the others two in seven each when a row has
    just been decided, within touch bars and when something has just become known, and one random.

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
    inner = (max(opens + 1, first), closes) if closes > max(opens + 1, first) else (first, last)
    none = np.empty(0, np.int64)
    told = moments.between(first, last) if moments else Moments(none, none, none)
    # seven turns have no factor in common with six or eight futures, so each kind of time sees each future
    turns = (none, *2 * (told.decided_ns, told.touching_ns, told.known_ns))
    drawn = 0
    while len(chosen) < min(count, last - first):
        if len(times := turns[drawn % len(turns)]):
            at_ns = int(rng.choice(times))
        else:
            at_ns = int(rng.integers(first, last)) if drawn % 8 == 4 else int(rng.integers(*inner))
        chosen[at_ns] = None
        drawn += 1
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
