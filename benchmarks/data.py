"""Images a second for two 224-px views, weak and AutoAugment strong, from 256-px JPEGs: the usual way and ours.

    python -m benchmarks.data --out data.json
    python -m benchmarks.data --data ../shared/data --out data.json

Each path runs in a process of its own, which keeps its workers; rounds take turns, so that other load on the machine
hits all alike. `images_per_second_per_core` is the median over rounds, by the cores that the path has workers on;
`ratio_to_torch_dataloader` the median of each round's ratio; `peak_rss_mb` what the process and its descendants hold
resident at most, pages that they share counted in each (Linux alone, else null). `--data` holds
food101_slice.parquet, photographs of 128 px, enlarged here; without it images are made up. Five minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import ray
from PIL import Image

from pipeline import compute
from pipeline.images import decode
from pipeline.index import ROW_GROUP, Shard, Shards, write_shard
from pipeline.plan import Plan, Purpose, chunk_of, generator
from pipeline.shards import SHARD_ROWS
from pipeline.stream import groups, preserved_order, stream
from pipeline.views import PHOTO_SHORT_SIDE, PHOTO_SIZE, PhotoViews

BATCH = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of values in [0, 1]
IMAGES, BATCHES, WARM_UPS = 512, 8, 1  # a round is BATCHES, per worker in a path of several
RAY_BATCHES = 48  # of a round of the Ray stream, per core: its start is not measured, so the rest should be long
SHARD_IMAGES = 128
SAMPLING = 0.05  # s


@dataclass(frozen=True)
class TorchViews:
    """Serve n items as a map-style data set, as PyTorch's users write it: PIL image → two float tensors."""

    images: Sequence[bytes]
    n: int
    weak: Callable[[Image.Image], Any]
    strong: Callable[[Image.Image], Any]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = Image.open(io.BytesIO(self.images[index % len(self.images)])).convert("RGB")
        return self.weak(image), self.strong(image)


# ---- paths: each sets itself up, then measures one round, in images per second and core, every time it is asked ------


def torch_dataloader(images: Sequence[bytes], cores: int) -> Iterator[float]:
    """Serve images by PIL, torchvision's transforms, float batches, one worker process a core."""
    from torch.utils.data import DataLoader  # in here: the other paths' memory is not to hold torch
    from torchvision import transforms as T

    crop, flip = T.RandomResizedCrop(PHOTO_SIZE), T.RandomHorizontalFlip()
    normal = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
    strong = T.Compose([crop, flip, T.AutoAugment(T.AutoAugmentPolicy.IMAGENET), normal])
    count = cores * BATCHES * BATCH
    data: Any = TorchViews(images, count, T.Compose([crop, flip, normal]), strong)
    loader = DataLoader(data, BATCH, num_workers=cores, persistent_workers=True)
    while True:
        start = time.perf_counter()
        for _ in loader:
            pass
        yield count / (time.perf_counter() - start) / cores


def actor_code(images: Sequence[bytes], cores: int) -> Iterator[float]:
    """Serve what a CPU actor of the stream makes, without Ray: decode once, both views, uint8 batches; one process."""
    views, turn = PhotoViews(), 0
    while True:
        start = time.perf_counter()
        for _ in range(BATCHES):
            rng = generator(0, Purpose.VIEWS, turn)
            pairs = [views.pair(decode(images[i % len(images)]), rng) for i in range(turn * BATCH, (turn + 1) * BATCH)]
            np.stack([weak for weak, _ in pairs] + [strong for _, strong in pairs])
            turn += 1
        yield BATCHES * BATCH / (time.perf_counter() - start)


def ray_stream(shards: int, images: Sequence[bytes], cores: int) -> Iterator[float]:
    """Serve the training stream whole, as the training loop uses it: Parquet shards, one actor a core, two consumers.

    Ray and its actors start anew every round, so that nothing is made ahead; the clock runs from the first batch on.
    """
    with tempfile.TemporaryDirectory() as folder:
        train = in_shards(images, folder, shards)
        places, group = 4, BATCH // 2
        steps = RAY_BATCHES * cores * BATCH // (places * group)
        chunk = chunk_of(group, 2 * 3 * PHOTO_SIZE**2)
        plan = Plan(train.row_groups, 0, places * group, group, 0, 0, steps, chunk)
        while True:
            compute.join(cpus=cores + 1)
            made = stream(ray.put(train), ray.put(train.take(np.arange(2))), PhotoViews(), plan, actors=cores)
            made.context.execution_options = preserved_order()
            arrived = ray.get([consume.remote(shard, plan, 2) for shard in made.streaming_split(2, equal=True)])
            begin, end = min(times[0] for times in arrived), max(times[-1] for times in arrived)
            yield (steps - 1) * plan.batch / (end - begin) / cores
            ray.shutdown()


@ray.remote(num_cpus=0)
def consume(shard: Any, plan: Plan, workers: int) -> list[float]:
    """Take what a training worker would, and return when each of its steps arrived."""
    times = []
    for step in plan.by_step(groups(shard, plan), workers):
        assert all(len(group["image"]) == 2 * plan.group for group in step)
        times.append(time.perf_counter())
    return times


def in_shards(images: Sequence[bytes], folder: str, shards: int) -> Shards:
    """Return `shards` shards of SHARD_IMAGES images each, the same ones again and again."""
    made = []
    for number in range(shards):
        name = f"train-{number:05d}-of-{shards:05d}.parquet"
        rows = [
            {
                "id": number * SHARD_IMAGES + row,
                "key": "",
                "label": row % 2,
                "split": "train",
                "trusted": False,
                "image": images[(number * SHARD_IMAGES + row) % len(images)],
            }
            for row in range(SHARD_IMAGES)
        ]
        shard = write_shard(f"{folder}/{name}", rows, classes=2)
        assert shard
        made.append(shard)
    return Shards(folder, tuple(made), ROW_GROUP)


USUAL = "torch DataLoader"
PATHS: dict[str, Callable[[Sequence[bytes], int], Iterator[float]]] = {
    USUAL: torch_dataloader,
    "actor code without Ray": actor_code,
    "whole Ray stream, 5 shards": partial(ray_stream, 5),
    "whole Ray stream, 50 shards": partial(ray_stream, 50),
}


def serve(path: str, images: Sequence[bytes], cores: int, connection: Connection) -> None:
    """Serve as a path's process: a round for every message, until the other end is closed."""
    cv2.setNumThreads(1)
    rounds = PATHS[path](images, cores)
    with suppress(EOFError):
        while True:
            connection.recv()
            connection.send(next(rounds))


# ---- images and memory -----------------------------------------------------------------------------------------------


def photographs(folder: Path) -> list[bytes]:
    """Return real photographs with a short side of 256 px."""
    table = pq.ParquetFile(folder / "food101_slice.parquet").read_row_group(0, ["image_jpeg"]).slice(0, IMAGES)
    images = []
    for encoded in table["image_jpeg"].to_pylist():
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        scale = PHOTO_SHORT_SIDE / min(image.size)
        larger = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC)
        images.append(jpeg(np.asarray(larger)))
    return images


def made_up() -> list[bytes]:
    """Return noise of all scales and a few shapes, 256×341 px: as many bytes as a photograph of this size."""
    rng, width = np.random.default_rng(0), round(PHOTO_SHORT_SIDE * 4 / 3)
    images = []
    for _ in range(IMAGES):
        image_HWC = np.full((PHOTO_SHORT_SIDE, width, 3), rng.uniform(60, 190, 3), np.float32)
        for side in (4, 16, 64, 128):
            coarse = rng.normal(0, 11, (side, side, 3)).astype(np.float32)
            image_HWC += cv2.resize(coarse, (width, PHOTO_SHORT_SIDE), interpolation=cv2.INTER_CUBIC)
        for _ in range(4):
            centre = int(rng.integers(width)), int(rng.integers(PHOTO_SHORT_SIDE))
            cv2.circle(image_HWC, centre, int(rng.integers(10, 60)), rng.uniform(0, 255, 3).tolist(), -1)
        images.append(jpeg(np.clip(image_HWC, 0, 255).astype(np.uint8)))
    return images


def jpeg(image_HWC: np.ndarray) -> bytes:
    """Encode at quality 90."""
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "JPEG", quality=90)
    return file.getvalue()


def resident(pid: int) -> int:
    """Return the bytes that a process and its descendants hold resident."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        tasks = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has ended meanwhile
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident(int(child)) for children in tasks for child in children)


# ---- the measurement -------------------------------------------------------------------------------------------------


def planning(rows: int = 1_000_000) -> dict[str, float]:
    """Return the seconds to plan an epoch of `rows` rows from the index, block by block, and to resume at 70 %."""
    count = -(-rows // SHARD_ROWS)
    last = rows - (count - 1) * SHARD_ROWS
    sizes = [SHARD_ROWS] * (count - 1) + [last]
    shards = tuple(Shard(f"{number}", "train", size, 0, 0, "", ()) for number, size in enumerate(sizes))
    memory, start = resident(os.getpid()), time.perf_counter()
    plan = Plan(Shards("", shards, ROW_GROUP).row_groups, 0, 256, 32, 32, 0, rows // 256, 4)
    for block in range(plan.blocks):
        plan.rows_of(block)
    planned = time.perf_counter()
    replace(plan, start=round(0.7 * plan.stop)).rows_of(0)
    resumed = time.perf_counter()
    grown = (resident(os.getpid()) - memory) / 2**20
    return {"rows": rows, "epoch_s": planned - start, "resume_s": resumed - planned, "memory_mb": grown}


def measure(images: Sequence[bytes], cores: int, rounds: int) -> list[dict[str, Any]]:
    """Return one row a path."""
    spawn = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    pids: dict[str, int] = {}
    rates: dict[str, list[float]] = {path: [] for path in PATHS}
    peak = dict.fromkeys(PATHS, 0)
    try:
        for path in PATHS:
            connections[path], theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(path, images, cores, theirs))
            process.start()
            theirs.close()
            pids[path] = process.pid or 0
        for _ in range(WARM_UPS + rounds):
            for path, connection in connections.items():
                connection.send("go")
                while not connection.poll(SAMPLING):
                    peak[path] = max(peak[path], resident(pids[path]))
                rates[path].append(connection.recv())
    finally:
        for connection in connections.values():
            connection.close()
    timed = {path: measured[WARM_UPS:] for path, measured in rates.items()}
    return [
        {
            "path": path,
            "images_per_second_per_core": statistics.median(timed[path]),
            "ratio_to_torch_dataloader": statistics.median(
                a / b for a, b in zip(timed[path], timed[USUAL], strict=True)
            ),
            "peak_rss_mb": peak[path] / 2**20 or None,
        }
        for path in PATHS
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Images a second and core of two views, the usual way and ours.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--data", type=Path, help="folder of food101_slice.parquet; made-up images without")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="workers of the paths that have workers")
    chosen = parser.parse_args(arguments)
    images = photographs(chosen.data) if chosen.data else made_up()
    told: dict[str, Any] = {"images": "Food-101" if chosen.data else "made up", "cores": chosen.cores}
    told |= {"mean_kb": round(statistics.mean(map(len, images)) / 1000, 1), "rounds": chosen.rounds}
    print(*(f"{key} {value}" for key, value in told.items()), sep=", ")
    told["rows"] = measure(images, chosen.cores, chosen.rounds)
    print(f"{'path':<28}{'images/s per core':>18}{'ratio':>8}{'peak RSS, MB':>14}")
    for row in told["rows"]:
        memory = f"{row['peak_rss_mb']:.0f}" if row["peak_rss_mb"] else "–"
        print(
            f"{row['path']:<28}{row['images_per_second_per_core']:>18.0f}"
            f"{row['ratio_to_torch_dataloader']:>8.2f}{memory:>14}"
        )
    told["planning"] = planning()
    print(
        "planning {rows:,} rows: {epoch_s:.2f} s an epoch, {resume_s:.3f} s to resume, {memory_mb:.0f} MB".format(
            **told["planning"]
        )
    )
    chosen.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
