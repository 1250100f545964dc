"""Tables to Parquet bytes and back: sizes are judged before anything is decoded, and every fault is one typed error."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spymaster_assets.errors import ArtifactError, refusing

MAX_TABLE_BYTES = 4 << 30
"""Largest decoded table; a few kilobytes of run lengths can claim any number of rows."""


def parquet_bytes(
    frame: pl.DataFrame,
    level: int | None = None,
    *,
    statistics: bool = False,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """Parquet bytes of a table, compressed by zstd at a level (None: the library's own); equal for equal input."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd", compression_level=level, statistics=statistics, metadata=metadata)
    return buffer.getvalue()


def read_parquet(
    data: bytes, where: str, schema: Mapping[str, Any] | None = None, nullable: Collection[str] | None = None
) -> tuple[pl.DataFrame, dict[str, bytes]]:
    """Table and key-value metadata of Parquet bytes; raise ArtifactError when damaged, oversized or not as `require_schema` asks."""
    with refusing(ArtifactError, "not a readable Parquet file", where=where, remedy="materialize it again"):
        with pq.ParquetFile(io.BytesIO(data)) as file:  # Arrow reports failed allocations where Polars would abort
            about = file.metadata
            decoded = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
            if max(decoded, about.num_rows * about.num_columns) > MAX_TABLE_BYTES or about.num_rows < 0:
                raise ValueError(f"it claims {about.num_rows} rows and {decoded} bytes")
            found = file.schema_arrow
            texts = [f.name for f in found if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
        with pq.ParquetFile(io.BytesIO(data), read_dictionary=texts) as file:
            table = file.read()
        for name in texts:  # a dictionary of one long text and many rows is small until it is decoded
            longest = max((pc.max(pc.binary_length(c.dictionary)).as_py() or 0 for c in table[name].chunks), default=0)
            if longest * table.num_rows > MAX_TABLE_BYTES:
                raise ValueError(f"{name} claims {table.num_rows} texts of up to {longest} bytes")
        table = table.cast(pa.schema(found, metadata=None))
        table.validate(full=True)
        frame = pl.from_arrow(table.replace_schema_metadata(None))
        assert isinstance(frame, pl.DataFrame)
        metadata = {k.decode(): v for k, v in (about.metadata or {}).items()}
    if schema is not None:
        require_schema(frame, schema, where, nullable)
    return frame, metadata


def require_schema(
    frame: pl.DataFrame, schema: Mapping[str, Any], where: str, nullable: Collection[str] | None = None
) -> None:
    """Raise ArtifactError unless a table has exactly these columns and dtypes, in order, and nulls in `nullable` alone (None: anywhere)."""
    if list(frame.schema.items()) != list(schema.items()):
        odd = sorted(set(frame.schema.items()) ^ set(schema.items()), key=str)
        raise ArtifactError(
            f"the table has other columns than expected: {', '.join(f'{n} {t}' for n, t in odd[:5]) or 'another order'}",
            where=where,
            expected=f"{len(schema)} columns",
            remedy="materialize it again",
        )
    holes = [n for n in schema if nullable is not None and n not in nullable and frame[n].null_count()]
    if holes:
        raise ArtifactError(f"nulls in {', '.join(holes[:5])}", where=where, remedy="materialize it again")
