"""docs/sagemaker.md, typed: its commands, from the file itself, in the order they stand in, with moto for AWS."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.core.responses import BaseResponse

from raytrain_brats.__main__ import main
from tests import account
from tests.conftest import write_msd_folder

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "sagemaker.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
SCRIPT = "".join(BLOCKS)
OWNER = ("cloudformation:", "sts:")
"""What the stack takes, which an administrator makes."""

SHIMS = {
    # a clone is this checkout; its environment is the one the test runs in
    "git": 'mkdir -p "$3/scripts" "$3/.venv/bin"; ln -s "$CHECKOUT"/{cluster,docs,raytrain_brats,LICENSE} "$3"; '
    'touch "$3/.venv/bin/activate"; printf "#!/bin/bash\n" > "$3/scripts/venv"; chmod +x "$3/scripts/venv"',
    "docker": 'echo "docker $*" >> "$TYPED"; case "$*" in *inspect*) echo "sha256:$(printf "%064d" 7)";; '
    '*--password-stdin*) test -n "$(cat)";; esac',
    # what needs a person or a plugin, or moto has not, the CLI itself checks against AWS's model, and sends nothing
    "aws": 'echo "aws $*" >> "$TYPED"; case "$1 ${2-}" in configure*) ;; '
    'ssm*|*stop-training-job) exec "$REAL_AWS" "$@" --generate-cli-skeleton output;; *) exec "$REAL_AWS" "$@";; esac',
    "raytrain-brats": 'echo "raytrain-brats $*" >> "$TYPED"; exec "$PYTHON" "$PROGRAM" "$@"',
}
PROGRAM = """
import dataclasses, sys
from raytrain_brats import download
from raytrain_brats.__main__ import main
known = dataclasses.replace(download.SOURCES["msd"], uri="s3://public/{name}.tar", md5="{md5}")
download.SOURCES["msd"] = known
sys.exit(main())
"""


def real_aws() -> str:
    found = Path(sys.executable).with_name("aws")
    return str(found) if found.exists() else shutil.which("aws") or ""


def publish(folder: Path) -> str:
    """The data set's archive in a public bucket; its md5."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(write_msd_folder(folder / "Task01_BrainTumour"), "Task01_BrainTumour")
    boto3.client("s3").create_bucket(Bucket="public")
    boto3.client("s3").put_object(Bucket="public", Key="Task01.tar", Body=packed.getvalue(), ACL="public-read")
    return hashlib.md5(packed.getvalue()).hexdigest()


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

    md5 = publish(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM.format(name="Task01", md5=md5))
    (tmp_path / "bin").mkdir()
    for name, body in SHIMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(BaseResponse, "call_action", note)
    typed = tmp_path / "typed"
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "CHECKOUT": str(ROOT),
        "TYPED": str(typed),
        "REAL_AWS": aws,
        "PYTHON": sys.executable,
        "PROGRAM": str(tmp_path / "program.py"),
        "PYTHONPATH": str(ROOT),
        "SAGEMAKER_VALIDATE_ROLE": "false",  # moto has no iam:SimulatePrincipalPolicy
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", SCRIPT],
        cwd=tmp_path, env=environment, text=True, timeout=400, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
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
    words = typed.read_text().splitlines()
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


def test_the_page_means_the_same_in_bash_and_zsh() -> None:
    """zsh does not split an unquoted variable, reads `$ME:r` as a modifier, and `#` at its prompt as a word."""
    assert "#" not in SCRIPT and not re.search(r"\$\w+:", SCRIPT)
    for line in SCRIPT.replace("\\\n", " ").splitlines():
        bare = re.sub(r'"[^"]*"|\'[^\']*\'', "", line)
        assert "$" not in re.sub(r"^\w+=\S*", "", bare), line


def test_the_policy_named_in_the_page_is_in_the_template() -> None:
    named = {about["Properties"].get("ManagedPolicyName", "") for about in account.resources().values()}
    assert {"raytrain-brats-launcher-ec2", "raytrain-brats-launcher-sagemaker"} <= named
    assert "raytrain-brats-launcher-*" in PAGE and json.dumps(account.statements("LauncherSageMaker"))
