"""Whether a session's artifact that was made with another future holds the same values for all that was known before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from spymaster_assets.contract import STAGE_A_DECISION_S, Contract
from spymaster_assets.datasets.sequences import from_npz_bytes
from spymaster_assets.market.book import book_from_parquet
from spymaster_assets.market.calendar import NEW_YORK, TradingCalendar
from spymaster_assets.market.dbn import BAR_SECONDS
from spymaster_assets.market.files import SessionFiles
from spymaster_assets.market.instruments import instrument
from spymaster_assets.proof.known import Difference, KnownTable, compare
from spymaster_assets.settings import MINUTE_NS, NS
from spymaster_assets.signals.build import signals_from_parquet
from spymaster_assets.store import Artifact

__all__ = ["Difference", "differences", "known_tables"]


def differences(stored: Artifact, replayed: Artifact, cut_ns: int, contract: Contract) -> tuple[list[Difference], int]:
    """Differences of one session artifact in what was known at cut_ns, one a column at most, and how many values were compared.

    Raises ArtifactError when signals follow another contract.
    """
    tables, again = known_tables(stored, contract), known_tables(replayed, contract)
    found: list[Difference] = []
    count = 0
    for file, table in tables.items():
        more, values = compare(stored.asset, stored.key, table, again.get(file), cut_ns)
        found += more
        count += values
    for file, table in again.items():
        if file not in tables and (rows := int((table.known_ns <= cut_ns).sum())):
            found.append(Difference(stored.asset, stored.key, file, "file", "missing", f"{rows} rows"))
    return found, count


def known_tables(artifact: Artifact, contract: Contract) -> dict[str, KnownTable]:
    """What of a session artifact was known when, by the file that it lies in; empty for assets that have no rows in time."""
    tables = _TABLES.get(artifact.asset)
    return dict(tables(artifact, contract)) if tables else {}


Tables = Iterator[tuple[str, KnownTable]]


def _market_files(artifact: Artifact, contract: Contract) -> Tables:
    # names, hashes, counts and volumes of whole files are of the future by nature
    found = SessionFiles.from_json(artifact.json("files.json"))
    opens_ns = TradingCalendar(instrument(found.symbol)).session(found.session).regular_open_ns
    first_ns = found.first_ns + max(BAR_SECONDS.get(found.schema, 0) * NS, 1)
    rows: list[tuple[str, str, int]] = [
        ("schema", found.schema, first_ns),
        ("first_ns", str(found.first_ns), first_ns),
    ]
    rows += [
        (what, str(value), max(opens_ns, first_ns))
        for what, value in (
            ("front", found.front.raw_symbol),
            ("instrument_id", found.front.instrument_id),
            ("rolled_from", found.front.rolled_from),
        )
    ]
    rows += [
        (f"volume of {c.raw_symbol} before the open", str(c.pre_open_volume), max(opens_ns, first_ns))
        for c in found.contracts
        if c.pre_open_volume
    ]
    for minute in found.missing_regular_minutes:
        begins_ns = int(datetime.fromisoformat(minute).timestamp()) * NS
        rows.append(("missing minute", minute, begins_ns + MINUTE_NS))
    yield "files.json", _told(rows)


def _bars(artifact: Artifact, contract: Contract) -> Tables:
    yield _ends(artifact, f"bars_{artifact.key}.parquet", "start_ns")


def _levels(artifact: Artifact, contract: Contract) -> Tables:
    context, levels = (artifact.frame(name) for name in ("context.parquet", "levels.parquet"))
    starts_ns = {"end_ns": context["start_ns"].to_numpy()}
    yield "context.parquet", KnownTable(context, context["end_ns"].to_numpy(), starts_ns, "start_ns", ("start_ns",))
    yield _ends(artifact, "two_minute.parquet", "end_ns")
    # all levels of a bar are known when it starts, and listed when it has ended
    ends = levels.select("start_ns").join(
        context.select("start_ns", "end_ns").unique(), on="start_ns", how="left", maintain_order="left"
    )
    listed = ends["end_ns"].fill_null(levels["start_ns"] + MINUTE_NS)
    starts_ns = {c: levels["start_ns"].to_numpy() for c in levels.columns if c != "start_ns"}
    yield "levels.parquet", KnownTable(levels, listed.to_numpy(), starts_ns, "start_ns", ("start_ns",))
    # the contract in front is known at the regular open, and with it what lies before the session
    opens_ns = int(datetime.fromisoformat(f"{artifact.key}T09:30").replace(tzinfo=NEW_YORK).timestamp()) * NS
    meta = artifact.json("levels.json")
    frame = pl.DataFrame({"what": sorted(meta), "value": [repr(meta[k]) for k in sorted(meta)]})
    yield "levels.json", KnownTable(frame, np.full(frame.height, opens_ns, np.int64), name="what")


def _book(artifact: Artifact, contract: Contract) -> Tables:
    if "book.parquet" in artifact.files:
        book = book_from_parquet(artifact.read("book.parquet"))
        over_ns = (book.ts_ns // book.bucket_ns + 1) * book.bucket_ns
        yield "book.parquet", KnownTable(artifact.frame("book.parquet"), over_ns, name="ts_ns")


def _flow(artifact: Artifact, contract: Contract) -> Tables:
    if "flow.parquet" in artifact.files:
        frame = artifact.frame("flow.parquet")
        yield "flow.parquet", KnownTable(frame, frame["ts_ns"].to_numpy() + 1, name="ts_ns")


def _basis(artifact: Artifact, contract: Contract) -> Tables:
    frame = artifact.frame("basis.parquet")
    yield "basis.parquet", KnownTable(frame, frame["known_ns"].to_numpy(), name="known_ns")


def _signals(artifact: Artifact, contract: Contract) -> Tables:
    name = f"signals_{artifact.key}.parquet"
    signals = signals_from_parquet(artifact.read(name), contract, str(artifact.folder / name))
    frame, meta = signals.frame, signals.metadata
    t0_ns = frame["ts_ns"].to_numpy()
    times = {c.name: t0_ns + c.known_after_s * NS for c in contract.columns if c.name != "event_id"}
    # splits purge by what the row itself says of its labels, so they are held to that too
    said_ns = frame["label_known_ns"].fill_null(np.iinfo(np.int64).max).to_numpy()
    times |= {c.name: np.minimum(times[c.name], said_ns) for c in contract.role("label")}
    columns = frame.select("event_id", *times)
    yield name, KnownTable(columns, frame["decision_ns"].to_numpy(), times, "event_id", ("event_id",))
    if "base_rates" in meta:  # a table that a canary compares has no figures of its day
        yield "metadata", _whole_day(meta, artifact.key, max(c.known_after_s for c in contract.role("feature")))


def _whole_day(meta: Mapping[str, Any], session: str, features_s: int) -> KnownTable:
    """Figures of all touches of a session: known at its close, and shares of missing features when the last touch's have come."""
    closes_ns = TradingCalendar(instrument(meta["symbol"])).session(session).regular_close_ns
    rows = [("rows", str(meta["rows"]), closes_ns)]
    rows += [
        (f"base rate, {mode}, {of}", str(rate), closes_ns)
        for mode, rates in meta["base_rates"].items()
        for of, rate in rates.items()
    ]
    rows += [
        (f"null share of {c}", repr(share), closes_ns + features_s * NS) for c, share in meta["null_share"].items()
    ]
    return _told(rows)


def _sequences(artifact: Artifact, contract: Contract) -> Tables:
    name = f"sequence_dataset_{artifact.key}.npz"
    arrays = from_npz_bytes(artifact.read(name), str(artifact.folder / name))
    t0_ns, statics = arrays["ts_ns"], arrays["static_feature_names"].tolist()
    after_s = max(c.known_after_s for c in contract.role("label"))  # of any delay: the file does not say which it holds
    # the last step of a window is the touch bar, the others had ended at t0
    parts: dict[str, tuple[NDArray[np.generic], int]] = {
        "X[:, :-1]": (arrays["X"][:, :-1], 0),
        "mask[:, :-1]": (arrays["mask"][:, :-1], 0),
        "X[:, -1]": (arrays["X"][:, -1:], STAGE_A_DECISION_S),
        "mask[:, -1]": (arrays["mask"][:, -1:], STAGE_A_DECISION_S),
        **{
            f"static {s}": (arrays["static"][:, i], contract[s.split("=")[0]].known_after_s)
            for i, s in enumerate(statics)
        },
        "y_break": (arrays["y_break"], after_s),
        "y_strength": (arrays["y_strength"], after_s),
    }
    frame = pl.DataFrame(
        {"event_id": arrays["event_id"].tolist(), **{c: _row_bytes(values) for c, (values, _) in parts.items()}},
        schema={"event_id": pl.String, **dict.fromkeys(parts, pl.Binary)},
    )
    known_ns = {c: t0_ns + seconds * NS for c, (_, seconds) in parts.items()}
    yield name, KnownTable(frame, t0_ns + STAGE_A_DECISION_S * NS, known_ns, "event_id", ("event_id",))
    names = pl.DataFrame({"name": [*arrays["seq_feature_names"].tolist(), *statics]})
    # names are of the contract, and known at any time
    yield "feature names", KnownTable(names, np.zeros(names.height, np.int64))


_TABLES: Mapping[str, Callable[[Artifact, Contract], Tables]] = {
    "market_files": _market_files,
    "ohlcv_bars": _bars,
    "book_snapshots": _book,
    "option_flow": _flow,
    "spot_basis": _basis,
    "levels": _levels,
    "signals": _signals,
    "sequence_dataset": _sequences,
}


def _told(rows: list[tuple[str, str, int]]) -> KnownTable:
    """Facts of a whole artifact: what, its value and when it is known, ns."""
    frame = pl.DataFrame(rows, schema={"what": pl.String, "value": pl.String, "known_ns": pl.Int64}, orient="row")
    return KnownTable(frame.drop("known_ns"), frame["known_ns"].to_numpy(), name="what")


def _ends(artifact: Artifact, file: str, name: str) -> tuple[str, KnownTable]:
    """A Parquet file whose rows are known at their end_ns."""
    frame = artifact.frame(file)
    return file, KnownTable(frame, frame["end_ns"].to_numpy(), name=name)


def _row_bytes(array: NDArray[np.generic]) -> list[bytes]:
    """Each row of an array (n, ...) as its bytes."""
    if not array.size:
        return [b""] * len(array)
    flat = np.ascontiguousarray(array).reshape(len(array), -1)
    return flat.view(f"V{flat.dtype.itemsize * flat.shape[1]}").ravel().tolist()
