"""The books: generations, rows that count, events that stay; on a local disk and on S3."""

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain_brats import books, storage
from raytrain_brats.errors import RunFailed
from raytrain_brats.run import checkpoint, control, journal, rows
from raytrain_brats.run.rows import MetricsLog
from tests.support.crashes import in_child


@pytest.fixture(params=["local", "s3"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run folder of either kind."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_server')}/some/run"
    (tmp_path / "run").mkdir()
    return str(tmp_path / "run")


def save(run_dir: str, seen: int, generation: int | None = None) -> str:
    """A checkpoint; the rows up to `seen` are there already, or one comes with it."""
    state, now = {"samples_seen": seen, "bad_in_epoch": 3}, control.current(run_dir)
    if generation is None:
        generation = now.number if now else 1
    kept = books.chain(books.parts(run_dir), now.number if now else 1, now.samples_seen if now else 0)
    if (end := kept[-1].end if kept else 0) < seen:
        row = json.dumps({"samples_seen": seen, "generation": generation}) + "\n"
        storage.write_bytes(storage.join(run_dir, "metrics", books.Part(end, seen, generation).name), row.encode())
    return checkpoint.save(run_dir, seen, generation, {"a": torch.ones(3)}, state).name


def write_rows(run_dir: str, *seen: int) -> None:
    log = MetricsLog(run_dir, control.current(run_dir) or journal.begin_generation(run_dir))
    for number in seen:
        log.add({"samples_seen": number, "loss": 0.1})
        if len(seen) < 10 or not number % 500:
            log.flush()
    log.flush()


def seen_rows(run_dir: str) -> list[int]:
    return [row["samples_seen"] for row in books.read_rows(run_dir)]


def events(run_dir: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in books.read_events(run_dir) if event["event"] == kind]


def test_generations_are_numbered_and_recorded(run_dir: str) -> None:
    """The first starts at 0 without a checkpoint; later ones at the newest valid one; all ranks read the decision."""
    assert control.current(run_dir) is None and books.read_rows(run_dir) == [] == books.read_events(run_dir)
    first = journal.begin_generation(run_dir)
    assert first == control.Generation(1, fence=1) == control.current(run_dir)
    name = save(run_dir, 8)
    second = journal.begin_generation(run_dir)
    assert second == control.Generation(2, 8, name, bad_in_epoch=3, fence=2) == control.current(run_dir)
    assert [e["generation"] for e in events(run_dir, "group")] == [1, 2]
    assert events(run_dir, "group")[1]["checkpoint"] == name
    assert {"time", "mono_s", "host", "pid"} <= events(run_dir, "group")[0].keys()


def test_rows_beyond_the_checkpoint_are_dropped_and_counted(run_dir: str) -> None:
    """Steps whose checkpoint was never committed will be done again, so their rows go."""
    journal.begin_generation(run_dir)
    write_rows(run_dir, 4, 8, 12, 16)
    save(run_dir, 8)
    journal.begin_generation(run_dir)
    assert seen_rows(run_dir) == [4, 8]
    assert events(run_dir, "group")[-1]["redone_steps"] == 2
    write_rows(run_dir, 12)
    assert seen_rows(run_dir) == [4, 8, 12]


@pytest.mark.parametrize("checkpointed", [4, 8])
def test_a_torn_last_row_is_cut_off(tmp_path: Path, checkpointed: int) -> None:
    """A crash amid a row does not stop the next start, and the next row does not join the torn one."""
    run_dir = str(tmp_path)
    write_rows(run_dir, 4, 8)
    save(run_dir, checkpointed)
    with (tmp_path / "metrics" / books.live(1)).open("a") as torn:
        torn.write('{"samples_seen": 12, "lo')
    assert seen_rows(run_dir) == [4, 8]
    journal.begin_generation(run_dir)
    write_rows(run_dir, 12)
    assert seen_rows(run_dir) == [*range(4, checkpointed + 1, 4), 12]


def test_a_damaged_row_in_the_middle_is_named(tmp_path: Path) -> None:
    """What no crash explains is no silent gap: the file and the line are named."""
    (tmp_path / "metrics.jsonl").write_text('{"samples_seen": 4}\n{"samp\n{"samples_seen": 12}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is damaged"):
        books.read_rows(str(tmp_path))


def test_a_torn_event_costs_itself_alone(tmp_path: Path) -> None:
    """A crash amid a line; the next process writes files of its own."""
    journal.event(str(tmp_path), "launch")
    (segment,) = (tmp_path / "events").iterdir()
    with segment.open("a") as torn:
        torn.write('{"event": "work')
    events_of_another_process(str(tmp_path), "worker")
    assert [e["event"] for e in books.read_events(str(tmp_path))] == ["launch", "worker"]


def events_of_another_process(run_dir: str, *kinds: str) -> None:
    def tell() -> None:
        for kind in kinds:
            journal.event(run_dir, kind)

    assert in_child(tell) == 0


def test_failures_in_place_count_only_without_progress(run_dir: str) -> None:
    """They rise while groups fail at the same place; a new checkpoint or a person's restart begins anew."""

    def starts(count: int) -> list[int]:
        found = []
        for _ in range(count):
            found.append(journal.begin_generation(run_dir).failures_in_place)
            control.note(run_dir, control.current(run_dir).number, failure="bug")
        return found

    assert starts(3) == [0, 1, 2]
    save(run_dir, 4)
    assert starts(3) == [0, 1, 2]
    journal.take_over(run_dir)
    assert starts(2) == [0, 1]


def test_a_failure_counts_whatever_else_is_told(run_dir: str) -> None:
    """Hundreds of events after a failure do not hide it, nor do events that were lost or made up."""
    number = journal.begin_generation(run_dir).number
    control.note(run_dir, number, failure="bug")
    for position in range(200):
        journal.event(
            run_dir, "quarantine", generation=number, case="case", reason="torn", detail="x" * 300, p=position
        )
    assert journal.begin_generation(run_dir).failures_in_place == 1
    for name in storage.list_files(storage.join(run_dir, "events")):
        storage.delete(storage.join(run_dir, "events", name))
    journal.event(run_dir, "failure", generation=number + 1, error="made up")
    assert journal.begin_generation(run_dir).failures_in_place == 1


def test_a_removed_generation_takes_no_number_twice(run_dir: str) -> None:
    """A person may remove a damaged generation.json: what an old group noted down is not taken for the new one's."""
    for _ in range(3):
        number = journal.begin_generation(run_dir).number
        control.note(run_dir, number, trains=True, stopped="too many bad cases", failure="bug")
        journal.take_over(run_dir)  # a person starts a run that had stopped again
    save(run_dir, 8)
    storage.delete(storage.join(run_dir, "generation.json"))
    journal.take_over(run_dir, "me")
    begun = journal.begin_generation(run_dir, "me")
    assert (begun.number, begun.samples_seen, begun.failures_in_place) == (4, 8, 0)
    assert control.status(run_dir, begun.number) == control.GroupStatus()


def test_a_group_that_stopped_is_not_started_again_by_itself(run_dir: str) -> None:
    """Whatever came after its reason to stop, the controller gives up with that; a person may start the run again."""
    control.note(run_dir, journal.begin_generation(run_dir).number, stopped="too many bad cases", failure="flush")
    with pytest.raises(RunFailed, match="too many bad cases"):
        journal.begin_generation(run_dir)
    journal.take_over(run_dir)
    assert journal.begin_generation(run_dir).failures_in_place == 0


def test_writers_of_a_status_keep_each_others_fields(run_dir: str) -> None:
    """The controller's failure and rank 0's notes meet in one document; a damaged one is named."""
    with ThreadPoolExecutor(4) as pool:
        changes: list[dict[str, Any]] = [{"trains": True}, {"failure": "bug"}, {"committed": True}, {"answered": 3.5}]
        list(pool.map(lambda change: control.note(run_dir, 7, **change), changes))
    expected = control.GroupStatus(trains=True, committed=True, answered=3.5, failure="bug")
    assert control.status(run_dir, 7) == expected and control.status(run_dir, 8) == control.GroupStatus()
    storage.write_bytes(storage.join(run_dir, "groups", "0007.json"), b"{")
    with pytest.raises(RunFailed, match=r"groups/0007\.json is damaged .* remove it"):
        control.status(run_dir, 7)


def test_recent_reads_the_end_of_long_books(run_dir: str) -> None:
    """The last rows whole, however long the book; nothing when there is none."""
    assert books.recent(run_dir) == ([], [])
    journal.begin_generation(run_dir)
    write_rows(run_dir, *range(4, 20004, 4))
    rows, events = books.recent(run_dir)
    assert [row["samples_seen"] for row in rows[-2:]] == [19996, 20000] and 200 < len(rows) < 5000
    assert [event["event"] for event in events] == ["group"]


def test_a_late_commit_of_a_replaced_group_does_not_count(run_dir: str) -> None:
    """A save that passed its fence just before a new group began leaves no gap in the rows."""
    journal.begin_generation(run_dir)
    write_rows(run_dir, 4, 8, 12, 16)
    save(run_dir, 8)
    journal.begin_generation(run_dir)  # from 8; rows 12 and 16 go
    write_rows(run_dir, 12)
    late = save(run_dir, 16, generation=1)
    third = journal.begin_generation(run_dir)
    assert third.samples_seen == 8 and seen_rows(run_dir) == [4, 8]
    assert late not in {name for name, _, _ in checkpoint.committed(run_dir)}


def test_a_start_cut_off_before_its_decision_loses_nothing(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that dies between raising the fence and deciding leaves the newest checkpoint in force."""
    journal.begin_generation(run_dir)
    write_rows(run_dir, 4, 8)
    name = save(run_dir, 8)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "committed", lambda _: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            journal.begin_generation(run_dir)
    after = journal.begin_generation(run_dir)
    assert (after.number, after.samples_seen, after.checkpoint) == (3, 8, name)
    assert seen_rows(run_dir) == [4, 8]


def test_a_run_without_a_valid_checkpoint_stops_and_keeps_everything(run_dir: str) -> None:
    """Starting over would erase the books of a run that can still be restored."""
    journal.begin_generation(run_dir)
    write_rows(run_dir, 4)
    name = save(run_dir, 4)
    storage.write_bytes(storage.join(run_dir, "checkpoints", name, "state.json"), b"{}")
    with pytest.raises(RunFailed, match=r"state\.json differs.*restore"):
        journal.begin_generation(run_dir)
    assert seen_rows(run_dir) == [4]
    assert storage.exists(storage.join(run_dir, "checkpoints", name, "tensors.safetensors"))


def test_lost_checkpoints_are_missed_also_in_the_first_group(run_dir: str) -> None:
    """A run that never restarted and whose checkpoints were removed does not begin anew over its own books."""
    first = journal.begin_generation(run_dir)
    write_rows(run_dir, 4, 8)
    name = save(run_dir, 8)
    control.note(run_dir, first.number, committed=True)
    checkpoint.discard(run_dir, name)
    with pytest.raises(RunFailed, match="they are gone"):
        journal.begin_generation(run_dir)
    assert seen_rows(run_dir) == [4, 8]


@pytest.mark.parametrize("kept", [0, 20])
def test_books_shorter_than_the_checkpoint_says_are_refused(run_dir: str, kept: int) -> None:
    """Somebody has removed or cut a part: the run does not go on with a gap in it, and says so before it decides."""
    before = journal.begin_generation(run_dir)
    write_rows(run_dir, 4, 8)
    save(run_dir, 8)
    part = storage.join(run_dir, "metrics", "000000000004-000000000008-g0001.jsonl")
    content = storage.read_bytes(part)
    storage.write_bytes(part, content[:kept]) if kept else storage.delete(part)
    with pytest.raises(RunFailed, match=r"metrics.*restore it"):
        journal.begin_generation(run_dir)
    assert control.current(run_dir) == dataclasses.replace(before, fence=2)
    storage.write_bytes(part, content)
    assert journal.begin_generation(run_dir).samples_seen == 8


def test_resizes_are_no_failures(run_dir: str) -> None:
    """A group that is replaced without a failure, as in a resize, does not bring the run nearer to giving up."""
    assert [journal.begin_generation(run_dir).failures_in_place for _ in range(3)] == [0, 0, 0]


def test_a_replaced_group_cannot_commit(run_dir: str) -> None:
    """What is left of an older worker group cannot flush its rows, which comes before every commit."""
    log = MetricsLog(run_dir, journal.begin_generation(run_dir))
    journal.begin_generation(run_dir)
    for write in (log.flush, log.check):
        with pytest.raises(RuntimeError, match="worker group 1 was replaced"):
            write()


def test_on_a_disk_a_replaced_group_cannot_even_add_a_row(tmp_path: Path) -> None:
    """Local rows show at once, so there the fence stands before each of them."""
    log = MetricsLog(str(tmp_path), journal.begin_generation(str(tmp_path)))
    journal.begin_generation(str(tmp_path))
    with pytest.raises(RuntimeError, match="worker group 1 was replaced"):
        log.add({"samples_seen": 4})
    assert seen_rows(str(tmp_path)) == []


def test_a_damaged_checkpoint_is_discarded_with_an_event(run_dir: str) -> None:
    """The one below is used, the damage is on record, the rows are cut back to what is left."""
    write_rows(run_dir, 4, 8)
    good, bad = save(run_dir, 4), save(run_dir, 8)
    storage.write_bytes(storage.join(run_dir, "checkpoints", bad, "state.json"), b"{}")
    generation = journal.begin_generation(run_dir)
    assert (generation.samples_seen, generation.checkpoint) == (4, good)
    assert [(e["name"], e["why"]) for e in events(run_dir, "damaged_checkpoint")] == [
        (bad, "state.json differs from its checksum")
    ]
    assert not [path for path in storage.list_files(run_dir) if bad in path]
    assert seen_rows(run_dir) == [4]


def test_local_rows_can_be_read_at_once(tmp_path: Path) -> None:
    """A row shows when its step ends, not with the next checkpoint; a flush adds none twice."""
    log = MetricsLog(str(tmp_path), journal.begin_generation(str(tmp_path)))
    for count in (1, 2, 3):
        log.add({"samples_seen": 4 * count})
        assert seen_rows(str(tmp_path)) == [4, 8, 12][:count]
    log.flush()
    log.flush()
    assert seen_rows(str(tmp_path)) == [4, 8, 12]


def test_saving_and_pruning_work_anywhere(run_dir: str) -> None:
    """On S3 as on a disk: prune leaves the newest `keep` and nothing uncommitted."""
    made = [save(run_dir, seen) for seen in (4, 8, 12)]
    storage.write_bytes(storage.join(run_dir, "checkpoints", f"{16:012d}-g0001", "state.json"), b"{}")
    checkpoint.prune(run_dir, 2, 1)
    left = {path.split("/")[0] for path in storage.list_files(storage.join(run_dir, "checkpoints"))}
    assert left == set(made[1:])
    assert checkpoint.load(run_dir, made[2])[1]["samples_seen"] == 12


def _begun(run_dir: str) -> MetricsLog:
    """Group 1 with rows 4 and 8 and a checkpoint at 8."""
    log = MetricsLog(run_dir, journal.begin_generation(run_dir))
    for seen in (4, 8):
        log.add({"samples_seen": seen, "generation": 1})
    log.flush()
    save(run_dir, 8, 1)
    return log


def test_a_row_that_was_amid_its_fence_when_the_next_group_began_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank stopped between looking at the fence and writing its row: it lands beside the next group's rows."""
    run_dir = str(tmp_path)
    zombie, begun = _begun(run_dir), list[control.Generation]()
    check = zombie.check

    def check_then_sleep() -> None:
        check()
        monkeypatch.setattr(zombie, "check", check)
        begun.append(journal.begin_generation(run_dir))

    monkeypatch.setattr(zombie, "check", check_then_sleep)
    zombie.add({"samples_seen": 12, "generation": 1})
    assert list((tmp_path / "metrics").glob("live-g0001.jsonl"))  # nothing can keep it from being written
    assert seen_rows(run_dir) == [4, 8]
    log = MetricsLog(run_dir, begun[0])
    for seen in (12, 16):
        log.add({"samples_seen": seen, "generation": 2})
    log.flush()
    state = {"samples_seen": 16, "bad_in_epoch": 0}
    checkpoint.save(run_dir, 16, 2, {"a": torch.ones(3)}, state)
    with pytest.raises(RuntimeError, match="replaced"):
        zombie.flush()
    assert journal.begin_generation(run_dir).samples_seen == 16
    assert [(r["samples_seen"], r["generation"]) for r in books.read_rows(run_dir)] == [
        (4, 1),
        (8, 1),
        (12, 2),
        (16, 2),
    ]


def test_a_part_that_was_amid_its_fence_when_the_next_group_began_does_not_count(run_dir: str) -> None:
    """Nor does it later, when the next group has written a part of its own beside it, and was replaced too."""
    zombie = _begun(run_dir)
    zombie.add({"samples_seen": 12, "generation": 1})
    zombie.add({"samples_seen": 16, "generation": 1})
    zombie.check = lambda: None  # type: ignore[method-assign] # it has looked before the next group began
    log = MetricsLog(run_dir, journal.begin_generation(run_dir))
    zombie.flush()
    assert seen_rows(run_dir) == [4, 8]
    log.add({"samples_seen": 12, "generation": 2})
    log.flush()
    save(run_dir, 12, 2)
    assert generations(run_dir) == [(4, 1), (8, 1), (12, 2)]
    assert journal.begin_generation(run_dir).samples_seen == 12
    assert generations(run_dir) == [(4, 1), (8, 1), (12, 2)]
    assert [name for name in storage.list_files(f"{run_dir}/metrics") if name[:4] != "live"] == [
        "000000000000-000000000012-g0003.jsonl"
    ]


def generations(run_dir: str) -> list[tuple[int, int]]:
    return [(row["samples_seen"], row["generation"]) for row in books.read_rows(run_dir)]


def test_a_commit_amid_its_fence_and_a_controller_killed_after_its_decision(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of that checkpoint do not count any more, so it must not either: the run goes on from the one before."""
    zombie = _begun(run_dir)
    zombie.add({"samples_seen": 12, "generation": 1})
    zombie.flush()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    def fence() -> None:
        zombie.check()
        with monkeypatch.context() as broken:
            broken.setattr(rows, "settle", killed)
            with pytest.raises(KeyboardInterrupt):
                journal.begin_generation(run_dir)

    checkpoint.save(run_dir, 12, 1, {"a": torch.ones(3)}, {"bad_in_epoch": 0}, fence=fence)
    assert journal.begin_generation(run_dir).samples_seen == 8
    assert seen_rows(run_dir) == [4, 8]


@pytest.mark.parametrize("to", [100, 260, 504])
def test_small_parts_are_merged(run_dir: str, to: int) -> None:
    """A long run has few parts to list; a checkpoint amid a merged part can still be gone back to, again and again."""
    log = MetricsLog(run_dir, journal.begin_generation(run_dir))
    for seen in range(4, 508, 4):
        log.add({"samples_seen": seen, "generation": 1})
        log.flush(seen)
        log.merge()
    assert len(books.parts(run_dir)) == 63, "64 became one, and 62 came after it"
    for start in (to, to - 8):
        save(run_dir, start, 1)
        for name, seen, _ in checkpoint.committed(run_dir):
            if seen > start:
                checkpoint.discard(run_dir, name)
        begun = journal.begin_generation(run_dir)
        assert begun.samples_seen == start and seen_rows(run_dir) == [*range(4, start + 1, 4)]
        assert len(books.parts(run_dir)) == 1
    log = MetricsLog(run_dir, begun)
    log.add({"samples_seen": to - 4, "generation": 3})
    log.flush()
    assert seen_rows(run_dir) == [*range(4, to - 3, 4)]
    save(run_dir, to - 4, 3)
    assert journal.begin_generation(run_dir).samples_seen == to - 4
    assert generations(run_dir)[-2:] == [(to - 8, 1), (to - 4, 3)]


def test_a_reader_beside_a_merge_reads_again(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that was listed is gone when it is opened: the rows are in another one."""
    log = MetricsLog(run_dir, journal.begin_generation(run_dir))
    for seen in range(4, 268, 4):
        log.add({"samples_seen": seen, "generation": 1})
        log.flush(seen)
    listed, merged = books.parts, [log.merge]
    monkeypatch.setattr(
        books, "parts", lambda run_dir: (listed(run_dir), [merge() for merge in merged], merged.clear())[0]
    )
    assert seen_rows(run_dir) == [*range(4, 268, 4)] and len(listed(run_dir)) == 1


def test_a_part_ends_where_its_checkpoint_does(run_dir: str) -> None:
    """Steps that are applied while a checkpoint is written belong to the next one."""
    log = MetricsLog(run_dir, journal.begin_generation(run_dir))
    for seen in (4, 8, 12):
        log.add({"samples_seen": seen, "generation": 1})
    log.flush(8)
    save(run_dir, 8, 1)
    assert seen_rows(run_dir) == ([4, 8] if storage.is_s3(run_dir) else [4, 8, 12])
    journal.begin_generation(run_dir)
    assert seen_rows(run_dir) == [4, 8]
    assert events(run_dir, "group")[-1]["redone_steps"] == (0 if storage.is_s3(run_dir) else 1)


def test_events_of_many_processes_stand_in_order(run_dir: str) -> None:
    """By time; what a group tells stays between its begin and the next group's, though a clock is minutes off."""
    begun = journal.begin_generation(run_dir).number
    for number, off in ((begun, 100.0), (begun, -100.0), (begun + 1, -100.0)):
        if number > begun:
            journal.begin_generation(run_dir)

        def tell(number: int = number, off: float = off) -> None:
            for kind in ("first", "second"):
                journal.event(run_dir, kind, generation=number, time=time.time() + off)

        assert in_child(tell) == 0
    found = [(e["event"], e["generation"]) for e in books.read_events(run_dir)]
    assert found == [("group", 1), *2 * [("first", 1), ("second", 1)], ("group", 2), ("first", 2), ("second", 2)]
    assert books.recent(run_dir)[1] == books.read_events(run_dir)


def test_what_a_killed_controller_left_beside_the_books_is_removed(tmp_path: Path) -> None:
    for name in (".generation.json.0123abcd.tmp", "metrics/.x.jsonl.0123abcd.tmp", ".save-request.json.01.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("torn")
    journal.begin_generation(str(tmp_path))
    assert [path.name for path in tmp_path.rglob(".*.tmp")] == [".save-request.json.01.tmp"]  # that writer may be alive
