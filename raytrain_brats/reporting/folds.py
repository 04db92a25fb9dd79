"""Scores of a cross-validation, fold by fold.

In: scores of cases, each with the fold that held it out.
Out: each fold's means; their mean and standard deviation, which says how much of a score is the choice of cases.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from raytrain_brats.labels import REGIONS
from raytrain_brats.reporting import scores

Row = Mapping[str, Any]
_KINDS = {"dice": ("dice", ""), "hd95_mm": ("hd95", "_mm")}


def means(rows: Sequence[Row]) -> dict[int, dict[str, Any]]:
    """{fold: {"cases": n, "dice": {region: mean}, "hd95_mm": {region: mean}}}."""
    found = {}
    for fold in sorted({int(row["fold"]) for row in rows}):
        own = [row for row in rows if int(row["fold"]) == fold]
        by_column = scores.by_column(own)
        found[fold] = {"cases": len(own)} | {
            kind: {r: round(by_column[f"{name}_{r}{unit}"].mean, scores.DIGITS) for r in REGIONS}
            for kind, (name, unit) in _KINDS.items()
        }
    return found


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """For JSON: the folds, and mean and sample standard deviation of their means (None of a single fold)."""
    found = means(rows)
    over: dict[str, Any] = {"mean": {}, "sd": {}}
    for kind in _KINDS:
        values = {r: [fold[kind][r] for fold in found.values()] for r in REGIONS}
        over["mean"][kind] = {r: round(statistics.fmean(v), scores.DIGITS) for r, v in values.items()}
        over["sd"][kind] = {
            r: round(statistics.stdev(v), scores.DIGITS) if len(v) > 1 else None for r, v in values.items()
        }
    return {"folds": {str(fold): numbers for fold, numbers in found.items()}, "over_folds": over}


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """A table's lines: fold, cases, Dice and HD95 by region; the mean over folds and its spread below."""
    found, over = means(rows), summary(rows)["over_folds"]
    table = [[str(fold), str(numbers["cases"]), *_cells(numbers)] for fold, numbers in found.items()]
    return [*table, ["mean of folds", str(len(rows)), *_cells(over["mean"])], ["sd of folds", "", *_cells(over["sd"])]]


def _cells(numbers: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    return [
        "-" if value is None else f"{value:.{places}f}"
        for kind, places in (("dice", 3), ("hd95_mm", 1))
        for value in (numbers[kind][r] for r in REGIONS)
    ]
