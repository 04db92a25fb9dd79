"""The patch of one sample: its origin in a prepared case, and its voxels. Runs in data tasks and workers.

In: a `Prepared` case, a `Sample`, the patch's size.
Out: a `Patch`: integers and statistics; the training device normalises, augments and converts labels to regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raytrain_brats.data.preprocess import Prepared, Triple
from raytrain_brats.data.sampler import Sample, draw


@dataclass(frozen=True)
class Patch:
    """One training sample. `weight` 0: padding, or an invalid case (then `reason` says why).

    The voxels may be views into shared memory, read-only and not contiguous, or tensors on the training device.
    """

    position: int
    seed: int
    case_id: str
    weight: float
    reason: str
    image_czyx: Any
    label_zyx: Any
    mean: Sequence[float]
    std: Sequence[float]
    """By modality, of the stored values other than zero."""


def patch_origin(prepared: Prepared, sample: Sample, size_zyx: Triple, foreground_share: float) -> Triple:
    """First voxel (z, y, x) of the sample's patch in the prepared box.

    With probability `foreground_share` the centre is a tumour voxel, of a label value drawn evenly among those
    present (nnU-Net's oversampling, Isensee et al. 2021, doi 10.1038/s41592-020-01008-z); else the origin is uniform.
    """
    box = prepared.image_czyx.shape[1:]
    # Always six numbers, whichever branch uses them: a sample's crop depends on its seed and its case alone.
    chance, value, voxel, *uniform = draw(sample.seed, "crop", 6)
    room = [max(0, b - s) for b, s in zip(box, size_zyx, strict=True)]
    origin = [int(u * (r + 1)) for u, r in zip(uniform, room, strict=True)]
    if chance < foreground_share and prepared.foreground_counts:
        counts = [count for _, count in prepared.foreground_counts]
        chosen = int(value * len(counts))
        index = prepared.foreground[sum(counts[:chosen]) + int(voxel * counts[chosen])]
        centre = np.unravel_index(index, box)
        origin = [min(max(0, int(c) - s // 2), r) for c, s, r in zip(centre, size_zyx, room, strict=True)]
    return origin[0], origin[1], origin[2]


def crop(array: npt.NDArray[Any], origin: Triple, size_zyx: Triple) -> npt.NDArray[Any]:
    """The voxels (..., z, y, x) from `origin` on: a view."""
    inside: tuple[Any, ...] = (..., *(slice(a, a + s) for a, s in zip(origin, size_zyx, strict=True)))
    view: npt.NDArray[Any] = array[inside]
    return view


def empty_patch(position: int, seed: int, case_id: str, reason: str, size_zyx: Triple) -> Patch:
    """A patch of weight zero: every position yields a patch, also where its case is invalid."""
    nothing = np.zeros(1, np.int16), np.zeros(1, np.uint8)
    image, label = np.broadcast_to(nothing[0], (4, *size_zyx)), np.broadcast_to(nothing[1], size_zyx)
    return Patch(position, seed, case_id, 0.0, reason, image, label, [0.0] * 4, [1.0] * 4)
