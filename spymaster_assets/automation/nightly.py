"""The nightly sensor: a session's data when its input is in and its close has passed, models when the schedule says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import dagster as dg

from spymaster_assets.errors import SpymasterError
from spymaster_assets.market.files import FileEntry, covers, scan_folder
from spymaster_assets.partitions import MODEL_ASSETS, all_sessions, calendar_of, scheduled_asof
from spymaster_assets.settings import MINUTE_NS, Settings
from spymaster_assets.store import ArtifactStore

DATA_JOB = "session_data"
MODEL_JOB = "asof_models"
REPORT_JOB = "fold_report"


@dataclass(frozen=True)
class Request:
    """One run to ask for: a job and a partition. Its key names it for good, so that it is asked for once."""

    job: str
    partition: str

    @property
    def key(self) -> str:
        """Run key."""
        return f"{self.job}:{self.partition}"


def due_requests(
    settings: Settings, store: ArtifactStore, entries: tuple[FileEntry, ...], now: datetime
) -> Iterator[Request]:
    """Runs that are due at `now`, oldest first, judged from what is in the store alone (so a restart changes nothing).

    Data: the session's close and the grace time have passed, a file covers it, and its sequences are not made. Models: the as-of
    session is on the schedule, all earlier sessions of its window are made and one of MODEL_ASSETS is not. Report: all of those and
    the test sessions are made.
    """
    calendar = calendar_of(settings.symbol)
    now_ns = int(now.timestamp()) * 1_000_000_000
    sessions = all_sessions(settings, now)
    made = set(store.keys("sequence_dataset"))
    for key in sessions:
        session = calendar.session(key)
        if key in made or session.close_ns + settings.nightly.grace_min * MINUTE_NS > now_ns:
            continue
        if covers(entries, session, settings.instrument):
            yield Request(DATA_JOB, key)
    index = {key: n for n, key in enumerate(sessions)}
    for asof in scheduled_asof(settings, now):
        at = index[asof]
        history = sessions[max(0, at - settings.split.history_sessions) : at]
        modelled = all(store.exists(a, asof) for a in MODEL_ASSETS)
        if not modelled and all(k in made for k in history):
            yield Request(MODEL_JOB, asof)
        test = sessions[at : at + settings.split.retrain_every_sessions]
        complete = len(test) == settings.split.retrain_every_sessions and all(k in made for k in test)
        if complete and modelled and not store.exists("calibration_report", asof):
            yield Request(REPORT_JOB, asof)


def nightly_sensor(
    settings: Settings,
    jobs: dict[str, dg.UnresolvedAssetJobDefinition],
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> dg.SensorDefinition:
    """Sensor over `due_requests`; SPYMASTER_NIGHTLY=0 turns it off whatever the UI says."""

    @dg.sensor(
        name="nightly",
        jobs=list(jobs.values()),
        minimum_interval_seconds=settings.nightly.interval_s,
        default_status=dg.DefaultSensorStatus.RUNNING if settings.nightly.enabled else dg.DefaultSensorStatus.STOPPED,
        description="Requests a session's data once its input is in and its close has passed, and the as-of models that the retraining "
        "schedule names.",
    )
    def nightly(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        if not settings.nightly.enabled:
            yield dg.SkipReason("disabled by configuration (SPYMASTER_NIGHTLY=0 or nightly.enabled=false)")
            return
        try:
            entries = scan_folder(settings.dbn_dir)
        except SpymasterError as error:
            yield dg.SkipReason(f"input cannot be read: {error}")
            return
        sent = 0
        for request in due_requests(settings, ArtifactStore(settings.root), entries, clock()):
            if sent == settings.nightly.max_sessions_per_tick:
                break
            if _was_requested(context.instance, request.key):
                continue
            sent += 1
            yield dg.RunRequest(
                run_key=request.key,
                job_name=request.job,
                partition_key=request.partition,
                tags={"spymaster/request": request.key},
            )
        if not sent:
            yield dg.SkipReason("nothing is due")

    return nightly


def _was_requested(instance: dg.DagsterInstance, key: str) -> bool:
    """True when a run of this request exists; run keys would drop a repeat anyway, this keeps the tick's quota for new ones."""
    return bool(instance.get_run_records(dg.RunsFilter(tags={"spymaster/request": key}), limit=1))
