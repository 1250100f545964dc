"""Fits with other rows in the sessions that are held out of training: what rests on training rows alone must not move.

Scores on validation sessions are honest only if the fit reads them for its early stopping, and of embargoed sessions nothing. Neither is a
future of the as-of session, so a replay with another future cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import polars as pl

from spymaster_assets.automation.replay import Replay, Results, judge_replay, remake
from spymaster_assets.automation.shadow import lend, shadow_of
from spymaster_assets.contract import Contract, load_contract
from spymaster_assets.datasets.sequences import read_sequences, sequence_name, to_npz_bytes
from spymaster_assets.datasets.splits import SplitManifest, read_split
from spymaster_assets.partitions import FITTED_ASSETS, calendar_of
from spymaster_assets.proof.compare import Difference
from spymaster_assets.proof.members import first_unequal, members
from spymaster_assets.settings import Settings
from spymaster_assets.signals.build import SignalSet, read_signals, signals_name, signals_to_parquet
from spymaster_assets.store import Artifact, ArtifactStore

Altered = Literal["rows", "labels"]
"""What is another in the validation sessions; in the embargoed ones rows are in either case."""
FITTED_ON_TRAINING: dict[str, Altered] = {"patchtst_model": "rows", "tree_bundles": "rows", "retrieval_index": "labels"}
"""What may be another without moving what is compared: the index holds validation rows, and scales by them, by design."""
_OF_TREES = (
    "features",
    "feature_columns",
    "target",
    "params",
    "train_rows",
    "train_sessions",
    "base_rate",
    "decision_after_t0_s",
    "bundles",
    "skipped",
)
_OF_SEQUENCES = ("base_rate", "train_samples", "train_sessions", "steps", "seq_feature_names", "static_feature_names")
_OF_CHECKPOINT = ("scaler", "state", "steps", "channel_names", "static_names")
_OF_INDEX = ("columns", "encoded", "kept", "dropped_constant", "asof_open_ns", "settings")
"""Members that rest on training rows (of the index: on rows, not on their labels); `state` are the weights after one epoch."""


def held_out_tries(settings: Settings, asof: str) -> list[Callable[[], Replay]]:
    """The replays of an as-of session's models with other held-out sessions, those of models that are stored."""
    store = ArtifactStore(settings.root)
    made = [a for a in FITTED_ASSETS if store.exists(a, asof)]
    kinds = dict.fromkeys(FITTED_ON_TRAINING[a] for a in made)
    return [partial(replay_held_out, settings, asof, k, [a for a in made if FITTED_ON_TRAINING[a] == k]) for k in kinds]


def replay_held_out(settings: Settings, asof: str, altered: Altered, assets: Sequence[str]) -> Replay:
    """Refit models of an as-of session where its embargoed sessions hold other rows, and its validation sessions other rows or labels.

    Compared with the stored models: scalers, base rates, kept features; of boosted trees those that both have, since early stopping only
    says how many; of the index all but outcomes of validation rows. PatchTST's weights are compared after one epoch, fitted twice, since
    the epoch that is kept is the validation's to choose. Raises ArtifactError or MissingInputError as `replay_models`.
    """
    store = ArtifactStore(settings.root)
    split = read_split(store, asof)[0]
    short = replace(settings, patchtst=replace(settings.patchtst, epochs=1))
    results: Results = {}
    with shadow_of(short) as shadow, shadow_of(short) as same:
        _hold_out(store, ArtifactStore(shadow.root), split, altered)
        results |= remake(shadow, ("split_manifest", *assets), asof)
        if "patchtst_model" in assets:
            _hold_out(store, ArtifactStore(same.root), split, None)
            results |= remake(same, ("split_manifest", "patchtst_model"), asof)
        fresh, once = ArtifactStore(shadow.root), ArtifactStore(same.root)
        for asset in assets:
            if asset not in results:
                first = once.load(asset, asof) if asset == "patchtst_model" else None
                results[asset] = _moved(store.load(asset, asof), fresh.load(asset, asof), first, split)
    at_ns = calendar_of(settings.symbol).session(split.validation[0]).open_ns
    return judge_replay(settings, asof, f"held-out {altered} altered", at_ns, results)


def _hold_out(store: ArtifactStore, fresh: ArtifactStore, split: SplitManifest, altered: Altered | None) -> None:
    """Lend a fold's training sessions, and put in the held-out ones as they are altered; None alters nothing."""
    contract = load_contract()
    held = {**dict.fromkeys(split.embargoed, "rows"), **dict.fromkeys(split.validation, altered or "")}
    changed = {k: kind for k, kind in held.items() if altered and store.exists("sequence_dataset", k)}
    for asset in ("signals", "sequence_dataset"):
        kept = [k for k in (*split.train, *held) if k not in changed and store.exists(asset, k)]
        lend(store, fresh.root, asset, kept)
    for key, kind in changed.items():
        signals, artifact = read_signals(store, key)
        frame = _other_signals(signals.frame, contract, kind == "rows")
        data = signals_to_parquet(SignalSet(frame, signals.metadata))
        made = fresh.publish(
            "signals", key, {signals_name(key): data}, inputs=artifact.inputs, settings=artifact.settings
        )
        arrays, sequences = read_sequences(store, key)
        files = {sequence_name(key): to_npz_bytes(_other_sequences(arrays, kind == "rows"))}
        fresh.publish(
            "sequence_dataset",
            key,
            files,
            inputs={**sequences.inputs, "signals": made.sha256},
            settings=sequences.settings,
        )


def _other_signals(frame: pl.DataFrame, contract: Contract, features: bool) -> pl.DataFrame:
    """Labels turned round and, with `features`, features moved; ids, times, levels and what is null stay."""
    labels = [c.name for c in contract.role("label")]
    moved = [c.name for c in contract.role("feature") if c.dtype == "float64"] if features else []
    outcomes = [c for c in labels if frame[c].dtype == pl.String]
    flags = [c for c in labels if frame[c].dtype == pl.Boolean]
    numbers = [c for c in labels if frame[c].dtype == pl.Float64]
    return frame.with_columns(
        pl.col(outcomes).replace({"BREAK": "BOUNCE", "BOUNCE": "BREAK"}),
        ~pl.col(flags),
        pl.col(numbers) * -3.0,
        pl.col(moved) * 3.0 + 1.0,
    )


def _other_sequences(arrays: dict[str, Any], features: bool) -> dict[str, Any]:
    """The same of a sequence dataset; padded steps stay 0."""
    y = arrays["y_break"]
    out = {**arrays, "y_break": np.where(y >= 0, 1 - y, y).astype(y.dtype), "y_strength": arrays["y_strength"] * -3}
    if features:
        out["X"] = ((arrays["X"] * 3 + 1) * arrays["mask"][..., None]).astype(arrays["X"].dtype)
        out["static"] = (arrays["static"] * 3 + 1).astype(arrays["static"].dtype)
    return out


def _moved(
    stored: Artifact, again: Artifact, first: Artifact | None, split: SplitManifest
) -> tuple[list[Difference], int]:
    """The first member of each file that moved though it rests on training rows, and how many bytes were read.

    first: PatchTST after one epoch with the held-out sessions as they are.
    """
    found, read = [], 0
    for name in sorted({*stored.files, *again.files}):
        if name not in stored.files or name not in again.files:
            # whether there are rows enough for a head is for the training rows to say
            told = ("there", "missing") if name in stored.files else ("missing", "there")
            found.append(Difference(stored.asset, stored.key, name, "file", *told))
            continue
        one, other = (members(name, a.read(name)) for a in (stored, again))
        read += len(stored.read(name))
        if name.endswith(".pt") and first is not None:
            one["state"] = members(name, first.read(name))["state"]
        resting = (_resting_on_training(stored.asset, name, *two, split) for two in ((one, other), (other, one)))
        if differs := first_unequal(*resting):
            found.append(Difference(stored.asset, stored.key, name, *differs))
    return found, read


def _resting_on_training(
    asset: str, name: str, content: dict[str, Any], beside: dict[str, Any], split: SplitManifest
) -> dict[str, Any]:
    """Those members of a file that training rows alone may decide; of trees as many as the version beside it has."""
    if name.endswith(".ubj"):
        learner, least = content["learner"], min(len(_trees(content)), len(_trees(beside)))
        return {
            "base_score": learner["learner_model_param"]["base_score"],
            "feature_names": learner["feature_names"],
            "trees": _trees(content)[:least],
        }
    if name.endswith(".npz"):
        trained = np.isin(content["date"], split.train)
        return {k: v[trained] if k in ("outcome", "strength") else v for k, v in content.items()}
    if name.endswith(".pt"):
        fields: Sequence[str] = _OF_CHECKPOINT
    else:
        fields = {"tree_bundles": _OF_TREES, "patchtst_model": _OF_SEQUENCES, "retrieval_index": _OF_INDEX}[asset]
    return {k: content[k] for k in fields if k in content}


def _trees(model: dict[str, Any]) -> list[Any]:
    return list(model["learner"]["gradient_booster"]["model"]["trees"])
