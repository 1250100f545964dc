"""Which sessions a fold has, whatever the clock says."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from spymaster_assets import partitions
from spymaster_assets.datasets.splits import plan_split
from spymaster_assets.partitions import calendar_of, fold_sessions, scheduled_asof
from spymaster_assets.settings import Settings, SplitSettings

SPLIT = SplitSettings(train_sessions=8, validation_sessions=2, embargo_sessions=1, retrain_every_sessions=5)
OPEN = Settings(root=Path("none"), dbn_dir=Path("none"), first_session="2024-01-02", split=SPLIT)


def test_a_fold_is_the_same_on_its_first_day_and_a_month_later(monkeypatch: pytest.MonkeyPatch) -> None:
    asof = scheduled_asof(OPEN, datetime(2024, 3, 1, tzinfo=UTC))[-1]
    session = calendar_of("SPY").session(asof)
    plans = []
    for day in (datetime.fromtimestamp(session.open_ns / 1e9, UTC), datetime(2024, 6, 3, tzinfo=UTC)):

        class Clock(datetime):
            @classmethod
            def now(cls, tz=None, at=day):  # type: ignore[no-untyped-def]
                return at

        monkeypatch.setattr(partitions, "datetime", Clock)
        plans.append(plan_split(fold_sessions(OPEN, asof), asof, SPLIT))
    assert plans[0] == plans[1]
    assert len(plans[0].test) == 5
    assert plans[0].test[0] == asof


def test_a_configured_end_and_missing_sessions_shorten_a_fold() -> None:
    asof = scheduled_asof(OPEN, datetime(2024, 3, 1, tzinfo=UTC))[0]
    following = [calendar_of("SPY").next(asof, n) for n in range(1, 7)]
    ended = replace(OPEN, last_session=following[1])
    assert fold_sessions(ended, asof)[-3:] == [asof, *following[:2]]
    holed = replace(OPEN, missing_sessions=(following[0],))
    assert fold_sessions(holed, asof)[-5:] == [asof, *following[1:5]]
