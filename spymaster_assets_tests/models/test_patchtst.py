"""PatchTST finds what is planted, ignores padding, reads statics, and reproduces its bytes."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from spymaster_assets.errors import ModelError
from spymaster_assets.evaluation.metrics import auc
from spymaster_assets.models.base import SequenceData
from spymaster_assets.models.patchtst import CHECKPOINT, METADATA, Network, PatchTST, Scaler, pick_device
from spymaster_assets.settings import PatchTSTSettings
from spymaster_assets_tests.builders import FOLD, dates_of, touch_times

CHANNELS = ("dist_to_level", "return", "range")
STATICS = ("atr", "distance", "approach_velocity", "prior_touches")
SMALL = PatchTSTSettings(
    layers=1,
    d_model=32,
    heads=2,
    ffn_dim=64,
    static_dim=16,
    epochs=20,
    patience_epochs=20,
    dropout=0.1,
    learning_rate=2e-3,
    batch_size=32,
    device="cpu",
)


def data(n: int, seed: int, where: str = "sequence") -> SequenceData:
    """Label 1 when the last 30 steps of channel 0 (or static 0) are high."""
    rng = np.random.default_rng(seed)
    X = rng.normal(0, 1, (n, 64, 3)).astype(np.float32)
    static = rng.normal(0, 1, (n, 4)).astype(np.float32)
    label = rng.integers(0, 2, n)
    if where == "sequence":
        X[:, -30:, 0] += (label[:, None] - 0.5) * 1.2
    else:
        static[:, 0] += (label - 0.5) * 4
    static[rng.random((n, 4)) < 0.1] = np.nan
    mask = np.ones((n, 64), np.uint8)
    short = rng.random(n) < 0.3
    mask[short, :20] = 0
    X[mask == 0] = 0
    y = label.astype(np.int8)
    y[rng.random(n) < 0.2] = -1
    strength = ((label - 0.5) * 2 + rng.normal(0, 0.3, n)).astype(np.float32)
    strength[:3] = np.nan
    ids = np.array([f"e{seed}-{i}" for i in range(n)])
    dates = dates_of(n, seed)
    return SequenceData(
        X, mask, static, y, strength, ids, touch_times(dates)["ts_ns"], np.array(dates), CHANNELS, STATICS
    )


@pytest.fixture(scope="module", params=["sequence", "static"])
def fitted(request: pytest.FixtureRequest) -> tuple[PatchTST, SequenceData]:
    model = PatchTST(SMALL, {"delay": "4min"})
    model.fit(data(400, 0, request.param), data(150, 1, request.param), FOLD)
    return model, data(300, 2, request.param)


def said(model: PatchTST, d: SequenceData, head: str = "direction") -> np.ndarray:
    table = model.predict(d)
    return table.filter(table["head"] == head)["p"].to_numpy()


def test_a_planted_signal_is_found(fitted: tuple[PatchTST, SequenceData]) -> None:
    model, new = fitted
    judged = new.y_break >= 0
    score = auc((new.y_break[judged] == 1).astype(float), said(model, new)[judged])
    assert score is not None
    assert score > 0.85
    known = np.isfinite(new.y_strength)
    assert np.corrcoef(said(model, new, "strength")[known], new.y_strength[known])[0, 1] > 0.5


def test_metrics_stand_beside_their_baselines(fitted: tuple[PatchTST, SequenceData]) -> None:
    metrics = fitted[0].meta["metrics"]
    assert {"n", "auc", "brier", "log_loss", "ece", "base_rate"} <= set(metrics["direction"])
    assert metrics["direction_logistic"]["n"] == metrics["direction"]["n"]
    assert metrics["strength"]["mae_reference"] > 0


def test_what_is_under_the_padding_does_not_matter(fitted: tuple[PatchTST, SequenceData]) -> None:
    model, new = fitted
    X = new.X.copy()
    X[new.mask == 0] = 1e6
    assert (new.mask == 0).any()
    assert np.array_equal(said(model, replace(new, X=X)), said(model, new))


def test_a_prediction_is_that_of_its_row_alone(fitted: tuple[PatchTST, SequenceData]) -> None:
    model, new = fitted
    whole = said(model, new)
    for rows in (np.arange(1), np.arange(7), np.arange(100, 143)):
        assert said(model, new.select(rows)).tobytes() == whole[rows].tobytes()


def test_save_and_load_give_the_same_model_without_pickle(fitted: tuple[PatchTST, SequenceData]) -> None:
    model, new = fitted
    files = model.save()
    assert set(files) == {"patchtst_multitask.pt", "run_metadata.json"}
    torch.load(io.BytesIO(files[CHECKPOINT]), weights_only=True)
    again = PatchTST.load(files)
    assert again.predict(new).equals(model.predict(new))
    assert again.save() == files
    meta = json.loads(files[METADATA])
    assert meta["train_samples"] == 400
    assert meta["seq_feature_names"] == list(CHANNELS)


def test_damaged_files_are_refused(fitted: tuple[PatchTST, SequenceData]) -> None:
    files = fitted[0].save()
    for broken in (
        {**files, CHECKPOINT: files[CHECKPOINT][:-500]},
        {**files, CHECKPOINT: b"cos\nsystem\n(S'true'\ntR."},
        {**files, METADATA: b"{"},
        {METADATA: files[METADATA]},
        {**files, METADATA: files[METADATA].replace(b'"return"', b'"volatility"')},
    ):
        with pytest.raises(ModelError):
            PatchTST.load(broken)


def test_other_features_are_refused(fitted: tuple[PatchTST, SequenceData]) -> None:
    with pytest.raises(ModelError, match="other features"):
        fitted[0].predict(replace(fitted[1], channel_names=(*CHANNELS[:2], "volatility")))


def test_two_fits_give_equal_bytes() -> None:
    quick = replace(SMALL, epochs=3)
    first, second = PatchTST(quick), PatchTST(quick)
    first.fit(data(200, 0), data(80, 1), FOLD)
    torch.manual_seed(999)
    second.fit(data(200, 0), data(80, 1), FOLD)
    assert first.save() == second.save()


def test_early_stopping_keeps_the_best_epoch() -> None:
    noise = data(200, 0)
    noise = replace(noise, y_break=np.random.default_rng(3).permutation(noise.y_break))
    report = PatchTST(replace(SMALL, patience_epochs=2, epochs=40)).fit(noise, data(100, 1), FOLD)
    losses = report.history["validation_loss"]
    assert report.best_epoch == int(np.argmin(losses))
    assert len(losses) < 40


def test_too_few_rows_is_a_typed_error() -> None:
    few = data(60, 0)
    with pytest.raises(ModelError, match="too few to train"):
        PatchTST(SMALL).fit(replace(few, y_break=np.zeros(60, np.int8)), data(60, 1), FOLD)


def test_scaler_uses_observed_steps_only() -> None:
    d = data(50, 0)
    X = d.X.copy()
    X[d.mask == 0] = 1e9
    one, other = Scaler.fit(d), Scaler.fit(replace(d, X=X))
    assert torch.equal(one.channel_mean, other.channel_mean)
    static = one.statics(torch.tensor([[float("nan"), 0.0, 0.0, 0.0]]))
    assert static.shape == (1, 8)
    assert static[0, 4:].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_every_static_feature_reaches_the_output() -> None:
    torch.manual_seed(0)
    network = Network(64, 3, 8, SMALL).eval()
    static = torch.zeros(1, 8, requires_grad=True)
    logits, strength = network(torch.randn(1, 64, 3), torch.ones(1, 64), static)
    (logits.sum() * 0 + logits[0, 1] + strength.sum()).backward()
    assert static.grad is not None
    assert (static.grad != 0).all()


def test_a_device_that_is_not_there_is_a_typed_error() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ModelError, match="not available"):
        pick_device("cuda:7")
