"""`scripts/bench augment`: what it counts, what it writes, what it refuses."""

import json
from pathlib import Path

import pytest

from scripts import bench, bench_augment


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_augment, "cpu_ms", lambda act, seconds: act() is None or 1.5)
    monkeypatch.setattr(bench_augment, "SEEDS", 400)


def test_figures_and_page_are_written_and_a_stranger_s_file_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operation and list has a figure, the page a row for each; a sample needs a tenth more than its patch."""
    monkeypatch.setattr(bench_augment, "traffic", lambda case: {"kernels": 99, "gb": 0.5})
    figures, page = tmp_path / "augment.json", tmp_path / "augment.md"
    arguments = ["augment", "--edges", "16", "--peers", "", "--json", str(figures), "--page", str(page)]
    for _ in range(2):  # its own files are replaced
        assert bench.main(arguments) == 0
    size = json.loads(figures.read_text())["sizes"]["16"]
    assert len(size["operations"]) == 9 and all(row["ours_ms"] for row in size["operations"].values())
    assert set(size["lists_ms"]) == {"light", "full"}
    assert size["read"]["ours"] == pytest.approx(1.1, abs=0.05) and size["read"]["moved"] == pytest.approx(
        0.36, abs=0.02
    )
    assert all(name in page.read_text() for name in size["operations"])
    page.write_text("mine")
    assert bench.main(arguments) == 2 and page.read_text() == "mine"


def test_a_sample_needs_few_kernels() -> None:
    """On average over samples, at most 120: the host launches them in well under a millisecond."""
    assert 0 < bench_augment.traffic(bench_augment.case_of(16), 60)["kernels"] <= 120


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--edges", "64,x"], "--edges 'x': write numbers of voxels from 16 to 256"),
        (["--peers", "kornia"], "--peers kornia: not known; there are monai, nnunet"),
    ],
)
def test_mistakes_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["augment", *arguments]) == 2
    assert told in capsys.readouterr().err
