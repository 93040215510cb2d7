#!/usr/bin/env bash
# Instruction tuning: the quickstart's model learns to caption, to answer questions about a picture, to change a skin tone
# and to draw what a caption says, from the records in examples/data; then it is shown beside the model that it was.
#
#   bash examples/sft.sh [--quickstart DIR] [--output DIR] [--budget full|small]
#
# --quickstart DIR  a finished run of examples/quickstart.sh (default: $MEGACM3_RUNS/quickstart, or runs/quickstart)
# --output DIR      where everything goes (default: $MEGACM3_RUNS/sft, or runs/sft in the checkout)
# --budget small    seconds of training instead of minutes: every step runs, the answers are noise
#
# What is finished is not done again: stop it whenever you like, and run the same command to go on.
set -euo pipefail
output="" quickstart="" budget=full
while (($#)); do
  case "$1" in
    --output | --quickstart | --budget)
      if (($# < 2)); then echo "error: $1 needs a value" >&2 && exit 2; fi
      case "$1" in
        --output) output="$(realpath -m "$2")" ;;
        --quickstart) quickstart="$(realpath -m "$2")" ;;
        --budget) budget="$2" ;;
      esac
      shift 2
      ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
    *) echo "error: unknown argument $1 (--quickstart DIR, --output DIR, --budget full|small)" >&2 && exit 2 ;;
  esac
done
case "$budget" in full | small) ;; *) echo "error: --budget $budget: full or small expected" >&2 && exit 2 ;; esac

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$ROOT/examples/launch.sh"
cd "$ROOT"
runs="${MEGACM3_RUNS:+$(realpath -m "$MEGACM3_RUNS")}"
output="${output:-${runs:-runs}/sft}" quickstart="${quickstart:-${runs:-runs}/quickstart}"
if [[ ! -e "$quickstart/hf/megacm3.json" ]]; then
  echo "error: $quickstart has no model; make it with: bash examples/quickstart.sh --output $quickstart" >&2
  exit 2
fi
mkdir -p "$output"

# Two ranks on the CPU, whatever else this machine has; the steps of one process use all cores.
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" TOKENIZERS_PARALLELISM=false

config=examples/configs/sft.yaml
steps=800 # train.steps of the config
count=64 train_overrides=()
if [[ "$budget" == small ]]; then
  steps=6 count=2
  train_overrides=(optimizer.schedule.warmup=2 log.every=2)
fi
train_overrides+=("train.steps=$steps")
if [[ "$output" != runs/sft ]]; then
  train_overrides+=("data.mixture=[{store: \"$output/store\"}]" "train.out=$output/train")
fi
if [[ "$quickstart" != runs/quickstart ]]; then
  train_overrides+=(
    "data.text_tokenizer=$quickstart/text_tokenizer" "data.image_tokenizer=$quickstart/image_tokenizer"
    "checkpoint.init=$quickstart/train"
  )
fi

total=5
source "$ROOT/examples/steps.sh"
pretokenize=(
  python tools/pretokenize.py --sft mixed --sft-tasks examples/configs/sft_tasks.yaml --way image-first
  --text-tokenizer "$quickstart/text_tokenizer" --image-tokenizer "$quickstart/image_tokenizer"
)

step "token store" store/manifest.json \
  "${pretokenize[@]}" --input examples/data/sft-train.parquet --output "$output/store"
step "held-out store" store_heldout/manifest.json \
  "${pretokenize[@]}" --input examples/data/sft-heldout.parquet --output "$output/store_heldout"
step "fine-tuning" "train/checkpoints/step_$(printf %06d "$steps")/manifest.json" \
  launch 2 "$config" "${train_overrides[@]}"
step "export" hf/megacm3.json \
  python tools/convert_checkpoint.py to-hf --checkpoint "$output/train" --output "$output/hf" --overwrite
# Keys that differ in their skin tones alone are alternatives: the right picture is told from the others of its figure.
step "base and tuned" report.html \
  python tools/compare_models.py --base "$quickstart/hf" --tuned "$output/hf" --store "$output/store_heldout" \
  --output "$output" --run "$output/train" --count "$count" --alike=-1f3f[b-f]

cat <<END

Everything is in $output:
  report.html   the answers of the model before and after, to held-out records, with figures by task
  samples.png   the pictures alone
  answers.json  the figures and every answer
  hf/           the tuned model; for example
                python tools/generate.py --model $output/hf --image in.png --prompt "Question: What is the skin tone? Answer:" --after .
END
