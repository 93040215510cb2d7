#!/usr/bin/env bash
# Does retrieval help? Three models trained with 0 to 3 retrieved documents and three without, each from another seed, and
# the loss per image token of held-out pictures with no, retrieved and random documents in front of them.
#
#   bash examples/retrieval_gain.sh [--quickstart DIR] [--input GLOB --heldout GLOB] [--steps N] [--seeds N] [--output DIR]
#                                   [--budget full|small]
#
# --quickstart DIR  a run of examples/quickstart.sh, for its image tokenizer (default: $MEGACM3_RUNS/quickstart, or
#                   runs/quickstart)
# --input GLOB      captioned pictures to train on (default: those of examples/data)
# --heldout GLOB    pictures to measure on; what is a copy of them is never retrieved
# --steps N         of each training (default 200), --seeds N (default 3)
# --output DIR      where everything goes (default: $MEGACM3_RUNS/retrieval_gain, or runs/retrieval_gain)
# --budget small    one seed, seconds of training: every step runs, the figures say nothing
#
# The README's figures are of all 1,601 emoji without skin tones, a fifth of them held out:
#   python examples/make_data.py --source fluent-emoji-00000.tar --all-categories --held-out 0.2 --output emoji
#   bash examples/retrieval_gain.sh --input 'emoji/train-*.tar' --heldout 'emoji/heldout-*.tar'
#
# What is finished is not done again: stop it whenever you like, and run the same command to go on.
set -euo pipefail
quickstart="" output="" budget=full steps=200 seeds=3
input="examples/data/train-*.tar" heldout="examples/data/heldout-*.tar"
while (($#)); do
  case "$1" in
    --quickstart | --input | --heldout | --steps | --seeds | --output | --budget)
      if (($# < 2)); then echo "error: $1 needs a value" >&2 && exit 2; fi
      case "$1" in
        --quickstart) quickstart="$(realpath -m "$2")" ;;
        --output) output="$(realpath -m "$2")" ;;
        --input) input="$(realpath -m "$2")" ;;
        --heldout) heldout="$(realpath -m "$2")" ;;
        --steps) steps="$2" ;;
        --seeds) seeds="$2" ;;
        --budget) budget="$2" ;;
      esac
      shift 2
      ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;;
    *) echo "error: unknown argument $1 (see --help)" >&2 && exit 2 ;;
  esac
done
case "$budget" in full | small) ;; *) echo "error: --budget $budget: full or small expected" >&2 && exit 2 ;; esac
if [[ ! "$steps" =~ ^[1-9][0-9]*$ || ! "$seeds" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: --steps $steps --seeds $seeds: numbers of 1 or more expected" >&2 && exit 2
fi

retriever_steps=300
if [[ "$budget" == small ]]; then retriever_steps=60 steps=4 seeds=1; fi

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$ROOT/examples/launch.sh"
cd "$ROOT"
runs="${MEGACM3_RUNS:+$(realpath -m "$MEGACM3_RUNS")}"
output="${output:-${runs:-runs}/retrieval_gain}" quickstart="${quickstart:-${runs:-runs}/quickstart}"
tokenizer="$quickstart/image_tokenizer"
if [[ ! -e "$tokenizer/manifest.json" ]]; then
  echo "error: $quickstart has no image tokenizer; make it with: bash examples/quickstart.sh --output $quickstart" >&2
  exit 2
fi
mkdir -p "$output"
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" TOKENIZERS_PARALLELISM=false

total=$((9 + 4 * seeds))
source "$ROOT/examples/steps.sh"
pretokenize=(python tools/pretokenize.py --text-tokenizer "$output/text_tokenizer" --image-tokenizer "$tokenizer")
bank=(python tools/build_memory_bank.py --encoder "$output/encoder")
# Skin tones and other near copies: documents from 0.95 on are copies of each other.
neighbours=(python tools/find_neighbours.py --bank "$output/bank" --duplicate 0.95)

step "text tokenizer" text_tokenizer/manifest.json \
  python tools/train_text_tokenizer.py --input "$input" --vocab-size 1024 --output "$output/text_tokenizer"
step "token store" store/manifest.json "${pretokenize[@]}" --input "$input" --output "$output/store"
step "held-out store" store_heldout/manifest.json "${pretokenize[@]}" --input "$heldout" --output "$output/store_heldout"
step "retriever" encoder/manifest.json \
  python tools/train_retriever.py --input "$input" --steps "$retriever_steps" --output "$output/encoder"
step "memory bank" bank/manifest.json \
  "${bank[@]}" --store "$output/store" --input "$input" --output "$output/bank"
step "held-out bank" bank_heldout/manifest.json \
  "${bank[@]}" --store "$output/store_heldout" --input "$heldout" --output "$output/bank_heldout"
step "neighbours" neighbours/manifest.json \
  "${neighbours[@]}" --held-out "$output/bank_heldout" --output "$output/neighbours"
step "held-out neighbours" neighbours_heldout/manifest.json \
  "${neighbours[@]}" --queries "$output/bank_heldout" --output "$output/neighbours_heldout"

models=() baseline=()
for ((seed = 1; seed <= seeds; seed++)); do
  for arm in mixed none; do
    run="$output/$arm-$seed" documents="[0.25,0.25,0.25,0.25]"
    if [[ "$arm" == none ]]; then documents="[1.0,0.0,0.0,0.0]" && baseline+=("$run/hf"); else models+=("$run/hf"); fi
    step "training: documents $arm, seed $seed" "$arm-$seed/checkpoints/step_$(printf %06d "$steps")/manifest.json" \
      launch 1 examples/configs/quickstart.yaml \
      "data.mixture=[{store: \"$output/store\", weight: 1.0, neighbours: \"$output/neighbours\"}]" \
      "data.text_tokenizer=$output/text_tokenizer" "data.image_tokenizer=$tokenizer" "train.out=$run" \
      "retrieval.documents=$documents" "train.seed=$seed" "data.seed=$seed" "train.steps=$steps" \
      train.micro_batch=8 parallel.recompute=none "optimizer.schedule.warmup=$(((steps + 9) / 10))"
    step "export" "$arm-$seed/hf/megacm3.json" \
      python tools/convert_checkpoint.py to-hf --checkpoint "$run" --output "$run/hf" --overwrite
  done
done
more=()
if ((seeds > 1)); then more=(--more-models "${models[@]:1}"); fi
step "loss of held-out pictures" retrieval.json \
  python tools/evaluate.py --task retrieval --model "${models[0]}" "${more[@]}" --baseline "${baseline[@]}" \
  --input "$output/store_heldout" --store "$output/store" --neighbours "$output/neighbours_heldout" \
  --bank "$output/bank" --output "$output/retrieval.json" --report "$output/report.html"

echo
echo "The table is in $output/report.html, the figures in $output/retrieval.json."
