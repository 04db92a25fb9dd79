#!/usr/bin/env bash
# Make an Ubuntu 24.04 instance ready for Ray: fast disk, driver, FSx, Python.
# In: ~/raytrain_brats (the checkout's files), ~/raytrain_brats.env; NVIDIA_DRIVER and TORCH_INDEX, where set.
# Out: /mnt/fast/{spill,cache}; a login shell that finds ray and python. Ray runs it twice on workers, so each part is
# skipped where it is done; an image of your own that has all of it boots in seconds.
set -euo pipefail
. ~/raytrain_brats.env
apt() { sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -yqq "$@"; }

# The instance's own NVMe disks as one, for Ray's spilling and for caches; a folder of the root volume where none are.
if mountpoint -q /opt/dlami/nvme; then # AWS's Deep Learning image has joined them already
  sudo ln -sfnT /opt/dlami/nvme /mnt/fast
elif ! mountpoint -q /mnt/fast; then
  mapfile -t disks < <(lsblk -dpno NAME,MODEL | awk '/Instance Storage/ {print $1}')
  device=${disks[0]:-}
  if ((${#disks[@]} > 1)); then
    device=/dev/md0
    sudo mdadm --create $device --level=0 --force --run --raid-devices=${#disks[@]} "${disks[@]}"
  fi
  sudo mkdir -p /mnt/fast
  if [ -n "$device" ]; then sudo mkfs.xfs -fKq "$device" && sudo mount -o noatime "$device" /mnt/fast; fi
fi
sudo mkdir -p /mnt/fast/spill /mnt/fast/cache
sudo chown "$(id -u)" /mnt/fast/spill /mnt/fast/cache

has_gpu=$(lspci 2>/dev/null | grep -ciE '(3d|vga).*nvidia' || true)
if [ "$has_gpu" -gt 0 ] && ! command -v nvidia-smi >/dev/null; then
  apt update
  apt install "linux-headers-$(uname -r)" "nvidia-driver-${NVIDIA_DRIVER:?}-server"
  sudo apt-mark hold "nvidia-driver-$NVIDIA_DRIVER-server"
  sudo modprobe nvidia
fi

if [ -n "${RAYTRAIN_BRATS_FSX:-}" ] && ! mountpoint -q /fsx; then
  command -v mount.lustre >/dev/null || { echo "error: no Lustre client; see FSx in docs/ec2.md" >&2; exit 1; }
  sudo mkdir -p /fsx
  sudo mount -t lustre -o relatime,flock "$RAYTRAIN_BRATS_FSX" /fsx
fi

if ! command -v raytrain-brats >/dev/null && ! [ -x ~/venv/bin/raytrain-brats ]; then
  [ "$has_gpu" -gt 0 ] || TORCH_INDEX=cpu
  apt update
  apt install python3-venv
  python3 -m venv ~/venv
  if [ -n "${TORCH_INDEX:-}" ]; then # else torch as PyPI has it, for the newest CUDA
    torch=$(grep '^torch==' ~/raytrain_brats/constraints.txt)
    ~/venv/bin/pip install -q "$torch" --index-url "https://download.pytorch.org/whl/$TORCH_INDEX"
  fi
  ~/venv/bin/pip install -q -c ~/raytrain_brats/constraints.txt ~/raytrain_brats
fi
# NCCL finds EFA by AWS's plugin, which lies in one of these folders of AWS's image.
cat > ~/raytrain_brats.profile <<'PROFILE'
. ~/raytrain_brats.env
[ -d ~/venv ] && export PATH=~/venv/bin:$PATH
for lib in /opt/amazon/efa/lib /opt/amazon/ofi-nccl/lib /opt/amazon/ofi-nccl/lib/x86_64-linux-gnu; do
  [ -d $lib ] && export LD_LIBRARY_PATH=$lib:${LD_LIBRARY_PATH:-}
done
true
PROFILE
grep -qs raytrain_brats.profile ~/.bashrc || echo '. ~/raytrain_brats.profile' >> ~/.bashrc
