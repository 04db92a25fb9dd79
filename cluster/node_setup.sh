#!/usr/bin/env bash
# Make an Ubuntu 24.04 instance ready for Ray: fast disk, driver, FSx, Python.
# In: ~/raytrain_brats (the checkout's files), ~/raytrain_brats.env; NVIDIA_DRIVER, TORCH and TORCH_INDEX, where set.
# Out: /mnt/fast/{spill,cache}; a login shell that finds ray and python. Ray runs it twice on workers, and a second
# `ray up` again on the head: each part is skipped where it is done; an image of your own that has all of it boots in
# seconds.
set -euo pipefail
. ~/raytrain_brats.env
apt() { sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -yqq "$@"; }

# Nothing is upgraded under a run: a new driver library beside the loaded kernel module ends CUDA.
sudo systemctl disable --now unattended-upgrades apt-daily.timer apt-daily-upgrade.timer || true

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
  sudo modprobe nvidia
fi
if [ "$has_gpu" -gt 0 ]; then # the driver, its libraries and the kernel it is for, whoever installed them
  dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' '*nvidia*' 'libcuda*' 'linux-image-*' 'linux-headers-*' 'linux-aws*' 2>/dev/null |
    awk '$1 == "ii" {print $2}' | xargs -r sudo apt-mark hold
fi

if [ -n "${RAYTRAIN_BRATS_FSX:-}" ] && ! mountpoint -q /fsx; then
  if ! command -v mount.lustre >/dev/null; then # AWS's own packages, for Ubuntu's AWS kernels
    key=/usr/share/keyrings/fsx-ubuntu-public-key.gpg
    curl -fsS https://fsx-lustre-client-repo-public-keys.s3.amazonaws.com/fsx-ubuntu-public-key.asc | sudo gpg --dearmor --yes -o $key
    echo "deb [signed-by=$key] https://fsx-lustre-client-repo.s3.amazonaws.com/ubuntu $(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/fsxlustreclientrepo.list >/dev/null
    apt update
    apt install "lustre-client-modules-$(uname -r)" || {
      echo "error: AWS has no Lustre client for kernel $(uname -r); see FSx in docs/ec2.md" >&2
      exit 1
    }
  fi
  sudo mkdir -p /fsx
  sudo mount -t lustre -o relatime,flock "$RAYTRAIN_BRATS_FSX" /fsx
fi

if ! [ -d ~/venv ] && ! command -v raytrain-brats >/dev/null; then
  apt update
  apt install python3-venv
fi
[ "$has_gpu" -gt 0 ] || TORCH_INDEX=cpu
TORCH=${TORCH:-} TORCH_INDEX=${TORCH_INDEX:-} bash ~/raytrain_brats/cluster/install.sh
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
