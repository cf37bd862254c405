"""Stage 4: train the cascade, and keep the epoch that is best on validation.

    python 04_train.py
    python 04_train.py --run runs/mine --epochs 15 --batch-size 64
    python 04_train.py --run runs/mine --epochs 0           the heads alone, in minutes
    python 04_train.py --run runs/mine --resume             go on from the last checkpoint

Reads    RUN/data.npz, RUN/tree.npz
Writes   RUN/model.pt        the best model by validation P@1 + P@3 + P@5, and what rebuilds it
         RUN/checkpoint.pt   everything needed to go on; the one before is checkpoint.previous.pt
         RUN/log.jsonl       one record per interval and per epoch

P@k, precision at k, is the share of correct labels among the first k that are predicted.

Training has two phases. A pretrained encoder is left alone first: its features are computed once,
and the heads learn on them (--head-epochs; 03_model.py says why). A head is the linear classifier
of one level of the tree. Then everything is trained end to end (--epochs). 'tiny', which starts
from nothing, has the second phase only. The features wait in a temporary file on the disk of RUN.
No listing shows it, and it is gone when the process ends. It takes 2 bytes x documents x hidden
states that are read x width.

On a GPU, --graphs is two to five times as fast (plumbing/cuda_graphs.py). A fork whose loss or
shortlist depends on a number that Python counts, such as the step, must leave it out.

With several GPUs: torchrun --nproc-per-node 4 -- 04_train.py --run runs/mine
(plumbing/several_devices.py; without torchrun, what stands there does nothing).

Shapes   N documents of a split, B documents of a batch, C clusters of a level, D width,
         K clusters kept for a document, H hidden states that are read, P (document, label) pairs,
         k predicted labels
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.surprises import tokens_cut
from plumbing import several_devices
from plumbing.checkpoints import (
    Randomness,
    get_state,
    go_on,
    save_checkpoint,
    set_state,
    start_over,
    to_go_on_from,
)
from plumbing.cli import flag, main, natural, positive, rate, settings, settle
from plumbing.cuda_graphs import TOKENS, RecordedSteps, refuse_what_cannot_be_recorded
from plumbing.encoders import set_weights
from plumbing.errors import UserError
from plumbing.feature_file import unnamed_array
from plumbing.known_labels import most_known, without_known
from plumbing.label_level import RowAdam
from plumbing.loss_watch import LossWatch
from plumbing.memory import memory_advice, room_for_training
from plumbing.ownership import owns_its_folder
from plumbing.precision import PRECISIONS, choose_amp
from plumbing.stopping import asked_to_stop
from plumbing.store import load_pt, save_pt
from plumbing.training_log import logger

data_stage = import_module("01_data")
tree_stage = import_module("02_label_tree")
model_stage = import_module("03_model")

POOL = 50  # batches whose documents are sorted by length together
CHUNK = 4096  # documents whose cached features are summed at a time
CLIP = 10.0  # largest norm of the gradient; RowAdam takes care of its own rows
INTERVALS = 50  # progress lines in a run, about


@dataclass(frozen=True)
class Config(model_stage.Config):
    # How long. None means: what the table of recipes in 03_model.py says for this encoder.
    epochs: int = flag(
        None, "passes over the training documents, end to end [tiny 5, else 15]", natural
    )
    head_epochs: int = flag(
        None, "passes that train the heads alone, first [tiny 0, else 10]", natural
    )
    # How fast the weights move.
    batch_size: int = flag(None, "documents per batch [tiny 128, else 64]", positive)
    lr: float = flag(None, "learning rate of the heads [tiny 1e-2, else 1e-3]", rate)
    lr_encoder: float = flag(None, "learning rate of the encoder [tiny 1e-3, else 1e-4]", rate)
    head_lr: float = flag(
        None,
        "learning rate of the heads while they are trained alone [tiny 1e-2, else 5e-3]",
        rate,
    )
    # For long runs.
    resume: bool = flag(False, "go on from RUN/checkpoint.pt")
    save_every: int = flag(
        0, "steps from one checkpoint to the next (0: only after each epoch)", natural
    )
    # For experts: the same training, faster or in less memory.
    amp: str = flag(
        "auto", "precision of the encoder: bf16, fp16, off, or auto: what this device is fast at"
    )
    accumulate: int = flag(
        1,
        "batches whose gradients are added up before a step; those of labels wait in memory",
        positive,
    )
    compile: bool = flag(
        False, "compile the encoder, once for all lengths: a minute or two, for long runs"
    )
    graphs: bool = flag(
        False, "record a step once, and let the GPU replay it: it no longer waits for Python"
    )


# 1. Batches: documents of about one length together.


class Batches:
    """The training documents, batch by batch, in an order that depends on seed and epoch alone.

    Documents of one batch should be of about one length, so that hardly any padding is computed. So
    the documents are shuffled, sorted by length within pools of 50 batches, and cut into batches,
    which are shuffled again. The price is a little randomness.
    """

    def __init__(
        self, data: data_stage.Data, batch_size: int, max_len: int, seed: int, round_to: int = 1
    ) -> None:
        self.data = data
        self.batch_size = batch_size
        self.max_len = max_len
        self.seed = seed
        self.round_to = round_to  # a batch is as long as its longest document, rounded up to this
        # Tokens of each document, as many as the encoder will read.
        self.length_N = np.minimum(np.diff(data.splits["train"].offsets), max_len)

    def __len__(self) -> int:
        return math.ceil(len(self.length_N) / self.batch_size)

    def rows(self, epoch: int) -> list[np.ndarray]:
        """Row numbers of the documents of each batch."""
        # Seed and epoch alone: an interrupted epoch gets the same batches when it goes on.
        rng = np.random.default_rng((self.seed, epoch))
        n = len(self.length_N)
        # 1. Shuffle all documents.
        shuffled = rng.permutation(n)
        # 2. Cut them into pools, and sort each pool by length.
        pool_size = POOL * self.batch_size
        cuts = range(pool_size, n, pool_size)
        pools = []
        for pool in np.split(shuffled, cuts):
            by_length = np.argsort(self.length_N[pool], kind="stable")
            pools.append(pool[by_length])
        # 3. Cut the pools into batches, and shuffle the batches: lengths come in no order.
        order = np.concatenate(pools)
        cuts = range(self.batch_size, n, self.batch_size)
        batches = np.split(order, cuts)
        return [batches[i] for i in rng.permutation(len(batches))]

    def __call__(self, epoch: int, first: int = 0) -> Iterator[data_stage.Batch]:
        """The batches of an epoch, from number `first` on; with several GPUs, this one's share."""
        for rows in self.rows(epoch)[first:]:
            own_rows, share = several_devices.share(rows)
            batch = self.data.batch("train", own_rows, self.max_len, self.round_to)
            yield batch._replace(share=share)


# 2. One step, one epoch.


def lr_scale(step: int, total: int, warmup: int) -> float:
    """The share of the learning rate: a linear rise, flat, a linear fall over the last fifth."""
    # From nearly 0 to 1 over the first steps: the optimiser knows no gradients yet.
    rise = (step + 1) / max(1, warmup)
    # From 1 to nearly 0 over the last: small steps settle what large ones only circle around.
    fall = (total - step) / max(1, total // 5)
    # In between both are above 1.
    return min(rise, 1.0, fall)


class Training:
    """A model, its optimisers, and how far they have come: all that changes while training.

    The model is any module with loss(batch) -> (losses (levels,), surplus ()) and param_groups(lr,
    lr_encoder). `steps_before`: steps of an earlier phase, which the log counts along.
    """

    def __init__(
        self, model: torch.nn.Module, config: Config, n_batches: int, steps_before: int = 0
    ) -> None:
        self.model = model
        self.config = config
        self.n_batches = n_batches
        self.steps_before = steps_before
        self.device = next(model.parameters()).device

        # 1. The optimisers. AdamW for the encoder and the cluster levels, RowAdam for the labels: a
        #    batch reaches few label rows, and AdamW would move, and remember, all of them.
        groups = model.param_groups(config.lr, config.lr_encoder)
        dense_groups = [group for group in groups if not group["rows"]]
        row_groups = [group for group in groups if group["rows"]]
        self.adam = torch.optim.AdamW(dense_groups, fused=True, betas=(0.9, 0.99))
        self.row_adam = RowAdam(row_groups) if row_groups else None
        self.optimizers = [self.adam]
        if self.row_adam:
            self.optimizers.append(self.row_adam)
        # The schedule changes a group's "lr" at every step, so its peak is kept here.
        self.peak_lr = [group["lr"] for group in self.groups()]
        self.dense_parameters = []
        for group in self.adam.param_groups:
            self.dense_parameters.extend(group["params"])
        # fp16 has a small range: the loss is scaled up, so that small gradients do not become 0.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        # It is given the losses of every step. It looks at them one step later, when a GPU need not
        # be waited for, and raises the error if something has gone wrong.
        self.watch = LossWatch(model)
        # --graphs: whole steps, replayed.
        self.recorded = None
        if config.graphs:
            self.recorded = RecordedSteps(
                self.on_the_device, self.groups, config.batch_size, self.device
            )

        # 2. The schedule.
        self.steps_per_epoch = math.ceil(n_batches / config.accumulate)
        self.total = self.steps_per_epoch * config.epochs
        self.warmup = min(self.steps_per_epoch, self.total // 10)
        self.interval = max(1, self.total // INTERVALS)  # steps from one progress line to the next

        # 3. How far it has come: what a checkpoint holds beside weights and optimisers.
        self.epoch = 0  # epochs done
        self.batch = 0  # batches done of the epoch that runs
        self.steps = 0  # steps done
        self.norm = None  # of the last step's gradient
        self.lr = 0.0  # of the last step
        # 4. For the next progress line: the sum of losses and surplus over `seen` batches. It is
        #    added up on the device, so that no step waits for it before the line is printed.
        self.sums = torch.zeros((), device=self.device)  # later (levels + 1,)
        self.seen = 0

    def groups(self) -> list[dict]:
        """The parameter groups of all optimisers. Loading a state replaces them, so ask again."""
        groups = []
        for optimizer in self.optimizers:
            groups.extend(optimizer.param_groups)
        return groups

    def train_on(self, batch: data_stage.Batch) -> bool:
        """Forward and backward of a batch, and a step, unless more batches are to share it.

        Says whether a step was taken.
        """
        # With --graphs all at once: the GPU has a recording of it.
        if self.recorded:
            self.set_rates()
            losses, surplus, self.norm = self.recorded(batch)
            self.count_batch(losses, surplus, batch)
            self.count_step(losses)
            return True
        # Otherwise one after the other.
        losses = self.forward_backward(batch)
        is_last = self.batch == self.n_batches
        is_step = is_last or self.batch % self.config.accumulate == 0
        if is_step:
            self.step(losses)
        return is_step

    def forward_backward(self, batch: data_stage.Batch) -> torch.Tensor:
        """Add the gradient of one batch to the gradient; the losses (levels,), detached."""
        # Several batches may share a step; the last step of an epoch may have fewer of them.
        accumulate = self.config.accumulate
        first_of_step = self.batch // accumulate * accumulate
        together = min(accumulate, self.n_batches - first_of_step)
        # Shared steps take the mean of their batches, so the learning rate need not know of them.
        # With several GPUs this is the mean over some of the documents, and counts for their share.
        losses, surplus = self.gradient(batch.to(self.device), batch.share / together)
        self.count_batch(losses, surplus, batch)
        return losses

    def step(self, losses: torch.Tensor) -> None:
        """Move the weights. UserError if a loss is not finite, or has grown a thousandfold."""
        self.set_rates()
        self.norm = self.move()
        self.count_step(losses)

    # What the device does in a step. Nothing here may look at a result: --graphs records it.

    def on_the_device(self, batch: data_stage.Batch) -> tuple[torch.Tensor, ...]:
        """A whole step of one batch: its losses (levels,), surplus () and gradient's norm ()."""
        losses, surplus = self.gradient(batch, 1.0)
        return losses, surplus, self.move()

    def gradient(self, batch: data_stage.Batch, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the gradient of weight times the loss; the losses (levels,) and the surplus ()."""
        # Forward, all levels.
        losses, surplus = self.model.loss(batch)
        # Backward, from the sum of all levels: each level teaches the encoder at once.
        loss = losses.sum() * weight
        self.scaler.scale(loss).backward()
        return losses.detach(), surplus

    def move(self) -> torch.Tensor:
        """Move the weights by the gradient, and forget it. The gradient's norm ()."""
        # 1. With several GPUs, the gradient of all documents.
        gradients = [p.grad for p in self.dense_parameters if p.grad is not None]
        several_devices.add_up(gradients)
        # 2. A batch with a huge gradient must not throw the encoder off: cut the gradient's length.
        #    A model without any dense gradient (heads alone, a tree without clusters) has none.
        self.scaler.unscale_(self.adam)
        norm = torch.zeros((), device=self.device)
        if gradients:
            norm = torch.nn.utils.clip_grad_norm_(self.dense_parameters, CLIP)
        # 3. The step, of the dense parameters and of the label rows.
        self.scaler.step(self.adam)
        if self.row_adam:
            # The gradient of the labels would be as big as their weights, so it is never built.
            # Backward has left two factors of it at the weights (plumbing/label_level.py). Like the
            # loss they are multiplied by the scale of fp16: step() divides by it. It also uses them
            # up, so there is nothing to zero afterwards.
            one = torch.ones((), device=self.device)
            self.row_adam.step(scale=self.scaler.scale(one))
        self.scaler.update()
        self.adam.zero_grad()
        return norm

    # What Python does in a step.

    def set_rates(self) -> None:
        """The learning rates of this step."""
        share = lr_scale(self.steps, self.total, self.warmup)
        for group, peak_lr in zip(self.groups(), self.peak_lr, strict=True):
            group["lr"] = peak_lr * share
        self.lr = self.peak_lr[-1] * share

    def count_batch(
        self, losses: torch.Tensor, surplus: torch.Tensor, batch: data_stage.Batch
    ) -> None:
        """What the next progress line will say."""
        self.sums = self.sums + torch.cat([losses * batch.share, surplus.view(1)])
        self.seen += 1
        self.batch += 1

    def count_step(self, losses: torch.Tensor) -> None:
        """Look at what came out, while the next batch is computed."""
        self.steps += 1
        watched = self.norm
        if self.config.amp == "fp16":
            # A gradient that overflows is no fault here: the scaler skips AdamW's step. (RowAdam
            # has taken it: the heads compute in float32, which does not overflow.)
            watched = torch.zeros_like(self.norm)
        self.watch(losses, watched, self.steps_before + self.steps, self.lr)

    def record(self, batches_per_s: float) -> dict:
        """The record of the log for the batches since the record before."""
        self.watch.check()
        several_devices.add_up([self.sums])
        *sums, surplus = self.sums.tolist()  # here the device is waited for
        record = {
            "epoch": self.epoch + 1,
            "epochs": self.config.epochs,
            "step": self.steps_before + self.steps,
            "total": self.steps_before + self.total,
            "loss": [level_sum / self.seen for level_sum in sums],
            "surplus": int(surplus),
            "lr": self.lr,
            "grad_norm": float(self.norm) if self.norm.isfinite() else None,
            "batches_per_s": batches_per_s,
        }
        if self.config.amp == "fp16":
            # AdamW counts the steps that it took; the scaler kept the others from it.
            taken = int(self.adam.state[self.dense_parameters[0]]["step"])
            record["skipped"] = self.steps - taken
        self.sums = torch.zeros_like(self.sums)
        self.seen = 0
        return record

    def parts(self) -> dict:
        """What has a state of its own."""
        return {
            "model": self.model,
            "scaler": self.scaler,
            "optimizers": self.optimizers,
            "watch": self.watch,
            "randomness": Randomness(),
        }

    def state(self) -> dict:
        """All that a checkpoint needs. With several GPUs, all of them call it together."""
        self.watch.check()  # never save what has gone wrong
        sums_of_all = several_devices.gather([self.sums.unsqueeze(0)])[0]
        return get_state(self.parts()) | {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.steps,
            "sums": sums_of_all,
            "seen": self.seen,
        }

    def set_state(self, state: dict) -> None:
        """Go on where the training stood that gave this state."""
        where = set_state(self.parts(), state)
        self.epoch = where["epoch"]
        self.batch = where["batch"]
        self.steps = where["step"]
        self.sums = several_devices.own_row(where["sums"].to(self.device))
        self.seen = where["seen"]


def nothing() -> None:
    """No checkpoint within an epoch."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


def train_one_epoch(
    training: Training,
    batches: Batches,
    log: Callable[[dict], None],
    checkpoint: Callable[[], None] = nothing,
    stop: Callable[[], bool] = never,
) -> None:
    """One pass over the training documents, or what is left of it after an interruption.

    `log` gets a record per interval. `checkpoint` is called every --save-every steps. When stop()
    says that somebody wants to stop, checkpoint() is called and KeyboardInterrupt is raised.
    """
    config = training.config
    training.model.train()
    seen_before = training.seen
    start = time.perf_counter()
    for batch in batches(training.epoch, training.batch):
        # 1. Forward, backward, and a step of the optimisers.
        if not training.train_on(batch):
            continue  # more batches are added up before the step
        is_last = training.batch == training.n_batches
        # 2. A progress line now and then.
        if training.steps % training.interval == 0 or is_last:
            seconds = time.perf_counter() - start
            log(training.record((training.seen - seen_before) / seconds))
            seen_before = 0
            start = time.perf_counter()
        if is_last:
            break  # the checkpoint comes after validation
        # 3. A checkpoint within the epoch, if somebody wants to stop or a long run asked for it.
        if stop() or config.save_every and training.steps % config.save_every == 0:
            checkpoint()
            interrupt_if_asked(training, stop)
    training.epoch += 1
    training.batch = 0


def interrupt_if_asked(training: Training, stop: Callable[[], bool]) -> None:
    """KeyboardInterrupt if stop() says so; a checkpoint has just been saved.

    What the error says is printed behind "04_train.py: interrupted".
    """
    if stop():
        step = training.steps_before + training.steps
        raise KeyboardInterrupt(f"; a checkpoint was saved after step {step}; go on with --resume")


def fit(
    model: torch.nn.Module, batches: Batches, config: Config, log: Callable[[dict], None]
) -> None:
    """Train a model for config.epochs, and nothing else: no validation, no checkpoints.

    No stage calls it. variants/ and experiments do.
    """
    training = Training(model, config, len(batches))
    for _ in range(config.epochs):
        train_one_epoch(training, batches, log)


# 3. Validation: how good is the model on documents that it was not trained on?


def hits(labels_Nk: np.ndarray, split: data_stage.Split) -> np.ndarray:
    """(N, k) bool: which predicted labels are correct. -1, no prediction, never is."""
    # The pairs (document, correct label): the document's number; split.labels are the labels.
    n_documents = len(split)
    doc_P = np.repeat(np.arange(n_documents), np.diff(split.label_offsets))
    hit_Nk = np.zeros(labels_Nk.shape, bool)
    for j, label_N in enumerate(labels_Nk.T):
        # The j-th prediction of a document, beside each of its correct labels. Equal: a hit.
        predicted_P = label_N[doc_P]
        is_hit_P = predicted_P == split.labels
        hit_Nk[doc_P[is_hit_P], j] = True
    return hit_Nk


def predict_rankings(
    model: model_stage.Cascade, batch: data_stage.Batch, k: int
) -> dict[str, np.ndarray]:
    """The best k labels of a batch by every ranking, and what the shortlists kept.

    "labels NAME" and "scores NAME" (B, k) for each ranking, and "kept t" (B,) for each cluster
    level: how many of a document's correct labels are below a cluster that the beam kept.
    """
    labels, scores, kept = model.beam(batch)
    # 1. The best labels, under each ranking.
    found = {}
    for name in model_stage.RANKINGS:
        best_labels, best_scores = model_stage.best_k(labels, scores[name], k)
        found[f"labels {name}"] = best_labels
        found[f"scores {name}"] = best_scores
    # 2. How many correct labels are still within reach after each cluster level?
    for t, clusters_BK in enumerate(kept):
        n_documents = len(clusters_BK)
        n_clusters = model.counts[t + 1]
        # A table of documents and clusters, with True where the beam kept the cluster.
        is_kept_BC = torch.zeros(
            n_documents, n_clusters, dtype=torch.bool, device=clusters_BK.device
        )
        is_kept_BC.scatter_(1, clusters_BK, True)
        # Look up, for each correct label, the cluster above it.
        node_P = model.nodes(batch.label_P, t)
        is_kept_P = is_kept_BC[batch.doc_P, node_P]
        # How many of these each document has.
        n_kept_B = torch.zeros_like(clusters_BK[:, 0])
        found[f"kept {t}"] = n_kept_B.index_add_(0, batch.doc_P, is_kept_P.long())
    # 3. Now, and only now, a GPU has to be waited for.
    for key, value in found.items():
        found[key] = value.cpu().numpy()
    return found


def predict_split(
    model: torch.nn.Module,
    data: data_stage.Data,
    name: str,
    max_len: int,
    batch_size: int,
    predict: Callable[[data_stage.Batch, int], dict[str, np.ndarray]],
    k: int,
) -> dict[str, np.ndarray]:
    """Apply predict(batch, k) to a whole split. The rows of what it finds are in the corpus' order.

    `predict` gives arrays with a row per document. In pairs "labels ..." and "scores ..." the
    labels that are known of a document beforehand make room for the next ones.
    """
    model.eval()
    device = next(model.parameters()).device
    # Where labels are known beforehand, predict as many more: k are left when these are taken out.
    known = data.known.get(name)
    more = most_known(known)
    # 1. Documents of about one length together, as in training: hardly any padding. With several
    #    GPUs, this one's share of them.
    order = np.argsort(np.diff(data.splits[name].offsets), kind="stable")
    order, _ = several_devices.share(order)
    parts = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = data.batch(name, rows, max_len).to(device)
        parts.append(predict(batch, k + more))
    # 2. What all GPUs have found, back in the corpus' order: as the rows are sorted.
    keys = list(parts[0])
    by_length = [np.concatenate([part[key] for part in parts]) for key in keys]
    order, *by_length = several_devices.gather_arrays([order, *by_length])
    _, back = np.unique(order, return_index=True)
    found = {}
    for key, values in zip(keys, by_length, strict=True):
        found[key] = values[back]
    # 3. What is known beforehand is no prediction.
    if more:
        for key in list(found):
            if key.startswith("labels"):
                scores = key.replace("labels", "scores")
                found[key], found[scores] = without_known(found[key], found[scores], known, k)
    return found


def validate(model: model_stage.Cascade, data: data_stage.Data, config: Config) -> dict:
    """{"P": {ranking: [P@1, P@3, P@5]}, "recall": [shortlist recall per level]}, all in percent."""

    def predict(batch: data_stage.Batch, k: int) -> dict[str, np.ndarray]:
        return predict_rankings(model, batch, k)

    # 1. Predict. Batches may be twice as large as in training: there is no backward pass.
    batch_size = 2 * config.batch_size
    found = predict_split(model, data, "val", config.max_len, batch_size, predict, k=5)
    split = data.splits["val"]
    labels_per_document = np.diff(split.label_offsets)
    n_labelled = max(1, int(np.count_nonzero(labels_per_document)))
    # 2. P@k of each ranking: correct ones among the first k, over k, averaged over documents.
    precision = {}
    for name in model_stage.RANKINGS:
        correct_Nk = hits(found[f"labels {name}"], split)
        correct_k = correct_Nk.sum(axis=0).cumsum()  # among the first 1, 2, ..., 5 of all documents
        precision[name] = [100 * float(correct_k[k - 1]) / k / n_labelled for k in (1, 3, 5)]
    # 3. Recall of the shortlists: the share of correct labels whose cluster was kept.
    n_pairs = max(1, len(split.labels))
    recall = []
    for t in range(len(model.topk)):
        recall.append(100 * float(found[f"kept {t}"].sum()) / n_pairs)
    return {"P": precision, "recall": recall}


# 4. Before the heads learn: features that are computed once, centred and scaled; biases that know
#    how frequent their labels are.


@torch.no_grad()
def encode(
    model: model_stage.Cascade, data: data_stage.Data, config: Config, stop: Callable[[], bool]
) -> data_stage.Data:
    """The data with features (N, H, D), float16, of training and validation documents."""
    model.eval()
    device = model.slot_to_label.device
    size = 2 * config.batch_size
    encoded = {}
    for name in ("train", "val"):
        split = data.splits[name]
        # An array that lies in a file: a million documents need not fit into memory.
        shape = (len(split), len(model.hidden), model.encoder.width)
        encoded[name] = unnamed_array(config.run, shape, np.float16)
        # Documents of about one length together, as in training: hardly any padding.
        order = np.argsort(np.diff(split.offsets), kind="stable")
        starts = range(0, len(order), size)
        for start in tqdm(starts, desc=f"encode {name}", unit=" batches", disable=None):
            if stop():
                raise KeyboardInterrupt(" while the encoder ran; nothing new was saved")
            # Several GPUs share a batch, and each gets all features: any of them may be needed.
            rows, _ = several_devices.share(order[start : start + size])
            batch = data.batch(name, rows, config.max_len).to(device)
            pooled = model.pooled(batch)
            found = [rows, pooled.half().cpu().numpy()]
            rows, pooled = several_devices.gather_arrays(found)
            encoded[name][rows] = pooled
    return data._replace(encoded=encoded)


def cache_size(model: model_stage.Cascade, data: data_stage.Data) -> int:
    """Bytes that `encode` writes."""
    n_documents = len(data.splits["train"]) + len(data.splits["val"])
    return 2 * n_documents * len(model.hidden) * model.encoder.width


def center(model: model_stage.Cascade, encoded_NHD: np.ndarray) -> None:
    """Set the model's centre and scale: the mean of the features, and one over their spread.

    There is one spread per hidden state, not one per feature: some encoders have features that are
    always zero. A hidden state that is the same for all documents, as the embedding of the first
    token is, keeps the scale 1. UserError for a hidden state that is too large for float16.
    """
    # 1. Sums over all documents, a part at a time: the features may be larger than the memory.
    n = len(encoded_NHD)
    sum_HD = np.zeros(encoded_NHD.shape[1:])
    squares_HD = np.zeros(encoded_NHD.shape[1:])
    for start in range(0, n, CHUNK):
        part = encoded_NHD[start : start + CHUNK].astype(np.float64)
        sum_HD += part.sum(axis=0)
        squares_HD += (part**2).sum(axis=0)
    mean_HD = sum_HD / n
    # 2. A number beyond 65,504 became infinite on its way into float16.
    for place, finite in enumerate(np.isfinite(mean_HD).all(axis=1)):
        if not finite:
            raise UserError(
                f"hidden state {model.hidden[place]} of the encoder is too large for float16, in "
                "which the features wait for the heads; leave it out of --layers, or take "
                "--head-epochs 0, which does without centring"
            )
    # 3. The variance of a hidden state: the mean square minus the square of the mean.
    square_H = (squares_HD / n).mean(axis=1)
    variance_H = square_H - (mean_HD**2).mean(axis=1)
    # A difference this small is rounding: the state is the same for all documents.
    varies_H = variance_H > 1e-6 * square_H
    spread_H = np.sqrt(np.where(varies_H, variance_H, 1.0))
    model.center_HD.copy_(torch.from_numpy(mean_HD))
    model.scale_H.copy_(torch.from_numpy(1 / spread_H))


@torch.no_grad()
def set_prior(model: model_stage.Cascade, split: data_stage.Split) -> None:
    """Start every bias at its node's log odds: how many documents have a label below it."""
    device = model.slot_to_label.device
    # The training pairs (document, label).
    n_documents = len(split)
    labels_per_document = torch.from_numpy(np.diff(split.label_offsets))
    doc_P = torch.arange(n_documents).repeat_interleave(labels_per_document).to(device)
    label_P = torch.from_numpy(split.labels).long().to(device)
    for t, head in enumerate(model.heads):
        n_nodes = model.counts[t + 1]
        node_P = model.nodes(label_P, t)
        # A pair (document, node) as one number. A document with several labels below a node counts
        # once.
        pairs = (doc_P * n_nodes + node_P).unique()
        node_of_pair = pairs % n_nodes
        count = node_of_pair.bincount(minlength=n_nodes).view_as(head.bias)
        # Half a document more on both sides: no logarithm of 0.
        odds = (count + 0.5) / (n_documents - count + 0.5)
        head.bias.copy_(odds.log())


# 5. A phase: the heads alone, or all. Train an epoch, validate, keep the best, save a checkpoint.


@dataclass
class Job:
    """What both phases share."""

    model: model_stage.Cascade
    data: data_stage.Data
    config: Config
    log: Callable[[dict], None]
    stop: Callable[[], bool]
    best: float = -1.0  # P@1 + P@3 + P@5 of the best epoch so far


def train_phase(
    job: Job,
    phase: str,
    config: Config,
    data: data_stage.Data,
    state: dict | None,
    steps_before: int,
) -> None:
    """Train for config.epochs, from the beginning or from the `state` of a checkpoint."""

    # 1. A new training, or one that goes on.
    round_to = TOKENS if config.graphs else 1
    batches = Batches(data, config.batch_size, config.max_len, config.seed, round_to)
    training = Training(job.model, config, len(batches), steps_before)
    if state:
        training.set_state(state)

    def log(record: dict) -> None:
        job.log({"phase": phase} | record)

    def checkpoint() -> None:
        save_phase(job, phase, training)

    # 2. Epoch by epoch: train, validate, keep the best, save a checkpoint.
    for _ in range(training.epoch, config.epochs):
        train_one_epoch(training, batches, log, checkpoint, job.stop)
        training.watch.check()  # the loss of the last step
        result = validate(job.model, data, job.config)
        keep_the_best(job, training, result, log)
        checkpoint()
        interrupt_if_asked(training, job.stop)


def keep_the_best(job: Job, training: Training, result: dict, log: Callable[[dict], None]) -> None:
    """Log a validation, and write model.pt if it is the best so far.

    Where no validation document has a label, nothing can be compared: the last epoch is kept.
    """
    # Which ranking is best on validation? The model is judged by it, and will predict with it.
    totals = {name: sum(precision) for name, precision in result["P"].items()}
    ranking = max(model_stage.RANKINGS, key=totals.get)
    step = training.steps_before + training.steps
    log({"epoch": training.epoch, "step": step, "validation": result, "ranking": ranking})
    # Better than every epoch before, of both phases? Then this is the model that stage 5 takes.
    can_judge = len(job.data.splits["val"].labels) > 0
    if totals[ranking] > job.best or not can_judge:
        job.best = totals[ranking]
        if not several_devices.is_first():
            return
        content = {
            "config": settings(job.config),
            "ranking": ranking,
            "model": job.model.state_dict(),
            "encoder": job.model.encoder.description(),
            "cascade": type(job.model).__name__,
        }
        save_pt(Path(job.config.run) / "model.pt", job.config, content, ("data.npz", "tree.npz"))


def save_phase(job: Job, phase: str, training: Training) -> None:
    """Write checkpoint.pt: the state of this training, and where in the run it stands."""
    state = training.state()
    if not several_devices.is_first():
        return
    is_last_phase = phase == "all" or job.config.epochs == 0
    content = {"config": settings(job.config), "cascade": type(job.model).__name__}
    content |= state
    content |= {
        "best": job.best,
        "phase": phase,
        "steps_before": training.steps_before,
        "finished": is_last_phase and training.epoch == training.config.epochs,
    }
    save_checkpoint(Path(job.config.run), job.config, content)


def train_heads(job: Job, state: dict | None) -> None:
    """The heads alone, on the features that the encoder computes once."""
    config = job.config
    data = job.data
    # 1. The features. They are not stored: an interrupted phase computes them once more, unless
    #    nothing but its end is left.
    is_over = state and state["epoch"] == config.head_epochs
    if not is_over:
        data = encode(job.model, data, config, job.stop)
    # 2. Centre and scale. They are among the model's weights, so a checkpoint has brought them.
    if not state:
        center(job.model, data.encoded["train"])
    # 3. Train. Batches come with their features now, so the encoder does not run and has no
    #    gradient, and AdamW leaves alone what has none. The heads compute in float32.
    heads_config = replace(config, epochs=config.head_epochs, lr=config.head_lr, amp="off")
    train_phase(job, "heads", heads_config, data, state, steps_before=0)


def train_all(job: Job, state: dict | None) -> None:
    """The whole cascade, end to end."""
    config = job.config
    n_batches = len(Batches(job.data, config.batch_size, config.max_len, config.seed))
    head_steps = math.ceil(n_batches / config.accumulate) * config.head_epochs
    train_phase(job, "all", config, job.data, state, steps_before=head_steps)


# 6. From the command line to a trained model.


def prepare(
    config: Config, data: data_stage.Data, tree: tree_stage.Tree, build: Callable
) -> tuple[model_stage.Cascade, Config, dict | None]:
    """(the model on its device, settings with nothing left open, the checkpoint to go on from)."""
    out = Path(config.run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # 1. The model, with weights to begin with. A checkpoint to go on from brings its settings.
    state = None
    if config.resume:
        state, config = to_go_on_from(out, config)
    if not config.head_epochs + config.epochs:
        raise UserError("--head-epochs 0 --epochs 0: nothing to train; raise one of them")
    model = build(data, tree, config).to(device)
    # The settings that are saved say what was chosen where the command left it open.
    topk = ",".join(str(k) for k in model.topk)
    layers = ",".join("+".join(str(layer) for layer in group) for group in model.layers)
    config = replace(config, topk=topk, layers=layers)

    # 2. A checkpoint brings its weights, too.
    if state:
        go_on(out, state, type(model).__name__)
        set_weights(model, state["model"], out / "checkpoint.pt", "04_train.py")
    # 3. Is there room on the disk for all that will be written?
    heads_left = config.head_epochs and (not state or state["phase"] == "heads")
    room_for_training(out, model, cache_size(model, data) if heads_left else 0)

    # 4. Which precision is fastest on this device? With --amp auto, a GPU takes bf16 if it can, and
    #    a CPU tries one batch both ways.
    batches = Batches(data, config.batch_size, config.max_len, config.seed)
    example = next(batches(0)).to(device)
    amp = choose_amp(config.amp, model, example)
    model.amp = several_devices.as_the_first_says(PRECISIONS, amp)
    config = replace(config, amp=model.amp)
    if config.graphs:
        refuse_what_cannot_be_recorded(config, device)
    if config.compile:
        model.encoder.compile(dynamic=True)
    # 5. Nothing has failed so far. Only now is a finished training cleared away; one that stopped
    #    on its way is refused.
    several_devices.wait_for_all()  # until all have read what there was
    if not config.resume and several_devices.is_first():
        start_over(out)
    return model, config, state


def train(config: Config, data: data_stage.Data, tree: tree_stage.Tree, build: Callable) -> None:
    """Build the cascade, train its heads, then all of it."""
    model, config, state = prepare(config, data, tree, build)
    if not len(data.splits["val"].labels):
        print("no validation document has a label: the last epoch is kept")
    room = config.max_len - len(data.meta["prefix"]) - len(data.meta["suffix"])
    for surprise in tokens_cut(data.splits["train"].offsets, room):
        print(f"surprise: {surprise}")
    shown = [f"{key}={value}" for key, value in settings(config).items()]
    print("settings: " + ", ".join(shown), flush=True)
    torch.manual_seed(config.seed + several_devices.number())

    log = logger(Path(config.run), config)
    # Ctrl-C is noted, not obeyed at once: the step ends, and a checkpoint is saved.
    with asked_to_stop() as stop:
        job = Job(model, data, config, log, several_devices.agreed(stop))
        if state:
            job.best = state["best"]
        else:
            set_prior(model, data.splits["train"])
        # Phase 1: the heads alone.
        if config.head_epochs and (not state or state["phase"] == "heads"):
            train_heads(job, state)
            state = None  # used up: the next phase starts at its beginning
        # Phase 2: everything.
        if config.epochs:
            train_all(job, state)


@owns_its_folder
def run(config: Config, build: Callable = model_stage.build) -> None:
    """Train. `build` makes the model: a variant has one of its own."""
    data = data_stage.load(config.run)
    tree = tree_stage.load(config.run)
    if not config.resume:  # a checkpoint knows all of its settings
        config = settle(config, model_stage.RECIPES, data.meta)
    with memory_advice(config, len(data.names)):
        train(config, data, tree, build)


def load(
    folder: str | Path,
    data: data_stage.Data,
    build: Callable = model_stage.build,
    config_type: type[Config] = Config,
) -> tuple[model_stage.Cascade, Config, str]:
    """(model, its settings, the ranking chosen on validation) from RUN/model.pt; needs no hub.

    A fork may have its own `build`, and its own settings in a subclass of Config.
    """
    path = Path(folder) / "model.pt"
    content, meta = load_pt(path)
    added = set(content["config"]) - {field.name for field in fields(config_type)}
    if added:
        raise UserError(
            f"{path} has settings that 04_train.py does not know ({', '.join(sorted(added))}); "
            "run the script that it was trained with"
        )
    config = config_type(run=str(folder), **content["config"])
    # The encoder is built from the description in the file, without the folder it came from. Where
    # there is none, `build` makes the encoder.
    encoder = None
    if content["encoder"] is not None:
        encoder = model_stage.make_encoder(data, config, content["encoder"], content["model"])
    model = build(data, tree_stage.load(folder), config, encoder)
    set_weights(model, content["model"], path, meta["stage"])
    trained_as = content.get("cascade", "Cascade")  # older files do not say
    if trained_as != type(model).__name__:
        print(f"note: {path} was trained as {trained_as}, this is {type(model).__name__}")
    model.amp = config.amp
    return model, config, content["ranking"]


if __name__ == "__main__":
    main(run, Config, __doc__, several=True)
