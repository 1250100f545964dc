"""The barrier at a touch: cases by hand, a plain loop, mirror images, the input cut off, and the real ESH4 hour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spymaster_assets.market.book import BookSnapshots, book_snapshots, snapshots_of_records
from spymaster_assets.market.dbn import UNDEFINED_PRICE, read_records
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.tape import SessionTape
from spymaster_assets.settings import NS, BarrierSettings
from spymaster_assets.signals.barrier import STATES, BarrierFeatures, _states, barrier_features
from spymaster_assets_tests.builders import CONTRACT

ES = instrument("ES")
T0 = 1_718_027_400_000_000_000
POINT = 1_000_000_000
TICK = ES.tick_e9
LEVEL = 5_000 * POINT
NONE = int(UNDEFINED_PRICE)
QUICK = BarrierSettings(baseline_s=300, baseline_min_snapshots=1, max_gap_s=300)
BUCKET = 250_000_000


def book(
    ts_ns: Sequence[int],
    asks: Sequence[Sequence[tuple[int, int]]],
    bids: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> BookSnapshots:
    """Snapshots with (ticks from LEVEL, size) levels, best first; the bid is one contract far away unless given."""
    n = len(ts_ns)
    out = {}
    for side, books in (("ask", asks), ("bid", bids or [[(-100, 1)]] * n)):
        px, sz = np.full((n, 10), NONE, np.int64), np.zeros((n, 10), np.int64)
        for k, levels in enumerate(books):
            for j, (ticks, size) in enumerate(levels):
                px[k, j], sz[k, j] = LEVEL + ticks * TICK, size
        out[f"{side}_px_e9"], out[f"{side}_sz"] = px, sz
    return BookSnapshots(np.array(ts_ns, np.int64), counts=(), bucket_ns=BUCKET, **out)


def tape(trades: Sequence[tuple[int, int, int, int]] = ()) -> SessionTape:
    """Trades of (time, ticks from LEVEL, size, aggressor)."""
    columns = np.array(trades, np.int64).reshape(-1, 4).T
    return SessionTape(columns[0], LEVEL + columns[1] * TICK, columns[2], columns[3].astype(np.int8))


def one(
    snapshots: BookSnapshots, trades: SessionTape, sign: int = 1, s: BarrierSettings = QUICK, end_ns: int | None = None
) -> BarrierFeatures:
    """Features of one touch at T0 and LEVEL."""
    end = None if end_ns is None else np.array([end_ns])
    return barrier_features(snapshots, trades, np.array([T0]), np.array([LEVEL]), np.array([sign], np.int8), ES, s, end)


def test_added_cancelled_and_filled_by_hand() -> None:
    times = [T0 + k * NS for k in (0, 1, 2)]
    snapshots = book(times, [[(0, 60), (8, 40), (9, 500)], [(0, 60), (8, 90), (9, 1)], [(0, 10), (8, 50)]])
    trades = [
        (T0, 0, 1000, 1),  # known with the first snapshot
        (T0 + NS + 1, 0, 20, 1),
        (T0 + NS + 2, 0, 70, -1),  # hits the bid
        (T0 + NS + 3, 9, 70, 1),  # outside the zone
        (T0 + 2 * NS, 8, 30, 1),
        (T0 + 2 * NS + 1, 8, 30, 1),
    ]
    f = one(snapshots, tape(trades))
    # 100 -> 150 -> 60: 50 added, then 90 lost of which the 50 bought were filled.
    assert (f.added[0], f.filled[0], f.cancelled[0], f.delta_liq[0]) == (50, 50, 40, -40)
    assert f.replenishment_ratio[0] == pytest.approx(50 / 90)
    assert (f.snapshot_count[0], f.pair_count[0], bool(f.complete[0])) == (3, 2, True)
    assert STATES[f.state[0]] == "ABSORPTION"  # |delta| under 50 with a churn of 140
    columns = f.columns()
    assert columns["barrier_delta_liq_log"][0] == pytest.approx(-math.log1p(40))
    assert columns["barrier_delta_liq_nonzero"][0] == 1


def test_more_bought_than_lost_is_all_filled_and_nothing_is_counted_twice() -> None:
    snapshots = book([T0, T0 + NS], [[(0, 300)], [(0, 180)]])
    f = one(snapshots, tape([(T0, 0, 500, 1)]))  # known with the first snapshot, so no fill after it
    assert (f.filled[0], f.cancelled[0]) == (0, 120)
    f = one(snapshots, tape([(T0 + 1, 0, 500, 1)]))
    assert (f.filled[0], f.cancelled[0], f.delta_liq[0]) == (120, 0, -120)
    assert STATES[f.state[0]] == "VACUUM"  # R is 0; the rule for it comes before CONSUMED


def test_depth_that_comes_into_view_was_not_added() -> None:
    far = [(k - 12, 10) for k in range(10)]  # ticks -12..-3: the zone (-8..8) is seen up to -3
    near = [(k - 4, 10) for k in range(10)]  # ticks -4..5
    f = one(book([T0, T0 + NS, T0 + 2 * NS], [far, near, far]), tape())
    # Up to -3, seen by both: 60 -> 20 -> 60. The 80 at -2..5 came into view and left it.
    assert (f.added[0], f.cancelled[0], f.pair_count[0]) == (40, 40, 2)


def test_a_zone_out_of_view_has_no_values() -> None:
    away = [(k - 30, 10) for k in range(10)]
    f = one(book([T0, T0 + NS], [away, away]), tape())
    assert (f.snapshot_count[0], f.pair_count[0], f.state[0]) == (2, 0, -1)
    assert np.isnan(f.delta_liq[0])
    assert np.isnan(f.wall_ratio[0])
    nearly_empty = one(book([T0, T0 + NS], [away[:3], away[:3]]), tape())  # all of the side is in view
    assert (nearly_empty.pair_count[0], nearly_empty.delta_liq[0]) == (1, 0)


@pytest.mark.parametrize("asks", [[], [[(0, 5)]], [[], []], [[(0, 5)], []]])
def test_fewer_than_two_usable_snapshots_are_null(asks: list) -> None:
    f = one(book([T0 + k * NS for k in range(len(asks))], asks), tape())
    columns = f.columns()
    assert columns.pop("barrier_state") == [None]
    assert all(np.isnan(v[0]) for v in columns.values())
    for values in (f.added, f.cancelled, f.filled):
        assert np.isnan(values[0])


def test_columns_fit_the_contract() -> None:
    f = one(book([T0 - NS, T0, T0 + NS], [[(0, 60)], [(0, 60)], [(0, 260)]]), tape())
    columns = f.columns()
    assert list(columns) == [c.name for c in CONTRACT.columns if c.group == "barrier"]
    frame = CONTRACT.conform(pl.DataFrame(columns, nan_to_null=True)).select(list(columns))
    assert frame["barrier_state"].to_list() == ["WALL"]
    assert frame["barrier_delta_liq_nonzero"].to_list() == [1]
    assert frame.null_count().sum_horizontal().item() == 0
    assert all(CONTRACT[name].known_after_s == BarrierSettings().window_s for name in columns)
    assert CONTRACT["barrier_state"].values == STATES


def test_wall_ratio_is_size_per_tick_against_the_time_before() -> None:
    before = [[(k, 10) for k in range(10)]] * 3
    times = [T0 - 3 * NS, T0 - 2 * NS, T0 - NS, T0, T0 + NS]

    def ratio(last: list[tuple[int, int]], s: BarrierSettings = QUICK) -> float:
        return float(one(book(times, [*before, before[0], last]), tape(), s=s).wall_ratio[0])

    assert ratio([(k, 10) for k in range(10)]) == 1
    assert ratio([(k, 25) for k in range(10)]) == 2.5
    assert (
        ratio([(k - 6, 10) for k in range(10)]) == 1
    )  # the price is back before the level, the zone is seen up to tick 3
    assert ratio([(k + 5, 10) for k in range(10)]) == pytest.approx(4 / 9)  # ticks 0..4 are gone
    assert ratio([(k + 9, 10) for k in range(10)]) == 0  # broken through the zone
    assert math.isnan(ratio(before[0], replace(QUICK, baseline_min_snapshots=4)))
    assert math.isnan(ratio(before[0], replace(QUICK, baseline_s=0)))


@pytest.mark.parametrize(
    ("silence", "seen"),
    [
        ((100, 130), True),
        ((100, 131), False),
        ((0, 30), True),
        ((0, 32), False),
        ((1770, 1800), True),
        ((1769, 1800), False),
        ((-1, 30), True),
        ((-1, 31), False),
    ],
)
def test_a_silent_baseline_leaves_no_wall_ratio(silence: tuple[int, int], seen: bool) -> None:
    """Half an hour with a snapshot a second but for what lies between two seconds; what was said before it has no say."""
    s = BarrierSettings()
    seconds = [k - s.baseline_s for k in range(-100, s.baseline_s + 2) if not silence[0] < k < silence[1]]
    times = [T0 + k * NS for k in seconds]
    for from_s in (-100 - s.baseline_s, -s.baseline_s):
        part = [t for t in times if t >= T0 + from_s * NS]
        f = one(book(part, [[(0, 60)]] * len(part)), tape(), s=s)
        assert np.isfinite(f.wall_ratio[0]) == seen, from_s
        assert f.delta_liq[0] == 0
        assert f.baseline_count[0] >= s.baseline_min_snapshots


@pytest.mark.parametrize(
    ("silence", "whole"),
    [
        ((100, 130), True),
        ((100, 131), False),
        ((-25, 30), True),
        ((-1, 31), False),
        ((-1000, 30), True),
        ((-1000, 31), False),
        ((210, 240), True),
        ((209, 240), False),
    ],
)
def test_a_silent_window_is_not_whole_whatever_was_said_before_it(silence: tuple[int, int], whole: bool) -> None:
    """A snapshot a second but for what lies between two seconds; without the past before t0 the window is judged the same."""
    seconds = [k for k in range(-2000, 240) if not silence[0] < k < silence[1]]
    for from_s in (-2000, 0):
        part = [T0 + k * NS for k in seconds if k >= from_s]
        assert bool(one(book(part, [[(0, 60)]] * len(part)), tape(), s=BarrierSettings()).complete[0]) == whole, from_s


def test_the_window_ends_before_240_seconds_or_at_the_cap() -> None:
    times = [T0, T0 + 239 * NS, T0 + 240 * NS]
    snapshots = book(times, [[(0, 10)], [(0, 20)], [(0, 90)]])
    assert one(snapshots, tape()).delta_liq[0] == 10
    capped = one(snapshots, tape(), end_ns=T0 + 239 * NS)
    assert np.isnan(capped.delta_liq[0])
    assert not capped.complete[0]
    assert one(snapshots, tape(), end_ns=T0 + 500 * NS).complete[0]
    # A cap within a bucket leaves the bucket out: its last book was not known then.
    assert one(snapshots, tape(), end_ns=T0 + 239 * NS + BUCKET - 1).snapshot_count[0] == 1
    assert one(snapshots, tape(), end_ns=T0 + 239 * NS + BUCKET).snapshot_count[0] == 2


@pytest.mark.parametrize(
    ("added", "cancelled", "filled", "depth", "state"),
    [
        (0, 101, 0, 500, "VACUUM"),
        (29, 50, 80, 500, "VACUUM"),
        (0, 100, 0, 500, "NEUTRAL"),  # not below -100
        (400, 100, 100, 10, "WALL"),
        (200, 50, 50, 10, "ABSORPTION"),  # not above 100
        (200, 150, 160, 10, "CONSUMED"),
        (200, 160, 150, 10, "WEAK"),
        (200, 160, 160, 500, "NEUTRAL"),  # no more filled than cancelled
        (200, 160, 150, 50, "NEUTRAL"),
        (60, 40, 10, 10, "ABSORPTION"),  # before WEAK
        (60, 60, 0, 10, "WEAK"),
        (60, 60, 0, 500, "ABSORPTION"),
        (50, 50, 0, 500, "NEUTRAL"),  # churn of 100 is not over 100
    ],
)
def test_states_in_their_order(added: float, cancelled: float, filled: float, depth: int, state: str) -> None:
    a, c, f = (np.array([v], np.float64) for v in (added, cancelled, filled))
    code = _states(a, c, f, a - c - f, a / (c + f + 1e-6), np.array([depth]), np.array([True]), BarrierSettings())
    assert STATES[int(code[0])] == state


def test_no_touches() -> None:
    none = np.empty(0, np.int64)
    f = barrier_features(book([T0], [[(0, 1)]]), tape(), none, none, none.astype(np.int8), ES)
    assert all(len(v) == 0 for v in f.columns().values())


def plain(
    snapshots: BookSnapshots, trades: SessionTape, t0: int, level: int, sign: int, s: BarrierSettings, end: int
) -> dict[str, float]:
    """The definition of `barrier_features` for one touch, in points of plain Python."""
    px, sz = (snapshots.ask_px_e9, snapshots.ask_sz) if sign > 0 else (snapshots.bid_px_e9, snapshots.bid_sz)
    sides = [[(int(p), int(z)) for p, z in zip(a, b, strict=True) if p != NONE] for a, b in zip(px, sz, strict=True)]
    band = round(s.zone_usd * ES.spy_dollar_e9)
    stop = min(t0 + s.window_s * NS, end)
    times = [int(t) for t in snapshots.ts_ns]
    window = [k for k, t in enumerate(times) if t0 <= t and t // BUCKET < stop // BUCKET and sides[k]]
    base = [k for k, t in enumerate(times) if t0 - s.baseline_s * NS <= t and t // BUCKET < t0 // BUCKET and sides[k]]

    def sees(k: int, price: int) -> bool:
        return len(sides[k]) < px.shape[1] or sign * price <= max(sign * p for p, _ in sides[k])

    zone = [p for p in range(-(-(level - band) // TICK) * TICK, level + band + 1, TICK)]
    added = cancelled = filled = pairs = 0
    for a, b in pairwise(window):
        shared = [p for p in zone if sees(a, p) and sees(b, p)]
        if not shared:
            continue
        pairs += 1
        change = sum(z for p, z in sides[b] if p in shared) - sum(z for p, z in sides[a] if p in shared)
        bought = sum(
            int(trades.size[j])
            for j in range(len(trades.ts_ns))
            if times[a] < trades.ts_ns[j] <= times[b]
            and trades.side[j] == sign
            and abs(trades.price_e9[j] - level) <= band
        )
        added += max(change, 0)
        filled += min(max(-change, 0), bought)
        cancelled += max(-change - bought, 0) if change < 0 else 0
    if not pairs:
        return dict.fromkeys(
            ("added", "cancelled", "filled", "delta_liq", "replenishment_ratio", "wall_ratio"), math.nan
        )
    last = window[-1]
    best = min(sign * p for p, _ in sides[last])
    wall = [p for p in zone if sees(last, p) and (sign * p >= best or sign * p >= sign * level)]
    per_tick = (
        [sum(z for _, z in sides[k]) for k in base],
        [abs(sides[k][-1][0] - sides[k][0][0]) // TICK + 1 for k in base],
    )
    size = sum(z for p, z in sides[last] if p in wall)
    base_ns = t0 - s.baseline_s * NS, t0 // BUCKET * BUCKET
    spoken = [base_ns[0], *(t for t in times if base_ns[0] <= t < base_ns[1]), base_ns[1]]
    observed = all(b - a <= s.max_gap_s * NS for a, b in pairwise(spoken))
    known = observed and wall and len(base) >= s.baseline_min_snapshots and sum(per_tick[0]) > 0
    return {
        "added": added,
        "cancelled": cancelled,
        "filled": filled,
        "delta_liq": added - cancelled - filled,
        "replenishment_ratio": added / (cancelled + filled + 1e-6),
        "wall_ratio": size / len(wall) / (sum(per_tick[0]) / sum(per_tick[1])) if known else math.nan,
    }


def random_market(rng: np.random.Generator, n: int) -> tuple[BookSnapshots, SessionTape]:
    times = np.unique(T0 + rng.integers(-40, 60, n) * BUCKET) + rng.integers(0, BUCKET)
    sides: dict[int, list[list[tuple[int, int]]]] = {1: [], -1: []}
    middle = 0
    for _ in times:
        middle += int(rng.integers(-4, 5))
        for sign, books in sides.items():
            count = int(rng.choice([0, 4, 10], p=[0.1, 0.2, 0.7]))
            ticks = middle + sign * np.cumsum(rng.integers(1, 3, count))
            books.append([(int(t), int(rng.integers(1, 200))) for t in ticks])
    m = int(rng.integers(0, 60))
    trades = np.stack(
        [
            np.sort(T0 + rng.integers(-NS, 15 * NS, m)),
            rng.integers(-12, 13, m),
            rng.integers(1, 90, m),
            rng.integers(-1, 2, m),
        ]
    )
    return book(times.tolist(), sides[1], sides[-1]), tape(trades.T.tolist())


def assert_equal(f: BarrierFeatures, i: int, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert getattr(f, name)[i] == pytest.approx(value, rel=1e-12, nan_ok=True), name


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 40))
def test_agrees_with_a_plain_loop(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    snapshots, trades = random_market(rng, n)
    t0 = T0 + rng.integers(-3, 8, 6) * BUCKET + rng.choice([0, 77, 200_000_000], 6)
    level = LEVEL + rng.integers(-6, 7, 6) * TICK + rng.choice([0, 0, 1_000_003], 6)
    sign = rng.choice([1, -1], 6).astype(np.int8)
    end = t0 + rng.integers(0, 20, 6) * NS + rng.choice([0, 99, 200_000_000], 6)
    s = BarrierSettings(window_s=10, baseline_s=6, baseline_min_snapshots=2, max_gap_s=int(rng.integers(1, 8)))
    f = barrier_features(snapshots, trades, t0, level, sign, ES, s, end)
    for i in range(6):
        assert_equal(f, i, plain(snapshots, trades, int(t0[i]), int(level[i]), int(sign[i]), s, int(end[i])))
    assert np.array_equal(f.delta_liq, f.added - f.cancelled - f.filled, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_market_upside_down_has_the_same_barrier(seed: int) -> None:
    rng = np.random.default_rng(seed)
    snapshots, trades = random_market(rng, 30)

    def flip(px: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(px == NONE, NONE, 2 * LEVEL - px)

    mirrored = replace(
        snapshots,
        bid_px_e9=flip(snapshots.ask_px_e9),
        bid_sz=snapshots.ask_sz,
        ask_px_e9=flip(snapshots.bid_px_e9),
        ask_sz=snapshots.bid_sz,
    )
    opposite = replace(trades, price_e9=flip(trades.price_e9), side=-trades.side)
    a, b = one(snapshots, trades, 1), one(mirrored, opposite, -1)
    for name, values in a.columns().items():
        assert np.array_equal(values, b.columns()[name], equal_nan=name != "barrier_state"), name


def esh4(real_data: Path) -> tuple[NDArray[np.void], SessionTape]:
    folder = real_data / "es-book-2023"
    if not folder.is_dir():
        pytest.skip("the ESH4 order book of 2023-12-25 is not among the real data")
    tape = SessionTape.of_records(read_records(folder / "glbx-mdp3-20231225.trades.dbn.zst"))
    return read_records(folder / "glbx-mdp3-20231225.mbp-10.dbn.zst"), tape


def esh4_touches(trades: SessionTape) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int8]]:
    """A touch each minute at the price just traded, from below and from above."""
    minutes = np.arange(trades.ts_ns[0] // (60 * NS) + 5, trades.ts_ns[-1] // (60 * NS) - 4) * 60 * NS
    price = trades.price_e9[np.searchsorted(trades.ts_ns, minutes) - 1]
    return np.repeat(minutes, 2), np.repeat(price, 2), np.tile([1, -1], len(minutes)).astype(np.int8)


def test_real_hour_agrees_with_a_plain_loop(real_data: Path) -> None:
    records, trades = esh4(real_data)
    snapshots = snapshots_of_records(records, 17077)
    t0, level, sign = esh4_touches(trades)
    f = barrier_features(snapshots, trades, t0, level, sign, ES)
    assert np.isfinite(f.delta_liq).mean() > 0.95
    gap_ns, baseline_ns = BarrierSettings().max_gap_s * NS, BarrierSettings().baseline_s * NS
    # silent for minutes on end before the market opens, and never again
    whole_ns = snapshots.ts_ns[1:][np.diff(snapshots.ts_ns) > gap_ns][-1] + baseline_ns
    assert np.isfinite(f.wall_ratio)[t0 >= whole_ns].mean() > 0.9
    assert np.isnan(f.wall_ratio[t0 < whole_ns - gap_ns]).all()
    assert 0.5 < np.nanmedian(f.wall_ratio) < 2
    for i in range(0, len(t0), 23):
        expected = plain(snapshots, trades, int(t0[i]), int(level[i]), int(sign[i]), BarrierSettings(), 2**62)
        assert_equal(f, i, expected)


def test_real_hour_cut_off_at_a_windows_end_gives_the_same_values(real_data: Path) -> None:
    records, trades = esh4(real_data)
    whole = snapshots_of_records(records, 17077)
    t0, level, sign = esh4_touches(trades)
    # Windows that the cap of the input cuts within a bucket are tested too: input known by then and a cap there must agree.
    for i in range(0, len(t0), 9):
        for end in (int(t0[i]) + 240 * NS, int(t0[i]) + 100 * NS + 123_456_789):
            part = snapshots_of_records(records[records["ts_recv"] < end], 17077)
            n = int(np.searchsorted(trades.ts_ns, end))
            seen = SessionTape(trades.ts_ns[:n], trades.price_e9[:n], trades.size[:n], trades.side[:n])
            at, cap = slice(i, i + 1), np.array([end])
            a = barrier_features(part, seen, t0[at], level[at], sign[at], ES, end_ns=cap)
            b = barrier_features(whole, trades, t0[at], level[at], sign[at], ES, end_ns=cap)
            for name in ("state", "delta_liq", "replenishment_ratio", "wall_ratio", "snapshot_count", "baseline_count"):
                assert np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True), name


def test_real_file_streams_into_the_same_features(real_data: Path) -> None:
    records, trades = esh4(real_data)
    path = real_data / "es-book-2023" / "glbx-mdp3-20231225.mbp-10.dbn.zst"
    touches = esh4_touches(trades)
    a = barrier_features(book_snapshots(path, 17077), trades, *touches, ES)
    b = barrier_features(snapshots_of_records(records, 17077), trades, *touches, ES)
    assert np.array_equal(a.wall_ratio, b.wall_ratio, equal_nan=True)
    assert np.array_equal(a.delta_liq, b.delta_liq, equal_nan=True)
