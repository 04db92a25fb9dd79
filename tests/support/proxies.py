"""What stands between a client and a real S3 server: outages (`Proxy`), spoilt answers (`FaultyProxy`)."""

import contextlib
import socket
import threading
import time

from scripts.s3_proxy import FaultyProxy

__all__ = ["FaultyProxy"]

BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy:
    """Passes connections on, or does not, as `mode` says; the next `lost_answers` puts arrive, but nobody is told."""

    def __init__(self, port: int) -> None:
        self.target, self.mode, self.lost_answers = port, "pass", 0
        self.open: list[socket.socket] = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def set(self, mode: str) -> None:
        """From now on, also on connections that are open."""
        self.mode = mode
        while self.open:
            with contextlib.suppress(OSError):
                self.open.pop().shutdown(socket.SHUT_RDWR)

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.server.accept()
                if self.mode == "refuse":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    client.close()  # with a reset
                else:
                    self.open.append(client)
                    threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self.target)) as server:
            if self.mode == "hang":
                time.sleep(30)
            elif self.mode == "503":
                client.recv(1 << 16)
                client.sendall(BUSY)
            else:
                asked: list[bytes] = []
                threading.Thread(target=self.answer, args=(server, client, asked), daemon=True).start()
                while data := client.recv(1 << 16):
                    asked.append(data[:4])
                    server.sendall(data)

    def answer(self, server: socket.socket, client: socket.socket, asked: list[bytes]) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 14):
                if self.lost_answers and b"PUT " in asked and b"HTTP/1.1 200" in data:
                    self.lost_answers -= 1
                    break
                client.sendall(data)
                passed += len(data)
                if self.mode == "cut" and passed > 100:
                    break
            client.shutdown(socket.SHUT_RDWR)
