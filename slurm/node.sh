#!/usr/bin/env bash
# One node's torchrun; srun starts this once a node. A request to stop (USR1, or the TERM of a preemption) goes on
# to the processes that torchrun has started. Slurm signals this script alone (proctrack/cgroup) or all that it has
# started (proctrack/linuxproc), so torchrun, which USR1 would kill, is deaf to it.
set -uo pipefail

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
(
  trap '' USR1
  exec "$PEAR_PYTHON" -m torch.distributed.run --nnodes="$SLURM_STEP_NUM_NODES" --nproc-per-node="$PEAR_PROCESSES" \
    --rdzv-backend=c10d --rdzv-id="$PEAR_RENDEZVOUS_ID" --rdzv-endpoint="$PEAR_RENDEZVOUS_ENDPOINT" "$@"
) &
torchrun=$!

children() { grep -lsE "^PPid:[[:space:]]+$1\$" /proc/[0-9]*/status | cut -d/ -f3; }

ask_to_stop() {
  trap '' USR1 TERM
  interrupted=1
  while kill -0 "$torchrun" 2>/dev/null; do  # a process that is just starting does not listen yet
    # shellcheck disable=SC2046  # one word a process
    kill -USR1 $(children "$torchrun") 2>/dev/null
    sleep 5
  done &
}
trap ask_to_stop USR1 TERM

interrupted=1
while ((interrupted)); do  # a trapped signal ends `wait`
  interrupted=0
  wait "$torchrun"
  code=$?
done
exit "$code"
