"""The command inside every container of a job: makes one Ray cluster of them and runs one command on it.

In: /opt/ml as SageMaker lays it out; `host train`, with hyperparameters for options, or `host prepare --data ...`.
Out: the same exit code on every host: 0 done, 143 stopped and saved, else failed; the cause in /opt/ml/output/failure;
after `train` the model, config and report in /opt/ml/model.

The head listens; the others (peers) connect and say who they are. It tells all of them at once to start Ray, and later
how the command ended. No host polls, or continues without the others.
"""

import contextlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

from raytrain_brats import storage
from raytrain_brats.errors import RunFailed, UserError
from raytrain_brats.sagemaker import rendezvous
from raytrain_brats.sagemaker.rendezvous import Channel, Cluster

RAY_PORT = 6379
DASHBOARD, DASHBOARD_PORT = "RAYTRAIN_BRATS_DASHBOARD", 8265
STOPPED = 143
"""Exit code after SIGTERM, as a shell would give it: never 0, which would call a job done that is not."""
PARTING_S = 10.0
LOGS_BYTES = 5_000_000
"""Of each of Ray's log files, its end, is kept."""


class Stopped(Exception):  # noqa: N818 - not an error
    """SIGTERM before there was anything to save."""


def command(root: Path, given: list[str]) -> list[str]:
    """What to run: as given, but that `train` alone takes its options from the hyperparameters."""
    path = root / "input/config/hyperparameters.json"
    if given != ["train"] or not path.exists():
        return given
    values = json.loads(path.read_text())
    recipe = values.get("recipe", "")
    if recipe.startswith("{"):  # the content of a file that the launching machine had
        place = Path(os.environ.get("TMPDIR", "/tmp")) / "recipe.yaml"  # noqa: S108 - in a container of our own
        place.write_text(recipe)
        values["recipe"] = str(place)
    known = ("data", "store", "run_dir", "recipe", "workers")
    options = [f"--{key.replace('_', '-')}={values[key]}" for key in known if values.get(key)]
    return ["train", *options, *(f"--set={change}" for change in json.loads(values.get("set") or "[]"))]


def option(arguments: list[str], name: str) -> str:
    """Value of --name=VALUE or --name VALUE; empty when it is not there."""
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == f"--{name}":
            return after
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2]
    return ""


def program(name: str) -> list[str]:
    return [sys.executable, "-u", "-m", f"raytrain_brats.{name}"]


def start_ray(cluster: Cluster, deadline: float) -> str:
    """Start this host's part of the Ray cluster; its head's address. Raises RunFailed."""
    head = f"{rendezvous.address_of(cluster.head, deadline)}:{RAY_PORT}"
    # Nothing but Systems Manager's tunnel, which ends inside the container, reaches the dashboard.
    shown = ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={DASHBOARD_PORT}"]
    shown = shown if os.environ.get(DASHBOARD) else ["--include-dashboard=false"]
    part = ["--head", f"--port={RAY_PORT}", *shown]
    part = part if cluster.me == cluster.head else [f"--address={head}"]
    started = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", *part),
        f"--node-ip-address={rendezvous.address_of(cluster.me, deadline)}",
        f"--labels=role={cluster.group},sagemaker-host={cluster.me}",
        *shlex.split(os.environ.get("RAYTRAIN_BRATS_RAY_START", "")),
    ]
    ended = subprocess.run(started, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603
    if ended.returncode:
        raise RunFailed(f"Ray did not start on {cluster.me}: {' '.join(ended.stdout.split())[-600:]}")
    print(f"host: Ray runs on {cluster.me} ({cluster.group})", flush=True)
    return head


class Host:
    """One container's life. `run` returns the exit code."""

    def __init__(self, root: Path, arguments: list[str]) -> None:
        self._root, self._arguments = root, arguments
        self._driver: subprocess.Popen[str] | None = None
        self._to_head: Channel | None = None
        self._stopping = False
        self._cluster: Cluster | None = None

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            code, cause = self._run()
        except Exception as error:  # noqa: BLE001 - any error must be shown in the console
            code, cause = _verdict(error)
        self._keep_logs()
        if code and code != STOPPED:
            _write_failure(self._root, cause)
        print(f"host: {f'ends with {code}: {cause}' if code else 'done'}", file=sys.stderr, flush=True)
        return code

    def _run(self) -> tuple[int, str]:
        cluster = self._cluster = rendezvous.read_cluster(self._root)
        deadline = time.monotonic() + float(os.environ.get("RAYTRAIN_BRATS_JOIN_S", "900"))
        arguments = command(self._root, self._arguments)
        run_dir, store = option(arguments, "run-dir"), option(arguments, "store")
        if not run_dir and not store:
            raise UserError("`host` runs `train` or `prepare`, with a --run-dir or --store that all containers see")
        place = run_dir or f"{store.rstrip('/')}-job"  # in the store itself `prepare` takes no files but its own
        token = rendezvous.shared_token(place)
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "GLOO_SOCKET_IFNAME": cluster.interface,
            "NCCL_SOCKET_IFNAME": cluster.interface,
            # workers on all hosts import what this process runs, wherever it lies
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
            "RAY_health_check_period_ms": "1000",  # a host that is lost is noticed in seconds
            "RAY_health_check_timeout_ms": "2000",
        }
        print(f"host: {cluster.me} of {len(cluster.hosts)}, head {cluster.head}: {shlex.join(arguments)}", flush=True)
        return (self._lead if cluster.me == cluster.head else self._follow)(cluster, token, deadline, arguments)

    def _lead(self, cluster: Cluster, token: str, deadline: float, arguments: list[str]) -> tuple[int, str]:
        channels: dict[str, Channel] = {}
        with socket.create_server(("", rendezvous.PORT), reuse_port=False) as server:
            try:
                rendezvous.gather(cluster, token, server, deadline, channels)
                os.environ["RAY_ADDRESS"] = start_ray(cluster, deadline)
                for channel in channels.values():
                    channel.send("join")
                for host, channel in channels.items():
                    self._await_join(host, channel, deadline)
                verdict = self._work(channels, arguments)
            except Exception as error:  # noqa: BLE001 - the peers must be told
                verdict = _verdict(error)
            self._part(channels, *verdict)
        return verdict

    def _await_join(self, host: str, channel: Channel, deadline: float) -> None:
        try:
            message = channel.receive(max(1.0, deadline - time.monotonic()))
        except TimeoutError:
            message = "time is up"
        if message == "stop":
            raise Stopped
        if message != "joined":
            raise RunFailed(f"{host} did not join: {message or 'its container ended'}")

    def _work(self, channels: dict[str, Channel], arguments: list[str]) -> tuple[int, str]:
        """Run the command here, on all hosts' resources; (exit code, cause)."""
        code, cause = self._run_command(arguments, channels)
        if code and self._stopping:
            return STOPPED, "stopped; the same job goes on from its last checkpoint"
        if code == 0 and arguments[0] == "train":
            run_dir = option(arguments, "run-dir")
            self._run_command(["report", f"--run-dir={run_dir}"], channels)
            export(run_dir, self._root / "model")
        return code, cause

    def _run_command(self, arguments: list[str], channels: dict[str, Channel]) -> tuple[int, str]:
        name, *rest = arguments
        tail: deque[str] = deque(maxlen=40)
        ran = [*program(name), *rest]
        self._driver = subprocess.Popen(ran, stderr=subprocess.PIPE, text=True, errors="replace")  # noqa: S603

        def tee(stream: Any) -> None:
            for channel in stream:
                sys.stderr.write(channel)
                sys.stderr.flush()
                tail.append(channel)

        reader = threading.Thread(target=tee, args=(self._driver.stderr,), daemon=True)
        reader.start()
        if self._stopping:  # SIGTERM came before there was a process
            self._driver.terminate()
        sockets = {channel.socket: (host, channel) for host, channel in channels.items()}
        while self._driver.poll() is None:
            readable, _, _ = select.select(list(sockets), [], [], 0.5)
            for there in [at for at, (_, channel) in sockets.items() if at in readable or channel.pending]:
                host, channel = sockets[there]
                with contextlib.suppress(TimeoutError):
                    message = channel.receive(1.0)
                    if message == "stop":  # any host's SIGTERM stops the job: the service takes all of them
                        self._on_sigterm()
                    elif message is None:  # Ray and the run notice that by themselves, and may continue
                        print(f"host: {host} is gone", flush=True)
                        del sockets[there]
        reader.join(5)
        code, self._driver = self._driver.returncode, None
        errors = [line.strip() for line in tail if line.startswith(("failed:", "error:"))]
        return (code if 0 <= code < 256 else 1), (errors[-1] if errors else "".join(tail)) if code else ""

    def _part(self, channels: dict[str, Channel], code: int, cause: str) -> None:
        """Tell every peer how it ended, and wait until they have received it."""
        for channel in channels.values():
            channel.send({"code": code, "cause": f"{self._name()}: {cause}" if cause else ""})
        until = time.monotonic() + PARTING_S
        for channel in channels.values():
            with contextlib.suppress(TimeoutError):
                while channel.receive(max(0.1, until - time.monotonic())) is not None:
                    pass

    def _follow(self, cluster: Cluster, token: str, deadline: float, arguments: list[str]) -> tuple[int, str]:
        channel = rendezvous.call(cluster, token, deadline)
        self._to_head = channel
        if self._stopping:
            channel.send("stop")
        while True:
            message = channel.receive()
            if message == "join":
                try:
                    start_ray(cluster, deadline)
                    channel.send("joined")
                except (RunFailed, OSError) as error:
                    channel.send(str(error))
            elif isinstance(message, dict):
                return int(message["code"]), str(message["cause"])
            elif self._stopping:
                return STOPPED, "stopped"
            else:
                return 1, f"{cluster.head}, the head, ended without a message; see its log"

    def _on_sigterm(self, *_: Any) -> None:
        """The run saves its state; a host that runs none yet just ends. The service kills after 120 s."""
        first, self._stopping = not self._stopping, True
        if not first:
            return
        print("host: SIGTERM: saving", flush=True)
        if self._to_head:
            self._to_head.send("stop")
        elif self._driver:
            self._driver.terminate()
        else:
            raise Stopped

    def _name(self) -> str:
        return self._cluster.me if self._cluster else "?"

    def _keep_logs(self) -> None:
        """Copy Ray's log files to where the service uploads them to S3; they would be lost with the instance."""
        source = Path("/tmp/ray/session_latest/logs")  # noqa: S108 - Ray's own fixed place
        if not (self._root / "checkpoints").is_dir() or not source.is_dir():
            return
        kept = self._root / "checkpoints" / "ray-logs" / os.environ.get("TRAINING_JOB_NAME", "job") / self._name()
        with contextlib.suppress(OSError):
            kept.mkdir(parents=True, exist_ok=True)
            for path in source.glob("*.*"):
                if path.is_file() and path.stat().st_size:
                    (kept / path.name).write_bytes(storage.read_tail(str(path), LOGS_BYTES))


def export(run_dir: str, model: Path) -> None:
    """The finished run without its older checkpoints: a run folder that `predict` and `evaluate` take."""
    from raytrain_brats.run import checkpoint  # imports torch; the peers never need it

    found, _ = checkpoint.newest_valid(run_dir)
    if found is None:
        raise RunFailed(f"{run_dir} has no valid checkpoint")
    wanted = ("config.yaml", "manifest.jsonl", "report.html")
    for name in storage.list_files(run_dir):
        if name in wanted or name.startswith(("validation/", "metrics/", f"checkpoints/{found.name}/")):
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            (model / name).write_bytes(storage.read_bytes(storage.join(run_dir, name)))


def _verdict(error: Exception) -> tuple[int, str]:
    """(exit code, cause) of what was raised, by itself or while it was handled."""
    if isinstance(error, Stopped):
        return STOPPED, "stopped before the run began"
    expected = isinstance(error, RunFailed | UserError | OSError)
    return 1, str(error) if expected else "".join(traceback.format_exception(error))


def _write_failure(root: Path, cause: str) -> None:
    """Where the console reads why a job failed: 1,024 characters of it."""
    training = (root / "input/config").is_dir()
    place = root / "output" / ("failure" if training else "message")
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(cause[-1024:])


def main(name: str, argv: list[str] | None = None) -> int:
    arguments = argv or []
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: raytrain-brats sagemaker {name} COMMAND [OPTIONS ...]\n\n{__doc__}\n  --help")
        return 0
    return Host(Path(os.environ.get("RAYTRAIN_BRATS_ML", "/opt/ml")), arguments).run()


if __name__ == "__main__":
    sys.exit(main("host", sys.argv[1:]))
