"""What of a report was known when: a prediction at its decision, its outcome with its label, a page by section and by fold."""

from __future__ import annotations

import re
from collections.abc import Collection

import polars as pl

from spymaster_assets.contract import Contract, decision_after_s
from spymaster_assets.proof.known import KnownTable, Result, compare
from spymaster_assets.settings import NS
from spymaster_assets.store import Artifact

PREDICTIONS = "predictions.parquet"
OF_ALL_SESSIONS = ("How often does price move at all?", "Input", "Limits")
"""Sections of the page that tell of every stored session, as what stands above the first section does."""
_SECTION = re.compile(rb"<h2>(.*?)</h2>")
_ENTRY = re.compile(rb"<tr><td>(\d{4}-\d\d-\d\d)</td>.*")


def prediction_differences(
    stored: Artifact, replayed: Artifact, rows: pl.DataFrame, again: pl.DataFrame, cut_ns: int, contract: Contract
) -> Result:
    """Differences of two calibration reports in the predictions that were known at cut_ns, and how many values were compared.

    rows, again: event_id, ts_ns and label_known_ns of the touches behind either. A row is there and whole once its label is complete; p and
    reference of rows that both hold are compared from their decision on, since which rows are judged hangs on their labels.
    """
    one, other = _timed(stored, rows, contract), _timed(replayed, again, contract)
    told = (stored.asset, stored.key)
    found, compared = compare(*told, _known(one, "complete_ns"), _known(other, "complete_ns"), cut_ns)
    said = [
        _known(a.join(b, on="row", how="semi").select("row", "p", "reference", "decided_ns"), "decided_ns")
        for a, b in ((one, other), (other, one))
    ]
    more, values = compare(*told, said[0], said[1], cut_ns)
    columns = {d.column for d in found}
    return [*found, *(d for d in more if d.column not in columns)], compared + values


def page_sections(page: bytes) -> dict[str, bytes]:
    """Sections of a walk-forward report's page by their title, without those that tell of all stored sessions."""
    _, *parts = _SECTION.split(page)
    titles = (title.decode() for title in parts[::2])
    return {t: body for t, body in zip(titles, parts[1::2], strict=True) if t not in OF_ALL_SESSIONS}


def page_entries(page: bytes, folds: Collection[str]) -> dict[str, bytes]:
    """Table rows of a walk-forward report's page that stand for these folds, by section and fold."""
    out: dict[str, bytes] = {}
    for title, body in page_sections(page).items():
        for match in _ENTRY.finditer(body):
            if (asof := match[1].decode()) in folds:
                name = f"{title}, {asof}"
                out[name] = out.get(name, b"") + match[0]
    return out


def _timed(report: Artifact, rows: pl.DataFrame, contract: Contract) -> pl.DataFrame:
    """The predictions of a report, each with a name of its own, when it was decided and when its label was complete."""
    said = report.frame(PREDICTIONS)
    heads = said.select("delay", "stage").unique(maintain_order=True)
    heads = heads.with_columns(
        decided_s=pl.Series([decision_after_s(stage, delay) for delay, stage in heads.iter_rows()], dtype=pl.Int64),
        complete_s=pl.Series([contract[f"outcome_{d}"].known_after_s for d in heads["delay"]], dtype=pl.Int64),
    )
    times = rows.select("event_id", "ts_ns", "label_known_ns")
    said = said.join(times, on="event_id", how="left", maintain_order="left")
    said = said.join(heads, on=["delay", "stage"], how="left", maintain_order="left")
    named = pl.concat_str("event_id", "model", "head", "delay", "stage", separator=" ")
    # a prediction of no touch is known at any time
    decided = (pl.col("ts_ns") + pl.col("decided_s") * NS).fill_null(0)
    complete = pl.min_horizontal(pl.col("ts_ns") + pl.col("complete_s") * NS, "label_known_ns").fill_null(0)
    said = said.with_columns(row=named, decided_ns=decided, complete_ns=pl.max_horizontal(decided, complete))
    return said.drop("ts_ns", "label_known_ns", "decided_s", "complete_s")


def _known(frame: pl.DataFrame, column: str) -> KnownTable:
    return KnownTable(frame.drop("decided_ns", "complete_ns", strict=False), frame[column].to_numpy(), name="row")
