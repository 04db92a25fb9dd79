"""scripts/venv on a stand-in of pip: what a first installation says, and how it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PIP = """#!/usr/bin/env bash
[[ "$*" == *"-m pip install"* ]] || exit 9
site="$(dirname "$0")/../lib/python3.11/site-packages"
mkdir -p "$site"
echo "Obtaining file:///home/me/raytrain_brats"
echo "WARNING: Location 'file:///x/' is ignored: it is neither a file nor a directory." >&2
echo "  Installing build dependencies: finished with status 'done'"
for n in $(seq 60); do
  echo "Collecting package$n>=1 (from raytrain_brats==0.1.0)"
  echo "  Downloading package$n-1.0-py3-none-any.whl.metadata (102.5 kB)"
done
echo "Downloading torch-2.9.1-cp311-cp311-manylinux_2_28_x86_64.whl (899.8 MB)"
echo "Downloading tiny-1.0-py3-none-any.whl (99.9 kB)"
if [ -n "$FAIL" ]; then
  echo "ERROR: No matching distribution found for torch==99" >&2
  exit 1
fi
echo "Installing collected packages: a, b, c"
sleep 0.5
mkdir "$site/a-1.dist-info"
sleep 0.5
echo "Successfully installed a-1 b-1 c-1"
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The project with an empty virtual environment, whose pip is the stand-in."""
    for name in ("pyproject.toml", "constraints.txt", "scripts/venv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PIP)
    python.chmod(0o755)
    return tmp_path


def venv(root: Path, **more: str) -> tuple[int, list[str], str]:
    """(exit code, lines told, standard output)."""
    environment = os.environ | {"PYTHON": sys.executable, "TELL_S": "0.2"} | more
    done = subprocess.run([root / "scripts/venv"], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr.splitlines(), done.stdout


def test_an_installation_tells_how_far_it_is(root: Path) -> None:
    """Plain lines, some ten and not hundreds; a second call has nothing to do or say."""
    code, said, out = venv(root)
    assert code == 0 and out == ""
    assert said[0].startswith(f"installing into {root}/.venv (once") and said[-1].startswith("installed")
    told = said[1:-1]
    assert told[:4] == [
        "  25 packages found", "  50 packages found", "  downloading torch, 899.8 MB", "  installing 3 packages",
    ]  # fmt: skip
    assert set(told[4:]) == {"  0 of 3 installed", "  1 of 3 installed"} and told[-1] == "  1 of 3 installed"
    assert venv(root) == (0, [], "")


def test_an_installation_that_fails_shows_what_pip_said(root: Path) -> None:
    """In pip's own words; the next call tries again."""
    for _ in range(2):
        code, said, _ = venv(root, FAIL="1")
        assert code == 1 and "ERROR: No matching distribution found for torch==99" in said
        assert said[-1] == "error: pip could not install it; its own words are above"
