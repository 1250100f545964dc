"""The history that features declare, against what rebuilding sessions with another past finds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from spymaster_assets.automation.warmup import pasts_of, replay_pasts
from spymaster_assets.contract import Contract, history_of, load_contract
from spymaster_assets.errors import ContractError
from spymaster_assets.partitions import all_sessions
from spymaster_assets.proof.history import (
    DECLARES_MORE,
    HOLDS,
    NEEDS_MORE,
    UNSEEN,
    Past,
    changes,
    judge,
)
from spymaster_assets.settings import MINUTE_NS
from spymaster_assets_tests.graph.conftest import Demo

CONTRACT = load_contract()


@pytest.fixture(scope="module")
def found(demo: Demo) -> pl.DataFrame:
    key = all_sessions(demo.settings)[-1]
    return replay_pasts(demo.settings, key, pasts_of(demo.settings, key, touches=1, seed=3))


def declaring(feature: str, history: str) -> Contract:
    columns = [replace(c, history=history_of(history)) if c.name == feature else c for c in CONTRACT.columns]
    return replace(CONTRACT, columns=tuple(columns))


def verdict(found: pl.DataFrame, feature: str, contract: Contract = CONTRACT) -> str:
    return judge(found, contract).row(by_predicate=pl.col("feature") == feature, named=True)["verdict"]


def test_no_feature_needs_more_than_it_declares(found: pl.DataFrame) -> None:
    table = judge(found, CONTRACT)
    assert table.height == len(CONTRACT.role("feature", "context"))
    assert table.filter(pl.col("verdict") == NEEDS_MORE).rows() == []
    assert table["compared"].min() > 50
    # rare chains of events, and what a market of this size does not show; all others are found to the letter
    rare = {"approach_bars", "attempt_index", "attempt_cluster_id", "prior_touches"}
    rare |= {c.name for c in CONTRACT.columns if c.name.endswith("_trend")}
    unseen = {"previous_spot", "direction", "direction_sign", "gamma_bucket", "wall_confluence"}
    unseen |= {"open_interest_gamma", "already_resolved_2min", "fuel_effect"}
    other = table.filter(pl.col("verdict") != HOLDS, ~pl.col("feature").is_in([*rare, *unseen]))
    assert other.select("feature", "declared", "found", "verdict").rows() == []


@pytest.mark.parametrize("feature", ["atr", "volatility", "approach_velocity", "wall_ratio"])
def test_a_window_is_found_to_the_minute(found: pl.DataFrame, feature: str) -> None:
    row = judge(found, CONTRACT).row(by_predicate=pl.col("feature") == feature, named=True)
    declared = CONTRACT[feature].history
    assert declared is not None
    assert row["verdict"] == HOLDS
    assert row["found"] == declared.text


def test_a_book_that_was_silent_before_has_no_say_in_the_barrier(found: pl.DataFrame) -> None:
    at_t0 = found.filter(pl.col("minutes") == 0)
    assert at_t0.filter(pl.col("feature") == "barrier_delta_liq").height > 0
    assert at_t0.filter(pl.col("feature") == "wall_ratio")["changed"].any()  # so the silence was there
    assert not at_t0.filter(pl.col("feature").str.starts_with("barrier_") & ~pl.col("feature").str.ends_with("_trend"))[
        "changed"
    ].any()


def test_warm_up_sessions_are_found(found: pl.DataFrame) -> None:
    table = judge(found, CONTRACT)
    needs = {r["feature"]: r["found"] for r in table.rows(named=True)}
    assert needs["label_sigma"] == "3 sessions"
    assert "session" in needs["sma_400"]
    assert "min" in needs["dist_to_pm_high"]


def test_a_window_that_is_declared_too_short_is_told(found: pl.DataFrame) -> None:
    assert verdict(found, "atr", declaring("atr", "13bars")) == NEEDS_MORE
    assert verdict(found, "sma_400", declaring("sma_400", "session")) == NEEDS_MORE
    assert verdict(found, "dist_to_pm_high", declaring("dist_to_pm_high", "30min")) == NEEDS_MORE
    assert verdict(found, "spot", declaring("spot", "session")) == UNSEEN


def test_changes_by_hand() -> None:
    t0 = np.array([10, 11, 14]) * MINUTE_NS
    stored = CONTRACT.conform(
        pl.DataFrame(
            {
                "event_id": ["a", "b", "c", "d"],
                "ts_ns": [*t0, t0[-1]],
                "level_price_e9": [1, 2, 3, 4],
                "atr": [1.0, 2.0, 3.0, 4.0],
                "sma_200": [None, 5.0, 6.0, 7.0],
            }
        )
    )
    replayed = CONTRACT.conform(
        pl.DataFrame(  # the level of d has another price: another touch
            {
                "event_id": ["b", "c", "d"],
                "ts_ns": [*t0[1:], t0[-1]],
                "level_price_e9": [2, 3, 5],
                "atr": [2.5, 3.0, 0.0],
                "sma_200": [5.0, None, 0.0],
            }
        )
    )
    rows = changes(stored, replayed, Past(int(t0[0])), np.arange(20) * MINUTE_NS, CONTRACT)
    atr, sma = (rows.filter(pl.col("feature") == f) for f in ("atr", "sma_200"))
    assert atr["changed"].to_list() == [True, False]
    assert sma["changed"].to_list() == [False, True]
    assert atr["minutes"].to_list() == atr["bars"].to_list() == [1, 4]
    assert verdict(rows, "atr", declaring("atr", "1bars")) == NEEDS_MORE
    assert verdict(rows, "atr", declaring("atr", "2bars")) == HOLDS
    assert verdict(rows, "atr", declaring("atr", "5bars")) == DECLARES_MORE
    assert verdict(rows, "sma_200", declaring("sma_200", "5min")) == HOLDS


@pytest.mark.parametrize("text", ["", "min", "-1min", "1hour", "sessions", "5"])
def test_a_history_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ContractError, match="cannot read history"):
        history_of(text)
