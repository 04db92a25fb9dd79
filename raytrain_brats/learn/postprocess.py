"""What is made of probabilities: thresholds, small parts, small ET; and how held-out cases teach it. Runs in a task.

In: probabilities of WT, TC, ET on a case's native grid; with the truth, where rules are to be learned.
Out: region masks, nested as label values are; the `Rules` that raise held-out scores.

Thresholds and rules for small ET are from BraTS winners (NVIDIA 2021, KAIST 2021; Isensee et al. 2020, arXiv
2011.00848), limits for parts from Faking it 2023. Keeping only the largest part is not among the candidates: gliomas
are often multifocal, and the 2024 winner's cross-validation lost by it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from raytrain_brats.labels import REGIONS
from raytrain_brats.learn.inference import to_masks
from raytrain_brats.scoring.metrics import Masks

THRESHOLDS = (0.5, 0.4, 0.6, 0.3, 0.7)
PARTS_MM3 = (0.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2000.0)
SMALLEST_ET_MM3 = (0.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
"""Candidates; the first of each changes nothing, and of equals the first is taken: the nearest to it."""
GAIN = 0.002
"""By which a score must rise, and below which a fall is no fall: less is noise on the tens of cases of a fold."""

MARGIN = 6
"""Voxels around all that any candidate marks."""

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Rules:
    """Per region WT, TC, ET; the default only cuts at one half."""

    thresholds: Triple = (0.5, 0.5, 0.5)
    parts_mm3: Triple = (0.0, 0.0, 0.0)
    """Connected parts (26 neighbours) smaller than this are dropped from the region, and what lies in them from those
    within it; but never the largest, or a small tumour would vanish."""
    smallest_et_mm3: float = 0.0
    """Where a case has less ET than this, its ET counts as core."""

    def to_json(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Rules":
        """Raises KeyError, TypeError or ValueError where the values are none."""
        thresholds, parts_mm3 = (tuple(float(v) for v in values[key]) for key in ("thresholds", "parts_mm3"))
        if len(thresholds) != 3 or len(parts_mm3) != 3:
            raise ValueError("three values, of WT, TC and ET, are needed")
        return cls(thresholds, parts_mm3, float(values["smallest_et_mm3"]))

    def of(self, row: int, other: "Rules") -> "Rules":
        """These rules with those of `other` for one region."""
        changed = {
            name: (*getattr(self, name)[:row], getattr(other, name)[row], *getattr(self, name)[row + 1 :])
            for name in ("thresholds", "parts_mm3")
        }
        return replace(self, **changed, smallest_et_mm3=other.smallest_et_mm3 if row == 2 else self.smallest_et_mm3)

    def in_words(self) -> list[str]:
        """What they change, one line a rule."""
        lines = [f"{r}: probability over {t:g}" for r, t in zip(REGIONS, self.thresholds, strict=True) if t != 0.5]
        lines += [f"{r}: parts under {v:g} mm3 dropped" for r, v in zip(REGIONS, self.parts_mm3, strict=True) if v]
        return lines + ([f"ET under {self.smallest_et_mm3:g} mm3 in all counts as core"] * bool(self.smallest_et_mm3))


def masks_by(rules: Rules, probabilities: npt.NDArray[np.float32], voxel_mm3: float) -> Masks:
    """(3, x, y, z) masks of (3, x, y, z) probabilities, ET in TC in WT."""
    masks = to_masks(probabilities, rules.thresholds)
    if masks[2].sum() * voxel_mm3 < rules.smallest_et_mm3:
        masks[2] = False  # it stays in TC
    for row, limit in enumerate(rules.parts_mm3):
        if row:
            masks[row] &= masks[row - 1]
        masks[row] = without_small_parts(masks[row], limit / voxel_mm3)
    return masks


def without_small_parts(mask: npt.NDArray[np.bool_], voxels: float) -> npt.NDArray[np.bool_]:
    """The connected parts (26 neighbours) of at least so many voxels, and the largest of all."""
    if voxels <= 1 or not mask.any():
        return mask
    parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    large = sizes >= min(voxels, sizes.max())
    kept: npt.NDArray[np.bool_] = large[parts]
    return kept


Value = Callable[[npt.NDArray[np.bool_], npt.NDArray[np.bool_]], tuple[float, float]]
"""(Dice, lesion-wise Dice) of one region's predicted and true mask."""


def candidates(row: int) -> list[Rules]:
    """Rules for one region alone; the first is the default."""
    plain = Rules()
    smallest = SMALLEST_ET_MM3 if row == 2 else (0.0,)
    return [
        plain.of(row, Rules((threshold,) * 3, (part_mm3,) * 3, et_mm3))
        for threshold in THRESHOLDS
        for part_mm3 in PARTS_MM3
        for et_mm3 in smallest
    ]


def tried(
    probabilities: npt.NDArray[np.float32], truth: Masks, voxel_mm3: float, value: Value
) -> list[npt.NDArray[np.float64]]:
    """Per region, (candidates, 3, 2): what `value` gives for one case by each of its candidates, for every region: they
    are nested, so that a rule of one changes the others."""
    anything = (probabilities > min(THRESHOLDS)).any(0) | truth.any(0)
    if anything.any():  # the rest of the volume has a voice in nothing; lesions are dilated by a few voxels
        box = tuple(slice(max(0, int(at.min()) - MARGIN), int(at.max()) + MARGIN + 1) for at in np.nonzero(anything))
        probabilities, truth = probabilities[(slice(None), *box)], truth[(slice(None), *box)]
    known: dict[tuple[int, bytes], tuple[float, float]] = {}  # most candidates leave the same mask

    def of_region(region: int, mask: npt.NDArray[np.bool_]) -> tuple[float, float]:
        key = region, np.packbits(mask).tobytes()
        if key not in known:
            known[key] = value(mask, truth[region])
        return known[key]

    return [
        np.array(
            [
                [of_region(region, mask) for region, mask in enumerate(masks_by(rules, probabilities, voxel_mm3))]
                for rules in candidates(row)
            ]
        )
        for row in range(len(REGIONS))
    ]


@dataclass(frozen=True)
class Learned:
    rules: Rules
    before: dict[str, list[float]]
    after: dict[str, list[float]]
    """{region: means of (Dice, lesion-wise Dice)}; `after`: of each case by rules that the other cases taught."""


def learn(cases: Sequence[list[npt.NDArray[np.float64]]]) -> Learned:
    """Per region the candidate with the best mean, where it helps cases that had no part in choosing it.

    `cases`: what `tried` gave for each. A region keeps the default when the best gains it less than GAIN, costs it Dice
    or another region Dice or lesions, or when leaving one case out after the other shows no gain.
    """
    rules, before, after = Rules(), {}, {}
    for row, region in enumerate(REGIONS):
        values = np.stack([tables[row] for tables in cases])  # (case, candidate, region, 2)
        others = [_best(np.delete(values, case, 0), row) if len(values) > 1 else 0 for case in range(len(values))]
        plain = values[:, 0].mean(0)
        left_out = np.mean([values[case, best] for case, best in enumerate(others)], axis=0)
        if left_out[row].mean() > plain[row].mean() and _harmless(left_out, plain, row):
            rules = rules.of(row, candidates(row)[_best(values, row)])
        else:
            left_out = plain
        before[region], after[region] = plain[row].round(4).tolist(), left_out[row].round(4).tolist()
    return Learned(rules, before, after)


def _best(values: npt.NDArray[np.float64], row: int) -> int:
    """Of (case, candidate, region, 2): the candidate whose mean in its own region is highest; 0, the default, unless it
    gains enough and harms none."""
    means = values.mean(0)
    totals = np.where(_harmless(means, means[0], row), means[:, row].mean(1), -np.inf)
    best = int(totals.argmax())
    return best if totals[best] > totals[0] + GAIN else 0


def _harmless(means: npt.NDArray[np.float64], plain: npt.NDArray[np.float64], row: int) -> npt.NDArray[np.bool_]:
    """Of (..., region, 2): whether Dice falls nowhere, nor lesions in another region than `row`."""
    limits = plain - GAIN
    limits[row, 1] = -np.inf  # weighed against Dice there
    return np.all(means > limits, axis=(-2, -1))  # type: ignore[no-any-return]
