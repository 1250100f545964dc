"""The walk-forward report: one HTML file without any outside request."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spymaster_assets.evaluation.calibration import BASELINES
from spymaster_assets.partitions import calendar_of

_TEMPLATE = "report.html.j2"
NAMES = {
    "patchtst": "PatchTST",
    "trees": "Boosted trees",
    "retrieval": "Retrieval (kNN)",
    "logistic": "Logistic regression",
    "time_of_day": "Time of day",
    "null_knn": "Random neighbours",
}
HEADS = {
    "tradeable_2": "Will price move threshold 2 from the level?",
    "direction": "If it does: break or bounce?",
    "strength": "How far (signed, SPY dollars)?",
}

CANARY_NAMES = {
    "planted_declared": "future column refused",
    "planted_replay": "lie seen by replay",
    "planted_column": "lie seen by its AUC",
    "planted_model": "trees of the lie",
    "planted_patchtst": "PatchTST of the lie",
    "production_columns": "best real column",
    "production_sequences": "best of the sequences",
    "shuffled_labels": "shuffled labels",
    "shuffled_labels_patchtst": "shuffled, PatchTST",
    "noise_trees": "trees of noise",
    "noise_retrieval": "neighbours of noise",
}
_WORST_FIRST = ("failed", "not assessable", "holds")


@dataclass(frozen=True)
class ReportData:
    """What the report shows.

    sessions: keys with signals. coverage: market_files records of those.
    missing_feeds: feeds of the contract that no session has. base_rates: {mode: {delay: {n, reached_1, reached_2}}}. folds:
    calibration reports, oldest first. canaries: canaries.json of every fold, also of those whose scores are withheld. pooled: `judge`
    entries of all folds together. skipped: heads without a model, with the reason. fold_strip, reliability, label_balance,
    example_chart: data URIs.
    """

    symbol: str
    simulated: bool
    label_mode: str
    schema_version: str
    data_sha256: str
    sessions: list[str]
    touches: int
    coverage: list[dict[str, Any]]
    missing_feeds: list[str]
    base_rates: dict[str, dict[str, dict[str, int]]]
    label_settings: dict[str, Any]
    split_settings: dict[str, Any]
    folds: list[dict[str, Any]]
    canaries: list[dict[str, Any]]
    pooled: list[dict[str, Any]]
    trials: int
    skipped: list[dict[str, Any]]
    fold_strip: str
    reliability: str
    label_balance: str
    example_session: str
    example_chart: str


def render_report(data: ReportData) -> bytes:
    """UTF-8 HTML of the report."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "signed": _signed, "percent": _percent}
    template = environment.get_template(_TEMPLATE)
    order = [*NAMES]
    rows = sorted(
        data.pooled,
        key=lambda e: (
            list(HEADS).index(e["head"]),
            e["delay"],
            e["stage"],
            order.index(e["model"]) if e["model"] in order else 99,
        ),
    )
    values = {f.name: getattr(data, f.name) for f in fields(data)}
    html = template.render(
        **{**values, "pooled": rows},
        names=NAMES,
        head_questions=HEADS,
        verdicts=verdicts(data.pooled),
        canary_rows=canary_rows(data.canaries),
        canary_names=CANARY_NAMES,
        rolls=[c for c in data.coverage if c["front"]["rolled_from"]],
        thin=[c for c in data.coverage if c["coverage_regular"] < 1],
        absent=absent_sessions(data.symbol, data.sessions),
        records=sum(f["session_record_count"] for c in data.coverage for f in c["files"]),
        schemas=sorted({c["schema"] for c in data.coverage}),
        best_baseline=best_baselines(data.pooled),
    )
    return html.encode()


def absent_sessions(symbol: str, sessions: list[str]) -> list[str]:
    """Trading sessions between the first and the last of `sessions` that are not among them."""
    if not sessions:
        return []
    between = calendar_of(symbol).sessions(min(sessions), max(sessions))
    return [k for k in between if k not in set(sessions)]


def verdicts(pooled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Facts of a family: heads scored, heads whose 95 % skill interval lies above 0, and those that also beat every baseline."""
    best = best_baselines(pooled)
    out = []
    for model in dict.fromkeys(e["model"] for e in pooled if not e["baseline"]):
        scored = [e for e in pooled if e["model"] == model and not e["reason"]]
        above = [e for e in scored if (e["intervals"].get("skill") or (0, 0))[0] > 0]
        beats = [e for e in above if (e["metrics"]["skill"] or 0) > best.get((e["head"], e["delay"], e["stage"]), 0.0)]
        out.append({"model": model, "scored": len(scored), "above": len(above), "beats": len(beats)})
    return out


def canary_rows(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """{asof, published, cells: {canary: {verdict, value, statistic}}} of each fold: the worst verdict of a canary, and its value that
    lies furthest from its limit."""
    rows = []
    for report in reports:
        cells = {}
        for name in CANARY_NAMES:
            parts = [c for c in report["canaries"] if c["canary"] == name]
            worst = min(
                parts,
                key=lambda c: (
                    _WORST_FIRST.index(c["verdict"]),
                    -abs((c["value"] or 0) - (c["limit"] or 0)),
                ),
            )
            cells[name] = {k: worst[k] for k in ("verdict", "value", "statistic", "reason")}
        rows.append({"asof": report["asof"], "published": not report["failed"], "cells": cells})
    return rows


def best_baselines(pooled: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """Best skill of any baseline (base rate itself is 0) by head, delay and stage."""
    out: dict[tuple[str, str, str], float] = {}
    for e in pooled:
        if e["model"] in BASELINES and not e["reason"] and e["metrics"]["skill"] is not None:
            key = (e["head"], e["delay"], e["stage"])
            out[key] = max(out.get(key, 0.0), e["metrics"]["skill"])
    return out


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
