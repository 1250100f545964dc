"""option_flow says what its underlying came from: the tape's file, or the bars where there is no tape."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from spymaster_assets.automation.demo import _QUIET
from spymaster_assets.definitions import build_definitions
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
            run_config=_QUIET,
        ).success
    store = ArtifactStore(tmp_path)
    flow = store.load("option_flow", KEY)
    assert flow.json("feed.json")["trades"] > 100
    assert flow.inputs["ohlcv_bars"] == store.load("ohlcv_bars", KEY).sha256
