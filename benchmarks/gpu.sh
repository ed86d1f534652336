#!/usr/bin/env bash
# Everything that a GPU has to tell, in two commands:
#
#     bash benchmarks/gpu.sh first RESULTS      kernels, tests, regimes i and k at the shape of Llama 3.2 1B beside TRL
#     bash benchmarks/gpu.sh second RESULTS     regime k under autocast, 8B with LoRA, our step compiled, regimes ii, iii and m
#
# It needs the extra `test` in the environment of `python3` (or $PYTHON), and no network. The exit status is 1 if any part
# failed; the others run all the same. On one H200 the parts of the first took 30 s (profile), 146 s (tests, in 7
# processes), 104 s, 68 s and 72 s. Since then regime k has TRL with a reference in the loop besides, which took 32 s in
# regime i: about 450 s in all. Regime k under autocast would make it more than 8 minutes, and is in the second.
set -uo pipefail
part=${1:?first or second}; results=${2:?folder for the results}; python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 1; mkdir -p "$results"; results=$(cd "$results" && pwd)
export PYTHONPATH=$PWD/src:$PWD/tests:$PWD/benchmarks:${PYTHONPATH:-} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
workers=$($python -c "import xdist" 2> /dev/null && echo "-n 7")
failed=0
# A run that is cut off leaves the seconds of its turns in its log.
speed() { name=$1; shift; $python benchmarks/speed.py --device cuda --together --threads 4 --rounds 3 \
    --logs "$results/$name-logs" --json "$results/$name.json" "$@" > "$results/$name.log" 2>&1 || { failed=1; tail -5 "$results/$name.log"; }
    grep '^|' "$results/$name.log"; }
if [ "$part" = first ]; then
    $python benchmarks/gpu_profile.py --json "$results/gpu-profile.json" > "$results/gpu-profile.log" 2>&1 || failed=1
    # shellcheck disable=SC2086
    $python -m pytest tests/invariance/test_gpu.py $workers -v --tb=short -o filterwarnings= -p no:cacheprovider \
        --show-capture=no > "$results/gpu-tests.log" 2>&1 || failed=1
    tail -15 "$results/gpu-tests.log"
    speed gpu-i-bf16 --model 1b --regimes i --variants infopo,trl_precomputed,trl --pairs-per-step 16 --steps 2
    speed gpu-k-bf16 --model 1b --regimes k --variants infopo,trl_precomputed,trl --pairs-per-step 4 --steps 2
    speed gpu-i-autocast --model 1b --regimes i --variants infopo,trl_precomputed --pairs-per-step 16 --steps 2 --autocast
else
    speed gpu-k-autocast --model 1b --regimes k --variants infopo,trl_precomputed --pairs-per-step 4 --steps 2 --autocast
    speed gpu-8b-lora --model 8b --regimes i --variants infopo,trl_precomputed --pairs-per-step 8 --steps 1 --lora
    speed gpu-compiled --model 1b --regimes i --variants infopo,infopo_compiled --pairs-per-step 16 --steps 2
    speed gpu-more-bf16 --model 1b --regimes ii,iii,m --variants infopo,trl_precomputed --pairs-per-step 16 --steps 2
fi
exit $failed
