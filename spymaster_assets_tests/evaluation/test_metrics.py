"""Scores against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from spymaster_assets.evaluation.baselines import logistic_probabilities, time_of_day_probabilities
from spymaster_assets.evaluation.calibration import judge, trials, with_outcomes
from spymaster_assets.evaluation.metrics import (
    auc,
    binary_metrics,
    regression_metrics,
    reliability_bins,
    session_bootstrap,
    wilson,
)
from spymaster_assets.models.base import prediction_frame
from spymaster_assets.store import dump_json
from spymaster_assets_tests.builders import CONTRACT


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 200), levels=st.integers(1, 20))
def test_scores_equal_scikit_learn(seed: int, n: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n).astype(float)
    p = (rng.integers(0, levels, n) + 0.5) / levels
    found = binary_metrics(y, p, 0.3)
    assert found["brier"] == pytest.approx(sk.brier_score_loss(y, p))
    assert found["log_loss"] == pytest.approx(sk.log_loss(y, p, labels=[0, 1]))
    if len(np.unique(y)) == 2:
        assert found["auc"] == pytest.approx(sk.roc_auc_score(y, p))
    else:
        assert found["auc"] is None
    dump_json(found)


def test_skill_and_ece_by_hand() -> None:
    y, p = np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.8, 0.2, 0.8, 0.2])
    found = binary_metrics(y, p, 0.5)
    assert found["brier"] == pytest.approx((0.04 + 0.04 + 0.04 + 0.64) / 4)
    assert found["skill"] == pytest.approx(1 - 0.19 / 0.25)
    assert found["ece"] == pytest.approx(0.5 * abs(0.2 - 0.5) + 0.5 * abs(0.8 - 1.0))
    assert found["mce"] == pytest.approx(0.3)
    always = binary_metrics(y, np.full(4, 0.5), 0.5)
    assert always["skill"] == 0.0
    assert binary_metrics(np.empty(0), np.empty(0), 0.5)["n"] == 0


def test_reliability_bins_hold_every_row_once() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(500)
    y = (rng.random(500) < p).astype(float)
    for kind in ("quantile", "uniform"):
        bins = reliability_bins(y, p, kind)
        assert sum(b["count"] for b in bins) == 500
        assert all(b["low"] <= b["observed_rate"] <= b["high"] for b in bins)
    assert {b["count"] for b in reliability_bins(y, p)} == {50}


def test_wilson_by_hand() -> None:
    low, high = wilson(0.5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))


def test_regression_metrics_by_hand() -> None:
    found = regression_metrics(np.array([1.0, -1.0]), np.array([0.5, 0.0]), 0.0)
    assert (found["mae"], found["mae_reference"], found["skill"]) == (0.75, 1.0, 0.25)


def test_bootstrap_resamples_whole_sessions() -> None:
    sessions = np.repeat(np.array([f"d{i}" for i in range(40)]), 25)
    rng = np.random.default_rng(0)
    shared = np.repeat(rng.normal(0, 1, 40), 25)
    interval = session_bootstrap(lambda r: float(shared[r].mean()), sessions)
    assert interval is not None
    assert interval[1] - interval[0] > 0.4  # 40 independent values, not 1,000
    assert session_bootstrap(lambda r: 1.0, np.array(["a", "b"])) is None


def test_auc_of_ties_is_a_half() -> None:
    assert auc(np.array([0.0, 1.0]), np.array([0.5, 0.5])) == 0.5


def test_baselines() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(0, 1, (400, 3)).astype(np.float32)
    y = (X[:, 0] + rng.normal(0, 0.5, 400) > 0).astype(float)
    X[rng.random(X.shape) < 0.05] = np.nan
    p = logistic_probabilities(X[:300], y[:300], X[300:])
    assert p is not None
    score = auc(y[300:], p)
    assert score is not None
    assert score > 0.85
    for rows in (slice(300, 301), slice(300, 307), slice(350, 393)):  # each is that of its row alone, to the last bit
        alone = logistic_probabilities(X[:300], y[:300], X[rows])
        assert alone is not None
        assert alone.tobytes() == p[rows.start - 300 : rows.stop - 300].tobytes()
    assert logistic_probabilities(X, np.zeros(400), X) is None
    rates = time_of_day_probabilities(np.array([0, 10, 40, 40]), np.array([1.0, 1, 0, 0]), np.array([5, 45, 300]))
    assert rates == pytest.approx([12 / 22, 10 / 22, 0.5])


def test_judging_joins_outcomes_and_counts_trials() -> None:
    n = 60
    frame = CONTRACT.conform(
        pl.DataFrame(
            {
                "event_id": [str(i) for i in range(n)],
                "date": [f"2024-01-{2 + i % 6:02d}" for i in range(n)],
                "outcome_4min": (["BREAK", "BOUNCE", "CHOP", "CHOP", "UNDEFINED", "BOUNCE"] * 10),
                "tradeable_2_4min": [True, True, False, False, None, True] * 10,
                "strength_signed_4min": [1.0, -1.0, 0.0, 0.1, None, -2.0] * 10,
                "already_resolved_4min": [False] * n,
            }
        )
    )
    said = [prediction_frame(frame["event_id"], "tradeable_2", "4min", "A", np.linspace(0, 1, n)).with_columns(pl.lit(m).alias("model"))
            for m in ("trees", "logistic")]  # fmt: skip
    said.append(
        prediction_frame(frame["event_id"], "direction", "4min", "A", np.linspace(0, 1, n)).with_columns(
            pl.lit("trees").alias("model")
        )
    )
    outcomes = with_outcomes(pl.concat(said), frame, frame, CONTRACT, "2024-01-02")
    entries = {(e["model"], e["head"]): e for e in judge(outcomes, draws=50)}
    assert entries["trees", "tradeable_2"]["metrics"]["n"] == 50
    assert entries["trees", "tradeable_2"]["metrics"]["base_rate"] == pytest.approx(0.6)
    assert entries["trees", "direction"]["metrics"]["n"] == 30
    assert entries["logistic", "tradeable_2"]["baseline"]
    assert trials(list(entries.values())) == 2
    dump_json(list(entries.values()))
    few = judge(outcomes.filter(pl.col("event_id").cast(int) < 10), draws=10)
    assert all(e["reason"] for e in few)
