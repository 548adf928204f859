# What the sbatch scripts share; they source it. It runs on the job's first node.
# shellcheck shell=bash

PEAR_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$PEAR_SLURM/cluster.env"

export SLURM_EXPORT_ENV=ALL  # where jobs get no environment (--export=NONE), their steps would not get this one either

logs=$PWD/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID
mkdir -p "$logs"

say() { echo "$(date '+%F %T') $SLURM_JOB_NAME $SLURM_JOB_ID: $*"; }

fail() {
  echo "error: $*" >&2
  exit 1
}

container=()
if [[ -n ${PEAR_CONTAINER:-} ]]; then
  container=(--container-image="$PEAR_CONTAINER" --container-workdir="$PWD"
    --container-mounts="$PWD:$PWD,$PEAR_SLURM:$PEAR_SLURM${PEAR_MOUNTS:+,$PEAR_MOUNTS}")
  export PEAR_PYTHON=${PEAR_PYTHON:-python}
else
  export PEAR_PYTHON=${PEAR_PYTHON:-$(dirname "$PEAR_SLURM")/.venv/bin/python}
  [[ -x $PEAR_PYTHON ]] ||
    fail "no Python at $PEAR_PYTHON; set PEAR_PYTHON or PEAR_CONTAINER in $PEAR_SLURM/cluster.env"
fi

# How many processes a node runs, into PEAR_PROCESSES.
count_processes() {
  export PEAR_PROCESSES=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
  [[ -n $PEAR_PROCESSES ]] ||
    fail "Slurm gave this job no GPUs: set SBATCH_GPUS_PER_NODE (or NPROC_PER_NODE, where Slurm does not count GPUs)" \
      "in $PEAR_SLURM/cluster.env, and source that file in the shell that calls sbatch"
  say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, $SLURM_NNODES x $PEAR_PROCESSES process(es)"
}

# A command on so many nodes, once each, in the environment of the training. A step takes all CPUs that the job has
# on a node; Slurm would bind its one task to one core.
on_nodes() { srun --nodes="$1" --ntasks="$1" --ntasks-per-node=1 --cpu-bind=none --overlap "${container[@]}" "${@:2}"; }

# Whether the training of an output_dir was asked to stop and waits for going on. Its first process may be on another
# node: reading the folder has a network file system look for files that are new.
waits_for_going_on() {
  ls "$1" >/dev/null 2>&1
  [[ -e $1/requeue ]]
}

# Puts the job back into the queue and ends it; one that a person cancelled stays cancelled.
requeue() {
  trap '' USR1
  [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") == *" JobState=RUNNING "* ]] || return 0
  say "stopped early; requeueing it, to go on where it stopped"
  if scontrol requeue "$SLURM_JOB_ID"; then
    exit 0
  fi
  say "Slurm would not requeue it: submit it again to go on" >&2
}

# Slurm warns the batch script alone (--signal=B:USR1@seconds, before the time limit). A script whose processes save
# when they are asked to sets on_stop=ask_to_stop.
on_stop=requeue running=''
trap 'interrupted=1; $on_stop' USR1

# The processes hear it again and again, since one that is just starting does not listen yet.
ask_to_stop() {
  trap '' USR1
  [[ $running ]] || requeue
  say "asked to stop"
  while kill -0 "$running" 2>/dev/null; do
    scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null || true  # the steps, not this script
    sleep 5
  done &
}

# torchrun with these arguments over every node of the job -> its exit code.
torchrun_on_all_nodes() {
  export PEAR_RENDEZVOUS_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}  # processes of an earlier attempt stay out
  PEAR_RENDEZVOUS_ENDPOINT=$(hostname):$((20000 + SLURM_JOB_ID % 10000))
  export PEAR_RENDEZVOUS_ENDPOINT
  on_nodes "$SLURM_NNODES" --kill-on-bad-exit=1 --output="$logs/node-%n.log" --open-mode=append \
    "$PEAR_SLURM/node.sh" "$@" &
  running=$!
  say "follow it with: tail -f $logs/node-*.log"
  local code
  interrupted=1
  while ((interrupted)); do  # a trapped signal ends `wait`
    interrupted=0
    code=0
    wait "$running" || code=$?
  done
  return "$code"
}

# The last words of a job, and its exit code.
finish() {
  local code=$1
  if ((code)); then
    say "failed with exit code $code; read $logs/. Jobs that wait for this one are cancelled" >&2
    grep -hs '^error: ' "$logs"/node-*.log | tail -n 1 >&2 || true
  else
    say "done"
  fi
  exit "$code"
}
