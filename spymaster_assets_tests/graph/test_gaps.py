"""A folder that lacks sessions between others: they are named, and everything else is made as if they were no sessions."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

import dagster as dg
import numpy as np
import pytest

from spymaster_assets.assets.common import QUIET
from spymaster_assets.automation.demo import _real
from spymaster_assets.definitions import build_definitions
from spymaster_assets.errors import ConfigError
from spymaster_assets.evaluation.report import absent_sessions
from spymaster_assets.market.dbn import read_header, read_records
from spymaster_assets.market.files import recorded_sessions, scan_folder
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.simulate import write_market
from spymaster_assets.partitions import SESSION_ASSETS, all_sessions, scheduled_asof
from spymaster_assets.settings import MINUTE_NS, NS, Settings, SplitSettings
from spymaster_assets.store import ArtifactStore
from spymaster_assets_tests.builders import CALENDARS, dbn_bytes, ohlcv, trades

CALENDAR = CALENDARS["SPY"]
DAY_NS = 86_400 * NS
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


def utc_days(folder: Path, symbol: str, keys: list[str], lost: str) -> None:
    """Sessions of a simulated market as files cut at midnight UTC, without the day `lost`; its headers state whole days."""
    made = write_market(folder, instrument(symbol), [CALENDARS[symbol].session(k) for k in keys], 3)
    names = {s.instrument_id: s.raw_symbol for p in made for s in read_header(p).symbols}
    records = np.concatenate([read_records(p) for p in made])
    for path in made:
        path.unlink()
    days = records["ts_recv"].astype(np.int64) // DAY_NS
    for day in np.unique(days):
        name = date.fromordinal(date(1970, 1, 1).toordinal() + int(day)).isoformat()
        if name != lost:
            start_ns = int(day) * DAY_NS
            cut = dbn_bytes(records[days == day], symbols=names, start_ns=start_ns, end_ns=start_ns + DAY_NS)
            (folder / f"{name}.dbn.zst").write_bytes(cut)


@pytest.mark.parametrize("symbol", ["SPY", "ES"])
def test_an_hour_of_a_lost_day_in_a_neighbours_file_is_no_session(symbol: str, tmp_path: Path) -> None:
    """In winter SPY's evening is in the next day's file, and ES opens in the file of the day before."""
    calendar, folder = CALENDARS[symbol], tmp_path / "dbn"
    keys = calendar.sessions("2024-02-05", "2024-02-08")
    utc_days(folder, symbol, keys, lost=keys[1])
    session, entries = calendar.session(keys[1]), scan_folder(folder)
    times = np.concatenate([read_records(e.path)["ts_recv"] for e in entries]).astype(np.int64)
    of_lost = times[(times >= session.open_ns) & (times < session.close_ns)]
    assert len(of_lost)
    assert not ((of_lost >= session.regular_open_ns) & (of_lost < session.regular_close_ns)).any()
    settings = _real(tmp_path / "root", folder, symbol)
    assert settings.missing_sessions == (keys[1],)
    assert all_sessions(settings) == [keys[0], *keys[2:]]
    span = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}
    with dg.instance_for_test() as instance:
        job = build_definitions(settings).resolve_job_def("session_data")
        assert job.execute_in_process(instance=instance, tags=span, run_config=QUIET).success


def test_regular_hours_of_a_half_day_end_early(tmp_path: Path) -> None:
    half, whole = CALENDAR.session("2024-07-03"), CALENDAR.session("2024-07-05")
    assert half.early_close
    for session, hour in ((half, 13), (whole, 13)):
        at = session.regular_open_ns + (hour * 60 - 570) * MINUTE_NS
        (tmp_path / f"{session.key}.dbn").write_bytes(
            dbn_bytes(trades([at], [500 * NS]), start_ns=session.open_ns, end_ns=session.close_ns, compress=False)
        )
    keys = [half.key, whole.key]
    assert recorded_sessions(scan_folder(tmp_path), CALENDAR, instrument("SPY"), keys) == [whole.key]


def test_bars_do_not_stand_in_for_a_tape_of_the_evening(tmp_path: Path) -> None:
    session = CALENDAR.session(KEYS[0])
    stated = {"start_ns": session.open_ns, "end_ns": session.close_ns}
    noon = session.regular_open_ns + 150 * MINUTE_NS
    bar = ohlcv([noon], [[500 * NS] * 4], [100])
    (tmp_path / "bars.dbn.zst").write_bytes(dbn_bytes(bar, "ohlcv-1m", **stated))
    found = [recorded_sessions(scan_folder(tmp_path), CALENDAR, instrument("SPY"), KEYS)]
    evening = trades([session.regular_close_ns + MINUTE_NS], [500 * NS])
    (tmp_path / "trades.dbn.zst").write_bytes(dbn_bytes(evening, **stated))
    found.append(recorded_sessions(scan_folder(tmp_path), CALENDAR, instrument("SPY"), KEYS))
    assert found == [[session.key], []]  # registration takes the trades


def test_windows_count_the_sessions_that_there_are(gapped: Settings) -> None:
    split = SplitSettings(train_sessions=2, validation_sessions=1, embargo_sessions=0, retrain_every_sessions=1)
    assert scheduled_asof(replace(gapped, split=split)) == [KEYS[4], KEYS[6], KEYS[7]]


def test_the_sessions_around_a_gap_are_made_and_no_average_reaches_over_it(gapped: Settings) -> None:
    definitions = build_definitions(gapped)
    assert definitions.resolve_assets_def("signals").partitions_def.get_partition_keys() == all_sessions(gapped)
    span = {"dagster/asset_partition_range_start": KEYS[0], "dagster/asset_partition_range_end": KEYS[-1]}
    with dg.instance_for_test() as instance:
        job = definitions.resolve_job_def("session_data")
        assert job.execute_in_process(instance=instance, tags=span, run_config=QUIET).success
    store = ArtifactStore(gapped.root)
    assert all(store.keys(asset) == all_sessions(gapped) for asset in SESSION_ASSETS)
    bars_of = {k: [n for n in store.load("levels", k).inputs if n.startswith("ohlcv_bars")] for k in KEYS[4:8:2]}
    assert bars_of == {k: [f"ohlcv_bars[{k}]"] for k in (KEYS[4], KEYS[6])}
    last = [n for n in store.load("levels", KEYS[7]).inputs if n.startswith("ohlcv_bars")]
    assert last == [f"ohlcv_bars[{KEYS[6]}]", f"ohlcv_bars[{KEYS[7]}]"]


def test_a_report_names_the_sessions_that_are_absent() -> None:
    assert absent_sessions("SPY", [KEYS[0], KEYS[2], KEYS[4]]) == [KEYS[1], KEYS[3]]
    assert absent_sessions("SPY", []) == []
