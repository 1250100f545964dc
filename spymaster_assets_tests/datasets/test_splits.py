"""Walk-forward splits against brute-force twins, and purge and embargo against purgedcv."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import polars as pl
import purgedcv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spymaster_assets.datasets.splits import (
    TIMES,
    SplitManifest,
    asof_sessions,
    build_manifest,
    check_fold,
    plan_split,
)
from spymaster_assets.errors import SplitError
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.simulate import write_market
from spymaster_assets.settings import MINUTE_NS, SplitSettings
from spymaster_assets_tests.builders import CALENDARS, FOLD, build_folder, concat

SESSIONS = CALENDARS["SPY"].sessions("2024-01-02", "2024-06-28")
HALF_DAYS = [CALENDARS["SPY"].session(k) for k in CALENDARS["SPY"].sessions("2024-11-22", "2024-12-06")]
"""Two weeks around the half day after Thanksgiving, 2024-11-29."""
DAY_MIN = 24 * 60
WINDOWS = st.sampled_from(["rolling", "expanding"])
SCHEDULES = st.builds(
    SplitSettings,
    window=WINDOWS,
    train_sessions=st.integers(1, 30),
    validation_sessions=st.integers(1, 8),
    embargo_sessions=st.integers(0, 3),
    retrain_every_sessions=st.integers(1, 10),
)


def roles_by_walking(sessions: Sequence[str], asof: str, s: SplitSettings) -> dict[str, str]:
    """Role of each session before `asof`, counted back from it one by one."""
    roles = {}
    for n, key in enumerate(reversed(sessions[: sessions.index(asof)])):
        if n < s.embargo_sessions or 0 <= n - s.embargo_sessions - s.validation_sessions < s.embargo_sessions:
            roles[key] = "embargoed"
        elif n < s.embargo_sessions + s.validation_sessions:
            roles[key] = "validation"
        elif s.window == "expanding" or n < 2 * s.embargo_sessions + s.validation_sessions + s.train_sessions:
            roles[key] = "train"
        else:
            roles[key] = "unused"
    return roles


@settings(max_examples=500, deadline=None, derandomize=True)
@given(s=SCHEDULES, at=st.integers(0, len(SESSIONS) - 1))
def test_plan_equals_a_walk_over_the_calendar(s: SplitSettings, at: int) -> None:
    if at < s.train_sessions + s.validation_sessions + 2 * s.embargo_sessions:
        with pytest.raises(SplitError, match=f"there are {at} earlier sessions"):
            plan_split(SESSIONS, SESSIONS[at], s)
        return
    plan = plan_split(SESSIONS, SESSIONS[at], s)
    roles = roles_by_walking(SESSIONS, SESSIONS[at], s)
    for part in ("train", "validation", "embargoed"):
        assert list(getattr(plan, part)) == sorted(k for k, r in roles.items() if r == part)
    assert list(plan.test) == SESSIONS[at : at + s.retrain_every_sessions]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(s=SCHEDULES)
def test_the_schedule_tests_each_session_once_and_never_one_that_was_learnt_from(s: SplitSettings) -> None:
    folds = [plan_split(SESSIONS, a, s) for a in asof_sessions(SESSIONS, s)]
    assert [k for f in folds for k in f.test] == SESSIONS[s.history_sessions :]
    seen = [{*f.train, *f.validation, *f.embargoed} for f in folds]
    for n, fold in enumerate(folds):
        assert not set().union(*seen[: n + 1]) & set(fold.test)
        at = SESSIONS.index(fold.asof)
        assert seen[n] == set(SESSIONS[0 if s.window == "expanding" else at - s.history_sessions : at])
        assert len(fold.validation) == s.validation_sessions
        assert s.window == "expanding" or len(fold.train) == s.train_sessions
    if s.window == "expanding":
        assert all(set(a.train) < set(b.train) for a, b in combinations(folds, 2))


@st.composite
def folds_with_rows(draw: st.DrawFn) -> tuple[SplitSettings, int, list[tuple[str, int, int]]]:
    """A schedule, the number of its as-of session, and (session, decision_ns, label_known_ns) of rows around a half day.

    Sessions may be empty or reach into each other's hours; labels take no time, minutes or days, or end when another row decides.
    """
    s = SplitSettings(*(draw(x) for x in (WINDOWS, st.integers(1, 3), st.integers(1, 2), st.integers(0, 2))))
    asof = min(s.history_sessions + draw(st.integers(0, 2)), len(HALF_DAYS) - 1)
    # most sessions keep their hours
    shift_days = draw(st.lists(st.sampled_from([0, 0, 0, -1, 1, 4]), min_size=asof + 1, max_size=asof + 1))
    drawn = draw(
        st.lists(
            st.tuples(
                st.integers(0, asof),
                st.integers(1, 389),
                st.sampled_from([0, 16, 390, DAY_MIN, 4 * DAY_MIN, None, None]),
                st.integers(0, 9),
            ),
            min_size=8,
            max_size=24,
        )
    )
    decided = []
    for at, minute, _, _ in drawn:
        ns = min(HALF_DAYS[at].regular_open_ns + minute * MINUTE_NS, HALF_DAYS[at].regular_close_ns)
        decided.append(ns + shift_days[at] * DAY_MIN * MINUTE_NS)
    ends = sorted({*decided, HALF_DAYS[asof].regular_open_ns})
    rows = []
    for (at, _, minutes, n), ns in zip(drawn, decided, strict=True):
        later = [t for t in ends if t >= ns]
        known = later[n % len(later)] if minutes is None else ns + minutes * MINUTE_NS
        rows.append((HALF_DAYS[at].key, ns, known))
    return s, asof, rows


def as_table(rows: Sequence[tuple[str, int, int]]) -> pl.DataFrame:
    ids = [f"{n:03d}" for n in range(len(rows))]
    schema = dict(zip(TIMES, (pl.String, pl.String, pl.Int64, pl.Int64), strict=True))
    return pl.DataFrame([(i, *r) for i, r in zip(ids, rows, strict=True)], schema=schema, orient="row")


def kept_by_definition(
    rows: Sequence[tuple[str, int, int]], roles: dict[str, str], first_test_ns: int
) -> dict[str, set[str]]:
    """Rows of train and validation sessions whose label is complete before every decision of every later part."""
    kept: dict[str, set[str]] = {"train": set(), "validation": set()}
    for n, (date, _, known_ns) in enumerate(rows):
        part = roles.get(date)
        if part not in kept or known_ns >= first_test_ns:
            continue
        if part == "train" and any(roles.get(d) == "validation" and known_ns >= decided for d, decided, _ in rows):
            continue
        kept[part].add(f"{n:03d}")
    return kept


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(drawn=folds_with_rows())
def test_purge_and_embargo_equal_their_definition(
    drawn: tuple[SplitSettings, int, list[tuple[str, int, int]]],
) -> None:
    s, asof, rows = drawn
    keys = [d.key for d in HALF_DAYS]
    session = HALF_DAYS[asof]
    first_ns = session.regular_open_ns
    roles = roles_by_walking(keys, session.key, s)
    kept = kept_by_definition(rows, roles, first_ns)
    plan = plan_split(keys, session.key, s)
    table = as_table(rows)
    used = table.filter(pl.col("date").is_in([*plan.train, *plan.validation]))
    inputs = dict.fromkeys([*plan.train, *plan.validation], "x")
    if not kept["train"] or not kept["validation"]:
        with pytest.raises(SplitError, match=r"has no rows|purging leaves no"):
            build_manifest(plan, used, inputs, first_ns)
        return
    manifest = build_manifest(plan, used, inputs, first_ns)
    gone = {p["event_id"] for p in manifest.purged}
    left = used.filter(~pl.col("event_id").is_in(list(gone)))
    train, validation = (left.filter(pl.col("date").is_in(list(p))) for p in (manifest.train, manifest.validation))
    assert {"train": set(train["event_id"]), "validation": set(validation["event_id"])} == kept
    assert manifest.rows == {p: sum(roles.get(d) == p for d, _, _ in rows) for p in ("train", "validation")}
    assert SplitManifest.from_json(manifest.to_json()) == manifest
    check_fold(manifest, train, validation)
    for n in sorted(gone)[:1]:
        row = used.filter(pl.col("event_id") == n)
        is_train = row["date"][0] in manifest.train
        with pytest.raises(SplitError, match=f"{'train' if is_train else 'validation'} row {n} of .* was purged"):
            check_fold(manifest, *((train.vstack(row), validation) if is_train else (train, validation.vstack(row))))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """Times of the touches of nine simulated sessions: five of a week, four of the next, which has a holiday."""
    folder = tmp_path_factory.mktemp("dbn")
    keys = SESSIONS[4:13]
    write_market(folder, instrument("SPY"), [CALENDARS["SPY"].session(k) for k in keys], seed=5)
    return concat(build_folder(folder, "SPY", keys[0], keys[-1])).select(TIMES)


def by_purgedcv(
    table: pl.DataFrame, train: Sequence[str], test: Sequence[str], embargoed: Sequence[str], tie_ns: int = 1
) -> set[str]:
    """Rows of `train` that purgedcv leaves for the later block `test`, with the sessions in between as candidates too.

    Three things differ and are translated here. Label windows are half-open there, so a label that is complete exactly at a decision is
    kept; here it must be complete *before*, so windows end tie_ns = 1 ns later. Their embargo follows a test block; here it precedes one:
    the times run backwards. It has a duration there and counts sessions here: from the first embargoed decision to the first of the block.
    """
    rows = table.filter(pl.col("date").is_in([*train, *embargoed, *test]))
    block, decided = rows["date"].is_in(list(test)).to_numpy(), rows["decision_ns"].to_numpy()
    known = rows["label_known_ns"].to_numpy() + tie_ns
    kept, at = np.flatnonzero(~block), np.flatnonzero(block)
    kept = purgedcv.purge(kept, at, pd.to_datetime(decided), pd.to_datetime(known))
    if embargoed:
        backwards = pd.to_datetime(decided.max() - decided)
        first = rows.filter(pl.col("date").is_in(list(embargoed)))["decision_ns"].min()
        kept = purgedcv.apply_embargo(kept, at, backwards, backwards, pd.Timedelta(decided[block].min() - first, "ns"))
    return set(rows["event_id"].gather(kept))


@pytest.mark.parametrize(
    ("hours", "embargo", "purged"),
    [
        (0, 0, set()),
        (18, 0, {"train", "validation"}),
        (44, 0, {"train", "validation"}),
        (18, 1, set()),
        (44, 1, {"train", "validation"}),
    ],
)
def test_purge_and_embargo_drop_what_purgedcv_drops(
    simulated: pl.DataFrame, hours: int, embargo: int, purged: set[str]
) -> None:
    plan = plan_split(SESSIONS[4:13], SESSIONS[10 + embargo], SplitSettings("rolling", 3, 2, embargo, 2))
    first_ns = simulated.filter(pl.col("date") == plan.asof)["decision_ns"].min()
    table = simulated.with_columns(pl.col("label_known_ns") + hours * 60 * MINUTE_NS)
    used = table.filter(pl.col("date").is_in([*plan.train, *plan.validation]))
    gap = plan.embargoed[:embargo], plan.embargoed[embargo:]
    before_validation = by_purgedcv(table, plan.train, plan.validation, gap[0])
    theirs = {
        "train": before_validation & by_purgedcv(table, plan.train, plan.test, ()),
        "validation": by_purgedcv(table, plan.validation, plan.test, gap[1]),
    }
    manifest = build_manifest(plan, used, {}, first_ns)
    gone = {p["event_id"] for p in manifest.purged}
    for part, kept in theirs.items():
        rows = used.filter(pl.col("date").is_in(list(getattr(manifest, part))))
        assert set(rows["event_id"]) - gone == kept
    assert {p["part"] for p in manifest.purged} == purged


def test_a_label_complete_at_the_first_decision_is_purged_here_and_kept_by_purgedcv(simulated: pl.DataFrame) -> None:
    plan = plan_split(SESSIONS[4:13], SESSIONS[11], SplitSettings("rolling", 3, 2, 0, 2))
    first_ns = simulated.filter(pl.col("date") == plan.validation[0])["decision_ns"].min()
    tied = simulated.filter(pl.col("date").is_in(list(plan.train)))["event_id"][5]
    table = simulated.with_columns(
        pl.when(pl.col("event_id") == tied).then(first_ns).otherwise("label_known_ns").alias("label_known_ns")
    )
    used = table.filter(pl.col("date").is_in([*plan.train, *plan.validation]))
    manifest = build_manifest(plan, used, {}, CALENDARS["SPY"].session(plan.asof).regular_open_ns)
    assert [p["event_id"] for p in manifest.purged] == [tied]
    assert tied in by_purgedcv(table, plan.train, plan.validation, (), tie_ns=0)
    assert tied not in by_purgedcv(table, plan.train, plan.validation, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ()}, "train part is empty"),
        ({"validation": ("2024-02-02", "2024-02-01")}, "not in order"),
        ({"train": ("2024-01-02", "2024-02-01")}, "train and validation overlap"),
        ({"test": ("2024-02-06",)}, "test starts on"),
        ({"embargoed": ("2024-01-02",)}, "embargoed sessions are used"),
        ({"first_test_decision_ns": 1_709_000_000_000_000_000}, "first test decision is on 2024-02-27"),
        ({"inputs": {"2024-01-02": "x"}}, "input hashes"),
    ],
)
def test_disorder_is_refused(change: dict, message: str) -> None:
    good = SplitManifest(
        "2024-02-05",
        "rolling",
        ("2024-01-02", "2024-01-03"),
        ("2024-02-01", "2024-02-02"),
        ("2024-02-05",),
        ("2024-01-31",),
    )
    with pytest.raises(SplitError, match=message):
        replace(good, **change)
    with pytest.raises(SplitError, match=message):
        SplitManifest.from_json({**good.to_json(), **change})


def test_what_is_no_manifest_is_refused() -> None:
    good = FOLD.to_json()
    assert SplitManifest.from_json(good) == FOLD
    for change in (
        {"train": [20240102]},
        {"train": 5},
        {"purged": ["0-001"]},
        {"purged": [{"part": "train"}]},
        {"first_test_decision_ns": "soon"},
        {"first_test_decision_ns": 10**30},
        {"asof": None},
        {"colour": "red"},
    ):
        with pytest.raises(SplitError, match=r"not a split manifest|test starts on"):
            SplitManifest.from_json({**good, **change})
    for name in ("asof", "train", "purged", "first_test_decision_ns"):
        with pytest.raises(SplitError, match="not a split manifest"):
            SplitManifest.from_json({k: v for k, v in good.items() if k != name})
