"""Instrument profiles: tick, point value, hours and what one 'SPY dollar' of band is in the instrument's points."""

from __future__ import annotations

from dataclasses import dataclass

from spymaster_assets.errors import ConfigError

ES_USD_PER_SPY_DOLLAR = 500.0
"""$50 a point x 10 points: what one ES contract gains from one SPY dollar."""
PRICE_SCALE = 1_000_000_000
"""DBN fixed-point prices are int64 in units of 1e-9."""


@dataclass(frozen=True)
class Instrument:
    """One tradable product.

    tick_e9: smallest price step, 1e-9 points. point_value_usd: dollars a point per unit. calendar: name in
    exchange_calendars. session_open/close: local wall time 'HH:MM' in New York; an open later than the close starts on
    the day before. points_per_spy_dollar: bands and thresholds are stated in SPY dollars; one is worth this many points.
    sweep_min_notional_usd: smallest one-sided burst that counts as a sweep.
    """

    symbol: str
    root: str
    kind: str
    tick_e9: int
    point_value_usd: float
    calendar: str
    session_open: str
    session_close: str
    points_per_spy_dollar: float
    sweep_min_notional_usd: float

    @property
    def is_future(self) -> bool:
        """True when contracts expire and a front month has to be chosen."""
        return self.kind == "future"

    @property
    def spy_dollar_e9(self) -> int:
        """One SPY dollar in 1e-9 points."""
        return round(self.points_per_spy_dollar * PRICE_SCALE)

    @property
    def units_per_es_contract(self) -> float:
        """Shares or contracts that gain as much from one SPY dollar as one ES contract does ($500)."""
        return ES_USD_PER_SPY_DOLLAR / (self.point_value_usd * self.points_per_spy_dollar)


def _future(symbol: str, tick: float, point_value_usd: float, per_dollar: float, sweep_usd: float) -> Instrument:
    return Instrument(
        symbol,
        symbol,
        "future",
        round(tick * PRICE_SCALE),
        point_value_usd,
        "CMES",
        "18:00",
        "17:00",
        per_dollar,
        sweep_usd,
    )


INSTRUMENTS: dict[str, Instrument] = {
    i.symbol: i
    for i in (
        Instrument("SPY", "SPY", "equity", 10_000_000, 1.0, "XNYS", "04:00", "20:00", 1.0, 2_000_000.0),
        _future("ES", 0.25, 50.0, 10.0, 10_000_000.0),
        _future("MES", 0.25, 5.0, 10.0, 1_000_000.0),
        _future("NQ", 0.25, 20.0, 40.0, 10_000_000.0),
        _future("MNQ", 0.25, 2.0, 40.0, 1_000_000.0),
        _future("YM", 1.0, 5.0, 70.0, 5_000_000.0),
        _future("MYM", 1.0, 0.5, 70.0, 500_000.0),
    )
}


def instrument(symbol: str) -> Instrument:
    """Return the profile of `symbol`; raise ConfigError naming the known ones otherwise."""
    try:
        return INSTRUMENTS[symbol.upper()]
    except KeyError:
        raise ConfigError(
            f"unknown instrument {symbol!r}",
            expected=f"one of {', '.join(sorted(INSTRUMENTS))}",
            remedy="add a profile to INSTRUMENTS in spymaster_assets/market/instruments.py",
        ) from None
