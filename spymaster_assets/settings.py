"""Every constant of the system, once, with its unit, bounds and source.

A setting is one line: its annotation is its type and bounds. Sources: F = the level-touch rules in docs/method.md; O = our own choice,
reasoned there. A changed value changes `fingerprint(...)`, which is the Dagster code version of each asset that rests on it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from spymaster_assets.errors import ConfigError, refusing
from spymaster_assets.market.instruments import Instrument, instrument
from spymaster_assets.strict_json import parse_object

NS = 1_000_000_000
MINUTE_NS = 60 * NS
DAY_NS = 86_400 * NS
TRADING_YEAR_S = 252 * 6.5 * 3600
"""Seconds of regular hours in a year."""
CONFIG_NAME = "spymaster.json"
TIMEFRAMES_MIN = (1, 2, 5, 10, 15, 20, 25, 30, 45, 60)
"""Bar lengths in minutes: 1 and 2 for signals, the nine multi-resolution ones for datasets (1 is in both)."""
DELAYS_S: dict[str, int] = {"2min": 120, "4min": 240, "8min": 480}
"""Confirmation delays from t0 to t1, seconds (F)."""
REACH_HORIZONS_S = (60, 120, 180, 300)
"""Horizons of the reach targets after t1, seconds (F)."""

WHERE_IT_RUNS = frozenset({"patchtst.device", "patchtst.threads", "tree.threads"})
"""Settings that may differ between artifacts that are read together."""

ENVIRONMENT = {
    "symbol": "SPYMASTER_INSTRUMENT",
    "dataset": "SPYMASTER_DATASET",
    "first_session": "SPYMASTER_FIRST_SESSION",
    "last_session": "SPYMASTER_LAST_SESSION",
    "label.mode": "SPYMASTER_LABEL_MODE",
    "split.window": "SPYMASTER_WINDOW",
    "split.train_sessions": "SPYMASTER_TRAIN_SESSIONS",
    "split.validation_sessions": "SPYMASTER_VALIDATION_SESSIONS",
    "split.embargo_sessions": "SPYMASTER_EMBARGO_SESSIONS",
    "split.retrain_every_sessions": "SPYMASTER_RETRAIN_EVERY",
    "nightly.enabled": "SPYMASTER_NIGHTLY",
    "patchtst.device": "SPYMASTER_DEVICE",
    "prove.cuts": "SPYMASTER_PROVE_CUTS",
}
"""Settings that the environment overrides."""

Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Part = Annotated[float, Field(gt=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Stage = Literal["A", "B"]


class _Checked:
    """What a value must be stands in its annotation: JSON of another type, out of bounds or of another name is refused."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class SignalSettings(_Checked):
    """Touches and features; bands in SPY dollars, windows in their named unit."""

    touch_band_usd: Positive = 0.10  # F: reach of a level
    monitor_band_usd: Positive = 0.25  # F: the touch bar must close within it
    confluence_band_usd: Positive = 0.20  # F
    tape_band_usd: Positive = 0.50  # F
    cool_down_min: Whole = 10  # O: an episode ends after this long without contact
    round_spacing_usd: Positive = 1.0  # F
    round_reach_spacings: Whole = 5  # O: round levels are listed this far around the last close
    opening_range_min: Count = 15  # F
    atr_bars: Count = 14  # F
    vol_bars: Several = 20  # F
    sma_warmup_sessions: Whole = 3  # F
    sma_slope_bars: Count = 10  # F: two-minute bars
    sma_slope_short_bars: Count = 5  # F: two-minute bars
    sma_velocity_min: Count = 10  # F
    lookback_min: Count = 10  # F: approach features
    attempt_gap_min: Whole = 15  # F
    attempt_band_usd: Positive = 0.10  # F
    tape_window_s: Count = 60  # F
    sweep_max_gap_ms: Whole = 100  # F
    sweep_min_trades: Count = 3  # F
    tape_velocity_norm_usd_per_s: Positive = 0.05  # F: 0.5 ES points/s
    first_minutes_min: Whole = 15  # F: is_first_15m


@dataclass(frozen=True)
class LabelSettings(_Checked):
    """Outcome labels. mode 'dollars': thresholds fixed in SPY dollars; 'volatility': multiples of sigma * sqrt(look-forward)."""

    mode: Literal["dollars", "volatility"] = "dollars"
    look_forward_s: Annotated[int, Field(ge=max(REACH_HORIZONS_S))] = 480  # F; no reach target lies beyond it
    # O: minutes in a row without a record that are no gap; of 43,000 regular ones of SPY and MYM one has none
    max_missing_min: Whole = 0
    threshold_1_usd: Positive = 1.0  # F
    threshold_2_usd: Positive = 2.0  # F
    volatility_multiple_1: Positive = 0.75  # O
    volatility_multiple_2: Positive = 1.5  # O
    primary_delay: str = "4min"  # F: y_break, y_strength of the sequence dataset


@dataclass(frozen=True)
class BookSettings(_Checked):
    """Snapshots of the order book: the last book of each bucket, over regular hours with a margin."""

    bucket_ms: Count = 250  # F
    before_open_min: Whole = 30  # O: so that the trailing baseline of the first touches has its history
    after_close_min: Whole = 4  # F


@dataclass(frozen=True)
class BarrierSettings(_Checked):
    """Window, zone and thresholds of the barrier; sizes in contracts of the size of one ES contract."""

    window_s: Count = 240  # F
    zone_usd: Positive = 0.20  # F: 8 ES ticks, in SPY dollars
    replenishment_low: Positive = 0.3  # F
    replenishment_high: Positive = 1.5  # F
    delta_contracts: Whole = 100  # F
    quiet_delta_contracts: Whole = 50  # F
    churn_contracts: Whole = 100  # F
    weak_depth_contracts: Whole = 50  # F
    baseline_s: Count = 1800  # O: trailing, where the original took the whole day and so the future
    baseline_min_snapshots: Count = 60  # O: 15 s of a busy book
    max_gap_s: Count = 30  # O: a longer silence is a hole; the ES book of Christmas night 2023 is never silent for 10 s


@dataclass(frozen=True)
class OptionSettings(_Checked):
    """Option greeks and dealer flow; bands in SPY dollars, windows in minutes, norms in dealer gamma (share delta per dollar)."""

    rate: float = 0.045  # F: continuously compounded, a year
    dividend_yield: float = 0.0  # F
    min_volatility: Positive = 0.01  # F
    max_volatility: Positive = 5.0  # F
    multiplier: Positive = 100.0  # F: shares a contract
    strike_range_usd: Positive = 2.0  # F: strikes this near to a level count
    flip_range_usd: Positive = 5.0  # F: strikes searched for the gamma flip
    fuel_threshold: NotNegative = 10_000.0  # F
    flow_min: Count = 5  # F
    flow_baseline_min: Count = 20  # F
    flow_accel_short_min: Count = 1  # F
    flow_accel_long_min: Count = 3  # F
    flow_norm: Positive = 50_000.0  # F
    flow_accel_norm: Positive = 50_000.0  # F
    exposure_norm: Positive = 100_000.0  # F
    strike_reach_usd: Positive = 5.0  # O: strikes are levels this far around the last close
    wall_min: Count = 5  # F: closed minutes behind a wall
    max_gap_min: Count = 5  # O: a longer silence is a hole; 0DTE options of an index fund trade every second
    strike_min_volume: Whole = 100  # F: contracts
    delta_liquidity_norm: Positive = 200.0  # F: contracts, liquidity_pressure
    wall_ratio_norm: Positive = 2.0  # F: liquidity_pressure


@dataclass(frozen=True)
class SplitSettings(_Checked):
    """Walk-forward schedule, counted in trading sessions."""

    window: Literal["rolling", "expanding"] = "rolling"
    train_sessions: Count = 20
    validation_sessions: Count = 4
    embargo_sessions: Whole = 1
    retrain_every_sessions: Count = 5

    @property
    def history_sessions(self) -> int:
        """Sessions that a rolling window reaches back from the as-of session."""
        return self.train_sessions + self.validation_sessions + 2 * self.embargo_sessions


@dataclass(frozen=True)
class SequenceSettings(_Checked):
    """Sequence windows of one-minute bars that end at the decision time."""

    length_bars: Count = 120  # F


@dataclass(frozen=True)
class PatchTSTSettings(_Checked):
    """PatchTST backbone and its training."""

    patch_length: Count = 16  # F
    patch_stride: Count = 8  # F
    layers: Count = 2  # O: a thousand rows do not feed a larger one
    d_model: Count = 32
    heads: Count = 4  # F
    ffn_dim: Count = 64
    dropout: Dropout = 0.2
    static_dim: Count = 32
    epochs: Count = 40
    patience_epochs: Whole = 6  # 0: none, the last epoch is kept
    batch_size: Count = 64
    learning_rate: Positive = 2e-3
    weight_decay: NotNegative = 1e-2
    classification_weight: NotNegative = 1.0  # F
    regression_weight: NotNegative = 1.0  # F
    gradient_clip_norm: Positive = 1.0
    threads: Count = 1  # O: runs are parallel, threads are not: they wait for each other when cores are busy
    seed: Whole = 42  # F
    device: str = "auto"
    min_train_rows: Count = 40
    min_class_rows: Count = 10


@dataclass(frozen=True)
class TreeSettings(_Checked):
    """XGBoost heads."""

    max_depth: Count = 4
    learning_rate: Positive = 0.05  # F
    rounds: Count = 300  # F
    early_stopping_rounds: Count = 30
    subsample: Part = 0.8
    colsample_bytree: Part = 0.6
    min_child_weight: NotNegative = 5.0
    reg_lambda: NotNegative = 5.0
    threads: Count = 1  # O: runs are parallel, threads are not: they wait for each other when cores are busy
    seed: Whole = 42  # F
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = ("A", "B")
    ablations: Annotated[tuple[str, ...], Field(min_length=1)] = ("full",)
    min_class_rows: Count = 15


@dataclass(frozen=True)
class RetrievalSettings(_Checked):
    """Exact kNN."""

    k: Count = 20  # F
    max_per_session: Count = 2  # F, later revision
    min_candidates: Count = 40
    stage: Stage = "A"


@dataclass(frozen=True)
class CanarySettings(_Checked):
    """Canaries of a fold (O): how often chance is tried, and what is too good to be true."""

    permutations: Count = 10  # of the labels
    noise_draws: Count = 4
    false_block_rate: Share = 0.001  # of an honest fold, over all its canaries of chance together
    patchtst_trials: Count = 1  # permutations of the labels
    patchtst_steps: Count = 160  # of its optimizer, in whole epochs: the time of a fold does not grow with its rows
    patchtst_plant_steps: Count = 50  # the same, to learn a planted future
    patchtst_batch_size: Count = 32
    patchtst_min_rows: Count = 120  # BREAK or BOUNCE in training; of 80 it does not always learn a lying static column
    patchtst_learning_rate: Positive = 1e-2  # and no dropout: a canary must memorise what it should not have seen
    plausible_auc_a: Share = 0.90  # one column before confirmation; 0.75 is the most that was seen
    plausible_auc_b: Share = 0.97  # at confirmation; 0.91 in a market with a planted rule
    seed: Whole = 42


@dataclass(frozen=True)
class NightlySettings(_Checked):
    """The nightly sensor. A run that failed is asked for again after retry_min, until max_attempts have failed on one input in a row; one
    that succeeded and left its work due is not, unless something else has made it due since, and then max_attempts times at most."""

    enabled: bool = True
    grace_min: Whole = 30
    interval_s: Count = 300
    max_sessions_per_tick: Count = 5
    settle_min: Whole = 5  # O: a file that was written later than this ago may still be growing
    max_attempts: Count = 3
    retry_min: Whole = 30
    max_run_min: Count = 240  # O: a run that is under way for longer lost its worker; it is ended and counts as failed


@dataclass(frozen=True)
class ProveSettings(_Checked):
    """Replays: times at which a session is cut, by the command line and the job, and by the nightly schedule (New York cron)."""

    cuts: Count = 16
    nightly_cuts: Count = 256
    cron: str = "0 2 * * 2-6"


@dataclass(frozen=True)
class Settings(_Checked):
    """One deployment: one instrument, one DBN folder, one artifact root.

    dataset: the one whose files make the instrument's tape, and any other feed that lies in several; empty where each lies in one.
    first_session/last_session bound the partitions (ISO dates); missing_sessions lie between them, have no input and are no partitions:
    windows count the others. simulated marks every artifact of a simulated market.
    """

    root: Path
    dbn_dir: Path
    symbol: str = "SPY"
    dataset: str = ""
    first_session: str = ""
    last_session: str = ""
    missing_sessions: tuple[str, ...] = ()
    simulated: bool = False
    signal: SignalSettings = field(default_factory=SignalSettings)
    book: BookSettings = field(default_factory=BookSettings)
    barrier: BarrierSettings = field(default_factory=BarrierSettings)
    option: OptionSettings = field(default_factory=OptionSettings)
    label: LabelSettings = field(default_factory=LabelSettings)
    split: SplitSettings = field(default_factory=SplitSettings)
    sequence: SequenceSettings = field(default_factory=SequenceSettings)
    patchtst: PatchTSTSettings = field(default_factory=PatchTSTSettings)
    tree: TreeSettings = field(default_factory=TreeSettings)
    retrieval: RetrievalSettings = field(default_factory=RetrievalSettings)
    canary: CanarySettings = field(default_factory=CanarySettings)
    nightly: NightlySettings = field(default_factory=NightlySettings)
    prove: ProveSettings = field(default_factory=ProveSettings)

    @property
    def instrument(self) -> Instrument:
        """The profile of `symbol`."""
        return instrument(self.symbol)

    @classmethod
    def load(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read settings: environment over `<root>/spymaster.json` over defaults; raise ConfigError on a bad value.

        SPYMASTER_DATA_DIR names the root (default data/), SPYMASTER_DBN_DIR the input (default <root>/dbn); the others are in ENVIRONMENT.
        """
        env = os.environ if env is None else env
        root = Path(env.get("SPYMASTER_DATA_DIR") or "data").expanduser().resolve()
        config = root / CONFIG_NAME
        stored = _stored(config) if config.is_file() else {}
        dbn_dir = env.get("SPYMASTER_DBN_DIR") or stored.get("dbn_dir", "dbn")
        if isinstance(dbn_dir, str):
            dbn_dir = str((root / dbn_dir).expanduser().resolve())
        values = {**stored, "root": str(root), "dbn_dir": dbn_dir}
        where = {}
        for name, variable in ENVIRONMENT.items():
            if not (raw := env.get(variable)):
                continue
            where[name] = variable
            group, _, field_name = name.rpartition(".")
            into = values.setdefault(group, {}) if group else values
            if isinstance(into, dict):
                into[field_name] = _typed(name, raw)
        settings = _checked(cls, values, lambda name: where.get(name, str(config)))
        settings._validate_meaning()
        return settings

    def validate(self) -> None:
        """Raise ConfigError when a value is outside what the rest of the code may assume."""
        _checked(Settings, asdict(self), lambda _: "")
        self._validate_meaning()

    def _validate_meaning(self) -> None:
        """What a type cannot say."""
        self.instrument  # noqa: B018 - an unknown symbol raises here
        dates = [("first_session", self.first_session), ("last_session", self.last_session)]
        for name, value in dates + [("missing_sessions", k) for k in self.missing_sessions]:
            if value and not _is_date(value):
                raise ConfigError(f"{name}={value!r} is not a date", expected="YYYY-MM-DD")
        if self.first_session and self.last_session and self.last_session < self.first_session:
            raise ConfigError(
                "last_session is before first_session", where=f"{self.first_session}..{self.last_session}"
            )
        if self.label.primary_delay not in DELAYS_S:
            raise ConfigError(f"primary_delay {self.label.primary_delay!r} is unknown", expected=", ".join(DELAYS_S))

    def of(self, *names: str) -> dict[str, Any]:
        """{dotted name: value} of the symbol and the named groups ('label') or settings ('label.mode'): what an artifact records."""
        out: dict[str, Any] = {"symbol": self.symbol}
        for name in names:
            group, _, one = name.partition(".")
            values = asdict(getattr(self, group))
            out |= {f"{group}.{k}": v for k, v in values.items() if one in ("", k)}
        return out

    def write(self) -> Path:
        """Store what differs from the defaults as `<root>/spymaster.json` and return its path."""
        default = Settings(root=self.root, dbn_dir=self.dbn_dir)
        out: dict[str, Any] = {"dbn_dir": os.path.relpath(self.dbn_dir, self.root)}
        for f in fields(self):
            if f.name in ("root", "dbn_dir"):
                continue
            mine, theirs = getattr(self, f.name), getattr(default, f.name)
            if mine == theirs:
                continue
            if hasattr(mine, "__dataclass_fields__"):
                out[f.name] = {k: v for k, v in asdict(mine).items() if v != asdict(theirs)[k]}
            else:
                out[f.name] = mine
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / CONFIG_NAME
        path.write_text(json.dumps(out, indent=2) + "\n")
        return path


def fingerprint(*parts: Any) -> str:
    """Return 16 hex digits that change when any dataclass or JSON value in `parts` changes."""
    plain = [asdict(p) if hasattr(p, "__dataclass_fields__") else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


Group = TypeVar("Group")
_WORDS = {"integer": "a whole number", "number": "a number", "string": "a text", "boolean": "true or false",
          "array": "a list", "object": "an object"}  # fmt: skip
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
           "minItems": "entries: at least", "enum": "one of"}  # fmt: skip


def settings_from(group: type[Group], stored: Mapping[str, Any]) -> Group:
    """A settings group as JSON keeps it; raise ConfigError on an unknown name, another type or a value out of bounds."""
    return _checked(group, stored, lambda _: group.__name__)


def _checked(kind: type[Group], values: Mapping[str, Any], where: Callable[[str], str]) -> Group:
    """A dataclass from plain values; raise ConfigError that names the first that is wrong and where(its name)."""
    try:
        found: Group = TypeAdapter(kind).validate_json(json.dumps(values, default=str))
        return found
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(str(step) for step in fault["loc"])
    if fault["type"] == "unexpected_keyword_argument":
        owner, _ = _described(kind, fault["loc"][:-1])
        raise ConfigError(f"unknown setting {name}", where=where(name), expected=", ".join(sorted(owner["properties"])))
    raise ConfigError(
        f"{name} is {json.dumps(fault['input'])[:80]}",
        where=where(name),
        expected=_described(kind, fault["loc"])[1],
        remedy="mend or remove the entry; spymaster_assets/settings.py has the default",
    )


def _described(kind: type[Any], steps: Sequence[int | str]) -> tuple[dict[str, Any], str]:
    """JSON schema of the value that the steps lead to, and its type and bounds in words."""
    whole = node = TypeAdapter(kind).json_schema()
    for step in steps:
        node = node["properties"][step] if isinstance(step, str) else node["items"]
        while "$ref" in node:
            node = whole["$defs"][node["$ref"].rpartition("/")[2]]
    words = [_WORDS[node["type"]]]
    if "items" in node:
        words.append(f"each {_WORDS[node['items']['type']]}")
    words += [
        f"{said} {', '.join(v) if isinstance(v := node[key], list) else v}"
        for key, said in _BOUNDS.items()
        if key in node
    ]
    return node, ", ".join(words)


def _typed(name: str, raw: str) -> Any:
    """An environment variable's text as the type of the setting's default; as it is where it cannot be read so."""
    group, _, field_name = name.rpartition(".")
    defaults = Settings(root=Path(), dbn_dir=Path())
    default = getattr(getattr(defaults, group) if group else defaults, field_name)
    if isinstance(default, bool):
        return raw.strip().lower() not in ("0", "false", "off", "no")
    if isinstance(default, int):
        with suppress(ValueError):
            return int(raw)
    return raw


def _stored(config: Path) -> dict[str, Any]:
    with refusing(ConfigError, f"{config} is not JSON", where=str(config), remedy="mend or delete it"):
        stored = parse_object(config.read_bytes())
    if "root" in stored:
        raise ConfigError("unknown setting root", where=str(config), remedy="set SPYMASTER_DATA_DIR")
    return stored


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
