"""From a DBN file of 2 million trades to bars of all timeframes."""

from __future__ import annotations

import databento
import pandas as pd

from benchmarks.common import CALENDAR, SPY, big_file, decompress, line, once, seconds, sessions
from spymaster_assets.market.bars import session_bars
from spymaster_assets.market.dbn import read_records
from spymaster_assets.market.files import register_session, scan_folder
from spymaster_assets.settings import TIMEFRAMES_MIN


def pandas_bars(frame: pd.DataFrame, open_ns: int) -> list[pd.DataFrame]:
    """The same bars in plain pandas: one groupby a timeframe."""
    out = []
    frame = frame.assign(
        notional=frame["price"].astype(float) * frame["size"],
        buys=frame["size"].where(frame["side"] == "B", 0),
        sells=frame["size"].where(frame["side"] == "A", 0),
    )
    for minutes in TIMEFRAMES_MIN:
        slot = (frame["ts_recv"].astype("int64") - open_ns) // (minutes * 60_000_000_000)
        bars = frame.groupby(slot).agg(
            open=("price", "first"),
            high=("price", "max"),
            low=("price", "min"),
            close=("price", "last"),
            volume=("size", "sum"),
            count=("size", "size"),
            notional=("notional", "sum"),
            buys=("buys", "sum"),
            sells=("sells", "sum"),
        )
        out.append(bars.assign(vwap=bars["notional"] / bars["volume"]))
    return out


def main() -> None:
    """Print the ratios."""
    path, session = big_file(), sessions()[3]
    registration = register_session(scan_folder(path.parent), CALENDAR, SPY, session.key, None)
    reference = seconds(lambda: decompress(path))
    records = read_records(path)
    frame = pd.DataFrame({n: records[n] for n in ("ts_recv", "price", "size")})
    frame["side"] = records["side"].astype(str)
    bars = session_bars(records, session, registration)
    check = pandas_bars(frame, session.open_ns)
    for minutes, theirs in zip(TIMEFRAMES_MIN, check, strict=True):
        ours = bars.filter(bars["timeframe_min"] == minutes)
        for ours_name, name in (("open_e9", "open"), ("high_e9", "high"), ("close_e9", "close"), ("volume", "volume")):
            assert ours[ours_name].to_list() == theirs[name].to_list(), (minutes, name)

    print(
        f"{len(records):,} trades, {path.stat().st_size / 1e6:.1f} MB; SIMULATED. Decompression alone: {1000 * reference:.0f} ms"
    )
    took = seconds(lambda: databento.DBNStore.from_file(path).to_ndarray())
    line("DBNStore.to_ndarray alone", took, took / reference, "decompression")
    took = seconds(lambda: read_records(path))
    line("read_records: decompress, prove whole, in order", took, took / reference, "decompression")
    took = seconds(lambda: session_bars(read_records(path), session, registration))
    line(f"file to bars of {len(TIMEFRAMES_MIN)} timeframes", took, took / reference, "decompression", "<= 2.0")
    ours = seconds(lambda: session_bars(records, session, registration))
    theirs_s = once(lambda: pandas_bars(frame, session.open_ns), 2)
    line(
        "bars alone, pandas groupby of the same frame",
        theirs_s,
        theirs_s / ours,
        f"ours ({1000 * ours:.1f} ms)",
        ">= 50",
    )


if __name__ == "__main__":
    main()
