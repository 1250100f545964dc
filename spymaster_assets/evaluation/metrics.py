"""Scores of probabilities and strengths, always beside the base rate, with intervals that respect sessions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

EPSILON = 1e-6
"""Probabilities are clipped to [EPSILON, 1 - EPSILON] for the log loss."""
BINS = 10
_Z95 = 1.959963984540054
Floats = NDArray[np.float64]


def auc(y: Floats, p: Floats) -> float | None:
    """Area under the ROC curve with ties counted half (Mann-Whitney); None with one class."""
    positives = int(y.sum())
    negatives = len(y) - positives
    if positives == 0 or negatives == 0:
        return None
    ranks = rankdata(p)
    return float((ranks[y > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def brier(y: Floats, p: Floats) -> float:
    """Mean squared error of probabilities."""
    return float(np.mean((p - y) ** 2))


def log_loss(y: Floats, p: Floats) -> float:
    """Mean negative log likelihood, natural log, p clipped."""
    q = np.clip(p, EPSILON, 1 - EPSILON)
    return float(-np.mean(y * np.log(q) + (1 - y) * np.log(1 - q)))


def reliability_bins(y: Floats, p: Floats, kind: str = "quantile") -> list[dict[str, float]]:
    """Bins of predicted probability: lower, upper, count, mean_predicted, observed_rate and its 95 % Wilson interval (low, high).

    kind 'quantile' puts equal counts in each bin (ties stay together), 'uniform' equal widths; empty bins are left out.
    """
    if not len(p):
        return []
    edges = np.linspace(0, 1, BINS + 1)
    if kind == "quantile":
        edges = np.unique(np.quantile(p, edges))
    at = np.clip(np.searchsorted(edges, p, side="right") - 1, 0, max(len(edges) - 2, 0))
    out = []
    for b in np.unique(at):
        inside = at == b
        n, rate = int(inside.sum()), float(y[inside].mean())
        low, high = wilson(rate, n)
        upper = edges[min(b + 1, len(edges) - 1)]
        out.append(
            {
                "lower": float(edges[b]),
                "upper": float(upper),
                "count": n,
                "mean_predicted": float(p[inside].mean()),
                "observed_rate": rate,
                "low": low,
                "high": high,
            }
        )
    return out


def wilson(rate: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion."""
    z2 = _Z95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * np.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def calibration_error(y: Floats, p: Floats) -> tuple[float, float]:
    """(expected, maximum) calibration error over equal-count bins, weighted by count."""
    parts = reliability_bins(y, p)
    gaps = np.array([abs(b["mean_predicted"] - b["observed_rate"]) for b in parts])
    counts = np.array([b["count"] for b in parts])
    return float((gaps * counts).sum() / counts.sum()), float(gaps.max())


def binary_metrics(y: Floats, p: Floats, base_rate: float | Floats) -> dict[str, Any]:
    """Scores of probabilities p for outcomes y (n,), against saying `base_rate` (training rate, known in advance; one, or one a row).

    Keys: n, positives, observed_rate, base_rate, auc (None with one class), brier, brier_reference, skill (1 - their ratio), log_loss,
    log_loss_reference, ece, mce. Empty input gives n 0 and None.
    """
    y, p = np.asarray(y, np.float64), np.asarray(p, np.float64)
    if not len(y):
        keys = (
            "observed_rate",
            "auc",
            "brier",
            "brier_reference",
            "skill",
            "log_loss",
            "log_loss_reference",
            "ece",
            "mce",
        )
        return {"n": 0, "positives": 0, "base_rate": None, **dict.fromkeys(keys)}
    reference = np.broadcast_to(np.asarray(base_rate, np.float64), y.shape)
    ece, mce = calibration_error(y, p)
    score, standard = brier(y, p), brier(y, reference)
    return {
        "n": len(y),
        "positives": int(y.sum()),
        "observed_rate": float(y.mean()),
        "base_rate": float(reference.mean()),
        "auc": auc(y, p),
        "brier": score,
        "brier_reference": standard,
        "skill": 1 - score / standard if standard > 0 else None,
        "log_loss": log_loss(y, p),
        "log_loss_reference": log_loss(y, reference),
        "ece": ece,
        "mce": mce,
    }


def regression_metrics(y: Floats, predicted: Floats, reference: float | Floats) -> dict[str, Any]:
    """n, mae, mae_reference (always saying `reference`, the training median) and skill = 1 - mae / mae_reference, in y's unit."""
    y, predicted = np.asarray(y, np.float64), np.asarray(predicted, np.float64)
    if not len(y):
        return {"n": 0, "mae": None, "mae_reference": None, "skill": None, "reference": None}
    mae, standard = float(np.abs(predicted - y).mean()), float(np.abs(reference - y).mean())
    return {
        "n": len(y),
        "mae": mae,
        "mae_reference": standard,
        "skill": 1 - mae / standard if standard > 0 else None,
        "reference": float(np.mean(reference)),
    }


def session_bootstrap(
    score: Callable[[NDArray[np.int64]], float | None], sessions: NDArray[np.str_], draws: int = 400, seed: int = 42
) -> tuple[float, float] | None:
    """95 % percentile interval of score(row indices) over whole sessions drawn with replacement; touches of a day are not independent.

    None with fewer than three sessions, or when fewer than half of the draws have a score.
    """
    names, inverse = np.unique(sessions, return_inverse=True)
    if len(names) < 3:
        return None
    rows = [np.flatnonzero(inverse == k) for k in range(len(names))]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        value = score(np.concatenate([rows[k] for k in rng.integers(0, len(names), len(names))]))
        if value is not None:
            values.append(value)
    if len(values) < draws / 2:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
