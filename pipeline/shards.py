"""Make shards of a raw data set, once, with all CPUs of the cluster: every image checked, shuffled and stored.

    python -m pipeline.shards webvision gs://raw/webvision --imagenet gs://raw/imagenet --out gs://bucket/webvision-mini

Killed at any time, the same command goes on: finished shards are kept, a half-written one never counts. Run again when
all is done, it does nothing. Images that cannot be used are listed in rejected.parquet with the reason.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline import command, compute, storage
from pipeline.dataset import InputError
from pipeline.images import Rejected, check_image
from pipeline.index import NAME, Index, Shard, read_index, write_shard
from pipeline.layout import Layout, Listing
from pipeline.raw import FETCHERS, fetch

WORK = "_unfinished"  # folder of records: the shard that a record names is whole
SHARD_ROWS = 2048  # 50 MB of 256-px JPEGs: a few thousand files for millions of images
RUN_ROWS = 256  # of a Parquet source that stay together: each of its row groups is read by few tasks
EXAMPLES = 5  # rejected images named when there are too many
LOG_EVERY = 10.0  # seconds between lines where the output is not a terminal

REJECTED_SCHEMA = pa.schema([("id", pa.int64()), ("key", pa.string()), ("split", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class Options:
    """How shards are made."""

    out: str
    """Folder of the shards: a local path or any fsspec URL, such as gs://bucket/folder."""
    short_side: int = 256
    """Larger images are shrunk until their shorter side has this many pixels; 0 keeps their size."""
    reject: float = 0.01
    """Share of images that may be unusable; above it the run stops and names some."""

    def __post_init__(self) -> None:
        if self.short_side < 0:
            raise ValueError(f"short_side is {self.short_side}: it must be 0 or more")
        if not 0 <= self.reject <= 1:
            raise ValueError(f"reject is {self.reject}: it must lie in 0…1")


def ingest(layout: Layout, url: str, options: Options, console: Console | None = None) -> Index:
    """The index of the shards of the data set at `url`, made now unless they are there already.

    Raises InputError for what cannot work: lists, storage, too many unusable images, another data set in `out`.
    """
    console = console or Console()
    storage.require_writable(options.out)
    listing = layout.listing(url)
    for finding in listing.findings:
        if finding.level == "error":
            raise InputError(f"{finding.what}: {finding.mend}")
        console.print(f"{finding.level}: {finding.what}: {finding.mend}", highlight=False, soft_wrap=True)
    tasks = plan_shards(listing.table)
    made_of = _digest(tasks, listing, layout, options)
    fs, out = storage.connect(options.out)
    if storage.exists(fs, storage.join(out, NAME)):
        index = read_index(options.out)
        _same(index.made_of, made_of, options.out)
        console.print(f"{options.out} is whole already: {_told(index)}", highlight=False, soft_wrap=True)
        return index
    done = _records(fs, out)
    if done:
        _same(done[0]["made_of"], made_of, options.out)
        console.print(f"{len(done):,} of {len(tasks):,} shards are done in {options.out}", highlight=False)
    _make({name: task for name, task in tasks.items() if name not in {record["name"] for record in done}},
          done, made_of, len(listing.class_names), options, console)  # fmt: skip
    index = _finish(fs, out, tasks, listing, layout, made_of, options)
    console.print(f"{options.out}: {_told(index)}", highlight=False, soft_wrap=True)
    return index


def plan_shards(table: pa.Table) -> dict[str, pa.Table]:
    """File name → the rows of the listing that it is to hold, in order: shuffled by id within their split."""
    tasks: dict[str, pa.Table] = {}
    splits = table["split"].to_numpy(zero_copy_only=False)
    for split in dict.fromkeys(splits):
        part = table.filter(pa.array(splits == split))
        part = part.take(pa.array(_shuffled(part)))
        count = -(-len(part) // SHARD_ROWS)
        for number in range(count):
            name = f"{split}-{number:05d}-of-{count:05d}.parquet"
            rows = part.slice(number * SHARD_ROWS, SHARD_ROWS)
            tasks[name] = rows.take(pa.array(np.argsort(rows["id"].to_numpy())))
    return tasks


def _shuffled(table: pa.Table) -> np.ndarray:
    # Ids are hashes, so their order is a shuffle that needs no seed. Rows of Parquet sources are shuffled in runs.
    key = table["id"].to_numpy().copy()
    from_parquet = np.flatnonzero(table["how"].to_numpy(zero_copy_only=False) == "row")
    starts = table["start"].to_numpy()
    files = table["file"]
    for row in from_parquet:
        run = f"{files[int(row)].as_py()} {starts[row] // RUN_ROWS}"
        key[row] = int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") >> 1
    return np.argsort(key, kind="stable")


def _digest(tasks: dict[str, pa.Table], listing: Listing, layout: Layout, options: Options) -> str:
    digest = hashlib.sha256(json.dumps([layout.name, listing.class_names, options.short_side]).encode())
    for name, task in tasks.items():
        digest.update(name.encode() + task["id"].to_numpy().tobytes() + task["label"].to_numpy().tobytes())
    return digest.hexdigest()


def _same(there: str, wanted: str, out: str) -> None:
    if there != wanted:
        raise InputError(f"{out} holds shards of other data or options: choose another --out, or remove that folder")


def _make(
    tasks: dict[str, pa.Table],
    done: list[dict[str, Any]],
    made_of: str,
    classes: int,
    options: Options,
    console: Console,
) -> None:
    """Make the shards of `tasks`, as a Ray Data job; raises InputError once too many images were rejected."""
    total = sum(map(len, tasks.values())) + sum(record["listed"] for record in done)
    rejected = [each for record in done for each in record["rejected"]]
    _require_few(rejected, total, options)
    if not tasks:
        return
    compute.join()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_options.label_selector = compute.data_nodes()
    context.raise_original_map_exception = True  # so that `_rows` finds what a task raised
    named = [task.append_column("name", pa.array([name] * len(task))) for name, task in tasks.items()]
    made = ray.data.from_arrow(named).map_batches(
        make_shard,
        fn_args=(options.out, options.short_side, made_of, classes),
        batch_size=None,
        batch_format="pyarrow",
    )
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("images", total=total, completed=sum(record["listed"] for record in done), text="")
        started, seen, told = time.monotonic(), 0, time.monotonic()
        for row in _rows(made):
            seen += row["listed"]
            rejected += json.loads(row["rejected"])
            speed = seen / (time.monotonic() - started)
            text = f"{speed:.0f} img/s, {len(rejected):,} rejected"
            progress.update(bar, advance=row["listed"], text=text)
            if not console.is_terminal and time.monotonic() - told > LOG_EVERY:
                told = time.monotonic()
                left = (total - progress.tasks[0].completed) / speed
                done_now = f"{progress.tasks[0].completed:,.0f} of {total:,} images"
                console.print(f"{done_now}, {text}, {left // 60:.0f}:{left % 60:02.0f} left", highlight=False)
            _require_few(rejected, total, options)


def _rows(made: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    # What a task raised, without Ray's wrapping, so that a person reads one line.
    try:
        yield from made.iter_rows()
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, (InputError, OSError)) else error from None


def _require_few(rejected: list[dict[str, Any]], total: int, options: Options) -> None:
    if len(rejected) > options.reject * total:
        some = ", ".join(f"{each['key']} ({each['reason']})" for each in rejected[:EXAMPLES])
        raise InputError(
            f"{len(rejected):,} of {total:,} images cannot be used, more than {options.reject:.1%}: {some}: "
            "mend the data or raise --reject; finished shards are kept"
        )


def make_shard(task: pa.Table, out: str, short_side: int, made_of: str, classes: int) -> pa.Table:
    """Write one shard and its record; returns one row: how many images were listed, and the rejected ones as JSON.

    The record is written last: without it the shard does not count.
    """
    name = task["name"][0].as_py()
    rejected: list[dict[str, Any]] = []

    def usable() -> Iterator[dict[str, Any]]:
        listed = task.select(["id", "key", "label", "split"]).to_pylist()
        for row, image in zip(listed, _checked(task, short_side), strict=True):
            if isinstance(image, Rejected):
                rejected.append({name: row[name] for name in ("id", "key", "split")} | {"reason": str(image)})
            else:
                yield {**row, "trusted": row["split"] != "train", "image": image}

    fs, folder = storage.connect(out)
    with tempfile.TemporaryDirectory() as scratch:
        shard = write_shard(f"{scratch}/{name}", usable(), classes)
        if shard:
            storage.commit(fs, f"{scratch}/{name}", storage.join(folder, name))
    record = {"name": name, "made_of": made_of, "listed": len(task), "rejected": rejected}
    record["shard"] = asdict(shard) if shard else None
    storage.write(fs, storage.join(folder, f"{WORK}/{name}.json"), json.dumps(record).encode())
    return pa.table({"listed": [len(task)], "rejected": [json.dumps(rejected)]})


def _checked(task: pa.Table, short_side: int) -> Iterator[bytes | Rejected]:
    # What is stored of each row's image, or why it is not.
    for raw in fetch(task):
        if isinstance(raw, Rejected):
            yield raw
            continue
        try:
            yield check_image(raw, short_side or None)
        except Rejected as reason:
            yield reason


def _records(fs: Any, out: str) -> list[dict[str, Any]]:
    # The records of finished shards.
    folder = storage.join(out, WORK)
    if not storage.exists(fs, folder):
        return []
    paths = storage.attempt(fs, folder, lambda: fs.ls(folder, detail=False))
    paths = [path for path in paths if path.endswith(".parquet.json")]
    with ThreadPoolExecutor(FETCHERS) as pool:
        return [json.loads(data) for data in pool.map(lambda path: storage.read(fs, path), sorted(paths))]


def _finish(
    fs: Any, out: str, tasks: dict[str, pa.Table], listing: Listing, layout: Layout, made_of: str, options: Options
) -> Index:
    # The index comes last: it says that all is whole.
    records = {record["name"]: record for record in _records(fs, out)}
    missing = tasks.keys() - records.keys()
    assert not missing, f"shards without a record: {sorted(missing)[:3]}"
    rejected = [each for name in tasks for each in records[name]["rejected"]]
    with tempfile.TemporaryDirectory() as scratch:
        pq.write_table(pa.Table.from_pylist(rejected, REJECTED_SCHEMA), f"{scratch}/rejected.parquet")
        storage.commit(fs, f"{scratch}/rejected.parquet", storage.join(out, "rejected.parquet"))
    shards = [records[name]["shard"] for name in tasks if records[name]["shard"]]
    index = Index(
        dataset=layout.name,
        made_of=made_of,
        class_names=listing.class_names,
        shards=tuple(Shard(**{**shard, "per_class": tuple(shard["per_class"])}) for shard in shards),
        rejected=len(rejected),
        options={**asdict(layout), "short_side": options.short_side},  # type: ignore[call-overload]
    )
    storage.write(fs, storage.join(out, NAME), index.as_json().encode())
    fs.rm(storage.join(out, WORK), recursive=True)
    return index


def _told(index: Index) -> str:
    counts = ", ".join(f"{index.count(split):,} {split}" for split in index.splits)
    return f"{counts}; {len(index.class_names)} classes, {len(index.shards)} shards, {index.rejected:,} rejected"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""

    def work() -> None:
        out = " --out gs://bucket/shards"
        chosen = command.parse("pipeline.shards", __doc__, command.LAYOUTS, Options, arguments, example=out)
        ingest(chosen.layout, chosen.url, chosen.options)

    command.guarded(work)


if __name__ == "__main__":
    main()
