"""Commands and files that are not theirs: refused by name before the first byte, and all is there afterwards.

Ray is replaced by a plain map, the network by one that finds nothing; test_pipeline runs the same commands on both.
"""

import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import ray
import torch

from raytrain_brats import config, evaluate, outputs, predict, storage
from raytrain_brats.ray_ext import cluster
from raytrain_brats.run import checkpoint, driver, spec
from raytrain_brats.run.worker import train_step_of
from raytrain_brats.synthetic import phantom
from raytrain_brats.synthetic.phantom import write_set
from scripts import bench, demo_story
from scripts.bench_pipelines import common
from tests.support.cases import write_msd_folder
from tests.support.run_folders import write_run

SMALL = ("preprocess.spacing_mm=1.0", "data.patch_xyz=[16, 16, 16]")
NAMES = [f"BRATS_{number:03d}.nii.gz" for number in range(1, 7)]
Call = Callable[..., str]


class Box:
    """What stands for an object in Ray's store."""

    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process; what it printed. It must end with 0."""

    def here(
        function: Callable[[Any], Any], items: Iterable[Any], on_gpus: bool = False, read: Any = None, **_: Any
    ) -> Iterable[Any]:
        return map(function, map(read, items) if read else items)

    fakes = {
        "connect": lambda **_: None,
        "check_shared": lambda *_: None,
        "parallel_map": here,
        "at_once": lambda **_: 1,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(cluster, name, fake)
    for module in (evaluate, predict):  # what it finds is no matter here, and takes seconds
        monkeypatch.setattr(
            module,
            "native_probabilities",
            lambda prepared, *_, **__: np.zeros((3, *prepared.geometry.native_shape), "f4"),
        )
    monkeypatch.setattr(ray, "put", Box)
    monkeypatch.setattr(ray, "get", lambda box: box.value)

    def call(command: str, *arguments: Any) -> str:
        code = importlib.import_module(f"raytrain_brats.{command}").main([str(a) for a in arguments])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return call


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Run a command that must end as a user's mistake, without Ray, with every file as it was; its one line."""

    def call(command: str, *arguments: Any) -> str:
        before = snapshot(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(cluster, "connect", lambda **_: pytest.fail("Ray was started before the refusal"))
            module = {"bench": "scripts.bench", "demo": "scripts.demo_story"}.get(command, f"raytrain_brats.{command}")
            code = importlib.import_module(module).main([str(a) for a in arguments])
        printed = capsys.readouterr().err
        assert code == 2 and printed.startswith("error: ") and printed.count("\n") == 1, printed
        assert snapshot(tmp_path) == before
        return printed

    return call


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file, hidden ones too."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, six MSD cases, and `run`, a run on it with one checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    write_msd_folder(folder / "data", 6, shape=(16, 14, 12))
    run_spec = spec.build(config.load("demo", SMALL), str(folder / "run"), str(folder / "data"), "")
    spec.write_config(run_spec)
    checkpoint.save(run_spec.run_dir, 4, 1, *train_step_of(run_spec, 1, torch.device("cpu")).state())
    return folder


@pytest.fixture
def made(_made: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test, with the times of change."""
    shutil.copytree(_made, tmp_path / "made")
    return tmp_path / "made"


def train_on(run: Path, data: Path) -> None:
    """Another checkpoint of the run, of other weights."""
    run_spec = spec.build(config.load("demo", (*SMALL, "train.seed=0")), str(run), str(data), "")
    train_step = train_step_of(run_spec, 1, torch.device("cpu"))
    tensors, state = train_step.state()
    checkpoint.save(str(run), 8, 1, {n: t + 0.01 if t.is_floating_point() else t for n, t in tensors.items()}, state)


def test_predict_goes_nowhere_where_images_or_labels_lie(made: Path, refused: Call, tmp_path: Path) -> None:
    """The images' folder by `..` and by a link, hard links to a scan, labelsTr by any name, the run's own folders."""
    data, run = made / "data", made / "run"
    (made / "link").symlink_to("data/imagesTr")
    (made / "truth").symlink_to("data/labelsTr")
    (made / "here").mkdir()
    os.link(data / "imagesTr" / NAMES[0], made / "here" / NAMES[0])
    ready = ("predict", "--run-dir", run, "--overwrite", "--images")
    for images in (data, data / "imagesTr", data / "imagesTr" / NAMES[0]):
        for out in (data / "imagesTr", data / "labelsTr/../imagesTr", made / "link"):
            assert f"{data}/imagesTr/BRATS_00" in refused(*ready, images, "--out", out)
        assert str(made / "here" / NAMES[0]) in refused(*ready, images, "--out", made / "here")
        for out in (data / "labelsTr", made / "truth"):
            assert "labelsTr" in refused(*ready, images, "--out", out)
        for out in (run, run / "checkpoints/x", made / "data/../run/evaluation"):
            assert "run's own files" in refused(*ready, images, "--out", out)
    (data / "labelsTr").rename(data / "truth")
    about = (data / "dataset.json").read_text().replace("labelsTr", "truth")
    (data / "dataset.json").write_text(about)
    assert f"named by {data}/dataset.json" in refused(*ready, data, "--out", data / "truth")


def test_predict_makes_what_is_missing_and_replaces_nothing_else(made: Path, done: Call, refused: Call) -> None:
    """The same command again, more cases, a lost file, one corrected by hand; another checkpoint, with and without
    --overwrite; a foreign file. The record tells what the values mean."""
    run, data, out = made / "run", made / "data", made / "out"
    scans = [data / "imagesTr" / name for name in NAMES]
    ready = ("predict", "--run-dir", run, "--out", out, "--images")
    assert "2 label volumes in" in done(*ready, *scans[:2])
    record = json.loads((out / outputs.RECORD).read_text())
    (about,) = record["makers"].values()
    assert about["convention"] == "msd" and about["labels"]["3"] == "enhancing tumour" and about["run"] == str(run)
    assert about["modalities"] == ["FLAIR", "T1w", "T1gd", "T2w"]
    assert re.search(r"checkpoint 000000000004-g0001 \(\w{8}\), labels msd", about["made_with"])
    (out / NAMES[0]).write_bytes(b"corrected by hand")
    before = snapshot(out)
    assert "4 label volumes made, 2 were there already" in done(*ready, data / "imagesTr")
    assert snapshot(out).items() >= {p: c for p, c in before.items() if not p.endswith("json")}.items()
    (out / NAMES[5]).unlink()
    assert "1 label volumes made, 5 were there already" in done(*ready, data / "imagesTr")
    assert "0 label volumes made, 6 were there already" in done(*ready, data / "imagesTr")

    train_on(run, data)
    said = refused(*ready, data)
    assert "000000000004-g0001" in said and "000000000008-g0001" in said and "--overwrite" in said
    first = (out / NAMES[1]).read_bytes()
    assert "6 label volumes in" in done(*ready, data, "--overwrite")
    assert (out / NAMES[0]).read_bytes() != b"corrected by hand"
    assert "0 label volumes made, 6" in done(*ready, data) and first
    (made / "other").mkdir()
    (made / "other" / NAMES[2]).write_bytes(b"mine")
    other = ("predict", "--run-dir", run, "--out", made / "other", "--images", data)
    assert str(made / "other" / NAMES[2]) in refused(*other)
    assert not (made / "other" / outputs.RECORD).exists()


def test_an_earlier_evaluation_is_kept_whole(made: Path, done: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another split or checkpoint: the one before is moved with its overlays; the same again takes its own place; one
    that is stopped while it is written loses nothing."""
    run, data = made / "run", made / "data"
    ready = ("evaluate", "--run-dir", run, "--data", data, "--overlays", 1)
    done(*ready)
    first = {p.name: p.read_bytes() for p in (run / "evaluation").rglob("*") if p.is_file()}
    summary = json.loads(first["summary.json"])
    assert {"checkpoint", "split", "data_root", "identity", "convention"} <= summary.keys()
    assert summary["data_root"] == str(data) and summary["convention"] == "msd"
    assert "that was there" not in done(*ready) and not (run / "evaluations").exists()

    real = storage.write_bytes

    def stopped(uri: str, content: bytes) -> None:
        if uri.endswith("evaluation/cases.csv"):
            raise KeyboardInterrupt
        real(uri, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", stopped)
        assert evaluate.main([*map(str, ready[1:]), "--split", "all"]) == 130
    kept = run / "evaluations" / f"000000000004-g0001-val-{summary['identity'][:8]}"
    assert {p.name: p.read_bytes() for p in kept.rglob("*") if p.is_file()} == first
    assert not (run / "evaluation/summary.json").exists()
    done(*ready, "--split", "all")
    assert json.loads((run / "evaluation/summary.json").read_text())["split"] == "all"
    assert [p.name for p in (run / "evaluation/overlays").iterdir()] == ["BRATS_001.png"]

    train_on(run, data)
    done(*ready)
    done(*ready, "--split", "all")
    names = {path.name.rpartition("-")[0] for path in (run / "evaluations").iterdir()} - {""}
    assert {"000000000004-g0001-val", "000000000004-g0001-all", "000000000008-g0001-val"} <= names
    assert {p.name: p.read_bytes() for p in kept.rglob("*") if p.is_file()} == first


def test_mirroring_is_recorded_and_makes_another_result(made: Path, done: Call, refused: Call) -> None:
    """By default with eight views, told and noted; without, what was there is kept."""
    run, data = made / "run", made / "data"
    assert "8 mirror images" in done("evaluate", "--run-dir", run, "--data", data, "--overlays", 0)
    assert json.loads((run / "evaluation/summary.json").read_text())["mirror"] is True
    assert "as one image" in done("evaluate", "--run-dir", run, "--data", data, "--no-mirror", "--overlays", 0)
    (kept,) = (run / "evaluations").iterdir()
    summaries = [json.loads((folder / "summary.json").read_text())["mirror"] for folder in (run / "evaluation", kept)]
    assert summaries == [False, True]
    ready = ("predict", "--run-dir", run, "--images", data, "--out", made / "out")
    assert "as 8 mirror images each" in done(*ready)
    (about,) = outputs.recorded(str(made / "out"))["makers"].values()
    assert about["mirror"] is True and about["made_with"].endswith("labels msd, mirrored")
    assert "was made from" in refused(*ready, "--no-mirror")


def test_a_move_that_was_stopped_goes_on(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On S3 nothing can be renamed: killed at any request, each file is whole in the old place or in the new."""
    files = {"summary.json": b'{"checkpoint": "c", "split": "val", "identity": "0123456789"}', "cases.csv": b"a"}
    files |= {f"overlays/{n}.png": bytes([n]) for n in range(3)}
    wanted = {"checkpoint": "c", "split": "all"}
    real = {name: getattr(storage, name) for name in ("write_bytes", "delete")}
    for point in range(11):
        run, left = f"{s3_server}/run{point}", [point]
        for name, content in files.items():
            storage.write_bytes(f"{run}/evaluation/{name}", content)

        def dying(name: str, left: list[int] = left) -> Callable[..., None]:
            def operation(*arguments: Any) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                real[name](*arguments)

            return operation

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(storage, name, dying(name))
            if point < 10:
                with pytest.raises(KeyboardInterrupt):
                    evaluate._keep_earlier(run, wanted)
        evaluate._keep_earlier(run, wanted)
        found = {n: storage.read_bytes(f"{run}/{n}") for n in storage.list_files(run)}
        assert found == {f"evaluations/c-val-01234567/{name}": content for name, content in files.items()}


def test_report_replaces_its_own_page_alone(tmp_path: Path, done: Call, refused: Call) -> None:
    """A page of another run, a foreign file, files of the run; --overwrite is an answer to the first two."""
    run, out = write_run(tmp_path / "run"), tmp_path / "page.html"
    other = write_run(tmp_path / "other", events=[])
    for target in ((), ("--out", out)):
        done("report", "--run-dir", run, *target)
        done("report", "--run-dir", run, *target)
    assert str(out) in refused("report", "--run-dir", other, "--out", out)
    done("report", "--run-dir", other, "--out", out, "--overwrite")
    (run / "report.html").write_text("<html>mine</html>")
    assert f"{run}/report.html" in refused("report", "--run-dir", run)
    for flag in ((), ("--overwrite",)):
        assert "input" in refused("report", "--run-dir", run, "--out", run / "metrics.jsonl", *flag)


def test_phantoms_go_to_their_own_folder(tmp_path: Path, done: Call, refused: Call) -> None:
    """A real set whose names are the same, other phantoms, other files; the same go on, and more are added."""
    real, out = write_msd_folder(tmp_path / "real", 2, shape=(8, 8, 8)), tmp_path / "phantoms"
    few = ("--grid", "32", "--anatomy", "procedural", "--cases")
    assert f"{real}/dataset.json" in refused("phantom", "--out", real, *few, 1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    assert "mine.txt" in refused("phantom", "--out", tmp_path / "notes", *few, 1)
    assert "2 phantoms" in done("phantom", "--out", out, *few, 2)
    (out / "imagesTr" / NAMES[0]).write_bytes(b"changed by somebody")
    before = snapshot(out)
    assert "already" in done("phantom", "--out", out, *few, 2) and snapshot(out) == before
    assert "already" in done("phantom", "--out", out, *few, 1) and snapshot(out) == before
    for other in (("--seed", 1), ("--grid", 40)):
        assert f"{out}/dataset.json" in refused("phantom", "--out", out, *few, 2, *other)

    (out / "labelsTr" / NAMES[1]).unlink()
    assert "2 phantoms" in done("phantom", "--out", out, *few, 3)
    kept = {p: c for p, c in before.items() if not p.endswith(("dataset.json", f"labelsTr/{NAMES[1]}"))}
    assert snapshot(out).items() >= kept.items()
    assert len(json.loads((out / "dataset.json").read_text())["training"]) == 3


def test_a_set_of_phantoms_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """What was drawn stays; until it is finished dataset.json names no case."""

    def dying(function: Callable[[int], Any], numbers: list[int]) -> Iterable[Any]:
        function(numbers[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_set(str(tmp_path), 2, 0, 32, "procedural", dying)
    first, about = snapshot(tmp_path / "imagesTr"), json.loads((tmp_path / "dataset.json").read_text())
    assert len(first) == 1 and about["training"] == []
    write_set(str(tmp_path), 2, 0, 32, "procedural")
    assert snapshot(tmp_path / "imagesTr").items() >= first.items()
    assert phantom.missing(str(tmp_path), 2, 0, 32, "procedural") == ([], [])


def test_train_begins_no_run_among_other_files(
    made: Path, refused: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A data folder, a store, another program's project; what a killed start of ours leaves is no hindrance."""
    (made / "store/objects").mkdir(parents=True)
    (made / "store/index.jsonl").write_text("{}")
    (made / "project/checkpoints").mkdir(parents=True)
    (made / "project/checkpoints/model_final.pth").write_bytes(b"weights")
    ready = ("train", "--data", made / "data", *(f"--set={s}" for s in SMALL), "--run-dir")
    assert "data holds dataset.json" in refused(*ready, made / "data")
    assert "store holds index.jsonl" in refused(*ready, made / "store")
    assert "project holds checkpoints/model_final.pth" in refused(*ready, made / "project")
    (made / "project/config.yaml").write_text("lr: 0.1\n")
    assert "project/config.yaml is not a run's" in refused(*ready, made / "project")

    (made / "begun").mkdir()
    for name in ("lease.json", "generation.json", "plan.json", "write-probe", ".lease.json.lock"):
        (made / "begun" / name).write_text("{}")
    for name in ("connect", "check_shared"):
        monkeypatch.setattr(cluster, name, lambda *_, **__: None)
    monkeypatch.setattr(driver, "check", lambda _: pytest.skip("begun: the rest is training"))
    from raytrain_brats import train

    with pytest.raises(pytest.skip.Exception):
        train.main([str(a) for a in (*ready[1:], made / "begun")])


def test_bench_keeps_figures_and_folders_that_are_not_its_own(tmp_path: Path, refused: Call) -> None:
    """Other settings' figures, a foreign JSON, a folder of data: told before anything is measured."""
    made = common.check_places("data", bench.Data())
    figures = tmp_path / "figures.json"
    figures.write_text(json.dumps(made | {"pipelines": {}}))
    common.check_places("data", bench.Data(json=str(figures)))
    ready = ("bench", "data", "--peers", "", "--cases", 2, "--grid", 32)
    assert str(figures) in refused(*ready, "--json", figures)
    figures.write_text('{"mine": 1}')
    assert str(figures) in refused("bench", "prepare", "--json", figures)
    common.check_places("data", bench.Data(json=str(figures), overwrite=True))
    (tmp_path / "work/source").mkdir(parents=True)
    (tmp_path / "work/source/dataset.json").write_text("{}")
    assert "source/dataset.json" in refused(*ready, "--work", tmp_path / "work")
    for _ in range(2):
        common.check_places("data", bench.Data(work=str(tmp_path / "new")))
        (tmp_path / "new/source").mkdir(exist_ok=True)
        (tmp_path / "new/source/dataset.json").write_text("{}")


def test_the_demo_goes_on_by_default(
    made: Path, tmp_path: Path, refused: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the same: all stays. Other arguments are refused with both shown. --fresh deletes what the demo made, and
    nothing at all where something else lies among it."""
    out, data = tmp_path / "demo", made / "data"

    def stage(command: str, *arguments: str) -> float:
        if command == "train":
            assert {"--recipe", "demo"} <= set(arguments)
            (out / "run").mkdir(exist_ok=True)
            (out / "run/config.yaml").touch()
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(cluster, "connect", lambda **_: None)
    monkeypatch.setattr(demo_story, "stage", stage)
    ready = ("--out", str(out), "--data", str(data))
    assert demo_story.main([*ready]) == 130
    (out / "run/metrics.jsonl").write_text("trained for hours\n")
    before = snapshot(out)
    assert demo_story.main([*ready, "--chaos"]) == 130
    assert {p: content for p, (content, _) in snapshot(out).items()} == {
        p: content for p, (content, _) in before.items()
    }
    capsys.readouterr()
    for other in ((*ready, "--set", "train.epochs=3"), (*ready, "--recipe", "demo_dynunet"), ready[:2]):
        said = refused("demo", *other)
        assert str(data) in said and "--fresh" in said
    said = refused("demo", *ready, "--set", "train.epochs=3")
    assert "set none" in said and "train.epochs=3" in said

    for name in ("run/notes.md", "run/scan.nii.gz", "predictions/mine.txt", "data/dataset.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
        assert str(out / name) in refused("demo", *ready, "--fresh")
        (out / name).unlink()
    (out / "data/imagesTr").symlink_to(data / "imagesTr")
    assert "imagesTr" in refused("demo", *ready, "--fresh")
    (out / "data/imagesTr").unlink()
    precious = snapshot(made)
    assert demo_story.main([*ready, "--fresh", "--set", "train.epochs=3"]) == 130
    assert not (out / "run/metrics.jsonl").exists() and snapshot(made) == precious


def test_s3_is_as_safe_as_a_disk(s3_server: str, made: Path, done: Call, capsys: pytest.CaptureFixture[str]) -> None:
    """Images and predictions in a bucket: the scans' folder spelt otherwise is refused, the same command goes on."""
    bucket = s3_server.removeprefix("s3://")
    for name in NAMES[:2]:
        boto3.client("s3").upload_file(str(made / "data/imagesTr" / name), bucket, f"scans/{name}")
    ready = ("predict", "--run-dir", made / "run", "--images", f"{s3_server}/scans", "--out")
    before = storage.list_files(s3_server)
    for out in (f"{s3_server}/scans/", f"{s3_server}//scans", f"{s3_server}/out/../scans"):
        assert predict.main([*map(str, ready[1:]), out, "--overwrite"]) == 2
        assert "scans/BRATS_00" in capsys.readouterr().err
    assert storage.list_files(s3_server) == before
    assert "2 label volumes in" in done(*ready, f"{s3_server}/out")
    assert "0 label volumes made, 2 were there already" in done(*ready, f"{s3_server}/out")
