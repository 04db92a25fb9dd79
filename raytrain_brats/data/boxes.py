"""What travels from data tasks to ranks: of each case the box that its patches cover. Runs in data tasks and workers.

In: the samples of a window, their cases and source, the number of ranks.
Out: one-row Arrow tables that the ranks receive in turn; on the rank the `Patch`es again, as views into the table.

Patches of one case overlap: four of 128^3 are 76 MB, the brain they were cut from is 28. So a rank receives the part of
each case that its patches cover, once, and crops the patches itself: a third of the bytes, and no second copy (measured
in docs/benchmarks/data.md).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.patch import Patch, crop, empty_patch, patch_origin
from raytrain_brats.data.preprocess import Prepared, Triple, triple
from raytrain_brats.data.sampler import Sample
from raytrain_brats.data.store import Source, binary_column, binary_value

Item = tuple[Sample, Case | None]


@dataclass(frozen=True)
class PatchSpec:
    """How patches are cropped; pickled into every read task, so it is small."""

    patch_xyz: Triple
    foreground_share: float

    @property
    def size_zyx(self) -> Triple:
        x, y, z = self.patch_xyz
        return z, y, x


class Buffer:
    """Memory in which one table after the other is assembled: page faults of fresh memory cost more than copying."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, count: int) -> npt.NDArray[np.uint8]:
        """`count` bytes; those taken before are overwritten."""
        if count > len(self._bytes):
            self._bytes = np.empty(count, np.uint8)
        return self._bytes[:count]


@dataclass(frozen=True)
class CaseBox:
    """Part of a case, and the patches in it as (sample, their origin within the part)."""

    case_id: str
    samples: list[tuple[Sample, Triple]]
    reason: str = ""
    """Why there are no voxels: the patches have weight zero."""
    shape_zyx: Triple = (0, 0, 0)
    """Of the part. The arrays are smaller where it extends beyond the case: those voxels are zero."""
    image_czyx: npt.NDArray[Any] | None = None
    label_zyx: npt.NDArray[np.uint8] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def rank_tables(
    source: Source, items: list[Item], patch_spec: PatchSpec, world_size: int, buffer: Buffer | None = None
) -> Iterator[pa.Table]:
    """Tables for the ranks in turn: the first is for the rank of the first item, the next for the next rank.

    All ranks get equally many tables with equally many items; then come the items that are left when their number is
    no multiple of `world_size`, a table each. Each case is loaded once. A table in `buffer` is valid until the next is
    asked for.

    Invalid cases raise nothing: they become patches of weight zero, because a missing row would shift all later rows
    to other ranks. OSError (storage down) is raised: it says nothing about the case, and the run must stop rather than
    train without it.
    """
    # The split deals rows to ranks in turn (`stream.OrderedSplit`), so item n belongs to share n mod W. Only whole
    # turns are grouped; the rest gets a table each, so that the next window begins with the rank whose turn it is.
    whole = len(items) - len(items) % world_size
    shares = [range(rank, whole, world_size) for rank in range(world_size)] if whole else []
    shared = len(shares)
    shares += [range(one, one + 1) for one in range(whole, len(items))]
    cases = {case.id if case else "": case for _, case in items}
    names = list(cases)
    # With few ranks a share holds many cases. Rounds bound the memory on both sides to the boxes of about W cases.
    rounds = max(1, len(names) // world_size) if whole else 1
    waiting: list[list[CaseBox]] = [[] for _ in shares]
    for left in reversed(range(rounds)):
        for name in names[len(names) * (rounds - 1 - left) // rounds : len(names) * (rounds - left) // rounds]:
            prepared = load(source, cases[name])
            for share, boxes in zip(shares, waiting, strict=True):
                wanted = [s for s, case in (items[n] for n in share) if (case.id if case else "") == name]
                boxes += bounding_boxes(prepared, name, wanted, patch_spec) if wanted else []
        for boxes in waiting[:shared]:
            yield encode(boxes, patch_spec.size_zyx, left, buffer)
            boxes.clear()
    for boxes in waiting[shared:]:
        yield encode(boxes, patch_spec.size_zyx, 0, buffer)


def load(source: Source, case: Case | None) -> Prepared | str:
    """The prepared case, or the reason why there is none; "" for padding, which has no case."""
    if case is None:
        return ""
    try:
        return source.load(case)
    except InvalidCase as error:
        return f"{error.reason}: {error.detail}"


def bounding_boxes(
    prepared: Prepared | str, case_id: str, samples: list[Sample], patch_spec: PatchSpec
) -> list[CaseBox]:
    """The bounding box of these patches of a case; a box for each where the common one would be larger than all."""
    if isinstance(prepared, str):
        return [CaseBox(case_id, [(sample, (0, 0, 0)) for sample in samples], prepared)]
    size, share = np.array(patch_spec.size_zyx), patch_spec.foreground_share
    origins = [np.array(patch_origin(prepared, sample, patch_spec.size_zyx, share)) for sample in samples]
    separately = prod(size) * len(samples)
    low, high = np.min(origins, axis=0), np.max(origins, axis=0) + size
    if len(samples) > 1 and prod(np.minimum(high, prepared.image_czyx.shape[1:]) - low) > separately:
        return [box for sample in samples for box in bounding_boxes(prepared, case_id, [sample], patch_spec)]
    inside = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))  # NumPy clips it to the case
    assert prepared.label_zyx is not None, "training cases are labelled; the manifest saw to it"
    within = [(sample, triple(origin - low)) for sample, origin in zip(samples, origins, strict=True)]
    image, label = prepared.image_czyx[(slice(None), *inside)], prepared.label_zyx[inside]
    return [CaseBox(case_id, within, "", triple(high - low), image, label, prepared.mean, prepared.std)]


def encode(boxes: list[CaseBox], size_zyx: Triple, left: int, buffer: Buffer | None = None) -> pa.Table:
    """One row: a JSON description, and all voxels as one run of bytes, because dtypes differ between cases.

    `left`: how many tables of the same window follow for this rank.
    """
    parts: list[dict[str, Any]] = []
    arrays: list[tuple[int, Triple, npt.NDArray[Any]]] = []
    total = 0
    for box in boxes:
        about: dict[str, Any] = {"case_id": box.case_id, "reason": box.reason, "mean": box.mean, "std": box.std}
        about["patches"] = [[sample.position, sample.seed, origin] for sample, origin in box.samples]
        if box.image_czyx is not None and box.label_zyx is not None:
            about |= {"dtype": box.image_czyx.dtype.name, "shape": (4, *box.shape_zyx), "at": total}
            for array in (*box.image_czyx, box.label_zyx):
                arrays.append((total, box.shape_zyx, array))
                total += prod(box.shape_zyx) * array.itemsize
            total = -(-total // 64) * 64  # a box begins at a multiple of every item size, so that `view` works
        parts.append(about)
    voxels = (buffer or Buffer()).take(total)
    for at, shape, array in arrays:
        _fill(_array(voxels, at, array.dtype, shape), array)
    about_all = json.dumps({"left": left, "size_zyx": size_zyx, "parts": parts})
    return pa.table({"about": [about_all], "voxels": binary_column(voxels)})


def decode(table: pa.Table) -> tuple[int, list[Patch]]:
    """(How many tables of the same window follow for this rank, the patches in this one); views into the table."""
    about = json.loads(table.column("about")[0].as_py())
    voxels = binary_value(table, "voxels", np.uint8)
    size = tuple(about["size_zyx"])
    patches: list[Patch] = []
    for part in about["parts"]:
        name, reason = part["case_id"], part["reason"]
        if "at" not in part:
            patches += [empty_patch(position, seed, name, reason, size) for position, seed, _ in part["patches"]]
            continue
        image = _array(voxels, part["at"], np.dtype(part["dtype"]), part["shape"])
        label = _array(voxels, part["at"] + image.nbytes, np.dtype(np.uint8), part["shape"][1:])
        mean, std = np.array(part["mean"], np.float32), np.array(part["std"], np.float32)
        for position, seed, origin in part["patches"]:
            cropped = crop(image, origin, size), crop(label, origin, size)
            patches.append(Patch(position, seed, name, 1.0, "", *cropped, mean, std))
    return about["left"], patches


def _array(voxels: Any, at: int, dtype: Any, shape: Any) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = voxels[at : at + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    return array


def _fill(target: npt.NDArray[Any], array: npt.NDArray[Any]) -> None:
    """Copy an array to the beginning of a larger one; zeros behind it, since the buffer holds earlier voxels."""
    for axis, count in enumerate(array.shape):
        rest: list[slice] = [slice(None)] * array.ndim
        rest[axis] = slice(count, None)
        target[tuple(rest)] = 0
    np.copyto(target[tuple(slice(count) for count in array.shape)], array)
