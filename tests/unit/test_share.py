"""`share`: one file that predicts elsewhere; `compare`: runs side by side.

Networks are real, trained for some steps; Ray is replaced by a plain map.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import ray
import safetensors
import torch
import yaml
from PIL import Image

from raytrain_brats import compare, predict, share, storage
from raytrain_brats.labels import REGIONS
from raytrain_brats.learn.postprocess import Rules
from raytrain_brats.ray_ext import cluster
from raytrain_brats.reporting import comparison
from raytrain_brats.run import initial, journal, members
from raytrain_brats.run.run_dir import RunDir
from tests.support.cases import write_msd_folder
from tests.support.here import run_spec, train


class Box:
    """What stands for an object in Ray's store."""

    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`data`; `runs` with the runs of two folds; `other`, another run."""
    folder = tmp_path_factory.mktemp("share")
    write_msd_folder(folder / "data", 6, shape=(12, 12, 12))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for fold in (0, 1):
        train(run_spec(folder / "runs" / f"fold-{fold}", folder / "data", fold, train={"seed": fold}), stop=20)
    train(run_spec(folder / "other", folder / "data", train={"epochs": 4}), stop=28)
    yield folder
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(
        function: Callable[[Any], Any], items: Iterable[Any], on_gpus: bool = False, read: Any = None, **_: Any
    ) -> Iterable[Any]:
        return map(function, map(read, items) if read else items)

    fakes = {"connect": lambda **_: None, "parallel_map": here, "at_once": lambda **_: 1}
    for name, fake in fakes.items():
        monkeypatch.setattr(cluster, name, fake)
    monkeypatch.setattr(ray, "put", Box)
    monkeypatch.setattr(ray, "get", lambda box: box.value)


def fails(command: Any, *words: Any, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert command.main([str(word) for word in words]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def predicted(run: Path, made: Path, out: Path) -> Any:
    images = sorted((made / "data/imagesTr").glob("BRATS*.nii.gz"))[:2]
    words = ["--run-dir", run, "--images", *images, "--out", out, "--no-mirror", "--save-probabilities"]
    assert predict.main([str(word) for word in words]) == 0
    return [np.asarray(nib.load(path).dataobj) for path in sorted(out.glob("*.nii.gz"))]


@pytest.mark.parametrize("run", ["runs", "runs/fold-1"])
def test_one_file_predicts_what_the_run_does(made: Path, tmp_path: Path, run: str) -> None:
    """Where the run folder is not: the same volumes by one network or the mean of several, with the same rules; and
    another run may begin with it."""
    (tmp_path / "run").parent.mkdir(exist_ok=True)
    shutil.copytree(made / run, tmp_path / "run")
    networks = members.opened([str(tmp_path / "run")])
    rules = Rules(thresholds=(0.3, 0.5, 0.5))
    about = {"rules": rules.to_json(), "members": [m.about() for m in networks]}
    storage.write_bytes(RunDir(str(tmp_path / "run")).postprocessing, json.dumps(about).encode())
    file = tmp_path / "elsewhere" / "tumour.safetensors"
    assert share.main(["--run-dir", str(tmp_path / "run"), "--out", str(file)]) == 0
    wanted = predicted(tmp_path / "run", made, tmp_path / "by_run")
    shutil.rmtree(tmp_path / "run")
    found = predicted(file, made, tmp_path / "by_file")
    assert len(found) == 4 and all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    again = members.opened([str(file)])
    assert [(m.fold, m.checkpoint, m.digest) for m in again] == [(m.fold, m.checkpoint, m.digest) for m in networks]
    assert members.rules_of([str(file)], again)[0] == rules
    storage.write_bytes(RunDir(str(tmp_path / "one")).postprocessing, json.dumps(about | {"mirror": False}).encode())
    taught, said = members.rules_of([str(tmp_path / "one")], again)
    assert taught == rules and said.endswith("; learned from masks of one view")
    begun, lines = initial.begin(run_spec(tmp_path / "new", made / "data", 1), str(file))
    assert begun.initial and begun.initial.checkpoint == networks[-1].checkpoint and len(lines) == 1


def test_the_file_says_what_it_is(made: Path, tmp_path: Path) -> None:
    """Any reader of safetensors sees config, convention, checksum and model card; the same run, the same bytes."""
    file = tmp_path / "x.safetensors"
    for _ in range(2):
        assert share.main(["--run-dir", str(made / "other"), "--best", "--out", str(file)]) == 0
    with safetensors.safe_open(file, "pt") as opened:
        told, names = opened.metadata(), list(opened.keys())
    about = json.loads(told["about"])
    assert about["postprocessing"] is None  # nothing was learned, which is not "none helped"
    assert names and all(name.startswith("0/") for name in names)
    assert about["networks"][0]["config"]["network"]["filters"] == [4, 4, 4]
    assert about["networks"][0]["convention"] == "msd"
    assert "Not a medical device" in told["card"] and about["networks"][0]["checkpoint"] in told["card"]
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    assert share.main(["--run-dir", str(made / "other"), "--best", "--out", str(file), "--overwrite"]) == 0
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before


def test_no_file_is_replaced_that_holds_something_else(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another program's, other networks': refused without --overwrite, and left; never among a run's own files."""
    other, file = tmp_path / "notes.safetensors", tmp_path / "x.safetensors"
    other.write_bytes(b"notes")
    assert "--overwrite" in fails(share, "--run-dir", made / "other", "--out", other, capsys=capsys)
    assert other.read_bytes() == b"notes"
    assert share.main(["--run-dir", str(made / "other"), "--out", str(file)]) == 0
    assert "--overwrite" in fails(share, "--run-dir", made / "runs/fold-0", "--out", file, capsys=capsys)
    inside = made / "other/checkpoints/x.safetensors"
    assert "own files" in fails(share, "--run-dir", made / "other", "--out", inside, capsys=capsys)
    assert "ends in .safetensors" in fails(share, "--run-dir", made / "other", "--out", tmp_path / "x", capsys=capsys)


def test_a_damaged_file_or_another_programs_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit of a weight, a file cut short, another program's weights, nothing: one line, no prediction."""
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    assert share.main(["--run-dir", str(made / "other"), "--out", str(good)]) == 0
    content = bytearray(good.read_bytes())
    content[-5] ^= 1
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "theirs.safetensors")
    for broken in (
        content,
        good.read_bytes()[:-9],
        good.read_bytes()[:9],
        b"",
        (tmp_path / "theirs.safetensors").read_bytes(),
    ):
        bad.write_bytes(broken)
        words = ("--run-dir", bad, "--images", made / "data/imagesTr", "--out", tmp_path / "out")
        assert "is damaged, or was not made by" in fails(predict, *words, capsys=capsys)
    words = ("--run-dir", tmp_path / "no.safetensors", *words[2:])
    assert "does not exist" in fails(predict, *words, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_runs_side_by_side(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores, work and the settings that differ, by the shortest names that tell the runs apart; a picture."""
    summary = {"dice": dict.fromkeys(REGIONS, 0.5), "cases": 6, "checkpoint": f"{20:012d}-g0001"}
    storage.write_bytes(str(made / "other/evaluation/summary.json"), json.dumps(summary).encode())
    journal.event(str(made / "other"), "cost", dollars=2.5, dollars_per_hour=1.0)
    words = [str(made / "runs"), str(made / "other"), "--picture", str(tmp_path / "both.png")]
    assert compare.main(words) == 0
    said = capsys.readouterr().out
    lines = [" ".join(line.replace("│", " ").replace("┃", " ").split()) for line in said.splitlines()]
    assert "other evaluated, 6 cases 20 0.500 0.500 0.500 0.500" in lines
    assert any(line.startswith("other 28 ") and line.endswith("$2.50") for line in lines)
    assert "data.fold 0 1 0" in lines and "train.epochs 2 2 4" in lines and "train.seed 0 1 0" in lines
    assert not any(line.startswith("network.") for line in lines)
    assert "these runs hold out other folds" in said
    with Image.open(tmp_path / "both.png") as drawn:
        assert drawn.width > 1000 and "raytrain-brats compare" in drawn.info["Software"]
    assert compare.main(words) == 0, "its own picture is drawn again"
    others = made / "other", made / "runs/fold-0", "--picture", tmp_path / "both.png"
    assert "--overwrite" in fails(compare, *others, capsys=capsys), "of other runs, it is not"


def test_what_cannot_be_compared(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run, no run, a picture over somebody's file."""
    (tmp_path / "mine.png").write_bytes(b"mine")
    other, fold = made / "other", made / "runs/fold-0"
    assert "give two runs or more" in fails(compare, other, capsys=capsys)
    assert "compare: give two runs" in fails(compare, capsys=capsys)
    assert "is not a run folder" in fails(compare, other, tmp_path, capsys=capsys)
    assert "--overwrite" in fails(compare, other, fold, "--picture", tmp_path / "mine.png", capsys=capsys)
    assert "ends in .png" in fails(compare, other, fold, "--picture", tmp_path / "mine", capsys=capsys)


def test_both_panels_have_the_same_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss of each step and Dice of the last tenth stand over the same axis, which begins at 0."""
    drawn = []
    monkeypatch.setattr(comparison.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    comparison.picture([comparison.Curve("a", range(4, 404, 4), [0.5] * 100, [(320, 0.8), (400, 0.9)])], "test")
    ends = [axes.get_xlim() for axes in drawn[0].axes]
    assert ends[0] == ends[1] and ends[0][0] == 0 and ends[0][1] >= 400


def test_whose_weights_a_run_began_with_is_told(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Among the settings, and as what makes the scores hard to compare; by its short name where it is compared too."""
    tuned = tmp_path / "tuned"
    shutil.copytree(made / "other", tuned)
    about = yaml.safe_load((tuned / "config.yaml").read_text())
    begun = {"given": "other", "run": str(made / "other"), "checkpoint": "c-20", "sha256": "0" * 64}
    (tuned / "config.yaml").write_text(yaml.safe_dump(about | {"initial": begun}))
    assert compare.main([str(made / "other"), str(tuned)]) == 0
    said = capsys.readouterr().out
    assert "tuned began with the weights of other, checkpoint c-20" in said
    assert "initial.checkpoint" in said and "initial.sha256" not in said
    assert "other began" not in said


def test_settings_that_only_one_run_has() -> None:
    """Such as an option of another network: a dash for the others."""
    found = comparison.differing({"a": {"x": 1, "y": [1]}, "b": {"x": 1, "z": None}})
    assert found == [("y", ["[1]", "-"]), ("z", ["-", "None"])]
