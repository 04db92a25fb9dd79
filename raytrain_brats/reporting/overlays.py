"""A case in three planes, as a radiologist looks at it, with the outlines of its regions.

In: FLAIR and T1gd of one case, its masks, both on a RAS grid; the voxel's edges in mm.
Out: `Slices`, the few planes that are shown (some hundred kilobytes, so that many cases can wait until it is known
which of them are worst); of these a PNG.

Radiological view: the patient's right is on the left, the face to the left in the sagittal plane.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raytrain_brats.reporting import scores
from raytrain_brats.reporting.figures import REGION_COLOURS, png, theme

Array = np.ndarray
CHANNELS = (0, 2)
"""Of a case's modalities, those that are shown: FLAIR shows edema, T1gd what enhances."""
SHOWN = ("FLAIR", "T1gd")
_PLANES = {  # name: (axis through the slices, its letter, inches high, letters at the left and the right edge)
    "axial": (2, "z", 2.55, "RL"),
    "coronal": (1, "y", 2.0, "RL"),
    "sagittal": (0, "x", 1.85, "AP"),
}
FOOTNOTE = (
    "radiological view: R, the patient's right, is on the left; where the tumour is largest\n"
    "WT's line is drawn a third of a voxel further out, to be seen beside that of TC"
)
_WIDTH, _STRIP, _FOOT = 2.4, 0.24, 0.42
_LINES: dict[str, tuple[float, float, Any]] = {
    "WT": (3.0, 0.15, "-"),
    "TC": (1.7, 0.5, "-"),
    "ET": (1.7, 0.5, (0, (2.2, 1.6))),
}
"""Outlines, drawn from outside in: {region: (points wide, level, dashes)}. The rim of ET is often that of TC, and TC's
that of WT: WT is wider and a third of a voxel further out, TC is seen between the dashes of ET."""


@dataclass(frozen=True)
class Slice:
    """One plane, cut to the brain: arrays of (across, up), turned as they are shown."""

    at: int
    """Its index on the RAS grid."""
    images: dict[str, Array]
    """{modality: bytes, from black to white}"""
    masks: dict[str, Array]
    """{"truth" or "prediction": (region, across, up)}"""
    edges_mm: tuple[float, float]


@dataclass(frozen=True)
class Slices:
    """All that is shown of a case; `ml`: {"truth" or "prediction": volume of WT, TC, ET}."""

    case_id: str
    planes: dict[str, Slice]
    ml: dict[str, tuple[float, ...]]


class Worst:
    """Keeps what may be drawn of the cases with the lowest mean Dice, and forgets the others."""

    def __init__(self, most: int) -> None:
        self._most, self._kept = most, list[tuple[dict[str, Any], Slices]]()

    def seen(self, row: dict[str, Any], case: Slices | None) -> dict[str, Any]:
        """One more case; its row of scores is handed back."""
        if case:
            order = sorted([*self._kept, (row, case)], key=lambda each: scores.mean_dice(each[0]))
            self._kept = order[: self._most]
        return row

    def drawn(self) -> dict[str, bytes]:
        """{case: PNG}, worst first."""
        return {case.case_id: draw(case, {r: row.get(f"dice_{r}") for r in REGION_COLOURS}) for row, case in self._kept}


def cut(
    case_id: str,
    image_cxyz: Array,
    truth_rxyz: Array | None,
    predicted_rxyz: Array,
    edges_mm: Sequence[float] = (1.0, 1.0, 1.0),
) -> Slices:
    """(2, x, y, z) FLAIR and T1gd, (3, x, y, z) masks of WT, TC, ET, all as R, A, S; no truth: None."""
    masks = {name: m for name, m in (("truth", truth_rxyz), ("prediction", predicted_rxyz)) if m is not None}
    leading = next((m[0] for m in masks.values() if m[0].any()), None)
    inside = (image_cxyz != image_cxyz[:, :1, :1, :1]).any(0) | np.any([m[0] for m in masks.values()], axis=0)
    planes = {}
    for name, (axis, *_) in _PLANES.items():
        middle = predicted_rxyz.shape[1 + axis] // 2
        others = tuple(n for n in range(3) if n != axis)
        at = middle if leading is None else int(leading.sum(axis=others).argmax())
        within = inside.take(at, axis)[::-1]
        box = _box(within)
        images = {
            modality: _grey(volume.take(at, axis)[::-1][box], within[box])
            for modality, volume in zip(SHOWN, image_cxyz, strict=True)
        }
        shown = {key: m.take(at, 1 + axis)[:, ::-1][:, *box] for key, m in masks.items()}
        first, second = others
        planes[name] = Slice(at, images, shown, (float(edges_mm[first]), float(edges_mm[second])))
    voxel_ml = float(np.prod(edges_mm)) / 1000
    return Slices(case_id, planes, {key: tuple(float(r.sum()) * voxel_ml for r in m) for key, m in masks.items()})


def draw(case: Slices, dice: Mapping[str, Any]) -> bytes:
    """Truth beside prediction, axial in FLAIR and T1gd, the others in T1gd; without truth FLAIR beside T1gd."""
    if both := "truth" in case.ml:
        rows = [("axial", "FLAIR"), *((plane, "T1gd") for plane in _PLANES)]
        grid = [[(plane, modality, name) for name in case.ml] for plane, modality in rows]
    else:
        grid = [[(plane, modality, "prediction") for modality in SHOWN] for plane in _PLANES]
    head = 1.0 if both else 0.8
    total = head + _FOOT + sum(_PLANES[row[0][0]][2] + _STRIP for row in grid)
    with matplotlib.rc_context({**theme(dark=True), "figure.facecolor": "black"}):
        figure = Figure(figsize=(2 * _WIDTH, total))
        top = total - head
        for row in grid:
            height = _PLANES[row[0][0]][2]
            top -= height + _STRIP
            for place, (plane, modality, name) in enumerate(row):
                left = place / 2 + 0.008
                axes = figure.add_axes((left, top / total, 0.484, height / total))
                _panel(axes, case.planes[plane], modality, name, _PLANES[plane][3])
                what = name if both else modality
                label = f"{plane} {modality}, {what}" if both else f"{plane} {modality}"
                label += "" if case.planes[plane].masks[name][0].any() else ": no tumour"
                figure.text(left + 0.005, (top + height + 0.05) / total, label, alpha=0.9, size=8.5)
        _legend(figure, case, dice, total)
        figure.text(0.02, 0.08 / total, FOOTNOTE, size=7.5)
        return png(figure, dpi=130)


def _legend(figure: Figure, case: Slices, dice: Mapping[str, Any], total: float) -> None:
    """The case's name; by region its colour, its Dice and how large it is."""
    figure.text(
        0.02, 1 - 0.2 / total, f"{case.case_id:.46}", size=11.5, parse_math=False, va="center", fontweight="bold"
    )
    for place, (region, colour) in enumerate(REGION_COLOURS.items()):
        score = np.array(dice.get(region), dtype=float) if "truth" in case.ml else None
        lines = [
            f"{'━' if _LINES[region][2] == '-' else '╍'} {region}"
            + ("" if score is None else f"  Dice {score:.3f}".replace("nan", "–"))
        ]
        lines += [f"{name} {volume[place]:.1f} ml" for name, volume in case.ml.items()]
        for number, text in enumerate(lines):
            look: dict[str, Any] = {"fontweight": "bold", "size": 9.5} if number == 0 else {"size": 8}
            y = 1 - (0.46 + 0.2 * number) / total
            figure.text(0.02 + 0.33 * place, y, text, color=colour, va="center", **look)


def _panel(axes: Axes, plane: Slice, modality: str, name: str, letters: str) -> None:
    image, (across_mm, up_mm) = plane.images[modality], plane.edges_mm
    axes.imshow(
        image.T, cmap="gray", origin="lower", interpolation="bilinear", vmin=0, vmax=255, aspect=up_mm / across_mm
    )
    for mask, (region, (width, level, dashes)) in zip(plane.masks[name], _LINES.items(), strict=True):
        if mask.any():  # padded, so that a mask at the border is closed, and a full one has an outline
            u, v = (np.arange(-1, n + 1) for n in mask.shape)
            field, colour = np.pad(mask, 1).T.astype(float), REGION_COLOURS[region]
            look: dict[str, Any] = {"colors": [colour], "linewidths": width, "linestyles": [dashes]}
            axes.contour(u, v, field, levels=[level], **look)
    axes.set(xlim=(-0.5, image.shape[0] - 0.5), ylim=(-0.5, image.shape[1] - 0.5))
    axes.set_anchor("C")
    for x, letter, side in ((0.01, letters[0], "left"), (0.99, letters[1], "right")):
        axes.text(x, 0.93, letter, transform=axes.transAxes, ha=side, va="center", color="#ffffff", weight="bold")
    axes.axis("off")


def _box(inside: Array) -> tuple[slice, slice]:
    """The bounding box of what is inside, with a margin; everything if nothing is."""
    u, v = (np.flatnonzero(inside.any(axis=axis)) if inside.any() else [0, 10**6] for axis in (1, 0))
    return slice(max(u[0] - 2, 0), u[-1] + 3), slice(max(v[0] - 2, 0), v[-1] + 3)


def _grey(plane: Array, inside: Array) -> Array:
    """Bytes; white is the 99.5th percentile of what is inside."""
    low, high = np.nanpercentile(plane[inside] if inside.any() else plane, [1, 99.5])
    scaled = (np.nan_to_num(np.where(inside, plane, low), nan=low) - low) / max(float(high - low), 1e-6)
    grey: Array = (np.clip(scaled, 0, 1) * 255).astype(np.uint8)
    return grey
