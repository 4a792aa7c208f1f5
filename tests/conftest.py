"""Settings of every test: one thread a process, no time limits on generated examples, and one local Ray for all."""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")

settings.register_profile("winnow", deadline=None)
settings.load_profile("winnow")


@pytest.fixture(scope="session")
def local_ray():
    """Ray in this machine, started once; logical CPUs enough to place all workers and actors at once."""
    import ray

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
