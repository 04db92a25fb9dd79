"""A rank's share of one global step, as tensors: made by whoever reads the data, eaten by `TrainStep`.

In: samples on the CPU. Out: normalised, augmented images and region targets on the device. Runs in a worker.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytrain_brats.config import Augment
from raytrain_brats.learn.augment import augment, normalise, to_regions


@dataclass(frozen=True)
class Sample:
    place: int
    """In the global step, from 0."""
    image_czyx: Tensor
    """Integers, as they were stored; cases may differ in type."""
    label_zyx: Tensor
    """Label values of the run's convention."""
    mean_c: Tensor
    std_c: Tensor
    """Of the case's own nonzero voxels, by modality."""
    weight: float
    """0 for padding and for what could not be read: it adds nothing, and keeps the step's shape."""
    augment_draws: list[float]
    """Numbers in [0, 1) out of the sample's own seed: the same on whatever rank it is trained."""


@dataclass(frozen=True)
class Batch:
    samples: tuple[Sample, ...]
    bad: int = 0
    """Samples among these that could not be read."""
    fingerprint: int = 0
    """Sum of the samples' fingerprints: what proves that each arrived once."""


def to_device(
    samples: Sequence[Sample], table: Tensor, device: torch.device, options: Augment
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 (b, 4, z, y, x) images, (b, 3, z, y, x) targets, (b,) weights. `table` is the convention's (3, 256)."""

    def stacked(tensors: list[Tensor]) -> Tensor:
        return torch.stack([tensor.to(device) for tensor in tensors])  # one by one, as types differ between cases

    images = torch.stack([s.image_czyx.to(device).float() for s in samples])
    image = normalise(images, stacked([s.mean_c for s in samples]), stacked([s.std_c for s in samples]))
    regions = to_regions(stacked([s.label_zyx for s in samples]), table)
    image, regions = augment(image, regions, [s.augment_draws for s in samples], options)
    return image, regions, torch.tensor([s.weight for s in samples], device=device)
