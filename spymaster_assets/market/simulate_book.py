"""A simulated market with its order book and its 0DTE options: one seeded process, consistent DBN files, a planted rule.

A latent price walks by the second. Quotes are placed, cancelled and taken around it, so that every trade is at a price that the book
shows at that moment. Levels are read off the trades of the simulation itself (the kinds of `market.simulate`). At a contact the level
breaks with probability

    p_break = sigmoid(kind + speed x (z - 1.2) + touch x min(earlier, 3) - wall x w)

where z is the move of the mid toward the level over ten minutes in its own standard deviations, `earlier` counts earlier contacts and w is
the log of the defending side's depth factor less the attacking side's (two slow random factors that scale the book's target depth).
The drawn outcome then shows in three places, each with its own strength, before the price follows:

1. Book, `liquidity_s`: target depth of the defending side within `zone_usd` of the level is x (1 - liquidity) before a break and
   x (1 + liquidity) before a bounce. The defending side is the ask when the price came from below, else the bid.
2. Tape: the share of buyers is 0.5 + tilt x side for `tilt_s`, then 0.5 + tilt / 3 x side until the drift ends (side: +1 up, -1 down).
3. Options, `option_s`: customers of strikes within `option_reach_usd` of the level buy with probability 0.5 + lean before a break (dealers
   get short gamma) and 0.5 - lean before a bounce.

For `resolve_s` the price is held at the level; then it drifts `drift` x sigma x sqrt(8 min) to the drawn side until `drift_s` after the
contact. truth.parquet holds one row a contact with everything that went into the draw. docs/simulator.md says the same at more length.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path

import databento_dbn
import numpy as np
import polars as pl
import zstandard
from numba import njit
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.special import ndtr

from spymaster_assets.errors import ConfigError
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.dbn import MBP10_DTYPE, TRADE_DTYPE, UNDEFINED_PRICE
from spymaster_assets.market.instruments import Instrument
from spymaster_assets.market.simulate import (
    DATASET,
    KINDS,
    LevelRule,
    dbn_header,
    next_start,
    planted_truth,
    raw_symbol,
    refuse_market,
    session_activity,
    simulated_folder,
)
from spymaster_assets.settings import NS, TRADING_YEAR_S

BOOK_LEVELS = 10
CMBP1_DTYPE = np.dtype(
    [
        ("length", "u1"), ("rtype", "u1"), ("publisher_id", "<u2"), ("instrument_id", "<u4"), ("ts_event", "<u8"),
        ("price", "<i8"), ("size", "<u4"), ("action", "S1"), ("side", "S1"), ("flags", "u1"), ("_reserved1", "S1"),
        ("ts_recv", "<u8"), ("ts_in_delta", "<i4"), ("_reserved2", "S4"), ("bid_px_00", "<i8"), ("ask_px_00", "<i8"),
        ("bid_sz_00", "<u4"), ("ask_sz_00", "<u4"), ("bid_pb_00", "<u2"), ("_reserved1_00", "S2"), ("ask_pb_00", "<u2"),
        ("_reserved2_00", "S2"),
    ]
)  # fmt: skip
"""Record of the schema `cmbp-1`: 80 bytes."""
MIDS_PER_S = 10
"""Resolution of the mid that option quotes follow."""
FIRST_OPTION_ID = 1001
STRIKES_EACH_SIDE = 25
_UNDERLYING_ID = 1
_F_LAST = 128
_CHUNK_RECORDS = 1 << 16
_LADDER_TICKS = 1 << 17
_SWEEP_LEVELS = 6
_SCAN_TICKS = 4096
_SEEN_TICKS = 256
_MARGIN_RECORDS = 2 * _SWEEP_LEVELS + 2
_FIRST_TICKS = 400
_HALF_SPREAD_TICKS = 0.6
_MEAN_AWAY_TICKS = 4.0
_MOST_AWAY_TICKS = 12
_SWEEP_SHARE = 0.02
_LEVELS_PER_ORDER = 1.1
"""Levels that a market order takes on average, measured; only the count of records rests on it, as on the next."""
_SEEN_SHARE = 0.93
"""Share of limit orders and cancellations that change the ten levels."""
_WALL_STD = 0.35
_WALL_S = 300.0
_SNAPSHOT_S = 30
_BOOK_LEVELS = BOOK_LEVELS
_UNDEFINED_E9 = int(UNDEFINED_PRICE)
_MIDS_PER_S = MIDS_PER_S
_MBP10_BYTES, _TRADE_BYTES, _CMBP1_RTYPE = MBP10_DTYPE.itemsize, TRADE_DTYPE.itemsize, 0xB1
_ADD, _CANCEL, _TRADE, _SELL, _BUY = ord("A"), ord("C"), ord("T"), ord("A"), ord("B")
_EPISODE = (
    "second", "kind", "level_price", "direction_sign", "approach_z", "earlier_touches", "wall_log_ratio", "p_break", "breaks",
)  # fmt: skip
# What the kernel keeps from chunk to chunk: whole numbers (best quotes as ladder ticks, bid and ask adjacent) and real ones.
(
    _W_SECOND, _W_EVENT, _W_BID, _W_ASK, _W_ACTIVE_FROM, _W_ACTIVE_UNTIL, _W_ACTIVE_SIDE, _W_DEFENDER, _W_BREAKS, _W_SEQUENCE, _W_RECEIVED,
    _W_FILLED, _W_BUYERS_E9,
) = range(13)  # fmt: skip
(
    _R_LATENT, _R_NEXT, _R_HIGH, _R_LOW, _R_PM_HIGH, _R_PM_LOW, _R_OR_HIGH, _R_OR_LOW, _R_WEIGHTED, _R_WEIGHT, _R_ACTIVE_LEVEL,
) = range(11)  # fmt: skip


@dataclass(frozen=True)
class BookProfile:
    """How much is simulated a session: expected counts, and how finely a price level is split into orders."""

    name: str
    trades: int
    book_records: int
    option_trades: int
    orders_per_level: float

    def __post_init__(self) -> None:
        """Raise ConfigError when no session can be made of it."""
        wrong = [
            f"{n} = {getattr(self, n)}"
            for n in ("trades", "book_records", "option_trades", "orders_per_level")
            if not getattr(self, n) > 0
        ]
        if wrong or not 5 * self.trades <= self.book_records:
            raise ConfigError(
                f"the profile cannot be simulated: {'; '.join(wrong) or f'{self.trades} trades in {self.book_records} book records'}",
                where=f"BookProfile {self.name}",
                expected="counts above 0 and at least five book records a trade",
            )

    def scaled(self, share: float) -> BookProfile:
        """The same profile with `share` of the counts."""
        return BookProfile(
            f"{self.name} x {share:g}",
            round(self.trades * share),
            round(self.book_records * share),
            round(self.option_trades * share),
            self.orders_per_level,
        )


PROFILES = {
    "full": BookProfile("full", 500_000, 5_000_000, 300_000, 10.0),
    "small": BookProfile("small", 10_000, 100_000, 6_000, 2.0),
}


@dataclass(frozen=True)
class BookRule:
    """The planted truth: `level` draws the outcome (its trades_per_session is not used), the rest says how it shows.

    Dollars are SPY dollars; sigma_atm, skew (a percent of moneyness) and smile (a squared percent) are annual volatilities.
    """

    level: LevelRule = field(default_factory=LevelRule)
    wall: float = 1.0
    liquidity: float = 0.6
    liquidity_s: int = 180
    zone_usd: float = 0.20
    resolve_s: int = 60
    lean: float = 0.25
    option_s: int = 300
    option_reach_usd: float = 2.0
    depth_lots: int = 40
    sigma_atm: float = 0.16
    skew: float = -0.01
    smile: float = 0.004

    def __post_init__(self) -> None:
        """Raise ConfigError when the rule cannot be simulated."""
        positive = ("liquidity_s", "zone_usd", "resolve_s", "option_s", "option_reach_usd", "depth_lots", "sigma_atm")
        wrong = [f"{name} = {getattr(self, name)}" for name in positive if not 0 < getattr(self, name) < np.inf]
        wrong += [
            f"{name} = {getattr(self, name)}" for name in ("wall", "skew") if not np.isfinite(getattr(self, name))
        ]
        numbers = {n: v for n, v in asdict(self.level).items() if n != "kind"} | dict(enumerate(self.level.kind))
        wrong += [f"level {name} = {value}" for name, value in numbers.items() if not np.isfinite(value)]
        if not 0.0 <= self.liquidity < 1.0:
            wrong.append(f"liquidity = {self.liquidity}")
        if not 0.0 <= self.lean <= 0.5:
            wrong.append(f"lean = {self.lean}")
        if not 0.0 <= self.smile < np.inf:
            wrong.append(f"smile = {self.smile}")
        if self.resolve_s >= self.level.drift_s:
            wrong.append(f"resolve_s = {self.resolve_s} does not end before drift_s = {self.level.drift_s}")
        if wrong:
            raise ConfigError(
                f"the rule cannot be simulated: {'; '.join(wrong)}",
                where="BookRule",
                expected="liquidity in [0, 1), lean in [0, 0.5], wall and skew finite, smile at least 0, the rest above 0",
            )

    def silent(self) -> BookRule:
        """The same outcomes and drifts, but nothing in book, tape or options that gives them away."""
        values = asdict(self) | {"liquidity": 0.0, "lean": 0.0}
        return BookRule(**values | {"level": LevelRule(**asdict(self.level) | {"tilt": 0.0})})


@dataclass(frozen=True)
class SimulatedBook:
    """One session of the underlying.

    trades: TRADE_DTYPE. truth: one row a contact. mids_e9: the mid at each tenth of a second of the session, before the events of that
    instant, 1e-9 points. book_records: how many mbp-10 records went to the sink. last_e9: last trade's price.
    """

    trades: NDArray[np.void]
    truth: pl.DataFrame
    mids_e9: NDArray[np.float64]
    book_records: int
    last_e9: int


@dataclass(frozen=True)
class SimulatedOptions:
    """One session of 0DTE options: trades (TRADE_DTYPE), quotes (CMBP1_DTYPE) and definition records as bytes; symbols by id."""

    trades: NDArray[np.void]
    quotes: NDArray[np.void]
    definitions: bytes
    symbols: dict[int, str]


def profile_named(name: str) -> BookProfile:
    """The profile `full` or `small`; raise ConfigError naming both otherwise."""
    if name not in PROFILES:
        raise ConfigError(f"unknown profile {name!r}", expected=f"one of {', '.join(sorted(PROFILES))}")
    return PROFILES[name]


def simulate_book(
    session: Session,
    instrument: Instrument,
    seed: int,
    start_e9: int,
    profile: BookProfile,
    rule: BookRule | None = None,
    sink: Callable[[NDArray[np.void]], object] | None = None,
) -> SimulatedBook:
    """One session of trades and book from `start_e9` (1e-9 points); `sink` gets the mbp-10 records in chunks.

    A chunk (MBP10_DTYPE) is only valid during the call, its memory is used again. Raises ConfigError when seed or start is out of range or
    the price walks off the ladder.
    """
    rule = rule or BookRule()
    _refuse_start(session, instrument, seed, start_e9)
    rng = np.random.Generator(np.random.PCG64([seed, date.fromisoformat(session.key).toordinal(), 1]))
    seconds = (session.close_ns - session.open_ns) // NS
    hours = np.array(
        [
            (t - session.open_ns) // NS
            for t in (session.premarket_open_ns, session.regular_open_ns, session.regular_close_ns)
        ]
    )
    activity = session_activity(seconds, int(hours[0]), int(hours[1]), int(hours[2]))
    level = rule.level
    ticks_per_usd = instrument.spy_dollar_e9 / instrument.tick_e9
    start_tick = round(start_e9 / instrument.tick_e9)
    base_tick = start_tick - _LADDER_TICKS // 2
    rate = activity * rng.gamma(0.6, 1.0 / 0.6, seconds)
    decisions = rng.poisson(rate * profile.book_records / _records_per_decision(profile) / rate.sum())
    decisions[::30] = np.maximum(decisions[::30], 1)
    depth, orders = _first_book(rule.depth_lots, profile.orders_per_level)
    sigma_ticks = level.sigma_usd_per_sqrt_min * np.sqrt(activity / 60.0) * ticks_per_usd
    noise, uniform, walls = rng.standard_normal(seconds), rng.random(seconds), _walls(rng, seconds)
    numbers = np.array(
        [
            level.speed, level.touch, level.drift, level.drift_s, level.tilt, level.tilt_s, level.contact_usd, level.attraction_usd,
            level.attraction, level.refractory_s, level.rest_s, rule.wall, rule.liquidity, rule.liquidity_s, rule.zone_usd, rule.resolve_s,
            rule.depth_lots, rule.depth_lots / profile.orders_per_level, _trade_share(profile), ticks_per_usd,
            1.0 if instrument.is_future else 100.0, instrument.tick_e9,
        ],
        np.float64,
    )  # fmt: skip
    middle = _LADDER_TICKS // 2
    whole = np.zeros(13, np.int64)
    whole[_W_SECOND], whole[_W_EVENT] = 0, -1
    whole[_W_BID], whole[_W_ASK] = middle - 1, middle + 1
    whole[_W_ACTIVE_FROM] = whole[_W_ACTIVE_UNTIL] = -(10**9)
    real = np.zeros(11, np.float64)
    real[_R_LATENT] = middle
    real[_R_HIGH] = real[_R_PM_HIGH] = real[_R_OR_HIGH] = -1.0
    real[_R_LOW] = real[_R_PM_LOW] = real[_R_OR_LOW] = 1e18
    mids = np.empty(seconds * MIDS_PER_S + 1)
    by_second = np.empty(seconds + 1)
    episodes = np.zeros((2000, len(_EPISODE)))
    level_state = np.zeros((4, len(KINDS)))
    level_state[0] = np.nan
    level_state[1] = -1e9
    level_state[2] = np.nan
    rounds = np.zeros((2, 20_000))
    rounds[1] = -1e9
    random_state = rng.integers(0, 2**63, 1).astype(np.uint64)
    book = np.empty((_CHUNK_RECORDS, MBP10_DTYPE.itemsize // 8), np.int64)
    tape = np.empty((_CHUNK_RECORDS, TRADE_DTYPE.itemsize // 8), np.int64)
    kind_logits = np.array(level.kind)
    parts: list[NDArray[np.void]] = []
    total = 0
    while whole[_W_SECOND] < seconds:
        n_book, n_tape = _run(
            book, tape, whole, real, depth, orders, mids, by_second, episodes, level_state, rounds, random_state, sigma_ticks, noise,
            uniform, walls, decisions, hours, kind_logits, numbers, base_tick, session.open_ns, session.close_ns,
        )  # fmt: skip
        if n_book < 0:
            raise ConfigError(
                "the simulated price left the ladder",
                where=f"{instrument.symbol} {session.key}, second {int(whole[_W_SECOND])}",
                expected=f"within {_LADDER_TICKS // 2} ticks of {start_e9 / NS}",
                remedy="lower sigma_usd_per_sqrt_min or drift",
            )
        parts.append(tape[:n_tape].view(TRADE_DTYPE).ravel().copy())
        total += n_book
        if sink is not None:
            sink(book[:n_book].view(MBP10_DTYPE).ravel())
    trades = np.concatenate(parts)
    return SimulatedBook(
        trades=trades,
        truth=_truth(session, rule, episodes),
        mids_e9=(mids + base_tick) * instrument.tick_e9,
        book_records=total,
        last_e9=int(trades["price"][-1]) if len(trades) else start_e9,
    )


def simulate_options(
    session: Session,
    instrument: Instrument,
    seed: int,
    book: SimulatedBook,
    profile: BookProfile,
    rule: BookRule | None = None,
) -> SimulatedOptions:
    """0DTE options on the simulated underlying in regular hours: Black-Scholes at rate 0 around the mid of at most 0.1 s before.

    Strikes are one SPY dollar apart; the price tick is 0.01 SPY dollars; time to expiry runs to the regular close in trading years.
    The ask lies at least a tick above the fair price, so that put-call parity holds at the quotes. Raises ConfigError as `simulate_book`.
    """
    rule = rule or BookRule()
    _refuse_start(session, instrument, seed, _lowest_e9(instrument))
    rng = np.random.Generator(np.random.PCG64([seed, date.fromisoformat(session.key).toordinal(), 2]))
    opens, closes = ((t - session.open_ns) // NS for t in (session.regular_open_ns, session.regular_close_ns))
    usd_e9 = instrument.spy_dollar_e9
    centre = round(float(book.mids_e9[opens * MIDS_PER_S if closes > opens else 0]) / usd_e9)
    strikes_usd = np.arange(max(1, centre - STRIKES_EACH_SIDE), centre + STRIKES_EACH_SIDE + 1)
    symbols = {
        FIRST_OPTION_ID + 2 * i + put: _option_symbol(instrument, session, int(k) * usd_e9, "CP"[put])
        for i, k in enumerate(strikes_usd)
        for put in (0, 1)
    }
    definitions = _definitions(instrument, session, symbols, strikes_usd * usd_e9)
    offset_s = _option_times(rng, session, opens, closes, profile.option_trades)
    n = len(offset_s)
    spot = book.mids_e9[(offset_s * MIDS_PER_S).astype(np.int64)] / usd_e9
    wanted = np.rint(spot + rng.laplace(0.0, 2.0, n)).astype(np.int64)
    at = np.clip(wanted - strikes_usd[0], 0, len(strikes_usd) - 1)
    strike = strikes_usd[at].astype(np.float64)
    put = rng.random(n) > 0.5 + 0.2 * np.sign(strike - spot)
    bid, ask = _quotes(spot, strike, put, closes - offset_s, rule)
    buy = rng.random(n) < 0.5 + _lean(book.truth, session, offset_s, strike, rule)
    event = session.open_ns + (offset_s * 1e9).astype(np.int64)
    receive = np.maximum.accumulate(event + rng.integers(100_000, 400_000, n))
    receive = np.minimum(receive, session.close_ns - 1)
    tick_e9 = usd_e9 // 100
    trades = np.zeros(n, TRADE_DTYPE)
    trades["length"] = TRADE_DTYPE.itemsize // 4
    trades["instrument_id"] = FIRST_OPTION_ID + 2 * at + put
    trades["ts_event"], trades["ts_recv"] = event, receive
    trades["price"] = np.where(buy, ask, bid) * tick_e9
    trades["size"] = rng.geometric(0.25, n)
    trades["action"] = b"T"
    trades["side"] = np.where(buy, b"B", b"A")
    trades["flags"] = _F_LAST
    trades["sequence"] = np.arange(1, n + 1)
    quotes = _quote_records(rng, session, book, trades, bid, ask, strikes_usd, opens, closes, usd_e9, rule)
    return SimulatedOptions(trades, quotes, definitions, symbols)


def write_full_market(
    folder: Path,
    instrument: Instrument,
    sessions: Sequence[Session],
    seed: int,
    profile: str | BookProfile = "small",
    rule: BookRule | None = None,
    start_e9: int | None = None,
) -> list[Path]:
    """Write SIMULATED.json, five DBN files a session and truth.parquet; return the DBN files' paths.

    A session has `<symbol>-YYYYMMDD` as `.trades` and `.mbp-10`, and `<symbol>-opt-YYYYMMDD` as `.trades`, `.cmbp-1` and `.definition`,
    each `.dbn.zst`. `start_e9` is 500 SPY dollars when None. Raises ConfigError unless the sessions rise and seed, profile and rule can be
    simulated, MarketDataError in a folder of real files.
    """
    rule = rule or BookRule()
    profile = profile if isinstance(profile, BookProfile) else profile_named(profile)
    price = 500 * instrument.spy_dollar_e9 if start_e9 is None else start_e9
    keys = refuse_market(folder, sessions)
    _refuse_start(sessions[0], instrument, seed, price)
    mark = {
        "generator": "spymaster_assets.market.simulate_book",
        "seed": seed,
        "instrument": instrument.symbol,
        "profile": asdict(profile),
        "rule": asdict(rule),
    }
    paths: list[Path] = []
    with simulated_folder(folder, mark, keys) as truths:
        for session in sessions:
            made, written = _write_session(folder, instrument, session, seed, price, profile, rule)
            paths += written
            truths.append(made.truth)
            price = next_start(made.last_e9, seed, instrument)
    return paths


def black_scholes(
    spot: NDArray[np.float64],
    strike: NDArray[np.float64],
    put: NDArray[np.bool_],
    years: NDArray[np.float64],
    sigma: NDArray[np.float64],
) -> NDArray[np.float64]:
    """European price at rate 0 without dividends, in the unit of spot and strike; all arguments of one shape."""
    width = sigma * np.sqrt(years)
    d1 = np.log(spot / strike) / width + width / 2
    call = spot * ndtr(d1) - strike * ndtr(d1 - width)
    # Parity instead of a second formula: put and call then agree to the last bit.
    return np.maximum(np.where(put, call - spot + strike, call), np.where(put, strike - spot, spot - strike).clip(0.0))


def _lowest_e9(instrument: Instrument) -> int:
    """A start below this has no room for a book under it."""
    return 2 * _SCAN_TICKS * instrument.tick_e9


def _refuse_start(session: Session, instrument: Instrument, seed: int, start_e9: int) -> None:
    lowest = _lowest_e9(instrument)
    if start_e9 < lowest or seed < 0:
        raise ConfigError(
            "a session cannot be simulated from here",
            where=f"{instrument.symbol} {session.key}: start_e9 = {start_e9}, seed = {seed}",
            expected=f"start_e9 of at least {lowest} and a seed of at least 0",
        )


def _write_session(
    folder: Path,
    instrument: Instrument,
    session: Session,
    seed: int,
    start_e9: int,
    profile: BookProfile,
    rule: BookRule,
) -> tuple[SimulatedBook, list[Path]]:
    day = session.key.replace("-", "")
    stem, options_stem = (f"{instrument.symbol.lower()}-{part}{day}" for part in ("", "opt-"))
    underlying = {_UNDERLYING_ID: raw_symbol(instrument)}
    paths = [folder / f"{stem}.{schema}.dbn.zst" for schema in ("trades", "mbp-10")]
    paths += [folder / f"{options_stem}.{schema}.dbn.zst" for schema in ("trades", "cmbp-1", "definition")]
    with _dbn_file(paths[1], "mbp-10", underlying, session) as write:
        book = simulate_book(session, instrument, seed, start_e9, profile, rule, write)
    options = simulate_options(session, instrument, seed, book, profile, rule)
    for path, schema, symbols, content in (
        (paths[0], "trades", underlying, book.trades),
        (paths[2], "trades", options.symbols, options.trades),
        (paths[3], "cmbp-1", options.symbols, options.quotes),
        (paths[4], "definition", options.symbols, options.definitions),
    ):
        with _dbn_file(path, schema, symbols, session) as write:
            write(content)
    return book, paths


@contextmanager
def _dbn_file(
    path: Path, schema: str, symbols: dict[int, str], session: Session
) -> Iterator[Callable[[NDArray[np.void] | bytes], object]]:
    """A sink of records that become `path` as a whole when the block ends well, and nothing otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as f:
            with zstandard.ZstdCompressor(level=1).stream_writer(f, closefd=False) as stream:
                stream.write(dbn_header(schema, symbols, session))
                yield lambda content: stream.write(
                    content if isinstance(content, bytes) else content.view(np.uint8).data
                )
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _truth(session: Session, rule: BookRule, episodes: NDArray[np.float64]) -> pl.DataFrame:
    breaks, sign = pl.col("breaks"), pl.col("direction_sign")
    side = pl.when(breaks).then(sign).otherwise(-sign).cast(pl.Float64)
    return planted_truth(session, _EPISODE, episodes).with_columns(
        defending_side=pl.when(sign > 0).then(pl.lit("A")).otherwise(pl.lit("B")),
        depth_factor=pl.when(breaks).then(1.0 - rule.liquidity).otherwise(1.0 + rule.liquidity),
        buyer_share=0.5 + rule.level.tilt * side,
        option_buy_share=pl.when(breaks).then(0.5 + rule.lean).otherwise(0.5 - rule.lean),
    )


def _trade_share(profile: BookProfile) -> float:
    """Share of decisions that are market orders, so that trades and book records come in the profile's proportion."""
    ratio = profile.trades / profile.book_records
    return ratio / (_LEVELS_PER_ORDER + ratio - 2.0 * ratio * _LEVELS_PER_ORDER)


def _records_per_decision(profile: BookProfile) -> float:
    share = _trade_share(profile)
    return (1.0 - share) * _SEEN_SHARE + 2.0 * _LEVELS_PER_ORDER * share


def _walls(rng: np.random.Generator, seconds: int) -> NDArray[np.float64]:
    """Log depth factors of bid and ask by second: Ornstein-Uhlenbeck with standard deviation _WALL_STD and memory _WALL_S."""
    keep = np.exp(-1.0 / _WALL_S)
    noise = rng.standard_normal((2, seconds)) * _WALL_STD * np.sqrt(1.0 - keep**2)
    noise[:, 0] = rng.standard_normal(2) * _WALL_STD
    return np.ascontiguousarray(lfilter([1.0], [1.0, -keep], noise, axis=1))


def _first_book(depth_lots: int, orders_per_level: float) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Depth in lots and order counts by side (bid, ask) and ladder tick, even for _FIRST_TICKS on both sides of the middle."""
    depth, orders = (np.zeros((2, _LADDER_TICKS), np.int32) for _ in range(2))
    middle = _LADDER_TICKS // 2
    for side, ticks in enumerate((slice(middle - _FIRST_TICKS, middle), slice(middle + 1, middle + 1 + _FIRST_TICKS))):
        depth[side, ticks] = depth_lots
        orders[side, ticks] = max(1, round(orders_per_level))
    return depth, orders


def _option_symbol(instrument: Instrument, session: Session, strike_e9: int, right: str) -> str:
    """OSI symbol: root padded to six, YYMMDD, C or P, strike x 1000 in eight digits."""
    return f"{instrument.root:<6}{session.key[2:].replace('-', '')}{right}{round(strike_e9 / 1_000_000):08d}"


def _definitions(
    instrument: Instrument, session: Session, symbols: dict[int, str], strikes_e9: NDArray[np.int64]
) -> bytes:
    """InstrumentDefMsg records; expiration is midnight UTC of the day, as OPRA states it."""
    expiration_ns = int(datetime.fromisoformat(session.key).replace(tzinfo=UTC).timestamp()) * NS
    rights = (databento_dbn.InstrumentClass.CALL, databento_dbn.InstrumentClass.PUT)
    return b"".join(
        bytes(
            databento_dbn.InstrumentDefMsg(
                publisher_id=0,
                instrument_id=number,
                ts_event=session.open_ns,
                ts_recv=session.open_ns,
                min_price_increment=instrument.spy_dollar_e9 // 100,
                display_factor=NS,
                raw_symbol=symbol,
                asset=instrument.root,
                security_type="OPT",
                instrument_class=rights[(number - FIRST_OPTION_ID) % 2],  # type: ignore[arg-type]
                security_update_action=databento_dbn.SecurityUpdateAction.ADD,  # type: ignore[arg-type]
                expiration=expiration_ns,
                strike_price=int(strikes_e9[(number - FIRST_OPTION_ID) // 2]),
                underlying_id=_UNDERLYING_ID,
                unit_of_measure_qty=round((instrument.point_value_usd if instrument.is_future else 100.0) * NS),
                contract_multiplier=None if instrument.is_future else 100,
                currency="USD",
                strike_price_currency="USD",
                exchange=DATASET[:4],
                underlying=raw_symbol(instrument),
            )
        )
        for number, symbol in symbols.items()
    )


def _option_times(
    rng: np.random.Generator, session: Session, opens: int, closes: int, target: int
) -> NDArray[np.float64]:
    """Seconds after the session's open of about `target` option trades, sorted, in regular hours."""
    if closes <= opens:
        return np.empty(0)
    seconds = (session.close_ns - session.open_ns) // NS
    rate = session_activity(seconds, opens, opens, closes)[opens:closes] * rng.gamma(0.6, 1.0 / 0.6, closes - opens)
    second = np.repeat(np.arange(opens, closes), rng.poisson(rate * target / rate.sum()))
    return np.sort(second + rng.random(len(second)))


def _lean(
    truth: pl.DataFrame,
    session: Session,
    offset_s: NDArray[np.float64],
    strike_usd: NDArray[np.float64],
    rule: BookRule,
) -> NDArray[np.float64]:
    """What a contact adds to the share of option buyers of each trade; of contacts in reach of one trade the last counts."""
    out = np.zeros(len(offset_s))
    if not truth.height or not len(offset_s):
        return out
    contact_s = (truth["ts_ns"].to_numpy() - session.open_ns) / NS
    last = np.searchsorted(contact_s, offset_s, side="right") - 1
    near = (last >= 0) & (offset_s - contact_s[last] < rule.option_s)
    near &= np.abs(strike_usd - truth["level_price"].to_numpy()[last]) <= rule.option_reach_usd
    return np.where(near, np.where(truth["breaks"].to_numpy()[last], rule.lean, -rule.lean), 0.0)


def _quotes(
    spot_usd: NDArray[np.float64],
    strike_usd: NDArray[np.float64],
    put: NDArray[np.bool_],
    left_s: NDArray[np.float64],
    rule: BookRule,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bid and ask in cents of a SPY dollar: a cent and two percent of the price on each side, the bid at least one cent."""
    percent = 100.0 * np.log(strike_usd / spot_usd)
    sigma = np.maximum(rule.sigma_atm + rule.skew * percent + rule.smile * percent**2, 0.25 * rule.sigma_atm)
    years = np.maximum(left_s, 1.0) / TRADING_YEAR_S
    fair = 100.0 * black_scholes(spot_usd, strike_usd, put, years, sigma)
    half = np.minimum(1.0 + 0.02 * fair, 10.0)
    # A nanocent of slack keeps a fair price that is whole but for rounding from moving the quote by a tick.
    bid = np.maximum(np.floor(fair - half + 1e-7), 1.0).astype(np.int64)
    ask = np.maximum(np.ceil(fair + half - 1e-7), 2.0).astype(np.int64)
    return bid, ask


def _quote_records(
    rng: np.random.Generator,
    session: Session,
    book: SimulatedBook,
    trades: NDArray[np.void],
    bid: NDArray[np.int64],
    ask: NDArray[np.int64],
    strikes_usd: NDArray[np.int64],
    opens: int,
    closes: int,
    usd_e9: int,
    rule: BookRule,
) -> NDArray[np.void]:
    """Before each trade the quote that it hits (action A), then the trade (T); all strikes' quotes every _SNAPSHOT_S."""
    n, tick_e9 = len(trades), usd_e9 // 100
    pairs = np.zeros((n, 2), CMBP1_DTYPE)
    for name in ("instrument_id", "ts_event", "ts_recv", "size", "side", "price"):
        pairs[name] = trades[name][:, None]
    pairs["bid_px_00"], pairs["ask_px_00"] = bid[:, None] * tick_e9, ask[:, None] * tick_e9
    extra = rng.integers(1, 200, (2, n)).astype(np.uint32)
    pairs["bid_sz_00"] = (trades["size"] + extra[0])[:, None]
    pairs["ask_sz_00"] = (trades["size"] + extra[1])[:, None]
    pairs["action"] = np.array([b"A", b"T"])
    # The hit quote rests on the other side of the aggressor.
    pairs["side"][:, 0] = np.where(trades["side"] == b"B", b"A", b"B")
    pairs["size"][:, 0] = np.where(trades["side"] == b"B", pairs["ask_sz_00"][:, 0], pairs["bid_sz_00"][:, 0])
    at_s = np.arange(opens, closes, _SNAPSHOT_S)
    count = 2 * len(strikes_usd)
    all_s = np.repeat(at_s, count)
    strike = np.tile(np.repeat(strikes_usd, 2), len(at_s)).astype(np.float64)
    put = np.tile(np.arange(count) % 2 == 1, len(at_s))
    spot = book.mids_e9[all_s * MIDS_PER_S] / usd_e9
    low, high = _quotes(spot, strike, put, (closes - all_s).astype(np.float64), rule)
    all_quotes = np.zeros(len(all_s), CMBP1_DTYPE)
    all_quotes["instrument_id"] = FIRST_OPTION_ID + np.tile(np.arange(count), len(at_s))
    all_quotes["ts_event"] = session.open_ns + all_s * NS
    all_quotes["ts_recv"] = all_quotes["ts_event"]
    all_quotes["action"], all_quotes["side"] = b"A", b"N"
    all_quotes["price"] = UNDEFINED_PRICE
    all_quotes["bid_px_00"], all_quotes["ask_px_00"] = low * tick_e9, high * tick_e9
    sizes = rng.integers(1, 200, (2, len(all_s)))
    all_quotes["bid_sz_00"], all_quotes["ask_sz_00"] = sizes
    out = np.concatenate([all_quotes, pairs.ravel()])
    out["length"], out["rtype"], out["flags"] = CMBP1_DTYPE.itemsize // 4, _CMBP1_RTYPE, _F_LAST
    out["bid_pb_00"] = out["ask_pb_00"] = 1
    return out[np.argsort(out["ts_recv"], kind="stable")]


@njit(cache=True)
def _random(state):  # type: ignore[no-untyped-def]
    """The next float in [0, 1) of SplitMix64, which stays the same whatever version of a library runs it."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return np.float64(z >> np.uint64(11)) * 1.1102230246251565e-16


@njit(cache=True)
def _geometric(state, mean):  # type: ignore[no-untyped-def]
    """A whole number of at least 1 with about the given mean."""
    if mean <= 1.0:
        return 1
    return 1 + int(np.log(1.0 - _random(state)) / np.log(1.0 - 1.0 / mean))


@njit(cache=True)
def _next_level(depth, start, step):  # type: ignore[no-untyped-def]
    """Ladder tick of the nearest level beyond `start`, or -1 when there is none in reach."""
    p = start + step
    for _ in range(_SCAN_TICKS):
        if depth[p] > 0:
            return p
        p += step
    return -1


@njit(cache=True)
def _record(  # type: ignore[no-untyped-def]
    out, n, ts, receive, sequence, tick, lots, action, side, flags, level, whole, depth, orders, lot, base_tick, tick_e9,
):  # fmt: skip
    """Write one mbp-10 record as 46 little-endian words, the book as it stands."""
    row = out[n]
    row[0] = (_MBP10_BYTES // 4) | (10 << 8) | (_UNDERLYING_ID << 32)
    row[1] = ts
    row[2] = (tick + base_tick) * tick_e9
    row[3] = (lots * lot) | (action << 32) | (side << 40) | (flags << 48) | (level << 56)
    row[4] = receive
    row[5] = 5_000 | (sequence << 32)
    for i in range(2):
        step = 2 * i - 1
        p = whole[_W_BID + i]
        end = p + step * _SEEN_TICKS
        side_depth = depth[i]
        shift = 32 * i
        for k in range(_BOOK_LEVELS):
            while p != end and side_depth[p] == 0:
                p += step
            at = 6 + 4 * k
            if p == end:
                price, size, count = _UNDEFINED_E9, 0, 0
            else:
                price, size, count = (p + base_tick) * tick_e9, side_depth[p] * lot, orders[i, p]
                p += step
            row[at + i] = price
            if i == 0:
                row[at + 2] = size
                row[at + 3] = count
            else:
                row[at + 2] |= size << shift
                row[at + 3] |= count << shift


@njit(cache=True)
def _run(  # type: ignore[no-untyped-def]
    book, tape, whole, real, depth, orders, mids, by_second, episodes, level_state, rounds, random, sigma_ticks, noise, uniform, walls,
    decisions, hours, kind_logit, numbers, base_tick, open_ns, close_ns,
):  # fmt: skip
    """Simulate until a buffer is nearly full or the session ends; return records in `book` and `tape`, or (-1, -1) off the ladder."""
    (
        speed, touch, drift, drift_s, tilt, tilt_s, contact, reach, attraction, refractory_s, rest_s, wall, liquidity, liquidity_s,
        zone_usd, resolve_s, depth_lots, order_lots, trade_share, ticks_per_usd, lot_size, tick,
    ) = numbers  # fmt: skip
    premarket, opens, closes = hours
    lot, tick_e9 = int(lot_size), int(tick)
    kinds = len(kind_logit)
    level, last_contact, last_price, touches = level_state
    round_touches, round_last = rounds
    lowest = max(0, -base_tick) + _SCAN_TICKS + 1
    highest = _LADDER_TICKS - _SCAN_TICKS - 1
    n_book = 0
    n_tape = 0
    seconds = len(sigma_ticks)
    t = whole[_W_SECOND]
    k = whole[_W_EVENT]
    while t < seconds:
        if k < 0:
            mid = (whole[_W_BID] + whole[_W_ASK]) / 2.0
            if not (lowest < min(mid, real[_R_LATENT]) and max(mid, real[_R_LATENT]) < highest):
                whole[_W_SECOND] = t
                return -1, -1
            m = (mid + base_tick) / ticks_per_usd
            by_second[t] = m
            push = 0.0
            damp = 1.0
            whole[_W_BUYERS_E9] = 500_000_000
            if opens <= t < closes:
                level[0] = real[_R_PM_HIGH] if real[_R_PM_HIGH] > 0 else np.nan
                level[1] = real[_R_PM_LOW] if real[_R_PM_LOW] < 1e17 else np.nan
                if t >= opens + 900 and real[_R_OR_HIGH] > 0:
                    level[2], level[3] = real[_R_OR_HIGH], real[_R_OR_LOW]
                if real[_R_HIGH] > 0:
                    level[4], level[5] = real[_R_HIGH], real[_R_LOW]
                if t > opens + 300 and real[_R_WEIGHT] > 0:
                    level[6] = real[_R_WEIGHTED] / real[_R_WEIGHT]
                level[7] = np.round(m)
                if t < whole[_W_ACTIVE_UNTIL]:
                    since = t - whole[_W_ACTIVE_FROM]
                    side = float(whole[_W_ACTIVE_SIDE])
                    if since < resolve_s:
                        push = 0.05 * (real[_R_ACTIVE_LEVEL] - real[_R_LATENT])
                        damp = 0.5
                    else:
                        push = side * drift * sigma_ticks[t] * np.sqrt(480.0) / (drift_s - resolve_s)
                        damp = 0.8
                    share = 0.5 + side * (tilt if since < tilt_s else tilt / 3.0)
                    whole[_W_BUYERS_E9] = int(np.round(share * 1e9))
                elif t >= whole[_W_ACTIVE_UNTIL] + rest_s:
                    best = -1
                    nearest = 1e9
                    for j in range(kinds):
                        gap = abs(m - level[j])
                        if np.isnan(gap) or gap > reach:
                            continue
                        ago = t - (round_last[int(level[j]) % 20_000] if j == kinds - 1 else last_contact[j])
                        if ago < refractory_s and (j == kinds - 1 or abs(level[j] - last_price[j]) < 1.0):
                            continue
                        if gap < nearest:
                            nearest = gap
                            best = j
                    if best >= 0:
                        push = attraction * sigma_ticks[t] * np.sign(level[best] - m) * 0.3
                        # A mid moves by half ticks, so that no grid could be within less than half a tick of a level.
                        if nearest <= max(contact, 0.5 / ticks_per_usd) and t >= opens + 60:
                            sign = 1.0 if by_second[max(0, t - 60)] < level[best] else -1.0
                            usual = sigma_ticks[t] / ticks_per_usd * np.sqrt(600.0)
                            z = sign * (m - by_second[max(0, t - 600)]) / usual
                            slot = int(level[best]) % 20_000
                            earlier = round_touches[slot] if best == kinds - 1 else touches[best]
                            w = sign * (walls[1, t] - walls[0, t])
                            logit = kind_logit[best] + speed * (z - 1.2) + touch * min(earlier, 3.0) - wall * w
                            p_break = 1.0 / (1.0 + np.exp(-logit))
                            breaks = uniform[t] < p_break
                            whole[_W_ACTIVE_SIDE] = int(sign if breaks else -sign)
                            whole[_W_DEFENDER] = 1 if sign > 0 else 0
                            whole[_W_BREAKS] = 1 if breaks else 0
                            whole[_W_ACTIVE_FROM] = t
                            whole[_W_ACTIVE_UNTIL] = t + int(drift_s)
                            whole[_W_BUYERS_E9] = int(np.round((0.5 + whole[_W_ACTIVE_SIDE] * tilt) * 1e9))
                            real[_R_ACTIVE_LEVEL] = level[best] * ticks_per_usd - base_tick
                            if best == kinds - 1:
                                round_touches[slot] += 1
                                round_last[slot] = t
                            else:
                                touches[best] += 1
                                last_contact[best] = t
                                last_price[best] = level[best]
                            count = int(episodes[0, 0]) + 1
                            if count < len(episodes):
                                episodes[0, 0] = count
                                row = episodes[count]
                                row[0], row[1], row[2], row[3], row[4] = t, best, level[best], sign, z
                                row[5], row[6], row[7], row[8] = earlier, w, p_break, 1.0 if breaks else 0.0
            real[_R_NEXT] = real[_R_LATENT] + push + damp * sigma_ticks[t] * noise[t]
            k = 0
        share = whole[_W_BUYERS_E9] / 1e9
        moved = 1.0
        if t - whole[_W_ACTIVE_FROM] < liquidity_s:
            moved = 1.0 - liquidity if whole[_W_BREAKS] == 1 else 1.0 + liquidity
        zone = zone_usd * ticks_per_usd
        n = decisions[t]
        while k < n:
            if max(n_book, n_tape) + _MARGIN_RECORDS > len(book):
                whole[_W_SECOND], whole[_W_EVENT] = t, k
                return n_book, n_tape
            within = (k + _random(random)) / n
            k += 1
            ts = min(open_ns + int((t + within) * 1e9), close_ns - 2_000_000)
            mid = (whole[_W_BID] + whole[_W_ASK]) / 2.0
            tenth = int((t + within) * _MIDS_PER_S)
            while whole[_W_FILLED] <= tenth:
                mids[whole[_W_FILLED]] = mid
                whole[_W_FILLED] += 1
            latent = real[_R_LATENT] + (real[_R_NEXT] - real[_R_LATENT]) * within
            if _random(random) < trade_share:
                i = 1 if _random(random) < share else 0
                step = 2 * i - 1
                left = _geometric(random, 2.2)
                if _random(random) < _SWEEP_SHARE:
                    left *= 12
                for _ in range(_SWEEP_LEVELS):
                    p = whole[_W_BID + i]
                    beyond = _next_level(depth[i], p, step)
                    # A side is never emptied: the book would have no quote to follow the price with.
                    fill = min(left, depth[i, p] if beyond >= 0 else depth[i, p] - 1)
                    if fill <= 0:
                        break
                    whole[_W_RECEIVED] = max(whole[_W_RECEIVED] + 500, ts + 20_000 + int(40_000 * _random(random)))
                    whole[_W_SEQUENCE] += 1
                    _record(
                        book, n_book, ts, whole[_W_RECEIVED], whole[_W_SEQUENCE], p, fill, _TRADE, _BUY if i == 1 else _SELL, 0, 0,
                        whole, depth, orders, lot, base_tick, tick_e9,
                    )  # fmt: skip
                    tape[n_tape] = book[n_book, :6]
                    tape[n_tape, 0] = (_TRADE_BYTES // 4) | (_UNDERLYING_ID << 32)
                    n_book += 1
                    n_tape += 1
                    depth[i, p] -= fill
                    orders[i, p] = max(1, min(orders[i, p] - 1, depth[i, p]))
                    if depth[i, p] == 0:
                        orders[i, p] = 0
                        whole[_W_BID + i] = beyond
                    whole[_W_RECEIVED] += 500
                    whole[_W_SEQUENCE] += 1
                    _record(
                        book, n_book, ts, whole[_W_RECEIVED], whole[_W_SEQUENCE], p, fill, _CANCEL, _SELL if i == 1 else _BUY, _F_LAST, 0,
                        whole, depth, orders, lot, base_tick, tick_e9,
                    )  # fmt: skip
                    n_book += 1
                    usd = (p + base_tick) / ticks_per_usd
                    real[_R_HIGH] = max(real[_R_HIGH], usd)
                    real[_R_LOW] = min(real[_R_LOW], usd)
                    if premarket <= t < opens:
                        real[_R_PM_HIGH] = max(real[_R_PM_HIGH], usd)
                        real[_R_PM_LOW] = min(real[_R_PM_LOW], usd)
                    if opens <= t < closes:
                        real[_R_WEIGHTED] += usd * fill
                        real[_R_WEIGHT] += fill
                        if t < opens + 900:
                            real[_R_OR_HIGH] = max(real[_R_OR_HIGH], usd)
                            real[_R_OR_LOW] = min(real[_R_OR_LOW], usd)
                    left -= fill
                    if left == 0:
                        break
                continue
            i = 1 if _random(random) < 0.5 else 0
            step = 2 * i - 1
            p = whole[_W_BID + i]
            lots = _geometric(random, order_lots)
            add = False
            if step * (p - latent) < _HALF_SPREAD_TICKS - 1.0:
                lots = min(depth[i, p], max(lots, (depth[i, p] + 1) // 2))
            else:
                away = min(int(-np.log(1.0 - _random(random)) * _MEAN_AWAY_TICKS), _MOST_AWAY_TICKS)
                p = int(np.ceil(step * latent + _HALF_SPREAD_TICKS)) * step + step * away
                other = whole[_W_ASK - i]
                if step * (p - other) <= 0:
                    p = other + step
                target = depth_lots * np.exp(walls[i, t]) * (0.7 if away == 0 else 1.0)
                if moved != 1.0 and i == whole[_W_DEFENDER] and abs(p - real[_R_ACTIVE_LEVEL]) <= zone:
                    target *= moved
                now = float(depth[i, p])
                add = _random(random) * (target * target + now * now) < target * target
                lots = lots if add else min(lots, depth[i, p])
            place = 0
            at = whole[_W_BID + i]
            while step * (p - at) > 0 and place < _BOOK_LEVELS:
                if depth[i, at] > 0:
                    place += 1
                at += step
            if add:
                depth[i, p] += lots
                orders[i, p] += 1
                if step * (whole[_W_BID + i] - p) > 0:
                    whole[_W_BID + i] = p
            else:
                if lots == depth[i, p]:
                    if p == whole[_W_BID + i]:
                        beyond = _next_level(depth[i], p, step)
                        if beyond < 0:
                            continue
                        whole[_W_BID + i] = beyond
                    orders[i, p] = 0
                else:
                    orders[i, p] = max(1, min(orders[i, p] - 1, depth[i, p] - lots))
                depth[i, p] -= lots
            if place >= _BOOK_LEVELS or lots == 0:
                continue
            whole[_W_RECEIVED] = max(whole[_W_RECEIVED] + 500, ts + 20_000 + int(40_000 * _random(random)))
            whole[_W_SEQUENCE] += 1
            _record(
                book, n_book, ts, whole[_W_RECEIVED], whole[_W_SEQUENCE], p, lots, _ADD if add else _CANCEL, _SELL if i == 1 else _BUY,
                _F_LAST, place, whole, depth, orders, lot, base_tick, tick_e9,
            )  # fmt: skip
            n_book += 1
        real[_R_LATENT] = real[_R_NEXT]
        t += 1
        k = -1
    while whole[_W_FILLED] < len(mids):
        mids[whole[_W_FILLED]] = (whole[_W_BID] + whole[_W_ASK]) / 2.0
        whole[_W_FILLED] += 1
    whole[_W_SECOND], whole[_W_EVENT] = t, -1
    return n_book, n_tape
