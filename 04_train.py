"""Stage 4: train the cascade end to end, and keep the epoch that is best on validation.

    python 04_train.py
    python 04_train.py --run runs/mine --epochs 15 --batch-size 64
    python 04_train.py --run runs/mine --resume             go on after the last finished epoch

Reads    RUN/data.npz, RUN/tree.npz
Writes   RUN/model.pt        the best model by validation P@1 + P@3 + P@5: weights, and what rebuilds the model
         RUN/checkpoint.pt   everything needed to go on after the last finished epoch
         RUN/log.jsonl       one record per interval and per epoch

Settings left open come from a recipe: one for 'tiny', the paper's for pretrained encoders. Left out here: more than one
device, checkpoints within an epoch.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from artifacts import UserError, flag, keep_log, load_pt, main, positive, save_pt, settings, settle

data_stage = import_module("01_data")
tree_stage = import_module("02_label_tree")
model_stage = import_module("03_model")

RECIPES = {
    "tiny": {"epochs": 5, "batch_size": 128, "lr": 1e-2, "lr_encoder": 1e-3},
    "pretrained": {"epochs": 15, "batch_size": 64, "lr": 1e-3, "lr_encoder": 1e-4},
}
POOL = 50  # batches whose documents are sorted by length together
CLIP = 10.0  # largest norm of the gradient
INTERVALS = 50  # progress lines in a run, about


@dataclass(frozen=True)
class Config(model_stage.Config):
    epochs: int = flag(None, "passes over the training documents [tiny 5, else 15]", positive)
    batch_size: int = flag(None, "documents per batch [tiny 128, else 64]", positive)
    accumulate: int = flag(1, "batches whose gradients are added up before a step", positive)
    lr: float = flag(None, "learning rate of the heads [tiny 1e-2, else 1e-3]", float)
    lr_encoder: float = flag(None, "learning rate of the encoder [tiny 1e-3, else 1e-4]", float)
    amp: str = flag("auto", "precision of the encoder: bf16, fp16, off, or auto: what this device is fast at")
    resume: bool = flag(False, "go on from RUN/checkpoint.pt")


class Batches:
    """The training documents, in another order every epoch that depends on nothing but the seed and the epoch.

    They are shuffled, sorted by length within pools of 50 batches, and the batches shuffled again: documents of a batch
    are of about one length, so hardly any padding is computed, at the price of a little randomness."""

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

    def __call__(self, epoch: int) -> Iterator[data_stage.Batch]:
        return (self.data.batch("train", rows, self.max_len) for rows in self.rows(epoch))


def hits(labels_Nk: np.ndarray, split: data_stage.Split) -> np.ndarray:
    """(N, k) bool: which predicted labels are right; -1 never is."""
    # One key per (document, label); they ascend, because labels do within a document.
    stride = int(max(split.labels.max(initial=0), labels_Nk.max(initial=0))) + 1
    true_P = np.repeat(np.arange(len(split)), np.diff(split.label_offsets)) * stride + split.labels
    key_Nk = np.arange(len(split))[:, None] * stride + labels_Nk
    place_Nk = np.searchsorted(true_P, key_Nk)
    return (np.append(true_P, -1)[place_Nk] == key_Nk) & (labels_Nk >= 0)


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


def over_split(model: model_stage.Cascade, data: data_stage.Data, name: str, max_len: int, batch_size: int,
               predict: Callable[[data_stage.Batch], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Apply `predict`, which gives arrays with a row per document, to a whole split; rows in the corpus' order."""
    model.eval()
    order = np.argsort(np.diff(data.splits[name].offsets), kind="stable")
    device = model.slot_to_label.device
    parts = [predict(data.batch(name, order[i : i + batch_size], max_len).to(device))
             for i in range(0, len(order), batch_size)]
    back = np.argsort(order)
    return {key: np.concatenate([part[key] for part in parts])[back] for key in parts[0]}


def validate(model: model_stage.Cascade, data: data_stage.Data, config: Config) -> dict:
    """{"P": {ranking: [P@1, P@3, P@5]}, "recall": shortlist recall per level}, in percent, on the validation split."""
    found = over_split(model, data, "val", config.max_len, 2 * config.batch_size,
                       lambda batch: predict_rankings(model, batch, 5))
    split = data.splits["val"]
    labelled = max(1, int(np.count_nonzero(np.diff(split.label_offsets))))
    precision = {}
    for name in model_stage.RANKINGS:
        right = hits(found[f"labels {name}"], split).sum(axis=0).cumsum()
        precision[name] = [100 * float(right[k - 1]) / k / labelled for k in (1, 3, 5)]
    recall = [100 * float(found[f"kept {t}"].sum()) / max(1, len(split.labels)) for t in range(len(model.topk))]
    return {"P": precision, "recall": recall}


def lr_scale(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, flat, linear decay over the last fifth."""
    return min((step + 1) / max(1, warmup), 1.0, (total - step) / max(1, total // 5))


def choose_amp(model: model_stage.Cascade, batch: data_stage.Batch) -> str:
    """bf16 or fp16 on a GPU; on a CPU bf16 only if a forward and backward pass of the encoder is faster so."""
    if batch.ids_BT.is_cuda:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    seconds = {"off": [], "bf16": []}
    for _ in range(4):
        for model.amp, times in seconds.items():
            start = time.perf_counter()
            sum(x_BD.sum() for x_BD in model.features(batch)).backward()
            times.append(time.perf_counter() - start)
    model.zero_grad()
    fp32, bf16 = (float(np.median(times[1:])) for times in seconds.values())  # the first pass sets things up
    print(f"precision: one batch takes {1000 * fp32:.0f} ms in fp32 and {1000 * bf16:.0f} ms in bf16")
    return "bf16" if bf16 < fp32 else "off"


def fit(model: torch.nn.Module, batches: Batches, config: Config, log: Callable[[dict], None],
        after_epoch: Callable[[int, dict], None] = lambda epoch, state: None, state: dict | None = None) -> None:
    """Train any module with loss(batch) -> (losses (levels,), surplus ()) and param_groups(lr, lr_encoder).

    `log` gets a record per interval; `after_epoch(epochs done, state)` all that has to be saved to go on: given back as
    `state`, training goes on as if it had never stopped. UserError when the loss is no longer finite."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.param_groups(config.lr, config.lr_encoder), fused=True, betas=(0.9, 0.99))
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    peak_lr = [group["lr"] for group in optimizer.param_groups]
    per_epoch = -(-len(batches) // config.accumulate)
    total, epochs_done = per_epoch * config.epochs, 0
    warmup, interval = min(per_epoch, total // 10), max(1, total // INTERVALS)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if "random_cuda" in state and device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"])
        epochs_done = state["epochs_done"]

    step = epochs_done * per_epoch
    for epoch in range(epochs_done, config.epochs):
        model.train()
        sums, seen, start = 0.0, 0, time.perf_counter()
        for i, batch in enumerate(batches(epoch)):
            losses, surplus = model.loss(batch.to(device))
            together = min(config.accumulate, len(batches) - i // config.accumulate * config.accumulate)
            scaler.scale(losses.sum() / together).backward()
            # What the progress line needs is gathered on the device: no step waits for it before the line is printed.
            sums, seen = sums + torch.cat([losses.detach(), surplus.view(1)]), seen + 1
            if (i + 1) % config.accumulate and i + 1 < len(batches):
                continue
            for group, lr in zip(optimizer.param_groups, peak_lr, strict=True):
                group["lr"] = lr * lr_scale(step, total, warmup)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            if step % interval == 0 or step % per_epoch == 0:
                *losses, surplus = sums.tolist()
                record = {"epoch": epoch + 1, "step": step, "loss": [loss / seen for loss in losses],
                          "surplus": int(surplus), "lr": peak_lr[-1] * lr_scale(step - 1, total, warmup),
                          "grad_norm": float(norm.nan_to_num()), "batches_per_s": seen / (time.perf_counter() - start)}
                log(record | {"total": total})
                if not np.isfinite(record["loss"]).all():
                    raise UserError(f"the loss is no longer finite (step {step}): lower --lr or --lr-encoder; "
                                    f"the artifacts of {epoch} finished epochs are as they were")
                sums, seen, start = 0.0, 0, time.perf_counter()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                 "epochs_done": epoch + 1, "random": torch.get_rng_state()}
        if device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state()
        after_epoch(epoch + 1, state)


def progress(record: dict, config: Config) -> str:
    """The line that a person reads for a record of `fit`."""
    rate = record["batches_per_s"]
    left = (record["total"] - record["step"]) * config.accumulate / rate
    return (f"epoch {record['epoch']}/{config.epochs} step {record['step']}/{record['total']}"
            f"  loss {' '.join(f'{loss:.2f}' for loss in record['loss'])}  lr {record['lr']:.1e}"
            f"  {rate * config.batch_size:,.0f} documents/s  {left / 60:.1f} min left"
            + (f"  ({record['surplus']} positive nodes beyond k)" if record["surplus"] else ""))


def load(folder: str | Path, data: data_stage.Data) -> tuple[model_stage.Cascade, Config, str]:
    """(model, its settings, the ranking chosen on validation) from RUN/model.pt; needs no hub."""
    content, _ = load_pt(Path(folder) / "model.pt")
    config = Config(run=str(folder), **content["config"])
    encoder = dict(content["encoder"])
    backbone = AutoModel.from_config(AutoConfig.for_model(encoder.pop("model_type"), **encoder))
    model = model_stage.build(data, tree_stage.load(folder), config, backbone)
    model.load_state_dict(content["model"])
    model.amp = config.amp
    return model, config, content["ranking"]


def refuse_unfinished(path: Path) -> None:
    """UserError when starting over would overwrite the checkpoint of a run that could still go on."""
    try:
        state, _ = load_pt(path)
    except UserError:
        return  # damaged, or of other data: nothing can go on from it
    if state["epochs_done"] < state["config"]["epochs"]:
        raise UserError(f"{path} is of a run that stopped after epoch {state['epochs_done']} of "
                        f"{state['config']['epochs']}: go on with --resume, or delete it to start over")


def run(config: Config) -> None:
    out = Path(config.run)
    data, tree = data_stage.load(out), tree_stage.load(out)
    for recipes in (model_stage.RECIPES, RECIPES):
        config = settle(config, recipes, data.meta["encoder"])
    if config.amp not in ("auto", "bf16", "fp16", "off"):
        raise UserError(f"--amp {config.amp}: expected bf16, fp16, off or auto")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, state = model_stage.build(data, tree, config).to(device), None
    config = replace(config, topk=",".join(map(str, model.topk)),
                     layers=",".join("+".join(map(str, group)) for group in model.layers))
    if config.resume:
        state, _ = load_pt(out / "checkpoint.pt")
        config = replace(config, amp=state["config"]["amp"] if config.amp == "auto" else config.amp)
        for key, before in state["config"].items():
            if getattr(config, key) != before:
                raise UserError(f"--resume: {out}/checkpoint.pt was made with {key}={before}, not "
                                f"{getattr(config, key)}; give the same settings, or start over without --resume")
        keep_log(out / "log.jsonl", state["epochs_done"])
        print(f"going on after epoch {state['epochs_done']} of {config.epochs}")
    elif (out / "checkpoint.pt").exists():
        refuse_unfinished(out / "checkpoint.pt")
    batches = Batches(data, config.batch_size, config.max_len, config.seed)
    if config.amp == "auto":
        config = replace(config, amp=choose_amp(model, next(batches(0)).to(device)))
    model.amp = config.amp
    torch.manual_seed(config.seed)
    print("settings: " + ", ".join(f"{key}={value}" for key, value in settings(config).items()))
    best = state["best"] if state else -1.0

    with open(out / "log.jsonl", "a" if config.resume else "w") as log_file:

        def log(record: dict) -> None:
            log_file.write(json.dumps(record) + "\n")
            log_file.flush()
            if "loss" in record:
                print(progress(record, config), flush=True)

        def after_epoch(epoch: int, state: dict) -> None:
            nonlocal best
            result = validate(model, data, config)
            # p(label) alone was trained inside shortlists only: over all labels it ranks otherwise, so it is no choice.
            ranking = max(("parent", "path"), key=lambda name: sum(result["P"][name]))
            log({"epoch": epoch, "validation": result, "ranking": ranking})
            print(f"epoch {epoch} validation P@1/3/5 {'/'.join(f'{p:.1f}' for p in result['P'][ranking])} ranked by "
                  f"{ranking}; shortlist recall {' '.join(f'{r:.1f}' for r in result['recall'])}", flush=True)
            inputs, content = ("data.npz", "tree.npz"), {"config": settings(config), "ranking": ranking}
            if sum(result["P"][ranking]) > best:
                best = sum(result["P"][ranking])
                encoder = model.encoder.backbone.config.to_dict()
                save_pt(out / "model.pt", config, {**content, "model": state["model"], "encoder": encoder}, inputs)
            save_pt(out / "checkpoint.pt", config, {**content, **state, "best": best}, inputs)

        fit(model, batches, config, log, after_epoch, state)


if __name__ == "__main__":
    main(run, Config, __doc__)
