"""Stage 4: train the heads, then the whole cascade end to end, and keep the epoch that is best on validation.

    python 04_train.py
    python 04_train.py --run runs/mine --epochs 0           the heads alone: a linear probe, minutes on a CPU
    python 04_train.py --run runs/mine --epochs 15 --batch-size 64
    python 04_train.py --run runs/mine --resume             go on from the last checkpoint

Reads    RUN/data.npz, RUN/tree.npz
Writes   RUN/model.pt        the best model by validation P@1 + P@3 + P@5: weights, and what rebuilds the model
         RUN/checkpoint.pt   everything needed to go on; the one before it is RUN/checkpoint.previous.pt
         RUN/log.jsonl       one record per interval and per epoch

Settings left open come from a recipe: one for 'tiny', which learns everything at once, one for pretrained encoders.
There the heads learn first (--head-epochs; 03_model.py says why), on features that the encoder computes once. These
lie, in float16, in a file without a name in RUN: 2 bytes x documents x hidden states read x width. Left out: a second
device.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.checkpoints import get_state, go_on, save_checkpoint, set_state, start_over
from plumbing.cli import flag, main, natural, positive, rate, settings, settle
from plumbing.encoders import bare_encoder, set_weights
from plumbing.errors import UserError
from plumbing.label_level import RowAdam
from plumbing.loss_watch import LossWatch
from plumbing.memory import memory_advice, room_for_training
from plumbing.precision import choose_amp
from plumbing.prediction import over_split
from plumbing.stopping import asked_to_stop
from plumbing.store import load_pt, save_pt
from plumbing.training_log import logger

data_stage = import_module("01_data")
tree_stage = import_module("02_label_tree")
model_stage = import_module("03_model")

RECIPES = {
    "tiny": {"head_epochs": 0, "epochs": 5, "batch_size": 128, "head_lr": 1e-2, "lr": 1e-2, "lr_encoder": 1e-3},
    "pretrained": {
        "head_epochs": 10, "epochs": 15, "batch_size": 64, "head_lr": 5e-3, "lr": 1e-3, "lr_encoder": 1e-4,
    },
}
POOL = 50  # batches whose documents are sorted by length together
CHUNK = 4096  # documents whose cached features are summed at a time
CLIP = 10.0  # largest norm of the gradient; RowAdam takes care of its rows by itself
INTERVALS = 50  # progress lines in a run, about


@dataclass(frozen=True)
class Config(model_stage.Config):
    head_epochs: int = flag(None, "passes that train the heads alone, first [tiny 0, else 10]", natural)
    epochs: int = flag(None, "passes over the training documents, end to end [tiny 5, else 15]", natural)
    batch_size: int = flag(None, "documents per batch [tiny 128, else 64]", positive)
    accumulate: int = flag(1, "batches whose gradients are added up before a step; labels' wait in memory", positive)
    head_lr: float = flag(None, "learning rate of the heads while they are trained alone [tiny 1e-2, else 5e-3]", rate)
    lr: float = flag(None, "learning rate of the heads [tiny 1e-2, else 1e-3]", rate)
    lr_encoder: float = flag(None, "learning rate of the encoder [tiny 1e-3, else 1e-4]", rate)
    amp: str = flag("auto", "precision of the encoder: bf16, fp16, off, or auto: what this device is fast at")
    compile: bool = flag(False, "compile the encoder, not per length: takes a minute or two, for long runs")
    save_every: int = flag(0, "steps from one checkpoint to the next (0: only after each epoch)", natural)
    resume: bool = flag(False, "go on from RUN/checkpoint.pt")


class Batches:
    """The training documents, in an order that depends on the seed and the epoch alone: shuffled, sorted by length
    within pools of 50 batches, and the batches shuffled again. Those of a batch are of about one length, so hardly any
    padding is computed, at the price of a little randomness."""

    def __init__(self, data: data_stage.Data, batch_size: int, max_len: int, seed: int) -> None:
        self.data, self.batch_size, self.max_len, self.seed = data, batch_size, max_len, seed
        self.length_N = np.minimum(np.diff(data.splits["train"].offsets), max_len)

    def __len__(self) -> int:
        return -(-len(self.length_N) // self.batch_size)

    def rows(self, epoch: int) -> list[np.ndarray]:
        """Row numbers of the documents of each batch."""
        rng, size = np.random.default_rng((self.seed, epoch)), self.batch_size
        order = rng.permutation(len(self.length_N))
        pools = np.split(order, range(POOL * size, len(order), POOL * size))
        order = np.concatenate([pool[np.argsort(self.length_N[pool], kind="stable")] for pool in pools])
        batches = np.split(order, range(size, len(order), size))
        return [batches[i] for i in rng.permutation(len(batches))]

    def __call__(self, epoch: int, first: int = 0) -> Iterator[data_stage.Batch]:
        return (self.data.batch("train", rows, self.max_len) for rows in self.rows(epoch)[first:])


def hits(labels_Nk: np.ndarray, split: data_stage.Split) -> np.ndarray:
    """(N, k) bool: which predicted labels are right; -1 never is."""
    # One key per (document, label); they ascend, because labels do within a document.
    stride = int(max(split.labels.max(initial=0), labels_Nk.max(initial=0))) + 1
    true_P = np.repeat(np.arange(len(split)), np.diff(split.label_offsets)) * stride + split.labels
    key_Nk = np.arange(len(split))[:, None] * stride + labels_Nk
    return (np.append(true_P, -1)[np.searchsorted(true_P, key_Nk)] == key_Nk) & (labels_Nk >= 0)


def predict_rankings(model: model_stage.Cascade, batch: data_stage.Batch, k: int) -> dict[str, np.ndarray]:
    """For each ranking "labels NAME" and "scores NAME" (B, k); "kept t" (B,): labels whose cluster the beam kept."""
    labels, scores, kept = model.beam(batch)
    found = {}
    for name in model_stage.RANKINGS:
        found[f"labels {name}"], found[f"scores {name}"] = model_stage.best_k(labels, scores[name], k)
    for t, nodes_BK in enumerate(kept):
        n = model.counts[t + 1]
        is_kept = torch.zeros(len(nodes_BK), n, dtype=torch.bool, device=nodes_BK.device).scatter_(1, nodes_BK, True)
        node_P = model.label_to_slot[batch.label_P] // (model.counts[-1] // n)
        found[f"kept {t}"] = torch.bincount(batch.doc_P[is_kept[batch.doc_P, node_P]], minlength=len(nodes_BK))
    return {key: value.cpu().numpy() for key, value in found.items()}


def validate(model: model_stage.Cascade, data: data_stage.Data, config: Config) -> dict:
    """{"P": {ranking: [P@1, P@3, P@5]}, "recall": shortlist recall per level}, in percent, on the validation split."""
    found = over_split(model, data, "val", config.max_len, 2 * config.batch_size,
                                 lambda batch, k: predict_rankings(model, batch, k), 5)
    split = data.splits["val"]
    labelled = max(1, int(np.count_nonzero(np.diff(split.label_offsets))))
    right = {name: hits(found[f"labels {name}"], split).sum(axis=0).cumsum() for name in model_stage.RANKINGS}
    precision = {name: [100 * float(n[k - 1]) / k / labelled for k in (1, 3, 5)] for name, n in right.items()}
    recall = [100 * float(found[f"kept {t}"].sum()) / max(1, len(split.labels)) for t in range(len(model.topk))]
    return {"P": precision, "recall": recall}


def lr_scale(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, flat, linear decay over the last fifth."""
    return min((step + 1) / max(1, warmup), 1.0, (total - step) / max(1, total // 5))


def fit(model: torch.nn.Module, batches: Batches, config: Config, log: Callable[[dict], None],
        save: Callable[[dict], None] = lambda state: None, state: dict | None = None,
        stop: Callable[[], bool] = lambda: False, steps_before: int = 0) -> None:
    """Train any module with loss(batch) -> (losses (levels,), surplus ()) and param_groups(lr, lr_encoder).

    `log` gets a record per interval; `save` all that is needed to go on, after each epoch ("batch" is 0 then), every
    config.save_every steps, and when stop() says so, with KeyboardInterrupt raised thereafter. Given back as `state`,
    training goes on as if it had never stopped. `steps_before`: of an earlier phase, which the log counts along.
    UserError when a loss is no longer finite, or grows a thousandfold."""
    device = next(model.parameters()).device
    groups = model.param_groups(config.lr, config.lr_encoder)
    dense, rows = [g for g in groups if not g["rows"]], [g for g in groups if g["rows"]]
    adam, one = torch.optim.AdamW(dense, fused=True, betas=(0.9, 0.99)), torch.ones((), device=device)
    optimizers = [adam, *([RowAdam(rows)] if rows else [])]
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    peak_lr = [group["lr"] for group in (*dense, *rows)]
    dense = [parameter for group in dense for parameter in group["params"]]
    per_epoch = -(-len(batches) // config.accumulate)
    total = per_epoch * config.epochs
    warmup, interval = min(per_epoch, total // 10), max(1, total // INTERVALS)
    watch = LossWatch(model)
    parts = {"model": model, "scaler": scaler, "optimizers": optimizers, "watch": watch}
    at = set_state(parts, state) if state else {"epoch": 0, "batch": 0, "step": 0, "sums": 0.0, "seen": 0}
    step, first, sums, seen = at["step"], at["batch"], torch.as_tensor(at["sums"], device=device), at["seen"]

    every_group = [group for optimizer in optimizers for group in optimizer.param_groups]
    for epoch in range(at["epoch"], config.epochs):
        model.train()
        before, start = seen, time.perf_counter()
        for i, batch in enumerate(batches(epoch, first), first):
            losses, surplus = model.loss(batch.to(device))
            together = min(config.accumulate, len(batches) - i // config.accumulate * config.accumulate)
            scaler.scale(losses.sum() / together).backward()
            # What the progress line needs is gathered on the device: no step waits for it before the line is printed.
            sums, seen = sums + torch.cat([losses.detach(), surplus.view(1)]), seen + 1
            if (i + 1) % config.accumulate and i + 1 < len(batches):
                continue
            for group, lr in zip(every_group, peak_lr, strict=True):
                group["lr"] = lr * lr_scale(step, total, warmup)
            scaler.unscale_(adam)
            norm = torch.nn.utils.clip_grad_norm_(dense, CLIP).to(device)  # without any gradient it is on the CPU
            scaler.step(adam)
            for optimizer in optimizers[1:]:
                optimizer.step(scale=scaler.scale(one))
            scaler.update()
            adam.zero_grad()
            step, last, lr = step + 1, i + 1 == len(batches), peak_lr[-1] * lr_scale(step, total, warmup)
            watch(losses.detach(), 0 * norm.nan_to_num() if config.amp == "fp16" else norm,
                  steps_before + step, lr)
            if step % interval == 0 or last:
                watch.check()
                *means, surplus = sums.tolist()
                record = {"epoch": epoch + 1, "epochs": config.epochs, "step": steps_before + step,
                          "total": steps_before + total, "loss": [loss / seen for loss in means],
                          "surplus": int(surplus), "lr": lr, "grad_norm": float(norm) if norm.isfinite() else None,
                          "batches_per_s": (seen - before) / (time.perf_counter() - start)}
                if config.amp == "fp16":
                    record["skipped"] = step - int(adam.state[dense[0]]["step"])
                log(record)
                sums, seen, before, start = torch.zeros_like(sums), 0, 0, time.perf_counter()
            if last or stop() or config.save_every and step % config.save_every == 0:
                watch.check()
                at = {"epoch": epoch + last, "batch": 0 if last else i + 1, "step": step, "sums": sums, "seen": seen}
                save(get_state(parts) | at)
                if stop():
                    raise KeyboardInterrupt(f"; a checkpoint was saved after step {steps_before + step}; go on with "
                                            "--resume")
        first = 0


@torch.no_grad()
def encode(model: model_stage.Cascade, data: data_stage.Data, config: Config, stop: Callable[[], bool]
           ) -> data_stage.Data:
    """The data with what the encoder, as it is now, says of the training and validation documents: (N, H, D) float16.

    They lie in a file without a name in the run folder: memory holds of it what there is room for, and it is gone
    when the process ends, however that ends.
    """
    model.eval()
    device = model.slot_to_label.device
    encoded = {}
    for name in ("train", "val"):
        split = data.splits[name]
        shape = (len(split), len(model.hidden), model.encoder.backbone.config.hidden_size)
        with tempfile.TemporaryFile(dir=config.run) as file:  # the array keeps it as long as it is needed
            if hasattr(os, "posix_fallocate"):  # or a disk that fills up later would kill the process without a word
                os.posix_fallocate(file.fileno(), 0, 2 * math.prod(shape))
            encoded[name] = np.memmap(file, np.float16, "w+", shape=shape)
        # Documents of about one length together, as in prediction: hardly any padding.
        order = np.argsort(np.diff(split.offsets), kind="stable")
        size = 2 * config.batch_size
        for start in tqdm(range(0, len(order), size), desc=f"encode {name}", unit=" batches", disable=None):
            if stop():
                raise KeyboardInterrupt(" while the encoder ran; nothing new was saved")
            rows = order[start : start + size]
            pooled_BHD = model.pooled(data.batch(name, rows, config.max_len).to(device))
            encoded[name][rows] = pooled_BHD.half().cpu().numpy()
    return data._replace(encoded=encoded)


def cache_size(model: model_stage.Cascade, data: data_stage.Data) -> int:
    """Bytes that `encode` writes."""
    documents = len(data.splits["train"]) + len(data.splits["val"])
    return 2 * documents * len(model.hidden) * model.encoder.backbone.config.hidden_size


def center(model: model_stage.Cascade, encoded_NHD: np.ndarray) -> None:
    """Set the model's centre and scale: the mean of the features, and one standard deviation per hidden state.

    One per hidden state, not one per feature: some encoders have features that are always zero. A hidden state that is
    the same for all documents, as the embedding of the first token is, keeps the scale 1. UserError for a hidden state
    that is too large for float16.
    """
    total = np.zeros(encoded_NHD.shape[1:])
    square = np.zeros(encoded_NHD.shape[1:])
    for start in range(0, len(encoded_NHD), CHUNK):
        part = encoded_NHD[start : start + CHUNK].astype(np.float64)
        total += part.sum(axis=0)
        square += (part**2).sum(axis=0)
    mean = total / len(encoded_NHD)
    for place, finite in enumerate(np.isfinite(mean).all(axis=1)):
        if not finite:
            raise UserError(f"hidden state {model.hidden[place]} of the encoder is too large for float16, in which the "
                            "features wait for the heads; leave it out of --layers, or take --head-epochs 0")
    square_H = (square / len(encoded_NHD)).mean(axis=1)
    variance_H = square_H - (mean**2).mean(axis=1)
    varies = variance_H > 1e-6 * square_H
    spread_H = np.sqrt(np.where(varies, variance_H, 1.0))
    model.center_HD.copy_(torch.from_numpy(mean))
    model.scale_H.copy_(torch.from_numpy(1 / spread_H))


@torch.no_grad()
def set_prior(model: model_stage.Cascade, split: data_stage.Split) -> None:
    """Start every bias at its node's log odds: the share of training documents with a label below the node."""
    device = model.slot_to_label.device
    doc_P = torch.arange(len(split)).repeat_interleave(torch.from_numpy(np.diff(split.label_offsets))).to(device)
    slot_P = model.label_to_slot[torch.from_numpy(split.labels).long().to(device)]
    for n, head in zip(model.counts[1:], model.heads, strict=True):
        # A document with several labels below a node counts once.
        pair = (doc_P * n + slot_P // (model.counts[-1] // n)).unique()
        count = (pair % n).bincount(minlength=n).view_as(head.bias)
        head.bias.copy_(((count + 0.5) / (len(split) - count + 0.5)).log())


def load(folder: str | Path, data: data_stage.Data, build: Callable = model_stage.build) -> tuple:
    """(model, its settings, the ranking chosen on validation) from RUN/model.pt; needs no hub."""
    content, meta = load_pt(Path(folder) / "model.pt")
    config = Config(run=str(folder), **content["config"])
    encoder = bare_encoder(content["encoder"], content["model"])
    model = build(data, tree_stage.load(folder), config, encoder)
    set_weights(model, content["model"], Path(folder) / "model.pt", meta["stage"])
    model.amp = config.amp
    return model, config, content["ranking"]


def run(config: Config, build: Callable = model_stage.build) -> None:
    data, tree = data_stage.load(config.run), tree_stage.load(config.run)
    for recipes in (model_stage.RECIPES, RECIPES):
        config = settle(config, recipes, data.meta["encoder"])
    with memory_advice(config, len(data.names)):
        train(config, data, tree, build)


class Keeper:
    """What `fit` calls to save, in one phase of a training: validates after each epoch, keeps the best model, and
    writes the checkpoints. `best`: the best validation so far, of an earlier phase too."""

    def __init__(self, model: model_stage.Cascade, data: data_stage.Data, config: Config, log: Callable[[dict], None],
                 best: float, phase: str, steps_before: int) -> None:
        self.model, self.data, self.config, self.log = model, data, config, log
        self.best, self.phase, self.steps_before = best, phase, steps_before
        self.out = Path(config.run)
        self.can_judge = len(data.splits["val"].labels) > 0

    def __call__(self, state: dict) -> None:
        if state["batch"] == 0:  # an epoch is over
            self.validate(state)
        heads_are_all = self.phase == "heads" and not self.config.epochs
        epochs = self.config.head_epochs if self.phase == "heads" else self.config.epochs
        finished = (self.phase == "all" or heads_are_all) and state["epoch"] == epochs
        where = {"best": self.best, "phase": self.phase, "steps_before": self.steps_before, "finished": finished}
        save_checkpoint(self.out, self.config, {"config": settings(self.config)} | state | where)

    def validate(self, state: dict) -> None:
        """Validate, and keep the model if it is the best so far; where no validation document has a label, the last."""
        result = validate(self.model, self.data, self.config)
        ranking = max(model_stage.RANKINGS, key=lambda name: sum(result["P"][name]))
        step = self.steps_before + state["step"]
        self.log({"epoch": state["epoch"], "step": step, "validation": result, "ranking": ranking})
        score = sum(result["P"][ranking])
        if score > self.best or not self.can_judge:
            self.best = score
            content = {"config": settings(self.config), "ranking": ranking, "model": state["model"],
                       "encoder": self.model.encoder.backbone.config.to_dict()}
            save_pt(self.out / "model.pt", self.config, content, ("data.npz", "tree.npz"))


def train(config: Config, data: data_stage.Data, tree: tree_stage.Tree, build: Callable) -> None:
    """Build the cascade, train its heads, then all of it, and keep checkpoints and the best epoch."""
    if not config.head_epochs + config.epochs:
        raise UserError("--head-epochs 0 --epochs 0: nothing to train; raise one of them")
    out, device = Path(config.run), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(data, tree, config).to(device)
    config = replace(config, topk=",".join(map(str, model.topk)),
                     layers=",".join("+".join(map(str, group)) for group in model.layers))
    state, config = go_on(out, config) if config.resume else (None, config)
    if state:
        set_weights(model, state["model"], out / "checkpoint.pt", "04_train.py")
    heads_left = config.head_epochs and (not state or state["phase"] == "heads")
    room_for_training(out, model, cache_size(model, data) if heads_left else 0)
    batches = Batches(data, config.batch_size, config.max_len, config.seed)
    config = replace(config, amp=choose_amp(config.amp, model, next(batches(0)).to(device)))
    if config.compile:
        model.encoder.compile(dynamic=True)
    if not config.resume:
        start_over(out)
    if not len(data.splits["val"].labels):
        print("no validation document has a label: the last epoch is kept")
    torch.manual_seed(config.seed)
    print("settings: " + ", ".join(f"{key}={value}" for key, value in settings(config).items()), flush=True)

    log = logger(out, config)
    best = state["best"] if state else -1.0
    with asked_to_stop() as stop:
        if not state:
            set_prior(model, data.splits["train"])
        if heads_left:
            best = train_heads(model, data, config, log, best, state, stop)
            state = None  # used up: the next phase starts fresh
        if config.epochs:
            train_all(model, data, config, log, best, state, stop)


def train_heads(model: model_stage.Cascade, data: data_stage.Data, config: Config, log: Callable[[dict], None],
                best: float, state: dict | None, stop: Callable[[], bool]) -> float:
    """The heads alone, on what the encoder says of the documents; the best validation."""
    if not state or state["epoch"] < config.head_epochs:
        data = encode(model, data, config, stop)
    if not state:
        center(model, data.encoded["train"])

    def log_heads(record: dict) -> None:
        log({"phase": "heads"} | record)

    keeper = Keeper(model, data, config, log_heads, best, "heads", steps_before=0)
    batches = Batches(data, config.batch_size, config.max_len, config.seed)
    # There is no encoder in these steps, and the heads compute in float32.
    heads_config = replace(config, epochs=config.head_epochs, lr=config.head_lr, amp="off")
    fit(model, batches, heads_config, log_heads, keeper, state, stop)
    return keeper.best


def train_all(model: model_stage.Cascade, data: data_stage.Data, config: Config, log: Callable[[dict], None],
              best: float, state: dict | None, stop: Callable[[], bool]) -> None:
    """The whole cascade, end to end."""
    def log_all(record: dict) -> None:
        log({"phase": "all"} | record)

    batches = Batches(data, config.batch_size, config.max_len, config.seed)
    steps_before = -(-len(batches) // config.accumulate) * config.head_epochs
    keeper = Keeper(model, data, config, log_all, best, "all", steps_before)
    fit(model, batches, config, log_all, keeper, state, stop, steps_before)


if __name__ == "__main__":
    main(run, Config, __doc__)
