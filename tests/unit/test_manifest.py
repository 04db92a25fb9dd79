"""Which cases a folder holds, their identity, their folds; and one clear line when it is not what it should be."""

import dataclasses
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from raytrain_brats import index, storage
from raytrain_brats.cases.scan import checksummed, open_manifest, scan, scan_images
from raytrain_brats.data import manifest as manifests
from raytrain_brats.data.manifest import Case, Manifest, duplicates
from raytrain_brats.data.nifti import decode_case
from raytrain_brats.errors import UserError
from raytrain_brats.labels import allowed_values, to_regions
from tests.support.cases import write_brats_folder, write_msd_folder

OPTIONS: dict[str, Any] = {"spacing_mm": 1.0}


def dataset_identity(cases: Any, options: dict[str, Any]) -> str:
    return manifests.dataset_identity(cases, options, "msd")


def decoded(manifest: Manifest, case: Case) -> Any:
    files = [storage.read_bytes(storage.join(manifest.root, path)) for path in manifests.case_files(case)]
    return decode_case(files[:-1], files[-1], allowed_values(manifest.convention))


def test_both_layouts_hold_the_same_cases(tmp_path: Path) -> None:
    """MSD and BraTS 2021 files of the same patients give the same modalities in the same order, and regions."""
    msd = open_manifest(str(write_msd_folder(tmp_path / "msd", 2)))
    brats = open_manifest(str(write_brats_folder(tmp_path / "brats", 2)))

    assert [c.id for c in msd.cases] == ["BRATS_001", "BRATS_002"]
    assert [c.id for c in brats.cases] == ["BraTS2021_00000", "BraTS2021_00001"]
    assert (msd.convention, brats.convention) == ("msd", "brats2017_2021")
    for ours, theirs in zip(msd.cases, brats.cases, strict=True):
        a, b = decoded(msd, ours), decoded(brats, theirs)
        assert np.array_equal(a.image_cxyz, b.image_cxyz)
        assert np.array_equal(to_regions(a.label_xyz, "msd"), to_regions(b.label_xyz, "brats2017_2021"))
        sizes = [(tmp_path / "brats" / path).stat().st_size for path in manifests.case_files(theirs)]
        assert theirs.bytes == sum(sizes)


def test_both_layouts_are_read_from_s3(tmp_path: Path, s3_server: str) -> None:
    """A bucket gives the same manifest as the folder, but for the root."""
    folder = write_msd_folder(tmp_path / "msd", 2)
    for path in folder.rglob("*.*"):
        storage.write_bytes(f"{s3_server}/data/{path.relative_to(folder).as_posix()}", path.read_bytes())
    local, remote = open_manifest(str(folder)), open_manifest(f"{s3_server}/data/")
    assert remote == dataclasses.replace(local, root=f"{s3_server}/data")


def test_brats_names_in_any_case_and_unpacked(tmp_path: Path) -> None:
    """Public copies have `_T1CE.nii.gz` and plain `.nii`; both are found, also below a subfolder."""
    folder = write_brats_folder(tmp_path / "HGG", 1) / "BraTS2021_00000"
    (folder / "BraTS2021_00000_t1ce.nii.gz").rename(folder / "BraTS2021_00000_T1CE.nii.gz")
    nib.save(nib.load(folder / "BraTS2021_00000_t2.nii.gz"), folder / "BraTS2021_00000_t2.nii")
    (folder / "BraTS2021_00000_t2.nii.gz").unlink()
    (case,) = scan(str(tmp_path)).cases
    assert [path.rsplit("_", 1)[1] for path in case.images] == ["flair.nii.gz", "t1.nii.gz", "T1CE.nii.gz", "t2.nii"]


def broken(folder: Path, what: str) -> None:
    listed = folder / "msd" / "dataset.json"
    row = {"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}
    contents = {
        "json": '{"training": [', "list": "[1, 2]", "no training": "{}", "no label": '{"training": [{"image": "x"}]}',
        "number": '{"training": [{"image": 1, "label": 2}]}', "not text": '{"training": [null]}',
        "twice": json.dumps({"training": [row, row]}), "none": '{"training": []}',
    }  # fmt: skip
    if what in contents:
        listed.write_text(contents[what])
    elif what == "layout":
        listed.unlink()
    elif what == "empty":
        (folder / "empty").mkdir()
    elif what == "mac":
        (folder / "mac").mkdir()
        (folder / "mac" / "._dataset.json").write_text("left by macOS")


@pytest.mark.parametrize(
    ("what", "where", "named"),
    [
        ("", "nowhere", "nowhere does not exist"),
        ("empty", "empty", "empty holds no files"),
        ("mac", "mac", "mac holds no files"),
        ("layout", "msd", "no case: the names tell no modality"),
        *((what, "msd", "dataset.json") for what in ("json", "list", "no training", "no label", "number", "not text")),
        ("none", "msd", "lists no case, but 4 NIfTI"),
        ("twice", "msd", "lists a case twice"),
        ("", "index.jsonl", "index.jsonl does not exist"),
    ],
)
def test_a_broken_folder_is_named_in_one_line(tmp_path: Path, what: str, where: str, named: str) -> None:
    """Each mistake is a UserError of one line that names the folder or file and ends with a remedy."""
    write_msd_folder(tmp_path / "msd", 2, shape=(10, 10, 10))
    write_brats_folder(tmp_path / "brats", 2, shape=(10, 10, 10))
    broken(tmp_path, what)
    with pytest.raises(UserError, match=named) as caught:
        open_manifest(str(tmp_path / where))
    assert "\n" not in str(caught.value)


def test_a_missing_bucket_prefix_is_named_too(s3_server: str) -> None:
    """An empty bucket, an empty prefix and a console's folder mark hold no cases; a wrong bucket says so."""
    storage.write_bytes(f"{s3_server}/marked/", b"")
    for uri, named in (
        (s3_server, "holds no files"),
        (f"{s3_server}/nothing", "does not exist"),
        (f"{s3_server}/marked", "does not exist"),
        (f"{s3_server}-wrong/x", "NoSuchBucket"),
    ):
        with pytest.raises(UserError, match=named):
            open_manifest(uri)


def test_folds_are_even_and_copies_stay_together(tmp_path: Path) -> None:
    """Fold sizes differ by at most one; a copied case shares the fold of its original, under any name."""
    folder = write_msd_folder(tmp_path, 12, shape=(8, 8, 8))
    manifest = open_manifest(str(folder))
    sizes = Counter(c.fold for c in manifest.cases)
    assert sorted(sizes) == list(range(manifests.FOLDS))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    train, held_out = manifest.split(2)
    assert {*train} | {*held_out} == {*manifest.cases}
    assert {c.fold for c in held_out} == {2}
    assert 2 not in {c.fold for c in train}

    copies = []
    for number in (3, 7, 11):
        for part in ("imagesTr", "labelsTr"):
            shutil.copy(folder / part / f"BRATS_{number:03d}.nii.gz", folder / part / f"COPY_{number}.nii.gz")
        copies.append((f"BRATS_{number:03d}", f"COPY_{number}"))
    about = json.loads((folder / "dataset.json").read_text())
    about["training"] += [{"image": f"imagesTr/{c}.nii.gz", "label": f"labelsTr/{c}.nii.gz"} for _, c in copies]
    (folder / "dataset.json").write_text(json.dumps(about))
    again = open_manifest(str(folder))
    fold = {c.id: c.fold for c in again.cases}
    assert duplicates(again) == copies
    assert all(fold[original] == fold[copy] for original, copy in copies)
    assert {c.id: c.fold for c in manifest.cases} == {c: f for c, f in fold.items() if not c.startswith("COPY")}


def test_what_dataset_json_states_is_taken(tmp_path: Path) -> None:
    """Subjects, folds and the label convention; a folder known from before is not read again; nonsense is refused."""
    folder = write_msd_folder(tmp_path / "data", 6, shape=(8, 8, 8))
    about = json.loads((folder / "dataset.json").read_text())
    about["convention"] = "brats2023"
    for number, row in enumerate(about["training"]):
        row |= {"subject": f"S{number // 3}", "fold": 3 - number // 3}
    (folder / "dataset.json").write_text(json.dumps(about))
    found = open_manifest(str(folder))
    assert found.convention == "brats2023"
    assert [(c.subject, c.fold) for c in found.cases] == [("S1", 2)] * 3 + [("S0", 3)] * 3
    manifests.write(found, str(tmp_path / "known.jsonl"))
    for label in (folder / str(case.label) for case in found.cases):  # same size, same time: not read again
        about_file = label.stat()
        label.write_bytes(b"x" * about_file.st_size)
        os.utime(label, ns=(about_file.st_atime_ns, about_file.st_mtime_ns))
    assert open_manifest(str(folder), known=str(tmp_path / "known.jsonl")) == found

    del about["training"][0]["fold"]  # stated for some only: dealt to all, by subject
    (folder / "dataset.json").write_text(json.dumps(about))
    assert {len({c.fold for c in open_manifest(str(folder)).cases if c.subject == s}) for s in ("S0", "S1")} == {1}
    for wrong in ({"fold": 5}, {"fold": -1}, {"fold": "x"}):
        about["training"][0] |= wrong
        (folder / "dataset.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match=r"dataset\.json"):
            open_manifest(str(folder))
    about["training"][0]["fold"] = 0
    (folder / "dataset.json").write_text(json.dumps(about | {"convention": "mine"}))
    with pytest.raises(UserError, match="brats2023"):
        open_manifest(str(folder))


def test_subjects_that_share_content_are_one_by_any_way(tmp_path: Path) -> None:
    """A = B in one case and B = C in another: all cases of A, B and C stand on one side of every split."""
    folder = write_msd_folder(tmp_path, 12, shape=(8, 8, 8))
    about = json.loads((folder / "dataset.json").read_text())
    about["training"].sort(key=lambda row: row["image"])
    for row, subject in zip(about["training"], "AABBCCDEFGHI", strict=True):
        row["subject"] = subject
    (folder / "dataset.json").write_text(json.dumps(about))
    for part in ("imagesTr", "labelsTr"):
        for original, copy in ((2, 3), (4, 5)):
            shutil.copy(folder / part / f"BRATS_{original:03d}.nii.gz", folder / part / f"BRATS_{copy:03d}.nii.gz")
    fold = {c.subject: c.fold for c in open_manifest(str(folder)).cases}
    assert len({c.fold for c in open_manifest(str(folder)).cases if c.subject in "ABC"}) == 1
    assert sorted(Counter(fold[s] for s in "ADEFGHI").values()) == [1, 1, 1, 2, 2]


def test_identity_is_that_of_content_and_preprocessing(tmp_path: Path) -> None:
    """A changed byte, a case more or less, or other preprocessing change it; where the folder lies does not."""
    folder = write_msd_folder(tmp_path / "here", 3, shape=(8, 8, 8))
    cases = open_manifest(str(folder)).cases
    first = dataset_identity(cases, OPTIONS)
    moved = shutil.copytree(folder, tmp_path / "there")
    assert dataset_identity(open_manifest(str(moved)).cases, OPTIONS) == first
    assert dataset_identity(cases, {"spacing_mm": 1.5}) != first
    assert dataset_identity(cases[:-1], OPTIONS) != first
    for part in ("imagesTr", "labelsTr"):
        path = moved / part / "BRATS_002.nii.gz"
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
        changed = dataset_identity(open_manifest(str(moved)).cases, OPTIONS)
        assert changed != first
        content[-9] ^= 1
        path.write_bytes(content)
    assert dataset_identity(open_manifest(str(moved)).cases, OPTIONS) == first


def test_a_manifest_file_comes_back_whole(tmp_path: Path) -> None:
    """What `write` wrote, `read` and `open_manifest` read: every field, also of store cases and phantoms."""
    manifest = open_manifest(str(write_brats_folder(tmp_path / "brats", 3, shape=(8, 8, 8))))
    stored = tuple(dataclasses.replace(c, object="objects/x", object_sha256="ab") for c in manifest.cases)
    for one in (manifest, dataclasses.replace(manifest, cases=stored, synthetic=True)):
        manifests.write(one, str(tmp_path / "index.jsonl"))
        assert open_manifest(str(tmp_path / "index.jsonl")) == one


@pytest.mark.parametrize("content", [b"", b"[]\n", b"{}\n", b"\xff\n", b"3\n", b'{"root": "x"}\n{"id": 3}\n', b"{"])
def test_a_file_that_is_no_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    """Anything else under that name is a UserError with the command that writes one."""
    (tmp_path / "index.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.jsonl is not a manifest; write it with"):
        open_manifest(str(tmp_path / "index.jsonl"))


def test_checksums_see_every_case_in_order(tmp_path: Path) -> None:
    """`progress` is handed every case once, in order; checksums are those of the files' bytes, images first."""
    manifest = scan(str(write_msd_folder(tmp_path, 3, shape=(8, 8, 8))))
    seen: list[str] = []

    def progress(rows: Any, count: int) -> Any:
        for row in rows:
            seen.append(f"{row.id} of {count}")
            yield row

    cases = checksummed(manifest, progress).cases
    assert seen == ["BRATS_001 of 3", "BRATS_002 of 3", "BRATS_003 of 3"]
    assert len({c.sha256 for c in cases}) == 3
    assert {c.sha256 for c in manifest.cases} == {""}


def test_images_to_segment_need_no_label(tmp_path: Path) -> None:
    """`predict` takes one file, a folder of files, or a known layout, and never reads a label."""
    folder = write_msd_folder(tmp_path, 2, shape=(8, 8, 8))
    shutil.rmtree(folder / "labelsTr")
    image = folder / "imagesTr" / "BRATS_002.nii.gz"
    expected = Case("BRATS_002", "BRATS_002", ("BRATS_002.nii.gz",), None, image.stat().st_size)
    assert scan_images([str(image)])[0] == [(str(image.parent), expected)]
    assert [c.id for _, c in scan_images([str(image.parent)])[0]] == ["BRATS_001", "BRATS_002"]
    ((root, case), _) = scan_images([str(folder)])[0]
    assert (root, case.images, case.label) == (str(folder), ("imagesTr/BRATS_002.nii.gz",), None)
    with pytest.raises(UserError, match="does not exist"):
        scan_images([str(folder / "none.nii.gz")])


def test_index_replaces_only_what_it_made_of_the_same_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another folder's manifest, and a file that is none, need --overwrite; a store's index is never replaced."""
    one, other = (str(write_msd_folder(tmp_path / name, 2, shape=(8, 8, 8))) for name in ("one", "other"))
    (tmp_path / "link").symlink_to("one")
    out = tmp_path / "m.jsonl"
    for data in (one, one + "/../one", str(tmp_path / "link")):
        assert index.main(["--data", data, "--out", str(out)]) == 0
    before = out.read_bytes()
    assert index.main(["--data", other, "--out", str(out)]) == 2 and out.read_bytes() == before
    assert f"is the manifest of {tmp_path}" in capsys.readouterr().err
    assert index.main(["--data", other, "--out", str(out), "--overwrite"]) == 0 and out.read_bytes() != before
    header, first, *_ = out.read_text().splitlines()
    out.write_text(f"{header}\n{first}\n")  # somebody took a case out
    assert index.main(["--data", other, "--out", str(out)]) == 2 and "changed by hand" in capsys.readouterr().err
    assert len(open_manifest(str(out)).cases) == 1
    for content in (b'{"text": "mine"}\n', b""):
        out.write_bytes(content)
        assert index.main(["--data", one, "--out", str(out)]) == 2 and out.read_bytes() == content
    stored = open_manifest(one)
    cases = tuple(dataclasses.replace(case, object="objects/x.parquet") for case in stored.cases)
    manifests.write(dataclasses.replace(stored, cases=cases), str(out))
    assert index.main(["--data", one, "--out", str(out), "--overwrite"]) == 2
    assert index.main(["--data", one, "--out", str(tmp_path / "new.jsonl"), "--overwrite"]) == 0


def test_a_cluster_reads_large_sets_and_the_manifest_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checksums, label values and changes are found by whoever reads, in any order; small sets are read here; where no
    cluster is, threads read."""
    folder = write_brats_folder(tmp_path / "data", 6)
    alone, asked = open_manifest(str(folder)), []

    def spread(function: Any, rows: list[Any], root: str) -> Any:
        asked.append((len(rows), root))
        return (pickle.loads(pickle.dumps(function))(row) for row in reversed(rows))

    assert open_manifest(str(folder), spread=spread) == alone
    assert not asked
    monkeypatch.setattr("raytrain_brats.cases.scan.SPREAD_BYTES", 1)
    assert open_manifest(str(folder), spread=spread) == alone
    assert open_manifest(str(folder), spread=lambda *_: None) == alone
    out = str(tmp_path / "m.jsonl")
    manifests.write(alone, out)
    assert open_manifest(str(folder), known=out, spread=spread) == alone  # nothing to read
    assert open_manifest(out, spread=spread) == alone
    assert asked == [(6, str(folder))]

    label = next(folder.rglob("*seg.nii.gz"))
    label.write_bytes(label.read_bytes() + b"\0")
    os.utime(label, ns=(1, 1))
    with pytest.raises(UserError, match=r"changed since .* was written"):
        open_manifest(out, spread=spread)
    assert asked[1:] == [(1, str(folder))]
    monkeypatch.setattr("raytrain_brats.storage.read_bytes", _fails)
    with pytest.raises(OSError, match="the disk is gone"):
        checksummed(scan(str(folder)), spread=spread)


def _fails(uri: str) -> bytes:
    raise OSError("the disk is gone")
