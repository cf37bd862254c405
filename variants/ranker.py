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
count. TF-IDF says how often a word occurs in the document, and weighs rare words more
(02_label_tree.py). A document's shortlist, here, is the --k labels that the model ranks first. For
each label a linear SVM with squared hinge tells its own documents from those whose shortlist it is
on, the negatives that matter:

    min_w  |w|^2 / 2 + C sum_i max(0, 1 - y_i w.x_i)^2
    x = [TF-IDF of all tokens ; feature of the last layer ; 1]

each part at length 1. Weights below 1e-3 are dropped. A label's score is p^a exp(-max(0, 1 -
w.x)^3), where p is the model's; a is 1 in the papers and chosen on validation here, from POWERS: an
encoder far from its end should have less of a say. The shortlists of training documents come from
the model that was trained on them, as in the authors' code. Labels of a leaf cluster are on nearly
the same shortlists: one problem with several right-hand sides, variants/svm.py. Left out: the
authors train a whole chain of rankers, on a new tree. To predict, all labels are scored for a chunk
of documents at once, which is quick for tens of thousands of labels.

Shapes   N documents, n documents of one cluster, C leaf clusters, F labels of a cluster,
         L labels, V vocabulary, D width (+ 1), k labels of a shortlist, P (document, label) pairs
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
    # Unless the caller knows better, the file says who made it.
    if build is None:
        is_xr_transformer = xr_transformer.NAME in made_by
        build = xr_transformer.build if is_xr_transformer else stages.model.build
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
    # 1. Shortlists and features. Prediction computes the features anyway. So for this pass, a
    #    function in place of model.features keeps them, and the encoder need not run once more.
    features = model.features
    seen = {}

    def remember(*batch_and_encoder) -> list[torch.Tensor]:
        seen["x"] = features(*batch_and_encoder)
        return seen["x"]

    @torch.no_grad()
    def predict(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        labels, scores = model.predict(batch, k, ranking)
        last_feature = seen["x"][-1]  # what the label level reads
        found = {"labels": labels, "scores": scores, "x": last_feature}
        return {key: tensor.cpu().numpy() for key, tensor in found.items()}

    model.features = remember
    size = 2 * settings.batch_size
    try:
        found = stages.train.predict_split(
            model, data, split, settings.max_len, size, predict, config.k
        )
    finally:
        model.features = features

    # 2. The words: all that stage 1 kept, also those that the model does not read.
    X_NV, idf_V = stages.tree.tfidf(data.splits[split], idf_V, data.meta["vocab_size"])
    if config.features == "dense":
        X_NV = csr_matrix(X_NV.shape, dtype=X_NV.dtype)  # no entries
    # 3. The dense feature at length 1, so that both parts weigh the same, and a 1 for the bias.
    length_N1 = np.linalg.norm(found["x"], axis=1, keepdims=True).clip(1e-12)
    x_ND = found["x"] / length_N1
    if config.features == "sparse":
        x_ND = x_ND[:, :0]  # no columns
    E_ND = np.pad(x_ND, ((0, 0), (0, 1)), constant_values=1)
    return Seen(X_NV, E_ND, found["labels"], found["scores"], idf_V)


# 2. Training: an SVM for each label, leaf cluster by leaf cluster.


class Pairs(NamedTuple):
    """The pairs (document, label) that the SVMs are trained on, sorted by leaf cluster.

    Those of cluster c are ends[c] to ends[c + 1] - 1. A correct label that is also on the shortlist
    comes twice.
    """

    doc_P: np.ndarray
    slot_P: np.ndarray  # where the label stands in the tree
    is_true_P: np.ndarray  # bool
    ends: np.ndarray  # (C + 1,)


def pairs_by_leaf(
    labels_Nk: np.ndarray, split: stages.data.Split, tree: stages.tree.Tree, slots_CF: np.ndarray
) -> Pairs:
    """All pairs: those of the shortlists, and the correct ones."""
    n_leaves, fan = slots_CF.shape
    # Where each label stands. Empty slots, -1, are sorted first.
    n_empty = int((tree.slot_to_label < 0).sum())
    slot_L = np.argsort(tree.slot_to_label)[n_empty:]
    # 1. The pairs of the shortlists. A shortlist may have fewer than k labels.
    on_list = labels_Nk >= 0
    listed_doc = np.nonzero(on_list)[0]
    # 2. Behind them the correct ones.
    true_doc = np.repeat(np.arange(len(split)), np.diff(split.label_offsets))
    doc_P = np.append(listed_doc, true_doc)
    slot_P = slot_L[np.append(labels_Nk[on_list], split.labels)]
    # 3. Sort them by leaf cluster: a division of the slot.
    leaf_P = slot_P // fan
    order_P = np.argsort(leaf_P, kind="stable")
    ends = np.searchsorted(leaf_P[order_P], np.arange(n_leaves + 1))
    is_true_P = order_P >= len(listed_doc)
    return Pairs(doc_P[order_P], slot_P[order_P], is_true_P, ends)


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
    pairs = pairs_by_leaf(labels_Nk, split, tree, slots_CF)

    def one(leaf: int) -> tuple[np.ndarray, ...]:
        """(words, labels, weights) of a leaf's words, flat arrays, and dense weights (D, F)."""
        # 1. Which documents see this leaf, which of its labels, and which labels are correct?
        part = slice(pairs.ends[leaf], pairs.ends[leaf + 1])
        docs, row = np.unique(pairs.doc_P[part], return_inverse=True)
        fan = slots_CF.shape[1]
        place = pairs.slot_P[part] % fan
        is_true = pairs.is_true_P[part]
        mask_nF = np.zeros((len(docs), fan), bool)
        mask_nF[row, place] = True
        positive_nF = np.zeros_like(mask_nF)
        positive_nF[row[is_true], place[is_true]] = True
        # 2. Only the words of these documents, numbered anew: the problem has as many rows of
        #    weights as they have words, not as many as the vocabulary.
        X_nV = X_NV[docs]
        words = np.unique(X_nV.indices)
        columns = np.searchsorted(words, X_nV.indices)
        X_nV = csr_matrix((X_nV.data, columns, X_nV.indptr), (len(docs), len(words)))
        # 3. The SVMs.
        W = fit(X_nV, E_ND[docs], positive_nF, mask_nF, c)
        # 4. Small weights of words are left out: they take memory and change little.
        of_words = W[: len(words)]
        dense_DF = W[len(words) :]
        word, f = np.nonzero(np.abs(of_words) >= DROP)
        return words[word], slots_CF[leaf, f], of_words[word, f], dense_DF

    # All leaves, several at a time. scipy's and numpy's products leave Python's lock to the other
    # threads.
    dense_DL = np.zeros((E_ND.shape[1], n_labels), np.float32)
    all_words = []
    all_labels = []
    all_weights = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        leaves = tqdm(pool.map(one, range(n_leaves)), "ranker", n_leaves, disable=None)
        for leaf, (words, labels, weights, dense_DF) in enumerate(leaves):
            # An empty slot has weights 0, and no label that they could belong to.
            is_label = slots_CF[leaf] >= 0
            dense_DL[:, slots_CF[leaf, is_label]] = dense_DF[:, is_label]
            all_words.append(words)
            all_labels.append(labels)
            all_weights.append(weights)
    # The words' weights as one sparse matrix.
    where = (np.concatenate(all_words), np.concatenate(all_labels))
    shape = (X_NV.shape[1], n_labels)
    W_VL = csr_matrix((np.concatenate(all_weights), where), shape=shape)
    return W_VL, dense_DL


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
        # Score all labels of some documents, and pick those of their shortlists. Most scores are
        # thrown away, but two products of whole matrices are quick.
        part = slice(start, start + chunk)
        all_labels_BL = (X_NV[part] @ W_VL).toarray() + E_ND[part] @ W_DL
        listed_Bk = labels_Nk[part].clip(0)  # -1, no label, gets some score: `reorder` skips it
        margins.append(np.take_along_axis(all_labels_BL, listed_Bk, axis=1))
    slack_Nk = np.maximum(0, 1 - np.concatenate(margins))
    return slack_Nk**3


def reorder(
    labels_Nk: np.ndarray, scores_Nk: np.ndarray, slack_Nk: np.ndarray, power: float
) -> tuple[np.ndarray, np.ndarray]:
    """(labels, log scores), sorted by power * the model's log score - slack. -1, -inf stay last."""
    is_label_Nk = labels_Nk >= 0
    # The logarithm of p^a exp(-slack). 0 times -inf would be nan, so scores of -inf are put aside.
    model_Nk = power * np.where(is_label_Nk, scores_Nk, 0)
    new_Nk = np.where(is_label_Nk, model_Nk - slack_Nk, -np.inf)
    # Labels with equal scores stay in the order of the model.
    order = np.argsort(-new_Nk, axis=1, kind="stable")
    sorted_labels_Nk = np.take_along_axis(labels_Nk, order, axis=1)
    sorted_scores_Nk = np.take_along_axis(new_Nk, order, axis=1)
    return sorted_labels_Nk, sorted_scores_Nk


def choose_power(seen: Seen, slack_Nk: np.ndarray, split: stages.data.Split) -> dict[float, float]:
    """{power: P@1 + P@3 + P@5 on these documents, as a share}."""
    found = {}
    for power in POWERS:
        labels_Nk, _ = reorder(seen.labels_Nk, seen.scores_Nk, slack_Nk, power)
        found[power] = common.precision_sum(labels_Nk, split)
    return found


def load(folder: Path) -> tuple[Callable, int]:
    """(a function that predicts and sorts the test split of a model, the number of weights)."""
    # The sparse weights are stored as the three arrays of a csr_matrix.
    arrays, meta = load_npz(folder / "ranker.npz")
    config = Config(**meta["config"])
    shape = (len(arrays["idf"]), arrays["dense"].shape[1])
    W_VL = csr_matrix((arrays["weights"], arrays["indices"], arrays["indptr"]), shape)

    def predict(
        model, data: stages.data.Data, settings: stages.train.Config, ranking: str
    ) -> tuple[np.ndarray, np.ndarray]:
        # Test documents are weighed by the idf of the training documents, as the SVMs know it.
        seen = look(model, data, "test", settings, ranking, config, arrays["idf"])
        slack_Nk = slacks(seen.X_NV, seen.E_ND, seen.labels_Nk, W_VL, arrays["dense"])
        return reorder(seen.labels_Nk, seen.scores_Nk, slack_Nk, meta["power"])

    return predict, W_VL.nnz + arrays["dense"].size


# 4. From a trained model to a trained ranker.


def folder_name(config: Config) -> str:
    """The folder of a ranker: every choice that is not the usual one has a folder of its own."""
    name = common.name_with("ranker", config, "features")
    if config.power is not None:
        name += f"-power-{config.power:g}"
    return name


@common.owns_its_folder(folder_name)
def run(config: Config) -> None:
    if config.features not in ("both", "sparse", "dense"):
        raise UserError(f"--features {config.features}: expected both, sparse or dense")
    common.tree_with_clusters(config.run)  # the ranker goes through the labels of its clusters
    # 1. The trained model, its data and its tree.
    out = common.folder(config.run, folder_name(config), "data.npz", "tree.npz", "model.pt")
    data = stages.data.load(out)
    tree = stages.tree.load(out)
    model, settings, ranking = load_model(out)
    # 2. The shortlists of training documents, then an SVM for each label.
    start = time.perf_counter()
    seen = look(model, data, "train", settings, ranking, config)
    looked = time.perf_counter()
    W_VL, W_DL = train(seen.X_NV, seen.E_ND, data.splits["train"], seen.labels_Nk, tree, config.c)
    trained = time.perf_counter()
    # 3. How much say has the model's own score? Validation tells, unless --power does.
    seen = look(model, data, "val", settings, ranking, config, seen.idf_V)
    slack_Nk = slacks(seen.X_NV, seen.E_ND, seen.labels_Nk, W_VL, W_DL)
    right = choose_power(seen, slack_Nk, data.splits["val"])
    power = config.power
    if power is None:
        power = max(right, key=right.get)
    seconds = time.perf_counter() - start
    tried = ", ".join(f"a = {a}: {100 * value:.1f}" for a, value in right.items())
    print(
        f"shortlists of training documents: {looked - start:.0f} s; "
        f"{len(data.names):,} rankers: {trained - looked:.0f} s; "
        f"{W_VL.nnz:,} weights of words; on validation, sum of P@1, P@3 and P@5 for p^a: "
        f"{tried}; taken: {power:g}",
        flush=True,
    )

    # 4. Write the ranker.
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
    # 5. Predict the test split with what was written, as variants/compare.py will.
    predict, _ = load(out)
    labels_Nk, scores_Nk = predict(model, data, settings, ranking)
    common.save_predictions(out, data, labels_Nk, scores_Nk, "ranker", seconds, made_from)


if __name__ == "__main__":
    main(run, Config, __doc__)
