"""Tell TensorBoard, and MLflow where it is asked for, how a run goes. Runs in the driver.

In: rows of steps that a committed checkpoint counts, and validations, as the books have them.
Out: event files in the run folder's `tensorboard/`, on a disk as on S3; an MLflow run.

The step of a point is `samples_seen`. A point is told once, whatever is killed: each tracker's own record says how far
it was told (names of files, a metric of the MLflow run), a file or a call carries the record with its points, and what
lies beyond the newest checkpoint waits, since it may be done again. The run needs nothing of this: what fails is
logged once and tried again.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from raytrain_brats import books, storage
from raytrain_brats.config import Run
from raytrain_brats.errors import UserError
from raytrain_brats.monitoring import event_files
from raytrain_brats.monitoring.event_files import Point
from raytrain_brats.run import checkpoint, driver
from raytrain_brats.run.repeated import Repeated
from raytrain_brats.run.run_dir import RunDir
from raytrain_brats.run.spec import RunSpec

_logger = logging.getLogger(__name__)
EVERY_S, PATIENCE_S = 10.0, 60.0
FILES = 500
"""A run's points are told in at most so many files or calls, and one more at each end."""
SERVER = "MLFLOW_TRACKING_URI"
_MOST_POINTS = 1000
"""Of a call to MLflow: its own limit."""
_TOLD = re.compile(rf"(?P<kind>steps|validation)/{re.escape(event_files.NAME)}\d+-(?P<end>\d+)")


class Tracker(Protocol):
    """Where points go."""

    def told(self) -> tuple[int, int]:
        """The samples of the newest step and of the newest validation that are there."""

    def tell(self, steps: Sequence[Point], validations: Sequence[Point]) -> None:
        """Add points beyond those that are there."""

    def end(self, finished: bool) -> None:
        """This driver ends."""


def check(options: Run) -> None:
    """Refuse what cannot be done, before the run begins. Raises UserError."""
    if options.tracking.startswith("mlflow"):
        if importlib.util.find_spec("mlflow") is None:
            raise UserError(
                f"run.tracking={options.tracking}: MLflow is not installed; scripts/venv tracking installs it, "
                "run.tracking=tensorboard needs nothing"
            )
        if not _server(options):
            raise UserError(f"run.tracking=mlflow: name the server by mlflow:URI, or by {SERVER}")


def _server(options: Run) -> str:
    return options.tracking.partition(":")[2] or os.environ.get(SERVER, "")


class Tracking(Repeated):
    """Follow a run from the driver, in a thread, for the time of a `with` block; the rest is told at its end."""

    def __init__(self, spec: RunSpec, every_s: float = EVERY_S, patience_s: float = PATIENCE_S) -> None:
        super().__init__("tracking", self._update, every_s, patience_s)
        self._spec, self._warned = spec, dict[str, str]()
        kind = spec.config.run.tracking
        self._trackers: list[Tracker] = [] if kind == "off" else [TensorBoard(spec)]
        if kind.startswith("mlflow"):
            self._trackers.append(MLflow(spec, _server(spec.config.run)))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.alive and self._trackers:
            _logger.warning("tracking: not all is told yet; the next start of the run goes on with it")

    def _update(self) -> None:
        """As `Repeated` does it, but what fails again and again is said once."""
        for tracker in self._trackers:
            try:
                self._bring_up(tracker, last=self._over)
                why = ""
            except Exception as error:  # noqa: BLE001 - a server that is away is no matter of the run
                why = " ".join(str(error).split())[:600]
            name = type(tracker).__name__
            if why and why != self._warned.get(name):
                _logger.warning("tracking: %s: %s; tried again", name, why)
            self._warned[name] = why

    def _bring_up(self, tracker: Tracker, last: bool) -> None:
        """Tell what a checkpoint has committed since; small amounts only at the end."""
        run_dir, total = self._spec.run_dir, self._spec.sampler.total
        seen = max((samples for _, samples, _ in checkpoint.committed(run_dir)), default=0)
        if not seen:
            return
        at, validated = tracker.told()
        if last or seen - at >= total / FILES:
            rows = [row for row in books.read_rows(run_dir, at) if row["samples_seen"] <= seen] if seen > at else []
            scored = {
                event["samples_seen"]: event  # one that was done again counts once
                for event in books.read_events(run_dir)
                if event.get("event") == "validation" and validated < event["samples_seen"] <= seen
            }
            tracker.tell(list(map(step_point, rows)), [validation_point(scored[n]) for n in sorted(scored)])
        if last:
            tracker.end(bool(driver.end_of(self._spec, seen)))


def step_point(row: Mapping[str, Any]) -> Point:
    """A row of an applied step."""
    seconds, (first, end) = max(row["step_s"], 1e-9), row["positions"]
    values = {"loss": row["loss"], "learning_rate": row["lr"], "samples_per_s": (end - first) / seconds}
    values |= {"data_wait_share": min(1.0, row["wait_s"] / seconds), "workers": row["world_size"]}
    return row["time"], row["samples_seen"], {tag: float(v) for tag, v in values.items() if v is not None}


def validation_point(event: Mapping[str, Any]) -> Point:
    values = {f"{what}/{region}": v for what in ("dice", "hd95_mm") for region, v in event.get(what, {}).items()}
    return event["time"], event["samples_seen"], {tag: float(v) for tag, v in values.items()}


def places(run_dir: str) -> dict[str, str]:
    """Where the run's artefacts are, or will be once the commands of that name ran."""
    run = RunDir(run_dir)
    evaluation = storage.join(run.evaluation, "summary.json")
    return {"run": run.uri, "config": run.config, "report": run.report, "evaluation": evaluation}


class TensorBoard:
    """Event files, put whole: `steps/` with names that say from which sample to which, `validation/`, `about/`."""

    def __init__(self, spec: RunSpec) -> None:
        self._folder = RunDir(spec.run_dir).tensorboard
        self._spec = spec
        self._told: tuple[int, int] | None = None

    def told(self) -> tuple[int, int]:
        if self._told is None:
            found = list(filter(None, map(_TOLD.fullmatch, storage.list_files(self._folder))))
            steps, validated = (
                max((int(m["end"]) for m in found if m["kind"] == kind), default=0) for kind in ("steps", "validation")
            )
            self._told = steps, validated
            self._tell_about()
        return self._told

    def tell(self, steps: Sequence[Point], validations: Sequence[Point]) -> None:
        assert self._told is not None
        told = list(self._told)
        for number, (kind, points) in enumerate((("steps", steps), ("validation", validations))):
            if points:
                name = f"{event_files.NAME}{told[number]:012d}-{points[-1][1]:012d}"
                storage.write_bytes(storage.join(self._folder, kind, name), event_files.scalars(points))
                told[number] = points[-1][1]
        self._told = told[0], told[1]

    def end(self, finished: bool) -> None:
        """Files need no end."""

    def _tell_about(self) -> None:
        """A text: where the artefacts are, and the config; again when it has changed."""
        rows = [f"| {what} | `{where}` |" for what, where in places(self._spec.run_dir).items()]
        settings = "".join(f"    {line}\n" for line in self._spec.config.to_yaml().splitlines())
        table = "\n".join(["| what | where |", "|---|---|", *rows])
        content = f"{table}\n\nRecipe {self._spec.recipe or '-'}:\n\n{settings}"
        name = f"{event_files.NAME}{hashlib.sha256(content.encode()).hexdigest()[:12]}"
        target = storage.join(self._folder, "about", name)
        if not storage.exists(target):
            step = self._told[0] if self._told else 0
            storage.write_bytes(target, event_files.text("run", content, time.time(), step))


class MLflow:
    """One MLflow run of a run folder, found again by a tag; how far it was told is a metric of it."""

    def __init__(self, spec: RunSpec, server: str) -> None:
        self._spec, self._server = spec, server
        self._run_id, self._told, self._client = "", (0, 0), None

    def told(self) -> tuple[int, int]:
        if not self._run_id:
            self._open()
        return self._told

    def _open(self) -> None:
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # else it complains where there is no git
        from mlflow import MlflowClient  # here, as it takes 0.1 GB

        client: Any = MlflowClient(tracking_uri=self._server)
        name, key = os.environ.get("MLFLOW_EXPERIMENT_NAME", "raytrain_brats"), _key(self._spec.run_dir)
        experiment = client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else client.create_experiment(name)
        found = client.search_runs([number], f"tags.\"raytrain_brats.key\" = '{key}'", max_results=1)
        if found:
            run, known = found[0], found[0].data.metrics
            self._told = int(known.get("samples_seen", 0)), int(known.get("validated_samples", 0))
            client.update_run(run.info.run_id, "RUNNING")
        else:
            where = {f"raytrain_brats.{what}": place for what, place in places(self._spec.run_dir).items()}
            tags = {"raytrain_brats.key": key, "mlflow.runName": self._spec.run_dir.rpartition("/")[2]} | where
            run = client.create_run(number, tags=tags)
            for name, value in self._settings().items():
                client.log_param(run.info.run_id, name, value)
        self._client, self._run_id = client, run.info.run_id

    def _settings(self) -> dict[str, str]:
        """The settings that cannot change within the run, by section."""
        about = self._spec.config.model_dump(mode="json", by_alias=True, exclude={"run", "checkpoint", "validate_"})
        flat = {f"{section}.{key}": json.dumps(v) for section, values in about.items() for key, v in values.items()}
        return flat | {"recipe": self._spec.recipe or "-", "dataset_identity": self._spec.dataset_identity}

    def tell(self, steps: Sequence[Point], validations: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        for number, (how_far, points) in enumerate((("samples_seen", steps), ("validated_samples", validations))):
            calls: list[list[Any]] = [[]]
            for at, step, tags in points:  # a call holds whole points, each with the record of how far it tells
                values = dict(tags) | {how_far: float(step)}
                metrics = [Metric(tag, value, int(1e3 * at), step) for tag, value in values.items()]
                if len(calls[-1]) + len(metrics) > _MOST_POINTS:
                    calls.append([])
                calls[-1] += metrics
            for metrics in filter(None, calls):
                assert self._client
                self._client.log_batch(self._run_id, metrics=metrics)
                told = list(self._told)
                told[number] = metrics[-1].step
                self._told = told[0], told[1]

    def end(self, finished: bool) -> None:
        if self._client:
            self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")


def _key(run_dir: str) -> str:
    """What tells this run from a later one in the same folder: its first event, as for `report`."""
    events = books.read_events(run_dir)
    about = [storage.normal(run_dir), events[0]] if events else [storage.normal(run_dir)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
