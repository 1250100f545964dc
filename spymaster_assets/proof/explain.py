"""An event explained: from its predictions to the models, the rows they learned from, its own row, and the records behind it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import polars as pl
import xgboost as xgb

from spymaster_assets.contract import STAGES, Column, Contract, decision_after_s, load_contract
from spymaster_assets.datasets.matrix import CLASSIFIERS, HEADS, encode
from spymaster_assets.datasets.sequences import from_npz_bytes
from spymaster_assets.datasets.splits import SplitManifest
from spymaster_assets.errors import ConfigError, ContractError, MissingInputError, SpymasterError
from spymaster_assets.evaluation.calibration import BASELINES
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.dbn import read_header
from spymaster_assets.market.files import SUFFIXES, SessionFiles, symbols_of
from spymaster_assets.models.trees import BoostedTrees, Bundle, bundle_name
from spymaster_assets.partitions import MODEL_ASSETS, calendar_of
from spymaster_assets.proof.lineage import FILE, Link, State, chain, input_of
from spymaster_assets.proof.records import RecordRange, Window, record_ranges
from spymaster_assets.retrieval.index import RetrievalIndex
from spymaster_assets.settings import DELAYS_S, NS, Settings
from spymaster_assets.signals.build import SignalSet, signals_from_parquet
from spymaster_assets.store import Artifact, ArtifactStore

SHOWN_CONTRIBUTIONS = 10
_EVENT_ID = re.compile(r"^[A-Z0-9]+_(?P<session>\d{4}-\d{2}-\d{2})_[A-Z0-9_]+_-?\d+_(UP|DOWN)_\d+$")
_ID_FORM = "SYMBOL_YYYY-MM-DD_KIND_TICK_UP|DOWN_T0 (t0 in UTC ns)"
_MODEL_ASSET = {"patchtst": "patchtst_model", "trees": "tree_bundles", "retrieval": "retrieval_index", "null_knn": "retrieval_index"}  # fmt: skip


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

    inputs_equal: whether the split was made from the signals that are stored now; None where it does not read them.
    """

    asof: str
    part: str
    reason: str
    models: tuple[str, ...]
    inputs_equal: bool | None


@dataclass(frozen=True)
class ModelArtifact:
    """A stored model: its key is the as-of session; runs are the trackers' ids by name, created_at is UTC."""

    asset: str
    asof: str
    version: str
    sha256: str
    runs: dict[str, str]
    created_at: str
    git_revision: str


@dataclass(frozen=True)
class Contribution:
    """What one feature added to a tree model's output for this event, with its value and when that was known (UTC ns)."""

    feature: str
    contribution: float
    value: float | None
    unit: str
    known_at: str
    known_ns: int


@dataclass(frozen=True)
class Contributions:
    """Exact contributions (XGBoost's TreeSHAP) in `unit`, largest first: bias + shown + rest = total, from which p follows."""

    unit: str
    bias: float
    total: float
    rest: float
    features: tuple[Contribution, ...]


@dataclass(frozen=True)
class Prediction:
    """One judged prediction: p is a probability, or SPY dollars for strength; y what came, reference the training base rate or median."""

    model: str
    head: str
    delay: str
    stage: str
    decision_ns: int
    p: float
    reference: float
    y: float
    baseline: bool
    artifact: str | None
    train_rows: int | None
    contributions: Contributions | None


@dataclass(frozen=True)
class Neighbour:
    """A past touch that retrieval compared the event with, nearest first; distance in scaled features."""

    rank: int
    event_id: str
    date: str
    distance: float
    weight: float
    outcome: str
    strength_signed_usd: float | None


@dataclass(frozen=True)
class Training:
    """Rows that the fold's models could learn from, purged ones left out, and when the last of their labels was known (UTC ns).

    none_from_the_future: that was before first_test_decision_ns.
    """

    train_rows: int
    validation_rows: int
    purged: dict[str, int]
    first_date: str
    last_date: str
    latest_label_known_ns: int
    first_test_decision_ns: int
    none_from_the_future: bool


@dataclass(frozen=True)
class Fold:
    """The fold that judged the event: its sessions, training rows, models, predictions and retrieval's neighbours."""

    asof: str
    window: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    embargoed: tuple[str, ...]
    training: Training
    models: tuple[ModelArtifact, ...]
    predictions: tuple[Prediction, ...]
    neighbour_filter: str
    neighbours: tuple[Neighbour, ...]


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
    ContractError for a malformed id, MissingInputError for an unknown event or as-of session, ConfigError for an unknown word,
    ArtifactError when the event's own row or what judged it was altered.
    """
    store, contract = ArtifactStore(settings.root), load_contract()
    ablations = [f"trees_{a}" for a in contract.ablations]
    words = [*_MODEL_ASSET, *ablations, *BASELINES, *HEADS, *DELAYS_S, *STAGES]
    _require(heads, words, "word of a head", "model, head, delay or stage")
    key = session_of(store, event_id)
    signals, artifact = _signals(store, key, contract)
    row, at = _find(signals.frame, event_id, artifact)
    event = _event(row, contract)
    uses = _uses(store, event, artifact.sha256)
    _require(asofs, [u.asof for u in uses], "as-of session", f"as-of sessions whose split holds {key}")
    uses = tuple(u for u in uses if not asofs or u.asof in asofs)
    folds = tuple(
        _fold(store, u.asof, row, event, contract, heads)
        for u in uses
        if u.part == "test" and store.exists("calibration_report", u.asof)
    )
    links = chain(store, settings.dbn_dir, _starts(store, key, uses))
    faults: list[str] = []
    session = calendar_of(settings.symbol).session(key)
    return Explanation(
        simulated=bool(signals.metadata["simulated"]) or settings.simulated,
        event=event,
        uses=uses,
        folds=folds,
        signal_row=_row_at(artifact, f"signals_{key}.parquet", at, at, "signal row"),
        values=tuple(_value(row, c) for c in contract.columns),
        sequence_row=_sequence_row(store, event, faults),
        bars=_bars(store, event, faults),
        files=_files(store, settings, session, row, _attempt_start_ns(signals.frame, row), links, faults),
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
    ids = _signals(store, key, load_contract())[0].frame["event_id"]
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


def _uses(store: ArtifactStore, event: Event, sha256: str) -> tuple[Use, ...]:
    out = []
    for asof in store.keys("split_manifest"):
        split = _split(store, asof)
        purged = {p["event_id"]: p["reason"] for p in split.purged}
        parts = ("train", "validation", "test", "embargoed")
        part = next((p for p in parts if event.session in getattr(split, p)), None)
        if part is None:
            continue
        reason = purged.get(event.event_id, "")
        recorded = split.inputs.get(event.session)
        models = tuple(a for a in MODEL_ASSETS[1:] if store.exists(a, asof))
        out.append(
            Use(asof, "purged" if reason else part, reason, models, None if recorded is None else recorded == sha256)
        )
    return tuple(out)


def _starts(store: ArtifactStore, key: str, uses: Sequence[Use]) -> list[tuple[str, str]]:
    """Where the chain begins: what judged the event, else the models that it trained; its own assets in any case."""
    starts = []
    for use in uses:
        judged = use.part == "test" and store.exists("calibration_report", use.asof)
        starts += [("calibration_report", use.asof)] if judged else [(a, use.asof) for a in use.models]
    own = [("sequence_dataset", key)] if store.exists("sequence_dataset", key) else []
    return [*starts, *own, ("signals", key)]


def _fold(
    store: ArtifactStore, asof: str, row: pl.DataFrame, event: Event, contract: Contract, heads: Sequence[str]
) -> Fold:
    split = _split(store, asof)
    models = {a: store.load(a, asof) for a in MODEL_ASSETS[1:]}
    said = pl.read_parquet(io.BytesIO(store.load("calibration_report", asof).read("predictions.parquet")))
    said = said.filter(pl.col("event_id") == event.event_id)
    trees = BoostedTrees.load(_all_files(models["tree_bundles"]))
    index = RetrievalIndex.load(_all_files(models["retrieval_index"]))
    summary, near = index.query(row, contract)
    chosen = [
        r for r in said.iter_rows(named=True) if set(heads) <= {r[c] for c in ("model", "head", "delay", "stage")}
    ]
    return Fold(
        asof=asof,
        window=split.window,
        train=split.train,
        validation=split.validation,
        test=split.test,
        embargoed=split.embargoed,
        training=_training(store, split, contract),
        models=tuple(_model(a) for a in models.values()),
        predictions=tuple(_prediction(r, row, event, trees, contract) for r in chosen),
        neighbour_filter=str(summary["filter"][0]),
        neighbours=tuple(
            Neighbour(
                r["rank"],
                r["neighbour_id"],
                r["date"],
                r["distance"],
                r["weight"],
                r["outcome"],
                _finite(r["strength_signed"]),
            )
            for r in near.iter_rows(named=True)
        ),
    )


def _training(store: ArtifactStore, split: SplitManifest, contract: Contract) -> Training:
    """Counts and the latest label of the stored training rows, and the first decision on the stored test rows."""
    purged = [p["event_id"] for p in split.purged]
    parts = {
        part: pl.concat(
            _signals(store, k, contract)[0].frame.select("event_id", "date", "label_known_ns")
            for k in getattr(split, part)
        ).filter(~pl.col("event_id").is_in(purged))
        for part in ("train", "validation")
    }
    rows = pl.concat(parts.values())
    tested = [_signals(store, k, contract)[0].frame["decision_ns"] for k in split.test if store.exists("signals", k)]
    first_ns = int(pl.concat(tested).min())  # type: ignore[arg-type]
    latest_ns = int(rows["label_known_ns"].max())  # type: ignore[arg-type]
    return Training(
        train_rows=parts["train"].height,
        validation_rows=parts["validation"].height,
        purged={part: sum(p["part"] == part for p in split.purged) for part in ("train", "validation")},
        first_date=str(rows["date"].min()),
        last_date=str(rows["date"].max()),
        latest_label_known_ns=latest_ns,
        first_test_decision_ns=first_ns,
        none_from_the_future=latest_ns < first_ns,
    )


def _model(artifact: Artifact) -> ModelArtifact:
    return ModelArtifact(
        asset=artifact.asset,
        asof=artifact.key,
        version=artifact.folder.name,
        sha256=artifact.sha256,
        runs={k: str(v) for k, v in artifact.metadata.items()},
        created_at=str(artifact.provenance.get("created_at", "")),
        git_revision=str(artifact.provenance.get("git_revision", "")),
    )


def _prediction(
    said: dict[str, Any], row: pl.DataFrame, event: Event, trees: BoostedTrees, contract: Contract
) -> Prediction:
    model, head, delay, stage = (str(said[c]) for c in ("model", "head", "delay", "stage"))
    family, _, ablation = model.partition("_") if model.startswith("trees") else (model, "", "")
    name = bundle_name(head, delay, stage, ablation or "full")
    bundle = next((b for b in trees.bundles if family == "trees" and b.name == name), None)
    return Prediction(
        model=model,
        head=head,
        delay=delay,
        stage=stage,
        decision_ns=event.t0_ns + decision_after_s(stage, delay) * NS,
        p=said["p"],
        reference=said["reference"],
        y=said["y"],
        baseline=model in BASELINES,
        artifact=_MODEL_ASSET.get(family),
        train_rows=None if bundle is None else bundle.meta["train_rows"],
        contributions=None if bundle is None else contributions(bundle, row, event.t0_ns, contract),
    )


def contributions(bundle: Bundle, row: pl.DataFrame, t0_ns: int, contract: Contract) -> Contributions:
    """What each feature of one signals row (1, columns) added to the head's output: log-odds, or SPY dollars for strength."""
    X, names = encode(row, [contract[c] for c in bundle.meta["feature_columns"]])
    used = bundle.meta["features"]
    x = X[:, [names.index(n) for n in used]]
    added = bundle.booster().predict(xgb.DMatrix(x, feature_names=used), pred_contribs=True)[0].astype(np.float64)
    order = np.argsort(-np.abs(added[:-1]), kind="stable")[:SHOWN_CONTRIBUTIONS]
    shown = []
    for i in order.tolist():
        column = contract[used[i].partition("=")[0]]
        shown.append(
            Contribution(
                feature=used[i],
                contribution=float(added[i]),
                value=_finite(float(x[0, i])),
                unit=column.unit,
                known_at=column.known_at,
                known_ns=t0_ns + column.known_after_s * NS,
            )
        )
    return Contributions(
        unit="log-odds" if bundle.meta["head"] in CLASSIFIERS else "SPY dollars",
        bias=float(added[-1]),
        total=float(added.sum()),
        rest=float(added[:-1].sum() - added[order].sum()),
        features=tuple(shown),
    )


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


def _sequence_row(store: ArtifactStore, event: Event, faults: list[str]) -> RowAt | None:
    name = f"sequence_dataset_{event.session}.npz"
    try:
        artifact = store.load("sequence_dataset", event.session)
        arrays = from_npz_bytes(artifact.read(name), str(artifact.folder / name))
    except SpymasterError as error:
        faults.append(str(error))
        return None
    at = np.flatnonzero(arrays["event_id"] == event.event_id)
    if not len(at):
        faults.append(f"{name} has no row of the event: it was made from other signals")
        return None
    steps = int(arrays["mask"][at[0]].sum())
    return _row_at(artifact, name, int(at[0]), int(at[0]), f"{steps} closed minutes")


def _bars(store: ArtifactStore, event: Event, faults: list[str]) -> tuple[RowAt, ...]:
    """Rows of the bars that the signal row rests on: the session's up to the decision, and whole warm-up sessions, oldest first."""
    out = []
    try:
        warmup = store.load("levels", event.session).json("levels.json")["warmup_sessions"]
    except SpymasterError as error:
        faults.append(str(error))
        warmup = []
    for key in [*warmup, event.session]:
        own = key == event.session
        name = f"bars_{key}.parquet"
        try:
            artifact = store.load("ohlcv_bars", key)
            bars = pl.read_parquet(io.BytesIO(artifact.read(name)))
        except SpymasterError as error:
            faults.append(str(error))
            continue
        read = pl.col("is_front") & (pl.col("end_ns") <= event.decision_ns)
        for minutes in (1, 2):
            rows = bars.with_row_index("row").filter(read & (pl.col("timeframe_min") == minutes))["row"]
            if len(rows):
                what = f"{minutes} min, {'to the decision' if own else 'warm-up session'}"
                out.append(_row_at(artifact, name, int(rows[0]), int(rows[-1]), what))
    return tuple(out)


def _attempt_start_ns(frame: pl.DataFrame, row: pl.DataFrame) -> int:
    """t0 of the first touch of the event's attempts, whose own windows the trend columns are measured against."""
    same = ("level_kind", "direction_sign", "attempt_cluster_id")
    return int(frame.join(row.select(same), on=same)["ts_ns"].min())  # type: ignore[arg-type]


def _files(
    store: ArtifactStore,
    settings: Settings,
    session: Session,
    row: pl.DataFrame,
    attempt_ns: int,
    links: Sequence[Link],
    faults: list[str],
) -> tuple[FileRead, ...]:
    out = []
    state = {(link.asset, link.input): link.state for link in links if link.kind == FILE and link.key == session.key}
    for asset, feed in (("market_files", "tape"), ("book_snapshots", "book"), ("option_flow", "options")):
        try:
            artifact = store.load(asset, session.key)
            registered = SessionFiles.from_json(store.load("market_files", session.key).json("files.json"))
        except SpymasterError as error:
            faults.append(str(error))
            continue
        for name, sha256 in artifact.inputs.items():
            if input_of(artifact, name)[0] != FILE:
                continue
            now = state.get((asset, name), "missing")
            schema, ranges = "", ()
            if now == "equal" and name.endswith(SUFFIXES):
                try:
                    schema, ranges = _ranges(settings, session, feed, name, registered, row, attempt_ns)
                except SpymasterError as error:
                    faults.append(str(error))
            elif now == "equal":
                schema = "csv"
            out.append(FileRead(feed, name, sha256, now, schema, tuple(ranges)))
    return tuple(out)


def _ranges(
    settings: Settings,
    session: Session,
    feed: str,
    name: str,
    registered: SessionFiles,
    row: pl.DataFrame,
    attempt_ns: int,
) -> tuple[str, tuple[RecordRange, ...]]:
    path = settings.dbn_dir / name
    header = read_header(path)
    contract_id: int | None = None
    if feed == "tape":
        contract_id = registered.front_id
    elif feed == "book":
        mapped = {symbol: number for number, symbol in symbols_of([header], session.key).items()}
        contract_id = mapped.get(registered.front.raw_symbol, registered.front_id)
    windows = list(_windows(settings, session, feed, header.schema, int(row["ts_ns"][0]), attempt_ns))
    return header.schema, record_ranges(path, windows, contract_id)


def _windows(
    settings: Settings, session: Session, feed: str, schema: str, t0_ns: int, attempt_ns: int
) -> Iterator[Window]:
    """The times that the formulas of signals/ read of each feed for a touch at t0."""
    tape_ns, barrier_ns = settings.signal.tape_window_s * NS, settings.barrier.window_s * NS
    decision_ns = t0_ns + decision_after_s("A", "4min") * NS
    earlier = attempt_ns < t0_ns
    if feed == "tape":
        delays = sorted(DELAYS_S.values())
        yield Window("bars to the decision", session.open_ns, decision_ns)
        if schema == "trades":
            yield Window("tape window", t0_ns, t0_ns + tape_ns)
            if earlier:
                yield Window("tape, first attempt", attempt_ns, attempt_ns + tape_ns)
            yield Window("fills in the barrier", t0_ns, t0_ns + barrier_ns)
        last_ns = min(t0_ns + (delays[-1] + settings.label.look_forward_s) * NS, session.regular_close_ns)
        yield Window("labels", t0_ns + delays[0] * NS + 1, last_ns + 1)
    elif feed == "book":
        margin_ns = session.regular_open_ns - settings.book.before_open_min * 60 * NS
        first_ns = max(t0_ns - settings.barrier.baseline_s * NS, margin_ns)
        # a book of single orders rests on all of them
        yield Window("barrier baseline", 0 if schema == "mbo" else first_ns, t0_ns)
        yield Window("barrier window", t0_ns, t0_ns + barrier_ns)
        if earlier:
            yield Window("barrier, first attempt", attempt_ns, attempt_ns + barrier_ns)
    elif schema == "definition":
        yield Window("the whole file", 0, np.iinfo(np.int64).max)
    elif schema == "statistics":
        yield Window("before the open", 0, session.regular_open_ns)
    else:
        from_ns = session.open_ns if schema in ("trades", "tbbo", "tcbbo") else 0
        yield Window("up to the touch", from_ns, t0_ns + 1)


def _require(words: Sequence[str], known: Sequence[str], what: str, expected: str) -> None:
    if unknown := [w for w in words if w not in known]:
        raise ConfigError(f"unknown {what} {unknown[0]!r}", expected=f"{expected}: {', '.join(dict.fromkeys(known))}")


def _signals(store: ArtifactStore, key: str, contract: Contract) -> tuple[SignalSet, Artifact]:
    artifact = store.load("signals", key)
    name = f"signals_{key}.parquet"
    return signals_from_parquet(artifact.read(name), contract, str(artifact.folder / name)), artifact


def _split(store: ArtifactStore, asof: str) -> SplitManifest:
    return SplitManifest.from_json(store.load("split_manifest", asof).json("split.json"))


def _all_files(artifact: Artifact) -> dict[str, bytes]:
    return {name: artifact.read(name) for name in artifact.files}


def _row_at(artifact: Artifact, name: str, first: int, last: int, what: str) -> RowAt:
    return RowAt(artifact.asset, artifact.key, str(artifact.path(name)), artifact.sha256, first, last, what)


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
