"""Whole objects on a local disk and on S3 by the same names; nothing torn, nothing lost."""

import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from raytrain_brats import s3, storage
from raytrain_brats.errors import UserError


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh place of each kind; every test that takes it runs on both."""
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3_server')}/some/prefix"


def in_threads(count: int, work: Callable[[int], None]) -> None:
    failed: list[Exception] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except Exception as error:  # noqa: BLE001 (shown below, in the thread that asserts)
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_objects_are_written_read_listed_and_deleted(root: str) -> None:
    """What was put is read back whole, listed with its size, replaced and removed; removing twice is fine."""
    first, second = storage.join(root, "a/b/first.bin"), storage.join(root, "second")
    content = os.urandom(70_000)
    assert not storage.exists(first)
    storage.write_bytes(first, content)
    storage.write_bytes(second, b"old, and longer")
    storage.write_bytes(second, b"new")

    assert storage.exists(first)
    assert storage.read_bytes(first) == content
    assert storage.read_bytes(second) == b"new"
    assert storage.list_files(root) == {"a/b/first.bin": 70_000, "second": 3}
    assert storage.list_files(storage.join(root, "a")) == {"b/first.bin": 70_000}
    for _ in range(2):
        storage.delete(first)
        assert not storage.exists(first)


def test_a_missing_object_is_a_file_not_found_error(root: str) -> None:
    """Local and S3 say it the same way; a missing folder lists nothing."""
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))
    assert storage.list_files(storage.join(root, "nowhere")) == {}


def test_listing_leaves_out_hidden_names_and_neighbours(root: str) -> None:
    """`._x` of macOS, `.git/x` and temporary files are hidden; `prefix2/` is not below `prefix`."""
    for name in ("._x.nii.gz", "a/._y", ".hidden/z", "a/.z.12ab.tmp", "a/x.nii.gz"):
        storage.write_bytes(storage.join(root, "data", name), b"1")
    storage.write_bytes(storage.join(root, "data2", "x"), b"1")
    assert storage.list_files(storage.join(root, "data")) == {"a/x.nii.gz": 1}
    assert storage.list_files(storage.join(root, "data/")) == {"a/x.nii.gz": 1}


def test_concurrent_appends_lose_nothing(tmp_path: Path) -> None:
    """Six writers of five lines each: thirty whole lines, each writer's in its own order."""
    uri = str(tmp_path / "logs" / "events.jsonl")

    def work(number: int) -> None:
        for line in range(5):
            storage.append(uri, f"writer {number} line {line} {'x' * 500}\n")

    in_threads(6, work)
    rows = [line.split()[:4] for line in storage.read_bytes(uri).decode().splitlines()]
    assert sorted(rows) == sorted(["writer", str(n), "line", str(i)] for n in range(6) for i in range(5))
    for number in range(6):
        assert [row[3] for row in rows if row[1] == str(number)] == list("01234")


def test_concurrent_puts_are_never_torn(root: str) -> None:
    """Readers beside writers see one writer's whole bytes, and no temporary file stays."""
    uri, size = storage.join(root, "object"), 200_000
    storage.write_bytes(uri, b"0" * size)

    def work(number: int) -> None:
        for _ in range(6):
            if number % 2:
                storage.write_bytes(uri, str(number).encode() * size)
            else:
                content = storage.read_bytes(uri)
                assert content == content[:1] * size

    in_threads(6, work)
    assert storage.list_files(root) == {"object": size}
    if not storage.is_s3(root):
        assert [path.name for path in Path(root).iterdir()] == ["object"]


def test_swap_replaces_only_what_was_expected(root: str) -> None:
    """None stands for no object; whoever is too late is told so and changes nothing."""
    uri = storage.join(root, "books", "x")
    assert not storage.swap(uri, b"", b"1") and not storage.exists(uri)
    assert storage.swap(uri, None, b"1")
    assert not storage.swap(uri, None, b"2") and not storage.swap(uri, b"", b"2")
    assert storage.swap(uri, b"1", b"2") and not storage.swap(uri, b"1", b"2")
    assert storage.read_bytes(uri) == b"2" and storage.list_files(root) == {"books/x": 1}


def test_concurrent_swaps_lose_nothing(root: str) -> None:
    """Six counters on one object: every success counts."""
    uri = storage.join(root, "count")

    def work(number: int) -> None:
        for turn in range(4):
            while True:
                before = storage.read_bytes(uri) if storage.exists(uri) else None
                if storage.swap(uri, before, (before or b"") + f"{number}.{turn} ".encode()):
                    break

    in_threads(6, work)
    assert sorted(storage.read_bytes(uri).split()) == sorted(f"{n}.{t}".encode() for n in range(6) for t in range(4))


def test_a_lock_that_never_comes_free_and_one_that_does_not_work_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder may have been stopped; some network file systems lock nothing unless mounted so."""
    uri = str(tmp_path / "x")
    monkeypatch.setattr(storage, "_LOCK_S", 0.2)
    with storage._locked(Path(uri)), pytest.raises(OSError, match="another process has held its lock"):
        storage.swap(uri, None, b"1")
    assert storage.swap(uri, None, b"1")

    def unknown(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with pytest.raises(UserError, match=r"does not lock files .*-o flock"):
        storage.swap(uri, b"1", b"2")


def test_a_failed_local_write_leaves_the_old_bytes_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk fails before the rename, the old object stands and nothing else is left."""
    storage.write_bytes(str(tmp_path / "x"), b"old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(storage.os, step, fail)
            with pytest.raises(OSError, match="No space left"):
                storage.write_bytes(str(tmp_path / "x"), b"new")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
        assert (tmp_path / "x").read_bytes() == b"old"


def test_a_wrong_bucket_is_the_users_mistake(s3_server: str) -> None:
    """Reading, writing and listing name the bucket's URI and S3's answer."""
    uri = f"{s3_server}-wrong/x"
    calls: list[Callable[[], Any]] = [
        lambda: storage.read_bytes(uri),
        lambda: storage.write_bytes(uri, b""),
        lambda: storage.list_files(uri),
        lambda: storage.check_writable(uri),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"-wrong/x.*NoSuchBucket"):
            call()
    assert not storage.exists(uri)
    assert storage.exists(s3_server)
    assert not storage.exists(f"{s3_server}-wrong")


def test_missing_credentials_are_the_users_mistake(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials the message says what to set, instead of a traceback of botocore."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    s3.client.cache_clear()
    with pytest.raises(UserError, match="no AWS credentials found; set"):
        storage.read_bytes(f"{s3_server}/x")


def test_a_place_without_rights_is_named_before_the_run(tmp_path: Path, root: str) -> None:
    """check_writable leaves nothing behind where it may write, and names the place where it may not."""
    storage.check_writable(root)
    assert storage.list_files(root) == {}
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot write to .*file/below"):
        storage.check_writable(str(tmp_path / "file" / "below"))


def test_one_spelling_per_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, ~, file:// and trailing slashes come to one name; other schemes are refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    place = str(tmp_path / "run")
    for spelling in ("run", "./run/", "~/run", f"file://{place}", Path("run"), place):
        assert storage.normal(spelling) == place
    assert storage.normal("s3://bucket/key/") == "s3://bucket/key"
    assert storage.join("s3://bucket/", "/a/", "b") == "s3://bucket/a/b"
    for wrong in ("gs://bucket/x", "https://host/x", "hdfs://x", "s3:/bucket/x", "s3:bucket"):
        with pytest.raises(UserError, match="only local paths and s3://"):
            storage.normal(wrong)


def test_ray_gets_the_same_place(s3_server: str, tmp_path: Path) -> None:
    """Ray's own files go to the endpoint of the environment, by pyarrow's file system."""
    path, filesystem = storage.for_ray(f"{s3_server}/ray")
    with filesystem.open_output_stream(f"{path}/x") as stream:
        stream.write(b"from ray")
    assert storage.read_bytes(f"{s3_server}/ray/x") == b"from ray"
    assert storage.for_ray(str(tmp_path)) == (str(tmp_path), None)


def test_only_old_leftovers_are_swept(tmp_path: Path) -> None:
    """What a killed writer left goes after an hour; what another writer may be at work on stays, and all else."""
    storage.write_bytes(str(tmp_path / "a/b.bin"), b"whole")
    old, young = tmp_path / "a/.b.bin.0123abcd.tmp", tmp_path / "a/.c.bin.0123abcd.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    hour_ago = old.stat().st_mtime - 3700
    for path in (old, tmp_path / "a/b.bin"):
        os.utime(path, (hour_ago, hour_ago))
    storage.sweep(str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [young.name, "b.bin"]
