"""A slice of the fault campaign, small enough for every day; `scripts/chaos all` is the whole of it.

The groups run in a process of their own: ranks are forked there, which is unsafe beside the threads of other tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.chaos_campaign import bits, core
from tests.support import ROOT


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the campaign wrote; one process for all sections, as the imports cost seconds."""
    out, scratch = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("scratch")
    amounts = ["--kills", "30", "--changes", "8", "--sizes", "1", "3", "5", "8"]
    command = [sys.executable, "-m", "scripts.chaos", "core", "controls", "storm", *amounts]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--out", str(out), "--scratch", str(scratch)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    found: dict[str, Any] = json.loads((out / "chaos.json").read_text())
    assert done.returncode == any(not entry["passed"] for entry in found.values()), done.stderr[-2000:]
    assert "## Resize storm" in (out / "chaos.md").read_text()
    return found


def test_thirty_kills_leave_the_run_as_if_undisturbed(books: dict[str, Any]) -> None:
    entry = books["core"]
    assert entry["failures"] == []
    assert entry["figures"]["kills"] == 30
    assert entry["figures"]["steps done again per kill, mean"] > 0


def test_every_protection_is_missed_when_it_is_taken_away(books: dict[str, Any]) -> None:
    """Else the campaign would pass a product that had lost it."""
    (rows,) = books["controls"]["tables"].values()
    assert {row["taken away"] for row in rows} == {"rename", "marker", "cut", "fence", "tree", "hash"}
    assert all(row["found by"] for row in rows), rows


def test_a_resize_storm_ends_bit_equal_and_asked_changes_cost_no_step(books: dict[str, Any]) -> None:
    entry = books["storm"]
    assert entry["failures"] == []
    assert entry["figures"]["changes of the world size"] == 8
    assert entry["figures"]["steps done again, all changes asked for"] == 0


def test_damaged_checkpoints_are_named_and_never_loaded(tmp_path: Path) -> None:
    entry = bits.section(tmp_path / "bits", 1, 300, lambda *_: None)
    assert entry["failures"] == []
    assert entry["figures"]["single bits flipped"] == 300


def test_a_campaign_that_hits_nothing_fails() -> None:
    """Kills that all land before the first step, or in one phase only, prove nothing."""
    vacuous = core.Figures(kills=1000, redone=[0] * 1000)
    vacuous.main.update({"load": 1000})
    assert len(vacuous.shortfalls()) == 6
    good = core.Figures(kills=1000, redone=[1])
    good.main.update(dict.fromkeys(core.COVERED, 50))
    assert good.shortfalls() == []
