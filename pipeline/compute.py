"""Where the work runs: the Ray cluster that RAY_ADDRESS names, or Ray started in this machine for this program."""

from __future__ import annotations

import logging
import os

import ray

from pipeline.dataset import InputError


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
        except ConnectionError as error:
            raise InputError(
                f"no Ray cluster answers at RAY_ADDRESS={address}: start it or unset RAY_ADDRESS"
            ) from error
        return
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
