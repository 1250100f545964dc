"""A session that was left half-way: old and new rows are never read together, and it is made whole again from upstream."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from spymaster_assets.assets.common import require_one_origin
from spymaster_assets.assets.models import sequence_part
from spymaster_assets.automation.nightly import DATA_JOB, Request, due_requests
from spymaster_assets.automation.shadow import RebuildFailed, files_near, rebuild
from spymaster_assets.datasets.splits import SplitManifest
from spymaster_assets.errors import ArtifactError
from spymaster_assets.market.files import scan_flat, scan_folder
from spymaster_assets.partitions import SESSION_ASSETS, calendar_of
from spymaster_assets.proof.cutting import write_future
from spymaster_assets.settings import Settings
from spymaster_assets.store import Artifact, ArtifactStore, dump_json
from spymaster_assets_tests.proof.test_replay import KEY, simulated

LATER = datetime(2030, 1, 1, tzinfo=UTC)
VALIDATION = "2024-02-02"


def artifact(asset: str, sha256: str, key: str = "2024-02-01", **inputs: str) -> Artifact:
    return Artifact(
        asset, key, Path(), sha256, {}, {n.replace("__", "[") + "]" * ("__" in n): v for n, v in inputs.items()}
    )


def test_one_version_of_each_common_input() -> None:
    files, old, new = (
        artifact(a, s, market_files="1") for a, s in (("ohlcv_bars", "b"), ("levels", "x"), ("levels", "y"))
    )
    require_one_origin(artifact("market_files", "1"), files, old, artifact("signals", "s", levels="x"))
    require_one_origin(files, artifact("ohlcv_bars", "c", "2024-02-02", market_files="2"))  # another session's
    with pytest.raises(ArtifactError) as refused:
        require_one_origin(artifact("signals", "s", levels="x"), new)
    told = str(refused.value)
    assert "rest on two versions of levels[2024-02-01]" in told
    assert "signals[2024-02-01] was made from x" in told
    assert told.endswith("remedy: dagster asset materialize --select signals --partition 2024-02-01")
    with pytest.raises(ArtifactError, match="--select book_snapshots,levels --partition 2024-02-01"):
        require_one_origin(artifact("book_snapshots", "k", market_files="2"), old)
    with pytest.raises(ArtifactError, match=r"two versions of spy\.dbn\.zst"):
        require_one_origin(
            *(Artifact(a, KEY, Path(), a, {}, {"spy.dbn.zst": a}) for a in ("market_files", "option_flow"))
        )
    with pytest.raises(ArtifactError, match=r"two versions of ohlcv_bars\[2024-01-31\]"):
        require_one_origin(
            artifact("levels", "x", **{"ohlcv_bars__2024-01-31": "1"}), artifact("ohlcv_bars", "2", "2024-01-31")
        )


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A session that was made, then delivered again, and whose run stopped after its levels."""
    settings = simulated(tmp_path_factory.mktemp("halfway"), KEY)
    rebuild(settings, SESSION_ASSETS, KEY)
    session, folder = calendar_of("SPY").session(KEY), settings.root / "again"
    folder.mkdir()
    write_future(files_near(settings, session), folder, session.regular_open_ns, "altered")
    for path in folder.glob("*.dbn*"):
        path.replace(settings.dbn_dir / path.name)
    rebuild(settings, SESSION_ASSETS[: SESSION_ASSETS.index("levels") + 1], KEY)
    return settings


def due(settings: Settings) -> list[str]:
    files = scan_folder(settings.dbn_dir), scan_flat(settings.dbn_dir)
    found = due_requests(settings, ArtifactStore(settings.root), *files, LATER)
    return [r.name for r in found if isinstance(r, Request)]


def split_of(signals: str) -> SplitManifest:
    """A split that trains on the session as it was when its signals had this hash."""
    asof, inputs = "2024-02-05", {KEY: signals, VALIDATION: "0"}
    return SplitManifest(asof, "rolling", (KEY,), (VALIDATION,), (asof,), (), inputs=inputs)


def test_no_rows_of_two_deliveries_and_the_sensor_makes_the_session_whole(halfway: Settings) -> None:
    store = ArtifactStore(halfway.root)
    old = store.load("signals", KEY), store.load("sequence_dataset", KEY)
    assert old[0].inputs["levels"] != store.load("levels", KEY).sha256
    with pytest.raises(RebuildFailed, match=rf"rest on two versions of levels\[{KEY}\]"):
        rebuild(halfway, ["sequence_dataset"], KEY)
    assert store.load("sequence_dataset", KEY).sha256 == old[1].sha256
    # such sequences as were made before this was refused
    mixed = {**old[1].inputs, "levels": store.load("levels", KEY).sha256}
    for key in (KEY, VALIDATION):
        store.publish("sequence_dataset", key, old[1].contents(), inputs=mixed, settings=old[1].settings)
    with pytest.raises(ArtifactError, match=f"--select sequence_dataset,signals --partition {KEY}"):
        sequence_part(store, split_of(old[0].sha256), "train")
    assert due(halfway) == [f"{DATA_JOB}:{KEY}"]
    rebuild(halfway, SESSION_ASSETS, KEY)
    assert due(halfway) == []
    made = store.load("signals", KEY)
    assert made.sha256 != old[0].sha256
    assert len(sequence_part(store, split_of(made.sha256), "train")[0])


def test_new_files_are_not_read_with_old_levels(halfway: Settings) -> None:
    store = ArtifactStore(halfway.root)
    rebuild(halfway, SESSION_ASSETS, KEY)
    made = store.load("market_files", KEY)
    raw = {**made.json("files.json"), "coverage_premarket": 0.5}
    store.publish("market_files", KEY, {"files.json": dump_json(raw)}, inputs=made.inputs, metadata=made.metadata)
    for asset in ("levels", "signals"):
        with pytest.raises(RebuildFailed, match=rf"rest on two versions of market_files\[{KEY}\]"):
            rebuild(halfway, [asset], KEY)
    # the remedies lead from upstream to a whole session
    for asset in ("ohlcv_bars", "book_snapshots", "spot_basis", "option_flow", "levels", "signals", "sequence_dataset"):
        rebuild(halfway, [asset], KEY)
    assert due(halfway) == []
