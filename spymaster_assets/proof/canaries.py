"""Canaries of a fold: planted leaks must be caught, and models of shuffled labels or of noise must score chance.

Chance is made, not assumed. Labels are permuted within each session (shuffled_labels) or every feature column over all touches (noise),
in training and validation together and by event, so that a row which reaches both parts brings its label or its noise along and is
recognised. Given the fitted model, the validation rows are then exchangeable by construction, however much the touches of a session
depend on each other: mean and variance of the score are those of its permutation distribution, exactly, and those of its mean over
independent trials too. A bootstrap over four validation sessions could promise neither.

Each interval of chance has the level 1 - false_block_rate / (number of such canaries), so that an honest fold is blocked with at most
that probability (Bonferroni). No model stops early here: choosing the round on the rows that are scored would not be chance.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from spymaster_assets.contract import Column, Contract, decision_after_s, known_after_s
from spymaster_assets.datasets.matrix import CLASSIFIERS, feature_matrix, labelled_rows, target
from spymaster_assets.errors import ContractError, ModelError
from spymaster_assets.evaluation.calibration import brier_skill, too_few
from spymaster_assets.evaluation.metrics import Floats, auc
from spymaster_assets.models.base import SequenceData
from spymaster_assets.models.trees import BoostedTrees, Bundle
from spymaster_assets.proof.compare import differences
from spymaster_assets.retrieval.index import fit_index_unchecked
from spymaster_assets.settings import DELAYS_S, NS, CanarySettings, PatchTSTSettings, RetrievalSettings, TreeSettings
from spymaster_assets.signals.build import SignalSet, signals_to_parquet
from spymaster_assets.store import Artifact, ArtifactStore

Verdict = Literal["holds", "failed", "not assessable"]
CANARIES = (
    "planted_declared",
    "planted_replay",
    "planted_column",
    "planted_model",
    "planted_patchtst",
    "production_columns",
    "production_sequences",
    "shuffled_labels",
    "shuffled_labels_patchtst",
    "noise_trees",
    "noise_retrieval",
)
CHANCE: dict[str, tuple[str, ...]] = {
    "shuffled_labels": CLASSIFIERS,
    "shuffled_labels_patchtst": ("direction",),
    "noise_trees": CLASSIFIERS,
    "noise_retrieval": CLASSIFIERS,
}
"""Canaries whose interval must hold chance, and the classifier heads that each is run for."""
PLANT = "planted_future"


@dataclass(frozen=True)
class Canary:
    """One canary: `value` of `statistic` over n rows with its interval (low, high) at `level` over `trials`; `limit` is chance, or the
    bound that a planted leak must exceed and a production column must not."""

    canary: str
    what: str
    statistic: str
    verdict: Verdict
    reason: str
    n: int = 0
    trials: int = 1
    value: float | None = None
    low: float | None = None
    high: float | None = None
    level: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Fold:
    """What the canaries of an as-of session may read: signals rows and sequences of both parts without purged ones, and settings."""

    train: pl.DataFrame
    validation: pl.DataFrame
    train_sequences: SequenceData
    validation_sequences: SequenceData
    contract: Contract
    delay: str
    tree: TreeSettings
    retrieval: RetrievalSettings
    patchtst: PatchTSTSettings
    canary: CanarySettings

    @property
    def level(self) -> float:
        """Level of each interval of chance."""
        return 1 - self.canary.false_block_rate / sum(len(heads) for heads in CHANCE.values())

    @property
    def pooled(self) -> pl.DataFrame:
        """Training rows, then validation rows."""
        return pl.concat([self.train, self.validation])

    def split(self, pooled: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Inverse of `pooled`."""
        return pooled.head(self.train.height), pooled.tail(self.validation.height)


def run_canaries(fold: Fold) -> list[Canary]:
    """Every canary of a fold, in the order of CANARIES; equal for equal input."""
    found = [planted_declared(fold), planted_replay(fold)]
    for canary in (planted_column, planted_model):
        found += [canary(fold, head) for head in CLASSIFIERS]
    found += [planted_patchtst(fold, part) for part in ("channel", "static column")]
    found += [production_columns(fold, stage) for stage in fold.tree.stages]
    return [*found, production_sequences(fold), *shuffled_labels(fold), shuffled_labels_patchtst(fold), *noise(fold)]


def to_json(canaries: Sequence[Canary], asof: str, simulated: bool) -> dict[str, Any]:
    """JSON-able form: asof, simulated, failed (names), canaries."""
    return {
        "asof": asof,
        "simulated": simulated,
        "failed": sorted({c.canary for c in canaries if c.verdict == "failed"}),
        "canaries": [asdict(c) for c in canaries],
    }


def planted_declared(fold: Fold) -> Canary:
    """A future column that declares itself so must be in no allow-list and refused by name, for every stage and delay."""
    contract = with_plant(fold.contract, f"t1_{fold.delay}+480s")
    asked = [(stage, delay) for stage in fold.tree.stages for delay in DELAYS_S]
    let_in = []
    for stage, delay in asked:
        decision_s = decision_after_s(stage, delay)
        if contract[PLANT].known_after_s <= decision_s:
            continue
        try:
            contract.require_known([PLANT], decision_s)
        except ContractError:
            if PLANT not in (c.name for c in contract.features(stage, delay)):
                continue
        let_in.append(f"stage {stage} {delay}")
    reason = f"let in at {', '.join(let_in)}" if let_in else "refused at every decision"
    return Canary(
        "planted_declared",
        "a column declared as known after the decision",
        "share refused",
        "failed" if let_in else "holds",
        reason,
        n=len(asked),
        value=1 - len(let_in) / len(asked),
        limit=1.0,
    )


def planted_replay(fold: Fold) -> Canary:
    """A future column that claims to be known at t0 must differ, alone, from what was known at a decision inside its session.

    Rows and labels of the replay are those that the stored rows of the newest validation session held by then.
    """
    what = (
        "a column from after the decision that claims to be known at t0, compared with what was known at the decision"
    )
    source = fold.contract[_future(fold.delay)]
    defined = fold.validation.drop_nulls(source.name)
    if not defined.height:
        return _silent("planted_replay", what, "share caught", "no validation row has a defined label")
    key = str(defined["date"].max())
    cut_ns = int(np.sort(defined.filter(pl.col("date") == key)["decision_ns"].to_numpy())[-1])
    stored = fold.validation.filter(pl.col("date") == key)
    known = pl.col("ts_ns") + source.known_after_s * NS <= cut_ns
    replayed = stored.filter(pl.col("decision_ns") <= cut_ns).with_columns(
        pl.when(known).then(source.name).alias(source.name)
    )
    contract = with_plant(fold.contract, "t0")
    named = _replayed(plant(stored, fold.delay), plant(replayed, fold.delay), key, cut_ns, contract)
    caught = named == {PLANT}
    reason = f"in {key}: {', '.join(sorted(named)) or 'no column'} differs"
    return Canary(
        "planted_replay",
        what,
        "share caught",
        "holds" if caught else "failed",
        reason,
        n=stored.height,
        value=float(caught),
        limit=1.0,
    )


def planted_column(fold: Fold, head: str) -> Canary:
    """The detector of `production_columns` must see the lying column."""
    what, limit = f"AUC of the lying column alone, {head}", fold.canary.plausible_auc_a
    found = _best_column(plant(fold.pooled, fold.delay), with_plant(fold.contract, "t0"), head, fold, "A", {PLANT})
    if found is None:
        return _silent("planted_column", what, "AUC", f"fewer than {fold.tree.min_class_rows} rows of a class")
    value, _, n = found
    caught = value > limit
    reason = "seen as too good" if caught else "as plausible as an honest column: the detector is blind"
    return Canary("planted_column", what, "AUC", "holds" if caught else "failed", reason, n=n, value=value, limit=limit)


def planted_model(fold: Fold, head: str) -> Canary:
    """Trees that are fed with the lying column must be seen to be too good on validation: else these canaries cannot sing."""
    what, limit = f"trees fed with the lying column, {head}", fold.canary.plausible_auc_a
    train, validation = fold.split(plant(fold.pooled, fold.delay))
    return _too_good(
        "planted_model", what, limit, _trees(fold, train, validation, head, with_plant(fold.contract, "t0"))
    )


def planted_patchtst(fold: Fold, part: str) -> Canary:
    """PatchTST that is fed with the lie, in every bar of a channel or in a static column, must be seen to be too good on validation."""
    train, validation = (plant_sequences(d, part) for d in (fold.train_sequences, fold.validation_sequences))
    what, steps = f"PatchTST fed with a lying {part}, direction", fold.canary.patchtst_plant_steps
    return _too_good("planted_patchtst", what, fold.canary.plausible_auc_a, _patchtst(fold, train, validation, steps))


def _too_good(canary: str, what: str, limit: float, scored: _Scored | str) -> Canary:
    """Verdict on a model that was fed with a lie."""
    if isinstance(scored, str):
        return _silent(canary, what, "AUC", scored)
    value = auc(scored.y, scored.p) or 0.0
    caught = value > limit
    return Canary(
        canary,
        what,
        "AUC",
        "holds" if caught else "failed",
        "too good to be true, as it must be" if caught else "no better than plausible: the plant went unread",
        n=len(scored.y),
        value=value,
        limit=limit,
    )


def production_columns(fold: Fold, stage: str) -> Canary:
    """No single production column may tell the outcome better than is plausible at its stage, on the rows of both parts."""
    limit = fold.canary.plausible_auc_a if stage == "A" else fold.canary.plausible_auc_b
    what = f"best single production column, stage {stage}"
    found = [
        (*best, head)
        for head in CLASSIFIERS
        if (best := _best_column(fold.pooled, fold.contract, head, fold, stage)) is not None
    ]
    if not found:
        return _silent(
            "production_columns", what, "AUC", f"fewer than {fold.tree.min_class_rows} rows of a class in both heads"
        )
    value, column, n, head = max(found)
    return Canary(
        "production_columns",
        what,
        "AUC",
        "failed" if value > limit else "holds",
        f"{column} for {head}",
        n=n,
        value=value,
        limit=limit,
    )


def production_sequences(fold: Fold) -> Canary:
    """No channel's last bar and no static column of the sequences may tell BREAK from BOUNCE better than is plausible at stage A.

    A window that ends too late shows here: one bar among so many is more than PatchTST learns in a few epochs.
    """
    what, limit = "best last bar or static column of the sequences", fold.canary.plausible_auc_a
    pooled = SequenceData.concatenate([fold.train_sequences, fold.validation_sequences])
    rows = pooled.select(pooled.y_break >= 0)
    X = np.concatenate([rows.X[:, -1], rows.static], axis=1)
    names = (*(f"last bar of {name}" for name in rows.channel_names), *rows.static_names)
    side = rows.static[:, rows.static_names.index("direction_sign")]
    best = _best_value(X, names, rows.y_break > 0, side, fold.tree.min_class_rows)
    if best is None:
        return _silent("production_sequences", what, "AUC", f"fewer than {fold.tree.min_class_rows} rows of a class")
    value, name, n = best
    verdict: Verdict = "failed" if value > limit else "holds"
    return Canary("production_sequences", what, "AUC", verdict, f"{name} for direction", n=n, value=value, limit=limit)


def shuffled_labels(fold: Fold) -> list[Canary]:
    """Trees of labels permuted within sessions, scored on the validation sessions by AUC within sessions: 0.5 must be inside."""
    labels = [c.name for c in fold.contract.role("label")]
    tried = []
    for trial in range(fold.canary.permutations):
        rng = np.random.default_rng([fold.canary.seed, 1, trial])
        train, validation = fold.split(permuted(fold.pooled, [labels], rng, within="date"))
        tried.append({head: _trees(fold, train, validation, head, fold.contract) for head in CLASSIFIERS})

    return [
        _by_chance(fold, "shuffled_labels", f"trees of shuffled labels, {h}", h, tried, _within_sessions)
        for h in CLASSIFIERS
    ]


def shuffled_labels_patchtst(fold: Fold) -> Canary:
    """PatchTST of labels permuted within sessions, scored as the trees are: 0.5 must be inside."""
    pooled = SequenceData.concatenate([fold.train_sequences, fold.validation_sequences])
    train = np.arange(len(pooled)) < len(fold.train_sequences)
    tried = []
    for trial in range(fold.canary.patchtst_trials):
        rng = np.random.default_rng([fold.canary.seed, 3, trial])
        rows = next(dealt(pooled.event_id, pooled.session, rng))
        shuffled = replace(pooled, y_break=pooled.y_break[rows], y_strength=pooled.y_strength[rows])
        parts = shuffled.select(train), shuffled.select(~train)
        tried.append({"direction": _patchtst(fold, *parts, fold.canary.patchtst_steps)})
    what = "PatchTST of shuffled labels, direction"
    return _by_chance(fold, "shuffled_labels_patchtst", what, "direction", tried, _within_sessions)


def noise(fold: Fold) -> list[Canary]:
    """Trees and retrieval of pure noise with the true labels: their skill against the training base rate must not lie above 0.

    Noise is every feature column permuted over all touches: the same values, dtypes and numbers of nulls, of no use.
    """
    # retrieval chooses its candidates by the kind of level, which is context to the other models
    columns = [[c.name] for c in fold.contract.role("feature")] + [["level_kind"]]
    trees, neighbours = [], []
    for trial in range(fold.canary.noise_draws):
        rng = np.random.default_rng([fold.canary.seed, 2, trial])
        train, validation = fold.split(permuted(fold.pooled, columns, rng))
        trees.append({head: _trees(fold, train, validation, head, fold.contract) for head in CLASSIFIERS})
        neighbours.append(_neighbours(fold, train, validation))

    def score(one: _Scored) -> tuple[float, float]:
        skill = brier_skill(one.y, one.p, np.full(len(one.y), one.reference))
        return skill, skill_deviation(one.y, one.p, one.reference)

    return [
        _by_chance(fold, canary, f"{what} of noise, {head}", head, tried, score)
        for canary, what, tried in (("noise_trees", "trees", trees), ("noise_retrieval", "retrieval", neighbours))
        for head in CLASSIFIERS
    ]


def with_plant(contract: Contract, known_at: str) -> Contract:
    """A copy of the contract with the planted column under a known-at of one's choice."""
    column = Column(
        PLANT,
        "feature",
        "A",
        "approach",
        "float64",
        "share",
        known_at,
        known_after_s(known_at),
        (),
        "Planted by a canary.",
    )
    return replace(contract, columns=(*contract.columns, column), sha256=f"planted:{contract.sha256}")


def plant(frame: pl.DataFrame, delay: str) -> pl.DataFrame:
    """Signals rows with the planted column: the signed move after confirmation over threshold 2, which no row knows at its decision."""
    return frame.with_columns((pl.col(_future(delay)) / pl.col("threshold_2")).alias(PLANT))


def plant_sequences(data: SequenceData, part: str) -> SequenceData:
    """Sequences with the signed move after confirmation, SPY dollars, in every bar of the first channel, or in the first static column."""
    if part == "channel":
        X = data.X.copy()
        X[..., 0] = np.nan_to_num(data.y_strength)[:, None] * data.mask
        return replace(data, X=X)
    static = data.static.copy()
    static[:, 0] = data.y_strength
    return replace(data, static=static)


def permuted(
    frame: pl.DataFrame, blocks: Sequence[Sequence[str]], rng: np.random.Generator, within: str | None = None
) -> pl.DataFrame:
    """Rows with each block of columns permuted among events, the columns of a block together, inside the groups of column `within`.

    Rows of one event_id stay equal to each other in what is permuted. Each column keeps its dtype, values and number of nulls.
    """
    groups = np.zeros(frame.height, np.str_) if within is None else frame[within].to_numpy().astype(str)
    deals = dealt(frame["event_id"].to_numpy().astype(str), groups, rng)
    return frame.with_columns(
        [frame[n].gather(rows) for block, rows in zip(blocks, deals, strict=False) for n in block]
    )


def dealt(event_id: NDArray[np.str_], group: NDArray[np.str_], rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Permutations without end: for each row the row that it takes its values from, of its group and one for all rows of an event."""
    _, first, event = np.unique(event_id, return_index=True, return_inverse=True)
    group_of = np.unique(group, return_inverse=True)[1][first]
    in_order = np.lexsort((np.arange(len(first)), group_of))
    source = np.empty(len(first), np.int64)
    while True:
        source[in_order] = np.lexsort((rng.random(len(first)), group_of))
        yield first[source[event]]


def session_auc(y: Floats, p: Floats, sessions: NDArray[np.str_]) -> tuple[float, float] | None:
    """(AUC over pairs of one session, its standard deviation when labels are permuted within sessions); None without such a pair.

    Mann-Whitney with ties counted half; variance with the correction for ties (Lehmann 1975, Nonparametrics, 1.20).
    """
    wins, pairs, variance = 0.0, 0, 0.0
    for session in np.unique(sessions):
        inside = sessions == session
        positive, n = int(y[inside].sum()), int(inside.sum())
        both = positive * (n - positive)
        if not both:
            continue
        ranks = rankdata(p[inside])
        ties = np.unique(ranks, return_counts=True)[1].astype(np.float64)
        wins += float(ranks[y[inside] > 0].sum()) - positive * (positive + 1) / 2
        pairs += both
        variance += both / 12 * (n + 1 - float((ties**3 - ties).sum()) / (n * (n - 1)))
    return (wins / pairs, float(np.sqrt(variance)) / pairs) if pairs else None


def skill_deviation(y: Floats, p: Floats, reference: float) -> float:
    """Standard deviation of the Brier skill of p against a constant when the p are dealt to the rows at random.

    Only the sum of p y varies; its variance is sum (p - mean)^2 sum (y - mean)^2 / (n - 1) (Hoeffding 1951).
    """
    n = len(y)
    spread = float(((p - p.mean()) ** 2).sum() * ((y - y.mean()) ** 2).sum()) / (n - 1)
    return 2 * float(np.sqrt(spread)) / float(((y - reference) ** 2).sum())


@dataclass(frozen=True)
class _Scored:
    """Predictions p (n,) of one head on validation rows beside y, and the training base rate."""

    y: Floats
    p: Floats
    session: NDArray[np.str_]
    reference: float


def _trees(fold: Fold, train: pl.DataFrame, validation: pl.DataFrame, head: str, contract: Contract) -> _Scored | str:
    """Production trees of one head at stage A, or why there are none."""
    trees = BoostedTrees(fold.tree)
    trees.contract = contract
    bundle = trees.fit_head_unchecked(train, validation.clear(), head, fold.delay, "A", "full")
    if not isinstance(bundle, Bundle):
        return str(bundle["reason"])
    rows = validation.filter(pl.Series(labelled_rows(validation, head, fold.delay, "A", contract)))
    y = target(rows, head, fold.delay)
    if reason := too_few(y, True):
        return f"validation: {reason}"
    session = rows["date"].to_numpy().astype(str)
    return _Scored(y, bundle.predict(rows, contract), session, float(bundle.meta["base_rate"]))


def _patchtst(fold: Fold, train: SequenceData, validation: SequenceData, steps: int) -> _Scored | str:
    """Production PatchTST of BREAK and BOUNCE rows, with the canary's training, or why there is none."""
    # torch and transformers take seconds to import; a process that only lists the graph does not pay for them
    from spymaster_assets.models.patchtst import PatchTST

    fitted, judged = (d.select(d.y_break >= 0) for d in (train, validation))
    y = (judged.y_break > 0).astype(np.float64)
    if reason := too_few(y, True):
        return f"validation: {reason}"
    asked = fold.canary
    batches = max(1, math.ceil(len(fitted) / asked.patchtst_batch_size))
    settings = replace(
        fold.patchtst,
        epochs=math.ceil(steps / batches),
        patience_epochs=0,
        batch_size=asked.patchtst_batch_size,
        learning_rate=asked.patchtst_learning_rate,
        dropout=0.0,
        min_train_rows=max(fold.patchtst.min_train_rows, asked.patchtst_min_rows),
    )
    model = PatchTST(settings)
    try:
        model.fit_unchecked(fitted, judged)
    except ModelError as error:
        return f"training: {error.what}"
    p = model.predict(judged).filter(pl.col("head") == "direction")["p"].to_numpy()
    return _Scored(y, p, judged.session, float((fitted.y_break > 0).mean()))


def _neighbours(fold: Fold, train: pl.DataFrame, validation: pl.DataFrame) -> dict[str, _Scored | str]:
    """Production retrieval by head, or why there is none."""
    stage, contract = fold.retrieval.stage, fold.contract
    try:
        first_ns = int(validation["decision_ns"].to_numpy().min(initial=np.iinfo(np.int64).max))
        index = fit_index_unchecked(train, first_ns, contract, fold.retrieval, fold.delay)
    except ModelError as error:
        return dict.fromkeys(CLASSIFIERS, error.what)
    said = index.query(validation, contract)[0] if validation.height else None
    out: dict[str, _Scored | str] = {}
    for head, column in (("tradeable_2", "p_tradeable_2"), ("direction", "p_break_given_tradeable")):
        known = target(train, head, fold.delay)[labelled_rows(train, head, fold.delay, stage, contract)]
        judged = labelled_rows(validation, head, fold.delay, stage, contract)
        p = np.full(validation.height, np.nan) if said is None else said[column].cast(pl.Float64).to_numpy()
        judged &= np.isfinite(p)
        y = target(validation, head, fold.delay)[judged]
        session = validation["date"].to_numpy().astype(str)[judged]
        reason = (f"training: {why}" if (why := too_few(known, True)) else None) or too_few(y, True)
        out[head] = reason or _Scored(y, p[judged], session, float(known.mean()))
    return out


def _by_chance(
    fold: Fold,
    canary: str,
    what: str,
    head: str,
    tried: Sequence[dict[str, _Scored | str]],
    score: Callable[[_Scored], tuple[float, float] | None],
) -> Canary:
    """Verdict over independent trials of one head; score gives a value and its standard deviation by chance."""
    labels = canary.startswith("shuffled_labels")
    statistic, chance = ("AUC", 0.5) if labels else ("skill", 0.0)
    values, variances, n = [], [], 0
    for trial in tried:
        one = trial[head]
        found = None if isinstance(one, str) else score(one)
        if isinstance(one, str) or found is None:
            reason = one if isinstance(one, str) else "no validation session has rows of both classes"
            return _silent(canary, what, statistic, reason)
        values.append(found[0])
        variances.append(found[1] ** 2)
        n = len(one.y)
    trials, value = len(values), float(np.mean(values))
    half = float(norm.ppf((1 + fold.level) / 2) * np.sqrt(np.sum(variances)) / trials)
    low, high = value - half, value + half
    good = low <= chance <= high if labels else low <= chance
    reason = "as chance would have it" if good else f"beyond chance ({chance:g}): rows or labels reach across the split"
    return Canary(
        canary, what, statistic, "holds" if good else "failed", reason, n, trials, value, low, high, fold.level, chance
    )


def _within_sessions(one: _Scored) -> tuple[float, float] | None:
    return session_auc(one.y, one.p, one.session)


def _silent(canary: str, what: str, statistic: str, reason: str) -> Canary:
    return Canary(canary, what, statistic, "not assessable", reason)


def _future(delay: str) -> str:
    return f"strength_signed_{delay}"


def _best_column(
    frame: pl.DataFrame, contract: Contract, head: str, fold: Fold, stage: str, only: set[str] | None = None
) -> tuple[float, str, int] | None:
    """(AUC, name, rows) of the single column that tells a head best, or None where there are too few rows of a class.

    A column is read upwards or downwards, as it is, by the side of the approach, by its size, and by whether it is missing.
    """
    rows = frame.filter(pl.Series(labelled_rows(frame, head, fold.delay, stage, contract)))
    X, names = feature_matrix(rows, contract, stage, fold.delay)
    if only is not None:
        kept = [i for i, name in enumerate(names) if name in only]
        X, names = X[:, kept], tuple(names[i] for i in kept)
    side = rows["direction_sign"].cast(pl.Float32).to_numpy()
    return _best_value(X, names, target(rows, head, fold.delay) > 0, side, fold.tree.min_class_rows)


def _best_value(
    X: NDArray[np.float32],
    names: Sequence[str],
    y: NDArray[np.bool_],
    side: NDArray[np.float32],
    min_class_rows: int,
) -> tuple[float, str, int] | None:
    """(AUC, name, rows) of the single column of X (n, f) that tells y (n,) best, read as `_best_column` says."""
    best = None
    for view in (X, X * side[:, None], np.abs(X), np.isnan(X).astype(np.float32)):
        seen = ~np.isnan(view)
        positive = (seen & y[:, None]).sum(axis=0)
        negative = seen.sum(axis=0) - positive
        enough = np.minimum(positive, negative) >= min_class_rows
        if not enough.any():
            continue
        view, seen, positive, negative = view[:, enough], seen[:, enough], positive[enough], negative[enough]
        ranks = np.where(seen & y[:, None], rankdata(view, axis=0, nan_policy="omit"), 0.0).sum(axis=0)
        area = (ranks - positive * (positive + 1) / 2) / (positive * negative)
        area = np.maximum(area, 1 - area)
        at = int(area.argmax())
        found = (float(area[at]), str(np.array(names)[enough][at]), int(positive[at] + negative[at]))
        best = found if best is None else max(best, found)
    return best


def _replayed(stored: pl.DataFrame, replayed: pl.DataFrame, key: str, cut_ns: int, contract: Contract) -> set[str]:
    """Columns that the proof by replay names between two frames of one session's signals."""
    with tempfile.TemporaryDirectory(prefix="spymaster-canary-") as folder:

        def artifact(name: str, frame: pl.DataFrame) -> Artifact:
            table = signals_to_parquet(SignalSet(contract.conform(frame), {"contract_sha256": contract.sha256}))
            return ArtifactStore(Path(folder) / name).publish("signals", key, {f"signals_{key}.parquet": table})

        found, _ = differences(artifact("stored", stored), artifact("replayed", replayed), cut_ns, contract)
    return {d.column for d in found}
