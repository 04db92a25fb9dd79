"""A real Ray cluster on this machine, a run on it, and ways to hurt both: for tests and for `scripts/recovery`.

Every process is started here, and killed by its own id.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raytrain_brats.data.phantom import write_set
from raytrain_brats.run import ledger

RAY = str(Path(sys.executable).with_name("ray"))
SMALL = ["--set=preprocess.spacing_mm=7.5", "--set=data.patch_xyz=[16, 16, 16]"]
# A killed node is noticed in some 5 s: for `ray start --head` on spot machines.
NOTICES = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def family(pid: int) -> list[int]:
    """A process and all below it."""
    tree = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False)
    return [pid, *(p for child in tree.stdout.split() for p in family(int(child)))]


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def ours(place: Path) -> Iterator[tuple[int, str]]:
    """(pid, command line) of every process of the cluster below `place`: Ray's name its folder or inherit it."""
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"RAYTRAIN_CHAOS={place}".encode() in (folder / "environ").read_bytes():
                yield int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue


class Cluster:
    """Ray nodes started by the command line, each a process tree of its own, all below one folder."""

    def __init__(self, place: Path, **environment: str) -> None:
        self.place, self.port, self.nodes = place, free_port(), 0
        common = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAYTRAIN_CHAOS": str(place)}
        self.environment = os.environ | common | NOTICES | environment
        self.add(f"--head --port={self.port} --temp-dir={place}/ray --include-dashboard=false")

    def add(self, options: str = "", before: str = "") -> None:
        """Start a node with 2 CPUs and wait until it is up; `before` is run in a mount namespace of its own."""
        options = options or f"--address=127.0.0.1:{self.port}"
        command = f"exec {RAY} start {options} --num-cpus=2 --node-ip-address=127.0.0.1 --block"
        shell = ["unshare", "--mount", "bash", "-c", f"{before} && {command}"] if before else ["bash", "-c", command]
        for _ in range(3):  # on a busy machine a node gives up when its own helpers take 15 s to start
            said = self.place / f"node{self.nodes}.log"
            self.nodes += 1
            with said.open("wb") as log:
                node = subprocess.Popen(shell, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            while "runtime started" not in said.read_text() and node.poll() is None:
                time.sleep(0.2)
            if node.poll() is None:
                self.last = node
                return
        raise AssertionError(said.read_text())

    def call(self, *command: str) -> str:
        """What a command of this cluster's printed; it must end well."""
        environment = self.environment | {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    def kill_last_node(self) -> None:
        """SIGKILL everything of the node added last, as when the machine goes."""
        kill(family(self.last.pid))

    def close(self) -> None:
        kill([pid for pid, _ in ours(self.place)])

    def train(self, *arguments: object) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "raytrain_brats", "train", *map(str, arguments)]
        environment = self.environment | {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        with (self.place / "train.log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


class ElasticRun:
    """A run of one or two workers that lasts until it is stopped."""

    def __init__(self, cluster: Cluster, workers: str = "1:2", *settings: str) -> None:
        self.cluster, self.workers, self.settings = cluster, workers, settings
        self.folder, self.data = cluster.place / "run", cluster.place / "data"
        write_set(str(self.data), cases=6, seed=0, grid=32, anatomy="procedural")
        self.said = cluster.place / "train.log"
        self.start()

    def start(self) -> None:
        options = ["train.epochs=4000", "checkpoint.every_samples=400", "validate.every_samples=10000000"]
        options += ["run.cpus_per_worker=1.5", "run.cpus_per_task=0.5", "run.resize_check_s=2", *self.settings]
        sets = [f"--set={option}" for option in options]
        places = ("--data", self.data, "--run-dir", self.folder, "--workers", self.workers)
        self.driver = self.cluster.train(*places, *SMALL, *sets)

    def generation(self) -> int:
        now = ledger.current(str(self.folder))
        return now.number if now else 0

    def rows_until(self, world_size: int, after: int, rows: int = 20, timeout_s: float = 300) -> dict[str, Any]:
        """Wait for so many rows of a worker group later than `after`; the first of them."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            recent = ledger.recent(str(self.folder))[0]
            found = [r for r in recent if r["generation"] > after and r["world_size"] == world_size]
            if len(found) >= rows:
                return found[0]
            assert self.driver.poll() is None, self.said.read_text()[-2000:]
            time.sleep(0.1)
        raise AssertionError(f"no rows of {world_size} workers; {self.events()[-5:]}")

    def interrupt(self) -> None:
        self.driver.send_signal(signal.SIGINT)
        assert self.driver.wait(60) == 130
        assert "goes on from the newest checkpoint" in self.said.read_text()

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        return [e for e in ledger.read_events(str(self.folder)) if not kind or e["event"] == kind]


def kill_worker(run: ElasticRun, dice: random.Random) -> float:
    """SIGKILL a random rank of the running group; when."""
    now = run.generation()
    kill([dice.choice([e["pid"] for e in run.events("worker") if e["generation"] == now])])
    return time.time()


def lose_node(run: ElasticRun, dice: random.Random) -> float:
    """SIGKILL the node added last, all its processes at once; when."""
    run.cluster.kill_last_node()
    return time.time()


def add_node(run: ElasticRun, dice: random.Random) -> float:
    """A node joins; when the controller decided to use it (the resize event less what saving took)."""
    before = len(run.events("resize"))
    run.cluster.add()
    while len(found := run.events("resize")) == before:
        time.sleep(0.1)
    return float(found[-1]["time"] - found[-1]["seconds"])


def kill_driver(run: ElasticRun, dice: random.Random) -> float:
    """SIGKILL the driver and start the same command again; when it was started."""
    run.driver.kill()
    run.driver.wait()
    began = time.time()
    run.start()
    return began


def kill_controller(run: ElasticRun, dice: random.Random) -> float:
    """SIGKILL the process of Ray Train's controller; the driver may give up, then it is started again."""
    kill([pid for pid, name in ours(run.cluster.place) if "ray::TrainController" in name])
    began = time.time()
    try:
        run.driver.wait(30)
        run.start()
    except subprocess.TimeoutExpired:
        pass
    return began


KILLS: dict[str, tuple[Callable[[ElasticRun, random.Random], float], int]] = {
    "worker": (kill_worker, 0),
    "node": (lose_node, -1),
    "resize": (add_node, 1),
    "driver": (kill_driver, 0),
    "controller": (kill_controller, 0),
}
"""{kind: (what is done, how the number of workers changes)}"""
