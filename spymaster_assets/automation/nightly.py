"""The nightly sensor: a session's data when its input is in or has changed, models and reports when theirs have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import takewhile

import dagster as dg

from spymaster_assets.assets.signals import warmup_sessions
from spymaster_assets.errors import SpymasterError
from spymaster_assets.market.files import (
    SEEN_INPUTS,
    FileEntry,
    FlatFile,
    covers,
    inputs_fingerprint,
    scan_flat,
    scan_folder,
    session_inputs,
)
from spymaster_assets.partitions import (
    FILE_ASSETS,
    MODEL_ASSETS,
    REPORT_ASSET,
    SESSION_ASSETS,
    all_sessions,
    calendar_of,
    scheduled_asof,
)
from spymaster_assets.proof.lineage import CONTRACT, FILE, input_of
from spymaster_assets.settings import MINUTE_NS, NightlySettings, Settings, fingerprint
from spymaster_assets.store import Artifact, ArtifactStore

DATA_JOB = "session_data"
MODEL_JOB = "asof_models"
REPORT_JOB = "fold_report"
_REQUEST_TAG, _INPUTS_TAG = "spymaster/request", "spymaster/inputs"
_MAX_NOTES = 50
"""What a tick says at most of what it did not ask for."""
_MAX_RUNTIME_TAG = "dagster/max_runtime"
"""Seconds after which Dagster's run monitoring ends a run."""
_NOT_OVER, _NOT_COVERED, _DUE = "not over yet", "its files do not cover regular hours", "its run is due"
_MISSING = "is missing"
_GONE, _CHANGED = (
    "made from files that are gone",
    "made from other files than are there, which do not cover regular hours",
)
_MADE_BY: Mapping[str, tuple[str, ...]] = {
    DATA_JOB: SESSION_ASSETS,
    MODEL_JOB: MODEL_ASSETS,
    REPORT_JOB: (REPORT_ASSET,),
}


@dataclass(frozen=True)
class Request:
    """One run to ask for: a job, a partition and the fingerprint of what the run would be made from; faults: by asset, why it is due."""

    job: str
    partition: str
    inputs: str
    faults: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """What is asked for, whatever its inputs."""
        return f"{self.job}:{self.partition}"

    def key(self, attempt: int) -> str:
        """Run key of the n-th run of what is asked for, which Dagster runs once."""
        return f"{self.name}:{self.inputs}:{attempt}"


@dataclass(frozen=True)
class Turn:
    """Whether a request may be made now: the number of its run, from 1, or 0 and why not."""

    number: int = 0
    why: str = ""
    gave_up: bool = False


@dataclass(frozen=True)
class Wait:
    """A fold's models or report that are due but for sessions that are not ready: why, by session."""

    name: str
    sessions: Mapping[str, str]

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for key, why in self.sessions.items():
            reasons.setdefault(why, []).append(key)
        return f"{self.name} waits for " + ", ".join(f"{_named(keys)} ({why})" for why, keys in reasons.items())


@dataclass(frozen=True)
class Stands:
    """A session that stays as it was made, because the files that are there now do not cover it: why it cannot be made again."""

    session: str
    why: str


def due_requests(
    settings: Settings,
    store: ArtifactStore,
    entries: tuple[FileEntry, ...],
    flat: tuple[FlatFile, ...],
    now: datetime,
    turn_of: Callable[[Request], Turn] = lambda request: Turn(1),
) -> Iterator[Request | Wait | Stands]:
    """Runs that may be asked for at `now`, oldest first, and what waits or stands; judged from files and store alone, so a restart changes
    nothing.

    Data: the session's close and the grace time have passed, its files cover it and none was written just now, and its artifacts are
    missing or made from other files or other upstream artifacts. Models: the as-of session is on the schedule, all earlier sessions of its
    window are made, and it has none, or some made from other artifacts. Report: the same of the models and their test sessions.
    A request that was given up is not waited for where an earlier run has made the whole session, whose artifacts stand; a session that was
    never made, for whatever reason, is: no model learns from part of its window.
    """
    made = _Made(store)
    sessions = all_sessions(settings, now)
    index = {key: n for n, key in enumerate(sessions)}
    waiting: dict[str, str] = {}
    for key, request, why in _due_data(settings, made, entries, flat, sessions, int(now.timestamp()) * 1_000_000_000):
        if request is None and made.has(SESSION_ASSETS, key):
            yield Stands(key, why)
            continue
        turn = Turn(why=why) if request is None else turn_of(request)
        if not (turn.gave_up and made.has(SESSION_ASSETS, key)):
            waiting[key] = turn.why or why or _DUE
        if request is not None and turn.number and not why:
            yield request

    def request_of(job: str, asof: str, keys: Iterable[str], assets: Iterable[str] = ()) -> Request:
        parts = [made.sha256(a, k) for k in keys for a in ("signals", "sequence_dataset")]
        inputs = fingerprint(parts, [made.sha256(a, asof) for a in assets])
        return Request(job, asof, inputs, made.faults(_MADE_BY[job], asof))

    for asof in scheduled_asof(settings, now):
        at, rolling = index[asof], settings.split.window == "rolling"
        needed = sessions[max(0, at - settings.split.history_sessions) if rolling else 0 : at]
        due = request_of(MODEL_JOB, asof, needed)
        if not due.faults or (waiting.keys().isdisjoint(needed) and turn_of(due).gave_up):
            test = sessions[at : at + settings.split.retrain_every_sessions]
            complete = len(test) == settings.split.retrain_every_sessions and made.has(MODEL_ASSETS, asof)
            due, needed = request_of(REPORT_JOB, asof, test, MODEL_ASSETS), needed + test
            if not complete or not due.faults:
                continue
        blocked = {k: waiting[k] for k in needed if k in waiting}
        if not blocked:
            if turn_of(due).number:
                yield due
        elif set(blocked.values()) != {_NOT_OVER}:  # what waits for time alone is not due
            yield Wait(due.name, blocked)


def _due_data(
    settings: Settings,
    made: _Made,
    entries: tuple[FileEntry, ...],
    flat: tuple[FlatFile, ...],
    sessions: list[str],
    now_ns: int,
) -> Iterator[tuple[str, Request | None, str]]:
    """Sessions that are not as their files are: what would make them so, or None, and why it cannot be asked for, if it cannot."""
    calendar, nightly = calendar_of(settings.symbol), settings.nightly
    names = {e.name for e in entries}

    def inputs_of(key: str) -> tuple[FileEntry | FlatFile, ...]:
        return session_inputs(entries, flat, calendar, settings.instrument, key)

    for key in sessions:
        session = calendar.session(key)
        over = session.close_ns + nightly.grace_min * MINUTE_NS <= now_ns
        if not over or not covers(entries, session, settings.instrument, settings.dataset):
            if not made.has(SESSION_ASSETS, key):
                yield key, None, _NOT_COVERED if over else _NOT_OVER
            elif over and not made.from_files(key, inputs_fingerprint(inputs_of(key))):
                yield key, None, _CHANGED if made.tape(key) <= names else _GONE
            continue
        files = inputs_of(key)
        inputs = inputs_fingerprint(files)
        faults = made.faults(SESSION_ASSETS, key, inputs)
        if not faults:
            continue
        growing = any(0 <= now_ns - f.mtime_ns < nightly.settle_min * MINUTE_NS for f in files)
        warmup = [made.sha256("ohlcv_bars", k) for k in warmup_sessions(settings, key)]
        why = f"a file may still be growing, it was written less than {nightly.settle_min} min ago" if growing else ""
        yield key, Request(DATA_JOB, key, fingerprint(inputs, warmup), faults), why


class _Made:
    """What the store holds, each manifest read once."""

    def __init__(self, store: ArtifactStore) -> None:
        self._load = cache(lambda asset, key: _manifest(store, asset, key))

    def has(self, assets: Iterable[str], key: str) -> bool:
        return all(self._load(a, key) is not None for a in assets)

    def sha256(self, asset: str, key: str) -> str:
        artifact = self._load(asset, key)
        return artifact.sha256 if artifact else ""

    def tape(self, key: str) -> set[str]:
        """Names of the files of trades or bars that the session was made from."""
        artifact = self._load("market_files", key)
        return set(artifact.inputs) if artifact else set()

    def from_files(self, key: str, inputs: str) -> bool:
        """True when every artifact that is made from files saw these."""
        return not any(self._fault(a, key, inputs) for a in FILE_ASSETS)

    def faults(self, assets: Iterable[str], key: str, inputs: str | None = None) -> dict[str, str]:
        """Why each of the artifacts is due, those that are not left out: it is missing, or what it was made from is another by now."""
        return {a: fault for a in assets if (fault := self._fault(a, key, inputs) or self._outdated(a, key))}

    def _fault(self, asset: str, key: str, inputs: str | None) -> str:
        artifact = self._load(asset, key)
        if artifact is None:
            return _MISSING
        other = inputs is not None and asset in FILE_ASSETS and artifact.metadata.get(SEEN_INPUTS) != inputs
        return "saw other files" if other else ""

    def _outdated(self, asset: str, key: str) -> str:
        artifact = self._load(asset, key)
        changed = [of for of, sha256 in _upstream(artifact) if self.sha256(*of) != sha256] if artifact else []
        return f"was made from another {changed[0][0]} [{changed[0][1]}]" if changed else ""


def _upstream(artifact: Artifact) -> Iterator[tuple[tuple[str, str], str]]:
    """((asset, key), SHA-256) of the artifacts among the recorded inputs; files and the contract are none."""
    for name, sha256 in artifact.inputs.items():
        of = input_of(artifact, name)
        if of[0] not in (FILE, CONTRACT):
            yield of, sha256


def _manifest(store: ArtifactStore, asset: str, key: str) -> Artifact | None:
    try:
        return store.load(asset, key)
    except SpymasterError:  # missing, or torn: to be made either way
        return None


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
            entries, flat = scan_folder(settings.dbn_dir), scan_flat(settings.dbn_dir)
        except SpymasterError as error:
            yield dg.SkipReason(f"input cannot be read: {error}")
            return
        now = clock()
        turns: dict[Request, Turn] = {}

        def turn_of(request: Request) -> Turn:
            if request not in turns:
                turns[request] = _turn(context.instance, request, now, settings.nightly)
            return turns[request]

        requests: list[Request] = []
        waits: list[str] = []
        stands: dict[str, list[str]] = {}
        for found in due_requests(settings, ArtifactStore(settings.root), entries, flat, now, turn_of):
            match found:
                case Request():
                    requests.append(found)
                case Wait():
                    waits.append(str(found))
                case Stands(session, why):
                    stands.setdefault(why, []).append(session)
        for request in requests[: settings.nightly.max_sessions_per_tick]:
            yield dg.RunRequest(
                run_key=request.key(turn_of(request).number),
                job_name=request.job,
                partition_key=request.partition,
                tags={
                    _REQUEST_TAG: request.name,
                    _INPUTS_TAG: request.inputs,
                    _MAX_RUNTIME_TAG: str(settings.nightly.max_run_min * 60),
                },
            )
        held = sorted(((r, turn) for r, turn in turns.items() if turn.why), key=lambda held: not held[1].gave_up)
        notes = [f"{why}: {_named(keys)}" for why, keys in stands.items()]
        notes += [*waits, *(f"{r.name}: {turn.why}" for r, turn in held)]
        said = "; ".join(notes[:_MAX_NOTES]) + (f"; and {len(notes) - _MAX_NOTES} more" if notes[_MAX_NOTES:] else "")
        if not requests:
            yield dg.SkipReason(f"nothing is asked for; {said}" if said else "nothing is due")
        elif said:  # a tick that asks for runs cannot give a reason
            context.log.info(said)

    return nightly


def _turn(instance: dg.DagsterInstance, request: Request, now: datetime, settings: NightlySettings) -> Turn:
    """Whether a run may be asked for now: no run of the partition is under way, none on the same input ended just now, the last did not
    leave due what it made, and not all attempts since the last that succeeded are used up. The instance's runs tell, so a new daemon goes
    on where the last one stopped.
    """
    records = instance.get_run_records(dg.RunsFilter(tags={_REQUEST_TAG: request.name}))  # newest first
    latest = now - timedelta(minutes=settings.max_run_min)
    for record in records:
        if not record.dagster_run.is_finished and not _lost(record, latest):
            return Turn(why=f"run {_id(record)} of {_minute(record.create_timestamp)} is under way")

    def on_same(record: dg.RunRecord) -> bool:
        return record.dagster_run.tags.get(_INPUTS_TAG) == request.inputs

    same = [r for r in records if on_same(r)]
    ended = max((r.end_time or 0.0 for r in same), default=0.0)
    just_ended = 0 <= now.timestamp() - ended < settings.retry_min * 60
    in_vain = list(takewhile(lambda r: on_same(r) and _succeeded(r), records))
    if in_vain and (len(in_vain) >= settings.max_attempts or not _touched_since(instance, in_vain[0], request)):
        faults = ", ".join(f"{asset} {why}" for asset, why in request.faults.items())
        # the tick may have read artifacts before a run that is over by now had made them
        return Turn(gave_up=not just_ended, why=f"made by run {_id(in_vain[0])}, yet still due: {faults}")
    failed = list(takewhile(lambda r: not _succeeded(r), same))
    if len(failed) >= settings.max_attempts:
        return Turn(gave_up=True, why=f"given up after {len(failed)} failed runs on the same input")
    if just_ended:
        again = datetime.fromtimestamp(ended, UTC) + timedelta(minutes=settings.retry_min)
        return Turn(why=f"its last run has just ended, the next is asked for at {_minute(again)}")
    return Turn(number=len(records) + 1)  # a key that an earlier run has would be skipped without a word


def _touched_since(instance: dg.DagsterInstance, done: dg.RunRecord, request: Request) -> bool:
    """True when something else made due what a run had made: another run has made one of its artifacts, or one that it made is gone."""
    for asset in _MADE_BY[request.job]:
        made = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[request.partition])
        for newest in instance.fetch_materializations(made, limit=1).records:
            if newest.run_id == done.dagster_run.run_id:
                if request.faults.get(asset) == _MISSING:
                    return True
            elif newest.timestamp > (done.end_time or 0.0):
                return True
    return False


def _succeeded(record: dg.RunRecord) -> bool:
    return record.dagster_run.status is dg.DagsterRunStatus.SUCCESS


def _id(record: dg.RunRecord) -> str:
    return record.dagster_run.run_id[:8]


def _lost(record: dg.RunRecord, latest: datetime) -> bool:
    """True when an unfinished run began before `latest`: nobody reports the end of a worker that was killed with its code server.

    A run that still queues has no worker to lose.
    """
    if record.dagster_run.status is dg.DagsterRunStatus.QUEUED:
        return False
    return (record.start_time or record.update_timestamp.timestamp()) < latest.timestamp()


def _named(keys: Sequence[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if keys[5:] else "")


def _minute(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%MZ")
