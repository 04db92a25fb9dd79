"""The commands as functions, for notebooks and programs: values instead of lines, exceptions instead of exit codes.

In: keyword arguments named as the options of the command, `_` for `-`.
Out: a `Run`, a `Store`, an `Evaluation`, paths; or UserError and RunFailed, whose one line is the command's.

    from raytrain_brats.api import evaluate, predict, prepare, train

    store = prepare(data="data", store="store", recipe="dynunet")
    run = train(store=store.path, run_dir="run", recipe="dynunet", set={"train.epochs": 20})

The import is cheap: Ray and torch come with the first call. A Ray of this process is used, else the one that
RAY_ADDRESS names or that `ray start` left, else one is started, and stays until the process ends or `ray.shutdown()`.
An interrupt saves a checkpoint, disconnects Ray and raises KeyboardInterrupt; the same call goes on from there.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from raytrain_brats import books, home, storage
from raytrain_brats import config as configs
from raytrain_brats.config import Config
from raytrain_brats.errors import RunFailed, UserError

__all__ = [
    "Config", "Evaluation", "Run", "RunFailed", "Store", "UserError", "evaluate", "load_config", "load_run", "phantom",
    "predict", "prepare", "train",
]  # fmt: skip

Place = str | os.PathLike[str]
"""A local path or s3://."""
Changes = Mapping[str, Any] | Sequence[str]
"""Settings of a recipe to change: {"train.epochs": 20}, or ["train.epochs=20"]."""
Row = dict[str, Any]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run folder, read when asked: while the run trains, its lists grow."""

    path: str
    config: Config = field(repr=False)
    convention: str
    """What label values mean, such as "msd"."""
    dataset_identity: str
    """Of every case's checksum, preprocessing and label convention."""

    @property
    def rows(self) -> list[Row]:
        """A row for each applied step, in order: step, samples_seen, loss, lr, world_size, step_s, wait_s ..."""
        return books.read_rows(self.path, torn=[])

    @property
    def events(self) -> list[Row]:
        """What happened, by time: {"event": "launch", "time": ...}."""
        return books.read_events(self.path)

    @property
    def validations(self) -> list[Row]:
        """{samples_seen, dice: {WT, TC, ET}, hd95_mm: {...}, ...} of held-out cases while training, in order."""
        found = {e["samples_seen"]: e for e in self.events if e["event"] == "validation"}  # the last of each counts
        return [found[seen] for seen in sorted(found)]

    @property
    def last(self) -> Row | None:
        """The newest validation; None before the first."""
        return next(iter(reversed(self.validations)), None)

    @property
    def best(self) -> Row | None:
        """The validation of the greatest mean Dice over regions; None before the first."""
        return max(self.validations, key=lambda v: sum(v["dice"].values()) / len(v["dice"]), default=None)

    @property
    def samples_seen(self) -> int:
        return int(rows[-1]["samples_seen"]) if (rows := self.rows) else 0

    @property
    def finished(self) -> bool:
        """Whether it ended by itself: at its last sample, or early, as `validate.patience_samples` asks."""
        ends = [e["event"] for e in self.events if e["event"] in ("launch", "finish")]
        return ends[-1:] == ["finish"]

    @property
    def evaluation(self) -> "Evaluation | None":
        """What `evaluate` left in the run folder; None before that."""
        return _evaluation(storage.join(self.path, "evaluation"))


@dataclass(frozen=True)
class Store:
    """What `prepare` made."""

    path: str
    cases: tuple[str, ...]
    set_aside: list[dict[str, str]]
    """{case, uri, reason, detail} of each case that cannot be used."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of whole cases: what the columns are, docs/metrics.md says."""

    path: str
    summary: Row = field(repr=False)
    """Means and what they are of: {"dice": {WT, TC, ET}, "hd95_mm": {...}, "cases", "checkpoint", "columns", ...}."""
    rows: list[Row] = field(repr=False)
    """A row for each case: {"case": "BRATS_001", "dice_WT": 0.91, ...}; a metric without a value is
    None, and which of both is empty is a word."""


def _told(function: Callable[P, T]) -> Callable[P, T]:
    """Errors of one line, of our own classes: what comes from a task of Ray is of a class that prints a traceback."""

    @functools.wraps(function)
    def called(*given: P.args, **named: P.kwargs) -> T:
        home.provide()
        try:
            return function(*given, **named)
        except (UserError, RunFailed) as error:
            kind = UserError if isinstance(error, UserError) else RunFailed
            line = " ".join(str(getattr(error, "cause", error)).splitlines())
            if type(error) is kind and str(error) == line:
                raise
            raise kind(line) from error

    return called


@_told
def load_config(recipe: str = configs.DEFAULT_RECIPE, set: Changes = ()) -> Config:  # noqa: A002 - the option's name
    """The settings of a recipe, with changes. Raises UserError that names the key which is wrong."""
    return configs.load(recipe, _changes(set))


@_told
def load_run(run_dir: Place) -> Run:
    """The run in a folder, also while it trains. Raises UserError when there is none."""
    from raytrain_brats.run import spec

    path = storage.normal(os.fspath(run_dir))
    run = spec.open_run(path)
    return Run(path, run.config, run.convention, run.dataset_identity)


@_told
def phantom(*, out: Place, cases: int = 20, grid: int = 60, seed: int = 0, **more: Any) -> str:
    """The folder with so many synthetic cases in MSD layout, to try things on. As `raytrain-brats phantom`."""
    from raytrain_brats import phantom as command

    command.work(_args(command.Args, out=out, cases=cases, grid=grid, seed=seed, **more))
    return storage.normal(os.fspath(out))


@_told
def prepare(
    *,
    data: Place = "",
    store: Place = "",
    recipe: str | Config = "",
    set: Changes = (),  # noqa: A002
    **more: Any,
) -> Store:
    """Preprocess all cases once, into a store; again it makes only what is missing. As `raytrain-brats prepare`.

    `more`: any other option of the command, such as codec="lz4" or strict=True. Raises UserError, RunFailed.
    """
    from raytrain_brats import cli
    from raytrain_brats import prepare as command
    from raytrain_brats.data import manifest as manifests

    with _recipe(recipe) as name:
        command.work(_args(command.Args, data=data, store=store, recipe=name, set=_changes(set), **more))
    path = storage.normal(cli.default(os.fspath(store), "STORE"))
    cases = tuple(case.id for case in manifests.read(storage.join(path, "index.jsonl")).cases)
    return Store(path, cases, json.loads(storage.read_bytes(storage.join(path, "quarantine.json"))))


@_told
def train(
    *,
    run_dir: Place = "",
    data: Place = "",
    store: Place = "",
    recipe: str | Config = "",
    workers: int | str = "",
    fold: int | None = None,
    set: Changes = (),  # noqa: A002
    **more: Any,
) -> Run:
    """Train, or go on where the run stands; returns when the last sample is trained. As `raytrain-brats train`.

    `fold`: train without that one, into RUN_DIR/fold-K; all five side by side are the command's (`--fold all`).
    `more`: any other option of the command. Raises UserError, RunFailed; on an interrupt KeyboardInterrupt, after
    a checkpoint.
    """
    from raytrain_brats import cli
    from raytrain_brats import train as command
    from raytrain_brats.run import spec

    path = cli.run_folder(os.fspath(run_dir))
    one = "" if fold is None else str(fold)
    if one == "all":
        raise UserError(
            "train(fold='all'): a notebook trains one fold at a time; `raytrain-brats train --fold all` all"
        )
    options: dict[str, Any] = {"run_dir": path, "data": data, "store": store, "workers": str(workers), "fold": one}
    with _recipe(recipe) as name:
        command.work(_args(command.Args, recipe=name, set=_changes(set), **options, **more))
    return load_run(spec.fold_run(path, int(one)) if one else path)


@_told
def evaluate(
    *,
    run_dir: Place = "",
    data: Place = "",
    store: Place = "",
    split: Literal["auto", "val", "train", "all"] = "auto",
    mirror: bool = True,
    predictions: Place = "",
    out: Place = "",
    **more: Any,
) -> Evaluation:
    """Score whole cases by a run's newest checkpoint, or any program's label volumes. As `raytrain-brats evaluate`.

    `more`: any other option of the command, such as overlays=0. Raises UserError, RunFailed.
    """
    from raytrain_brats import cli
    from raytrain_brats import evaluate as command

    options: dict[str, Any] = {"data": data, "store": store, "split": split, "mirror": mirror}
    options |= {"run_dir": run_dir, "predictions": predictions, "out": out}
    command.work(_args(command.Args, **options, **more))
    where = os.fspath(out) if predictions else storage.join(cli.run_folder(os.fspath(run_dir)), "evaluation")
    found = _evaluation(storage.normal(where))
    assert found is not None, "it was just written"
    return found


@_told
def predict(
    images: Place | Sequence[Place],
    *,
    out: Place,
    run_dir: Place | Sequence[Place] = (),
    mirror: bool = True,
    save_probabilities: bool = False,
    **more: Any,
) -> list[str]:
    """Paths of the label volumes of these images, in order; those that were there already are not made again. As
    `raytrain-brats predict`.

    `run_dir`: one run, or several whose probabilities are averaged. `more`: any other option of the command. Raises
    UserError, and RunFailed when a case has no prediction.
    """
    from raytrain_brats import predict as command

    options: dict[str, Any] = {"images": _several(images), "run_dir": _several(run_dir), "out": out, "mirror": mirror}
    return command.work(_args(command.Args, **options, save_probabilities=save_probabilities, **more))


def _evaluation(path: str) -> Evaluation | None:
    from raytrain_brats.reporting import scores

    try:
        summary = json.loads(storage.read_bytes(storage.join(path, "summary.json")))
    except FileNotFoundError:
        return None
    rows = scores.read(storage.read_bytes(storage.join(path, "cases.csv")).decode())
    return Evaluation(path, summary, [{name: _number(name, text) for name, text in row.items()} for row in rows])


def _number(column: str, text: str) -> Any:
    if column == "case" or not text:
        return text or None
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def _several(places: Place | Sequence[Place]) -> tuple[str, ...]:
    given = [places] if isinstance(places, str | os.PathLike) else places
    return tuple(os.fspath(place) for place in given)


def _changes(given: Changes) -> tuple[str, ...]:
    """As --set takes them. Raises UserError for what is neither."""
    if isinstance(given, str):
        raise UserError(f'set="{given}": give {{"train.epochs": 20}}, or a list of such strings')
    if isinstance(given, Mapping):
        return tuple(f"{key}={_yaml(value)}" for key, value in given.items())
    return tuple(given)


def _yaml(value: Any) -> str:
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    except yaml.YAMLError as error:
        raise UserError(f"{value!r} is no value of a recipe; give numbers, texts, lists and dicts") from error
    return text.removesuffix("...\n").strip()


@contextlib.contextmanager
def _recipe(given: str | Config) -> Iterator[str]:
    """The name of a recipe; of a Config that of a file which holds it."""
    if isinstance(given, str):
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(given.to_yaml())
        yield str(file)


def _args(kind: type[T], **given: Any) -> T:
    """The options of a command, checked. Raises UserError for one that it has not, or of another type."""
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    command = f"{kind.__module__.rpartition('.')[2]}()"
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise UserError(f"{command} has no option {name!r}; {hint}")
    plain = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
    try:
        return TypeAdapter(kind).validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{command}, {where}: {first['msg']} (got {first['input']!r})") from error
