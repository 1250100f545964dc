"""What each column says of the feeds it rests on holds, and a feed's hole is seen: every subset of the feeds, and books with a gap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from spymaster_assets.contract import Column
from spymaster_assets.market.bars import session_bars
from spymaster_assets.market.basis import SpotBasis
from spymaster_assets.market.book import BookSnapshots
from spymaster_assets.market.dbn import read_header, read_records
from spymaster_assets.market.files import SessionFiles, register_session, scan_folder
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.options import OpenInterest
from spymaster_assets.market.simulate_book import PROFILES, write_full_market
from spymaster_assets.market.tape import SessionTape, load_session_records
from spymaster_assets.settings import MINUTE_NS, NS, OptionSettings, SignalSettings
from spymaster_assets.signals.build import SignalSet, build_signals
from spymaster_assets.signals.context import SessionBars
from spymaster_assets.signals.coverage import Coverage
from spymaster_assets.signals.levels import OPTION_KINDS, LevelSet, build_levels
from spymaster_assets.signals.options import OptionFeed, OptionFlow
from spymaster_assets_tests.builders import CALENDARS, CONTRACT, VOLATILITY, build_folder, dbn_bytes, feeds_of

SPY, ES = instrument("SPY"), instrument("ES")
SIGNAL = SignalSettings(cool_down_min=1, round_spacing_usd=0.5)
"""Levels every half dollar and episodes that end soon: many rows, half of whose round levels are no strikes."""
KEYS = CALENDARS["SPY"].sessions("2024-02-01", "2024-02-02")
ALL = frozenset({"bars", "trades", "side", "book", "options", "open_interest"})
SUBSETS = [
    frozenset({"bars"}.union(*parts))
    for parts in product(
        ((), ("trades",), ("trades", "side")), ((), ("book",)), ((), ("options",), ("options", "open_interest"))
    )
]


@dataclass(frozen=True)
class Market:
    """One simulated session with every feed, after one of warm-up, and the folder that it was read from."""

    folder: Path
    registration: SessionFiles
    bars: SessionBars
    warmup: list[SessionBars]
    until_ns: int
    tape: SessionTape
    book: BookSnapshots
    options: OptionFeed

    def levels(self, options: bool = True) -> LevelSet:
        """Levels of the session, with those of the options or without."""
        feed = self.options if options else None
        return build_levels(self.bars, self.warmup, SPY, SIGNAL, CONTRACT, self.until_ns, feed)

    def signals(self, feeds: frozenset[str], book: BookSnapshots | None = None) -> SignalSet:
        """Signals of the session with some of its feeds, another book on request."""
        tape, options = self.tape, self.options
        if "side" not in feeds:
            tape = replace(tape, side=np.zeros_like(tape.side))
        if "open_interest" not in feeds:
            options = replace(options, open_interest=None)
        given = options if "options" in feeds else None
        return build_signals(
            self.levels("options" in feeds),
            tape if "trades" in feeds else None,
            self.bars.session,
            SPY,
            1,
            SIGNAL,
            VOLATILITY,
            CONTRACT,
            self.until_ns,
            True,
            (book or self.book) if "book" in feeds else None,
            given,
        )


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Market:
    folder = tmp_path_factory.mktemp("feeds")
    sessions = [CALENDARS["SPY"].session(k) for k in KEYS]
    write_full_market(folder, SPY, sessions, 5, PROFILES["full"].scaled(0.06))
    warmup = build_folder(folder, "SPY", KEYS[0], KEYS[0])[0].bars
    registration = register_session(scan_folder(folder), CALENDARS["SPY"], SPY, KEYS[1], None)
    records = load_session_records(folder, registration, session=sessions[1])
    tape = SessionTape.of_records(records)
    book, options = feeds_of(folder, "SPY", sessions[1], registration, tape)
    assert book is not None
    assert options is not None
    strikes = np.unique(options.flow.strike_e9)
    interest = OpenInterest(np.repeat(strikes, 2), np.tile([True, False], len(strikes)), np.full(2 * len(strikes), 100))
    bars = SessionBars(sessions[1], session_bars(records, sessions[1], registration))
    return Market(
        folder,
        registration,
        bars,
        [warmup],
        registration.observed_until_ns,
        tape,
        book,
        replace(options, open_interest=interest),
    )


@pytest.fixture(scope="module")
def everything(market: Market) -> SignalSet:
    return market.signals(ALL)


def said_by_the_row(column: Column) -> bool:
    """Whether the column is measured on the feed that the row's label_source names."""
    return column.group == "outcome" or column.name == "label_source"


@pytest.mark.parametrize("feeds", SUBSETS, ids=lambda f: "+".join(sorted(f)))
def test_a_column_needs_the_feeds_it_declares_and_no_others(
    market: Market, everything: SignalSet, feeds: frozenset[str]
) -> None:
    made = market.signals(feeds)
    assert set(made.metadata["feeds"]) == feeds
    assert made.frame["event_id"].is_unique().all()
    one, other = (
        s.frame.join(t.frame, on="event_id", how="semi").sort("event_id")
        for s, t in ((everything, made), (made, everything))
    )
    assert one.height > 50
    assert one["event_id"].equals(other["event_id"])
    for column in CONTRACT.columns:
        if not set(column.feeds) <= feeds:
            assert made.frame[column.name].null_count() == made.frame.height, column.name
        elif "trades" in feeds or not said_by_the_row(column):
            assert one[column.name].equals(other[column.name], null_equal=True), column.name
            if column.dtype == "float64":
                assert one[column.name].to_numpy().tobytes() == other[column.name].to_numpy().tobytes(), column.name
    assert set(made.frame["label_source"]) == {"trades" if "trades" in feeds else "bars"}


def test_every_column_has_values_when_all_feeds_are_there(everything: SignalSet) -> None:
    """So that the test above compares something; the SMA 400 takes more than the two sessions there are."""
    empty = [c for c in everything.frame.columns if everything.frame[c].null_count() == everything.frame.height]
    assert [c for c in empty if "400" not in c and c not in ("sma_spread", "confluence_alignment")] == []


def test_option_levels_take_rows_only_where_they_stand_for_another(market: Market, everything: SignalSet) -> None:
    """An option feed adds its levels' events, and removes only an event at the same price in the same bar."""
    bars_only = market.signals(ALL - {"options", "open_interest"}).frame
    frame = everything.frame
    options = pl.col("level_kind_name").is_in(OPTION_KINDS)
    assert frame.filter(~options).join(bars_only, on="event_id", how="anti").height == 0
    gone = bars_only.join(frame, on="event_id", how="anti").with_columns(tick=pl.col("level_price_e9") // SPY.tick_e9)
    stand_in = frame.filter(options).with_columns(tick=(pl.col("level_price_e9") // SPY.tick_e9))
    assert 0 < gone.height < bars_only.height
    assert gone.join(stand_in, on=["ts_ns", "tick"], how="anti").height == 0
    assert set(gone["level_kind_name"]) <= {"ROUND", "SMA_400"}


BARRIER = [c.name for c in CONTRACT.columns if "book" in c.feeds]


OF_BASELINE = ["wall_ratio", "wall_ratio_nonzero", "wall_ratio_log", "liquidity_pressure", "net_break_pressure"]
"""Columns that rest on the half hour before t0 as well as on the window."""


class TestHolesInTheBook:
    def test_the_margin_before_the_open_gives_the_first_touches_their_baseline(
        self, market: Market, everything: SignalSet
    ) -> None:
        told = everything.frame.filter(pl.col("wall_ratio").is_not_null())
        assert told["minutes_since_open"].min() <= 5
        opens_ns = market.bars.session.regular_open_ns
        late = market.signals(ALL, self.without(market.book, 0, opens_ns)).frame
        assert late.filter(pl.col("wall_ratio").is_not_null())["minutes_since_open"].min() >= 29
        assert late["barrier_delta_liq"].equals(everything.frame["barrier_delta_liq"])

    def without(self, book: BookSnapshots, from_ns: int, until_ns: int) -> BookSnapshots:
        keep = (book.ts_ns < from_ns) | (book.ts_ns >= until_ns)
        arrays = ("ts_ns", "bid_px_e9", "bid_sz", "ask_px_e9", "ask_sz")
        return replace(book, **{name: getattr(book, name)[keep] for name in arrays})

    @pytest.mark.parametrize(
        ("from_s", "length_s", "seen"),
        [(100, 60, False), (100, 20, True), (-20, 60, False), (-50, 60, True), (-60, 50, True)],
    )
    def test_a_hole_makes_the_windows_it_reaches_into_null(
        self, market: Market, everything: SignalSet, from_s: int, length_s: int, seen: bool
    ) -> None:
        usable = everything.frame.filter(pl.col("barrier_state").is_not_null())
        t0 = int(usable["ts_ns"][usable.height // 2])
        from_ns, until_ns = t0 + from_s * NS, t0 + (from_s + length_s) * NS
        made = market.signals(ALL, self.without(market.book, from_ns, until_ns)).frame
        at = made.filter(pl.col("ts_ns") == t0)
        for name in BARRIER:
            if not seen:
                assert at[name].null_count() == at.height, name
        assert at["barrier_delta_liq"].is_not_null().any() == seen
        ts_ns = pl.col("ts_ns")
        trends = [n for n in BARRIER if n.endswith("_trend")]
        for names, before_ns in (
            (OF_BASELINE, 30 * MINUTE_NS),
            ([n for n in CONTRACT.schema if n not in OF_BASELINE], 0),
        ):
            far = (ts_ns >= until_ns + before_ns) | (ts_ns + 240 * NS < from_ns - 30 * NS)
            other = [n for n in names if n not in trends]
            assert made.filter(far).height > 0
            assert made.filter(far).select(other).equals(everything.frame.filter(far).select(other))
        silent = made.filter(ts_ns.is_between(until_ns, until_ns + 29 * MINUTE_NS))
        assert silent["barrier_delta_liq"].is_not_null().any()
        if length_s > 30:
            assert silent.select(OF_BASELINE).null_count().sum_horizontal().item() == silent.height * len(OF_BASELINE)
        else:
            assert silent["wall_ratio"].is_not_null().any()

    def test_the_end_of_the_book_counts_as_a_hole(self, market: Market, everything: SignalSet) -> None:
        ends_ns = int(market.book.ts_ns[-1])
        usable = everything.frame.filter(pl.col("barrier_delta_liq").is_not_null())
        t0 = int(usable["ts_ns"][usable.height // 2])
        for after_s, seen in ((240 - 10, True), (240 - 40, False)):
            book = self.without(market.book, t0 + after_s * NS, ends_ns + 1)
            at = market.signals(ALL, book).frame.filter(pl.col("ts_ns") == t0)
            assert at["barrier_delta_liq"].is_not_null().any() == seen, after_s


OPTIONS = [c.name for c in CONTRACT.columns if set(c.feeds) == {"options"} and c.name != "gamma_bucket"]
SINCE_THE_OPEN = ("gamma_exposure", "fuel_effect", "gamma_pressure", "dist_to_gamma_flip")


def sliced(flow: OptionFlow, keep: np.ndarray) -> OptionFlow:
    return OptionFlow(**{f.name: getattr(flow, f.name)[keep] for f in fields(flow)})


def test_a_hole_in_the_options_is_null_while_it_matters(market: Market, everything: SignalSet) -> None:
    """Ten minutes without a trade: sums since the open stay unknown, flows and walls as long as their windows meet the hole."""
    hole_ns = market.bars.session.regular_open_ns + 120 * MINUTE_NS
    resumes_ns = hole_ns + 10 * MINUTE_NS
    flow = market.options.flow
    keep = (flow.ts_ns < hole_ns) | (flow.ts_ns >= resumes_ns)
    found = replace(market, options=replace(market.options, flow=sliced(flow, keep))).signals(ALL).frame
    t = pl.col("ts_ns")
    before = found.filter(t <= hole_ns)
    assert before.select(OPTIONS).equals(everything.frame.filter(t <= hole_ns).select(OPTIONS))
    silent = found.filter(t.is_between(hole_ns + 6 * MINUTE_NS, resumes_ns - 1))
    after = found.filter(t > resumes_ns)
    assert min(before.height, silent.height, after.height) > 0
    assert silent.select(OPTIONS).null_count().sum_horizontal().item() == silent.height * len(OPTIONS)
    assert set(found.filter(t > hole_ns + 6 * MINUTE_NS)["gamma_bucket"]) == {"UNKNOWN"}
    for name in SINCE_THE_OPEN:
        assert after[name].null_count() == after.height, name
    for name, minutes in (("gamma_flow_velocity", 5), ("gamma_flow_impulse", 20), ("wall_confluence", 5)):
        over = t > resumes_ns + minutes * MINUTE_NS
        assert after.filter(~over)[name].null_count() == after.filter(~over).height, name
        assert after.filter(over)[name].null_count() == 0, name
    rows = ["event_id", "gamma_flow_velocity"]
    late = everything.frame.filter(t > resumes_ns + 20 * MINUTE_NS).select(rows).join(after, on="event_id")
    assert late.height > 0
    # differences of sums that begin elsewhere
    assert np.allclose(late["gamma_flow_velocity"], late["gamma_flow_velocity_right"], rtol=1e-9, atol=1e-6)


def test_a_feed_that_stops_is_known_to_have_when_one_with_a_hole_is(market: Market, tmp_path: Path) -> None:
    """From files whose headers state the same time: until the longest silence has passed not a bit tells whether a trade comes later."""
    stops_ns = market.bars.session.regular_open_ns + 120 * MINUTE_NS + 30 * NS
    path = next(market.folder.glob(f"spy-opt-{KEYS[1].replace('-', '')}.trades*"))
    symbols, records = {s.instrument_id: s.raw_symbol for s in read_header(path).symbols}, read_records(path)
    header = read_header(path)
    made = []
    for name, back_min in (("ends", 10**6), ("hole", 12)):
        keep = (records["ts_recv"] < stops_ns) | (records["ts_recv"] >= stops_ns + back_min * MINUTE_NS)
        folder = tmp_path / name
        folder.mkdir()
        for other in market.folder.glob("spy-opt-*"):
            (folder / other.name).write_bytes(other.read_bytes())
        (folder / path.name).write_bytes(
            dbn_bytes(records[keep], "trades", symbols, header.start_ns, header.end_ns, dataset=header.dataset)
        )
        _, options = feeds_of(folder, "SPY", market.bars.session, market.registration, market.tape)
        assert options is not None
        made.append(replace(market, options=options))
    last_ns = int(made[0].options.flow.ts_ns[-1])
    known_ns = last_ns + OptionSettings().max_gap_min * MINUTE_NS
    assert made[1].options.flow.ts_ns[-1] > known_ns
    tables = [m.levels().table.filter(pl.col("start_ns") <= known_ns) for m in made]
    assert tables[0].equals(tables[1])
    rows = [m.signals(ALL - {"open_interest"}).frame.filter(pl.col("ts_ns") < known_ns) for m in made]
    assert rows[0].equals(rows[1])
    between = rows[0].filter(pl.col("ts_ns") > last_ns)
    assert between.height > 0
    assert between["gamma_exposure"].null_count() == 0
    assert {"CALL_WALL", "STRIKE"} <= set(tables[0].filter(pl.col("start_ns") > last_ns)["level_kind_name"])
    over = made[0].signals(ALL - {"open_interest"}).frame.filter(pl.col("ts_ns") >= known_ns)
    assert over.height > 0
    assert over.select(OPTIONS).null_count().sum_horizontal().item() == over.height * len(OPTIONS)


@pytest.mark.parametrize("late_min", [1, 15])
def test_a_feed_that_begins_after_the_open_tells_no_sum_since_it(
    market: Market, everything: SignalSet, late_min: int
) -> None:
    opens_ns = market.bars.session.regular_open_ns
    begins_ns = opens_ns + late_min * MINUTE_NS
    flow = sliced(market.options.flow, market.options.flow.ts_ns >= begins_ns)
    late = replace(market, options=replace(market.options, flow=flow, from_ns=begins_ns))
    frame = late.signals(ALL).frame
    t = pl.col("ts_ns")
    for name in (*SINCE_THE_OPEN, "open_interest_gamma"):
        assert frame[name].null_count() == frame.height, name
    assert set(frame["gamma_bucket"]) == {"UNKNOWN"}
    for name, minutes in (("gamma_flow_velocity", 5), ("gamma_flow_impulse", 20), ("wall_confluence", 5)):
        inside = t >= begins_ns + minutes * MINUTE_NS
        assert frame.filter(~inside)[name].null_count() == frame.filter(~inside).height, name
        assert frame.filter(inside)[name].null_count() == 0, name
    one = frame.join(everything.frame, on="event_id").filter(t >= begins_ns + 5 * MINUTE_NS)
    assert one.height > 0
    # differences of sums that begin elsewhere
    assert np.allclose(one["gamma_flow_velocity"], one["gamma_flow_velocity_right"], rtol=1e-9, atol=1e-6)
    walls = late.levels().table.filter(pl.col("level_kind_name").is_in(["CALL_WALL", "PUT_WALL"]))
    assert walls["start_ns"].min() >= begins_ns + 5 * MINUTE_NS


def test_strikes_are_levels_only_while_all_volume_since_the_open_was_seen(
    market: Market, everything: SignalSet
) -> None:
    """From a hole, or from a late start, a strike's volume is not known: neither a strike that passed before nor a new one is a level."""
    opens_ns = market.bars.session.regular_open_ns
    hole_ns, resumes_ns = opens_ns + 120 * MINUTE_NS, opens_ns + 130 * MINUTE_NS
    flow = market.options.flow
    last_ns = int(flow.ts_ns[flow.ts_ns < hole_ns][-1])
    known_ns = last_ns + OptionSettings().max_gap_min * MINUTE_NS
    holed = sliced(flow, (flow.ts_ns < hole_ns) | (flow.ts_ns >= resumes_ns))
    late = sliced(flow, flow.ts_ns >= opens_ns + 10 * MINUTE_NS)
    of = {
        "whole": market.options,
        "hole": replace(market.options, flow=holed),
        "late": replace(market.options, flow=late, from_ns=opens_ns + 10 * MINUTE_NS),
        "late in a file of the whole day": replace(market.options, flow=late),
    }
    strike = pl.col("level_kind_name") == "STRIKE"
    start = pl.col("start_ns")
    found = {name: replace(market, options=o).levels().table.filter(strike) for name, o in of.items()}
    assert found["hole"].filter(start <= hole_ns).equals(found["whole"].filter(start <= hole_ns))
    assert found["hole"].filter(start.is_between(hole_ns, known_ns)).height > 0
    assert found["hole"].filter(start > known_ns).height == 0
    assert found["whole"].filter(start > known_ns).height > 0
    assert found["late"].height == found["late in a file of the whole day"].height == 0
    rows = replace(market, options=of["hole"]).signals(ALL).frame.filter(strike)
    assert rows["ts_ns"].max() <= known_ns < everything.frame.filter(strike)["ts_ns"].max()


@pytest.mark.parametrize("seed", range(20))
def test_coverage_agrees_with_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    begins, ends = (0, 100) if seed % 2 else (20, 70)
    spoken = np.sort(rng.integers(begins, ends, rng.integers(0, 12)))
    gap = int(rng.integers(1, 20))
    start = rng.integers(-10, 110, 50)
    stop = start + rng.integers(1, 40, 50)

    def plain(a: int, b: int) -> bool:
        known = [s for s in spoken.tolist() if s < b]
        early, inside = [s for s in known if s <= a], [s for s in known if s > a]
        chain = [early[-1] if early else a, *inside, b]
        return bool(known) and begins <= a and b <= ends and all(y - x <= gap for x, y in pairwise(chain))

    found = Coverage.of(spoken, gap, begins, ends).unbroken(start, stop)
    assert found.tolist() == [plain(int(a), int(b)) for a, b in zip(start, stop, strict=True)]

    def alone(a: int, b: int) -> bool:
        return all(y - x <= gap for x, y in pairwise([a, *(s for s in spoken.tolist() if a <= s < b), b]))

    heard = Coverage.of(spoken, gap).heard(start, stop)
    assert heard.tolist() == [alone(int(a), int(b)) for a, b in zip(start, stop, strict=True)]


def strike_market(size: int, minutes: int, near: Callable[[int], bool]) -> pl.DataFrame:
    """ES signals where the SPY strike 501 trades `size` contracts a minute while ES per SPY dollar grows by 0.001 a minute.

    The price stays a point below the strike in the minutes that are `near` and 30 points below it in the others.
    """
    session = CALENDARS["ES"].session("2024-02-01")
    k = np.arange(minutes)
    start = session.regular_open_ns + k * MINUTE_NS
    ratio = 10.0 + 0.001 * k
    tick = ES.tick_e9
    level = np.rint(501 * ratio * 1e9 / tick).astype(np.int64) * tick
    close = level - np.where([near(int(m)) for m in k], 4, 120) * tick
    one = pl.DataFrame(
        {
            "instrument_id": 1,
            "is_front": True,
            "timeframe_min": 1,
            "start_ns": start,
            "end_ns": start + MINUTE_NS,
            "open_e9": close,
            "high_e9": close + 2 * tick,
            "low_e9": close,
            "close_e9": close,
            "volume": 10,
            "vwap": close / 1e9,
        }
    )
    two = one.gather_every(2).with_columns(timeframe_min=pl.lit(2), end_ns=pl.col("start_ns") + 2 * MINUTE_NS)
    bars = SessionBars(session, pl.concat([one, two.cast(one.schema)]))
    flat = np.full(minutes, np.nan)
    flow = OptionFlow(
        start + NS, np.full(minutes, 501 * 10**9), np.full(minutes, True), np.full(minutes, size),
        np.ones(minutes, np.int8), close, flat, flat, np.zeros(minutes, np.int8), flat, flat, flat, np.full(minutes, -1.0),
    )  # fmt: skip
    feed = OptionFeed(
        flow, "SPY", session.open_ns, session.close_ns, SpotBasis("measured", start, ratio, 10.0), 1_000_000_000
    )
    until_ns = int(start[-1]) + MINUTE_NS
    levels = build_levels(bars, [], ES, SignalSettings(), CONTRACT, until_ns, feed)
    return build_signals(
        levels, None, session, ES, 1, SignalSettings(), VOLATILITY, CONTRACT, until_ns, options=feed
    ).frame


@pytest.mark.parametrize(("kind", "size"), [("STRIKE", 200), ("CALL_WALL", 1)])
def test_one_approach_to_a_strike_is_one_event_though_the_basis_moves_its_price(kind: str, size: int) -> None:
    """Twenty minutes at it move the strike by 10 points, four times the monitor band; twelve minutes away make a second attempt."""
    frame = strike_market(size, 60, lambda minute: 10 <= minute < 30 or minute >= 42).filter(
        pl.col("level_kind_name") == kind
    )
    opens_ns = CALENDARS["ES"].session("2024-02-01").regular_open_ns
    assert ((frame["ts_ns"] - opens_ns) // MINUTE_NS).to_list() == [10, 42]
    assert frame["direction"].to_list() == ["UP", "UP"]
    # the level is where the strike was, 16 points higher at the second touch
    assert frame["level_price_e9"].diff().to_list()[1] == pytest.approx(501 * 0.032 * 1e9)
    if kind == "STRIKE":
        assert frame["event_id"].to_list() == [
            f"ES_2024-02-01_STRIKE_501000_UP_{opens_ns + m * MINUTE_NS}" for m in (10, 42)
        ]


def test_an_attempt_cluster_follows_the_strike() -> None:
    """Twelve minutes without contact end the episode and not the cluster, though the strike moved 16 points."""
    frame = strike_market(200, 60, lambda minute: minute in (10, 22)).filter(pl.col("level_kind_name") == "STRIKE")
    assert frame["attempt_index"].to_list() == [1, 2]
    assert frame["attempt_cluster_id"].to_list() == [1, 1]
