"""A rank's share of one global step, as the network's input: normalised, augmented. Runs in a worker.

In: samples on the CPU, as `run.worker` makes them: raw voxels, statistics, label values, random numbers.
Out: images and region targets on the training device, float32, for `TrainStep`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytrain_brats.config import Augment

DRAWS = 11
"""Numbers in [0, 1) that one sample's augmentation uses: 3 flips, 4 scales, 4 shifts."""


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


def normalise(image_bczyx: Tensor, mean_bc: Tensor, std_bc: Tensor) -> Tensor:
    """(x - mean) / std where x is not zero; the background stays zero (MONAI's NormalizeIntensity nonzero)."""
    image = image_bczyx.float()
    mean, std = (v[..., None, None, None] for v in (mean_bc, std_bc))
    return torch.where(image != 0, (image - mean) / std, image)


def to_regions(label_bzyx: Tensor, table: Tensor) -> Tensor:
    """(b, 3, z, y, x) float32 from label values and the convention's (3, 256) table."""
    return table[:, label_bzyx.long()].transpose(0, 1).float()


def augment(image: Tensor, regions: Tensor, draws_b: list[list[float]], options: Augment) -> tuple[Tensor, Tensor]:
    """Flip, scale and shift each sample of normalised (b, c, z, y, x) images by its own draws."""
    images, targets = [], []
    for x, y, draws in zip(image, regions, draws_b, strict=True):
        if options.flip:
            axes = [axis for axis, u in zip((1, 2, 3), draws[:3], strict=True) if u < 0.5]
            x, y = x.flip(axes), y.flip(axes)
        scale = 1 + options.scale * (2 * x.new_tensor(draws[3:7])[:, None, None, None] - 1)
        shift = options.shift * (2 * x.new_tensor(draws[7:11])[:, None, None, None] - 1)
        images.append(torch.where(x != 0, x * scale + shift, x))
        targets.append(y)
    return torch.stack(images), torch.stack(targets)
