"""docs/sagemaker.md, typed: its commands, from the file itself, in the order they stand in, with moto for AWS."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.core.responses import BaseResponse

from raytrain_brats.__main__ import main
from tests.support import ROOT
from tests.support import account_template as account
from tests.support import typed_docs as typed
from tests.support.cases import write_msd_folder

PAGE = (ROOT / "docs" / "sagemaker.md").read_text()
SCRIPT = typed.script("sagemaker.md")
OWNER = ("cloudformation:", "sts:")
"""What the stack takes, which an administrator makes."""

STAND_INS = (
    "AWS is moto. `git clone` and `scripts/venv` do nothing, as the test runs in this checkout and environment; `aws "
    "configure` has been answered; `docker` notes what it is asked for; `download` finds cases of a test in place of "
    "MSD; `aws ssm` is checked by the CLI against AWS's model, and prints an example of the answer."
)
SHIMS = {
    # a clone is this checkout; its environment is the one the test runs in
    "git": 'mkdir -p "$3/scripts" "$3/.venv/bin"; ln -s "$CHECKOUT"/{cluster,docs,raytrain_brats,LICENSE} "$3"; '
    'touch "$3/.venv/bin/activate"; printf "#!/bin/bash\n" > "$3/scripts/venv"; chmod +x "$3/scripts/venv"',
    "docker": 'echo "docker $*" >> "$TYPED"; case "$*" in *inspect*) echo "sha256:$(printf "%064d" 7)";; '
    '*--password-stdin*) test -n "$(cat)";; esac',
    # what needs a person or a plugin, or moto has not, the CLI itself checks against AWS's model, and sends nothing
    "aws": 'echo "aws $*" >> "$TYPED"; case "$1 ${2-}" in configure*) ;; '
    'ssm*|*stop-training-job) exec "$REAL_AWS" "$@" --generate-cli-skeleton output;; *) exec "$REAL_AWS" "$@";; esac',
    "raytrain-brats": 'echo "raytrain-brats $*" >> "$TYPED"; exec "$PROGRAM" "$@"',
}


def real_aws() -> str:
    found = Path(sys.executable).with_name("aws")
    return str(found) if found.exists() else shutil.which("aws") or ""


def test_the_page_can_be_typed(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a fresh account to a job, a look into it, its end: each command ends well, the job is as the page says,
    the stack is gone and the data are there; and nobody called AWS beyond the launchers' policy."""
    pytest.importorskip("sagemaker.train.model_trainer", reason="the SageMaker SDK is an extra: scripts/venv sagemaker")
    if not (aws := real_aws()):
        pytest.skip("the AWS CLI is not here: pip install awscli, in an environment of its own")
    boto3.client("logs").create_log_group(
        logGroupName="/aws/sagemaker/TrainingJobs"
    )  # SageMaker does, with the first line
    calls: set[str] = set()
    answer = BaseResponse.call_action

    def note(self: Any) -> Any:
        if self.service_name != "s3":
            calls.add(f"{self.service_name}:{self._get_action()}")
        return answer(self)

    typed.publish(boto3.client("s3"), write_msd_folder(tmp_path / "Task01_BrainTumour"), tmp_path / "program")
    (tmp_path / "bin").mkdir()
    for name, body in SHIMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(BaseResponse, "call_action", note)
    words_of = tmp_path / "words"
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "CHECKOUT": str(ROOT),
        "TYPED": str(words_of),
        "REAL_AWS": aws,
        "PROGRAM": str(tmp_path / "program"),
        "PYTHONPATH": str(ROOT),
        "SAGEMAKER_VALIDATE_ROLE": "false",  # moto has no iam:SimulatePrincipalPolicy
    }
    transcript = typed.Transcript("sagemaker.md", STAND_INS, [(str(tmp_path), "~")])
    terminal = typed.Terminal(tmp_path, environment, transcript)
    try:
        for command in typed.commands("sagemaker.md"):
            terminal.type(command)
    finally:
        terminal.close()
    transcript.keep()
    assert {call for call in calls if not call.startswith(OWNER)} <= account.actions("LauncherSageMaker")

    me = "123456789012"
    jobs = boto3.client("sagemaker").list_training_jobs(SortBy="CreationTime")["TrainingJobSummaries"]
    about = [boto3.client("sagemaker").describe_training_job(TrainingJobName=job["TrainingJobName"]) for job in jobs]
    mine = [job for job in about if job["RoleArn"] == f"arn:aws:iam::{me}:role/raytrain-brats-sagemaker"]
    assert [job["HyperParameters"]["run_dir"] for job in mine] == [
        f"s3://brats-runs-{me}/run",
        f"s3://brats-runs-{me}/second",
    ]
    image = mine[0]["AlgorithmSpecification"]["TrainingImage"]
    words = words_of.read_text().splitlines()
    assert f"docker push {image}" in words and any(f"-t {image} ." in line for line in words)
    assert any("--build-arg BASE=python:3.11-slim-bookworm@sha256:" in line for line in words)
    cases = boto3.client("s3").list_objects_v2(Bucket=f"brats-data-{me}", Prefix="Task01_BrainTumour/imagesTr/")
    assert cases["KeyCount"] == 3
    roles = [role["RoleName"] for role in boto3.client("iam").list_roles()["Roles"]]
    assert "raytrain-brats-sagemaker" not in roles


def commands(program: str) -> list[list[str]]:
    """Words of each command line of the page that runs `program`, whole lines only."""
    joined = SCRIPT.replace("\\\n", " ")
    return [line.split() for line in joined.splitlines() if line.startswith(f"{program} ")]


@pytest.mark.parametrize("words", commands("raytrain-brats"), ids=lambda words: " ".join(words[1:3]))
def test_our_commands_have_these_options(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--help of each command names every option that the page gives it."""
    name = words[1:3] if words[1] == "sagemaker" else words[1:2]
    monkeypatch.setattr(sys, "argv", ["raytrain-brats", *name, "--help"])
    assert main() == 0
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.skipif(not shutil.which("docker"), reason="no docker client here")
@pytest.mark.parametrize("words", commands("docker"), ids=lambda words: words[1])
def test_docker_has_these_options(words: list[str]) -> None:
    """The client's own --help; nothing is built."""
    said = subprocess.run(["docker", words[1], "--help"], capture_output=True, text=True).stdout
    assert {word for word in words if re.match("--?[a-z]", word)} <= set(re.findall(r"--?[a-z][a-z-]*", said))


def test_the_policy_named_in_the_page_is_in_the_template() -> None:
    named = {about["Properties"].get("ManagedPolicyName", "") for about in account.resources().values()}
    assert {"raytrain-brats-launcher-ec2", "raytrain-brats-launcher-sagemaker"} <= named
    assert "raytrain-brats-launcher-*" in PAGE and json.dumps(account.statements("LauncherSageMaker"))
