"""Replay of stored artifacts with another future: honest ones hold, planted leaks are found and named where they begin."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest

from spymaster_assets.assets import models as models_module
from spymaster_assets.assets import proof as proof_module
from spymaster_assets.assets.common import QUIET
from spymaster_assets.assets.datasets import read_part, read_split
from spymaster_assets.assets.proof import REPORT_KEY
from spymaster_assets.assets.signals import read_signals
from spymaster_assets.automation import prove as prove_module
from spymaster_assets.automation import replay as replay_module
from spymaster_assets.automation import replay_asof as replay_asof_module
from spymaster_assets.automation.prove import prove
from spymaster_assets.automation.replay import replay_session
from spymaster_assets.automation.replay_asof import (
    replay_models,
    replay_predictions,
    replay_redelivery,
    replay_report,
    replay_walk_forward,
)
from spymaster_assets.automation.replay_checks import CHECK, PROVE_JOB
from spymaster_assets.automation.shadow import lend, nearest_upstream, rebuild
from spymaster_assets.cli import main
from spymaster_assets.contract import load_contract
from spymaster_assets.datasets.splits import SplitManifest
from spymaster_assets.definitions import build_definitions
from spymaster_assets.errors import ConfigError, MissingInputError
from spymaster_assets.market.simulate import write_market
from spymaster_assets.market.tape import SessionTape
from spymaster_assets.partitions import (
    ASSETS,
    FITTED_ASSETS,
    MODEL_ASSETS,
    REPORT_ASSET,
    SESSION_ASSETS,
    WALK_FORWARD_ASSET,
    all_sessions,
    calendar_of,
    scheduled_asof,
)
from spymaster_assets.proof.cuts import cuts_of, known_moments, telling_sessions
from spymaster_assets.settings import MINUTE_NS, NS, ProveSettings, Settings
from spymaster_assets.signals import build as build_module
from spymaster_assets.signals import levels as levels_module
from spymaster_assets.store import Artifact, ArtifactStore, dump_json
from spymaster_assets_tests.graph.conftest import Demo

CUTS = int(os.environ.get("SPYMASTER_PROVE_CUTS", "16"))


def statuses(instance: dg.DagsterInstance, key: str) -> dict[str, str]:
    """What the event log says of the check of each asset's partition."""
    keys = [dg.AssetCheckKey(dg.AssetKey(a), CHECK) for a in ASSETS if a != WALK_FORWARD_ASSET]
    told = instance.event_log_storage.get_asset_check_partition_info(keys, partition_keys=[key])
    return {t.check_key.asset_key.to_user_string(): t.latest_execution_status.value for t in told}


def run_job(settings: Settings, instance: dg.DagsterInstance, key: str, cuts: int) -> None:
    config = {**QUIET, "ops": {"replay": {"config": {"cuts": cuts, "seed": 3}}}}
    job = build_definitions(settings).resolve_job_def(PROVE_JOB)
    assert job.execute_in_process(instance=instance, partition_key=key, run_config=config).success


def test_the_demo_holds_and_the_job_records_it_for_each_asset_of_the_partition(demo: Demo) -> None:
    asof = scheduled_asof(demo.settings)[-1]
    assert demo.store.exists("signals", asof)
    assert statuses(demo.instance, asof) == {}
    run_job(demo.settings, demo.instance, asof, CUTS)
    for asset in ASSETS:
        partition = None if asset == WALK_FORWARD_ASSET else asof
        key = dg.AssetCheckKey(dg.AssetKey(asset), CHECK)
        made, *_ = demo.instance.event_log_storage.get_asset_check_execution_history(key, limit=5)
        assert made.evaluation is not None
        assert (made.partition, made.evaluation.passed) == (partition, True), made.evaluation.description
        told = {name: value.value for name, value in made.evaluation.metadata.items()}
        # nothing follows the last test session that could be altered
        expected = {**dict.fromkeys(SESSION_ASSETS, CUTS), **dict.fromkeys(FITTED_ASSETS, 4)}
        assert told["replays"] == {**expected, REPORT_ASSET: 1 + max(2, CUTS // 8)}.get(asset, 3)
        target = made.evaluation.target_materialization_data
        records = demo.instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[partition] if partition else None),
            limit=1,
        ).records
        assert target is not None
        assert target.storage_id == records[0].storage_id
        if asset in ("book_snapshots", "option_flow", "levels", "signals") or asset not in SESSION_ASSETS:
            assert told["values_compared"] > 1_000
    assert set(statuses(demo.instance, asof).values()) == {"SUCCEEDED"}
    assert set(statuses(demo.instance, all_sessions(demo.settings)[0])) == set()


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


def leak_event_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tape is keyed by event time: a late print then was in the window before it came."""
    honest = SessionTape.of_records.__func__  # type: ignore[attr-defined]

    def leaky(cls: type[SessionTape], records: np.ndarray) -> SessionTape:
        records = records[np.argsort(records["ts_event"], kind="stable")]
        return replace(honest(cls, records), ts_ns=records["ts_event"].astype(np.int64))

    monkeypatch.setattr(SessionTape, "of_records", classmethod(leaky))


def leak_own_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column that is declared known at t0 reads the close of the touch bar."""
    honest = build_module._context

    def leaky(touches, levels, *others):  # type: ignore[no-untyped-def]
        out = honest(touches, levels, *others)
        close = levels.context["close"].to_numpy()[touches["bar"].to_numpy()]
        return {**out, "dist_to_pm_high": out["dist_to_pm_high"] + 1e-3 * close}

    monkeypatch.setattr(build_module, "_context", leaky)


@pytest.fixture
def traded(broken: Settings, tmp_path: Path) -> Settings:
    """A session of simulated trades alone, nothing made of it yet."""
    key = all_sessions(broken)[0]
    write_market(tmp_path / "dbn", broken.instrument, [calendar_of("SPY").session(key)], 11)
    return replace(broken, dbn_dir=tmp_path / "dbn", first_session=key, last_session=key)


@pytest.mark.parametrize(
    ("leak", "asset", "column", "above"),
    [
        (leak_session_high, "levels", "level_price_e9", {"signals": "levels"}),
        (leak_normalizer, "signals", "approach_velocity", {}),
        (leak_window, "signals", "tape_", {}),
        (leak_event_time, "signals", "tape_", {}),
    ],
)
def test_a_planted_leak_is_found_where_it_begins(
    traded: Settings,
    monkeypatch: pytest.MonkeyPatch,
    leak: Callable[[pytest.MonkeyPatch], None],
    asset: str,
    column: str,
    above: dict[str, str],
) -> None:
    key = traded.first_session
    leak(monkeypatch)
    rebuild(traded, SESSION_ASSETS, key)
    replays = prove(traded, [key], [], cuts=12, seed=3)
    found = [d for replay in replays for d in replay.differences]
    assert found, "the leak went unseen"
    assert found[0].asset == asset
    assert any(d.asset == asset and d.column.startswith(column) for d in found)
    if leak is leak_event_time:
        assert {r.future for r in replays if r.differences} == {"late"}, "other futures cannot tell"
    for replay in replays:
        for difference in replay.differences:
            told = replay.told(difference)
            assert key in told
            assert replay.at in told
            if difference.asset == asset:
                assert told.endswith("begins here")
            elif difference.asset in above:
                assert told.endswith(f"{above[difference.asset]} differs already")


def test_a_column_known_at_t0_that_reads_the_touch_bar_is_found_by_a_cut_within_it(
    traded: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = traded.first_session
    leak_own_bar(monkeypatch)
    rebuild(traded, SESSION_ASSETS, key)
    found = {
        (d.asset, d.column, replay.at_ns - int(d.row.rsplit("_", 1)[1]))
        for replay in prove(traded, [key], [], cuts=16)
        for d in replay.differences
    }
    assert {(asset, column) for asset, column, _ in found} == {
        ("signals", "dist_to_pm_high"),
        ("sequence_dataset", "static dist_to_pm_high"),
    }
    assert {after_ns for *_, after_ns in found} <= {0, NS, 30 * NS}


def test_the_nearest_upstream_asset_is_that_of_the_graph(demo: Demo) -> None:
    nearest = {
        (asset, among): nearest_upstream(demo.settings, asset, frozenset(among.split()))
        for asset, among in (
            ("sequence_dataset", "ohlcv_bars levels"),
            ("sequence_dataset", "book_snapshots"),
            ("levels", "levels book_snapshots"),
            ("signals", "book_snapshots market_files"),
        )
    }
    assert list(nearest.values()) == ["levels", "book_snapshots", None, "book_snapshots"]


def test_a_leak_turns_the_check_of_its_partition_red_and_other_runs_leave_replays_out(
    traded: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = traded.first_session
    leak_session_high(monkeypatch)
    with dg.DagsterInstance.ephemeral() as instance:
        job = build_definitions(traded).resolve_implicit_global_asset_job_def()
        chosen = [dg.AssetKey(a) for a in SESSION_ASSETS]
        assert job.execute_in_process(
            instance=instance, partition_key=key, asset_selection=chosen, run_config=QUIET
        ).success
        assert set(statuses(instance, key).values()) <= {"PLANNED"}
        run_job(traded, instance, key, 4)
        told = statuses(instance, key)
        assert {a for a, status in told.items() if status == "FAILED"} >= {"levels", "signals"}
        assert {told[a] for a in ("market_files", "ohlcv_bars", "book_snapshots", "option_flow")} == {"SUCCEEDED"}
        check = dg.AssetCheckKey(dg.AssetKey("levels"), CHECK)
        (made, *_) = instance.event_log_storage.get_asset_check_execution_history(check, limit=5)
        assert made.evaluation is not None
        assert "begins here" in (made.evaluation.description or "")
        table = made.evaluation.metadata["differences"]
        assert isinstance(table, dg.TableMetadataValue)
        assert table.records[0].data["column"] == "level_price_e9"


def test_a_fit_that_reads_a_later_session_is_found_in_the_member_that_it_changes(
    demo: Demo, broken: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asof = scheduled_asof(demo.settings)[0]

    def leaky(store: ArtifactStore, split: SplitManifest, part: str) -> pl.DataFrame:
        rows = read_part(store, split, part)
        later = asof if part == "train" and store.exists("signals", asof) else None
        if later is None:
            return rows
        # rows of a later session would be refused; a bound that is read off them is not
        bound = read_signals(store, later)[0].frame["atr"].median()
        return rows.with_columns(pl.col("atr").clip(upper_bound=bound))

    monkeypatch.setattr(models_module, "read_part", leaky)
    monkeypatch.setattr(replay_module, "MODEL_ASSETS", ("split_manifest", "retrieval_index"))
    for asset in ("ohlcv_bars", "levels", "signals", "sequence_dataset"):
        lend(demo.store, broken.root, asset, demo.store.keys(asset))
    rebuild(broken, ("split_manifest", "retrieval_index"), asof)
    for later in ("absent", "altered"):
        replay = replay_models(broken, asof, later)  # type: ignore[arg-type]
        assert {d.asset for d in replay.differences} == {"retrieval_index"}
        npz = next(d for d in replay.differences if d.column == "retrieval_index.npz")
        assert npz.row.split("[")[0] in np.load(
            broken.root / "retrieval_index" / asof / broken_version(broken, asof) / "retrieval_index.npz"
        )
        assert replay.told(npz).endswith("begins here")


def broken_version(settings: Settings, asof: str) -> str:
    return ArtifactStore(settings.root).load("retrieval_index", asof).folder.name


def test_a_model_that_mixes_an_old_split_with_new_rows_is_found(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    asof = scheduled_asof(demo.settings)[0]

    def mixing(store: ArtifactStore, split: SplitManifest, part: str) -> pl.DataFrame:
        return pl.concat([read_signals(store, k)[0].frame for k in getattr(split, part)])

    monkeypatch.setattr(models_module, "read_part", mixing)
    monkeypatch.setattr(replay_asof_module, "REFUSING", ("retrieval_index",))
    found = replay_redelivery(demo.settings, asof).differences
    assert [(d.asset, d.replayed) for d in found] == [("retrieval_index", "made of the old split and the new rows")]


def normalised(said: pl.DataFrame, *_: object) -> pl.DataFrame:
    """Predictions are scaled by their mean over the whole test part."""
    return said.with_columns(pl.col("p") / pl.col("p").mean().over("model", "head", "delay", "stage"))


def calibrated(said: pl.DataFrame, test: pl.DataFrame) -> pl.DataFrame:
    """Each prediction is moved towards what happened: a calibrator that was fitted on the test rows themselves."""
    truth = test.select("event_id", pl.col("strength_signed_4min").fill_null(0.0).alias("truth"))
    joined = said.join(truth, on="event_id", how="left", maintain_order="left")
    return joined.with_columns(pl.col("p") + 0.01 * pl.col("truth")).drop("truth")


@pytest.mark.parametrize("leak", [normalised, calibrated])
def test_a_prediction_that_knows_later_touches_is_found(
    demo: Demo,
    broken: Settings,
    monkeypatch: pytest.MonkeyPatch,
    leak: Callable[[pl.DataFrame, pl.DataFrame], pl.DataFrame],
) -> None:
    asof = scheduled_asof(demo.settings)[0]
    honest = proof_module.with_outcomes
    monkeypatch.setattr(proof_module, "with_outcomes", lambda said, test, *rest: honest(leak(said, test), test, *rest))
    monkeypatch.setattr(proof_module, "baseline_predictions", lambda train, test, *_: test.clear().select("event_id"))
    settings = lent(demo, broken)
    rebuild(settings, [REPORT_ASSET], asof)
    test = read_split(demo.store, asof)[0].test
    touches = read_signals(demo.store, test[0])[0].frame
    at_ns = int(touches["decision_ns"][touches.height // 2])
    replay = replay_predictions(settings, asof, at_ns, "altered")
    (found,) = replay.differences
    assert (found.asset, found.key, found.column) == (REPORT_ASSET, asof, "p")
    assert found.row.startswith("SPY")
    assert replay.told(found).endswith("begins here")


def test_a_report_that_reads_a_later_session_is_found_and_so_is_one_that_cannot_be_told(
    demo: Demo, broken: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asof, newest = scheduled_asof(demo.settings)
    honest = proof_module.predict_all

    def leaky(store: ArtifactStore, key: str, sessions: Sequence[str]) -> tuple[pl.DataFrame, dict[str, str]]:
        said, inputs = honest(store, key, sessions)
        if store.exists("signals", newest):
            bound = read_signals(store, newest)[0].frame["atr"].median()
            said = said.with_columns(pl.col("p").clip(upper_bound=bound))
        return said, inputs

    monkeypatch.setattr(proof_module, "predict_all", leaky)
    monkeypatch.setattr(proof_module, "baseline_predictions", lambda train, test, *_: test.clear().select("event_id"))
    settings = lent(demo, broken)
    rebuild(settings, [REPORT_ASSET], asof)
    replay = replay_report(settings, asof, "absent")
    assert {(d.asset, d.key) for d in replay.differences} == {(REPORT_ASSET, asof)}
    assert "predictions.parquet" in {d.column for d in replay.differences}
    scores = next(d for d in replay.differences if d.column == "calibration.json")
    assert scores.row.startswith("heads[")
    assert replay.told(scores).endswith("begins here")
    store = ArtifactStore(settings.root)
    store.publish("signals", asof, {"x.json": b"{}"})
    (stale,) = [t() for t in prove_module._report_tries(settings, store, asof, 16, 0)]
    assert stale.compared == {}
    assert f"signals[{asof}] has changed" in stale.untried[0]


def test_models_of_other_settings_are_stale_and_no_difference(demo: Demo) -> None:
    asof, tree = scheduled_asof(demo.settings)[0], demo.settings.tree
    now = replace(demo.settings, tree=replace(tree, max_depth=tree.max_depth + 1))
    replay = replay_models(now, asof, "absent")
    assert replay.differences == ()
    assert {*replay.compared} == {"split_manifest", "patchtst_model", "retrieval_index"}
    told = f"tree.max_depth was {tree.max_depth} when it was made, now it is {tree.max_depth + 1}"
    assert {u for u in replay.untried if told in u} == {f"{a} [{asof}]: {told}" for a in ("tree_bundles", "canaries")}


def lent(demo: Demo, broken: Settings) -> Settings:
    """The demo's sessions, models and canaries in a store of their own."""
    for asset in (*SESSION_ASSETS, *MODEL_ASSETS):
        lend(demo.store, broken.root, asset, demo.store.keys(asset))
    return broken


def test_a_walk_forward_report_that_mixes_folds_or_counts_later_sessions_is_found(
    demo: Demo, broken: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, newest = scheduled_asof(demo.settings)
    settings = lent(demo, broken)
    lend(demo.store, settings.root, REPORT_ASSET, [first, newest])
    honest = proof_module.judge
    with monkeypatch.context() as patch:
        patch.setattr(proof_module, "judge", lambda outcomes: honest(normalised(outcomes)))
        rebuild(settings, [WALK_FORWARD_ASSET], None)
        assert replay_walk_forward(settings, newest, "absent").differences == (), "with all folds nothing is later"
        replay = replay_walk_forward(settings, first, "absent")
    (found,) = replay.differences
    assert (found.asset, found.key, found.column) == (WALK_FORWARD_ASSET, REPORT_KEY, "report.json")
    assert found.row.startswith("heads[0].")
    assert f"folds up to {first}" in replay.told(found)
    assert replay.told(found).endswith("begins here")
    rows = proof_module.canary_rows
    monkeypatch.setattr(
        proof_module,
        "canary_rows",
        lambda canaries: [{**r, "published": len(list(settings.root.glob("signals/*")))} for r in rows(canaries)],
    )
    replay = replay_walk_forward(settings, first, "absent")
    assert [(d.column, d.row) for d in replay.differences] == [("report.json", "canaries[0].published")]


def test_every_asset_of_the_graph_is_proved(demo: Demo) -> None:
    graph = demo.definitions.resolve_asset_graph()
    assert {k.to_user_string() for k in graph.get_all_asset_keys()} == {*ASSETS}
    checked = {k.asset_key.to_user_string() for k in graph.asset_check_keys if k.name == CHECK}
    assert checked == {*ASSETS}
    nearest = nearest_upstream(demo.settings, WALK_FORWARD_ASSET, frozenset({"signals", REPORT_ASSET}))
    assert nearest == REPORT_ASSET
    assert nearest_upstream(demo.settings, REPORT_ASSET, frozenset({"levels", "tree_bundles"})) == "tree_bundles"


def test_an_input_that_is_not_recorded_or_has_not_changed_goes_unnoticed(tmp_path: Path) -> None:
    again = "2024-02-01"
    for inputs, noticed in (({f"signals[{again}]": "old"}, True), ({f"signals[{again}]": "new"}, False), ({}, False)):
        reader = Artifact("tree_bundles", "2024-02-20", tmp_path, "", {}, inputs)
        assert (replay_asof_module._unnoticed(reader, again, {"signals": "new"}) == []) is noticed


def test_cuts_are_edges_moments_and_random_times_of_the_session(demo: Demo) -> None:
    key = all_sessions(demo.settings)[0]
    session = calendar_of("SPY").session(key)
    from_ns = session.regular_open_ns - 90 * MINUTE_NS
    cuts = cuts_of(session, demo.settings, 16, 5, from_ns)
    assert len(cuts) == len(set(cuts)) == 16
    assert all(from_ns < c < session.close_ns for c in cuts)
    assert {session.regular_open_ns + 15 * MINUTE_NS, session.regular_close_ns - 8 * MINUTE_NS} <= {*cuts}
    assert min(cuts) < session.regular_open_ns < session.regular_close_ns < max(cuts)
    assert cuts == cuts_of(session, demo.settings, 16, 5, from_ns) != cuts_of(session, demo.settings, 16, 6, from_ns)
    signals = read_signals(demo.store, key)[0].frame
    moments = known_moments(signals, load_contract())
    t0_ns = int(signals["ts_ns"][0])
    assert {*signals["label_known_ns"].drop_nulls().to_list(), t0_ns, t0_ns + 60 * NS} <= {*moments.known_ns.tolist()}
    assert {t0_ns + NS, t0_ns + 30 * NS} <= {*moments.touching_ns.tolist()}
    assert int(signals["decision_ns"][0]) in moments.decided_ns
    for count, touching, decided, known in ((16, 2, 2, 4), (64, 12, 12, 24)):
        chosen = {*cuts_of(session, demo.settings, count, 5, from_ns, moments)}
        assert len(chosen) == count
        assert len(chosen & {*moments.touching_ns.tolist()}) >= touching
        assert len(chosen & {*moments.decided_ns.tolist()}) >= decided
        assert len(chosen & {*moments.known_ns.tolist()}) >= known


def test_default_sessions_are_the_newest_and_the_newest_odd_ones(tmp_path: Path) -> None:
    store, calendar = ArtifactStore(tmp_path), calendar_of("ES")
    assert telling_sessions(store, calendar) == {}
    keys = ["2023-11-03", "2023-11-06", "2023-11-24", "2024-03-08", "2024-03-11", "2024-03-12", "2024-03-13"]
    for key in keys:
        front = {"rolled_from": "ESH4" if key in ("2024-03-11", "2024-03-12") else None}
        store.publish("market_files", key, {"files.json": dump_json({"front": front})})
        store.publish("signals", key, {"x.json": b"{}"})
    assert telling_sessions(store, calendar) == {
        "2024-03-13": "newest",
        "2024-03-11": "DST change",
        "2024-03-12": "roll",
        "2023-11-24": "half day",
    }


def test_the_schedule_is_off_and_asks_for_the_nightly_cuts(demo: Demo) -> None:
    settings = replace(demo.settings, prove=ProveSettings(nightly_cuts=99))
    definitions = build_definitions(settings)
    schedule = next(iter(definitions.schedules or []))
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED  # type: ignore[union-attr]
    context = dg.build_schedule_context(
        demo.instance,
        repository_def=definitions.get_repository_def(),
        scheduled_execution_time=datetime(2024, 3, 1, tzinfo=UTC),
    )
    asked = schedule.evaluate_tick(context).run_requests or []  # type: ignore[union-attr]
    assert {r.partition_key for r in asked} == {all_sessions(settings)[-1], scheduled_asof(settings)[-1]}
    assert {r.run_config["ops"]["replay"]["config"]["cuts"] for r in asked} == {99}


def test_the_number_of_cuts_is_a_setting(tmp_path: Path) -> None:
    env = {"SPYMASTER_DATA_DIR": str(tmp_path), "SPYMASTER_PROVE_CUTS": "256"}
    assert Settings.load(env).prove.cuts == 256
    with pytest.raises(ConfigError, match="prove"):
        Settings.load({**env, "SPYMASTER_PROVE_CUTS": "0"})


def test_the_command_line_records_what_it_proves(demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    key = all_sessions(demo.settings)[1]
    assert main(["prove", "--session", key, "--cuts", "1"]) == 0
    assert statuses(demo.instance, key) == {}
    assert main(["prove", "--session", key, "--cuts", "1", "--record"]) == 0
    assert statuses(demo.instance, key) == dict.fromkeys(SESSION_ASSETS, "SUCCEEDED")
    assert "1 replays" in capsys.readouterr().out


def test_what_is_not_stored_cannot_be_proved(broken: Settings) -> None:
    with pytest.raises(MissingInputError, match="no stored signals"):
        prove(broken, [all_sessions(broken)[0]], [], 2)
    with pytest.raises(MissingInputError, match="retrieval_index"):
        prove(broken, [], scheduled_asof(broken)[:1], 2)


def test_nothing_of_a_replay_is_tracked_or_left(demo: Demo) -> None:
    before = pl.Series([p.name for p in demo.root.iterdir()]).sort().to_list()
    replay_session(
        demo.settings,
        all_sessions(demo.settings)[0],
        calendar_of("SPY").session(all_sessions(demo.settings)[0]).regular_close_ns - 1,
        "cut",
    )
    assert pl.Series([p.name for p in demo.root.iterdir()]).sort().to_list() == before
