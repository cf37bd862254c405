"""Does the label level lose accuracy? The same models, their label rows trained in three ways, over several seeds.

    python bench/parity.py                      the demo corpus, three seeds: an hour on two CPU cores
    python bench/parity.py --kinds rows,dense --seeds 0 --epochs 1
    python bench/parity.py --corpus FOLDER --encoder FOLDER --pooling mean --max-len 64 --topk 64,384

rows   as shipped: the touched clusters by RowAdam, a second moment per row and per feature
dense  all rows in every step by AdamW, two moments per weight, as the cluster levels
bf16   as rows, with --label-bf16

All other flags are those of stage 4. Metrics are of the test split, ranked as validation chose, in percent; model and
tree of a seed are the same for all.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import Report, stages

from plumbing.cli import parse
from plumbing.precision import set_up_torch

METRICS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5")


def build_dense(*args):
    """The model with a label level that is one more dense level."""
    model = stages.model.build(*args)
    model.heads[-1].sparse = False
    return model


def measure(config: stages.train.Config, kind: str) -> list[float]:
    """Train and test one model."""
    build = build_dense if kind == "dense" else stages.model.build
    stages.train.run(replace(config, label_bf16=kind == "bf16"), build)
    data = stages.data.load(config.run)
    model, config, ranking = stages.train.load(config.run, data)
    train, split = data.splits["train"], data.splits["test"]
    weight_L = stages.eval.inverse_propensity(np.bincount(train.labels, minlength=len(data.names)), len(train))
    found = stages.train.predict_split(model, data, "test", config.max_len, 128,
                       lambda batch, k: stages.train.predict_rankings(model, batch, k), 5)
    values = stages.eval.metrics(found[f"labels {ranking}"], split, weight_L)
    return [float(values[name][int(k) - 1]) for name, k in (metric.split("@") for metric in METRICS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="data/debian")
    parser.add_argument("--encoder", default="tiny", help="as of stage 1 [tiny]")
    parser.add_argument("--runs", default="runs/parity", help="folder for the run folders [runs/parity]")
    parser.add_argument("--kinds", default="rows,dense,bf16")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", default="bench/results/parity.json")
    args, flags = parser.parse_known_args()
    settings = parse(stages.train.Config, __doc__, ["--amp", "bf16", *flags])
    set_up_torch()
    report = Report(args)
    found: dict[str, list] = {kind: [] for kind in args.kinds.split(",")}
    for seed in map(int, args.seeds.split(",")):
        for kind in found:
            run = str(Path(args.runs) / f"{kind}-{seed}")
            stages.data.run(stages.data.Config(run=run, corpus=args.corpus, encoder=args.encoder, seed=seed))
            stages.tree.run(stages.tree.Config(run=run, seed=seed))
            found[kind].append(measure(replace(settings, run=run, seed=seed), kind))
            (Path(run) / "checkpoint.pt").unlink()
            print(f"seed {seed} {kind}:", dict(zip(METRICS, np.round(found[kind][-1], 2).tolist(), strict=True)))
    for kind, table in found.items():
        for metric, values in zip(METRICS, zip(*table, strict=True), strict=True):
            report.row(f"{kind:6} {metric}, mean of {len(values)} seeds; lowest to highest", float(np.mean(values)),
                       f"{min(values):.2f} to {max(values):.2f}", seeds=values)


if __name__ == "__main__":
    main()
