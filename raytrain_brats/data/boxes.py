"""Pack the patches of one window of positions for the ranks they go to, and unpack them there.

In: the samples of a window, their cases and source, the number of ranks.
Out: one-row Arrow tables that the ranks take in turn; on the rank the `Patch`es again, as views into the table.

Patches of one case overlap: four of 128^3 are 76 MB, the brain they were cut from is 28. So what travels to a rank is
the part of each case that its patches cover, once, and the rank cuts them where it needs them: one hop and a third of
the bytes (measured in docs/benchmarks/data.md).
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
from raytrain_brats.data.patch import Patch, Triple, empty_patch, place, window
from raytrain_brats.data.preprocess import Prepared
from raytrain_brats.data.sampler import Sample
from raytrain_brats.data.store import Source, binary_column, binary_value

Item = tuple[Sample, Case | None]


@dataclass(frozen=True)
class PatchSpec:
    """How patches are cut; travels with every read task, so it is small."""

    patch_xyz: Triple
    foreground_share: float

    @property
    def size_zyx(self) -> Triple:
        x, y, z = self.patch_xyz
        return z, y, x


class Buffer:
    """Memory that one parcel after the other is put together in: fresh pages cost more than the copying."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, count: int) -> npt.NDArray[np.uint8]:
        """`count` bytes; those taken before are overwritten."""
        if count > len(self._bytes):
            self._bytes = np.empty(count, np.uint8)
        return self._bytes[:count]


@dataclass(frozen=True)
class Piece:
    """Part of a case, and the patches in it as (sample, where in the part it begins)."""

    case_id: str
    samples: list[tuple[Sample, Triple]]
    reason: str = ""
    """Why there are no voxels: the patches are of weight zero."""
    shape_zyx: Triple = (0, 0, 0)
    """Of the part; the arrays are smaller where it reaches behind the end of the case: there is nothing, so zeros."""
    image_czyx: npt.NDArray[Any] | None = None
    label_zyx: npt.NDArray[np.uint8] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def parcels(
    source: Source, items: list[Item], patch_spec: PatchSpec, world_size: int, buffer: Buffer | None = None
) -> Iterator[pa.Table]:
    """Tables for the ranks in turn: the first is for the rank of the first item, the next for the next rank.

    All ranks get equally many tables with equally many items; then come the items that are left when they do not
    divide by the ranks, a table each. With few ranks a window goes in several rounds, case by case, so that neither
    side holds more at a time than it must. Each case is loaded once. A table in `buffer` holds until the next is
    asked for.

    Total over bad cases: Refused becomes patches of weight zero. OSError (storage down) is raised: that is no property
    of the case, and the run must stop rather than train without it.
    """
    whole = len(items) - len(items) % world_size
    shares = [range(rank, whole, world_size) for rank in range(world_size)] if whole else []
    shared = len(shares)
    shares += [range(one, one + 1) for one in range(whole, len(items))]
    cases = {case.id if case else "": case for _, case in items}
    names = list(cases)
    rounds = max(1, len(names) // world_size) if whole else 1
    waiting: list[list[Piece]] = [[] for _ in shares]
    for left in reversed(range(rounds)):
        for name in names[len(names) * (rounds - 1 - left) // rounds : len(names) * (rounds - left) // rounds]:
            prepared = load(source, cases[name])
            for share, pieces in zip(shares, waiting, strict=True):
                wanted = [s for s, case in (items[n] for n in share) if (case.id if case else "") == name]
                pieces += cover(prepared, name, wanted, patch_spec) if wanted else []
        for pieces in waiting[:shared]:
            yield pack(pieces, patch_spec.size_zyx, left, buffer)
            pieces.clear()
    for pieces in waiting[shared:]:
        yield pack(pieces, patch_spec.size_zyx, 0, buffer)


def load(source: Source, case: Case | None) -> Prepared | str:
    """The prepared case, or why it has none; padding has no case and needs no reason."""
    if case is None:
        return ""
    try:
        return source.load(case)
    except InvalidCase as error:
        return f"{error.reason}: {error.detail}"


def cover(prepared: Prepared | str, case_id: str, samples: list[Sample], patch_spec: PatchSpec) -> list[Piece]:
    """Pieces of a case that hold these patches: one around all of them, unless that is more than the patches are."""
    if isinstance(prepared, str):
        return [Piece(case_id, [(sample, (0, 0, 0)) for sample in samples], prepared)]
    size, share = np.array(patch_spec.size_zyx), patch_spec.foreground_share
    starts = [np.array(place(prepared, sample, patch_spec.size_zyx, share)) for sample in samples]
    apart = prod(size) * len(samples)
    low, high = np.min(starts, axis=0), np.max(starts, axis=0) + size
    if len(samples) > 1 and prod(np.minimum(high, prepared.image_czyx.shape[1:]) - low) > apart:
        return [piece for sample in samples for piece in cover(prepared, case_id, [sample], patch_spec)]
    inside = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))  # up to the end of the box
    assert prepared.label_zyx is not None, "training cases are labelled; the manifest saw to it"
    within = [(sample, _triple(start - low)) for sample, start in zip(samples, starts, strict=True)]
    image, label = prepared.image_czyx[(slice(None), *inside)], prepared.label_zyx[inside]
    return [Piece(case_id, within, "", _triple(high - low), image, label, prepared.mean, prepared.std)]


def pack(pieces: list[Piece], size_zyx: Triple, left: int, buffer: Buffer | None = None) -> pa.Table:
    """One row: what is in it as JSON, and all voxels in one run of bytes, as dtypes differ from case to case."""
    parts: list[dict[str, Any]] = []
    arrays: list[tuple[int, Triple, npt.NDArray[Any]]] = []
    total = 0
    for piece in pieces:
        about: dict[str, Any] = {"case_id": piece.case_id, "reason": piece.reason, "mean": piece.mean, "std": piece.std}
        about["patches"] = [[sample.position, sample.seed, start] for sample, start in piece.samples]
        if piece.image_czyx is not None and piece.label_zyx is not None:
            about |= {"dtype": piece.image_czyx.dtype.name, "shape": (4, *piece.shape_zyx), "at": total}
            for array in (*piece.image_czyx, piece.label_zyx):
                arrays.append((total, piece.shape_zyx, array))
                total += prod(piece.shape_zyx) * array.itemsize
            total = -(-total // 64) * 64
        parts.append(about)
    voxels = (buffer or Buffer()).take(total)
    for at, shape, array in arrays:
        _fill(_array(voxels, at, array.dtype, shape), array)
    about_all = json.dumps({"left": left, "size_zyx": size_zyx, "parts": parts})
    return pa.table({"about": [about_all], "voxels": binary_column(voxels)})


def unpack(table: pa.Table) -> tuple[int, list[Patch]]:
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
        for position, seed, start in part["patches"]:
            voxels_here = window(image, start, size), window(label, start, size)
            patches.append(Patch(position, seed, name, 1.0, "", *voxels_here, mean, std))
    return about["left"], patches


def _array(voxels: Any, at: int, dtype: Any, shape: Any) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = voxels[at : at + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    return array


def _fill(place: npt.NDArray[Any], array: npt.NDArray[Any]) -> None:
    """Copy an array to the beginning of a larger one; zeros behind it."""
    for axis, count in enumerate(array.shape):
        rest: list[slice] = [slice(None)] * array.ndim
        rest[axis] = slice(count, None)
        place[tuple(rest)] = 0
    np.copyto(place[tuple(slice(count) for count in array.shape)], array)


def _triple(values: Any) -> Triple:
    z, y, x = (int(v) for v in values)
    return z, y, x
