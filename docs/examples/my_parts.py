"""A network, a loss and an augmentation of one's own (docs/own-parts.md).

In: patches of four modalities; logits and regions; a sample and its own random numbers.
Out: logits of WT, TC and ET; a number for each sample; another sample.
"""

from collections.abc import Callable

import torch
from pydantic import BaseModel, PositiveInt
from torch import Tensor, nn
from torch.nn import functional


class Small(nn.Module):
    """(b, 4, z, y, x) -> (b, 3, z, y, x): one level down and up again."""

    divisor = 2
    """Edges of a patch must be multiples of it."""

    class Options(BaseModel, extra="forbid"):
        """What a recipe may say beside `network.name`."""

        width: PositiveInt = 16

    def __init__(self, options: Options) -> None:
        super().__init__()
        width = options.width
        self.down = nn.Sequential(nn.Conv3d(4, width, 3, padding=1), _norm(width), nn.LeakyReLU())
        self.deep = nn.Sequential(nn.Conv3d(width, 2 * width, 3, 2, 1), _norm(2 * width), nn.LeakyReLU())
        self.up = nn.ConvTranspose3d(2 * width, width, 2, 2)
        self.out = nn.Conv3d(2 * width, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        skip = self.down(image)
        logits: Tensor = self.out(torch.cat([skip, self.up(self.deep(skip))], 1))
        return logits


def _norm(width: int) -> nn.Module:
    return nn.InstanceNorm3d(width, affine=True)  # never batch norm: samples must not see each other


def focal(logits: Tensor, regions: Tensor, gamma: float = 2.0) -> Tensor:
    """(b, 3, z, y, x) logits and regions -> (b,): focal loss (Lin et al. 2017, arXiv 1708.02002)."""
    entropy = functional.binary_cross_entropy_with_logits(logits, regions, reduction="none")
    return ((1 - torch.exp(-entropy)) ** gamma * entropy).flatten(1).mean(1)


def drop_modality(
    image: Tensor, regions: Tensor, draws: Callable[[str, int], list[float]], share: float = 0.1
) -> tuple[Tensor, Tensor]:
    """(4, z, y, x) image and (3, z, y, x) regions of one sample: with the odds `share`, one modality becomes zero."""
    happens, which = draws("drop_modality", 2)
    if happens >= share:
        return image, regions
    kept = [float(channel != int(4 * which)) for channel in range(4)]
    return image * torch.tensor(kept, device=image.device)[:, None, None, None], regions
