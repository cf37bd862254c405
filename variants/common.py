"""What the variants share: a run folder inside that of the cascade, with its data and its settings.

A variant is trained on the same documents, with the same encoder, label tree, number of passes and rates as the cascade
in RUN, whose settings are read from RUN/model.pt. What it makes lies in RUN/NAME, a run folder: tools.report and
tools.compare work there, and what stages 4 and 5 trained, one_vs_all and light_xml, is read by the other tools too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.cli import flag
from plumbing.stages import load_stages
from plumbing.store import link, load_npz, load_pt, save_npz

stages = load_stages()


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of the cascade's run, trained before")


def folder(run: str, name: str, *files: str) -> Path:
    """RUN/NAME, with the files of RUN in it."""
    out = Path(run) / name
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        load = load_npz if file.endswith(".npz") else load_pt
        load(Path(run) / file)  # what is missing or damaged is said of the folder it belongs to
        link(Path(run) / file, out / file)
    return out


def cascade_settings(run: str, out: Path, **changes) -> stages.train.Config:
    """The settings that the cascade in RUN was trained with, for a run in `out`."""
    content, _ = load_pt(Path(run) / "model.pt")
    return stages.train.Config(run=str(out), **content["config"] | changes)


def train_on_tree(run: str, name: str, levels: Callable[[list[int]], list[int]], build: Callable, **changes) -> None:
    """Stages 4 and 5 in RUN/NAME, on the cascade's tree with only some of its levels, with the model of `build`."""
    out = folder(run, name, "data.npz")
    config, tree = cascade_settings(run, out, **changes), stages.tree.load(run)
    stages.data.load(out)
    kept = levels(tree.levels)
    for path in out.glob("checkpoint*.pt"):  # a variant that was interrupted starts over
        path.unlink()
    # A leaf cluster's width belongs to the leaf level; without it there are no clusters to fill up.
    slots = tree.slot_to_label if tree.levels[-1] in kept else tree.slot_to_label[tree.slot_to_label >= 0]
    save_npz(out / "tree.npz", stages.tree.Config(run=str(out), levels=",".join(map(str, kept))),
                       {"slot_to_label": slots, "levels": np.array(kept, np.int64)}, made_from=("data.npz",))
    stages.train.run(config, build)
    stages.eval.run(stages.eval.Config(run=str(out)))


def test(out: Path, model, config: stages.train.Config, name: str, seconds: float, k: int = 100) -> None:
    """Predict the test split by model.predict, and save it."""
    data = stages.data.load(out)

    def predict(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        return dict(zip(("labels", "scores"), (x.cpu().numpy() for x in model.predict(batch, k)), strict=True))

    found = stages.train.predict_split(model, data, "test", config.max_len, 2 * config.batch_size, predict, k)
    save_predictions(out, data, found["labels"], found["scores"], name, seconds)


def save_predictions(out: Path, data: stages.data.Data, labels_Nk: np.ndarray, scores_Nk: np.ndarray, name: str,
                     seconds: float, made_from: tuple[str, ...] = ("data.npz", "tree.npz")) -> None:
    """Write predictions.npz of the test split, from log scores, with how long the training took; print its metrics."""
    config = stages.eval.Config(run=str(out), k=labels_Nk.shape[1])
    save_npz(out / "predictions.npz", config,
                       {"labels": labels_Nk.astype(np.int32), "scores": np.exp(scores_Nk).astype(np.float32)},
                       made_from=made_from, stage=f"variants/{name}.py", ranking=name, seconds=seconds)
    train, split = data.splits["train"], data.splits["test"]
    weight_L = stages.eval.inverse_propensity(np.bincount(train.labels, minlength=len(data.names)), len(train))
    print(f"{'%':34}" + "".join(f"{column:>7}" for column in stages.eval.COLUMNS))
    print(stages.eval.row(name.replace("_", " "), stages.eval.metrics(labels_Nk, split, weight_L)))
