"""A job and patches for a training step, made by hand: no data are opened."""

import dataclasses
from typing import Any

import numpy as np
import torch

from raytrain_brats.augmentation import Odds
from raytrain_brats.config import parse
from raytrain_brats.data.patch import Patch, empty_patch
from raytrain_brats.data.sampler import Sampler
from raytrain_brats.data.store import Source
from raytrain_brats.learn.step import Launched, StepResult
from raytrain_brats.run.spec import RunSpec

CPU = torch.device("cpu")
EDGE = 8
NETWORKS: dict[str, dict[str, Any]] = {
    "segresnet": {"name": "segresnet", "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "dynunet": {"name": "dynunet", "filters": [4, 4, 4], "heads": 1},
}

INTENSITY = ["noise", "blur", "brightness", "contrast", "low_resolution", "inverted_gamma", "gamma"]
OPERATIONS = ["rotation", "scale", "mirror", *INTENSITY]


def odds(chance: float, **others: float) -> Odds:
    """Of nnU-Net's list, where each operation is as likely, but for the others."""
    given: dict[str, Any] = dict.fromkeys(OPERATIONS, chance) | others
    return Odds(**given)


def spec(
    network: str = "segresnet",
    micro_batch: int | str = 4,
    optimiser: str = "sgd",
    clip_norm: float = 1e6,
    reduction: str = "fast",
    augment: str = "light",
) -> RunSpec:
    """A job whose data are never opened. SGD by default: Adam's first step hides the gradient's size."""
    options = {"name": optimiser, "learning_rate": 0.01, "warmup_share": 0.0, "clip_norm": clip_norm}
    train = {"global_batch": 4, "micro_batch": micro_batch, "optimiser": options, "reduction": reduction}
    train |= {"ema_samples": 40, "augment": {"kind": augment}}
    data = {"patch_xyz": [EDGE] * 3}
    config = parse({"network": NETWORKS[network], "data": data, "train": train}, "test")
    sampler = Sampler(0, 10, 4, 4, 10)
    fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(RunSpec)}
    return RunSpec(**fields | {"config": config, "sampler": sampler, "source": Source("nowhere", "msd", 1.0)})


def patch(position: int) -> Patch:
    """Integers and statistics as a stream gives them: read-only, dtypes differing from case to case."""
    random = np.random.RandomState(position)
    image = (random.randint(0, 300, (4, EDGE, EDGE, EDGE)) * (random.rand(EDGE, EDGE, EDGE) < 0.8)).astype(
        np.float16 if position % 3 == 0 else np.int16
    )
    label = random.choice(4, (EDGE, EDGE, EDGE)).astype(np.uint8)
    for array in (image, label):
        array.flags.writeable = False
    mean, std = random.uniform(100, 200, 4).astype(np.float32), random.uniform(50, 90, 4).astype(np.float32)
    return Patch(position, 1000 + position, f"case{position}", 1.0, "", image, label, mean, std)


def empty(position: int, reason: str = "") -> Patch:
    return empty_patch(position, 0, "", reason, (EDGE, EDGE, EDGE))


def equal(a: Patch, b: Patch) -> bool:
    fields = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Patch)]
    return all(x.dtype == y.dtype and np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in fields)


def arrived(result: StepResult) -> Launched:
    """A step whose numbers are there."""
    numbers = Launched(None, torch.zeros(0), lambda: None, 0.0, [], 0)  # type: ignore[arg-type]
    object.__setattr__(numbers, "result", lambda: result)
    return numbers
