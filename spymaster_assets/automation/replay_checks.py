"""`replay_holds`: the outcome of replays as a check of each asset and partition, the job `prove` and its nightly schedule."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import dagster as dg

# not exported, yet what the UI tells a check of the newest materialization by
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationTargetMaterializationData

from spymaster_assets.assets.windows import NEW_YORK, session_partitions
from spymaster_assets.automation.prove import provable_asofs, prove, telling_asofs
from spymaster_assets.automation.replay import Replay
from spymaster_assets.automation.replay_asof import judged_asofs
from spymaster_assets.partitions import ASSETS, SESSION_ASSETS, WALK_FORWARD_ASSET, calendar_of
from spymaster_assets.proof.compare import Difference
from spymaster_assets.proof.cuts import telling_sessions
from spymaster_assets.settings import Settings
from spymaster_assets.store import REPORT_KEY, ArtifactStore

CHECK = "replay_holds"
PROVE_JOB = "prove"
PARTITIONED = tuple(a for a in ASSETS if a != WALK_FORWARD_ASSET)
SHOWN_DIFFERENCES = 100
_COLUMNS = ("future", "cut", "asset", "column", "row", "stored", "replayed", "begins")
_TEXT = "Rebuilt in a shadow store with a future that is cut off, another or late, it holds what was known before, byte for byte."


@dataclass(frozen=True)
class Verdict:
    """What all replays of one partition say of one asset; differences are (replay, difference), untried is what could not be tried."""

    asset: str
    partition: str
    replays: int
    futures: Mapping[str, int]
    compared: int
    differences: tuple[tuple[Replay, Difference], ...]
    untried: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """True when nothing differs."""
        return not self.differences

    @property
    def description(self) -> str:
        """One line: the first difference, or what was compared."""
        if self.differences:
            replay, difference = self.differences[0]
            return replay.told(difference)
        told = (
            f"{self.compared:,} values compared" if self.compared else "not tried: no row of it was known before a cut"
        )
        return "; not tried: ".join((told, *self.untried))

    @property
    def metadata(self) -> dict[str, Any]:
        """Counts, and the differences as a table."""
        rows = [
            dg.TableRecord(
                dict(
                    zip(
                        _COLUMNS,
                        (
                            r.future,
                            r.at,
                            f"{d.asset} [{d.key}]",
                            d.column,
                            d.row,
                            d.stored,
                            d.replayed,
                            r.nearest.get(d.asset) or "here",
                        ),
                        strict=True,
                    )
                )
            )
            for r, d in self.differences[:SHOWN_DIFFERENCES]
        ]
        schema = dg.TableSchema([dg.TableColumn(c, "string") for c in _COLUMNS])
        return {
            "replays": self.replays,
            "replays_by_future": dg.MetadataValue.json(dict(self.futures)),
            "values_compared": self.compared,
            "differing": len(self.differences),
            "not_tried": dg.MetadataValue.json(list(self.untried)),
            "differences": dg.MetadataValue.table(rows, schema=schema),
        }


def verdicts(replays: Sequence[Replay]) -> dict[tuple[str, str], Verdict]:
    """{(asset, partition): verdict} of all that the replays compared, in the order of the graph.

    A difference in an asset that its replay does not judge (of a session beside a redelivered one) counts for the first that it does.
    """
    out = {}
    assets = [(a, key) for key in dict.fromkeys(r.key for r in replays) for a in ASSETS]
    for asset, key in assets:
        mine = [r for r in replays if r.key == key and asset in r.compared]
        if not mine:
            continue
        futures: dict[str, int] = {}
        for r in mine:
            futures[r.future] = futures.get(r.future, 0) + 1
        found = tuple((r, d) for r in mine for d in r.differences if asset == _judged_with(r, d))
        untried = dict.fromkeys(u for r in replays if r.key == key and asset in r.about for u in r.untried)
        compared = sum(r.compared[asset] for r in mine)
        out[asset, key] = Verdict(asset, key, len(mine), futures, compared, found, tuple(untried))
    return out


def _judged_with(replay: Replay, difference: Difference) -> str:
    return difference.asset if difference.asset in replay.compared else next(iter(replay.compared))


def evaluations(
    instance: dg.DagsterInstance, found: Mapping[tuple[str, str], Verdict]
) -> Iterator[dg.AssetCheckEvaluation]:
    """Verdicts as evaluations of the check, each for the newest materialization of its partition, or of an asset that has none."""
    for verdict in found.values():
        asset = dg.AssetKey(verdict.asset)
        partition = verdict.partition if verdict.asset in PARTITIONED else None
        records = instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=asset, asset_partitions=[partition] if partition else None), limit=1
        ).records
        target = next(
            (
                AssetCheckEvaluationTargetMaterializationData(
                    storage_id=r.storage_id, run_id=r.run_id, timestamp=r.timestamp
                )
                for r in records
            ),
            None,
        )
        yield dg.AssetCheckEvaluation(
            asset_key=asset,
            check_name=CHECK,
            passed=verdict.holds,
            description=verdict.description,
            metadata=verdict.metadata,
            partition=partition,
            target_materialization_data=target,
        )


def record(found: Mapping[tuple[str, str], Verdict]) -> None:
    """Report verdicts to the instance of DAGSTER_HOME, outside a run."""
    with dg.DagsterInstance.get() as instance:
        for evaluation in evaluations(instance, found):
            instance.report_runless_asset_event(evaluation)


def replay_checks(settings: Settings) -> list[dg.AssetChecksDefinition]:
    """The check on all partitioned assets as one op, since one replay serves several of a partition, and on the walk-forward report.

    A replay takes minutes: a run that makes assets, which takes their checks along, leaves it out.
    """
    partitions = session_partitions(settings)

    @dg.multi_asset_check(
        specs=[dg.AssetCheckSpec(CHECK, asset=a, partitions_def=partitions, description=_TEXT) for a in PARTITIONED],
        can_subset=True,
        config_schema=_config(settings),
        description="Replays of a partition.",
    )
    def replays_hold(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        run = context.op_execution_context
        if run.job_def.asset_layer.selected_asset_keys:
            return
        wanted = {key.asset_key.to_user_string() for key in context.selected_asset_check_keys}
        found = _proved(settings, context.partition_key, run.op_config, wanted)
        yield from _results(v for v in found.values() if v.asset in wanted)

    @dg.multi_asset_check(
        specs=[dg.AssetCheckSpec(CHECK, asset=WALK_FORWARD_ASSET, description=_TEXT)],
        can_subset=True,
        config_schema=_config(settings),
        description="Replays of the walk-forward report.",
    )
    def walk_forward_replays_hold(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        run, store = context.op_execution_context, ArtifactStore(settings.root)
        if run.job_def.asset_layer.selected_asset_keys or not store.exists(WALK_FORWARD_ASSET, REPORT_KEY):
            return
        newest = judged_asofs(store.load(WALK_FORWARD_ASSET, REPORT_KEY))[-1]
        yield from _results(_proved(settings, newest, run.op_config, {WALK_FORWARD_ASSET}).values())

    return [replays_hold, walk_forward_replays_hold]


def _results(found: Iterable[Verdict]) -> Iterator[dg.AssetCheckResult]:
    for verdict in found:
        yield dg.AssetCheckResult(
            asset_key=verdict.asset,
            check_name=CHECK,
            passed=verdict.holds,
            description=verdict.description,
            metadata=verdict.metadata,
        )


def prove_job(settings: Settings) -> dg.JobDefinition:
    """The job that replays one partition and records the check of all its assets, and of the walk-forward report with its newest fold.

    Dagster 1.13 has no partitioned job of checks alone, so this is a job of one op.
    """

    @dg.op(config_schema=_config(settings), description="Rebuilds, compares and records.")
    def replay(context: dg.OpExecutionContext) -> None:
        found = _proved(settings, context.partition_key, context.op_config, ASSETS)
        for verdict in found.values():
            say = context.log.info if verdict.holds else context.log.error
            say(f"{verdict.asset} [{verdict.partition}]: {verdict.description}")
        for evaluation in evaluations(context.instance, found):
            context.log_event(evaluation)  # type: ignore[arg-type]  # it takes one, its annotation does not say so

    @dg.job(
        name=PROVE_JOB,
        partitions_def=session_partitions(settings),
        description="Rebuilds a session's assets, and what is made as of it, with another future and checks what was known before.",
    )
    def job() -> None:
        replay()

    return job


def prove_schedule(settings: Settings, job: dg.JobDefinition) -> dg.ScheduleDefinition:
    """Replays at night, off until it is turned on: the telling sessions and as-of sessions, other random times each day."""

    @dg.schedule(
        name="prove_nightly",
        job=job,
        cron_schedule=settings.prove.cron,
        execution_timezone=NEW_YORK,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description=f"Runs `{PROVE_JOB}` with {settings.prove.nightly_cuts} cuts.",
    )
    def nightly(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        store = ArtifactStore(settings.root)
        keys = dict.fromkeys([*telling_sessions(store, calendar_of(settings.symbol)), *telling_asofs(store)])
        day: datetime = context.scheduled_execution_time
        config = {"cuts": settings.prove.nightly_cuts, "seed": day.toordinal()}
        for key in keys:
            yield dg.RunRequest(
                run_key=f"{PROVE_JOB}:{key}:{day.date().isoformat()}",
                partition_key=key,
                run_config={"ops": {"replay": {"config": config}}},
            )
        if not keys:
            yield dg.SkipReason("no session has signals")

    return nightly


def _config(settings: Settings) -> dict[str, dg.Field]:
    return {
        "cuts": dg.Field(int, default_value=settings.prove.cuts, description="Times at which the session is replayed."),
        "seed": dg.Field(int, default_value=0, description="Of the random ones."),
    }


def _proved(
    settings: Settings, key: str, config: Mapping[str, int], wanted: Collection[str]
) -> dict[tuple[str, str], Verdict]:
    """Verdicts on a partition: the session's where a session asset is wanted, those as of it where one is and its models are made."""
    asofs = provable_asofs(ArtifactStore(settings.root))
    refits = [key] if key in asofs and {*wanted}.difference(SESSION_ASSETS) else []
    sessions = [] if {*SESSION_ASSETS}.isdisjoint(wanted) else [key]
    if not sessions and not refits:
        return {}
    return verdicts(prove(settings, sessions, refits, config["cuts"], config["seed"], wanted=wanted))
