"""Predictions for a whole split, without the labels that are known of a document beforehand."""

from collections.abc import Callable
from typing import Any

import numpy as np


def over_split(model: Any, data: Any, name: str, max_len: int, batch_size: int,
               predict: Callable[[Any, int], dict[str, np.ndarray]], k: int) -> dict[str, np.ndarray]:
    """Apply predict(batch, k), which gives arrays with a row per document, to a whole split; rows in the corpus' order.
    Of every pair "labels ...", "scores ..." what is known beforehand is no prediction: the next ones move up."""
    model.eval()
    order = np.argsort(np.diff(data.splits[name].offsets), kind="stable")
    device, known = model.slot_to_label.device, data.known.get(name)
    more = most_known(known)
    parts = [predict(data.batch(name, order[i : i + batch_size], max_len).to(device), k + more)
             for i in range(0, len(order), batch_size)]
    back = np.argsort(order)
    found = {key: np.concatenate([part[key] for part in parts])[back] for key in parts[0]}
    for key in [key for key in found if more and key.startswith("labels")]:
        scores = key.replace("labels", "scores")
        found[key], found[scores] = without_known(found[key], found[scores], known, k)
    return found


def most_known(known: Any) -> int:
    """How many labels are known of one document, at most: so many more than k have to be found for k to be left."""
    return 0 if known is None else int(np.diff(known.indptr).max(initial=0))


def labels_without_known(labels_NK: np.ndarray, known: Any, k: int) -> np.ndarray:
    """The first k labels of each ranking that are not in known (N, L), or simply the first k where that is None."""
    if known is None:
        return labels_NK[:, :k]
    labels_Nk, _ = without_known(labels_NK, np.zeros(labels_NK.shape), known, k)
    return labels_Nk


def without_known(labels_NK: np.ndarray, scores_NK: np.ndarray, known: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k labels and scores of each ranking that are not in known (N, L), a CSR matrix."""
    stride = known.shape[1] + 1  # one key per (document, label), ascending
    known_P = np.repeat(np.arange(known.shape[0]), np.diff(known.indptr)) * stride + known.indices + 1
    out_NK = np.isin(np.arange(len(labels_NK))[:, None] * stride + labels_NK + 1, known_P) & (labels_NK >= 0)
    place_Nk = np.argsort(out_NK, axis=1, kind="stable")[:, :k]
    gone_Nk = np.take_along_axis(out_NK, place_Nk, axis=1)  # more known than there is room for
    labels_Nk, scores_Nk = (np.take_along_axis(array, place_Nk, axis=1) for array in (labels_NK, scores_NK))
    return np.where(gone_Nk, -1, labels_Nk), np.where(gone_Nk, -np.inf, scores_Nk)
