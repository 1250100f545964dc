"""The order book: the real ESH4 hour rebuilt record for record, plain loops, damage, and snapshots with the input cut off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import databento
import databento_dbn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spymaster_assets.errors import MarketDataError
from spymaster_assets.market.book import (
    LAST_OF_EVENT,
    BookSnapshots,
    book_snapshots,
    build_mbp10,
    snapshots_of_records,
)
from spymaster_assets.market.dbn import (
    MBO_DTYPE,
    MBP1_DTYPE,
    MBP10_DTYPE,
    UNDEFINED_PRICE,
    read_records,
    stream_records,
)
from spymaster_assets_tests.builders import dbn_bytes

T0 = 1_718_027_400_000_000_000
MS = 1_000_000
NONE = int(UNDEFINED_PRICE)
ESH4 = 17077
ARRAYS = ("ts_ns", "bid_px_e9", "bid_sz", "ask_px_e9", "ask_sz")


def mbp(
    ts_ns: Sequence[int],
    bids: Sequence[Sequence[tuple[int, int]]],
    asks: Sequence[Sequence[tuple[int, int]]],
    action: str = "A",
    instrument_id: int = 1,
    levels: int = 10,
) -> NDArray[np.void]:
    """MBP records with the given (price, size) levels, best first, and undefined prices below them."""
    out = np.zeros(len(ts_ns), MBP10_DTYPE if levels == 10 else MBP1_DTYPE)
    out["length"], out["rtype"] = out.dtype.itemsize // 4, 10 if levels == 10 else 1
    out["instrument_id"], out["ts_recv"], out["ts_event"] = instrument_id, ts_ns, ts_ns
    out["action"] = [a.encode() for a in action] if len(action) > 1 else action.encode()
    for side, books in (("bid", bids), ("ask", asks)):
        for k in range(levels):
            out[f"{side}_px_{k:02}"] = [b[k][0] if k < len(b) else NONE for b in books]
            out[f"{side}_sz_{k:02}"] = [b[k][1] if k < len(b) else 7 for b in books]  # 7: of no price, so of no meaning
    return out


def same(a: BookSnapshots, b: BookSnapshots, n: int | None = None) -> bool:
    return all(np.array_equal(getattr(a, name)[:n], getattr(b, name)[:n]) for name in ARRAYS)


@pytest.mark.parametrize(
    ("ours", "vendor", "size"),
    [
        (MBP10_DTYPE, databento_dbn.MBP10Msg, 368),
        (MBP1_DTYPE, databento_dbn.MBP1Msg, 80),
        (MBO_DTYPE, databento_dbn.MBOMsg, 56),
    ],
)
def test_layouts_are_the_vendors(ours: np.dtype, vendor: type, size: int) -> None:
    assert ours == np.dtype(vendor._dtypes)  # type: ignore[attr-defined]
    assert ours.itemsize == vendor.size_hint == size  # type: ignore[attr-defined]


@pytest.mark.parametrize("schema", ["mbo", "mbp-10", "mbp-1"])
def test_samples_of_every_version_decode_as_the_vendor_decodes_them(real_data: Path, schema: str) -> None:
    paths = [
        p for p in (real_data / "dbn-schemas").iterdir() if f"test_data.{schema}." in p.name and ".frag" not in p.name
    ]
    assert len(paths) >= 5
    for path in paths:
        expected = databento.DBNStore.from_file(path).to_ndarray()
        found = read_records(path)
        assert np.array_equal(found, expected.astype(found.dtype)), path.name
        parts = [part.copy() for part in stream_records(path, chunk_records=1)]
        assert np.array_equal(np.concatenate(parts), found), path.name


def test_last_book_of_each_bucket_by_hand() -> None:
    times = [T0, T0 + 249 * MS, T0 + 250 * MS, T0 + 900 * MS]
    bids = [[(100, 5)], [(100, 4), (99, 9)], [(101, 1)], []]
    asks = [[(102, 6)], [(102, 6)], [(101, 2)], [(102, 3)]]
    book = snapshots_of_records(mbp(times, bids, asks, "AAMR"), 1)
    assert book.ts_ns.tolist() == [T0 + 249 * MS, T0 + 250 * MS, T0 + 900 * MS]
    assert book.bid_px_e9[:, :3].tolist() == [[100, 99, NONE], [101, NONE, NONE], [NONE, NONE, NONE]]
    assert book.bid_sz[:, :3].tolist() == [[4, 9, 0], [1, 0, 0], [0, 0, 0]]
    assert book.ask_sz[:, 0].tolist() == [6, 2, 3]
    (counts,) = book.counts
    assert (counts.records, counts.crossed, counts.undefined_top, counts.clears) == (4, 1, 1, 1)
    assert (counts.first_ns, counts.last_ns) == (T0, T0 + 900 * MS)


def test_a_record_received_late_makes_no_snapshot_known_early() -> None:
    times = [T0 + 600 * MS, T0 + 100 * MS, T0 + 700 * MS]
    book = snapshots_of_records(mbp(times, [[(1, 1)], [(2, 2)], [(3, 3)]], [[(9, 1)]] * 3), 1)
    assert book.ts_ns.tolist() == [T0 + 700 * MS]
    assert book.counts[0].reversals == 1
    book = snapshots_of_records(mbp(times[:2], [[(1, 1)], [(2, 2)]], [[(9, 1)]] * 2), 1)
    assert (book.ts_ns.tolist(), book.bid_sz[:, 0].tolist()) == ([T0 + 600 * MS], [2])


def test_the_range_holds_its_start_and_not_its_end() -> None:
    records = mbp([T0, T0 + 10**9, T0 + 2 * 10**9], [[(1, 1)]] * 3, [[(2, 1)]] * 3)
    book = snapshots_of_records(records, 1, start_ns=T0 + 10**9, end_ns=T0 + 2 * 10**9)
    assert book.ts_ns.tolist() == [T0 + 10**9]


def test_no_records_and_no_time() -> None:
    book = snapshots_of_records(mbp([], [], []), 1)
    assert len(book) == 0
    assert book.counts[0].first_ns is None
    with pytest.raises(MarketDataError, match="undefined receive time"):
        snapshots_of_records(mbp([2**64 - 1], [[(1, 1)]], [[(2, 1)]]), 1)
    with pytest.raises(ValueError, match="bucket_ms"):
        snapshots_of_records(mbp([], [], []), 1, bucket_ms=0)
    with pytest.raises(ValueError, match="hold no book"):
        snapshots_of_records(mbo([("A", 1, "B", 5, 1)]), 1)


def test_files_join_in_order_only() -> None:
    one, two = (snapshots_of_records(mbp([t], [[(1, 1)]], [[(2, 1)]]), 1) for t in (T0, T0 + 10**9))
    joined = BookSnapshots.join([one, two])
    assert joined.ts_ns.tolist() == [T0, T0 + 10**9]
    assert len(joined.counts) == 2
    with pytest.raises(MarketDataError, match="do not overlap"):
        BookSnapshots.join([two, one])
    with pytest.raises(ValueError, match="same bucket"):
        BookSnapshots.join([])


def plain_snapshots(
    records: NDArray[np.void], instrument_id: int, bucket_ns: int, start: int, end: int, levels: int
) -> dict:
    """The definition of `book_snapshots`, one record after the other."""
    latest, kept = 0, {}
    counts = dict.fromkeys(("records", "crossed", "undefined_top", "reversals", "clears"), 0)
    for r in records[records["instrument_id"] == instrument_id]:
        late = int(r["ts_recv"]) < latest
        now = max(latest, int(r["ts_recv"]))
        if now >= end:
            break
        if now < start:
            continue
        latest = now
        bid, ask = int(r["bid_px_00"]), int(r["ask_px_00"])
        counts["records"] += 1
        counts["reversals"] += late
        counts["clears"] += r["action"] == b"R"
        counts["undefined_top"] += NONE in (bid, ask)
        counts["crossed"] += NONE not in (bid, ask) and bid >= ask
        row = [now]
        for side in ("bid", "ask"):
            prices = [int(r[f"{side}_px_{k:02}"]) for k in range(levels)]
            row.append(prices)
            row.append([0 if p == NONE else int(r[f"{side}_sz_{k:02}"]) for k, p in enumerate(prices)])
        kept[now // bucket_ns] = row
    return {"rows": list(kept.values()), "counts": counts}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streamed_snapshots_agree_with_a_plain_loop(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    n = data.draw(st.integers(1, 40))
    levels = data.draw(st.sampled_from([10, 1]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    times = T0 + np.cumsum(rng.integers(-30, 200, n)) * MS
    book = [
        [[(int(p), int(rng.integers(0, 50))) for p in rng.integers(1, 9, rng.integers(0, 11))] for _ in range(n)]
        for _ in "ba"
    ]
    records = mbp(times.tolist(), *book, "".join(rng.choice(list("ACMRT"), n)), levels=levels)  # type: ignore[arg-type]
    records["instrument_id"] = rng.choice([1, 2], n, p=[0.8, 0.2])
    start, end = (int(T0 + data.draw(st.integers(-500, 4000)) * MS) for _ in "se")
    path = tmp_path_factory.getbasetemp() / "twin.dbn"
    path.write_bytes(
        dbn_bytes(records, f"mbp-{levels}", start_ns=T0, end_ns=T0 + 10**10, compress=data.draw(st.booleans()))
    )
    bucket_ms = data.draw(st.sampled_from([1, 100, 250]))
    found = book_snapshots(
        path, 1, bucket_ms=bucket_ms, start_ns=start, end_ns=end, chunk_records=data.draw(st.integers(1, 9))
    )
    expected = plain_snapshots(records, 1, bucket_ms * MS, start, end, levels)
    assert [list(row) for row in zip(*(getattr(found, name).tolist() for name in ARRAYS), strict=True)] == expected[
        "rows"
    ]
    (counts,) = found.counts
    assert {k: getattr(counts, k) for k in expected["counts"]} == expected["counts"]


def test_send_times_between_the_records_are_skipped(tmp_path: Path) -> None:
    records = mbp([T0, T0 + 10**9], [[(1, 1)], [(2, 2)]], [[(8, 3)], [(9, 4)]])
    expected = snapshots_of_records(records, 1)
    records["length"] += 2
    wide = np.full((2, 376), 0xAB, np.uint8)
    wide[:, :368] = records.view(np.uint8).reshape(2, 368)
    plain = dbn_bytes(records, "mbp-10", compress=False)
    header = bytearray(plain[: len(plain) - records.nbytes])
    meta = databento_dbn.Metadata.decode(bytes(header))
    meta = databento_dbn.Metadata(
        dataset=meta.dataset, start=meta.start, stype_in=meta.stype_in, stype_out=meta.stype_out, schema=meta.schema,
        symbols=meta.symbols, partial=[], not_found=[], mappings=[], ts_out=True, version=3,
    )  # fmt: skip
    path = tmp_path / "sent.dbn"
    path.write_bytes(bytes(meta.encode()) + wide.tobytes())
    assert same(book_snapshots(path, 1), expected)


def test_other_schemas_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.dbn"
    path.write_bytes(dbn_bytes(mbo([("A", 1, "B", 5, 1)]), "mbo", start_ns=T0, end_ns=T0 + 1))
    with pytest.raises(MarketDataError, match=r"schema 'mbo' is not read here.*mbp-10, mbp-1"):
        book_snapshots(path, 1)
    with pytest.raises(MarketDataError, match="no such file"):
        book_snapshots(tmp_path / "nothing.dbn", 1)


def real(real_data: Path, schema: str) -> Path:
    path = real_data / "es-book-2023" / f"glbx-mdp3-20231225.{schema}.dbn.zst"
    if not path.is_file():
        pytest.skip("the ESH4 order book of 2023-12-25 is not among the real data")
    return path


def test_real_orders_rebuild_the_published_book_byte_for_byte(real_data: Path) -> None:
    published = read_records(real(real_data, "mbp-10"))
    built = build_mbp10(read_records(real(real_data, "mbo")))
    assert len(built) == 40_037
    for name in MBP10_DTYPE.names or ():
        assert np.array_equal(built[name], published[name]), name
    trades = read_records(real(real_data, "trades"))
    for name in ("ts_recv", "price", "size", "side", "sequence"):
        assert np.array_equal(built[name][built["action"] == b"T"], trades[name]), name


def test_real_file_streams_to_the_same_snapshots_as_its_records(real_data: Path) -> None:
    path = real(real_data, "mbp-10")
    streamed, whole = book_snapshots(path, ESH4), snapshots_of_records(read_records(path), ESH4)
    assert same(streamed, whole)
    (counts,) = streamed.counts
    assert (counts.records, counts.other_records, counts.reversals, counts.clears) == (40_037, 0, 0, 0)
    assert counts.crossed == 144  # the book before the opening auction
    expected = np.unique(read_records(path)["ts_recv"] // np.uint64(250 * MS))
    assert np.array_equal(streamed.ts_ns // (250 * MS), expected)


def test_truncation_anywhere_is_an_error(real_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.dbn.zst"
    for schema in ("mbp-10", "mbo"):
        raw = real(real_data, schema).read_bytes()
        for percent in range(0, 100, 5):
            path.write_bytes(raw[: len(raw) * percent // 100])
            with pytest.raises(MarketDataError, match=r"cut\.dbn\.zst"):
                book_snapshots(path, ESH4) if schema == "mbp-10" else list(stream_records(path))
    path.write_bytes(real(real_data, "mbp-10").read_bytes()[:-1])
    with pytest.raises(MarketDataError):
        book_snapshots(path, ESH4)


def test_damage_inside_a_file_is_the_typed_error(real_data: Path, tmp_path: Path) -> None:
    raw = bytearray(real(real_data, "mbp-10").read_bytes())
    path = tmp_path / "bad.dbn.zst"
    rng = np.random.default_rng(1)
    refused = 0
    for at in rng.integers(0, len(raw), 40):
        damaged = bytearray(raw)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        try:
            book_snapshots(path, ESH4)
        except MarketDataError:
            refused += 1
    assert refused >= 20


def test_uncompressed_records_cut_off_are_an_error(tmp_path: Path) -> None:
    raw = dbn_bytes(
        mbp([T0, T0 + 1], [[(1, 1)]] * 2, [[(2, 1)]] * 2), "mbp-10", start_ns=T0, end_ns=T0 + 9, compress=False
    )
    path = tmp_path / "a.dbn"
    for n in (1, 7, 300, 367, 369):
        path.write_bytes(raw[:-n])
        with pytest.raises(MarketDataError, match="cut off"):
            book_snapshots(path, 1)


def test_a_record_of_another_type_is_named_by_its_number(tmp_path: Path) -> None:
    records = mbp([T0] * 6, [[(1, 1)]] * 6, [[(2, 1)]] * 6)
    records["rtype"][4] = 0x13
    path = tmp_path / "a.dbn.zst"
    path.write_bytes(dbn_bytes(records, "mbp-10"))
    with pytest.raises(MarketDataError, match="record 4 has type 19 and length 92"):
        book_snapshots(path, 1, chunk_records=3)


def test_cutting_the_input_off_leaves_earlier_snapshots_alone(real_data: Path) -> None:
    records = read_records(real(real_data, "mbp-10"))
    whole = snapshots_of_records(records, ESH4)
    for k in np.linspace(1, len(records) - 1, 40).astype(int):
        t = int(records["ts_recv"][k])
        part = snapshots_of_records(records[:k], ESH4)
        closed = int(np.searchsorted(whole.ts_ns, t // whole.bucket_ns * whole.bucket_ns))
        assert same(part, whole, closed)
        assert same(part, snapshots_of_records(records, ESH4, end_ns=t)) or records["ts_recv"][k - 1] == t
        assert len(part) <= closed + 1


def mbo(orders: Sequence[tuple[str, int, str, int, int]], last: Sequence[bool] | None = None) -> NDArray[np.void]:
    """MBO_DTYPE records of (action, order id, side, price, size), each an event of its own unless `last` says otherwise."""
    out = np.zeros(len(orders), MBO_DTYPE)
    out["length"], out["rtype"], out["instrument_id"] = 14, 160, 1
    out["ts_recv"] = out["ts_event"] = T0 + np.arange(len(orders))
    out["sequence"] = np.arange(len(orders))
    out["flags"] = LAST_OF_EVENT if last is None else np.where(last, LAST_OF_EVENT, 0)
    for k, (action, order_id, side, price, size) in enumerate(orders):
        out[k]["action"], out[k]["side"] = action.encode(), side.encode()
        out[k]["order_id"], out[k]["price"], out[k]["size"] = order_id, price, size
    return out


def test_orders_make_levels_by_hand() -> None:
    built = build_mbp10(
        mbo(
            [
                ("A", 1, "B", 100, 5),
                ("A", 2, "B", 100, 3),
                ("A", 3, "A", 101, 4),
                ("T", 0, "B", 101, 3),  # with the book before the fill
                ("F", 3, "A", 101, 3),
                ("C", 3, "A", 101, 3),  # a partial cancel, as a fill is reported
                ("M", 2, "B", 99, 7),
                ("N", 0, "N", NONE, 0),
                ("R", 0, "N", NONE, 0),
            ],
            [True, True, True, False, False, True, True, True, True],
        )
    )
    assert built["action"].tolist() == [b"A", b"A", b"A", b"T", b"C", b"M", b"R"]
    assert built["bid_px_00"].tolist() == [100, 100, 100, 100, 100, 100, NONE]
    assert built["bid_sz_00"].tolist() == [5, 8, 8, 8, 8, 5, 0]
    assert built["bid_ct_00"].tolist() == [1, 2, 2, 2, 2, 1, 0]
    assert built["bid_sz_01"].tolist() == [0, 0, 0, 0, 0, 7, 0]
    assert built["ask_sz_00"].tolist() == [0, 0, 4, 4, 1, 1, 0]
    assert built["sequence"].tolist() == [0, 1, 2, 3, 5, 6, 8]


def test_changes_below_the_tenth_level_make_no_record() -> None:
    orders = [("A", k, "B", 100 - k, 1) for k in range(10)]
    assert len(build_mbp10(mbo([*orders, ("A", 50, "B", 90, 1)]))) == 10
    built = build_mbp10(mbo([*orders, ("A", 50, "B", 90, 2), ("C", 0, "B", 100, 1)]))
    assert (len(built), int(built["bid_px_09"][-1]), int(built["bid_sz_09"][-1])) == (11, 90, 2)


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ([("C", 1, "B", 5, 1)], "record 0 cancels an order that is not in the book"),
        ([("A", 1, "B", 5, 1), ("C", 1, "B", 5, 2)], "record 1 cancels more than is left"),
        ([("A", 1, "B", 5, 1), ("A", 1, "B", 6, 1)], "record 1 adds an order that is in the book"),
        ([("A", 1, "B", NONE, 1)], "record 0 puts an order without a price"),
        ([("A", 1, "N", 5, 1)], "record 0 puts an order without a price or a side"),
    ],
)
def test_incomplete_orders_are_refused(orders: list, message: str) -> None:
    with pytest.raises(MarketDataError, match=message):
        build_mbp10(mbo(orders))


def test_orders_of_two_contracts_are_refused_and_no_orders_are_no_records() -> None:
    two = mbo([("A", 1, "B", 5, 1), ("A", 2, "B", 5, 1)])
    two["instrument_id"][1] = 2
    with pytest.raises(MarketDataError, match="of 2 contracts"):
        build_mbp10(two)
    assert len(build_mbp10(mbo([]))) == 0


def plain_books(records: NDArray[np.void]) -> list[list[int]]:
    """The definition of `build_mbp10` on dictionaries: sequence, then price, size, count of bid and ask by level."""
    held: dict[int, tuple[bytes, int, int]] = {}

    def top() -> list[int]:
        out = []
        for side in (b"B", b"A"):
            prices = sorted({p for s, p, _ in held.values() if s == side}, reverse=side == b"B")[:10]
            for p in prices:
                sizes = [z for s, q, z in held.values() if s == side and q == p]
                out += [p, sum(sizes), len(sizes)]
            out += [NONE, 0, 0] * (10 - len(prices))
        return out

    out, before = [], top()
    for r in records:
        order, price, size = int(r["order_id"]), int(r["price"]), int(r["size"])
        match r["action"]:
            case b"T":
                out.append([int(r["sequence"]), *top()])
            case b"A" | b"M":
                held[order] = (r["side"], price, size)
            case b"C" if size == held[order][2]:
                del held[order]
            case b"C":
                held[order] = (*held[order][:2], held[order][2] - size)
            case b"R":
                held.clear()
        if r["flags"] & LAST_OF_EVENT:
            if top() != before:
                out.append([int(r["sequence"]), *top()])
            before = top()
    return out


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_built_books_agree_with_dictionaries(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    prices = data.draw(st.sampled_from([3, 30]))
    live: dict[int, int] = {}
    orders, number = [], 0
    for _ in range(data.draw(st.integers(1, 80))):
        action = str(rng.choice(list("ACMTFRN"), p=[0.5, 0.17, 0.2, 0.05, 0.03, 0.02, 0.03]))
        side, price, size = str(rng.choice(list("AB"))), int(rng.integers(1, prices + 1)), int(rng.integers(1, 6))
        order = int(rng.choice(list(live))) if live else 0
        if action == "A" or (action == "M" and (not live or rng.random() < 0.2)):
            order = number = number + 1
        if action in "AM":
            live[order] = size
        elif action == "C":
            if not live:
                continue
            size = int(rng.integers(1, live[order] + 1))
            live[order] -= size
            if not live[order]:
                del live[order]
        elif action == "R":
            live.clear()
        orders.append((action, order, side, price, size))
    records = mbo(orders, (rng.random(len(orders)) < 0.7).tolist())
    names = [f"{s}_{part}_{k:02}" for s in ("bid", "ask") for k in range(10) for part in ("px", "sz", "ct")]
    built = build_mbp10(records)
    assert [[int(r["sequence"]), *(int(r[n]) for n in names)] for r in built] == plain_books(records)
