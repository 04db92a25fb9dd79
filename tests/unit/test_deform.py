"""A copy is another head of the same patient: smooth, unfolded, with the same labels, and the same every time."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from raytrain_brats.data.nifti import Volume, decode_case
from raytrain_brats.synthetic import deform
from raytrain_brats.synthetic.deform import deformed, draw_warp, packed
from raytrain_brats.synthetic.phantom import make_case
from tests.support.cases import make_affine, make_volume


@pytest.fixture(scope="module")
def phantom() -> Volume:
    """A head of 4 mm voxels."""
    case = make_case(3, 60)
    return Volume(np.moveaxis(case.image_xyzc, 3, 0), case.label_xyz, np.diag([case.spacing_mm] * 3 + [1.0]))


def test_every_copy_is_another_and_always_the_same(phantom: Volume) -> None:
    """Seed, case and copy decide the bytes, in any process; no two copies, and none and its original, are equal."""
    makings = [(seed, name, copy) for seed in (0, 1) for name in ("A", "B") for copy in (1, 2, 12)]
    files = [tuple(packed(deformed(phantom, *making))) for making in makings]
    assert len({image for image, _ in files}) == len({label for _, label in files}) == len(files)
    assert not set(packed(phantom)) & {part for pair in files for part in pair}
    code = (
        "import hashlib, numpy as np; from raytrain_brats.synthetic.deform import *;"
        "from raytrain_brats.synthetic.phantom import make_case; c = make_case(3, 60);"
        "v = Volume(np.moveaxis(c.image_xyzc, 3, 0), c.label_xyz, np.diag([c.spacing_mm] * 3 + [1.0]));"
        "print([hashlib.sha256(b).hexdigest() for b in packed(deformed(v, 1, 'B', 12))])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == repr([deform.hashlib.sha256(part).hexdigest() for part in files[-1]])


def test_nothing_folds() -> None:
    """The warp's Jacobian is positive everywhere, at any voxel size; with knots moved too far it would not be."""

    def least(mm: tuple[float, float, float], seed: int) -> float:
        mask = np.zeros([int(90 / edge) for edge in mm], bool)
        mask[2:-2, 2:-2, 2:-2] = True
        source = draw_warp(np.random.RandomState(seed), mask, np.array(mm)).source
        slopes = np.stack([np.stack(np.gradient(part)) for part in source])
        return float(np.linalg.det(slopes.transpose(2, 3, 4, 0, 1)).min())

    assert min(least(mm, seed) for mm in ((2, 2, 2), (1.5, 3, 5)) for seed in range(4)) > 0.2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deform, "REACH", 1.5)
        assert min(least((2, 2, 2), seed) for seed in range(4)) < 0


def test_labels_go_with_the_tissue(phantom: Volume) -> None:
    """No value is invented or lost, volumes stay within a half, and a label lies where its tissue went."""
    assert phantom.label_xyz is not None
    shown = np.stack([phantom.label_xyz * np.float32(100) + 50 * (phantom.image_cxyz[0] > 0)] * 4)
    volumes = np.bincount(phantom.label_xyz.ravel(), minlength=4)[1:]
    for copy in range(1, 9):
        new = deformed(Volume(shown, phantom.label_xyz, phantom.affine), 0, "A", copy)
        assert new.label_xyz is not None and new.label_xyz.dtype == np.uint8
        assert set(np.unique(new.label_xyz)) == {0, 1, 2, 3}
        assert (abs(np.log2(np.bincount(new.label_xyz.ravel(), minlength=4)[1:] / volumes)) < 0.6).all()
        assert (new.label_xyz != phantom.label_xyz).sum() > 0.1 * volumes.sum()
        for channel in new.image_cxyz:
            means = [channel[new.label_xyz == value].mean() for value in (1, 2, 3)]
            assert means[0] < means[1] < means[2]
            assert np.corrcoef(channel[new.label_xyz > 0], new.label_xyz[new.label_xyz > 0])[0, 1] > 0.7


def test_the_background_stays_zero_and_the_rim_bright() -> None:
    """An even head stays even up to its edge: what a voxel gets is from the head alone, or exactly zero."""
    volume = make_volume(shape=(40, 36, 32))
    head = (volume.image_cxyz != 0).any(0)
    even = np.where(head, np.int16(1000), np.int16(0))
    changed = 0
    for copy in (1, 2, 3):
        new = deformed(Volume(np.stack([even] * 4), volume.label_xyz, np.diag([4.0, 4, 4, 1])), 5, "A", copy)
        for channel in new.image_cxyz:
            inside = channel[channel != 0]
            assert inside.max() / inside.min() < 1.5  # the slow bias; half-zero samples would be at a half
            assert (new.image_cxyz[0] != 0).sum() == len(inside)
            changed += ((channel != 0) != head).sum()
        assert abs(len(inside) / head.sum() - 1) < 0.25
    assert changed > 100


@pytest.mark.parametrize(("dtype", "kind"), [(np.int16, "int16"), (np.float32, "int16"), (np.float64, "float32")])
def test_files_of_a_copy_are_valid_on_the_same_grid(dtype: Any, kind: str) -> None:
    """Whole numbers stay whole, fractions fractions; our strict decoder takes the files; the oblique affine is kept."""
    volume = make_volume(make_affine((0.9, 1.1, 2.5), (2, 0, 1), (-1, 1, -1), 20), dtype=dtype, et=4)
    if kind == "float32":
        volume = Volume(volume.image_cxyz + 0.25 * (volume.image_cxyz != 0), volume.label_xyz, volume.affine)
    new = deformed(volume, 0, "A", 1)
    image, label = packed(new)
    read = decode_case([image], label, (0, 1, 2, 4))
    assert read.image_cxyz.dtype == kind and read.image_cxyz.shape == volume.image_cxyz.shape
    assert np.array_equal(read.image_cxyz, new.image_cxyz)
    assert np.array_equal(read.label_xyz, new.label_xyz)  # type: ignore[arg-type]
    np.testing.assert_allclose(read.affine, volume.affine, atol=1e-5)


def test_each_modality_gets_a_contrast_of_its_own(phantom: Volume) -> None:
    """Mean brightness changes by other factors from modality to modality and from copy to copy, within bounds."""
    factors = []
    for copy in range(1, 7):
        new = deformed(phantom, 0, "A", copy)
        pairs = zip(new.image_cxyz, phantom.image_cxyz, strict=True)
        factors.append([after[after != 0].mean() / before[before != 0].mean() for after, before in pairs])
    spread = np.array(factors)
    assert 0.6 < spread.min() < 0.95 and 1.05 < spread.max() < 1.6
    assert (spread.std(0) > 0.03).all() and (spread.std(1) > 0.01).all()
