"""The stream through a real Ray: the same patches by either route, in turn to the ranks, in bounded memory."""

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

from raytrain_brats import messages
from raytrain_brats.cases.scan import open_manifest
from raytrain_brats.data.boxes import PatchSpec
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.patch import Patch
from raytrain_brats.data.preprocess import Prepared, preprocess
from raytrain_brats.data.sampler import Sampler
from raytrain_brats.data.store import Source, put
from raytrain_brats.data.stream import OrderedSplit, dataset, patches
from raytrain_brats.ray_ext import cluster
from raytrain_brats.ray_ext.internals.core import spilled_bytes
from raytrain_brats.run import journal
from raytrain_brats.run.spilling import Spilling
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


def streamed(made: Any, world_size: int) -> list[list[Patch]]:
    """What each rank receives in one execution, all ranks reading at the same time."""
    shares = OrderedSplit().configure({"train": made}, world_size)
    ranks: list[list[Patch]] = [[] for _ in shares]

    def read(rank: int) -> None:
        ranks[rank] += (copied(patch) for patch in patches(shares[rank]["train"], 2))

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return ranks


def test_both_routes_give_the_same_patches_through_ray_at_any_number_of_ranks(tmp_path: Path) -> None:
    """Rank r gets positions r, r + W ...: bit for bit the same voxels from .nii.gz and from the store, one rank or
    three, with a refused case as rows of weight zero in their places."""
    manifest = open_manifest(str(write_msd_folder(tmp_path / "msd", 5, varied=True)))
    raw, home = Source(manifest.root, manifest.convention, 1.0), str(tmp_path / "store")
    stored = tuple(put(home, raw, case, {"spacing_mm": 1.0}) for case in manifest.cases)
    lost = stored[2].object
    stored = tuple(dataclasses.replace(c, object="gone.parquet") if c.object == lost else c for c in stored)
    sampler = Sampler(seed=1, cases=5, global_batch=4, patches_per_case=2, window_cases=2, epochs=2)
    routes = [(raw, manifest.cases), (Source(home, raw.convention, 1.0), stored)]
    by_raw, by_store = [streamed(dataset(sampler, cases, source, CUTTING, 4, 0.5, 2), 3) for source, cases in routes]
    (alone,) = streamed(dataset(sampler, manifest.cases, raw, CUTTING, 4, 0.5, 1), 1)

    assert [patch.position for patch in alone] == list(range(4, sampler.total))
    for rank in range(3):
        wanted = list(range(4 + rank, sampler.total, 3))
        assert [p.position for p in by_raw[rank]] == [p.position for p in by_store[rank]] == wanted
        for one, other in zip(by_raw[rank], by_store[rank], strict=True):
            assert equal(one, alone[one.position - 4])
            if other.reason:
                assert other.reason.startswith("missing: gone.parquet")
                assert (other.weight, other.case_id, other.seed) == (0, manifest.cases[2].id, one.seed)
            else:
                assert equal(one, other)
    assert sum(bool(patch.reason) for share in by_store for patch in share) == sum(
        sampler.sample(position).case == 2 for position in range(4, sampler.total)
    )


@dataclasses.dataclass(frozen=True)
class Endless(Source):
    """Cases of 4 MB that leave a mark on disk when they are loaded."""

    marks: str

    def load(self, case: Case) -> Prepared:
        Path(self.marks, f"{time.time_ns()}").touch()
        small = preprocess(make_volume(seed=1), 1.0)
        image = np.zeros((4, 80, 80, 80), np.int16)
        label = np.ones((80, 80, 80), np.uint8)
        return dataclasses.replace(small, image_czyx=image, label_zyx=label, foreground_counts=())


def test_a_slow_trainer_holds_the_stream_back(tmp_path: Path) -> None:
    """While nobody takes patches, loading stops before the object store is full, nothing goes to disk, and Ray Data's
    loop rests (it would turn without a pause); afterwards the stream goes on where it stood."""
    cases = tuple(Case(str(n), str(n), (), None, 0) for n in range(400))
    sampler = Sampler(seed=0, cases=400, global_batch=1, patches_per_case=4, window_cases=2, epochs=1)
    before = spilled_bytes()
    made = dataset(sampler, cases, Endless("", "msd", 1.0, str(tmp_path)), PatchSpec((64, 64, 64), 0.0), 0, 0.5, 2)
    (share,) = OrderedSplit().configure({"train": made}, 1)
    stream = patches(share["train"], 2)
    assert next(stream).position == 0
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
    assert seen * 4.6e6 < STORE_BYTES
    assert spilled_bytes() == before
    assert [next(stream).position for _ in range(200)] == list(range(1, 201))
    assert len(list(tmp_path.iterdir())) > seen
    del stream, share, made


def test_spilling_is_told_with_its_remedy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Objects that do not fit go to disk: a warning and an event say how much and what to do; before that, nothing."""
    messages.show()
    held = []
    with Spilling(str(tmp_path), every_s=0.2):
        time.sleep(1)
        assert not list(journal.read_events(str(tmp_path)))
        for _ in range(8):
            held.append(ray.put(np.ones(20_000_000, np.uint8)))
        deadline = time.monotonic() + 60
        while not journal.read_events(str(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.2)
    event, *_ = journal.read_events(str(tmp_path))
    assert event["event"] == "spilling"
    assert event["bytes"] > 0
    assert "object-store-memory" in event["remedy"]
    assert "to disk" in capfd.readouterr().err
