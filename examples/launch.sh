# Sourced by the recipes: `launch RANKS CONFIG [key=value ...]` runs the trainer on this machine under the deepspeed launcher
# and returns its exit code.
#
# The launcher itself handles signals badly: SIGTERM ends it and leaves the ranks behind, Ctrl-C reaches each rank twice.
# So it gets a session of its own, and a signal to this script goes once, at the same time, to every rank; the ranks
# save together and leave with exit code 75. On the CPU the ranks share the cores, unless OMP_NUM_THREADS says otherwise.

_stop_ranks() { # The launcher's child starts the ranks: SIGTERM to each grandchild.
  python -c 'import psutil, sys
for child in psutil.Process(int(sys.argv[1])).children():
    for rank in child.children():
        rank.terminate()' "$1"
}

launch() {
  local ranks="$1" port code=0
  shift
  port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
  launch_stopped=0
  OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(python -c 'import os, sys; print(max(1, os.cpu_count() // int(sys.argv[1])))' "$ranks")}" \
    setsid deepspeed -q --num_gpus "$ranks" --master_port "$port" --module megacm3.train "$@" &
  launch_job=$!
  trap 'launch_stopped=1; _stop_ranks "$launch_job" || true' TERM INT
  # `wait` ends early when a signal comes in: wait until the job is really over.
  while true; do
    code=0
    wait "$launch_job" || code=$?
    kill -0 "$launch_job" 2>/dev/null || break
  done
  trap - TERM INT
  return "$code"
}
