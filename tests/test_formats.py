"""Every layout of a corpus that is read, on a small sample written in it: all give the same data
artifact.
"""

import csv
import gzip
import json

import numpy as np
import pytest
from conftest import SMALL, has_exact, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix, save_npz

from data import formats
from plumbing.errors import UserError
from plumbing.known_labels import without_known
from plumbing.store import load_npz

RNG = np.random.default_rng(0)
# numbers, as concepts of EURLEX57K are, in ascending order
NAMES = [str(100 + 7 * i) for i in range(9)]
SAMPLE = {
    split: [
        (
            f"word{i} über {split}{i % 4}",
            sorted(RNG.choice(9, RNG.integers(1, 4), replace=False).tolist()),
        )
        for i in range(n)
    ]
    for split, n in (("train", 30), ("val", 6), ("test", 8))
}
SAMPLE["train"][0] = (SAMPLE["train"][0][0], list(range(9)))  # so that every label is found


def write(path, lines, zipped=False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(line + "\n" for line in lines)
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def json_lines(folder, zipped=True, labels=True):
    for split, rows in SAMPLE.items():
        write(
            folder / f"{split}.jsonl",
            [json.dumps({"text": text, "labels": [NAMES[i] for i in ids]}) for text, ids in rows],
            zipped,
        )
    if labels:
        write(
            folder / "labels.jsonl",
            [json.dumps({"name": name, "text": name}) for name in NAMES],
            zipped,
        )


def comma_separated(folder):
    for split, rows in SAMPLE.items():
        with open(
            folder / f"{split.replace('val', 'dev')}.csv", "w", newline="", encoding="utf-8"
        ) as file:
            writer = csv.writer(file)
            writer.writerow(["id", "labels", "text"])
            writer.writerows(
                [i, "; ".join(NAMES[j] for j in ids), text] for i, (text, ids) in enumerate(rows)
            )
    write(folder / "labels.csv", ["name,text", *(f"{name},{name}" for name in NAMES)])


def text_pairs(
    folder, texts="{}_texts.txt", labels="{}_labels.txt", names="label_texts.txt", short=False
):
    for split, rows in SAMPLE.items():
        word = (
            {"train": "trn", "val": "valid", "test": "tst"}[split]
            if short
            else split.replace("val", "dev")
        )
        write(folder / texts.format(word), [text for text, _ in rows])
        path = folder / labels.format(word)
        if path.suffix == ".npz":
            Y = np.zeros((len(rows), len(NAMES)))
            for i, (_, ids) in enumerate(rows):
                Y[i, ids] = 1
            save_npz(path, csr_matrix(Y))
        elif path.name.startswith("Y."):
            write(
                path,
                [
                    f"{len(rows)} {len(NAMES)}",
                    *(" ".join(f"{i}:1.0" for i in ids) for _, ids in rows),
                ],
            )
        else:
            write(path, [" ".join(str(i) if names else NAMES[i] for i in ids) for _, ids in rows])
    if names:
        write(folder / names, NAMES)


def lf(folder, zipped=True):
    for split, word in (("train", "trn"), ("val", "valid"), ("test", "tst")):
        rows = [
            {
                "uid": str(i),
                "title": text.split()[0],
                "content": " ".join(text.split()[1:]),
                "target_ind": ids,
                "target_rel": [1.0] * len(ids),
            }
            for i, (text, ids) in enumerate(SAMPLE[split])
        ]
        write(folder / f"{word}.json", map(json.dumps, rows), zipped)
    write(
        folder / "lbl.json",
        [json.dumps({"uid": str(i), "title": name}) for i, name in enumerate(NAMES)],
        zipped,
    )


def eurlex(folder):
    for split, rows in SAMPLE.items():
        for i, (text, ids) in enumerate(rows):
            first, *rest = text.split()
            content = {
                "celex_id": f"3{i}",
                "uri": "",
                "type": "Decision",
                "title": "not read: the header says it",
                "header": first,
                "recitals": "",
                "main_body": rest,
                "attachments": "",
                "concepts": [NAMES[j] for j in ids],
            }
            write(folder / split.replace("val", "dev") / f"{i:05}.json", [json.dumps(content)])
    write(
        folder / "EURLEX57K.json",
        [
            json.dumps(
                {
                    name: {"concept_id": name, "label": name, "alt_labels": []}
                    for name in [*NAMES, "9999"]
                }
            )
        ],
    )


LAYOUTS = {
    "JSON lines, gzipped": json_lines,
    "JSON lines": lambda folder: json_lines(folder, zipped=False),
    "CSV": comma_separated,
    "texts and ids": text_pairs,
    "raw texts and ids": lambda folder: text_pairs(
        folder, texts="{}_raw_texts.txt", names="output-items.txt"
    ),
    "X.trn.txt and Y.trn.txt": lambda folder: text_pairs(
        folder, "X.{}.txt", "Y.{}.txt", "Yf.txt", short=True
    ),
    "X.trn.txt and Y.trn.npz": lambda folder: text_pairs(
        folder, "X.{}.txt", "Y.{}.npz", "Yf.txt", short=True
    ),
    "LF, gzipped": lf,
    "LF": lambda folder: lf(folder, zipped=False),
    "EURLEX57K": eurlex,
}
NAMELESS = {  # names are found in the documents; labels have no texts
    "JSON lines without labels": lambda folder: json_lines(folder, labels=False),
    "texts and names": lambda folder: text_pairs(folder, names=None),
}


def artifact(folder, make) -> dict[str, np.ndarray]:
    corpus = folder / "corpus"
    corpus.mkdir()
    make(corpus)
    stages.data.run(stages.data.Config(run=str(folder / "run"), corpus=str(corpus), vocab=150))
    return load_npz(folder / "run" / "data.npz")[0]


@pytest.mark.parametrize("make", [*LAYOUTS.values(), *NAMELESS.values()], ids=[*LAYOUTS, *NAMELESS])
def test_the_same_corpus_gives_the_same_artifact_in_every_layout(tmp_path, make):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    expected, found = artifact(first, json_lines), artifact(second, make)
    assert set(found) == set(expected)
    for key, array in expected.items():
        if make not in NAMELESS.values() or not key.startswith("label_"):
            assert array.dtype == found[key].dtype and np.array_equal(array, found[key]), key
    loaded = stages.data.load(second / "run")
    assert loaded.names == NAMES
    for split, rows in SAMPLE.items():
        assert loaded.splits[split].labels.tolist() == [i for _, ids in rows for i in ids]


def test_labels_of_a_matrix_without_names_are_numbers(tmp_path):
    artifact(
        tmp_path, lambda folder: text_pairs(folder, "X.{}.txt", "Y.{}.npz", names=None, short=True)
    )
    assert stages.data.load(tmp_path / "run").names == [str(i) for i in range(9)]


def test_flags_of_reading(tmp_path, capsys):
    json_lines(tmp_path)
    (tmp_path / "val.jsonl.gz").unlink()
    run = str(tmp_path / "run")
    stages.data.run(
        stages.data.Config(run=run, corpus=str(tmp_path), vocab=150, val=0.5, text_limit=4)
    )
    printed = capsys.readouterr().out
    assert "no validation split: 15 training documents become it" in printed
    assert "note: 8 test texts cut to 4 characters" in printed
    loaded = stages.data.load(run)
    assert len(loaded.splits["train"]) == len(loaded.splits["val"]) == 15


def spoil(path, change) -> None:
    path.write_text(change(path.read_text()))


SPOILT = [
    (
        text_pairs,
        "train_labels.txt",
        lambda text: text + "1\n",
        "labels.txt has more lines than .*train_texts.txt",
    ),
    (
        text_pairs,
        "test_texts.txt",
        lambda text: text + "more\n",
        "texts.txt has more lines than .*test_labels.txt",
    ),
    (
        text_pairs,
        "train_labels.txt",
        lambda text: text.replace("3", "42", 1),
        "line 1: label 42 is not among the 9",
    ),
    (text_pairs, "label_texts.txt", lambda text: "", "the file of the labels has none"),
    (
        comma_separated,
        "train.csv",
        lambda text: text.replace("labels", "tags", 1),
        "csv line 1: no column labels",
    ),
    (
        comma_separated,
        "test.csv",
        lambda text: text + "1,2\n",
        "test.csv line 10: 2 columns, expected 3",
    ),
    (
        comma_separated,
        "test.csv",
        lambda text: text.replace("; ", "|"),
        "is not among the 9 labels",
    ),
    (
        comma_separated,
        "labels.csv",
        lambda text: text + "100,again\n",
        "labels named more than once: '100'",
    ),
    (
        lambda folder: lf(folder, False),
        "trn.json",
        lambda text: text.replace("target_ind", "tags"),
        "trn.json line 1: expected an object with title, content, target_ind",
    ),
    (
        lambda folder: lf(folder, False),
        "tst.json",
        lambda text: text.replace('_ind": [', '_ind": [99, ', 1),
        "tst.json line 1: label 99 is not among the 9 labels",
    ),
    (
        lambda folder: lf(folder, False),
        "lbl.json",
        lambda text: text.replace("title", "name"),
        "lbl.json line 1: expected an object with title",
    ),
    (
        eurlex,
        "test/00003.json",
        lambda text: text.replace("concepts", "labels"),
        "00003.json: expected an object with",
    ),
    (
        eurlex,
        "EURLEX57K.json",
        lambda text: "{}",
        "EURLEX57K.json: expected an object with a label for each concept",
    ),
]


@pytest.mark.parametrize(
    ("make", "file", "change", "said"), SPOILT, ids=[case[3][:50] for case in SPOILT]
)
def test_what_does_not_fit_is_named(tmp_path, make, file, change, said):
    make(tmp_path)
    spoil(tmp_path / file, change)
    with pytest.raises(UserError, match=said):
        stages.data.run(
            stages.data.Config(run=str(tmp_path / "run"), corpus=str(tmp_path), vocab=150)
        )


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("test_texts.txt", "looks like text pairs, but has no test split"),
        ("train_labels.txt", "train_texts.txt has no labels beside it"),
    ],
)
def test_a_missing_part_is_named(tmp_path, gone, said):
    text_pairs(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(UserError, match=said):
        formats.open_corpus(tmp_path)


def test_a_matrix_of_pickles_is_refused(tmp_path):
    text_pairs(tmp_path, "X.{}.txt", "Y.{}.npz", "Yf.txt", short=True)
    np.savez(tmp_path / "Y.trn.npz", data=np.array([{}], dtype=object), format=np.array("csr"))
    with pytest.raises(UserError, match="Y.trn.npz cannot be read"):
        formats.open_corpus(tmp_path)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_known_labels_leave_a_ranking(data):
    n, n_labels, k = (
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(1, 8)),
        data.draw(st.integers(1, 5)),
    )
    known = data.draw(st.lists(st.sets(st.integers(0, n_labels - 1)), min_size=n, max_size=n))
    rows = [data.draw(st.permutations(range(n_labels))) + [-1] * 4 for _ in range(n)]
    scores = np.tile(-np.arange(n_labels + 4.0), (n, 1))
    K = csr_matrix(
        (
            np.ones(sum(map(len, known)), bool),
            np.array([j for row in known for j in sorted(row)], int),
            np.append(0, np.cumsum([len(row) for row in known])),
        ),
        shape=(n, n_labels),
    )
    labels_Nk, scores_Nk = without_known(np.array(rows), scores, K, k)
    for i, row in enumerate(rows):
        kept = [
            (label, scores[i, place]) for place, label in enumerate(row) if label not in known[i]
        ][:k]
        kept += [(-1, -np.inf)] * (k - len(kept))
        assert labels_Nk[i].tolist() == [label for label, _ in kept]
        assert all(
            score == expected
            for score, (label, expected) in zip(scores_Nk[i], kept, strict=True)
            if label >= 0
        )


def test_filters_are_kept_with_their_documents_and_not_predicted(tmp_path):
    """Documents without labels are left out of training, so lines and rows differ; a part of it is
    for validation.
    """
    corpus, run = tmp_path / "corpus", str(tmp_path / "run")
    text_pairs(corpus)
    for word in ("texts", "labels"):
        (corpus / f"dev_{word}.txt").unlink()
    spoil(
        corpus / "train_labels.txt",
        lambda text: "".join(
            "\n" if i in (3, 4) else line + "\n" for i, line in enumerate(text.splitlines())
        ),
    )
    write(corpus / "filter_labels_train.txt", [f"{i} {i % 9}" for i in range(30)])
    write(corpus / "filter_labels_test.txt", ["0 1", "0 2", "7 8"])
    stages.data.run(stages.data.Config(run=run, corpus=str(corpus), vocab=150))
    loaded = stages.data.load(run)
    assert loaded.known["test"].toarray().nonzero()[0].tolist() == [0, 0, 7]
    words = [
        loaded.splits[split].ids[a:b].tobytes()
        for split in ("train", "val")
        for a, b in zip(
            loaded.splits[split].offsets, loaded.splits[split].offsets[1:], strict=False
        )
    ]
    known = np.concatenate([loaded.known[split].toarray() for split in ("train", "val")])
    tokens = {
        text: stages.data.Tokenizer.from_buffer(loaded.tokenizer)
        .encode(text, add_special_tokens=False)
        .ids
        for text, _ in SAMPLE["train"]
    }
    for line, (text, _) in enumerate(SAMPLE["train"]):
        if line not in (3, 4):
            row = words.index(np.array(tokens[text], np.uint16).tobytes())
            assert known[row].nonzero()[0].tolist() == [line % 9]
    stages.tree.run(stages.tree.Config(run=run))
    stages.train.run(stages.train.Config(run=run, **SMALL | {"topk": None, "epochs": 1}))
    stages.eval.run(stages.eval.Config(run=run, exact=has_exact(run), k=9))
    labels = load_npz(tmp_path / "run" / "predictions.npz")[0]["labels"]
    assert sorted(labels[0]) == [-1, -1, 0, 3, 4, 5, 6, 7, 8] and sorted(labels[7]) == [
        -1,
        *range(8),
    ]
    assert sorted(labels[1]) == list(range(9))
    write(corpus / "filter_labels_test.txt", ["0 9"])
    with pytest.raises(
        UserError, match="filter_labels_test.txt line 1: expected the line of a document and the id"
    ):
        stages.data.run(stages.data.Config(run=run, corpus=str(corpus), vocab=150))
