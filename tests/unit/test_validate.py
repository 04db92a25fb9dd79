"""Held-out cases while a run trains: the same scores wherever they are computed, each validation once, none unsaid."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raytrain_brats import books
from raytrain_brats.cases.scan import open_manifest
from raytrain_brats.config import parse
from raytrain_brats.data.preprocess import Prepared, preprocess
from raytrain_brats.data.store import Source
from raytrain_brats.labels import region_table
from raytrain_brats.learn.step import StepResult
from raytrain_brats.run import checkpoint, events, journal, scorer
from raytrain_brats.run.cadence import CHECKPOINT, SCORED
from raytrain_brats.run.phase_timer import PhaseTimer
from raytrain_brats.run.predictor import Score, predict_masks, score
from raytrain_brats.run.rank import Rank
from raytrain_brats.run.recorder import RunRecorder
from raytrain_brats.run.scorer import Predicted, Scorer
from raytrain_brats.run.spec import RunSpec
from raytrain_brats.run.validate import Validation, predicted
from raytrain_brats.run.worker import train_step_of
from tests.support.cases import LPS, make_affine, make_volume, write_msd_folder
from tests.support.steps import CPU, NETWORKS, arrived, spec

GOOD = StepResult(0.5, 0, True, False, 17, 0, 0.1, (0.01,))


class Intensities(torch.nn.Module):
    """A network that answers with its input: regions that are not nested, over the whole brain."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image[:, :3]


CONFIG = parse({"network": NETWORKS["segresnet"], "data": {"patch_xyz": [8, 8, 8]}}, "test")
STEP: Any = SimpleNamespace(
    averaged=Intensities(), config=CONFIG, device=CPU, table=torch.from_numpy(region_table("msd"))
)
KINDS = {
    "plain": (np.eye(4), {}),
    "turned": (make_affine((1, 1, 1), (2, 0, 1), (-1, 1, -1)), {}),
    "resampled": (make_affine((2, 1, 1.5)), {}),
    "no ET": (LPS, {"empty_et": True}),
    "label beyond the brain": (LPS, {}),
}


def prepared_case(kind: str) -> Prepared:
    affine, options = KINDS[kind]
    volume = make_volume(affine, **options)
    if kind == "label beyond the brain":
        assert volume.label_xyz is not None
        volume.label_xyz[:2, :2, :2] = 3
    return preprocess(volume, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_masks_on_the_native_grid(kind: str) -> None:
    """Bit for bit, though Dice is counted where the network's answer lies; after resampling it is not."""
    case = prepared_case(kind)
    assert (case.native_label_xyz is not None) == (kind in ("resampled", "label beyond the brain"))
    found = predicted("case", case, STEP, "msd")
    expected = score("case", predict_masks(case, STEP.averaged, CONFIG, CPU), case, "msd")
    assert found.scored() == expected
    assert found.dice == (None if kind == "resampled" else expected.dice)
    assert 0 < expected.dice["WT"] < 1 and expected.hd95_mm["WT"] > 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_scores_beside_the_training_and_may_be_killed() -> None:
    """The same scores; a case whose process was killed is scored all the same."""
    case = predicted("case", prepared_case("plain"), STEP, "msd")
    beside = Scorer(aside=True)
    assert beside.submit(case).result(60) == case.scored()
    assert beside._process
    first = beside._process.pid
    os.kill(first, signal.SIGKILL)
    assert beside.submit(case).result(60) == case.scored()
    assert beside._process is None and not alive(first)
    beside.close()


def test_a_process_that_is_stuck_is_ended_and_the_case_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, it answers nothing for ever: checkpoints by time would wait for it."""
    case = predicted("case", prepared_case("plain"), STEP, "msd")
    beside = Scorer(aside=True)
    assert beside.submit(case).result(60) == case.scored()
    assert beside._process
    os.kill(beside._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(scorer, "STUCK_S", 0.2)
    assert beside.submit(case).result(60) == case.scored()
    assert beside._process is None
    beside.close()


def test_the_process_ends_with_its_worker() -> None:
    """However that ends: nobody else would end it."""

    def work(told: Any) -> None:
        told.send(scorer._start().pid)
        time.sleep(600)

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    worker = fork.Process(target=work, args=(theirs,))
    worker.start()
    pid = ours.recv()
    assert alive(pid)
    worker.kill()
    worker.join()
    until = time.monotonic() + 60
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)


class Held:
    """In place of `Scorer`: scores only when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Predicted, Future[Score]]] = []

    def submit(self, case: Predicted) -> "Future[Score]":
        self.waiting.append((case, Future()))
        return self.waiting[-1][1]

    def release(self) -> None:
        for case, future in self.waiting:
            future.set_result(case.scored())
        self.waiting = []

    def close(self) -> None:
        pass


@pytest.fixture
def held(tmp_path: Path) -> Any:
    """(recorder, its `Held`, the training step) of a run with two held-out cases whose scores take their time."""
    manifest = open_manifest(str(write_msd_folder(tmp_path / "msd", 2)))
    run_spec = spec()
    settings = run_spec.config.model_dump(by_alias=True) | {"checkpoint": {"every_s": 1e-9}}
    settings |= {"validate": {"overlap": 0, "every_samples": 4}}
    config = parse(settings, "test")
    run_spec = dataclasses.replace(run_spec, run_dir=str(tmp_path / "run"), dataset_identity="x", config=config)
    source = Source(manifest.root, manifest.convention, 1.0)
    run_spec = dataclasses.replace(run_spec, held_out_cases=manifest.cases, source=source)
    scores = Held()
    return group(run_spec, scores), scores, train_step_of(run_spec, 1, CPU)


def group(run_spec: RunSpec, scores: Held) -> RunRecorder:
    """A worker group of one rank that goes on where the run stands."""
    recorder = RunRecorder(run_spec, journal.begin_generation(run_spec.run_dir), Rank(0, 1, CPU), PhaseTimer())
    recorder._validation = Validation(run_spec, recorder.rank, recorder.timer.enter, aside=True)
    recorder._validation._scorer = scores  # type: ignore[assignment]
    return recorder


def step(recorder: RunRecorder, before: int) -> int:
    """A step that is done as asked; what is due after it and the ones before."""
    result = dataclasses.replace(GOOD, asked=recorder.poll(before))
    return recorder.step(before, before + 4, arrived(result), [])


def told(recorder: RunRecorder) -> list[str]:
    events.flush(recorder.spec.run_dir)
    found = books.read_events(recorder.spec.run_dir)
    kinds = [(e["event"], e.get("samples_seen")) for e in found if e["event"] in ("validation", "checkpoint")]
    return [f"{kind} {seen}" for kind, seen in kinds]


def test_training_goes_on_while_cases_are_scored(held: Any) -> None:
    """Scores arrive with the step by which all ranks say they have them; a checkpoint by time waits for that."""
    recorder, scores, train_step = held
    with recorder:
        step(recorder, 0)
        recorder.validate(4, train_step)
        assert len(scores.waiting) == 2 and told(recorder) == []
        assert not any(step(recorder, before) & CHECKPOINT for before in (4, 8))
        scores.release()
        assert recorder.poll(12) & SCORED
        step(recorder, 12)
        step(recorder, 16)  # its numbers, and with them the ones before
        assert told(recorder) == ["validation 4"]
        assert (Path(recorder.spec.run_dir) / "validation").exists()
        assert step(recorder, 20) & CHECKPOINT or step(recorder, 24) & CHECKPOINT
    assert told(recorder) == ["validation 4"]


def test_a_group_that_is_killed_before_the_scores_are_there_validates_again(held: Any) -> None:
    """The next one does, once; the one after it does not."""
    recorder, scores, train_step = held
    with contextlib.suppress(KeyboardInterrupt), recorder:
        step(recorder, 0)
        recorder.checkpoint(4, train_step)
        recorder._saver.wait()
        recorder.validate(4, train_step)
        raise KeyboardInterrupt
    scores.waiting = []
    with group(recorder.spec, scores) as again:
        assert again.generation.samples_seen == 4 and again.ready()
        again.validate(4, train_step)
        scores.release()
        again.gather_scores()
    assert not group(recorder.spec, scores).ready()
    assert told(recorder) == ["checkpoint 4", "validation 4"]


def test_what_goes_past_a_validation_that_is_not_written(held: Any) -> None:
    """A save by time waits for the scores: a group that goes on from it does not validate there again. One that
    somebody asked for does not wait, as who asks gives up after seconds; the table follows."""
    recorder, scores, train_step = held
    submit = scores.submit

    def soon(case: Predicted) -> "Future[Score]":
        future = submit(case)
        scores.release()
        return future

    with recorder:
        step(recorder, 0)
        recorder.checkpoint(4, train_step)
        recorder._saver.wait()
        recorder.validate(4, train_step)
        step(recorder, 4)
        recorder.timer.enter("data")
        recorder.timer.enter("save")
        threading.Timer(0.6, scores.release).start()
        recorder.checkpoint(8, train_step, 1)
        recorder._saver.wait()
        scores.submit = soon
        step(recorder, 8)
        recorder.validate(12, train_step)
        recorder.gather_scores()
        recorder.gather_scores()
    assert told(recorder) == ["checkpoint 4", "checkpoint 8", "validation 4", "validation 12"]
    closed = [e for e in books.read_events(recorder.spec.run_dir) if e["event"] == "closed"]
    assert closed[0]["spent"]["validation_s"] >= 0.25  # the wait for scores is no saving
    names = sorted(path.name for path in (Path(recorder.spec.run_dir) / "validation").iterdir())
    assert len(names) == 2
    assert checkpoint.newest_valid(recorder.spec.run_dir)[0].samples_seen == 8
