"""From integer patches to the network's input, on the training device. Runs in a worker.

In: raw voxels, statistics, label values, draws in [0, 1) from the sample's own seed.
Out: normalised, augmented images and region targets, float32.
"""

import torch
from torch import Tensor

from raytrain_brats.config import Augment

DRAWS = 11
"""Numbers in [0, 1) that one sample's augmentation uses: 3 flips, 4 scales, 4 shifts."""


def normalise(image_bczyx: Tensor, mean_bc: Tensor, std_bc: Tensor) -> Tensor:
    """(x - mean) / std where x is not zero; the background stays zero (MONAI's NormalizeIntensity nonzero)."""
    image = image_bczyx.float()
    mean, std = (v[..., None, None, None] for v in (mean_bc, std_bc))
    return torch.where(image != 0, (image - mean) / std, image)


def to_regions(label_bzyx: Tensor, table: Tensor) -> Tensor:
    """(b, 3, z, y, x) float32 from label values and the convention's (3, 256) table."""
    return table[:, label_bzyx.long()].transpose(0, 1).float()


def flip(draws: list[float], options: Augment) -> list[int]:
    """The axes of a (c, z, y, x) sample that are reversed."""
    return [axis for axis, u in zip((1, 2, 3), draws[:3], strict=True) if u < 0.5] if options.flip else []


def augment(image_bczyx: Tensor, draws_bn: Tensor, options: Augment) -> Tensor:
    """Scale and shift the intensities of each normalised sample by its own draws; zeros stay."""
    scale, shift = draws_bn[:, 3:7, None, None, None], draws_bn[:, 7:11, None, None, None]
    scale, shift = 1 + options.scale * (2 * scale - 1), options.shift * (2 * shift - 1)
    return torch.where(image_bczyx != 0, image_bczyx * scale + shift, image_bczyx)
