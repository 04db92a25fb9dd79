"""A metadata service as that of EC2 (version 2), in this process."""

import json
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from raytrain_brats import spot
from raytrain_brats.spot import ACTION


class Metadata(ThreadingHTTPServer):
    """Token wanted, 401 for a wrong one, 404 for what is not there; `broken` is a status that it always gives."""

    def __init__(self) -> None:
        self.notices: dict[str, str] = {}
        self.tokens, self.asked, self.broken = 0, 0, 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_PUT(self) -> None:
                good = self.path == "/latest/api/token" and 1 <= int(self.headers[spot._TTL]) <= 21600
                server.tokens += good
                self.reply(200 if good else 400, f"token-{server.tokens}")

            def do_GET(self) -> None:
                server.asked += 1
                if self.headers[spot._TOKEN] != f"token-{server.tokens}":
                    return self.reply(401)
                body = server.notices.get(self.path.removeprefix("/latest/meta-data/"))
                return self.reply(404) if body is None else self.reply(200, body)

            def reply(self, code: int, body: str = "") -> None:
                self.send_response(server.broken or code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def terminate_in(self, seconds: float) -> str:
        """The notice of an interruption; its time as EC2 writes it."""
        when = datetime.fromtimestamp(time.time() + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.notices[ACTION] = json.dumps({"action": "terminate", "time": when})
        return when
