"""What the benchmarks share: the stages as modules, synthetic corpora, and a record of where figures come from."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing.stages import load_stages  # noqa: E402

stages = load_stages()

shortlist = stages.model.shortlist


def machine(args) -> dict:
    """Commit, processor, versions and date of a measurement."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())
    return {
        "commit": commit or "unknown", "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": f"{len(os.sched_getaffinity(0))} cores, {cpu}", "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if getattr(args, "device", "cpu") == "cuda" else None,
        "torch": torch.__version__, "numpy": np.__version__,
    }


class Report:
    """A table that grows: every row is printed and, with where it comes from, in the JSON file at once."""

    def __init__(self, args) -> None:
        self.path, self.content = Path(args.out), {"machine": machine(args), "settings": vars(args), "rows": []}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        print(", ".join(f"{key} {value}" for key, value in self.content["machine"].items() if value is not None))

    def row(self, what: str, value: float, target: str = "", form: str = ".2f", **more) -> None:
        """One figure and what it should be."""
        print(f"{what:76} {format(value, form):>10}   {target}".rstrip(), flush=True)
        self.content["rows"].append({"what": what, "value": value, "target": target, **more})
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def random_tree(n_labels: int, levels: list[int], seed: int = 0):
    """A tree whose labels stand in random order: speed does not depend on which label is where."""
    bounds = np.array([0, n_labels])
    while len(bounds) - 1 < levels[-1]:
        bounds = stages.tree.halve(bounds)
    order = np.random.default_rng(seed).permutation(n_labels)
    return stages.tree.Tree(stages.tree.lay_out(order, bounds), levels)


def random_documents(n: int, n_labels: int, vocab: int, median: int, seed: int = 0, labels_each: int = 5):
    """A split of n documents: lengths log-normal about their median, as product texts are, tokens and labels at random,
    labels rarer by rank (Zipf)."""
    rng = np.random.default_rng(seed)
    length = np.clip(np.exp(rng.normal(np.log(median), 0.7, n)), 4, 2000).astype(np.int64)
    ids = rng.integers(10, vocab, length.sum()).astype(np.uint16)
    # Rank r with probability about 1/r, by inversion; drawn twice means once.
    rank_P = np.minimum(np.exp(rng.random(n * labels_each) * np.log(n_labels)).astype(np.int64), n_labels) - 1
    pairs = np.unique(np.repeat(np.arange(n), labels_each) * n_labels + rng.permutation(n_labels)[rank_P])
    counts = np.bincount(pairs // n_labels, minlength=n)
    offsets, label_offsets = (np.append(0, np.cumsum(part)).astype(np.int64) for part in (length, counts))
    return stages.data.Split(ids, offsets, (pairs % n_labels).astype(np.int32), label_offsets)


def random_data(n: int, n_labels: int, vocab: int = 30000, median: int = 60, seed: int = 0, n_test: int = 1000):
    """Data with such documents for training and testing."""
    meta = {"encoder": "tiny", "vocab_size": vocab, "prefix": [2], "suffix": [3], "pad": 0}
    splits = {name: random_documents(size, n_labels, vocab, median, seed + i)
              for i, (name, size) in enumerate((("train", n), ("test", n_test)))}
    return stages.data.Data(splits, [], meta)


def random_model(n_labels: int, levels: list[int], topk: list[int], depth: int, width: int, max_len: int, device: str):
    """A cascade around a BERT of that shape with random weights, in training mode."""
    import transformers

    torch.manual_seed(0)
    shape = transformers.BertConfig(vocab_size=30000, hidden_size=width, num_hidden_layers=depth,
                                    num_attention_heads=max(1, width // 64), intermediate_size=4 * width)
    encoder = stages.model.Encoder(transformers.BertModel(shape), "first", max_len)
    layers = stages.model.choose_layers(depth, len(levels) + 1)
    model = stages.model.Cascade(encoder, random_tree(n_labels, levels), topk, layers).to(device).train()
    for head in model.heads:
        torch.nn.init.normal_(head.weight, std=0.02)
    return model


def spread_shortlists(spread: bool = True) -> None:
    """Let shortlists be drawn at random: a batch touches as many clusters as it can, the most expensive case. Without,
    an untrained model keeps about the same clusters for all documents. A trained one lies in between."""
    def drawn(logits_BKF, targets_BKF, k: int):
        return shortlist(torch.randn_like(logits_BKF) if spread else logits_BKF, targets_BKF, k)

    stages.model.shortlist = drawn


def peak_bytes(run, device: str = "cpu") -> int:
    """Most memory while run() runs: of the GPU, or of this process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def topic_tokens(path: np.ndarray, n_labels: int, vocab: int, n_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """(len(path), n_tokens) token ids for texts about the labels `path`: each token belongs to one of the 17 groups,
    from all labels to eight neighbours, that hold the label, and is one of forty of that group, the first ones most
    often. So labels have a hierarchy that a clustering can find, and share words across it, as real ones do."""
    level = rng.integers(0, 18, (len(path), n_tokens))
    group = path[:, None] >> np.maximum(level, 3)
    word = np.exp(rng.random((len(path), n_tokens)) * np.log(40)).astype(np.int64)
    mixed = (group * 0x9E3779B1 + level * 0x85EBCA6B + word * 0xC2B2AE35).astype(np.uint64)
    mixed ^= mixed >> np.uint64(15)
    return ((mixed * np.uint64(0x2C1B3C6D)) >> np.uint64(7)).astype(np.int64) % vocab


def topic_split(n: int, n_labels: int, vocab: int, n_tokens: int, labels_each: int, seed: int = 0):
    """Documents with texts as topic_tokens makes them, labelled with neighbours; every label has a document."""
    rng = np.random.default_rng(seed)
    main = np.append(rng.permutation(n_labels)[: min(n, n_labels)], rng.integers(0, n_labels, max(0, n - n_labels)))
    near = np.clip(main[:, None] + rng.integers(-8, 9, (n, labels_each)), 0, n_labels - 1)
    near[:, 0] = main
    pairs = np.unique(np.arange(n)[:, None] * n_labels + near)
    counts = np.bincount(pairs // n_labels, minlength=n)
    ids = np.concatenate([topic_tokens(part, n_labels, vocab, n_tokens, rng).astype(np.uint16).ravel()
                          for part in np.array_split(main, max(1, n // 10000))])
    return stages.data.Split(ids, np.arange(n + 1, dtype=np.int64) * n_tokens, (pairs % n_labels).astype(np.int32),
                             np.append(0, np.cumsum(counts)))
