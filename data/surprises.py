"""What is legal in a corpus, but often a mistake. Stages 1 and 4 print a line for each.

A corpus without surprises gets no line. Nothing is changed or left out here.

Shapes   N documents of a split, L labels
"""

import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Protocol

import numpy as np

from data import formats

SEPARATORS = ",;|\t"  # what may stand between labels; a name rarely has it
NO_LABELS = {"nan", "none", "null", "n/a", "<na>"}  # what programs write for an empty cell
TABLES = {".jsonl", ".json", ".csv", ".tsv", ".txt", ".npz", ".parquet", ".arrow"}
ENOUGH = 20  # documents: of fewer, a share says little


class Labels(Protocol):
    """The labels of the training documents, as a split of stage 1 has them."""

    labels: np.ndarray  # label ids, one document after the other
    label_offsets: np.ndarray  # (N+1,) where each document begins


def surprises(
    corpus: formats.Corpus, labels: list[tuple[str, str]], train: Labels, folder: str | Path
) -> list[str]:
    """A sentence for each surprise, in the order in which it is found; often there is none."""
    names = [name for name, _ in labels]
    found = [
        lists_in_a_string(names),
        unique_labels(names, train),
        empty_cells(names),
        nearly_the_same(names),
        files_not_read(corpus, Path(folder)),
    ]
    return [sentence for sentence in found if sentence]


def lists_in_a_string(names: list[str]) -> str:
    """Labels such as "['a', 'b']", as pandas writes a list into a cell."""
    lists = [name for name in names if name.startswith("[") and name.endswith("]")]
    if 2 * len(lists) < len(names) or not lists:
        return ""
    return (
        f"{len(lists):,} of {len(names):,} labels look like a list in a string, such as "
        f"{lists[0][:60]!r}; write the names with a separator between them, as a;b"
    )


def unique_labels(names: list[str], train: Labels) -> str:
    """Every document has one label, and most labels are names joined, or occur only once."""
    labels_N = np.diff(train.label_offsets)  # labels of each document
    if len(labels_N) < ENOUGH or not (labels_N == 1).all():
        return ""
    count_L = np.bincount(train.labels, minlength=len(names))  # training documents of each label
    n_unique = int((count_L == 1).sum())
    joined = [name for name in names if any(mark in name for mark in SEPARATORS)]
    sentence = "every training document has exactly one label"
    if 2 * n_unique > len(labels_N):
        sentence += f", and {n_unique:,} labels occur only once"
    if 2 * len(joined) > len(names):
        sentence += f"; is a separator part of their names, as in {joined[0][:60]!r}?"
    return sentence + " (CSV: --separator says what stands between labels)"


def empty_cells(names: list[str]) -> str:
    """Labels such as nan, as programs write an empty cell."""
    empty = [name for name in names if name.casefold() in NO_LABELS]
    if not empty:
        return ""
    return f"the label {empty[0]!r} looks like an empty cell; leave it empty for 'no label'"


def nearly_the_same(names: list[str]) -> str:
    """Names that differ only in upper case, blanks or the form of their characters."""
    alike = defaultdict(set)  # different names by what they have in common
    for name in names:
        # NFKC is the standard form of Unicode: e + accent becomes é.
        plain = unicodedata.normalize("NFKC", name).casefold()
        alike[" ".join(plain.split())].add(name)
    groups = [sorted(group) for group in alike.values() if len(group) > 1]
    if not groups:
        return ""
    return (
        f"{len(groups):,} labels have several spellings, which differ only in upper case, blanks "
        f"or the form of characters, such as {groups[0][0]!r} and {groups[0][1]!r}"
    )


def files_not_read(corpus: formats.Corpus, folder: Path) -> str:
    """Files of the folder that look like a part of the corpus."""
    read = {path.name for path in [*corpus.files, *corpus.known.values()]}
    # A word for a split, or for labels, in the name.
    words = {"label", "labels", "lbl", "filter"}
    for words_of_split in formats.SPLITS.values():
        words.update(words_of_split)
    unread = []
    for path in sorted(folder.iterdir()):
        if path.name in read or path.name.startswith(".") or not path.is_file():
            continue
        is_table = bool(TABLES & set(path.suffixes))
        parts = path.name.lower().replace("-", ".").replace("_", ".").split(".")
        if is_table and words & set(parts):
            unread.append(path.name)
    if not unread:
        return ""
    return (
        f"not read, though the name looks like a part of the corpus: {', '.join(unread[:5])} "
        "(data/formats.py says which files are)"
    )


def tokens_cut(offsets: np.ndarray, room: int) -> list[str]:
    """A sentence, where more than half of the tokens are beyond the `room` of a document.

    `offsets` (N+1,) says where each document's tokens begin.
    """
    tokens_N = np.diff(offsets)
    beyond = (tokens_N - room).clip(0).sum()  # tokens that no document has room for
    share = beyond / max(1, tokens_N.sum())
    if share <= 0.5:
        return []
    return [
        f"{100 * share:.0f}% of the training documents' tokens are beyond --max-len and are not "
        "read; raise it"
    ]
