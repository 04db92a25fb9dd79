"""Whole-case inference by MONAI's sliding window. Runs in workers and predict tasks.

In: a network, one prepared image and its statistics.
Out: region probabilities on the prepared box.
"""

import numpy as np
import numpy.typing as npt
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from raytrain_brats.learn.batch import normalise


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
) -> Tensor:
    """(3, z, y, x) float32 probabilities of WT, TC, ET on the box of the prepared image, on the device; the network is
    left in eval mode."""
    network.eval()
    raw = torch.from_numpy(np.array(image_czyx)).to(device)[None]
    statistics = (torch.tensor([values], dtype=torch.float32, device=device) for values in (mean, std))
    image = normalise(raw, *statistics)
    dtype = amp_dtype(device, amp)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = sliding_window_inference(
            image, tuple(reversed(patch_xyz)), sw_batch_size=2, predictor=network, overlap=overlap, mode="gaussian"
        )
    return torch.sigmoid(logits[0].float())
