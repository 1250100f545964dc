"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "real"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real market data beside the project; tests that need it skip where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("real market data is not beside this checkout (../shared/data/real)")
    return REAL_DATA
