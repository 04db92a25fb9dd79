"""The docs: links lead somewhere, commands and options exist, the README is short and its commands run.

Every fenced command is looked at here, but those of the pages with a transcript: test_transcripts, test_rig and
test_sagemaker_docs type these. `scripts/demo` is run by test_pipeline.
"""

import ast
import contextlib
import importlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli

from raytrain_brats import config, verify
from raytrain_brats.__main__ import COMMANDS
from raytrain_brats.__main__ import main as raytrain_brats
from raytrain_brats.synthetic.phantom import write_set

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TYPED = {path.with_suffix(".md").name for path in ROOT.glob("docs/transcripts/*.txt")}
GROUPS = {name: importlib.import_module(f"raytrain_brats.{name}").STEPS for name in ("ec2", "sagemaker")}
EVERY = sorted(
    {name for name in COMMANDS if name not in GROUPS} | {f"{g} {step}" for g in GROUPS for step in GROUPS[g]}
)
SHELL = {"source": ".venv/bin/activate", "export": "", "curl": "", "grep": "", "aws": "s3", "docker": ""}
SHELL |= {"sbatch": "cluster/slurm/train.sh", "scancel": "--batch", "mkdir": "runs", "cp": "docs/examples/my_parts.py"}
"""Other programs that pages without a transcript may name, and what must stand behind them."""
OF_A_RUN = {
    "metrics",
    "events",
    "checkpoints",
    "validation",
    "evaluation",
    "evaluations",
    "stacks",
    "groups",
    "ray",
    "tensorboard",
}
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def words_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.S | re.M)


def spans_of(text: str) -> list[str]:
    """What stands in backticks, in one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def fenced_of(page: Path) -> list[str]:
    """Lines of the page's bash blocks; a command over several lines is one."""
    blocks = re.findall(r"^( *)```bash\n(.*?)^\1```", page.read_text(), re.S | re.M)
    text = "".join(textwrap.dedent(block) for _, block in blocks).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


def headings_of(page: Path) -> list[str]:
    """As GitHub makes anchors of them."""
    found = re.findall(r"^#+ (.*)$", words_of(page), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found]


def sections_of(page: Path) -> dict[str, str]:
    """{heading: text below it}, of the second level."""
    parts = re.split(r"^## (.*)$", page.read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def given(text: str) -> set[str]:
    """The long options that a text names."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


@lru_cache
def helped(program: str) -> str:
    """What `--help` of a command, a module or a script prints."""
    name, *steps = program.split()
    if name == "raytrain-brats":
        main: Any = raytrain_brats
    else:
        module = name
        if name.startswith("scripts/"):
            found = re.search(r"-m ((?:scripts|tests)\.\w+)", (ROOT / name).read_text())
            assert found, f"{name} runs no module"
            module = found[1]
        main = importlib.import_module(module).main
    before, sys.argv = sys.argv, [name, *steps, "--help"]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            assert main() == 0, program
    finally:
        sys.argv = before
    assert "usage" in printed.getvalue(), program
    return printed.getvalue()


@lru_cache
def options_of(program: str) -> set[str]:
    lines = re.findall(r"^(?:│ |  )(-.*?)(?:  |│|$)", helped(program), re.M)
    return {option for line in lines for option in given(line)}


@lru_cache
def settings() -> set[str]:
    """Every key of a recipe, with the sections above it."""
    found: set[str] = set()

    def walk(values: dict[str, Any], above: str) -> None:
        for key, value in values.items():
            found.add(above + key)
            if isinstance(value, dict):
                walk(value, f"{above}{key}.")

    for recipe in config.recipe_names():
        walk(config.load(recipe).model_dump(mode="json", by_alias=True), "")
    return found


def check_ray(tokens: list[str]) -> None:
    """Words for Ray's own program: the subcommand is there and takes the options; then the job's command."""
    command: Any = ray_cli
    while isinstance(command, click.Group):
        assert len(tokens) > 1 and tokens[1] in command.commands, f"ray has no {tokens[1:2]}"
        command, tokens = command.commands[tokens[1]], tokens[1:]
    ours, rest = (tokens[: (at := tokens.index("--"))], tokens[at + 1 :]) if "--" in tokens else (tokens, [])
    known = {option for parameter in command.params for option in parameter.opts}
    unknown = {token.partition("=")[0] for token in ours if token.startswith("-")} - known
    assert not unknown, f"{command.name}: {unknown}"
    if rest:
        check(rest)


def check_script(tokens: list[str]) -> None:
    name, *arguments = tokens
    assert os.access(ROOT / name, os.X_OK), f"{name} is not there"
    if name == "scripts/test":
        assert not [a for a in arguments if "/" in a and not (ROOT / a).exists()]
        marker, wanted = (
            [*arguments, ""][arguments.index(flag) + 1 if flag in arguments else -1] for flag in ("-m", "-k")
        )
        assert not marker or f'"{marker}:' in (ROOT / "pyproject.toml").read_text()
        assert not wanted or list(ROOT.glob(f"tests/**/{wanted}.py"))
    elif name == "scripts/venv":
        extras = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{extra} = \[", extras, re.M) for a in arguments for extra in a.split(","))
    else:
        steps = [a for a in arguments[:1] if name == "scripts/bench" and not a.startswith("-")]
        unknown = given(" ".join(arguments)) - options_of(" ".join([name, *steps]))
        assert not unknown, f"{name}: {unknown}"


def check(tokens: list[str]) -> None:
    """Words of one command: the program, its steps and its options exist. `...` stands for what a reader knows."""
    tokens = [token for token in tokens if token not in ("...", "&")]
    while tokens and re.fullmatch(r"[A-Z_]+=.*", tokens[0]):
        tokens = tokens[1:]
    if not tokens:
        return
    name, *rest = tokens
    if name == "python" and rest[:1] == ["-m"]:
        name, rest = rest[1], rest[2:]
    if name.startswith("raytrain_brats."):
        module = name.removeprefix("raytrain_brats.")
        name, rest = ("raytrain-brats", [module, *rest]) if module in COMMANDS else (name, rest)
    if name == "raytrain-brats":
        steps = rest[: 2 if rest[:1] and rest[0] in GROUPS else 1]
        assert not steps or " ".join(steps) in {*EVERY, *GROUPS, "NAME", "--help"}, f"no command {steps}"
        if " ".join(steps) in EVERY:
            unknown = given(" ".join(rest)) - options_of(" ".join([name, *steps])) - {"--help"}
            assert not unknown, f"{steps}: {unknown}"
        changed = [after.partition("=")[0] for flag, after in itertools.pairwise(rest) if flag == "--set"]
        assert set(changed) <= settings(), changed
    elif name.startswith("raytrain_brats."):
        assert not (unknown := given(" ".join(rest)) - options_of(name)), f"{name}: {unknown}"
    elif name == "ray":
        check_ray(tokens)
    elif name.startswith(("scripts/", ".ci/")):
        check_script(tokens) if name.startswith("scripts/") else (ROOT / name).stat()
    else:
        assert name in SHELL and SHELL[name] in [*rest, ""], f"nobody checks {name!r}"


def commands_in(line: str) -> Iterator[list[str]]:
    """Words of each command of a line."""
    for part in re.split(r" (?:&&|\|) ", re.sub(r"\s+#.*|< /dev/null", "", line)):
        yield shlex.split(part)


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    """Files, pictures and headings that a page points to are there."""
    text = re.sub(r"`[^`]*`", "", words_of(page))
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and ROOT in file.parents, target
        assert not anchor or anchor in headings_of(file), target


def test_every_page_is_reached_from_the_readme() -> None:
    """A page that nothing links to is not found by its readers."""
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page.suffix == ".md" and page not in reached:
            reached.add(page)
            links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
            ahead += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert reached >= set(PAGES)


@by_page
def test_files_and_settings_that_a_page_names_are_there(page: Path) -> None:
    """Modules, tests, folders, functions (`file.py:name`), settings of a recipe and variables of the environment."""
    for span in spans_of(words_of(page)):
        path, _, name = span.partition(":")
        if re.fullmatch(r"test_\w+\.py|tests/\S+\.py", path):
            assert list(ROOT.glob(f"tests/**/{Path(path).name}")), span
        elif re.fullmatch(r"[\w./*]+\.py|(raytrain_brats|cluster|docs|scripts|tests)/[\w./*-]*|\w+/(\w+/)*", path):
            files = [found for top in (ROOT, ROOT / "raytrain_brats") for found in top.glob(path.rstrip("/"))]
            if not files and ((top := path.split("/")[0]) in OF_A_RUN or top.isupper()):
                continue  # a folder of a run; a place that a reader gives a name
            assert files, span
            assert not name or name in names_in(files[0]), span
        elif re.fullmatch(r"(network|preprocess|data|train|validate|checkpoint|run)(\.[a-z_]+)+(=.*)?", span):
            assert span.partition("=")[0] in settings() or span.endswith((".md", ".json")), span
    source = sources()
    for variable in set(re.findall(r"RAYTRAIN_BRATS_[A-Z_]*[A-Z]", page.read_text())):
        assert variable in source, variable


def names_in(file: Path) -> set[str]:
    """Functions, methods, classes and values that a module defines."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    values = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return values | {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}


@lru_cache
def sources() -> str:
    folders = (ROOT / name for name in ("raytrain_brats", "scripts", "cluster", "tests"))
    files = (file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".sh", ".yaml"))
    return "\n".join(file.read_text() for file in files if file.name != Path(__file__).name)


@by_page
def test_commands_of_a_page_exist(page: Path) -> None:
    """Programs, steps, options and settings of fenced commands, and of those in the text."""
    lines = [] if page.name in TYPED else fenced_of(page)
    ours = ("raytrain-brats ", "raytrain_brats.", "python -m raytrain_brats", "scripts/", "ray ", "EXTRAS=")
    lines += [
        span for span in spans_of(words_of(page)) if span.startswith(ours) and not span.endswith((".py", "/", "NAME"))
    ]
    for line in lines:
        for tokens in commands_in(line):
            try:
                check(tokens)
            except (AssertionError, OSError) as error:
                pytest.fail(f"{page.name}: {line}: {error}")


@pytest.mark.parametrize(
    "wrong",
    [
        "raytrain-brats bench data",
        "raytrain-brats train --epochs 3",
        "raytrain-brats train --set train.epoch=3",
        "raytrain-brats sagemaker status JOB",
        "ray job submit --cluster x -- python -m raytrain_brats.train",
        "ray job submit -- python -m raytrain_brats.train --gpus 3",
        "scripts/demo --quick",
        "scripts/bench prepare --patch 3",
        "scripts/test tests/no_such_folder",
        "scripts/venv no_such_extra",
        "rm -rf data",
    ],
)
def test_a_command_that_is_gone_is_found(wrong: str) -> None:
    """The check refuses commands, steps, options and settings that do not exist."""
    with pytest.raises(AssertionError):
        check(shlex.split(wrong))


def test_the_readme_is_short_and_maps_every_folder() -> None:
    """700 words at most, fences counted; no folder of the package is left out of the map; a picture."""
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 700
    rooms = {path.parent.name for path in ROOT.glob("raytrain_brats/*/__init__.py")}
    assert not [room for room in rooms if f"`raytrain_brats/{room}/`" not in text]
    assert re.search(r"!\[.+\]\(docs/\w+\.png\)", text)


def test_every_command_has_a_section_with_true_options() -> None:
    """docs/commands.md has each command and step, in a section of its own; every option named there exists."""
    sections = sections_of(ROOT / "docs" / "commands.md")
    assert not set(EVERY) - set(sections)
    for heading, text in sections.items():
        program = heading.removeprefix("python -m ")
        if program in EVERY:
            program = f"raytrain-brats {program}"
        elif not program.startswith("raytrain_brats."):
            continue
        jobs = given(" ".join(part for part in re.findall(r"ray job submit (.*?) -- ", text)))
        assert not (unknown := given(text) - options_of(program) - jobs), f"{heading}: {unknown}"
        if f"raytrain-brats {heading}" == program and heading != "sagemaker host":
            assert f"raytrain-brats {heading}" in text, f"{heading} has no example"
    for script, rest in re.findall(r"^\| `(scripts/[\w ]+)` \|(.*)$", sections["Scripts"], re.M):
        assert (ROOT / script.split()[0]).exists()
        assert not given(rest) or given(rest) <= options_of(script), script
    scripts = {path.name for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix}
    assert not [name for name in scripts if f"| `scripts/{name}" not in sections["Scripts"]]


@pytest.mark.parametrize("option", ["--strict", "--overwrite"])
def test_what_commands_share_is_said_of_those_that_have_it(option: str) -> None:
    """docs/commands.md names exactly the commands that take --strict and --overwrite."""
    shared = sections_of(ROOT / "docs" / "commands.md")["What all commands share"]
    (bullet,) = [part for part in shared.split("\n- ") if f"`{option}`" in part]
    told = {span for span in spans_of(bullet) if span in EVERY}
    assert told == {
        name for name in EVERY if name != "sagemaker host" and option in options_of(f"raytrain-brats {name}")
    }


RUN_ALL = """
import json, os, sys
os.environ["RAY_ADDRESS"] = "local"
from raytrain_brats.__main__ import main
for words in json.loads(sys.argv[1]):
    sys.argv = words
    if code := main():
        sys.exit(f"{words} exited with {code}")
"""


def test_the_commands_for_your_own_data_run(tmp_path: Path) -> None:
    """The four of the README, word for word, on a tiny MSD folder; the recipe's name alone is one of a test."""
    write_set(str(tmp_path / "data"), cases=6, seed=3, grid=32, anatomy="procedural")
    recipe = yaml.safe_load((ROOT / "raytrain_brats/recipes/demo.yaml").read_text())
    recipe["preprocess"]["spacing_mm"], recipe["data"]["patch_xyz"] = 7.5, [16, 16, 16]
    recipe["train"]["epochs"], recipe["run"] = 2, {"workers": "1", "cpus_per_task": 0.5}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))

    section = sections_of(ROOT / "README.md")["Your own data"]
    (block,) = re.findall(r"```bash\n(.*?)```", section, re.S)
    commands = [shlex.split(line.replace("dynunet", "tiny.yaml")) for line in block.splitlines()]
    assert [words[:2] for words in commands] == [
        ["raytrain-brats", name] for name in ("prepare", "train", "evaluate", "predict")
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(commands)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"

    assert set(json.loads((tmp_path / "run/evaluation/summary.json").read_text())["dice"]) == {"WT", "TC", "ET"}
    assert len(list((tmp_path / "predictions").glob("*.nii.gz"))) == 6
    assert verify.main(["--run-dir", str(tmp_path / "run")]) == 0
