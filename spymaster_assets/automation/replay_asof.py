"""Replays of what is made as of a session: its split and models, its report, each prediction of it, and the walk-forward report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import polars as pl

from spymaster_assets.assets.signals import warmup_sessions
from spymaster_assets.automation.replay import (
    LATER_SESSIONS,
    Later,
    Replay,
    Results,
    compared_session,
    judge_replay,
    known_until_ns,
    refitted,
    remake,
    replay_later,
    stored_models,
    why_unfit,
    write_input,
)
from spymaster_assets.automation.shadow import (
    RebuildFailed,
    files_near,
    lend,
    rebuild,
    shadow_of,
)
from spymaster_assets.contract import load_contract
from spymaster_assets.datasets.splits import read_split
from spymaster_assets.errors import ArtifactError
from spymaster_assets.evaluation.calibration import judge
from spymaster_assets.partitions import (
    FITTED_ASSETS,
    MODEL_ASSETS,
    REPORT_ASSET,
    SESSION_ASSETS,
    WALK_FORWARD_ASSET,
    all_sessions,
    calendar_of,
)
from spymaster_assets.proof.compare import Difference, differences
from spymaster_assets.proof.cutting import Future, write_future
from spymaster_assets.proof.members import file_differences, fitted_differences
from spymaster_assets.proof.reports import PREDICTIONS, page_entries, page_sections, prediction_differences
from spymaster_assets.settings import Settings
from spymaster_assets.signals.build import read_signals
from spymaster_assets.store import REPORT_KEY, Artifact, ArtifactStore, dump_json

REFUSING = MODEL_ASSETS[1:]
"""What reads signals or sequences by the hashes of its split."""


def replay_models(settings: Settings, asof: str, later: Later) -> Replay:
    """Refit an as-of session's split and models where that session and later ones do not exist, or hold another market.

    Every file of them is compared, byte for byte but for provenance. Raises like `replay_session`.
    """
    store = ArtifactStore(settings.root)
    unfit = {a: why for a in stored_models(store, asof) if (why := why_unfit(settings, a, asof))}
    made = [a for a in stored_models(store, asof) if a not in unfit]
    if not made:
        return Replay(asof, f"later sessions {later}", 0, {}, untried=tuple(unfit.values()), about=MODEL_ASSETS)

    def refit(shadow: Settings) -> Results:
        return refitted(store, shadow, made, asof)

    replay = replay_later(settings, asof, asof, later, ("signals", "sequence_dataset", "levels"), refit, MODEL_ASSETS)
    return replace(replay, untried=(*unfit.values(), *_unmade(store, asof))) if replay.compared else replay


def replay_report(settings: Settings, asof: str, later: Later) -> Replay:
    """Make an as-of session's calibration report again where the sessions after its last test session do not exist, or hold another market.

    Every file of it is compared, byte for byte. Raises like `replay_session`.
    """
    store = ArtifactStore(settings.root)
    split = read_split(store, asof)[0]

    def again(shadow: Settings) -> Results:
        for asset in MODEL_ASSETS:
            lend(store, shadow.root, asset, [asof])
        return refitted(store, shadow, [REPORT_ASSET], asof)

    first = calendar_of(settings.symbol).next(split.test[-1])
    lent = ("signals", "sequence_dataset", "levels")
    return replay_later(settings, asof, first, later, lent, again, (REPORT_ASSET,))


def replay_predictions(settings: Settings, asof: str, at_ns: int, future: Future) -> Replay:
    """Make an as-of session's calibration report again where the test session in which at_ns lies ends there, or is another from there on.

    Test sessions after it do not exist when it is cut; else up to LATER_SESSIONS of them hold another market and the others do not
    exist. What was known at at_ns is compared: each prediction from its decision on, its outcome once the label is complete.
    Raises like `replay_session`.
    """
    store, calendar, contract = ArtifactStore(settings.root), calendar_of(settings.symbol), load_contract()
    split, split_artifact = read_split(store, asof)
    at = max(n for n, k in enumerate(split.test) if calendar.session(k).open_ns <= at_ns)
    remade = split.test[at : at + 1 + (0 if future == "cut" else LATER_SESSIONS)]
    shown = replace(split, test=split.test[: at + len(remade)])
    key, told_as = remade[0], f"test session {remade[0]} {future}"
    with shadow_of(settings) as shadow:
        replayed = ArtifactStore(shadow.root)
        for asset in ("signals", "sequence_dataset"):
            lend(store, shadow.root, asset, [*split.train, *split.validation, *split.test[:at]])
        for asset in FITTED_ASSETS:
            lend(store, shadow.root, asset, [asof])
        files = {"split.json": dump_json(shown.to_json())}
        of_split = replayed.publish(
            "split_manifest", asof, files, inputs=split_artifact.inputs, settings=split_artifact.settings
        )
        canaries = store.load("canaries", asof)
        inputs = {**canaries.inputs, "split_manifest": of_split.sha256}
        replayed.publish("canaries", asof, canaries.contents(), inputs=inputs, settings=canaries.settings)
        write_input(settings, shadow, [calendar.session(k) for k in remade], at_ns, future)
        lend(store, shadow.root, "ohlcv_bars", warmup_sessions(settings, key))
        results: Results = {REPORT_ASSET: ([], 0)}
        for k in remade:
            results |= remake(shadow, SESSION_ASSETS, k)
        known_ns = known_until_ns(replayed, key, at_ns)
        results |= compared_session(settings, replayed, key, known_ns)
        results |= remake(shadow, [REPORT_ASSET], asof)
        if replayed.exists(REPORT_ASSET, asof):
            one, other = store.load(REPORT_ASSET, asof), replayed.load(REPORT_ASSET, asof)
            rows = [
                pl.concat([read_signals(where, k)[0].frame for k in tests])
                for where, tests in ((store, split.test), (replayed, shown.test))
            ]
            results[REPORT_ASSET] = prediction_differences(one, other, rows[0], rows[1], known_ns, contract)
    replay = judge_replay(settings, asof, told_as, at_ns, results)
    # the session is compared to say where a difference begins; its own replays judge it
    return replace(replay, compared={REPORT_ASSET: results[REPORT_ASSET][1]}, about=(REPORT_ASSET,))


def replay_walk_forward(settings: Settings, upto: str, later: Later) -> Replay:
    """Make the walk-forward report of the folds up to an as-of session again, without later folds, and where sessions after the last test
    session do not exist or hold another market.

    With all its folds it must be the stored one: report.json, and the page but for OF_ALL_SESSIONS. With the first of them it must be what
    their stored predictions give, and the page's rows of each fold as they are stored. Raises like `replay_session`.
    """
    store = ArtifactStore(settings.root)
    stored = store.load(WALK_FORWARD_ASSET, REPORT_KEY)
    summary = stored.json("report.json")
    everything = judged_asofs(stored)
    judged = [k for k in everything if k <= upto]
    folds = [k for k in summary["folds"] if k <= upto]
    page = stored.read("report.html")

    def again(shadow: Settings) -> Results:
        for asset in ("split_manifest", "canaries", REPORT_ASSET):
            lend(store, shadow.root, asset, judged)
        if failed := remake(shadow, [WALK_FORWARD_ASSET], REPORT_KEY):
            return failed
        made = ArtifactStore(shadow.root).load(WALK_FORWARD_ASSET, REPORT_KEY)
        if judged == everything:
            report, parts = stored.read("report.json"), page_sections
        else:
            report, parts = _of_folds(store, summary, folds, judged), partial(page_entries, folds=folds)
        files = [
            {"report.json": data, **{f"report.html: {part}": body for part, body in parts(html).items()}}
            for data, html in ((report, page), (made.read("report.json"), made.read("report.html")))
        ]
        return {WALK_FORWARD_ASSET: file_differences(WALK_FORWARD_ASSET, REPORT_KEY, files[0], files[1])}

    first = calendar_of(settings.symbol).next(read_split(store, judged[-1])[0].test[-1])
    lent = ("market_files", "ohlcv_bars", "levels", "signals")
    replay = replay_later(settings, REPORT_KEY, first, later, lent, again, (WALK_FORWARD_ASSET,))
    return replay if judged == everything else replace(replay, future=f"{replay.future}, folds up to {upto}")


def _of_folds(store: ArtifactStore, summary: Mapping[str, Any], folds: Sequence[str], judged: Sequence[str]) -> bytes:
    """The report.json that the stored predictions of some of the folds give."""
    reports = [store.load(REPORT_ASSET, k) for k in folds]
    return dump_json(
        {
            **summary,
            "folds": folds,
            "canaries": [row for row in summary["canaries"] if row["asof"] in judged],
            "trials": sum(r.json("calibration.json")["trials"] for r in reports),
            "heads": judge(pl.concat([r.frame(PREDICTIONS) for r in reports])),
        }
    )


def judged_asofs(walk_forward: Artifact) -> list[str]:
    """As-of sessions that a walk-forward report tells of, oldest first, also those whose scores are withheld."""
    return [row["asof"] for row in walk_forward.json("report.json")["canaries"]]


def replay_redelivery(settings: Settings, asof: str) -> Replay:
    """Deliver the last training session of an as-of session anew with other prices from its regular open on, and rebuild it.

    The session before it must come out as it was stored, what reads it must be stale by its recorded hashes, and models that read it
    must refuse to be made from the old split and the new rows. Raises like `replay_session`.
    """
    store, calendar = ArtifactStore(settings.root), calendar_of(settings.symbol)
    split = read_split(store, asof)[0]
    again, before = split.train[-1], calendar.previous(split.train[-1])
    session, told_as = calendar.session(again), f"{again} delivered again"
    readers = [("levels", k) for k in all_sessions(settings) if k != again and again in warmup_sessions(settings, k)]
    made = stored_models(store, asof)
    readers = [r for r in readers if store.exists(*r)] + [(a, asof) for a in made]
    results: Results = {a: ([], 0) for a in (*SESSION_ASSETS, *made)}
    with shadow_of(settings) as shadow:
        write_future(
            files_near(settings, session), shadow.dbn_dir, session.regular_open_ns, "altered", until_ns=session.close_ns
        )
        rebuilt = [k for k in (before, again) if store.exists("sequence_dataset", k)]
        lend(store, shadow.root, "split_manifest", [asof])
        for asset in ("signals", "sequence_dataset"):
            lend(store, shadow.root, asset, [k for k in (*split.train, *split.validation) if k not in rebuilt])
        lend(
            store,
            shadow.root,
            "ohlcv_bars",
            sorted({w for k in rebuilt for w in warmup_sessions(settings, k)} - {*rebuilt}),
        )
        failed: Results = {}
        for key in rebuilt:
            failed |= remake(shadow, SESSION_ASSETS, key)
        if failed:
            return judge_replay(settings, asof, told_as, session.regular_open_ns, {"split_manifest": ([], 0), **failed})
        mixed = ArtifactStore(shadow.root)
        for asset in SESSION_ASSETS if before in rebuilt else ():
            one, other = store.load(asset, before), mixed.load(asset, before)
            if asset == "market_files":  # a file may hold several sessions, so its hash and counts may be others
                results[asset] = differences(one, other, session.regular_open_ns, load_contract())
            else:
                results[asset] = fitted_differences(one, other)
        changed = {a: mixed.load(a, again).sha256 for a in SESSION_ASSETS}
        for asset, key in readers:
            results[asset][0].extend(_unnoticed(store.load(asset, key), again, changed))
        for asset in (a for a in REFUSING if a in made):
            if not _refuses(shadow, asset, asof):
                told = ("refused", "made of the old split and the new rows")
                results[asset][0].append(Difference(asset, asof, "inputs", f"signals[{again}]", *told))
    # what is found in other partitions counts for the split, which stands above all models of the as-of session
    elsewhere = sum(results[a][1] for a in SESSION_ASSETS)
    replay = judge_replay(settings, asof, told_as, session.regular_open_ns, results)
    untried = () if before in rebuilt else (f"{told_as}: {before}, the session before it, is not stored",)
    compared = {"split_manifest": elsewhere, **{a: results[a][1] for a in made[1:]}}
    return replace(replay, compared=compared, untried=(*untried, *_unmade(store, asof)), about=MODEL_ASSETS)


def _unmade(store: ArtifactStore, asof: str) -> tuple[str, ...]:
    return tuple(f"{a} [{asof}]: not stored" for a in MODEL_ASSETS if not store.exists(a, asof))


def _unnoticed(reader: Artifact, again: str, changed: Mapping[str, str]) -> list[Difference]:
    """A difference when a reader recorded no input of the session that is delivered again, or none that has changed."""
    recorded = {a: reader.inputs[name] for a in changed if (name := f"{a}[{again}]") in reader.inputs}
    if any(changed[a] != sha256 for a, sha256 in recorded.items()):
        return []
    return [Difference(reader.asset, reader.key, "inputs", again, str(sorted(recorded)), "changed, and not noticed")]


def _refuses(shadow: Settings, asset: str, asof: str) -> bool:
    try:
        rebuild(shadow, [asset], asof)
    except RebuildFailed as failure:
        if re.search(rf"\b{ArtifactError.__name__}\b.*changed after the split", failure.description or "", re.DOTALL):
            return True
        raise
    return False
