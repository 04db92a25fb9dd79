"""What the books cost over a long run on S3, and with many ranks."""

import dataclasses
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain_brats import books, s3, storage
from raytrain_brats.learn.step import StepResult
from raytrain_brats.run import checkpoint, events, journal
from raytrain_brats.run.phase_timer import PhaseTimer
from raytrain_brats.run.rank import Rank
from raytrain_brats.run.recorder import RunRecorder
from raytrain_brats.run.worker import train_step_of
from tests.support.crashes import in_child
from tests.support.run_folders import EVENTS, ROWS, write_run
from tests.support.steps import CPU, arrived, spec

GOOD = StepResult(0.5, 0, True, False, 17, 0, 0.1, (0.01,))


class Traffic:
    """Bytes and requests that this process's client of S3 sends and gets, but for the checkpoints' own files."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.threads: set[str] = set()

    def call(self, real: Any, operation: str, arguments: dict[str, Any]) -> Any:
        if not any(arguments.get("Key", "").endswith(name) for name in ("safetensors", "state.json", "MANIFEST.json")):
            self.count["requests"] += 1
            self.count["put"] += len(arguments.get("Body") or b"")
            self.threads.add(threading.current_thread().name)
        answer = real(operation, arguments)
        if operation == "GetObject":
            self.count["got"] += answer["ContentLength"]
        return answer


@pytest.fixture
def traffic(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Traffic:
    seen, client = Traffic(), s3.locate(f"{s3_server}/x")[0]
    real = client._make_api_call
    monkeypatch.setattr(client, "_make_api_call", lambda *arguments: seen.call(real, *arguments))
    return seen


def test_a_long_run_writes_no_more_a_checkpoint(s3_server: str, traffic: Traffic) -> None:
    """Rows, events and documents: the last 64 of 192 checkpoints cost what the first did, and nothing was lost."""
    run_dir = f"{s3_server}/run"
    run_spec = dataclasses.replace(spec(), run_dir=run_dir, dataset_identity="x")
    begun, train_step, costs, seen = journal.begin_generation(run_dir), train_step_of(spec(), 1, CPU), [], 0
    with RunRecorder(run_spec, begun, Rank(0, 1, CPU), PhaseTimer()) as recorder:
        recorder._requests.__exit__()  # polls by time
        for _ in range(192):
            before = traffic.count.copy()
            for _ in range(15):
                recorder.step(seen, seen + 4, arrived(GOOD), [])
                seen += 4
            recorder.checkpoint(seen, train_step)
            recorder._saver.wait()
            costs.append(traffic.count - before)
    first, last = (sum(costs[part], Counter[str]()) for part in (slice(64), slice(-64, None)))
    for what in ("requests", "put", "got"):
        assert 0 < last[what] <= 1.2 * first[what], (what, first, last)
    assert last["put"] / 64 < 40e3
    assert [row["samples_seen"] for row in books.read_rows(run_dir)] == [*range(4, seen + 1, 4)]
    assert sum(e["event"] == "checkpoint" for e in books.read_events(run_dir)) == 192
    assert len(storage.list_files(f"{run_dir}/metrics")) + len(storage.list_files(f"{run_dir}/events")) < 100
    assert journal.begin_generation(run_dir).samples_seen == seen


def test_no_step_asks_the_storage_for_events(s3_server: str, traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told within a step, written by a thread; also the first step's event, for which others must be read."""
    run_dir = f"{s3_server}/run"
    run_spec = dataclasses.replace(spec(), run_dir=run_dir, dataset_identity="x")
    begun = journal.begin_generation(run_dir)
    slow = dataclasses.replace(GOOD, forward_s=(0.1,))
    with RunRecorder(run_spec, begun, Rank(0, 1, CPU), PhaseTimer()) as recorder:
        recorder.ready()
        traffic.threads.clear()  # the start may ask: which validations are done
        recorder.step(0, 4, arrived(slow), [])
        recorder.event("straggler", rank=0)
        recorder.event("checkpoint_left_out")
        monkeypatch.setattr(recorder._saver, "busy", lambda: True)
        recorder.checkpoint(4, train_step_of(spec(), 1, CPU))
        assert threading.current_thread().name not in traffic.threads
    told = [e["event"] for e in books.read_events(run_dir)]
    assert told == ["group", "worker", "recovered", "straggler", *2 * ["checkpoint_left_out"], "closed"]


def test_an_outage_holds_no_step_up(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events wait in memory, as many as it takes a day to tell, and come once the storage is back."""
    run_dir, away = f"{s3_server}/run", [True]
    real = storage.write_bytes

    def write_bytes(uri: str, content: bytes) -> None:
        if away:
            raise OSError("away")
        real(uri, content)

    monkeypatch.setattr(storage, "write_bytes", write_bytes)
    monkeypatch.setattr(events, "_MOST_WAITING", 500)
    with events.in_background(run_dir):
        began = time.monotonic()
        for number in range(600):
            journal.event(run_dir, "told", number=number)
        assert time.monotonic() - began < 1.0
        away.clear()
    assert [e["number"] for e in books.read_events(run_dir)] == [*range(500)]


def test_many_ranks_do_not_wait_for_each_other(s3_server: str) -> None:
    """64 processes write at once: each its own object, in seconds, and all of it is there."""
    run_dir = f"{s3_server}/run"

    def write(number: int) -> None:
        log = events._Log(run_dir)  # a process's
        for kind in ("worker", "quarantine"):
            log.add(kind, f'{{"event": "{kind}", "rank": {number}, "time": {time.time()}}}\n')

    began = time.monotonic()
    ranks = [threading.Thread(target=write, args=(number,)) for number in range(64)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert time.monotonic() - began < 30
    assert Counter(e["rank"] for e in books.read_events(run_dir)) == dict.fromkeys(range(64), 2)


def test_recent_events_are_there_however_many_came_before(s3_server: str) -> None:
    """The driver's segment was begun long ago, other processes have filled many since."""
    run_dir = f"{s3_server}/run"
    journal.event(run_dir, "launch")

    def fill() -> None:
        for number in range(400):
            journal.event(run_dir, "checkpoint", number=number, text="x" * 500)

    assert in_child(fill) == 0
    journal.event(run_dir, "warning", text="disk is full")
    found = books.recent(run_dir)[1]
    assert (found[0]["event"], found[-1]["event"]) == ("launch", "warning")
    assert len(storage.list_files(f"{run_dir}/events")) > 10


def test_books_of_one_file_each_are_still_read(tmp_path: Path) -> None:
    """Of a run that was finished before there were parts."""
    run = str(write_run(tmp_path / "run"))
    assert books.read_rows(run) == ROWS and books.read_events(run) == EVENTS
    assert books.recent(run) == (ROWS, EVENTS)
    assert books.read_rows(run, after=20) == ROWS[5:]
    assert checkpoint.committed(run) == [] and books.parts(run) == []


def test_what_a_person_leaves_among_events_is_none(tmp_path: Path) -> None:
    """`cat events/*.jsonl > events/all.jsonl`, and a new group begins all the same."""
    run = str(tmp_path)
    journal.event(run, "launch", total_samples=8)
    (segment,) = (tmp_path / "events").iterdir()
    (tmp_path / "events/all.jsonl").write_bytes(segment.read_bytes())
    assert [e["event"] for e in books.read_events(run)] == [e["event"] for e in books.recent(run)[1]] == ["launch"]
    assert journal.begin_generation(run).number == 1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_events_stand_in_order_whatever_the_clocks_of_hosts_show(data: st.DataObject) -> None:
    """Controllers and ranks on hosts whose clocks are off by up to an hour, several drivers one after the other: groups
    by number, what a group tells between its begin and the next one's, each process's events as it wrote them."""
    offs = [data.draw(st.floats(-3600, 3600)) for _ in range(4)]
    sources: list[list[dict[str, Any]]] = []
    moment = 1e9
    for number in range(1, data.draw(st.integers(2, 5))):
        if number == 1 or data.draw(st.booleans()):  # another driver
            sources.append([{"event": "launch", "time": moment + offs[0], "host": 0}])
            controller, host = sources[-1], data.draw(st.integers(0, 3))
        moment += 10
        controller.append({"event": "group", "generation": number, "time": moment + offs[host]})
        ranks = [(data.draw(st.integers(0, 3)), list[dict[str, Any]]()) for _ in range(data.draw(st.integers(0, 3)))]
        for _ in range(data.draw(st.integers(0, 6)) if ranks else 0):
            moment += 1
            rank, told = data.draw(st.sampled_from(ranks))
            about = {} if data.draw(st.integers(0, 3)) == 0 else {"generation": number}
            told.append({"event": "told", "time": moment + offs[rank], **about})
        sources += [told for _, told in ranks]
    sources = data.draw(st.permutations(sources))
    found = books._in_order(sources)
    places = {id(event): place for place, event in enumerate(found)}
    assert len(found) == len(places) == sum(map(len, sources))
    for told in sources:
        assert [places[id(event)] for event in told] == sorted(places[id(event)] for event in told)
    groups = [event["generation"] for event in found if event["event"] == "group"]
    assert groups == sorted(groups)
    now = 0
    for event in found:
        now = event["generation"] if event["event"] == "group" else now
        assert event.get("generation", now) == now


def test_events_on_a_machine_whose_clock_is_behind_keep_their_time(tmp_path: Path) -> None:
    """A driver goes on elsewhere, an hour behind: what ranks of the group before told stays in order of time."""
    group, rank = ({"event": "group", "generation": n, "time": t} for n, t in ((1, 5000.0), (2, 1500.0))), "rank"
    told = [
        [{"event": "told", rank: r, "generation": 1, "time": 5000.0 + 10 * n + r} for n in (1, 2, 3)] for r in (1, 2)
    ]
    later = [{"event": "told", rank: 3, "generation": 2, "time": 1510.0}]
    found = books._in_order([*([event] for event in group), *told, later])
    assert [event.get(rank, 0) for event in found] == [0, 1, 2, 1, 2, 1, 2, 0, 3]
