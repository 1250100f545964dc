"""sequence_dataset, split_manifest: what models learn from, and which sessions they may."""

from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from spymaster_assets.assets.common import Made, check_each, each_partition, require_one_origin
from spymaster_assets.assets.windows import keyed_by_session, session_partitions, training_window
from spymaster_assets.contract import load_contract
from spymaster_assets.datasets.sequences import build_sequences, read_sequences, sequence_name, to_npz_bytes
from spymaster_assets.datasets.splits import SplitManifest, build_manifest, plan_split, read_split
from spymaster_assets.errors import ArtifactError, SplitError
from spymaster_assets.evaluation import plots
from spymaster_assets.partitions import all_sessions, calendar_of, fold_sessions
from spymaster_assets.resources import ArtifactRoot
from spymaster_assets.settings import Settings, fingerprint
from spymaster_assets.signals.build import read_signals
from spymaster_assets.signals.levels import CONTEXT_SCHEMA
from spymaster_assets.store import ArtifactStore, dump_json


def dataset_assets(settings: Settings) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Assets and checks of the group 'datasets' for one deployment."""
    partitions = session_partitions(settings)
    calendar = calendar_of(settings.symbol)
    contract = load_contract()
    window_settings, fold_settings = settings.of("sequence", "label.primary_delay"), settings.of("split")
    common = keyed_by_session(settings, "datasets")

    @dg.asset(
        **common,
        deps=["signals", "levels"],
        kinds={"numpy"},
        code_version=fingerprint(window_settings, contract.sha256, "1"),
        description="sequence_dataset_YYYY-MM-DD.npz: one window of one-minute bars per touch that ends with the last bar closed at the "
        "decision, static features from the contract, labels. Read with allow_pickle=False.",
    )
    def sequence_dataset(context: dg.AssetExecutionContext, artifacts: ArtifactRoot) -> dg.MaterializeResult[Any]:
        def make(key: str) -> Made:
            signals, signal_artifact = read_signals(artifacts.store, key)
            level_artifact = artifacts.store.load("levels", key)
            require_one_origin(signal_artifact, level_artifact)
            minute = level_artifact.frame("context.parquet", CONTEXT_SCHEMA)
            arrays = build_sequences(signals.frame, minute, contract, settings.sequence, settings.label.primary_delay)
            artifact = artifacts.store.publish(
                "sequence_dataset",
                key,
                {sequence_name(key): to_npz_bytes(arrays)},
                inputs={"signals": signal_artifact.sha256, "levels": level_artifact.sha256},
                settings=window_settings,
            )
            rows, steps, channels = arrays["X"].shape
            return Made(
                artifact,
                {
                    "dagster/row_count": rows,
                    "steps": steps,
                    "channels": channels,
                    "static_features": arrays["static"].shape[1],
                    "observed_steps": float(arrays["mask"].mean()) if rows else 0.0,
                    "breaks": int((arrays["y_break"] == 1).sum()),
                    "bounces": int((arrays["y_break"] == 0).sum()),
                    "others": int((arrays["y_break"] == -1).sum()),
                },
            )

        return each_partition(context, make)

    @dg.asset(
        **common,
        deps=[dg.AssetDep("signals", partition_mapping=training_window(settings))],
        kinds={"json"},
        code_version=fingerprint(calendar.rules, fold_settings, "2"),
        description="Sessions for training, validation and test as of this session, rows purged with the reason, embargo and the hash of "
        "every input. The models read this, not the mapping.",
    )
    def split_manifest(context: dg.AssetExecutionContext, artifacts: ArtifactRoot) -> dg.MaterializeResult[Any]:
        def make(key: str) -> Made:
            plan = plan_split(fold_sessions(settings, key), key, settings.split)
            rows, inputs = [], {}
            made = artifacts.store.require("signals", [*plan.train, *plan.validation])
            require_one_origin(*made)
            for earlier in made:
                found, _ = read_signals(artifacts.store, earlier.key)
                rows.append(found.frame.select("event_id", "date", "decision_ns", "label_known_ns"))
                inputs[earlier.key] = earlier.sha256
            manifest = build_manifest(plan, pl.concat(rows), inputs, calendar.session(key).regular_open_ns)
            artifact = artifacts.store.publish(
                "split_manifest",
                key,
                {"split.json": dump_json(manifest.to_json())},
                inputs={f"signals[{k}]": v for k, v in inputs.items()},
                settings=fold_settings,
            )
            strip = plots.fold_strip([manifest.to_json()], all_sessions(settings), settings.simulated)
            return Made(
                artifact,
                {
                    "train_sessions": len(manifest.train),
                    "validation_sessions": len(manifest.validation),
                    "test_sessions": dg.MetadataValue.json(list(manifest.test)),
                    "purged": len(manifest.purged),
                    "embargoed": dg.MetadataValue.json(list(manifest.embargoed)),
                    "folds": dg.MetadataValue.md(plots.png_markdown(strip)),
                },
            )

        return each_partition(context, make)

    @dg.asset_check(
        asset=split_manifest,
        partitions_def=partitions,
        description="Train, validation and test are ordered and disjoint.",
    )
    def splits_are_ordered(context: dg.AssetCheckExecutionContext, artifacts: ArtifactRoot) -> dg.AssetCheckResult:
        def fault(key: str) -> str | None:
            try:
                read_split(artifacts.store, key)
            except SplitError as error:
                return str(error)
            return None

        return check_each(context, fault)

    @dg.asset_check(
        asset=sequence_dataset,
        partitions_def=partitions,
        description="Windows are finite, padded on the left and match the signals.",
    )
    def sequences_match_signals(context: dg.AssetCheckExecutionContext, artifacts: ArtifactRoot) -> dg.AssetCheckResult:
        store = artifacts.store
        return check_each(
            context, lambda key: sequence_faults(read_sequences(store, key)[0], read_signals(store, key)[0].frame)
        )

    return [sequence_dataset, split_manifest, splits_are_ordered, sequences_match_signals]


def read_part(store: ArtifactStore, manifest: SplitManifest, part: str) -> pl.DataFrame:
    """Signals of one part of a split without its purged rows; raise ArtifactError when they changed since the split was made,
    MixedSettingsError when their settings differ."""
    sessions = [artifact.key for artifact in store.require("signals", getattr(manifest, part))]
    purged = {p["event_id"] for p in manifest.purged}
    frames = []
    for key in sessions:
        found, artifact = read_signals(store, key)
        require_split_signals(manifest, key, artifact.sha256, str(artifact.folder))
        frames.append(found.frame.filter(~pl.col("event_id").is_in(purged)) if purged else found.frame)
    return pl.concat(frames)


def require_split_signals(manifest: SplitManifest, key: str, sha256: str, where: str) -> None:
    """Raise ArtifactError unless the signals of a session that are read, or that sequences were made of, are those of the split."""
    if manifest.inputs[key] != sha256:
        raise ArtifactError(
            f"signals [{key}] changed after the split of {manifest.asof} was made",
            where=where,
            expected=f"content hash {manifest.inputs[key][:12]}, found {sha256[:12]}",
            remedy=f"dagster asset materialize --select split_manifest --partition {manifest.asof}",
        )


def sequence_faults(arrays: dict[str, np.ndarray], signals: pl.DataFrame) -> list[str]:
    """Where a sequence dataset contradicts its signals or itself."""
    faults = []
    if arrays["event_id"].tolist() != signals["event_id"].to_list():
        faults.append("event_id differs from the signals")
    if not np.isfinite(arrays["X"]).all():
        faults.append("X holds NaN or infinity")
    if (np.diff(arrays["mask"].astype(np.int8), axis=1) < 0).any():
        faults.append("a window is padded after its first bar")
    if (arrays["X"][arrays["mask"] == 0] != 0).any():
        faults.append("padded steps are not 0")
    return faults
