"""What it takes to train one level at a time: passes, candidates fixed beforehand, warm starts.

variants/xr_transformer.py uses it. The candidates of a training document are the children of its
true parents (teacher forcing) and of the parents that the stage above finds for it (matcher-aware
negatives). A stage is the training of one level.

As a warm start, XR-Transformer's authors fit a linear SVM per node, on frozen features and the new
candidates. Here it is ridge regression, which has a closed form, on all documents: that hard
negatives weigh more is left to training.

Shapes   N documents, B documents of a batch, K parents of a document, F children of each (fan),
         P (document, label) pairs, M nodes of the new level, D width of a feature,
         b parents that the stage above found for a document, L labels
"""

from collections import namedtuple
from collections.abc import Iterator

import numpy as np
import torch
from scipy.sparse import csr_matrix

from plumbing.errors import UserError
from variants.common import stages

WARM_STARTS = ("linear", "inherit", "none")


# 1. How many passes each stage gets.


def shares(epochs: int, n_stages: int) -> list[int]:
    """Passes of each stage, about 3 : 4 : 6. (The authors: 600, 800, 1,200 steps for EURLex-4K.)"""
    weights = np.array([3, 4, 6, 8, 10, 12][:n_stages])
    # Round where a stage ends, not how long it is: so the passes add up to `epochs`.
    ends = np.round(epochs * weights.cumsum() / weights.sum())
    passes = np.diff(ends, prepend=0).astype(int).tolist()
    if min(passes) < 1:
        raise UserError(
            f"{epochs} epochs give {passes} to {n_stages} stages; "
            "train the cascade with more --epochs"
        )
    return passes


# 2. Batches that bring their candidates along.


class Batch(namedtuple("Batch", (*stages.data.Batch._fields, "parents_BK"))):
    """A batch with the parents whose children are candidates, -1 where a document has fewer."""

    def to(self, device: torch.device) -> "Batch":
        return stages.data.move(self, device)


class Batches(stages.train.Batches):
    """Batches of one stage. parents_Nb: what the stage above found; parent_L: of each label."""

    def __init__(
        self,
        data: stages.data.Data,
        config: stages.train.Config,
        parents_Nb: np.ndarray,
        parent_L: np.ndarray,
    ) -> None:
        super().__init__(data, config.batch_size, config.max_len, config.seed)
        self.parents_Nb = parents_Nb
        self.parent_L = parent_L

    def __call__(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        for rows in self.rows(epoch)[first:]:
            batch = self.data.batch("train", rows, self.max_len)
            # What is above the correct labels, and what looked right to the stage above.
            true_parent_P = self.parent_L[batch.label_P.numpy()]
            found_Bb = self.parents_Nb[rows]
            parents_BK = union(found_Bb, batch.doc_P.numpy(), true_parent_P)
            yield Batch(*batch, torch.from_numpy(parents_BK))


def union(parents_Bb: np.ndarray, doc_P: np.ndarray, parent_P: np.ndarray) -> np.ndarray:
    """(B, K): a document's row of parents and those of its pairs, each once; -1 behind.

    In plain form, for each document:

        set(its row of parents_Bb) | {parent for each of its pairs}
    """
    n_documents = len(parents_Bb)
    # 1. Every (document, parent) becomes one number. Sorted, and each once, these numbers are the
    #    sets of all documents in a row.
    stride = max(parents_Bb.max(initial=0), parent_P.max(initial=0)) + 1
    found = np.arange(n_documents)[:, None] * stride + parents_Bb
    true = doc_P * stride + parent_P
    both = np.unique(np.append(found, true))
    doc, parent = np.divmod(both, stride)
    # 2. Back into rows, as long as the longest set. The place of a parent in its row: its place
    #    among all, minus where the set of its document starts.
    size_B = np.bincount(doc, minlength=n_documents)
    start_B = np.cumsum(size_B) - size_B
    place = np.arange(len(doc)) - start_B[doc]
    parents_BK = np.full((n_documents, size_B.max()), -1, np.int64)
    parents_BK[doc, place] = parent
    return parents_BK


# 3. Warm starts: a new level need not begin with weights that know nothing.


def ridge(x_ND: np.ndarray, Y_NM: csr_matrix, shrink: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """(weights (M, D), biases (M,)): the least squares fit of +1 for a node's documents, -1 for
    others.

    Ridge regression is least squares with a penalty on large weights. The penalty is `shrink` times
    the features' mean variance. One system of equations serves all nodes:

        (covariance of the features + penalty) w = covariance of the features with the target

    A node without documents gets weights 0 and bias -1.
    """
    # Sums over many documents need the digits of float64. A document may have several labels below
    # a node: that is a 1, too.
    x_ND = x_ND.astype(np.float64)
    Y_NM = (Y_NM > 0).astype(np.float64)
    n, width = x_ND.shape
    mean_D = x_ND.mean(axis=0)
    share_M = np.asarray(Y_NM.mean(axis=0)).ravel()
    # 1. The left side of the equations. The trace is the sum of the features' variances.
    covariance_DD = np.cov(x_ND.T, bias=True)
    penalty = shrink * np.trace(covariance_DD) / width
    covariance_DD += penalty * np.eye(width)
    # 2. The right side. The target is 2 Y - 1, so its covariance with x is twice Y's.
    with_target_MD = 2 * (Y_NM.T @ x_ND / n - share_M[:, None] * mean_D)
    w_MD = np.linalg.solve(covariance_DD, with_target_MD.T).T
    # 3. The fit goes through the means: of the features, and of the target, 2 share - 1.
    b_M = 2 * share_M - 1 - w_MD @ mean_D
    return w_MD.astype(np.float32), b_M.astype(np.float32)


@torch.no_grad()
def warm_start(
    way: str,
    above: torch.nn.Module | None,
    head: torch.nn.Module,
    x_ND: np.ndarray,
    Y_NM: csr_matrix,
) -> None:
    """Set a Head of M nodes before it is trained, by one of WARM_STARTS.

    linear: ridge regression from features x_ND of the documents to their nodes Y_NM. inherit: from
    the head of the level above, each child as its parent, if there is one. none: leave it as it is.
    """
    if way == "linear":
        w_MD, b_M = ridge(x_ND, Y_NM)
        weight = torch.from_numpy(w_MD)
        bias = torch.from_numpy(b_M)
    elif way == "inherit" and above is not None:
        # The nodes of the level above are the clusters of this one: from (parents, children) to one
        # axis. Then every node's row, once for each of its children.
        weight = above.weight.flatten(0, 1)[:, None].expand_as(head.weight)
        bias = above.bias.flatten(0, 1)[:, None].expand_as(head.bias)
    else:
        return
    # A head keeps the children of a cluster side by side.
    head.weight.copy_(weight.reshape(head.weight.shape))
    head.bias.copy_(bias.reshape(head.bias.shape))
