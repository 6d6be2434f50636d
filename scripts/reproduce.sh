#!/usr/bin/env bash
# The measured figures of docs/performance.md and docs/experiment.md, on the GPU of this machine.
#
#   scripts/reproduce.sh PART OUT         PART: engine, budgets, idle, traces, chunks, serve, pilot, repeats, plan
#
# Each part takes one to eleven minutes on an H100, starts from nothing but the program, and leaves its results in the folder
# OUT, with manifests; `repeats` and `plan` go on in the OUT of `pilot`, and a `pilot` or `repeats` that was stopped where it
# stopped. The first command that fails ends a part. Nothing here needs cargo: carry the program, configs/ and this script.
#
#   PROGRAM=target/release/lora-hbm       the program, built with --features cuda
#   DEVICE=cuda                           cpu: to try the script itself
#   MODELS="meta-llama/Llama-2-7b-hf facebook/opt-125m"
#   QUICK=1                               as little of everything as there can be, likewise
#   CARD=h200                             what the pilot's results are called after; the GPU's name says
set -euo pipefail
part=${1:?usage: scripts/reproduce.sh PART OUT} out=${2:?usage: scripts/reproduce.sh PART OUT}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=$(realpath "${PROGRAM:-$root/target/release/lora-hbm}")
device=${DEVICE:-cuda}
# "NVIDIA H100 80GB HBM3" is an h100.
card=${CARD:-$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr 'A-Z -' 'a-z\n\n' |
    grep -m 1 '^[a-z]*[0-9]' || echo "$device")}
read -ra models <<<"${MODELS:-meta-llama/Llama-2-7b-hf facebook/opt-125m}"
model=${models[0]}
quick=${QUICK:-}
mkdir -p "$out"
out=$(realpath "$out")
cd "$root"

say() { printf '\n== %s (%ss)\n' "$*" "$SECONDS"; }
hbm() { "$program" "$@"; }
name() { basename "$1" -hf | tr '[:upper:]' '[:lower:]'; }
# What QUICK makes less of.
few() { if [ -n "$quick" ]; then echo "$1"; else echo "$2"; fi; }

bench() { hbm bench engine --max-r 16 --device "$device" "$@"; }

# Twice, as every figure there is.
engine() {
    for run in $(few "1" "1 2"); do
        say "engine, run $run"
        bench --model "$model" --gpu-loras 18 --total-loras 24 --runs "$(few 2 20)" \
            --prompts "$(few 64 256,512,1024,2048,4096)" --batches "$(few 4 1,16)" --contexts "$(few 64 512)" \
            --adapters "$(few 0,1 0,1,16)" -o "$out/$(name "$model")-run$run.json"
        for other in "${models[@]:1}"; do
            bench --model "$other" --gpu-loras 18 --total-loras 24 --runs "$(few 2 20)" --prompts "$(few 64 512)" \
                --batches 1 --contexts "$(few 64 128)" --adapters 0,1 -o "$out/$(name "$other")-run$run.json"
        done
    done
}

# A batch's time must not depend on the number of slots.
budgets() {
    for run in $(few "1" "1 2"); do
        say "budgets, run $run"
        # In turn, so that what drifts is not taken for the budget's.
        bench --model "$model" --gpu-loras "$(few 2,128 2,128,2,128)" --runs "$(few 2 20)" --prompts "$(few 64 512)" \
            --batches "$(few 4 16)" --contexts "$(few 64 512)" --adapters 0,1 -o "$out/budgets-run$run.json"
    done
}

trace() { hbm bench trace --model "$model" --max-r 16 --device "$device" "$@"; }

# What it costs a request that comes alone that its adapter has to be copied in.
idle() {
    for run in $(few "1" "1 2"); do
        say "idle, run $run"
        trace configs/traces/idle-{resident,nonresident}.jsonl --budgets 2 -o "$out/idle-run$run.json"
    done
}

# The time to the first token against the gaps between later ones.
chunks() {
    for tokens in $(few 512 "512 1024 2048 4096"); do
        say "steps of up to $tokens tokens"
        trace configs/traces/peer-long-r3.jsonl --budgets 32 --max-num-batched-tokens "$tokens" -o "$out/chunk-$tokens.json"
    done
}

traces() {
    for run in $(few "1" "1 2"); do
        say "traces, run $run"
        trace configs/traces/peer-short-r8.jsonl --budgets 2,8,32,128 -o "$out/trace-r8-run$run.json"
        trace configs/traces/peer-short-r40.jsonl --budgets 32,128 -o "$out/trace-r40-run$run.json"
        with_server "$model" 32
        for rate in 8 40; do
            hbm measure -e "$url" --trace "configs/traces/peer-short-r$rate.jsonl" --arrivals trace --total-loras 128 \
                --gpu-loras 32 -o "$out/http-r$rate-run$run.csv"
        done
        stop_server
    done
}

server=
stop_server() { if [ -n "$server" ]; then kill "$server" && wait "$server"; server=; fi; }
trap 'if [ -n "$server" ]; then kill "$server"; fi' EXIT

# with_server MODEL SLOTS [FLAGS]: sets url.
with_server() {
    say "a server of $1 with $2 slots"
    # Not through a function: the signal is to reach the program.
    "$program" serve --model "$1" --total-loras 128 --gpu-loras "$2" --max-r 16 --device "$device" --port 0 "${@:3}" \
        2>"$out/serve.log" &
    server=$!
    url=
    while [ -z "$url" ]; do
        kill -0 "$server" 2>/dev/null || { cat "$out/serve.log"; server=; exit 1; }
        sleep 0.2
        url=$(grep -o 'http://[^ ]*' "$out/serve.log" | head -1 || true)
    done
}

# The tools against the server, and what it decided, replayed.
serve() {
    for one in "${models[@]}"; do
        for slots in 2 8 128; do
            log=$out/$(name "$one")-$slots.decisions.jsonl
            rm -f "$log"
            with_server "$one" "$slots" --decision-log "$log"
            hbm smoke-test --port "${url##*:}" --total-loras 128 --gpu-loras "$slots"
            if [ "$slots" = 8 ]; then
                hbm probe -e "$url" --total-loras 128 --arrival-rates "$(few 2 5,10,20,40)" \
                    -d "$(few 2 10)" -o "$out/$(name "$one")-probe.jsonl"
            fi
            hbm measure -e "$url" --total-loras 128 --gpu-loras "$slots" -r "$(few 4 20)" -n "$(few 8 200)" \
                --show-swap-stats -o "$out/$(name "$one")-measure.csv"
            stop_server
            say "replay"
            hbm replay "$log"
            if [ "$slots" != 128 ]; then
                # Another rule must decide differently.
                status=0
                hbm replay "$log" --evict fifo || status=$?
                [ "$status" = 3 ] || [ -n "$quick" ] || { echo "replay --evict fifo ended with $status, not 3"; exit 1; }
            fi
            rm "$log"
        done
    done
}

experiment() { # PART: one of configs/experiments, of this device and model, as $card-PART in $out
    sed -e "s|^model = .*|model = \"$model\"|" -e "s|^device = .*|device = \"$device\"|" \
        -e "s|\"h100-|\"$card-|" -e "${quick:+s|^num_requests = .*|num_requests = 8|}" -e 's|^\[output\]|&\ndecisions = "decisions"|' \
        "configs/experiments/h100-$1.toml" >"$out/$card-$1.toml"
}

pilot() {
    experiment pilot
    cd "$out"
    if [ ! -e profile.json ]; then
        say "calibrate"
        hbm calibrate --model "$model" --max-r 16 --device "$device" --seconds "$(few 5 100)" -o profile.json
    fi
    say "predict, then measure"
    hbm sweep "$card-pilot.toml" --mode simulated --profile profile.json --resume
    hbm sweep "$card-pilot.toml" --mode measured --profile profile.json --resume
    judge
}

repeats() {
    for one in heavy repeats; do
        experiment "pilot-$one"
        say "repeats: $one"
        (cd "$out" && hbm sweep "$card-pilot-$one.toml" --mode measured --profile profile.json --resume)
    done
    cd "$out"
    judge
}

judge() {
    say "judge"
    # 3: not all is within bounds, which is a result like any other.
    for format in json table; do
        hbm validate --measured "$card-pilot.csv" --requests "$card-pilot-requests" --experiment "$card-pilot.toml" \
            --profile profile.json --format $format >validation.$format || [ $? = 3 ]
    done
    cat validation.table
    say "which cost misses"
    hbm profile residuals profile.json decisions/*.jsonl --format json >residuals.json
    hbm profile residuals profile.json decisions/*.jsonl | tee residuals.table
    hbm plot "$card-pilot.csv"
    hbm report "$card-pilot.csv"
}

plan() {
    # The costs are those that `pilot` found, in the same OUT, or of the profile that comes with the program.
    profile=h100-llama2-7b
    if [ -e "$out/profile.json" ]; then profile=$out/profile.json; fi
    out=$out/plan
    mkdir -p "$out"
    experiment plan
    cd "$out"
    hbm plan --profile "$profile" --slo 'ttft_median<200ms' --rate 35 --max-tokens 16 | tee plan.txt
    # What it names, and half of it.
    slots=$(sed -n 's/^smallest budget that holds with confidence: //p' plan.txt)
    [ "${slots:-0}" -gt 1 ] || { echo "the plan names no budget of two or more: there is none to measure beside it" >&2; exit 1; }
    sed -i "s|^gpu_loras = .*|gpu_loras = [$slots, $((slots / 2))]|" "$card-plan.toml"
    hbm sweep "$card-plan.toml" --mode simulated --profile "$profile" --resume
    hbm sweep "$card-plan.toml" --mode measured --profile "$profile" --resume
}

case $part in
engine | budgets | idle | traces | chunks | serve | pilot | repeats | plan) "$part" ;;
*)
    echo "there is no part '$part': engine, budgets, idle, traces, chunks, serve, pilot, repeats or plan" >&2
    exit 2
    ;;
esac
say done
