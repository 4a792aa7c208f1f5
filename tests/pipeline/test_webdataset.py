"""WebDataset from servers, where nothing can be listed."""

import http.server
import re
import threading
from pathlib import Path

import pytest

from pipeline.custom import Custom
from pipeline.dataset import InputError
from pipeline.raw import fetch
from tests.pipeline.layouts import tar


class Files(http.server.SimpleHTTPRequestHandler):
    """Send files of a folder, and parts of them where `parts` is set, as servers of archives do."""

    parts = True

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not (asked and self.parts):
            super().do_GET()
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = int(asked[1]), int(asked[2] or len(data) - 1)
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def served(tmp_path):
    """A server of three tars of two images each, and what the images are."""
    images = {}
    for k in range(3):
        files = {f"{10 * k + i}.{end}": b"" for i in range(2) for end in ("jpg", "cls")}
        for i in range(2):
            images[f"train-{k}/{10 * k + i}.jpg"] = files[f"{10 * k + i}.jpg"] = f"image {k} {i}".encode() * 99
            files[f"{10 * k + i}.cls"] = b"ab"[i : i + 1]
        (tmp_path / f"train-{k}.tar").write_bytes(tar(files))

    class Here(Files):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", images
        server.shutdown()


@pytest.mark.parametrize("braces", ["{0..2}", "{0,1,2}"])
def test_shards_on_a_server_are_named_by_braces(served, braces):
    url, images = served
    listing = Custom().listing(f"{url}/train-{braces}.tar")
    assert listing.class_names == ("a", "b")
    assert dict(zip(listing.table["key"].to_pylist(), fetch(listing.table), strict=True)) == images


def test_a_server_that_sends_no_parts_is_one_line(served, monkeypatch):
    monkeypatch.setattr(Files, "parts", False)
    listing = Custom().listing(f"{served[0]}/train-0.tar")  # small enough to come at once
    with pytest.raises(InputError, match=r"train-0\.tar: its server sends files only whole: copy it first") as error:
        list(fetch(listing.table))
    assert "\n" not in str(error.value)
