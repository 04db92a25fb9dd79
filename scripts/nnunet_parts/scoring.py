"""Score the label volumes of any program by the package's own code, and put the scores of several runs in one table.

In: a folder with CASE.nii.gz, the cases; results of runs.
Out: Dice and HD95 by region and case; Markdown.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import nibabel as nib
import numpy as np

from raytrain_brats.data.manifest import Case
from raytrain_brats.data.store import Source
from raytrain_brats.errors import RunFailed
from raytrain_brats.labels import REGIONS, to_regions
from raytrain_brats.run import predictor

MEASURES = ("dice", "hd95_mm")


def scores(folder: str, convention: str, cases: Sequence[Case], source: Source) -> dict[str, Any]:
    """{"mean": {measure: {region: mean}}, "cases": {case: {measure: {region: value}}}}, on each case's native grid.

    `convention` is how the volumes' values are read. Raises RunFailed for a volume that is missing or on another grid.
    """
    found = []
    for case in cases:
        path = Path(folder) / f"{case.id}.nii.gz"
        if not path.exists():
            raise RunFailed(f"{path} is missing: the program did not segment this case")
        prepared, label = source.load(case), np.asarray(nib.load(path).dataobj).astype(np.uint8)  # type: ignore[attr-defined]
        if label.shape != prepared.geometry.native_shape:
            raise RunFailed(f"{path} has the shape {label.shape}, its case {prepared.geometry.native_shape}")
        found.append(predictor.score(case.id, to_regions(label, convention), prepared, source.convention))
    by_case = {each.case_id: {what: dict(getattr(each, what)) for what in MEASURES} for each in found}
    return {"mean": predictor.means(found), "cases": by_case}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each program and way, means over seeds with their standard deviation."""
    rows = defaultdict[tuple[str, str, str], list[dict[str, Any]]](list)
    for result in results:
        for view, found in result["views"].items():
            about = {key: result[key] for key in ("seed", "parameters", "train_cpu_s", "samples")}
            rows[result["program"], result["optimiser"], view].append(about | found)
    head = ["program", "optimiser", "windows", "seeds", "parameters", "samples"]
    head += [f"Dice {region}" for region in REGIONS] + [f"HD95 {region} mm" for region in REGIONS]
    head += ["training, CPU s", "prediction, CPU s"]
    lines = [head, ["---"] * len(head)]
    for (program, optimiser, view), runs in rows.items():
        line = [program, optimiser, view, ", ".join(str(run["seed"]) for run in runs)]
        line += [f"{runs[0]['parameters'] / 1e6:.2f} M", f"{runs[0]['samples']:,}"]
        for what, digits in (("dice", 3), ("hd95_mm", 1)):
            line += [_spread([run["scores"]["mean"][what][region] for run in runs], digits) for region in REGIONS]
        line += [_spread([run["train_cpu_s"] for run in runs], 0), _spread([run["cpu_s"] for run in runs], 0)]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"
