"""Drain this machine's Ray node on a spot notice: `python -m raytrain_brats.spot --head ADDRESS &`, one on each.

In: the instance metadata service, version 2 (AWS_EC2_METADATA_SERVICE_ENDPOINT, as in AWS's own SDKs); a running Ray.
Out: this machine's Ray node drained, once a notice, with the notice's deadline; a checkpoint when EC2 recommends to
leave; the machine shut down when the cluster's head is gone for good; a line for each thing that happened.

No error ends the watch: a metadata service or a Ray that does not answer is asked again at the next look.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from raytrain_brats.cli import entry
from raytrain_brats.errors import UserError

ACTION, REBALANCE = "spot/instance-action", "events/recommendations/rebalance"
NOTICE_S = 120.0
"""What EC2 gives a machine from the notice on; taken where the notice cannot be read."""
DRAIN_S = 60.0
"""Longest time for one try to reach Ray."""
_TOKEN, _TTL, _TTL_S = "X-aws-ec2-metadata-token", "X-aws-ec2-metadata-token-ttl-seconds", 300


@dataclass(frozen=True)
class Args:
    """Watch this machine's spot notices and drain its Ray node when one comes; runs until it is ended.

    A second watcher on the same machine ends at once, with 0.
    """

    every: float = 5.0
    """Seconds between two looks."""
    rebalance: Literal["checkpoint", "drain", "note"] = "checkpoint"
    """What a rebalance recommendation does, which has no deadline and may come long before the end, or for nothing:
    the run on this machine saves, or the machine is given up, or neither."""
    head: str = ""
    """HOST:PORT of the cluster's head. When nothing answers there for --headless-minutes, this machine shuts down:
    nobody else would end it, and it costs."""
    headless_minutes: float = 15.0
    node: str = ""
    """Name of the Ray node to drain, where several run on one machine; by default all at this machine's address."""


class Imds:
    """One machine's metadata service: every question carries a token that was asked for before."""

    def __init__(self, endpoint: str) -> None:
        self._latest = f"{endpoint.rstrip('/')}/latest"
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # never through a proxy
        self._token, self._renew_at = "", 0.0

    def get(self, path: str) -> str | None:
        """The text at a path below meta-data, or None. Raises OSError or HTTPException when nothing answers."""
        for again in (False, True):
            if again or time.monotonic() >= self._renew_at:
                self._token = self._ask("PUT", "api/token", {_TTL: str(_TTL_S)})
                self._renew_at = time.monotonic() + _TTL_S / 2
            try:
                return self._ask("GET", f"meta-data/{path}", {_TOKEN: self._token})
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or again:  # 401: the token is not good any more, though its time is not up
                    raise
        return None

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(f"{self._latest}/{path}", method=method, headers=headers)  # noqa: S310
        with self._open(request, timeout=2) as answer:
            return str(answer.read().decode())


@dataclass(frozen=True)
class Notice:
    text: str
    """The notice's text, which also distinguishes two notices."""
    deadline: float
    """Unix time at which the machine goes; 0 when none is known."""


class Watcher:
    """The notices so far, and what was done for them.

    `drain` returns whether Ray accepted; `save` asks for a checkpoint.
    """

    def __init__(
        self,
        imds: Imds,
        drain: Callable[[Notice], bool],
        on_rebalance: str = "checkpoint",
        save: Callable[[Notice], bool] = lambda _: False,
    ) -> None:
        self._imds, self._drain, self._on_rebalance, self._save = imds, drain, on_rebalance, save
        self._open: dict[str, Notice] = {}
        """Received, and not drained for yet."""
        self._known: set[str] = set()
        self._going, self._state = False, ""

    def look(self) -> None:
        """Ask once for each kind of notice; drain for those that are open."""
        try:
            for path in (ACTION, REBALANCE):
                if (body := self._imds.get(path)) is not None:
                    self._hear(path, body)
            self._say("watching")
        except (OSError, HTTPException, ValueError) as error:
            self._say(f"the metadata service does not answer ({error}); asking again")
        for text, notice in list(self._open.items()):
            if self._drain(notice):
                del self._open[text]
                _log(f"drained for: {text}")

    def _hear(self, path: str, body: str) -> None:
        text = f"{path} {' '.join(body.split())}"
        if text in self._known:
            return
        self._known.add(text)
        _log(f"notice: {text}")
        if path == ACTION:
            self._going = True
            self._open = {text: Notice(text, deadline(body))}  # a recommendation no longer matters
        elif self._on_rebalance == "drain" and not self._going:
            self._open[text] = Notice(text, 0.0)
        elif self._on_rebalance == "checkpoint" and not self._going:
            _log("a checkpoint is saved" if self._save(Notice(text, 0.0)) else "no run here can save now")

    def _say(self, state: str) -> None:
        if state != self._state:  # an outage of an hour is two lines
            _log(state)
        self._state = state


def deadline(body: str) -> float:
    """Unix time of an instance action; what EC2 gives from now on, when it cannot be read."""
    try:
        when = datetime.fromisoformat(json.loads(body)["time"])
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, KeyError, TypeError):
        return time.time() + NOTICE_S


class Head:
    """Whether the cluster's head is there; `end` is called once it has not been for long."""

    def __init__(self, address: str, minutes: float, end: Callable[[], None]) -> None:
        self._host, _, port = address.rpartition(":")
        if not self._host or not port.isdigit():
            raise UserError(f"--head {address} is not HOST:PORT")
        self._port, self._limit_s, self._end = int(port), 60 * minutes, end
        self._seen = time.monotonic()

    def look(self) -> None:
        try:
            socket.create_connection((self._host, self._port), timeout=5).close()
            self._seen = time.monotonic()
        except OSError as error:
            away_s = time.monotonic() - self._seen
            _log(f"no head at {self._host}:{self._port} for {away_s:.0f} s ({error})")
            if away_s >= self._limit_s:
                self._end()


def shut_down() -> None:
    """End this machine; EC2 then terminates it (InstanceInitiatedShutdownBehavior). Asked again with the next look."""
    _log("the head is gone: shutting this machine down")
    subprocess.run(["sudo", "shutdown", "-h", "now"], check=False)  # noqa: S607


def apart(target: Callable[[Notice, str], None], notice: Notice, node: str = "") -> bool:
    """Ask Ray in a process of its own: Ray's client ends its process when the head is gone, and weighs 100 MB."""
    child = multiprocessing.get_context("spawn").Process(target=target, args=(notice, node), daemon=True)
    child.start()
    child.join(DRAIN_S)
    if child.exitcode is None:
        _log(f"Ray did not answer within {DRAIN_S:.0f} s")
        child.kill()
        child.join()
    return child.exitcode == 0


def drain(notice: Notice, node: str = "") -> None:
    """Drain this machine's node in Ray. Exits with 1 and the reason when no node was accepted."""
    try:
        store, ours = _nodes_here(node)
        # in the future, or Ray refuses; 0 is no deadline
        by_ms = int(1000 * max(notice.deadline, time.time() + 1)) if notice.deadline else 0
        for key in ours:
            accepted, why = store.drain_for_preemption(key, notice.text, by_ms)
            if not accepted:
                raise RuntimeError(f"refused: {why}")
    except Exception as error:  # noqa: BLE001 - whatever Ray raises: the watcher tries again
        _log(f"cannot drain yet: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        sys.exit(1)


def save(_notice: Notice, node: str = "") -> None:
    """Have the runs that train on this machine save. Exits with 1 when none did."""
    from raytrain_brats.run import checkpoint_request, heartbeat

    try:
        store, ours = _nodes_here(node)
        reports = [json.loads(value or b"{}") for value in store.values(heartbeat.PREFIX)]
        runs = {a["run_dir"] for a in reports if a.get("node") in ours and a["phase"] != "end" and _alive(a["pid"])}
        sys.exit(0 if [run for run in sorted(runs) if checkpoint_request.request(run, checkpoint_request.SAVE)] else 1)
    except Exception as error:  # noqa: BLE001 - it was a recommendation
        _log(f"no checkpoint could be asked for: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        sys.exit(1)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _nodes_here(node: str) -> tuple[Any, list[str]]:
    """(the cluster's control store, the ids of its living nodes on this machine). Raises LookupError for none."""
    from raytrain_brats.ray_ext.internals import core

    store = core.ControlStore(DRAIN_S)
    if not (ours := store.nodes_here(node)):
        raise LookupError(f"no living node {node or 'at ' + store.here} in the cluster at {store.address}")
    return store, ours


def work(args: Args) -> None:
    endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
    if not endpoint.startswith(("http://", "https://")):
        raise UserError(f"AWS_EC2_METADATA_SERVICE_ENDPOINT={endpoint} is no http:// address")
    try:  # `ray up` runs start commands again on every update: they need no `pgrep`, which finds its own shell
        with FileLock(Path(tempfile.gettempdir(), "raytrain_brats-spot.lock"), timeout=0):
            _watch(args, endpoint)
    except Timeout:
        _log("another watcher runs on this machine")


def _watch(args: Args, endpoint: str) -> None:
    _log(f"asking {endpoint} every {args.every:g} s on {socket.gethostname()}")
    watcher = Watcher(
        Imds(endpoint),
        lambda notice: apart(drain, notice, args.node),
        args.rebalance,
        lambda notice: apart(save, notice, args.node),
    )
    head = Head(args.head, args.headless_minutes, shut_down) if args.head else None
    if head:  # set at boot, for a node whose set-up never comes to this
        subprocess.run(["sudo", "shutdown", "-c"], check=False)  # noqa: S607
    while True:
        try:
            watcher.look()
            if head:
                head.look()
        except Exception as error:  # noqa: BLE001 - no memory for a process, say: that passes, or the machine goes
            _log(f"this look failed: {error!r}")
        time.sleep(args.every)


def _log(line: str) -> None:
    print(f"{time.strftime('%F %T')} {line}", flush=True)


def main(argv: list[str] | None = None) -> int:
    return entry(Args, work, "spot", argv)


if __name__ == "__main__":
    sys.exit(main())
