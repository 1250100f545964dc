"""patchtst_model, tree_bundles, retrieval_index: models of the as-of session, fitted on what its split allows."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import dagster as dg
import numpy as np

from spymaster_assets.assets.common import Made, each_partition, require_one_origin
from spymaster_assets.assets.datasets import read_part, require_split_signals
from spymaster_assets.assets.windows import keyed_by_session, training_window
from spymaster_assets.contract import load_contract
from spymaster_assets.datasets.sequences import read_sequences
from spymaster_assets.datasets.splits import SplitManifest, read_split
from spymaster_assets.evaluation import plots
from spymaster_assets.models.base import SequenceData
from spymaster_assets.models.trees import BoostedTrees
from spymaster_assets.resources import ArtifactRoot, Trackers
from spymaster_assets.retrieval.index import build_index
from spymaster_assets.settings import Settings, fingerprint
from spymaster_assets.store import ArtifactStore, git_revision, provenance
from spymaster_assets.tracking import Run, TrackingSettings, run_name, track


def model_assets(settings: Settings) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Assets of the group 'models' for one deployment."""
    contract = load_contract()
    window = training_window(settings)
    patchtst_settings, tree_settings = settings.of("patchtst", "sequence"), settings.of("tree")
    retrieval_settings = settings.of("retrieval", "label.primary_delay")
    common = keyed_by_session(settings, "models")

    def training_run(
        tracking: TrackingSettings,
        kind: str,
        params: Mapping[str, Any],
        suffix: int,
        split: SplitManifest,
        data_sha256: str,
    ) -> AbstractContextManager[Run]:
        return track(
            tracking,
            experiment=f"spymaster_{kind}",
            run_name=run_name(kind, contract.schema_version, split.train[0], split.validation[-1], suffix),
            params={**params, "split": vars(settings.split), "asof": split.asof},
            tags={
                "asof": split.asof,
                "schema_version": contract.schema_version,
                "dataset_hash": data_sha256,
                "git_revision": git_revision(),
                "simulated": str(settings.simulated).lower(),
            },
        )

    @dg.asset(
        **common,
        deps=["split_manifest", dg.AssetDep("sequence_dataset", partition_mapping=window)],
        kinds={"pytorch", "huggingface"},
        code_version=fingerprint(patchtst_settings, contract.sha256, "3"),
        description="PatchTST over the bars before each touch with late static fusion: BREAK or BOUNCE, and strength.",
    )
    def patchtst_model(
        context: dg.AssetExecutionContext, artifacts: ArtifactRoot, trackers: Trackers
    ) -> dg.MaterializeResult[Any]:
        # torch and transformers take seconds to import; a process that only lists the graph does not pay for them
        from spymaster_assets.models.patchtst import PatchTST

        tracking = trackers.settings

        def make(key: str) -> Made:
            split, split_artifact = read_split(artifacts.store, key)
            train, train_inputs = sequence_part(artifacts.store, split, "train")
            validation, validation_inputs = sequence_part(artifacts.store, split, "validation")
            inputs = {"split_manifest": split_artifact.sha256, **train_inputs, **validation_inputs}
            data_sha256 = fingerprint(train_inputs, validation_inputs)
            params = {"patchtst": vars(settings.patchtst)}
            with training_run(tracking, "patchtst", params, settings.patchtst.seed, split, data_sha256) as run:
                described = {
                    "schema_version": contract.schema_version,
                    "dataset_hash": data_sha256,
                    "asof": key,
                    "delay": settings.label.primary_delay,
                    "simulated": settings.simulated,
                    "inputs": inputs,
                    "run_name": run.name,
                    "provenance": provenance(),
                }
                model = PatchTST(settings.patchtst, described)
                report = model.fit(train, validation, split)
                for epoch, (a, b) in enumerate(
                    zip(report.history["train_loss"], report.history["validation_loss"], strict=True)
                ):
                    run.log_metrics({"train_loss": a, "validation_loss": b}, step=epoch)
                run.log_metrics(report.metrics)
                files = model.save()
                for file, data in {**files, "features.json": contract.text.encode()}.items():
                    run.log_artifact(data, file)
            artifact = artifacts.store.publish(
                "patchtst_model", key, files, inputs=inputs, metadata=dict(run.ids), settings=patchtst_settings
            )
            return Made(
                artifact,
                {
                    "train_rows": len(train.y_break),
                    "validation_rows": len(validation.y_break),
                    "metrics": dg.MetadataValue.json(report.metrics),
                    "loss": dg.MetadataValue.md(
                        plots.png_markdown(plots.loss_curves(report.history, report.best_epoch, settings.simulated))
                    ),
                    "run_name": run.name,
                    "simulated": settings.simulated,
                },
            )

        return each_partition(context, make)

    @dg.asset(
        **common,
        deps=["split_manifest", dg.AssetDep("signals", partition_mapping=window)],
        kinds={"xgboost"},
        code_version=fingerprint(tree_settings, contract.sha256, "3"),
        description="XGBoost heads tradeable_2, direction and strength at 2, 4, 8 minutes, stage A (known at the touch) and B (known "
        "at confirmation); a head with too few positives is skipped with its reason.",
    )
    def tree_bundles(
        context: dg.AssetExecutionContext, artifacts: ArtifactRoot, trackers: Trackers
    ) -> dg.MaterializeResult[Any]:
        tracking = trackers.settings

        def make(key: str) -> Made:
            split, split_artifact = read_split(artifacts.store, key)
            train, validation = (read_part(artifacts.store, split, part) for part in ("train", "validation"))
            inputs = {"split_manifest": split_artifact.sha256, **{f"signals[{k}]": v for k, v in split.inputs.items()}}
            data_sha256 = fingerprint(split.inputs)
            params = {"tree": vars(settings.tree)}
            with training_run(tracking, "boosted_trees", params, settings.tree.seed, split, data_sha256) as run:
                described = {
                    "asof": key,
                    "train_sessions": list(split.train),
                    "validation_sessions": list(split.validation),
                    "test_sessions": list(split.test),
                    "data_sha256": data_sha256,
                    "simulated": settings.simulated,
                    "run_name": run.name,
                    "provenance": provenance(),
                }
                model = BoostedTrees(settings.tree, described)
                report = model.fit(train, validation, split)
                files = model.save()
                run.log_metrics(report.metrics)
                for file, data in sorted(files.items()):
                    run.log_artifact(data, file)
            artifact = artifacts.store.publish(
                "tree_bundles", key, files, inputs=inputs, metadata=dict(run.ids), settings=tree_settings
            )
            return Made(
                artifact,
                {
                    "train_rows": train.height,
                    "validation_rows": validation.height,
                    "heads": len(model.bundles),
                    "skipped": dg.MetadataValue.json(list(report.skipped)),
                    "validation": dg.MetadataValue.json(report.metrics),
                    "gain": dg.MetadataValue.md(plots.png_markdown(gain_chart(model, settings.simulated))),
                    "run_name": run.name,
                    "simulated": settings.simulated,
                },
            )

        return each_partition(context, make)

    @dg.asset(
        **common,
        deps=["split_manifest", dg.AssetDep("signals", partition_mapping=window)],
        kinds={"numpy"},
        code_version=fingerprint(retrieval_settings, contract.sha256, "1"),
        description="Exact nearest neighbours among touches whose label was known before this session: robust scaling, by level kind "
        "and direction with a stated fallback, at most two neighbours a session.",
    )
    def retrieval_index(
        context: dg.AssetExecutionContext, artifacts: ArtifactRoot, trackers: Trackers
    ) -> dg.MaterializeResult[Any]:
        tracking = trackers.settings

        def make(key: str) -> Made:
            split, split_artifact = read_split(artifacts.store, key)
            rows = read_part(artifacts.store, split, "train").vstack(read_part(artifacts.store, split, "validation"))
            inputs = {"split_manifest": split_artifact.sha256, **{f"signals[{k}]": v for k, v in split.inputs.items()}}
            data_sha256 = fingerprint(split.inputs)
            params = {"retrieval": vars(settings.retrieval)}
            with training_run(tracking, "retrieval", params, settings.retrieval.k, split, data_sha256) as run:
                index = build_index(rows, split, contract, settings.retrieval, settings.label.primary_delay)
                files = index.save()
                run.log_metrics({"rows": index.X.shape[0], "features": index.X.shape[1]})
                for file, data in files.items():
                    run.log_artifact(data, file)
            artifact = artifacts.store.publish(
                "retrieval_index", key, files, inputs=inputs, metadata=dict(run.ids), settings=retrieval_settings
            )
            return Made(
                artifact,
                {
                    "rows": int(index.X.shape[0]),
                    "features": int(index.X.shape[1]),
                    "sessions": len(np.unique(index.date)),
                    "run_name": run.name,
                    "simulated": settings.simulated,
                },
            )

        return each_partition(context, make)

    return [patchtst_model, tree_bundles, retrieval_index]


def sequence_part(store: ArtifactStore, split: SplitManifest, part: str) -> tuple[SequenceData, dict[str, str]]:
    """Sequences of one part of a split without its purged rows, and the hashes of what was read.

    Raises MixedSettingsError when the sequences of the parts to learn from were made with different settings.
    """
    store.require("sequence_dataset", [*split.train, *split.validation])
    purged = np.array([p["event_id"] for p in split.purged] or [""])
    pieces, inputs = [], {}
    for key in getattr(split, part):
        arrays, artifact = read_sequences(store, key)
        require_split_signals(split, key, artifact.inputs["signals"], str(artifact.folder))
        require_one_origin(artifact, store.load("signals", key))
        inputs[f"sequence_dataset[{key}]"] = artifact.sha256
        pieces.append(SequenceData.from_arrays(arrays, key).select(~np.isin(arrays["event_id"], purged)))
    return SequenceData.concatenate(pieces), inputs


def gain_chart(model: BoostedTrees, simulated: bool) -> bytes:
    """Mean gain per split of the features that the heads use most, summed over heads."""
    total: dict[str, float] = {}
    for bundle in model.bundles:
        for name, gain in bundle.meta["gain"].items():
            total[name] = total.get(name, 0.0) + gain
    top = sorted(total.items(), key=lambda kv: -kv[1])[:20]
    return plots.gains([n for n, _ in top], [v for _, v in top], f"Gain over {len(model.bundles)} heads", simulated)
