"""The running mean of the weights: by samples, not by steps; untouched by a step that is skipped; what is scored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raytrain_brats.config import parse
from raytrain_brats.learn.model import ema_share
from raytrain_brats.learn.step import TrainStep, network_weights
from raytrain_brats.run import checkpoint, predictor
from raytrain_brats.run.worker import batch_of, train_step_of
from tests.support.steps import CPU, empty, patch, spec


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    """Tiny networks: more threads than cores to spare only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flat(network: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def trained(steps: int = 0, **changes: Any) -> TrainStep:
    made = train_step_of(spec("dynunet", **changes), 1, CPU)
    for start in range(0, 4 * steps, 4):
        made.step(batch_of([patch(start + i) for i in range(4)], start, CPU), start)
    return made


def without_mean() -> TrainStep:
    run_spec = spec("dynunet")
    settings = run_spec.config.model_dump(mode="json", by_alias=True)
    settings["train"]["ema_samples"] = None
    return TrainStep(parse(settings, "test"), run_spec.sampler.total, "msd", 1, CPU)


def test_it_forgets_by_samples_whatever_the_batch() -> None:
    """exp(-samples / ema_samples) of the old mean stays; while fewer than ten times as many were seen, a tenth of these
    counts, so that the initial weights are soon forgotten."""
    for batch in (1, 4, 16):
        kept = np.prod([1 - ema_share(400, batch, seen) for seen in range(8000 + batch, 8400 + 1, batch)])
        assert kept == pytest.approx(np.exp(-1))
    assert ema_share(400, 4, 4) > 0.9999
    assert ema_share(400, 4, 1000) == pytest.approx(1 - np.exp(-4 / 100))


def test_it_follows_the_weights() -> None:
    """After each step: the old mean, moved towards the new weights by that step's share."""
    made = trained()
    expected = flat(made.network)
    for start in (0, 4, 8):
        made.step(batch_of([patch(start + i) for i in range(4)], start, CPU), start)
        expected += ema_share(40, 4, start + 4) * (flat(made.network) - expected)
        torch.testing.assert_close(flat(made.averaged), expected)
    assert not torch.equal(flat(made.averaged), flat(made.network))


def test_a_skipped_step_leaves_it() -> None:
    """Not a bit changes, though the weights lie elsewhere: neither without samples nor with a gradient that is not
    finite."""
    made = trained(3)
    before = flat(made.averaged)
    made.step(batch_of([empty(i) for i in range(12, 16)], 12, CPU), 12)
    next(made.network.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    assert not made.step(batch_of([patch(i) for i in range(12, 16)], 12, CPU), 12).finite
    assert torch.equal(flat(made.averaged), before)


def test_it_does_not_change_the_training() -> None:
    """The trained weights are the same bits with it and without; without it the network itself is scored."""
    other = without_mean()
    for start in (0, 4):
        other.step(batch_of([patch(start + i) for i in range(4)], start, CPU), start)
    assert torch.equal(flat(other.network), flat(trained(2).network)) and other.averaged is other.network


def test_what_predicts_is_the_mean_of_the_checkpoint(tmp_path: Path) -> None:
    """`predict` and `evaluate` get it by the names of the network's own weights; where there is none, the weights."""
    for made in (trained(3), without_mean()):
        name = checkpoint.save(str(tmp_path), 12, 1, *made.state()).name
        found, weights = predictor.newest_weights(str(tmp_path))
        other = trained()
        other.network.load_state_dict(weights)
        assert found == name and torch.equal(flat(other.network), flat(made.averaged))


def test_a_run_that_had_none_begins_one(tmp_path: Path) -> None:
    """A checkpoint without a mean goes on with its weights as the mean; one with a mean serves a run without."""
    old, new = without_mean(), trained(2)
    old.step(batch_of([patch(i) for i in range(4)], 0, CPU), 0)
    state = old.state()
    assert not any(name.startswith("ema/") for name in state[0])
    new.restore(*state)
    assert torch.equal(flat(new.averaged), flat(old.network)) and new.averaged is not new.network
    made = trained(3)
    old.restore(*made.state())
    assert torch.equal(flat(old.network), flat(made.network))
    assert network_weights(old.state()[0]).keys() == made.network.state_dict().keys()
