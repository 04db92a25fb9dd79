"""The commands as functions: cheap to import, values out, the commands' own one-line errors."""

import ast
import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytrain_brats import api, config, predict, storage
from raytrain_brats.api import RunFailed, UserError
from raytrain_brats.run import spec
from tests.support import ROOT
from tests.support.commands import environment
from tests.support.run_folders import EVENTS, ROWS, event, scores, write_run

NOTEBOOK = ROOT / "docs/notebooks/first_run.ipynb"
FUNCTIONS = ("phantom", "prepare", "train", "evaluate", "predict")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder as books and a config.yaml, with a validation whose Dice fell at the end."""
    more = [event("validation", 1136.0, samples_seen=44, **scores(0.25))]
    folder = write_run(tmp_path / "run", events=EVENTS[:-1] + more + EVENTS[-1:])
    about = {
        "identity": "abc",
        "convention": "msd",
        "order": "",
        "config": config.load("demo").model_dump(mode="json", by_alias=True),
    }
    (folder / "config.yaml").write_text(json.dumps(about))
    return folder


def test_importing_is_cheap() -> None:
    """Neither the package nor its functions bring Ray, torch, MONAI or NumPy along."""
    code = (
        "import sys, raytrain_brats.api; "
        "print([m for m in ('ray', 'torch', 'monai', 'numpy', 'tyro') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_the_options(name: str) -> None:
    """Every argument is an option of the command, with the same default; the others are taken by name."""
    options = {f.name: f.default for f in dataclasses.fields(importlib.import_module(f"raytrain_brats.{name}").Args)}
    parameters = inspect.signature(getattr(api, name)).parameters
    assert {p for p in parameters if p != "more"} <= options.keys()
    same = {"mirror", "split", "save_probabilities", "cases", "grid", "seed"}
    assert all(parameters[p].default == options[p] for p in same & parameters.keys())
    with pytest.raises(UserError, match=rf"{name}\(\) has no option 'nix'"):
        getattr(api, name)(**{p: "x" for p in ("images", "out", "run_dir") if p in parameters}, nix=3)


def test_a_run_is_read(run_dir: Path) -> None:
    """Rows, the validations by samples, the last of them and the best, whether it was finished."""
    run = api.load_run(run_dir)
    assert (run.path, run.convention, run.dataset_identity) == (str(run_dir), "msd", "abc")
    assert run.config == config.load("demo")
    assert [row["step"] for row in run.rows] == [row["step"] for row in ROWS] and run.samples_seen == 40
    assert [v["samples_seen"] for v in run.validations] == [20, 40, 44]
    assert run.last and run.last["samples_seen"] == 44
    assert run.best and run.best["samples_seen"] == 40
    assert run.finished and run.evaluation is None


def test_an_evaluation_is_numbers(run_dir: Path) -> None:
    """A row for each case; a metric without a value is None."""
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation/summary.json").write_text('{"dice": {"WT": 0.5}}')
    (run_dir / "evaluation/cases.csv").write_text("case,dice_WT,hd95_WT_mm,empty_WT\n007,0.5,,prediction\n")
    found = api.load_run(run_dir).evaluation
    assert found and found.summary["dice"]["WT"] == 0.5
    assert found.rows == [{"case": "007", "dice_WT": 0.5, "hd95_WT_mm": None, "empty_WT": "prediction"}]


def test_mistakes_are_raised_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own words; nothing exits."""
    monkeypatch.delenv("RAYTRAIN_BRATS_RUN_DIR", raising=False)
    for call, fragment in (
        (lambda: api.load_run(tmp_path), "train first"),
        (lambda: api.train(store="s", recipe="demo"), "no run folder given"),
        (lambda: api.train(store="s", run_dir=tmp_path / "r", recipe="dem"), "recipe 'dem' is not known"),
        (lambda: api.train(store=3, run_dir="r"), "train(), store: Input should be a valid string (got 3)"),  # type: ignore[arg-type]
        (lambda: api.train(store="s", run_dir="r", stor="s"), "did you mean store?"),
        (lambda: api.train(store="s", run_dir="r", recipe="demo", set={"train.epoch": 3}), "did you mean train.epochs"),
        (lambda: api.train(store="s", run_dir="r", recipe="demo", set="train.epochs=3"), 'set="train.epochs=3"'),
        (lambda: api.train(store="s", run_dir="r", recipe="demo", set={"train.epochs": object()}), "no value of"),
        (lambda: api.evaluate(run_dir=tmp_path, split="foo"), "split"),  # type: ignore[arg-type]
        (lambda: api.load_config("demo", {"train.epochs": 0}), "train.epochs"),
    ):  # fmt: skip
        with pytest.raises(UserError) as raised:
            call()
        assert fragment in str(raised.value) and "\n" not in str(raised.value)


def test_what_a_task_of_ray_raises_becomes_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of the plain class, where Ray's carries a traceback."""

    class FromTask(RunFailed):
        cause = RunFailed("disk full\non node 3")

        def __str__(self) -> str:
            return "Traceback ...\n"

    def work(args: Any) -> None:
        raise FromTask

    monkeypatch.setattr(predict, "work", work)
    with pytest.raises(RunFailed, match=r"^disk full on node 3$") as raised:
        api.predict("image.nii.gz", run_dir="run", out="out")
    assert type(raised.value) is RunFailed


def test_settings_arrive_as_they_are() -> None:
    """Values of Python become values of the recipe: numbers without a dot, texts with a colon, lists, sections."""
    found = api.load_config(
        "demo",
        {"train.optimiser.learning_rate": 1e-5, "run.workers": "1:8", "data.patch_xyz": [32, 32, 16],
         "train.amp": False, "train.ema_samples": None, "network": {"name": "a.b:Net", "width": 3}},
    )  # fmt: skip
    assert (found.train.optimiser.learning_rate, found.run.workers, found.train.amp) == (1e-5, "1:8", False)
    assert found.data.patch_xyz == (32, 32, 16) and config.own_parts(found)["network"].options == {"width": 3}


def test_a_config_may_stand_for_a_recipe(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    """What the command reads is the config that was given, with the changes."""
    from raytrain_brats import train

    seen: list[Any] = []
    monkeypatch.setattr(train, "work", lambda args: seen.append((args, config.load(args.recipe, args.set))))
    wanted = api.load_config("demo", {"train.epochs": 3})
    api.train(run_dir=run_dir, store=Path("store"), recipe=wanted, workers=2, set={"train.seed": 5})
    ((args, settings),) = seen
    assert settings == config.parse(
        wanted.model_dump(by_alias=True) | {"train": wanted.train.model_dump() | {"seed": 5}}, ""
    )
    assert (args.store, args.workers, args.fold) == ("store", "2", "")


def test_a_fold_is_a_run_below(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    """`fold=0` is --fold 0, not the absence of one."""
    from raytrain_brats import train

    monkeypatch.setattr(
        train, "work", lambda args: Path(spec.fold_run(args.run_dir, int(args.fold))).symlink_to(run_dir)
    )
    made = api.train(run_dir=run_dir.parent, store="store", recipe="demo", fold=0)
    assert made.path == storage.normal(str(run_dir.parent / "fold-0"))


def test_the_notebook_is_sound() -> None:
    """It is a notebook whose code is Python and which imports what is there; the nightly campaign executes it."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    tree = ast.parse("\n".join(sources))
    imported = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "raytrain_brats.api"]
    names = {alias.name for node in imported for alias in node.names}
    assert names <= set(api.__all__) and {"train", "prepare", "predict", "evaluate", "load_run"} <= names
    for call in [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]:
        if call.func.id in names and inspect.isfunction(getattr(api, call.func.id)):  # type: ignore[attr-defined]
            inspect.signature(getattr(api, call.func.id)).bind(  # type: ignore[attr-defined]
                *[None] * len(call.args), **{k.arg: None for k in call.keywords if k.arg}
            )
