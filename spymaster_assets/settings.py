"""Every constant of the system, once, with its unit and source.

Sources: F = the level-touch rules in docs/method.md; O = our own choice, reasoned there. Environment names are listed in
`Settings.load`. A changed value changes `fingerprint(...)`, which is the Dagster code version of each asset that rests on it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypeVar

from spymaster_assets.errors import ConfigError
from spymaster_assets.market.instruments import Instrument, instrument

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


@dataclass(frozen=True)
class SignalSettings:
    """Touches and features; bands in SPY dollars, windows in their named unit."""

    touch_band_usd: float = 0.10  # F: reach of a level
    monitor_band_usd: float = 0.25  # F: the touch bar must close within it
    confluence_band_usd: float = 0.20  # F
    tape_band_usd: float = 0.50  # F
    cool_down_min: int = 10  # O: an episode ends after this long without contact
    round_spacing_usd: float = 1.0  # F
    round_reach_spacings: int = 5  # O: round levels are listed this far around the last close
    opening_range_min: int = 15  # F
    atr_bars: int = 14  # F
    vol_bars: int = 20  # F
    sma_warmup_sessions: int = 3  # F
    sma_slope_bars: int = 10  # F: two-minute bars
    sma_slope_short_bars: int = 5  # F: two-minute bars
    sma_velocity_min: int = 10  # F
    lookback_min: int = 10  # F: approach features
    attempt_gap_min: int = 15  # F
    attempt_band_usd: float = 0.10  # F
    tape_window_s: int = 60  # F
    sweep_max_gap_ms: int = 100  # F
    sweep_min_trades: int = 3  # F
    tape_velocity_norm_usd_per_s: float = 0.05  # F: 0.5 ES points/s
    first_minutes_min: int = 15  # F: is_first_15m


@dataclass(frozen=True)
class LabelSettings:
    """Outcome labels. mode 'dollars': thresholds fixed in SPY dollars; 'volatility': multiples of sigma * sqrt(look-forward)."""

    mode: Literal["dollars", "volatility"] = "dollars"
    look_forward_s: int = 480  # F
    max_missing_min: int = (
        0  # O: minutes in a row without a record that are no gap; of 43,000 regular ones of SPY and MYM one has none
    )
    threshold_1_usd: float = 1.0  # F
    threshold_2_usd: float = 2.0  # F
    volatility_multiple_1: float = 0.75  # O
    volatility_multiple_2: float = 1.5  # O
    primary_delay: str = "4min"  # F: y_break, y_strength of the sequence dataset


@dataclass(frozen=True)
class BookSettings:
    """Snapshots of the order book: the last book of each bucket, over regular hours with a margin."""

    bucket_ms: int = 250  # F
    before_open_min: int = 30  # O: so that the trailing baseline of the first touches has its history
    after_close_min: int = 4  # F


@dataclass(frozen=True)
class BarrierSettings:
    """Window, zone and thresholds of the barrier; sizes in contracts of the size of one ES contract."""

    window_s: int = 240  # F
    zone_usd: float = 0.20  # F: 8 ES ticks, in SPY dollars
    replenishment_low: float = 0.3  # F
    replenishment_high: float = 1.5  # F
    delta_contracts: int = 100  # F
    quiet_delta_contracts: int = 50  # F
    churn_contracts: int = 100  # F
    weak_depth_contracts: int = 50  # F
    baseline_s: int = 1800  # O: trailing, where the original took the whole day and so the future
    baseline_min_snapshots: int = 60  # O: 15 s of a busy book
    max_gap_s: int = 30  # O: a longer silence is a hole; the ES book of Christmas night 2023 is never silent for 10 s


@dataclass(frozen=True)
class OptionSettings:
    """Option greeks and dealer flow; bands in SPY dollars, windows in minutes, norms in dealer gamma (share delta per dollar)."""

    rate: float = 0.045  # F: continuously compounded, a year
    dividend_yield: float = 0.0  # F
    min_volatility: float = 0.01  # F
    max_volatility: float = 5.0  # F
    multiplier: float = 100.0  # F: shares a contract
    strike_range_usd: float = 2.0  # F: strikes this near to a level count
    flip_range_usd: float = 5.0  # F: strikes searched for the gamma flip
    fuel_threshold: float = 10_000.0  # F
    flow_min: int = 5  # F
    flow_baseline_min: int = 20  # F
    flow_accel_short_min: int = 1  # F
    flow_accel_long_min: int = 3  # F
    flow_norm: float = 50_000.0  # F
    flow_accel_norm: float = 50_000.0  # F
    exposure_norm: float = 100_000.0  # F
    strike_reach_usd: float = 5.0  # O: strikes are levels this far around the last close
    wall_min: int = 5  # F: closed minutes behind a wall
    max_gap_min: int = 5  # O: a longer silence is a hole; 0DTE options of an index fund trade every second
    strike_min_volume: int = 100  # F: contracts
    delta_liquidity_norm: float = 200.0  # F: contracts, liquidity_pressure
    wall_ratio_norm: float = 2.0  # F: liquidity_pressure


@dataclass(frozen=True)
class SplitSettings:
    """Walk-forward schedule, counted in trading sessions."""

    window: Literal["rolling", "expanding"] = "rolling"
    train_sessions: int = 20
    validation_sessions: int = 4
    embargo_sessions: int = 1
    retrain_every_sessions: int = 5

    @property
    def history_sessions(self) -> int:
        """Sessions that a rolling window reaches back from the as-of session."""
        return self.train_sessions + self.validation_sessions + 2 * self.embargo_sessions


@dataclass(frozen=True)
class SequenceSettings:
    """Sequence windows of one-minute bars that end at the decision time."""

    length_bars: int = 120  # F


@dataclass(frozen=True)
class PatchTSTSettings:
    """PatchTST backbone and its training."""

    patch_length: int = 16  # F
    patch_stride: int = 8  # F
    layers: int = 2  # O: a thousand rows do not feed a larger one
    d_model: int = 32
    heads: int = 4  # F
    ffn_dim: int = 64
    dropout: float = 0.2
    static_dim: int = 32
    epochs: int = 40
    patience_epochs: int = 6  # 0: none, the last epoch is kept
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    classification_weight: float = 1.0  # F
    regression_weight: float = 1.0  # F
    gradient_clip_norm: float = 1.0
    threads: int = 1  # O: runs are parallel, threads are not: they wait for each other when cores are busy
    seed: int = 42  # F
    device: str = "auto"
    min_train_rows: int = 40
    min_class_rows: int = 10


@dataclass(frozen=True)
class TreeSettings:
    """XGBoost heads."""

    max_depth: int = 4
    learning_rate: float = 0.05  # F
    rounds: int = 300  # F
    early_stopping_rounds: int = 30
    subsample: float = 0.8
    colsample_bytree: float = 0.6
    min_child_weight: float = 5.0
    reg_lambda: float = 5.0
    threads: int = 1  # O: runs are parallel, threads are not: they wait for each other when cores are busy
    seed: int = 42  # F
    stages: tuple[str, ...] = ("A", "B")
    ablations: tuple[str, ...] = ("full",)
    min_class_rows: int = 15


@dataclass(frozen=True)
class RetrievalSettings:
    """Exact kNN."""

    k: int = 20  # F
    max_per_session: int = 2  # F, later revision
    min_candidates: int = 40
    stage: str = "A"


@dataclass(frozen=True)
class CanarySettings:
    """Canaries of a fold (O): how often chance is tried, and what is too good to be true."""

    permutations: int = 10  # of the labels
    noise_draws: int = 4
    false_block_rate: float = 0.001  # of an honest fold, over all its canaries of chance together
    patchtst_trials: int = 1  # permutations of the labels
    patchtst_steps: int = 160  # of its optimizer, in whole epochs: the time of a fold does not grow with its rows
    patchtst_plant_steps: int = 50  # the same, to learn a planted future
    patchtst_batch_size: int = 32
    patchtst_min_rows: int = 120  # BREAK or BOUNCE in training; of 80 it does not always learn a lying static column
    patchtst_learning_rate: float = 1e-2  # and no dropout: a canary must memorise what it should not have seen
    plausible_auc_a: float = 0.90  # one column before confirmation; 0.75 is the most that was seen
    plausible_auc_b: float = 0.97  # at confirmation; 0.91 in a market with a planted rule
    seed: int = 42


@dataclass(frozen=True)
class NightlySettings:
    """The nightly sensor. A run that failed is asked for again after retry_min, until max_attempts have failed on one input in a row; one
    that succeeded and left its work due is not, unless something else has made it due since, and then max_attempts times at most."""

    enabled: bool = True
    grace_min: int = 30
    interval_s: int = 300
    max_sessions_per_tick: int = 5
    settle_min: int = 5  # O: a file that was written later than this ago may still be growing
    max_attempts: int = 3
    retry_min: int = 30
    max_run_min: int = 240  # O: a run that is under way for longer lost its worker; it is ended and counts as failed


@dataclass(frozen=True)
class ProveSettings:
    """Replays: times at which a session is cut, by the command line and the job, and by the nightly schedule (New York cron)."""

    cuts: int = 16
    nightly_cuts: int = 256
    cron: str = "0 2 * * 2-6"


@dataclass(frozen=True)
class Settings:
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

        SPYMASTER_DATA_DIR (root, default data/), SPYMASTER_DBN_DIR (default <root>/dbn), SPYMASTER_INSTRUMENT, SPYMASTER_DATASET,
        SPYMASTER_FIRST_SESSION, SPYMASTER_LAST_SESSION, SPYMASTER_LABEL_MODE (dollars | volatility),
        SPYMASTER_WINDOW (rolling | expanding), SPYMASTER_TRAIN_SESSIONS, SPYMASTER_VALIDATION_SESSIONS,
        SPYMASTER_EMBARGO_SESSIONS, SPYMASTER_RETRAIN_EVERY, SPYMASTER_NIGHTLY (1 | 0), SPYMASTER_DEVICE,
        SPYMASTER_PROVE_CUTS.
        """
        env = os.environ if env is None else env
        root = Path(env.get("SPYMASTER_DATA_DIR") or "data").expanduser().resolve()
        stored: dict[str, Any] = {}
        config = root / CONFIG_NAME
        if config.is_file():
            try:
                stored = json.loads(config.read_text())
            except ValueError as error:
                raise ConfigError(f"{config} is not JSON: {error}", remedy="mend or delete it") from None
        dbn_dir = env.get("SPYMASTER_DBN_DIR") or stored.pop("dbn_dir", None) or str(root / "dbn")
        stored.pop("dbn_dir", None)
        settings = _from_dict(cls(root=root, dbn_dir=(root / dbn_dir).expanduser().resolve()), stored, str(config))
        flat: dict[str, Any] = {
            "symbol": env.get("SPYMASTER_INSTRUMENT"),
            "dataset": env.get("SPYMASTER_DATASET"),
            "first_session": env.get("SPYMASTER_FIRST_SESSION"),
            "last_session": env.get("SPYMASTER_LAST_SESSION"),
        }
        settings = replace(settings, **{k: v for k, v in flat.items() if v})
        nested: list[tuple[str, str, str]] = [
            ("label", "mode", "SPYMASTER_LABEL_MODE"),
            ("split", "window", "SPYMASTER_WINDOW"),
            ("split", "train_sessions", "SPYMASTER_TRAIN_SESSIONS"),
            ("split", "validation_sessions", "SPYMASTER_VALIDATION_SESSIONS"),
            ("split", "embargo_sessions", "SPYMASTER_EMBARGO_SESSIONS"),
            ("split", "retrain_every_sessions", "SPYMASTER_RETRAIN_EVERY"),
            ("patchtst", "device", "SPYMASTER_DEVICE"),
            ("prove", "cuts", "SPYMASTER_PROVE_CUTS"),
        ]
        for part, name, variable in nested:
            if raw := env.get(variable):
                current = getattr(getattr(settings, part), name)
                settings = _with(settings, part, name, _parse(raw, current, variable))
        if raw := env.get("SPYMASTER_NIGHTLY"):
            settings = _with(settings, "nightly", "enabled", raw.strip().lower() not in ("0", "false", "off", "no"))
        settings.validate()
        return settings

    def validate(self) -> None:
        """Raise ConfigError when a value is outside what the rest of the code may assume."""
        self.instrument  # noqa: B018 - an unknown symbol raises here
        dates = [("first_session", self.first_session), ("last_session", self.last_session)]
        for name, value in dates + [("missing_sessions", k) for k in self.missing_sessions]:
            if value:
                try:
                    date.fromisoformat(value)
                except ValueError:
                    raise ConfigError(f"{name}={value!r} is not a date", expected="YYYY-MM-DD") from None
        if self.first_session and self.last_session and self.last_session < self.first_session:
            raise ConfigError(
                "last_session is before first_session", where=f"{self.first_session}..{self.last_session}"
            )
        if self.label.mode not in ("dollars", "volatility"):
            raise ConfigError(f"label mode {self.label.mode!r} is unknown", expected="dollars or volatility")
        if self.split.window not in ("rolling", "expanding"):
            raise ConfigError(f"split window {self.split.window!r} is unknown", expected="rolling or expanding")
        if self.label.primary_delay not in DELAYS_S:
            raise ConfigError(f"primary_delay {self.label.primary_delay!r} is unknown", expected=", ".join(DELAYS_S))
        for name in ("train_sessions", "validation_sessions", "retrain_every_sessions"):
            if getattr(self.split, name) < 1:
                raise ConfigError(f"split.{name} must be at least 1")
        for name in ("max_attempts", "max_run_min"):
            if getattr(self.nightly, name) < 1:
                raise ConfigError(f"nightly.{name} must be at least 1")
        tried = (
            "permutations",
            "noise_draws",
            *(f"patchtst_{n}" for n in ("trials", "steps", "plant_steps", "batch_size")),
        )
        if min(getattr(self.canary, name) for name in tried) < 1 or not 0 < self.canary.false_block_rate < 1:
            raise ConfigError("canary counts must be at least 1 and canary.false_block_rate between 0 and 1")
        if min(self.prove.cuts, self.prove.nightly_cuts) < 1:
            raise ConfigError("prove.cuts and prove.nightly_cuts must be at least 1")
        if self.split.embargo_sessions < 0:
            raise ConfigError("split.embargo_sessions must not be negative")

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


def settings_from(group: type[Group], stored: Mapping[str, Any]) -> Group:
    """A settings group as JSON keeps it; raise ConfigError on an unknown name or a value of another type than the default's."""
    default: Any = group()
    values: dict[str, Any] = {}
    for name, raw in stored.items():
        known = getattr(default, name, None)
        value: Any = tuple(raw) if isinstance(raw, list) else raw
        as_float = isinstance(known, float) and type(value) is int and abs(value) < 2**53
        if type(value) is not type(known) and not as_float:
            raise ConfigError(
                f"{group.__name__}.{name[:80]} is {type(value).__name__}", expected=f"{type(known).__name__}"
            )
        values[name] = float(value) if as_float else value
    return group(**values)


def _with(settings: Settings, part: str, name: str, value: Any) -> Settings:
    changed: dict[str, Any] = {part: replace(getattr(settings, part), **{name: value})}
    return replace(settings, **changed)


def _parse(raw: str, current: Any, variable: str) -> Any:
    try:
        return type(current)(raw)
    except ValueError:
        raise ConfigError(f"{variable}={raw!r} is not a {type(current).__name__}") from None


def _from_dict(settings: Settings, stored: Mapping[str, Any], where: str) -> Settings:
    known = {f.name for f in fields(Settings)} - {"root", "dbn_dir"}
    for key, value in stored.items():
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}", where=where, expected=", ".join(sorted(known)))
        current = getattr(settings, key)
        if hasattr(current, "__dataclass_fields__"):
            unknown = set(value) - {f.name for f in fields(current)}
            if unknown:
                raise ConfigError(f"unknown setting {key}.{sorted(unknown)[0]}", where=where)
            value = replace(current, **{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
        changed: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value}
        settings = replace(settings, **changed)
    return settings
