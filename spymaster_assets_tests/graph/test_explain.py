"""An event explained and rederived: what is told is what the store and the files hold, and what was tampered with shows."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zstandard
from rich.console import Console

from spymaster_assets.automation.rederive import _predictions, rederive
from spymaster_assets.cli import main
from spymaster_assets.contract import load_contract
from spymaster_assets.datasets.splits import read_split
from spymaster_assets.errors import ConfigError, ContractError, MarketDataError, MissingInputError
from spymaster_assets.market.dbn import file_sha256, read_header, read_records
from spymaster_assets.partitions import SESSION_ASSETS, scheduled_asof
from spymaster_assets.proof import lineage as lineage_module
from spymaster_assets.proof import records as records_module
from spymaster_assets.proof.bits import Check
from spymaster_assets.proof.explain import Explanation, explain
from spymaster_assets.proof.records import Window, record_ranges
from spymaster_assets.proof.show import tree
from spymaster_assets.settings import NS, Settings
from spymaster_assets.signals.build import SignalSet, read_signals, signals_to_parquet
from spymaster_assets.store import ArtifactStore
from spymaster_assets_tests.graph.conftest import Demo


def judged_event(demo: Demo, asof: str) -> str:
    """The judged event of the fold's first test session with most predictions, an early one among equals."""
    said = predictions(demo, asof).filter(pl.col("session") == asof)
    return str(said["event_id"].value_counts().sort(["count", "event_id"], descending=[True, False])["event_id"][0])


def predictions(demo: Demo, asof: str) -> pl.DataFrame:
    return demo.store.load("calibration_report", asof).frame("predictions.parquet")


@pytest.fixture(scope="module")
def asof(demo: Demo) -> str:
    return scheduled_asof(demo.settings)[-1]


@pytest.fixture(scope="module")
def explained(demo: Demo, asof: str) -> Explanation:
    return explain(demo.settings, judged_event(demo, asof))


@pytest.fixture
def copied(demo: Demo, tmp_path: Path) -> Settings:
    """The demo's settings on a copy of its artifacts and input by hard links: a test may replace files, not write into them."""
    for name in (*{p.parent.parent.name for p in demo.root.glob("*/*/manifest.json")}, "dbn"):
        shutil.copytree(demo.root / name, tmp_path / name, copy_function=os.link)
    return replace(demo.settings, root=tmp_path, dbn_dir=tmp_path / "dbn")


def replaced(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def test_predictions_are_those_of_the_report_and_follow_from_their_parts(
    demo: Demo, asof: str, explained: Explanation
) -> None:
    (fold,) = explained.folds
    rows = predictions(demo, asof).filter(pl.col("event_id") == explained.event.event_id)
    told = {(p.model, p.head, p.delay, p.stage): (p.p, p.reference, p.y) for p in fold.predictions}
    columns = ["model", "head", "delay", "stage", "p", "reference", "y"]
    assert told == {tuple(r[:4]): tuple(r[4:]) for r in rows.select(columns).iter_rows()}
    trees = [p for p in fold.predictions if p.model == "trees"]
    assert trees
    for p in trees:
        parts = p.contributions
        assert parts is not None
        total = parts.bias + parts.rest + sum(f.contribution for f in parts.features)
        assert total == pytest.approx(parts.total, abs=1e-9)
        said = total if p.head == "strength" else 1 / (1 + math.exp(-total))
        assert said == pytest.approx(p.p, abs=1e-5)
        assert all(f.known_ns <= p.decision_ns for f in parts.features)
    weights = {o: sum(n.weight for n in fold.neighbours if n.outcome == o) for o in ("BREAK", "BOUNCE")}
    retrieval = next(p for p in fold.predictions if (p.model, p.head) == ("retrieval", "tradeable_2"))
    assert retrieval.p == pytest.approx(sum(weights.values()))
    assert all(n.date < asof for n in fold.neighbours)
    assert [n.distance for n in fold.neighbours] == sorted(n.distance for n in fold.neighbours)


def test_the_models_are_the_stored_ones_and_learned_nothing_from_the_future(
    demo: Demo, asof: str, explained: Explanation
) -> None:
    (fold,) = explained.folds
    for model in fold.models:
        stored = demo.store.load(model.asset, asof)
        assert (model.sha256, model.version, model.runs) == (stored.sha256, stored.folder.name, dict(stored.metadata))
        assert {"mlflow_run_id", "wandb_run_id"} <= set(model.runs)
    split = read_split(demo.store, asof)[0]
    frames = {k: read_signals(demo.store, k)[0].frame for k in (*split.train, *split.validation, *split.test)}
    used = pl.concat(frames[k] for k in (*split.train, *split.validation))
    used = used.filter(~pl.col("event_id").is_in([p["event_id"] for p in split.purged]))
    training = fold.training
    assert training is not None
    assert sum(training.rows.values()) == used.height
    assert (training.first_date, training.last_date) == (split.train[0], split.validation[-1])
    assert training.latest_label_known_ns == used["label_known_ns"].max()
    assert training.first_test_decision_ns == frames[asof]["decision_ns"].min()
    assert training.none_from_the_future


def test_the_row_is_told_whole_and_where_it_lies(demo: Demo, explained: Explanation) -> None:
    at = explained.signal_row
    row = pl.read_parquet(at.path).row(at.first_row, named=True)
    assert row["event_id"] == explained.event.event_id
    assert {v.column: v.value for v in explained.values} == row
    for value, column in zip(explained.values, load_contract().columns, strict=True):
        assert (value.column, value.unit, value.feeds) == (column.name, column.unit, column.feeds)
        assert value.known_ns == row["ts_ns"] + column.known_after_s * NS
    sequence = explained.sequence_row
    assert sequence is not None
    with np.load(sequence.path, allow_pickle=False) as arrays:
        assert arrays["event_id"][sequence.first_row] == explained.event.event_id
    assert len({b.key for b in explained.bars}) == demo.settings.signal.sma_warmup_sessions + 1
    for rows in explained.bars:
        bars = pl.read_parquet(rows.path)
        chosen = bars[rows.first_row : rows.last_row + 1]
        assert chosen["end_ns"].max() <= explained.event.decision_ns  # type: ignore[operator]
        same = bars.filter(
            "is_front",
            pl.col("timeframe_min") == chosen["timeframe_min"][0],
            pl.col("end_ns") <= explained.event.decision_ns,
        )
        assert chosen.equals(same)


def test_record_ranges_are_exactly_the_records_of_their_times(demo: Demo, explained: Explanation) -> None:
    kinds = set()
    for file in explained.files:
        path = demo.settings.dbn_dir / file.name
        assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert file.state == "equal"
        kinds.add((file.feed, file.schema))
        if file.schema not in ("trades", "mbp-10"):
            continue
        records = read_records(path)
        times = records["ts_recv"].astype(np.int64)
        raw = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(path.read_bytes())
        for r in file.ranges:
            inside = (times >= r.start_ns) & (times < r.end_ns)
            assert r.first is not None
            assert r.last is not None
            assert np.flatnonzero(inside).tolist() == list(range(r.first, r.last + 1)), (file.name, r.use)
            assert r.records == inside.sum()
            assert raw[r.first_byte : r.end_byte] == records[r.first : r.last + 1].tobytes()
    assert kinds == {
        ("tape", "trades"),
        ("book", "mbp-10"),
        ("options", "trades"),
        ("options", "definition"),
        ("options", "cmbp-1"),
    }
    tape = {r.use: r for r in explained.files[0].ranges}
    values = {v.column: v.value for v in explained.values}
    assert tape["tape window"].of_contract == values["tape_trade_count"]


@pytest.mark.parametrize("schema", ["trades", "mbp-10"])
def test_record_ranges_over_chunks(demo: Demo, monkeypatch: pytest.MonkeyPatch, schema: str) -> None:
    path = sorted(demo.settings.dbn_dir.glob(f"spy-2*.{schema}.dbn.zst"))[0]
    records = read_records(path)[:3000]
    times = records["ts_recv"].astype(np.int64)
    rng = np.random.default_rng(4)
    edges = np.sort(rng.choice(times, (40, 2)) + rng.integers(-1, 2, (40, 2)), axis=1)
    windows = [Window(str(n), int(a), int(b)) for n, (a, b) in enumerate(edges)]
    front = int(records["instrument_id"][0])
    monkeypatch.setattr(records_module, "_CHUNK_RECORDS", 7)
    for window, found in zip(windows, record_ranges(path, windows, front), strict=True):
        inside = np.flatnonzero((times >= window.start_ns) & (times < window.end_ns))
        assert found.records == len(inside)
        assert (found.first, found.last) == ((int(inside[0]), int(inside[-1])) if len(inside) else (None, None))
        assert found.of_contract == (records["instrument_id"][inside] == front).sum()


def test_every_link_of_the_chain_is_equal(demo: Demo, explained: Explanation) -> None:
    assert not explained.broken
    assert not explained.faults
    hops = {(link.asset, link.kind) for link in explained.links}
    path = (
        "calibration_report",
        "tree_bundles",
        "split_manifest",
        "signals",
        "levels",
        "ohlcv_bars",
        "market_files",
        "file",
    )
    assert set(pairwise(path)) <= hops
    files = {link.input: link.recorded for link in explained.links if link.kind == "file"}
    for name, sha256 in files.items():
        assert hashlib.sha256((demo.settings.dbn_dir / name).read_bytes()).hexdigest() == sha256
    dates = {read_header(demo.settings.dbn_dir / n).start_ns for n in files}
    train = read_split(demo.store, explained.folds[0].asof)[0].train
    assert len(dates) > len(train), "training sessions are in the chain"


def test_a_training_row_names_the_models_that_learned_from_it(demo: Demo) -> None:
    first, last = scheduled_asof(demo.settings)
    both = [set(read_split(demo.store, k)[0].train) for k in (first, last)]
    key = min(set.intersection(*both))
    event_id = str(read_signals(demo.store, key)[0].frame["event_id"][0])
    found = explain(demo.settings, event_id)
    assert [(u.asof, u.part, u.inputs_equal) for u in found.uses] == [(first, "train", True), (last, "train", True)]
    assert all(len(u.models) == 3 for u in found.uses)
    assert not found.folds
    assert {link.asset for link in found.links} >= {"tree_bundles", "patchtst_model", "retrieval_index"}
    assert [u.asof for u in explain(demo.settings, event_id, [last]).uses] == [last]
    with pytest.raises(ConfigError, match="2020-01-02"):
        explain(demo.settings, event_id, ["2020-01-02"])


def alter_levels(settings: Settings, found: Explanation) -> tuple[str, str]:
    artifact = ArtifactStore(settings.root).load("levels", found.event.session)
    replaced(artifact.path("context.parquet"), artifact.read("context.parquet")[:-1] + b"x")
    return "altered", f"materialize levels [{found.event.session}]"


def forge_a_manifest(settings: Settings, found: Explanation) -> tuple[str, str]:
    artifact = ArtifactStore(settings.root).load("spot_basis", found.event.session)
    path = artifact.folder.parent / "manifest.json"
    replaced(path, path.read_bytes().replace(artifact.sha256.encode(), b"0" * 64))
    return "altered", f"materialize spot_basis [{found.event.session}]"


def remake_a_training_session(settings: Settings, found: Explanation) -> tuple[str, str]:
    key = found.folds[0].train[0]
    republish(ArtifactStore(settings.root), key, lambda frame: frame[1:])
    return "stale", f"--select split_manifest --partition {found.folds[0].asof}"


def lose_the_trees(settings: Settings, found: Explanation) -> tuple[str, str]:
    shutil.rmtree(settings.root / "tree_bundles" / found.folds[0].asof)
    return "missing", f"--select tree_bundles --partition {found.folds[0].asof}"


def change_a_dbn_file(settings: Settings, found: Explanation) -> tuple[str, str]:
    path = settings.dbn_dir / found.files[0].name
    replaced(path, path.read_bytes() + b"\0")
    return "changed", "put the file back"


def name_a_file_outside(settings: Settings, found: Explanation) -> tuple[str, str]:
    key = found.event.session
    path = settings.root / "spot_basis" / key / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["inputs"] |= dict.fromkeys(("/proc/self/mem", "../dagster.dbn", "a/../../b.dbn.zst"), "0" * 64)
    replaced(path, json.dumps(manifest).encode())
    return "altered", f"--select spot_basis --partition {key}"


def republish(store: ArtifactStore, key: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    signals, artifact = read_signals(store, key)
    data = signals_to_parquet(SignalSet(change(signals.frame), signals.metadata))
    store.publish("signals", key, {f"signals_{key}.parquet": data}, inputs=artifact.inputs)


@pytest.mark.parametrize(
    "tamper",
    [
        alter_levels,
        forge_a_manifest,
        remake_a_training_session,
        lose_the_trees,
        change_a_dbn_file,
        name_a_file_outside,
    ],
)
def test_a_tampered_link_is_shown_with_its_remedy(
    copied: Settings,
    explained: Explanation,
    tamper: Callable[[Settings, Explanation], tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def inside(path: Path) -> str:
        assert path.resolve().parent == copied.dbn_dir, "no file outside the folder is opened"
        return file_sha256(path)

    monkeypatch.setattr(lineage_module, "file_sha256", inside)
    state, remedy = tamper(copied, explained)
    found = explain(copied, explained.event.event_id)
    assert {link.state for link in found.broken} == {state}
    assert any(remedy in link.remedy for link in found.broken)
    out = io.StringIO()
    Console(file=out, width=100).print(tree(found))
    assert f"{len(found.broken)} broken" in out.getvalue()
    assert state in out.getvalue()
    said = {(p.model, p.head, p.delay, p.stage): p.p for p in found.folds[0].predictions}
    assert said == {(p.model, p.head, p.delay, p.stage): p.p for p in explained.folds[0].predictions}
    if tamper is change_a_dbn_file:
        with pytest.raises(MarketDataError, match=f"no longer what was registered: {explained.files[0].name}"):
            rederive(copied, found)


def test_files_that_came_later_are_told_and_touched_ones_are_not(copied: Settings, explained: Explanation) -> None:
    split = read_split(ArtifactStore(copied.root), explained.folds[0].asof)[0]
    own, trained = explained.event.session, split.train[-1]
    keys = [{link.key for link in explained.links if link.asset == a} for a in ("ohlcv_bars", "signals")]
    warmup = min(keys[0] - keys[1])
    book = next(copied.dbn_dir.glob(f"spy-{own.replace('-', '')}.mbp-10*"))
    replaced(book, book.read_bytes())
    assert not explain(copied, explained.event.event_id).broken
    (copied.dbn_dir / "late.mbp-10.dbn.zst").hardlink_to(book)
    (copied.dbn_dir / f"{trained}.csv.gz").write_bytes(b"")
    for schema in ("trades", "mbp-10"):
        early = next(copied.dbn_dir.glob(f"spy-{warmup.replace('-', '')}.{schema}*"))
        (copied.dbn_dir / f"warmup.{schema}.dbn.zst").hardlink_to(early)
    found = explain(copied, explained.event.event_id)
    late = {(link.key, link.input): link for link in found.broken}
    # of a session that only warms up its bars alone are read
    assert set(late) == {
        (own, "late.mbp-10.dbn.zst"),
        (trained, f"{trained}.csv.gz"),
        (warmup, "warmup.trades.dbn.zst"),
    }
    assert {(link.kind, link.state) for link in late.values()} == {("late file", "stale")}
    for (key, _), link in late.items():
        assert link.remedy == f"dagster asset materialize --select {','.join(SESSION_ASSETS)} --partition {key}"
    out = io.StringIO()
    Console(file=out, width=100).print(tree(found))
    assert "late.mbp-10.dbn.zst: came later" in out.getvalue()


def test_a_file_that_cannot_be_read_does_not_end_the_explanation(copied: Settings, explained: Explanation) -> None:
    path = copied.dbn_dir / explained.files[0].name
    path.unlink()
    path.symlink_to("/proc/self/mem")
    found = explain(copied, explained.event.event_id)
    assert {(link.input, link.state) for link in found.broken} == {(path.name, "unreadable")}
    assert all("mend the file" in link.remedy for link in found.broken)
    assert next(f for f in found.files if f.name == path.name).state == "unreadable"
    assert any(path.name in fault for fault in found.faults), "its folder cannot be looked through for late files"
    assert found.folds[0].predictions == explained.folds[0].predictions


def test_rows_that_are_gone_from_the_report_or_added_to_it_differ(
    copied: Settings, explained: Explanation, asof: str
) -> None:
    store, event = ArtifactStore(copied.root), explained.event
    report = store.load("calibration_report", asof)
    honest, unchanged = report.frame("predictions.parquet"), {n: report.read(n) for n in report.files}
    mine = pl.col("event_id") == event.event_id
    patchtst = honest.filter(mine, pl.col("model") == "patchtst")[:1]

    def checks(frame: pl.DataFrame) -> dict[str, Check]:
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        files = unchanged | {"predictions.parquet": buffer.getvalue()}
        store.publish("calibration_report", asof, files, inputs=report.inputs, metadata=report.metadata)
        made = _predictions(store, store, explained.folds[0], event.session, event.event_id, False, copied)
        return {c.what.rpartition(" ")[2]: c for c in made}

    gone = checks(honest.filter(~(mine & (pl.col("model") == "trees"))))
    assert [m for m, c in gone.items() if not c.equal] == ["trees"]
    assert gone["trees"].values == honest.filter(mine, pl.col("model") == "trees").height
    assert (gone["trees"].stored, gone["trees"].where.split()[-1]) == ("null", "p")
    one = checks(honest.filter(~(mine & (pl.col("model") == "patchtst") & (pl.col("head") == patchtst["head"][0]))))
    assert [m for m, c in one.items() if not c.equal] == ["patchtst"]
    added = checks(pl.concat([honest, patchtst.with_columns(model=pl.lit("forged"))]))
    assert [(m, c.rederived) for m, c in added.items() if not c.equal] == [("forged", "null")]
    twice = checks(pl.concat([honest, patchtst]))
    assert [c.where.split()[-1] for c in twice.values() if not c.equal] == ["rows"]
    other = checks(
        honest.with_columns(y=pl.when(mine & (pl.col("model") == "retrieval")).then(1.0 - pl.col("y")).otherwise("y"))
    )
    assert [m for m, c in other.items() if not c.equal] == ["retrieval"]


def test_rederived_from_the_files_everything_is_equal(demo: Demo, explained: Explanation) -> None:
    before = sorted(p.name for p in demo.root.iterdir())
    checks = {c.what: c for c in rederive(demo.settings, explained, refit=True)}
    assert [c for c in checks.values() if not c.equal] == []
    (fold,) = explained.folds
    told = {
        "signal row",
        "sequence row",
        f"predictions[{fold.asof}] trees",
        f"tree_bundles[{fold.asof}] refitted",
    }
    assert told <= set(checks)
    assert checks["signal row"].values == len(explained.values)

    def count(model: str) -> int:
        return len([p for p in fold.predictions if p.model == model])

    for model in {p.model for p in fold.predictions}:
        assert checks[f"predictions[{fold.asof}] {model}"].values == count(model)
    assert sorted(p.name for p in demo.root.iterdir()) == before


def test_one_planted_bit_in_the_stored_signals_is_found(
    copied: Settings, explained: Explanation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    event = explained.event
    store = ArtifactStore(copied.root)
    mine = pl.col("event_id") == event.event_id
    honest = next(v.value for v in explained.values if v.column == "atr")
    planted = float(np.nextafter(honest, 1e9))
    republish(store, event.session, lambda f: f.with_columns(atr=pl.when(mine).then(planted).otherwise("atr")))
    settings = replace(copied, root=copied.root)
    settings.write()
    monkeypatch.setenv("SPYMASTER_DATA_DIR", str(copied.root))
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["explain", event.event_id, "--rederive", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    row = next(c for c in told["rederived"] if c["what"] == "signal row")
    assert (row["equal"], row["where"]) == (False, "atr")
    assert (row["stored"], row["rederived"]) == tuple(
        np.float64(v).byteswap().tobytes().hex() for v in (planted, honest)
    )
    assert {link["state"] for link in told["links"]} == {"equal", "stale"}


def test_what_is_no_event_is_refused_with_what_is(demo: Demo, explained: Explanation) -> None:
    event_id = explained.event.event_id
    with pytest.raises(ContractError, match=r"is no event id; expected: SYMBOL_YYYY-MM-DD_KIND.* such as SPY_2024-"):
        explain(demo.settings, "nonsense")
    with pytest.raises(MissingInputError, match=f"nearest: {event_id}"):
        explain(demo.settings, event_id[:-10] + "1" + event_id[-9:])
    with pytest.raises(MissingInputError, match="no signals of session 2031-02-03"):
        explain(demo.settings, event_id.replace(explained.event.session, "2031-02-03"))
    with pytest.raises(ConfigError, match="bogus"):
        explain(demo.settings, event_id, heads=["bogus"])


def test_the_command_line(
    demo: Demo, explained: Explanation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPYMASTER_DATA_DIR", str(demo.root))
    monkeypatch.setenv("COLUMNS", "100")
    event_id = explained.event.event_id
    assert main(["explain", event_id]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert "…" not in shown, "nothing is cut off at 100 columns"
    for words in (event_id, "SIMULATED", "UTC", "New York", "no label from the future", "all equal", "tape window"):
        assert words in shown
    assert main(["explain", event_id, "--head", "trees", "4min", "A", "--values"]) == 0
    shown = capsys.readouterr().out
    assert "dist_to_sma_400_pct" in shown
    assert "time of" not in shown
    assert main(["explain", event_id, "--json", "--head", "retrieval"]) == 0
    told = json.loads(capsys.readouterr().out)
    (fold,) = told["folds"]
    assert {p["model"] for p in fold["predictions"]} == {"retrieval"}
    assert len(fold["neighbours"]) == len(explained.folds[0].neighbours)
    assert told["event"]["event_id"] == event_id
    assert main(["explain", event_id + "0"]) == 1
    said = capsys.readouterr().err
    assert "MissingInputError" in said
    assert event_id in said
