"""The fold that judged an event: what its models could learn from, what they said, and what moved or resembled it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import xgboost as xgb

from spymaster_assets.contract import STAGES, Contract, decision_after_s, load_contract
from spymaster_assets.datasets.matrix import CLASSIFIERS, HEADS, encode
from spymaster_assets.datasets.splits import SplitManifest, read_split
from spymaster_assets.errors import ConfigError
from spymaster_assets.evaluation.calibration import BASELINES, GROUP
from spymaster_assets.models.trees import BoostedTrees, Bundle, bundle_name
from spymaster_assets.partitions import FITTED_ASSETS, MODEL_ASSETS, REPORT_ASSET
from spymaster_assets.proof.faults import told
from spymaster_assets.retrieval.index import RetrievalIndex
from spymaster_assets.settings import DELAYS_S, NS
from spymaster_assets.signals.build import read_signals
from spymaster_assets.store import Artifact, ArtifactStore

SPLIT, MODELS = MODEL_ASSETS[0], FITTED_ASSETS
SHOWN_CONTRIBUTIONS = 10
_MODEL_ASSET = {
    "patchtst": "patchtst_model",
    "trees": "tree_bundles",
    "retrieval": "retrieval_index",
    "null_knn": "retrieval_index",
}


@dataclass(frozen=True)
class ModelArtifact:
    """A stored model: its key is the as-of session; runs are the trackers' ids by name, created_at is UTC."""

    asset: str
    asof: str
    version: str
    sha256: str
    runs: dict[str, str]
    created_at: str
    git_revision: str


@dataclass(frozen=True)
class Contribution:
    """What one feature added to a tree model's output for this event, with its value and when that was known (UTC ns)."""

    feature: str
    contribution: float
    value: float | None
    unit: str
    known_at: str
    known_ns: int


@dataclass(frozen=True)
class Contributions:
    """Exact contributions (XGBoost's TreeSHAP) in `unit`, largest first: bias + shown + rest = total, from which p follows."""

    unit: str
    bias: float
    total: float
    rest: float
    features: tuple[Contribution, ...]


@dataclass(frozen=True)
class Prediction:
    """One judged prediction: p is a probability, or SPY dollars for strength; y what came, reference the training base rate or median."""

    model: str
    head: str
    delay: str
    stage: str
    decision_ns: int
    p: float
    reference: float
    y: float
    baseline: bool
    artifact: str | None
    train_rows: int | None
    contributions: Contributions | None


@dataclass(frozen=True)
class Neighbour:
    """A past touch that retrieval compared the event with, nearest first; distance in scaled features."""

    rank: int
    event_id: str
    date: str
    distance: float
    weight: float
    outcome: str
    strength_signed_usd: float | None


@dataclass(frozen=True)
class Training:
    """Rows that the fold's models could learn from by part, purged ones left out, and when the last of their labels was known (UTC ns).

    none_from_the_future: that was before first_test_decision_ns.
    """

    rows: dict[str, int]
    purged: dict[str, int]
    first_date: str
    last_date: str
    latest_label_known_ns: int
    first_test_decision_ns: int
    none_from_the_future: bool


@dataclass(frozen=True)
class Fold:
    """The fold that judged the event; training is None, and neighbours are none, where what they rest on cannot be read."""

    asof: str
    window: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    embargoed: tuple[str, ...]
    training: Training | None
    models: tuple[ModelArtifact, ...]
    predictions: tuple[Prediction, ...]
    neighbour_filter: str
    neighbours: tuple[Neighbour, ...]


def judged(store: ArtifactStore, asof: str, row: pl.DataFrame, heads: Sequence[str], faults: list[str]) -> Fold:
    """The fold as of a session that has a report, for the event of one signals row (1, columns).

    heads: words that a prediction's model, head, delay and stage must hold. What cannot be read is added to `faults`; raises ArtifactError
    or MissingInputError when it is the split or the report.
    """
    contract, split = load_contract(), read_split(store, asof)[0]
    said = store.load(REPORT_ASSET, asof).frame("predictions.parquet").filter(pl.col("event_id") == row["event_id"][0])
    models = [told(faults, store.load, a, asof) for a in MODELS]
    trees = told(faults, _trees, store, asof)
    index = told(faults, _index, store, asof)
    used, neighbours = ("", ()) if index is None else _neighbours(index, row, contract)
    return Fold(
        asof=asof,
        window=split.window,
        train=split.train,
        validation=split.validation,
        test=split.test,
        embargoed=split.embargoed,
        training=told(faults, _training, store, split),
        models=tuple(_model(a) for a in models if a is not None),
        predictions=tuple(
            _prediction(r, row, trees, contract)
            for r in said.iter_rows(named=True)
            if set(heads) <= {r[name] for name in GROUP}
        ),
        neighbour_filter=used,
        neighbours=neighbours,
    )


def require_heads(heads: Sequence[str]) -> None:
    """Raise ConfigError for a word that no model, head, delay or stage has."""
    ablations = [f"trees_{a}" for a in load_contract().ablations]
    known = [*_MODEL_ASSET, *ablations, *BASELINES, *HEADS, *DELAYS_S, *STAGES]
    if unknown := [w for w in heads if w not in known]:
        raise ConfigError(f"no head has the word {unknown[0]!r}", expected=", ".join(dict.fromkeys(known)))


def _trees(store: ArtifactStore, asof: str) -> BoostedTrees:
    return BoostedTrees.load(store.load("tree_bundles", asof).contents())


def _index(store: ArtifactStore, asof: str) -> RetrievalIndex:
    return RetrievalIndex.load(store.load("retrieval_index", asof).contents())


def _neighbours(index: RetrievalIndex, row: pl.DataFrame, contract: Contract) -> tuple[str, tuple[Neighbour, ...]]:
    summary, near = index.query(row, contract)
    found = tuple(
        Neighbour(
            rank=r["rank"],
            event_id=r["neighbour_id"],
            date=r["date"],
            distance=r["distance"],
            weight=r["weight"],
            outcome=r["outcome"],
            strength_signed_usd=_finite(r["strength_signed"]),
        )
        for r in near.iter_rows(named=True)
    )
    return str(summary["filter"][0]), found


def _training(store: ArtifactStore, split: SplitManifest) -> Training:
    """Counts and the latest label of the stored training rows, and the first decision on the stored test rows."""
    purged = [p["event_id"] for p in split.purged]
    parts = {
        part: pl.concat(
            read_signals(store, k)[0].frame.select("event_id", "date", "label_known_ns") for k in getattr(split, part)
        ).filter(~pl.col("event_id").is_in(purged))
        for part in ("train", "validation")
    }
    rows = pl.concat(parts.values())
    tested = [read_signals(store, k)[0].frame["decision_ns"] for k in split.test if store.exists("signals", k)]
    first_ns = int(pl.concat(tested).min())  # type: ignore[arg-type]
    latest_ns = int(rows["label_known_ns"].max())  # type: ignore[arg-type]
    return Training(
        rows={part: table.height for part, table in parts.items()},
        purged={part: sum(p["part"] == part for p in split.purged) for part in ("train", "validation")},
        first_date=str(rows["date"].min()),
        last_date=str(rows["date"].max()),
        latest_label_known_ns=latest_ns,
        first_test_decision_ns=first_ns,
        none_from_the_future=latest_ns < first_ns,
    )


def _model(artifact: Artifact) -> ModelArtifact:
    return ModelArtifact(
        asset=artifact.asset,
        asof=artifact.key,
        version=artifact.folder.name,
        sha256=artifact.sha256,
        runs={k: str(v) for k, v in artifact.metadata.items()},
        created_at=str(artifact.provenance.get("created_at", "")),
        git_revision=str(artifact.provenance.get("git_revision", "")),
    )


def _prediction(said: dict[str, Any], row: pl.DataFrame, trees: BoostedTrees | None, contract: Contract) -> Prediction:
    model, head, delay, stage = (str(said[c]) for c in GROUP)
    t0_ns = int(row["ts_ns"][0])
    family, _, ablation = model.partition("_") if model.startswith("trees") else (model, "", "")
    name = bundle_name(head, delay, stage, ablation or "full")
    bundle = next((b for b in (trees.bundles if trees else ()) if family == "trees" and b.name == name), None)
    return Prediction(
        model=model,
        head=head,
        delay=delay,
        stage=stage,
        decision_ns=t0_ns + decision_after_s(stage, delay) * NS,
        p=said["p"],
        reference=said["reference"],
        y=said["y"],
        baseline=model in BASELINES,
        artifact=_MODEL_ASSET.get(family),
        train_rows=None if bundle is None else bundle.meta["train_rows"],
        contributions=None if bundle is None else contributions(bundle, row, t0_ns, contract),
    )


def contributions(bundle: Bundle, row: pl.DataFrame, t0_ns: int, contract: Contract) -> Contributions:
    """What each feature of one signals row (1, columns) added to the head's output: log-odds, or SPY dollars for strength."""
    meta = bundle.meta
    X, names = encode(row, contract, meta["feature_columns"], meta["stage"], meta["delay"])
    used = bundle.meta["features"]
    x = X[:, [names.index(n) for n in used]]
    added = bundle.booster().predict(xgb.DMatrix(x, feature_names=used), pred_contribs=True)[0].astype(np.float64)
    order = np.argsort(-np.abs(added[:-1]), kind="stable")[:SHOWN_CONTRIBUTIONS]
    shown = []
    for i in order.tolist():
        column = contract[used[i].partition("=")[0]]
        shown.append(
            Contribution(
                feature=used[i],
                contribution=float(added[i]),
                value=_finite(float(x[0, i])),
                unit=column.unit,
                known_at=column.known_at,
                known_ns=t0_ns + column.known_after_s * NS,
            )
        )
    return Contributions(
        unit="log-odds" if bundle.meta["head"] in CLASSIFIERS else "SPY dollars",
        bias=float(added[-1]),
        total=float(added.sum()),
        rest=float(added[:-1].sum() - added[order].sum()),
        features=tuple(shown),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
