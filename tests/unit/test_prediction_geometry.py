"""A prediction opens where its scan opens: by nibabel and by ITK, whatever the scan's header says and leaves out."""

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813 (everybody's name for it)

from raytrain_brats import predict
from raytrain_brats.cases.scan import scan_images
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.on_grid import label_file, probability_file
from raytrain_brats.data.preprocess import Prepared, restore
from raytrain_brats.data.store import Source
from raytrain_brats.learn.postprocess import Rules
from tests.support.cases import LPS, make_affine, nifti

SHAPE = (13, 11, 9)
LABEL = np.zeros(SHAPE, np.uint8)
LABEL[2:9, 3:8, 1:7], LABEL[3:6, 4:7, 2:5], LABEL[3, 4, 3:5] = 1, 2, 3  # no symmetry about any axis
IMAGE_XYZC = np.stack([*((value <= LABEL) * 900 + 100 for value in (1, 2, 3)), LABEL * 7 + 5], 3).astype(np.int16)

OBLIQUE = make_affine((1, 1, 1), degrees=23)
SHEARED = OBLIQUE.copy()
SHEARED[:3, :3] = np.round(OBLIQUE[:3, :3] + [[0, 0.02, 0], [0, 0, 0.03], [0.02, 0, 0]], 3)
AFFINES = {
    "plain": np.diag([1.0, 1, 1, 1]),
    "LPS": LPS,
    "oblique": OBLIQUE,
    "left-handed": make_affine((1, 1, 1), (2, 0, 1), (-1, 1, 1), 9),
    "anisotropic": make_affine((1, 1.25, 3), (0, 2, 1), (1, -1, 1), 12),
    "sheared": SHEARED,
}
CODES = {"(0,0)": (0, 0), "(1,0)": (1, 0), "(0,1)": (0, 1), "(1,1)": (1, 1), "(1,4)": (1, 4)}  # qform, sform


def itk_place(path: Path) -> Any:
    """(size, spacing, origin, direction) of the first three axes as ITK has them, or how it refuses the file."""
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        return str(error).replace(str(path), "").strip().splitlines()[-1]
    n = image.GetDimension()
    direction = np.reshape(image.GetDirection(), (n, n))[:3, :3]
    return [np.array(v) for v in (image.GetSize()[:3], image.GetSpacing()[:3], image.GetOrigin()[:3], direction)]


def threshold(prepared: Prepared, *_: Any, **__: Any) -> npt.NDArray[np.float32]:
    """A network that has learned to see our images: probabilities on the native grid."""
    seen = restore(prepared.image_czyx[:3].astype(np.float32), prepared.geometry) > 500
    return np.where(seen, np.float32(0.9), np.float32(0.1))


def predicted(
    monkeypatch: pytest.MonkeyPatch,
    item: tuple[str, Case],
    out: Path,
    spacing_mm: float = 1.0,
    probabilities: bool = False,
    drawn: frozenset[str] = frozenset(),
) -> Path:
    """The file that `predict` writes for a case, by its own functions: all but the network is real."""
    monkeypatch.setattr(predict, "shared_networks", lambda _: SimpleNamespace(device=None))
    monkeypatch.setattr(predict, "native_probabilities", threshold)
    root, case = item
    read = predict._read((Source(root, "msd", spacing_mm), case))
    predict._segment(predict.Job(str(out), (), Rules(), False, probabilities, drawn), read)
    return out / f"{case.id}.nii.gz"


def scan(
    folder: Path, layout: str, affine: Any, codes: tuple[int, int], **fields: Any
) -> tuple[Path, tuple[str, Case]]:
    """(a file of the scan, what `predict` makes of its folder)."""
    qform, sform = codes
    options: dict[str, Any] = {"affine": affine, "codes": (sform, qform), "xyzt_units": 2} | fields
    folder.mkdir()
    if layout == "four files":
        for number, kind in enumerate(("flair", "t1", "t1ce", "t2")):
            path = folder / "A_1" / f"A_1_{kind}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(gzip.compress(nifti(IMAGE_XYZC[..., number], **options), 1))
    else:
        path = folder / "A_1.nii"
        if layout == "vector":
            options["intent_code"] = 1007
        array = IMAGE_XYZC.reshape(*SHAPE, 1, 4) if layout == "vector" else IMAGE_XYZC
        path.write_bytes(nifti(array, endian=">" if layout == "big-endian" else "<", **options))
    (item,) = scan_images([str(folder)])[0]
    return path, item


@pytest.mark.parametrize("layout", ["4D", "four files", "big-endian", "vector"])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("name", AFFINES)
def test_a_prediction_lies_where_its_scan_lies(
    name: str, codes: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Affine, codes, pixdim and units as in the scan's header; ITK has the same size, spacing, origin and direction.

    A sheared sform, from which ITK falls back to qform or which it refuses, does the same to the prediction.
    """
    source, item = scan(tmp_path / "in", layout, AFFINES[name], CODES[codes])
    target = predicted(monkeypatch, item, tmp_path / "out")

    theirs, ours = nib.load(source), nib.load(target)
    assert ours.get_data_dtype() == np.uint8 and ours.shape == SHAPE and ours.header.endianness == "<"
    assert np.array_equal(ours.affine, theirs.affine)
    for field in ("qform_code", "sform_code", "xyzt_units", "pixdim", "quatern_b", "qoffset_x", "srow_x", "srow_z"):
        assert np.array_equal(ours.header[field], theirs.header[field]), field
    assert (ours.header["qform_code"], ours.header["sform_code"]) == CODES[codes]
    wrong = np.count_nonzero(np.asarray(ours.dataobj) != LABEL)
    assert wrong <= (0.1 * np.count_nonzero(LABEL) if name == "anisotropic" else 0)

    expected, found = itk_place(source), itk_place(target)
    if isinstance(expected, str):
        assert found == expected
    else:
        for one, other in zip(expected, found, strict=True):
            assert np.array_equal(one, other)
        assert sitk.GetArrayFromImage(sitk.ReadImage(str(target))).T.tobytes() == np.asarray(ours.dataobj).tobytes()


def test_probabilities_lie_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file a case, three regions along the fourth axis, on the scan's grid; nibabel and ITK read values of 0 to 1;
    above a half in the file is what is above it in the network."""
    source, item = scan(tmp_path / "in", "four files", AFFINES["oblique"], (1, 1))
    target = predicted(monkeypatch, item, tmp_path / "out", probabilities=True)
    made = nib.load(tmp_path / "out" / "A_1_probabilities.nii.gz")
    assert made.shape == (*SHAPE, 3) and made.get_data_dtype() == np.uint8
    assert np.array_equal(made.affine, nib.load(source).affine)
    values, label = made.get_fdata(), np.asarray(nib.load(target).dataobj)
    for region, least in enumerate((1, 2, 3)):  # values of MSD: WT is 1 to 3, TC 2 and 3, ET 3
        assert np.array_equal(values[..., region] > 0.5, label >= least)
    assert sorted({round(v, 1) for v in np.unique(values)}) == [0.1, 0.9]
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "A_1_probabilities.nii.gz")))
    assert np.allclose(theirs.T, values, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, np.nextafter(np.float32(0.5), np.float32(1)), 0.501, 0.7, 1.0])
def test_a_stored_probability_is_on_its_own_side_of_a_half(value: float) -> None:
    """Within half a step of 1/255; 0.5 itself, which no mask contains, is not above it, and the next number is."""
    found = np.full((3, 2, 2, 2), value, np.float32)
    content = gzip.decompress(probability_file(found, nifti(IMAGE_XYZC)[:348]))
    made = nib.Nifti1Image.from_bytes(content).get_fdata()
    assert np.abs(made - np.float32(value)).max() <= 0.5 / 255 + 1e-6
    assert (made > 0.5).all() == (np.float32(value) > 0.5)


def test_itk_falls_back_and_refuses_in_the_cases_above(tmp_path: Path) -> None:
    """Else the test of shear would be one of nothing: with a qform ITK takes that, without one it refuses."""
    path, _ = scan(tmp_path / "both", "4D", SHEARED, (1, 1))
    *_, direction = itk_place(path)
    assert np.allclose(direction.T @ direction, np.eye(3), atol=1e-6)
    assert not np.allclose(SHEARED[:3, :3].T @ SHEARED[:3, :3], np.eye(3), atol=1e-3)
    path, _ = scan(tmp_path / "one", "4D", SHEARED, (0, 1))
    assert isinstance(itk_place(path), str)


def test_transforms_that_contradict_each_other_are_both_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ITK goes by qform here, nibabel by sform: each finds the prediction where it finds the scan."""
    fields = {"srow_x": [1, 0, 0, 50], "srow_y": [0, 1, 0, 60], "srow_z": [0, 0, 1, 70], "qoffset_x": -33.5}
    source, item = scan(tmp_path / "in", "four files", OBLIQUE, (1, 4), **fields)
    target = predicted(monkeypatch, item, tmp_path / "out")
    assert nib.load(target).affine[:3, 3].tolist() == [50, 60, 70]
    assert all(np.array_equal(a, b) for a, b in zip(itk_place(source), itk_place(target), strict=True))
    assert np.array_equal(nib.load(source).get_qform(), nib.load(target).get_qform())


def test_nothing_else_of_the_scan_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No scaling, intent, display range, extension or name; and the same scan always gives the same bytes."""
    other = {"scl_slope": 2.5, "scl_inter": -3, "cal_max": 700, "cal_min": 5, "intent_code": 1007, "intent_p1": 3}
    comment = b"\1\0\0\0" + (32).to_bytes(4, "big") + (6).to_bytes(4, "big") + b"a comment".ljust(24)
    source, item = scan(
        tmp_path / "in", "big-endian", LPS, (1, 1), extension=comment, descrip=b"J. Doe", slice_end=7, **other
    )
    first = predicted(monkeypatch, item, tmp_path / "out").read_bytes()
    assert predicted(monkeypatch, item, tmp_path / "again").read_bytes() == first
    assert first[4:8] == bytes(4), "the time in gzip's header"
    plain = gzip.decompress(first)
    header = nib.Nifti1Header(plain[:348])
    assert len(plain) == 352 + LABEL.size and plain[348:352] == bytes(4)
    assert (header["scl_slope"], header["scl_inter"]) == (1, 0)
    assert header["dim"].tolist() == [3, *SHAPE, 1, 1, 1, 1]
    for field in ("cal_max", "cal_min", "intent_code", "intent_p1", "slice_end", "glmax"):
        assert header[field] == 0, field
    assert b"Doe" not in plain
    assert source.exists()


def test_a_qfac_that_is_not_set_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header is taken over as it stands, before anything in it is mended for our own use."""
    pixdim = [0, 1, 1, 1, 2.5, 1, 1, 1]
    source, item = scan(tmp_path / "in", "4D", LPS @ np.diag([1, 1, -1, 1.0]), (1, 0), pixdim=pixdim)
    target = predicted(monkeypatch, item, tmp_path / "out")
    raw = nib.Nifti1Header(gzip.decompress(target.read_bytes())[:348], check=False)
    assert raw["pixdim"].tolist() == pixdim
    assert all(np.array_equal(a, b) for a, b in zip(itk_place(source), itk_place(target), strict=True))


@pytest.mark.parametrize("joined", ["vector", "series"])
def test_scans_put_together_by_itk_are_read(joined: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four modalities composed to a vector image (x, y, z, 1, 4), or joined as a series (x, y, z, 4), by SimpleITK."""
    parts = []
    for channel in range(4):
        part = sitk.GetImageFromArray(np.ascontiguousarray(IMAGE_XYZC[..., channel].T))
        part.SetOrigin((-3.5, 20, 7))
        part.SetDirection(OBLIQUE[:3, :3].ravel().tolist())
        parts.append(part)
    path = tmp_path / "in" / "A_1.nii.gz"
    path.parent.mkdir()
    sitk.WriteImage(sitk.Compose(parts) if joined == "vector" else sitk.JoinSeries(parts), str(path))
    assert nib.load(path).shape == (*SHAPE, *((1, 4) if joined == "vector" else (4,)))

    (item,) = scan_images([str(path)])[0]
    target = predicted(monkeypatch, item, tmp_path / "out")
    assert np.array_equal(np.asarray(nib.load(target).dataobj), LABEL)
    assert np.array_equal(nib.load(target).affine, nib.load(path).affine)
    assert all(np.array_equal(a, b) for a, b in zip(itk_place(path), itk_place(target), strict=True))


def test_a_label_file_needs_labels() -> None:
    """Numbers that are no labels do not go by as if they were."""
    with pytest.raises(AssertionError):
        label_file(LABEL.astype(np.int16), nifti(IMAGE_XYZC)[:348])


@pytest.mark.parametrize("name", AFFINES)
def test_pictures_show_the_patients_right_on_the_left(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order of the scan's axes: what is drawn is the prediction turned to R, A, S, with its volume."""
    _, item = scan(tmp_path / "in", "4D", AFFINES[name], (1, 1))
    shown: list[Any] = []
    real = predict.overlays.cut
    monkeypatch.setattr(predict.overlays, "cut", lambda *given: shown.append(given) or real(*given))
    target = predicted(monkeypatch, item, tmp_path / "out", drawn=frozenset([item[1].id]))
    assert (tmp_path / "out" / "overlays" / f"{item[1].id}.png").read_bytes().startswith(b"\x89PNG")
    ((case, image, truth, masks, edges_mm),) = shown
    turned = nib.as_closest_canonical(nib.load(target))
    assert case == item[1].id and truth is None
    assert np.array_equal(masks[0], np.asarray(turned.dataobj) > 0) and image.shape == (2, *turned.shape)
    assert np.allclose(edges_mm, turned.header.get_zooms(), atol=1e-4)
