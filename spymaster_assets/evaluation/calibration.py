"""How good and how honest served predictions are: scores, intervals and reliability a head, for one fold or many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from spymaster_assets.contract import Contract
from spymaster_assets.datasets.matrix import CLASSIFIERS, feature_matrix, labelled_rows, target
from spymaster_assets.datasets.splits import check_decided
from spymaster_assets.evaluation.baselines import logistic_probabilities, time_of_day_probabilities
from spymaster_assets.evaluation.metrics import (
    Floats,
    auc,
    binary_metrics,
    brier,
    regression_metrics,
    reliability_bins,
    session_bootstrap,
)
from spymaster_assets.models.base import prediction_frame
from spymaster_assets.settings import DELAYS_S

GROUP = ("model", "head", "delay", "stage")
BASELINES = ("logistic", "time_of_day", "null_knn")
"""Models that are here to be beaten; they do not count as trials."""
MIN_ROWS = 20
"""Fewer rows, or fewer than five of a class, are listed but not scored."""
MIN_CLASS = 5
_SMALL = 1e-12


def with_outcomes(
    predictions: pl.DataFrame, test: pl.DataFrame, train: pl.DataFrame, contract: Contract, asof: str
) -> pl.DataFrame:
    """Predictions (model, head, delay, stage, event_id, p) beside what happened: adds session, asof, y and reference.

    Only rows on which a head is judged stay. reference is the training base rate (classifiers) or median (strength) of that head.
    """
    parts = []
    for (model, head, delay, stage), rows in predictions.group_by(*GROUP, maintain_order=True):
        head, delay, stage = str(head), str(delay), str(stage)
        judged = labelled_rows(test, head, delay, stage, contract)
        truth = test.filter(pl.Series(judged)).select("event_id", pl.col("date").alias("session"))
        truth = truth.with_columns(pl.Series("y", target(test, head, delay)[judged]))
        known = target(train, head, delay)[labelled_rows(train, head, delay, stage, contract)]
        if not len(known):
            continue
        reference = float(known.mean() if head in CLASSIFIERS else np.median(known))
        joined = rows.join(truth, on="event_id", how="inner", maintain_order="left").drop_nulls("p")
        parts.append(
            joined.select(
                pl.lit(asof).alias("asof"),
                "session",
                "event_id",
                pl.lit(str(model)).alias("model"),
                "head",
                "delay",
                "stage",
                "p",
                "y",
                pl.lit(reference).alias("reference"),
            )
        )
    return pl.concat(parts)


def baseline_predictions(
    train: pl.DataFrame, test: pl.DataFrame, contract: Contract, stages: tuple[str, ...]
) -> pl.DataFrame:
    """Logistic regression and time-of-day rates for every classifier head, fitted on the training rows.

    Raises SplitError when a test row was decided before every training label was complete.
    """
    check_decided(test, int(train["label_known_ns"].max()) + 1, "the baseline")  # type: ignore[arg-type]
    parts = []
    for delay in DELAYS_S:
        for stage in stages:
            for head in CLASSIFIERS:
                rows = train.filter(pl.Series(labelled_rows(train, head, delay, stage, contract)))
                y = target(rows, head, delay)
                if len(np.unique(y)) < 2:
                    continue
                X, _ = feature_matrix(rows, contract, stage, delay)
                X_new, _ = feature_matrix(test, contract, stage, delay)
                logistic = logistic_probabilities(X, y, X_new)
                clock = time_of_day_probabilities(
                    rows["minutes_since_open"].to_numpy(), y, test["minutes_since_open"].to_numpy()
                )
                for name, p in (("logistic", logistic), ("time_of_day", clock)):
                    if p is not None:
                        parts.append(
                            prediction_frame(test["event_id"], head, delay, stage, p).with_columns(
                                pl.lit(name).alias("model")
                            )
                        )
    return pl.concat(parts)


def judge(outcomes: pl.DataFrame, draws: int = 400) -> list[dict[str, Any]]:
    """One JSON-able entry per model, head, delay and stage of a `with_outcomes` table, of one fold or several.

    Keys: model, head, delay, stage, baseline, folds, sessions, metrics, intervals (95 %, whole sessions resampled) of auc and skill,
    reliability (equal-count) and reliability_uniform bins, reason (why it is not scored, else null).
    """
    out = []
    for key, rows in outcomes.group_by(*GROUP, maintain_order=True):
        names = dict(zip(GROUP, map(str, key), strict=True))
        y, p, reference = (rows[c].to_numpy() for c in ("y", "p", "reference"))
        sessions = rows["session"].to_numpy().astype(str)
        classifier = names["head"] in CLASSIFIERS
        entry: dict[str, Any] = {
            **names,
            "baseline": names["model"] in BASELINES,
            "folds": rows["asof"].n_unique(),
            "sessions": len(set(sessions.tolist())),
            "intervals": {},
            "reliability": [],
            "reliability_uniform": [],
            "reason": too_few(y, classifier),
        }
        if entry["reason"]:
            entry["metrics"] = {"n": len(y), "positives": int(y.sum()) if classifier else None}
        elif classifier:
            entry["metrics"] = binary_metrics(y, p, reference)
            entry["reliability"] = reliability_bins(y, p, "quantile")
            entry["reliability_uniform"] = reliability_bins(y, p, "uniform")
            entry["intervals"] = _intervals(
                {"auc": lambda y, p, _: auc(y, p), "skill": brier_skill}, y, p, reference, sessions, draws
            )
        else:
            entry["metrics"] = regression_metrics(y, p, reference)
            entry["intervals"] = _intervals({"skill": _absolute_skill}, y, p, reference, sessions, draws)
        out.append(entry)
    return out


def trials(entries: list[dict[str, Any]]) -> int:
    """Number of model heads that were tried: with many, one that looks good by chance is expected."""
    return sum(not e["baseline"] for e in entries)


def brier_skill(y: Floats, p: Floats, reference: Floats) -> float:
    """1 - Brier score of p / Brier score of the reference."""
    return 1 - brier(y, p) / max(brier(y, reference), _SMALL)


def _absolute_skill(y: Floats, p: Floats, reference: Floats) -> float:
    return 1 - float(np.abs(p - y).mean()) / max(float(np.abs(reference - y).mean()), _SMALL)


def _intervals(
    scores: Mapping[str, Callable[[Floats, Floats, Floats], float | None]],
    y: Floats,
    p: Floats,
    reference: Floats,
    sessions: NDArray[np.str_],
    draws: int,
) -> dict[str, tuple[float, float] | None]:
    def on(score: Callable[[Floats, Floats, Floats], float | None]) -> Callable[[NDArray[np.int64]], float | None]:
        return lambda rows: score(y[rows], p[rows], reference[rows])

    return {name: session_bootstrap(on(score), sessions, draws) for name, score in scores.items()}


def too_few(y: NDArray[np.float64], classifier: bool) -> str | None:
    """Why rows with outcomes y (n,) are not scored, or None."""
    if len(y) < MIN_ROWS:
        return f"{len(y)} rows, {MIN_ROWS} are needed"
    if classifier and min(y.sum(), len(y) - y.sum()) < MIN_CLASS:
        return f"{int(min(y.sum(), len(y) - y.sum()))} rows of the rarer class, {MIN_CLASS} are needed"
    return None
