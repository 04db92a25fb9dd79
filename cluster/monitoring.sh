#!/usr/bin/env bash
# Prometheus and Grafana on the head: installed where they are missing, started anew for Ray's newest session.
# In: Ray's own configuration (/tmp/ray/session_latest/metrics), cluster/grafana; INSTALL=no: what is missing stays so.
# Out: 127.0.0.1:9090 and :3000; what they keep in ~/prometheus and ~/grafana; logs in /tmp/raytrain_brats-*.log.
# The head runs it in the background, and works all the same where it fails.
set -uo pipefail
exec 9> ~/monitoring.lock
flock 9
here=$(dirname "$(readlink -f "$0")")
session=${RAY_TMPDIR:-/tmp}/ray/session_latest
GRAFANA_VERSION=12.4.3
apt() { sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -yqq "$@"; }

if [ "${INSTALL:-}" != no ] && ! command -v prometheus >/dev/null; then # Ubuntu's own; masked, as it would start and listen on all addresses
  sudo systemctl mask prometheus
  apt update && apt install --no-install-recommends prometheus || echo "warning: no Prometheus could be installed"
fi
grafana=${GRAFANA_HOME:-/usr/share/grafana}
if [ "${INSTALL:-}" != no ] && ! [ -x $grafana/bin/grafana ]; then # Grafana's own, signed with its key
  key=/usr/share/keyrings/grafana.gpg
  curl -fsS https://apt.grafana.com/gpg.key | sudo gpg --dearmor --yes -o $key &&
    echo "deb [signed-by=$key] https://apt.grafana.com stable main" | sudo tee /etc/apt/sources.list.d/grafana.list >/dev/null &&
    apt update && apt install --no-install-recommends grafana=$GRAFANA_VERSION || echo "warning: no Grafana could be installed"
fi

start() { # NAME COMMAND...: end the one of an earlier session, whose list of nodes has had its day
  local name=$1 pid
  shift
  command -v "$1" >/dev/null || return 0
  pid=$(cat ~/$name/pid 2>/dev/null || true)
  if [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$name" ]; then
    kill "$pid"
    for _ in {1..100}; do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
  fi
  mkdir -p ~/$name
  setsid nohup "$@" >> "${TMPDIR:-/tmp}/raytrain_brats-$name.log" 2>&1 < /dev/null 9>&- &
  echo $! > ~/$name/pid
}
for _ in {1..120}; do [ -e "$session/metrics/prometheus/prometheus.yml" ] && break; sleep 0.5; done
start prometheus prometheus --config.file="$session/metrics/prometheus/prometheus.yml" --storage.tsdb.path="$HOME/prometheus" \
  --storage.tsdb.retention.size=10GB --web.listen-address=127.0.0.1:9090
export RAYTRAIN_BRATS_GRAFANA=$here/grafana
start grafana $grafana/bin/grafana server --homepath $grafana --config "$here/grafana/grafana.ini"
