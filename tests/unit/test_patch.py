"""A sample's patch depends on the sample alone, has its exact size, and no position ever goes missing."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.data import DataContext

from raytrain_brats.cases.scan import open_manifest
from raytrain_brats.data import stream
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase, Volume
from raytrain_brats.data.patch import Buffer, Patch, PatchSpec, bounding_boxes, decode, encode, patch_origin
from raytrain_brats.data.preprocess import Prepared, preprocess
from raytrain_brats.data.sampler import Sample, Sampler, draw
from raytrain_brats.data.store import Source, put
from raytrain_brats.data.stream import CaseDatasource
from raytrain_brats.data.turns import StreamSpec, rank_rows, rank_steps, read_ahead, tables
from tests.support.cases import make_volume, write_msd_folder
from tests.support.steps import equal

VOLUME = make_volume(seed=4)
LABEL = np.asarray(VOLUME.label_xyz)
# tumour at both ends of the box, so that centred patches run into every wall
PREPARED = preprocess(Volume(VOLUME.image_cxyz, np.maximum(LABEL, LABEL[::-1, ::-1, ::-1]), VOLUME.affine), 1.0)
BOX = PREPARED.image_czyx.shape[1:]


def cut(prepared: Prepared, sample: Sample, case_id: str, patch_xyz: Any, share: float) -> Patch:
    """The patch of one sample, through a table of its own."""
    patch_spec = PatchSpec(patch_xyz, share)
    left, (patch,) = decode(encode(bounding_boxes(prepared, case_id, [sample], patch_spec), patch_spec.size_zyx, 0))
    assert left == 0
    return patch


def place(patch: Patch) -> tuple[int, ...]:
    """Where in the box the patch was cut (found by its voxels, not by asking)."""
    size = patch.label_zyx.shape
    whole = np.pad(PREPARED.image_czyx, [(0, 0), *((0, max(0, s - b)) for s, b in zip(size, BOX, strict=True))])
    spots = np.ndindex(*(w - s + 1 for w, s in zip(whole.shape[1:], size, strict=True)))
    cuts = {p: whole[(slice(None), *(slice(a, a + s) for a, s in zip(p, size, strict=True)))] for p in spots}
    (found,) = [p for p, voxels in cuts.items() if np.array_equal(voxels, patch.image_czyx)]
    return found


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**63 - 1), patch_xyz=st.tuples(*[st.integers(6, 26)] * 3), share=st.sampled_from([0, 0.5, 1])
)
def test_a_patch_has_its_size_and_lies_inside_the_box_or_is_padded(seed: int, patch_xyz: Any, share: float) -> None:
    """Exactly (4, z, y, x); every voxel is the box's, or zero behind its end; the same again for the same sample."""
    assert PREPARED.label_zyx is not None
    sample = Sample(3, 0, 0, seed)
    patch = cut(PREPARED, sample, "case", patch_xyz, share)
    size = patch_xyz[::-1]

    assert patch.image_czyx.shape == (4, *size)
    assert patch.label_zyx.shape == size
    assert not patch.image_czyx.flags.writeable or not np.shares_memory(patch.image_czyx, PREPARED.image_czyx)
    start = place(patch)
    inside = tuple(slice(a, a + s) for a, s in zip(start, size, strict=True))
    label = PREPARED.label_zyx[inside]
    assert np.array_equal(patch.label_zyx[tuple(slice(0, n) for n in label.shape)], label)
    assert np.count_nonzero(patch.label_zyx) == np.count_nonzero(label)
    assert all(a == 0 or a + s <= b for a, s, b in zip(start, size, BOX, strict=True))
    assert equal(patch, cut(PREPARED, sample, "case", patch_xyz, share))
    assert (patch.position, patch.seed, patch.case_id, patch.weight, patch.reason) == (3, seed, "case", 1, "")
    assert patch.mean == pytest.approx(list(PREPARED.mean))


def test_foreground_patches_hold_tumour_of_each_label_alike() -> None:
    """With share 1 every patch holds tumour, its centre drawn evenly over label values, however rare."""
    assert PREPARED.label_zyx is not None
    patches = [cut(PREPARED, Sample(i, 0, 0, i), "", (1, 1, 1), 1.0) for i in range(900)]
    values = np.bincount([int(p.label_zyx.item()) for p in patches], minlength=4)
    assert values[0] == 0
    assert values[1:].min() > 230
    for size in ((2, 2, 2), (7, 8, 9), (30, 5, 30)):
        assert all(cut(PREPARED, Sample(0, 0, 0, s), "", size, 1.0).label_zyx.any() for s in range(60))


def test_background_patches_are_uniform_and_the_share_is_kept() -> None:
    """With share 0 every place is drawn, first and last too; with share s about s of the patches are centred."""
    patches = [cut(PREPARED, Sample(i, 0, 0, i), "", (BOX[2], BOX[1], 6), 0.0) for i in range(300)]
    assert {place(p) for p in patches} == {(z, 0, 0) for z in range(BOX[0] - 5)}
    centred = [cut(PREPARED, Sample(i, 0, 0, i), "", (1, 1, 1), 0.3).label_zyx.item() > 0 for i in range(1000)]
    assert PREPARED.label_zyx is not None
    assert np.mean(centred) == pytest.approx(0.3 + 0.7 * np.mean(PREPARED.label_zyx > 0), abs=0.05)
    assert draw(5, "crop", 6)[0] >= 0


def test_a_case_without_tumour_is_cut_uniformly() -> None:
    """Foreground wanted but absent: a uniform patch, no error."""
    bare = dataclasses.replace(PREPARED, foreground=np.zeros(0, np.int32), foreground_counts=())
    for seed in range(20):
        sample = Sample(0, 0, 0, seed)
        assert equal(cut(bare, sample, "", (8, 8, 8), 1.0), cut(PREPARED, sample, "", (8, 8, 8), 0.0))


@pytest.fixture
def cases(tmp_path: Path) -> tuple[Source, tuple[Case, ...]]:
    manifest = open_manifest(str(write_msd_folder(tmp_path / "msd", 4, varied=True)))
    return Source(manifest.root, manifest.convention, 1.0), manifest.cases


SAMPLER = Sampler(seed=1, cases=4, global_batch=3, patches_per_case=2, epochs=2)
PATCH_SPEC = PatchSpec((16, 14, 12), 0.5)


def steps(source: Source, found: tuple[Case, ...], step: int = 0, rank: int = 0, world_size: int = 1) -> Any:
    """A rank's patches of each step."""
    spec = StreamSpec(SAMPLER, found, source, PATCH_SPEC, step, 1 << 30)
    rows = (decode(table) for table in tables(spec, rank, world_size))
    return rank_steps(rows, SAMPLER, PATCH_SPEC.size_zyx, step, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_gets_the_same_patches_from_any_step(
    cases: tuple[Source, tuple[Case, ...]], world_size: int
) -> None:
    """Over all ranks each step holds its positions once, also when the run goes on amid a case's steps; bit for bit the
    patches that one rank gets from the begin."""
    source, found = cases
    alone = [patch for mine in steps(source, found) for patch in mine]
    assert [p.position for p in alone] == list(range(SAMPLER.total))
    for step in range(SAMPLER.steps + 1):  # the last: a group that goes on from the last checkpoint
        ranks = [list(steps(source, found, step, rank, world_size)) for rank in range(world_size)]
        assert {len(mine) for mine in ranks} == {SAMPLER.steps - step}
        for number, shares in enumerate(zip(*ranks, strict=True), step):
            patches = sorted((patch for share in shares for patch in share), key=lambda p: p.position)
            assert [p.position for p in patches] == list(range(3 * number, 3 * number + 3))
            assert all(equal(patch, alone[patch.position]) for patch in patches)


def test_a_stream_that_is_not_the_samplers_is_refused(cases: tuple[Source, tuple[Case, ...]]) -> None:
    """A row of another rank, a row that is missing, a row too many: an error, never other patches in silence."""
    source, found = cases
    spec = StreamSpec(SAMPLER, found, source, PATCH_SPEC, 0, 1)  # no room: a case a row
    mine, others = ([decode(table) for table in tables(spec, rank, 2)] for rank in (0, 1))
    for rows in (others, mine[:1] + mine[2:], [*mine, mine[-1]], [*mine[:2], others[2], *mine[3:]]):
        with pytest.raises(RuntimeError, match=r"the stream has|StopIteration"):
            list(rank_steps(iter(rows), SAMPLER, PATCH_SPEC.size_zyx, 0, 0, 2))


def test_rows_are_read_ahead_of_the_consumer_and_errors_reach_it() -> None:
    """Two items before they are asked for, no more; what fails in the thread fails at the consumer, in its place."""
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(9):
            if number == 7:
                raise OSError("no route to host")
            read.append(number)
            yield number

    found = read_ahead(numbers, 2)
    deadline = time.monotonic() + 20
    while len(read) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert read == [0, 1, 2], "two wait, the third is in the thread's hand"
    assert [next(found) for _ in range(7)] == list(range(7))
    with pytest.raises(OSError, match="no route"):
        next(found)


def test_a_box_holds_a_case_once_and_never_more_than_its_patches() -> None:
    """Patches that overlap travel as the box around them; those far apart as themselves; a reused buffer as a new one.

    Also float16 voxels, a position near 2^63, a table sliced out of a larger one.
    """
    prepared = dataclasses.replace(PREPARED, image_czyx=PREPARED.image_czyx.astype(np.float16))
    buffer = Buffer()
    for size in ((20, 18, 16), (3, 2, 2)):
        patch_spec = PatchSpec(size, 0.5)
        samples = [Sample(2**62 + n, 0, 0, 2**63 - 1 - n) for n in range(9)]
        apart = sum(
            encode(bounding_boxes(prepared, "é", [s], patch_spec), patch_spec.size_zyx, 0).nbytes for s in samples
        )
        together = encode(bounding_boxes(prepared, "é", samples, patch_spec), patch_spec.size_zyx, 2, buffer)
        assert together.nbytes < (apart / 2 if size[0] > 10 else apart)
        whole = pa.concat_tables([encode([], size, 0), together]).combine_chunks()
        for table in (together, whole.slice(1, 1)):
            left, patches = decode(table)
            assert left == 2
            assert all(
                equal(patch, cut(prepared, sample, "é", size, 0.5))
                for patch, sample in zip(patches, samples, strict=True)
            )


def everything(source: Source, found: tuple[Case, ...]) -> list[Patch]:
    return [patch for mine in steps(source, found) for patch in mine]


def test_raw_and_store_routes_give_the_same_patches(cases: tuple[Source, tuple[Case, ...]], tmp_path: Path) -> None:
    """Bit for bit the same patches for the same positions, padding included, resampled and oblique cases too."""
    source, found = cases
    home = str(tmp_path / "store")
    stored = tuple(put(home, source, case, {"spacing_mm": 1.0}) for case in found)
    raw, prepared = everything(source, found), everything(Source(home, source.convention, 1.0), stored)

    assert [p.position for p in raw] == list(range(SAMPLER.total))
    assert sum(p.weight == 1.0 for p in raw) == 16
    assert [p.weight for p in raw] == [float(SAMPLER.sample(p).case is not None) for p in range(SAMPLER.total)]
    assert {p.image_czyx.dtype.name for p in raw} == {"int16", "float16"}
    assert all(equal(a, b) for a, b in zip(raw, prepared, strict=True))


def test_a_refused_case_keeps_its_positions(cases: tuple[Source, tuple[Case, ...]]) -> None:
    """Each position of a damaged case is a patch of weight 0 with the reason; all others are as before."""
    source, found = cases
    before = everything(source, found)
    damaged = Path(source.root) / "imagesTr" / "BRATS_002.nii.gz"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    after = everything(source, found)

    assert len(after) == len(before) == SAMPLER.total
    for old, new in zip(before, after, strict=True):
        if old.case_id == "BRATS_002":
            assert (new.position, new.seed, new.case_id, new.weight) == (old.position, old.seed, old.case_id, 0)
            assert new.reason.startswith("changed: ")  # the manifest knows its checksum
            assert new.image_czyx.shape == old.image_czyx.shape
            assert not new.image_czyx.any()
        else:
            assert equal(old, new)
    assert sum(p.case_id == "BRATS_002" for p in after) == 4


def test_storage_that_fails_stops_the_stream_and_a_dealt_case_is_read_once() -> None:
    """OSError is no property of a case and must not become a placeholder; a refusal is not asked for twice."""
    asked: list[str] = []

    class Double(Source):
        def load(self, case: Case) -> Any:
            asked.append(case.id)
            if case.id == "down":
                raise OSError("no route to host")
            if case.id == "bad":
                raise InvalidCase("size", "cut")
            return PREPARED

    def patches(*ids: str) -> list[Patch]:
        sampler = Sampler(0, len(ids), 1, 3, 1)
        spec = StreamSpec(sampler, tuple(case(name) for name in ids), Double("", "msd", 1.0), PATCH_SPEC, 0, 1 << 30)
        return [patch for table in tables(spec, 0, 1) for patch in decode(table)[1]]

    found = patches("bad", "ok")
    assert {(p.case_id, p.weight) for p in found} == {("bad", 0.0), ("ok", 1.0)}
    assert len(found) == 6
    assert sorted(asked) == ["bad", "ok"]
    with pytest.raises(OSError, match="no route"):
        patches("ok", "down")


def case(name: str, size: int = 0) -> Case:
    return Case(name, name, (), None, size)


@pytest.mark.parametrize(("world_size", "group_ranks"), [(1, 16), (2, 16), (3, 16), (3, 1), (3, 2)])
def test_executions_of_the_datasource_chain_to_the_end(
    monkeypatch: pytest.MonkeyPatch, world_size: int, group_ranks: int
) -> None:
    """The read tasks of execution 0, 1, 2 ... from any step on, of all groups of ranks together, hold every later
    position once; the rows of a group come to its ranks in turn, whatever the segments."""
    monkeypatch.setattr(stream, "GROUP_RANKS", group_ranks)
    sampler = dataclasses.replace(SAMPLER, epochs=5)
    found = tuple(case(str(i), 1 << 30) for i in range(4))
    for step in range(sampler.steps):
        seen: list[int] = []
        for group in range(stream.groups(world_size)):
            ranks, turn = stream.group_ranks(group, world_size), 0
            spec = StreamSpec(sampler, found, Source("", "msd", 1.0), PATCH_SPEC, step, 1 << 40, 1, (2, 2))
            for execution in range(20):
                context = DataContext()
                context.set_config(stream.RANKS, (ranks, world_size))
                context._execution_idx = execution
                assert turn % len(ranks) == 0, "an execution begins with the first rank"
                for task in CaseDatasource(spec).get_read_tasks(1, data_context=context):
                    read: Any = task.read_fn
                    _, sampled, places, cases, _ = read.args
                    for row in (sampled.row(*place) for place in places):
                        assert all(cases[index] == found[index] for index, _ in row.cases)
                        rank, turn = ranks[turn % len(ranks)], turn + 1
                        for _, samples in row.cases:
                            seen += [s.position for s in samples]
                            now, place = divmod(samples[0].position, sampler.global_batch)
                            assert (sampler.oldest(now) + place) % world_size == rank
        real = [p for p in range(step * 3, sampler.total) if sampler.sample(p).case is not None]
        assert sorted(seen) == real


@pytest.mark.parametrize(("cases", "batch", "world_size"), [(7, 5, 3), (7, 5, 4), (2, 5, 4), (3, 5, 5), (1, 4, 3)])
def test_the_last_executions_and_few_cases_leave_rows_empty_and_no_rank_behind(
    cases: int, batch: int, world_size: int
) -> None:
    """Ranks that do not divide the batch, fewer cases than a step shows, from any step on: an execution of one turn has
    a row for each rank, some empty, after which all ranks are as far; each takes its positions of each step."""

    class Same(Source):
        def load(self, case: Case) -> Any:
            return PREPARED

    class Shard:
        """A rank's share: a row of each execution."""

        def __init__(self) -> None:
            self.rows: list[pa.Table] = []

        def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
            yield self.rows.pop(0)

    sampler = Sampler(seed=2, cases=cases, global_batch=batch, patches_per_case=2, epochs=2)
    found, empty = tuple(case(str(i), 1 << 30) for i in range(cases)), 0
    for step in range(sampler.steps):
        spec = StreamSpec(sampler, found, Same("", "msd", 1.0), PATCH_SPEC, step, 1 << 40, 1, (2, 2))
        shards = [Shard() for _ in range(world_size)]
        for execution in range(len(sampler.turns(step, world_size, spec.cases_per_row(world_size)))):
            context = DataContext()
            context.set_config(stream.RANKS, ([*range(world_size)], world_size))
            context._execution_idx = execution
            tasks = CaseDatasource(spec).get_read_tasks(1, data_context=context)
            for shard, table in zip(shards, [table for task in tasks for table in task()], strict=True):
                shard.rows.append(table)
                empty += not decode(table)[1]
        for rank, shard in enumerate(shards):
            mine = list(rank_steps(rank_rows(shard, sampler), sampler, PATCH_SPEC.size_zyx, step, rank, world_size))
            wanted = [list(sampler.rank_positions(now, rank, world_size)) for now in range(step, sampler.steps)]
            assert [[patch.position for patch in patches] for patches in mine] == wanted
    assert empty, "a rank without a case in an execution"


def test_groups_of_ranks_hold_each_rank_once() -> None:
    """In order and of like size, none with more than one coordinator serves; a rank finds its own."""
    for world_size in range(1, 201):
        found = [stream.group_ranks(group, world_size) for group in range(stream.groups(world_size))]
        assert [rank for ranks in found for rank in ranks] == [*range(world_size)]
        assert all(stream.group_of(rank, world_size) == group for group, ranks in enumerate(found) for rank in ranks)
        assert min(map(len, found)) > 0 and max(map(len, found)) <= stream.GROUP_RANKS
        assert max(map(len, found)) - min(map(len, found)) <= 1


def test_small_cases_share_rows_and_tasks_large_ones_do_only_with_many_ranks() -> None:
    """A row costs milliseconds and a task tens of them, so small cases are grouped; a full-size case travels alone to a
    few ranks, and eight together to 64, unless the object store is too small."""

    def sizes(patch: int, file_bytes: int, store_bytes: int = 1 << 40) -> list[tuple[int, int]]:
        found = tuple(case(str(i), file_bytes) for i in range(4))
        spec = StreamSpec(SAMPLER, found, Source("", "msd", 1.0), PatchSpec((patch,) * 3, 0.5), 0, store_bytes)
        rows = [spec.cases_per_row(world_size) for world_size in (1, 2, 8, 16, 64)]
        return [(size, spec.rows_per_task(size)) for size in rows]

    assert sizes(128, 10_000_000) == [(1, 4), (1, 4), (2, 2), (4, 2), (8, 2)]
    assert sizes(16, 9_000) == [(28, 2)] * 5
    assert sizes(32, 3_000_000) == [(1, 11), (1, 11), (2, 5), (4, 2), (8, 2)]
    assert sizes(128, 10_000_000, 2 * 160_000_000) == [(1, 4)] * 5


REGIONS = ((1, 2, 3), (2, 3), (3,))
"""WT, TC, ET of MSD."""


def test_centres_among_regions_are_nnunets() -> None:
    """A region as likely as another, then each of its voxels, so a label value's share follows from the volumes; a
    region that the case lacks is left out, and a label value in none of them is never a centre."""
    assert PREPARED.label_zyx is not None
    volumes = np.bincount(PREPARED.label_zyx.reshape(-1), minlength=4)[1:]
    assert PREPARED.label_voxels == tuple(volumes)

    def values(regions: Any, prepared: Prepared = PREPARED) -> Any:
        spec = PatchSpec((1, 1, 1), 1.0, regions)
        boxes = (bounding_boxes(prepared, "", [Sample(i, 0, 0, i)], spec) for i in range(2000))
        found = [box.label_zyx.item() for (box,) in boxes if box.label_zyx is not None]
        return np.bincount(found, minlength=4)[1:] / len(found)

    shares = [np.isin((1, 2, 3), region) * volumes for region in REGIONS]
    expected = np.mean([share / share.sum() for share in shares], axis=0)
    assert values(REGIONS) == pytest.approx(expected, abs=0.04)
    assert values(((2,), (4,))) == pytest.approx([0, 1, 0])
    uneven = dataclasses.replace(PREPARED, label_voxels=(8000, 1000, 1000))
    assert values(((1, 2, 3),), uneven) == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    assert values(()) == pytest.approx([1 / 3] * 3, abs=0.04)


def test_regions_change_which_voxel_alone() -> None:
    """Uniform patches stay where they were; a region of one value gives the very voxel that its value gives."""
    for seed in range(50):
        sample = Sample(0, 0, 0, seed)
        assert patch_origin(PREPARED, sample, (8, 8, 8), 0.0, REGIONS) == patch_origin(PREPARED, sample, (8, 8, 8), 0.0)
        one = dataclasses.replace(PREPARED, foreground_counts=PREPARED.foreground_counts[:1])
        assert patch_origin(one, sample, (8, 8, 8), 1.0, REGIONS) == patch_origin(one, sample, (8, 8, 8), 1.0)
