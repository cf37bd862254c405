"""Train some steps without dropout, and save the weights.

The test of several devices runs this in one process and, by torchrun, in two. Everything is
float64; with --label-bf16, float32 and bfloat16.

    python tests/fit_a_few_steps.py RUN OUT [--label-bf16]
"""

import sys
from pathlib import Path

import torch
from conftest import SMALL, stages

from plumbing import several_devices


def main(run: str, out: str, label_bf16: bool) -> None:
    if not label_bf16:
        torch.set_default_dtype(torch.float64)
    several_devices.join(may=True)
    data = stages.data.load(run)
    # Nine documents to a batch are no equal shares for two processes; the last batch has one.
    n_documents = 9 * 10 + 1
    train = data.splits["train"].documents(torch.arange(n_documents).numpy())
    data = data._replace(splits={**data.splits, "train": train})
    settings = SMALL | {"epochs": 1, "batch_size": 9, "dropout": "0", "label_bf16": label_bf16}
    config = stages.train.Config(run=run, **settings)
    config = stages.train.settle(config, stages.model.RECIPES, data.meta)
    model = stages.model.build(data, stages.tree.load(run), config)
    if not label_bf16:
        model.double()
    records = []
    batches = stages.train.Batches(data, config.batch_size, config.max_len, config.seed)
    stages.train.fit(model, batches, config, records.append)
    if several_devices.is_first():
        losses = torch.tensor([record["loss"] for record in records])
        torch.save({"model": model.state_dict(), "loss": losses, "steps": len(batches)}, out)
    several_devices.leave()
    # A thread of the connection that lives on could crash while Python ends.
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    assert not [thread for thread in threads if "gloo" in thread], threads


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--label-bf16" in sys.argv)
