"""A run that goes on longer than it was to, ends sooner, keeps its best checkpoint, or begins with another's weights.

Real networks, trained in this process on tiny cases; only the worker group around them is missing.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain_brats import books, config, ending, verify
from raytrain_brats import train as train_command
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.ray_ext import cluster
from raytrain_brats.run import checkpoint, driver, gains, initial, journal, lease, members, predictor, spec
from raytrain_brats.run.gains import Scored
from raytrain_brats.run.run_dir import RunDir
from raytrain_brats.run.worker import train_step_of
from tests.support.cases import write_msd_folder
from tests.support.here import CPU, begin, run_spec, train
from tests.support.run_folders import checkpoints, validation


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_msd_folder(tmp_path_factory.mktemp("continue") / "data", 6, shape=(12, 12, 12))


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_each_validation_is_of_a_checkpoint_and_the_best_is_kept(data: Path, tmp_path: Path) -> None:
    """A whole run: at every table's sample stood a checkpoint; at the end the best one and the newest two are there."""
    made = run_spec(tmp_path / "run", data, train={"epochs": 6})
    train(made)
    validations = gains.history(made.run_dir)
    saved = {e["samples_seen"] for e in books.read_events(made.run_dir) if e["event"] == "checkpoint"}
    assert len(validations) > 4 and {each.samples_seen for each in validations} <= saved
    best = gains.best(validations)
    assert best and checkpoints(tmp_path / "run") == sorted({best.samples_seen, *sorted(saved)[-2:]})
    name, weights = predictor.newest_weights(made.run_dir, best=True)
    assert int(name.split("-")[0]) == best.samples_seen
    assert members.opened([made.run_dir], best=True)[0].checkpoint == name
    step = train_step_of(made, 1, CPU)
    step.averaged.load_state_dict(weights)


def test_a_group_killed_after_a_validation_saves_it_again(data: Path, tmp_path: Path) -> None:
    """Its table is there, its checkpoint is not: the next group saves at that sample, and does not validate twice."""
    made = run_spec(tmp_path / "run", data, train={"epochs": 4})
    train(made, stop=20)
    assert checkpoints(tmp_path / "run") == [8, 16]
    checkpoint.discard(made.run_dir, checkpoint.committed(made.run_dir)[1][0])
    train(made, stop=28)
    events = books.read_events(made.run_dir)
    assert checkpoints(tmp_path / "run") == [8, 16, 24]
    assert [e["samples_seen"] for e in events if e["event"] == "validation"] == [8, 16, 24]


@pytest.mark.parametrize("every", [{"every_samples": 4}, {"every_s": 0.001}], ids=["samples", "time"])
def test_what_an_earlier_group_validated_waits_for_the_save_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: dict[str, Any]
) -> None:
    """Its steps are done again while the storage is slow: that checkpoint may be the best, and is saved."""
    settings: dict[str, Any] = {"train": {"epochs": 4}, "checkpoint": {"every_samples": None, "keep": 9} | every}
    made = run_spec(tmp_path / "run", data, **settings)
    train(made, stop=20)
    assert {8, 16} <= set(checkpoints(tmp_path / "run"))
    for name, seen, _ in checkpoint.committed(made.run_dir):
        if seen > 8:
            checkpoint.discard(made.run_dir, name)
    real, slow = checkpoint.save, list[int]()

    def save(run_dir: str, seen: int, *rest: Any, **more: Any) -> checkpoint.Checkpoint:
        if seen == 12:
            slow.append(seen)
            time.sleep(0.7)
        return real(run_dir, seen, *rest, **more)

    monkeypatch.setattr(checkpoint, "save", save)
    train(made, stop=24)
    assert slow and 16 in checkpoints(tmp_path / "run")
    again = [e for e in books.read_events(made.run_dir) if e["event"] == "checkpoint" and e["generation"] == 2]
    assert {e["samples_seen"]: e["reason"] for e in again}[16] == "a validation"


def patient(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """The mean Dice of each validation of a run."""
    real = gains.history

    def history(run_dir: str) -> list[Scored]:
        return [
            dataclasses.replace(each, dice=tuple((r, value) for r, _ in each.dice))
            for each, value in zip(real(run_dir), values, strict=False)
        ]

    monkeypatch.setattr(gains, "history", history)


def test_a_run_without_gain_ends_and_stays_ended(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `validate.patience_samples` without more Dice, with a checkpoint; a new start says why there is nothing to
    do, and more patience goes on."""
    patient(monkeypatch, 0.5, 0.6, 0.6, 0.55, 0.5, 0.5, 0.5, 0.5)
    settings: dict[str, Any] = {"train": {"epochs": 12}, "validate": {"every_samples": 8, "patience_samples": 16}}
    made = run_spec(tmp_path / "run", data, **settings)
    train(made)
    found, _ = checkpoint.newest_valid(made.run_dir)
    assert found and 32 < found.samples_seen < made.sampler.total
    (told,) = [e for e in books.read_events(made.run_dir) if e["event"] == "early_stop"]
    assert told["samples_seen"] == found.samples_seen
    assert "0.6000 at sample 16, and not more in the 16 samples after it" in told["reason"]
    assert driver.end_of(made, found.samples_seen) == told["reason"]
    more = run_spec(
        tmp_path / "run", data, train={"epochs": 12}, validate={"every_samples": 8, "patience_samples": 400}
    )
    assert driver.end_of(more, found.samples_seen) == ""
    train(more)
    rows = books.read_rows(made.run_dir)
    assert rows[-1]["samples_seen"] == made.sampler.total
    assert [row["positions"][0] for row in rows] == list(range(0, made.sampler.total, 4))


def test_a_killed_group_cannot_make_a_run_go_on_that_was_to_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies before the checkpoint of the end: the next one comes to the same end."""
    patient(monkeypatch, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)
    settings: dict[str, Any] = {"train": {"epochs": 12}, "validate": {"every_samples": 8, "patience_samples": 16}}
    made = run_spec(tmp_path / "run", data, **settings)
    train(made, stop=24)
    assert not [e for e in books.read_events(made.run_dir) if e["event"] == "early_stop"]
    train(made)
    found, _ = checkpoint.newest_valid(made.run_dir)
    assert found and driver.end_of(made, found.samples_seen) and found.samples_seen < 40


def longer(made: spec.RunSpec, data: Path, epochs: int) -> spec.RunSpec:
    return run_spec(Path(made.run_dir), data, train={"epochs": epochs})


@pytest.mark.parametrize("stop", [0, 12], ids=["finished", "amid it"])
def test_a_lengthened_run_is_proved_from_its_first_sample(
    data: Path, tmp_path: Path, stop: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lengthened twice: `verify` finds each position once, in order, with the seed's own samples; the learning rate is
    that of the longer run from there on; config.yaml has it all, so a plain resume changes nothing."""
    made = run_spec(tmp_path / "run", data)
    train(made, stop)
    at = checkpoint.newest_valid(made.run_dir)[0]
    more = longer(made, data, 3)
    assert (more.shorter, more.sampler.earlier) == (2, (2,))
    told = driver.longer(more)
    assert told["epochs"] == [2, 3] and told["samples_seen"] == at.samples_seen
    assert told["learning_rate"][1] > told["learning_rate"][0] and told["total_samples"][0] == made.sampler.total
    train(more, stop=made.sampler.total + 4)
    again = longer(made, data, 3)
    assert (again.shorter, again.sampler) == (0, more.sampler), "the same command goes on"
    last = longer(made, data, 4)
    assert last.sampler.earlier == (2, 3)
    train(last)
    rows = books.read_rows(made.run_dir)
    assert [row["positions"] for row in rows] == [[p, p + 4] for p in range(0, last.sampler.total, 4)]
    assert verify.main(["--run-dir", made.run_dir]) == 0
    assert f"{last.sampler.total} of {last.sampler.total} positions applied" in capsys.readouterr().out
    changed = Path(made.run_dir, "config.yaml")
    changed.write_text(changed.read_text().replace("earlier_epochs:\n- 2\n- 3\n", ""))
    assert verify.main(["--run-dir", made.run_dir]) == 1, "as one run of four epochs it would be another list"


def test_fewer_epochs_and_other_changes_are_refused(data: Path, tmp_path: Path) -> None:
    """A run's end is part of its order once it is there; more epochs excuse no other change."""
    made = run_spec(tmp_path / "run", data)
    begin(made)
    with pytest.raises(UserError, match=r"train.epochs: 2 -> 1.*epochs may become more, never less"):
        longer(made, data, 1)
    with pytest.raises(UserError, match=r"\(train.seed: 0 -> 5\)"):
        run_spec(tmp_path / "run", data, train={"epochs": 3, "seed": 5})


def test_a_driver_goes_by_what_the_run_is_once_it_holds_the_lease(data: Path, tmp_path: Path) -> None:
    """It had read the run's config before; another driver lengthened the run meanwhile: this start changes nothing, or
    goes on from there; a run that is other by now is refused."""
    made = run_spec(tmp_path / "run", data)
    early = run_spec(tmp_path / "run", data, train={"epochs": 3})
    assert (early.shorter, early.sampler.earlier) == (0, ()), "nobody has begun it"
    begin(made)
    late = spec.as_begun(early)
    assert (late.shorter, late.sampler.earlier) == (2, (2,)) and late.sampler.total > made.sampler.total
    begin(late)
    with pytest.raises(UserError, match="epochs may become more, never less"):
        spec.as_begun(made)
    assert spec.as_begun(late).shorter == 0 and spec.as_begun(late).sampler == late.sampler


def test_train_asks_again_under_the_lease(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it waited another driver began the run, for fewer epochs: this start lengthens it, and says so."""
    other = run_spec(tmp_path / "recipe", data)
    spec.write_config(other)

    @contextlib.contextmanager
    def waits(run_dir: str) -> Iterator[Any]:
        begin(dataclasses.replace(other, run_dir=run_dir))
        yield None

    def no_ray(**_: Any) -> None:
        raise UserError("so far")

    monkeypatch.setattr(lease, "hold", waits)
    monkeypatch.setattr(cluster, "connect", no_ray)
    where = ["--data", str(data), "--run-dir", str(tmp_path / "run"), "--recipe", RunDir(other.run_dir).config]
    assert train_command.main([*where, "--set", "train.epochs=3"]) == 2
    said = capsys.readouterr()
    assert said.err.endswith("error: so far\n") and "longer: 2 -> 3 epochs" in said.out


def test_a_runs_own_config_is_a_recipe(data: Path, tmp_path: Path) -> None:
    """The same settings, so the same run; changes apply on top."""
    made = run_spec(tmp_path / "run", data)
    spec.write_config(made)
    where = RunDir(made.run_dir).config
    assert config.load(where) == made.config
    assert config.load(where, ("train.epochs=9",)).train.epochs == 9
    with pytest.raises(UserError, match=r"recipe file .* does not exist"):
        config.load(str(tmp_path / "no.yaml"))


def begun_with(made: spec.RunSpec, given: Any) -> tuple[spec.RunSpec, list[str]]:
    initial.check(made, str(given))
    begun, lines = initial.begin(made, str(given))
    spec.write_config(begun)
    return begun, lines


def test_a_run_begins_with_anothers_weights(data: Path, tmp_path: Path) -> None:
    """Those with which that run predicts (its running mean), bit for bit; a copy, so that neither its end nor further
    training of that run changes anything; then it trains as any run."""
    source = run_spec(tmp_path / "source", data)
    train(source)
    made, lines = begun_with(run_spec(tmp_path / "run", data, train={"seed": 7}), source.run_dir)
    name, weights = predictor.newest_weights(source.run_dir)
    assert lines == [f"begins with the weights of {source.run_dir}, checkpoint {name}; all else is new"]
    for path in sorted((tmp_path / "source").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    step, untrained = train_step_of(made, 1, CPU), train_step_of(made, 1, CPU)
    assert made.initial
    step.begin_with(initial.load(made.run_dir, made.initial))
    for network in (step.network, step.averaged):
        assert all(torch.equal(t, weights[n]) for n, t in network.state_dict().items())
    first = next(iter(weights))
    assert not torch.equal(untrained.network.state_dict()[first], weights[first])
    again = run_spec(tmp_path / "run", data, train={"seed": 7})
    assert again.initial == made.initial
    train(again, stop=8)
    rows = books.read_rows(made.run_dir)
    assert rows and rows[0]["loss"] != pytest.approx(_first_loss(data, tmp_path / "plain"))


def _first_loss(data: Path, run: Path) -> float:
    train(run_spec(run, data, train={"seed": 7}), stop=8)
    return float(books.read_rows(str(run))[0]["loss"])


def test_heads_are_left_out_by_name_and_other_networks_are_refused(data: Path, tmp_path: Path) -> None:
    """Fewer or more heads: a line names them. Another width: refused with the settings that differ."""
    source = run_spec(tmp_path / "source", data)
    train(source, stop=12)
    plain = {"network": {"name": "dynunet", "filters": [4, 4, 4]}}
    _, lines = begun_with(run_spec(tmp_path / "fewer", data, **plain), source.run_dir)
    assert len(lines) == 2 and "no such heads: deep_supervision_heads.0." in lines[1]
    train(run_spec(tmp_path / "fewer", data, **plain), stop=16)
    _, lines = begun_with(run_spec(tmp_path / "more", data), tmp_path / "fewer")
    assert lines[1].startswith("begin at random, as that network had no such heads: deep_supervision_heads.0.")
    wide = {"network": {"name": "dynunet", "filters": [8, 4, 4], "heads": 1}}
    with pytest.raises(UserError, match=r"network.filters: \[4, 4, 4\] -> \[8, 4, 4\].* there and .* here"):
        begun_with(run_spec(tmp_path / "wide", data, **wide), source.run_dir)
    assert not (tmp_path / "wide" / "initial.safetensors").exists()


def test_what_init_from_may_name(data: Path, tmp_path: Path) -> None:
    """A run, its best checkpoint, one by name; what is not there is told with what is."""
    source = run_spec(tmp_path / "source", data)
    train(source, stop=20)
    older, *_, newest = [name for name, _, _ in checkpoint.committed(source.run_dir)]
    for given, name in (
        (tmp_path / "source", newest),
        (tmp_path / "source" / older, older),
        (tmp_path / "source/checkpoints" / older, older),
        (tmp_path / "source/best", gains.best_valid(source.run_dir).name),
    ):
        assert initial._source(str(given), 0)[2] == name
    with pytest.raises(UserError, match=f"no such valid checkpoint; there are {older}, .*{newest}"):
        initial._source(str(tmp_path / "source" / f"{4:012d}-g0001"), 0)
    with pytest.raises(UserError, match="is not a run folder"):
        initial._source(str(tmp_path / "nowhere"), 0)


def test_a_run_keeps_to_what_it_began_with(data: Path, tmp_path: Path) -> None:
    """The same --init-from again, or none, goes on; another is refused; a damaged copy is told at the first step."""
    source, plain = run_spec(tmp_path / "source", data), run_spec(tmp_path / "plain", data)
    train(source, stop=12)
    begun_with(run_spec(tmp_path / "run", data), source.run_dir)
    again = run_spec(tmp_path / "run", data)
    for given in ("", f"{source.run_dir}/"):
        initial.check(again, given)
        assert initial.begin(again, given) == (again, [])
    with pytest.raises(UserError, match=r"was begun with the weights of .*/source; leave --init-from"):
        initial.check(again, f"{source.run_dir}/best")
    begin(plain)
    with pytest.raises(UserError, match="was begun without --init-from"):
        initial.check(plain, source.run_dir)
    Path(again.run_dir, "initial.safetensors").write_bytes(b"other")
    with pytest.raises(RunFailed, match="differs from its checksum"):
        train(again)


def test_a_run_that_saw_the_held_out_cases_is_told(data: Path, tmp_path: Path) -> None:
    """Weights of another fold of the same data know the cases on which this run is scored."""
    source = run_spec(tmp_path / "source", data, fold=1)
    train(source, stop=12)
    _, lines = begun_with(run_spec(tmp_path / "run", data), source.run_dir)
    assert "trained on the cases that this one holds out (fold 0)" in lines[-1]


def test_the_last_words(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Last and best Dice by region, samples, time, cost; three commands with the run's own places, quoted."""
    made = run_spec(tmp_path / "my run", data, train={"epochs": 4})
    train(made)
    journal.event(made.run_dir, "launch")
    journal.event(made.run_dir, "cost", dollars=1.5, dollars_per_hour=2.0)
    for seen, dice in ((8, 0.9), (made.sampler.total, 0.7)):
        validation(tmp_path / "my run", seen, dice)
    capsys.readouterr()
    ending.show(made, str(data))
    said = capsys.readouterr().out
    lines = [" ".join(line.strip("│┃ ").replace("│", " ").split()) for line in said.splitlines()]
    assert f"last {made.sampler.total} 0.700 0.700 0.700 0.700" in lines
    assert "best 8 0.900 0.900 0.900 0.900" in lines
    assert f"done: {made.run_dir}: {made.sampler.total} samples in" in said and "$1.50" in said
    assert lines[-3:] == [
        f"raytrain-brats evaluate --data {data} --run-dir '{made.run_dir}' --best",
        f"raytrain-brats predict --run-dir '{made.run_dir}' --best --images SCANS --out PREDICTIONS",
        f"raytrain-brats report --run-dir '{made.run_dir}'",
    ]
    assert json.loads(json.dumps(driver.end_of(made, made.sampler.total))) == f"all {made.sampler.total:,} samples"
