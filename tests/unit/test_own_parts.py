"""A network, loss or augmentation of one's own: found by name, checked at the door, recorded, missed in one line."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from raytrain_brats import books, config, parts
from raytrain_brats.augmentation import Draws
from raytrain_brats.config import Augment, Config
from raytrain_brats.data.sampler import ORDER
from raytrain_brats.errors import UserError
from raytrain_brats.learn import batch, model, own_check
from raytrain_brats.networks import OwnNetwork
from raytrain_brats.parts import OwnPart
from raytrain_brats.ray_ext import importable
from raytrain_brats.run import own_parts, spec
from tests.support import ROOT

PATCH = "data.patch_xyz=[32, 24, 16]"
BAD = """
import torch
from torch import nn
from torch.nn import functional

class Base(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first, self.out = nn.Conv3d(4, width, 3, padding=1), nn.Conv3d(width, 3, 1)
        self.more()
    def more(self): self.middle = nn.Identity()
    def forward(self, x): return self.out(self.middle(self.first(x)))

class WithBatchNorm(Base):
    def more(self): self.middle = nn.Sequential(nn.BatchNorm3d(4))
class Running(Base):
    def more(self): self.middle = nn.InstanceNorm3d(4, track_running_stats=True)
class Unused(Base):
    def more(self): self.middle, self.left = nn.Identity(), nn.Linear(2, 2)
class Frozen(Base):
    def more(self): self.middle = nn.Identity(); self.first.requires_grad_(False)
class Dropping(Base):
    def more(self): self.middle = nn.Dropout3d(0.5)
class Two(Base):
    def more(self): self.middle, self.out = nn.Identity(), nn.Conv3d(4, 2, 1)
class Halved(Base):
    def more(self): self.middle = nn.MaxPool3d(2)
class Mean(Base):
    def forward(self, x): return super().forward(x) + x.mean()
class Mapping(Base):
    def forward(self, x): return {"logits": super().forward(x)}
class Looks(Base):
    def forward(self, x): return super().forward(x) * (2 if x[0, 0, 0, 0, 0].item() > 0 else 1)
class Heads(Base):
    def forward(self, x):
        full = super().forward(x)
        return [full, functional.avg_pool3d(full, 2)] if self.training else full
class OnlyEven(Base):
    divisor = 2
    def forward(self, x):
        assert not any(n % 2 for n in x.shape[2:]), "odd"
        return super().forward(x)
class FixedSize(Base):
    def forward(self, x):
        assert tuple(x.shape[2:]) == (16, 24, 32), "another size"
        return super().forward(x)
Base.number = 3
number = 3

def batch_mean(logits, regions): return (logits - regions).square().mean()
def across(logits, regions): return (logits - regions).square().flatten(1).mean(1) * logits.mean()
def constant(logits, regions): return regions.flatten(1).mean(1)
def by_tumour(logits, regions): return (logits.sigmoid() * regions).flatten(1).sum(1) / regions.flatten(1).sum(1)
def fails(logits, regions): raise ValueError("no such\\nthing")
class Strict:
    def __init__(self, gamma): raise ValueError(f"gamma {gamma} is not\\npositive")
    def __call__(self, logits, regions): return logits
def elementwise(logits, regions): return (logits - regions).square()

def noisy(image, regions, draws): return image + torch.rand_like(image), regions
def smaller(image, regions, draws): return image[:, 1:], regions
def doubled(image, regions, draws): return image.double(), regions
def alone(image, regions, draws): return image
def blurred(image, regions, draws): return image, regions * 0.5
def shifted(image, regions, draws): return image + draws("shift", 1)[0], regions
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with modules of one's own that no other test knows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "bad.py").write_text(BAD)
    (tmp_path / "my_parts.py").write_text((ROOT / "docs/examples/my_parts.py").read_text())
    _forget()
    yield tmp_path
    _forget()


def _forget() -> None:
    parts.function.cache_clear()
    for name in ("bad", "my_parts", "broken"):
        sys.modules.pop(name, None)


def of(*changes: str) -> Config:
    return config.load("demo", (PATCH, *changes))


@pytest.mark.usefixtures("folder")
def test_the_example_is_taken_and_told() -> None:
    """The three parts of docs/own-parts.md pass the door; parameters are counted, files named with their checksums."""
    own = of("network={name: 'my_parts:Small', width: 8}", "train.loss=my_parts:focal")
    own = config.parse(own.model_dump(by_alias=True) | {"train": own.train.model_dump() | {
        "augment": {"own": {"name": "my_parts:drop_modality", "share": 0.5}}}}, "test")  # fmt: skip
    network, loss, augmentation = own_check.check(own)
    count = sum(p.numel() for p in model.build_network(own).parameters())
    assert f"my_parts:Small: {count:,} parameters, " in network and "my_parts.py (sha256 " in network
    assert "my_parts:focal: loss" in loss and "my_parts:drop_modality: augmentation" in augmentation
    assert config.patch_divisor(own) == 2


@pytest.mark.usefixtures("folder")
def test_the_same_seed_gives_the_same_weights() -> None:
    """As for the networks that ship; another width is another network."""
    one, again = (model.build_network(of("network=my_parts:Small")).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    wide = model.build_network(of("network={name: 'my_parts:Small', width: 4}")).state_dict()
    assert wide["out.weight"].shape != one["out.weight"].shape


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ("network=bad:WithBatchNorm", ["bad:WithBatchNorm", "middle.0 (BatchNorm3d)", "instance or group norm"]),
        ("network=bad:Running", ["buffers change", "middle.running_mean", "track_running_stats=False"]),
        ("network=bad:Unused", ["no gradient", "left.weight, left.bias"]),
        ("network=bad:Frozen", ["do not learn", "first.weight"]),
        ("network=bad:Two", ["(2, 2, 16, 24, 32)", "(2, 3, 16, 24, 32)"]),
        ("network=bad:Halved", ["(2, 3, 8, 12, 16)", "as large as the patch"]),
        ("network=bad:Mean", ["depend on the others"]),
        ("network=bad:Mapping", ["gives a dict in training mode"]),
        ("network={name: 'bad:Base', widht: 4}", ["widht", "Base(width=4)"]),
        ("network={name: 'bad:Base', width: -1}", ["cannot be made", "-1"]),
        ("network={name: 'my_parts:Small', width: 0}", ["my_parts:Small: width", "greater than 0", "got 0"]),
        ("network={name: 'my_parts:Small', wide: 3}", ["wide", "there are width"]),
        ("network=my_parts:Smal", ["my_parts.py has no Smal", "did you mean my_parts:Small"]),
        ("network=bad:number", ["bad:number is of type int"]),
        ("network=nowhere_to_be_seen:Net", ["no module nowhere_to_be_seen in", "start from the folder"]),
        ("network=my_parts:focal", ["my_parts:focal", "logits"]),
        ("train.loss=bad:batch_mean", ["gives () for two samples", "never a mean over the batch"]),
        ("train.loss=bad:across", ["a sample's loss depends on the others"]),
        ("train.loss=bad:constant", ["no gradient"]),
        ("train.loss=bad:by_tumour", ["loss of a patch without tumour is not finite"]),
        ("train.loss=bad:fails", ["bad:fails fails (ValueError: no such thing)"]),
        (
            "train.loss={name: 'bad:Strict', gamma: -1}",
            ["train.loss bad:Strict cannot be made", "gamma -1 is not positive"],
        ),
        ("train.loss={name: 'my_parts:focal', gama: 1}", ["gama", "focal(logits"]),
        ("train.augment.own=bad:noisy", ["take all random numbers from `draws`"]),
        ("train.augment.own=bad:smaller", ["image was (4, 8, 10, 12)", "became (4, 7, 10, 12)"]),
        ("train.augment.own=bad:doubled", ["torch.float64"]),
        ("train.augment.own=bad:alone", ["(image, regions)"]),
        ("train.augment.own=bad:blurred", ["neither 0 nor 1"]),
    ],
)
def test_what_breaks_a_promise_is_refused_in_one_line(change: str, fragments: list[str]) -> None:
    """Before anything is started; the line names the part and what is wrong with it."""
    with pytest.raises(UserError) as raised:
        own_check.check(of(change))
    text = str(raised.value)
    assert "\n" not in text and all(fragment in text for fragment in fragments), text


@pytest.mark.usefixtures("folder")
def test_a_module_that_fails_is_told_in_one_line(folder: Path) -> None:
    """Also one that needs what is not installed."""
    for content, fragment in (
        ("import not_installed_here", "needs not_installed_here"),
        ("1 / 0", "ZeroDivisionError"),
        ("def", "SyntaxError"),
    ):
        (folder / "broken.py").write_text(content + "\n")
        sys.modules.pop("broken", None)
        with pytest.raises(UserError, match=fragment):
            parts.find("broken:Net")


@pytest.mark.usefixtures("folder")
def test_a_node_says_what_it_lacks_and_which_file_it_has() -> None:
    """As the driver asks each: in words, or file and checksum."""
    missing, _ = importable._there([OwnPart(name="bad:Base"), OwnPart(name="nowhere_to_be_seen:Net")])
    assert missing.startswith("nowhere_to_be_seen:Net: there is no module")
    assert importable._there([OwnPart(name="bad:Base")]) == ("", parts.sources([OwnPart(name="bad:Base")]))


@pytest.mark.usefixtures("folder")
def test_dropout_is_told_and_refused_where_bits_are_promised() -> None:
    """It depends on chance in each process."""
    assert any("draws random numbers" in line for line in own_check.check(of("network=bad:Dropping")))
    with pytest.raises(UserError, match="reduction: exact"):
        own_check.check(of("network=bad:Dropping", "train.reduction=exact"))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["Heads", "Looks", "OnlyEven", "FixedSize"])
def test_networks_that_keep_the_promises_are_taken(name: str) -> None:
    """With heads; with a branch that the meta device cannot follow; of even edges; of one size alone."""
    told = own_check.check(of(f"network=bad:{name}"))
    assert ("not tried at 32x24x16" in told[-1]) == (name == "Looks")


@pytest.mark.usefixtures("folder")
def test_a_patch_that_the_network_does_not_take_is_refused() -> None:
    """The error is the network's own, at the run's own size."""
    with pytest.raises(UserError, match=r"fails on a patch of 32x24x15 \(AssertionError: odd\)"):
        own_check.check(config.load("demo", ("network=bad:OnlyEven", "data.patch_xyz=[32, 24, 15]")))


@pytest.mark.usefixtures("folder")
def test_losses_of_voxels_are_averaged_over_each_sample() -> None:
    """So losses of MONAI with reduction none serve as they are."""
    logits, regions = torch.randn(2, 3, 4, 4, 4), torch.ones(2, 3, 4, 4, 4)
    wanted = (logits - regions).square().flatten(1).mean(1)
    torch.testing.assert_close(model.sample_losses(logits, regions, OwnPart(name="bad:elementwise")), wanted)
    tversky = OwnPart.model_validate({"name": "monai.losses:TverskyLoss", "sigmoid": True, "reduction": "none"})
    assert model.sample_losses([logits, logits[..., ::2, ::2, ::2]], regions, tversky).shape == (2,)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("kind", ["off", "light", "full"])
def test_an_own_augmentation_follows_and_sees_one_sample(kind: Any) -> None:
    """It changes each sample by the sample's own numbers, whatever lies beside it in the batch."""
    table = torch.zeros(3, 256)

    def sample(number: int) -> batch.DeviceSample:
        draws: Draws = lambda purpose, count: [(number + len(purpose)) % 7 / 7] * count  # noqa: E731
        image = torch.full((4, 8, 8, 8), number + 1, dtype=torch.int16)
        return batch.DeviceSample(number, image, image[0] * 0, [0.0] * 4, [1.0] * 4, 1.0, draws)

    def made(numbers: list[int], own: OwnPart | None) -> torch.Tensor:
        samples = [sample(number) for number in numbers]
        _, uploaded = batch.upload([], samples, torch.device("cpu"))
        return batch.make(samples, uploaded, table, Augment(kind=kind, own=own), (8, 8, 8))[0]

    own = OwnPart(name="bad:shifted")
    plain, both = made([0, 1], None), made([0, 1], own)
    shift = [sample(number).draws("own/shift", 1)[0] for number in (0, 1)]
    torch.testing.assert_close(both, plain + torch.tensor(shift)[:, None, None, None, None])
    assert torch.equal(made([1], own)[0], both[1])


def test_a_library_s_network_needs_no_code() -> None:
    """MONAI's classes by their own names and arguments."""
    own = of("network={name: 'monai.networks.nets:SegResNet', in_channels: 4, out_channels: 3, init_filters: 8}")
    assert isinstance(own.network, OwnNetwork)
    assert "parameters" in own_check.check(own)[0]
    assert isinstance(model.build_network(own), nn.Module)


def test_set_network_name_leaves_the_recipe_s_options_out() -> None:
    """`--set network.name=...` begins the section anew, in whatever order options of it are set."""
    own = config.load("dynunet", ("network.width=3", "network.name=my_parts:Small"))
    assert isinstance(own.network, OwnNetwork) and own.network.options == {"width": 3}
    with pytest.raises(UserError, match=r"package\.module:Name"):
        config.load("demo", ("network.name=my parts:Small",))


@pytest.mark.usefixtures("folder")
def test_a_changed_file_is_told_on_resume_and_a_missing_one_named(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the checksum that the run folder keeps; predictions tell it too, and weights that do not fit are refused."""
    own = of("network=my_parts:Small", "train.loss=my_parts:focal")
    run = spec.StoredRun(own, "msd", "abc", "", own_parts=parts.sources(config.own_parts(own).values()))
    weights = model.build_network(own).state_dict()
    own_parts.check_weights("run", run, weights)
    assert capsys.readouterr().err == ""
    text = (folder / "my_parts.py").read_text()
    (folder / "my_parts.py").write_text(text + "\n# changed\n")
    own_parts.check_weights("run", run, weights)
    assert "my_parts.py (my_parts:Small) was changed since" in capsys.readouterr().err
    del weights["out.bias"]
    with pytest.raises(UserError, match="does not take the weights"):
        own_parts.check_weights("run", run, weights)
    (folder / "my_parts.py").unlink()
    _forget()
    with pytest.raises(UserError, match="run was trained with a part of one's own: my_parts:Small: there is no module"):
        own_parts.check_weights("run", run, weights)


@pytest.mark.usefixtures("folder")
def test_a_run_goes_on_by_changed_code_and_says_so(tmp_path: Path, folder: Path) -> None:
    """A line at the start and an event; nothing where nothing changed, or where there is no part of one's own."""
    own = of("network=my_parts:Small")
    about = {"identity": "abc", "convention": "msd", "order": ORDER, "config": yaml.safe_load(own.to_yaml())}
    about["own_parts"] = parts.sources(config.own_parts(own).values())
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(about))
    assert not [line for line in own_parts.check(own, str(run)) if "warning" in line]
    assert own_parts.check(of(), str(run)) == [] and not books.read_events(str(run))
    (folder / "my_parts.py").write_text((folder / "my_parts.py").read_text() + "\n# changed\n")
    told = own_parts.check(own, str(run))[-1]
    assert told.startswith("warning: ") and "was changed since" in told and told.endswith("by the new code")
    assert [e["event"] for e in books.read_events(str(run))] == ["own_part_changed"]
