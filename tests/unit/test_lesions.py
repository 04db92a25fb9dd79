"""Surfaces and lesion-wise scores: numbers of the challenges' own programs, and cases worked out by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from scipy import ndimage

from raytrain_brats.labels import CAVITY, CORE, EDEMA, ENHANCING
from raytrain_brats.scoring import lesions, surfaces
from raytrain_brats.scoring.challenges import Rule, challenge_of, rule_2023, rule_2024
from raytrain_brats.scoring.lesions import by_dilation, f1, one_to_one

MM = (1.0, 1.0, 1.0)
GLI = rule_2023("GLI")
SPACINGS = ((1.0, 1.0, 1.0), (0.5, 1.0, 3.0), (1.0, 1.0, 1.0), (0.9375, 0.9375, 5.0))
"""Of `ragged(0)` to `ragged(3)`, by which the reference numbers below were made."""


def ragged(seed: int) -> Any:
    """(prediction, truth): masks of many parts, some at the border."""
    random = np.random.RandomState(seed)
    return tuple(ndimage.gaussian_filter(random.rand(14, 16, 12), 1.2) > 0.53 for _ in range(2))


def mask(*boxes: Any, shape: tuple[int, ...] = (40, 12, 12)) -> Any:
    found = np.zeros(shape, bool)
    for box in boxes:
        found[box] = True
    return found


# By DeepMind's surface-distance 0.1 (np.Inf and ndimage.filters put back, which NumPy 2 and SciPy 2 lack):
# compute_robust_hausdorff(95), compute_surface_dice_at_tolerance(1.0) and (2.0)
DEEPMIND = (
    (4.0, 0.55909, 0.783211),
    (3.0, 0.736057, 0.900447),
    (2.828427, 0.67008, 0.896003),
    (3.75, 0.68076, 0.822713),
)


@pytest.mark.parametrize("seed", range(4))
def test_surfels_are_deepminds(seed: int) -> None:
    """HD95 and surface Dice at two tolerances, on unequal voxel edges and at the border."""
    found = surfaces.surfels(*ragged(seed), SPACINGS[seed])
    numbers = surfaces.hd95_mm(found), *(surfaces.surface_dice(found, tolerance) for tolerance in (1.0, 2.0))
    assert numbers == pytest.approx(DEEPMIND[seed], abs=2e-6)


@pytest.mark.parametrize("seed", range(4))
def test_surfaces_are_monais(seed: int) -> None:
    """Surface Dice by surfels, and the larger percentile of edge voxels."""
    predicted, truth = (np.pad(m, 1) for m in ragged(seed))
    tensors, spacing = [torch.from_numpy(m)[None, None] for m in (predicted, truth)], list(SPACINGS[seed])
    dice = compute_surface_dice(*tensors, [1.0], include_background=True, spacing=spacing, use_subvoxels=True)
    found = surfaces.surface_dice(surfaces.surfels(predicted, truth, SPACINGS[seed]), 1.0)
    assert found == pytest.approx(float(dice), rel=1e-5)
    edges = surfaces.edge_voxels(predicted, truth, SPACINGS[seed])
    hd95 = max(np.percentile(d, 95) for d in (edges.predicted_mm, edges.truth_mm))
    assert hd95 == pytest.approx(float(compute_hausdorff_distance(*tensors, percentile=95, spacing=spacing)), rel=1e-5)


# By brats-evaluation 0.0.10 (panoptica 2.1.7), config GoAT, region ET: sq_dsc, sq_hd95, sq_nsd, tp, fp, fn, rq
BRATS_2026 = (
    (0.076389, 4.446275, 0.312331, 3, 2, 4, 0.5),
    (0.153609, 5.904119, 0.360496, 2, 2, 10, 0.25),
    (0.118726, 7.77664, 0.364205, 4, 2, 8, 0.444444),
    (0.359375, 5.829811, 0.571494, 2, 7, 2, 0.307692),
)


@pytest.mark.parametrize("seed", range(4))
def test_the_rule_of_2026_is_the_challenges(seed: int) -> None:
    """Pairs, their means, counts and F1 as its own program has them."""
    found = one_to_one(*ragged(seed), SPACINGS[seed])
    numbers = found.dice, found.hd95_mm, found.nsd[min(SPACINGS[seed])], found.found, found.made_up, found.missed
    assert (*numbers, f1(found)) == pytest.approx(BRATS_2026[seed], abs=2e-6)


def test_2026_pairs_one_part_with_one_lesion() -> None:
    """A part over two lesions finds the one it fits best; nothing at all has no score, nothing found has the worst."""
    two = mask(np.s_[2:6, 2:6, 2:6], np.s_[7:9, 2:6, 2:6])
    across = mask(np.s_[2:9, 2:6, 2:6])
    found = one_to_one(across, two, MM)
    assert (found.found, found.made_up, found.missed) == (1, 0, 1)
    assert found.dice == pytest.approx(2 * 64 / (64 + 112))
    nothing, lost = one_to_one(mask(), mask(), MM), one_to_one(mask(), two, MM)
    assert (nothing.dice, nothing.hd95_mm, f1(nothing)) == (None, None, None)
    assert (lost.dice, lost.hd95_mm, lost.nsd, f1(lost)) == (0.0, 373.0, {1.0: 0.0}, 0.0)


def test_2026_of_metastases_counts_what_is_missed_and_made_up() -> None:
    """MET: lesions of 20 mm^3 or more, those missed and all that are made up as 0."""
    truth = mask(np.s_[2:5, 2:5, 2:5], np.s_[10:13, 2:5, 2:5], np.s_[20:22, 2:4, 2:4])
    predicted = mask(np.s_[2:5, 2:5, 2:5], np.s_[20:22, 2:4, 2:4], np.s_[30:31, 2:3, 2:3])
    found = one_to_one(predicted, truth, MM, 20.0)
    assert (found.found, found.made_up, found.missed) == (2, 1, 1)
    assert found.dice == pytest.approx((1 + 0 + 0) / 3) and found.hd95_mm == pytest.approx((0 + 373 + 373) / 3)
    assert one_to_one(predicted, mask(np.s_[20:22, 2:4, 2:4]), MM, 20.0).dice is None


def test_2023_scores_lesions_one_by_one() -> None:
    """Two lesions of 64 mm^3: one found a voxel off, one missed; a voxel far off is made up. Worked out by hand."""
    truth = mask(np.s_[2:6, 4:8, 4:8], np.s_[20:24, 4:8, 4:8])
    predicted = mask(np.s_[3:7, 4:8, 4:8], np.s_[38:39, 4:5, 4:5])
    found = by_dilation(predicted, truth, MM, GLI)
    assert (found.found, found.made_up, found.missed) == (1, 1, 1)
    assert found.dice == pytest.approx((0.75 + 0 + 0) / 3)
    assert found.hd95_mm == pytest.approx((1 + 374 + 374) / 3)


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),
    [
        (mask(), mask(), (1.0, 0.0, 0, 0, 0)),
        (mask(np.s_[5, 5, 5]), mask(), (0.0, 374.0, 0, 1, 0)),  # one voxel that is not there
        (mask(), mask(np.s_[2:6, 4:8, 4:8]), (0.0, 374.0, 0, 0, 1)),
        (mask(), mask(np.s_[2:7, 4:9, 4:6]), (1.0, 0.0, 0, 0, 0)),  # 50 mm^3: the limit itself is left out
        (mask(), mask(np.s_[2:5, 4:8, 4:8], np.s_[5, 4:7, 4]), (0.0, 374.0, 0, 0, 1)),  # 51 mm^3
        (mask(np.s_[2:3, 4:5, 4:5]), mask(np.s_[2:7, 4:9, 4:6]), (1.0, 0.0, 0, 0, 0)),  # its part is not made up
        (mask(np.s_[:4, :4, :4]), mask(np.s_[:4, :4, :4]), (1.0, 0.0, 1, 0, 0)),  # in the corner of the volume
    ],
)
def test_2023_at_its_edges(predicted: Any, truth: Any, expected: tuple[float, ...]) -> None:
    """Empty and empty, one voxel, a lesion of exactly the limit, a region at the border."""
    found = by_dilation(predicted, truth, MM, GLI)
    assert (found.dice, found.hd95_mm, found.found, found.made_up, found.missed) == expected


def test_2023_one_part_may_find_two_lesions() -> None:
    """It counts for both, whole; lesions in reach of each other are one."""
    bar = mask(np.s_[2:20, 4:8, 4:8])
    apart = mask(np.s_[2:6, 4:8, 4:8], np.s_[16:20, 4:8, 4:8])
    found = by_dilation(bar, apart, MM, GLI)
    assert (found.found, found.made_up, found.missed) == (2, 0, 0)
    assert found.dice == pytest.approx(2 * 64 / (64 + 288))
    near = mask(np.s_[2:6, 4:8, 4:8], np.s_[12:16, 4:8, 4:8])  # six voxels between: two dilations of 3 meet
    assert by_dilation(bar, near, MM, GLI).dice == pytest.approx(2 * 128 / (128 + 288))


def test_2023_limits_are_volumes_and_distances_are_mm() -> None:
    """On voxels of 0.5 x 1 x 3 mm: 32 voxels are 48 mm^3, too small; 36 are 54, and a step along z is 3 mm."""
    assert by_dilation(mask(), mask(np.s_[2:6, 4:8, 4:6]), (0.5, 1.0, 3.0), GLI).missed == 0
    truth = mask(np.s_[2:8, 4:7, 4:6])
    found = by_dilation(mask(np.s_[2:8, 4:7, 5:7]), truth, (0.5, 1.0, 3.0), GLI)
    assert (found.found, found.dice, found.hd95_mm) == (1, 0.5, 3.0)


def test_2024_leaves_small_parts_out_and_merges_the_prediction() -> None:
    """GLI: ten voxels of ET made up cost nothing, eleven do; with 2023's rule both cost."""
    rule = rule_2024("GLI", ENHANCING)
    assert rule and (rule.dilation, rule.limit_mm3, rule.missed_mm) == (3, 10.0, 337.0)
    ten, eleven = mask(np.s_[2:12, 4, 4]), mask(np.s_[2:13, 4, 4])
    assert [by_dilation(m, mask(), MM, rule).made_up for m in (ten, eleven)] == [0, 1]
    assert by_dilation(eleven, mask(), MM, rule).hd95_mm == 337.0
    assert by_dilation(ten, mask(), MM, GLI).made_up == 1
    parted = mask(np.s_[2:8, 4, 4], np.s_[10:16, 4, 4])  # six and six, in reach of each other: twelve
    assert by_dilation(parted, mask(), MM, rule).made_up == 1
    assert by_dilation(parted, mask(), MM, GLI).made_up == 2


def test_2024_lesions_that_touch_one_lesion_of_another_tissue_are_one() -> None:
    """Two ET lesions far apart on one cavity are one lesion; without the cavity two, of which one is missed."""
    ends, cavity = mask(np.s_[2:5, 4:7, 4:7], np.s_[30:33, 4:7, 4:7]), mask(np.s_[5:30, 4:7, 4:7])
    rule, around = rule_2024("GLI", ENHANCING), rule_2024("GLI", CAVITY)
    assert rule and around
    half = mask(np.s_[2:5, 4:7, 4:7])
    apart = by_dilation(half, ends, MM, rule)
    joined = by_dilation(half, ends, MM, rule, {CAVITY: (cavity, around)}, {CAVITY: (mask(), around)})
    assert (apart.found, apart.missed, apart.dice) == (1, 1, 0.5)
    assert (joined.found, joined.missed) == (1, 0)
    assert joined.dice == pytest.approx(2 * 27 / (27 + 54))
    gap = by_dilation(half, ends, MM, rule, {CAVITY: (mask(np.s_[7:28, 4:7, 4:7]), around)}, {})
    assert gap.missed == 1  # two voxels between do not touch


def test_2024_surface_dice_is_the_mean_of_two_shares() -> None:
    """A cube of 27 voxels, one of them alone predicted: 1 of 1 and 6 of 26 surface voxels are within 1 mm."""
    rule = Rule(3, 10.0, 337.0, merge_predicted=False)
    found = by_dilation(mask(np.s_[3, 5, 5]), mask(np.s_[2:5, 4:7, 4:7]), MM, rule)
    assert found.nsd == {0.5: 0.0, 1.0: pytest.approx((0 + 0) / 2 + (6 / 26 + 1) / 2)}


def test_each_challenge_has_its_numbers() -> None:
    """By year and tissue; a set whose names name one challenge is scored by it."""
    assert [(rule_2023(c).dilation, rule_2023(c).limit_mm3) for c in ("GLI", "SSA", "PED", "MEN", "MET")] == [
        (3, 50.0),
        (3, 50.0),
        (3, 50.0),
        (1, 50.0),
        (1, 2.0),
    ]
    gli = {tissue: rule_2024("GLI", tissue) for tissue in ("", CORE, EDEMA, CAVITY, ENHANCING)}
    assert [(r.dilation, r.limit_mm3) for r in gli.values() if r] == [
        (3, 20.0),
        (5, 20.0),
        (3, 20.0),
        (5, 20.0),
        (3, 10.0),
    ]
    assert rule_2024("MEN", "") is None
    assert challenge_of("brats2023", ["BraTS-SSA-00001-000", "BraTS-SSA-00002-000"]) == "SSA"
    assert challenge_of("brats2023", ["BraTS-SSA-00001-000", "BraTS-MEN-00002-000"]) == "GLI"
    assert challenge_of("brats2024_ped", ["x"]) == "PED" and challenge_of("msd", ["BRATS_001"]) == "GLI"


@pytest.mark.parametrize("seed", range(6))
def test_the_crop_changes_nothing(seed: int) -> None:
    """Scores on the box of all voxels are those on a volume with room around."""
    pair = ragged(seed)
    wide = [np.pad(m, 9) for m in pair]
    box = lesions.work_box(wide)
    assert by_dilation(*(m[box] for m in wide), MM, GLI) == by_dilation(*wide, MM, GLI)
    assert by_dilation(*pair, MM, GLI) == by_dilation(*(m[1:, :, :] for m in (np.pad(m, 1) for m in pair)), MM, GLI)
