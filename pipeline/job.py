"""What Ray Data jobs share: settings, progress, errors in one line, and records by which a killed job goes on.

out/_unfinished/NAME.json    says that the shard NAME is whole, and what came of it; removed once all are
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Literal, TypeVar

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from pipeline import compute, storage
from pipeline.dataset import InputError
from pipeline.index import NAME, Index, Shard, read_index
from pipeline.raw import FETCHERS

WORK = "_unfinished"  # folder of records
LOG_EVERY = 10.0  # seconds between lines where the output is not a terminal

# Of one shard: `name`, `made_of`, `listed` (images it was to hold), `shard` (as in the index; None where no image could
# be used), and what else the job wants to know when it goes on.
Record = dict[str, Any]
Device = Literal["auto", "cpu", "gpu"]
T = TypeVar("T")


class JobProgress:
    """Show images done of all, how fast, and the time left: a bar on a terminal, a line every few seconds in a log."""

    def __init__(self, total: int, done: int, console: Console) -> None:
        self.total, self.console, self.printed = total, console, time.monotonic()
        self.first: tuple[float, float] | None = None  # when results began to come, and the images done then
        columns = (
            TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
        )  # fmt: skip
        self.bar = Bar(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("images", total=total, completed=done, text="")

    def __enter__(self) -> JobProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def along(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yield `tables`, a row an image, and tell of each that its images are done."""
        for table in tables:
            self.advance(len(table))
            yield table

    def advance(self, count: int, note: str = "") -> None:
        """Tell that `count` more images are done; `note` follows the speed."""
        now, done = time.monotonic(), self.bar.tasks[0].completed + count
        self.first = self.first or (now, done)  # until then workers were starting
        images = done - self.first[1]
        speed = images / max(now - self.first[0], 1e-9)
        text = ", ".join(filter(None, [f"{speed:.0f} img/s" if images else "", note]))
        self.bar.update(self.task, advance=count, text=text)
        if not self.console.is_terminal and now - self.printed > LOG_EVERY and images:
            self.printed = now
            left = (self.total - done) / speed
            line = f"{done:,.0f} of {self.total:,} images, {text}, {timedelta(seconds=round(left))} left"
            self.console.print(line, highlight=False)


def settings(*, ordered: bool = False) -> None:
    """Join the cluster, and set what all jobs of Ray Data need; `ordered` results come in the order of their inputs."""
    compute.join()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = ordered
    context.execution_options.label_selector = compute.data_nodes()
    context.raise_original_map_exception = True  # so that `unwrapped` finds what a task raised


def network_actors(device: Device, most: int) -> tuple[str, dict[str, Any]]:
    """Join the cluster for an ordered job whose actors hold a network, `most` of them (0: one a GPU, or CPU).

    Returns torch's name of their device, and what `map_batches` is to be told of them. Raises InputError where the
    cluster lacks the GPU that is asked for.
    """
    compute.join(cpus=2)
    gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
    to_come = compute.training_nodes() is not None  # set apart for their GPUs, and brought up when asked
    if device == "gpu" and not (gpus or to_come):
        raise InputError("the cluster has no GPU: leave --device out")
    on_gpu = device != "cpu" and (gpus > 0 or to_come)
    settings(ordered=True)
    if on_gpu:  # not on data nodes, then: Ray Data counts on one kind of node only
        DataContext.get_current().execution_options.label_selector = None
    pool = ActorPoolStrategy(min_size=1, max_size=most or max(gpus if on_gpu else cpus, 1))
    return "cuda" if on_gpu else "cpu", {"compute": pool, "num_gpus": 1 if on_gpu else 0}


def unwrapped(results: Iterable[T]) -> Iterator[T]:
    """Yield the `results` of a job, where what a task raised comes without Ray's wrapping, so that a person reads one
    line.
    """
    try:
        yield from results
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause).splitlines()[0]) from None  # Ray adds lines on retries
        raise error.cause if isinstance(error.cause, OSError) else error from None


def whole(out: str, made_of: str) -> Index | None:
    """Return the index of `out` where a job has ended there; raises InputError where that was another one."""
    fs, path = storage.connect(out)
    if not storage.exists(fs, storage.join(path, NAME)):
        return None
    index = read_index(out)
    _require_same(index.made_of, made_of, out)
    return index


def records(out: str, made_of: str) -> dict[str, Record]:
    """Return the records of finished shards in `out`, by name; raises InputError where they are of another job."""
    fs, path = storage.connect(out)
    folder = storage.join(path, WORK)
    if not storage.exists(fs, folder):
        return {}
    paths = storage.attempt(fs, folder, lambda: fs.ls(folder, detail=False))
    paths = [path for path in paths if path.endswith(".parquet.json")]
    with ThreadPoolExecutor(FETCHERS) as pool:
        found = [json.loads(data) for data in pool.map(lambda path: storage.read(fs, path), sorted(paths))]
    for record in found[:1]:
        _require_same(record["made_of"], made_of, out)
    return {record["name"]: record for record in found}


def make(tasks: Iterable[pa.Table], work: Callable[..., pa.Table], arguments: Iterable[Any]) -> Iterator[Record]:
    """Yield the records that `work(task, *arguments)` returns by `put`, of each of `tasks` on the cluster, as they
    come.
    """
    settings()
    made = ray.data.from_arrow(list(tasks)).map_batches(
        work, fn_args=arguments, batch_size=None, batch_format="pyarrow"
    )
    for row in unwrapped(made.iter_rows()):
        yield json.loads(row["record"])


def put(out: str, record: Record, write: Callable[[str], Shard | None]) -> pa.Table:
    """Have `write` make the local file of the shard that `record` names, then write the record; returns the record.

    Without it the shard does not count. `write` returns None where there are no rows; what it finds out on the way may
    be part of the record.
    """
    fs, folder = storage.connect(out)
    name = record["name"]
    with tempfile.TemporaryDirectory() as scratch:
        shard = write(f"{scratch}/{name}")
        if shard:
            storage.commit(fs, f"{scratch}/{name}", storage.join(folder, name))
    text = json.dumps({**record, "shard": asdict(shard) if shard else None})
    storage.write(fs, storage.join(folder, f"{WORK}/{name}.json"), text.encode())
    return pa.table({"record": [text]})


def shards_of(names: Iterable[str], done: Mapping[str, Record]) -> tuple[Shard, ...]:
    """Return the shards called `names` as an index lists them, without those that hold no image."""
    return tuple(Shard.of(done[name]["shard"]) for name in names if done[name]["shard"])


def seal(out: str, index: Index) -> None:
    """Write the index, which says that all is whole, and remove the records."""
    fs, path = storage.connect(out)
    storage.write(fs, storage.join(path, NAME), index.as_json().encode())
    storage.attempt(fs, path, lambda: fs.rm(storage.join(path, WORK), recursive=True))


def _require_same(there: str, wanted: str, out: str) -> None:
    if there != wanted:
        raise InputError(f"{out} holds shards of other data or options: choose another --out, or remove that folder")
