#!/usr/bin/env bash
# Runs the tests, after making the environment where there is none (examples/environment.sh).
#
#   bash tests/run.sh                       the default suite: under 10 minutes on 2 cores
#   bash tests/run.sh --long                the tests marked `long` too
#   bash tests/run.sh tests/unit -k cm3     everything else goes to pytest
set -euo pipefail
called_from="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environment.sh"

arguments=()
paths=0
for argument in "$@"; do
  if [[ "$argument" == --long ]]; then
    arguments+=(-m "" --durations=15)
    continue
  fi
  file="${argument%%::*}"
  # A path may be meant from where the user stands or from the checkout.
  for base in "$called_from" "$ROOT"; do
    if [[ "$argument" != -* && -e "$base/$file" ]]; then
      argument="$base/$argument"
      paths=1
      break
    elif [[ "$argument" == /* && -e "$file" ]]; then
      paths=1
    fi
  done
  arguments+=("$argument")
done
if ((paths == 0)); then arguments+=("$ROOT/tests"); fi

# One thread a process: the distributed tests run 2 to 4 ranks beside the unit tests.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
cd "$ROOT"
exec python -m pytest -c tests/pytest.ini --rootdir "$ROOT" -n "$((cores > 1 ? 2 : 0))" --no-loadscope-reorder "${arguments[@]}"
