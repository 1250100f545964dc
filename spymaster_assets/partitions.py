"""Dagster partitions: trading sessions, as-of windows and what the retraining schedule asks for."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from functools import cache
from typing import Any

import dagster as dg

from spymaster_assets.datasets.splits import asof_sessions
from spymaster_assets.market.calendar import TradingCalendar
from spymaster_assets.settings import Settings

NEW_YORK = "America/New_York"
ALL_EARLIER = 100_000
"""Start offset of an expanding window, in sessions: further back than any first session."""


@cache
def calendar_of(symbol: str) -> TradingCalendar:
    """Trading calendar of an instrument, built once a process."""
    return TradingCalendar(Settings.load({"SPYMASTER_INSTRUMENT": symbol}).instrument)


def last_open_session(settings: Settings, now: datetime | None = None) -> str:
    """Newest partition: the configured last session, else the session that is running or comes next (an as-of model is made for it)."""
    if settings.last_session:
        return settings.last_session
    calendar = calendar_of(settings.symbol)
    now = now or datetime.now(UTC)
    today = now.date()
    for key in calendar.sessions((today - timedelta(days=1)).isoformat(), (today + timedelta(days=10)).isoformat()):
        if calendar.session(key).close_ns > now.timestamp() * 1e9:
            return key
    raise AssertionError("a calendar has a session within ten days")


def all_sessions(settings: Settings, now: datetime | None = None) -> list[str]:
    """Sessions from the first partition to the newest, sorted."""
    return calendar_of(settings.symbol).sessions(settings.first_session, last_open_session(settings, now))


@cache
def session_partitions(settings: Settings) -> dg.DailyPartitionsDefinition:
    """Daily partitions without weekends, holidays and other days without a session.

    An open range ends with the session that runs or comes next (end_offset 1), as an as-of model needs.
    """
    calendar = calendar_of(settings.symbol)
    last = last_open_session(settings)
    horizon = last if settings.last_session else (date.fromisoformat(last) + timedelta(days=366)).isoformat()
    closed = calendar.non_sessions(settings.first_session, horizon)
    return dg.DailyPartitionsDefinition(
        start_date=settings.first_session,
        end_date=(date.fromisoformat(last) + timedelta(days=1)).isoformat() if settings.last_session else None,
        end_offset=0 if settings.last_session else 1,
        timezone=NEW_YORK,
        exclusions=["0 0 * * 6,0", *[datetime.fromisoformat(d) for d in closed]],
    )


def earlier_sessions(n: int) -> dg.TimeWindowPartitionMapping:
    """The n sessions before a session; exact over the same definition, holidays included."""
    return dg.TimeWindowPartitionMapping(start_offset=-n, end_offset=-1, allow_nonexistent_upstream_partitions=True)


def training_window(settings: Settings) -> dg.TimeWindowPartitionMapping:
    """Sessions that a split of the as-of session may read: a rolling window, or all earlier ones."""
    n = settings.split.history_sessions if settings.split.window == "rolling" else ALL_EARLIER
    return earlier_sessions(n)


def warmup_window(settings: Settings) -> dg.TimeWindowPartitionMapping:
    """A session and the warm-up sessions before it."""
    return dg.TimeWindowPartitionMapping(
        start_offset=-settings.signal.sma_warmup_sessions, end_offset=0, allow_nonexistent_upstream_partitions=True
    )


def test_window(settings: Settings) -> dg.TimeWindowPartitionMapping:
    """The as-of session and those that follow until the next retraining."""
    return dg.TimeWindowPartitionMapping(
        start_offset=0, end_offset=settings.split.retrain_every_sessions - 1, allow_nonexistent_upstream_partitions=True
    )


def scheduled_asof(settings: Settings, now: datetime | None = None) -> list[str]:
    """As-of sessions of the retraining schedule, up to the newest partition."""
    return asof_sessions(all_sessions(settings, now), settings.split)


def session_range(context: Any) -> list[str]:
    """Partition keys of a run: one, or a range of a single-run backfill."""
    return sorted(context.partition_keys)
