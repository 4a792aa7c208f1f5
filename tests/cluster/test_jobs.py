"""The commands as a person gives them, on machines started as by cluster/gcp.yaml: submit, watch, stop, resume.

Three Ray nodes on this machine stand for the head, a data and a training machine. Each is started by its own command of
that file, in its labels; only ports and sizes differ, and training is on CPU. Photographs are real ones where
../shared/data is there, and small made-up ones where it is not; they go through an emulator of cloud storage.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import fsspec
import psutil
import pytest
from safetensors.torch import load

from benchmarks.resilience import free_port
from tests.cluster.files import ROOT, read
from tests.training.test_sharded import webvision
from training.runs import checkpoint

(GCP,) = read("gcp.yaml")
TOKEN = "0123456789abcdef" * 2
STEPS = 200
CPUS = {"head": 0, "data": 2, "training": 2}  # training has one to spare, which no data actor may take
PATIENCE = 180.0  # seconds


@dataclass
class Cluster:
    """The three nodes, as seen from a shell on the head."""

    home: str
    environment: dict[str, str]
    dashboard: str

    def start(self, name: str, command: str, flags: str) -> None:
        """Start the node of type `name` with its command of the launch file, and what `ray up` sets around it."""
        labels = GCP["available_node_types"][name].get("labels", {})
        around = {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": CPUS[name]}), "RAY_OVERRIDE_LABELS": json.dumps(labels)}
        command = f"{command} {flags} --node-ip-address=127.0.0.1 --dashboard-agent-listen-port=0"
        done = subprocess.run(
            ["bash", "-c", command], env=self.environment | around, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def kill(self) -> None:
        """End all processes of all nodes."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOME") == self.home:
                    process.kill()

    def submit(self, *command: str, working_dir: bool, job: str | None = None) -> subprocess.Popen[str]:
        """`ray job submit`, in the folder that a shell on the head is in."""
        flags = ["--working-dir", "."] * working_dir + ["--submission-id", job] * bool(job)
        return subprocess.Popen(
            ["ray", "job", "submit", *flags, "--", "python", *command], cwd=f"{self.home}/winnow",
            env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ask(self, path: str, *, post: bool = False, token: str = TOKEN) -> Any:
        """What the dashboard answers."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(self.dashboard + path, headers=headers, method="POST" if post else "GET")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def listed(self, what: str) -> list[dict[str, Any]]:
        """All nodes, actors or tasks, past ones too."""
        rows: list[dict[str, Any]] = self.ask(f"/api/v0/{what}?limit=10000&detail=true")["data"]["result"]["result"]
        return rows

    def metrics(self) -> str:
        """What Prometheus finds where Ray tells it to look."""
        (found,) = json.loads(Path(self.home, "ray", "prom_metrics_service_discovery.json").read_text())
        texts = []
        for target in found["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
                texts.append(answer.read().decode())
        return "\n".join(texts)


@pytest.fixture(scope="module")
def cluster(storage) -> Iterator[Cluster]:
    home = tempfile.mkdtemp(prefix="w", dir="/tmp")  # short: sockets lie below it
    gcs, dashboard, client, *others = (free_port() for _ in range(5))
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    environment |= {"HOME": home, "PATH": f"{home}/venv/bin:{os.environ['PATH']}", "RAY_HEAD_IP": "127.0.0.1"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_metrics_report_interval_ms": "500"}
    environment |= dict(zip(("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT"), map(str, others), strict=True))
    Path(home, "winnow").symlink_to(ROOT)
    Path(home, "venv").symlink_to(sys.prefix)
    Path(home, ".ray").mkdir()
    Path(home, ".ray", "auth_token").write_text(TOKEN)
    made = Cluster(home, environment, f"http://127.0.0.1:{dashboard}")
    (*_, head), (*_, worker) = GCP["head_start_ray_commands"], GCP["worker_start_ray_commands"]
    head = head.replace(" --autoscaling-config=~/ray_bootstrap_config.yaml", "")
    ports = f"--dashboard-port={dashboard} --ray-client-server-port={client} --temp-dir={home}/ray"
    try:
        made.start("head", head.replace("=6379", f"={gcs}"), ports)
        # What a shell on the head has from ~/.bashrc.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": made.dashboard}
        for name in ("data", "training"):
            made.start(name, worker.replace(":6379", f":{gcs}"), "")
        environment["RAY_ADDRESS"] = f"127.0.0.1:{gcs}"
        yield made
    finally:
        made.kill()
        shutil.rmtree(home, ignore_errors=True)


def wait(enough: Callable[[], bool], job: subprocess.Popen[str], every: float) -> None:
    """Return when there is enough; fails when the job ends, or never gets there."""
    started = time.monotonic()
    while not enough():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() - started < PATIENCE
        time.sleep(every)


def ended(job: subprocess.Popen[str]) -> str:
    """What a job that succeeded has printed."""
    output, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, output
    return output


def test_a_run_on_the_machines_that_are_set_apart(cluster, bucket):
    webvision(f"{bucket}/raw")
    shards, runs = f"{bucket}/shards", f"{bucket}/runs"
    ingest = ["-m", "pipeline.shards", "webvision", f"{bucket}/raw/webvision", "--imagenet", f"{bucket}/raw/imagenet"]
    printed = ended(cluster.submit(*ingest, "--probe-per-class", "2", "--out", shards, working_dir=True))
    assert "100 train, 100 probe, 50 val, 50 imagenet; 50 classes, 4 shards, 0 rejected" in printed

    train = ["training/webvision.py", "--data", shards, "--storage", runs, "--network", "wrn-10-1", "--device", "cpu"]
    train += ["--dataset.size", "16", "--batch", "8", "--probe-batch", "8", "--group", "4", "--checkpoint-steps", "5"]
    train += ["--schedule.first-cycle", str(STEPS), "--schedule.cycles", "1"]
    folder = f"{runs}/webvision"

    stopped = cluster.submit(*train, working_dir=True, job="first")
    wait(lambda: bool(checkpoint.commits(folder)), stopped, every=0.2)
    assert cluster.ask("/api/jobs/first/stop", post=True) == {"stopped": True}  # what `ray job stop first` says
    printed, _ = stopped.communicate(timeout=PATIENCE)
    assert "stopped; run the same command again to go on from the last checkpoint" in printed
    assert cluster.ask("/api/jobs/first")["status"] == "STOPPED"

    resumed = cluster.submit(*train, working_dir=False)
    names = ("images_per_second", "waiting_for_data", "trust", "zero_weights")
    wait(lambda: all(f"ray_winnow_{name}{{" in cluster.metrics() for name in names), resumed, every=0.5)
    printed = ended(resumed)
    done = int(re.search(rf"webvision: (\d+) of {STEPS} steps are done", printed)[1])
    assert 0 < done < STEPS
    assert re.search(r"top-1 \d+\.\d\d %, top-5 \d+\.\d\d %: gs://", printed)
    assert checkpoint.commits(folder)[-1].step == STEPS
    with fsspec.open(f"{folder}/model.safetensors") as file:
        assert load(file.read())

    on = {node["node_id"]: node["labels"].get("ray-subcluster", "training") for node in cluster.listed("nodes")}
    assert sorted(on.values()) == ["data", "head", "training"]

    def places(rows: list[dict[str, Any]], name: str, part: str) -> set[str]:
        return {on[row["node_id"]] for row in rows if part in row[name] and row["node_id"]}

    actors, tasks = cluster.listed("actors"), cluster.listed("tasks")
    assert places(actors, "class_name", "MakeViews") == {"data"}
    assert places(tasks, "name", "make_shard") == {"data"}
    assert places(actors, "class_name", "RayTrainWorker") == {"training"}
    assert places(actors, "class_name", "TrainController") == places(actors, "class_name", "QueueActor") == {"head"}


def test_a_job_that_cannot_work_says_so_in_its_log_and_status(cluster):
    job = cluster.submit("training/webvision.py", "--data", "/nowhere", working_dir=False)
    printed, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 1
    assert "error: no index.json in /nowhere: make shards first" in printed


def test_without_the_token_nothing_is_served(cluster):
    for token in ("", "wrong"):
        with pytest.raises(HTTPError) as refused:
            cluster.ask("/api/jobs/", token=token)
        refused.value.close()
        assert refused.value.code in (401, 403)
    cases = [
        ("submit", {"RAY_AUTH_TOKEN": "wrong" * 8}),
        ("connect", {"RAY_AUTH_TOKEN": "wrong" * 8}),
        ("connect", {"RAY_AUTH_MODE": "disabled"}),
        ("connect", {}),  # the owner
    ]
    commands = {"submit": ["job", "submit", "--", "true"], "connect": ["health-check"]}
    attempts = [
        subprocess.Popen(["ray", *commands[what]], env=cluster.environment | changed, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for what, changed in cases
    ]  # fmt: skip
    *strangers, owner = [(attempt.communicate(timeout=PATIENCE)[0], attempt.returncode) for attempt in attempts]
    assert owner[1] == 0, owner
    for said, status in strangers:
        assert status != 0
        assert re.search("[Aa]uthentication token is (invalid|missing) or incorrect", said), said
