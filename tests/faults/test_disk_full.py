"""The disk of the run folder, or of the predictions, has no room: told at once, by name, and nothing saved is lost."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytrain_brats import books, storage
from raytrain_brats.synthetic.phantom import write_set
from tests.support import ROOT

SMALL = ("train.epochs=4", "preprocess.spacing_mm=7.5", "data.patch_xyz=[16,16,16]", "checkpoint.every_samples=8")


@pytest.fixture
def small() -> Iterator[Path]:
    """A folder that a command under `on_small_disk` finds on a disk of its own."""
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "small").mkdir()
        yield Path(folder) / "small"


def on_small_disk(place: Path, size: str, *command: str, ends_s: int = 300) -> subprocess.CompletedProcess[str]:
    """Run where `place` holds `size`; what it left there is copied beside it, to `left`."""
    script = (
        f"mount -t tmpfs -o size={size} tmpfs {place} && timeout -s INT {ends_s} \"$0\" \"$@\"; code=$?; "
        f"cp -r {place} {place.parent}/left; exit $code"
    )  # fmt: skip
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script, sys.executable, "-m", "raytrain_brats", *command],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)},
        cwd=place.parent, capture_output=True, text=True, timeout=ends_s + 120,
    )  # fmt: skip


needs_root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="a disk of its own needs root")


@pytest.mark.campaign
@needs_root
@pytest.mark.parametrize("size", ["600k", "44k"])
def test_training_on_a_full_disk_says_so(size: str, small: Path) -> None:
    """Room for the books and for no checkpoint, or for no book: on the terminal at once and in each line from there."""
    data = small.parent / "data"
    write_set(str(data), cases=6, seed=0, grid=32, anatomy="procedural")
    sets = [f"--set={value}" for value in SMALL]
    train = ("train", "--recipe", "demo", "--data", str(data), "--run-dir", str(small / "run"), "--workers", "1", *sets)
    said = on_small_disk(small, size, *train, ends_s=90).stdout
    assert said.count("warning: not saved: No space left on device") == 1, said
    assert "not saved since sample 0: No space left on device" in said and "Traceback" not in said
    if size == "600k":
        assert "waiting for room to save the last checkpoint" in said
        assert any(e["event"] == "checkpoint_failed" for e in books.read_events(str(small.parent / "left" / "run")))


@needs_root
def test_an_output_that_finds_no_room_is_named(small: Path) -> None:
    """A command's error is one line with the file in it, also from Ray's tasks; no half a file stays."""
    done = on_small_disk(small, "12k", "phantom", "--out", str(small / "out"), "--cases", "2", "--grid", "32")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and f"No space left on device: '{small}/out/" in done.stderr, done.stderr
    assert not list((small.parent / "left").rglob("*.tmp"))


@needs_root
def test_a_full_disk_is_told_by_the_files_name(small: Path) -> None:
    """Both ways to write: the kernel's own error names no file."""
    code = """
import sys
from raytrain_brats import storage
for write in (lambda: storage.write_bytes(f"{sys.argv[1]}/whole", bytes(100_000)),
              lambda: storage.append(f"{sys.argv[1]}/lines", "x" * 100_000)):
    try:
        write()
    except OSError as error:
        print(error.errno, error.filename)
"""
    assert said_on_small_disk(small, "16k", code) == [f"28 {small}/whole", f"28 {small}/lines"]


def said_on_small_disk(place: Path, size: str, code: str) -> list[str]:
    """What Python code prints where its argument `place` holds `size`."""
    mount = f'mount -t tmpfs -o size={size} tmpfs {place} && exec "$0" "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, sys.executable, "-c", code, str(place)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_root
def test_books_of_a_disk_that_was_full_for_a_while_are_whole(small: Path) -> None:
    """It fills amid a row and amid an event: no torn line then; with room again all are there, once and in order."""
    code = """
import sys
from pathlib import Path
from raytrain_brats import books, storage
from raytrain_brats.run import events, rows
from raytrain_brats.run.control import Generation

class Rows(rows.MetricsLog):
    check = lambda self: None

run, filler = sys.argv[1] + "/run", Path(sys.argv[1]) / "filler"
filler.write_bytes(bytes(64 << 10))
storage.write_bytes(run + "/generation.json", b'{"number": 1, "samples_seen": 0}')
log = Rows(run, Generation(1))

def go_on(first, last):
    for number in range(first, last):
        log.add({"samples_seen": number, "text": "x" * 400})
        events.event(run, "told", number=number, text="x" * 300)

def numbers():
    shown = [row["samples_seen"] for row in books.read_rows(run)]
    torn = []
    return shown, [event["number"] for event in books.read_events(run, torn)], torn

go_on(1, 60)
try:
    log.flush()
except OSError as error:
    print(error.errno)
for found in numbers()[:2]:
    print(found == list(range(1, len(found) + 1)), 20 < len(found) < 59)
print({path.read_bytes()[-1:] for path in Path(run).rglob("*.jsonl")})
filler.unlink()
go_on(60, 70)
print(numbers() == (list(range(1, 70)), list(range(1, 70)), []))
log.flush()
print(numbers() == (list(range(1, 70)), list(range(1, 70)), []))
"""
    said = said_on_small_disk(small, "104k", code)
    assert said == ["28", "True True", "True True", "{b'\\n'}", "True", "True"]


def test_an_error_about_another_file_keeps_its_name(tmp_path: Path) -> None:
    """A folder that is a file is what stands in the message, not the object that was to be put below it."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError, match="file"):
        storage.write_bytes(str(tmp_path / "file" / "below" / "object"), b"x")
