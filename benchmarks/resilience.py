"""What becomes of a run when something breaks: a table of faults on real clusters of several raylets on this machine.

    python -m benchmarks.resilience --out resilience.json
    python -m benchmarks.resilience --out resilience.json --faults hang driver_killed

Every fault has a fresh cluster: a head without CPUs, where the driver is attached, and two nodes. The run trains 80
steps on digits on two workers. The program itself has no hooks: faults strike from the objective and from the data
set's views, which are this file's, or from outside. The run is compared with one that nothing disturbed: `rows_lost`
counts rows of that one's ledger, by (epoch, id), that are not there with equal values, `rows_repeated_after_dedup`
rows that are there more than once; `parameters_equal` means to the bit. `seconds_to_resume` is the longest wait, from
the fault on, for a step that was not done before. A run that does not end within its time did not survive.

On 2 cores a fault takes about a minute, and what waits for Ray to give a node or a worker up two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import fsspec
import numpy as np
import ray.train
import safetensors.numpy
from ray._private.node import Node
from ray.cluster_utils import Cluster
from ray.util import get_node_ip_address
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.faults import (
    FULL_UNTIL,
    STRIKE,
    EncodedDigits,
    SlowDigits,
    done,
    kill_in_checkpoint,
    kill_in_evaluation,
    kill_in_step,
    note,
    note_place,
    notes,
    nothing,
    once,
    ranks_started,
    refuse_writes,
    slow_down,
    stand_alone,
    stop_for_good,
)
from pipeline.plan import Purpose, key
from training import launch
from training.engine.schedule import Schedule
from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers
from training.objectives.registry import METHODS
from training.recipe import Recipe, looking_ahead
from training.runs import checkpoint, ledger

STEPS, CHECKPOINT_STEPS, EVALUATE_EVERY = 80, 10, 20
SECOND_STRIKE = 57  # of what strikes twice
BATCH, GROUP, SEED = 100, 50, 0
TIMEOUT = 20.0  # recipe.timeout, seconds
DEADLINE = 240.0  # of a run, seconds: one that takes longer hangs
OUTAGE = 5.0  # seconds without storage
DISK_BYTES = 24 << 20
CPUS = 3  # of a node: two nodes hold two workers, two actors and a CPU to spare
SEAT = "seat"  # what a worker of an elastic run needs beside a CPU
BUCKET = "resilience"
CLOUD = {"FSSPEC_GCS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # what the emulator understands
SETTINGS = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
SETTINGS["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"  # by itself 5 s, half the run

Row = dict[str, Any]


# ---- the run ---------------------------------------------------------------------------------------------------------


@cache
def group_numbers() -> dict[int, int]:
    """Return the group's number by its key, the only thing in a batch that tells its step."""
    return {key(SEED, Purpose.MIXUP, group): group for group in range(STEPS * BATCH // GROUP)}


@dataclass(frozen=True)
class Faulty(Objective):
    """Note each step of an objective, and let a fault strike."""

    inner: Objective
    fault: str
    folder: str  # of the notes

    @property
    def average_parameters(self) -> bool:  # type: ignore[override]
        """Return what the objective inside says."""
        return self.inner.average_parameters

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        step, rank = divmod(group_numbers()[batch.group_keys[0]], BATCH // GROUP)
        note_place(self.folder, f"rank {rank}")
        FAULTS[self.fault].inside(self.folder, step, rank)
        outcome = self.inner(model, batch, moment, workers)
        if rank == 0:
            note(self.folder, "steps", f"{step} {time.time()}")
        return outcome


# ---- outside the run -------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """Watch a run on its cluster, as seen from outside."""

    name: str
    folder: str  # of notes and logs
    url: str  # of storage
    cluster: Cluster
    started: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """Start the driver: a command as a person would give it."""
        code = f"from benchmarks import resilience; resilience.drive({self.name!r}, {self.folder!r}, {self.url!r})"
        with open(f"{self.folder}/driver.log", "a") as log:
            self.driver = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, start_new_session=True)

    def wait_for_step(self, step: int) -> None:
        """Return when the step is done, or the driver has ended."""
        self.wait(lambda: done(self.folder) >= step or self.driver.poll() is not None)

    def wait(self, enough: Callable[[], bool]) -> None:
        """Return when there is enough; raises TimeoutError when the run's time is over."""
        while not enough():
            if time.monotonic() - self.started > DEADLINE:
                raise TimeoutError(f"not over after {DEADLINE:.0f} s, at step {done(self.folder)}")
            time.sleep(0.1)


def leave_alone(scene: Scene) -> str:
    """Do nothing."""
    return ""


def busy_node(scene: Scene) -> tuple[Node, str]:
    """Return a node with a data actor, and with a worker too where there is one; and what it holds."""
    scene.wait_for_step(STRIKE)
    places = [line.split() for line in notes(scene.folder, "places")]
    actors = {place[-1] for place in places if place[0] == "actor"}
    workers = {place[-1] for place in places if place[0] == "rank"}
    nodes = {str(node.all_processes["raylet"][0].process.pid): node for node in scene.cluster.worker_nodes}
    chosen = next(iter(nodes.keys() & actors & workers or nodes.keys() & actors))
    held = [" ".join(place[:-1]) for place in places if place[-1] == chosen]
    return nodes[chosen], f"it held {', '.join(held)}"


def remove_node(scene: Scene) -> str:
    """Take a node away without grace."""
    node, said = busy_node(scene)
    once(scene.folder)
    scene.cluster.remove_node(node, allow_graceful=False)
    return said


def replace_node(scene: Scene) -> str:
    """Take a node away, and bring another."""
    said = remove_node(scene)
    add_node(scene.cluster)
    return said


def remove_node_for_a_while(scene: Scene) -> str:
    """Take a node away, and bring another once the run goes on without."""
    said = remove_node(scene)
    starts = ranks_started(scene.folder, 0)
    scene.wait(lambda: ranks_started(scene.folder, 0) > starts or scene.driver.poll() is not None)
    add_node(scene.cluster)
    return said


def give_notice(scene: Scene) -> str:
    """Tell the cluster that a node will be taken, as clouds do of spot machines; take it once a checkpoint is there."""
    node, said = busy_node(scene)
    once(scene.folder)
    told = [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
        "--deadline-remaining-seconds",
        "60",
    ]
    ray_command = str(Path(sys.executable).with_name("ray"))
    drain = [ray_command, "drain-node", "--address", scene.cluster.address, "--node-id", node.node_id, *told]
    subprocess.run(drain, check=True, capture_output=True)
    kept: list[int] = []

    def reacted() -> bool:
        kept[:] = [commit.step for commit in checkpoint.commits(f"{scene.url}/run")]
        return bool(kept) or scene.driver.poll() is not None

    scene.wait(reacted)
    scene.cluster.remove_node(node, allow_graceful=False)
    add_node(scene.cluster)
    return f"{said}; checkpoint on notice: step {kept[0]}"


def kill_driver(scene: Scene) -> str:
    """Kill the driver, and give the same command again."""
    scene.wait_for_step(STRIKE)
    once(scene.folder)
    scene.driver.kill()
    scene.driver.wait()
    scene.start()
    return ""


def lose_node_and_driver(scene: Scene) -> str:
    """Lose a node and the driver at once, after a worker was lost and replaced; then add a node and start again."""
    scene.wait_for_step(SECOND_STRIKE)
    scene.driver.kill()
    scene.driver.wait()
    said = replace_node(scene)
    scene.start()
    return said


def stop_storage(scene: Scene) -> str:
    """Stop the storage service, and start it again."""
    scene.wait_for_step(STRIKE)
    once(scene.folder)
    EMULATOR.stop()
    time.sleep(OUTAGE)
    EMULATOR.start()
    return f"{OUTAGE:.0f} s without storage"


def fill_disk(scene: Scene) -> str:
    """Write all that the disk takes, and remove it a while later."""
    if Path(scene.folder, "stand_in").exists():
        return "a stand-in that refuses writes: mount is not allowed here"
    scene.wait_for_step(STRIKE)
    once(scene.folder)
    ballast = Path(scene.url, "ballast")
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    scene.wait_for_step(FULL_UNTIL)
    ballast.unlink()
    return "a tmpfs of its own"


def free_port() -> int:
    """Return a port that nobody uses now and no system hands out for itself: another process may take one of those."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)  # Linux hands out ports from 32768 on, others higher ones
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return port


def find_warning(scene: Scene) -> str:
    """Wait until the log tells of the poisoned image."""
    found: list[str] = []

    def told() -> bool:
        found[:] = [line for line in notes(scene.folder, "driver.log") if "plain grey" in line]
        return bool(found) or scene.driver.poll() is not None

    scene.wait(told)
    return found[0][found[0].index("warning:") :] if found and once(scene.folder) else ""


class Emulator:
    """Run Google Cloud Storage in a process on loopback, with its data on disk: it may be stopped and started again."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.data = ""
        self.port = free_port()

    def start(self) -> None:
        """Return when it answers."""
        command = [sys.executable, "-m", "gcp_storage_emulator", "--data-dir", self.data, "start", "--quiet"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--default-bucket", BUCKET]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.1)
        raise RuntimeError("the storage emulator does not start")

    def stop(self) -> None:
        """End it as a failing machine does."""
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None


EMULATOR = Emulator()


# ---- the faults ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Say what strikes, and what is different about its run."""

    inside: Callable[[str, int, int], None] = nothing  # by every worker before each of its steps: folder, step, rank
    outside: Callable[[Scene], str] = leave_alone  # while the run runs; what it says goes to the row's note
    twin: str = "undisturbed"  # the run to compare with
    elastic: bool = False  # one worker or two, at most one on a node; equal but for rounding, so in float64
    kept: bool = True  # whether checkpoints are written without a reason


FAULTS = {
    "undisturbed": Fault(),
    "worker_killed_in_step": Fault(kill_in_step),
    "worker_killed_in_evaluation": Fault(kill_in_evaluation),
    "worker_killed_in_checkpoint": Fault(kill_in_checkpoint),
    "node_removed": Fault(outside=replace_node),
    "driver_killed": Fault(outside=kill_driver),
    "storage_down": Fault(outside=stop_storage),
    "full_disk": Fault(refuse_writes, fill_disk),
    "poisoned_image": Fault(outside=find_warning, twin="grey_image"),
    "grey_image": Fault(),
    "data_actor_out_of_memory": Fault(),
    "slow_rank": Fault(slow_down),
    "preemption_notice": Fault(slow_down, give_notice, kept=False),
    "elastic_shrink": Fault(outside=remove_node, twin="two_workers", elastic=True),
    "elastic_growth": Fault(stand_alone, remove_node_for_a_while, twin="two_workers", elastic=True),
    "two_workers": Fault(elastic=True),
    "hang": Fault(stop_for_good),
    "one_after_another": Fault(kill_in_step, lose_node_and_driver),
}
TWINS = {fault.twin for fault in FAULTS.values()}


def recipe(name: str, folder: str, url: str) -> Recipe:
    """Return the run that a fault strikes, on a network whose result does not depend on the number of workers."""
    elastic = FAULTS[name].elastic
    plain = {"poisoned_image": EncodedDigits(broken=True), "grey_image": EncodedDigits(broken=False)}
    return Recipe(
        name="run",
        dataset=plain.get(name) or SlowDigits(fault=name, folder=folder),
        objective=Faulty(looking_ahead(METHODS["reference"](), None if elastic else 0.1), name, folder),
        storage=url,
        network="wrn-10-1:group",
        schedule=Schedule(lr=0.001 if elastic else 0.05, first_cycle=STEPS, cycles=1),
        optimiser="adamw" if elastic else "sgd",  # whose state has more to carry over
        batch=BATCH,
        probe_batch=20,
        group=GROUP,
        workers=(1, 2) if elastic else 2,
        precision="float64" if elastic else "float32",
        actors=2,
        evaluate_every=EVALUATE_EVERY if FAULTS[name].kept else 0,
        checkpoint_steps=CHECKPOINT_STEPS if FAULTS[name].kept else 0,
        timeout=TIMEOUT,
        seed=SEED,
    )


def drive(name: str, folder: str, url: str) -> None:
    """Run the driver's whole program."""
    if FAULTS[name].elastic:  # of which a node has one, as of a GPU: two workers do not crowd the node that is left
        ray.train.ScalingConfig = partial(
            ray.train.ScalingConfig,
            resources_per_worker={"CPU": 1, SEAT: 1},
            elastic_resize_monitor_interval_s=1,  # by itself a minute, as long as the run
        )
    launch.guarded(lambda: launch.run(recipe(name, folder, url)))


@contextlib.contextmanager
def place(name: str, folder: str) -> Iterator[str]:
    """Yield the storage of a fault's run."""
    if name == "storage_down":
        EMULATOR.data = f"{folder}/cloud"
        EMULATOR.start()
        try:
            yield f"gs://{BUCKET}/runs"
        finally:
            EMULATOR.stop()
        return
    disk = f"{folder}/disk"
    os.mkdir(disk)
    if name != "full_disk":
        yield disk
        return
    try:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", disk]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        Path(folder, "stand_in").touch()
    try:
        yield disk
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Run a head without CPUs and two nodes; all their processes are gone in the end."""
    port = free_port()
    # Known before the nodes start, because what Ray starts on them for itself looks it up.
    os.environ["RAY_ADDRESS"] = f"{get_node_ip_address()}:{port}"
    head = {"num_cpus": 0, "include_dashboard": False, "gcs_server_port": port}
    held = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            add_node(held)
        yield held
    finally:
        held.shutdown()
        del os.environ["RAY_ADDRESS"]


def add_node(held: Cluster) -> None:
    """Add one more node for work."""
    held.add_node(num_cpus=CPUS, resources={SEAT: 1})


def observe(name: str, folder: str) -> tuple[Row, Row]:
    """Run with a fault: what it says of itself for the table, and what its storage holds in the end."""
    said: Row = {"fault": name, "survived": False}
    with place(name, folder) as url, cluster() as held:
        scene = Scene(name, folder, url, held)
        scene.start()
        try:
            said["note"] = FAULTS[name].outside(scene)
            scene.wait(lambda: scene.driver.poll() is not None)
            said["survived"] = scene.driver.returncode == 0 and (name in TWINS or bool(notes(folder, "fault")))
        except TimeoutError as error:
            said["note"] = str(error)
        finally:
            if scene.driver.poll() is None:
                scene.driver.kill()
                scene.driver.wait()
            for process in notes(folder, "stopped"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
        said["seconds"] = round(time.monotonic() - scene.started, 1)
        said["starts"] = ranks_started(folder, 0)
        return said, results(f"{url}/run")


def results(folder: str) -> Row:
    """Return ledger and parameters of a run, as far as it came."""
    held: Row = {"rows": {}, "count": 0, "parameters": None}
    with contextlib.suppress(FileNotFoundError):
        table = ledger.read(folder)
        columns = {column: table[column].to_numpy() for column in table.column_names}
        held["rows"] = {
            (epoch, each): tuple(column[row] for column in columns.values())
            for row, (epoch, each) in enumerate(zip(columns["epoch"].tolist(), columns["id"].tolist(), strict=True))
        }
        held["count"] = table.num_rows
        with fsspec.open(f"{folder}/model.safetensors") as file:
            held["parameters"] = safetensors.numpy.load(file.read())
    return held


def compared(name: str, said: Row, ours: Row, theirs: Row) -> Row:
    """Return the row of the table: what is left of `theirs`, the twin's results, in `ours`."""
    folder = said.pop("folder")
    part = slice(4) if FAULTS[name].elastic else slice(None)  # step, epoch, id and label; the rest is rounded otherwise
    lost = sum(key not in ours["rows"] or ours["rows"][key][part] != row[part] for key, row in theirs["rows"].items())
    equal, apart = False, None
    if ours["parameters"] is not None:
        pairs = [(ours["parameters"][key], value) for key, value in theirs["parameters"].items()]
        equal = all(np.array_equal(a, b) for a, b in pairs)
        apart = max(float(np.abs(a - b).max()) for a, b in pairs)
    return {
        "fault": name,
        "survived": said["survived"],
        "rows_lost": lost,
        "rows_repeated_after_dedup": ours["count"] - len(ours["rows"]),
        "seconds_to_resume": longest_wait(folder),
        "parameters_equal": equal,
        "max_difference": apart,
        **{key: said[key] for key in ("starts", "seconds", "note")},
    }


def longest_wait(folder: str) -> float | None:
    """Return, from the fault on, the longest time until a new step was done; None without a fault."""
    struck = notes(folder, "fault")
    if not struck:
        return None
    longest, last, furthest = 0.0, float(struck[0]), -1
    for line in notes(folder, "steps"):
        step, when = int(line.split()[0]), float(line.split()[1])
        if step > furthest:
            furthest = step
            if when > float(struck[0]):
                longest, last = max(longest, when - last), when
    return round(longest, 1)


def measure(faults: Sequence[str], scratch: str, console: Console) -> Iterator[Row]:
    """Yield the rows of the table, as they come; a twin's run is made once."""
    twins: dict[str, Row] = {}
    for name in faults:
        for each in (FAULTS[name].twin, name):
            if each in twins:
                continue
            folder = f"{scratch}/{each}"
            os.mkdir(folder)
            said, found = observe(each, folder)
            if each == name:
                yield compared(name, {**said, "folder": folder}, found, twins[FAULTS[name].twin])
            elif said["survived"]:
                twins[each] = found
            else:
                fail(f"the {each} run failed ({said.get('note')}): see {folder}/driver.log")
            console.print(f"{each}: {said}", highlight=False, soft_wrap=True)


def fail(why: str) -> NoReturn:
    """End the program."""
    sys.exit(f"error: {why}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    every = [name for name in FAULTS if name not in TWINS]
    parser = argparse.ArgumentParser(description="What becomes of a run when something breaks.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--faults", nargs="+", choices=every, default=every, metavar="FAULT", help=", ".join(every))
    parser.add_argument("--keep", help="an empty folder for logs and storage of all runs; else they are removed")
    chosen = parser.parse_args(arguments)
    console = Console()
    os.environ.update(SETTINGS | CLOUD, STORAGE_EMULATOR_HOST=f"http://127.0.0.1:{EMULATOR.port}")
    table = Table("fault", "survived", "rows lost", "repeated", "s to resume", "parameters equal")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="faults") as scratch:
        scratch = chosen.keep or scratch
        # Where the environment came without compiled modules, each of many processes would compile all it imports.
        os.environ.setdefault("PYTHONPYCACHEPREFIX", f"{scratch}/compiled")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["RAY_TMPDIR"] = scratch  # Ray's own files too: others on this machine are not to find our cluster
        for row in measure(chosen.faults, scratch, console):
            rows.append(row)
            table.add_row(*map(str, list(row.values())[:6]))
            chosen.out.write_text(json.dumps(rows, indent=1) + "\n")  # what is measured is kept, whatever comes
    console.print(table)


if __name__ == "__main__":
    main()
