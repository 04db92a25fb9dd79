"""The watcher of a spot machine against a metadata service that answers as EC2's second version does."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
import ray

from raytrain_brats import spot
from raytrain_brats.ray_ext.internals import core
from raytrain_brats.run import checkpoint_request, heartbeat
from raytrain_brats.spot import ACTION, REBALANCE, Imds, Notice, Watcher
from tests.support.metadata import Metadata


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # never asked
    server = Metadata()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def drained() -> list[Notice]:
    return []


@pytest.fixture
def watcher(metadata: Metadata, drained: list[Notice]) -> Watcher:
    return Watcher(Imds(metadata.url), lambda notice: drained.append(notice) is None)


def test_a_notice_drains_once_by_its_own_time(metadata: Metadata, watcher: Watcher, drained: list[Notice]) -> None:
    """Nothing while there is none; then one drain whose deadline is the notice's; again only for another notice."""
    watcher.look()
    assert drained == []
    when = metadata.terminate_in(90)
    for _ in range(3):
        watcher.look()
    (notice,) = drained
    assert notice.deadline == datetime.fromisoformat(when).timestamp()
    assert "terminate" in notice.text and when in notice.text
    metadata.terminate_in(200)
    watcher.look()
    assert len(drained) == 2
    assert metadata.tokens == 1  # one token serves many questions


@pytest.mark.parametrize("body", ["", "not JSON", "[]", '{"action": "stop"}', '{"action": "stop", "time": "soon"}'])
def test_a_notice_that_cannot_be_read_counts_all_the_same(
    metadata: Metadata, watcher: Watcher, drained: list[Notice], body: str
) -> None:
    """EC2's two minutes are taken from when it was seen."""
    metadata.notices[ACTION] = body
    watcher.look()
    watcher.look()
    assert [abs(notice.deadline - time.time() - spot.NOTICE_S) < 5 for notice in drained] == [True]


def test_a_recommendation_has_no_deadline_and_gives_way_to_a_notice(metadata: Metadata, drained: list[Notice]) -> None:
    """Where it is to drain: it does so at once, and a notice after it brings its own deadline."""
    watcher = Watcher(Imds(metadata.url), lambda notice: drained.append(notice) is None, "drain")
    metadata.notices[REBALANCE] = '{"noticeTime": "2026-11-24T10:00:00Z"}'
    watcher.look()
    assert [notice.deadline for notice in drained] == [0.0]
    metadata.terminate_in(90)
    metadata.notices[REBALANCE] = '{"noticeTime": "2026-11-24T10:01:00Z"}'
    watcher.look()
    assert len(drained) == 2 and drained[1].deadline > 0  # the notice's deadline is not taken back


def test_a_recommendation_may_be_noted_only(
    metadata: Metadata, drained: list[Notice], capsys: pytest.CaptureFixture[str]
) -> None:
    metadata.notices[REBALANCE] = '{"noticeTime": "2026-11-24T10:00:00Z"}'
    Watcher(Imds(metadata.url), lambda notice: drained.append(notice) is None, "note").look()
    assert drained == []
    assert "rebalance" in capsys.readouterr().out


def test_a_recommendation_is_a_reason_to_save_and_no_more(
    metadata: Metadata, drained: list[Notice], capsys: pytest.CaptureFixture[str]
) -> None:
    """By default one checkpoint; the node stays, until a notice comes."""
    saved: list[Notice] = []
    watcher = Watcher(
        Imds(metadata.url),
        lambda notice: drained.append(notice) is None,
        spot.Args().rebalance,
        lambda notice: saved.append(notice) is None,
    )
    metadata.notices[REBALANCE] = '{"noticeTime": "2026-11-24T10:00:00Z"}'
    watcher.look()
    watcher.look()
    assert (len(saved), drained) == (1, [])
    assert "a checkpoint is saved" in capsys.readouterr().out
    metadata.terminate_in(90)
    watcher.look()
    assert (len(saved), len(drained)) == (1, 1)


def test_the_runs_on_this_machine_are_asked_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what their ranks tell the cluster: those that train here and are alive, each run once."""
    asked: list[str] = []
    monkeypatch.setattr(
        checkpoint_request,
        "request",
        lambda run_dir, what: asked.append(run_dir) is None and what == checkpoint_request.SAVE,
    )
    try:
        context = ray.init(address="local", num_cpus=1, include_dashboard=False)
        monkeypatch.setenv("RAY_ADDRESS", context.address_info["gcs_address"])
        with pytest.raises(SystemExit, match="1"):
            spot.save(Notice("", 0))
        about = {
            "node": ray.get_runtime_context().get_node_id(),
            "phase": "data",
            "pid": os.getpid(),
            "run_dir": "here",
        }
        others = ({"node": "0"}, {"phase": "end"}, {"pid": 2**22 + 1})
        rows = [about, about, *(about | other | {"run_dir": "other"} for other in others)]
        for number, each in enumerate(rows):
            core.kv_put(f"{heartbeat.PREFIX}run/{number}", json.dumps(each).encode())
        core.kv_put("reservations/x", b"another key of ours")
        with pytest.raises(SystemExit, match="0"):
            spot.save(Notice("", 0))
    finally:
        ray.shutdown()
    assert asked == ["here"]


def test_a_machine_without_a_head_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only when nothing has answered for the whole time; a head that comes back starts it anew."""
    now, ended = [0.0], list[float]()
    monkeypatch.setattr(spot.time, "monotonic", lambda: now[0])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        head = spot.Head(f"127.0.0.1:{listening.getsockname()[1]}", 15, lambda: ended.append(now[0]))
        for now[0] in (0, 3000):
            head.look()
    assert not ended
    for now[0] in (3010, 3890):
        head.look()
    assert not ended
    now[0] = 3900
    head.look()
    assert ended == [3900]


def test_a_head_that_is_no_address_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert spot.main(["--head", "10.0.0.1"]) == 2
    assert "--head 10.0.0.1 is not HOST:PORT" in capsys.readouterr().err


def test_a_token_that_expires_is_renewed(metadata: Metadata, watcher: Watcher, drained: list[Notice]) -> None:
    """Also when the service forgot it before its time: a 401 is answered with a new token, once a question."""
    watcher.look()
    metadata.tokens += 1  # the one that was given is no good any more
    metadata.terminate_in(90)
    watcher.look()
    assert len(drained) == 1
    assert metadata.tokens == 3


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_a_service_that_fails_is_asked_again(
    metadata: Metadata, watcher: Watcher, drained: list[Notice], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """An outage is told once, however long; a notice given meanwhile is found after it."""
    metadata.broken = status
    for _ in range(3):
        watcher.look()
    metadata.broken = 0
    metadata.terminate_in(90)
    watcher.look()
    assert len(drained) == 1
    assert capsys.readouterr().out.count("does not answer") == 1


def test_no_service_at_all(drained: list[Notice]) -> None:
    """Not on EC2, or the service is away: nothing is raised."""
    Watcher(Imds("http://127.0.0.1:9"), lambda notice: drained.append(notice) is None).look()
    assert drained == []


def test_what_ray_does_not_take_is_tried_again(metadata: Metadata) -> None:
    """The head may not be up yet; the deadline stays that of the notice, and once taken it is done with."""
    tried: list[Notice] = []
    watcher = Watcher(Imds(metadata.url), lambda notice: tried.append(notice) is None and len(tried) > 2)
    metadata.terminate_in(90)
    for _ in range(5):
        watcher.look()
    assert len(tried) == 3 and len(set(tried)) == 1


def test_the_program_outlives_a_head_that_is_not_up(metadata: Metadata, tmp_path: Path) -> None:
    """With a notice and no Ray it goes on asking; a second one on the machine ends at once."""
    metadata.terminate_in(90)
    environment = os.environ | {
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url,
        "RAY_ADDRESS": "nonsense",  # as good as no Ray, and said at once
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "raytrain_brats.spot", "--every", "0.1"]
    said = tmp_path / "said"
    with said.open("wb") as log:
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while said.read_text().count("cannot drain yet") < 1 and first.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        assert first.poll() is None, said.read_text()
        assert said.read_text().count("cannot drain yet") >= 1
        assert second.returncode == 0 and "another watcher" in second.stdout
    finally:
        first.kill()
        first.wait()


def test_an_endpoint_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "169.254.169.254")
    assert spot.main([]) == 2
    assert "AWS_EC2_METADATA_SERVICE_ENDPOINT=169.254.169.254" in capsys.readouterr().err
