"""Dice and 95th-percentile Hausdorff distance of regions: all that a validation computes. Runs in workers and predict
tasks. More, and by year: `case_scores`.

In: predicted and true region masks on one grid.
Out: one number per region, with the BraTS challenge's rules for empty regions.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from torch import Tensor

from raytrain_brats.labels import REGIONS

MISSED_MM = 373.13
"""HD95 when exactly one of prediction and truth is empty: the diagonal of the BraTS grid (BraTS 2021 rules)."""

Masks = npt.NDArray[np.bool_]


def dice(predicted: Masks, truth: Masks) -> dict[str, float]:
    """{region: Dice} of (3, x, y, z) masks; 1 when both are empty."""
    return {region: dice_of(p, t) for region, p, t in zip(REGIONS, predicted, truth, strict=True)}


def dice_by_counts(counts: Sequence[Sequence[int]]) -> dict[str, float]:
    """{region: Dice} of the voxels that lie in both masks, in the prediction, in the truth."""
    return {
        region: 1.0 if p + t == 0 else 2.0 * both / (p + t)
        for region, (both, p, t) in zip(REGIONS, counts, strict=True)
    }


def overlap(masks: Tensor, label: Tensor, whole_label: Tensor, table: Tensor) -> list[list[int]]:
    """Counts for `dice_by_counts`, with one readback: (3, z, y, x) masks against label values on the same grid, of
    which `whole_label` also holds those beyond it. `table` is the convention's (3, 256)."""
    both = [(mask & regions[label.long()]).sum() for mask, regions in zip(masks, table, strict=True)]
    voxels = torch.bincount(whole_label.flatten(), minlength=table.shape[1])
    counts = torch.stack([torch.stack(both), masks.flatten(1).sum(1), (table * voxels).sum(1)], dim=1)
    found: list[list[int]] = counts.tolist()
    return found


def hd95_mm(predicted: Masks, truth: Masks, spacing_mm: tuple[float, ...]) -> dict[str, float]:
    """{region: HD95 in mm}; 0 when both are empty, MISSED_MM when one is."""
    return {r: hd95_mm_of(p, t, spacing_mm) for r, p, t in zip(REGIONS, predicted, truth, strict=True)}


def dice_of(p: Masks, t: Masks) -> float:
    """Of one region; 1 when both masks are empty."""
    size = int(p.sum()) + int(t.sum())
    return 1.0 if size == 0 else 2.0 * int((p & t).sum()) / size


def hd95_mm_of(p: Masks, t: Masks, spacing_mm: tuple[float, ...]) -> float:
    """Of one region, (x, y, z) masks; by MONAI, from the centres of voxels at the edge."""
    if not p.any() or not t.any():
        return 0.0 if p.any() == t.any() else MISSED_MM
    box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(p | t))
    p, t = np.pad(p[box], 1), np.pad(t[box], 1)  # MONAI finds no surface at the border of an array
    first, second = (torch.from_numpy(mask)[None, None] for mask in (p, t))
    return float(compute_hausdorff_distance(first, second, percentile=95, spacing=list(spacing_mm)))
