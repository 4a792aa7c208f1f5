"""Machines that come when a run needs them, and leave when it does not: a run on an autoscaling cluster.

    python -m benchmarks.autoscaling --out autoscaling.json

Ray's own autoscaler decides; machines are raylets that its fake provider starts and ends on this machine, of the types
of cluster/gcp.yaml: their labels, with one CPU each. The run trains a small network on digits whose views take as long
as those of photographs, so that one data actor is too few. Its last steps are slow: all their data are there, and data
machines may leave before the run ends. A row of the table is a change in the number of machines.

It takes two to four minutes: Ray Data asks for more machines every 10 seconds, and counts new ones every 20.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.util import get_node_ip_address
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.faults import SlowDigits, note, notes
from benchmarks.resilience import free_port
from pipeline.compute import SUBCLUSTER
from training import launch
from training.engine.schedule import Schedule
from training.objectives.interface import Batch, Moment, Objective, Outcome, Workers
from training.objectives.registry import METHODS
from training.recipe import Recipe

STEPS, SLOW_FROM, SLOW_SECONDS = 300, 295, 5.0  # a block of the stream holds 5 steps: the last is slow
BATCH = 200
ACTORS = 4  # the most that the run may have, and machines for them
IDLE_MINUTES = 0.25  # cluster/gcp.yaml: 5
PATIENCE = 120.0  # seconds, until all machines are gone
CALLS = itertools.count()  # of the objective, in a worker

Row = dict[str, Any]


@dataclass(frozen=True)
class Paced(Objective):
    """Note each step of an objective, and be slow from one on."""

    inner: Objective
    folder: str

    @property
    def average_parameters(self) -> bool:  # type: ignore[override]
        """Return what the objective inside says."""
        return self.inner.average_parameters

    def __call__(self, model: nn.Module, batch: Batch, moment: Moment, workers: Workers) -> Outcome:
        """See `Objective`."""
        step = next(CALLS)
        if step >= SLOW_FROM:
            time.sleep(SLOW_SECONDS)
        note(self.folder, "steps", step)
        return self.inner(model, batch, moment, workers)


def recipe(folder: str) -> Recipe:
    """Return the run."""
    return Recipe(
        name="run",
        dataset=SlowDigits(folder=folder),
        objective=Paced(METHODS["supervised"](), folder),
        storage=folder,
        network="wrn-10-1",
        schedule=Schedule(first_cycle=STEPS, cycles=1),
        batch=BATCH,
        probe_batch=20,
        group=BATCH,
        actors=ACTORS,
        device="cpu",
    )


def configuration(address: str) -> Row:
    """Return the cluster of cluster/gcp.yaml in small."""

    def machine(label: str | None, most: int, cpus: int) -> Row:
        labels = {SUBCLUSTER: label} if label else {}
        return {"resources": {"CPU": cpus}, "labels": labels, "node_config": {}, "min_workers": 0, "max_workers": most}

    return {
        "cluster_name": "autoscaling",
        "provider": {
            "type": "external",  # by the name "fake_multinode" Ray wants defaults that its wheel lacks
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "disable_node_updaters": True,
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "max_workers": ACTORS + 1,
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 1.0,
        "auth": {},
        "docker": {},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: machine("head", 0, 0),
            "data": machine("data", ACTORS, 1),
            "training": machine(None, 1, 1),
        },
        **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
        **{"file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False},
    }


@contextlib.contextmanager
def cluster(scratch: str) -> Iterator[None]:
    """Run the head, with the autoscaler; all processes are gone in the end."""
    address = f"{get_node_ip_address()}:{free_port()}"
    file = Path(scratch, "autoscaling.json")
    file.write_text(json.dumps(configuration(address)))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=0"]
    command += [f"--port={address.rpartition(':')[2]}", f"--ray-client-server-port={free_port()}"]
    command += ["--include-dashboard=false", "--dashboard-agent-listen-port=0", f"--temp-dir={scratch}/ray"]
    command += [f"--autoscaling-config={file}", f"--labels={SUBCLUSTER}=head"]
    around = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with open(f"{scratch}/head.log", "w") as log:
        head = subprocess.Popen(command, env=os.environ | around, stdout=log, stderr=log)
    try:
        while "Ray runtime started" not in Path(log.name).read_text():
            if head.poll() is not None:
                sys.exit(f"error: the head does not start: {Path(log.name).read_text()}")
            time.sleep(0.2)
        os.environ["RAY_ADDRESS"] = address
        ray.init(address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        os.environ.pop("RAY_ADDRESS", None)
        held = psutil.Process(head.pid)
        for process in [*held.children(recursive=True), held]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()


def watch(folder: str, rows: list[Row], finished: threading.Event) -> None:
    """Note every change in the number of machines, with the second and the steps done until then."""
    started = time.monotonic()
    while not finished.wait(0.5):
        alive = Counter(node["Labels"].get(SUBCLUSTER, "training") for node in ray.nodes() if node["Alive"])
        machines = {name: alive[name] for name in ("training", "data")}
        if not rows or machines != {name: rows[-1][name] for name in machines}:
            steps = len(notes(folder, "steps"))
            rows.append({"second": round(time.monotonic() - started), "step": steps, **machines})


def measure(scratch: str) -> list[Row]:
    """Return the rows of the table."""
    folder = f"{scratch}/run"
    os.mkdir(folder)
    rows: list[Row] = []
    finished = threading.Event()
    with cluster(scratch):
        watcher = threading.Thread(target=watch, args=(folder, rows, finished))
        watcher.start()
        try:
            launch.run(recipe(folder))
            deadline = time.monotonic() + PATIENCE
            while rows[-1]["data"] + rows[-1]["training"] and time.monotonic() < deadline:
                time.sleep(0.5)
        finally:
            finished.set()
            watcher.join()
    # Between two rows: the speed at which the machines of the first one trained.
    for row, after in itertools.pairwise(rows):
        row["images_per_second"] = round(
            (after["step"] - row["step"]) * BATCH / max(after["second"] - row["second"], 1)
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Machines come and go with what a run needs.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    chosen = parser.parse_args(arguments)
    before = os.getloadavg()[0]
    os.environ["RAY_AUTH_MODE"] = "disabled"  # on loopback, for minutes
    with tempfile.TemporaryDirectory(prefix="a", dir="/tmp") as scratch:
        rows = measure(scratch)
    load = [round(each, 1) for each in (before, os.getloadavg()[0])]  # what else runs here
    told = {"steps": STEPS, "slow_from_step": SLOW_FROM, "idle_minutes": IDLE_MINUTES, "load": load, "rows": rows}
    chosen.out.write_text(json.dumps(told, indent=1) + "\n")
    table = Table("second", "step", "training machines", "data machines", "images/s from then on")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
