"""Stage 2: cluster the labels into a tree of several resolutions.

    python 02_label_tree.py
    python 02_label_tree.py --run runs/mine --levels 64,512

Reads    RUN/data.npz
Writes   RUN/tree.npz     slot_to_label (S,), levels (number of clusters per level, coarse to fine)

Labels are described by the documents that carry them (PIFA) and split in two, and in two again, by balanced spherical
2-means: sizes differ by at most one. So the tree is nothing but a permutation. Labels are laid out in tree order in S
slots; every leaf cluster gets the same number of slots (a slot left over holds -1), and the rest is arithmetic:

    node of a slot at level t     slot // (S // levels[t])
    children of node c            c * fan + arange(fan),   fan = levels[t+1] // levels[t]

Left out here: trees that are not binary, clustering of documents, learning the tree (ELIAS).

Shapes   N documents, L labels, S slots, V vocabulary, M nodes of a level; of expand and match, which training uses:
         B batch, K nodes kept for a document, P (document, positive node) pairs
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
from plumbing.store import load_npz, save_npz

data_stage = import_module("01_data")

TOLERANCE = 0.005  # share of the labels that may still change sides when a level is done
ROWS = 8192  # labels whose features are there uncut, at a time


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")
    levels: str = flag("", "clusters per level, coarse to fine, powers of two such as 64,512 (default: from L)")
    smoothing: float = flag(0.0, "weight of the co-occurring labels' features in a label's own (0: none)")
    features: int = flag(100, "features to keep per label, the strongest (0: all)", natural)
    iterations: int = flag(20, "2-means iterations per level at most", positive)
    clusters_shown: int = flag(3, "clusters to print", natural)
    seed: int = flag(0, "seed of the 2-means' first centroids", natural)


class Tree(NamedTuple):
    """tree.npz in memory."""

    slot_to_label: np.ndarray  # (S,) int32, -1 in an empty slot
    levels: list[int]  # clusters per level, coarse to fine


def normalize(X: csr_matrix) -> csr_matrix:
    """Rows at Euclidean length 1; empty rows stay empty."""
    norms = np.sqrt(np.asarray(X.multiply(X).sum(axis=1)).ravel())
    return csr_matrix(diags_array(1 / np.maximum(norms, 1e-12)) @ X)


def tfidf(split: data_stage.Split, idf_V: np.ndarray | None, vocab: int) -> tuple[csr_matrix, np.ndarray]:
    """(X (N, V), idf (V,)): log(1 + count) times idf, rows at length 1. The columns are the token ids themselves.

    idf_V None: taken from these documents, idf = 1 + ln((N + 1) / (documents with the token + 1)).
    """
    ones = np.ones(len(split.ids), np.float32)
    X = csr_matrix((ones, split.ids.astype(np.int32), split.offsets), shape=(len(split), vocab))
    X.sum_duplicates()
    X.data = np.log1p(X.data)
    if idf_V is None:
        df_V = np.bincount(X.indices, minlength=vocab)
        idf_V = (1 + np.log((len(split) + 1) / (df_V + 1))).astype(np.float32)
    return normalize(X @ diags_array(idf_V)), idf_V


def label_features(X_NV: csr_matrix, Y_NL: csr_matrix, smoothing: float = 0.0, keep: int = 100) -> csr_matrix:
    """PIFA (L, V): the sum of the TF-IDF rows of a label's documents, cut to its `keep` largest (0: all), at length 1.

    With smoothing, the features of labels that occur together are mixed in: Z + smoothing * D^-1 A Z, where A counts
    the documents that two labels share and D its row sums. A label without documents has an empty row. Uncut, the
    features of a label may be the whole vocabulary; they exist for ROWS labels at a time.
    """
    Y_LN = csr_matrix(Y_NL.T)

    def cut_rows(rows: Callable[[slice], csr_matrix]) -> csr_matrix:
        parts = [slice(start, start + ROWS) for start in range(0, Y_LN.shape[0], ROWS)]
        bar = tqdm(parts, desc="label features", unit=f" x {ROWS} labels", disable=None)
        return vstack([normalize(strongest(normalize(rows(part)), keep)) for part in bar], format="csr")

    def with_neighbours(part: slice) -> csr_matrix:
        A_RL = csr_matrix(Y_LN[part] @ Y_NL)
        A_RL.setdiag(0, k=part.start)
        degree_R = np.asarray(A_RL.sum(axis=1)).ravel()
        return csr_matrix(Z_LV[part] + diags_array(smoothing / np.maximum(degree_R, 1)) @ A_RL @ Z_LV)

    Z_LV = cut_rows(lambda part: csr_matrix(Y_LN[part] @ X_NV))
    return cut_rows(with_neighbours) if smoothing else Z_LV


def strongest(X: csr_matrix, keep: int) -> csr_matrix:
    """The `keep` largest entries of each row (0: all); entries are between 0 and 1."""
    if not keep:
        return X
    row = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))
    order = np.argsort(row + (1 - X.data.astype(np.float64)) / 2)  # by row, then by falling value, in a single sort
    kept = order[np.arange(len(order)) - X.indptr[row] < keep]
    bounds = np.append(0, np.cumsum(np.minimum(np.diff(X.indptr), keep)))
    return csr_matrix((X.data[kept], X.indices[kept], bounds), shape=X.shape)


def halve(bounds: np.ndarray) -> np.ndarray:
    """Node boundaries (M+1,) -> (2M+1,): every node in two, the left one larger by one where the size is odd."""
    middle = bounds[:-1] + (np.diff(bounds) + 1) // 2
    return np.append(np.stack([bounds[:-1], middle], axis=1).ravel(), bounds[-1])


def own_columns(Z: csr_matrix, rows: np.ndarray, node_L: np.ndarray) -> csr_matrix:
    """The given rows of Z, now of nodes node_L: columns that were (parent, feature) pairs become (node, feature) pairs.

    So Z is a block matrix, and a level's nodes can be treated all at once: Z.T @ x sums the rows of each node, and Z
    times those sums takes every row's products with its own node's. The columns of a node stand side by side, as do its
    rows: what a product reads and writes is near, and that is where the speed comes from.
    """
    Z, width = Z[rows], 2 * Z.shape[1]
    Z.indices += np.repeat(node_L % 2 * (width // 2), np.diff(Z.indptr))  # the right halves' after all the others
    if width > Z.nnz / 4:  # now many of the columns are empty: only the others stay
        used = np.zeros(width, bool)
        used[Z.indices] = True
        Z.indices, width = (np.cumsum(used, dtype=Z.indices.dtype) - 1)[Z.indices], used.sum()
    return csr_matrix((Z.data, Z.indices, Z.indptr), shape=(len(rows), width))


def split_level(Z: csr_matrix, node_L: np.ndarray, bounds: np.ndarray, iterations: int,
                rng: np.random.Generator) -> np.ndarray:
    """Split every node of a level in two by balanced spherical 2-means, all nodes at once; the new order of the rows.

    Z (L, columns) as own_columns makes it: node m holds the rows bounds[m]:bounds[m+1], of which node_L is m.
    """
    # First centroids: two random rows of the node. The better half by the difference of the cosines goes left.
    position = np.argsort(node_L + rng.random(len(node_L)))
    sign = np.zeros(len(node_L), Z.dtype)
    sign[position[np.minimum(bounds[:-1] + 1, bounds[1:] - 1)]] = -1
    sign[position[bounds[:-1]]] = 1
    gap_L, to_all_L = Z @ (Z.T @ sign), Z @ (Z.T @ np.ones_like(sign))
    half_L, left, sums = halve(bounds)[1::2][node_L], np.zeros(len(node_L), bool), np.zeros(Z.shape[1], Z.dtype)
    for _ in range(iterations):
        position = np.argsort(node_L * (1 + 2 * np.abs(gap_L).max()) - gap_L)  # by node, then by falling gap
        before, left = left, np.zeros(len(node_L), bool)
        left[position] = np.arange(len(node_L)) < half_L
        changed = np.flatnonzero(left != before)
        # Deep down most nodes are done after a few rounds, and a round costs the same for all.
        if len(changed) <= TOLERANCE * len(node_L):
            break
        sums += Z[changed].T @ np.where(left[changed], 1, -1).astype(Z.dtype)  # of the left halves
        # Products of the rows with the sums of their node's left and right half; a sum's square is that of its rows.
        gap_L, to_left_L = np.zeros(len(node_L)), Z @ sums
        for side, to_side_L, sign in ((left, to_left_L, 1), (~left, to_all_L - to_left_L, -1)):
            square_M = np.bincount(node_L, side * to_side_L)
            gap_L += sign * to_side_L / np.sqrt(np.maximum(square_M, 1e-12))[node_L]
    return position


def balanced_kmeans(Z: csr_matrix, depth: int, iterations: int = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cluster the rows of Z (any CSR matrix) into 2^depth clusters whose sizes differ by at most one.

    Returns (order, bounds): cluster c holds the rows order[bounds[c]:bounds[c+1]]; the clusters are in tree order.
    """
    rng = np.random.default_rng(seed)
    order, bounds = rng.permutation(Z.shape[0]), np.array([0, Z.shape[0]])
    position = order
    for _ in tqdm(range(depth), desc="2-means", unit=" levels", disable=None):
        node_L = np.repeat(np.arange(len(bounds) - 1, dtype=np.int32), np.diff(bounds))
        Z = own_columns(Z, position, node_L)
        position = split_level(Z, node_L, bounds, iterations, rng)
        order, bounds = order[position], halve(bounds)
    return order, bounds


def cosine_to_centroid(Z: csr_matrix, order: np.ndarray, bounds: np.ndarray) -> float:
    """Mean cosine of a row and its cluster's centroid: the sum of the clusters' vector lengths over the rows."""
    member = csr_matrix((np.ones(len(order), Z.dtype), order, bounds), shape=(len(bounds) - 1, len(order)))
    sums = member @ Z
    return float(np.sqrt(np.asarray(sums.multiply(sums).sum(axis=1))).sum() / max(1, (np.diff(Z.indptr) > 0).sum()))


def choose_levels(n_labels: int) -> list[int]:
    """About eight labels to a leaf cluster, eight children to a cluster, at most 1,024 clusters at the top.

    This gives the published settings of CascadeXML for Wiki10-31K, Wiki-500K and Amazon-670K.
    """
    leaf = max(1, round(math.log2(n_labels / 8))) if n_labels > 1 else 0
    depths = [leaf]
    while depths[0] > 3 and (len(depths) < 2 or depths[0] > 10):
        depths.insert(0, depths[0] - 3)
    return [2**depth for depth in depths]


def check_levels(levels: list[int], n_labels: int) -> None:
    """UserError unless the levels are rising powers of two, at most one per label; none is the root alone."""
    rising = all(a < b for a, b in zip(levels, levels[1:], strict=False))
    if not rising or any(n < 1 or n & (n - 1) for n in levels):
        raise UserError(f"--levels {levels}: expected rising powers of two, such as 64,512")
    if levels and levels[-1] > n_labels:
        raise UserError(f"--levels {levels}: {levels[-1]} clusters > {n_labels} labels; lower the last level")


def lay_out(order: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """slot_to_label (S,): every cluster in a block of equal width, -1 where it has fewer labels."""
    sizes = np.diff(bounds)
    slots = np.full((len(sizes), sizes.max()), -1, np.int32)
    slots[np.arange(sizes.max()) < sizes[:, None]] = order
    return slots.ravel()


def expand(parents_BK: Tensor, fan: int) -> Tensor:
    """Children (B, K * fan) of nodes (B, K): the tree is a permutation, so no table is needed."""
    return (parents_BK[..., None] * fan + torch.arange(fan, device=parents_BK.device)).flatten(1)


def match(node_P: Tensor, doc_P: Tensor, parents_BK: Tensor, fan: int) -> Tensor:
    """Targets (B, K, fan): 1 where the candidate is one of the document's positive nodes `node_P` of this level."""
    B, K = parents_BK.shape
    found_PK = parents_BK[doc_P] == (node_P // fan)[:, None]
    # Column K, cut off below, takes the nodes whose parent is not in the shortlist.
    place_P = torch.where(found_PK.any(1), found_PK.to(torch.uint8).argmax(1), K)
    targets = torch.zeros(B, (K + 1) * fan, device=parents_BK.device)
    targets[doc_P, place_P * fan + node_P % fan] = 1.0
    return targets[:, : K * fan].view(B, K, fan)


def run(config: Config) -> None:
    data = data_stage.load(config.run)
    n_labels = len(data.names)
    levels = int_list(config.levels, "--levels") if config.levels else choose_levels(n_labels)
    check_levels(levels, n_labels)
    if not 0 <= config.smoothing < math.inf:
        raise UserError(f"--smoothing {config.smoothing}: expected a number of at least 0")
    need_space(Path(config.run), 16 * n_labels)
    X_NV, _ = tfidf(data.splits["train"], None, data.meta["vocab_size"])
    Z_LV = label_features(X_NV, data.splits["train"].label_matrix(n_labels), config.smoothing, config.features)
    order, bounds = balanced_kmeans(Z_LV, int(math.log2(levels[-1])), config.iterations, config.seed)
    tree = Tree(lay_out(order, bounds), levels)
    save_npz(Path(config.run) / "tree.npz", config,
             {"slot_to_label": tree.slot_to_label, "levels": np.array(levels)}, made_from=("data.npz",))

    shuffled = np.random.default_rng(config.seed).permutation(n_labels)
    width = len(tree.slot_to_label) // levels[-1]
    print(f"{n_labels:,} labels -> clusters per level {levels}, at most {width} labels in a leaf; "
          f"{(tree.slot_to_label < 0).sum():,} of {len(tree.slot_to_label):,} slots are empty")
    print(f"mean cosine of a label to its leaf's centroid: {cosine_to_centroid(Z_LV, order, bounds):.3f}; "
          f"in a random tree: {cosine_to_centroid(Z_LV, shuffled, bounds):.3f}")
    for cluster in np.linspace(0, levels[-1] - 1, config.clusters_shown + 2).astype(int)[1:-1]:
        labels = order[bounds[cluster] : bounds[cluster + 1]]
        print(f"leaf cluster {cluster}: " + ", ".join(data.names[label] for label in labels[:12]))


def load(folder: str | Path) -> Tree:
    """RUN/tree.npz as stage 2 wrote it."""
    arrays, _ = load_npz(Path(folder) / "tree.npz")
    slots, levels = arrays["slot_to_label"], arrays["levels"].tolist()
    labels = np.sort(slots[slots >= 0])
    check_levels(levels, len(labels))  # before a model is made of that size
    if len(slots) % [1, *levels][-1] or (labels != np.arange(len(labels))).any():
        raise UserError(f"{folder}/tree.npz: its slots are no permutation; run: python 02_label_tree.py --run {folder}")
    return Tree(slots, levels)


if __name__ == "__main__":
    main(run, Config, __doc__)
