#!/usr/bin/env bash
# Install the package of ~/raytrain_brats into ~/venv; again when its files have changed, as a second `ray up` brings them.
# In: TORCH, where it is not to be the version of constraints.txt; TORCH_INDEX, where it is not to be PyPI's, which is for
# the newest CUDA (cpu, cu126). For V100: TORCH=2.8.0 TORCH_INDEX=cu126 (docs/ec2.md says why).
# Out: ~/venv. Where the image has the package in a place of its own and there is no ~/venv, that is left alone.
set -euo pipefail
cd ~/raytrain_brats
stamp=$(find . -type f ! -path '*/__pycache__/*' ! -path './cluster/*' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
stamp="$stamp ${TORCH:-} ${TORCH_INDEX:-}"
if [ -d ~/venv ]; then
  [ "$(cat ~/venv/stamp 2>/dev/null)" != "$stamp" ] || exit 0
elif command -v raytrain-brats >/dev/null; then
  exit 0
fi
[ -x ~/venv/bin/pip ] || python3 -m venv ~/venv
torch=$(sed -n 's/^torch==//p' constraints.txt)
torch=${TORCH:-$torch}
{ # else the next line would put the tested version in its place
  grep -v '^torch==' constraints.txt
  echo "torch==$torch"
} > ~/venv/constraints.txt
if [ -n "${TORCH_INDEX:-}" ]; then
  ~/venv/bin/pip install -q "torch==$torch" --index-url "https://download.pytorch.org/whl/$TORCH_INDEX"
fi
~/venv/bin/pip install -q -c ~/venv/constraints.txt . # a folder is installed anew, also in the same version
echo "$stamp" > ~/venv/stamp
