"""What the variants share: a run folder inside the cascade's, with its data and its settings.

A variant is trained on the same documents, with the same encoder, label tree, number of passes and
rates as the cascade in RUN, whose settings are read from RUN/model.pt. What it makes lies in
RUN/NAME, a run folder: tools.report and tools.compare work there. Stages 4 and 5 train one_vs_all
and light_xml, so the other tools read these, too.

Shapes   N documents, L labels, k labels predicted
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from plumbing.cli import flag, int_list, settings
from plumbing.errors import UserError
from plumbing.ownership import owned
from plumbing.stages import load_stages
from plumbing.store import link, load_npz, load_pt, save_npz, save_pt

stages = load_stages()


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of the cascade's run, trained before")


# 1. The run folder of a variant, and its settings.


def owns_its_folder(folder_name: Callable[[Config], str]) -> Callable:
    """Decorates run(config) of a variant: it runs as the only one in RUN/folder_name(config)."""

    def decorate(run: Callable) -> Callable:
        @functools.wraps(run)
        def run_alone(config: Config) -> None:
            with owned(Path(config.run) / folder_name(config)):
                run(config)

        return run_alone

    return decorate


def name_with(name: str, config: Config, *keys: str) -> str:
    """The name of a folder: `name`, and those settings of `keys` that are not the default.

    A flag that is on is called by its name, a word stands for itself, a number behind its name.
    """
    default = type(config)()
    parts = [name]
    for key in keys:
        value = getattr(config, key)
        if value == getattr(default, key):
            continue
        if isinstance(value, bool):
            parts.append(key)
        elif isinstance(value, str):
            parts.append(value)
        else:
            parts.append(f"{key}{value:g}")
    return "-".join(parts)


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


def clear(out: Path) -> None:
    """A variant that was interrupted starts over: its log would go on, its checkpoints are old."""
    for path in (*out.glob("checkpoint*.pt"), out / "log.jsonl"):
        path.unlink(missing_ok=True)


# 2. Trees with fewer levels. Where stages 4 and 5 know the model, they do the work.


def tree_with_clusters(run: str) -> stages.tree.Tree:
    """The tree of the cascade in RUN. UserError where it has no cluster level."""
    tree = stages.tree.load(run)
    if not tree.levels:
        raise UserError(
            f"{run}/tree.npz has no cluster level, and this system needs one; run: "
            f"python 02_label_tree.py --run {run} with --levels, and train the cascade on this tree"
        )
    return tree


def finest(levels: list[int]) -> list[int]:
    """Of the tree's cluster levels only the last, right above the labels."""
    return levels[-1:]


def none(levels: list[int]) -> list[int]:
    """Of the tree's cluster levels none: the labels are the children of the root."""
    return []


def save_tree(out: Path, slots: np.ndarray, levels: list[int]) -> None:
    """Write tree.npz: which label stands in each slot (-1: none), and the cluster levels."""
    levels_flag = ",".join(str(n) for n in levels)
    config = stages.tree.Config(run=str(out), levels=levels_flag)
    arrays = {"slot_to_label": slots, "levels": np.array(levels, np.int64)}
    save_npz(out / "tree.npz", config, arrays, made_from=("data.npz",))


def train_on_tree(
    run: str, name: str, levels: Callable[[list[int]], list[int]], build: Callable, **changes
) -> None:
    """Stages 4 and 5 in RUN/NAME, with the model of `build` on some levels of the tree."""
    train_in(folder(run, name, "data.npz"), run, levels, build, **changes)


def train_in(
    out: Path, run: str, levels: Callable[[list[int]], list[int]], build: Callable, **changes
) -> None:
    """The same in a folder that has its data.npz already."""
    # 1. What the cascade was trained with.
    tree = tree_with_clusters(run)
    config = cascade_settings(run, out, **changes)
    stages.data.load(out)
    clear(out)
    # 2. A tree with fewer levels. The labels keep their order, so clusters that are kept hold the
    #    same labels as before.
    kept = levels(tree.levels)
    slots = tree.slot_to_label
    # Empty slots, -1, make all leaf clusters equally large. Without the leaf level there is
    # nothing to fill up.
    if tree.levels[-1] not in kept:
        slots = slots[slots >= 0]
    save_tree(out, slots, kept)
    # 3. Train and test it as any other run.
    stages.train.run(config, build)
    stages.eval.run(stages.eval.Config(run=str(out)), build)


# 3. Models of variants that stage 4 does not train.


def build_on_last_layer(
    model_type: type[stages.model.Cascade],
    data: stages.data.Data,
    tree: stages.tree.Tree,
    config: stages.train.Config,
    encoder: stages.model.Encoder | None = None,
) -> stages.model.Cascade:
    """A model like the cascade, all levels of which read the last layer."""
    # The encoder as the cascade makes it. The rest of that cascade is not used.
    cascade = stages.model.build(data, tree, replace(config, layers=""), encoder)
    n_levels = len(tree.levels) + 1
    layers = [[cascade.encoder.depth]] * n_levels
    topk = int_list(config.topk, "--topk")
    dropout = stages.model.rates(config.dropout, n_levels)
    model = model_type(cascade.encoder, tree, topk, layers, dropout=dropout)
    if config.label_bf16:
        label_weight = model.heads[-1].weight
        label_weight.data = label_weight.data.bfloat16()
    return model


def save_model(out: Path, model, config: stages.train.Config, ranking: str, name: str) -> None:
    """Write model.pt, from which stages.train.load makes the model again.

    In the format of stage 4: "config" (the settings), "encoder" (its description), "ranking" (what
    predict() ranks by), "model" ({name: tensor}, the weights in the shapes of the model), "cascade"
    (the name of the class). data.npz and tree.npz of `out` must have been loaded: they are on
    record. `name`: the file in variants/. UserError where the disk is full.
    """
    content = {
        "config": settings(config),
        "encoder": model.encoder.description(),
        "ranking": ranking,
        "model": model.state_dict(),
        "cascade": type(model).__name__,
    }
    made_from = ("data.npz", "tree.npz")
    save_pt(out / "model.pt", config, content, made_from, stage=f"variants/{name}.py")


def precision_sum(labels_Nk: np.ndarray, split: stages.data.Split) -> float:
    """P@1 + P@3 + P@5 of these documents, as a share: what stage 4 judges by."""
    total = 0
    for j in (1, 3, 5):
        total += stages.train.hits(labels_Nk[:, :j], split).mean()
    return total


def fit_and_keep_best(
    model,
    batches: stages.train.Batches,
    data: stages.data.Data,
    config: stages.train.Config,
    log: Callable[[dict], None],
) -> float:
    """Train for config.epochs, and give the model the weights of its best pass.

    As in stage 4, the best pass has the largest P@1 + P@3 + P@5 on validation, and where no
    validation document has a label, it is the last. Gives the seconds that validation took.
    UserError for 0 epochs: then nothing would be trained.
    """
    if not config.epochs:
        raise UserError(
            "the cascade has --epochs 0, its heads alone were trained; this system is trained for "
            "as many passes as the cascade: train the cascade with --epochs 1 or more"
        )
    training = stages.train.Training(model, config, len(batches))
    can_judge = len(data.splits["val"].labels) > 0
    best = -1.0
    seconds = 0.0
    for _ in range(config.epochs):
        stages.train.train_one_epoch(training, batches, log)
        # 1. How good is the model now?
        start = time.perf_counter()
        labels_N5, _ = predict(model, data, "val", config, 5)
        total = precision_sum(labels_N5, data.splits["val"])
        print(f"pass {training.epoch}: validation P@1 + P@3 + P@5 {100 * total:.1f}", flush=True)
        # 2. A copy of the weights, in the memory of the host: the next pass changes them.
        if total > best or not can_judge:
            best = total
            kept = {key: value.to("cpu", copy=True) for key, value in model.state_dict().items()}
        seconds += time.perf_counter() - start
    model.load_state_dict(kept)
    return seconds


# 4. Predictions of variants that stage 5 does not know.


def predict(
    model, data: stages.data.Data, split: str, config: stages.train.Config, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(labels (N, k), log scores (N, k)) of a split, by model.predict."""

    def one(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        labels, scores = model.predict(batch, k)
        return {"labels": labels.cpu().numpy(), "scores": scores.cpu().numpy()}

    # Without a backward pass there is memory for twice as many documents as in training.
    size = 2 * config.batch_size
    found = stages.train.predict_split(model, data, split, config.max_len, size, one, k)
    return found["labels"], found["scores"]


def test(
    out: Path, model, config: stages.train.Config, name: str, seconds: float, k: int = 100
) -> None:
    """Predict the validation and test splits by model.predict, and save them.

    tools.report chooses thresholds of the scores on the validation split.
    """
    data = stages.data.load(out)
    for split in ("val", "test"):
        labels_Nk, scores_Nk = predict(model, data, split, config, k)
        save_predictions(out, data, labels_Nk, scores_Nk, name, seconds, split=split)


def label_weights(data: stages.data.Data) -> np.ndarray:
    """(L,): rare labels weigh more in PSP (05_eval.py). Counted on the training documents."""
    train = data.splits["train"]
    count_L = np.bincount(train.labels, minlength=len(data.names))
    return stages.eval.inverse_propensity(count_L, len(train))


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
    # 2. The same row that stage 5 prints for the cascade.
    weight_L = label_weights(data)
    metrics = stages.eval.metrics(labels_Nk, data.splits["test"], weight_L)
    columns = "".join(f"{column:>7}" for column in stages.eval.COLUMNS)
    print(f"{'%':34}" + columns)
    print(stages.eval.row(name.replace("_", " "), metrics))
