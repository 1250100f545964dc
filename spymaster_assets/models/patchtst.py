"""PatchTST over the bars before a touch: BREAK against BOUNCE, and signed strength, in one model.

The Hugging Face backbone sees scaled channels only. Static features join after it, since the backbone's own scaling would turn a channel
that is constant over time into zeros. Patches are pooled by their share of observed steps, so that padding does not count.
"""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PatchTSTConfig, PatchTSTModel

from spymaster_assets.errors import ModelError, refusing
from spymaster_assets.evaluation.baselines import logistic_probabilities
from spymaster_assets.evaluation.metrics import binary_metrics, regression_metrics
from spymaster_assets.models.base import FitReport, Model, SequenceData, prediction_frame, require_sequence_features
from spymaster_assets.models.registry import register
from spymaster_assets.settings import PatchTSTSettings, settings_from
from spymaster_assets.store import dump_json, json_object

CHECKPOINT, METADATA = "patchtst_multitask.pt", "run_metadata.json"
_SMALL = 1e-6


@dataclass(frozen=True)
class Scaler:
    """Fitted on training rows: channel mean and scale over observed steps (C,), static median, mean and scale (S,), strength scale."""

    channel_mean: Tensor
    channel_scale: Tensor
    static_median: Tensor
    static_mean: Tensor
    static_scale: Tensor
    strength_scale: Tensor

    @classmethod
    def fit(cls, data: SequenceData) -> Scaler:
        """Statistics of the training part."""
        observed = data.X[data.mask.astype(bool)].astype(np.float64)
        static = np.where(np.isfinite(data.static), data.static, np.nan).astype(np.float64)
        some = np.isfinite(static).any(axis=0)
        median = np.where(some, np.nanmedian(np.where(some, static, 0.0), axis=0), 0.0)
        filled = np.where(np.isfinite(static), static, median)
        strength = data.y_strength[np.isfinite(data.y_strength)]
        return cls(
            *(
                torch.tensor(v, dtype=torch.float32)
                for v in (
                    observed.mean(axis=0),
                    np.maximum(observed.std(axis=0), _SMALL),
                    median,
                    filled.mean(axis=0),
                    np.where(filled.std(axis=0) > _SMALL, filled.std(axis=0), 1.0),
                    np.array(max(float(np.std(strength)) if len(strength) else 1.0, _SMALL)),
                )
            )
        )

    def sequences(self, X: Tensor, mask: Tensor) -> Tensor:
        """Scaled channels; padded steps are 0, the mean."""
        return ((X - self.channel_mean) / self.channel_scale).clamp(-10, 10) * mask[..., None]

    def statics(self, static: Tensor) -> Tensor:
        """Scaled static features (n, 2 S): values with the median where missing, then missing flags."""
        missing = ~torch.isfinite(static)
        filled = torch.where(missing, self.static_median, static)
        return torch.cat([((filled - self.static_mean) / self.static_scale).clamp(-10, 10), missing.float()], dim=1)


class Network(nn.Module):
    """Backbone, masked pooling over patches, channel mixing, late static fusion, two heads."""

    def __init__(self, steps: int, channels: int, statics: int, settings: PatchTSTSettings) -> None:
        super().__init__()
        config = PatchTSTConfig(
            num_input_channels=channels,
            context_length=steps,
            patch_length=settings.patch_length,
            patch_stride=settings.patch_stride,
            num_hidden_layers=settings.layers,
            d_model=settings.d_model,
            num_attention_heads=settings.heads,
            ffn_dim=settings.ffn_dim,
            attention_dropout=settings.dropout,
            positional_dropout=settings.dropout,
            ff_dropout=settings.dropout,
            scaling=None,
            use_cls_token=False,
            do_mask_input=False,
        )
        self.patch_length, self.patch_stride = settings.patch_length, settings.patch_stride
        self.backbone = PatchTSTModel(config)
        self.mix = nn.Sequential(
            nn.Linear(channels * settings.d_model, settings.d_model), nn.GELU(), nn.Dropout(settings.dropout)
        )
        self.static = nn.Sequential(nn.Linear(statics, settings.static_dim), nn.GELU(), nn.Dropout(settings.dropout))
        # the statics also reach the heads directly: through the hidden layer alone they learn several times slower
        joined = settings.d_model + settings.static_dim + statics
        self.classify = nn.Linear(joined, 2)
        self.strength = nn.Linear(joined, 1)

    def forward(self, X: Tensor, mask: Tensor, static: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, 2) of BOUNCE and BREAK, and scaled strength (n,), of scaled inputs (n, T, C), (n, T), (n, S)."""
        hidden = self.backbone(past_values=X).last_hidden_state  # (n, channels, patches, d_model)
        pad = hidden.shape[2] * self.patch_stride + self.patch_length - self.patch_stride
        share = mask[:, -pad:].unfold(1, self.patch_length, self.patch_stride).mean(dim=2)
        weight = share / share.sum(dim=1, keepdim=True).clamp(min=_SMALL)
        pooled = (hidden * weight[:, None, :, None]).sum(dim=2)
        joined = torch.cat([self.mix(pooled.flatten(1)), self.static(static), static], dim=1)
        return self.classify(joined), self.strength(joined).squeeze(1)


@register
class PatchTST(Model):
    """Multi-task PatchTST; heads 'direction' (probability of BREAK) and 'strength' (SPY dollars)."""

    name: ClassVar[str] = "patchtst"
    needs: ClassVar[Literal["tabular", "sequence"]] = "sequence"

    def __init__(self, settings: PatchTSTSettings | None = None, context: Mapping[str, Any] | None = None) -> None:
        """context: fields stored in run_metadata.json."""
        self.settings = settings or PatchTSTSettings()
        self.context = dict(context or {})
        self.meta: dict[str, Any] = {}
        self.network: Network | None = None
        self.scaler: Scaler | None = None

    def _fit(self, train: SequenceData, validation: SequenceData) -> FitReport:
        return self.fit_unchecked(train, validation)

    def fit_unchecked(self, train: SequenceData, validation: SequenceData) -> FitReport:
        """Train with early stopping on the validation loss, or to the last epoch; raise ModelError when a class is too rare.

        Rows labelled BREAK or BOUNCE train the classifier, rows with a strength the regression. No fold is asked whether it allows them.
        """
        s = self.settings
        self._refuse_small(train)
        torch.manual_seed(s.seed)
        torch.set_num_threads(s.threads)
        torch.use_deterministic_algorithms(True, warn_only=True)
        device = pick_device(s.device)
        self.scaler = Scaler.fit(train)
        steps, channels = train.X.shape[1:]
        self.network = Network(steps, channels, 2 * train.static.shape[1], s).to(device)
        counts = np.array([(train.y_break == k).sum() for k in (0, 1)], np.float64)
        class_weight = torch.tensor(counts.sum() / (2 * counts), dtype=torch.float32, device=device)
        batches, judged = self._tensors(train, device), self._tensors(validation, device)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=s.learning_rate, weight_decay=s.weight_decay)
        order = torch.Generator().manual_seed(s.seed)
        history: dict[str, list[float]] = {"train_loss": [], "validation_loss": []}
        best, best_epoch, best_state = float("inf"), 0, self._state()
        for epoch in range(s.epochs):
            self.network.train()
            total = 0.0
            for rows in torch.randperm(len(train), generator=order).split(s.batch_size):
                optimizer.zero_grad()
                loss = self._loss(tuple(t[rows.to(device)] for t in batches), class_weight)
                loss.backward()
                nn.utils.clip_grad_norm_(self.network.parameters(), s.gradient_clip_norm)
                optimizer.step()
                total += float(loss.detach()) * len(rows)
            self.network.eval()
            with torch.no_grad():
                judged_loss = float(self._loss(judged, class_weight))
            history["train_loss"].append(total / len(train))
            history["validation_loss"].append(judged_loss)
            if judged_loss < best - 1e-5 or not s.patience_epochs:
                best, best_epoch, best_state = judged_loss, epoch, self._state()
            elif epoch - best_epoch >= s.patience_epochs:
                break
        self.network.load_state_dict(best_state)
        self.meta = self._describe(train, validation, best, best_epoch)
        return FitReport(self.meta["metrics"], history, best_epoch)

    def _predict(self, data: SequenceData) -> pl.DataFrame:
        """Heads direction (P(BREAK) given a break or bounce) and strength; stage A, delay of the labels it was trained on."""
        probability, strength = self._forward(data)
        delay = str(self.context.get("delay", "4min"))
        ids = pl.Series(data.event_id.tolist(), dtype=pl.String)
        return pl.concat(
            [
                prediction_frame(ids, "direction", delay, "A", probability),
                prediction_frame(ids, "strength", delay, "A", strength),
            ]
        )

    def save(self) -> dict[str, bytes]:
        """`patchtst_multitask.pt` (tensors and primitives; loads with weights_only=True) and `run_metadata.json`."""
        if self.network is None or self.scaler is None:
            raise ModelError("the model is not fitted")
        buffer = io.BytesIO()
        described = {
            "settings": asdict(self.settings),
            "steps": self.meta["steps"],
            "channel_names": self.meta["seq_feature_names"],
            "static_names": self.meta["static_feature_names"],
        }
        # fresh strings through JSON: the archive's bytes depend on which objects are shared
        content = {
            "state": self._state(),
            "scaler": {k: v.clone() for k, v in vars(self.scaler).items()},
            **json.loads(json.dumps(described)),
        }
        torch.save(content, buffer)
        return {CHECKPOINT: buffer.getvalue(), METADATA: dump_json({**self.context, **self.meta})}

    @classmethod
    def load(cls, files: Mapping[str, bytes]) -> PatchTST:
        """Rebuild from `save` files without unpickling; raise ModelError on damage or shapes that do not fit."""
        with refusing(
            ModelError,
            "the PatchTST checkpoint cannot be read",
            where=CHECKPOINT,
            remedy="materialize patchtst_model again",
        ):
            meta = json_object(files[METADATA], METADATA)
            content = read_checkpoint(files[CHECKPOINT])
            model = cls(settings_from(PatchTSTSettings, content["settings"]))
            model.meta = {k: meta[k] for k in _META}
            model.first_test_decision_ns = int(meta["first_test_decision_ns"])
            require_sequence_features(content["channel_names"], content["static_names"])
            model.context = {k: v for k, v in meta.items() if k not in _META}
            model.scaler = Scaler(**content["scaler"])
            shape = (content["steps"], len(content["channel_names"]), 2 * len(content["static_names"]), model.settings)
            _refuse_other_shapes(content, *shape)
            model.network = Network(*shape)
            model.network.load_state_dict(content["state"])
            model.network.eval()
        if (
            content["channel_names"] != meta["seq_feature_names"]
            or content["static_names"] != meta["static_feature_names"]
        ):
            raise ModelError(
                "checkpoint and run_metadata.json name different features", remedy="materialize patchtst_model again"
            )
        return model

    def _refuse_small(self, train: SequenceData) -> None:
        s = self.settings
        breaks, bounces = int((train.y_break == 1).sum()), int((train.y_break == 0).sum())
        if breaks + bounces < s.min_train_rows or min(breaks, bounces) < s.min_class_rows:
            raise ModelError(
                f"{breaks} BREAK and {bounces} BOUNCE rows are too few to train on",
                expected=f"{s.min_train_rows} rows and {s.min_class_rows} of each",
                remedy="use a longer window or volatility-scaled labels",
            )

    def _tensors(self, data: SequenceData, device: torch.device) -> tuple[Tensor, ...]:
        assert self.scaler is not None
        mask = torch.from_numpy(data.mask.astype(np.float32))
        X = self.scaler.sequences(torch.from_numpy(data.X), mask)
        static = self.scaler.statics(torch.from_numpy(data.static))
        strength = torch.from_numpy(data.y_strength.astype(np.float32)) / self.scaler.strength_scale
        label = torch.from_numpy(data.y_break.astype(np.int64))
        return tuple(t.to(device) for t in (X, mask, static, label, strength))

    def _loss(self, batch: tuple[Tensor, ...], class_weight: Tensor) -> Tensor:
        assert self.network is not None
        X, mask, static, label, strength = batch
        logits, predicted = self.network(X, mask, static)
        loss = predicted.sum() * 0.0
        if (rows := label >= 0).any():
            loss = loss + self.settings.classification_weight * nn.functional.cross_entropy(
                logits[rows], label[rows], weight=class_weight
            )
        if (rows := torch.isfinite(strength)).any():
            loss = loss + self.settings.regression_weight * nn.functional.smooth_l1_loss(
                predicted[rows], strength[rows]
            )
        return loss

    def _forward(self, data: SequenceData) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if self.network is None or self.scaler is None:
            raise ModelError("the model is not fitted")
        if (
            list(data.channel_names) != self.meta["seq_feature_names"]
            or list(data.static_names) != self.meta["static_feature_names"]
        ):
            raise ModelError(
                "the sequences have other features than the model",
                remedy="materialize sequence_dataset and the model again",
            )
        self.network.eval()
        device = next(self.network.parameters()).device
        X, mask, static, _, _ = self._tensors(data, device)
        logits, strengths = [], []
        with torch.no_grad(), _one_thread():
            # each alone: the last bits of a product depend on how many rows are multiplied, and later touches may not
            for row in zip(X.split(1), mask.split(1), static.split(1), strict=True) if len(data) else ():
                a, b = self.network(*row)
                logits.append(a.cpu())
                strengths.append(b.cpu())
        if not logits:
            return np.empty(0), np.empty(0)
        probability = self._prior_corrected(torch.softmax(torch.cat(logits), dim=1)[:, 1].numpy().astype(np.float64))
        return probability, (torch.cat(strengths) * self.scaler.strength_scale).numpy().astype(np.float64)

    def _prior_corrected(self, p: NDArray[np.float64]) -> NDArray[np.float64]:
        """Undo the class weights: balanced training gives P under equal classes, odds are scaled back by the training base rate."""
        base = self.meta.get("base_rate", 0.5)
        odds = p / np.maximum(1 - p, _SMALL) * base / max(1 - base, _SMALL)
        return odds / (1 + odds)

    def _state(self) -> dict[str, Tensor]:
        assert self.network is not None
        return {k: v.detach().cpu().clone() for k, v in self.network.state_dict().items()}

    def _describe(self, train: SequenceData, validation: SequenceData, best: float, best_epoch: int) -> dict[str, Any]:
        labelled, judged = train.y_break >= 0, validation.y_break >= 0
        base = float((train.y_break[labelled] == 1).mean())
        self.meta = {
            "steps": int(train.X.shape[1]),
            "seq_feature_names": list(train.channel_names),
            "static_feature_names": list(train.static_names),
            "base_rate": base,
        }
        probability, strength = self._forward(validation)
        y = (validation.y_break[judged] == 1).astype(np.float64)
        flat, flat_judged = _flat(train)[labelled], _flat(validation)[judged]
        logistic = logistic_probabilities(flat, (train.y_break[labelled] == 1).astype(np.float64), flat_judged)
        known = np.isfinite(validation.y_strength)
        strength_train = train.y_strength[np.isfinite(train.y_strength)]
        metrics = {
            "direction": binary_metrics(y, probability[judged], base),
            "direction_logistic": binary_metrics(y, logistic, base) if logistic is not None else None,
            "strength": regression_metrics(
                validation.y_strength[known].astype(np.float64), strength[known], float(np.median(strength_train))
            ),
            "best_validation_loss": best,
            "best_epoch": best_epoch,
        }
        sessions = {"train_sessions": train.session, "validation_sessions": validation.session}
        return {
            **self.meta,
            **{k: sorted(set(v.tolist())) for k, v in sessions.items()},
            "first_test_decision_ns": self.first_test_decision_ns,
            "train_samples": len(train),
            "validation_samples": len(validation),
            "parameters": sum(p.numel() for p in self.network.parameters()) if self.network else 0,
            "seed": self.settings.seed,
            "metrics": metrics,
        }


def read_checkpoint(data: bytes) -> dict[str, Any]:
    """Content of a checkpoint: the archive, its opcodes and its tensors are judged before torch or a network trusts them."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [m.filename for m in archive.infolist()]
        stored = all(m.compress_type == zipfile.ZIP_STORED and m.flag_bits & 1 == 0 for m in archive.infolist())
        if len(set(names)) != len(names) or not stored or sum(m.file_size for m in archive.infolist()) > len(data):
            raise ValueError("an archive with repeated, packed or overlapping members")
        if sum(name.endswith("data.pkl") for name in names) != 1:
            raise ValueError("not one data.pkl")
        program = archive.read(next(name for name in names if name.endswith("data.pkl")))
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name not in _OPCODES.split() or (opcode.name == "GLOBAL" and argument not in _GLOBALS):
            raise ValueError(f"{opcode.name} {argument} has no place in a checkpoint")
    content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    tensors = [*content["state"].values(), *content["scaler"].values()]
    if not all(type(t) is Tensor and t.is_contiguous() and t.layout == torch.strided for t in tensors):
        raise ValueError("a tensor that is not plain")
    if sum(t.numel() * t.element_size() for t in tensors) > len(data):
        raise ValueError("tensors that are larger than the file")
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise ValueError("a tensor that is not finite")
    for part in ("channel_names", "static_names"):
        if not isinstance(content[part], list) or not all(isinstance(name, str) for name in content[part]):
            raise ValueError(f"{part} is no list of names")
    return dict(content)


def _refuse_other_shapes(
    content: Mapping[str, Any], steps: int, channels: int, statics: int, settings: PatchTSTSettings
) -> None:
    """Raise ValueError unless the stored tensors are those of the network that the settings describe, before it takes memory."""
    sizes = (steps, *(v for v in vars(settings).values() if type(v) is int))
    if type(steps) is not int or not all(0 <= v <= _MAX_SIZE for v in sizes) or settings.layers > len(content["state"]):
        raise ValueError("sizes that no network here has")
    if not 1 <= settings.patch_length <= steps or settings.patch_stride < 1 or settings.heads < 1:
        raise ValueError("patches that do not fit the window")
    with torch.device("meta"):
        wanted = {k: (v.shape, v.dtype) for k, v in Network(steps, channels, statics, settings).state_dict().items()}
    if {k: (v.shape, v.dtype) for k, v in content["state"].items()} != wanted:
        raise ValueError("other tensors than the settings describe")
    scaler = {"channel": channels, "static": statics // 2}
    for name, tensor in content["scaler"].items():
        shape = () if name == "strength_scale" else (scaler[name.split("_")[0]],)
        if tensor.dtype != torch.float32 or tensor.shape != shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
        if name.endswith("_scale") and not bool((tensor > 0).all()):
            raise ValueError(f"{name} is not positive")


_MAX_SIZE = 1 << 20
_GLOBALS = frozenset(
    {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch LongStorage", "collections OrderedDict"}
)
_OPCODES = (
    "APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINUNICODE EMPTY_DICT EMPTY_LIST "
    "EMPTY_TUPLE GLOBAL LONG1 LONG_BINGET LONG_BINPUT MARK NEWFALSE NEWTRUE NONE PROTO REDUCE SETITEM SETITEMS "
    "STOP TUPLE TUPLE1 TUPLE2 TUPLE3"
)
"""What torch.save writes for tensors, names and numbers."""
_META = (
    "steps",
    "seq_feature_names",
    "static_feature_names",
    "base_rate",
    "train_sessions",
    "validation_sessions",
    "first_test_decision_ns",
    "train_samples",
    "validation_samples",
    "parameters",
    "seed",
    "metrics",
)
"""Fields of run_metadata.json that describe the fit; the rest is context."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """One row is too little work for several threads: they would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(wanted: str) -> torch.device:
    """'auto' is MPS, else CUDA, else CPU; raise ModelError when a named device is not there."""
    if wanted == "auto":
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {wanted!r} is not available: {error}", remedy="set SPYMASTER_DEVICE=auto") from error
    return device


def _flat(data: SequenceData) -> NDArray[np.float32]:
    """Last step's channels beside the static features: what the logistic baseline reads."""
    return np.concatenate([data.X[:, -1, :], data.static], axis=1)
