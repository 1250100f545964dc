"""Copies of input with another future: all that may differ after the time does, and nothing before it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest

from spymaster_assets.market.dbn import (
    MBO_DTYPE,
    MBP10_DTYPE,
    OHLCV_DTYPE,
    TRADE_DTYPE,
    UNDEFINED_PRICE,
    read_header,
    read_records,
)
from spymaster_assets.market.files import scan_folder
from spymaster_assets.market.options import STATISTICS_DTYPES
from spymaster_assets.proof import cutting
from spymaster_assets.proof.cutting import (
    FUTURES,
    NEVER_OF_BARS,
    Future,
    layouts_of,
    write_flat_future,
    write_future,
    write_past,
)
from spymaster_assets.proof.detect import FUTURES as DETECTED
from spymaster_assets.settings import NS
from spymaster_assets_tests.builders import dbn_bytes

START_NS = 1_706_799_600 * NS
N = 3_000
AT_NS = START_NS + N // 2 * NS
LAYOUT = {
    "trades": (TRADE_DTYPE, 0x00),
    "mbp-10": (MBP10_DTYPE, 0x0A),
    "mbo": (MBO_DTYPE, 0xA0),
    "ohlcv-1s": (OHLCV_DTYPE, 0x20),
    "statistics": (STATISTICS_DTYPES[3], 0x18),
}


def records_of(schema: str) -> np.ndarray:
    """One record a second, of two instruments whose prices lie far apart."""
    dtype, rtype = LAYOUT[schema]
    rng = np.random.default_rng(5)
    out = np.zeros(N, dtype)
    out["length"], out["rtype"] = dtype.itemsize // 4, rtype
    out["instrument_id"] = 1 + np.arange(N) % 2
    base_e9 = 500 * NS * out["instrument_id"].astype(np.int64) + rng.integers(0, 100, N) * 10_000_000
    for name in dtype.names or ():
        if name.startswith("ts_") and dtype[name].itemsize == 8:
            out[name] = START_NS + np.arange(N) * NS
        elif name in cutting.PRICES or name.startswith(("bid_px", "ask_px")):
            out[name] = base_e9 + {"high": NS, "low": -NS}.get(name, 0)
        elif name in ("size", "volume", "quantity") or name.startswith(("bid_sz", "ask_sz")):
            out[name] = rng.integers(1, 500, N)
        elif name == "side":
            out[name] = rng.choice([b"A", b"B"], N)
    if schema == "mbp-10":
        out["bid_px_09"], out["bid_sz_09"] = UNDEFINED_PRICE, 0
    return out


def futures_of(
    root: Path, schema: str, futures: Sequence[Future], at_ns: int = AT_NS
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    (root / "in").mkdir()
    (root / "in" / "a.dbn.zst").write_bytes(dbn_bytes(records_of(schema), schema, start_ns=START_NS))
    entries = scan_folder(root / "in")
    layouts, made = layouts_of(entries[0].header), {}
    for future in futures:
        write_future(entries, root / future, at_ns, future)
        made[future] = read_records(root / future / "a.dbn.zst", layouts)
    return read_records(entries[0].path, layouts), made


@pytest.mark.parametrize("schema", LAYOUT)
def test_all_that_may_be_another_is_and_nothing_before(schema: str, tmp_path: Path) -> None:
    tried: list[Future] = [f for f in (*FUTURES, "altered") if schema != "ohlcv-1s" or f not in NEVER_OF_BARS]
    real, made = futures_of(tmp_path, schema, tried)
    n = N // 2
    names = real.dtype.names or ()
    prices = [c for c in names if (c in cutting.PRICES or "_px_" in c) and c != "bid_px_09"]
    sizes = [c for c in names if (c in ("size", "volume", "quantity") or "_sz_" in c) and c != "bid_sz_09"]
    for future, records in made.items():
        assert records[:n].tobytes() == real[:n].tobytes(), future
    assert len(made["cut"]) == n
    for future, sign in (("up", 1), ("down", -1)):
        for name in prices:
            moved = made[future][name][n:] / real[name][n:] - 1
            assert (np.sign(moved) == sign).all()
            assert moved.std() > 0.001, "prices that all move alike leave returns as they were"
    if schema != "mbo":
        for future in ("sizes", "altered"):
            for name in sizes:
                factor = made[future][name][n:] / real[name][n:]
                assert factor.min() > 1
                assert 0.005 < (factor > 1_000).mean() < 0.05
        assert 0.4 < (len(made["dropped"]) - n) / n < 0.6
    for name in prices:
        shuffled, was = made["shuffled"][n:], real[n:]
        assert (shuffled[name] != was[name]).mean() > 0.8
        for i in (1, 2):
            one, other = (np.sort(r[name][r["instrument_id"] == i]) for r in (shuffled, was))
            assert one.tobytes() == other.tobytes()
    if "side" in names and schema != "mbo":
        assert {*made["sides"]["side"][n:].tolist()} == {b"A", b"B", b"N"}
        assert (made["altered"]["side"][n:] != real["side"][n:]).mean() > 0.4
    if schema == "mbp-10":
        assert all((r["bid_px_09"] == UNDEFINED_PRICE).all() and not r["bid_sz_09"].any() for r in made.values())
    if "late" in made and "ts_event" in names:
        late = made["late"]
        key = "ts_recv" if "ts_recv" in names else "ts_event"
        assert (late[key] == real[key]).all()
        moved = late["ts_event"][n:] < AT_NS
        assert moved.mean() == pytest.approx(0.5, abs=0.01)
        assert late[n:][~moved].tobytes() == real[n:][~moved].tobytes()
        assert all((late[c][n:][moved] != real[c][n:][moved]).all() for c in prices)


@pytest.mark.parametrize("schema", ["trades", "mbp-10"])
@pytest.mark.parametrize("into_s", [0, 20])
def test_within_a_minute_prices_stay_near_until_it_is_over(schema: str, into_s: int, tmp_path: Path) -> None:
    real, made = futures_of(tmp_path, schema, ["up", "altered", "shuffled"], AT_NS + into_s * NS)
    name = "price" if schema == "trades" else "ask_px_00"
    soon, later = slice(N // 2 + into_s, N // 2 + 60), slice(N // 2 + 60, N)
    for future in ("up", "altered"):
        moved = [np.abs(made[future][name][part] / real[name][part] - 1) for part in (soon, later)]
        assert moved[0].min() > 0
        assert bool(moved[0].max() <= 0.0002) is (into_s > 0)
        assert moved[1].max() > 0.005
    among = [np.sort(r[name][soon]) for r in (made["shuffled"], real)]
    assert np.array_equal(*among) is (into_s > 0)


def test_a_file_is_rewritten_in_chunks_and_within_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "_CHUNK", 700)
    real, made = futures_of(tmp_path, "trades", ["cut", "up", "sizes"])
    assert made["cut"].tobytes() == real[: N // 2].tobytes()
    assert [len(made[f]) for f in ("up", "sizes")] == [N, N]
    entries = scan_folder(tmp_path / "in")
    write_future(entries, tmp_path / "near", AT_NS, "up", within_ns=(START_NS + 100 * NS, START_NS + 2_000 * NS))
    near = read_records(tmp_path / "near" / "a.dbn.zst")
    assert near.tobytes() == made["up"][100:2_000].tobytes()
    assert read_header(tmp_path / "cut" / "a.dbn.zst").end_ns == AT_NS


@pytest.mark.parametrize("schema", LAYOUT)
def test_another_past_has_a_silent_book_and_every_record_of_the_other_feeds(schema: str, tmp_path: Path) -> None:
    real = futures_of(tmp_path, schema, [])[0]
    entries = scan_folder(tmp_path / "in")
    write_past(entries, tmp_path / "past", AT_NS)
    past = read_records(tmp_path / "past" / "a.dbn.zst", layouts_of(entries[0].header))
    silent = 600 if schema == "mbp-10" else 0  # one record a second
    assert len(past) == N - silent
    assert past[N // 2 - silent :].tobytes() == real[N // 2 :].tobytes()
    assert past[: N // 2 - silent].tobytes() != real[: N // 2 - silent].tobytes()
    write_past(entries, tmp_path / "silent", AT_NS, silent=True)
    alone = read_records(tmp_path / "silent" / "a.dbn.zst", layouts_of(entries[0].header))
    assert alone.tobytes() == real[: N // 2 - silent].tobytes() + real[N // 2 :].tobytes()


def test_futures_have_the_names_of_the_measured_detector() -> None:
    assert {*FUTURES} - {*DETECTED} == {"sides"}


@pytest.mark.parametrize("futures", [FUTURES, [f for f in FUTURES if f not in NEVER_OF_BARS]])
def test_every_edge_sees_every_future_over_nights(futures: Sequence[Future]) -> None:
    nights = [d for n in range(60) if (d := date(2024, 1, 1) + timedelta(n)).weekday() in (1, 2, 3, 4, 5)]
    for edge in range(12):
        assert {futures[(edge + d.toordinal()) % len(futures)] for d in nights} == {*futures}


def test_flat_files_are_cut_and_altered_by_their_receive_time(tmp_path: Path) -> None:
    path = tmp_path / "in" / "2024-02-01.csv"
    path.parent.mkdir()
    rows = ["ticker,price,size,sip_timestamp,sequence_number", *(f"O:SPY,1.{n},{n},{n},{n}" for n in range(1, 5))]
    path.write_text("\n".join(rows) + "\n")
    for future in ("cut", "up", "down", "dropped"):
        write_flat_future([path], path.parent, tmp_path / future, 3, future)  # type: ignore[arg-type]
    cut, up, down, dropped = ((tmp_path / f / path.name).read_text().split() for f in ("cut", "up", "down", "dropped"))
    assert cut == rows[:3] == up[:3] == down[:3] == dropped[:3]
    assert len(dropped) == 4
    assert float(up[3].split(",")[1]) > 1.3 > float(down[3].split(",")[1])
    assert [up[n].split(",")[2] for n in (3, 4)] == ["10", "13"]
