"""Task01 from a bucket, by way of a proxy: whole, checked, resumed after every kill, and never outside --out.

The bucket is a real S3 server on this machine, the archive a small one. Tars from a stranger: plain files by plain
names come out, all else is refused by name, damage is never the end.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import signal
import stat
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from raytrain_brats import download, s3, storage
from raytrain_brats.download import ArchiveError
from tests.support.proxies import FaultyProxy

FOLDER, KEY = "Task01_BrainTumour", "Task01_BrainTumour.tar"
SECRET = b"what stood there before"


def entry(name: str, kind: bytes = tarfile.REGTYPE, **values: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for key, value in values.items():
        setattr(made, key, value)
    return made


def add(tar: tarfile.TarFile, name: str, content: bytes, **values: Any) -> None:
    tar.addfile(entry(name, size=len(content), **values), io.BytesIO(content))


def with_header(name: str, **fields: bytes) -> bytes:
    """A plain file's header with some fields set by hand, and a sum that fits."""
    block = bytearray(entry(name).tobuf(tarfile.USTAR_FORMAT))
    places = {"size": (124, 12), "type": (156, 1), "name": (0, 100), "mode": (100, 8), "magic": (257, 8)}
    for key, value in fields.items():
        start, length = places[key]
        block[start : start + length] = value.ljust(length, b"\0")
    return summed(block)


def summed(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def dataset(cases: int, seed: int = 0) -> dict[str, bytes]:
    """{our name: content}."""
    files, rows, dice = {}, [], random.Random(seed)
    for number in range(1, cases + 1):
        row = {kind: f"./{kind}sTr/BRATS_{number:03d}.nii.gz" for kind in ("image", "label")}
        rows.append(row)
        for path in row.values():
            files[path[2:]] = gzip.compress(dice.randbytes(9000 if "image" in path else 700), mtime=0)
    files["imagesTs/BRATS_485.nii.gz"] = gzip.compress(b"test", mtime=0)
    about = {"training": rows, "test": ["./imagesTs/BRATS_485.nii.gz"]}
    return {"dataset.json": json.dumps(about).encode(), **files}


def packed(files: dict[str, bytes], build: Callable[[tarfile.TarFile], Any] | None = None, macos: bool = True) -> bytes:
    """As macOS packs it: folders, a `._` file for each, extended headers; then what `build` adds."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(entry(FOLDER, tarfile.DIRTYPE))
        for name, content in files.items():
            folder, _, base = f"{FOLDER}/{name}".rpartition("/")
            if macos:
                add(tar, f"{folder}/._{base}", b"left by macOS", pax_headers={"mtime": "1.5"})
            add(tar, f"{folder}/{base}", content, mode=0o6755)
        if build:
            build(tar)
    return sink.getvalue()


class Bucket:
    """The public bucket, reached through the proxy without credentials."""

    def __init__(self, name: str, proxy: FaultyProxy, direct: Any, patch: pytest.MonkeyPatch) -> None:
        self.name, self.proxy, self._direct, self._patch = name, proxy, direct, patch
        self.files = dataset(6)

    def put(self, tar: bytes) -> None:
        self._direct.put_object(Bucket=self.name, Key=KEY, Body=tar, ACL="public-read")
        md5 = hashlib.md5(tar).hexdigest()
        made = dataclasses.replace(download.TASK01, uri=f"s3://{self.name}/{KEY}", md5=md5)
        self._patch.setattr(download, "TASK01", made)

    def ranges(self) -> list[tuple[int, int]]:
        asked = [a.range.removeprefix("bytes=").split("-") for a in self.proxy.log if a.path.endswith(KEY) and a.range]
        return [(int(low), int(high)) for low, high in asked]


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    direct = boto3.client("s3")
    proxy = FaultyProxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]), only=KEY)
    for name, value in (("AWS_ENDPOINT_URL", proxy.url), (s3.PATIENCE, "20")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(download, "RANGE_BYTES", 5000)
    s3.client.cache_clear()
    made = Bucket(s3_server.removeprefix("s3://"), proxy, direct, monkeypatch)
    made.put(packed(made.files))
    yield made
    proxy.close()


def run(out: Any) -> int:
    return download.main(["--out", str(out)])


def contents(out: str) -> dict[str, bytes]:
    return {n: storage.read_bytes(storage.join(out, n)) for n in storage.list_files(out) if n != download.STATE}


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_the_archives_files_and_no_others_are_written(
    bucket: Bucket, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With their sums beside them; each byte of the archive is asked for once, and none the second time."""
    out = str(tmp_path / "out") if kind == "local" else f"s3://{bucket.name}/out"
    assert run(out) == 0
    printed = capsys.readouterr().out
    assert contents(out) == bucket.files
    assert "14 files (14 fetched now)" in printed and "md5 of the archive: equal" in printed and "CC-BY-SA" in printed
    assert printed.count(" %: ") >= 10
    state = json.loads(storage.read_bytes(storage.join(out, download.STATE)))
    assert state["complete"]
    assert {n: f["sha256"] for n, f in state["files"].items()} == {
        n: hashlib.sha256(c).hexdigest() for n, c in bucket.files.items()
    }
    ranges = sorted(bucket.ranges())
    assert [low for low, _ in ranges[1:]].count(0) == 0
    once = [r for r in ranges if r[1] - r[0] == 4999]  # dataset.json, which has no sum of its own, is read twice
    assert len(set(once)) == len(once) >= state["bytes"] // 5000 and len(ranges) <= len(once) + 2
    if kind == "local":
        assert all(stat.S_IMODE(p.stat().st_mode) & 0o7022 == 0 for p in tmp_path.rglob("*") if p.is_file())

    bucket.proxy.log.clear()
    assert run(out) == 0
    assert bucket.ranges() == []
    assert "14 files (0 fetched now)" in capsys.readouterr().out


def test_a_kill_at_any_write_is_gone_on_from(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before or after each write: the next run asks for nothing that was noted as done."""
    bucket.files = dataset(3)
    bucket.put(packed(bucket.files))
    real, left = storage.write_bytes, [0]

    def until_killed(uri: str, content: bytes) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        real(uri, content)

    monkeypatch.setattr(storage, "write_bytes", until_killed)
    for number in range(2, 2 * len(bucket.files) + 9):  # the first write is the probe
        out = tmp_path / str(number)
        left[0] = number
        code = run(out)
        if code == 0:
            assert number > 2 * len(bucket.files)
            break
        assert code == 130
        state = json.loads((out / download.STATE).read_bytes()) if (out / download.STATE).exists() else {"offset": 0}
        bucket.proxy.log.clear()
        left[0] = -1
        assert run(out) == 0
        assert contents(str(out)) == bucket.files
        assert all(low >= state["offset"] for low, _ in bucket.ranges())
    else:
        raise AssertionError("never ran to its end")


def _in_a_process(out: str, source: download.Published) -> None:
    download.TASK01 = source
    download.RANGE_BYTES = 5000
    run(out)


def test_a_real_kill_in_the_middle(bucket: Bucket, tmp_path: Path) -> None:
    """SIGKILL of the process; what it had noted stays, and is not fetched again."""
    bucket.files = dataset(60)
    bucket.put(packed(bucket.files))
    noted = tmp_path / "out" / download.STATE
    child = multiprocessing.get_context("spawn").Process(
        target=_in_a_process, args=(str(tmp_path / "out"), download.TASK01)
    )
    child.start()
    deadline = time.monotonic() + 120
    while not (noted.exists() and json.loads(noted.read_bytes())["files"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    state = json.loads(noted.read_bytes())
    assert not state["complete"] and state["files"]
    bucket.proxy.log.clear()
    assert run(tmp_path / "out") == 0
    assert min(low for low, _ in bucket.ranges()) == state["offset"]
    assert contents(str(tmp_path / "out")) == bucket.files


def test_a_file_that_went_is_fetched_alone(bucket: Bucket, tmp_path: Path) -> None:
    """Removed after it was done: only its own bytes are asked for."""
    assert run(tmp_path) == 0
    (tmp_path / "imagesTr/BRATS_003.nii.gz").unlink()
    (tmp_path / "labelsTr/BRATS_002.nii.gz").unlink()
    bucket.proxy.log.clear()
    assert run(tmp_path) == 0
    assert contents(str(tmp_path)) == bucket.files
    state = json.loads((tmp_path / download.STATE).read_bytes())
    wanted = [state["files"][n] for n in ("imagesTr/BRATS_003.nii.gz", "labelsTr/BRATS_002.nii.gz")]
    assert sorted(bucket.ranges()) == sorted((f["at"], f["at"] + f["bytes"] - 1) for f in wanted)


def test_a_file_that_somebody_changed_stays(bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A label corrected in place, or put there before it was fetched: named, and kept; moved away, all goes on."""
    mine, label = gzip.compress(b"corrected by hand"), tmp_path / "labelsTr/BRATS_002.nii.gz"
    for before in (True, False):
        if before:  # begun, and stopped before the label
            state = {"source": download.TASK01.uri, "offset": 0}
            size, etag = s3.head(state["source"], download.TASK01.region)
            (tmp_path / download.STATE).write_text(json.dumps(state | {"etag": etag, "bytes": size}))
            label.parent.mkdir()
        label.write_bytes(mine)
        assert run(tmp_path) == 2
        assert f"{label} " in capsys.readouterr().err and label.read_bytes() == mine
        label.unlink()
        assert run(tmp_path) == 0
        assert contents(str(tmp_path)) == bucket.files
        capsys.readouterr()


def test_spoilt_answers_on_the_way(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A third of all answers are spoilt; every file is right, and so is the md5 of the whole."""
    bucket.files = dataset(20)
    bucket.put(packed(bucket.files, macos=False))
    bucket.proxy.rates = {"503": 0.08, "reset": 0.05, "truncated": 0.05, "short": 0.05, "flip": 0.1}
    assert run(tmp_path) == 0, capsys.readouterr().err
    assert {fault: bucket.proxy.count(fault) > 0 for fault in bucket.proxy.rates} == dict.fromkeys(
        bucket.proxy.rates, True
    )
    assert bucket.proxy.count("flip") >= 3
    assert contents(str(tmp_path)) == bucket.files
    assert "equal to the published one" in capsys.readouterr().out


def test_a_line_that_always_alters_ends_with_an_error(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing altered is written."""
    bucket.proxy.always = "flip"
    assert run(tmp_path) == 1
    assert capsys.readouterr().err.startswith("failed: ")
    assert all(bucket.files[name] == content for name, content in contents(str(tmp_path)).items())


def test_another_archive_than_before_is_refused(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Replaced while it is read, or between two runs: told, and never mixed."""
    other = packed(dataset(6, seed=1))
    real = storage.write_bytes

    def replaced_meanwhile(uri: str, content: bytes) -> None:
        real(uri, content)
        if len(bucket.proxy.log) > 4:
            bucket.put(other)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", replaced_meanwhile)
        assert run(tmp_path) == 1
    assert "was replaced while it was read" in capsys.readouterr().err
    assert all(bucket.files[name] == content for name, content in contents(str(tmp_path)).items())
    assert run(tmp_path) == 2
    told = capsys.readouterr().err
    assert f"error: {tmp_path} was begun from" in told and "begin anew" in told and told.count("ETag") == 2


def sparse_map(tar: tarfile.TarFile) -> None:
    """A sparse file whose map, which tarfile reads before anybody can judge the file, has no end."""
    records = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    add(tar, "T/s", b"99999999\n" + b"1\n" * 200_000, pax_headers=records)


HOSTILE: dict[str, tuple[Callable[[tarfile.TarFile], Any], str]] = {
    "parent": (lambda t: add(t, "../evil", b"x"), "points out of|outside the destination"),
    "parent within": (lambda t: add(t, "T/imagesTr/../../evil", b"x"), "points out of|outside the destination"),
    "parent folder": (lambda t: t.addfile(entry("T/..", tarfile.DIRTYPE)), "points out of|outside the destination"),
    "absolute": (lambda t: add(t, "/tmp/evil", b"x"), "points out of|outside the destination"),
    "symbolic link": (lambda t: t.addfile(entry("T/l", tarfile.SYMTYPE, linkname="/etc")), "no plain file"),
    "hard link": (lambda t: t.addfile(entry("T/l", tarfile.LNKTYPE, linkname="../../x")), "no plain file"),
    "hard link with content": (
        lambda t: t.addfile(entry("T/l", tarfile.LNKTYPE, linkname="T/x", size=4), io.BytesIO(b"1234")),
        "no plain file",
    ),
    "device": (lambda t: t.addfile(entry("T/d", tarfile.CHRTYPE, devmajor=1, devminor=3)), "no plain file"),
    "block device": (lambda t: t.addfile(entry("T/d", tarfile.BLKTYPE)), "no plain file"),
    "pipe": (lambda t: t.addfile(entry("T/p", tarfile.FIFOTYPE)), "no plain file"),
    "contiguous": (lambda t: t.addfile(entry("T/c", tarfile.CONTTYPE)), "no plain file"),
    "volume name": (lambda t: t.fileobj.write(with_header("T/v", type=b"V")), "no plain file"),
    "sparse": (lambda t: t.fileobj.write(with_header("T/s", type=b"S", magic=b"ustar  ")), "no plain file"),
    "endless map of a sparse file": (sparse_map, "more than the 65,536 bytes allowed"),
    "oversize": (lambda t: t.fileobj.write(with_header("T/big", size=b"00700000000")), "67,108,864 allowed"),
    "oversize base 256": (
        lambda t: t.fileobj.write(with_header("T/big", size=b"\x80" + (1 << 60).to_bytes(11, "big"))),
        "67,108,864 allowed",
    ),
    "negative size": (lambda t: t.fileobj.write(with_header("T/n", size=b"\xff" * 12)), "allowed"),
    "size that is no number": (lambda t: t.fileobj.write(with_header("T/n", size=b"zzzzzzzzzzz")), "is damaged"),
    "long name bomb": (
        lambda t: t.fileobj.write(with_header("T/n", type=b"L", size=b"00700000000")),
        "more than the 65,536 bytes allowed",
    ),
    "pax bomb": (
        lambda t: t.fileobj.write(with_header("T/n", type=b"x", size=b"00700000000")),
        "more than the 65,536 bytes allowed",
    ),
    "content beyond the end": (
        lambda t: t.fileobj.write(with_header("T/n", size=b"00000100000")),
        "cut off at",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_is_ever_written_outside(
    bucket: Bucket, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the archive holds: one line, exit code 1; beside --out all is as it was, within it only plain files."""
    out = tmp_path / "a" / "out"
    out.mkdir(parents=True)
    (tmp_path / "evil").write_bytes(SECRET)
    (tmp_path / "a" / "evil").write_bytes(SECRET)
    build, told = HOSTILE[kind]
    bucket.put(packed(bucket.files, build))
    assert run(out) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("failed: ") and len(printed.splitlines()) == 1 and KEY in printed
    assert re.search(told, printed), printed
    outside = {p for p in tmp_path.rglob("*") if not p.is_relative_to(out)}
    assert outside == {tmp_path / "a", tmp_path / "evil", tmp_path / "a" / "evil"}
    assert (tmp_path / "evil").read_bytes() == (tmp_path / "a" / "evil").read_bytes() == SECRET
    assert all(stat.S_ISREG(p.lstat().st_mode) or stat.S_ISDIR(p.lstat().st_mode) for p in out.rglob("*"))
    assert contents(str(out)) == bucket.files
    assert not json.loads((out / download.STATE).read_bytes())["complete"]


WRONG: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "cut off within a file": (lambda f: packed(f)[:30_000], "it is cut off at 'Task01_BrainTumour/imagesTr"),
    "cut off between files": (lambda f: packed(f)[: 512 * 5], "cut off"),
    "a file twice": (lambda f: packed(f, lambda t: add(t, f"{FOLDER}/dataset.json", b"{}")), "stands in it twice"),
    "a file twice, spelt otherwise": (
        lambda f: packed(f, lambda t: add(t, f"./{FOLDER}/dataset.json", b"{}")),
        "stands in it twice",
    ),
    "a damaged volume": (
        lambda f: packed(f | {"imagesTr/BRATS_002.nii.gz": f["imagesTr/BRATS_002.nii.gz"][:-20]}),
        "BRATS_002.nii.gz: its gzip stream is damaged or cut off",
    ),
    "a bomb": (
        lambda f: packed(f | {"imagesTr/BRATS_002.nii.gz": gzip.compress(bytes(80_000_000))}),
        "bytes unpack to more than 67,108,864",
    ),
    "no dataset.json": (lambda f: packed({n: c for n, c in f.items() if n != "dataset.json"}), "holds no dataset.json"),
    "a file less": (
        lambda f: packed({n: c for n, c in f.items() if "Ts" not in n}),
        "lacks 1 files that its dataset.json names, as imagesTs/BRATS_485.nii.gz",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_archives_that_are_not_whole(
    bucket: Bucket, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told in one line, exit code 1, also the second time."""
    build, told = WRONG[kind]
    bucket.put(build(bucket.files))
    for _ in range(2):
        assert run(tmp_path) == 1
        assert told in capsys.readouterr().err
    assert all(bucket.files[name] == content for name, content in contents(str(tmp_path)).items())


def test_the_published_md5_counts(bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An archive that is whole in itself, but another one."""
    download.TASK01 = dataclasses.replace(download.TASK01, md5="0" * 32)
    assert run(tmp_path) == 1
    assert f"the published one has {'0' * 32}" in capsys.readouterr().err


def test_mistakes_are_told_before_anything_is_fetched(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line that names the place."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_bytes(SECRET)
    (tmp_path / "bad").mkdir()
    (tmp_path / "file").write_bytes(SECRET)
    states = ("no json", json.dumps({"source": "s"}), json.dumps({"etag": "", "bytes": 1, "source": "", "files": [1]}))
    cases = [("full", "holds other files (mine.txt)"), ("file/below", "cannot write to")]
    for name, told in [*cases, *(("bad", "download.json is damaged") for _ in states)]:
        if name == "bad":
            (tmp_path / "bad" / download.STATE).write_text(states[len(states) - 1])
            states = states[:-1]
        assert run(tmp_path / name) == 2
        printed = capsys.readouterr().err
        assert told in printed and str(tmp_path / name) in printed and len(printed.splitlines()) == 1
    escaping = {"source": "", "etag": "", "bytes": 1, "files": {"../evil": {"at": 0, "bytes": 1, "sha256": ""}}}
    (tmp_path / "bad" / download.STATE).write_text(json.dumps(escaping))
    assert run(tmp_path / "bad") == 2 and "is damaged" in capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
        assert run(tmp_path / "small") == 2
    assert "GB are needed" in capsys.readouterr().err
    assert run("gs://x/y") == 2
    assert "only local paths and s3://" in capsys.readouterr().err
    assert bucket.ranges() == []
    download.TASK01 = dataclasses.replace(download.TASK01, uri="s3://nobodys-bucket/x.tar")
    assert run(tmp_path / "new") == 1
    assert "s3://nobodys-bucket/x.tar" in capsys.readouterr().err


MEMBERS = {"T/imagesTr/a.nii.gz": os.urandom(1500), "T/dataset.json": b"{}", "T/empty": b"", "T/x": b"x" * 512}


def make_tar(build: Callable[[tarfile.TarFile], Any] | None = None, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """MEMBERS, then what `build` adds."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as tar:
        tar.addfile(entry("T", tarfile.DIRTYPE))
        for name, content in MEMBERS.items():
            add(tar, name, content)
        if build:
            build(tar)
    return sink.getvalue()


class Here(download.Remote):
    """An archive in memory."""

    def __init__(self, tar: bytes, start: int = 0, archive_bytes: int = 0) -> None:
        state = download.State("", "", archive_bytes or len(tar), start)
        super().__init__(download.TASK01, state)
        self.tar, self.asked = tar, 0

    def fetch(self, offset: int, size: int) -> bytes:
        self.asked += 1
        return (self.tar[offset : offset + size] if self.bytes == len(self.tar) else self.tar * (size // 512))[:size]


def listed(tar: bytes, start: int = 0) -> list[tuple[str, int, int]]:
    """(name, offset, size) of its plain files."""
    found = download.members(Here(tar, start))
    return [(m.name, m.offset_data, m.size) for m in found if m.isreg()]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_plain_files_come_in_order_and_from_any_member_on(form: int) -> None:
    """Of every format, with the records that macOS and long names add; a resume begins where a member ends."""

    def build(tar: tarfile.TarFile) -> None:
        add(tar, "T/._y", b"", pax_headers={"LIBARCHIVE.xattr.com.apple": "A" * 2000, "mtime": "1.5"})
        add(tar, f"T/{'n' * 90}/{'m' * 120}" if form != tarfile.USTAR_FORMAT else "T/n", b"long", mode=0o6777)

    tar = make_tar(build, form)
    found = listed(tar)
    assert [tar[at : at + size] for _, at, size in found] == [*MEMBERS.values(), b"", b"long"]
    assert [name for name, _, _ in found][:5] == [*MEMBERS, "T/._y"]
    for number, (_, at, size) in enumerate(found):
        assert listed(tar, at + size + -size % 512) == found[number + 1 :]


@pytest.mark.parametrize("record", ["size", "GNU.sparse.major", "GNU.sparse.realsize"])
def test_extended_headers_cannot_change_a_files_content(record: str) -> None:
    """Two readers must not see two archives."""
    tar = make_tar(lambda t: add(t, "T/x2", b"x", pax_headers={record: "1"}), tarfile.PAX_FORMAT)
    with pytest.raises(ArchiveError, match="another size"):
        listed(tar)


@pytest.mark.parametrize("kind", ["file", "folder", "extended header"])
def test_a_million_entries_end_early(kind: str) -> None:
    """At the cap on entries, or on the headers of one; with no more read than that."""
    header = with_header("T/x", type={"file": b"0", "folder": b"5", "extended header": b"g"}[kind])
    remote = Here(header, archive_bytes=1_000_000 * 512)

    def walk() -> None:
        for member in download.members(remote):
            remote.done(member.offset_data)

    with pytest.raises(ArchiveError, match=r"more than 20,000 entries|65,536 bytes allowed"):
        walk()
    assert remote.asked * download.RANGE_BYTES <= 2 * download.RANGE_BYTES


def test_damage_is_never_taken_for_the_end() -> None:
    """Every bit of a header counts, every cut is noticed, and so is what follows the end mark."""
    tar = make_tar()
    whole = listed(tar)
    for _, at, _ in whole[1:]:
        for bit in random.Random(0).sample(range(512 * 8), 100):
            altered = bytearray(tar)
            altered[at - 512 + bit // 8] ^= 1 << bit % 8
            with pytest.raises(ArchiveError, match=f"header at byte {at - 512:,} is damaged"):
                listed(bytes(altered))
    end = whole[-1][1] + 512
    for cut in range(0, end, 256):
        with pytest.raises(ArchiveError, match=r"cut off|empty file|truncated header"):
            listed(tar[:cut])
    assert listed(tar[: end + 512]) == whole
    with pytest.raises(ArchiveError, match="something follows the end mark"):
        listed(tar + b"more")


def test_mutants_with_fitting_sums_break_nothing() -> None:
    """5,000 headers of random fields: a refusal or members within the archive, never another exception."""
    dice, tar, refused = random.Random(0), make_tar(form=tarfile.PAX_FORMAT), 0
    for _ in range(5000):
        altered = bytearray(tar)
        for _ in range(dice.randint(1, 6)):
            altered[512 + dice.choice([*range(157), *range(257, 512)])] = dice.randrange(256)
        altered[512:1024] = summed(altered[512:1024])
        try:
            for _, at, size in listed(bytes(altered)):
                assert 0 <= at <= at + size <= len(tar)
        except ArchiveError:
            refused += 1
    assert 500 < refused < 5000


def test_a_gz_is_held_against_its_own_checksum() -> None:
    """Any flipped bit but those of the header's unused fields, any cut, and what follows; several members are one."""
    content = random.Random(0).randbytes(3000) + bytes(3000)
    small = gzip.compress(content, mtime=0)
    download.check_gzip(small)
    download.check_gzip(small + small)
    download.check_gzip(gzip.compress(bytes(9_000_000)))  # the label of an empty volume, 300 to 1 but small
    for bit in range(10 * 8, len(small) * 8, 37):
        altered = bytearray(small)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArchiveError, match="gzip stream"):
            download.check_gzip(bytes(altered))
    for wrong in (small[:-1], small[:50], b"", small + b"x", b"no gzip at all"):
        with pytest.raises(ArchiveError):
            download.check_gzip(wrong)
