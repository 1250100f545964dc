"""One rebuild in a shadow store with another future, and what differs in what was known before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice, takewhile
from typing import Literal

import numpy as np

from spymaster_assets.assets.signals import warmup_sessions
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
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.files import read_registration, scan_flat
from spymaster_assets.market.options import is_option_trades_csv
from spymaster_assets.partitions import (
    ASSETS,
    MODEL_ASSETS,
    SESSION_ASSETS,
    all_sessions,
    calendar_of,
)
from spymaster_assets.proof.compare import Difference, differences
from spymaster_assets.proof.cutting import Future, write_flat_future, write_future
from spymaster_assets.proof.lineage import input_of
from spymaster_assets.proof.members import fitted_differences
from spymaster_assets.settings import NS, WHERE_IT_RUNS, Settings
from spymaster_assets.store import REPORT_KEY, ArtifactStore, dump_json

Later = Literal["absent", "altered"]
"""What becomes of the sessions that came after an asset was made, the as-of session of models among them."""
Results = dict[str, tuple[list[Difference], int]]
"""Per asset what differs and how many values were compared."""
UNALTERED = "nothing altered"
"""What a replay is told as that only says whether the stored artifacts can be made again as they are."""
LATER_SESSIONS = 2
"""How many sessions that came after are rebuilt with another content."""


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
    with _session_remade(settings, key, at_ns, future) as (results, replayed):
        results |= compared_session(settings, replayed, key, known_until_ns(replayed, key, at_ns))
    return judge_replay(settings, key, future, at_ns, results)


def replay_unaltered(settings: Settings, key: str) -> Replay:
    """Rebuild a session's assets from its files as they are; all rows are compared. Raises like `replay_session`."""
    never_ns = np.iinfo(np.int64).max
    with _session_remade(settings, key, never_ns, "altered") as (results, replayed):
        results |= compared_session(settings, replayed, key, never_ns)
    return judge_replay(settings, key, UNALTERED, calendar_of(settings.symbol).session(key).close_ns, results)


@contextmanager
def _session_remade(
    settings: Settings, key: str, at_ns: int, future: Future
) -> Iterator[tuple[Results, ArtifactStore]]:
    """What of a session could not be made again, and the shadow store of what could."""
    with shadow_of(settings) as shadow:
        write_input(settings, shadow, [calendar_of(settings.symbol).session(key)], at_ns, future)
        lend(ArtifactStore(settings.root), shadow.root, "ohlcv_bars", warmup_sessions(settings, key))
        yield remake(shadow, SESSION_ASSETS, key), ArtifactStore(shadow.root)


def write_input(settings: Settings, shadow: Settings, sessions: Sequence[Session], at_ns: int, future: Future) -> None:
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


def compared_session(settings: Settings, replayed: ArtifactStore, key: str, known_ns: int) -> Results:
    """Differences of a session's assets that could be made again in what was known at known_ns."""
    store, contract = ArtifactStore(settings.root), load_contract()
    made = [a for a in SESSION_ASSETS if replayed.exists(a, key)]
    return {a: differences(store.load(a, key), replayed.load(a, key), known_ns, contract) for a in made}


def known_until_ns(replayed: ArtifactStore, key: str, at_ns: int) -> int:
    """A tape that is cut is only known to be complete up to its last record; at_ns where there is none."""
    if not replayed.exists("market_files", key):
        return at_ns
    return min(at_ns, read_registration(replayed, key)[0].observed_until_ns)


def replay_later(
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
            write_input(settings, shadow, [calendar.session(k) for k in following], at_ns, "altered")
            if "ohlcv_bars" not in lent:
                lend(store, shadow.root, "ohlcv_bars", warmup_sessions(settings, first))
        for k in following:
            results |= remake(shadow, SESSION_ASSETS, k)
        results |= again(shadow)
    return replace(judge_replay(settings, key, told_as, at_ns, results), about=about)


def refitted(store: ArtifactStore, shadow: Settings, assets: Sequence[str], asof: str) -> Results:
    """Rebuild an as-of session's assets and compare every file of them."""
    results = remake(shadow, assets, asof)
    replayed = ArtifactStore(shadow.root)
    for asset in assets:
        if replayed.exists(asset, asof):
            results[asset] = fitted_differences(store.load(asset, asof), replayed.load(asset, asof))
    return results


def stored_models(store: ArtifactStore, asof: str) -> list[str]:
    """The split and models that are stored as of a session, upstream first."""
    return [a for a in MODEL_ASSETS if store.exists(a, asof)]


def why_unfit(settings: Settings, asset: str, key: str) -> str | None:
    """Why an artifact cannot be made again as it was: it is gone, or its settings or what it was made from are others by now."""
    store = ArtifactStore(settings.root)
    if not store.exists(asset, key):
        return f"{asset} [{key}]: not stored"
    made = store.load(asset, key)
    for name, sha256 in made.inputs.items():
        source = input_of(made, name)
        if source[0] in ASSETS and (not store.exists(*source) or store.load(*source).sha256 != sha256):
            return f"{asset} [{key}]: {name} has changed since it was made"
    now = json.loads(dump_json(settings.of(*(n for n in made.settings if "." in n))))
    for name, value in made.settings.items():
        if name in now and now[name] != value and name not in WHERE_IT_RUNS:
            return (
                f"{asset} [{key}]: {name} was {json.dumps(value)} when it was made, now it is {json.dumps(now[name])}"
            )
    return None


def remake(shadow: Settings, assets: Sequence[str], key: str) -> Results:
    """Rebuild assets; for those that fail a difference that says so."""
    try:
        rebuild(shadow, assets, None if key == REPORT_KEY else key)
    except RebuildFailed as failure:
        return {
            asset: ([Difference(asset, key, "all columns", "all rows", "made", f"could not be made: {words}")], 0)
            for asset, words in failure.words.items()
        }
    return {}


def judge_replay(settings: Settings, key: str, future: str, at_ns: int, results: Results) -> Replay:
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
