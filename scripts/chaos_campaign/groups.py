"""Worker groups as Ray would run them: real processes over gloo, forked warm, each with the real training loop.

In: a job, a generation, a world size.
Out: a `Group` that can be watched, struck and ended; `begin`, the controller's decision in a process of its own.
"""

import ctypes
import functools
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import distributed

from raytrain_brats.run import journal, worker
from raytrain_brats.run.control import Generation
from raytrain_brats.run.phase_timer import PhaseTimer
from raytrain_brats.run.rank import Rank
from raytrain_brats.run.spec import RunSpec
from scripts.chaos_campaign.board import MAIN, Board
from scripts.chaos_campaign.setting import CPU, stream

Twist = Callable[[], None]
"""Changes the product within a forked process: how a negative control takes a protection away."""
POLL_S = 0.0003


def forked(log: Path, work: Callable[[], None]) -> int:
    """The id of a process that does `work`: exit code 0, or 1 with the stack in `log`."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the campaign
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - told in the log, and by the exit code
        with suppress(BaseException):
            traceback.print_exc()
    finally:
        os._exit(code)


class Process:
    """A child, ended and waited for by its own id."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def over(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def send(self, number: int) -> None:
        if not self.over():
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


class Group:
    """The ranks of one generation."""

    def __init__(self, run_spec: RunSpec, generation: Generation, world_size: int, twist: Twist) -> None:
        self.generation, self.world_size, self.board = generation, world_size, Board(world_size)
        log = Path(run_spec.run_dir, "processes.log")
        meeting = Path(run_spec.run_dir, f"meeting-{generation.number}")

        def rank_work(rank: int) -> None:
            twist()
            self.board.put(rank, MAIN, "start")
            self.board.watch_writes(rank)
            if world_size > 1:
                store = distributed.FileStore(str(meeting), world_size)  # type: ignore[attr-defined]
                distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)

            timer = PhaseTimer(lambda phase: self.board.put(rank, MAIN, phase))
            mine = stream(run_spec, generation, rank, world_size)
            worker.train_rank(run_spec, generation, Rank(rank, world_size, CPU), timer, mine)

        self.processes = [Process(forked(log, functools.partial(rank_work, rank))) for rank in range(world_size)]

    def over(self) -> bool:
        """Whether any rank is gone: then the others cannot go on."""
        return any(process.over() for process in self.processes)

    def finish(self, patience_s: float = 180.0) -> bool:
        """Wait for the end; whether all ranks came to it by themselves. Whoever hangs is killed."""
        until = time.monotonic() + patience_s
        while not all(p.over() for p in self.processes) and time.monotonic() < until:
            if any(p.code not in (None, 0) for p in self.processes):
                until = min(until, time.monotonic() + 5)
            time.sleep(0.002)
        self.kill()
        return all(process.code == 0 for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def begin(run_spec: RunSpec, twist: Twist, strike: Callable[[Process, Board], bool] | None = None) -> bool:
    """`begin_generation` in a process of its own, which `strike` may kill; whether it got through.

    Raises RuntimeError when it failed by itself.
    """
    board, log = Board(1), Path(run_spec.run_dir, "processes.log")

    def work() -> None:
        twist()
        board.put(0, MAIN, "begin")
        board.watch_writes(0)
        journal.begin_generation(run_spec.run_dir)

    process = Process(forked(log, work))
    if strike is not None and strike(process, board):
        return False
    if process.wait() != 0:
        raise RuntimeError(f"begin_generation failed; see {log}: {log.read_text().strip().splitlines()[-1]}")
    return True
