"""A backfill of many small sessions as one run against one run a session, through the dagster command line."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import CALENDAR, SPY, line, once
from spymaster_assets.market.simulate import LevelRule, write_market
from spymaster_assets.partitions import SESSION_ASSETS

SESSIONS = 60
SAMPLE = 3
"""Runs of one session that are timed; the rest would take the same each."""


def materialize(root: Path, *partition: str) -> None:
    """`dagster asset materialize` of every session asset in its own process, as a user or the UI's daemon runs it."""
    env = {**os.environ, "SPYMASTER_DATA_DIR": str(root), "DAGSTER_HOME": str(root / "home")}
    (root / "home").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "spymaster_assets.definitions"]
    subprocess.run(
        [*command, "--select", ",".join(SESSION_ASSETS), *partition], env=env, check=True, capture_output=True
    )


def main() -> None:
    """Print the ratio."""
    keys = CALENDAR.sessions("2024-02-01", CALENDAR.next("2024-02-01", SESSIONS - 1))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_market(
            root / "dbn", SPY, [CALENDAR.session(k) for k in keys], 7, rule=LevelRule(trades_per_session=5_000)
        )
        single = sum(once(lambda key=key: materialize(root, "--partition", key)) for key in keys[:SAMPLE]) / SAMPLE
        together = once(lambda: materialize(root, "--partition-range", f"{keys[0]}...{keys[-1]}"))
        what = f"{SESSIONS} runs of one session (scaled from {SAMPLE})"
        line(
            what, single * SESSIONS, single * SESSIONS / together, f"one run of {SESSIONS} ({together:.0f} s)", ">= 10"
        )


if __name__ == "__main__":
    main()
