"""The first job on a new cluster: what it finds out about a card. The job itself runs in the EC2 rig."""

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import ray
import torch

from raytrain_brats.learn import convolution_check
from raytrain_brats.learn.convolution_check import PARTS, Card, Measured

CPU = torch.device("cpu")
CARDS = {
    "V100": Card("Tesla V100", (7, 0), ("sm_70", "sm_80"), "2.8.0+cu126", 91002),
    "A100": Card("A100", (8, 0), ("sm_80", "sm_90"), "2.13.0+cu130", 92000),
    "A100, old cuDNN": Card("A100", (8, 0), ("sm_80", "sm_90"), "2.9.1+cu128", 91002),
}
RIGHT = dict.fromkeys(PARTS, 0.004)
FLOAT32 = Measured("float32", 20.0, 540_000_000, RIGHT)
SOUND = [FLOAT32, Measured("bf16", 6.0, 800_000_000, RIGHT), Measured("fp16", 6.0, 800_000_000, RIGHT)]


def test_a_convolution_is_measured() -> None:
    """On a CPU, float32 against float64, really: all parts right, and timed. No GPU has run this yet."""
    card = convolution_check.card_of(CPU)
    measured = convolution_check.measure(CPU, 8, convolution_check.precisions(card))
    assert [one.precision for one in measured] == ["float64", "float32"]
    assert all(one.milliseconds > 0 and tuple(one.off) == PARTS for one in measured)
    assert all(share < 1e-4 for one in measured for share in one.off.values())
    assert convolution_check.findings(card, measured) == [] and convolution_check.not_built(card) == ""


@pytest.mark.parametrize("call", range(2))
@pytest.mark.parametrize("part", range(3))
def test_a_convolution_that_is_wrong_is_told(part: int, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by a tenth in one place, as a broken kernel of cuDNN, of the small layer or of the large one."""
    right, asked = convolution_check._Layer.run, [0]

    def wrong_in_float32(self: Any, dtype: torch.dtype) -> Any:
        made = right(self, dtype)
        if dtype is torch.float32:
            if asked[0] == call:
                made[part].view(-1)[0] += 0.1 * made[part].abs().max()
            asked[0] += 1
        return made

    monkeypatch.setattr(convolution_check._Layer, "run", wrong_in_float32)
    card = convolution_check.card_of(CPU)
    (line,) = convolution_check.findings(card, convolution_check.measure(CPU, 8, (torch.float64, torch.float32)))
    assert re.search(f"CPU, torch .*: a 3D convolution in float32 is wrong: {PARTS[part]} off by (9|10|11)", line)
    assert "\n" not in line and "try another build of torch" in line


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_sound_numbers_are_no_finding(card: Card) -> None:
    """Half precision takes less time; somewhat more memory, for other layouts, is usual."""
    assert convolution_check.findings(card, SOUND) == [] and convolution_check.not_built(card) == ""


@pytest.mark.parametrize(
    ("card", "remedy"),
    [("V100", "torch 2.8.0 of the index for CUDA 12.6"), ("A100, old cuDNN", "cuDNN 9.15"), ("A100", "another build")],
)
@pytest.mark.parametrize("slow", [(30.0, 800_000_000), (6.0, 3_900_000_000), (80.0, 3_900_000_000)])
def test_half_precision_without_cudnn_is_told(card: str, remedy: str, slow: tuple[float, int]) -> None:
    """By its time or its memory; one line with the card, its torch and cuDNN, and which torch to install."""
    measured = [*SOUND[:2], Measured("fp16", *slow, RIGHT)]
    (line,) = convolution_check.findings(CARDS[card], measured)
    assert "in fp16 is not cuDNN's" in line and remedy in line and str(CARDS[card]) in line and "\n" not in line


def test_a_result_that_is_no_number_is_wrong() -> None:
    """NaN compares with nothing: it must not pass."""
    nan = convolution_check._off(torch.ones(2), torch.tensor([1.0, float("nan")]))
    measured = [FLOAT32, Measured("fp16", 6.0, 1, RIGHT | {"result": nan})]
    (line,) = convolution_check.findings(CARDS["V100"], measured)
    assert "in fp16 is wrong: result off by" in line


def test_a_torch_without_code_for_the_card_is_told() -> None:
    """V100 with PyPI's torch; what was built for an older card of the same generation runs."""
    card = Card("Tesla V100", (7, 0), ("sm_75", "sm_80", "sm_90"), "2.13.0+cu130", 92000)
    line = convolution_check.not_built(card)
    assert "built for sm_75, sm_80, sm_90 only; install torch 2.8.0 of the index for CUDA 12.6" in line
    assert convolution_check.not_built(Card("A10G", (8, 6), ("sm_80", "sm_90"), "2.13.0+cu130", 92000)) == ""
    assert convolution_check.precisions(card) == (torch.float32, torch.float16)


RUN = """
import sys
from raytrain_brats import check_gpus
from raytrain_brats.learn import convolution_check
if sys.argv.pop(1) == "wrong":
    def check(settings):  # in the workers; this function travels by value
        convolution_check.TOLERANCE = 0.0
        right(settings)
    right, check_gpus.check = check_gpus.check, check
sys.exit(check_gpus.main())
"""


@pytest.mark.campaign
@pytest.mark.parametrize("how", ["right", "wrong"])
def test_each_worker_is_told_once(how: str) -> None:
    """A line for each rank and one for the sums; nothing of Ray's beside them. What is wrong has a line of its own, and
    the exit code says so; the network is measured all the same."""
    try:
        head = ray.init(address="local", num_cpus=3, include_dashboard=False).address_info["gcs_address"]
        command = [sys.executable, "-c", RUN, how, "--cpu", "--workers", "2", "--rounds", "2", "--edge", "12"]
        done = subprocess.run(command, env=os.environ | {"RAY_ADDRESS": head}, capture_output=True, text=True)
    finally:
        ray.shutdown()
    assert done.returncode == (how == "wrong"), done.stdout + done.stderr
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if "is wrong" in line]
    found = [re.match(r"rank \d|all-reduce of 256 MiB over 2", line) for line in lines if line not in wrong]
    assert sorted(line[0] if line else "" for line in found) == ["all-reduce of 256 MiB over 2", "rank 0", "rank 1"]
    assert sum(line.endswith("; right") for line in lines) == (2 if how == "right" else 0)
    assert {re.match(r"rank \d", line)[0] for line in wrong} == ({"rank 0", "rank 1"} if how == "wrong" else set())
