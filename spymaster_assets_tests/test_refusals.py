"""Every way to train on the future, or to ask a model about its past, is tried at each public entry point and refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from spymaster_assets.contract import FEATURES_PATH, parse_contract
from spymaster_assets.datasets.matrix import encode, feature_matrix
from spymaster_assets.datasets.sequences import build_sequences
from spymaster_assets.datasets.splits import TIMES, SplitManifest, build_manifest, check_fold, plan_split
from spymaster_assets.errors import ContractError, ModelError, SplitError
from spymaster_assets.evaluation.calibration import baseline_predictions
from spymaster_assets.models.base import SequenceData
from spymaster_assets.models.patchtst import METADATA, PatchTST
from spymaster_assets.models.trees import BoostedTrees
from spymaster_assets.retrieval.index import INDEX, RetrievalIndex, build_index
from spymaster_assets.settings import (
    DELAYS_S,
    MINUTE_NS,
    PatchTSTSettings,
    RetrievalSettings,
    SequenceSettings,
    SplitSettings,
    TreeSettings,
)
from spymaster_assets_tests.builders import CONTRACT, FOLD, dates_of, touch_times

LATE = "barrier_state"
"""A text feature of stage B, known 240 s after t0."""
FIRST_NS = FOLD.first_test_decision_ns
TREES = TreeSettings(rounds=4, early_stopping_rounds=2, min_class_rows=5, threads=1)
NETWORK = PatchTSTSettings(layers=1, d_model=8, heads=2, ffn_dim=8, static_dim=4, epochs=1, device="cpu")
NEIGHBOURS = RetrievalSettings(k=5, min_candidates=5)


def rows(n: int, seed: int) -> pl.DataFrame:
    """Signals of the part of FOLD that the seed stands for."""
    rng = np.random.default_rng(seed)
    outcome = rng.choice(["BREAK", "BOUNCE", "CHOP"], n)
    columns: dict[str, Any] = {
        "event_id": [f"{seed}-{i:03d}" for i in range(n)],
        "date": dates_of(n, seed),
        **touch_times(dates_of(n, seed)),
        "level_kind": np.zeros(n, np.int8),
        "direction_sign": np.ones(n, np.int8),
        "level_price": np.full(n, 500.0),
        "atr": rng.random(n),
        "minutes_since_open": np.arange(n),
    }
    for d in DELAYS_S:
        columns |= {
            f"outcome_{d}": outcome,
            f"tradeable_2_{d}": outcome != "CHOP",
            f"strength_signed_{d}": rng.normal(0, 1, n),
        }
    return CONTRACT.conform(pl.DataFrame(columns))


def sequences(n: int, seed: int) -> SequenceData:
    """Sequences of the part of FOLD that the seed stands for."""
    rng = np.random.default_rng(seed)
    dates = dates_of(n, seed)
    return SequenceData(
        X=rng.normal(0, 1, (n, 32, 1)).astype(np.float32),
        mask=np.ones((n, 32), np.uint8),
        static=rng.random((n, 1)).astype(np.float32),
        y_break=(np.arange(n) % 2).astype(np.int8),
        y_strength=rng.normal(0, 1, n).astype(np.float32),
        event_id=np.array([f"{seed}-{i:03d}" for i in range(n)]),
        ts_ns=touch_times(dates)["ts_ns"],
        session=np.array(dates),
        channel_names=("return",),
        static_names=("atr",),
    )


TRAIN, VALIDATION, TEST = rows(80, 0), rows(40, 1), rows(20, 2)
SEQUENCES = sequences(80, 0), sequences(40, 1), sequences(20, 2)


@pytest.fixture(scope="module")
def trees() -> BoostedTrees:
    model = BoostedTrees(TREES)
    model.fit(TRAIN, VALIDATION, FOLD)
    return model


@pytest.fixture(scope="module")
def network() -> PatchTST:
    model = PatchTST(NETWORK)
    model.fit(*SEQUENCES[:2], FOLD)
    return model


@pytest.fixture(scope="module")
def index() -> RetrievalIndex:
    return build_index(TRAIN.vstack(VALIDATION), FOLD, CONTRACT, NEIGHBOURS, "4min")


def edited(frame: pl.DataFrame, n: int, **values: Any) -> pl.DataFrame:
    """Row n with other values."""
    one = pl.int_range(pl.len()) == n
    return frame.with_columns(
        pl.when(one).then(pl.lit(v)).otherwise(k).cast(frame.schema[k]).alias(k) for k, v in values.items()
    )


def one_of(frame: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
    """A part with the first row of another."""
    return frame.vstack(other.head(1))


PARTS: dict[str, tuple[Callable[[], tuple[pl.DataFrame, pl.DataFrame]], str]] = {
    "a training label complete after the first test decision": (
        lambda: (edited(TRAIN, 7, label_known_ns=FIRST_NS + 1), VALIDATION),
        "train row 0-007: label complete at or after the first",
    ),
    "a training label complete at the first validation decision": (
        lambda: (edited(TRAIN, 7, label_known_ns=VALIDATION["decision_ns"].min()), VALIDATION),
        "train row 0-007: label complete at or after the first validation decision",
    ),
    "a validation label complete at the first test decision": (
        lambda: (TRAIN, edited(VALIDATION, 3, label_known_ns=FIRST_NS)),
        "validation row 1-003: label complete at or after the first test decision",
    ),
    "a training label that nobody knows when": (
        lambda: (edited(TRAIN, 7, label_known_ns=None), VALIDATION),
        "label_known_ns of row 0-007 is null",
    ),
    "a training label complete before its own decision": (
        lambda: (edited(TRAIN, 7, label_known_ns=0), VALIDATION),
        "label of row 0-007 is complete before its decision",
    ),
    "a table without label_known_ns": (lambda: (TRAIN.drop("label_known_ns"), VALIDATION), "no column label_known_ns"),
    "a row of the as-of session": (
        lambda: (one_of(TRAIN, TEST), VALIDATION),
        "train row 2-000 of 2024-03-02 is not of a train session",
    ),
    "a validation row among the training rows": (
        lambda: (one_of(TRAIN, VALIDATION), VALIDATION),
        "train row 1-000 of 2024-02-02 is not of a train session",
    ),
    "a training row among those that stop early": (
        lambda: (TRAIN, one_of(VALIDATION, TRAIN)),
        "validation row 0-000 of 2024-01-02 is not of a validation session",
    ),
    "a row twice": (lambda: (one_of(TRAIN, TRAIN), VALIDATION), "row 0-000 is there twice"),
}


@pytest.mark.parametrize(("tried", "message"), PARTS.values(), ids=PARTS)
def test_rows_that_a_fold_does_not_allow_train_nothing(
    tried: Callable[[], tuple[pl.DataFrame, pl.DataFrame]], message: str
) -> None:
    train, validation = tried()
    with pytest.raises(SplitError, match=message):
        BoostedTrees(TREES).fit(train, validation, FOLD)
    with pytest.raises(SplitError, match=message):
        check_fold(FOLD, train, validation)


def fit_network(train: SequenceData, validation: SequenceData, fold: SplitManifest = FOLD) -> object:
    return PatchTST(NETWORK).fit(train, validation, fold)


def bars(n: int, step_ns: int = MINUTE_NS) -> pl.DataFrame:
    """One-minute bars that end before the first training touch is decided."""
    averages = ("sma_200", "sma_400", "sma_200_slope_5bar", "sma_400_slope_5bar")
    names = ("close", "return_usd", "range_usd", "volume", "volatility", *averages)
    start_ns = int(TRAIN["ts_ns"][0]) - (n - 1 - np.arange(n)) * MINUTE_NS
    return pl.DataFrame({"start_ns": start_ns, "end_ns": start_ns + step_ns, **{k: np.ones(n) for k in names}})


def contract_with(**change: Any) -> object:
    raw = copy.deepcopy(json.loads(FEATURES_PATH.read_text()))
    entry = next(c for c in raw["columns"] if c["name"] == "atr")
    entry.update(change)
    return parse_contract(raw, "")


def purged_fold() -> SplitManifest:
    return replace(FOLD, purged=({"event_id": "0-005", "part": "train", "reason": "x"},))


PLAN = replace(FOLD, first_test_decision_ns=0)
TIED = {"ts_ns": int(VALIDATION["decision_ns"].min()) - 16 * MINUTE_NS}
MANIFEST_ROWS = pl.concat([TRAIN, VALIDATION]).select(TIMES)

TRIED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    # columns
    "a matrix of a column known after the decision": (
        lambda: encode(TRAIN, CONTRACT, ["atr", LATE], "A", "4min"),
        ContractError,
        f"{LATE} is known at t0\\+240s, after the decision at t0\\+60s",
    ),
    "a matrix of a column known after an earlier confirmation": (
        lambda: encode(TRAIN, CONTRACT, [LATE], "B", "2min"),
        ContractError,
        f"{LATE} is known at t0\\+240s, after the decision at t0\\+120s",
    ),
    "a matrix of a label": (
        lambda: encode(TRAIN, CONTRACT, ["strength_signed_2min"], "B", "8min"),
        ContractError,
        "strength_signed_2min is a label",
    ),
    "a matrix of when the label is known": (
        lambda: encode(TRAIN, CONTRACT, ["label_known_ns"], "B", "8min"),
        ContractError,
        "label_known_ns is known at",
    ),
    "a matrix of a column that the contract does not list": (
        lambda: encode(TRAIN.with_columns(pl.lit(1.0).alias("future")), CONTRACT, ["future"], "A", "4min"),
        ContractError,
        "no column 'future'",
    ),
    "a row that decides before its stage does": (
        lambda: feature_matrix(edited(TRAIN, 4, decision_ns=TRAIN["ts_ns"][4]), CONTRACT, "A", "4min"),
        ContractError,
        "row 0-004 does not decide at t0\\+60s",
    ),
    "a row that decides after its stage does": (
        lambda: feature_matrix(edited(TRAIN, 4, confirm_ts_ns_4min=FIRST_NS), CONTRACT, "B", "4min"),
        ContractError,
        "row 0-004 does not decide at t0\\+240s",
    ),
    "a row that is not confirmed yet": (
        lambda: feature_matrix(edited(TRAIN, 4, confirm_ts_ns_4min=None), CONTRACT, "B", "4min"),
        ContractError,
        "row 0-004 does not decide at t0\\+240s",
    ),
    "a contract whose stage A feature is known later": (
        lambda: contract_with(known_at="t1_2min"),
        ContractError,
        "feature atr of stage A is known at t1_2min",
    ),
    "a sequence with a late static feature": (
        lambda: replace(SEQUENCES[0], static_names=(f"{LATE}=WALL",)),
        ContractError,
        f"{LATE} is known at t0\\+240s",
    ),
    "a sequence with a label as static feature": (
        lambda: replace(SEQUENCES[0], static_names=("outcome_4min=BREAK",)),
        ContractError,
        "outcome_4min is a label",
    ),
    "a sequence channel that the contract does not list": (
        lambda: replace(SEQUENCES[0], channel_names=("next_return",)),
        ContractError,
        "next_return is no sequence channel",
    ),
    "sessions joined though their features differ": (
        lambda: SequenceData.concatenate([SEQUENCES[0], replace(SEQUENCES[1], static_names=("distance",))]),
        ContractError,
        "differ in their features or their order: atr, distance",
    ),
    # windows
    "a window that ends after the decision, by a later decision": (
        lambda: build_sequences(
            edited(TRAIN, 0, decision_ns=FIRST_NS).head(1), bars(9), CONTRACT, SequenceSettings(4), "4min"
        ),
        ContractError,
        "row 0-000 does not decide at t0\\+60s",
    ),
    "a window that ends after the decision, by bars out of order": (
        lambda: build_sequences(TRAIN.head(1), bars(9).reverse(), CONTRACT, SequenceSettings(4), "4min"),
        ContractError,
        "context bars are out of order",
    ),
    "a window that ends after the decision, by bars that claim to end early": (
        lambda: build_sequences(TRAIN.head(1), bars(9, MINUTE_NS // 2), CONTRACT, SequenceSettings(4), "4min"),
        ContractError,
        "end before their minute is over",
    ),
    # folds
    "a manifest made by hand whose parts overlap": (
        lambda: replace(FOLD, train=(*FOLD.train, "2024-02-05")),
        SplitError,
        "train and validation overlap: 2024-02-05 is not before 2024-02-02",
    ),
    "a manifest edited to train on the as-of session": (
        lambda: SplitManifest.from_json({**FOLD.to_json(), "validation": [*FOLD.validation, FOLD.asof]}),
        SplitError,
        "validation and test overlap: 2024-03-02 is not before 2024-03-02",
    ),
    "a manifest edited to train on embargoed sessions": (
        lambda: SplitManifest.from_json({**FOLD.to_json(), "embargoed": ["2024-01-11"]}),
        SplitError,
        "embargoed sessions are used: 2024-01-11",
    ),
    "a manifest edited to a later first test decision": (
        lambda: SplitManifest.from_json({**FOLD.to_json(), "first_test_decision_ns": FIRST_NS + 3 * 1440 * MINUTE_NS}),
        SplitError,
        "first test decision is on 2024-03-05",
    ),
    "a plan whose rows were never purged": (
        lambda: BoostedTrees(TREES).fit(TRAIN, VALIDATION, PLAN),
        SplitError,
        "the split is a plan",
    ),
    "a row that the fold purged": (
        lambda: BoostedTrees(TREES).fit(TRAIN, VALIDATION, purged_fold()),
        SplitError,
        "train row 0-005 of 2024-01-02 was purged",
    ),
    "a window cut off by the first session": (
        lambda: plan_split(list(FOLD.train), "2024-01-05", SplitSettings("rolling", 3, 2, 1, 1)),
        SplitError,
        "as of 2024-01-05 there are 3 earlier sessions",
    ),
    "a split of rows of the as-of session": (
        lambda: build_manifest(PLAN, one_of(MANIFEST_ROWS, TEST.select(TIMES)), {}, FIRST_NS),
        SplitError,
        "row 2-000 is of 2024-03-02, which the split does not learn from",
    ),
    "a split of rows whose labels nobody knows when": (
        lambda: build_manifest(PLAN, edited(MANIFEST_ROWS, 2, label_known_ns=None), {}, FIRST_NS),
        SplitError,
        "label_known_ns of row 0-002 is null",
    ),
    # sequence models
    "sequences of validation among the training ones": (
        lambda: fit_network(SequenceData.concatenate(SEQUENCES[:2]), SEQUENCES[1]),
        SplitError,
        "train row 1-000 of 2024-02-02 is not of a train session",
    ),
    "sequences of the as-of session that stop early": (
        lambda: fit_network(SEQUENCES[0], SEQUENCES[2]),
        SplitError,
        "validation row 2-000 of 2024-03-02 is not of a validation session",
    ),
    "sequences whose label is complete at the first validation decision": (
        lambda: fit_network(replace(SEQUENCES[0], ts_ns=np.full(80, TIED["ts_ns"])), SEQUENCES[1]),
        SplitError,
        "train row 0-000: label complete at or after the first validation decision",
    ),
    # baselines and the index
    "a baseline fitted on labels complete after the test begins": (
        lambda: baseline_predictions(edited(TRAIN, 7, label_known_ns=FIRST_NS), TEST, CONTRACT, ("A",)),
        SplitError,
        "row 2-000 of 2024-03-02 was decided at .* before the baseline existed",
    ),
    "an index of a row known too late": (
        lambda: build_index(edited(TRAIN, 9, label_known_ns=FIRST_NS), FOLD, CONTRACT, NEIGHBOURS, "4min"),
        SplitError,
        "train row 0-009: label complete at or after the first test decision",
    ),
    "an index of a row of the as-of session": (
        lambda: build_index(one_of(TRAIN, TEST), FOLD, CONTRACT, NEIGHBOURS, "4min"),
        SplitError,
        "validation row 2-000 of 2024-03-02 is not of a validation session",
    ),
    "an index of rows whose date nobody knows": (
        lambda: build_index(edited(TRAIN, 9, date=None), FOLD, CONTRACT, NEIGHBOURS, "4min"),
        SplitError,
        "date of row 0-009 is null",
    ),
}


@pytest.mark.parametrize(("tried", "error", "message"), TRIED.values(), ids=TRIED)
def test_tried_and_refused(tried: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tried()


def test_what_is_tried_above_works_on_rows_of_its_own_past(
    trees: BoostedTrees, network: PatchTST, index: RetrievalIndex
) -> None:
    assert trees.predict(TEST).height == len(trees.bundles) * TEST.height
    assert network.predict(SEQUENCES[2]).height == 2 * TEST.height
    assert index.query(TEST, CONTRACT)[0].height == index.null_rates(TEST).height == TEST.height
    assert baseline_predictions(TRAIN, TEST, CONTRACT, ("A",)).height
    assert build_sequences(TRAIN.head(1), bars(9), CONTRACT, SequenceSettings(4), "4min")["mask"].all()
    assert build_manifest(PLAN, MANIFEST_ROWS, {}, FIRST_NS).purged == ()


def test_no_model_is_asked_about_rows_from_before_its_first_test_decision(
    trees: BoostedTrees, network: PatchTST, index: RetrievalIndex
) -> None:
    early = edited(TEST, 6, decision_ns=FIRST_NS - 1)
    for ask, name in (
        (trees.predict, "boosted_trees model"),
        (BoostedTrees.load(trees.save()).predict, "boosted_trees model"),
        (lambda rows: index.query(rows, CONTRACT), "index"),
        (index.null_rates, "index"),
        (lambda rows: RetrievalIndex.load(index.save()).query(rows, CONTRACT), "index"),
    ):
        with pytest.raises(SplitError, match=f"row 2-006 of 2024-03-05 was decided at .* before this {name} existed"):
            ask(early)
        with pytest.raises(SplitError, match="row 1-000 of 2024-02-02 was decided"):
            ask(VALIDATION)
    for model in (network, PatchTST.load(network.save())):
        with pytest.raises(
            SplitError, match=r"row 1-000 of 2024-02-02 was decided .* before this patchtst model existed"
        ):
            model.predict(SEQUENCES[1])


def test_no_model_is_asked_earlier_than_its_stage_decides(trees: BoostedTrees, index: RetrievalIndex) -> None:
    with pytest.raises(ContractError, match=r"row 2-006 does not decide at t0\+60s"):
        index.query(edited(TEST, 6, ts_ns=FIRST_NS), CONTRACT)
    with pytest.raises(ContractError, match=r"row 2-006 does not decide at t0\+240s"):
        trees.predict(edited(TEST, 6, confirm_ts_ns_4min=TEST["decision_ns"][6]))


def test_a_stored_model_that_reads_a_late_column_is_not_loaded(
    trees: BoostedTrees, network: PatchTST, index: RetrievalIndex
) -> None:
    files = trees.save()
    name = next(n for n in files if n.endswith("stage_a_full.json"))
    for late, why in ((LATE, r"is known at t0\+240s, after the decision at t0\+60s"), ("outcome_2min", "is a label")):
        meta = json.loads(files[name])
        meta["feature_columns"].append(late)
        with pytest.raises(ModelError, match=f"{late} {why}"):
            BoostedTrees.load({**files, name: json.dumps(meta).encode()})
    stored = index.save()
    meta = json.loads(stored[INDEX])
    with pytest.raises(ContractError, match=f"{LATE} is known at t0\\+240s"):
        RetrievalIndex.load({**stored, INDEX: json.dumps({**meta, "columns": [*meta["columns"], LATE]}).encode()})
    late_network = PatchTST(NETWORK, network.context)
    late_network.scaler, late_network.network = network.scaler, network.network
    late_network.meta = {**network.meta, "static_feature_names": [f"{LATE}=WALL"]}
    with pytest.raises(ModelError, match=f"{LATE} is known at t0\\+240s"):
        PatchTST.load(late_network.save())
    assert json.loads(network.save()[METADATA])["first_test_decision_ns"] == FIRST_NS


def test_no_family_stands_beside_the_checks() -> None:
    from spymaster_assets.models import registry
    from spymaster_assets.models.base import Model

    for name in registry.names():
        family = registry.get(name)
        assert (family.fit, family.predict) == (Model.fit, Model.predict)
