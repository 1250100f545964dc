"""What of a report was known when, on predictions and pages made by hand."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl
import pytest

from spymaster_assets.proof.reports import page_entries, page_sections, prediction_differences
from spymaster_assets.settings import MINUTE_NS, NS
from spymaster_assets.store import Artifact, ArtifactStore
from spymaster_assets_tests.builders import CONTRACT

ASOF = "2024-02-20"
T0_NS = 1_708_440_000 * NS
ROWS = pl.DataFrame(
    {
        "event_id": ["a", "b"],
        "ts_ns": [T0_NS, T0_NS + 60 * MINUTE_NS],
        "label_known_ns": [T0_NS + 16 * MINUTE_NS, T0_NS + 76 * MINUTE_NS],
    }
)
PREDICTIONS = pl.DataFrame(
    {
        "asof": [ASOF] * 2,
        "session": [ASOF] * 2,
        "event_id": ["a", "b"],
        "model": ["trees"] * 2,
        "head": ["tradeable_2"] * 2,
        "delay": ["4min"] * 2,
        "stage": ["B"] * 2,
        "p": [0.25, 0.5],
        "y": [0.0, 1.0],
        "reference": [0.3, 0.3],
    }
)


def report(root: Path, predictions: pl.DataFrame) -> Artifact:
    buffer = io.BytesIO()
    predictions.write_parquet(buffer)
    return ArtifactStore(root).publish("calibration_report", ASOF, {"predictions.parquet": buffer.getvalue()})


@pytest.mark.parametrize(
    ("column", "known_after_min"),
    # stage B of 4 minutes decides at t0 + 4 min, its label is complete 8 minutes later
    [("p", 4), ("reference", 4), ("y", 12), ("session", 12), ("row", 12)],
)
def test_a_prediction_counts_from_its_decision_and_its_outcome_from_its_label(
    tmp_path: Path, column: str, known_after_min: int
) -> None:
    stored = report(tmp_path / "stored", PREDICTIONS)
    if column == "row":
        forged = PREDICTIONS.head(1)
    else:
        other = pl.lit("2024-02-21") if column == "session" else pl.lit(0.75)
        forged = PREDICTIONS.with_columns(pl.when(event_id="b").then(other).otherwise(column).alias(column))
    replayed = report(tmp_path / "replayed", forged)
    known_ns = int(ROWS["ts_ns"][1]) + known_after_min * MINUTE_NS
    for cut_ns, seen in ((known_ns - 1, False), (known_ns, True), (known_ns + 60 * MINUTE_NS, True)):
        found, compared = prediction_differences(stored, replayed, ROWS, ROWS, cut_ns, CONTRACT)
        assert compared > 0
        assert bool(found) is seen, (column, cut_ns - known_ns, found)
        if seen and column != "row":
            assert [(d.column, d.row) for d in found] == [(column, "b trees tradeable_2 4min B")]


def test_a_prediction_of_no_touch_is_known_at_any_time(tmp_path: Path) -> None:
    stored = report(tmp_path / "stored", PREDICTIONS)
    unknown = PREDICTIONS.with_columns(event_id=pl.Series(["a", "z"]))
    found, _ = prediction_differences(stored, report(tmp_path / "replayed", unknown), ROWS, ROWS, 0, CONTRACT)
    assert found


def test_a_page_is_told_apart_by_section_and_fold() -> None:
    folds = b"<tr><td>2024-02-20</td><td>7</td></tr>\n<tr><td>2024-02-22</td><td>8</td></tr>\n"
    skipped = b"<tr><td>2024-02-20</td><td>x</td></tr>\n<tr><td>2024-02-20</td><td>y</td></tr>\n"
    thin = b"<h2>Input</h2><tr><td>2024-02-20</td><td>90 %</td></tr>"
    page = b"30 sessions<h2>Folds</h2>" + folds + thin + b"<h2>Heads that were not trained</h2>" + skipped
    assert page_sections(page) == {"Folds": folds, "Heads that were not trained": skipped}
    assert page_entries(page, ["2024-02-20"]) == {
        "Folds, 2024-02-20": folds.splitlines()[0],
        "Heads that were not trained, 2024-02-20": b"".join(skipped.splitlines()),
    }
