"""Whether a recipe suits the cases at hand. Runs in the driver.

In: a data folder or store; a recipe's settings. Out: the recipe to use; warnings of what makes the results worse.
"""

import contextlib
import sys

import numpy as np

from raytrain_brats import storage
from raytrain_brats.cases import scan
from raytrain_brats.config import DEFAULT_RECIPE, Config
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Manifest
from raytrain_brats.data.nifti import InvalidCase, background_warning
from raytrain_brats.data.store import Source


def recipe_for(given: str, data: str, store: str) -> str:
    """The recipe to use: the one given, else `demo` for phantoms, `DEFAULT_RECIPE` for real cases, which is told.

    The demo's 4 mm voxels and small network must never be a user's result by default.
    """
    if given or not (data or store):
        return given or "demo"
    index = storage.join(storage.normal(store), "index.jsonl") if store else ""
    if store and not storage.exists(index):
        return "demo"  # `open_index` raises: the store is not finished
    if manifests.read(index).synthetic if store else scan.is_synthetic(data):
        return "demo"
    print(
        f"{store or data} holds no phantoms and no --recipe is given: {DEFAULT_RECIPE}, the default for real cases; "
        "`raytrain-brats recipes` lists the others",
        file=sys.stderr,
    )
    return DEFAULT_RECIPE


def warnings(config: Config, manifest: Manifest, source: Source) -> list[str]:
    """Warnings about what would make the results worse, by the first case: coarse voxels, a background other than 0."""
    case = manifest.cases[0]
    lines = []
    with contextlib.suppress(InvalidCase, OSError):  # reported where the case is used
        if case.object:
            affine, background = np.array(source.load(case).geometry.affine), ""
        else:
            volume = source.volume(case)
            affine, background = volume.affine, background_warning(volume)
        native_mm = np.linalg.norm(affine[:3, :3], axis=0)
        if config.preprocess.spacing_mm > 1.01 * native_mm.min():
            edges = " x ".join(f"{edge:.3g}" for edge in native_mm)
            lines.append(
                f"warning: voxels of {config.preprocess.spacing_mm:g} mm are coarser than the scans' own ({edges} mm "
                f"in {case.id}); small structures are lost"
            )
        lines += [f"warning: case {case.id}: {background}"] if background else []
    return lines
