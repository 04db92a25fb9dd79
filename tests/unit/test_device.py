"""What a step asks of the device: copies to it, waits for it, skips on it; by devices that need no GPU."""

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raytrain_brats import augmentation
from raytrain_brats.augmentation import Cut
from raytrain_brats.data.patch import CaseBox, decode, encode
from raytrain_brats.data.sampler import Sample
from raytrain_brats.learn.step import TrainStep
from raytrain_brats.run.feed import Uploader, batch_of
from raytrain_brats.run.worker import train_step_of
from tests.support.steps import CPU, EDGE, NETWORKS, empty, odds, patch, spec

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts what goes to the device and what comes from it."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads, self.readbacks = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, torch.Tensor)]
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and given and made.is_meta:
            self.uploads += any(not a.is_meta for a in given)
        self.readbacks += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return made


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("augment", ["off", "light", "full"])
def test_a_step_copies_once_to_the_device_and_never_waits_for_it(
    network: str, micro_batch: int, augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copy for the numbers of all samples, also where all of nnU-Net's list happens to each. The meta device has no
    values: whoever asks for one, fails."""
    monkeypatch.setattr(augmentation, "NNUNET", odds(1))
    train_step = train_step_of(spec(network, micro_batch, augment=augment), 1, META)
    train_step.optimiser.step = lambda: None  # type: ignore[assignment] # its one kernel does not know this device
    patches = [*(on_meta(number) for number in range(3)), empty(3, "missing: x")]
    for start in (0, 4):
        batch = batch_of(patches, start, META)
        with Copies() as copies:
            train_step.launch(batch, start)
        assert (copies.uploads, copies.readbacks) == (1, 0)


def on_meta(position: int) -> Any:
    made = patch(position)
    there = {name: torch.tensor(getattr(made, name), device=META) for name in ("image_czyx", "label_zyx")}
    return type(made)(**made.__dict__ | there)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_skipped_step_leaves_no_trace(optimiser: str) -> None:
    """Also the very first one, whose momentum would be left uninitialised: weights and state are as without it."""
    bad = patch(9)
    bad = type(bad)(**bad.__dict__ | {"mean": [float("nan")] * 4})
    found = []
    for first in ([], [bad], [empty(9)]):
        train_step = train_step_of(spec(optimiser=optimiser), 1, CPU)
        for batch in first and [[first[0]] * 4]:
            assert train_step.step(batch_of(batch, 9, CPU), 0).loss is None
        results = [train_step.step(batch_of([patch(n + i) for i in range(4)], n, CPU), n) for n in (0, 4)]
        assert all(result.finite for result in results)
        found.append(train_step.state()[0])
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0]) and found[0].keys() == other.keys()


def test_rows_come_to_the_device_as_they_were_sent() -> None:
    """Integers, halves and labels of a row of several boxes, through one copy; an invalid case without voxels."""
    random = np.random.RandomState(0)

    def box(number: int, dtype: Any) -> CaseBox:
        image, label = random.randint(-9, 99, (4, 9, 10, 11)).astype(dtype), random.randint(0, 4, (9, 10, 11))
        sample = Sample(number, 0, number, number)
        found = ((9, 10, 11), image, label.astype(np.uint8), (1.0,) * 4, (2.0,) * 4)
        return CaseBox(f"case{number}", [(sample, Cut((1, 2, 3), (EDGE,) * 3))], "", *found)

    boxes = [
        box(0, np.int16),
        CaseBox("gone", [(Sample(1, 0, 1, 1), Cut((0, 0, 0), (EDGE,) * 3))], "missing: x"),
        box(2, np.float16),
    ]
    table = encode(boxes, (EDGE, EDGE, EDGE), 3)
    until, here = decode(table)
    until_there, there = decode(table, Uploader(CPU))
    assert until == until_there == 3 and [p.reason for p in there] == ["", "missing: x", ""]
    for a, b in zip(here, there, strict=True):
        assert (a.position, a.case_id, a.weight) == (b.position, b.case_id, b.weight)
        if not a.reason:
            assert isinstance(b.image_czyx, torch.Tensor)
            assert np.array_equal(a.image_czyx, b.image_czyx.numpy())
            assert np.array_equal(a.label_zyx, b.label_zyx.numpy())


def halved(train_step: TrainStep) -> TrainStep:
    """In fp16 with a loss scale that some steps cannot bear."""
    train_step.precision = torch.float16
    train_step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**23)
    return train_step


def applied(train_step: TrainStep, share: slice) -> tuple[list[bool], torch.Tensor]:
    results = []
    for start in range(0, 24, 4):
        batch = [patch(start + number) for number in range(4)][share]
        results.append(train_step.step(batch_of(batch, start, CPU), start))
    assert any(result.overflow for result in results) and any(result.finite for result in results)
    return [result.finite for result in results], nn.utils.parameters_to_vector(train_step.network.parameters())


def _rank(rank: int, folder: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = applied(halved(train_step_of(spec(micro_batch=1), 2, CPU)), slice(rank, None, 2))
    torch.save(found, Path(folder) / str(rank))
    distributed.destroy_process_group()


def test_fp16_applies_the_same_steps_at_any_world_size(tmp_path: Path) -> None:
    """Whether a step overflows must not depend on how many ranks share it: the loss carries no factor of their
    number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, (str(tmp_path), port), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    alone, weights = applied(halved(train_step_of(spec(micro_batch=1), 1, CPU)), slice(None))
    for rank in range(2):
        counted, found = torch.load(tmp_path / str(rank), weights_only=True)
        assert counted == alone
        torch.testing.assert_close(found, weights, rtol=0, atol=2e-3)
