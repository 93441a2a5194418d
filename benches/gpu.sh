#!/usr/bin/env bash
# Everything that is to be run on a GPU, in one script of at most ten minutes: correctness first, then speed, then NVIDIA's tools.
#
#   benches/gpu.sh pack DIR [--debug]       where cargo is: builds everything, and collects in DIR what `run` needs
#   benches/gpu.sh run DIR [OUT [PART..]]   on the machine with the GPU: needs DIR, bash and a driver; no cargo, no network
#
# `run` does one step after the other, each with a time limit, goes on after a failure, keeps each step's output as OUT/STEP.log
# (DIR/out without OUT) and ends with OUT/summary.txt, a line a step. Its parts, all of them unless some are named: correctness,
# golden, mmlu, finetune, products, training_step, tools. Steps that need Python with PyTorch, compute-sanitizer or ncu
# are skipped where these are missing. It fails if a step fails. Without a device that can be used it ends after its first step.
#
# Of several devices it takes the first that CUDA_VISIBLE_DEVICES names. A random 7B takes 14 GB of TMPDIR for a while.
#
# A model for MMLU and the fine-tune is taken along if HYDRA_GPU_MODEL (a GGUF file), HYDRA_GPU_MMLU (a folder, see `hydra fetch mmlu`)
# and HYDRA_GPU_DATA (records to train on, .jsonl) name them while packing; otherwise they are the demo's. DIR without a large model
# fits 64 MiB. A larger model is packed as DIR.model.0, DIR.model.1, ... of at most 60 MiB, to be brought one after the other.
#
# HYDRA_GPU_DRY=1 runs the same steps at small sizes, on a driver that is emulated (hydra-ptx/README.md).
set -euo pipefail
most_seconds=${HYDRA_GPU_SECONDS:-580}
root=$(cd "$(dirname "$0")/.." && pwd)

fail() {
    echo "gpu.sh: $*" >&2
    exit 1
}

pack() {
    local dir=$1 profile=--release built
    [ "${2:-}" = --debug ] && profile=
    mkdir -p "$dir/mmlu"
    built=$(cd "$root" && cargo build $profile --workspace --features hydra/cuda,hydra-harness/cuda --bin hydra \
        --example throughput --example random_model --test cuda --bench gpu --message-format=json-render-diagnostics)
    local name file
    for name in hydra throughput random_model cuda gpu; do
        file=$(grep "\"name\":\"$name\"" <<<"$built" | grep -o '"executable":"[^"]*"' | cut -d'"' -f4 | tail -1)
        [ -n "$file" ] || fail "cargo built no $name"
        strip -o "$dir/$name" "$file"
    done
    cp -r "$root/tests/golden" "$dir/"
    cp "$root/benches/gpu.sh" "$root/benches/gpu.py" "$dir/"
    rm -f "$dir".model.*
    if [ -n "${HYDRA_GPU_MODEL:-}" ]; then
        split -b 60M -d -a 1 "$HYDRA_GPU_MODEL" "$dir.model."
        cp -r "$HYDRA_GPU_MMLU/." "$dir/mmlu"
        head -n 64 "$HYDRA_GPU_DATA" >"$dir/train.jsonl"
    else
        cp -r "$root/harness/assets/model" "$root/harness/assets/mmlu" "$dir/"
        head -n 64 "$root/harness/assets/corpus/train.jsonl" >"$dir/train.jsonl"
    fi
    du -sh "$dir" "$dir".model.* 2>/dev/null || true
    [ -z "$profile" ] || [ "$(du -sm "$dir" | cut -f1)" -le 64 ] || fail "$dir is larger than 64 MiB"
}

# Adds a line to the summary, and prints it. A full disk ends no run.
summarize() { tee -a "$out/summary.txt" || true; }

# step NAME SECONDS COMMAND...: runs a command, keeps its output, and adds a line to the summary. With `excuse` set, a failure
# whose output has that text is no failure of ours.
step() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    [ "$limit" -le $((part_end - SECONDS)) ] || limit=$((part_end - SECONDS))
    [ "$limit" -gt 0 ] || { skip "$name" "no time left" && failures=$((failures + 1)) && return; }
    printf '\n== %s: %s\n' "$name" "$*"
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    [ $status = 0 ] || lines=40
    tail -n "${lines:-40}" "$out/$name.log" || true
    if [ $status != 0 ] && [ -n "${excuse:-}" ] && grep -q "$excuse" "$out/$name.log"; then
        skip "$name" "$excuse"
        return 0
    fi
    local verdict=ok
    [ $status = 0 ] || verdict="failed ($status)"
    [[ $status != 124 && $status != 137 ]] || verdict="out of time"
    [ $status = 0 ] || failures=$((failures + 1))
    printf '%-34s %-14s %4d s\n' "$name" "$verdict" $((SECONDS - start)) | summarize
    return 0
}

# skip NAME REASON
skip() { printf '%-34s skipped: %s\n' "$1" "$2" | summarize; }

# Asked once: it takes seconds.
has_torch() {
    [ -n "${torch:-}" ] || torch=$(timeout 60 python3 -c "import torch; print(torch.cuda.is_available())" 2>/dev/null) || torch=False
    [ "$torch" = True ]
}

# The tests that need a GPU, one process each, but for the golden cases and generation, which are a step of their own.
correctness() {
    local tests name
    lines=1 step test.list 30 "$dir/cuda" --list --ignored --format terse
    tests=$(sed -n 's/: test$//p' "$out/test.list.log" | sed '/^golden_\|^generation_/d')
    # An emulator takes minutes for the others.
    [ -z "$dry" ] || tests="more_memory_than_there_is work_under_way the_hosts_context_stays_current on_a_gpu::memory tall_products products_with_silent_ends"
    for name in $tests; do
        lines=3 step "test.${name//::/.}" 40 "$dir/cuda" --ignored --exact "$name" --test-threads 1
    done
}

golden() {
    local trained="golden_cases_on_a_gpu generation_on_a_gpu"
    # Its ten steps are what the other tests run on the emulator.
    [ -z "$dry" ] || trained=generation_on_a_gpu
    local name
    for name in $trained; do
        lines=3 step "test.$name" 90 "$dir/cuda" --ignored --exact "$name" --test-threads 1
    done
}

# The predictions on the GPU and on the CPU: at least 99 of 100 have to be the same.
compare_predictions() {
    local device
    for device in cpu cuda:0; do
        sed -E 's/.*"subject":"([^"]*)","index":([0-9]+).*"prediction":"?([^",}]*).*/\1 \2 \3/' "$out/predictions.$device" >"$out/chosen.$device"
    done
    paste -d' ' "$out/chosen.cpu" "$out/chosen.cuda:0" |
        awk '{ all++; same += $3 == $6 } END { print same " of " all " predictions are the same"; exit !(all > 0 && same >= 0.99 * all) }'
}

mmlu() {
    local device limit=10 shared=(eval mmlu --model "$model" --data "$dir/mmlu" --precision bf16)
    [ -z "$dry" ] || limit=1
    for device in cpu cuda:0; do
        step "mmlu.$device" 60 "$dir/hydra" "${shared[@]}" --limit $limit --device $device --predictions "$out/predictions.$device"
    done
    step mmlu.compared 5 bash -euo pipefail -c compare_predictions
}

# The losses on the GPU and on the CPU: they may differ by 2 % in the mean over the steps. (Twenty steps magnify rounding: on a
# CPU, those in bf16 and in f32 differ by 0.7 % in the mean, and by 4 % in one step.)
compare_losses() {
    local device
    for device in cpu cuda:0; do
        sed -nE 's/.*"step":([0-9]+),"loss":([0-9.e-]+).*/\1 \2/p' "$out/run.$device/metrics.jsonl" >"$out/losses.$device"
    done
    paste -d' ' "$out/losses.cpu" "$out/losses.cuda:0" | awk '
        { apart = ($4 - $2) / $2; if (apart < 0) apart = -apart; if (apart > most) most = apart; sum += apart; all++; print }
        END {
            if (!all) exit 1
            printf "over %d steps the losses differ by %.2g in the mean, by %.2g at most\n", all, sum / all, most
            exit !(sum / all <= 0.02)
        }'
}

finetune() {
    local device steps=20 shared=(finetune --model "$model" --data "$dir/train.jsonl" --precision bf16 --targets all --lr 1e-3 --dropout 0)
    [ -z "$dry" ] || steps=2
    for device in cpu cuda:0; do
        rm -rf "$out/run.$device"
        step "finetune.$device" 60 "$dir/hydra" "${shared[@]}" --batch 4 --steps $steps --device $device --out "$out/run.$device"
    done
    step finetune.compared 5 bash -euo pipefail -c compare_losses
}

# A projection with and without an adapter at the shapes of LLaMA-2-7B.
products() {
    local sizes=()
    [ -z "$dry" ] || sizes=(--tokens 40 --shrink 64 --calls 1)
    step bench 90 env -u HYDRA_PYTHON "$dir/gpu" "${sizes[@]}"
    if has_torch; then step bench.torch 60 python3 "$dir/gpu.py"; else skip bench.torch "no PyTorch with CUDA"; fi
}

# What makes a model of random weights small enough for an emulator.
tiny=(d_model=64 d_ffn=96 heads=4 kv_heads=2 vocab=300 context=128)

training_step() {
    local shapes=() steps=(batch=2 seq=2048)
    if [ -n "$dry" ]; then
        shapes=("${tiny[@]}" layers=2)
        steps=(batch=2 seq=24 steps=1)
    fi
    step random_7b 90 "$dir/random_model" "$scratch/7b" "${shapes[@]}"
    step step_7b 60 "$dir/throughput" "$scratch/7b" train device=cuda:0 "${steps[@]}"
    rm -rf "$scratch/7b"
    if has_torch; then step step_7b.torch 90 python3 "$dir/gpu.py" --step; else skip step_7b.torch "no PyTorch with CUDA"; fi
}

tools() {
    local name
    for name in memcheck racecheck; do
        if command -v compute-sanitizer >/dev/null; then
            HYDRA_CUDA_CASES=2 step "$name" 60 compute-sanitizer --tool $name --error-exitcode 9 \
                "$dir/cuda" --ignored --test-threads 1 \
                on_a_gpu::norms on_a_gpu::attention on_a_gpu::head on_a_gpu::frozen on_a_gpu::adapted
        else
            skip $name "no compute-sanitizer"
        fi
    done
    # Where a step of the 7B spends its time: two of its layers.
    local hottest='regex:^(wgmma_(rows|columns)_bf16|gemm_(rows|columns)_bf16|lora_down|lora_up_backward|gate_backward|weight_grad|attention_.*)$'
    if command -v ncu >/dev/null; then
        step random_7b_layers 30 "$dir/random_model" "$scratch/7b_layers" layers=2
        excuse=ERR_NVGPUCTRPERM HYDRA_CUBLASLT=off step ncu 60 ncu --set basic --kernel-name "$hottest" --launch-skip 40 --launch-count 24 \
            "$dir/throughput" "$scratch/7b_layers" train device=cuda:0 batch=1 seq=2048 steps=1
    else
        skip ncu "no ncu"
    fi
}

run() {
    dir=$(cd "$1" && pwd)
    out=$(mkdir -p "${2:-$dir/out}" && cd "${2:-$dir/out}" && pwd)
    local part known=(correctness golden mmlu finetune products training_step tools) parts=("${@:3}")
    [ ${#parts[@]} -gt 0 ] || parts=("${known[@]}")
    for part in "${parts[@]}"; do
        [[ " ${known[*]} " == *" $part "* ]] || fail "$part: no such part; there are ${known[*]}"
    done
    dry=${HYDRA_GPU_DRY:-}
    failures=0
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    model=$dir/model
    if compgen -G "$dir.model.*" >/dev/null; then
        model=$scratch/model.gguf
        cat "$dir".model.* >"$model" || true # the steps that read it will say so
    fi
    # The smallest model, because an emulator computes it.
    [ -z "$dry" ] || model=$dir/golden/hydra/model
    : >"$out/summary.txt"
    export -f compare_predictions compare_losses
    # Each step is a process of its own: the driver compiles the kernels once for all of them.
    export out LC_ALL=C HYDRA_GOLDEN=$dir/golden CUDA_CACHE_PATH=$scratch/compiled
    unset HYDRA_CUDA_DEVICE CUDA_CACHE_DISABLE
    timeout 20 nvidia-smi >"$out/device.txt" 2>&1 || true
    local part_end=$most_seconds
    step device 120 "$dir/hydra" info "$model" --device cuda:0
    [ $failures = 0 ] || finish
    # Tests that hang leave time for the other parts.
    local -A part_seconds=([correctness]=260 [golden]=120)
    [ -z "$dry" ] || part_seconds=()
    for part in "${parts[@]}"; do
        part_end=$((SECONDS + ${part_seconds[$part]:-$most_seconds}))
        [ $part_end -le $most_seconds ] || part_end=$most_seconds
        $part
    done
    finish
}

# Ends the script.
finish() {
    printf '\n== summary: %s\n' "$out/summary.txt"
    cat "$out/summary.txt" || true
    [ $failures = 0 ] || fail "$failures steps failed"
    exit 0
}

case "${1:-}" in
    pack) [ $# -ge 2 ] || fail "usage: gpu.sh pack DIR [--debug]" && pack "${@:2}" ;;
    run) [ $# -ge 2 ] || fail "usage: gpu.sh run DIR [OUT [PART..]]" && run "${@:2}" ;;
    *) fail "usage: gpu.sh pack DIR [--debug] | gpu.sh run DIR [OUT [PART..]]" ;;
esac
