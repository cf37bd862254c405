"""What ELIAS needs before each of its stages: the edges, and classifiers that know frequencies.

variants/elias.py uses it. The edges of a cluster are found by counting, without a gradient: in the
beam of a training document are b clusters, each with a score s, and the document has some labels.
How much does a cluster go together with a label? The sum of s over the label's documents:

    together = Y^T S       Y (N, L): which labels a document has,  S (N, C): its beam, 0 elsewhere

Shapes   N documents, P (document, label) pairs, C clusters, F labels of a cluster in the tree,
         E edges of a cluster, X edges of all clusters, L labels, b clusters in a beam
"""

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix
from torch import Tensor

from variants.common import stages

# 1. The edges.


@torch.no_grad()
def find_edges(model: torch.nn.Module, data: stages.data.Data, config: stages.train.Config) -> int:
    """New edges, from what the beams find for the training documents. Strengths start alike.

    Gives how many labels with training documents have no place in any cluster by their counts:
    they hang by the tree's edge alone.
    """
    train = data.splits["train"]
    n = len(train)
    n_clusters = model.counts[1]
    b = model.topk[0]

    # 1. The clusters in the beam of each training document, and how well they fit.
    def predict(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        log_s_BC = model.log_s(model.features(batch)[1])
        beam_Bb = model.beam_of(log_s_BC, None)
        s_Bb = log_s_BC.gather(1, beam_Bb).exp()
        return {"clusters": beam_Bb.cpu().numpy(), "s": s_Bb.cpu().numpy()}

    size = 2 * config.batch_size
    found = stages.train.predict_split(model, data, "train", config.max_len, size, predict, b)
    # 2. Y^T S. Every row of S has b entries.
    ones_P = np.ones(len(train.labels))
    Y_NL = csr_matrix((ones_P, train.labels, train.label_offsets), (n, model.n_labels))
    in_beam = (found["s"].ravel(), found["clusters"].ravel(), b * np.arange(n + 1))
    S_NC = csr_matrix(in_beam, (n, n_clusters))
    together_LC = csc_matrix(Y_NL.T @ S_NC)
    # 3. The strongest labels of each cluster.
    tree_CF = model.slot_to_label.view(n_clusters, -1).cpu().numpy()
    edge_CE, is_kept_L = strongest_edges(together_LC, tree_CF, model.edge_CE.shape[1])
    model.edge_CE.copy_(torch.from_numpy(edge_CE))
    model.theta_CE.zero_()
    has_documents_L = np.bincount(train.labels, minlength=model.n_labels) > 0
    return int((has_documents_L & ~is_kept_L).sum())


def strongest_edges(
    together_LC: csc_matrix, tree_CF: np.ndarray, n_edges: int
) -> tuple[np.ndarray, np.ndarray]:
    """(edges (C, E), -1 behind; which labels would have a place without the tree (L,) bool).

    A cluster keeps the labels of the tree; the other places go to its largest entries.
    """
    n_labels, n_clusters = together_LC.shape
    edge_CE = np.full((n_clusters, n_edges), -1, np.int64)
    is_kept_L = np.zeros(n_labels, bool)
    for c in range(n_clusters):
        # 1. The labels of the column, the strongest first.
        column = slice(together_LC.indptr[c], together_LC.indptr[c + 1])
        by_strength = np.argsort(-together_LC.data[column], kind="stable")
        labels = together_LC.indices[column][by_strength]
        is_kept_L[labels[:n_edges]] = True
        # 2. Those of the tree, and then the others.
        own = tree_CF[c][tree_CF[c] >= 0]
        others = labels[~np.isin(labels, own)]
        row = np.append(own, others)[:n_edges]
        edge_CE[c, : len(row)] = row
    return edge_CE, is_kept_L


def strongest_holder(edge_CE: Tensor, log_a_CE: Tensor, n_labels: int) -> Tensor:
    """(L,): the cluster that holds each label most strongly; of equal ones the first."""
    # 1. The edges of all clusters in a row.
    is_edge_CE = edge_CE >= 0
    label_X = edge_CE[is_edge_CE]
    log_a_X = log_a_CE[is_edge_CE]
    cluster_X = is_edge_CE.nonzero()[:, 0]
    # 2. The largest strength of each label.
    nothing_L = log_a_X.new_full((n_labels,), -torch.inf)
    best_L = nothing_L.scatter_reduce(0, label_X, log_a_X, "amax")
    # 3. The first cluster whose edge has it.
    is_best_X = log_a_X == best_L[label_X]
    last_L = torch.full((n_labels,), len(edge_CE), device=edge_CE.device)
    return last_L.scatter_reduce(0, label_X[is_best_X], cluster_X[is_best_X], "amin")


# 2. Classifiers that know how frequent something is, and no more.


@torch.no_grad()
def start_labels(model: torch.nn.Module, train: stages.data.Split) -> None:
    """Weights 0, and as bias the log odds of a label among the documents of its cluster."""
    count_L, count_C = frequencies(model, train)
    within_L = count_C[model.parent_L]
    # Half a document more on both sides: no logarithm of 0.
    odds_L = (count_L + 0.5) / (within_L - count_L + 0.5)
    model.heads[1].weight.zero_()
    model.heads[1].bias.copy_(odds_L.log()[:, None])


@torch.no_grad()
def start_clusters(model: torch.nn.Module, train: stages.data.Split) -> None:
    """As bias of a cluster its log share, which is what a softmax makes a share of."""
    _, count_C = frequencies(model, train)
    model.heads[0].bias.copy_((count_C + 0.5).log()[None])


def frequencies(model: torch.nn.Module, train: stages.data.Split) -> tuple[Tensor, Tensor]:
    """Training documents with each label (L,), and with a label below each cluster (C,)."""
    device = model.parent_L.device
    n_clusters = model.counts[1]
    label_P = torch.from_numpy(train.labels).long().to(device)
    doc_P = np.repeat(np.arange(len(train)), np.diff(train.label_offsets))
    # A document with several labels below a cluster counts once.
    pair_P = torch.from_numpy(doc_P).to(device) * n_clusters + model.parent_L[label_P]
    count_C = (pair_P.unique() % n_clusters).bincount(minlength=n_clusters)
    return label_P.bincount(minlength=model.n_labels), count_C
