"""Canaries: chance by enumeration, leaks that must be caught, honest folds that must not be blocked, blind detectors that must fail."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import polars as pl
import pytest
from scipy.stats import norm

from spymaster_assets.contract import Contract
from spymaster_assets.evaluation import plots
from spymaster_assets.evaluation.calibration import brier_skill
from spymaster_assets.models.base import SequenceData
from spymaster_assets.models.patchtst import PatchTST
from spymaster_assets.proof import canaries as module
from spymaster_assets.proof.canaries import (
    CANARIES,
    CHANCE,
    Canary,
    Fold,
    noise,
    permuted,
    planted_column,
    planted_declared,
    planted_model,
    planted_patchtst,
    planted_replay,
    production_columns,
    production_sequences,
    run_canaries,
    session_auc,
    shuffled_labels,
    shuffled_labels_patchtst,
    skill_deviation,
    to_json,
)
from spymaster_assets.settings import DELAYS_S, NS, CanarySettings, PatchTSTSettings, RetrievalSettings, TreeSettings
from spymaster_assets.store import dump_json
from spymaster_assets_tests.builders import CONTRACT

FOLDS = int(os.environ.get("SPYMASTER_CANARY_FOLDS", "8"))
OPEN_NS = 1_704_205_800 * NS
DAY_NS = 86_400 * NS
FEATURES = (
    "approach_velocity",
    "approach_distance",
    "prior_touches",
    "distance_signed",
    "volatility",
    "tape_imbalance",
)


def session_rows(day: int, n: int, rng: np.random.Generator) -> pl.DataFrame:
    """n touches of one simulated session: features and outcomes drift together, and rates differ from day to day."""
    regime = rng.normal(0, 1)
    drift = np.cumsum(rng.normal(0, 1, n)) / 3 + regime
    breaks = rng.random(n) < 1 / (1 + np.exp(-drift))
    tradeable = rng.random(n) < 1 / (1 + np.exp(-regime - rng.normal(0, 0.5)))
    move = np.where(breaks, 1.0, -1.0) * np.where(tradeable, 1.5, 0.4) * (1 + rng.random(n) / 4)
    t0 = OPEN_NS + day * DAY_NS + np.sort(rng.choice(370, n, replace=False)).astype(np.int64) * 60 * NS
    columns: dict = {
        "event_id": [f"{day}-{i}" for i in range(n)],
        "date": [f"2024-{1 + day // 28:02d}-{1 + day % 28:02d}"] * n,
        "ts_ns": t0,
        "decision_ns": t0 + 60 * NS,
        **{f"confirm_ts_ns_{d}": t0 + after_s * NS for d, after_s in DELAYS_S.items()},
        "label_known_ns": t0 + 960 * NS,
        "level_kind": rng.integers(0, 3, n),
        "direction_sign": rng.choice([-1, 1], n),
        "threshold_2": np.ones(n),
    }
    for k, name in enumerate(FEATURES):
        values = 0.5 * drift + regime * k / 3 + rng.normal(0, 1, n)
        columns[name] = pl.Series(values, dtype=pl.Float64).scatter(np.flatnonzero(rng.random(n) < 0.1), None)
    for delay in DELAYS_S:
        columns |= {
            f"outcome_{delay}": np.where(tradeable, np.where(breaks, "BREAK", "BOUNCE"), "CHOP"),
            f"tradeable_2_{delay}": tradeable,
            f"strength_signed_{delay}": move,
            f"already_resolved_{delay}": np.zeros(n, bool),
        }
    frame = pl.DataFrame(columns).with_columns(pl.col("prior_touches").round())
    return CONTRACT.conform(frame)


def sequences_of(frame: pl.DataFrame, seed: int) -> SequenceData:
    """Windows of 32 bars whose channels share the drift of the frame's features, and every static feature, most of them noise."""
    rng = np.random.default_rng([8, seed])
    drift = frame["volatility"].fill_null(0.0).to_numpy()[:, None, None]
    outcome = frame["outcome_4min"].to_numpy()
    mask = np.ones((frame.height, 32), np.uint8)
    mask[rng.random(frame.height) < 0.2, :10] = 0
    told = ("direction_sign", *FEATURES)
    names = (*told, *(c.name for c in CONTRACT.features("A", "4min") if c.dtype != "string" and c.name not in told))
    static = rng.normal(0, 1, (frame.height, len(names)))
    static[:, : len(told)] = frame.select(pl.col(told).cast(pl.Float64)).to_numpy()
    return SequenceData(
        X=((drift + rng.normal(0, 1, (frame.height, 32, 3))) * mask[..., None]).astype(np.float32),
        mask=mask,
        static=static.astype(np.float32),
        y_break=np.select([outcome == "BREAK", outcome == "BOUNCE"], [1, 0], -1).astype(np.int8),
        y_strength=frame["strength_signed_4min"].to_numpy().astype(np.float32),
        event_id=frame["event_id"].to_numpy().astype(str),
        ts_ns=frame["ts_ns"].to_numpy().astype(np.int64),
        session=frame["date"].to_numpy().astype(str),
        channel_names=("dist_to_level", "return", "range"),
        static_names=names,
    )


def fold(seed: int, train: int = 12, validation: int = 4, n: int = 40, **canary: float) -> Fold:
    rng = np.random.default_rng([7, seed])
    days = [session_rows(day, n, rng) for day in range(train + validation)]
    parts = pl.concat(days[:train]), pl.concat(days[train:])
    return Fold(
        *parts,
        *(sequences_of(part, 2 * seed + i) for i, part in enumerate(parts)),
        CONTRACT,
        "4min",
        TreeSettings(threads=1),
        RetrievalSettings(),
        PatchTSTSettings(device="cpu"),
        replace(CanarySettings(), **canary),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def honest() -> Fold:
    return fold(0)


def test_auc_within_sessions_by_hand() -> None:
    y, p = np.array([1.0, 0.0]), np.array([0.9, 0.1])
    assert session_auc(y, p, np.array(["a", "a"])) == (1.0, 0.5)  # 0 or 1, each as often
    assert session_auc(y, p, np.array(["a", "b"])) is None


def test_deviations_are_those_of_all_permutations() -> None:
    session = np.array(["a"] * 4 + ["b"] * 3)
    y = np.array([1.0, 0, 0, 1, 1, 0, 0])
    p = np.array([0.2, 0.2, 0.7, 0.4, 0.5, 0.5, 0.1])  # ties in both
    by_pairs = []
    for a, b in product(permutations(y[:4]), permutations(y[4:])):
        wins = pairs = 0.0
        for part, said in ((np.array(a), p[:4]), (np.array(b), p[4:])):
            for i in np.flatnonzero(part > 0):
                for j in np.flatnonzero(part == 0):
                    wins += (said[i] > said[j]) + 0.5 * (said[i] == said[j])
                    pairs += 1
        by_pairs.append(wins / pairs)
    found = session_auc(y, p, session)
    assert found is not None
    assert np.mean(by_pairs) == pytest.approx(0.5)
    assert found[1] == pytest.approx(np.std(by_pairs))
    dealt = [brier_skill(y, np.array(q), np.full(7, 0.4)) for q in permutations(p)]
    assert skill_deviation(y, p, 0.4) == pytest.approx(np.std(dealt))


def test_permuting_keeps_an_event_whole_and_inside_its_session(honest: Fold) -> None:
    twice = pl.concat([honest.pooled, honest.validation])
    labels = [c.name for c in CONTRACT.role("label")]
    rng = np.random.default_rng(1)
    shuffled = permuted(twice, [labels], rng, within="date")
    assert shuffled.drop(labels).equals(twice.drop(labels))
    assert not shuffled["outcome_4min"].equals(twice["outcome_4min"])
    assert shuffled.tail(honest.validation.height).equals(shuffled.slice(honest.train.height, honest.validation.height))
    wanted, found = (frame.head(honest.pooled.height) for frame in (twice, shuffled))
    key = ["date", "outcome_4min", "strength_signed_4min"]
    assert found.select(key).sort(key).equals(wanted.select(key).sort(key))
    other = permuted(honest.pooled, [["volatility"], ["distance_signed"]], rng)
    for name in ("volatility", "distance_signed"):
        assert other[name].sort().equals(honest.pooled[name].sort())
    # columns are dealt apart from each other: which rows miss one says nothing of which miss the other
    moved = [other[name].is_null() != honest.pooled[name].is_null() for name in ("volatility", "distance_signed")]
    assert moved[0].any()
    assert not moved[0].equals(moved[1])


def verdicts(canaries: list[Canary]) -> dict[str, set[str]]:
    return {name: {c.verdict for c in canaries if c.canary == name} for name in {c.canary for c in canaries}}


def test_an_honest_fold_holds_and_gives_equal_bytes(honest: Fold) -> None:
    one, other = (to_json(run_canaries(honest), "2024-02-01", True) for _ in range(2))
    assert dump_json(one) == dump_json(other)
    assert plots.canaries(one["canaries"], "2024-02-01", True) == plots.canaries(other["canaries"], "2024-02-01", True)
    assert one["failed"] == []
    assert {c["verdict"] for c in one["canaries"]} == {"holds"}
    assert list(dict.fromkeys(c["canary"] for c in one["canaries"])) == list(CANARIES)


def z_of(canary: Canary) -> float:
    assert canary.value is not None
    assert canary.high is not None
    assert canary.limit is not None
    assert canary.level is not None
    half = canary.high - canary.value
    return (canary.value - canary.limit) / half * float(norm.ppf((1 + canary.level) / 2))


def test_honest_folds_are_not_blocked_more_often_than_stated() -> None:
    """z of each canary of chance over folds with strong dependence within sessions; SPYMASTER_CANARY_FOLDS asks for more."""
    shuffled, above = [], []
    for seed in range(FOLDS):
        one = fold(seed, permutations=2, noise_draws=1)
        shuffled += [z_of(c) for c in shuffled_labels(one) if c.value is not None]
        above += [z_of(c) for c in noise(one) if c.value is not None]
    z, up = np.array(shuffled), np.array(above)
    assert len(z) >= FOLDS
    assert len(up) >= 2 * FOLDS
    print(
        f"{FOLDS} folds: shuffled mean {z.mean():+.3f} sd {z.std():.3f}, noise mean {up.mean():+.3f} max {up.max():+.2f};",
        *(f"|z|>{b}: {(np.abs(z) > b).mean():.4f} z>{b}: {(up > b).mean():.4f};" for b in (1.645, 1.96, 2.576, 3.29)),
    )
    # four standard errors of what a standard normal would give
    for bound in (1.645, 1.96, 2.576):
        for values, rate in ((np.abs(z), 2 * norm.sf(bound)), (up, norm.sf(bound))):
            assert (values > bound).mean() <= rate + 4 * np.sqrt(rate * (1 - rate) / len(values))
    assert max(np.abs(z).max(), up.max()) < 4.5


def test_patchtst_of_honest_folds_is_at_chance() -> None:
    """z of PatchTST's shuffled labels alone, so that no other canary can hide a wrong variance."""
    tried = [shuffled_labels_patchtst(fold(seed, patchtst_steps=20)) for seed in range(3 * FOLDS)]
    z = np.array([z_of(c) for c in tried if c.value is not None])
    assert len(z) > 2 * FOLDS
    print(
        f"{len(z)} folds: PatchTST of shuffled labels, z mean {z.mean():+.3f} sd {z.std():.3f} max {np.abs(z).max():.2f}"
    )
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert abs(z.std() - 1) < 4 / np.sqrt(2 * len(z))
    assert np.abs(z).max() < 4.5


def test_validation_rows_in_training_are_caught(honest: Fold) -> None:
    leaked = replace(honest, train=pl.concat([honest.train, honest.validation]))
    found = verdicts(shuffled_labels(leaked) + noise(leaked))
    assert found == {name: {"failed"} for name in ("shuffled_labels", "noise_trees", "noise_retrieval")}


def test_validation_sequences_in_training_are_caught(honest: Fold, monkeypatch: pytest.MonkeyPatch) -> None:
    both = SequenceData.concatenate([honest.train_sequences, honest.validation_sequences])
    assert shuffled_labels_patchtst(replace(honest, train_sequences=both)).verdict == "failed"
    # a trainer that takes the rows it is judged on
    fit = PatchTST.fit_unchecked
    greedy = lambda self, train, held: fit(self, SequenceData.concatenate([train, held]), held)  # noqa: E731
    monkeypatch.setattr(PatchTST, "fit_unchecked", greedy)
    assert shuffled_labels_patchtst(honest).verdict == "failed"


def test_a_scaler_that_peeks_at_the_labels_it_is_judged_on_is_caught(
    honest: Fold, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Static columns are centred by class: the class of the rows that are judged may not be known."""
    fit = PatchTST.fit_unchecked

    def encoded(data: SequenceData) -> SequenceData:
        return replace(data, static=data.static + np.where(data.y_break > 0, 1, -1).astype(np.float32)[:, None])

    predict = PatchTST._predict
    monkeypatch.setattr(PatchTST, "fit_unchecked", lambda self, train, held: fit(self, encoded(train), encoded(held)))
    monkeypatch.setattr(PatchTST, "_predict", lambda self, data: predict(self, encoded(data)))
    assert shuffled_labels_patchtst(honest).verdict == "failed"


@pytest.mark.parametrize("part", ["channel", "static column"])
def test_a_lie_in_the_sequences_is_learned(honest: Fold, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    assert planted_patchtst(honest, part).verdict == "holds"
    monkeypatch.setattr(module, "plant_sequences", lambda data, part: data)
    found = planted_patchtst(honest, part)
    assert (found.verdict, found.limit) == ("failed", honest.canary.plausible_auc_a)


@pytest.mark.parametrize("where", ["last bar of return", "atr"])
def test_sequences_that_hold_the_outcome_are_caught(honest: Fold, where: str) -> None:
    """A window that ends too late, and a static column that is joined too late: the side of the approach does not hide it."""

    def leak(data: SequenceData) -> SequenceData:
        X, static = data.X.copy(), data.static.copy()
        if where == "atr":
            side = static[:, data.static_names.index("direction_sign")]
            static[:, data.static_names.index("atr")] = data.y_strength * side
        else:
            X[:, -1, data.channel_names.index("return")] = data.y_strength
        return replace(data, X=X, static=static)

    assert production_sequences(honest).verdict == "holds"
    parts = {n: leak(getattr(honest, n)) for n in ("train_sequences", "validation_sequences")}
    found = production_sequences(replace(honest, **parts))  # type: ignore[arg-type]
    assert found.verdict == "failed"
    assert where in found.reason


def test_power_against_copied_rows() -> None:
    """Share of folds that are blocked when 40 % of the validation rows also train; SPYMASTER_CANARY_FOLDS asks for more."""
    blocked = 0
    for seed in range(folds := max(2, FOLDS // 10)):
        one = fold(seed)
        leaked = replace(one, train=pl.concat([one.train, one.validation.sample(fraction=0.4, seed=seed)]))
        blocked += "failed" in verdicts(shuffled_labels(leaked))["shuffled_labels"]
    print(f"{blocked} of {folds} folds blocked")
    assert blocked >= 0.8 * folds


@pytest.mark.parametrize("leak", ["strength_signed_4min", "raw return", "missing where it broke"])
def test_a_production_column_that_holds_the_outcome_is_caught(honest: Fold, leak: str) -> None:
    future = pl.col("strength_signed_4min")
    column = {
        "strength_signed_4min": future,
        "raw return": future * pl.col("direction_sign"),
        "missing where it broke": pl.when(future < 0).then(pl.col("approach_velocity").fill_null(0.0)),
    }[leak].alias("approach_velocity")
    leaked = replace(honest, train=honest.train.with_columns(column), validation=honest.validation.with_columns(column))
    assert production_columns(honest, "A").verdict == production_columns(honest, "B").verdict == "holds"
    for stage in ("A", "B"):
        found = production_columns(leaked, stage)
        assert found.verdict == "failed"
        assert "approach_velocity" in found.reason


def test_an_allow_list_that_lets_the_future_in_fails(honest: Fold, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planted_declared(honest).verdict == "holds"
    everything = lambda self, stage, delay, ablation="full": self.role("feature")  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(Contract, "features", everything)
        found = planted_declared(honest)
    assert (found.verdict, found.value) == ("failed", 0.0)
    monkeypatch.setattr(Contract, "require_known", lambda self, names, decision_s: None)
    assert planted_declared(honest).verdict == "failed"


def test_a_replay_that_sees_nothing_or_too_much_fails(honest: Fold, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planted_replay(honest).verdict == "holds"
    with monkeypatch.context() as patch:
        patch.setattr(module, "differences", lambda *_: ([], 0))
        assert planted_replay(honest).verdict == "failed"
    # a plant that is known when it says so does not differ: nothing to catch, and the canary says that it is mute
    monkeypatch.setattr(module, "plant", lambda frame, delay: frame.with_columns(pl.lit(1.0).alias(module.PLANT)))
    assert planted_replay(honest).verdict == "failed"


def test_a_plant_that_nobody_reads_fails(honest: Fold, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {planted_column(honest, h).verdict for h in ("tradeable_2", "direction")} == {"holds"}
    assert {planted_model(honest, h).verdict for h in ("tradeable_2", "direction")} == {"holds"}
    rng = np.random.default_rng(0)
    useless = lambda frame, delay: frame.with_columns(pl.Series(module.PLANT, rng.random(frame.height)))  # noqa: E731
    monkeypatch.setattr(module, "plant", useless)
    assert planted_column(honest, "direction").verdict == "failed"
    assert planted_model(honest, "direction").verdict == "failed"


def test_too_few_rows_are_said_and_not_passed() -> None:
    found = run_canaries(fold(1, train=2, validation=1, n=8))
    by_name = verdicts(found)
    assert by_name["planted_declared"] == {"holds"}
    for name in (*CHANCE, "planted_model", "planted_patchtst", "production_columns", "production_sequences"):
        assert by_name[name] == {"not assessable"}, name
    for canary in found:
        assert canary.reason
        assert (canary.value is None) == (canary.verdict == "not assessable")
    assert to_json(found, "2024-01-04", False)["failed"] == []
