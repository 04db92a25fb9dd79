"""Workers' process group: a collective operation for which a rank never comes ends."""

import socket
import subprocess
import sys

from raytrain_brats.ray_ext import process_group
from raytrain_brats.run import hang_detector
from tests.support.commands import environment

RANK = """
import sys, time, torch
from ray.train.torch import config
from raytrain_brats.ray_ext.internals import train
config._set_torch_distributed_env_vars = lambda: None  # what it sets is of Ray's worker group
port, rank, timeout_s = map(int, sys.argv[1:])
train.join("127.0.0.1", port, "gloo", rank, 2, timeout_s)
print("joined", flush=True)
if rank == 1:
    time.sleep(300)
began = time.monotonic()
try:
    torch.distributed.all_reduce(torch.ones(1))
except RuntimeError as error:
    print("ended", time.monotonic() - began, flush=True)
"""


def test_a_collective_that_hangs_ends() -> None:
    """Two real processes; one sleeps where the other waits for it, which then fails after the group's timeout."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(port), str(rank), "4"],
            env=environment(), stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said, _ = ranks[0].communicate(timeout=120)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert said.startswith("joined\nended ") and 3 < float(said.split()[2]) < 30


def test_the_hang_detector_comes_first() -> None:
    """It names the rank at fault; a timeout blames all. And a group that hangs without a driver ends too."""
    assert max(hang_detector.PATIENCE_S.values()) < process_group.TIMEOUT_S < 1800
