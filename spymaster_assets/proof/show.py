"""An explanation as a tree for people, at 100 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from spymaster_assets.evaluation.calibration import BASELINES
from spymaster_assets.market.calendar import NEW_YORK
from spymaster_assets.proof.bits import Check
from spymaster_assets.proof.explain import Explanation, Use, Value
from spymaster_assets.proof.judged import Contributions, Fold, Prediction, Training
from spymaster_assets.proof.lineage import LATE_FILE, Link
from spymaster_assets.proof.sources import RowAt
from spymaster_assets.settings import NS

_SHORT = 12
_SHOWN_NEIGHBOURS = 10
_SHOWN_BROKEN = 20
_BRIEF = 2
"""Contributions a head where several heads are told of."""
_STATE_STYLE = {
    "equal": "green",
    "stale": "yellow",
    "altered": "red",
    "missing": "red",
    "changed": "red",
    "unreadable": "red",
}
_PART = {
    "train": "learned from it",
    "validation": "stopped early by it; retrieval holds it",
    "test": "judged by it",
    "embargoed": "left its session out (embargo)",
    "purged": "left it out (purged)",
}


def tree(e: Explanation, values: bool = False) -> Tree:
    """The whole explanation; `values` lists every column of the signal row instead of counts by group."""
    mark = "  [bold red]SIMULATED[/]" if e.simulated else ""
    root = Tree(f"[bold]{e.event.event_id}[/]{mark}", guide_style="dim")
    _add(root, "Event", _event(e))
    _add(root, "Splits that hold its session", _uses(e.uses))
    for fold in e.folds:
        _fold(root, fold)
    _add(root, "Signal row", *_signal(e, values))
    _add(root, "Bars it was computed from", _rows(e.bars))
    _add(root, "Records it rests on", _files(e))
    _add(root, _chain_title(e.links), _chain(e.links), *_broken(e.broken))
    if e.faults:
        _add(root, "[red]Not told[/]", *(Text(f) for f in e.faults))
    return root


def checks_table(checks: Sequence[Check]) -> Table:
    """What was recomputed and whether its bits are equal; where not, the first place with both values."""
    table = _table("rederived from the DBN files", "values", "", "first difference", right=["values"])
    for c in checks:
        if c.equal:
            table.add_row(c.what, f"{c.values:,}", "[green]equal[/]", "")
        else:
            table.add_row(
                c.what, f"{c.values:,}", "[red]differs[/]", f"{c.where}\nstored    {c.stored}\nrederived {c.rederived}"
            )
    return table


def when(ts_ns: int) -> str:
    """`2024-02-22 17:53:00 UTC (12:53:00 New York)`, with the fraction of a second where there is one."""
    seconds, rest = divmod(ts_ns, NS)
    utc = datetime.fromtimestamp(seconds, UTC)
    fraction = f".{rest:09d}".rstrip("0") if rest else ""
    return f"{utc:%Y-%m-%d %H:%M:%S}{fraction} UTC ({utc.astimezone(NEW_YORK):%H:%M:%S} New York)"


def clocks(ts_ns: int) -> str:
    """`17:53:00 / 12:53:00`: the same time in UTC and New York."""
    utc = datetime.fromtimestamp(ts_ns // NS, UTC)
    return f"{utc:%H:%M:%S} / {utc.astimezone(NEW_YORK):%H:%M:%S}"


def _minutes(start_ns: int, end_ns: int) -> tuple[str, str]:
    """`17:53-17:57` in UTC and in New York."""
    times = [datetime.fromtimestamp(t // NS, UTC) for t in (start_ns, end_ns)]
    utc, local = ([f"{t.astimezone(zone):%H:%M}" for t in times] for zone in (UTC, NEW_YORK))
    return "-".join(utc), "-".join(local)


def _add(root: Tree, title: str, *parts: RenderableType) -> Tree:
    branch = root.add(f"[bold cyan]{title}[/]")
    branch.add(Group(*parts))
    return branch


def _table(*columns: str, right: Iterable[str] = (), header: bool = True) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=header, header_style="dim")
    numbers = set(right)
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    return table


def _event(e: Explanation) -> Group:
    v = e.event
    side = "from below" if v.direction == "UP" else "from above"
    about = _table("what", "is", header=False)
    about.add_row("level", f"{v.level_kind} {v.level_price:.2f} SPY dollars, approached {side} ({v.direction})")
    about.add_row("t0", when(v.t0_ns))
    about.add_row("stage A decides", when(v.decision_ns))
    about.add_row("labels known", f"{when(v.label_known_ns)}, from {v.label_source}")
    table = _table(
        "delay", "t1: stage B decides, UTC / NY", "outcome", "strength $", "known, UTC / NY", right=["strength $"]
    )
    for o in v.outcomes:
        table.add_row(
            o.delay, clocks(o.confirmed_ns), o.outcome, _number(o.strength_signed_usd, "+.2f"), clocks(o.known_ns)
        )
    return Group(about, table)


def _uses(uses: Sequence[Use]) -> RenderableType:
    if not uses:
        return Text("none: no as-of model has read or been judged by this session yet")
    table = _table("as of", "its models", "made", "its signals")
    for u in uses:
        same = {None: "", True: "[green]equal[/]", False: "[yellow]made anew since[/]"}[u.inputs_equal]
        reason = f": {u.reason}" if u.reason else ""
        table.add_row(u.asof, _PART[u.part] + reason, ", ".join(u.models) or "none made", same)
    return table


def _fold(root: Tree, fold: Fold) -> None:
    branch = root.add(f"[bold cyan]Fold as of {fold.asof}[/] ({fold.window} window)")
    t = fold.training
    sessions = _table("part", "sessions", "rows", right=["rows"])
    for part, keys in (("train", fold.train), ("validation", fold.validation)):
        rows = f"{t.rows[part]:,}" + (f" ({t.purged[part]} purged)" if t.purged[part] else "") if t else ""
        sessions.add_row(part, _span(keys), rows)
    sessions.add_row("embargo", ", ".join(fold.embargoed) or "none", "")
    sessions.add_row("test", _span(fold.test), "")
    branch.add(Group(sessions, *([_training(t)] if t else [])))
    models = _table("model", "version", "content SHA-256", "runs")
    for m in fold.models:
        runs = ", ".join(f"{k.removesuffix('_run_id')} {v[:_SHORT]}" for k, v in m.runs.items())
        models.add_row(m.asset, m.version, m.sha256[:_SHORT], runs)
    branch.add(models)
    if fold.predictions:
        branch.add(_predictions(fold.predictions))
    else:
        branch.add(Text("no judged prediction: its outcome is undefined for these heads, or --head leaves none"))
    explained = [p for p in fold.predictions if p.contributions is not None]
    if len(explained) == 1:
        branch.add(Group(*_contributions(explained[0])))
    elif explained:
        branch.add(_brief(explained))
    if any(p.model == "retrieval" for p in fold.predictions):
        branch.add(_neighbours(fold))


def _training(t: Training) -> Table:
    early_h = (t.first_test_decision_ns - t.latest_label_known_ns) / (3600 * NS)
    table = _table("what", "is", header=False)
    table.add_row("last label they learned from", when(t.latest_label_known_ns))
    table.add_row("first decision of the test", f"{when(t.first_test_decision_ns)}, {early_h:,.1f} h later")
    ok = "[green]no label from the future[/]" if t.none_from_the_future else "[bold red]LABELS FROM THE FUTURE[/]"
    table.add_row("", ok)
    return table


def _predictions(said: Sequence[Prediction]) -> Table:
    models = sorted({p.model for p in said}, key=lambda m: (m in BASELINES, m))
    names = {"time_of_day": "time of\nday", "null_knn": "null\nkNN"}
    shown = [names.get(m, m) for m in models]
    table = _table("prediction", *shown, "base\nrate", "came", right=[*shown, "base\nrate", "came"])
    heads = {(p.head, p.delay, p.stage): p for p in said}
    for (head, delay, stage), one in sorted(heads.items()):
        values = {p.model: p.p for p in said if (p.head, p.delay, p.stage) == (head, delay, stage)}
        form, plain = ("+.2f", "+.2f") if head == "strength" else (".3f", ".0f")
        cells = (_number(values.get(m), form) for m in models)
        table.add_row(f"{head} {delay} {stage}", *cells, _number(one.reference, form), _number(one.y, plain))
    return table


def _contributions(p: Prediction) -> list[RenderableType]:
    c = p.contributions
    assert c is not None
    title = f"what moved {p.model} {p.head} {p.delay} {p.stage}, {c.unit}; {p.train_rows} training rows of this head"
    table = _table("feature", "adds", "value", "unit", "known at", "UTC / NY", right=["adds", "value"])
    for f in c.features:
        value = _number(f.value, ".5g")
        table.add_row(f.feature, f"{f.contribution:+.4f}", value, f.unit, f.known_at, clocks(f.known_ns))
    return [Text(title, style="dim"), table, Text(_sum(c))]


def _sum(c: Contributions) -> str:
    shown = sum(f.contribution for f in c.features)
    return f"base {c.bias:+.4f}, shown {shown:+.4f}, others {c.rest:+.4f}: {c.total:+.4f} {c.unit}"


def _brief(said: Sequence[Prediction]) -> Table:
    table = _table(
        "head", "base", "largest contributions (log-odds; strength in SPY dollars)", "sum", right=["base", "sum"]
    )
    for p in sorted(said, key=lambda p: (p.head, p.delay, p.stage)):
        c = p.contributions
        assert c is not None
        largest = ", ".join(f"{f.feature} {f.contribution:+.2f}" for f in c.features[:_BRIEF])
        table.add_row(f"{p.head} {p.delay} {p.stage}", f"{c.bias:+.2f}", largest, f"{c.total:+.2f}")
    return table


def _neighbours(fold: Fold) -> Group:
    table = _table("", "neighbour", "distance", "outcome", "strength $", right=["", "distance", "strength $"])
    for n in fold.neighbours[:_SHOWN_NEIGHBOURS]:
        strength = _number(n.strength_signed_usd, "+.2f")
        table.add_row(str(n.rank), n.event_id, f"{n.distance:.3f}", n.outcome, strength)
    shown = min(len(fold.neighbours), _SHOWN_NEIGHBOURS)
    title = f"{shown} nearest of {len(fold.neighbours)} neighbours, candidates filtered by {fold.neighbour_filter}"
    return Group(Text(title, style="dim"), table)


def _signal(e: Explanation, values: bool) -> list[RenderableType]:
    parts: list[RenderableType] = [_rows([e.signal_row, *([e.sequence_row] if e.sequence_row else [])])]
    if values:
        return [*parts, _values(e.values)]
    table = _table("group", "columns", "null", "known at", "feeds", right=["columns", "null"])
    for group in dict.fromkeys(v.group for v in e.values):
        mine = [v for v in e.values if v.group == group]
        latest = max(mine, key=lambda v: v.known_ns)
        earliest = min(mine, key=lambda v: v.known_ns)
        known = latest.known_at if latest.known_at == earliest.known_at else f"{earliest.known_at} to {latest.known_at}"
        feeds = ", ".join(dict.fromkeys(f for v in mine for f in v.feeds))
        table.add_row(group, str(len(mine)), str(sum(v.value is None for v in mine) or ""), known, feeds)
    return [*parts, table, Text("--values lists every column", style="dim")]


def _values(values: Sequence[Value]) -> Table:
    table = _table("column", "value", "unit", "known at", "feeds", right=["value"])
    for column in table.columns[:2]:
        column.no_wrap = True
    for v in values:
        if v.column != "event_id":  # the title has it
            style = "dim" if v.value is None else None
            table.add_row(v.column, _shown(v), v.unit, v.known_at, ", ".join(v.feeds), style=style)
    return table


def _shown(v: Value) -> str:
    if v.value is None:
        return "null"
    if v.unit == "ns UTC":
        return clocks(v.value)
    return f"{v.value:.6g}" if isinstance(v.value, float) else str(v.value)


def _rows(rows: Sequence[RowAt]) -> Table:
    table = _table("artifact", "version", "row", "what", "SHA-256")
    for r in rows:
        at = str(r.first_row) if r.first_row == r.last_row else f"{r.first_row}..{r.last_row}"
        table.add_row(f"{r.asset}[{r.key}]", Path(r.path).parent.name, at, r.what, r.sha256[:_SHORT])
    return table


def _files(e: Explanation) -> Group:
    parts: list[RenderableType] = []
    for f in e.files:
        state = f"[{_STATE_STYLE[f.state]}]{'unchanged' if f.state == 'equal' else f.state}[/]"
        parts.append(Text.from_markup(f"[bold]{f.name}[/] {f.feed} {f.schema} SHA-256 {f.sha256[:_SHORT]} {state}"))
        if not f.ranges:
            continue
        table = _table(
            "  for", "UTC", "New York", "records", "count", "front", "bytes, decompressed", right=["count", "front"]
        )
        for r in f.ranges:
            at = "none" if r.first is None else f"{r.first}..{r.last}"
            span = _minutes(r.start_ns, r.end_ns) if r.start_ns else ("", "")
            front = "" if r.of_contract is None else f"{r.of_contract:,}"
            octets = "" if r.first_byte is None else f"{r.first_byte}..{r.end_byte}"
            table.add_row(f"  {r.use}", *span, at, f"{r.records:,}", front, octets)
        parts.append(table)
    return Group(*parts)


def _chain_title(links: Sequence[Link]) -> str:
    broken = sum(link.state != "equal" for link in links)
    return f"Chain of hashes: {len(links)} links, {f'[red]{broken} broken[/]' if broken else '[green]all equal[/]'}"


def _chain(links: Sequence[Link]) -> Table:
    table = _table("artifact", "made from", "links", "", right=["links"])
    order: dict[tuple[str, str], list[Link]] = {}
    for link in links:
        order.setdefault((link.asset, link.kind), []).append(link)
    for asset, hops in groupby(order.items(), key=lambda item: item[0][0]):
        for n, ((_, kind), mine) in enumerate(hops):
            broken = [link.state for link in mine if link.state != "equal"]
            said = ", ".join(f"[{_STATE_STYLE[s]}]{broken.count(s)} {s}[/]" for s in dict.fromkeys(broken))
            name = {"file": "input files", "contract": "features.json"}.get(kind, kind)
            table.add_row("" if n else asset, name, str(len(mine)), said or "[green]equal[/]")
    return table


def _broken(links: Sequence[Link]) -> list[RenderableType]:
    out: list[RenderableType] = []
    for link in links[:_SHOWN_BROKEN]:
        unread = "came later" if link.kind == LATE_FILE else "not to be read"
        recorded = f"recorded {link.recorded[:_SHORT]}" if link.recorded else unread
        now = f", now {link.found[:_SHORT]}" if link.found else ""
        text = Text.from_markup(f"[{_STATE_STYLE[link.state]}]{link.state}[/] ")
        text.append(f"{link.asset}[{link.key}] from {link.input}: {recorded}{now}\n  remedy: {link.remedy}")
        out.append(text)
    if len(links) > _SHOWN_BROKEN:
        out.append(Text(f"and {len(links) - _SHOWN_BROKEN} more, which --json lists", style="dim"))
    return out


def _span(keys: Sequence[str]) -> str:
    return f"{len(keys)}: {keys[0]} to {keys[-1]}" if keys else "none"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
