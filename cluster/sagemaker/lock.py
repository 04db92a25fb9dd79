"""Write requirements.lock anew: `python cluster/sagemaker/lock.py`; every package of the image, by version and hash.

In: requirements.txt, constraints.txt; the network, but for the packages themselves.
Out: requirements.lock: what pip would install on Linux, x86-64, Python 3.11, from PyPI alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLATFORMS = [f"manylinux{old}_x86_64" for old in ("1", "2010", "2014", *(f"_2_{n}" for n in range(17, 37)))]
MORE = ("torch==2.13.0", "dumb-init==1.2.5.post1")
HEAD = """\
# Every package of cluster/sagemaker/Dockerfile by default: Linux, x86-64, Python 3.11, torch for CUDA 13.
# Written by cluster/sagemaker/lock.py from requirements.txt and constraints.txt.
"""


def report() -> list[dict[str, str]]:
    """{name, version, sha256} of what pip would install; nothing is installed."""
    own = ("PIP_CONFIG_FILE", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONSTRAINT")
    environment = {name: value for name, value in os.environ.items() if name not in own} | {
        "PIP_CONFIG_FILE": os.devnull
    }
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--report=-"]
    pip += ["--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--target=nowhere"]
    pip += [f"--platform={name}" for name in PLATFORMS]
    given = ["-c", str(ROOT / "constraints.txt"), "-r", str(HERE / "requirements.txt"), *MORE]
    done = subprocess.run([*pip, *given], env=environment, stdout=subprocess.PIPE, check=True)  # noqa: S603
    rows = [
        {**row["metadata"], "sha256": row["download_info"]["archive_info"]["hashes"]["sha256"]}
        for row in json.loads(done.stdout)["install"]
    ]
    return sorted(rows, key=lambda row: row["name"].lower())


def main() -> None:
    lines = [f"{row['name']}=={row['version']} --hash=sha256:{row['sha256']}\n" for row in report()]
    (HERE / "requirements.lock").write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
