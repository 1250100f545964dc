"""Walk-forward splits: which sessions train, validate and test a model as of a session, and which rows are purged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import polars as pl

from spymaster_assets.errors import SplitError, refusing
from spymaster_assets.settings import SplitSettings


@dataclass(frozen=True)
class SplitManifest:
    """One fold. Sessions are sorted keys; `purged` lists {event_id, part, reason}; `inputs` maps a session to its signals' hash.

    An as-of model may read train and validation only; test is [asof, next retraining), known from the calendar alone.
    """

    asof: str
    window: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    embargoed: tuple[str, ...]
    purged: tuple[dict[str, str], ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> SplitManifest:
        """Inverse of `to_json`; raise SplitError when it is none."""
        lists = ("train", "validation", "test", "embargoed", "purged")
        with refusing(
            SplitError, "not a split manifest", where="split.json", remedy="materialize split_manifest again"
        ):
            fields: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in raw.items()}
            if not all(isinstance(s, str) for name in lists[:4] for s in fields[name]):
                raise ValueError("sessions are texts")
            if not all(isinstance(p["event_id"], str) for p in fields["purged"]):
                raise ValueError("purged rows are named by event_id")
            found = cls(**fields)
        check_manifest(found)
        return found


def plan_split(sessions: Sequence[str], asof: str, settings: SplitSettings) -> SplitManifest:
    """Sessions of the fold as of `asof`: train, embargo, validation, embargo, then test from `asof` on.

    sessions: all sessions from the first partition, sorted. Raises SplitError when the history is too short: a window is never clipped.
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
    manifest = SplitManifest(
        asof=asof,
        window=settings.window,
        train=tuple(sessions[train_start:train_end]),
        validation=tuple(sessions[validation_start:validation_end]),
        test=tuple(sessions[at : at + settings.retrain_every_sessions]),
        embargoed=(*sessions[train_end:validation_start], *sessions[validation_end:at]),
    )
    check_manifest(manifest)
    return manifest


def asof_sessions(sessions: Sequence[str], settings: SplitSettings) -> list[str]:
    """The retraining schedule: the first session with a whole history before it, then every k-th."""
    return list(sessions[settings.history_sessions :: settings.retrain_every_sessions])


def build_manifest(
    plan: SplitManifest, rows: pl.DataFrame, inputs: Mapping[str, str], first_test_decision_ns: int
) -> SplitManifest:
    """Purge the plan's rows and record inputs.

    rows: event_id, date, decision_ns, label_known_ns of the train and validation sessions. A training row whose label is complete at or
    after the first validation decision, and a row of either part whose label is complete at or after the first test decision, is purged.
    Raises SplitError when a part is empty or the manifest is out of order.
    """
    validation = rows.filter(pl.col("date").is_in(list(plan.validation)))
    train = rows.filter(pl.col("date").is_in(list(plan.train)))
    for name, part in (("train", train), ("validation", validation)):
        if part.height == 0:
            raise SplitError(
                f"the {name} part of {plan.asof} has no rows",
                where=f"{getattr(plan, name)[0]}..{getattr(plan, name)[-1]}",
            )
    first_validation_ns = int(validation["decision_ns"].min())  # type: ignore[arg-type]
    purged: list[dict[str, str]] = []
    for name, part, limits in (
        ("train", train, (("validation", first_validation_ns), ("test", first_test_decision_ns))),
        ("validation", validation, (("test", first_test_decision_ns),)),
    ):
        gone: set[str] = set()
        for later, limit_ns in limits:
            for event_id in part.filter(pl.col("label_known_ns") >= limit_ns)["event_id"].sort():
                if event_id not in gone:
                    gone.add(event_id)
                    purged.append(
                        {
                            "event_id": event_id,
                            "part": name,
                            "reason": f"label complete at or after the first {later} decision",
                        }
                    )
        if len(gone) == part.height:
            raise SplitError(f"purging leaves no {name} rows as of {plan.asof}", remedy="use a longer window")
    counts = {"train": train.height, "validation": validation.height}
    manifest = replace(plan, purged=tuple(purged), inputs=dict(sorted(inputs.items())), rows=counts)
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: SplitManifest) -> None:
    """Raise SplitError when parts are empty, unsorted, overlapping or out of order, or when an input hash is missing."""
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
    if manifest.inputs and set(manifest.inputs) != {*manifest.train, *manifest.validation}:
        raise SplitError("the input hashes are not those of the train and validation sessions", where=where)
