"""How a new resolution of a staged model starts: from a linear classifier, from its parents, or from nothing.

Used by variants/xr_transformer.py, whose --warm chooses. XR-Transformer's authors fit a linear SVM per node on frozen
features ("bootstrapping"); Fisher's discriminant does the same job in closed form. Its covariance is that of all
documents, so the hard negatives of a node weigh no more than the others: what training is for.

Shapes   N documents, M nodes of the new level, C nodes of the level above, D width
"""

import numpy as np
import torch
from scipy.sparse import csr_matrix

WAYS = ("linear", "inherit", "none")


def fisher(x_ND: np.ndarray, Y_NM: csr_matrix, shrink: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """(weights (M, D), biases (M,)) of Fisher's discriminant of each node's documents against all, with one covariance
    for all nodes: on average its own get +1, all get -1. A node without documents: weights 0, bias -1."""
    x_ND, Y_NM = x_ND.astype(np.float64), (Y_NM > 0).astype(np.float64)
    mean_D, n_M = x_ND.mean(axis=0), np.asarray(Y_NM.sum(axis=0)).ravel()
    apart_MD = (Y_NM.T @ x_ND - n_M[:, None] * mean_D) / np.maximum(n_M, 1)[:, None]
    covariance = np.cov(x_ND.T, bias=True)
    covariance += shrink * np.trace(covariance) / len(mean_D) * np.eye(len(mean_D))  # a node may have one document
    w_MD = np.linalg.solve(covariance, apart_MD.T).T
    w_MD *= 2 / np.maximum((w_MD * apart_MD).sum(axis=1), 1e-12)[:, None]
    return w_MD.astype(np.float32), (-1 - w_MD @ mean_D).astype(np.float32)


@torch.no_grad()
def start(way: str, above: torch.nn.Module, head: torch.nn.Module, x_ND: np.ndarray, Y_NM: csr_matrix) -> None:
    """Set a Head (C, F, D) of M = C * F nodes, before it has been trained, by one of WAYS: from features x_ND of the
    documents and their nodes Y_NM; from the head of the level above, each child as its parent; or leave it as it is."""
    mine, its = (head.weight, head.bias), (above.weight, above.bias)
    if way == "linear":
        values = [torch.from_numpy(array) for array in fisher(x_ND, Y_NM)]
    elif way == "inherit":
        values = [array.flatten(0, 1)[:, None].expand_as(own) for array, own in zip(its, mine, strict=True)]
    else:
        return
    for own, new in zip(mine, values, strict=True):
        own.copy_(new.reshape(own.shape))
