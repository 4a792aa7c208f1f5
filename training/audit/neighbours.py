"""Which stored features lie close together, and which lie alone: look-alikes, outliers, and a map to look at.

Images are compared by the cosine of their positions: their features as heads take them, in the directions in which they
differ most (PCA). The nearest ones are found by faiss: every row against all while these are few, by inverted lists
beyond. The map is t-SNE's (van der Maaten & Hinton 2008), of some rows.

Shapes: N rows, D numbers of an embedding, C components, P points of the map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from pipeline.features import Embedded
from training.engine.batch import normalised

COMPONENTS = 64
LEARNED = 20_000  # rows that tell the directions: the first ones, which are in no order
CHUNK = 1 << 14  # rows read at once
NEIGHBOURS = 10
EXACT = 50_000  # rows; of more, each is compared with those of the PROBED lists next to it
PROBED, LEARNED_A_LIST = 16, 64
POINTS = 3_000
SIDE = 1000.0  # of the map

# One row per id: neighbours.parquet.
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("label", pa.int32()),  # as given
        ("nearest", pa.int64()),  # the id of the image next to it
        ("nearest_label", pa.int32()),
        ("similarity", pa.float32()),  # with that one: 1 where both are the same
        ("isolation", pa.float32()),  # 1 less the mean similarity with the NEIGHBOURS next to it, 0…2
    ]
)


@dataclass(frozen=True)
class Neighbours:
    """Hold the surroundings of all rows."""

    table: pa.Table  # of SCHEMA
    map_id_P: np.ndarray
    map_label_P: np.ndarray
    map_P2: np.ndarray  # 0…SIDE

    def pairs(self, count: int) -> pa.Table:
        """Return the rows of those next to each other that have different labels, the closest first, each pair once."""
        table = self.table.filter(pc.not_equal(self.table["label"], self.table["nearest_label"]))
        table = table.take(pc.sort_indices(table, [("similarity", "descending"), ("id", "ascending")]))[: 2 * count]
        pair_N2 = np.sort(np.stack([table["id"].to_numpy(), table["nearest"].to_numpy()], axis=1))
        first = np.sort(np.unique(pair_N2, axis=0, return_index=True)[1])
        return table.take(pa.array(first[:count]))

    def outliers(self, count: int) -> pa.Table:
        """Return the rows that are furthest from all others, the furthest first."""
        order = pc.sort_indices(self.table, [("isolation", "descending"), ("id", "ascending")])
        return self.table.take(order[:count])


def around(rows: Embedded, seed: int = 0) -> Neighbours:
    """Return who lies next to whom among the plain embeddings of `rows`."""
    id_N, label_N, position_NC = positions(rows, seed)
    similarity_NJ, row_NJ = nearest(position_NC, min(NEIGHBOURS, len(id_N) - 1))
    first_N = row_NJ[:, 0]
    columns = {
        "id": id_N,
        "label": label_N,
        "nearest": id_N[first_N],
        "nearest_label": label_N[first_N],
        "similarity": similarity_NJ[:, 0],
        "isolation": 1 - similarity_NJ.mean(1),
    }
    table = pa.table([pa.array(columns[field.name]).cast(field.type) for field in SCHEMA], schema=SCHEMA)
    return Neighbours(table, id_N[:POINTS], label_N[:POINTS], flattened(position_NC[:POINTS], seed))


def positions(rows: Embedded, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, labels and positions, N×C float32 of length 1; a chunk of the features is in memory at a time."""
    first_ND = np.concatenate([value_ND for *_, value_ND in _chunks(rows, min(LEARNED, len(rows)))])
    components = min(COMPONENTS, *first_ND.shape)
    pca = PCA(components, svd_solver="randomized", random_state=seed).fit(first_ND)
    id_N, label_N = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    position_NC, start = np.empty((len(rows), components), np.float32), 0
    for some_id, some_label, value_ND in _chunks(rows, len(rows)):
        here = slice(start, start + len(some_id))
        id_N[here], label_N[here] = some_id, some_label
        position_NC[here] = pca.transform(value_ND)
        start = here.stop
    position_NC /= np.maximum(np.linalg.norm(position_NC, axis=1, keepdims=True), 1e-12)
    return id_N, label_N, position_NC


def _chunks(rows: Embedded, count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for start in range(0, count, CHUNK):
        held = rows.take(np.arange(start, min(start + CHUNK, count)))
        plain = torch.from_numpy(np.ascontiguousarray(held.image_N[:, :, :1]))
        yield held.id_N, held.label_N, normalised(plain).flatten(1).float().numpy()


def nearest(position_NC: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return similarity and row of the `count` rows next to each, the next one first, N×count; never the row itself."""
    total, components = position_NC.shape
    index: Any = faiss.IndexFlatIP(components)
    if total > EXACT:
        lists = int(4 * total**0.5)
        index = faiss.IndexIVFFlat(index, components, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe, index.cp.max_points_per_centroid = PROBED, LEARNED_A_LIST
        index.train(position_NC)
    index.add(position_NC)
    similarity_NJ, row_NJ = index.search(position_NC, count + 1)
    # A row is its own nearest one, but for copies of it, which may come before.
    own_NJ = row_NJ == np.arange(total)[:, None]
    own_NJ[~own_NJ.any(1), -1] = True
    kept_NJ = ~own_NJ
    return similarity_NJ[kept_NJ].reshape(total, count), row_NJ[kept_NJ].reshape(total, count)


def flattened(position_PC: np.ndarray, seed: int) -> np.ndarray:
    """Return points on a map, P×2 in 0…SIDE, on which neighbours stay neighbours."""
    if len(position_PC) < 4:
        return np.full((len(position_PC), 2), SIDE / 2)
    perplexity = min(30.0, (len(position_PC) - 1) / 3)
    point_P2 = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(position_PC)
    low, high = point_P2.min(0), point_P2.max(0)
    return SIDE * (0.02 + 0.96 * (point_P2 - low) / np.maximum(high - low, 1e-12))
