#!/usr/bin/env bash
# The first process of a rig's machine, in network, mount, pid, host name and ipc namespaces of its own.
# In: FOLDER with authorized_keys, state.json, profile, binds (paths to show as they are), shims (commands to stub).
# Out: an overlay of this system's root with a metadata service, and sshd for user "ubuntu" once the network is there.
set -euo pipefail
folder=$1 ip=$2 gateway=$3 here=$(dirname "$(readlink -f "$0")")
mount --make-rprivate /
mount -t tmpfs -o size=4g tmpfs "$folder/disk"
mkdir "$folder"/disk/{upper,work,root}
root=$folder/disk/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/disk/upper,workdir=$folder/disk/work" "$root"
while read -r path; do
  mkdir -p "$root$path"
  mount --bind "$path" "$root$path" && mount -o remount,bind,ro "$root$path"
done < "$folder/binds"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs -o size=600m,mode=1777 tmpfs "$root/dev/shm"
for link in ptmx:pts/ptmx fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2; do
  ln -s "${link#*:}" "$root/dev/${link%%:*}"
done
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/run"
mkdir -p "$root/run/sshd" "$root/opt/rig" "$root/usr/local/sbin" "$root/mnt/shared"
mount --bind "$folder" "$root/opt/rig"
mount --bind "$folder/../shared" "$root/mnt/shared"
cp "$here/imds.py" "$root/opt/rig/imds.py"
name=ip-${ip//./-}
hostname "$name"
printf '127.0.0.1 localhost\n%s %s\n' "$ip" "$name" > "$root/etc/hosts"
rm -f "$root/etc/resolv.conf" # nothing answers: names outside of the rig fail at once
echo 'nameserver 127.0.0.1' > "$root/etc/resolv.conf"
# User 0 by its first name: no second user is needed, and "~" is /home/ubuntu.
{ echo 'ubuntu:x:0:0::/home/ubuntu:/bin/bash'; grep -v '^ubuntu:' /etc/passwd; } > "$root/etc/passwd"
{ echo 'ubuntu:*:19000:0:99999:7:::'; grep -v '^ubuntu:' /etc/shadow; } > "$root/etc/shadow"
rm -rf "$root/home/ubuntu"
mkdir -p "$root/home/ubuntu/.ssh"
cp "$folder/authorized_keys" "$root/home/ubuntu/.ssh/"
cp "$folder/profile" "$root/home/ubuntu/.bashrc"
echo '. ~/.bashrc' > "$root/home/ubuntu/.profile"
printf '#!/bin/bash\nwhile [[ $1 == *=* || $1 == -* ]]; do shift; done\nexec "$@"\n' > "$root/usr/local/sbin/sudo"
while read -r command; do printf '#!/bin/bash\nexit 0\n' > "$root/usr/local/sbin/$command"; done < "$folder/shims"
printf '#!/bin/bash\n[ "$1 $2" != "-h now" ] || touch /opt/rig/shut-down\n' > "$root/usr/local/sbin/shutdown"
chmod 755 "$root"/usr/local/sbin/*
cat > "$root/etc/ssh/sshd_rig" <<'SSHD'
Port 22
HostKey /opt/rig/host_key
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
UseDNS no
MaxStartups 100
SSHD
ssh-keygen -q -t ed25519 -N '' -f "$folder/host_key"
until ip link show eth0 > /dev/null 2>&1; do sleep 0.1; done
ip link set lo up
ip addr add 169.254.169.254/32 dev lo
ip addr add "$ip/16" dev eth0
ip link set eth0 up
ip route add default via "$gateway"
while read -r address; do ip addr add "$address/32" dev eth0; done < "$folder/public"
exec chroot "$root" /bin/bash -c '
  ulimit -n 65536
  env -i PATH=/usr/bin:/bin "$0" /opt/rig/imds.py /opt/rig/state.json > /opt/rig/imds.log 2>&1 &
  env -i PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin /usr/sbin/sshd -f /etc/ssh/sshd_rig -E /opt/rig/sshd.log
  while :; do wait -n 2> /dev/null || sleep 1; done' "$4"
