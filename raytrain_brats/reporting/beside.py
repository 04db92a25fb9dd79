"""A run beside an earlier one: scores, speed, cost, settings; and what makes the two no fair comparison.

In: what the page knows of both runs. Out: lines of tables, sentences.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytrain_brats.config import flat
from raytrain_brats.labels import REGIONS
from raytrain_brats.reporting import scores
from raytrain_brats.reporting.evaluated import YEAR, Evaluated

Row = Mapping[str, Any]
_ALIKE = {
    "split": "split", "identity": "data", "data": "kind of data", "mirror": "mirroring",
    "postprocessing": "post-processing", "convention": "label convention", "challenge": "lesion rule",
}  # fmt: skip
_METRICS = {"dice": "Dice", "hd95": "HD95", f"lesion_dice_{YEAR}": f"lesion-wise Dice {YEAR}"}
_SPEED: dict[str, tuple[int, bool | None]] = {  # (digits, whether lower is better)
    "samples seen": (0, None), "final loss": (4, None), "samples / s": (2, False), "goodput": (3, False),
    "wall time, h": (2, True), "cost, $": (2, True),
}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One of the two runs; numbers that are not known are NaN."""

    name: str
    evaluated: Evaluated
    about: Row
    """Its config.yaml."""
    speed: Mapping[str, float]
    """{name: number} of the run's headline."""


@dataclass(frozen=True)
class Line:
    what: str
    here: float
    there: float
    digits: int
    lower_is_better: bool | None = False
    """None: neither is."""

    @property
    def change(self) -> float:
        return self.here - self.there

    @property
    def verdict(self) -> str:
        """better, worse, or nothing where it is the same as shown, or no matter of better."""
        if self.lower_is_better is None or abs(self.change) < 0.5 * 10**-self.digits or self.change != self.change:
            return ""
        return "better" if (self.change < 0) == self.lower_is_better else "worse"


def lines(here: Side, there: Side) -> list[Line]:
    """Of the scores that both have, then of speed and cost."""
    rows = []
    for column in [c for c in here.evaluated.statistics if c in there.evaluated.statistics]:
        name = scores.name_of(column)
        if not name or name[0] not in _METRICS or name[1] not in REGIONS:
            continue
        one, other = here.evaluated.statistics[column], there.evaluated.statistics[column]
        digits, lower = (1, True) if one.unit else (3, False)
        label = f"{_METRICS[name[0]]} {name[1]}{one.unit and ' mm'}"
        rows.append(Line(f"{label}, mean", one.mean, other.mean, digits, lower))
        if name[0] == "dice":
            rows.append(Line(f"{label}, median", one.median, other.median, digits, lower))
    for what, value in here.speed.items():
        rows.append(Line(what, value, there.speed.get(what, math.nan), *_SPEED[what]))
    return rows


def paired(here: Side, there: Side) -> str:
    """How the cases that both scored went, by mean Dice; "" where there is none."""
    before = {str(row["case"]): scores.mean_dice(row) for row in there.evaluated.cases}
    pairs = [(scores.mean_dice(r), before[str(r["case"])]) for r in here.evaluated.cases if str(r["case"]) in before]
    gains = [now - then for now, then in pairs if now + then < float("inf")]
    if not gains:
        return ""
    better, worse = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
    return (
        f"{len(gains)} cases were scored by both: {better} better here, {worse} worse; the median difference of their "
        f"mean Dice is {statistics.median(gains):+.3f}."
    )


def cautions(here: Side, there: Side) -> list[str]:
    """What of the two evaluations is not alike."""
    one, other = here.evaluated.summary, there.evaluated.summary
    if not one or not other:
        missing = " and ".join(side.name for side in (here, there) if not side.evaluated.summary)
        return [f"Not evaluated: {missing} (`raytrain-brats evaluate` does)."]
    told = [words for key, words in _ALIKE.items() if one.get(key) != other.get(key)]
    names = [{str(row["case"]) for row in side.evaluated.cases} for side in (here, there)]
    if names[0] != names[1]:
        told.append(f"cases ({len(names[0])} and {len(names[1])}, {len(names[0] & names[1])} in both)")
    return [f"Not the same in both evaluations, so no fair comparison: {', '.join(told)}."] if told else []


def settings(here: Side, there: Side) -> list[tuple[str, str, str]]:
    """(key, here, there) of what differs."""
    left_out = {"labels", "modalities", "synthetic"}  # the convention says as much
    one, other = (
        {key: str(value) for key, value in flat({k: v for k, v in side.about.items() if k not in left_out}).items()}
        for side in (here, there)
    )
    keys = [*one, *(key for key in other if key not in one)]
    return [(key.removeprefix("config."), one.get(key, "–"), other.get(key, "–")) for key in keys
            if one.get(key) != other.get(key)]  # fmt: skip
