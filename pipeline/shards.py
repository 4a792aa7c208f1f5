"""Make shards of a raw data set, once, with all CPUs of the cluster: every image checked, shuffled and stored.

    python -m pipeline.shards webvision gs://raw/webvision --imagenet gs://raw/imagenet --out gs://bucket/webvision-mini
    python -m pipeline.shards --from gs://bucket/runs/webvision …        anew, with corrected labels: see training.clean

Killed at any time, the same command goes on: finished shards are kept, a half-written one never counts. Run again when
all is done, it does nothing. Images that cannot be used are listed in rejected.parquet with the reason.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from pipeline import command, job, storage
from pipeline.dataset import InputError
from pipeline.images import Rejected, check_image
from pipeline.index import Index, write_shard
from pipeline.job import JobProgress, Record
from pipeline.layout import Layout, Listing
from pipeline.raw import fetch

SHARD_ROWS = 2048  # 50 MB of 256-px JPEGs: a few thousand files for millions of images
RUN_ROWS = 256  # of a Parquet source that stay together: each of its row groups is read by few tasks
EXAMPLES = 5  # rejected images named when there are too many

REJECTED_SCHEMA = pa.schema([("id", pa.int64()), ("key", pa.string()), ("split", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class Options:
    """Say how shards are made."""

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
    """Return the index of the shards of the data set at `url`, made now unless they are there already.

    Raises InputError for what cannot work: lists, storage, too many unusable images, another data set in `out`.
    """
    console = console or Console()
    storage.require_writable(options.out)
    listing = layout.listing(url)
    for finding in listing.findings:
        if finding.level == "error":
            raise InputError(f"{finding.what}: {finding.fix}")
        console.print(f"{finding.level}: {finding.what}: {finding.fix}", highlight=False, soft_wrap=True)
    tasks = plan_shards(listing.table)
    made_of = _digest(tasks, listing, layout, options)
    if index := job.whole(options.out, made_of):
        console.print(f"{options.out} is whole already: {_told(index)}", highlight=False, soft_wrap=True)
        return index
    done = job.records(options.out, made_of)
    if done:
        console.print(f"{len(done):,} of {len(tasks):,} shards are done in {options.out}", highlight=False)
    _make(tasks, done, made_of, listing, options, console)
    _require_usable(tasks, done, listing)
    rejected = [each for name in tasks for each in done[name]["rejected"]]
    write_rejected(rejected, options.out)
    index = Index(
        dataset=layout.name,
        made_of=made_of,
        class_names=listing.class_names,
        shards=job.shards_of(tasks, done),
        rejected=len(rejected),
        options={**asdict(layout), "short_side": options.short_side},  # type: ignore[call-overload]
    )
    job.seal(options.out, index)
    console.print(f"{options.out}: {_told(index)}", highlight=False, soft_wrap=True)
    return index


def plan_shards(table: pa.Table) -> dict[str, pa.Table]:
    """Return file name → the rows of the listing that it is to hold, in order: shuffled by id within their split."""
    tasks: dict[str, pa.Table] = {}
    splits = table["split"].to_numpy(zero_copy_only=False)
    for split in dict.fromkeys(splits):
        if not re.fullmatch(r"[^\W_][\w.\- ]*", split):  # it is part of files' names: nothing is written outside `out`
            raise InputError(f"{split!r} cannot be the name of a split: rename it")
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


def _make(
    tasks: dict[str, pa.Table],
    done: dict[str, Record],
    made_of: str,
    listing: Listing,
    options: Options,
    console: Console,
) -> None:
    """Make the shards that are not `done`, and add their records; raises InputError once too many were rejected."""
    total, before = sum(map(len, tasks.values())), sum(record["listed"] for record in done.values())
    rejected = [each for record in done.values() for each in record["rejected"]]
    _require_few(rejected, total, options)
    left = [
        task.append_column("name", pa.array([name] * len(task))) for name, task in tasks.items() if name not in done
    ]
    if not left:
        return
    # What is small and must be whole comes first: it is told in minutes that a class has lost its trusted images.
    left.sort(key=lambda task: task["split"][0].as_py() == "train")
    with JobProgress(total, before, console) as progress:
        for record in job.make(left, make_shard, (options.out, options.short_side, made_of, len(listing.class_names))):
            done[record["name"]] = record
            rejected += record["rejected"]
            progress.advance(record["listed"], f"{len(rejected):,} rejected")
            _require_few(rejected, total, options)
            if not record["name"].startswith("train-"):
                _require_usable(tasks, done, listing)


def _require_few(rejected: list[dict[str, Any]], total: int, options: Options) -> None:
    if len(rejected) > options.reject * total:
        some = ", ".join(f"{each['key']} ({each['reason']})" for each in rejected[:EXAMPLES])
        raise InputError(
            f"{len(rejected):,} of {total:,} images cannot be used, more than {options.reject:.1%}: {some}: "
            "fix the data or raise --reject; finished shards are kept"
        )


def _require_usable(tasks: dict[str, pa.Table], done: dict[str, Record], listing: Listing) -> None:
    # Raise where a split that is done has no image left, or the probe none of some class.
    for split in listing.splits:
        names = [name for name in tasks if re.fullmatch(rf"{re.escape(split)}-[0-9]+-of-[0-9]+.parquet", name)]
        if not all(name in done for name in names):
            continue
        lost = _lost([done[name] for name in names], listing.class_names)
        if len(lost) == len(listing.class_names):
            what = f"no image of {split} can be used"
        elif split == "probe" and lost:
            what = f"no trusted image of {', '.join(lost[:EXAMPLES])} can be used"
        else:
            continue
        some = [each for name in names for each in done[name]["rejected"]][:EXAMPLES]
        reasons = ", ".join(f"{each['key']} ({each['reason']})" for each in some)
        raise InputError(f"{what}: {reasons}: copy them again, or give others; finished shards are kept")


def _lost(records: Sequence[Record], class_names: Sequence[str]) -> list[str]:
    # The classes of which these shards hold no image.
    per_class = [record["shard"]["per_class"] for record in records if record["shard"]]
    count_K = np.sum([np.zeros(len(class_names)), *per_class], axis=0)
    return [name for name, count in zip(class_names, count_K, strict=True) if not count]


def make_shard(task: pa.Table, out: str, short_side: int, made_of: str, classes: int) -> pa.Table:
    """Write one shard; returns its record: how many images were listed, and the rejected ones."""
    rejected: list[dict[str, Any]] = []

    def usable() -> Iterator[dict[str, Any]]:
        listed = task.select(["id", "key", "label", "split"]).to_pylist()
        for row, image in zip(listed, _checked(task, short_side), strict=True):
            if isinstance(image, Rejected):
                rejected.append({name: row[name] for name in ("id", "key", "split")} | {"reason": str(image)})
            else:
                yield {**row, "trusted": row["split"] != "train", "image": image}

    record = {"name": task["name"][0].as_py(), "made_of": made_of, "listed": len(task), "rejected": rejected}
    return job.put(out, record, lambda path: write_shard(path, usable(), classes))


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


def write_rejected(rejected: list[dict[str, Any]], out: str) -> None:
    """Write the list of images that could not be used, by REJECTED_SCHEMA, into `out`."""
    fs, path = storage.connect(out)
    with tempfile.TemporaryDirectory() as scratch:
        pq.write_table(pa.Table.from_pylist(rejected, REJECTED_SCHEMA), f"{scratch}/rejected.parquet")
        storage.commit(fs, f"{scratch}/rejected.parquet", storage.join(path, "rejected.parquet"))


def _told(index: Index) -> str:
    counts = ", ".join(f"{index.count(split):,} {split}" for split in index.splits)
    return f"{counts}; {len(index.class_names)} classes, {len(index.shards)} shards, {index.rejected:,} rejected"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--from"]:  # a run's files are read: that command's room stands above this one
        import_module("training.clean").main(arguments[1:])  # ends the program

    def work() -> None:
        out = " --out gs://bucket/shards"
        chosen = command.parse("pipeline.shards", __doc__, command.LAYOUTS, Options, arguments, example=out)
        ingest(chosen.layout, chosen.url, chosen.options)

    command.guarded(work)


if __name__ == "__main__":
    main()
