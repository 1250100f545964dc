"""features.json: the only list of columns, with roles, known-at times and the allow-lists derived from them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from spymaster_assets.errors import ContractError
from spymaster_assets.settings import DELAYS_S, BarrierSettings, LabelSettings, SignalSettings

FEATURES_PATH = Path(__file__).resolve().parents[1] / "features.json"
ROLES = ("id", "context", "feature", "label")
STAGES = ("A", "B")
STAGE_A_DECISION_S = 60
"""Stage A decides when the touch bar has closed, 60 s after t0; stage B decides at t1."""
_DTYPES: dict[str, pl.DataType] = {
    "string": pl.String(),
    "int64": pl.Int64(),
    "int32": pl.Int32(),
    "int8": pl.Int8(),
    "float64": pl.Float64(),
    "bool": pl.Boolean(),
}
_BARRIER_COLUMNS = r"barrier_|wall_ratio|liquidity_pressure|net_break_pressure"
_FORWARD = {"signal.tape_window_s": r"tape_|sweep_detected|net_break_pressure", "barrier.window_s": _BARRIER_COLUMNS}
"""Settings that say how many seconds after t0 the columns with such names read."""
_BACK = {
    "signal.atr_bars": r"atr$|.*_atr$",
    "signal.vol_bars": r"volatility$|mean_reversion_pressure",
    "signal.lookback_min": r"approach_(velocity|distance)",
    "barrier.baseline_s": r"wall_ratio|liquidity_pressure|net_break_pressure",
}
"""Settings that say how far before t0 they read, in their unit. The others do not lengthen a window beyond a session or its warm-up."""
_HISTORY = re.compile(r"^(?:(?P<count>\d+)(?P<unit>min|bars)|(?P<whole>session|warmup))$")
_KNOWN_AT = re.compile(r"^(t0|t1_(?P<delay>\w+?))(\+(?P<seconds>\d+)s)?$")


@dataclass(frozen=True)
class History:
    """How far before t0 a feature's input reaches, beyond what its level needs: `count` minutes or one-minute bars of the session, the
    whole session up to t0, or the warm-up sessions too (unit 'minutes', 'bars', 'session', 'warmup')."""

    text: str
    unit: str
    count: int

    def most(self, unit: str) -> int | None:
        """The longest window that it allows, in 's', 'min' (the touch bar counts as one) or one-minute 'bars'; None: any.

        Where minutes lack a bar, bars reach further than as many minutes.
        """
        if self.unit in ("session", "warmup"):
            return None
        if unit == "bars":
            return self.count if self.unit == "bars" else 0
        return self.count * 60 if unit == "s" else self.count + 1

    @property
    def reaches(self) -> bool:
        """Whether anything before t0 is needed."""
        return self.unit in ("session", "warmup") or self.count > 0


@dataclass(frozen=True)
class Column:
    """One column of the signals table; `known_after_s` is seconds after t0; ids and labels have no history."""

    name: str
    role: str
    stage: str
    group: str
    dtype: str
    unit: str
    known_at: str
    known_after_s: int
    feeds: tuple[str, ...]
    description: str
    values: tuple[str, ...] = ()
    history: History | None = None


@dataclass(frozen=True)
class Contract:
    """features.json, parsed and checked; `sha256` identifies its exact text."""

    schema_version: str
    sha256: str
    columns: tuple[Column, ...]
    sequence_channels: tuple[str, ...]
    ablations: dict[str, tuple[str, ...]]
    level_codes: dict[str, int]
    text: str

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise ContractError(f"no column {name!r}", where="features.json")

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """Polars dtype of each column, in order."""
        return {c.name: _DTYPES[c.dtype] for c in self.columns}

    def role(self, *roles: str) -> tuple[Column, ...]:
        """Columns of the given roles."""
        return tuple(c for c in self.columns if c.role in roles)

    def features(self, stage: str, delay: str, ablation: str = "full") -> tuple[Column, ...]:
        """Feature columns that a model of `stage` may read for the labels of `delay`: stage reached and known at the decision."""
        if stage not in STAGES:
            raise ContractError(f"unknown stage {stage!r}", expected=" or ".join(STAGES))
        if ablation not in self.ablations:
            raise ContractError(f"unknown ablation {ablation!r}", expected=", ".join(self.ablations))
        decision_s = decision_after_s(stage, delay)
        return tuple(
            c
            for c in self.columns
            if c.role == "feature"
            and c.stage <= stage
            and c.known_after_s <= decision_s
            and c.group in self.ablations[ablation]
        )

    def require_known(self, names: Iterable[str], decision_s: int) -> None:
        """Raise ContractError when a named column is a label, no column at all, or known later than `decision_s` after t0."""
        for name in names:
            column = self[name]
            if column.role == "label":
                raise ContractError(f"{name} is a label and cannot be read as an input", where="features.json")
            if column.known_after_s > decision_s:
                raise ContractError(
                    f"{name} is known at {column.known_at}, after the decision at t0+{decision_s}s",
                    where="features.json",
                    expected=f"columns known at t0+{decision_s}s or earlier",
                    remedy="drop the column or decide later",
                )

    def require_windows(self, signal: SignalSettings, barrier: BarrierSettings, label: LabelSettings) -> None:
        """Raise ContractError when a setting makes a column read later than its known-at, or further back than its history."""
        groups = {"signal": signal, "barrier": barrier}

        def value(name: str) -> int:
            group, _, field = name.partition(".")
            return int(getattr(groups[group], field))

        for name, columns in _FORWARD.items():
            for column in self._named(columns):
                if value(name) > column.known_after_s:
                    raise _too_wide(name, value(name), column, column.known_at, f"at most {column.known_after_s}")
        for column in self.role("label"):
            since_t1_s = column.known_after_s - DELAYS_S[delay_of(column)]
            if not column.name.startswith("anchor_spot") and label.look_forward_s > since_t1_s:
                limit = f"at most {since_t1_s}"
                raise _too_wide("label.look_forward_s", label.look_forward_s, column, column.known_at, limit)
        for name, columns in _BACK.items():
            unit = name.rpartition("_")[2]
            for column in self._named(columns):
                most = column.history.most(unit) if column.history else None
                if most is not None and value(name) > most:
                    raise _too_wide(name, value(name), column, f"history {column.history.text}", f"at most {most}")  # type: ignore[union-attr]

    def _named(self, pattern: str) -> list[Column]:
        return [c for c in self.role("feature", "context") if re.match(pattern, c.name)]

    def conform(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return `frame` with exactly the contract's columns, order and dtypes; a column that is absent becomes null.

        Raises ContractError on a column that the contract does not list.
        """
        if frame.schema == self.schema and frame.columns == list(self.schema):
            return frame
        unknown = [c for c in frame.columns if c not in self.schema]
        if unknown:
            raise ContractError(
                f"columns not in the contract: {', '.join(unknown)}",
                where="features.json",
                remedy="add an entry to features.json",
            )
        return frame.select(
            (pl.col(n) if n in frame.columns else pl.lit(None)).cast(t).alias(n) for n, t in self.schema.items()
        )

    def violations(self, frame: pl.DataFrame) -> list[str]:
        """Human-readable breaches of names, order, dtypes, closed value sets, finite numbers and the primary key."""
        out: list[str] = []
        if list(frame.schema.items()) != list(self.schema.items()):
            expected, found = set(self.schema.items()), set(frame.schema.items())
            out.append(
                f"schema differs: missing {sorted(n for n, _ in expected - found)}, extra {sorted(n for n, _ in found - expected)}"
            )
            return out
        for column in self.columns:
            series = frame[column.name]
            if column.values:
                odd = sorted(set(series.drop_nulls().unique()) - set(column.values))
                if odd:
                    out.append(f"{column.name} holds {odd}, not in {list(column.values)}")
            if column.dtype == "float64" and (series.is_nan().any() or series.is_infinite().any()):
                out.append(f"{column.name} holds NaN or infinity; a missing value is null")
            if column.role == "id" and series.null_count():
                out.append(f"{column.name} is an id and has {series.null_count()} nulls")
        if frame["event_id"].n_unique() != frame.height:
            out.append(f"event_id repeats: {frame.height - frame['event_id'].n_unique()} rows")
        return out


def delay_of(label: Column) -> str:
    """Confirmation delay of a label."""
    return label.name.rsplit("_", 1)[1]


def decision_after_s(stage: str, delay: str) -> int:
    """Seconds from t0 to the decision of a stage for the labels of a confirmation delay."""
    if delay not in DELAYS_S:
        raise ContractError(f"unknown confirmation delay {delay!r}", expected=", ".join(DELAYS_S))
    return STAGE_A_DECISION_S if stage == "A" else DELAYS_S[delay]


def decision_column(stage: str, delay: str) -> str:
    """Id column that holds the decision time of a stage for the labels of a confirmation delay."""
    return "decision_ns" if stage == "A" else f"confirm_ts_ns_{delay}"


def known_after_s(known_at: str) -> int:
    """Seconds after t0 of a known-at text such as 't0', 't0+60s', 't1_4min' or 't1_4min+480s'."""
    match = _KNOWN_AT.match(known_at)
    if not match or (match["delay"] and match["delay"] not in DELAYS_S):
        raise ContractError(
            f"cannot read known_at {known_at!r}", where="features.json", expected="t0, t0+60s, t1_4min or t1_4min+480s"
        )
    return (DELAYS_S[match["delay"]] if match["delay"] else 0) + int(match["seconds"] or 0)


def history_of(text: str) -> History:
    """Parse a history such as '0min', '14bars', 'session' or 'warmup'; raise ContractError on anything else."""
    match = _HISTORY.match(text)
    if not match:
        raise ContractError(
            f"cannot read history {text!r}", where="features.json", expected="0min, 14bars, session or warmup"
        )
    if match["whole"]:
        return History(text, match["whole"], 0)
    return History(text, {"min": "minutes", "bars": "bars"}[match["unit"]], int(match["count"]))


@cache
def load_contract(path: Path = FEATURES_PATH) -> Contract:
    """Parse and check a features.json; raise ContractError naming the first entry that is wrong."""
    try:
        text = path.read_text()
        raw = json.loads(text)
    except (OSError, ValueError) as error:
        raise ContractError(f"cannot read the contract: {error}", where=str(path)) from error
    return parse_contract(raw, text)


def parse_contract(raw: dict[str, Any], text: str) -> Contract:
    """Build a Contract from the parsed JSON; see `load_contract`."""
    columns = tuple(_column(entry, raw["feeds"]) for entry in raw["columns"])
    _refuse_repeats("column", [c.name for c in columns])
    _refuse_repeats("sequence channel", [c["name"] for c in raw["sequence_channels"]])
    if raw["delays_s"] != DELAYS_S:
        raise ContractError(f"delays_s {raw['delays_s']} differ from the settings {DELAYS_S}", where="features.json")
    look_forward_s = LabelSettings().look_forward_s
    for column in columns:
        if column.role == "feature" and column.stage == "A" and column.known_after_s > STAGE_A_DECISION_S:
            raise ContractError(
                f"feature {column.name} of stage A is known at {column.known_at}",
                expected="t0+60s or earlier, or stage B",
            )
        if column.role == "label" and not column.name.startswith("anchor_spot"):
            delay = delay_of(column)
            if column.known_after_s != DELAYS_S[delay] + look_forward_s:
                raise ContractError(
                    f"label {column.name} is known at {column.known_at}", expected=f"t1_{delay}+{look_forward_s}s"
                )
    groups = {c.group for c in columns}
    ablations = {name: tuple(parts) for name, parts in raw["ablations"].items()}
    for name, parts in ablations.items():
        if odd := set(parts) - groups:
            raise ContractError(f"ablation {name!r} names unknown groups {sorted(odd)}", where="features.json")
    return Contract(
        schema_version=raw["schema_version"],
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        columns=columns,
        sequence_channels=tuple(c["name"] for c in raw["sequence_channels"]),
        ablations=ablations,
        level_codes=raw["level_codes"],
        text=text,
    )


def _too_wide(setting: str, value: int, column: Column, declared: str, limit: str) -> ContractError:
    return ContractError(
        f"{setting} = {value} reaches beyond what {column.name} declares: {declared}",
        where="features.json",
        expected=f"{setting} {limit}",
        remedy=f"set {setting} so, or declare when and from what the columns are known in features.json",
    )


def _column(entry: dict[str, Any], feeds: dict[str, str]) -> Column:
    where = f"features.json, column {entry.get('name')!r}"
    if entry["role"] not in ROLES or entry["stage"] not in STAGES or entry["dtype"] not in _DTYPES:
        raise ContractError(
            f"role {entry['role']!r}, stage {entry['stage']!r} or dtype {entry['dtype']!r} is unknown", where=where
        )
    if odd := set(entry["feeds"]) - set(feeds):
        raise ContractError(f"unknown feeds {sorted(odd)}", where=where, expected=", ".join(feeds))
    if ("history" in entry) != (entry["role"] in ("feature", "context")):
        raise ContractError("features and contexts declare their history, other columns have none", where=where)
    return Column(
        **{k: v for k, v in entry.items() if k not in ("feeds", "values", "history")},
        known_after_s=known_after_s(entry["known_at"]),
        feeds=tuple(entry["feeds"]),
        values=tuple(entry.get("values", ())),
        history=history_of(entry["history"]) if "history" in entry else None,
    )


def _refuse_repeats(what: str, names: Sequence[str]) -> None:
    if repeats := sorted({n for n in names if names.count(n) > 1}):
        raise ContractError(f"{what} listed twice: {', '.join(repeats)}", where="features.json")
