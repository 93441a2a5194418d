#!/usr/bin/env bash
# Speed of `hydra finetune` on several ranks, each in a network namespace of its own with a limited rate: what machines on a
# network would do. Wants root, Open MPI, iproute2, and a release build with the feature `mpi`.
#
#     benches/ranks.sh MODEL DATA RANKS RATE ...
#
# For example `benches/ranks.sh smollm2 train.jsonl 2 100mbit 1gbit`: two ranks of one thread each, one pass of at most 512
# tokens each in a step, without a limit and at each rate. Prints the seconds of the median step after the first, the share of
# it that a step without a limit takes, and that share by the formula of benches/README.md, with the time on the network alone.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ $# -ge 3 ] || { sed -n '5s/^# *//p' "$0" >&2; exit 2; }
model=$(realpath "$1")
data=$(realpath "$2")
ranks=$3
shift 3
hydra=$(realpath "${CARGO_TARGET_DIR:-$root/target}/release/hydra")
out=$(mktemp -d)
bridge=hydra-ranks
clean() {
    for ((i = 0; i < ranks; i++)); do ip netns del "$bridge-$i" 2>/dev/null || true; done
    ip link del "$bridge" 2>/dev/null || true
    rm -rf "$out"
}
trap clean EXIT

ip link add "$bridge" type bridge
ip addr add 10.77.0.254/24 dev "$bridge"
ip link set "$bridge" up
hosts=
for ((i = 0; i < ranks; i++)); do
    ip netns add "$bridge-$i"
    ip link add "hr$i" type veth peer name eth0 netns "$bridge-$i"
    ip link set "hr$i" master "$bridge" up
    ip -n "$bridge-$i" addr add "10.77.0.$((i + 1))/24" dev eth0
    ip -n "$bridge-$i" link set eth0 up
    ip -n "$bridge-$i" link set lo up
    hosts+="${hosts:+,}10.77.0.$((i + 1)):1"
done
# Open MPI starts its daemon on "10.77.0.N" by this instead of ssh.
cat >"$out/agent" <<EOF
#!/usr/bin/env bash
host=\$1
shift
exec ip netns exec $bridge-\$((\${host##*.} - 1)) unshare --uts sh -c "hostname rank\${host##*.}; \$*"
EOF
chmod +x "$out/agent"

awk 'NR <= 2' "$data" >"$out/held-out.jsonl"
rounds=0
for ((k = 1; k < ranks; k *= 2)); do rounds=$((rounds + 1)); done
for rate in none "$@"; do
    for ((i = 0; i < ranks; i++)); do
        # Both directions: what the namespace sends, and what it gets.
        for end in "tc -n $bridge-$i qdisc" "tc qdisc"; do
            device=$([ "$end" = "tc qdisc" ] && echo "hr$i" || echo eth0)
            $end del dev $device root 2>/dev/null || true
            [ $rate = none ] || $end add dev $device root tbf rate $rate burst 1mb latency 100ms
        done
    done
    run=$out/$rate
    mpirun --allow-run-as-root --host "$hosts" --mca plm_rsh_agent "$out/agent" --mca btl tcp,self --bind-to none \
        --mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 -n "$ranks" \
        "$hydra" finetune --model "$model" --data "$data" --eval-data "$out/held-out.jsonl" --out "$run" --steps 5 --batch 1 \
        --grad-accum "$ranks" --seq-len 512 --targets all --rank 8 --precision f32 --threads 1 >/dev/null 2>"$out/said" ||
        { cat "$out/said" >&2; exit 1; }
    # Seconds of the median step.
    seconds=$(tail -n +2 "$run/metrics.jsonl" | sed 's/.*"tokens":\([0-9]*\),"tokens_per_second":\([0-9.]*\).*/\1 \2/' |
        awk '{ print $1 / $2 }' | sort -g | awk '{ s[NR] = $1 } END { print s[int((NR + 1) / 2)] }')
    [ $rate = none ] && alone=$seconds
    bytes=$(stat -c %s "$run/adapter_model.safetensors")
    awk -v rate=$rate -v ranks="$ranks" -v t="$seconds" -v c="$alone" -v bytes="$bytes" -v rounds=$rounds 'BEGIN {
        bits = rate + 0; if (rate ~ /mbit/) bits *= 1e6; if (rate ~ /gbit/) bits *= 1e9
        sum = bits ? rounds * 2 * bytes * 8 / bits : 0
        printf "%d ranks, %s: %.2f s a step; share %.0f %%, formula %.0f %%\n", ranks, rate, t, 100 * c / t, 100 * c / (c + sum)
    }'
done
