"""The simulated book: files agree with one another record by record, and the planted rule can be read back out of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import databento
import databento_dbn
import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from spymaster_assets.errors import ConfigError, MarketDataError
from spymaster_assets.market import simulate_book as module
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.dbn import TRADE_DTYPE, UNDEFINED_PRICE
from spymaster_assets.market.files import SIMULATED_MARK, covers, register_session, scan_folder
from spymaster_assets.market.instruments import Instrument, instrument
from spymaster_assets.market.simulate import DATASET, KINDS, TRUTH, LevelRule, read_mark
from spymaster_assets.market.simulate_book import (
    CMBP1_DTYPE,
    MBP10_DTYPE,
    PROFILES,
    BookProfile,
    BookRule,
    SimulatedBook,
    SimulatedOptions,
    black_scholes,
    profile_named,
    simulate_book,
    simulate_options,
    write_full_market,
)
from spymaster_assets.settings import NS
from spymaster_assets_tests.builders import CALENDARS, dbn_bytes, session_of, trades

SPY, ES = instrument("SPY"), instrument("ES")
SMALL = PROFILES["small"]
KEYS = CALENDARS["SPY"].sessions("2024-02-01", "2024-02-02")
RULE = BookRule()


@dataclass(frozen=True)
class Made:
    """One simulated session with its whole book."""

    session: Session
    profile: Instrument
    book: SimulatedBook
    options: SimulatedOptions
    records: NDArray[np.void]


def make(symbol: str, key: str, seed: int = 5, rule: BookRule = RULE, amount: BookProfile = SMALL) -> Made:
    profile, session = instrument(symbol), session_of(symbol, key)
    chunks: list[NDArray[np.void]] = []
    book = simulate_book(
        session, profile, seed, 500 * profile.spy_dollar_e9, amount, rule, lambda chunk: chunks.append(chunk.copy())
    )
    return Made(
        session, profile, book, simulate_options(session, profile, seed, book, amount, rule), np.concatenate(chunks)
    )


def column(records: NDArray[np.void], name: str) -> NDArray[np.int64]:
    """Ten levels of one book field, int64 [records, 10]; the undefined price stays."""
    return np.stack([records[f"{name}_{level:02d}"].astype(np.int64) for level in range(10)], axis=1)


@pytest.fixture(scope="module", params=[("SPY", "2024-02-01"), ("SPY", "2024-07-03"), ("ES", "2024-11-29")])
def made(request: pytest.FixtureRequest) -> Made:
    return make(*request.param)


@pytest.fixture(scope="module")
def many() -> list[Made]:
    return [at_contacts(make("ES", key)) for key in CALENDARS["ES"].sessions("2024-02-01", "2024-02-23")]


@pytest.fixture(scope="module")
def many_silent() -> list[Made]:
    keys = CALENDARS["ES"].sessions("2024-02-01", "2024-02-23")
    return [at_contacts(make("ES", key, rule=RULE.silent())) for key in keys]


def at_contacts(made: Made) -> Made:
    """The session with the book of each contact and of a minute later only; all of it for a month is two gigabytes."""
    wanted = made.book.truth["ts_ns"].to_numpy()[:, None] + np.array([0, 60 * NS])
    at = np.searchsorted(made.records["ts_event"].astype(np.int64), wanted) - 1
    return replace(made, records=made.records[np.unique(at)])


def write(folder: Path, seed: int = 7) -> list[Path]:
    return write_full_market(folder, SPY, [session_of("SPY", k) for k in KEYS], seed, SMALL.scaled(0.2))


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write(tmp_path / name, seed)
    a, b, c = (content(tmp_path / n) for n in "abc")
    assert a == b
    assert list(a) == list(c)
    assert all(a[name] != c[name] for name in a if "definition" not in name)
    assert list(a) == [
        SIMULATED_MARK,
        *[
            f"spy-{part}{day}.{schema}.dbn.zst"
            for day, part, schemas in (
                ("20240201", "", ("mbp-10", "trades")),
                ("20240202", "", ("mbp-10", "trades")),
                ("20240201", "opt-", ("cmbp-1", "definition", "trades")),
                ("20240202", "opt-", ("cmbp-1", "definition", "trades")),
            )
            for schema in schemas
        ],
        TRUTH,
    ]


def test_chunks_of_any_length_make_the_same_session(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make("SPY", KEYS[0], amount=SMALL.scaled(0.1))
    monkeypatch.setattr(module, "_CHUNK_RECORDS", 17)
    cut = make("SPY", KEYS[0], amount=SMALL.scaled(0.1))
    assert np.array_equal(whole.records, cut.records)
    assert np.array_equal(whole.book.trades, cut.book.trades)
    assert np.array_equal(whole.book.mids_e9, cut.book.mids_e9)
    assert whole.book.truth.equals(cut.book.truth)


def test_databento_reads_every_file(tmp_path: Path) -> None:
    paths = write(tmp_path)
    session = session_of("SPY", KEYS[0])
    chunks: list[NDArray[np.void]] = []
    few = SMALL.scaled(0.2)
    book = simulate_book(session, SPY, 7, 500 * NS, few, RULE, lambda c: chunks.append(c.copy()))
    options = simulate_options(session, SPY, 7, book, few, RULE)
    expected = {
        ("trades", ""): book.trades,
        ("mbp-10", ""): np.concatenate(chunks),
        ("trades", "opt-"): options.trades,
        ("cmbp-1", "opt-"): options.quotes,
    }
    for path in paths[:5]:
        store = databento.DBNStore.from_file(path)
        found = store.to_ndarray()
        assert (store.dataset, store.metadata.version) == (DATASET, 3)
        assert f".{store.schema}." in path.name
        assert (store.metadata.start, store.metadata.end) == (session.open_ns, session.close_ns)
        if str(store.schema) == "definition":
            assert len(found) == len(options.symbols) == 102
            continue
        wanted = expected[(str(store.schema), "opt-" if "-opt-" in path.name else "")]
        assert len(found) == len(wanted)
        for name in wanted.dtype.names or ():
            if not name.startswith("_"):
                assert np.array_equal(found[name], wanted[name]), (path.name, name)
        names = set(store.to_df()["symbol"])
        assert names <= (set(options.symbols.values()) if "-opt-" in path.name else {"SPY"})
    mark = read_mark(tmp_path)
    assert mark is not None
    assert (mark["sessions"], mark["seed"], mark["generator"]) == (KEYS, 7, "spymaster_assets.market.simulate_book")
    truth = pl.read_parquet(tmp_path / TRUTH)
    assert truth.filter(pl.col("session") == KEYS[0]).equals(book.truth)
    assert set(truth["session"]) == set(KEYS)


@pytest.mark.parametrize("symbol", ["SPY", "ES"])
def test_the_pipeline_registers_the_underlying_alone(tmp_path: Path, symbol: str) -> None:
    session = session_of(symbol, KEYS[0])
    write_full_market(tmp_path, instrument(symbol), [session], 1, "small")
    entries = scan_folder(tmp_path)
    assert covers(entries, session, instrument(symbol))
    found = register_session(entries, CALENDARS[symbol], instrument(symbol), KEYS[0], None)
    assert found.simulated
    assert [c.raw_symbol for c in found.contracts] == ["ESZ9" if symbol == "ES" else "SPY"]
    assert found.front_id == 1
    assert found.coverage_regular == 1.0


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (MBP10_DTYPE, databento_dbn.MBP10Msg),
        (CMBP1_DTYPE, databento_dbn.CMBP1Msg),
        (TRADE_DTYPE, databento_dbn.TradeMsg),
    ],
)
def test_layouts_are_databentos(dtype: np.dtype, message: Any) -> None:
    assert dtype == np.dtype(message._dtypes)
    assert dtype.itemsize == message.size_hint


def test_order_of_the_feed(made: Made) -> None:
    session = made.session
    for records in (made.records, made.book.trades, made.options.trades, made.options.quotes):
        received, happened = (records[n].astype(np.int64) for n in ("ts_recv", "ts_event"))
        assert (np.diff(received) >= 0).all()
        assert (happened >= session.open_ns).all()
        assert (received < session.close_ns).all()
        assert (received >= happened).all()
    for records in (made.records, made.book.trades):
        assert (np.diff(records["sequence"].astype(np.int64)) > 0).all()
        assert (np.diff(records["ts_event"].astype(np.int64)) >= 0).all()
    counts = len(made.book.trades), len(made.records), len(made.options.trades)
    for found, wanted in zip(counts, (SMALL.trades, SMALL.book_records, SMALL.option_trades), strict=True):
        assert found == pytest.approx(wanted, rel=0.1)
    assert made.book.book_records == len(made.records)


def test_the_book_is_never_crossed_and_every_level_is_in_place(made: Made) -> None:
    bid, ask = column(made.records, "bid_px"), column(made.records, "ask_px")
    assert (bid[:, 0] < ask[:, 0]).all()
    for px, sign, side in ((bid, -1, "bid"), (ask, 1, "ask")):
        here = px != UNDEFINED_PRICE
        assert here[:, 0].all()
        assert here[:, 1:][~here[:, :-1]].sum() == 0, "an absent level is followed by none"
        assert (np.where(here[:, 1:], sign * (px[:, 1:] - px[:, :-1]), 1) > 0).all()
        assert (px[here] % made.profile.tick_e9 == 0).all()
        size, orders = column(made.records, f"{side}_sz"), column(made.records, f"{side}_ct")
        assert ((size > 0) == here).all()
        assert ((orders > 0) == here).all()
        lot = 1 if made.profile.is_future else 100
        assert (size % lot == 0).all()
        assert (orders * lot <= size).all()


def test_every_trade_is_at_the_quote_that_the_book_shows(made: Made) -> None:
    records, tape = made.records, made.book.trades
    at = np.flatnonzero(records["action"] == b"T")
    printed = records[at]
    for name in TRADE_DTYPE.names or ():
        if name not in ("length", "rtype"):
            assert np.array_equal(printed[name], tape[name]), name
    buy = printed["side"] == b"B"
    assert (printed["price"] == np.where(buy, printed["ask_px_00"], printed["bid_px_00"])).all()
    assert (printed["size"] <= np.where(buy, printed["ask_sz_00"], printed["bid_sz_00"])).all()
    before, after = records[at[at > 0] - 1], records[at + 1]
    for name in MBP10_DTYPE.names or ():
        if name[:3] in ("bid", "ask"):
            assert np.array_equal(before[name], records[at[at > 0]][name]), name
    assert (after["action"] == b"C").all()
    assert (after["side"] == np.where(buy, b"A", b"B")).all()
    for name in ("price", "size", "ts_event"):
        assert np.array_equal(after[name], printed[name]), name


def test_the_book_changes_by_its_events_and_by_nothing_else(made: Made) -> None:
    records = made.records[:30_000]
    touched = (records["side"] == b"A")[1:]
    quiet = (records["action"] == b"T")[1:]
    signed = np.where(records["action"] == b"A", 1, -1)[1:] * records["size"][1:].astype(np.int64)
    price = records["price"][1:]
    for side, mine in (("bid", ~touched), ("ask", touched)):
        px, size = column(records, f"{side}_px"), column(records, f"{side}_sz")
        same = (px[1:] == px[:-1]).all(1) & (size[1:] == size[:-1]).all(1)
        assert same[~mine | quiet].all()
        for i in np.flatnonzero(mine & ~quiet):
            old, new = (dict(zip(px[j], size[j], strict=True)) for j in (i, i + 1))
            step = old.pop(price[i], 0) + signed[i]
            assert new.pop(price[i], 0) == step, i
            # Levels enter and leave at the far end only; the nine that both show are equal.
            for p in old.keys() & new.keys():
                assert old[p] == new[p], i
            assert len(old.keys() & new.keys()) >= 9, i


def test_large_orders_sweep_level_after_level(made: Made) -> None:
    tape = made.book.trades
    together = np.flatnonzero(np.diff(tape["ts_event"].astype(np.int64)) == 0)
    assert len(together) > 50
    assert (tape["side"][together] == tape["side"][together + 1]).all()
    step = tape["price"][together + 1] - tape["price"][together]
    assert (np.where(tape["side"][together] == b"B", step, -step) > 0).all()


def test_levels_are_read_off_the_trades(many: list[Made]) -> None:
    assert set(pl.concat([m.book.truth for m in many])["level_kind_name"]) == set(KINDS)
    for made in many:
        tape, session, usd = made.book.trades, made.session, made.profile.spy_dollar_e9
        times, price = tape["ts_event"].astype(np.int64), tape["price"] / usd
        early = (times >= session.premarket_open_ns) & (times < session.regular_open_ns)
        opening = (times >= session.regular_open_ns) & (times < session.regular_open_ns + 900 * NS)
        for row in made.book.truth.iter_rows(named=True):
            ts, kind = row["ts_ns"], row["level_kind_name"]
            before = times < ts
            regular = before & (times >= session.regular_open_ns)
            chosen = {"PM": early, "OR": opening, "SESSION": before}.get(kind.split("_")[0])
            if kind == "VWAP":
                expected = np.average(price[regular], weights=tape["size"][regular])
            elif chosen is None:
                expected = float(round(row["level_price"]))
            else:
                expected = price[chosen].max() if kind.endswith("HIGH") else price[chosen].min()
            assert row["level_price"] == pytest.approx(expected, abs=1e-9), (kind, ts)
            assert session.regular_open_ns + 60 * NS <= ts < session.regular_close_ns
            mid = made.book.mids_e9[(ts - session.open_ns) * module.MIDS_PER_S // NS] / usd
            assert abs(mid - row["level_price"]) <= RULE.level.contact_usd + 1e-9


def test_mids_are_the_books(made: Made) -> None:
    grid_ns = made.session.open_ns + np.arange(len(made.book.mids_e9)) * NS // module.MIDS_PER_S
    before = np.searchsorted(made.records["ts_event"].astype(np.int64), grid_ns) - 1
    mids = (made.records["bid_px_00"] + made.records["ask_px_00"]) / 2
    known = np.flatnonzero(before >= 0)
    # The last record at a time may be a trade, which shows the book before it; its cancellation follows at the same time.
    assert np.array_equal(made.book.mids_e9[known], mids[before[known]])


def test_options_are_free_of_arbitrage(made: Made) -> None:
    options, usd = made.options, made.profile.spy_dollar_e9
    quotes = options.quotes
    strike, put = contract_of(options, quotes["instrument_id"], made.profile)
    spot = spot_at(made, quotes["ts_event"])
    bid, ask = quotes["bid_px_00"] / usd, quotes["ask_px_00"] / usd
    intrinsic = np.where(put, strike - spot, spot - strike).clip(0)
    assert (bid >= 0.01 - 1e-9).all()
    assert (ask - bid >= 0.01 - 1e-9).all()
    assert (ask >= intrinsic - 1e-9).all()
    assert (bid <= np.where(put, strike, spot)).all()
    assert (np.abs(quotes["bid_px_00"]) % (usd // 100) == 0).all()
    everything = quotes[(quotes["side"] == b"N")].reshape(-1, 51, 2)
    assert len(everything) == made.session.regular_minutes * 2
    low, high = everything["bid_px_00"] / usd, everything["ask_px_00"] / usd
    forward = spot_at(made, everything["ts_event"][:, :, 0]) - contract_of(
        options, everything["instrument_id"][:, :, 0].ravel(), made.profile
    )[0].reshape(-1, 51)
    assert (low[:, :, 0] - high[:, :, 1] <= forward + 1e-9).all()
    assert (high[:, :, 0] - low[:, :, 1] >= forward - 1e-9).all()
    # A call spread costs between nothing and the distance of its strikes, at quotes that can be traded.
    assert (low[:, 1:, 0] <= high[:, :-1, 0] + 1e-9).all()
    assert (low[:, :-1, 0] - high[:, 1:, 0] <= 1 + 1e-9).all()


def test_option_trades_are_at_their_quotes(made: Made) -> None:
    quotes, tape = made.options.quotes, made.options.trades
    at = np.flatnonzero(quotes["action"] == b"T")
    printed = quotes[at]
    for name in ("instrument_id", "ts_event", "ts_recv", "price", "size", "side"):
        assert np.array_equal(printed[name], tape[name]), name
    assert (printed["price"] == np.where(printed["side"] == b"B", printed["ask_px_00"], printed["bid_px_00"])).all()
    assert (printed["size"] <= np.where(printed["side"] == b"B", printed["ask_sz_00"], printed["bid_sz_00"])).all()
    before = quotes[at - 1]
    for name in ("instrument_id", "bid_px_00", "ask_px_00", "bid_sz_00", "ask_sz_00"):
        assert np.array_equal(before[name], printed[name]), name
    times = tape["ts_event"].astype(np.int64)
    assert (times >= made.session.regular_open_ns).all()
    assert (times < made.session.regular_close_ns).all()


def test_definitions_name_every_option(tmp_path: Path) -> None:
    path = write(tmp_path)[4]
    found = databento.DBNStore.from_file(path).to_ndarray()
    session = session_of("SPY", KEYS[0])
    options = {int(r["instrument_id"]): r["raw_symbol"].decode() for r in found}
    assert len(options) == 102
    for row in found:
        symbol = row["raw_symbol"].decode()
        assert symbol[:12] == "SPY   240201"
        assert symbol[12].encode() == row["instrument_class"]
        assert int(symbol[13:]) * 1_000_000 == row["strike_price"]
        assert row["underlying"] == b"SPY"
        assert 0 <= session.close_ns - int(row["expiration"]) < 2 * 86_400 * NS
        assert row["contract_multiplier"] == 100
    middle = int(options[1051][13:]) // 1000
    assert abs(middle - 500) < 10
    assert [options[i] for i in (1001, 1102)] == [
        f"SPY   240201C{middle - 25:05d}000",
        f"SPY   240201P{middle + 25:05d}000",
    ]


def contract_of(
    options: SimulatedOptions, ids: NDArray[np.uint32], profile: Instrument
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    strike = {i: int(s[13:]) * 1e6 / profile.spy_dollar_e9 for i, s in options.symbols.items()}
    put = {i: s[12] == "P" for i, s in options.symbols.items()}
    table = np.array(
        [[strike.get(i, np.nan), put.get(i, False)] for i in range(module.FIRST_OPTION_ID, max(options.symbols) + 1)]
    )
    rows = table[ids.astype(np.int64) - module.FIRST_OPTION_ID]
    return rows[:, 0], rows[:, 1] > 0


def spot_at(made: Made, ts_ns: NDArray[np.uint64]) -> NDArray[np.float64]:
    tenth = (ts_ns.astype(np.int64) - made.session.open_ns) * module.MIDS_PER_S // NS
    return made.book.mids_e9[tenth] / made.profile.spy_dollar_e9


@pytest.mark.parametrize(
    ("spot", "strike", "years", "sigma"),
    [(100.0, 100.0, 1.0, 0.2), (100.0, 110.0, 0.5, 0.3), (501.2, 498.0, 1e-3, 0.16)],
)
def test_black_scholes_is_the_mean_payoff(spot: float, strike: float, years: float, sigma: float) -> None:
    z = np.linspace(-10, 10, 400_001)
    weight = np.exp(-(z**2) / 2)
    final = spot * np.exp(sigma * np.sqrt(years) * z - sigma**2 * years / 2)
    found = black_scholes(
        np.full(2, spot), np.full(2, strike), np.array([False, True]), np.full(2, years), np.full(2, sigma)
    )
    for price, payoff in zip(found, (final - strike, strike - final), strict=True):
        assert price == pytest.approx((payoff.clip(0) * weight).sum() / weight.sum(), abs=1e-6)


def test_an_option_that_ends_is_worth_its_payoff() -> None:
    found = black_scholes(
        np.full(4, 100.0),
        np.array([90.0, 90.0, 110.0, 110.0]),
        np.array([0, 1, 0, 1]) > 0,
        np.full(4, 1e-12),
        np.full(4, 0.2),
    )
    assert found == pytest.approx([10, 0, 0, 10])


def test_truth_follows_the_stated_formula(many: list[Made]) -> None:
    truth = pl.concat([m.book.truth for m in many])
    rule = RULE.level
    base = np.array([rule.kind[KINDS.index(k)] for k in truth["level_kind_name"]])
    earlier = np.minimum(truth["earlier_touches"].to_numpy(), 3)
    logit = base + rule.speed * (truth["approach_z"].to_numpy() - 1.2) + rule.touch * earlier
    logit -= RULE.wall * truth["wall_log_ratio"].to_numpy()
    assert np.allclose(truth["p_break"], 1 / (1 + np.exp(-logit)), atol=1e-12)
    up = truth["direction_sign"].to_numpy() > 0
    assert (truth["defending_side"].to_numpy() == np.where(up, "A", "B")).all()
    breaks = truth["breaks"].to_numpy()
    assert np.allclose(truth["depth_factor"], np.where(breaks, 0.4, 1.6))
    assert np.allclose(truth["buyer_share"], np.where(up == breaks, 0.8, 0.2))
    assert np.allclose(truth["option_buy_share"], np.where(breaks, 0.75, 0.25))


def test_outcomes_follow_their_probabilities(many: list[Made], many_silent: list[Made]) -> None:
    truth = pl.concat([m.book.truth for m in (*many, *many_silent)])
    p, breaks = truth["p_break"].to_numpy(), truth["breaks"].to_numpy()
    assert len(p) > 450
    shares = []
    for low, high in ((0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)):
        chosen = (p >= low) & (p < high)
        expected, found = p[chosen].mean(), breaks[chosen].mean()
        assert abs(found - expected) < 4 * np.sqrt((p * (1 - p))[chosen].mean() / chosen.sum()), (low, chosen.sum())
        shares.append(found)
    assert shares == sorted(shares)


def depth_change(made: Made, row: dict[str, Any]) -> float:
    """Log of the defending side's depth near the level a minute after contact, against that at contact."""
    side = "ask" if row["defending_side"] == "A" else "bid"
    times = made.records["ts_event"].astype(np.int64)
    at = np.searchsorted(times, np.array([0, 60 * NS]) + row["ts_ns"]) - 1
    near = (
        np.abs(column(made.records[at], f"{side}_px") / made.profile.spy_dollar_e9 - row["level_price"])
        <= RULE.zone_usd
    )
    depth = (column(made.records[at], f"{side}_sz") * near).sum(1)
    return float(np.log((1 + depth[1]) / (1 + depth[0])))


def changes(many: list[Made]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    rows = [(depth_change(m, row), row["breaks"]) for m in many for row in m.book.truth.iter_rows(named=True)]
    values = np.array(rows)
    return values[:, 0], values[:, 1] > 0


def test_the_defending_side_is_pulled_before_a_break_and_fed_before_a_bounce(
    many: list[Made], many_silent: list[Made]
) -> None:
    change, breaks = changes(many)
    pulled, fed = change[breaks], change[~breaks]
    assert pulled.mean() < -0.25
    assert fed.mean() > 0.1
    assert np.mean(pulled[:, None] < fed[None]) > 0.8
    change, breaks = changes(many_silent)
    error = change.std() * np.sqrt(1 / breaks.sum() + 1 / (~breaks).sum())
    assert abs(change[breaks].mean() - change[~breaks].mean()) < 3 * error
    assert np.mean(change[breaks][:, None] < change[~breaks][None]) == pytest.approx(0.5, abs=0.09)


def shares(many: list[Made], measure: Callable[[Made, dict[str, Any]], tuple[int, int]], breaks: bool) -> float:
    rows = [measure(m, r) for m in many for r in m.book.truth.iter_rows(named=True) if r["breaks"] == breaks]
    hits, total = np.array(rows).sum(0)
    assert total > 1000
    return hits / total


def drawn_side(made: Made, row: dict[str, Any]) -> tuple[int, int]:
    times = made.book.trades["ts_event"].astype(np.int64)
    a, b = np.searchsorted(times, np.array([0, RULE.level.tilt_s * NS]) + row["ts_ns"])
    up = (row["direction_sign"] > 0) == row["breaks"]
    return int((made.book.trades["side"][a:b] == (b"B" if up else b"A")).sum()), int(b - a)


def option_buys(made: Made, row: dict[str, Any]) -> tuple[int, int]:
    tape = made.options.trades
    a, b = np.searchsorted(tape["ts_event"].astype(np.int64), np.array([0, RULE.option_s * NS]) + row["ts_ns"])
    strike, _ = contract_of(made.options, tape["instrument_id"][a:b], made.profile)
    near = np.abs(strike - row["level_price"]) <= RULE.option_reach_usd
    return int((tape["side"][a:b][near] == b"B").sum()), int(near.sum())


def test_tape_and_options_lean_by_the_stated_strength(many: list[Made], many_silent: list[Made]) -> None:
    for breaks in (True, False):
        assert shares(many, drawn_side, breaks) == pytest.approx(0.5 + RULE.level.tilt, abs=0.03)
        assert shares(many_silent, drawn_side, breaks) == pytest.approx(0.5, abs=0.04)
        lean = RULE.lean if breaks else -RULE.lean
        assert shares(many, option_buys, breaks) == pytest.approx(0.5 + lean, abs=0.03)
        assert shares(many_silent, option_buys, breaks) == pytest.approx(0.5, abs=0.03)


def test_the_price_goes_to_the_drawn_side_after_the_contact_resolves(many: list[Made]) -> None:
    moves = []
    for m in many:
        for row in m.book.truth.iter_rows(named=True):
            at = np.array([RULE.resolve_s, RULE.level.drift_s]) + (row["ts_ns"] - m.session.open_ns) // NS
            if at[1] * module.MIDS_PER_S < len(m.book.mids_e9):
                one, other = m.book.mids_e9[at * module.MIDS_PER_S] / m.profile.spy_dollar_e9
                side = row["direction_sign"] if row["breaks"] else -row["direction_sign"]
                moves.append(side * (other - one))
    assert np.mean(np.array(moves) > 0) > 0.9
    assert np.mean(moves) > 0.8


def test_a_session_without_regular_hours_has_a_book_but_no_contact(tmp_path: Path) -> None:
    session = session_of("ES", "2025-01-09")
    paths = write_full_market(tmp_path, ES, [session], 1, "small")
    counts = [len(databento.DBNStore.from_file(p).to_ndarray()) for p in paths]
    assert counts[0] > 5000
    assert counts[1] > 50_000
    assert counts[2:] == [0, 0, 102]
    assert pl.read_parquet(tmp_path / TRUTH).height == 0


@pytest.mark.parametrize(
    ("failing", "left"), [("simulate_options", ["spy-20240201.mbp-10.dbn.zst"]), ("simulate_book", [])]
)
def test_marked_before_the_first_file_and_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, left: list[str]
) -> None:
    def fail(*_: object) -> None:
        mark = read_mark(tmp_path)
        assert mark is not None
        assert mark["sessions"] == []
        raise OSError("disk full")

    monkeypatch.setattr(module, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path)
    assert sorted(content(tmp_path)) == [SIMULATED_MARK, *left]
    monkeypatch.undo()
    write(tmp_path)
    mark = read_mark(tmp_path)
    assert mark is not None
    assert mark["sessions"] == KEYS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[
            ({name: value}, f"{name} = ")
            for name in (
                "liquidity_s",
                "zone_usd",
                "resolve_s",
                "option_s",
                "option_reach_usd",
                "depth_lots",
                "sigma_atm",
            )
            for value in (0, -1, float("nan"), float("inf"))
        ],
        ({"liquidity": 1.0}, r"liquidity = 1\.0"),
        ({"liquidity": -0.1}, r"liquidity = -0\.1"),
        ({"lean": 0.6}, r"lean = 0\.6"),
        ({"lean": float("nan")}, "lean = nan"),
        ({"smile": -0.1}, r"smile = -0\.1"),
        ({"skew": float("nan")}, "skew = nan"),
        ({"wall": float("inf")}, "wall = inf"),
        ({"resolve_s": 540}, "does not end before drift_s = 540"),
        ({"level": LevelRule(speed=float("nan"))}, "level speed = nan"),
        ({"level": LevelRule(kind=(float("inf"),) * 8)}, "level 0 = inf"),
    ],
)
def test_impossible_rules_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(RULE, **change)


def test_impossible_profiles_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown profile 'huge'.*full, small"):
        profile_named("huge")
    for change in ({"trades": 0}, {"book_records": -5}, {"option_trades": 0}, {"orders_per_level": float("nan")}):
        with pytest.raises(ConfigError, match=f"{next(iter(change))} = "):
            replace(SMALL, **change)
    with pytest.raises(ConfigError, match="10000 trades in 20000 book records"):
        replace(SMALL, book_records=20_000)


def test_impossible_starts_are_refused(tmp_path: Path) -> None:
    session = session_of("SPY", KEYS[0])
    for seed, start in ((7, 0), (7, -5), (7, 50 * NS), (-1, 500 * NS)):
        with pytest.raises(ConfigError, match=f"start_e9 = {start}, seed = {seed}"):
            simulate_book(session, SPY, seed, start, SMALL)
        with pytest.raises(ConfigError, match=f"start_e9 = {start}, seed = {seed}"):
            write_full_market(tmp_path / "new", SPY, [session], seed, start_e9=start)
    book = simulate_book(session, SPY, 7, 500 * NS, SMALL.scaled(0.1))
    with pytest.raises(ConfigError, match="seed = -1"):
        simulate_options(session, SPY, -1, book, SMALL)
    for sessions in ([], [session, session], [session_of("SPY", KEYS[1]), session]):
        with pytest.raises(ConfigError, match="these sessions cannot be simulated"):
            write_full_market(tmp_path / "new", SPY, sessions, 7)
    with pytest.raises(ConfigError, match="unknown profile"):
        write_full_market(tmp_path / "new", SPY, [session], 7, "tiny")
    assert not (tmp_path / "new").exists()


def test_a_price_that_leaves_the_ladder_is_refused() -> None:
    wild = BookRule(level=LevelRule(sigma_usd_per_sqrt_min=100.0))
    with pytest.raises(ConfigError, match=r"the simulated price left the ladder.*SPY 2024-02-01, second"):
        simulate_book(session_of("SPY", KEYS[0]), SPY, 1, 500 * NS, SMALL, wild)


def test_real_data_is_never_mixed_with_a_simulation(tmp_path: Path) -> None:
    session = session_of("SPY", KEYS[0])
    real = dbn_bytes(trades([session.regular_open_ns], [500 * NS]))
    (tmp_path / "real.dbn.zst").write_bytes(real)
    with pytest.raises(MarketDataError, match=r"1 DBN files that were not simulated.*real\.dbn\.zst"):
        write(tmp_path)
    assert content(tmp_path) == {"real.dbn.zst": real}
