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
