"""Recipe → checks → Ray → TorchTrainer → result. What cannot work is said in one line before a worker starts."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fsspec
import ray
import ray.train
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue
from rich.console import Console

from pipeline import compute
from pipeline.dataset import Dataset, InputError
from pipeline.plan import Plan, chunk_of
from pipeline.stream import preserved_order, stream
from training import networks, tracking
from training.loop import Job, train
from training.monitor import NotFiniteError
from training.progress import Progress
from training.recipe import Recipe, as_json, parse

# What may differ when a run is resumed; everything else decides the result.
FREE_TO_CHANGE = ("workers", "actors", "device", "tracker", "data", "storage")


@dataclass(frozen=True)
class Result:
    """A finished run."""

    folder: str  # model.safetensors, ledger/, tensorboard/ and checkpoints are here
    history: list[dict[str, float]]  # one row an evaluation: step, cycle, lr, loss and its parts, top1, top5
    dataset: Dataset

    @property
    def top1(self) -> float:
        """Test accuracy at the end of the last cycle."""
        return self.history[-1]["top1"]


def main(recipe: Callable[[str], Recipe]) -> None:
    """The whole of a training script: parse, run, print the result; mistakes end it with one line."""

    def work() -> None:
        result, console = run(parse(recipe)), Console()
        last = result.history[-1]
        console.print(
            f"top-1 {100 * last['top1']:.2f} %, top-5 {100 * last['top5']:.2f} %: {result.folder}", highlight=False
        )

    guarded(work)


def guarded(work: Callable[[], Any]) -> None:
    """Do `work`; what the user can mend ends the program with one line instead of a traceback."""
    try:
        work()
    except (InputError, NotFiniteError, FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(_one_line(error))
    except ray.train.TrainingFailedError as error:
        # Ray wraps what a worker raised, and has no public way back to it.
        failures = [
            getattr(failure, "_base_exc", failure) for failure in getattr(error, "worker_failures", {}).values()
        ]
        known = [failure for failure in failures if isinstance(failure, (NotFiniteError, ValueError))]
        sys.exit(_one_line(known[0] if known else error))
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on from the last checkpoint")


def _one_line(error: BaseException) -> str:
    while error.__cause__ is not None and not isinstance(error, InputError):
        error = error.__cause__
    return f"error: {error}"


def run(recipe: Recipe, console: Console | None = None) -> Result:
    """Train as the recipe says, on embedded Ray or on the cluster that RAY_ADDRESS names.

    Raises InputError, before any worker starts, for whatever in recipe, data or storage cannot work.
    """
    console = console or Console()
    folder = _run_folder(recipe)
    tracking.require(recipe.tracker)
    _check_network(recipe)
    dataset = recipe.dataset.load(recipe.data, recipe.seed)
    done = _resume_point(folder, recipe)
    start = int(done["step"])
    for note in dataset.notes:
        console.print(f"{recipe.name}: {note}", highlight=False, soft_wrap=True)
    if start:
        console.print(
            f"{recipe.name}: {start:,} of {recipe.schedule.steps:,} steps are done in {folder}", highlight=False
        )
    if start == recipe.schedule.steps:
        return Result(folder, done["history"], dataset)
    # Every worker and actor must be placed at once, and Ray Data needs a CPU to spare or it waits forever.
    compute.join(cpus=recipe.workers + recipe.actors + 1)
    views = recipe.dataset.views
    view = views.test(dataset.probe.image(0))
    probe_group = recipe.probe_batch // recipe.groups
    plan = Plan(
        row_groups=dataset.train.row_groups,
        seed=recipe.seed,
        batch=recipe.batch,
        group=recipe.group,
        probe=probe_group,
        start=start,
        stop=recipe.schedule.steps,
        chunk=chunk_of(recipe.group, view.nbytes * (2 + probe_group / recipe.group)),
    )
    train_ref, probe_ref = ray.put(dataset.train), ray.put(dataset.probe)
    tests = {name: ray.put(test) for name, test in dataset.tests.items()}
    queue = Queue(actor_options={"num_cpus": 0})
    job = Job(recipe, plan, tests, view.shape[-1], dataset.class_names, folder, queue)
    use_gpu = _use_gpu(recipe, console)
    filesystem, path = _ray_storage(folder)
    trainer = TorchTrainer(
        train,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(num_workers=recipe.workers, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(
            name=recipe.name,
            storage_path=os.path.dirname(path),
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
        datasets={"train": lambda: stream(train_ref, probe_ref, views, plan, recipe.actors)},
        dataset_config=ray.train.DataConfig(execution_options=preserved_order(), enable_shard_locality=False),
    )
    with Progress(recipe, console) as progress:
        history = _fit(trainer, queue, progress)
    return Result(folder, history, dataset)


def _fit(trainer: TorchTrainer, queue: Queue, progress: Progress) -> list[dict[str, float]]:
    """Run the trainer while a thread shows what rank 0 tells."""
    finished = threading.Event()

    def listen() -> None:
        while not finished.is_set() or queue.qsize():
            with contextlib.suppress(Empty):
                progress.show(queue.get(timeout=0.5))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        return trainer.fit().return_value
    finally:
        finished.set()
        listener.join()
        queue.shutdown()


def _use_gpu(recipe: Recipe, console: Console) -> bool:
    """Whether workers get a GPU each; says so. Raises InputError where this machine alone lacks the GPUs asked for."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    use_gpu = recipe.device == "gpu" or (recipe.device == "auto" and gpus >= max(recipe.workers, 1))
    if recipe.device == "gpu" and gpus < recipe.workers and "RAY_ADDRESS" not in os.environ:
        raise InputError(
            f"{recipe.workers} workers want a GPU each and this machine has {gpus}: set --device or --workers"
        )
    place = f"{recipe.workers} workers" if recipe.workers else "this process"
    console.print(f"{recipe.name}: training in {place} on {'GPU' if use_gpu else 'CPU'}", highlight=False)
    return use_gpu


def _run_folder(recipe: Recipe) -> str:
    """Absolute path or URL of the run's folder; raises InputError where its storage cannot be written."""
    storage = recipe.storage if "://" in recipe.storage else os.path.abspath(recipe.storage)
    folder = f"{storage.rstrip('/')}/{recipe.name}"
    try:
        filesystem, path = fsspec.core.url_to_fs(folder)
        filesystem.makedirs(path, exist_ok=True)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"storage {recipe.storage} cannot be written ({error}): give a writable path or URL"
        ) from error
    return folder


def _ray_storage(folder: str) -> tuple[PyFileSystem | None, str]:
    """The run's folder as Ray Train wants it: URLs through fsspec, like everything else that is written there."""
    if "://" not in folder:
        return None, folder
    filesystem, path = fsspec.core.url_to_fs(folder)
    return PyFileSystem(FSSpecHandler(filesystem)), path


def _resume_point(folder: str, recipe: Recipe) -> dict[str, Any]:
    """The checkpoint of an earlier run of this recipe, or step 0; from the first on, the folder belongs to that recipe.

    Raises InputError where it belongs to another one, or where its checkpoint cannot be read.
    """
    wanted = {name: value for name, value in as_json(recipe).items() if name not in FREE_TO_CHANGE}
    wanted = json.loads(json.dumps(wanted))
    filesystem, path = fsspec.core.url_to_fs(f"{folder}/recipe.json")
    checkpoint = _checkpoint(folder)
    if not checkpoint["step"]:
        filesystem.pipe_file(path, json.dumps(wanted, indent=2).encode())
        return checkpoint
    made_with = json.loads(filesystem.cat_file(path))
    different = [name for name in wanted if wanted[name] != made_with.get(name)]
    if different:
        raise InputError(f"{folder} was made with another {different[0]}: remove it or choose another --name")
    return checkpoint


def _checkpoint(folder: str) -> dict[str, Any]:
    """The latest checkpoint that Ray Train committed, or step 0; raises InputError where it cannot be read."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    snapshot = f"{path}/checkpoint_manager_snapshot.json"
    if not filesystem.exists(snapshot):
        return {"step": 0}
    name = "snapshot"
    try:
        latest = json.loads(filesystem.cat_file(snapshot))["latest_checkpoint_result"]
        if latest is None:
            return {"step": 0}
        name = latest["checkpoint_dir_name"]
        with filesystem.open(f"{path}/{name}/state.pt", "rb") as file:
            return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch and json raise many kinds for a damaged file
        raise InputError(
            f"checkpoint {folder}/{name} cannot be read ({type(error).__name__}): remove {folder}, or choose --name"
        ) from error


def _check_network(recipe: Recipe) -> None:
    """Build the network for any channels and classes, without memory, to refuse an unknown name early."""
    try:
        with torch.device("meta"):
            networks.build(recipe.network, channels=3, classes=10, seed=recipe.seed)
    except ValueError as error:
        raise InputError(str(error)) from error
