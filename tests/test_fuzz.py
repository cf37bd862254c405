"""Corpora that nobody would think of go through all five stages, or are refused with a sentence;
nothing in between.

FUZZ=300 python -m pytest tests/test_fuzz.py -s      more of them than the tests run by default

What is read of a sound corpus is what another reader reads, for every layout that has one:

FUZZ=2000 python -m pytest tests/test_fuzz.py -k another_reader
"""

import csv
import gzip
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from conftest import SMALL, has_exact, stages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import formats
from plumbing.errors import UserError
from plumbing.store import load_npz

PIECES = [
    "",
    " ",
    "\t\n",
    "a",
    "A",
    "word",
    "#",
    "##a",
    "[CLS]",
    "[UNK]",
    "\u0000",
    "\ud800",
    "\u200b",
    "\u202e",
    "ß",
    "日本",
    "🙂",
    "\ufeff",
    "e\u0301",
    "x" * 3000,
    "0" * 70,
    "<s>",
    "\\",
    '"',
    "\x7f",
    "\u2028",
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join) | st.text(max_size=40)
NAME = st.sampled_from(["l0", "l1", "l2", "l3", "l4", "l5", "l6"])
ODD = st.sampled_from(["", " ", "ß 日本", "../l0", "a\nb", "x" * 300, "\ufeff", "🙂"])
GARBAGE = st.sampled_from(
    [None, 7, True, [], {}, {"text": "a"}, {"text": 1, "labels": []}, {"text": "a", "labels": [[]]}]
)
DOCUMENT = st.fixed_dictionaries({"text": TEXT, "labels": st.lists(NAME, max_size=7)})
ROWS = st.lists(DOCUMENT, min_size=1, max_size=10)
found = Counter()


@st.composite
def corpora(draw) -> dict:
    """{file: rows}, most of them sound; the labels come in any number, with any text."""
    names = draw(st.lists(NAME | ODD, min_size=1, max_size=9, unique=draw(st.integers(0, 9)) > 0))
    rows = {split: draw(ROWS) for split in ("train", "val", "test")}
    if draw(st.integers(0, 3)):  # the labels that are used are there
        names += sorted(
            {label for part in rows.values() for row in part for label in row["labels"]}
            - set(names)
        )
    if not draw(st.integers(0, 7)):
        rows[draw(st.sampled_from(sorted(rows)))].append(draw(GARBAGE))
    if draw(st.booleans()):
        del rows["val"]
    return rows | {"labels": [{"name": name, "text": draw(TEXT)} for name in names]}


@given(corpora())
@settings(
    max_examples=int(os.environ.get("FUZZ", 20)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="FUZZ" not in os.environ,
)
def test_any_corpus_goes_through_or_is_refused(rows):
    folder = Path(tempfile.mkdtemp())
    try:
        for name, part in rows.items():
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        run = str(folder / "run")
        try:
            stages.data.run(
                stages.data.Config(run=run, corpus=str(folder), vocab=120, max_tokens=100)
            )
        except UserError as error:
            found[str(error).split(": ", 1)[-1].split("'")[0][:60]] += 1
            assert not (folder / "run" / "data.npz").exists()
            return
        data = stages.data.load(run)
        stages.tree.run(stages.tree.Config(run=run))
        stages.train.run(
            stages.train.Config(run=run, **SMALL | {"tiny": "1,16", "topk": None, "epochs": 1})
        )
        stages.eval.run(stages.eval.Config(run=run, k=5, show=2, exact=has_exact(run)))
        result, _ = load_npz(folder / "run" / "predictions.npz")
        n_labels = len(data.names)
        assert result["labels"].shape == (len(data.splits["test"]), 5)
        assert ((result["labels"] >= 0).sum(axis=1) == min(5, n_labels)).all() and result[
            "labels"
        ].max() < n_labels
        assert np.isfinite(result["scores"][result["labels"] >= 0]).all()
        found["through all five stages"] += 1
    finally:
        shutil.rmtree(folder)


def test_what_the_fuzzing_met():
    """Both ends were met; -s shows the counts."""
    print(json.dumps(found, indent=1))
    assert not found or 0 < found["through all five stages"] < sum(found.values())


# ------------------------------------------------------------------------------ another reader
# Each function below is given documents, writes them as a layout has them, and returns what the
# standard library reads from the bytes: [(text, labels)].


def json_reader(rows, draw):
    ascii_only = draw(st.booleans())
    content = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    read = [json.loads(line) for line in content.split("\n") if line]
    return {"{}.jsonl": content}, [(row["text"], row["labels"]) for row in read]


def csv_reader(rows, draw):
    delimiter = draw(st.sampled_from(",;\t"))
    file = io.StringIO(newline="")
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=quoting)
    writer.writerow(["id", "labels", "text"])
    for i, row in enumerate(rows):
        writer.writerow([i, "|".join(row["labels"]), row["text"]])
    content = file.getvalue()
    read = list(csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter))
    cells = [(row["text"], row["labels"].split("|")) for row in read]
    # The only change: a line end of two characters within a cell becomes one.
    plain = [(text.replace("\r\n", "\n"), labels) for text, labels in cells]
    return {"{}.csv": content}, [(text, [one for one in ls if one]) for text, ls in plain]


def matrix_reader(rows, draw):
    texts = one_line_each(rows)
    ids = [[int(name[1:]) for name in row["labels"]] for row in rows]
    values = [
        [draw(st.sampled_from(["1", "1.0", "0.25", "0", "1e-3"])) for _ in row] for row in ids
    ]
    content = f"{len(rows)} 7\n"
    for row, row_values in zip(ids, values, strict=True):
        content += " ".join(f"{i}:{v}" for i, v in zip(row, row_values, strict=True)) + "\n"
    read = []
    for text, line in zip(texts.split("\n"), content.split("\n")[1 : len(rows) + 1], strict=False):
        elements = [element.split(":") for element in line.split()]
        read.append((text, [int(i) for i, value in elements if float(value) != 0]))
    return {"X.{}.txt": texts, "Y.{}.txt": content}, read


def comma_reader(rows, draw):
    texts = one_line_each(rows)
    named = [[name.replace("l", "label ") for name in row["labels"]] for row in rows]
    named[0] = ["label 0", "label 1"]  # a comma at least, which says how names are separated
    content = "".join(draw(st.sampled_from([",", ", "])).join(row) + "\n" for row in named)
    read = []
    for text, line in zip(texts.split("\n"), content.split("\n")[: len(rows)], strict=False):
        read.append((text, [name.strip() for name in line.split(",") if name]))
    return {"{}_texts.txt": texts, "{}_labels.txt": content}, read


def one_line_each(rows) -> str:
    return "".join(row["text"] + "\n" for row in rows)


READERS = st.sampled_from([json_reader, csv_reader, matrix_reader, comma_reader])
# Characters that a file in UTF-8 may have in a line.
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), max_size=20)


@given(st.data())
@settings(
    max_examples=int(os.environ.get("FUZZ", 60)),
    deadline=None,
    derandomize="FUZZ" not in os.environ,
)
def test_what_is_read_is_what_another_reader_reads(data):
    reader = data.draw(READERS)
    text = PLAIN.map("word ".__add__)
    if reader in (json_reader, csv_reader):
        text |= st.lists(st.sampled_from(["a", '"', ";", ",", "\t", "\n", "\n\n", "\r\n"])).map(
            "".join
        )
    document = st.fixed_dictionaries({"text": text, "labels": st.lists(NAME, max_size=4)})
    rows = data.draw(st.lists(document, min_size=1, max_size=6))
    files, expected = reader(rows, data.draw)
    mark = data.draw(st.sampled_from(["", "\ufeff"]))
    blank = data.draw(st.sampled_from(["", "\n", "\n\n"]))
    zipped = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder:
        for pattern, content in files.items():
            for split in ("train", "test"):
                path = Path(folder) / pattern.format(split)
                raw = (mark + content + blank).encode()
                if zipped:
                    path.with_name(path.name + ".gz").write_bytes(gzip.compress(raw))
                else:
                    path.write_bytes(raw)
        corpus = formats.open_corpus(Path(folder), "|")
        read = [(one.text, one.labels) for one in corpus.documents["train"]()]
    if reader is comma_reader:
        # Nothing counts these documents: blank lines at the end of both files are documents.
        read = read[: len(expected)]
    assert read == expected
