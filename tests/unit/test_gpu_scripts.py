"""`scripts/gpu_check` and `scripts/bench step` on a CPU, as on a machine that has no Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytrain_brats.planning import closed_form
from scripts import bench, check_plan, gpu_check
from scripts.gpu_parts import steps

ROOT = Path(gpu_check.__file__).parent.parent
NO_RAY = "import sys; sys.modules['ray'] = None\n"


@pytest.fixture
def without_ray(tmp_path: Path) -> dict[str, str]:
    """The environment of Python processes in which Ray cannot be imported."""
    (tmp_path / "no_ray").mkdir()
    (tmp_path / "no_ray" / "sitecustomize.py").write_text(NO_RAY)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "no_ray"), str(ROOT)])}


def python(module: str, arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", module, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_what_a_cpu_can_show_is_right(tmp_path: Path, without_ray: dict[str, str]) -> None:
    """All parts, without Ray: at most two uploads a step, no wait in `launch`, no activation copied, backward keeps no
    more than it did, fp16's updates are the same at two ranks, resident cases give the stream's patches."""
    out = tmp_path / "check.json"
    done = python("scripts.gpu_check", ["--cpu", "--json", str(out)], without_ray)
    assert out.exists(), done.stderr
    found = json.loads(out.read_text())

    assert found["machine"]["ray"] is False
    assert {row["part"] for row in found["findings"]} == set(gpu_check.PARTS)
    # how long others wait depends on who else uses this machine: only that it was measured
    assert [wrong for wrong in found["wrong"] if not wrong.startswith("saving:")] == [], done.stderr
    assert done.returncode == bool(found["wrong"])
    assert found["uploads_per_step"] <= 2 and found["readbacks_in_launch"] == 0
    assert found["copy_slices"] == 0
    assert found["saved_gb_per_patch"] == pytest.approx({"segresnet": 2.15, "dynunet": 2.58}, rel=0.03)
    assert found["fp16_updates_agree"] is True and found["resident_equals_stream"] is True
    assert 0 < found["longest_wait_ms"] < 1000 and 0 <= found["step_stall_ms"] < 1000


def test_a_part_that_fails_is_wrong_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, the failure and the later parts' findings in the file."""

    def broken(_: Any) -> None:
        raise RuntimeError("no such kernel")

    def sound(setting: Any) -> None:
        setting.findings.tell("all is well")

    for name, part in {"copies": broken, "uploads": sound}.items():
        monkeypatch.setitem(gpu_check.PARTS, name, part)
    out = tmp_path / "check.json"
    assert gpu_check.main(["copies", "uploads", "--cpu", "--json", str(out)]) == 1
    found = json.loads(out.read_text())
    assert found["wrong"] == ["copies: failed: RuntimeError: no such kernel"]
    assert "all is well" in [row["what"] for row in found["findings"]]
    assert gpu_check.main(["uploads", "--cpu"]) == 0


def test_a_mistake_in_the_request_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A part, an edge or a batch that cannot be: exit code 2 and a line that says why."""
    for arguments, why in ((["nothing", "--cpu"], "not known"), (["--cpu", "--edge", "20"], "multiples of 16")):
        with pytest.raises(SystemExit) as stop:
            gpu_check.main(arguments)
        assert stop.value.code == 2 and why in capsys.readouterr().err
    assert bench.main(["step", "--batches", "1,x"]) == 2
    assert "numbers of samples" in capsys.readouterr().err


def test_steps_are_measured_beside_the_peers(tmp_path: Path, without_ray: dict[str, str]) -> None:
    """Every recipe and loop has its figures, fed and from the device; what needs a GPU is null; who augments is said.
    Without Ray."""
    out = tmp_path / "step.json"
    few = ["--edge", "16", "--steps", "2", "--rounds", "1", "--batches", "2", "--peak-tflops", "1"]
    done = python("scripts.bench", ["step", *few, "--json", str(out)], without_ray)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())

    assert found["card"] == "none: CPU"
    loops = [(row["recipe"], row["loop"].split()[0]) for row in found["rows"]]
    assert loops == [(recipe, loop) for recipe in ("segresnet", "dynunet") for loop in ("ours", "MONAI", "nnU-Net's")]
    for row in found["rows"]:
        assert row["failed"] == "" and row["augmentation"] and row["fed_by"]
        assert row["fed_over_null"] == pytest.approx(row["fed"]["img_per_s"] / row["null"]["img_per_s"], rel=0.01)
        for kind in ("fed", "null"):
            assert row[kind]["img_per_s"] > 0 and 0 <= row[kind]["data_wait_share"] < 1
            assert row[kind]["host_waits_per_step"] is None and row[kind]["peak_gb"] is None
            assert row[kind]["share_of_peak_flops"] > 0
    assert "re-written" in done.stdout or "its own code" in done.stdout


def test_flops_of_the_recipes_and_peaks_of_cards() -> None:
    """Counted on shapes at full size; a card by its name, the more special one first."""
    assert steps.tflop_of("segresnet", 128) == pytest.approx(3.49, rel=0.02)
    assert steps.tflop_of("dynunet", 128) == pytest.approx(2.88, rel=0.02)
    assert steps.peak_of("NVIDIA H100 80GB HBM3") == 989 and steps.peak_of("NVIDIA H100 PCIe") == 756
    assert steps.peak_of("Tesla V100-SXM2-16GB") == 125 and steps.peak_of("a card of tomorrow") is None


def test_check_plan_compares_runs_that_differ_in_what_limits_them() -> None:
    """By bench's processes and a step's time: data tasks where steps are short, steps or processors where they are
    long; a kill has its own checkpoints."""
    spent = {
        "ReadCases": 19.0,
        "IDLE": 2.0,
        "raylet": 1.0,
        "SplitCoordinator": 2.0,
        "RayTrainWorker": 2.0,
        "other": 1.0,
    }
    loaded = {"runs": [{"patches": 1000, "cpu_s": spent, "wall_s": 24.0}]}
    short, long, two = (
        check_plan.demand(check_plan.RUNS[name], loaded, check_plan.Machine(0.1, 12.0), step_s, cpu_s)
        for name, step_s, cpu_s in (("full-data-1", 0.004, 0.001), ("full-step-1", 4.0, 1.2), ("kill", 2.0, 1.0))
    )
    assert short.case_cpu_s == pytest.approx(4 * 0.022) and short.step_cpu_s == pytest.approx(0.006)
    slowest = [min(found, key=lambda name: found[name]) for found in map(closed_form.limits, (short, long, two))]
    assert slowest[:2] == ["data tasks", "GPU step"] and slowest[2] in ("GPU step", "processors")
    assert (long.checkpoint_s, two.checkpoint_s) == (60, check_plan.KILL_CHECKPOINT_S)
    assert (two.other_cpus, two.recover_s) == (0.1, 12.0)
