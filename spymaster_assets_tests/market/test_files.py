"""Registration of a session's input, on made faults and on the real folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spymaster_assets.errors import MarketDataError, MissingInputError
from spymaster_assets.market.calendar import Session
from spymaster_assets.market.contracts import ContractVolume, Front, choose_front, front_known_ns, is_outright
from spymaster_assets.market.dbn import read_records
from spymaster_assets.market.files import (
    SessionFiles,
    covers,
    recorded_sessions,
    register_session,
    scan_flat,
    scan_folder,
)
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.tape import load_session_records, load_tape
from spymaster_assets.proof.cuts import cuttable_from_ns
from spymaster_assets.settings import MINUTE_NS
from spymaster_assets_tests.builders import CALENDARS, dbn_bytes, ohlcv, session_of, trades

KEY = "2024-03-12"
S = session_of("SPY", KEY)


def day(n: int = 2000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    times = np.sort(rng.integers(S.open_ns, S.close_ns, n))
    return trades(times, 500_000_000_000 + rng.integers(-200, 200, n) * 10_000_000)


def register(folder: Path, key: str = KEY, symbol: str = "SPY", previous: SessionFiles | None = None) -> SessionFiles:
    return register_session(scan_folder(folder), CALENDARS[symbol], instrument(symbol), key, previous)


def test_names_do_not_matter_and_files_join(tmp_path: Path) -> None:
    records = day()
    (tmp_path / "deep").mkdir()
    (tmp_path / "whatever.dbn").write_bytes(dbn_bytes(records[:700], compress=False))
    (tmp_path / "deep" / "b.dbn.zst").write_bytes(dbn_bytes(records[700:]))
    found = register(tmp_path)
    assert [f.name for f in found.files] == ["deep/b.dbn.zst", "whatever.dbn"]
    assert sum(f.session_record_count for f in found.files) == 2000
    assert np.array_equal(load_session_records(tmp_path, found, session=S), records)
    assert SessionFiles.from_json(found.to_json()) == found


def test_linked_folders_and_files_are_followed_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "dbn", tmp_path / "elsewhere"
    for path in (folder / "own", elsewhere / "deep"):
        path.mkdir(parents=True)
    records = day()
    (folder / "own" / "a.dbn").write_bytes(dbn_bytes(records[:500]))
    (elsewhere / "deep" / "b.dbn").write_bytes(dbn_bytes(records[500:900]))
    (tmp_path / "c.dbn").write_bytes(dbn_bytes(records[900:]))
    (elsewhere / "2024-03-12.csv").write_text("ticker")
    for link, target in (
        ("books", elsewhere),  # a folder of another disk
        ("c.dbn", tmp_path / "c.dbn"),
        ("again", folder / "own"),  # seen already
        ("own/loop", folder),
    ):
        (folder / link).symlink_to(target)
    (folder / ".lock").symlink_to("host.1234")  # as editors leave them
    assert [e.name for e in scan_folder(folder)] == ["books/deep/b.dbn", "c.dbn", "own/a.dbn"]
    assert [f.name for f in scan_flat(folder)] == ["books/2024-03-12.csv"]
    found = register(folder)
    assert np.array_equal(load_session_records(folder, found, session=S), records)


@pytest.mark.parametrize("name", ["options.dbn.zst", "books", "own/deep.dbn"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "a.dbn").write_bytes(dbn_bytes(day()))
    (tmp_path / name).symlink_to("/nowhere/o.dbn.zst")
    for scan in (scan_folder, scan_flat):
        with pytest.raises(MarketDataError, match=rf"leads nowhere.*{name} -> /nowhere/o\.dbn\.zst"):
            scan(tmp_path)


def test_the_same_file_twice_is_refused(tmp_path: Path) -> None:
    for name in ("a.dbn.zst", "b.dbn.zst"):
        (tmp_path / name).write_bytes(dbn_bytes(day()))
    with pytest.raises(MarketDataError, match=r"delivered twice.*a\.dbn\.zst and b\.dbn\.zst"):
        register(tmp_path)


def test_an_overlapping_delivery_is_refused(tmp_path: Path) -> None:
    records = day()
    (tmp_path / "a.dbn").write_bytes(dbn_bytes(records[:1200]))
    (tmp_path / "b.dbn").write_bytes(dbn_bytes(records[1000:]))
    with pytest.raises(MarketDataError, match="records of instrument 1 were delivered twice"):
        register(tmp_path)


def test_a_tape_of_two_datasets_is_refused_until_one_is_named(tmp_path: Path) -> None:
    """The same prints under another dataset's name, which is how a second feed of the vendor and a second venue look."""
    for name, dataset in (("a", "XNAS.ITCH"), ("b", "EQUS.MINI")):
        (tmp_path / f"{name}.dbn.zst").write_bytes(dbn_bytes(day(), dataset=dataset))
    entries, spy = scan_folder(tmp_path), instrument("SPY")
    with pytest.raises(
        MarketDataError, match=r"2 datasets: EQUS.MINI, XNAS.ITCH.*a\.dbn\.zst \(XNAS.*SPYMASTER_DATASET"
    ):
        register(tmp_path)
    for dataset, name in (("XNAS.ITCH", "a.dbn.zst"), ("EQUS.MINI", "b.dbn.zst")):
        found = register_session(entries, CALENDARS["SPY"], spy, KEY, None, dataset)
        assert [(f.name, f.dataset) for f in found.files] == [(name, dataset)]
        assert found.contracts[0].volume == 2000 * 100
        assert covers(entries, S, spy, dataset) == covers(entries, S, spy)
    with pytest.raises(MissingInputError, match=r"no SPY record of dataset DBEQ.BASIC.*b\.dbn\.zst \(EQUS.MINI\)"):
        register_session(entries, CALENDARS["SPY"], spy, KEY, None, "DBEQ.BASIC")
    assert not covers(entries, S, spy, "DBEQ.BASIC")
    assert recorded_sessions(entries, CALENDARS["SPY"], spy, [KEY], "DBEQ.BASIC") == []


def test_ids_of_another_dataset_are_not_the_tapes(tmp_path: Path) -> None:
    """Id 1 of a file whose own dataset does not give it to SPY is something else, though the tape's dataset does."""
    (tmp_path / "a.dbn.zst").write_bytes(dbn_bytes(day()))
    unnamed = dbn_bytes(day(seed=1), dataset="OPRA.PILLAR", symbols={0: "SPY"})
    (tmp_path / "b.dbn.zst").write_bytes(unnamed)
    found = register(tmp_path)
    assert [f.name for f in found.files] == ["a.dbn.zst"]
    assert found.contracts[0].volume == 2000 * 100


def test_rows_that_repeat_time_price_and_size_stay(tmp_path: Path) -> None:
    records = day(100)
    records["ts_recv"][10:20] = records["ts_recv"][10]
    records["price"][10:20] = records["price"][10]
    (tmp_path / "a.dbn").write_bytes(dbn_bytes(records))
    found = register(tmp_path)
    assert found.files[0].session_record_count == 100
    assert len(load_tape(tmp_path, found, session=S).ts_ns) == 100


def test_a_file_that_changes_after_registration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.dbn"
    path.write_bytes(dbn_bytes(day()))
    found = register(tmp_path)
    path.write_bytes(dbn_bytes(day(seed=1)))
    with pytest.raises(MarketDataError, match="changed since it was registered"):
        load_tape(tmp_path, found, session=S)
    path.unlink()
    with pytest.raises(MarketDataError, match="vanished"):
        load_tape(tmp_path, found, session=S)


def test_a_file_replaced_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash that is recorded must be that of the bytes that were read."""
    path = tmp_path / "a.dbn"
    delivered, again = (dbn_bytes(day(seed=n), compress=False) for n in (0, 1))
    assert len(delivered) == len(again)
    path.write_bytes(delivered)
    found = register(tmp_path)

    def replaced(of: Path) -> np.ndarray:
        records = read_records(of)
        (tmp_path / "new").write_bytes(again)
        (tmp_path / "new").replace(path)
        return records

    for module in ("files", "tape"):
        with monkeypatch.context() as patch:
            patch.setattr(f"spymaster_assets.market.{module}.read_records", replaced)
            with pytest.raises(MarketDataError, match=r"changed while it was read.*a\.dbn.*materialize again"):
                register(tmp_path) if module == "files" else load_tape(tmp_path, found, session=S)
        path.write_bytes(delivered)
    assert register(tmp_path) == found


def test_missing_input_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.dbn").write_bytes(dbn_bytes(day()))
    with pytest.raises(MissingInputError, match=r"no SPY record for session 2024-03-13.*1 files.*2024-03-13T08:00:00Z"):
        register(tmp_path, "2024-03-13")
    with pytest.raises(MissingInputError, match="does not exist"):
        scan_folder(tmp_path / "nowhere")


def test_trades_are_preferred_and_unknown_schemas_named(tmp_path: Path, real_data: Path) -> None:
    import shutil

    shutil.copy(real_data / "spy-ohlcv-1m" / "spy-20240312.ohlcv-1m.dbn.zst", tmp_path)
    assert register(tmp_path).schema == "ohlcv-1m"
    (tmp_path / "t.dbn").write_bytes(dbn_bytes(day()))
    assert register(tmp_path).schema == "trades"


def test_missing_minutes_are_named(tmp_path: Path) -> None:
    records = day(60_000)
    gap = (records["ts_recv"] >= S.regular_open_ns + 600 * 10**9) & (
        records["ts_recv"] < S.regular_open_ns + 720 * 10**9
    )
    (tmp_path / "a.dbn").write_bytes(dbn_bytes(records[~gap]))
    found = register(tmp_path)
    assert found.missing_regular_minutes == ("2024-03-12T13:40:00Z", "2024-03-12T13:41:00Z")
    assert found.coverage_regular == pytest.approx(388 / 390, abs=1e-6)


def test_input_that_stops_early_is_observed_until_its_last_record(tmp_path: Path) -> None:
    records = day()
    morning = records[records["ts_recv"] < S.regular_open_ns + 3600 * 10**9]
    (tmp_path / "a.dbn").write_bytes(dbn_bytes(morning, end_ns=S.close_ns))
    assert register(tmp_path).observed_until_ns == int(morning["ts_recv"][-1])
    assert covers(scan_folder(tmp_path), S, instrument("SPY"))


def test_a_cut_keeps_trades_before_it_and_bars_closed_by_then(tmp_path: Path) -> None:
    records = day(500)
    (tmp_path / "a.dbn").write_bytes(dbn_bytes(records))
    cut_ns = int(records["ts_recv"][250])
    found = register(tmp_path)
    assert np.array_equal(load_session_records(tmp_path, found, session=S, until_ns=cut_ns), records[:250])
    assert len(load_session_records(tmp_path, found, session=S, until_ns=S.open_ns - 10**12)) == 0

    folder = tmp_path / "bars"
    folder.mkdir()
    minute_ns = 60 * 10**9
    starts = [S.regular_open_ns + n * minute_ns for n in range(5)]
    bars = ohlcv(starts, [(10, 10, 10, 10)] * 5, [1] * 5)
    (folder / "b.dbn").write_bytes(dbn_bytes(bars, "ohlcv-1m"))
    found = register(folder)
    for cut_ns, closed in ((starts[2], 2), (starts[2] - 1, 1), (starts[2] + 30 * 10**9, 2), (S.close_ns, 5)):
        assert len(load_session_records(folder, found, session=S, until_ns=cut_ns)) == closed


def volumes(*pairs: tuple[str, int]) -> list[ContractVolume]:
    return [ContractVolume(n, name, v, v, v, first_ns=0) for n, (name, v) in enumerate(pairs)]


def test_front_is_chosen_by_the_session_before() -> None:
    before = volumes(("ESM5", 100), ("ESU5", 900))
    now = volumes(("ESM5", 5000), ("ESU5", 10))
    front = choose_front(now, before, Front(0, "ESM5", 1.0, "previous_session"), 1)
    assert front == Front(1, "ESU5", 0.9, "previous_session", "ESM5")
    assert choose_front(now, [], None, 1) == Front(0, "ESM5", round(5000 / 5010, 6), "pre_open", None)
    assert choose_front([], before, None, 1) is None


NAMES = {1: "ESH4", 2: "ESM4"}
ES_SESSIONS = [session_of("ES", k) for k in ("2024-03-11", KEY)]


def es_minutes(spans: dict[int, list[tuple[Session, int, int, int]]]) -> np.ndarray:
    """A trade a minute of each contract: (session, from, until, size), minutes from the regular open on."""
    parts = []
    for number, told in spans.items():
        for session, first, last, size in told:
            times = session.regular_open_ns + np.arange(first, last) * MINUTE_NS
            parts.append(trades(times, 5000 * 10**9 + number * 10**9, size=size, instrument_id=number))
    records = np.concatenate(parts)
    records = records[np.argsort(records["ts_recv"], kind="stable")]
    records["sequence"] = np.arange(1, len(records) + 1)
    return records


def es_front(folder: Path, records: np.ndarray, cut_ns: int | None = None) -> SessionFiles:
    """Registration of the second session of a tape of both, all of it or what was received before cut_ns."""
    if cut_ns is not None:
        records = records[records["ts_recv"] < cut_ns]
    data = dbn_bytes(records, "trades", NAMES, ES_SESSIONS[0].open_ns, ES_SESSIONS[1].close_ns)
    (folder / "es.dbn.zst").write_bytes(data)
    previous = register(folder, ES_SESSIONS[0].key, "ES")
    assert previous.front.raw_symbol == "ESH4"
    return register(folder, KEY, "ES", previous)


def test_a_front_of_yesterday_that_trades_late_today_is_not_known_before(tmp_path: Path) -> None:
    """Whether ESH4 trades at 14:00 is not known at the open: ESM4, which trades by then, is in front, whatever comes."""
    before, today = ES_SESSIONS
    spans = {1: [(before, -60, 390, 900), (today, 270, 390, 900)], 2: [(before, -60, 390, 100), (today, -60, 390, 100)]}
    records = es_minutes(spans)
    whole = es_front(tmp_path, records)
    assert whole.front == Front(2, "ESM4", 1.0, "only_contract", "ESH4")
    for minute in (0, 1, 150, 269, 300):
        assert es_front(tmp_path, records, today.regular_open_ns + minute * MINUTE_NS).front == whole.front
    # one trade before the open, and it stays in front as the session before says
    spans[1].append((today, -30, -29, 1))
    records = es_minutes(spans)
    for cut_ns in (None, today.regular_open_ns, today.regular_open_ns + 150 * MINUTE_NS):
        assert es_front(tmp_path, records, cut_ns).front == Front(1, "ESH4", 0.9, "previous_session", None)


def test_a_front_of_yesterday_without_a_record_today_rolls(tmp_path: Path) -> None:
    before, today = ES_SESSIONS
    records = es_minutes({1: [(before, -60, 0, 900)], 2: [(today, -60, 390, 100)]})
    assert es_front(tmp_path, records).front == Front(2, "ESM4", 1.0, "only_contract", "ESH4")


def test_a_tape_of_regular_hours_alone_names_its_front_after_a_minute(tmp_path: Path) -> None:
    before, today = ES_SESSIONS
    spans = {1: [(before, 0, 390, 900), (today, 0, 390, 10)], 2: [(before, 0, 390, 100), (today, 0, 390, 50)]}
    records = es_minutes(spans)
    for cut_ns in (None, today.regular_open_ns + MINUTE_NS, today.regular_open_ns + 150 * MINUTE_NS):
        found = es_front(tmp_path, records, cut_ns)
        assert (found.front.raw_symbol, found.front.basis) == ("ESH4", "previous_session")
        # without a session before, what traded most in the first minute
        assert register(tmp_path, KEY, "ES").front == Front(2, "ESM4", round(50 / 60, 6), "pre_open")
    assert front_known_ns(today.regular_open_ns + 5, today.regular_open_ns) == today.regular_open_ns + MINUTE_NS
    assert front_known_ns(today.open_ns, today.regular_open_ns) == today.regular_open_ns


def test_a_session_is_cut_from_when_its_front_has_to_be_known(tmp_path: Path) -> None:
    before, today = ES_SESSIONS
    found = es_front(tmp_path, es_minutes({1: [(before, -60, 390, 9), (today, -40, 390, 9)], 2: [(today, -60, 0, 1)]}))
    assert cuttable_from_ns(found, today) == today.regular_open_ns - 40 * MINUTE_NS
    # a registration that names a front which trades first at 14:00 is tried in the hours before
    late = replace(found, first_ns=today.regular_open_ns + 270 * MINUTE_NS)
    assert cuttable_from_ns(late, today) == today.regular_open_ns
    by_volume = replace(found, front=replace(found.front, basis="pre_open"))
    assert cuttable_from_ns(by_volume, today) == today.regular_open_ns


def test_outrights() -> None:
    es, spy = instrument("ES"), instrument("SPY")
    assert [n for n in ("ESM5", "ESM5-ESU5", "MESM5", "ES", "ESZ24", "ESM5 C5000", "ESA5") if is_outright(n, es)] == [
        "ESM5",
        "ESZ24",
    ]
    assert is_outright("SPY", spy)
    assert not is_outright("SPYG", spy)


class TestRealFolders:
    def chain(self, folder: Path, symbol: str, first: str, last: str) -> dict[str, SessionFiles]:
        found: dict[str, SessionFiles] = {}
        entries, previous = scan_folder(folder), None
        for key in CALENDARS[symbol].sessions(first, last):
            previous = register_session(entries, CALENDARS[symbol], instrument(symbol), key, previous)
            found[key] = previous
        return found

    def test_mym_rolls_after_its_volume_crosses(self, real_data: Path) -> None:
        found = self.chain(real_data / "mym-ohlcv-1m", "MYM", "2025-04-30", "2025-06-30")
        crossed = found["2025-06-16"]
        by_symbol = {c.raw_symbol: c.regular_volume for c in crossed.contracts}
        assert by_symbol["MYMU5"] > by_symbol["MYMM5"]
        assert crossed.front.raw_symbol == "MYMM5"
        after = found["2025-06-17"].front
        assert (after.raw_symbol, after.rolled_from, after.basis) == ("MYMU5", "MYMM5", "previous_session")
        assert [k for k, f in found.items() if f.front.rolled_from] == ["2025-06-17"]
        assert {f.front.raw_symbol for k, f in found.items() if k >= "2025-06-17"} == {"MYMU5"}
        assert found["2025-04-30"].front.basis == "pre_open"
        assert all("-" not in c.raw_symbol for f in found.values() for c in f.contracts)
        for key in ("2025-05-26", "2025-06-19"):
            assert found[key].last_ns == session_of("MYM", key).regular_close_ns

    def test_es_stops_for_labor_day(self, real_data: Path) -> None:
        found = self.chain(real_data / "es-trades-2013", "ES", "2013-09-02", "2013-09-03")
        session = session_of("ES", "2013-09-02")
        assert 0 < session.regular_close_ns - found["2013-09-02"].last_ns < 60 * 10**9
        assert found["2013-09-02"].coverage_regular == 1.0
        assert len(found["2013-09-02"].files) == 2
        assert found["2013-09-03"].observed_until_ns == found["2013-09-03"].last_ns

    def test_spy_has_every_regular_minute(self, real_data: Path) -> None:
        found = self.chain(real_data / "spy-ohlcv-1m", "SPY", "2024-02-20", "2024-05-17")
        assert len(found) == 63
        assert all(f.coverage_regular == 1.0 and not f.missing_regular_minutes for f in found.values())
        assert (
            session_of("SPY", "2024-03-11").open_ns - session_of("SPY", "2024-03-08").open_ns
            == (3 * 24 - 1) * 3600 * 10**9
        )
