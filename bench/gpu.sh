#!/usr/bin/env bash
# All that a GPU has to show, in one call of under nine minutes. Figures go to OUT as JSON and to the screen.
#
#   OUT=results PYTHON=python3 bench/gpu.sh
#   DEVICE=cpu TOY=1 OUT=results bench/gpu.sh      the same commands at toy size, to see that they run
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results} device=${DEVICE:-cuda} failed=0
step="--rounds 5" predict="--labels 670091 --documents 4000"
[ -z "${TOY:-}" ] || step="--toy --rounds 2" predict="--labels 512 --documents 64 --rounds 2 --metrics 1000"
try() {  # seconds at most, command
  echo "== ${*:2}"
  timeout "$1" "${PYTHON:-python}" "${@:2}" || { echo "FAILED: ${*:2}"; failed=1; }
}
# shellcheck disable=SC2086
{
  # The tests first: they say whether a step waits for the GPU.
  if [ "$device" = cuda ]; then
    try 60 -m pytest -q -p no:cacheprovider tests/test_train.py tests/test_cuda_graphs.py -k gpu
  fi
  try 260 bench/step.py --device "$device" $step --out "$out/step-$device.json"
  try 60 bench/predict.py --run "" --device "$device" $predict --out "$out/predict-$device.json"
  if [ "$device" = cuda ]; then
    try 120 bench/step.py --device cuda $step --compile --out "$out/step-cuda-compiled.json"
  fi
}
exit $failed
