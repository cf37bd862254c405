"""A linear ranker on [TF-IDF ; dense feature] reorders the labels that a trained model finds.

    python -m variants.ranker --run runs/demo                       on the cascade
    python -m variants.ranker --run runs/demo/xr_transformer        on XR-Transformer: its published form
    python -m variants.ranker --run runs/demo --features sparse     one of the two parts alone

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt
Writes   RUN/ranker/predictions.npz; with --features, RUN/ranker-sparse or RUN/ranker-dense

The last step of XR-Transformer, and the "+ sparse ranker" of both papers: words that the encoder never saw, since it
reads the first --max-len tokens, and rare ones that it could not learn, still count. For each label a linear SVM with
squared hinge tells its own documents from those whose shortlist it is on, the negatives that matter:

    min_w  |w|^2 / 2 + C sum_i max(0, 1 - y_i w.x_i)^2,        x = [TF-IDF, all tokens ; last layer's feature ; 1]

each part at length 1. Weights below 1e-3 are dropped, and a label's score is the model's times exp(-max(0, 1 - w.x)^3).
The shortlists of training documents come from the model that was trained on them, as in the authors' code. Labels of a
leaf cluster are on nearly the same shortlists, so a cluster is one problem with several right-hand sides: a truncated
Newton method in sparse products, on all cores. Left out: the authors train a whole chain of rankers, on a new tree.

Shapes   N documents, n those of one cluster, F its labels, V vocabulary, D width (+ 1), k labels of a shortlist
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from tqdm import tqdm

import artifacts
from artifacts import UserError, flag, positive, rate
from variants import common, xr_transformer
from variants.common import stages

DROP = 1e-3  # weights below it are left out


@dataclass(frozen=True)
class Config(common.Config):
    features: str = flag("both", "what the ranker reads: both, sparse (TF-IDF) or dense")
    k: int = flag(100, "labels of a document's shortlist, in training and in prediction", positive)
    c: float = flag(1.0, "weight of the loss against |w|^2 / 2", rate)


def load_model(folder: str, data: stages.data.Data):
    """(model, its settings, its ranking), of stage 4 or of a variant."""
    build = xr_transformer.build if Path(folder).name.startswith(xr_transformer.NAME) else stages.model.build
    return stages.train.load(folder, data, build)


def unit(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)


def look(model, data: stages.data.Data, split: str, config, ranking: str, k: int) -> tuple[np.ndarray, ...]:
    """(labels (N, k), log scores (N, k), features (N, D)) of a split by the model: one pass."""

    def predict(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        labels, scores = model.predict(batch, k, ranking)
        found = {"labels": labels, "scores": scores, "x": model.features(batch)[-1]}
        return {key: tensor.detach().cpu().numpy() for key, tensor in found.items()}

    with torch.no_grad():
        found = artifacts.over_split(model, data, split, config.max_len, 2 * config.batch_size, predict, k)
    return found["labels"], found["scores"], unit(found["x"])


def fit(X_nV: csr_matrix, E_nD: np.ndarray, positive_nF: np.ndarray, mask_nF: np.ndarray, c: float,
        rounds: int = 20, inner: int = 10, tolerance: float = 0.05) -> np.ndarray:
    """(V + D, F): a squared-hinge SVM per column on the documents of its mask, by Newton's method with conjugate
    gradients; a column is done when its gradient is `tolerance` times what it was at 0. Float32."""
    V, XT_Vn, ET_Dn = X_nV.shape[1], csr_matrix(X_nV.T), np.ascontiguousarray(E_nD.T)
    y_nF, c_nF = np.where(positive_nF, 1, -1).astype(np.float32), 2 * c * mask_nF.astype(np.float32)

    def margins(W: np.ndarray) -> np.ndarray:
        return X_nV @ W[:V] + E_nD @ W[V:]

    def sums(r_nF: np.ndarray) -> np.ndarray:
        return np.concatenate([XT_Vn @ r_nF, ET_Dn @ r_nF])

    def dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.einsum("xf,xf->f", a, b)

    W = np.zeros((V + E_nD.shape[1], y_nF.shape[1]), np.float32)
    z_nF, start_F = np.zeros_like(y_nF), None
    for _ in range(rounds):
        slack_nF = np.maximum(0, 1 - y_nF * z_nF)
        loss_F = dots(W, W) / 2 + dots(c_nF, slack_nF**2) / 2
        r = sums(c_nF * slack_nF * y_nF) - W  # minus the gradient
        size_F = dots(r, r)
        start_F = size_F if start_F is None else start_F
        todo_F = size_F > tolerance**2 * start_F
        if not todo_F.any():
            break
        # Conjugate gradients for the step: (1 + sum of c x x^T over what has slack) step = r.
        curve_nF, step, p, goal_F = c_nF * (slack_nF > 0), np.zeros_like(W), r.copy(), 0.01 * size_F
        for _ in range(inner):
            Hp = p + sums(curve_nF * margins(p))
            alpha_F = np.where(size_F > goal_F, size_F / np.maximum(dots(p, Hp), 1e-30), 0)
            step += alpha_F * p
            r -= alpha_F * Hp
            before_F, size_F = size_F, dots(r, r)
            if (size_F <= goal_F).all():
                break
            p = r + size_F / np.maximum(before_F, 1e-30) * p
        # The whole step, or half of it, or a quarter, ... until the loss is less.
        dz_nF, t_F = margins(step), todo_F.astype(np.float32)
        for _ in range(10):
            w_F = dots(W, W) / 2 + t_F * dots(W, step) + t_F**2 * dots(step, step) / 2
            new_F = w_F + dots(c_nF, np.maximum(0, 1 - y_nF * (z_nF + t_F * dz_nF)) ** 2) / 2
            if not (worse_F := new_F > loss_F).any():
                break
            t_F = np.where(worse_F, t_F / 2, t_F)
        W += t_F * step
        z_nF += t_F * dz_nF
    return W


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
    with ThreadPoolExecutor() as pool:  # scipy's and numpy's products leave Python's lock to the others
        for leaf, (*found, dense) in enumerate(tqdm(pool.map(one, range(n_leaves)), "ranker", n_leaves, disable=None)):
            here = slots_CF[leaf] >= 0
            dense_DL[:, slots_CF[leaf, here]] = dense[:, here]
            for part, array in zip(parts, found, strict=True):
                part.append(array)
    words, labels, weights = (np.concatenate(part) for part in parts)
    return csr_matrix((weights, (words, labels)), shape=(X_NV.shape[1], len(slot_L))), dense_DL


def rerank(X_NV: csr_matrix, E_ND: np.ndarray, labels_Nk: np.ndarray, scores_Nk: np.ndarray, W_VL: csr_matrix,
           W_DL: np.ndarray, chunk: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """The shortlists in their new order, with their new log scores."""
    scores_Nk = scores_Nk.copy()
    for part in (slice(start, start + chunk) for start in range(0, len(labels_Nk), chunk)):
        z_BL = (X_NV[part] @ W_VL).toarray() + E_ND[part] @ W_DL
        scores_Nk[part] -= np.maximum(0, 1 - np.take_along_axis(z_BL, labels_Nk[part].clip(0), axis=1)) ** 3
    order = np.argsort(-scores_Nk, axis=1, kind="stable")
    return np.take_along_axis(labels_Nk, order, axis=1), np.take_along_axis(scores_Nk, order, axis=1)


def parts(config: Config, X_NV: csr_matrix, x_ND: np.ndarray) -> tuple[csr_matrix, np.ndarray]:
    """(TF-IDF, dense features and a 1), either of them left out by --features."""
    if config.features == "dense":
        X_NV = csr_matrix(X_NV.shape, dtype=X_NV.dtype)
    if config.features == "sparse":
        x_ND = x_ND[:, :0]
    return X_NV, np.append(x_ND, np.ones((len(x_ND), 1)), axis=1).astype(np.float32)


def run(config: Config) -> None:
    if config.features not in ("both", "sparse", "dense"):
        raise UserError(f"--features {config.features}: expected both, sparse or dense")
    out = common.folder(config.run, "ranker" if config.features == "both" else f"ranker-{config.features}",
                        "data.npz", "tree.npz")
    data, tree = stages.data.load(out), stages.tree.load(out)
    model, settings, ranking = load_model(config.run, stages.data.load(config.run))
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    start, split = time.perf_counter(), data.splits["train"]
    X_NV, idf_V = stages.tree.tfidf(split, None, data.meta["vocab_size"])
    labels, _, x_ND = look(model, data, "train", settings, ranking, config.k)
    looked = time.perf_counter()
    weights = train(*parts(config, X_NV, x_ND), split, labels, tree, config.c)
    seconds = time.perf_counter() - start
    print(f"shortlists of {len(split):,} documents: {looked - start:.0f} s; {len(data.names):,} rankers: "
          f"{seconds - looked + start:.0f} s; {weights[0].nnz:,} weights of words", flush=True)
    X_NV, _ = stages.tree.tfidf(data.splits["test"], idf_V, data.meta["vocab_size"])
    labels, scores, x_ND = look(model, data, "test", settings, ranking, config.k)
    common.save_predictions(out, data, *rerank(*parts(config, X_NV, x_ND), labels, scores, *weights), "ranker", seconds)


if __name__ == "__main__":
    artifacts.main(run, Config, __doc__)
