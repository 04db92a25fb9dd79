"""S3 out of reach for a while: waited out where RAYTRAIN_BRATS_PATIENCE_S says so, told quickly elsewhere.

A real proxy stands before a real S3 server and refuses, hangs, answers 503 or breaks bodies off.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError

from raytrain_brats import s3, storage
from raytrain_brats.errors import UserError
from raytrain_brats.ray_ext import cluster, start_up
from tests.support.proxies import Proxy

CONTENT = os.urandom(300_000)
KINDS = ("refuse", "hang", "503", "cut")


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """S3 by way of a proxy, with one object `x` in it; a dead connection is noticed within a second."""
    made = Proxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.port}")
    monkeypatch.setitem(s3.NETWORK, "read_timeout", 1)
    monkeypatch.setattr(s3, "HICCUP_S", 0.5)
    monkeypatch.delenv(storage.PATIENCE, raising=False)
    s3.client.cache_clear()
    storage.write_bytes(f"{s3_server}/x", CONTENT)
    yield made
    made.set("refuse")
    made.server.close()


def operations(root: str) -> dict[str, Callable[[], Any]]:
    return {
        "read_bytes": lambda: storage.read_bytes(f"{root}/x"),
        "read_tail": lambda: storage.read_tail(f"{root}/x", 1000),
        "write_bytes": lambda: storage.write_bytes(f"{root}/new", CONTENT),
        "swap": lambda: storage.swap(f"{root}/x", CONTENT, b"after"),
        "exists": lambda: storage.exists(f"{root}/x"),
        "list_files": lambda: storage.list_files(root),
        "delete": lambda: storage.delete(f"{root}/x"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_an_outage_is_waited_out(proxy: Proxy, s3_server: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """With patience every operation comes back with what it should, once S3 is back."""
    monkeypatch.setenv(storage.PATIENCE, "60")
    expected = {
        "read_bytes": CONTENT,
        "read_tail": CONTENT[-1000:],
        "exists": True,
        "swap": True,
        "list_files": {"x": len(CONTENT)},
    }
    found: dict[str, Any] = {}
    todo = operations(s3_server)
    for names in (["read_bytes", "read_tail", "exists", "list_files"], ["write_bytes", "swap"], ["delete"]):
        proxy.set(kind)
        threads = [threading.Thread(target=lambda n=name: found.update({n: todo[n]()})) for name in names]
        for thread in threads:
            thread.start()
        time.sleep(0.8)
        if kind != "cut":  # there, what has a short answer may come through
            assert not found.keys() & set(names), "the outage was none"
        proxy.set("pass")
        for thread in threads:
            thread.join(60)
        assert found.keys() >= set(names)
        wrong = [name for name in names if found[name] != expected.get(name)]
        assert not wrong, [str(found[name])[:100] for name in wrong]
    assert storage.list_files(s3_server) == {"new": len(CONTENT)}


@pytest.mark.parametrize("kind", KINDS)
def test_without_patience_it_is_told_soon(proxy: Proxy, s3_server: str, kind: str) -> None:
    """At the command line nobody waits for minutes; the message names the place."""
    proxy.set(kind)
    some = {"cut": ["read_bytes"], "hang": ["read_tail", "swap", "list_files"]}  # each takes what a read may take
    for name, operation in operations(s3_server).items():
        if name in some.get(kind, [name]):
            began = time.monotonic()
            with pytest.raises(OSError, match=s3_server):
                operation()
            assert time.monotonic() - began < 60, name


def test_patience_has_an_end(proxy: Proxy, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.PATIENCE, "2")
    proxy.set("refuse")
    began = time.monotonic()
    with pytest.raises(OSError, match=s3_server):
        storage.read_bytes(f"{s3_server}/x")
    assert 2 <= time.monotonic() - began < 60


def test_a_put_whose_answer_was_lost_is_known_again(
    proxy: Proxy, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repeated conditional put is told "precondition failed", of our own content: no lost swap."""
    monkeypatch.setenv(storage.PATIENCE, "20")
    for before, after in ((None, b"first"), (b"first", b"second")):
        proxy.lost_answers = 1
        assert storage.swap(f"{s3_server}/lease", before, after)
        assert proxy.lost_answers == 0
    assert not storage.swap(f"{s3_server}/lease", b"first", b"second")  # already so, but not by this call


@pytest.mark.parametrize(
    ("code", "status", "error", "told"),
    [
        ("SlowDown", 503, None, ""),
        ("InternalError", 500, None, ""),
        ("RequestTimeout", 400, None, ""),
        ("NotImplemented", 501, OSError, "NotImplemented"),
        ("InvalidRange", 416, OSError, "InvalidRange"),
        ("NoSuchKey", 404, FileNotFoundError, "x"),
        ("PreconditionFailed", 412, FileExistsError, "another writer"),
        ("AccessDenied", 403, UserError, "check the bucket's name and the credentials"),
        ("RequestTimeTooSkewed", 403, UserError, "renew the credentials, or set this machine's clock"),
        ("ExpiredToken", 400, UserError, "renew the credentials"),
    ],
)
def test_only_outages_are_waited_out(
    s3_server: str, monkeypatch: pytest.MonkeyPatch, code: str, status: int, error: Any, told: str
) -> None:
    """What would be the same the next time is raised at once, however patient we are."""
    monkeypatch.setenv(storage.PATIENCE, "60")
    storage.write_bytes(f"{s3_server}/x", b"content")
    client, calls = s3.locate(s3_server)[0], []
    real = client.get_object

    def fail_once(**arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")
        return real(**arguments)

    monkeypatch.setattr(client, "get_object", fail_once)
    if error is None:
        assert storage.read_bytes(f"{s3_server}/x") == b"content" and len(calls) == 2
    else:
        with pytest.raises(error, match=told):
            storage.read_bytes(f"{s3_server}/x")
        assert len(calls) == 1


@pytest.mark.parametrize(
    ("own", "job", "passed"), [(None, None, "180"), ("7", None, "7"), (None, "9", None), ("7", "9", None)]
)
def test_rays_processes_are_patient(monkeypatch: pytest.MonkeyPatch, own: Any, job: Any, passed: Any) -> None:
    """By default three minutes; a user's own value wins, and Ray is never given the variable twice."""
    for name in (storage.PATIENCE, "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    monkeypatch.setattr(start_up, "address", lambda: "10.0.0.1:6379")
    if own:
        monkeypatch.setenv(storage.PATIENCE, own)
    if job:
        config = {"runtime_env": {"env_vars": {storage.PATIENCE: job}}}
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    given: dict[str, Any] = {}
    monkeypatch.setattr(cluster.ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    cluster.connect()
    assert given.get("runtime_env", {}).get("env_vars", {}).get(storage.PATIENCE) == passed
    assert os.environ[storage.PATIENCE] == (own or "180")  # a cluster that is started here inherits it
