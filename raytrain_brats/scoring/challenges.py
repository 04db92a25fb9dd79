"""Which challenge scores which region by which numbers, year by year. Runs in predict tasks and the driver.

In: a label convention, a challenge of BraTS, a region.
Out: the numbers of that year's lesion-wise rule; None where the challenge had no such rule. Sources: docs/metrics.md.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from raytrain_brats.labels import CAVITY, CORE, EDEMA, ENHANCING, known, regions

_BY_CONVENTION = {"brats2024_ped": "PED", "brats2024_met": "MET"}
_NAMED = re.compile(r"^BraTS-(GLI|SSA|PED|MEN|MET)-")


@dataclass(frozen=True)
class Rule:
    """Of one region in one year; see `lesions`."""

    dilation: int
    """Steps by which a lesion reaches around itself: parts in reach of each other are one lesion."""
    limit_mm3: float
    """Lesions of the truth up to this volume are not scored."""
    missed_mm: float
    """HD95 of a lesion that was not found, and of one that is not there."""
    merge_predicted: bool = False
    """Whether the prediction's parts are merged like the truth's, and dropped up to `limit_mm3` voxels."""
    touching: tuple[str, ...] = ()
    """Tissues: lesions that touch the same lesion of one of these are one lesion."""


def challenge_of(convention: str, case_ids: Iterable[str]) -> str:
    """The challenge by whose numbers cases are scored: by their convention, else by their names where these agree, else
    GLI."""
    named = {match[1] for match in map(_NAMED.match, case_ids) if match}
    return _BY_CONVENTION.get(convention) or (named.pop() if len(named) == 1 else "GLI")


def tissue_of(convention: str, region: str) -> str:
    """The tissue that a region is; "" for one of several."""
    values = regions(convention)[region]
    return known(convention).tissue[values[0]] if len(values) == 1 else ""


def rule_2023(challenge: str) -> Rule:
    """The same for all regions."""
    dilation, limit_mm3 = {"MEN": (1, 50.0), "MET": (1, 2.0)}.get(challenge, (3, 50.0))
    return Rule(dilation, limit_mm3, 374.0)


_TOUCHING_2024 = {  # in GLI's own order, as the merges of one pair of tissues may decide those of the next
    CORE: (ENHANCING, CAVITY),
    ENHANCING: (CORE, CAVITY),
    CAVITY: (ENHANCING, CORE),
    EDEMA: (ENHANCING, CAVITY, CORE),
}


def rule_2024(challenge: str, tissue: str) -> Rule | None:
    """Of a region that is this tissue ("" for WT and TC). GLI's for all that came before too; None for MEN.

    GLI was to dilate SNFH by 5; its code spells it SFNH there, so 3 is what everybody was scored by.
    """
    if challenge == "MEN":
        return None
    if challenge == "PED":
        return Rule(5, 10.0, 374.0, merge_predicted=True)
    if challenge in ("SSA", "MET"):
        dilation, limit_mm3 = (3, 50.0) if challenge == "SSA" else (1, 2.0)
        return Rule(dilation, limit_mm3, 374.0, touching=(CORE,) if tissue == ENHANCING else ())
    dilation = 5 if tissue in (CORE, CAVITY) else 3
    limit_mm3 = 10.0 if tissue == ENHANCING else 20.0
    return Rule(dilation, limit_mm3, 337.0, merge_predicted=True, touching=_TOUCHING_2024.get(tissue, ()))


def large_2026_mm3(challenge: str) -> float | None:
    """MET in 2026 scores lesions of at least this volume, and counts lesions that are not there; None elsewhere."""
    return 20.0 if challenge == "MET" else None
