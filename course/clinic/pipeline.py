"""What the clinic runs in each copy of the repository: train, predict, and collect the figures.

    python -m course.clinic.pipeline RUN KIND

RUN holds data.npz and tree.npz. KIND is 'tiny', a small encoder from scratch, 'long', the same with
192 tokens of a document instead of 64, or 'dead', the encoder of dead_encoder.py. The figures go to
RUN/figures.json: {name: number}.
"""

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from plumbing.stages import load_stages

stages = load_stages()

# Shortlists are short, so that a cascade that searches badly shows it.
SHARED = {"topk": "4,8", "batch_size": 64, "amp": "off"}
SETTINGS = {
    "tiny": {"tiny": "1,64", "epochs": 6},
    "long": {"tiny": "1,64", "epochs": 4, "max_len": 192},
    # The middle level reads the layer with the dead features through a random map. So these
    # features get a gradient in the first step, and come to life.
    "dead": {
        "layers": "1,1+2,2",
        "pooling": "mean",
        "max_len": 32,
        "head_epochs": 0,
        "epochs": 4,
        "lr": 5e-3,
        "lr_encoder": 1e-3,
    },
}
COLUMNS = ("P@1", "P@5", "nDCG@5", "PSP@1", "PSP@5", "R@100")


def prepare(corpus: Path, encoder: str, run: Path) -> None:
    """Stages 1 and 2: data.npz and tree.npz."""
    stages.data.run(
        stages.data.Config(run=str(run), corpus=str(corpus), encoder=encoder, vocab=3000)
    )
    stages.tree.run(stages.tree.Config(run=str(run), levels="8,64"))


def train(run: Path, kind: str, **changes) -> None:
    """Stage 4. `changes`: other settings than those above."""
    settings = SHARED | SETTINGS[kind] | changes
    stages.train.run(stages.train.Config(run=str(run), **settings))


def of_training(run: Path) -> dict[str, float]:
    """What stage 4 has logged."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    validations = [record for record in records if "validation" in record]
    figures = {}
    for level, loss in enumerate(losses[-1]):
        figures[f"last loss of level {level + 1}"] = loss
    for record in (validations[0], validations[-1]):
        epoch = record["epoch"]
        recall = record["validation"]["recall"][-1]
        precision = record["validation"]["P"][record["ranking"]]
        figures[f"validation after epoch {epoch}: P@1"] = precision[0]
        figures[f"validation after epoch {epoch}: shortlist recall"] = recall
    return figures


def of_weights(run: Path) -> dict[str, float]:
    """Label rows that are as they began, zero, and how large the weights of the labels are."""
    data = stages.data.load(run)
    model, _, _ = stages.train.load(run, data)
    weight_SD = model.heads[-1].weight.detach().flatten(0, 1)
    weight_LD = weight_SD[model.label_to_slot]
    is_zero_L = (weight_LD == 0).all(dim=1)
    return {
        "label rows that are zero, %": 100 * float(is_zero_L.float().mean()),
        "largest weight of a label": float(weight_LD.abs().max()),
    }


def of_prediction(run: Path) -> dict[str, float]:
    """What matters of stage 5's table, and two of its columns for batches of other sizes."""
    figures = {}
    n_test = len(stages.data.load(run).splits["test"])
    config = stages.eval.Config(run=str(run))
    lines = table(config)
    for line in lines:
        if line.startswith("20 nearest"):
            neighbours = cells(line)
        if line.startswith("cascade") and " *" in line[:34]:
            cascade = cells(line)
        if line.startswith("shortlist recall"):
            figures["test: shortlist recall"] = float(line.split()[-1])
    for column in COLUMNS:
        figures[f"test: {column}"] = cascade[column]
    for column in ("P@1", "PSP@5", "R@100"):
        figures[f"test, neighbours: {column}"] = neighbours[column]
    # The same documents, one at a time, and all at once.
    for size in (1, n_test):
        for line in table(replace(config, batch_size=size)):
            if line.startswith("cascade") and " *" in line[:34]:
                figures[f"test, --batch-size {size}: P@1"] = cells(line)["P@1"]
                figures[f"test, --batch-size {size}: nDCG@5"] = cells(line)["nDCG@5"]
    return figures


def table(config) -> list[str]:
    """What stage 5 prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        stages.eval.run(config)
    return printed.getvalue().splitlines()


def cells(line: str) -> dict[str, float]:
    """The numbers of a row of stage 5's table, by column: a name of 34 characters comes first."""
    numbers = np.array(line[34:].split(), float)
    return dict(zip(stages.eval.COLUMNS, numbers.tolist(), strict=True))


def measure(run: Path) -> dict[str, float]:
    """All figures of a run: {name: number}."""
    figures = {}
    if (run / "log.jsonl").exists():  # not where another folder's model is measured
        figures |= of_training(run)
    return figures | of_prediction(run) | of_weights(run)


def main() -> None:
    run = Path(sys.argv[1])
    torch.set_num_threads(1)
    train(run, sys.argv[2])
    (run / "figures.json").write_text(json.dumps(measure(run)))


if __name__ == "__main__":
    main()
