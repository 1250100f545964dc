"""Which sessions a deployment has: the first, the newest, and those that the retraining schedule names."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache

from spymaster_assets.contract import load_contract
from spymaster_assets.datasets.splits import asof_sessions
from spymaster_assets.market.calendar import TradingCalendar
from spymaster_assets.market.files import SIMULATED_MARK, scan_folder
from spymaster_assets.market.instruments import instrument
from spymaster_assets.settings import Settings

SESSION_ASSETS = (
    "market_files",
    "ohlcv_bars",
    "book_snapshots",
    "spot_basis",
    "option_flow",
    "levels",
    "signals",
    "sequence_dataset",
)
"""Assets keyed by the session whose data they hold, upstream first."""
FILE_ASSETS = ("market_files", "book_snapshots", "spot_basis", "option_flow")
"""Those of them that look for the session's files themselves; their manifests say which they saw."""
FITTED_ASSETS = ("patchtst_model", "tree_bundles", "retrieval_index")
"""Models that make predictions."""
MODEL_ASSETS = ("split_manifest", *FITTED_ASSETS, "canaries")
"""Assets keyed by the as-of session: they know only what came before it."""
REPORT_ASSET = "calibration_report"
"""Keyed by the as-of session, made once its test sessions are in."""
WALK_FORWARD_ASSET = "walk_forward_report"
"""All folds together, without partitions."""
ASSETS = (*SESSION_ASSETS, *MODEL_ASSETS, REPORT_ASSET, WALK_FORWARD_ASSET)
"""Every asset of the graph, upstream first."""
DEFAULT_FIRST_SESSION = "2024-01-02"
"""First partition of a deployment that names none and has no input yet."""


@cache
def calendar_of(symbol: str) -> TradingCalendar:
    """Trading calendar of an instrument, built once a process."""
    return TradingCalendar(instrument(symbol))


def resolve(settings: Settings) -> Settings:
    """Settings with a first session: the configured one, else the first that the DBN folder's headers cover, else a default.

    A folder marked as simulated marks the deployment. Raises ConfigError or ContractError on settings that nothing may be made with.
    """
    settings.validate()
    load_contract().require_windows(settings.signal, settings.barrier, settings.label)
    settings = replace(settings, simulated=settings.simulated or (settings.dbn_dir / SIMULATED_MARK).is_file())
    if settings.first_session:
        return settings
    first = DEFAULT_FIRST_SESSION
    if settings.dbn_dir.is_dir() and (entries := scan_folder(settings.dbn_dir)):
        calendar = calendar_of(settings.symbol)
        start_ns = min(e.header.start_ns for e in entries)
        day = datetime.fromtimestamp(start_ns / 1e9, UTC).date()
        near = calendar.sessions((day - timedelta(days=2)).isoformat(), (day + timedelta(days=10)).isoformat())
        first = next((k for k in near if calendar.session(k).close_ns > start_ns), first)
    return replace(settings, first_session=first)


def last_open_session(settings: Settings, now: datetime | None = None) -> str:
    """Newest partition: the configured last session, else the session that runs or comes next (an as-of model is made for it)."""
    if settings.last_session:
        return settings.last_session
    calendar = calendar_of(settings.symbol)
    now = now or datetime.now(UTC)
    near = calendar.sessions(
        (now.date() - timedelta(days=1)).isoformat(), (now.date() + timedelta(days=10)).isoformat()
    )
    return next(k for k in near if calendar.session(k).close_ns > now.timestamp() * 1e9)


def all_sessions(settings: Settings, now: datetime | None = None) -> list[str]:
    """Sessions from the first partition to the newest, sorted, without those that the deployment knows to have no input."""
    keys = calendar_of(settings.symbol).sessions(settings.first_session, last_open_session(settings, now))
    return [k for k in keys if k not in settings.missing_sessions]


def fold_sessions(settings: Settings, asof: str) -> list[str]:
    """Sessions from the first partition until the retraining after `asof`, from the calendar alone: what the clock says must not matter.

    A configured last session ends them; a session that the deployment knows to have no input is left out.
    """
    calendar = calendar_of(settings.symbol)
    reach = settings.split.retrain_every_sessions + len(settings.missing_sessions)
    last = calendar.next(asof, reach)
    keys = calendar.sessions(settings.first_session, min(last, settings.last_session or last))
    keys = [k for k in keys if k not in settings.missing_sessions]
    at = keys.index(asof) if asof in keys else len(keys)
    return keys[: at + settings.split.retrain_every_sessions]


def scheduled_asof(settings: Settings, now: datetime | None = None) -> list[str]:
    """As-of sessions of the retraining schedule, up to the newest partition."""
    return asof_sessions(all_sessions(settings, now), settings.split)
