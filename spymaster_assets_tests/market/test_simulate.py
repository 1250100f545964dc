"""The trades-only simulator: same seed, same bytes; files that Databento reads; a planted rule that the tape and the table show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import databento
import numpy as np
import polars as pl
import pytest

from spymaster_assets.errors import ConfigError, MarketDataError
from spymaster_assets.market import simulate
from spymaster_assets.market.dbn import read_header, read_records
from spymaster_assets.market.files import SIMULATED_MARK
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.simulate import DATASET, KINDS, TRUTH, LevelRule, read_mark, simulate_session, write_market
from spymaster_assets.settings import NS
from spymaster_assets_tests.builders import CALENDARS, dbn_bytes, session_of, trades

SPY = instrument("SPY")
KEYS = CALENDARS["SPY"].sessions("2024-02-01", "2024-02-02")
RULE = LevelRule(trades_per_session=4000)


def write(folder: Path, seed: int = 7, symbol: str = "SPY", keys: list[str] = KEYS) -> list[Path]:
    return write_market(folder, instrument(symbol), [session_of(symbol, k) for k in keys], seed=seed, rule=RULE)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write(tmp_path / name, seed)
    a, b, c = (content(tmp_path / n) for n in "abc")
    assert a == b
    assert list(a) == list(c) == ["SIMULATED.json", "spy-20240201.trades.dbn.zst", "spy-20240202.trades.dbn.zst", TRUTH]
    assert all(a[name] != c[name] for name in a)


@pytest.mark.parametrize("symbol", ["SPY", "ES"])
def test_databento_reads_what_was_simulated(tmp_path: Path, symbol: str) -> None:
    profile = instrument(symbol)
    paths = write(tmp_path, symbol=symbol)
    start = 500 * profile.spy_dollar_e9
    made = simulate_session(session_of(symbol, KEYS[0]), profile, 7, start, RULE)
    store = databento.DBNStore.from_file(paths[0])
    assert (store.dataset, str(store.schema), store.symbols) == (
        DATASET,
        "trades",
        ["ESZ9" if symbol == "ES" else "SPY"],
    )
    found = store.to_ndarray()
    assert np.array_equal(read_records(paths[0]), made.records)
    for name in made.records.dtype.names or ():
        assert np.array_equal(found[name], made.records[name]), name
    header = read_header(paths[0])
    session = session_of(symbol, KEYS[0])
    assert (header.start_ns, header.end_ns) == (session.open_ns, session.close_ns)
    assert header.symbols[0].instrument_id == 1


@pytest.mark.parametrize(
    ("symbol", "key"), [("SPY", "2024-02-01"), ("SPY", "2024-07-03"), ("ES", "2024-11-29"), ("MYM", "2024-02-01")]
)
def test_every_trade_is_on_the_grid_and_in_the_session(symbol: str, key: str) -> None:
    profile, session = instrument(symbol), session_of(symbol, key)
    made = simulate_session(session, profile, 1, 500 * profile.spy_dollar_e9, RULE)
    records = made.records
    received, happened = (records[n].astype(np.int64) for n in ("ts_recv", "ts_event"))
    assert (records["price"] % profile.tick_e9 == 0).all()
    assert (records["price"] > 0).all()
    assert (np.diff(received) >= 0).all()
    assert (happened >= session.open_ns).all()
    assert (received < session.close_ns).all()
    assert (np.diff(records["sequence"].astype(np.int64)) == 1).all()
    assert (records["size"] % (1 if profile.is_future else 100) == 0).all()
    assert set(np.unique(records["side"])) == {b"A", b"B"}
    assert made.last_e9 == records["price"][-1]
    regular = (received >= session.regular_open_ns) & (received < session.regular_close_ns)
    assert len(np.unique((received[regular] - session.regular_open_ns) // (60 * NS))) == session.regular_minutes


def test_half_day_has_no_contact_after_its_close() -> None:
    session = session_of("SPY", "2024-07-03")
    times = simulate_session(session, SPY, 1, 500 * NS, RULE).truth["ts_ns"].to_numpy()
    assert session.regular_minutes == 210
    assert len(times) > 3
    assert session.regular_open_ns <= times.min() <= times.max() < session.regular_close_ns


def test_a_session_continues_near_the_last_price(tmp_path: Path) -> None:
    first, second = (read_records(p) for p in write(tmp_path))
    assert abs(second["price"][0] / first["price"][-1] - 1) < 0.02


@pytest.fixture(scope="module")
def many() -> list[simulate.SimulatedSession]:
    keys = CALENDARS["SPY"].sessions("2024-01-02", "2024-06-28")
    return [simulate_session(session_of("SPY", k), SPY, 11, 500 * NS, RULE) for k in keys]


def test_truth_follows_the_stated_formula(many: list[simulate.SimulatedSession]) -> None:
    truth = pl.concat([m.truth for m in many])
    base = np.array([RULE.kind[KINDS.index(k)] for k in truth["level_kind_name"]])
    earlier = np.minimum(truth["earlier_touches"].to_numpy(), 3)
    logit = base + RULE.speed * (truth["approach_z"].to_numpy() - 1.2) + RULE.touch * earlier
    assert np.allclose(truth["p_break"], 1 / (1 + np.exp(-logit)), atol=1e-12)
    assert set(truth["direction_sign"]) == {-1, 1}
    assert set(truth["level_kind_name"]) <= set(KINDS)


def test_outcomes_follow_their_probabilities(many: list[simulate.SimulatedSession]) -> None:
    truth = pl.concat([m.truth for m in many])
    p, breaks = truth["p_break"].to_numpy(), truth["breaks"].to_numpy()
    assert len(p) > 1500
    shares = []
    for low, high in ((0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1)):
        chosen = (p >= low) & (p < high)
        deviation = breaks[chosen].mean() - p[chosen].mean()
        assert abs(deviation) < 4 * np.sqrt((p * (1 - p))[chosen].mean() / chosen.sum()), (low, chosen.sum())
        shares.append(breaks[chosen].mean())
    assert shares == sorted(shares)


def test_the_tape_and_the_price_lean_to_the_drawn_side(many: list[simulate.SimulatedSession]) -> None:
    buys = total = early_buys = early_total = 0
    moves = []
    for made in many:
        times, price = made.records["ts_event"].astype(np.int64), made.records["price"]
        for ts, sign, breaks in made.truth.select("ts_ns", "direction_sign", "breaks").iter_rows():
            side = sign if breaks else -sign
            contact, burst, end = np.searchsorted(times, np.array([0, RULE.tilt_s, RULE.drift_s]) * NS + ts)
            toward = made.records["side"] == (b"B" if side > 0 else b"A")
            early_buys, early_total = early_buys + toward[contact:burst].sum(), early_total + burst - contact
            buys, total = buys + toward[burst:end].sum(), total + end - burst
            if end < len(price):
                moves.append(side * (price[end] - price[contact]) / NS)
    assert early_buys / early_total == pytest.approx(0.5 + RULE.tilt, abs=0.02)
    assert buys / total == pytest.approx(0.5 + RULE.tilt / 3, abs=0.02)
    assert np.mean(moves) > 0.4
    assert np.mean(np.array(moves) > 0) > 0.75


def test_no_tilt_leaves_the_tape_even() -> None:
    made = simulate_session(session_of("SPY", KEYS[0]), SPY, 3, 500 * NS, replace(RULE, tilt=0.0))
    assert np.mean(made.records["side"] == b"B") == pytest.approx(0.5, abs=0.03)


def test_marked_before_the_first_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = simulate.write_atomic

    def stop_at_second(path: Path, data: bytes) -> None:
        if path.name == "spy-20240202.trades.dbn.zst":
            raise OSError("disk full")
        written.append(path.name)
        real(path, data)

    monkeypatch.setattr(simulate, "write_atomic", stop_at_second)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path)
    assert written == [SIMULATED_MARK, "spy-20240201.trades.dbn.zst"]
    mark = read_mark(tmp_path)
    assert mark is not None
    assert mark["sessions"] == []
    assert not (tmp_path / TRUTH).exists()
    monkeypatch.undo()
    write(tmp_path)
    mark = read_mark(tmp_path)
    assert mark is not None
    assert (mark["sessions"], mark["seed"], mark["instrument"]) == (KEYS, 7, "SPY")


def test_a_folder_without_mark_is_not_simulated(tmp_path: Path) -> None:
    assert read_mark(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": (0.0,) * 7}, "kind has 7 logits"),
        ({"tilt": 0.6}, r"tilt = 0\.6"),
        ({"tilt": -0.1}, r"tilt = -0\.1"),
        ({"tilt": float("nan")}, "tilt = nan"),
        *[
            ({name: value}, f"{name} = ")
            for name in (
                "drift_s",
                "tilt_s",
                "sigma_usd_per_sqrt_min",
                "contact_usd",
                "attraction_usd",
                "trades_per_session",
            )
            for value in (0, -1, float("nan"))
        ],
    ],
)
def test_impossible_rules_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(LevelRule(), **change)


def test_impossible_starts_are_refused(tmp_path: Path) -> None:
    session = session_of("SPY", KEYS[0])
    for seed, start in ((7, 0), (7, -5), (-1, 500 * NS)):
        with pytest.raises(ConfigError, match=f"start_e9 = {start}, seed = {seed}"):
            simulate_session(session, SPY, seed, start, RULE)
    for sessions in ([], [session, session], [session_of("SPY", KEYS[1]), session]):
        with pytest.raises(ConfigError, match="these sessions cannot be simulated"):
            write_market(tmp_path / "new", SPY, sessions)
    assert not (tmp_path / "new").exists()


def test_real_data_is_never_mixed_with_a_simulation(tmp_path: Path) -> None:
    session = session_of("SPY", KEYS[0])
    real = dbn_bytes(trades([session.regular_open_ns], [500 * NS]))
    (tmp_path / "real.dbn.zst").write_bytes(real)
    with pytest.raises(MarketDataError, match=r"1 DBN files that were not simulated.*real\.dbn\.zst"):
        write(tmp_path)
    assert content(tmp_path) == {"real.dbn.zst": real}
