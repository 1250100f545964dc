"""`spymaster explain --rederive`: an event's assets and predictions once more from the DBN files, compared bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from spymaster_assets.assets.datasets import read_part
from spymaster_assets.assets.proof import predict_all
from spymaster_assets.assets.signals import warmup_sessions
from spymaster_assets.automation.replay import stored_models
from spymaster_assets.automation.replay_asof import replay_models
from spymaster_assets.automation.shadow import lend, rebuild, shadow_of
from spymaster_assets.contract import load_contract
from spymaster_assets.datasets.sequences import read_sequences
from spymaster_assets.datasets.splits import read_split
from spymaster_assets.errors import MarketDataError
from spymaster_assets.evaluation.calibration import BASELINES, GROUP, baseline_predictions, with_outcomes
from spymaster_assets.partitions import SESSION_ASSETS
from spymaster_assets.proof.bits import Check, compared, unequal
from spymaster_assets.proof.compare import differences
from spymaster_assets.proof.explain import Explanation
from spymaster_assets.proof.judged import MODELS, Fold
from spymaster_assets.proof.lineage import FILE
from spymaster_assets.settings import Settings
from spymaster_assets.signals.build import read_signals
from spymaster_assets.store import Artifact, ArtifactStore

_BARS = ("market_files", "ohlcv_bars")
_EVER_NS = int(np.iinfo(np.int64).max)


def rederive(settings: Settings, explanation: Explanation, refit: bool = False) -> list[Check]:
    """Recompute the session of an explained event from DBN files in a shadow store, and its predictions with the stored models.

    refit: rebuild the folds' splits and models from stored signals too, and the baselines. Raises MarketDataError when a DBN file is no
    longer what was registered, dagster.Failure when the graph fails.
    """
    store, event = ArtifactStore(settings.root), explanation.event
    _refuse_changed_files(explanation, [*warmup_sessions(settings, event.session), event.session])
    with shadow_of(settings) as empty:
        shadow = replace(empty, dbn_dir=settings.dbn_dir)
        fresh = ArtifactStore(shadow.root)
        checks = []
        for key in warmup_sessions(settings, event.session):
            rebuild(shadow, _BARS, key)
            checks += [_artifact(store.load(a, key), fresh.load(a, key)) for a in _BARS]
        rebuild(shadow, SESSION_ASSETS, event.session)
        for asset in SESSION_ASSETS:
            checks.append(_artifact(store.load(asset, event.session), fresh.load(asset, event.session)))
        checks.append(_signal_row(store, fresh, event.session, event.event_id))
        checks.append(_sequence_row(store, fresh, event.session, event.event_id))
        for fold in explanation.folds:
            for asset in stored_models(store, fold.asof):
                lend(store, shadow.root, asset, [fold.asof])
            checks += _predictions(store, fresh, fold, event.session, event.event_id, refit, settings)
    if refit:
        for asof in _asofs(explanation):
            replay = replay_models(settings, asof, "absent")
            found = {d.asset: d for d in replay.differences}
            for asset in stored_models(store, asof):
                d = found.get(asset)
                told = (d.column, d.stored, d.replayed) if d else ()
                checks.append(Check(f"{asset}[{asof}] refitted", len(store.load(asset, asof).files), *told))
    return checks


def _asofs(explanation: Explanation) -> Sequence[str]:
    """As-of sessions whose models judged the event, or else learned from it."""
    return [f.asof for f in explanation.folds] or [u.asof for u in explanation.uses if len(u.models) == len(MODELS)]


def _refuse_changed_files(explanation: Explanation, keys: Sequence[str]) -> None:
    bad = {x.input: x for x in explanation.broken if x.kind == FILE and x.key in keys}
    if bad:
        first = next(iter(bad.values()))
        raise MarketDataError(
            f"{len(bad)} DBN files are no longer what was registered: {', '.join(f'{n} ({x.state})' for n, x in bad.items())}",
            where=f"{first.asset}[{first.key}]",
            expected=f"SHA-256 {first.recorded}" + (f", found {first.found}" if first.found else ""),
            remedy=first.remedy,
        )


def _artifact(stored: Artifact, fresh: Artifact) -> Check:
    """Whole artifacts by content hash; where they differ, the first value that does."""
    what = f"{stored.asset}[{stored.key}]"
    found, count = differences(stored, fresh, _EVER_NS, load_contract())
    if stored.sha256 == fresh.sha256:
        return Check(what, max(count, 1))
    if found:
        d = found[0]
        return Check(what, count, f"{d.column} at {d.row}", d.stored, d.replayed)
    file = next((f for f in stored.files if stored.files[f] != fresh.files.get(f)), "files")
    return Check(what, max(count, 1), file, stored.files.get(file, "none")[:12], fresh.files.get(file, "none")[:12])


def _signal_row(store: ArtifactStore, fresh: ArtifactStore, key: str, event_id: str) -> Check:
    one, other = (read_signals(s, key)[0].frame.filter(pl.col("event_id") == event_id) for s in (store, fresh))
    if not other.height:
        return Check("signal row", one.width, "event_id", "there", "not there")
    return compared("signal row", ((c, one[c][0], other[c][0]) for c in one.columns), one.width)


def _sequence_row(store: ArtifactStore, fresh: ArtifactStore, key: str, event_id: str) -> Check:
    rows = []
    for arrays in (read_sequences(s, key)[0] for s in (store, fresh)):
        at = np.flatnonzero(arrays["event_id"] == event_id)
        rows.append({n: arrays[n][at[0]] for n in ("X", "mask", "static", "y_break", "y_strength")} if len(at) else {})
    one, other = rows
    count = sum(np.size(v) for v in one.values())
    if not one or not other:
        return Check("sequence row", count, "event_id", *("there" if r else "not there" for r in rows))
    pairs = (pair for name in one for pair in unequal(name, np.asarray(one[name]), np.asarray(other[name])))
    return compared("sequence row", pairs, count)


def _predictions(
    store: ArtifactStore, fresh: ArtifactStore, fold: Fold, key: str, event_id: str, refit: bool, settings: Settings
) -> list[Check]:
    """Predictions of the stored models on the rederived session and their outcomes, against all that the report has of the event.

    With `refit` those of the baselines too, fitted on stored rows.
    """
    split, _ = read_split(store, fold.asof)
    said, _ = predict_all(fresh, fold.asof, [key])
    if refit:
        train = read_part(store, split, "train")
        frames = [read_signals(fresh if k == key else store, k)[0].frame for k in split.test]
        fitted = baseline_predictions(train, pl.concat(frames), load_contract(), settings.tree.stages)
        said = pl.concat([said, fitted], how="diagonal")
    rows = [read_signals(store, k)[0].frame for k in split.train]
    frame = read_signals(fresh, key)[0].frame
    judged = with_outcomes(said, frame, pl.concat(rows), load_contract(), fold.asof)
    report = store.load("calibration_report", fold.asof).frame("predictions.parquet")
    one, other = (_said(table, event_id) for table in (report, judged))
    checks = []
    for model in sorted({key[0] for key in (*one, *other)}):
        if refit or model not in BASELINES or model == "null_knn":
            heads = sorted({key for key in (*one, *other) if key[0] == model})
            # a row that only one of them has is a difference too
            pairs = (
                (" ".join((*head[1:], column)), one.get(head, {}).get(column), other.get(head, {}).get(column))
                for head in heads
                for column in ("p", "y", "rows")
            )
            checks.append(compared(f"predictions[{fold.asof}] {model}", pairs, len(heads)))
    return checks


def _said(predictions: pl.DataFrame, event_id: str) -> dict[tuple[str, ...], dict[str, Any]]:
    """Prediction, outcome and number of rows of an event by (model, head, delay, stage)."""
    mine = predictions.filter(pl.col("event_id") == event_id).group_by(*GROUP, maintain_order=True)
    table = mine.agg(pl.col("p", "y").first(), pl.len().alias("rows"))
    return {tuple(str(r[c]) for c in GROUP): r for r in table.iter_rows(named=True)}
