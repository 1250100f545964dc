"""How much history each feature needs: rebuild a session with another past and see which values change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import track

from spymaster_assets.assets.signals import warmup_sessions
from spymaster_assets.automation.shadow import files_near, lend, rebuild, shadow_of
from spymaster_assets.contract import load_contract
from spymaster_assets.market.bars import bars_name, read_bars
from spymaster_assets.partitions import SESSION_ASSETS, calendar_of
from spymaster_assets.proof.cutting import write_past
from spymaster_assets.proof.history import Past, changes, shift_prices
from spymaster_assets.settings import MINUTE_NS, NS, Settings
from spymaster_assets.signals.build import read_signals
from spymaster_assets.signals.context import SessionBars
from spymaster_assets.store import ArtifactStore
from spymaster_assets.tables import parquet_bytes


def pasts_of(settings: Settings, key: str, touches: int, seed: int) -> list[Past]:
    """Pasts to try: those that end just outside and just inside each declared window before `touches` stored touches, a few
    random ones, those whose book is silent up to these touches, and those that end with each warm-up session."""
    store, contract = ArtifactStore(settings.root), load_contract()
    session = calendar_of(settings.symbol).session(key)
    t0 = np.unique(read_signals(store, key)[0].frame["ts_ns"].to_numpy())
    rng = np.random.default_rng([seed, session.open_ns // NS])
    chosen = rng.choice(t0, min(touches, len(t0)), replace=False)
    windows = {c.history.count for c in contract.columns if c.history and c.history.unit in ("minutes", "bars")}
    before = sorted({w - inside for w in windows for inside in (0, 1) if w >= inside})
    starts = {int(t) - m * MINUTE_NS for t in chosen for m in before}
    starts |= {int(t) for t in rng.choice(t0, min(touches, len(t0)))}
    within = [Past(at_ns) for at_ns in sorted(starts) if at_ns > session.regular_open_ns]
    within += [Past(int(t), silent=True) for t in sorted(chosen)]
    return within + [Past(session.open_ns, kept) for kept in range(len(warmup_sessions(settings, key)))]


def replay_pasts(settings: Settings, key: str, pasts: Sequence[Past], console: Console | None = None) -> pl.DataFrame:
    """Rebuild a session once for each other past and return what changed, the rows of `proof.history.changes`.

    Raises ArtifactError when a stored artifact is missing, dagster.Failure when the graph fails on the altered input.
    """
    store, contract = ArtifactStore(settings.root), load_contract()
    session = calendar_of(settings.symbol).session(key)
    warmup = warmup_sessions(settings, key)
    near = files_near(settings, session)
    stored = read_signals(store, key)[0].frame
    bar_start_ns = SessionBars(session, read_bars(store, key)[0]).front(1)["start_ns"].to_numpy()
    out = []
    for past in track(pasts, "other pasts", console=console or Console(quiet=True)):
        with shadow_of(settings) as shadow:
            write_past(near, shadow.dbn_dir, past.start_ns, past.silent)
            lend(store, shadow.root, "ohlcv_bars", warmup)
            for old in () if past.silent else warmup[: len(warmup) - (past.kept_sessions or 0)]:
                _shift_bars(ArtifactStore(shadow.root), old)
            rebuild(shadow, SESSION_ASSETS, key)
            out.append(
                changes(stored, read_signals(ArtifactStore(shadow.root), key)[0].frame, past, bar_start_ns, contract)
            )
    return pl.concat(out)


def _shift_bars(store: ArtifactStore, key: str) -> None:
    bars, artifact = read_bars(store, key)
    files = artifact.contents() | {bars_name(key): parquet_bytes(shift_prices(bars))}
    store.publish("ohlcv_bars", key, files, inputs=artifact.inputs, settings=artifact.settings)
