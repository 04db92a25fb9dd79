"""A user's mistake ends with exit code 2 and one line that names it: no traceback, and before Ray starts."""

import dataclasses
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain_brats import __main__, cli, config, train
from raytrain_brats.cases import scan
from raytrain_brats.config import Run
from raytrain_brats.data import store as stores
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.ray_ext import cluster, roles
from raytrain_brats.run import checkpoint, spec
from raytrain_brats.run.worker import train_step_of
from tests.support.cases import write_msd_folder

Call = Callable[..., str]


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """These mistakes must be found without a cluster, and without what the environment may give."""
    for name in ("DATA", "STORE", "RUN_DIR"):
        monkeypatch.delenv(f"RAYTRAIN_BRATS_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started before the mistake was found")

    monkeypatch.setattr(cluster, "connect", refuse)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command that must fail as a user's mistake; its one line."""

    def call(command: str, *arguments: Any) -> str:
        module = "scripts.demo_story" if command == "demo" else f"raytrain_brats.{command}"
        code = importlib.import_module(module).main([str(a) for a in arguments])
        return _mistake(code, capsys.readouterr().err)

    return call


def _mistake(code: int, printed: str) -> str:
    assert code == 2, printed
    lines = printed.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in printed, printed
    return lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_msd_folder(tmp_path_factory.mktemp("data"), 3, shape=(8, 8, 8))


@pytest.fixture(scope="module")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo recipe on `data`, with a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    run_spec = spec.build(config.load("demo"), str(folder), str(data), None)
    spec.write_config(run_spec)
    checkpoint.save(str(folder), 4, 1, *train_step_of(run_spec, 1, torch.device("cpu")).state())
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A regular file: nothing can be written below it, whoever runs the test."""
    (tmp_path / "a-file").write_text("in the way")
    return tmp_path / "a-file"


@pytest.mark.parametrize("command", ["train", "index", "prepare"])
def test_data_folders_without_data(command: str, fails: Call, tmp_path: Path) -> None:
    """A missing, an empty and a foreign folder are told apart, by name."""
    place = {"train": "--run-dir", "index": "--out", "prepare": "--store"}[command]
    where = (place, tmp_path / "out.jsonl")
    for name in ("void", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("no case")
    assert f"{tmp_path}/gone does not exist" in fails(command, "--data", tmp_path / "gone", *where)
    assert f"{tmp_path}/void holds no files" in fails(command, "--data", tmp_path / "void", *where)
    assert f"{tmp_path}/foreign holds no case" in fails(command, "--data", tmp_path / "foreign", *where)
    assert "x.jsonl does not exist" in fails(command, "--data", tmp_path / "x.jsonl", *where)
    assert "gs://" in fails(command, "--data", "gs://bucket/x", *where)


@pytest.mark.parametrize("command", ["train", "prepare", "index", "predict", "evaluate"])
def test_a_place_whose_name_is_no_utf8(command: str, fails: Call, run_dir: Path, tmp_path: Path) -> None:
    """It is shown with its bytes: nothing could print or record it otherwise."""
    odd = os.fsdecode(bytes(tmp_path) + b"/F\xfcrth")
    other = {"train": "--run-dir", "prepare": "--store", "index": "--out", "predict": "--out", "evaluate": "--run-dir"}
    given = "--images" if command == "predict" else "--data"
    more = ("--run-dir", run_dir) if command == "predict" else ()
    place = run_dir if command == "evaluate" else tmp_path / "x.jsonl"
    assert "F\\xfcrth: the name is no UTF-8" in fails(command, given, odd, other[command], place, *more)


def test_cases_without_a_file_are_named(fails: Call, data: Path, tmp_path: Path) -> None:
    """Cases without label, and an image that dataset.json names but nobody finds, when no case is left."""
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "labelsTr" / "BRATS_001.nii.gz").unlink()
    (folder / "labelsTr" / "BRATS_002.nii.gz").unlink()
    (folder / "imagesTr" / "BRATS_003.nii.gz").unlink()
    line = fails("train", "--data", folder, "--run-dir", tmp_path / "run")
    assert "no label in 2, such as BRATS_002" in line and "missing modality in 1" in line
    assert "imagesTr/BRATS_003.nii.gz" in line
    (folder / "dataset.json").write_text("[]")
    assert "dataset.json is not a dataset.json of MSD or nnU-Net" in fails(
        "train", "--data", folder, "--run-dir", tmp_path / "run"
    )


@pytest.mark.parametrize("command", ["train", "prepare"])
@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--recipe", "demoo"], "'demoo' is not known; did you mean demo?"),
        (["--recipe", "no/such.yaml"], "no/such.yaml"),
        (["--set", "train.epoch=3"], "train.epoch is not known; did you mean train.epochs"),
        (["--set", "trainepochs"], "--set trainepochs"),
        (["--set", "train.epochs=0"], "train.epochs"),
    ],
)
def test_recipes_and_settings(
    command: str, arguments: list[str], fragment: str, fails: Call, data: Path, tmp_path: Path
) -> None:
    """Unknown recipes and keys come with the nearest names; bad settings with their text."""
    place = "--run-dir" if command == "train" else "--store"
    assert fragment in fails(command, "--data", data, place, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_train_needs_one_source_and_a_place(fails: Call, data: Path, tmp_path: Path) -> None:
    """Both sources, no run folder, bad workers, a patch that the network cannot halve."""
    both = fails("train", "--data", data, "--store", tmp_path, "--run-dir", tmp_path / "run")
    assert "--data" in both and "--store" in both
    assert "--run-dir" in fails("train", "--data", data)
    ready = ("train", "--data", data, "--run-dir", tmp_path / "run")
    assert "4:2" in fails(*ready, "--workers", "4:2")
    assert "data.patch_xyz 10x8x8" in fails(*ready, "--set", "data.patch_xyz=[10, 8, 8]")


@pytest.mark.parametrize("command", ["train", "index", "prepare", "predict", "phantom", "demo"])
def test_places_that_cannot_be_written(command: str, fails: Call, data: Path, run_dir: Path, file: Path) -> None:
    """A place below a regular file is named, before any work is done."""
    place = file / "x.jsonl"
    arguments: dict[str, tuple[Any, ...]] = {
        "train": ("--data", data, "--run-dir", place),
        "prepare": ("--data", data, "--store", place),
        "predict": ("--run-dir", run_dir, "--images", data, "--out", place),
        "index": ("--data", data, "--out", place),
        "phantom": ("--out", place),
        "demo": ("--out", place),
    }
    assert str(file) in fails(command, *arguments[command])


def test_a_run_is_not_mixed_with_another(fails: Call, data: Path, run_dir: Path, tmp_path: Path) -> None:
    """Other data, other preprocessing and another config are refused, with both values."""
    other = write_msd_folder(tmp_path / "other", 4, shape=(8, 8, 8))
    here = spec.build(config.load("demo"), str(tmp_path / "x"), str(data), None).dataset_identity
    there = spec.build(config.load("demo"), str(tmp_path / "x"), str(other), None).dataset_identity
    line = fails("train", "--data", other, "--run-dir", run_dir)
    assert here in line and there in line and str(run_dir) in line
    assert "identity" in fails("train", "--data", data, "--run-dir", run_dir, "--set", "preprocess.spacing_mm=2")
    settings = ("--set", "train.seed=7", "--set", "data.patches_per_case=9")
    line = fails("train", "--data", data, "--run-dir", run_dir, *settings)
    assert "train.seed: 0 -> 7" in line and "data.patches_per_case: 4 -> 9" in line


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_stores_that_do_not_fit(command: str, fails: Call, data: Path, run_dir: Path, tmp_path: Path) -> None:
    """A store that is missing, unfinished or prepared otherwise is named."""
    store, found = tmp_path / "store", scan.open_manifest(str(data))
    target = tmp_path / "run" if command == "train" else run_dir
    run = (command, "--store", store, "--run-dir", target)
    assert f"{store} is not a finished store" in fails(*run)
    (store / "objects").mkdir(parents=True)
    (store / "objects" / "0.parquet").write_bytes(b"x")
    assert f"{store} is not a finished store" in fails(*run)
    stores.write_index(str(store), found, {"spacing_mm": 2.5})
    line = fails(*run)
    assert str(store) in line and "2.5" in line and "preprocess" in line
    (store / "index.jsonl").unlink()
    assert str(store) in fails(*run)


def test_evaluate_needs_a_run_and_its_data(fails: Call, data: Path, run_dir: Path, tmp_path: Path) -> None:
    """No run folder, no checkpoint, other data, no data."""
    (tmp_path / "void").mkdir()
    assert "--run-dir" in fails("evaluate", "--data", data)
    assert f"{tmp_path}/void is not a run folder" in fails("evaluate", "--run-dir", tmp_path / "void", "--data", data)
    shutil.copy(run_dir / "config.yaml", tmp_path / "void")
    assert "void has no valid checkpoint" in fails("evaluate", "--run-dir", tmp_path / "void", "--data", data)
    other = write_msd_folder(tmp_path / "other", 2, shape=(8, 8, 8))
    assert f"{other} is not what" in fails("evaluate", "--run-dir", run_dir, "--data", other)
    assert "no data given" in fails("evaluate", "--run-dir", run_dir)


def test_predict_needs_a_run_and_images(fails: Call, data: Path, run_dir: Path, tmp_path: Path) -> None:
    """A missing image, a missing folder, no run."""
    out = ("--out", tmp_path / "out")
    image = tmp_path / "gone.nii.gz"
    assert f"{image} does not exist" in fails("predict", "--run-dir", run_dir, "--images", image, *out)
    assert f"{tmp_path}/gone" in fails("predict", "--run-dir", run_dir, "--images", tmp_path / "gone", *out)
    assert "--run-dir" in fails("predict", "--images", data, *out)
    assert "is not a run folder" in fails("predict", "--run-dir", tmp_path, "--images", data, *out)
    assert not (tmp_path / "out").exists()


def test_small_commands(fails: Call, data: Path, run_dir: Path, tmp_path: Path) -> None:
    """phantom's grid and count, index's file name, report's and demo's folder."""
    assert "--grid 7" in fails("phantom", "--out", tmp_path / "p", "--grid", 7)
    assert "--cases 0" in fails("phantom", "--out", tmp_path / "p", "--cases", 0)
    assert "s3://b/x" in fails("phantom", "--out", "s3://b/x")
    assert "cases.txt" in fails("index", "--data", data, "--out", tmp_path / "cases.txt")
    assert "--data" in fails("index", "--out", tmp_path / "x.jsonl")
    assert str(tmp_path / "none") in fails("report", "--run-dir", tmp_path / "none")
    assert "metrics/" in fails("report", "--run-dir", run_dir)
    assert str(data) in fails("demo", "--out", data) and (data / "dataset.json").exists()


def test_unknown_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest command, or all of them."""
    for word, fragment in (
        ("trian", "'trian' is not known; did you mean train?"),
        ("qqq", "there are phantom, down"),
    ):
        monkeypatch.setattr(sys, "argv", ["raytrain-brats", word, "--data", "x"])
        assert fragment in _mistake(__main__.main(), capsys.readouterr().err)
    monkeypatch.setattr(sys, "argv", ["raytrain-brats"])
    assert __main__.main() == 0
    printed = capsys.readouterr().out
    assert all(f"  {command}" in printed for command in __main__.COMMANDS)


@pytest.mark.parametrize(
    ("resources", "run", "batch", "fragments"),
    [
        ({"CPU": 2.0}, {"workers": "4"}, 8, ["4 workers of 0.5 CPUs", "cluster of 2 CPUs", "--workers 3:3"]),
        ({"CPU": 4.0}, {"workers": "1:8"}, 8, ["8 workers", "--workers 1:7"]),
        ({"CPU": 1.0}, {"workers": "1", "cpus_per_worker": 1}, 8, ["1 workers of 1 CPUs", "lower run.cpus_per_worker"]),
        ({"CPU": 64.0}, {"workers": "1:9"}, 8, ["1:9", "train.global_batch = 8"]),
        ({"CPU": 64.0, "GPU": 2.0}, {"workers": "4"}, 8, ["4:4", "2 GPUs"]),
        ({}, {"workers": "auto"}, 8, ["1 workers"]),
    ],
)
def test_clusters_that_cannot_do_the_work(
    resources: dict[str, float], run: dict[str, Any], batch: int, fragments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Ray would wait for ever, the number that does not fit is named, and one that would; which then fits."""
    monkeypatch.setattr(roles, "alive", lambda: [{"Labels": {}, "Resources": resources}])
    with pytest.raises(UserError) as caught:
        cluster.measure(Run(**run), batch)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
    _, remedy, rest = str(caught.value).partition("use --workers ")
    if remedy:
        assert cluster.measure(Run(**run | {"workers": rest.split(",")[0]}), batch)


@pytest.mark.parametrize(
    ("resources", "workers", "expected"),
    [
        ({"CPU": 2.0}, "auto", (1, 1, 0.5, 0, 0.5, 1, 1)),
        ({"CPU": 2.0}, "1:2", (1, 2, 0.5, 0, 0.5, 1, 1)),
        ({"CPU": 64.0, "GPU": 8.0}, "auto", (1, 4, 1.0, 1, 1.0, None, 4)),
        ({"CPU": 64.0, "GPU": 2.0}, "1:4", (1, 4, 1.0, 1, 1.0, None, 4)),
    ],
)
def test_clusters_that_can(
    resources: dict[str, float], workers: str, expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto takes the GPUs up to the global batch; a range may reach beyond the GPUs of today."""
    monkeypatch.setattr(roles, "alive", lambda: [{"Labels": {}, "Resources": resources | {"object_store_memory": 9.0}}])
    assert dataclasses.astuple(cluster.measure(Run(workers=workers), 4)) == (*expected, 9, False)


def test_outcomes_become_exit_codes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """0 done, 2 mistake, 1 failure, 130 Ctrl-C; one line each, also for an error that came back through Ray."""

    @dataclasses.dataclass(frozen=True)
    class Args:
        number: int = 0

    def ends(error: BaseException | None, *arguments: str) -> tuple[int, str]:
        def work(_: Args) -> None:
            if error:
                raise error

        return cli.entry(Args, work, "name", list(arguments)), capsys.readouterr().err

    class FromTaskError(UserError):
        """Like ray.exceptions.RayTaskError's double: the cause's class, a traceback as text."""

        cause = UserError("s3://x: 403")

    assert ends(None) == (0, "")
    assert ends(RunFailed("gave up")) == (1, "failed: gave up\n")
    assert ends(OSError("disk full")) == (1, "failed: disk full\n")
    assert ends(UserError("a\nb")) == (2, "error: a b\n")
    assert ends(FromTaskError("Traceback (most recent call last):\n ...")) == (2, "error: s3://x: 403\n")
    code, said = ends(KeyboardInterrupt())
    assert code == 130 and len(said.splitlines()) == 1
    for wrong in (("--bogus",), ("--number", "x")):
        code, said = ends(None, *wrong)
        assert code == 2 and len(said.splitlines()) == 1 and wrong[0] in said and "--help" in said
    code, said = ends(ZeroDivisionError("by zero"))
    assert code == 1 and said.startswith("failed: ZeroDivisionError: by zero; RAYTRAIN_BRATS_VERBOSE=1")
    monkeypatch.setenv("RAYTRAIN_BRATS_VERBOSE", "1")
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError())


def test_predict_never_overwrites_an_image_or_a_prediction(fails: Call, run_dir: Path, tmp_path: Path) -> None:
    """Inputs as outputs, two inputs of one name, no input: refused before anything is written."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "BRATS_001.nii.gz").write_bytes(b"scan")
    one, two = tmp_path / "one", tmp_path / "two"
    ready = ("predict", "--run-dir", run_dir)
    assert str(one / "BRATS_001.nii.gz") in fails(*ready, "--images", one, "--out", one)
    assert "two images" in fails(*ready, "--images", one, two, "--out", tmp_path / "out")
    assert "--images" in fails(*ready, "--out", tmp_path / "out", "--images")
    assert (one / "BRATS_001.nii.gz").read_bytes() == b"scan"


def test_the_demo_never_clears_what_it_did_not_make(fails: Call, data: Path, tmp_path: Path) -> None:
    """Data within --out, or other files in it: refused, and still there afterwards."""
    out = tmp_path / "out"
    shutil.copytree(data, out / "data")
    (out / ".made-by-demo").touch()
    assert "within each other" in fails("demo", "--data", out / "data", "--out", out)
    (out / "mine.txt").write_text("mine")
    assert "mine.txt" in fails("demo", "--out", out)
    assert "--cases 1" in fails("demo", "--out", tmp_path / "new", "--cases", "1")
    assert (out / "mine.txt").exists() and (out / "data/dataset.json").exists()


def test_a_store_is_not_read_in_another_convention(fails: Call, data: Path, tmp_path: Path) -> None:
    """Its labels would silently mean something else; one of equal values (article) may be asked for."""
    settings = config.load("demo", ("data.convention=brats2017_2021",))
    manifest = scan.open_manifest(str(data))
    stores.write_index(str(tmp_path / "store"), manifest, spec.preprocessing(settings))
    train = ("train", "--store", tmp_path / "store", "--run-dir", tmp_path / "run")
    assert "prepared as msd (1 edema" in fails(*train, "--set", "data.convention=brats2017_2021")


def test_the_environment_s_store_counts_once_it_is_finished(
    fails: Call, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cluster's environment names data and the place of a store: until `prepare` is done the data are read, and how
    to prepare is told; a store that was asked for by name must be there."""
    store = tmp_path / "store"
    monkeypatch.setenv("RAYTRAIN_BRATS_DATA", str(data))
    monkeypatch.setenv("RAYTRAIN_BRATS_STORE", str(store))
    assert cli.cases_from("", "") == (str(data), "")
    assert "python -m raytrain_brats.prepare" in capsys.readouterr().err
    assert "not a finished store" in fails("train", "--store", store, "--run-dir", tmp_path / "run")
    stores.write_index(str(store), scan.open_manifest(str(data)), {"spacing_mm": 4.0})
    assert cli.cases_from("", "") == ("", str(store))
    assert cli.cases_from("given", "") == ("given", "")
    assert capsys.readouterr().err == ""


def test_phantoms_have_a_run_folder_of_their_own(
    fails: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without cases the demo trains, by the demo's recipe; the environment's run folder stays free for real ones."""
    run, made = tmp_path / "runs" / "first", list[str]()
    monkeypatch.setenv("RAYTRAIN_BRATS_RUN_DIR", str(run))
    monkeypatch.setenv("RAYTRAIN_BRATS_RECIPE", "segresnet")
    monkeypatch.setattr(train, "_make_phantoms", lambda folder: made.append(folder) or write_msd_folder(Path(folder)))

    def no_ray(**_: Any) -> None:
        raise UserError("so far")

    monkeypatch.setattr(cluster, "connect", no_ray)
    assert train.main([]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("demo: segresnet, 4 mm") and "so far" in said.err
    assert made == [f"{run}-demo-phantoms"] and Path(f"{run}-demo").is_dir() and not run.exists()
