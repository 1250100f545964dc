"""What any model must beat: a logistic regression, and the base rate of the time of day."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

HALF_HOUR_MIN = 30
_PRIOR_ROWS = 20.0
"""Weight, in rows, of the overall rate in each half hour's rate."""


def logistic_probabilities(
    X: NDArray[np.float32], y: NDArray[np.float64], X_new: NDArray[np.float32]
) -> NDArray[np.float64] | None:
    """Probabilities of an L2 logistic regression, medians and scales fitted on (X, y); None with one class in y."""
    if len(np.unique(y)) < 2:
        return None
    model = make_pipeline(
        SimpleImputer(strategy="median", keep_empty_features=True),
        StandardScaler(),
        LogisticRegression(C=0.1, max_iter=2000),
    )
    model.fit(X, y.astype(int))
    regression = model[-1]
    # summed row by row: the last bits of a matrix product depend on how many rows are multiplied, and later touches may not
    scores = (model[:-1].transform(X_new) * regression.coef_[0]).sum(axis=1) + regression.intercept_[0]
    return np.asarray(expit(scores), np.float64)


def time_of_day_probabilities(
    minutes: NDArray[np.int32], y: NDArray[np.float64], minutes_new: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Training rate of the half hour after the open that a row falls in, shrunk to the overall rate."""
    overall = y.mean()
    slot, slot_new = minutes // HALF_HOUR_MIN, minutes_new // HALF_HOUR_MIN
    size = int(max(slot.max(initial=0), slot_new.max(initial=0))) + 1
    count = np.bincount(slot, minlength=size)
    total = np.bincount(slot, weights=y, minlength=size)
    return np.asarray(((total + _PRIOR_ROWS * overall) / (count + _PRIOR_ROWS))[slot_new])
