"""Settings of every test: one thread a process, no time limits on generated examples, one cloud storage, one Ray.

A test is marked `fast` unless it is marked `slow` or one of its fixtures starts something; `make test-fast` runs these.
All run in several processes at once (pytest-xdist), where the tests of a file stay together.
"""

import atexit
import os
import shutil
import socket
import subprocess
import uuid

import pytest
from hypothesis import settings

from tests import emulators

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")

# Emulators of cloud storage, which every process of this test run finds by its environment.
RESERVED = {name: socket.socket() for name in ("gs", "s3", "abfs")}  # until one starts: nobody else gets its port
for each in RESERVED.values():
    each.bind(("127.0.0.1", 0))
    atexit.register(each.close)
PORTS = {name: each.getsockname()[1] for name, each in RESERVED.items()}
# That of Google knows no accounts, and gcsfs asks it for no hierarchical folders.
os.environ["FSSPEC_GCS_TOKEN"] = "anon"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{PORTS['gs']}"
os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{PORTS['s3']}"
os.environ |= {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "SECRET", "AWS_DEFAULT_REGION": "us-east-1"}
os.environ["AZURE_STORAGE_CONNECTION_STRING"] = emulators.connection_string(PORTS["abfs"])

settings.register_profile("winnow", deadline=None)
settings.load_profile("winnow")

# Files that take longest, in order: they begin first, so that none is left alone at the end.
LONGEST = (
    "test_faults",
    "test_jobs",
    "test_launch",
    "test_resume",
    "test_search",
    "test_step",
    "test_sharded",
    "test_predict",
    "test_audit",
    "test_embed",
    "test_folds",
)
# Fixtures that start other processes or a server, or are whole runs.
STARTS = {"local_ray", "storage", "cloud", "both", "cluster", "in_process", "trained"}


@pytest.hookimpl(tryfirst=True)  # before -m and pytest-xdist look at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is fast, and keep the tests of a file in one process."""
    for item in items:
        if not STARTS & set(item.fixturenames) and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.fast)
        item.add_marker(pytest.mark.xdist_group(item.path.stem))
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def _fast_is_in_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("fast"):

        def refuse(*arguments, **named):
            pytest.fail("a fast test starts no process: mark it slow")

        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


@pytest.fixture(scope="session")
def local_ray():
    """Ray in this machine, started once; logical CPUs enough to place all workers and actors at once."""
    import ray

    with pytest.MonkeyPatch.context() as patched:  # of Ray's own watchers: nobody asks them here, and they never rest
        patched.setenv("REPORTER_UPDATE_INTERVAL_MS", "60000")
        ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray._private.worker._global_node.kill_log_monitor()  # it looks through all logs ten times a second
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def storage():
    """An emulator of Google Cloud Storage on loopback."""
    from gcp_storage_emulator.server import create_server

    RESERVED["gs"].close()
    server = create_server("127.0.0.1", PORTS["gs"], in_memory=True)
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


@pytest.fixture(scope="session")
def s3():
    """An emulator of S3 on loopback."""
    RESERVED["s3"].close()
    with emulators.s3(PORTS["s3"]) as front:
        yield front


@pytest.fixture(scope="session")
def azure():
    """An emulator of Azure's blob storage on loopback."""
    if not shutil.which(emulators.AZURITE):
        pytest.skip(f"{emulators.AZURITE} is not on the PATH: see CONTRIBUTING.md")
    RESERVED["abfs"].close()
    with emulators.azure(PORTS["abfs"]) as front:
        yield front


@pytest.fixture(params=["s3", "azure"])
def cloud(request):
    """Each emulator in turn, which can be told to fail, and the URL of a new, empty bucket in it."""
    import fsspec

    front = request.getfixturevalue(request.param)
    front.faults.clear()
    name = f"winnow-{uuid.uuid4().hex[:12]}"
    scheme = {"s3": "s3", "azure": "abfs"}[request.param]
    fsspec.filesystem(scheme).mkdir(name)
    yield front, f"{scheme}://{name}"
    front.faults.clear()
