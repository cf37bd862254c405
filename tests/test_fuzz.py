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
import pandas
import pytest
from conftest import SMALL, has_exact, stages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

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
# Each function below is given documents, writes them as a layout has them, and returns what another
# reader makes of the same bytes: [(text, labels)]. That is pandas where it reads the layout, and
# else a loop that is as plain as the layout.

Read = list[tuple[str, list]]


def json_reader(rows, draw) -> tuple[dict, Read]:
    ascii_only = draw(st.booleans())
    content = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    table = pandas_json(content)
    return {"{}.jsonl": content}, list(zip(table["text"], table["labels"], strict=True))


def pandas_json(content: str) -> pandas.DataFrame:
    """A table of the objects of JSON lines, without pandas' guesses at what a text might mean."""
    return pandas.read_json(io.StringIO(content), lines=True, dtype=False)


def csv_reader(rows, draw) -> tuple[dict, Read]:
    delimiter = draw(st.sampled_from(",;\t"))
    file = io.StringIO(newline="")
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=quoting)
    writer.writerow(["id", "labels", "text"])
    for i, row in enumerate(rows):
        writer.writerow([i, "|".join(row["labels"]), row["text"]])
    content = file.getvalue()
    table = pandas.read_csv(
        io.StringIO(content, newline=""), sep=delimiter, dtype=str, keep_default_na=False
    )
    # The only change: a line end of two characters within a cell becomes one.
    texts = [text.replace("\r\n", "\n") for text in table["text"]]
    labels = [[name for name in cell.split("|") if name] for cell in table["labels"]]
    return {"{}.csv": content}, list(zip(texts, labels, strict=True))


def matrix_reader(rows, draw) -> tuple[dict, Read]:
    texts = one_line_each(rows)
    ids = ids_of(rows)
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


def npz_reader(rows, draw) -> tuple[dict, Read]:
    """A matrix as scipy saves it, of any kind, with zeros in it that are written down."""
    texts = one_line_each(rows)
    values_NL = np.zeros((len(rows), 7), np.float32)
    places = []
    for i, row in enumerate(ids_of(rows)):
        for label in row:
            values_NL[i, label] = draw(st.sampled_from([1, 0.25, 0, -1]))
            places.append((i, label))
    # All places are written, also those whose value is 0.
    at = np.array(places, np.int64).reshape(-1, 2)
    at = np.unique(at, axis=0)
    Y = sparse.coo_matrix((values_NL[at[:, 0], at[:, 1]], (at[:, 0], at[:, 1])), values_NL.shape)
    kind = draw(st.sampled_from(["coo", "csr", "csc", "bsr"]))
    file = io.BytesIO()
    sparse.save_npz(file, Y.asformat(kind), compressed=draw(st.booleans()))
    read = []
    for text, row_L in zip(texts.split("\n"), values_NL, strict=False):
        read.append((text, np.flatnonzero(row_L).tolist()))
    return {"X.{}.txt": texts, "Y.{}.npz": file.getvalue()}, read


def comma_reader(rows, draw) -> tuple[dict, Read]:
    texts = one_line_each(rows)
    named = [[name.replace("l", "label ") for name in row["labels"]] for row in rows]
    named[0] = ["label 0", "label 1"]  # a comma at least, which says how names are separated
    content = "".join(draw(st.sampled_from([",", ", "])).join(row) + "\n" for row in named)
    read = []
    for text, line in zip(texts.split("\n"), content.split("\n")[: len(rows)], strict=False):
        read.append((text, [name.strip() for name in line.split(",") if name]))
    return {"{}_texts.txt": texts, "{}_labels.txt": content}, read


def lf_reader(rows, draw) -> tuple[dict, Read]:
    """Titles and contents, one of which may be missing, and ids of labels."""
    content = ""
    for i, (row, ids) in enumerate(zip(rows, ids_of(rows), strict=True)):
        where = draw(st.sampled_from(["title", "content", "both"]))
        parts = {"title": "", "content": ""}
        for part in parts:
            if where in (part, "both"):
                parts[part] = row["text"]
        more = {"uid": str(i), "target_ind": ids, "target_rel": [1.0] * len(ids)}
        content += json.dumps(parts | more) + "\n"
    labels = "".join(json.dumps({"uid": f"u{i}", "title": f"l{i}"}) + "\n" for i in range(7))
    table = pandas_json(content)
    read = []
    for row in table.itertuples():
        has_both = row.title != "" and row.content != ""
        text = row.title + " " + row.content if has_both else row.title + row.content
        read.append((text, row.target_ind))
    return {"{}.json": content, "lbl.json": labels}, read


def eurlex_reader(rows, draw) -> tuple[dict, Read]:
    """A file for each document, whose parts may be null, and whose body is a list or a string."""
    files = {}
    read = []
    for i, row in enumerate(rows):
        words = row["text"]
        parts = {
            "header": draw(st.sampled_from(["header", "", None])),
            "recitals": draw(st.sampled_from(["recitals " + words, None])),
            "main_body": draw(st.sampled_from(["body", ["body " + words, "more"], [], None])),
            "attachments": words,
            "concepts": row["labels"],
        }
        content = json.dumps(parts, indent=draw(st.sampled_from([None, 1])))
        files[f"{{}}/{i:03}.json"] = content
        again = json.loads(content)
        text = again["header"] or ""
        for key in ("recitals", "main_body", "attachments"):
            value = again[key] or ""
            for paragraph in [value] if isinstance(value, str) else value:
                gap = " " if text and paragraph else ""
                text = text + gap + paragraph
        read.append((text, again["concepts"]))
    return files, read


def ids_of(rows) -> list[list[int]]:
    """The 3 of l3, for every label of every document."""
    return [[int(name[1:]) for name in row["labels"]] for row in rows]


def one_line_each(rows) -> str:
    return "".join(row["text"] + "\n" for row in rows)


QUOTED = (json_reader, csv_reader, lf_reader, eurlex_reader)  # a text may have any character
READERS = (*QUOTED, matrix_reader, npz_reader, comma_reader)
# Characters that a file in UTF-8 may have in a line.
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), max_size=20)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@given(data=st.data())
@settings(
    max_examples=int(os.environ.get("FUZZ", 175)) // len(READERS),
    deadline=None,
    derandomize="FUZZ" not in os.environ,
)
def test_what_is_read_is_what_another_reader_reads(reader, data):
    text = PLAIN.map("word ".__add__)
    if reader in QUOTED:
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
                path.parent.mkdir(exist_ok=True)
                if isinstance(content, bytes):
                    path.write_bytes(content)
                    continue
                raw = (mark + content + blank).encode()
                # The documents of EURLEX57K are looked for by their ending, .json.
                if zipped and reader is not eurlex_reader:
                    path.with_name(path.name + ".gz").write_bytes(gzip.compress(raw))
                else:
                    path.write_bytes(raw)
        corpus = formats.open_corpus(Path(folder), "|")
        read = [(one.text, one.labels) for one in corpus.documents["train"]()]
    if reader is comma_reader:
        # Nothing counts these documents: blank lines at the end of both files are documents.
        read = read[: len(expected)]
    if reader is npz_reader:
        # A matrix has its labels in any order: the order of a file is no information.
        read = [(text, sorted(labels)) for text, labels in read]
    assert read == expected
