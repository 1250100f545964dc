"""Option feeds: DBN definitions of all versions, quotes strictly before a trade, and flat files parsed without mercy."""

from __future__ import annotations

import gzip
from datetime import date
from pathlib import Path

import databento_dbn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spymaster_assets.errors import MarketDataError
from spymaster_assets.market.dbn import UNDEFINED_PRICE
from spymaster_assets.market.options import (
    DEFINITION_DTYPES,
    QUOTE_DTYPE,
    option_trades_from_csv,
    option_trades_from_dbn,
    quotes_before,
    read_definitions,
)
from spymaster_assets_tests.builders import dbn_bytes, trades

DAY = date(2025, 12, 19)
MIDNIGHT_NS = 1_766_102_400 * 10**9
OPEN_NS = 1_766_154_600 * 10**9
HEADER = "ticker,conditions,correction,exchange,price,sip_timestamp,size,sequence_number"


def native(version: int) -> np.dtype:
    message = {1: "InstrumentDefMsgV1", 2: "InstrumentDefMsgV2", 3: "InstrumentDefMsg"}[version]
    return np.dtype(getattr(databento_dbn, message)._dtypes)


def definitions(
    path: Path, rows: list[tuple[int, str, str, str, float]], version: int = 3, expiry_ns=MIDNIGHT_NS
) -> Path:  # type: ignore[no-untyped-def]
    """A definition file of (id, raw symbol, underlying, class, strike) in the vendor's own layout."""
    records = np.zeros(len(rows), native(version))
    records["length"], records["rtype"] = records.dtype.itemsize // 4, 0x13
    records["ts_recv"] = records["ts_event"] = OPEN_NS
    records["expiration"] = expiry_ns
    for n, (number, symbol, underlying, kind, strike) in enumerate(rows):
        records["instrument_id"][n], records["raw_symbol"][n] = number, symbol.encode()
        records["underlying"][n], records["instrument_class"][n] = underlying.encode(), kind.encode()
        records["strike_price"][n] = UNDEFINED_PRICE if np.isnan(strike) else round(strike * 1e9)
    path.write_bytes(dbn_bytes(records, "definition", version=version, dataset="OPRA.PILLAR"))
    return path


CHAIN = [
    (7, "SPY   251219C00680500", "SPY", "C", 680.5),
    (9, "SPY1  251219C00680500", "SPY", "C", 680.5),
    (3, "SPY   251219P00675000", "SPY", "P", 675.0),
    (4, "SPYG  251219P00050000", "SPYG", "P", 50.0),
    (5, "SPY", "", "K", float("nan")),
]


def option_prints(path: Path, ids: list[int], symbols: dict[int, str] | None = None) -> Path:
    n = len(ids)
    records = trades(OPEN_NS + np.arange(n) * 10**6, (1 + np.arange(n)) * 10**7, size=2, instrument_id=ids)
    path.write_bytes(dbn_bytes(records, symbols=symbols, dataset="OPRA.PILLAR"))
    return path


class TestLayouts:
    @pytest.mark.parametrize("version", [1, 2, 3])
    def test_definitions_agree_with_the_vendor(self, version: int) -> None:
        theirs, mine = native(version), DEFINITION_DTYPES[version]
        assert mine.itemsize == theirs.itemsize
        for name in mine.names or ():
            assert mine.fields[name] == theirs.fields[name], name  # type: ignore[index]

    @pytest.mark.parametrize("message", ["MBP1Msg", "CMBP1Msg", "CBBOMsg"])
    def test_quotes_agree_with_the_vendor(self, message: str) -> None:
        theirs = np.dtype(getattr(databento_dbn, message)._dtypes)
        assert QUOTE_DTYPE.itemsize == theirs.itemsize
        for name in QUOTE_DTYPE.names or ():
            assert QUOTE_DTYPE.fields[name] == theirs.fields[name], name  # type: ignore[index]


class TestDbn:
    @pytest.mark.parametrize("version", [1, 2, 3])
    def test_trades_meet_their_definitions(self, tmp_path: Path, version: int) -> None:
        chain = definitions(tmp_path / "d.dbn", CHAIN, version)
        found = option_trades_from_dbn(option_prints(tmp_path / "t.dbn", [7, 4, 3, 7, 9, 5]), chain, "SPY")
        assert found.symbols == ("SPY   251219P00675000", "SPY   251219C00680500")
        assert found.contract.tolist() == [1, 0, 1]
        assert found.strike_e9.tolist() == [680_500_000_000, 675_000_000_000, 680_500_000_000]
        assert found.is_call.tolist() == [True, False, True]
        assert set(found.expiry.tolist()) == {DAY.toordinal()}
        assert found.price_e9.tolist() == [10**7, 3 * 10**7, 4 * 10**7]
        assert (found.ts_ns - OPEN_NS).tolist() == [0, 2 * 10**6, 3 * 10**6]
        assert found.size.tolist() == [2, 2, 2]
        assert found.side.tolist() == [0, 0, 0]
        assert set(found.bid_e9.tolist()) == {UNDEFINED_PRICE}

    def test_one_expiry(self, tmp_path: Path) -> None:
        expiry = MIDNIGHT_NS + np.array([0, 0, 86_400 * 10**9, 0, 0])
        chain = definitions(tmp_path / "d.dbn", CHAIN, expiry_ns=expiry)
        found = option_trades_from_dbn(option_prints(tmp_path / "t.dbn", [7, 3]), chain, "SPY", expiry=DAY)
        assert found.is_call.tolist() == [True]
        assert len(found.take(found.is_call)) == 1

    def test_what_is_not_defined_is_left_out_and_counted(self, tmp_path: Path) -> None:
        names = {7: "SPY   251219C00680500", 8: "SPY   251219C00690000", 11: "ESZ5", 12: "ESZ5-ESH6"}
        path = option_prints(tmp_path / "t.dbn", [7, 8, 11, 12, 13], names)
        found = option_trades_from_dbn(path, definitions(tmp_path / "d.dbn", CHAIN), "SPY")
        assert found.price_e9.tolist() == [10**7]
        # an option without a definition and an id that nobody names; a future and a spread are none
        assert found.undefined == 2

    def test_what_was_received_at_another_time_is_neither_taken_nor_counted(self, tmp_path: Path) -> None:
        path = option_prints(tmp_path / "t.dbn", [8, 7, 13, 3])
        ms = 10**6
        chain = definitions(tmp_path / "d.dbn", CHAIN)
        found = option_trades_from_dbn(path, chain, "SPY", received_ns=(OPEN_NS + ms, OPEN_NS + 3 * ms))
        assert (found.ts_ns - OPEN_NS).tolist() == [ms]
        assert found.undefined == 1  # id 13, and not id 8
        assert found.symbols == ("SPY   251219C00680500",)

    def test_an_id_with_two_meanings_is_refused(self, tmp_path: Path) -> None:
        again = definitions(tmp_path / "d.dbn", [*CHAIN, CHAIN[0]])
        assert read_definitions(again, "SPY").wanted.tolist() == [True, False, False, True, False]
        other = definitions(tmp_path / "e.dbn", [*CHAIN, (7, "SPY   251219C00681000", "SPY", "C", 681.0)])
        with pytest.raises(MarketDataError, match="instrument id 7 has two values of strike_price"):
            read_definitions(other, "SPY")

    def test_an_option_without_strike_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(MarketDataError, match="option 6 has no strike"):
            read_definitions(definitions(tmp_path / "d.dbn", [(6, "X", "SPY", "P", float("nan"))]), "SPY")

    def test_another_schema_is_refused(self, tmp_path: Path) -> None:
        chain = definitions(tmp_path / "d.dbn", CHAIN)
        with pytest.raises(MarketDataError, match="schema 'definition' is not read here"):
            option_trades_from_dbn(chain, chain, "SPY")

    def test_the_vendors_sample(self, real_data: Path) -> None:
        stem = real_data / "dbn-schemas" / "py-OPRA.PILLAR__test_data"

        def read(schema: str, quotes: str | None = None):  # type: ignore[no-untyped-def]
            return option_trades_from_dbn(
                Path(f"{stem}.{schema}.dbn.zst"),
                Path(f"{stem}.definition.dbn.zst"),
                "AAPL",
                expiry=date(2025, 2, 21),
                quotes_paths=[Path(f"{stem}.{quotes}.dbn.zst")] if quotes else [],
            )

        plain, quoted, joined = read("trades"), read("tbbo"), read("trades", "cbbo-1s")
        assert plain.symbols == ("AAPL  250221C00250000",)
        assert plain.strike_e9.tolist() == [250 * 10**9] * 4
        assert np.array_equal(plain.ts_ns, quoted.ts_ns)
        assert np.array_equal(plain.price_e9, quoted.price_e9)
        assert (quoted.bid_e9[:2] // 10**7).tolist() == [24, 18]
        assert (quoted.ask_e9[:2] // 10**7).tolist() == [25, 22]
        # the first trade comes before the first one-second quote with a price, the second has that of 14:30:01
        assert joined.bid_e9.tolist() == [UNDEFINED_PRICE, *[10**8] * 3]
        assert joined.ask_e9.tolist() == [UNDEFINED_PRICE, *[25 * 10**7] * 3]
        # the sample's mbp-1 is of other venues before the open: no quote of the trade's own venue
        assert set(read("trades", "mbp-1").bid_e9.tolist()) == {UNDEFINED_PRICE}


EVENTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), max_size=25).map(sorted)


@given(trades=EVENTS, quotes=EVENTS)
@settings(deadline=None, max_examples=60)
def test_quotes_are_the_last_strictly_before(trades: list[tuple[int, int]], quotes: list[tuple[int, int]]) -> None:
    def columns(events: list[tuple[int, int]]) -> list[np.ndarray]:
        return [np.array([e[k] for e in events], np.int64) for k in (0, 1)]

    number = np.arange(len(quotes), dtype=np.int64)
    bid, ask = quotes_before(*columns(trades), *columns(quotes), number, number + 100)
    for n, (ts, contract) in enumerate(trades):
        before = [q for q, (quote_ts, of) in enumerate(quotes) if of == contract and quote_ts < ts]
        assert bid[n] == (before[-1] if before else UNDEFINED_PRICE)
        assert ask[n] == (before[-1] + 100 if before else UNDEFINED_PRICE)


class TestCsv:
    GOOD = (
        f"O:SPY251219C00680500,209,0,302,1.25,{OPEN_NS + 5},3,9",
        f"O:SPY251219P00675000,,0,302,0.01,{OPEN_NS + 5},1,8",
        f"O:SPY251222C00680500,209,0,302,2.345,{OPEN_NS},7,1",
        f"O:SPYG251219C00050000,209,0,302,not a price,{OPEN_NS},3,7",
        f"O:SPY1251219C00680500,209,0,302,1.00,{OPEN_NS},3,7",
        "O:AAPL251219C00250000,,,,,,,",
    )

    def file(self, folder: Path, *rows: str, header: str = HEADER) -> Path:
        path = folder / "2025-12-19.csv.gz"
        path.write_bytes(gzip.compress("\n".join([header, *rows, ""]).encode()))
        return path

    def test_columns_in_receive_order_of_exactly_one_root(self, tmp_path: Path) -> None:
        found = option_trades_from_csv(self.file(tmp_path, *self.GOOD))
        assert [found.symbols[c] for c in found.contract] == [
            "O:SPY251222C00680500",
            "O:SPY251219P00675000",
            "O:SPY251219C00680500",
        ]
        assert found.strike_e9.tolist() == [680_500_000_000, 675_000_000_000, 680_500_000_000]
        assert found.price_e9.tolist() == [2_345_000_000, 10_000_000, 1_250_000_000]
        assert found.size.tolist() == [7, 1, 3]
        assert found.expiry.tolist() == [date(2025, 12, 22).toordinal(), DAY.toordinal(), DAY.toordinal()]
        assert len(option_trades_from_csv(self.file(tmp_path, *self.GOOD), expiry=DAY)) == 2
        assert option_trades_from_csv(self.file(tmp_path, *self.GOOD[3:])).symbols == ()

    def test_plain_text_is_the_same(self, tmp_path: Path) -> None:
        path = tmp_path / "x.csv"
        path.write_text("\n".join([HEADER, *self.GOOD]))
        assert len(option_trades_from_csv(path)) == 3

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            (f"O:SPY251219X00680500,,,,1.0,{OPEN_NS},1,1", "a ticker that is no option's"),
            (f"O:SPY251219C0068050,,,,1.0,{OPEN_NS},1,1", "a ticker that is no option's"),
            (f",,,,1.0,{OPEN_NS},1,1", "a missing ticker"),
            (f"O:SPY251399C00680500,,,,1.0,{OPEN_NS},1,1", "an impossible expiry date"),
            (f"O:SPY251219C00000000,,,,1.0,{OPEN_NS},1,1", "a strike of zero"),
            (f"O:SPY251219C00680500,,,,abc,{OPEN_NS},1,1", "a price that is no positive number"),
            (f"O:SPY251219C00680500,,,,nan,{OPEN_NS},1,1", "a price that is no positive number"),
            (f"O:SPY251219C00680500,,,,-1,{OPEN_NS},1,1", "a price that is no positive number"),
            (f"O:SPY251219C00680500,,,,1.0,{OPEN_NS},0,1", "a size that is no positive integer"),
            (f"O:SPY251219C00680500,,,,1.0,{OPEN_NS},1.5,1", "a size that is no positive integer"),
            (f"O:SPY251219C00680500,,,,1.0,{OPEN_NS // 1000},1,1", "a sip_timestamp that is not in nanoseconds"),
            (f"O:SPY251219C00680500,,,,1.0,{OPEN_NS},1,", "a sequence_number that is no integer"),
            (f"O:SPY251219C00680500,209,237,0,302,1.0,{OPEN_NS},1,1", "a sip_timestamp that is not in nanoseconds"),
            ("O:SPY251219C00680500,,,,1.0", "a size that is no positive integer"),
        ],
    )
    def test_a_malformed_row_is_named(self, tmp_path: Path, row: str, reason: str) -> None:
        path = self.file(tmp_path, *self.GOOD[:2], row)
        with pytest.raises(MarketDataError, match=f"{reason}.*1 malformed rows.*{path.name}, row 4.*remedy"):
            option_trades_from_csv(path)

    def test_a_missing_column_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(MarketDataError, match="the header lacks sequence_number"):
            option_trades_from_csv(self.file(tmp_path, header=HEADER.removesuffix(",sequence_number")))

    @pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone"])
    def test_a_damaged_file_is_one_typed_error(self, tmp_path: Path, damage: str) -> None:
        path = self.file(tmp_path, *(self.GOOD * 400))
        data = path.read_bytes()
        if damage == "cut":
            path.write_bytes(data[: len(data) // 2])
        elif damage == "flip":
            path.write_bytes(data[:40] + bytes([data[40] ^ 0xFF]) + data[41:])
        elif damage == "empty":
            path.write_bytes(b"")
        else:
            path.unlink()
        with pytest.raises(MarketDataError, match=path.name):
            option_trades_from_csv(path)
