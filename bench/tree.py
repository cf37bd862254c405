"""What the label tree costs and how good it is, beside the usual recursion and PECOS' C++.

    python bench/tree.py                       33K and 131K labels, 50K features: a few minutes
    python bench/tree.py --labels "" --whole 670091    from documents to tree, with the memory

One thread each. Labels are described by texts with a hierarchy of topics in them. Quality is the
mean cosine of a label to the centroid of its leaf, of eight labels. The gain is how much better
this is than in a random tree. PECOS takes part where libpecos is installed, as it comes and with
its option do_sample (upper levels on a sample of the rows, a tenth of them and more). All stop
after 20 iterations at most.
"""

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy: one thread for everybody

import math  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import numpy as np  # noqa: E402
from common import Report, peak_bytes, stages, topic_split, topic_tokens  # noqa: E402
from scipy.sparse import csr_matrix, vstack  # noqa: E402

tree = stages.tree


def topic_matrix(n_labels: int, vocab: int, n_tokens: int, seed: int = 0) -> csr_matrix:
    """Label features (L, V), about n_tokens in a row, at length 1."""
    rng = np.random.default_rng(seed)
    parts = []
    for path in np.array_split(np.arange(n_labels), max(1, n_labels // 10000)):
        tokens = topic_tokens(path, n_labels, vocab, n_tokens, rng)
        values = rng.lognormal(0, 0.5, tokens.shape).astype(np.float32)
        columns = tokens.ravel().astype(np.int32)
        indptr = np.arange(len(path) + 1) * n_tokens
        part = csr_matrix((values.ravel(), columns, indptr), shape=(len(path), vocab))
        part.sum_duplicates()
        parts.append(part)
    Z_LV = vstack(parts, format="csr")[rng.permutation(n_labels)]
    return tree.normalize(Z_LV)


def direction(X: csr_matrix) -> np.ndarray:
    """(V,) the sum of the rows, at length 1."""
    total = np.asarray(X.sum(axis=0)).ravel()
    return total / max(np.linalg.norm(total), 1e-12)


def two_means(X: csr_matrix, iterations: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The rows of two equally big groups: balanced spherical 2-means as it is usually written."""
    half = (X.shape[0] + 1) // 2
    first, second = rng.choice(X.shape[0], 2, replace=False)
    left = np.asarray(X[first].todense()).ravel()
    right = np.asarray(X[second].todense()).ravel()
    before = None
    for _ in range(iterations):
        # The rows that are most on the left come first.
        order = np.argsort(-(X @ (left - right)), kind="stable")
        on_the_left = set(order[:half])
        if on_the_left == before:
            break
        before = on_the_left
        left = direction(X[order[:half]])
        right = direction(X[order[half:]])
    return order[:half], order[half:]


def recursion(Z: csr_matrix, depth: int, iterations: int, seed: int) -> np.ndarray:
    """The order of the rows in a tree that is split node by node."""
    rng = np.random.default_rng(seed)

    def split(rows: np.ndarray, depth: int) -> np.ndarray:
        if depth == 0:
            return rows
        left, right = two_means(Z[rows], iterations, rng)
        return np.concatenate([split(rows[left], depth - 1), split(rows[right], depth - 1)])

    return split(rng.permutation(Z.shape[0]), depth)


def pecos(Z: csr_matrix, depth: int, **sampling) -> tuple[np.ndarray, np.ndarray] | None:
    """(order, bounds) by PECOS, or None where it is not installed.

    Its C++ is called directly, because the Python around it (1.2.8) needs older versions of numpy
    and scipy. Rates of 1 are what that Python passes on without do_sample.
    """
    try:
        from pecos.core import ScipyCsrF32, clib
        from pecos.xmc.base import HierarchicalKMeans
    except ImportError:
        return None
    params = HierarchicalKMeans.TrainParams(nr_splits=2, threads=1, **sampling)
    params.depth = depth
    params.partition_algo = HierarchicalKMeans.SKMEANS
    seeds = np.zeros(Z.shape[0], np.uint32)
    leaf_L = clib.run_clustering(ScipyCsrF32.init_from(Z), params, seeds)
    order = np.argsort(leaf_L, kind="stable")
    counts = np.bincount(leaf_L, minlength=2**depth)
    return order, np.append(0, np.cumsum(counts))


def timed_in_turn(ways: dict[str, Callable], rounds: int) -> tuple[dict, dict[str, float]]:
    """({way: what it made}, {way: median seconds})."""
    made = {}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, make in ways.items():
            start = time.perf_counter()
            made[way] = make()
            seconds[way].append(time.perf_counter() - start)
    return made, {way: float(np.median(times)) for way, times in seconds.items()}


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
    made, seconds = timed_in_turn(ways, args.rounds)

    name = f"{n_labels:,} labels, {Z.nnz / 1e6:.1f}M non-zeros"
    shuffled = np.random.default_rng(1).permutation(n_labels)
    chance = tree.cosine_to_centroid(Z, shuffled, bounds)
    gain = {}
    for way, found in made.items():
        if found is None:  # PECOS, not installed
            continue
        cosine = tree.cosine_to_centroid(Z, *found)
        gain[way] = cosine - chance
        row(f"{name}: {way}, seconds", seconds[way], "", ".1f")
        row(f"{name}: {way}, cosine (random {chance:.3f})", cosine, "", ".3f")
    targets = {"PECOS": ("<= 1.0", ">= 0.97")}
    for way in gain:
        if way == "ours":
            continue
        time_target, gain_target = targets.get(way, ("", ""))
        row(f"{name}: time, ours / {way}", seconds["ours"] / seconds[way], time_target)
        row(f"{name}: gain, ours / {way}", gain["ours"] / gain[way], gain_target, ".3f")


def whole(n_labels: int, args, row) -> None:
    """From documents to the tree: TF-IDF, label features, clustering."""
    n_documents = int(0.73 * n_labels)  # documents per label as in Amazon-670K
    train = topic_split(n_documents, n_labels, 50000, 80, 5)
    depth = int(math.log2(tree.choose_levels(n_labels)[-1]))
    measured = {}

    def make() -> None:
        start = time.perf_counter()
        X_NV, _ = tree.tfidf(train, None, 50000)
        Z_LV = tree.label_features(X_NV, train.label_matrix(n_labels))
        del X_NV
        measured["features"] = time.perf_counter() - start
        tree.balanced_kmeans(Z_LV, depth, args.iterations)
        measured["tree"] = time.perf_counter() - start
        measured["millions"] = Z_LV.nnz / 1e6

    peak = peak_bytes(make)
    name = f"{n_labels:,} labels, {len(train):,} documents, {measured['millions']:.0f}M non-zeros"
    row(f"{name}: label features, seconds", measured["features"], "", ".0f")
    row(f"{name}: with the tree, seconds", measured["tree"], "< 600 at 670K", ".0f")
    row(f"{name}: peak memory of the process, GiB", peak / 2**30, "<= 8 at 670K", ".1f")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    labels_help = "sizes to compare at [32768,131072]"
    iterations_help = "of 2-means, ours and the recursion's [20]"
    parser.add_argument("--labels", default="32768,131072", help=labels_help)
    parser.add_argument("--whole", type=int, default=0, help="labels to go all the way with [none]")
    parser.add_argument("--iterations", type=int, default=20, help=iterations_help)
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
