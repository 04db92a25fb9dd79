"""Checkpoints: valid only as a whole, never chosen when damaged, never from pickle."""

import ast
import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import raytrain_brats
from raytrain_brats import storage
from raytrain_brats.errors import RunFailed
from raytrain_brats.run import checkpoint
from raytrain_brats.run.saver import Writer

FILES = ("MANIFEST.json", "state.json", "tensors.safetensors")
TENSORS = {"network/a": torch.arange(6.0).reshape(2, 3), "optimiser/0/step": torch.tensor(3.0)}
STATE = {"samples_seen": 8, "text": "ä", "rates": [0.1, 1e-9]}


def save(run_dir: Path, seen: int, generation: int = 1) -> Path:
    made = checkpoint.save(str(run_dir), seen, generation, TENSORS, STATE | {"samples_seen": seen})
    return run_dir / "checkpoints" / made.name


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    """Tensors and state are the same after a round trip; the record says where and how large."""
    made = checkpoint.save(str(tmp_path), 12, 3, TENSORS, STATE)
    tensors, state = checkpoint.load(str(tmp_path), made.name)
    found, damaged = checkpoint.newest_valid(str(tmp_path))
    size = sum((tmp_path / "checkpoints" / made.name / file).stat().st_size for file in FILES[1:])
    assert state == STATE and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], TENSORS[key]) and tensors[key].dtype == TENSORS[key].dtype for key in TENSORS)
    assert (found, damaged) == (made, []) and made == checkpoint.Checkpoint("000000000012-g0003", 12, 3, size)


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever write fails, no manifest stands, nor a file that takes room; without any checkpoint none is found."""
    assert checkpoint.newest_valid(str(tmp_path)) == (None, [])
    real, written = storage.write_bytes, []

    def write(uri: str, content: bytes) -> None:
        if len(written) == stop_at:
            raise OSError("disk full")
        written.append(uri.rsplit("/", 1)[1])
        real(uri, content)

    monkeypatch.setattr(storage, "write_bytes", write)
    for number in range(3):
        stop_at = number
        written.clear()
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path, 4)
        assert "MANIFEST.json" not in written and checkpoint.newest_valid(str(tmp_path)) == (None, [])
        assert number == 2 or not storage.list_files(str(tmp_path))


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_byte_is_noticed(tmp_path: Path, file: str) -> None:
    """200 seeded positions of every file: the older one is used, the damage is named, and loading is refused."""
    save(tmp_path, 4)
    newest = save(tmp_path, 8)
    whole, rng = (newest / file).read_bytes(), random.Random(1)
    for _ in range(200):
        at, mask = rng.randrange(len(whole)), rng.randrange(1, 256)
        (newest / file).write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        found, damaged = checkpoint.newest_valid(str(tmp_path))
        if not damaged:  # white space between JSON values is no content
            assert file == "MANIFEST.json" and json.loads((newest / file).read_bytes()) == json.loads(whole)
            continue
        assert found is not None and found.samples_seen == 4
        assert damaged[0][0] == newest.name and damaged[0][1]
        with pytest.raises(ValueError, match=r".+"):
            checkpoint.load(str(tmp_path), newest.name)
    (newest / file).write_bytes(whole)
    assert checkpoint.newest_valid(str(tmp_path))[1] == []


def _truncate(folder: Path, file: str) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:-1])


def _swap(folder: Path, _: str) -> None:
    (folder / "state.json").rename(folder / "x")
    (folder / "tensors.safetensors").rename(folder / "state.json")
    (folder / "x").rename(folder / "tensors.safetensors")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: _truncate(d, "tensors.safetensors"), "tensors.safetensors differs"),
        (lambda d: _truncate(d, "state.json"), "state.json differs"),
        (lambda d: _truncate(d, "MANIFEST.json"), "delimiter"),
        (lambda d: (d / "state.json").write_bytes(b""), "state.json differs"),
        (lambda d: (d / "state.json").unlink(), "a file is gone: .*state.json"),
        (lambda d: (d / "tensors.safetensors").unlink(), "a file is gone: .*tensors.safetensors"),
        (lambda d: _swap(d, ""), "differs from its checksum"),
        (lambda d: shutil.copy(d.parent / f"{4:012d}-g0001" / "MANIFEST.json", d), "another checkpoint's"),
        (lambda d: shutil.copytree(d.parent / f"{4:012d}-g0001", d, dirs_exist_ok=True), "another checkpoint's"),
    ],
)
def test_damaged_checkpoints_are_passed_over(tmp_path: Path, damage: Any, reason: str) -> None:
    """The newest one that is whole is found, through two damaged ones above it, each with its reason."""
    folders = [save(tmp_path, seen) for seen in (4, 8, 12)]
    for folder in folders[1:]:
        damage(folder)
    found, damaged = checkpoint.newest_valid(str(tmp_path))
    assert found is not None and found.samples_seen == 4
    assert [name for name, _ in damaged] == [folder.name for folder in reversed(folders[1:])]
    for _, why in damaged:
        with pytest.raises(ValueError, match=reason):
            raise ValueError(why)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b"{}",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"format": 1, "files": []}',
        b"x",
        b'{"format": 1, "files": {"tensors.safetensors": 3, "state.json": null}}',
        b'{"format": 99}',
    ],
)
def test_garbage_manifests_are_damage_and_not_a_crash(tmp_path: Path, content: bytes) -> None:
    """Also valid JSON of another type: named, passed over, refused by load with ValueError."""
    save(tmp_path, 4)
    newest = save(tmp_path, 8)
    (newest / "MANIFEST.json").write_bytes(content)
    found, damaged = checkpoint.newest_valid(str(tmp_path))
    assert found is not None and (found.samples_seen, len(damaged)) == (4, 1)
    with pytest.raises(ValueError, match=r".+"):
        checkpoint.load(str(tmp_path), newest.name)


def test_formats_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The format before this one is read; a later one is refused by its number, and nothing older is taken instead."""
    for number in (checkpoint.FORMAT - 1, checkpoint.FORMAT + 1):
        monkeypatch.setattr(checkpoint, "FORMAT", number)
        save(tmp_path, 4 * number)
    monkeypatch.undo()
    assert checkpoint.load(str(tmp_path), f"{4 * (checkpoint.FORMAT - 1):012d}-g0001")
    with pytest.raises(RunFailed, match="is of format 3, this version reads 1 to 2"):
        checkpoint.newest_valid(str(tmp_path))


def test_the_newest_is_that_of_most_samples_then_of_the_latest_generation(tmp_path: Path) -> None:
    """Order is by numbers, not by text or by time of writing."""
    for seen, generation in ((16, 2), (8, 9), (16, 10000), (16, 9999)):
        save(tmp_path, seen, generation)
    found, _ = checkpoint.newest_valid(str(tmp_path))
    assert found is not None and (found.samples_seen, found.generation) == (16, 10000)


def test_prune_keeps_the_newest_and_collects_orphans(tmp_path: Path) -> None:
    """The newest `keep` stay; older ones, uncommitted ones and folders with only a torn temporary file go."""
    folders = {seen: save(tmp_path, seen) for seen in (4, 8, 12, 16, 20)}
    (folders[20] / "MANIFEST.json").unlink()
    torn = tmp_path / "checkpoints" / f"{24:012d}-g0001"
    torn.mkdir()
    (torn / ".tensors.safetensors.1a2b3c4d.tmp").write_bytes(bytes(100))
    (tmp_path / "checkpoints" / "notes").mkdir()
    (tmp_path / "checkpoints" / "notes" / "mine.txt").write_text("not a checkpoint")
    later = tmp_path / "checkpoints" / f"{20:012d}-g0002"
    later.mkdir()
    checkpoint.prune(str(tmp_path), 2, 1)
    assert names(tmp_path) == [folders[12].name, folders[16].name, later.name, "notes"]  # g0002 is being written
    checkpoint.prune(str(tmp_path / "nothing here"), 2, 1)


def test_discard_removes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a discard cut short leaves an uncommitted checkpoint and not a damaged one."""
    folder, removed = save(tmp_path, 4), []
    real = storage.delete
    monkeypatch.setattr(storage, "delete", lambda uri: (removed.append(uri.rsplit("/", 1)[1]), real(uri)))
    checkpoint.discard(str(tmp_path), folder.name)
    assert removed[0] == "MANIFEST.json" and not folder.exists()


class Slow:
    """A Writer whose saves wait for `go` just before they write."""

    def __init__(self, run_dir: Path) -> None:
        self.go, self.done, self.run_dir = threading.Event(), [], str(run_dir)
        self.writer = Writer()

    def flush(self) -> None:
        assert self.go.wait(60)

    def start(self, seen: int, tensors: dict[str, torch.Tensor]) -> None:
        copies = checkpoint.tensors_file(tensors)

        def write() -> None:
            self.flush()
            checkpoint.save(self.run_dir, seen, 1, copies, STATE)
            checkpoint.prune(self.run_dir, 2, 1)
            self.done.append(seen)

        self.writer.start(write)


def test_a_second_attempt_that_fails_leaves_what_the_first_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to the manifest's write may be lost: what is committed then is no half-written checkpoint."""
    made = save(tmp_path, 8)
    write = storage.write_bytes

    def full(uri: str, content: bytes) -> None:
        if uri.endswith("state.json"):
            raise OSError(28, "No space left on device")
        write(uri, content)

    with monkeypatch.context() as broken:
        broken.setattr(storage, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 8)
    found, damaged = checkpoint.newest_valid(str(tmp_path))
    assert found is not None and (found.name, damaged) == (made.name, [])


def test_writer_takes_its_snapshot_at_once(tmp_path: Path) -> None:
    """`start` returns before anything is written; training on in place does not leak into the checkpoint."""
    slow, tensors = Slow(tmp_path), {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3).T}  # b is not contiguous
    slow.start(4, tensors)
    assert checkpoint.newest_valid(str(tmp_path))[0] is None
    for tensor in tensors.values():
        tensor += 1
    slow.go.set()
    slow.writer.wait()
    assert not any(tensor.any() for tensor in checkpoint.load(str(tmp_path), f"{4:012d}-g0001")[0].values())
    assert slow.done == [4]
    slow.writer.close()


def test_a_tensors_file_is_safetensors() -> None:
    """The library reads what is written without it: any dtype that a learner holds, any shape, memory used again."""
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool]
    tensors = {f"{kind}/{n}": torch.randn(n, 3).to(kind) for n, kind in enumerate(kinds)}
    tensors |= {"step": torch.tensor(3.0), "turned": torch.randn(2, 5).T}
    file = checkpoint.tensors_file(tensors)
    again = checkpoint.tensors_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    assert again is file
    read = safetensors.torch.load(file[:])
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert checkpoint.tensors_file({}, file) is not file


def test_writer_runs_one_save_at_a_time(tmp_path: Path) -> None:
    """A second `start` waits for the save under way; old ones are pruned; `close` ends the last one."""
    slow = Slow(tmp_path)
    slow.start(4, TENSORS)
    second = threading.Thread(target=slow.start, args=(8, TENSORS))
    second.start()
    second.join(0.2)
    assert second.is_alive() and slow.done == []
    slow.go.set()
    second.join(60)
    slow.start(12, TENSORS)
    slow.writer.close()
    assert slow.done == [4, 8, 12] and len(names(tmp_path)) == 2


def test_writer_surfaces_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed save raises at the next start or wait, once; books that could not be flushed leave no commit."""
    slow = Slow(tmp_path)
    slow.go.set()
    monkeypatch.setattr(slow, "flush", lambda: (_ for _ in ()).throw(OSError("books lost")))
    slow.start(4, TENSORS)
    with pytest.raises(OSError, match="books lost"):
        slow.start(8, TENSORS)
    slow.writer.wait()
    slow.start(8, TENSORS)
    slow.writer.close()  # a worker that is going down anyway
    assert slow.done == [] and checkpoint.newest_valid(str(tmp_path)) == (None, [])


FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
OWN_PIPES = {"scorer.py"}
"""Reads the pipe of a process that it has started itself, and that process the pipe it was started with."""
FORBIDDEN_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "np.load", "eval", "exec"}
FORBIDDEN_METHODS = {"extractall", "unsafe_load"}


def test_nothing_in_the_package_can_run_what_it_reads() -> None:
    """No module unpickles, evaluates text, loads unsafe YAML or unpacks archives unchecked."""
    for path in Path(raytrain_brats.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert path.name in OWN_PIPES or not FORBIDDEN_MODULES & {name.split(".")[0] for name in imported}, path
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in FORBIDDEN_CALLS, (path, node.lineno)
                assert getattr(node.func, "attr", "") not in FORBIDDEN_METHODS, (path, node.lineno)
