#!/usr/bin/env bash
# Install the package of ~/raytrain_brats into ~/venv; again when its files have changed, as a second `ray up` brings them.
# In: TORCH_INDEX, where torch is not to be PyPI's, which is for the newest CUDA (cpu, cu126).
# Out: ~/venv. Where the image has the package in a place of its own and there is no ~/venv, that is left alone.
set -euo pipefail
cd ~/raytrain_brats
stamp=$(find . -type f ! -path '*/__pycache__/*' ! -path './cluster/*' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
if [ -d ~/venv ]; then
  [ "$(cat ~/venv/stamp 2>/dev/null)" != "$stamp" ] || exit 0
elif command -v raytrain-brats >/dev/null; then
  exit 0
fi
[ -x ~/venv/bin/pip ] || python3 -m venv ~/venv
if [ -n "${TORCH_INDEX:-}" ]; then
  ~/venv/bin/pip install -q "$(grep '^torch==' constraints.txt)" --index-url "https://download.pytorch.org/whl/$TORCH_INDEX"
fi
~/venv/bin/pip install -q -c constraints.txt . # a folder is installed anew, also in the same version
echo "$stamp" > ~/venv/stamp
