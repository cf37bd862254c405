"""How corpora lie on disk. A folder is recognised by its files, and every layout gives a Corpus.

    JSON lines    train.jsonl  test.jsonl  [val.jsonl]  [labels.jsonl]
                  a document a line: {"text", "labels": [names]}; a label a line: {"name", "text"}
    CSV           train.csv  test.csv  [val.csv]  [labels.csv]
                  columns text, labels; name, text
                  between the columns stand commas, semicolons or tabs
    text pairs    train_texts.txt | train_raw_texts.txt | X.trn.txt | trn_X.txt
                  a document a line
                  train_labels.txt | Y.trn.npz | Y.trn.txt | trn_X_Y.txt
                  its labels: names, or ids
                  [label_texts.txt | output-items.txt | Yf.txt | Y.txt]
                  a label a line
    LF data sets  trn.json  tst.json  lbl.json
                  a document a line: uid, title, content, target_ind
    EURLEX57K     train/*.json  test/*.json  [dev/*.json]  [EURLEX57K.json]
                  as its authors publish it

Files that end in .jsonl, .json, .csv or .txt may be gzipped. Ids are counted from 0. A split for
validation is called val, dev, valid or validation. Blank lines at the end of a file are left out.
Text pairs for testing are called test_... or ....tst....
Any layout may have filter_labels_{train,val,test}.txt: pairs of a document's line and a label id,
both from 0. These labels are known beforehand, and they are never predicted. Every error names the
file and the line.

Shapes   N documents of a split, L labels
"""

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix, load_npz

from plumbing.errors import UserError

LONGEST = 2**28  # bytes of a line: more than that is no document
MOST_LABELS = 10**8  # a label matrix that is said to have more is a mistake
DELIMITERS = (",", ";", "\t")  # what may stand between the columns of a CSV file
SPARSE = re.compile(r"\d+:[-+.\deE]+")  # an element of a sparse matrix, such as 7:1.0
SPLITS = {  # the words for a split in the names of files
    "train": ("train", "trn"),
    "val": ("val", "dev", "valid", "validation"),
    "test": ("test", "tst"),
}


class Document(NamedTuple):
    """A document as the corpus has it."""

    where: str  # file and line
    text: str
    labels: list  # names, or ids from 0


class Corpus(NamedTuple):
    """What there is to read."""

    layout: str
    documents: dict[str, Callable[[], Iterator[Document]]]  # by split: train, test, perhaps val
    labels: list[tuple[str, str]] | None  # (name, text) by id; None: the documents alone have them
    by_name: bool  # whether the documents have the labels' names, or their ids
    known: dict[str, Path]  # files with known pairs, by split
    files: list[Path]  # the files with documents and labels
    notes: tuple[str, ...] = ()  # what is worth knowing about how it is read


def open_corpus(folder: Path, separator: str = ";") -> Corpus:
    """The corpus in a folder. `separator` stands between the labels in a CSV column.

    UserError when it is of no known layout, or of one with a part missing.
    """
    if not separator:
        raise UserError("--separator is empty; give it what stands between labels, such as ';'")
    # Each of these functions returns None where the folder is not of its layout. The first that
    # finds its files wins.
    for recognise in (json_lines, comma_separated, text_pairs, lf, eurlex):
        corpus = recognise(folder, separator)
        if corpus is not None:
            check(corpus, folder)
            return corpus
    # None of them did: say what is there instead.
    found = "no such folder"
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        found = names[:8] or "nothing"
    raise UserError(
        f"--corpus {folder}: no corpus is recognised, found {found}; expected train.jsonl.gz and "
        "test.jsonl.gz, or one of the other layouts in data/formats.py"
    )


def check(corpus: Corpus, folder: Path) -> None:
    """UserError unless it has training and test documents, and labels that are told apart."""
    # 1. Without one of these splits, the later stages have nothing to train on or to measure.
    for split in ("train", "test"):
        if split not in corpus.documents:
            raise UserError(
                f"{folder} looks like {corpus.layout}, but has no {split} split; data/formats.py "
                "says what is expected"
            )
    # 2. The list of labels, where there is one.
    if corpus.labels is None:
        return
    if not corpus.labels:
        raise UserError(f"{folder}: the file of the labels has none, expected at least one")
    # 3. Where documents name their labels, a label needs a name, and one of its own.
    if corpus.by_name:
        empty = [i for i, (name, _) in enumerate(corpus.labels, 1) if not name.strip()]
        if empty:
            raise UserError(f"{folder}: label {empty[0]} of the list of labels has an empty name")
        counts = Counter(name for name, _ in corpus.labels)
        twice = [repr(name) for name, count in counts.items() if count > 1]
        if twice:
            some = ", ".join(twice[:3])
            raise UserError(f"{folder}: labels named more than once: {some}")


# ------------------------------------------------------------------------------------ finding files


def one_of(folder: Path, *names: str) -> Path | None:
    """The first of the files that is there, as it is or gzipped."""
    for name in names:
        for path in (folder / name, folder / (name + ".gz")):
            if path.is_file():
                return path
    return None


def by_split(folder: Path, *patterns: str) -> dict[str, Path]:
    """{split: the first file that is there}; {} in a pattern stands for the split's name."""
    found = {}
    for split, words in SPLITS.items():
        # Every pattern with every word for the split, such as train_texts.txt and trn_texts.txt.
        names = []
        for pattern in patterns:
            names.extend(pattern.format(word) for word in words)
        path = one_of(folder, *names)
        if path:
            found[split] = path
    return found


def known_pairs(folder: Path) -> dict[str, Path]:
    """The filter files, by split."""
    return by_split(folder, "filter_labels_{}.txt")


def readers(read: Callable, sources: dict) -> dict[str, Callable[[], Iterator[Document]]]:
    """{split: a function without arguments that reads its documents from the first to the last}."""
    # A function, and no list of documents: a corpus may not fit into memory, and it is read more
    # than once.
    return {split: partial(read, source) for split, source in sources.items()}


# ------------------------------------------------------------------- lines, and what stands in them


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (file and line number, line) of a text file in UTF-8, gzipped or not.

    A line comes without its end. UserError where the file cannot be read.
    """
    open_file = gzip.open if path.suffix == ".gz" else open
    number = 0  # of the line that was read last, for the errors
    try:
        with open_file(path, "rb") as file:
            # At most LONGEST bytes at a time: a file without line ends would fill the memory.
            while line := file.readline(LONGEST):
                number += 1
                if len(line) == LONGEST:
                    raise UserError(f"{path} line {number}: longer than {LONGEST >> 20} MiB")
                # Some programs begin a file with a byte order mark, which is no part of the text.
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                # UTF-16 has a NUL byte in every other place, and would pass for UTF-8.
                if b"\0" in line:
                    raise UserError(f"{path} line {number}: a NUL byte, so this is no UTF-8")
                yield f"{path} line {number}", line.decode(encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} line {number}: no UTF-8 ({error})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read after line {number}: {error}") from None


def filled_lines(path: Path) -> Iterator[tuple[str, str]]:
    """As `lines`, without the blank lines at the end of the file."""
    blank = []  # lines that may be the last ones
    for where, line in lines(path):
        # A tab counts as something: it may stand between two empty cells of a table.
        if not line.strip(" "):
            blank.append((where, line))
            continue
        # Something follows the blank lines, so they are not the end.
        yield from blank
        blank = []
        yield where, line


def unique_keys(pairs: list[tuple]) -> dict:
    """A JSON object; ValueError where a key comes twice: json itself would keep the last alone."""
    row = dict(pairs)
    if len(row) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} comes twice in an object")
    return row


def read_json(where: str, text: str, *keys: str) -> list:
    """The values of some keys of a JSON object; UserError where it is none, or one is missing."""
    try:
        row = json.loads(text, object_pairs_hook=unique_keys)
        return [row[key] for key in keys]
    except (KeyError, TypeError):
        expected = ", ".join(keys)
        raise UserError(f"{where}: expected an object with {expected}: {text[:80]!r}") from None
    except (ValueError, RecursionError) as error:  # RecursionError: brackets thousands deep
        raise UserError(f"{where}: no JSON ({error})") from None


def document(where: str, text, labels, kind: type) -> Document:
    """UserError unless the text is a string and the labels are a list of `kind`, str or int."""
    # We ask for the type itself, not with isinstance: in Python, True is an int, too.
    is_sound = isinstance(text, str) and isinstance(labels, list)
    if not is_sound or not all(type(label) is kind for label in labels):
        expected = "names" if kind is str else "ids"
        raise UserError(
            f"{where}: text must be a string and labels a list of {expected}, found {text!r:.40} "
            f"and {labels!r:.40}"
        )
    return Document(where, text, labels)


def named(where: str | Path, name) -> str:
    """A label's name, which has to survive being written as UTF-8."""
    if not isinstance(name, str) or name != encodable(name):
        raise UserError(
            f"{where}: name and text must be strings of whole characters, found {name!r:.40}"
        )
    return name


def encodable(text: str) -> str:
    """The text with what UTF-8 cannot say, half a surrogate pair, as question marks."""
    return text.encode("utf-8", "replace").decode()


def joined(parts: Iterable) -> str:
    """The texts that are there and not empty, with a blank between them."""
    return " ".join(part for part in parts if isinstance(part, str) and part)


def is_number(word: str) -> bool:
    """Whether a word is a whole number from 0 that fits into 64 bits."""
    # Longer ones are no ids, and of thousands of digits Python makes no number.
    return word.isdecimal() and len(word) <= 18


def natural_order(name: str) -> tuple:
    """A key that sorts numbers as numbers, before everything else: 9, 10, then a."""
    # Tuples are compared from the left. The name comes last, since 7 and 07 are the same number.
    if is_number(name):
        return 0, int(name), name
    return 1, 0, name


# --------------------------------------------------------------------------------------- JSON lines


def json_lines(folder: Path, separator: str) -> Corpus | None:
    """A document and a label are a JSON object each."""
    paths = by_split(folder, "{}.jsonl")
    labels_path = one_of(folder, "labels.jsonl")
    if not paths and not labels_path:
        return None

    def read(path: Path) -> Iterator[Document]:
        for where, line in filled_lines(path):
            text, labels = read_json(where, line, "text", "labels")
            yield document(where, text, labels, str)

    # The labels. Without a list of them, stage 1 collects the names that the documents have.
    labels = None
    files = list(paths.values())
    if labels_path:
        labels = []
        files.append(labels_path)
        for where, line in filled_lines(labels_path):
            name, text = read_json(where, line, "name", "text")
            checked = document(where, text, [], str)  # an error, unless the text is a string
            labels.append((named(where, name), checked.text))
    return Corpus(
        layout="JSON lines",
        documents=readers(read, paths),
        labels=labels,
        by_name=True,
        known=known_pairs(folder),
        files=files,
    )


# ---------------------------------------------------------------------------------------------- CSV


def comma_separated(folder: Path, separator: str) -> Corpus | None:
    """Documents and labels are rows of a CSV file; `separator` stands between the labels."""
    paths = by_split(folder, "{}.csv")
    labels_path = one_of(folder, "labels.csv")
    if not paths:
        return None
    csv.field_size_limit(LONGEST)  # the default, 128 KiB, is less than a long document

    def read(path: Path) -> Iterator[Document]:
        for where, (text, cell) in csv_rows(path, "text", "labels"):
            # "a; b;" has two labels: nothing stands behind the last separator.
            names = [name.strip() for name in cell.split(separator)]
            names = [name for name in names if name]
            yield Document(where, text, names)

    # The labels, as for JSON lines.
    labels = None
    files = list(paths.values())
    if labels_path:
        # Names are stripped, as they are in the documents.
        rows = csv_rows(labels_path, "name", "text")
        labels = [(name.strip(), text) for _, (name, text) in rows]
        files.append(labels_path)
    return Corpus(
        layout="CSV",
        documents=readers(read, paths),
        labels=labels,
        by_name=True,
        known=known_pairs(folder),
        files=files,
    )


def csv_rows(path: Path, *columns: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (file and line number, values of the columns); the first line names the columns."""
    # A cell may hold line ends, which filled_lines() takes off, so we put them back. Strict: a
    # quotation mark without its partner would make one cell of the rest of the file.
    delimiter = delimiter_of(path, columns)
    text_lines = (line + "\n" for _, line in filled_lines(path))
    reader = csv.reader(text_lines, delimiter=delimiter, strict=True)
    try:
        # 1. Where are the columns? The file may have them in any order, and others beside them.
        header = [name.strip() for name in next(reader, [])]
        for column in columns:
            if header.count(column) > 1:
                raise UserError(f"{path} line 1: two columns are called {column}")
        missing = [column for column in columns if column not in header]
        if missing:
            raise UserError(
                f"{path} line 1: no column {', '.join(missing)} among {header}; columns stand "
                "between commas, semicolons or tabs"
            )
        places = [header.index(column) for column in columns]
        # 2. The rows. One may take several lines of the file, and the last of them is named.
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if len(row) != len(header):
                raise UserError(f"{where}: {len(row)} columns, expected {len(header)}")
            yield where, [row[place] for place in places]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: no CSV ({error})") from None


def delimiter_of(path: Path, columns: tuple[str, ...]) -> str:
    """What stands between the columns: the first delimiter that makes the header name them."""
    for _, line in lines(path):
        for delimiter in DELIMITERS:
            header = [name.strip(' "') for name in line.split(delimiter)]
            if set(columns) <= set(header):
                return delimiter
        break
    return ","


# --------------------------------------------------------------------------------------- text pairs


def text_pairs(folder: Path, separator: str) -> Corpus | None:
    """The texts are in one file, a document a line, and their labels in another.

    AttentionXML, LightXML and PECOS publish their data so. The files are named in several ways, and
    labels are written in several ways, so we look at what the files hold.
    """
    # 1. The files: every split with texts needs labels, too.
    text_paths = by_split(folder, "{}_texts.txt", "{}_raw_texts.txt", "X.{}.txt", "{}_X.txt")
    if not text_paths:
        return None
    label_paths = by_split(folder, "{}_labels.txt", "Y.{}.npz", "Y.{}.txt", "{}_X_Y.txt")
    for split in sorted(set(text_paths) - set(label_paths)):
        raise UserError(
            f"{folder}: {text_paths[split].name} has no labels beside it, such as "
            f"{split}_labels.txt"
        )
    # The XMC repository uses some of these names for features, too: numbers instead of words.
    for path in text_paths.values():
        if has_features(path):
            raise UserError(f"{path} has features of documents, as 7:0.5; expected their texts")

    # 2. Which labels are there? They are listed in a file, or they are the columns of the matrices.
    labels = None
    notes = []
    files = [*text_paths.values(), *label_paths.values()]
    names_path = one_of(folder, "label_texts.txt", "output-items.txt", "Yf.txt", "Y.txt")
    if names_path and has_features(names_path):
        notes.append(f"{names_path.name} has features of labels, not names, and is left out")
        files.append(names_path)
        names_path = None
    if names_path:
        labels = listed_names(names_path)
        files.append(names_path)
    matrices = {}
    for split, path in label_paths.items():
        if path.suffix == ".npz":
            matrices[split] = matrix(path)
    if labels is None:
        n_labels = columns_of_all(matrices, label_paths)
        if n_labels is not None:
            labels = [(str(i), "") for i in range(n_labels)]

    # 3. With a list of the labels, numbers are ids. Without one, they are names. A word such as -1
    #    is neither, and makes no names of the numbers beside it.
    text_labels = [label_paths[split] for split in text_paths if split not in matrices]
    commas = any(has_commas(path) for path in text_labels)
    by_name = labels is None
    if labels is not None and not matrices:
        names = {name for name, _ in labels}
        by_name = any(has_names(path, names, commas) for path in text_labels)
    if by_name and commas:
        notes.append("commas stand between the labels, so that names may have blanks in them")

    # 4. Texts and labels are read side by side.
    def read(split: str) -> Iterator[Document]:
        label_path = label_paths[split]
        if split in matrices:
            rows = matrix_rows(label_path, matrices[split])
        elif by_name:
            rows = label_lines(label_path, commas)
        else:
            rows = id_lines(label_path)
        return side_by_side(text_paths[split], label_path, rows)

    return Corpus(
        layout="text pairs",
        documents=readers(read, {split: split for split in text_paths}),
        labels=labels,
        by_name=by_name,
        known=known_pairs(folder),
        files=files,
        notes=tuple(notes),
    )


def listed_names(path: Path) -> list[tuple[str, str]]:
    """(name, text) of the labels of a file with a label a line; they are the same."""
    labels = []
    for where, line in filled_lines(path):
        if "\r" in line:
            raise other_line_ends(where)
        name = line.strip()
        labels.append((name, name))
    return labels


def other_line_ends(where: str) -> UserError:
    """The error for CR alone, which old programs write for the end of a line."""
    return UserError(f"{where}: a line end of another kind (CR alone); expected LF or CR LF")


def has_features(path: Path) -> bool:
    """Whether a file has a sparse matrix, as 7:0.5 12:1.0, where words are expected."""
    # The first line may be a header with two numbers, so the second one is looked at, too.
    first_lines = [line.split() for _, (_, line) in zip(range(2), lines(path), strict=False)]
    sparse = [bool(words) and all(map(SPARSE.fullmatch, words)) for words in first_lines]
    has_two_numbers = first_lines and list(map(is_number, first_lines[0])) == [True, True]
    if has_two_numbers:
        return sparse[-1]
    return bool(sparse) and all(sparse)


def columns_of_all(matrices: dict[str, csr_matrix], paths: dict[str, Path]) -> int | None:
    """How many labels the label matrices have; None where there are none, or one has names."""
    counts = [Y.shape[1] for Y in matrices.values()]
    for path in paths.values():
        if path.suffix == ".npz":
            continue
        columns = columns_in_text(path)
        if columns is not None:
            counts.append(columns)
        elif not matrices:
            return None  # beside a matrix, names would be no labels of it: they are refused later
    n_labels = max(counts)
    if n_labels > MOST_LABELS:
        raise UserError(f"{n_labels:,} labels in a label matrix, expected {MOST_LABELS:,} at most")
    return n_labels


def columns_in_text(path: Path) -> int | None:
    """How many labels the matrix in a text file has; None where it is no matrix of numbers."""
    if not is_matrix(path):
        return None
    header = header_of(path)
    if header:
        return header[1]
    # Without a header, the largest id is the last label.
    last = -1
    for _, words in label_lines(path):
        if not all(map(is_number, words)):
            return None
        last = max([last, *map(int, words)])
    return last + 1


def side_by_side(
    text_path: Path, label_path: Path, rows: Iterator[tuple[str, list]]
) -> Iterator[Document]:
    """Yield a document for each line of texts and row of labels; both have the same number."""
    # zip_longest gives None for the one that has come to its end. If one file is shorter, lines got
    # lost somewhere, and texts would get the labels of others. Blank lines at the end are no harm.
    is_over = False  # whether one of the files has come to its end
    for text_line, row in zip_longest(lines(text_path), rows):
        if row is None:
            is_over = True
            if text_line[1].strip():
                raise more_lines(text_path, label_path, text_line[0])
        elif text_line is None:
            is_over = True
            if row[1] or label_path.suffix == ".npz":
                raise more_lines(label_path, text_path, row[0])
        if not is_over:
            where, labels = row
            yield Document(where, text_line[1], labels)


def more_lines(longer: Path, shorter: Path, where: str) -> UserError:
    """The error that says which of two files has ended too soon, and where in the other."""
    return UserError(f"{longer} has more lines than {shorter}, which ends before {where}")


def has_commas(path: Path) -> bool:
    """Whether commas stand between the labels in a file."""
    return any("," in line for _, line in lines(path))


def has_names(path: Path, names: set[str], commas: bool) -> bool:
    """Whether a file has labels that are no numbers, and are names of the list."""
    for _, words in label_lines(path, commas):
        if any(not is_number(word) and word in names for word in words):
            return True
    return False


def id_lines(path: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield (file and line, label ids)."""
    for where, words in label_lines(path):
        wrong = [word for word in words if not is_number(word)]
        if wrong:
            raise UserError(
                f"{where}: expected ids of labels, or names of the list, found {wrong[0][:40]!r}"
            )
        yield where, [int(word) for word in words]


def label_lines(path: Path, commas: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Yield (file and line, words) of labels as words between blanks or commas.

    `commas`: the labels are names between commas, and a name may have blanks. In a matrix,
    Y....txt, "7:1" stands for 7, "7:0" for no label, and a first line with the numbers of documents
    and labels is left out.
    """
    has_values = is_matrix(path)
    header = header_of(path) if has_values else None
    for i, (where, line) in enumerate(lines(path)):
        if header and i == 0:
            continue
        if header and i > header[0] and not line.strip():
            return  # only blank lines are left
        if "\r" in line:
            raise other_line_ends(where)
        if commas:
            names = [name.strip() for name in line.split(",")]
            words = [name for name in names if name]
        else:
            words = line.replace(",", " ").split()
        if has_values:
            words = [column_of(where, word) for word in words if not is_zero(word)]
        yield where, words


def is_matrix(path: Path) -> bool:
    """Whether a file of labels is a sparse matrix, by its name."""
    return path.name.startswith("Y.") or "_X_Y." in path.name


def is_zero(word: str) -> bool:
    """Whether an element of a sparse matrix, such as 7:0.0, says that there is no label."""
    return re.fullmatch(r"\d+:0+(\.0*)?", word) is not None


def column_of(where: str, word: str) -> str:
    """The 7 in 7:1.0. A value counts only in that it is not 0, but it has to be a number."""
    column, colon, _ = word.partition(":")
    if colon and not SPARSE.fullmatch(word):
        raise UserError(f"{where}: expected a label and its value such as 7:1.0, found {word!r}")
    return column


def header_of(path: Path) -> tuple[int, int] | None:
    """The numbers of documents and labels in the first line of a matrix; None: it has no such line.

    UserError where there are two such numbers, and the count of documents is wrong.
    """
    words = []  # of the first line
    count = 0  # lines of the file
    filled = 0  # the number of the last line that is not blank
    has_values = False  # whether elements have values, as 7:1.0: the first line is no document then
    for _, line in lines(path):
        count += 1
        if count == 1:
            words = line.split()
        if ":" in line:
            has_values = True
        if line.strip():
            filled = count
    if len(words) != 2 or not all(map(is_number, words)):
        return None

    # A line of two labels looks the same. So only a count that is right makes it a header. Blank
    # lines at the end are documents without labels, or they mean nothing.
    n_documents, n_labels = map(int, words)
    is_right = n_documents in (count - 1, filled - 1)
    if has_values or filled == 1:  # filled == 1: no document has a label
        is_right = filled - 1 <= n_documents <= count - 1
    if is_right:
        return n_documents, n_labels
    if has_values:
        raise UserError(
            f"{path} line 1: the header says {n_documents} documents, but {count - 1} lines follow"
        )
    return None


def matrix(path: Path) -> csr_matrix:
    """A label matrix (N, L) as scipy saves it; no pickles."""
    try:
        Y = csr_matrix(load_npz(path))
        Y.check_format(full_check=True)  # whether its places are inside the matrix
        Y.eliminate_zeros()  # a zero that is written down is no label
        return Y
    except Exception as error:  # there is nothing that a damaged file may not raise
        raise UserError(f"{path} cannot be read: {error}") from None


def matrix_rows(path: Path, Y: csr_matrix) -> Iterator[tuple[str, list[int]]]:
    """Yield (file and row from 1, label ids) of a label matrix."""
    # A sparse matrix has the columns of all rows one after the other in `indices`, and `indptr`
    # says where each row begins.
    for i, (start, end) in enumerate(pairwise(Y.indptr), 1):
        yield f"{path} row {i}", Y.indices[start:end].tolist()


# ------------------------------------------------------------------------------------- LF data sets


def lf(folder: Path, separator: str) -> Corpus | None:
    """Documents have the ids of their labels, under target_ind; labels have a title alone.

    LF means label features: these data sets have texts for their labels, too.
    """
    paths = by_split(folder, "{}.json")
    labels_path = one_of(folder, "lbl.json")
    if not labels_path:
        return None

    def read(path: Path) -> Iterator[Document]:
        for where, line in filled_lines(path):
            title, content, labels = read_json(where, line, "title", "content", "target_ind")
            text = joined([title, content])
            yield document(where, text, labels, int)

    # A title is both the name of a label and its text. Some titles occur twice, and it does no
    # harm, since the documents have ids.
    labels = []
    for where, line in filled_lines(labels_path):
        (title,) = read_json(where, line, "title")
        labels.append((named(where, title), title))
    return Corpus(
        layout="an LF data set",
        documents=readers(read, paths),
        labels=labels,
        by_name=False,
        known=known_pairs(folder),
        files=[*paths.values(), labels_path],
    )


# ---------------------------------------------------------------------------------------- EURLEX57K


def eurlex(folder: Path, separator: str) -> Corpus | None:
    """A document is a file of its own, in the folder of its split."""
    files = eurlex_files(folder)
    if not files:
        return None

    def read(split: str) -> Iterator[Document]:
        for path in files[split]:
            yield eurlex_document(path)

    # Its labels are concepts of EuroVoc, the thesaurus of the European Union. A document has their
    # numbers. Their names stand in a file of their own, in the folder or beside it.
    labels = None
    names_path = one_of(folder, "EURLEX57K.json") or one_of(folder.parent, "EURLEX57K.json")
    if names_path:
        # Which concepts do the documents have? To know it, all of them are read once.
        used = set()
        for split in files:
            for each in read(split):
                used.update(each.labels)
        labels = eurlex_labels(names_path, used)
    all_files = []
    for paths in files.values():
        all_files.extend(paths)
    return Corpus(
        layout="EURLEX57K",
        documents=readers(read, {split: split for split in files}),
        labels=labels,
        by_name=True,
        known=known_pairs(folder),
        files=all_files,
    )


def eurlex_files(folder: Path) -> dict[str, list[Path]]:
    """{split: its files, one for each document, sorted by name}."""
    found = {}
    for split, words in SPLITS.items():
        # The first word for the split that names a folder: dev, for validation.
        folders = [folder / word for word in words if (folder / word).is_dir()]
        # A folder gives its files in no order, so they are sorted: every machine has the same.
        # An archive made on macOS has a file ._NAME.json beside each, with no document in it.
        found_files = sorted(folders[0].glob("*.json")) if folders else []
        paths = [path for path in found_files if not path.name.startswith(".")]
        if paths:
            found[split] = paths
    return found


def eurlex_document(path: Path) -> Document:
    """The parts of a document, in their order, are its text."""
    content = "\n".join(line for _, line in lines(path))
    header, recitals, body, attachments, concepts = read_json(
        str(path),
        content,
        "header",
        "recitals",
        "main_body",
        "attachments",
        "concepts",
    )
    # The main body is a list of paragraphs, the other parts are strings. Any of them may be null.
    paragraphs = body if isinstance(body, list) else [body]
    text = joined([header, recitals, *paragraphs, attachments])
    return document(str(path), text, concepts, str)


def eurlex_labels(path: Path, used: set[str]) -> list[tuple[str, str]]:
    """(concept, its label) of the concepts that documents have: the file has many more."""
    try:
        content = "\n".join(line for _, line in lines(path))
        described = json.loads(content)
        concepts = sorted(used, key=natural_order)
        return [(concept, described[concept]["label"]) for concept in concepts]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected an object with a label for each concept ({error!r})"
        ) from None


# ------------------------------------------------------------------------------------- filter files


def read_known(path: Path | None, n_labels: int, lines_N: np.ndarray) -> csr_matrix:
    """(N, L), true where a filter file says that a label of a document is known.

    Document i of the split stands in line lines_N[i] of the corpus, from 0. Without a file (None)
    nothing is known. UserError where a line of the file is no pair of such numbers.
    """
    # 1. The pairs in the file.
    rows = []
    labels = []
    for where, line in filled_lines(path) if path else ():
        words = line.split()
        are_numbers = len(words) == 2 and all(map(is_number, words))
        if not are_numbers or int(words[1]) >= n_labels:
            raise UserError(
                f"{where}: expected the line of a document and the id of one of {n_labels} labels, "
                f"found {line[:40]!r}"
            )
        rows.append(int(words[0]))
        labels.append(int(words[1]))

    # 2. A matrix with a row for every line that occurs, in the file or in the split.
    last_in_file = max(rows, default=-1)
    last_in_split = lines_N.max(initial=-1)
    last_line = max(last_in_file, last_in_split)
    places = (np.array(rows, np.int64), np.array(labels, np.int32))
    ones = np.ones(len(rows), bool)
    known = csr_matrix((ones, places), shape=(last_line + 1, n_labels))
    # 3. The rows of the split are taken out, in its order.
    known_NL = known[lines_N]
    return known_NL.sorted_indices()
