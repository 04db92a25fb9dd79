"""Label volumes that any program wrote, found by the names of cases and checked against the truth. Runs in the driver
and in tasks of `evaluate`.

In: a folder with CASE.nii.gz, the cases, where their truth is.
Out: which cases have a volume, and which files are none; a volume on the truth's own grid, or InvalidCase.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raytrain_brats import labels, outputs, storage
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase, decode_label, same_grid
from raytrain_brats.data.store import Source
from raytrain_brats.errors import UserError

ENDINGS = (".nii.gz", ".nii")
Label = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Found:
    """`files`: {case id: name}; `missing`: cases without a file; `extra`: NIfTI files that are no case's."""

    files: dict[str, str]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def find(folder: str, cases: Sequence[Case]) -> Found:
    """Raises UserError when there is no such folder, or none of the cases in it."""
    there = (name for name in storage.list_files(folder) if "/" not in name and name.endswith(ENDINGS))
    names = [name for name in there if not name.endswith("_probabilities.nii.gz")]  # of `predict --save-probabilities`
    by_id: dict[str, list[str]] = {}
    for name in sorted(names):
        by_id.setdefault(name.removesuffix(".gz").removesuffix(".nii"), []).append(name)
    if twice := [files for files in by_id.values() if len(files) > 1]:
        raise UserError(f"--predictions {folder} holds {' and '.join(twice[0])}, two volumes of a case; remove one")
    files = {case.id: by_id[case.id][0] for case in cases if case.id in by_id}
    missing = tuple(case.id for case in cases if case.id not in files)
    extra = tuple(sorted(set(names) - set(files.values())))
    if not files:
        seen = f"{len(names)} label volumes, such as {names[0]}" if names else "no .nii.gz file"
        expected = f"{cases[0].id}.nii.gz" if cases else "CASE.nii.gz"
        raise UserError(f"--predictions {folder} holds {seen}; expected are {len(cases)} such as {expected}")
    return Found(files, missing, extra)


def by_network(folder: str) -> bool:
    """Whether `predict` made the volumes: then they hold what masks of WT, TC and ET determine, and no more."""
    return any(maker.startswith("predict ") for maker in outputs.recorded(folder)["makers"])


def stated_convention(folder: str) -> str | None:
    """What the folder itself says of its values: our record, or the `labels` of a dataset.json, as nnU-Net puts one.

    Raises UserError for a dataset.json whose labels are not understood.
    """
    makers = outputs.recorded(folder)["makers"].items()
    ours = {str(about["convention"]) for maker, about in makers if maker.startswith("predict ")}
    if len(ours) == 1:
        return ours.pop()
    where = storage.join(folder, "dataset.json")
    if not storage.exists(where):
        return None
    try:
        stated = json.loads(storage.read_bytes(where)).get("labels")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where} is no dataset.json; mend it, or say --convention") from error
    try:
        return labels.stated_convention(stated, where)
    except UserError as error:
        raise UserError(f"{error}; or say --convention") from error


def truth_of(source: Source, case: Case) -> tuple[Label, npt.NDArray[np.float64]]:
    """(label, affine) on the native grid; of the files only the label is read. Raises InvalidCase."""
    if case.object:
        prepared = source.load(case)
        return prepared.truth_xyz(), np.array(prepared.geometry.affine)
    assert case.label, "only labelled cases have a truth"
    try:
        content = storage.read_bytes(storage.join(source.root, case.label))
    except FileNotFoundError as error:
        raise InvalidCase("missing", case.label, case.label) from error
    file = decode_label(content, case.label, labels.allowed_values(source.convention))
    return np.asarray(file.array), file.affine


def read(folder: str, name: str, convention: str, truth: Label, affine: npt.NDArray[np.float64]) -> Label:
    """A label volume, which must lie where the truth lies. Raises InvalidCase with the reason."""
    try:
        content = storage.read_bytes(storage.join(folder, name))
    except FileNotFoundError as error:
        raise InvalidCase("missing", name, name) from error
    file = decode_label(content, name, labels.allowed_values(convention))
    same_grid(file, truth.shape, affine, "the label")
    return np.asarray(file.array)
