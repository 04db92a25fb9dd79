"""The report tells the truth about a run, and its pictures show what they claim."""

import io
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from raytrain_brats import report
from raytrain_brats.errors import UserError
from raytrain_brats.reporting import facts, figures
from raytrain_brats.reporting import page as reporting_page
from raytrain_brats.reporting.goodput import time_breakdown
from tests.support.run_folders import EVENTS, ROWS, write_run
from tests.support.simulated_run import Run

PNG = b"\x89PNG\r\n\x1a\n"


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(PNG)
    return matplotlib.image.imread(io.BytesIO(png))


def simulated() -> Run:
    """Kills, a resize, a driver that died and one that was interrupted; 27 worker groups."""
    run, step = Run(now=1.8e9), ("step", 2.0, 0.1)
    life = [step, step, ("checkpoint", 0.3, 0.1), step, ("commit", 0, 0), ("validate", 3, 0)]
    ends = ("kill", "resize saved", "driver killed", "interrupt saved", *["kill", "event lost", "kill"] * 7, "damaged")
    for number, end in enumerate(ends):
        run.group([*life * (4 + number % 3), step, step], end, 2.0 + number / 4, 1 + number % 2)
    run.group([*life * 4, step, ("idle", 0.5, 0)], "finish")
    return run


def test_the_books_and_the_recoveries_are_shown(tmp_path: Path) -> None:
    """Goodput, a share for every cause that counts, the slowest twenty recoveries and their quantiles."""
    run = simulated()
    page = Path(reporting_page.write_report(str(write_run(tmp_path / "run", run.rows, run.events)))).read_text()
    split = time_breakdown(run.events, run.rows)
    assert set(split.parts()) == set(figures.TIME_COLOURS)
    assert f"<b>{split.goodput:.1%}</b><span>time in steps that were kept / time the run was up" in page
    for cause in ("productive", "data wait", "checkpoint", "validation", "recovery", "redone", "stopped"):
        assert f"{100 * split.parts()[cause] / split.wall_s:.1f} %" in page.split("</i>" + cause, 1)[1][:200]
    assert "</i>unsaved" not in page
    table = page.split("<h2>Recoveries", 1)[1].split("</table>", 1)[0]
    assert table.count("<tr>") == 1 + reporting_page.MOST_RECOVERIES + 2
    assert "20 of 27, slowest first" in table
    assert ">p50<" in table and ">no launch<" in table


def test_the_wait_for_the_first_batch_is_recovery_everywhere(tmp_path: Path) -> None:
    """In the table, in both shares of waiting, in the hours and the paces within steps, and in the picture."""
    run = Run(now=1.8e9)
    run.group([("step", 2.0, 6.0), *[("step", 2.0, 0.0)] * 5], "finish", 3.0)
    folder = str(write_run(tmp_path / "run", run.rows, run.events))
    page = Path(reporting_page.write_report(folder)).read_text()
    assert "recovery <small>" in page and "<td>12.0 s</td>" in page.split("recovery <small>", 1)[1][:150]
    assert "<span>data wait</span><b>0.0%</b>" in page
    assert "up: 0.0% waiting for data" in page
    assert "2.00 within steps" in page, "24 samples in 12 s"
    areas = figures._areas(reporting_page._read(folder).rows, run.events, 2)
    origin = run.events[0]["time"]
    assert [(name, spans[0][0] - origin, spans[0][1] - origin) for name, spans in areas.items()] == [
        ("productive", 12.0, 24.0), ("recovery", 0.0, 12.0)
    ]  # fmt: skip


def test_report_from_metrics_alone(tmp_path: Path) -> None:
    """A run cut off after its first step, without events, is still reported."""
    target = Path(reporting_page.write_report(str(write_run(tmp_path / "run", ROWS[:1], []))))
    page = target.read_text()
    assert target == tmp_path / "run" / "report.html"
    assert "no end recorded" in page
    assert "<h2>Validation history" not in page
    assert "None" not in page


def test_torn_last_line_is_skipped_and_named(tmp_path: Path) -> None:
    """A writer killed in the middle of a line costs that line and no more, and the reader is told."""
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "samp')
    page = Path(reporting_page.write_report(str(run))).read_text()
    assert "1 torn line in" in page
    assert "<b>40</b><span>of 40 (100%)" in page


@pytest.mark.parametrize("create", [False, True])
def test_missing_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], create: bool) -> None:
    """A folder that is missing, or has no metrics yet, ends with code 2 and one line that names it."""
    run = tmp_path / "nowhere"
    if create:
        run.mkdir()
        (run / "events.jsonl").write_text("{}\n")
    assert report.main(["--run-dir", str(run)]) == 2
    message = capsys.readouterr().err
    assert str(run) in message
    assert message.count("\n") == 1
    with pytest.raises(UserError):
        reporting_page.write_report(str(run))


def test_report_shows_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Headline numbers, tables and figures are there, nothing is fetched, and hostile names stay text."""
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("synthetic: true\nname: '<b>bold</b>'\n")
    plan = {"samples_per_s": 320.4, "data_wait": 0.02, "seconds": 9000, "usd": 59.5}
    (run / "plan.json").write_text(json.dumps({"plan": plan}))
    (run / "evaluation" / "overlays").mkdir(parents=True)
    header = "case,dice_WT,dice_TC,dice_ET,hd95_WT_mm,hd95_TC_mm,hd95_ET_mm\n"
    lines = 'good,0.9,0.9,0.9,1,1,1\nunknown,nan,nan,nan,nan,,\n"<img src=x>",0.1,0.2,0.3,9,inf,9\n'
    (run / "evaluation" / "cases.csv").write_text(header + lines)
    summary = {"split": "val", "cases": 3, "checkpoint": "c-40", "dice": {"WT": 0.875}, "data": "phantom"}
    (run / "evaluation" / "summary.json").write_text(json.dumps(summary))
    (run / "evaluation" / "overlays" / "good.png").write_bytes(PNG + b"overlay")
    out = tmp_path / "elsewhere" / "page.html"
    assert report.main(["--run-dir", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = out.read_text()
    for expected in (
        "phantom scores say nothing about patients", "<b>0.875</b>", "1–2", "finished", "cut &amp; short",
        "<b>0.62</b>", "of the time within steps", "2.5 h in all, $59.50", "none: from scratch", "∞",
        "Made by", "worker hours within steps",
    ):  # fmt: skip
        assert expected in page, expected
    for forbidden in ("<script", "<img src=x", "<b>bold", 'src="http', "url(", "<link"):
        assert forbidden not in page, forbidden
    table = page.split("<h2>Every case", 1)[1]
    assert table.index("&lt;img src=x&gt;") < table.index(">good<") < table.index(">unknown<")
    assert page.count("data:image/png;base64,") == 2 * (5 + 2) + 1


def test_charts_draw_in_both_modes() -> None:
    """Each chart is a PNG with a transparent ground, and its dark variant differs."""
    split = time_breakdown(EVENTS, ROWS).parts()
    validations = [e for e in EVENTS if e["event"] == "validation"]
    for light, dark in (
        (figures.loss_curve(ROWS), figures.loss_curve(ROWS, dark=True)),
        (figures.dice_curve(validations), figures.dice_curve(validations, dark=True)),
        (figures.worker_timeline(ROWS, EVENTS), figures.worker_timeline(ROWS, EVENTS, dark=True)),
    ):
        assert pixels(light)[0, 0, 3] == 0
        assert light != dark
    wide, narrow = (pixels(figures.worker_timeline(ROWS, EVENTS, narrow=narrow)) for narrow in (False, True))
    assert narrow.shape[1] < 0.6 * wide.shape[1] and narrow.shape[0] > wide.shape[0], "its legend is below it"
    assert len(np.unique(pixels(figures.time_split(split)).reshape(-1, 4), axis=0)) > 5
    broken = [{**ROWS[0], "loss": float("nan")}, {**ROWS[1], "loss": None}]
    assert pixels(figures.loss_curve(broken)).size
    assert pixels(figures.dice_curve([])).size


def test_the_cost_is_the_sum_of_what_was_noted() -> None:
    """Over all launches; a run without prices has no such line."""
    events = [{"event": "cost", "dollars": dollars, "dollars_per_hour": 36.0} for dollars in (0.61, 1.22)]
    ((name, value, note),) = facts.cost([{"event": "launch"}, *events])
    assert (name, value) == ("cost", "$1.83") and note.startswith("$36.00 an hour at last")
    assert facts.cost([{"event": "launch"}]) == []
