"""The files of cluster/, and what offline oracles say of them.

`ray up` files go through Ray's own checks, and their machines through Google's description of its compute interface.
KubeRay files are held against the fields of ray.io/v1, and their pods against Kubernetes' own schemas.
"""

import copy
import json
from pathlib import Path
from typing import Any

import googleapiclient
import jsonschema
import kubernetes_validate
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
KUBERNETES = "1.34"

Tree = dict[str, Any]


def read(name: str) -> list[Tree]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


# ---- ray up ----------------------------------------------------------------------------------------------------------


def closed(**fields: Any) -> Tree:
    """The schema of an object that has no other fields."""
    return {"type": "object", "properties": fields, "additionalProperties": False}


def compute_engine() -> Tree:
    """What `instances.insert` takes, as a JSON schema."""
    discovery = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents" / "compute.v1.json"

    def translated(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return {"$ref": f"#/$defs/{node['$ref']}"}
        if node.get("format") in ("int64", "uint64"):  # written as strings, taken as numbers too
            return {"type": ["string", "integer"]}
        if "properties" in node:
            return closed(**{name: translated(field) for name, field in node["properties"].items()})
        kept = {name: node[name] for name in ("type", "enum") if name in node}
        inner = {name: translated(node[name]) for name in ("items", "additionalProperties") if name in node}
        return kept | inner

    schemas = json.loads(discovery.read_text())["schemas"]
    return {"$defs": {name: translated(schema) for name, schema in schemas.items()}, "$ref": "#/$defs/Instance"}


def check_launch(config: Tree) -> None:
    """Raise for what `ray up` or Google would refuse."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    machine = jsonschema.Draft202012Validator(compute_engine())
    for node_type in config["available_node_types"].values():
        machine.validate(node_type["node_config"])


# ---- KubeRay ---------------------------------------------------------------------------------------------------------

TEXT, NUMBER, FLAG, ANY = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "object"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
GROUP = {"template": ANY, "rayStartParams": TEXTS, "labels": TEXTS, "resources": TEXTS}
# Of ray.io/v1, the fields that a person sets (KubeRay's reference of its interface).
SPECS = {
    "RayCluster": closed(
        rayVersion=TEXT,
        authOptions=closed(mode={"enum": ["disabled", "token"]}),
        enableInTreeAutoscaling=FLAG,
        autoscalerOptions=closed(
            version={"enum": ["v1", "v2"]},
            idleTimeoutSeconds=NUMBER,
            upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
            resources=ANY,
            securityContext=ANY,
            env={"type": "array"},
        ),
        headGroupSpec=closed(**GROUP, serviceType=TEXT, headService=ANY, enableIngress=FLAG),
        workerGroupSpecs={
            "type": "array",
            "items": closed(
                **GROUP,
                groupName=TEXT,
                replicas=NUMBER,
                minReplicas=NUMBER,
                maxReplicas=NUMBER,
                numOfHosts=NUMBER,
                idleTimeoutSeconds=NUMBER,
            ),
        },
    ),
    "RayJob": closed(
        entrypoint=TEXT,
        clusterSelector=TEXTS,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterConfig=closed(backoffLimit=NUMBER),
        submitterPodTemplate=ANY,
        runtimeEnvYAML=TEXT,
        activeDeadlineSeconds=NUMBER,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=NUMBER,
    ),
}


def pods(document: Tree) -> dict[str, Tree]:
    """Name → pod template, of a RayCluster or RayJob."""
    spec = document["spec"]
    if document["kind"] == "RayJob":
        return {"submitter": spec["submitterPodTemplate"]}
    groups = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"], **groups}


def check_kuberay(document: Tree) -> None:
    """Raise for what Kubernetes, KubeRay or Ray's autoscaler would refuse or ignore."""
    if document["kind"] not in SPECS:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    outer = closed(apiVersion={"const": "ray.io/v1"}, kind=TEXT, metadata=ANY, spec=SPECS[document["kind"]])
    jsonschema.validate(document, outer)
    metadata = {"name": "any", **document["metadata"]}
    parts = [{"kind": "PodTemplate", "template": template} for template in pods(document).values()]
    if document["kind"] == "RayCluster":
        options = document["spec"]["autoscalerOptions"]
        container = {"name": "autoscaler", **{name: options[name] for name in ("resources", "securityContext")}}
        parts.append({"kind": "Pod", "spec": {"containers": [container]}})
        validate_config(prepare_config(autoscaling(document)))
    for part in parts:
        kubernetes_validate.validate({"apiVersion": "v1", "metadata": metadata, **part}, KUBERNETES, strict=True)


def autoscaling(cluster: Tree) -> Tree:
    """What Ray's autoscaler makes of a RayCluster."""
    metadata = {"namespace": "default", **cluster["metadata"]}
    config: Tree = _derive_autoscaling_config_from_ray_cr({**copy.deepcopy(cluster), "metadata": metadata})
    return config
