"""Decoding equals nibabel on good files, and refuses every bad one with a reason, never in another way."""

import gzip
import pickle
import random
import re
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from raytrain_brats.data.nifti import REASONS, InvalidCase, background_warning, decode, decode_case
from tests.support import ROOT
from tests.support.cases import LPS, make_affine, make_arrays, make_volume, nifti

MSD = (0, 1, 2, 3)
IMAGE, LABEL = make_arrays((8, 7, 6), dtype=np.int16)


def refusal(images: list[bytes], label: bytes | None = None, allowed: tuple[int, ...] = MSD) -> str:
    with pytest.raises(InvalidCase) as caught:
        decode_case(images, label, allowed)
    assert caught.value.reason in REASONS
    assert caught.value.detail
    return caught.value.reason


def test_decode_equals_nibabel_over_many_headers() -> None:
    """400 seeded combinations of type, byte order, scaling, affine, extension and wrapping: same voxels and affine.

    Scaled voxels are nibabel's float64 ones, rounded once to float32.
    """
    dice = random.Random(5)
    affines = [np.eye(4), LPS, make_affine((0.9, 1.1, 2.5), (2, 0, 1), (1, -1, 1), 20), make_affine(degrees=45)]
    sheared = make_affine((1, 2, 3))
    sheared[0, 1] = 0.4
    wrappings = [
        lambda b: b,
        lambda b: gzip.compress(b, dice.choice([0, 1, 6, 9])),
        lambda b: b"".join(gzip.compress(b[i : i + 401]) for i in range(0, len(b), 401)),  # members, as bgzip makes
        lambda b: gzip.compress(b) + bytes(512),  # zero padding, as tape tools leave it
    ]
    for number in range(400):
        kind = dice.choice(["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
        shape = dice.choice([(5, 4, 3), (3, 5, 2, 4), (4, 3, 2, 1), (1, 7, 2)])
        top = 100 if kind[1] == "1" else 30000
        array = np.random.RandomState(number).randint(0 if kind[0] == "u" else -top, top, shape).astype(kind)
        affine, codes = dice.choice([*affines, sheared]), dice.choice([(1, 0), (2, 1), (0, 1), (0, 0), (4, 3)])
        slope, inter = dice.choice([(1, 0), (0, 9), (np.nan, np.nan), (0.5, -3), (-2, 1e3), (1, 5), (0.1, 1 / 3)])
        fields = {"scl_slope": slope, "scl_inter": inter, "xyzt_units": dice.choice([0, 2])}
        endian = dice.choice("<>")
        comment = b"\1\0\0\0" + struct.pack(endian + "ii", 32, 6) + b"a comment".ljust(24)
        plain = nifti(array, affine, codes, endian, dice.choice([bytes(4), comment]), **fields)
        peer = nib.Nifti1Image.from_bytes(plain)

        found, found_affine, *_ = decode(dice.choice(wrappings)(plain), "x")

        expected = np.asarray(peer.dataobj)
        expected = expected[..., 0] if shape[-1] == 1 and len(shape) == 4 else expected
        about = (number, kind, shape, fields, codes)
        assert found.shape == expected.shape, about
        assert found.dtype.isnative, about
        assert np.array_equal(found, expected.astype(found.dtype)), about
        assert np.array_equal(found_affine, peer.affine), about
        scaled = bool(slope) and np.isfinite(slope) and (slope, inter) != (1, 0)
        assert found.dtype == (np.dtype(np.float32) if scaled else np.dtype(kind)), about


def test_one_4d_file_and_four_3d_files_give_the_same_case() -> None:
    """Both layouts give (4, x, y, z) and uint8 labels, whatever types the single modalities have."""
    whole = decode_case([nifti(IMAGE)], nifti(LABEL.astype(np.float64)), MSD)
    kinds = (np.int16, np.float32, np.int32, np.int16)
    single = decode_case([nifti(IMAGE[..., c].astype(k)) for c, k in enumerate(kinds)], nifti(LABEL), MSD)

    for volume in (whole, single):
        assert np.array_equal(volume.image_cxyz, np.moveaxis(IMAGE, 3, 0))
        assert volume.label_xyz is not None
        assert volume.label_xyz.dtype == np.uint8
        assert np.array_equal(volume.label_xyz, LABEL)
    assert decode_case([nifti(IMAGE)], None, MSD).label_xyz is None


@pytest.mark.parametrize("ones", [(), (1,), (1, 1)])
def test_the_components_of_a_vector_are_four_channels(ones: tuple[int, ...]) -> None:
    """SimpleITK's vector images (x, y, z, 1, 4) are read as (x, y, z, 4), also with dimensions of 1 after it."""
    vector = IMAGE.reshape(*IMAGE.shape[:3], 1, 4, *ones, order="F")
    volume = decode_case([nifti(vector)], nifti(LABEL), MSD)
    assert np.array_equal(volume.image_cxyz, np.moveaxis(IMAGE, 3, 0))


def test_channels_in_another_order_are_put_in_ours() -> None:
    """`channels` names the file's channel of FLAIR, T1w, T1gd, T2w; in our order already, nothing is copied."""
    content, there = nifti(IMAGE[..., [1, 2, 3, 0]]), (3, 0, 1, 2)  # T1w, T1gd, T2w, FLAIR
    volume = decode_case([content], nifti(LABEL), MSD, channels=there)
    assert np.array_equal(volume.image_cxyz, np.moveaxis(IMAGE, 3, 0))
    assert volume.extent == decode_case([nifti(IMAGE)], None, MSD).extent
    plain = nifti(IMAGE)
    for same in (None, (0, 1, 2, 3)):
        found = decode_case([plain], None, MSD, channels=same).image_cxyz
        assert np.shares_memory(found, np.frombuffer(plain, np.uint8))


def scaled_by_nibabel(values: npt.NDArray[Any]) -> bytes:
    """Numbers under a header of integers, as nibabel saves them: scaled, so that 1 comes back as 1.00001."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    return nib.Nifti1Image(values, np.eye(4), header).to_bytes()


def test_a_scaled_label_counts_by_its_scaled_values() -> None:
    """Labels stored as 10, 20, 30 with slope 0.1 are 1, 2, 3; so are those that scaling left within 0.001 of them."""
    artefact = LABEL * 1.0
    artefact[0, 0, 0] = 9e-4  # without a fraction nibabel does not scale
    by_nibabel = scaled_by_nibabel(artefact)
    assert not set(np.unique(decode(by_nibabel, "x").array)) <= set(MSD)
    for label in (nifti(LABEL * 10, scl_slope=0.1, scl_inter=0), by_nibabel):
        assert np.array_equal(decode_case([nifti(IMAGE)], label, MSD).label_xyz, LABEL)


@pytest.mark.parametrize("fraction", [0.5, 1e-2, np.nan])
def test_fractions_in_a_scaled_label_stay_refused(fraction: float) -> None:
    """What is no rounding is named alone, with what to do; and without scaling 0.001 is a fraction too."""
    values = LABEL * np.float32(1.00001)
    values[0, 0, 0] = fraction
    with pytest.raises(InvalidCase, match="nearest voxel") as caught:
        decode_case([nifti(IMAGE)], nifti(values / 2, scl_slope=2, scl_inter=0), MSD)
    assert "1.00001" not in caught.value.detail and str(fraction)[:3] in caught.value.detail
    assert refusal([nifti(IMAGE)], nifti(LABEL * np.float32(1.001))) == "label_values"


NAMES = ["p/p_flair.nii.gz", "p/p_t1.nii.gz", "p/p_t1ce.nii.gz", "p/p_t2.nii.gz", "p/p_seg.nii.gz"]
MODALITY_OF = dict(zip(NAMES, ("FLAIR", "T1w", "T1gd", "T2w"), strict=False))


def _with(array: npt.NDArray[Any], value: float) -> bytes:
    return nifti(np.where(np.arange(array.size).reshape(array.shape) == 99, value, array).astype(np.float32))


SPOILT: dict[str, Callable[[npt.NDArray[Any]], bytes]] = {
    "gzip_damaged": lambda a: gzip.compress(nifti(a))[:-9],
    "size": lambda a: nifti(a)[:-1],
    "not_nifti": lambda a: b"",
    "header": lambda a: nifti(a, xyzt_units=3),
    "affine": lambda a: nifti(a, srow_x=0),
    "extension": lambda a: nifti(a, extension=b"\1\0\0\0"),
    "mismatch": lambda a: nifti(a, SHIFTED),
    "not_finite": lambda a: _with(a, np.nan),
    "constant": lambda a: nifti(a * 0 + 7),
    "empty": lambda a: nifti(a * 0),
}


@pytest.mark.parametrize("reason", SPOILT)
@pytest.mark.parametrize("number", range(5))
def test_the_file_at_fault_is_named(reason: str, number: int) -> None:
    """Whichever of a case's files is spoilt is `file`, and in the detail; for voxels also its modality."""
    arrays = [*(IMAGE[..., channel] for channel in range(4)), LABEL]
    contents = [nifti(array) for array in arrays]
    contents[number] = SPOILT[reason](arrays[number])
    if number == 4 and reason in ("constant", "empty", "not_finite"):
        return  # a label may be empty, and has values of its own to be refused for
    with pytest.raises(InvalidCase) as caught:
        decode_case(contents[:4], contents[4], MSD, NAMES)
    assert (caught.value.reason, caught.value.file) == (reason, NAMES[number])
    assert caught.value.detail.startswith(f"{NAMES[number]}: ")
    if reason in ("constant", "empty", "not_finite"):
        assert MODALITY_OF[NAMES[number]] in caught.value.detail
    assert pickle.loads(pickle.dumps(caught.value)).file == NAMES[number]


def test_a_modality_of_a_4d_file_is_named() -> None:
    """There the file is one, so only its channel's name tells what to look at; also with channels in another order."""
    content = nifti(IMAGE * np.array([1, 0, 1, 1], np.int16))
    for channels, name in ((None, "T1w"), ((3, 2, 1, 0), "T1gd")):
        with pytest.raises(InvalidCase) as caught:
            decode_case([content], None, MSD, ["i/a.nii"], channels)
        assert caught.value.file == "i/a.nii"
        assert caught.value.detail == f"i/a.nii: {name} is 0 everywhere"


@pytest.mark.parametrize("endian", "<>")
def test_the_header_comes_along(endian: str) -> None:
    """A volume has the first file's header as it stands, in either byte order, and still travels."""
    plain = [nifti(IMAGE[..., c], make_affine(degrees=c / 1e4), endian=endian) for c in range(4)]
    volume = pickle.loads(pickle.dumps(decode_case([gzip.compress(p) for p in plain], None, MSD, NAMES)))
    assert volume.header == plain[0][:348]
    assert volume.files == tuple(NAMES[:4])
    assert decode_case([nifti(IMAGE)], None, MSD, ["a"]).files == ("a",) * 4


def test_voxels_may_begin_at_any_byte() -> None:
    """An odd vox_offset (nibabel refuses some) is only an offset."""
    assert np.array_equal(decode(nifti(IMAGE, extension=bytes(9)), "x")[0], IMAGE)


def test_a_qfac_of_zero_is_one() -> None:
    """As the standard says, and as files of tools that know only sform have it."""
    unset = [0, 1, 1, 1, 1, 1, 1, 1]
    assert np.array_equal(decode(nifti(IMAGE, codes=(0, 1), pixdim=unset), "x")[1], np.eye(4))


def test_what_was_decoded_stays_while_anyone_looks_at_it() -> None:
    """Buffers are used again, yet no view of an earlier case ever changes, down to a slice or a label alone."""
    noise = np.random.RandomState(0)
    arrays = [noise.randint(1, 999, (64, 64, 40, 4)).astype("i2") for _ in range(6)]
    masks = [noise.randint(0, 4, (64, 64, 40)).astype("u1") for _ in range(6)]
    kept = []
    for array, mask in zip(arrays, masks, strict=True):
        volume = decode_case([gzip.compress(nifti(array), 1)], gzip.compress(nifti(mask), 1), MSD)
        kept.append((volume.image_cxyz[2, 5:9, ::-1], volume.label_xyz[:, 3]))
        del volume
    for (part, line), array, mask in zip(kept, arrays, masks, strict=True):
        assert np.array_equal(part, array[5:9, ::-1, :, 2])
        assert np.array_equal(line, mask[:, 3])


@pytest.mark.parametrize("files", [1, 4])
def test_cases_after_the_first_take_no_fresh_memory(files: int) -> None:
    """Page faults cost more than arithmetic: the second case of a size is unpacked where the first was."""
    array = np.random.RandomState(0).randint(1, 999, (96, 96, 64, 4)).astype(">i2")
    parts = [array] if files == 1 else [array[..., c] for c in range(4)]
    images = [gzip.compress(nifti(part, endian=">"), 1) for part in parts]
    label = gzip.compress(nifti(array[..., 0] % 4), 1)
    for _ in range(2):  # the first one may still find buffers of other tests
        decode_case(images, label, MSD)
    tracemalloc.start()
    decode_case(images, label, MSD)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak_bytes < 3 << 20  # 4.7 MB of voxels twice (byte order), and the label's 8-bit copy


GOOD = nifti(IMAGE)
PACKED = gzip.compress(GOOD, mtime=0)
HUGE = {"dim": [4, 2000, 2000, 90, 4, 1, 1, 1]}
BOMB = gzip.compress(nifti(IMAGE, **HUGE)) + bytes(2_800_000)  # as long as such a stream is; never read
TWO = struct.pack("<ii", 16, 6) + bytes(8) + struct.pack("<ii", 2**31 - 1, 6) + bytes(8)
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "not_nifti"),
    "no NIfTI": (b"DICM" * 400, "not_nifti"),
    "gzip of no NIfTI": (gzip.compress(b"DICM" * 400), "not_nifti"),
    "gzip of nothing": (gzip.compress(b""), "not_nifti"),
    "two-file magic": (nifti(IMAGE, magic=b"ni1"), "not_nifti"),
    "sizeof_hdr": (nifti(IMAGE, sizeof_hdr=540), "not_nifti"),
    "header cut": (GOOD[:300], "not_nifti"),
    "voxels cut": (GOOD[:-1], "size"),
    "voxels added": (GOOD + b"\0", "size"),
    "gz of cut voxels": (gzip.compress(GOOD[:-1]), "size"),
    "gz of more voxels": (gzip.compress(GOOD + b"\0"), "size"),
    "second member": (PACKED + gzip.compress(b"more"), "size"),
    "wrong crc": (PACKED[:-8] + b"\1\2\3\4" + PACKED[-4:], "gzip_damaged"),
    "wrong isize": (PACKED[:-4] + struct.pack("<I", len(GOOD) + 1), "gzip_damaged"),
    "no trailer": (PACKED[:-8], "gzip_damaged"),
    "half a trailer": (PACKED[:-3], "gzip_damaged"),
    "trailing garbage": (PACKED + b"garbage, as of a failed upload", "gzip_damaged"),
    "short trailing garbage": (PACKED + b"\n", "gzip_damaged"),
    "cut to the gzip header": (PACKED[:10], "gzip_damaged"),
    "cut in the gzip header": (PACKED[:5], "gzip_damaged"),
    "only the magic": (PACKED[:2], "gzip_damaged"),
    "reserved flag": (PACKED[:3] + b"\x80" + PACKED[4:], "gzip_damaged"),
    "header checksum": (PACKED[:3] + b"\2" + PACKED[4:10] + b"\1\2" + PACKED[10:], "gzip_damaged"),
    "last part twice": (PACKED + PACKED[-64:], "gzip_damaged"),
    "twice": (PACKED + PACKED, "size"),
    "compression method": (PACKED[:2] + b"\7" + PACKED[3:], "gzip_damaged"),
    "2 dimensions": (nifti(IMAGE, dim=[2, 8, 42, 1, 1, 1, 1, 1]), "header"),
    "8 dimensions": (nifti(IMAGE, dim=[8, 8, 7, 6, 4, 1, 1, 1]), "not_nifti"),
    "dimension 0": (nifti(IMAGE, dim=[4, 8, 7, 0, 4, 1, 1, 1]), "header"),
    "dimension -1": (nifti(IMAGE, dim=[4, 8, 7, -1, 4, 1, 1, 1]), "header"),
    "3 modalities": (nifti(IMAGE[..., :3]), "header"),
    "one 3D image": (nifti(IMAGE[..., 0]), "header"),
    "7 dimensions": (nifti(IMAGE.reshape(8, 7, 6, 1, 1, 1, 4)), "header"),
    "datatype unknown": (nifti(IMAGE, datatype=999), "header"),
    "datatype 0": (nifti(IMAGE, datatype=0), "header"),
    "datatype bits": (nifti(IMAGE, datatype=1), "header"),
    "datatype complex": (nifti(IMAGE, datatype=32), "header"),
    "datatype rgb": (nifti(IMAGE, datatype=128), "header"),
    "vox_offset 0": (nifti(IMAGE, vox_offset=0), "header"),
    "vox_offset nan": (nifti(IMAGE, vox_offset=np.nan), "header"),
    "vox_offset inf": (nifti(IMAGE, vox_offset=np.inf), "header"),
    "vox_offset fraction": (nifti(IMAGE, vox_offset=352.5), "header"),
    "vox_offset later": (nifti(IMAGE, vox_offset=368), "size"),
    "slope inf": (nifti(IMAGE, scl_slope=np.inf), "header"),
    "slope unset, intercept set": (nifti(IMAGE, scl_slope=np.nan, scl_inter=3), "header"),
    "bitpix": (nifti(IMAGE, bitpix=32), "header"),
    "datatype of other size": (nifti(IMAGE, datatype=16), "header"),
    "microns": (nifti(IMAGE, xyzt_units=3), "header"),
    "metres": (nifti(IMAGE, xyzt_units=1), "header"),
    "sform code": (nifti(IMAGE, sform_code=9), "header"),
    "qform code": (nifti(IMAGE, qform_code=-1), "header"),
    "extension without room": (nifti(IMAGE, extension=b"\1\0\0\0"), "extension"),
    "extension into the voxels": (
        nifti(IMAGE, extension=b"\1\0\0\0" + struct.pack("<ii", 48, 6) + bytes(24)),
        "extension",
    ),
    "second extension into the voxels": (nifti(IMAGE, extension=b"\1\0\0\0" + TWO), "extension"),
    "extension of 0 bytes": (nifti(IMAGE, extension=b"\1\0\0\0" + bytes(16)), "extension"),
    "extension of -16 bytes": (
        nifti(IMAGE, extension=b"\1\0\0\0" + struct.pack("<ii", -16, 6) + bytes(8)),
        "extension",
    ),
    "intercept inf": (nifti(IMAGE, scl_slope=1, scl_inter=np.inf), "header"),
    "more than memory": (nifti(IMAGE, dim=[5, 32767, 32767, 32767, 4, 9, 1, 1]), "limit"),
    "2.9 GB out of 2.8 MB": (BOMB, "limit"),
    "gz header asks for 2.9 GB": (gzip.compress(nifti(IMAGE, **HUGE)), "limit"),
    "affine zero": (nifti(IMAGE, srow_x=0, srow_y=0, srow_z=0), "affine"),
    "affine singular": (nifti(IMAGE, srow_x=[0, 1, 0, 0], srow_y=[0, 1, 0, 0]), "affine"),
    "affine nan": (nifti(IMAGE, srow_x=[1, 0, 0, np.nan]), "affine"),
    "affine inf": (nifti(IMAGE, srow_x=[np.inf, 0, 0, 0]), "affine"),
    "quaternion too long": (nifti(IMAGE, codes=(0, 1), quatern_b=1, quatern_c=1), "affine"),
    "quaternion nan": (nifti(IMAGE, codes=(0, 1), quatern_b=np.nan), "affine"),
    "qfac": (nifti(IMAGE, codes=(0, 1), pixdim=[3, 1, 1, 1, 1, 1, 1, 1]), "affine"),
    "pixdim negative": (nifti(IMAGE, codes=(0, 1), pixdim=[1, -1, 1, 1, 1, 1, 1, 1]), "affine"),
    "pixdim zero": (nifti(IMAGE, codes=(0, 0), pixdim=[1, 0, 0, 0, 0, 0, 0, 0]), "affine"),
    "pixdim against affine": (nifti(IMAGE, pixdim=[1, 1, 1, 2, 1, 1, 1, 1]), "affine"),
    "voxels of metres": (nifti(IMAGE, np.diag([0.001, 0.001, 0.001, 1])), "affine"),
    "voxels of microns": (nifti(IMAGE, np.diag([1000.0, 1000, 1000, 1])), "affine"),
    "voxel nan": (nifti(np.where(np.arange(4) == 2, np.nan, IMAGE).astype("f4")), "not_finite"),
    "voxel inf": (nifti(np.where(IMAGE > 1000, np.inf, IMAGE).astype("f8")), "not_finite"),
    "scaled out of float32": (nifti(IMAGE.astype("f4"), scl_slope=3e38, scl_inter=0), "not_finite"),
    "constant modality": (nifti(np.where(np.arange(4) == 1, 7, IMAGE).astype("i2")), "constant"),
    "constant after scaling": (nifti(IMAGE * 0, scl_slope=2, scl_inter=5), "constant"),
    "zero modality": (nifti(IMAGE * np.array([1, 1, 0, 1], np.int16)), "empty"),
    "all zero": (nifti(IMAGE * 0), "empty"),
}


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize(("content", "reason"), BAD_FILES.values(), ids=list(BAD_FILES))
def test_bad_images_are_refused_with_the_reason(content: bytes, reason: str) -> None:
    """Each kind of damage has its reason code."""
    assert refusal([content]) == reason


SHIFTED = np.eye(4)
SHIFTED[0, 3] = 0.1
BAD_LABELS: dict[str, tuple[bytes, str]] = {
    "damaged": (gzip.compress(nifti(LABEL))[:-2], "gzip_damaged"),
    "fraction": (nifti(LABEL * np.float32(0.5)), "label_values"),
    "nan": (nifti(np.where(LABEL == 3, np.nan, LABEL)), "label_values"),
    "negative": (nifti(-LABEL.astype(np.int16)), "label_values"),
    "4 in MSD": (nifti(np.where(LABEL == 3, 4, LABEL).astype(np.uint8)), "label_values"),
    "257 is not 1": (nifti(LABEL.astype(np.int16) + np.int16(256) * (LABEL == 1)), "label_values"),
    "other shape": (nifti(LABEL[:-1]), "mismatch"),
    "transposed": (nifti(LABEL.transpose(1, 0, 2)), "mismatch"),
    "4D": (nifti(IMAGE), "mismatch"),
    "other origin": (nifti(LABEL, SHIFTED), "mismatch"),
    "flipped": (nifti(LABEL, LPS), "mismatch"),
}


@pytest.mark.parametrize(("content", "reason"), BAD_LABELS.values(), ids=list(BAD_LABELS))
def test_bad_labels_are_refused_with_the_reason(content: bytes, reason: str) -> None:
    """A label outside its convention or off the image's grid is refused."""
    assert refusal([GOOD], content) == reason


def test_modalities_on_different_grids_are_refused() -> None:
    """Four files must share shape and affine; rounding of the affine in its last digits is no difference."""
    good = [nifti(IMAGE[..., c]) for c in range(4)]
    near = np.eye(4)
    near[0, 3] = 1e-4

    assert refusal([*good[:3], nifti(IMAGE[:-1, ..., 3])]) == "mismatch"
    assert refusal([*good[:3], nifti(IMAGE[..., 3], SHIFTED)]) == "mismatch"
    assert refusal([GOOD, GOOD, GOOD, GOOD]) == "header"
    assert decode_case([*good[:3], nifti(IMAGE[..., 3], near)], None, MSD).image_cxyz.shape == (4, 8, 7, 6)


def test_every_truncation_of_a_gz_file_is_refused() -> None:
    """Wherever an upload broke off, the file is not used."""
    for length in range(len(PACKED)):
        assert refusal([PACKED[:length]]) in ("gzip_damaged", "not_nifti")


def test_flipped_bits_in_a_gz_body_are_refused() -> None:
    """A flipped bit after the gzip header is found by inflate or checksum, unless it unpacks to the same bytes."""
    dice = random.Random(2)
    refused = 0
    for _ in range(300):
        damaged = bytearray(PACKED)
        damaged[dice.randrange(10, len(PACKED))] ^= 1 << dice.randrange(8)
        try:
            assert np.array_equal(decode(bytes(damaged), "x")[0], IMAGE)
        except InvalidCase:
            refused += 1
    assert refused > 285


@pytest.mark.parametrize("zeros", [1 << 26, 0])
def test_a_decompression_bomb_costs_little_memory(zeros: int) -> None:
    """Neither 64 MB behind a small header, nor a small file whose header asks for 2.9 GB, is allocated."""
    bomb = gzip.compress(GOOD + bytes(zeros), 1) if zeros else gzip.compress(nifti(IMAGE, **HUGE))
    tracemalloc.start()
    reason = refusal([bomb])
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert reason == ("size" if zeros else "limit")
    assert peak_bytes < 2 << 20


@pytest.mark.parametrize("dtype", ["i2", ">i2", "f4"])
def test_memory_is_bounded_by_the_header(dtype: str) -> None:
    """A good file of 10 MB takes that once, and once more where its byte order is the other one."""
    array = np.random.RandomState(0).randint(0, 9, (101, 99, 67, 4)).astype(dtype)
    content = gzip.compress(nifti(array, endian=dtype[0] if dtype[0] == ">" else "<"), 1)
    whole_bytes = array.nbytes + 352
    tracemalloc.start()
    decode(content, "x")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak_bytes < whole_bytes * (2 if dtype[0] == ">" else 1) + (1 << 20)


def test_the_list_of_reasons_is_the_documented_one() -> None:
    """docs/refusals.md has each reason code with its meaning, and no other."""
    text = (ROOT / "docs" / "refusals.md").read_text()
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.M)) == REASONS


def test_the_named_cases_are_at_least_the_56() -> None:
    """Every kind of damage on the list of the fault study has a case here, and every reason of this module."""
    assert len(BAD_FILES) + len(BAD_LABELS) >= 56
    given = {reason for _, reason in [*BAD_FILES.values(), *BAD_LABELS.values()]}
    assert given == set(REASONS) - {"missing", "changed", "range"}


def test_a_background_that_is_not_zero_is_told() -> None:
    """A z-score over all voxels makes the air negative: what is not 0 would be taken for tissue, unsaid."""
    volume = make_volume(dtype=np.float32)
    assert background_warning(volume) == ""
    shifted = volume.image_cxyz.copy()
    shifted[2] -= 7.5
    assert background_warning(replace(volume, image_cxyz=shifted)).startswith("T1gd is -7.5 in all corners")
    shifted[2, 0, 0, 0] = 3  # tissue up to a corner, as in a crop
    assert background_warning(replace(volume, image_cxyz=shifted)) == ""
