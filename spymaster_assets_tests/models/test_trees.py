"""Tree bundles: planted truth found, heads skipped honestly, hashes checked before XGBoost reads a byte."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from spymaster_assets.errors import ModelError
from spymaster_assets.evaluation.metrics import auc
from spymaster_assets.models import registry
from spymaster_assets.models.base import FitReport, Model
from spymaster_assets.models.trees import BoostedTrees
from spymaster_assets.settings import DELAYS_S, TreeSettings
from spymaster_assets_tests.builders import CONTRACT, FOLD, dates_of, touch_times

FAST = TreeSettings(rounds=60, early_stopping_rounds=10, threads=1)


def rows(n: int, seed: int, planted: bool = True) -> pl.DataFrame:
    """Signals rows: tradeable follows volatility, direction follows approach_velocity, tape tells more."""
    rng = np.random.default_rng(seed)
    volatility, velocity, noise = rng.random(n), rng.normal(0, 1, n), rng.normal(0, 1, n)
    tradeable = rng.random(n) < (volatility if planted else 0.5)
    breaks = (velocity if planted else 0) + noise > 0
    outcome = np.where(tradeable, np.where(breaks, "BREAK", "BOUNCE"), "CHOP")
    columns: dict = {
        "event_id": [f"{seed}-{i}" for i in range(n)],
        "date": dates_of(n, seed),
        **touch_times(dates_of(n, seed)),
        "level_kind_name": rng.choice(["PM_HIGH", "VWAP"], n),
        "volatility": volatility,
        "approach_velocity": velocity,
        "tape_imbalance": np.clip(np.where(breaks, 0.4, -0.4) + rng.normal(0, 0.2, n), -1, 1),
        "minutes_since_open": rng.integers(0, 390, n),
    }
    for d in DELAYS_S:
        columns |= {
            f"outcome_{d}": outcome,
            f"tradeable_2_{d}": tradeable,
            f"strength_signed_{d}": np.where(breaks, 1.0, -1.0) * tradeable,
            f"already_resolved_{d}": np.zeros(n, bool),
        }
    return CONTRACT.conform(pl.DataFrame(columns))


@pytest.fixture(scope="module")
def fitted() -> BoostedTrees:
    model = BoostedTrees(FAST, {"asof": "2024-02-01", "provenance": {"git_revision": "abc"}, "data_sha256": "d"})
    model.fit(rows(1500, 0), rows(500, 1), FOLD)
    return model


def test_all_heads_and_what_they_read(fitted: BoostedTrees) -> None:
    assert len(fitted.bundles) == 18
    assert fitted.bundles[0].name == "tradeable_2_2min_stage_a_full"
    for b in fitted.bundles:
        reads_tape = any(f.startswith("tape_") for f in b.meta["features"])
        assert reads_tape == (b.meta["stage"] == "B")
        assert {
            "features",
            "stage",
            "ablation",
            "head",
            "metrics",
            "base_rate",
            "data_sha256",
            "provenance",
            "model_sha256",
        } <= set(b.meta)


def test_planted_truth_is_found_and_confirmation_adds_to_it(fitted: BoostedTrees) -> None:
    new = rows(800, 2)
    table = fitted.predict(new).filter(pl.col("delay") == "4min")
    y = (new["outcome_4min"] == "BREAK").to_numpy().astype(float)
    tradeable = (new["outcome_4min"] != "CHOP").to_numpy()

    def score(head: str, stage: str) -> float:
        p = table.filter((pl.col("head") == head) & (pl.col("stage") == stage))["p"].to_numpy()
        value = auc(y[tradeable], p[tradeable]) if head == "direction" else auc(tradeable.astype(float), p)
        assert value is not None
        return value

    assert score("tradeable_2", "A") > 0.7
    assert score("direction", "A") > 0.75
    assert score("direction", "B") > score("direction", "A") + 0.05


def test_save_load_round_trip(fitted: BoostedTrees) -> None:
    files = fitted.save()
    assert {n.rsplit(".", 1)[1] for n in files} == {"ubj", "json"}
    again = BoostedTrees.load(files)
    assert again.save() == files
    assert again.predict(rows(50, 3)).equals(fitted.predict(rows(50, 3)))


def test_two_fits_give_equal_bytes() -> None:
    one, other = BoostedTrees(FAST), BoostedTrees(FAST)
    for model in (one, other):
        model.fit(rows(300, 0), rows(120, 1), FOLD)
    assert one.save() == other.save()


def test_altered_bytes_are_refused_before_xgboost_sees_them(
    fitted: BoostedTrees, monkeypatch: pytest.MonkeyPatch
) -> None:
    import xgboost

    files = fitted.save()
    name = f"{fitted.bundles[0].name}.ubj"

    def never(*_: object, **__: object) -> None:
        raise AssertionError("XGBoost read unverified bytes")

    monkeypatch.setattr(xgboost.Booster, "load_model", never)
    for damaged in (files[name][:-1], files[name][:100], b"", bytes([files[name][0] ^ 1]) + files[name][1:]):
        with pytest.raises(ModelError, match="was altered"):
            BoostedTrees.load({**files, name: damaged})
    monkeypatch.undo()
    with pytest.raises(ModelError, match="cannot be read"):
        BoostedTrees.load({k: v for k, v in files.items() if k != name})


def test_a_head_with_too_few_positives_is_skipped_with_its_reason() -> None:
    few = rows(400, 0).with_columns(
        pl.when(pl.int_range(pl.len()) < 5).then(pl.lit("BREAK")).otherwise(pl.lit("BOUNCE")).alias("outcome_4min")
    )
    model = BoostedTrees(FAST)
    report = model.fit(few, rows(150, 1), FOLD)
    skipped = [s for s in report.skipped if s["delay"] == "4min" and s["head"] == "direction"]
    assert [s["stage"] for s in skipped] == ["A", "B"]
    assert skipped[0]["reason"] == "5 training rows of the rarer class, 15 are needed"
    assert json.loads(model.save()["metadata.json"])["skipped"] == list(report.skipped)


def test_no_truth_no_skill() -> None:
    model = BoostedTrees(FAST)
    report = model.fit(rows(1500, 0, planted=False), rows(500, 1, planted=False), FOLD)
    low, high = report.metrics["tradeable_2_4min_stage_a_full"]["validation"]["auc_interval"]
    assert low < 0.5 + 0.05
    assert high > 0.5 - 0.05


def test_registry_refuses_clashes() -> None:
    assert registry.get("xgboost") is BoostedTrees
    assert {"boosted_trees", "patchtst"} <= set(registry.names())
    with pytest.raises(ModelError, match="no model family 'nothing'"):
        registry.get("nothing")

    class Impostor(Model):
        name = "other"
        aliases = ("xgboost",)
        needs = "tabular"

        def _fit(self, train: object, validation: object) -> FitReport:
            raise NotImplementedError

        def _predict(self, data: object) -> pl.DataFrame:
            raise NotImplementedError

        def save(self) -> dict[str, bytes]:
            raise NotImplementedError

        @classmethod
        def load(cls, files: object) -> Impostor:  # type: ignore[override]
            raise NotImplementedError

    with pytest.raises(ModelError, match="'xgboost' is taken by BoostedTrees"):
        registry.register(Impostor)
    assert "other" not in registry.names()
