"""A run that loses a worker, then a node and its driver at once, ends as one that nothing disturbed.

The whole table of faults is `python -m benchmarks.resilience`; this is the one of its runs that loses the most.
"""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_survives_the_loss_of_worker_node_and_driver(tmp_path):
    # Modules are compiled where they were installed: none is to be compiled anew for this command alone.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": ""}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "benchmarks.resilience", "--faults", "one_after_another"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out.json")], env=environment, capture_output=True, text=True, timeout=840
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["survived"], row
    assert row["starts"] == 3
    assert row["rows_lost"] == row["rows_repeated_after_dedup"] == 0
    assert row["parameters_equal"]
