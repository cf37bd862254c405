"""Measure a run more closely than stage 5 does: rare labels, F1, coverage and calibration.

    python -m tools.report --run runs/demo --at 1,5,20 --propensity 0.6,2.6 --isotonic

Reads    RUN/data.npz
         RUN/predictions.npz        of the test split
         RUN/predictions.val.npz    of the validation split, where score thresholds and isotonic
                                    regression are chosen. Without this file they are left out, and
                                    a line says so.
Writes   nothing

P@j is the share of correct labels among the first j predicted, R@j the share of a document's labels
that are among the first j. In metrics with PS (propensity-scored) rare labels count more: a label's
propensity is the probability that it was noted where it is correct, and its weight is one over
that. 05_eval.py has the formulas. How many correct labels the shortlists keep needs the model:
05_eval.py prints it.

Shapes   N documents, L labels, k labels predicted, P (document, label) pairs, G correct
         predictions, Q classes of labels by frequency
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from plumbing.cli import flag, int_list, main, pair
from plumbing.errors import UserError
from plumbing.stages import load_stages
from plumbing.store import load_npz

stages = load_stages()

Z2 = 1.959964**2  # of a normal variable, the middle 95%, squared
CLASSES = ("head, 50 or more", "torso, 5 to 49", "tail, 1 to 4", "unseen, 0")


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")
    at: str = flag("1,3,5,10,100", "numbers of labels to measure at")
    isotonic: bool = flag(False, "also the calibration after isotonic regression on validation")
    propensity: str = flag("0.55,1.5", "constants A,B of the propensity model")


# 1. Reading predictions.


def load(
    path: Path, name: str, data: stages.data.Data
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, k) labels, scores, and which are correct. Labels and scores are -1 where there is none.

    UserError unless they are predictions for the split `name`.
    """
    # 1. What somebody else wrote may have any shape.
    arrays, meta = load_npz(path)
    of = meta["config"].get("split")
    labels = arrays.get("labels", np.empty(0))
    scores = arrays.get("scores", np.empty(0))
    wrong = what_is_wrong(labels, scores, of, name, data)
    if wrong:
        raise UserError(f"{path} holds {wrong}; write it again with what wrote it")
    # 2. A place without a label gets a score below all others: no threshold ever lets it in.
    scores = np.where(labels < 0, -1, scores)
    correct = stages.train.hits(labels, data.splits[name])
    return labels, scores, correct


def what_is_wrong(
    labels: np.ndarray, scores: np.ndarray, of: str, name: str, data: stages.data.Data
) -> str:
    """Why these are no predictions of the split `name`; nothing if they are."""
    n_documents = len(data.splits[name])
    n_labels = len(data.names)
    # 1. Two tables of the same shape, with a row for each document of this split? Integer labels?
    is_table = labels.ndim == 2 and labels.shape == scores.shape and labels.size > 0
    if of != name or not is_table or len(labels) != n_documents or labels.dtype.kind != "i":
        return (
            f"{of}: labels {labels.shape} {labels.dtype}, scores {scores.shape}; "
            f"expected {name}: {n_documents} rows"
        )
    # 2. Labels that there are, and some predictions at all? Within a document every label comes
    #    once: sorted, no two neighbours are equal.
    ascending = np.sort(labels, axis=1)
    is_repeated = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
    has_first_label = labels[:, 0].max() > -1
    if (
        ascending.min() < -1
        or ascending.max() >= n_labels
        or not has_first_label
        or is_repeated.any()
    ):
        return (
            f"labels from {ascending.min()} to {ascending.max()}; "
            f"expected 0 to {n_labels - 1}, each once for a document, or -1"
        )
    # 3. Probabilities, the best first?
    are_probabilities = scores.min() >= 0 and scores.max() <= 1
    is_rising = scores[:, 1:] > scores[:, :-1]
    if not are_probabilities or is_rising.any():
        return (
            f"scores from {scores.min()} to {scores.max()}; "
            "expected probabilities, the best first, 0 for label -1"
        )
    return ""


# 2. Metrics by the frequency of labels.


def frequency_class(count_L: np.ndarray) -> np.ndarray:
    """(L,) places in CLASSES, from the numbers of training documents."""
    # How many of the three limits a count has reached: 3 at the head, 0 for unseen labels.
    n_limits_L = np.searchsorted([1, 5, 50], count_L, side="right")
    return 3 - n_limits_L


def summed_by_class(
    doc_G: np.ndarray,
    place_G: np.ndarray,
    label_G: np.ndarray,
    gain_G: np.ndarray | None = None,
    norm_kk: np.ndarray | int = 1,
    *,
    n_N: np.ndarray,
    class_L: np.ndarray,
    k: int,
    n_classes: int,
) -> np.ndarray:
    """(Q, k): the gains of predictions at rank <= j, summed per class, in percent.

    A gain is 1 where gain_G is None. Before the sum over documents it is divided by
    norm_kk[n - 1, j - 1], where n is the number of labels of its document. In plain form:

        for each prediction: document, place, label, gain
            n = min(labels of the document, k)
            for rank j = place + 1, ..., k
                result[class of the label, j - 1] += 100 * gain / norm_kk[n - 1, j - 1]
    """
    # 1. Add up the gains by class, by the number of labels of the document (more than k count as
    #    k), and by rank. The three together are the number of a cell.
    n_labels_G = np.minimum(n_N[doc_G], k)
    row_G = class_L[label_G] * k + n_labels_G - 1
    cell_G = row_G * k + place_G
    gain_of_cell = np.bincount(cell_G, gain_G, n_classes * k * k)
    gain_Qkk = gain_of_cell.reshape(n_classes, k, k)
    # 2. A prediction is among the first j for its own rank j and for all behind it.
    up_to_rank = gain_Qkk.cumsum(axis=2)
    # 3. Divide, and add up the documents with different numbers of labels.
    return 100 * (up_to_rank / norm_kk).sum(axis=1)


@np.errstate(invalid="ignore")  # 0 / 0 is nan, printed as a dash
def by_frequency(
    labels_Nk: np.ndarray,
    correct_Nk: np.ndarray,
    split: stages.data.Split,
    weight_L: np.ndarray,
    class_L: np.ndarray,
    n_classes: int = len(CLASSES),
) -> dict[str, np.ndarray]:
    """{"P", "nDCG", "PSP", "PSnDCG", "R", "RP"}: (Q, k), at j in column j - 1, in percent.

    All are over documents with labels. R is of the labels of a class, over the documents that have
    some. The others say what the correct predictions of a class contribute: the classes add up to
    the metric of all labels. Where P divides by j, RP divides by the most labels that could be
    correct, min(j, labels of the document). DCG is a sum in which a correct label at rank r counts
    1 / log2(r + 1). PSnDCG takes each document's DCG with weights, over its best possible DCG
    without. This is summed over the documents, and divided by the same sum of the best ranking, as
    in the XMC repository's scripts (pyxclib).
    """
    # 1. What the metrics divide by. For a document with n labels, at rank j: the smaller of the
    #    two, and the best possible DCG, of that many correct labels at the first ranks.
    n_N = np.diff(split.label_offsets)
    n_documents = (n_N > 0).sum()
    k = labels_Nk.shape[1]
    rank_k = np.arange(1, k + 1)
    discount_k = 1 / np.log2(rank_k + 1)
    smaller_kk = np.minimum(rank_k[:, None], rank_k)
    ideal_kk = discount_k.cumsum()[smaller_kk - 1]
    # The same in all sums.
    total = partial(summed_by_class, n_N=n_N, class_L=class_L, k=k, n_classes=n_classes)

    # 2. The correct predictions: document, place in the ranking, label.
    doc_G, place_G = np.nonzero(correct_Nk)
    label_G = labels_Nk[doc_G, place_G]
    weight_G = weight_L[label_G]
    found = (doc_G, place_G, label_G)

    # 3. The best possible ranking: each document's labels by falling weight. PSP and PSnDCG are
    #    divided by what it would get, all classes together.
    doc_P, place_P, _ = stages.data.flatten(split.label_offsets[:-1], n_N)
    order_P = np.lexsort((-weight_L[split.labels], doc_P))
    is_first_P = place_P < k
    best_doc = doc_P[is_first_P]
    best_place = place_P[is_first_P]
    best_label = split.labels[order_P][is_first_P]
    best_weight = weight_L[best_label]
    best_gain = best_weight * discount_k[best_place]
    best_psp_k = total(best_doc, best_place, best_label, best_weight).sum(axis=0)
    best_psdcg_k = total(best_doc, best_place, best_label, best_gain, ideal_kk).sum(axis=0)

    # 4. How many labels of each class does a document have? One that is found adds 1 over this
    #    number to the document's recall of the class.
    class_LQ = np.eye(n_classes)[class_L]
    n_NQ = split.label_matrix(len(class_L)) @ class_LQ
    share_G = 1 / n_NQ[doc_G, class_L[label_G]]
    has_class_Q = (n_NQ > 0).sum(axis=0)

    # 5. The metrics.
    return {
        "P": total(*found, None, rank_k) / n_documents,
        "nDCG": total(*found, discount_k[place_G], ideal_kk) / n_documents,
        "PSP": 100 * total(*found, weight_G) / best_psp_k,
        "PSnDCG": 100 * total(*found, weight_G * discount_k[place_G], ideal_kk) / best_psdcg_k,
        "R": total(*found, share_G) / has_class_Q[:, None],
        "RP": total(*found, None, smaller_kk) / n_documents,
    }


# 3. Scores: thresholds, coverage, calibration.


def f1_at_k(
    labels_Nk: np.ndarray,
    scores_Nk: np.ndarray,
    correct_Nk: np.ndarray,
    true_L: np.ndarray,
    k: int,
    threshold: float = 0.0,
) -> tuple[float, float]:
    """(micro, macro) F1 in percent of the first k labels that have at least that score.

    F1 = 2 x correct / (true + predicted). Micro: of all pairs together. Macro: the mean over the
    labels that are true or predicted somewhere.
    """
    # 1. Which predictions count, and which of them are correct?
    labels_Nk = labels_Nk[:, :k]
    is_chosen_Nk = scores_Nk[:, :k] >= threshold
    is_right_Nk = is_chosen_Nk & correct_Nk[:, :k]
    # 2. Count both for each label.
    right_L = np.bincount(labels_Nk[is_right_Nk], minlength=len(true_L))
    predicted_L = np.bincount(labels_Nk[is_chosen_Nk], minlength=len(true_L))
    # 3. F1 = 2 x correct / (true + predicted), in percent: hence 200. A label that is neither true
    #    nor predicted has 0 / 0; divided by 1 it adds 0 to the sum, and it is not counted.
    both_L = true_L + predicted_L
    micro = 200 * right_L.sum() / both_L.sum()
    macro = 200 * (right_L / both_L.clip(1)).sum() / (both_L > 0).sum()
    return micro, macro


def best_threshold(scores_Nk: np.ndarray, correct_Nk: np.ndarray, n_pairs: int) -> float:
    """The score threshold with the best micro F1; inf when nothing is correct.

    It is the score of a correct prediction: between two of them there are only wrong ones to add.
    """
    # 1. The candidates: the scores of all correct predictions.
    right_G = np.sort(scores_Nk[correct_Nk])
    if not len(right_G):
        return np.inf
    # 2. At each of them: how many predictions have at least this score, correct ones and all? In a
    #    sorted array these are the ones from its place on.
    chosen = np.sort(scores_Nk[scores_Nk >= 0])
    n_right_G = len(right_G) - np.searchsorted(right_G, right_G)
    n_chosen_G = len(chosen) - np.searchsorted(chosen, right_G)
    # 3. Half of F1 orders them as well.
    f1_G = n_right_G / (n_chosen_G + n_pairs)
    return right_G[f1_G.argmax()]


def precision_coverage(scores: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coverage, precision), shares, at each distinct score as a threshold, the highest first.

    Coverage is the share of documents with at least that score. A score of -1 is never covered.
    """
    order = np.argsort(-scores, kind="stable")
    # Equal scores are covered together: look only where the next score is lower.
    is_last = np.diff(scores[order], append=-1) < 0
    n = np.flatnonzero(is_last) + 1  # documents covered
    n_correct_so_far = correct[order].cumsum()
    n_correct = n_correct_so_far[n - 1]
    return n / len(scores), n_correct / n


def coverage(scores: np.ndarray, correct: np.ndarray, precision: float) -> tuple[float, float]:
    """(threshold, coverage): the largest coverage with that precision; (inf, 0) if none."""
    covered, reached = precision_coverage(scores, correct)
    share = covered[reached >= precision].max(initial=0)
    if not share:
        return np.inf, 0.0
    # The threshold is the score of the last document that is covered.
    n_covered = round(share * len(scores))
    return np.sort(scores)[-n_covered], share


def reliability(scores: np.ndarray, correct: np.ndarray, bins: int = 15) -> tuple[np.ndarray, ...]:
    """(low, high, n, mean score, share correct) of bins of about equal n.

    Equal scores share a bin, and a score of -1 is in none.
    """
    # 1. Sort by score, without those of -1, which come first.
    n_none = (scores < 0).sum()
    order = np.argsort(scores, kind="stable")[n_none:]
    score = scores[order].astype(float)
    is_correct = correct[order].astype(float)
    n = len(order)
    # 2. Cut into bins of equal size. Where equal scores would be cut apart, the bin begins at the
    #    first of them, and two bins may become one.
    first_of_bin = score[np.arange(bins) * n // bins]
    start = np.unique(np.searchsorted(score, first_of_bin))
    size = np.diff(start, append=n)
    # 3. Sums from where a bin begins to where the next one begins.
    mean_score = np.add.reduceat(score, start) / size
    share_correct = np.add.reduceat(is_correct, start) / size
    low = score[start]
    high = score[start + size - 1]
    return low, high, size, mean_score, share_correct


def calibration(scores: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error, %: |mean score - share correct| of a bin, weighted by n.

    Scores are calibrated when, of the predictions with a score of 0.8, eight in ten are correct.
    """
    _, _, n, score, share = reliability(scores, correct, bins)
    return 100 * np.average(abs(score - share), weights=n)


def isotonic(scores: np.ndarray, correct: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The scores `new`, calibrated by isotonic regression of `correct` on `scores`; -1 stays.

    The regression finds the rising function from scores to shares that fits best. Between the
    scores it is linear.
    """
    from scipy.optimize import isotonic_regression  # slow to import, and seldom needed

    # 1. Equal scores are one point: their share correct, which weighs as much as they are many.
    is_label = scores >= 0
    x, place, n = np.unique(scores[is_label], return_inverse=True, return_counts=True)
    share = np.bincount(place, correct[is_label]) / n
    # 2. The rising shares that fit best, and a straight line from each to the next.
    y = isotonic_regression(share, weights=n).x
    return np.where(new < 0, -1, np.interp(new, x, y))


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share of n (Wilson's).

    It stays between 0 and 1, also for shares of few documents and shares near 0 or 1.
    """
    middle = (n * share + Z2 / 2) / (n + Z2)
    variance = n * share * (1 - share)
    half = np.sqrt(Z2 * (variance + Z2 / 4)) / (n + Z2)
    return middle - half, middle + half


# 4. What is printed.


def print_row(name: str, cells, form: str = "9.1f") -> None:
    """One line of a table. A header's name begins with a new line, which takes no room."""
    width = 59 if name.startswith("\n") else 58
    text = "".join(f"{cell:{form}}" for cell in cells)
    # What is not known is a dash.
    print(f"{name:{width}}" + text.replace("nan", "  -"))


def print_metrics(config: Config, data: stages.data.Data, found: tuple, at: list[int]) -> None:
    """All metrics, of all labels and of the classes of frequency."""
    split = data.splits["test"]
    train = data.splits["train"]
    labels, _, correct = found
    # How rare a label is, is counted on the training documents.
    a, b = pair(config.propensity, "--propensity")
    count_L = np.bincount(train.labels, minlength=len(data.names))
    true_L = np.bincount(split.labels, minlength=len(data.names))
    weight_L = stages.eval.inverse_propensity(count_L, len(train), a, b)
    class_L = frequency_class(count_L)
    columns = np.array(at) - 1

    def cells(value_k: np.ndarray) -> np.ndarray:
        """The columns asked for; nan behind the last label that was predicted."""
        unknown = np.full(1 + max(at), np.nan)
        return np.append(value_k, unknown)[columns]

    # 1. What the columns are.
    n_unlabelled = (np.diff(split.label_offsets) < 1).sum()
    print(f"{len(split):,} test documents, {n_unlabelled:,} without labels, not in P to RP")
    titles = [f"@{j}" for j in at]
    print_row(f"%; PS: propensities with A,B = {a:g},{b:g}", titles, ">9")
    # 2. All labels, as a single class.
    one_class_L = np.zeros_like(class_L)
    of_all = by_frequency(labels, correct, split, weight_L, one_class_L, 1)
    for name, value_Qk in of_all.items():
        print_row(name, cells(value_Qk[0]))
    # 3. From frequent labels to those without a training document.
    of_classes = by_frequency(labels, correct, split, weight_L, class_L)
    for name, value_Qk in of_classes.items():
        for q, value_k in enumerate(value_Qk):
            n_labels = (class_L == q).sum()
            n_pairs = true_L[class_L == q].sum()
            title = f"{name:7}{CLASSES[q]:17}{n_labels:9,} labels{n_pairs:10,} pairs"
            print_row(title, cells(value_k))
    print(
        "R: of the labels of the class; the others: what its right predictions contribute, "
        "adding up to the metric"
    )


def print_scores(data: stages.data.Data, found: tuple) -> None:
    """F1 of the first few labels, and how far the scores are from probabilities."""
    labels, scores, correct = found
    true_L = np.bincount(data.splits["test"].labels, minlength=len(data.names))
    # 1. F1 of the first 1, 3 and 5 labels, or as many as were predicted.
    title = "\nF1 of all documents, %; macro: of labels true or predicted"
    print_row(title, ["micro", "macro"], ">9")
    for j in range(1, min(6, labels.shape[1] + 1), 2):
        print_row(f"the first {j}", f1_at_k(labels, scores, correct, true_L, j))
    # 2. The calibration error in one number, of the first prediction and of the first five.
    errors = [calibration(scores[:, :j].ravel(), correct[:, :j].ravel()) for j in (1, 5)]
    print_row("\nECE, %, 15 bins of about equal size, at 1 and 5", errors)
    # 3. And bin by bin, of the first prediction: what it says, and how often it is right.
    print_row("\nfirst predictions, %: reliability", ["score", "right"], ">9")
    bins = reliability(scores[:, 0], correct[:, 0])
    for low, high, n, score, share in zip(*bins, strict=True):
        print_row(f"{n:9,} with a score from {low:.4f} to {high:.4f}", [100 * score, 100 * share])


def print_chosen(config: Config, data: stages.data.Data, test: tuple, val: tuple) -> None:
    """Thresholds, and isotonic regression: chosen on validation, then measured on test."""
    labels, scores, correct = test
    _, val_scores, val_correct = val
    true_L = np.bincount(data.splits["test"].labels, minlength=len(data.names))
    n_pairs = len(data.splits["val"].labels)

    # 1. How many labels should a document get? As many as have a score above a threshold.
    threshold = best_threshold(val_scores, val_correct, n_pairs)
    f1 = f1_at_k(labels, scores, correct, true_L, labels.shape[1], threshold)
    print_row(f"\nF1, scores of at least {threshold:.4g}: best on validation", f1)

    # 2. For how many documents can the first label be taken without a look, if 95 or 90 in 100 of
    #    these labels shall be right? The oracle chooses its threshold on test itself.
    header = ["val", "test", "right", "95% from", "to", "oracle"]
    print_row("\nfirst predictions, %: coverage", header, ">9")
    for target in (0.95, 0.9):
        threshold, val_share = coverage(val_scores[:, 0], val_correct[:, 0], target)
        is_covered = scores[:, 0] >= threshold
        n = is_covered.sum()
        share_correct = correct[is_covered, 0].mean() if n else np.nan
        low, high = wilson(share_correct, n)
        _, oracle = coverage(scores[:, 0], correct[:, 0], target)
        cells = [val_share, n / len(scores), share_correct, low, high, oracle]
        title = f"{100 * target:.0f} right on validation: scores of at least {threshold:.4g}"
        print_row(title, [100 * cell for cell in cells])

    # 3. How much calibration error is left when isotonic regression has corrected the scores?
    if config.isotonic:
        for j in (1, 5):
            known_scores = val_scores[:, :j].ravel()
            known_correct = val_correct[:, :j].ravel()
            calibrated = isotonic(known_scores, known_correct, scores[:, :j].ravel())
            error = calibration(calibrated, correct[:, :j].ravel())
            print_row(f"ECE@{j} after isotonic", [error])


def run(config: Config) -> None:
    # 1. Refuse what cannot work before anything is read.
    at = int_list(config.at, "--at")
    pair(config.propensity, "--propensity")
    # 2. The predictions. Those of validation may be missing.
    folder = Path(config.run)
    data = stages.data.load(config.run)
    test = load(folder / "predictions.npz", "test", data)
    val_file = folder / "predictions.val.npz"
    val = load(val_file, "val", data) if val_file.exists() else None
    # 3. What the test split alone can say.
    print_metrics(config, data, test, at)
    print_scores(data, test)
    # 4. What has to be chosen first, on documents that are not measured.
    if val is None:
        print(
            f"\nno {val_file}: nothing chosen on validation; "
            f"run: python 05_eval.py --run {folder} --split val"
        )
        return
    print_chosen(config, data, test, val)


if __name__ == "__main__":
    main(run, Config, __doc__)
