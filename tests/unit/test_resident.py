"""Wherever cases stay, the same patches come; what is kept in shared memory is read once, and goes again."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytrain_brats.cases.scan import open_manifest
from raytrain_brats.data import resident
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.patch import Patch, PatchSpec, decode
from raytrain_brats.data.sampler import Sampler
from raytrain_brats.data.store import Source
from raytrain_brats.data.turns import StreamSpec, rank_steps, read_ahead, tables
from raytrain_brats.run.feed import Uploader, resident_rows
from raytrain_brats.run.rank import Rank
from tests.support.cases import write_msd_folder

CPU = torch.device("cpu")
SAMPLER = Sampler(seed=1, cases=5, global_batch=3, patches_per_case=2, epochs=2)
PATCH_SPEC = PatchSpec((40, 14, 12), 0.5, ((1, 2, 3), (2, 3), (3,)))  # wider than any case: padded


@pytest.fixture
def spec(tmp_path: Path) -> StreamSpec:
    """Five cases; one was cut off after its manifest was written."""
    manifest = open_manifest(str(write_msd_folder(tmp_path / "msd", 5, varied=True)))
    torn = Path(manifest.root) / manifest.cases[2].images[0]
    torn.write_bytes(torn.read_bytes()[:-40])
    return StreamSpec(SAMPLER, manifest.cases, Source(manifest.root, manifest.convention, 1.0), PATCH_SPEC, 0, 0)


def steps(spec: StreamSpec, rows: Any, rank: int, world_size: int) -> list[list[Patch]]:
    return list(rank_steps(rows, SAMPLER, PATCH_SPEC.size_zyx, spec.step, rank, world_size))


def same(a: Patch, b: Patch) -> bool:
    voxels = [(np.asarray(x.image_czyx), np.asarray(x.label_zyx)) for x in (a, b)]
    equal = all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(*voxels, strict=True))
    places = a.start_zyx == b.start_zyx and type(a.start_zyx) is type(b.start_zyx)
    rest = [(p.position, p.seed, p.case_id, p.weight, p.reason, tuple(p.mean), tuple(p.std)) for p in (a, b)]
    return equal and places and rest[0] == rest[1]


@pytest.mark.parametrize("kind", ["host", "device"])
@pytest.mark.parametrize(("world_size", "moved"), [(1, False), (2, False), (3, False), (2, True)])
def test_the_same_patches_come_wherever_cases_stay(
    spec: StreamSpec, tmp_path: Path, world_size: int, moved: bool, kind: str
) -> None:
    """Bit for bit what the stream brings, also amid a run, with padding and with an invalid case; also where patches
    are rotated and scaled, and so need other voxels than their own."""
    for step in (0, 3):
        spec = dataclasses.replace(spec, step=step, patch_spec=dataclasses.replace(PATCH_SPEC, moved=moved))
        for rank in range(world_size):
            streamed = steps(spec, map(decode, tables(spec, rank, world_size)), rank, world_size)
            rows = resident_rows(spec, "x", Rank(rank, world_size, CPU), kind, tmp_path)
            kept = steps(spec, rows, rank, world_size)
            assert any(patch.reason.startswith("changed") for mine in streamed for patch in mine) or world_size > 1
            shapes = {tuple(patch.label_zyx.shape) for mine in kept for patch in mine}
            assert moved == (len(shapes) > 1)
            for ours, theirs in zip(kept, streamed, strict=True):
                assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_each_case_is_read_once_a_machine(spec: StreamSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two ranks, over two epochs; where there is no room, as often as it is needed."""
    read: list[str] = []
    load = Source.load

    def counted(self: Source, case: Case) -> Any:
        read.append(case.id)
        return load(self, case)

    monkeypatch.setattr(Source, "load", counted)
    sound = [case.id for number, case in enumerate(spec.cases) if number != 2]
    with resident.shared_folder("x", tmp_path):
        for rank in range(2):
            steps(spec, resident_rows(spec, "x", Rank(rank, 2, CPU), "host", tmp_path), rank, 2)
    assert sorted(set(read) - {spec.cases[2].id}) == sound
    assert all(read.count(name) == 1 for name in sound)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resident, "_keep", full)
    read.clear()
    steps(spec, resident_rows(spec, "y", Rank(0, 1, CPU), "host", tmp_path), 0, 1)
    assert all(read.count(name) == 2 for name in sound)


def test_shared_memory_is_given_back(tmp_path: Path) -> None:
    """By the last that leaves. What somebody left who was killed stays for the next worker group of the same data, and
    goes when other data come."""
    with resident.shared_folder("a", tmp_path) as folder:
        with resident.shared_folder("a", tmp_path):
            pass
        assert folder.exists()
        with resident.shared_folder("b", tmp_path):
            assert folder.exists()
    assert not list(tmp_path.glob("*-a")) and not list(tmp_path.glob("*-b"))
    with pytest.raises(KeyboardInterrupt), resident.shared_folder("a", tmp_path):
        raise KeyboardInterrupt
    assert folder.exists()
    with resident.shared_folder("b", tmp_path):
        assert not folder.exists()


def test_a_run_that_ends_early_gives_it_back(spec: StreamSpec, tmp_path: Path) -> None:
    """Its stream is closed amid the rows; the folder goes once the reading thread has left, and not before."""
    rows = read_ahead(lambda: resident_rows(spec, "x", Rank(0, 1, CPU), "host", tmp_path), 1)
    for _ in range(3):
        next(rows)
    (folder,) = tmp_path.glob("*-x")
    assert resident.kept_bytes("x", tmp_path) >= 2 * min(file.stat().st_size for file in folder.glob("*.arrow"))
    resident.leave("x", tmp_path, patience_s=0.3)
    assert folder.exists()
    del rows
    resident.leave("x", tmp_path)
    assert not folder.exists() and resident.kept_bytes("x", tmp_path) == 0


def test_an_uploader_places_a_row_once() -> None:
    """On a CPU: no copy at all."""
    voxels = np.arange(64, dtype=np.uint8)
    view = Uploader(CPU)(voxels)
    assert view(8, "int16", (2, 2)).data_ptr() == voxels.ctypes.data + 8
    assert view(0, "uint8", (64,)).tolist() == voxels.tolist()
