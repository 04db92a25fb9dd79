"""Lesion-wise scores by BraTS's rules of 2023, 2024 and 2026. Runs in predict tasks.

In: masks of a region, and of the tissues around it; the voxel's edges in mm; the numbers of the rule (`challenges`).
Out: Dice, HD95 and surface Dice over lesions; how many were found, missed and made up.

Written anew from the rules. The one of 2023 equals the challenge's own code on all regions tried, by its own distance.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from raytrain_brats.scoring.challenges import Rule
from raytrain_brats.scoring.surfaces import (
    Mask,
    Spacing,
    edge_voxels,
    hd95_mm,
    joint_box,
    mean_share,
    pooled_hd95_mm,
    surfels,
)

Parts = npt.NDArray[np.int32]
"""Numbers of lesions, 0 where there is none; numbers may be missing."""
NSD_2024_MM = (0.5, 1.0)
MISSED_2026_MM = 373.0
_NEAR, _EVERY = ndimage.generate_binary_structure(3, 2), ndimage.generate_binary_structure(3, 3)
_LEAST_DICE_2026 = 1e-6


@dataclass(frozen=True)
class LesionScores:
    """`dice`, `hd95_mm`, `nsd` (by tolerance in mm): None where the rule gives no number. Counts of lesions."""

    dice: float | None
    hd95_mm: float | None
    nsd: Mapping[float, float | None]
    found: int
    made_up: int
    missed: int


def parts_of(mask: Mask) -> Parts:
    """The parts of a mask whose voxels touch by face, edge or corner."""
    return np.asarray(ndimage.label(mask, _EVERY)[0], np.int32)


def merged(mask: Mask, dilation: int) -> Parts:
    """The parts of a mask, those in reach of each other as one."""
    return np.where(mask, parts_of(ndimage.binary_dilation(mask, _NEAR, dilation)), 0)


def by_dilation(
    predicted: Mask,
    truth: Mask,
    spacing_mm: Spacing,
    rule: Rule,
    tissues: Mapping[str, tuple[Mask, Rule]] | None = None,
    predicted_tissues: Mapping[str, tuple[Mask, Rule]] | None = None,
    *,
    distances: bool = True,
) -> LesionScores:
    """The rules of 2023 and 2024: a lesion is scored with every part that it reaches.

    `tissues` and `predicted_tissues`: those that `rule.touching` names, each with its own rule. Without `distances`
    HD95 and surface Dice are left out (0), which take most of the time.
    """
    lesions = _merged_by(merged(truth, rule.dilation), _around(rule, tissues or {}, predicted=False))
    found = _predicted_parts(predicted, rule)
    if rule.merge_predicted:
        found = _merged_by(found, _around(rule, predicted_tissues or {}, predicted=True))
    return _scored(found, lesions, spacing_mm, rule, distances)


def _predicted_parts(predicted: Mask, rule: Rule) -> Parts:
    if not rule.merge_predicted:
        return parts_of(predicted)
    found = merged(predicted, rule.dilation)
    small = np.bincount(found.ravel()) <= rule.limit_mm3  # voxels, as the challenge's code counts here
    return np.where(small[found], 0, found)


def _around(rule: Rule, tissues: Mapping[str, tuple[Mask, Rule]], predicted: bool) -> list[Parts]:
    """The lesions of the tissues that may join others, each by its own rule, not joined themselves."""
    there = [tissues[name] for name in rule.touching if name in tissues]
    return [_predicted_parts(mask, own) if predicted else merged(mask, own.dilation) for mask, own in there]


def _merged_by(lesions: Parts, others: Iterable[Parts]) -> Parts:
    """Lesions whose first touching lesion of another tissue is the same one become one; tissue after tissue.

    The first is the one of the lowest number, as in the challenge's code: so it does not join all that are connected.
    """
    for other in others:
        count, none = int(lesions.max(initial=0)), int(other.max(initial=0)) + 1
        if not count or none == 1:
            continue
        nearby = ndimage.minimum_filter(np.where(other > 0, other, none), footprint=_NEAR, mode="constant", cval=none)
        first = np.asarray(ndimage.minimum(nearby, lesions, np.arange(1, count + 1)), np.int64)
        there = np.bincount(lesions.ravel(), minlength=count + 1)[1:] > 0
        touched = there & (first > 0) & (first < none)
        numbers = np.concatenate(([0], np.where(touched, count + first, np.arange(1, count + 1))))
        lesions = numbers[lesions].astype(np.int32)
    return lesions


def _scored(found: Parts, lesions: Parts, spacing_mm: Spacing, rule: Rule, distances: bool) -> LesionScores:
    matched: set[int] = set()
    voxel_mm3, missed, rows = float(np.prod(spacing_mm)), 0, []
    part_boxes = ndimage.find_objects(found)
    for number, box in enumerate(ndimage.find_objects(lesions), 1):
        if box is None:
            continue
        wide = _wider(box, rule.dilation, found.shape)
        reach = ndimage.binary_dilation(lesions[wide] == number, _NEAR, rule.dilation)
        hits = set(np.unique(found[wide][reach]).tolist()) - {0}
        matched |= hits  # also by lesions too small to be scored: their parts are not made up
        if int((lesions[box] == number).sum()) * voxel_mm3 <= rule.limit_mm3:
            continue
        if not hits:
            missed += 1
            rows.append((0.0, rule.missed_mm, *(0.0 for _ in NSD_2024_MM)))
            continue
        both = _hull([box, *(part_boxes[hit - 1] for hit in hits)])
        guess, lesion = np.isin(found[both], list(hits)), lesions[both] == number
        if not distances:
            rows.append((_dice(guess, lesion), 0.0, *(0.0 for _ in NSD_2024_MM)))
            continue
        edges = edge_voxels(guess, lesion, spacing_mm)
        distance_mm = hd95_mm(surfels(guess, lesion, spacing_mm))
        rows.append((_dice(guess, lesion), distance_mm, *(mean_share(edges, t) for t in NSD_2024_MM)))
    made_up = sum(box is not None for box in part_boxes) - len(matched)
    total = len(rows) + made_up
    if not total:
        return LesionScores(1.0, 0.0, dict.fromkeys(NSD_2024_MM, 1.0), 0, 0, 0)
    dice, far_mm, *near = (np.sum(column) for column in zip(*rows, strict=True)) if rows else (0.0,) * 4
    nsd: dict[float, float | None] = {t: float(n / total) for t, n in zip(NSD_2024_MM, near, strict=True)}
    hd = float((far_mm + made_up * rule.missed_mm) / total)
    return LesionScores(float(dice / total), hd, nsd, len(rows) - missed, made_up, missed)


def _dice(one: Mask, other: Mask) -> float:
    return 2.0 * int((one & other).sum()) / (int(one.sum()) + int(other.sum()))


def _wider(box: tuple[slice, ...], steps: int, shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(max(s.start - steps, 0), min(s.stop + steps, n)) for s, n in zip(box, shape, strict=True))


def _hull(boxes: list[Any]) -> tuple[slice, ...]:
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def one_to_one(predicted: Mask, truth: Mask, spacing_mm: Spacing, large_mm3: float | None = None) -> LesionScores:
    """The rule of 2026: parts as they are, each lesion paired with one part at most so that the sum of Dice is largest;
    scores are means over pairs. Lesions that are missed or made up show in the counts alone.

    `large_mm3` (MET): means over lesions of at least this volume, where a missed one and any made up count as 0.
    """
    found, lesions = parts_of(predicted), parts_of(truth)
    pairs = _pairs(found, lesions)
    made_up, missed = int(found.max(initial=0)) - len(pairs), int(lesions.max(initial=0)) - len(pairs)
    tolerance_mm, voxel_mm3 = min(spacing_mm), float(np.prod(spacing_mm))
    counts = len(pairs), made_up, missed
    large = np.bincount(lesions.ravel())[1:] * voxel_mm3 >= (large_mm3 or 0.0)
    if not large.size + int(found.max(initial=0)) or (large_mm3 is not None and not large.any()):
        return LesionScores(None, None, {tolerance_mm: None}, *counts)
    rows = []
    boxes, part_boxes = ndimage.find_objects(lesions), ndimage.find_objects(found)
    for lesion_number, part_number in pairs:
        if large[lesion_number - 1]:
            both = _hull([boxes[lesion_number - 1], part_boxes[part_number - 1]])
            part, lesion = found[both] == part_number, lesions[both] == lesion_number
            edges = edge_voxels(part, lesion, spacing_mm)
            rows.append((_dice(part, lesion), pooled_hd95_mm(edges), mean_share(edges, tolerance_mm)))
    unpaired = 0 if large_mm3 is None else int(large.sum()) - len(rows) + made_up
    rows += [(0.0, MISSED_2026_MM, 0.0)] * max(unpaired, not rows)
    dice, distance_mm, near = (float(np.mean(column)) for column in zip(*rows, strict=True))
    return LesionScores(dice, distance_mm, {tolerance_mm: near}, *counts)


def _pairs(found: Parts, lesions: Parts) -> list[tuple[int, int]]:
    """(lesion, part) such that the sum of their Dice is largest."""
    sizes, lesion_sizes = np.bincount(found.ravel()), np.bincount(lesions.ravel())
    if len(sizes) < 2 or len(lesion_sizes) < 2:
        return []
    inside = (found > 0) & (lesions > 0)
    (lesion, part), common = np.unique(np.stack((lesions[inside], found[inside])), axis=1, return_counts=True)
    dice = 2 * common / (lesion_sizes[lesion] + sizes[part])
    cost = np.full((len(lesion_sizes) - 1, len(sizes) - 1), 1 + 1e-6)
    enough = dice >= _LEAST_DICE_2026
    cost[lesion[enough] - 1, part[enough] - 1] = 1 - dice[enough]
    rows, columns = linear_sum_assignment(cost)
    return [(int(i) + 1, int(j) + 1) for i, j in zip(rows, columns, strict=True) if cost[i, j] < 1]


def f1(scores: LesionScores) -> float | None:
    """Of the lesions found; None where there is none at all."""
    total = 2 * scores.found + scores.made_up + scores.missed
    return 2 * scores.found / total if total else None


def work_box(masks: Iterable[Mask]) -> tuple[slice, ...]:
    """The box that holds all masks, or one voxel; what is beyond changes no score, as a dilation that leaves the box
    connects nothing that it does not connect inside."""
    every = np.logical_or.reduce(list(masks))
    return joint_box(every) if every.any() else (slice(0, 1),) * 3
