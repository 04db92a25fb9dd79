"""How a command ends when it is told to while it starts, and which Ray it joins."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytrain_brats.synthetic.phantom import write_set
from tests.support.commands import COMMANDS, environment, left, listens, start


def interrupted(command: str, place: Path, number: int, delay_s: float) -> None:
    """Start, wait, send; what must hold then."""
    mark = f"{place.name}-{command}-{number}-{delay_s}"
    process = start(command, place, mark)
    while not listens(process.pid):
        time.sleep(0.01)
    time.sleep(delay_s)
    assert process.poll() is None, f"{command} ended before {delay_s} s: the test proves nothing"
    process.send_signal(number)
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted" and said.count("interrupted") == 1, said
    assert "Traceback" not in said and "SIGTERM" not in said and "Exception" not in said, said
    assert not left(mark)


@pytest.mark.parametrize(
    ("command", "number", "delay_s"),
    [
        ("train", signal.SIGTERM, 0.0),
        pytest.param("train", signal.SIGINT, 3.5, marks=pytest.mark.campaign),
        ("train", signal.SIGINT, 9.0),
        ("phantom", signal.SIGTERM, 8.0),
    ],
)
def test_a_signal_while_a_command_starts_ends_it(command: str, number: int, delay_s: float, place: Path) -> None:
    """Amid imports, Ray's start, the trainer's start, tasks: no hang, code 130, one line, no process left."""
    if command == "train":
        write_set(str(place / "data"), cases=6, seed=0, grid=32, anatomy="procedural")
    interrupted(command, place, number, delay_s)


@pytest.mark.campaign
@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_signal_at_any_moment_ends_any_command(command: str, place: Path) -> None:
    """The same at moments half a second apart, by both signals in turn."""
    for half_seconds in range(26):
        folder = place / str(half_seconds)
        write_set(str(folder / "data"), cases=10 if command == "train" else 60, seed=0, grid=32, anatomy="procedural")
        interrupted(command, folder, (signal.SIGTERM, signal.SIGINT)[half_seconds % 2], half_seconds / 2)


@pytest.mark.campaign
def test_a_head_is_joined_until_it_is_stopped_or_loses_its_node(place: Path) -> None:
    """A real one: joined by its file; when stopped, or alone with its node dead, told within a minute."""
    ray = Path(sys.executable).with_name("ray")
    variables = {"RAY_TMPDIR": str(place), "MARK": place.name}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["start", "--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=2"]
    subprocess.run([ray, *arguments], env=environment(**variables), check=True, capture_output=True)
    heads = subprocess.run(["pgrep", "-f", f"gcs_server.*{place}"], capture_output=True, text=True, check=True).stdout
    nodes = subprocess.run(["pgrep", "-f", f"raylet/raylet.*{place}"], capture_output=True, text=True, check=True)
    gcs, raylet = int(heads.split()[0]), int(nodes.stdout.split()[0])

    def phantom(**more: str) -> tuple[int, str, float]:
        began = time.monotonic()
        command = [sys.executable, "-m", "raytrain_brats", "phantom", "--out", "p", "--cases", "1", "--grid", "32"]
        done = subprocess.run(
            command, env=environment(**variables, **more), cwd=place, capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout + done.stderr, time.monotonic() - began

    try:
        code, said, _ = phantom()
        assert code == 0 and "starting one here" not in said, said
        address = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token"}
        os.kill(gcs, signal.SIGSTOP)
        code, said, seconds = phantom(**address)
        assert code == 2 and "unset RAY_ADDRESS" in said and seconds < 120, said
        os.kill(gcs, signal.SIGCONT)
        os.kill(raylet, signal.SIGKILL)
        code, said, seconds = phantom(**address)
        assert code == 2 and "unset RAY_ADDRESS" in said and seconds < 100, said
    finally:
        for pid in (raylet, gcs):
            subprocess.run(["kill", "-9", str(pid)], check=False, capture_output=True)
