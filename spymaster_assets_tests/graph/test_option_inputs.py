"""What the feeds' assets record as their inputs is what they read."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from spymaster_assets.assets import feeds
from spymaster_assets.assets.common import QUIET
from spymaster_assets.automation.shadow import RebuildFailed, rebuild
from spymaster_assets.definitions import build_definitions
from spymaster_assets.market.dbn import file_sha256
from spymaster_assets.market.instruments import instrument
from spymaster_assets.market.simulate_book import write_full_market
from spymaster_assets.settings import MINUTE_NS, Settings
from spymaster_assets.store import ArtifactStore
from spymaster_assets_tests.builders import dbn_bytes, ohlcv, session_of

KEY = "2024-02-01"


def test_bars_that_gave_the_underlying_are_among_the_inputs(tmp_path: Path) -> None:
    folder, session = tmp_path / "dbn", session_of("SPY", KEY)
    write_full_market(folder, instrument("SPY"), [session], 3, "small")
    starts = [session.regular_open_ns + n * MINUTE_NS for n in range(390)]
    bars = ohlcv(starts, [[480 * 10**9] * 4] * len(starts), [100] * len(starts))
    next(folder.glob("spy-2*.trades*")).unlink()
    next(folder.glob("*mbp-10*")).unlink()
    (folder / "spy.dbn").write_bytes(dbn_bytes(bars, "ohlcv-1m", start_ns=session.open_ns, end_ns=session.close_ns))
    settings = Settings(root=tmp_path, dbn_dir=folder, first_session=KEY, last_session=KEY)
    chosen = ("market_files", "ohlcv_bars", "spot_basis", "option_flow")
    with dg.instance_for_test() as instance:
        job = build_definitions(settings).resolve_implicit_global_asset_job_def()
        assert job.execute_in_process(
            instance=instance,
            partition_key=KEY,
            asset_selection=[dg.AssetKey(a) for a in chosen],
            run_config=QUIET,
        ).success
    store = ArtifactStore(tmp_path)
    flow = store.load("option_flow", KEY)
    assert flow.json("feed.json")["trades"] > 100
    assert flow.inputs["ohlcv_bars"] == store.load("ohlcv_bars", KEY).sha256


@pytest.mark.parametrize(
    ("reader", "asset", "schema"),
    [
        ("load_book", "book_snapshots", "mbp-10"),
        ("load_option_trades", "option_flow", "cmbp-1"),
        ("load_option_trades", "option_flow", "definition"),
    ],
)
def test_a_feed_that_is_replaced_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, asset: str, schema: str
) -> None:
    """Else the artifact would name the hash of bytes that it was not made of."""
    folder, honest = tmp_path / "dbn", getattr(feeds, reader)
    write_full_market(folder, instrument("SPY"), [session_of("SPY", KEY)], 3, "small")
    settings = Settings(root=tmp_path, dbn_dir=folder, first_session=KEY, last_session=KEY)
    (path,) = folder.glob(f"*{schema}*")

    def synced(*given: object) -> object:
        made = honest(*given)
        (tmp_path / "new").write_bytes(path.read_bytes())
        (tmp_path / "new").replace(path)
        return made

    monkeypatch.setattr(feeds, reader, synced)
    chosen = ("market_files", "ohlcv_bars", "spot_basis", "book_snapshots", "option_flow")
    with pytest.raises(RebuildFailed, match="changed while it was read") as failed:
        rebuild(settings, chosen, KEY)
    assert list(failed.value.words) == [asset]
    assert path.name in failed.value.words[asset]
    assert not ArtifactStore(tmp_path).exists(asset, KEY)
    monkeypatch.undo()
    rebuild(settings, chosen, KEY)
    assert ArtifactStore(tmp_path).load(asset, KEY).inputs[path.name] == file_sha256(path)
