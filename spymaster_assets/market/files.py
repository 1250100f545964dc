"""What input a session has: the files, what they hold, how well they cover it and which contract is in front."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spymaster_assets.errors import ArtifactError, MarketDataError, MissingInputError, refusing
from spymaster_assets.market.calendar import Session, TradingCalendar, full_regular_close_ns
from spymaster_assets.market.contracts import ContractVolume, Front, choose_front, front_known_ns, is_outright
from spymaster_assets.market.dbn import (
    BAR_SECONDS,
    SCHEMAS,
    DbnHeader,
    file_sha256,
    read_header,
    read_records,
    time_field,
    unchanged,
)
from spymaster_assets.market.instruments import Instrument
from spymaster_assets.settings import MINUTE_NS, NS, fingerprint
from spymaster_assets.store import Artifact, ArtifactStore

SIMULATED_MARK = "SIMULATED.json"
"""A folder that holds this file is a simulated market."""
SUFFIXES = (".dbn", ".dbn.zst")
CSV_SUFFIXES = (".csv", ".csv.gz")
FRONT_SESSIONS = 2
"""Sessions before one whose tape the choice of its front month, and of a roll, rests on."""
SEEN_INPUTS, SEEN_FILES = "inputs_seen", "files_seen"
"""Manifest entries of an artifact that is made from files: fingerprint and {name: size} of its session's files as they lay there."""


@dataclass(frozen=True)
class FileEntry:
    """One DBN file of the folder: its name relative to it, its header, and what tells it from another delivery unread."""

    name: str
    header: DbnHeader
    size_bytes: int
    mtime_ns: int

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return self.header.path

    def may_hold(self, instrument: Instrument) -> bool:
        """Whether the header names an outright of the instrument, or no symbols at all."""
        return not self.header.symbols or any(is_outright(s.raw_symbol, instrument) for s in self.header.symbols)

    def is_tape(self, instrument: Instrument, dataset: str = "") -> bool:
        """Whether the file may hold the instrument's trades or bars; dataset: the only one that counts, empty for any."""
        return self.header.schema in SCHEMAS and self.may_hold(instrument) and dataset in ("", self.header.dataset)

    def overlaps(self, open_ns: int, close_ns: int) -> bool:
        """True when the range that the header states meets [open_ns, close_ns)."""
        return self.header.start_ns < close_ns and (self.header.end_ns is None or self.header.end_ns > open_ns)


@dataclass(frozen=True)
class FlatFile:
    """One flat CSV file of the folder; its name tells its day."""

    name: str
    path: Path
    size_bytes: int
    mtime_ns: int

    def is_of(self, session_key: str) -> bool:
        """True when the file's own name, not its folders', holds the session's date."""
        return session_key in self.path.name


@dataclass(frozen=True)
class RegisteredFile:
    """One file of a session: identity, counts and the receive times of its records within the session."""

    name: str
    sha256: str
    size_bytes: int
    dataset: str
    schema: str
    version: int
    record_count: int
    session_record_count: int
    first_ns: int
    last_ns: int


@dataclass(frozen=True)
class SessionFiles:
    """The input of one session.

    observed_until_ns: the input is complete up to here. last_regular_ns: time of the last record of regular hours, which for futures are
    taken to last until 16:00 New York so that a wrong early close shows. coverage_*: share of minutes in which the front contract has
    a record.
    """

    session: str
    symbol: str
    schema: str
    simulated: bool
    files: tuple[RegisteredFile, ...]
    first_ns: int
    last_ns: int
    last_regular_ns: int | None
    observed_until_ns: int
    coverage_premarket: float
    coverage_regular: float
    missing_regular_minutes: tuple[str, ...]
    contracts: tuple[ContractVolume, ...]
    front: Front

    @property
    def front_id(self) -> int:
        """Instrument id of the contract in front."""
        return self.front.instrument_id

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> SessionFiles:
        """Inverse of `to_json`; raise ArtifactError when it is none or names a file outside the folder."""
        with refusing(ArtifactError, "not a registration", where="files.json", remedy="materialize market_files again"):
            found = cls(
                **{
                    **raw,
                    "files": tuple(RegisteredFile(**f) for f in raw["files"]),
                    "missing_regular_minutes": tuple(raw["missing_regular_minutes"]),
                    "contracts": tuple(ContractVolume(**c) for c in raw["contracts"]),
                    "front": Front(**raw["front"]),
                }
            )
            for file in found.files:
                if not lies_inside(file.name) or not file.name.endswith(SUFFIXES):
                    raise ValueError(f"{file.name[:80]!r} is no DBN file of the folder")
            return found


def read_registration(store: ArtifactStore, key: str) -> tuple[SessionFiles, Artifact]:
    """What is registered of one session and its artifact."""
    artifact = store.load("market_files", key)
    return SessionFiles.from_json(artifact.json("files.json")), artifact


def lies_inside(name: str) -> bool:
    """Whether a recorded name is one that `scan_folder` or `scan_flat` can have given: below the folder, with one of their endings."""
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\0" in name
    return not outside and name.endswith((*SUFFIXES, *CSV_SUFFIXES))


def scan_folder(dbn_dir: Path) -> tuple[FileEntry, ...]:
    """Headers of every DBN file below a folder, sorted by name; raise MissingInputError when the folder does not exist."""
    # size and time are taken before the header is read: a file that changes meanwhile must not look unchanged
    return tuple(
        FileEntry(p.relative_to(dbn_dir).as_posix(), read_header(p), s.st_size, s.st_mtime_ns)
        for p, s in _files(dbn_dir, SUFFIXES)
    )


def scan_flat(dbn_dir: Path) -> tuple[FlatFile, ...]:
    """Every CSV file below a folder, sorted by name, unread."""
    files = _files(dbn_dir, CSV_SUFFIXES)
    return tuple(FlatFile(p.relative_to(dbn_dir).as_posix(), p, s.st_size, s.st_mtime_ns) for p, s in files)


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[tuple[Path, os.stat_result]]:
    """Files below a folder by name, those behind links too, each folder once.

    Raises MissingInputError when it does not exist, MarketDataError when it cannot be read or a link leads nowhere.
    """
    paths: list[Path] = []
    # rglob would leave out a folder that cannot be read without a word
    with refusing(
        MarketDataError,
        "the folder cannot be read",
        where=str(folder),
        remedy="mend its permissions or disk",
        but=(MissingInputError,),
    ):
        if not folder.is_dir():
            raise MissingInputError(
                "the folder of DBN files does not exist",
                where=str(folder),
                remedy="set SPYMASTER_DBN_DIR or run `make demo`",
            )
        walked: set[tuple[int, int]] = set()
        for below, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
            told = os.stat(below)
            if (told.st_dev, told.st_ino) in walked:  # a link to a folder that has been walked, or to one that holds it
                folders.clear()
                continue
            walked.add((told.st_dev, told.st_ino))
            folders.sort(key=lambda name: (Path(below, name).is_symlink(), name))
            for path in (Path(below, n) for n in names):
                if path.is_symlink() and not path.exists() and not path.name.startswith("."):
                    raise MarketDataError(
                        "a link of the folder leads nowhere",
                        where=f"{path} -> {path.readlink()}",
                        expected="a file or folder behind every link, or a feed would be missing without a word",
                        remedy="mend the link (is its disk mounted?) or delete it",
                    )
                if path.name.endswith(suffixes) and path.is_file():
                    paths.append(path)
        return [(p, p.stat()) for p in sorted(paths)]


def session_inputs(
    entries: Sequence[FileEntry],
    flat: Sequence[FlatFile],
    calendar: TradingCalendar,
    instrument: Instrument,
    session_key: str,
) -> tuple[FileEntry | FlatFile, ...]:
    """Every file that a session's assets may read: those of all feeds that overlap it, and of a future the tape that names its front."""
    session = calendar.session(session_key)
    front_ns = session.open_ns
    if instrument.is_future:
        front_ns = calendar.session(calendar.previous(session_key, FRONT_SESSIONS)).open_ns
    mine = [
        e
        for e in entries
        if e.overlaps(session.open_ns, session.close_ns)
        or (e.is_tape(instrument) and e.overlaps(front_ns, session.close_ns))
    ]
    return (*mine, *(f for f in flat if f.is_of(session_key)))


def inputs_fingerprint(files: Sequence[FileEntry | FlatFile]) -> str:
    """16 hex digits that change when a file comes, goes, grows or is written again; no file is read."""
    return fingerprint([(f.name, f.size_bytes, f.mtime_ns) for f in files])


def seen_files(files: Sequence[FileEntry | FlatFile]) -> dict[str, Any]:
    """What a manifest says of the files of its session, outside the content hash: those that came later can be told from it."""
    return {SEEN_INPUTS: inputs_fingerprint(files), SEEN_FILES: {f.name: f.size_bytes for f in files}}


def unseen_files(files: Sequence[FileEntry | FlatFile], metadata: Mapping[str, Any]) -> list[FileEntry | FlatFile]:
    """Those of a session's files that an artifact with this manifest entry did not see, or not with this size."""
    if metadata.get(SEEN_INPUTS) == inputs_fingerprint(files):
        return []
    seen = metadata.get(SEEN_FILES)
    return [f for f in files if not isinstance(seen, dict) or seen.get(f.name) != f.size_bytes]


def recorded_sessions(
    entries: Sequence[FileEntry],
    calendar: TradingCalendar,
    instrument: Instrument,
    keys: Sequence[str],
    dataset: str = "",
) -> list[str]:
    """Those of the sessions whose tape holds a record of the instrument in regular hours, where they have any; reads every file once.

    A header may state a range that its records leave partly empty, and a file cut at midnight UTC holds an hour of another session. The
    tape is of the schema, and of the dataset if one is named, that `register_session` takes. Raises MarketDataError when a file is damaged.
    """
    seen: dict[str, dict[str, bool]] = {}
    for entry in entries:
        schema = entry.header.schema
        if not entry.is_tape(instrument, dataset):
            continue
        sessions = [s for k in keys if entry.overlaps((s := calendar.session(k)).open_ns, s.close_ns)]
        if not sessions:
            continue
        records = read_records(entry.path)
        for session in sessions:
            inside = _inside(records, schema, session)
            times = inside[time_field(schema)][
                np.isin(inside["instrument_id"], _outrights([entry.header], session.key, instrument))
            ]
            if len(times):
                start, end = session.regular_open_ns, session.regular_close_ns
                regular = start == end or bool(((times >= start) & (times < end)).any())
                by_schema = seen.setdefault(session.key, {})
                by_schema[schema] = by_schema.get(schema, False) or regular
    return sorted(k for k, by_schema in seen.items() if by_schema[min(by_schema, key=list(SCHEMAS).index)])


def _raise(error: OSError) -> None:
    raise error


def covers(entries: Sequence[FileEntry], session: Session, instrument: Instrument, dataset: str = "") -> bool:
    """True when the ranges that the headers of the instrument's trades or bars state reach over regular hours without a gap.

    dataset: the only one whose files count; empty for any.
    """
    tape = [e for e in entries if e.is_tape(instrument, dataset) and e.overlaps(session.open_ns, session.close_ns)]
    return bool(tape) and reach_ns(tape, session.regular_open_ns, session.close_ns) >= session.regular_close_ns


def reach_ns(entries: Sequence[FileEntry], from_ns: int, open_end_ns: int) -> int:
    """Up to when the ranges that headers state reach from a time on without a gap; one without an end reaches to open_end_ns."""
    reached = from_ns
    for entry in sorted(entries, key=lambda e: e.header.start_ns):
        if entry.header.start_ns <= reached:
            reached = max(reached, open_end_ns if entry.header.end_ns is None else entry.header.end_ns)
    return reached


def register_session(
    entries: Sequence[FileEntry],
    calendar: TradingCalendar,
    instrument: Instrument,
    session_key: str,
    previous: SessionFiles | None,
    dataset: str = "",
) -> SessionFiles:
    """Find, read and judge the input of a session.

    Trades are preferred to ohlcv-1s to ohlcv-1m. The tape is of one dataset: the named one, or the only one there is. Raises
    MissingInputError when no file holds a record of the instrument in the session, MarketDataError when a file cannot be trusted or
    changes meanwhile, records were delivered twice, or no dataset is named and several hold the instrument's records.
    """
    session = calendar.session(session_key)
    candidates = [e for e in entries if e.overlaps(session.open_ns, session.close_ns)]
    known = [e for e in candidates if e.is_tape(instrument, dataset)]
    if candidates and not any(e.header.schema in SCHEMAS for e in candidates):
        raise MarketDataError(
            f"no file of session {session_key} has a schema that can be read",
            where=", ".join(f"{e.name} ({e.header.schema})" for e in candidates[:5]),
            expected=f"one of {', '.join(SCHEMAS)}",
            remedy="download the schema trades",
        )
    for schema in SCHEMAS:
        tape = [e for e in known if e.header.schema == schema]
        with unchanged(*(e.path for e in tape)):
            parts = []
            for entry in tape:
                records = read_records(entry.path)
                inside = _inside(records, schema, session)
                if len(inside):
                    parts.append((entry, len(records), inside))
            parts = _of_one_dataset(parts, session, instrument)
            found = _register(parts, schema, session, instrument, previous) if parts else None
        if found is not None:
            return found
    raise MissingInputError(
        f"no {instrument.symbol} record{f' of dataset {dataset}' if dataset else ''} for session {session_key}",
        where=f"{len(entries)} files, {len(candidates)} of which state to cover it: "
        f"{', '.join(f'{e.name} ({e.header.dataset})' for e in candidates[:5]) or 'none'}",
        expected=f"records from {_utc(session.open_ns)} to {_utc(session.close_ns)}",
        remedy="put the session's DBN files into SPYMASTER_DBN_DIR, or choose SPYMASTER_INSTRUMENT (and SPYMASTER_DATASET) to match them",
    )


def _of_one_dataset(
    parts: list[tuple[FileEntry, int, NDArray[np.void]]], session: Session, instrument: Instrument
) -> list[tuple[FileEntry, int, NDArray[np.void]]]:
    """Parts of the dataset that holds records of the instrument's outrights; its ids mean nothing in another dataset's files."""
    datasets = dict.fromkeys(e.header.dataset for e, _, _ in parts)
    if len(datasets) == 1:
        return parts
    holding = []
    for name in datasets:
        mine = [part for part in parts if part[0].header.dataset == name]
        outrights = _outrights([e.header for e, _, _ in mine], session.key, instrument)
        if any(np.isin(inside["instrument_id"], outrights).any() for _, _, inside in mine):
            holding += mine
    refuse_datasets([e for e, _, _ in holding], f"the {instrument.symbol} tape of session {session.key}")
    return holding


def refuse_datasets(entries: Sequence[FileEntry], what: str) -> None:
    """Raise MarketDataError when files of one feed are of several datasets: copies, or venues that only look like one market."""
    datasets = sorted({e.header.dataset for e in entries})
    if len(datasets) > 1:
        raise MarketDataError(
            f"{what} lies in {len(datasets)} datasets: {', '.join(datasets)}",
            where=", ".join(f"{e.name} ({e.header.dataset})" for e in entries[:6]),
            expected="one dataset a feed and session: volume would be counted twice, or venues added up",
            remedy=f"set SPYMASTER_DATASET={datasets[0]} or another of them, or move the other files out of the folder",
        )


def _register(
    parts: list[tuple[FileEntry, int, NDArray[np.void]]],
    schema: str,
    session: Session,
    instrument: Instrument,
    previous: SessionFiles | None,
) -> SessionFiles | None:
    files = tuple(_registered(entry, count, inside, schema) for entry, count, inside in parts)
    _refuse_same_file(files)
    _refuse_overlap(parts, schema, _outrights([e.header for e, _, _ in parts], session.key, instrument))
    field = time_field(schema)
    records = np.concatenate([inside for _, _, inside in parts])
    symbols = symbols_of([e.header for e, _, _ in parts], session.key)
    outright = np.isin(records["instrument_id"], [i for i, name in symbols.items() if is_outright(name, instrument)])
    if not outright.any():
        return None
    known_ns = front_known_ns(int(records[field][outright].min()), session.regular_open_ns)
    own = records if outright.all() else records[outright]
    contracts = tuple(_volumes(own, schema, session, symbols, known_ns))
    before, before_front = (previous.contracts, previous.front) if previous else ((), None)
    front = choose_front(contracts, before, before_front, known_ns)
    if front is None:
        return None
    times = np.sort(records[field][records["instrument_id"] == front.instrument_id].astype(np.int64))
    regular = minutes_seen(times, session.regular_open_ns, session.regular_close_ns)
    premarket = minutes_seen(times, session.premarket_open_ns, session.regular_open_ns)
    last_ns = int(times[-1]) + BAR_SECONDS.get(schema, 0) * NS
    latest_ns = full_regular_close_ns(session.key) if instrument.is_future else session.regular_close_ns
    in_regular = times[(times >= session.regular_open_ns) & (times < latest_ns)]
    return SessionFiles(
        session=session.key,
        symbol=instrument.symbol,
        schema=schema,
        simulated=any((p.path.parent / SIMULATED_MARK).is_file() for p, _, _ in parts),
        files=files,
        first_ns=int(times[0]),
        last_ns=last_ns,
        last_regular_ns=int(in_regular[-1]) + BAR_SECONDS.get(schema, 0) * NS if len(in_regular) else None,
        observed_until_ns=_observed_until([e.header for e, _, _ in parts], last_ns, session),
        coverage_premarket=share_seen(premarket),
        coverage_regular=share_seen(regular),
        missing_regular_minutes=tuple(
            _utc(session.regular_open_ns + int(m) * MINUTE_NS) for m in np.flatnonzero(~regular)
        ),
        contracts=contracts,
        front=front,
    )


def _observed_until(headers: Sequence[DbnHeader], last_ns: int, session: Session) -> int:
    """Up to when the input is complete: the stated end, unless the tape stops more than a minute before the regular close."""
    ends = [h.end_ns for h in headers if h.end_ns is not None]
    if len(ends) < len(headers) or last_ns + MINUTE_NS < session.regular_close_ns:
        return min(session.close_ns, last_ns)
    return min(session.close_ns, max(ends))


def symbols_of(headers: Sequence[DbnHeader], session_key: str) -> dict[int, str]:
    """Raw symbol by instrument id as mapped on the session's date, or on the nearest date that the files map."""
    day = date.fromisoformat(session_key)
    out: dict[int, tuple[int, str]] = {}
    for header in headers:
        for s in header.symbols:
            gap = max((s.start_date - day).days, (day - s.end_date).days + 1, 0)
            if s.instrument_id not in out or gap < out[s.instrument_id][0]:
                out[s.instrument_id] = (gap, s.raw_symbol)
    return {i: name for i, (_, name) in out.items()}


def _outrights(headers: Sequence[DbnHeader], session_key: str, instrument: Instrument) -> NDArray[np.int64]:
    """Ids (k,) that the headers name as the instrument's outrights on the session's date."""
    symbols = symbols_of(headers, session_key)
    return np.array([i for i, name in symbols.items() if is_outright(name, instrument)], np.int64)


def _inside(records: NDArray[np.void], schema: str, session: Session) -> NDArray[np.void]:
    """Records of the session; files are in receive order, so that is one slice."""
    first, last = np.searchsorted(records[time_field(schema)], np.array([session.open_ns, session.close_ns], np.uint64))
    return records[first:last]


def _registered(entry: FileEntry, count: int, inside: NDArray[np.void], schema: str) -> RegisteredFile:
    times = inside[time_field(schema)]
    with refusing(MarketDataError, "cannot be read", where=str(entry.path), remedy="mend its permissions or disk"):
        size_bytes = entry.path.stat().st_size
    return RegisteredFile(
        name=entry.name,
        sha256=file_sha256(entry.path),
        size_bytes=size_bytes,
        dataset=entry.header.dataset,
        schema=schema,
        version=entry.header.version,
        record_count=count,
        session_record_count=len(inside),
        first_ns=int(times[0]),
        last_ns=int(times[-1]),
    )


def _refuse_same_file(files: Sequence[RegisteredFile]) -> None:
    for a, b in combinations(files, 2):
        if a.sha256 == b.sha256:
            raise MarketDataError(
                "the same file was delivered twice",
                where=f"{a.name} and {b.name}",
                expected="each file once",
                remedy="delete one of them",
            )


def _refuse_overlap(
    parts: list[tuple[FileEntry, int, NDArray[np.void]]], schema: str, outrights: NDArray[np.int64]
) -> None:
    """Rows that merely repeat time, price and size are real trades; only overlapping sequence ranges or bar times are not.

    Options and spreads that lie in the same files are no part of the tape.
    """
    for (a, _, one), (b, _, two) in combinations(parts, 2):
        field = time_field(schema)
        start, end = max(one[field][0], two[field][0]), min(one[field][-1], two[field][-1])
        if start > end:
            continue
        x, y = (part[(part[field] >= start) & (part[field] <= end)] for part in (one, two))
        for i in np.intersect1d(np.intersect1d(x["instrument_id"], y["instrument_id"]), outrights):
            u, v = x[x["instrument_id"] == i], y[y["instrument_id"] == i]
            if schema == "trades":
                again = max(u["sequence"].min(), v["sequence"].min()) <= min(u["sequence"].max(), v["sequence"].max())
            else:
                again = bool(np.isin(u["ts_event"], v["ts_event"]).any())
            if again:
                raise MarketDataError(
                    f"records of instrument {int(i)} were delivered twice",
                    where=f"{a.name} and {b.name}, {_utc(int(start))} to {_utc(int(end))}",
                    expected="files whose records do not overlap",
                    remedy="delete the file that repeats the other",
                )


def _volumes(
    records: NDArray[np.void], schema: str, session: Session, symbols: dict[int, str], known_ns: int
) -> Iterator[ContractVolume]:
    """What each outright of the records traded; known_ns: when the front is known."""
    ids, inverse = np.unique(records["instrument_id"], return_inverse=True)
    volume = records["size" if schema == "trades" else "volume"].astype(np.float64)
    times = records[time_field(schema)].astype(np.int64)
    regular = (times >= session.regular_open_ns) & (times < session.regular_close_ns)
    before = times < known_ns
    sums = [
        np.bincount(inverse, weights=volume * mask, minlength=len(ids))
        for mask in (np.ones_like(volume), regular, before)
    ]
    first_ns = np.full(len(ids), np.iinfo(np.int64).max)
    np.minimum.at(first_ns, inverse, times)
    for n, instrument_id in enumerate(ids.tolist()):
        whole, in_regular, early = (int(s[n]) for s in sums)
        yield ContractVolume(instrument_id, symbols[instrument_id], whole, in_regular, early, int(first_ns[n]))


def minutes_seen(times: NDArray[np.int64], start_ns: int, end_ns: int) -> NDArray[np.bool_]:
    """Which minutes (m,) of [start_ns, end_ns) hold one of the times (n,)."""
    inside = times[(times >= start_ns) & (times < end_ns)]
    seen = np.zeros(max(0, (end_ns - start_ns) // MINUTE_NS), bool)
    seen[(inside - start_ns) // MINUTE_NS] = True
    return seen


def share_seen(seen: NDArray[np.bool_]) -> float:
    """Share of minutes that are seen, 1 where there are none to see."""
    return round(float(seen.mean()), 6) if len(seen) else 1.0


def _utc(ts_ns: int) -> str:
    return datetime.fromtimestamp(ts_ns / NS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
