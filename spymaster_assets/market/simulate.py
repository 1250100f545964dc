"""A simulated market: real DBN trade files of a price that levels attract and repel by a known rule.

docs/simulator.md states the rule. Everything comes from one seed: the same call writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import databento_dbn
import numpy as np
import polars as pl
import zstandard
from numba import njit
from numpy.typing import NDArray

from spymaster_assets.errors import ConfigError, MarketDataError
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.dbn import TRADE_DTYPE
from spymaster_assets.market.files import SIMULATED_MARK, scan_folder
from spymaster_assets.market.instruments import Instrument
from spymaster_assets.settings import NS
from spymaster_assets.store import dump_json, write_atomic
from spymaster_assets.tables import parquet_bytes

DATASET = "SIMULATED"
TRUTH = "truth.parquet"
KINDS = ("PM_HIGH", "PM_LOW", "OR_HIGH", "OR_LOW", "SESSION_HIGH", "SESSION_LOW", "VWAP", "ROUND")
_INSTRUMENT_ID = 1
_EPISODE = (
    "second", "kind", "level_price", "direction_sign", "approach_z", "earlier_touches", "p_break", "breaks",
)  # fmt: skip


@dataclass(frozen=True)
class LevelRule:
    """The planted truth. Prices in SPY dollars, times in seconds.

    At contact p_break = sigmoid(kind + speed x (z - 1.2) + touch x earlier touches, at most 3), where z is the move toward the level
    over ten minutes in its own standard deviations. The drawn side then drifts `drift` x sigma x sqrt(8 min) in `drift_s`, and the share of
    buyers is tilted to it: by `tilt` for `tilt_s`, by a third of that until the drift ends. Then levels rest for `rest_s`.
    """

    kind: tuple[float, ...] = (-2.0, -2.0, -1.6, -1.6, -1.8, -1.8, 1.2, 0.8)
    speed: float = 1.0
    touch: float = 0.5
    drift: float = 2.4
    drift_s: int = 540
    tilt: float = 0.3
    tilt_s: int = 90
    contact_usd: float = 0.03
    attraction_usd: float = 0.30
    attraction: float = 0.25
    refractory_s: int = 1500
    rest_s: int = 600
    sigma_usd_per_sqrt_min: float = 0.19
    trades_per_session: int = 40_000

    def __post_init__(self) -> None:
        """Raise ConfigError when the rule cannot be walked."""
        positive = (
            "drift_s",
            "tilt_s",
            "sigma_usd_per_sqrt_min",
            "contact_usd",
            "attraction_usd",
            "trades_per_session",
        )
        wrong = [f"{name} = {getattr(self, name)}" for name in positive if not getattr(self, name) > 0]
        if len(self.kind) != len(KINDS):
            wrong.append(f"kind has {len(self.kind)} logits")
        if not 0.0 <= self.tilt <= 0.5:
            wrong.append(f"tilt = {self.tilt}")
        if wrong:
            raise ConfigError(
                f"the rule cannot be simulated: {'; '.join(wrong)}",
                where="LevelRule",
                expected=f"{len(KINDS)} logits, one for each of {', '.join(KINDS)}; tilt in [0, 0.5]; the rest above 0",
            )


@dataclass(frozen=True)
class SimulatedSession:
    """Trades (TRADE_DTYPE), the planted episodes, and the last price in 1e-9 points."""

    records: NDArray[np.void]
    truth: pl.DataFrame
    last_e9: int


def simulate_session(
    session: Session, instrument: Instrument, seed: int, start_e9: int, rule: LevelRule | None = None
) -> SimulatedSession:
    """One session of trades from `start_e9` (1e-9 points), in receive order, all inside the session and on the tick grid.

    Raises ConfigError when the price or the seed is out of range.
    """
    rule = rule or LevelRule()
    if start_e9 <= 0 or seed < 0:
        raise ConfigError(
            "a session cannot be simulated from here",
            where=f"{instrument.symbol} {session.key}: start_e9 = {start_e9}, seed = {seed}",
            expected="start_e9 above 0 and a seed of at least 0",
        )
    rng = np.random.Generator(np.random.PCG64([seed, date.fromisoformat(session.key).toordinal()]))
    seconds = (session.close_ns - session.open_ns) // NS
    opens = (session.regular_open_ns - session.open_ns) // NS
    closes = (session.regular_close_ns - session.open_ns) // NS
    premarket = (session.premarket_open_ns - session.open_ns) // NS
    activity = session_activity(seconds, premarket, opens, closes)
    sigma = rule.sigma_usd_per_sqrt_min * np.sqrt(activity / 60.0)
    dollar = float(instrument.spy_dollar_e9)
    price, buyers, episodes = _walk(
        start_e9 / dollar,
        sigma,
        rng.standard_normal(seconds),
        rng.random(seconds),
        activity,
        premarket,
        opens,
        closes,
        np.array(rule.kind),
        rule.speed,
        rule.touch,
        rule.drift,
        rule.drift_s,
        rule.tilt,
        rule.tilt_s,
        rule.contact_usd,
        rule.attraction_usd,
        rule.attraction,
        rule.refractory_s,
        rule.rest_s,
    )
    records = _trades(price, buyers, activity, session, instrument, rule.trades_per_session, rng)
    return SimulatedSession(records, planted_truth(session, _EPISODE, episodes), int(records["price"][-1]))


def planted_truth(session: Session, columns: Sequence[str], episodes: NDArray[np.float64]) -> pl.DataFrame:
    """A row a contact from the (m, len(columns)) episodes that a kernel wrote, of which row 0 holds their count."""
    rows = episodes[1 : int(episodes[0, 0]) + 1]
    values = dict(zip(columns, rows.T, strict=True))
    at_s, kind = values.pop("second").astype(np.int64), values.pop("kind").astype(np.int64)
    return pl.DataFrame(
        {
            "session": pl.Series([session.key] * len(rows), dtype=pl.String),
            "ts_ns": session.open_ns + at_s * NS,
            "level_kind_name": pl.Series([KINDS[k] for k in kind], dtype=pl.String),
            **values,
        }
    ).with_columns(
        pl.col("direction_sign").cast(pl.Int8), pl.col("earlier_touches").cast(pl.Int32), pl.col("breaks") > 0
    )


def write_market(
    folder: Path,
    instrument: Instrument,
    sessions: Sequence[Session],
    seed: int = 7,
    start_e9: int | None = None,
    rule: LevelRule | None = None,
) -> list[Path]:
    """Write one `.trades.dbn.zst` a session, SIMULATED.json and truth.parquet; return the DBN files' paths.

    `start_e9` is 500 SPY dollars when None. Raises ConfigError unless the sessions rise, MarketDataError in a folder of real files.
    """
    rule = rule or LevelRule()
    keys = refuse_market(folder, sessions)
    mark = {
        "generator": "spymaster_assets.market.simulate",
        "seed": seed,
        "instrument": instrument.symbol,
        "rule": asdict(rule),
    }
    price = 500 * instrument.spy_dollar_e9 if start_e9 is None else start_e9
    paths = []
    with simulated_folder(folder, mark, keys) as truths:
        for session in sessions:
            made = simulate_session(session, instrument, seed, price, rule)
            path = folder / f"{instrument.symbol.lower()}-{session.key.replace('-', '')}.trades.dbn.zst"
            write_atomic(path, encode_dbn(made.records, raw_symbol(instrument), session))
            paths.append(path)
            truths.append(made.truth)
            price = next_start(made.last_e9, seed, instrument)
    return paths


@contextmanager
def simulated_folder(folder: Path, mark: Mapping[str, object], sessions: Sequence[str]) -> Iterator[list[pl.DataFrame]]:
    """SIMULATED.json with `mark`; when the block ends well the truths that it appended are truth.parquet and the sessions are marked."""
    # An interrupted run must leave its files marked as simulated, yet not as a complete market.
    write_atomic(folder / SIMULATED_MARK, dump_json({**mark, "sessions": []}))
    truths: list[pl.DataFrame] = []
    yield truths
    write_atomic(folder / TRUTH, parquet_bytes(pl.concat(truths), statistics=True))
    write_atomic(folder / SIMULATED_MARK, dump_json({**mark, "sessions": sessions}))


def read_mark(folder: Path) -> dict[str, object] | None:
    """Contents of SIMULATED.json, or None when the folder is not simulated."""
    path = folder / SIMULATED_MARK
    return json.loads(path.read_text()) if path.is_file() else None


def refuse_market(folder: Path, sessions: Sequence[Session]) -> list[str]:
    """Keys of the sessions; raise ConfigError unless they rise, MarketDataError when the folder holds files that are not simulated."""
    keys = [s.key for s in sessions]
    if not keys or any(a >= b for a, b in pairwise(keys)):
        raise ConfigError(
            "these sessions cannot be simulated", where=", ".join(keys[:8]), expected="one or more, rising, each once"
        )
    real = [e.name for e in scan_folder(folder) if e.header.dataset != DATASET] if folder.is_dir() else []
    if real:
        raise MarketDataError(
            f"the folder holds {len(real)} DBN files that were not simulated",
            where=f"{folder}: {', '.join(real[:4])}",
            expected="a folder without real market data",
            remedy="choose another folder",
        )
    return keys


def next_start(last_e9: int, seed: int, instrument: Instrument) -> int:
    """Start of the session after one that ended at `last_e9`: an overnight gap of 0.3% standard deviation, on the tick grid."""
    gap = np.random.Generator(np.random.PCG64([seed, last_e9])).normal(0.0, 0.003)
    return round(last_e9 * (1.0 + gap) / instrument.tick_e9) * instrument.tick_e9


def dbn_header(schema: str, symbols: Mapping[int, str], session: Session) -> bytes:
    """DBN v3 header of a simulated file: `symbols` maps instrument id to raw symbol, the stated range is the session."""
    first = datetime.fromtimestamp(session.open_ns / NS, UTC).date()
    last = datetime.fromtimestamp(session.close_ns / NS, UTC).date() + timedelta(days=1)
    mappings = [
        SimpleNamespace(
            raw_symbol=name, intervals=[SimpleNamespace(start_date=first, end_date=last, symbol=str(number))]
        )
        for number, name in symbols.items()
    ]
    return bytes(
        databento_dbn.Metadata(
            dataset=DATASET,
            start=session.open_ns,
            end=session.close_ns,
            stype_in=databento_dbn.SType.RAW_SYMBOL,  # type: ignore[arg-type]  # the stubs call enum members strings
            stype_out=databento_dbn.SType.INSTRUMENT_ID,  # type: ignore[arg-type]
            schema=databento_dbn.Schema.from_str(schema),
            symbols=list(symbols.values()),
            partial=[],
            not_found=[],
            mappings=mappings,
            version=3,
        ).encode()
    )


def encode_dbn(records: NDArray[np.void], raw_symbol: str, session: Session) -> bytes:
    """A zstd-compressed DBN v3 `trades` file of one instrument; the stated range is the session."""
    header = dbn_header("trades", {_INSTRUMENT_ID: raw_symbol}, session)
    return zstandard.ZstdCompressor(level=3).compress(header + records.tobytes())


def raw_symbol(instrument: Instrument) -> str:
    """Raw symbol of the simulated underlying: the stock's, or the future's December 2029 contract."""
    return f"{instrument.root}Z9" if instrument.is_future else instrument.symbol


def session_activity(seconds: int, premarket: int, opens: int, closes: int) -> NDArray[np.float64]:
    """Relative variance by second of the session (bounds in seconds after its open): U-shaped in regular hours with mean 1, else quiet."""
    at = np.arange(seconds, dtype=np.float64)
    out = np.full(seconds, 0.06)
    out[(at >= premarket) & (at < opens)] = 0.12
    if closes > opens:
        x = (at[opens:closes] - opens) / (closes - opens)
        shape = 0.7 + 1.6 * np.exp(-x / 0.08) + 0.8 * np.exp(-(1 - x) / 0.06)
        out[opens:closes] = shape / shape.mean()
    return out


@njit(cache=True)
def _walk(  # type: ignore[no-untyped-def]
    start, sigma, noise, uniform, activity, premarket, opens, closes, kind_logit, speed, touch, drift, drift_s, tilt, tilt_s,
    contact, reach, attraction, refractory_s, rest_s,
):  # fmt: skip
    """Price at each second, share of buyers, and episodes [second, kind, level, sign, z, touches, p_break, breaks]; row 0 counts them."""
    n = len(sigma)
    kinds = len(kind_logit)
    price = np.empty(n + 1)
    buyers = np.full(n, 0.5)
    episodes = np.zeros((2000, 8))
    price[0] = start
    level = np.full(kinds, np.nan)
    last_contact = np.full(kinds, -(10**9))
    last_price = np.full(kinds, np.nan)
    touches = np.zeros(kinds, np.int64)
    round_touches = np.zeros(20_000, np.int64)
    round_last = np.full(20_000, -(10**9))
    high = start
    low = start
    pm_high, pm_low = -1.0, 1e18
    or_high, or_low = -1.0, 1e18
    weighted = 0.0
    weight = 0.0
    active_until = -(10**9)
    active_from = -(10**9)
    side = 0.0
    for t in range(n):
        x = price[t]
        push = 0.0
        damp = 1.0
        if opens <= t < closes:
            weighted += x * activity[t]
            weight += activity[t]
            level[0] = pm_high if pm_high > 0 else np.nan
            level[1] = pm_low if pm_low < 1e17 else np.nan
            if t >= opens + 900:
                level[2], level[3] = or_high, or_low
            level[4], level[5] = high, low
            level[6] = weighted / weight if t > opens + 300 else np.nan
            level[7] = np.round(x)
            if t < active_until:
                push = side * drift * sigma[t] * np.sqrt(60.0) * np.sqrt(8.0) / drift_s
                damp = 0.8
                buyers[t] = 0.5 + side * (tilt if t - active_from < tilt_s else tilt / 3.0)
            elif t >= active_until + rest_s:
                best = -1
                nearest = 1e9
                for k in range(kinds):
                    gap = abs(x - level[k])
                    if np.isnan(gap) or gap > reach:
                        continue
                    since = t - (round_last[int(level[k]) % 20_000] if k == kinds - 1 else last_contact[k])
                    if since < refractory_s and (k == kinds - 1 or abs(level[k] - last_price[k]) < 1.0):
                        continue
                    if gap < nearest:
                        nearest = gap
                        best = k
                if best >= 0:
                    push = attraction * sigma[t] * np.sign(level[best] - x) * 0.3
                    before = price[max(0, t - 60)]
                    sign = 1.0 if before < level[best] else -1.0
                    if nearest <= contact and t >= opens + 60:
                        z = sign * (x - price[max(0, t - 600)]) / (sigma[t] * np.sqrt(600.0))
                        slot = int(level[best]) % 20_000
                        earlier = round_touches[slot] if best == kinds - 1 else touches[best]
                        logit = kind_logit[best] + speed * (z - 1.2) + touch * min(earlier, 3)
                        p = 1.0 / (1.0 + np.exp(-logit))
                        breaks = uniform[t] < p
                        side = sign if breaks else -sign
                        active_from = t
                        active_until = t + drift_s
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
                            row[0], row[1], row[2], row[3] = t, best, level[best], sign
                            row[4], row[5], row[6], row[7] = z, earlier, p, 1.0 if breaks else 0.0
        price[t + 1] = x + push + damp * sigma[t] * noise[t]
        high = max(high, x)
        low = min(low, x)
        if premarket <= t < opens:
            pm_high = max(pm_high, x)
            pm_low = min(pm_low, x)
        if opens <= t < opens + 900:
            or_high = max(or_high, x)
            or_low = min(or_low, x)
    return price, buyers, episodes


def _trades(
    price: NDArray[np.float64],
    buyers: NDArray[np.float64],
    activity: NDArray[np.float64],
    session: Session,
    instrument: Instrument,
    target: int,
    rng: np.random.Generator,
) -> NDArray[np.void]:
    """Trades of a path: bursts of Poisson arrivals, at the bid or the offer one tick apart, on the grid."""
    seconds = len(activity)
    bursts = rng.gamma(0.6, 1.0 / 0.6, seconds)
    rate = activity * bursts
    counts = rng.poisson(rate * target / rate.sum())
    counts[::30] = np.maximum(counts[::30], 1)
    second = np.repeat(np.arange(seconds), counts)
    n = len(second)
    fraction = rng.random(n)
    offset = np.sort(second + fraction)
    second = offset.astype(np.int64)
    mid = price[second] + (price[second + 1] - price[second]) * (offset - second)
    buy = rng.random(n) < buyers[second]
    ticks = np.rint(mid * instrument.spy_dollar_e9 / instrument.tick_e9 + np.where(buy, 0.5, -0.5)).astype(np.int64)
    event = session.open_ns + (offset * 1e9).astype(np.int64)
    receive = np.maximum.accumulate(event + rng.integers(20_000, 60_000, n))
    receive = np.minimum(receive, session.close_ns - 1)
    lot = 1 if instrument.is_future else 100
    records = np.zeros(n, TRADE_DTYPE)
    records["length"] = TRADE_DTYPE.itemsize // 4
    records["instrument_id"] = _INSTRUMENT_ID
    records["ts_event"] = event
    records["ts_recv"] = receive
    records["ts_in_delta"] = 5_000
    records["price"] = ticks * instrument.tick_e9
    records["size"] = lot * rng.geometric(0.45, n)
    records["action"] = b"T"
    records["side"] = np.where(buy, b"B", b"A")
    records["sequence"] = np.arange(1, n + 1)
    return records
