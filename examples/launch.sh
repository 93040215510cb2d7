# Sourced by the recipes: `launch RANKS CONFIG [key=value ...]` runs the trainer on this machine under the deepspeed launcher
# and returns its exit code.
#
# The launcher itself handles signals badly: SIGTERM ends it and leaves the ranks behind, Ctrl-C reaches each rank twice.
# So it gets a session of its own, and a signal to this script goes once, at the same time, to every rank; the ranks
# save together and leave with exit code 75. On the CPU the ranks share the cores, unless OMP_NUM_THREADS says otherwise.

_stop_ranks() { # The launcher's child starts the ranks: SIGTERM to each grandchild, as soon as there are any.
  python -c 'import psutil, sys, time
job, ranks = psutil.Process(int(sys.argv[1])), []
while not ranks and job.status() != psutil.STATUS_ZOMBIE:
    time.sleep(0.1)
    ranks = [rank for child in job.children() for rank in child.children()]
for rank in ranks:
    rank.terminate()' "$1" 2>/dev/null
}

launch_command() { # RANKS CONFIG [key=value ...]: the words of the launch, in launch_words
  local ranks="$1" port
  shift
  port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
  launch_words=(deepspeed -q --num_gpus "$ranks" --master_port "$port" --module megacm3.train "$@")
  if [[ -n "${HOSTFILE:-}" ]]; then
    launch_words=(deepspeed -q --hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}" --module megacm3.train "$@")
  fi
}

launch() {
  local ranks="$1" code=0
  launch_command "$@"
  launch_stopped=0
  # The order of tensor-parallel communication and matrix products relies on one connection.
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
  OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(python -c 'import os, sys; print(max(1, os.cpu_count() // int(sys.argv[1])))' "$ranks")}" \
    setsid "${launch_words[@]}" &
  launch_job=$!
  trap 'launch_stopped=1; _stop_ranks "$launch_job" || true' TERM INT
  # `wait` ends early when a signal comes in, with the signal's code: wait until the job is really over, then ask for its.
  while true; do
    wait "$launch_job" || true
    kill -0 "$launch_job" 2>/dev/null || break
  done
  wait "$launch_job" || code=$?
  trap - TERM INT
  return "$code"
}
