"""Recipes that ship: what their headers say, the command that lists them, and settings of before they were there."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

from raytrain_brats import config, recipes
from raytrain_brats.config import Config, load, parse, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_the_header_says_what_a_reader_asks(name: str) -> None:
    """First what it is, in a line; then hardware, hours and Dice, measured or said not to be."""
    what, hardware, hours, dice, *more = recipes.header(name)
    assert what.endswith(".") and len(what) < 90
    assert [line.partition(":")[0] for line in (hardware, hours, dice)] == ["Hardware", "Hours", "Dice"]
    assert re.search(r"not measured|\d", hours) and re.search(r"not measured|0\.\d", dice)
    changes = re.findall(r"--set ([\w.]+=[^\s:)]+)", " ".join(more))
    assert changes if name in ("dynunet", "mednext") else True
    load(name, tuple(changes))


def test_the_default_for_real_cases() -> None:
    """nnU-Net's network with three heads, centres among regions, a running mean; 150,000 samples of Task01's fold."""
    found = load(config.DEFAULT_RECIPE)
    assert found.network.name == "dynunet" and found.network.heads == 3
    assert (found.data.foreground_draw, found.train.optimiser.clip_norm, found.train.amp) == ("regions", 12, True)
    assert found.train.ema_samples and found.preprocess.spacing_mm == 1
    assert 387 * found.data.patches_per_case * found.train.epochs == pytest.approx(150_000, rel=0.01)


def test_a_config_of_before_means_what_it_meant() -> None:
    """A run folder written before these settings goes on as it began: none of them is on by default."""
    old = parse(yaml.safe_load("network: {name: dynunet, filters: [8, 16, 16]}"), "config.yaml")
    assert old.network.name == "dynunet" and old.network.heads == 0
    assert (old.data.foreground_draw, old.train.loss, old.train.ema_samples) == ("labels", "dice_bce", None)
    assert old.train.optimiser.schedule == "cosine"
    assert config.differences(old, _changed(old, "train", ema_samples=100)) == []  # it alters no update
    assert config.differences(old, _changed(old, "data", foreground_draw="regions"))


def _changed(old: Config, section: str, **values: object) -> Config:
    return old.model_copy(update={section: getattr(old, section).model_copy(update=values)})


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One line each with its size; one by name, header first; an unknown one is refused with the nearest."""
    assert recipes.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    (default,) = [line for line in lines if line.startswith("dynunet ")]
    assert "the default for real cases" in default and "1 mm, patch 128^3" in default
    assert recipes.main(["segresnet"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[: len(recipes.header("segresnet"))][0] == f"# {recipes.header('segresnet')[0]}"
    assert recipes.main(["segresne"]) == 2
    assert "did you mean segresnet" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("network: {name: unett}\n")
    assert recipes.main([str(tmp_path / "mine.yaml")]) == 2
    assert "mine.yaml: network" in capsys.readouterr().err


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_shown_with_every_setting_and_its_meaning(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed is a recipe itself, of the same settings; above each stands what it means."""
    assert recipes.main([name]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert load(str(tmp_path / "mine.yaml")) == load(name)
    lines = (tmp_path / "mine.yaml").read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r" +\w+: ?\S", line) or re.match(r" +optimiser:|^preprocess:", line):
            assert before.lstrip().startswith("#") or line.lstrip().startswith("optimiser"), line


def test_the_docs_table_names_every_recipe() -> None:
    """docs/commands.md says of each recipe that ships what it is for."""
    text = (Path(__file__).parents[2] / "docs/commands.md").read_text().split("\n## recipes\n", 1)[1]
    lines = [line.split("|")[1] for line in text.split("\n## ", 1)[0].splitlines() if line.startswith("| `")]
    assert {name for line in lines for name in re.findall(r"`(\w+)`", line)} == set(recipe_names())


def test_every_setting_has_a_meaning() -> None:
    """Those of all networks too; a new one without a string below it fails here."""
    told = recipes.settings()
    assert {"network.heads", "train.optimiser.schedule", "validate.patience_samples", "run.workers"} <= told.keys()
    assert [key for key, meaning in told.items() if not meaning] == []


def test_shipped_recipes_keep_their_best_checkpoint() -> None:
    """A run folder of before does not, until it is asked to: it may be switched on within a run."""
    assert all(load(name).checkpoint.best for name in recipe_names())
    old = parse(yaml.safe_load("network: {name: dynunet, filters: [8, 16, 16]}"), "config.yaml")
    assert (old.checkpoint.best, old.validate_.patience_samples) == (False, None)
    assert config.differences(old, _changed(old, "checkpoint", best=True)) == []
