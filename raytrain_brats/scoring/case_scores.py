"""Every score of one case, by region, rule and year. Runs in predict tasks.

In: two label volumes on one grid, each with its convention; the voxel's edges in mm.
Out: {column: number}; what each column is: docs/metrics.md. A region that the prediction cannot hold is
"not predicted".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raytrain_brats.labels import known, regions, regions_of_network
from raytrain_brats.scoring import lesions, surfaces
from raytrain_brats.scoring.challenges import Rule, large_2026_mm3, rule_2023, rule_2024, tissue_of
from raytrain_brats.scoring.lesions import LesionScores
from raytrain_brats.scoring.metrics import dice_of, hd95_mm_of
from raytrain_brats.scoring.surfaces import Mask, Spacing

Label = npt.NDArray[np.uint8]
Value = float | int | str | None
NOT_PREDICTED = "not predicted"
NSD_MM = 1.0
VOLUME = "volume_"
IMPLEMENTATIONS = {
    "hd95": "MONAI, voxels at the edge, the larger of two 95th percentiles; one empty 373.13, both 0",
    "hd95_2023": "surfels as DeepMind's surface-distance; one empty 374, both 0",
    "hd95_2024": "as 2023, one empty 337 for GLI",
    "hd95_2026": "voxels at the edge, 95th percentile over both surfaces; one empty 373, both 0",
    "nsd_1mm": "surfels as DeepMind's surface-distance; one empty 0, both 1",
    "dice": "one empty 0, both 1; mean_nonempty leaves cases out where both are empty, as nnU-Net does",
}


@dataclass(frozen=True)
class Reading:
    """A label volume and what its values mean; `only`: the regions that it can hold, None for all of its convention."""

    label: Label
    convention: str
    only: Sequence[str] | None = None

    def region(self, name: str) -> Mask | None:
        """None where the volume cannot hold it."""
        values = regions(self.convention).get(name)
        if values is None or (self.only is not None and name not in self.only):
            return None
        return np.isin(self.label, values)

    def tissues(self) -> dict[str, Mask]:
        return {tissue: self.label == value for value, tissue in known(self.convention).tissue.items()}


def of_network(label: Label, convention: str) -> Reading:
    """What a network of WT, TC and ET wrote: other regions are no more than these three determine."""
    return Reading(label, convention, regions_of_network(convention))


def columns(predicted: Reading, truth: Reading, spacing_mm: Sequence[float], challenge: str) -> dict[str, Value]:
    """All scores of a case, in native geometry. `challenge` gives the numbers of lesion-wise rules (`challenges`)."""
    edges_mm = _edges(spacing_mm)
    box = lesions.work_box([predicted.label > 0, truth.label > 0])
    predicted, truth = (Reading(r.label[box], r.convention, r.only) for r in (predicted, truth))
    by_region = {r: _region(r, predicted, truth, edges_mm, challenge) for r in regions(truth.convention)}
    names = list(dict.fromkeys(name for found in by_region.values() for name in found))
    rows = {name: {r: found.get(name) for r, found in by_region.items()} for name in names}
    for region, found in by_region.items():
        if not found:
            rows = {name: row | {region: NOT_PREDICTED} for name, row in rows.items()}
    return {_column(name, region): value for name, row in rows.items() for region, value in row.items()}


def _edges(spacing_mm: Sequence[float]) -> Spacing:
    # 1.0000001 mm of a float32 header are 1 mm, or surfaces a voxel apart would not be within 1 mm
    x, y, z = (round(float(edge), 5) for edge in spacing_mm)
    return x, y, z


def _column(name: str, region: str) -> str:
    if name.startswith(VOLUME):  # not a score: its name ends in no region
        return f"volume_{region}_{name.removeprefix(VOLUME)}_ml"
    return f"{name}_{region}_mm" if "hd95" in name else f"{name}_{region}"


def _region(region: str, predicted: Reading, truth: Reading, spacing_mm: Spacing, challenge: str) -> dict[str, Value]:
    """Scores by name, of which the region is no part; empty where it is not predicted."""
    ours, true = predicted.region(region), truth.region(region)
    assert true is not None
    if ours is None:
        return {}
    tissue = tissue_of(truth.convention, region)
    first, second = rule_2023(challenge), rule_2024(challenge, tissue)
    found: dict[str, Value] = {"dice": dice_of(ours, true), "hd95": hd95_mm_of(ours, true, spacing_mm)}
    found |= _whole(ours, true, spacing_mm, {2023: first.missed_mm} | ({2024: second.missed_mm} if second else {}))
    found |= _listed("2023", lesions.by_dilation(ours, true, spacing_mm, first), nsd=False)
    if second:
        found |= _listed("2024", _of_2024(ours, true, predicted, truth, spacing_mm, second, challenge))
    last = lesions.one_to_one(ours, true, spacing_mm, large_2026_mm3(challenge))
    found |= _listed("2026", last) | {"lesion_f1_2026": lesions.f1(last)}
    empty = {(False, False): "both", (False, True): "prediction", (True, False): "truth"}
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    volumes: dict[str, Value] = {
        f"{VOLUME}truth": float(true.sum()) * voxel_ml,
        f"{VOLUME}prediction": float(ours.sum()) * voxel_ml,
    }
    return found | {"empty": empty.get((bool(ours.any()), bool(true.any())), "")} | volumes


def _whole(ours: Mask, true: Mask, spacing_mm: Spacing, missed_mm: Mapping[int, float]) -> dict[str, Value]:
    """HD95 and surface Dice of whole regions, by the definitions of each year."""
    missed_mm = {**missed_mm, 2026: lesions.MISSED_2026_MM}
    if not ours.any() or not true.any():
        same = not ours.any() and not true.any()
        far: dict[str, Value] = {f"hd95_{year}": 0.0 if same else mm for year, mm in missed_mm.items()}
        return far | {f"nsd_{NSD_MM:g}mm": float(same)}
    corners = surfaces.surfels(ours, true, spacing_mm)
    pooled = surfaces.pooled_hd95_mm(surfaces.edge_voxels(ours, true, spacing_mm))
    known_mm = dict.fromkeys(missed_mm, surfaces.hd95_mm(corners)) | {2026: pooled}
    distances: dict[str, Value] = {f"hd95_{year}": mm for year, mm in known_mm.items()}
    return distances | {f"nsd_{NSD_MM:g}mm": surfaces.surface_dice(corners, NSD_MM)}


def _of_2024(
    ours: Mask, true: Mask, predicted: Reading, truth: Reading, spacing_mm: Spacing, rule: Rule, challenge: str
) -> LesionScores:
    def around(reading: Reading) -> dict[str, tuple[Mask, Rule]]:
        rules = {name: rule_2024(challenge, name) for name in rule.touching}
        return {name: (mask, own) for name, mask in reading.tissues().items() if (own := rules.get(name))}

    return lesions.by_dilation(ours, true, spacing_mm, rule, around(truth), around(predicted))


def _listed(year: str, scores: LesionScores, nsd: bool = True) -> dict[str, Value]:
    found: dict[str, Value] = {f"lesion_dice_{year}": scores.dice, f"lesion_hd95_{year}": scores.hd95_mm}
    if nsd:  # in 2026 the tolerance is the voxel's smallest edge
        for tolerance_mm, value in scores.nsd.items():
            found["lesion_nsd_2026" if year == "2026" else f"lesion_nsd_{tolerance_mm:g}mm_{year}"] = value
    counts: dict[str, Any] = {"tp": scores.found, "fp": scores.made_up, "fn": scores.missed}
    return found | {f"lesion_{name}_{year}": count for name, count in counts.items()}
