"""Commands in processes of their own: alone, found again by a mark in their environment; or in turn, on one Ray."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support import ROOT

COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("--recipe", "demo", "--data", "data", "--run-dir", "run", "--workers", "1"),
    "prepare": ("--recipe", "demo", "--data", "data", "--store", "store"),
    "phantom": ("--out", "phantoms", "--cases", "500"),
    "demo": ("--out", "demo",),
}  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)} | more


def start(command: str, place: Path, mark: str = "", **more: str) -> subprocess.Popen[str]:
    module = ["scripts.demo_story"] if command == "demo" else ["raytrain_brats", command]
    return subprocess.Popen(
        [sys.executable, "-m", *module, *COMMANDS.get(command, ())],
        env=environment(MARK=mark, **more), cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM: before that Python itself is starting."""
    (caught,) = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("SigCgt")]
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def alive(mark: str) -> list[str]:
    """Command lines of processes that were started with this mark and run still."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and f"MARK={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def left(mark: str, patience_s: float = 30) -> list[str]:
    """What of this mark runs still when it has had time to go."""
    deadline = time.monotonic() + patience_s
    while (found := alive(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


IN_TURN = """
import importlib, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
os.dup2(os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
for line in sys.stdin:
    code, failed = 0, ""
    for command, *arguments in json.loads(line):
        code, failed = importlib.import_module(f"raytrain_brats.{command}").main(arguments), command
        if code:
            break
    sys.stdout.flush(), sys.stderr.flush()
    print(json.dumps([code, failed]), file=answers, flush=True)
"""


class OneRay:
    """A process that runs commands one after the other, on a Ray that the first of them starts and all share.

    To import the libraries and to start a Ray takes more time than most commands.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.files = [folder / "stdout", folder / "stderr"]
        for file in self.files:
            file.touch()
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TURN, *map(str, self.files)],
            env=os.environ | environment | {"RAY_ADDRESS": "local"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *commands: list[str], fails: bool = False, code: int = 0, timeout_s: float = 900) -> tuple[str, str]:
        """(standard output, standard error) of these; the last exits with `code`, with `fails` 1; all others with 0."""
        pipes, before = self.process, [file.stat().st_size for file in self.files]
        assert pipes.stdin and pipes.stdout
        pipes.stdin.write(json.dumps(commands) + "\n")
        pipes.stdin.flush()
        answered = select.select([pipes.stdout], [], [], timeout_s)[0]
        ended, command = json.loads(pipes.stdout.readline() or '[null, ""]') if answered else (None, "")
        out, err = (file.read_bytes()[at:].decode() for file, at in zip(self.files, before, strict=True))
        assert ended == (code or int(fails)), f"{command} exited with {ended}\n{out[-2000:]}\n{err[-3000:]}"
        return out, err

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()  # the end of its loop
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
