"""Good NIfTI files by a seed, and a second reader to judge decoders by.

In: a `random.Random`.
Out: `Good` files, all valid; `read`, which reads one by the standard alone (nifti1.h: struct and formulas, neither
nibabel nor our decoder) and names every fault it finds.
"""

import gzip
import random
import struct
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

KINDS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
MEANINGLESS = (*range(4, 40), *range(56, 70), *range(74, 76), *range(92, 108), *range(120, 123), *range(124, 252),
               *range(328, 344), *range(349, 352))  # fmt: skip
"""Bytes of the header that say nothing about voxels or geometry: names, descriptions, intent, times, display range."""
SHAPES = ((7, 6, 5), (5, 8, 4), (9, 3, 6), (4, 4, 4))


@dataclass(frozen=True)
class Good:
    """A valid file and what is in it. `label` is a valid file on the same grid, of values 0 to 3."""

    plain: bytes
    endian: str
    label: bytes
    about: dict[str, Any] = field(compare=False)


@dataclass(frozen=True)
class Reading:
    """What the standard says about a file's bytes; without faults `voxels_xyzc` and `affine` are there."""

    faults: list[str]
    voxels_xyzc: npt.NDArray[np.float64] | None = None
    affine: npt.NDArray[np.float64] | None = None


def nifti(
    array: npt.NDArray[Any],
    affine: Any = None,
    codes: tuple[int, int] = (1, 0),
    endian: str = "<",
    extension: bytes = b"\0\0\0\0",
    **fields: Any,
) -> bytes:
    """A single-file NIfTI-1; `codes` are sform and qform, `fields` overwrite the header."""
    affine = np.eye(4) if affine is None else affine
    header = nib.Nifti1Header(endianness=endian)
    header.set_data_shape(array.shape)
    header.set_data_dtype(array.dtype)
    header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    header.set_qform(affine, codes[1])
    header.set_sform(affine, codes[0])
    header["vox_offset"] = 348 + len(extension)
    header["magic"] = b"n+1"
    for name, value in fields.items():
        header[name] = value
    voxels = array.astype(endian + array.dtype.str[1:]).tobytes("F")
    return bytes(header.binaryblock) + extension + voxels


def good(dice: random.Random) -> Good:
    """Any valid 4-modality file: type, byte order, scaling, affine, transform codes, extensions."""
    kind, endian, shape = dice.choice(list(KINDS.values())), dice.choice("<>"), dice.choice(SHAPES)
    top = 100 if kind[1] == "1" else 3000
    noise = np.random.RandomState(dice.randrange(2**32))
    low = 0 if kind[0] == "u" else -top // 9
    array: npt.NDArray[Any] = noise.randint(low, top, (*shape, 4)) * (noise.rand(*shape, 1) < 0.6)
    if kind[0] == "f" and dice.random() < 0.5:
        array = array * 1.375
    array[0, 0, 0], array[1, 1, 1] = 0, 1  # at least two values in each modality
    codes = dice.choice([(1, 0), (2, 1), (0, 1), (0, 0), (4, 3), (0, 2)])
    slope, inter = dice.choice([(1, 0), (0, 7), (np.nan, np.nan), (0.5, -3), (-2, 1000), (0.1, 0), (1 / 3, 0.7)])
    fields = {"scl_slope": slope, "scl_inter": inter, "xyzt_units": dice.choice([0, 2, 10])}
    extensions = b"".join(
        struct.pack(endian + "ii", size, dice.choice([0, 4, 6, 44])) + bytes(dice.choices(range(256), k=size - 8))
        for size in dice.choices([16, 32, 48], k=dice.choice([0, 0, 1, 3]))
    )
    extension = bytes([bool(extensions), 0, 0, 0]) + extensions
    affine = any_affine(dice)
    label = noise.randint(0, 4, shape).astype(dice.choice(["u1", "i2", "f4"]))
    if noise.rand() < 0.15:  # as SimpleITK writes vectors; drawn beside `dice`, so that a number stays the same mutant
        array = array.reshape(*shape, 1, 4)
    return Good(
        nifti(array.astype(kind), affine, codes, endian, extension, **fields),
        endian,
        gzip.compress(nifti(label, affine, codes, endian, xyzt_units=2), 1, mtime=0),
        {"kind": kind, "shape": shape, "codes": codes, "scaling": (slope, inter), "extension": len(extension)},
    )


def any_affine(dice: random.Random) -> npt.NDArray[np.float64]:
    """A turned, flipped, permuted grid of 0.5 to 4 mm."""
    turn, _ = np.linalg.qr(np.random.RandomState(dice.randrange(2**32)).normal(size=(3, 3)))
    if dice.random() < 0.6:
        turn = np.eye(3)[:, dice.sample(range(3), 3)]
    affine = np.eye(4)
    signs = dice.choices([1, -1], k=3)
    spacing_mm = dice.choice([(1, 1, 1), [dice.choice([0.5, 0.9, 1, 2.5, 4]) for _ in range(3)]])
    affine[:3, :3] = turn * np.multiply(signs, spacing_mm)
    affine[:3, 3] = [dice.uniform(-100, 100) for _ in range(3)]
    return affine


def packed(plain: bytes, dice: random.Random) -> bytes:
    """The file as some program would have compressed it."""
    way = dice.choice(["plain", "gzip", "gzip", "gzip", "members", "padded", "named"])
    level = dice.choice([0, 1, 6, 9])
    if way == "plain":
        return plain
    if way == "members":  # as bgzip makes
        step = dice.choice([100, 401, 4096])
        return b"".join(gzip.compress(plain[i : i + step], level, mtime=0) for i in range(0, len(plain), step))
    whole = gzip.compress(plain, level, mtime=dice.randrange(2**31))
    if way == "named":
        return whole[:3] + b"\x08" + whole[4:10] + b"BRATS_001.nii\0" + whole[10:]
    return whole + bytes(512) if way == "padded" else whole


def read(plain: bytes) -> Reading:
    """A 4-modality file by the standard. Bounds are wider than a decoder's need be: each fault is one beyond doubt."""
    if len(plain) < 352:
        return Reading(["shorter than a header"])
    endian = "<" if plain[:4] == struct.pack("<i", 348) else ">"
    if struct.unpack_from(endian + "i", plain)[0] != 348:
        return Reading(["sizeof_hdr"])
    faults = [] if plain[344:348] == b"n+1\0" else ["magic"]
    dims = struct.unpack_from(endian + "8h", plain, 40)
    code, bits = struct.unpack_from(endian + "2h", plain, 70)
    offset, slope, inter = struct.unpack_from(endian + "3f", plain, 108)
    qform, sform = struct.unpack_from(endian + "2h", plain, 252)
    shape = dims[1 : 1 + max(0, dims[0])]
    channels = list(shape[3:])
    while channels[-1:] == [1]:
        channels.pop()
    if not 3 <= dims[0] <= 7 or min(shape) < 1 or channels not in ([4], [1, 4]):  # a vector's are in the fifth
        return Reading([*faults, f"dim {dims}"])
    kind = KINDS.get(code)
    if kind is None or bits != 8 * int(kind[1:]):
        return Reading([*faults, f"datatype {code}, bitpix {bits}"])
    if not (352 <= offset < 2**31) or offset != int(offset):
        return Reading([*faults, f"vox_offset {offset}"])
    if len(plain) != int(offset) + int(np.prod(shape, dtype=object)) * int(kind[1:]):
        return Reading([*faults, f"{len(plain)} bytes for {shape}, {kind}, {offset}"])
    if np.isinf(slope) or (np.isfinite(slope) and slope != 0 and not np.isfinite(inter)):
        faults.append(f"scaling {slope}, {inter}")
    if plain[123] & 7 not in (0, 2):
        faults.append(f"xyzt_units {plain[123]}")
    if not (0 <= qform <= 5 and 0 <= sform <= 5):
        faults.append(f"codes {qform}, {sform}")
    faults += _extension_faults(plain[348 : int(offset)], endian)
    affine, found = _affine(plain, endian, qform, sform)
    voxels = np.frombuffer(plain, endian + kind, offset=int(offset)).astype(np.float64)
    with np.errstate(all="ignore"):
        if np.isfinite(slope) and slope != 0:
            voxels = voxels * slope + inter
            if (slope, inter) != (1, 0):
                voxels = voxels.astype(np.float32).astype(np.float64)
        voxels_xyzc = voxels.reshape(shape, order="F").reshape((*shape[:3], 4), order="F")
        if not np.isfinite(voxels_xyzc).all():
            faults.append("voxels not finite")
        elif (voxels_xyzc.min((0, 1, 2)) == voxels_xyzc.max((0, 1, 2))).any():
            faults.append("constant modality")
    return Reading(faults + found, voxels_xyzc, affine)


def _extension_faults(block: bytes, endian: str) -> list[str]:
    if not block[0]:
        return []
    position = 4
    while position == 4 or block[position:].strip(b"\0"):
        if position + 8 > len(block):
            return ["no room for an extension"]
        size = struct.unpack_from(endian + "i", block, position)[0]
        if size < 8 or position + size > len(block):
            return [f"extension of {size} bytes at {position} of {len(block)}"]
        position += size
    return []


def _affine(plain: bytes, endian: str, qform: int, sform: int) -> tuple[npt.NDArray[np.float64], list[str]]:
    """Method 3, 2 or 1 of nifti1.h, and what is wrong with it."""
    qfac, *spacing = (float(value) for value in struct.unpack_from(endian + "4f", plain, 76))
    affine, faults = np.eye(4), []
    with np.errstate(all="ignore"):
        if sform > 0:
            affine[:3] = np.reshape(struct.unpack_from(endian + "12f", plain, 280), (3, 4))
        elif qform > 0:
            b, c, d, *shift = (float(value) for value in struct.unpack_from(endian + "6f", plain, 256))
            rest = 1 - (b * b + c * c + d * d)
            if not rest > -1e-5 or qfac not in (0, 1, -1):
                faults.append(f"quaternion {b, c, d}, qfac {qfac}")
            a = rest**0.5 if rest > 1e-7 else 0.0
            if not a:  # as nifti1_io.c does
                b, c, d = (value / (1 - rest) ** 0.5 for value in (b, c, d))
            turn = [[a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                    [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                    [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c]]  # fmt: skip
            affine[:3, :3] = np.array(turn) * np.multiply(spacing, (1, 1, -1 if qfac == -1 else 1))
            affine[:3, 3] = shift
        else:  # method 1 has no directions; nibabel and MONAI take Analyze's, with x to the left
            affine[:3, :3] = np.diag(spacing) * (-1, 1, 1)
            size = struct.unpack_from(endian + "3h", plain, 42)
            affine[:3, 3] = -affine[:3, :3] @ ((np.array(size) - 1) / 2)
        edges = np.linalg.norm(affine[:3, :3], axis=0)
        if not np.isfinite(affine).all():
            faults.append("affine not finite")
        elif not abs(np.linalg.det(affine[:3, :3])) > 1e-4 * edges.prod() > 0:
            faults.append("affine singular")
        if not (np.abs(edges - spacing) <= 0.02 * np.abs(spacing) + 1e-6).all():
            faults.append(f"pixdim {spacing} against {edges}")
    return affine, faults
