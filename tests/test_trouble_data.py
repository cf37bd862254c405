"""Corpora as people have them: what csv, json and scipy let pass without a word is read right, or
refused with its place, or named in one line.

Every corpus is written here, in a few lines, and its labels are told by hand.
"""

import csv
import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import HAS_VARIANTS, ROOT, SMALL, make_corpus, stages
from scipy.sparse import csr_matrix, save_npz

from data import formats, surprises
from data.corpus import label_list
from plumbing.errors import UserError

TEXTS = [f"word{i} thing{i % 3}" for i in range(6)]
JSON_LINES = "".join(json.dumps({"text": text, "labels": ["a"]}) + "\n" for text in TEXTS)


def write(folder, **files):
    """A folder with the files; __ in a name stands for a dot, a value is text or bytes."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("__", ".")).write_bytes(raw)
    return folder


def labels_of(folder, split="train", separator=";") -> list:
    """The labels of each document of a split, by name where the corpus has names."""
    corpus = formats.open_corpus(folder, separator)
    return [document.labels for document in corpus.documents[split]()]


def names_of(folder) -> list[str]:
    return [name for name, _ in label_list(formats.open_corpus(folder), folder)]


def pairs(folder, train: str, test: str = "a\n" * 6, **more):
    """Text pairs with six documents in each split."""
    texts = "".join(text + "\n" for text in TEXTS)
    files = {"train_texts__txt": texts, "test_texts__txt": texts}
    return write(folder, **files, train_labels__txt=train, test_labels__txt=test, **more)


def xy(folder, train, test="6 4\n" + "0:1\n" * 6, **more):
    """The names of the XMC repository with six documents in each split."""
    texts = "".join(text + "\n" for text in TEXTS)
    files = {"X__trn__txt": texts, "X__tst__txt": texts, "Y__tst__txt": test}
    if train is not None:
        files["Y__trn__txt"] = train
    return write(folder, **files, **more)


# --------------------------------------------------------------------------------------------- CSV


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_between_commas_semicolons_or_tabs(tmp_path, delimiter):
    for split in ("train", "test"):
        with open(tmp_path / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["id", "text", "labels"], [1, "one, two; three", "a; b"]])
    assert labels_of(tmp_path) == [["a", "b"]]


def test_blanks_around_names_of_columns_and_labels_do_not_count(tmp_path):
    write(
        tmp_path,
        train__csv="text , labels\none,a ; b\n",
        test__csv="text,labels\none, a\n",
        labels__csv="name,text\n a ,A\nb ,B\n",
    )
    assert names_of(tmp_path) == ["a", "b"]
    assert labels_of(tmp_path) == [["a", "b"]]


def test_a_cell_of_several_lines_is_one_document(tmp_path):
    rows = 'text,labels\n"one\n\ntwo ""quoted""",a\nthree,b\n\n\n'
    write(tmp_path, train__csv=rows, test__csv=rows)
    corpus = formats.open_corpus(tmp_path)
    texts = [document.text for document in corpus.documents["train"]()]
    assert texts == ['one\n\ntwo "quoted"', "three"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('text,labels\n"one,a\ntwo,b\n', "no CSV .unexpected end of data"),
        ('text,labels\n"one"1,a\n', "no CSV"),
        ("text,labels,text\none,a,two\n", "line 1: two columns are called text"),
        ("text|labels\none|a\n", "columns stand between commas, semicolons or tabs"),
        ("text,labels\none,a\n\ntwo,b\n", "line 3: 0 columns, expected 2"),
    ],
)
def test_csv_that_is_refused(tmp_path, rows, said):
    write(tmp_path, train__csv=rows, test__csv=rows)
    with pytest.raises(UserError, match=said):
        labels_of(tmp_path)


# ------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"text": "a", "text": "b", "labels": []}', "the key 'text' comes twice"),
        ('{"text": NaN, "labels": []}', "text must be a string"),
        ('{"text": "a", "labels": [1.0]}', "labels a list of names"),
        ('{"text": "a", "labels": null}', "labels a list of names"),
    ],
)
def test_json_that_is_refused(tmp_path, row, said):
    write(tmp_path, train__jsonl=row + "\n", test__jsonl=JSON_LINES)
    with pytest.raises(UserError, match=f"train.jsonl line 1: .*{said}"):
        labels_of(tmp_path)


def test_a_list_of_labels_with_an_empty_name_is_refused(tmp_path):
    names = '{"name": "a", "text": "A"}\n{"name": " ", "text": "B"}\n'
    write(tmp_path, train__jsonl=JSON_LINES, test__jsonl=JSON_LINES, labels__jsonl=names)
    with pytest.raises(UserError, match="label 2 of the list of labels has an empty name"):
        formats.open_corpus(tmp_path)


@pytest.mark.parametrize("target", ["[-1]", "[0.0]", "[true]", "[9]", '["0"]'])
def test_ids_of_an_lf_data_set_that_are_none(tmp_path, target):
    row = '{"title": "t", "content": "c", "target_ind": %s}\n'
    label = '{"title": "a"}\n'
    write(tmp_path, trn__json=row % target, tst__json=row % "[0]", lbl__json=label)
    config = stages.data.Config(run=str(tmp_path / "run"), corpus=str(tmp_path), vocab=50)
    with pytest.raises(UserError, match="trn.json line 1: "):
        stages.data.run(config)


def test_the_key_of_a_label_twice_in_an_lf_data_set(tmp_path):
    row = '{"title": "t", "content": "c", "target_ind": [0]}\n'
    label = '{"title": "a", "title": "b"}\n'
    write(tmp_path, trn__json=row, tst__json=row, lbl__json=label)
    with pytest.raises(UserError, match="lbl.json line 1: .*'title' comes twice"):
        formats.open_corpus(tmp_path)


# -------------------------------------------------------------------------------------- text pairs


def test_names_of_several_words_stand_between_commas(tmp_path):
    pairs(tmp_path, "deep sea, sky\n" + "sky\n" * 5, "deep sea\n" * 6)
    assert labels_of(tmp_path)[0] == ["deep sea", "sky"]
    assert names_of(tmp_path) == ["deep sea", "sky"]
    assert labels_of(tmp_path, "test")[0] == ["deep sea"]  # commas in one file tell it for all


def test_names_of_several_words_that_are_listed(tmp_path):
    pairs(tmp_path, "deep sea,sky\n" * 6, "sky\n" * 6, label_texts__txt="sky\ndeep sea \n\n")
    assert names_of(tmp_path) == ["sky", "deep sea"]
    assert labels_of(tmp_path)[0] == ["deep sea", "sky"]


@pytest.mark.parametrize("word", ["-1", "1.0", "nan", "1e3", "²", "9" * 5000])
def test_a_word_that_is_no_id_is_named_with_its_line(tmp_path, word):
    train = "0\n1\n" + word + "\n" + "0\n" * 3
    pairs(tmp_path, train, "0\n" * 6, label_texts__txt="a\nb\n")
    with pytest.raises(UserError, match="train_labels.txt line 3: expected ids"):
        labels_of(tmp_path)


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_other_line_ends(tmp_path, end):
    pairs(tmp_path, ("a" + end) * 6, "a\n" * 6)
    if end == "\r":
        with pytest.raises(UserError, match="train_labels.txt line 1: a line end of another kind"):
            labels_of(tmp_path)
    else:
        assert labels_of(tmp_path) == [["a"]] * 6


def test_utf_16_without_a_mark_is_refused(tmp_path):
    pairs(tmp_path, "a\n" * 6)
    texts = "".join(text + "\n" for text in TEXTS)
    (tmp_path / "train_texts.txt").write_bytes(texts.encode("utf-16-le"))
    with pytest.raises(UserError, match="train_texts.txt line 1: a NUL byte"):
        labels_of(tmp_path)


def test_a_list_in_other_line_ends_is_refused(tmp_path):
    pairs(tmp_path, "0\n" * 6, "0\n" * 6, label_texts__txt="a\rb\r")
    with pytest.raises(UserError, match="label_texts.txt line 1: a line end of another kind"):
        formats.open_corpus(tmp_path)


def test_labels_that_end_too_soon_are_refused_and_blank_lines_at_the_end_are_not(tmp_path):
    pairs(tmp_path, "a\n" * 6 + "\n\n")
    assert labels_of(tmp_path) == [["a"]] * 6
    pairs(tmp_path, "a\n" * 5)
    with pytest.raises(UserError, match="train_texts.txt has more lines than"):
        labels_of(tmp_path)


# ------------------------------------------------------------------------- files of the repository


def test_ids_of_a_matrix_in_text_stay_what_they_are(tmp_path):
    xy(tmp_path, "6 5\n" + "0:1.0 4:1.0\n" * 6)
    assert names_of(tmp_path) == ["0", "1", "2", "3", "4"]
    assert labels_of(tmp_path)[0] == [0, 4]


def test_ids_of_a_matrix_without_a_header_stay_what_they_are(tmp_path):
    xy(tmp_path, "2:1 0:1\n" * 6, "7:1\n" * 6)
    assert names_of(tmp_path) == [str(i) for i in range(8)]
    assert labels_of(tmp_path)[0] == [2, 0]


def test_a_value_of_zero_is_no_label(tmp_path):
    xy(tmp_path, "6 4\n" + "0:0 1:0.0 2:0.5\n" * 6)
    assert labels_of(tmp_path)[0] == [2]


def test_a_zero_that_a_saved_matrix_stores_is_no_label(tmp_path):
    xy(tmp_path, None)
    Y = csr_matrix((np.array([0.0, 1.0]), np.array([0, 2]), [0, 2, 2, 2, 2, 2, 2]), shape=(6, 4))
    save_npz(tmp_path / "Y.trn.npz", Y)
    assert labels_of(tmp_path) == [[2], [], [], [], [], []]


@pytest.mark.parametrize("column", [-1, 4])
def test_a_saved_matrix_with_places_outside_is_refused(tmp_path, column):
    xy(tmp_path, None)
    Y = csr_matrix((np.ones(1), np.array([0]), [0, 1, 1, 1, 1, 1, 1]), shape=(6, 4))
    Y.indices[0] = column
    save_npz(tmp_path / "Y.trn.npz", Y)
    with pytest.raises(UserError, match="Y.trn.npz cannot be read"):
        formats.open_corpus(tmp_path)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("7 4\n" + "0:1\n" * 6, "the header says 7 documents, but 6 lines follow"),
        ("6 4\n" + "0:x\n" * 6, "line 2: expected a label and its value such as 7:1.0"),
        ("6 999999999999\n" + "0:1\n" * 6, "labels in a label matrix, expected"),
    ],
)
def test_a_matrix_in_text_that_is_refused(tmp_path, train, said):
    xy(tmp_path, train)
    with pytest.raises(UserError, match=said):
        labels_of(tmp_path)


def test_a_label_beyond_the_header_is_refused(tmp_path):
    xy(tmp_path, "6 4\n" + "4:1\n" * 6)
    config = stages.data.Config(run=str(tmp_path / "run"), corpus=str(tmp_path), vocab=50)
    with pytest.raises(UserError, match="Y.trn.txt line 2: label 4 is not among the 4 labels"):
        stages.data.run(config)


def test_blank_lines_at_the_end_of_both_files_are_no_document(tmp_path):
    xy(tmp_path, "6 4\n" + "0:1\n" * 5 + "\n\n")
    with open(tmp_path / "X.trn.txt", "a") as file:
        file.write("\n")
    assert labels_of(tmp_path) == [[0]] * 5 + [[]]


def test_a_header_above_documents_without_labels(tmp_path):
    xy(tmp_path, "6 4\n" + "0:1\n" * 6, "6 9\n" + "\n" * 7)
    assert labels_of(tmp_path, "test") == [[]] * 6
    assert len(names_of(tmp_path)) == 9


def test_features_of_labels_are_not_their_names(tmp_path):
    xy(tmp_path, "6 4\n" + "0:1\n" * 6, Yf__txt="4 9\n" + "3:0.25 8:1e-2\n" * 4)
    corpus = formats.open_corpus(tmp_path)
    assert names_of(tmp_path) == ["0", "1", "2", "3"]
    assert corpus.notes == ("Yf.txt has features of labels, not names, and is left out",)


def test_features_of_documents_are_not_their_texts(tmp_path):
    xy(tmp_path, "6 4\n" + "0:1\n" * 6)
    (tmp_path / "X.trn.txt").write_text("6 9\n" + "3:0.25\n" * 6)
    with pytest.raises(UserError, match="X.trn.txt has features of documents"):
        formats.open_corpus(tmp_path)


def test_the_file_names_of_deepxml(tmp_path):
    texts = "".join(text + "\n" for text in TEXTS)
    files = {"trn_X__txt": texts, "tst_X__txt": texts}
    files |= {"trn_X_Y__txt": "6 2\n" + "1:1\n" * 6, "tst_X_Y__txt": "6 2\n" + "0:1\n" * 6}
    write(tmp_path, **files, Y__txt="first name\nsecond name\n")
    assert names_of(tmp_path) == ["first name", "second name"]
    assert labels_of(tmp_path) == [[1]] * 6


# -------------------------------------------------------------------------- folders and file names


def test_every_word_for_validation_is_read(tmp_path):
    write(tmp_path, train__jsonl=JSON_LINES, test__jsonl=JSON_LINES)
    for word in ("val", "dev", "valid", "validation"):
        path = tmp_path / f"{word}.jsonl"
        path.write_text(JSON_LINES)
        assert len(labels_of(tmp_path, "val")) == 6
        path.unlink()


def test_laws_beside_files_that_macos_leaves(tmp_path):
    law = {"header": "h", "recitals": None, "main_body": ["b"], "attachments": "", "concepts": []}
    for split in ("train", "test"):
        write(tmp_path / split, law__json=json.dumps(law | {"concepts": ["12"]}))
        write(tmp_path / split, **{"__" + "_law__json": b"\x00\x05\x16\x07\xff"})
        write(tmp_path / split, **{"__DS_Store": b"\x00\x00"})
    assert (tmp_path / "train" / "._law.json").is_file()
    assert labels_of(tmp_path) == [["12"]]


def test_a_law_that_is_no_utf_8_is_named(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split, one__json='{"header": "\xe9"}'.encode("latin-1"))
    with pytest.raises(UserError, match="one.json line 1: no UTF-8"):
        labels_of(tmp_path)


def test_a_separator_has_to_be_something(tmp_path):
    write(tmp_path, train__csv="text,labels\na,b\n", test__csv="text,labels\na,b\n")
    with pytest.raises(UserError, match="--separator is empty"):
        formats.open_corpus(tmp_path, "")


def test_an_installed_package_of_the_same_name_does_not_win(tmp_path):
    names = ["data", "tools", "bench"]
    if HAS_VARIANTS:
        names.append("variants")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    code = f"import {', '.join(names)}; print(data.__file__)"
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, '.');" + code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("data/__init__.py"), done.stderr
    assert str(tmp_path) not in done.stdout


def test_stage_3_with_a_single_document(tmp_path, capsys):
    one = JSON_LINES.splitlines(keepends=True)[0]
    write(tmp_path, train__jsonl=one, val__jsonl=one, test__jsonl=one)
    run = str(tmp_path / "run")
    stages.data.run(stages.data.Config(run=run, corpus=str(tmp_path), vocab=50))
    stages.tree.run(stages.tree.Config(run=run))
    stages.model.run(stages.model.Config(run=run, tiny="1,16"))
    assert "a batch of 1 documents" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- surprises


def surprises_of(folder, tmp_path, capsys) -> str:
    """The surprises that stage 1 prints."""
    config = stages.data.Config(run=str(tmp_path / "run"), corpus=str(folder), vocab=200)
    stages.data.run(config)
    lines = capsys.readouterr().out.splitlines()
    return "\n".join(line for line in lines if line.startswith("surprise: "))


def table(folder, cells: list[str]):
    rows = [["text", "labels"]] + [[f"word{i} thing", cell] for i, cell in enumerate(cells)]
    folder.mkdir()
    for split in ("train", "val", "test"):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


SURPRISES = [
    ("lists", [f"['a{i}', 'b']" for i in range(30)], "look like a list in a string"),
    ("another separator", [f"a{i},b{i % 5}" for i in range(30)], "is a separator part of their"),
    ("single labels", [f"a{i % 7}" for i in range(30)], "has exactly one label (CSV"),
    ("unique labels", [f"a{i}" for i in range(30)], "30 labels occur only once"),
    ("empty cells", ["a;b", "nan", "b"] * 10, "the label 'nan' looks like an empty cell"),
    ("upper case", ["a;b", "A", "b"] * 10, "such as 'A' and 'a'"),
    ("blanks", ["a b;c", "a  b", "b"] * 10, "such as 'a  b' and 'a b'"),
    ("Unicode forms", ["\u00e9;c", "e\u0301", "b"] * 10, "1 labels have several spellings"),
]


@pytest.mark.parametrize(("cells", "said"), [case[1:] for case in SURPRISES])
def test_a_surprise_is_said(tmp_path, capsys, cells, said):
    assert said in surprises_of(table(tmp_path / "corpus", cells), tmp_path, capsys)


def test_a_corpus_without_surprises_gets_no_line(tmp_path, capsys):
    corpus = make_corpus(tmp_path / "corpus")
    (corpus / "README.txt").write_text("where it is from")
    assert surprises_of(corpus, tmp_path, capsys) == ""
    assert (
        surprises_of(table(tmp_path / "table", ["a;b", "a", "[x]; c"] * 10), tmp_path, capsys) == ""
    )


@pytest.mark.parametrize("name", ["train.jsonl.gz", "valid.jsonl", "test.csv", "trn_X_Xf.txt"])
def test_files_that_are_not_read_are_named(tmp_path, capsys, name):
    """Among them a second spelling of a file: train.jsonl is read, and train.jsonl.gz is not."""
    rows = "".join(
        json.dumps({"text": f"word{i}", "labels": ["a", "b"][: 1 + i % 2]}) + "\n" for i in range(6)
    )
    corpus = write(tmp_path / "c", train__jsonl=rows, val__jsonl=rows, test__jsonl=rows)
    (corpus / name).write_bytes(gzip.compress(rows.encode()))
    said = surprises_of(corpus, tmp_path, capsys)
    assert f"looks like a part of the corpus: {name} (" in said


@pytest.mark.parametrize(("max_len", "is_said"), [(5, True), (32, False)])
def test_most_tokens_beyond_max_len(prepared, capsys, max_len, is_said):
    settings = SMALL | {"epochs": 1, "max_len": max_len}
    stages.train.run(stages.train.Config(run=str(prepared), **settings))
    said = "of the training documents' tokens are beyond --max-len"
    assert (said in capsys.readouterr().out) == is_said


@pytest.mark.parametrize(("room", "n_sentences"), [(3, 1), (4, 0), (5, 0)])
def test_more_than_half_of_the_tokens(room, n_sentences):
    """Documents of 2 and 10 tokens: of these 12, 7, 6 or 5 are beyond the room."""
    assert len(surprises.tokens_cut(np.array([0, 2, 12]), room)) == n_sentences
