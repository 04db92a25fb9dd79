"""Outputs never destroy what they did not make.

In: where a command writes, what each file is made from, what it reads.
Out: permission to write, and a record `made-by.json` in the folder, put before the first output; or UserError, before
the first byte.

A file is replaced when the record (or the file itself) says that the same command made it from the same inputs; with
`--overwrite` others are, too, but never an input, an image or a label. Files that are there, made from the same, need
not be made again: so the same command goes on where it was stopped.
"""

import hashlib
import json
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from raytrain_brats import s3, storage
from raytrain_brats.errors import UserError

RECORD = "made-by.json"
"""Name of the record in an output folder; no data, for whoever reads such a folder later."""
PROGRAM = "raytrain-brats"
DATA_FOLDERS = ("imagestr", "labelstr", "imagests", "labelsts", "imagesval", "labelsval")
_CASE_FILE = re.compile(r"[_-](flair|t1|t1ce|t1gd|t1n|t1c|t2|t2w|t2f|seg|000[0-3])\.nii(\.gz)?$", re.IGNORECASE)
_LARGEST_RECORD = 1 << 28  # bytes; what is larger is no page, table or record of ours
_LEVELS = 4  # a file's folder and three above


def place(uri: str | os.PathLike[str]) -> str:
    """Where something really is: two spellings of one place are equal.

    Local: absolute, links and `..` resolved. S3: the key without `//`, `.`, `..` and a trailing slash. Raises UserError
    for another scheme.
    """
    text = storage.normal(uri)
    if not storage.is_s3(text):
        return os.path.realpath(text)
    bucket, _, key = text[len("s3://") :].partition("/")
    return f"s3://{bucket}{posixpath.normpath('/' + key.lstrip('/'))}".rstrip("/")


def same(one: str, other: str) -> bool:
    """Whether two URIs are one file or folder, also by a hard link, a bind mount or a disk that ignores case."""
    return not _keys(one).isdisjoint(_keys(other))


def within(inner: str, outer: str) -> bool:
    """Whether `inner` is `outer` or lies below it, by any spelling."""
    wanted = _keys(outer)
    return any(not _keys(folder).isdisjoint(wanted) for folder in _with_parents(place(inner)))


def _with_parents(where: str) -> Iterator[str]:
    """A place, and all folders above it, nearest first."""
    yield where
    while (above := where.rpartition("/")[0]) and above != where and not above.endswith(":/"):
        yield above
        where = above
    if where.startswith("/"):
        yield "/"


def _keys(uri: str) -> set[Any]:
    """Two URIs that share one of these are one file: its place; on a local disk also device and inode."""
    where = place(uri)
    if storage.is_s3(where):
        return {where}
    try:
        found = os.stat(where)
    except OSError:
        return {where}
    return {where, (found.st_dev, found.st_ino)}


def stamp(uri: str) -> str:
    """Size, and time of change (local) or ETag (S3): another one for another content, without reading it.

    Raises FileNotFoundError.
    """
    if storage.is_s3(uri):
        size, tag = s3.head(uri)
        return f"{size} bytes, ETag {tag.strip(chr(34))}"
    found = os.stat(storage.normal(uri))
    seconds, rest = divmod(found.st_mtime_ns, 10**9)
    return f"{found.st_size} bytes, {time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09d}Z"


def claim(
    out: str,
    command: str,
    origins: Mapping[str, str],
    *,
    settings: Mapping[str, Any] | None = None,
    protected: Iterable[str] = (),
    overwrite: bool = False,
    option: str = "--out",
) -> set[str]:
    """Permission to write the files {name below `out`: what it is made from, in words}; those that are there already.

    What is there was made from the same and need not be made again. The record notes every origin, and `settings`
    (JSON) for the reader of the folder. `protected` are URIs that are read now; `option` is how the user gave `out`.

    Raises UserError, before anything is written, when a file that this command did not make from these inputs would be
    replaced without `overwrite`; and in any case an input, an image or a label.
    """
    out = storage.normal(out)
    maker = f"{command} {hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"
    inputs = _places(protected)
    for _ in range(30):
        content, record = _read(out)
        noted, there = dict(record["files"]), set()
        for name in origins:
            _check_no_input(storage.join(out, name), inputs, option)
        for name in _present(out, origins):
            target, before = storage.join(out, name), noted.get(name, {})
            ours = before.get("by", "").startswith(f"{command} ")
            if ours and before["origin"] == origins[name]:
                if storage.exists(target) and stamp(target) != before.get("replaces"):
                    there.add(name)  # else whoever was to replace it was stopped before
                continue
            _check_replaceable(target, before if ours else {}, origins[name], overwrite, option)
            noted[name] = {"replaces": stamp(target) if storage.exists(target) else ""}
        for name in origins.keys() - there:
            kept = {"replaces": noted[name]["replaces"]} if noted.get(name, {}).get("replaces") else {}
            noted[name] = {"by": maker, "origin": origins[name]} | kept
        makers = record["makers"] | {maker: dict(settings or {})}
        used = {about["by"] for about in noted.values()} | {maker}
        makers = {m: about for m, about in makers.items() if m in used or not m.startswith(f"{command} ")}
        after = {"made_by": PROGRAM, "makers": makers, "files": noted}
        if after == record:
            return there
        packed = json.dumps(after, indent=1).encode()
        storage.check_writable(out)
        if storage.swap(storage.join(out, RECORD), content, packed):
            return there
    raise OSError(f"{out}: other commands change {RECORD} all the time")


def claim_file(
    target: str,
    ours: Callable[[bytes], bool],
    *,
    protected: Iterable[str] = (),
    overwrite: bool = False,
    option: str = "--out",
) -> None:
    """Permission to write one file that records what made it: `ours(content)` is whether that is this command, with
    these inputs. Raises UserError as `claim` does."""
    target = storage.normal(target)
    _check_no_input(target, _places(protected), option)
    if not _present(target.rpartition("/")[0], [target.rpartition("/")[2]]):
        return
    small = storage.exists(target) and int(stamp(target).split()[0]) <= _LARGEST_RECORD
    if not (small and ours(storage.read_bytes(target))):
        _check_replaceable(target, {}, "", overwrite, option)


def picture_of(command: str, request: Any) -> str:
    """What a PNG says in its `Software` entry: the command that drew it, and a hash of what it was asked for."""
    return f"raytrain-brats {command} {hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]}"


def claim_picture(target: str, made_by: str, overwrite: bool) -> None:
    """As `claim_file`, of a PNG with such words. Raises UserError, also for another name than *.png."""
    if not target.endswith(".png"):
        raise UserError(f"--picture {target}: a picture's name ends in .png")
    ours = lambda content: content.startswith(b"\x89PNG") and made_by.encode() in content[:300]  # noqa: E731
    claim_file(target, ours, overwrite=overwrite, option="--picture")


def recorded(out: str) -> dict[str, Any]:
    """The record of a folder: {"made_by", "makers": {maker: its settings}, "files": {name: {"by": maker, "origin"}}}.

    Without files where there is none. Raises UserError when the file of this name is none of ours.
    """
    return _read(storage.normal(out))[1]


def _read(out: str) -> tuple[bytes | None, dict[str, Any]]:
    where = storage.join(out, RECORD)
    try:
        content = storage.read_bytes(where)
    except (FileNotFoundError, NotADirectoryError):
        return None, {"made_by": PROGRAM, "makers": {}, "files": {}}
    try:
        record = json.loads(content)
        if record["made_by"] != PROGRAM or not all({"by", "origin"} <= f.keys() for f in record["files"].values()):
            raise ValueError("another program's")
        return content, {"made_by": PROGRAM, "makers": dict(record["makers"]), "files": dict(record["files"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where} is damaged or no record of {PROGRAM}; remove it if it is no use, or write elsewhere"
        ) from error


def _present(out: str, names: Iterable[str]) -> list[str]:
    """Which of these names are taken below a folder."""
    if storage.is_s3(out):
        wanted = list(names)
        if len(wanted) < 4:
            return [name for name in wanted if storage.exists(storage.join(out, name))]
        found = storage.list_files(out)
        return [name for name in wanted if name in found]
    return [name for name in names if os.path.lexists(storage.join(out, name))]


def _check_no_input(target: str, inputs: set[Any], option: str) -> None:
    if not inputs.isdisjoint(_keys(target)):
        raise UserError(f"{target} is an input of this command and would be overwritten; give another {option}")
    if not storage.is_s3(target) and Path(target).is_dir():
        raise UserError(f"{target} is a folder where a file would go; give another {option}")


def _places(uris: Iterable[str]) -> set[Any]:
    return set().union(*(_keys(uri) for uri in uris))


def _check_replaceable(target: str, before: Mapping[str, str], origin: str, overwrite: bool, option: str) -> None:
    if what := data_kind(target, ours=bool(before)):
        raise UserError(f"{target} is {what} and is never overwritten; give another {option}")
    if overwrite:
        return
    if before:
        message = f"{target} was made from {before['origin']}; now it would be from {origin}"
    else:
        message = f"{target} is there already and was not made by this command from these inputs"
    raise UserError(f"{message}; give another {option}, or --overwrite to replace it")


def data_kind(target: str, ours: bool = False) -> str:
    """In words, what a file is that no command may replace: somebody's image or label; "" when it is none.

    What a dataset.json in its folder or up to three above names; unless it is known as `ours` also what lies in
    imagesTr, labelsTr and the like, or is named as a modality or segmentation of a case.
    """
    where = place(target)
    folders = list(_with_parents(where))[1 : 1 + _LEVELS]
    if not ours:
        for folder in folders:
            if folder.rpartition("/")[2].lower() in DATA_FOLDERS:
                return f"a file of a data set's {folder.rpartition('/')[2]}"
        if kind := _CASE_FILE.search(where):
            return f"by its name ({kind[0]}) an image or a label of a case"
    for folder in folders:
        if not _keys(target).isdisjoint(_named(folder)):
            return f"named by {storage.join(folder, 'dataset.json')}"
    return ""


def _named(folder: str) -> frozenset[Any]:
    """Places of all images and labels that a folder's dataset.json names."""
    where = storage.join(folder, "dataset.json")
    try:
        return _named_by(where, stamp(where))
    except (OSError, UserError):
        return frozenset()


@lru_cache(maxsize=_LEVELS)
def _named_by(where: str, _stamp: str) -> frozenset[Any]:
    try:
        about = json.loads(storage.read_bytes(where))
        rows = [row for kind in ("training", "validation", "test") for row in about.get(kind) or []]
    except (ValueError, AttributeError, TypeError):
        return frozenset()
    folder = where.rpartition("/")[0]
    values = [value for row in rows for value in (row.values() if isinstance(row, dict) else [row])]
    return frozenset(_places(storage.join(folder, value) for value in values if isinstance(value, str) and value))
