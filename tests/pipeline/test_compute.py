"""Joining a cluster, and which of its nodes are for what."""

import os
import subprocess
import sys

import pytest

from pipeline import compute


def test_nodes_without_labels_are_for_everything(local_ray):
    assert compute.data_nodes() is compute.training_nodes() is None


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_is_named_in_one_line(tmp_path):
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    code = """
from pipeline import compute
from pipeline.dataset import InputError
try:
    compute.join()
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (
        done.stdout
        == "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1: start it, give its token, or unset RAY_ADDRESS\n"
    )
