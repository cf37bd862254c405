"""tools/compare.py: metrics against stage 5, the bootstrap against a loop and the closed form,
ensembles by hand.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_corpus, stages

from plumbing.errors import UserError
from plumbing.store import load_npz, save_npz
from tools import compare


@pytest.fixture(scope="module")
def runs(tmp_path_factory, done) -> list[Path]:
    """Three run folders with the corpus of `done` and predictions of somebody else: the true labels
    and wrong ones.
    """
    folders = []
    for i in range(3):
        folder = tmp_path_factory.mktemp(f"run-{i}")
        shutil.copy(done / "data.npz", folder)
        split, n_labels = (
            stages.data.load(folder).splits["test"],
            len(stages.data.load(folder).names),
        )
        rng, labels = np.random.default_rng(i), np.full((len(split), 12), -1, np.int32)
        scores = -np.sort(-rng.random(labels.shape).astype(np.float32), axis=1)
        for j in range(len(split)):
            true = split.labels[split.label_offsets[j] : split.label_offsets[j + 1]]
            mixed = np.union1d(
                true[rng.random(len(true)) < 0.6], rng.choice(n_labels, 5 + i, replace=False)
            )
            labels[j, : len(mixed)] = rng.permutation(mixed)
        scores[labels < 0] = 0
        save_npz(
            folder / "predictions.npz",
            stages.eval.Config(),
            {"labels": labels, "scores": scores},
            ("data.npz",),
        )
        folders.append(folder)
    return folders


def command(*words) -> compare.Config:
    return compare.parse([str(word) for word in words])


def table(printed: str) -> dict[str, list[float]]:
    """{name of the row: its numbers, nan for a dash}."""
    rows = [line.strip().rsplit(None, 7) for line in printed.splitlines()[2:]]
    return {
        row[0]: [float("nan") if cell == "-" else float(cell) for cell in row[1:]] for row in rows
    }


def columns_of_stage_5(folder: Path) -> list[float]:
    """The metrics as 05_eval.py computes them."""
    data, (arrays, _) = stages.data.load(folder), load_npz(folder / "predictions.npz")
    train = data.splits["train"]
    weight = stages.eval.inverse_propensity(
        np.bincount(train.labels, minlength=len(data.names)), len(train)
    )
    found = stages.eval.metrics(arrays["labels"], data.splits["test"], weight)
    return [found[name][j - 1] if j <= len(found[name]) else np.nan for name, j in compare.COLUMNS]


def test_metrics_are_those_of_stage_5_whatever_the_chunk(runs, monkeypatch, capsys):
    for chunk in (7, 10**6):
        monkeypatch.setattr(compare, "CHUNK", chunk)
        compare.run(command(*runs))
        rows = table(capsys.readouterr().out)
        for folder in runs:
            np.testing.assert_allclose(rows[str(folder)], columns_of_stage_5(folder), atol=0.00501)
    assert np.isnan(rows["mean"][-1])  # 12 labels predicted: no R@100


def test_metrics_with_many_labels_and_any_k(monkeypatch):
    """More true labels than the metrics look at, none at all, fewer predicted than they ask for."""
    rng = np.random.default_rng(2)
    true = [np.sort(rng.choice(200, rng.integers(0, 14), replace=False)) for _ in range(80)]
    ends = np.cumsum([0] + [len(one) for one in true])
    split = stages.data.Split(None, ends, np.concatenate(true).astype(np.int32), ends)
    weight = stages.eval.inverse_propensity(rng.integers(0, 40, 200), 1000)
    monkeypatch.setattr(compare, "CHUNK", 9)
    for k in (1, 4, 5, 40, 120):
        labels = np.array([rng.permutation(200)[:k] for _ in true])
        labels[rng.random(labels.shape) < 0.1] = -1
        added, expected = (
            compare.contributions(labels, split, weight),
            stages.eval.metrics(labels, split, weight),
        )
        assert len(added) == sum(len(one) > 0 for one in true)
        for value, (name, j) in zip(
            compare.percent(added.sum(axis=0), len(added)), compare.COLUMNS, strict=True
        ):
            assert value == pytest.approx(expected[name][j - 1] if j <= k else np.nan, nan_ok=True)


def test_means_and_deviations_over_runs(runs, capsys):
    compare.run(command(*runs))
    rows = table(capsys.readouterr().out)
    a, b, c = (np.array(columns_of_stage_5(folder)) for folder in runs)
    mean = (a + b + c) / 3
    for name, expected in (
        ("mean", mean),
        ("lowest", np.minimum(np.minimum(a, b), c)),
        ("highest", np.maximum(np.maximum(a, b), c)),
        ("standard deviation", (((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 2) ** 0.5),
    ):
        np.testing.assert_allclose(rows[name], expected, atol=0.00501)


def test_bootstrap_equals_a_plain_loop_over_resamples(runs, monkeypatch):
    """Documents drawn one resample at a time and handed to stage 5: two independent samples of one
    distribution.
    """
    data = stages.data.load(runs[0])
    split, train = data.splits["test"], data.splits["train"]
    weight = stages.eval.inverse_propensity(
        np.bincount(train.labels, minlength=len(data.names)), len(train)
    )
    labels = [load_npz(folder / "predictions.npz")[0]["labels"] for folder in runs[:2]]
    added = [compare.contributions(one, split, weight) for one in labels]
    monkeypatch.setattr(compare, "CELLS", 59 * 64)  # several products of 64 resamples
    found = compare.bootstrap(
        np.column_stack([(added[1] - added[0])[:, :-1], added[0][:, -1]]), 0, 2000
    )
    rng, slow = np.random.default_rng(1), []
    has = np.flatnonzero(np.diff(split.label_offsets))
    assert len(has) == 59 and found.shape == (2000, 7)
    for _ in range(1000):
        rows = rng.choice(has, len(has))
        mine = [split.labels[split.label_offsets[i] : split.label_offsets[i + 1]] for i in rows]
        ends = np.cumsum([0] + [len(one) for one in mine])
        drawn = stages.data.Split(None, ends, np.concatenate(mine), ends)
        a, b = (stages.eval.metrics(one[rows], drawn, weight) for one in labels)
        slow.append([b[name][j - 1] - a[name][j - 1] for name, j in compare.COLUMNS[:-1]])
    slow, found = np.array(slow), found[:, :-1]
    error = slow.std(axis=0) * (1 / 1000 + 1 / 2000) ** 0.5
    assert (np.abs(found.mean(axis=0) - slow.mean(axis=0)) < 4 * error).all()
    np.testing.assert_allclose(found.std(axis=0), slow.std(axis=0), rtol=0.12)
    for quantile in (0.025, 0.975):
        gap = np.quantile(found, quantile, axis=0) - np.quantile(slow, quantile, axis=0)
        assert (np.abs(gap) < 0.35 * slow.std(axis=0)).all()


def test_bootstrap_has_the_standard_error_of_the_closed_form():
    """P@1 of two runs is a mean of differences in {-1, 0, 1}: its variance is theirs over N."""
    rng = np.random.default_rng(0)
    difference = rng.choice([-1.0, 0.0, 1.0], 3000, p=[0.1, 0.75, 0.15])
    added = np.zeros((3000, 8))
    added[:, 0], added[:, 4], added[:, 7] = difference, difference, 2.0
    drawn = compare.bootstrap(added, 3)
    assert drawn.shape == (1000, 7)
    error = 100 * difference.std() / 3000**0.5
    assert drawn[:, 0].std() == pytest.approx(error, rel=0.08)
    low, high = np.quantile(drawn[:, 0], (0.025, 0.975))
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    # a ratio of sums: over the sum of the most, 2 each
    np.testing.assert_allclose(drawn[:, 4], drawn[:, 0] / 2)
    assert (drawn == compare.bootstrap(added, 3)).all() and (
        drawn != compare.bootstrap(added, 4)
    ).any()


def test_a_run_does_not_differ_from_itself_and_two_runs_do(runs, capsys):
    compare.run(command(runs[0], runs[0]))
    rows = table(capsys.readouterr().out)
    assert rows["second - first"][:6] == rows["95% interval: from"][:6] == rows["to"][:6] == [0] * 6
    assert rows["% of resamples: second is better"][:6] == [50] * 6
    compare.run(command(runs[0], runs[2], "--seed", 1))
    one = capsys.readouterr().out
    compare.run(command(runs[2], runs[0], "--seed", 1))
    forth, back = table(one), table(capsys.readouterr().out)
    assert "59 documents with labels; 1 without labels" in one
    # The same documents are drawn: the mirror image, and between 0 and 100.
    np.testing.assert_allclose(forth["95% interval: from"][:6], [-x for x in back["to"][:6]])
    name = "% of resamples: second is better"
    np.testing.assert_allclose(np.add(forth[name], back[name])[:6], 100, atol=0.011)
    low, value, high = (
        np.array(forth[key][:6]) for key in ("95% interval: from", "second - first", "to")
    )
    assert (low <= value).all() and (value <= high).all() and (low < high).all()


def by_hand(members: list[dict[str, np.ndarray]], k: int) -> tuple[list, list]:
    """The ensemble with a dictionary per document."""
    all_labels, all_scores = [], []
    for i in range(len(members[0]["labels"])):
        total = {}
        for member in members:
            for label, score in zip(
                member["labels"][i].tolist(), member["scores"][i].tolist(), strict=True
            ):
                if label >= 0:
                    total[label] = total.get(label, 0.0) + score
        best = sorted(total, key=lambda label: (-total[label], label))[:k]
        all_labels.append(best + [-1] * (k - len(best)))
        all_scores.append([total[label] / len(members) for label in best] + [0.0] * (k - len(best)))
    return all_labels, all_scores


def test_ensemble_equals_a_dictionary_per_document(monkeypatch):
    rng, members = np.random.default_rng(5), []
    for k in (3, 6, 5):  # many ties; fewer labels than k, or none
        labels = np.array([rng.permutation(9)[:k] for _ in range(200)], np.int32)
        scores = -np.sort(-rng.integers(0, 5, labels.shape) / 4, axis=1).astype(np.float32)
        labels[np.arange(k) >= rng.integers(0, k + 1, 200)[:, None]] = -1
        members.append(
            {"labels": labels, "scores": np.where(labels < 0, 0, scores).astype(np.float32)}
        )
    labels, scores = by_hand(members, 6)
    for chunk in (13, 10**6):
        monkeypatch.setattr(compare, "CHUNK", chunk)
        found = compare.ensemble(members)
        assert found["labels"].tolist() == labels
        np.testing.assert_allclose(found["scores"], scores, rtol=1e-6)
        assert found["labels"].dtype == np.int32 and found["scores"].dtype == np.float32
    alone = compare.ensemble(members[1:2] * 2)  # a run with itself: its own scores
    np.testing.assert_array_equal(alone["scores"], members[1]["scores"])


def test_an_ensemble_is_a_run_folder_by_itself(runs, tmp_path, capsys):
    out = tmp_path / "runs" / "ensemble"
    compare.run(command("--ensemble", *runs, "--out", out))
    rows = table(capsys.readouterr().out)
    assert list(rows) == [*map(str, runs), f"ensemble, {out}"]
    arrays, meta = load_npz(out / "predictions.npz")
    members = [load_npz(folder / "predictions.npz") for folder in runs]
    labels, scores = by_hand([content for content, _ in members], 12)
    assert arrays["labels"].tolist() == labels
    np.testing.assert_allclose(arrays["scores"], scores, rtol=1e-6)
    assert (
        meta["members"] == [record["sha256"] for _, record in members]
        and meta["config"]["split"] == "test"
    )
    np.testing.assert_allclose(rows[f"ensemble, {out}"], columns_of_stage_5(out), atol=0.00501)
    # Once more into the same folder, and as a run like any other; the data that stage 1 makes anew
    # is not touched.
    before = (out / "predictions.npz").read_bytes()
    compare.run(command("--ensemble", *runs, "--out", out))
    assert (out / "predictions.npz").read_bytes() == before
    compare.run(command(runs[0], out))
    assert "second - first" in capsys.readouterr().out


def test_without_links_the_data_is_copied(runs, tmp_path, monkeypatch):
    def link(*args):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", link)
    compare.run(command("--ensemble", *runs[:2], "--out", tmp_path / "out"))
    assert (tmp_path / "out" / "data.npz").read_bytes() == (runs[0] / "data.npz").read_bytes()
    assert (tmp_path / "out" / "data.npz").stat().st_nlink == 1


def test_what_cannot_be_compared_is_refused(runs, done, tmp_path):
    other = tmp_path / "other"
    stages.data.run(
        stages.data.Config(
            run=str(other), corpus=str(make_corpus(tmp_path / "corpus", 50, seed=9)), vocab=300
        )
    )
    bare, odd = tmp_path / "bare", tmp_path / "odd"
    for folder in (bare, odd):
        folder.mkdir()
        shutil.copy(done / "data.npz", folder)
    for words, message in (
        ([runs[0]], "is only one run"),
        ([runs[0], other], f"(?s){runs[0]} and {other} differ in the labels"),
        (
            [runs[0], bare],
            f"{bare}/predictions.npz does not exist; run: python 05_eval.py --run {bare}",
        ),
        (
            [runs[0], runs[1], "--split", "val"],
            "predictions.val.npz does not exist; run: python 05_eval.py --split",
        ),
        ([runs[0], tmp_path / "none"], "none/data.npz does not exist"),
        (["--ensemble", runs[0], runs[1]], "--out FOLDER go together"),
        ([runs[0], runs[1], "--out", tmp_path], "--out FOLDER go together"),
        (["--ensemble", runs[0], runs[1], "--out", runs[1]], "no ensemble's"),
        (["--ensemble", runs[0], runs[1], "--out", runs[2]], "no ensemble's"),
        (["--ensemble", runs[0], runs[1], "--out", done], "no ensemble's"),
        (["--ensemble", runs[0], runs[1], "--out", other], "is not that of"),
    ):
        with pytest.raises(UserError, match=message):
            compare.run(command(*words))
    load_npz(odd / "data.npz")
    good = {"labels": np.zeros((60, 2), np.int32), "scores": np.full((60, 2), 0.5, np.float32)}
    for change, split, message in (
        ({}, "val", "is for the split val, expected test"),
        (
            {"labels": np.zeros((59, 2), np.int32), "scores": np.zeros((59, 2))},
            "test",
            "for 60 documents",
        ),
        ({"labels": np.zeros((60, 3), np.int32)}, "test", "expected label ids"),
        ({"labels": np.full((60, 2), 40, np.int32)}, "test", "from -1 to 39"),
        ({"labels": np.full((60, 2), 0.5)}, "test", "expected label ids"),
        ({"scores": np.full((60, 2), -3.0)}, "test", "probabilities"),
        ({"scores": np.full((60, 2), np.nan)}, "test", "probabilities"),
    ):
        save_npz(
            odd / "predictions.npz", stages.eval.Config(split=split), good | change, ("data.npz",)
        )
        with pytest.raises(UserError, match=message):
            compare.run(command(runs[0], odd))


def test_names_of_labels_must_be_the_same(runs, tmp_path):
    arrays, meta = load_npz(runs[0] / "data.npz")
    arrays["names"] = arrays["names"][::-1].copy()
    kept = {key: meta[key] for key in ("encoder", "vocab_size", "prefix", "suffix", "pad")}
    save_npz(tmp_path / "data.npz", stages.data.Config(), arrays, **kept)
    with pytest.raises(UserError, match="differ in the labels of test documents or in their names"):
        compare.run(command(runs[0], tmp_path))


def test_what_is_known_beforehand_must_be_the_same(runs, tmp_path):
    arrays, meta = load_npz(runs[0] / "data.npz")
    arrays["test_known"] = np.array([3], np.int32)
    arrays["test_known_offsets"] = np.append(0, np.ones(60, np.int64))
    kept = {key: meta[key] for key in ("encoder", "vocab_size", "prefix", "suffix", "pad")}
    save_npz(tmp_path / "data.npz", stages.data.Config(), arrays, **kept)
    with pytest.raises(UserError, match="differ in what is known beforehand of test documents"):
        compare.run(command(runs[0], tmp_path))


def test_command_line(runs):
    failed = subprocess.run(
        [sys.executable, "-m", "tools.compare", str(runs[0])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        failed.returncode == 2
        and failed.stderr.startswith("compare.py: error: ")
        and not failed.stdout
    )
    assert failed.stderr.count("\n") == 1


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit, match="0"):
        compare.parse(["--help"])
    assert compare.__doc__.strip() in capsys.readouterr().out
