#!/usr/bin/env bash
# Train on machines that Slurm gives: `sbatch cluster/slurm/train.sh`, with options of `train` behind it (docs/slurm.md).
#SBATCH --job-name=raytrain_brats
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@180
# In: RAYTRAIN_BRATS_DATA or _STORE, RAYTRAIN_BRATS_RUN_DIR (a folder that all nodes see, or s3://), RAYTRAIN_BRATS_RECIPE;
# the environment with raytrain-brats on the PATH of all nodes; RAY_HEAD_IP, where the first node has several networks.
# Out: the run folder; train's exit code. Three minutes before the time is over, or when Slurm wants the nodes back
# (--signal), the run saves and the job is queued again, where it goes on; RAYTRAIN_BRATS_REQUEUE=no leaves that out, and
# so does `scancel --signal=INT --batch JOB`, which saves and ends.
set -uo pipefail
ulimit -n "$(ulimit -Hn)"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over from sbatch
export RAY_AUTH_MODE=token RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # when nodes are told to end, train has saved; Ray would wait 30 s on each
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(python -c 'import secrets; print(secrets.token_hex(32))')} # other people's jobs share the network
ip=${RAY_HEAD_IP:-$(hostname -I | awk '{print $1}')}
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node
options=(--block --disable-usage-stats "--num-cpus=$SLURM_CPUS_PER_TASK")
if [ "${SLURM_MEM_PER_NODE:-0}" -gt 0 ]; then # Ray would take its share of the whole machine
  options+=("--object-store-memory=$((SLURM_MEM_PER_NODE * 1048576 * 3 / 10))")
fi

on() { # NODE COMMAND...: one step a node, so that a node that fails ends no other's
  local node=$1
  shift
  srun --nodes=1 --ntasks=1 --nodelist="$node" --no-kill "$@" &
  steps+=($!)
}
steps=()
on "${nodes[0]}" ray start --head "--node-ip-address=$ip" "--port=$port" "--temp-dir=/tmp/ray-$SLURM_JOB_ID" "${options[@]}"
for _ in {1..240}; do (exec 3<> "/dev/tcp/$ip/$port") 2> /dev/null && break; sleep 0.5; done
for node in "${nodes[@]:1}"; do on "$node" ray start "--address=$ip:$port" "${options[@]}"; done
for _ in {1..60}; do # those that come later are used, too; but `train` counts what is there
  [ "$(ray status "--address=$ip:$port" 2> /dev/null | grep -c '^ 1 node_')" -ge ${#nodes[@]} ] && break
  sleep 1
done

told=no
RAY_ADDRESS=$ip:$port raytrain-brats train "$@" &
driver=$!
trap 'told=yes; kill -TERM $driver 2> /dev/null' TERM
trap 'kill -TERM $driver 2> /dev/null' INT # by a person: it saves and is not queued again
wait $driver
while kill -0 $driver 2> /dev/null; do wait $driver; done # a signal ends `wait`, not the driver: it saves now
wait $driver # bash still knows how it ended
code=$?
trap '' TERM INT
if [ $told = yes ] && [ $code -ne 0 ] && [ "${RAYTRAIN_BRATS_REQUEUE:-yes}" = yes ]; then
  echo "told to end: job $SLURM_JOB_ID is queued again, and its next turn goes on from the newest checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
fi
for part in "${steps[*]:1}" "${steps[0]}"; do # the head last: the others say goodbye to it
  [ -z "$part" ] || { kill $part; wait $part; } 2> /dev/null
done
exit $code
