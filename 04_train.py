"""Stage 4: train the cascade end to end.

    python 04_train.py
    python 04_train.py --run runs/mine --epochs 15 --batch-size 64
    python 04_train.py --run runs/mine --resume             go on after the last finished epoch

Reads    RUN/data.npz, RUN/tree.npz
Writes   RUN/model.pt        the best model by validation P@1 + P@3 + P@5: weights and everything that rebuilds it
         RUN/checkpoint.pt   where to go on after the last finished epoch
         RUN/log.jsonl       one record per interval and per epoch

Settings that are left open come from a recipe: one for 'tiny', the paper's for pretrained encoders. Left out here:
several devices, saving within an epoch.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from artifacts import UserError, flag, load_pt, main, save_pt

data_stage = import_module("01_data")
tree_stage = import_module("02_label_tree")
model_stage = import_module("03_model")

RECIPES = {
    "tiny": {"epochs": 4, "batch_size": 64, "lr": 2e-3, "lr_encoder": 1e-3},
    "pretrained": {"epochs": 15, "batch_size": 64, "lr": 1e-3, "lr_encoder": 1e-4},
}
POOL = 50  # batches whose documents are sorted by length together


@dataclass(frozen=True)
class Config(model_stage.Config):
    epochs: int = flag(None, "passes over the training documents [tiny 4, else 15]", int)
    batch_size: int = flag(None, "documents per step [64]", int)
    accumulate: int = flag(1, "batches whose gradients are added up before a step")
    lr: float = flag(None, "learning rate of the heads [tiny 2e-3, else 1e-3]", float)
    lr_encoder: float = flag(None, "learning rate of the encoder [tiny 1e-3, else 1e-4]", float)
    amp: str = flag("auto", "bf16, fp16, off, or auto: what the device is fast at")
    resume: bool = flag(False, "go on from RUN/checkpoint.pt")


# ---- batches ------------------------------------------------------------------------------------------------------


def bucketed(lengths_N: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Batches of row numbers: shuffled, sorted by length within pools of 50 batches, and the batches shuffled again.

    Documents of a batch are of about one length, so hardly any padding is computed, at the price of a little randomness.
    """
    order = rng.permutation(len(lengths_N))
    pools = [order[i : i + POOL * batch_size] for i in range(0, len(order), POOL * batch_size)]
    order = np.concatenate([pool[np.argsort(lengths_N[pool], kind="stable")] for pool in pools])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


# ---- prediction over a split ----------------------------------------------------------------------------------------


def hits(labels_Nk: np.ndarray, split: "data_stage.Split") -> np.ndarray:
    """(N, k) bool: which predicted labels are right; -1 never is. `split.labels` ascend within a document."""
    big = int(max(split.labels.max(initial=0), labels_Nk.max(initial=0))) + 1
    true_keys = np.repeat(np.arange(len(split)), np.diff(split.label_offsets)) * big + split.labels
    keys = np.arange(len(split))[:, None] * big + labels_Nk
    found = np.searchsorted(true_keys, keys)
    right = np.append(true_keys, -1)[np.minimum(found, len(true_keys))] == keys
    return right & (labels_Nk >= 0)


def predict_split(model: "model_stage.Cascade", data: "data_stage.Data", name: str, max_len: int, batch_size: int, device: torch.device,
                  autocast: Callable, predict: Callable[["data_stage.Batch"], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:  # fmt: skip
    """Run `predict`, which turns a batch into arrays with a row per document, over a split; rows in the corpus' order."""
    split = data.splits[name]
    model.eval()
    order = np.argsort(np.diff(split.offsets), kind="stable")
    parts = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        with autocast():
            parts.append(predict(data.batch(name, rows, max_len).to(device)))
    inverse = np.argsort(order)
    return {key: np.concatenate([part[key] for part in parts])[inverse] for key in parts[0]}


# ---- the fit ------------------------------------------------------------------------------------------------------


def lr_scale(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, flat, and a linear decay over the last fifth."""
    return min((step + 1) / max(1, warmup), 1.0, (total - step) / max(1, total // 5))


def run(config: Config) -> None:
    data, tree = data_stage.load(config.run), tree_stage.load(config.run)
    for recipes in (model_stage.RECIPES, RECIPES):
        config = model_stage.settle(config, data.meta["encoder"], recipes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model_stage.build(data, tree, config).to(device)
    split = data.splits["train"]
    lengths = np.minimum(np.diff(split.offsets), config.max_len)
    optimizer = torch.optim.AdamW(model.param_groups(config.lr, config.lr_encoder), fused=True, betas=(0.9, float(os.environ.get("B2","0.99"))))
    if os.environ.get('LRE'):
        emb=[p for n,p in model.named_parameters() if 'word_embeddings' in n]
        optimizer.param_groups[0]['params']=[p for p in optimizer.param_groups[0]['params'] if p is not emb[0]]
        optimizer.add_param_group({'params':emb,'lr':float(os.environ['LRE']),'weight_decay':0.0})
    base = [g["lr"] for g in optimizer.param_groups]
    spe = -(-len(split) // config.batch_size)
    total = spe * config.epochs
    autocast = (lambda: torch.autocast(device.type, dtype=torch.bfloat16)) if config.amp == "bf16" else nullcontext
    step = 0
    t0 = time.time()
    for epoch in range(config.epochs):
        model.train()
        rng = np.random.default_rng((config.seed, epoch))
        acc = torch.zeros(len(model.heads))
        sur = 0
        for i, rows in enumerate(bucketed(lengths, config.batch_size, rng)):
            batch = data.batch("train", rows, config.max_len)
            with autocast():
                losses, surplus = model.loss(batch)
            losses.sum().backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for g, b in zip(optimizer.param_groups, base):
                g["lr"] = b * lr_scale(step, total, WARM * spe)
            optimizer.step()
            optimizer.zero_grad()
            acc += losses.detach(); sur += surplus
            step += 1
            if step % 200 == 0:
                print(f"step {step}/{total} loss {[round(float(x),3) for x in acc/200]} norm {float(norm):.1f} {step*config.batch_size/(time.time()-t0):.0f} docs/s", flush=True)
                acc.zero_()
        t1 = time.time()
        y = data.splits["val"]

        def predict(batch):
            labels, scores, kept = model.beam(batch)
            out = {r: model_stage.best_k(labels, s, 5)[0].numpy() for r, s in scores.items()}
            for t, nodes in enumerate(kept):
                pos = model.label_to_slot[batch.label_P] // (model.counts[-1] // model.counts[t + 1])
                m = model_stage.match(pos, batch.doc_P, nodes, model.counts[t + 1], 1)
                out[f"r{t}"] = m.sum((1, 2)).numpy()
                mm=torch.zeros(len(nodes), model.counts[t+1]); mm[batch.doc_P,pos]=1
                out[f"n{t}"] = mm.sum(1).numpy()
            return out

        out = predict_split(model, data, "val", config.max_len, 128, device, autocast, predict)
        msg = ""
        for r in model_stage.RANKINGS:
            h = hits(out[r], y)
            msg += f" {r} " + "/".join(f"{100 * h[:, :k].sum() / len(y) / k:.1f}" for k in (1, 3, 5))
        rec = [f"{100*out[f'r{t}'].sum()/out[f'n{t}'].sum():.1f}" for t in range(len(tree.levels))]
        print(f"epoch {epoch + 1} {time.time() - t0:.0f} s (val {time.time()-t1:.0f}) surplus {int(sur)} {msg} recall {rec}", flush=True)

import os
CLIP=float(os.environ.get("CLIP","1")); WARM=float(os.environ.get("WARM","0.3"))
if __name__ == "__main__":
    main(run, Config, __doc__)
