#!/usr/bin/env bash
# Trains on the GPUs of one machine. A lost rank starts the run again from its last checkpoint; Ctrl-C saves and leaves.
#
#   bash examples/pretrain.sh examples/configs/cm3leon_7b.yaml train.out=runs/cm3leon_7b [key=value ...]
#
# RANKS=N (default: the number of GPUs, or 1) and RESTARTS=N (default 5) may be set in the environment.
set -uo pipefail
if (($# == 0)); then
  echo "error: no config given; for example: bash examples/pretrain.sh examples/configs/cm3leon_7b.yaml" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

ranks="${RANKS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
restarts="${RESTARTS:-5}"
for ((start = 0; ; start++)); do
  launch "$ranks" "$@"
  code=$?
  # 6: a rank was lost or hung; above 128: it was killed (out of memory, for example). The rest needs a person.
  if ((launch_stopped || start >= restarts)) || ! ((code == 6 || code > 128)); then
    exit "$code"
  fi
  echo "exit code $code: start $((start + 2)) of at most $((restarts + 1)), from the last checkpoint" >&2
  sleep 5
done
