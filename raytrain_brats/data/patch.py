"""Cut the patch of one sample out of a prepared case.

In: a `Prepared` case, a `Sample`, the patch's size.
Out: a `Patch`: integers and statistics; the training device normalises, flips and makes regions of it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raytrain_brats.data.plan import Sample, draw
from raytrain_brats.data.preprocess import Prepared


@dataclass(frozen=True)
class Patch:
    """One training sample. `weight` 0: padding, or a case that could not be read (then `reason` says why)."""

    position: int
    seed: int
    case_id: str
    weight: float
    reason: str
    image_czyx: npt.NDArray[Any]
    label_zyx: npt.NDArray[np.uint8]
    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]


def cut(
    prepared: Prepared, sample: Sample, case_id: str, patch_xyz: tuple[int, int, int], foreground_share: float
) -> Patch:
    """The patch of `sample`; the box is padded with zeros where it is smaller than the patch.

    With probability `foreground_share` the centre is a tumour voxel, of a label value drawn evenly among those
    present (nnU-Net's oversampling); else the place is uniform.
    """
    size = tuple(reversed(patch_xyz))
    box = prepared.image_czyx.shape[1:]
    chance, value, voxel, *place = draw(sample.seed, "crop", 6)
    room = [max(0, b - s) for b, s in zip(box, size, strict=True)]
    start = [int(p * (r + 1)) for p, r in zip(place, room, strict=True)]
    if chance < foreground_share and prepared.foreground_counts:
        counts = [count for _, count in prepared.foreground_counts]
        chosen = int(value * len(counts))
        index = prepared.foreground[sum(counts[:chosen]) + int(voxel * counts[chosen])]
        centre = np.unravel_index(index, box)
        start = [min(max(0, int(c) - s // 2), r) for c, s, r in zip(centre, size, room, strict=True)]
    inside = tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))
    image, label = prepared.image_czyx[(slice(None), *inside)], prepared.label_zyx
    assert label is not None, "training cases are labelled; the manifest saw to it"
    label = label[inside]
    missing = [(0, s - n) for s, n in zip(size, label.shape, strict=True)]
    if any(after for _, after in missing):
        image, label = np.pad(image, [(0, 0), *missing]), np.pad(label, missing)
    return Patch(
        sample.position, sample.seed, case_id, 1.0, "",
        np.ascontiguousarray(image), np.ascontiguousarray(label),
        np.array(prepared.mean, np.float32), np.array(prepared.std, np.float32),
    )  # fmt: skip


def placeholder(sample: Sample, case_id: str, reason: str, patch_xyz: tuple[int, int, int]) -> Patch:
    """A row of weight zero: a position never goes missing, whatever becomes of its case."""
    size = tuple(reversed(patch_xyz))
    image, label = np.zeros((4, *size), np.int16), np.zeros(size, np.uint8)
    return Patch(
        sample.position,
        sample.seed,
        case_id,
        0.0,
        reason,
        image,
        label,
        np.zeros(4, np.float32),
        np.ones(4, np.float32),
    )
