"""The block-skipping label scan against a plain loop."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spymaster_assets.signals import labels as lab


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
        path, t1, np.full(5, level, np.int64), np.tile(np.array(limits, np.int64), (5, 1)), forward, 10**9, 1
    )
    for i in range(5):
        expected = plain(prices, times, int(t1[i]), level, limits, forward)
        assert bool(e.complete[i]) == bool(expected)
        if expected:
            found = [e.up[i], e.down[i], *e.crossed_up[i], *e.crossed_down[i], e.last[i]]
            assert [None if np.isnan(v) else float(v) for v in found] == [
                None if v is None else float(v) for v in expected
            ]
