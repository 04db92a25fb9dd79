"""Whole-case inference by MONAI's sliding window, mirrored where asked for. Runs in workers and predict tasks.

In: a network, one prepared image and its statistics.
Out: region probabilities on the prepared box; region masks of probabilities.
"""

from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from raytrain_brats.learn.batch import normalise
from raytrain_brats.scoring.metrics import Masks

MIRRORED = tuple(axes for number in (1, 2, 3) for axes in combinations((2, 3, 4), number))
"""The axes (of b, c, z, y, x) of the seven mirror images; with the image itself they are eight."""


def amp_dtype(device: torch.device, enabled: bool) -> torch.dtype | None:
    """Mixed precision where it pays: bf16 on GPUs that have it, fp16 on older ones, None (float32) on CPUs."""
    if device.type != "cuda" or not enabled:
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16


@torch.inference_mode()
def probabilities(
    network: nn.Module,
    image_czyx: npt.NDArray[np.int16],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    patch_xyz: tuple[int, int, int],
    overlap: float,
    device: torch.device,
    amp: bool = True,
    *,
    mirror: bool = False,
) -> Tensor:
    """(3, z, y, x) float32 probabilities of WT, TC, ET on the box of the prepared image, on the device; the network is
    left in eval mode.

    `mirror`: the mean of the logits of the image and its seven mirror images, as nnU-Net takes it; eight times the
    work. Logits rather than probabilities: a confident view outweighs doubtful ones, and both programs compare alike.
    """
    network.eval()
    raw = torch.from_numpy(np.array(image_czyx)).to(device)[None]
    statistics = (torch.tensor([values], dtype=torch.float32, device=device) for values in (mean, std))
    image = normalise(raw, *statistics)
    dtype = amp_dtype(device, amp)
    window_zyx = tuple(reversed(patch_xyz))

    def logits_of(view: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            found: Any = sliding_window_inference(view, window_zyx, 2, network, overlap, mode="gaussian")
        return torch.as_tensor(found).float()

    logits = logits_of(image)
    if mirror:
        for axes in MIRRORED:  # one running sum: no eight results at a time
            logits += logits_of(image.flip(axes)).flip(axes)
        logits /= 1 + len(MIRRORED)
    return torch.sigmoid(logits[0])


def to_masks(
    probabilities_r: npt.NDArray[np.float32], thresholds: tuple[float, float, float] = (0.5, 0.5, 0.5)
) -> Masks:
    """Region masks of (3, x, y, z) probabilities, nested as label values are: ET in TC in WT.

    The only place that decides which voxels a region has.
    """
    masks: Masks = np.stack([p > np.float32(limit) for p, limit in zip(probabilities_r, thresholds, strict=True)])
    masks[1] |= masks[2]
    masks[0] |= masks[1]
    return masks
