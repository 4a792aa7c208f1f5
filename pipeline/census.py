"""One look at every stored image of a data set: where wanted ones are, and which are there twice under several labels.

Shapes: N images, U row groups.
"""

from __future__ import annotations

import functools

import numpy as np
import pyarrow as pa
import ray

from pipeline import compute
from pipeline.dataset import Examples, Split
from pipeline.keyed import reduce_by_key
from pipeline.near import digest

READ_ROWS = 256  # held in memory at once, as they are stored
TASK_ROWS = 1 << 16  # the most of one task: few tasks even for 10⁸ images
TASKS = 64  # the least, where there are rows for them


def census(train: Split, probe: Examples, wanted: np.ndarray) -> pa.Table:
    """Return the wanted training ids, and all images, trusted ones too, whose bytes have two labels or more.

    Columns: id, label, trusted (of `probe`, not `train`), row (in its split), digest (equal for equal bytes), torn
    (whether the bytes are under several labels). Copies that were scaled or compressed anew have other bytes.

    All images are read once, as a Ray Data job. Raises InputError for a shard that is missing or damaged.
    """
    compute.join()
    refs = [ray.put(train), ray.put(probe)]
    size = int(np.clip(-(-len(train) // TASKS), READ_ROWS, TASK_ROWS))
    tasks = [
        pa.table({"trusted": [trusted], "start": [start], "stop": [min(start + size, len(split))]})
        for trusted, split in ((False, train), (True, probe))
        for start in range(0, len(split), size)
    ]
    look, pick = functools.partial(_look, refs=refs), functools.partial(_pick, wanted=wanted)
    return pa.concat_tables(reduce_by_key(tasks, look, "digest", len(train) + len(probe), pick))


def _look(task: pa.Table, refs: list[ray.ObjectRef]) -> pa.Table:
    # The rows of one task, with a digest of their bytes.
    (trusted,), (start,), (stop,) = (task[name].to_pylist() for name in ("trusted", "start", "stop"))
    split: Split = ray.get(refs[trusted])
    tables = []
    for first in range(start, stop, READ_ROWS):
        row = np.arange(first, min(first + READ_ROWS, stop))
        held = split.take(row)
        columns = {"id": held.id_N, "label": held.label_N, "row": row, "digest": _digests(held)}
        tables.append(pa.table({**columns, "trusted": np.full(len(row), trusted)}))
    return pa.concat_tables(tables)


def _digests(held: Examples) -> np.ndarray:
    stored = held.image_N if isinstance(held.image_N, np.ndarray) else (image.as_buffer() for image in held.image_N)
    return np.array([digest(image) for image in stored], np.int64)


def _pick(rows: pa.Table, wanted: np.ndarray) -> pa.Table:
    # What the census tells, of all rows of some digests.
    rows = rows.sort_by([("digest", "ascending"), ("label", "ascending"), ("id", "ascending")])
    digest_N, label_N = rows["digest"].to_numpy(), rows["label"].to_numpy()
    first_N = np.flatnonzero(np.diff(digest_N, prepend=digest_N[:1] - 1))
    last_N = np.append(first_N[1:], len(digest_N)) - 1
    torn_N = np.repeat(label_N[first_N] != label_N[last_N], last_N - first_N + 1)
    told_N = torn_N | (np.isin(rows["id"].to_numpy(), wanted) & ~rows["trusted"].to_numpy())
    return rows.append_column("torn", pa.array(torn_N)).filter(pa.array(told_N))
