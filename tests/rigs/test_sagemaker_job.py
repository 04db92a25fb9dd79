"""SageMaker jobs end to end: two data hosts and two train hosts as containers, S3 on this machine.

The requests are what `sagemaker launch` and `process` print; the entry is the image's. Needs root, the SDK, minutes.
"""

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from raytrain_brats import books, s3, sagemaker, storage, verify
from raytrain_brats.run import checkpoint
from raytrain_brats.sagemaker import host
from raytrain_brats.synthetic.phantom import write_set
from tests.support import containers
from tests.support.containers import NETWORK, Job, Network

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(bool(containers.missing()), reason=f"no containers: {containers.missing()}"),
]
HEAD = "algo-1"
SMALL = (
    *("preprocess.spacing_mm=7.5", "data.patch_xyz=[16, 16, 16]", "train.epochs=40", "validate.every_samples=640"),
    *("checkpoint.every_samples=160", "run.cpus_per_worker=0.5", "run.workers=2", "validate.max_cases=1"),
)
RAY = "--num-cpus=1 --object-store-memory=150000000"  # four containers share two cores

Start = Callable[..., Job]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Network]]:
    """S3 that the containers reach, and the network."""
    with Network() as network:
        server = ThreadedMotoServer(ip_address=f"{NETWORK}1", port=0, verbose=False)
        server.start()
        url = f"http://{NETWORK}1:{server.get_host_and_port()[1]}"
        for name, value in (
            ("AWS_ENDPOINT_URL", url),
            ("AWS_ACCESS_KEY_ID", "testing"),
            ("AWS_SECRET_ACCESS_KEY", "testing"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="rig-bucket")
        s3.client.cache_clear()
        yield url, network
        s3.client.cache_clear()
        # what the stand-in holds outlives its server, in this process
        urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST"), timeout=10).close()
        server.stop()


@pytest.fixture
def start(endpoint: tuple[str, Network], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Start]:
    """Run what `launch` would send, as containers; the same job again is another attempt at it."""
    pytest.importorskip("sagemaker.train.model_trainer", reason="the SageMaker SDK is an extra: scripts/venv sagemaker")
    jobs: list[Job] = []

    def run(*options: str, step: str = "launch", absent: tuple[str, ...] = ()) -> Job:
        given = ("--role", "arn:aws:iam::123456789012:role/brats", "--image", "raytrain-brats:1", "--dry-run")
        given += ("--recipe", "demo", "--env", f"RAYTRAIN_BRATS_RAY_START={RAY}")
        sizes = ("--spot", "--data-instances", "ml.m5.xlarge:2", "--train-instances", "ml.c5.xlarge:2")
        training = (*sizes, *(f"--set={change}" for change in SMALL)) if step == "launch" else ()
        capsys.readouterr()
        assert sagemaker.main([step, *given, *training, *options]) == 0
        request: dict[str, Any] = json.loads(capsys.readouterr().out)
        jobs.append(Job(request, tmp_path / f"attempt{len(jobs) + 1}", endpoint[1], endpoint[0], absent))
        return jobs[-1]

    yield run
    for job in jobs:
        job.close()


def put_cases(folder: Path, cases: int = 10) -> str:
    write_set(str(folder), cases, seed=0, grid=32, anatomy="procedural")
    for name in storage.list_files(str(folder)):
        storage.write_bytes(f"s3://rig-bucket/cases/{name}", (folder / name).read_bytes())
    return "s3://rig-bucket/cases"


def rows_until(job: Job, run_dir: str, number: int, timeout_s: float = 400) -> None:
    deadline = time.monotonic() + timeout_s
    while len(books.read_rows(run_dir)) < number:
        assert job.processes[HEAD].poll() is None, job.log(HEAD)[-4000:]
        assert time.monotonic() < deadline, job.log(HEAD)[-4000:]
        time.sleep(1)


def test_a_job_that_is_interrupted_goes_on_and_finishes(start: Start, tmp_path: Path) -> None:
    """The dashboard is on the head's loopback, for who has the token. SIGTERM in the middle: saved in time. Again: on
    from that very step, to the end, every sample once."""
    places = ("--data", put_cases(tmp_path / "cases"), "--run-dir", (run_dir := "s3://rig-bucket/run"))
    first = start(*places, "--remote-debug")
    rows_until(first, run_dir, 12)
    token = storage.read_bytes(f"{run_dir}/sagemaker/ray_token").decode()
    assert first.ask(HEAD, f"http://127.0.0.1:{host.DASHBOARD_PORT}/api/version") == "401"
    assert first.ask(HEAD, f"http://127.0.0.1:{host.DASHBOARD_PORT}/api/version", token) == "200"
    assert first.ask("algo-2", f"http://{NETWORK}10:{host.DASHBOARD_PORT}/api/version", token) == "000"
    began = time.monotonic()
    first.sigterm()
    status, codes = first.wait(200, stopping=True)
    assert (status, set(codes.values())) == ("Stopped", {host.STOPPED}), first.log(HEAD)[-4000:]
    assert time.monotonic() - began < 100
    assert not any(first.failure(name) for name in first.hosts)
    at = books.read_rows(run_dir)[-1]["samples_seen"]
    found, _ = checkpoint.newest_valid(run_dir)
    # not one step is to be done again
    assert found is not None and found.samples_seen == at, first.log(HEAD)[-4000:]
    first.close()

    second = start(*places)
    status, codes = second.wait(500)
    assert (status, set(codes.values())) == ("Completed", {0}), second.log(HEAD)[-4000:]
    groups = [event for event in books.read_events(run_dir) if event["event"] == "group"]
    assert [group["redone_steps"] for group in groups] == [0] * len(groups)
    assert verify.main(["--run-dir", run_dir]) == 0
    kept = storage.list_files("s3://rig-bucket/run/sagemaker")
    (job,) = {name.split("/")[1] for name in kept if name.startswith("output/")}
    model = {name.removeprefix(f"output/{job}/output/model/") for name in kept}
    assert {"config.yaml", "report.html"} <= model and any(name.startswith("metrics/") for name in model)
    assert any(name.endswith("tensors.safetensors") for name in model)
    assert all(any(f"/{name}/" in path for path in kept if path.startswith("hosts/")) for name in second.hosts)
    lines = {name: second.log(name) for name in second.hosts}
    assert "Ray runs on algo-1 (data)" in lines["algo-1"] and "Ray runs on algo-4 (train)" in lines["algo-4"]


def test_a_job_that_fails_says_why_on_every_host(start: Start, tmp_path: Path) -> None:
    """Cases that cannot be read: status Failed, the trainer's own words in each failure file."""
    data = put_cases(tmp_path / "cases")
    for name in storage.list_files(data):
        if name.startswith("imagesTr/"):
            storage.write_bytes(f"{data}/{name}", storage.read_bytes(f"{data}/{name}")[:-2000])
    job = start("--data", data, "--run-dir", "s3://rig-bucket/run")
    status, codes = job.wait(400)
    assert status == "Failed" and set(codes.values()) == {1}, job.log(HEAD)[-4000:]
    assert all("cannot be read" in job.failure(name) for name in job.hosts), job.failure(HEAD)


def test_a_host_that_never_comes_up_ends_the_job(start: Start) -> None:
    """Within the deadline, by name, on all the others."""
    places = ("--data", "s3://rig-bucket/cases", "--run-dir", "s3://rig-bucket/run", "--join-minutes", "0.25")
    began = time.monotonic()
    job = start(*places, absent=("algo-3",))
    status, codes = job.wait(120)
    assert status == "Failed" and set(codes.values()) == {1}, job.log(HEAD)[-4000:]
    assert time.monotonic() - began < 60
    assert all("algo-3 did not come up within" in job.failure(name) for name in codes)


def test_a_processing_job_fills_the_store_with_all_its_hosts(start: Start, tmp_path: Path) -> None:
    """`prepare` over two instances: every case in the store, which `train --store` would read."""
    data = put_cases(tmp_path / "cases")
    job = start("--data", data, "--store", "s3://rig-bucket/store", "--instances", "ml.m5.xlarge:2", step="process")
    status, codes = job.wait(400)
    assert (status, codes) == ("Completed", {"algo-1": 0, "algo-2": 0}), job.log(HEAD)[-4000:]
    assert "10 cases prepared, 0 set aside" in job.log(HEAD)
    assert "Ray runs on algo-2" in job.log("algo-2")
    assert len([name for name in storage.list_files("s3://rig-bucket/store") if name.startswith("objects/")]) == 10
