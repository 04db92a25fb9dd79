"""Preprocessing is MONAI's chain with exact integers, and `restore` is its exact inverse."""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.meta_tensor import MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    Lambdad,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    Spacing,
    Spacingd,
)

from raytrain_brats.data import preprocess as module
from raytrain_brats.data.nifti import InvalidCase, Volume, decode_case, intensity_range
from raytrain_brats.data.preprocess import Prepared, preprocess, restore
from tests.support.cases import make_affine, make_arrays, make_volume, save

GOLDEN = {
    "int16": "62a49d6962ce2882",
    "float32, whole": "62a49d6962ce2882",
    "uint16": "361b11851bbfa802",
    "fractions": "402da056262bb826",
    "z-scored": "626e4280ed100efb",
    "0 to 1": "d1d1935d472bdba4",
}
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def normalised(prepared: Prepared) -> npt.NDArray[Any]:
    """(c, x, y, z) as the training device makes it: non-zero voxels to mean 0 and deviation 1."""
    image = prepared.image_czyx.astype(np.float64).transpose(0, 3, 2, 1)
    mean, std = (np.reshape(values, (-1, 1, 1, 1)) for values in (prepared.mean, prepared.std))
    return np.where(image != 0, (image - mean) / std, 0)


def monai_chain(image: Path, label: Path, spacing_mm: float | None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(image, label) as MONAI's own transforms prepare the files.

    But for one thing: Spacingd's rounded coordinates leave values of 1e-13 beside the brain, which MONAI then takes
    for foreground; they are set to zero here, as they are in ours.
    """
    both = ["image", "label"]
    spacing = [Spacingd(both, pixdim=[spacing_mm] * 3, mode=("bilinear", "nearest"))] if spacing_mm else []
    chain = Compose(
        [
            LoadImaged(both, image_only=True),
            EnsureChannelFirstd(both),
            Orientationd(both, axcodes="RAS"),
            *spacing,
            Lambdad("image", lambda x: torch.where(x.abs() <= 2.0**-25, 0, x)),
            CropForegroundd(both, source_key="image", select_fn=lambda x: x != 0),
            NormalizeIntensityd("image", nonzero=True, channel_wise=True),
        ]
    )
    result: Any = chain({"image": image, "label": label})
    return result["image"].numpy(), result["label"].numpy()[0]


@pytest.mark.parametrize("degrees", [0, 17])
@pytest.mark.parametrize("order", ["C", "F"])
def test_restore_is_exact_for_all_48_orientations(degrees: float, order: Any) -> None:
    """Without resampling label, image and masks come back voxel for voxel from any axis order, also oblique."""
    for permutation, signs in ORIENTATIONS:
        volume = make_volume(make_affine((1, 1, 1), permutation, signs, degrees), shape=(13, 12, 11))
        affine = np.asarray(volume.affine, order=order)
        prepared = preprocess(Volume(volume.image_cxyz, volume.label_xyz, affine), 1.0)

        assert prepared.native_label_xyz is None
        assert np.array_equal(prepared.truth_xyz(), volume.label_xyz)
        assert np.array_equal(restore(prepared.image_czyx, prepared.geometry), volume.image_cxyz)
        masks = prepared.label_zyx == np.arange(1, 4).reshape(3, 1, 1, 1)
        assert restore(masks, prepared.geometry).dtype == bool
        expected = volume.label_xyz == np.arange(1, 4).reshape(3, 1, 1, 1)
        assert np.array_equal(restore(masks, prepared.geometry), expected)


def test_orientation_is_the_closest_canonical_one() -> None:
    """The RAS grid is nibabel's closest canonical one, for all 48 axis orders and oblique affines."""
    for number, (permutation, signs) in enumerate(ORIENTATIONS):
        volume = make_volume(make_affine((1, 1, 1), permutation, signs, number), shape=(9, 8, 7), seed=number)
        geometry = preprocess(volume, 1.0).geometry
        peer = nib.as_closest_canonical(nib.Nifti1Image(volume.label_xyz, volume.affine))
        ras = module.to_ras(volume.label_xyz, geometry.axes, geometry.flips)
        assert np.array_equal(ras, np.asarray(peer.dataobj))
        assert geometry.ras_shape == peer.shape


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*[st.integers(10, 17)] * 3),
    spacing=st.tuples(*[st.floats(0.5, 4.0)] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
    wanted_mm=st.sampled_from([1.0, 2.0, 0.7]),
    seed=st.integers(0, 99),
)
def test_truth_is_the_native_label_whatever_was_resampled(
    shape: Any, spacing: Any, orientation: Any, wanted_mm: float, seed: int
) -> None:
    """Scores are taken on the native grid: the truth is the file's label, and predictions come back on its grid."""
    volume = make_volume(make_affine(spacing, *orientation, degrees=9), shape=shape, seed=seed)
    prepared = preprocess(volume, wanted_mm)

    assert np.array_equal(prepared.truth_xyz(), volume.label_xyz)
    assert restore(prepared.label_zyx[None] > 0, prepared.geometry).shape == (1, *shape)
    assert prepared.image_czyx.shape[1:] == prepared.label_zyx.shape
    for (low, high), size in zip(prepared.geometry.box, prepared.geometry.grid_shape, strict=True):
        assert 0 <= low < high <= size


def test_coarse_masks_come_back_where_they_were() -> None:
    """A tumour resampled to half the edge and restored overlaps the native one almost wholly."""
    volume = make_volume(make_affine((2, 2, 3), (1, 0, 2), (-1, 1, -1), 12), shape=(24, 25, 19))
    prepared = preprocess(volume, 1.0)
    for kind in (np.bool_, np.uint8, np.float32):
        back = restore((prepared.label_zyx[None] > 0).astype(kind), prepared.geometry)[0] > 0.5
        truth = np.asarray(volume.label_xyz) > 0
        assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.97
        assert back.dtype == bool


@pytest.mark.parametrize(
    ("spacing", "wanted_mm"),
    [
        ((1, 1, 1), None),
        ((0.9, 1.1, 2.5), 1.0),
        ((1, 1, 1), 2.0),
        ((1.5, 1.5, 1.5), 1.0),
        ((1, 1, 4), 1.0),
        ((1, 1.2, 0.7), 1.0),
    ],
)
@pytest.mark.parametrize("orientation", [((0, 1, 2), (1, 1, 1)), ((2, 0, 1), (-1, 1, -1))])
@pytest.mark.parametrize("degrees", [0, 20])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_equals_the_monai_chain(
    spacing: Any,
    wanted_mm: float | None,
    orientation: Any,
    degrees: float,
    dtype: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the files on: shape, voxels to 1e-5 and label as MONAI's own transforms give them, resampled or not.

    Oblique and resampled there is no zero background: MONAI's rounded coordinates would leave up to 1e-4 in it, which
    its crop and its statistics then take for brain.
    """
    monkeypatch.setattr(module, "_halves", lambda image, *_: image)  # rounding has its own test
    image, label = make_arrays((24, 20, 18))
    image = np.abs(image) + (30 if degrees and wanted_mm else 0)
    if dtype == np.float32:
        image = image * np.float32(1.375)
    affine = make_affine(spacing, *orientation, degrees=degrees)
    save(tmp_path / "image.nii.gz", image.astype(dtype), affine)
    save(tmp_path / "label.nii.gz", label, affine)

    expected, expected_label = monai_chain(tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", wanted_mm)
    files = [(tmp_path / f"{name}.nii.gz").read_bytes() for name in ("image", "label")]
    prepared = preprocess(decode_case(files[:1], files[1], (0, 1, 2, 3)), wanted_mm or 1.0)
    found = normalised(prepared)

    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5
    assert prepared.label_zyx is not None
    differing = np.count_nonzero(expected_label != prepared.label_zyx.T)
    assert differing <= (2 if spacing == (1, 1, 4) else 0)  # at a tie MONAI's rounding errors choose


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(*[st.integers(7, 15)] * 3),
    spacing=st.tuples(*[st.floats(1.0, 3.0)] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
    degrees=st.sampled_from([0, 9, 31]),
    seed=st.integers(0, 99),
)
def test_masks_come_back_exactly_through_smaller_voxels(
    shape: Any, spacing: Any, orientation: Any, degrees: float, seed: int
) -> None:
    """Resampled to voxels no larger than the native ones and restored, a mask is the native one, voxel for voxel."""
    affine = make_affine(spacing, *orientation, degrees=degrees).astype(np.float32).astype(np.float64)
    image = np.random.RandomState(seed).randint(1, 99, (4, *shape))
    label = np.random.RandomState(seed).randint(0, 4, shape).astype(np.uint8)
    prepared = preprocess(Volume(image, label, affine), 1.0)

    assert prepared.label_zyx is not None
    assert np.array_equal(restore(prepared.label_zyx[None], prepared.geometry)[0], label)


@pytest.mark.parametrize("wanted_mm", [2.0, 1.5, 0.7, 2.3])
def test_the_resampled_grid_is_monais(wanted_mm: float) -> None:
    """Before the crop too the grid has MONAI's size, halves rounded its way (239 mm at 2 mm: 120 voxels)."""
    volume = make_volume(shape=(24, 21, 18))
    peer = Spacing(pixdim=[wanted_mm] * 3)(MetaTensor(torch.zeros(1, 24, 21, 18), affine=torch.eye(4)))
    assert preprocess(volume, wanted_mm).geometry.grid_shape == tuple(peer.shape[1:])


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.uint16, np.int32, np.float32, np.float64])
def test_whole_numbers_stay_exact_and_statistics_are_those_of_float64(dtype: Any) -> None:
    """int16 holds every whole number exactly; mean and deviation are numpy's over the non-zero voxels."""
    volume = make_volume()
    image = np.abs(volume.image_cxyz) % 251
    prepared = preprocess(Volume(image.astype(dtype), volume.label_xyz, volume.affine), 1.0)

    assert prepared.image_czyx.dtype == np.int16
    assert np.array_equal(restore(prepared.image_czyx, prepared.geometry), image)
    for channel, mean, std in zip(image.astype(np.float64), prepared.mean, prepared.std, strict=True):
        values = channel[channel != 0]
        assert mean == pytest.approx(values.mean(), rel=1e-12)
        assert std == pytest.approx(values.std(), rel=1e-9)


def test_fractions_fall_back_to_float16() -> None:
    """What the rounding costs is at most half a step of float16."""
    volume = make_volume(dtype=np.float32)
    image = volume.image_cxyz * np.float32(1.2345)
    prepared = preprocess(Volume(image, volume.label_xyz, volume.affine), 1.0)

    error = np.abs(restore(prepared.image_czyx.astype(np.float64), prepared.geometry) - image).max()
    assert prepared.image_czyx.dtype == np.float16
    assert 0 < error <= np.abs(image).max() * 2**-11


@pytest.mark.parametrize("factor", [1e3, -1e3, 1e-9, 1e-30, 1e30, [1e4, 1, 1e-8, 1]])
@pytest.mark.parametrize("wanted_mm", [1.0, 1.7])
def test_intensities_beyond_float16_are_stored_times_a_power_of_two(factor: Any, wanted_mm: float) -> None:
    """Normalised voxels are those of the image as it is, up to float16's rounding, and the box is the same."""
    volume = make_volume(dtype=np.float64)
    image = volume.image_cxyz * 1.0625 + 9.9 * (volume.image_cxyz != 0)
    plain = preprocess(Volume(image, volume.label_xyz, volume.affine), wanted_mm)
    scaled = image * np.reshape(factor, (-1, 1, 1, 1))
    prepared = preprocess(Volume(scaled.astype(np.float32), volume.label_xyz, volume.affine), wanted_mm)

    assert prepared.image_czyx.dtype == np.float16
    assert prepared.geometry == plain.geometry
    assert np.array_equal(prepared.image_czyx != 0, plain.image_czyx != 0)
    signs = np.reshape(np.sign(factor), (-1, 1, 1, 1))
    assert np.abs(normalised(prepared) - signs * normalised(plain)).max() < 6e-3  # half a step at 1600 is 0.5 of 430
    fitting = np.broadcast_to(np.reshape(factor, -1) == 1, 4)
    assert np.array_equal(prepared.image_czyx[fitting], plain.image_czyx[fitting])
    for ours, theirs in ((prepared.mean, plain.mean), (prepared.std, plain.std)):
        exponents = np.log2(np.abs(np.divide(ours, theirs) / np.reshape(factor, -1)))
        assert np.allclose(exponents, np.rint(exponents), atol=1e-4)
        assert np.allclose(exponents[fitting], 0, atol=1e-4)


def test_a_little_contrast_beside_one_bright_voxel_is_kept() -> None:
    """The finest that a channel of values up to 1 can be: nothing is lost, as its deviation is far above the steps."""
    image = np.random.RandomState(0).rand(4, 80, 80, 80) * 1e-5 + 1e-5
    image[1, 40, 40, 40], image[2] = 2.0**-6, 0
    prepared = preprocess(Volume(image, None, np.eye(4)), 1.0)
    truth = (image[1] - image[1].mean()) / image[1].std()
    assert np.abs(normalised(prepared)[1] - truth).max() < 0.01 + 2**-11 * truth.max()
    assert np.abs(normalised(prepared)[0] - (image[0] - image[0].mean()) / image[0].std()).max() < 6e-3
    assert (prepared.mean[2], prepared.std[2]) == (0, 1)


@pytest.mark.parametrize("wanted_mm", [1.0, 1.7])
@pytest.mark.parametrize(("kind", "top"), [("u2", 65535), ("i4", 2**31 - 1), ("u4", 2**32 - 1), ("f8", 2.0**100)])
def test_integers_beyond_int16_are_prepared_too(kind: str, top: float, wanted_mm: float) -> None:
    """The case of nibabel's and ITK's wide integers: the error is at most half a step of float16 at the top."""
    volume = make_volume()
    image = (np.abs(volume.image_cxyz) / 1500.0 * top).astype(kind)
    prepared = preprocess(Volume(image, volume.label_xyz, volume.affine), wanted_mm)
    if wanted_mm == 1:
        found = restore(prepared.image_czyx.astype(np.float64), prepared.geometry)
        factor = prepared.std[0] / image[0][image[0] != 0].astype(np.float64).std()
        assert np.abs(found / factor - image.astype(np.float64)).max() <= top * 2**-11
    assert np.isfinite(prepared.image_czyx).all()


REFUSED_RANGES: dict[str, Callable[[Any], Any]] = {
    "offset of 1e6": lambda x: 1e6 + x / 1500,
    "offset below 60,000": lambda x: 30000.25 + x / 1500,
    "one voxel far out": lambda x: np.where(x == x.max(), 1e20, x / 1e20),
    "more than float32": lambda x: x * 1e300,
    "less than float32": lambda x: x * 1e-300,
}


@pytest.mark.parametrize("wanted_mm", [1.0, 1.7])
@pytest.mark.parametrize("name", REFUSED_RANGES)
def test_what_16_bits_cannot_tell_apart_is_refused_with_the_remedy(name: str, wanted_mm: float) -> None:
    """A contrast lost in rounding does not go by in silence: file, modality, values, and what to do."""
    volume = make_volume(dtype=np.float64)
    image = volume.image_cxyz * 1.375
    image[2] = REFUSED_RANGES[name](image[2])
    files = ("p_flair.nii.gz", "p_t1.nii.gz", "p_t1ce.nii.gz", "p_t2.nii.gz")
    for known, start in ((files, "p_t1ce.nii.gz: T1gd: values "), ((), "T1gd: values ")):
        with pytest.raises(InvalidCase) as caught:
            preprocess(Volume(image, volume.label_xyz, volume.affine, None, b"", known), wanted_mm)
        assert (caught.value.reason, caught.value.file) == ("range", known[2] if known else "")
        assert caught.value.detail.startswith(start)
        assert "; subtract the offset or rescale" in caught.value.detail


def ordinary() -> dict[str, npt.NDArray[Any]]:
    """Images (c, x, y, z) as data sets have them."""
    x = np.asarray(make_volume().image_cxyz)
    mean, std = (np.array([f(c[c != 0]) for c in x]).reshape(4, 1, 1, 1) for f in (np.mean, np.std))
    return {
        "int16": x,
        "float32, whole": x.astype(np.float32),
        "uint16": (np.abs(x) * 30).astype(np.uint16),
        "fractions": x * np.float32(1.2345),
        "z-scored": np.where(x != 0, (x - mean) / std, 0).astype(np.float32),
        "0 to 1": (x / x.max((1, 2, 3), keepdims=True)).astype(np.float32),
    }


@pytest.mark.parametrize("name", ordinary())
def test_ordinary_images_are_stored_as_ever(name: str) -> None:
    """The voxels of a store made before are those made now: checksums taken before channels could be scaled."""
    stored = preprocess(Volume(ordinary()[name], None, np.eye(4)), 1.0).image_czyx
    assert hashlib.sha256(f"{stored.dtype}{stored.shape}".encode() + stored.tobytes()).hexdigest()[:16] == GOLDEN[name]


def test_a_grid_beyond_memory_is_refused() -> None:
    """Thick voxels resampled to very thin ones are a refusal, not a MemoryError on a worker."""
    with pytest.raises(InvalidCase) as caught:
        preprocess(make_volume(np.diag([90.0, 90, 90, 1])), 0.5)
    assert caught.value.reason == "affine"


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_one_pass_finds_bounds_and_box_in_any_order_of_memory(dtype: Any, order: Any) -> None:
    """Least and greatest per channel, and the box of voxels other than zero, as plain numpy finds them."""
    for seed in range(8):
        random = np.random.RandomState(seed)
        image = np.zeros((4, *random.randint(1, 12, 3)), dtype)
        for _ in range(random.randint(0, 5)):
            image[(random.randint(4), *(random.randint(n) for n in image.shape[1:]))] = (
                random.randint(-99 * (dtype != np.uint8), 99) / 4
            )
        back = np.argsort(order)
        image = np.ascontiguousarray(image.transpose(0, *(1 + np.array(order)))).transpose(0, *(1 + back))
        found = intensity_range(image)
        assert found.low == tuple(image.min(axis=(1, 2, 3)))
        assert found.high == tuple(image.max(axis=(1, 2, 3)))
        places = np.argwhere(image.any(axis=0))
        expected = (
            tuple((low, high + 1) for low, high in zip(places.min(0), places.max(0), strict=True))
            if len(places)
            else None
        )
        assert found.box == expected


def test_negative_voxels_and_single_channels_are_foreground() -> None:
    """The box is that of voxels other than zero in any modality, negative ones too."""
    image = np.zeros((4, 9, 8, 7), np.int16)
    image[:, 4, 4, 3] = 100
    image[2, 1, 6, 5] = -3
    prepared = preprocess(Volume(image, np.zeros((9, 8, 7), np.uint8), np.eye(4)), 1.0)

    assert prepared.geometry.box == ((1, 5), (4, 7), (3, 6))
    assert prepared.image_czyx.shape == (4, 3, 3, 4)
    assert prepared.std == (1, 1, 51.5, 1)
    assert prepared.foreground_counts == ()


def test_label_outside_the_foreground_is_kept_for_the_truth() -> None:
    """Label voxels that the crop cuts off are in the truth all the same."""
    volume = make_volume()
    label = np.array(volume.label_xyz)
    label[0, 0, 0] = 1
    prepared = preprocess(Volume(volume.image_cxyz, label, volume.affine), 1.0)
    assert np.array_equal(prepared.truth_xyz(), label)


def test_the_foreground_index_points_at_each_label_value() -> None:
    """Per label value up to FOREGROUND_VOXELS indices, all of that value, spread from first to last."""
    prepared = preprocess(make_volume(shape=(40, 36, 30)), 1.0)
    assert prepared.label_zyx is not None
    flat, start = prepared.label_zyx.ravel(), 0
    assert [value for value, _ in prepared.foreground_counts] == [1, 2, 3]
    for value, count in prepared.foreground_counts:
        picked, every = prepared.foreground[start : start + count], np.flatnonzero(flat == value)
        assert count == min(len(every), module.FOREGROUND_VOXELS)
        assert (flat[picked] == value).all()
        assert len(set(picked.tolist())) == count
        assert (picked[0], picked[-1]) == (every[0], every[-1])
        start += count
    assert start == len(prepared.foreground)


def test_an_unlabelled_volume_is_prepared_too() -> None:
    """Prediction needs no label: image and geometry are the same as with one."""
    with_label, without = preprocess(make_volume(), 1.0), preprocess(make_volume(label=False), 1.0)
    assert (without.label_zyx, without.native_label_xyz, without.foreground_counts) == (None, None, ())
    assert np.array_equal(without.image_czyx, with_label.image_czyx)
    assert without.geometry == with_label.geometry
