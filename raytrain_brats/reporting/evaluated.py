"""What an evaluation says, for people: spread, lesions, volumes, outliers, and by which rules masks were made.

In: `evaluation/` and `postprocessing.json` of a run folder, of this or an earlier version; its validations.
Out: numbers by region, sentences.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from raytrain_brats import storage
from raytrain_brats.labels import REGIONS
from raytrain_brats.reporting import scores
from raytrain_brats.reporting.scores import Statistics

Row = Mapping[str, Any]
YEAR = "2023"
"""Of the lesion-wise rule at the top of the page; all years are in its table."""
_LESIONS = ("tp", "fn", "fp")


@dataclass(frozen=True)
class Evaluated:
    """Empty where nothing was evaluated; `cases`: worst first."""

    summary: dict[str, Any] = field(default_factory=dict)
    cases: list[Row] = field(default_factory=list)
    learned: dict[str, Any] = field(default_factory=dict)
    """postprocessing.json, where it holds the rules that were applied."""

    @cached_property
    def statistics(self) -> dict[str, Statistics]:
        return scores.by_column(self.cases)

    @cached_property
    def outliers(self) -> set[tuple[str, str]]:
        """(case, column)"""
        return scores.outliers(self.cases, self.statistics)

    def region(self, region: str) -> dict[str, Any]:
        """What stands at the top: Dice and its spread, HD95, the lesions of YEAR."""
        found = self.statistics
        counted = [f"lesion_{kind}_{YEAR}_{region}" for kind in _LESIONS]
        sums = [sum(scores.number(row.get(column)) or 0 for row in self.cases) for column in counted]
        return {
            "dice": found.get(f"dice_{region}"),
            "hd95": found.get(f"hd95_{region}_mm"),
            "lesion": found.get(f"lesion_dice_{YEAR}_{region}"),
            "lesions": [int(n) for n in sums] if all(column in found for column in counted) else None,
        }

    @property
    def has_volumes(self) -> bool:
        return any(f"volume_{REGIONS[0]}_truth_ml" in row for row in self.cases)


def read(run_dir: str, files: Mapping[str, int]) -> Evaluated:
    """Of a run folder with these files, as far as they are there."""

    def content(name: str) -> bytes:
        return storage.read_bytes(storage.join(run_dir, name)) if name in files else b""

    summary = json.loads(content("evaluation/summary.json") or b"{}")
    cases = scores.worst_first(scores.read(content("evaluation/cases.csv").decode()))
    try:
        learned = json.loads(content("postprocessing.json") or b"{}")
        applied = bool(learned) and learned.get("rules") == summary.get("postprocessing")
    except (ValueError, AttributeError):  # `predict` refuses it; a page is written all the same
        learned, applied = {}, False
    return Evaluated(summary, list(cases), learned if applied else {})


def how(evaluated: Evaluated) -> list[str]:
    """By which cases, images, thresholds and rules the masks were made that were scored."""
    summary = evaluated.summary
    if not summary:
        return []
    return [_which_cases(summary), *_images(summary), *_rules(summary, evaluated.learned), *_reading(evaluated)]


def _which_cases(summary: Row) -> str:
    kinds = {"val": "held-out cases", "train": "cases that the run was TRAINED on", "all": "cases, trained on or not"}
    cases, of = summary.get("cases", "?"), summary.get("held_out")
    left = f"; {of - cases} could not be read" if isinstance(of, int) and of != cases else ""
    which = kinds.get(str(summary.get("split")), "cases")
    return f"{cases} {which}{left}; checkpoint {summary.get('checkpoint', 'unknown')}."


def _images(summary: Row) -> list[str]:
    if "mirror" not in summary:
        return []
    views = "averaged over the image and its seven mirror images" if summary["mirror"] else "of one image, not mirrored"
    return [f"Probabilities are {views}."]


def _rules(summary: Row, learned: Row) -> list[str]:
    """Thresholds and post-processing in words."""
    rules = summary.get("postprocessing")
    if not isinstance(rules, dict):
        return ["Thresholds and post-processing are not recorded: the evaluation is of an older version."]
    limits, parts_mm3 = (dict(zip(REGIONS, rules[key], strict=True)) for key in ("thresholds", "parts_mm3"))
    if len(set(limits.values())) == 1:
        words = [f"A voxel belongs to a region where its probability is over {limits['WT']:g}"]
    else:
        each = ", ".join(f"to {region} over {limit:g}" for region, limit in limits.items())
        words = [f"A voxel belongs by its probability {each}"]
    words[0] += "; ET lies within TC, TC within WT."
    dropped = [f"under {mm3:g} mm³ from {region}" for region, mm3 in parts_mm3.items() if mm3]
    if dropped:
        words.append(f"Connected parts are dropped {', '.join(dropped)}, but never the largest.")
    if smallest := rules.get("smallest_et_mm3"):
        words.append(f"Where a case has less than {smallest:g} mm³ of ET, its ET counts as core.")
    if not dropped and not smallest and set(limits.values()) == {0.5}:
        return [*words, "No post-processing changes the masks."]
    if learned:
        words.append(f"These rules were learned on {learned.get('cases', '?')} held-out cases{_gain(learned)}.")
    return words


def _gain(learned: Row) -> str:
    """Dice before and after, of each case by rules that the others taught."""
    before, after = learned.get("before") or {}, learned.get("after") or {}
    changed = [r for r in REGIONS if before.get(r) and after.get(r) and before[r] != after[r]]
    told = ", ".join(f"{r} {before[r][0]:.3f} to {after[r][0]:.3f}" for r in changed)
    return f"; by rules that the other cases taught, Dice goes from {told}" if told else ""


def _reading(evaluated: Evaluated) -> list[str]:
    words = []
    if any(f"lesion_dice_{YEAR}" in column for column in evaluated.statistics):
        challenge = evaluated.summary.get("challenge", "GLI")
        words.append(
            f"Lesion-wise: BraTS's rule of {YEAR} for {challenge}; other years are in the table of all scores."
        )
    if len(evaluated.cases) >= scores.FEWEST:
        words.append("▼ marks an outlier: beyond the quartile by over 1.5 times the distance between quartiles.")
    return words


def why_others(validations: Sequence[Row], evaluated: Evaluated, config: Row, launch: Row) -> list[str]:
    """Why a validation while training has another number of cases, or another Dice, than the evaluation."""
    if not validations or not evaluated.summary:
        return []
    seen, scored = validations[-1].get("cases"), evaluated.summary.get("cases")
    settings = config.get("validate") if isinstance(config.get("validate"), dict) else {}
    most, held_out = (settings or {}).get("max_cases"), launch.get("cases_val")
    words = []
    if seen != scored:
        words.append(f"While the run trained, validation scored {seen} cases; the evaluation scored {scored}.")
        if isinstance(most, int) and isinstance(held_out, int) and most < held_out:
            words.append(f"Validation takes {most} of the {held_out} held-out cases (validate.max_cases={most}).")
        if isinstance(held_out, int) and isinstance(seen, int) and seen < min(held_out, most or held_out):
            words.append("Cases that could not be read are left out; they are named under quarantined cases.")
        if evaluated.summary.get("split") not in ("val", None):
            words.append(f"The evaluation is of split {evaluated.summary['split']}, not of the held-out cases alone.")
    if evaluated.summary.get("mirror") and not (settings or {}).get("mirror"):
        words.append("Validation looks at one image, the evaluation at eight mirror images: its Dice is another.")
    return words
