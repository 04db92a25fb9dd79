"""Rules of the code's shape (design.md, sections 2 and 7): who imports whom, how long things are, what --help does."""

import ast
import importlib
from pathlib import Path

import pytest

import raytrain_brats
from raytrain_brats.__main__ import COMMANDS

ROOT = Path(raytrain_brats.__file__).parent
SOURCES = {
    ".".join(["raytrain_brats", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
_LEAVES = """augmentation books config errors home interrupt labels messages networks outputs parts provenance s3
schedule shadow storage"""
LEAVES = {f"raytrain_brats.{name}" for name in _LEAVES.split()}
ENTRIES = {
    name
    for name, tree in TREES.items()
    if name.count(".") == 1 and any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
}


def imports(name: str, at_once: bool = False) -> set[str]:
    """Full names of all modules imported anywhere in a module, also inside functions; `at_once`: when it is imported
    itself."""
    found: set[str] = set()
    for node in TREES[name].body if at_once else ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} uses a relative import"
            module = node.module or ""
            found |= {f"{module}.{a.name}" if f"{module}.{a.name}" in SOURCES else module for a in node.names}
    return found


def own(name: str) -> set[str]:
    return {module for module in imports(name) if module.split(".")[0] == "raytrain_brats"}


def foreign(name: str) -> set[str]:
    return {module.split(".")[0] for module in imports(name)} - {"raytrain_brats"}


def layer(module: str) -> str:
    return "leaf" if module in LEAVES else [*module.split("."), ""][1]


RULES = {  # layer: what of ours it may import, what of others it may not
    "leaf": ({"leaf"}, {"ray", "torch", "monai"}),
    "data": ({"leaf", "data"}, {"ray", "torch", "monai"}),
    "cases": ({"leaf", "data", "cases"}, {"ray", "torch", "monai"}),
    "scoring": ({"leaf", "scoring"}, {"ray"}),
    "learn": ({"leaf", "scoring", "learn"}, {"ray"}),
    "ray_ext": ({"leaf", "ray_ext"}, {"torch", "monai"}),
    "synthetic": ({"leaf", "data", "cases", "synthetic"}, {"ray", "torch", "monai"}),
    "planning": ({"leaf", "planning"}, {"ray", "torch", "monai"}),
    "reporting": ({"leaf", "reporting"}, {"ray", "torch", "monai"}),
    "run": ({"leaf", "data", "cases", "scoring", "learn", "ray_ext", "reporting", "run"}, set()),
    "exporting": ({"leaf", "learn", "exporting"}, {"ray"}),
    "monitoring": ({"leaf", "ray_ext", "reporting", "run", "monitoring"}, {"torch", "monai"}),
}

_WITHOUT_RAY = "data.turns data.resident run.feed run.saver run.spec"
WITHOUT_RAY = {f"raytrain_brats.{name}" for name in _WITHOUT_RAY.split()}
"""What brings voxels to the device, saves, and says what a run is: `scripts/gpu_check` uses them where Ray is not."""

PLACED = ("planning", "run", "monitoring", "ray_ext", "data", "cases", "learn", "scoring")


@pytest.mark.parametrize("name", [name for name in SOURCES if layer(name) in RULES])
def test_imports_go_one_way(name: str) -> None:
    """Leaves <- data <- cases <- run; scoring <- learn, reporting and ray_ext beside data, which streams through it."""
    ours, forbidden = RULES[layer(name)]
    streams = name == "raytrain_brats.data.stream"
    assert {layer(module) for module in own(name)} <= ours | ({"ray_ext"} if streams else set())
    assert not foreign(name) & (forbidden - ({"ray"} if streams else set()))


@pytest.mark.parametrize("name", list(SOURCES))
def test_what_runs_needs_neither_scripts_nor_pictures(name: str) -> None:
    """scripts/ use the package, never the other way round; of reporting, `run` takes the sums alone: no Matplotlib."""
    assert not foreign(name) & {"scripts", "tests"}
    if layer(name) == "run":
        assert {module for module in own(name) if layer(module) == "reporting"} <= {"raytrain_brats.reporting.goodput"}


@pytest.mark.parametrize("name", sorted(WITHOUT_RAY))
def test_what_feeds_and_saves_is_imported_without_ray(name: str) -> None:
    """Nor does anything that is imported with it need Ray."""
    seen, left = set[str](), {name}
    while left:
        now = left.pop()
        seen.add(now)
        found = imports(now, at_once=True)
        assert "ray" not in {module.split(".")[0] for module in found}, now
        left |= (found & set(SOURCES)) - seen


def test_the_rules_see_the_package() -> None:
    """The tests here are about something."""
    assert all(sum(layer(name) == rule for name in SOURCES) >= 3 for rule in RULES)
    assert {f"raytrain_brats.{name}" for name in COMMANDS} <= ENTRIES
    assert "raytrain_brats.errors" in own("raytrain_brats.train")
    assert "torch" in foreign("raytrain_brats.learn.step")


def test_nothing_decides_by_what_events_tell() -> None:
    """Rows and events are read by who shows, sums up or checks them; decisions stand in documents (`run.control`)."""
    books = {"read_events", "read_rows", "recent"}
    readers = {
        name.removeprefix("raytrain_brats.")
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in books
    }
    # recorder: the times of the event `recovered`; journal: how many rows were dropped; controller: the last failure
    shown = {"api", "compare", "ending", "verify", "reporting.page", "monitoring.progress", "monitoring.tracking"}
    assert readers == shown | {"run.recorder", "run.journal", "run.controller"}


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_entries_do_not_import_each_other(name: str) -> None:
    """An entry may use everything but another entry."""
    assert not own(name) & ENTRIES - {name}


@pytest.mark.parametrize("name", list(SOURCES))
def test_modules_say_what_enters_and_what_leaves(name: str) -> None:
    """Every module's docstring names its input and its output."""
    docstring = ast.get_docstring(TREES[name]) or ""
    assert "In: " in docstring and "Out: " in docstring


@pytest.mark.parametrize("name", [name for name in SOURCES if layer(name) in PLACED])
def test_modules_say_in_which_process_they_run(name: str) -> None:
    """A reader must know which process executes a file: its docstring says so."""
    assert "Runs in" in " ".join((ast.get_docstring(TREES[name]) or "").split())


def test_sizes() -> None:
    """No file over 400 lines, no function over 60; the training loop within 70."""
    files = {name: len(path.read_text().splitlines()) for name, path in SOURCES.items()}
    functions = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: lines for name, lines in files.items() if lines > 400}
    assert functions.pop("raytrain_brats.run.worker.train_rank") <= 70
    assert not {name: lines for name, lines in functions.items() if lines > 60}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help prints the usage by the command's own name and exits with 0, without starting anything."""
    assert importlib.import_module(f"raytrain_brats.{command}").main(["--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"raytrain-brats {command}" in printed.out and "--help" in printed.out


TESTS = {str(path.relative_to(ROOT.parent)): path for path in sorted((ROOT.parent / "tests").rglob("*.py"))}
ABOUT_SCRIPTS = {
    "unit/test_bench_augment",
    "unit/test_compare_nnunet",
    "unit/test_gpu_scripts",
    "unit/test_overwrites",
    "ray/test_bench",
} | {f"faults/test_{name}" for name in ("chaos", "fuzz", "nodes", "s3_faults")}


@pytest.mark.parametrize("name", TESTS)
def test_tests_import_the_package_and_what_they_share(name: str) -> None:
    """No test imports another; what several need is in tests/support, which imports no test either."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(TESTS[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} uses a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert not {each for each in found if each.startswith("tests") and not each.startswith("tests.support.")}
    if not name.startswith("tests/support/") and name.removeprefix("tests/").removesuffix(".py") not in ABOUT_SCRIPTS:
        assert not {each for each in found if each.split(".")[0] == "scripts"}
