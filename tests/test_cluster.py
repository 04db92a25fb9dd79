"""Several machines: a second Ray node in a mount namespace of its own, so that it really sees other folders."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytrain_brats.data.phantom import write_set

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


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a mount namespace needs root")
def test_a_run_folder_that_another_node_does_not_see_is_refused(place: Path) -> None:
    """`train` on two machines with a folder of the first one's own: exit 2, the folder and the remedy named."""
    hidden, data = place / "run", place / "data"
    hidden.mkdir()
    write_set(str(data), cases=6, seed=0, grid=32, anatomy="procedural")
    port = free_port()
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    common = ["--num-cpus=2", "--node-ip-address=127.0.0.1", "--block"]
    head = [RAY, "start", "--head", f"--port={port}", f"--temp-dir={place}/ray", "--include-dashboard=false", *common]
    other = f"mount -t tmpfs none {hidden} && exec {RAY} start --address=127.0.0.1:{port} {' '.join(common)}"
    nodes = []
    try:
        for command in (head, ["unshare", "--mount", "bash", "-c", other]):
            with open(place / f"node{len(nodes)}.log", "wb") as log:
                nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
            deadline = time.monotonic() + 60
            while "runtime started" not in (place / f"node{len(nodes) - 1}.log").read_text():
                assert time.monotonic() < deadline and nodes[-1].poll() is None
                time.sleep(0.2)
        train = [sys.executable, "-m", "raytrain_brats", "train", "--data", str(data), "--run-dir", str(hidden)]
        train += ["--set", "preprocess.spacing_mm=7.5", "--set", "data.patch_xyz=[16, 16, 16]"]
        address = {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        done = subprocess.run(
            train, env=environment | address, capture_output=True, text=True, timeout=120, check=False
        )
    finally:
        subprocess.run(["pkill", "-KILL", "-f", str(place)], check=False)  # every process of this Ray names its folder
        for node in nodes:
            node.kill()
            node.wait(30)

    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith(f"error: run folder {hidden} is not seen by node")
    assert "s3://" in done.stderr
