#!/usr/bin/env bash
# Everything that a GPU has to tell, in two commands:
#
#     bash benchmarks/gpu.sh first RESULTS      kernels, tests, regimes i and k at the shape of Llama 3.2 1B
#     bash benchmarks/gpu.sh second RESULTS     TRL with the reference in the loop, and regimes ii, iii and m
#
# It needs the extra `test` in the environment of `python3` (or $PYTHON), and no network.
set -uo pipefail
part=${1:?first or second}; results=${2:?folder for the results}; python=${PYTHON:-python3}
cd "$(dirname "$0")/.."; mkdir -p "$results"; results=$(cd "$results" && pwd)
export PYTHONPATH=$PWD/src:$PWD/tests:$PWD/benchmarks:${PYTHONPATH:-} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# A run that is cut off leaves the seconds of its turns in its log.
speed() { name=$1; shift; $python benchmarks/speed.py --device cuda --together --model 1b --threads 4 \
    --steps 2 --rounds 3 --json "$results/$name.json" "$@" > "$results/$name.log" 2>&1 || tail -5 "$results/$name.log"
    tail -4 "$results/$name.log" | head -3; }
failed=0
if [ "$part" = first ]; then
    $python benchmarks/gpu_profile.py --json "$results/gpu-profile.json" > "$results/gpu-profile.log" 2>&1 || failed=1
    $python -m pytest tests/invariance/test_gpu.py -v --tb=short -o filterwarnings= -p no:cacheprovider --show-capture=no \
        > "$results/gpu-tests.log" 2>&1 || failed=1
    tail -15 "$results/gpu-tests.log"
    speed gpu-i-bf16 --regimes i --variants infopo,infopo_compiled,trl_precomputed --pairs-per-step 16
    speed gpu-k-bf16 --regimes k --variants infopo,trl_precomputed --pairs-per-step 4
    speed gpu-i-autocast --regimes i --variants infopo,trl_precomputed --pairs-per-step 16 --autocast
else
    speed gpu-loop-bf16 --regimes i --variants infopo,trl --pairs-per-step 16
    speed gpu-more-bf16 --regimes ii,iii,m --variants infopo,trl_precomputed --pairs-per-step 16
fi
exit $failed
