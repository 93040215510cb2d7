#!/usr/bin/env bash
# The whole main job on the pictures in examples/data: tokenizers, token store, memory bank, training with a stop and a
# resume, export, pictures and a report.
#
#   bash examples/quickstart.sh [--output DIR] [--budget full|small]
#
# --output DIR     where everything goes (default: $MEGACM3_RUNS/quickstart, or runs/quickstart in the checkout)
# --budget small   seconds of training instead of minutes: every step runs, the pictures are noise
#
# What is finished is not done again: stop it whenever you like, and run the same command to go on.
set -euo pipefail
output="" budget=full
while (($#)); do
  case "$1" in
    --output | --budget)
      if (($# < 2)); then echo "error: $1 needs a value" >&2 && exit 2; fi
      if [[ "$1" == --output ]]; then output="$2"; else budget="$2"; fi
      shift 2
      ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
    *) echo "error: unknown argument $1 (--output DIR, --budget full|small)" >&2 && exit 2 ;;
  esac
done
case "$budget" in full | small) ;; *) echo "error: --budget $budget: full or small expected" >&2 && exit 2 ;; esac
if [[ -n "$output" ]]; then output="$(realpath -m "$output")"; fi

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$ROOT/examples/launch.sh"
cd "$ROOT"
output="${output:-${MEGACM3_RUNS:+$(realpath -m "$MEGACM3_RUNS")/quickstart}}"
output="${output:-runs/quickstart}"
mkdir -p "$output"

# Two ranks on the CPU, whatever else this machine has; the steps of one process use all cores.
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" TOKENIZERS_PARALLELISM=false
cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"

train="examples/data/train-*.tar"
heldout="examples/data/heldout-*.tar"
config=examples/configs/quickstart.yaml
steps=1400 # train.steps of the config
tokenizer_overrides=() retriever_flags=(--steps 200) report_flags=(--guidance 1.5 --temperature 0.3 --top-p 0.9) train_overrides=()
if [[ "$budget" == small ]]; then
  steps=10
  tokenizer_overrides=(train.steps=10 train.seconds=10 quantizer.start=2)
  retriever_flags=(--steps 10)
  report_flags+=(--count 2)
  train_overrides=(optimizer.schedule.warmup=2 log.every=2)
fi
stop_at=$((steps * 8 / 10))
train_overrides+=("train.steps=$steps")
if [[ "$output" != runs/quickstart ]]; then
  train_overrides+=(
    "data.mixture=[{store: \"$output/store\", weight: 1.0, neighbours: \"$output/neighbours\"}]"
    "data.text_tokenizer=$output/text_tokenizer" "data.image_tokenizer=$output/image_tokenizer" "train.out=$output/train"
  )
fi

total=12
source "$ROOT/examples/steps.sh"

step "text tokenizer" text_tokenizer/manifest.json \
  python tools/train_text_tokenizer.py --input "$train" --vocab-size 1024 --output "$output/text_tokenizer"
step "image tokenizer" image_tokenizer/manifest.json \
  python tools/train_image_tokenizer.py --input "$train" --held-out "$heldout" \
  --config examples/configs/image_tokenizer_quickstart.yaml --output "$output/image_tokenizer" "${tokenizer_overrides[@]}"
step "retriever" encoder/manifest.json \
  python tools/train_retriever.py --input "$train" --output "$output/encoder" "${retriever_flags[@]}"
step "token store" store/manifest.json \
  python tools/pretokenize.py --input "$train" --text-tokenizer "$output/text_tokenizer" \
  --image-tokenizer "$output/image_tokenizer" --output "$output/store"
step "held-out store" store_heldout/manifest.json \
  python tools/pretokenize.py --input "$heldout" --text-tokenizer "$output/text_tokenizer" \
  --image-tokenizer "$output/image_tokenizer" --output "$output/store_heldout"
step "memory bank" bank/manifest.json \
  python tools/build_memory_bank.py --store "$output/store" --input "$train" --encoder "$output/encoder" \
  --shard-size 256 --output "$output/bank"
step "neighbours" neighbours/manifest.json \
  python tools/find_neighbours.py --bank "$output/bank" --encoder "$output/encoder" --output "$output/neighbours"
step "training, first part" "train/checkpoints/step_$(printf %06d "$stop_at")/manifest.json" \
  launch 2 "$config" "${train_overrides[@]}" "train.stop_at=$stop_at"
step "training, resumed" "train/checkpoints/step_$(printf %06d "$steps")/manifest.json" \
  launch 2 "$config" "${train_overrides[@]}" checkpoint.resume=required
step "export" hf/megacm3.json \
  python tools/convert_checkpoint.py to-hf --checkpoint "$output/train" --output "$output/hf" --overwrite
step "held-out perplexity" perplexity.json \
  python tools/evaluate.py --model "$output/hf" --task perplexity --input "$output/store_heldout" \
  --output "$output/perplexity.json"
step "pictures and report" report.html \
  python tools/report.py --run "$output" --input "$train" --heldout "$heldout" "${report_flags[@]}"

cat <<END

Everything is in $output:
  report.html   loss curves, reconstructions, prompts and pictures, neighbours, the fidelity figure, timings
  samples.png   the pictures alone
  hf/           the model; for example
                python tools/generate.py --model $output/hf --prompt "red apple" --output apple.png
END
