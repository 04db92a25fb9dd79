"""Scores of many cases as tables: one line a case, one line a column with both means, quartiles and the worst case.

In: {column: value} of each case, or the cases.csv of an evaluation, of this or an earlier version.
Out: CSV, and for each column its statistics. What the columns are: docs/metrics.md.
"""

import csv
import io
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raytrain_brats.labels import REGIONS

Row = Mapping[str, Any]
_COLUMN = re.compile(r"(?P<metric>.+?)_(?P<region>[A-Z]+)(?P<unit>_mm)?")
_HIGHER_IS_WORSE = ("hd95", "lesion_hd95", "lesion_fp", "lesion_fn")
FIRST = tuple(f"dice_{r}" for r in REGIONS) + tuple(f"hd95_{r}_mm" for r in REGIONS)
"""Columns that every evaluation has, in the order in which they stand."""
DIGITS = 6
"""After the point, of every score, once: what is shown of it is rounded from these, wherever it is shown."""
FEWEST = 5
"""Cases that tell an outlier: quartiles of fewer say nothing."""


@dataclass(frozen=True)
class Statistics:
    """Of one column. `mean`: by BraTS's rules for empty regions; `mean_nonempty`: without the cases where prediction
    and truth are both empty, as nnU-Net has it; None where the table does not say which are."""

    metric: str
    region: str
    unit: str
    cases: int
    mean: float
    mean_nonempty: float | None
    both_empty: int | None
    one_empty: int | None
    q1: float
    median: float
    q3: float
    worst: float
    worst_case: str


def rounded(row: Row) -> dict[str, Any]:
    """A case's scores as cases.csv holds them."""
    return {key: round(value, DIGITS) if isinstance(value, float) else value for key, value in row.items()}


def name_of(column: str) -> tuple[str, str, str] | None:
    """(metric with its year, region, unit) of a column; None of one that is no score."""
    found = _COLUMN.fullmatch(column)
    return (found["metric"], found["region"], "mm" if found["unit"] else "") if found else None


def number(value: Any) -> float | None:
    """None for what is no number: not predicted, or not defined by the rule."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if found == found else None


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All columns of the cases, those that every evaluation has first; without the case's name."""
    there = dict.fromkeys(column for row in rows for column in row if column != "case")
    return [c for c in FIRST if c in there] + [c for c in there if c not in FIRST]


def by_column(rows: Sequence[Row]) -> dict[str, Statistics]:
    """Statistics of every column that holds a number in any case."""
    found = {}
    for column in columns_of(rows):
        name = name_of(column)
        known = [(value, str(row["case"])) for row in rows if (value := number(row.get(column))) is not None]
        if name is None or not known:
            continue
        metric, region, unit = name
        values = [value for value, _ in known]
        empty = {str(row["case"]): row.get(f"empty_{region}") for row in rows}
        told = any(kind is not None for kind in empty.values())
        filled = [value for value, case in known if empty[case] != "both"]
        worst, worst_case = (max if metric.startswith(_HIGHER_IS_WORSE) else min)(known)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        found[column] = Statistics(
            metric,
            region,
            unit,
            len(values),
            statistics.fmean(values),
            statistics.fmean(filled) if told and filled else None,
            sum(kind == "both" for kind in empty.values()) if told else None,
            sum(kind in ("truth", "prediction") for kind in empty.values()) if told else None,
            q1,
            median,
            q3,
            worst,
            worst_case,
        )
    return found


def mean_dice(row: Row) -> float:
    """Of WT, TC and ET; infinite without any."""
    known = [value for r in REGIONS if (value := number(row.get(f"dice_{r}"))) is not None]
    return sum(known) / len(known) if known else float("inf")


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """By the mean Dice of WT, TC and ET; cases without any last."""
    return sorted(rows, key=mean_dice)


def outliers(rows: Sequence[Row], found: Mapping[str, Statistics]) -> set[tuple[str, str]]:
    """(case, column) of what is worse than the nearer quartile by over 1.5 times their distance (Tukey's fences);
    nothing of a column of fewer than FEWEST cases."""
    marked = set()
    for column, about in found.items():
        sign = 1 if about.metric.startswith(_HIGHER_IS_WORSE) else -1
        fence = 1.5 * (about.q3 - about.q1) + sign * (about.q3 if sign > 0 else about.q1)
        if about.cases >= FEWEST:
            values = ((str(row["case"]), number(row.get(column))) for row in rows)
            marked |= {(case, column) for case, value in values if value is not None and sign * value > fence}
    return marked


def read(text: str) -> list[Row]:
    """The cases of a cases.csv."""
    return list(csv.DictReader(io.StringIO(text)))


def cases_csv(rows: Sequence[Row]) -> bytes:
    """One case a line, by name."""
    columns = ["case", *columns_of(rows)]
    lines = [[_shown(row.get(column)) for column in columns] for row in sorted(rows, key=lambda row: str(row["case"]))]
    return _csv(columns, lines)


def statistics_csv(found: Mapping[str, Statistics]) -> bytes:
    """One column a line."""
    names = list(Statistics.__dataclass_fields__)
    lines = [[column, *(_shown(value) for value in asdict(row).values())] for column, row in found.items()]
    return _csv(["column", *names], lines)


def summary(found: Mapping[str, Statistics]) -> dict[str, dict[str, Any]]:
    """{column: its numbers}, for JSON."""
    left_out = ("metric", "region", "unit")
    return {
        column: {
            k: round(v, DIGITS) if isinstance(v, float) else v for k, v in asdict(row).items() if k not in left_out
        }
        for column, row in found.items()
    }


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.{DIGITS}f}" if isinstance(value, float) else str(value)


def _csv(header: Sequence[str], lines: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue().encode()
