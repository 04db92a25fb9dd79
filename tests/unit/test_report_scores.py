"""What the report says of scores: spread, outliers, rules in words, an earlier run; how the page looks on a phone."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrain_brats import report
from raytrain_brats.errors import UserError
from raytrain_brats.reporting import evaluated, scores
from raytrain_brats.reporting.page import write_report
from tests.support.run_folders import EVENTS, ROWS, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), "")
RULES = {"thresholds": [0.5, 0.4, 0.6], "parts_mm3": [0.0, 100.0, 0.0], "smallest_et_mm3": 200.0}
PLAIN = {"thresholds": [0.5, 0.5, 0.5], "parts_mm3": [0.0, 0.0, 0.0], "smallest_et_mm3": 0.0}


def case(name: str, dice: float, hd95_mm: float = 5.0) -> dict[str, Any]:
    row: dict[str, Any] = {"case": name}
    for region in ("WT", "TC", "ET"):
        row |= {f"dice_{region}": dice, f"hd95_{region}_mm": hd95_mm, f"lesion_dice_2023_{region}": dice - 0.1}
        row |= {f"lesion_tp_2023_{region}": 2, f"lesion_fn_2023_{region}": 1, f"lesion_fp_2023_{region}": 0}
        row |= {f"volume_{region}_truth_ml": 12.34, f"volume_{region}_prediction_ml": 0.0, f"empty_{region}": ""}
    return row


CASES = [case(f"case_{n}", 0.9 + n / 100) for n in range(5)] + [case("worst", 0.2, 60.0)]


def evaluate_run(run: Path, rows: list[dict[str, Any]] = CASES, **about: Any) -> Path:
    write_run(run)
    (run / "evaluation" / "overlays").mkdir(parents=True)
    (run / "evaluation" / "cases.csv").write_bytes(scores.cases_csv(rows))
    summary = {"split": "val", "cases": len(rows), "held_out": len(rows), "checkpoint": "c-40", "mirror": True}
    summary |= {"postprocessing": PLAIN, "challenge": "GLI", "dice": {"WT": 0.8}, "data": "real"} | about
    (run / "evaluation" / "summary.json").write_text(json.dumps(summary))
    return run


def with_settings(run: Path, **config: Any) -> Path:
    about = {"recipe": "dynunet", "convention": "msd", "synthetic": False, "config": config}
    (run / "config.yaml").write_text(yaml.safe_dump(about))
    return run


def test_spread_volumes_and_outliers(tmp_path: Path) -> None:
    """Median and quartiles stand beside the mean, lesions are counted, volumes are in ml, outliers are marked."""
    page = Path(write_report(str(evaluate_run(tmp_path / "run")))).read_text()
    assert "median 0.915, quartiles 0.90" in page
    assert "12 lesions found, 6 missed, 0 made up" in page
    assert "<td>12.3 / 0.0</td>" in page
    table = page.split("<h2>Every case", 1)[1].split("</table>", 1)[0]
    first = table.split("<tbody>", 1)[1].split("</tr>", 1)[0]
    assert "worst" in first and first.count("▼") == 6 == table.count("▼")
    assert "upper quartile" in table and "▼ marks an outlier" in page


def test_few_cases_have_no_outliers() -> None:
    """Quartiles of four cases say nothing; of a score of which more is worse, high values are the outliers."""
    assert scores.outliers(CASES[2:], scores.by_column(CASES[2:])) == set()
    marked = scores.outliers(CASES, scores.by_column(CASES))
    assert {name for name, _ in marked} == {"worst"} and ("worst", "hd95_ET_mm") in marked
    good = [case(f"case_{n}", 0.5) for n in range(5)] + [case("best", 0.99, 0.1)]
    assert scores.outliers(good, scores.by_column(good)) == set()


def test_rules_are_told_in_words(tmp_path: Path) -> None:
    """Thresholds and post-processing of the evaluation; what they gained only where they are those learned."""
    run = evaluate_run(tmp_path / "run", postprocessing=RULES)
    learned = {"rules": RULES, "cases": 9, "before": {"WT": [0.9, 0.8], "TC": [0.8, 0.7], "ET": [0.7, 0.6]}}
    learned["after"] = {"WT": [0.9, 0.8], "TC": [0.82, 0.7], "ET": [0.75, 0.6]}
    (run / "postprocessing.json").write_text(json.dumps(learned))
    page = Path(write_report(str(run))).read_text()
    for words in (
        "to WT over 0.5, to TC over 0.4, to ET over 0.6", "dropped under 100 mm³ from TC", "less than 200 mm³ of ET",
        "learned on 9 held-out cases", "TC 0.800 to 0.820, ET 0.700 to 0.750", "its seven mirror images",
    ):  # fmt: skip
        assert words in page, words
    (run / "postprocessing.json").write_text(json.dumps(learned | {"rules": PLAIN}))
    assert "learned on 9" not in Path(write_report(str(run))).read_text()
    (run / "postprocessing.json").write_text("torn {")
    assert "learned on 9" not in Path(write_report(str(run))).read_text()
    plain = " ".join(evaluated.how(evaluated.Evaluated({"postprocessing": PLAIN, "mirror": False, "cases": 2})))
    assert "over 0.5" in plain and "No post-processing" in plain and "one image, not mirrored" in plain
    assert "not recorded" in " ".join(evaluated.how(evaluated.Evaluated({"cases": 2})))


def test_four_validated_and_six_evaluated_cases_are_explained(tmp_path: Path) -> None:
    """Which setting is the reason, and that mirroring alone gives another Dice; nothing where both are alike."""
    run = with_settings(evaluate_run(tmp_path / "run"), validate={"max_cases": 2, "mirror": False})
    events = [e | {"cases_val": 6} if e["event"] == "launch" else e for e in EVENTS]
    write_run(run, ROWS, events)
    page = Path(write_report(str(run))).read_text()
    assert "validation scored 2 cases; the evaluation scored 6" in page
    assert "2 of the 6 held-out cases (validate.max_cases=2)" in page and "at eight mirror images" in page
    alike = evaluated.Evaluated({"cases": 2, "split": "val", "mirror": False})
    assert evaluated.why_others([{"cases": 2}], alike, {"validate": {"max_cases": 2}}, {"cases_val": 2}) == []
    trained = evaluated.Evaluated({"cases": 9, "split": "all"})
    assert "of split all" in " ".join(evaluated.why_others([{"cases": 2}], trained, {}, {}))


def test_an_earlier_run_stands_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Differences with their sign and whether they are better, cases in both, settings that differ, and what makes
    the two no fair comparison; the run itself, or a folder that is none, is refused."""
    now = with_settings(evaluate_run(tmp_path / "now"), train={"epochs": 3, "seed": 1})
    before = [case(row["case"], float(row["dice_WT"]) - 0.05, 9.0) for row in CASES[1:]]
    earlier = with_settings(evaluate_run(tmp_path / "before", before, mirror=False), train={"epochs": 2, "seed": 1})
    assert report.main(["--run-dir", str(now), "--beside", str(earlier), "--title", "Our <third> try"]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert "<h1>Our &lt;third&gt; try" in page
    table = page.split("<h2>Beside an earlier run", 1)[1].split("<h2>", 1)[0]
    assert "5 cases were scored by both: 5 better here, 0 worse" in table and "+0.050." in table
    assert "no fair comparison: mirroring, cases (6 and 5, 5 in both)" in table
    assert "Dice WT, median" in table and '<td class="better">better +' in table
    assert "train.epochs" in table and "train.seed" not in table
    for wrong, message in ((now, "the run itself"), (tmp_path / "none", "no such run folder")):
        assert report.main(["--run-dir", str(now), "--beside", str(wrong)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError):
        write_report(str(now), earlier=str(tmp_path))
    bare = write_run(tmp_path / "bare")
    assert "Not evaluated" in Path(write_report(str(now), earlier=str(bare))).read_text()


def test_an_earlier_evaluation_is_still_shown(tmp_path: Path) -> None:
    """cases.csv of a version without volumes, lesions and rules: no empty columns, no claim about rules."""
    rows = [{k: v for k, v in row.items() if k in ("case", *scores.FIRST)} for row in CASES]
    run = evaluate_run(tmp_path / "run", rows)
    (run / "evaluation" / "summary.json").write_text(json.dumps({"split": "val", "cases": 6, "dice": {"WT": 0.8}}))
    page = Path(write_report(str(run))).read_text()
    assert "WT ml</th>" not in page and "lesions found" not in page and "are not recorded" in page
    for row in rows:
        row["dice_ET"] = float("nan")
    (run / "evaluation" / "cases.csv").write_bytes(scores.cases_csv(rows))
    assert "<td>–</td>" in Path(write_report(str(run))).read_text()


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_nothing_is_cut_off_on_a_phone(tmp_path: Path) -> None:
    """At 400 pixels the page itself does not scroll sideways; wide tables scroll within their panels, pictures fit."""
    run = with_settings(evaluate_run(tmp_path / "run"), train={"x": "y" * 300})
    (run / "evaluation" / "overlays" / "worst.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    other = evaluate_run(tmp_path / ("a_run_with_quite_a_long_name_" * 3))
    page = Path(write_report(str(run), earlier=str(other)))
    beyond = "[...document.images].filter(i => i.getBoundingClientRect().right > innerWidth).length"
    sizes = f"[innerWidth, document.documentElement.scrollWidth, {beyond}]"
    told = f"<script>document.title = {sizes}.join(' ')</script></body>"
    page.write_text(page.read_text().replace("</body>", told))
    command = [BROWSER, "--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=400,800", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    (sizes,) = re.findall(r"<title>(\d+ \d+ \d+)</title>", done.stdout)
    assert sizes == "400 400 0"
