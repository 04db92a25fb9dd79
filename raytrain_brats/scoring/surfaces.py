"""How far two surfaces are from each other, by two definitions of a surface. Runs in predict tasks.

In: two masks on one grid, neither empty; the voxel's edges in mm.
Out: the distance of each piece of one surface to the other, in mm, with its area; HD95 and surface Dice of these.

`surfels`: the surface is at the corners between voxels and each piece has the area that its eight voxels give it, as
DeepMind's surface-distance has it (Nikolov et al. 2021, doi 10.2196/26151) and BraTS from 2023 on; MONAI has its table.
`edge_voxels`: the surface is the voxels with a face outside, all counted alike, as in nnU-Net, panoptica and MONAI.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from monai.metrics.utils import create_table_neighbour_code_to_surface_area
from scipy import ndimage

Mask = npt.NDArray[np.bool_]
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Distances:
    """Of the pieces of each surface to the other surface."""

    predicted_mm: npt.NDArray[np.float64]
    truth_mm: npt.NDArray[np.float64]
    predicted_area: npt.NDArray[np.float64]
    truth_area: npt.NDArray[np.float64]


def surfels(predicted: Mask, truth: Mask, spacing_mm: Spacing) -> Distances:
    """Distances of the corners between voxels, by their areas in mm^2."""
    areas = _areas(spacing_mm)

    def surface(mask: Mask) -> tuple[Mask, npt.NDArray[np.float64]]:
        x, y, z = mask.shape
        code = np.zeros((x - 1, y - 1, z - 1), np.uint8)
        for bit, (i, j, k) in enumerate(np.ndindex(2, 2, 2)):
            code |= mask[i : x - 1 + i, j : y - 1 + j, k : z - 1 + k].astype(np.uint8) << (7 - bit)
        return (code != 0) & (code != 255), areas[code]

    return _between(surface, predicted, truth, spacing_mm)


def edge_voxels(predicted: Mask, truth: Mask, spacing_mm: Spacing) -> Distances:
    """Distances of the voxels that have a face outside; each counts one."""

    def surface(mask: Mask) -> tuple[Mask, npt.NDArray[np.float64]]:
        return mask & ~ndimage.binary_erosion(mask), np.ones(mask.shape)

    return _between(surface, predicted, truth, spacing_mm)


def _between(surface: Callable[[Mask], Any], predicted: Mask, truth: Mask, spacing_mm: Spacing) -> Distances:
    box = joint_box(predicted | truth)
    masks = (np.pad(mask[box], 1) for mask in (predicted, truth))  # a mask at the border has a surface there too
    (ours, our_area), (true, true_area) = (surface(mask) for mask in masks)
    to_ours, to_true = (ndimage.distance_transform_edt(~s, sampling=spacing_mm) for s in (ours, true))
    return Distances(to_true[ours], to_ours[true], our_area[ours], true_area[true])


def joint_box(mask: Mask) -> tuple[slice, ...]:
    """The bounding box of a mask that is not empty."""
    spans = (np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
    return tuple(slice(int(span[0]), int(span[-1]) + 1) for span in spans)


@lru_cache(maxsize=8)
def _areas(spacing_mm: Spacing) -> npt.NDArray[np.float64]:
    """Area in mm^2 of the surface between eight voxels, by their bits."""
    return np.asarray(create_table_neighbour_code_to_surface_area(spacing_mm)[0], np.float64)


def hd95_mm(found: Distances) -> float:
    """The larger of the two surfaces' 95th percentiles, by area (DeepMind's definition)."""
    return max(
        _percentile95(d, a) for d, a in ((found.predicted_mm, found.predicted_area), (found.truth_mm, found.truth_area))
    )


def _percentile95(distances_mm: npt.NDArray[np.float64], areas: npt.NDArray[np.float64]) -> float:
    order = np.lexsort((areas, distances_mm))
    reached = np.cumsum(areas[order])
    at = int(np.searchsorted(reached / areas.sum(), 0.95))
    return float(distances_mm[order][min(at, len(order) - 1)])


def pooled_hd95_mm(found: Distances) -> float:
    """The 95th percentile over both surfaces together (panoptica's definition, BraTS 2026)."""
    return float(np.percentile(np.concatenate((found.predicted_mm, found.truth_mm)), 95))


def surface_dice(found: Distances, tolerance_mm: float) -> float:
    """The share of both surfaces together, by area, that is within the tolerance (DeepMind's definition)."""
    near = found.predicted_area[found.predicted_mm <= tolerance_mm].sum()
    near += found.truth_area[found.truth_mm <= tolerance_mm].sum()
    return float(near / (found.predicted_area.sum() + found.truth_area.sum()))


def mean_share(found: Distances, tolerance_mm: float) -> float:
    """The mean of the two surfaces' shares within the tolerance (nnU-Net's definition; BraTS 2024 and 2026)."""
    shares = ((d <= tolerance_mm).mean() for d in (found.predicted_mm, found.truth_mm))
    return float(sum(shares) / 2)
