"""Settings of every test: one thread a process, no time limits on generated examples, one cloud storage, one Ray."""

import os
import socket
import uuid

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")

# The emulator of cloud storage knows no accounts, and gcsfs asks it for no hierarchical folders.
os.environ["FSSPEC_GCS_TOKEN"] = "anon"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    STORAGE_PORT = free.getsockname()[1]
os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{STORAGE_PORT}"

settings.register_profile("winnow", deadline=None)
settings.load_profile("winnow")


@pytest.fixture(scope="session")
def local_ray():
    """Ray in this machine, started once; logical CPUs enough to place all workers and actors at once."""
    import ray

    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def storage():
    """An emulator of Google Cloud Storage on loopback; every process of this test run finds it by its environment."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", STORAGE_PORT, in_memory=True)
    server.start()
    yield
    server.stop()


@pytest.fixture
def bucket(storage):
    """The URL of a new, empty bucket."""
    import fsspec

    name = f"winnow-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("gcs").mkdir(name)
    return f"gs://{name}"
