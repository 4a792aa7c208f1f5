"""The training stream: plan → examples → two views made in CPU actors → groups of uint8 arrays, through Ray Data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset, ExecutionOptions

from pipeline.dataset import Examples
from pipeline.plan import Plan, Purpose, generator
from pipeline.views import Views

Group = Mapping[str, np.ndarray]  # group, id, epoch, label: G; weak, strong: G×H×W×C uint8


def make_group(examples: Examples, views: Views, plan: Plan, group: int) -> dict[str, np.ndarray]:
    """One group of the plan with both views; every draw is keyed by (seed, group)."""
    epoch_G, row_G = plan.rows_of(group)
    rng = generator(plan.seed, Purpose.VIEWS, group)
    pairs = [views.pair(examples.image_NHWC[row], rng) for row in row_G]
    return {
        "group": np.full(plan.group, group),
        "id": examples.id_N[row_G],
        "epoch": epoch_G,
        "label": examples.label_N[row_G],
        "weak": np.stack([weak for weak, _ in pairs]),
        "strong": np.stack([strong for _, strong in pairs]),
    }


class MakeViews:
    """A CPU actor's work: a block number in, that block's groups out."""

    def __init__(self, examples: list[ray.ObjectRef], views: Views, plan: Plan) -> None:
        self.examples: Examples = ray.get(examples[0])  # zero-copy from the object store
        self.views, self.plan = views, plan

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All groups of the blocks in `block["id"]`, one behind the other."""
        numbers = [group for b in block["id"] for group in self.plan.groups_of(int(b))]
        groups = [make_group(self.examples, self.views, self.plan, number) for number in numbers]
        return {column: np.concatenate([group[column] for group in groups]) for column in groups[0]}


def stream(examples: ray.ObjectRef, views: Views, plan: Plan, actors: int) -> Dataset:
    """The lazy data set of a plan; `actors` is the largest number of CPU actors that make views.

    Split among N workers with `preserved_order()`, block j goes to worker j mod N.
    """
    return ray.data.range(plan.blocks, override_num_blocks=plan.blocks).map_batches(
        MakeViews,
        fn_constructor_args=([examples], views, plan),
        batch_size=None,
        compute=ActorPoolStrategy(min_size=1, max_size=actors),
        num_cpus=1,
    )


def preserved_order() -> ExecutionOptions:
    """Execution options that keep blocks in plan order; set on this process's DataContext too."""
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    options = ExecutionOptions()
    options.preserve_order = True
    return options


def groups(shard: Any, plan: Plan) -> Iterator[Group]:
    """A worker's groups, in order, from its shard of the stream."""
    return iter(shard.iter_batches(batch_size=plan.group, batch_format="numpy", prefetch_batches=2))
