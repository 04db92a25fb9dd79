"""Parse and make dataset.json files: MSD's (Antonelli et al. 2022, doi 10.1038/s41467-022-30695-9), nnU-Net's v1 and
v2, MONAI's data lists. Runs in the driver.

In: its bytes; for a data set that this package makes, its cases.
Out: a `Stated`: listed images and labels, modality order, label convention; the content of a new one. Whether the
listed files exist is checked in `layouts`.
"""

import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytrain_brats import labels
from raytrain_brats.data.manifest import FOLDS
from raytrain_brats.errors import UserError


@dataclass(frozen=True)
class Row:
    """A listed case: paths relative to the folder, as written; `label` None where none is listed."""

    images: tuple[str, ...]
    label: str | None
    subject: str
    fold: int | None


@dataclass(frozen=True)
class Stated:
    """`channels`: which channel of an image holds each of MODALITIES; `convention`: of the labels. None: not stated.

    `training` is None where no list is given, as in nnU-Net v2, whose folders are the list.
    """

    where: str
    channels: tuple[int, ...] | None
    convention: str | None
    training: tuple[Row, ...] | None
    test: tuple[Row, ...]
    synthetic: bool


def parse(content: bytes, where: str, root: str) -> Stated:
    """Raises UserError that names what is not understood."""
    try:
        about = json.loads(content)
        modalities, table = about.get("channel_names") or about.get("modality"), about.get("labels")
        training, test = about.get("training"), about.get("test") or []
        if training is None and not ("channel_names" in about and table):
            raise ValueError("no list of training cases")
        rows = None if training is None else tuple(_row(row, root) for row in training)
        if rows is not None and any(row.label is None for row in rows):
            raise ValueError("a training case without a label")
        tests = tuple(_row(row, root) for row in test)
        ending, own = str(about.get("file_ending", ".nii.gz")), about.get("convention")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{where} is not a dataset.json of MSD or nnU-Net, with a "training" list of image and label or with '
            '"channel_names" and "labels"'
        ) from error
    if ending not in (".nii.gz", ".nii"):
        raise UserError(f"{where}: file_ending {ending} is not read here; convert the images to .nii.gz")
    if rows is not None and not all(0 <= row.fold < FOLDS for row in rows if row.fold is not None):
        raise UserError(f"{where}: a fold is not known; give 0 to {FOLDS - 1}")
    channels = labels.stated_modalities(modalities, where)  # first: it names the cause when this is another MSD task
    convention = labels.stated_convention(table, where)
    if own is not None:
        labels.known(str(own))
        if convention not in (None, own) and labels.known(convention).tissue != labels.known(own).tissue:
            raise UserError(
                f"{where} says convention {own}, but its `labels` say {labels.described(str(convention))}; mend one"
            )
        convention = str(own)
    return Stated(where, channels, convention, rows, tests, bool(about.get("synthetic")))


def made(
    name: str, description: str, table: Mapping[int, str], training: Sequence[Mapping[str, object]], **more: object
) -> dict[str, Any]:
    """The dataset.json of a generated data set, with MSD's keys. `table` names the label values, `training` lists
    {"image", "label"} and more about each case; `more` are keys of our own."""
    return {
        "name": name,
        "description": description,
        "tensorImageSize": "4D",
        "modality": dict(enumerate(labels.MODALITIES)),
        "labels": {str(value): word for value, word in table.items()},
        **more,
        "numTraining": len(training),
        "numTest": 0,
        "training": list(training),
        "test": [],
    }


def _row(row: Any, root: str) -> Row:
    """A row as MSD, nnU-Net and MONAI write it: {"image", "label"}, or an image's path alone; images may be a list."""
    if isinstance(row, str):
        row = {"image": row}
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    label, fold = row.get("label"), row.get("fold")
    paths = tuple(_path(image, root) for image in images)
    if not paths:
        raise ValueError("a case without an image")
    fold = None if fold is None else int(fold)
    return Row(paths, None if label is None else _path(label, root), str(row.get("subject", "")), fold)


def _path(given: str, root: str) -> str:
    """Relative to the root, without `./` and `..`; a path outside the root stays absolute or keeps its `..`."""
    if given.startswith("/"):
        given = given.removeprefix(root.rstrip("/") + "/")
    return posixpath.normpath(given)
