"""Tiny cases on disk and in memory, in the layouts that brain-tumour data come in."""

import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from raytrain_brats.data.nifti import Volume
from scripts.fuzz_files import nifti
from tests.support import ROOT

__all__ = ["nifti"]

REAL = Path(os.environ.get("RAYTRAIN_BRATS_REAL_DATA", ROOT.parent / "shared" / "data"))
"""Crops of real cases; tests that need them are skipped without."""
SHAPE = (24, 20, 18)
LPS = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])


def rotation(degrees: float) -> npt.NDArray[np.float64]:
    """A turn about the axis (1, 2, 3)."""
    x, y, z = np.array([1.0, 2, 3]) / 14**0.5
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)


def make_affine(
    spacing_mm: tuple[float, float, float] = (1, 1, 1),
    permutation: tuple[int, int, int] = (0, 1, 2),
    signs: tuple[int, int, int] = (1, 1, 1),
    degrees: float = 0,
) -> npt.NDArray[np.float64]:
    """Voxel-to-world of a grid whose axis j runs along world axis permutation[j]; `degrees` makes it oblique."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees) @ np.eye(3)[:, list(permutation)] @ np.diag(np.multiply(signs, spacing_mm))
    affine[:3, 3] = (-12.5, 30.25, 7)
    return affine


def make_arrays(
    shape: tuple[int, ...] = SHAPE, seed: int = 0, empty_et: bool = False, dtype: Any = np.int16, et: int = 3
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
    """(image (x, y, z, 4), label (x, y, z)): a brain off centre in exact zeros, a tumour of three shells in it."""
    random = np.random.RandomState(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    brain = ((grid + 0.1) ** 2).sum(0) < 0.6
    image = random.randint(-20, 1500, (*shape, 4)) * brain[..., None]
    label = np.zeros(shape, np.uint8)
    radius = ((grid + 0.2) ** 2).sum(0) ** 0.5
    for value, limit in ((1, 0.45), (2, 0.33), (et, 0 if empty_et else 0.22)):
        label[(radius < limit) & brain] = value
    if np.dtype(dtype).kind == "f":
        image = image * 1.0
    return image.astype(dtype), label


def make_volume(affine: Any = None, label: bool = True, **options: Any) -> Volume:
    """A decoded case without a file; `options` as in `make_arrays`."""
    image, truth = make_arrays(**options)
    return Volume(np.moveaxis(image, 3, 0), truth if label else None, np.eye(4) if affine is None else affine)


def save(path: Path, array: npt.NDArray[Any], affine: Any = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def write_msd_case(folder: Path, name: str, affine: Any = None, **options: Any) -> dict[str, str]:
    """One case in MSD layout (x, y, z, 4), float32 like the real ones; its entry for dataset.json."""
    image, label = make_arrays(**{"dtype": np.float32} | options)
    entry = {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
    save(folder / entry["image"], image, affine)
    save(folder / entry["label"], label, affine)
    return entry


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"dtype": np.int16, "affine": LPS},
    {"shape": (23, 21, 17), "empty_et": True},
    {"affine": make_affine((0.9, 1.1, 2.5), (2, 0, 1), (-1, 1, -1), 20)},
)


def write_msd_folder(folder: Path, cases: int = 3, **options: Any) -> Path:
    """BRATS_001 ... in MSD layout; cases differ in content, with `varied=True` in shape, dtype and affine too."""
    varied = options.pop("varied", False)
    entries = []
    for number in range(cases):
        own = (VARIANTS[number % len(VARIANTS)] if varied else {}) | options
        entries.append(write_msd_case(folder, f"BRATS_{number + 1:03d}", seed=number, **own))
    (folder / "imagesTr" / "._BRATS_001.nii.gz").write_bytes(b"left by macOS")
    (folder / "dataset.json").write_text(json.dumps({"name": "BRATS", "training": entries[::-1]}))
    return folder


def write_brats_folder(folder: Path, cases: int = 3, **options: Any) -> Path:
    """BraTS2021_00000 ...: one int16 LPS file a modality, labels 1, 2, 4; the tissue is that of the MSD cases."""
    for number in range(cases):
        name = f"BraTS2021_{number:05d}"
        image, label = make_arrays(**{"seed": number, "et": 4} | options)
        label = np.array([0, 2, 1, 3, 4], np.uint8)[label]  # oedema is 1 in MSD and 2 in BraTS
        for channel, kind in enumerate(("flair", "t1", "t1ce", "t2")):
            save(folder / name / f"{name}_{kind}.nii.gz", image[..., channel], LPS)
        save(folder / name / f"{name}_seg.nii.gz", label, LPS)
    return folder
