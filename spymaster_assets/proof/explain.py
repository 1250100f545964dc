"""An event explained: from its predictions to the models, the rows they learned from, its own row, and the records behind it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import polars as pl

from spymaster_assets.contract import Column, Contract, load_contract
from spymaster_assets.datasets.splits import read_split
from spymaster_assets.errors import ConfigError, ContractError, MissingInputError
from spymaster_assets.partitions import REPORT_ASSET, calendar_of
from spymaster_assets.proof.faults import told
from spymaster_assets.proof.judged import MODELS, SPLIT, Fold, judged, require_heads
from spymaster_assets.proof.lineage import Link, chain
from spymaster_assets.proof.sources import FileRead, RowAt, bars_behind, files_behind, row_at, sequence_row
from spymaster_assets.settings import DELAYS_S, NS, Settings
from spymaster_assets.signals.build import read_signals, signals_name
from spymaster_assets.store import Artifact, ArtifactStore

_EVENT_ID = re.compile(r"^[A-Z0-9]+_(?P<session>\d{4}-\d{2}-\d{2})_[A-Z0-9_]+_-?\d+_(UP|DOWN)_\d+$")
_ID_FORM = "SYMBOL_YYYY-MM-DD_KIND_TICK_UP|DOWN_T0 (t0 in UTC ns)"
_PARTS = ("train", "validation", "test", "embargoed")


@dataclass(frozen=True)
class Outcome:
    """What happened after one confirmation delay, and when that was known (UTC ns)."""

    delay: str
    outcome: str
    strength_signed_usd: float | None
    confirmed_ns: int
    known_ns: int


@dataclass(frozen=True)
class Event:
    """A touch: t0 and stage A's decision in UTC ns, the level in SPY dollars, the side it was approached from, what came of it."""

    event_id: str
    symbol: str
    session: str
    level_kind: str
    level_price: float
    direction: str
    t0_ns: int
    decision_ns: int
    label_known_ns: int
    label_source: str
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class Use:
    """What the split as of `asof` did with the event: part is train, validation, test, embargoed or purged (with the reason).

    judged: its report is there. inputs_equal: whether the split was made from the signals that are stored now, None where it reads none.
    """

    asof: str
    part: str
    reason: str
    models: tuple[str, ...]
    judged: bool
    inputs_equal: bool | None


@dataclass(frozen=True)
class Value:
    """One column of the event's signal row; known_ns in UTC ns."""

    column: str
    role: str
    group: str
    value: Any
    unit: str
    known_at: str
    known_ns: int
    feeds: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """All of it; faults are parts that could not be told, in the words of their errors."""

    simulated: bool
    event: Event
    uses: tuple[Use, ...]
    folds: tuple[Fold, ...]
    signal_row: RowAt
    values: tuple[Value, ...]
    sequence_row: RowAt | None
    bars: tuple[RowAt, ...]
    files: tuple[FileRead, ...]
    links: tuple[Link, ...]
    faults: tuple[str, ...]

    @property
    def broken(self) -> tuple[Link, ...]:
        """Links whose input is no longer what was recorded."""
        return tuple(link for link in self.links if link.state != "equal")


def explain(settings: Settings, event_id: str, asofs: Sequence[str] = (), heads: Sequence[str] = ()) -> Explanation:
    """Explain an event from the store and the DBN folder of `settings`.

    asofs: as-of sessions to tell of, all without it. heads: words (of model, head, delay or stage) that a prediction must have. Raises
    ContractError for a malformed id, MissingInputError for an unknown event, ConfigError for an unknown as-of session or word, and
    ArtifactError when the event's own row was altered; what else is amiss is among the links and faults.
    """
    require_heads(heads)
    store, contract = ArtifactStore(settings.root), load_contract()
    key = session_of(store, event_id)
    signals, artifact = read_signals(store, key)
    row, at = _find(signals.frame, event_id, artifact)
    event = _event(row, contract)
    faults: list[str] = []
    uses = _uses(store, event, artifact.sha256, faults)
    if unknown := [a for a in asofs if a not in [u.asof for u in uses]]:
        raise ConfigError(
            f"no split as of {unknown[0]} holds session {key}", expected=", ".join(u.asof for u in uses) or "a split"
        )
    uses = tuple(u for u in uses if not asofs or u.asof in asofs)
    folds = [told(faults, judged, store, u.asof, row, heads, faults) for u in uses if u.judged]
    links = chain(store, settings, _starts(store, key, uses), faults)
    session = calendar_of(settings.symbol).session(key)
    return Explanation(
        simulated=bool(signals.metadata["simulated"]) or settings.simulated,
        event=event,
        uses=uses,
        folds=tuple(f for f in folds if f is not None),
        signal_row=row_at(artifact, signals_name(key), at, at, "signal row"),
        values=tuple(_value(row, c) for c in contract.columns),
        sequence_row=told(faults, sequence_row, store, key, event_id),
        bars=bars_behind(store, key, event.decision_ns, faults),
        files=files_behind(store, settings, session, signals, row, links, faults),
        links=links,
        faults=tuple(faults),
    )


def session_of(store: ArtifactStore, event_id: str) -> str:
    """Session of an event id; raise ContractError when it is not one, MissingInputError when its session has no signals."""
    made = store.keys("signals")
    if match := _EVENT_ID.match(event_id):
        if match["session"] in made:
            return match["session"]
        raise MissingInputError(
            f"no signals of session {match['session']}",
            where=str(store.root / "signals"),
            expected=f"{made[0]} to {made[-1]}" if made else "signals in the store",
            remedy=f"dagster asset materialize --select '+signals' --partition {match['session']}",
        )
    example = next((e for key in reversed(made) if (e := _first_id(store, key))), None)
    raise ContractError(
        f"{event_id!r} is no event id",
        expected=_ID_FORM + (f", such as {example}" if example else ""),
        remedy="take one from the column event_id of a signals or predictions file",
    )


def _first_id(store: ArtifactStore, key: str) -> str | None:
    ids = read_signals(store, key)[0].frame["event_id"]
    return str(ids[0]) if len(ids) else None


def _find(frame: pl.DataFrame, event_id: str, artifact: Artifact) -> tuple[pl.DataFrame, int]:
    """The event's row, (1, columns), and its number; raise MissingInputError with near matches when there is none."""
    ids = frame["event_id"].to_list()
    if event_id in ids:
        at = ids.index(event_id)
        return frame[at], at
    near = get_close_matches(event_id, ids, n=3, cutoff=0.0)
    raise MissingInputError(
        f"session {artifact.key} has no event {event_id}",
        where=str(artifact.folder),
        expected=f"one of its {len(ids)} events; nearest: {', '.join(near)}" if near else "an event; it has none",
    )


def _event(row: pl.DataFrame, contract: Contract) -> Event:
    r = row.row(0, named=True)
    return Event(
        event_id=r["event_id"],
        symbol=r["symbol"],
        session=r["date"],
        level_kind=r["level_kind_name"],
        level_price=r["level_price"],
        direction=r["direction"],
        t0_ns=r["ts_ns"],
        decision_ns=r["decision_ns"],
        label_known_ns=r["label_known_ns"],
        label_source=r["label_source"],
        outcomes=tuple(
            Outcome(
                delay,
                r[f"outcome_{delay}"],
                r[f"strength_signed_{delay}"],
                r["ts_ns"] + seconds * NS,
                min(r["ts_ns"] + contract[f"outcome_{delay}"].known_after_s * NS, r["label_known_ns"]),
            )
            for delay, seconds in DELAYS_S.items()
        ),
    )


def _uses(store: ArtifactStore, event: Event, sha256: str, faults: list[str]) -> tuple[Use, ...]:
    out = []
    for asof in store.keys(SPLIT):
        split, _ = told(faults, read_split, store, asof) or (None, None)
        part = next((p for p in _PARTS if event.session in getattr(split, p, ())), None)
        if split is None or part is None:
            continue
        reason = next((p["reason"] for p in split.purged if p["event_id"] == event.event_id), "")
        recorded = split.inputs.get(event.session)
        out.append(
            Use(
                asof=asof,
                part="purged" if reason else part,
                reason=reason,
                models=tuple(a for a in MODELS if store.exists(a, asof)),
                judged=part == "test" and store.exists(REPORT_ASSET, asof),
                inputs_equal=None if recorded is None else recorded == sha256,
            )
        )
    return tuple(out)


def _starts(store: ArtifactStore, key: str, uses: Sequence[Use]) -> list[tuple[str, str]]:
    """Where the chain begins: what judged the event, else the models that learned from it; its own assets in any case."""
    starts = []
    for use in uses:
        starts += [(REPORT_ASSET, use.asof)] if use.judged else [(a, use.asof) for a in use.models]
    own = [("sequence_dataset", key)] if store.exists("sequence_dataset", key) else []
    return [*starts, *own, ("signals", key)]


def _value(row: pl.DataFrame, column: Column) -> Value:
    known_ns = int(row["ts_ns"][0]) + column.known_after_s * NS
    return Value(
        column.name,
        column.role,
        column.group,
        row[column.name][0],
        column.unit,
        column.known_at,
        known_ns,
        column.feeds,
    )
