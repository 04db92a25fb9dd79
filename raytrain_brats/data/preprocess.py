"""From a native volume to a prepared case, and exactly back. Runs in data tasks, and in workers for validation.

In: a `Volume`, the wanted voxel edge.
Out: a `Prepared` case: RAS, resampled, cropped to the foreground, statistics, geometry; `restore`, its inverse.

The order is that of MONAI's chain (Orientation RAS, Spacing, CropForeground, NormalizeIntensity nonzero channel by
channel). Only the statistics are computed here: the training device normalises the patch, so 16 bits a voxel travel
instead of 32, and a patch's values do not depend on where it was cropped.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from raytrain_brats.data.nifti import MAX_BYTES, InvalidCase, Volume, VolumeStats, intensity_range
from raytrain_brats.labels import MODALITIES

Triple = tuple[int, int, int]
FOREGROUND_VOXELS = 512
"""Voxels stored per label value, as centres of foreground crops: enough to cover a tumour, too few to cost space."""
_CHUNK = 1 << 15  # voxels worked on at a time, so that they stay in the processor's cache
# float16 ends at 65,504, has a significand of 11 bits and no steps below 2**-24. With a peak of at least 2**-6 the
# standard deviation is some 64 of these steps even in a channel of one bright voxel and little else
_LEAST_PEAK, _GREATEST_PEAK = 2.0**-6, 60000.0
_OFFSET_STDS = 256  # a mean this many deviations from zero leaves steps of an eighth to a quarter of a deviation
_ROUNDED_TO_ZERO = 2.0**-25  # half of float16's smallest number: IEEE rounding to even makes it 0


@dataclass(frozen=True)
class Geometry:
    """The way back from the prepared box to the native grid. Shapes are (x, y, z)."""

    native_shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    axes: tuple[int, int, int]
    """Native axis that became R, A, S."""
    flips: tuple[int, int, int]
    """-1 where that axis was reversed."""
    grid_shape: tuple[int, int, int]
    """After resampling, before the crop."""
    spacing_mm: tuple[float, float, float]
    """Of the prepared voxels."""
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    """Foreground, as (low, high) per axis of the resampled grid."""
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Index on the RAS grid of the resampled grid's first voxel."""

    @property
    def ras_shape(self) -> tuple[int, int, int]:
        x, y, z = (self.native_shape[a] for a in self.axes)
        return x, y, z

    @property
    def native_mm(self) -> npt.NDArray[np.float64]:
        """The native voxels' edges, along R, A, S."""
        edges: npt.NDArray[np.float64] = np.linalg.norm(np.array(self.affine)[:3, :3], axis=0)[list(self.axes)]
        return edges

    @property
    def resampled(self) -> bool:
        return not np.array_equal(self.native_mm, self.spacing_mm)


@dataclass(frozen=True)
class Prepared:
    """A case ready for cropping, in memory order (c, z, y, x).

    `image_czyx`: int16 where that is exact, else float16. A channel whose values float16 cannot
    hold, or only coarsely, is stored times a power of two;
    `mean`, `std`: of the stored values, per channel over non-zero voxels, float64-accumulated;
    `foreground`: flat indices into the (z, y, x) box, FOREGROUND_VOXELS at most per label value;
    `foreground_counts`: (value, how many of these indices) per label value;
    `label_voxels`: voxels of each of these values in the box, in the same order;
    `native_label_xyz`: only where the prepared label cannot be restored to it (after resampling, or with label
    voxels outside the foreground), since scores are computed on the native grid.
    """

    image_czyx: npt.NDArray[Any]
    label_zyx: npt.NDArray[np.uint8] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    geometry: Geometry
    foreground: npt.NDArray[np.int32]
    foreground_counts: tuple[tuple[int, int], ...]
    native_label_xyz: npt.NDArray[np.uint8] | None = None
    label_voxels: tuple[int, ...] = ()

    def truth_xyz(self) -> npt.NDArray[np.uint8]:
        """The label on the native grid."""
        if self.native_label_xyz is not None:
            return self.native_label_xyz
        assert self.label_zyx is not None, "only labelled cases have a truth"
        truth: npt.NDArray[np.uint8] = restore(self.label_zyx[None], self.geometry)[0]
        return truth


def preprocess(volume: Volume, spacing_mm: float) -> Prepared:
    """The prepared case at `spacing_mm`.

    Raises InvalidCase: "empty" when nothing but zeros is left, "range" for values that 16 bits cannot tell apart,
    "affine" for a grid beyond memory.
    """
    # RAS by transposing and reversing axes alone: the nearest axes, no interpolation, so the way back is exact.
    orientation = ornt_transform(io_orientation(volume.affine), axcodes2ornt("RAS"))
    axes = np.argsort(orientation[:, 0]).astype(int)
    flips = orientation[axes, 1].astype(int)
    image, label = to_ras(volume.image_cxyz, axes, flips), None
    if volume.label_xyz is not None:
        label = to_ras(volume.label_xyz, axes, flips)
    turn = inv_ornt_aff(orientation, volume.image_cxyz.shape[1:])
    native_mm, wanted_mm, grid_shape, offset = _grid(volume.affine @ turn, image.shape[1:], spacing_mm)
    ratio = wanted_mm / native_mm
    extent = volume.extent or intensity_range(volume.image_cxyz)
    if (ratio != 1).any():
        if 4 * image.shape[0] * math.prod(grid_shape) > MAX_BYTES:
            raise InvalidCase("affine", f"voxels of {native_mm.round(3)} mm resampled to {spacing_mm} mm: {grid_shape}")
        traces = _traces(extent, volume.files)
        image = resample(image.astype(np.float32), ratio, grid_shape, 1, offset)
        # Rounding of coordinates leaves values of 1e-13 beside the brain. float16 stores them as 0, so they must be 0
        # before the bounding box is taken, or it would be larger than the foreground that is stored.
        image[np.abs(image) <= traces] = 0
        label = None if label is None else resample(label, ratio, grid_shape, 0, offset)
        extent = intensity_range(image)
        box = extent.box
    else:
        box = extent.box and tuple(
            extent.box[axis] if flip > 0 else (size - extent.box[axis][1], size - extent.box[axis][0])
            for axis, flip, size in zip(axes, flips, grid_shape, strict=True)
        )
    if box is None:
        raise InvalidCase("empty", "no voxel left that is not zero")
    crop = tuple(slice(low, high) for low, high in box)
    label_zyx = None if label is None else np.ascontiguousarray(label[crop].T)
    stored, mean, std = _condensed(image[(slice(None), *crop)].transpose(0, 3, 2, 1), extent, volume.files)
    foreground, counts, voxels = _foreground_index(label_zyx)
    geometry = Geometry(
        native_shape=triple(volume.image_cxyz.shape[1:]),
        affine=tuple(tuple(row) for row in volume.affine.tolist()),
        axes=triple(axes),
        flips=triple(flips),
        grid_shape=grid_shape,
        spacing_mm=(float(wanted_mm[0]), float(wanted_mm[1]), float(wanted_mm[2])),
        box=(box[0], box[1], box[2]),
        offset=(float(offset[0]), float(offset[1]), float(offset[2])),
    )
    # Without resampling the prepared label restores to the native one, unless the crop removed label voxels.
    native = volume.label_xyz
    if native is not None and label_zyx is not None and (ratio == 1).all():
        native = None if np.count_nonzero(label_zyx) == np.count_nonzero(native) else native
    return Prepared(stored, label_zyx, mean, std, geometry, foreground, counts, native, voxels)


def restore(box_czyx: npt.NDArray[Any], geometry: Geometry) -> npt.NDArray[Any]:
    """Values on the prepared box, back on the native grid: (c, z, y, x) -> (c, x, y, z); zero outside the box.

    Exact for masks when the prepared voxels are the native ones or smaller. Floats are interpolated linearly,
    everything else to the nearest.
    """
    channels = box_czyx.shape[0]
    grid = np.zeros((channels, *geometry.grid_shape), box_czyx.dtype)
    grid[(slice(None), *(slice(low, high) for low, high in geometry.box))] = box_czyx.transpose(0, 3, 2, 1)
    if geometry.resampled:
        back = geometry.native_mm / np.array(geometry.spacing_mm)
        order = 1 if grid.dtype.kind == "f" else 0
        grid = resample(grid, back, geometry.ras_shape, order, -np.array(geometry.offset) * back)
    turned = grid[(slice(None), *(slice(None, None, flip) for flip in geometry.flips))]
    native = np.empty((channels, *geometry.native_shape), grid.dtype)
    native.transpose(0, *(1 + axis for axis in geometry.axes))[:] = turned
    return native


def resample(
    array: npt.NDArray[Any], ratio: npt.NDArray[np.float64], shape: Any, order: int, offset: Any = (0, 0, 0)
) -> npt.NDArray[Any]:
    """Sample (..., x, y, z) at index i * ratio + offset, linearly or (order 0) at the nearest voxel; edges repeat.

    Labels take the nearest voxel, as a mixture of label values is another label. Images are interpolated linearly, as
    in MONAI's Spacing: higher orders overshoot at edges and make negative intensities.
    """
    leading = array.shape[:-3]
    if order == 0:
        # round(9): indices half-way between voxels must not be decided by rounding errors of the product
        at = [np.arange(size) * step + first for size, step, first in zip(shape, ratio, offset, strict=True)]
        nearest = [np.rint(x.round(9)).clip(0, n - 1).astype(int) for x, n in zip(at, array.shape[-3:], strict=True)]
        picked: npt.NDArray[Any] = array[(..., *np.ix_(*nearest))]
        return picked
    from scipy import ndimage  # here, as it costs 8 MB in every process that imports this module

    output: npt.NDArray[Any] = np.empty((*leading, *shape), array.dtype)
    options: dict[str, Any] = {"offset": offset, "output_shape": tuple(shape), "order": order, "mode": "nearest"}
    for index in np.ndindex(*leading):
        ndimage.affine_transform(array[index], ratio, output=output[index], **options)
    return output


def _grid(affine: npt.NDArray[np.float64], shape: tuple[int, ...], spacing_mm: float) -> Any:
    """(native edges, new edges, new shape, native index of the first new voxel) as MONAI's Spacing chooses them.

    It aligns the new grid with the native grid's first corner or, where the axes are not orthogonal to 1e-8 (oblique
    ones after a file's float32), with its middle. Compared with MONAI itself in tests/test_preprocess.py.
    """
    native_mm = np.linalg.norm(affine[:3, :3], axis=0)
    # Edges that differ by less than a micrometre are the same: resampling for 1.0000001 mm would blur for nothing.
    wanted_mm = np.where(np.abs(native_mm - spacing_mm) < 1e-3, native_mm, spacing_mm)
    if (wanted_mm == native_mm).all():
        return native_mm, native_mm, triple(shape), np.zeros(3)
    # A^T A = U^T U, so A U^-1 is orthogonal: the new grid keeps the axes' directions and drops their shear, as MONAI's
    # zoom_affine does.
    upper = np.linalg.cholesky(affine[:3, :3].T @ affine[:3, :3]).T
    new = np.eye(4)
    new[:3, :3] = affine[:3, :3] @ np.linalg.inv(upper) @ np.diag(wanted_mm)
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, size - 1) for size in shape))]).T
    reached = (np.linalg.solve(new, affine) @ corners)[:3]
    new_shape = np.round(np.ptp(reached, axis=1) + 1)
    square = any(np.allclose((reached - corner[:, None]).min(axis=1), 0) for corner in reached.T)
    middle = np.array(shape) / 2 - np.linalg.solve(affine[:3, :3], new[:3, :3]) @ new_shape / 2
    return native_mm, wanted_mm, triple(new_shape), np.zeros(3) if square else middle


def to_ras(array: npt.NDArray[Any], axes: Any, flips: Any) -> npt.NDArray[Any]:
    """A (..., x, y, z) native array seen as R, A, S; `axes` and `flips` as in Geometry."""
    lead = array.ndim - 3
    turned = array.transpose(*range(lead), *(lead + axis for axis in axes))
    index: tuple[Any, ...] = (..., *(slice(None, None, int(flip)) for flip in flips))
    result: npt.NDArray[Any] = turned[index]
    return result


def _condensed(
    image_czyx: npt.NDArray[Any], extent: VolumeStats, files: tuple[str, ...]
) -> tuple[npt.NDArray[Any], tuple[float, ...], tuple[float, ...]]:
    """(the image in 16 bits, mean and standard deviation per channel), all as stored."""
    if whole := _integers(image_czyx, extent):
        return whole
    image, moments = np.ascontiguousarray(image_czyx), [_Moments() for _ in image_czyx]
    for channel, found in zip(image, moments, strict=True):
        found.add(channel.reshape(-1))
    means, stds = _statistics(moments)
    peaks = _peaks(extent, files)
    factors = tuple(map(_factor, peaks))
    halves = _halves(image, factors)
    for number, (peak, factor, mean, std) in enumerate(zip(peaks, factors, means, stds, strict=True)):
        lost = moments[number].count - np.count_nonzero(halves[number]) if factor != 1 else 0
        if abs(mean) > _OFFSET_STDS * std or lost > moments[number].count / 100:
            what = f"values around {mean:.5g} with a standard deviation of {std:.3g}, up to {peak:.5g} from zero"
            raise _beyond(number, files, f"{what}, are more than 16 bits can tell apart")
    means, stds = (tuple(v * f for v, f in zip(values, factors, strict=True)) for values in (means, stds))
    return halves, means, stds


def _peaks(extent: VolumeStats, files: tuple[str, ...]) -> list[float]:
    """The greatest absolute value of each channel. Raises InvalidCase when float32 does not hold it."""
    peaks = [max(-low, high) for low, high in zip(extent.low, extent.high, strict=True)]
    single = np.finfo(np.float32)
    for number, peak in enumerate(peaks):
        if peak and not float(single.tiny) <= peak <= float(single.max):
            raise _beyond(number, files, f"values up to {peak:.3g} from zero are beyond float32")
    return peaks


def _factor(peak: float) -> float:
    """The factor by which a channel is multiplied before it is stored: 1, unless float16 holds its values badly.

    A power of two, which changes the exponent alone and rounds nothing; mean and std are multiplied alike, so
    normalisation removes it again.
    """
    if not peak or _LEAST_PEAK <= peak <= _GREATEST_PEAK:
        return 1.0
    return math.ldexp(1, 15 - math.frexp(peak)[1])  # up to 2**15


def _traces(extent: VolumeStats, files: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """Per channel of the resampled image, the value up to which float16 will store 0: what rounding left behind."""
    traces = [_ROUNDED_TO_ZERO / _factor(peak) for peak in _peaks(extent, files)]
    return np.array(traces, np.float32).reshape(-1, 1, 1, 1)


def _beyond(channel: int, files: tuple[str, ...], what: str) -> InvalidCase:
    file = files[channel] if files else ""
    place = f"{file}: {MODALITIES[channel]}" if file else MODALITIES[channel]
    return InvalidCase("range", f"{place}: {what}; subtract the offset or rescale the image, and run again", file)


def _integers(
    image_czyx: npt.NDArray[Any], extent: VolumeStats
) -> tuple[npt.NDArray[np.int16], tuple[float, ...], tuple[float, ...]] | None:
    """The image as int16 with its statistics, if that changes no value."""
    if min(extent.low) < -32768 or max(extent.high) > 32767:
        return None
    integers = np.empty(image_czyx.shape, np.int16)
    same = np.empty(image_czyx.shape[2:], bool)
    moments = []
    for source, target in zip(image_czyx, integers, strict=True):
        moments.append(_Moments())
        for source_yx, target_yx in zip(source, target, strict=True):  # a plane fits the processor's cache
            np.copyto(target_yx, source_yx, casting="unsafe")
            if source.dtype.kind == "f" and not np.equal(target_yx, source_yx, out=same).all():
                return None
            moments[-1].add(target_yx.reshape(-1))
    return integers, *_statistics(moments)


class _Moments:
    """Sums over the non-zero voxels of a channel; zeros add nothing to either.

    In float64: a float32 sum of some 10^6 intensities loses the digits that a standard deviation needs. Added chunk by
    chunk in a fixed order, as the order of float additions decides the last bits.
    """

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0
        self._wide = np.empty(_CHUNK)

    def add(self, voxels: npt.NDArray[Any]) -> None:
        for start in range(0, voxels.size, _CHUNK):
            chunk = voxels[start : start + _CHUNK]
            wide = self._wide[: chunk.size]
            wide[:] = chunk
            self.count += int(np.count_nonzero(chunk))
            self.total += float(wide.sum())
            # Not np.dot: BLAS would start threads beside Ray's tasks, and sum in an order that depends on their number.
            self.squares += float(np.einsum("i,i->", wide, wide))


def _statistics(channels: list[_Moments]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of the non-zero voxels of each channel (1 where it would be 0).

    As E[x^2] - E[x]^2, which needs one pass. It loses 2 log2(|mean| / std) of float64's 53 bits, few for intensities,
    and may round below zero where all values are equal.
    """
    means = [moments.total / max(1, moments.count) for moments in channels]
    variances = [m.squares / max(1, m.count) - mean * mean for m, mean in zip(channels, means, strict=True)]
    return tuple(means), tuple(max(0.0, variance) ** 0.5 or 1.0 for variance in variances)


def _halves(image: npt.NDArray[Any], factors: tuple[float, ...]) -> npt.NDArray[np.float16]:
    """The channels, each times its factor, as float16."""
    halves = np.empty(image.shape, np.float16)
    for channel, out, factor in zip(image, halves, factors, strict=True):
        source, target = channel.reshape(-1), out.reshape(-1)
        for start in range(0, source.size, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            target[chunk] = source[chunk] if factor == 1 else np.multiply(source[chunk], factor, dtype=np.float64)
    return halves


def _foreground_index(label_zyx: npt.NDArray[np.uint8] | None) -> tuple[npt.NDArray[np.int32], Any, tuple[int, ...]]:
    """`foreground`, `foreground_counts` and `label_voxels` of `Prepared`."""
    indices, counts, voxels = [np.zeros(0, np.int32)], [], []
    if label_zyx is not None:
        tumour = np.flatnonzero(label_zyx.reshape(-1) != 0)
        values = label_zyx.reshape(-1)[tumour]
        for value in np.unique(values):
            found = tumour[values == value]
            # Evenly along the flat index, not at random: the same case always gives the same object.
            pick = np.linspace(0, len(found) - 1, min(len(found), FOREGROUND_VOXELS)).astype(int)
            indices.append(found[pick].astype(np.int32))
            counts.append((int(value), len(pick)))
            voxels.append(len(found))
    return np.concatenate(indices), tuple(counts), tuple(voxels)


def triple(values: Any) -> Triple:
    first, second, third = (int(v) for v in values)
    return first, second, third
