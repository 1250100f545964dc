"""The block-skipping label scan and its gaps against plain loops, and a gap of the tape in a whole session."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spymaster_assets.settings import DELAYS_S, MINUTE_NS, NS, LabelSettings
from spymaster_assets.signals import labels as lab
from spymaster_assets_tests.builders import Built, build_folder, dbn_bytes, minute_tape, ohlcv, session_of


def plain(prices: np.ndarray, times: np.ndarray, t1: int, level: int, limits: tuple[int, int], forward: int) -> tuple:
    before = [p for p, t in zip(prices, times, strict=True) if t <= t1]
    inside = [(p, t) for p, t in zip(prices, times, strict=True) if t1 < t <= t1 + forward]
    if not before or not inside:
        return ()
    walk = [(before[-1], t1), *inside]
    crossed = []
    for sign in (1, -1):
        for limit in limits:
            hit = [t for p, t in walk if sign * (p - level) >= limit]
            crossed.append((hit[0] - t1) / 1e9 if hit else None)
    top, bottom = max(p for p, _ in walk), min(p for p, _ in walk)
    return (max(top - level, 0), max(level - bottom, 0), *crossed, inside[-1][0])


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 4000),
    level=st.integers(-40, 40),
    limits=st.tuples(st.integers(1, 30), st.integers(1, 60)),
    forward=st.integers(1, 3000),
)
def test_scan_equals_a_plain_loop(seed: int, n: int, level: int, limits: tuple[int, int], forward: int) -> None:
    rng = np.random.default_rng(seed)
    times = np.sort(rng.integers(0, 4000, n)).astype(np.int64)
    prices = np.cumsum(rng.integers(-2, 3, n)).astype(np.int64)
    path = lab.Path("trades", times, times, prices, prices, prices)
    t1 = rng.integers(0, 4000, 5).astype(np.int64)
    e = lab.measure(
        path, t1, np.full(5, level, np.int64), np.tile(np.array(limits, np.int64), (5, 1)), forward, 10**9, 1, 1
    )
    for i in range(5):
        expected = plain(prices, times, int(t1[i]), level, limits, forward)
        assert bool(e.complete[i]) == bool(expected)
        if expected:
            found = [e.up[i], e.down[i], *e.crossed_up[i], *e.crossed_down[i], e.last[i]]
            assert [None if np.isnan(v) else float(v) for v in found] == [
                None if v is None else float(v) for v in expected
            ]


@settings(max_examples=200, deadline=None)
@given(
    seen=st.lists(st.booleans(), min_size=1, max_size=30),
    t1=st.integers(2, 26),
    forward=st.integers(1, 10),
    allowed=st.integers(0, 4),
    within_ns=st.integers(0, MINUTE_NS - 1),
)
def test_missing_minutes_equal_a_plain_loop(
    seen: list[bool], t1: int, forward: int, allowed: int, within_ns: int
) -> None:
    times = np.array([m * MINUTE_NS + within_ns for m, is_seen in enumerate(seen) if is_seen], np.int64)
    price = np.full(len(times), 5 * 10**11)
    minutes = [m < len(seen) and seen[m] for m in range(t1 - 1, t1 + forward)]
    longest = max((len(list(run)) for is_seen, run in groupby(minutes) if not is_seen), default=0)
    path = lab.Path("trades", times, times, price, price, price)
    at = np.array([t1 * MINUTE_NS])
    found = path.observed(at, at + forward * MINUTE_NS, allowed)
    assert found.tolist() == [longest <= allowed]


KEY, MORNING_MIN, GAP_MIN = "2024-03-12", 150, range(60, 63)


def gapped(folder: Path, schema: str, lost: range, label: LabelSettings) -> Built:
    """A morning that swings by two dollars around a round one, without some of its minutes."""
    session = session_of("SPY", KEY)
    opens_ns = session.regular_open_ns
    walk = 500 + 2 * np.sin(np.arange(MORNING_MIN + 1) / 5)
    records = minute_tape(opens_ns, walk.tolist(), per_minute=12)
    if schema != "trades":
        starts = [opens_ns + m * MINUTE_NS for m in range(MORNING_MIN)]
        price = records["price"].reshape(MORNING_MIN, 12)
        of = zip(price[:, 0], price.max(axis=1), price.min(axis=1), price[:, -1], strict=True)
        records = ohlcv(starts, [list(map(int, row)) for row in of], [100] * MORNING_MIN)
    minute = (records["ts_event"].astype(np.int64) - opens_ns) // MINUTE_NS
    kept = records[~np.isin(minute, list(lost))]
    folder.mkdir()
    stated = {"start_ns": session.open_ns, "end_ns": session.close_ns}
    (folder / "a.dbn.zst").write_bytes(dbn_bytes(kept, schema, **stated))
    return build_folder(folder, "SPY", KEY, KEY, label=label)[-1]


@pytest.mark.parametrize("schema", ["trades", "ohlcv-1m"])
def test_a_label_window_that_a_gap_of_the_tape_reaches_into_is_undefined(tmp_path: Path, schema: str) -> None:
    label = LabelSettings()
    built = gapped(tmp_path / "gap", schema, GAP_MIN, label)
    opens_ns = built.session.regular_open_ns
    missing = [t for t in built.registration.missing_regular_minutes if t < f"{KEY}T16:00:00Z"]
    assert missing == [f"{KEY}T14:{m:02d}:00Z" for m in (30, 31, 32)]  # New York keeps summer time: the 60th minute
    whole = gapped(tmp_path / "whole", schema, range(0), label).signals.frame
    allowing = gapped(tmp_path / "allowing", schema, GAP_MIN, replace(label, max_missing_min=len(GAP_MIN))).signals
    frame = built.signals.frame
    gap_ns = [opens_ns + (GAP_MIN[0]) * MINUTE_NS, opens_ns + (GAP_MIN[-1] + 1) * MINUTE_NS]
    for delay, delay_s in DELAYS_S.items():
        outcome, t1 = pl.col(f"outcome_{delay}"), pl.col("ts_ns") + delay_s * NS
        # the minute before t1 holds the anchor
        meets = (t1 - MINUTE_NS < gap_ns[1]) & (t1 + label.look_forward_s * NS > gap_ns[0])
        over = t1 + label.look_forward_s * NS > built.registration.observed_until_ns
        hit = frame.filter(meets)
        assert hit.height > 1
        assert set(hit[f"outcome_{delay}"]) == {"UNDEFINED"}
        assert hit[f"strength_signed_{delay}"].null_count() == hit.height
        assert allowing.frame.filter(meets, outcome == "UNDEFINED").is_empty()
        clear = frame.filter(~meets & ~over)
        assert clear.filter(t1 > gap_ns[1]).height > 3
        assert clear.filter(outcome == "UNDEFINED").is_empty()
        after = pl.col("ts_ns") >= gap_ns[0] - 20 * MINUTE_NS
        same = ["event_id", f"outcome_{delay}", f"strength_signed_{delay}"]
        assert clear.filter(~after).select(same).equals(whole.filter(~meets & ~over & ~after).select(same))
        told = built.signals.metadata["undefined_labels"][delay]
        assert told["missing minutes"] == hit.filter(~over).height
        assert sum(told.values()) == frame.filter(outcome == "UNDEFINED").height
        assert "missing minutes" not in allowing.metadata["undefined_labels"][delay]
