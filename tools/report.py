"""Measure a run more closely than stage 5 does: more ranking metrics, rare labels, F1, coverage and calibration.

    python -m tools.report --run runs/demo --at 1,5,20 --propensity 0.6,2.6 --isotonic

Reads    RUN/data.npz, RUN/predictions.npz (test split), RUN/predictions.val.npz (validation split) for what is chosen
         there: score thresholds and --isotonic; without it they are left out, and said so. Writes nothing.
         How many right labels the shortlists keep needs the model, and is in what 05_eval.py prints

Shapes   N documents, L labels, k labels predicted, P (document, label) pairs, H right predictions, C classes of labels
"""

from dataclasses import dataclass
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
    propensity: str = flag("0.55,1.5", "constants A,B of the propensity model")
    isotonic: bool = flag(False, "also the calibration after isotonic regression on validation")


def load(path: Path, name: str, data: stages.data.Data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, k) labels and scores, both -1 where there is none, and which are right; UserError where they are unfit."""
    arrays, meta = load_npz(path)
    split, L, of = data.splits[name], len(data.names), meta["config"].get("split")
    labels, scores = (arrays.get(key, np.empty(0)) for key in ("labels", "scores"))
    rows, fits = np.sort(labels, axis=-1), labels.ndim == 2 and labels.shape == scores.shape and labels.size
    if of != name or not fits or len(labels) != len(split) or labels.dtype.kind != "i":
        wrong = f"{of}: labels {labels.shape} {labels.dtype}, scores {scores.shape}; expected {name}: {len(split)} rows"
    elif rows.min() < -1 or not -1 < labels[:, 0].max() <= rows.max() < L or (
            (rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] >= 0)).any():
        wrong = f"labels from {rows.min()} to {rows.max()}; expected 0 to {L - 1}, each once for a document, or -1"
    elif not (scores.min() >= 0 and scores.max() <= 1) or (scores[:, 1:] > scores[:, :-1]).any():
        wrong = f"scores from {scores.min()} to {scores.max()}; expected probabilities, the best first, 0 for label -1"
    else:
        return labels, np.where(labels < 0, -1, scores), hits(labels, split)
    raise UserError(f"{path} holds {wrong}; write it again with what wrote it")


def hits(labels_Nk: np.ndarray, split: stages.data.Split) -> np.ndarray:
    """(N, k) bool: which predicted labels are right. As in stage 4; quicker where k is large."""
    right_Nk, n_N = np.zeros(labels_Nk.shape, bool), np.diff(split.label_offsets)
    doc_P = np.repeat(np.arange(len(n_N)), n_N)
    for j, label_N in enumerate(labels_Nk.T):
        right_Nk[doc_P[np.repeat(label_N, n_N) == split.labels], j] = True
    return right_Nk


def frequency_class(count_L: np.ndarray) -> np.ndarray:
    """(L,) places in CLASSES, from the numbers of training documents."""
    return 3 - np.searchsorted([1, 5, 50], count_L, side="right")


@np.errstate(invalid="ignore")  # 0 / 0 is nan, printed as a dash
def by_frequency(labels_Nk: np.ndarray, right_Nk: np.ndarray, split: stages.data.Split, weight_L: np.ndarray,
                 class_L: np.ndarray, n_classes: int = len(CLASSES)) -> dict[str, np.ndarray]:
    """{"P", "nDCG", "PSP", "PSnDCG", "R", "RP"}: (C, k), at j in column j - 1, in percent, over documents with labels.

    R: of the labels of the class, over the documents that have some. The others: what its right predictions contribute;
    the classes add up to the metric of all labels. PSnDCG: DCG with weights over the document's best without, summed
    over the documents, over the same of the best ranking, as in the XMC repository's scripts (pyxclib)."""
    n_N, k = np.diff(split.label_offsets), labels_Nk.shape[1]
    documents, rank_k = (n_N > 0).sum(), np.arange(1, k + 1)
    discount_k, smaller_kk = 1 / np.log2(rank_k + 1), np.minimum(rank_k[:, None], rank_k)
    ideal_kk = discount_k.cumsum()[smaller_kk - 1]

    def total(doc_H, place_H, label_H, gain_H=None, norm_kk=1):  # (C, k): gains / norm_kk[its labels - 1, j - 1]
        row_H = class_L[label_H] * k + np.minimum(n_N[doc_H], k) - 1  # for j <= k, more than k labels are as k
        gain = np.bincount(row_H * k + place_H, gain_H, n_classes * k * k).reshape(n_classes, k, k)
        return 100 * (gain.cumsum(axis=2) / norm_kk).sum(axis=1)

    doc, place = np.nonzero(right_Nk)
    right, weight = (doc, place, labels_Nk[doc, place]), weight_L[labels_Nk[doc, place]]
    doc_P, place_P, _ = stages.data.flatten(split.label_offsets[:-1], n_N)
    order = np.lexsort((-weight_L[split.labels], doc_P))  # the best ranking: each document's labels by falling weight
    best = tuple(array_P[place_P < k] for array_P in (doc_P, place_P, split.labels[order]))
    best_PSDCG = total(*best, weight_L[best[2]] * discount_k[best[1]], ideal_kk).sum(axis=0)
    n_NC = split.label_matrix(len(class_L)) @ np.eye(n_classes)[class_L]
    return {
        "P": total(*right, None, rank_k) / documents,
        "nDCG": total(*right, discount_k[place], ideal_kk) / documents,
        "PSP": 100 * total(*right, weight) / total(*best, weight_L[best[2]]).sum(axis=0),
        "PSnDCG": 100 * total(*right, weight * discount_k[place], ideal_kk) / best_PSDCG,
        "R": total(*right, 1 / n_NC[doc, class_L[right[2]]]) / (n_NC > 0).sum(axis=0)[:, None],
        "RP": total(*right, None, smaller_kk) / documents,
    }


def f1_at_k(labels_Nk: np.ndarray, scores_Nk: np.ndarray, right_Nk: np.ndarray, true_L: np.ndarray, k: int,
            threshold: float = 0.0) -> tuple[float, float]:
    """(micro, macro) F1 in percent of the first k labels with at least that score; macro: labels true or predicted."""
    chosen_Nk, labels_Nk = scores_Nk[:, :k] >= threshold, labels_Nk[:, :k]
    right_L = np.bincount(labels_Nk[chosen_Nk & right_Nk[:, :k]], minlength=len(true_L))
    both_L = true_L + np.bincount(labels_Nk[chosen_Nk], minlength=len(true_L))
    return 200 * right_L.sum() / both_L.sum(), 200 * (right_L / both_L.clip(1)).sum() / (both_L > 0).sum()


def best_threshold(scores_Nk: np.ndarray, right_Nk: np.ndarray, n_pairs: int) -> float:
    """The score threshold with the best micro F1; inf when nothing is right."""
    right, chosen = np.sort(scores_Nk[right_Nk]), np.sort(scores_Nk[scores_Nk >= 0])
    n_right, n_chosen = (len(score) - np.searchsorted(score, right) for score in (right, chosen))
    f1_H = n_right / (n_chosen + n_pairs)  # at right predictions: between two there are only wrong ones to add
    return right[f1_H.argmax()] if len(right) else np.inf


def precision_coverage(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coverage, precision), shares, at each distinct score as a threshold, the highest first; -1 is never covered."""
    order = np.argsort(-scores, kind="stable")
    n = np.flatnonzero(np.diff(scores[order], append=-1) < 0) + 1  # equal scores are covered together
    return n / len(scores), right[order].cumsum()[n - 1] / n


def coverage(scores: np.ndarray, right: np.ndarray, precision: float) -> tuple[float, float]:
    """(threshold, coverage): the largest coverage with at least that precision; (inf, 0) when there is none."""
    covered, reached = precision_coverage(scores, right)
    share = covered[reached >= precision].max(initial=0)
    return (np.sort(scores)[-round(share * len(scores))], share) if share else (np.inf, 0.0)


def reliability(scores: np.ndarray, right: np.ndarray, bins: int = 15) -> tuple[np.ndarray, ...]:
    """(low, high, n, mean score, share right) of bins of about equal n; equal scores share a bin, -1 is in none."""
    order = np.argsort(scores, kind="stable")[(scores < 0).sum() :]
    s, r, n = scores[order].astype(float), right[order].astype(float), len(order)
    start = np.unique(np.searchsorted(s, s[np.arange(bins) * n // bins]))
    size = np.diff(start, append=n)
    return s[start], s[start + size - 1], size, np.add.reduceat(s, start) / size, np.add.reduceat(r, start) / size


def calibration(scores: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error in percent: |mean score - share right| of a bin, weighted by n."""
    _, _, n, score, share = reliability(scores, right, bins)
    return 100 * np.average(abs(score - share), weights=n)


def isotonic(scores: np.ndarray, right: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The scores `new`, calibrated by isotonic regression of `right` on `scores`, linear between them; -1 stays."""
    from scipy.optimize import isotonic_regression  # slow to import, and seldom needed

    x, inverse, n = np.unique(scores[scores >= 0], return_inverse=True, return_counts=True)
    y = isotonic_regression(np.bincount(inverse, right[scores >= 0]) / n, weights=n).x
    return np.where(new < 0, -1, np.interp(new, x, y))


def run(config: Config) -> None:
    at, folder, data = int_list(config.at, "--at"), Path(config.run), stages.data.load(config.run)
    a, b = pair(config.propensity, "--propensity")
    files = {"test": folder / "predictions.npz", "val": folder / "predictions.val.npz"}
    found = {s: load(path, s, data) for s, path in files.items() if s == "test" or path.exists()}
    top = {(s, j): [array[:, :j].ravel() for array in part[1:]] for s, part in found.items() for j in (1, 5)}
    split, train, (labels, scores, right) = data.splits["test"], data.splits["train"], found["test"]
    count_L, true_L = (np.bincount(part.labels, minlength=len(data.names)) for part in (train, split))
    weight_L, class_L = stages.eval.inverse_propensity(count_L, len(train), a, b), frequency_class(count_L)
    columns, none = np.array(at) - 1, np.full((len(CLASSES), 1 + max(at)), np.nan)  # behind a metric: what is not known
    def row(name: str, cells, form: str = "9.1f") -> None:  # a header begins with a new line, which takes no room
        print(f"{name:{58 + (name < ' ')}}" + "".join(f"{c:{form}}" for c in cells).replace("nan", "  -"))

    print(f"{len(split):,} test documents, {(np.diff(split.label_offsets) < 1).sum():,} without labels, not in P to RP")
    row(f"%; PS: propensities with A,B = {a:g},{b:g}", [f"@{j}" for j in at], ">9")
    for name, value_Ck in by_frequency(labels, right, split, weight_L, np.zeros_like(class_L), 1).items():
        row(name, np.append(value_Ck[0], none[0])[columns])
    for name, value_Ck in by_frequency(labels, right, split, weight_L, class_L).items():
        for c, cells in enumerate(np.append(value_Ck, none, axis=1)[:, columns]):
            row(f"{name:7}{CLASSES[c]:17}{(class_L == c).sum():9,} labels{true_L[class_L == c].sum():10,} pairs", cells)
    print("R: of the labels of the class; the others: what its right predictions contribute, adding up to the metric")
    row("\nF1 of all documents, %; macro: of labels true or predicted", ["micro", "macro"], ">9")
    for j in range(1, min(6, labels.shape[1] + 1), 2):
        row(f"the first {j}", f1_at_k(*found["test"], true_L, j))
    row("\nECE, %, 15 bins of about equal size, at 1 and 5", [calibration(*top["test", j]) for j in (1, 5)])
    row("\nfirst predictions, %: reliability", ["score", "right"], ">9")
    for low, high, n, *shares in zip(*reliability(*top["test", 1]), strict=True):
        row(f"{n:9,} with a score from {low:.4f} to {high:.4f}", [100 * share for share in shares])
    if "val" not in found:
        print(f"\nno {files['val']}: nothing chosen on validation; run: python 05_eval.py --run {folder} --split val")
        return
    t = best_threshold(*found["val"][1:], len(data.splits["val"].labels))
    row(f"\nF1, scores of at least {t:.4g}: best on validation", f1_at_k(*found["test"], true_L, labels.shape[1], t))
    row("\nfirst predictions, %: coverage", ["val", "test", "right", "95% from", "to", "oracle"], ">9")
    for target in (0.95, 0.9):
        t, share = coverage(*top["val", 1], target)
        n, p = (above := scores[:, 0] >= t).sum(), right[above, 0].mean() if above.any() else np.nan
        middle, half = (n * p + Z2 / 2) / (n + Z2), np.sqrt(Z2 * (n * p * (1 - p) + Z2 / 4)) / (n + Z2)  # Wilson's
        cells = share, n / len(split), p, middle - half, middle + half, coverage(*top["test", 1], target)[1]
        row(f"{100 * target:.0f} right on validation: scores of at least {t:.4g}", [100 * cell for cell in cells])
    for j in (1, 5) if config.isotonic else ():
        row(f"ECE@{j} after isotonic", [calibration(isotonic(*top["val", j], top["test", j][0]), top["test", j][1])])


if __name__ == "__main__":
    main(run, Config, __doc__)
