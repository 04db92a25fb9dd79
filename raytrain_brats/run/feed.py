"""Bring a rank's patches of each step to its device while the ones before are trained. Runs in a worker.

In: the rows of Ray Data, or the cases themselves.
Out: an iterator over steps; voxels are tensors on the device, on a CPU views of shared memory.

A thread reads. On a GPU it makes one copy a row: into pinned memory, which alone a GPU copies from without the
processor, and from there by a stream of its own, beside the kernels of training. It waits for that copy, so whoever
gets a patch has it.

Where cases stay (`data.residency`) changes who reads them, not which patches come: all ranks choose alike, as Ray Data
deals rows to all or to none.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from raytrain_brats.data import resident
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.patch import Patch, ViewOf, decode
from raytrain_brats.data.sampler import draw, fingerprint
from raytrain_brats.data.turns import StreamSpec, rank_rows, rank_steps, read_ahead, tables
from raytrain_brats.learn.batch import Batch, DeviceSample
from raytrain_brats.run import journal
from raytrain_brats.run.rank import Rank
from raytrain_brats.run.spec import RunSpec

KINDS = ("stream", "host", "device")
"""Of residency; where ranks have room for different ones, all take the first."""
DEVICE_SHARE, HOST_SHARE = 0.25, 0.5
"""Of a GPU's memory and of the free shared memory, which a whole training set may take: the network needs the rest."""
TRIED = 8
"""Cases that are looked at for a size; invalid ones have none."""


def open_steps(
    spec: RunSpec,
    step: int,
    rank: Rank,
    prefetch: int,
    cases: Callable[[], tuple[Case, ...]],
    share: Callable[[], Any],
) -> Iterator[list[Patch]]:
    """The rank's patches of each step from `step` on; `share` opens its part of Ray Data's stream, which is not asked
    for where cases stay. A collective."""
    sampler, size, place = spec.sampler, spec.patch_spec.size_zyx, (rank.number, rank.world_size)
    if step == sampler.steps:
        return iter(())
    asked = spec.config.data.residency
    kind = _choose(spec, rank, cases) if asked == "auto" else asked
    if rank.number == 0:
        journal.event(spec.run_dir, "residency", where=kind, asked=asked)
    make: Callable[[], Iterator[tuple[int, list[Patch]]]]
    if kind == "stream":
        make = lambda: rank_rows(share(), sampler, Uploader(rank.device))  # noqa: E731
    else:
        whole = StreamSpec(sampler, cases(), spec.source, spec.patch_spec, step, 0)
        make = lambda: resident_rows(whole, spec.dataset_identity, rank, kind)  # noqa: E731
    return rank_steps(read_ahead(make, prefetch), sampler, size, step, *place)


def resident_rows(
    spec: StreamSpec, identity: str, rank: Rank, kind: str, shared: Any = resident.SHARED
) -> Iterator[tuple[int, list[Patch]]]:
    """(`until`, patches) of each row of the rank, of cases that its machine or its device keeps."""
    uploader, place = Uploader(rank.device), (rank.number, rank.world_size)
    with resident.shared_folder(identity, shared) as folder:
        source = resident.SharedSource(spec.source.root, spec.source.convention, spec.source.spacing_mm, str(folder))
        spec = replace(spec, source=source)
        if kind == "device":
            yield from resident.resident_rows(spec, *place, uploader)
        else:
            for table in tables(spec, *place):
                yield decode(table, uploader)


def _choose(spec: RunSpec, rank: Rank, cases: Callable[[], tuple[Case, ...]]) -> str:
    """What all ranks have room for; without a GPU the page cache keeps the files as well as anything could."""
    if rank.device.type != "cuda":
        return "stream"
    wanted = _set_bytes(spec, cases())
    free, total = torch.cuda.mem_get_info(rank.device)
    kind = "stream"
    free_here = shutil.disk_usage(resident.SHARED).free + resident.kept_bytes(spec.dataset_identity)
    if 0 < wanted < HOST_SHARE * free_here:
        kind = "device" if wanted < min(DEVICE_SHARE * total, free) else "host"
    place = torch.tensor(KINDS.index(kind), device=rank.device)
    if rank.world_size > 1:
        distributed.all_reduce(place, distributed.ReduceOp.MIN)
    return KINDS[int(place)]


def _set_bytes(spec: RunSpec, cases: tuple[Case, ...]) -> int:
    """About what all training cases weigh, prepared, by one of them; 0 when none of the first can be read."""
    for case in cases[:TRIED]:
        with suppress(InvalidCase):
            prepared = spec.source.load(case)
            size: int = prepared.image_czyx.nbytes + prepared.image_czyx[0].size
            return 5 * len(cases) * size // 4
    return 0


class Uploader:
    """Places rows on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, voxels: npt.NDArray[np.uint8]) -> ViewOf:
        """What gives tensors of these bytes; they stay as long as one of the tensors does."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # read-only memory: nobody writes to a patch
            here = torch.from_numpy(voxels)
        there = self._to_device(here) if self._stream else here.to(self._device)

        def view(at: int, dtype: str, shape: Sequence[int]) -> Tensor:
            kind: torch.dtype = getattr(torch, dtype)
            return there[at : at + prod(shape) * kind.itemsize].view(kind).view(tuple(shape))

        return view

    def _to_device(self, here: Tensor) -> Tensor:
        assert self._stream
        if here.numel() > self._staging.numel():
            self._staging = torch.empty(here.numel() * 5 // 4, dtype=torch.uint8, pin_memory=True)
        staged = self._staging[: here.numel()].copy_(here)
        with torch.cuda.stream(self._stream):
            there = staged.to(self._device, non_blocking=True)
        # The training's stream will read it: its memory is not given out again before that stream has done so.
        there.record_stream(torch.cuda.default_stream(self._device))
        self._stream.synchronize()
        return there


def tensor(array: Any, device: torch.device) -> Tensor:
    """The voxels of a patch on the device; those of an empty patch are NumPy's."""
    if isinstance(array, Tensor):
        return array
    if array.any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.from_numpy(array).to(device)
    return torch.zeros((1,), dtype=getattr(torch, array.dtype.name), device=device).expand(array.shape)


def batch_of(patches: list[Patch], samples_seen: int, device: torch.device) -> Batch:
    """A rank's patches of one step as the network's side wants them. Nothing is copied: voxels are where they train."""
    samples = tuple(
        DeviceSample(
            place=p.position - samples_seen,
            image_czyx=tensor(p.image_czyx, device),
            label_zyx=tensor(p.label_zyx, device),
            mean_c=p.mean,
            std_c=p.std,
            weight=p.weight,
            draws=partial(draw, p.seed),
            start_zyx=p.start_zyx,
        )
        for p in patches
    )
    bad = sum(bool(p.reason) for p in patches)
    return Batch(samples, bad, sum(fingerprint(p.position, p.case_id, p.seed) for p in patches))
