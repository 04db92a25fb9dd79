"""Keep prepared cases where they are trained, so that each is read and decoded once. Runs in workers, in the reading
thread.

In: the sampler's rows of one rank, the cases, their source.
Out: the same patches of each row that the stream brings, bit for bit.

`SharedSource` keeps cases in memory that all processes of a machine share (tmpfs): the first that needs one decodes it
there. `resident_rows` keeps them on the device, too. A set that does not fit is no fault: what finds no room is read
again.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from raytrain_brats.augmentation import Cut
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase
from raytrain_brats.data.patch import CaseBox, Patch, ViewOf, crop, cut_of, decode, empty_patch, encode
from raytrain_brats.data.preprocess import Prepared, triple
from raytrain_brats.data.sampler import Sample
from raytrain_brats.data.store import Source, from_table, to_table
from raytrain_brats.data.turns import StreamSpec

SHARED = Path("/dev/shm")  # noqa: S108 - memory, and what is in it belongs to one user alone
_PREFIX, _USERS = "raytrain-brats-", "users"


@dataclass(frozen=True)
class SharedSource(Source):
    """A source that keeps what it has loaded below `folder`. Raises as `Source.load` does."""

    folder: str

    def load(self, case: Case) -> Prepared:
        name = hashlib.sha256((case.object_sha256 or case.sha256).encode()).hexdigest()[:32]
        path = Path(self.folder) / f"{name}.arrow"
        if not path.exists():
            prepared = super().load(case)
            with contextlib.suppress(OSError):  # no room: it is read again the next time
                _keep(path, to_table(prepared))
            return prepared
        return from_table(pa.ipc.open_file(pa.memory_map(str(path))).read_all())


def _keep(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        os.replace(temporary, path)  # two processes that decoded the same case write the same
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def shared_folder(identity: str, place: Path = SHARED) -> Iterator[Path]:
    """This data set's folder in shared memory, kept as long as a process is within, and by whoever was killed there:
    the next worker group goes on with it. Folders of other data sets that nobody uses any more are removed."""
    folder = _folder(identity, place)
    with _changing(place):
        for other in place.glob(f"{_PREFIX}{os.getuid()}-*"):
            if other != folder:
                _remove_unused(other)
        folder.mkdir(mode=0o700, exist_ok=True)
        users = os.open(folder / _USERS, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(users, fcntl.LOCK_SH)
    try:
        yield folder
    except BaseException:
        os.close(users)
        raise
    os.close(users)
    with _changing(place):
        _remove_unused(folder)


def leave(identity: str, place: Path = SHARED, patience_s: float = 3.0) -> None:
    """For a run that ended before its stream did: remove the folder once all of this machine have left it."""
    until = time.monotonic() + patience_s
    while (folder := _folder(identity, place)).exists():
        with _changing(place):
            _remove_unused(folder)
        if time.monotonic() > until:
            return
        time.sleep(0.1)


def kept_bytes(identity: str, place: Path = SHARED) -> int:
    """What a data set takes of shared memory already: a worker group that was killed left it."""
    with contextlib.suppress(FileNotFoundError):  # another process removes it just now
        return sum(file.stat().st_size for file in _folder(identity, place).glob("*.arrow"))
    return 0


def _folder(identity: str, place: Path) -> Path:
    return place / f"{_PREFIX}{os.getuid()}-{identity}"


def _changing(place: Path) -> FileLock:
    """Nobody removes a folder while another enters it."""
    return FileLock(place / f"{_PREFIX}{os.getuid()}.lock")


def _remove_unused(folder: Path) -> None:
    with contextlib.suppress(OSError):  # in use, or another has removed it
        users = os.open(folder / _USERS, os.O_RDWR)
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(users)


@dataclass(frozen=True)
class _Kept:
    """A case on the device, padded so that every patch lies within; or why there is none."""

    reason: str
    image_czyx: Any = None
    label_zyx: Any = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    cut: Callable[[Sample], Cut] | None = None


def resident_rows(
    spec: StreamSpec, rank: int, world_size: int, place: Callable[[Any], ViewOf]
) -> Iterator[tuple[int, list[Patch]]]:
    """(`until`, patches) of each row of a rank, as `rank_rows`; their voxels are views of cases that stay on the
    device, where `place` brings each once."""
    kept: dict[int, _Kept] = {}
    for turn in spec.sampler.turns(spec.step, world_size, 1):
        row = spec.sampler.row(spec.step, turn, rank, world_size, 1)
        patches: list[Patch] = []
        for index, samples in row.cases:
            if index not in kept:
                kept[index] = _placed(spec, spec.cases[index], place)
            patches += [_patch(kept[index], spec.cases[index].id, sample, spec) for sample in samples]
        yield row.until, patches


def _placed(spec: StreamSpec, case: Case, place: Callable[[Any], ViewOf]) -> _Kept:
    try:
        prepared = spec.source.load(case)
    except InvalidCase as error:
        return _Kept(f"{error.reason}: {error.detail}")
    assert prepared.label_zyx is not None, "training cases are labelled; the manifest saw to it"
    size = spec.patch_spec.size_zyx
    shape = triple(np.maximum(prepared.label_zyx.shape, size))
    whole = (Sample(0, 0, 0, 0), Cut((0, 0, 0), shape))
    box = CaseBox(case.id, [whole], "", shape, prepared.image_czyx, prepared.label_zyx, prepared.mean, prepared.std)
    _, (patch,) = decode(encode([box], shape, 0), place)
    nothing = np.broadcast_to(np.zeros(1, np.int16), prepared.image_czyx.shape)
    light = replace(prepared, image_czyx=nothing, label_zyx=None, native_label_xyz=None)
    light = replace(light, foreground=prepared.foreground.copy())  # no view, which would hold the whole case
    cut = partial(cut_of, light, patch_spec=spec.patch_spec)
    return _Kept("", patch.image_czyx, patch.label_zyx, prepared.mean, prepared.std, cut)


def _patch(kept: _Kept, case_id: str, sample: Sample, spec: StreamSpec) -> Patch:
    if kept.cut is None:
        return empty_patch(sample.position, sample.seed, case_id, kept.reason, spec.patch_spec.size_zyx)
    cut = kept.cut(sample)
    cropped = crop(kept.image_czyx, cut.low, cut.shape), crop(kept.label_zyx, cut.low, cut.shape)
    return Patch(sample.position, sample.seed, case_id, 1.0, "", *cropped, kept.mean, kept.std, cut.start)
