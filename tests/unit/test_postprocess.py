"""What is made of probabilities, and how held-out cases teach it."""

from typing import Any

import numpy as np
import pytest

from raytrain_brats.learn import postprocess
from raytrain_brats.learn.inference import to_masks
from raytrain_brats.learn.postprocess import Rules, candidates, learn, masks_by, tried

SHAPE = (3, 24, 20, 18)


def case(seed: int, false_part: int = 0, shift: float = 0.0) -> tuple[Any, Any]:
    """(probabilities, truth): nested boxes that are found but for noise; a far part of `false_part` voxels that is not
    there; probabilities lowered by `shift`."""
    random = np.random.default_rng(seed)
    truth = np.zeros(SHAPE, bool)
    for row, edge in enumerate((5, 6, 7)):
        truth[row, edge : 18 - edge + 6, edge:14, edge:14] = True
    found = np.where(truth, 0.9, 0.05) + random.uniform(-0.04, 0.04, SHAPE) - np.where(truth, shift, 0)
    found[0, 22, 0:false_part, 16] = 0.8
    return found.astype(np.float32), truth


def value(predicted: Any, truth: Any) -> tuple[float, float]:
    """Dice, and Dice over the parts."""
    size = int(predicted.sum()) + int(truth.sum())
    dice = 2 * int((predicted & truth).sum()) / size if size else 1.0
    parts = len(np.unique(postprocess.ndimage.label(predicted, np.ones((3, 3, 3)))[0])) - 1
    return dice, dice / max(1, parts)


def learned(cases: list[tuple[Any, Any]], voxel_mm3: float = 30.0) -> postprocess.Learned:
    return learn([tried(found, truth, voxel_mm3, value) for found, truth in cases])


def test_default_rules_are_the_cut_at_one_half() -> None:
    found = np.random.default_rng(0).random(SHAPE, np.float32)
    np.testing.assert_array_equal(masks_by(Rules(), found, 1.0), to_masks(found))


def test_what_rules_make_stays_nested() -> None:
    """ET in TC in WT, whichever parts of which region are dropped."""
    for seed in range(10):
        random = np.random.default_rng(seed)
        found = random.random(SHAPE, np.float32) ** 3
        parts = tuple(float(v) for v in random.integers(0, 9, 3))
        rules = Rules(tuple(float(v) for v in random.uniform(0.2, 0.8, 3)), parts, float(random.integers(0, 400)))
        wt, tc, et = masks_by(rules, found, 1.0)
        assert not (et & ~tc).any() and not (tc & ~wt).any()
        for mask, limit in ((wt, parts[0]), (tc, parts[1]), (et, parts[2])):
            labelled, number = postprocess.ndimage.label(mask, np.ones((3, 3, 3)))
            sizes = [int((labelled == n).sum()) for n in range(1, number + 1)]
            assert all(size >= min(limit, max(sizes)) for size in sizes)


def test_little_enhancing_tumour_is_core() -> None:
    """All of it, not part by part; as much as the limit stays."""
    found, truth = case(0)
    volume = float(truth[2].sum()) * 2.0
    assert masks_by(Rules(smallest_et_mm3=volume), found, 2.0)[2].any()
    wt, tc, et = masks_by(Rules(smallest_et_mm3=volume + 1), found, 2.0)
    assert not et.any() and (tc[truth[2]]).all() and (wt == to_masks(found)[0]).all()


def test_the_largest_part_stays_however_small() -> None:
    """A tumour smaller than the limit is not lost."""
    found, truth = case(0, false_part=3)
    np.testing.assert_array_equal(masks_by(Rules(parts_mm3=(1e9, 1e9, 1e9)), found, 1.0), truth)


def test_a_part_of_exactly_the_limit_stays() -> None:
    found, _ = case(0, false_part=5)
    assert masks_by(Rules(parts_mm3=(10.0, 0.0, 0.0)), found, 2.0)[0, 22].sum() == 5
    assert masks_by(Rules(parts_mm3=(10.1, 0.0, 0.0)), found, 2.0)[0, 22].sum() == 0


def test_parts_that_are_not_there_teach_a_limit_for_their_region_alone() -> None:
    found = learned([case(seed, false_part=seed % 4) for seed in range(8)])
    assert found.rules.parts_mm3[0] == 100.0  # 3 voxels of 30 mm3; the least limit that drops them
    assert found.rules.parts_mm3[1:] == (0.0, 0.0) and found.rules.thresholds == (0.5, 0.5, 0.5)
    assert found.after["WT"][1] > found.before["WT"][1] and found.after["ET"] == found.before["ET"]
    assert found.rules.in_words() == ["WT: parts under 100 mm3 dropped"]


def test_low_probabilities_teach_a_threshold() -> None:
    found = learned([case(seed, shift=0.45) for seed in range(6)])
    assert found.rules.thresholds == (0.4, 0.4, 0.4)
    assert all(found.after[r][0] > 0.95 > found.before[r][0] for r in found.before)


def test_what_helps_one_case_alone_is_not_kept() -> None:
    """A rule must help cases that had no part in choosing it."""
    found = learned([case(0, false_part=3)] + [case(seed) for seed in range(1, 6)])
    assert found.rules == Rules() and found.after == found.before


def test_a_rule_that_costs_another_region_is_not_kept() -> None:
    """A lower threshold finds more ET, and far from it makes core and tumour of what is none, as they are nested."""
    weak = []
    for seed in range(6):
        found, truth = case(seed)
        found[2][truth[2]] = np.where(np.arange(truth[2].sum()) % 2, 0.9, 0.35)
        found[2, 0:2, 16:19, 0:6] = 0.35  # some of a lesion's size
        weak.append((found, truth))
    alone = [[np.repeat(table[:, 2:], 3, 1) for table in tried(*each, 30.0, value)] for each in weak]
    assert learn(alone).rules.thresholds[2] == 0.3  # as ET alone would have it
    assert learned(weak).rules.thresholds[2] == 0.5


def test_one_case_teaches_nothing() -> None:
    assert learned([case(0, false_part=3)]).rules == Rules()


def test_rules_survive_their_file() -> None:
    rules = Rules((0.4, 0.5, 0.6), (100.0, 0.0, 50.0), 200.0)
    assert Rules.from_json(rules.to_json()) == rules
    with pytest.raises((KeyError, ValueError, TypeError)):
        Rules.from_json(rules.to_json() | {"thresholds": [0.5]})


@pytest.mark.parametrize("row", range(3))
def test_the_first_candidate_changes_nothing(row: int) -> None:
    assert candidates(row)[0] == Rules()
    assert len(set(candidates(row))) == len(candidates(row))
