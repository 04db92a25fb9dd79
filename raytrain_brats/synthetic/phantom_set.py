"""What a folder of phantoms holds, so that a set is continued where it stopped and no other file is touched.

In: a folder, and what the phantoms wanted are made from.
Out: its dataset.json and the numbers of its cases; or UserError that names the file in the way.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from raytrain_brats import storage
from raytrain_brats.errors import UserError

_ELSEWHERE = "phantoms go to an empty or new folder, or to one of the same phantoms; give another"


def present(folder: str, recipe: dict[str, object]) -> tuple[dict[str, Any], set[int]]:
    """(dataset.json, numbers of the cases with both files) of a folder of phantoms; ({}, none) where it is empty.

    Raises UserError where it holds other things, or phantoms of another seed, grid, anatomy or data type.
    """
    files = set(storage.list_files(folder)) - {storage.PROBE}
    where = storage.join(storage.normal(folder), "dataset.json")
    if not files:
        return {}, set()
    if "dataset.json" not in files:
        raise UserError(f"{storage.join(storage.normal(folder), min(files))} is in the way: {_ELSEWHERE}")
    try:
        about = json.loads(storage.read_bytes(where))
        made = about["synthetic"]
        _ = [row["image"] + row["label"] for row in about["training"]]
    except (ValueError, KeyError, TypeError):
        made = None
    if not isinstance(made, dict):
        raise UserError(f"{where} is that of another data set, none of phantoms: {_ELSEWHERE}")
    if made != recipe:
        before, now = (", ".join(f"{key} {value}" for key, value in r.items()) for r in (made, recipe))
        raise UserError(f"{where} is that of other phantoms ({before}; now {now}): {_ELSEWHERE}")
    images, labels = ({_number(f) for f in files if f.startswith(part)} for part in ("imagesTr/", "labelsTr/"))
    return about, (images & labels) - {0}


def rows(numbers: Iterable[int], before: Iterable[dict[str, str]] = ()) -> list[dict[str, str]]:
    """dataset.json's entries of these cases: as they stood `before`, and new ones, in order."""
    names = (f"BRATS_{number:03d}.nii.gz" for number in sorted(set(numbers)))
    new = {f"./imagesTr/{name}": {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names}
    listed = new | {row["image"]: row for row in before}
    return sorted(listed.values(), key=lambda row: (_number(row["image"]), row["image"]))


def _number(path: str) -> int:
    """Of a case's file; 0 for another's."""
    match = re.search(r"(?:^|/)BRATS_(\d{3,})\.nii\.gz$", path)
    return int(match[1]) if match else 0
