"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "real"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread files over workers (`-n 2 --dist loadgroup`), but all that needs the demo to one, since making it takes a minute."""
    for item in items:
        group = "demo" if "demo" in getattr(item, "fixturenames", ()) else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real market data beside the project; tests that need it skip where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip("real market data is not beside this checkout (../shared/data/real)")
    return REAL_DATA
