"""Settings are part of an artifact's identity: what was made with different ones is never read together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from spymaster_assets.assets.datasets import read_part, read_split
from spymaster_assets.assets.models import sequence_part
from spymaster_assets.automation.shadow import RebuildFailed, lend, rebuild
from spymaster_assets.errors import MixedSettingsError
from spymaster_assets.partitions import FITTED_ASSETS, SESSION_ASSETS, scheduled_asof
from spymaster_assets.settings import Settings
from spymaster_assets.store import ArtifactStore
from spymaster_assets_tests.graph.conftest import Demo


def lent(demo: Demo, root: Path, assets: Sequence[str]) -> Settings:
    """The demo's settings with a store of its own that holds these assets."""
    for asset in assets:
        lend(demo.store, root, asset, demo.store.keys(asset))
    return replace(demo.settings, root=root)


def relabelled(settings: Settings) -> Settings:
    return replace(settings, label=replace(settings.label, mode="dollars"))


def test_every_artifact_tells_the_settings_of_all_that_it_rests_on(demo: Demo) -> None:
    asof = scheduled_asof(demo.settings)[0]
    split = read_split(demo.store, asof)[0]
    groups = {
        "ohlcv_bars": set(),
        "levels": {"signal", "option"},
        "signals": {"signal", "barrier", "option", "label", "book", "simulated"},
    }
    for asset, expected in groups.items():
        told = demo.store.load(asset, split.train[0]).settings
        assert {name.partition(".")[0] for name in told} == expected | {"symbol"}, asset
    report = demo.store.load("calibration_report", asof).settings
    assert {name.partition(".")[0] for name in report} == {
        *groups["signals"], "symbol", "split", "sequence", "patchtst", "tree", "retrieval", "canary"
    }  # fmt: skip
    assert (report["label.mode"], report["simulated"], report["split.train_sessions"]) == ("volatility", True, 8)


def test_a_partial_backfill_under_another_label_is_not_learned_from(demo: Demo, tmp_path: Path) -> None:
    asof = scheduled_asof(demo.settings)[0]
    split = read_split(demo.store, asof)[0]
    settings = lent(demo, tmp_path, [*SESSION_ASSETS, "split_manifest"])
    for key in split.train[:2]:
        rebuild(relabelled(settings), ("signals", "sequence_dataset"), key)
    both = ", ".join(split.train[:2])
    message = rf'label\.mode differs: "dollars" in signals\[{both}\], "volatility" in signals\['
    with pytest.raises(RebuildFailed, match=message) as caught:
        rebuild(settings, ("split_manifest",), asof)
    assert f"--select signals --partition-range {split.train[0]}...{split.train[1]}" in str(caught.value)
    store = ArtifactStore(tmp_path)
    with pytest.raises(MixedSettingsError, match=message):
        read_part(store, split, "train")
    with pytest.raises(MixedSettingsError, match=r'label\.mode differs: "dollars" in sequence_dataset\['):
        sequence_part(store, split, "train")


def test_simulated_sessions_are_not_mixed_with_real_ones(demo: Demo, tmp_path: Path) -> None:
    asof = scheduled_asof(demo.settings)[0]
    settings = lent(demo, tmp_path, SESSION_ASSETS)
    store, key = ArtifactStore(tmp_path), read_split(demo.store, asof)[0].train[0]
    one = store.load("signals", key)
    files = {name: one.read(name) for name in one.files}
    store.publish("signals", key, files, inputs=one.inputs, settings={**one.settings, "simulated": False})
    with pytest.raises(RebuildFailed, match=rf"simulated differs: false in signals\[{key}\], true in signals"):
        rebuild(settings, ("split_manifest",), asof)


def test_signals_are_not_made_of_levels_of_other_settings(demo: Demo, tmp_path: Path) -> None:
    key = demo.store.keys("signals")[-1]
    settings = lent(demo, tmp_path, SESSION_ASSETS[:-2])
    other = replace(settings, signal=replace(settings.signal, touch_band_usd=0.2))
    with pytest.raises(
        RebuildFailed, match=rf"signal\.touch_band_usd differs: 0\.2 in signals\[{key}\], 0\.1 in levels"
    ):
        rebuild(other, ("signals",), key)
    assert not ArtifactStore(tmp_path).exists("signals", key)
    rebuild(other, ("levels", "signals"), key)


@pytest.mark.parametrize(
    ("group", "change", "asset"),
    [("tree", {"max_depth": 9}, "tree_bundles"), ("retrieval", {"k": 3}, "retrieval_index")],
)
def test_canaries_of_other_models_publish_nothing(
    demo: Demo, tmp_path: Path, group: str, change: dict[str, int], asset: str
) -> None:
    asof = scheduled_asof(demo.settings)[0]
    settings = lent(demo, tmp_path, [*SESSION_ASSETS, "split_manifest", *FITTED_ASSETS, "canaries"])
    other = replace(settings, **{group: replace(getattr(settings, group), **change)})
    rebuild(other, (asset,), asof)
    (name, value) = next(iter(change.items()))
    message = (
        rf"judged another {asset}: {group}\.{name} differ.*expected: {group}\.{name} {value}, found.*--select canaries"
    )
    with pytest.raises(RebuildFailed, match=message):
        rebuild(other, ("calibration_report",), asof)
    assert not ArtifactStore(tmp_path).exists("calibration_report", asof)
