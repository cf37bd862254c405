"""Labels that are known of a document beforehand, and so are no predictions.

A corpus may come with filter files: pairs of a document and a label that nobody needs to predict.
In the demo's corpus, a package never depends on itself, but its text begins with its own name. Such
a label is taken out of every ranking, and the labels behind it move up:

    predicted 7 3 9 4, known 3, wanted 3    ->    7 9 4

To have k labels left, more than k have to be predicted: k plus the most that is known of one
document.

Shapes   N documents, L labels, k labels wanted, M labels predicted, P known pairs
"""

import numpy as np
from scipy.sparse import csr_matrix


def most_known(known: csr_matrix | None) -> int:
    """How many labels are known of one document, at most."""
    if known is None:
        return 0
    known_per_document_N = np.diff(known.indptr)
    return int(known_per_document_N.max(initial=0))


def labels_without_known(labels_NM: np.ndarray, known: csr_matrix | None, k: int) -> np.ndarray:
    """The first k labels of each ranking that are not in known (N, L)."""
    if known is None:
        return labels_NM[:, :k]
    no_scores_NM = np.zeros(labels_NM.shape)
    labels_Nk, _ = without_known(labels_NM, no_scores_NM, known, k)
    return labels_Nk


def without_known(
    labels_NM: np.ndarray, scores_NM: np.ndarray, known: csr_matrix, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first k labels and scores of each ranking that are not in known (N, L).

    Where fewer than k are left, the rest is label -1 with score -inf.
    """
    # 1. Every pair (document, label) becomes one number, so that pairs can be looked up. Labels
    # count
    #    from -1, which stands for no label.
    stride = known.shape[1] + 1
    known_documents_P = np.repeat(np.arange(known.shape[0]), np.diff(known.indptr))
    known_P = known_documents_P * stride + known.indices + 1
    predicted_NM = np.arange(len(labels_NM))[:, None] * stride + labels_NM + 1
    is_known_NM = np.isin(predicted_NM, known_P) & (labels_NM >= 0)
    # 2. A stable sort puts what is known last and leaves the order of the others as it is.
    place_Nk = np.argsort(is_known_NM, axis=1, kind="stable")[:, :k]
    labels_Nk = np.take_along_axis(labels_NM, place_Nk, axis=1)
    scores_Nk = np.take_along_axis(scores_NM, place_Nk, axis=1)
    # 3. Known labels that are still among the first k, because there are too few others.
    gone_Nk = np.take_along_axis(is_known_NM, place_Nk, axis=1)
    return np.where(gone_Nk, -1, labels_Nk), np.where(gone_Nk, -np.inf, scores_Nk)
