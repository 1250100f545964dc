"""Option trades in: from DBN trades joined with definitions and quotes, or from flat CSV files, as columns in receive order."""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import lru_cache
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import polars as pl
from numba import njit
from numpy.typing import NDArray

from spymaster_assets.errors import MarketDataError
from spymaster_assets.market.dbn import SCHEMAS, UNDEFINED_PRICE, UNDEFINED_TIME, read_header, read_records
from spymaster_assets.settings import DAY_NS

EPOCH_ORDINAL = date(1970, 1, 1).toordinal()
STRIKE_DIGIT_E9 = 1_000_000
"""Tickers state strikes in thousandths; one is this many 1e-9 units."""


def _layout(itemsize: int, **places: tuple[int, str]) -> np.dtype:
    return np.dtype(
        {
            "names": list(places),
            "formats": [kind for _, kind in places.values()],
            "offsets": [at for at, _ in places.values()],
            "itemsize": itemsize,
        }
    )


_HEAD = {"length": (0, "u1"), "rtype": (1, "u1"), "publisher_id": (2, "<u2"), "instrument_id": (4, "<u4")}
DEFINITION_DTYPES: dict[int, np.dtype] = {
    1: _layout(
        360, **_HEAD, ts_recv=(16, "<u8"), expiration=(40, "<u8"), raw_symbol=(200, "S22"), underlying=(300, "S21"),
        instrument_class=(325, "S1"), strike_price=(328, "<i8"),
    ),
    2: _layout(
        400, **_HEAD, ts_recv=(16, "<u8"), expiration=(40, "<u8"), strike_price=(112, "<i8"), raw_symbol=(200, "S71"),
        underlying=(349, "S21"), instrument_class=(374, "S1"),
    ),
    3: _layout(
        520, **_HEAD, ts_recv=(16, "<u8"), expiration=(40, "<u8"), strike_price=(104, "<i8"), raw_symbol=(238, "S71"),
        underlying=(391, "S21"), instrument_class=(487, "S1"),
    ),
}  # fmt: skip
"""The fields of `definition` records that are read here, by DBN version."""
QUOTE_DTYPE = _layout(
    80, **_HEAD, price=(16, "<i8"), size=(24, "<u4"), side=(29, "S1"), ts_recv=(32, "<u8"),
    bid_px_00=(48, "<i8"), ask_px_00=(56, "<i8"),
)  # fmt: skip
"""What tbbo, mbp-1, cmbp-1 and cbbo records have in common; 80 bytes in all DBN versions."""
STATISTICS_DTYPES: dict[int, np.dtype] = {
    **dict.fromkeys(
        (1, 2),
        _layout(
            64, **_HEAD, ts_recv=(16, "<u8"), quantity=(40, "<i4"), stat_type=(52, "<u2"), update_action=(56, "u1")
        ),
    ),
    3: _layout(80, **_HEAD, ts_recv=(16, "<u8"), quantity=(40, "<i8"), stat_type=(56, "<u2"), update_action=(60, "u1")),
}
"""The fields of `statistics` records that are read here, by DBN version."""
_OPEN_INTEREST, _NEW_STATISTIC = 9, 1
QUOTED_TRADE_SCHEMAS = {"tbbo": (QUOTE_DTYPE, 0x01), "tcbbo": (QUOTE_DTYPE, 0xC2)}
"""Trades that carry the quote before them."""
VENUE_QUOTE_SCHEMAS = {"mbp-1": (QUOTE_DTYPE, 0x01)}
"""Quotes of the publisher that sends them, so that a trade meets its own publisher's."""
CONSOLIDATED_QUOTE_SCHEMAS = {
    "cmbp-1": (QUOTE_DTYPE, 0xB1),
    "cbbo-1s": (QUOTE_DTYPE, 0xC0),
    "cbbo-1m": (QUOTE_DTYPE, 0xC1),
}
"""Quotes of all publishers together."""
CSV_COLUMNS = ("ticker", "price", "size", "sip_timestamp", "sequence_number")
_OPTION_NAME = re.compile(r"[ \d][CP] ?\d")
"""Right and strike in the raw symbol of an option (`SPY   240201C00480000`, `ESH4 C4900`); outrights and spreads have none."""
_PLAUSIBLE_NS = (date(2000, 1, 1), date(2100, 1, 1))
_CSV_REMEDY = "download the flat file again, or drop the row if the vendor confirms the fault"


@dataclass(frozen=True)
class OptionTrades:
    """Option trades in receive order, arrays (n,).

    ts_ns: receive time, UTC. contract: index into `symbols`. strike_e9, price_e9, bid_e9, ask_e9: 1e-9 dollars (quotes from
    before the trade, UNDEFINED_PRICE where unknown). is_call. expiry: date ordinal. size: contracts. side: that of the
    aggressor as the feed tells it, +1 buyer, -1 seller, 0 unknown. undefined: option trades of the input that no definition names.
    """

    ts_ns: NDArray[np.int64]
    contract: NDArray[np.int64]
    strike_e9: NDArray[np.int64]
    is_call: NDArray[np.bool_]
    expiry: NDArray[np.int64]
    price_e9: NDArray[np.int64]
    size: NDArray[np.int64]
    bid_e9: NDArray[np.int64]
    ask_e9: NDArray[np.int64]
    side: NDArray[np.int8]
    symbols: tuple[str, ...]
    undefined: int = 0

    def __len__(self) -> int:
        return len(self.ts_ns)

    def take(self, rows: NDArray[np.bool_] | NDArray[np.int64] | slice) -> OptionTrades:
        """The trades that a mask, index array or slice selects; contract indices keep their meaning."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _TRADE_COLUMNS})

    @classmethod
    def join(cls, parts: Sequence[OptionTrades], names: Sequence[str]) -> OptionTrades:
        """One feed of the parts of several files in receive order; names: of the files, for the error.

        Raises MarketDataError when two parts have trades of one contract in the same time: one of them repeats the other.
        """
        if len(parts) == 1:
            return parts[0]
        symbols = tuple(sorted({s for part in parts for s in part.symbols}))
        number = {s: n for n, s in enumerate(symbols)}
        parts = [
            replace(
                p, contract=np.array([number[s] for s in p.symbols], np.int64)[p.contract] if len(p) else p.contract
            )
            for p in parts
        ]
        for (a, one), (b, two) in combinations(zip(names, parts, strict=True), 2):
            _refuse_repeat(a, one, b, two)
        ts_ns = np.concatenate([p.ts_ns for p in parts])
        columns = {name: np.concatenate([getattr(p, name) for p in parts]) for name in _TRADE_COLUMNS}
        whole = cls(**columns, symbols=symbols, undefined=sum(p.undefined for p in parts))
        return whole.take(np.argsort(ts_ns, kind="stable"))


_TRADE_COLUMNS = tuple(f.name for f in fields(OptionTrades) if f.name not in ("symbols", "undefined"))


def _refuse_repeat(a: str, one: OptionTrades, b: str, two: OptionTrades) -> None:
    for contract in np.intersect1d(one.contract, two.contract):
        x, y = one.ts_ns[one.contract == contract], two.ts_ns[two.contract == contract]
        if max(x[0], y[0]) <= min(x[-1], y[-1]):
            raise MarketDataError(
                f"two files bring the option trades of one session: {one.symbols[int(contract)].strip()} trades in both at once",
                where=f"{a}, {b}",
                expected="files whose trades do not overlap",
                remedy="delete the one that repeats the other",
            )


@dataclass(frozen=True)
class OpenInterest:
    """Contracts open before the session, arrays (k,): strike_e9 in 1e-9 dollars, is_call, contracts."""

    strike_e9: NDArray[np.int64]
    is_call: NDArray[np.bool_]
    contracts: NDArray[np.int64]


@dataclass(frozen=True)
class OptionDefinitions:
    """Instruments of definition files, arrays (m,) sorted by instrument id; `wanted` marks options of the root asked for."""

    instrument_id: NDArray[np.int64]
    raw_symbol: NDArray[np.bytes_]
    strike_e9: NDArray[np.int64]
    is_call: NDArray[np.bool_]
    expiry: NDArray[np.int64]
    wanted: NDArray[np.bool_]


def read_definitions(paths: Path | Sequence[Path], root: str) -> OptionDefinitions:
    """Definitions of one or more DBN files of any version; `wanted` is true for puts and calls on `root` or its futures.

    An adjusted contract (root SPY1) has the underlying SPY too, but delivers something else: it is not wanted.
    Raises MarketDataError when a file is damaged, an option lacks strike or expiry, or an id has two meanings in one file or two.
    """
    paths = (paths,) if isinstance(paths, Path) else tuple(paths)
    parts = [_wanted_of(path, root) for path in paths]
    if len(parts) == 1:
        return parts[0]
    columns = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(OptionDefinitions)}
    file = np.repeat(np.arange(len(parts)), [len(p.instrument_id) for p in parts])
    order = np.argsort(columns["instrument_id"], kind="stable")
    file, columns = file[order], {name: values[order] for name, values in columns.items()}
    ids = columns["instrument_id"]
    same = ids[1:] == ids[:-1]
    for name, values in columns.items():
        clash = same & (values[1:] != values[:-1])
        if clash.any():
            at = int(clash.argmax())
            raise MarketDataError(
                f"instrument id {int(ids[at])} has another {name} in one definition file than in the other",
                where=f"{paths[file[at]]}, {paths[file[at + 1]]}",
                expected="one meaning an id",
                remedy="delete the file that is of another day: ids are given out anew each day",
            )
    first = np.append(True, ~same)[: len(ids)]
    return OptionDefinitions(**{name: values[first] for name, values in columns.items()})


def _wanted_of(path: Path, root: str) -> OptionDefinitions:
    try:
        told = path.stat()
    except OSError:
        raise MarketDataError("no such file", where=str(path), remedy="check SPYMASTER_DBN_DIR") from None
    definitions, underlying = _definitions(path, told.st_size, told.st_mtime_ns)
    symbol = definitions.raw_symbol
    occ = np.char.str_len(symbol) == 21  # root padded to 6, YYMMDD, C or P, 8-digit strike
    own_root = ~occ | (np.char.rstrip(symbol.astype("S6")) == root.encode())
    return replace(definitions, wanted=definitions.wanted & _is_underlying(underlying, root) & own_root)


@lru_cache(maxsize=8)
def _definitions(path: Path, size_bytes: int, mtime_ns: int) -> tuple[OptionDefinitions, NDArray[np.bytes_]]:
    """Definitions with every option wanted, and the underlying of each; read once as long as the file is the same."""
    header = read_header(path)
    records = read_records(path, {"definition": (DEFINITION_DTYPES[header.version], 0x13)})
    records = records[np.argsort(records["instrument_id"], kind="stable")]
    right = records["instrument_class"]
    option = (right == b"C") | (right == b"P")
    bad = option & ((records["strike_price"] == UNDEFINED_PRICE) | (records["expiration"] == UNDEFINED_TIME))
    ids = records["instrument_id"].astype(np.int64)
    if bad.any():
        raise MarketDataError(
            f"option {int(ids[bad.argmax()])} has no strike or no expiration",
            where=str(path),
            remedy="download the definitions again",
        )
    same = ids[1:] == ids[:-1]
    for name in ("strike_price", "instrument_class", "expiration", "raw_symbol"):
        clash = same & (records[name][1:] != records[name][:-1])
        if clash.any():
            raise MarketDataError(
                f"instrument id {int(ids[clash.argmax()])} has two values of {name}",
                where=str(path),
                expected="one meaning an id",
                remedy="use one definition file a day: ids are given out anew each day",
            )
    records = records[np.append(~same, True)] if len(records) else records
    right = records["instrument_class"]
    # copies: views would keep the whole file in memory
    definitions = OptionDefinitions(
        instrument_id=records["instrument_id"].astype(np.int64),
        raw_symbol=records["raw_symbol"].copy(),
        strike_e9=records["strike_price"].astype(np.int64),
        is_call=right == b"C",
        # OPRA states an expiration as midnight UTC of its date, which is the day before in New York
        expiry=(records["expiration"] // np.uint64(DAY_NS)).astype(np.int64) + EPOCH_ORDINAL,
        wanted=(right == b"C") | (right == b"P"),
    )
    return definitions, records["underlying"].copy()


def _is_underlying(names: NDArray[np.bytes_], root: str) -> NDArray[np.bool_]:
    """Whether each underlying (n,) is `root` or one of its futures contracts, as options on futures state it."""
    distinct, inverse = np.unique(names, return_inverse=True)
    pattern = re.compile(re.escape(root) + r"([FGHJKMNQUVXZ]\d{1,2})?")
    return np.array([bool(pattern.fullmatch(name.decode(errors="replace"))) for name in distinct], bool)[inverse]


def read_open_interest(
    paths: Path | Sequence[Path], definitions: OptionDefinitions, expiry: date, until_ns: int
) -> OpenInterest:
    """Open interest of the wanted options of one expiry from `statistics` files, as last published before until_ns.

    Every venue repeats the same number, so the last one of a contract counts. Raises MarketDataError when a file is damaged.
    """
    parts = []
    for path in (paths,) if isinstance(paths, Path) else paths:
        records = read_records(path, {"statistics": (STATISTICS_DTYPES[read_header(path).version], 0x18)})
        told = (records["stat_type"] == _OPEN_INTEREST) & (records["update_action"] == _NEW_STATISTIC)
        records = records[told & (records["ts_recv"] < np.uint64(until_ns))]
        parts.append({name: records[name].astype(np.int64) for name in ("ts_recv", "instrument_id", "quantity")})
    columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    order = np.argsort(columns["ts_recv"], kind="stable")
    ids, quantity = columns["instrument_id"][order], columns["quantity"][order]
    at = np.minimum(np.searchsorted(definitions.instrument_id, ids), max(len(definitions.instrument_id) - 1, 0))
    mine = np.zeros(len(ids), bool)
    if len(definitions.instrument_id):
        mine = (definitions.instrument_id[at] == ids) & definitions.wanted[at]
        mine &= definitions.expiry[at] == expiry.toordinal()
    at, quantity = at[mine], quantity[mine]
    # the first of the reversed rows is the last published
    contract, last = np.unique(at[::-1], return_index=True)
    return OpenInterest(definitions.strike_e9[contract], definitions.is_call[contract], quantity[::-1][last])


def option_trades_from_dbn(
    trades_path: Path,
    definitions_paths: Path | Sequence[Path],
    root: str,
    expiry: date | None = None,
    quotes_paths: Sequence[Path] = (),
    received_ns: tuple[int, int] | None = None,
) -> OptionTrades:
    """Trades of options on `root` (all expiries, or one) from a DBN file of schema trades, tbbo or tcbbo.

    The file may hold other instruments too: the definitions, of one or more files, say by id what is taken. quotes_paths (mbp-1, cmbp-1,
    cbbo-1s or cbbo-1m, all of one schema) give each trade the last quote received strictly before it; tbbo and tcbbo bring their own.
    Of records outside of received_ns (from, until) nothing is taken or counted. Raises MarketDataError when a file is damaged.
    """
    definitions = read_definitions(definitions_paths, root)
    records = read_records(trades_path, {"trades": SCHEMAS["trades"], **QUOTED_TRADE_SCHEMAS})
    if received_ns is not None:
        from_ns, until_ns = (np.uint64(t) for t in received_ns)
        records = records[(records["ts_recv"] >= from_ns) & (records["ts_recv"] < until_ns)]
    ids = records["instrument_id"].astype(np.int64)
    at = np.searchsorted(definitions.instrument_id, ids)
    known = at < len(definitions.instrument_id)
    known[known] = definitions.instrument_id[at[known]] == ids[known]
    undefined = _undefined_options(ids[~known], trades_path)
    records, at = records[known], at[known]
    keep = definitions.wanted[at]
    if expiry is not None:
        keep &= definitions.expiry[at] == expiry.toordinal()
    records, at = records[keep], at[keep]
    used, contract = np.unique(at, return_inverse=True)
    ts_ns = records["ts_recv"].astype(np.int64)
    if "bid_px_00" in (records.dtype.names or ()):
        bid, ask = records["bid_px_00"].astype(np.int64), records["ask_px_00"].astype(np.int64)
    elif quotes_paths:
        bid, ask = _joined_quotes(records, ts_ns, quotes_paths)
    else:
        bid = ask = np.full(len(records), UNDEFINED_PRICE, np.int64)
    side = records["side"]
    return OptionTrades(
        ts_ns=ts_ns,
        contract=contract.astype(np.int64),
        strike_e9=definitions.strike_e9[at],
        is_call=definitions.is_call[at],
        expiry=definitions.expiry[at],
        price_e9=records["price"].astype(np.int64),
        size=records["size"].astype(np.int64),
        bid_e9=bid,
        ask_e9=ask,
        side=(side == b"B").astype(np.int8) - (side == b"A").astype(np.int8),
        symbols=tuple(s.decode() for s in definitions.raw_symbol[used]),
        undefined=undefined,
    )


def _undefined_options(ids: NDArray[np.int64], path: Path) -> int:
    """How many trades (n,) of ids without a definition may be options': those that the file's header does not name as something else."""
    others = {s.instrument_id for s in read_header(path).symbols if not _OPTION_NAME.search(s.raw_symbol)}
    return int((~np.isin(ids, list(others))).sum())


def _joined_quotes(
    trades: NDArray[np.void], ts_ns: NDArray[np.int64], paths: Sequence[Path]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    schemas = {**VENUE_QUOTE_SCHEMAS, **CONSOLIDATED_QUOTE_SCHEMAS}
    parts = [read_records(path, schemas) for path in paths]
    quotes = parts[0]
    if len(parts) > 1:
        quotes = np.concatenate(parts)
        quotes = quotes[np.argsort(quotes["ts_recv"], kind="stable")]
    by_venue = read_header(paths[0]).schema in VENUE_QUOTE_SCHEMAS
    keys = []
    for records in (trades, quotes):
        key = records["instrument_id"].astype(np.int64)
        keys.append(key | records["publisher_id"].astype(np.int64) << 32 if by_venue else key)
    books, own = np.unique(keys[0], return_inverse=True)
    at = np.searchsorted(books, keys[1])
    hit = at < len(books)
    hit[hit] = books[at[hit]] == keys[1][hit]
    quotes = quotes[hit]
    return quotes_before(
        ts_ns,
        own.astype(np.int64),
        quotes["ts_recv"].astype(np.int64),
        at[hit].astype(np.int64),
        quotes["bid_px_00"].astype(np.int64),
        quotes["ask_px_00"].astype(np.int64),
    )


def quotes_before(
    ts_ns: NDArray[np.int64],
    contract: NDArray[np.int64],
    quote_ts_ns: NDArray[np.int64],
    quote_contract: NDArray[np.int64],
    bid_e9: NDArray[np.int64],
    ask_e9: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bid and ask (n,) of the same contract received strictly before each trade, UNDEFINED_PRICE before the first quote.

    ts_ns, contract: trades (n,); the other four: quotes (q,). Both in receive order.
    """
    contracts = 1 + max(int(contract.max(initial=-1)), int(quote_contract.max(initial=-1)))
    bid, ask = _quotes_before(ts_ns, contract, quote_ts_ns, quote_contract, bid_e9, ask_e9, contracts, UNDEFINED_PRICE)
    return bid, ask


@njit(cache=True)
def _quotes_before(ts, contract, quote_ts, quote_contract, bid, ask, contracts, undefined):  # type: ignore[no-untyped-def]
    n = len(ts)
    out_bid = np.full(n, undefined, np.int64)
    out_ask = np.full(n, undefined, np.int64)
    last = np.full(contracts, -1, np.int64)
    q = 0
    for i in range(n):
        while q < len(quote_ts) and quote_ts[q] < ts[i]:
            last[quote_contract[q]] = q
            q += 1
        k = last[contract[i]]
        if k >= 0:
            out_bid[i] = bid[k]
            out_ask[i] = ask[k]
    return out_bid, out_ask


def option_trades_from_csv(path: Path, root: str = "SPY", expiry: date | None = None) -> OptionTrades:
    """Trades of options on `root` (all expiries, or one) from a flat file `.csv` or `.csv.gz` with CSV_COLUMNS.

    A ticker is O: + root + YYMMDD + C or P + strike in thousandths, 8 digits; the root has to be exactly `root` (O:SPYG... is
    another one). sip_timestamp (UTC ns) is the receive time; rows are put into its order, then sequence_number's.
    The file tells neither quotes nor sides. Raises MarketDataError naming file, row and reason at the first malformed row.
    """
    try:
        # every column as text, or one odd cell would silently change what a whole column means
        rows = _scan(path).filter(pl.col("ticker").is_null() | pl.col("ticker").str.starts_with(f"O:{root}")).collect()
    except (OSError, EOFError, pl.exceptions.PolarsError) as error:
        raise _unreadable(path, error) from None
    parts = rows["ticker"].str.extract_groups(r"^O:(?<root>.+)(?<day>\d{6})(?<right>[CP])(?<strike>\d{8})$").struct
    first_ns, last_ns = ((d.toordinal() - EPOCH_ORDINAL) * DAY_NS for d in _PLAUSIBLE_NS)
    table = rows.select(
        pl.col("row"),
        pl.col("ticker"),
        parts.field("root").alias("root"),
        parts.field("right").alias("right"),
        ("20" + parts.field("day")).str.to_date("%Y%m%d", strict=False).alias("expiry"),
        parts.field("strike").cast(pl.Int64, strict=False).alias("strike"),
        pl.col("price").cast(pl.Float64, strict=False),
        pl.col("size").cast(pl.Int64, strict=False),
        pl.col("sip_timestamp").cast(pl.Int64, strict=False),
        pl.col("sequence_number").cast(pl.Int64, strict=False),
    )
    own = pl.col("root") == root
    checks = {
        "a missing ticker": pl.col("ticker").is_null(),
        "a ticker that is no option's": pl.col("ticker").is_not_null() & pl.col("root").is_null(),
        "an impossible expiry date": own & pl.col("expiry").is_null(),
        "a strike of zero": own & (pl.col("strike") <= 0),
        "a price that is no positive number": own
        & ~(pl.col("price").is_finite() & (pl.col("price") > 0)).fill_null(False),
        "a size that is no positive integer": own & ~(pl.col("size") > 0).fill_null(False),
        "a sip_timestamp that is not in nanoseconds": own
        & ~pl.col("sip_timestamp").is_between(first_ns, last_ns).fill_null(False),
        "a sequence_number that is no integer": own & pl.col("sequence_number").is_null(),
    }
    _refuse_malformed(path, rows, table, checks)
    wanted = own if expiry is None else own & (pl.col("expiry") == expiry)
    table = table.filter(wanted).sort("sip_timestamp", "sequence_number", "row")
    strike, is_call = table["strike"].to_numpy(), (table["right"] == "C").to_numpy()
    ordinal = table["expiry"].to_physical().to_numpy().astype(np.int64) + EPOCH_ORDINAL
    key = (ordinal * 2 + is_call) * 100_000_000 + strike
    _, first, contract = np.unique(key, return_index=True, return_inverse=True)
    unknown = np.full(table.height, UNDEFINED_PRICE, np.int64)
    return OptionTrades(
        ts_ns=table["sip_timestamp"].to_numpy(),
        contract=contract.astype(np.int64),
        strike_e9=strike * STRIKE_DIGIT_E9,
        is_call=is_call,
        expiry=ordinal,
        price_e9=np.rint(table["price"].to_numpy() * 1e9).astype(np.int64),
        size=table["size"].to_numpy(),
        bid_e9=unknown,
        ask_e9=unknown,
        side=np.zeros(table.height, np.int8),
        symbols=tuple(table["ticker"].gather(first)),
    )


def is_option_trades_csv(path: Path) -> bool:
    """Whether a flat file has the columns of trades and its first ticker is an option's; those of shares, quotes and bars are not.

    Raises MarketDataError when its first lines cannot be read.
    """
    try:
        with gzip.open(path, "rt") if path.name.endswith(".gz") else path.open() as lines:
            rows = list(islice(csv.DictReader(lines), 1))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise _unreadable(path, error) from None
    return any(set(CSV_COLUMNS) <= set(row) and (row["ticker"] or "").startswith("O:") for row in rows)


def names_option(path: Path, root: str, expiry: date) -> bool:
    """Whether a flat file has a ticker of `root` that expires then; raise MarketDataError when it cannot be read."""
    mine = pl.col("ticker").str.starts_with(f"O:{root}{expiry:%y%m%d}")
    try:
        return bool(_scan(path).filter(mine).head(1).collect().height)
    except (OSError, EOFError, pl.exceptions.PolarsError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> MarketDataError:
    return MarketDataError(
        f"cannot be read as CSV: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
        where=str(path),
        expected=f"a whole .csv or .csv.gz file with the columns {', '.join(CSV_COLUMNS)}",
        remedy="download the flat file again",
    )


def _scan(path: Path) -> pl.LazyFrame:
    """Lazy text columns of a flat file, with the number of each line as `row`."""
    frame = pl.scan_csv(path, infer_schema=False, row_index_name="row", row_index_offset=2, glob=False)
    names = frame.collect_schema().names()
    missing = [c for c in CSV_COLUMNS if c not in names]
    if missing:
        raise MarketDataError(
            f"the header lacks {', '.join(missing)}",
            where=f"{path}, row 1",
            expected=f"the columns {', '.join(CSV_COLUMNS)}",
            remedy="is this an options trades flat file?",
        )
    return frame.select("row", *CSV_COLUMNS)


def _refuse_malformed(path: Path, rows: pl.DataFrame, table: pl.DataFrame, checks: dict[str, pl.Expr]) -> None:
    flags = table.select(**{reason: check.fill_null(False) for reason, check in checks.items()})
    bad = flags.select(pl.any_horizontal(pl.all())).to_series()
    if not bad.any():
        return
    at = int(bad.arg_max() or 0)
    reason = next(name for name in checks if flags[name][at])
    text = ",".join("" if v is None else re.sub(r"\s", " ", str(v)) for v in rows.row(at)[1:])
    raise MarketDataError(
        f"{reason}: {text!r}; {int(bad.sum())} malformed rows in all",
        where=f"{path}, row {rows['row'][at]}",
        expected="ticker O:<root>YYMMDD[C|P]<8-digit strike>, positive price and size, nanosecond sip_timestamp",
        remedy=_CSV_REMEDY,
    )
