"""Which contract is in front: the outright with the most regular-hours volume in the session before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spymaster_assets.market.instruments import Instrument

_MONTH_YEAR = r"[FGHJKMNQUVXZ]\d{1,2}"


@dataclass(frozen=True)
class ContractVolume:
    """What an outright traded in a session: in all, in regular hours, and before the regular open (known in advance of it)."""

    instrument_id: int
    raw_symbol: str
    volume: int
    regular_volume: int
    pre_open_volume: int


@dataclass(frozen=True)
class Front:
    """The chosen contract, its share of the outright volume it was chosen by, and the basis of the choice.

    basis: 'only_contract', 'previous_session' (regular-hours volume of the session before) or 'pre_open' (no session before: the
    volume of this session up to its regular open). rolled_from is the contract in front before, null when it is the same.
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


def choose_front(
    current: Sequence[ContractVolume], previous: Sequence[ContractVolume], previous_front: Front | None
) -> Front | None:
    """Front contract of a session among those that trade in it; None when none does.

    Known before the regular open: it rests on the session before, or on this session's volume up to the open. Ties go to the lower id.
    """
    if not current:
        return None
    trading = {c.instrument_id: c for c in current}
    if previous:
        basis, volumes = "previous_session", {c.instrument_id: c.regular_volume for c in previous}
        if not any(volumes.get(i, 0) for i in trading):
            volumes = {c.instrument_id: c.volume for c in previous}
    else:
        basis, volumes = "pre_open", {c.instrument_id: c.pre_open_volume for c in current}
    if len(trading) == 1:
        basis = "only_contract"
    chosen = min(trading, key=lambda i: (-volumes.get(i, 0), i))
    total = sum(volumes.values())
    before = previous_front.raw_symbol if previous_front else None
    symbol = trading[chosen].raw_symbol
    return Front(
        chosen,
        symbol,
        1.0 if basis == "only_contract" else round(volumes.get(chosen, 0) / total, 6) if total else 0.0,
        basis,
        before if before not in (None, symbol) else None,
    )
