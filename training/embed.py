"""Embed images by a pretrained network, once, with all CPUs or GPUs of the cluster: heads then train in minutes.

    python -m pipeline.embed gs://bucket/shards --network resnet50.a1_in1k --weights pretrained --out gs://bucket/features
    python training/custom.py --data gs://bucket/features --network linear
    python -m training.audit --features gs://bucket/features

Killed at any time, the same command goes on: finished shards are kept, a half-written one never counts. Images that
cannot be used are listed in rejected.parquet with the reason.

Shapes: N images of a batch, L = 1 + V looks at each, H×W pixels, D numbers of an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch
import tyro
from rich.console import Console
from torch import nn

from pipeline import command, features, job, storage
from pipeline.columns import Columns
from pipeline.custom import Custom
from pipeline.dataset import InputError
from pipeline.features import ROW_GROUP, Made, looks_of
from pipeline.index import FEATURES, Index
from pipeline.job import Device, JobProgress, Record
from pipeline.predictions import regrouped
from pipeline.shards import SHARD_ROWS, write_rejected
from pipeline.unlabelled import Images, open_images
from pipeline.views import Interpolation
from training.engine import pretrained
from training.engine.batch import normalised

TASK_VIEWS = 512  # a block of 80 MB at 224 px
LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class Request:
    """Describe what is asked for."""

    images: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="URL")]
    """Where the images are, a local path or any fsspec URL: shards, which bring their labels; or a folder, .tar or .zip
    of images; or a .csv or .parquet that names or holds them."""
    network: str
    """Whose features: a timm name, with or without a tag, such as resnet50.a1_in1k."""
    weights: str
    """Its weights: pretrained (timm's hub), or a .safetensors or .pth file at any path or URL."""
    out: str
    """Folder of the features: a local path or any fsspec URL."""
    views: int = 0
    """Random views of each image that are embedded beside the plain one: with none, both views of a step are the plain
    one, and the consistency loss is 0."""
    size: int = 0
    """Side of the square images that the network sees, px; 0: that of its weights."""
    crop: float = 0.0
    """Share of the short side that the plain view shows; 0: that of its weights."""
    interpolation: Interpolation | None = None
    """How images come to their size; None: as with its weights."""
    seed: int = 0
    """Seed of the random views."""
    batch: int = 64
    """Views that go through the network at once."""
    actors: int = 0
    """The most processes that hold the network; 0: one for each GPU, or for each CPU where there is none."""
    device: Device = "auto"
    """Where the network runs; auto takes GPUs where the cluster has one."""
    short_side: int = 256
    """Larger images that are not of shards are first shrunk, as ingest does, until their shorter side has this many
    pixels; 0 keeps their size."""
    image_column: str = ""
    """Column of a table with images or their paths; by default uri, path, image_path, file_name or url."""
    id_column: str = ""
    """Column of a table with a name of each image; by default id, where Parquet holds the images."""

    def __post_init__(self) -> None:
        for name in ("views", "size", "seed", "actors", "short_side"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 0 or more")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}: it must be 1 or more")
        if not 0 <= self.crop <= 1:
            raise ValueError(f"crop is {self.crop}: it must lie in 0…1")


def embed(request: Request, console: Console | None = None) -> Index:
    """Return the index of the features of all images, made now unless they are there already.

    Raises InputError, most of it before the work starts, for what in network, images or storage cannot work.
    """
    console = console or Console()
    storage.require_writable(request.out)
    columns = Columns(image=request.image_column, id=request.id_column)
    images = open_images(request.images, "", request.short_side, columns)
    network, how = _network(request, console)
    made_of = how.digest(images.digest)
    if index := job.whole(request.out, made_of):
        console.print(f"{request.out} is whole already: {_told(index, how)}", highlight=False, soft_wrap=True)
        return index
    done, shards = job.records(request.out, made_of), _shards(images)
    if done:
        console.print(f"{len(done):,} of {len(shards):,} shards are done in {request.out}", highlight=False)
    left = {name: rows for name, rows in shards.items() if name not in done}
    done |= _embed(request, images, network, how, left, made_of, console)
    rejected = [each for name in shards for each in done[name]["rejected"]]
    write_rejected(rejected, request.out)
    index = Index(
        dataset=images.index.dataset if images.index else Custom.name,
        made_of=made_of,
        class_names=images.index.class_names if images.index else (),
        shards=job.shards_of(shards, done),
        rejected=len(rejected),
        options={FEATURES: asdict(how)},
        row_group=ROW_GROUP,
    )
    if not index.shards:
        raise InputError(f"no image of {request.images} can be used, see {request.out}/rejected.parquet: give others")
    job.seal(request.out, index)
    console.print(f"{request.out}: {_told(index, how)}", highlight=False, soft_wrap=True)
    return index


def _network(request: Request, console: Console) -> tuple[nn.Module, Made]:
    """Return the network, and how it is to see images."""
    tested = pretrained.seen(request.network)
    if tested is None:
        raise InputError(f"timm knows no network {request.network!r}: see timm.list_models()")
    for note in tested.notes:
        console.print(note, highlight=False, soft_wrap=True)
    size = request.size or tested.size
    network, width, sha256 = pretrained.backbone(request.network, request.weights, size)
    crop, interpolation = request.crop or tested.crop, request.interpolation or tested.interpolation
    return network, Made(request.network, sha256, size, crop, interpolation, width, request.views, request.seed)


def _shards(images: Images) -> dict[str, range]:
    """Return the rows of `images` that each file of features is to hold: as the shards do, where they are of shards."""
    names, counts = [shard.name for shard in images.shards], [shard.rows for shard in images.shards]
    if not images.shards:
        total = len(images.rows)
        counts = [min(SHARD_ROWS, total - start) for start in range(0, total, SHARD_ROWS)]
        names = [f"all-{number:05d}-of-{len(counts):05d}.parquet" for number in range(len(counts))]
    ends = np.cumsum(counts).tolist()
    return {name: range(end - count, end) for name, count, end in zip(names, counts, ends, strict=True)}


def _embed(
    request: Request,
    images: Images,
    network: nn.Module,
    how: Made,
    left: dict[str, range],
    made_of: str,
    console: Console,
) -> dict[str, Record]:
    """Make the files of features that are `left`, as a Ray Data job; return their records."""
    if not left:
        return {}
    device, pool = job.network_actors(request.device, request.actors)
    answered = (
        ray.data.from_arrow(_tasks(images, left, how))
        .map_batches(looks_of, fn_args=(images.read, how), batch_size=None, batch_format="pyarrow")
        .map_batches(
            Embedder,
            fn_constructor_args=([ray.put(network)], how, device),
            batch_size=max(request.batch // (1 + how.looks), 1),
            zero_copy_batch=False,
            **pool,
        )
    )
    lengths = [len(rows) for rows in left.values()]
    classes = len(images.index.class_names) if images.index else 0
    with JobProgress(len(images.rows), len(images.rows) - sum(lengths), console) as progress:
        blocks = progress.along(job.unwrapped(answered.iter_batches(batch_size=None, batch_format="pyarrow")))
        tables = zip(left, regrouped(blocks, lengths), strict=True)
        return {name: _put(request.out, name, made_of, table, how, classes) for name, table in tables}


def _put(out: str, name: str, made_of: str, table: pa.Table, how: Made, classes: int) -> Record:
    """Write one file of features, and its record; return that."""
    unusable = pc.not_equal(table["rejected"], "")
    rejected = (
        table.filter(unusable)
        .select(["id", "key", "split", "rejected"])
        .rename_columns(["id", "key", "split", "reason"])
    )
    record = {"name": name, "made_of": made_of, "listed": len(table), "rejected": rejected.to_pylist()}
    usable = table.filter(pc.invert(unusable)).select(how.schema.names).cast(how.schema)
    written = job.put(out, record, lambda path: features.write_shard(path, usable, classes))
    return json.loads(written["record"][0].as_py())


def _tasks(images: Images, left: dict[str, range], how: Made) -> list[pa.Table]:
    """Return the rows of the files that are `left`, in order, in tasks of one file each."""
    size = max(TASK_VIEWS // (1 + how.looks), 1)
    return [
        images.rows.slice(start, min(size, rows.stop - start))
        for rows in left.values()
        for start in range(rows.start, rows.stop, size)
    ]


class Embedder:
    """Map looks at images to embeddings, as an actor."""

    def __init__(self, refs: list[ray.ObjectRef], how: Made, device: str) -> None:
        network: nn.Module
        (network,) = ray.get(refs)
        self.network, self.how, self.device = network.to(device), how, device

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """Return the columns of features, and rejected, for a batch of `looks_of`. Raises InputError for infinities."""
        image_NLHWC = torch.from_numpy(batch["image"])
        with torch.inference_mode():
            embedding = self.network(normalised(image_NLHWC.flatten(0, 1).to(self.device))).float().cpu()
        embedding_NLD = embedding.unflatten(0, image_NLHWC.shape[:2]).numpy()
        if not np.abs(embedding_NLD).max(initial=0) <= LARGEST:  # NaN too
            raise InputError(f"{self.how.network} gives numbers that float16 cannot hold: choose another network")
        known = ("id", "key", "label", "split", "trusted", "rejected")
        return pa.table({**{name: batch[name] for name in known}, **features.unstacked(embedding_NLD, self.how)})


def _told(index: Index, how: Made) -> str:
    counts = ", ".join(f"{index.count(split):,} {split}" for split in index.splits)
    looks = f" and {how.looks} random views" if how.looks else ""
    return f"{counts}; {how.width} numbers of the plain view{looks} each, {index.rejected:,} rejected"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    request = tyro.cli(
        Request,
        args=arguments,
        prog="python -m pipeline.embed",
        description=(__doc__ or "").partition("\n\nShapes")[0],
    )

    def work() -> None:
        embed(request)

    command.guarded(work)
