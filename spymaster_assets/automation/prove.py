"""`spymaster prove`: rebuild stored artifacts through the graph itself with another future, and compare what was known before."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Literal

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
from spymaster_assets.contract import load_contract
from spymaster_assets.errors import ArtifactError, ConfigError, MissingInputError
from spymaster_assets.market.dbn import BAR_SECONDS
from spymaster_assets.market.files import SessionFiles, scan_flat
from spymaster_assets.market.options import is_option_trades_csv
from spymaster_assets.partitions import MODEL_ASSETS, SESSION_ASSETS, all_sessions, calendar_of
from spymaster_assets.proof.compare import Difference, differences
from spymaster_assets.proof.cuts import cuts_of, cuttable_from_ns, known_moments
from spymaster_assets.proof.cutting import FUTURES, NEVER_OF_BARS, Future, write_flat_future, write_future
from spymaster_assets.proof.members import fitted_differences
from spymaster_assets.settings import NS, Settings
from spymaster_assets.store import Artifact, ArtifactStore

Later = Literal["absent", "altered"]
"""What becomes of the as-of session and those after it while its models are refitted."""
Results = dict[str, tuple[list[Difference], int]]
"""Per asset what differs and how many values were compared."""
LATER_SESSIONS = 2
"""How many sessions from the as-of session on are rebuilt with another content."""
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

    @property
    def at(self) -> str:
        """The time of the cut in UTC."""
        when = datetime.fromtimestamp(self.at_ns // NS, UTC)
        return f"{when:%Y-%m-%d %H:%M:%S}.{self.at_ns % NS:09d} UTC"

    def told(self, difference: Difference) -> str:
        """A difference with the cut and the nearest upstream asset that differs."""
        above = self.nearest.get(difference.asset)
        where = f"{above} differs already" if above else "begins here"
        return f"{self.future} at {self.at}: {difference}; {where}"


def replay_session(settings: Settings, key: str, at_ns: int, future: Future) -> Replay:
    """Rebuild a session's assets in a shadow store with input that ends, is another or late from at_ns on.

    An asset that cannot be made of it is a difference; what stands below it is not judged. Raises ArtifactError or MissingInputError
    when a stored artifact is damaged or missing.
    """
    store, contract = ArtifactStore(settings.root), load_contract()
    session = calendar_of(settings.symbol).session(key)
    with shadow_of(settings) as shadow:
        near, within_ns = files_near(settings, session), (session.open_ns - REACH_NS, session.close_ns)
        write_future(near, shadow.dbn_dir, at_ns, future, within_ns=within_ns)
        flat = [f.path for f in scan_flat(settings.dbn_dir) if f.is_of(key) and is_option_trades_csv(f.path)]
        write_flat_future(flat, settings.dbn_dir, shadow.dbn_dir, at_ns, future)
        lend(store, shadow.root, "ohlcv_bars", warmup_sessions(settings, key))
        results = _rebuilt(shadow, SESSION_ASSETS, key)
        replayed = ArtifactStore(shadow.root)
        made = [a for a in SESSION_ASSETS if replayed.exists(a, key)]
        # a tape that is cut is only known to be complete up to its last record
        known_ns = min(at_ns, _registered(replayed, key).observed_until_ns) if made else at_ns
        results |= {a: differences(store.load(a, key), replayed.load(a, key), known_ns, contract) for a in made}
    return _judged(settings, key, future, at_ns, results)


def replay_models(settings: Settings, asof: str, later: Later) -> Replay:
    """Refit an as-of session's split and models where that session and later ones do not exist, or hold another market.

    Every file of them is compared, byte for byte but for provenance. Raises like `replay_session`.
    """
    store, calendar = ArtifactStore(settings.root), calendar_of(settings.symbol)
    sessions, made = all_sessions(settings), stored_models(store, asof)
    at_ns = calendar.session(asof).open_ns
    following = [k for k in sessions if k >= asof and store.exists("sequence_dataset", k)][:LATER_SESSIONS]
    if later == "altered" and not following:
        untried = (f"later sessions altered: no session from {asof} on is stored",)
        return Replay(asof, f"later sessions {later}", at_ns, {}, untried=untried)
    results: Results = {}
    with shadow_of(settings) as shadow:
        for asset in ("signals", "sequence_dataset", "levels"):
            lend(store, shadow.root, asset, [k for k in sessions if k < asof and store.exists(asset, k)])
        if later == "altered":
            last = calendar.session(following[-1])
            near = files_near(settings, calendar.session(asof), last.close_ns)
            write_future(near, shadow.dbn_dir, at_ns, "altered", within_ns=(at_ns - REACH_NS, last.close_ns))
            lend(store, shadow.root, "ohlcv_bars", warmup_sessions(settings, asof))
            for key in following:
                results |= _rebuilt(shadow, SESSION_ASSETS, key)
        results |= _rebuilt(shadow, made, asof)
        replayed = ArtifactStore(shadow.root)
        for asset in made:
            if replayed.exists(asset, asof):
                results[asset] = fitted_differences(store.load(asset, asof), replayed.load(asset, asof))
    replay = _judged(settings, asof, f"later sessions {later}", at_ns, results)
    return replace(replay, untried=_unmade(store, asof))


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
    return replace(replay, compared=compared, untried=(*untried, *_unmade(store, asof)))


def provable_asofs(store: ArtifactStore) -> list[str]:
    """As-of sessions whose split and at least one model are stored, sorted."""
    return [k for k in store.keys(MODEL_ASSETS[0]) if len(stored_models(store, k)) > 1]


def stored_models(store: ArtifactStore, asof: str) -> list[str]:
    """The split and models that are stored as of a session, upstream first."""
    return [a for a in MODEL_ASSETS if store.exists(a, asof)]


def _unmade(store: ArtifactStore, asof: str) -> tuple[str, ...]:
    return tuple(f"{a} [{asof}]: not stored" for a in MODEL_ASSETS if not store.exists(a, asof))


def prove(
    settings: Settings,
    sessions: Sequence[str],
    asofs: Sequence[str],
    cuts: int,
    seed: int = 0,
    console: Console | None = None,
) -> list[Replay]:
    """Replay each session `cuts` times, with input that is cut off, another or late in turn; refit each as-of session with later sessions
    absent and altered, with a past one delivered again, and with others held out of its training.

    Raises ConfigError when nothing is named, MissingInputError when a named session has no stored signals or an as-of session no model.
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
        tries += [
            partial(replay_redelivery, settings, asof),
            partial(replay_models, settings, asof, "absent"),
            partial(replay_models, settings, asof, "altered"),
            *held_out_tries(settings, asof),
        ]
    return [t() for t in track(tries, "replays", console=console or Console(quiet=True))]


def _session_tries(
    settings: Settings, store: ArtifactStore, key: str, cuts: int, seed: int
) -> list[Callable[[], Replay]]:
    session = calendar_of(settings.symbol).session(key)
    # without a feed that has receive times nothing of a session can be late
    received = any(e.header.schema not in BAR_SECONDS for e in files_near(settings, session))
    futures = FUTURES if received else [f for f in FUTURES if f not in NEVER_OF_BARS]
    moments_ns = known_moments(read_signals(store, key)[0].frame, load_contract())
    from_ns = cuttable_from_ns(_registered(store, key), session)
    chosen = cuts_of(session, settings, cuts, seed, from_ns, moments_ns)
    return [
        partial(replay_session, settings, key, at_ns, futures[(n + seed) % len(futures)])
        for n, at_ns in enumerate(chosen)
    ]


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
        rebuild(shadow, assets, key)
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
    order = (*SESSION_ASSETS, *MODEL_ASSETS)
    results = {a: results[a] for a in sorted(results, key=order.index)}
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
