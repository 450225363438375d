"""A real S3 server on a folder, and a proxy before it that counts requests and makes the faults that a script asks for."""

from __future__ import annotations

import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

KEYS = "AKVKD", "SKVKD"
START_TIMEOUT_S = 20
HOST = "127.0.0.1"
HOP_BY_HOP = ("connection", "keep-alive", "expect", "transfer-encoding", "content-length")


@dataclass(frozen=True)
class Fault:
    """What happens to one request: an answer with a status, a connection reset, an answer cut in its middle, or none at all.

    A cut request has been done: only the answer is lost.
    """

    kind: Literal["answer", "reset", "cut", "hang"]
    status: int = 0
    code: str = ""


SLOW_DOWN = Fault("answer", 503, "SlowDown")
INTERNAL_ERROR = Fault("answer", 500, "InternalError")
DENIED = Fault("answer", 403, "AccessDenied")
EXPIRED = Fault("answer", 400, "ExpiredToken")
RESET, CUT, HANG = Fault("reset"), Fault("cut"), Fault("hang")
PASSING = (SLOW_DOWN, INTERNAL_ERROR, RESET, CUT)


@dataclass(frozen=True)
class Request:
    """One request as the proxy saw it; `num_bytes` is what its answer carried."""

    number: int
    time_s: float
    method: str
    path: str
    num_bytes: int = 0


Script = Callable[[Request], Fault | None]


def no_fault(_: Request) -> Fault | None:
    return None


def bursts(*faults: Fault, every: int, length: int) -> Script:
    """The last `length` of each `every` requests get a fault; each burst has the next of the faults."""
    return lambda request: faults[request.number // every % len(faults)] if request.number % every >= every - length else None


class S3Server:
    """`rclone serve s3` on a folder whose subfolders are buckets."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, free_port()
        self.start()

    def start(self) -> None:
        """Start it, also after `kill`, and wait until it answers."""
        rclone = Path(sys.executable).with_name("rclone")
        options = ["--addr", f"{HOST}:{self.port}", "--auth-key", ",".join(KEYS), "--vfs-cache-mode", "off"]
        words = [str(rclone), "serve", "s3", *options, str(self.root)]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while not _answers(self.port):
            if time.monotonic() > give_up_s or self.process.poll() is not None:
                raise RuntimeError("the S3 server does not answer")
            time.sleep(0.05)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self.process.kill()
        self.process.wait()


class FaultProxy:
    """A threaded HTTP proxy before a server on this machine. `script` says what happens to each request; `seen` is all of them."""

    def __init__(self, upstream_port: int, script: Script = no_fault) -> None:
        self.upstream_port, self.script = upstream_port, script
        self.seen: list[Request] = []
        self._open: set[socket.socket] = set()
        self._lock, self._closing = threading.Lock(), threading.Event()
        self.port = free_port()
        self.up()

    def up(self) -> None:
        """Listen."""
        self._closing.clear()
        self._server = _Server((HOST, self.port), self)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def down(self) -> None:
        """Refuse every connection, and break those that are open."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def count(self, method: str, path: str, num_bytes: int = 0) -> Request:
        """Note one request."""
        with self._lock:
            request = Request(len(self.seen), time.monotonic(), method, path, num_bytes)
            self.seen.append(request)
            return request

    def answered(self, number: int, num_bytes: int) -> None:
        """Note how much the answer to a request carried."""
        with self._lock:
            before = self.seen[number]
            self.seen[number] = Request(number, before.time_s, before.method, before.path, num_bytes)

    def hold(self) -> None:
        """Wait until the proxy goes down."""
        self._closing.wait()


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size, block_on_close = True, 128, False

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(address, _Relay)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.proxy._lock:
            self.proxy._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.proxy._lock:
            self.proxy._open.discard(request)
        self.close_request(request)  # without the polite goodbye: a reset is to be one

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no matter."""


class _Relay(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None: ...

    def _relay(self) -> None:
        proxy, body = self.server.proxy, self._body()
        request = proxy.count(self.command, self.path)
        fault = proxy.script(request)
        if fault is None or fault.kind == "cut":
            self._forward(body, request.number, cut=fault is not None)
        elif fault.kind == "answer":
            self._answer(fault)
        elif fault.kind == "hang":
            proxy.hold()
            self._reset()
        else:
            self._reset()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _forward(self, body: bytes, number: int, cut: bool) -> None:
        upstream = http.client.HTTPConnection(HOST, self.server.proxy.upstream_port, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):
            self._reset()
            return
        finally:
            upstream.close()
        if cut and not data:
            self._reset()
            return
        self.server.proxy.answered(number, len(data))
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)) if self.command != "HEAD" else answer.getheader("Content-Length", "0"))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.close_connection = True

    def _answer(self, fault: Fault) -> None:
        message = f"<Error><Code>{fault.code}</Code><Message>{fault.code} as asked</Message></Error>".encode()
        self.send_response_only(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(message)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(message)

    def _reset(self) -> None:
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


def environment(port: int) -> dict[str, str]:
    """What makes S3 clients talk to a server on this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://{HOST}:{port}",
        "AWS_ACCESS_KEY_ID": KEYS[0],
        "AWS_SECRET_ACCESS_KEY": KEYS[1],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port: int = free.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
