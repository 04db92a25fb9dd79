"""No command replaces what it did not make: places are compared, records kept, data protected. Files are real ones."""

import json
import os
from pathlib import Path

import pytest

from raytrain_brats import outputs, storage
from raytrain_brats.errors import UserError
from raytrain_brats.outputs import claim, claim_file, place, same, within

MADE = {"a.nii.gz": "scan a, checkpoint 1", "b.nii.gz": "scan b, checkpoint 1"}
NEW = {name: origin.replace("1", "2") for name, origin in MADE.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_one_place_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links, `..`, relative paths, file://, hard links; on S3 doubled and trailing slashes, `.` and `..`."""
    (tmp_path / "scans").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "results").symlink_to("scans")
    scan = tmp_path / "scans" / "a.nii.gz"
    scan.write_bytes(b"scan")
    os.link(scan, tmp_path / "work" / "copy.nii.gz")
    monkeypatch.chdir(tmp_path / "work")
    folder = str(tmp_path / "scans")
    for spelling in ("../scans", "../results/", f"file://{folder}", f"{folder}/../results/.", tmp_path / "results"):
        assert place(spelling) == folder
        assert within(str(Path(str(spelling).removeprefix("file://"), "a.nii.gz")), folder)
    assert same("copy.nii.gz", str(scan)) and not same("other.nii.gz", str(scan))
    assert within("/", "/") and within(folder, "/") and not within(folder + "-2", folder)
    assert not within(str(tmp_path), folder)

    for spelling in ("s3://b/x/y", "s3://b//x//y/", "s3://b/x/./y", "s3://b/x/z/../y", "s3://b/../x/y"):
        assert place(spelling) == "s3://b/x/y"
        assert within(f"{spelling}/z", "s3://b/x") and within(spelling, "s3://b") and same(spelling, "s3://b/x/y")
    assert place("s3://b/") == place("s3://b") == "s3://b"
    assert not within("s3://b/xy", "s3://b/x")
    with pytest.raises(UserError, match="only local paths"):
        place("gs://b/x")


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else f"{request.getfixturevalue('s3_server')}/out"


def make(out: str, *names: str, content: bytes = b"made") -> None:
    for name in names:
        storage.write_bytes(storage.join(out, name), content)


def test_the_same_command_goes_on_and_another_is_refused(out: str) -> None:
    """What is there from the same inputs is told; from others it is refused with both named, or made anew when asked,
    also when that was stopped half-way."""
    assert claim(out, "predict", MADE, settings={"convention": "msd"}) == set()
    make(out, "a.nii.gz")
    assert claim(out, "predict", MADE, settings={"convention": "msd"}) == {"a.nii.gz"}
    (maker, about), record = *outputs.recorded(out)["makers"].items(), outputs.recorded(out)
    assert about == {"convention": "msd"} and {f["by"] for f in record["files"].values()} == {maker}

    for command, origins in (("predict", NEW), ("expand", MADE)):
        with pytest.raises(UserError, match=r"a\.nii\.gz.*--overwrite") as caught:
            claim(out, command, origins)
        assert command == "expand" or ("checkpoint 1" in str(caught.value) and "checkpoint 2" in str(caught.value))
        assert outputs.recorded(out) == record
    for _ in range(2):  # stopped before a was made anew: what is there is still the old one
        assert claim(out, "predict", NEW, overwrite=True) == set()
        assert claim(out, "predict", NEW) == set()
    make(out, "a.nii.gz", content=b"made anew")
    assert claim(out, "predict", NEW) == {"a.nii.gz"}
    with pytest.raises(UserError, match="checkpoint 2; now it would be from"):
        claim(out, "predict", MADE)


def test_a_foreign_file_stays_unless_asked(out: str) -> None:
    """Nothing is written before the refusal, not even the record; --overwrite is an answer."""
    make(out, "b.nii.gz", content=b"mine")
    with pytest.raises(UserError, match=r"b\.nii\.gz is there already.*give another --place"):
        claim(out, "predict", MADE, option="--place")
    assert list(storage.list_files(out)) == ["b.nii.gz"]
    assert claim(out, "predict", MADE, overwrite=True) == set()
    make(out, "b.nii.gz", content=b"new one")
    assert claim(out, "predict", MADE) == {"b.nii.gz"}


def test_several_commands_share_a_folder(out: str) -> None:
    """Each keeps its own files' record; those whose files are gone from it are dropped."""
    claim(out, "predict", MADE, settings={"run": 1})
    claim(out, "predict", {"c.nii.gz": "scan c"}, settings={"run": 2})
    claim(out, "index", {"m.jsonl": "data"})
    record = outputs.recorded(out)
    assert sorted(record["files"]) == ["a.nii.gz", "b.nii.gz", "c.nii.gz", "m.jsonl"]
    assert len(record["makers"]) == 3
    claim(out, "predict", MADE, settings={"run": 2})
    assert {"run": 1} not in outputs.recorded(out)["makers"].values()


def test_inputs_and_labels_are_never_replaced(tmp_path: Path) -> None:
    """By link, hard link or `..`; what a dataset.json names, labelsTr, a case's files: not even with --overwrite."""
    data = tmp_path / "data"
    for name in ("imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "truth/a.nii.gz", "p1/p1_seg.nii.gz", "p1/p1-t1n.nii"):
        make(str(data), name, content=b"precious")
    named = {"training": [{"image": "./imagesTr/a.nii.gz", "label": "truth/a.nii.gz"}], "test": ["x/gone.nii.gz"]}
    (data / "dataset.json").write_text(json.dumps(named))
    make(str(data / "other"), "hard")
    (tmp_path / "here").mkdir()
    os.link(data / "imagesTr/a.nii.gz", tmp_path / "here/a.nii.gz")
    (tmp_path / "link").symlink_to("data/truth")
    before = contents(tmp_path)
    scan = str(data / "imagesTr/a.nii.gz")
    for out, name, told in (
        (data / "other/../imagesTr", "a.nii.gz", "is an input"),
        (tmp_path / "here", "a.nii.gz", "is an input"),
        (data / "labelsTr", "a.nii.gz", "data set's labelsTr"),
        (tmp_path / "link", "a.nii.gz", "named by .*dataset.json"),
        (data / "p1", "p1_seg.nii.gz", "an image or a label"),
        (data / "p1", "p1-t1n.nii", "an image or a label"),
        (data, "truth", "is a folder"),
    ):
        with pytest.raises(UserError, match=told):
            claim(str(out), "predict", {name: "x"}, protected=[scan], overwrite=True)
        with pytest.raises(UserError, match=told):
            claim_file(str(out / name), lambda _: False, protected=[scan], overwrite=True)
    assert contents(tmp_path) == before


def test_a_file_that_tells_itself_what_made_it(tmp_path: Path) -> None:
    """It may be replaced by the same command with the same inputs, by others when asked."""
    page = tmp_path / "page.html"
    claim_file(str(page), lambda _: False)
    page.write_text("ours")
    claim_file(str(page), lambda content: content == b"ours")
    with pytest.raises(UserError, match="--overwrite"):
        claim_file(str(page), lambda content: content == b"others'")
    claim_file(str(page), lambda _: False, overwrite=True)


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    """It is neither trusted nor replaced."""
    for content in ("[]", "{", '{"made_by": "another"}', '{"made_by": "raytrain-brats", "makers": {}, "files": [1]}'):
        (tmp_path / outputs.RECORD).write_text(content)
        with pytest.raises(UserError, match=r"made-by\.json is damaged"):
            claim(str(tmp_path), "predict", MADE, overwrite=True)
        assert (tmp_path / outputs.RECORD).read_text() == content
