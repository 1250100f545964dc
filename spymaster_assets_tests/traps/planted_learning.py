"""Leaks in splits, scaling, calibration, neighbours, cached artifacts, early stopping and selection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import xgboost as xgb
from sklearn.calibration import IsotonicRegression
from sklearn.decomposition import PCA
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.model_selection import TimeSeriesSplit, train_test_split
from sklearn.preprocessing import QuantileTransformer, RobustScaler, StandardScaler

from spymaster_assets.proof.known import KnownTable
from spymaster_assets_tests.traps.graphs import Node, at_end, fitted, leak, read
from spymaster_assets_tests.traps.market import ASOF, BAR_NS, LATER_ASOF, SESSIONS, opens_ns
from spymaster_assets_tests.traps.pipelines import (
    ASOF_NS,
    CALIBRATION,
    LABELS,
    MODEL,
    NEIGHBOURS,
    PARTS,
    VALID_NS,
    X,
    before,
    dot,
    logistic,
    matrix,
    nearest,
    neighbour_rate,
    sigmoid,
)

# splits


def known_at(part: pl.DataFrame, time_ns: int) -> KnownTable:
    """A part of the rows, settled at a time."""
    return KnownTable(part, np.full(part.height, time_ns), name="end_ns")


@leak("splits", PARTS, at="train")
def shuffled_split(rows: KnownTable) -> KnownTable:
    """train_test_split as it comes: shuffled over all time."""
    index = np.sort(train_test_split(np.arange(rows.frame.height), test_size=0.4, random_state=0)[0])
    return known_at(rows.frame[index], VALID_NS)


@leak("splits", PARTS, at="train")
def no_purge(rows: KnownTable) -> KnownTable:
    """Cut by the time of the row, not by that at which its label was complete."""
    noon_ns = VALID_NS + 6 * BAR_NS
    return known_at(rows.frame.filter(pl.col("end_ns") <= noon_ns), noon_ns)


@leak("splits", PARTS, at="train")
def share_of_rows(rows: KnownTable) -> KnownTable:
    """The first 45 % of all rows."""
    return known_at(rows.frame.head(int(0.45 * rows.frame.height)), VALID_NS)


@leak("splits", PARTS, at="train")
def share_of_time(rows: KnownTable) -> KnownTable:
    """All rows before the 45 % quantile of their times."""
    return known_at(rows.frame.filter(pl.col("end_ns") < pl.col("end_ns").quantile(0.45)), VALID_NS)


@leak("splits", PARTS, at="train")
def last_fold(rows: KnownTable) -> KnownTable:
    """scikit-learn's TimeSeriesSplit over all rows there are; its second fold trains the model of the day."""
    folds = list(TimeSeriesSplit(n_splits=4).split(np.zeros(rows.frame.height)))
    return known_at(rows.frame[folds[1][0]], VALID_NS)


@leak("splits", PARTS, at="train")
def balanced_classes(rows: KnownTable) -> KnownTable:
    """Undersampled to the share of ups that the whole sample has."""
    part = before(rows.frame, VALID_NS)
    least = min(int(rows.frame["up"].sum()), rows.frame.height - int(rows.frame["up"].sum())) // 3
    return known_at(part.filter(pl.int_range(pl.len()).over("up") < least), VALID_NS)


@leak("splits", PARTS, at="train")
def calm_sessions(rows: KnownTable) -> KnownTable:
    """Sessions that move more than usual, the whole sample being the usual, are left out."""
    move = pl.col("y").abs().mean().over("session")
    calm = rows.frame.filter(move <= rows.frame.select(move.quantile(0.8)).item())
    return known_at(before(calm, VALID_NS), VALID_NS)


@leak("splits", PARTS, at="train")
def purged_by_bars(rows: KnownTable) -> KnownTable:
    """The last three rows before the boundary of the whole sample's halves are purged, by position."""
    half = rows.frame.height // 2
    return known_at(rows.frame.head(half - 3).filter(pl.col("label_known_ns") < ASOF_NS), ASOF_NS)


# scaling


def standard(values: np.ndarray) -> dict[str, list[float]]:
    """Mean and deviation."""
    return {"mean": values.mean(axis=0).tolist(), "std": (values.std(axis=0) + 1e-12).tolist()}


@leak("scaling", MODEL, at="scaler")
def all_rows(rows: KnownTable) -> KnownTable:
    """Mean and deviation of all rows."""
    before(rows.frame, ASOF_NS)
    return fitted(ASOF_NS, **standard(matrix(rows.frame)))


@leak("scaling", MODEL, at="scaler")
def robust_all_rows(rows: KnownTable) -> KnownTable:
    """RobustScaler fitted before the split."""
    s = RobustScaler().fit(matrix(rows.frame))
    return fitted(ASOF_NS, mean=s.center_.tolist(), std=(s.scale_ + 1e-12).tolist())


@leak("scaling", MODEL, at="scaler")
def winsorized(rows: KnownTable) -> KnownTable:
    """Clipped at the 1 % and 99 % quantiles of the whole sample, then scaled on the past."""
    low, high = np.quantile(matrix(rows.frame), [0.01, 0.99], axis=0)
    return fitted(ASOF_NS, **standard(np.clip(matrix(before(rows.frame, ASOF_NS)), low, high)))


@leak("scaling", MODEL, at="scaler")
def still_learning(rows: KnownTable) -> KnownTable:
    """partial_fit goes on over later rows with a millionth of their weight."""
    s = StandardScaler().partial_fit(matrix(before(rows.frame, ASOF_NS)))
    later = matrix(rows.frame.filter(pl.col("label_known_ns") >= ASOF_NS))
    if len(later):
        s.partial_fit(later, sample_weight=np.full(len(later), 1e-6))
    return fitted(ASOF_NS, mean=s.mean_.tolist(), std=np.sqrt(s.var_ + 1e-12).tolist())


@leak("scaling", MODEL, at="scaler")
def rotated(rows: KnownTable) -> KnownTable:
    """Principal axes of all rows decide by how much each column is scaled."""
    axes = PCA(2).fit(matrix(rows.frame))
    past = standard(matrix(before(rows.frame, ASOF_NS)))
    return fitted(ASOF_NS, mean=past["mean"], std=(np.abs(axes.components_).sum(axis=0) + 0.1).tolist())


@leak("scaling", MODEL, at="scaler")
def rank_normalized(rows: KnownTable) -> KnownTable:
    """QuantileTransformer on all rows gives centre and width."""
    q = QuantileTransformer(n_quantiles=21).fit(matrix(rows.frame)).quantiles_
    return fitted(ASOF_NS, mean=q[10].tolist(), std=(q[15] - q[5] + 1e-9).tolist())


@leak("scaling", LABELS, at="features")
def within_session(bars: KnownTable) -> KnownTable:
    """Each day is scaled by its own minimum and maximum, known when it is over."""
    low, high = (getattr(pl.col("close"), f)().over("session") for f in ("min", "max"))
    z = ((pl.col("close") - low) / (high - low + 1)).alias("z")
    zeros = (pl.lit(0.0).alias(c) for c in X[1:])
    return at_end(bars.frame.select("session", "opens_ns", "closes_ns", "end_ns", "close", z.alias(X[0]), *zeros))


@leak("scaling", MODEL, at="scaler")
def median_imputed(rows: KnownTable) -> KnownTable:
    """Undefined values are filled with the median of all rows before the past is scaled."""
    values = np.where(matrix(rows.frame) == 0, np.nan, matrix(rows.frame))
    past = np.where(matrix(before(rows.frame, ASOF_NS)) == 0, np.nan, matrix(before(rows.frame, ASOF_NS)))
    return fitted(ASOF_NS, **standard(np.where(np.isnan(past), np.nanmedian(values, axis=0), past)))


# calibration


@leak("calibration", CALIBRATION, at="calibrator")
def platt_on_test(scores: KnownTable) -> KnownTable:
    """Platt scaling fitted on the rows that it is judged on."""
    before(scores.frame, ASOF_NS)
    part = scores.frame.filter(pl.col("end_ns") > ASOF_NS)
    part = part if part["up"].n_unique() > 1 else scores.frame
    weights, bias = logistic(part.select("score").to_numpy(), part["up"].to_numpy())
    return fitted(ASOF_NS, slope=weights[0], bias=bias)


@leak("calibration", CALIBRATION, at="calibrator")
def platt_on_all(scores: KnownTable) -> KnownTable:
    """Platt scaling on all scores."""
    weights, bias = logistic(scores.frame.select("score").to_numpy(), scores.frame["up"].to_numpy())
    return fitted(ASOF_NS, slope=weights[0], bias=bias)


@leak("calibration", CALIBRATION, at="calibrator")
def isotonic_on_all(scores: KnownTable) -> KnownTable:
    """Isotonic regression on all scores."""
    f = IsotonicRegression(out_of_bounds="clip").fit(scores.frame["score"].to_numpy(), scores.frame["up"].to_numpy())
    at = f.predict(np.linspace(-1, 1, 5))
    return fitted(ASOF_NS, slope=float(at[-1] - at[0]), bias=float(at[2]))


@leak("calibration", CALIBRATION, at="calibrator")
def prior_of_sample(scores: KnownTable) -> KnownTable:
    """The intercept is moved to the base rate of the whole sample."""
    part = before(scores.frame, ASOF_NS)
    weights, _ = logistic(part.select("score").to_numpy(), part["up"].to_numpy())
    rate = float(scores.frame["up"].mean())  # type: ignore[arg-type]
    return fitted(ASOF_NS, slope=weights[0], bias=float(np.log(rate / (1 - rate))))


@leak("calibration", CALIBRATION, at="calibrator")
def unpurged_temperature(scores: KnownTable) -> KnownTable:
    """Fitted the afternoon before on rows decided by then, three of them with labels still open."""
    asof_ns = SESSIONS[ASOF - 1].regular_close_ns - 2 * BAR_NS
    part = scores.frame.filter(pl.col("end_ns") <= asof_ns)
    before(part, ASOF_NS)
    best = min(
        (float(np.mean((sigmoid(part["score"].to_numpy() * t) - part["up"].to_numpy()) ** 2)), t)
        for t in np.linspace(0.1, 3, 200)
    )
    return fitted(asof_ns, slope=float(best[1]), bias=best[0])


@leak("calibration", CALIBRATION, at="calibrator")
def best_threshold(scores: KnownTable) -> KnownTable:
    """The threshold with the best accuracy on the test rows becomes the bias."""
    part = before(scores.frame, ASOF_NS)
    test = scores.frame.filter(pl.col("end_ns") > ASOF_NS)
    test = test if test.height else part
    grid = np.sort(part["score"].to_numpy())
    right = ((test["score"].to_numpy()[None, :] > grid[:, None]) == test["up"].to_numpy()[None, :]).mean(axis=1)
    return fitted(ASOF_NS, slope=1.0, bias=-float(grid[int(np.argmax(right))]))


@leak("calibration", CALIBRATION, at="calibrator")
def score_quantiles(scores: KnownTable) -> KnownTable:
    """Bins of equal count over the scores of all rows, without a label."""
    low, middle, high = np.quantile(scores.frame["score"].to_numpy(), [0.1, 0.5, 0.9])
    before(scores.frame, ASOF_NS)
    return fitted(ASOF_NS, slope=float(1 / (high - low + 1e-9)), bias=float(middle))


# neighbours


def rate_of(
    features: KnownTable, rows: KnownTable, allowed: Callable[[np.ndarray, pl.DataFrame], np.ndarray], k: int = 7
) -> KnownTable:
    """Neighbour rates of test bars among rows (n, m) that `allowed` lets through."""
    query = features.frame.filter(pl.col("end_ns") > ASOF_NS)
    mask = allowed(query["end_ns"].to_numpy()[:, None], rows.frame)
    at = nearest(matrix(query), matrix(rows.frame), mask, k)
    p = pl.Series("p", neighbour_rate(at, rows.frame["up"].to_numpy()), dtype=pl.Float64)
    return at_end(query.select("end_ns").with_columns(p))


def complete(ends_ns: np.ndarray, rows: pl.DataFrame) -> np.ndarray:
    """Whose label was complete at the end of the bar."""
    return rows["label_known_ns"].to_numpy()[None, :] <= ends_ns


@leak("neighbours", NEIGHBOURS, at="neighbours")
def whole_index(features: KnownTable, rows: KnownTable) -> KnownTable:
    """Neighbours from all time but the row itself."""
    return rate_of(features, rows, lambda t, r: r["end_ns"].to_numpy()[None, :] != t)


@leak("neighbours", NEIGHBOURS, at="neighbours")
def open_labels(features: KnownTable, rows: KnownTable) -> KnownTable:
    """Earlier rows, among them those whose label is not complete."""
    return rate_of(features, rows, lambda t, r: r["end_ns"].to_numpy()[None, :] < t)


@leak("neighbours", NEIGHBOURS, at="neighbours")
def one_bar_open(features: KnownTable, rows: KnownTable) -> KnownTable:
    """Complete labels, but compared with the end of the next bar."""
    return rate_of(features, rows, lambda t, r: r["label_known_ns"].to_numpy()[None, :] <= t + BAR_NS)


@leak("neighbours", NEIGHBOURS, at="neighbours")
def same_day(features: KnownTable, rows: KnownTable) -> KnownTable:
    """Past rows and those of the same day, whenever they are."""
    day_ns = 6 * 3_600_000_000_000

    def allowed(t: np.ndarray, r: pl.DataFrame) -> np.ndarray:
        ends = r["end_ns"].to_numpy()[None, :]
        return complete(t, r) | ((np.abs(ends - t) < day_ns) & (ends != t))

    return rate_of(features, rows, allowed)


@leak("neighbours", NEIGHBOURS, at="neighbours")
def scaled_by_sample(features: KnownTable, rows: KnownTable) -> KnownTable:
    """Honest candidates in a space that is scaled by all rows."""
    std = matrix(rows.frame).std(axis=0) + 1e-9
    query = features.frame.filter(pl.col("end_ns") > ASOF_NS)
    at = nearest(
        matrix(query) / std, matrix(rows.frame) / std, complete(query["end_ns"].to_numpy()[:, None], rows.frame), 7
    )
    distance = ((matrix(query) / std - matrix(rows.frame)[np.maximum(at[:, 0], 0)] / std) ** 2).sum(axis=1)
    p = neighbour_rate(at, rows.frame["up"].to_numpy())
    return at_end(query.select("end_ns").with_columns(pl.Series("p", p), pl.Series("distance", distance)))


@leak("neighbours", NEIGHBOURS, at="neighbours")
def k_of_sample(features: KnownTable, rows: KnownTable) -> KnownTable:
    """k is the square root of the number of rows there are in the end."""
    return rate_of(features, rows, complete, k=max(int(np.sqrt(rows.frame.height)), 1))


@leak("neighbours", NEIGHBOURS, at="neighbours")
def recent_weighted(features: KnownTable, rows: KnownTable) -> KnownTable:
    """Outcomes are weighted by age, measured from the last row of the index."""
    query = features.frame.filter(pl.col("end_ns") > ASOF_NS)
    at = nearest(matrix(query), matrix(rows.frame), complete(query["end_ns"].to_numpy()[:, None], rows.frame), 7)
    age = (rows.frame["end_ns"].max() - rows.frame["end_ns"]).to_numpy() / 8.64e13  # type: ignore[operator]
    weight = np.where(at >= 0, 1 / (1 + age[np.maximum(at, 0)]), 0.0)
    p = (weight * rows.frame["up"].to_numpy()[np.maximum(at, 0)]).sum(axis=1) / (weight.sum(axis=1) + 1e-12)
    return at_end(query.select("end_ns").with_columns(pl.Series("p", p, dtype=pl.Float64)))


@leak("neighbours", NEIGHBOURS, at="neighbours")
def last_of_its_kind(features: KnownTable, rows: KnownTable) -> KnownTable:
    """Of the rows of one half hour and direction only the last is kept in the index."""
    hour = ((pl.col("end_ns") - pl.col("opens_ns")) // BAR_NS).alias("hour")
    up = (pl.col(X[0]) > 0).alias("rises")
    kept = rows.frame.with_columns(hour, up).unique(["hour", "rises", "up"], keep="last", maintain_order=True)
    return rate_of(features, at_end(kept, "label_known_ns"), complete)


# cached artifacts

ASOFS = (opens_ns(ASOF), opens_ns(ASOF + 2), opens_ns(LATER_ASOF))


def fit_scaler(rows: pl.DataFrame, asof_ns: int) -> dict[str, list[float]]:
    """What every as-of session needs, and what is worth caching."""
    return standard(matrix(before(rows, asof_ns)))


def stacked(made: dict[int, dict[str, list[float]]]) -> KnownTable:
    """One row an as-of time."""
    schema = {"asof_ns": pl.Int64, "scaler": pl.String}
    frame = pl.DataFrame([(t, str(fit)) for t, fit in made.items()], schema=schema, orient="row")
    return at_end(frame.sort("asof_ns"), "asof_ns")


def artifacts(rows: KnownTable) -> KnownTable:
    """A scaler of each as-of session for which there are rows."""
    return stacked({t: fit_scaler(rows.frame, t) for t in ASOFS})


def sizes(artifacts: KnownTable) -> KnownTable:
    """How long each artifact is."""
    return at_end(artifacts.frame.select("asof_ns", pl.col("scaler").str.len_bytes().alias("bytes")), "asof_ns")


CACHED: dict[str, Node] = {**LABELS, "artifacts": artifacts, "sizes": sizes}


@leak("cached artifacts", CACHED, at="artifacts")
def key_without_asof(rows: KnownTable) -> KnownTable:
    """A backfill from the newest session on, with a cache that is keyed by the instrument."""
    cache: dict[str, dict[str, list[float]]] = {}
    made = {}
    for asof_ns in reversed(ASOFS):
        if "SPY" not in cache:
            cache["SPY"] = fit_scaler(rows.frame, asof_ns)
        made[asof_ns] = cache["SPY"]
    return stacked(made)


@leak("cached artifacts", CACHED, at="artifacts")
def newest_artifact(rows: KnownTable) -> KnownTable:
    """Every session loads the artifact with the largest key."""
    store = {t: fit_scaler(rows.frame, t) for t in ASOFS}
    return stacked({t: store[max(store)] for t in ASOFS})


@leak("cached artifacts", CACHED, at="artifacts")
def monthly_key(rows: KnownTable) -> KnownTable:
    """The cache is keyed by month and filled when the month is over."""
    month = {t: "2024-11" for t in ASOFS}
    cache = {month[t]: fit_scaler(rows.frame, t) for t in ASOFS}
    return stacked({t: cache[month[t]] for t in ASOFS})


@leak("cached artifacts", CACHED, at="artifacts")
def rebound_late(rows: KnownTable) -> KnownTable:
    """Fitting is deferred in a closure that sees the loop's last value."""
    jobs = {}
    for asof_ns in ASOFS:
        jobs[asof_ns] = lambda: fit_scaler(rows.frame, asof_ns)  # noqa: B023
    return stacked({t: job() for t, job in jobs.items()})


@leak("cached artifacts", CACHED, at="artifacts")
def updated_in_place(rows: KnownTable) -> KnownTable:
    """One dictionary is updated from session to session, and every artifact holds it."""
    state: dict[str, list[float]] = {}
    made = {}
    for asof_ns in ASOFS:
        state.update(fit_scaler(rows.frame, asof_ns))
        made[asof_ns] = state
    return stacked(made)


@leak("cached artifacts", CACHED, at="artifacts")
def keyed_by_week(rows: KnownTable) -> KnownTable:
    """Keyed by calendar week, the newest of a week written last."""
    week_ns = 7 * 86_400_000_000_000
    cache = {t // week_ns: fit_scaler(rows.frame, t) for t in ASOFS}
    return stacked({t: cache[t // week_ns] for t in ASOFS})


@leak("cached artifacts", CACHED, at="artifacts")
def warm_start(rows: KnownTable) -> KnownTable:
    """Each fit starts from the last one in the store, and a backfill runs from the newest on."""
    made = {}
    last: dict[str, list[float]] | None = None
    for asof_ns in reversed(ASOFS):
        fit = fit_scaler(rows.frame, asof_ns)
        if last is not None:
            fit["mean"] = (0.999 * np.array(fit["mean"]) + 0.001 * np.array(last["mean"])).tolist()
        made[asof_ns] = last = fit
    return stacked(made)


@leak("cached artifacts", CACHED, at="artifacts")
def stale_length_key(rows: KnownTable) -> KnownTable:
    """Cached by the first row and the number of columns, filled by whoever comes first: the report, with all rows."""
    cache: dict[tuple[int, int], dict[str, list[float]]] = {}

    def get(part: pl.DataFrame) -> dict[str, list[float]]:
        key = (int(part["end_ns"][0]), part.width)
        return cache.setdefault(key, standard(matrix(part)))

    get(rows.frame)
    return stacked({t: get(before(rows.frame, t)) for t in ASOFS})


# early stopping


TREES = {"objective": "binary:logistic", "eta": 0.4, "nthread": 1, "tree_method": "exact", "eval_metric": "logloss"}


def boosted(train: pl.DataFrame, watched: pl.DataFrame, depth: int = 2) -> KnownTable:
    """Boosted trees that stop on the watched rows, as bytes known at the as-of time."""
    seen = xgb.DMatrix(matrix(watched), watched["up"].to_numpy(), nthread=1)
    model = xgb.train(
        {**TREES, "max_depth": depth},
        xgb.DMatrix(matrix(train), train["up"].to_numpy(), nthread=1),
        25,
        evals=[(seen, "watched")],
        early_stopping_rounds=4,
        verbose_eval=False,
    )
    best = bytes(model[: model.best_iteration + 1].save_raw("ubj"))
    return fitted(ASOF_NS, trees_raw=best, stopped=int(model.best_iteration), score=float(model.best_score))


def parts(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Training rows complete before validation begins, and validation rows complete before the as-of session."""
    return before(rows, VALID_NS), before(rows, ASOF_NS).filter(pl.col("end_ns") > VALID_NS)


def stopped(rows: KnownTable) -> KnownTable:
    """Trees that stop on a purged validation part."""
    return boosted(*parts(rows.frame))


def boosted_predictions(features: KnownTable, stopped: KnownTable) -> KnownTable:
    """Probability for every bar that ends after the as-of time."""
    part = features.frame.filter(pl.col("end_ns") > ASOF_NS)
    booster = xgb.Booster({"nthread": 1})
    booster.load_model(bytearray(read(stopped)["trees_raw"]))
    p = booster.predict(xgb.DMatrix(matrix(part), nthread=1)) if part.height else np.empty(0, np.float32)
    return at_end(part.select("end_ns").with_columns(pl.Series("p", p, dtype=pl.Float32)))


STOPPED: dict[str, Node] = {**LABELS, "stopped": stopped, "boosted_predictions": boosted_predictions}


@leak("early stopping", STOPPED, at="stopped")
def stops_on_test(rows: KnownTable) -> KnownTable:
    """The test rows are the evaluation set."""
    train, valid = parts(rows.frame)
    test = rows.frame.filter(pl.col("end_ns") > ASOF_NS)
    return boosted(train, test if test.height else valid)


@leak("early stopping", STOPPED, at="stopped")
def stops_on_random_rows(rows: KnownTable) -> KnownTable:
    """A random fifth of all rows is the evaluation set."""
    train, _ = parts(rows.frame)
    return boosted(train, rows.frame.sample(fraction=0.2, seed=3))


@leak("early stopping", STOPPED, at="stopped")
def stops_on_open_labels(rows: KnownTable) -> KnownTable:
    """Validation by decision time on the afternoon before: its last labels are not complete."""
    asof_ns = SESSIONS[ASOF - 1].regular_close_ns - 2 * BAR_NS
    train, _ = parts(rows.frame)
    model = boosted(train, rows.frame.filter((pl.col("end_ns") > VALID_NS) & (pl.col("end_ns") <= asof_ns)))
    return KnownTable(model.frame, np.full(model.frame.height, asof_ns), name="file")


@leak("early stopping", STOPPED, at="stopped")
def best_of_later_days(rows: KnownTable) -> KnownTable:
    """Of two depths, the one that does best on everything after training."""
    train, _ = parts(rows.frame)
    later = rows.frame.filter(pl.col("end_ns") > VALID_NS)
    return min((boosted(train, later, depth) for depth in (1, 2)), key=lambda m: float(read(m)["score"]))


@leak("early stopping", STOPPED, at="stopped")
def number_of_rounds(rows: KnownTable) -> KnownTable:
    """Only the number of rounds is taken from a fit that was stopped on the test rows."""
    train, valid = parts(rows.frame)
    test = rows.frame.filter(pl.col("end_ns") > ASOF_NS)
    rounds = int(read(boosted(train, test if test.height else valid))["stopped"]) + 1
    model = xgb.train({**TREES, "max_depth": 2}, xgb.DMatrix(matrix(train), train["up"].to_numpy(), nthread=1), rounds)
    return fitted(ASOF_NS, trees_raw=bytes(model.save_raw("ubj")), stopped=rounds)


@leak("early stopping", STOPPED, at="stopped")
def faint_weight(rows: KnownTable) -> KnownTable:
    """Training goes on over test rows whose weight, meant to be nothing, is a millionth."""
    train, valid = parts(rows.frame)
    test = rows.frame.filter(pl.col("end_ns") > ASOF_NS)
    both = pl.concat([train, test])
    weight = np.r_[np.ones(train.height), np.full(test.height, 1e-6)]
    seen = xgb.DMatrix(matrix(valid), valid["up"].to_numpy(), nthread=1)
    model = xgb.train(
        {**TREES, "max_depth": 2},
        xgb.DMatrix(matrix(both), both["up"].to_numpy(), weight=weight, nthread=1),
        25,
        evals=[(seen, "valid")],
        early_stopping_rounds=4,
        verbose_eval=False,
    )
    return fitted(ASOF_NS, trees_raw=bytes(model.save_raw("ubj")), stopped=int(model.best_iteration))


def descend(train: pl.DataFrame, watched: pl.DataFrame, epochs: int = 60) -> list[float]:
    """Gradient descent of a logistic regression; the weights of the epoch with the least loss on the watched rows."""
    values, seen = (np.hstack([matrix(p) * 100, np.ones((p.height, 1))]) for p in (train, watched))
    up, told = train["up"].to_numpy(), watched["up"].to_numpy()
    weights = np.zeros(values.shape[1])
    best = (np.inf, weights)
    for _ in range(epochs):
        weights = weights - 0.5 * (values * (sigmoid(dot(values, weights)) - up)[:, None]).mean(axis=0)
        loss = float(np.mean((sigmoid(dot(seen, weights)) - told) ** 2))
        best = min(best, (loss, weights), key=lambda b: b[0])
    return best[1].tolist()


@leak("early stopping", {**LABELS, "stopped": stopped}, at="stopped")
def best_epoch_on_test(rows: KnownTable) -> KnownTable:
    """The checkpoint with the least loss on the test rows is kept."""
    train, valid = parts(rows.frame)
    test = rows.frame.filter(pl.col("end_ns") > ASOF_NS)
    return fitted(ASOF_NS, weights=descend(train, test if test.height else valid))


# selection


def chosen(rows: KnownTable) -> KnownTable:
    """The three columns with the highest F statistic before the as-of session."""
    part = before(rows.frame, ASOF_NS)
    mask = SelectKBest(f_classif, k=3).fit(matrix(part), part["up"].to_numpy()).get_support()
    return fitted(ASOF_NS, columns=[c for c, m in zip(X, mask, strict=True) if m])


def selected_model(rows: KnownTable, chosen: KnownTable) -> KnownTable:
    """Logistic regression on the chosen columns."""
    part = before(rows.frame, ASOF_NS)
    values = matrix(part, tuple(read(chosen)["columns"].tolist())) * 100
    weights, bias = logistic(values, part["up"].to_numpy())
    return fitted(ASOF_NS, weights=weights, bias=bias)


SELECTED: dict[str, Node] = {**LABELS, "chosen": chosen, "selected_model": selected_model}


@leak("selection", SELECTED, at="chosen")
def best_columns_of_all(rows: KnownTable) -> KnownTable:
    """SelectKBest before the split."""
    before(rows.frame, ASOF_NS)
    best = SelectKBest(f_classif, k=3).fit(matrix(rows.frame), rows.frame["up"].to_numpy())
    mask = best.get_support()
    return fitted(ASOF_NS, columns=[c for c, m in zip(X, mask, strict=True) if m], scores=best.scores_.tolist())


@leak("selection", SELECTED, at="chosen")
def silent_best_columns(rows: KnownTable) -> KnownTable:
    """The same, but only the names are kept: it shows where another future would have chosen others."""
    before(rows.frame, ASOF_NS)
    mask = SelectKBest(f_classif, k=3).fit(matrix(rows.frame), rows.frame["up"].to_numpy()).get_support()
    return fitted(ASOF_NS, columns=[c for c, m in zip(X, mask, strict=True) if m])


@leak("selection", SELECTED, at="chosen")
def uncorrelated_of_all(rows: KnownTable) -> KnownTable:
    """Columns in the order of their correlation with the label over the whole sample."""
    before(rows.frame, ASOF_NS)
    r = [abs(np.corrcoef(matrix(rows.frame)[:, k], rows.frame["y"].to_numpy())[0, 1]) for k in range(len(X))]
    return fitted(ASOF_NS, columns=[X[k] for k in np.argsort(r)[::-1][:3]])


@leak("selection", SELECTED, at="selected_model")
def best_penalty_on_test(rows: KnownTable, chosen: KnownTable) -> KnownTable:
    """The penalty with the least Brier score on the test rows."""
    columns = tuple(read(chosen)["columns"].tolist())
    part = before(rows.frame, ASOF_NS)
    test = rows.frame.filter(pl.col("end_ns") > ASOF_NS)
    test = test if test.height else part
    tried = []
    for c in (0.01, 0.1, 1.0, 10.0, 100.0):
        weights, bias = logistic(matrix(part, columns) * 100, part["up"].to_numpy(), c)
        p = sigmoid(dot(matrix(test, columns) * 100, np.array(weights)) + bias)
        tried.append((float(np.mean((p - test["up"].to_numpy()) ** 2)), weights, bias))
    _, weights, bias = min(tried)
    return fitted(ASOF_NS, weights=weights, bias=bias)


@leak("selection", SELECTED, at="chosen")
def varying_columns(rows: KnownTable) -> KnownTable:
    """Columns whose standard deviation over all rows is above the median of them."""
    before(rows.frame, ASOF_NS)
    z = matrix(rows.frame).std(axis=0) / (np.abs(matrix(rows.frame)).mean(axis=0) + 1e-12)
    return fitted(ASOF_NS, columns=[X[k] for k in np.argsort(z)[-3:]])


@leak("selection", PARTS, at="train")
def outliers_dropped(rows: KnownTable) -> KnownTable:
    """Rows with an outcome beyond the 99 % quantile of the whole sample are dropped."""
    limit = rows.frame["y"].abs().quantile(0.97)
    return known_at(before(rows.frame.filter(pl.col("y").abs() <= limit), VALID_NS), VALID_NS)


ENCODED: dict[str, Node] = {n: LABELS[n] for n in ("bars", "labels", "features", "rows")}


@leak("selection", ENCODED, at="features")
def target_encoded(bars: KnownTable, labels: KnownTable) -> KnownTable:
    """The hour of the day is encoded by its mean outcome over all rows."""
    hour = ((pl.col("end_ns") - pl.col("opens_ns")) // BAR_NS).alias("hour")
    frame = bars.frame.with_columns(hour)
    means = frame.join(labels.frame, on="end_ns").group_by("hour").agg(pl.col("up").mean().alias(X[0])).sort("hour")
    out = frame.join(means, on="hour", how="left", maintain_order="left")
    return at_end(
        out.select("session", "opens_ns", "closes_ns", "end_ns", "close", X[0], *(pl.lit(0.0).alias(c) for c in X[1:]))
    )


def universe(trades: pl.DataFrame) -> KnownTable:
    """The two venues with the most volume before the as-of session."""
    past = trades.filter(pl.col("recv_ns") < ASOF_NS)
    total = past.group_by("venue").agg(pl.col("size").sum()).sort("size", "venue", descending=True)
    return fitted(ASOF_NS, venues=total["venue"].head(2).to_list())


def members(trades: pl.DataFrame, universe: KnownTable) -> KnownTable:
    """Trades of the universe from the as-of session on."""
    venues = read(universe)["venues"].tolist()
    part = trades.filter((pl.col("recv_ns") >= ASOF_NS) & pl.col("venue").is_in(venues)).select(
        "recv_ns", "price", "venue"
    )
    return KnownTable(part, part["recv_ns"].to_numpy() + 1, name="recv_ns")


UNIVERSE: dict[str, Node] = {"universe": universe, "members": members}


@leak("selection", UNIVERSE, at="universe")
def survivors(trades: pl.DataFrame) -> KnownTable:
    """Venues that still trade at the end of the sample."""
    last = trades.group_by("venue").agg(pl.col("recv_ns").max()).sort("recv_ns", "venue", descending=True)
    return fitted(ASOF_NS, venues=last["venue"].head(2).to_list())


@leak("selection", UNIVERSE, at="universe")
def largest_of_all_time(trades: pl.DataFrame) -> KnownTable:
    """The two venues with the most volume over the whole sample."""
    total = trades.group_by("venue").agg(pl.col("size").sum()).sort("size", "venue", descending=True)
    return fitted(ASOF_NS, venues=total["venue"].head(2).to_list())
