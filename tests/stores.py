"""Stores for tests: a folder behind HTTP and a bucket behind S3's protocol, which answer as long as no fault is due.

The S3 server is moto's; it stands behind one of ours that passes requests on. So every fault is met over both protocols.
"""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

Fault = Callable[[BaseHTTPRequestHandler, bytes], bool]
"""Answers a request for a part of a shard in its own way; False = it leaves that to the server."""
Behind = Callable[[BaseHTTPRequestHandler], tuple[int, dict[str, str], bytes]]
"""What a store without faults answers: status, headers, body."""
BUSY, REFUSED = 503, 403
_S3_SAYS = {BUSY: ("SlowDown", "Please reduce your request rate."), REFUSED: ("AccessDenied", "Access Denied")}
"""Code and message; HTTP servers say other things, which nobody reads."""


@dataclass(slots=True)
class Served:
    """A data set in a store, and how the next requests for parts of its shards are answered."""

    url: str
    faults: list[Fault] = field(default_factory=list)


@contextmanager
def over_http(folder: Path) -> Iterator[Served]:
    """The data set in `folder` on an HTTP server with ranges."""

    def files(request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        path = folder.parent / request.path.lstrip("/").split("?")[0]
        if not path.is_file():
            return 404, {"Content-Length": "0"}, b""
        content, status = path.read_bytes(), 200
        if given := request.headers.get("Range"):
            first, _, last = given.removeprefix("bytes=").partition("-")
            content, status = content[int(first):int(last) + 1], 206
        return status, {"Content-Length": str(len(content))}, content

    with _serving(files) as (address, faults):
        yield Served(f"{address}/{folder.name}", faults)


@contextmanager
def over_s3(folder: Path) -> Iterator[Served]:
    """The data set in `folder` in a bucket of moto's server; drivers find the end point in the environment."""
    import s3fs
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()

    def passed_on(request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(host, port)
        connection.request(request.command, request.path, headers=dict(request.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "transfer-encoding")}
        return answer.status, kept, content

    with pytest.MonkeyPatch.context() as patch, _serving(passed_on) as (address, faults):
        for key, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "y"), ("AWS_DEFAULT_REGION", "us-east-1"),
                           ("AWS_ENDPOINT_URL", address), ("AWS_MAX_ATTEMPTS", "1")):
            patch.setenv(key, value)
        system = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}", skip_instance_cache=True)
        system.mkdir("bucket")
        system.put(str(folder), f"bucket/{folder.name}", recursive=True)
        s3fs.S3FileSystem.clear_instance_cache()
        yield Served(f"s3://bucket/{folder.name}", faults)
        s3fs.S3FileSystem.clear_instance_cache()
    moto.stop()


@contextmanager
def _serving(behind: Behind) -> Iterator[tuple[str, list[Fault]]]:
    """Address of a server that answers as `behind` says, unless one of the faults does."""
    faults: list[Fault] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, content = behind(self)
            if status == 206 and ".dls" in self.path and faults and faults.pop(0)(self, content):
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", faults
    server.shutdown()
    server.server_close()


# ---- faults --------------------------------------------------------------------------------------------------------
def answer(handler: BaseHTTPRequestHandler, content: bytes, length: int | None = None, status: int = 206) -> bool:
    """Send `content` as the body, with `length` in the header."""
    if status in _S3_SAYS:
        content = "<Error><Code>{}</Code><Message>{}</Message></Error>".format(*_S3_SAYS[status]).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)
    return True


def cut_off(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    """The connection ends in the middle."""
    answer(handler, content[:len(content) // 2], len(content))
    handler.close_connection = True
    return True


def too_short(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    """Fewer bytes than were asked for, and the header says so."""
    return answer(handler, content[:-3])


def slow(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    """Longer than the tests' time limit; this is the fault itself, not a wait for something."""
    time.sleep(1.5)
    return False


def wrong(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    """Other bytes."""
    return answer(handler, content[:-1000] + bytes(1000))


def busy(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    """503 SlowDown."""
    return answer(handler, b"", status=BUSY)


def refused(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    """403 AccessDenied."""
    return answer(handler, b"", status=REFUSED)


def whole(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    """More than the range that was asked for."""
    return answer(handler, content + content, status=200)


def sound(handler: BaseHTTPRequestHandler, content: bytes) -> bool:
    """No fault."""
    return False
