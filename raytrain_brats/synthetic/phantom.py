"""Digital glioma phantoms in the file layout of MSD Task01_BrainTumour: test data without patients.

In: a seed, a grid size and an anatomy: "procedural" needs no files, "mni" reads the tissue maps shipped in nilearn.
Out: `PhantomCase` values, or NIfTI files and a `dataset.json`; the same arguments always give the same bytes.

Axes: x y z voxels (RAS), c modality, t tissue, s sites; without letters, x y z in the box of the brain. Points in mm
are voxel indices of MSD's 1 mm grid, so that a seed gives one head at every grid size.
A score on phantoms shows that the machinery works; it is never a clinical result.
"""

import gzip
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import BSpline

from raytrain_brats import storage
from raytrain_brats.cases import dataset_json
from raytrain_brats.labels import MODALITIES
from raytrain_brats.synthetic import phantom_set

Floats = NDArray[np.float32]
Points = NDArray[np.float64]
Random = np.random.Generator
LABELS = ("background", "edema", "non-enhancing tumor", "enhancing tumour")  # MSD's own words, 0 to 3
OEDEMA, CORE, ENHANCING = 1, 2, 3
SIZE_MM = (240.0, 240.0, 155.0)
MIN_WHOLE_ML, MIN_LABEL_ML, MAX_DRAWS = 5.0, 0.3, 32
# One line per tissue; columns as MODALITIES; unit: white matter of the same image. Means were measured on real BraTS
# cases, the spread is between cases, the texture is within one tissue of one case.
MEAN_TC, SPREAD_TC, TEXTURE_TC = np.moveaxis(np.array([
    [[0.38, 0.46, 0.52, 3.00], [0.10, 0.04, 0.04, 0.35], [0.25, 0.10, 0.12, 0.16]],  # CSF
    [[1.10, 0.76, 0.84, 1.22], [0.06, 0.03, 0.04, 0.08], [0.08, 0.04, 0.06, 0.08]],  # grey matter
    [[1.00, 1.00, 1.00, 0.92], [0.00, 0.00, 0.00, 0.00], [0.05, 0.025, 0.03, 0.05]],  # white matter
    [[1.75, 0.88, 0.85, 1.75], [0.25, 0.05, 0.05, 0.22], [0.13, 0.05, 0.06, 0.13]],  # oedema
    [[1.75, 0.80, 0.70, 2.20], [0.40, 0.07, 0.08, 0.30], [0.16, 0.07, 0.12, 0.15]],  # core
    [[1.75, 0.88, 1.85, 1.65], [0.25, 0.06, 0.35, 0.22], [0.12, 0.07, 0.22, 0.13]],  # enhancing
], np.float32), 1, 0)  # fmt: skip
NOISE_C = (0.030, 0.016, 0.028, 0.036)
SCALE_C = ((250, 1250), (320, 1100), (380, 2400), (300, 620))  # range of the stored value of white matter
# Enhancing rims: probability, thinnest and thickest (mm), gaps below this noise, nodules above that (unit variance).
RIMS = {"ring": (0.66, 2.2, 5.0, -1.7, 2.0), "solid": (0.22, 6.0, 11.0, -2.1, 1.2), "poor": (0.12, 0.8, 1.6, 0.3, 2.3)}


@dataclass(frozen=True)
class PhantomCase:
    """One synthetic patient, RAS, voxels cubic."""

    image_xyzc: Floats  # whole numbers, exactly 0 outside the brain; c as in MODALITIES
    label_xyz: NDArray[np.uint8]  # as in LABELS
    spacing_mm: float
    facts: dict[str, object]  # anatomy, kind of rim, and volumes in ml, as drawn


@dataclass(frozen=True)
class Head:
    """A brain on the output grid, in its bounding box, and the site and radius of its tumour core."""

    box: tuple[slice, ...]
    axes_mm: list[Points]
    brain: NDArray[np.bool_]
    csf: Floats
    grey: Floats
    white: Floats
    site_mm: Points
    radius_mm: float
    voxel_mm: float


def spline(lattice: Floats, axes: Sequence[Points]) -> Floats:
    """Cubic B-spline with coefficients `lattice`, at the grid of `axes` (lattice indices)."""
    for axis in (2, 1, 0):  # x last: the big result then needs no transposed copy
        front = np.moveaxis(lattice, axis, 0)
        inner = np.clip(axes[axis], 1, len(front) - 2)
        weights = BSpline.design_matrix(inner, np.arange(len(front) + 4) - 2.0, 3).astype(np.float32)
        # A sparse product adds up in one fixed order: unlike BLAS, the same for any number of threads.
        product = weights @ np.ascontiguousarray(front).reshape(len(front), -1)
        lattice = np.moveaxis(product.reshape(len(inner), *front.shape[1:]), 0, axis)
    return lattice


def _noise(rng: Random, axes_mm: Sequence[Points], correlation_mm: float) -> Floats:
    """Smooth noise, mean 0 and variance 1 over draws. Takes the same draws at every voxel size."""
    knot_mm = 0.75 * correlation_mm
    lattice = rng.standard_normal([int(size / knot_mm) + 6 for size in SIZE_MM], np.float32)
    lattice /= np.float32((151 / 315) ** 1.5)  # 151 / 315 is the mean sum of squared weights along one axis
    return spline(lattice, [axis / knot_mm + 2 for axis in axes_mm])


def _offsets(axes_mm: Sequence[Points], origin: Sequence[float] | Points) -> list[Floats]:
    """Three broadcastable arrays: x, y and z from the origin."""
    grids = np.meshgrid(*axes_mm, indexing="ij", sparse=True)
    return [grid.astype(np.float32) - np.float32(start) for grid, start in zip(grids, origin, strict=True)]


def _mni_files() -> list[Path]:
    """The ICBM152 average and its grey and white matter as nilearn ships them; none if they are not here."""
    spec = importlib.util.find_spec("nilearn")
    folder = Path((spec and spec.origin) or "").parent / "datasets" / "data"
    files = [folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz" for kind in ("t1", "gm", "wm")]
    return files if all(file.is_file() for file in files) else []


def check_anatomy(anatomy: str) -> None:
    """Raises ValueError when it is not known, or cannot be drawn here. Never another one in its place: the same
    arguments are to give the same bytes, whatever is installed."""
    if anatomy not in ("procedural", "mni") or (anatomy == "mni" and not _mni_files()):
        raise ValueError(f'anatomy "{anatomy}": give "procedural"; "mni" needs `pip install nilearn`')


def _procedural_tissue() -> tuple[NDArray[np.bool_], Floats, Floats]:
    """Brain, grey and white matter of a made-up head: folded cortex, ventricles, deep nuclei."""
    axes_mm = [np.arange(0.0, size) for size in (144, 176, 128)]
    x, y, z = _offsets(axes_mm, (71.5, 87.5, 54.0))
    ventricles, thalamus, putamen = (  # ellipsoids: centre and half axes in mm, the same left and right
        ((abs(x) - a) / u) ** 2 + ((y - b) / v) ** 2 + ((z - c) / w) ** 2 < 1
        for a, b, c, u, v, w in ((11, -4, 12, 6, 31, 9), (13, -12, 1, 8, 14, 9), (26, 6, 1, 6, 18, 11))
    )
    # Depth under the surface, roughly in mm; the frontal lobes are narrower, the base is flatter.
    depth = 64 * (1 - np.sqrt((x / (67 - 0.08 * y)) ** 2 + (y / 85) ** 2 + (z / np.where(z > 0, 66, 50)) ** 2))
    fold, shallow = abs(_noise(np.random.default_rng(7), axes_mm, 13)), np.clip(1 - depth / 24, 0, 1)
    fissure = (z > 20) | (abs(y) > 48)  # elsewhere the hemispheres are joined
    csf = (depth < 1.5) | (fold < 0.14 * shallow) | (fissure & (abs(x) < 1.3)) | ventricles
    grey = (depth < 5) | (fold < 0.7 * np.sqrt(shallow)) | (fissure & (abs(x) < 4.5)) | thalamus | putamen
    soft = [ndimage.uniform_filter(part.astype(np.float32), 3) * (depth > 0) for part in (grey & ~csf, ~grey & ~csf)]
    return depth > 0, soft[0], soft[1]


@lru_cache(maxsize=2)
def _atlas(anatomy: str) -> tuple[Floats, Floats, Floats, Points, Points]:
    """Brain, grey and white matter at 1 mm, centre of the brain, and deep white matter where a glioma may start."""
    if anatomy == "mni":
        images: list[Any] = [nib.load(file) for file in _mni_files()]
        t1, *maps = (np.asarray(image.dataobj, np.float32) / np.float32(255) for image in images)
        csf, grey, white = (part ** np.float32(1.7) for part in (np.clip(1 - sum(maps), 0, 1), *maps))  # sharpened
        brain, whole = t1 > 0, np.maximum(csf + grey + white, np.float32(1e-6))
        grey, white = grey * brain / whole, white * brain / whole
    else:
        brain, grey, white = _procedural_tissue()
    centre = np.array([index.mean() for index in np.nonzero(brain)])
    sites = np.argwhere(ndimage.uniform_filter(white, 9)[::4, ::4, ::4] > 0.42) * 4.0
    right, _, up = (sites - centre).T
    return brain.astype(np.float32), grey, white, centre, sites[(up > -22) & (abs(right) > 12)]


def _place_head(rng: Random, anatomy: str, grid: int) -> Head:
    """Sample the atlas on the output grid through a random pose, the push of the tumour and a smooth warp."""
    atlas_brain, atlas_grey, atlas_white, centre, sites_s = _atlas(anatomy)
    size = (rng.uniform(1.30e6, 1.62e6) / atlas_brain.sum(dtype=np.float64)) ** (1 / 3)  # adult brain, mm3
    pose = size * (np.eye(3) + rng.uniform(-0.06, 0.06, (3, 3))) * (rng.choice([-1.0, 1.0]), 1, 1)  # x mirrored or not
    site = sites_s[rng.integers(len(sites_s))]
    site_mm = rng.uniform((116, 103, 66), (124, 111, 80)) + pose @ (site - centre)
    radius_mm = float(6.2 * np.clip(rng.lognormal(np.log(32), 0.65), 5, 90) ** (1 / 3))  # a ball of 5 to 90 ml
    voxel_mm = SIZE_MM[0] / grid
    axes_mm = [np.arange(0.5, round(size_mm * grid / 240)) * voxel_mm - 0.5 for size_mm in SIZE_MM]
    x, y, z = _offsets(axes_mm, site_mm)
    # Near the site the sampled point moves inwards, so tissue is pushed outwards.
    push = np.exp((x**2 + y**2 + z**2) / np.float32(-((1.7 * radius_mm) ** 2))) * np.float32(rng.uniform(0.18, 0.34))
    source = np.empty((3, *push.shape), np.float32)
    for axis, row in enumerate(np.linalg.inv(pose).astype(np.float32)):
        source[axis] = (row[0] * x + row[1] * y + row[2] * z) * (1 - push) + np.float32(site[axis])
        for correlation_mm, amplitude_mm in ((45, 2.6), (16, 0.9), (7, 0.35)):
            source[axis] += np.float32(amplitude_mm) * _noise(rng, axes_mm, correlation_mm)
    inside = ndimage.map_coordinates(atlas_brain, source, order=1)
    box = ndimage.find_objects((inside > 0.5).astype(np.int8))[0]
    brain, source = inside[box] > 0.5, source[:, *box]
    grey, white = (ndimage.map_coordinates(tissue, source, order=1) * brain for tissue in (atlas_grey, atlas_white))
    csf = np.clip(inside[box] - grey - white, 0, 1) * brain
    axes_mm = [axis[part] for axis, part in zip(axes_mm, box, strict=True)]
    return Head(box, axes_mm, brain, csf, grey, white, site_mm, radius_mm, voxel_mm)


def _infiltration(rng: Random, head: Head, core: NDArray[np.bool_]) -> Floats:
    """Tumour cell density round the core: Fisher-Kolmogorov reaction-diffusion, mostly along white matter."""
    stride = max(1, round(2 / head.voxel_mm))  # cells of about 2 mm; larger ones take fewer, longer steps
    coarse, cell_mm = (slice(None, None, stride),) * 3, stride * head.voxel_mm
    speed = (head.white + 0.05 * head.grey)[coarse] * (head.csf[coarse] < 0.5)
    speed *= np.clip(1 + 0.35 * _noise(rng, [axis[::stride] for axis in head.axes_mm], 9), 0.3, 1.8)
    rate, zero = np.float32(0.16 / speed.max()), np.float32(0)  # explicit steps are stable up to 1/6
    faces = [rate / 2 * (np.delete(speed, 0, axis) + np.delete(speed, -1, axis)) for axis in range(3)]
    num_steps, gain = rng.uniform(90, 170) / (cell_mm / 2) ** 2, rng.uniform(0.015, 0.04) * (cell_mm / 2) ** 2
    growth = (speed > 0.02) * rate * np.float32(gain)
    seed = density = core[coarse].astype(np.float32)
    for _ in range(round(num_steps)):
        change = growth * density * (1 - density)
        for axis, face in enumerate(faces):
            change += np.diff(face * np.diff(density, axis=axis), axis=axis, prepend=zero, append=zero)
        density = np.maximum(density + change, seed)
    # Two cells of margin repeat the edge, where the spline clips its positions.
    return spline(np.pad(density, 2, mode="edge"), [(axis - axis[0]) / cell_mm + 2 for axis in head.axes_mm])


def _draw_lesion(rng: Random, head: Head) -> tuple[NDArray[np.uint8], Floats, str]:
    """Lobulated core with an enhancing rim, and oedema: label, soft amount of oedema (0 to 1), kind of rim."""
    radius_mm, rough = head.radius_mm, np.float32(rng.uniform(0.15, 0.28))
    broad, lumpy, fine, gaps = (_noise(rng, head.axes_mm, mm) for mm in (0.8 * radius_mm + 6, 7, 3.2, 10))
    distance = np.sqrt(sum(offset**2 for offset in _offsets(head.axes_mm, head.site_mm))) / np.float32(radius_mm)
    distance *= 1 + rough * (np.clip(broad, -2, 2) + 0.4 * lumpy + 0.08 * fine)
    core = head.brain & (distance < 1) & ((head.csf < 0.5) | (distance < 0.8))
    rim = str(rng.choice(list(RIMS), p=[kind[0] for kind in RIMS.values()]))
    _, thinnest_mm, thickest_mm, gap, nodule = RIMS[rim]
    # A rim thinner than a voxel would vanish; a solid one must leave some core in a small tumour.
    rim_mm = min(max(rng.uniform(thinnest_mm, thickest_mm), 0.9 * head.voxel_mm), 0.6 * radius_mm)
    shell = distance > 1 - np.float32(rim_mm / radius_mm) * (1 + 0.55 * lumpy + 0.25 * broad)
    enhancing = core & ((shell & (gaps > gap)) | ((lumpy + 0.5 * fine > nodule) & (distance > 0.25)))
    oedema_ml = np.clip((radius_mm / 6.2) ** 3 * rng.lognormal(np.log(1.7), 0.6), 6, 160)
    density = _infiltration(rng, head, core)
    free = head.brain & ~core & (head.csf < 0.5) & (density > 0.05)
    along_white = 0.12 + 0.88 * head.white / (head.white + head.grey + np.float32(1e-3))
    density *= free * np.exp(0.25 * lumpy + 0.06 * fine) * along_white
    wanted = max(1, round(oedema_ml * 1e3 / head.voxel_mm**3))  # voxels; the threshold gives this volume
    threshold = np.float32(max(np.sort(density[free])[-wanted:].min(initial=1), 0.02))
    soft = free / (1 + np.exp((threshold - density) / (np.float32(0.1) * threshold + np.float32(0.02))))
    amount = soft * (0.55 + 0.45 * np.sqrt(np.clip((density - threshold) / (1 - threshold + np.float32(1e-3)), 0, 1)))
    return np.select([enhancing, core, soft > 0.5], [ENHANCING, CORE, OEDEMA], 0).astype(np.uint8), amount, rim


def _acquire(rng: Random, grain: Random, signal: Floats, voxel_mm: float, channel: int) -> Floats:
    """What the scanner and the resampling to the atlas grid make of a signal: blur, thick slices, Rician noise."""
    thick = int(rng.choice([1, 1, 2, 3, 5] if channel in (0, 3) else [1, 1, 1, 2, 4]))
    thick, smooth = (thick, 0.45) if voxel_mm < 1.5 else (1, 0)
    blurred = ndimage.gaussian_filter(signal, rng.uniform(0.5, 0.85) / voxel_mm, truncate=2.5)
    padded = np.pad(blurred, ((0, 0), (0, 0), (0, -signal.shape[2] % thick)), mode="edge")
    slices = padded.reshape(*signal.shape[:2], -1, thick).mean(3)
    level = np.float32(NOISE_C[channel] * rng.uniform(0.6, 1.4) * (1.25 if thick == 1 else 0.8))
    real, imaginary = (level * grain.standard_normal(slices.shape, np.float32) for _ in range(2))
    slices = np.hypot(slices + real, imaginary)
    voxels = ndimage.zoom(slices, (1, 1, thick), order=1, mode="nearest", grid_mode=True)  # linear between slices
    smoothed: Floats = ndimage.gaussian_filter(voxels[..., : signal.shape[2]], smooth, truncate=2.5)
    return smoothed


def _render(rng: Random, grain: Random, head: Head, label: NDArray[np.uint8], oedema: Floats) -> Floats:
    """Image (x, y, z, c) in the head's box: tissue means and texture, vessels, bias field, acquisition."""
    core, enhancing = ((label == value).astype(np.float32) for value in (CORE, ENHANCING))
    healthy = (1 - oedema) * (label < CORE)
    parts_t = (head.csf * healthy, head.grey * healthy, head.white * healthy, oedema, core, enhancing)
    fields = [_noise(rng, head.axes_mm, mm) for mm in (14, 5.5)]
    # Two noise fields are both near 0 along curves: these are the vessels, bright after contrast.
    curves = np.exp(-sum((_noise(rng, head.axes_mm, mm) / np.float32(0.11)) ** 2 for mm in (13, 11)))
    vessels = curves * (head.csf + np.float32(0.35) * head.grey) * np.float32(rng.uniform(0.8, 1.8))
    image_xyzc = np.empty((*label.shape, len(MODALITIES)), np.float32)
    for channel, (darkest, brightest) in enumerate(SCALE_C):
        texture = sum(np.float32(part) * field for part, field in zip(rng.normal(0, 0.7, 2), fields, strict=True))
        spread_t = np.clip(rng.normal(size=6), -1.5, 1.5).astype(np.float32)  # clipped: no tumour is invisible
        mean_t = MEAN_TC[:, channel] + SPREAD_TC[:, channel] * spread_t
        signal = vessels if MODALITIES[channel] == "T1gd" else np.zeros_like(vessels)
        for part, mean, rough in zip(parts_t, mean_t, TEXTURE_TC[:, channel], strict=True):
            signal += part * mean * np.clip(1 + rough * texture, 0.3, 2)
        signal *= np.exp(np.float32(rng.uniform(0.04, 0.11)) * _noise(rng, head.axes_mm, 110))
        scale = np.float32(np.exp(rng.uniform(*np.log((darkest, brightest)))))
        # At least 1 in the brain: the background is then exactly the voxels that are 0, as in MSD.
        image_xyzc[..., channel] = np.maximum(np.rint(_acquire(rng, grain, signal, head.voxel_mm, channel) * scale), 1)
    return image_xyzc * head.brain[..., None]


def make_case(seed: int, grid: int = 240, anatomy: str = "procedural") -> PhantomCase:
    """Draw a synthetic patient of (grid, grid, round(155 * grid / 240)) voxels of 240 / grid mm.

    `anatomy`: "procedural" or "mni". Drawn again, in a fixed sequence, until each label has a sensible volume.
    """
    if not 32 <= grid <= 512 or seed < 0:
        raise ValueError(f"grid {grid}, seed {seed}: give 32 to 512 voxels (across 240 mm), and a seed from 0 up")
    check_anatomy(anatomy)
    for attempt in range(MAX_DRAWS):
        # Two streams: how much noise is drawn depends on the grid, and the shape of the head must not.
        rng, grain = (np.random.default_rng(child) for child in np.random.SeedSequence((seed, attempt)).spawn(2))
        head = _place_head(rng, anatomy, grid)
        label, oedema, rim = _draw_lesion(rng, head)
        volumes_ml = np.bincount(label.ravel(), minlength=4)[1:] * head.voxel_mm**3 / 1e3
        if volumes_ml.sum() >= MIN_WHOLE_ML and volumes_ml.min() >= MIN_LABEL_ML:
            break
    else:
        raise RuntimeError(f"seed {seed}, grid {grid}: no tumour with all labels in {MAX_DRAWS} draws; change the seed")
    label_xyz = np.zeros([round(size_mm * grid / 240) for size_mm in SIZE_MM], np.uint8)
    image_xyzc = np.zeros((*label_xyz.shape, len(MODALITIES)), np.float32)
    image_xyzc[head.box], label_xyz[head.box] = _render(rng, grain, head, label, oedema), label
    facts: dict[str, object] = {"anatomy": anatomy, "rim": rim}
    facts |= zip(("oedema_ml", "core_ml", "enhancing_ml"), volumes_ml.round(1).tolist(), strict=True)
    return PhantomCase(image_xyzc, label_xyz, head.voxel_mm, facts)


def write_case(
    folder: str, number: int, seed: int, grid: int, anatomy: str, voxels: str = "float32", keep: bool = False
) -> dict[str, object]:
    """Write case `number` (from 1) as imagesTr/BRATS_001.nii.gz and so on, whatever other cases exist; its record.

    `voxels` is the images' data type: MSD's files hold whole numbers as float32, those of BraTS as int16. With `keep`
    a file that is there stays.
    """
    if number < 1 or seed < 0:
        raise ValueError(f"case number {number}, seed {seed}: numbers count from 1, seeds from 0")
    case = make_case(int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]), grid, anatomy)
    name = f"BRATS_{number:03d}.nii.gz"
    record: dict[str, object] = {"file": name, **case.facts}
    for kind, array in (("image", case.image_xyzc.astype(voxels, copy=False)), ("label", case.label_xyz)):
        image: Any = nib.Nifti1Image(array, np.diag([case.spacing_mm] * 3 + [1.0]))
        image.header.set_xyzt_units("mm", "sec")
        packed = gzip.compress(image.to_bytes(), 6, mtime=0)  # neither name nor time: the voxels decide the bytes
        path = Path(folder, f"{kind}sTr", name)
        if not (keep and path.exists()):
            storage.write_bytes(str(path), packed)
        record[f"{kind}_bytes"] = path.stat().st_size
    return record


def _recipe(seed: int, grid: int, anatomy: str, voxels: str) -> dict[str, object]:
    check_anatomy(anatomy)
    recipe: dict[str, object] = {"seed": seed, "grid": grid, "anatomy": anatomy}
    return recipe if voxels == "float32" else recipe | {"voxels": voxels}


def write_dataset_json(
    folder: str,
    numbers: Iterable[int],
    seed: int,
    grid: int,
    anatomy: str,
    voxels: str = "float32",
    before: dict[str, Any] | None = None,
) -> None:
    """Write MSD's dataset.json for these cases and those it lists `before`, with what it takes to make them again."""
    rows = phantom_set.rows(numbers, (before or {}).get("training", []))
    about = dataset_json.made(
        "BRATS-PHANTOM",
        "SYNTHETIC gliomas drawn by a program; not patient data, of no clinical meaning",
        dict(enumerate(LABELS)),
        rows,
        licence="as the program; anatomy mni: ICBM152 2009a, free use with the notice of the MNI",
        synthetic=_recipe(seed, grid, anatomy, voxels),
    )
    about |= (before or {}) | {"numTraining": len(rows), "training": rows}
    storage.write_bytes(storage.join(folder, "dataset.json"), json.dumps(about, indent=1).encode())


def missing(
    folder: str, cases: int, seed: int, grid: int, anatomy: str, voxels: str = "float32"
) -> tuple[list[int], list[int]]:
    """Numbers of cases 1 to `cases` whose files are not there, and of all that dataset.json does not list.

    Raises UserError, naming a file, when the folder holds anything but these phantoms.
    """
    about, there = phantom_set.present(folder, _recipe(seed, grid, anatomy, voxels))
    wanted = there | set(range(1, cases + 1))
    listed = {row["image"] for row in about.get("training", [])}
    unlisted = [n for n in sorted(wanted) if phantom_set.rows([n])[0]["image"] not in listed]
    return sorted(wanted - there), unlisted


def write_set(
    folder: str,
    cases: int,
    seed: int,
    grid: int,
    anatomy: str,
    parallel_map: Callable[[Any, Any], Iterable[Any]] = map,
    voxels: str = "float32",
) -> int:
    """Write cases 1 to `cases` and dataset.json; the bytes written. `parallel_map(function, numbers)` may be a
    cluster's.

    What is there of the same phantoms stays, also cases beyond. Raises UserError as `missing` does, before the first
    byte.
    """
    todo, unlisted = missing(folder, cases, seed, grid, anatomy, voxels)
    about, _ = phantom_set.present(folder, _recipe(seed, grid, anatomy, voxels))
    if not about:  # a set that is stopped is then known for ours; without cases it is none for others
        write_dataset_json(folder, (), seed, grid, anatomy, voxels)
    write = partial(_write_numbered, folder, seed, grid, anatomy, voxels)
    records = list(parallel_map(write, todo)) if todo else []
    if unlisted:
        write_dataset_json(folder, unlisted, seed, grid, anatomy, voxels, about)
    return sum(int(r["image_bytes"]) + int(r["label_bytes"]) for r in records)


def _write_numbered(folder: str, seed: int, grid: int, anatomy: str, voxels: str, number: int) -> dict[str, object]:
    return write_case(folder, number, seed, grid, anatomy, voxels, keep=True)
