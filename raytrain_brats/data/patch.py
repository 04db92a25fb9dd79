"""The patch of one sample: where it lies in a prepared case, and its voxels.

In: a `Prepared` case, a `Sample`, the patch's size.
Out: a `Patch`: integers and statistics; the training device normalises, flips and makes regions of it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raytrain_brats.data.preprocess import Prepared
from raytrain_brats.data.sampler import Sample, draw

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Patch:
    """One training sample. `weight` 0: padding, or a case that could not be read (then `reason` says why).

    The arrays may be views into memory that others hold too: read-only, and not contiguous.
    """

    position: int
    seed: int
    case_id: str
    weight: float
    reason: str
    image_czyx: npt.NDArray[Any]
    label_zyx: npt.NDArray[np.uint8]
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]


def place(prepared: Prepared, sample: Sample, size_zyx: Triple, foreground_share: float) -> Triple:
    """Where in the box (z, y, x) the patch of `sample` begins.

    With probability `foreground_share` the centre is a tumour voxel, of a label value drawn evenly among those
    present (nnU-Net's oversampling); else the place is uniform.
    """
    box = prepared.image_czyx.shape[1:]
    chance, value, voxel, *place = draw(sample.seed, "crop", 6)
    room = [max(0, b - s) for b, s in zip(box, size_zyx, strict=True)]
    start = [int(p * (r + 1)) for p, r in zip(place, room, strict=True)]
    if chance < foreground_share and prepared.foreground_counts:
        counts = [count for _, count in prepared.foreground_counts]
        chosen = int(value * len(counts))
        index = prepared.foreground[sum(counts[:chosen]) + int(voxel * counts[chosen])]
        centre = np.unravel_index(index, box)
        start = [min(max(0, int(c) - s // 2), r) for c, s, r in zip(centre, size_zyx, room, strict=True)]
    return start[0], start[1], start[2]


def window(array: npt.NDArray[Any], start: Triple, size_zyx: Triple) -> npt.NDArray[Any]:
    """The voxels (..., z, y, x) from `start` on: a view."""
    inside: tuple[Any, ...] = (..., *(slice(a, a + s) for a, s in zip(start, size_zyx, strict=True)))
    view: npt.NDArray[Any] = array[inside]
    return view


def empty_patch(position: int, seed: int, case_id: str, reason: str, size_zyx: Triple) -> Patch:
    """A patch of weight zero: a position never goes missing, whatever becomes of its case."""
    nothing = np.zeros(1, np.int16), np.zeros(1, np.uint8)
    image, label = np.broadcast_to(nothing[0], (4, *size_zyx)), np.broadcast_to(nothing[1], size_zyx)
    return Patch(position, seed, case_id, 0.0, reason, image, label, np.zeros(4, np.float32), np.ones(4, np.float32))
