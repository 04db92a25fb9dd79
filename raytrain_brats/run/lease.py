"""One driver at a time may train into a run folder. Runs in the driver.

In: a run folder.
Out: a `Lease` on it, renewed while it is held; or UserError that names the driver that holds it.

`lease.json` holds its driver's token and a counter that the driver increments every few seconds. A second driver takes
the lease when the first is known to be dead (same machine), or when the counter did not change for `ttl_s` by the
second's own clock, so hosts' clocks are not compared. On the first one's machine it is refused at once, by the clock
since boot. A driver that was merely suspended may resume after it was replaced: its `Lease.lost` is set, and the
journal rejects its token.
"""

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytrain_brats.errors import UserError
from raytrain_brats.run.repeated import Repeated
from raytrain_brats.run.run_dir import RunDir

TTL_S = 15.0


class Lease:
    """A driver's claim. Its `token` is written into generation.json, where compare-and-swap excludes other drivers."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir, self.token, self.since, self._renewals = run_dir, uuid.uuid4().hex, time.time(), 0
        self.lost = ""
        """The driver that took it over; "" while it is held, also during an outage of the storage."""
        self.trouble = ""
        """Why the run folder cannot be written now; "" when it can."""

    def _about(self) -> bytes:
        mine = {"token": self.token, "renewals": self._renewals, "since": self.since, "at": _since_boot()}
        process = {"pid": os.getpid(), "started": _started(os.getpid())}
        return json.dumps(mine | process | {"host": socket.gethostname(), "machine": _machine()}).encode()

    def take(self, ttl_s: float) -> None:
        """Wait until the lease is free and take it. Raises UserError when another driver renews it."""
        seen: bytes | None = b""
        document, watched_since, printed = RunDir(self.run_dir).lease, 0.0, False
        while True:
            content = document.read()
            holder = _parsed(content)
            if holder and not _is_gone(holder):
                if (_parsed(seen).get("token") == holder["token"] and content != seen) or _is_here(holder, ttl_s):
                    raise _refusal(self.run_dir, holder)
                if content != seen:
                    seen, watched_since = content, time.monotonic()
                if not printed:
                    print(f"waiting to see whether the driver {_name(holder)} still lives ...", flush=True)
                    printed = True
                if time.monotonic() - watched_since < ttl_s:
                    time.sleep(ttl_s / 30)
                    continue
            self.since = time.time()
            if document.swap(content, self._about()):
                return

    def renew(self) -> None:
        """Write that this driver lives, unless another one has taken the lease."""
        if self.lost:
            return
        document = RunDir(self.run_dir).lease
        try:
            content = document.read()
            if content is not None and _parsed(content).get("token") != self.token:
                self.lost = _name(_parsed(content))
                return
            self._renewals += 1
            document.swap(content, self._about())  # if another driver was faster, the next read shows it
            self.trouble = ""
        except (OSError, UserError) as error:  # the lease stays ours unless a later read shows another driver
            self.trouble = str(error)

    def release(self) -> None:
        """Free the lease, unless another driver has taken it."""
        document = RunDir(self.run_dir).lease
        with contextlib.suppress(OSError, UserError):  # then the next driver waits, or finds this process dead
            content = document.read()
            if _parsed(content).get("token") == self.token:
                document.swap(content, json.dumps({"released_by": self.token}).encode())


def check(run_dir: str, ttl_s: float = TTL_S) -> None:
    """Raises UserError when another driver is known at once to hold the lease; `hold` finds out about all others."""
    holder = _parsed(RunDir(run_dir).lease.read())
    if holder and not _is_gone(holder) and _is_here(holder, ttl_s):
        raise _refusal(run_dir, holder)


def _refusal(run_dir: str, holder: dict[str, Any]) -> UserError:
    return UserError(
        f"{run_dir} is being trained by another driver, {_name(holder)}; wait for it, end it there, or give another "
        "--run-dir"
    )


@contextlib.contextmanager
def hold(run_dir: str, ttl_s: float = TTL_S) -> Iterator[Lease]:
    """Hold the run folder's lease for the time of a `with` block. Raises UserError when another driver holds it."""
    lease = Lease(run_dir)
    lease.take(ttl_s)
    try:
        with Repeated("lease", lease.renew, ttl_s / 3, ttl_s):  # waited for, or it might renew the released lease
            yield lease
    finally:
        lease.release()


def _parsed(content: bytes | None) -> dict[str, Any]:
    """The holder; empty when there is none, also when the file is damaged."""
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
    """The scope within which process ids are unique: this boot of this machine, and the container; "" if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks since boot; "" when there is none, or it has exited.

    Not psutil's create_time, which counts from 1970 and changes when somebody sets the clock.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def _since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else 0.0


def _same_machine(holder: dict[str, Any]) -> bool:
    here = _machine()
    return bool(here) and (holder.get("machine"), holder["host"]) == (here, socket.gethostname())


def _is_here(holder: dict[str, Any], ttl_s: float) -> bool:
    """Whether a driver is known to live, on this machine: it runs, and has renewed its lease lately."""
    if not _same_machine(holder) or not 0 < holder.get("at", 0.0) <= _since_boot() < holder["at"] + ttl_s:
        return False
    try:
        stat = Path(f"/proc/{holder['pid']}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return stat[0] not in "TtZX" and stat[19] == holder.get("started")  # one that is suspended does not renew it


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a driver is known to have ended; False for one of another machine or another user."""
    if not _same_machine(holder):
        return False
    try:
        os.kill(holder["pid"], 0)  # sends nothing
    except PermissionError:
        return False
    except ProcessLookupError:
        return True
    return _started(holder["pid"]) != holder.get("started")
