"""Every score of a case by region, tables of many cases, and label volumes of any program; Ray is a plain map here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.metrics.meandice import compute_dice

from raytrain_brats import evaluate, labels, outputs
from raytrain_brats.labels import regions_of_network
from raytrain_brats.ray_ext import cluster
from raytrain_brats.reporting import facts, figures, scores
from raytrain_brats.scoring.case_scores import Reading, columns, of_network
from raytrain_brats.scoring.metrics import dice
from tests.support.cases import make_affine, save, write_msd_folder

MM = (1.0, 1.0, 1.0)
AFFINE = make_affine((1.0, 1.2, 2.0), signs=(-1, -1, 1))


def volume(**boxes: Any) -> Any:
    """A label volume: v<value>=slices."""
    label = np.zeros((16, 14, 12), np.uint8)
    for name, box in boxes.items():
        label[box] = int(name[1:])
    return label


@pytest.mark.parametrize(
    ("convention", "regions", "of_network"),
    [
        ("msd", "WT TC ET ED NET", "WT TC ET ED NET"),
        ("brats2023", "WT TC ET", "WT TC ET"),
        ("brats2024_gli", "WT TC ET NETC SNFH RC", "WT TC ET NETC SNFH"),
        ("brats2024_met", "WT TC ET RC", "WT TC ET"),
        ("brats2024_ped", "WT TC ET NET CC ED", "WT TC ET ED"),
    ],
)
def test_regions_that_a_network_of_wt_tc_et_determines(convention: str, regions: str, of_network: str) -> None:
    """Not a cavity, which it does not see, nor cyst and non-enhancing core, which it does not tell apart."""
    assert " ".join(labels.regions(convention)) == regions
    assert " ".join(regions_of_network(convention)) == of_network


def test_a_region_that_is_not_predicted_is_not_scored_as_zero() -> None:
    """A network's columns of RC say so; another program's volume of the same values is scored."""
    truth = Reading(volume(v2=np.s_[2:8, 2:8, 2:8], v4=np.s_[10:14, 4:9, 4:9]), "brats2024_gli")
    same = truth.label
    network, other = columns(of_network(same, "brats2024_gli"), truth, MM, "GLI"), columns(truth, truth, MM, "GLI")
    assert network["dice_RC"] == network["lesion_dice_2023_RC"] == "not predicted" and network["dice_SNFH"] == 1.0
    assert other["dice_RC"] == other["lesion_dice_2024_RC"] == other["nsd_1mm_RC"] == 1.0
    assert list(network) == list(other)
    elsewhere = columns(Reading(volume(), "brats2023"), truth, MM, "GLI")
    assert elsewhere["dice_RC"] == "not predicted" and elsewhere["dice_WT"] == 0.0


def test_dice_is_that_of_monai() -> None:
    """By the same rules, also where one or both are empty; ours counts whole numbers and copies no volume to floats."""
    rng = np.random.default_rng(0)
    predicted, truth = rng.random((2, 3, 16, 14, 12)) > 0.7
    for empty in ((), (0,), (1,), (0, 1)):
        pair = [np.zeros_like(masks) if number in empty else masks for number, masks in enumerate((predicted, truth))]
        theirs = compute_dice(*(torch.from_numpy(masks)[None] for masks in pair), ignore_empty=False)
        assert list(dice(pair[0], pair[1]).values()) == pytest.approx(theirs[0].tolist(), abs=1e-6)


def test_empty_regions_by_each_year() -> None:
    """Both empty: perfect; one empty: 373.13 to 2022, 374 in 2023, 337 of GLI in 2024, 373 in 2026."""
    label = volume(v1=np.s_[2:8, 2:8, 2:8])
    lost = columns(of_network(volume(), "msd"), Reading(label, "msd"), MM, "GLI")
    assert [lost[f"hd95{year}_WT_mm"] for year in ("", "_2023", "_2024", "_2026")] == [373.13, 374.0, 337.0, 373.0]
    assert lost["dice_WT"] == lost["nsd_1mm_WT"] == 0.0 and lost["empty_WT"] == "prediction"
    assert [lost[f"hd95{year}_ET_mm"] for year in ("", "_2023", "_2024", "_2026")] == [0.0] * 4
    assert lost["dice_ET"] == lost["nsd_1mm_ET"] == 1.0 and lost["empty_ET"] == "both"
    assert lost["lesion_dice_2026_ET"] is None and lost["lesion_dice_2023_ET"] == 1.0


def test_a_header_of_float32_moves_no_surface_out_of_reach() -> None:
    """Edges of 1.0000001 mm are 1 mm: surfaces a voxel apart stay within 1 mm."""
    one, other = (Reading(volume(v1=np.s_[n : n + 5, 2:8, 2:8]), "msd") for n in (2, 3))
    exact, rounded = (columns(one, other, (edge,) * 3, "GLI") for edge in (1.0, 1.0000001))
    assert exact == rounded and exact["lesion_nsd_1mm_2024_WT"] == 1.0


ROWS = [
    {"case": "a", "dice_WT": 0.5, "hd95_WT_mm": 9.0, "empty_WT": "", "dice_RC": "not predicted"},
    {"case": "b", "dice_WT": 1.0, "hd95_WT_mm": 0.0, "empty_WT": "both", "dice_RC": "not predicted"},
    {"case": "c", "dice_WT": 0.0, "hd95_WT_mm": 373.13, "empty_WT": "truth", "dice_RC": "not predicted"},
]


def test_both_means_quartiles_and_the_worst_case() -> None:
    """Also from the CSV; a column without any number has no statistics; an older table does not say what is empty."""
    found = scores.by_column(scores.read(scores.cases_csv(ROWS).decode()))
    dice = found["dice_WT"]
    assert (dice.mean, dice.mean_nonempty, dice.both_empty, dice.one_empty) == (0.5, 0.25, 1, 1)
    assert (dice.q1, dice.median, dice.q3, dice.worst, dice.worst_case) == (0.25, 0.5, 0.75, 0.0, "c")
    assert found["hd95_WT_mm"].worst_case == "c" and found["hd95_WT_mm"].unit == "mm"
    assert "dice_RC" not in found
    old = scores.by_column([{k: v for k, v in row.items() if k != "empty_WT"} for row in ROWS])
    assert old["dice_WT"].mean == 0.5 and old["dice_WT"].mean_nonempty is None
    lines = scores.statistics_csv(found).decode().splitlines()
    assert lines[0].startswith("column,metric,region,unit,cases,mean,mean_nonempty,both_empty")
    assert lines[1].startswith("dice_WT,dice,WT,,3,0.500000,0.250000,1,1")
    assert [row["case"] for row in scores.worst_first(ROWS)] == ["c", "a", "b"]
    assert figures.distributions(ROWS).startswith(b"\x89PNG") and figures.distributions([]).startswith(b"\x89PNG")


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """(exit code, standard output, standard error) of `evaluate`."""
    for name in ("DATA", "STORE", "RUN_DIR"):
        monkeypatch.delenv(f"RAYTRAIN_BRATS_{name}", raising=False)
    monkeypatch.setattr(cluster, "connect", lambda **_: None)
    monkeypatch.setattr(cluster, "parallel_map", lambda function, items, **_: map(function, items))

    def run(*arguments: Any) -> tuple[int, str, str]:
        code = evaluate.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_msd_folder(tmp_path / "data", cases=3, affine=AFFINE)
    return tmp_path / "data"


def predictions(data: Path, folder: Path, change: Callable[[int, Any], Any] = lambda _, label: label) -> Path:
    """The truth as predictions, in nnU-Net's way, each changed by (number, label)."""
    for number, path in enumerate(sorted((data / "labelsTr").glob("*.nii.gz"))):
        save(folder / path.name, change(number, np.asarray(nib.load(path).dataobj)), AFFINE)
    return folder


def test_volumes_of_any_program_are_scored(call: Call, data: Path, tmp_path: Path) -> None:
    """No run, no Ray, no image is read; a missing case and a file that is none are named; tables say what counts."""
    folder = predictions(data, tmp_path / "nnunet", lambda n, label: label * (n != 1))
    (folder / "BRATS_003.nii.gz").rename(folder / "other.nii.gz")
    (folder / "plans.json").write_text("{}")
    for image in (data / "imagesTr").glob("*.nii.gz"):
        image.write_bytes(b"")
    out = tmp_path / "scores"
    ready = ("--predictions", folder, "--data", data, "--out", out)
    code, printed, said = call(*ready)
    assert code == 0 and "no label volume for case: BRATS_003" in said and "not a case: other.nii.gz" in said
    assert "plans.json" not in said and "2 of 3 cases" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["cases"], summary["missing"], summary["extra"]) == (2, ["BRATS_003"], ["other.nii.gz"])
    assert summary["dice"] == {"WT": 0.5, "TC": 0.5, "ET": 0.5} and summary["challenge"] == "GLI"
    row, lost = scores.read((out / "cases.csv").read_text())
    assert (row["dice_NET"], row["hd95_WT_mm"], row["lesion_dice_2023_WT"]) == ("1.000000", "0.000000", "1.000000")
    assert (lost["dice_WT"], lost["hd95_WT_mm"], lost["empty_WT"]) == ("0.000000", "373.130000", "prediction")
    assert {p.name for p in out.iterdir()} >= {"statistics.csv", "distributions.png", outputs.RECORD}
    assert call(*ready)[0] == 0
    other = predictions(data, tmp_path / "others")
    code, _, said = call("--predictions", other, "--data", data, "--out", out)
    assert code == 2 and "was made from" in said
    assert json.loads((out / "summary.json").read_text()) == summary


def test_a_score_is_rounded_once(call: Call, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.044532 is 0.045 in the printed table, from cases.csv, as the mean in the summary: not 0.0445, then 0.044."""
    found = dict.fromkeys(scores.FIRST, 0.0445321234)
    monkeypatch.setattr(evaluate.case_scores, "columns", lambda *_: found)
    out = tmp_path / "scores"
    code, printed, _ = call("--predictions", predictions(data, tmp_path / "p"), "--data", data, "--out", out)
    assert code == 0 and "0.045" in printed and "0.044" not in printed
    (row, *_), summary = scores.read((out / "cases.csv").read_text()), json.loads((out / "summary.json").read_text())
    assert facts.number(row["dice_TC"]) == facts.number(summary["dice"]["TC"]) == "0.045"
    assert scores.rounded({"case": "a", "dice_TC": 0.0445321234}) == {"case": "a", "dice_TC": float(row["dice_TC"])}


def test_overwrite_goes_with_predictions_and_the_docs_say_so(call: Call, tmp_path: Path) -> None:
    """A run's scores have a place of their own, from which earlier ones are moved away."""
    code, _, said = call("--run-dir", tmp_path, "--data", tmp_path, "--overwrite")
    assert code == 2 and "--overwrite go with --predictions" in said
    assert "`evaluate` only with `--predictions`" in (Path(__file__).parents[2] / "docs/commands.md").read_text()


def test_a_volume_on_another_grid_is_refused_by_reason(call: Call, data: Path, tmp_path: Path) -> None:
    """Shape, affine, values, damage: named with the reason; the others are scored, and the exit code is 1."""
    folder, out = predictions(data, tmp_path / "p"), tmp_path / "scores"
    label = np.asarray(nib.load(folder / "BRATS_001.nii.gz").dataobj)
    ready = ("--predictions", folder, "--data", data, "--out", out)
    for change, reason in (
        ((label[:-1], AFFINE), "mismatch, BRATS_001.nii.gz: shape"),
        ((label[::-1], AFFINE @ np.diag([-1, 1, 1, 1])), "mismatch, BRATS_001.nii.gz: its affine differs"),
        ((label + 1.5, AFFINE), "label_values, BRATS_001.nii.gz"),
        ((np.where(label == 3, 4, label).astype(np.uint8), AFFINE), "label_values, BRATS_001.nii.gz: [4]"),
    ):
        save(folder / "BRATS_001.nii.gz", *change)
        code, _, said = call(*ready)
        assert code == 1 and f"case BRATS_001: {reason}" in said, said
        assert json.loads((out / "summary.json").read_text())["cases"] == 2
    (folder / "BRATS_001.nii.gz").write_bytes(b"no NIfTI")
    assert "not_nifti" in call(*ready)[2]


def test_values_of_another_convention_are_compared_by_region(call: Call, data: Path, tmp_path: Path) -> None:
    """By --convention, by nnU-Net's dataset.json in the folder, by the record of `predict`."""
    table = np.array([0, 2, 1, 4], np.uint8)  # MSD -> BraTS 2021
    folder = predictions(data, tmp_path / "p", lambda _, label: table[label])
    ready = ("--predictions", folder, "--data", data, "--out", tmp_path / "scores", "--overwrite")
    assert call(*ready)[0] == 1
    assert call(*ready, "--convention", "brats2017_2021")[0] == 0
    about = {"labels": {"background": 0, "NCR": 1, "ED": 2, "ET": 4}}
    (folder / "dataset.json").write_text(json.dumps(about))
    code, printed, _ = call(*ready)
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert code == 0 and "brats2017_2021" in printed and summary["dice"] == {"WT": 1.0, "TC": 1.0, "ET": 1.0}
    assert summary["not_predicted"] == ["ED", "NET"]  # BraTS 2021 names no such regions
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "moon": 1}}))
    assert "or say --convention" in call(*ready)[2]
    (folder / "dataset.json").unlink()
    outputs.claim(str(folder), "predict", {"x": "y"}, settings={"convention": "brats2017_2021"})
    assert call(*ready)[0] == 0
    code, _, said = call(*ready, "--convention", "article")
    assert code == 2 and "other tissues" in said


def test_requests_that_make_no_sense_are_refused(call: Call, data: Path, tmp_path: Path) -> None:
    """In one line each, before anything is written; predictions are never overwritten."""
    folder, out = predictions(data, tmp_path / "p"), tmp_path / "scores"
    empty = tmp_path / "empty"
    empty.mkdir()
    ready = ("--predictions", folder, "--data", data)
    for arguments, said in (
        (ready, "needs --out"),
        ((*ready, "--out", out, "--split", "val"), "--split val needs --run-dir"),
        (("--predictions", folder, "--out", out), "needs --data"),
        (("--predictions", empty, "--data", data, "--out", out), "holds no .nii.gz file; expected are 3"),
        (("--predictions", data / "imagesTr" / "x", "--data", data, "--out", out), "holds no .nii.gz file"),
        ((*ready, "--out", out, "--convention", "brats"), "'brats' is not known"),
        (("--data", data, "--run-dir", tmp_path, "--out", out), "go with --predictions"),
    ):
        code, _, error = call(*arguments)
        assert code == 2 and said in error and len(error.splitlines()) == 1, error
    (folder / "BRATS_001.nii").write_bytes(b"")
    assert "two volumes of a case" in call(*ready, "--out", out)[2]
    assert not out.exists()
