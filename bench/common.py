"""What the benchmarks share: the stages as modules, synthetic corpora, and a record of where
figures come from.
"""

import json
import os
import platform
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing.stages import load_stages  # noqa: E402

stages = load_stages()

shortlist = stages.model.shortlist  # as it is, before spread_shortlists replaces it


def commit_here() -> str:
    """The commit that is checked out, with -dirty where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def machine(args: Namespace) -> dict:
    """Commit, processor, versions and date of a measurement."""
    gpu = None
    if getattr(args, "device", "cpu") == "cuda":
        gpu = torch.cuda.get_device_name()
    return {
        "commit": commit_here(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": f"{len(os.sched_getaffinity(0))} cores, {processor()}",
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


class Report:
    """A table that grows. Every row is printed, and written to the JSON file args.out at once."""

    def __init__(self, args: Namespace) -> None:
        self.path = Path(args.out)
        self.content = {"machine": machine(args), "settings": vars(args), "rows": []}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known = [f"{key} {value}" for key, value in self.content["machine"].items() if value]
        print(", ".join(known))

    def row(self, what: str, value: float, target: str = "", form: str = ".2f", **more) -> None:
        """One figure and what it should be."""
        line = f"{what:76} {format(value, form):>10}   {target}"
        print(line.rstrip(), flush=True)
        self.content["rows"].append({"what": what, "value": value, "target": target, **more})
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def random_tree(n_labels: int, levels: list[int], seed: int = 0):
    """A tree whose labels stand in random order. Speed does not depend on which label is where."""
    bounds = np.array([0, n_labels])
    while len(bounds) - 1 < levels[-1]:
        bounds = stages.tree.halve(bounds)
    order = np.random.default_rng(seed).permutation(n_labels)
    return stages.tree.Tree(stages.tree.lay_out(order, bounds), levels)


def random_documents(
    n: int, n_labels: int, vocab: int, median: int, seed: int = 0, labels_each: int = 5
):
    """A split of n documents with random tokens and labels.

    Lengths are log-normal about their median, as the lengths of product texts are. Labels follow
    Zipf's law: the label of rank r is drawn with a probability of about 1 / r.
    """
    rng = np.random.default_rng(seed)
    # Tokens.
    length = np.exp(rng.normal(np.log(median), 0.7, n))
    length = np.clip(length, 4, 2000).astype(np.int64)
    ids = rng.integers(10, vocab, length.sum()).astype(np.uint16)
    # Ranks, by inversion of the distribution. Which label has which rank is random.
    rank_P = np.exp(rng.random(n * labels_each) * np.log(n_labels)).astype(np.int64)
    rank_P = np.minimum(rank_P, n_labels) - 1
    label_P = rng.permutation(n_labels)[rank_P]
    # Pairs of document and label as one number. A label drawn twice for a document counts once.
    pairs = np.unique(np.repeat(np.arange(n), labels_each) * n_labels + label_P)
    counts = np.bincount(pairs // n_labels, minlength=n)
    return stages.data.Split(
        ids, offsets_of(length), (pairs % n_labels).astype(np.int32), offsets_of(counts)
    )


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """(N + 1,) where the part of each document begins and ends."""
    return np.append(0, np.cumsum(counts)).astype(np.int64)


def random_data(
    n: int, n_labels: int, vocab: int = 30000, median: int = 60, seed: int = 0, n_test: int = 1000
):
    """Data with such documents for training and testing."""
    meta = {"encoder": "tiny", "vocab_size": vocab, "prefix": [2], "suffix": [3], "pad": 0}
    splits = {
        "train": random_documents(n, n_labels, vocab, median, seed),
        "test": random_documents(n_test, n_labels, vocab, median, seed + 1),
    }
    return stages.data.Data(splits, [], meta)


def random_model(
    n_labels: int,
    levels: list[int],
    topk: list[int],
    depth: int,
    width: int,
    max_len: int,
    device: str,
):
    """A cascade around a BERT of that shape with random weights, in training mode."""
    import transformers

    torch.manual_seed(0)
    shape = transformers.BertConfig(
        vocab_size=30000,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
    )
    encoder = stages.model.Encoder(transformers.BertModel(shape), "first", max_len)
    layers = stages.model.choose_layers(depth, len(levels) + 1)
    model = stages.model.Cascade(encoder, random_tree(n_labels, levels), topk, layers)
    model = model.to(device).train()
    for head in model.heads:
        torch.nn.init.normal_(head.weight, std=0.02)
    return model


def spread_shortlists(spread: bool = True) -> None:
    """Draw shortlists at random, so that a batch touches as many clusters as it can.

    This is the most expensive case. Without it (spread=False), an untrained model keeps about the
    same clusters for all documents, which is the cheapest. A trained model lies in between.
    """

    def drawn(logits_BKF, targets_BKF, k: int):
        if spread:
            logits_BKF = torch.randn_like(logits_BKF)
        return shortlist(logits_BKF, targets_BKF, k)

    stages.model.shortlist = drawn


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Most memory while run() runs: of the GPU, or of this process."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no VmHWM in /proc/self/status")


def topic_tokens(
    path: np.ndarray, n_labels: int, vocab: int, n_tokens: int, rng: np.random.Generator
) -> np.ndarray:
    """(len(path), n_tokens) token ids of texts about the labels `path`.

    Labels form groups: eight neighbours, sixteen, and so on up to all of them, 17 groups around
    every label. Each group has forty words of its own, the first of them the most frequent. A token
    is a word of one of its label's groups. So there is a hierarchy that a clustering can find, and
    words are shared across it, as they are in real texts.
    """
    level = rng.integers(0, 18, (len(path), n_tokens))
    group = path[:, None] >> np.maximum(level, 3)
    word = np.exp(rng.random((len(path), n_tokens)) * np.log(40)).astype(np.int64)
    # Which token a word of a group is: a hash of the three numbers.
    mixed = (group * 0x9E3779B1 + level * 0x85EBCA6B + word * 0xC2B2AE35).astype(np.uint64)
    mixed ^= mixed >> np.uint64(15)
    return ((mixed * np.uint64(0x2C1B3C6D)) >> np.uint64(7)).astype(np.int64) % vocab


def topic_split(n: int, n_labels: int, vocab: int, n_tokens: int, labels_each: int, seed: int = 0):
    """Documents with texts of topic_tokens, labelled with neighbours. Every label has a document,
    if there are as many documents as labels.
    """
    rng = np.random.default_rng(seed)
    once = rng.permutation(n_labels)[: min(n, n_labels)]
    again = rng.integers(0, n_labels, max(0, n - n_labels))
    main = np.append(once, again)
    near = np.clip(main[:, None] + rng.integers(-8, 9, (n, labels_each)), 0, n_labels - 1)
    near[:, 0] = main
    pairs = np.unique(np.arange(n)[:, None] * n_labels + near)
    counts = np.bincount(pairs // n_labels, minlength=n)
    parts = []
    for part in np.array_split(main, max(1, n // 10000)):
        tokens = topic_tokens(part, n_labels, vocab, n_tokens, rng)
        parts.append(tokens.astype(np.uint16).ravel())
    return stages.data.Split(
        np.concatenate(parts),
        np.arange(n + 1, dtype=np.int64) * n_tokens,
        (pairs % n_labels).astype(np.int32),
        offsets_of(counts),
    )
