"""Does the label level lose accuracy? The same models, their label rows trained in three ways.

    python bench/parity.py                 the demo corpus, three seeds: an hour on two CPU cores
    python bench/parity.py --kinds rows,dense --seeds 0 --epochs 1
    python bench/parity.py --corpus FOLDER --encoder FOLDER --pooling mean --max-len 64

rows   as shipped: the touched clusters by RowAdam, a second moment per row and per feature
dense  all rows in every step by AdamW, two moments per weight, as the cluster levels
bf16   as rows, with --label-bf16

All other flags are those of stage 4. Metrics are of the test split, ranked as validation chose, in
percent. Model and tree of a seed are the same for all kinds.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import Report, stages

from plumbing.cli import parse
from plumbing.precision import set_up_torch

# P@k is the share of correct labels among the first k predicted. In PSP@k, propensity-scored
# precision, rare labels count more (05_eval.py has the formulas).
METRICS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5")
Config = stages.train.Config


def build_dense(*args):
    """The model with a label level that is one more dense level."""
    model = stages.model.build(*args)
    model.heads[-1].sparse = False
    return model


def measure(config: Config, kind: str) -> list[float]:
    """METRICS of one model, trained and tested."""
    # 1. Train.
    build = build_dense if kind == "dense" else stages.model.build
    config = replace(config, label_bf16=kind == "bf16")
    stages.train.run(config, build)

    # 2. Predict the test split with the model that was kept, the best epoch on validation. To
    #    predict, it need not be dense: the kinds differ in the update of the weights alone.
    data = stages.data.load(config.run)
    model, trained, ranking = stages.train.load(config.run, data)

    def predict(batch, k: int) -> dict[str, np.ndarray]:
        return stages.train.predict_rankings(model, batch, k)

    found = stages.train.predict_split(model, data, "test", trained.max_len, 128, predict, 5)
    labels_Nk = found[f"labels {ranking}"]

    # 3. Measure. How rare a label is, is counted on the training documents.
    train = data.splits["train"]
    count_L = np.bincount(train.labels, minlength=len(data.names))
    weight_L = stages.eval.inverse_propensity(count_L, len(train))
    values = stages.eval.metrics(labels_Nk, data.splits["test"], weight_L)
    result = []
    for metric in METRICS:
        name, k = metric.split("@")
        at_k = values[name][int(k) - 1]  # the array begins with k = 1
        result.append(float(at_k))
    return result


def prepare(run: str, corpus: str, encoder: str, seed: int) -> None:
    """Stages 1 and 2: the documents and the tree, which depend on the seed alone."""
    stages.data.run(stages.data.Config(run=run, corpus=corpus, encoder=encoder, seed=seed))
    stages.tree.run(stages.tree.Config(run=run, seed=seed))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", default="data/debian")
    parser.add_argument("--encoder", default="tiny", help="as of stage 1 [tiny]")
    parser.add_argument("--runs", default="runs/parity", help="for run folders [runs/parity]")
    parser.add_argument("--kinds", default="rows,dense,bf16")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", default="bench/results/parity.json")
    # What is left over are flags of stage 4. bf16 unless they say otherwise: where the processor
    # has it, this takes half the time.
    args, flags = parser.parse_known_args()
    settings = parse(Config, __doc__, ["--amp", "bf16", *flags])
    set_up_torch()
    report = Report(args)

    # 1. Train each kind with each seed. A seed's kinds follow each other, so that a run that is
    #    stopped has printed what can be compared.
    found: dict[str, list[list[float]]] = {kind: [] for kind in args.kinds.split(",")}
    for seed in map(int, args.seeds.split(",")):
        for kind, table in found.items():
            run = str(Path(args.runs) / f"{kind}-{seed}")
            prepare(run, args.corpus, args.encoder, seed)
            values = measure(replace(settings, run=run, seed=seed), kind)
            table.append(values)
            # Of all files of a run it is the largest, and nobody will go on with this run.
            (Path(run) / "checkpoint.pt").unlink()
            named = dict(zip(METRICS, np.round(values, 2).tolist(), strict=True))
            print(f"seed {seed} {kind}:", named)

    # 2. Report each metric over the seeds: a table has a row per seed, and is read by columns.
    for kind, table in found.items():
        columns = zip(*table, strict=True)
        for metric, values in zip(METRICS, columns, strict=True):
            what = f"{kind:6} {metric}, mean of {len(values)} seeds; lowest to highest"
            spread = f"{min(values):.2f} to {max(values):.2f}"
            report.row(what, float(np.mean(values)), spread, seeds=values)


if __name__ == "__main__":
    main()
