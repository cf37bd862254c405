# %% [markdown]
"""Lab 1: the long tail and the metrics.

Goal      You can compute P@k, nDCG@k and PSP@k, say what each of them rewards, and beat a model
          that has learnt nothing with one that has learnt nearly nothing: nearest neighbours.
Reading   course/lecture.md, sections 1 to 4; functions in 05_eval.py: precision, ndcg,
          inverse_propensity, propensity_scored_precision, nearest_neighbours (try it yourself
          first: these are the solutions)
Commands  python 01_data.py --run runs/course --limit 12000 --vocab 8000      once, for labs 1 to 4
          python -m course.check 1                                            after every step
          python -m course.lab1_metrics                                       at the end
Minutes   computing: 1 (two cores); of yours: 75
Target    6 of 6 steps pass, and the last cell prints
              most frequent labels        5.6    4.3     5.4    1.9   the same as stage 5's
              20 neighbours              38.5   19.9    35.8   18.1   the same as stage 5's
          (30% of the labels are unseen then: 12,000 of the 37,887 documents have none of them)

Fill in every function that raises NotImplementedError. Shape letters: N documents, L labels,
k predictions of a document, V words (docs/glossary.md has all).
"""

# %%

import sys

# Start this lab from the folder of the stages, or, as some editors do, from course/.
sys.path.extend([".", ".."])

import numpy as np
from scipy.sparse import csr_matrix

from course import check, runs
from plumbing.stages import load_stages

stages = load_stages()
LAB = 1
RUN = "runs/course"  # the folder that the first command has made

# %% Step 1: the long tail


def tail_and_head(count_L: np.ndarray) -> np.ndarray:
    """(4,): how many labels are in the head, in the torso, in the tail, and unseen.

    count_L (L,) is the number of training documents of each label. Head: 50 or more. Torso: 5 to
    49. Tail: 1 to 4. Unseen: 0.
    """
    raise NotImplementedError("step 1: four numbers of labels")


# %% Step 2: P@k


def precision(hit_Nk: np.ndarray) -> np.ndarray:
    """(k,): P@1, ..., P@k, averaged over the documents, between 0 and 1.

    hit_Nk (N, k) bool: is the prediction at rank 1, 2, ..., k correct?
    P@j = correct ones among the first j / j. With hits 1 0 1: P@1 = 1, P@2 = 1/2, P@3 = 2/3.
    """
    raise NotImplementedError("step 2: P@j for all j")


# %% Step 3: nDCG@k


def ndcg(hit_Nk: np.ndarray, n_N: np.ndarray) -> np.ndarray:
    """(k,): nDCG@1, ..., nDCG@k, averaged over the documents, between 0 and 1.

    hit_Nk (N, k) bool as before; n_N (N,) int: how many labels each document has, at least 1.
    A correct label at rank r is worth 1 / log2(r + 1). Sum over the ranks up to j; divide by the
    sum of the best possible ranking, which has min(j, n) correct labels at the first ranks.
    """
    raise NotImplementedError("step 3: nDCG@j for all j")


# %% Step 4: propensities


def inverse_propensity(
    count_L: np.ndarray, n_documents: int, a: float = 0.55, b: float = 1.5
) -> np.ndarray:
    """(L,): the weight of each label in PSP@k; rare labels have large weights.

    count_L (L,) training documents of each label, n_documents of them in all.
    weight = 1 + c (count + b)^(-a), where c = (ln(n_documents) - 1) (b + 1)^a.
    """
    raise NotImplementedError("step 4: a weight for each label")


# %% Step 5: PSP@k


def propensity_scored_precision(
    hit_Nk: np.ndarray, labels_Nk: np.ndarray, best_Nk: np.ndarray, weight_L: np.ndarray
) -> np.ndarray:
    """(k,): PSP@1, ..., PSP@k.

    hit_Nk (N, k) bool as before; labels_Nk (N, k) int, which labels were predicted; weight_L (L,)
    from step 4; best_Nk (N, k): the weights of a document's own labels, largest first, 0 where it
    has fewer than k (stage 5's best_weights makes it).
    PSP@j = sum over all documents of the weights of correct ones among the first j
          / sum over all documents of best_Nk up to j
    Both sums run over all documents before you divide.
    """
    raise NotImplementedError("step 5: PSP@j for all j")


# %% Step 6: the votes of the nearest neighbours


def neighbour_votes(
    X: csr_matrix, X_transposed: csr_matrix, Y_train: csr_matrix, neighbours: int
) -> csr_matrix:
    """(N, L): the score of each label for each document; sparse or dense, as you like.

    X (N, V) are documents as vectors of length 1; X_transposed (V, training documents) are the
    training documents, turned around; Y_train (training documents, L) is 1 where a training
    document has a label.
    1. The cosine of two vectors of length 1 is their product: one matrix product for all.
    2. Of each document, keep its largest `neighbours` cosines.
    3. The score of a label is the sum of the cosines of those neighbours that have it.
    """
    raise NotImplementedError("step 6: the votes for each label")


# %% [markdown]
"""Questions to talk about

1. A document has one label. What is its largest possible P@5? What its largest nDCG@5?
2. You may add one correct prediction to a document's list: a label of the head, or of the tail.
   Which one does P@k prefer, and which one PSP@k?
3. Why must the propensities come from the training split, and not from the test split?
"""

# %% How long is the tail?

if __name__ == "__main__":
    check.need_all_steps(LAB, globals())
    runs.need(RUN, "data.npz")
    data = stages.data.load(RUN)
    train = data.splits["train"]
    n_labels = len(data.names)
    # The test documents that have labels, and what is known of them beforehand (docs/glossary.md).
    everything = data.splits["test"]
    has_labels = np.flatnonzero(np.diff(everything.label_offsets))
    test = everything.documents(has_labels)
    nothing_known = csr_matrix((len(everything), n_labels))
    known = data.known.get("test", nothing_known)[has_labels]
    count_L = np.bincount(train.labels, minlength=n_labels)
    classes = np.asarray(tail_and_head(count_L))
    for name, number in zip(("head", "torso", "tail", "unseen"), classes, strict=True):
        print(f"{name:7} {int(number):6,} labels, {100 * number / n_labels:4.1f}%")

# %% Two baselines, measured by your functions and by stage 5's


def my_table(labels_Nk: np.ndarray) -> dict[str, np.ndarray]:
    """P@k, nDCG@k and PSP@k, in percent, of the test documents."""
    hit_Nk = stages.train.hits(labels_Nk, test)
    n_N = np.diff(test.label_offsets)
    weight_L = inverse_propensity(count_L, len(train))
    best_Nk = stages.eval.best_weights(test, weight_L, labels_Nk.shape[1])
    return {
        "P": 100 * precision(hit_Nk),
        "nDCG": 100 * ndcg(hit_Nk, n_N),
        "PSP": 100 * propensity_scored_precision(hit_Nk, labels_Nk, best_Nk, weight_L),
    }


def labels_by_votes(k: int, chunk: int = 500) -> np.ndarray:
    """(N, k): the labels with the most votes, without those that are known beforehand."""
    vocab = data.meta["vocab_size"]
    X_train, idf_V = stages.tree.tfidf(train, None, vocab)
    X, _ = stages.tree.tfidf(test, idf_V, vocab)
    X_transposed = X_train.T.tocsr()
    Y_train = train.label_matrix(n_labels)
    best = []
    # Votes are a number for every label: for all documents at once they would be too many.
    for start in range(0, len(test), chunk):
        votes = neighbour_votes(X[start : start + chunk], X_transposed, Y_train, 20)
        scores = votes.toarray() if hasattr(votes, "toarray") else np.array(votes)
        is_known = known[start : start + chunk].toarray() > 0
        # A label that the document is known to have would be no prediction: it goes last.
        scores[is_known] = -1
        best.append(np.argsort(-scores, axis=1, kind="stable")[:, :k])
    return np.concatenate(best)


if __name__ == "__main__":
    weight_L = stages.eval.inverse_propensity(count_L, len(train))
    frequent = stages.eval.most_frequent(train, len(test), n_labels, 5, known)
    print(f"{'%':24} {'P@1':>6} {'P@5':>6} {'nDCG@5':>7} {'PSP@5':>6}")
    for name, labels_Nk in (
        ("most frequent labels", frequent),
        ("20 neighbours", labels_by_votes(5)),
    ):
        mine = my_table(labels_Nk)
        theirs = stages.eval.metrics(labels_Nk, test, weight_L)
        # Sums in another order may differ in the last bits.
        agrees = all(np.allclose(mine[key], theirs[key], rtol=0, atol=1e-9) for key in mine)
        print(
            f"{name:24} {mine['P'][0]:6.1f} {mine['P'][4]:6.1f} {mine['nDCG'][4]:7.1f} "
            f"{mine['PSP'][4]:6.1f}   {'the same as' if agrees else 'NOT'} stage 5's"
        )
