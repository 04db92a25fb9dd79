"""A real Ray cluster on this machine and an elastic run on it: for tests and for `scripts/chaos ray`.

In: a folder, settings of the run.
Out: nodes and drivers that can be watched, struck and started again; each is started here, and killed by its own id.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.core.generated import autoscaler_pb2
from ray.core.generated.autoscaler_pb2 import NodeStatus  # type: ignore[attr-defined]
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind  # type: ignore[attr-defined]

from raytrain_brats import books, storage
from raytrain_brats.run import control
from raytrain_brats.synthetic.phantom import write_set

RAY = str(Path(sys.executable).with_name("ray"))
SMALL = ["preprocess.spacing_mm=7.5", "data.patch_xyz=[16, 16, 16]"]
# For `ray start` on spot machines: a killed node is noticed in some 5 s, idle processes stay for the next group.
NOTICES = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_num_workers_soft_limit": "16",
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

    def __init__(self, place: Path, head: str = "--num-cpus=2", **environment: str) -> None:
        self.place, self._head, self._number = place, head, 0
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        """Those beside the head."""
        common = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAYTRAIN_CHAOS": str(place)}
        common |= {"RAY_worker_niceness": "0"}  # else any other program on the machine comes before a worker
        self.environment = os.environ | common | NOTICES | environment
        self.start_head()

    def start_head(self) -> None:
        self.port, folder = free_port(), f"{self.place}/ray{self._number}"
        self._start(f"--head --port={self.port} --temp-dir={folder} --include-dashboard=false {self._head}")

    def add(self, before: str = "", options: str = "--num-cpus=2") -> str:
        """Start a node, wait until it is up; its name. `before` is run in a mount namespace of its own."""
        name, node = self._start(f"--address=127.0.0.1:{self.port} {options}", before)
        self.nodes[name] = node
        return name

    def _start(self, options: str, before: str = "") -> tuple[str, "subprocess.Popen[bytes]"]:
        for _ in range(10):  # on a busy machine a node gives up after 30 s, or when its own helpers take 15 s to start
            name = f"node{self._number}"
            self._number += 1
            command = f"exec {RAY} start {options} --node-ip-address=127.0.0.1 --node-name={name} --block"
            apart = ["unshare", "--mount"] if before else []
            shell = [*apart, "bash", "-c", f"{before or 'true'} && {command}"]
            said = self.place / f"{name}.log"
            with said.open("wb") as log:
                node = subprocess.Popen(shell, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            while "runtime started" not in said.read_text() and node.poll() is None:
                time.sleep(0.2)
            if node.poll() is None:
                return name, node
        raise AssertionError(said.read_text())

    def drain(self, name: str, within_s: float) -> None:
        """A preemption notice for a node, as the watcher of a spot machine gives it."""
        gcs = GcsClient(address=f"127.0.0.1:{self.port}")
        (node,) = [key for key, about in gcs.get_all_node_info().items() if about.node_name == name and not about.state]
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
        gcs.drain_node(node.hex(), reason, "spot", int(1000 * (time.time() + within_s)))

    def kill_node(self, name: str, only_raylet: bool = False) -> None:
        """SIGKILL everything of a node, as when the machine goes; or its raylet first, and the rest 3 s later."""
        pids = family(self.nodes.pop(name).pid)
        if only_raylet:
            kill([pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == "raylet"])
            time.sleep(3)
        kill(pids)

    def close(self) -> None:
        self.nodes.clear()
        kill([pid for pid, _ in ours(self.place)])

    def where(self, command: str) -> set[str]:
        """Names of the nodes beside the head that have a process whose command line holds this."""
        trees = {name: set(family(node.pid)) for name, node in self.nodes.items()}
        found = [pid for pid, line in ours(self.place) if command in line]
        return {name for name, tree in trees.items() for pid in found if pid in tree}

    def would_launch(self, kinds: dict[str, Any]) -> dict[str, int]:
        """{kind: number} of nodes that Ray's autoscaler would start just now, had it these to start.

        `kinds` is the `available_node_types` of a cluster's YAML; a node that is up is of the kind that its role names.
        """
        state = get_cluster_resource_state(GcsClient(address=f"127.0.0.1:{self.port}"))
        there = [
            AutoscalerInstance(
                cloud_instance_id=node.node_id.hex(),
                ray_node=node,
                im_instance=Instance(
                    instance_id=node.node_id.hex(),
                    node_id=node.node_id.hex(),
                    instance_type=node.labels["role"],
                    status=Instance.RAY_RUNNING,
                    node_kind=NodeKind.HEAD if node.labels["role"] == "head" else NodeKind.WORKER,
                ),
            )
            for node in state.node_states
            if node.status != NodeStatus.DEAD
        ]
        asked = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs={
                name: NodeTypeConfig(name, 0, kind["max_workers"], resources=kind["resources"], labels=kind["labels"])
                for name, kind in kinds.items()
            },
            resource_requests=list(state.pending_resource_requests),
            gang_resource_requests=list(state.pending_gang_resource_requests),
            cluster_resource_constraints=list(state.cluster_resource_constraints),
            current_instances=there,
        )
        return {launch.instance_type: launch.count for launch in ResourceDemandScheduler().schedule(asked).to_launch}

    def train(self, *arguments: object) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "raytrain_brats", "train", *map(str, arguments)]
        environment = self.environment | {"RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        with (self.place / "train.log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


class ElasticRun:
    """A run of one or two workers that lasts until it is stopped."""

    def __init__(self, cluster: Cluster, workers: str = "1:2", *settings: str, root: str = "") -> None:
        self.cluster, cases = cluster, cluster.place / "data"
        write_set(str(cases), cases=6, seed=0, grid=32, anatomy="procedural")
        for path in cases.rglob("*.*") if root else ():
            storage.write_bytes(f"{root}/data/{path.relative_to(cases)}", path.read_bytes())
        root = root or str(cluster.place)
        self.folder, self.data = f"{root}/run", f"{root}/data"
        self.said = cluster.place / "train.log"
        options = ["train.epochs=4000", "checkpoint.every_samples=400", "validate.every_samples=10000000"]
        options += ["run.cpus_per_worker=1.5", "run.cpus_per_task=0.5", "run.resize_check_s=2"]
        self.options = [*SMALL, f"run.workers={workers}", *options, *settings]
        self.start()

    def start(self) -> None:
        sets = [f"--set={option}" for option in self.options]
        self.driver = self.cluster.train("--data", self.data, "--run-dir", self.folder, *sets)

    def generation(self) -> int:
        now = control.current(self.folder)
        return now.number if now else 0

    def rows_until(self, world_size: int | None, after: int, rows: int = 20, timeout_s: float = 300) -> dict[str, Any]:
        """Wait for so many rows of one worker group later than `after` (and of that size); the first of them."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            recent = [r for r in books.recent(self.folder)[0] if r["generation"] > after]
            for found in (recent, [r for r in recent if r["generation"] == recent[-1]["generation"]]):
                wanted = [r for r in found if world_size in (None, r["world_size"])]
                if len(wanted) >= rows:
                    return wanted[0]
            assert self.driver.poll() is None, self.said.read_text()[-2000:]
            time.sleep(0.1)
        raise AssertionError(f"no rows of {world_size} workers; {self.events()[-5:]}")

    def interrupt(self, with_signal: int = signal.SIGINT) -> None:
        self.driver.send_signal(with_signal)
        try:
            assert self.driver.wait(120) == 130
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still there: {self.said.read_text()[-3000:]}\n{self.events()[-8:]}") from error
        assert "goes on from the newest checkpoint" in self.said.read_text()

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        return [e for e in books.read_events(self.folder) if not kind or e["event"] == kind]

    def workers(self) -> list[int]:
        """Process ids of the ranks of the newest group that came to life, by rank."""
        told = self.events("worker")
        return [e["pid"] for e in sorted(told, key=lambda e: e["rank"]) if e["generation"] == told[-1]["generation"]]
