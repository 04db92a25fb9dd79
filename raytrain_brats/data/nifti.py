"""Decode and check a case's NIfTI files. Runs in data tasks, workers and the driver.

In: bytes of .nii or .nii.gz (NIfTI-1, https://nifti.nimh.nih.gov/nifti-1).
Out: a `Volume`, or `InvalidCase` with a reason code (docs/refusals.md) and the file at fault. The check is strict,
because nibabel alone reads truncated and bit-flipped files without an error: it never reaches the gzip checksum.

The arrays are views of buffers that this thread reuses when nobody references them any more (`gunzip.take`).
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import HeaderDataError

from raytrain_brats.data import gunzip
from raytrain_brats.labels import MODALITIES

REASONS = {
    "missing": "a file of the case is not there",
    "changed": "the files are not those of the manifest",
    "gzip_damaged": "the gzip stream is cut off, altered or followed by something else",
    "not_nifti": "no NIfTI-1 single-file header",
    "header": "dimensions, data type, bits, offset, scaling or units make no sense",
    "extension": "the header's extensions run into the voxels",
    "size": "fewer or more bytes than the header says",
    "limit": "the header asks for more memory than a case may take, or than such a file is likely to fill",
    "affine": "the affine is singular or not finite, or disagrees with the voxel size",
    "mismatch": "modalities or label differ in shape or affine",
    "not_finite": "a voxel is NaN or infinite",
    "constant": "a modality has the same value in all voxels",
    "empty": "a modality has no voxel that is not zero",
    "range": "intensities are more than 16 bits can tell apart",
    "label_values": "a label value is fractional or outside the convention",
}
_KINDS = {"u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"}
MAX_BYTES = 4 << 30
_PLAUSIBLE_BYTES, _PLAUSIBLE_RATIO = 1 << 30, 100  # real images shrink 5 to 20 times, labels of a few MB 1,000 times
_CHUNK = 1 << 15  # voxels worked on at a time, so that they stay in the processor's cache
_NEARLY_WHOLE = 1e-3


class InvalidCase(Exception):  # noqa: N818 - a property of a file, not an error of ours
    """A case that cannot be used; `reason` is a key of REASONS, `file` the one at fault ("": the case as a whole)."""

    def __init__(self, reason: str, detail: str, file: str = "") -> None:
        assert reason in REASONS
        super().__init__(reason, detail)
        self.reason, self.detail, self.file = reason, detail, file


@dataclass(frozen=True)
class VolumeStats:
    """Least and greatest value per channel, and the foreground's bounding box.

    `box`: (low, high) per axis x, y, z of the voxels that are nonzero in any channel; None when there is none.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    box: tuple[tuple[int, int], ...] | None


@dataclass(frozen=True)
class Volume:
    """A decoded case on its native grid.

    `image_cxyz`: (4, x, y, z), native dtype unless the header scales it; `label_xyz` uint8 or None;
    `affine`: 4x4 voxel-to-world, mm; `extent` of the image, where it is known already; `header`: the 348 bytes of the
    first file's, for `on_grid`; `files`: the names of those that hold MODALITIES. Both empty where there is no file.
    """

    image_cxyz: npt.NDArray[Any]
    label_xyz: npt.NDArray[np.uint8] | None
    affine: npt.NDArray[np.float64]
    extent: VolumeStats | None = None
    header: bytes = b""
    files: tuple[str, ...] = ()


class File(NamedTuple):
    """One decoded file: `array` in file order (x, y, z[, c]); `scaled`: its header has a slope or an intercept."""

    array: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    header: bytes
    scaled: bool
    name: str


def decode_case(
    images: list[bytes],
    label: bytes | None,
    allowed: tuple[int, ...],
    names: Sequence[str] = (),
    channels: tuple[int, ...] | None = None,
) -> Volume:
    """Decode one 4D image or four 3D images, and the label if given. Raises InvalidCase.

    `names` are those of the files in this order, for messages; `channels` says which channel of a 4D file holds each
    of MODALITIES (None: they are in that order).
    """
    names = names or [*(f"image {number}" for number in range(len(images))), "label"]
    parts = [decode(content, name) for content, name in zip(images, names, strict=False)]
    first, files = parts[0], tuple(part.name for part in parts) * (1 if len(parts) > 1 else len(MODALITIES))
    image_cxyz = _four_files(parts) if len(parts) > 1 else _one_file(first, channels)
    extent = intensity_range(image_cxyz)
    for name, file, low, high in zip(MODALITIES, files, extent.low, extent.high, strict=True):
        if not math.isfinite(low) or not math.isfinite(high):
            raise InvalidCase("not_finite", f"{file}: {name} has a voxel that is NaN or infinite", file)
        if low == high:
            raise InvalidCase("constant" if low else "empty", f"{file}: {name} is {low} everywhere", file)
    found = None
    if label is not None:
        last = decode(label, names[len(images)])
        with _about(last.name):
            _same_grid(last, image_cxyz.shape[1:], first.affine, first.name)
            found = _label(_nearly_whole(last.array) if last.scaled else last.array, allowed)
    return Volume(image_cxyz, found, first.affine, extent, first.header, files)


def background_warning(volume: Volume) -> str:
    """A warning when the background is not 0, as after a z-score over all voxels; else "".

    Statistics and the foreground box are of voxels that are not 0, as BraTS and MSD publish their images.
    """
    corners_c8 = volume.image_cxyz[:, :: volume.image_cxyz.shape[1] - 1 or 1, :: volume.image_cxyz.shape[2] - 1 or 1]
    corners_c8 = corners_c8[..., :: volume.image_cxyz.shape[3] - 1 or 1].reshape(len(MODALITIES), -1)
    for name, values in zip(MODALITIES, corners_c8, strict=True):
        if values[0] != 0 and (values == values[0]).all():
            return (
                f"{name} is {values[0]:.4g} in all corners; a background other than 0 is taken for tissue: subtract it"
            )
    return ""


def _one_file(file: File, channels: tuple[int, ...] | None) -> npt.NDArray[Any]:
    """The image (c, x, y, z) of a 4D file: a view, or a copy where the channels are in another order."""
    if file.array.ndim != 4 or file.array.shape[3] != len(MODALITIES):
        shape = file.array.shape
        raise InvalidCase("header", f"{file.name}: image has shape {shape}, expected (x, y, z, 4)", file.name)
    if channels is None or channels == tuple(range(len(MODALITIES))):
        return np.moveaxis(file.array, 3, 0)
    assert sorted(channels) == list(range(len(MODALITIES))), channels
    return _stacked([file.array[..., channel] for channel in channels])


def _four_files(parts: list[File]) -> npt.NDArray[Any]:
    """The image (c, x, y, z) of 3D files on one grid."""

    def agree(one: File, other: File) -> bool:
        return one.array.shape == other.array.shape and np.allclose(one.affine, other.affine, atol=1e-3)

    first = parts[0]
    if first.array.ndim == 3 and not any(agree(part, first) for part in parts[1:]):
        first = parts[1]  # the first file differs from all others, so it is the one to blame
    for part in parts:
        with _about(part.name):
            _same_grid(part, first.array.shape, first.affine, first.name)
            if part.array.ndim != 3:
                raise InvalidCase("header", f"a modality has shape {part.array.shape}, expected (x, y, z)")
    return _stacked([part.array for part in parts])


def _stacked(arrays_xyz: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """(c, z, y, x) in memory like a 4D file, seen as (c, x, y, z)."""
    kind, shape = np.result_type(*arrays_xyz), (len(arrays_xyz), *arrays_xyz[0].shape[::-1])
    whole = gunzip.take(kind.itemsize * math.prod(shape)).view(kind).reshape(shape)
    return np.stack([array.T for array in arrays_xyz], out=whole).transpose(0, 3, 2, 1)


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Errors raised inside become InvalidCase errors that name this file."""
    try:
        yield
    except gunzip.Damaged as error:
        raise InvalidCase("gzip_damaged", f"{name}: {error}", name) from error
    except gunzip.WrongLength as error:
        raise InvalidCase("size", f"{name}: {error}", name) from error
    except InvalidCase as error:
        raise InvalidCase(error.reason, f"{name}: {error.detail}", name) from error


def decode(content: bytes, name: str) -> File:
    """Decode one file. Raises InvalidCase."""
    with _about(name):
        packed = content[:2] == b"\x1f\x8b"
        start = gunzip.head(content, 352) if packed else content[:352]
        header, offset, wanted = _header(start)
        if packed and wanted > max(_PLAUSIBLE_BYTES, _PLAUSIBLE_RATIO * len(content)):
            raise InvalidCase("limit", f"header asks for {wanted} bytes out of {len(content)}")
        if not packed and len(content) != wanted:
            raise InvalidCase("size", f"{len(content)} bytes, header says {wanted}")
        raw: Any = gunzip.unpack(content, wanted) if packed else content  # never more memory than the header says
        _check_extensions(bytes(raw[348:offset]), header.endianness)
        affine = _affine(header)
    shape = tuple(int(n) for n in header.get_data_shape())
    voxels = np.frombuffer(raw, header.get_data_dtype(), math.prod(shape), offset)
    slope, inter = header.get_slope_inter()
    scaled = slope is not None and (slope, inter) != (1.0, 0.0)
    if scaled:
        voxels = _scaled(voxels, slope, inter)
    elif not voxels.dtype.isnative:
        native = gunzip.take(voxels.nbytes).view(voxels.dtype.newbyteorder("="))
        native[:] = voxels
        voxels = native
    while len(shape) > 3 and shape[-1] == 1:  # trailing dimensions of length 1 carry nothing
        shape = shape[:-1]
    if len(shape) == 5 and shape[3] == 1:  # components of a vector have the fifth dimension, as ITK writes them
        shape = (*shape[:3], shape[4])
    return File(voxels.reshape(shape, order="F"), affine, start[:348], scaled, name)


def decode_label(content: bytes, name: str, allowed: tuple[int, ...]) -> File:
    """Decode a label (x, y, z) alone, as uint8. Raises InvalidCase."""
    file = decode(content, name)
    with _about(name):
        if file.array.ndim != 3:
            raise InvalidCase("header", f"a label has shape {file.array.shape}, expected (x, y, z)")
        return file._replace(array=_label(_nearly_whole(file.array) if file.scaled else file.array, allowed))


def same_grid(file: File, shape: tuple[int, ...], affine: npt.NDArray[np.float64], other: str) -> None:
    """Raises InvalidCase unless the file has this shape and, to a thousandth, this affine."""
    with _about(file.name):
        _same_grid(file, shape, affine, other)


def intensity_range(image_cxyz: npt.NDArray[Any]) -> VolumeStats:
    """The statistics of an image, in one pass in memory order; a NaN makes at least one bound NaN."""
    order = np.argsort([-abs(stride) for stride in image_cxyz.strides[1:]], kind="stable")
    slowest_first = image_cxyz.transpose(0, *(1 + order))
    used = np.zeros(slowest_first.shape[2:], bool)
    lows, highs = [], []
    for channel in slowest_first:
        low, high, found = _bounds(channel)
        lows.append(low)
        highs.append(high)
        used |= found
    planes = range(slowest_first.shape[1])
    first = next((n for n in planes if slowest_first[:, n].any()), None)
    if first is None:
        return VolumeStats(tuple(lows), tuple(highs), None)
    last = next(n for n in reversed(planes) if slowest_first[:, n].any())
    spans = [(first, last + 1)]
    for axis in (1, 0):
        touched = np.flatnonzero(used.any(axis=axis))
        spans.append((int(touched[0]), int(touched[-1]) + 1))
    box = tuple(spans[list(order).index(axis)] for axis in range(3))
    return VolumeStats(tuple(lows), tuple(highs), box)


def _bounds(planes: npt.NDArray[Any]) -> tuple[float, float, npt.NDArray[np.bool_]]:
    """(least, greatest, where along the planes anything is not zero) of one channel, (planes, rows, columns)."""
    # IEEE floats without a sign bit compare like unsigned integers, with NaN above all: one integer maximum finds the
    # greatest value and whether any has a sign. If none has, a zero in the corner is the least value: no second pass.
    bits = planes.view(f"u{planes.itemsize}")
    most = _along(np.maximum, bits)
    greatest = most.max()
    if bits[0, 0, 0] == 0 and (planes.dtype.kind == "u" or not greatest >> (8 * planes.itemsize - 1)):
        return planes[0, 0, 0].item(), greatest.view(planes.dtype).item(), most != 0
    low, high = _along(np.minimum, planes), _along(np.maximum, planes)
    return low.min().item(), high.max().item(), (low != 0) | (high != 0)


def _along(better: np.ufunc, planes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The least or greatest over planes, for each voxel of a plane; `better.reduce` would be three times slower."""
    best: npt.NDArray[Any] = planes[0].copy()
    for plane in planes[1:]:
        better(best, plane, out=best)
    return best


def _scaled(voxels: npt.NDArray[Any], slope: float, inter: float) -> npt.NDArray[np.float32]:
    """slope * voxel + inter in float64, rounded once to float32; in chunks, without a float64 copy of the volume."""
    scaled, wide = gunzip.take(4 * voxels.size).view(np.float32), np.empty(_CHUNK)
    with np.errstate(over="ignore", invalid="ignore"):  # infinite voxels are rejected later
        for start in range(0, voxels.size, _CHUNK):
            chunk = voxels[start : start + _CHUNK]
            product = np.multiply(chunk, slope, out=wide[: chunk.size], dtype=np.float64)
            product += inter
            scaled[start : start + _CHUNK] = product
    return scaled


def _nearly_whole(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Round values within 0.001 of a whole number: a program that stores scaled integers makes 1.00001 of 1."""
    with np.errstate(invalid="ignore"):
        whole = np.rint(array)
        return np.where(np.abs(array - whole) <= _NEARLY_WHOLE, whole, array)


def _label(array: npt.NDArray[Any], allowed: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    with np.errstate(invalid="ignore"):
        label: npt.NDArray[np.uint8] = array.astype(np.uint8, copy=False)
    sound = label is array or np.array_equal(label, array)
    if not sound or any((label == value).any() for value in range(int(label.max()) + 1) if value not in allowed):
        strange = [value.item() for value in np.unique(array) if value not in allowed]
        remedy = "map them to the convention's, or name the convention that the labels follow"
        if any(value != np.rint(value) for value in strange):
            remedy = "labels are whole numbers: resample by the nearest voxel, save as integers and run again"
        raise InvalidCase("label_values", f"{strange[:5]} not in {list(allowed)}; {remedy}")
    return label


def _header(start: bytes) -> tuple[nib.Nifti1Header, int, int]:
    """(header, offset of the voxels, whole length in bytes). Raises InvalidCase."""
    if len(start) < 352 or start[344:348] != b"n+1\0":
        raise InvalidCase("not_nifti", "no single-file NIfTI-1 header")
    header = nib.Nifti1Header(start[:348], check=False)
    if int(header["sizeof_hdr"]) != 348:
        raise InvalidCase("not_nifti", f"sizeof_hdr is {int(header['sizeof_hdr'])}")
    dims = [int(n) for n in header["dim"]]
    if not 3 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise InvalidCase("header", f"dim is {dims}")
    try:
        kind = header.get_data_dtype().str[1:]
        header.get_slope_inter()
    except (KeyError, HeaderDataError) as error:
        raise InvalidCase("header", f"datatype or scaling: {error}") from error
    slope, inter, units = float(header["scl_slope"]), float(header["scl_inter"]), int(header["xyzt_units"]) & 7
    if math.isinf(slope) or (math.isnan(slope) and not (math.isnan(inter) or inter == 0)):
        raise InvalidCase("header", f"scl_slope {slope}, scl_inter {inter}")
    if units not in (0, 2):
        raise InvalidCase("header", f"the unit of length is not mm (xyzt_units {int(header['xyzt_units'])})")
    codes = int(header["qform_code"]), int(header["sform_code"])
    if min(codes) < 0 or max(codes) > 5:
        raise InvalidCase("header", f"qform_code and sform_code are {codes}")
    offset, bits = float(header["vox_offset"]), int(header["bitpix"])
    if kind not in _KINDS or bits != 8 * int(kind[1:]) or not (352 <= offset < 2**31) or offset % 1:
        raise InvalidCase("header", f"datatype {int(header['datatype'])}, bitpix {bits}, vox_offset {offset}")
    wanted = int(offset) + math.prod(dims[1 : dims[0] + 1]) * int(kind[1:])
    if wanted > MAX_BYTES:
        raise InvalidCase("limit", f"header asks for {wanted} bytes")
    return header, int(offset), wanted


def _check_extensions(block: bytes, endian: str) -> None:
    """`block` is between the header and the voxels: 4 flag bytes, then extensions that fill it. Raises InvalidCase."""
    position, order = 4, "little" if endian == "<" else "big"
    while block[0] and (position == 4 or block[position:].strip(b"\0")):
        size = int.from_bytes(block[position : position + 4], order, signed=True)  # type: ignore[arg-type]
        if size < 8 or position + size > len(block):
            raise InvalidCase("extension", f"{size} bytes, {len(block) - position} are left before the voxels")
        position += size


@np.errstate(over="ignore", invalid="ignore")  # an affine that overflows is rejected
def _affine(header: nib.Nifti1Header) -> npt.NDArray[np.float64]:
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1  # the standard: a qfac of 0 means 1
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
    except (ValueError, HeaderDataError) as error:  # a quaternion longer than 1, a qfac other than 1 or -1
        raise InvalidCase("affine", str(error)) from error
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    # Edges outside 0.01 to 100 mm: metres, microns or damage; resampling would ask for a grid of any size
    sound = np.isfinite(affine).all() and spacing_mm.min() >= 0.01 and spacing_mm.max() <= 100
    if not sound or abs(np.linalg.det(affine[:3, :3])) < 1e-3 * spacing_mm.prod():
        raise InvalidCase("affine", f"{affine[:3].round(6).tolist()}")
    if not np.allclose(spacing_mm, header.get_zooms()[:3], rtol=1e-2):
        raise InvalidCase("affine", f"affine says {spacing_mm.round(4)} mm, pixdim {header.get_zooms()[:3]}")
    return affine


def _same_grid(file: File, shape: tuple[int, ...], affine: npt.NDArray[np.float64], other: str) -> None:
    if file.array.shape != shape:
        raise InvalidCase("mismatch", f"shape {file.array.shape}, that of {other} is {shape}")
    if not np.allclose(file.affine, affine, atol=1e-3):
        apart = np.abs(file.affine - affine).max()
        raise InvalidCase("mismatch", f"its affine differs from that of {other} by up to {apart:.3g}")
