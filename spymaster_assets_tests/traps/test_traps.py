"""The detector on the catalogue: every class is there, leaks are found where they were planted, honest graphs are left alone."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import replace

import dagster as dg
import numpy as np
import polars as pl
import pytest

from spymaster_assets.proof.detect import FUTURES, EventTable, choose_cuts, find_leaks
from spymaster_assets.proof.known import KnownTable, compare
from spymaster_assets_tests.traps.catalogue import HONEST, LEAKY, Verdict, judge, table
from spymaster_assets_tests.traps.graphs import CATALOGUE, CLASSES, parents
from spymaster_assets_tests.traps.market import ASOF, SESSIONS, edges, inputs, opens_ns

CUTS, SWEEP = (int(n) for n in os.environ.get("SPYMASTER_TRAPS", "2,120").split(","))
"""Times with every future, and times with one: `make nightly` searches longer."""


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # altered inputs bring empty slices and constant columns
        return [judge(g, CUTS, SWEEP) for g in CATALOGUE.values()]


def test_every_class_has_its_members() -> None:
    counts = Counter(g.kind for g in LEAKY)
    assert set(counts) == set(CLASSES)
    assert min(counts.values()) >= 5
    assert len(LEAKY) >= 60
    assert len(HONEST) >= 30
    assert all(g.planted in g.nodes and 2 <= len(g.nodes) <= 7 and g.about for g in LEAKY)


def test_leaks_are_found_where_they_were_planted(verdicts: list[Verdict]) -> None:
    planted = [v for v in verdicts if v.graph.planted]
    found = [v for v in planted if v.asset]
    assert len(found) >= 0.99 * len(planted), table(verdicts)
    assert all(v.located for v in found), table(verdicts)


def test_honest_graphs_are_left_alone(verdicts: list[Verdict]) -> None:
    alarms = [
        f"{v.graph.name}: {v.search.findings[0].differences[0]}" for v in verdicts if not v.graph.planted and v.asset
    ]
    assert alarms == []
    assert all(v.search.compared > 100 for v in verdicts if not v.graph.planted)


@pytest.mark.parametrize(
    ("name", "blind"),
    [("volume_rank_of_day", "down"), ("corrected", "cut"), ("largest_of_all_time", "down"), ("whole_index", "none")],
)
def test_a_detector_that_tries_too_little_misses(name: str, blind: str) -> None:
    futures = {"none": lambda table, cut_ns, rng: table.frame.with_columns()}
    if blind in FUTURES:
        futures = {blind: FUTURES[blind]}
    assert judge(CATALOGUE[name], 12, 20, futures=futures).asset is None
    assert judge(CATALOGUE[name], 12, 60).located


def test_what_outlives_a_rebuild_hides_a_leak() -> None:
    """A limit that `Rebuild` states: a cache of the process gives every replay what the first run stored."""
    leaky, cache = CATALOGUE["next_bar_return"], {}

    def remembered(bars: KnownTable) -> KnownTable:
        return cache.setdefault("features", leaky.nodes["features"](bars))

    graph = replace(leaky, nodes={"bars": leaky.nodes["bars"], "features": remembered})
    assert judge(graph, 1, 4).asset is None
    assert judge(leaky, 1, 4).located


def test_a_leak_is_named_with_its_first_row_and_values() -> None:
    verdict = judge(CATALOGUE["next_bar_return"], 2, 30)
    first = verdict.search.findings[0].differences[0]
    assert (first.asset, first.column) == ("features", "flow")
    assert first.stored != first.replayed
    assert int(first.row) <= verdict.search.findings[0].cut_ns
    assert "features" in str(first)


@pytest.mark.parametrize(
    "name", ["pipeline_signals", "pipeline_stopped", "next_bar_return", "by_event_time", "survivors"]
)
def test_a_graph_is_the_same_through_dagster(name: str) -> None:
    graph = CATALOGUE[name]
    tables = {k: t for k, t in inputs().items() if k in {p for n in graph.nodes.values() for p in parents(n)}}
    definitions = graph.definitions(tables)
    result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=dg.DagsterInstance.ephemeral()
    )
    assert result.success
    direct = graph.rebuild(tables, strict=True)
    assert list(direct) == list(graph.nodes)
    for asset, made in direct.items():
        again = result.output_for_node(asset)
        assert compare(asset, name, made, again, 2**62) == ([], compare(asset, name, made, made, 2**62)[1])
        assert made.frame.height == again.frame.height > 0


@pytest.mark.parametrize("name", FUTURES)
def test_a_future_changes_what_follows_and_nothing_before(name: str) -> None:
    cut_ns = opens_ns(ASOF)
    changed = 0
    for given in inputs().values():
        altered = FUTURES[name](given, cut_ns, np.random.default_rng(1))
        before, after = given.split(cut_ns)
        assert altered.schema == given.frame.schema
        assert altered.filter(pl.col("recv_ns") < cut_ns).equals(before)
        assert altered["recv_ns"].is_sorted()
        changed += not altered.filter(pl.col("recv_ns") >= cut_ns).equals(after)
    assert changed >= 1


def test_late_records_keep_a_number_or_get_a_new_one() -> None:
    given, cut_ns = inputs()["trades"], opens_ns(ASOF)
    late = FUTURES["late"](given, cut_ns, np.random.default_rng(0)).filter(
        (pl.col("recv_ns") >= cut_ns) & (pl.col("event_ns") < cut_ns - 600_000_000_000)
    )
    last = int(given.frame["id"].max())  # type: ignore[arg-type]
    assert (late["id"] <= last).any()
    assert (late["id"] > last).any()


def test_cuts_are_distinct_and_of_every_kind() -> None:
    made = CATALOGUE["pipeline_model"].rebuild(inputs(), strict=True)
    cuts = choose_cuts(made.values(), edges(), 40, 3)
    assert len(cuts) == len(set(cuts)) == 40
    assert opens_ns(ASOF) in cuts  # when the fitted objects became known
    assert set(cuts) & set(made["features"].known_ns.tolist())
    assert set(cuts) & {s.regular_open_ns for s in SESSIONS}
    assert cuts == choose_cuts(made.values(), edges(), 40, 3) != choose_cuts(made.values(), edges(), 40, 4)


def known(values: list[float | None], known_ns: list[int], **later: list[int]) -> KnownTable:
    frame = pl.DataFrame({"t": known_ns, "v": values})
    return KnownTable(frame, np.array(known_ns), {k: np.array(v) for k, v in later.items()}, "t")


def test_only_what_was_known_is_compared() -> None:
    stored, other = known([1.0, 2.0, 3.0], [10, 20, 30]), known([1.0, 2.0, 9.0], [10, 20, 30])
    assert compare("a", "k", stored, other, 29) == ([], 4)
    found, _ = compare("a", "k", stored, other, 30)
    assert [(d.column, d.row, d.stored, d.replayed) for d in found] == [("v", "30", "3.0", "9.0")]


def test_rows_bits_types_and_columns_are_compared() -> None:
    stored = known([0.0, None], [10, 20])
    for other, column in (
        (known([-0.0, None], [10, 20]), "v"),
        (known([0.0, float("nan")], [10, 20]), "v"),
        (known([0.0], [10]), "t"),
        (known([0.0, None], [10, 15]), "t"),
        (replace(stored, frame=stored.frame.with_columns(pl.col("v").cast(pl.Float32))), "v"),
        (replace(stored, frame=stored.frame.with_columns(w=pl.lit(1))), "w"),
        (replace(stored, frame=stored.frame.drop("v")), "v"),
    ):
        found, _ = compare("a", "k", stored, other, 20)
        assert found, column
        assert found[0].column == column
    assert compare("a", "k", stored, None, 20)[0][0].replayed == "could not be made"
    assert compare("a", "k", stored, None, 9) == ([], 0)


def test_columns_have_times_of_their_own() -> None:
    stored, other = known([1.0, 2.0], [10, 20], v=[40, 50]), known([1.0, 7.0], [10, 20], v=[40, 50])
    assert compare("a", "k", stored, other, 49)[0] == []
    assert [d.row for d in compare("a", "k", stored, other, 50)[0]] == ["20"]
    earlier = known([1.0, 2.0], [10, 20], v=[40, 45])
    found, _ = compare("a", "k", stored, earlier, 47)
    assert [(d.stored, d.replayed) for d in found] == [("not yet known", "known")]


def test_fitted_objects_are_bytes_known_at_their_time() -> None:
    one, two = KnownTable.fitted({"m": b"1", "c": b"2"}, 5), KnownTable.fitted({"m": b"x", "c": b"2"}, 5)
    assert compare("model", "k", one, two, 4) == ([], 0)
    assert [d.row for d in compare("model", "k", one, two, 5)[0]] == ["m"]


def test_what_fails_without_the_future_is_a_difference() -> None:
    given = EventTable(pl.DataFrame({"recv_ns": [1, 2, 3], "event_ns": [1, 2, 3]}))

    def rebuild(tables: dict[str, EventTable]) -> dict[str, KnownTable]:
        frame = tables["t"].frame
        return {"a": KnownTable(frame, frame["recv_ns"].to_numpy() + 1)} if frame.height == 3 else {}

    search = find_leaks(rebuild, {"t": given}, [3], futures={"cut": FUTURES["cut"]})  # type: ignore[arg-type]
    assert search.asset(["a"]) == "a"
    assert search.findings[0].differences[0].replayed == "could not be made"
