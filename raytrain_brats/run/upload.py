"""Bring cases to the training device while the ones before them are trained. Runs in a worker, in the reading thread.

In: the voxels of a row, in Ray's shared memory.
Out: views of them as tensors on the device; on a CPU views of the shared memory itself.

On a GPU one copy a row: into pinned memory, which alone a GPU copies from without the processor, and from there by a
stream of its own, beside the kernels of training. The reading thread waits for it, so whoever gets a patch has it.
"""

import warnings
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raytrain_brats.data.patch import ViewOf


class Uploader:
    """Places rows on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, voxels: npt.NDArray[np.uint8]) -> ViewOf:
        """What gives tensors of these bytes; they stay as long as one of the tensors does."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # read-only memory: nobody writes to a patch
            here = torch.from_numpy(voxels)
        there = self._to_device(here) if self._stream else here.to(self._device)

        def view(at: int, dtype: str, shape: Sequence[int]) -> Tensor:
            kind: torch.dtype = getattr(torch, dtype)
            return there[at : at + prod(shape) * kind.itemsize].view(kind).view(tuple(shape))

        return view

    def _to_device(self, here: Tensor) -> Tensor:
        assert self._stream
        if here.numel() > self._staging.numel():
            self._staging = torch.empty(here.numel() * 5 // 4, dtype=torch.uint8, pin_memory=True)
        staged = self._staging[: here.numel()].copy_(here)
        with torch.cuda.stream(self._stream):
            there = staged.to(self._device, non_blocking=True)
        # The training's stream will read it: its memory is not given out again before that stream has done so.
        there.record_stream(torch.cuda.default_stream(self._device))
        self._stream.synchronize()
        return there


def tensor(array: Any, device: torch.device) -> Tensor:
    """The voxels of a patch on the device; those of an empty patch are NumPy's."""
    if isinstance(array, Tensor):
        return array
    if array.any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.from_numpy(array).to(device)
    return torch.zeros((1,), dtype=getattr(torch, array.dtype.name), device=device).expand(array.shape)
