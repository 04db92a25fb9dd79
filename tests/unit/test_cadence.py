"""When a run saves and validates: by the clock or by samples, and once for each occasion."""

from typing import Any

import pytest

from raytrain_brats.config import Config, parse
from raytrain_brats.data.sampler import Sampler
from raytrain_brats.run.cadence import CHECKPOINT, VALIDATE, Cadence

SAMPLER = Sampler(0, 10, 4, 4, 10)  # 40 samples an epoch


def config(**sections: Any) -> Config:
    network = {"name": "segresnet", "init_filters": 8, "blocks_down": [1], "blocks_up": []}
    return parse({"network": network, **sections}, "test")


class Run:
    """Steps on a clock of its own, `step_s` each; a validation takes `validation_s`."""

    def __init__(
        self, made: Config, step_s: float, validation_s: float, done: tuple[int, ...] = (), seen: int = 0
    ) -> None:
        self.now, self.step_s, self.validation_s = 1000.0, step_s, validation_s
        self.cadence = Cadence(made, SAMPLER, True, done, lambda: self.now)
        self.seen = seen
        self.saved, self.validated, self.left_out = list[int](), list[int](), list[int]()

    def steps(self, until: int = SAMPLER.total) -> "Run":
        while self.seen < until:
            before, self.seen = self.seen, self.seen + 4
            asked = self.cadence.after(before, self.seen)
            if self.cadence.left_out(before, self.seen):
                self.left_out.append(self.seen)
            self.now += self.step_s
            if asked & CHECKPOINT:
                self.saved.append(self.seen)
                self.cadence.saved()
            if asked & VALIDATE:
                self.validate()
        return self

    def validate(self) -> None:
        self.now += self.validation_s
        self.validated.append(self.seen)
        self.cadence.validated(self.seen, self.validation_s)


def test_by_default_a_minute_lies_between_checkpoints() -> None:
    """However long a step takes, and however many samples it holds; a group's first comes after ten seconds."""
    run = Run(config(), 7.0, 0.0).steps(200)
    assert run.saved == [12, 52, 92, 132, 172]  # the step that begins after 14 s; then the tenth, after 63 s
    assert Run(config(), 0.1, 0.0).steps(200).saved == []
    assert Run(config(), 100.0, 0.0).steps(40).saved == [8, 16, 24, 32, 40]
    assert Run(config(checkpoint={"every_s": 8}), 4.0, 0.0).steps(40).saved == [12, 24, 36]


def test_by_samples_it_does_not_depend_on_the_clock() -> None:
    """Settings of tests and campaigns: the same steps in each run."""
    made = config(checkpoint={"every_samples": 12}, validate={"every_samples": 24})
    for step_s in (0.001, 1000.0):
        run = Run(made, step_s, 1000.0).steps(80)
        assert run.saved == [12, 24, 36, 48, 60, 72] and run.validated == [24, 48, 72] and not run.left_out


def test_one_validation_an_epoch() -> None:
    """And one at the end, which is no epoch's when the run's last steps fill up."""
    run = Run(config(), 1.0, 0.1).steps()
    epochs = [*range(40, SAMPLER.total - 39, 40)]  # the last epoch's is the end's, three steps later
    assert run.validated == sorted({*epochs, SAMPLER.total}) and not run.left_out


@pytest.mark.parametrize("validation_s", [0.5, 2.0, 10.0, 1000.0])
def test_validation_takes_a_twentieth_of_the_time_at_most(validation_s: float) -> None:
    """Epochs that are left out are told; the end is scored whatever it costs."""
    run = Run(config(), 1.0, validation_s).steps(SAMPLER.total - 4)
    first = run.validated[0]
    assert first == 40 and set(run.validated) | set(run.left_out) == {*range(40, SAMPLER.total - 39, 40)}
    between = [(b - a) / 4 for a, b in zip(run.validated, run.validated[1:], strict=False)]
    assert all(seconds >= 19 * validation_s for seconds in between)
    run.steps()
    assert run.validated[-1] == SAMPLER.total


def test_a_resume_neither_loses_nor_repeats_a_validation() -> None:
    """Due where the group starts: done there unless its table is there; the time limit goes on too."""
    for done, expected in (((), True), ((40,), False)):
        run = Run(config(), 1.0, 2.0, done, seen=40)
        assert run.cadence.validates(36, 40) is expected
    assert not Run(config(), 1.0, 2.0, seen=44).cadence.validates(40, 44)
    assert not Run(config(), 1.0, 2.0).cadence.validates(-4, 0)
    end = SAMPLER.total
    assert Run(config(), 1.0, 2.0, seen=end).cadence.validates(end - 4, end)
    before = Run(config(), 1.0, 10.0).steps(44)
    after = Run(config(), 1.0, 10.0, (40,), seen=44)
    after.cadence.resume(before.cadence.validation_wait_s)
    after.steps(400)
    straight = Run(config(), 1.0, 10.0).steps(400)
    assert before.validated + after.validated == straight.validated


def test_the_reasons_are_told() -> None:
    """In the words of the settings."""
    run = Run(config(), 1.0, 0.1).steps(40)
    assert run.cadence.reason == "an epoch" and run.cadence.saved() == "every 60 s"
    run.steps()
    assert run.cadence.reason == "the end"
    made = config(checkpoint={"every_samples": 12}, validate={"every_samples": 24})
    run = Run(made, 1.0, 0.1).steps(24)
    assert run.cadence.reason == "every 24 samples" and run.cadence.saved() == "every 12 samples"


def test_without_held_out_cases_nothing_is_validated() -> None:
    """Nor is anything left out."""
    cadence = Cadence(config(), SAMPLER, False, ())
    assert not cadence.validates(36, 40) and not cadence.left_out(36, 40)
    assert not cadence.validates(SAMPLER.total - 4, SAMPLER.total)
