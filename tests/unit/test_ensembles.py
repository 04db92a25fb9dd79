"""Several networks answer together, and each case of a cross-validation is scored by the one that has not seen it.

Networks are real and untrained; Ray is replaced by a plain map.
"""

import csv
import json
import shutil
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import ray
import torch

from raytrain_brats import config, evaluate, outputs, predict, storage
from raytrain_brats.cases import scan
from raytrain_brats.data.store import Source
from raytrain_brats.errors import UserError
from raytrain_brats.labels import REGIONS
from raytrain_brats.learn.inference import to_masks
from raytrain_brats.ray_ext import cluster
from raytrain_brats.reporting import folds as fold_scores
from raytrain_brats.run import checkpoint, members, predictor, spec
from raytrain_brats.run.predictor import Networks, native_probabilities
from raytrain_brats.run.worker import train_step_of
from raytrain_brats.scoring.metrics import dice
from tests.support.cases import write_msd_folder

SMALL = ("preprocess.spacing_mm=1.0", "data.patch_xyz=[16, 16, 16]")


class Box:
    """What stands for an object in Ray's store."""

    def __init__(self, value: Any) -> None:
        self.value = value


def train(run: Path, data: Path, *changes: str) -> None:
    """A run whose network was never trained."""
    run_spec = spec.build(config.load("demo", (*SMALL, *changes)), str(run), str(data), "")
    spec.write_config(run_spec)
    checkpoint.save(run_spec.run_dir, 4, 1, *train_step_of(run_spec, 1, torch.device("cpu")).state())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, eight cases, and `run` with the runs of folds 0 and 1, whose networks differ."""
    folder = tmp_path_factory.mktemp("ensembles")
    write_msd_folder(folder / "data", 8, shape=(16, 14, 12))
    for fold in (0, 1):
        train(folder / "run" / f"fold-{fold}", folder / "data", f"data.fold={fold}", f"train.seed={fold}")
    return folder


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


def networks_of(made: Path) -> Networks:
    found = members.opened([str(made / "run")])
    assert [member.fold for member in found] == [0, 1]
    return Networks(tuple(Box((member.run.config, member.weights)) for member in found), torch.device("cpu"))


def fails(command: Any, *words: Any, capsys: pytest.CaptureFixture[str]) -> str:
    assert command.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_answer_of_several_is_the_mean_of_their_probabilities(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To float32; the same when no network is kept from case to case, and then one is in memory at a time."""
    manifest = scan.open_manifest(str(made / "data"))
    prepared = Source(manifest.root, "msd", 1.0).load(manifest.cases[0])
    both = networks_of(made)
    alone = [native_probabilities(prepared, [(n, c)], both.device) for n, c in both]
    together = native_probabilities(prepared, both, both.device)
    assert together.shape == (3, 16, 14, 12) and together.dtype == np.float32
    assert np.abs(together - (alone[0] + alone[1]) / 2).max() < 1e-6
    assert np.abs(alone[0] - alone[1]).max() > 0.01

    alive: list[int] = []
    loaded: list[weakref.ref[Any]] = []

    def counted(*arguments: Any, real: Any = predictor._loaded) -> Any:
        alive.append(sum(one() is not None for one in loaded))
        found = real(*arguments)
        loaded.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(predictor, "_loaded", counted)
    monkeypatch.setattr(predictor, "KEPT_BYTES", 0)
    few = networks_of(made)
    assert np.array_equal(native_probabilities(prepared, few, few.device), together)
    assert np.array_equal(native_probabilities(prepared, few, few.device), together)
    assert alive == [0, 0, 0, 0]
    monkeypatch.setattr(predictor, "KEPT_BYTES", 1 << 30)
    kept = networks_of(made)
    for _ in range(2):
        native_probabilities(prepared, kept, kept.device)
    assert len(loaded) == 6


def test_predict_writes_the_mean_and_names_all_members(made: Path, tmp_path: Path) -> None:
    """A folder of folds, or its runs one by one: the same files; the record has each run, checkpoint and weights; the
    same again makes nothing."""
    out, run = tmp_path / "out", made / "run"
    image = made / "data/imagesTr/BRATS_001.nii.gz"
    words = ["--images", image, "--out", out, "--no-mirror", "--save-probabilities"]
    assert predict.main([str(w) for w in ("--run-dir", run, *words)]) == 0
    probabilities = nib.load(out / "BRATS_001_probabilities.nii.gz").get_fdata()
    manifest = scan.open_manifest(str(made / "data"))
    both = networks_of(made)
    expected = native_probabilities(Source(manifest.root, "msd", 1.0).load(manifest.cases[0]), both, both.device)
    assert np.abs(np.moveaxis(probabilities, 3, 0) - expected).max() <= 0.5 / 255 + 1e-6
    label = np.asarray(nib.load(out / "BRATS_001.nii.gz").dataobj)
    assert np.array_equal(label > 0, to_masks(expected)[0])

    record = json.loads((out / outputs.RECORD).read_text())
    (about,) = record["makers"].values()
    assert [m["run"] for m in about["members"]] == [str(run / "fold-0"), str(run / "fold-1")]
    assert {m["checkpoint"] for m in about["members"]} == {"000000000004-g0001"}
    assert len({m["weights"] for m in about["members"]}) == 2
    origin = record["files"]["BRATS_001.nii.gz"]["origin"]
    assert origin.startswith("the mean of 2 networks: run/fold-0 000000000004-g0001 (") and "run/fold-1" in origin

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert predict.main([str(w) for w in ("--run-dir", run / "fold-0", run / "fold-1", *words)]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (out / "BRATS_001_probabilities.nii.gz").unlink()
    assert predict.main([str(w) for w in ("--run-dir", run, *words)]) == 0
    assert (out / "BRATS_001_probabilities.nii.gz").exists()

    drawn = [str(w) for w in ("--run-dir", run, *words, "--overlays", 1)]
    assert predict.main(drawn) == 0
    picture = out / "overlays" / "BRATS_001.png"
    assert "overlays/BRATS_001.png" in json.loads((out / outputs.RECORD).read_text())["files"]
    before = picture.stat().st_mtime_ns
    assert predict.main(drawn) == 0 and picture.stat().st_mtime_ns == before


def test_a_fold_that_has_not_trained_yet_is_left_out(made: Path, tmp_path: Path) -> None:
    """One that was begun and has no checkpoint; its number is named as missing."""
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copytree(tmp_path / "run/fold-1", tmp_path / "run/fold-3")
    shutil.rmtree(tmp_path / "run/fold-3/checkpoints")
    found = members.opened([str(tmp_path / "run")])
    assert [member.fold for member in found] == [0, 1] and members.missing_folds(found) == [2, 3, 4]
    shutil.rmtree(tmp_path / "run/fold-1/checkpoints")
    shutil.rmtree(tmp_path / "run/fold-0/checkpoints")
    with pytest.raises(UserError, match="no valid checkpoint yet"):
        members.opened([str(tmp_path / "run")])


def test_runs_that_do_not_agree_are_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other voxels, other meaning of labels, a folder of folds among those without a checkpoint: by name."""
    train(tmp_path / "coarse", made / "data", "preprocess.spacing_mm=2.0")
    one = made / "run" / "fold-0"
    words = ("--images", made / "data", "--out", tmp_path / "out", "--run-dir", one)
    said = fails(predict, *words, tmp_path / "coarse", capsys=capsys)
    assert str(one) in said and f"{tmp_path}/coarse" in said and "preprocess.spacing_mm is 1.0 and 2.0" in said
    text = (tmp_path / "coarse" / "config.yaml").read_text().replace("spacing_mm: 2.0", "spacing_mm: 1.0")
    (tmp_path / "coarse" / "config.yaml").write_text(text.replace("convention: msd", "convention: brats2023"))
    assert "learned brats2023" in fails(predict, *words, tmp_path / "coarse", capsys=capsys)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"holds the runs of 2 folds; give one, such as .*fold-0"):
        spec.open_run(str(made / "run"))


def test_each_case_is_scored_once_by_the_network_that_has_not_seen_it(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """cases.csv of a folder of folds has the held-out cases of each; Dice is that of the fold's own network, others
    would give another; the summary has each fold's means and their spread; folds without a run are named."""
    words = ["--run-dir", made / "run", "--data", made / "data", "--no-mirror", "--overlays", 1]
    assert evaluate.main([str(word) for word in words]) == 0
    printed = capsys.readouterr()
    rows = list(csv.DictReader((made / "run/evaluation/cases.csv").read_text().splitlines()))
    manifest = scan.open_manifest(str(made / "data"))
    held_out = {case.id: case for case in manifest.cases if case.fold in (0, 1)}
    assert sorted(row["case"] for row in rows) == sorted(held_out) and len(rows) > 2
    both, source, others = list(networks_of(made)), Source(manifest.root, "msd", 1.0), []
    for row in rows:
        case = held_out[row["case"]]
        prepared = source.load(case)
        truth = np.stack([prepared.truth_xyz() >= least for least in (1, 2, 3)])
        own, other = (
            dice(to_masks(native_probabilities(prepared, [both[fold]], torch.device("cpu"))), truth)
            for fold in (case.fold, 1 - case.fold)
        )
        assert int(row["fold"]) == case.fold
        assert [float(row[f"dice_{r}"]) for r in REGIONS] == pytest.approx([own[r] for r in REGIONS], abs=1e-4)
        others.append(own != other)
        voxel_ml = abs(np.linalg.det(np.array(prepared.geometry.affine)[:3, :3])) / 1000
        volumes = [float(row[f"volume_{r}_truth_ml"]) for r in REGIONS]
        assert volumes == pytest.approx([mask.sum() * voxel_ml for mask in truth], abs=1e-3)
    assert any(others)
    (picture,) = (made / "run/evaluation/overlays").iterdir()
    assert picture.stem == min(rows, key=lambda row: np.mean([float(row[f"dice_{r}"]) for r in REGIONS]))["case"]
    summary = json.loads((made / "run/evaluation/summary.json").read_text())
    assert set(summary["folds"]) == {"0", "1"} and summary["cases"] == len(rows)
    assert summary["over_folds"]["sd"]["dice"]["WT"] is not None
    assert [m["fold"] for m in summary["checkpoints"]] == [0, 1]
    assert "no run of fold 2, 3, 4" in printed.err and "sd of folds" in printed.out

    for split in ("all", "train"):
        words = ("--run-dir", made / "run", "--data", made / "data", "--split", split)
        assert "leave --split out" in fails(evaluate, *words, capsys=capsys)


def test_cases_that_none_has_seen_are_scored_by_all_together(made: Path, tmp_path: Path) -> None:
    """`--split all` on other data: the mean of the folds' networks."""
    other = write_msd_folder(tmp_path / "other", 2, shape=(12, 12, 12))
    words = ["--run-dir", made / "run", "--data", other, "--split", "all", "--no-mirror"]
    assert evaluate.main([str(word) for word in words]) == 0
    rows = list(csv.DictReader((made / "run/evaluation/cases.csv").read_text().splitlines()))
    manifest, both = scan.open_manifest(str(other)), networks_of(made)
    for row, case in zip(rows, manifest.cases, strict=True):
        prepared = Source(manifest.root, "msd", 1.0).load(case)
        truth = np.stack([prepared.truth_xyz() >= least for least in (1, 2, 3)])
        found = dice(to_masks(native_probabilities(prepared, both, both.device)), truth)
        assert [float(row[f"dice_{r}"]) for r in REGIONS] == pytest.approx([found[r] for r in REGIONS], abs=1e-4)
    assert "fold" not in rows[0]


def test_the_spread_is_that_of_the_folds_means() -> None:
    """By hand: two cases in one fold, one in the other; a single fold has none."""

    def row(fold: int, value: float) -> dict[str, Any]:
        scores = {f"dice_{r}": value for r in REGIONS} | {f"hd95_{r}_mm": 10 * value for r in REGIONS}
        return {"case": f"c{fold}{value}", "fold": fold} | scores

    found = fold_scores.summary([row(0, 0.4), row(0, 0.6), row(3, 0.9)])
    assert found["folds"]["0"]["dice"]["TC"] == 0.5 and found["folds"]["3"]["cases"] == 1
    assert found["over_folds"]["mean"]["dice"]["ET"] == 0.7
    assert found["over_folds"]["sd"]["dice"]["ET"] == pytest.approx(0.2828, abs=1e-4)
    assert found["over_folds"]["sd"]["hd95_mm"]["WT"] == pytest.approx(2.8284, abs=1e-4)
    assert fold_scores.summary([row(0, 0.4)])["over_folds"]["sd"]["dice"]["WT"] is None
    assert fold_scores.lines([row(0, 0.4)])[-1][2:] == ["-"] * 6


def mapped(
    function: Callable[[Any], Any], items: Iterable[Any], on_gpus: bool, read: Any = None, failed: Any = None
) -> Iterable[Any]:
    """As `parallel_map` meets what fails."""
    for item in items:
        try:
            yield function(read(item) if read else item)
        except Exception as error:  # noqa: BLE001 - as `parallel_map` has it
            yield failed(item, error)


def test_a_case_that_fails_is_named_and_the_others_are_scored(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory is short for one: exit code 1, a line, the scores of the others; what a person left beside them stays."""
    shutil.copytree(made / "run/fold-0", tmp_path / "run")
    other = write_msd_folder(tmp_path / "other", 3, shape=(12, 12, 12))
    words = ["--run-dir", str(tmp_path / "run"), "--data", str(other), "--split", "all", "--no-mirror"]
    assert evaluate.main(words) == 0
    notes, short = tmp_path / "run/evaluation/notes.txt", [2]
    notes.write_text("looked at")
    sound = evaluate.native_probabilities

    def tight(*given: Any, **named: Any) -> Any:
        short[0] -= 1
        if not short[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sound(*given, **named)

    monkeypatch.setattr(cluster, "parallel_map", mapped)
    monkeypatch.setattr(evaluate, "native_probabilities", tight)
    assert evaluate.main(words) == 1
    said = capsys.readouterr().err
    assert "left out: case BRATS_002: OutOfMemoryError" in said and "1 of 3 cases could not be scored" in said
    rows = csv.DictReader((tmp_path / "run/evaluation/cases.csv").read_text().splitlines())
    assert [row["case"] for row in rows] == ["BRATS_001", "BRATS_003"] and notes.read_text() == "looked at"


def test_a_case_that_fails_is_named_and_the_others_are_predicted(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged scan, and one for which memory is short: exit code 1, a line each; the same command tries them again.
    Where the first ten all fail it is not the cases; a full disk ends the command at once."""

    monkeypatch.setattr(cluster, "parallel_map", mapped)
    data = write_msd_folder(tmp_path / "data", 12, shape=(12, 12, 12))
    damaged = data / "imagesTr/BRATS_003.nii.gz"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-200])
    short = [5]

    def sound(*_: Any, **__: Any) -> Any:
        return np.zeros((3, 12, 12, 12), np.float32)

    def tight(*_: Any, **__: Any) -> Any:
        short[0] -= 1
        if not short[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2.00 GiB")
        return sound()

    monkeypatch.setattr(predict, "native_probabilities", tight)
    words = ["--run-dir", made / "run/fold-0", "--images", data, "--no-mirror", "--out"]
    command = [str(word) for word in (*words, tmp_path / "out")]
    assert predict.main(command) == 1
    printed = capsys.readouterr()
    failed, refused, last = printed.err.splitlines()
    assert failed.startswith(
        "failed: case BRATS_008: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB;"
    )
    assert refused.startswith("refused: case BRATS_003: gzip_damaged")
    assert last.startswith("failed: 2 of 12 cases have no prediction") and "10 label volumes in" in printed.out
    assert "for 1,000 cases at this rate" in printed.out
    damaged.write_bytes(whole)
    assert predict.main(command) == 0
    assert "2 label volumes made, 10 were there already" in capsys.readouterr().out

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no kernel image")

    monkeypatch.setattr(predict, "native_probabilities", broken)
    assert predict.main([*map(str, words), str(tmp_path / "none")]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("failed: case") == 10
    assert "the first 10 cases all failed, the last with case BRATS_003: ValueError: no kernel image" in printed.err
    monkeypatch.setattr(predict, "native_probabilities", sound)

    def full(uri: str, content: bytes, write: Any = storage.write_bytes) -> None:
        if uri.endswith(".nii.gz"):
            raise OSError(28, "No space left on device", uri)
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", full)
    assert predict.main([*map(str, words), str(tmp_path / "full")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("failed: [Errno 28] No space left on device: ") and "full/BRATS_012.nii.gz" in line


@pytest.mark.parametrize("cases", [10, 40])
def test_the_pace_is_told_once(cases: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of many cases as soon as it is known, of few at the end; of fewer than ten never."""
    monkeypatch.setattr(cluster, "at_once", lambda **_: 1)
    monkeypatch.setattr(cluster, "parallel_map", lambda _, items, **__: iter([("", "")] * len(items)))
    job = predict.Job("out", (), predict.Rules(), True, False, frozenset())
    assert predict._predict(job, [("", "")] * cases) == 0
    assert capsys.readouterr().out.count("for 1,000 cases") == 1
    predict._predict(job, [("", "")] * 9)
    assert "for 1,000 cases" not in capsys.readouterr().out
