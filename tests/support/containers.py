"""SageMaker's part around the containers of a job, on this machine: runs a Create{Training,Processing}Job request.

In: a request, as `sagemaker launch` or `process` sends it; S3 at an endpoint that the containers reach; root.
Out: the job's status, the containers' exit codes, logs and failure files; what they left on S3.

Every instance is one "container": namespaces of its own (`boot_container.sh`), an address on a bridge, a name that the
others know, /opt/ml with the service's JSON files, the image's entry as PID 1. /opt/ml/checkpoints is restored at the
start and copied to S3 all along; /opt/ml/model at the end. SIGTERM is followed by SIGKILL after the grace time.

Assumed, not known: that one failed container ends the job (here after `FAILED_S`), and that a container sees no other
files and variables than these.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import boto3

from tests.support import ROOT

NETWORK = "10.97.0."
GRACE_S, FAILED_S = 120.0, 30.0


@lru_cache
def missing() -> str:
    """Why containers cannot be made here; empty when they can."""
    if os.geteuid() != 0:
        return "namespaces and bridges need root"
    lacking = [tool for tool in ("ip", "unshare", "chroot") if not shutil.which(tool)]
    if not (Path(sys.executable).parent / "dumb-init").exists():
        lacking.append("dumb-init (pip install -e .[dev])")
    if lacking:
        return f"{', '.join(lacking)} not found"
    tried = subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def _sh(*arguments: str, check: bool = True) -> None:
    subprocess.run(arguments, check=check, capture_output=True)


class Network:
    """A bridge with the address NETWORK1, for the time of a `with` block."""

    def __enter__(self) -> "Network":
        self.name = f"brsm{os.getpid() % 100_000}"
        self._joined = 0
        _sh("ip", "link", "add", self.name, "type", "bridge")
        _sh("ip", "addr", "add", f"{NETWORK}1/24", "dev", self.name)
        _sh("ip", "link", "set", self.name, "up")
        return self

    def __exit__(self, *_: Any) -> None:
        _sh("ip", "link", "del", self.name, check=False)

    def join(self, space: str, number: int) -> None:
        """A network namespace with the address NETWORK<10 + number>."""
        self._joined += 1  # the kernel takes its time to remove those of an attempt before
        outside, inside = f"{self.name}o{self._joined}", f"{self.name}i{self._joined}"
        _sh("ip", "netns", "add", space)
        _sh("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
        _sh("ip", "link", "set", outside, "master", self.name, "up")
        _sh("ip", "link", "set", inside, "netns", space)
        within = ("ip", "-n", space)
        _sh(*within, "link", "set", "lo", "up")
        _sh(*within, "link", "set", inside, "name", "eth0")
        _sh(*within, "addr", "add", f"{NETWORK}{10 + number}/24", "dev", "eth0")
        _sh(*within, "link", "set", "eth0", "up")


class Job:
    """One attempt at a request. `absent` hosts never come up."""

    def __init__(
        self, request: dict[str, Any], folder: Path, network: Network, endpoint: str, absent: tuple[str, ...] = ()
    ) -> None:
        self._processing = "ProcessingJobName" in request
        if self._processing:
            resources = request["ProcessingResources"]["ClusterConfig"]
            request = request | {"TrainingJobName": request["ProcessingJobName"], "ResourceConfig": resources}
        self._request, self._folder, self._copied = request, folder, dict[Path, tuple[int, int]]()
        self._s3 = boto3.client("s3")
        self._spaces: list[str] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        resources, groups, number = request["ResourceConfig"], [], 0
        alone = [{"InstanceGroupName": "homogeneousCluster"} | resources]
        for group in resources.get("InstanceGroups", alone):
            hosts = [f"algo-{number + 1 + at}" for at in range(group["InstanceCount"])]
            number += len(hosts)
            names = {"instance_group_name": group["InstanceGroupName"], "instance_type": group["InstanceType"]}
            groups.append(names | {"hosts": hosts})
        self.hosts = [host for group in groups for host in group["hosts"]]
        for host in self.hosts:
            self._lay_out(host, groups, endpoint)
        for at, host in enumerate(self.hosts):
            if host not in absent:
                self._start(host, at, network)

    def _lay_out(self, host: str, groups: list[dict[str, Any]], endpoint: str) -> None:
        request, folder = self._request, self._folder / host
        config = folder / ("ml/config" if self._processing else "ml/input/config")
        parts = ["output"] if self._processing else ["input/data", "output/data", "model", "checkpoints"]
        for path in (config, *(folder / "ml" / part for part in parts)):
            path.mkdir(parents=True)
        mine = next(group for group in groups if host in group["hosts"])
        about = {
            "current_host": host,
            "current_instance_type": mine["instance_type"],
            "current_group_name": mine["instance_group_name"],
            "hosts": self.hosts,
            "instance_groups": groups,
            "network_interface_name": "eth0",
        }
        (config / "resourceconfig.json").write_text(json.dumps(about))
        if not self._processing:
            (config / "hyperparameters.json").write_text(json.dumps(request.get("HyperParameters", {})))
            self._download(request["CheckpointConfig"]["S3Uri"], folder / "ml/checkpoints")
        for channel in request.get("InputDataConfig", []):
            source = channel["DataSource"]["S3DataSource"]
            if mine["instance_group_name"] in source.get("InstanceGroupNames", [mine["instance_group_name"]]):
                self._download(source["S3Uri"], folder / "ml/input/data" / channel["ChannelName"])
        names = "".join(f"{NETWORK}{10 + at} {name}\n" for at, name in enumerate(self.hosts))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),  # the image has the package installed
            "TRAINING_JOB_NAME": request["TrainingJobName"],
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "role",
            "AWS_SECRET_ACCESS_KEY": "role",
            "AWS_ENDPOINT_URL": endpoint,
        } | request.get("Environment", {})
        (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in environment.items()))

    def _start(self, host: str, at: int, network: Network) -> None:
        folder, space = self._folder / host, f"{network.name}-{self._folder.name}-{host}"
        network.join(space, at)
        self._spaces.append(space)
        isolated = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        boot = [str(Path(__file__).parent / "boot_container.sh"), str(folder), host, "512m"]
        with open(folder / "log", "wb") as log:
            self.processes[host] = subprocess.Popen(
                ["ip", "netns", "exec", space, *isolated, *boot, *_entry(self._request)],
                env=os.environ | {"RIG_BIND": f"{sys.prefix}:{ROOT}"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ask(self, host: str, url: str, token: str = "") -> str:
        """HTTP status that a request from within a container gets; 000 where nobody answers."""
        space = self._spaces[self.hosts.index(host)]
        header = ["-H", f"Authorization: Bearer {token}"] if token else []
        asked = ["curl", "-s", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", *header, url]
        return subprocess.run(["ip", "netns", "exec", space, *asked], capture_output=True, text=True).stdout

    def log(self, host: str) -> str:
        return (self._folder / host / "log").read_text(errors="replace")

    def failure(self, host: str) -> str:
        path = self._folder / host / "ml/output" / ("message" if self._processing else "failure")
        return path.read_text() if path.exists() else ""

    def sigterm(self) -> None:
        """What the service does on `stop` and before spot capacity goes: PID 1 of every container is asked to end."""
        for process in self.processes.values():
            with suppress(OSError, ValueError, IndexError):
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(int(children[0]), signal.SIGTERM)

    def wait(self, timeout_s: float, stopping: bool = False) -> tuple[str, dict[str, int]]:
        """(status, exit codes); copies checkpoints until the end, the model after it."""
        began, failed = time.monotonic(), 0.0
        limit_s = GRACE_S if stopping else timeout_s
        while any(process.poll() is None for process in self.processes.values()):
            self._copy()
            now = time.monotonic()
            bad = [host for host, process in self.processes.items() if process.poll() not in (None, 0)]
            failed = failed or (now if bad else 0.0)
            if now - began > limit_s or (failed and not stopping and now - failed > FAILED_S):
                for process in self.processes.values():
                    process.kill()
            time.sleep(0.5)
        self._copy()
        if not self._processing:
            output = f"{self._request['OutputDataConfig']['S3OutputPath']}/{self._request['TrainingJobName']}/output"
            for host in self.hosts:
                self._upload(self._folder / host / "ml/model", f"{output}/model")
        codes = {host: process.wait() for host, process in self.processes.items()}
        return ("Stopped" if stopping else "Failed" if any(codes.values()) else "Completed"), codes

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        for space in self._spaces:
            _sh("ip", "netns", "del", space, check=False)

    def _copy(self) -> None:
        for host in [] if self._processing else self.hosts:
            self._upload(self._folder / host / "ml/checkpoints", self._request["CheckpointConfig"]["S3Uri"])

    def _upload(self, folder: Path, uri: str) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        for path in (path for path in folder.rglob("*") if path.is_file()):
            with suppress(OSError):
                about = path.stat().st_mtime_ns, path.stat().st_size
                if self._copied.get(path) != about:
                    self._s3.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}")
                    self._copied[path] = about

    def _download(self, uri: str, folder: Path) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        for there in (there for page in pages for there in page.get("Contents", [])):
            path = folder / there["Key"].removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._s3.download_file(bucket, there["Key"], str(path))


def _entry(request: dict[str, Any]) -> list[str]:
    """The image's ENTRYPOINT, with the argument that SageMaker gives; or what the request asks for instead."""
    specification = request.get("AlgorithmSpecification") or request["AppSpecification"]
    if "ContainerEntrypoint" in specification:
        return [*specification["ContainerEntrypoint"], *specification.get("ContainerArguments", [])]
    dockerfile = (ROOT / "cluster/sagemaker/Dockerfile").read_text()
    found = re.search(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)
    assert found
    return [*json.loads(found[1]), *specification.get("ContainerArguments", ["train"])]
