"""Which documents make up each split, what is left out, and how often.

A corpus may be larger than the memory. So no text is kept here. We only note which lines belong to
a split, and the documents are read again, one at a time, as often as they are needed.

    documents = Documents(corpus, label_list(corpus, folder), text_limit, drops)
    documents.share_out(val_share, limit, rng)
    for text, label_ids in documents.read("train"):
        ...

Left out of training are documents without text or without labels, and documents beyond a limit.
Validation and test keep every document. `drops` counts, by reason, everything that is left out,
cut or changed.

Shapes   N documents of a split, L labels
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from data import formats
from plumbing.errors import UserError


class Part(NamedTuple):
    """Where the documents of a split are."""

    source: str  # the split whose file is read; "train" for validation documents drawn from it
    lines_N: np.ndarray | None  # int64, ascending: which lines of it, from 0; None: all


class Documents:
    """The documents of a corpus, shared out among the splits.

    `labels` has (name, text) by label id. `text_limit` is how many characters of a document are
    read (0: all). `drops` counts what is left out, cut or changed, and is filled by `share_out` and
    `read`.
    """

    def __init__(
        self,
        corpus: formats.Corpus,
        labels: list[tuple[str, str]],
        text_limit: int,
        drops: Counter,
    ) -> None:
        self.corpus = corpus
        self.labels = labels
        names = [name for name, _ in labels]
        self.label_id = label_ids(corpus, names)
        self.text_limit = text_limit
        self.drops = drops
        self.parts: dict[str, Part] = {}  # by split

    def share_out(self, val_share: float, limit: int, rng: np.random.Generator) -> None:
        """Decide which documents make up each split.

        Without a validation split, `val_share` of the training documents, drawn with `rng`, become
        it. With a `limit` above 0, at most so many of the others, drawn too, are left for training.
        """
        # 1. A split that has a file of its own has all documents of that file.
        for split in ("val", "test"):
            if split in self.corpus.documents:
                self.parts[split] = Part(split, None)

        # 2. The training documents may have to give some to validation. Chance decides which,
        #    since the order in a file may mean something: the year, say. Then they are sorted
        #    again, so that they are read in the order of the file.
        training = self._usable_training_lines()
        if "val" not in self.parts:
            shuffled = rng.permutation(training)
            n_val = max(1, int(len(training) * val_share))
            self.parts["val"] = Part("train", np.sort(shuffled[:n_val]))
            training = np.sort(shuffled[n_val:])

        # 3. The others are for training, or as many of them as the limit allows.
        if 0 < limit < len(training):
            self.drops["training documents beyond --limit, left out"] = len(training) - limit
            shuffled = rng.permutation(training)
            training = np.sort(shuffled[:limit])
        self.parts["train"] = Part("train", training)

    def n_drawn_for_validation(self) -> int:
        """How many training documents became the validation split; 0 where the corpus has one."""
        part = self.parts["val"]
        return 0 if part.lines_N is None else len(part.lines_N)

    def read(self, split: str) -> Iterator[tuple[str, list[int]]]:
        """Yield (text, label ids) of a split's documents, and count what is left out on the way."""
        drawn = self.parts[split].source != split
        # Validation documents that are drawn come from the file of the training documents, so both
        # splits read it. What is left out of it is counted once, when training is read.
        drops = Counter() if drawn else self.drops
        return self._read(split, drops)

    def train_texts(self) -> Iterator[str]:
        """Yield the texts of the training documents; nothing is counted."""
        for text, _ in self._read("train", Counter()):
            yield text

    def label_texts(self) -> Iterator[str]:
        """Yield the labels' own texts."""
        for _, text in self.labels:
            yield formats.encodable(text)

    def known(self, split: str, n_documents: int) -> csr_matrix:
        """(N, L), true where a filter file says that the document's label is known beforehand."""
        source, lines_N = self.parts[split]
        if lines_N is None:  # all documents of the file
            lines_N = np.arange(n_documents)
        path = self.corpus.known.get(source)
        return formats.read_known(path, len(self.labels), lines_N)

    def _read(self, split: str, drops: Counter) -> Iterator[tuple[str, list[int]]]:
        """Yield (text, label ids) of a split's documents; `drops` counts what is left out."""
        source, lines_N = self.parts[split]
        # A set of plain numbers, since it is asked about every line of the file.
        chosen = None if lines_N is None else set(lines_N.tolist())
        documents = read_documents(self.corpus, source, self.label_id, self.text_limit, drops)
        for line, text, ids in documents:
            if chosen is None or line in chosen:
                yield text, ids

    def _usable_training_lines(self) -> np.ndarray:
        """The numbers, from 0, of the training documents with a text and a label."""
        # The file is read to its end, and only the numbers are kept. What is left out here is
        # counted later, when the documents are read for good, so this counter is thrown away.
        not_counted = Counter()
        documents = read_documents(self.corpus, "train", self.label_id, 0, not_counted)
        lines = [line for line, _, _ in documents]
        return np.array(lines, np.int64)


def label_list(corpus: formats.Corpus, folder: str | Path) -> list[tuple[str, str]]:
    """(name, text) of the labels, by label id.

    Without a list in the corpus they are the names found in its documents, in natural order and
    without texts. UserError where such a name cannot be written as UTF-8.
    """
    if corpus.labels is not None:
        return corpus.labels
    # A label counts wherever it occurs: one that only test documents have gets an id, too.
    found = set()
    for read in corpus.documents.values():
        for document in read():
            found.update(document.labels)
    # Sorted, since a set has no order and the ids must be the same in every run.
    names = sorted(found, key=formats.natural_order)
    return [(formats.named(folder, name), "") for name in names]


def label_ids(corpus: formats.Corpus, names: list[str]) -> dict[str, int] | dict[int, int]:
    """The id of a label by what the documents call it: its name, or the id itself."""
    if corpus.by_name:
        return {name: i for i, name in enumerate(names)}
    return {i: i for i in range(len(names))}


def read_documents(
    corpus: formats.Corpus, split: str, label_id: dict, text_limit: int, drops: Counter
) -> Iterator[tuple[int, str, list[int]]]:
    """Yield (line, text, label ids) of the usable documents that the corpus has for a split.

    Lines are numbered from 0. A text is cut to `text_limit` characters (0: whole). Label ids
    ascend, and none comes twice. Training documents without text or labels are left out. `drops`
    counts what is left out or changed. UserError where a label is not in `label_id`.
    """
    for line, document in enumerate(corpus.documents[split]()):
        # 1. From the labels of the corpus, names or ids, to label ids.
        try:
            ids = sorted({label_id[label] for label in document.labels})
        except KeyError as error:
            raise UserError(
                f"{document.where}: label {error} is not among the {len(label_id)} labels; "
                "add it to them"
            ) from None
        n_repeated = len(document.labels) - len(ids)
        drops["labels named twice in one document, taken once"] += n_repeated

        # 2. A tokeniser reads UTF-8, which cannot say half a character. JSON can: it may write a
        #    rare character, such as an emoji, as two halves, and a program may cut between them.
        text = formats.encodable(document.text)
        changed = text != document.text
        drops["texts with half a character, replaced by a question mark"] += changed

        # 3. A model learns nothing from a training document without text or without labels. In the
        #    other splits such a document counts: leaving it out would make the scores look better.
        has_text = bool(document.text.strip())
        if split == "train":
            if not ids:
                drops["training documents without labels, left out"] += 1
                continue
            if not has_text:
                drops["training documents without text, left out"] += 1
                continue
        drops[f"{split} documents without text, kept"] += not has_text

        # 4. The beginning of a text says most about it.
        if text_limit:
            is_cut = len(text) > text_limit
            drops[f"{split} texts cut to {text_limit} characters"] += is_cut
            text = text[:text_limit]
        yield line, text, ids
