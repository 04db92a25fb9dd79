"""The config: what is wrong is told by key, what is right survives a round trip."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from raytrain_brats import config
from raytrain_brats.config import load, parse, patch_divisor
from raytrain_brats.errors import UserError

DYNUNET = ("network={name: dynunet, filters: [8, 16, 16]}",)


@pytest.mark.parametrize("name", config.recipe_names())
def test_recipes_load_and_fit_their_network(name: str) -> None:
    """Every recipe that ships is valid, and its patch passes its network."""
    recipe = load(name)
    assert not [edge for edge in recipe.data.patch_xyz if edge % patch_divisor(recipe)]


@pytest.mark.parametrize("overrides", [(), DYNUNET, ("train.optimiser.learning_rate=1e-5", "run.cpus_per_worker=0.25")])
def test_yaml_round_trip(overrides: tuple[str, ...]) -> None:
    """Config to YAML, read with any safe loader, to an equal config."""
    one = load("demo", overrides)  # 1e-5 has no dot, which YAML takes for text
    assert "1e-5" not in str(overrides) or one.train.optimiser.learning_rate == 1e-5
    assert parse(yaml.safe_load(one.to_yaml()), "again") == one


def test_a_run_begun_before_augmentation_had_kinds_goes_on_as_it_was() -> None:
    """Its config.yaml has no `kind`: flips, scale and shift, as now by `light`."""
    old = yaml.safe_load(load("demo").to_yaml())
    del old["train"]["augment"]["kind"], old["train"]["augment"]["own"]
    assert old["train"]["augment"] == {"flip": True, "scale": 0.1, "shift": 0.1}
    assert not config.differences(parse(old, "old"), load("demo"))
    assert config.differences(parse(old, "old"), load("demo", ("train.augment.kind=full",)))


def test_config_is_frozen_and_hashable() -> None:
    """Nothing in it can be changed by those it is handed to."""
    one = load("demo")
    for place, name in ((one, "train"), (one.train, "epochs"), (one.network, "name")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(place, name, getattr(place, name))
    assert hash(one) == hash(load("demo")) and isinstance(one.data.patch_xyz, tuple)


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["train.epoch=3"], ["train.epoch ", "did you mean train.epochs"]),
        (["trane.epochs=3"], ["trane", "train"]),
        (["epochs=3"], ["epochs", "train.epochs"]),
        (["validate_.max_cases=3"], ["validate_", "validate"]),
        (["train.optimiser.lr=3"], ["train.optimiser.lr"]),
        (["network.init_filter=8"], ["network.init_filter ", "network.init_filters"]),
        (["train.epochs=0"], ["train.epochs", "greater than 0", "0"]),
        (["train.epochs=many"], ["train.epochs", "many"]),
        (["train.epochs="], ["train.epochs", "None"]),
        (["train.global_batch=2.5"], ["train.global_batch", "2.5"]),
        (["train.seed=-1"], ["train.seed"]),
        (["train.seed=1000000000000000000000"], ["train.seed"]),
        (["train.optimiser.learning_rate=.inf"], ["train.optimiser.learning_rate", "finite"]),
        (["train.optimiser.learning_rate=.nan"], ["train.optimiser.learning_rate"]),
        (["train.optimiser.name=adam"], ["train.optimiser.name", "adamw", "adam"]),
        (["train.augment.kind=strong"], ["train.augment.kind", "'full'", "strong"]),
        (["train.augment.kind=full", "train.augment.scale=0.3"], ["train.augment: ", "belong to kind `light`"]),
        (["train.reduction=exact", "run.threads_per_worker=2"], ["run.threads_per_worker", "exact", "one thread"]),
        (["data.patch_xyz=[32, 32]"], ["data.patch_xyz"]),
        (["data.patch_xyz=32"], ["data.patch_xyz", "32"]),
        (["data.fold=5"], ["data.fold", "5"]),
        (["data.foreground_share=1.5"], ["data.foreground_share", "1.5"]),
        (["data.convention=brats"], ["data.convention", "msd"]),
        (["checkpoint.keep=1"], ["checkpoint.keep", "1"]),
        (["network.name=unett"], ["network", "unett", "segresnet", "dynunet"]),
        (["network.name=unet", "network.filters=[8]"], ["key network.filters is not known; did you mean network."]),
        (["network=3"], ["network", "3"]),
        (["network.blocks_down=[]"], ["blocks_up", "blocks_down"]),
        (["network.blocks_up=[1, 1, 1]"], ["blocks_up", "blocks_down"]),
        (["network.init_filters=12"], ["init_filters", "8"]),
        (["network={name: dynunet, filters: [8, 8]}"], ["network.filters", "3"]),
        (["network={name: dynunet, filters: [8, 8, 8], heads: 2}"], ["network", "heads", "1 at most"]),
        (["network={name: dynunet, filters: [8, 8, 8], heads: -1}"], ["network.heads", "-1"]),
        (["network={name: mednext, blocks: [1, 1, 1]}"], ["network", "expansion", "blocks"]),
        (["network={name: mednext, heads: 5}"], ["network", "heads", "4 at most"]),
        (["network={name: mednext, kernel_size: 7}"], ["network.kernel_size", "3", "5"]),
        (["network={name: unet, channels: [8]}"], ["network.channels", "2"]),
        (["network={name: unet, blocks: 3}"], ["network.blocks is not known"]),
        (["data.foreground_draw=both"], ["data.foreground_draw", "labels", "regions"]),
        (["train.optimiser.schedule=step"], ["train.optimiser.schedule", "cosine", "poly"]),
        (["train.ema_samples=0"], ["train.ema_samples", "0"]),
        (["train=3"], ["train", "3"]),
        (["train=[1, 2]"], ["train"]),
        (["train.epochs.more=3"], ["--set train.epochs.more=3", "epochs is a value"]),
        (["data.patch_xyz.0=3"], ["--set data.patch_xyz.0=3", "patch_xyz is a value"]),
        (["train.epochs"], ["--set train.epochs", "key=value"]),
        (["=3"], ["--set =3", "key=value"]),
        (["train.epochs=[1"], ["--set train.epochs=[1", "not YAML"]),
        (["train.epochs=!!python/name:os.system x"], ["--set train.epochs", "not YAML"]),
        (["train..epochs=3"], ["train."]),
    ],
)
def test_what_is_wrong_is_named(overrides: list[str], fragments: list[str]) -> None:
    """One line with the key, the value or the nearest names that exist."""
    with pytest.raises(UserError) as caught:
        load("demo", tuple(overrides))
    assert "\n" not in str(caught.value)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "no `key: value` lines"),
        (b"- 1\n- 2\n", "no `key: value` lines"),
        (b"just text", "no `key: value` lines"),
        (b"network: [1\n", "not YAML"),
        (b"\xff\xfe\xff", "not YAML"),
        (b"network: \xe9\n", "not YAML"),
        (b"data: {fold: 0}\n", "network: Field required"),
        (b"network: {name: segresnet}\ntrain:\n", "train"),
        (b"network: {name: segresnet}\n3: x\n", "3"),
    ],
)
def test_broken_recipe_files_are_named(tmp_path: Path, content: bytes, fragment: str) -> None:
    """The message names the file and what is wrong in it, in one line."""
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(str(tmp_path / "mine.yaml"))
    assert "mine.yaml" in str(caught.value) and fragment in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_recipes_are_named_with_the_known_ones() -> None:
    """By name with the nearest one, by file with its path."""
    with pytest.raises(UserError, match=r"'demos' is not known; did you mean demo\?.*there are .*demo"):
        load("demos")
    with pytest.raises(UserError, match=r"nowhere/x\.yaml does not exist"):
        load("nowhere/x.yaml")


def test_off_is_a_word_and_booleans_are_still_read(tmp_path: Path) -> None:
    """On the command line and in a file; YAML 1.1 would make False of it."""
    (tmp_path / "own.yaml").write_text("network:\n  name: segresnet\ntrain:\n  augment:\n    kind: off\n  amp: false\n")
    for found in (config.load("demo", ["train.augment.kind=off", "train.amp=False"]), load(str(tmp_path / "own.yaml"))):
        assert (found.train.augment.kind, found.train.amp) == ("off", False)
    assert config.load("demo", ["train.amp=off"]).train.amp is False


@pytest.mark.parametrize("text", ["1:8", "4", "64", "auto", "'2:2'"])
def test_workers_are_read_as_written(tmp_path: Path, text: str) -> None:
    """1:8 is no number to base 60, with or without quotes, on the command line and in a file."""
    (tmp_path / "mine.yaml").write_text(f"network: {{name: segresnet}}\nrun:\n  workers: {text}\n")
    found = load("demo", (f"run.workers={text}",)), load(str(tmp_path / "mine.yaml"))
    assert [one.run.workers for one in found] == [text.strip("'")] * 2


@pytest.mark.parametrize("text", ["0", "0:2", "4:2", "-1", "1:2:3", "a:b", "':3'", "1.5", "true", "''", "²"])
def test_workers_must_be_a_range(text: str) -> None:
    """Anything but MIN:MAX, N or auto is refused with the key."""
    with pytest.raises(UserError, match=r"run(\.workers)?: "):
        load("demo", (f"run.workers={text}",))


def test_differences_are_those_that_make_another_run() -> None:
    """Every changed setting but those of `run` and `checkpoint`, with both values."""
    changed: dict[str, Any] = {"run.workers": "1:5", "run.prefetch": 9, "checkpoint.keep": 5}
    other = load("demo", (*(f"{key}={value}" for key, value in changed.items()), "train.epochs=99", "data.fold=2"))
    one = load("demo", ("train.epochs=12", "data.fold=0"))
    assert config.differences(one, one) == []
    assert config.differences(one, other) == ["data.fold: 0 -> 2", "train.epochs: 12 -> 99"]
    assert "network.name: segresnet -> dynunet" in config.differences(one, load("demo", DYNUNET))


@pytest.mark.parametrize(("name", "rate", "batch"), [("segresnet", 1e-4, 1), ("dynunet", 3e-4, 4)])
def test_the_learning_rate_is_for_the_batch(name: str, rate: float, batch: int) -> None:
    """The field's rate and batch, scaled by the square root: who changes one in a recipe must look at the other."""
    train = load(name).train
    assert train.optimiser.learning_rate == pytest.approx(rate * (train.global_batch / batch) ** 0.5, rel=0.02)
    assert train.optimiser.warmup_share > 0


def test_another_network_brings_its_own_options() -> None:
    """Those of the recipe's network are none of its own; the same name leaves them."""
    assert load("demo", ("network.name=unet",)).network.name == "unet"
    assert load("demo", ("network.name=segresnet",)).network == load("demo").network
