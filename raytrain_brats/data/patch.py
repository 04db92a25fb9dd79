"""Patches, and the box of each case in which they travel to ranks. Runs in data tasks and workers.

In: the sampler's rows, the cases' source.
Out: a one-row Arrow table of case boxes; on the rank the `Patch`es, as views into the table: integers and statistics.
The training device normalises, augments and converts labels to regions.

Patches of one case overlap: four of 128^3 are 76 MB, the brain they were cut from is 28. So a rank receives the part of
each case that its patches cover, once, and crops the patches itself: a third of the bytes, and no second copy (measured
in docs/benchmarks/stream.md).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raytrain_brats.augmentation import Cut, cut, rotation_and_scale
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.preprocess import Prepared, Triple, triple
from raytrain_brats.data.sampler import Row, Sample, draw
from raytrain_brats.data.store import Source, binary_column, binary_value

Regions = tuple[tuple[int, ...], ...]
"""Label values of each."""


@dataclass(frozen=True)
class PatchSpec:
    """How patches are cropped; pickled into every read task, so it is small."""

    patch_xyz: Triple
    foreground_share: float
    regions: Regions = ()
    """Regions among which centres are drawn evenly; none: evenly among label values."""
    moved: bool = False
    """Whether some patches are rotated and scaled, on the device, and need other voxels than their own."""

    @property
    def size_zyx(self) -> Triple:
        x, y, z = self.patch_xyz
        return z, y, x

    @property
    def patch_bytes(self) -> int:
        return 9 * prod(self.patch_xyz)

    @property
    def box_bytes(self) -> int:
        """About what a case's box weighs (measured: 1.3 patches of 128^3, 1.45 where some are moved)."""
        return 3 * self.patch_bytes // 2


@dataclass(frozen=True)
class Patch:
    """One training sample. `weight` 0: padding, or an invalid case (then `reason` says why).

    The voxels are those of a `Cut`: the patch, or what one that is rotated or scaled needs. They may be views into
    shared memory, read-only and not contiguous, or tensors on the training device.
    """

    position: int
    seed: int
    case_id: str
    weight: float
    reason: str
    image_czyx: Any
    label_zyx: Any
    mean: Sequence[float]
    std: Sequence[float]
    """By modality, of the stored values other than zero."""
    start_zyx: Triple = (0, 0, 0)
    """Where the patch begins within the voxels (`Cut`)."""


@dataclass(frozen=True)
class CaseBox:
    """Part of a case, and the patches in it as (sample, what it needs, counted from the part's first voxel)."""

    case_id: str
    samples: list[tuple[Sample, Cut]]
    reason: str = ""
    """Why there are no voxels: the patches have weight zero."""
    shape_zyx: Triple = (0, 0, 0)
    """Of the part. The arrays are smaller where it extends beyond the case: those voxels are zero."""
    image_czyx: npt.NDArray[Any] | None = None
    label_zyx: npt.NDArray[np.uint8] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def patch_origin(
    prepared: Prepared, sample: Sample, size_zyx: Triple, foreground_share: float, regions: Regions = ()
) -> Triple:
    """First voxel (z, y, x) of the sample's patch in the prepared box.

    With probability `foreground_share` the centre is a tumour voxel (`_centre`); else the origin is uniform.
    """
    box = prepared.image_czyx.shape[1:]
    # Always six numbers, whichever branch uses them: a sample's crop depends on its seed and its case alone.
    chance, value, voxel, *uniform = draw(sample.seed, "crop", 6)
    room = [max(0, b - s) for b, s in zip(box, size_zyx, strict=True)]
    origin = [int(u * (r + 1)) for u, r in zip(uniform, room, strict=True)]
    index = _centre(prepared, regions, value, voxel) if chance < foreground_share else None
    if index is not None:
        centre = np.unravel_index(index, box)
        origin = [min(max(0, int(c) - s // 2), r) for c, s, r in zip(centre, size_zyx, room, strict=True)]
    return origin[0], origin[1], origin[2]


def _centre(prepared: Prepared, regions: Regions, which: float, voxel: float) -> int | None:
    """The flat index of a tumour voxel, by two numbers in [0, 1); None where there is none.

    First one of the case's label values is drawn, or one of its regions, each as likely as the others; then one of its
    voxels (nnU-Net's oversampling, Isensee et al. 2021, doi 10.1038/s41592-020-01008-z).
    """
    values, counts = [value for value, _ in prepared.foreground_counts], [n for _, n in prepared.foreground_counts]
    drawn_among = [[row] for row in range(len(values))]
    if regions:
        drawn_among = [rows for r in regions if (rows := [row for row, value in enumerate(values) if value in r])]
    if not drawn_among:
        return None
    chosen, *others = drawn_among[int(which * len(drawn_among))]
    if others:  # each voxel of a region is as likely, though as many may be listed of a small part as of a large one
        voxel *= sum(prepared.label_voxels[row] for row in (chosen, *others))
        for row in (chosen, *others):
            chosen = row
            if voxel < prepared.label_voxels[row]:
                break
            voxel -= prepared.label_voxels[row]
        voxel /= prepared.label_voxels[chosen]
    listed = min(int(voxel * counts[chosen]), counts[chosen] - 1)
    return int(prepared.foreground[sum(counts[:chosen]) + listed])


def cut_of(prepared: Prepared, sample: Sample, patch_spec: PatchSpec) -> Cut:
    """What the sample needs of the prepared box."""
    size, case = patch_spec.size_zyx, prepared.image_czyx.shape[1:]
    origin = patch_origin(prepared, sample, size, patch_spec.foreground_share, patch_spec.regions)
    matrix = rotation_and_scale(partial(draw, sample.seed)) if patch_spec.moved else None
    return cut(matrix, origin, size, triple(case))


class Buffer:
    """Memory in which one table after the other is assembled: page faults of fresh memory cost more than copying."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, count: int) -> npt.NDArray[np.uint8]:
        """`count` bytes; those taken before are overwritten."""
        if count > len(self._bytes):
            self._bytes = np.empty(count, np.uint8)
        return self._bytes[:count]


def row_table(
    source: Source, row: Row, cases: dict[int, Case], patch_spec: PatchSpec, buffer: Buffer | None = None
) -> pa.Table:
    """The table of a row of the sampler, whose cases are loaded here. Raises OSError when storage is down."""
    boxes: list[CaseBox] = []
    for index, samples in row.cases:
        found = case_boxes(source, cases[index], samples, patch_spec)
        boxes += found if len(row.cases) == 1 else map(detached, found)
    return encode(boxes, patch_spec.size_zyx, row.until, buffer)


def case_boxes(source: Source, case: Case, samples: Sequence[Sample], patch_spec: PatchSpec) -> list[CaseBox]:
    """The boxes of these samples of a case, which is loaded once.

    An invalid case raises nothing: its samples become patches of weight zero. OSError (storage down) is raised: it says
    nothing about the case, and the run must stop rather than train without it.
    """
    try:
        return bounding_boxes(source.load(case), case.id, samples, patch_spec)
    except InvalidCase as error:
        reason = f"{error.reason}: {error.detail}"
        return [CaseBox(case.id, [(sample, Cut((0, 0, 0), patch_spec.size_zyx)) for sample in samples], reason)]


def bounding_boxes(prepared: Prepared, case_id: str, samples: Sequence[Sample], patch_spec: PatchSpec) -> list[CaseBox]:
    """The bounding box of what these patches need of a case; a box for each where the common one would be larger."""
    cuts = [cut_of(prepared, sample, patch_spec) for sample in samples]
    lows, separately = np.array([c.low for c in cuts]), sum(prod(c.shape) for c in cuts)
    low, high = lows.min(axis=0), (lows + [c.shape for c in cuts]).max(axis=0)
    if len(samples) > 1 and prod(np.minimum(high, prepared.image_czyx.shape[1:]) - low) > separately:
        return [box for sample in samples for box in bounding_boxes(prepared, case_id, [sample], patch_spec)]
    inside = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))  # NumPy clips it to the case
    assert prepared.label_zyx is not None, "training cases are labelled; the manifest saw to it"
    within = [(s, replace(c, low=triple(np.subtract(c.low, low)))) for s, c in zip(samples, cuts, strict=True)]
    image, label = prepared.image_czyx[(slice(None), *inside)], prepared.label_zyx[inside]
    return [CaseBox(case_id, within, "", triple(high - low), image, label, prepared.mean, prepared.std)]


def detached(box: CaseBox) -> CaseBox:
    """The same without the case that it is a view of: eight whole cases would be half a gigabyte."""
    if box.image_czyx is None or box.label_zyx is None:
        return box
    return replace(box, image_czyx=box.image_czyx.copy(), label_zyx=box.label_zyx.copy())


def encode(boxes: Sequence[CaseBox], size_zyx: Triple, until: int, buffer: Buffer | None = None) -> pa.Table:
    """One row: a JSON description, and all voxels as one run of bytes, because dtypes differ between cases.

    `until` is that of the sampler's `Row`. A table in `buffer` is valid until the next is asked for.
    """
    parts: list[dict[str, Any]] = []
    arrays: list[tuple[int, Triple, npt.NDArray[Any]]] = []
    total = 0
    for box in boxes:
        about: dict[str, Any] = {"case_id": box.case_id, "reason": box.reason, "mean": box.mean, "std": box.std}
        about["patches"] = [[s.position, s.seed, c.low, c.shape, c.start] for s, c in box.samples]
        if box.image_czyx is not None and box.label_zyx is not None:
            about |= {"dtype": box.image_czyx.dtype.name, "shape": (4, *box.shape_zyx), "at": total}
            for array in (*box.image_czyx, box.label_zyx):
                arrays.append((total, box.shape_zyx, array))
                total += prod(box.shape_zyx) * array.itemsize
            total = -(-total // 64) * 64  # a box begins at a multiple of every item size, so that `view` works
        parts.append(about)
    voxels = (buffer or Buffer()).take(total)
    for at, shape, array in arrays:
        _fill(_array(voxels, at, array.dtype.name, shape), array)
    about_all = json.dumps({"until": until, "size_zyx": size_zyx, "parts": parts})
    return pa.table({"about": [about_all], "voxels": binary_column(voxels)})


def decode(
    table: pa.Table, place: "Callable[[npt.NDArray[np.uint8]], ViewOf] | None" = None
) -> tuple[int, list[Patch]]:
    """(`until` of the row, its patches); views into the table, or of what `place` makes of all its voxels at once."""
    about = json.loads(table.column("about")[0].as_py())
    voxels = binary_value(table, "voxels", np.uint8)
    view = place(voxels) if place else partial(_array, voxels)
    size = tuple(about["size_zyx"])
    patches: list[Patch] = []
    for part in about["parts"]:
        name, reason = part["case_id"], part["reason"]
        if "at" not in part:
            patches += [empty_patch(position, seed, name, reason, size) for position, seed, *_ in part["patches"]]
            continue
        at, dtype, shape = part["at"], part["dtype"], part["shape"]
        image = view(at, dtype, shape)
        label = view(at + prod(shape) * np.dtype(dtype).itemsize, "uint8", shape[1:])
        for position, seed, low, extent, start in part["patches"]:
            cropped = crop(image, low, extent), crop(label, low, extent)
            patches.append(Patch(position, seed, name, 1.0, "", *cropped, part["mean"], part["std"], triple(start)))
    return about["until"], patches


ViewOf = Callable[[int, str, Sequence[int]], Any]
"""An array of placed voxels, by its first byte, dtype and shape."""


def _array(voxels: npt.NDArray[np.uint8], at: int, dtype: str, shape: Sequence[int]) -> npt.NDArray[Any]:
    item = np.dtype(dtype)
    array: npt.NDArray[Any] = voxels[at : at + prod(shape) * item.itemsize].view(item).reshape(shape)
    return array


def crop(array: npt.NDArray[Any], origin: Triple, size_zyx: Triple) -> npt.NDArray[Any]:
    """The voxels (..., z, y, x) from `origin` on: a view."""
    inside: tuple[Any, ...] = (..., *(slice(a, a + s) for a, s in zip(origin, size_zyx, strict=True)))
    view: npt.NDArray[Any] = array[inside]
    return view


def empty_patch(position: int, seed: int, case_id: str, reason: str, size_zyx: Triple) -> Patch:
    """A patch of weight zero: every position yields a patch, also where its case is invalid."""
    nothing = np.zeros(1, np.int16), np.zeros(1, np.uint8)
    image, label = np.broadcast_to(nothing[0], (4, *size_zyx)), np.broadcast_to(nothing[1], size_zyx)
    return Patch(position, seed, case_id, 0.0, reason, image, label, [0.0] * 4, [1.0] * 4)


def _fill(target: npt.NDArray[Any], array: npt.NDArray[Any]) -> None:
    """Copy an array to the beginning of a larger one; zeros behind it, since the buffer holds earlier voxels."""
    for axis, count in enumerate(array.shape):
        rest: list[slice] = [slice(None)] * array.ndim
        rest[axis] = slice(count, None)
        target[tuple(rest)] = 0
    np.copyto(target[tuple(slice(count) for count in array.shape)], array)
