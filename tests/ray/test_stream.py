"""The stream through a real Ray: the same patches by either route at any number of ranks, in bounded memory."""

import dataclasses
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from raytrain_brats import books, messages
from raytrain_brats.cases.scan import open_manifest
from raytrain_brats.data import stream
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.patch import Patch, PatchSpec
from raytrain_brats.data.preprocess import Prepared, preprocess
from raytrain_brats.data.sampler import Sampler
from raytrain_brats.data.store import Source, put
from raytrain_brats.data.stream import OrderedSplit, dataset
from raytrain_brats.data.turns import StreamSpec, rank_rows, rank_steps, read_ahead
from raytrain_brats.monitoring.spilling import Spilling
from raytrain_brats.ray_ext import cluster
from raytrain_brats.ray_ext.internals.core import spilled_bytes
from tests.support.cases import make_volume, write_msd_folder
from tests.support.clusters import Meter
from tests.support.steps import equal

STORE_BYTES = 100_000_000
CUTTING = PatchSpec((16, 14, 12), 0.5)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """One Ray for all tests here: its start takes most of their time."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_ADDRESS", "local")
    patch.setattr(cluster, "STORE_BYTES_PER_CPU", STORE_BYTES // 2)
    cluster.connect(local_cpus=2)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests
    yield
    ray.shutdown()
    patch.undo()


def copied(patch: Patch) -> Patch:
    """The patch with arrays of its own: a view keeps the whole table in the object store."""
    return dataclasses.replace(patch, image_czyx=patch.image_czyx.copy(), label_zyx=patch.label_zyx.copy())


def spec(sampler: Sampler, cases: tuple[Case, ...], source: Source, step: int, patch_spec: PatchSpec = CUTTING) -> Any:
    return StreamSpec(sampler, cases, source, patch_spec, step, STORE_BYTES)


def taken(streamed: StreamSpec, rank: int, world_size: int, shares: list[dict[str, Any]]) -> Any:
    """A rank's patches by step, read as a worker reads them."""
    share = shares[rank][stream.group_name(stream.group_of(rank, world_size))]
    rows = read_ahead(lambda: rank_rows(share, streamed.sampler), 1)
    return rank_steps(rows, streamed.sampler, streamed.patch_spec.size_zyx, streamed.step, rank, world_size)


def shares_of(streamed: StreamSpec, world_size: int) -> list[dict[str, Any]]:
    made = {stream.group_name(g): dataset(streamed, 0.5, 2) for g in range(stream.groups(world_size))}
    return OrderedSplit().configure(made, world_size)


def streamed(streamed: StreamSpec, world_size: int) -> list[list[list[Patch]]]:
    """Of each rank the patches of each step, all ranks reading at the same time."""
    shares = shares_of(streamed, world_size)
    ranks: list[list[list[Patch]]] = [[] for _ in shares]

    def read(rank: int) -> None:
        for mine in taken(streamed, rank, world_size, shares):
            ranks[rank].append([copied(patch) for patch in mine])

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return ranks


def flat(steps: list[list[Patch]]) -> list[Patch]:
    return [patch for mine in steps for patch in mine]


def test_both_routes_give_the_same_patches_through_ray_at_any_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step's positions reach their ranks: bit for bit the same voxels from .nii.gz and from the store, one rank or
    three, one dataset or two, over many executions, with a refused case as patches of weight zero in their places."""
    manifest = open_manifest(str(write_msd_folder(tmp_path / "msd", 5, varied=True)))
    raw, home = Source(manifest.root, manifest.convention, 1.0), str(tmp_path / "store")
    stored = tuple(put(home, raw, case, {"spacing_mm": 1.0}) for case in manifest.cases)
    lost = stored[2].object
    stored = tuple(dataclasses.replace(c, object="gone.parquet") if c.object == lost else c for c in stored)
    sampler = Sampler(seed=1, cases=5, global_batch=4, patches_per_case=2, epochs=4)
    (alone,) = streamed(spec(sampler, manifest.cases, raw, 1), 1)
    short = {"segment_tasks": 2, "task_cases": (2, 2)}
    by_raw = streamed(dataclasses.replace(spec(sampler, manifest.cases, raw, 1), **short), 3)
    monkeypatch.setattr(stream, "GROUP_RANKS", 2)
    by_store = streamed(dataclasses.replace(spec(sampler, stored, Source(home, raw.convention, 1.0), 1), **short), 3)

    patches = {patch.position: patch for mine in alone for patch in mine}
    assert list(patches) == list(range(4, sampler.total))
    for rank in range(3):
        wanted = [list(sampler.rank_positions(step, rank, 3)) for step in range(1, sampler.steps)]
        assert [[p.position for p in mine] for mine in by_raw[rank]] == wanted
        assert [[p.position for p in mine] for mine in by_store[rank]] == wanted
        for one, other in zip(flat(by_raw[rank]), flat(by_store[rank]), strict=True):
            assert equal(one, patches[one.position])
            if other.reason:
                assert other.reason.startswith("missing: gone.parquet")
                assert (other.weight, other.case_id, other.seed) == (0, manifest.cases[2].id, one.seed)
            else:
                assert equal(one, other)
    assert sum(bool(patch.reason) for share in by_store for mine in share for patch in mine) == sum(
        sampler.sample(position).case == 2 for position in range(4, sampler.total)
    )


def test_executions_that_are_empty_for_some_ranks_hold_none_up(tmp_path: Path) -> None:
    """Fewer cases than a step shows, ranks that do not divide it: of the last execution two of four ranks get nothing,
    and of a run that goes on at its last step two get nothing at all."""
    manifest = open_manifest(str(write_msd_folder(tmp_path, 3)))
    sampler = Sampler(seed=1, cases=3, global_batch=5, patches_per_case=2, epochs=2)
    source = Source(manifest.root, manifest.convention, 1.0)
    for step, executions in ((1, 2), (sampler.steps - 1, 1)):
        short = dataclasses.replace(spec(sampler, manifest.cases, source, step), segment_tasks=2, task_cases=(2, 2))
        assert len(sampler.turns(step, 4, 1)) == executions
        for rank, found in enumerate(streamed(short, 4)):
            wanted = [list(sampler.rank_positions(now, rank, 4)) for now in range(step, sampler.steps)]
            assert [[patch.position for patch in mine] for mine in found] == wanted


def test_more_ranks_than_one_coordinator_serves_get_two(tmp_path: Path) -> None:
    """Each rank has a share of its own group's dataset; rank 0 of both, as Ray ends those executions only."""
    cases = (Case("a", "a", (), None, 0),)
    sampler = Sampler(seed=0, cases=1, global_batch=40, patches_per_case=1, epochs=1)
    shares = shares_of(spec(sampler, cases, Source(str(tmp_path), "msd", 1.0), 0), 40)
    had = [{name for name, share in mine.items() if share is not None} for mine in shares]
    assert had == [{"train-0", "train-1"}, *[{"train-0"}] * 19, *[{"train-1"}] * 20]
    assert len({id(share) for mine in shares for share in mine.values() if share is not None}) == 40


@dataclasses.dataclass(frozen=True)
class Endless(Source):
    """Cases of nine bytes a voxel that leave a mark on disk when they are loaded."""

    marks: str
    edge: int

    def load(self, case: Case) -> Prepared:
        Path(self.marks, f"{time.time_ns()}").touch()
        small = preprocess(make_volume(seed=1), 1.0)
        image = np.zeros((4, self.edge, self.edge, self.edge), np.int16)
        label = np.ones((self.edge, self.edge, self.edge), np.uint8)
        return dataclasses.replace(small, image_czyx=image, label_zyx=label, foreground_counts=())


@pytest.mark.parametrize(("world_size", "edge"), [pytest.param(1, 80, marks=pytest.mark.campaign), (8, 48)])
def test_a_slow_trainer_holds_the_stream_back(tmp_path: Path, world_size: int, edge: int) -> None:
    """While nobody takes patches, loading stops before the object store is full, nothing goes to disk, and Ray Data's
    loop rests (it would turn without a pause); afterwards the stream goes on where it stood."""
    cases = tuple(Case(str(n), str(n), (), None, 0) for n in range(400))
    sampler = Sampler(seed=0, cases=400, global_batch=world_size, patches_per_case=4, epochs=1)
    before = spilled_bytes()
    source, patch_spec = Endless("", "msd", 1.0, str(tmp_path), edge), PatchSpec((edge - 16,) * 3, 0.0)
    streamed = spec(sampler, cases, source, 0, patch_spec)
    shares = shares_of(streamed, world_size)
    ranks = [taken(streamed, rank, world_size, shares) for rank in range(world_size)]
    try:
        for step in range(3):
            assert sum(len(next(rank)) for rank in ranks) == world_size, step
        seen, calm = -1, 0
        for _ in range(60):  # until nothing was loaded for three seconds
            time.sleep(0.5)
            now = len(list(tmp_path.iterdir()))
            calm, seen = (calm + 1 if now == seen else 0), now
            if calm == 6:
                break
        assert calm == 6, f"still loading after {seen} cases"
        with Meter() as meter:
            begun = time.monotonic()
            time.sleep(4)
        assert 0 < meter.spent(begun, begun + 4)["SplitCoordinator"] < 2.4
        assert seen < 200, "half of the cases, which do not fit the object store together"
        assert spilled_bytes() == before
        for step in range(3, 3 + 800 // world_size):
            positions = sorted(patch.position for rank in ranks for patch in next(rank))
            assert positions == list(range(step * world_size, (step + 1) * world_size))
        assert len(list(tmp_path.iterdir())) > seen
        assert spilled_bytes() == before
    finally:
        for rank in ranks:
            rank.close()


def test_spilling_is_told_with_its_remedy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Objects that do not fit go to disk: a warning and an event say how much and what to do; before that, nothing."""
    messages.show()
    held = []
    with Spilling(str(tmp_path), every_s=0.2):
        time.sleep(1)
        assert not list(books.read_events(str(tmp_path)))
        for _ in range(8):
            held.append(ray.put(np.ones(20_000_000, np.uint8)))
        deadline = time.monotonic() + 60
        while not books.read_events(str(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.2)
    event, *_ = books.read_events(str(tmp_path))
    assert event["event"] == "spilling"
    assert event["bytes"] > 0
    assert "object-store-memory" in event["remedy"]
    assert "to disk" in capfd.readouterr().err
