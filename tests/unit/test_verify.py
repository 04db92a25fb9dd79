"""`verify` accepts a true run and names the first false row of a forged one."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrain_brats import config, verify
from raytrain_brats.data.sampler import ORDER, fingerprint
from raytrain_brats.errors import UserError
from raytrain_brats.run import spec
from tests.support.cases import write_msd_folder
from tests.support.simulated_run import Run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the rows that an undisturbed run would leave; no Ray, no training."""
    write_msd_folder(tmp_path / "data", 6)
    settings = config.load("demo", ("train.epochs=2", "data.patches_per_case=3"))
    made = spec.build(settings, str(tmp_path / "run"), str(tmp_path / "data"), "")
    spec.write_config(made)
    lines = []
    for low in range(0, made.sampler.total, made.sampler.global_batch):
        high, total = low + made.sampler.global_batch, 0
        for sample in map(made.sampler.sample, range(low, high)):
            name = "" if sample.case is None else made.train_cases[sample.case].id
            total += fingerprint(sample.position, name, sample.seed)
        about = {"step": low // made.sampler.global_batch, "positions": [low, high], "samples_seen": high}
        lines.append(about | {"samples": total, "generation": 1, "world_size": 2})
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "run"


def forge(run: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    change(rows)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_true_run_is_proved(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All positions, padding too; a run that is not finished is proved as far as it is."""
    assert verify.main(["--run-dir", str(run)]) == 0
    total = len((run / "metrics.jsonl").read_text().splitlines()) * 4
    assert capsys.readouterr().out.startswith(f"{total} of {total} positions applied in {total // 4} steps")
    forge(run, lambda rows: rows.__delitem__(slice(3, None)))
    assert verify.main(["--run-dir", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"12 of {total} positions")


def test_the_time_is_told_beside_the_proof(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there are events, one more line: goodput, and shares that sum to 100 %. It proves and refutes nothing."""
    simulated, step = Run(), ("step", 2.0, 1.0)
    simulated.group([step, ("checkpoint", 0, 0.5), ("commit", 0, 0), step], "kill")
    simulated.group([step], "finish")
    events = run / "events.jsonl"
    events.write_text("".join(json.dumps(event) + "\n" for event in simulated.events))
    assert verify.main(["--run-dir", str(run)]) == 0
    told = capsys.readouterr().out.splitlines()[1]
    assert told.startswith("goodput 19.4%") and "redone 1" in told and "stopped" not in told
    assert sum(float(share) for share in re.findall(r" ([\d.]+)%", told.split(" s: ")[1])) == pytest.approx(
        100, abs=0.3
    )
    events.write_text('7\n{"event": "checkpoint"}\n{"event": "group", "time": 5}\n{"time": 6')
    assert verify.main(["--run-dir", str(run)]) == 0
    assert "goodput not recorded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (lambda rows: rows.pop(2), 3),
        (lambda rows: rows.insert(2, rows[1]), 3),
        (lambda rows: rows.reverse(), 1),
        (lambda rows: rows[1].update(samples=rows[0]["samples"]), 2),
        (lambda rows: rows[3].update(positions=[12, 17]), 4),
        (lambda rows: rows.append(rows[-1]), 9),
    ],
)
def test_a_forged_row_is_named(run: Path, change: Any, row: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, twice, out of order, other samples, other positions, more than the plan."""
    forge(run, change)
    assert verify.main(["--run-dir", str(run)]) == 1
    assert f"metrics, row {row}: " in capsys.readouterr().err


def test_other_data_than_the_runs_is_no_proof(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A manifest with other checksums is not what the run was trained on."""
    manifest = run / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0', 1))
    assert verify.main(["--run-dir", str(run)]) == 1
    assert "manifest.jsonl is not the data" in capsys.readouterr().err


def test_a_run_of_another_order_is_refused_and_still_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before orders had names a run had windows: `train` and `verify` refuse it in a line, others read its settings."""
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored.pop("order") == ORDER
    stored["config"]["data"]["window_cases"] = 4
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    assert verify.main(["--run-dir", str(run)]) == 2
    told = capsys.readouterr().err
    assert "gave the samples another order" in told and told.count("\n") == 1
    before = spec.open_run(str(run))
    with pytest.raises(UserError, match="another order"):
        spec.build(before.config, str(run), stored["data"], "")
    assert before.config.data.patches_per_case == 3
