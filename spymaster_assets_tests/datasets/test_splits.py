"""Walk-forward splits against a brute-force twin, and purging against purgedcv."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spymaster_assets.datasets.splits import SplitManifest, asof_sessions, build_manifest, check_manifest, plan_split
from spymaster_assets.errors import SplitError
from spymaster_assets.settings import SplitSettings
from spymaster_assets_tests.builders import CALENDARS

SESSIONS = CALENDARS["SPY"].sessions("2024-01-02", "2024-06-28")
NS = 10**9


@settings(max_examples=200, deadline=None)
@given(
    train=st.integers(1, 30),
    validation=st.integers(1, 8),
    embargo=st.integers(0, 3),
    every=st.integers(1, 10),
    at=st.integers(0, len(SESSIONS) - 1),
    window=st.sampled_from(["rolling", "expanding"]),
)
def test_plan_equals_a_walk_over_the_calendar(
    train: int, validation: int, embargo: int, every: int, at: int, window: str
) -> None:
    s = SplitSettings(window, train, validation, embargo, every)  # type: ignore[arg-type]
    if at < train + validation + 2 * embargo:
        with pytest.raises(SplitError, match=f"there are {at} earlier sessions"):
            plan_split(SESSIONS, SESSIONS[at], s)
        return
    plan = plan_split(SESSIONS, SESSIONS[at], s)
    roles = dict.fromkeys(SESSIONS[:at], "train")
    before = list(reversed(SESSIONS[:at]))
    for n, key in enumerate(before):
        if n < embargo or embargo + validation <= n < 2 * embargo + validation:
            roles[key] = "embargoed"
        elif n < embargo + validation:
            roles[key] = "validation"
        elif window == "rolling" and n >= 2 * embargo + validation + train:
            roles[key] = "unused"
    for part in ("train", "validation", "embargoed"):
        assert list(getattr(plan, part)) == [k for k, r in roles.items() if r == part]
    assert list(plan.test) == SESSIONS[at : at + every]


def test_schedule_starts_with_a_whole_history_and_tests_each_session_once() -> None:
    s = SplitSettings(train_sessions=20, validation_sessions=4, embargo_sessions=1, retrain_every_sessions=5)
    folds = asof_sessions(SESSIONS, s)
    assert folds[0] == SESSIONS[26]
    tested = [t for a in folds for t in plan_split(SESSIONS, a, s).test]
    assert tested == SESSIONS[26:]


def rows(labels_end_after_s: int = 960) -> pl.DataFrame:
    keys = SESSIONS[:30]
    parts = []
    for key in keys:
        session = CALENDARS["SPY"].session(key)
        t0 = np.arange(session.regular_open_ns, session.regular_close_ns, 1800 * NS)
        parts.append(
            pl.DataFrame(
                {
                    "event_id": [f"{key}-{n}" for n in range(len(t0))],
                    "date": [key] * len(t0),
                    "decision_ns": t0 + 60 * NS,
                    "label_known_ns": t0 + labels_end_after_s * NS,
                }
            )
        )
    return pl.concat(parts)


@settings(max_examples=60, deadline=None)
@given(end_after_s=st.integers(60, 6 * 86_400), at=st.integers(12, 29), embargo=st.integers(0, 2))
def test_purge_equals_a_plain_loop(end_after_s: int, at: int, embargo: int) -> None:
    s = SplitSettings(train_sessions=6, validation_sessions=2, embargo_sessions=embargo, retrain_every_sessions=3)
    plan = plan_split(SESSIONS, SESSIONS[at], s)
    table = rows(end_after_s)
    used = table.filter(pl.col("date").is_in([*plan.train, *plan.validation]))
    test_open = CALENDARS["SPY"].session(SESSIONS[at]).regular_open_ns
    first_validation = min(r["decision_ns"] for r in used.to_dicts() if r["date"] in plan.validation)
    gone = {
        r["event_id"]
        for r in used.to_dicts()
        if r["label_known_ns"] >= test_open or (r["date"] in plan.train and r["label_known_ns"] >= first_validation)
    }
    inputs = dict.fromkeys([*plan.train, *plan.validation], "x")
    if {e for e in used.filter(pl.col("date").is_in(list(plan.validation)))["event_id"]} <= gone or {
        e for e in used.filter(pl.col("date").is_in(list(plan.train)))["event_id"]
    } <= gone:
        with pytest.raises(SplitError, match="purging leaves no"):
            build_manifest(plan, used, inputs, test_open)
        return
    manifest = build_manifest(plan, used, inputs, test_open)
    assert {p["event_id"] for p in manifest.purged} == gone
    assert all(p["reason"] for p in manifest.purged)
    assert SplitManifest.from_json(manifest.to_json()) == manifest


def test_purge_agrees_with_purgedcv() -> None:
    purgedcv = pytest.importorskip("purgedcv")
    import pandas as pd

    table = rows(3 * 86_400)
    s = SplitSettings(train_sessions=6, validation_sessions=2, embargo_sessions=0, retrain_every_sessions=3)
    plan = plan_split(SESSIONS, SESSIONS[20], s)
    used = table.filter(pl.col("date").is_in([*plan.train, *plan.validation]))
    far = int(used["label_known_ns"].max()) + 1  # type: ignore[arg-type]
    ours = {
        p["event_id"]
        for p in build_manifest(plan, used, dict.fromkeys([*plan.train, *plan.validation], "x"), far).purged
    }
    train = used.filter(pl.col("date").is_in(list(plan.train)))
    validation = used.filter(pl.col("date").is_in(list(plan.validation)))
    purge = getattr(purgedcv, "purge", None)
    if purge is None:
        pytest.skip("this purgedcv has no purge function")
    start, end = (pd.Series(pd.to_datetime(used[c].to_numpy())) for c in ("decision_ns", "label_known_ns"))
    kept = purge(np.arange(train.height), np.arange(train.height, train.height + validation.height), start, end)
    theirs = set(train["event_id"].gather(sorted(set(range(train.height)) - set(np.asarray(kept).tolist()))))
    assert ours == theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ()}, "train part is empty"),
        ({"validation": ("2024-02-02", "2024-02-01")}, "not in order"),
        ({"train": ("2024-01-02", "2024-02-01")}, "train and validation overlap"),
        ({"test": ("2024-02-06",)}, "test starts on"),
        ({"embargoed": ("2024-01-02",)}, "embargoed sessions are used"),
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
    check_manifest(good)
    with pytest.raises(SplitError, match=message):
        check_manifest(replace(good, **change))
