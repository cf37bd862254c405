"""A linear ranker on [TF-IDF ; dense feature] sorts the labels that a trained model finds once
more.

    python -m variants.ranker --run runs/demo                       on the cascade
    python -m variants.ranker --run runs/demo/xr_transformer        on XR-Transformer, as published
    python -m variants.ranker --run runs/demo --features sparse     one of the two parts alone
    python -m variants.ranker --run runs/demo --power 0             the SVM alone

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt
Writes   RUN/ranker/    ranker.npz, predictions.npz
         with --features, RUN/ranker-sparse or RUN/ranker-dense; with --power 0, RUN/ranker-power-0

The last step of XR-Transformer, and the "+ sparse ranker" of both papers: words that the encoder
never saw, since it reads the first --max-len tokens, and rare ones that it could not learn, still
count. For each label a linear SVM with squared hinge tells its own documents from those whose
shortlist it is on, the negatives that matter:

    min_w  |w|^2 / 2 + C sum_i max(0, 1 - y_i w.x_i)^2
    x = [TF-IDF of all tokens ; feature of the last layer ; 1]

each part at length 1. Weights below 1e-3 are dropped. A label's score is p^a exp(-max(0, 1 -
w.x)^3), where p is the model's; a is 1 in the papers and chosen on validation here, from POWERS: an
encoder far from its end should have less of a say. The shortlists of training documents come from
the model that was trained on them, as in the authors' code. Labels of a leaf cluster are on nearly
the same shortlists: one problem with several right-hand sides, variants/svm.py. Left out: the
authors train a whole chain of rankers, on a new tree. To predict, all labels are scored for a chunk
of documents at once, which is quick for tens of thousands of labels.

Shapes   N documents, n documents of one cluster, F its labels, V vocabulary, D width (+ 1),
         k labels of a shortlist
"""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from tqdm import tqdm

from plumbing.cli import flag, main, positive, rate
from plumbing.errors import UserError
from plumbing.store import load_npz, load_pt, save_npz
from variants import common, xr_transformer
from variants.common import stages
from variants.svm import fit

DROP = 1e-3  # weights below it are left out
POWERS = (1.0, 0.5, 0.25, 0.1)  # of the model's score


def share(text: str) -> float:
    """A flag's number of at least 0."""
    if not 0 <= float(text) < np.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of at least 0")
    return float(text)


@dataclass(frozen=True)
class Config(common.Config):
    features: str = flag("both", "what the ranker reads: both, sparse (TF-IDF) or dense")
    power: float = flag(
        None, "say of the model's score, a; 0: the SVM alone [chosen on validation]", share
    )
    k: int = flag(100, "labels of a document's shortlist, in training and in prediction", positive)
    c: float = flag(1.0, "weight of the loss against |w|^2 / 2", rate)


# 1. What the model says of a split.


class Seen(NamedTuple):
    """The documents of a split as the ranker sees them, and the model's shortlists."""

    X_NV: csr_matrix  # TF-IDF
    E_ND: np.ndarray  # the model's last feature, and a 1
    labels_Nk: np.ndarray
    scores_Nk: np.ndarray  # log scores
    idf_V: np.ndarray


def load_model(folder: str | Path, build: Callable | None = None) -> tuple:
    """(model, its settings, its ranking), of stage 4 or of XR-Transformer, ready to predict."""
    data = stages.data.load(folder)
    made_by = load_pt(Path(folder) / "model.pt")[1]["stage"]
    if build is None:
        build = xr_transformer.build if xr_transformer.NAME in made_by else stages.model.build
    model, settings, ranking = stages.train.load(folder, data, build)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), settings, ranking


def look(
    model,
    data: stages.data.Data,
    split: str,
    settings: stages.train.Config,
    ranking: str,
    config: Config,
    idf_V: np.ndarray | None = None,
) -> Seen:
    """The words, features and shortlists of a split, in one pass of the model.

    What --features leaves out has no entries.
    """
    features = model.features
    seen = {}

    def remember(*batch_and_encoder) -> list[torch.Tensor]:
        seen["x"] = features(*batch_and_encoder)
        return seen["x"]

    @torch.no_grad()
    def predict(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        labels, scores = model.predict(batch, k, ranking)
        found = {"labels": labels, "scores": scores, "x": seen["x"][-1]}
        return {key: tensor.cpu().numpy() for key, tensor in found.items()}

    # Prediction computes the features anyway: keep them, and the encoder need not run once more.
    model.features = remember
    size = 2 * settings.batch_size
    found = stages.train.predict_split(
        model, data, split, settings.max_len, size, predict, config.k
    )
    model.features = features

    X_NV, idf_V = stages.tree.tfidf(data.splits[split], idf_V, data.meta["vocab_size"])
    if config.features == "dense":
        X_NV = csr_matrix(X_NV.shape, dtype=X_NV.dtype)
    x_ND = found["x"] / np.linalg.norm(found["x"], axis=1, keepdims=True).clip(1e-12)
    if config.features == "sparse":
        x_ND = x_ND[:, :0]
    E_ND = np.pad(x_ND, ((0, 0), (0, 1)), constant_values=1)
    return Seen(X_NV, E_ND, found["labels"], found["scores"], idf_V)


# 2. Training: an SVM for each label, leaf cluster by leaf cluster.


def train(
    X_NV: csr_matrix,
    E_ND: np.ndarray,
    split: stages.data.Split,
    labels_Nk: np.ndarray,
    tree: stages.tree.Tree,
    c: float,
) -> tuple[csr_matrix, np.ndarray]:
    """(weights (V, L) of the words, (D, L) of the dense features).

    Each label is trained on the documents that have it, or have it on their shortlist.
    """
    n_labels = int((tree.slot_to_label >= 0).sum())
    n_leaves = tree.levels[-1] if tree.levels else 1
    slots_CF = tree.slot_to_label.reshape(n_leaves, -1)
    fan = slots_CF.shape[1]
    slot_L = np.argsort(tree.slot_to_label)[len(tree.slot_to_label) - n_labels :]

    # 1. All pairs (document, slot): those of the shortlists, then the true ones. Sorted by leaf
    # cluster.
    on_list = labels_Nk >= 0
    listed_doc = np.nonzero(on_list)[0]
    true_doc = np.repeat(np.arange(len(split)), np.diff(split.label_offsets))
    doc_P = np.append(listed_doc, true_doc)
    slot_P = slot_L[np.append(labels_Nk[on_list], split.labels)]
    leaf_P = slot_P // fan
    n_listed = len(listed_doc)
    order_P = np.argsort(leaf_P, kind="stable")
    ends = np.searchsorted(leaf_P[order_P], np.arange(n_leaves + 1))

    def one(leaf: int) -> tuple[np.ndarray, ...]:
        """(words (Z,), labels (Z,), weights (Z,)) of a leaf's labels, and dense weights (D, F)."""
        # 2. Which documents see this leaf, which of its labels, and which labels are correct?
        pairs = order_P[ends[leaf] : ends[leaf + 1]]
        docs, row = np.unique(doc_P[pairs], return_inverse=True)
        place = slot_P[pairs] % fan
        is_true = pairs >= n_listed
        mask_nF = np.zeros((len(docs), fan), bool)
        mask_nF[row, place] = True
        positive_nF = np.zeros_like(mask_nF)
        positive_nF[row[is_true], place[is_true]] = True
        # 3. Only the words of these documents: the problem is as large as they are many.
        X_nV = X_NV[docs]
        words = np.unique(X_nV.indices)
        columns = np.searchsorted(words, X_nV.indices)
        X_nV = csr_matrix((X_nV.data, columns, X_nV.indptr), (len(docs), len(words)))
        # 4. The SVMs. Small weights are left out.
        W = fit(X_nV, E_ND[docs], positive_nF, mask_nF, c)
        of_words = W[: len(words)]
        word, f = np.nonzero(np.abs(of_words) >= DROP)
        return words[word], slots_CF[leaf, f], of_words[word, f], W[len(words) :]

    dense_DL = np.zeros((E_ND.shape[1], n_labels), np.float32)
    all_words = []
    all_labels = []
    all_weights = []
    # scipy's and numpy's products leave Python's lock to the other threads.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        leaves = tqdm(pool.map(one, range(n_leaves)), "ranker", n_leaves, disable=None)
        for leaf, (words, labels, weights, dense_DF) in enumerate(leaves):
            is_label = slots_CF[leaf] >= 0
            dense_DL[:, slots_CF[leaf, is_label]] = dense_DF[:, is_label]
            all_words.append(words)
            all_labels.append(labels)
            all_weights.append(weights)
    where = (np.concatenate(all_words), np.concatenate(all_labels))
    shape = (X_NV.shape[1], n_labels)
    return csr_matrix((np.concatenate(all_weights), where), shape=shape), dense_DL


# 3. Prediction: sort a shortlist once more.


def slacks(
    X_NV: csr_matrix,
    E_ND: np.ndarray,
    labels_Nk: np.ndarray,
    W_VL: csr_matrix,
    W_DL: np.ndarray,
    chunk: int = 256,
) -> np.ndarray:
    """(N, k): max(0, 1 - w.x)^3 of each document's labels."""
    margins = []
    for start in range(0, len(labels_Nk), chunk):
        part = slice(start, start + chunk)
        all_labels = (X_NV[part] @ W_VL).toarray() + E_ND[part] @ W_DL
        margins.append(np.take_along_axis(all_labels, labels_Nk[part].clip(0), axis=1))
    return np.maximum(0, 1 - np.concatenate(margins)) ** 3


def reorder(
    labels_Nk: np.ndarray, scores_Nk: np.ndarray, slack_Nk: np.ndarray, power: float
) -> tuple[np.ndarray, np.ndarray]:
    """(labels, log scores), sorted by power * the model's log score - slack. -1, -inf stay last."""
    is_label_Nk = labels_Nk >= 0
    model_Nk = power * np.where(is_label_Nk, scores_Nk, 0)
    new_Nk = np.where(is_label_Nk, model_Nk - slack_Nk, -np.inf)
    order = np.argsort(-new_Nk, axis=1, kind="stable")
    return np.take_along_axis(labels_Nk, order, axis=1), np.take_along_axis(new_Nk, order, axis=1)


def choose_power(seen: Seen, slack_Nk: np.ndarray, split: stages.data.Split) -> dict[float, float]:
    """{power: P@1 + P@3 + P@5 on these documents, as a share}."""
    found = {}
    for power in POWERS:
        labels_Nk, _ = reorder(seen.labels_Nk, seen.scores_Nk, slack_Nk, power)
        found[power] = sum(stages.train.hits(labels_Nk[:, :j], split).mean() for j in (1, 3, 5))
    return found


def load(folder: Path) -> tuple[Callable, int]:
    """(a function that predicts and sorts the test split of a model, the number of weights)."""
    arrays, meta = load_npz(folder / "ranker.npz")
    config = Config(**meta["config"])
    shape = (len(arrays["idf"]), arrays["dense"].shape[1])
    W_VL = csr_matrix((arrays["weights"], arrays["indices"], arrays["indptr"]), shape)

    def predict(
        model, data: stages.data.Data, settings: stages.train.Config, ranking: str
    ) -> tuple[np.ndarray, np.ndarray]:
        seen = look(model, data, "test", settings, ranking, config, arrays["idf"])
        slack_Nk = slacks(seen.X_NV, seen.E_ND, seen.labels_Nk, W_VL, arrays["dense"])
        return reorder(seen.labels_Nk, seen.scores_Nk, slack_Nk, meta["power"])

    return predict, W_VL.nnz + arrays["dense"].size


# 4. From a trained model to a trained ranker.


def run(config: Config) -> None:
    if config.features not in ("both", "sparse", "dense"):
        raise UserError(f"--features {config.features}: expected both, sparse or dense")
    name = "ranker" if config.features == "both" else f"ranker-{config.features}"
    if config.power is not None:
        name += f"-power-{config.power:g}"
    out = common.folder(config.run, name, "data.npz", "tree.npz", "model.pt")
    data = stages.data.load(out)
    tree = stages.tree.load(out)
    model, settings, ranking = load_model(out)
    if not tree.levels:
        raise UserError(
            f"{config.run} has a tree without clusters; the ranker needs some, to go through "
            "their labels"
        )
    # The shortlists of training documents, then an SVM for each label.
    start = time.perf_counter()
    seen = look(model, data, "train", settings, ranking, config)
    looked = time.perf_counter()
    W_VL, W_DL = train(seen.X_NV, seen.E_ND, data.splits["train"], seen.labels_Nk, tree, config.c)
    trained = time.perf_counter()
    # How much say has the model's own score? Validation tells.
    seen = look(model, data, "val", settings, ranking, config, seen.idf_V)
    slack_Nk = slacks(seen.X_NV, seen.E_ND, seen.labels_Nk, W_VL, W_DL)
    right = choose_power(seen, slack_Nk, data.splits["val"])
    power = max(right, key=right.get) if config.power is None else config.power
    seconds = time.perf_counter() - start
    tried = ", ".join(f"a = {a}: {100 * value:.1f}" for a, value in right.items())
    print(
        f"shortlists of training documents: {looked - start:.0f} s; "
        f"{len(data.names):,} rankers: {trained - looked:.0f} s; "
        f"{W_VL.nnz:,} weights of words; on validation, sum of P@1, P@3 and P@5 for p^a: "
        f"{tried}; taken: {power:g}",
        flush=True,
    )

    arrays = {
        "weights": W_VL.data,
        "indices": W_VL.indices,
        "indptr": W_VL.indptr,
        "dense": W_DL,
        "idf": seen.idf_V,
    }
    made_from = ("data.npz", "tree.npz", "model.pt")
    stage = "variants/ranker.py"
    save_npz(out / "ranker.npz", config, arrays, made_from, stage=stage, power=power)
    predict, _ = load(out)
    labels_Nk, scores_Nk = predict(model, data, settings, ranking)
    common.save_predictions(out, data, labels_Nk, scores_Nk, "ranker", seconds, made_from)


if __name__ == "__main__":
    main(run, Config, __doc__)
