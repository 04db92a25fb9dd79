"""Decode: the bytes of a case's NIfTI files, checked, as arrays with geometry.

In: bytes of .nii or .nii.gz (NIfTI-1, https://nifti.nimh.nih.gov/nifti-1).
Out: a `Volume`, or `Refused` with a reason code. Nothing is half-used: nibabel alone reads cut-off and
bit-flipped files without a word, because it never reaches the gzip checksum.
"""

import io
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import igzip, isal_zlib
from nibabel.spatialimages import HeaderDataError

REASONS = {
    "missing": "a file of the case is not there",
    "changed": "the files are not those of the manifest",
    "gzip_damaged": "the gzip stream is cut off, altered or followed by something else",
    "not_nifti": "no NIfTI-1 single-file header",
    "header": "dimensions, data type or offset make no sense",
    "size": "fewer or more bytes than the header says",
    "affine": "the affine is singular or not finite, or disagrees with the voxel size",
    "mismatch": "modalities or label differ in shape or affine",
    "not_finite": "a voxel is NaN or infinite",
    "empty": "a modality has no voxel that is not zero",
    "range": "intensities do not fit 16 bits",
    "label_values": "a label value is fractional or outside the convention",
}
_KINDS = {"u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"}
MAX_BYTES = 4 << 30
_DEFLATE_RATIO = 1032  # no deflate stream unpacks to more than this many times its length


class Refused(Exception):  # noqa: N818 (a verdict on a file, not a fault of ours)
    """A case that cannot be used; `reason` is a key of REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Volume:
    """A decoded case on its native grid.

    `image_cxyz`: (4, x, y, z), native dtype unless the header scales it; `label_xyz` uint8 or None;
    `affine`: 4x4 voxel-to-world, mm.
    """

    image_cxyz: npt.NDArray[Any]
    label_xyz: npt.NDArray[np.uint8] | None
    affine: npt.NDArray[np.float64]


def decode_case(images: list[bytes], label: bytes | None, allowed: tuple[int, ...]) -> Volume:
    """Decode one 4D image or four 3D images, and the label if given. Raises Refused."""
    parts = [decode(content, f"image {number}") for number, content in enumerate(images)]
    affine = parts[0][1]
    if len(parts) == 1:
        image = parts[0][0]
        if image.ndim != 4 or image.shape[3] != 4:
            raise Refused("header", f"image has shape {image.shape}, expected (x, y, z, 4)")
        image_cxyz = np.moveaxis(image, 3, 0)
    else:
        for array, other in parts:
            _same_grid(array.shape, other, parts[0][0].shape, affine, "modalities")
        if parts[0][0].ndim != 3:
            raise Refused("header", f"a modality has shape {parts[0][0].shape}, expected (x, y, z)")
        # (c, z, y, x) in memory like a 4D file, seen as (c, x, y, z)
        image_cxyz = np.stack([array.T for array, _ in parts]).transpose(0, 3, 2, 1)
    for number, channel in enumerate(image_cxyz):
        if channel.dtype.kind == "f" and not np.isfinite(channel).all():
            raise Refused("not_finite", f"modality {number}")
        if not channel.any():
            raise Refused("empty", f"modality {number}")
    if label is None:
        return Volume(image_cxyz, None, affine)
    array, label_affine = decode(label, "label")
    _same_grid(array.shape, label_affine, image_cxyz.shape[1:], affine, "image and label")
    values = np.unique(array)
    if not np.isin(values, allowed).all():
        strange = [v.item() for v in values if v not in allowed][:5]
        raise Refused("label_values", f"{strange} not in {list(allowed)}")
    return Volume(image_cxyz, array.astype(np.uint8), affine)


def decode(content: bytes, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """(array in file order (x, y, z[, c]), affine) of one file. Raises Refused."""
    if content[:2] != b"\x1f\x8b":
        header, offset, wanted = _header(content[:544], name)
        if len(content) != wanted:
            raise Refused("size", f"{name}: {len(content)} bytes, header says {wanted}")
        raw: Any = content
    else:
        try:
            with igzip.IGzipFile(fileobj=io.BytesIO(content)) as file:
                start = file.read(352)
                header, offset, wanted = _header(start, name)
                if wanted > _DEFLATE_RATIO * len(content):
                    raise Refused("size", f"{name}: {len(content)} bytes cannot hold the {wanted} of the header")
                raw = np.empty(wanted, np.uint8)  # never more than the header says: a bomb stays small
                raw[: len(start)] = np.frombuffer(start, np.uint8)
                rest, filled = memoryview(raw), len(start)
                while filled < wanted and (count := file.readinto(rest[filled:])):
                    filled += count
                if filled < wanted:
                    raise Refused("size", f"{name}: {filled} bytes, header says {wanted}")
                if file.read(1):  # also drives the checksum at the end of the stream
                    raise Refused("size", f"{name}: more than the {wanted} bytes the header says")
        except (EOFError, OSError, isal_zlib.error) as error:  # type: ignore[misc]
            raise Refused("gzip_damaged", f"{name}: {error}") from error
    shape = tuple(int(n) for n in header.get_data_shape())
    array = np.frombuffer(raw, header.get_data_dtype(), int(np.prod(shape)), offset).reshape(shape, order="F")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    slope, inter = header.get_slope_inter()
    if slope is not None and (slope, inter) != (1.0, 0.0):
        array = array.astype(np.float32) * np.float32(slope) + np.float32(inter)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array, _affine(header, name)


def _header(start: bytes, name: str) -> tuple[nib.Nifti1Header, int, int]:
    """(header, offset of the voxels, whole length in bytes), or Refused."""
    if len(start) < 352 or start[344:348] != b"n+1\0":
        raise Refused("not_nifti", name)
    header = nib.Nifti1Header(start[:348], check=False)
    if int(header["sizeof_hdr"]) != 348:
        raise Refused("not_nifti", f"{name}: sizeof_hdr is {int(header['sizeof_hdr'])}")
    dims = [int(n) for n in header["dim"]]
    if not 3 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise Refused("header", f"{name}: dim is {dims}")
    try:
        kind = header.get_data_dtype().str[1:]
        header.get_slope_inter()
    except (KeyError, HeaderDataError) as error:
        raise Refused("header", f"{name}: datatype or scaling: {error}") from error
    offset = float(header["vox_offset"])
    if kind not in _KINDS or not (352 <= offset < 2**31) or offset % 1:
        raise Refused("header", f"{name}: datatype {int(header['datatype'])}, vox_offset {offset}")
    wanted = int(offset) + int(np.prod(dims[1 : dims[0] + 1], dtype=object)) * int(kind[1:])
    if wanted > MAX_BYTES:
        raise Refused("header", f"{name}: header asks for {wanted} bytes")
    return header, int(offset), wanted


def _affine(header: nib.Nifti1Header, name: str) -> npt.NDArray[np.float64]:
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
    except (ValueError, HeaderDataError) as error:  # a quaternion longer than 1, a qfac other than 1 or -1
        raise Refused("affine", f"{name}: {error}") from error
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    # Edges outside 0.01 to 100 mm: metres, microns or damage; resampling would ask for a grid of any size
    sound = np.isfinite(affine).all() and spacing_mm.min() >= 0.01 and spacing_mm.max() <= 100
    if not sound or abs(np.linalg.det(affine[:3, :3])) < 1e-3 * spacing_mm.prod():
        raise Refused("affine", f"{name}: {affine[:3].round(6).tolist()}")
    if not np.allclose(spacing_mm, header.get_zooms()[:3], rtol=1e-2):
        raise Refused("affine", f"{name}: affine says {spacing_mm.round(4)} mm, pixdim {header.get_zooms()[:3]}")
    return affine


def _same_grid(shape: Any, affine: Any, other_shape: Any, other_affine: Any, what: str) -> None:
    if tuple(shape) != tuple(other_shape):
        raise Refused("mismatch", f"{what}: shapes {tuple(other_shape)} and {tuple(shape)}")
    if not np.allclose(affine, other_affine, atol=1e-3):
        raise Refused("mismatch", f"{what}: affines differ by up to {np.abs(affine - other_affine).max():.3g}")
