#!/usr/bin/env bash
# Trains on the GPUs of one machine, or of those in a hostfile. A run that lost a rank or was stopped from outside starts
# again from its last checkpoint; Ctrl-C or SIGTERM to this script saves and leaves.
#
#   bash examples/pretrain.sh examples/configs/cm3leon_7b.yaml train.out=runs/cm3leon_7b [key=value ...]
#
# May be set in the environment:
#   RANKS=N      GPUs of this machine (default: all, or 1 without any)
#   HOSTFILE=F   several machines, as in examples/hostfile: started over ssh with pdsh, one shared folder for train.out;
#                RANKS is then their sum of slots. To stop such a run, send SIGTERM to one of its ranks.
#   RESTARTS=N   at most so many starts after the first (default 5)
#   DRY_RUN=1    check the config for that many ranks, print what would start, and leave
set -uo pipefail
case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
  "") echo "error: no config given; for example: bash examples/pretrain.sh examples/configs/cm3leon_7b.yaml" >&2 && exit 2 ;;
esac
if ! command -v deepspeed >/dev/null; then
  echo "error: there is no deepspeed on the PATH; enter the environment first: source .venv/bin/activate" >&2 && exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

if [[ -n "${HOSTFILE:-}" ]]; then
  if [[ ! -r "$HOSTFILE" ]]; then echo "error: HOSTFILE=$HOSTFILE cannot be read; see examples/hostfile" >&2 && exit 2; fi
  ranks="$(awk -F slots= '!/^#/ && NF > 1 {sum += $2} END {print sum + 0}' "$HOSTFILE")"
else
  ranks="${RANKS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
fi
restarts="${RESTARTS:-5}"
if [[ ! "$ranks" =~ ^[1-9][0-9]*$ || ! "$restarts" =~ ^[0-9]+$ ]]; then
  echo "error: RANKS=$ranks RESTARTS=$restarts: numbers expected, of RANKS (or the HOSTFILE's slots) 1 or more" >&2 && exit 2
fi
if [[ -n "${DRY_RUN:-}" ]]; then
  python -m megacm3.train --dry-run "$ranks" "$@" || exit
  launch_command "$ranks" "$@"
  echo "start   ${launch_words[*]}"
  echo "again   after exit codes 6, 75 and above 128, at most $restarts times"
  exit 0
fi
for ((start = 0; ; start++)); do
  launch "$ranks" "$@"
  code=$?
  # 75: somebody stopped a rank, all is saved; 6: a rank was lost or hung; above 128: it was killed (out of memory, for
  # example). The rest needs a person.
  if ((launch_stopped || start >= restarts)) || ! ((code == 6 || code == 75 || code > 128)); then
    exit "$code"
  fi
  echo "exit code $code: start $((start + 2)) of at most $((restarts + 1)), from the last checkpoint" >&2
  sleep 5
done
