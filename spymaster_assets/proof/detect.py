"""Look-ahead in any graph of tables: rebuild it with another future of its input, and compare what was known before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest

import numpy as np
import polars as pl

from spymaster_assets.proof.known import Difference, KnownTable, Times, compare


@dataclass(frozen=True)
class EventTable:
    """Input records in the order of their receipt.

    Columns: `known` (int64 ns, received), `time` (int64 ns, happened), and what may be another in another future: prices and sizes
    (numbers), groups (text), nullable (may be missing); `id` numbers the records where they are numbered.
    """

    frame: pl.DataFrame
    known: str = "recv_ns"
    time: str = "event_ns"
    prices: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    nullable: tuple[str, ...] = ()
    id: str | None = None

    def split(self, cut_ns: int) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Records received before a time, and the others."""
        at = int(self.frame[self.known].search_sorted(cut_ns))
        return self.frame[:at], self.frame[at:]


Inputs = Mapping[str, EventTable]
Rebuild = Callable[[Inputs], Mapping[str, KnownTable]]
"""All tables of a graph, upstream first; one that cannot be made of these inputs is left out. It must start from nothing: what a
cache keeps from one call to the next is not rebuilt and hence not judged."""
Alteration = Callable[[EventTable, int, np.random.Generator], pl.DataFrame]


def _with_future(change: Callable[[pl.DataFrame, EventTable, int, np.random.Generator], pl.DataFrame]) -> Alteration:
    """An alteration that changes the records after the time and leaves all in the order of receipt."""

    def alter(table: EventTable, cut_ns: int, rng: np.random.Generator) -> pl.DataFrame:
        before, after = table.split(cut_ns)
        changed = change(after, table, cut_ns, rng).select(table.frame.columns).sort(table.known, maintain_order=True)
        return pl.concat([before, changed])

    return alter


def _shift(frame: pl.DataFrame, columns: Iterable[str], sign: int) -> pl.DataFrame:
    """Numbers moved by a thirtieth and one, in their own type."""
    return frame.with_columns(
        (pl.col(c) + sign * ((pl.col(c).abs() / 30).cast(frame.schema[c]) + 1)).cast(frame.schema[c]) for c in columns
    )


def _shuffled(after: pl.DataFrame, table: EventTable, cut_ns: int, rng: np.random.Generator) -> pl.DataFrame:
    values = [*table.prices, *table.sizes, *table.groups]
    order = rng.permutation(after.height)
    return after.with_columns([after[c].gather(order) for c in values])


def _sizes(after: pl.DataFrame, table: EventTable, cut_ns: int, rng: np.random.Generator) -> pl.DataFrame:
    # a few blocks that outweigh all else: totals, ranks and types may hang on them alone
    block = pl.Series(rng.random(after.height) < 0.02)
    return after.with_columns(pl.when(block).then(pl.col(c) * 3_000).otherwise(pl.col(c) * 3 + 1) for c in table.sizes)


def _dropped(after: pl.DataFrame, table: EventTable, cut_ns: int, rng: np.random.Generator) -> pl.DataFrame:
    return after.filter(rng.random(after.height) < 0.5)


def _nulls(after: pl.DataFrame, table: EventTable, cut_ns: int, rng: np.random.Generator) -> pl.DataFrame:
    missing = {c: pl.Series(rng.random(after.height) < 0.5) for c in table.nullable}
    return after.with_columns(pl.when(gone).then(None).otherwise(pl.col(c)).alias(c) for c, gone in missing.items())


def _moved(after: pl.DataFrame, table: EventTable, cut_ns: int, rng: np.random.Generator) -> pl.DataFrame:
    known = after[table.known].to_numpy()
    by = ((cut_ns - known) * rng.uniform(0.0, 0.8, after.height)).astype(np.int64)
    return after.with_columns(pl.col(table.known) + by, pl.col(table.time) + by)


def _renamed(after: pl.DataFrame, table: EventTable, cut_ns: int, rng: np.random.Generator) -> pl.DataFrame:
    # names that sort before and after all others: codes are often given in sorted order
    which = pl.Series(rng.integers(0, 3, after.height))
    return after.with_columns(
        pl.when(which == 0).then(pl.lit("!")).when(which == 1).then(pl.lit("~")).otherwise(pl.col(c)).alias(c)
        for c in table.groups
    )


def _concentrated(after: pl.DataFrame, table: EventTable, cut_ns: int, rng: np.random.Generator) -> pl.DataFrame:
    # what is rare becomes all there is, and much of it: a choice of the largest turns out otherwise
    rare = {c: table.frame[c].drop_nulls().value_counts().sort("count", c)[c] for c in table.groups}
    return after.with_columns(
        *(pl.lit(values[0]).alias(c) for c, values in rare.items() if len(values)),
        *(pl.col(c) * 100 for c in table.sizes),
    )


def _longer(after: pl.DataFrame, table: EventTable, cut_ns: int, rng: np.random.Generator) -> pl.DataFrame:
    tail = _shift(table.frame.tail(200), table.prices, -1)
    if not tail.height:
        return after
    by = max(int(tail[table.known][-1]), cut_ns) - int(tail[table.known][0]) + 1
    return pl.concat([after, _numbered(tail, table).with_columns(pl.col(table.known, table.time) + by)])


def _late(after: pl.DataFrame, table: EventTable, cut_ns: int, rng: np.random.Generator) -> pl.DataFrame:
    """Records of before the time that are received after it: new ones, and corrections under the number of one already received."""
    before = table.split(cut_ns)[0]
    if not before.height:
        return after
    recent = np.arange(max(0, before.height - 40), before.height)
    older = rng.integers(0, before.height, 40)
    chosen = _shift(before[np.unique(np.concatenate([recent, older]))], [*table.prices, *table.sizes], 1)
    delays = np.sort(rng.integers(0, 7_200_000_000_000, chosen.height))
    chosen = chosen.with_columns(pl.Series(table.known, cut_ns + delays, dtype=pl.Int64))
    even = np.arange(chosen.height) % 2 == 0
    return pl.concat([chosen.filter(even), _numbered(chosen.filter(~even), table), after])


def _numbered(rows: pl.DataFrame, table: EventTable) -> pl.DataFrame:
    """Rows under numbers that no record has yet."""
    if table.id is None:
        return rows
    last = int(table.frame[table.id].max() or 0)  # type: ignore[arg-type]
    return rows.with_columns((last + pl.int_range(1, pl.len() + 1)).cast(rows.schema[table.id]).alias(table.id))


FUTURES: Mapping[str, Alteration] = {
    "cut": _with_future(lambda after, table, cut_ns, rng: after.clear()),
    "up": _with_future(lambda after, table, cut_ns, rng: _shift(after, table.prices, 1)),
    "down": _with_future(lambda after, table, cut_ns, rng: _shift(after, table.prices, -1)),
    "sizes": _with_future(_sizes),
    "shuffled": _with_future(_shuffled),
    "dropped": _with_future(_dropped),
    "nulls": _with_future(_nulls),
    "moved": _with_future(_moved),
    "renamed": _with_future(_renamed),
    "concentrated": _with_future(_concentrated),
    "longer": _with_future(_longer),
    "late": _with_future(_late),
}
"""How the records from a time on may have been others."""


@dataclass(frozen=True)
class Finding:
    """One replay that differed: which future, from when on, and its differences, upstream assets first."""

    future: str
    cut_ns: int
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Search:
    """All replays of a graph: how many, how many values were compared, and what was found."""

    replays: int = 0
    compared: int = 0
    findings: tuple[Finding, ...] = field(default_factory=tuple)

    def asset(self, order: Sequence[str]) -> str | None:
        """The asset furthest upstream, in the graph's `order`, whose known values changed; None if none did."""
        changed = {d.asset for f in self.findings for d in f.differences}
        return next((name for name in order if name in changed), None)


def choose_cuts(tables: Iterable[KnownTable], edges: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """`count` distinct times, ns: in turn those at which a fitted object became known, edges (where rules change), times at which a row or
    column became known, and random ones; each kind spread over the whole of it."""
    rng = np.random.default_rng(seed)
    known = [t for t in (table.times() for table in tables) if len(t)]
    every = np.unique(np.concatenate(known)) if known else np.empty(0, np.int64)
    if not len(every):
        return list(edges[:count])
    kinds = [
        np.unique(np.concatenate([every[:0], *(t for t in known if len(t) <= 4)])),
        rng.permutation(np.asarray(edges, np.int64)),
        known_times(every, count, rng),
        rng.integers(every[0], every[-1] + 1, count),
    ]
    turns = chain.from_iterable(zip_longest(*(k.tolist() for k in kinds)))
    return list(dict.fromkeys(t for t in turns if t is not None))[:count]


def known_times(times: Times, count: int, rng: np.random.Generator) -> Times:
    """`count` or fewer of sorted times, in random order: one of each of as many parts of equal length."""
    parts = np.array_split(times, min(count, len(times)))
    return rng.permutation(np.array([int(rng.choice(p)) for p in parts if len(p)], np.int64))


def find_leaks(
    rebuild: Rebuild,
    inputs: Inputs,
    cuts: Sequence[int],
    sweep: Sequence[int] = (),
    *,
    futures: Mapping[str, Alteration] = FUTURES,
    turns: Sequence[str] = (),
    seed: int = 0,
    until_found: bool = False,
) -> Search:
    """Rebuild with every future from every cut on, and with one future, in turn, from each time of the sweep on; compare what was known.

    A leak that reaches far shows at few cuts, one that reaches to the next record only where a cut falls just behind the row: the sweep
    makes up in times what it lacks in futures. `turns` names its futures; without it every second one is 'cut'. `until_found` stops at
    the first difference.
    """
    stored = rebuild(inputs)
    names = [
        turns[n % len(turns)]
        if turns
        else "cut"
        if n % 2 == 0 and "cut" in futures
        else list(futures)[n // 2 % len(futures)]
        for n in range(len(sweep))
    ]
    trials = [*((t, name) for t in cuts for name in futures), *zip(sweep, names, strict=True)]
    replays = compared = 0
    findings: list[Finding] = []
    for n, (cut_ns, name) in enumerate(trials):
        rng = np.random.default_rng([seed, n])
        altered = {k: replace(t, frame=futures[name](t, cut_ns, rng)) for k, t in inputs.items()}
        if all(altered[k].frame.equals(t.frame) for k, t in inputs.items()):
            continue
        replayed = rebuild(altered)
        replays += 1
        found: list[Difference] = []
        for asset, table in stored.items():
            more, values = compare(asset, str(cut_ns), table, replayed.get(asset), cut_ns)
            found += more
            compared += values
        if found:
            findings.append(Finding(name, cut_ns, tuple(found)))
            if until_found:
                break
    return Search(replays, compared, tuple(findings))
