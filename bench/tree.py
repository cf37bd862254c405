"""What the label tree costs and how good it is, beside the usual recursion and PECOS' C++.

    python bench/tree.py                          33K and 131K labels, 50K features: a few minutes, one thread each
    python bench/tree.py --labels "" --whole 670091    from documents to tree, with the memory

Labels are described by texts with a hierarchy of topics in them. Quality is the mean cosine of a label to the centroid
of its leaf, of eight labels; the gain is what that is above a random tree's. PECOS takes part where libpecos is
installed, as it comes and with its option do_sample: upper levels on a sample of the rows, a tenth of them and more.
All stop after 20 iterations at most.
"""

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy: one thread for everybody

import math  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402
from common import Report, peak_bytes, stages, topic_split, topic_tokens  # noqa: E402
from scipy.sparse import csr_matrix, vstack  # noqa: E402

tree = stages.tree


def topic_matrix(n_labels: int, vocab: int, n_tokens: int, seed: int = 0) -> csr_matrix:
    """Label features (L, V), about n_tokens in a row, at length 1."""
    rng, parts = np.random.default_rng(seed), []
    for path in np.array_split(np.arange(n_labels), max(1, n_labels // 10000)):
        tokens = topic_tokens(path, n_labels, vocab, n_tokens, rng)
        values = rng.lognormal(0, 0.5, tokens.shape).astype(np.float32)
        indptr = np.arange(len(path) + 1) * n_tokens
        parts.append(csr_matrix((values.ravel(), tokens.ravel().astype(np.int32), indptr), shape=(len(path), vocab)))
        parts[-1].sum_duplicates()
    return tree.normalize(vstack(parts, format="csr")[rng.permutation(n_labels)])


def recursion(Z: csr_matrix, depth: int, iterations: int, seed: int) -> np.ndarray:
    """Balanced spherical 2-means node by node, as it is usually written; the order of the rows."""
    rng = np.random.default_rng(seed)

    def split(rows: np.ndarray, depth: int) -> np.ndarray:
        if depth == 0:
            return rows
        X, half = Z[rows], (len(rows) + 1) // 2
        left, right = (np.asarray(X[i].todense()).ravel() for i in rng.choice(len(rows), 2, replace=False))
        before = None
        for _ in range(iterations):
            order = np.argsort(-(X @ (left - right)), kind="stable")
            if before is not None and set(order[:half]) == before:
                break
            before = set(order[:half])
            left, right = (np.asarray(X[part].sum(axis=0)).ravel() for part in (order[:half], order[half:]))
            left, right = left / max(np.linalg.norm(left), 1e-12), right / max(np.linalg.norm(right), 1e-12)
        return np.concatenate([split(rows[order[:half]], depth - 1), split(rows[order[half:]], depth - 1)])

    return split(rng.permutation(Z.shape[0]), depth)


def pecos(Z: csr_matrix, depth: int, **sampling) -> tuple[np.ndarray, np.ndarray] | None:
    """(order, bounds) by PECOS, or None where it is not installed. Its C++ is called directly: the Python around
    it (1.2.8) needs older versions of numpy and scipy. Rates of 1 are what that Python passes on without do_sample.
    """
    try:
        from pecos.core import ScipyCsrF32, clib
        from pecos.xmc.base import HierarchicalKMeans
    except ImportError:
        return None
    params = HierarchicalKMeans.TrainParams(nr_splits=2, threads=1, **sampling)
    params.depth, params.partition_algo = depth, HierarchicalKMeans.SKMEANS
    leaf_L = clib.run_clustering(ScipyCsrF32.init_from(Z), params, np.zeros(Z.shape[0], np.uint32))
    return np.argsort(leaf_L, kind="stable"), np.append(0, np.cumsum(np.bincount(leaf_L, minlength=2**depth)))


def compare(n_labels: int, args, row) -> None:
    Z = topic_matrix(n_labels, 50000, 100)
    depth = round(math.log2(n_labels / 8))
    bounds = np.array([0, n_labels])
    for _ in range(depth):
        bounds = tree.halve(bounds)
    ways = {
        "ours": lambda: tree.balanced_kmeans(Z, depth, args.iterations),
        "recursion": lambda: (recursion(Z, depth, args.iterations, 0), bounds),
        "PECOS": lambda: pecos(Z, depth, min_sample_rate=1.0, warmup_ratio=1.0),
        "PECOS do_sample": lambda: pecos(Z, depth),
    }
    name = f"{n_labels:,} labels, {Z.nnz / 1e6:.1f}M non-zeros"
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    orders = {}
    for _ in range(args.rounds):
        for way, make in ways.items():
            start = time.perf_counter()
            orders[way] = make()
            seconds[way].append(time.perf_counter() - start)
    chance = tree.cosine_to_centroid(Z, np.random.default_rng(1).permutation(n_labels), bounds)
    gain = {way: tree.cosine_to_centroid(Z, *found) - chance for way, found in orders.items() if found}
    for way in gain:
        took = float(np.median(seconds[way]))
        row(f"{name}: {way}, seconds", took, "", ".1f")
        row(f"{name}: {way}, cosine (random {chance:.3f})", gain[way] + chance, "", ".3f")
    for way, target in (("recursion", ""), ("PECOS", "<= 1.0"), ("PECOS do_sample", "")):
        if way in gain:
            ratio = float(np.median(seconds["ours"]) / np.median(seconds[way]))
            row(f"{name}: time, ours / {way}", ratio, target)
            row(f"{name}: gain, ours / {way}", gain["ours"] / gain[way], ">= 0.97" if target else "", ".3f")


def whole(n_labels: int, args, row) -> None:
    """From documents to the tree: TF-IDF, label features, clustering."""
    train = topic_split(int(0.73 * n_labels), n_labels, 50000, 80, 5)  # documents per label as in Amazon-670K
    seconds = {}

    def make() -> None:
        start = time.perf_counter()
        X_NV, _ = tree.tfidf(train, None, 50000)
        Z_LV = tree.label_features(X_NV, train.label_matrix(n_labels))
        del X_NV
        seconds["features"] = time.perf_counter() - start
        tree.balanced_kmeans(Z_LV, int(math.log2(tree.choose_levels(n_labels)[-1])), args.iterations)
        seconds["tree"] = time.perf_counter() - start
        seconds["millions"] = Z_LV.nnz / 1e6

    top = peak_bytes(make)
    name = f"{n_labels:,} labels, {len(train):,} documents, {seconds['millions']:.0f}M non-zeros"
    row(f"{name}: label features, seconds", seconds["features"], "", ".0f")
    row(f"{name}: with the tree, seconds", seconds["tree"], "< 600 at 670K", ".0f")
    row(f"{name}: peak memory of the process, GiB", top / 2**30, "<= 8 at 670K", ".1f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", default="32768,131072", help="sizes to compare at [32768,131072]")
    parser.add_argument("--whole", type=int, default=0, help="labels to go all the way with [none]")
    parser.add_argument("--iterations", type=int, default=20, help="of 2-means, ours and the recursion's [20]")
    parser.add_argument("--rounds", type=int, default=1, help="times that each is run, in turn [1]")
    parser.add_argument("--out", default="bench/results/tree.json")
    args = parser.parse_args()
    row = Report(args).row
    for n_labels in filter(None, args.labels.split(",")):
        compare(int(n_labels), args, row)
    if args.whole:
        whole(args.whole, args, row)


if __name__ == "__main__":
    main()
