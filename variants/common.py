"""What the variants share: a run folder inside the cascade's, with its data and its settings.

A variant is trained on the same documents, with the same encoder, label tree, number of passes and
rates as the cascade in RUN, whose settings are read from RUN/model.pt. What it makes lies in
RUN/NAME, a run folder: tools.report and tools.compare work there. Stages 4 and 5 train one_vs_all
and light_xml, so the other tools read these, too.

Shapes   N documents, L labels, k labels predicted
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.cli import flag
from plumbing.ownership import owned
from plumbing.stages import load_stages
from plumbing.store import link, load_npz, load_pt, save_npz

stages = load_stages()


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of the cascade's run, trained before")


# 1. The run folder of a variant, and its settings.


def folder(run: str, name: str, *files: str) -> Path:
    """RUN/NAME, with the files of RUN in it. UserError while something is trained there."""
    out = Path(run) / name
    out.mkdir(parents=True, exist_ok=True)
    with owned(out):
        for file in files:
            # Load it first: an error about a missing or damaged file then names RUN, not the new
            # folder.
            load = load_npz if file.endswith(".npz") else load_pt
            load(Path(run) / file)
            # A link takes no room on the disk, and is the very same file.
            link(Path(run) / file, out / file)
    return out


def cascade_settings(run: str, out: Path, **changes) -> stages.train.Config:
    """The settings that the cascade in RUN was trained with, for a run in `out`."""
    content, _ = load_pt(Path(run) / "model.pt")
    # A variant changes only the settings in which it differs by its nature, such as --layers.
    values = content["config"] | changes
    return stages.train.Config(run=str(out), **values)


# 2. Variants that are a cascade on another tree: stages 4 and 5 do the work.


def train_on_tree(
    run: str, name: str, levels: Callable[[list[int]], list[int]], build: Callable, **changes
) -> None:
    """Stages 4 and 5 in RUN/NAME, with the model of `build` on some levels of the tree."""
    # A run folder with the data of the cascade.
    out = folder(run, name, "data.npz")
    with owned(out):
        train_in(out, run, levels, build, **changes)


def train_in(
    out: Path, run: str, levels: Callable[[list[int]], list[int]], build: Callable, **changes
) -> None:
    """train_on_tree, in the folder `out`."""
    # 1. What the cascade was trained with.
    config = cascade_settings(run, out, **changes)
    tree = stages.tree.load(run)
    stages.data.load(out)
    # A variant that was interrupted starts over. Its old checkpoints may be of another tree.
    for path in out.glob("checkpoint*.pt"):
        path.unlink()

    # 2. A tree with fewer levels. The labels keep their order, so clusters that are kept hold the
    #    same labels as before.
    kept = levels(tree.levels)
    slots = tree.slot_to_label
    # Empty slots, -1, make all leaf clusters equally large. Without the leaf level there is
    # nothing to fill up.
    if tree.levels[-1] not in kept:
        slots = slots[slots >= 0]
    levels_flag = ",".join(str(n) for n in kept)
    tree_config = stages.tree.Config(run=str(out), levels=levels_flag)
    arrays = {"slot_to_label": slots, "levels": np.array(kept, np.int64)}
    save_npz(out / "tree.npz", tree_config, arrays, made_from=("data.npz",))

    # 3. Train and test it as any other run.
    stages.train.run(config, build)
    stages.eval.run(stages.eval.Config(run=str(out)), build)


# 3. Predictions of variants that stage 5 does not know.


def test(
    out: Path, model, config: stages.train.Config, name: str, seconds: float, k: int = 100
) -> None:
    """Predict the validation and test splits by model.predict, and save them.

    tools.report chooses thresholds of the scores on the validation split.
    """
    data = stages.data.load(out)

    def predict(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        labels, scores = model.predict(batch, k)
        return {"labels": labels.cpu().numpy(), "scores": scores.cpu().numpy()}

    # Without a backward pass there is memory for twice as many documents as in training.
    size = 2 * config.batch_size
    for split in ("val", "test"):
        found = stages.train.predict_split(model, data, split, config.max_len, size, predict, k)
        save_predictions(out, data, found["labels"], found["scores"], name, seconds, split=split)


def save_predictions(
    out: Path,
    data: stages.data.Data,
    labels_Nk: np.ndarray,
    scores_Nk: np.ndarray,
    name: str,
    seconds: float,
    made_from: tuple[str, ...] = ("data.npz", "tree.npz"),
    split: str = "test",
) -> None:
    """Write the predictions of a split, from log scores. Print the metrics of the test split.

    `seconds`: how long the training took.
    """
    # 1. The file, in the format of stage 5, so that the tools can read it.
    config = stages.eval.Config(run=str(out), split=split, k=labels_Nk.shape[1])
    arrays = {
        "labels": labels_Nk.astype(np.int32),
        "scores": np.exp(scores_Nk).astype(np.float32),
    }
    save_npz(
        out / stages.eval.file_of(split),
        config,
        arrays,
        made_from=made_from,
        stage=f"variants/{name}.py",
        ranking=name,
        seconds=seconds,
    )
    if split != "test":
        return
    # 2. The same row that stage 5 prints for the cascade. Rare labels weigh more in PSP (05_eval.py
    #    says how much), and how rare a label is, is counted on the training documents.
    train = data.splits["train"]
    count_L = np.bincount(train.labels, minlength=len(data.names))
    weight_L = stages.eval.inverse_propensity(count_L, len(train))
    metrics = stages.eval.metrics(labels_Nk, data.splits["test"], weight_L)
    columns = "".join(f"{column:>7}" for column in stages.eval.COLUMNS)
    print(f"{'%':34}" + columns)
    print(stages.eval.row(name.replace("_", " "), metrics))
