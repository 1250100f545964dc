"""`spymaster prove`: rebuild stored artifacts through the graph itself with another future, and compare what was known before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import track

from spymaster_assets.automation.held_out import held_out_tries
from spymaster_assets.automation.replay import (
    Later,
    Replay,
    replay_session,
    replay_unaltered,
    stored_models,
    why_unfit,
)
from spymaster_assets.automation.replay_asof import (
    judged_asofs,
    replay_models,
    replay_predictions,
    replay_redelivery,
    replay_report,
    replay_walk_forward,
)
from spymaster_assets.automation.shadow import files_near
from spymaster_assets.contract import STAGES, decision_column, load_contract
from spymaster_assets.datasets.splits import read_split
from spymaster_assets.errors import ConfigError, MissingInputError
from spymaster_assets.market.dbn import BAR_SECONDS
from spymaster_assets.market.files import read_registration
from spymaster_assets.partitions import (
    ASSETS,
    MODEL_ASSETS,
    REPORT_ASSET,
    SESSION_ASSETS,
    WALK_FORWARD_ASSET,
    calendar_of,
)
from spymaster_assets.proof.cuts import cuts_of, cuttable_from_ns, known_moments
from spymaster_assets.proof.cutting import FUTURES, NEVER_OF_BARS, Future
from spymaster_assets.settings import DELAYS_S, Settings
from spymaster_assets.signals.build import read_signals
from spymaster_assets.store import REPORT_KEY, ArtifactStore

CUTS_PER_PREDICTION_CUT = 8
"""A report's predictions are replayed at so many times fewer than a session, since each rebuilds a session and the report."""


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
            tries += [partial(replay_models, settings, asof, later) for later in get_args(Later)]
            if not any(why_unfit(settings, a, asof) for a in stored_models(store, asof)):
                tries += [partial(replay_redelivery, settings, asof), *held_out_tries(settings, asof)]
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
    from_ns = cuttable_from_ns(read_registration(store, key)[0], session)
    chosen = cuts_of(session, settings, cuts, seed, from_ns, moments)
    return [
        partial(replay_session, settings, key, at_ns, futures[(n + seed) % len(futures)])
        for n, at_ns in enumerate(chosen)
    ]


def _report_tries(
    settings: Settings, store: ArtifactStore, asof: str, cuts: int, seed: int
) -> list[Callable[[], Replay]]:
    """The report with later sessions absent and altered, and its test sessions cut and altered in turn from decisions on."""
    if why := why_unfit(settings, REPORT_ASSET, asof):
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
    if why := why_unfit(settings, WALK_FORWARD_ASSET, REPORT_KEY):
        return [lambda: Replay(REPORT_KEY, "later sessions absent", 0, {}, untried=(why,), about=(WALK_FORWARD_ASSET,))]
    earlier = [k for k in earlier if k >= stored.json("report.json")["folds"][0]]
    some = [earlier[-1 - seed % len(earlier)]] if earlier else []
    return [
        partial(replay_walk_forward, settings, upto, later) for upto in (newest, *some) for later in get_args(Later)
    ]


def provable_asofs(store: ArtifactStore) -> list[str]:
    """As-of sessions whose split and at least one model are stored, sorted."""
    return [k for k in store.keys(MODEL_ASSETS[0]) if len(stored_models(store, k)) > 1]


def telling_asofs(store: ArtifactStore) -> list[str]:
    """As-of sessions that are replayed where none is named: the newest with models, with a report, and of the walk-forward report."""
    made = provable_asofs(store)
    chosen = {*made[-1:], *[k for k in made if store.exists(REPORT_ASSET, k)][-1:]}
    if store.exists(WALK_FORWARD_ASSET, REPORT_KEY):
        chosen |= {*judged_asofs(store.load(WALK_FORWARD_ASSET, REPORT_KEY))[-1:]} & {*made}
    return sorted(chosen, reverse=True)
