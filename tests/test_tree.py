"""Stage 2: against a naive recursion over dense vectors, explicit child lists and closed forms."""

import numpy as np
import pytest
import scipy.sparse as sp
from conftest import stages
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbing.errors import UserError

tree = stages.tree


def random_rows(n, width, seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return tree.normalize(
        sp.csr_matrix(rng.random((n, width)) * (rng.random((n, width)) < 0.5), dtype=dtype)
    )


def naive_two_means(Z, order, draws, iterations):
    """One node, dense: the two parts of the rows in `order`, whose random draws choose the first
    centroids.
    """
    rows = Z[order]
    first, second = np.argsort(draws, kind="stable")[:2] if len(order) > 1 else (0, 0)
    left, right = rows[[first]], rows[[second]]
    before = None
    for _ in range(iterations):
        centroids = [
            part.sum(axis=0) / max(np.linalg.norm(part.sum(axis=0)), 1e-12)
            for part in (left, right)
        ]
        best = np.argsort(-(rows @ (centroids[0] - centroids[1])), kind="stable")
        half = (len(order) + 1) // 2
        if before == set(best[:half]):
            break
        before = set(best[:half])
        left, right = rows[np.sort(best[:half])], rows[np.sort(best[half:])]
    return order[best[:half]], order[best[half:]]


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 60), depth=st.integers(0, 4), seed=st.integers(0, 1000))
def test_all_nodes_at_once_equal_the_naive_recursion(n, depth, seed):
    if 2**depth > n:
        return
    Z = random_rows(n, 12, seed)
    order, bounds = tree.balanced_kmeans(Z, depth, 6, seed)
    rng = np.random.default_rng(seed)
    nodes, dense = [rng.permutation(n)], Z.toarray()
    for _ in range(depth):
        draws = np.split(rng.random(n), np.cumsum([len(node) for node in nodes])[:-1])
        nodes = [
            half
            for node, r in zip(nodes, draws, strict=True)
            for half in naive_two_means(dense, node, r, 6)
        ]
    assert [sorted(order[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)] == [
        sorted(node) for node in nodes
    ]


def test_columns_of_its_own_for_every_node():
    """Rows keep their products within a node and have none across nodes; columns remain fewer than
    entries.
    """
    Z = columns = random_rows(40, 12, 5)
    rng = np.random.default_rng(0)
    rows = order = rng.permutation(40)
    for node in (np.zeros(40, int), np.arange(40) // 20, np.arange(40) // 10, np.arange(40) // 5):
        columns = tree.own_columns(columns, rows, node)
        inside = node[:, None] == node
        np.testing.assert_allclose(
            (columns @ columns.T).toarray(), (Z[order] @ Z[order].T).toarray() * inside
        )
        assert columns.shape[1] <= max(columns.nnz / 4, len(np.unique(columns.indices)))
        rows = np.argsort(node + rng.random(40))  # any order within the nodes
        order = order[rows]


def test_rows_without_features_have_a_place_too():
    order, bounds = tree.balanced_kmeans(sp.csr_matrix((11, 7), dtype=np.float32), 3)
    assert sorted(order) == list(range(11)) and np.diff(bounds).tolist() == [2, 1, 2, 1, 2, 1, 1, 1]


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 200), depth=st.integers(0, 5), seed=st.integers(0, 99))
def test_tree_is_a_permutation_with_sizes_within_one(n, depth, seed):
    if 2**depth > n:
        return
    order, bounds = tree.balanced_kmeans(random_rows(n, 8, seed, np.float32), depth, 4, seed)
    assert sorted(order) == list(range(n))
    sizes = np.diff(bounds)
    assert len(sizes) == 2**depth and sizes.max() - sizes.min() <= 1
    slots = tree.lay_out(order, bounds)
    assert sorted(slots[slots >= 0]) == list(range(n)) and len(slots) == sizes.max() * len(sizes)


def test_levels_are_index_arithmetic_over_explicit_child_lists():
    """Split a list by hand, level by level; node, child and leaf of every slot must follow from
    divisions alone.
    """
    n, depths = 45, [1, 3, 4]
    order, bounds = tree.balanced_kmeans(random_rows(n, 10, 3), depths[-1], 4, 3)
    slots = tree.lay_out(order, bounds)
    by_depth = {0: [list(order)]}
    for depth in range(1, depths[-1] + 1):
        halves = [
            (node[: (len(node) + 1) // 2], node[(len(node) + 1) // 2 :])
            for node in by_depth[depth - 1]
        ]
        by_depth[depth] = [half for pair in halves for half in pair]
    for depth in depths:
        for node, members in enumerate(by_depth[depth]):
            in_node = [
                slots[s]
                for s in range(len(slots))
                if s // (len(slots) // 2**depth) == node and slots[s] >= 0
            ]
            assert in_node == members
    for above, below in zip(depths, depths[1:], strict=False):
        fan = 2 ** (below - above)
        for node, members in enumerate(by_depth[above]):
            children = stages.tree.expand(stages.tree.torch.tensor([[node]]), fan)[0].tolist()
            assert sum((by_depth[below][child] for child in children), []) == members


def test_tfidf_and_pifa_against_dense_formulas():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 15, rng.integers(0, 20)) for _ in range(30)]
    offsets = np.cumsum([0] + [len(d) for d in documents])
    split = stages.data.Split(np.concatenate(documents).astype(np.uint16), offsets, None, None)
    X, idf = tree.tfidf(split, None, 15)
    counts = np.array([np.bincount(d, minlength=15) for d in documents])
    dense = np.log1p(counts) * (1 + np.log(31 / ((counts > 0).sum(0) + 1)))
    dense /= np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(X.toarray(), dense, atol=1e-5)
    again, _ = tree.tfidf(split, idf, 15)
    assert (again != X).nnz == 0

    Y = (rng.random((30, 7)) < 0.2).astype(np.float32)
    Y[:, 6] = 0  # a label that no document has

    def rows_at_one(A):
        return A / np.maximum(np.linalg.norm(A, axis=1, keepdims=True), 1e-12)

    pifa = rows_at_one(Y.T @ dense)
    np.testing.assert_allclose(tree.label_features(X, sp.csr_matrix(Y)).toarray(), pifa, atol=1e-5)
    together = Y.T @ Y * (1 - np.eye(7))
    mixed = rows_at_one(
        pifa + 0.5 * (together / np.maximum(together.sum(1, keepdims=True), 1)) @ pifa
    )
    np.testing.assert_allclose(
        tree.label_features(X, sp.csr_matrix(Y), 0.5).toarray(), mixed, atol=1e-5
    )


def test_clusters_that_exist_are_found():
    """Sixteen groups of rows around sixteen directions come back as the sixteen clusters."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(16), 8)
    rows = np.eye(16)[rng.permutation(group)] + 0.02 * rng.random((128, 16))
    Z = tree.normalize(sp.csr_matrix(rows))
    order, bounds = tree.balanced_kmeans(Z, 4, 10, 0)
    shuffled = rng.permutation(128)
    assert (
        tree.cosine_to_centroid(Z, order, bounds)
        > 0.8
        > 0.5
        > tree.cosine_to_centroid(Z, shuffled, bounds)
    )


@pytest.mark.parametrize(
    ("n", "levels"),
    [
        (1, [1]),
        (2, [2]),
        (100, [2, 16]),
        (3956, [64, 512]),
        (30938, [512, 4096]),
        (670091, [1024, 8192, 65536]),
    ],
)
def test_levels_from_the_number_of_labels(n, levels):
    assert tree.choose_levels(n) == levels
    tree.check_levels(levels, n)


@pytest.mark.parametrize(
    ("levels", "message"),
    [([8, 8], "rising"), ([6, 12], "powers of two"), ([8, 64], "64 clusters > 50")],
)
def test_levels_that_cannot_be_are_refused(levels, message):
    with pytest.raises(UserError, match=message):
        tree.check_levels(levels, 50)


def test_cosine_to_centroid_against_a_loop():
    Z = random_rows(20, 16, 1)
    order, bounds = np.random.default_rng(0).permutation(20), np.array([0, 5, 10, 15, 20])
    cosines = []
    for a, b in zip(bounds, bounds[1:], strict=False):
        rows = Z[order[a:b]].toarray()
        centroid = rows.sum(0) / np.linalg.norm(rows.sum(0))
        cosines += (rows @ centroid).tolist()
    assert tree.cosine_to_centroid(Z, order, bounds) == pytest.approx(np.mean(cosines))


@pytest.mark.parametrize(
    ("slots", "levels", "said"),
    [
        ([2, 0, 1, 4, 3, 5], [3], ""),
        ([2, 0, 1, 4, 3, 5, -1, 6, 7, -1, 8, 9], [2, 6], ""),
        ([0, 1, 2], [], ""),
        ([2, 0, 1, 4, 3, 5], [2, 3], "multiple"),
        ([2, 0, 1, 4, 3, 5], [4], "equally many"),
        ([2, 0, 1, 4, 3, 3], [3], "permutation"),
        ([2, 0, 1, 4, 3, 5], [12], "12 clusters > 6 labels"),
    ],
)
def test_any_tree_will_do_whose_levels_divide_each_other(slots, levels, said):
    found = tree.what_is_wrong(tree.Tree(np.array(slots, np.int32), levels))
    assert said in found and bool(said) == bool(found)
