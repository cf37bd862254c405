"""The worked numbers of the lecture.

    python -m course.worked_numbers            all of them
    python -m course.worked_numbers metrics    one part; the others are corpus, size, tree,
                                               cascade, trace and loss

Everything is computed by the functions that the stages use. The lecture shows what this prints.
"""

import gzip
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix

from course import toy
from course.steps_cascade import nodes_scored
from course.steps_tree import leaves
from plumbing.stages import load_stages
from plumbing.streams import tolerant_streams
from tools.report import frequency_class

stages = load_stages()
CORPUS = Path(__file__).resolve().parent.parent / "data" / "debian"
GIB = 2**30


def lines_of(name: str) -> list[dict]:
    """A file of the demo's corpus."""
    with gzip.open(CORPUS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def corpus() -> None:
    """The demo's long tail."""
    names = [label["name"] for label in lines_of("labels")]
    documents = lines_of("train")
    count = Counter(name for document in documents for name in document["labels"])
    count_L = np.array([count[name] for name in names])
    class_L = frequency_class(count_L)
    print(f"{len(documents):,} training documents, {count_L.sum():,} pairs, {len(names):,} labels")
    limits = ("head, 50 or more", "torso, 5 to 49", "tail, 1 to 4", "unseen, 0")
    for number, name in enumerate(limits):
        is_here_L = class_L == number
        labels = 100 * is_here_L.mean()
        pairs = 100 * count_L[is_here_L].sum() / count_L.sum()
        print(f"{name:17} {is_here_L.sum():6,} labels {labels:5.1f}%   {pairs:5.1f}% of the pairs")


def size() -> None:
    """Memory and arithmetic of a million labels."""
    n_labels = 1_000_000
    width = 768
    n_documents = 64
    numbers = n_labels * width
    # Numbers of 4 bytes. AdamW holds four of them for a weight: itself, its gradient, two moments.
    print(f"weights           {numbers / 1e6:7,.0f} million numbers, {4 * numbers / GIB:5.1f} GiB")
    print(f"gradient, AdamW's two moments, weights    {16 * numbers / GIB:5.1f} GiB")
    # RowAdam remembers two numbers for each row of weights, and one for each feature.
    rows = 2 * n_labels + width
    print(f"weights, RowAdam's state                  {4 * (numbers + rows) / GIB:5.1f} GiB")
    logits = 4 * n_documents * n_labels
    print(f"logits of a batch of {n_documents} documents          {logits / GIB:5.2f} GiB")
    # A weight means a multiplication and an addition. BERT-base has 85 million weights beside its
    # word embeddings, and each of 128 tokens meets all of them.
    scores = 2 * numbers
    encoder = 2 * 85_000_000 * 128
    print(f"operations for a document: all labels {scores / 1e9:.1f} billion, ", end="")
    print(f"BERT-base on 128 tokens {encoder / 1e9:.1f} billion")
    scored = 4096
    print(f"                           {scored:,} labels {2 * scored * width / 1e6:.1f} million")


def metrics() -> None:
    """Four labels, one document with two of them, two rankings."""
    names = "abcd"
    count_L = np.array([400, 40, 4, 1])
    weight_L = stages.eval.inverse_propensity(count_L, 1000)
    print("label               " + "".join(f"{name:>7}" for name in names))
    print("training documents  " + "".join(f"{count:7}" for count in count_L))
    print("weight              " + "".join(f"{weight:7.2f}" for weight in weight_L))
    labels = np.array([0, 2], np.int32)  # the document has a and c
    split = stages.data.Split(np.zeros(1, np.uint16), np.array([0, 1]), labels, np.array([0, 2]))
    n_N = np.array([2])
    # The weights of the document's own labels, largest first: what PSP divides by.
    best_Nk = stages.eval.best_weights(split, weight_L, 4)
    for ranking in ("a b c d", "c b a d"):
        labels_Nk = np.array([[names.index(name) for name in ranking.split()]])
        hit_Nk = stages.train.hits(labels_Nk, split)
        psp_k = stages.eval.propensity_scored_precision(hit_Nk, labels_Nk, best_Nk, weight_L)
        print(f"ranking {ranking}      @1     @2     @3     @4")
        for name, values in (
            ("P", stages.eval.precision(hit_Nk)),
            ("nDCG", stages.eval.ndcg(hit_Nk, n_N)),
            ("PSP", psp_k),
        ):
            print(f"    {name:12}" + "".join(f"{value:7.3f}" for value in values))


def tree() -> None:
    """Eight labels, each with one document of two words, split twice."""
    words = ["ab", "ab", "bc", "cd", "de", "de", "ef", "fa"]
    X_NV = np.zeros((8, 6))
    for document, letters in enumerate(words):
        for letter in letters:
            X_NV[document, "abcdef".index(letter)] = 1
    X_NV = stages.tree.normalize(csr_matrix(X_NV))
    Y_NL = csr_matrix(np.eye(8))
    Z_LV = stages.tree.label_features(X_NV, Y_NL, keep=0)
    found = leaves(Z_LV.toarray(), 2, 20, 0)
    for number, leaf in enumerate(found):
        shown = "  ".join(f"{label}:{words[label]}" for label in leaf)
        print(f"leaf {number}   {shown}")
    order = np.concatenate(found)
    bounds = np.array([0, 2, 4, 6, 8])
    ours = stages.tree.cosine_to_centroid(Z_LV, order, bounds)
    # For comparison: the labels dealt out to the leaves like cards.
    dealt_out = np.array([0, 4, 1, 5, 2, 6, 3, 7])
    theirs = stages.tree.cosine_to_centroid(Z_LV, dealt_out, bounds)
    print(f"mean cosine to the centroid {ours:.3f}; with the leaves 04 15 26 37 {theirs:.3f}")


def cascade() -> None:
    """What the published tree for half a million labels scores."""
    counts = [1, 1024, 8192, 65536, 65536 * 8]
    scored = nodes_scored(counts, [128, 256, 512])
    for level, (n_scored, n_nodes) in enumerate(zip(scored, counts[1:], strict=True), 1):
        print(f"level {level}   {n_scored:6,} of {n_nodes:8,} nodes")
    share = 100 * sum(scored) / counts[-1]
    print(f"in all    {sum(scored):6,}, {share:.1f}% of the slots")


# The tree of the docstring of 03_model.py, with logits.
LOGITS = [[0.4, -0.4], [0.9, -0.5, 0.3, -1.1], [0.2, -0.9, -0.3, 0.1, 0.6, 1.5, -1.0, -0.2]]


def example() -> torch.nn.Module:
    return toy.cascade(list(range(8)), LOGITS, [1, 2], [2, 4])


def trace() -> None:
    """Both descents through the tree of the docstring of 03_model.py; label 5 is correct."""
    for name, teacher in (("training", True), ("prediction", False)):
        print(name)
        for what, nodes in toy.trace(example(), [5], teacher).items():
            print(f"    {what:18} {' '.join(map(str, nodes))}")


def loss() -> None:
    """The loss of the label level in the training step of `trace`."""
    model = example()
    batch = toy.one_document([5])
    # The last level of the descent is that of the labels.
    *_, level = model.descend(model.features(batch), batch, teacher=True)
    slots = stages.tree.expand(level.parents_BK, 2)[0].tolist()
    logits = level.logits_BKF.flatten().tolist()
    targets = level.targets_BKF.flatten().tolist()
    print("label   logit   target   p(label)   loss")
    for label, logit, target in sorted(zip(slots, logits, targets, strict=True)):
        # The loss of a level with this candidate alone.
        one = torch.tensor([[[logit]]])
        part = model.level_loss(one, torch.tensor([[[target]]])).item()
        p = 1 / (1 + math.exp(-logit))
        print(f"{label:5} {logit:7.1f} {target:8.0f} {p:10.3f} {part:6.3f}")
    total = model.level_loss(level.logits_BKF, level.targets_BKF).item()
    print(f"the level {total:29.3f}")


PARTS = {
    "corpus": corpus,
    "size": size,
    "metrics": metrics,
    "tree": tree,
    "cascade": cascade,
    "trace": trace,
    "loss": loss,
}


def main(words: list[str]) -> int:
    unknown = [word for word in words if word not in PARTS]
    if unknown:
        print(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
        return 2
    for name in words or PARTS:
        PARTS[name]()
    return 0


if __name__ == "__main__":
    with tolerant_streams():  # whoever reads the output may have enough, as `head` has
        sys.exit(main(sys.argv[1:]))
