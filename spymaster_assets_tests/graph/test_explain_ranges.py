"""The records that an explanation names are all that its row rests on: whatever else the files hold may be otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from spymaster_assets.assets.signals import read_signals, warmup_sessions
from spymaster_assets.automation.shadow import files_near, lend, rebuild, shadow_of
from spymaster_assets.market.dbn import time_field
from spymaster_assets.partitions import SESSION_ASSETS, all_sessions, calendar_of
from spymaster_assets.proof import cutting
from spymaster_assets.proof.explain import Explanation, explain
from spymaster_assets.settings import Settings
from spymaster_assets.store import ArtifactStore
from spymaster_assets_tests.graph.conftest import Demo

Span = tuple[int, int]


def told_of(found: Explanation, feed: str) -> dict[str, list[Span]]:
    """The times that an explanation names of each file; nothing of the files of `feed`."""
    return {f.name: [(r.start_ns, r.end_ns) for r in f.ranges if f.feed != feed] for f in found.files}


def rewritten(settings: Settings, key: str, target: Path, told: dict[str, list[Span]]) -> int:
    """Copies of a session's files with other prices and sizes outside the times told; how many records were altered."""
    altered = 0
    session = calendar_of(settings.symbol).session(key)
    for entry in files_near(settings, session):
        schema, spans = entry.header.schema, told.get(entry.name)
        if spans is None or schema == "definition" or not entry.overlaps(session.open_ns, session.close_ns):
            continue

        def change(records: NDArray[np.void], schema: str = schema, spans: Sequence[Span] = spans) -> NDArray[np.bool_]:
            nonlocal altered
            times = records[time_field(schema)].astype(np.int64)
            outside = ~np.any([(times >= a) & (times < b) for a, b in spans] or [times < 0], axis=0)
            share = np.random.default_rng(7).uniform(-0.01, 0.01, len(records))[outside]
            cutting._reprice(records, outside, lambda prices: np.rint(prices * (1 + share)).astype(np.int64))
            cutting._resize(records, outside, np.full(len(records), 3), 1)
            altered += int(outside.sum())
            return np.ones(len(records), bool)

        cutting._rewrite(entry.path, cutting._place(entry, target), change)
    for entry in files_near(settings, session):  # definitions are read whole, and told so
        if entry.header.schema == "definition" and entry.name in told:
            cutting._place(entry, target).symlink_to(entry.path)
    return altered


@pytest.mark.parametrize("hidden", ["", "tape", "book", "options"])
def test_a_row_rests_on_the_records_that_are_told_and_on_each_feed_of_them(demo: Demo, hidden: str) -> None:
    key = all_sessions(demo.settings)[2]
    frame = read_signals(demo.store, key)[0].frame
    attempts = frame.group_by("level_kind", "direction_sign", "attempt_cluster_id", maintain_order=True).agg(
        pl.len().alias("n"), pl.col("event_id").last()
    )
    event_id = str(attempts.sort("n", descending=True, maintain_order=True)["event_id"][0])
    found = explain(demo.settings, event_id)
    with shadow_of(demo.settings) as shadow:
        assert rewritten(demo.settings, key, shadow.dbn_dir, told_of(found, hidden)) > 1_000
        lend(demo.store, shadow.root, "ohlcv_bars", warmup_sessions(demo.settings, key))
        rebuild(shadow, SESSION_ASSETS, key)
        again = read_signals(ArtifactStore(shadow.root), key)[0].frame.filter(pl.col("event_id") == event_id)
    row = frame.filter(pl.col("event_id") == event_id)
    if hidden:  # a test that alters nothing that is read could not fail
        assert not row.equals(again, null_equal=True)
    else:
        assert row.equals(again, null_equal=True)
