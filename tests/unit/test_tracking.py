"""Curves for TensorBoard and MLflow: each step once, whatever is killed, from what a checkpoint has committed."""

import contextlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorboardX.crc32c
from tensorboardX.proto import event_pb2

from raytrain_brats import config, storage
from raytrain_brats.books import Part
from raytrain_brats.errors import UserError
from raytrain_brats.monitoring import event_files, tracking
from raytrain_brats.monitoring.tracking import Tracking, step_point
from raytrain_brats.run import gains
from tests.support.run_folders import event, step

SAMPLES = 4


class Folder:
    """A run folder as rank 0 and the controller would leave it, by hand."""

    def __init__(self, uri: str, total: int = 40) -> None:
        self.uri, self.generation = uri, 1
        self.spec: Any = SimpleNamespace(
            run_dir=uri, sampler=SimpleNamespace(total=total), config=config.load("demo"), recipe="demo",
            dataset_identity="abc",
        )  # fmt: skip
        self.events = [event("launch", 1000.0, total_samples=total)]
        self.begin(0)

    def put(self, name: str, content: str) -> None:
        storage.write_bytes(f"{self.uri}/{name}", content.encode())

    def begin(self, seen: int, generation: int = 1) -> None:
        """A worker group goes on after so many samples; what older ones wrote beyond counts no more."""
        self.generation = generation
        self.put("generation.json", json.dumps({"number": generation, "samples_seen": seen}))

    def rows(self, first: int, last: int, loss: float = 0.5, committed: bool = True) -> None:
        """Steps of these numbers as one part, and the checkpoint that counts them."""
        rows = [step(n, 1000.0 + n, self.generation) | {"loss": loss} for n in range(first, last + 1)]
        part = Part(SAMPLES * first, SAMPLES * (last + 1), self.generation)
        self.put(f"metrics/{part.name}", "".join(json.dumps(row) + "\n" for row in rows))
        if committed:
            self.put(f"checkpoints/{part.end:012d}-g{self.generation:04d}/MANIFEST.json", "{}")

    def validation(self, seen: int, dice: float, at: float) -> None:
        scores = {"dice": dict.fromkeys(("WT", "TC", "ET"), dice), "hd95_mm": {"WT": 4.0}}
        self.events.append(event("validation", at, samples_seen=seen, **scores))

    def track(self, kind: str = "tensorboard") -> None:
        """One driver from its start to its end."""
        self.put("events/0000000000001-h-1-a.jsonl", "".join(json.dumps(e) + "\n" for e in self.events))
        run = self.spec.config.run.model_copy(update={"tracking": kind})
        self.spec.config = self.spec.config.model_copy(update={"run": run})
        with Tracking(self.spec, every_s=0.01):
            pass

    def points(self, kind: str, tag: str) -> list[tuple[int, float]]:
        """(step, value) of every point in the order of the files, as TensorBoard reads them."""
        found = sorted(name for name in storage.list_files(f"{self.uri}/tensorboard/{kind}"))
        events = [e for name in found for e in records(storage.read_bytes(f"{self.uri}/tensorboard/{kind}/{name}"))]
        return [(e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == tag]


def records(content: bytes) -> Iterator[Any]:
    """Events of a file, by the official messages; each checksum is compared."""
    at = 0
    while at < len(content):
        (length,) = struct.unpack("<Q", content[at : at + 8])
        body = content[at + 12 : at + 12 + length]
        for part, where in ((content[at : at + 8], at + 8), (body, at + 12 + length)):
            crc = tensorboardX.crc32c.crc32c(part)
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            assert struct.unpack("<I", content[where : where + 4]) == (masked,)
        yield event_pb2.Event.FromString(body)
        at += 16 + length


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "run") if request.param == "disk" else request.getfixturevalue("s3_server") + "/run")


def test_each_step_is_told_once_over_kills_and_resumes(folder: Folder) -> None:
    """Only what a checkpoint has committed; the next driver goes on behind it; steps that are done again, and their
    validation, stand there once. On a disk and on S3."""
    folder.rows(0, 2)
    folder.rows(3, 4, committed=False)  # killed before the checkpoint
    folder.validation(12, 0.5, 1010.0)
    folder.track()
    assert folder.points("steps", "loss") == [(4, 0.5), (8, 0.5), (12, 0.5)]

    folder.begin(12, generation=2)
    folder.rows(3, 5, loss=0.25)
    folder.validation(24, 0.6, 1030.0)
    folder.validation(24, 0.6, 1031.0)  # a group was killed behind it, so it was done again
    folder.track()
    folder.track()
    steps = folder.points("steps", "loss")
    assert steps == [(4 * n, 0.5 if n <= 3 else 0.25) for n in range(1, 7)]
    assert folder.points("validation", "dice/WT") == [(12, 0.5), (24, pytest.approx(0.6))]
    assert len(folder.points("validation", "hd95_mm/WT")) == 2


def test_a_damaged_checkpoint_doubles_no_point(tmp_path: Path) -> None:
    """The run goes back before what was told already; its steps are not told again."""
    folder = Folder(str(tmp_path))
    folder.rows(0, 4)
    folder.track()
    folder.begin(8, generation=2)
    folder.rows(2, 6)
    folder.track()
    assert [at for at, _ in folder.points("steps", "loss")] == [4 * n for n in range(1, 8)]


def test_a_long_run_makes_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file for a share of the run, not for each checkpoint; the rest at the end."""
    folder = Folder(str(tmp_path), total=4000)
    follower = Tracking(folder.spec)
    tracker: Any = follower._trackers[0]
    monkeypatch.setattr(tracking, "FILES", 10)
    files = tmp_path / "tensorboard" / "steps"
    for first in range(0, 200, 10):
        folder.rows(first, first + 9)
        follower._bring_up(tracker, last=False)
    assert len(list(files.iterdir())) == 2
    folder.rows(200, 204)
    follower._bring_up(tracker, last=False)
    follower._bring_up(tracker, last=True)
    assert len(list(files.iterdir())) == 3 and len(folder.points("steps", "loss")) == 205


def test_what_a_point_tells(tmp_path: Path) -> None:
    """Loss, rate, speed, waiting and workers at samples_seen; a step without a loss has the others."""
    time, seen, values = step_point(step(1, 7.0))
    assert (time, seen) == (7.0, 8)
    expected = {"loss": 0.5, "learning_rate": 1e-3, "samples_per_s": 2.0, "data_wait_share": 0.25, "workers": 1.0}
    assert values == expected
    assert "loss" not in step_point(step(1, 7.0) | {"loss": None})[2]


def test_the_run_s_artefacts_are_named(tmp_path: Path) -> None:
    """A text with the places of report, evaluation and config, once for each config."""
    folder = Folder(str(tmp_path))
    folder.rows(0, 1)
    folder.track()
    folder.track()
    (file,) = (tmp_path / "tensorboard" / "about").iterdir()
    _, told = records(file.read_bytes())
    (value,) = told.summary.value
    shown = value.tensor.string_val[0].decode()
    assert value.metadata.plugin_data.plugin_name == "text" and value.tag == "run"
    assert all(f"{tmp_path}/{name}" in shown for name in ("report.html", "evaluation/summary.json", "config.yaml"))
    assert "global_batch" in shown


def test_off_writes_nothing_and_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder; an unknown tracker, and MLflow without its library or a server, are a mistake told before the run."""
    folder = Folder(str(tmp_path))
    folder.rows(0, 1)
    folder.track("off")
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(UserError, match=r"run\.tracking"):
        config.load("demo", ("run.tracking=wandb",))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for present, why in ((None, "scripts/venv tracking"), (object(), "MLFLOW_TRACKING_URI")):
        monkeypatch.setattr("importlib.util.find_spec", lambda _, found=present: found)
        with pytest.raises(UserError, match=why):
            tracking.check(config.load("demo", ("run.tracking=mlflow",)).run)
    tracking.check(config.load("demo", ("run.tracking=mlflow:http://h:5000",)).run)
    tracking.check(config.load("demo").run)


def test_a_tracker_that_fails_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread goes on; the same failure is one line, and all is told once it works."""
    folder = Folder(str(tmp_path))
    folder.rows(0, 2)
    follower = Tracking(folder.spec)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        for _ in range(3):
            follower._update()
    assert [r.getMessage() for r in caplog.records] == ["tracking: TensorBoard: no space; tried again"]
    follower._update()
    assert len(folder.points("steps", "loss")) == 3


def test_tensorboard_itself_reads_the_files(tmp_path: Path) -> None:
    """Its own EventAccumulator finds every point, and its text, over the files of two drivers."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = Folder(str(tmp_path), total=4000)
    for first in (0, 300):
        folder.rows(first, first + 299)
        folder.track()
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "steps"), size_guidance={"scalars": 0})
    read.Reload()
    assert [point.step for point in read.Scalars("loss")] == [4 * n for n in range(1, 601)]
    about = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "about"))
    about.Reload()
    assert b"report.html" in about.Tensors("run")[0].tensor_proto.string_val[0]


def test_mlflow_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real store: a second driver goes on in the same MLflow run, behind what a killed call had stored; a new run in
    the same folder is another."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    server = f"sqlite:///{tmp_path}/mlflow.db"
    folder = Folder(str(tmp_path / "run"), total=4000)
    folder.rows(0, 299)
    folder.validation(1200, 0.5, 2000.0)
    client = mlflow.MlflowClient(tracking_uri=server)
    with monkeypatch.context() as patch:
        real, calls = mlflow.MlflowClient.log_batch, []

        def killed(*args: Any, **more: Any) -> Any:
            calls.append(real(*args, **more))
            raise KeyboardInterrupt  # after the first call was stored

        patch.setattr(mlflow.MlflowClient, "log_batch", killed)
        follower = Tracking(folder.spec)
        folder.put("events/0000000000001-h-1-a.jsonl", "".join(json.dumps(e) + "\n" for e in folder.events))
        with contextlib.suppress(KeyboardInterrupt):
            follower._bring_up(tracking.MLflow(folder.spec, server), last=True)
        assert len(calls) == 1
    folder.track(f"mlflow:{server}")
    folder.track(f"mlflow:{server}")

    (experiment,) = [e for e in client.search_experiments() if e.name == "raytrain_brats"]
    (run,) = client.search_runs([experiment.experiment_id])
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(steps) == [4 * n for n in range(1, 301)]
    assert run.data.metrics["dice/WT"] == 0.5 and run.data.tags["raytrain_brats.report"].endswith("run/report.html")
    assert run.info.status == "KILLED" and run.data.params["train.global_batch"]
    folder.events[0]["time"] = 5.0
    folder.track(f"mlflow:{server}")
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_a_run_that_patience_ended_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that reached its last sample; one that was stopped is not."""
    ended: list[bool] = []

    class Noted:
        def told(self) -> tuple[int, int]:
            return 0, 0

        def tell(self, *_: Any) -> None:
            pass

        def end(self, finished: bool) -> None:
            ended.append(finished)

    folder = Folder(str(tmp_path / "run"))
    folder.rows(0, 4)
    folder.put("events/0000000000001-h-1-a.jsonl", "")
    Tracking(folder.spec)._bring_up(Noted(), last=True)
    monkeypatch.setattr(gains, "stalled", lambda *_: "no gain")
    more = folder.spec.config.validate_.model_copy(update={"patience_samples": 8})
    folder.spec.config = folder.spec.config.model_copy(update={"validate_": more})
    Tracking(folder.spec)._bring_up(Noted(), last=True)
    assert ended == [False, True]


def test_numbers_that_are_none_are_kept() -> None:
    """NaN and infinity, negative numbers and large steps survive the format."""
    values = {"a": math.nan, "b": -math.inf, "c": -2.5}
    _, told = records(event_files.scalars([(1.5, 2**40, values)]))
    found = {v.tag: v.simple_value for v in told.summary.value}
    assert told.step == 2**40 and told.wall_time == 1.5
    assert math.isnan(found["a"]) and found["b"] == -math.inf and found["c"] == -2.5
