"""Let the containers of a job find each other and exchange messages.

In: SageMaker's resourceconfig.json; a folder that all of them may read and write.
Out: which one is the head; a `Channel` of JSON messages between the head and each peer.
"""

import contextlib
import hmac
import json
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from raytrain_brats import storage
from raytrain_brats.errors import RunFailed

T = TypeVar("T")
PORT = 6380


@dataclass(frozen=True)
class Cluster:
    """Who takes part; the same on every host but for `me`."""

    me: str
    hosts: tuple[str, ...]
    head: str
    group: str
    """Of this host: `data`, `train`, or what SageMaker calls a job's only group."""
    interface: str

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(host for host in self.hosts if host != self.head)


def read_cluster(root: Path) -> Cluster:
    """From resourceconfig.json of a training (or else processing) job. Raises RunFailed where it is none."""
    paths = [root / "input/config/resourceconfig.json", root / "config/resourceconfig.json"]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise RunFailed(f"{paths[0]} is not there: `host` runs in a SageMaker container; at home use `train` itself")
    try:
        found = json.loads(path.read_text())
        me, hosts = found["current_host"], sorted(found["hosts"], key=_number)
        groups = found.get("instance_groups") or []
        group = {host: part["instance_group_name"] for part in groups for host in part["hosts"]}
        # A CPU host has time for the cluster's own processes; and every host must come to the same choice.
        head = min(hosts, key=lambda host: (group.get(host) != "data", _number(host)))
        return Cluster(me, tuple(hosts), head, group.get(me, "all"), found.get("network_interface_name") or "eth0")
    except (ValueError, KeyError, TypeError) as error:
        raise RunFailed(f"{path} is not as expected ({error!r}): {path.read_text()[:500]}") from error


def _number(host: str) -> tuple[int, str]:
    return len(host), host  # algo-2 before algo-10


class Channel:
    """One connection, line by line: JSON out, JSON in."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that vanishes says nothing
        for name, seconds in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
            connection.setsockopt(socket.IPPROTO_TCP, name, seconds)
        self.socket = connection
        self._read = b""

    @property
    def pending(self) -> bool:
        """Whether a message has arrived that `receive` has not returned yet."""
        return b"\n" in self._read

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # a peer that is gone is noticed by the next read
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next message; None when the other side is gone. Raises TimeoutError."""
        self.socket.settimeout(timeout_s)
        try:
            while b"\n" not in self._read:
                part = self.socket.recv(65536)
                if not part or len(self._read) > 65536:
                    return None
                self._read += part
        except TimeoutError:
            raise
        except OSError:
            return None
        message, _, self._read = self._read.partition(b"\n")
        try:
            return json.loads(message)
        except ValueError:
            return None


def gather(cluster: Cluster, token: str, server: socket.socket, deadline: float, channels: dict[str, Channel]) -> None:
    """Put a channel to each peer in `channels`. Raises RunFailed, naming who is missing, at the monotonic deadline."""
    began = time.monotonic()
    while missing := [host for host in cluster.peers if host not in channels]:
        if (left_s := deadline - time.monotonic()) <= 0:
            raise RunFailed(_missing(missing, time.monotonic() - began))
        server.settimeout(left_s)
        with contextlib.suppress(TimeoutError):
            channel = Channel(server.accept()[0])
            hello = channel.receive(min(left_s, 10))
            host, given = (hello.get("host"), hello.get("token")) if isinstance(hello, dict) else (None, None)
            if host in missing and isinstance(given, str) and hmac.compare_digest(given.encode(), token.encode()):
                channels[host] = channel
                print(f"host: {host} is here, {len(missing) - 1} still missing", flush=True)


def _missing(hosts: list[str], after_s: float) -> str:
    return f"{', '.join(hosts)} did not come up within {after_s:.0f} s: no container there, or it failed; see its log"


def call(cluster: Cluster, token: str, deadline: float) -> Channel:
    """A channel to the head. Raises RunFailed when it does not answer before the deadline."""
    failure = f"{cluster.head}, the head, did not come up in time"
    channel = _until(deadline, lambda: Channel(socket.create_connection((cluster.head, PORT), timeout=5)), failure)
    channel.send({"host": cluster.me, "token": token})
    return channel


def address_of(host: str, deadline: float) -> str:
    """Its IP address. Raises RunFailed when it has no name before the deadline."""
    return _until(deadline, lambda: socket.gethostbyname(host), f"host {host} has no address")


def _until(deadline: float, ask: Callable[[], T], failure: str) -> T:
    """Retry `ask` while the name or the listener does not exist yet. Raises RunFailed at the deadline (monotonic)."""
    while True:
        try:
            return ask()
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunFailed(f"{failure} ({error})") from error
            time.sleep(0.5)


def shared_token(folder: str) -> str:
    """The secret of this run's clusters, which only those can read that may read its folder; made by the first host.

    Not in the request: everyone who may describe the job could read it there.
    """
    place = storage.join(folder, "sagemaker", "ray_token")
    storage.swap(place, None, secrets.token_hex(32).encode())
    return storage.read_bytes(place).decode()
