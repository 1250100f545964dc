"""Contract columns as a float matrix; nothing here is fitted, so nothing can leak."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import polars as pl
from numpy.typing import NDArray

from spymaster_assets.contract import Contract, decision_after_s, decision_column
from spymaster_assets.errors import ContractError
from spymaster_assets.settings import DELAYS_S, NS

HEADS = ("tradeable_2", "direction", "strength")
CLASSIFIERS = ("tradeable_2", "direction")


def encode(
    frame: pl.DataFrame, contract: Contract, names: Iterable[str], stage: str, delay: str
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """(n, f) float32 matrix and its names: numbers and booleans as they are, null as NaN, text one-hot over the contract's values.

    Every matrix that a model, a baseline or an index reads is made here. Raises ContractError when a named column is a label or known
    after the decision of `stage` for the labels of `delay`, when a row decides at another time, or when the frame lacks a column.
    """
    columns = [contract[name] for name in names]
    contract.require_known([c.name for c in columns], decision_after_s(stage, delay))
    _require_decisions(frame, stage, delay)
    missing = [c.name for c in columns if c.name not in frame.columns]
    if missing:
        raise ContractError(f"the table lacks {', '.join(missing)}", expected="the columns of features.json")
    parts: list[pl.Expr] = []
    for c in columns:
        if c.dtype == "string":
            parts += [(pl.col(c.name) == v).cast(pl.Float32).alias(f"{c.name}={v}") for v in c.values]
        else:
            parts.append(pl.col(c.name).cast(pl.Float32))
    table = frame.select(parts)
    if not parts:
        return np.empty((frame.height, 0), np.float32), ()
    matrix = table.to_numpy().astype(np.float32, copy=False)
    return np.ascontiguousarray(matrix), tuple(table.columns)


def feature_matrix(
    frame: pl.DataFrame, contract: Contract, stage: str, delay: str, ablation: str = "full"
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """`encode` of what a model of `stage` may read for the labels of `delay`."""
    return encode(frame, contract, [c.name for c in contract.features(stage, delay, ablation)], stage, delay)


def labelled_rows(frame: pl.DataFrame, head: str, delay: str, stage: str, contract: Contract) -> NDArray[np.bool_]:
    """Rows on which a head is trained and judged.

    tradeable_2, strength: the outcome is defined. direction: BREAK or BOUNCE. Stage B leaves out rows that are already resolved at t1;
    stage A decides before t1 and may not select on it.
    """
    _known_head(head, delay)
    outcome = pl.col(f"outcome_{delay}")
    keep = outcome.is_in(["BREAK", "BOUNCE"]) if head == "direction" else outcome.is_in(["BREAK", "BOUNCE", "CHOP"])
    resolved = f"already_resolved_{delay}"
    if contract[resolved].known_after_s <= decision_after_s(stage, delay):
        keep &= ~pl.col(resolved).fill_null(False)
    return frame.select(keep.fill_null(False).alias("keep"))["keep"].to_numpy()


def target(frame: pl.DataFrame, head: str, delay: str) -> NDArray[np.float64]:
    """(n,) target: tradeable_2 0/1, direction 1 for BREAK and 0 for BOUNCE, strength in SPY dollars; NaN where undefined."""
    _known_head(head, delay)
    if head == "strength":
        expr = pl.col(f"strength_signed_{delay}")
    elif head == "tradeable_2":
        expr = pl.col(f"tradeable_2_{delay}").cast(pl.Float64)
    else:
        outcome = pl.col(f"outcome_{delay}")
        expr = pl.when(outcome == "BREAK").then(1.0).when(outcome == "BOUNCE").then(0.0).otherwise(None)
    values = frame.select(expr.cast(pl.Float64).alias("y"))["y"]
    return values.fill_null(float("nan")).to_numpy()


def _require_decisions(frame: pl.DataFrame, stage: str, delay: str) -> None:
    column, after_s = decision_column(stage, delay), decision_after_s(stage, delay)
    if missing := [c for c in ("event_id", "ts_ns", column) if c not in frame.columns]:
        raise ContractError(f"the table lacks {', '.join(missing)}", expected="the columns of features.json")
    odd = frame.filter((pl.col(column) != pl.col("ts_ns") + after_s * NS).fill_null(True))
    if odd.height:
        raise ContractError(
            f"row {odd['event_id'][0]} does not decide at t0+{after_s}s",
            where=column,
            expected=f"the decision of stage {stage} for the labels of {delay}",
        )


def _known_head(head: str, delay: str) -> None:
    if head not in HEADS or delay not in DELAYS_S:
        raise ContractError(f"unknown head {head!r} or delay {delay!r}", expected=f"{HEADS} and {tuple(DELAYS_S)}")
