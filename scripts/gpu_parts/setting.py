"""Steps to measure: recipes, patches and rows made by hand, and a clock that waits for the device.

In: a device, the edge of a patch.
Out: `TrainStep`s, patches, rows of the stream; milliseconds; findings.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from raytrain_brats.augmentation import Cut
from raytrain_brats.config import Config, load
from raytrain_brats.data.patch import CaseBox, Patch, decode, encode
from raytrain_brats.data.preprocess import triple
from raytrain_brats.data.sampler import Sample
from raytrain_brats.learn.convolution_check import now
from raytrain_brats.learn.step import TrainStep
from raytrain_brats.run.feed import Uploader

CPU, META = torch.device("cpu"), torch.device("meta")
RECIPES = ("segresnet", "dynunet")
FULL = 64
"""Patches with a smaller edge get a small network."""
_SMALL = {
    "segresnet": ("network.init_filters=8", "network.blocks_down=[1,1]", "network.blocks_up=[1]"),
    "dynunet": ("network.filters=[4,4,4]", "network.heads=1"),
}
_MARGIN = 4


class Measured(dict[str, Any]):
    """What a part found, with its name; `wrong` says what is not as it must be."""


@dataclass
class Findings:
    """All that was found, each told as it comes."""

    rows: list[Measured] = field(default_factory=list)
    part: str = ""

    def tell(self, what: str, wrong: str = "", **facts: Any) -> None:
        row = Measured(part=self.part, what=what, **facts)
        if wrong:
            row["wrong"] = wrong
        self.rows.append(row)
        print(json.dumps(row, default=str), flush=True)

    @property
    def wrong(self) -> list[str]:
        return [f"{row['part']}: {row['what']}: {row['wrong']}" for row in self.rows if "wrong" in row]


@dataclass
class Setting:
    device: torch.device
    edge: int
    findings: Findings
    found: dict[str, Any] = field(default_factory=dict)
    """Figures by the names that readers of the JSON file know."""

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def small(self) -> int:
        """An edge that a CPU computes, too, with the full network."""
        return min(self.edge, FULL)

    def peak_gb(self) -> float | None:
        """Since the last call."""
        if not self.gpu:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) / 1e9
        torch.cuda.reset_peak_memory_stats(self.device)
        return round(peak, 2)

    def milliseconds(self, act: Callable[[], Any], times: int = 20) -> float:
        """Median, waited for at both ends, after a quarter of them to warm up."""
        spans = []
        for number in range(times + times // 4):
            began = now(self.device)
            act()
            if number >= times // 4:
                spans.append(1e3 * (now(self.device) - began))
        return round(statistics.median(spans), 3)


def config(recipe: str, edge: int, batch: int = 4, *changes: str) -> Config:
    """The recipe as it is, but for the batch and the patch; its network is small where the patch is."""
    small = _SMALL[recipe] if edge < FULL else ()
    fixed = (f"data.patch_xyz=[{edge},{edge},{edge}]", f"train.global_batch={batch}", f"train.micro_batch={batch}")
    return load(recipe, (*fixed, "train.optimiser.warmup_share=0", *small, *changes))


def train_step(settings: Config, device: torch.device, world_size: int = 1) -> TrainStep:
    return TrainStep(settings, 1000, "msd", world_size, device)


def box(number: int, edge: int, batch: int) -> CaseBox:
    """A case that gives a whole batch, whose patches overlap by far: int16 brain on zeros, labels in blobs."""
    random, side = np.random.RandomState(number), edge + _MARGIN
    image = random.randint(1, 900, (4, side, side, side)).astype(np.int16)
    image[:, random.rand(side, side, side) < 0.3] = 0
    blobs = random.choice(4, (4, 4, 4), p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint8)
    label = np.kron(blobs, np.ones((side // 4 + 1,) * 3, np.uint8))[:side, :side, :side]
    first = number * batch
    samples = [Sample(first + n, 0, number, 1000 + first + n) for n in range(batch)]
    size = (edge, edge, edge)  # also of patches that are rotated: outside there are zeros
    within = [(sample, Cut(triple(random.randint(0, _MARGIN + 1, 3)), size)) for sample in samples]
    return CaseBox(f"case{number}", within, "", label.shape, image, label, (450.0,) * 4, (260.0,) * 4)


def row(number: int, edge: int, batch: int) -> Any:
    """The table in which a whole batch travels."""
    return encode([box(number, edge, batch)], (edge, edge, edge), number + 1)


def patches(number: int, edge: int, batch: int, device: torch.device) -> list[Patch]:
    """The patches of step `number`, on the device as the worker's thread brings them."""
    return decode(row(number, edge, batch), Uploader(device))[1]


def flat(step: TrainStep) -> torch.Tensor:
    """All weights in float64 on the host."""
    return nn.utils.parameters_to_vector(step.network.parameters()).detach().double().cpu()


def gradient(step: TrainStep) -> torch.Tensor:
    """Of the last step, likewise; clipped."""
    given = [p.grad for p in step.network.parameters() if p.grad is not None]
    return torch.cat([g.detach().double().cpu().flatten() for g in given])


def apart(found: torch.Tensor, right: torch.Tensor) -> float:
    """Distance, as a share of the right one's length; infinite where numbers are not finite."""
    share = float((found - right).norm() / right.norm())
    return share if share == share else float("inf")


def stamp() -> str:
    return time.strftime("%Y-%m-%d")
