"""The steps of lab 2. Oracles: label_features, split_level, balanced_kmeans and lay_out of stage 2.

Shapes   N documents, L labels, V words, S slots, C leaves, n rows of a node
"""

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix

from course.steps import Case, Mistake, Sign, Step
from plumbing.stages import load_stages

stages = load_stages()
rng = np.random.default_rng(1)


def random_rows(n: int, width: int) -> csr_matrix:
    """Sparse random rows of length 1."""
    some = rng.random((n, width)) * (rng.random((n, width)) < 0.5)
    return stages.tree.normalize(csr_matrix(some))


# Step 1. Labels of 20 documents, each of which has at least one document.
# A label without documents has no direction, and length 1 would be a division by 0.
DOCUMENTS = random_rows(20, 12)
HAS_LABEL = rng.random((20, 6)) < 0.3
HAS_LABEL[:6] |= np.eye(6, dtype=bool)
HAS_LABEL = csr_matrix(HAS_LABEL.astype(np.float64))


def label_features(X_NV: csr_matrix, Y_NL: csr_matrix) -> csr_matrix:
    # The plain sums of the lecture, without what stage 2 can do to them.
    return stages.tree.label_features(X_NV, Y_NL, smoothing=0.0, keep=0)


FEATURES = Step(
    name="label_features",
    oracle=label_features,
    cases=[Case("20 documents, 6 labels, 12 words", (DOCUMENTS, HAS_LABEL))],
    mistakes=[
        Mistake(
            lambda X, Y: (Y.T @ X).toarray(),
            "the right sums; now bring each row to length 1 (stage 2's normalize does it)",
        ),
        Mistake(
            lambda X, Y: (Y.T @ X).toarray() / Y.sum(axis=0).reshape(-1, 1),
            "these are means, and their lengths are below 1: divide by the length, not by the "
            "number of documents",
        ),
        Mistake(
            lambda X, Y: (Y.T @ X).toarray() / (Y.T @ X).toarray().sum(axis=1, keepdims=True),
            "your rows add up to 1; the length is the root of the sum of squares",
        ),
        Mistake(
            lambda X, Y: stages.tree.normalize(csr_matrix(Y.T @ (X > 0))),
            "use the TF-IDF values of X_NV, not only whether a word occurs",
        ),
    ],
    hint="Y_NL.T @ X_NV is (L, V): the sum over the documents of each label",
)

# Step 2. The stage splits all nodes of a level at once, and draws its random numbers itself. To be
# the oracle of a single split, it gets a level of one node, and draws that are given.


class Draws:
    """Stands where stage 2 expects a random generator, and gives the case's draws."""

    def __init__(self, draws_n: np.ndarray) -> None:
        self.draws_n = draws_n

    def random(self, n: int) -> np.ndarray:
        return self.draws_n


def two_means(Z_nV: np.ndarray, draws_n: np.ndarray, iterations: int) -> tuple:
    """split_level of stage 2, with a level of one node."""
    n = len(Z_nV)
    node_n = np.zeros(n, np.int32)
    bounds = np.array([0, n])
    order = stages.tree.split_level(csr_matrix(Z_nV), node_n, bounds, iterations, Draws(draws_n))
    middle = (n + 1) // 2
    return order[:middle], order[middle:]


def has_masks(result: tuple, Z_nV: np.ndarray, *others) -> bool:
    return np.asarray(result[0]).dtype == bool


def has_rows_themselves(result: tuple, *arguments) -> bool:
    return np.asarray(result[0]).ndim == 2


def is_no_partition(result: tuple, Z_nV: np.ndarray, *others) -> bool:
    together = np.sort(np.concatenate(result))
    return not np.array_equal(together, np.arange(len(Z_nV)))


def is_unbalanced(result: tuple, Z_nV: np.ndarray, *others) -> bool:
    return len(result[0]) != (len(Z_nV) + 1) // 2


def is_in_another_order(result: tuple, *arguments) -> bool:
    expected = two_means(*arguments)
    return all(set(mine) == set(theirs) for mine, theirs in zip(result, expected, strict=True))


def has_means_as_centroids(result: tuple, Z_nV: np.ndarray, *others) -> bool:
    """Do centroids that are means, of any length, give these halves in this order?"""
    left, right = result
    gap_n = Z_nV @ (Z_nV[left].mean(axis=0) - Z_nV[right].mean(axis=0))
    return np.array_equal(np.concatenate(result), np.argsort(-gap_n))


UNBALANCED = "balanced: the left half has exactly (n + 1) // 2 rows, whatever the sign of the gap"
TWO_MEANS = Step(
    name="two_means",
    oracle=two_means,
    cases=[
        Case("24 rows, at most 20 rounds", (random_rows(24, 12).toarray(), rng.random(24), 20)),
        # An odd number: which half is the larger one?
        Case("25 rows, at most 20 rounds", (random_rows(25, 12).toarray(), rng.random(25), 20)),
        Case("40 rows, at most 20 rounds", (random_rows(40, 12).toarray(), rng.random(40), 20)),
        # Stopped before its halves are final: whoever goes on until nothing changes is wrong here.
        Case("40 rows, 2 rounds", (random_rows(40, 12).toarray(), rng.random(40), 2)),
    ],
    mistakes=[
        Mistake(
            lambda Z, draws, iterations: two_means(Z, draws, 1),
            "you stop after one round: compute new centroids and go on until nothing changes",
        ),
        Mistake(
            lambda Z, draws, iterations: two_means(Z, draws, iterations)[::-1],
            "left and right are exchanged: the largest gaps go left",
        ),
        Mistake(
            lambda Z, draws, iterations: two_means(Z, -draws, iterations),
            "the first centroids are the rows with the smallest draws, not the largest",
        ),
    ],
    signs=[
        Sign(has_masks, "these are masks; np.flatnonzero(mask) gives numbers of rows, unsorted"),
        Sign(has_rows_themselves, "return the numbers of the rows, not the rows"),
        Sign(is_no_partition, "every row number from 0 to n - 1 belongs to exactly one half"),
        Sign(is_unbalanced, UNBALANCED),
        Sign(
            has_means_as_centroids,
            "did you bring the centroids to length 1? only their direction counts",
        ),
        Sign(
            is_in_another_order,
            "the right halves; return the rows of each in falling order of the gap",
        ),
    ],
    hint="gap = Z_nV @ a - Z_nV @ b; order = np.argsort(-gap); the first (n + 1) // 2 go left",
)

# Step 3. The number of labels of the second case is no power of two, so that leaves differ in size.


def leaves(Z_LV: np.ndarray, depth: int, iterations: int, seed: int) -> list[np.ndarray]:
    order, bounds = stages.tree.balanced_kmeans(csr_matrix(Z_LV), depth, iterations, seed)
    return np.split(order, bounds[1:-1])


def faulty_leaves(own_order=True, labels=True, draws_of="place") -> Callable:
    """The plain recursion with one fault: see the mistakes below."""

    def wrong(Z_LV: np.ndarray, depth: int, iterations: int, seed: int) -> list[np.ndarray]:
        # As random_start of the lab draws: the order of the labels, then a row for each level.
        generator = np.random.default_rng(seed)
        rows_L = generator.permutation(len(Z_LV))
        draws_dL = np.stack([generator.random(len(Z_LV)) for _ in range(depth)])
        if not own_order:
            rows_L = np.arange(len(Z_LV))

        def split(rows: np.ndarray, draws: np.ndarray) -> list[np.ndarray]:
            if len(draws) == 0:
                return [rows]
            left, right = two_means(Z_LV[rows], draws[0], iterations)
            # The draws below belong to places: the first half of them is the left node's, whichever
            # rows went there. The fault "row" lets them move with their rows.
            parts = {"place": (slice(0, len(left)), slice(len(left), None)), "row": (left, right)}
            of_left, of_right = parts[draws_of]
            if labels:
                left, right = rows[left], rows[right]
            return split(left, draws[1:, of_left]) + split(right, draws[1:, of_right])

        return split(rows_L, draws_dL)

    return wrong


def sorted_leaves(found: list[np.ndarray]) -> list[np.ndarray]:
    """In which order a leaf holds its labels does not matter."""
    return [np.sort(np.asarray(leaf)) for leaf in found]


def has_wrong_number(result: list, Z_LV: np.ndarray, depth: int, *others) -> bool:
    return len(result) != 2**depth


def misses_labels(result: list, Z_LV: np.ndarray, *others) -> bool:
    return not np.array_equal(np.sort(np.concatenate(result)), np.arange(len(Z_LV)))


LEAVES = Step(
    name="leaves",
    oracle=leaves,
    cases=[
        Case("16 labels, depth 1", (random_rows(16, 12).toarray(), 1, 20, 0)),
        Case("43 labels, depth 3", (random_rows(43, 12).toarray(), 3, 20, 1)),
    ],
    mistakes=[
        Mistake(
            lambda Z, depth, iterations, seed: leaves(Z, depth, iterations, seed)[::-1],
            "right leaves, wrong order: first all leaves of the left half, then those of the right",
        ),
        Mistake(
            faulty_leaves(own_order=False),
            "the root is all labels in random order, the first result of random_start; the draws "
            "are not reordered",
        ),
        Mistake(
            faulty_leaves(labels=False),
            "two_means gives places within the node; the labels are rows[left] and rows[right]",
        ),
        Mistake(
            faulty_leaves(draws_of="row"),
            "a draw belongs to a place, not to a label, and does not move with it: the left half "
            "takes the first draws of the next level, draws[1:, :len(left)]",
        ),
    ],
    signs=[
        Sign(
            has_wrong_number,
            "there should be 2^depth leaves: every level splits all nodes of the level above",
        ),
        Sign(
            misses_labels,
            "some labels are missing or twice: two_means gives places within the node; the label "
            "numbers are rows[left] and rows[right]",
        ),
    ],
    hint="do the draws fit? a node takes the draws of its own places: draws[0] splits it, "
    "draws[1:, :middle] are for its left half, draws[1:, middle:] for its right half",
    view=sorted_leaves,
    uses=["two_means"],
)

# Step 4. Both cases have leaves of two sizes: with equal ones nothing would have to be filled up.


def lay_out(leaves_C: list[np.ndarray]) -> np.ndarray:
    order = np.concatenate(leaves_C)
    bounds = np.cumsum([0] + [len(leaf) for leaf in leaves_C])
    return stages.tree.lay_out(order, bounds)


def padded_at_the_end(leaves_C: list[np.ndarray]) -> np.ndarray:
    slots = lay_out(leaves_C)
    return np.concatenate([slots[slots >= 0], slots[slots < 0]])


def padded_in_front(leaves_C: list[np.ndarray]) -> np.ndarray:
    slots_CF = lay_out(leaves_C).reshape(len(leaves_C), -1)
    # False sorts before True: the empty places come first, and the labels keep their order.
    order_CF = np.argsort(slots_CF >= 0, axis=1, kind="stable")
    return np.take_along_axis(slots_CF, order_CF, axis=1).ravel()


LAY_OUT = Step(
    name="lay_out",
    oracle=lay_out,
    cases=[
        Case("the leaves [6 2] and [5]", ([np.array([6, 2]), np.array([5])],)),
        Case(
            "leaves of 3, 2, 3 and 2 labels",
            ([np.array([4, 0, 7]), np.array([9, 2]), np.array([1, 3, 8]), np.array([6, 5])],),
        ),
    ],
    mistakes=[
        Mistake(
            padded_at_the_end,
            "every leaf has a block of its own: fill up each leaf with -1, not the whole array",
        ),
        Mistake(padded_in_front, "the -1 stand behind the labels of their leaf"),
        Mistake(
            lambda leaves_C: np.maximum(lay_out(leaves_C), 0),
            "an empty place holds -1: 0 is a label",
        ),
        Mistake(
            lambda leaves_C: np.concatenate(leaves_C),
            "fill up the smaller leaves with -1, so that all have the width of the largest",
        ),
    ],
    hint="width = the largest leaf; an array (leaves, width) full of -1, then leaf by leaf",
)

STEPS = [FEATURES, TWO_MEANS, LEAVES, LAY_OUT]
