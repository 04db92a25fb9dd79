"""A prepared case comes back from the store as it went in, or is refused."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest

from raytrain_brats import storage
from raytrain_brats.cases.scan import open_manifest
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data import store
from raytrain_brats.data.manifest import Case
from raytrain_brats.data.nifti import InvalidCase, Volume
from raytrain_brats.data.preprocess import Prepared, preprocess
from raytrain_brats.data.store import Source, decode, encode, open_index, put, write_index
from raytrain_brats.errors import UserError
from tests.support.cases import make_affine, make_volume, save, write_brats_folder, write_msd_folder

OPTIONS: dict[str, Any] = {"spacing_mm": 1.0}


def same(a: Prepared, b: Prepared) -> bool:
    for field in dataclasses.fields(Prepared):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            if x.dtype != y.dtype or x.shape != y.shape or not np.array_equal(x, y):
                return False
        elif x != y or type(x) is not type(y):
            return False
    return True


def prepared_variants() -> dict[str, Prepared]:
    oblique = make_affine((0.9, 1.1, 2.5), (2, 0, 1), (-1, 1, -1), 20)
    outside = make_volume()
    label = np.array(outside.label_xyz)
    label[0, 0, 0] = 2
    return {
        "labelled": preprocess(make_volume(), 1.0),
        "unlabelled": preprocess(make_volume(label=False), 1.0),
        "empty ET": preprocess(make_volume(empty_et=True, shape=(23, 21, 17)), 1.0),
        "no tumour": preprocess(Volume(outside.image_cxyz, label * 0, np.eye(4)), 1.0),
        "resampled": preprocess(make_volume(oblique), 1.0),
        "label outside": preprocess(Volume(outside.image_cxyz, label, np.eye(4)), 1.0),
    }


VARIANTS = prepared_variants()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_msd_folder(tmp_path / "msd", 3, shape=(10, 9, 8))


@pytest.mark.parametrize("name", VARIANTS)
def test_an_object_holds_every_field(name: str) -> None:
    """decode(encode(x)) is x in every field, type and dtype; the same case always gives the same bytes."""
    content = encode(VARIANTS[name])
    assert same(decode(content), VARIANTS[name])
    assert encode(decode(content)) == content
    if VARIANTS[name].label_zyx is not None:
        assert np.array_equal(decode(content).truth_xyz(), VARIANTS[name].truth_xyz())


def test_damaged_objects_are_refused() -> None:
    """Cut anywhere, or with flipped bits, an object is refused or still decodes to the very same case."""
    content, dice, refused = encode(VARIANTS["resampled"]), random.Random(3), 0
    for number in range(400):
        damaged = bytearray(content)
        if number % 4 == 0:
            damaged = damaged[: dice.randrange(len(content))]
        else:
            damaged[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        try:
            assert same(decode(bytes(damaged)), VARIANTS["resampled"])
        except InvalidCase as error:
            refused += error.reason == "changed"
    assert refused > 300


def test_an_object_of_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version's objects are not read as if they were ours, nor is any other Parquet file."""
    monkeypatch.setattr(store, "FORMAT", 2)
    content = encode(VARIANTS["labelled"])
    monkeypatch.undo()
    table = pq.read_table(store.pa.BufferReader(content))
    for odd in (table.drop_columns(["label"]), table.slice(0, 0)):
        sink = store.io.BytesIO()
        pq.write_table(odd, sink)
        with pytest.raises(InvalidCase):
            decode(sink.getvalue())
    with pytest.raises(InvalidCase, match="format"):
        decode(content)


def test_an_object_of_before_label_voxels_is_read() -> None:
    """Earlier versions did not store how many voxels a label value has: they are counted in the label."""
    for prepared in VARIANTS.values():
        table = store.to_table(prepared)
        about = json.loads(table.column("about")[0].as_py())
        del about["label_voxels"]
        number = table.schema.get_field_index("about")
        old = table.set_column(number, "about", store.pa.array([json.dumps(about)]))
        assert store.from_table(old).label_voxels == prepared.label_voxels


def test_an_object_is_told_by_its_name(folder: Path, tmp_path: Path) -> None:
    """A name says what went in, how long it is and its checksum; what is cut off or foreign does not count as there."""
    manifest, home = open_manifest(str(folder)), str(tmp_path / "store")
    source = Source(manifest.root, manifest.convention, 1.0)
    assert store.objects(home) == {}
    made = [put(home, source, case, OPTIONS) for case in manifest.cases[:2]]
    (tmp_path / "store/objects/0.parquet").write_bytes(b"foreign")

    there = store.objects(home)
    assert there == {store.key(c, OPTIONS, "msd"): c.object for c in made}
    assert [store.with_object(c, there[store.key(c, OPTIONS, "msd")]) for c in manifest.cases[:2]] == made
    assert put(home, source, manifest.cases[0], OPTIONS) == made[0]
    written = tmp_path / "store" / made[0].object
    content = written.read_bytes()
    written.write_bytes(content[:-1])
    assert list(store.objects(home).values()) == [made[1].object]
    written.write_bytes(content)
    assert store.intact(home, made[0].object)
    written.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert len(store.objects(home)) == 2 and not store.intact(home, made[0].object)
    written.unlink()
    assert not store.intact(home, made[0].object)
    assert put(home, source, manifest.cases[0], {"spacing_mm": 2.0}).object != made[0].object


def test_codecs_hold_the_same_case(folder: Path, tmp_path: Path) -> None:
    """zstd is the default; lz4 packs the same voxels under the same key, so that either is taken for the other."""
    manifest = open_manifest(str(folder))
    source, case = Source(manifest.root, manifest.convention, 1.0), manifest.cases[0]
    packed = {}
    for codec in ("zstd", "lz4"):
        packed[codec] = put(str(tmp_path / codec), source, case, OPTIONS, codec)  # type: ignore[arg-type]
        columns = pq.ParquetFile(tmp_path / codec / packed[codec].object).metadata.row_group(0)
        assert {columns.column(n).compression for n in range(columns.num_columns)} == {codec.upper()}
    assert packed["zstd"].object != packed["lz4"].object
    assert put(str(tmp_path / "zstd"), source, case, OPTIONS) == packed["zstd"]
    stored = [Source(str(tmp_path / codec), "msd", 1.0).load(packed[codec]) for codec in packed]
    assert same(*stored) and same(stored[0], source.load(case))
    assert [list(store.objects(str(tmp_path / codec))) for codec in packed] == [[store.key(case, OPTIONS, "msd")]] * 2


def test_equal_content_shares_one_object(folder: Path, tmp_path: Path) -> None:
    """A copy of a case under another name costs no second object."""
    manifest = open_manifest(str(folder))
    source = Source(manifest.root, manifest.convention, 1.0)
    copy = dataclasses.replace(manifest.cases[1], id="COPY", subject="COPY")
    stored = [put(str(tmp_path / "store"), source, case, OPTIONS) for case in (*manifest.cases, copy)]

    assert stored[3].object == stored[1].object
    assert stored[3].id == "COPY"
    assert len(list((tmp_path / "store" / "objects").iterdir())) == 3


def test_a_store_gives_what_the_files_give(folder: Path, tmp_path: Path) -> None:
    """`load` is the same by either route, also from a store that was moved."""
    manifest = open_manifest(str(folder))
    raw = Source(manifest.root, manifest.convention, 1.0)
    cases = tuple(put(str(tmp_path / "a"), raw, case, OPTIONS) for case in manifest.cases)
    write_index(str(tmp_path / "a"), dataclasses.replace(manifest, cases=cases), OPTIONS)
    (tmp_path / "a").rename(tmp_path / "b")
    index = open_index(str(tmp_path / "b"), OPTIONS)

    assert index == dataclasses.replace(manifest, cases=cases, root=str(tmp_path / "b"))
    for ours, theirs in zip(index.cases, manifest.cases, strict=True):
        assert same(Source(index.root, index.convention, 1.0).load(ours), raw.load(theirs))


def test_what_is_no_finished_store_is_named(folder: Path, tmp_path: Path) -> None:
    """Missing, half written, damaged or otherwise prepared: a UserError with the remedy."""
    home = tmp_path / "store"
    manifest = open_manifest(str(folder))
    with pytest.raises(UserError, match=r"store is not a finished store; make it with .*prepare"):
        open_index(str(home), OPTIONS)
    write_index(str(home), manifest, OPTIONS)
    with pytest.raises(UserError, match=r"was prepared with .*1\.0.*, the recipe wants .*2\.0"):
        open_index(str(home), {"spacing_mm": 2.0})
    for name, content in (("preprocess.json", b"{"), ("preprocess.json", b"\xff"), ("index.jsonl", b"{")):
        write_index(str(home), manifest, OPTIONS)
        (home / name).write_bytes(content)
        with pytest.raises(UserError, match=r"is not a "):
            open_index(str(home), OPTIONS)
    write_index(str(home), manifest, OPTIONS)
    (home / "index.jsonl").unlink()
    with pytest.raises(UserError, match="not a finished store"):
        open_index(str(home), OPTIONS)


def test_a_kill_between_settings_and_index_leaves_no_store(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects of one preprocessing never stand under the settings of another."""
    home, manifest = str(tmp_path / "store"), open_manifest(str(folder))
    write_index(home, manifest, OPTIONS)
    write_index(home, manifest, OPTIONS)
    monkeypatch.setattr(store.manifests, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_index(home, manifest, OPTIONS)
    assert open_index(home, OPTIONS) == dataclasses.replace(manifest, root=home)
    with pytest.raises(KeyboardInterrupt):
        write_index(home, manifest, {"spacing_mm": 2.0})
    for options in (OPTIONS, {"spacing_mm": 2.0}):
        with pytest.raises(UserError, match="not a finished store"):
            open_index(home, options)


def refusal(source: Source, case: Case) -> InvalidCase:
    with pytest.raises(InvalidCase) as caught:
        source.load(case)
    return caught.value


def reason(source: Source, case: Case) -> str:
    return refusal(source, case).reason


def test_files_that_went_or_changed_are_refused(folder: Path, tmp_path: Path) -> None:
    """Missing and changed files or objects are verdicts on the case, by either route."""
    manifest, home = open_manifest(str(folder)), tmp_path / "store"
    raw, stored = Source(str(folder), "msd", 1.0), Source(str(home), "msd", 1.0)
    case = manifest.cases[0]
    prepared = put(str(home), raw, case, OPTIONS)

    assert reason(raw, dataclasses.replace(case, bytes=case.bytes + 1)) == "changed"
    assert reason(stored, dataclasses.replace(prepared, object_sha256="0")) == "changed"
    damaged = bytearray((home / prepared.object).read_bytes())
    damaged[200] ^= 1
    (home / prepared.object).write_bytes(damaged)
    assert reason(stored, prepared) == "changed"
    (home / prepared.object).unlink()
    assert reason(stored, prepared) == "missing"
    assert refusal(stored, prepared).file == prepared.object
    (folder / "labelsTr" / "BRATS_001.nii.gz").unlink()
    assert reason(raw, case) == "missing"


def test_missing_on_s3_is_a_refusal_and_no_store_is_an_error(folder: Path, s3_server: str) -> None:
    """A lost object refuses one case; a lost bucket is the user's to mend and stops the run."""
    case = open_manifest(str(folder)).cases[0]
    prepared = put(s3_server, Source(str(folder), "msd", 1.0), case, OPTIONS)
    assert same(Source(s3_server, "msd", 1.0).load(prepared), Source(str(folder), "msd", 1.0).load(case))
    assert reason(Source(f"{s3_server}/elsewhere", "msd", 1.0), prepared) == "missing"
    assert reason(Source(s3_server, "msd", 1.0), case) == "missing"
    with pytest.raises(UserError, match="NoSuchBucket"):
        Source(f"{s3_server}-wrong", "msd", 1.0).load(prepared)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("damage", ["damaged", "spoilt since", "lost", "range"])
def test_the_file_at_fault_is_told_by_its_own_path(damage: str, number: int, tmp_path: Path) -> None:
    """Whichever of a patient's five files is damaged, before the manifest or since, is the refusal's `file`."""
    folder = write_brats_folder(tmp_path / "brats", 1, shape=(10, 9, 8))
    kind = ("flair", "t1", "t1ce", "t2", "seg")[number]
    name = f"BraTS2021_00000/BraTS2021_00000_{kind}.nii.gz"
    path, whole = folder / name, open_manifest(str(folder))
    if damage == "lost":
        path.unlink()
    elif damage == "range":
        image: Any = nib.load(path)
        values = np.asarray(image.dataobj)
        save(path, np.where(values == 0, 0, values * 1e-3 + 1e6) if number < 4 else values + 7, image.affine)
    else:
        path.write_bytes(path.read_bytes()[:-20])
    case = whole.cases[0] if damage in ("spoilt since", "lost") else open_manifest(str(folder)).cases[0]
    told = refusal(Source(str(folder), "brats2017_2021", 1.0), case)

    expected = {"damaged": "gzip_damaged", "spoilt since": "changed", "lost": "missing", "range": "range"}[damage]
    assert told.reason == ("label_values" if damage == "range" and number == 4 else expected)
    assert told.file == name
    assert name in told.detail
    assert ("gzip_damaged" in told.detail) == (damage == "spoilt since")


def test_a_file_exchanged_for_a_sound_one_is_no_single_files_fault(tmp_path: Path) -> None:
    """The manifest's checksum is that of all files together: then the case as a whole has changed."""
    folder = write_brats_folder(tmp_path / "brats", 2, shape=(10, 9, 8))
    case, other = open_manifest(str(folder)).cases
    (folder / case.images[1]).write_bytes((folder / other.images[1]).read_bytes())
    told = refusal(Source(str(folder), "brats2017_2021", 1.0), case)
    assert (told.reason, told.file) == ("changed", "")


def test_a_lost_object_on_s3_is_named(s3_server: str, tmp_path: Path) -> None:
    """By its path below the data root there too."""
    folder = write_brats_folder(tmp_path / "brats", 1, shape=(10, 9, 8))
    case = open_manifest(str(folder)).cases[0]
    for name in manifests.case_files(case):
        if name != case.images[2]:
            storage.write_bytes(f"{s3_server}/data/{name}", (folder / name).read_bytes())
    told = refusal(Source(f"{s3_server}/data", "brats2017_2021", 1.0), case)
    assert (told.reason, told.file) == ("missing", case.images[2])
