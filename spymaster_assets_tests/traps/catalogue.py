"""All graphs of the catalogue, and what the detector makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from spymaster_assets.evaluation.metrics import wilson
from spymaster_assets.proof.cutting import FUTURES as PROVED
from spymaster_assets.proof.detect import FUTURES, Alteration, Search, choose_cuts, find_leaks, known_times
from spymaster_assets_tests.traps import honest, planted_data, planted_learning  # noqa: F401  (they fill the catalogue)
from spymaster_assets_tests.traps.graphs import CATALOGUE, CLASSES, Graph, parents
from spymaster_assets_tests.traps.market import edges, inputs

LEAKY: tuple[Graph, ...] = tuple(g for g in CATALOGUE.values() if g.planted)
HONEST: tuple[Graph, ...] = tuple(g for g in CATALOGUE.values() if not g.planted)


@dataclass(frozen=True)
class Verdict:
    """What a search of one graph found, and the asset that it points at."""

    graph: Graph
    search: Search
    asset: str | None

    @property
    def located(self) -> bool:
        """The leak was found, and where it was planted."""
        return self.asset is not None and self.asset == self.graph.planted


def judge(graph: Graph, cuts: int, sweep: int, seed: int = 0, futures: Mapping[str, Alteration] = FUTURES) -> Verdict:
    """Search one graph with every future at `cuts` times and one future at the edges and `sweep` more, up to the first difference."""
    read = {p for node in graph.nodes.values() for p in parents(node)}
    tables = {name: table for name, table in inputs().items() if name in read}
    made = list(graph.rebuild(tables, strict=True).values())
    rng = np.random.default_rng(seed)
    every = np.unique(np.concatenate([table.times() for table in made]))
    search = find_leaks(
        graph.rebuild,
        tables,
        choose_cuts(made, edges(), cuts, seed),
        [*edges(), *known_times(every, sweep, rng).tolist()],
        futures=futures,
        seed=seed,
        until_found=True,
    )
    return Verdict(graph, search, search.asset(list(graph.nodes)))


def judge_as_prove(graph: Graph, cuts: int, seed: int = 0) -> Verdict:
    """Search one graph as `spymaster prove` searches a session: one future at each of `cuts` times, of those that it has."""
    read = {p for node in graph.nodes.values() for p in parents(node)}
    tables = {name: table for name, table in inputs().items() if name in read}
    made = list(graph.rebuild(tables, strict=True).values())
    turns = [f if f in FUTURES else "renamed" for f in PROVED]
    times = choose_cuts(made, edges(), cuts, seed)
    search = find_leaks(graph.rebuild, tables, [], times, turns=turns, seed=seed, until_found=True)
    return Verdict(graph, search, search.asset(list(graph.nodes)))


def rate(hits: int, of: int) -> str:
    """A rate with its 95 % Wilson interval."""
    low, high = wilson(hits / of, of)
    return f"{hits} of {of}: {100 * hits / of:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def table(verdicts: Iterable[Verdict]) -> str:
    """Lines a class: planted, found, located; then the honest ones, and all rates."""
    verdicts = list(verdicts)
    planted = [v for v in verdicts if v.graph.planted]
    honest_ones = [v for v in verdicts if not v.graph.planted]
    lines = [f"{'class':<18}{'planted':>8}{'found':>8}{'located':>9}"]
    for kind in CLASSES:
        part = [v for v in planted if v.graph.kind == kind]
        lines.append(
            f"{kind:<18}{len(part):>8}{sum(v.asset is not None for v in part):>8}{sum(v.located for v in part):>9}"
        )
    lines.append(f"detected           {rate(sum(v.asset is not None for v in planted), len(planted))}")
    lines.append(f"at the right asset {rate(sum(v.located for v in planted), len(planted))}")
    lines.append(f"false alarms       {rate(sum(v.asset is not None for v in honest_ones), len(honest_ones))}")
    for v in verdicts:
        if (v.graph.planted and not v.located) or (not v.graph.planted and v.asset):
            what = "missed" if v.asset is None else str(v.search.findings[0].differences[0])
            lines.append(f"  {v.graph.kind}: {v.graph.name} (planted at {v.graph.planted}): {what}")
    return "\n".join(lines)
