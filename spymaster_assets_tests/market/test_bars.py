"""Bars of all timeframes against a brute-force twin and the real tape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spymaster_assets.errors import MarketDataError
from spymaster_assets.market.bars import BAR_SCHEMA, session_bars
from spymaster_assets.market.contracts import ContractVolume, Front
from spymaster_assets.market.files import SessionFiles
from spymaster_assets.settings import MINUTE_NS, TIMEFRAMES_MIN
from spymaster_assets_tests.builders import build_folder, ohlcv, session_of, trades

S = session_of("SPY", "2024-03-12")


def registration(schema: str = "trades", ids: tuple[int, ...] = (1,)) -> SessionFiles:
    contracts = tuple(ContractVolume(i, f"C{i}", 1, 1, 1, first_ns=0) for i in ids)
    return SessionFiles(
        "2024-03-12",
        "SPY",
        schema,
        False,
        (),
        0,
        0,
        None,
        S.close_ns,
        1.0,
        1.0,
        (),
        contracts,
        Front(ids[0], f"C{ids[0]}", 1.0, "x"),
    )


def brute(rows: list[tuple[int, int, int, str]], timeframe: int) -> list[tuple]:
    slots: dict[int, list[tuple[int, int, int, str]]] = {}
    for row in rows:
        slots.setdefault((row[0] - S.open_ns) // (timeframe * MINUTE_NS), []).append(row)
    out = []
    for slot, inside in sorted(slots.items()):
        prices, volume = [r[1] for r in inside], sum(r[2] for r in inside)
        buys, sells = (sum(r[2] for r in inside if r[3] == side) for side in "BA")
        start = S.open_ns + slot * timeframe * MINUTE_NS
        out.append((start, prices[0], max(prices), min(prices), prices[-1], volume, len(inside), buys, sells,
                    sum(r[1] * r[2] for r in inside) / volume / 1e9))  # fmt: skip
    return out


row = st.tuples(
    st.integers(0, 4 * 3600 * 10**9),
    st.integers(49_900, 50_100).map(lambda c: c * 10_000_000),
    st.integers(1, 900),
    st.sampled_from("ABN"),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(row, min_size=1, max_size=60))
def test_bars_equal_a_brute_force_twin(rows: list[tuple[int, int, int, str]]) -> None:
    rows = sorted(((S.open_ns + t, p, q, s) for t, p, q, s in rows), key=lambda r: r[0])
    records = trades([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], [r[3] for r in rows])
    bars = session_bars(records, S, registration())
    for timeframe in TIMEFRAMES_MIN:
        found = bars.filter(pl.col("timeframe_min") == timeframe)
        expected, sided = brute(rows, timeframe), False
        columns = [
            "start_ns",
            "open_e9",
            "high_e9",
            "low_e9",
            "close_e9",
            "volume",
            "trade_count",
            "buy_volume",
            "sell_volume",
            "vwap",
        ]
        for one, other in zip(found.select(columns).rows(), expected, strict=True):
            assert one[:7] == other[:7]
            sided = sided or other[7] + other[8] > 0  # known from the first bar on that has a side
            assert one[7:9] == (other[7:9] if sided else (None, None))
            assert one[9] == pytest.approx(other[9], rel=1e-12)
    assert dict(bars.schema) == BAR_SCHEMA


def test_one_minute_input_gives_the_same_coarse_bars_as_its_trades() -> None:
    rng = np.random.default_rng(1)
    times = np.sort(rng.integers(S.open_ns, S.close_ns, 5000))
    tape = trades(times, 500_000_000_000 + rng.integers(-200, 200, 5000) * 10_000_000)
    fine = session_bars(tape, S, registration())
    minute = fine.filter(pl.col("timeframe_min") == 1)
    prices = minute.select("open_e9", "high_e9", "low_e9", "close_e9").rows()
    coarse = session_bars(
        ohlcv(minute["start_ns"].to_list(), prices, minute["volume"].to_list()), S, registration("ohlcv-1m")
    )
    same = ["timeframe_min", "start_ns", "end_ns", "open_e9", "high_e9", "low_e9", "close_e9", "volume"]
    assert fine.select(same).equals(coarse.select(same))
    assert coarse["trade_count"].null_count() == coarse.height
    assert coarse["buy_volume"].null_count() == coarse.height


@pytest.mark.parametrize("ts_ns", [S.open_ns - 1, S.close_ns])
@pytest.mark.parametrize("schema", ["trades", "ohlcv-1m"])
def test_records_outside_the_session_are_refused(ts_ns: int, schema: str) -> None:
    records = trades([ts_ns], [10]) if schema == "trades" else ohlcv([ts_ns], [(10, 10, 10, 10)], [1])
    with pytest.raises(MarketDataError, match="not all of session 2024-03-12"):
        session_bars(records, S, registration(schema))


def test_contracts_are_kept_apart() -> None:
    times = [S.open_ns + n * 10**9 for n in range(4)]
    bars = session_bars(trades(times, [10, 90, 11, 91], instrument_id=[5, 6, 5, 6]), S, registration(ids=(5, 6)))
    one = bars.filter(pl.col("timeframe_min") == 1)
    assert one.select("instrument_id", "open_e9", "close_e9", "is_front").rows() == [
        (5, 10, 11, True),
        (6, 90, 91, False),
    ]


def test_real_tape_and_bars_share_their_extremes(real_data: Path) -> None:
    from spymaster_assets.market.tape import load_tape

    for built in build_folder(real_data / "spy-trades", "SPY", "2013-10-07", "2013-10-11"):
        tape = load_tape(real_data / "spy-trades", built.registration, session=built.session)
        for timeframe in TIMEFRAMES_MIN:
            front = built.bars.front(timeframe)
            assert front["high_e9"].max() == tape.price_e9.max()
            assert front["low_e9"].min() == tape.price_e9.min()
            assert front["volume"].sum() == tape.size.sum()
        regular = built.bars.front(1).filter(
            pl.col("start_ns").is_between(built.session.regular_open_ns, built.session.regular_close_ns - 1)
        )
        assert regular.height == 390


def test_no_spread_price_among_real_futures_bars(real_data: Path) -> None:
    for built in build_folder(real_data / "mym-ohlcv-1m", "MYM", "2025-06-12", "2025-06-20"):
        assert built.bars.bars["low_e9"].min() > 40_000 * 10**9
        assert built.bars.bars["high_e9"].max() < 45_000 * 10**9
