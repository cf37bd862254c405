"""The steps of lab 1. Oracles: metrics and neighbours of stage 5, classes of tools/report.py.

Shapes   N documents, L labels, k predictions, V words
"""

import numpy as np
from scipy.sparse import csr_matrix

from course.steps import Case, Mistake, Step
from plumbing.stages import load_stages
from tools.report import frequency_class

stages = load_stages()

# Small random predictions: 30 documents, 40 labels, 5 predictions each.
rng = np.random.default_rng(0)
N_LABELS = 40
LABELS = np.stack([rng.permutation(N_LABELS)[:5] for _ in range(30)])
HIT = rng.random((30, 5)) < 0.4
# A document has at least as many labels as it has hits.
N_OF_DOCUMENT = np.maximum(rng.integers(1, 7, 30), HIT.sum(axis=1))
COUNT = rng.integers(0, 200, N_LABELS)
WEIGHT = stages.eval.inverse_propensity(COUNT, 1000)
# Weights of a document's own labels, at least as large as what it may find.
BEST = -np.sort(-WEIGHT[np.stack([rng.permutation(N_LABELS)[:5] for _ in range(30)])], axis=1)
BEST = np.maximum(BEST, (HIT * WEIGHT[LABELS]).max(axis=1, keepdims=True))
ONE_HIT = np.array([[True, False, True]])

# Step 1


def tail_and_head(count_L: np.ndarray) -> np.ndarray:
    return np.bincount(frequency_class(count_L), minlength=4)


def by_limits(head: int, torso: int, unseen_is_tail: bool = False):
    """Someone who draws the lines elsewhere."""

    def numbers(count_L: np.ndarray) -> np.ndarray:
        is_head = count_L >= head
        is_torso = (count_L >= torso) & ~is_head
        is_unseen = (count_L == 0) & (not unseen_is_tail)
        n_rest = len(count_L) - is_head.sum() - is_torso.sum() - is_unseen.sum()
        return np.array([is_head.sum(), is_torso.sum(), n_rest, is_unseen.sum()])

    return numbers


def documents_by_class(count_L: np.ndarray) -> np.ndarray:
    """Someone who adds up the documents of the labels, instead of counting labels."""
    return np.bincount(frequency_class(count_L), weights=count_L, minlength=4)


TAIL = Step(
    name="tail_and_head",
    oracle=tail_and_head,
    cases=[
        Case("labels with 0 0 1 4 5 49 50 300 documents", (np.array([0, 0, 1, 4, 5, 49, 50, 300]),))
    ],
    mistakes=[
        Mistake(by_limits(51, 6), "50 documents are head and 5 are torso: >=, not >"),
        Mistake(
            by_limits(50, 5, unseen_is_tail=True),
            "a label without any training document is unseen, not tail",
        ),
        Mistake(documents_by_class, "count the labels, not their documents"),
    ],
    hint="four numbers in the order head, torso, tail, unseen; they add up to the number of labels",
)

# Step 2. The first case can be followed by hand; the second one has more than one document.

PRECISION = Step(
    name="precision",
    oracle=stages.eval.precision,
    cases=[
        Case("one document with the hits 1 0 1", (ONE_HIT,)),
        Case("30 documents, 5 predictions each", (HIT,)),
    ],
    mistakes=[
        Mistake(
            lambda hit_Nk: hit_Nk.mean(axis=0),
            "this is the share of hits at rank j alone; P@j counts the first j: a running sum",
        ),
        Mistake(
            lambda hit_Nk: hit_Nk.cumsum(axis=1).mean(axis=0) / hit_Nk.shape[1],
            "P@j is divided by j, not by k",
        ),
        Mistake(
            lambda hit_Nk: (hit_Nk.cumsum(axis=1) / np.arange(1, hit_Nk.shape[1] + 1)).sum(axis=0),
            "this is the sum over the documents; take the mean",
        ),
        Mistake(
            lambda hit_Nk: 100 * stages.eval.precision(hit_Nk),
            "between 0 and 1 here, not in percent",
        ),
    ],
    hint="hit_Nk.cumsum(axis=1) counts the correct ones among the first 1, 2, ..., k",
)

# Step 3. Each function below is nDCG with one fault.


def discounts(k: int, shift: int = 1) -> np.ndarray:
    return 1 / np.log2(np.arange(1, k + 1) + shift)


def undivided_gain(hit_Nk: np.ndarray, n_N: np.ndarray) -> np.ndarray:
    return (hit_Nk * discounts(hit_Nk.shape[1])).cumsum(axis=1).mean(axis=0)


def against_j_labels(hit_Nk: np.ndarray, n_N: np.ndarray) -> np.ndarray:
    return undivided_gain(hit_Nk, n_N) / discounts(hit_Nk.shape[1]).cumsum()


def with_natural_logarithm_above(hit_Nk: np.ndarray, n_N: np.ndarray) -> np.ndarray:
    """1 / ln(r + 1) is larger than 1 / log2(r + 1) by 1 / ln(2), at every rank."""
    return stages.eval.ndcg(hit_Nk, n_N) / np.log(2)


def with_natural_logarithm_below(hit_Nk: np.ndarray, n_N: np.ndarray) -> np.ndarray:
    return stages.eval.ndcg(hit_Nk, n_N) * np.log(2)


BOTH_SUMS = "is one of your logarithms a natural one? both sums need log2"
NDCG = Step(
    name="ndcg",
    oracle=stages.eval.ndcg,
    cases=[
        Case("one document with two labels and the hits 1 0 1", (ONE_HIT, np.array([2]))),
        Case("30 documents, 5 predictions each", (HIT, N_OF_DOCUMENT)),
    ],
    mistakes=[
        Mistake(
            against_j_labels,
            "the best possible ranking has min(j, n) correct labels, not always j: divide by its "
            "sum over min(j, n) ranks, which in an array from 0 stands at place min(j, n) - 1",
        ),
        Mistake(undivided_gain, "this is DCG; divide by the sum of the best possible ranking"),
        Mistake(
            lambda hit_Nk, n_N: stages.eval.r_precision(hit_Nk, n_N),
            "this is RP@j, which counts every rank alike; multiply each hit by 1 / log2(rank + 1)",
        ),
        Mistake(with_natural_logarithm_above, BOTH_SUMS),
        Mistake(with_natural_logarithm_below, BOTH_SUMS),
    ],
    hint="ranks count from 1, so rank 1 is worth 1 / log2(2) = 1, and rank 3 1 / log2(4) = 1/2; "
    "divide document by document, then average",
)

# Step 4. The second case has other constants: whoever writes 0.55 and 1.5 into the formula passes
# the first one alone.


def propensity(count_L: np.ndarray, n: int, a: float = 0.55, b: float = 1.5) -> np.ndarray:
    return 1 / stages.eval.inverse_propensity(count_L, n, a, b)


def without_minus_one(count_L, n, a=0.55, b=1.5):
    return 1 + np.log(n) * (b + 1) ** a * (count_L + b) ** -a


def with_exponent_up(count_L, n, a=0.55, b=1.5):
    return 1 + (np.log(n) - 1) * (b + 1) ** a * (count_L + b) ** a


def with_other_logarithm(base: float):
    def weights(count_L, n, a=0.55, b=1.5):
        return 1 + (np.log(n) / np.log(base) - 1) * (b + 1) ** a * (count_L + b) ** -a

    return weights


LOGARITHM = "the logarithm in c is the natural one: np.log"
PROPENSITY = Step(
    name="inverse_propensity",
    oracle=stages.eval.inverse_propensity,
    cases=[
        Case("labels with 0, 1, 10, 1000 of 12000 documents", (np.array([0, 1, 10, 1000]), 12000)),
        Case("the same with a = 0.5, b = 0.4", (np.array([0, 1, 10, 1000]), 12000, 0.5, 0.4)),
    ],
    mistakes=[
        Mistake(propensity, "this is the propensity; the weight is one over it"),
        Mistake(without_minus_one, "c has ln(n_documents) - 1: the 1 is missing"),
        Mistake(with_exponent_up, "frequent labels get large weights: the exponent is -a"),
        Mistake(with_other_logarithm(2), LOGARITHM),
        Mistake(with_other_logarithm(10), LOGARITHM),
    ],
    hint="a label without documents weighs most; use the a and b that are given, not 0.55 and 1.5",
)

# Step 5. Many documents, whose labels differ in weight. With a single one, a mean of ratios and a
# ratio of sums would be the same.


def mean_of_ratios(hit_Nk, labels_Nk, best_Nk, weight_L):
    gained_Nk = (hit_Nk * weight_L[labels_Nk]).cumsum(axis=1)
    return (gained_Nk / best_Nk.cumsum(axis=1)).mean(axis=0)


def over_rank(hit_Nk, labels_Nk, best_Nk, weight_L):
    k = hit_Nk.shape[1]
    gained_k = (hit_Nk * weight_L[labels_Nk]).cumsum(axis=1).mean(axis=0)
    return gained_k / np.arange(1, k + 1)


def without_hits(hit_Nk, labels_Nk, best_Nk, weight_L):
    return weight_L[labels_Nk].sum(axis=0).cumsum() / best_Nk.sum(axis=0).cumsum()


def not_cumulated(hit_Nk, labels_Nk, best_Nk, weight_L):
    return (hit_Nk * weight_L[labels_Nk]).sum(axis=0) / best_Nk.sum(axis=0)


PSP = Step(
    name="propensity_scored_precision",
    oracle=stages.eval.propensity_scored_precision,
    cases=[Case("30 documents, 5 predictions each", (HIT, LABELS, BEST, WEIGHT))],
    mistakes=[
        Mistake(
            mean_of_ratios,
            "you divide document by document; sum over all documents first, then divide",
        ),
        Mistake(over_rank, "divide by what the best predictions would gain, not by j"),
        Mistake(without_hits, "wrong predictions weigh 0: multiply by hit_Nk"),
        Mistake(not_cumulated, "PSP@j takes the first j: a running sum, above and below"),
    ],
    hint="weight_L[labels_Nk] is (N, k): the weight of each predicted label",
)

# Step 6. More training documents than neighbours, so that it matters who may vote.


def random_rows(n: int, width: int) -> csr_matrix:
    return stages.tree.normalize(
        csr_matrix(rng.random((n, width)) * (rng.random((n, width)) < 0.3))
    )


DOCUMENTS = random_rows(12, 30)
TRAINING = random_rows(50, 30)
HAS_LABEL = csr_matrix((rng.random((50, N_LABELS)) < 0.1).astype(np.float64))
VOTING = (DOCUMENTS, TRAINING.T.tocsr(), HAS_LABEL)


def without_weights(X, X_transposed, Y_train, neighbours):
    cosine = (X @ X_transposed).toarray()
    near = np.argsort(-cosine, axis=1)[:, :neighbours]
    voters = np.zeros_like(cosine)
    np.put_along_axis(voters, near, 1.0, axis=1)
    return voters @ Y_train.toarray()


def farthest(X, X_transposed, Y_train, neighbours):
    cosine = (X @ X_transposed).toarray()
    far = np.argsort(cosine, axis=1)[:, :neighbours]
    voters = np.zeros_like(cosine)
    np.put_along_axis(voters, far, np.take_along_axis(cosine, far, axis=1), axis=1)
    return voters @ Y_train.toarray()


def everyone(X, X_transposed, Y_train, neighbours):
    return (X @ X_transposed).toarray() @ Y_train.toarray()


def averaged(X, X_transposed, Y_train, neighbours):
    return stages.eval.neighbour_votes(X, X_transposed, Y_train, neighbours) / neighbours


VOTES = Step(
    name="neighbour_votes",
    oracle=stages.eval.neighbour_votes,
    cases=[Case("12 documents, 50 training documents, 5 neighbours", (*VOTING, 5))],
    mistakes=[
        Mistake(without_weights, "a neighbour's vote is its cosine, not 1"),
        Mistake(farthest, "these are the farthest documents: argsort sorts upwards"),
        Mistake(everyone, "only the nearest `neighbours` may vote, not all training documents"),
        Mistake(averaged, "the sum of the votes, not their mean"),
    ],
    hint="(X @ X_transposed).toarray() are the cosines (N, training documents); set all but the "
    "largest of each row to 0, and multiply with Y_train",
    tolerance=1e-5,
)

STEPS = [TAIL, PRECISION, NDCG, PROPENSITY, PSP, VOTES]
