"""Predict the classes of any number of images, with all CPUs or GPUs of the cluster.

    python -m training.predict runs/webvision gs://bucket/photos --out gs://bucket/predictions

Killed at any time, the same command goes on: parts that are written are kept. Images that cannot be used are listed
with the reason.

Shapes: N images of a batch, H×W pixels, C channels, K classes, T classes reported of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
import tyro
from rich.console import Console

from pipeline import command, job, predictions
from pipeline.columns import Columns
from pipeline.dataset import InputError
from pipeline.job import JobProgress
from pipeline.predictions import Predictions
from pipeline.unlabelled import Images, open_images, views_of
from training.engine.batch import normalised
from training.runs import model_file
from training.runs.model_file import ModelFile

TOP = 5
TASK_ROWS = 512  # a block of 80 MB at 224 px; a divisor of PART_ROWS


@dataclass(frozen=True)
class Request:
    """Describe what is asked for."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run's folder, or its model.safetensors: a local path or any fsspec URL."""
    images: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IMAGES")]
    """Where the images are, a local path or any fsspec URL: shards; or a folder, .tar or .zip of images; or a .csv or
    .parquet that names or holds them."""
    out: str
    """Folder of the predictions: a local path or any fsspec URL."""
    top: int = 0
    """How many of the most likely classes to report of each image; 0: five, or all where there are fewer."""
    all_probabilities: bool = False
    """Write the probability of every class too (column pred_probs)."""
    split: str = ""
    """Of shards, the set to read: train, probe, test …; all where it is left out."""
    batch: int = 128
    """Images that go through the network at once."""
    actors: int = 0
    """The most processes that hold the network; 0: one for each GPU, or for each CPU where there is none."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the network runs; auto takes GPUs where the cluster has one."""
    short_side: int = 256
    """Larger images that are not of shards are first shrunk, as ingest does, until their shorter side has this many
    pixels; 0 keeps their size."""
    image_column: str = ""
    """Column of a table with images or their paths; by default uri, path, image_path, file_name or url."""
    id_column: str = ""
    """Column of a table with a name of each image; by default id, where Parquet holds the images."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}: it must be 1 or more")
        for name in ("top", "actors", "short_side"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 0 or more")


def predict(request: Request, console: Console | None = None) -> Predictions:
    """Predict all images that are not predicted yet, and return what the folder then holds.

    Raises InputError, before the work starts, for whatever in model, images or storage cannot work.
    """
    console = console or Console()
    model = model_file.read(request.model)
    if model.source.direct:
        raise InputError(f"{request.model} is a head on features and cannot see images: give a run on images")
    model.network()  # here, to report at once what is wrong with it
    classes = len(model.class_names)
    if request.top > classes:
        raise InputError(f"top is {request.top} and the model knows {classes} classes: ask for fewer")
    columns = Columns(image=request.image_column, id=request.id_column)
    images = open_images(request.images, request.split, request.short_side, columns)
    if images.index:
        model.require(images.index.class_names, request.images)
    about = Predictions(
        model=model.sha256,
        data_set=images.digest,
        split=request.split,
        rows=len(images.rows),
        class_names=model.class_names,
        top=request.top or min(TOP, classes),
        all_probabilities=request.all_probabilities,
    )
    left = predictions.begin(request.out, about)
    if len(left) < about.parts:
        console.print(
            f"{about.parts - len(left):,} of {about.parts:,} parts are done in {request.out}", highlight=False
        )
    rejected = _predict(request, model, images, about, left, console) if left else 0
    unusable = f", {rejected:,} of them unusable (see column rejected)" if rejected else ""
    seen = sum(len(about.rows_of(part)) for part in left)
    console.print(
        f"{request.out}: {about.rows:,} images, {seen:,} predicted now{unusable}", highlight=False, soft_wrap=True
    )
    return about


def _predict(
    request: Request, model: ModelFile, images: Images, about: Predictions, left: list[int], console: Console
) -> int:
    """Make the parts that are `left`, as a Ray Data job; return how many of their images could not be used."""
    device, pool = job.network_actors(request.device, request.actors)
    answered = (
        ray.data.from_arrow(_tasks(images, about, left))
        .map_batches(views_of, fn_args=(images.read, model.source), batch_size=None, batch_format="pyarrow")
        .map_batches(
            Predictor,
            fn_constructor_args=([ray.put(model)], about, device),
            batch_size=request.batch,
            zero_copy_batch=False,
            **pool,
        )
    )
    rejected, lengths = 0, [len(about.rows_of(part)) for part in left]
    with JobProgress(about.rows, about.rows - sum(lengths), console) as progress:
        blocks = progress.along(job.unwrapped(answered.iter_batches(batch_size=None, batch_format="pyarrow")))
        for part, table in zip(left, predictions.regrouped(blocks, lengths), strict=True):
            rows = about.rows_of(part)
            if not np.array_equal(table["place"].to_numpy(), np.arange(rows.start, rows.stop)):
                raise RuntimeError(f"the results of part {part} are out of order")
            predictions.write_part(request.out, about, part, table)
            rejected += len(table) - table["rejected"].null_count
    return rejected


def _tasks(images: Images, about: Predictions, left: list[int]) -> list[pa.Table]:
    """Return the images of the parts that are `left`, in order, each with its place among all."""
    tasks = []
    for part in left:
        rows = about.rows_of(part)
        for start in range(rows.start, rows.stop, TASK_ROWS):
            some = images.rows.slice(start, min(TASK_ROWS, rows.stop - start))
            tasks.append(some.append_column("place", pa.array(np.arange(start, start + len(some)))))
    return tasks


class Predictor:
    """Answer test views with a network, as an actor."""

    def __init__(self, refs: list[ray.ObjectRef], about: Predictions, device: str) -> None:
        model: ModelFile
        (model,) = ray.get(refs)
        if model.recipe["precision"] == "float64":
            torch.set_default_dtype(torch.float64)
        self.network, self.about, self.device = model.network().to(device), about, device

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """Return the columns of `predictions.SCHEMA`, and place, for a batch of `views_of`."""
        with torch.inference_mode():
            logits_NK = self.network(normalised(torch.from_numpy(batch["image"]).to(self.device)))
            label_NT = logits_NK.topk(self.about.top, 1).indices  # of the logits, as evaluation has it
            probability_NK = logits_NK.softmax(1).float()
            probability_NT = probability_NK.gather(1, label_NT).cpu().numpy()
        unusable_N = batch["rejected"] != ""
        label_NT = label_NT.cpu().numpy().astype(np.int32)
        name_NT = np.array(self.about.class_names, object)[label_NT]
        written_NK = probability_NK.cpu().numpy()[:, : None if self.about.all_probabilities else 0]
        return pa.table(
            {
                "id": batch["id"],
                "key": batch["key"],
                "place": batch["place"],
                "top_labels": _lists(label_NT, unusable_N),
                "top_classes": _lists(name_NT, unusable_N),
                "top_probabilities": _lists(probability_NT, unusable_N),
                "pred_probs": _lists(written_NK, unusable_N | (not self.about.all_probabilities)),
                "rejected": pa.array(batch["rejected"], pa.string(), mask=~unusable_N),
            }
        )


def _lists(values_NT: np.ndarray, missing_N: np.ndarray) -> pa.ListArray:
    # A list of T values a row, null where it is missing.
    offsets = pa.array(np.arange(len(values_NT) + 1, dtype=np.int32) * values_NT.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(values_NT.ravel()), mask=pa.array(missing_N))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    request = tyro.cli(
        Request,
        args=arguments,
        prog="python -m training.predict",
        description=(__doc__ or "").partition("\n\nShapes")[0],
    )

    def work() -> None:
        predict(request)

    command.guarded(work)


if __name__ == "__main__":
    main()
