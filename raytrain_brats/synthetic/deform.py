"""Another head out of a real one: a smooth random deformation of image and label, other contrast per modality.

In: a decoded `Volume`, a seed, a case's name, the number of the copy.
Out: a `Volume` on the same grid, of the same label values; the bytes of its NIfTI files.

The same arguments always give the same voxels: draws are those of numpy's frozen RandomState, and nothing is used but
sums, products and quotients, which every processor rounds alike. Axes: z y x as in memory; c modality.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import deflate
import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from raytrain_brats.data.nifti import Volume
from raytrain_brats.synthetic.phantom import spline

KNOT_MM = 32.0
REACH = 0.3
"""Furthest that a knot is moved, in knot distances; voxels move by some 2 mm, and 9.6 mm at most. Below 1 / 2.48 a
cubic B-spline never folds (Choi and Lee 2000, doi 10.1006/gmod.2000.0531)."""
BIAS_KNOT_MM, BIAS = 80.0, 0.15  # brightness that changes slowly over the head
CONTRAST, GAIN = 0.25, (0.8, 1.25)


@dataclass(frozen=True)
class Warp:
    """Where the voxels of a box come from: `source`, voxel indices (3, z, y, x); `places_mm`, the box's own axes."""

    box: tuple[slice, ...]
    places_mm: list[npt.NDArray[np.float64]]
    source: npt.NDArray[np.float32]


def deformed(volume: Volume, seed: int, name: str, copy: int) -> Volume:
    """Copy number `copy` of a case. Zeros outside the head stay zero, and no label value is new."""
    assert volume.label_xyz is not None, "only labelled cases are expanded"
    words = hashlib.sha256(f"{seed}/{name}/{copy}".encode()).digest()
    random = np.random.RandomState(np.frombuffer(words, "<u4").astype(np.uint32))
    image, label = volume.image_cxyz.transpose(0, 3, 2, 1), np.ascontiguousarray(volume.label_xyz.T)
    head = image[0] != 0
    for channel in image[1:]:
        head |= channel != 0
    mm = np.linalg.norm(volume.affine[:3, :3], axis=0)[::-1]
    warp = draw_warp(random, head | (label > 0), mm)
    nearest, inside = _nearest(warp.source, head.shape)
    new_label = np.zeros(label.shape, np.uint8)
    new_label[warp.box] = label.ravel()[nearest] * inside
    new_image = _resampled(random, image, head, head.ravel()[nearest] & inside, warp, mm)
    return Volume(new_image.transpose(0, 3, 2, 1), new_label.T, volume.affine)


def draw_warp(random: np.random.RandomState, mask: npt.NDArray[np.bool_], mm: npt.NDArray[np.float64]) -> Warp:
    """A random warp of the grid, in the box that the mask's voxels may come to lie in."""
    knots = [_knots(random, mask.shape, mm, KNOT_MM, REACH * KNOT_MM) for _ in range(3)]
    box = []
    for axis, (n, edge) in enumerate(zip(mask.shape, mm, strict=True)):
        span = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        far = int(REACH * KNOT_MM / edge) + 1
        box.append(slice(max(0, span[0] - far), min(n, span[-1] + far + 1)))
    indices = [np.arange(part.start, part.stop) for part in box]
    places_mm = [(index + 0.5) * edge for index, edge in zip(indices, mm, strict=True)]
    source = np.empty((3, *map(len, indices)), np.float32)
    for axis, grid in enumerate(np.meshgrid(*indices, indexing="ij", sparse=True)):
        np.divide(_field(knots[axis], places_mm, KNOT_MM), np.float32(mm[axis]), out=source[axis])
        source[axis] += grid.astype(np.float32)
    return Warp(tuple(box), places_mm, source)


def _resampled(
    random: np.random.RandomState, image: Any, head: Any, new_head: Any, warp: Warp, mm: Any
) -> npt.NDArray[Any]:
    """The image through the warp, each modality with a brightness and contrast of its own; int16 if it was whole."""
    points = warp.source[:, new_head]
    sample: Any = partial(ndimage.map_coordinates, coordinates=points, order=1, mode="nearest", output=np.float32)
    # Beside the background a sample is partly zeros: divided by the share of head in it, the rim keeps its brightness.
    share = sample(head)
    old = image[:, head]
    whole = np.array_equal(old, np.rint(old)) and old.min() >= -(2**15) and old.max() < 2**15
    new = np.zeros(image.shape, np.int16 if whole else np.float32)
    for channel, old_values, out in zip(image, old, new, strict=True):
        contrast, gain = np.float32(random.uniform(-CONTRAST, CONTRAST)), np.float32(random.uniform(*GAIN))
        bias = _knots(random, head.shape, mm, BIAS_KNOT_MM, BIAS)
        values = sample(channel) / share
        values *= gain * (1 + _field(bias, warp.places_mm, BIAS_KNOT_MM)[new_head])
        level = np.float32(np.abs(old_values, dtype=np.float64).mean() or 1)
        size = np.abs(values) / level
        values *= 1 + contrast * (size - 1) / (size + 1)  # brighter than the mean gets brighter still, or less so
        out[warp.box][new_head] = np.clip(np.rint(values), -(2**15), 2**15 - 1) if whole else values
    return new


def packed(volume: Volume) -> list[bytes]:
    """The .nii.gz of image (x, y, z, c) and label: smaller than zlib's level 6 and three times as fast."""
    files = []
    for array in (np.moveaxis(volume.image_cxyz, 0, 3), volume.label_xyz):
        image: Any = nib.Nifti1Image(array, volume.affine)
        image.header.set_xyzt_units("mm", "sec")
        files.append(bytes(deflate.gzip_compress(image.to_bytes(), 2)))
    return files


def _knots(random: np.random.RandomState, shape: Any, mm: Any, knot_mm: float, most: float) -> Any:
    """Random coefficients of a spline over the whole grid."""
    count = [int(n * edge / knot_mm) + 4 for n, edge in zip(shape, mm, strict=True)]
    return random.uniform(-most, most, count).astype(np.float32)


def _field(knots: Any, places_mm: Any, knot_mm: float) -> npt.NDArray[np.float32]:
    return spline(knots, [place / knot_mm + 1 for place in places_mm])


def _nearest(source: npt.NDArray[np.float32], shape: tuple[int, ...]) -> tuple[Any, npt.NDArray[np.bool_]]:
    """(flat index of the voxel nearest to each place, whether it lies on the grid)."""
    flat, inside = np.zeros(source.shape[1:], np.int32), np.ones(source.shape[1:], bool)
    for part, n in zip(source, shape, strict=True):
        index = np.rint(part).astype(np.int32)
        inside &= (index >= 0) & (index < n)
        flat *= n
        flat += index
    return flat * inside, inside
