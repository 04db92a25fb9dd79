"""Pictures of cases: three planes as a radiologist looks at them, outlines, volumes; only the worst are drawn."""

import io

import matplotlib.image
import numpy as np
import pytest

from raytrain_brats.reporting import figures, overlays


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return matplotlib.image.imread(io.BytesIO(png))


def ball(shape: tuple[int, int, int], radius: float) -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.arange(n) - n / 2 for n in shape), indexing="ij"))
    return np.sqrt((grid**2).sum(axis=0)) < radius


def outline_pixels(png: bytes, region: str) -> int:
    colour = [int(figures.REGION_COLOURS[region][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    image = pixels(png)[130:, :, :3]  # below the legend
    return int((np.abs(image - colour).max(axis=2) < 0.03).sum())


@pytest.mark.parametrize("shape", [(60, 60, 39), (7, 5, 3)])
def test_overlay_shows_brain_and_outlines(shape: tuple[int, int, int]) -> None:
    """With a tumour all three outlines are drawn; without one the brain is shown and no outline."""
    image = np.random.default_rng(0).normal(100, 10, (2, *shape)) * ball(shape, max(shape) / 2.2)
    regions = np.stack([ball(shape, max(shape) / k) for k in (3, 4, 6)])
    dice = {"WT": 0.9, "TC": None, "ET": float("nan")}
    drawn = overlays.draw(overlays.cut("$case_{1}", image, regions, regions), dice)
    assert all(outline_pixels(drawn, region) > 20 for region in ("WT", "TC", "ET"))
    nothing = np.zeros_like(regions)
    for truth in (nothing, None):
        empty = overlays.draw(overlays.cut("empty", image, truth, nothing), {})
        assert pixels(empty).std() > 0.05
        assert outline_pixels(empty, "WT") == 0
    assert pixels(overlays.draw(overlays.cut("even", np.ones((2, *shape)), ~nothing, regions), {})).size


@pytest.mark.parametrize("same", ["TC ET", "WT TC", "WT TC ET"])
def test_each_outline_is_seen_where_they_coincide(same: str) -> None:
    """In the very colour of the legend: the rim of ET is often that of TC, and TC's that of WT."""
    shape = (120, 120, 80)
    image = np.ones((2, *shape)) * ball(shape, 50)
    radius = {"WT": 25, "TC": 20, "ET": 14} | dict.fromkeys(same.split(), 20)
    regions = np.stack([ball(shape, r) for r in radius.values()])
    drawn = overlays.draw(overlays.cut("case", image, regions, regions), {})
    found = {region: outline_pixels(drawn, region) for region in radius}
    assert min(found.values()) > 8 * 40, "in each of eight planes some forty pixels"


def test_planes_are_those_of_the_largest_true_area_and_radiological() -> None:
    """Each plane where the true whole tumour is largest; the patient's right (high x on a RAS grid) comes first, and
    the face (high y) first in the sagittal plane; up stays up; millimetres are those of the plane's own axes."""
    shape = (12, 14, 9)
    truth = np.zeros((3, *shape), bool)
    truth[:, 7:11, 3:6, 6], truth[:, 8, 3, 2] = True, True
    predicted = np.zeros_like(truth)
    predicted[:, 0, 0, 0] = True
    image = np.zeros((2, *shape))
    image[:, 1:-1, 1:-1, 1:-1] = 1
    image[:, -2, -2, -2] = 9  # right, front, top
    image[:, -2, 4, 6] = image[:, 8, -2, 6] = image[:, 8, 3, -2] = 9
    case = overlays.cut("case", image, truth, predicted, (1.0, 2.0, 3.0))
    assert [case.planes[name].at for name in ("axial", "coronal", "sagittal")] == [6, 3, 8]
    axial, coronal, sagittal = (case.planes[n].images["FLAIR"] for n in ("axial", "coronal", "sagittal"))
    assert axial.argmax() // axial.shape[1] < axial.shape[0] / 2, "the patient's right is not on the left"
    assert coronal[:, : coronal.shape[1] // 2].max() < 255 == coronal.max(), "the top of the head is not up"
    assert sagittal.argmax() // sagittal.shape[1] < sagittal.shape[0] / 2, "the face is not on the left"
    edges = [case.planes[n].edges_mm for n in ("axial", "coronal", "sagittal")]
    assert edges == [(1.0, 2.0), (1.0, 3.0), (2.0, 3.0)]
    assert case.ml == {"truth": pytest.approx((13 * 6e-3,) * 3), "prediction": pytest.approx((6e-3,) * 3)}
    assert case.planes["axial"].masks["truth"][0].sum() == 12


def test_only_the_worst_are_kept() -> None:
    """In whatever order cases come, the lowest mean Dice are drawn, worst first; a case without one comes last."""
    nothing, image = np.zeros((3, 6, 6, 6), bool), np.ones((2, 6, 6, 6))
    worst = overlays.Worst(2)
    for name, dice in (("b", 0.6), ("none", None), ("a", 0.9), ("c", 0.1)):
        worst.seen({"case": name, "dice_WT": dice}, overlays.cut(name, image, nothing, nothing))
    assert list(worst.drawn()) == ["c", "b"]
