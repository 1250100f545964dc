"""Optional feeds: which files bring them, what is said when they are late, broken or missing, and the basis between two markets."""

from __future__ import annotations

import gzip
from datetime import date
from pathlib import Path

import databento_dbn
import numpy as np
import polars as pl
import pytest
import zstandard

from spymaster_assets.errors import MarketDataError
from spymaster_assets.market.basis import identity_basis, measured_basis, option_roots
from spymaster_assets.market.book import book_from_parquet, book_to_parquet
from spymaster_assets.market.dbn import UNDEFINED_PRICE, read_header, read_records
from spymaster_assets.market.feeds import (
    OptionSource,
    book_files,
    load_book,
    load_open_interest,
    load_option_trades,
    minute_coverage,
    option_source,
)
from spymaster_assets.market.files import register_session, scan_folder
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.options import DEFINITION_DTYPES, OptionTrades, read_definitions
from spymaster_assets.market.simulate import write_market
from spymaster_assets.market.simulate_book import write_full_market
from spymaster_assets.market.tape import load_tape
from spymaster_assets.settings import MINUTE_NS, BookSettings
from spymaster_assets_tests.builders import CALENDARS, dbn_bytes, session_of, trades

KEY = "2024-02-01"
SESSION = session_of("SPY", KEY)
SPY = instrument("SPY")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("feeds")
    write_full_market(made, SPY, [SESSION], 3, "small")
    return made


def test_feeds_are_found_by_what_the_headers_say(folder: Path) -> None:
    entries = scan_folder(folder)
    assert [e.header.schema for e in book_files(entries, SESSION, SPY)] == ["mbp-10"]
    source = option_source(entries, folder, SESSION, SPY)
    assert source is not None
    assert (source.root, source.schema) == ("SPY", "trades")
    assert [p.name for p in source.quotes] == [f"spy-opt-{KEY.replace('-', '')}.cmbp-1.dbn.zst"]
    assert load_open_interest(source, SESSION) is None
    told = load_option_trades(source, SESSION)
    assert len(told) > 1000
    assert set(told.expiry.tolist()) == {date.fromisoformat(KEY).toordinal()}
    # the underlying's registration is not disturbed by option trades beside it
    assert register_session(entries, CALENDARS["SPY"], SPY, KEY, None).front.raw_symbol == "SPY"


def test_a_market_without_the_feeds_has_none(tmp_path: Path) -> None:
    write_market(tmp_path, SPY, [SESSION], 3)
    entries = scan_folder(tmp_path)
    assert book_files(entries, SESSION, SPY) == ()
    assert option_source(entries, tmp_path, SESSION, SPY) is None


def test_a_flat_file_serves_when_there_is_no_dbn(tmp_path: Path) -> None:
    write_market(tmp_path / "dbn", SPY, [SESSION], 3)
    path = tmp_path / "dbn" / "us_options_opra" / f"{KEY}.csv.gz"
    path.parent.mkdir()
    at = SESSION.regular_open_ns
    rows = [
        f"O:SPY240201C00500000,1.5,2,{at + 5},1",
        f"O:SPY240202C00500000,1.5,2,{at + 6},2",
        f"O:SPYG240201C00050000,1,1,{at},3",
    ]
    path.write_bytes(gzip.compress("\n".join(["ticker,price,size,sip_timestamp,sequence_number", *rows]).encode()))
    source = option_source(scan_folder(tmp_path / "dbn"), tmp_path / "dbn", SESSION, SPY)
    assert source is not None
    told = load_option_trades(source, SESSION)
    assert (told.strike_e9.tolist(), told.size.tolist()) == (
        [500 * 10**9],
        [2],
    )  # today's expiry and the exact root alone


FLAT_TRADES = "ticker,conditions,correction,exchange,price,sip_timestamp,size,sequence_number"


def test_flat_files_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    at = SESSION.regular_open_ns + 5
    contents = {
        "us_options_opra/trades_v1": (FLAT_TRADES, f"O:AAPL240201C00190000,,,,2.5,{at},1,1", f"O:SPY240201C00500000,,,,1.5,{at},2,2"),
        "us_options_opra/mine": (FLAT_TRADES, f"O:AAPL240201C00190000,,,,2.5,{at},1,1"),
        "us_options_opra/minute_aggs_v1": ("ticker,volume,open,close,high,low,window_start", f"O:SPY240201C00500000,2,1,1,1,1,{at}"),
        "us_stocks_sip/trades_v1": (FLAT_TRADES, f"SPY,,,,480.5,{at},100,1"),
        "empty": (FLAT_TRADES,),
    }  # fmt: skip
    for name, lines in contents.items():
        path = tmp_path / name / f"{KEY}.csv.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    source = option_source((), tmp_path, SESSION, SPY)
    assert source is not None
    assert [p.parent.name for p in source.trades] == ["trades_v1"]
    assert load_option_trades(source, SESSION).size.tolist() == [2]
    again = tmp_path / "us_options_opra" / "again" / f"{KEY}.csv.gz"
    again.parent.mkdir()
    again.write_bytes(source.trades[0].read_bytes())
    with pytest.raises(MarketDataError, match="two flat files bring the option trades"):
        option_source((), tmp_path, SESSION, SPY)


def test_a_flat_file_that_cannot_be_read_is_refused_not_skipped(tmp_path: Path) -> None:
    (tmp_path / f"{KEY}.csv.gz").write_bytes(gzip.compress(FLAT_TRADES.encode())[:20])
    with pytest.raises(MarketDataError, match="cannot be read as CSV"):
        option_source((), tmp_path, SESSION, SPY)


def test_option_trades_delivered_twice_are_refused(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    again = next(tmp_path.glob("spy-opt-*.trades.dbn.zst"))
    (tmp_path / f"copy-{again.name}").write_bytes(again.read_bytes())
    source = option_source(scan_folder(tmp_path), tmp_path, SESSION, SPY)
    assert source is not None
    with pytest.raises(MarketDataError, match="two files bring the option trades"):
        load_option_trades(source, SESSION)


def test_option_trades_in_consecutive_files_are_one_feed(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    whole = option_source(scan_folder(tmp_path), tmp_path, SESSION, SPY)
    assert whole is not None
    path = whole.trades[0]
    symbols, records = names_of(path), read_records(path)
    noon = SESSION.regular_open_ns + 150 * MINUTE_NS
    before = records["ts_recv"] < noon
    for name, part, start, end in (
        ("am", before, SESSION.open_ns, noon),
        ("pm", ~before, noon, SESSION.close_ns),
    ):
        data = dbn_bytes(records[part], "trades", symbols, start, end, dataset=read_header(path).dataset)
        (tmp_path / f"{name}.dbn.zst").write_bytes(data)
    expected = load_option_trades(whole, SESSION)
    path.unlink()
    halves = option_source(scan_folder(tmp_path), tmp_path, SESSION, SPY)
    assert halves is not None
    assert (len(halves.trades), halves.from_ns, halves.until_ns) == (2, whole.from_ns, whole.until_ns)
    assert_same_trades(load_option_trades(halves, SESSION), expected)
    (tmp_path / "pm.dbn.zst").unlink()
    morning = option_source(scan_folder(tmp_path), tmp_path, SESSION, SPY)
    assert morning is not None
    assert morning.until_ns == noon


def test_other_days_of_a_file_are_neither_counted_nor_compared(folder: Path, tmp_path: Path) -> None:
    """A file of two days: yesterday's options have no definition today, and yesterday lies in a second file too."""
    copied(folder, tmp_path)
    path = next(tmp_path.glob("spy-opt-*.trades.dbn.zst"))
    names, records, dataset = names_of(path), read_records(path), read_header(path).dataset
    expected = load_option_trades(option_source_of(tmp_path), SESSION)
    day_ns = 24 * 60 * MINUTE_NS
    yesterday = records[:300].copy()
    yesterday["ts_recv"] -= np.uint64(day_ns)
    yesterday["ts_event"] -= np.uint64(day_ns)
    expired = yesterday.copy()
    expired["instrument_id"] += 500_000
    named = names | {int(n): "SPY   240131C00480000" for n in np.unique(expired["instrument_id"])}
    opens_ns, closes_ns = SESSION.open_ns, SESSION.close_ns
    for name, content, end_ns in (
        ("two-days", np.concatenate([expired, yesterday, records]), closes_ns),
        ("again", yesterday, SESSION.regular_open_ns + MINUTE_NS),
    ):
        content = content[np.argsort(content["ts_recv"], kind="stable")]
        data = dbn_bytes(content, "trades", named, opens_ns - day_ns, end_ns, dataset=dataset)
        (tmp_path / f"{name}.dbn.zst").write_bytes(data)
    path.unlink()
    source = option_source_of(tmp_path)
    assert len(source.trades) == 2
    found = load_option_trades(source, SESSION)
    assert_same_trades(found, expected)
    assert found.undefined == expected.undefined == 0
    assert set(found.symbols) == set(expected.symbols)


def option_source_of(folder: Path) -> OptionSource:
    source = option_source(scan_folder(folder), folder, SESSION, SPY)
    assert source is not None
    return source


def test_a_future_and_its_options_may_lie_in_one_file(tmp_path: Path) -> None:
    es, session = instrument("ES"), session_of("ES", KEY)
    apart, mixed = tmp_path / "apart", tmp_path / "mixed"
    write_full_market(apart, es, [session], 3, "small")
    mixed.mkdir()
    parts: dict[str, list[Path]] = {"trades": [], "definition": [], "cmbp-1": []}
    for path in sorted(apart.glob("*.dbn.zst")):
        parts.setdefault(read_header(path).schema, []).append(path)
    for path in (*parts["definition"], *parts["cmbp-1"]):
        (mixed / path.name).write_bytes(path.read_bytes())
    records = np.concatenate([read_records(p) for p in parts["trades"]])
    records = records[np.argsort(records["ts_recv"], kind="stable")]
    symbols = {k: v for p in parts["trades"] for k, v in names_of(p).items()}
    data = dbn_bytes(records, "trades", symbols, session.open_ns, session.close_ns, dataset=read_header(path).dataset)
    (mixed / "es-everything.trades.dbn.zst").write_bytes(data)
    sources = [option_source(scan_folder(f), f, session, es) for f in (apart, mixed)]
    one, other = (load_option_trades(s, session) for s in sources if s is not None)
    assert len(one) > 500
    assert one.undefined == other.undefined == 0
    assert_same_trades(one, other)
    registrations = [register_session(scan_folder(f), CALENDARS["ES"], es, KEY, None) for f in (apart, mixed)]
    assert registrations[0].contracts == registrations[1].contracts
    tapes = [load_tape(f, r, session=session) for f, r in zip((apart, mixed), registrations, strict=True)]
    assert np.array_equal(tapes[0].price_e9, tapes[1].price_e9)
    assert np.array_equal(tapes[0].ts_ns, tapes[1].ts_ns)


def test_two_files_may_share_options_without_sharing_the_tape(tmp_path: Path) -> None:
    """Options that lie in both do not make two tapes of different outrights one delivered twice."""
    es, session = instrument("ES"), session_of("ES", KEY)
    ts_ns = session.regular_open_ns + np.arange(4) * MINUTE_NS
    for name, front in (("a", {1: "ESH4"}), ("b", {2: "ESM4"})):
        (number,) = front
        records = trades(ts_ns, 5000 * 10**9, instrument_id=[number, 9, number, 9])
        data = dbn_bytes(records, "trades", {**front, 9: "ESH4 C5000"}, session.open_ns, session.close_ns)
        (tmp_path / f"{name}.dbn.zst").write_bytes(data)
    found = register_session(scan_folder(tmp_path), CALENDARS["ES"], es, KEY, None)
    assert {c.raw_symbol for c in found.contracts} == {"ESH4", "ESM4"}


def relabelled(source: Path, target: Path, dataset: str) -> None:
    """A copy of a DBN file with another dataset in its header."""
    raw = zstandard.ZstdDecompressor().stream_reader(source.read_bytes(), read_across_frames=True).read()
    target.write_bytes(raw[:8] + dataset.encode().ljust(16, b"\0") + raw[24:])


def test_a_book_of_two_datasets_is_refused_until_one_is_named(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    path = next(tmp_path.glob("*mbp-10*"))
    relabelled(path, tmp_path / "other.dbn", "ARCX.PILLAR")
    entries = scan_folder(tmp_path)
    with pytest.raises(MarketDataError, match=r"mbp-10 order book.*2 datasets.*other\.dbn \(ARCX\.PILLAR\)"):
        book_files(entries, SESSION, SPY)
    assert [e.name for e in book_files(entries, SESSION, SPY, "ARCX.PILLAR")] == ["other.dbn"]
    assert [e.name for e in book_files(entries, SESSION, SPY, read_header(path).dataset)] == [path.name]
    path.unlink()  # a book of another dataset than the tape's is one, where it is the only one
    assert [e.name for e in book_files(scan_folder(tmp_path), SESSION, SPY, "XNAS.ITCH")] == ["other.dbn"]


def test_options_of_two_datasets_are_refused_until_one_is_named(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    mine = option_source_of(tmp_path)
    for path in mine.files:
        relabelled(path, tmp_path / f"other-{path.name.removesuffix('.zst')}", "OPRA.PILLAR")
    entries = scan_folder(tmp_path)
    with pytest.raises(MarketDataError, match=r"the SPY option feed.*2 datasets: OPRA\.PILLAR.*other-spy-opt"):
        option_source(entries, tmp_path, SESSION, SPY)
    assert option_source(entries, tmp_path, SESSION, SPY, read_header(mine.trades[0]).dataset) == mine
    other = option_source(entries, tmp_path, SESSION, SPY, "OPRA.PILLAR")
    assert other is not None
    assert {p.name.startswith("other-") for p in other.files} == {True}
    assert_same_trades(load_option_trades(other, SESSION), load_option_trades(mine, SESSION))


def test_definitions_without_todays_expiry_leave_the_choice_to_spys(folder: Path, tmp_path: Path) -> None:
    es, session = instrument("ES"), session_of("ES", KEY)
    later = tmp_path / "later"
    tomorrow = session_of("ES", "2024-02-02")
    write_full_market(later, es, [tomorrow], 3, "small")
    target = copied(folder, tmp_path / "market")
    path = next(later.glob("*.definition.dbn.zst"))
    records = read_records(path, {"definition": (DEFINITION_DTYPES[3], 0x13)})
    dataset = read_header(path).dataset
    for name, content, schema in (
        ("d", records, "definition"),
        ("t", read_records(next(later.glob("*opt*.trades*"))), "trades"),
    ):
        # tomorrow's options are defined, and trade, today already
        data = dbn_bytes(content, schema, names_of(path), session.open_ns, session.close_ns, dataset=dataset)
        (target / f"aa-{name}.dbn.zst").write_bytes(data)
    source = option_source(scan_folder(target), target, session, es)
    assert source is not None
    assert source.root == "SPY"


def test_definitions_are_read_once_a_session(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = copied(folder, tmp_path / "market")
    read: list[str] = []

    def counted(path: Path, *layouts: object) -> np.ndarray:
        read.append(read_header(path).schema)
        return read_records(path, *layouts)  # type: ignore[arg-type]

    monkeypatch.setattr("spymaster_assets.market.options.read_records", counted)
    source = option_source(scan_folder(target), target, SESSION, instrument("ES"))
    assert source is not None
    load_option_trades(source, SESSION)
    load_open_interest(source, SESSION)
    assert read.count("definition") == 1


def split_definitions(folder: Path) -> list[Path]:
    """Puts the definition file of `folder` in two, each with every second option, and both with the first."""
    path = next(folder.glob("*.definition.dbn.zst"))
    records, names, dataset = definitions_of(path), names_of(path), read_header(path).dataset
    made = []
    for half in (0, 1):
        keep = np.arange(len(records)) % 2 == half
        keep[0] = True
        data = dbn_bytes(records[keep], "definition", names, SESSION.open_ns, SESSION.close_ns, dataset=dataset)
        made.append(folder / f"half{half}.dbn.zst")
        made[-1].write_bytes(data)
    path.unlink()
    return made


def definitions_of(path: Path) -> np.ndarray:
    """Records in the vendor's own layout, so that they can be written again whole."""
    native = np.dtype(databento_dbn.InstrumentDefMsg._dtypes)
    return read_records(path, {"definition": (native, 0x13)}).astype(native)


def test_options_of_all_definition_files_are_one_feed(folder: Path, tmp_path: Path) -> None:
    whole = option_source(scan_folder(folder), folder, SESSION, SPY)
    copied(folder, tmp_path)
    halves = split_definitions(tmp_path)
    found = option_source(scan_folder(tmp_path), tmp_path, SESSION, SPY)
    assert whole is not None
    assert found is not None
    assert set(found.definitions) == set(halves) <= set(found.files)
    one, other = load_option_trades(whole, SESSION), load_option_trades(found, SESSION)
    assert len(one) > 1000
    assert_same_trades(one, other)
    assert other.undefined == 0


def test_definition_files_that_contradict_each_other_are_refused(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    second = split_definitions(tmp_path)[1]
    records, names = definitions_of(second), names_of(second)
    records["strike_price"][0] += 10**9
    data = dbn_bytes(
        records, "definition", names, SESSION.open_ns, SESSION.close_ns, dataset=read_header(second).dataset
    )
    second.write_bytes(data)
    with pytest.raises(MarketDataError, match=r"has another strike_e9 in one definition file") as refused:
        option_source(scan_folder(tmp_path), tmp_path, SESSION, SPY)
    assert "half0" in str(refused.value)
    assert "half1" in str(refused.value)


def statistics(rows: list[tuple[int, int, int]]) -> np.ndarray:
    """Open interest as published: (receive time, instrument id, contracts)."""
    native = np.dtype(databento_dbn.StatMsg._dtypes)
    records = np.zeros(len(rows), native)
    records["length"], records["rtype"], records["update_action"], records["stat_type"] = (
        native.itemsize // 4,
        0x18,
        1,
        9,
    )
    for n, (ts_ns, number, contracts) in enumerate(rows):
        records["ts_recv"][n], records["instrument_id"][n], records["quantity"][n] = ts_ns, number, contracts
    return records


def test_open_interest_of_all_statistics_files_counts_the_last_published(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    path = next(tmp_path.glob("*.definition.dbn.zst"))
    chain = read_definitions(path, "SPY")
    a, b, c = chain.instrument_id[:3].tolist()
    at, names, dataset = SESSION.open_ns, names_of(path), read_header(path).dataset
    late = SESSION.regular_open_ns
    for name, rows in (
        ("y", [(at + 1, a, 10), (at + 3, b, 20)]),
        ("z", [(at + 2, b, 21), (at + 4, c, 30), (late, a, 99)]),
    ):
        data = dbn_bytes(statistics(rows), "statistics", names, SESSION.open_ns, SESSION.close_ns, dataset=dataset)
        (tmp_path / f"{name}.dbn.zst").write_bytes(data)
    source = option_source(scan_folder(tmp_path), tmp_path, SESSION, SPY)
    assert source is not None
    found = load_open_interest(source, SESSION)
    assert found is not None
    assert found.contracts.tolist() == [10, 20, 30]
    assert found.strike_e9.tolist() == chain.strike_e9[:3].tolist()


def copied(folder: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def names_of(path: Path) -> dict[int, str]:
    return {s.instrument_id: s.raw_symbol for s in read_header(path).symbols}


def assert_same_trades(one: OptionTrades, other: OptionTrades) -> None:
    named = [np.array(t.symbols)[t.contract] for t in (one, other)]
    assert np.array_equal(*named)
    for column in ("ts_ns", "strike_e9", "is_call", "price_e9", "size", "bid_e9", "ask_e9", "side"):
        assert np.array_equal(getattr(one, column), getattr(other, column)), column


def test_a_damaged_book_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[:-2000] if "mbp-10" in path.name else data)
    files = book_files(scan_folder(tmp_path), SESSION, SPY)
    with pytest.raises(MarketDataError, match="mbp-10"):
        load_book(files, SESSION, 1, BookSettings())


def test_a_stored_book_comes_back_whole(folder: Path) -> None:
    book = load_book(book_files(scan_folder(folder), SESSION, SPY), SESSION, 1, BookSettings())
    data = book_to_parquet(book)
    again = book_from_parquet(data)
    for name in ("ts_ns", "bid_px_e9", "bid_sz", "ask_px_e9", "ask_sz"):
        assert np.array_equal(getattr(again, name), getattr(book, name)), name
    assert (again.counts, again.bucket_ns) == (book.counts, book.bucket_ns)
    assert book_to_parquet(again) == data
    assert pl.read_parquet(data)["bid_px_e9_09"].null_count() == int((book.bid_px_e9[:, 9] == UNDEFINED_PRICE).sum())


def test_missing_minutes_are_counted_not_filled() -> None:
    opens = SESSION.regular_open_ns
    share, missing = minute_coverage(np.array([opens, opens + 2 * MINUTE_NS, SESSION.regular_close_ns]), SESSION)
    assert share == pytest.approx(2 / 390, abs=1e-6)
    assert missing[:2] == [opens + MINUTE_NS, opens + 3 * MINUTE_NS]
    assert len(missing) == 388


class TestBasis:
    ES = instrument("ES")

    @staticmethod
    def minutes(closes: dict[int, float]) -> pl.DataFrame:
        return pl.DataFrame(
            {"end_ns": [m * MINUTE_NS for m in closes], "close_e9": [round(c * 1e9) for c in closes.values()]}
        )

    def test_ratio_is_known_at_the_minutes_end_and_not_before(self) -> None:
        basis = measured_basis(
            self.ES,
            self.minutes({1: 5000.0, 2: 5010.0, 20: 5020.0}),
            self.minutes({1: 499.0, 2: 500.0}),
            30 * MINUTE_NS,
        )
        assert basis.source == "measured"
        at = np.array([0, MINUTE_NS - 1, MINUTE_NS, 2 * MINUTE_NS, 25 * MINUTE_NS])
        # before the first minute the fixed ratio; minute 20 has no SPY price near it, so the last measured ratio stays
        assert basis.at(at).tolist() == pytest.approx([10.0, 10.0, 5000 / 499, 10.02, 10.02])

    def test_what_comes_later_is_not_read(self) -> None:
        own, other = self.minutes({1: 5000.0, 2: 6000.0}), self.minutes({1: 500.0, 2: 500.0})
        assert measured_basis(self.ES, own, other, MINUTE_NS).ratio.tolist() == [10.0]

    def test_without_the_other_feed_it_says_fallback(self) -> None:
        basis = measured_basis(self.ES, self.minutes({1: 5000.0}), None, MINUTE_NS)
        assert basis.source == "fallback"
        assert basis.to_strike_e9(np.array([5003 * 10**9]), np.array([0])).tolist() == [500_300_000_000]

    def test_identity_changes_nothing(self) -> None:
        prices = np.array([5003 * 10**9 + 1])
        assert identity_basis().to_strike_e9(prices, np.array([0])) is prices
        assert option_roots(SPY) == ("SPY",)
        assert option_roots(self.ES) == ("ES", "SPY")


def test_a_basis_without_a_common_minute_is_the_fallback() -> None:
    own = pl.DataFrame({"end_ns": [MINUTE_NS], "close_e9": [5000 * 10**9]})
    other = pl.DataFrame({"end_ns": [90 * MINUTE_NS], "close_e9": [500 * 10**9]})
    assert measured_basis(instrument("ES"), own, other, 100 * MINUTE_NS).source == "fallback"
