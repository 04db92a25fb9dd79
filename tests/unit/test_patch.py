"""A sample's patch depends on the sample alone, has its exact size, and no position ever goes missing."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.data import DataContext

from raytrain_brats.cases.scan import open_manifest
from raytrain_brats.data.boxes import Buffer, PatchSpec, bounding_boxes, decode, encode, rank_tables
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase, Volume
from raytrain_brats.data.patch import Patch
from raytrain_brats.data.preprocess import Prepared, preprocess
from raytrain_brats.data.sampler import Sample, Sampler, draw
from raytrain_brats.data.store import Source, put
from raytrain_brats.data.stream import PositionSource
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
    assert patch.mean.tolist() == pytest.approx(PREPARED.mean)


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


PLAN = Sampler(seed=1, cases=4, global_batch=3, patches_per_case=2, window_cases=2, epochs=2)
CUTTING = PatchSpec((16, 14, 12), 0.5)


def items(found: tuple[Case, ...]) -> list[tuple[Sample, Case | None]]:
    samples = [PLAN.sample(p) for p in range(PLAN.total)]
    return [(s, None if s.case is None else found[s.case]) for s in samples]


def dealt(source: Source, wanted: Any, world_size: int = 1, patch_spec: PatchSpec = CUTTING) -> list[list[Patch]]:
    """Each rank's patches of one window, in the order in which it trains on them."""
    ranks: list[list[Patch]] = [[] for _ in range(world_size)]
    held: list[list[Patch]] = [[] for _ in range(world_size)]
    for number, table in enumerate(rank_tables(source, wanted, patch_spec, world_size)):
        left, found = decode(table)
        held[number % world_size] += found
        if not left:
            ranks[number % world_size] += sorted(held[number % world_size], key=lambda p: p.position)
            held[number % world_size] = []
    assert not any(held)
    return ranks


@pytest.mark.parametrize("world_size", range(1, 9))
def test_any_number_of_ranks_gets_every_wth_patch_and_the_same_voxels(
    cases: tuple[Source, tuple[Case, ...]], world_size: int
) -> None:
    """Rank r's patches are positions r, r + W, r + 2W ... of the stream, over windows that W does not divide too; bit
    for bit those of a stream for one rank."""
    source, found = cases
    wanted = items(found)
    alone = dealt(source, wanted)[0]
    ranks: list[list[Patch]] = [[] for _ in range(world_size)]
    turn = 0
    for window in PLAN.windows(0, PLAN.total):
        for rank, patches in enumerate(dealt(source, wanted[window.start : window.stop], world_size)):
            ranks[(turn + rank) % world_size] += patches
        turn = (turn + len(window)) % world_size  # Ray goes on with the rank whose turn it is
    for rank, patches in enumerate(ranks):
        assert [p.position for p in patches] == list(range(rank, PLAN.total, world_size))
        assert all(equal(patch, alone[patch.position]) for patch in patches)


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


def test_raw_and_store_routes_give_the_same_patches(cases: tuple[Source, tuple[Case, ...]], tmp_path: Path) -> None:
    """Bit for bit the same rows for the same positions, padding included, resampled and oblique cases too."""
    source, found = cases
    home = str(tmp_path / "store")
    stored = tuple(put(home, source, case, {"spacing_mm": 1.0}) for case in found)
    raw = dealt(source, items(found))[0]
    prepared = dealt(Source(home, source.convention, 1.0), items(stored))[0]

    assert [p.position for p in raw] == list(range(18))
    assert [p.weight for p in raw] == ([1.0] * 8 + [0.0]) * 2
    assert {p.image_czyx.dtype.name for p in raw} == {"int16", "float16"}
    assert all(equal(a, b) for a, b in zip(raw, prepared, strict=True))


def test_a_refused_case_keeps_its_positions(cases: tuple[Source, tuple[Case, ...]]) -> None:
    """Each position of a damaged case is one row of weight 0 with the reason; all other rows are as before."""
    source, found = cases
    before = dealt(source, items(found))[0]
    damaged = Path(source.root) / "imagesTr" / "BRATS_002.nii.gz"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    after = dealt(source, items(found))[0]

    assert len(after) == len(before) == PLAN.total
    for old, new in zip(before, after, strict=True):
        if old.case_id == "BRATS_002":
            assert (new.position, new.seed, new.case_id, new.weight) == (old.position, old.seed, old.case_id, 0)
            assert new.reason.startswith("changed: ")  # the manifest knows its checksum
            assert new.image_czyx.shape == old.image_czyx.shape
            assert not new.image_czyx.any()
        else:
            assert equal(old, new)
    assert sum(p.case_id == "BRATS_002" for p in after) == 4


def test_storage_that_fails_stops_the_window_and_each_case_is_read_once() -> None:
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

    def rows(*ids: str) -> list[Patch]:
        wanted = [(Sample(i, 0, 0, i), Case(name, name, (), None, 0)) for i, name in enumerate(ids)]
        return dealt(Double("", "msd", 1.0), wanted)[0]

    assert [p.weight for p in rows("bad", "ok", "bad", "ok")] == [0, 1, 0, 1]
    assert asked == ["bad", "ok"]
    with pytest.raises(OSError, match="no route"):
        rows("ok", "down")


def test_executions_of_the_datasource_chain_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The read tasks of execution 0, 1, 2 ... from any step on hold every later position once, in order."""
    monkeypatch.setattr("raytrain_brats.data.sampler.SEGMENT_WINDOWS", 1)
    found = tuple(Case(str(i), str(i), (), None, 0) for i in range(4))
    for cursor in range(0, PLAN.total, PLAN.global_batch):
        datasource = PositionSource(PLAN, found, Source("", "msd", 1.0), CUTTING, cursor)
        seen: list[int] = []
        for execution in range(PLAN.total):
            context = DataContext()
            context._execution_idx = execution
            for task in datasource.get_read_tasks(1, data_context=context):
                read: Any = task.read_fn
                rows = [sample.position for sample, _ in read.args[1]]
                seen += rows
        assert seen == list(range(cursor, PLAN.total))
