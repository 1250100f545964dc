"""Settings: environment over file over defaults, and fingerprints that move with them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from spymaster_assets.errors import ConfigError
from spymaster_assets.settings import LabelSettings, Settings, SignalSettings, fingerprint


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
        ({"SPYMASTER_FIRST_SESSION": "20240201"}, "not a date"),
        (
            {"SPYMASTER_LABEL_MODE": "pips"},
            r'label\.mode is "pips"; where: SPYMASTER_LABEL_MODE; expected: a text, one of dollars, volatility',
        ),
        ({"SPYMASTER_WINDOW": "sliding"}, r'split\.window is "sliding"; where: SPYMASTER_WINDOW'),
        (
            {"SPYMASTER_TRAIN_SESSIONS": "many"},
            r'split\.train_sessions is "many"; where: SPYMASTER_TRAIN_SESSIONS; expected: a whole number',
        ),
        ({"SPYMASTER_TRAIN_SESSIONS": "0"}, "at least 1"),
        ({"SPYMASTER_FIRST_SESSION": "2024-02-01", "SPYMASTER_LAST_SESSION": "2024-01-01"}, "before first_session"),
    ],
)
def test_bad_values_are_typed_errors(tmp_path: Path, env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **env)


NOTHING, COUNT = "where an object should be", r"a whole number, at least 1"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("{", "is not JSON"),
        ("[]", NOTHING),
        ("5", NOTHING),
        (
            '{"label": {"modus": "x"}}',
            r"unknown setting label\.modus; where: .*; expected: look_forward_s, max_missing_min, mode, ",
        ),
        ('{"root": "/tmp"}', "unknown setting root"),
        ('{"lable": {}}', "unknown setting lable; .* label, "),
        ('{"signal": 5}', "signal is 5; .* an object"),
        ('{"patchtst": [1]}', r"patchtst is \[1\]; .* an object"),
        ('{"prove": {"cuts": "many"}}', rf'prove\.cuts is "many"; .* {COUNT}'),
        ('{"prove": {"cuts": 2.5}}', rf"prove\.cuts is 2\.5; .* {COUNT}"),
        ('{"prove": {"cuts": true}}', rf"prove\.cuts is true; .* {COUNT}"),
        ('{"tree": {"threads": null}}', rf"tree\.threads is null; .* {COUNT}"),
        ('{"split": {"train_sessions": "8"}}', rf'split\.train_sessions is "8"; .* {COUNT}'),
        ('{"split": {"train_sessions": 8, "train_sessions": 80}}', "the key 'train_sessions' is repeated"),
        ('{"dbn_dir": 5}', "dbn_dir is 5; .* a text"),
        ('{"first_session": 20240201}', "first_session is 20240201; .* a text"),
        ('{"missing_sessions": "2024-02-01"}', 'missing_sessions is "2024-02-01"; .* a list, each a text'),
        ('{"simulated": "false"}', 'simulated is "false"; .* true or false'),
        ('{"label": {"look_forward_s": -5}}', r"label\.look_forward_s is -5; .* a whole number, at least 300"),
        ('{"label": {"look_forward_s": "480"}}', r'label\.look_forward_s is "480"'),
        (
            '{"signal": {"sma_warmup_sessions": -3}}',
            r"signal\.sma_warmup_sessions is -3; .* a whole number, at least 0",
        ),
        ('{"signal": {"touch_band_usd": 0}}', r"signal\.touch_band_usd is 0; .* a number, above 0"),
        ('{"sequence": {"length_bars": 0}}', rf"sequence\.length_bars is 0; .* {COUNT}"),
        ('{"retrieval": {"k": 0}}', rf"retrieval\.k is 0; .* {COUNT}"),
        ('{"retrieval": {"stage": "C"}}', r'retrieval\.stage is "C"; .* one of A, B'),
        ('{"tree": {"stages": []}}', r"tree\.stages is \[\]; .* entries: at least 1"),
        ('{"option": {"rate": 1e999}}', "1e999 is not a finite number"),
    ],
)
def test_a_wrong_file_is_refused_by_file_key_value_and_expectation(tmp_path: Path, raw: str, message: str) -> None:
    config = tmp_path / "spymaster.json"
    config.write_text(raw)
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path)
    assert str(config) in str(caught.value)


def test_numbers_of_the_file_become_the_type_of_their_setting(tmp_path: Path) -> None:
    (tmp_path / "spymaster.json").write_text('{"signal": {"round_spacing_usd": 2}, "tree": {"stages": ["B"]}}')
    found = load(tmp_path)
    assert (found.tree.stages, type(found.signal.round_spacing_usd)) == (("B",), float)
    assert fingerprint(found.signal) == fingerprint(SignalSettings(round_spacing_usd=2.0))


def test_every_setting_has_a_lower_bound_or_no_number() -> None:
    """A new number without a bound is a conscious choice: the rate and the dividend yield may be negative."""
    free = set()
    for group in fields(Settings):
        if isinstance(group.default_factory, type):
            schema = TypeAdapter(group.default_factory).json_schema()["properties"]
            free |= {
                f"{group.name}.{name}"
                for name, s in schema.items()
                if s.get("type") in ("integer", "number") and not {"minimum", "exclusiveMinimum"} & set(s)
            }
    assert free == {"option.rate", "option.dividend_yield"}


def test_settings_are_told_by_dotted_name(tmp_path: Path) -> None:
    told = load(tmp_path).of("label.primary_delay", "sequence")
    assert told == {"symbol": "SPY", "label.primary_delay": "4min", "sequence.length_bars": 120}


def test_a_fingerprint_moves_with_its_settings_only() -> None:
    base = LabelSettings()
    assert fingerprint(base) == fingerprint(LabelSettings())
    assert fingerprint(base) != fingerprint(replace(base, look_forward_s=300))
