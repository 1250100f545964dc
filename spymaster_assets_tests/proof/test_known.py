"""Rows that are certain, and rows that may be: what of them is compared at which cut."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spymaster_assets.proof.known import KnownTable, compare

BAR = 60
Bars = dict[int, list[int]]
"""The levels of each bar by its start."""


def levels(bars: Bars) -> KnownTable:
    """Levels known when their bar starts, in rows that are certain when it has ended."""
    rows = [(start, level) for start in sorted(bars) for level in bars[start]]
    frame = pl.DataFrame(rows, schema={"start": pl.Int64, "level": pl.Int64}, orient="row")
    start = frame["start"].to_numpy()
    return KnownTable(frame, start + BAR, {"level": start}, "start", ("start",))


@pytest.mark.parametrize(
    ("cut", "replayed", "found", "count"),
    [
        (99, {100: [9]}, [], 0),  # nothing is known yet
        (100, {100: [9]}, ["level"], 1),
        (130, {100: [9]}, ["level"], 1),
        (130, {100: [7, 8]}, ["level"], 1),  # the levels of a bar are known as a whole
        (130, {100: [7]}, [], 1),
        (159, {}, [], 0),  # the bar may turn out not to be
        (130, {160: [9]}, [], 0),
        (160, {}, ["start"], 1),  # it is certain
        (160, {100: [9]}, ["level"], 2),
    ],
)
def test_a_row_that_may_be_is_compared_where_both_hold_it(
    cut: int, replayed: Bars, found: list[str], count: int
) -> None:
    differs, values = compare("levels", "k", levels({100: [7], 160: [8]}), levels(replayed), cut)
    assert [d.column for d in differs] == found
    assert values == count


def test_without_a_key_nothing_is_known_before_its_row_is_certain() -> None:
    stored, other = (replace(levels({100: [level]}), key=()) for level in (7, 9))
    assert compare("levels", "k", stored, other, 130) == ([], 0)


_BARS = st.dictionaries(st.sampled_from([0, 60, 120, 180]), st.lists(st.integers(0, 1), min_size=1, max_size=2))


@given(_BARS, _BARS, st.integers(-10, 250))
def test_the_comparison_is_that_of_its_definition(stored: Bars, replayed: Bars, cut: int) -> None:
    certain = [{s: bars[s] for s in sorted(bars) if s + BAR <= cut} for bars in (stored, replayed)]
    both = {s for s in {*stored} & {*replayed} if s <= cut < s + BAR}
    same = certain[0] == certain[1] and all(stored[s] == replayed[s] for s in both)
    found, count = compare("levels", "k", levels(stored), levels(replayed), cut)
    assert (not found) is same
    if same:
        assert count == 2 * sum(map(len, certain[0].values())) + sum(len(stored[s]) for s in both)
