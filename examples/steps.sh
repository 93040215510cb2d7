# Sourced by the examples that are made of steps: `step NAME PRODUCT COMMAND...` runs one, of $total, below $output.
# `launch RANKS CONFIG ...` (examples/launch.sh) may be the command.
number=0

quoted() { # WORDS...: as one would type them
  local word
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./=:,-]+$ ]]; then printf '%s ' "$word"; else printf "'%s' " "$word"; fi
  done
}

step() { # NAME PRODUCT COMMAND...: run, say how long it took, and note the time where the step made its product
  local name="$1" product="$output/$2" was_there=no started seconds
  shift 2
  number=$((number + 1))
  printf '\n[%2d/%d] %s\n        ' "$number" "$total" "$name"
  if [[ "$1" == launch ]]; then quoted deepspeed --num_gpus "$2" --module megacm3.train "${@:3}"; else quoted "$@"; fi
  echo
  if [[ -e "$product" ]]; then was_there=yes; fi
  started="$(date +%s)"
  "$@"
  seconds=$(($(date +%s) - started))
  if [[ ! -e "$product" ]]; then echo "error: $name left no $product" >&2 && exit 1; fi
  if [[ "$was_there" == yes ]]; then
    printf '[%2d/%d] %s: was there already\n' "$number" "$total" "$name"
  else
    printf '[%2d/%d] %s: %d s\n' "$number" "$total" "$name" "$seconds"
    printf '{"step": "%s", "seconds": %d}\n' "$name" "$seconds" >>"$output/timings.jsonl"
  fi
}
