"""A proxy on loopback before a real S3 server, which spoils a seeded share of the answers as networks do.

In: the server's port; how often each kind of fault comes, or which are to come next.
Out: answers, some of them spoilt; a log of what was asked and how it was answered.
"""

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n"
OF_BODIES = ("truncated", "short", "flip", "trickle", "slow")  # faults that only a GET of an object can have
ISSUE_RATES = {"503": 0.10, "reset": 0.01, "truncated": 0.01, "flip": 0.001}


@dataclass(frozen=True)
class Asked:
    """One request, and what became of it."""

    method: str
    path: str
    range: str
    fault: str
    sent: int


class FaultyProxy(ThreadingHTTPServer):
    """503: not passed on. reset: before the server has it, or before its answer comes. truncated: the connection ends
    within the body. short: half of the body, whose length is told to fit. flip: one bit of the body. trickle: a byte
    now and then. slow: the whole body in a second and a half. They befall paths that hold `only`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, rates: dict[str, float] | None = None, seed: int = 0, only: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.rates, self.seed, self.only = port, rates or {}, seed, only
        self.next: list[str] = []  # faults for the next requests that can have them
        self.always = ""
        self.log: list[Asked] = []
        self.dealt = {True: 0, False: 0}
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def deal(self, path: str, of_object: bool) -> tuple[str, random.Random]:
        """The nth read of an object always has the same fault, in whatever order things are read."""
        with self.lock:
            if self.only not in path:
                return "", random.Random(0)
            self.dealt[of_object] += 1
            dice = random.Random(f"{self.seed}/{of_object}/{self.dealt[of_object]}")
            if self.next and (of_object or self.next[0] not in OF_BODIES):
                return self.next.pop(0), dice
        fault, left = self.always, dice.random()
        for kind, rate in self.rates.items():
            if 0 <= left < rate:
                fault = kind
            left -= rate
        return ("" if fault in OF_BODIES and not of_object else fault), dice

    def count(self, fault: str) -> int:
        return sum(asked.fault == fault for asked in self.log)

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up, which is what clients of this proxy do."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyProxy

    def handle_one(self) -> None:
        body = self.body()
        of_object = self.command == "GET" and "?" not in self.path and self.path.count("/") > 1
        fault, dice = self.server.deal(self.path, of_object)
        if fault == "503":
            self.note(fault)
            self.connection.sendall(BUSY)
        elif fault == "reset" and dice.random() < 0.5:
            self.reset()
        else:
            self.answer(body, fault, dice)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_one  # noqa: N815

    def note(self, fault: str, sent: int = 0) -> None:
        """Before the client can know, or a test would look too early."""
        self.server.log.append(Asked(self.command, self.path, self.headers.get("Range", ""), fault, sent))

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        del self.headers["Transfer-Encoding"]
        return b"".join(parts)

    def answer(self, body: bytes, fault: str, dice: random.Random) -> None:
        """Ask the server, spoil what it says."""
        server = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=60)
        with contextlib.closing(server):
            headers = {**dict(self.headers.items()), "Content-Length": str(len(body)), "Connection": "close"}
            server.request(self.command, self.path, body, headers)
            found = server.getresponse()
            content = found.read()
        if fault == "reset":
            self.reset()
            return
        length = found.headers.get("Content-Length") or str(len(content))
        if not content or found.status >= 300:
            fault = ""
        if fault == "short":
            content = content[: len(content) // 2]
            length = str(len(content))
        if fault == "flip":
            altered, bit = bytearray(content), dice.randrange(8 * len(content))
            altered[bit // 8] ^= 1 << bit % 8
            content = bytes(altered)
        kept = [(k, v) for k, v in found.headers.items() if k.lower() not in ("connection", "transfer-encoding")]
        lines = [f"{k}: {v}" for k, v in kept if k.lower() != "content-length"] + [f"Content-Length: {length}"]
        if found.status in (204, 304):
            lines.pop()
        head = "\r\n".join([f"HTTP/1.1 {found.status} {found.reason}", *lines, "", ""]).encode("latin-1")
        if fault == "truncated":
            content = content[: len(content) // 2]
        self.note(fault, len(content))
        self.send(head, content, fault)

    def send(self, head: bytes, content: bytes, fault: str) -> None:
        if fault in ("trickle", "slow"):
            size, pause_s = (1, 0.1) if fault == "trickle" else (len(content) // 15 + 1, 0.1)
            self.connection.sendall(head)
            for start in range(0, len(content), size):
                self.connection.sendall(content[start : start + size])
                time.sleep(pause_s)
        else:
            self.connection.sendall(head + content)
        if fault == "truncated":
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        self.note("reset")
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""
