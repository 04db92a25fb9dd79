"""What happens to one sample by `train.augment.kind: full`, from its own random numbers: plain numbers, before a voxel
is read. Runs in any process.

In: `Draws`, a sample's numbers by purpose.
Out: a `Drawn`: a matrix, mirrored axes, parameters of intensities; the voxels of a case that a matrix reads (`Cut`).

nnU-Net 2.8.1's list with its own ranges and probabilities (nnUNetTrainer.py:get_training_transforms). Each operation
has a purpose of its own, and each modality within it, so that one more operation does not change another's numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

CHANNELS = 4
Draws = Callable[[str, int], list[float]]
"""(purpose, count) -> as many numbers in [0, 1), the same for the same arguments."""
Range = tuple[float, float]
Triple = tuple[int, int, int]
Matrix = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Odds:
    """How likely an operation is, and from which range it takes its numbers. 0 turns it off."""

    rotation: float = 0.2
    rotation_deg: float = 30.0
    """Each of the three angles lies within plus and minus this."""
    scale: float = 0.2
    scale_range: Range = (0.7, 1.4)
    """Above 1 objects become smaller."""
    mirror: float = 0.5
    noise: float = 0.1
    noise_std: Range = (0.0, 0.1)
    """nnU-Net calls it a variance and uses it as a standard deviation."""
    blur: float = 0.2
    blur_sigma: Range = (0.5, 1.0)
    brightness: float = 0.15
    brightness_range: Range = (0.75, 1.25)
    contrast: float = 0.15
    contrast_range: Range = (0.75, 1.25)
    low_resolution: float = 0.25
    zoom: Range = (0.5, 1.0)
    inverted_gamma: float = 0.1
    gamma: float = 0.3
    gamma_range: Range = (0.7, 1.5)
    channel: float = 0.5
    """Share of the modalities that blur and low resolution touch."""


NNUNET = Odds()


@dataclass(frozen=True)
class Drawn:
    """What happens to one sample, in this order. Empty tuples and None: nothing. By modality, None leaves one out."""

    matrix: Matrix | None = None
    """A voxel p of the patch comes from matrix @ p of the case, both about the patch's centre (z, y, x)."""
    mirrored: tuple[bool, bool, bool] = (False, False, False)
    """Axes that are reversed; with a matrix they are in it already."""
    noise: tuple[int, float] | None = None
    """(key of the field of random numbers, its standard deviation)."""
    blur: tuple[tuple[float, float, float] | None, ...] = ()
    """Sigmas in voxels, by axis."""
    brightness: tuple[float, ...] = ()
    contrast: tuple[float, ...] = ()
    low_resolution: tuple[float | None, ...] = ()
    inverted_gamma: tuple[float, ...] = ()
    gamma: tuple[float, ...] = ()

    @property
    def changes_intensity(self) -> bool:
        lists = (self.blur, self.brightness, self.contrast, self.low_resolution, self.inverted_gamma, self.gamma)
        return self.noise is not None or any(lists)


def drawn(draws: Draws, mirror: bool = True) -> Drawn:
    """What happens to the sample of these numbers."""
    odds = NNUNET
    number = lambda purpose: draws(f"augment/{purpose}", 1)[0]  # noqa: E731
    z, y, x = (mirror and u < odds.mirror for u in draws("augment/mirror", 3))
    matrix = rotation_and_scale(draws)
    if matrix:
        matrix = tuple((_signed(a, z), _signed(b, y), _signed(c, x)) for a, b, c in matrix)
    happens, level, field = draws("augment/noise", 3)

    def each(purpose: str, odds_of_it: float) -> list[list[float]]:
        """Four numbers of each modality, if the operation happens at all."""
        happens = number(purpose) < odds_of_it
        return [draws(f"augment/{purpose}/{channel}", 4) for channel in range(CHANNELS)] if happens else []

    def sigmas(u: list[float]) -> tuple[float, float, float]:
        return _between(u[1], odds.blur_sigma), _between(u[2], odds.blur_sigma), _between(u[3], odds.blur_sigma)

    def around_one(purpose: str, odds_of_it: float, within: Range) -> tuple[float, ...]:
        return tuple(_around_one(u[0], u[1], within) for u in each(purpose, odds_of_it))

    blur, low = each("blur", odds.blur), each("low_resolution", odds.low_resolution)
    return Drawn(
        matrix,
        (z, y, x),
        (int(field * 2**53), _between(level, odds.noise_std)) if happens < odds.noise else None,
        tuple(sigmas(u) if u[0] < odds.channel else None for u in blur),
        around_one("brightness", odds.brightness, odds.brightness_range),
        around_one("contrast", odds.contrast, odds.contrast_range),
        tuple(_between(u[1], odds.zoom) if u[0] < odds.channel else None for u in low),
        around_one("inverted_gamma", odds.inverted_gamma, odds.gamma_range),
        around_one("gamma", odds.gamma, odds.gamma_range),
    )


def rotation_and_scale(draws: Draws) -> Matrix | None:
    """Rz @ Ry @ Rx times the scale, as batchgeneratorsv2's create_affine_matrix_3d (spatial/spatial.py); or None."""
    odds = NNUNET
    rotates, *angles = draws("augment/rotation", 4)
    scales, level = draws("augment/scale", 2)
    if rotates >= odds.rotation and scales >= odds.scale:
        return None
    a, b, c = ((2 * u - 1) * math.radians(odds.rotation_deg) if rotates < odds.rotation else 0.0 for u in angles)
    f = _between(level, odds.scale_range) if scales < odds.scale else 1.0
    (ca, cb, cc), (sa, sb, sc) = map(math.cos, (a, b, c)), map(math.sin, (a, b, c))
    return (
        (f * cc * cb, f * (cc * sb * sa - sc * ca), f * (cc * sb * ca + sc * sa)),
        (f * sc * cb, f * (sc * sb * sa + cc * ca), f * (sc * sb * ca - cc * sa)),
        (f * -sb, f * cb * sa, f * cb * ca),
    )


@dataclass(frozen=True)
class Cut:
    """The voxels of a case that one sample needs, and where its patch would begin within them if nothing moved."""

    low: Triple
    shape: Triple
    start: Triple = (0, 0, 0)
    """May be below 0: a patch that is enlarged needs less than itself."""


def cut(matrix: Matrix | None, origin: Triple, size: Triple, case: Triple) -> Cut:
    """What the patch of `size` at `origin` reads of a case of the shape `case`: all (z, y, x).

    Without a matrix the patch itself, which may reach beyond the case; with one no more than the case, as voxels
    outside are zero: 1.1 times 128^3 on average for a Task01 case, where nnU-Net loads 4.1 times as much for all.
    """
    if matrix is None:
        return Cut(origin, size)
    spans = []
    for axis, row in enumerate(matrix):
        half = sum(abs(v) * (n - 1) / 2 for v, n in zip(row, size, strict=True))
        centre = origin[axis] + (size[axis] - 1) / 2
        # One voxel at least: far from a case that is much smaller than the patch there is nothing but zeros.
        low = min(max(0, math.floor(centre - half)), case[axis] - 1)
        spans.append((low, max(low + 1, min(case[axis], math.ceil(centre + half) + 1))))
    (z, z_end), (y, y_end), (x, x_end) = spans
    start = (origin[0] - z, origin[1] - y, origin[2] - x)
    return Cut((z, y, x), (z_end - z, y_end - y, x_end - x), start)


def _signed(value: float, mirrored: bool) -> float:
    return -value if mirrored else value


def _between(u: float, within: Range) -> float:
    return within[0] + u * (within[1] - within[0])


def _around_one(side: float, u: float, within: Range) -> float:
    """As batchgeneratorsv2's BGContrast: half of the numbers below 1, half above."""
    low, high = within
    return _between(u, (low, 1.0)) if side < 0.5 and low < 1 else _between(u, (max(low, 1.0), high))
