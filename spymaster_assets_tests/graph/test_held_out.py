"""Validation and embargoed rows decide nothing of a fit but when it stops: what reads them is found in the member that moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from spymaster_assets.assets import models as models_module
from spymaster_assets.assets.datasets import read_part, read_sequences
from spymaster_assets.assets.signals import read_signals
from spymaster_assets.automation.held_out import _other_sequences, _other_signals, held_out_tries
from spymaster_assets.automation.shadow import lend, rebuild
from spymaster_assets.contract import load_contract
from spymaster_assets.datasets.splits import SplitManifest
from spymaster_assets.models import patchtst as patchtst_module
from spymaster_assets.models.base import FitReport, SequenceData
from spymaster_assets.partitions import scheduled_asof
from spymaster_assets.settings import Settings
from spymaster_assets.store import ArtifactStore
from spymaster_assets_tests.graph.conftest import Demo


def bound_of_embargoed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(store: ArtifactStore, split: SplitManifest, part: str) -> pl.DataFrame:
        held = [read_signals(store, k)[0].frame["atr"] for k in split.embargoed if store.exists("signals", k)]
        return read_part(store, split, part).with_columns(pl.col("atr").clip(upper_bound=pl.concat(held).median()))

    monkeypatch.setattr(models_module, "read_part", leaky)


def target_encoding_by_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(store: ArtifactStore, split: SplitManifest, part: str) -> pl.DataFrame:
        breaks = (pl.col("outcome_4min") == "BREAK").mean().alias("rate")
        rates = read_part(store, split, "validation").group_by("level_kind").agg(breaks)
        rows = read_part(store, split, part).join(rates, on="level_kind", how="left", maintain_order="left")
        return rows.with_columns(atr=pl.col("atr") + pl.col("rate").fill_null(0.5)).drop("rate")

    monkeypatch.setattr(models_module, "read_part", leaky)


def scaler_of_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, scaler = patchtst_module.PatchTST._fit, patchtst_module.Scaler.fit

    def leaky(self: patchtst_module.PatchTST, train: SequenceData, validation: SequenceData) -> FitReport:
        both = SequenceData.concatenate([train, validation])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(patchtst_module.Scaler, "fit", lambda data: scaler(both))
            return honest(self, train, validation)

    monkeypatch.setattr(patchtst_module.PatchTST, "_fit", leaky)


def weights_of_validation_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss weighs classes by their share in validation: no scaler moves, the weights do."""
    honest = patchtst_module.PatchTST._fit

    def leaky(self: patchtst_module.PatchTST, train: SequenceData, validation: SequenceData) -> FitReport:
        weight = float((validation.y_break == 1).mean())
        self.settings = replace(self.settings, classification_weight=1.0 + weight)
        return honest(self, train, validation)

    monkeypatch.setattr(patchtst_module.PatchTST, "_fit", leaky)


@pytest.mark.parametrize(
    ("leak", "asset", "member"),
    [
        (bound_of_embargoed_rows, "retrieval_index", "retrieval_index.npz"),
        (bound_of_embargoed_rows, "tree_bundles", ".ubj"),
        (target_encoding_by_validation, "retrieval_index", "retrieval_index.npz"),
        (target_encoding_by_validation, "tree_bundles", ".ubj"),
        (scaler_of_both_parts, "patchtst_model", "scaler."),
        (weights_of_validation_rows, "patchtst_model", "state."),
    ],
)
def test_a_fit_that_reads_held_out_rows_is_found(
    demo: Demo,
    broken: Settings,
    monkeypatch: pytest.MonkeyPatch,
    leak: Callable[[pytest.MonkeyPatch], None],
    asset: str,
    member: str,
) -> None:
    asof = scheduled_asof(demo.settings)[0]
    few = (
        replace(broken.patchtst, epochs=2),
        replace(broken.tree, rounds=20, early_stopping_rounds=5),
    )
    settings = replace(broken, patchtst=few[0], tree=few[1])
    for name in ("signals", "sequence_dataset"):
        lend(demo.store, settings.root, name, demo.store.keys(name))
    leak(monkeypatch)
    rebuild(settings, ("split_manifest", asset), asof)
    (replay,) = (tried() for tried in held_out_tries(settings, asof))
    assert replay.differences, "the leak went unseen"
    assert {d.asset for d in replay.differences} == {asset}
    assert any(member in f"{d.column} {d.row}" for d in replay.differences)
    assert replay.told(replay.differences[0]).endswith("begins here")


def test_held_out_rows_are_others_at_the_same_times(demo: Demo) -> None:
    key, contract = demo.store.keys("signals")[0], load_contract()
    frame = read_signals(demo.store, key)[0].frame
    labels, whole = (_other_signals(frame, contract, features) for features in (False, True))
    told = {c.name for c in contract.role("label")}
    moved = {c for c in frame.columns if not frame[c].equals(labels[c])}
    assert {"outcome_4min", "strength_signed_4min", "tradeable_2_4min"} <= moved <= told
    moved = {c for c in frame.columns if not frame[c].equals(whole[c])}
    assert "atr" in moved
    assert not moved & {"event_id", "ts_ns", "decision_ns", "label_known_ns", "level_kind", "direction_sign"}
    assert whole.schema == frame.schema
    assert whole.null_count().equals(frame.null_count())
    arrays = read_sequences(demo.store, key)[0]
    other = _other_sequences(arrays, True)
    assert all(other[n].dtype == arrays[n].dtype for n in arrays)
    assert (other["X"][arrays["mask"] == 0] == 0).all()
    assert (np.isnan(other["static"]) == np.isnan(arrays["static"])).all()
    assert (other["y_break"] == -1).sum() == (arrays["y_break"] == -1).sum()
    assert (other["y_break"] != arrays["y_break"])[arrays["y_break"] >= 0].all()
