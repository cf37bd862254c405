"""What it takes to train one resolution at a time: passes for each, candidates fixed beforehand, warm starts.

Used by variants/xr_transformer.py. The candidates of a training document are the children of its true parents (teacher
forcing) and of those that the stage above finds for it (matcher-aware negatives). As a warm start XR-Transformer's
authors fit a linear SVM per node, on frozen features and the new candidates; here it is ridge regression, which has a
closed form, on all documents: that hard negatives weigh more is left to training.

Shapes   N documents, B batch, K parents, P positive pairs, M nodes of the new level, C of the level above, D width
"""

from collections import namedtuple
from collections.abc import Iterator

import numpy as np
import torch
from scipy.sparse import csr_matrix

from plumbing.errors import UserError
from variants.common import stages

WARM_STARTS = ("linear", "inherit", "none")


def shares(epochs: int, n_stages: int) -> list[int]:
    """Passes of each stage, about 3 : 4 : 6, as the authors' 600, 800 and 1,200 steps for EURLex-4K."""
    weights = np.array([3, 4, 6, 8, 10, 12][:n_stages])
    passes = np.diff(np.round(epochs * weights.cumsum() / weights.sum()), prepend=0).astype(int).tolist()
    if min(passes) < 1:
        raise UserError(f"{epochs} epochs give {passes} to {n_stages} stages; train the cascade with more --epochs")
    return passes


class Batch(namedtuple("Batch", (*stages.data.Batch._fields, "parents_BK"))):
    """A stages.data.Batch with the parents whose children are candidates, -1 where a document has fewer."""

    def to(self, device: torch.device) -> "Batch":
        return stages.data.move(self, device)


class Batches(stages.train.Batches):
    """Batches of one stage. parents_Nb: what the stage above found; parent_L: the parent of each label."""

    def __init__(self, data: stages.data.Data, config: stages.train.Config, parents_Nb: np.ndarray,
                 parent_L: np.ndarray) -> None:
        super().__init__(data, config.batch_size, config.max_len, config.seed)
        self.parents_Nb, self.parent_L = parents_Nb, parent_L

    def __call__(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        for rows in self.rows(epoch)[first:]:
            batch = self.data.batch("train", rows, self.max_len)
            true_P = self.parent_L[batch.label_P.numpy()]
            yield Batch(*batch, torch.from_numpy(union(self.parents_Nb[rows], batch.doc_P.numpy(), true_P)))


def union(parents_Bb: np.ndarray, doc_P: np.ndarray, parent_P: np.ndarray) -> np.ndarray:
    """(B, K): for each document the distinct ones of its row and of its (document, parent) pairs, padded with -1."""
    stride = max(parents_Bb.max(initial=0), parent_P.max(initial=0)) + 1
    own = np.arange(len(parents_Bb))[:, None] * stride + parents_Bb
    doc, parent = np.divmod(np.unique(np.append(own, doc_P * stride + parent_P)), stride)
    size_B = np.bincount(doc, minlength=len(parents_Bb))
    parents_BK = np.full((len(parents_Bb), size_B.max()), -1, np.int64)
    parents_BK[doc, np.arange(len(doc)) - (np.cumsum(size_B) - size_B)[doc]] = parent
    return parents_BK


def ridge(x_ND: np.ndarray, Y_NM: csr_matrix, shrink: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """(weights (M, D), biases (M,)) of the least squares fit of +1 for a node's documents and -1 for all others, with a
    penalty of `shrink` times the features' mean variance: one system of equations for all nodes. A node without
    documents: weights 0, bias -1."""
    x_ND, Y_NM = x_ND.astype(np.float64), (Y_NM > 0).astype(np.float64)
    mean_D, share_M = x_ND.mean(axis=0), np.asarray(Y_NM.mean(axis=0)).ravel()
    covariance_DD = np.cov(x_ND.T, bias=True)
    covariance_DD += shrink * np.trace(covariance_DD) / len(mean_D) * np.eye(len(mean_D))
    with_node_MD = 2 * (Y_NM.T @ x_ND / len(x_ND) - share_M[:, None] * mean_D)
    w_MD = np.linalg.solve(covariance_DD, with_node_MD.T).T
    return w_MD.astype(np.float32), (2 * share_M - 1 - w_MD @ mean_D).astype(np.float32)


@torch.no_grad()
def warm_start(way: str, above: torch.nn.Module | None, head: torch.nn.Module, x_ND: np.ndarray, Y_NM: csr_matrix
               ) -> None:
    """Set a Head of M nodes before it is trained, by one of WARM_STARTS: from features x_ND of the documents and their
    nodes Y_NM; from the head of the level above, each child as its parent, if there is one; or leave it as it is."""
    mine = head.weight, head.bias
    if way == "linear":
        values = [torch.from_numpy(array) for array in ridge(x_ND, Y_NM)]
    elif way == "inherit" and above is not None:
        its = above.weight, above.bias
        values = [array.flatten(0, 1)[:, None].expand_as(own) for array, own in zip(its, mine, strict=True)]
    else:
        return
    for own, new in zip(mine, values, strict=True):
        own.copy_(new.reshape(own.shape))
