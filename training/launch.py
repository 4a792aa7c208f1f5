"""Recipe → checks → Ray → TorchTrainer → result. What cannot work is reported in one line before a worker starts."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.data
import ray.train
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from pipeline import compute, storage
from pipeline.dataset import Dataset, InputError
from pipeline.features import of_features
from pipeline.plan import Group, Plan, chunk_of
from pipeline.stream import groups_here, preserved_order, stream
from pipeline.tree import absolute
from training.engine import networks, pretrained
from training.engine.loop import RayJob, train
from training.engine.monitor import NotFiniteError
from training.engine.setup import new_network, new_optimiser
from training.engine.worker import Job, Place, go_on
from training.objectives.interface import Alone
from training.recipe import Recipe, parse
from training.runs import checkpoint, model_file, notes, recipe_file, tracking
from training.runs.progress import Progress

# Else glibc gives the memory of every step back, and takes it anew page by page: a tenth of a step on a CPU.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 27),
}


@dataclass(frozen=True)
class Result:
    """Hold a finished run."""

    folder: str  # model.safetensors, ledger/, tensorboard/ and checkpoints are here
    history: list[dict[str, float]]  # one row an evaluation: step, cycle, lr, loss and its parts, top1, top5
    dataset: Dataset

    @property
    def top1(self) -> float:
        """Return the test accuracy, 0…1, at the end of the last cycle."""
        return self.history[-1]["top1"]


def main(recipe: Callable[[str], Recipe], *variants: Callable[[str], Recipe]) -> None:
    """Do the whole of a training script: parse, run, print the result; mistakes end it with one line."""

    def work() -> None:
        result, console = run(parse(recipe, variants=variants)), Console()
        last = result.history[-1]
        console.print(
            f"top-1 {100 * last['top1']:.2f} %, top-5 {100 * last['top5']:.2f} %: {result.folder}", highlight=False
        )

    guarded(work)


def guarded(
    work: Callable[[], Any], go_on: str = "run the same command again to go on from the last checkpoint"
) -> None:
    """Do `work`; what the user can fix ends the program with one line instead of a traceback.

    Stopped by hand it says how to `go_on`.
    """
    try:
        work()
    except (
        InputError,
        FileNotFoundError,
        ModuleNotFoundError,
        ConnectionError,
        ray.train.TrainingFailedError,
    ) as error:
        sys.exit(_one_line(error))
    except KeyboardInterrupt:
        sys.exit(f"stopped; {go_on}")


def _one_line(error: BaseException) -> str:
    while error.__cause__ is not None and not isinstance(error, InputError):
        error = error.__cause__
    return f"error: {error}"


NO_GRAPH = "cuda_graph wants a GPU and the run would be on a CPU: leave it out, or see --device"


@dataclass(frozen=True)
class Start:
    """Hold where a run begins, once all that could be refused has been looked at."""

    folder: str
    dataset: Dataset
    step: int  # of the newest checkpoint
    history: list[dict[str, float]]


def run(recipe: Recipe, console: Console | None = None, until: int | None = None) -> Result:
    """Train as the recipe says: by workers on embedded Ray or the cluster that RAY_ADDRESS names, or in this process.

    With `until`, the end of a cycle, it stops after that many steps; called again, it goes on from there.
    Raises InputError, before any worker starts, for whatever in recipe, data or storage cannot work.
    """
    console, stop = console or Console(), until or recipe.schedule.steps
    # Workers run in other folders.
    data, start_from = (absolute(url) if url else "" for url in (recipe.data, recipe.start_from))
    recipe, said = pretrained.as_trained(on_features(replace(recipe, data=data, start_from=start_from)))
    for line in said:
        console.print(f"{recipe.name}: {line}", highlight=False, soft_wrap=True)
    start = _prepare(recipe, console)
    if start.step >= stop:
        return Result(start.folder, start.history, start.dataset)
    if not recipe.most_workers:
        history = _train_here(recipe, start, planned(recipe, start.dataset, stop), console)
        return Result(start.folder, history, start.dataset)
    # Every worker and actor must be placed at once, and Ray Data needs a CPU to spare or it waits forever.
    compute.join(cpus=recipe.most_workers + recipe.actors + 1)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})  # other nodes may leave
    trainer = _trainer(recipe, start, planned(recipe, start.dataset, stop), queue, _use_gpu(recipe, console))
    with Progress(recipe, console) as progress:
        try:
            returned = _fit(trainer, queue, progress)
        except ray.train.TrainingFailedError:
            if failure := notes.read(start.folder, notes.FAILURE):
                raise InputError(failure) from None
            raise
    if "error" in returned:
        raise InputError(returned["error"])
    return Result(start.folder, returned["history"], start.dataset)


def on_features(recipe: Recipe) -> Recipe:
    """Return the recipe with the features at its `data` in place of images, where its network is one on features.

    Raises InputError where there are none.
    """
    if not networks.HEAD.fullmatch(recipe.network) or recipe.dataset.direct:
        return recipe
    return replace(recipe, dataset=of_features(recipe.dataset, recipe.data))


def _train_here(recipe: Recipe, start: Start, plan: Plan, console: Console) -> list[dict[str, float]]:
    """Train in this process, in which `actors` threads make the views, without Ray; return the history.

    Raises InputError where the loss or the parameters become NaN or infinite.
    """
    dataset, device = start.dataset, _device_here(recipe)
    console.print(f"{recipe.name}: training in this process on {device.type.upper()}", highlight=False)
    with Progress(recipe, console) as progress, contextlib.ExitStack() as closing:
        job = Job(recipe, plan, dataset.class_names, start.folder, progress)
        place = Place(0, Alone(), device, gauges={}, preempted=lambda: False)

        def groups(left: Plan) -> Iterator[Group]:
            return groups_here(dataset.train, dataset.probe, recipe.dataset.views, left, threads=recipe.actors)

        try:
            return go_on(job, place, dataset.tests, groups, closing)
        except (NotFiniteError, ValueError) as error:  # as workers have it
            raise InputError(str(error)) from None


def _device_here(recipe: Recipe) -> torch.device:
    """Return where this process trains; raises InputError where the recipe wants a GPU and there is none."""
    if torch.cuda.is_available() and recipe.device != "cpu":
        return torch.device("cuda")
    if recipe.device == "gpu":
        raise InputError("this machine has no GPU: leave --device out")
    if recipe.cuda_graph:
        raise InputError(NO_GRAPH)
    return torch.device("cpu")


def _prepare(recipe: Recipe, console: Console) -> Start:
    """Look at storage, tracker, network, data and an earlier run's folder; raise InputError for what cannot work."""
    folder = _run_folder(recipe)
    tracking.require(recipe.tracker)
    _check_network(recipe)
    dataset = recipe.dataset.load(recipe.data, recipe.seed)
    step, history = _resume_point(folder, recipe, dataset.digest, console)
    if (recipe.start_from or recipe.weights) and not step:
        sha256 = _fetch_weights(recipe, dataset.class_names, folder, console)
        recipe_file.write(folder, recipe, dataset.digest, weights=sha256)
    for note in dataset.notes:
        console.print(f"{recipe.name}: {note}", highlight=False, soft_wrap=True)
    if step:
        console.print(
            f"{recipe.name}: {step:,} of {recipe.schedule.steps:,} steps are done in {folder}", highlight=False
        )
    return Start(folder, dataset, step, history)


def planned(recipe: Recipe, dataset: Dataset, stop: int) -> Plan:
    """Return the order of reading from step 0 to `stop`."""
    probe_group = recipe.probe_batch // recipe.groups
    row_bytes = math.prod(recipe.dataset.shape) * (2 if recipe.dataset.direct else 1)  # float16, uint8
    return Plan(
        row_groups=dataset.train.row_groups,
        seed=recipe.seed,
        batch=recipe.batch,
        group=recipe.group,
        probe=probe_group,
        start=0,
        stop=stop,
        chunk=chunk_of(recipe.group, row_bytes * (2 + probe_group / recipe.group)),
    )


def _trainer(recipe: Recipe, start: Start, plan: Plan, queue: Queue, use_gpu: bool) -> TorchTrainer:
    """Return Ray Train's trainer: every start of its workers reads what the newest checkpoint leaves of `plan`."""
    folder, dataset = start.folder, start.dataset
    examples = [ray.put(dataset.train), ray.put(dataset.probe)]
    tests = {name: ray.put(test) for name, test in dataset.tests.items()}

    def remaining() -> ray.data.Dataset:
        plan_left = replace(plan, start=checkpoint.newest_step(folder))
        return stream(examples[0], examples[1], recipe.dataset.views, plan_left, recipe.actors)

    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(recipe.timeout)  # of Ray Train's own barriers
    filesystem, path = ray_storage(folder)
    return TorchTrainer(
        train,
        train_loop_config={"job": RayJob(recipe, plan, dataset.class_names, folder, queue, tests, examples)},
        torch_config=TorchConfig(timeout_s=recipe.timeout),
        scaling_config=ray.train.ScalingConfig(
            num_workers=recipe.workers, use_gpu=use_gpu, label_selector=compute.training_nodes()
        ),
        run_config=ray.train.RunConfig(
            name=recipe.name,
            storage_path=os.path.dirname(path),
            storage_filesystem=filesystem,
            # The loop itself gives up where it gets no further, or where a person must fix something.
            failure_config=ray.train.FailureConfig(max_failures=-1),
            worker_runtime_env={} if use_gpu else {"env_vars": KEEP_MEMORY},
        ),
        datasets={} if recipe.dataset.direct else {"train": remaining},
        dataset_config=ray.train.DataConfig(execution_options=preserved_order(), enable_shard_locality=False),
    )


def _fit(trainer: TorchTrainer, queue: Queue, progress: Progress) -> dict[str, Any]:
    """Run the trainer while a thread shows what rank 0 reports."""
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
    """Tell whether workers get a GPU each, and print it.

    Raises InputError where this machine alone lacks the GPUs asked for, and where cuda_graph would run on a CPU.
    """
    gpus, least, most = int(ray.cluster_resources().get("GPU", 0)), recipe.least_workers, recipe.most_workers
    to_come = least > 0 and compute.training_nodes() is not None  # set apart for their GPUs, and brought up when asked
    use_gpu = recipe.device == "gpu" or (recipe.device == "auto" and (gpus >= max(least, 1) or to_come))
    if recipe.device == "gpu" and gpus < least and "RAY_ADDRESS" not in os.environ:
        raise InputError(f"{least} workers want a GPU each and this machine has {gpus}: set --device or --workers")
    if recipe.cuda_graph and not use_gpu:
        raise InputError(NO_GRAPH)
    place = f"{most} workers" if least == most else f"{least} to {most} workers"
    console.print(f"{recipe.name}: training in {place} on {'GPU' if use_gpu else 'CPU'}", highlight=False)
    return use_gpu


def _run_folder(recipe: Recipe) -> str:
    """Return the absolute path or URL of the run's folder; raises InputError where its storage cannot be written."""
    where = recipe.storage if "://" in recipe.storage else os.path.abspath(recipe.storage)
    folder = storage.join(where, recipe.name)
    storage.require_writable(folder)
    return folder


def ray_storage(folder: str) -> tuple[PyFileSystem | None, str]:
    """Return the run's folder as Ray Train wants it: URLs through fsspec, like all else that is written there."""
    if "://" not in folder:
        return None, folder
    filesystem, path = storage.connect(folder)
    return PyFileSystem(FSSpecHandler(filesystem)), path


def _resume_point(folder: str, recipe: Recipe, data: str, console: Console) -> tuple[int, list[dict[str, float]]]:
    """Return step and history of an earlier run's checkpoint, if its folder is of this recipe and data.

    From the first checkpoint on it is: raises InputError where it belongs to another recipe or other data. Damaged
    checkpoints are reported and removed, so that whoever looks later finds the same one.
    """
    notes.clear(folder)
    saved = checkpoint.latest(
        folder, lambda warning: console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    )
    if saved is None:
        recipe_file.write(folder, recipe, data)
        checkpoint.drop_after(folder, 0)
        return 0, []
    recipe_file.require_same(folder, recipe, data)
    checkpoint.drop_after(folder, int(saved["step"]))
    return int(saved["step"]), saved["history"]


def _fetch_weights(recipe: Recipe, class_names: tuple[str, ...], folder: str, console: Console) -> str:
    """Read the weights to start from, once, and write them into the run's folder as they fit its network.

    Returns the sha256 of what was read.
    """
    if recipe.start_from:
        model = model_file.read(recipe.start_from)
        _check_start(recipe, model)
        found, sha256, other = model.weights, model.sha256, model.class_names != class_names
    else:
        found, sha256 = pretrained.read(recipe.weights, recipe.network)
        other = False
    network = new_network(replace(recipe, precision="float32"), len(class_names), 1, torch.device("cpu"))
    tensors, new = pretrained.fitted(network, found, len(class_names), new_head=other)
    pretrained.write(folder, tensors, sha256)
    what = f"starts from {recipe.start_from or recipe.network}, {len(found)} tensors, sha256 {sha256[:16]}"
    what += f"; new: {', '.join(new)}" if new else ""
    console.print(f"{recipe.name}: {what}", highlight=False, soft_wrap=True)
    return sha256


def _check_start(recipe: Recipe, model: model_file.ModelFile) -> None:
    """Raise InputError where the run to start from has another network, or another input."""
    if model.recipe["network"] != recipe.network:
        raise InputError(
            f"{recipe.start_from} has trained {model.recipe['network']}, not {recipe.network}: "
            "set --network to that, or start from another run"
        )
    if bool(model.recipe.get("weights")) != bool(recipe.weights):
        made, fix = ("with", "set it too") if model.recipe.get("weights") else ("without", "leave it out")
        raise InputError(f"{recipe.start_from} was made {made} --weights, which decides how it sees images: {fix}")


def _check_network(recipe: Recipe) -> None:
    """Build the network for any classes and show it a blank image, without memory, to refuse early what cannot work."""
    height, width, channels = recipe.dataset.shape
    try:
        with torch.device("meta") as nowhere:
            network = new_network(recipe, classes=10, workers=recipe.most_workers or 1, device=nowhere).eval()
            new_optimiser(recipe, network, torch.nn.Module(), classes=10)
            if recipe.objective.forward_mode:
                networks.require_forward_mode(recipe.network, network)
            image_BCHW = torch.empty(2, channels, height, width)
            if recipe.precision == "float64":
                network, image_BCHW = network.double(), image_BCHW.double()
            with torch.no_grad():
                logits_BK = network(image_BCHW)
        if logits_BK.shape != (2, 10):
            raise ValueError(
                f"{recipe.network} is no classifier, it gives features of {tuple(logits_BK.shape)}: choose another"
            )
    except ValueError as error:
        raise InputError(str(error)) from error
    except NotImplementedError:
        pass  # without memory some operations are not there: then it shows later
    except (RuntimeError, AssertionError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{recipe.network} cannot take images of {height}×{width} px ({first}): change the size or the network"
        ) from error
