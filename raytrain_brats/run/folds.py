"""Train the folds of one data set, side by side as there is room: a process for each. Runs in the driver.

In: the command of one fold, how many workers there are; Ctrl-C and SIGTERM.
Out: the folds' run folders; their lines, each behind its fold's number; RunFailed that names the folds that failed.

A fold is a whole `train` with a driver of its own, so that none ends another. It has a session of its own, too: signals
reach it from here alone, once.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray

from raytrain_brats import interrupt
from raytrain_brats.config import Config
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.ray_ext import cluster, roles, start_up

PARENT = "RAYTRAIN_BRATS_PARENT"
"""Process number of the command that trains all folds, in the environment of one that trains one."""
SAVE_S = 300.0
"""How long folds may take to save and end: each has a limit of its own, which is a few steps' time."""


@dataclass(frozen=True)
class Plan:
    """How many folds at a time, and on what."""

    workers: tuple[str, ...]
    """--workers of each that trains at the same time; "" as the recipe has it."""
    address: str = ""
    """Of the Ray that they share; "" where each finds a cluster, or starts a Ray of its own."""


def plan(wanted: int, settings: Config, workers: str, held_bytes: int = 0, prepared: bool = False) -> Plan:
    """A GPU or, without GPUs, a machine for each worker; one fold at a time where there is one.

    `workers` as the user gave them, each fold's; by default the room is shared out. Starts a Ray to be shared where
    this machine has GPUs and no cluster is there. Raises UserError as `cluster.connect` does.
    """
    if ray.is_initialized() and cluster.started_here():  # for phantoms
        ray.shutdown()
    if not start_up.address() and not _gpus_here():
        return Plan((workers,))  # a CPU run takes all cores of its machine
    joined = ray.is_initialized()
    cluster.connect(held_bytes=wanted * held_bytes, prepared=prepared)
    nodes = roles.part("train").nodes
    gpus = 0 if settings.run.gpus_per_worker == 0 else int(sum(node.get("GPU", 0) for node in nodes))
    plan = shared_out(gpus or sum(node.get("CPU", 0) > 0 for node in nodes), wanted, workers, settings)
    if cluster.started_here() and len(plan.workers) > 1:
        return Plan(plan.workers, ray.get_runtime_context().gcs_address)
    if not joined:
        ray.shutdown()
    return plan


def shared_out(room: int, wanted: int, workers: str, settings: Config) -> Plan:
    """The places of so many workers, for so many folds."""
    if workers:
        most = int(workers.rpartition(":")[2])
        return Plan((workers,) * max(1, min(wanted, room // most)))
    at_once = max(1, min(wanted, room))
    if at_once == 1:
        return Plan(("",))
    each, more = divmod(room, at_once)
    shares = (min(each + (number < more), settings.train.global_batch) for number in range(at_once))
    return Plan(tuple("1" if share == 1 else f"1:{share}" for share in shares))


def _gpus_here() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(Path("/dev").glob("nvidia[0-9]*"))


@dataclass
class _Fold:
    number: int
    process: "subprocess.Popen[str]"
    workers: str
    said: list[str] = field(default_factory=list)
    """Its last word on why it ends."""

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._follow, name=f"fold {self.number}", daemon=True)
        self._reader.start()

    def ended(self) -> bool:
        """Also all that it printed has been read then, unless what it started still holds the pipe."""
        if self.process.poll() is None:
            return False
        self._reader.join(5)
        return True

    def _follow(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            print(f"fold {self.number}: {line.rstrip()}", flush=True)
            kind, _, reason = line.strip().partition(": ")
            if kind in ("error", "failed"):
                self.said = [reason]

    def reason(self) -> str:
        code = self.process.returncode
        return (self.said or ["interrupted" if code == interrupt.EXIT_CODE else f"ended with {code}"])[0]


def train(folds: Sequence[int], command: Callable[[int, str], list[str]], plan: Plan) -> None:
    """Train these to their ends; `command(fold, workers)` is a process's command line.

    Raises RunFailed at the end when some failed, UserError when all did by a mistake of the user; on KeyboardInterrupt
    all save first.
    """
    todo, free, running, failed = list(folds), list(plan.workers), list[_Fold](), list[_Fold]()
    try:
        while todo or running:
            while todo and free:
                running.append(_started(todo.pop(0), command, free.pop(0), plan.address))
            time.sleep(0.2)
            for fold in [each for each in running if each.ended()]:
                running.remove(fold)
                free.append(fold.workers)
                failed += [fold] if fold.process.returncode else []
    except KeyboardInterrupt:
        _save(running)
        raise
    finally:
        for fold in running:
            fold.process.kill()  # nothing, where it has ended
    if len(failed) == len(folds) and all(fold.process.returncode == 2 for fold in failed):
        raise UserError(failed[0].reason())
    if failed:
        why = "; ".join(f"fold {fold.number}: {fold.reason()}" for fold in sorted(failed, key=lambda f: f.number))
        raise RunFailed(f"{len(failed)} of {len(folds)} folds failed ({why}); the same command goes on with them")


def _started(number: int, command: Callable[[int, str], list[str]], workers: str, address: str) -> _Fold:
    environment = os.environ | {PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    environment |= {"RAY_ADDRESS": address} if address else {}
    process = subprocess.Popen(  # noqa: S603 - ours
        command(number, workers), env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    return _Fold(number, process, workers)


def _save(running: list[_Fold]) -> None:
    """Have each save and end; those that do not in time are ended."""
    interrupt.allow(SAVE_S + interrupt.GRACE_S)
    for fold in running:
        fold.process.send_signal(signal.SIGTERM)  # SIGINT may be ignored, as in the background of a script
    until = time.monotonic() + SAVE_S
    while not all(fold.ended() for fold in running) and time.monotonic() < until:
        time.sleep(0.1)


def end_with_parent() -> None:
    """In the process of one fold: save and end when the command that started it is gone, or its terminal with it."""
    parent = os.environ.get(PARENT, "")
    if not parent or os.getppid() != int(parent):
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def command_line(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "raytrain_brats", "train", *arguments]
