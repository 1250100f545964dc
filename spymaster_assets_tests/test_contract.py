"""features.json: parsed, consistent, and the only way to choose columns."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import polars as pl
import pytest

from spymaster_assets.contract import FEATURES_PATH, known_after_s, load_contract, parse_contract
from spymaster_assets.datasets.matrix import encode, feature_matrix, labelled_rows, target
from spymaster_assets.definitions import build_definitions
from spymaster_assets.errors import ConfigError, ContractError
from spymaster_assets.settings import Settings, SignalSettings
from spymaster_assets_tests.builders import touch_times

CONTRACT = load_contract()
RAW = json.loads(FEATURES_PATH.read_text())


@pytest.mark.parametrize(
    ("text", "seconds"), [("t0", 0), ("t0+60s", 60), ("t1_2min", 120), ("t1_4min+480s", 720), ("t1_8min+480s", 960)]
)
def test_known_at(text: str, seconds: int) -> None:
    assert known_after_s(text) == seconds


@pytest.mark.parametrize("text", ["", "t1", "t1_3min", "t0-60s", "end of day"])
def test_unreadable_known_at_is_refused(text: str) -> None:
    with pytest.raises(ContractError, match="known_at"):
        known_after_s(text)


def test_stage_a_reads_nothing_after_the_touch_bar_and_no_order_flow() -> None:
    names = {c.name for c in CONTRACT.features("A", "8min")}
    assert {c.known_after_s for c in CONTRACT.features("A", "8min")} <= {0, 60}
    assert not [
        n for n in names if n.startswith(("barrier_", "tape_", "wall_ratio", "liquidity_pressure", "net_break"))
    ]


def test_stage_b_reads_what_is_known_at_confirmation() -> None:
    two = {c.name for c in CONTRACT.features("B", "2min")}
    four = {c.name for c in CONTRACT.features("B", "4min")}
    assert "tape_imbalance" in two
    assert "barrier_delta_liq" not in two
    assert "barrier_delta_liq" in four


def test_ablations_split_the_features() -> None:
    for stage in ("A", "B"):
        full, ta, mechanics = (
            {c.name for c in CONTRACT.features(stage, "4min", a)} for a in ("full", "ta", "mechanics")
        )
        assert ta | mechanics == full
        assert not ta & mechanics


def test_no_label_can_be_read_as_a_feature() -> None:
    for column in CONTRACT.role("label"):
        with pytest.raises(ContractError, match="is a label"):
            CONTRACT.require_known([column.name], 10**6)
    with pytest.raises(ContractError, match="after the decision at t0\\+60s"):
        CONTRACT.require_known(["barrier_state"], 60)


def edited(**change: object) -> dict:
    raw = copy.deepcopy(RAW)
    raw["columns"][0] = {**raw["columns"][0], **change}
    return raw


def test_a_wrong_entry_is_named() -> None:
    for raw, message in (
        (edited(role="magic"), "role 'magic'"),
        (edited(known_at="later"), "known_at 'later'"),
        (edited(feeds=["news"]), "unknown feeds"),
        (edited(name="ts_ns"), "listed twice: ts_ns"),
    ):
        with pytest.raises(ContractError, match=message):
            parse_contract(raw, "")
    raw = copy.deepcopy(RAW)
    next(c for c in raw["columns"] if c["name"] == "outcome_2min")["known_at"] = "t0"
    with pytest.raises(ContractError, match="label outcome_2min is known at t0"):
        parse_contract(raw, "")


@pytest.mark.parametrize(
    ("group", "name", "most", "column"),
    [
        ("signal", "tape_window_s", 60, "tape_imbalance declares: t0\\+60s"),
        ("barrier", "window_s", 240, "barrier_state declares: t0\\+240s"),
        ("label", "look_forward_s", 480, "outcome_2min declares: t1_2min\\+480s"),
        ("signal", "atr_bars", 14, "atr declares: history 14bars"),
        ("signal", "vol_bars", 20, "volatility declares: history 20bars"),
        ("signal", "lookback_min", 10, "approach_velocity declares: history 9min"),
        ("barrier", "baseline_s", 1800, "wall_ratio declares: history 30min"),
    ],
)
def test_a_window_beyond_what_is_declared_is_refused(
    tmp_path: Path, group: str, name: str, most: int, column: str
) -> None:
    def require(value: int) -> None:
        (tmp_path / "spymaster.json").write_text(json.dumps({group: {name: value}}))
        settings = Settings.load({"SPYMASTER_DATA_DIR": str(tmp_path)})
        CONTRACT.require_windows(settings.signal, settings.barrier, settings.label)

    require(most)
    with pytest.raises(ContractError, match=rf"{group}\.{name} = {most + 1} .*{column}.*expected: .* at most {most}"):
        require(most + 1)


def test_no_graph_is_defined_on_a_window_to_the_future(tmp_path: Path) -> None:
    (tmp_path / "spymaster.json").write_text('{"signal": {"tape_window_s": 240}}')
    with pytest.raises(ContractError, match=r"signal\.tape_window_s = 240"):
        build_definitions(Settings.load({"SPYMASTER_DATA_DIR": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"signal\.atr_bars is 0"):
        build_definitions(Settings(tmp_path, tmp_path, signal=SignalSettings(atr_bars=0)))


def test_conform_refuses_columns_that_are_not_listed() -> None:
    with pytest.raises(ContractError, match="not in the contract: secret"):
        CONTRACT.conform(pl.DataFrame({"secret": [1]}))
    frame = CONTRACT.conform(pl.DataFrame({"event_id": ["a"]}))
    assert dict(frame.schema) == CONTRACT.schema


def test_violations_are_found() -> None:
    frame = CONTRACT.conform(
        pl.DataFrame({"event_id": ["a", "a"], "direction": ["UP", "SIDEWAYS"], "atr": [1.0, float("nan")]})
    )
    found = " ".join(CONTRACT.violations(frame))
    assert "event_id repeats: 1 rows" in found
    assert "direction holds ['SIDEWAYS']" in found
    assert "atr holds NaN" in found
    assert "ts_ns is an id and has 2 nulls" in found
    assert "schema differs" in CONTRACT.violations(frame.drop("atr"))[0]


def test_encode_makes_one_hot_columns_from_the_contract() -> None:
    days = ["2024-01-02", "2024-01-03"]
    frame = pl.DataFrame(
        {
            "event_id": ["a", "b"],
            **touch_times(days),
            "direction": ["UP", None],
            "atr": [0.5, None],
            "is_first_15m": [True, None],
        }
    )
    X, names = encode(frame, CONTRACT, ("direction", "atr", "is_first_15m"), "A", "4min")
    assert names == ("direction=UP", "direction=DOWN", "atr", "is_first_15m")
    assert X[0].tolist() == [1.0, 0.0, 0.5, 1.0]
    assert all(v != v for v in X[1].tolist())
    with pytest.raises(ContractError, match="lacks spot"):
        encode(frame, CONTRACT, ["spot"], "A", "4min")


def test_rows_and_targets_of_each_head() -> None:
    outcomes = ["BREAK", "BOUNCE", "CHOP", "UNDEFINED", "BREAK"]
    frame = CONTRACT.conform(
        pl.DataFrame(
            {
                "event_id": list("abcde"),
                **touch_times(["2024-01-02"] * 5),
                "outcome_4min": outcomes,
                "tradeable_2_4min": [True, True, False, None, True],
                "strength_signed_4min": [2.0, -2.0, 0.1, None, 3.0],
                "already_resolved_4min": [False, False, False, None, True],
            }
        )
    )
    rows = {
        h: labelled_rows(frame, h, "4min", "A", CONTRACT).tolist() for h in ("tradeable_2", "direction", "strength")
    }
    assert rows["tradeable_2"] == rows["strength"] == [True, True, True, False, True]
    assert rows["direction"] == [True, True, False, False, True]
    assert labelled_rows(frame, "direction", "4min", "B", CONTRACT).tolist() == [True, True, False, False, False]
    assert target(frame, "direction", "4min").tolist()[:2] == [1.0, 0.0]
    assert target(frame, "tradeable_2", "4min").tolist()[:3] == [1.0, 1.0, 0.0]
    assert feature_matrix(frame, CONTRACT, "A", "4min")[0].shape[0] == 5
