"""A trajectory log as a table: a Parquet file or a ``datasets.Dataset``, one row a trajectory.

A row is the JSON form, but for the dictionaries, which are lists of {"name", "value"}: ``datasets`` has no maps, and a
column for each name would differ from log to log. The rollout of an agent that was asked is JSON text: no table nests
without an end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any, get_args, get_origin, get_type_hints

from ..files import TrajectoryLog, whole
from ..records import Trajectory

_NAMED = ("rewards", "token_values")  # the fields that are dictionaries


def to_parquet(log: TrajectoryLog, path: str | os.PathLike) -> None:
    """Write a log as a Parquet file, whole or not at all; a log larger than memory is no problem.

    Lone surrogates, which no Parquet text can hold, become "?".
    """
    import pyarrow.parquet as pq

    with whole(path) as temporary, pq.ParquetWriter(temporary, arrow_schema(), compression="zstd") as writer:
        for table in _tables(log):
            writer.write_table(table)


def to_dataset(log: TrajectoryLog):
    """A log as a ``datasets.Dataset`` in memory; ``from_row`` reads its rows. As ``to_parquet``."""
    import pyarrow as pa
    from datasets import Dataset

    return Dataset(pa.concat_tables([arrow_schema().empty_table(), *_tables(log)]))


def read_parquet(path: str | os.PathLike) -> list[Trajectory]:
    """The trajectories of a file that ``to_parquet`` wrote, equal to those of the log.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not Parquet, or its rows are not trajectories; names file and row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    trajectories: list[Trajectory] = []
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(256):
                trajectories.extend(map(from_row, batch.to_pylist()))
    except (ValueError, pa.ArrowException) as e:
        raise ValueError(f"{path}, row {len(trajectories) + 1}: {e}") from None
    return trajectories


def to_row(trajectory: Trajectory) -> dict[str, Any]:
    """The row of a trajectory."""
    row = trajectory.to_dict()
    calls = [call | {"inner": call["inner"] and json.dumps(call["inner"])} for call in row["calls"]]
    return row | {"calls": calls} | {f: [{"name": k, "value": v} for k, v in row[f].items()] for f in _NAMED}


def from_row(row: dict[str, Any]) -> Trajectory:
    """The trajectory of a row; errors as in ``Trajectory.from_dict``."""
    try:
        named: dict[str, Any] = {f: {x["name"]: x["value"] for x in row[f]} for f in _NAMED}
        named["calls"] = [
            call | {"inner": call["inner"] and json.loads(call["inner"])} for call in row.get("calls", ())
        ]
    except (TypeError, KeyError) as e:
        raise ValueError(f"not a trajectory: {e}") from None
    return Trajectory.from_dict(row | named)


def _tables(log: TrajectoryLog) -> Iterator[Any]:
    """The log as Arrow tables of a few rows."""
    import pyarrow as pa

    trajectories, schema = iter(log), arrow_schema()
    while part := [to_row(t) for t in islice(trajectories, 256)]:
        try:
            yield pa.Table.from_pylist(part, schema=schema)
        except UnicodeEncodeError:
            clean = json.dumps(part, ensure_ascii=False).encode("utf-8", "replace")
            yield pa.Table.from_pylist(json.loads(clean), schema=schema)


def arrow_schema():
    """The columns of a table of trajectories (a ``pyarrow.Schema``), read off the records' type hints.

    Whole numbers are int64, others float64. A log without a single search has the same columns as any other.
    """
    import pyarrow as pa

    plain = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), Trajectory: pa.string()}

    def columns(record):
        hints = get_type_hints(record)
        return [(f.name, kind(hints[f.name])) for f in fields(record)]

    def kind(hint):
        args = [a for a in get_args(hint) if a is not type(None)]
        if is_dataclass(hint) and hint not in plain:
            return pa.struct(columns(hint))
        if get_origin(hint) is list:
            return pa.list_(kind(args[0]))
        if get_origin(hint) is dict:
            return pa.list_(pa.struct([("name", kind(args[0])), ("value", kind(args[1]))]))
        return plain[hint] if hint in plain else kind(args[0])  # the rest is "or None"

    return pa.schema(columns(Trajectory))
