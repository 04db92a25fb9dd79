"""The instance metadata service, version 2, of one machine of a rig: `python imds.py STATE.json`.

In: the machine's facts, read anew for each request, so that the rig can put a spot notice in.
Out: http://169.254.169.254 as boto3, Ray and the spot watcher ask it; no token, no answer (`HttpTokens: required`).
"""

import datetime
import json
import socketserver
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "a-token-of-the-rig"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, body: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer(*(200, TOKEN) if self.path == "/latest/api/token" else (404,))

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != TOKEN:
            return self.answer(401)
        state = json.loads(Path(sys.argv[1]).read_text())
        role = state["role"]
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=6)
        keys = {
            "Code": "Success",
            "Type": "AWS-HMAC",
            "AccessKeyId": state["key"],
            "SecretAccessKey": "s",
            "Token": "t",
        }
        known = {
            "instance-id": state["id"],
            "instance-type": state["type"],
            "local-ipv4": state["ip"],
            "placement/region": state["region"],
            "placement/availability-zone": state["zone"],
            "spot/instance-action": state["spot_action"] and json.dumps(state["spot_action"]),
            "iam/security-credentials": role,
            f"iam/security-credentials/{role}": role
            and json.dumps(keys | {"Expiration": f"{until:%Y-%m-%dT%H:%M:%SZ}"}),
        }
        found = known.get(self.path.removeprefix("/latest/meta-data/").rstrip("/"))
        return self.answer(*(200, found) if found else (404,))


class Server(ThreadingHTTPServer):
    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # the parent's asks DNS for its name: 20 s where there is none
        self.server_name, self.server_port = "imds", 80


Server(("169.254.169.254", 80), Handler).serve_forever()
