"""The whole description of a run: one frozen value, checked when it is read.

In: a recipe (a name from `recipes/`, or a YAML file) and `a.b=c` overrides.
Out: a `Config`, and its YAML. An error names the key and the nearest names that exist.
"""

import difflib
import re
from importlib import resources
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from raytrain_brats import parts, storage
from raytrain_brats.errors import UserError
from raytrain_brats.networks import NAMES, OURS, OWN, Network, OwnNetwork, whose
from raytrain_brats.networks import Frozen as _Frozen
from raytrain_brats.parts import OwnPart

Share = Annotated[float, Field(ge=0, le=1)]
Loss = Annotated[Annotated[Literal["dice_bce", "dice"], Tag(OURS)] | Annotated[OwnPart, Tag(OWN)], Discriminator(whose)]


class Preprocess(_Frozen):
    """What turns a volume into a prepared case. Part of the dataset's identity."""

    spacing_mm: PositiveFloat = 1.0
    """Voxel edge after resampling; volumes that have it already are not resampled."""


class Data(_Frozen):
    convention: Literal[
        "auto", "msd", "brats2017_2021", "brats2023", "brats2024_gli", "brats2024_met", "brats2024_ped", "article"
    ] = "auto"
    """How label values are read; `auto` follows what the data state; another than they state is refused."""
    fold: int = Field(default=0, ge=0, le=4)
    """The one of five folds that is held out for validation."""
    patch_xyz: tuple[PositiveInt, PositiveInt, PositiveInt] = (128, 128, 128)
    """Voxels of a training patch."""
    patches_per_case: PositiveInt = 4
    """Patches cut from each case per epoch, out of one decode; shown in as many successive steps."""
    foreground_share: Share = 0.5
    """Share of patches centred on a tumour voxel."""
    foreground_draw: Literal["labels", "regions"] = "labels"
    """Which voxel: of a label value drawn evenly among those of the case, or of a region (WT, TC, ET), as nnU-Net."""
    max_bad_share: Share = 0.05
    """The run stops when more than this share of an epoch's samples cannot be read."""
    residency: Literal["auto", "device", "host", "stream"] = "auto"
    """Where cases stay once they were read: on the GPU, in memory that a machine's workers share, or nowhere: then Ray
    Data brings them anew each epoch. `auto` takes the first of these for which there is room; `stream` without GPU."""


class Optimiser(_Frozen):
    name: Literal["adamw", "sgd"] = "adamw"
    """`sgd`: with Nesterov momentum of 0.99, as nnU-Net."""
    learning_rate: PositiveFloat = 3e-4
    """After the warm-up."""
    weight_decay: float = Field(default=1e-5, ge=0)
    """Of AdamW's own kind, decoupled, for `adamw`; an L2 penalty for `sgd`."""
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    """How the learning rate falls with the samples, after it rose: to zero along a cosine; to zero as
    (1 - share done)^0.9, nnU-Net's for SGD; not at all."""
    warmup_share: Share = 0.03
    """Share of all samples over which the learning rate rises."""
    clip_norm: PositiveFloat = 12.0
    """Gradients of a greater norm are shortened to it."""


class Augment(_Frozen):
    """Drawn from each sample's own seed, applied on the training device."""

    kind: Literal["off", "light", "full"] = "light"
    """`light`: flips, scale, shift. `full`: nnU-Net's list (docs/augmentation.md), for 100,000 samples and more."""
    flip: bool = True
    """Reverse each axis of half of the samples; also in `full`."""
    scale: float = Field(default=0.1, ge=0, lt=1)
    """Intensities times 1 + U(-scale, scale), per modality; in `light`."""
    shift: float = Field(default=0.1, ge=0)
    """Intensities plus U(-shift, shift) standard deviations, per modality; in `light`."""
    own: OwnPart | None = None
    """`package.module:function` of one's own, after `kind` (docs/own-parts.md)."""

    @model_validator(mode="after")
    def _used(self) -> "Augment":
        fields = type(self).model_fields
        if self.kind == "full" and any(getattr(self, f) != fields[f].default for f in ("scale", "shift")):
            raise ValueError("scale and shift belong to kind `light`; leave them out, or choose it")
        return self


class Train(_Frozen):
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Initial weights, the order of cases, crops and augmentation follow from it."""
    epochs: PositiveInt = 100
    """How often each case is dealt. May become more from one start of a run to the next: it is lengthened."""
    global_batch: PositiveInt = 8
    """Samples per step over all workers, whatever their number."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Samples of one forward pass on one worker; `auto`: as many as a GPU's memory holds, 2 on a CPU. No result depends
    on it but for rounding. `exact` takes them one by one."""
    reduction: Literal["fast", "exact"] = "fast"
    """`fast`: DDP, the same at any world size but for float rounding. `exact`: the same bits on one kind of CPU."""
    loss: Loss = "dice_bce"
    """Soft Dice of each region, and binary cross-entropy beside it; or `package.module:function` of one's own
    (docs/own-parts.md)."""
    optimiser: Optimiser = Optimiser()
    ema_samples: PositiveInt | None = None
    """Score and predict by a running mean of the weights over about so many samples; by default by the last weights."""
    augment: Augment = Augment()
    amp: bool = True
    """Mixed precision where the device has it (bf16, else fp16 with loss scaling); CPUs train in float32. `false`: all
    tensors in float32, but GPUs from Ampere on (A100, H100) still multiply in TF32 within convolutions, with 10 bits of
    mantissa; torch sets that by default, and nothing here changes it."""
    compile: bool = False
    """torch.compile of network and batch: a minute more at each start of a worker; needs a C compiler."""


class Validate(_Frozen):
    every_samples: PositiveInt | None = None
    """Validate after so many samples; by default after each epoch, and rarer where that took over 5 % of the time."""
    max_cases: PositiveInt = 32
    """Held-out cases that are scored while a run trains: the first ones."""
    patience_samples: PositiveInt | None = None
    """End the run once the mean Dice of the held-out cases was not exceeded for so many samples; by default never."""
    overlap: float = Field(default=0.5, ge=0, lt=1)
    """Overlap of neighbouring windows of the sliding-window inference."""
    mirror: bool = False
    """Also average over the eight mirror images while a run trains: eight times the work. `evaluate` and `predict` do
    it unless told not to."""


class Checkpoint(_Frozen):
    every_s: PositiveFloat = 60.0
    """Save after so many seconds. What a failure throws away is at most this and the seconds that a save takes."""
    every_samples: PositiveInt | None = None
    """Save after so many samples instead, whatever the time."""
    keep: int = Field(default=2, ge=2)
    """Newest valid checkpoints kept; two at least, so that a damaged one never is the only one."""
    best: bool = False
    """Save before each validation, and also keep the checkpoint with the best mean Dice of all (`predict --best`)."""


class Run(_Frozen):
    """Where and on how many machines; may change from one start of a run to the next."""

    workers: str = "auto"
    """MIN:MAX training workers; `auto` is 1 up to the number of GPUs (at least 1) that are there at the start."""
    cpus_per_worker: PositiveFloat | None = None
    """Logical CPUs of a training worker; by default 1 with a GPU, 0.5 without. Use 0.5, 0.25 or whole numbers."""
    threads_per_worker: PositiveInt | None = None
    """Threads of a training worker without a GPU; by default its share of the machine's cores. `exact` needs one."""
    gpus_per_worker: Literal[0, 1] | None = None
    """By default 1 when the cluster has GPUs at the start, else 0; say 1 when an autoscaler is to bring them."""
    cpus_per_task: PositiveFloat | None = None
    """Logical CPUs of a data task; by default 1, and 0.5 on machines of up to 4 CPUs."""
    data_tasks: PositiveInt | None = None
    """Data tasks at a time; by default, on machines of up to 4 CPUs, one a CPU that no worker has, else as many as
    CPUs and object store allow."""
    data_on_train_nodes: Literal["auto", True, False] = "auto"
    """Whether data tasks also use CPUs that workers leave on nodes labelled `role: train`; `auto`: where a task fits
    there, and no autoscaler would add a training node for it."""
    prefetch: PositiveInt | None = None
    """Rows of the stream, of 1 to 8 cases, that a worker reads ahead; by default 4 with GPUs and 1 without, where a
    step takes seconds and each case 30 MB of a small object store."""
    resize_check_s: PositiveFloat = 30.0
    """How often a running group is compared with what the cluster could give."""
    hang_timeout_s: PositiveFloat = 20.0
    """A rank that shows no life, or is stuck in a step, for this long is ended and the group started again."""
    compare_weights_steps: PositiveInt = 50
    """Every so many steps, and at each checkpoint, the ranks' weights are compared by a 64-bit hash."""
    max_failures_in_place: PositiveInt = 8
    """Failures without a new checkpoint in between that are borne; one more, and the run gives up."""
    tracking: Annotated[str, Field(pattern=r"^(off|tensorboard|mlflow(:.+)?)$")] = "tensorboard"
    """Where curves go while the run goes on: `tensorboard`, event files in the run folder; `mlflow:URI`, an MLflow
    server too, which MLFLOW_TRACKING_URI names where `mlflow` stands alone (extra `tracking`); `off`."""

    @field_validator("workers", mode="before")
    @classmethod
    def _workers_counted(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @model_validator(mode="after")
    def _workers_read(self) -> "Run":
        if self.workers != "auto":
            low, _, high = self.workers.partition(":")
            if not (low.isdigit() and (high or low).isdigit() and 1 <= int(low) <= int(high or low)):
                raise ValueError(f"workers {self.workers!r} is not MIN:MAX, such as 1:8, 4 or auto")
        return self


class Config(_Frozen):
    network: Network
    preprocess: Preprocess = Preprocess()
    data: Data = Data()
    train: Train = Train()
    validate_: Validate = Field(default=Validate(), alias="validate")
    checkpoint: Checkpoint = Checkpoint()
    run: Run = Run()

    @model_validator(mode="after")
    def _one_thread(self) -> "Config":
        if self.train.reduction == "exact" and (self.run.threads_per_worker or 1) > 1:
            raise ValueError("run.threads_per_worker: with train.reduction `exact` a worker has one thread")
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False)


DEFAULT_RECIPE = "dynunet"
"""For real cases, where none is named."""


def recipe_names() -> list[str]:
    folder = resources.files("raytrain_brats") / "recipes"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def read_recipe(recipe: str) -> bytes:
    """What `load` validates: a recipe's name or a YAML file."""
    if recipe.endswith((".yaml", ".yml")):
        return storage.read_bytes(recipe)
    return (resources.files("raytrain_brats") / "recipes" / f"{recipe}.yaml").read_bytes()


def described(recipe: str, config: "Config") -> str:
    """A recipe in one line: what it makes of the scans and how it trains."""
    edges = config.data.patch_xyz
    patch = f"{edges[0]}^3" if len(set(edges)) == 1 else "x".join(map(str, edges))
    return (
        f"{recipe}{': ' if recipe else ''}{config.network.name}, {config.preprocess.spacing_mm:g} mm, patch {patch}, "
        f"{config.train.epochs} epochs, global batch {config.train.global_batch}"
    )


def load(recipe: str, overrides: tuple[str, ...] = ()) -> Config:
    """The validated config of a recipe name or YAML file with `a.b=c` overrides applied.

    Raises UserError naming the key that is wrong and the nearest ones that exist.
    """
    file, names = recipe.endswith((".yaml", ".yml")), recipe_names()
    if not file and recipe not in names:
        raise UserError(f"recipe {recipe!r} is not known{_near(recipe, names)}; there are {', '.join(names)}")
    where = recipe if file else f"recipe {recipe}"
    try:
        values = read_yaml(read_recipe(recipe))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"recipe file {recipe} does not exist") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{where} holds no `key: value` lines")
    if {"config", "identity"} <= values.keys() and isinstance(values["config"], dict):
        values = values["config"]  # the config.yaml of a run folder
    for override in sorted(overrides, key=lambda o: not o.startswith("network.name=")):  # it may begin the section anew
        _apply(values, override)
    return parse(values, where)


_BRANCHES = (*NAMES, OURS, OWN, "constrained-int", "literal['auto']")
"""What Pydantic adds to a key where a value may be of several kinds."""


def parse(values: dict[str, Any], where: str) -> Config:
    """Validate plain values; `where` (a file or recipe) stands in the error message."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = [str(part) for part in first["loc"] if part not in _BRANCHES]
        key, message = ".".join(location), first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = [*dict.fromkeys(_known_keys(Config))]
            raise UserError(f"{where}: key {key} is not known{_near(key, known)}") from error
        if not key and isinstance(first["input"], dict):  # settings that do not go together, which the message names
            raise UserError(f"{where}: {message}") from error
        raise UserError(f"{where}: {key or 'config'}: {message} (got {first['input']!r})") from error


def own_parts(config: Config) -> dict[str, OwnPart]:
    """{key: part} of all that is no part of this package."""
    wanted = {"network": config.network, "train.loss": config.train.loss, "train.augment.own": config.train.augment.own}
    return {key: part for key, part in wanted.items() if isinstance(part, OwnPart)}


_FREE: dict[str, Any] = {
    "run": True,
    "checkpoint": True,
    "validate_": True,
    "data": {"max_bad_share", "residency"},
    "train": {"micro_batch", "ema_samples"},
}
"""What may change from one start of a run to the next: it does not alter which updates are applied."""


def differences(old: Config, new: Config, longer: bool = False) -> list[str]:
    """`key: old -> new` of every setting that may not change within a run; `longer`: more epochs are no difference."""
    if longer and new.train.epochs > old.train.epochs:
        old = old.model_copy(update={"train": old.train.model_copy(update={"epochs": new.train.epochs})})
    before, after = (flat(c.model_dump(mode="json", by_alias=True, exclude=_FREE)) for c in (old, new))
    keys = sorted(before.keys() | after.keys())
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


class _Loader(yaml.SafeLoader):
    """Safe YAML whose numbers and truth values are 1.2's: `workers: 1:8` is no 68, `kind: off` is a word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:bool")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])


def read_yaml(text: str | bytes) -> Any:
    """The values of a recipe, or of a setting. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def patch_divisor(config: Config) -> int:
    """Patch edges must be multiples of this: the network halves them at every level. Raises UserError for one's own
    network that is not there."""
    if isinstance(config.network, OwnNetwork):
        return parts.divisor(config.network)
    return int(2 ** (config.network.levels - 1))


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write it as key=value, such as train.epochs=20")
    *path, last = key.split(".")
    place = values
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(f"--set {override}: {part} is a value, not a section")
    try:
        value = read_yaml(text)
        if key == "network.name" and place.get(last) != value:
            place.clear()  # options of the recipe's network are none of this one
        place[last] = value
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML") from error


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested sections."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    known: list[str] = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        known.append(key)
        for part in sections_of(field.annotation):
            known += _known_keys(part, f"{key}.")
    return known


def sections_of(kind: Any) -> list[type[BaseModel]]:
    """The sections that a value may be, within unions too."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [model for part in get_args(kind) for model in sections_of(part)]


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    near = near or [k for k in known if k.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]][:3]
    return f"; did you mean {' or '.join(near)}?" if near else ""
