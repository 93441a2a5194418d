#!/usr/bin/env bash
# Repeats what README.md reports, in the current folder: many hours on two cores.
#
#     repeat.sh CORPUS DOLLY
#
# CORPUS and DOLLY are folders with train.jsonl and test.jsonl: the heterogeneous corpus, and databricks-dolly-15k alone.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 2 ] || { sed -n '4s/^# *//p' "$0" >&2; exit 2; }
corpus=$1 dolly=$2
[ -d smollm2 ] || hydra fetch smollm2
[ -d mmlu ] || hydra fetch mmlu
run=(--model smollm2 --precision bf16)

# Clusters, of which `hydra cluster` chooses as many as are named here; held-out records; the methods, at both budgets.
hydra cluster --data "$corpus/train.jsonl" "$corpus/test.jsonl" --k 4 --out corpus-clusters
hydra cluster --data "$dolly/train.jsonl" "$dolly/test.jsonl" --k 3 --out dolly-clusters
awk 'NR % 8 == 1' corpus-clusters/test.jsonl >corpus-held-out.jsonl
awk 'NR % 6 == 1' dolly-clusters/test.jsonl >dolly-held-out.jsonl
for data in corpus dolly; do
    hydra compare "${run[@]}" --data $data-clusters/train.jsonl --eval-data $data-held-out.jsonl --mmlu mmlu \
        --config "$here/$data.toml" --out compare-$data
    hydra compare "${run[@]}" --data $data-clusters/train.jsonl --eval-data $data-held-out.jsonl \
        --config "$here/$data-long.toml" --out compare-$data-long
done

# Answers to BIG-Bench Hard and GSM8K.
grep '"category": "bbh_' "$corpus/train.jsonl" >bbh.jsonl
grep -m 1500 '"category": "math"' "$corpus/train.jsonl" >gsm8k.jsonl
{ grep '"category": "bbh_' "$corpus/test.jsonl" | awk 'NR % 2'; grep -m 40 '"category": "math"' "$corpus/test.jsonl"; } |
    sed 's/"bbh_[a-z_]*"/"BIG-Bench Hard"/; s/"math"/"GSM8K"/' >answers.jsonl
awk 'NR % 4 == 1' answers.jsonl >held-out-answers.jsonl
hydra compare "${run[@]}" --data bbh.jsonl gsm8k.jsonl --eval-data held-out-answers.jsonl \
    --config "$here/answers.toml" --out compare-answers

# More categories, the same number of records.
hydra heterogeneity "${run[@]}" --data corpus-clusters/train.jsonl --eval-data corpus-held-out.jsonl \
    --config "$here/heterogeneity.toml" --records 200 --counts 1,4,16 --out heterogeneity

# LoRAs trained separately, with one seed and each with its own.
for seeds in "11 11 11 11" "11 12 13 14"; do
    read -ra seed <<<"$seeds"
    runs=()
    for category in math code summarization brainstorming; do
        grep "\"category\": \"$category\"" "$corpus/train.jsonl" >$category.jsonl
        runs+=("$category-${seed[${#runs[@]}]}")
        [ -d "${runs[-1]}" ] || hydra finetune "${run[@]}" --data $category.jsonl --out "${runs[-1]}" --method lora --rank 8 \
            --batch 8 --steps 60 --lr 1.5e-3 --seq-len 512 --seed "${runs[-1]##*-}"
    done
    hydra analyze "${runs[@]}" --out "analysis-${seed[3]}"
done
