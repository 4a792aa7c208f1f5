"""Accuracy on evaluation sets, every example counted once, on any number of workers.

Shapes: N images, K classes, images H×W×C.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from pipeline.dataset import Split
from pipeline.views import Views
from training.engine.batch import normalised
from training.engine.state import TrainState
from training.objectives.interface import Workers

BATCH = 128
THREADS = 4  # that read and decode

T = TypeVar("T")


def evaluate(
    state: TrainState, tests: Mapping[str, Split], views: Views, rank: int, workers: Workers, device: torch.device
) -> dict[str, float]:
    """Return accuracies, 0…1, on every evaluation set.

    They are top1 and top5 of the first, NAME_top1 and NAME_top5 of the others.
    """
    measured: dict[str, float] = {}
    for name, test in tests.items():
        prefix = f"{name}_" if measured else ""
        top1, top5 = accuracy(state, test, views, rank, workers, device)
        measured |= {f"{prefix}top1": top1, f"{prefix}top5": top5}
    return measured


def accuracy(
    state: TrainState, test: Split, views: Views, rank: int, workers: Workers, device: torch.device
) -> tuple[float, float]:
    """Return (top-1, top-5), 0…1, over the whole test set: worker r takes batches r, r + N, …"""
    starts = range(rank * BATCH, len(test), workers.size * BATCH)

    def batch(start: int) -> tuple[np.ndarray, np.ndarray]:
        held = test.take(np.arange(start, min(start + BATCH, len(test))))
        return np.stack([views.test(held.image(row)) for row in range(len(held))]), held.label_N

    right = torch.zeros(2, dtype=torch.float64, device=device)
    for image_NHWC, label_N in _ahead(batch, starts):
        logits_NK = state.predict(normalised(torch.from_numpy(image_NHWC).to(device)))
        best_N5 = logits_NK.topk(min(5, logits_NK.shape[1]), 1).indices
        hit_N5 = best_N5 == torch.from_numpy(label_N).to(device)[:, None]
        right += torch.stack([hit_N5[:, 0].sum(), hit_N5.any(1).sum()])
    total = workers.mean([right])[0] * workers.size / len(test)
    return float(total[0]), float(total[1])


def _ahead(work: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
    # `work` of each item, in order, done by threads a few items ahead of who asks.
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
