"""A folder that lacks sessions between others: they are named, and everything else is made as if they were no sessions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import dagster as dg
import numpy as np
import pytest

from spymaster_assets.automation.demo import _QUIET, _real
from spymaster_assets.definitions import build_definitions
from spymaster_assets.errors import ConfigError
from spymaster_assets.evaluation.report import absent_sessions
from spymaster_assets.market.dbn import read_records
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.simulate import write_market
from spymaster_assets.partitions import SESSION_ASSETS, all_sessions, scheduled_asof
from spymaster_assets.settings import Settings, SplitSettings
from spymaster_assets.store import ArtifactStore
from spymaster_assets_tests.builders import CALENDARS, dbn_bytes, trades

DAY_NS = 86_400 * 10**9
CALENDAR = CALENDARS["SPY"]
KEYS = CALENDAR.sessions("2024-02-01", "2024-02-12")


@pytest.fixture
def gapped(tmp_path: Path) -> Settings:
    """Eight sessions; the fourth has no file, the sixth one whose header states it and that holds no record of it."""
    folder = tmp_path / "dbn"
    write_market(folder, instrument("SPY"), [CALENDAR.session(k) for k in KEYS], 3)
    paths = {k: next(folder.glob(f"*{k.replace('-', '')}*")) for k in KEYS}
    paths[KEYS[3]].unlink()
    session = CALENDAR.session(KEYS[5])
    empty = read_records(paths[KEYS[5]])[:0]
    paths[KEYS[5]].write_bytes(dbn_bytes(empty, start_ns=session.open_ns, end_ns=session.close_ns))
    return _real(tmp_path / "root", folder, None)


def test_missing_sessions_are_found_by_their_records(gapped: Settings) -> None:
    assert (gapped.first_session, gapped.last_session) == (KEYS[0], KEYS[-1])
    assert gapped.missing_sessions == (KEYS[3], KEYS[5])
    assert all_sessions(gapped) == [k for k in KEYS if k not in (KEYS[3], KEYS[5])]
    gapped.write()
    stored = Settings.load({"SPYMASTER_DATA_DIR": str(gapped.root)})
    assert stored.missing_sessions == gapped.missing_sessions
    with pytest.raises(ConfigError, match="missing_sessions='soon' is not a date"):
        replace(gapped, missing_sessions=("soon",)).validate()


def test_the_evening_of_a_lost_day_in_the_next_file_does_not_make_it_a_session(tmp_path: Path) -> None:
    folder = tmp_path / "dbn"
    write_market(folder, instrument("SPY"), [CALENDAR.session(k) for k in KEYS], 3)
    paths = {k: next(folder.glob(f"*{k.replace('-', '')}*")) for k in KEYS}
    paths[KEYS[3]].unlink()
    midnight_ns = CALENDAR.session(KEYS[4]).open_ns // DAY_NS * DAY_NS  # 19:00 of the day before in New York
    records = read_records(paths[KEYS[4]])
    evening = trades(midnight_ns + np.arange(100) * 10**9, np.full(100, int(records["price"][0])))
    evening["instrument_id"] = records["instrument_id"][0]
    paths[KEYS[4]].write_bytes(
        dbn_bytes(np.concatenate([evening, records]), start_ns=midnight_ns, end_ns=midnight_ns + DAY_NS)
    )
    assert CALENDAR.session(KEYS[3]).close_ns > midnight_ns
    assert _real(tmp_path / "root", folder, None).missing_sessions == (KEYS[3],)


def test_windows_count_the_sessions_that_there_are(gapped: Settings) -> None:
    split = SplitSettings(train_sessions=2, validation_sessions=1, embargo_sessions=0, retrain_every_sessions=1)
    assert scheduled_asof(replace(gapped, split=split)) == [KEYS[4], KEYS[6], KEYS[7]]


def test_the_sessions_around_a_gap_are_made_and_no_average_reaches_over_it(gapped: Settings) -> None:
    definitions = build_definitions(gapped)
    assert definitions.resolve_assets_def("signals").partitions_def.get_partition_keys() == all_sessions(gapped)
    span = {"dagster/asset_partition_range_start": KEYS[0], "dagster/asset_partition_range_end": KEYS[-1]}
    with dg.instance_for_test() as instance:
        job = definitions.resolve_job_def("session_data")
        assert job.execute_in_process(instance=instance, tags=span, run_config=_QUIET).success
    store = ArtifactStore(gapped.root)
    assert all(store.keys(asset) == all_sessions(gapped) for asset in SESSION_ASSETS)
    bars_of = {k: [n for n in store.load("levels", k).inputs if n.startswith("ohlcv_bars")] for k in KEYS[4:8:2]}
    assert bars_of == {k: [f"ohlcv_bars[{k}]"] for k in (KEYS[4], KEYS[6])}
    last = [n for n in store.load("levels", KEYS[7]).inputs if n.startswith("ohlcv_bars")]
    assert last == [f"ohlcv_bars[{KEYS[6]}]", f"ohlcv_bars[{KEYS[7]}]"]


def test_a_report_names_the_sessions_that_are_absent() -> None:
    assert absent_sessions("SPY", [KEYS[0], KEYS[2], KEYS[4]]) == [KEYS[1], KEYS[3]]
    assert absent_sessions("SPY", []) == []
