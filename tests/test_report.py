"""tools/report.py: every figure against a slow reference, and against scikit-learn and napkinxc if
installed.
"""

import math
import shutil
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from conftest import stages
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from plumbing.errors import UserError
from plumbing.store import load_npz, save_npz
from tools import report

K, L = 6, 12


def corpus(seed, n=25, full=False):
    """(predicted, true, split, labels, scores, right): lists and arrays; documents without labels,
    fewer than K predictions unless `full`, tied scores."""
    rng = np.random.default_rng(seed)
    true = [sorted(rng.choice(L, rng.integers(0, L - 3), replace=False).tolist()) for _ in range(n)]
    true[0], true[1] = [], [3]
    predicted = [
        rng.choice(L, K if full else rng.integers(0, K + 1), replace=False).tolist()
        for _ in range(n)
    ]
    predicted[1] = predicted[1] or [3]
    labels = np.array([row + [-1] * (K - len(row)) for row in predicted], np.int32)
    scores = -np.sort(-rng.integers(1, 9, (n, K)) / 10, axis=1).astype(np.float32)
    scores[labels < 0] = -1
    ends = np.cumsum([0] + [len(row) for row in true])
    split = stages.data.Split(
        np.zeros(n, np.uint16), np.arange(n + 1), np.array(sum(true, []), np.int32), ends
    )
    return predicted, true, split, labels, scores, stages.train.hits(labels, split)


def classes(seed):
    """(count, class, weight) of the labels; every class has some."""
    count = np.random.default_rng(seed).permutation(
        np.array([0, 0, 1, 2, 4, 4, 5, 30, 49, 50, 99, 500])
    )
    return count, report.frequency_class(count), stages.eval.inverse_propensity(count, 1000)


def slow(predicted, true, weight, j, kept):
    """Metrics at j of the right predictions among the labels `kept`, in percent; R of those labels
    alone.
    """
    documents = [(row[:j], mine) for row, mine in zip(predicted, true, strict=True) if mine]
    total = dict.fromkeys(("P", "nDCG", "RP", "PSP", "PSnDCG"), 0.0)
    best, best_n, recalls = 0.0, 0.0, []
    for row, mine in documents:
        ideal = sum(1 / math.log2(i + 2) for i in range(min(j, len(mine))))
        for i, label in enumerate(row):
            if label in mine and label in kept:
                total["P"] += 1 / j
                total["RP"] += 1 / min(j, len(mine))
                total["nDCG"] += 1 / math.log2(i + 2) / ideal
                total["PSP"] += weight[label]
                total["PSnDCG"] += weight[label] / math.log2(i + 2) / ideal
        falling = sorted((weight[label] for label in mine), reverse=True)[:j]
        best += sum(falling)
        best_n += sum(w / math.log2(i + 2) for i, w in enumerate(falling)) / ideal
        if inside := set(mine) & kept:
            recalls.append(len(inside & set(row)) / len(inside))
    whole = {
        "P": len(documents),
        "RP": len(documents),
        "nDCG": len(documents),
        "PSP": best,
        "PSnDCG": best_n,
    }
    result = {name: 100 * value / whole[name] for name, value in total.items()}
    return result | {"R": 100 * sum(recalls) / len(recalls) if recalls else math.nan}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999))
def test_ranking_metrics_and_their_parts_equal_a_slow_reference(seed):
    predicted, true, split, labels, _, right = corpus(seed)
    _, class_L, weight = classes(seed)
    assert (right == stages.train.hits(labels, split)).all()
    whole = report.by_frequency(labels, right, split, weight, np.zeros(L, int), 1)
    parts = report.by_frequency(labels, right, split, weight, class_L)
    for name, values in stages.eval.metrics(labels, split, weight).items():
        np.testing.assert_allclose(whole[name][0], values, atol=1e-9)
    for name in set(whole) - {"R"}:
        np.testing.assert_allclose(parts[name].sum(axis=0), whole[name][0], atol=1e-9)
    for j in range(1, K + 1):
        for c in (None, 0, 1, 2, 3):
            kept = {label for label in range(L) if c is None or class_L[label] == c}
            for name, value in slow(predicted, true, weight, j, kept).items():
                got = (whole if c is None else parts)[name][c or 0, j - 1]
                assert got == pytest.approx(value, nan_ok=True), (name, j, c)


def test_classes_of_labels_are_as_stage_1_has_them():
    found = report.frequency_class(np.array([0, 1, 4, 5, 49, 50, 1000]))
    words = ["unseen", "tail", "tail", "torso", "torso", "head", "head"]
    assert [report.CLASSES[c].split(",")[0] for c in found] == words
    empty = stages.data.Split(None, np.arange(3), np.zeros(0, np.int32), np.zeros(3, int))
    nothing = report.by_frequency(
        np.zeros((2, 1), int), np.zeros((2, 1), bool), empty, np.ones(1), np.zeros(1, int)
    )
    assert all(np.isnan(value[0]).all() for value in nothing.values())  # no document has a label


def slow_f1(predicted, true):
    """(micro, macro) in percent from sets."""
    # right, true + predicted
    counts = {label: [0, 0] for row in (*predicted, *true) for label in row}
    for row, mine in zip(predicted, true, strict=True):
        for label in (*row, *mine):
            counts[label][1] += 1
        for label in set(row) & set(mine):
            counts[label][0] += 1
    micro = 2 * sum(n for n, _ in counts.values()) / sum(n for _, n in counts.values())
    return 100 * micro, 100 * sum(2 * n / both for n, both in counts.values()) / len(counts)


def above(predicted, scores, threshold):
    return [
        [label for label, s in zip(row, mine, strict=False) if s >= threshold]
        for row, mine in zip(predicted, scores, strict=True)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_f1_and_its_best_threshold_equal_a_slow_reference(seed):
    predicted, true, split, labels, scores, right = corpus(seed)
    true_L = np.bincount(split.labels, minlength=L)
    for j in range(1, K + 2):
        expected = slow_f1([row[:j] for row in predicted], true)
        assert report.f1_at_k(labels, scores, right, true_L, j) == pytest.approx(expected)
    tried = {t: slow_f1(above(predicted, scores, t), true) for t in np.unique(scores[scores >= 0])}
    threshold = report.best_threshold(scores, right, len(split.labels))
    found = report.f1_at_k(labels, scores, right, true_L, K, threshold)
    assert found == pytest.approx(tried[threshold]) and found[0] == pytest.approx(
        max(m for m, _ in tried.values())
    )
    assert report.best_threshold(scores, np.zeros_like(right), 5) == np.inf
    assert report.f1_at_k(labels, scores, right, true_L, K, np.inf) == (0, 0)


@pytest.mark.parametrize("seed", range(8))
def test_coverage_equals_a_slow_reference(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 12, 60) / 12  # ties
    right = rng.random(60) < scores
    scores[:7], right[:7] = -1, False  # nothing predicted
    tried = {}
    for t in sorted(set(scores[scores >= 0]), reverse=True):
        taken = [ok for s, ok in zip(scores, right, strict=True) if s >= t]
        tried[t] = len(taken) / 60, sum(taken) / len(taken)
    covered, precision = report.precision_coverage(scores, right)
    np.testing.assert_allclose(np.transpose([covered, precision]), list(tried.values()))
    for target in (0.0, 0.5, 0.75, 0.9, 1.0):
        good = [(share, t) for t, (share, reached) in tried.items() if reached >= target]
        share, t = max(good, default=(0, np.inf))
        assert report.coverage(scores, right, target) == (t, pytest.approx(share))


def test_calibration_of_known_scores():
    # Right as often as the scores say: no error. Scores of 0.75 that are right in a quarter of the
    # cases: 0.5.
    scores = np.repeat([0.25, 0.5, 1.0, -1.0], [40, 20, 10, 5])
    right = np.concatenate(
        [np.arange(40) < 10, np.arange(20) < 10, np.ones(10, bool), np.zeros(5, bool)]
    )
    order = np.random.default_rng(0).permutation(75)
    low, high, n, mean, share = report.reliability(scores[order], right[order])
    assert (
        (low == high).all()
        and (mean == share).all()
        and n.sum() == 70
        and report.calibration(scores, right) == 0
    )
    assert report.calibration(np.full(40, 0.75), np.arange(40) < 10) == pytest.approx(50)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_equals_a_slow_reference(seed):
    rng = np.random.default_rng(seed)
    scores = rng.random(307) if seed else rng.integers(0, 40, 307) / 40  # with ties, too
    right = rng.random(307) < scores**2
    low, high, n, mean, share = report.reliability(scores, right, 15)
    assert (low[1:] > high[:-1]).all() and n.sum() == 307  # whole runs of equal scores
    error = 0
    for a, b, size, score, ok in zip(low, high, n, mean, share, strict=True):
        inside = [i for i in range(307) if a <= scores[i] <= b]
        assert len(inside) == size and (not seed or size in (20, 21))
        assert score == pytest.approx(sum(scores[inside]) / size) and ok == pytest.approx(
            sum(right[inside]) / size
        )
        error += abs(sum(scores[inside]) - sum(right[inside])) / 307
    assert report.calibration(scores, right) == pytest.approx(100 * error)


def test_isotonic_regression_by_hand():
    known, right = np.array([0.1, 0.2, 0.3, 0.3, -1]), np.array([1, 0, 1, 0, 0], bool)
    # 1, 0 and the mean 0.5 of the tie are pooled: (1 + 0 + 1 + 0) / 4.
    assert report.isotonic(known, right, np.array([0, 0.2, 0.9, -1])).tolist() == [
        0.5,
        0.5,
        0.5,
        -1,
    ]
    assert report.isotonic(
        np.array([0.2, 0.4]), np.array([False, True]), np.array([0.3])
    ) == pytest.approx(0.5)


def table(other, gaps):
    """Print, for pytest -s, the largest differences from another implementation by metric, in
    shares; all are tiny.
    """
    print()
    for name, values in gaps.items():
        print(f"{other:13} {name:20} largest difference {max(values):.1e}")
    assert max(max(values) for values in gaps.values()) <= 1e-6


def test_as_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    from sklearn.isotonic import IsotonicRegression

    gaps = {
        f"{name}@{j}": [] for name in ("nDCG", "micro F1", "macro F1") for j in range(1, K + 1)
    } | {"isotonic": []}
    for seed in range(5):
        predicted, true, split, labels, scores, right = corpus(seed, full=True)
        Y, S, guess = np.zeros((25, L)), np.zeros((25, L)), np.zeros((K, 25, L))
        for i in range(25):
            Y[i, true[i]] = 1
            S[i, predicted[i]] = np.arange(K, 0, -1)
            for j in range(K):
                guess[j, i, predicted[i][: j + 1]] = 1
        has = Y.any(1)
        whole = report.by_frequency(labels, right, split, np.ones(L), np.zeros(L, int), 1)
        for j in range(1, K + 1):
            gaps[f"nDCG@{j}"].append(
                abs(whole["nDCG"][0, j - 1] / 100 - metrics.ndcg_score(Y[has], S[has], k=j))
            )
            some = np.flatnonzero(Y.any(0) | guess[j - 1].any(0))
            ours = report.f1_at_k(labels, scores, right, Y.sum(0).astype(int), j)
            for average, mine in zip(("micro", "macro"), ours, strict=True):
                theirs = metrics.f1_score(
                    Y, guess[j - 1], average=average, labels=some, zero_division=0
                )
                gaps[f"{average} F1@{j}"].append(abs(mine / 100 - theirs))
        rng = np.random.default_rng(seed)
        known, new = rng.integers(0, 50, 300) / 50, rng.random(100)
        ok = rng.random(300) < known
        other = IsotonicRegression(out_of_bounds="clip").fit(known, ok).predict(new)
        gaps["isotonic"].append(abs(report.isotonic(known, ok, new) - other).max())
    table("scikit-learn", gaps)


def test_as_napkinxc():
    other = pytest.importorskip("napkinxc.metrics", reason="napkinxc is not installed")
    gaps = {
        f"{name}@{j}": [] for name in ("P", "R", "nDCG", "PSP", "PSnDCG") for j in range(1, K + 1)
    }
    gaps["inverse propensity"] = []
    for seed in range(10):
        predicted, true, split, labels, _, right = corpus(seed)
        rng = np.random.default_rng(seed)
        train = [rng.choice(L, rng.integers(1, 6), replace=False).tolist() for _ in range(80)] + [
            [L - 1]
        ]
        count = np.bincount(sum(train, []), minlength=L)
        weight = stages.eval.inverse_propensity(count, 81, 0.6, 2.6)
        mine = report.by_frequency(labels, right, split, weight, np.zeros(L, int), 1)
        # it counts documents without labels, this program does not
        rows = [i for i in range(25) if true[i]]
        Y, guess = [true[i] for i in rows], [predicted[i] for i in rows]
        theirs = {
            "P": other.precision_at_k(Y, guess, K),
            "R": other.recall_at_k(Y, guess, K),
            "nDCG": other.ndcg_at_k(Y, guess, K),
            "PSP": other.psprecision_at_k(Y, guess, weight, K),
            "PSnDCG": other.psndcg_at_k(Y, guess, weight, K),
        }
        for name, values in theirs.items():
            for j, value in enumerate(values, 1):
                gaps[f"{name}@{j}"].append(abs(mine[name][0, j - 1] / 100 - value))
        theirs = other.Jain_et_al_inverse_propensity(train, 0.6, 2.6)
        gaps["inverse propensity"].append(abs(weight - theirs).max())
    table("napkinxc", gaps)


def test_report_of_a_run_with_and_without_validation(done, tmp_path, capsys):
    run = shutil.copytree(done, tmp_path / "run")
    (run / "predictions.val.npz").unlink(missing_ok=True)
    report.run(report.Config(run=str(run), at="1,5,100", propensity="0.6,2.6"))
    without = capsys.readouterr().out
    assert f"python 05_eval.py --run {run} --split val" in without and "A,B = 0.6,2.6" in without
    lines = without.splitlines()
    assert [line.split()[0] for line in lines[2:8]] == ["P", "nDCG", "PSP", "PSnDCG", "R", "RP"]
    # no label 100
    assert all(line.endswith("-") and not line.split()[1].startswith("-") for line in lines[2:8])
    stages.eval.run(stages.eval.Config(run=str(run), split="val", k=20))
    capsys.readouterr()
    report.run(report.Config(run=str(run), at="1,5,100", propensity="0.6,2.6", isotonic=True))
    printed = capsys.readouterr().out
    assert printed.startswith(without[: without.index("\nno ")])
    for text in ("best on validation", "95 right on", "90 right on", "ECE@5 after isotonic"):
        assert text in printed
    for flags in ({"propensity": "0.55"}, {"propensity": "a,b"}, {"at": "1,x"}):
        with pytest.raises(UserError, match="--" + next(iter(flags))):
            report.run(report.Config(run=str(run), **flags))


def test_coverage_chosen_on_validation_and_its_interval_on_test(done, tmp_path, capsys):
    run, data = shutil.copytree(done, tmp_path / "run"), stages.data.load(done)
    for name, file, wrong in (("val", "predictions.val.npz", 2), ("test", "predictions.npz", 5)):
        split = data.splits[name]
        # one document has none
        mine = [split.labels[a:b].tolist() for a, b in pairwise(split.label_offsets)]
        labels = np.array([row[0] if row else 0 for row in mine], np.int32)
        for i in range(wrong - 1):
            labels[i] = min(set(range(40)) - set(mine[i]))
        scores = np.where([bool(row) for row in mine], 0.5, 0.1).astype(np.float32)
        save(run / file, labels[:, None], scores[:, None], name)
    report.run(report.Config(run=str(run)))
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("95 right")
    )
    # On validation 58 of 60 are right, at any score: all are covered. On test 55 of 60, of the 59
    # surer ones 55.
    p, n, z = 55 / 60, 60, 1.959963984540054
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    expected = [100, 100, 100 * p, 100 * (middle - width), 100 * (middle + width), 0]
    assert [float(cell) for cell in line.split()[-6:]] == pytest.approx(expected, abs=0.051)
    wilson = binomtest(55, 60).proportion_ci(method="wilson")
    assert [100 * wilson.low, 100 * wilson.high] == pytest.approx(expected[3:5])


@dataclass(frozen=True)
class Other:
    """The settings of some other system."""

    split: str


def save(path, labels, scores, split):
    load_npz(path.with_name("data.npz"))
    save_npz(path, Other(split), {"labels": labels, "scores": scores}, made_from=("data.npz",))


def test_bad_predictions_are_refused(done, tmp_path):
    run = shutil.copytree(done, tmp_path / "run")
    data, path = stages.data.load(run), run / "predictions.npz"
    labels = np.tile(np.array([3, 5, -1], np.int32), (60, 1))
    scores = np.tile(np.array([0.5, 0.5, 0], np.float32), (60, 1))
    save(path, labels, scores, "test")
    got, marked, right = report.load(path, "test", data)
    assert (got == labels).all() and (marked[:, 2] == -1).all() and right.shape == (60, 3)
    cases = [
        (labels, scores, "val", "expected test"),
        (labels[:59], scores[:59], "test", "60 rows"),
        (labels, scores[:, :2], "test", "scores"),
        (labels.astype(float), scores, "test", "float64"),
        (labels[:, :0], scores[:, :0], "test", "labels"),
        (labels + 40, scores, "test", "expected 0 to 39"),
        (labels - 9, scores, "test", "labels from"),
        (np.full_like(labels, -1), scores, "test", "labels from"),
        (np.full_like(labels, 4), scores, "test", "each once"),
        (labels, scores[:, ::-1], "test", "best first"),
        (labels[:, ::-1], scores, "test", "labels from"),
        (labels, scores * np.nan, "test", "scores from nan"),
        (labels, scores * 3, "test", "probabilities"),
    ]
    for bad_labels, bad_scores, split, message in cases:
        save(path, np.ascontiguousarray(bad_labels), np.ascontiguousarray(bad_scores), split)
        with pytest.raises(UserError, match=message) as error:
            report.load(path, "test", data)
        assert "predictions.npz" in str(error.value)
