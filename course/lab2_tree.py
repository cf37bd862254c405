# %% [markdown]
"""Lab 2: the label tree.

Goal      You can build the tree that the cascade goes down, and say what a bad tree costs.
Reading   course/lecture.md, section 5; functions in 02_label_tree.py: label_features, the comment
          "3. Balanced spherical 2-means" with the plain form, lay_out (try it yourself first: these
          are the solutions)
Commands  python 01_data.py --run runs/course --limit 12000 --vocab 8000      if lab 1 has not
          python 02_label_tree.py --run runs/course
          python 04_train.py --run runs/course --max-len 32 --epochs 3 --topk 32,64
          python -m course.check 2                                            after every step
          python -m course.lab2_tree                                          at the end
Minutes   computing: 3, of which the three commands take 1.5 (two cores); of yours: 75
Target    4 of 4 steps pass, and you can explain the last cell's table

Fill in every function that raises NotImplementedError. Shape letters: N documents, L labels,
V words, S slots, n rows of a node (docs/glossary.md has all).
"""

# %%

import sys
import time

# Start this lab from the folder of the stages, or, as some editors do, from course/.
sys.path.extend([".", ".."])

import numpy as np
from scipy.sparse import csr_matrix

from course import check, runs
from plumbing.stages import load_stages

stages = load_stages()
LAB = 2
RUN = "runs/course"  # the folder that the commands have made
TOPK = "32,64"  # clusters that a level keeps
MAX_LEN = 32
EPOCHS = 3
FREQUENT = 1000  # labels of the timing

# %% Step 1: labels as vectors


def label_features(X_NV: csr_matrix, Y_NL: csr_matrix) -> csr_matrix:
    """(L, V): a vector for each label; sparse or dense, as you like.

    X_NV are the documents' TF-IDF vectors, Y_NL is 1 where a document has a label. A label's vector
    is the sum of the vectors of its documents, brought to length 1 (PIFA). Every label here has a
    document. Of scipy's sparse matrices you need A @ B, A.T, and A.toarray() if you go on with a
    dense array: the lab has no more than 1,000 labels here. stages.tree.normalize(A) brings the
    rows of a sparse matrix to length 1.
    """
    raise NotImplementedError("step 1: a vector for each label")


# %% Step 2: one node becomes two


def two_means(Z_nV: np.ndarray, draws_n: np.ndarray, iterations: int) -> tuple:
    """(left, right): the row numbers of the two halves, each in falling order of the gap.

    Row numbers are 0 to n - 1, as they stand in Z_nV, whatever labels these are. Z_nV (n, V) are
    the rows of the node, of length 1. draws_n (n,) are random numbers, one for each row.
    1. The first centroids a and b are the rows with the smallest and the second smallest draw.
    2. gap (n,): each row's product with a, minus its product with b.
    3. Sort the rows by falling gap. The first (n + 1) // 2 are the left half, the others the right.
    4. This was a round. If no row has changed sides since the round before, or if this was round
       number `iterations`, stop: these are the halves.
    5. The new centroids: the sum of each half, brought to length 1. Go on with 2.
    """
    raise NotImplementedError("step 2: two halves of equal size")


# %% Step 3: the recursion. The first function is given, the second one is a blank.


def random_start(n_labels: int, depth: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows (L,), draws (depth, L)): the labels in random order, and random numbers per level.

    Stage 2 draws the same numbers in the same order, so that your leaves can equal its leaves.
    """
    rng = np.random.default_rng(seed)
    rows_L = rng.permutation(n_labels)
    draws_dL = np.stack([rng.random(n_labels) for _ in range(depth)])
    return rows_L, draws_dL


def leaves(Z_LV: np.ndarray, depth: int, iterations: int, seed: int) -> list[np.ndarray]:
    """2^depth arrays of label numbers, from left to right.

    Start with random_start(L, depth, seed): all labels, in this order, are the root. To split a
    node, call two_means with its rows of Z_LV and its part of this level's draws. A node takes the
    places start to end of the order. Its left half takes the first (n + 1) // 2 of these places,
    its right half the others, in the order in which two_means gives them. Row t of the draws is
    for the splits of level t, and the place where a label stands before the split says which draw
    is its own. Labels move, draws do not. With 5 labels, the root has the places 0 to 4 and the
    draws draws[0, 0:5]. Then its left half has the places 0 to 2 and the draws draws[1, 0:3], its
    right half the places 3 and 4 and the draws draws[1, 3:5].

    A function within this function that calls itself is the shortest way:
        split(rows, draws) -> list of arrays      rows (n,), draws (levels left, n)
    rows are label numbers; two_means gives row numbers of the node. It ends when no level is left.
    """
    raise NotImplementedError("step 3: split down to the leaves")


# %% Step 4: the permutation


def lay_out(leaves_C: list[np.ndarray]) -> np.ndarray:
    """slot_to_label (S,) int: the labels leaf by leaf, in blocks of equal width.

    An array of one dimension. The width is the size of the largest leaf. A smaller leaf has -1 in
    its last places. Of the leaves [6 2] and [5] it makes 6 2 5 -1.
    """
    raise NotImplementedError("step 4: a slot for each label")


# %% [markdown]
"""Questions to talk about

1. Why halves of equal size? What would the cascade lose with clusters of very different sizes?
2. Two labels have the very same documents. Where are they in the tree?
3. In the last table, the shuffled tree has the same sizes and the same model. Where do its points
   go: are the right clusters harder to find, or does the last level score the wrong labels?
"""

# %% How fast is the plain form, and how good are its clusters?

if __name__ == "__main__":
    check.need_all_steps(LAB, globals())
    runs.need(RUN, "data.npz", "tree.npz", "model.pt")
    data = stages.data.load(RUN)
    train = data.splits["train"]
    X_NV, _ = stages.tree.tfidf(train, None, data.meta["vocab_size"])
    Y_NL = train.label_matrix(len(data.names))
    count_L = np.asarray(Y_NL.sum(axis=0)).ravel()
    # Frequent labels alone, so that the plain form takes seconds, and none is without a document.
    frequent = np.argsort(-count_L, kind="stable")[:FREQUENT]
    Z_LV = csr_matrix(label_features(X_NV, csr_matrix(Y_NL[:, frequent])))
    depth = int(np.log2(len(frequent) / 8))  # about eight labels to a leaf, as stage 2 has it
    start = time.perf_counter()
    mine = leaves(Z_LV.toarray(), depth, 20, seed=0)
    plain_seconds = time.perf_counter() - start
    start = time.perf_counter()
    order, bounds = stages.tree.balanced_kmeans(Z_LV, depth, 20, seed=0)
    fast_seconds = time.perf_counter() - start
    my_order = np.concatenate(mine)
    my_bounds = np.cumsum([0] + [len(leaf) for leaf in mine])
    # What would clusters of the same sizes be worth if nobody had looked at the labels?
    shuffled = np.random.default_rng(0).permutation(len(frequent))
    print(f"{len(frequent):,} labels, {len(mine)} leaves: mean cosine to the centroid, seconds")
    print(
        f"    plain     {stages.tree.cosine_to_centroid(Z_LV, my_order, my_bounds):.3f}"
        f"   {plain_seconds:6.2f}"
    )
    print(
        f"    stage 2   {stages.tree.cosine_to_centroid(Z_LV, order, bounds):.3f}"
        f"   {fast_seconds:6.2f}"
    )
    print(f"    shuffled  {stages.tree.cosine_to_centroid(Z_LV, shuffled, bounds):.3f}")

# %% A shuffled tree, and what it does to the recall of the shortlist

if __name__ == "__main__":
    tree = stages.tree.load(RUN)
    shuffled_run = runs.new_run(RUN, "shuffled")
    # The labels change places and the levels stay, so only the meaning of a cluster is lost.
    slots = np.random.default_rng(0).permutation(tree.slot_to_label)
    runs.save_tree(shuffled_run, slots, tree.levels)
    trained = stages.train.Config(run=shuffled_run, max_len=MAX_LEN, epochs=EPOCHS, topk=TOPK)
    stages.train.run(trained)
    print(f"{'validation, %':16} {'P@1':>6} {'P@5':>6}   recall of the shortlist, level by level")
    for name, run in (("stage 2's tree", RUN), ("shuffled tree", shuffled_run)):
        best = runs.reached(run)
        shown = "  ".join(f"{percent:5.1f}" for percent in best.recall)
        print(f"{name:16} {best.precision[0]:6.1f} {best.precision[2]:6.1f}   {shown}")
