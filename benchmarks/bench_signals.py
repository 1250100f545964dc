"""From a DBN file of 2 million trades with 5,000 touches to the signals Parquet, and the labels of those touches alone."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.common import CALENDAR, SPY, big_file, decompress, line, market, once, seconds, sessions
from spymaster_assets.contract import load_contract
from spymaster_assets.market.bars import session_bars
from spymaster_assets.market.files import register_session, scan_folder
from spymaster_assets.market.tape import SessionTape, load_session_records
from spymaster_assets.settings import DELAYS_S, NS, LabelSettings, SignalSettings
from spymaster_assets.signals import labels as lab
from spymaster_assets.signals.build import SignalSet, build_signals, signals_to_parquet
from spymaster_assets.signals.context import SessionBars
from spymaster_assets.signals.levels import build_levels

SIGNAL = SignalSettings(
    round_spacing_usd=0.01, round_reach_spacings=6, cool_down_min=0, touch_band_usd=0.5, monitor_band_usd=0.6
)
"""Levels every cent without a cool-down: thousands of touches in one session."""
LABEL = LabelSettings(mode="volatility")
CONTRACT = load_contract()


def pandas_labels(frame: pd.DataFrame, t1: np.ndarray, level: np.ndarray, limit: np.ndarray) -> pd.DataFrame:
    """Excursions and first crossings in plain pandas: one time slice a touch."""
    forward = pd.Timedelta(seconds=LABEL.look_forward_s)
    rows = []
    for start_ns, price, threshold in zip(t1, level, limit, strict=True):
        start = pd.Timestamp(start_ns)
        prices = frame.loc[start + pd.Timedelta(1, "ns") : start + forward, "price"]
        row = {"up": max((prices - price).max(), 0), "down": max((price - prices).max(), 0)}
        for k in (0, 1):
            for name, hit in (("up", prices >= price + threshold[k]), ("down", prices <= price - threshold[k])):
                row[f"{name}_{k}"] = (hit.idxmax() - start).total_seconds() if hit.any() else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Print the ratios."""
    path, measured = big_file(), sessions()[3]
    warmup = []
    for session in sessions()[:3]:
        folder = market() / "warmup"
        registration = register_session(scan_folder(folder), CALENDAR, SPY, session.key, None)
        records = load_session_records(folder, registration, session=session)
        warmup.append(SessionBars(session, session_bars(records, session, registration)))
    registration = register_session(scan_folder(path.parent), CALENDAR, SPY, measured.key, None)

    def signals_of(records: np.ndarray) -> SignalSet:
        bars = SessionBars(measured, session_bars(records, measured, registration))
        levels = build_levels(bars, warmup, SPY, SIGNAL, CONTRACT, registration.observed_until_ns)
        return build_signals(
            levels, SessionTape.of_records(records), measured, SPY, registration.front_id, SIGNAL, LABEL, CONTRACT,
            registration.observed_until_ns, simulated=True,
        )  # fmt: skip

    def read() -> np.ndarray:
        return load_session_records(path.parent, registration, session=measured)

    reference = seconds(lambda: decompress(path))
    records = read()
    made = signals_of(records)
    print(
        f"{len(records):,} trades, {made.frame.height:,} touches; SIMULATED. Decompression alone: {1000 * reference:.0f} ms"
    )
    took = seconds(lambda: signals_to_parquet(signals_of(read())))
    line("file to signals Parquet: bars, levels, features, labels", took, took / reference, "decompression", "<= 5")

    tape = SessionTape.of_records(records)
    frame = pd.DataFrame({"price": tape.price_e9}, index=pd.to_datetime(tape.ts_ns))
    t1 = (made.frame["ts_ns"] + DELAYS_S["4min"] * NS).to_numpy()
    level = made.frame["level_price_e9"].to_numpy()
    limit = lab.to_e9(made.frame.select("threshold_1", "threshold_2").to_numpy(), SPY.spy_dollar_e9)
    inside = (t1 + LABEL.look_forward_s * NS <= measured.regular_close_ns) & (limit > 0).all(axis=1)
    t1, level, limit = t1[inside], level[inside], limit[inside]
    sample = np.linspace(0, len(t1) - 1, min(300, len(t1))).astype(int)

    def ours() -> lab.Excursions:
        path_of = lab.Path.of_trades(tape)
        return lab.measure(
            path_of, t1, level, limit, LABEL.look_forward_s * NS, measured.regular_close_ns, SPY.spy_dollar_e9, 0
        )

    found = ours()
    theirs = pandas_labels(frame, t1[sample], level[sample], limit[sample])
    # the anchor counts as our path's first point, so compare where nothing was crossed at once
    later = np.nan_to_num(found.crossed_up[sample, 1], nan=1.0) > 0
    assert np.allclose(found.crossed_up[sample, 1][later], theirs["up_1"][later], equal_nan=True, atol=1e-6)
    took = seconds(ours)
    loop = once(lambda: pandas_labels(frame, t1[sample], level[sample], limit[sample]), 2) * len(t1) / len(sample)
    line(
        f"labels of {len(t1):,} touches, pandas loop (scaled from {len(sample)})",
        loop,
        loop / took,
        f"ours ({1000 * took:.1f} ms)",
        ">= 100",
    )


if __name__ == "__main__":
    main()
