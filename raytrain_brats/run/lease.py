"""One driver at a time: who may train into a run folder.

In: a run folder.
Out: a `Lease` on it, renewed while it is held; or UserError that names the driver that has it.

`lease.json` holds its driver's token and a counter that the driver raises every few seconds. A second driver takes it
when the first is known to be dead (same machine), or when the counter stood still for `ttl_s` by the second's own
clock. A driver that was merely stopped may come back then: `Lease.lost` tells it, and the ledger refuses its token.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytrain_brats.errors import UserError
from raytrain_brats.run.run_dir import RunDir

TTL_S = 15.0


class Lease:
    """What a driver holds. Its `token` is written into generation.json, which is what keeps others out for good."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir, self.token, self.since, self._renewals = run_dir, uuid.uuid4().hex, time.time(), 0
        self.lost = ""
        """Who has it instead, once another driver took it. An outage of the storage alone loses nothing."""
        self.trouble = ""
        """Why the run folder cannot be written just now; "" when it can."""

    def _about(self) -> bytes:
        mine = {"token": self.token, "renewals": self._renewals, "since": self.since}
        process = {"pid": os.getpid(), "started": _started(os.getpid())}
        return json.dumps(mine | process | {"host": socket.gethostname(), "machine": _machine()}).encode()

    def take(self, ttl_s: float) -> None:
        """Raises UserError when another driver lives, as far as one can see."""
        seen: bytes | None = b""
        document, watched_since, told = RunDir(self.run_dir).lease, 0.0, False
        while True:
            content = document.read()
            holder = _parsed(content)
            if holder and not _is_gone(holder):
                if _parsed(seen).get("token") == holder["token"] and content != seen:
                    raise UserError(
                        f"{self.run_dir} is being trained by another driver, {_name(holder)}; "
                        "wait for it, end it there, or give another --run-dir"
                    )
                if content != seen:
                    seen, watched_since = content, time.monotonic()
                if not told:
                    print(f"waiting to see whether the driver {_name(holder)} still lives ...", flush=True)
                    told = True
                if time.monotonic() - watched_since < ttl_s:
                    time.sleep(ttl_s / 30)
                    continue
            self.since = time.time()
            if document.swap(content, self._about()):
                return

    def keep(self, ttl_s: float, done: threading.Event) -> None:
        """Renew until `done` is set or the lease is lost."""
        document = RunDir(self.run_dir).lease
        while not done.wait(ttl_s / 3):
            try:
                content = document.read()
                if content is not None and _parsed(content).get("token") != self.token:
                    self.lost = _name(_parsed(content))
                    return
                self._renewals += 1
                document.swap(content, self._about())  # if another was faster, the next look tells
                self.trouble = ""
            except (OSError, UserError) as error:  # out for others too; if not for them, a later look tells
                self.trouble = str(error)

    def release(self) -> None:
        """Leave it to whoever comes, unless it is another's already."""
        document = RunDir(self.run_dir).lease
        with contextlib.suppress(OSError, UserError):  # then the next driver finds us dead, or waits
            content = document.read()
            if _parsed(content).get("token") == self.token:
                document.swap(content, json.dumps({"released_by": self.token}).encode())


@contextlib.contextmanager
def hold(run_dir: str, ttl_s: float = TTL_S) -> Iterator[Lease]:
    """Have the run folder to oneself for the time of a `with` block. Raises UserError when another driver has it."""
    lease, done = Lease(run_dir), threading.Event()
    lease.take(ttl_s)
    keeper = threading.Thread(target=lease.keep, args=(ttl_s, done), name="lease", daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        done.set()
        keeper.join(ttl_s)  # or it might renew what is released
        lease.release()


def _parsed(content: bytes | None) -> dict[str, Any]:
    """Who holds it; empty when nobody does, also when a person damaged the file."""
    try:
        found = json.loads(content or b"{}")
        return found if {"token", "renewals", "since", "host", "pid"} <= found.keys() else {}
    except (ValueError, AttributeError):
        return {}


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "another driver"
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder["since"]))
    return f"process {holder['pid']} on {holder['host']} since {since}"


def _machine() -> str:
    """What gives process numbers their meaning: this boot of this machine, and the container; "" when not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began; "" when there is none, or only its exit code is left.

    In the kernel's ticks: psutil's create_time counts from 1970, and moves when somebody sets the clock.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a driver is known to have ended; of another machine, or of another user, nobody knows."""
    here = _machine()
    if not here or (holder.get("machine"), holder["host"]) != (here, socket.gethostname()):
        return False
    try:
        os.kill(holder["pid"], 0)  # sends nothing
    except PermissionError:
        return False
    except ProcessLookupError:
        return True
    return _started(holder["pid"]) != holder.get("started")
