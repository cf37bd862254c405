"""Batches with a label pool: the labels that all documents of a batch are compared with.

variants/unidec.py and variants/alc.py train on them. To compare 128 documents with every label
would be slow, and the text of every label would have to be encoded at every step. So a batch picks
some labels, its pool, to a fixed size:

1. Three of each document's positives, the labels that are right for it, drawn at random.
2. Hard negatives, once there are any: wrong labels that the model itself finds near to a document.
   Six of each document's list of them. To make these lists is called mining.
3. Where room is left, the other positives of the batch.

Where there is not room for all, the labels that most documents have brought come first. A pool is
shared. So a label that one document has brought is a negative for the others, unless it is right
for them, too: then it counts as their positive, whoever brought it.

Three documents, a pool of 5 places, one positive drawn for each instead of three:

    document 0   positives 3, 7     drawn 3
    document 1   positives 3        drawn 3                 the pool    3  8 | 5 | 7
    document 2   positives 8        drawn 8                 document 0  +  - | - | +
    mined: one each, 5, 5, 5                                document 2  -  + | - | -

Every --refresh passes the model is asked anew what it finds near to what. Its documents are then
clustered as well, and a batch is a cluster: documents about the same things, whose labels are hard
negatives for each other. Before that, batches are the cascade's, of documents of about one length.

A label that is known of a document beforehand (plumbing/known_labels.py) is neither a positive nor
a negative of it: in the demo, a package is always near to its own name.

Shapes   N documents, B documents of a batch, A labels of the pool, L labels, E width of embeddings,
         P (document, label) pairs, M labels mined for a document
"""

import math
from collections import namedtuple
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from variants.common import stages

DRAWN = 3  # positives of a document, drawn with replacement
HARD = 6  # mined labels of a document, drawn from its list
GAP = 10  # with fewer places left, nothing is mined
CHUNK = 1024  # documents compared with all labels at a time


# 1. A batch that brings its pool along.


class Batch(
    namedtuple("Batch", (*stages.data.Batch._fields, "pool_A", "is_positive_BA", "is_known_BA"))
):
    """A batch with its pool, label ids, and what each label of the pool is to each document."""

    def to(self, device: torch.device) -> "Batch":
        return stages.data.move(self, device)


def make_pool(
    doc_P: np.ndarray,
    label_P: np.ndarray,
    mined_BM: np.ndarray | None,
    size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """(A,): at most `size` different labels, in the order in which they were taken.

    doc_P, label_P: the positives of the batch, document after document. mined_BM: hard negatives of
    each document, -1 where its list is shorter; None before the first mining.
    """
    # 1. Three positives of each document. One with a single label brings it three times.
    n_labels_B = np.bincount(doc_P)
    first_B = np.cumsum(n_labels_B) - n_labels_B  # where each document's labels begin
    has_labels = n_labels_B > 0
    n_labels = n_labels_B[has_labels][:, None]
    draw = rng.integers(0, n_labels, (len(n_labels), DRAWN))
    drawn = label_P[first_B[has_labels][:, None] + draw]
    nothing = np.zeros(0, np.int64)
    pool = with_most_frequent(nothing, drawn, size)
    # 2. Six hard negatives of each document, if they are worth the trouble.
    if mined_BM is not None and size - len(pool) > GAP:
        shuffled_BM = rng.permuted(mined_BM, axis=1)
        hard = shuffled_BM[:, :HARD]
        pool = with_most_frequent(pool, hard[hard >= 0], size)
    # 3. The rest of the positives.
    return with_most_frequent(pool, label_P, size)


def with_most_frequent(pool: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """The pool, and behind it labels that it does not have, the most frequent first."""
    different, count = np.unique(labels, return_counts=True)
    is_new = ~np.isin(different, pool)
    by_count = np.argsort(-count[is_new], kind="stable")
    added = different[is_new][by_count]
    room = size - len(pool)
    return np.concatenate([pool, added[:room]])


def mark(doc_P: np.ndarray, label_P: np.ndarray, pool_A: np.ndarray, n: int) -> np.ndarray:
    """(B, A) bool for B = n documents: which pairs (document, label of the pool) are given.

    In plain form: mark[i, j] = (i, pool_A[j]) is among the pairs.
    """
    marked_BA = np.zeros((n, len(pool_A)), bool)
    if not len(pool_A):
        return marked_BA  # no document of the batch has a label
    # Look every pair's label up in the pool.
    sorted_A = np.argsort(pool_A)
    place_P = np.searchsorted(pool_A, label_P, sorter=sorted_A)
    place_P = sorted_A[np.minimum(place_P, len(pool_A) - 1)]
    is_there = pool_A[place_P] == label_P
    marked_BA[doc_P[is_there], place_P[is_there]] = True
    return marked_BA


# 2. Mining: which wrong labels does the model find near to a document?


def mine(x_NE: Tensor, label_LE: Tensor, never_NL: csr_matrix, n: int) -> np.ndarray:
    """(N, M): the n labels nearest to each document that are not in never_NL; -1 behind the last.

    An exact search: every document is compared with every label.
    """
    n = min(n, len(label_LE))
    mined = []
    for start in range(0, len(x_NE), CHUNK):
        score_BL = x_NE[start : start + CHUNK] @ label_LE.T
        # Cross out what must not be mined.
        row_P, label_P = never_NL[start : start + CHUNK].nonzero()
        score_BL[torch.from_numpy(row_P).long(), torch.from_numpy(label_P).long()] = -torch.inf
        best = score_BL.topk(n, dim=1)
        is_crossed_out = best.values == -torch.inf
        mined.append(best.indices.masked_fill(is_crossed_out, -1).cpu().numpy())
    return np.concatenate(mined)


def never_mined(data: stages.data.Data) -> csr_matrix:
    """(N, L): what is no hard negative of a training document.

    These are its positives and what is known of it beforehand. A label without any training
    document is nobody's: it could only ever be a negative, and would be driven away from all
    documents, also from those that it belongs to.
    """
    train = data.splits["train"]
    ones = np.ones(len(train.labels), np.int8)
    shape = (len(train), len(data.names))
    never_NL = csr_matrix((ones, train.labels, train.label_offsets), shape)
    if "train" in data.known:
        never_NL = never_NL + data.known["train"].astype(np.int8)
    return csr_matrix(never_NL)


def in_clusters(x_NE: np.ndarray, batch_size: int, seed: int) -> np.ndarray:
    """(N,): the documents in the order of a balanced clustering; neighbours are similar."""
    n_batches = len(x_NE) / batch_size
    depth = max(0, int(math.log2(n_batches)))
    order_N, _ = stages.tree.balanced_kmeans(csr_matrix(x_NE), depth, seed=seed)
    return order_N


# 3. The batches of a training.


class Batches(stages.train.Batches):
    """Batches with pools of at most `size` labels, and mining every `refresh` passes (0: never).

    find() is asked for embeddings of all training documents (N, E) and all labels (L, E).
    """

    def __init__(
        self,
        data: stages.data.Data,
        config: stages.train.Config,
        size: int,
        refresh: int,
        find: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(data, config.batch_size, config.max_len, config.seed)
        self.size = size
        self.refresh = refresh
        self.find = find
        self.never_NL = never_mined(data)
        train_labels = data.splits["train"].labels
        self.is_trained_L = np.bincount(train_labels, minlength=len(data.names)) > 0
        # From the first mining on: hard negatives of each document, and the order of documents.
        self.mined_NM = None
        self.order_N = None

    def rows(self, epoch: int) -> list[np.ndarray]:
        """Row numbers of each batch: the cascade's batches at first, clusters after mining."""
        if self.order_N is None:
            return super().rows(epoch)
        cuts = range(self.batch_size, len(self.order_N), self.batch_size)
        batches = np.split(self.order_N, cuts)
        rng = np.random.default_rng((self.seed, epoch))
        return [batches[i] for i in rng.permutation(len(batches))]

    def look_again(self, epoch: int) -> None:
        """Mine, and cluster the documents, with the model as it is now."""
        x_NE, label_LE = self.find()
        # Labels without training documents are not looked for.
        trained = np.flatnonzero(self.is_trained_L)
        among_trained = mine(
            x_NE,
            label_LE[torch.from_numpy(trained)],
            self.never_NL[:, trained],
            HARD * self.refresh,
        )
        # From numbers among these labels to label ids.
        self.mined_NM = np.where(among_trained < 0, -1, trained[among_trained])
        self.order_N = in_clusters(x_NE.cpu().numpy(), self.batch_size, self.seed + epoch)

    def __call__(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        if self.refresh and epoch and epoch % self.refresh == 0:
            self.look_again(epoch)
        for number, rows in enumerate(self.rows(epoch)[first:], start=first):
            rng = np.random.default_rng((self.seed, epoch, number))
            yield self.with_pool(rows, rng)

    def with_pool(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        """The documents `rows` of the training split and their pool."""
        batch = self.data.batch("train", rows, self.max_len)
        doc_P = batch.doc_P.numpy()
        label_P = batch.label_P.numpy()
        mined_BM = None if self.mined_NM is None else self.mined_NM[rows]
        pool_A = make_pool(doc_P, label_P, mined_BM, self.size, rng)
        # What each label of the pool is to each document.
        is_positive_BA = mark(doc_P, label_P, pool_A, len(rows))
        is_known_BA = np.zeros_like(is_positive_BA)
        if "train" in self.data.known:
            known_P, known_label_P = self.data.known["train"][rows].nonzero()
            is_known_BA = mark(known_P, known_label_P, pool_A, len(rows))
            is_positive_BA &= ~is_known_BA
        return Batch(
            *batch,
            torch.from_numpy(pool_A),
            torch.from_numpy(is_positive_BA),
            torch.from_numpy(is_known_BA),
        )
