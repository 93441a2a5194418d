#!/usr/bin/env bash
# How much speed a training step keeps while other programs use the machine.
#
#     benches/load.sh MODEL [PAIRS]
#
# Runs the example `throughput` (MODEL train, and whatever KEYS holds) alone, beside one busy loop at nice 10, beside one
# busy loop at nice 0, and beside a second run of itself, in turn, PAIRS times (5), and prints the median of each as a share of
# the median alone. With PEER set to a command that prints `... tokens/s ...`, the same for that command under the same loads. With
# THROUGHPUT set to a program, that one instead of a new release build.
# Run it on two cores: `taskset -c 0,1 benches/load.sh MODEL`.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '4s/^# *//p' "$0" >&2; exit 2; }
model=$1 pairs=${2:-5}
[ -n "${THROUGHPUT:-}" ] || cargo build --quiet --release -p hydra-runtime --example throughput
ours=("${THROUGHPUT:-${CARGO_TARGET_DIR:-target}/release/examples/throughput}" "$model" train steps=5 ${KEYS:-})
results=$(mktemp -d)
busy=
stop() { [ -z "$busy" ] || kill "$busy" 2>/dev/null || true; busy=; }
trap 'stop; rm -rf "$results"' EXIT

# The first number before "tokens/s" in a command's output.
speed() {
    local said
    said=$("$@" 2>&1) || { echo "$said" >&2; return 1; }
    grep -oE '[0-9][0-9,.]* tokens/s' <<<"$said" | head -1 | tr -d ', a-z/' || { echo "no tokens/s in: $said" >&2; return 1; }
}

# measure LOAD NAME COMMAND...: one speed, appended to the file LOAD.NAME.
measure() {
    local load=$1 name=$2
    shift 2
    case $load in
    nice10) nice -n 10 sh -c 'while :; do :; done' & busy=$! ;;
    nice0) sh -c 'while :; do :; done' & busy=$! ;;
    twice) "$@" >/dev/null 2>&1 & busy=$! ;;
    esac
    speed "$@" >>"$results/$load.$name"
    stop
    wait 2>/dev/null || true
}

names=(hydra)
[ -z "${PEER:-}" ] || names+=(peer)
for ((pair = 0; pair < pairs; pair++)); do
    for load in alone nice10 nice0 twice; do
        for name in "${names[@]}"; do
            if [ "$name" = hydra ]; then measure $load hydra "${ours[@]}"; else measure $load peer bash -c "$PEER"; fi
        done
    done
done
median() { sort -g "$1" | awk '{x[NR] = $1} END {print NR % 2 ? x[(NR + 1) / 2] : (x[NR / 2] + x[NR / 2 + 1]) / 2}'; }
lscpu | grep 'Model name'
printf '%-8s %-8s %12s %10s\n' program load tokens/s share
for name in "${names[@]}"; do
    alone=$(median "$results/alone.$name")
    for load in alone nice10 nice0 twice; do
        value=$(median "$results/$load.$name")
        printf '%-8s %-8s %12s %9.0f%%\n' "$name" $load "$value" "$(awk "BEGIN {print 100 * $value / $alone}")"
    done
done
