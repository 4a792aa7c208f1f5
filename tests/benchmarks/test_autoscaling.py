"""The machines of the benchmark are those of the launch file, and Ray takes them."""

from ray.autoscaler._private.util import prepare_config, validate_config

from benchmarks.autoscaling import configuration
from tests.cluster.files import read


def test_the_machines_are_those_of_the_launch_file():
    made, (launch,) = configuration("127.0.0.1:1"), read("gcp.yaml")
    validate_config(prepare_config(made))
    names = {made["head_node_type"]: "head", "data": "data", "training": "training"}
    labels = {names[name]: machine["labels"] for name, machine in made["available_node_types"].items()}
    assert labels == {name: machine.get("labels", {}) for name, machine in launch["available_node_types"].items()}
