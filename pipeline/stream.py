"""The training stream: plan → examples → views made in CPU actors → groups of uint8 arrays, through Ray Data.

Shapes: S groups of a block, G noisy and P trusted examples of a group, V = 2G + P views of a group, images H×W×C.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionOptions
from ray.util.metrics import Counter

from pipeline import compute
from pipeline.dataset import Examples, Split
from pipeline.images import Rejected
from pipeline.plan import Group, Plan, Purpose, generator, probe_rows
from pipeline.views import Views

AHEAD = 2  # blocks that a worker which makes its own has ready
GREY = 128  # in place of an image that cannot be decoded
REJECTED = Counter("winnow_rejected_images", "Images that could not be decoded and were trained on as plain grey")


def make_block(examples: Split, probe: Examples, views: Views, plan: Plan, block: int) -> dict[str, np.ndarray]:
    """Return all groups of one block of the plan, one behind the other; every draw is keyed by (seed, group)."""
    epoch_SG, row_SG = plan.rows_of(block)
    held = examples.take(row_SG.reshape(-1))
    groups = []
    for number, group in enumerate(plan.groups_of(block)):
        rows = range(number * plan.group, (number + 1) * plan.group)
        rng = generator(plan.seed, Purpose.VIEWS, group)
        pairs = [views.pair(_image(held, row, probe), rng) for row in rows]
        step, place = divmod(group, plan.groups)
        shares = probe_rows(probe.label_N, plan.probe * plan.groups, plan.seed, step)
        trusted = shares[place * plan.probe : (place + 1) * plan.probe]
        rng = generator(plan.seed, Purpose.PROBE_VIEWS, group)
        seen = [views.weak(_image(probe, row, probe), rng) for row in trusted]
        noisy, none = slice(rows.start, rows.stop), np.full(plan.probe, -1)
        groups.append(
            {
                "group": np.full(2 * plan.group + plan.probe, group),
                "id": np.concatenate([held.id_N[noisy], held.id_N[noisy], probe.id_N[trusted]]),
                "label": np.concatenate([held.label_N[noisy], held.label_N[noisy], probe.label_N[trusted]]),
                "epoch": np.concatenate([epoch_SG[number], epoch_SG[number], none]),
                "row": np.concatenate([row_SG[number], row_SG[number], none]),
                "image": [weak for weak, _ in pairs] + [strong for _, strong in pairs] + seen,
            }
        )
    columns = {name: np.concatenate([group[name] for group in groups]) for name in groups[0] if name != "image"}
    return {**columns, "image": np.stack([image for group in groups for image in group["image"]])}


def _image(examples: Examples, row: int, probe: Examples) -> np.ndarray:
    # One of a million images is no reason to end a run: grey keeps its group whole, in the size of a trusted image.
    try:
        return examples.image(row)
    except Rejected as error:
        print(f"warning: the image of example {examples.id_N[row]} is {error}: trained on as plain grey")
        REJECTED.inc()
        return np.full_like(probe.image(0), GREY)


class MakeViews:
    """Do a CPU actor's work: a block number in, that block's groups out."""

    def __init__(self, refs: list[ray.ObjectRef], views: Views, plan: Plan) -> None:
        self.examples: Split
        self.probe: Examples
        self.examples, self.probe = ray.get(refs)  # arrays stay where they are, in the object store
        self.views, self.plan = views, plan
        cv2.setNumThreads(1)  # an actor has one core

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the groups of the one block that `block["id"]` holds."""
        (number,) = block["id"]
        return make_block(self.examples, self.probe, self.views, self.plan, int(number))


def stream(examples: ray.ObjectRef, probe: ray.ObjectRef, views: Views, plan: Plan, actors: int) -> Dataset:
    """Return the lazy data set of a plan; `actors` is the largest number of CPU actors that make views.

    Split among N workers with `preserved_order()`, block j goes to worker j mod N.
    """
    context = DataContext.get_current()
    context.raise_original_map_exception = True  # what an actor raised, for the training loop to tell
    context.enable_progress_bars = False
    return ray.data.range(plan.blocks, override_num_blocks=plan.blocks).map_batches(
        MakeViews,
        fn_constructor_args=([examples, probe], views, plan),
        batch_size=None,
        compute=ActorPoolStrategy(min_size=1, max_size=actors),
        num_cpus=1,
    )


def preserved_order() -> ExecutionOptions:
    """Return execution options that keep blocks in plan order, on data nodes; set on this process's DataContext too."""
    context = DataContext.get_current()
    context.execution_options = ExecutionOptions(preserve_order=True, label_selector=compute.data_nodes())
    return context.execution_options


def groups(shard: Any, plan: Plan) -> Iterator[Group]:
    """Return a worker's groups, in order, from its shard of the stream."""
    size = 2 * plan.group + plan.probe
    return iter(shard.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=2))


def groups_here(
    examples: Split, probe: Examples, views: Views, plan: Plan, rank: int = 0, workers: int = 1, threads: int = 1
) -> Iterator[Group]:
    """Yield the groups that worker `rank` of all `workers` has of the stream, made by threads of this process."""
    cv2.setNumThreads(1)  # a thread has one core
    size = 2 * plan.group + plan.probe
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[dict[str, np.ndarray]]] = deque()
        for number in range(rank, plan.blocks, workers):
            ahead.append(pool.submit(make_block, examples, probe, views, plan, number))
            if len(ahead) > threads + AHEAD - 1:
                yield from _cut(ahead.popleft().result(), size)
        while ahead:
            yield from _cut(ahead.popleft().result(), size)


def _cut(block: dict[str, np.ndarray], size: int) -> Iterator[Group]:
    for start in range(0, len(block["id"]), size):
        yield {name: column[start : start + size] for name, column in block.items()}
