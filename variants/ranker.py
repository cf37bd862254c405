"""A linear ranker on [TF-IDF ; dense feature] reorders the labels that a trained model finds.

    python -m variants.ranker --run runs/demo                       on the cascade
    python -m variants.ranker --run runs/demo/xr_transformer        on XR-Transformer: its published form, made small
    python -m variants.ranker --run runs/demo --features sparse     one of the two parts alone
    python -m variants.ranker --run runs/demo --power 0             the SVM alone, on the model's shortlist

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt
Writes   RUN/ranker/    ranker.npz, predictions.npz; with --features, RUN/ranker-sparse or RUN/ranker-dense; with
         --power 0, RUN/ranker-power-0

The last step of XR-Transformer, and the "+ sparse ranker" of both papers: words that the encoder never saw, since it
reads the first --max-len tokens, and rare ones that it could not learn, still count. For each label a linear SVM with
squared hinge tells its own documents from those whose shortlist it is on, the negatives that matter:

    min_w  |w|^2 / 2 + C sum_i max(0, 1 - y_i w.x_i)^2,        x = [TF-IDF, all tokens ; last layer's feature ; 1]

each part at length 1. Weights below 1e-3 are dropped. A label's score is p^a exp(-max(0, 1 - w.x)^3), where p is the
model's; a is 1 in the papers and chosen on validation here, from POWERS: an encoder far from its end should have less
of a say. The shortlists of training documents come from the model that was trained on them, as in the authors' code.
Labels of a leaf cluster are on nearly the same shortlists: one problem with several right-hand sides, variants/svm.py.
Left out: the authors train a whole chain of rankers, on a new tree. To predict, all labels are scored for a chunk of
documents at once, which is quick for tens of thousands of labels.

Shapes   N documents, n those of one cluster, F its labels, V vocabulary, D width (+ 1), k labels of a shortlist
"""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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
    k: int = flag(100, "labels of a document's shortlist, in training and in prediction", positive)
    power: float = flag(None, "say of the model's score, a; 0: the SVM alone [chosen on validation]", share)
    c: float = flag(1.0, "weight of the loss against |w|^2 / 2", rate)


def load_model(folder: str | Path, build: Callable | None = None) -> tuple:
    """(model, its settings, its ranking), of stage 4 or of XR-Transformer, ready to predict."""
    data, made_by = stages.data.load(folder), load_pt(Path(folder) / "model.pt")[1]["stage"]
    build = build or (xr_transformer.build if xr_transformer.NAME in made_by else stages.model.build)
    model, *rest = stages.train.load(folder, data, build)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), *rest


def look(model, data: stages.data.Data, split: str, settings: stages.train.Config, ranking: str, config: Config,
         idf_V: np.ndarray | None = None) -> tuple:
    """(TF-IDF (N, V), features and a 1 (N, D), labels (N, k), their log scores (N, k), idf (V,)) of a split, in one
    pass of the model; what --features leaves out has no entries."""
    features, seen = model.features, {}

    def remember(*batch_and_encoder) -> list[torch.Tensor]:
        seen["x"] = features(*batch_and_encoder)
        return seen["x"]

    @torch.no_grad()
    def predict(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        labels, scores = model.predict(batch, k, ranking)
        found = {"labels": labels, "scores": scores, "x": seen["x"][-1]}
        return {key: tensor.cpu().numpy() for key, tensor in found.items()}

    model.features = remember  # what predict reads: the encoder need not be run once more
    found = stages.train.predict_split(model, data, split, settings.max_len, 2 * settings.batch_size, predict, config.k)
    model.features = features
    X_NV, idf_V = stages.tree.tfidf(data.splits[split], idf_V, data.meta["vocab_size"])
    x_ND = found["x"] / np.linalg.norm(found["x"], axis=1, keepdims=True).clip(1e-12)
    X_NV = csr_matrix(X_NV.shape, dtype=X_NV.dtype) if config.features == "dense" else X_NV
    E_ND = np.pad(x_ND[:, : 0 if config.features == "sparse" else None], ((0, 0), (0, 1)), constant_values=1)
    return X_NV, E_ND, found["labels"], found["scores"], idf_V


def train(X_NV: csr_matrix, E_ND: np.ndarray, split: stages.data.Split, labels_Nk: np.ndarray, tree: stages.tree.Tree,
          c: float) -> tuple[csr_matrix, np.ndarray]:
    """(weights (V, L) of the words, (D, L) of the dense features): leaf cluster by leaf cluster, each label on the
    documents that have it or have it on their shortlist."""
    n_leaves = [1, *tree.levels][-1]
    slots_CF = tree.slot_to_label.reshape(n_leaves, -1)
    slot_L = np.argsort(tree.slot_to_label)[(tree.slot_to_label < 0).sum() :]  # empty ones sort first
    doc_P = np.append(np.nonzero(labels_Nk >= 0)[0], np.repeat(np.arange(len(split)), np.diff(split.label_offsets)))
    slot_P = slot_L[np.append(labels_Nk[labels_Nk >= 0], split.labels)]
    order = np.argsort(slot_P // slots_CF.shape[1], kind="stable")
    ends = np.searchsorted(slot_P[order] // slots_CF.shape[1], np.arange(n_leaves + 1))
    n_shortlisted = len(doc_P) - len(split.labels)

    def one(leaf: int) -> tuple[np.ndarray, ...]:
        """(words (Z,), labels (Z,), weights (Z,)) and the weights (D, F) of the dense features."""
        pairs = order[ends[leaf] : ends[leaf + 1]]
        docs, row = np.unique(doc_P[pairs], return_inverse=True)
        mask_nF = np.zeros((len(docs), slots_CF.shape[1]), bool)
        positive_nF = mask_nF.copy()
        for table_nF, some in ((mask_nF, slice(None)), (positive_nF, pairs >= n_shortlisted)):
            table_nF[row[some], slot_P[pairs[some]] % slots_CF.shape[1]] = True
        X_nV = X_NV[docs]
        words = np.unique(X_nV.indices)  # of thousands: the problem is as large as they are many
        X_nV = csr_matrix((X_nV.data, np.searchsorted(words, X_nV.indices), X_nV.indptr), (len(docs), len(words)))
        W = fit(X_nV, E_ND[docs], positive_nF, mask_nF, c)
        word, f = np.nonzero(np.abs(W[: len(words)]) >= DROP)
        return words[word], slots_CF[leaf, f], W[word, f], W[len(words) :]

    dense_DL = np.zeros((E_ND.shape[1], len(slot_L)), np.float32)
    parts: list[list[np.ndarray]] = [[], [], []]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # scipy's and numpy's products leave Python's lock to the others
        for leaf, (*found, dense) in enumerate(tqdm(pool.map(one, range(n_leaves)), "ranker", n_leaves, disable=None)):
            here = slots_CF[leaf] >= 0
            dense_DL[:, slots_CF[leaf, here]] = dense[:, here]
            for part, array in zip(parts, found, strict=True):
                part.append(array)
    words, labels, weights = (np.concatenate(part) for part in parts)
    return csr_matrix((weights, (words, labels)), shape=(X_NV.shape[1], len(slot_L))), dense_DL


def slacks(X_NV: csr_matrix, E_ND: np.ndarray, labels_Nk: np.ndarray, W_VL: csr_matrix, W_DL: np.ndarray,
           chunk: int = 256) -> np.ndarray:
    """(N, k): max(0, 1 - w.x)^3 of each document's labels."""
    parts = [slice(start, start + chunk) for start in range(0, len(labels_Nk), chunk)]
    margins = [np.take_along_axis((X_NV[part] @ W_VL).toarray() + E_ND[part] @ W_DL, labels_Nk[part].clip(0), axis=1)
               for part in parts]
    return np.maximum(0, 1 - np.concatenate(margins)) ** 3


def reorder(labels_Nk: np.ndarray, scores_Nk: np.ndarray, slack_Nk: np.ndarray, power: float) -> tuple:
    """(labels, log scores) in the order of power * (the model's log score) - slack; -1 and -inf stay last."""
    new_Nk = np.where(labels_Nk >= 0, power * np.where(labels_Nk >= 0, scores_Nk, 0) - slack_Nk, -np.inf)
    order = np.argsort(-new_Nk, axis=1, kind="stable")
    return np.take_along_axis(labels_Nk, order, axis=1), np.take_along_axis(new_Nk, order, axis=1)


def load(folder: Path) -> tuple[Callable, int]:
    """(a function that predicts and reorders the test split of a model, the number of weights) from RUN/ranker."""
    arrays, meta = load_npz(folder / "ranker.npz")
    shape = len(arrays["idf"]), arrays["dense"].shape[1]
    W_VL = csr_matrix((arrays["weights"], arrays["indices"], arrays["indptr"]), shape)

    def predict(model, data: stages.data.Data, settings: stages.train.Config, ranking: str) -> tuple:
        found = look(model, data, "test", settings, ranking, Config(**meta["config"]), arrays["idf"])
        X_NV, E_ND, labels, scores, _ = found
        return reorder(labels, scores, slacks(X_NV, E_ND, labels, W_VL, arrays["dense"]), meta["power"])

    return predict, W_VL.nnz + arrays["dense"].size


def run(config: Config) -> None:
    if config.features not in ("both", "sparse", "dense"):
        raise UserError(f"--features {config.features}: expected both, sparse or dense")
    name = "ranker" if config.features == "both" else f"ranker-{config.features}"
    if config.power is not None:
        name += f"-power-{config.power:g}"
    out = common.folder(config.run, name, "data.npz", "tree.npz", "model.pt")
    data, tree, (model, settings, ranking) = stages.data.load(out), stages.tree.load(out), load_model(out)
    if not tree.levels:
        raise UserError(f"{config.run} has a tree without clusters; the ranker needs some, to go through their labels")
    start = time.perf_counter()
    X_NV, E_ND, labels, _, idf_V = look(model, data, "train", settings, ranking, config)
    looked = time.perf_counter()
    weights = train(X_NV, E_ND, data.splits["train"], labels, tree, config.c)
    done = time.perf_counter()
    X_NV, E_ND, labels, scores, _ = look(model, data, "val", settings, ranking, config, idf_V)
    slack = slacks(X_NV, E_ND, labels, *weights)
    right = {power: sum(stages.train.hits(reorder(labels, scores, slack, power)[0][:, :j], data.splits["val"]).mean()
                        for j in (1, 3, 5)) for power in POWERS}
    power = max(right, key=right.get) if config.power is None else config.power
    seconds = time.perf_counter() - start
    print(f"shortlists of training documents: {looked - start:.0f} s; {len(data.names):,} rankers: {done - looked:.0f} "
          f"s; {weights[0].nnz:,} weights of words; on validation, sum of P@1, P@3 and P@5 for p^a: "
          + ", ".join(f"a = {a}: {100 * value:.1f}" for a, value in right.items()) + f"; taken: {power:g}", flush=True)
    arrays = {"weights": weights[0].data, "indices": weights[0].indices, "indptr": weights[0].indptr}
    made_from = ("data.npz", "tree.npz", "model.pt")
    save_npz(out / "ranker.npz", config, arrays | {"dense": weights[1], "idf": idf_V}, made_from,
                       stage="variants/ranker.py", power=power)
    common.save_predictions(out, data, *load(out)[0](model, data, settings, ranking), "ranker", seconds, made_from)


if __name__ == "__main__":
    main(run, Config, __doc__)
