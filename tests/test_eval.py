"""Stage 5: every metric at every j against a slow reference, the baselines against dense brute
force.
"""

import json
import math
import re
import shutil

import numpy as np
import pytest
from conftest import SMALL, has_exact, stages, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from data import build_debian
from plumbing.errors import UserError
from plumbing.store import load_npz

evaluate = stages.eval


def slow_metrics(predicted, true, weight, j):
    """One document, one label at a time, in percent. `predicted` is -1 where there is no label."""
    sums = {"P": 0.0, "R": 0.0, "RP": 0.0, "nDCG": 0.0}
    won = possible = documents = 0
    for labels, mine in zip(predicted, true, strict=True):
        if not mine:
            continue
        documents += 1
        right = [int(label in mine) for label in labels[:j]]
        sums["P"] += sum(right) / j
        sums["R"] += sum(right) / len(mine)
        sums["RP"] += sum(right) / min(j, len(mine))
        sums["nDCG"] += sum(r / math.log2(i + 2) for i, r in enumerate(right)) / sum(
            1 / math.log2(i + 2) for i in range(min(j, len(mine)))
        )
        won += sum(weight[label] for label, r in zip(labels[:j], right, strict=False) if r)
        possible += sum(sorted((weight[label] for label in mine), reverse=True)[:j])
    return {name: 100 * value / documents for name, value in sums.items()} | {
        "PSP": 100 * won / possible
    }


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 8), n_labels=st.integers(3, 15), k=st.integers(1, 8), seed=st.integers(0, 9999)
)
def test_metrics_equal_a_slow_reference(n, n_labels, k, seed):
    rng = np.random.default_rng(seed)
    true = [
        sorted(rng.choice(n_labels, rng.integers(0, n_labels), replace=False).tolist())
        for _ in range(n)
    ]
    true[0] = true[0] or [0]
    predicted = np.full((n, k), -1)
    for row in predicted:  # some documents get fewer than k labels
        m = rng.integers(0, min(k, n_labels) + 1)
        row[:m] = rng.choice(n_labels, m, replace=False)
    # Ties among the weights, and a label never seen in training.
    count = rng.integers(0, 3, n_labels)
    weight = evaluate.inverse_propensity(count, 100)
    split = stages.data.Split(
        None,
        np.arange(n + 1),
        np.array(sum(true, []), np.int32),
        np.cumsum([0] + [len(row) for row in true]),
    )
    result = evaluate.metrics(predicted, split, weight)
    for j in range(1, k + 1):
        for name, value in slow_metrics(predicted.tolist(), true, weight, j).items():
            assert result[name][j - 1] == pytest.approx(value), (name, j)


def test_hits_equal_a_loop():
    rng = np.random.default_rng(1)
    true = [sorted(rng.choice(30, rng.integers(0, 6), replace=False).tolist()) for _ in range(50)]
    ends = np.cumsum([0] + [len(row) for row in true])
    split = stages.data.Split(None, np.arange(51), np.array(sum(true, []), np.int32), ends)
    predicted = rng.integers(-1, 40, (50, 7))
    assert stages.train.hits(predicted, split).tolist() == [
        [label in mine for label in row] for row, mine in zip(predicted.tolist(), true, strict=True)
    ]


def test_propensity_is_the_published_formula():
    weight = evaluate.inverse_propensity(np.array([0, 10]), 1000, 0.55, 1.5)
    c = (math.log(1000) - 1) * 2.5**0.55
    assert weight.tolist() == pytest.approx(
        [1 + c * math.exp(-0.55 * math.log(n + 1.5)) for n in (0, 10)]
    )


def test_neighbours_and_frequent_labels_equal_brute_force(done):
    loaded = stages.data.load(done)
    train, test, n_labels = loaded.splits["train"], loaded.splits["test"], len(loaded.names)
    X, idf = stages.tree.tfidf(train, None, loaded.meta["vocab_size"])
    Q, _ = stages.tree.tfidf(test, idf, loaded.meta["vocab_size"])
    cosine, Y = (Q @ X.T).toarray(), train.label_matrix(n_labels).toarray()
    found = evaluate.nearest_neighbours(
        train, test, loaded.meta["vocab_size"], n_labels, 5, neighbours=3
    )
    for i in range(len(test)):
        votes = sum(cosine[i, j] * Y[j] for j in np.argsort(-cosine[i])[:3])
        labels = found[i][found[i] >= 0]
        expected = np.sort(votes[votes > 0])[::-1][:5]
        np.testing.assert_allclose(votes[labels], expected, rtol=1e-5)
        assert len(set(labels)) == len(labels)
    count = Y.sum(0)
    assert sorted(count[evaluate.most_frequent(train, 2, n_labels, 4)[1]]) == sorted(
        np.sort(count)[-4:]
    )


def random_known(n, n_labels, seed=0):
    """(N, L): of some documents nothing is known, of others up to 4 labels."""
    rng = np.random.default_rng(seed)
    rows = [
        sorted(rng.choice(n_labels, rng.integers(0, 5), replace=False).tolist()) for _ in range(n)
    ]
    ends = np.cumsum([0] + [len(row) for row in rows])
    return rows, csr_matrix(
        (np.ones(ends[-1], bool), np.array(sum(rows, []), np.int32), ends), shape=(n, n_labels)
    )


def test_the_baselines_leave_out_what_is_known(done):
    """As if it were struck out of the whole ranking by hand."""
    loaded = stages.data.load(done)
    train, test, n_labels = loaded.splits["train"], loaded.splits["test"], len(loaded.names)
    rows, known = random_known(len(test), n_labels)
    frequent = evaluate.most_frequent(train, len(test), n_labels, 5, known)
    everyone = evaluate.most_frequent(train, len(test), n_labels, n_labels)
    near = evaluate.nearest_neighbours(
        train, test, loaded.meta["vocab_size"], n_labels, 5, 3, known
    )
    whole = evaluate.nearest_neighbours(
        train, test, loaded.meta["vocab_size"], n_labels, n_labels, 3
    )
    for found, ranking in ((frequent, everyone), (near, whole)):
        for i, mine in enumerate(rows):
            expected = [label for label in ranking[i].tolist() if label not in mine and label >= 0][
                :5
            ]
            assert found[i].tolist() == expected + [-1] * (5 - len(expected))


def test_a_document_that_is_a_label_is_never_given_that_label(tmp_path, monkeypatch):
    """Debian in small: the text begins with the label's own name, which is never right. In no row
    of the table.
    """
    rng = np.random.default_rng(0)
    names = [f"lib{i}" for i in range(20)]
    (tmp_path / "corpus").mkdir()
    own = {}
    for split in ("train", "val", "test"):
        documents = []
        for i in range(40):
            others = [name for name in names if name != names[i % 20]]
            text = f"{names[i % 20]}: a library, which comes with {' '.join(rng.choice(names, 2))}"
            documents.append(
                {"text": text, "labels": rng.choice(others, 2, replace=False).tolist()}
            )
        write_jsonl(tmp_path / "corpus" / f"{split}.jsonl.gz", documents)
        labels = [{"name": name, "text": f"{name}: a library"} for name in names]
        own[split] = build_debian.own_label_pairs(documents, labels)
        build_debian.write(
            tmp_path / "corpus" / f"filter_labels_{split}.txt.gz",
            [f"{a} {b}" for a, b in own[split]],
        )
    write_jsonl(tmp_path / "corpus" / "labels.jsonl.gz", labels)
    assert len(own["test"]) == 40

    rows = []
    measured = evaluate.metrics
    monkeypatch.setattr(
        evaluate, "metrics", lambda labels, *more: rows.append(labels) or measured(labels, *more)
    )
    run = str(tmp_path / "run")
    stages.data.run(stages.data.Config(run=run, corpus=str(tmp_path / "corpus"), vocab=100))
    stages.tree.run(stages.tree.Config(run=run, levels="4"))
    stages.train.run(stages.train.Config(run=run, **SMALL))
    evaluate.run(evaluate.Config(run=run, k=20, exact=has_exact(run)))
    rows.append(load_npz(tmp_path / "run" / "predictions.npz")[0]["labels"])
    # two baselines, three rankings, every label scored, and what was written
    assert len(rows) == 6 + has_exact(run)
    for labels in rows:
        assert not any(label in labels[line] for line, label in own["test"])
        assert (labels[:, 0] >= 0).all()


def test_predictions_are_a_descending_list_of_labels_in_corpus_order(done):
    arrays, meta = load_npz(done / "predictions.npz")
    labels, scores = arrays["labels"], arrays["scores"]
    loaded = stages.data.load(done)
    assert (
        labels.shape == scores.shape == (60, 20)
        and labels.dtype == np.int32
        and scores.dtype == np.float32
    )
    assert (np.diff(scores, axis=1) <= 0).all() and ((scores > 0) == (labels >= 0)).all()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in labels)
    # Document by document, without length sorting, the model says the same.
    model, config, ranking = stages.train.load(done, loaded)
    assert ranking == meta["ranking"]
    for i in (0, 7, 59):
        alone, _ = model.eval().predict(
            loaded.batch("test", np.array([i]), config.max_len), 20, ranking
        )
        assert alone[0, :3].tolist() == labels[i, :3].tolist()


def test_report_and_exact_ranking(done, capsys, monkeypatch):
    load = stages.train.load
    # one that all labels have
    monkeypatch.setattr(stages.train, "load", lambda *args: (*load(*args)[:2], "parent"))
    stages.eval.run(stages.eval.Config(run=str(done), k=20, exact=True, show=1))
    monkeypatch.undo()
    printed = capsys.readouterr().out
    for text in (
        "20 nearest neighbours",
        "most frequent labels",
        "p(label) p(cluster)",
        "shortlist recall",
        "the same top 5",
        "1 of them without labels",
        "true: label-",
    ):
        assert text in printed
    table = [
        line
        for line in printed.splitlines()
        if line.startswith(("cascade", "every label, p", "20 near"))
    ]
    assert len(table) == 5 and all(len(line.split()) >= 12 for line in table)
    assert "R@100" in printed and table[0].endswith("-")  # 20 labels predicted: no R@100
    stages.eval.run(stages.eval.Config(run=str(done), k=20))  # as the fixture left it
    with pytest.raises(UserError, match="--split dev"):
        stages.eval.run(stages.eval.Config(run=str(done), split="dev"))


def test_log_holds_what_training_printed(done):
    records = [json.loads(line) for line in (done / "log.jsonl").read_text().splitlines()]
    epochs = [r for r in records if "validation" in r]
    assert [r["epoch"] for r in epochs] == [1, 2] and set(epochs[0]["validation"]["P"]) == set(
        stages.model.RANKINGS
    )
    steps = [r for r in records if "loss" in r]
    assert all(len(r["loss"]) == 2 and r["lr"] > 0 for r in steps) and steps[-1]["step"] == 2 * 19


def test_predictions_of_another_split_do_not_replace_those_of_the_test_split(done, tmp_path):
    run = shutil.copytree(done, tmp_path / "run")
    before = (run / "predictions.npz").read_bytes()
    evaluate.run(evaluate.Config(run=str(run), split="val", k=7))
    assert (run / "predictions.npz").read_bytes() == before
    arrays, meta = load_npz(run / "predictions.val.npz")
    assert arrays["labels"].shape == (60, 7) and meta["config"]["split"] == "val"


def recall_of(run, capsys, **settings) -> float:
    """The recall of the shortlist that stage 5 prints for its only cluster level."""
    evaluate.run(evaluate.Config(run=str(run), k=20, **settings))
    printed = capsys.readouterr().out
    return float(re.search(r"of 8 clusters ([\d.]+)", printed)[1])


def test_a_beam_may_be_wider_or_narrower_than_in_training(done, tmp_path, capsys):
    run = shutil.copytree(done, tmp_path / "run")  # trained with 4 of 8 clusters kept
    narrow, wide = (recall_of(run, capsys, topk=topk) for topk in ("1", "8"))
    assert narrow < recall_of(run, capsys) < wide == 100
    for impossible in ("9", "4,4"):
        with pytest.raises(UserError, match=f"--topk .*{impossible[0]}.* at most"):
            evaluate.run(evaluate.Config(run=str(run), topk=impossible))


def test_a_split_of_some_documents_has_their_tokens_and_labels(done):
    split = stages.data.load(done).splits["test"]
    some = split.documents(np.array([3, 0]))
    assert len(some) == 2
    for mine, theirs in enumerate((3, 0)):
        for values, ends in (("ids", "offsets"), ("labels", "label_offsets")):
            found = getattr(some, values)[getattr(some, ends)[mine] : getattr(some, ends)[mine + 1]]
            whole = getattr(split, values)
            expected = whole[getattr(split, ends)[theirs] : getattr(split, ends)[theirs + 1]]
            assert found.tolist() == expected.tolist()


def test_neighbours_of_a_large_split_are_found_for_some_documents(
    prepared, done, capsys, monkeypatch
):
    """Where they would be too many; the row of the table says of how many, and counts those."""
    (prepared / "model.pt").write_bytes((done / "model.pt").read_bytes())
    loaded = stages.data.load(done)
    n_train = len(loaded.splits["train"])
    monkeypatch.setattr(evaluate, "MOST_COSINES", 7 * n_train)
    evaluate.run(evaluate.Config(run=str(prepared), k=5))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "neighbours" in line]
    assert line.startswith("20 neighbours, 7 documents")
    rows = np.sort(np.random.default_rng(0).choice(len(loaded.splits["test"]), 7, replace=False))
    some = loaded.splits["test"].documents(rows)
    n_labels = len(loaded.names)
    found = evaluate.nearest_neighbours(
        loaded.splits["train"], some, loaded.meta["vocab_size"], n_labels, 5
    )
    hits = stages.train.hits(found, some)
    has_labels = np.diff(some.label_offsets) > 0
    expected = 100 * hits[has_labels, 0].mean()
    assert float(line.split("documents")[1].split()[0]) == pytest.approx(expected, abs=0.051)
