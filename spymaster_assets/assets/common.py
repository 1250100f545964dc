"""What every asset shares: the loop over a run's partitions, its progress and its faults."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from spymaster_assets.errors import SpymasterError
from spymaster_assets.store import Artifact

Metadata = Mapping[str, Any]
progress_listeners: list[Callable[[str, str, int, int], None]] = []
"""Called as (asset, partition, done, of) after each partition; the demo's progress bar listens here."""


@dataclass(frozen=True)
class Made:
    """One published artifact and what to show of it."""

    artifact: Artifact
    metadata: Metadata = field(default_factory=dict)


def each_partition(context: dg.AssetExecutionContext, make: Callable[[str], Made]) -> dg.MaterializeResult[Any]:
    """Make every partition of the run, one after another, and record each with its own metadata.

    A partition that fails does not hide the others: they are made and recorded, then the run fails and names every fault.
    """
    keys = sorted(context.partition_keys)
    asset = context.asset_key.to_user_string()
    made: dict[str, Made] = {}
    faults: dict[str, str] = {}
    for n, key in enumerate(keys, start=1):
        began = time.monotonic()
        try:
            made[key] = make(key)
        except SpymasterError as error:
            faults[key] = f"{type(error).__name__}: {error}"
            context.log.error(f"{asset} [{key}]: {faults[key]}")
        else:
            context.log.info(f"{asset} [{key}] {n}/{len(keys)} in {time.monotonic() - began:.2f} s")
        for listener in progress_listeners:
            listener(asset, key, n, len(keys))
    if faults:
        for key, one in made.items():
            context.log_event(dg.AssetMaterialization(context.asset_key, partition=key, metadata=_shown(one)))
        raise dg.Failure(
            f"{asset}: {len(faults)} of {len(keys)} partitions failed: "
            + " | ".join(f"[{k}] {m}" for k, m in faults.items()),
            metadata=faults,
            allow_retries=False,
        )
    for key, one in made.items():
        context.add_asset_metadata(_shown(one), partition_key=key)
    version = dg.DataVersion(next(iter(made.values())).artifact.sha256) if len(made) == 1 else None
    return dg.MaterializeResult(data_version=version)


def check_each(
    context: dg.AssetCheckExecutionContext,
    faults_of: Callable[[str], Any],
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
) -> dg.AssetCheckResult:
    """Look for the faults of every partition of the run; the check passes when none has any, and tells them by partition."""
    faults = {key: found for key in context.partition_keys if (found := faults_of(key))}
    return dg.AssetCheckResult(passed=not faults, severity=severity, metadata={"faults": dg.MetadataValue.json(faults)})


def _shown(made: Made) -> dict[str, Any]:
    return {
        **made.metadata,
        "sha256": made.artifact.sha256,
        "path": dg.MetadataValue.path(str(made.artifact.folder)),
    }
