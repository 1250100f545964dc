"""canaries: whether the leaks that are planted in a fold are caught and its nonsense scores chance; no scores without them."""

from typing import Any

import dagster as dg

from spymaster_assets.assets.common import Made, each_partition
from spymaster_assets.assets.datasets import read_part, read_split
from spymaster_assets.assets.models import sequence_part
from spymaster_assets.assets.windows import keyed_by_session, session_partitions, training_window
from spymaster_assets.contract import load_contract
from spymaster_assets.errors import CanaryError
from spymaster_assets.evaluation import plots
from spymaster_assets.proof.canaries import CANARIES, Fold, run_canaries, to_json
from spymaster_assets.resources import ArtifactRoot
from spymaster_assets.settings import WHERE_IT_RUNS, Settings, fingerprint
from spymaster_assets.store import Artifact, ArtifactStore, dump_json

JUDGED = ("patchtst_model", "tree_bundles", "retrieval_index")
"""Models that the canaries refit: what is published must have their settings."""


def canary_assets(settings: Settings) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """The asset `canaries` and its check for one deployment."""
    partitions = session_partitions(settings)
    contract = load_contract()
    judged_settings = settings.of("canary", "tree", "retrieval", "patchtst", "sequence", "label.primary_delay")

    @dg.asset(
        **keyed_by_session(settings, "proof"),
        deps=[
            "split_manifest",
            *(dg.AssetDep(a, partition_mapping=training_window(settings)) for a in ("signals", "sequence_dataset")),
        ],
        kinds={"xgboost", "pytorch"},
        code_version=fingerprint(judged_settings, contract.sha256, "2"),
        description="A planted future column must be caught, trees and PatchTST of shuffled labels must score chance, trees and "
        "neighbours of pure noise must not beat the base rate. A failed canary blocks calibration_report of this as-of session.",
    )
    def canaries(context: dg.AssetExecutionContext, artifacts: ArtifactRoot) -> dg.MaterializeResult[Any]:
        def make(key: str) -> Made:
            split, split_artifact = read_split(artifacts.store, key)
            train_sequences, train_inputs = sequence_part(artifacts.store, split, "train")
            validation_sequences, validation_inputs = sequence_part(artifacts.store, split, "validation")
            fold = Fold(
                train=read_part(artifacts.store, split, "train"),
                validation=read_part(artifacts.store, split, "validation"),
                train_sequences=train_sequences,
                validation_sequences=validation_sequences,
                contract=contract,
                delay=settings.label.primary_delay,
                tree=settings.tree,
                retrieval=settings.retrieval,
                patchtst=settings.patchtst,
                canary=settings.canary,
            )
            report = to_json(run_canaries(fold), key, settings.simulated)
            picture = plots.canaries(report["canaries"], key, settings.simulated)
            artifact = artifacts.store.publish(
                "canaries",
                key,
                {"canaries.json": dump_json(report), "canaries.png": picture},
                inputs={
                    "split_manifest": split_artifact.sha256,
                    **{f"signals[{k}]": v for k, v in split.inputs.items()},
                    **train_inputs,
                    **validation_inputs,
                },
                settings=judged_settings,
            )
            return Made(
                artifact,
                {
                    "failed": dg.MetadataValue.json(report["failed"]),
                    "verdicts": dg.MetadataValue.md(verdict_table(report)),
                    "intervals": dg.MetadataValue.md(plots.png_markdown(picture)),
                    "simulated": settings.simulated,
                },
            )

        return each_partition(context, make)

    @dg.asset_check(
        asset=canaries,
        partitions_def=partitions,
        blocking=True,
        description="No canary failed; one that could not be assessed is a warning.",
    )
    def canaries_hold(context: dg.AssetCheckExecutionContext, artifacts: ArtifactRoot) -> dg.AssetCheckResult:
        faults = {}
        failed = False
        for key in context.partition_keys:
            report = artifacts.store.load("canaries", key).json("canaries.json")
            failed |= bool(report["failed"])
            if found := [
                f"{c['what']}: {c['verdict']}, {c['reason']}" for c in report["canaries"] if c["verdict"] != "holds"
            ]:
                faults[key] = found
        severity = dg.AssetCheckSeverity.ERROR if failed else dg.AssetCheckSeverity.WARN
        return dg.AssetCheckResult(
            passed=not faults, severity=severity, metadata={"faults": dg.MetadataValue.json(faults)}
        )

    return [canaries, canaries_hold]


def require_canaries(store: ArtifactStore, split: Artifact) -> Artifact:
    """The canaries of a split; raise CanaryError when one failed or they were run on another split or with other settings
    than its models, MissingInputError when never run."""
    artifact = store.load("canaries", split.key)
    again = f"dagster asset materialize --select canaries --partition {split.key}"
    if artifact.inputs["split_manifest"] != split.sha256:
        raise CanaryError(
            f"the canaries of {split.key} were run on another split",
            where=str(artifact.folder),
            expected=f"split {split.sha256[:12]}, found {artifact.inputs['split_manifest'][:12]}",
            remedy=again,
        )
    for model in (store.load(asset, split.key) for asset in JUDGED if store.exists(asset, split.key)):
        absent = "not recorded"
        others = {n: artifact.settings.get(n, absent) for n, v in model.settings.items() if n not in WHERE_IT_RUNS}
        if differing := [n for n, v in others.items() if v != model.settings[n]]:
            name = differing[0]
            raise CanaryError(
                f"the canaries of {split.key} judged another {model.asset}: {', '.join(differing)} differ",
                where=str(artifact.folder),
                expected=f"{name} {model.settings[name]}, found {others[name]}",
                remedy=again,
            )
    told = artifact.json("canaries.json")["canaries"]
    if missing := set(CANARIES) - {c["canary"] for c in told}:
        raise CanaryError(
            f"canaries of {split.key} were not run: {', '.join(sorted(missing))}",
            where=str(artifact.folder),
            remedy=again,
        )
    failed = [c for c in told if c["verdict"] == "failed"]
    if failed:
        raise CanaryError(
            f"canaries of {split.key} failed: "
            + " | ".join(f"{c['canary']} ({c['what']}): {c['reason']}" for c in failed),
            where=str(artifact.folder),
            expected="planted leaks caught, shuffled labels and noise at chance",
            remedy=f"nothing of this session is published: find the leak (`spymaster prove --asof {split.key}`), then {again}",
        )
    return artifact


def verdict_table(report: dict[str, Any]) -> str:
    """Markdown table of one fold's canaries."""
    lines = [
        "| canary | statistic | n | value | interval | limit | verdict | reason |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in report["canaries"]:
        value, limit = ("" if c[k] is None else f"{c[k]:.3f}" for k in ("value", "limit"))
        interval = "" if c["low"] is None else f"{c['low']:+.3f} to {c['high']:+.3f}"
        cells = (c["what"], c["statistic"], str(c["n"]), value, interval, limit, c["verdict"], c["reason"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
