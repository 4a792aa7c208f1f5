"""Where the work runs: the Ray cluster that RAY_ADDRESS names, or Ray started in this machine for this program."""

from __future__ import annotations

import logging
import os
import signal
import threading

import ray

from pipeline.dataset import InputError

# The label by which Ray Data tells whose resources it may count on. A cluster that sets its nodes apart has it on some
# node from the start (the files in cluster/ put it on the head): data actors then go to nodes where it is "data", which
# may yet have to be brought up, and training to all others. Training nodes have no such label: Ray Train counts only
# on those. Without the label, as on a laptop, everything goes everywhere.
SUBCLUSTER = "ray-subcluster"


def join(cpus: int = 1) -> None:
    """Join the cluster of RAY_ADDRESS (set inside a Ray job), or start Ray in this machine for this run.

    `cpus` is how many logical CPUs the work needs at once to be placed at all: a machine may have fewer real ones.
    Raises InputError where no cluster answers.
    """
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise InputError(
                f"no Ray cluster answers at RAY_ADDRESS={address}: start it, give its token, or unset RAY_ADDRESS"
            ) from error
    else:
        _start(cpus)
    if threading.current_thread() is threading.main_thread():
        # What `ray job stop` sends ends the program as Ctrl-C does, with a line; Ray's own handler says nothing.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _start(cpus: int) -> None:
    # A report waits for the controller's next look; on one machine frequent looks cost nothing.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, cpus),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )


def data_nodes() -> dict[str, str] | None:
    """Return the label selector of the nodes for data actors and ingest; None where they are not set apart."""
    return {SUBCLUSTER: "data"} if _sets_apart() else None


def training_nodes() -> dict[str, str] | None:
    """Return the label selector of the nodes for training workers; None where they are not set apart."""
    return {SUBCLUSTER: "!data"} if _sets_apart() else None


def _sets_apart() -> bool:
    return any(SUBCLUSTER in node["Labels"] for node in ray.nodes() if node["Alive"])
