"""Optional feeds: which files bring them, what is said when they are late, broken or missing, and the basis between two markets."""

from __future__ import annotations

import gzip
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from spymaster_assets.errors import MarketDataError
from spymaster_assets.market.basis import identity_basis, measured_basis, option_roots
from spymaster_assets.market.book import book_from_parquet, book_to_parquet
from spymaster_assets.market.dbn import UNDEFINED_PRICE
from spymaster_assets.market.feeds import (
    book_files,
    load_book,
    load_open_interest,
    load_option_trades,
    minute_coverage,
    observed_until_ns,
    option_source,
)
from spymaster_assets.market.files import register_session, scan_folder
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.simulate import write_market
from spymaster_assets.market.simulate_book import write_full_market
from spymaster_assets.settings import MINUTE_NS, BookSettings
from spymaster_assets_tests.builders import CALENDARS, session_of

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
    assert source.quotes is not None
    assert "cmbp-1" in source.quotes.name
    assert load_open_interest(source, SESSION) is None
    trades = load_option_trades(source, SESSION)
    assert len(trades) > 1000
    assert set(trades.expiry.tolist()) == {date.fromisoformat(KEY).toordinal()}
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
    trades = load_option_trades(source, SESSION)
    assert (trades.strike_e9.tolist(), trades.size.tolist()) == (
        [500 * 10**9],
        [2],
    )  # today's expiry and the exact root alone


def test_two_files_of_option_trades_are_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    again = next(tmp_path.glob("spy-opt-*.trades.dbn.zst"))
    (tmp_path / f"copy-{again.name}").write_bytes(again.read_bytes())
    with pytest.raises(MarketDataError, match="two files bring the option trades"):
        option_source(scan_folder(tmp_path), tmp_path, SESSION, SPY)


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


def test_an_option_feed_that_stops_ends_there(folder: Path) -> None:
    source = option_source(scan_folder(folder), folder, SESSION, SPY)
    assert source is not None
    trades = load_option_trades(source, SESSION)
    assert observed_until_ns(source, trades, SESSION) == source.until_ns
    half = trades.take(trades.ts_ns < SESSION.regular_open_ns + 60 * MINUTE_NS)
    assert observed_until_ns(source, half, SESSION) == int(half.ts_ns[-1]) + 1
    assert observed_until_ns(source, trades.take(trades.ts_ns < 0), SESSION) == source.from_ns


def test_a_basis_without_a_common_minute_is_the_fallback() -> None:
    own = pl.DataFrame({"end_ns": [MINUTE_NS], "close_e9": [5000 * 10**9]})
    other = pl.DataFrame({"end_ns": [90 * MINUTE_NS], "close_e9": [500 * 10**9]})
    assert measured_basis(instrument("ES"), own, other, 100 * MINUTE_NS).source == "fallback"
