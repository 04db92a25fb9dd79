"""By what a run was made: told of this process, kept in events, shown as a table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raytrain_brats import config, provenance
from raytrain_brats.reporting import provenance as shown
from raytrain_brats.run import hardware, members, spec
from tests.support.run_folders import event, step


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=n", "-c", "user.email=e@e"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def test_a_checkout_and_its_changes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the current folder, where it is another checkout than the package's; dirty once a known file changes."""
    git(tmp_path, "init")
    (tmp_path / "my.py").write_text("1\n")
    git(tmp_path, "add", "my.py")
    git(tmp_path, "commit", "-m", "one")
    monkeypatch.chdir(tmp_path)
    provenance.commits.cache_clear()
    clean = provenance.commits()["folder"]
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "my.py").write_text("2\n")
    provenance.commits.cache_clear()
    assert provenance.commits()["folder"] == {"commit": clean["commit"], "dirty": True}
    monkeypatch.setenv("PATH", "/nowhere")  # no git: nothing is said
    provenance.commits.cache_clear()
    assert provenance.commits() == {}
    provenance.commits.cache_clear()


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["/a/bin/raytrain-brats", "train", "--store", "my store"], "raytrain-brats train --store 'my store'"),
        (["/x/raytrain_brats/__main__.py", "train"], "raytrain-brats train"),
        (["/x/raytrain_brats/train.py", "--workers", "1:8"], "raytrain-brats train --workers 1:8"),
        (["/x/ipykernel_launcher.py", "-f", "k.json"], "ipykernel_launcher.py -f k.json"),
        (
            ["t", "--set", "run.tracking=mlflow:https://me:word@host/x"],
            "t --set run.tracking=mlflow:https://...@host/x",
        ),
        ([], ""),
    ],
)
def test_the_command_is_told_without_passwords(argv: list[str], wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was typed, by the command's own name."""
    monkeypatch.setattr(sys, "argv", argv)
    assert provenance.command() == wanted


def test_what_a_launch_and_a_worker_tell() -> None:
    """Versions of what decides the numbers; the machine; of a CPU no memory of a GPU."""
    found = provenance.of_launch()
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or found["versions"]["torch"]
    assert {"python", "ray", "torch", "monai"} <= found["versions"].keys() and found["machine"]["cpus"] > 0
    assert {"machine", "torch"} <= hardware.facts(torch.device("cpu")).keys()
    assert hardware.peak(torch.device("cpu")) == {}


def test_the_table_sums_launches_up() -> None:
    """Commands and commits that changed are told in order; devices of the largest group; dollars over all launches."""
    machine = {"kind": "p4d.24xlarge", "cpu": "Xeon", "cpus": 96, "memory_gb": 1152.0}
    one = {
        "recipe": "dynunet",
        "dataset_identity": "abc",
        "version": "0.1.0",
        "versions": {"python": "3.11", "torch": "2.13"},
    }
    two = {"command": "raytrain-brats train --workers 1:8", "code": {"commit": "b" * 40, "dirty": True}}
    worker = {"device": "A100", "gpu_gb": 42.0, "cuda": "12.6", "driver": "550.54", "machine": machine}
    events = [
        event("launch", 0.0, **one, command="raytrain-brats train", code={"commit": "a" * 40, "dirty": False}),
        event("worker", 1.0, generation=1, **worker),
        event("cost", 2.0, dollars=1.5),
        event("checkpoint", 3.0, gpu_peak_gb=11.04),
        event("launch", 10.0, **(one | two)),
        *(event("worker", 11.0 + n, generation=2, **worker) for n in range(2)),
        event("cost", 20.0, dollars=0.25),
        event("closed", 21.0, gpu_peak_gb=12.0),
    ]
    about = {
        "config": {"train": {"seed": 7}},
        "own_parts": {"my:Net": {"file": "/f/my.py", "sha256": "0123"}},
    }
    found = dict(shown.table(events, [step(n, 5.0 + n, 1, 2) for n in range(900)], about, 7200.0))
    assert found == {
        "command": "raytrain-brats train; then raytrain-brats train --workers 1:8",
        "launches": "2",
        "recipe": "dynunet",
        "seed": "7",
        "data identity": "abc",
        "code": f"raytrain_brats 0.1.0, commit {'a' * 12}; then raytrain_brats 0.1.0, commit {'b' * 12}, "
        "with changes that are not committed",
        "parts of one's own": "my:Net (/f/my.py, sha256 0123)",
        "versions": "python 3.11, torch 2.13, cuda 12.6, driver 550.54",
        "devices": "2 x A100",
        "machines": "1 x p4d.24xlarge, Xeon, 96 CPUs, 1152 GB",
        "peak GPU memory": "12.0 of 42 GB, of rank 0, by torch's own count",
        "hours": "2.00 up; 1.00 GPU hours within steps",
        "cost": "$1.75, by the prices given, while a driver ran",
    }
    assert shown.table([], [], {}, 0.0) == []


def test_a_prediction_s_record_names_seed_and_data() -> None:
    """Evaluations keep the shorter words, by which they find earlier ones."""
    run = spec.StoredRun(config.load("demo", ("train.seed=9",)), "msd", "abc", "")
    member = members.Member("/runs/a", run, "c-1", "0f", {})
    assert member.made_of() == member.about() | {"seed": 9, "data": "abc"}
    assert "seed" not in member.about()
