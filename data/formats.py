"""How corpora lie on disk. A folder is recognised by what is in it, and every layout gives the same: a Corpus.

    JSON lines    train.jsonl  test.jsonl  [val.jsonl]  [labels.jsonl]     {"text", "labels": [names]}; {"name", "text"}
    CSV           train.csv  test.csv  [val.csv]  [labels.csv]             columns text, labels; name, text
    text pairs    train_texts.txt | train_raw_texts.txt | X.trn.txt        a document a line
                  train_labels.txt | Y.trn.npz | Y.trn.txt                 its labels: names, or ids from 0
                  [label_texts.txt | output-items.txt | Yf.txt]            a label a line
    LF data sets  trn.json  tst.json  lbl.json                             uid, title, content, target_ind
    EURLEX57K     train/*.json  test/*.json  [dev/*.json]  [EURLEX57K.json]    as its authors publish it

What ends in .jsonl, .json, .csv or .txt may be gzipped. A split for validation is called val, dev or valid. Text pairs
for testing are called test_... or ....tst.... With any of them may come filter_labels_{train,val,test}.txt: pairs of a
document's line and a label id, both from 0, that are known beforehand and no prediction. Every complaint names file and
line.
"""

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix, load_npz

from plumbing.errors import UserError

LONGEST = 2**28  # bytes of a line: more than that is no document
SPLITS = {"train": ("train", "trn"), "val": ("val", "dev", "valid"), "test": ("test", "tst")}


class Document(NamedTuple):
    where: str  # file and line
    text: str
    labels: list  # names, or ids from 0


class Corpus(NamedTuple):
    """What there is to read."""

    layout: str
    documents: dict[str, Callable[[], Iterator[Document]]]  # by split: train, test, perhaps val
    labels: list[tuple[str, str]] | None  # (name, text) by id; None: whatever the documents have
    by_name: bool  # whether the documents have the labels' names, or their ids
    known: dict[str, Path]  # files with known pairs, by split
    files: list[Path]


def open_corpus(folder: Path, separator: str = ";") -> Corpus:
    """The corpus in a folder. `separator` stands between the labels in a CSV column. UserError when it is of no known
    layout, or of one with a part missing."""
    for recognise in (json_lines, comma_separated, text_pairs, lf, eurlex):
        corpus = recognise(folder, separator)
        if corpus is None:
            continue
        for split in ("train", "test"):
            if split not in corpus.documents:
                raise UserError(f"{folder} looks like {corpus.layout}, but has no {split} split; data/formats.py says "
                                "what is expected")
        if corpus.labels is not None and not corpus.labels:
            raise UserError(f"{folder}: the file of the labels has none, expected at least one")
        counts = Counter(name for name, _ in corpus.labels or () if corpus.by_name)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise UserError(f"{folder}: labels named more than once: {', '.join(map(repr, twice[:3]))}")
        return corpus
    found = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
    raise UserError(f"--corpus {folder}: no corpus is recognised, found {found or 'nothing'}; expected train.jsonl.gz "
                    "and test.jsonl.gz, or one of the other layouts in data/formats.py")


def one_of(folder: Path, *names: str) -> Path | None:
    """The first of the files that is there, as it is or gzipped."""
    paths = (folder / (name + end) for name in names for end in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def by_split(folder: Path, *patterns: str) -> dict[str, Path]:
    """{split: the first file that is there}; {} in a pattern stands for the split's name."""
    paths = {split: one_of(folder, *(pattern.format(word) for pattern in patterns for word in words))
             for split, words in SPLITS.items()}
    return {split: path for split, path in paths.items() if path}


def known_pairs(folder: Path) -> dict[str, Path]:
    return by_split(folder, "filter_labels_{}.txt")


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(file and line number, the line without its end) of a text file in UTF-8, gzipped or not."""
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            while line := file.readline(LONGEST):
                number += 1
                if len(line) == LONGEST:
                    raise UserError(f"{path} line {number}: longer than {LONGEST >> 20} MiB")
                yield f"{path} line {number}", line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} line {number}: no UTF-8 ({error})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read after line {number}: {error}") from None


def read_json(where: str, text: str, *keys: str) -> list:
    """The values of some keys of a JSON object."""
    try:
        row = json.loads(text)
        return [row[key] for key in keys]
    except (KeyError, TypeError):
        raise UserError(f"{where}: expected an object with {', '.join(keys)}: {text[:80]!r}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON ({error})") from None


def document(where: str, text, labels, kind: type) -> Document:
    """UserError unless the text is a string and the labels are a list of `kind`."""
    if not isinstance(text, str) or not isinstance(labels, list) or not all(type(label) is kind for label in labels):
        what = {str: "names", int: "ids"}[kind]
        raise UserError(f"{where}: text must be a string and labels a list of {what}, found {text!r:.40} and "
                        f"{labels!r:.40}")
    return Document(where, text, labels)


def json_lines(folder: Path, separator: str) -> Corpus | None:
    paths, labels = by_split(folder, "{}.jsonl"), one_of(folder, "labels.jsonl")
    if not paths and not labels:
        return None

    def read(path: Path) -> Iterator[Document]:
        return (document(where, *read_json(where, line, "text", "labels"), str) for where, line in lines(path))

    def label(where: str, line: str) -> tuple[str, str]:
        name, text = read_json(where, line, "name", "text")
        return named(where, name), document(where, text, [], str).text

    return Corpus("JSON lines", {split: partial(read, path) for split, path in paths.items()},
                  [label(*line) for line in lines(labels)] if labels else None, True, known_pairs(folder),
                  [*paths.values(), *([labels] if labels else [])])


def named(where: str, name) -> str:
    """A label's name, which has to survive being written as UTF-8."""
    if not isinstance(name, str) or name != encodable(name):
        raise UserError(f"{where}: name and text must be strings of whole characters, found {name!r:.40}")
    return name


def encodable(text: str) -> str:
    """The text with what UTF-8 cannot say, half a surrogate pair, as question marks."""
    return text.encode("utf-8", "replace").decode()


def comma_separated(folder: Path, separator: str) -> Corpus | None:
    paths, labels = by_split(folder, "{}.csv"), one_of(folder, "labels.csv")
    if not paths:
        return None
    csv.field_size_limit(LONGEST)

    def rows(path: Path, *columns: str) -> Iterator[tuple[str, list[str]]]:
        reader = csv.reader(line + "\n" for _, line in lines(path))
        try:
            header = next(reader, [])
            if missing := [column for column in columns if column not in header]:
                raise UserError(f"{path} line 1: no column {', '.join(missing)} among {header}")
            places = [header.index(column) for column in columns]
            for row in reader:
                if len(row) != len(header):
                    raise UserError(f"{path} line {reader.line_num}: {len(row)} columns, expected {len(header)}")
                yield f"{path} line {reader.line_num}", [row[place] for place in places]
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num}: no CSV ({error})") from None

    def read(path: Path) -> Iterator[Document]:
        for where, (text, names) in rows(path, "text", "labels"):
            yield Document(where, text, [name.strip() for name in names.split(separator) if name.strip()])

    return Corpus("CSV", {split: partial(read, path) for split, path in paths.items()},
                  [(name, text) for _, (name, text) in rows(labels, "name", "text")] if labels else None, True,
                  known_pairs(folder), [*paths.values(), *([labels] if labels else [])])


def text_pairs(folder: Path, separator: str) -> Corpus | None:
    texts = by_split(folder, "{}_texts.txt", "{}_raw_texts.txt", "X.{}.txt")
    if not texts:
        return None
    of = by_split(folder, "{}_labels.txt", "Y.{}.npz", "Y.{}.txt")
    if missing := sorted(set(texts) - set(of)):
        raise UserError(f"{folder}: {texts[missing[0]].name} has no labels beside it, such as {missing[0]}_labels.txt")
    names = one_of(folder, "label_texts.txt", "output-items.txt", "Yf.txt")
    labels = [(line, line) for _, line in lines(names)] if names else None
    matrices = {split: matrix(path) for split, path in of.items() if path.suffix == ".npz"}
    if matrices and labels is None:
        labels = [(str(i), "") for i in range(max(Y.shape[1] for Y in matrices.values()))]
    # With a list of the labels numbers are ids; without one they are names.
    by_name = labels is None or not matrices and not all(
        word.isdecimal() for split in texts for _, row in label_lines(of[split]) for word in row)

    def read(split: str) -> Iterator[Document]:
        rows = ((f"{of[split]} row {i + 1}", row) for i, row in enumerate(matrix_rows(matrices[split]))
                ) if split in matrices else label_lines(of[split])
        for text, row in zip_longest(lines(texts[split]), rows):
            if text is None or row is None:
                longer, shorter = (texts[split], of[split]) if row is None else (of[split], texts[split])
                raise UserError(f"{longer} has more lines than {shorter}, which ends before {(text or row)[0]}")
            yield Document(row[0], text[1], row[1] if split in matrices or by_name else [int(word) for word in row[1]])

    return Corpus("text pairs", {split: partial(read, split) for split in texts}, labels, by_name, known_pairs(folder),
                  [*texts.values(), *of.values(), *([names] if names else [])])


def label_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(file and line, words) of labels as words between blanks or commas. In Y....txt "7:1" stands for 7, and a first
    line with the numbers of documents and labels is left out."""
    is_matrix, header = path.name.startswith("Y."), None
    if is_matrix:
        first, count = next(lines(path), ("", ""))[1].split(), sum(1 for _ in lines(path))
        header = 0 if len(first) == 2 and first[0] == str(count - 1) else None
    for i, (where, line) in enumerate(lines(path)):
        if i != header:
            yield where, [word.split(":")[0] if is_matrix else word for word in line.replace(",", " ").split()]


def matrix(path: Path) -> csr_matrix:
    """A label matrix as scipy saves it; no pickles."""
    try:
        return csr_matrix(load_npz(path))
    except Exception as error:  # there is nothing that a damaged file may not raise
        raise UserError(f"{path} cannot be read: {error}") from None


def matrix_rows(Y: csr_matrix) -> Iterator[list[int]]:
    return (Y.indices[a:b].tolist() for a, b in zip(Y.indptr, Y.indptr[1:], strict=False))


def lf(folder: Path, separator: str) -> Corpus | None:
    paths, labels = by_split(folder, "{}.json"), one_of(folder, "lbl.json")
    if not labels:
        return None

    def read(path: Path) -> Iterator[Document]:
        for where, line in lines(path):
            title, content, labels = read_json(where, line, "title", "content", "target_ind")
            yield document(where, joined([title, content]), labels, int)

    def label(where: str, line: str) -> tuple[str, str]:
        title = named(where, read_json(where, line, "title")[0])
        return title, title

    return Corpus("an LF data set", {split: partial(read, path) for split, path in paths.items()},
                  [label(*line) for line in lines(labels)], False, known_pairs(folder), [*paths.values(), labels])


def joined(parts: Iterable) -> str:
    """What there is of some texts, with a blank between them."""
    return " ".join(part for part in parts if isinstance(part, str) and part)


def eurlex(folder: Path, separator: str) -> Corpus | None:
    folders = {split: next((folder / word for word in words if (folder / word).is_dir()), None)
               for split, words in SPLITS.items()}
    files = {split: sorted(path.glob("*.json")) for split, path in folders.items() if path and any(path.glob("*.json"))}
    if not files:
        return None

    def read(split: str) -> Iterator[Document]:
        for path in files[split]:
            keys = ("header", "recitals", "main_body", "attachments", "concepts")
            header, recitals, body, attachments, concepts = read_json(str(path), path.read_text("utf-8-sig"), *keys)
            text = joined([header, recitals, *(body if isinstance(body, list) else [body]), attachments])
            yield document(str(path), text, concepts, str)

    names = one_of(folder, "EURLEX57K.json") or one_of(folder.parent, "EURLEX57K.json")
    labels = None
    if names:
        used = {label for split in files for _, _, labels in read(split) for label in labels}
        try:
            described = json.loads(names.read_bytes())
            labels = [(concept, described[concept]["label"]) for concept in sorted(used, key=natural_order)]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{names}: expected an object with a label for each concept ({error!r})") from None
    return Corpus("EURLEX57K", {split: partial(read, split) for split in files}, labels, True, known_pairs(folder),
                  [path for paths in files.values() for path in paths])


def natural_order(name: str) -> tuple:
    """A key that sorts numbers as numbers, before everything else."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def read_known(path: Path | None, n_labels: int, lines_N: np.ndarray) -> csr_matrix:
    """(N, L), true where a filter file says that a label is known of the document that stands in line lines_N[i]."""
    pairs = []
    for where, line in lines(path) if path else ():
        words = line.split()
        if len(words) != 2 or not all(word.isdecimal() for word in words) or int(words[1]) >= n_labels:
            raise UserError(f"{where}: expected the line of a document and the id of one of {n_labels} labels, found "
                            f"{line[:40]!r}")
        pairs.append((int(words[0]), int(words[1])))
    rows, labels = np.array(pairs, np.int64).reshape(-1, 2).T
    shape = max(rows.max(initial=-1), lines_N.max(initial=-1)) + 1, n_labels
    known = csr_matrix((np.ones(len(rows), bool), (rows, labels.astype(np.int32))), shape=shape)
    return known[lines_N].sorted_indices()
