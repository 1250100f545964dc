"""Dagster's view of sessions: partitions without closed days, and the windows between them."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from functools import cache
from typing import Any

import dagster as dg

from spymaster_assets.partitions import calendar_of, last_open_session
from spymaster_assets.settings import Settings

NEW_YORK = "America/New_York"
ALL_EARLIER = 100_000
"""Start offset of an expanding window, in sessions: further back than any first session."""


@cache
def session_partitions(settings: Settings) -> dg.DailyPartitionsDefinition:
    """Daily partitions without weekends, holidays and other days without a session or its input.

    An open range ends with the session that runs or comes next (end_offset 1), as an as-of model needs.
    """
    last = last_open_session(settings)
    horizon = last if settings.last_session else (date.fromisoformat(last) + timedelta(days=366)).isoformat()
    closed = {*calendar_of(settings.symbol).non_sessions(settings.first_session, horizon), *settings.missing_sessions}
    return dg.DailyPartitionsDefinition(
        start_date=settings.first_session,
        end_date=(date.fromisoformat(last) + timedelta(days=1)).isoformat() if settings.last_session else None,
        end_offset=0 if settings.last_session else 1,
        timezone=NEW_YORK,
        exclusions=["0 0 * * 6,0", *[datetime.fromisoformat(d) for d in sorted(closed)]],
    )


def keyed_by_session(settings: Settings, group: str) -> dict[str, Any]:
    """What the assets of a group that are keyed by session have in common: one run makes a range of partitions."""
    return {
        "partitions_def": session_partitions(settings),
        "group_name": group,
        "backfill_policy": dg.BackfillPolicy.single_run(),
    }


def training_window(settings: Settings) -> dg.TimeWindowPartitionMapping:
    """Sessions that a split of the as-of session may read: a rolling window, or all earlier ones."""
    n = settings.split.history_sessions if settings.split.window == "rolling" else ALL_EARLIER
    return _window(-n, -1)


def warmup_window(settings: Settings) -> dg.TimeWindowPartitionMapping:
    """A session and the warm-up sessions before it."""
    return _window(-settings.signal.sma_warmup_sessions, 0)


def judged_window(settings: Settings) -> dg.TimeWindowPartitionMapping:
    """The as-of session and those that follow until the next retraining."""
    return _window(0, settings.split.retrain_every_sessions - 1)


def _window(start: int, end: int) -> dg.TimeWindowPartitionMapping:
    """Offsets count sessions, exactly; a window over the first partition is clipped, which the assets check and report."""
    return dg.TimeWindowPartitionMapping(start_offset=start, end_offset=end, allow_nonexistent_upstream_partitions=True)
