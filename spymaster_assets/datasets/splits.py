"""Walk-forward splits: which sessions train, validate and test a model as of a session, and which rows are purged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from itertools import pairwise
from typing import Any

import polars as pl

from spymaster_assets.errors import SplitError
from spymaster_assets.settings import NS, SplitSettings
from spymaster_assets.store import Artifact, ArtifactStore

TIMES = ("event_id", "date", "decision_ns", "label_known_ns")
"""Columns that say which row of which session decided when, and when all its labels were complete."""
_SESSIONS = ("train", "validation", "test", "embargoed")


@dataclass(frozen=True)
class SplitManifest:
    """One fold. Sessions are sorted keys; `purged` lists {event_id, part, reason}; `inputs` maps a session to its signals' hash.

    An as-of model may read train and validation only; test is [asof, next retraining), known from the calendar alone. No decision of test
    is earlier than first_test_decision_ns; 0 marks a plan whose rows were never purged. Raises SplitError as `check_manifest` does.
    """

    asof: str
    window: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    embargoed: tuple[str, ...]
    first_test_decision_ns: int = 0
    purged: tuple[dict[str, str], ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_manifest(self)

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> SplitManifest:
        """Inverse of `to_json`; raise SplitError when a field is missing, unknown or of another shape, or the fold is out of order."""
        try:
            fields: dict[str, Any] = {k: tuple(v) if k in (*_SESSIONS, "purged") else v for k, v in raw.items()}
            if not all(isinstance(s, str) for name in _SESSIONS for s in fields[name]):
                raise ValueError("sessions are texts")
            if not all(isinstance(p["event_id"], str) for p in fields["purged"]):
                raise ValueError("purged rows are named by event_id")
            if type(fields["first_test_decision_ns"]) is not int:
                raise ValueError("first_test_decision_ns is a whole number")
            return cls(**fields)
        except (AttributeError, KeyError, OSError, OverflowError, TypeError, ValueError) as error:
            raise SplitError(f"not a split manifest: {error}", remedy="materialize split_manifest again") from error


def read_split(store: ArtifactStore, key: str) -> tuple[SplitManifest, Artifact]:
    """Manifest of one as-of session and its artifact."""
    artifact = store.load("split_manifest", key)
    return SplitManifest.from_json(artifact.json("split.json")), artifact


def plan_split(sessions: Sequence[str], asof: str, settings: SplitSettings) -> SplitManifest:
    """Sessions of the fold as of `asof`: train, embargo, validation, embargo, then test from `asof` on.

    sessions: all from the first partition until the retraining after `asof`, sorted. Raises SplitError when the history is too short: a
    window is never clipped.
    """
    if asof not in sessions:
        raise SplitError(f"{asof} is not a session of this deployment", expected=f"{sessions[0]} to {sessions[-1]}")
    at = list(sessions).index(asof)
    need = settings.history_sessions
    if at < need:
        raise SplitError(
            f"as of {asof} there are {at} earlier sessions",
            expected=f"{need}: {settings.train_sessions} train + {settings.validation_sessions} validation + "
            f"2 x {settings.embargo_sessions} embargo",
            remedy=f"choose an as-of session from {sessions[need] if need < len(sessions) else 'later data'} on, or a shorter window",
        )
    validation_end = at - settings.embargo_sessions
    validation_start = validation_end - settings.validation_sessions
    train_end = validation_start - settings.embargo_sessions
    train_start = train_end - settings.train_sessions if settings.window == "rolling" else 0
    return SplitManifest(
        asof=asof,
        window=settings.window,
        train=tuple(sessions[train_start:train_end]),
        validation=tuple(sessions[validation_start:validation_end]),
        test=tuple(sessions[at : at + settings.retrain_every_sessions]),
        embargoed=(*sessions[train_end:validation_start], *sessions[validation_end:at]),
    )


def asof_sessions(sessions: Sequence[str], settings: SplitSettings) -> list[str]:
    """The retraining schedule: the first session with a whole history before it, then every k-th."""
    return list(sessions[settings.history_sessions :: settings.retrain_every_sessions])


def build_manifest(
    plan: SplitManifest, rows: pl.DataFrame, inputs: Mapping[str, str], first_test_decision_ns: int
) -> SplitManifest:
    """Purge the plan's rows and record inputs.

    rows: TIMES of the train and validation sessions. A training row whose label is complete at or after the first validation decision, and
    a row of either part whose label is complete at or after the first test decision, is purged. Raises SplitError on a row of another
    session, and when a part is or becomes empty.
    """
    require_times(rows, "the rows of the split")
    parts = {name: rows.filter(pl.col("date").is_in(list(getattr(plan, name)))) for name in ("train", "validation")}
    if sum(part.height for part in parts.values()) < rows.height:
        used = [*plan.train, *plan.validation]
        odd = rows.filter(~pl.col("date").is_in(used)).sort("date", "event_id")
        raise SplitError(
            f"row {odd['event_id'][0]} is of {odd['date'][0]}, which the split does not learn from",
            where=f"split as of {plan.asof}",
            expected=f"sessions {plan.train[0]} to {plan.train[-1]} and {plan.validation[0]} to {plan.validation[-1]}",
        )
    for name, part in parts.items():
        if part.height == 0:
            sessions = getattr(plan, name)
            raise SplitError(f"the {name} part of {plan.asof} has no rows", where=f"{sessions[0]}..{sessions[-1]}")
    late = _late_rows(parts, first_test_decision_ns)
    for name, part in parts.items():
        if late.filter(pl.col("part") == name).height == part.height:
            raise SplitError(f"purging leaves no {name} rows as of {plan.asof}", remedy="use a longer window")
    return replace(
        plan,
        first_test_decision_ns=first_test_decision_ns,
        purged=tuple(late.to_dicts()),
        inputs=dict(sorted(inputs.items())),
        rows={name: part.height for name, part in parts.items()},
    )


def check_manifest(manifest: SplitManifest) -> None:
    """Raise SplitError when parts are empty, unsorted, overlapping or out of order, or first test decision or input hashes do not fit."""
    parts = {"train": manifest.train, "validation": manifest.validation, "test": manifest.test}
    where = f"split as of {manifest.asof}"
    for name, part in parts.items():
        if not part:
            raise SplitError(f"the {name} part is empty", where=where)
        if any(a >= b for a, b in pairwise(part)):
            raise SplitError(
                f"the {name} sessions are not in order or repeat", where=where, expected="sorted, distinct sessions"
            )
    for (a, one), (b, two) in pairwise(parts.items()):
        if one[-1] >= two[0]:
            raise SplitError(f"{a} and {b} overlap: {one[-1]} is not before {two[0]}", where=where)
    if manifest.test[0] != manifest.asof:
        raise SplitError(
            f"test starts on {manifest.test[0]}", where=where, expected=f"the as-of session {manifest.asof}"
        )
    used = {*manifest.train, *manifest.validation, *manifest.test}
    if both := used & set(manifest.embargoed):
        raise SplitError(f"embargoed sessions are used: {', '.join(sorted(both))}", where=where)
    if first_ns := manifest.first_test_decision_ns:
        # a session of futures may open on the evening before
        day = datetime.fromtimestamp(first_ns // NS, UTC).date()
        if abs((day - date.fromisoformat(manifest.asof)).days) > 1:
            raise SplitError(f"the first test decision is on {day}", where=where, expected=manifest.asof)
    if manifest.inputs and set(manifest.inputs) != {*manifest.train, *manifest.validation}:
        raise SplitError("the input hashes are not those of the train and validation sessions", where=where)


def check_fold(fold: SplitManifest, train: pl.DataFrame, validation: pl.DataFrame) -> None:
    """Raise SplitError, naming part and row, unless train and validation (TIMES) are rows that a model of the fold may learn from.

    Each row is of a session of its part and not purged, and its label is complete before the first decision of every later part.
    """
    where = f"split as of {fold.asof}"
    if not fold.first_test_decision_ns:
        raise SplitError("the split is a plan: its rows were never purged", where=where, remedy="build_manifest")
    parts = {"train": train, "validation": validation}
    purged = {p["event_id"] for p in fold.purged}
    for name, rows in parts.items():
        require_times(rows, f"the {name} rows of the {where}")
        for wrong, why in (
            (~pl.col("date").is_in(list(getattr(fold, name))), f"is not of a {name} session"),
            (pl.col("event_id").is_in(list(purged)), "was purged"),
        ):
            if (odd := rows.filter(wrong)).height:
                raise SplitError(f"{name} row {odd['event_id'][0]} of {odd['date'][0]} {why}", where=where)
    if (late := _late_rows(parts, fold.first_test_decision_ns)).height:
        event_id, part, reason = late.row(0)
        raise SplitError(f"{part} row {event_id}: {reason}", where=where, remedy="leave out the purged rows")


def check_decided(rows: pl.DataFrame, first_ns: int, what: str) -> None:
    """Raise SplitError, naming the row, when a row (TIMES) was decided before first_ns, the first test decision of what is asked."""
    _require_values(rows, ("event_id", "date", "decision_ns"), f"the rows that {what} is asked about")
    early = rows.filter(pl.col("decision_ns") < first_ns).sort("decision_ns")
    if early.height:
        raise SplitError(
            f"row {early['event_id'][0]} of {early['date'][0]} was decided at {early['decision_ns'][0]} ns, before {what} existed",
            expected=f"decisions from {first_ns} ns on",
            remedy="take the model of an earlier as-of session",
        )


def require_times(rows: pl.DataFrame, where: str) -> None:
    """Raise SplitError when a column of TIMES is absent or null, an event repeats, or a label is complete before its decision."""
    _require_values(rows, TIMES, where)
    if (twice := rows["event_id"].filter(rows["event_id"].is_duplicated())).len():
        raise SplitError(f"row {twice[0]} is there twice", where=where)
    odd = rows.filter(pl.col("label_known_ns") < pl.col("decision_ns"))
    if odd.height:
        raise SplitError(f"the label of row {odd['event_id'][0]} is complete before its decision", where=where)


def _require_values(rows: pl.DataFrame, columns: Sequence[str], where: str) -> None:
    if missing := [c for c in columns if c not in rows.columns]:
        raise SplitError(f"no column {', '.join(missing)}", where=where, expected=", ".join(columns))
    for c in columns:
        if rows[c].null_count():
            raise SplitError(f"{c} of row {rows.filter(pl.col(c).is_null())['event_id'][0]} is null", where=where)


def _late_rows(parts: Mapping[str, pl.DataFrame], first_test_ns: int) -> pl.DataFrame:
    """event_id, part, reason of the rows whose label is complete at or after the first decision of a later part."""
    first_ns: dict[str, Any] = {"validation": parts["validation"]["decision_ns"].min(), "test": first_test_ns}
    out = []
    for name, later in (("train", ("validation", "test")), ("validation", ("test",))):
        reason = pl.coalesce(
            pl.when(pl.col("label_known_ns") >= first_ns[part]).then(
                pl.lit(f"label complete at or after the first {part} decision")
            )
            for part in later
            if first_ns[part] is not None
        )
        rows = parts[name].select("event_id", pl.lit(name).alias("part"), reason.alias("reason"))
        out.append(rows.drop_nulls("reason").sort("event_id"))
    return pl.concat(out)
