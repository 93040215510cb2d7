# Sourced by the recipes: `launch RANKS CONFIG [key=value ...]` runs the trainer on this machine under the deepspeed launcher
# and returns its exit code.
#
# The launcher itself handles signals badly: SIGTERM ends it and leaves the ranks behind, Ctrl-C reaches each rank twice.
# So it gets a session of its own, and a signal to this script goes once, at the same time, to every rank; the ranks
# save together and leave with exit code 75. On the CPU the ranks share the cores, unless OMP_NUM_THREADS says otherwise.

_stop_ranks() { # SIGTERM to each grandchild that has become a rank, as soon as there are any: before, it would be lost.
  python -c 'import contextlib, psutil, sys, time
job, ranks = psutil.Process(int(sys.argv[1])), []
while not ranks and job.status() != psutil.STATUS_ZOMBIE:
    time.sleep(0.1)
    try:
        below = [rank for child in job.children() for rank in child.children()]
        ranks = [rank for rank in below if any(word.startswith("--local_rank=") for word in rank.cmdline())]
    except psutil.Error:
        continue
for rank in ranks:
    with contextlib.suppress(psutil.NoSuchProcess):
        rank.terminate()' "$1" 2>/dev/null
}

_on_signal() {
  launch_stopped=1
  if [[ -n "$launch_job" ]]; then
    launch_told=1
    _stop_ranks "$launch_job" || true
  fi
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
  launch_stopped=0 launch_told=0 launch_job=
  trap _on_signal TERM INT # before there is a job, which would outlive this script
  # The order of tensor-parallel communication and matrix products relies on one connection.
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
  OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(python -c 'import os, sys; print(max(1, os.cpu_count() // int(sys.argv[1])))' "$ranks")}" \
    setsid "${launch_words[@]}" &
  launch_job=$!
  if ((launch_stopped && !launch_told)); then _on_signal; fi
  # `wait` ends early when a signal comes in, with the signal's code: wait until the job is really over, then ask for its.
  while true; do
    wait "$launch_job" || true
    kill -0 "$launch_job" 2>/dev/null || break
  done
  wait "$launch_job" || code=$?
  trap - TERM INT
  return "$code"
}
