"""Boosted trees: one XGBoost model a head, confirmation delay, stage and ablation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
import xgboost as xgb
from numpy.typing import NDArray

from spymaster_assets.contract import Column, Contract, decision_after_s, load_contract
from spymaster_assets.datasets.matrix import CLASSIFIERS, HEADS, encode, feature_matrix, labelled_rows, target
from spymaster_assets.errors import ModelError, refusing
from spymaster_assets.evaluation.baselines import logistic_probabilities
from spymaster_assets.evaluation.metrics import auc, binary_metrics, regression_metrics, session_bootstrap
from spymaster_assets.models.base import FitReport, Model, prediction_frame
from spymaster_assets.models.registry import register
from spymaster_assets.models.ubj import check_ubj
from spymaster_assets.settings import DELAYS_S, TreeSettings, settings_from
from spymaster_assets.store import dump_json, json_object

METADATA = "metadata.json"
_INDEX = ("settings", "bundles", "skipped", "first_test_decision_ns")
"""Fields of metadata.json that describe the fit; the rest is context."""


@dataclass(frozen=True)
class Bundle:
    """One fitted head: the model's UBJ bytes and everything needed to use and judge it (JSON-able `meta`)."""

    model: bytes
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        """File stem."""
        return bundle_name(self.meta["head"], self.meta["delay"], self.meta["stage"], self.meta["ablation"])

    def booster(self) -> xgb.Booster:
        """The XGBoost model; its hash is verified before XGBoost sees a byte."""
        self.require_unaltered()
        booster = xgb.Booster()
        booster.load_model(bytearray(self.model))
        booster.set_param({"nthread": 1})
        return booster

    def require_unaltered(self) -> None:
        """Raise ModelError unless the model has the hash that its description states."""
        if hashlib.sha256(self.model).hexdigest() != self.meta["model_sha256"]:
            raise ModelError(
                f"{self.name}.ubj was altered", expected=f"SHA-256 {self.meta['model_sha256']}", remedy="train it again"
            )

    def predict(self, frame: pl.DataFrame, contract: Contract) -> NDArray[np.float64]:
        """(n,) probabilities or SPY dollars for signals rows, from the columns that the bundle stores."""
        X, names = encode(frame, contract, self.meta["feature_columns"], self.meta["stage"], self.meta["delay"])
        used = self.meta["features"]
        if not set(used) <= set(names):
            raise ModelError(
                f"{self.name} was trained on other features", expected=f"contract {self.meta['contract_sha256'][:12]}"
            )
        X = X[:, [names.index(name) for name in used]]
        return np.asarray(self.booster().predict(xgb.DMatrix(X, feature_names=used)), np.float64)


def bundle_name(head: str, delay: str, stage: str, ablation: str) -> str:
    """`{head}_{delay}_stage_{a|b}_{ablation}`."""
    return f"{head}_{delay}_stage_{stage.lower()}_{ablation}"


@register
class BoostedTrees(Model):
    """XGBoost heads tradeable_2, direction (on tradeable rows) and strength for each delay, stage and ablation."""

    name: ClassVar[str] = "boosted_trees"
    aliases: ClassVar[tuple[str, ...]] = ("xgboost",)
    needs: ClassVar[Literal["tabular", "sequence"]] = "tabular"

    def __init__(self, settings: TreeSettings | None = None, context: Mapping[str, Any] | None = None) -> None:
        """context: fields stored in every bundle (sessions, data_sha256, provenance, simulated, ...)."""
        self.settings = settings or TreeSettings()
        self.context = dict(context or {})
        self.contract = load_contract()
        self.bundles: tuple[Bundle, ...] = ()
        self.skipped: tuple[dict[str, Any], ...] = ()

    def _fit(self, train: pl.DataFrame, validation: pl.DataFrame) -> FitReport:
        """Fit every head; one without enough rows of each class is skipped with its reason."""
        bundles, skipped = [], []
        for ablation in self.settings.ablations:
            for stage in self.settings.stages:
                for delay in DELAYS_S:
                    for head in HEADS:
                        made = self.fit_head_unchecked(train, validation, head, delay, stage, ablation)
                        if isinstance(made, Bundle):
                            bundles.append(made)
                        else:
                            skipped.append(made)
        if not bundles:
            raise ModelError(
                f"no head could be fitted: {skipped[0]['reason']}",
                where=f"{train.height} training rows",
                remedy="use a longer window",
            )
        self.bundles, self.skipped = tuple(bundles), tuple(skipped)
        return FitReport({b.name: b.meta["metrics"] for b in bundles}, skipped=self.skipped)

    def fit_head_unchecked(
        self, train: pl.DataFrame, validation: pl.DataFrame, head: str, delay: str, stage: str, ablation: str
    ) -> Bundle | dict[str, Any]:
        """One head, or {head, delay, stage, ablation, reason, ...} where there are too few rows. Without validation rows it does not stop
        early: it takes early_stopping_rounds rounds."""
        contract, settings = self.contract, self.settings
        rows, judged = (
            f.filter(pl.Series(labelled_rows(f, head, delay, stage, contract))) for f in (train, validation)
        )
        y, y_judged = target(rows, head, delay), target(judged, head, delay)
        classifier = head in CLASSIFIERS
        why = _too_few(y, classifier, settings.min_class_rows)
        who = {"head": head, "delay": delay, "stage": stage, "ablation": ablation}
        if why:
            return {**who, "reason": why, "train_rows": len(y), "positives": int(y.sum()) if classifier else None}
        X, names = feature_matrix(rows, contract, stage, delay, ablation)
        X_judged, _ = feature_matrix(judged, contract, stage, delay, ablation)
        # a column that never varies (a missing feed's) would only dilute the columns that each tree samples
        varies = _varies(X)
        X, X_judged, names = X[:, varies], X_judged[:, varies], tuple(np.array(names)[varies].tolist())
        stops_early = len(y_judged) > 0 and (not classifier or len(np.unique(y_judged)) == 2)
        params = {
            "objective": "binary:logistic" if classifier else "reg:absoluteerror",
            "eval_metric": "logloss" if classifier else "mae",
            "max_depth": settings.max_depth,
            "learning_rate": settings.learning_rate,
            "subsample": settings.subsample,
            "colsample_bytree": settings.colsample_bytree,
            "min_child_weight": settings.min_child_weight,
            "reg_lambda": settings.reg_lambda,
            "tree_method": "hist",
            "nthread": settings.threads,
            "seed": settings.seed,
        }
        data = xgb.DMatrix(X, y, feature_names=list(names))
        watched = xgb.DMatrix(X_judged, y_judged, feature_names=list(names)) if len(y_judged) else None
        booster = xgb.train(
            params,
            data,
            num_boost_round=settings.rounds if stops_early else settings.early_stopping_rounds,
            evals=[(watched, "validation")] if watched and stops_early else None,
            early_stopping_rounds=settings.early_stopping_rounds if stops_early else None,
            verbose_eval=False,
        )
        if stops_early:
            booster = booster[: booster.best_iteration + 1]
        model = bytes(booster.save_raw("ubj"))
        base = float(y.mean()) if classifier else float(np.median(y))
        p = np.asarray(booster.predict(watched) if watched else [], np.float64)
        metrics = _metrics(y_judged, p, base, classifier, judged["date"].to_numpy().astype(str))
        logistic = logistic_probabilities(X, y, X_judged) if classifier and len(y_judged) else None
        gain = booster.get_score(importance_type="gain")
        meta = {
            **who,
            "features": list(names),
            "feature_columns": _columns_of(names, contract.features(stage, delay, ablation)),
            "decision_after_t0_s": decision_after_s(stage, delay),
            "target": {
                "tradeable_2": f"tradeable_2_{delay}",
                "direction": f"outcome_{delay} == BREAK",
                "strength": f"strength_signed_{delay}",
            }[head],
            "train_rows": len(y),
            "validation_rows": len(y_judged),
            "base_rate": base,
            "metrics": {
                "validation": metrics,
                "logistic": binary_metrics(y_judged, logistic, base) if logistic is not None else None,
            },
            "rounds": booster.num_boosted_rounds(),
            "early_stopping": stops_early,
            "params": params,
            "gain": {k: float(v) for k, v in sorted(gain.items(), key=lambda kv: -float(kv[1]))[:20]},  # type: ignore[arg-type]
            "model_sha256": hashlib.sha256(model).hexdigest(),
            "contract_sha256": contract.sha256,
            "schema_version": contract.schema_version,
            **self.context,
        }
        return Bundle(model, meta)

    def _predict(self, data: pl.DataFrame) -> pl.DataFrame:
        """Every head on every row; see Model.predict."""
        parts = []
        for b in self.bundles:
            rows = prediction_frame(
                data["event_id"], b.meta["head"], b.meta["delay"], b.meta["stage"], b.predict(data, self.contract)
            )
            parts.append(rows.with_columns(pl.lit(b.meta["ablation"]).alias("ablation")))
        return pl.concat(parts)

    def save(self) -> dict[str, bytes]:
        """`<bundle>.ubj` and `<bundle>.json` of each head, and metadata.json with what was skipped."""
        files: dict[str, bytes] = {}
        for b in self.bundles:
            files[f"{b.name}.ubj"] = b.model
            files[f"{b.name}.json"] = dump_json(b.meta)
        index = {
            "settings": asdict(self.settings),
            "bundles": [b.name for b in self.bundles],
            "skipped": list(self.skipped),
            "first_test_decision_ns": self.first_test_decision_ns,
        }
        files[METADATA] = dump_json({**self.context, **index})
        return files

    @classmethod
    def load(cls, files: Mapping[str, bytes]) -> BoostedTrees:
        """Rebuild from files; hash and structure of every model are checked before XGBoost reads it."""
        with refusing(
            ModelError, "tree bundles cannot be read", where=METADATA, remedy="materialize tree_bundles again"
        ):
            index = json_object(files[METADATA], METADATA)
            model = cls(
                settings_from(TreeSettings, index["settings"]), {k: v for k, v in index.items() if k not in _INDEX}
            )
            model.first_test_decision_ns = int(index["first_test_decision_ns"])
            model.bundles = tuple(_read_bundle(files, name) for name in index["bundles"])
            model.skipped = tuple(dict(s) for s in index["skipped"])
        for b in model.bundles:
            b.booster()
        return model


def _read_bundle(files: Mapping[str, bytes], name: str) -> Bundle:
    bundle = Bundle(files[f"{name}.ubj"], json_object(files[f"{name}.json"], f"{name}.json"))
    meta = bundle.meta
    if bundle.name != name:
        raise ModelError(f"{name}.json describes {bundle.name[:80]}", remedy="materialize tree_bundles again")
    for part in ("features", "feature_columns"):
        if not isinstance(meta[part], list) or not all(isinstance(v, str) for v in meta[part]):
            raise ModelError(f"{part} of {name}.json is no list of names", remedy="materialize tree_bundles again")
    if len(str(meta["model_sha256"])) != 64 or not isinstance(meta["contract_sha256"], str):
        raise ModelError(f"{name}.json lacks its hashes", remedy="materialize tree_bundles again")
    load_contract().require_known(meta["feature_columns"], decision_after_s(meta["stage"], meta["delay"]))
    bundle.require_unaltered()
    check_ubj(bundle.model, meta["features"], f"{name}.ubj")
    return bundle


def _varies(X: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Columns (f,) with at least two different values, missing being one."""
    missing = np.isnan(X)
    low = np.where(missing, np.inf, X).min(axis=0, initial=np.inf)
    high = np.where(missing, -np.inf, X).max(axis=0, initial=-np.inf)
    return np.asarray((low < high) | (missing.any(axis=0) & ~missing.all(axis=0)))


def _columns_of(names: Sequence[str], columns: Sequence[Column]) -> list[str]:
    """Contract columns behind encoded names, text columns being `name=value`."""
    used = {name.partition("=")[0] for name in names}
    return [c.name for c in columns if c.name in used]


def _too_few(y: NDArray[np.float64], classifier: bool, least: int) -> str | None:
    if classifier:
        positives = int(y.sum())
        fewest = min(positives, len(y) - positives)
        return f"{fewest} training rows of the rarer class, {least} are needed" if fewest < least else None
    return f"{len(y)} training rows, {2 * least} are needed" if len(y) < 2 * least else None


def _metrics(
    y: NDArray[np.float64], p: NDArray[np.float64], base: float, classifier: bool, sessions: NDArray[np.str_]
) -> dict[str, Any]:
    if not classifier:
        return regression_metrics(y, p, base)
    interval = session_bootstrap(lambda rows: auc(y[rows], p[rows]), sessions)
    return {**binary_metrics(y, p, base), "auc_interval": list(interval) if interval else None}
