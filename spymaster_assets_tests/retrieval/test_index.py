"""Exact kNN against brute force, with filters, the per-session cap and the as-of rule."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from spymaster_assets.datasets.matrix import encode
from spymaster_assets.errors import ArtifactError, ModelError, SplitError
from spymaster_assets.retrieval.index import ARRAYS, INDEX, RetrievalIndex, build_index
from spymaster_assets.settings import RetrievalSettings
from spymaster_assets_tests.builders import CONTRACT, FOLD, dates_of, touch_times

KINDS = ["PM_HIGH", "VWAP", "ROUND"]


def rows(n: int, seed: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n)
    sign = rng.choice([-1, 1], n)
    dates = dates_of(n, seed)
    return CONTRACT.conform(
        pl.DataFrame(
            {
                "event_id": [f"{seed}-{i:04d}" for i in range(n)],
                "date": dates,
                **touch_times(dates),
                "level_kind": np.array([0, 7, 8])[kind],
                "level_kind_name": np.array(KINDS)[kind],
                "direction_sign": sign,
                "direction": np.where(sign > 0, "UP", "DOWN"),
                "atr": rng.gamma(2, 1, n),
                "approach_velocity": np.where(rng.random(n) < 0.1, np.nan, rng.normal(0, 5, n)),
                "volatility": rng.normal(0, 0.01, n),
                "prior_touches": rng.integers(0, 9, n),
                "is_first_15m": np.zeros(n, bool),
                "outcome_4min": rng.choice(["BREAK", "BOUNCE", "CHOP", "UNDEFINED"], n, p=[0.3, 0.3, 0.3, 0.1]),
                "strength_signed_4min": rng.normal(0, 1, n),
            },
            nan_to_null=True,
        )
    )


SETTINGS = RetrievalSettings(k=10, max_per_session=2, min_candidates=30)


@pytest.fixture(scope="module")
def index() -> RetrievalIndex:
    return build_index(rows(900, 0), FOLD, CONTRACT, SETTINGS, "4min")


def test_neighbours_equal_brute_force(index: RetrievalIndex) -> None:
    new = rows(40, 6)
    summary, neighbours = index.query(new, CONTRACT)
    past = rows(900, 0).filter(pl.col("outcome_4min") != "UNDEFINED")
    assert len(index.X) == past.height
    X = encode(new, CONTRACT, index.meta["columns"], "A", "4min")[0][:, index.meta["kept"]]
    Q = np.nan_to_num((X - index.center) / index.scale, nan=0.0).astype(np.float32)
    for i in range(new.height):
        kind, sign = new["level_kind"][i], new["direction_sign"][i]
        same = (index.sign == sign) & (index.kind == kind)
        name = "kind and direction"
        if same.sum() < 30:
            same, name = index.sign == sign, "direction"
        distance = np.sqrt(((Q[i].astype(float) - index.X.astype(float)) ** 2).sum(axis=1))
        taken: dict[str, int] = {}
        expected = []
        for j in sorted(np.flatnonzero(same), key=lambda j: (distance[j], j)):
            day = index.date[j]
            if taken.get(day, 0) < 2 and len(expected) < 10:
                taken[day] = taken.get(day, 0) + 1
                expected.append(j)
        found = neighbours.filter(pl.col("event_id") == new["event_id"][i])
        assert found["neighbour_id"].to_list() == [index.event_id[j] for j in expected]
        assert found["distance"].to_numpy() == pytest.approx(distance[expected], rel=1e-6)
        assert summary["filter"][i] == name
        weight = 1 / (distance[expected] + 1e-6)
        weight /= weight.sum()
        assert summary["p_break"][i] == pytest.approx(weight[index.outcome[expected] == "BREAK"].sum(), abs=1e-9)
        assert summary["strength_signed"][i] == pytest.approx((weight * index.strength[expected]).sum())


def test_probabilities_are_coherent(index: RetrievalIndex) -> None:
    summary, neighbours = index.query(rows(60, 2), CONTRACT)
    assert (summary["p_break"] + summary["p_bounce"] - summary["p_tradeable_2"]).abs().max() < 1e-9
    assert summary["entropy"].is_between(0, np.log(3) + 1e-9).all()
    assert summary["effective_n"].is_between(1, 10 + 1e-9).all()
    assert neighbours.group_by("event_id", "date").len()["len"].max() <= 2


def test_rare_kinds_fall_back_and_say_so(index: RetrievalIndex) -> None:
    rare = rows(5, 3).with_columns(pl.lit(12, pl.Int8).alias("level_kind"), pl.lit("SMA_400").alias("level_kind_name"))
    assert set(index.query(rare, CONTRACT)[0]["filter"]) == {"direction"}
    one_sided = build_index(rows(900, 0).filter(pl.col("direction_sign") == 1), FOLD, CONTRACT, SETTINGS, "4min")
    down = rare.with_columns(pl.lit(-1, pl.Int8).alias("direction_sign"))
    assert set(one_sided.query(down, CONTRACT)[0]["filter"]) == {"all"}


def test_a_label_known_too_late_is_refused() -> None:
    late = rows(100, 0).with_columns(
        pl.when(pl.int_range(pl.len()) == 7)
        .then(pl.lit(FOLD.first_test_decision_ns))
        .otherwise(pl.col("label_known_ns"))
        .alias("label_known_ns")
    )
    with pytest.raises(SplitError, match="train row 0-0007: label complete at or after the first test decision"):
        build_index(late, FOLD, CONTRACT, SETTINGS, "4min")


def test_scaling_is_robust_and_constant_columns_go(index: RetrievalIndex) -> None:
    assert "is_first_15m" in index.meta["dropped_constant"]
    names = [index.meta["encoded"][i] for i in index.meta["kept"]]
    column = names.index("atr")
    past = rows(900, 0).filter(pl.col("outcome_4min") != "UNDEFINED")["atr"].to_numpy().astype(np.float32).astype(float)
    low, middle, high = np.quantile(past, [0.25, 0.5, 0.75])
    assert index.center[column] == pytest.approx(middle, rel=1e-5)
    assert index.scale[column] == pytest.approx(high - low, rel=1e-5)


def test_null_rates_are_those_of_the_candidates(index: RetrievalIndex) -> None:
    new = rows(10, 4)
    null = index.null_rates(new)
    for i in range(10):
        same = (index.sign == new["direction_sign"][i]) & (index.kind == new["level_kind"][i])
        inside = index.outcome[same]
        assert null["p_tradeable_2"][i] == pytest.approx(np.isin(inside, ["BREAK", "BOUNCE"]).mean())


def test_round_trip_and_damage(index: RetrievalIndex) -> None:
    files = index.save()
    again = RetrievalIndex.load(files)
    assert again.save() == files
    assert again.query(rows(5, 5), CONTRACT)[0].equals(index.query(rows(5, 5), CONTRACT)[0])
    with pytest.raises(ArtifactError):
        RetrievalIndex.load({**files, ARRAYS: files[ARRAYS][:-50]})
    assert set(files) == {ARRAYS, INDEX}


def test_too_few_rows() -> None:
    with pytest.raises(ModelError, match="at least k = 10"):
        build_index(rows(8, 0), FOLD, CONTRACT, SETTINGS, "4min")
