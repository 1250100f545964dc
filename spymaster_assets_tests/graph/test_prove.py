"""Replay of stored artifacts with another future: honest ones hold, planted leaks are found and named where they begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from spymaster_assets.automation import prove as prove_module
from spymaster_assets.automation.prove import cuts_of, prove, replay_models, replay_session
from spymaster_assets.errors import MissingInputError
from spymaster_assets.market.files import scan_folder
from spymaster_assets.market.simulate import write_market
from spymaster_assets.market.tape import SessionTape
from spymaster_assets.partitions import SESSION_ASSETS, all_sessions, calendar_of, scheduled_asof
from spymaster_assets.proof.cutting import write_future
from spymaster_assets.settings import MINUTE_NS, Settings
from spymaster_assets.signals import build as build_module
from spymaster_assets.signals import levels as levels_module
from spymaster_assets_tests.graph.conftest import Demo


def test_the_demo_holds_under_cuts_and_other_futures(demo: Demo) -> None:
    key = all_sessions(demo.settings)[-1]
    replays = prove(demo.settings, [key], scheduled_asof(demo.settings)[-1:], cuts=4, seed=1)
    assert [str(d) for r in replays for d in r.differences] == []
    assert {r.future for r in replays} == {"cut", "altered", "without later sessions"}
    assert sum(r.compared for r in replays) > 50_000


def test_another_future_is_really_another(demo: Demo, tmp_path: Path) -> None:
    key = all_sessions(demo.settings)[-1]
    session = calendar_of("SPY").session(key)
    at_ns = session.regular_open_ns + 100 * MINUTE_NS
    entries = [e for e in scan_folder(demo.settings.dbn_dir) if e.overlaps(session.open_ns, session.close_ns)]
    for future in ("cut", "altered"):
        write_future(entries, tmp_path / future, at_ns, future)
    from spymaster_assets.market.dbn import read_records

    name = next(e.name for e in entries if "mbp-10" in e.name)
    real, cut, altered = (
        read_records(folder / name) for folder in (demo.settings.dbn_dir, tmp_path / "cut", tmp_path / "altered")
    )
    n = len(cut)
    assert 0 < n < len(real) == len(altered)
    assert cut.tobytes() == real[:n].tobytes() == altered[:n].tobytes()
    assert (altered["bid_px_00"][n:] != real["bid_px_00"][n:]).mean() > 0.99


def leak_session_high(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's final high is used from its first minute on."""
    honest = levels_module.key_levels

    def leaky(start_ns, context, history, session, settings, dollar):  # type: ignore[no-untyped-def]
        out = honest(start_ns, context, history, session, settings, dollar)
        out["SESSION_HIGH"] = np.full(len(start_ns), float(context["high_e9"].max() or 0))
        return out

    monkeypatch.setattr(levels_module, "key_levels", leaky)


def leak_normalizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature is scaled by its mean over the whole session."""
    honest = build_module.trend.approach

    def leaky(context, bar, sign, lookback):  # type: ignore[no-untyped-def]
        out = honest(context, bar, sign, lookback)
        return {**out, "approach_velocity": out["approach_velocity"] - np.nanmean(out["approach_velocity"])}

    monkeypatch.setattr(build_module.trend, "approach", leaky)


def leak_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tape window reaches twice as far as the column's known-at says."""
    honest = build_module.tape_features

    def leaky(tape: SessionTape, t0, level, instrument, settings):  # type: ignore[no-untyped-def]
        return honest(tape, t0, level, instrument, replace(settings, tape_window_s=2 * settings.tape_window_s))

    monkeypatch.setattr(build_module, "tape_features", leaky)


@pytest.mark.parametrize(
    ("leak", "asset", "column"),
    [
        (leak_session_high, "levels", "level_price_e9"),
        (leak_normalizer, "signals", "approach_velocity"),
        (leak_window, "signals", "tape_"),
    ],
)
def test_a_planted_leak_is_found_where_it_begins(
    broken: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    leak: Callable[[pytest.MonkeyPatch], None],
    asset: str,
    column: str,
) -> None:
    folder = tmp_path / "dbn"
    key = all_sessions(broken)[0]
    session = calendar_of("SPY").session(key)
    write_market(folder, broken.instrument, [session], 11)
    settings = replace(broken, dbn_dir=folder, first_session=key, last_session=key)
    leak(monkeypatch)
    prove_module._run(settings, SESSION_ASSETS, key)
    found = [d for replay in prove(settings, [key], [], cuts=8, seed=3) for d in replay.differences]
    assert found, "the leak went unseen"
    assert found[0].asset == asset
    assert any(d.asset == asset and d.column.startswith(column) for d in found)
    assert key in str(found[0])


def test_a_model_that_reads_a_later_session_is_found(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    asof = scheduled_asof(demo.settings)[0]
    store = demo.store
    honest = store.load("retrieval_index", asof)
    # what such an index would look like: bytes that the sessions before cannot give
    changed = replace(honest, sha256="0" * 64, files={**honest.files, next(iter(honest.files)): "0" * 64})
    real = type(store).load

    def load(self, name, key):  # type: ignore[no-untyped-def]
        found = real(self, name, key)
        return changed if self.root == store.root and (name, key) == ("retrieval_index", asof) else found

    monkeypatch.setattr(type(store), "load", load)
    found = replay_models(demo.settings, asof).differences
    assert [d.asset for d in found] == ["retrieval_index"]


def test_cuts_are_edges_and_random_times_inside_regular_hours(demo: Demo) -> None:
    session = calendar_of("SPY").session(all_sessions(demo.settings)[0])
    cuts = cuts_of(session, demo.settings, 16, 5)
    assert len(cuts) == len(set(cuts)) == 16
    assert all(session.regular_open_ns < c < session.regular_close_ns for c in cuts)
    assert session.regular_open_ns + 15 * MINUTE_NS in cuts
    assert cuts == cuts_of(session, demo.settings, 16, 5) != cuts_of(session, demo.settings, 16, 6)


def test_what_is_not_stored_cannot_be_proved(broken: Settings) -> None:
    with pytest.raises(MissingInputError, match="no stored signals"):
        prove(broken, [all_sessions(broken)[0]], [], 2)


def test_nothing_of_a_replay_is_tracked_or_left(demo: Demo) -> None:
    before = pl.Series([p.name for p in demo.root.iterdir()]).sort().to_list()
    replay_session(
        demo.settings,
        all_sessions(demo.settings)[0],
        calendar_of("SPY").session(all_sessions(demo.settings)[0]).regular_close_ns - 1,
        "cut",
    )
    assert pl.Series([p.name for p in demo.root.iterdir()]).sort().to_list() == before
