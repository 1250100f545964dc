"""The honest pipelines into which leaks are planted: bars, features, labels, a walk-forward fit, calibration, neighbours."""

from __future__ import annotations

import numpy as np
import polars as pl

from spymaster_assets.proof.known import KnownTable
from spymaster_assets_tests.traps.graphs import Node, at_end, fitted, read
from spymaster_assets_tests.traps.market import ASOF, BAR_NS, SESSIONS, VALID_FROM, opens_ns

X = ("ret_1", "ret_3", "vol_6", "flow", "spread")
HORIZON = 3
"""Bars over which labels look ahead."""
BAR = (
    pl.col("price").first().alias("open"),
    pl.col("price").max().alias("high"),
    pl.col("price").min().alias("low"),
    pl.col("price").last().alias("close"),
    pl.col("size").sum().alias("volume"),
    pl.len().cast(pl.Int64).alias("n"),
    (pl.col("size") * (pl.col("venue") == "A")).sum().alias("volume_a"),
)
"""What a bar says of its trades."""
ASOF_NS, VALID_NS = opens_ns(ASOF), opens_ns(VALID_FROM)


KNOWN_AT_START = ("session", "level", "side", "before")
"""Columns of a touch that are known when its bar starts."""


def session_frame() -> pl.DataFrame:
    """Sessions as the calendar has them in advance: key, opens_ns, closes_ns."""
    return pl.DataFrame(
        {
            "session": [s.key for s in SESSIONS],
            "opens_ns": [s.regular_open_ns for s in SESSIONS],
            "closes_ns": [s.regular_close_ns for s in SESSIONS],
        }
    )


def with_session(frame: pl.DataFrame, time: str = "recv_ns") -> pl.DataFrame:
    """Rows of regular hours with session, opens_ns, closes_ns and the bar they lie in (start_ns, end_ns)."""
    inside = frame.sort(time, maintain_order=True).join_asof(
        session_frame(), left_on=time, right_on="opens_ns", strategy="backward"
    )
    start = pl.col("opens_ns") + (pl.col(time) - pl.col("opens_ns")) // BAR_NS * BAR_NS
    return inside.filter(pl.col(time) < pl.col("closes_ns")).with_columns(
        start.alias("start_ns"), (start + BAR_NS).alias("end_ns")
    )


def bars(trades: pl.DataFrame) -> KnownTable:
    """Half-hour bars of receipt times [start, end), known at their end."""
    return at_end(bar_frame(trades))


def bar_frame(trades: pl.DataFrame) -> pl.DataFrame:
    """Bars of trades, the one that is still forming included: it is known only at its end."""
    out = with_session(trades).group_by("session", "opens_ns", "closes_ns", "start_ns", "end_ns", maintain_order=True)
    return out.agg(BAR)


def feature_frame(bars: pl.DataFrame) -> pl.DataFrame:
    """Five features of bars up to and with the current one, nulls filled with 0."""
    close = pl.col("close").log()
    out = bars.with_columns(
        close.diff().alias("ret_1"),
        (close - close.shift(3)).alias("ret_3"),
        (pl.col("volume_a") / pl.col("volume")).alias("flow"),
        ((pl.col("high") - pl.col("low")) / pl.col("close")).alias("spread"),
    ).with_columns(pl.col("ret_1").rolling_std(6).alias("vol_6"))
    return out.select("session", "opens_ns", "closes_ns", "end_ns", "close", *(pl.col(c).fill_null(0.0) for c in X))


def features(bars: KnownTable) -> KnownTable:
    """Features known when their bar ends."""
    return at_end(feature_frame(bars.frame))


def label_frame(bars: pl.DataFrame, horizon: int = HORIZON) -> pl.DataFrame:
    """Return over the next bars of the same session and whether it is up; rows without a whole horizon have none."""
    ahead = pl.col("close").shift(-horizon).over("session")
    return bars.select(
        "end_ns",
        (ahead / pl.col("close") - 1).alias("y"),
        (ahead > pl.col("close")).cast(pl.Int64).alias("up"),
        pl.col("end_ns").shift(-horizon).over("session").alias("label_known_ns"),
    ).drop_nulls()


def labels(bars: KnownTable) -> KnownTable:
    """Labels known when their horizon has ended."""
    return at_end(label_frame(bars.frame), "label_known_ns")


def rows(features: KnownTable, labels: KnownTable) -> KnownTable:
    """Labelled rows, known when the label is."""
    return at_end(features.frame.join(labels.frame, on="end_ns", how="inner", maintain_order="left"), "label_known_ns")


def before(rows: pl.DataFrame, time_ns: int) -> pl.DataFrame:
    """Rows whose label was complete before a time; raise ValueError when that is too short a history."""
    out = rows.filter(pl.col("label_known_ns") < time_ns)
    if out.height < 30:
        raise ValueError(f"{out.height} labelled rows before {time_ns}; at least 30 are needed")
    return out


def train(rows: KnownTable) -> KnownTable:
    """Training rows of the as-of session: complete before the first validation session."""
    part = before(rows.frame, VALID_NS)
    return KnownTable(part, np.full(part.height, VALID_NS), name="end_ns")


def validation(rows: KnownTable) -> KnownTable:
    """Validation rows: decided from the first validation session on, complete before the as-of session."""
    part = before(rows.frame, ASOF_NS).filter(pl.col("end_ns") > VALID_NS)
    return KnownTable(part, np.full(part.height, ASOF_NS), name="end_ns")


def matrix(frame: pl.DataFrame, columns: tuple[str, ...] = X) -> np.ndarray:
    """Columns as float64 (n, f), in C order."""
    return np.ascontiguousarray(frame.select(columns).to_numpy().astype(np.float64))


def dot(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Row by row: a BLAS product may round a row otherwise when there are more rows."""
    return (values * weights).sum(axis=1)


def scaler(rows: KnownTable) -> KnownTable:
    """Mean and deviation of the rows complete before the as-of session."""
    values = matrix(before(rows.frame, ASOF_NS))
    return fitted(ASOF_NS, mean=values.mean(axis=0).tolist(), std=(values.std(axis=0) + 1e-12).tolist())


def scaled(frame: pl.DataFrame, scaler: KnownTable) -> np.ndarray:
    """Standardized features (n, f)."""
    s = read(scaler)
    return (matrix(frame) - s["mean"]) / s["std"]


def logistic(values: np.ndarray, up: np.ndarray, c: float = 1.0) -> tuple[list[float], float]:
    """Weights and intercept of a logistic regression with ridge 1/c, by six Newton steps."""
    design = np.hstack([values, np.ones((len(values), 1))])
    weights, ridge = np.zeros(design.shape[1]), np.eye(design.shape[1]) / c
    for _ in range(6):
        p = sigmoid(dot(design, weights))
        curvature = design.T @ (design * (p * (1 - p))[:, None]) + ridge
        weights = weights - np.linalg.solve(curvature, design.T @ (p - up) + weights / c)
    return weights[:-1].tolist(), float(weights[-1])


def model(rows: KnownTable, scaler: KnownTable) -> KnownTable:
    """Logistic regression on the rows complete before the as-of session."""
    part = before(rows.frame, ASOF_NS)
    weights, bias = logistic(scaled(part, scaler), part["up"].to_numpy())
    return fitted(ASOF_NS, weights=weights, bias=bias)


def sigmoid(score: np.ndarray) -> np.ndarray:
    """Logistic function."""
    return 1 / (1 + np.exp(-np.clip(score, -50, 50)))


def predictions(features: KnownTable, scaler: KnownTable, model: KnownTable) -> KnownTable:
    """Probability for every bar that ends in the as-of session or later."""
    part = features.frame.filter(pl.col("end_ns") > ASOF_NS)
    m = read(model)
    return at_end(
        part.select("end_ns").with_columns(
            pl.Series("p", sigmoid(dot(scaled(part, scaler), m["weights"]) + m["bias"]), dtype=pl.Float64)
        )
    )


def scores(rows: KnownTable) -> KnownTable:
    """Raw scores of a model of the training part, for validation and later rows, known with the label that stands beside them."""
    past = before(rows.frame, VALID_NS)
    mean, std = matrix(past).mean(axis=0), matrix(past).std(axis=0) + 1e-12
    weights, bias = logistic((matrix(past) - mean) / std, past["up"].to_numpy())
    part = rows.frame.filter(pl.col("end_ns") > VALID_NS)
    score = dot((matrix(part) - mean) / std, np.array(weights)) + bias
    columns = ("session", "end_ns", "y", "up", "label_known_ns")
    return at_end(part.select(columns).with_columns(pl.Series("score", score, dtype=pl.Float64)), "label_known_ns")


def calibrator(scores: KnownTable) -> KnownTable:
    """Platt scaling on the scores whose label was complete before the as-of session."""
    part = before(scores.frame, ASOF_NS)
    weights, bias = logistic(part.select("score").to_numpy(), part["up"].to_numpy())
    return fitted(ASOF_NS, slope=weights[0], bias=bias)


def calibrated(scores: KnownTable, calibrator: KnownTable) -> KnownTable:
    """Calibrated probabilities of test rows, known with their labels."""
    part = scores.frame.filter(pl.col("end_ns") > ASOF_NS)
    c = read(calibrator)
    p = sigmoid(part["score"].to_numpy() * c["slope"] + c["bias"])
    return at_end(part.select("end_ns", "label_known_ns", "up", pl.Series("p", p, dtype=pl.Float64)), "label_known_ns")


def nearest(query: np.ndarray, index: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    """Indices (n, k) of the nearest allowed (n, m) rows, -1 where there are fewer; ties go to the earlier row."""
    distance = ((query[:, None, :] - index[None, :, :]) ** 2).sum(axis=2)
    distance = np.where(allowed, distance, np.inf)
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.where(np.isfinite(np.take_along_axis(distance, order, axis=1)), order, -1)


def neighbour_rate(at: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Mean outcome (n,) of the neighbours, NaN without one."""
    found = at >= 0
    total = np.where(found, up[np.maximum(at, 0)], 0).sum(axis=1) if len(up) else np.zeros(len(at))
    return np.divide(total, found.sum(axis=1), out=np.full(len(at), np.nan), where=found.any(axis=1))


def neighbours(features: KnownTable, rows: KnownTable) -> KnownTable:
    """Share of ups among the 7 nearest rows whose label was complete when the bar ended."""
    every = features.frame
    query = every.filter(pl.col("end_ns") > ASOF_NS)
    known = rows.frame["label_known_ns"].to_numpy()[None, :] <= query["end_ns"].to_numpy()[:, None]
    at = nearest(matrix(query), matrix(rows.frame), known, 7)
    said = pl.Series("p", neighbour_rate(at, rows.frame["up"].to_numpy()), dtype=pl.Float64)
    return at_end(query.select("end_ns").with_columns(said))


def quoted(bars: KnownTable, quotes: pl.DataFrame) -> KnownTable:
    """Bars with the last quote received before their end."""
    left = bars.frame.select("session", "end_ns", "close").with_columns((pl.col("end_ns") - 1).alias("at_ns"))
    right = quotes.select("recv_ns", "bid", "ask", "depth")
    return at_end(left.join_asof(right, left_on="at_ns", right_on="recv_ns", strategy="backward").drop("at_ns"))


def spreads(quoted: KnownTable) -> KnownTable:
    """Quoted spread and its mean over four bars."""
    spread = (pl.col("ask") - pl.col("bid")).cast(pl.Float64)
    return at_end(quoted.frame.select("end_ns", spread.alias("spread"), spread.rolling_mean(4).alias("mean_4")))


def hours(bars: KnownTable) -> KnownTable:
    """Bars with the minutes to the calendar's close."""
    return at_end(
        bars.frame.select(
            "session", "end_ns", "close", ((pl.col("closes_ns") - pl.col("end_ns")) / 6e10).alias("to_close")
        )
    )


def hourly(hours: KnownTable) -> KnownTable:
    """A feature of the time that remains."""
    return at_end(hours.frame.select("end_ns", pl.col("to_close").sqrt().alias("root_time")))


def touch_frame(bars: pl.DataFrame) -> pl.DataFrame:
    """Bars whose range comes within a fiftieth of the last close before them: that close (level), its side of the close before it, and
    how many touches the session had before."""
    level = pl.col("close").shift(1)
    out = bars.with_columns(level.alias("level"), (level - level.shift(1)).sign().alias("side")).drop_nulls()
    near = (pl.col("low") <= 1.02 * pl.col("level")) & (pl.col("high") >= 0.98 * pl.col("level"))
    return out.filter(near).with_columns(before=pl.int_range(pl.len()).over("session"))


def at_start(touches: pl.DataFrame, *columns: str) -> KnownTable:
    """Touches, certain when their bar has ended; KNOWN_AT_START and `columns` are declared known when it starts."""
    known = {c: touches["start_ns"].to_numpy() for c in (*KNOWN_AT_START, *columns)}
    frame = touches.select("start_ns", "end_ns", *known, "close")
    return KnownTable(frame, frame["end_ns"].to_numpy(), known, "start_ns", ("start_ns",))


def touches(bars: KnownTable) -> KnownTable:
    """Touches with what was known when their bar started, and its close."""
    return at_start(touch_frame(bars.frame))


SIGNALS: dict[str, Node] = {"bars": bars, "features": features}
LABELS: dict[str, Node] = {**SIGNALS, "labels": labels, "rows": rows}
PARTS: dict[str, Node] = {**LABELS, "train": train}
MODEL: dict[str, Node] = {**LABELS, "scaler": scaler, "model": model, "predictions": predictions}
CALIBRATION: dict[str, Node] = {**LABELS, "scores": scores, "calibrator": calibrator, "calibrated": calibrated}
NEIGHBOURS: dict[str, Node] = {**LABELS, "neighbours": neighbours}
QUOTES: dict[str, Node] = {"bars": bars, "quoted": quoted, "spreads": spreads}
TOUCHES: dict[str, Node] = {"bars": bars, "touches": touches}
HOURS: dict[str, Node] = {"bars": bars, "hours": hours, "hourly": hourly}
