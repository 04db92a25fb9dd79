"""Mutants of good files, by a seed: what a disk, a network or a careless program does to them.

In: seed and number.
Out: a `Mutant`: the files of a case and what may become of them. Number n of seed s is always the same mutant.

Families: `stream` damages gzip bytes anywhere; `header` puts any value anywhere in the header; `meaningless` does so
only where the header says nothing to us, and must be accepted; `fault` is one named fault of those in FAULTS, and
must be refused whatever its place and size; `good` is no mutant at all.
"""

import gzip
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np

from scripts.fuzz_files import MEANINGLESS, Good, any_affine, good, nifti, packed

FAMILIES = {"stream": 36, "header": 30, "meaningless": 4, "fault": 35}  # their shares


@dataclass(frozen=True)
class Mutant:
    """`reasons`: one of these must be given; empty: a refusal is allowed, an accepted file is judged by its content.

    `plain`: the unpacked image where the mutation was made there, else None: then an accepted file must be `good`.
    """

    family: str
    name: str
    image: bytes
    label: bytes | None
    good: Good
    plain: bytes | None = None
    reasons: tuple[str, ...] = ()


def mutant(seed: int, number: int, family: str | None = None) -> Mutant:
    dice = random.Random(f"{seed} {number}")
    family = family or dice.choices(list(FAMILIES), list(FAMILIES.values()))[0]
    file = good(dice)
    if family == "good":
        return Mutant(family, family, packed(file.plain, dice), file.label, file)
    if family == "stream":
        name, image = _stream(gzipped(file.plain, dice), dice)
        return Mutant(family, name, image, file.label, file)
    if family == "fault":
        return _fault(file, dice)
    places = MEANINGLESS if family == "meaningless" else range(file.about["extension"] + 348)
    plain = bytearray(file.plain)
    for _ in range(dice.randint(1, 4)):
        place = dice.choice(places)
        plain[place] = dice.choice([0, 1, 255, dice.randrange(256), plain[place] ^ 1 << dice.randrange(8)])
    label = dice.choice([None, None, file.label])  # most other geometries are refused beside a label
    return Mutant(family, family, packed(bytes(plain), dice), label, file, bytes(plain))


def gzipped(plain: bytes, dice: random.Random) -> bytes:
    while (content := packed(plain, dice)) is plain:
        pass
    return content


def _stream(content: bytes, dice: random.Random) -> tuple[str, bytes]:
    """(what was done, the gzip file after it)."""
    low, high = sorted(dice.sample(range(len(content) + 1), 2))
    high = dice.choice([high, min(high, low + 8)])
    name = dice.choice(["flip", "flips", "cut", "delete", "repeat", "zero", "insert", "move", "overwrite", "trailer"])
    changed = bytearray(content)
    if name in ("flip", "flips"):
        for _ in range(1 if name == "flip" else dice.randint(2, 16)):
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    elif name == "cut":
        del changed[dice.choice([low, len(changed) - dice.randint(1, 12)]) :]
    elif name == "delete":
        del changed[low:high]
    elif name == "repeat":  # as a retried part of a download is
        changed[high:high] = changed[low:high]
    elif name == "zero":
        changed[low:high] = bytes(high - low)
    elif name == "insert":
        changed[low:low] = bytes(dice.choices(range(256), k=dice.randint(1, 64)))
    elif name == "move":
        part = changed[low:high]
        del changed[low:high]
        place = dice.randrange(len(changed) + 1)
        changed[place:place] = part
    elif name == "overwrite":
        changed[low:high] = bytes(dice.choices(range(256), k=high - low))
    else:
        place = len(changed) - dice.randint(1, min(8, len(changed)))
        changed[place] = dice.randrange(256)
    return name, bytes(changed)


Change = Callable[[Good, random.Random], bytes]
LAYOUT = {"sizeof_hdr": (0, "i"), "dim": (40, "h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "f"),
          "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"), "qform_code": (252, "h"),
          "sform_code": (254, "h"), "quatern": (256, "f"), "srow": (280, "f")}  # fmt: skip


def put(file: Good, name: str, value: float, index: int = 0) -> bytes:
    """The file with one value of its header replaced."""
    place, kind = LAYOUT[name]
    plain = bytearray(file.plain)
    struct.pack_into(file.endian + kind, plain, place + index * struct.calcsize(kind), value)
    return bytes(plain)


def _dim(file: Good, index: int) -> int:
    return int(struct.unpack_from(file.endian + "h", file.plain, 40 + 2 * index)[0])


def _other_dim(file: Good, dice: random.Random) -> bytes:
    index = dice.randint(1, 4)
    return put(file, "dim", dice.choice([n for n in (1, 2, 3, 17, 240, 32767) if n != _dim(file, index)]), index)


def _huge(file: Good, dice: random.Random) -> bytes:
    """A header that asks for 100 GB and more."""
    plain = bytearray(file.plain)
    struct.pack_into(file.endian + "3h", plain, 42, *(dice.randint(3000, 32767) for _ in range(3)))
    return bytes(plain)


def _geometry(file: Good, dice: random.Random, value: float) -> bytes:
    """One number of the transform in use."""
    sform, qform = file.about["codes"]
    if sform:
        return put(file, "srow", value, dice.randrange(12))
    return put(file, "quatern", value, dice.randrange(6)) if qform else put(file, "pixdim", value, dice.randint(1, 3))


def _singular(file: Good, dice: random.Random) -> bytes:
    """A column of the affine that is zero or another one's, or a voxel edge of 0."""
    if not file.about["codes"][0]:
        return put(file, "pixdim", 0, dice.randint(1, 3))
    rows = np.frombuffer(file.plain, file.endian + "f4", 12, 280).reshape(3, 4).copy()
    target, source = dice.sample(range(3), 2)
    rows[:, target] = rows[:, source] * dice.choice([0, 1])
    return file.plain[:280] + rows.tobytes() + file.plain[328:]


def _pixdim(file: Good, dice: random.Random) -> bytes:
    index = dice.randint(1, 3)
    edge = struct.unpack_from(file.endian + "f", file.plain, 76 + 4 * index)[0]
    wrong = edge * dice.choice([0.5, 0.9, 1.05, 2, 10, -1])
    if any(file.about["codes"][:1]):
        return put(file, "pixdim", wrong, index)
    return put(file, "pixdim", dice.choice([-edge, float("nan"), float("inf"), 0.0, 1e6]), index)


def _extension(file: Good, dice: random.Random) -> bytes:
    """The flag is set and the first extension is not as long as it can be, or there is no room for any."""
    room, plain = file.about["extension"] - 4, bytearray(file.plain)
    plain[348] = dice.choice([1, 255])
    if room:
        size = dice.choice([0, 1, 7, -16, -(2**31), room + 1, room + 16, 2**31 - 1])
        struct.pack_into(file.endian + "i", plain, 352, size)
    return bytes(plain)


def _voxels(file: Good, dice: random.Random, value: float | None) -> bytes:
    """One voxel of a float file set to `value`; None: one modality the same everywhere."""
    offset, kind = 348 + file.about["extension"], np.dtype(file.endian + file.about["kind"])
    voxels = np.frombuffer(file.plain, kind, offset=offset).copy()
    if value is None:
        quarter = dice.randrange(4) * (voxels.size // 4)
        voxels[quarter : quarter + voxels.size // 4] = dice.choice([0, 1, 7])
        return file.plain[:offset] + voxels.tobytes()
    if kind.kind != "f":
        kind = np.dtype(file.endian + "f4")
        voxels = voxels.astype(kind)
        file = Good(put(file, "datatype", 16), file.endian, file.label, file.about)
        file = Good(put(file, "bitpix", 32), file.endian, file.label, file.about)
    voxels[dice.randrange(voxels.size)] = value
    return file.plain[:offset] + voxels.tobytes()


INF, NAN = float("inf"), float("nan")
FAULTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "sizeof_hdr": (lambda f, d: put(f, "sizeof_hdr", d.choice([0, 347, 540, -1, 348 << 16])), ("not_nifti",)),
    "magic": (lambda f, d: f.plain[:344] + d.choice([b"ni1\0", b"n+2\0", b"n+1\n", bytes(4)]) + f.plain[348:],
              ("not_nifti",)),
    "number of dimensions": (lambda f, d: put(f, "dim", d.choice([0, 1, 2, 3, 8, -1, 32767])), ("header", "not_nifti",
                             "size")),
    "dimension below 1": (lambda f, d: put(f, "dim", d.choice([0, -1, -32768]), d.randint(1, 4)), ("header",)),
    "other dimension": (_other_dim, ("size", "limit", "header")),
    "more than memory": (_huge, ("limit",)),
    "datatype": (lambda f, d: put(f, "datatype", d.choice([0, 1, 3, 32, 128, 1536, 1792, 2048, -4, 999])), ("header",)),
    "bitpix": (lambda f, d: put(f, "bitpix", d.choice([0, 1, 24, 128, -8])), ("header",)),
    "vox_offset": (lambda f, d: put(f, "vox_offset", d.choice([0, 351, -352, 352.5, NAN, INF, 1e20])), ("header",)),
    "later vox_offset": (lambda f, d: put(f, "vox_offset", 352 + f.about["extension"] + 16 * d.randint(1, 99)),
                         ("size",)),
    "infinite scaling": (lambda f, d: put(f, "scl_slope", d.choice([INF, -INF])), ("header",)),
    "infinite intercept": (lambda f, d: put(Good(put(f, "scl_slope", 2), f.endian, b"", {}), "scl_inter",
                                            d.choice([INF, NAN])), ("header",)),
    "unit of length": (lambda f, d: f.plain[:123] + bytes([d.choice([1, 3, 4, 9, 255])]) + f.plain[124:], ("header",)),
    "transform code": (lambda f, d: put(f, d.choice(["qform_code", "sform_code"]), d.choice([-1, 6, 257])),
                       ("header",)),
    "affine not finite": (lambda f, d: _geometry(f, d, d.choice([NAN, INF, -INF])), ("affine",)),
    "singular affine": (_singular, ("affine",)),
    "pixdim": (_pixdim, ("affine",)),
    "extension": (_extension, ("extension",)),
    "voxel not finite": (lambda f, d: _voxels(f, d, d.choice([NAN, INF, -INF])), ("not_finite",)),
    "constant modality": (lambda f, d: _voxels(f, d, None), ("constant", "empty")),
    "voxels cut": (lambda f, d: f.plain[: -d.randint(1, 200)], ("size",)),
    "voxels added": (lambda f, d: f.plain + bytes(d.choice([1, 16, 4096])), ("size",)),
    "header cut": (lambda f, d: f.plain[: d.randrange(3, 352)], ("not_nifti",)),
}  # fmt: skip
DAMAGE: dict[str, Callable[[bytes, bytes, random.Random], bytes]] = {
    "crc": lambda z, p, d: z[:-8] + struct.pack("<I", _word(z, 8) ^ 1 << d.randrange(32)) + z[-4:],
    "isize": lambda z, p, d: z[:-4] + struct.pack("<I", _word(z, 4) ^ 1 << d.randrange(32)),
    "cut": lambda z, p, d: z[: d.randrange(2, len(z))],
    "end cut": lambda z, p, d: z[: -d.randint(1, 8)],
    "something follows": lambda z, p, d: z + bytes(d.choices(range(1, 256), k=d.randint(1, 40))),
    "a part follows twice": lambda z, p, d: z + z[-d.randint(4, len(z) - 1) :],
    "a member follows": lambda z, p, d: z + gzip.compress(d.choice([b"x", p, p[-64:]]), 6, mtime=0),
    "compression method": lambda z, p, d: z[:2] + bytes([d.choice([0, 7, 9, 255])]) + z[3:],
    "reserved flag": lambda z, p, d: z[:3] + bytes([z[3] | 1 << d.randint(5, 7)]) + z[4:],
    "header checksum": lambda z, p, d: _checked(z[:3] + b"\2" + z[4:10], 1 << d.randrange(16)) + z[10:],
}
LABELS: dict[str, tuple[Callable[[Any, Any, random.Random], bytes], str]] = {
    "label fraction": (lambda a, m, d: nifti(a + np.array([d.choice([0.5, 1e-3])], "f4"), m), "label_values"),
    "label out of convention": (lambda a, m, d: nifti(np.where(a == 0, d.choice([4, 5, 255]), a).astype("u1"), m),
                                "label_values"),
    "label negative": (lambda a, m, d: nifti(-a.astype("i2") - 1, m), "label_values"),
    "label of 16 bits": (lambda a, m, d: nifti(a.astype("i2") + np.int16(256 * d.randint(1, 100)), m), "label_values"),
    "label not finite": (lambda a, m, d: nifti(np.where(a == a[0, 0, 0], np.nan, a), m), "label_values"),
    "label of other shape": (lambda a, m, d: nifti(d.choice([a[1:], a[:, :-1], a[..., None, None] * np.ones(2, "u1")]),
                                                   m), "mismatch"),
    "label of other affine": (lambda a, m, d: nifti(a, any_affine(d)), "mismatch"),
}  # fmt: skip


def _word(content: bytes, from_end: int) -> int:
    return int(struct.unpack_from("<I", content, len(content) - from_end)[0])


def _checked(header: bytes, wrong: int) -> bytes:
    return header + struct.pack("<H", zlib.crc32(header) & 0xFFFF ^ wrong)


def _fault(file: Good, dice: random.Random) -> Mutant:
    name = dice.choice([*FAULTS, *DAMAGE, *LABELS])
    if name in FAULTS:
        change, reasons = FAULTS[name]
        plain = change(file, dice)
        return Mutant("fault", name, packed(plain, dice), file.label, file, plain, reasons)
    if name in DAMAGE:
        whole = gzip.compress(file.plain, dice.choice([0, 1, 6, 9]), mtime=dice.randrange(2**31))
        return Mutant("fault", name, DAMAGE[name](whole, file.plain, dice), file.label, file, None,
                      ("gzip_damaged", "size", "not_nifti"))  # fmt: skip
    array = np.random.RandomState(dice.randrange(2**32)).randint(0, 4, file.about["shape"]).astype("u1")
    affine = nib.Nifti1Image.from_bytes(gzip.decompress(file.label)).affine
    change_label, reason = LABELS[name]
    return Mutant("fault", name, packed(file.plain, dice), change_label(array, affine, dice), file, None, (reason,))
