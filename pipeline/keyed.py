"""Rows of many files brought together by key, in tasks of bounded size, on Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import ray.data

from pipeline import job

TASK_ROWS = 1 << 20  # that one task holds at once, about: half a GB; between, the shuffle takes 1.7 GB as Ray has it


def reduce_by_key(
    tasks: Sequence[pa.Table],
    read: Callable[[pa.Table], pa.Table],
    key: str,
    rows: int,
    reduce: Callable[[pa.Table], pa.Table],
) -> Iterator[pa.Table]:
    """Yield what `reduce` makes of the rows that `read` makes of `tasks`, `rows` in all, table by table.

    All rows of a key (a column of whole numbers) come to one call of `reduce`, in any order, with those of other keys:
    about TASK_ROWS a call. Empty tables are left out. Raises what `read` and `reduce` raise for the user to fix.
    """
    job.settings(ordered=True)
    partitions = max(1, -(-rows // TASK_ROWS))
    made = ray.data.from_arrow(list(tasks)).map_batches(read, batch_size=None, batch_format="pyarrow")
    keyed = made.repartition(partitions, keys=[key]).map_batches(
        _unless_empty, fn_args=(reduce,), batch_size=None, batch_format="pyarrow"
    )
    for table in job.unwrapped(keyed.iter_batches(batch_size=None, batch_format="pyarrow")):
        if len(table):
            yield table


def _unless_empty(rows: pa.Table, reduce: Callable[[pa.Table], pa.Table]) -> pa.Table:
    # Where keys are few, some tasks get none.
    return reduce(rows) if len(rows) else rows
