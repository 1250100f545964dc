"""Mutated files of every schema and version end in data or in the one typed error: no panic, abort, hang or half artifact.

2,000 inputs in the ordinary suite; SPYMASTER_FUZZ=60000 (`make nightly`) for the long run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

from spymaster_assets.errors import MarketDataError
from spymaster_assets.market.book import book_snapshots, build_mbp10
from spymaster_assets.market.dbn import read_header, read_records, stream_records
from spymaster_assets.market.options import option_trades_from_dbn, read_definitions

COUNT = int(os.environ.get("SPYMASTER_FUZZ", "2000"))
ONE_INPUT_S = 5.0
SEED = 20_240_711
DEFINITIONS = "py-OPRA.PILLAR__test_data.definition.dbn.zst"


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """A few random edits: bytes, words, cuts, repeats; of the content of a frame as often as of the file, half of them in its tail."""
    inside = data[:4] == b"\x28\xb5\x2f\xfd" and rng.random() < 0.6
    if inside:
        try:
            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
        except zstandard.ZstdError:
            inside = False
    raw = bytearray(data)
    for _ in range(int(rng.geometric(0.5))):
        if not raw:
            break
        at = int(rng.integers(len(raw) // 2 if rng.random() < 0.5 else 0, len(raw)))  # records follow the header
        kind = int(rng.choice(7, p=[0.3, 0.2, 0.2, 0.1, 0.05, 0.05, 0.1]))
        if kind == 0:
            raw[at] = int(rng.integers(256))
        elif kind == 1:
            raw[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            word = rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, int(rng.integers(1 << 32))])
            raw[at : at + 4] = int(word).to_bytes(4, "little")
        elif kind == 3:
            del raw[at:]
        elif kind == 4:
            del raw[at : at + int(rng.integers(1, 64))]
        elif kind == 5:
            raw[at:at] = raw[at : at + int(rng.integers(1, 128))]
        else:
            raw[at:at] = rng.bytes(int(rng.integers(1, 64)))
    changed = bytes(raw)
    return zstandard.ZstdCompressor(level=1).compress(changed) if inside else changed


def decode(path: Path, definitions: Path) -> None:
    """Everything that a feed's file goes through."""
    schema = read_header(path).schema
    if schema == "definition":
        read_definitions(path, "SPY")
        return
    if schema in ("mbp-10", "mbp-1"):
        sum(len(chunk) for chunk in stream_records(path))
        book_snapshots(path, 1)
    if schema in ("tbbo", "trades"):
        option_trades_from_dbn(path, definitions, "SPY")
        return
    records = read_records(path)
    if schema == "mbo":
        build_mbp10(records)


def _decodes(path: Path, folder: Path) -> bool:
    try:
        decode(path, folder / DEFINITIONS)
    except MarketDataError:
        return False
    return True


def fuzz(folder: Path, scratch: Path, count: int, seed: int) -> dict[str, int]:
    """Decode `count` mutated files; raises whatever is not the typed error, or when one input takes too long."""
    rng = np.random.default_rng(seed)
    seeds = sorted(p for p in folder.iterdir() if ".dbn" in p.name)
    seeds += [
        p for p in seeds if _decodes(p, folder)
    ] * 4  # whole files of the schemas that are read, more often than others
    definitions = folder / DEFINITIONS
    path = scratch / "mutated.dbn"
    said = {"data": 0, "error": 0}
    for n in range(count):
        data = mutate(seeds[int(rng.integers(len(seeds)))].read_bytes(), rng)
        path.write_bytes(data)
        began = time.perf_counter()
        try:
            decode(path, definitions)
            said["data"] += 1
        except MarketDataError:
            said["error"] += 1
        except BaseException as error:
            (scratch / "failing.dbn").write_bytes(data)
            raise AssertionError(f"input {n} escaped as {type(error).__name__}: {error}") from error
        took = time.perf_counter() - began
        assert n < 50 or took < ONE_INPUT_S, f"input {n} took {took:.1f} s"  # the first ones compile
        assert [p.name for p in scratch.iterdir()] == [path.name], "a decoder left a file behind"
    return said


def test_mutated_files_end_in_data_or_the_typed_error(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "dbn-schemas"
    if not folder.is_dir():
        pytest.skip("no DBN samples beside this checkout")
    # a process of its own, so that an abort is a failure here and not the end of the suite
    command = [sys.executable, "-m", "spymaster_assets_tests.market.test_fuzz", str(folder), str(tmp_path), str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 + COUNT / 20, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counted = dict(part.split("=") for part in done.stdout.split())
    assert int(counted["data"]) + int(counted["error"]) == COUNT
    assert int(counted["data"]) > COUNT // 50, "mutations that nothing survives test only the first check"
    assert int(counted["error"]) > COUNT // 4


@pytest.mark.parametrize(
    "name",
    ["es-book-2023/*mbp-10*", "es-book-2023/*mbo*", "es-book-2023/*trades*", "spy-ohlcv-1m/*"],
)
def test_a_real_file_cut_at_every_percent_is_an_error(real_data: Path, tmp_path: Path, name: str) -> None:
    whole = sorted(p for p in real_data.glob(name) if ".dbn" in p.name)[0]
    data = whole.read_bytes()
    path = tmp_path / ("cut.dbn.zst" if whole.name.endswith("zst") else "cut.dbn")
    stride = 1
    if not whole.name.endswith("zst"):  # without frames a cut between two records cannot be told from a shorter file
        stride = read_records(whole).dtype.itemsize
    for percent in range(100):
        length = len(data) * percent // 100
        if stride > 1 and length > 200 and (length - read_header(whole).data_offset) % stride == 0:
            length += 1
        path.write_bytes(data[:length])
        with pytest.raises(MarketDataError):
            read_records(path)
        if "mbp-10" in name:
            with pytest.raises(MarketDataError):
                book_snapshots(path, 1)


if __name__ == "__main__":
    result = fuzz(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), SEED)
    print(f"data={result['data']} error={result['error']}")
