"""Settings: environment over file over defaults, and fingerprints that move with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from spymaster_assets.errors import ConfigError
from spymaster_assets.settings import LabelSettings, Settings, fingerprint


def load(root: Path, **env: str) -> Settings:
    return Settings.load({"SPYMASTER_DATA_DIR": str(root), **env})


def test_environment_wins_over_file_over_default(tmp_path: Path) -> None:
    stored = replace(load(tmp_path), symbol="ES", first_session="2024-01-02", label=LabelSettings(mode="volatility"))
    stored.write()
    assert load(tmp_path) == stored
    changed = load(
        tmp_path,
        SPYMASTER_INSTRUMENT="NQ",
        SPYMASTER_TRAIN_SESSIONS="7",
        SPYMASTER_NIGHTLY="0",
        SPYMASTER_DBN_DIR="/data/x",
        SPYMASTER_DATASET="GLBX.MDP3",
    )
    assert (stored.dataset, changed.dataset) == ("", "GLBX.MDP3")
    assert (changed.symbol, changed.split.train_sessions, changed.nightly.enabled) == ("NQ", 7, False)
    assert changed.dbn_dir == Path("/data/x")
    assert changed.label.mode == "volatility"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SPYMASTER_INSTRUMENT": "XYZ"}, "unknown instrument 'XYZ'"),
        ({"SPYMASTER_FIRST_SESSION": "yesterday"}, "not a date"),
        ({"SPYMASTER_LABEL_MODE": "pips"}, "label mode 'pips'"),
        ({"SPYMASTER_WINDOW": "sliding"}, "split window 'sliding'"),
        ({"SPYMASTER_TRAIN_SESSIONS": "many"}, "SPYMASTER_TRAIN_SESSIONS='many' is not a int"),
        ({"SPYMASTER_TRAIN_SESSIONS": "0"}, "at least 1"),
        ({"SPYMASTER_FIRST_SESSION": "2024-02-01", "SPYMASTER_LAST_SESSION": "2024-01-01"}, "before first_session"),
    ],
)
def test_bad_values_are_typed_errors(tmp_path: Path, env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **env)


def test_unknown_stored_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "spymaster.json").write_text('{"label": {"modus": "x"}}')
    with pytest.raises(ConfigError, match=r"unknown setting label\.modus"):
        load(tmp_path)
    (tmp_path / "spymaster.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load(tmp_path)


def test_a_fingerprint_moves_with_its_settings_only() -> None:
    base = LabelSettings()
    assert fingerprint(base) == fingerprint(LabelSettings())
    assert fingerprint(base) != fingerprint(replace(base, look_forward_s=300))
