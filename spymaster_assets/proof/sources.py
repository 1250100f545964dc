"""Where an event's values come from: rows of bars and sequences in the store, and records of its input files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from spymaster_assets.contract import STAGE_A_DECISION_S
from spymaster_assets.datasets.sequences import read_sequences, sequence_name
from spymaster_assets.errors import ArtifactError
from spymaster_assets.market.bars import bars_name, read_bars
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.dbn import read_header
from spymaster_assets.market.files import SUFFIXES, SessionFiles, read_registration, symbols_of
from spymaster_assets.proof.faults import told
from spymaster_assets.proof.lineage import FILE, Link, State, file_state, input_of
from spymaster_assets.proof.records import RecordRange, Window, record_ranges
from spymaster_assets.settings import DELAYS_S, MINUTE_NS, NS, Settings
from spymaster_assets.signals.build import SignalSet
from spymaster_assets.store import Artifact, ArtifactStore

FEEDS = {"market_files": "tape", "book_snapshots": "book", "option_flow": "options"}
"""Assets that read input files, and what they read there."""


@dataclass(frozen=True)
class RowAt:
    """Where a row or a range of rows (last included, numbered from 0) lies in the store."""

    asset: str
    key: str
    path: str
    sha256: str
    first_row: int
    last_row: int
    what: str


@dataclass(frozen=True)
class FileRead:
    """One input file with the SHA-256 that was recorded when it was read, its state now and the records that the row rests on."""

    feed: str
    name: str
    sha256: str
    state: State
    schema: str
    ranges: tuple[RecordRange, ...]


def row_at(artifact: Artifact, name: str, first: int, last: int, what: str) -> RowAt:
    """Rows first to last of one file of an artifact."""
    return RowAt(artifact.asset, artifact.key, str(artifact.path(name)), artifact.sha256, first, last, what)


def sequence_row(store: ArtifactStore, key: str, event_id: str) -> RowAt:
    """The event's row of its session's sequence dataset; raise ArtifactError when it has none."""
    name = sequence_name(key)
    arrays, artifact = read_sequences(store, key)
    at = np.flatnonzero(arrays["event_id"] == event_id)
    if not len(at):
        raise ArtifactError(
            f"{name} has no row of {event_id}: it was made from other signals",
            where=str(artifact.folder),
            remedy=f"dagster asset materialize --select sequence_dataset --partition {key}",
        )
    steps = int(arrays["mask"][at[0]].sum())
    return row_at(artifact, name, int(at[0]), int(at[0]), f"{steps} closed minutes")


def bars_behind(store: ArtifactStore, key: str, decision_ns: int, faults: list[str]) -> tuple[RowAt, ...]:
    """Rows of the bars that a signal row rests on: whole warm-up sessions, oldest first, then the session's up to the decision."""
    warmup = told(faults, _warmup, store, key) or []
    parts = [told(faults, _bar_rows, store, one, decision_ns, one == key) for one in [*warmup, key]]
    return tuple(row for rows in parts for row in rows or ())


def _warmup(store: ArtifactStore, key: str) -> list[str]:
    return list(store.load("levels", key).json("levels.json")["warmup_sessions"])


def _bar_rows(store: ArtifactStore, key: str, decision_ns: int, own: bool) -> list[RowAt]:
    bars, artifact = read_bars(store, key)
    read = bars.with_row_index("row").filter(pl.col("is_front") & (pl.col("end_ns") <= decision_ns))
    what = "to the decision" if own else "warm-up session"
    out = []
    for minutes in (1, 2):
        rows = read.filter(pl.col("timeframe_min") == minutes)["row"]
        if len(rows):
            out.append(row_at(artifact, bars_name(key), int(rows[0]), int(rows[-1]), f"{minutes} min, {what}"))
    return out


def files_behind(
    store: ArtifactStore,
    settings: Settings,
    session: Session,
    signals: SignalSet,
    row: pl.DataFrame,
    links: Sequence[Link],
    faults: list[str],
) -> tuple[FileRead, ...]:
    """The input files of a session, tape first, and the records of each that one row (1, columns) of its signals rests on."""
    known = {(link.asset, link.input): link.state for link in links if link.kind == FILE and link.key == session.key}
    registered, _ = told(faults, read_registration, store, session.key) or (None, None)
    attempt_ns = _attempt_start_ns(signals.frame, row)
    feeds = signals.metadata["feeds"]
    out = []
    for asset, feed in FEEDS.items():
        artifact = told(faults, store.load, asset, session.key)
        if artifact is None:
            continue
        for name, sha256 in artifact.inputs.items():
            if input_of(artifact, name)[0] != FILE:
                continue
            path = settings.dbn_dir / name
            state = known.get((asset, name)) or file_state(settings.dbn_dir, name, sha256)
            schema, ranges = "" if name.endswith(SUFFIXES) else "csv", None
            if state == "equal" and name.endswith(SUFFIXES) and registered is not None:
                header = told(faults, read_header, path)
                if header is None:
                    continue
                schema = header.schema
                windows = list(_windows(settings, session, feed, schema, row, attempt_ns, feeds))
                if windows:
                    ranges = told(faults, record_ranges, path, windows, _contract_id(path, feed, registered))
            out.append(FileRead(feed, name, sha256, state, schema, ranges or ()))
    return tuple(out)


def _contract_id(path: Path, feed: str, registered: SessionFiles) -> int | None:
    """Instrument id of the contract in front as the file has it; None for options, which are many."""
    if feed == "options":
        return None
    mapped = {symbol: number for number, symbol in symbols_of([read_header(path)], registered.session).items()}
    return registered.front_id if feed == "tape" else mapped.get(registered.front.raw_symbol, registered.front_id)


def _attempt_start_ns(frame: pl.DataFrame, row: pl.DataFrame) -> int:
    """t0 of the first touch of the event's attempts, whose own windows the trend columns are measured against."""
    same = ("level_kind", "direction_sign", "attempt_cluster_id")
    return int(frame.join(row.select(same), on=same)["ts_ns"].min())  # type: ignore[arg-type]


def _windows(
    settings: Settings,
    session: Session,
    feed: str,
    schema: str,
    row: pl.DataFrame,
    attempt_ns: int,
    feeds: Sequence[str],
) -> Iterator[Window]:
    """The times that the formulas of signals/ read of each feed; none of a feed that the session's signals could not use."""
    t0_ns = int(row["ts_ns"][0])
    tape_ns, barrier_ns = settings.signal.tape_window_s * NS, settings.barrier.window_s * NS
    earlier = attempt_ns < t0_ns
    if feed == "tape":
        delays = sorted(DELAYS_S.values())
        yield Window("bars", session.open_ns, t0_ns + STAGE_A_DECISION_S * NS)
        if schema == "trades":
            yield Window("tape window", t0_ns, t0_ns + tape_ns)
            if earlier:
                yield Window("1st attempt tape", attempt_ns, attempt_ns + tape_ns)
            if "book" in feeds:
                yield Window("barrier fills", t0_ns, t0_ns + barrier_ns)
        last_ns = min(t0_ns + (delays[-1] + settings.label.look_forward_s) * NS, session.regular_close_ns)
        yield Window("labels", t0_ns + delays[0] * NS + 1, last_ns + 1)
    elif feed == "book":
        margin_ns = session.regular_open_ns - settings.book.before_open_min * MINUTE_NS
        first_ns = max(t0_ns - settings.barrier.baseline_s * NS, margin_ns)
        # a book of single orders rests on all of them
        yield Window("baseline", 0 if schema == "mbo" else first_ns, t0_ns)
        yield Window("barrier", t0_ns, t0_ns + barrier_ns)
        if earlier:
            yield Window("1st attempt barrier", attempt_ns, attempt_ns + barrier_ns)
    elif feed not in feeds:
        return
    elif schema == "definition":
        yield Window("the whole file", 0, np.iinfo(np.int64).max)
    elif schema == "statistics":
        yield Window("before the open", 0, session.regular_open_ns)
    else:
        from_ns = session.open_ns if schema in ("trades", "tbbo", "tcbbo") else 0
        yield Window("up to the touch", from_ns, t0_ns + 1)
