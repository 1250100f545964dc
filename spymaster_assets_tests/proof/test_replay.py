"""Replays of single simulated sessions: what they compare, what they try, and what they survive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from spymaster_assets.automation import replay as replay_module
from spymaster_assets.automation.prove import provable_asofs, prove
from spymaster_assets.automation.replay import UNALTERED, replay_session
from spymaster_assets.automation.replay_asof import replay_models
from spymaster_assets.automation.replay_checks import verdicts
from spymaster_assets.automation.shadow import lend, rebuild
from spymaster_assets.datasets.sequences import from_npz_bytes, to_npz_bytes
from spymaster_assets.errors import MissingInputError
from spymaster_assets.market.simulate import write_market
from spymaster_assets.partitions import SESSION_ASSETS, calendar_of
from spymaster_assets.proof.compare import differences
from spymaster_assets.proof.cutting import FUTURES
from spymaster_assets.settings import MINUTE_NS, NS, Settings
from spymaster_assets.signals import levels as levels_module
from spymaster_assets.signals.build import signals_from_parquet, signals_to_parquet
from spymaster_assets.store import Artifact, ArtifactStore, dump_json
from spymaster_assets.tables import parquet_bytes
from spymaster_assets_tests.builders import CONTRACT

KEY = "2024-02-01"
OPENS_NS = calendar_of("SPY").session(KEY).regular_open_ns


def simulated(root: Path, key: str) -> Settings:
    """A deployment of one session of simulated trades, nothing made of it yet."""
    settings = replace(Settings.load({"SPYMASTER_DATA_DIR": str(root)}), simulated=True)
    write_market(settings.dbn_dir, settings.instrument, [calendar_of("SPY").session(key)], 11)
    return replace(settings, first_session=key, last_session=key)


@pytest.fixture
def made(tmp_path: Path) -> Settings:
    """A deployment whose session assets are made."""
    settings = simulated(tmp_path, KEY)
    rebuild(settings, SESSION_ASSETS, KEY)
    return settings


def test_a_replay_compares_all_that_is_known_of_a_registration(made: Settings) -> None:
    store, at_ns = ArtifactStore(made.root), OPENS_NS + 200 * MINUTE_NS
    honest = store.load("market_files", KEY)
    raw = honest.json("files.json")
    front = {**raw["front"], "instrument_id": 99, "rolled_from": "ESH4"}
    minutes = [f"{KEY}T15:00:00Z", *raw["missing_regular_minutes"]]
    forged = {**raw, "first_ns": raw["first_ns"] + 1, "missing_regular_minutes": minutes, "front": front}
    for fields, rows in (
        ((), set()),
        (("first_ns",), {"first_ns"}),
        (("front",), {"instrument_id"}),
        (("missing_regular_minutes",), {"missing minute"}),
    ):
        files = {"files.json": dump_json(raw | {f: forged[f] for f in fields})}
        store.publish("market_files", KEY, files, inputs=honest.inputs)
        found = replay_session(made, KEY, at_ns, "cut").differences
        assert {(d.asset, d.row) for d in found if d.column == "value"} >= {("market_files", r) for r in rows}
        assert bool(found) is bool(rows), fields


def test_an_asset_that_needs_its_future_is_a_difference_and_ends_nothing(
    made: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = levels_module.key_levels

    def whole_day(start_ns, context, history, session, settings, dollar):  # type: ignore[no-untyped-def]
        assert start_ns[-1] > session.regular_close_ns - 60 * MINUTE_NS, "needs the whole day"
        return honest(start_ns, context, history, session, settings, dollar)

    monkeypatch.setattr(levels_module, "key_levels", whole_day)
    replays = prove(made, [KEY], [], cuts=4)
    failed = [r for r in replays if r.differences]
    assert failed
    assert len(failed) < len(replays) == 4
    for replay in failed:
        (found,) = replay.differences
        assert (found.asset, replay.nearest) == ("levels", {"levels": None})
        assert found.replayed.startswith("could not be made")
        assert "needs the whole day" in found.replayed
        assert replay.compared["ohlcv_bars"] > 0
        assert not {"signals", "sequence_dataset"} & set(replay.compared)
    judged = verdicts(replays)
    assert not judged["levels", KEY].holds
    assert judged["ohlcv_bars", KEY].holds


def test_models_without_canaries_are_replayed_and_what_was_not_tried_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(Settings.load({"SPYMASTER_DATA_DIR": str(tmp_path)}), first_session=KEY, last_session=KEY)
    store = ArtifactStore(tmp_path)
    for asset in ("split_manifest", "tree_bundles"):
        store.publish(asset, KEY, {"a.json": dump_json({"n": 1})})
    store.publish("canaries", "2024-02-02", {"a.json": dump_json({})})
    assert provable_asofs(store) == [KEY]

    def same(shadow: Settings, assets: Sequence[str], key: str) -> None:
        assert list(assets) == ["split_manifest", "tree_bundles"]
        for asset in assets:
            ArtifactStore(shadow.root).publish(asset, key, {"a.json": dump_json({"n": 1})})

    monkeypatch.setattr(replay_module, "rebuild", same)
    absent, altered = (replay_models(settings, KEY, later) for later in ("absent", "altered"))
    assert set(absent.compared) == {"split_manifest", "tree_bundles"}
    assert absent.differences == ()
    assert f"canaries [{KEY}]: not stored" in absent.untried
    assert (altered.compared, len(altered.untried)) == ({}, 1), "without a later session there is none to alter"
    verdict = verdicts([absent, altered])["tree_bundles", KEY]
    assert (verdict.holds, verdict.replays, dict(verdict.futures)) == (True, 1, {"later sessions absent": 1})
    assert "not tried: later sessions altered" in verdict.description
    with pytest.raises(MissingInputError, match="no stored split and model"):
        prove(settings, [], ["2024-02-02"], 2)


def test_a_green_check_that_compared_nothing_says_so(made: Settings) -> None:
    (replay,) = prove(made, [KEY], [], cuts=1)
    assert verdicts([replay])["book_snapshots", KEY].description.startswith("not tried")
    assert "values compared" in verdicts([replay])["levels", KEY].description


@pytest.mark.parametrize("key", ["2024-03-11", "2024-11-29"], ids=["DST change", "half day"])
def test_an_odd_session_holds(tmp_path: Path, key: str) -> None:
    settings = simulated(tmp_path, key)
    rebuild(settings, SESSION_ASSETS, key)
    session = calendar_of("SPY").session(key)
    replays = prove(settings, [key], [], cuts=8, seed=1)
    assert [str(d) for r in replays for d in r.differences] == []
    assert {r.future for r in replays} == {*FUTURES}
    assert any(r.at_ns == session.regular_close_ns - 1 for r in replays)
    assert sum(r.compared["signals"] for r in replays) > 1_000


@pytest.mark.parametrize("republished", [1, 3], ids=["kept", "swept"])
def test_what_is_lent_is_of_one_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, republished: int) -> None:
    store = ArtifactStore(tmp_path / "store")
    store.publish("signals", KEY, {"a.json": dump_json({"n": 0})})
    honest = ArtifactStore.require

    def overtaken(self: ArtifactStore, asset: str, keys: Sequence[str]) -> list[Artifact]:
        handles = honest(self, asset, keys)
        for n in range(1, republished + 1):
            self.publish(asset, KEY, {"a.json": dump_json({"n": n})})
        return handles

    monkeypatch.setattr(ArtifactStore, "require", overtaken)
    lend(store, tmp_path / "shadow", "signals", [KEY])
    assert ArtifactStore(tmp_path / "shadow").load("signals", KEY).json("a.json")["n"] == (0 if republished == 1 else 3)


@pytest.mark.parametrize("change", ["settings", "file"])
def test_what_is_stale_is_told_as_stale_and_not_as_look_ahead(made: Settings, change: str) -> None:
    now = made
    if change == "settings":
        now = replace(made, label=replace(made.label, mode="volatility"))
    else:
        session = calendar_of("SPY").session(KEY)
        write_market(made.dbn_dir, made.instrument, [session], 12)
    replays = prove(now, [KEY], [], cuts=6)
    assert {r.future for r in replays if r.differences} == {UNALTERED}
    told = [r.told(d) for r in replays for d in r.differences]
    assert all("no look-ahead but stale" in t for t in told)
    first = "signals" if change == "settings" else "market_files"
    assert f"dagster asset materialize --select '{first}+' --partition {KEY}" in told[0]


def test_labels_of_sequences_and_the_facts_of_levels_are_compared(made: Settings, tmp_path: Path) -> None:
    store, other = ArtifactStore(made.root), ArtifactStore(tmp_path / "other")
    sequences, levels = (store.load(a, KEY) for a in ("sequence_dataset", "levels"))
    name = f"sequence_dataset_{KEY}.npz"
    arrays = from_npz_bytes(sequences.read(name))
    complete_ns = int(arrays["ts_ns"][0]) + (8 + 8) * MINUTE_NS
    for array in ("y_break", "y_strength", "seq_feature_names"):
        forged = {**arrays, array: arrays[array].copy()}
        forged[array][0] = "other" if array == "seq_feature_names" else 7
        again = other.publish("sequence_dataset", KEY, {name: to_npz_bytes(forged)})
        found, _ = differences(sequences, again, complete_ns, CONTRACT)
        assert [d.column for d in found] == ["name" if array == "seq_feature_names" else array]
        if array != "seq_feature_names":
            assert differences(sequences, again, complete_ns - 1, CONTRACT)[0] == []
    files = levels.contents()
    forged_levels = dump_json({**levels.json("levels.json"), "warmup_sigma": 9.5})
    again = other.publish("levels", KEY, {**files, "levels.json": forged_levels})
    assert differences(levels, again, OPENS_NS - 1, CONTRACT)[0] == []
    assert [d.row for d in differences(levels, again, OPENS_NS, CONTRACT)[0]] == ["warmup_sigma"]


def test_what_is_known_when_a_bar_starts_is_compared_before_it_has_ended(made: Settings, tmp_path: Path) -> None:
    store, other = ArtifactStore(made.root), ArtifactStore(tmp_path / "other")
    levels, sequences = (store.load(a, KEY) for a in ("levels", "sequence_dataset"))
    frame = levels.frame("levels.parquet")
    start_ns = int(frame["start_ns"][-1])
    last = pl.col("start_ns") == start_ns
    first = last & last.is_first_distinct()
    files = levels.contents()
    for forged, column in (
        (
            frame.with_columns(
                pl.when(first).then(pl.col("level_price_e9") + 1).otherwise("level_price_e9").alias("level_price_e9")
            ),
            "level_price_e9",
        ),
        (frame.filter(~first), "level_kind"),
        (frame.filter(~last), None),  # the bar may not be
    ):
        again = other.publish("levels", KEY, {**files, "levels.parquet": parquet_bytes(forged)})
        found = [d.column for d in differences(levels, again, start_ns, CONTRACT)[0]]
        assert found[:1] == ([column] if column else [])
        assert differences(levels, again, start_ns - 1, CONTRACT)[0] == []
        assert differences(levels, again, start_ns + MINUTE_NS, CONTRACT)[0] != []
    name = f"sequence_dataset_{KEY}.npz"
    arrays = from_npz_bytes(sequences.read(name))
    t0_ns, statics = int(arrays["ts_ns"][-1]), arrays["static_feature_names"].tolist()
    for array, at, column, after_s in (
        ("X", (-1, -2, 0), "X[:, :-1]", 0),
        ("X", (-1, -1, 0), "X[:, -1]", 60),
        ("static", (-1, statics.index("sma_200_slope")), "static sma_200_slope", 0),
        ("static", (-1, statics.index("distance")), "static distance", 60),
    ):
        changed = arrays[array].copy()
        changed[at] = 7
        again = other.publish("sequence_dataset", KEY, {name: to_npz_bytes({**arrays, array: changed})})
        known_ns = t0_ns + after_s * NS
        assert [d.column for d in differences(sequences, again, known_ns, CONTRACT)[0]] == [column]
        assert differences(sequences, again, known_ns - 1, CONTRACT)[0] == []


def test_labels_are_compared_from_when_their_row_says_that_they_are_known(made: Settings, tmp_path: Path) -> None:
    """A split purges by what the row says: a time that comes too early is look-ahead, however late the contract has the column."""
    store, other = ArtifactStore(made.root), ArtifactStore(tmp_path / "other")
    name = f"signals_{KEY}.parquet"
    signals = signals_from_parquet(store.load("signals", KEY).read(name), CONTRACT)
    decided_ns = int(signals.frame["decision_ns"].max())  # type: ignore[arg-type]
    last = pl.col("decision_ns") == decided_ns
    early = signals.frame.with_columns(
        pl.when(last).then("decision_ns").otherwise("label_known_ns").alias("label_known_ns")
    )
    for frame, columns in ((signals.frame, set()), (early, {"strength_signed_4min"})):
        moved = frame.with_columns(
            pl.when(last).then(7.5).otherwise("strength_signed_4min").alias("strength_signed_4min"),
        )
        one, two = (
            store_.publish("signals", KEY, {name: signals_to_parquet(replace(signals, frame=f))})
            for store_, f in ((ArtifactStore(tmp_path / "one"), frame), (other, moved))
        )
        assert {d.column for d in differences(one, two, decided_ns, CONTRACT)[0]} == columns


def test_figures_of_the_whole_day_are_compared_once_it_is_over(made: Settings, tmp_path: Path) -> None:
    store, closes_ns = ArtifactStore(made.root), calendar_of("SPY").session(KEY).regular_close_ns
    name = f"signals_{KEY}.parquet"
    stored = store.load("signals", KEY)
    signals = signals_from_parquet(stored.read(name), CONTRACT)
    rates = {
        **signals.metadata["base_rates"],
        "dollars": {**signals.metadata["base_rates"]["dollars"], "4min": {"n": 1}},
    }
    shares = {**signals.metadata["null_share"], "atr": 0.5}
    for metadata, row, known_ns in (
        ({"base_rates": rates}, "base rate, dollars, 4min", closes_ns),
        ({"null_share": shares}, "null share of atr", closes_ns + 4 * MINUTE_NS),
    ):
        forged = replace(signals, metadata={**signals.metadata, **metadata})
        again = ArtifactStore(tmp_path / "other").publish("signals", KEY, {name: signals_to_parquet(forged)})
        assert [d.row for d in differences(stored, again, known_ns, CONTRACT)[0]] == [row]
        assert differences(stored, again, known_ns - 1, CONTRACT)[0] == []


def test_a_file_that_only_the_replay_holds_is_a_difference(made: Settings, tmp_path: Path) -> None:
    basis = pl.DataFrame({"ts_ns": [OPENS_NS], "n": [1]})
    stored = ArtifactStore(made.root).load("option_flow", KEY)
    assert "flow.parquet" not in stored.files
    files = {"flow.parquet": parquet_bytes(basis), **stored.contents()}
    again = ArtifactStore(tmp_path / "other").publish("option_flow", KEY, files)
    found, _ = differences(stored, again, OPENS_NS + 1, CONTRACT)
    assert [(d.column, d.stored) for d in found] == [("flow.parquet", "missing")]
    assert differences(stored, again, OPENS_NS, CONTRACT)[0] == []
