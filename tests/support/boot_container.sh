#!/bin/bash
# One container of tests/support/containers.py, inside fresh namespaces (net, mount, pid, uts, ipc): an overlay of this
# machine's root, its own /proc, /dev, /dev/shm, /tmp, /run and /opt/ml; then the entry as PID 1.
# Usage: boot_container.sh FOLDER HOST SHM ENTRY...   FOLDER holds ml/, env, hosts; RIG_BIND names what /tmp would hide.
set -e
FOLDER=$1 HOST=$2 SHM=$3
shift 3
mount --make-rprivate /
mkdir -p "$FOLDER/fs"
mount -t tmpfs -o size=4g tmpfs "$FOLDER/fs"
ROOT=$FOLDER/fs/root
mkdir -p "$FOLDER/fs/upper" "$FOLDER/fs/work" "$ROOT"
mount -t overlay overlay -o "lowerdir=/,upperdir=$FOLDER/fs/upper,workdir=$FOLDER/fs/work" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount -t sysfs sysfs "$ROOT/sys"
mount -t tmpfs -o mode=755 tmpfs "$ROOT/dev"
for device in null zero full random urandom tty; do
  touch "$ROOT/dev/$device"
  mount --bind "/dev/$device" "$ROOT/dev/$device"
done
mkdir -p "$ROOT/dev/shm"
ln -s /proc/self/fd "$ROOT/dev/fd"
mount -t tmpfs -o "size=$SHM,mode=1777" tmpfs "$ROOT/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$ROOT/tmp"
mount -t tmpfs tmpfs "$ROOT/run"
IFS=: read -ra BIND <<< "$RIG_BIND"
for place in "${BIND[@]}"; do
  mkdir -p "$ROOT$place"
  mount --bind "$place" "$ROOT$place"
  mount -o remount,bind,ro "$ROOT$place"
done
mkdir -p "$ROOT/opt/ml"
mount --bind "$FOLDER/ml" "$ROOT/opt/ml"
hostname "$HOST"
cp "$FOLDER/hosts" "$ROOT/etc/hosts"
mapfile -t ENVIRONMENT < "$FOLDER/env"
exec chroot "$ROOT" /usr/bin/env -i "${ENVIRONMENT[@]}" "$@"
