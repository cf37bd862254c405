"""Stage 2: cluster the labels into a tree of several levels.

    python 02_label_tree.py
    python 02_label_tree.py --run runs/mine --levels 64,512

Reads    RUN/data.npz
Writes   RUN/tree.npz     slot_to_label (S,), levels (number of clusters per level, coarse to fine)

Labels that belong to similar documents should stand in the same cluster: then a document finds all
of its labels in a few clusters. It goes in three steps.

1. A document becomes a vector of its words (TF-IDF).
2. A label becomes the sum of the vectors of its documents (PIFA, positive instance feature
   aggregation).
3. The labels are split in two halves of equal size, each half is split in two, and so on (balanced
   2-means), until a cluster holds about eight labels.

The halves are of equal size, or differ by one. That makes the tree very simple: it is a
permutation. Put the labels side by side in tree order, in S slots, with equally many slots for
every leaf cluster; a slot that is left over holds -1. Eight labels, levels of 2 and 4 clusters:

    slot            0  1  2  3  4  5  6  7
    label           6  2  5  0  7  1  4  3       slot_to_label
    level 2         0  0  1  1  2  2  3  3       node of a slot: slot // 2
    level 1         0  0  0  0  1  1  1  1       node of a slot: slot // 4

    node of a slot       slot // (S // nodes of the level)
    children of node c   c * fan, ..., c * fan + fan - 1;  fan = nodes of the next level // of this

Cluster 1 of level 1 has the children 2 and 3 on level 2; cluster 2 of level 2 has the slots 4 and
5. No table of children is stored anywhere, and the weights of a cluster are one contiguous block.

Left out: other ways to make a tree, clusters of documents, a tree that is learnt together with the
model (ELIAS, Gupta et al., NeurIPS 2022).
Shapes   N documents, L labels, S slots, V words of the vocabulary, C clusters (nodes) of a level,
         B documents of a batch, K clusters kept for a document, F children of each (fan),
         P (document, label) pairs
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags_array, vstack
from torch import Tensor
from tqdm import tqdm

from plumbing.cli import flag, int_list, main, natural, positive
from plumbing.errors import UserError
from plumbing.memory import need_space
from plumbing.ownership import owns_its_folder
from plumbing.store import load_npz, save_npz

data_stage = import_module("01_data")

TOLERANCE = 0.005  # share of the labels that may still change sides when a level is done
ROWS = 8192  # labels whose features are in memory uncut at a time


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")
    levels: str = flag(
        "", "clusters per level, coarse to fine, powers of two such as 64,512 (default: from L)"
    )
    seed: int = flag(0, "seed of the 2-means' first centroids", natural)
    clusters_shown: int = flag(3, "clusters to print", natural)
    iterations: int = flag(20, "2-means iterations per level at most", positive)
    features: int = flag(100, "features to keep per label, the strongest (0: all)", natural)
    smoothing: float = flag(
        0.0, "weight of the co-occurring labels' features in a label's own (0: none)"
    )


class Tree(NamedTuple):
    """tree.npz in memory."""

    slot_to_label: np.ndarray  # (S,) int32, -1 in an empty slot
    levels: list[int]  # clusters per level, coarse to fine


# 1. Documents as vectors of words.


def normalize(X: csr_matrix) -> csr_matrix:
    """Rows at Euclidean length 1; empty rows stay empty."""
    squares = np.asarray(X.multiply(X).sum(axis=1)).ravel()
    lengths = np.maximum(np.sqrt(squares), 1e-12)
    return csr_matrix(diags_array(1 / lengths) @ X)


def tfidf(
    split: data_stage.Split, idf_V: np.ndarray | None, vocab: int
) -> tuple[csr_matrix, np.ndarray]:
    """(X (N, V), idf (V,)): log(1 + count of a word) times the word's idf, rows at length 1.

    The words are the token ids. A rare word says more than a frequent one, so it has a larger idf:
    1 + ln((N + 1) / (documents with the word + 1)). With idf_V None it is taken from these
    documents.
    """
    # Every token is an entry 1 in its document's row; equal ones are added up.
    ones = np.ones(len(split.ids), np.float32)
    words = split.ids.astype(np.int32)
    X = csr_matrix((ones, words, split.offsets), shape=(len(split), vocab))
    X.sum_duplicates()
    X.data = np.log1p(X.data)
    if idf_V is None:
        documents_V = np.bincount(X.indices, minlength=vocab)
        idf_V = (1 + np.log((len(split) + 1) / (documents_V + 1))).astype(np.float32)
    return normalize(X @ diags_array(idf_V)), idf_V


# 2. Labels as vectors of words.


def label_features(
    X_NV: csr_matrix, Y_NL: csr_matrix, smoothing: float = 0.0, keep: int = 100
) -> csr_matrix:
    """PIFA, Z (L, V): the sum of the TF-IDF vectors of a label's documents, at length 1.

    Only the `keep` largest entries of a label stay (0: all). A label without documents has an empty
    row.

    With smoothing, a label also gets the features of the labels that occur together with it: Z +
    smoothing * D^-1 A Z, where A counts the documents that two labels share and D is its row sums.
    """
    Y_LN = csr_matrix(Y_NL.T)

    def own(part: slice) -> csr_matrix:
        """The sums of the documents of some labels."""
        return csr_matrix(Y_LN[part] @ X_NV)

    Z_LV = in_parts(own, Y_LN.shape[0], keep)
    if not smoothing:
        return Z_LV

    def with_neighbours(part: slice) -> csr_matrix:
        """The same, and a share of the features of labels that occur together with them."""
        together = csr_matrix(Y_LN[part] @ Y_NL)
        # A label is not its own neighbour. Row 0 of this part is label part.start, so the labels'
        # own entries stand on the diagonal that begins in that column.
        together.setdiag(0, k=part.start)
        degree = np.asarray(together.sum(axis=1)).ravel()
        mean_of_neighbours = diags_array(smoothing / np.maximum(degree, 1)) @ together @ Z_LV
        return csr_matrix(Z_LV[part] + mean_of_neighbours)

    return in_parts(with_neighbours, Y_LN.shape[0], keep)


def in_parts(features_of: Callable[[slice], csr_matrix], n_labels: int, keep: int) -> csr_matrix:
    """features_of(part) for all labels, cut to the largest entries and at length 1.

    Before the features are cut, a label may have an entry for every word of the vocabulary. Only
    ROWS labels are held like that at a time.
    """
    starts = range(0, n_labels, ROWS)
    parts = []
    for start in tqdm(starts, desc="label features", unit=f" x {ROWS} labels", disable=None):
        uncut = normalize(features_of(slice(start, start + ROWS)))
        parts.append(normalize(strongest(uncut, keep)))
    return vstack(parts, format="csr")


def strongest(X: csr_matrix, keep: int) -> csr_matrix:
    """The `keep` largest entries of each row (0: all); entries are between 0 and 1."""
    if not keep:
        return X
    sizes = np.diff(X.indptr)
    row = np.repeat(np.arange(X.shape[0]), sizes)
    # One sort for all rows: by row, and within a row by falling value. The value's part of the key
    # is at most 1/2, so it never reaches the next row.
    key = row + (1 - X.data.astype(np.float64)) / 2
    order = np.argsort(key)
    place_in_row = np.arange(len(order)) - X.indptr[row]
    kept = order[place_in_row < keep]
    bounds = np.append(0, np.cumsum(np.minimum(sizes, keep)))
    return csr_matrix((X.data[kept], X.indices[kept], bounds), shape=X.shape)


# 3. Balanced spherical 2-means.
#
# One node with the rows z (of length 1) is split into two halves A and B of equal size, such that
#
#     sum of z . c_A over z in A  +  sum of z . c_B over z in B
#
# becomes large, where c is the normalised mean of a half: its rows should point into one direction.
# As in k-means, two steps alternate. Given the centroids, sort the rows by z . c_A - z . c_B and
# give the better half to A. Given the halves, compute the centroids. In plain form, for all levels:
#
#     def split(rows, depth):
#         if depth == 0:
#             return [rows]
#         a, b = two random rows                          # the first centroids
#         repeat until no row changes sides:
#             gap = rows @ a - rows @ b
#             left = the half of the rows with the largest gap
#             right = the others
#             a = normalised mean of left
#             b = normalised mean of right
#         return split(left, depth - 1) + split(right, depth - 1)
#
# With a million labels this means a million calls, and most of them are for a handful of rows. So
# the functions below split all nodes of a level at once. There is one difference: a level is done
# when at most TOLERANCE of all its rows still change sides, or after 20 rounds. With few rows this
# means none, and the result is the same: tests/test_tree.py has the plain form and compares.


def halve(bounds: np.ndarray) -> np.ndarray:
    """Node boundaries (C+1,) -> (2C+1,): every node in two. An odd size gives the left one more."""
    sizes = np.diff(bounds)
    middle = bounds[:-1] + (sizes + 1) // 2
    starts = np.stack([bounds[:-1], middle], axis=1).ravel()
    return np.append(starts, bounds[-1])


def own_columns(Z: csr_matrix, rows: np.ndarray, node_L: np.ndarray) -> csr_matrix:
    """The given rows of Z, in which every node has columns of its own.

    This is what makes it possible to treat all nodes at once. The rows of different nodes share no
    column, so Z is a block matrix, and one product serves all nodes: Z.T @ x sums the rows of each
    node in its own block, and Z times these sums gives the products of each row with its own node's
    sum.

    Z comes with the columns of the parents' nodes. A left child (node_L even) keeps these columns.
    In the rows of every right child (odd) all columns move up by the same number, the width of Z,
    so they are new ones. Two words, and two nodes that are split:

        node   columns before      node   columns after
        0      0 1 . .             0      0 1 . . . . . .
        0      0 1 . .             1      . . . . 4 5 . .
        1      . . 2 3             2      . . 2 3 . . . .
        1      . . 2 3             3      . . . . . . 6 7

    The columns of a node stand side by side, as its rows do: what a product reads and writes is
    near in memory, and that is where the speed comes from.
    """
    Z = Z[rows]
    n_columns = Z.shape[1]
    is_right_L = node_L % 2
    Z.indices += np.repeat(is_right_L * n_columns, np.diff(Z.indptr))
    width = 2 * n_columns
    # Columns that nobody uses would soon be more than the entries: leave them out.
    if width > Z.nnz / 4:
        is_used = np.zeros(width, bool)
        is_used[Z.indices] = True
        new_number = np.cumsum(is_used, dtype=Z.indices.dtype) - 1
        Z.indices = new_number[Z.indices]
        width = is_used.sum()
    return csr_matrix((Z.data, Z.indices, Z.indptr), shape=(len(rows), width))


def first_gap(
    Z: csr_matrix, node_L: np.ndarray, bounds: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(L,): each row's product with one random row of its node, minus that with another one."""
    # Random numbers, sorted within the nodes: the first two rows of each node are its first
    # centroids.
    shuffled = np.argsort(node_L + rng.random(len(node_L)))
    first = shuffled[bounds[:-1]]
    second = shuffled[np.minimum(bounds[:-1] + 1, bounds[1:] - 1)]  # if there is only one: it again
    plus_minus_L = np.zeros(len(node_L), Z.dtype)
    plus_minus_L[second] = -1
    plus_minus_L[first] = 1
    return Z @ (Z.T @ plus_minus_L)


def split_level(
    Z: csr_matrix,
    node_L: np.ndarray,
    bounds: np.ndarray,
    iterations: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Split every node of a level in two, all nodes at once; the new order of the rows (L,).

    Z (L, columns) is what own_columns makes: node c holds the rows bounds[c]:bounds[c+1], and
    node_L says which node that is for each row.
    """
    n = len(node_L)
    gap_L = first_gap(Z, node_L, bounds, rng)
    # Each row's product with the sum of all rows of its node (of its node alone: rows of other
    # nodes have other columns). The sums of the two halves always add up to it.
    to_all_L = Z @ (Z.T @ np.ones(n, Z.dtype))
    # Rows change places within their node only, so places 0 to L-1 are divided among the nodes as
    # before. At which place does the left half end, for the node of each place?
    middle_L = halve(bounds)[1::2][node_L]
    is_left_L = np.zeros(n, bool)
    sum_of_left = np.zeros(Z.shape[1], Z.dtype)  # of every node, in the node's own columns
    for _ in range(iterations):
        # 1. Sort the rows by node, and within a node by falling gap, in one sort: the nodes are
        #    further apart than any two gaps. row_at_place[i]: the row that stands at place i then.
        apart = 1 + 2 * np.abs(gap_L).max()
        row_at_place = np.argsort(node_L * apart - gap_L)
        # 2. The better half of each node goes left: the rows whose new place is before its middle.
        was_left_L = is_left_L
        is_left_L = np.zeros(n, bool)
        is_left_L[row_at_place] = np.arange(n) < middle_L
        changed = np.flatnonzero(is_left_L != was_left_L)
        # Deep down most nodes are done after a few rounds, and a round costs the same for all.
        if len(changed) <= TOLERANCE * n:
            break
        # 3. The sums of the left halves: add the rows that came, subtract those that went.
        came_or_went = np.where(is_left_L[changed], 1, -1).astype(Z.dtype)
        sum_of_left += Z[changed].T @ came_or_went
        # 4. Each row's product with the left centroid minus its product with the right one. A
        #    centroid is the sum s of its half over |s|, and |s|^2 is the sum of z . s over the
        #    half.
        to_left_L = Z @ sum_of_left
        to_right_L = to_all_L - to_left_L
        gap_L = np.zeros(n)
        gap_L += to_left_L / length_of_sums(node_L, is_left_L, to_left_L)
        gap_L += -to_right_L / length_of_sums(node_L, ~is_left_L, to_right_L)
    return row_at_place


def length_of_sums(
    node_L: np.ndarray, is_in_half_L: np.ndarray, to_half_L: np.ndarray
) -> np.ndarray:
    """(L,): the length of the sum of a half of each row's node, from the rows' products with it."""
    square_C = np.bincount(node_L, is_in_half_L * to_half_L)
    length_C = np.sqrt(np.maximum(square_C, 1e-12))
    return length_C[node_L]


def balanced_kmeans(
    Z: csr_matrix, depth: int, iterations: int = 20, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster the rows of Z (any CSR matrix) into 2^depth clusters whose sizes differ by at most
    one.

    (order, bounds): cluster c holds the rows order[bounds[c]:bounds[c+1]], in tree order.
    """
    rng = np.random.default_rng(seed)
    n_rows = Z.shape[0]
    order = rng.permutation(n_rows)
    bounds = np.array([0, n_rows])  # one node holds everything
    row_at_place = order
    for _ in tqdm(range(depth), desc="2-means", unit=" levels", disable=None):
        nodes = np.arange(len(bounds) - 1, dtype=np.int32)
        node_L = np.repeat(nodes, np.diff(bounds))
        Z = own_columns(Z, row_at_place, node_L)
        row_at_place = split_level(Z, node_L, bounds, iterations, rng)
        order = order[row_at_place]
        bounds = halve(bounds)
    return order, bounds


def cosine_to_centroid(Z: csr_matrix, order: np.ndarray, bounds: np.ndarray) -> float:
    """How good are the clusters? The mean cosine of a row with the centroid of its cluster.

    The cosines of a cluster add up to the length of the sum of its rows. Empty rows do not count.
    """
    ones = np.ones(len(order), Z.dtype)
    member = csr_matrix((ones, order, bounds), shape=(len(bounds) - 1, len(order)))
    sums = member @ Z
    lengths = np.sqrt(np.asarray(sums.multiply(sums).sum(axis=1)))
    n_rows = (np.diff(Z.indptr) > 0).sum()
    return float(lengths.sum() / max(1, n_rows))


# 4. The tree: how many levels, and the permutation.


def choose_levels(n_labels: int) -> list[int]:
    """About eight labels to a leaf cluster, eight children to a cluster, at most 1,024 at the top.

    This gives the published settings of CascadeXML for Wiki10-31K, Wiki-500K and Amazon-670K.
    """
    leaf_depth = 0
    if n_labels > 1:
        leaf_depth = max(1, round(math.log2(n_labels / 8)))
    depths = [leaf_depth]
    # Two levels at least where there is room for them, and more while the top one is too large.
    while depths[0] > 3 and (len(depths) < 2 or depths[0] > 10):
        depths.insert(0, depths[0] - 3)
    return [2**depth for depth in depths]


def check_levels(levels: list[int], n_labels: int) -> None:
    """UserError unless --levels are rising powers of two, at most one cluster per label."""
    is_rising = all(a < b for a, b in zip(levels, levels[1:], strict=False))
    are_powers = all(n >= 1 and n & (n - 1) == 0 for n in levels)
    if not is_rising or not are_powers:
        raise UserError(f"--levels {levels}: expected rising powers of two, such as 64,512")
    if levels and levels[-1] > n_labels:
        raise UserError(
            f"--levels {levels}: {levels[-1]} clusters > {n_labels} labels; lower the last level"
        )


def lay_out(order: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """slot_to_label (S,): every cluster in a block of equal width, -1 where it has fewer labels."""
    sizes = np.diff(bounds)
    width = sizes.max()
    slots = np.full((len(sizes), width), -1, np.int32)
    is_taken = np.arange(width) < sizes[:, None]
    slots[is_taken] = order
    return slots.ravel()


def load(folder: str | Path) -> Tree:
    """RUN/tree.npz. UserError unless it is a tree; nothing of its size is made before."""
    path = Path(folder) / "tree.npz"
    arrays, _ = load_npz(path)
    tree = Tree(arrays["slot_to_label"], arrays["levels"].tolist())
    problem = what_is_wrong(tree)
    if problem:
        raise UserError(
            f"{path}: {problem}; run: python 02_label_tree.py --run {folder}, "
            "or the script of your own that made it"
        )
    return tree


def what_is_wrong(tree: Tree) -> str:
    """Why these arrays are no tree; nothing if they are one.

    Stage 2 makes levels that are powers of two. The model asks for less: each level has to divide
    the next one. So a fork may put a tree of its own here.
    """
    labels = np.sort(tree.slot_to_label[tree.slot_to_label >= 0])
    above = 1  # the root
    for t, n in enumerate(tree.levels):
        is_larger = n > above or t == 0
        if n < 1 or not is_larger or n % above:
            wanted = "rising numbers, each a multiple of the one before"
            return f"levels {tree.levels}: expected {wanted}"
        above = n
    if above > max(1, len(labels)):
        return f"levels {tree.levels}: {above} clusters > {len(labels)} labels"
    n_slots = len(tree.slot_to_label)
    if n_slots % above:
        return f"{n_slots} slots: expected equally many for each of the {above} leaf clusters"
    if (labels != np.arange(len(labels))).any():
        return "its slots are no permutation of the labels"
    return ""


# 5. Going down the tree. Stage 3 uses these two on the shortlists of a batch.


def expand(parents_BK: Tensor, fan: int) -> Tensor:
    """Children (B, K * fan) of nodes (B, K). With fan 2, nodes 1 and 3 have children 2 3 6 7."""
    child = torch.arange(fan, device=parents_BK.device)
    children_BKF = parents_BK[..., None] * fan + child
    return children_BKF.flatten(1)


def match(node_P: Tensor, doc_P: Tensor, parents_BK: Tensor, fan: int) -> Tensor:
    """Targets (B, K, fan): 1 where a candidate is one of its document's correct nodes.

    node_P are the correct nodes of this level, doc_P their documents. An example: with the parents
    1 and 0 and fan 2, the candidates are 2 3 and 0 1. For the correct node 3, the targets are 0 1
    and 0 0. A correct node whose parent is not on the shortlist has no place among them.
    """
    n_documents, n_parents = parents_BK.shape
    # 1. Where on its document's shortlist is the parent of each correct node?
    is_parent_PK = parents_BK[doc_P] == (node_P // fan)[:, None]
    place_P = is_parent_PK.to(torch.uint8).argmax(1)
    # 2. Nowhere: one more column takes these nodes, and is cut off below.
    place_P = torch.where(is_parent_PK.any(1), place_P, n_parents)
    # 3. Which child of its parent is the node?
    child_P = node_P % fan
    targets = torch.zeros(n_documents, (n_parents + 1) * fan, device=parents_BK.device)
    # The 1 is a tensor that is on the device already. A Python number would have to be copied to a
    # GPU, and every step would wait for the copy, once per level.
    one = targets.new_ones(())
    targets[doc_P, place_P * fan + child_P] = one
    return targets[:, : n_parents * fan].view(n_documents, n_parents, fan)


# 6. From data.npz to tree.npz.


@owns_its_folder
def run(config: Config) -> None:
    data = data_stage.load(config.run)
    n_labels = len(data.names)
    levels = int_list(config.levels, "--levels") if config.levels else choose_levels(n_labels)
    check_levels(levels, n_labels)
    if not 0 <= config.smoothing < math.inf:
        raise UserError(f"--smoothing {config.smoothing}: expected a number of at least 0")
    need_space(Path(config.run), 16 * n_labels)

    train = data.splits["train"]
    X_NV, _ = tfidf(train, None, data.meta["vocab_size"])
    Y_NL = train.label_matrix(n_labels)
    Z_LV = label_features(X_NV, Y_NL, config.smoothing, config.features)
    depth = int(math.log2(levels[-1]))
    order, bounds = balanced_kmeans(Z_LV, depth, config.iterations, config.seed)
    tree = Tree(lay_out(order, bounds), levels)
    arrays = {"slot_to_label": tree.slot_to_label, "levels": np.array(levels)}
    save_npz(Path(config.run) / "tree.npz", config, arrays, made_from=("data.npz",))
    describe(config, data, tree, Z_LV, order, bounds)


def describe(
    config: Config,
    data: data_stage.Data,
    tree: Tree,
    Z_LV: csr_matrix,
    order: np.ndarray,
    bounds: np.ndarray,
) -> None:
    """Print the size of the tree, how good its clusters are, and a few of them."""
    n_labels = len(data.names)
    n_slots = len(tree.slot_to_label)
    n_leaves = tree.levels[-1]
    n_empty = (tree.slot_to_label < 0).sum()
    print(
        f"{n_labels:,} labels -> clusters per level {tree.levels}, at most {n_slots // n_leaves} "
        f"labels in a leaf; {n_empty:,} of {n_slots:,} slots are empty"
    )
    # For comparison: clusters of the same sizes, filled at random.
    shuffled = np.random.default_rng(config.seed).permutation(n_labels)
    ours = cosine_to_centroid(Z_LV, order, bounds)
    random = cosine_to_centroid(Z_LV, shuffled, bounds)
    print(
        f"mean cosine of a label to its leaf's centroid: {ours:.3f}; in a random tree: {random:.3f}"
    )
    spread = np.linspace(0, n_leaves - 1, config.clusters_shown + 2).astype(int)
    for cluster in spread[1:-1]:
        labels = order[bounds[cluster] : bounds[cluster + 1]]
        names = ", ".join(data.names[label] for label in labels[:12])
        print(f"leaf cluster {cluster}: {names}")


if __name__ == "__main__":
    main(run, Config, __doc__)
