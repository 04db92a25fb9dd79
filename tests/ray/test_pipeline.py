"""The commands, on a real local Ray: both routes, real cases, a full-size volume, S3.

Commands run in a process of their own, on one Ray. Phantom scores here show that the machinery works.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from raytrain_brats import books, config, storage
from raytrain_brats.data import resident
from raytrain_brats.labels import to_regions
from raytrain_brats.run import checkpoint, spec
from raytrain_brats.synthetic.phantom import write_set
from tests.support.cases import REAL, save
from tests.support.clusters import train_alone
from tests.support.commands import OneRay

CROPS = REAL / "Task01_BrainTumour_crops"
QUICK = ["train.epochs=2", "checkpoint.every_samples=4", "validate.every_samples=1000", "run.cpus_per_task=0.5"]
QUICK += ["run.threads_per_worker=1"]  # many processes share the cores


def settings(*values: str) -> list[str]:
    return [f"--set={value}" for value in (*QUICK, *values)]


@pytest.mark.skipif(not CROPS.exists(), reason="the real MSD crops are not here")
def test_real_cases_go_through_every_command_by_both_routes(one_ray: OneRay, tmp_path: Path) -> None:
    """Real MSD cases: raw and store routes apply the same losses; predictions lie on the input's own grid."""
    options = settings("preprocess.spacing_mm=2.0", "data.patch_xyz=[32, 32, 16]", "data.patches_per_case=8")
    manifest, store = str(tmp_path / "m.jsonl"), str(tmp_path / "store")
    raw, stored, out = str(tmp_path / "raw"), str(tmp_path / "stored"), tmp_path / "out"
    one_ray.run(
        ["index", "--data", str(CROPS), "--out", manifest],
        ["prepare", "--data", manifest, "--store", store, *options],
        ["train", "--data", manifest, "--run-dir", raw, "--workers", "1", *options],
        ["train", "--store", store, "--run-dir", stored, "--workers", "1", *options],
        ["evaluate", "--data", manifest, "--run-dir", raw, "--no-mirror"],
        ["predict", "--run-dir", raw, "--out", str(out), "--images", str(CROPS), "--no-mirror"],
        ["report", "--run-dir", raw],
    )

    by_raw, by_store = books.read_rows(raw), books.read_rows(stored)
    assert len(by_raw) == 10  # 1 case x 8 patches x 2 epochs: the second begins after two of eight steps
    assert [r["positions"] for r in by_raw] == [r["positions"] for r in by_store]
    assert [r["loss"] for r in by_raw] == pytest.approx([r["loss"] for r in by_store], rel=1e-6)
    assert json.loads((tmp_path / "raw/evaluation/summary.json").read_text())["data"] == "real"
    assert "BRATS_119" in (tmp_path / "raw/report.html").read_text()
    for image in sorted((CROPS / "imagesTr").glob("BRATS*.nii.gz")):
        given, made = nib.load(image), nib.load(out / image.name)
        assert made.shape == given.shape[:3]
        np.testing.assert_allclose(made.affine, given.affine)
        assert set(np.unique(np.asarray(made.dataobj))) <= {0, 1, 2, 3}


def test_an_interrupted_prepare_keeps_what_it_has_made(one_ray: OneRay, tmp_path: Path) -> None:
    """Ctrl-C amid it: one line, code 130; the same command makes what is missing, and that alone."""
    write_set(str(tmp_path / "data"), cases=40, seed=4, grid=32, anatomy="procedural")
    objects = tmp_path / "store" / "objects"
    command = ["prepare", "--data", str(tmp_path / "data"), "--store", str(tmp_path / "store"), *settings()]

    def made() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in objects.glob("*.parquet")}

    def press() -> None:
        until = time.monotonic() + 600
        while len(made()) < 3 and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(one_ray.process.pid, signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    _, said = one_ray.run(command, code=130)
    before = made()
    assert said == "interrupted\n" and 3 <= len(before) < 40
    printed, _ = one_ray.run(command)
    assert "40 cases prepared, 0 set aside" in printed
    assert len(made()) == 40 and before.items() <= made().items()


@pytest.mark.campaign
def test_a_full_size_volume_streams_raw_in_patches_of_96(one_ray: OneRay, tmp_path: Path) -> None:
    """A 240x240x155x4 phantom is decoded and preprocessed by Ray Data while a worker trains on 96^3 patches."""
    write_set(str(tmp_path / "data"), cases=2, seed=1, grid=240, anatomy="procedural")
    options = settings("preprocess.spacing_mm=1.0", "data.patch_xyz=[96, 96, 96]", "validate.max_cases=1")
    options += ["--set=train.global_batch=2", "--set=train.epochs=1", "--set=data.patches_per_case=2"]
    run = str(tmp_path / "run")
    one_ray.run(["train", "--data", str(tmp_path / "data"), "--run-dir", run, "--workers", "1", *options])

    row, *others = books.read_rows(run)
    assert not others
    assert row["bad"] == 0
    assert 0 < row["loss"] < 3
    assert any(e["event"] == "validation" for e in books.read_events(run))


def test_everything_may_live_on_s3(one_ray: OneRay, s3_server: str, tmp_path: Path) -> None:
    """Data, store, run folder and predictions on S3 (a real server on this machine); the run is resumed there."""
    write_set(str(tmp_path), cases=6, seed=2, grid=32, anatomy="procedural")
    for path in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        storage.write_bytes(f"{s3_server}/data/{path.relative_to(tmp_path)}", path.read_bytes())
    options = settings("preprocess.spacing_mm=7.5", "data.patch_xyz=[16, 16, 16]")
    data, manifest, store, run, out = (f"{s3_server}/{name}" for name in ("data", "m.jsonl", "store", "run", "out"))
    train = ["train", "--store", store, "--run-dir", run, "--workers", "1:2", *options]
    printed, _ = one_ray.run(
        ["index", "--data", data, "--out", manifest],
        ["prepare", "--data", manifest, "--store", store, *options],
        train,
        train,
        ["evaluate", "--store", store, "--run-dir", run],
        ["predict", "--run-dir", run, "--out", out, "--images", data],
        ["report", "--run-dir", run],
    )

    assert "is finished" in printed
    rows = books.read_rows(run)
    # 4 cases x 4 patches x 2 epochs, and 12 empty places
    assert [r["positions"] for r in rows] == [[p, p + 4] for p in range(0, 44, 4)]
    made = storage.list_files(s3_server)
    assert "run/report.html" in made
    assert sum(name.startswith("out/") and name.endswith(".nii.gz") for name in made) == 6
    assert sum(name.endswith("MANIFEST.json") for name in made) == 2
    curves = [name for name in made if name.startswith("run/tensorboard/steps/")]
    assert max(curves).endswith("-000000000044") and any(n.startswith("run/tensorboard/validation/") for n in made)


@pytest.mark.campaign
def test_a_run_is_the_same_wherever_its_cases_stay(one_ray: OneRay, tmp_path: Path) -> None:
    """Streamed, in shared memory (two workers) and on the device: the same rows, and weights equal to the bit."""
    data = str(tmp_path / "data")
    write_set(data, cases=5, seed=4, grid=32, anatomy="procedural")
    few = [*QUICK, "preprocess.spacing_mm=7.5", "data.patch_xyz=[16, 16, 16]", "data.patches_per_case=2"]
    few += ["train.reduction=exact"]
    alone = spec.build(config.load("demo", tuple(few)), str(tmp_path / "stream"), data, "")
    spec.write_config(alone)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: `exact` needs it
    train_alone(alone)
    torch.set_num_threads(threads)
    found = {}
    for kind, workers in (("stream", ""), ("host", "2"), ("device", "1")):
        run = str(tmp_path / kind)
        if workers:
            where = ["--recipe", "demo", "--data", data, "--run-dir", run, "--workers", workers]
            one_ray.run(["train", *where, *(f"--set={value}" for value in (*few, f"data.residency={kind}"))])
        events = [(e["where"], e["asked"]) for e in books.read_events(run) if e["event"] == "residency"]
        assert events == [(kind, kind)] * bool(workers)
        newest, _ = checkpoint.newest_valid(run)
        assert newest
        rows = [(row["positions"], row["samples"], row["loss"]) for row in books.read_rows(run)]
        found[kind] = rows, checkpoint.load(run, newest.name)[0]
    rows, weights = found["stream"]
    assert len(rows) >= 4
    for kind in ("host", "device"):
        assert found[kind][0] == rows
        assert all(torch.equal(found[kind][1][name], tensor) for name, tensor in weights.items())
    identity = spec.read_config(str(tmp_path / "host")).dataset_identity
    assert not list(resident.SHARED.glob(f"*-{identity}"))


def write_as(folder: Path, cases: list[Path], layout: str) -> list[str]:
    """MSD phantoms under other names, values and channel orders; the ids of the cases."""
    names, old = [], {"upenn": (0, 2, 1, 4), "ped": (0, 4, 2, 1), "nnunet": (0, 1, 2, 3)}
    for number, path in enumerate(cases):
        image, label = nib.load(path), nib.load(path.parents[1] / "labelsTr" / path.name)
        name = {"upenn": f"UPENN-GBM-{number:05d}_11", "ped": f"BraTS-PED-{number:05d}-000", "nnunet": f"P{number}"}[
            layout
        ]
        files = {
            "upenn": [f"images_structural/{name}/{name}_{kind}" for kind in ("FLAIR", "T1", "T1GD", "T2")],
            "ped": [f"{name}/{name}-{kind}" for kind in ("t2f", "t1n", "t1c", "t2w")],
            "nnunet": [f"imagesTr/{name}_{channel:04d}" for channel in (3, 0, 1, 2)],
        }[layout]
        truth = {"upenn": f"images_segm/{name}_segm", "ped": f"{name}/{name}-seg", "nnunet": f"labelsTr/{name}"}[layout]
        voxels = np.asarray(image.dataobj)
        for channel, file in enumerate(files):
            save(folder / f"{file}.nii.gz", voxels[..., channel], image.affine)
        save(folder / f"{truth}.nii.gz", np.array(old[layout], np.uint8)[np.asarray(label.dataobj)], image.affine)
        names.append(name)
    if layout == "nnunet":
        about = {"channel_names": dict(enumerate(("T1", "T1ce", "T2", "FLAIR"))), "file_ending": ".nii.gz"}
        about |= {"labels": {"background": 0, "edema": 1, "core": 2, "ET": 3}, "numTraining": len(cases)}
        (folder / "dataset.json").write_text(json.dumps(about))
    return names


def test_the_same_cases_in_any_layout_give_the_same_scores_and_predictions(one_ray: OneRay, tmp_path: Path) -> None:
    """UPENN-GBM, BraTS PED 2024 and nnU-Net's raw data through index, prepare, evaluate and predict, by one MSD run."""
    data, run = tmp_path / "msd", tmp_path / "run"
    write_set(str(data), cases=6, seed=2, grid=32, anatomy="procedural")
    cases = sorted((data / "imagesTr").glob("*.nii.gz"))
    ids = {layout: write_as(tmp_path / layout, cases, layout) for layout in ("upenn", "ped", "nnunet")}
    ids["msd"] = [path.name.removesuffix(".nii.gz") for path in cases]
    options = settings("preprocess.spacing_mm=7.5", "data.patch_xyz=[16, 16, 16]", "train.epochs=10")
    commands = [["train", "--data", str(data), "--run-dir", str(run), "--workers", "1", *options]]
    prepared: dict[str, list[Any]] = {}
    for layout in ("msd", "upenn", "ped", "nnunet"):
        store, out = (str(tmp_path / f"{layout}.{what}") for what in ("store", "out"))
        commands += [
            ["prepare", "--data", str(tmp_path / layout), "--store", store, "--set=preprocess.spacing_mm=7.5"],
            ["predict", "--run-dir", str(run), "--images", str(tmp_path / layout), "--out", out, "--no-mirror"],
        ]
        if layout in ("msd", "ped"):
            commands += [["evaluate", "--store", store, "--run-dir", str(run), "--split", "all", "--no-mirror"]]
    again = ["predict", "--run-dir", str(run), "--images", str(data), "--out", f"{out}2", "--no-mirror"]
    one_ray.run(*commands, [*again, "--convention", "brats2023"])
    summaries = [json.loads(path.read_text()) for path in run.glob("evaluation*/**/summary.json")]
    assert sorted(found["convention"] for found in summaries) == ["brats2024_ped", "msd"]
    assert summaries[0]["dice"] == summaries[1]["dice"]
    for layout in ids:
        changes = ["preprocess.spacing_mm=7.5"]
        manifest, source = spec.open_cases(config.load("demo", changes), "", str(tmp_path / f"{layout}.store"))
        read = map(source.load, manifest.cases)
        prepared[layout] = [(case.image_czyx, to_regions(case.truth_xyz(), source.convention)) for case in read]
    for layout, found in prepared.items():
        for mine, first in zip(found, prepared["msd"], strict=True):
            assert all(map(np.array_equal, mine, first)), layout
    for number in range(len(cases)):
        made = [
            np.asarray(nib.load(tmp_path / f"{layout}.out" / f"{names[number]}.nii.gz").dataobj)
            for layout, names in ids.items()
        ]
        assert made[0].any() and all(np.array_equal(made[0], other) for other in made[1:])
        other = np.asarray(nib.load(f"{out}2/{ids['msd'][number]}.nii.gz").dataobj)
        assert np.array_equal(other, np.array([0, 2, 1, 3])[np.asarray(made[-1])])


def test_a_bad_case_is_named_and_the_run_goes_on_or_stops_by_its_share(one_ray: OneRay, tmp_path: Path) -> None:
    """A cut-off file costs its samples, not the run; beyond the allowed share the run stops and says why."""
    data, run = tmp_path / "data", tmp_path / "run"
    write_set(str(data), cases=6, seed=2, grid=32, anatomy="procedural")
    damaged = data / "imagesTr/BRATS_001.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    options = settings("preprocess.spacing_mm=7.5", "data.patch_xyz=[16, 16, 16]")
    train = ["train", "--data", str(data), "--workers", "1", *options]
    one_ray.run([*train, "--run-dir", str(run), "--set=data.max_bad_share=0.5"])

    assert sum(row["bad"] for row in books.read_rows(str(run))) == 2 * 4  # epochs x patches of the one case
    quarantined = [e for e in books.read_events(str(run)) if e["event"] == "quarantine"]
    assert {(e["case"], e["reason"]) for e in quarantined} == {("BRATS_001", "gzip_damaged")}

    _, said = one_ray.run([*train, "--run-dir", str(tmp_path / "strict")], fails=True)
    assert "max_bad_share" in said
    assert "Traceback" not in said


def test_a_run_goes_on_longer_and_another_begins_with_it_and_ends_early(one_ray: OneRay, tmp_path: Path) -> None:
    """More epochs than at first: one list of positions, proved. Its weights, with a learning rate that changes nothing:
    no gain, so both of two ranks end at the same step; a new start finds it finished, and says why."""
    write_set(str(tmp_path / "data"), cases=6, seed=2, grid=32, anatomy="procedural")
    small = settings("preprocess.spacing_mm=7.5", "data.patch_xyz=[16, 16, 16]", "train.epochs=2")
    run, tuned = str(tmp_path / "run"), str(tmp_path / "tuned")
    train = ["train", "--data", str(tmp_path / "data"), "--workers", "1", *small]
    still = [
        "--workers",
        "2",
        "--set=train.optimiser.learning_rate=1e-30",
        "--set=validate.patience_samples=8",
        "--set=train.epochs=9",
    ]
    again = [*train, *still, "--set=validate.every_samples=8", "--run-dir", tuned, "--init-from", f"{run}/best"]
    printed, _ = one_ray.run(
        [*train, "--run-dir", run],
        [*train, "--run-dir", run, "--set=train.epochs=3"],
        ["verify", "--run-dir", run],
        again,
        again,
        ["compare", run, tuned],
    )
    assert (
        "longer: 2 -> 3 epochs, 44 -> 72 samples; the learning rate at sample 44 was to be 0 and is 0.0006" in printed
    )
    rows = books.read_rows(run)
    assert [r["positions"] for r in rows] == [[p, p + 4] for p in range(0, rows[-1]["samples_seen"], 4)]
    assert spec.read_config(run).earlier_epochs == (2,)
    assert f"begins with the weights of {run}, checkpoint" in printed
    (early,) = [e for e in books.read_events(tuned) if e["event"] == "early_stop"]
    found, _ = checkpoint.newest_valid(tuned)
    assert found and found.samples_seen == early["samples_seen"] < 40
    assert {row["world_size"] for row in books.read_rows(tuned)} == {2}
    assert f"{tuned} is finished: the held-out cases' mean Dice was" in printed
    assert f"raytrain-brats evaluate --data {tmp_path / 'data'} --run-dir {tuned}" in printed
