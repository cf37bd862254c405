#!/usr/bin/env bash
# The whole path on one corpus, once per seed, in runs/NAME-SEED; the tables of all seeds at the end.
#
#   bench/seeds.sh NAME CORPUS ENCODER [flags of 04_train.py]
#   SEEDS="0 1 2" PYTHON=python3 bench/seeds.sh eurlex57k CORPUS bert-base-uncased --epochs 15
#   TRAIN=my_loss.py EVAL= bench/seeds.sh my-loss data/debian tiny     a fork's script that evaluates, too
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 corpus=$2 encoder=$3
shift 3
for seed in ${SEEDS:-0 1 2}; do
  run=${RUNS:-runs}/$name-$seed
  "${PYTHON:-python}" 01_data.py --run "$run" --corpus "$corpus" --encoder "$encoder" --seed "$seed"
  "${PYTHON:-python}" 02_label_tree.py --run "$run" --seed "$seed"
  {
    "${PYTHON:-python}" "${TRAIN-04_train.py}" --run "$run" --seed "$seed" "$@"
    [ -z "${EVAL-05_eval.py}" ] || "${PYTHON:-python}" "${EVAL-05_eval.py}" --run "$run" --seed "$seed"
  } | tee "$run/report.txt"
done
for seed in ${SEEDS:-0 1 2}; do
  echo "== seed $seed"
  grep -E "^%|^cascade|^20 nearest|recall" "${RUNS:-runs}/$name-$seed/report.txt"
done
