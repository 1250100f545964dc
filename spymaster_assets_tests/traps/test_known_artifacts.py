"""What of the production artifacts counts as known when: feeds and registrations included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from spymaster_assets.market.files import register_session, scan_folder
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.simulate import write_market
from spymaster_assets.proof.compare import differences, known_tables
from spymaster_assets.settings import MINUTE_NS
from spymaster_assets.store import Artifact, ArtifactStore, dump_json
from spymaster_assets.tables import parquet_bytes
from spymaster_assets_tests.builders import CALENDARS, CONTRACT


def basis(root: Path, ratios: list[float]) -> Artifact:
    known_ns = [MINUTE_NS * (n + 1) for n in range(len(ratios))]
    frame = pl.DataFrame({"known_ns": known_ns, "ratio": ratios}, {"known_ns": pl.Int64, "ratio": pl.Float64})
    return ArtifactStore(root).publish("spot_basis", "2024-02-01", {"basis.parquet": parquet_bytes(frame)}, inputs={})


def test_a_basis_is_compared_up_to_the_cut(tmp_path: Path) -> None:
    stored, other = basis(tmp_path / "a", [10.0, 10.1, 10.2]), basis(tmp_path / "b", [10.0, 10.1, 10.3])
    assert differences(stored, other, 2 * MINUTE_NS, CONTRACT) == ([], 4)
    found, count = differences(stored, other, 3 * MINUTE_NS, CONTRACT)
    assert [(d.asset, d.column, d.row) for d in found] == [("spot_basis", "ratio", str(3 * MINUTE_NS))]
    assert count == 6
    assert differences(stored, basis(tmp_path / "c", []), 0, CONTRACT) == ([], 0)


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    root = tmp_path_factory.mktemp("files")
    session = CALENDARS["SPY"].session("2024-02-01")
    write_market(root / "dbn", instrument("SPY"), [session], 3)
    found = register_session(scan_folder(root / "dbn"), CALENDARS["SPY"], instrument("SPY"), session.key, None)
    files = {"files.json": dump_json(found.to_json())}
    return ArtifactStore(root / "a").publish("market_files", session.key, files, inputs={}), root


def changed(artifact: Artifact, root: Path, **fields: object) -> Artifact:
    raw = {**artifact.json("files.json"), **fields}
    return ArtifactStore(root).publish("market_files", artifact.key, {"files.json": dump_json(raw)}, inputs={})


def test_a_registration_is_compared_in_what_is_known(registered: tuple[Artifact, Path], tmp_path: Path) -> None:
    stored, _ = registered
    opens_ns = CALENDARS["SPY"].session("2024-02-01").regular_open_ns
    table = known_tables(stored, CONTRACT)["files.json"]
    assert {"schema", "first_ns", "front"} <= set(table.frame["what"])
    front = stored.json("files.json")["front"]
    other = changed(stored, tmp_path, front={**front, "raw_symbol": "QQQ"})
    assert differences(stored, other, opens_ns - 1, CONTRACT)[0] == []
    found, _ = differences(stored, other, opens_ns, CONTRACT)
    assert [(d.row, d.stored, d.replayed) for d in found] == [("front", "SPY", "QQQ")]


def test_a_minute_is_missing_when_it_is_over(registered: tuple[Artifact, Path], tmp_path: Path) -> None:
    stored, _ = registered
    stored = changed(stored, tmp_path / "one", missing_regular_minutes=["2024-02-01T15:00:00Z"])
    other = changed(stored, tmp_path / "two", missing_regular_minutes=["2024-02-01T15:01:00Z"])
    begins_ns = 1_706_799_600_000_000_000
    assert differences(stored, other, begins_ns + MINUTE_NS - 1, CONTRACT)[0] == []
    assert differences(stored, other, begins_ns + MINUTE_NS, CONTRACT)[0] != []
    # what lies wholly after the cut is not known, however many minutes it lacks
    later = changed(
        stored, tmp_path / "three", missing_regular_minutes=["2024-02-01T15:00:00Z", "2024-02-01T16:00:00Z"]
    )
    assert differences(stored, later, begins_ns + 2 * MINUTE_NS, CONTRACT)[0] == []


def test_assets_without_rows_in_time_compare_nothing(registered: tuple[Artifact, Path]) -> None:
    stored = replace(registered[0], asset="tree_bundles")
    assert differences(stored, stored, 2**62, CONTRACT) == ([], 0)
