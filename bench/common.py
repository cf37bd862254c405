"""What the benchmarks share: the stages as modules, synthetic corpora, and a record of where
figures come from.

Shapes   N documents, L labels, P (document, label) pairs, T tokens of a text, B documents of a
         batch, K clusters kept for a document, F children of a cluster
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

# A benchmark is started as a script of its own, so Python does not look for modules in ROOT yet.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing.stages import load_stages  # noqa: E402

stages = load_stages()

shortlist = stages.model.shortlist  # as it is, before spread_shortlists replaces it


# 1. Where a figure comes from.


def commit_here() -> str:
    """The commit that is checked out, with -dirty where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    # Outside a repository git prints nothing here, only an error.
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """The name of the processor, as Linux says it; its architecture where Linux does not."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def machine(args: Namespace) -> dict:
    """Commit, processor, versions and date of a measurement."""
    gpu = None
    if getattr(args, "device", "cpu") == "cuda":  # some benchmarks have no --device
        gpu = torch.cuda.get_device_name()
    # The cores that this process may use, which in a container are often fewer than there are.
    n_cores = len(os.sched_getaffinity(0))
    return {
        "commit": commit_here(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": f"{n_cores} cores, {processor()}",
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
        # A folder that cannot be made is an error now, not after the first measurement.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known = [f"{key} {value}" for key, value in self.content["machine"].items() if value]
        print(", ".join(known))

    def row(self, what: str, value: float, target: str = "", form: str = ".2f", **more) -> None:
        """One figure and what it should be.

        `form` is how the figure is printed. The file has all its digits, and also what is in
        `more`.
        """
        shown = format(value, form)
        line = f"{what:76} {shown:>10}   {target}"
        print(line.rstrip(), flush=True)
        # The whole file anew: a benchmark that is stopped leaves what it has measured so far.
        self.content["rows"].append({"what": what, "value": value, "target": target, **more})
        text = json.dumps(self.content, indent=1)
        self.path.write_text(text + "\n")


# 2. Data and a model of any size. Texts are random tokens: what a step costs does not depend on
#    what they say.


def random_tree(n_labels: int, levels: list[int], seed: int = 0):
    """A tree whose labels stand in random order. Speed does not depend on which label is where."""
    # The sizes of the clusters are those of a real tree, because it halves in the same way.
    bounds = np.array([0, n_labels])
    while len(bounds) - 1 < levels[-1]:
        bounds = stages.tree.halve(bounds)
    order = np.random.default_rng(seed).permutation(n_labels)
    slot_to_label = stages.tree.lay_out(order, bounds)
    return stages.tree.Tree(slot_to_label, levels)


def random_documents(
    n: int, n_labels: int, vocab: int, median: int, seed: int = 0, labels_each: int = 5
):
    """A split of n documents with random tokens and labels.

    Lengths are log-normal about their median, as the lengths of product texts are. Labels follow
    Zipf's law: the label of rank r is drawn with a probability of about 1 / r.
    """
    rng = np.random.default_rng(seed)
    # 1. Tokens. A log-normal number is e to the power of a normal one. The smallest ids are left
    #    out: in a real vocabulary they are special tokens, such as [CLS].
    log_length_N = rng.normal(np.log(median), 0.7, n)
    length_N = np.clip(np.exp(log_length_N), 4, 2000).astype(np.int64)
    ids = rng.integers(10, vocab, length_N.sum()).astype(np.uint16)
    # 2. Ranks, by inversion of the distribution. Under Zipf's law the probability of a rank up to r
    #    is about ln r / ln L. Set this to u, drawn from 0 to 1, and solve it: r = e^(u ln L).
    u_P = rng.random(n * labels_each)
    rank_P = np.exp(u_P * np.log(n_labels)).astype(np.int64)
    place_P = np.minimum(rank_P, n_labels) - 1  # counted from 0
    # 3. Which label has which rank is random.
    label_P = rng.permutation(n_labels)[place_P]
    doc_P = np.repeat(np.arange(n), labels_each)
    labels, label_offsets = distinct_labels(doc_P, label_P, n, n_labels)
    return stages.data.Split(ids, offsets_of(length_N), labels, label_offsets)


def distinct_labels(
    doc_P: np.ndarray, label_P: np.ndarray, n: int, n_labels: int
) -> tuple[np.ndarray, np.ndarray]:
    """(labels, their offsets (N + 1,)) of n documents, as a split holds them.

    A label that was drawn twice for a document counts once.
    """
    # As one number each, pairs of document and label are sorted, and made unique, in one call.
    pair_P = np.unique(doc_P * n_labels + label_P)
    count_N = np.bincount(pair_P // n_labels, minlength=n)
    labels = (pair_P % n_labels).astype(np.int32)
    return labels, offsets_of(count_N)


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """(N + 1,) where the part of each document begins and ends."""
    return np.append(0, np.cumsum(counts)).astype(np.int64)


def random_data(
    n: int, n_labels: int, vocab: int = 30000, median: int = 60, seed: int = 0, n_test: int = 1000
):
    """Data with such documents for training and testing."""
    # Every text begins with the special token 2 and ends with 3, as the encoder 'tiny' has it.
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
    # 1. The encoder. The proportions are BERT's: 64 features to a head of attention, and a
    #    feed-forward layer of four times the width.
    shape = transformers.BertConfig(
        vocab_size=30000,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
    )
    encoder = stages.model.Encoder(transformers.BertModel(shape), "first", max_len)
    # 2. The cascade: the cluster levels and, as one more, the level of the labels.
    layers = stages.model.choose_layers(depth, len(levels) + 1)
    tree = random_tree(n_labels, levels)
    model = stages.model.Cascade(encoder, tree, topk, layers)
    model = model.to(device).train()
    # 3. Weights that are not all alike, so that scores differ and a shortlist has a choice.
    for head in model.heads:
        torch.nn.init.normal_(head.weight, std=0.02)
    return model


def spread_shortlists(spread: bool = True) -> None:
    """Draw shortlists at random, so that a batch touches as many clusters as it can.

    A shortlist is the clusters of a level that a document keeps: only their children are scored.
    This is the most expensive case. Without it (spread=False), an untrained model keeps about the
    same clusters for all documents, which is the cheapest. A trained model lies in between.
    """

    def drawn(logits_BKF, targets_BKF, k: int):
        # The targets stay, so in training the clusters with a correct label still go first.
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
    # Linux keeps the peak of a process: VmHWM, the "high water mark" of its memory.
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            kilobytes = int(line.split()[1])
            return 1024 * kilobytes
    raise RuntimeError("no VmHWM in /proc/self/status")


# 3. Texts with topics: a clustering has something to find in them.


def topic_tokens(
    path: np.ndarray, n_labels: int, vocab: int, n_tokens: int, rng: np.random.Generator
) -> np.ndarray:
    """(len(path), n_tokens) token ids of texts about the labels `path`.

    Labels form groups: eight neighbours, sixteen, and so on up to all of them, 17 groups around
    every label. Each group has forty words of its own, the first of them the most frequent. A token
    is a word of one of its label's groups. So there is a hierarchy that a clustering can find, and
    words are shared across it, as they are in real texts.
    """
    # 1. Which group of its label a token is from. The group of level 4, for example, has 2^4 = 16
    #    labels, and dividing a label by 16 gives the number of its group. No group has fewer than
    #    eight: one level there stands for all levels up to 3.
    level = rng.integers(0, 18, (len(path), n_tokens))
    group = path[:, None] >> np.maximum(level, 3)
    # 2. Which of its forty words, by Zipf's law as in random_documents.
    u = rng.random((len(path), n_tokens))
    word = np.exp(u * np.log(40)).astype(np.int64)
    # 3. Which token this word is: a hash of the three numbers. So two words may be one token, and
    #    no table of all words is needed. The constants are those of usual hash functions.
    mixed = (group * 0x9E3779B1 + level * 0x85EBCA6B + word * 0xC2B2AE35).astype(np.uint64)
    mixed ^= mixed >> np.uint64(15)
    hashed = (mixed * np.uint64(0x2C1B3C6D)) >> np.uint64(7)
    return hashed.astype(np.int64) % vocab


def topic_split(n: int, n_labels: int, vocab: int, n_tokens: int, labels_each: int, seed: int = 0):
    """Documents with texts of topic_tokens, labelled with neighbours. Every label has a document,
    if there are as many documents as labels.
    """
    rng = np.random.default_rng(seed)
    # 1. The label that each text is about. All labels come once before any comes again.
    once = rng.permutation(n_labels)[: min(n, n_labels)]
    again = rng.integers(0, n_labels, max(0, n - n_labels))
    main_N = np.append(once, again)
    # 2. Its labels: that one, and others near it, which share its larger groups of words.
    distance = rng.integers(-8, 9, (n, labels_each))
    near = np.clip(main_N[:, None] + distance, 0, n_labels - 1)
    near[:, 0] = main_N
    doc_P = np.repeat(np.arange(n), labels_each)
    labels, label_offsets = distinct_labels(doc_P, near.ravel(), n, n_labels)
    # 3. The texts, some at a time: the arrays on the way take many times the memory of the ids.
    parts = []
    for part in np.array_split(main_N, max(1, n // 10000)):
        tokens = topic_tokens(part, n_labels, vocab, n_tokens, rng)
        parts.append(tokens.astype(np.uint16).ravel())
    ids = np.concatenate(parts)
    offsets = np.arange(n + 1, dtype=np.int64) * n_tokens
    return stages.data.Split(ids, offsets, labels, label_offsets)
