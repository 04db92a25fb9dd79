"""Several machines: a second Ray node in a mount namespace of its own, so that it really sees other folders."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytrain_brats import verify
from raytrain_brats.data.phantom import write_set
from raytrain_brats.run import checkpoint, ledger

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path: Ray's sockets do not fit below pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="rb", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """Ray nodes started by the command line, each a process tree of its own, all below one folder."""

    def __init__(self, place: Path) -> None:
        self.place, self.port, self.nodes = place, free_port(), 0
        self.environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        self.add(f"--head --port={self.port} --temp-dir={place}/ray --include-dashboard=false")

    def add(self, options: str = "", before: str = "") -> None:
        """Start a node with 2 CPUs and wait until it is up; `before` is run in a mount namespace of its own."""
        options = options or f"--address=127.0.0.1:{self.port}"
        command = f"exec {RAY} start {options} --num-cpus=2 --node-ip-address=127.0.0.1 --block"
        shell = ["unshare", "--mount", "bash", "-c", f"{before} && {command}"] if before else ["bash", "-c", command]
        said = self.place / f"node{self.nodes}.log"
        self.nodes += 1
        with said.open("wb") as log:
            node = subprocess.Popen(shell, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.last = node
        deadline = time.monotonic() + 60
        while "runtime started" not in said.read_text():
            assert time.monotonic() < deadline and node.poll() is None, said.read_text()
            time.sleep(0.2)

    def call(self, *command: str) -> str:
        """What a command of this cluster's printed; it must end well."""
        environment = self.environment | {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    def kill_last_node(self) -> None:
        """SIGKILL everything of the node added last, as when the machine goes."""

        def family(pid: int) -> list[int]:
            tree = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False)
            return [pid, *(p for child in tree.stdout.split() for p in family(int(child)))]

        for pid in family(self.last.pid):
            os.kill(pid, signal.SIGKILL)

    def train(self, *arguments: object) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "raytrain_brats", "train", *map(str, arguments)]
        environment = self.environment | {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        with (self.place / "train.log").open("wb") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


@pytest.fixture
def cluster(place: Path) -> Iterator[Cluster]:
    try:
        yield Cluster(place)
    finally:
        subprocess.run(["pkill", "-KILL", "-f", str(place)], check=False)  # every process of this Ray names its folder


SMALL = ["--set=preprocess.spacing_mm=7.5", "--set=data.patch_xyz=[16, 16, 16]"]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a mount namespace needs root")
def test_a_run_folder_that_another_node_does_not_see_is_refused(cluster: Cluster, place: Path) -> None:
    """`train` on two machines with a folder of the first one's own: exit 2, the folder and the remedy named."""
    hidden, data = place / "run", place / "data"
    hidden.mkdir()
    write_set(str(data), cases=6, seed=0, grid=32, anatomy="procedural")
    cluster.add(before=f"mount -t tmpfs none {hidden}")
    code = cluster.train("--data", data, "--run-dir", hidden, *SMALL).wait(120)

    said = (place / "train.log").read_text()
    assert code == 2, said[-2000:]
    assert said.startswith(f"error: run folder {hidden} is not seen by node")
    assert "s3://" in said


class ElasticRun:
    """A run that has one worker on the first node and wants two."""

    def __init__(self, cluster: Cluster) -> None:
        self.folder, data = cluster.place / "run", cluster.place / "data"
        write_set(str(data), cases=6, seed=0, grid=32, anatomy="procedural")
        options = ["train.epochs=400", "checkpoint.every_samples=100000", "validate.every_samples=100000"]
        options += ["run.cpus_per_worker=1.5", "run.cpus_per_task=0.5", "run.resize_check_s=2"]
        sets = [f"--set={option}" for option in options]
        self.driver = cluster.train("--data", data, "--run-dir", self.folder, "--workers", "1:2", *SMALL, *sets)
        self.said = cluster.place / "train.log"

    def rows_until(self, world_size: int, generation: int) -> None:
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline:
            rows = ledger.read_rows(str(self.folder))
            if rows and (rows[-1]["world_size"], rows[-1]["generation"]) == (world_size, generation) and len(rows) > 20:
                return
            assert self.driver.poll() is None, self.said.read_text()[-2000:]
            time.sleep(0.2)
        pytest.fail(f"no rows of {world_size} workers; {self.events()[-5:]}")

    def interrupt(self) -> None:
        self.driver.send_signal(signal.SIGINT)
        assert self.driver.wait(60) == 130
        assert "goes on from the newest checkpoint" in self.said.read_text()

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        return [e for e in ledger.read_events(str(self.folder)) if not kind or e["event"] == kind]


def test_a_node_that_joins_is_used_and_no_step_is_lost(cluster: Cluster) -> None:
    """The run begins with the one worker that fits, saves before it grows, and goes on with two from that very step."""
    run = ElasticRun(cluster)
    run.rows_until(1, generation=1)
    cluster.add()
    run.rows_until(2, generation=2)
    run.interrupt()

    rows = ledger.read_rows(str(run.folder))
    assert [row["world_size"] for row in rows] == sorted(row["world_size"] for row in rows)
    assert run.events("resize")[0]["saved"]
    assert [e["redone_steps"] for e in run.events("group")] == [0, 0]
    # Ctrl-C saved as well: what is on record is what the next start goes on from
    assert checkpoint.newest_valid(str(run.folder))[0].samples_seen == rows[-1]["samples_seen"]
    assert verify.main(["--run-dir", str(run.folder)]) == 0


@pytest.mark.campaign
def test_a_node_that_is_drained_leaves_a_checkpoint_behind(cluster: Cluster) -> None:
    """On a preemption notice the group saves at once; the node dies, and the run goes on with one worker."""
    run = ElasticRun(cluster)
    run.rows_until(1, generation=1)
    cluster.add()
    run.rows_until(2, generation=2)
    code = "import ray; ray.init(log_to_driver=False); print(*[n['NodeID'] for n in ray.nodes() if n['Alive'] and "
    code += "'node:__internal_head__' not in n['Resources']])"
    listed = cluster.call(sys.executable, "-c", code)
    notice = ["--node-id", listed.split()[-1], "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    address = f"127.0.0.1:{cluster.port}"
    cluster.call(RAY, "drain-node", "--address", address, *notice, "--deadline-remaining-seconds", "20")
    deadline = time.monotonic() + 60
    while not run.events("preemption"):
        assert time.monotonic() < deadline, run.events()[-5:]
        time.sleep(0.2)
    assert run.events("preemption")[0]["saved"]
    time.sleep(15)
    cluster.kill_last_node()
    run.rows_until(1, generation=3)
    run.interrupt()
    assert verify.main(["--run-dir", str(run.folder)]) == 0
