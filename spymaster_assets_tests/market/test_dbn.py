"""DBN decoding: every version and container, and every kind of damage as one typed error."""

from __future__ import annotations

import struct
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import databento
import databento_dbn
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from spymaster_assets.errors import MarketDataError
from spymaster_assets.market import dbn
from spymaster_assets.market.dbn import LAYOUTS, SCHEMAS, Symbol, read_header, read_records
from spymaster_assets_tests.builders import dbn_bytes, ohlcv, trades

T0 = 1_710_163_800_000_000_000


def sample(n: int = 500) -> np.ndarray:
    rng = np.random.default_rng(0)
    return trades(T0 + np.cumsum(rng.integers(0, 10**9, n)), 500_000_000_000 + rng.integers(-100, 100, n) * 10_000_000)


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("compress", [True, False])
def test_round_trip_in_every_version_and_container(tmp_path: Path, version: int, compress: bool) -> None:
    path = tmp_path / "any-name.dbn"
    path.write_bytes(dbn_bytes(sample(), version=version, compress=compress))
    header = read_header(path)
    assert (header.version, header.schema, header.compressed) == (version, "trades", compress)
    assert [(s.instrument_id, s.raw_symbol) for s in header.symbols] == [(1, "SPY")]
    assert np.array_equal(read_records(path), sample())


def test_several_frames_and_unknown_sizes(tmp_path: Path) -> None:
    data = dbn_bytes(sample(), compress=False)
    path = tmp_path / "a.dbn.zst"
    stream = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compressobj()
    first = stream.compress(data[:9000]) + stream.flush()
    path.write_bytes(first + zstandard.ZstdCompressor().compress(data[9000:]))
    assert np.array_equal(read_records(path), sample())


def test_agrees_with_databento_on_real_files(real_data: Path) -> None:
    for path in sorted(real_data.glob("*/*.dbn.zst"))[::12]:
        if read_header_schema(path) not in SCHEMAS or "dbn-schemas" in str(path):
            continue
        expected = databento.DBNStore.from_file(path).to_ndarray()
        found = read_records(path)
        for name in found.dtype.names or ():
            assert np.array_equal(found[name], expected[name]), (path.name, name)


def read_header_schema(path: Path) -> str:
    try:
        return read_header(path).schema
    except MarketDataError:
        return ""


@pytest.mark.parametrize("name", ["es-trades-2013/glbx-mdp3-20130902", "spy-trades/spy-20131007"])
def test_truncation_anywhere_is_an_error(real_data: Path, tmp_path: Path, name: str) -> None:
    raw = (real_data / f"{name}.trades.dbn.zst").read_bytes()
    path = tmp_path / "cut.dbn.zst"
    for percent in range(100):
        path.write_bytes(raw[: len(raw) * percent // 100])
        with pytest.raises(MarketDataError, match=r"cut\.dbn\.zst"):
            read_records(path)


def test_truncated_without_compression_is_an_error(tmp_path: Path) -> None:
    raw = dbn_bytes(sample(3), compress=False)
    path = tmp_path / "cut.dbn"
    for n in range(len(raw)):
        if (len(raw) - n) % 48 == 0 and n >= len(raw) - 3 * 48:
            continue  # whole records are missing: not to be seen in an uncompressed file
        path.write_bytes(raw[:n])
        with pytest.raises(MarketDataError):
            read_records(path)


def test_faults_name_file_reason_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "x.dbn"
    good = sample(10)

    def fault(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(MarketDataError) as caught:
            read_records(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "empty" in fault(b"")
    assert "not a DBN file" in fault(b"ticker,price\nSPY,500.0\n")
    backwards = good.copy()
    backwards["ts_recv"][5] -= 10**12
    assert "ts_recv runs backwards at record 5" in fault(dbn_bytes(backwards))
    twice = np.concatenate([good, good])
    assert "delivered twice" in fault(dbn_bytes(twice))
    undefined = good.copy()
    undefined["price"][3] = np.iinfo(np.int64).max
    assert "record 3 has an undefined price" in fault(dbn_bytes(undefined))
    alien = good.copy()
    alien["rtype"][2] = 0xA0
    assert "record 2 has type 160" in fault(dbn_bytes(alien))
    bar = ohlcv([T0], [(10, 9, 8, 9)], [1])
    assert "outside [low, high]" in fault(dbn_bytes(bar, "ohlcv-1m"))
    assert "schema 'ohlcv-1d' is not read here" in fault(dbn_bytes(bar, "ohlcv-1d"))


def test_a_missing_file_is_typed(tmp_path: Path) -> None:
    with pytest.raises(MarketDataError, match="no such file"):
        read_records(tmp_path / "nothing.dbn")


def test_every_vendor_sample_ends_in_records_or_the_typed_error(real_data: Path) -> None:
    read = 0
    for path in sorted((real_data / "dbn-schemas").iterdir()):
        try:
            records = read_records(path)
        except MarketDataError:
            continue
        read += 1
        assert records.dtype in [d for d, _ in LAYOUTS.values()]
    assert read >= 25


def header_bytes(**changes: object) -> bytes:
    """A version 3 header of the schema trades, stored ids in, raw symbols out."""
    day = date(2024, 3, 11)
    intervals = [SimpleNamespace(start_date=day, end_date=date(2024, 3, 12), symbol="ESM4")]
    fields: dict[str, object] = {
        "dataset": "GLBX.MDP3",
        "start": T0,
        "end": T0 + 10**12,
        "stype_in": databento_dbn.SType.INSTRUMENT_ID,
        "stype_out": databento_dbn.SType.RAW_SYMBOL,
        "schema": databento_dbn.Schema.TRADES,
        "symbols": ["77"],
        "partial": [],
        "not_found": [],
        "mappings": [SimpleNamespace(raw_symbol="77", intervals=intervals)],
        "version": 3,
    }
    return bytes(databento_dbn.Metadata(**(fields | changes)).encode())


def test_symbols_are_read_in_both_directions_of_the_mapping(tmp_path: Path) -> None:
    path = tmp_path / "a.dbn"
    path.write_bytes(header_bytes() + sample(5).tobytes())
    assert read_header(path).symbols == (Symbol(77, "ESM4", date(2024, 3, 11), date(2024, 3, 12)),)


def test_send_times_after_each_record_are_skipped(tmp_path: Path) -> None:
    records = sample(50)
    records["length"] = 14
    wide = np.zeros((50, 56), np.uint8)
    wide[:, :48] = records.view(np.uint8).reshape(50, 48)
    wide[:, 48:] = 0xAB
    path = tmp_path / "a.dbn.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(header_bytes(ts_out=True) + wide.tobytes()))
    assert read_header(path).ts_out
    found = read_records(path)
    for name in records.dtype.names or ():
        assert np.array_equal(found[name], records[name]), name


def test_skippable_frames_are_skipped_but_not_when_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.dbn.zst"
    frame = dbn_bytes(sample())
    extra = struct.pack("<II", 0x184D2A50, 100) + bytes(100)
    path.write_bytes(frame + extra)
    assert np.array_equal(read_records(path), sample())
    path.write_bytes(frame + extra[:-1])
    with pytest.raises(MarketDataError, match="inside a skippable frame"):
        read_records(path)


def test_a_frame_that_claims_more_than_its_blocks_can_hold_is_refused_before_allocating(tmp_path: Path) -> None:
    data = dbn_bytes(sample(50), compress=False)
    raw_blocks = (len(data) << 3).to_bytes(3, "little") + data + b"\x01\x00\x00"

    def frame(claimed: int) -> bytes:
        return b"\x28\xb5\x2f\xfd" + b"\xc0\x50" + claimed.to_bytes(8, "little") + raw_blocks

    path = tmp_path / "a.dbn.zst"
    path.write_bytes(frame(len(data)))
    assert np.array_equal(read_records(path), sample(50))
    path.write_bytes(frame(1 << 60))
    with pytest.raises(MarketDataError, match=f"claims to hold {1 << 60} bytes"):
        read_records(path)


def test_a_decoder_panic_is_typed_and_an_interrupt_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As pyo3's PanicException: no Exception."""

    path = tmp_path / "a.dbn"
    path.write_bytes(dbn_bytes(sample(5)))

    def raising(kind: type[BaseException]) -> SimpleNamespace:
        def decode(_: bytes) -> None:
            raise kind("boom")

        return SimpleNamespace(Metadata=SimpleNamespace(decode=decode))

    monkeypatch.setattr(dbn, "databento_dbn", raising(Panic))
    with pytest.raises(MarketDataError, match=r"a\.dbn.*whole DBN file") as caught:
        read_records(path)
    assert "Panic: boom" in str(caught.value)
    for kind in (KeyboardInterrupt, SystemExit, GeneratorExit):
        monkeypatch.setattr(dbn, "databento_dbn", raising(kind))
        with pytest.raises(kind):
            read_records(path)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_mutated_bytes_never_escape_the_typed_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(dbn_bytes(sample(20), compress=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "mutated.dbn"
    path.write_bytes(bytes(raw))
    try:
        records = read_records(path)
    except MarketDataError:
        return
    assert records.dtype in [d for d, _ in LAYOUTS.values()]
