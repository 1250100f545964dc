"""`spymaster prove`: rebuild stored artifacts through the graph itself with another future, and compare what was known before."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice, takewhile
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import track

from spymaster_assets.assets.datasets import read_split
from spymaster_assets.assets.signals import read_signals, warmup_sessions
from spymaster_assets.automation.shadow import (
    REACH_NS,
    RebuildFailed,
    files_near,
    lend,
    nearest_upstream,
    rebuild,
    shadow_of,
)
from spymaster_assets.contract import STAGES, decision_column, load_contract
from spymaster_assets.errors import ArtifactError, ConfigError, MissingInputError
from spymaster_assets.evaluation.calibration import judge
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.dbn import BAR_SECONDS
from spymaster_assets.market.files import SessionFiles, scan_flat
from spymaster_assets.market.options import is_option_trades_csv
from spymaster_assets.partitions import (
    ASSETS,
    FITTED_ASSETS,
    MODEL_ASSETS,
    REPORT_ASSET,
    SESSION_ASSETS,
    WALK_FORWARD_ASSET,
    all_sessions,
    calendar_of,
)
from spymaster_assets.proof.compare import Difference, differences
from spymaster_assets.proof.cuts import cuts_of, cuttable_from_ns, known_moments
from spymaster_assets.proof.cutting import FUTURES, NEVER_OF_BARS, Future, write_flat_future, write_future
from spymaster_assets.proof.lineage import input_of
from spymaster_assets.proof.members import file_differences, fitted_differences
from spymaster_assets.proof.reports import PREDICTIONS, page_entries, page_sections, prediction_differences
from spymaster_assets.settings import DELAYS_S, NS, Settings
from spymaster_assets.store import REPORT_KEY, Artifact, ArtifactStore, dump_json

Later = Literal["absent", "altered"]
"""What becomes of the sessions that came after an asset was made, the as-of session of models among them."""
Results = dict[str, tuple[list[Difference], int]]
"""Per asset what differs and how many values were compared."""
UNALTERED = "nothing altered"
"""What a replay is told as that only says whether the stored artifacts can be made again as they are."""
LATER_SESSIONS = 2
"""How many sessions that came after are rebuilt with another content."""
CUTS_PER_PREDICTION_CUT = 8
"""A report's predictions are replayed at so many times fewer than a session, since each rebuilds a session and the report."""
REFUSING = MODEL_ASSETS[1:]
"""What reads signals or sequences by the hashes of its split."""


@dataclass(frozen=True)
class Replay:
    """One rebuild: what was tried, how many values (bytes of fitted objects) of each asset were compared and what differed, upstream first.

    nearest: for each differing asset the next one above it in the graph that differs too, None where the difference begins. untried:
    what could not be tried and why; nothing is compared by a replay that could not be tried at all.
    """

    key: str
    future: str
    at_ns: int
    compared: Mapping[str, int]
    differences: tuple[Difference, ...] = ()
    nearest: Mapping[str, str | None] = field(default_factory=dict)
    untried: tuple[str, ...] = ()
    about: tuple[str, ...] = ()

    @property
    def at(self) -> str:
        """The time of the cut in UTC."""
        when = datetime.fromtimestamp(self.at_ns // NS, UTC)
        return f"{when:%Y-%m-%d %H:%M:%S}.{self.at_ns % NS:09d} UTC"

    def told(self, difference: Difference) -> str:
        """A difference with the cut and the nearest upstream asset that differs."""
        above = self.nearest.get(difference.asset)
        where = f"{above} differs already" if above else "begins here"
        if self.future == UNALTERED:
            made = f"dagster asset materialize --select '{difference.asset}+' --partition {difference.key}"
            where += f"; no look-ahead but stale (other input, settings or code since) or not reproducible: {made}"
        return f"{self.future} at {self.at}: {difference}; {where}"


def replay_session(settings: Settings, key: str, at_ns: int, future: Future) -> Replay:
    """Rebuild a session's assets in a shadow store with input that ends, is another or late from at_ns on.

    An asset that cannot be made of it is a difference; what stands below it is not judged. Raises ArtifactError or MissingInputError
    when a stored artifact is damaged or missing.
    """
    store = ArtifactStore(settings.root)
    session = calendar_of(settings.symbol).session(key)
    with shadow_of(settings) as shadow:
        _write(settings, shadow, [session], at_ns, future)
        lend(store, shadow.root, "ohlcv_bars", warmup_sessions(settings, key))
        results = _rebuilt(shadow, SESSION_ASSETS, key)
        results |= _compared_session(store, ArtifactStore(shadow.root), key, at_ns)
    return _judged(settings, key, future, at_ns, results)


def replay_unaltered(settings: Settings, key: str) -> Replay:
    """Rebuild a session's assets from its files as they are; all rows are compared. Raises like `replay_session`."""
    store, session = ArtifactStore(settings.root), calendar_of(settings.symbol).session(key)
    never_ns = np.iinfo(np.int64).max
    with shadow_of(settings) as shadow:
        _write(settings, shadow, [session], never_ns, "altered")
        lend(store, shadow.root, "ohlcv_bars", warmup_sessions(settings, key))
        results = _rebuilt(shadow, SESSION_ASSETS, key)
        replayed, contract = ArtifactStore(shadow.root), load_contract()
        for asset in (a for a in SESSION_ASSETS if replayed.exists(a, key)):
            results[asset] = differences(store.load(asset, key), replayed.load(asset, key), never_ns, contract)
    return _judged(settings, key, UNALTERED, session.close_ns, results)


def _write(settings: Settings, shadow: Settings, sessions: Sequence[Session], at_ns: int, future: Future) -> None:
    """Files that the sessions may be made of, as `future` says from at_ns on."""
    within_ns = (sessions[0].open_ns - REACH_NS, sessions[-1].close_ns)
    near = files_near(settings, sessions[0], sessions[-1].close_ns)
    write_future(near, shadow.dbn_dir, at_ns, future, within_ns=within_ns)
    flat = [
        f.path
        for f in scan_flat(settings.dbn_dir)
        if any(f.is_of(s.key) for s in sessions) and is_option_trades_csv(f.path)
    ]
    write_flat_future(flat, settings.dbn_dir, shadow.dbn_dir, at_ns, future)


def _compared_session(store: ArtifactStore, replayed: ArtifactStore, key: str, at_ns: int) -> Results:
    made, contract = [a for a in SESSION_ASSETS if replayed.exists(a, key)], load_contract()
    known_ns = _known_ns(replayed, key, at_ns) if made else at_ns
    return {a: differences(store.load(a, key), replayed.load(a, key), known_ns, contract) for a in made}


def _known_ns(replayed: ArtifactStore, key: str, at_ns: int) -> int:
    """A tape that is cut is only known to be complete up to its last record."""
    return min(at_ns, _registered(replayed, key).observed_until_ns)


def replay_models(settings: Settings, asof: str, later: Later) -> Replay:
    """Refit an as-of session's split and models where that session and later ones do not exist, or hold another market.

    Every file of them is compared, byte for byte but for provenance. Raises like `replay_session`.
    """
    store = ArtifactStore(settings.root)
    unfit = tuple(why for a in stored_models(store, asof) if (why := _unfit(store, a, asof)))
    made = [a for a in stored_models(store, asof) if not _unfit(store, a, asof)]
    if not made:
        return Replay(asof, f"later sessions {later}", 0, {}, untried=unfit, about=MODEL_ASSETS)

    def refit(shadow: Settings) -> Results:
        return _refitted(store, shadow, made, asof)

    replay = _replay_later(settings, asof, asof, later, ("signals", "sequence_dataset", "levels"), refit, MODEL_ASSETS)
    return replace(replay, untried=(*unfit, *_unmade(store, asof))) if replay.compared else replay


def replay_report(settings: Settings, asof: str, later: Later) -> Replay:
    """Make an as-of session's calibration report again where the sessions after its last test session do not exist, or hold another market.

    Every file of it is compared, byte for byte. Raises like `replay_session`.
    """
    store = ArtifactStore(settings.root)
    split = read_split(store, asof)[0]

    def again(shadow: Settings) -> Results:
        for asset in MODEL_ASSETS:
            lend(store, shadow.root, asset, [asof])
        return _refitted(store, shadow, [REPORT_ASSET], asof)

    first = calendar_of(settings.symbol).next(split.test[-1])
    lent = ("signals", "sequence_dataset", "levels")
    return _replay_later(settings, asof, first, later, lent, again, (REPORT_ASSET,))


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
        of_split = replayed.publish("split_manifest", asof, files, inputs=split_artifact.inputs)
        canaries = store.load("canaries", asof)
        inputs = {**canaries.inputs, "split_manifest": of_split.sha256}
        replayed.publish("canaries", asof, {f: canaries.read(f) for f in canaries.files}, inputs=inputs)
        _write(settings, shadow, [calendar.session(k) for k in remade], at_ns, future)
        lend(store, shadow.root, "ohlcv_bars", warmup_sessions(settings, key))
        results: Results = {REPORT_ASSET: ([], 0)}
        for k in remade:
            results |= _rebuilt(shadow, SESSION_ASSETS, k)
        results |= _compared_session(store, replayed, key, at_ns)
        results |= _rebuilt(shadow, [REPORT_ASSET], asof)
        if replayed.exists(REPORT_ASSET, asof):
            one, other = store.load(REPORT_ASSET, asof), replayed.load(REPORT_ASSET, asof)
            rows = [
                pl.concat([read_signals(where, k)[0].frame for k in tests])
                for where, tests in ((store, split.test), (replayed, shown.test))
            ]
            known_ns = _known_ns(replayed, key, at_ns)
            results[REPORT_ASSET] = prediction_differences(one, other, rows[0], rows[1], known_ns, contract)
    replay = _judged(settings, asof, told_as, at_ns, results)
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
        if failed := _rebuilt(shadow, [WALK_FORWARD_ASSET], REPORT_KEY):
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
    replay = _replay_later(settings, REPORT_KEY, first, later, lent, again, (WALK_FORWARD_ASSET,))
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


def _replay_later(
    settings: Settings,
    key: str,
    first: str,
    later: Later,
    lent: Sequence[str],
    again: Callable[[Settings], Results],
    about: tuple[str, ...],
) -> Replay:
    """`again` in a shadow store of lent assets of the sessions before `first`, and of those from it on, absent or altered."""
    store, calendar, sessions = ArtifactStore(settings.root), calendar_of(settings.symbol), all_sessions(settings)
    at_ns, told_as = calendar.session(first).open_ns, f"later sessions {later}"
    stored = takewhile(lambda k: store.exists("sequence_dataset", k), (k for k in sessions if k >= first))
    following = list(islice(stored, LATER_SESSIONS)) if later == "altered" else []
    if later == "altered" and not following:
        untried = (f"{told_as}: no session from {first} on is stored",)
        return Replay(key, told_as, at_ns, {}, untried=untried, about=about)
    results: Results = {}
    with shadow_of(settings) as shadow:
        for asset in lent:
            lend(store, shadow.root, asset, [k for k in sessions if k < first and store.exists(asset, k)])
        if following:
            _write(settings, shadow, [calendar.session(k) for k in following], at_ns, "altered")
            if "ohlcv_bars" not in lent:
                lend(store, shadow.root, "ohlcv_bars", warmup_sessions(settings, first))
        for k in following:
            results |= _rebuilt(shadow, SESSION_ASSETS, k)
        results |= again(shadow)
    return replace(_judged(settings, key, told_as, at_ns, results), about=about)


def _refitted(store: ArtifactStore, shadow: Settings, assets: Sequence[str], asof: str) -> Results:
    """Rebuild an as-of session's assets and compare every file of them."""
    results = _rebuilt(shadow, assets, asof)
    replayed = ArtifactStore(shadow.root)
    for asset in assets:
        if replayed.exists(asset, asof):
            results[asset] = fitted_differences(store.load(asset, asof), replayed.load(asset, asof))
    return results


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
            failed |= _rebuilt(shadow, SESSION_ASSETS, key)
        if failed:
            return _judged(settings, asof, told_as, session.regular_open_ns, {"split_manifest": ([], 0), **failed})
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
    replay = _judged(settings, asof, told_as, session.regular_open_ns, results)
    untried = () if before in rebuilt else (f"{told_as}: {before}, the session before it, is not stored",)
    compared = {"split_manifest": elsewhere, **{a: results[a][1] for a in made[1:]}}
    return replace(replay, compared=compared, untried=(*untried, *_unmade(store, asof)), about=MODEL_ASSETS)


def provable_asofs(store: ArtifactStore) -> list[str]:
    """As-of sessions whose split and at least one model are stored, sorted."""
    return [k for k in store.keys(MODEL_ASSETS[0]) if len(stored_models(store, k)) > 1]


def stored_models(store: ArtifactStore, asof: str) -> list[str]:
    """The split and models that are stored as of a session, upstream first."""
    return [a for a in MODEL_ASSETS if store.exists(a, asof)]


def telling_asofs(store: ArtifactStore) -> list[str]:
    """As-of sessions that are replayed where none is named: the newest with models, with a report, and of the walk-forward report."""
    made = provable_asofs(store)
    chosen = {*made[-1:], *[k for k in made if store.exists(REPORT_ASSET, k)][-1:]}
    if store.exists(WALK_FORWARD_ASSET, REPORT_KEY):
        chosen |= {*judged_asofs(store.load(WALK_FORWARD_ASSET, REPORT_KEY))[-1:]} & {*made}
    return sorted(chosen, reverse=True)


def _unmade(store: ArtifactStore, asof: str) -> tuple[str, ...]:
    return tuple(f"{a} [{asof}]: not stored" for a in MODEL_ASSETS if not store.exists(a, asof))


def prove(
    settings: Settings,
    sessions: Sequence[str],
    asofs: Sequence[str],
    cuts: int,
    seed: int = 0,
    console: Console | None = None,
    wanted: Collection[str] = ASSETS,
) -> list[Replay]:
    """Replay each session `cuts` times, with input that is cut off, another or late in turn; refit each as-of session with later sessions
    absent and altered, with a past one delivered again, and with others held out of its training; make its report again, and the
    walk-forward report with its newest fold.

    wanted: assets that replays are asked about. Raises ConfigError when nothing is named, MissingInputError when a named session has no
    stored signals or an as-of session no model.
    """
    from spymaster_assets.automation.held_out import held_out_tries  # late: it builds on what is here

    warnings.filterwarnings("ignore")
    store = ArtifactStore(settings.root)
    if not sessions and not asofs:
        raise ConfigError("nothing to prove", expected="--session or --asof, or artifacts in the store")
    if missing := [k for k in sessions if not store.exists("signals", k)]:
        raise MissingInputError(
            f"{len(missing)} sessions have no stored signals: {', '.join(missing[:5])}",
            where=str(settings.root),
            remedy="dagster asset materialize --select '+sequence_dataset' --partition <session>",
        )
    if missing := sorted({*asofs}.difference(provable_asofs(store))):
        raise MissingInputError(
            f"{len(missing)} as-of sessions have no stored split and model: {', '.join(missing[:5])}",
            where=str(settings.root),
            expected=", ".join(MODEL_ASSETS),
            remedy=f"dagster asset materialize --select '*canaries' --partition {missing[0]}",
        )
    tries: list[Callable[[], Replay]] = []
    for key in sessions:
        tries += _session_tries(settings, store, key, cuts, seed)
    for asof in asofs:
        if not {*MODEL_ASSETS}.isdisjoint(wanted):
            tries += [
                partial(replay_redelivery, settings, asof),
                partial(replay_models, settings, asof, "absent"),
                partial(replay_models, settings, asof, "altered"),
                *held_out_tries(settings, asof),
            ]
        if REPORT_ASSET in wanted:
            tries += _report_tries(settings, store, asof, cuts, seed)
        if WALK_FORWARD_ASSET in wanted:
            tries += _walk_forward_tries(settings, store, asof, seed)
    controls: dict[str, Replay] = {}
    return [
        _controlled(settings, t(), controls) for t in track(tries, "replays", console=console or Console(quiet=True))
    ]


def _controlled(settings: Settings, replay: Replay, controls: dict[str, Replay]) -> Replay:
    """The replay; where a session in which it differs cannot be made again from unaltered input either, that difference instead."""
    for key in sorted({d.key for d in replay.differences if d.asset in SESSION_ASSETS}):
        if key not in controls:
            controls[key] = replay_unaltered(settings, key)
        if (control := controls[key]).differences:
            compared, about, untried = replay.compared, replay.about, replay.untried
            return replace(control, key=replay.key, compared=compared, about=about, untried=untried)
    return replay


def _session_tries(
    settings: Settings, store: ArtifactStore, key: str, cuts: int, seed: int
) -> list[Callable[[], Replay]]:
    session = calendar_of(settings.symbol).session(key)
    # without a feed that has receive times nothing of a session can be late
    received = any(e.header.schema not in BAR_SECONDS for e in files_near(settings, session))
    futures = FUTURES if received else [f for f in FUTURES if f not in NEVER_OF_BARS]
    moments = known_moments(read_signals(store, key)[0].frame, load_contract())
    from_ns = cuttable_from_ns(_registered(store, key), session)
    chosen = cuts_of(session, settings, cuts, seed, from_ns, moments)
    return [
        partial(replay_session, settings, key, at_ns, futures[(n + seed) % len(futures)])
        for n, at_ns in enumerate(chosen)
    ]


def _report_tries(
    settings: Settings, store: ArtifactStore, asof: str, cuts: int, seed: int
) -> list[Callable[[], Replay]]:
    """The report with later sessions absent and altered, and its test sessions cut and altered in turn from decisions on."""
    if why := _unfit(store, REPORT_ASSET, asof):
        return [lambda: Replay(asof, "later sessions absent", 0, {}, untried=(why,), about=(REPORT_ASSET,))]
    tests = pl.concat([read_signals(store, k)[0].frame for k in read_split(store, asof)[0].test])
    decisions = {decision_column(stage, delay) for stage in STAGES for delay in DELAYS_S}
    moments_ns = pl.concat([tests[c].drop_nulls() for c in sorted(decisions)]).unique().sort().to_numpy()
    rng = np.random.default_rng([seed, len(moments_ns)])
    count = min(max(2, cuts // CUTS_PER_PREDICTION_CUT), len(moments_ns))
    chosen: list[int] = rng.choice(moments_ns, count, replace=False).tolist()
    futures: tuple[Future, ...] = ("cut", "altered")
    return [
        partial(replay_report, settings, asof, "absent"),
        partial(replay_report, settings, asof, "altered"),
        *(partial(replay_predictions, settings, asof, at_ns, futures[n % 2]) for n, at_ns in enumerate(chosen)),
    ]


def _walk_forward_tries(settings: Settings, store: ArtifactStore, asof: str, seed: int) -> list[Callable[[], Replay]]:
    """The walk-forward report, if this is its newest fold: with all its folds, and with the first of them, another number each seed."""
    if not store.exists(WALK_FORWARD_ASSET, REPORT_KEY):
        return []
    stored = store.load(WALK_FORWARD_ASSET, REPORT_KEY)
    *earlier, newest = judged_asofs(stored)
    if asof != newest:
        return []
    if why := _unfit(store, WALK_FORWARD_ASSET, REPORT_KEY):
        return [lambda: Replay(REPORT_KEY, "later sessions absent", 0, {}, untried=(why,), about=(WALK_FORWARD_ASSET,))]
    earlier = [k for k in earlier if k >= stored.json("report.json")["folds"][0]]
    some = [earlier[-1 - seed % len(earlier)]] if earlier else []
    return [
        partial(replay_walk_forward, settings, upto, later) for upto in (newest, *some) for later in get_args(Later)
    ]


def _unfit(store: ArtifactStore, asset: str, key: str) -> str | None:
    """Why an artifact cannot be made again as it was: it is not stored, or an artifact that it was made from is another by now."""
    if not store.exists(asset, key):
        return f"{asset} [{key}]: not stored"
    made = store.load(asset, key)
    for name, sha256 in made.inputs.items():
        source = input_of(made, name)
        if source[0] in ASSETS and (not store.exists(*source) or store.load(*source).sha256 != sha256):
            return f"{asset} [{key}]: {name} has changed since it was made"
    return None


def _registered(store: ArtifactStore, key: str) -> SessionFiles:
    return SessionFiles.from_json(store.load("market_files", key).json("files.json"))


def _unnoticed(reader: Artifact, again: str, changed: Mapping[str, str]) -> list[Difference]:
    """A difference when a reader recorded no input of the session that is delivered again, or none that has changed."""
    recorded = {a: reader.inputs[name] for a in changed if (name := f"{a}[{again}]") in reader.inputs}
    if any(changed[a] != sha256 for a, sha256 in recorded.items()):
        return []
    return [Difference(reader.asset, reader.key, "inputs", again, str(sorted(recorded)), "changed, and not noticed")]


def _rebuilt(shadow: Settings, assets: Sequence[str], key: str) -> Results:
    """Rebuild assets; for those that fail a difference that says so."""
    try:
        rebuild(shadow, assets, None if key == REPORT_KEY else key)
    except RebuildFailed as failure:
        return {
            asset: ([Difference(asset, key, "all columns", "all rows", "made", f"could not be made: {words}")], 0)
            for asset, words in failure.words.items()
        }
    return {}


def _refuses(shadow: Settings, asset: str, asof: str) -> bool:
    try:
        rebuild(shadow, [asset], asof)
    except RebuildFailed as failure:
        if re.search(rf"\b{ArtifactError.__name__}\b.*changed after the split", failure.description or "", re.DOTALL):
            return True
        raise
    return False


def _judged(settings: Settings, key: str, future: str, at_ns: int, results: Results) -> Replay:
    results = {a: results[a] for a in sorted(results, key=ASSETS.index)}
    found = tuple(d for differs, _ in results.values() for d in differs)
    among = frozenset(d.asset for d in found)
    return Replay(
        key,
        future,
        at_ns,
        {asset: count for asset, (_, count) in results.items()},
        found,
        {asset: nearest_upstream(settings, asset, among) for asset in among},
    )
