"""The image of a job's containers: pinned by hash, within the versions that are tested, what it copies is there."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

FOLDER = ROOT / "cluster" / "sagemaker"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()


def pins(path: Path) -> dict[str, str]:
    """{name: version} as pip compares names; extras and hashes left out."""
    found = re.findall(r"^([\w.-]+)(?:\[.*?\])?==(\S+)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


LOCK, TESTED = pins(FOLDER / "requirements.lock"), pins(ROOT / "constraints.txt")
OF_TORCH = re.compile("nvidia-|cuda-|triton|setuptools")
"""What only PyPI's torch brings; the tests run with a build for CPUs."""


def test_images_get_what_the_package_needs() -> None:
    """requirements.txt: the package's dependencies but torch, in the versions of constraints.txt."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    given = pins(FOLDER / "requirements.txt")
    assert given.keys() == {re.split(r"[\[=<>]", one)[0].lower() for one in needed} - {"torch"}
    assert given == {name: TESTED[name] for name in given}


def test_every_package_of_the_image_is_pinned_by_hash() -> None:
    """One hash a line; all that requirements.txt names, torch and PID 1; versions as tested; else only torch's own."""
    lines = [line for line in (FOLDER / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    assert len(lines) == len(LOCK) > 90
    assert LOCK.keys() >= {*pins(FOLDER / "requirements.txt"), "torch", "dumb-init"}
    assert {name: version for name, version in LOCK.items() if TESTED.get(name, version) != version} == {}
    assert [name for name in LOCK if name not in TESTED and not OF_TORCH.match(name)] == []


@pytest.mark.campaign
def test_pip_would_install_what_is_locked() -> None:
    """`pip install --dry-run` from PyPI, within constraints.txt, for the image's platform: the very same files."""
    spec = importlib.util.spec_from_file_location("lock", FOLDER / "lock.py")
    assert spec and spec.loader
    lock: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    locked = set((FOLDER / "requirements.lock").read_text().splitlines()[2:])
    assert {f"{row['name']}=={row['version']} --hash=sha256:{row['sha256']}" for row in lock.report()} == locked


def test_the_recipe_copies_what_is_there() -> None:
    """No image was built here: but sources exist, .dockerignore lets them through, arguments are declared."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip()]
    assert {name for name, _ in steps} == {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    passed = {
        line[1:].removesuffix("/**") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    for name, rest in steps:
        if name == "COPY":
            *sources, _ = shlex.split(rest)
            assert all((ROOT / source).exists() for source in sources) and set(sources) <= passed
    used = set(re.findall(r"\$\{(\w+)\}", DOCKERFILE))
    assert used == {rest.partition("=")[0] for name, rest in steps if name == "ARG"}


def test_the_base_is_named_by_digest() -> None:
    """No default that moves; a tag alone ends the build."""
    assert "\nARG BASE\nFROM ${BASE}\n" in DOCKERFILE
    assert 'case "${BASE}" in *@sha256:*)' in DOCKERFILE


def test_another_torch_is_left_alone() -> None:
    """On a base with torch, or with TORCH: pip would put the tested version in its place if it were a constraint."""
    step = DOCKERFILE.partition("else")[2].partition("fi\n")[0]
    assert "grep -v '^torch==' constraints.txt > /tmp/constraints.txt" in step
    assert "pip install -c /tmp/constraints.txt -r requirements.txt" in step and "-c constraints.txt" not in step
