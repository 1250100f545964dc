"""A small asset graph: plain functions that depend on each other by parameter name, rebuilt in process or through Dagster."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from spymaster_assets.proof.detect import Inputs
from spymaster_assets.proof.known import KnownTable

CLASSES = (
    "features",
    "labels",
    "splits",
    "scaling",
    "calibration",
    "neighbours",
    "joins",
    "resampling",
    "calendars",
    "cached artifacts",
    "early stopping",
    "selection",
)
Node = Callable[..., KnownTable]


@dataclass(frozen=True)
class Graph:
    """Assets in upstream order. `kind` is one of CLASSES, or 'honest'; `planted` names the leaky asset, None in an honest graph."""

    name: str
    kind: str
    nodes: Mapping[str, Node]
    planted: str | None
    about: str

    def rebuild(self, inputs: Inputs, strict: bool = False) -> dict[str, KnownTable]:
        """All tables from nothing but the inputs. An asset that fails is left out with all that needs it, unless `strict`."""
        made: dict[str, Any] = {name: table.frame for name, table in inputs.items()}
        for name, node in self.nodes.items():
            needs = parents(node)
            if all(p in made for p in needs):
                try:
                    made[name] = node(*(made[p] for p in needs))
                except Exception:  # what an altered input does to an asset is any error at all
                    if strict:
                        raise
        return {name: made[name] for name in self.nodes if name in made}

    def definitions(self, inputs: Inputs) -> dg.Definitions:
        """The same graph as Dagster assets; inputs are assets too, tables are passed in memory."""
        sources = [_asset(name, lambda frame=table.frame: frame) for name, table in inputs.items()]
        assets = [_asset(name, node) for name, node in self.nodes.items()]
        return dg.Definitions([*sources, *assets], resources={"io_manager": dg.mem_io_manager})


def parents(node: Node) -> list[str]:
    """Names of the assets that a node reads."""
    return [p.name for p in inspect.signature(node).parameters.values() if p.default is p.empty]


def _asset(name: str, node: Callable[..., Any]) -> dg.AssetsDefinition:
    needs = parents(node)

    def compute(**tables: Any) -> Any:
        return node(*(tables[p] for p in needs))

    return dg.asset(name=name, ins={p: dg.AssetIn(p) for p in needs})(compute)


CATALOGUE: dict[str, Graph] = {}


def leak(kind: str, base: Mapping[str, Node], at: str) -> Callable[[Node], Node]:
    """Plant the decorated function as asset `at` of a graph that is honest otherwise."""

    def plant(node: Node) -> Node:
        keep(Graph(node.__name__, kind, {**base, at: node}, at, inspect.getdoc(node) or ""))
        return node

    return plant


def honest(base: Mapping[str, Node], at: str) -> Callable[[Node], Node]:
    """Put the decorated function into a graph as asset `at`, without a leak."""

    def put(node: Node) -> Node:
        keep(Graph(node.__name__, "honest", {**base, at: node}, None, inspect.getdoc(node) or ""))
        return node

    return put


def keep(graph: Graph) -> None:
    """Put a graph into the catalogue under its own name."""
    assert graph.name not in CATALOGUE, graph.name
    CATALOGUE[graph.name] = graph


def at_end(frame: pl.DataFrame, time: str = "end_ns") -> KnownTable:
    """Rows known at the time that one of their columns holds."""
    return KnownTable(frame, frame[time].to_numpy().astype(np.int64), name=time)


def fitted(asof_ns: int, **values: Any) -> KnownTable:
    """What was fitted, as bytes known at the as-of time: raw bytes, or numbers, lists and text as JSON."""
    files = {k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in values.items()}
    return KnownTable.fitted(files, asof_ns)


def read(table: KnownTable) -> dict[str, Any]:
    """Inverse of `fitted`; lists become arrays, raw bytes stay."""
    out: dict[str, Any] = {}
    for name, content in table.frame.select("file", "content").iter_rows():
        if name.endswith("_raw"):
            out[name] = content
        else:
            value = json.loads(content)
            out[name] = np.asarray(value) if isinstance(value, list) else value
    return out
