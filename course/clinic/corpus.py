"""The clinic's small corpus: some documents of the corpus that ships, and its most frequent labels.

Of the 14,228 labels of data/debian most are rare, and a few thousand documents teach a model little
about them. So we keep the 256 most frequent ones. Documents that had rare labels alone have no
label now. They stay: real corpora have such documents, too, and one of the bugs is about them.
"""

from collections import Counter
from pathlib import Path

from data import derive

SIZES = {"train": 4000, "val": 400, "test": 600}  # documents of each split
N_LABELS = 256


def make_small_corpus(source: Path, folder: Path, sizes: dict[str, int] = SIZES) -> None:
    """Write the corpus into `folder`, which is not there yet; the files are the same each time."""
    # 1. Some documents, drawn at random, as `python data/derive.py sample` draws them.
    drawn = derive.sample(source, sizes, seed=0)
    # 2. The labels that most of the training documents have. Of two equal ones the earlier goes in.
    count = Counter()
    for row in drawn.documents["train"]:
        count.update(row["labels"])
    ids = range(len(drawn.labels))
    by_count = sorted(ids, key=lambda i: -count[drawn.labels[i][0]])
    kept_ids = sorted(by_count[:N_LABELS])
    labels = [drawn.labels[i] for i in kept_ids]
    # 3. All other labels leave the documents.
    kept_names = {name for name, _ in labels}
    documents = {}
    for split, rows in drawn.documents.items():
        documents[split] = [keep_labels(row, kept_names) for row in rows]
    # 4. The labels have new numbers, in the filter pairs, too.
    new_id = {old: new for new, old in enumerate(kept_ids)}
    known = {}
    for split, pairs in drawn.known.items():
        known[split] = [(line, new_id[label]) for line, label in pairs if label in new_id]
    derive.save(derive.Derived(documents, labels, True, known), folder)


def keep_labels(row: dict, kept_names: set[str]) -> dict:
    """A document with those of its labels that are kept."""
    labels = [name for name in row["labels"] if name in kept_names]
    return {"text": row["text"], "labels": labels}
