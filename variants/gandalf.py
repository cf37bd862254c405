"""Gandalf (Kharbanda et al., 2024): label texts as training documents of a cascade.

    python -m variants.gandalf --run runs/demo
    python -m variants.gandalf --run runs/demo --alone        each text with its own label alone

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt (its settings)
Writes   RUN/gandalf/ (with --alone RUN/gandalf-alone/)    a run folder: model.pt, predictions.npz

A label's own text is a document that nobody had to label: at least this label is correct for it. It
is most worth to rare labels, which have hardly any other document. And labels that often come
together say which others may be correct, too: of the training documents with label l, a share
p(m | l) also has label m. So the text of l is a document whose targets are p(m | l), with p(l | l)
= 1.

What differs from the cascade: the training documents, and nothing else. There are more of them, as
many as labels with a text, so a pass takes longer. Passes, rates and tree are the cascade's. Texts
of labels without a training document are left out: nobody has chosen their place in the tree.

Deviation from the authors: targets of stage 4 are 0 or 1. So each target m is drawn once, with the
probability p(m | l). The loss of a label is linear in its target, so over many labels its mean is
that of soft targets. A cluster is correct if any label below it was drawn, and clusters that are
correct stand first in the shortlist: in this they are not the same. The text of a label with a
single document gets all of this document's labels.

Shapes   N documents, L labels
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, eye_array

from plumbing.cli import flag, main
from variants import common
from variants.common import stages

NAME = "gandalf"


@dataclass(frozen=True)
class Config(common.Config):
    alone: bool = flag(False, "give a label text its own label alone, and none that comes with it")


# 1. The targets of the label texts.


def together(Y_NL: csr_matrix) -> csr_matrix:
    """(L, L): entry l, m is the share of the documents with label l that also have label m."""
    # Pairs of labels in one document, counted. On the diagonal: the documents of a label.
    counts_LL = (Y_NL.T @ Y_NL).tocsr()
    documents_L = counts_LL.diagonal()
    share_L = np.divide(1.0, documents_L, where=documents_L > 0, out=np.zeros(len(documents_L)))
    # Each row over the documents of its label.
    per_row = np.repeat(share_L, np.diff(counts_LL.indptr))
    shares = (counts_LL.data * per_row, counts_LL.indices, counts_LL.indptr)
    return csr_matrix(shares, shape=counts_LL.shape)


def drawn(share_LL: csr_matrix, seed: int) -> csr_matrix:
    """(L, L) 0 or 1: every target drawn once, with its own probability."""
    rng = np.random.default_rng(seed)
    is_target = rng.random(share_LL.nnz) < share_LL.data
    # A copy of the places: taking zeros out moves them, and they belong to share_LL.
    targets_LL = share_LL.copy()
    targets_LL.data = is_target.astype(np.float32)
    targets_LL.eliminate_zeros()
    targets_LL.sort_indices()
    return targets_LL


# 2. The training documents, and the label texts after them.


def grown(data: stages.data.Data, seed: int, alone: bool) -> stages.data.Data:
    """The data with the label texts among the training documents."""
    train = data.splits["train"]
    texts = data.splits["label"]
    n_labels = len(data.names)
    Y_NL = train.label_matrix(n_labels).astype(np.float32)
    # 1. The targets of every label's text.
    if alone:
        targets_LL = csr_matrix(eye_array(n_labels, dtype=np.float32))
    else:
        targets_LL = drawn(together(Y_NL), seed)
    # 2. Which labels have a text and a training document?
    has_text_L = np.diff(texts.offsets) > 0
    has_document_L = np.bincount(train.labels, minlength=n_labels) > 0
    rows = np.flatnonzero(has_text_L & has_document_L)
    chosen = texts.documents(rows)
    targets = targets_LL[rows]
    # 3. These texts stand behind the documents.
    both = stages.data.Split(
        ids=np.concatenate([train.ids, chosen.ids]),
        offsets=joined(train.offsets, chosen.offsets),
        labels=np.concatenate([train.labels, targets.indices.astype(np.int32)]),
        label_offsets=joined(train.label_offsets, targets.indptr),
    )
    n_left_out = n_labels - len(rows)
    print(
        f"{len(rows):,} label texts, with {targets.nnz / max(1, len(rows)):.2f} labels each, join "
        f"{len(train):,} training documents; {n_left_out:,} labels have no text or no document"
    )
    return data._replace(splits={**data.splits, "train": both})


def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Offsets of documents that stand one after the other."""
    return np.concatenate([first, first[-1] + second[1:]])


# 3. Training and testing.


def folder_name(config: Config) -> str:
    return common.name_with(NAME, config, "alone")


@common.owns_its_folder(folder_name)
def run(config: Config) -> None:
    out = common.folder(config.run, folder_name(config), "data.npz", "tree.npz")
    settings = common.cascade_settings(config.run, out)
    common.clear(out)
    data = stages.data.load(out)
    tree = stages.tree.load(out)
    more = grown(data, settings.seed, config.alone)
    stages.train.train(settings, more, tree, stages.model.build)
    # Stage 5 takes the data as they are: propensities and neighbours come from documents alone.
    stages.eval.run(stages.eval.Config(run=str(out)))


if __name__ == "__main__":
    main(run, Config, __doc__)
