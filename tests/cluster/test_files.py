"""The files of cluster/ are what Ray, Google and Kubernetes take; they agree on versions, and leave no door open."""

import copy
import re
import subprocess
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from pipeline.compute import SUBCLUSTER
from tests.cluster.files import FOLDER, ROOT, Tree, autoscaling, check_kuberay, check_launch, pods, read

REFUSED = (jsonschema.ValidationError, kubernetes_validate.ValidationError)
(GCP,) = read("gcp.yaml")
ACCOUNT, CLUSTER = read("kuberay/raycluster.yaml")
(JOB,) = read("kuberay/rayjob.yaml")


def with_misspelling(document: Tree, path: tuple[Any, ...]) -> Tree:
    """The document with two letters of the key at `path` swapped."""
    document = copy.deepcopy(document)
    *way, key = path
    node: Any = document
    for step in way:
        node = node[step]
    wrong = key[:-2] + key[-1] + key[-2]
    assert wrong != key
    node[wrong] = node.pop(key)
    return document


def test_ray_and_google_take_the_launch_file():
    check_launch(GCP)


@pytest.mark.parametrize(
    "path",
    [
        ("idle_timeout_minutes",),
        ("available_node_types", "data", "labels"),
        ("available_node_types", "data", "node_config", "scheduling", "provisioningModel"),
        ("available_node_types", "training", "node_config", "serviceAccounts", 0, "scopes"),
        ("available_node_types", "head", "node_config", "disks", 0, "initializeParams", "diskSizeGb"),
    ],
    ids=lambda path: str(path[-1]),
)
def test_a_misspelling_in_the_launch_file_is_caught(path):
    with pytest.raises(REFUSED):
        check_launch(with_misspelling(GCP, path))


@pytest.mark.slow
def test_the_commands_of_the_launch_file_are_bash():
    for name in ("setup", "head_setup", "head_start_ray", "worker_start_ray"):
        for command in GCP[f"{name}_commands"]:
            subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.slow
def test_the_launch_file_without_spot_machines(tmp_path):
    (command,) = re.findall(r"(sed '.*') cluster/gcp.yaml > on-demand.yaml", (FOLDER / "gcp.yaml").read_text())
    text = subprocess.run(f"{command} {FOLDER / 'gcp.yaml'}", shell=True, capture_output=True, text=True, check=True)
    (FOLDER / "gcp.yaml").read_text()
    (tmp_path / "on-demand.yaml").write_text(text.stdout)
    (changed,) = read(str(tmp_path / "on-demand.yaml"))
    check_launch(changed)
    for name in ("data", "training"):
        of_both = [config["available_node_types"][name]["node_config"]["scheduling"] for config in (GCP, changed)]
        assert [scheduling["provisioningModel"] for scheduling in of_both] == ["SPOT", "STANDARD"]
        assert "instanceTerminationAction" not in of_both[1]  # which Google takes with spot machines only


@pytest.mark.parametrize("document", [ACCOUNT, CLUSTER, JOB], ids=lambda document: document["kind"])
def test_kubernetes_and_kuberay_take_the_pods(document):
    check_kuberay(document)


@pytest.mark.parametrize(
    ("document", "path"),
    [
        (ACCOUNT, ("metadata", "annotations")),
        (CLUSTER, ("spec", "authOptions")),
        (CLUSTER, ("spec", "autoscalerOptions", "securityContext", "readOnlyRootFilesystem")),
        (CLUSTER, ("spec", "workerGroupSpecs", 0, "maxReplicas")),
        (CLUSTER, ("spec", "workerGroupSpecs", 1, "template", "spec", "nodeSelector")),
        (CLUSTER, ("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits")),
        (JOB, ("spec", "clusterSelector")),
        (JOB, ("spec", "submitterPodTemplate", "spec", "securityContext", "runAsNonRoot")),
    ],
    ids=lambda part: str(part[-1]) if isinstance(part, tuple) else "",
)
def test_a_misspelling_for_kubernetes_is_caught(document, path):
    with pytest.raises(REFUSED):
        check_kuberay(with_misspelling(document, path))


@pytest.mark.parametrize("node_types", [GCP["available_node_types"], autoscaling(CLUSTER)["available_node_types"]])
def test_nodes_are_set_apart(node_types):
    head, data, training = (
        node_types[name] for name in sorted(node_types, key=["head", "headgroup", "data", "training"].index)
    )
    assert [node.get("labels", {}).get(SUBCLUSTER) for node in (head, data, training)] == ["head", "data", None]
    assert head["resources"]["CPU"] == 0
    assert data["resources"].get("GPU", 0) == 0
    assert training["resources"]["GPU"] == 1
    assert all(node.get("min_workers", 0) == 0 < node["max_workers"] for node in (data, training))


def test_every_file_has_the_same_versions():
    """constraints.txt says Ray and CUDA, the base image Python; all else repeats them."""
    constraints = (ROOT / "constraints.txt").read_text()
    ray, cuda = (
        re.search(rf"^{name}==([\d.]+)$", constraints, re.MULTILINE)[1] for name in ("ray", "nvidia-cuda-runtime")
    )
    dockerfile, launch = (FOLDER / "Dockerfile").read_text(), (FOLDER / "gcp.yaml").read_text()
    python = re.search(r"^FROM python:(\d+\.\d+)\.\d+-", dockerfile, re.MULTILINE)[1]
    tag = f"{ray}-py{python.replace('.', '')}-cu{''.join(cuda.split('.')[:2])}"
    assert re.search(r'image.version="(.*)"', dockerfile)[1] == tag
    images = [container["image"] for document in (CLUSTER, JOB) for pod in pods(document).values()
              for container in pod["spec"]["containers"]]  # fmt: skip
    assert {image.rpartition(":")[2] for image in images} == {tag}
    assert CLUSTER["spec"]["rayVersion"] == ray
    assert set(re.findall(r"python(3\.\d+)", launch)) == {python}
    driver = {"13": "580", "12": "525"}[cuda.split(".")[0]]  # the oldest that serves all of that CUDA's releases
    assert f"-with-nvidia-{driver}" in launch


def test_pods_are_locked_down():
    for document in (CLUSTER, JOB):
        for pod in pods(document).values():
            spec = pod["spec"]
            assert spec["securityContext"]["runAsNonRoot"] is True
            for container in spec["containers"]:
                context = container["securityContext"]
                assert context["readOnlyRootFilesystem"] is True
                assert context["allowPrivilegeEscalation"] is False
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert container["resources"]["requests"] == container["resources"]["limits"]
                assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
                assert not any("value" in each and "KEY" in each["name"] for each in container.get("env", []))
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}
    assert CLUSTER["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert re.search(r"^USER 1000$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)


def test_machines_ask_for_a_token_and_listen_on_loopback():
    *_, head = GCP["head_start_ray_commands"]
    *_, worker = GCP["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in (head, worker))
    assert "--dashboard-host=127.0.0.1" in head
    assert any("--dport 10001 ! -i lo -j REJECT" in command for command in GCP["head_setup_commands"])
    assert "gcp_credentials" not in GCP["provider"]
    assert all(local in ("~/.ray/auth_token",) or (ROOT / local).exists() for local in GCP["file_mounts"].values())
