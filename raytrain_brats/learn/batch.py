"""A rank's share of one global step, as tensors: `run.worker` makes it, `TrainStep` consumes it. Runs in a worker.

In: samples on the CPU. Out: normalised, augmented images and region targets on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytrain_brats.config import Augment
from raytrain_brats.learn.augment import augment, normalise, to_regions


@dataclass(frozen=True)
class TensorSample:
    place: int
    """Index in the global step, from 0."""
    image_czyx: Tensor
    """As stored: int16 or float16, depending on the case."""
    label_zyx: Tensor
    """Label values of the run's convention."""
    mean_c: Tensor
    std_c: Tensor
    """Of the case's own nonzero voxels, by modality."""
    weight: float
    """0 for padding and invalid cases: the sample adds nothing, and keeps the step's shape."""
    augment_draws: list[float]
    """Numbers in [0, 1) from the sample's own seed: the same on any rank."""


@dataclass(frozen=True)
class Batch:
    samples: tuple[TensorSample, ...]
    bad: int = 0
    """Samples among these whose case is invalid."""
    fingerprint: int = 0
    """Sum of the samples' fingerprints: it proves that each arrived once."""


def to_device(
    samples: Sequence[TensorSample], table: Tensor, device: torch.device, options: Augment
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 (b, 4, z, y, x) images, (b, 3, z, y, x) targets, (b,) weights. `table` is the convention's (3, 256)."""

    def stacked(tensors: list[Tensor]) -> Tensor:
        return torch.stack([tensor.to(device) for tensor in tensors])

    # Copied to the device in 16 bits, and one by one, since cases differ in type; float32 only there.
    images = torch.stack([s.image_czyx.to(device).float() for s in samples])
    image = normalise(images, stacked([s.mean_c for s in samples]), stacked([s.std_c for s in samples]))
    regions = to_regions(stacked([s.label_zyx for s in samples]), table)
    image, regions = augment(image, regions, [s.augment_draws for s in samples], options)
    return image, regions, torch.tensor([s.weight for s in samples], device=device)
