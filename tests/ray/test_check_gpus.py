"""The first job on a new cluster: what it finds out about a card. The job itself runs in the EC2 rig."""

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import ray
import torch

from raytrain_brats import check_gpus


def test_a_convolution_that_is_right_is_timed() -> None:
    assert check_gpus.convolve(torch.device("cpu"), 16) > 0


@pytest.mark.parametrize("part", ["result", "gradient"])
def test_a_convolution_that_is_wrong_is_told(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by a tenth in one place, as a broken kernel of cuDNN: the card and what is off are named."""
    asked, right = [0], check_gpus.results

    def sometimes_wrong(layer: Any, image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made, gradient = right(layer, image)
        asked[0] += 1
        if asked[0] == 2:  # the card's; the first is the CPU's
            wrong = made if part == "result" else gradient
            wrong.view(-1)[0] += 0.1 * wrong.abs().max()
        return made, gradient

    monkeypatch.setattr(check_gpus, "results", sometimes_wrong)
    with pytest.raises(RuntimeError, match=f"CPU: the {part} of a 3D convolution is off by 10"):
        check_gpus.convolve(torch.device("cpu"), 16)


def test_each_worker_is_told_once() -> None:
    """A line for each rank and one for the sums; nothing of Ray's beside them."""
    try:
        head = ray.init(address="local", num_cpus=3, include_dashboard=False).address_info["gcs_address"]
        command = [sys.executable, "-m", "raytrain_brats.check_gpus", "--cpu", "--workers", "2", "--rounds", "2"]
        done = subprocess.run(command, env=os.environ | {"RAY_ADDRESS": head}, capture_output=True, text=True)
    finally:
        ray.shutdown()
    assert done.returncode == 0, done.stderr
    found = [re.match(r"rank \d|all-reduce of 256 MiB over 2", line) for line in done.stdout.splitlines()]
    assert sorted(line[0] if line else "" for line in found) == ["all-reduce of 256 MiB over 2", "rank 0", "rank 1"]
