"""cluster/slurm/train.sh on stand-ins of Slurm, Ray and `train`: who is started where, how a job ends and goes on."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import ROOT

SCRIPT = ROOT / "cluster" / "slurm" / "train.sh"
FAKES = {
    "ray": """#!/usr/bin/env bash
echo "ray $SLURMD_NODENAME $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $*" >> "$SLURM_LOG"
if [[ $1 == status ]]; then
  grep -c "^ray node. token 64 start" "$SLURM_LOG" | xargs seq | sed 's/.*/ 1 node_x/'
  exit
fi
trap 'echo "ray $SLURMD_NODENAME ended" >> "$SLURM_LOG"; kill $(jobs -p) 2> /dev/null; exit 0' TERM
if [[ $* == *--head* ]]; then
  python -m http.server --bind 127.0.0.1 "$(sed 's/.*--port=\\([0-9]*\\).*/\\1/' <<< "$*")" > /dev/null 2>&1 &
fi
while :; do sleep 0.1; done
""",
    "raytrain-brats": """#!/usr/bin/env bash
echo "$* at $RAY_ADDRESS" >> "$SLURM_LOG"
trap 'sleep 0.5; echo saved >> "$SLURM_LOG"; exit 130' TERM
for _ in $(seq "${STEPS:-1}"); do sleep 0.1; done
exit ${CODE:-0}
""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a login node."""
    (tmp_path / "bin").mkdir()
    for name, text in FAKES.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{ROOT / 'tests/support/slurm'}:{os.environ['PATH']}"
    job = str(os.getpid() * 7 % 20000 + 20000)
    return os.environ | {
        "PATH": path,
        "SLURM_LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": job,
        "RAY_HEAD_IP": "127.0.0.1",
    }


def lines(slurm: dict[str, str]) -> list[str]:
    log = Path(slurm["SLURM_LOG"])
    return log.read_text().splitlines() if log.exists() else []


def test_the_head_first_then_a_step_for_each_node(slurm: dict[str, str]) -> None:
    """Head on the first node, one step a node, all with the same token and the job's share of memory; then `train` with
    the options given, joined to that head; at its end all steps end, and its exit code is the job's."""
    command = ["sbatch", SCRIPT, "--set", "train.epochs=2"]
    done = subprocess.run(command, env=slurm | {"CODE": "3", "MEMORY_MB": "1000", "CPUS": "4"}, timeout=60, check=False)
    assert done.returncode == 3
    log = lines(slurm)
    port = 20000 + int(slurm["SLURM_JOB_ID"]) % 20000
    started = [line for line in log if line.startswith("ray ") and " start " in line]
    assert [line.split()[1] for line in started] == ["node1", "node2"]
    assert f"--head --node-ip-address=127.0.0.1 --port={port}" in started[0]
    assert f"--address=127.0.0.1:{port}" in started[1]
    for line in started:
        assert "token 64 start" in line and "--block" in line and "--num-cpus=4" in line
        assert "--object-store-memory=314572800" in line
    assert log.index(started[0]) < log.index(f"train --set train.epochs=2 at 127.0.0.1:{port}")
    assert log.index("ray node2 ended") < log.index("ray node1 ended"), "the head goes last"
    assert not [line for line in log if "requeue" in line]


@pytest.mark.parametrize(
    ("sent", "requeue", "again"), [(signal.SIGTERM, "yes", 1), (signal.SIGTERM, "no", 0), (signal.SIGINT, "yes", 0)]
)
def test_a_job_that_is_told_to_end_saves_and_is_queued_again(
    slurm: dict[str, str], sent: signal.Signals, requeue: str, again: int
) -> None:
    """SIGTERM reaches `train` alone, Ray stays up until it has saved; then Slurm is asked for another turn. Not where
    nobody wants it, nor after SIGINT, which is a person's."""
    environment = slurm | {"STEPS": "300", "RAYTRAIN_BRATS_REQUEUE": requeue}
    job = subprocess.Popen(["sbatch", SCRIPT], env=environment, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    while time.monotonic() < until and not any(line.startswith("train") for line in lines(slurm)):
        time.sleep(0.1)
    job.send_signal(sent)
    assert job.wait(timeout=30) == 130
    log = lines(slurm)
    assert log.index("saved") < min(n for n, line in enumerate(log) if line.endswith(" ended"))
    asked = f"scontrol requeue {slurm['SLURM_JOB_ID']}"
    assert log.count(asked) == again
    assert job.stdout and job.stdout.read().count("its next turn goes on from the newest checkpoint") == again


def test_slurm_is_asked_for_what_the_page_says() -> None:
    """A node that fails ends no job, the batch shell alone is warned in time, and logs of all turns stay."""
    asked = set(re.findall(r"^#SBATCH (--\S+)", SCRIPT.read_text(), re.M))
    assert {"--no-kill", "--requeue", "--open-mode=append", "--signal=B:TERM@180", "--ntasks-per-node=1"} <= asked
    page = (ROOT / "docs" / "slurm.md").read_text()
    assert not [option for option in asked if option.partition("=")[0] not in page and "job-name" not in option]
