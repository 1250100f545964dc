"""Sequence windows: what they hold, where they end, and files that do not lie."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from spymaster_assets.assets.datasets import sequence_faults
from spymaster_assets.datasets.sequences import KEYS, build_sequences, from_npz_bytes, to_npz_bytes
from spymaster_assets.errors import ArtifactError
from spymaster_assets.settings import NS, SequenceSettings
from spymaster_assets_tests.builders import CONTRACT, Built, build_folder


@pytest.fixture(scope="module")
def built(real_data: Path) -> Built:
    return build_folder(real_data / "spy-ohlcv-1m", "SPY", "2024-04-01", "2024-04-03")[-1]


@pytest.fixture(scope="module")
def arrays(built: Built) -> dict[str, np.ndarray]:
    return build_sequences(built.signals.frame, built.levels.context, CONTRACT, SequenceSettings(120), "4min")


def test_keys_and_shapes(arrays: dict[str, np.ndarray], built: Built) -> None:
    n = built.signals.frame.height
    assert list(arrays) == [
        "X",
        "mask",
        "static",
        "y_break",
        "y_strength",
        "event_id",
        "ts_ns",
        "seq_feature_names",
        "static_feature_names",
    ]
    assert arrays["X"].shape == (n, 120, len(CONTRACT.sequence_channels))
    assert sequence_faults(arrays, built.signals.frame) == []
    labels = set(arrays["static_feature_names"]) & {c.name for c in CONTRACT.role("label", "context", "id")}
    assert labels == set()


def test_windows_end_with_the_last_bar_closed_at_the_decision(arrays: dict[str, np.ndarray], built: Built) -> None:
    context = built.levels.context.to_dicts()
    names = arrays["seq_feature_names"].tolist()
    for i in (0, 5, built.signals.frame.height - 1):
        event = built.signals.frame.row(i, named=True)
        closed = [c for c in context if c["end_ns"] <= event["decision_ns"]][-120:]
        assert closed[-1]["start_ns"] == event["ts_ns"]
        assert arrays["mask"][i].sum() == len(closed)
        sign, level = event["direction_sign"], event["level_price"]
        expected = {
            "dist_to_level": [sign * (level - c["close"]) for c in closed],
            "return": [sign * c["return_usd"] for c in closed],
            "log_volume": [np.log1p(c["volume"]) for c in closed],
            "dist_to_sma_200": [sign * (c["close"] - c["sma_200"]) for c in closed],
        }
        for name, values in expected.items():
            found = arrays["X"][i, -len(closed) :, names.index(name)]
            assert found == pytest.approx(np.nan_to_num(np.array(values, np.float32)), abs=1e-5), name


def test_bars_after_the_decision_do_not_matter(arrays: dict[str, np.ndarray], built: Built) -> None:
    row = built.signals.frame.slice(3, 1)
    later = pl.col("end_ns") > row["decision_ns"][0]
    changed = built.levels.context.with_columns(
        pl.when(later).then(pl.col(c) * 2).otherwise(pl.col(c)).alias(c) for c in ("close", "volume", "return_usd")
    )
    again = build_sequences(row, changed, CONTRACT, SequenceSettings(120), "4min")
    assert again["X"].tobytes() == arrays["X"][3:4].tobytes()


def test_short_history_is_padded_on_the_left(built: Built) -> None:
    first = built.signals.frame.head(1)
    few = built.levels.context.filter(pl.col("end_ns") > first["decision_ns"][0] - 10 * 60 * NS)
    found = build_sequences(first, few, CONTRACT, SequenceSettings(120), "4min")
    assert found["mask"][0].tolist() == [0] * 110 + [1] * 10
    assert (found["X"][0, :110] == 0).all()


def test_labels(arrays: dict[str, np.ndarray], built: Built) -> None:
    expected = {"BREAK": 1, "BOUNCE": 0}
    assert arrays["y_break"].tolist() == [expected.get(o, -1) for o in built.signals.frame["outcome_4min"]]
    undefined = (built.signals.frame["outcome_4min"] == "UNDEFINED").to_numpy()
    assert (np.isnan(arrays["y_strength"]) == undefined).all()


def test_bytes_are_equal_and_come_back(arrays: dict[str, np.ndarray]) -> None:
    data = to_npz_bytes(arrays)
    assert data == to_npz_bytes({k: v.copy() for k, v in arrays.items()})
    again = from_npz_bytes(data)
    assert all(np.array_equal(again[k], arrays[k], equal_nan=arrays[k].dtype.kind == "f") for k in KEYS)


def test_hostile_files_are_refused(arrays: dict[str, np.ndarray]) -> None:
    def refuse(data: bytes, message: str) -> None:
        with pytest.raises(ArtifactError, match=message):
            from_npz_bytes(data)

    buffer = io.BytesIO()
    np.savez(buffer, **{**arrays, "X": np.array([{"a": 1}], dtype=object)})
    refuse(buffer.getvalue(), "X is object")
    refuse(to_npz_bytes(arrays)[:-200], "not a readable npz")
    refuse(b"", "not a readable npz")
    refuse(to_npz_bytes({k: v for k, v in arrays.items() if k != "mask"}), "npz keys")
    refuse(to_npz_bytes({**arrays, "mask": arrays["mask"][:, :-1]}), "mask has shape")
    refuse(to_npz_bytes({**arrays, "X": arrays["X"].astype(np.float64)}), "X is float64")
