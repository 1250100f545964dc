"""Which contract is in front: of the outrights seen before the regular open, the one that traded most in the session before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spymaster_assets.market.instruments import Instrument
from spymaster_assets.settings import MINUTE_NS

_MONTH_YEAR = r"[FGHJKMNQUVXZ]\d{1,2}"


@dataclass(frozen=True)
class ContractVolume:
    """What an outright traded in a session: in all, in regular hours, and up to when its front is known (`front_known_ns`).

    first_ns: its first record, UTC ns.
    """

    instrument_id: int
    raw_symbol: str
    volume: int
    regular_volume: int
    pre_open_volume: int
    first_ns: int


@dataclass(frozen=True)
class Front:
    """The chosen contract, its share of the outright volume it was chosen by, and the basis of the choice.

    basis: 'only_contract' (no other was seen by then), 'previous_session' (regular-hours volume of the session before, its whole volume
    where that is zero) or 'pre_open' (volume of this session up to then, where none of them traded in the session before). rolled_from
    is the contract in front before, null when it is the same.
    """

    instrument_id: int
    raw_symbol: str
    share: float
    basis: str
    rolled_from: str | None = None


def is_outright(raw_symbol: str, instrument: Instrument) -> bool:
    """True for a single contract of the instrument; spreads (with '-'), options and other roots are not."""
    if instrument.is_future:
        return re.fullmatch(re.escape(instrument.root) + _MONTH_YEAR, raw_symbol) is not None
    return raw_symbol == instrument.symbol


def front_known_ns(first_ns: int, regular_open_ns: int) -> int:
    """When the front month is known: at the regular open, or after the first minute (from first_ns on) of a tape that begins later."""
    return max(regular_open_ns, (first_ns // MINUTE_NS + 1) * MINUTE_NS)


def choose_front(
    current: Sequence[ContractVolume], previous: Sequence[ContractVolume], previous_front: Front | None, known_ns: int
) -> Front | None:
    """Front contract of a session among those with a record before known_ns, by what was known then; None when there is none.

    Whether a contract trades later must not matter, and one that has expired is seen no more. Ties go to the lower id.
    """
    seen = [c for c in current if c.first_ns < known_ns]
    if not seen:
        return None
    ranks = (
        ("previous_session", {c.instrument_id: c.regular_volume for c in previous}),
        ("previous_session", {c.instrument_id: c.volume for c in previous}),
        ("pre_open", {c.instrument_id: c.pre_open_volume for c in seen}),
    )
    basis, volumes = next((r for r in ranks if any(r[1].get(c.instrument_id) for c in seen)), ranks[-1])
    chosen = min(seen, key=lambda c: (-volumes.get(c.instrument_id, 0), c.instrument_id))
    if len(seen) == 1:
        basis = "only_contract"
    total = sum(volumes.values())
    before = previous_front.raw_symbol if previous_front else None
    return Front(
        chosen.instrument_id,
        chosen.raw_symbol,
        1.0 if basis == "only_contract" else round(volumes.get(chosen.instrument_id, 0) / total, 6) if total else 0.0,
        basis,
        before if before not in (None, chosen.raw_symbol) else None,
    )
