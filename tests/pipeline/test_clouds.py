"""Storage on S3 and on Azure's blob storage, as emulators know them, and on hf://, from a request to a whole run.

Both emulators stand behind a server that can fail first; Azure's tests are left out where Azurite is not installed.
"""

import io
import os
import pkgutil
import re
import socket
import uuid

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import FileSelector
from rich.console import Console

from pipeline import storage
from pipeline.check import check
from pipeline.custom import Custom
from pipeline.dataset import InputError
from pipeline.index import Sharded
from pipeline.shards import Options, ingest
from tests import emulators
from tests.pipeline import layouts
from tests.training.test_resume import Killed, killed
from training.engine import worker
from training.engine.schedule import Schedule
from training.launch import ray_storage, run
from training.objectives.ieg import winnow
from training.recipe import Recipe
from training.runs import ledger

SOON = {"initial_backoff": 0, "increment_base": 0.01, "random_jitter_range": 0}


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(storage, "_AZURE_WAITS", SOON)


@pytest.fixture(autouse=True)
def instances():
    """No file system is left that remembers another test's settings."""
    yield
    for scheme in ("s3", "abfs", "hf"):
        fsspec.get_filesystem_class(scheme).clear_instance_cache()


def anew(url: str) -> tuple[object, str]:
    """The file system of `url` by the environment as it is now."""
    fsspec.get_filesystem_class(url.partition("://")[0]).clear_instance_cache()
    return storage.connect(url)


def acts(url: str, tmp_path):
    fs, path = storage.connect(url)
    (tmp_path / "made").write_bytes(b"made here")
    return {
        "read": lambda: storage.read(fs, path),
        "exists": lambda: storage.exists(fs, path),
        "write": lambda: storage.write(fs, path, b"anew"),
        "commit": lambda: storage.commit(fs, str(tmp_path / "made"), path),
        "remove": lambda: storage.attempt(fs, path, lambda: fs.rm(path)),
    }


def test_what_is_written_is_read(cloud, tmp_path):
    fs, path = storage.connect(f"{cloud[1]}/deep/folder/ä b.bin")
    assert not storage.exists(fs, path)
    for data in (b"0123456789", b"9876543210"):
        storage.write(fs, path, data)
        assert storage.read(fs, path) == data
        assert storage.read(fs, path, 2, 5) == data[2:5]
        assert storage.read(fs, path, 7) == data[7:]
        assert storage.read(fs, path, 7, 99) == data[7:]
        assert storage.read(fs, path, -3) == data[7:]
        assert storage.read(fs, path, -99) == data
    (tmp_path / "made").write_bytes(b"made here")
    storage.commit(fs, str(tmp_path / "made"), path)
    assert storage.read(fs, path) == b"made here"
    assert storage.exists(fs, path)
    assert storage.exists(fs, path.rpartition("/")[0])
    assert fs.find(storage.connect(cloud[1])[1]) == [path]
    with pytest.raises(FileNotFoundError):
        storage.read(fs, path + "x")
    storage.write(fs, path, b"")
    assert storage.read(fs, path) == b""


def test_a_large_file_comes_whole(cloud, tmp_path):
    data = os.urandom(12 << 20)  # in several parts
    (tmp_path / "made").write_bytes(data)
    fs, path = storage.connect(f"{cloud[1]}/large")
    storage.commit(fs, str(tmp_path / "made"), path)
    assert storage.read(fs, path) == data
    assert storage.read(fs, path, 9 << 20, (9 << 20) + 5) == data[9 << 20 : (9 << 20) + 5]


def test_a_writable_folder_is_left_as_it_was(cloud):
    storage.require_writable(f"{cloud[1]}/folder")
    fs, path = storage.connect(cloud[1])
    assert fs.find(path) == []


def test_others_files_are_seen_at_once(cloud):
    fs, path = storage.connect(cloud[1])
    assert fs.ls(path) == []
    fsspec.filesystem(fs.protocol[0], skip_instance_cache=True).pipe_file(f"{path}/new", b"x")
    assert fs.ls(path, detail=False) == [f"{path}/new"]


def test_a_missing_bucket_is_told(cloud, tmp_path):
    url = f"{cloud[1].partition('://')[0]}://nosuch-{uuid.uuid4().hex[:12]}"
    for act in (
        *acts(f"{url}/folder/file", tmp_path).values(),
        lambda: storage.require_writable(f"{url}/folder"),
        lambda: storage.require_writable(url),
    ):
        with pytest.raises(
            InputError, match=f"^there is no (bucket|container) {url}: check its name, or make it first$"
        ):
            act()


@pytest.mark.parametrize("status", [401, 403])
def test_what_is_forbidden_is_told_at_once(cloud, tmp_path, status):
    front, bucket = cloud
    for act in acts(f"{bucket}/folder/file", tmp_path).values():
        front.faults[:] = [status] * 9
        with pytest.raises(InputError) as error:
            act()
        assert len(front.faults) >= 6  # no more than a look at another place
        cure = "check its permissions and the credentials of this machine"
        assert str(error.value) == f"cannot use {bucket}/folder/file (permission denied): {cure}"


@pytest.mark.parametrize("status", [429, 503])
def test_what_passes_is_tried_again(cloud, tmp_path, hurried, status):
    front, bucket = cloud
    storage.write(*storage.connect(f"{bucket}/folder/file"), b"here")
    for act in acts(f"{bucket}/folder/file", tmp_path).values():
        front.faults[:] = [status] * 2
        act()
        assert front.faults == []


def test_what_does_not_pass_ends(cloud, hurried, monkeypatch):
    front, bucket = cloud
    monkeypatch.setattr(storage, "TRIES", 2)
    front.faults[:] = [503] * 99
    with pytest.raises(ConnectionError, match=rf"^{bucket}/file could not be reached in 2 tries \(HTTP 503\)"):
        storage.read(*storage.connect(f"{bucket}/file"))


def test_a_wrong_request_is_not_repeated(cloud, tmp_path):
    front, bucket = cloud
    front.faults[:] = [400] * 9
    with pytest.raises(InputError, match=r"\(HTTP 400\): check the path and the credentials of this machine"):
        storage.exists(*storage.connect(f"{bucket}/file"))
    assert len(front.faults) >= 7


# ---- who is not let in, before anybody is asked ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("act", ["read", "write"])
def test_missing_credentials_of_s3_are_told(monkeypatch, tmp_path, act):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, f"{tmp_path}/none")
    anew("s3://bucket/file")
    with pytest.raises(InputError) as error:
        acts("s3://bucket/file", tmp_path)[act]()
    cure = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    assert str(error.value) == f"cannot use s3://bucket/file (no credentials): {cure}"
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    anew("s3://bucket/file")
    with pytest.raises(InputError, match=cure):
        acts("s3://bucket/file", tmp_path)[act]()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["abfs", "az"])
def test_missing_credentials_of_azure_are_told(monkeypatch, scheme):
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    with pytest.raises(InputError) as error:
        anew(f"{scheme}://container/file")
    assert str(error.value) == (
        f"cannot open {scheme}://container/file (ValueError): set AZURE_STORAGE_CONNECTION_STRING, "
        "or AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or `az login`"
    )


@pytest.mark.slow
@pytest.mark.timeout(60)  # with the client's own waits each act takes 80 s
def test_a_token_that_is_not_there_is_told_soon(monkeypatch, caplog):
    async def refuse(*arguments, **named):
        raise pkgutil.resolve_name("azure.core.exceptions:ClientAuthenticationError")("no token,\nSECRET")

    monkeypatch.setattr("azure.identity.aio.DefaultAzureCredential.get_token", refuse)
    monkeypatch.setattr(storage, "_AZURE_WAITS", SOON)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    fs, path = anew("abfs://container/file")
    for act in (lambda: storage.exists(fs, path), lambda: storage.write(fs, path, b"x")):
        with pytest.raises(InputError, match=r"file \(no credentials\): set AZURE_STORAGE_CONNECTION_STRING, or"):
            act()
    assert caplog.text == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "secret", ["AccountKey=U0VDUkVU", "AccountKey=SECRET!", "SharedAccessSignature=sv=2025-01-05&sp=r&sig=U0VDUkVU"]
)
def test_a_wrong_key_of_azure_is_told(azure, monkeypatch, caplog, secret):
    string = emulators.connection_string(azure.server_port)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", string.replace(f"AccountKey={emulators.KEY}", secret))
    fs, path = anew("abfs://container/file")
    with pytest.raises(InputError) as error:
        storage.read(fs, path)
    assert re.fullmatch(r"cannot use abfs://container/file \(.*\): .*(credentials|AZURE_).*", str(error.value))
    for said in (str(error.value), caplog.text):
        assert secret.rpartition("=")[2] not in said


# ---- hf:// -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set, which can be told to fail."""
    images = zip("ab", layouts.photos(2, 3), strict=True)
    one_of = [(label, image) for label, of_class in images for image in of_class]
    files = {f"{split}/{label}/{n}.jpg": image
             for split in ("train", "probe", "test") for n, (label, image) in enumerate(one_of)}  # fmt: skip
    with emulators.running(emulators.Hub(files)) as front:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": f"http://127.0.0.1:{front.server_port}"})
        yield front


@pytest.mark.slow
def test_a_hub_is_read(hub):
    url = "hf://datasets/user/name"
    fs, path = storage.connect(f"{url}/train/a/0.jpg")
    assert storage.read(fs, path) == hub.files["train/a/0.jpg"]
    assert storage.read(fs, path, 2, 9) == hub.files["train/a/0.jpg"][2:9]
    assert not storage.exists(*storage.connect(f"{url}/train/c"))
    report = check(Custom(), url, sample=6)
    assert report.count("error") == 0, report.findings


@pytest.mark.slow
def test_parquet_on_a_hub_is_read(hub):
    for split in ("train", "probe", "test"):
        images = [{"image": {"bytes": image}, "label": name.split("/")[1]}
                  for name, image in hub.files.items() if name.startswith(split)]  # fmt: skip
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(images), buffer)
        hub.files[f"data/{split}-00000-of-00001.parquet"] = buffer.getvalue()
    report = check(Custom(), "hf://datasets/user/name/data", sample=6)
    assert report.count("error") == 0, report.findings


@pytest.mark.slow
def test_a_hub_is_not_written(hub):
    url = "hf://datasets/user/name/runs"
    with pytest.raises(InputError, match=rf"{url}/\.writable-\w+ can only be read: write elsewhere, then send it by"):
        storage.require_writable(url)
    assert hub.asked == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "permission denied.*HF_TOKEN"), (403, "permission denied.*HF_TOKEN"), (400, "HTTP 400"), (501, "HTTP 501")],
)
def test_a_hub_that_refuses_is_told_at_once(hub, status, said):
    hub.faults[:] = [status] * 9
    with pytest.raises(InputError, match=rf"cannot use hf://datasets/user/name/x \(.*{said}"):
        storage.read(*storage.connect("hf://datasets/user/name/x"))
    assert len(hub.faults) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_busy_is_asked_again(hub, hurried, status):
    hub.faults[:] = [status] * 2
    fs, path = storage.connect("hf://datasets/user/name/train/a/0.jpg")
    assert storage.read(fs, path) == hub.files["train/a/0.jpg"]
    assert hub.faults == []


@pytest.mark.slow
def test_without_a_network_a_hub_is_given_up(hurried, monkeypatch):
    with socket.socket() as nobody:  # listens at this port
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": f"http://127.0.0.1:{nobody.getsockname()[1]}"})
        with pytest.raises(ConnectionError) as error:
            storage.read(*storage.connect("hf://datasets/user/name/x"))
    place = "hf://datasets/user/name/x"
    assert (
        str(error.value) == f"{place} could not be reached in 5 tries (ConnectError): check the network, then run again"
    )


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_ray_train_keeps_its_own_files_there(cloud):
    filesystem, path = ray_storage(f"{cloud[1]}/runs/run")
    filesystem.create_dir(path)
    with filesystem.open_output_stream(f"{path}/state.json") as file:
        file.write(b"{}")
    assert storage.read(*storage.connect(f"{cloud[1]}/runs/run/state.json")) == b"{}"
    assert [info.path for info in filesystem.get_file_info(FileSelector(path, recursive=True))] == [
        f"{path}/state.json"
    ]
    filesystem.delete_dir(path)
    assert not storage.exists(*storage.connect(f"{cloud[1]}/runs/run/state.json"))


def test_from_raw_files_to_a_model_killed_on_the_way(cloud, local_ray, monkeypatch):
    bucket, console = cloud[1], Console(file=io.StringIO(), width=300)
    images = layouts.photos(3, 8)
    files = {f"{'probe' if n == 0 else 'test' if n == 1 else 'train'}/class {k}/{n}.jpg": image
             for k, of_class in enumerate(images) for n, image in enumerate(of_class)}  # fmt: skip
    layouts.write(f"{bucket}/raw", files)
    report = check(Custom(), f"{bucket}/raw", sample=20)
    assert report.count("error") == 0, report.findings
    index = ingest(Custom(), f"{bucket}/raw", Options(f"{bucket}/shards"), console)
    assert {split: index.count(split) for split in index.splits} == {"train": 18, "probe": 3, "test": 3}
    recipe = Recipe(
        name="run", dataset=Sharded("custom", size=24), objective=winnow(), data=f"{bucket}/shards",
        storage=f"{bucket}/runs", network="wrn-10-1", schedule=Schedule(first_cycle=6, cycles=1), batch=6,
        probe_batch=6, group=3, workers=0, checkpoint_steps=2,
    )  # fmt: skip
    with monkeypatch.context() as patched:
        killed(patched, worker, "update", 4)
        with pytest.raises(Killed):
            run(recipe, console)
    result = run(recipe, console)
    assert "2 of 6 steps are done" in console.file.getvalue()
    table = ledger.read(result.folder).to_pylist()
    assert len(table) == 36
    for epoch in (0, 1):
        assert len({row["id"] for row in table if row["epoch"] == epoch}) == 18
    assert storage.exists(*storage.connect(f"{bucket}/runs/run/model.safetensors"))
