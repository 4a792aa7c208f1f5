"""Emulators of cloud storage on loopback, each behind a server that can fail first."""

import contextlib
import http.client
import json
import re
import shutil
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

AZURITE = "azurite-blob"  # of npm's package azurite
ACCOUNT = "devstoreaccount1"  # the one that Azurite knows, and its published key
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def connection_string(port: int, key: str = KEY) -> str:
    """What AZURE_STORAGE_CONNECTION_STRING is to be for Azurite at `port`."""
    account = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key}"
    return f"{account};BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT}"


class Front(ThreadingHTTPServer):
    """Answers requests with the next status of `faults`; when these are used up, as the server behind it does."""

    daemon_threads = True

    def __init__(self, port: int, behind: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.behind = behind
        self.faults: list[int] = []
        self.asked = 0


class Hub(Front):
    """A hub of Hugging Face with one data set, user/name, of these files by name; faults as of a Front."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(0)
        self.files = files

    def serve(self, asked: str, span: str | None) -> tuple[int, dict[str, str], bytes]:
        path = urllib.parse.unquote(urllib.parse.urlsplit(asked).path)
        if path == "/api/datasets/user/name":
            return _json({"id": "user/name", "sha": "0" * 40, "siblings": []})
        if found := re.fullmatch("/api/datasets/user/name/tree/main/?(.*)", path):
            return self.listed(found[1])
        data = self.files.get(path.removeprefix("/datasets/user/name/resolve/main/"))
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if span:
            first, last = span.removeprefix("bytes=").split("-")
            return 206, {"ETag": '"e"'}, data[int(first) : int(last) + 1]
        return 200, {"ETag": '"e"'}, data

    def listed(self, folder: str) -> tuple[int, dict[str, str], bytes]:
        lead = f"{folder}/" if folder else ""
        below = {name.removeprefix(lead).partition("/")[0] for name in self.files if name.startswith(lead)}
        if not below:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        rows = []
        for name in sorted(lead + one for one in below):
            file = self.files.get(name)
            kind = {"type": "directory"} if file is None else {"type": "file", "size": len(file)}
            rows.append(kind | {"path": name, "oid": "e"})
        return _json(rows)


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Front

    def forward(self) -> None:
        self.server.asked += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.faults:
            self.answer(self.server.faults.pop(0), {}, b"")
            return
        if isinstance(self.server, Hub):
            self.answer(*self.server.serve(self.path, self.headers.get("Range")))
            return
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        with contextlib.closing(behind):
            behind.request(self.command, self.path, body, dict(self.headers.items()))
            response = behind.getresponse()
            self.answer(response.status, dict(response.getheaders()), response.read())

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        if self.command != "HEAD":
            ours = {"transfer-encoding", "content-length"}
            headers = {name: value for name, value in headers.items() if name.lower() not in ours}
            headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def running(front: Front) -> Iterator[Front]:
    """Answer requests until the end of the block."""
    thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield front
    finally:
        front.shutdown()
        thread.join()
        front.server_close()


@contextlib.contextmanager
def s3(port: int) -> Iterator[Front]:
    """S3 as moto knows it, on a thread."""
    from moto.server import create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        def log(self, *arguments: object) -> None:
            pass

    server = make_server("127.0.0.1", 0, create_backend_app("s3"), threaded=True, request_handler=Silent)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with running(Front(port, server.server_port)) as front:
        yield front
    server.shutdown()
    thread.join()
    server.server_close()


@contextlib.contextmanager
def azure(port: int) -> Iterator[Front]:
    """Azure's blob storage as Azurite knows it, in a process of Node.js."""
    program = shutil.which(AZURITE)
    assert program, f"{AZURITE} is not on the PATH"
    options = ["--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    with subprocess.Popen([program, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            found = next(filter(None, (re.search(r"listens on \S+:(\d+)", line) for line in lines)))
            rest = threading.Thread(target=lambda: list(lines))  # or a full pipe would hold it
            rest.start()
            with running(Front(port, int(found[1]))) as front:
                yield front
        finally:
            process.terminate()
        rest.join()
