"""How workers see each other through torch.distributed: averages, gathered rows, and who is missing where one fails.

Shapes: N entries of a flat buffer that holds many tensors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.objectives.interface import Workers

BUCKET_BYTES = 32 << 20  # of one all-reduce: long enough to fill the network, short beside the memory of a GPU
NOTES_SECONDS = 5.0  # to read where the others are, once an all-reduce has failed


class WorkersError(RuntimeError):
    """Report a collective that failed or timed out, in one line: who waited, where, how long, and for whom."""


@dataclass
class Traffic:
    """Count what one worker has exchanged since it started."""

    reductions: int = 0  # all-reduces and all-gathers
    bytes: int = 0  # of the tensors that went in
    seconds: float = 0.0  # in the calls, waiting for slower workers included; a GPU may go on after the call


class _Mean(torch.autograd.Function):
    """Average over the workers, in place. Backward averages too: each worker's loss is a share of their mean."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, workers: Processes) -> Tensor:
        ctx.mark_dirty(flat)
        ctx.workers = workers
        workers.all_reduce(flat)
        return flat.div_(workers.size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Mean.apply(gradients[0].clone(), ctx.workers), None


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors, in order, in runs of one dtype and at most BUCKET_BYTES; a larger one is a run of its own."""
    held: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if held and (filled + tensor.nbytes > BUCKET_BYTES or tensor.dtype != held[0].dtype):
            yield held
            held, filled = [], 0
        held.append(tensor)
        filled += tensor.nbytes
    if held:
        yield held


class Processes:
    """Connect the workers of the torch.distributed process group, whose timeout bounds every all-reduce.

    Before each all-reduce a worker notes in `notes`, a store that all share, how far it is: who is missing when one
    fails can be read there. By default that is the server at MASTER_ADDR that env:// rendezvous left in rank 0.

    NCCL reports a failed all-reduce to the caller, as gloo always does, where TORCH_NCCL_BLOCKING_WAIT=1 was set before
    the process group was made; without it NCCL ends the process, with a message of its own.
    """

    def __init__(self, notes: dist.Store | None = None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.step = 0  # at work; `update` keeps it
        self.traffic = Traffic()
        self._notes = notes or dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
        )

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor averaged over the workers, an all-reduce a bucket of them; autograd goes through it."""
        means: list[Tensor] = []
        for bucket in buckets(tensors):
            # The one copy is the result: `cat` makes it, it is reduced in place, and the means are views of it.
            flat = _Mean.apply(torch.cat([tensor.reshape(-1) for tensor in bucket]), self)
            parts = flat.split([tensor.numel() for tensor in bucket])
            means += [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]
        return means

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all workers in the order of ranks, equally many of each, counted like `all_reduce`."""
        rows = tensor.detach().contiguous()
        of_all = [torch.empty_like(rows) for _ in range(self.size)]
        with self._counted(rows):
            dist.all_gather(of_all, rows)
        return torch.cat(of_all)

    def all_reduce(self, flat: Tensor) -> None:
        """Sum over the workers, in place, counted in `traffic`. Raises WorkersError."""
        with self._counted(flat):
            dist.all_reduce(flat)

    @contextmanager
    def _counted(self, sent: Tensor) -> Iterator[None]:
        # Of a collective: count it, note that this worker has come to it, and report who has not where it fails.
        self.traffic.reductions += 1
        self.traffic.bytes += sent.nbytes
        start = time.perf_counter()
        try:
            self._notes.set(_key(self.rank), f"{self.traffic.reductions} {self.step}")
            yield
        except RuntimeError as error:
            waited = time.perf_counter() - start
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WorkersError(
                f"rank {self.rank} of {self.size} waited {waited:.1f} s at step {self.step} for {self._missing()}: "
                f"see the log of that worker ({cause})"
            ) from error
        self.traffic.seconds += time.perf_counter() - start

    def _missing(self) -> str:
        # In a thread: a store whose server is frozen or cut off is read for ever, whatever timeout it was given.
        found: list[str] = []

        def read() -> None:
            with suppress(RuntimeError):
                found.append(self._behind())

        reader = Thread(target=read, daemon=True)
        reader.start()
        reader.join(NOTES_SECONDS)
        return found[0] if found else "rank 0, which no longer serves the others' notes"

    def _behind(self) -> str:
        # Whose note is of an earlier all-reduce than this worker's. Raises RuntimeError where rank 0 is gone.
        behind = []
        for rank in set(range(self.size)) - {self.rank}:
            note = self._notes.get(_key(rank)) if self._notes.check([_key(rank)]) else b"0 0"
            reductions, step = map(int, note.split())
            if reductions < self.traffic.reductions:
                behind.append(f"rank {rank} ({f'last seen at step {step}' if reductions else 'never seen'})")
        return ", ".join(behind) or "a worker that has left since (all had arrived)"


def _key(rank: int) -> str:
    return f"winnow/rank {rank}"


def average_statistics(model: nn.Module, workers: Workers) -> None:
    """Make every worker's batch-norm running statistics their mean, so that all evaluate and export one model."""
    running = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if running and workers.size > 1:
        for buffer, mean in zip(running, workers.mean(running), strict=True):
            buffer.copy_(mean)


def gather_statistics(model: nn.Module, workers: Workers) -> list[dict[str, Tensor]]:
    """Return every worker's batch-norm buffers, by rank."""
    mine = {name: buffer.cpu() for name, buffer in model.named_buffers()}
    if workers.size == 1:
        return [mine]
    of_all: list[Any] = [None] * workers.size
    dist.all_gather_object(of_all, mine)
    return of_all


def agreed(workers: Workers, device: torch.device, mine: bool) -> bool:
    """Tell whether `mine` is true on all workers."""
    return bool(workers.mean([torch.tensor([float(mine)], device=device)])[0] == 1)
