"""Checkpoints: safetensors and JSON, made valid by a manifest that is written last. Runs in a worker (rank 0 writes),
in the controller and the driver (they read).

In: named tensors and a JSON state.
Out: `checkpoints/<samples_seen>-g<generation>/{tensors.safetensors, state.json, MANIFEST.json}`.

Why the manifest comes last: several files cannot be written atomically, on a disk or on S3, but one can. Its appearance
is the commit: without it a checkpoint does not exist, whatever a kill left of it. It holds every file's size and
sha256, because its presence proves that writing ended, not that the bytes are intact today: a checkpoint whose bytes
differ is damaged, is reported, and the next older one is used. `storage.write_bytes` writes each file under a temporary
name, syncs it, renames it and syncs the folder: without the last a power failure may lose the rename of a file whose
content is safe, or keep the manifest's name and lose a tensor file's. On S3 a put is atomic by itself.

Why a fence right before the manifest: a writer that was suspended for long may belong to a group that was replaced
meanwhile. Its commit would be newer than the point from which the new group continues.

No pickle: a checkpoint from elsewhere cannot run code here.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from mmap import mmap
from typing import TYPE_CHECKING, Any

from raytrain_brats import storage
from raytrain_brats.errors import RunFailed
from raytrain_brats.run.run_dir import RunDir

if TYPE_CHECKING:
    from torch import Tensor  # imported by the workers alone: the driver and the controller save its 0.1 GB

FORMAT = 2
"""Since 2 DynUNet's weights stand once, not by two names, and a running mean of the weights may be there."""
_READ = range(1, FORMAT + 1)
_NAME = re.compile(r"^(\d{12})-g(\d{4,})$")
_FILES = ("tensors.safetensors", "state.json")
_KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
          "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    name: str
    samples_seen: int
    generation: int
    bytes: int
    state: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The JSON part, if it was read."""


def save(
    run_dir: str,
    samples_seen: int,
    generation: int,
    tensors: "dict[str, Tensor] | mmap",
    state: dict[str, Any],
    fence: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Write and commit one checkpoint; when this returns it survives a crash. `tensors` as they are or as their file.

    `fence` is called right before the commit and raises when this writer's group has been replaced.
    """
    name = f"{samples_seen:012d}-g{generation:04d}"
    file = tensors if isinstance(tensors, mmap) else tensors_file(tensors)
    contents: dict[str, bytes | mmap] = {_FILES[0]: file, _FILES[1]: json.dumps(state).encode()}
    listed = {}
    try:
        for part, content in contents.items():
            storage.write_bytes(_uri(run_dir, name, part), content)
            listed[part] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    except OSError:  # free a full disk's space; not after this block, when the manifest may have been written
        with contextlib.suppress(OSError):
            if not storage.exists(_uri(run_dir, name, "MANIFEST.json")):  # else an earlier attempt has committed it
                discard(run_dir, name)
        raise
    manifest: dict[str, Any] = {"format": FORMAT, "samples_seen": samples_seen, "generation": generation}
    manifest["files"] = listed
    fence()
    manifest["sha256"] = _digest(manifest)
    storage.write_bytes(_uri(run_dir, name, "MANIFEST.json"), json.dumps(manifest).encode())
    return Checkpoint(name, samples_seen, generation, sum(map(len, contents.values())))


def tensors_file(
    tensors: "dict[str, Tensor]", used: mmap | None = None, metadata: dict[str, str] | None = None
) -> mmap:
    """The tensors as a safetensors file (https://github.com/huggingface/safetensors, format), in `used` where it has
    the right size: page faults of fresh memory cost as much as copying.

    The library's own `save` keeps other threads of Python waiting for a sixth of a second for 250 MB, and so does a
    bytearray, which is zeroed. Here the memory is the kernel's, and all work on the bytes is torch's: 7 ms.
    """
    import torch

    header: dict[str, Any] = {}
    end = 0
    # The library's order: large items first, so that each begins at a multiple of its size.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), _kind(tensors[name]), name)):
        begin, end = end, end + tensors[name].nbytes
        about = {"dtype": _kind(tensors[name]), "shape": list(tensors[name].shape)}
        header[name] = about | {"data_offsets": [begin, end]}
    told = {"__metadata__": metadata} if metadata else {}
    text = json.dumps(told | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    file = used if used is not None and len(used) == start + end else mmap(-1, start + end)
    file[:start] = len(text).to_bytes(8, "little") + text
    for name, about in header.items():
        if tensors[name].numel():
            kind, (begin, _) = tensors[name].dtype, about["data_offsets"]
            here = torch.frombuffer(file, dtype=kind, count=tensors[name].numel(), offset=start + begin)
            here.view(tensors[name].shape).copy_(tensors[name].detach())
    return file


def _kind(tensor: "Tensor") -> str:
    return _KINDS[str(tensor.dtype).removeprefix("torch.")]


def load(run_dir: str, name: str) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """(tensors on the CPU, state). Raises ValueError that names the damage, unless every byte is as committed."""
    from safetensors.torch import load as tensors_from_bytes

    tensors, state = _contents(run_dir, name)
    return tensors_from_bytes(tensors), json.loads(state)


def newest_valid(run_dir: str) -> tuple[Checkpoint | None, list[tuple[str, str]]]:
    """The newest checkpoint whose every byte is as committed, and the (name, reason) of newer damaged ones."""
    damaged: list[tuple[str, str]] = []
    for name, _, _ in reversed(committed(run_dir)):
        try:
            return _verified(run_dir, name), damaged
        except ValueError as error:
            damaged.append((name, str(error)))
    return None, damaged


def is_name(text: str) -> bool:
    """Whether it is the name of a checkpoint."""
    return bool(_NAME.match(text))


def valid(run_dir: str, name: str) -> Checkpoint | None:
    """The checkpoint of this name, if every byte is as committed."""
    try:
        return _verified(run_dir, name) if is_name(name) else None
    except ValueError:
        return None


def damage(run_dir: str, name: str) -> str:
    """Why a checkpoint is not valid; "" when every byte is as committed."""
    try:
        _contents(run_dir, name)
        return ""
    except ValueError as error:
        return str(error)


def _verified(run_dir: str, name: str) -> Checkpoint:
    """Raises ValueError."""
    contents = _contents(run_dir, name)
    return Checkpoint(name, *_parts(name), sum(map(len, contents)), json.loads(contents[1]))


def discard(run_dir: str, name: str) -> None:
    """Remove a checkpoint, manifest first: a half-removed one is an uncommitted one."""
    storage.delete(_uri(run_dir, name, "MANIFEST.json"))
    if not storage.is_s3(run_dir):
        shutil.rmtree(_uri(run_dir, name), ignore_errors=True)
    for path in storage.list_files(_uri(run_dir, name)):
        storage.delete(_uri(run_dir, name, path))


def prune(
    run_dir: str,
    keep: int,
    generation: int,
    since: int | None = None,
    best: Callable[[list[tuple[str, int]]], str] = lambda _: "",
) -> None:
    """Remove all but the newest `keep` committed checkpoints and the one that `best` chooses among them by (name,
    samples seen), and all uncommitted ones.

    For the writer of a worker group, between two saves; checkpoints of a later `generation` are kept. The group
    started from `since` samples: what an older group committed beyond that came too late and does not count.
    """
    counting = [
        (name, seen)
        for name, seen, number in committed(run_dir)
        if since is None or number >= generation or seen <= since
    ]
    kept = {name for name, _ in counting[-keep:]} | {best(counting)}
    for name in sorted(_names(run_dir) - kept):
        if _parts(name)[1] <= generation:
            discard(run_dir, name)


def _uri(run_dir: str, name: str, *file: str) -> str:
    return storage.join(RunDir(run_dir).checkpoints, name, *file)


def _names(run_dir: str) -> set[str]:
    folder = RunDir(run_dir).checkpoints
    files: Iterable[str] = storage.list_files(folder)
    if not storage.is_s3(folder) and storage.exists(folder):
        files = os.listdir(storage.normal(folder))  # also folders in which a crash left only a hidden temporary file
    return {path.split("/")[0] for path in files if _NAME.match(path.split("/")[0])}


def committed(run_dir: str) -> list[tuple[str, int, int]]:
    """(name, samples_seen, generation) of the checkpoints with a manifest, oldest first; not verified."""
    files = storage.list_files(RunDir(run_dir).checkpoints)
    names = (path.removesuffix("/MANIFEST.json") for path in files if path.endswith("/MANIFEST.json"))
    return [(name, *_parts(name)) for name in sorted((n for n in names if _NAME.match(n)), key=_parts)]


def _parts(name: str) -> tuple[int, int]:
    match = _NAME.match(name)
    assert match
    return int(match[1]), int(match[2])


def _contents(run_dir: str, name: str) -> list[bytes]:
    """The bytes of _FILES, verified against the manifest. Raises ValueError; RunFailed for another format."""
    try:
        manifest = json.loads(storage.read_bytes(_uri(run_dir, name, "MANIFEST.json")))
        if manifest.pop("sha256") != _digest(manifest):
            raise ValueError("the manifest differs from its checksum")
        if manifest["format"] not in _READ:
            raise RunFailed(
                f"checkpoint {name} is of format {manifest['format']}, this version reads {_READ[0]} to {FORMAT}; "
                "go on with the version that wrote it"
            )
        if (manifest["samples_seen"], manifest["generation"]) != _parts(name):
            raise ValueError("the manifest is another checkpoint's")
        listed = [(file, manifest["files"][file]) for file in _FILES]
        contents = []
        for file, about in listed:
            content = storage.read_bytes(_uri(run_dir, name, file))
            if len(content) != about["bytes"] or hashlib.sha256(content).hexdigest() != about["sha256"]:
                raise ValueError(f"{file} differs from its checksum")
            contents.append(content)
        return contents
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the manifest cannot be read: {error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"a file is gone: {error.filename or error}") from error


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
