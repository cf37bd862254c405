"""A yardstick without training: which label texts share the most telling words with a document?

    python -m variants.lexical --run runs/demo

Reads    RUN/data.npz (the labels' texts, too)
Writes   RUN/lexical/    predictions.npz, predictions.val.npz

Documents and label texts are TF-IDF vectors of word pieces, as in stage 2, and the score of a label
is their cosine. A dual encoder (variants/unidec.py) compares the same two texts, and has to beat
this: where it does not, it has learnt less than a count of words knows.

It also shows why labels known beforehand are taken out of the rankings. In the demo, one document
in five is a label itself. Its own text is nearest to it, and is never right. So the figures are
printed with it and without it.

Shapes   N documents, B documents of a batch, L labels, V word pieces, k labels predicted, M more
"""

import time

import numpy as np

from plumbing.cli import main
from plumbing.errors import UserError
from plumbing.known_labels import most_known, without_known
from variants import common
from variants.common import Config, stages
from variants.unidec import has_texts

NAME = "lexical"
K = 100
CHUNK = 256  # documents compared with all labels at a time


def nearest(data: stages.data.Data, split: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels (N, k), cosines (N, k)) of the label texts nearest to each document, best first."""
    # How rare a word is, is counted on the training documents.
    vocab = data.meta["vocab_size"]
    _, idf_V = stages.tree.tfidf(data.splits["train"], None, vocab)
    document_NV, _ = stages.tree.tfidf(data.splits[split], idf_V, vocab)
    label_LV, _ = stages.tree.tfidf(data.splits["label"], idf_V, vocab)
    label_VL = label_LV.T.tocsr()
    labels = []
    cosines = []
    for start in range(0, document_NV.shape[0], CHUNK):
        cosine_BL = (document_NV[start : start + CHUNK] @ label_VL).toarray()
        label_Bk = np.argsort(-cosine_BL, axis=1, kind="stable")[:, :k]
        labels.append(label_Bk)
        cosines.append(np.take_along_axis(cosine_BL, label_Bk, axis=1))
    return np.concatenate(labels), np.concatenate(cosines)


def own_label_first(data: stages.data.Data, labels_NM: np.ndarray) -> tuple[int, int]:
    """(test documents whose first label is known of them beforehand, those that have such)."""
    known_NL = data.known["test"]
    first_N = labels_NM[:, 0]
    is_known_N = np.asarray(known_NL[np.arange(len(first_N)), first_N]).ravel()
    has_known_N = np.diff(known_NL.indptr) > 0
    return int(is_known_N.sum()), int(has_known_N.sum())


def folder_name(config: Config) -> str:
    return NAME


@common.owns_its_folder(folder_name)
def run(config: Config) -> None:
    out = common.folder(config.run, NAME, "data.npz")
    data = stages.data.load(out)
    if not has_texts(data):
        raise UserError(
            "the labels of this corpus have no texts to compare documents with; give "
            'labels.jsonl.gz a "text" for each label, and run 01_data.py'
        )
    start = time.perf_counter()
    for split in ("val", "test"):
        # 1. Some more labels than k, so that k are left when what is known has been taken out.
        known = data.known.get(split)
        n_wanted = min(K, len(data.names))
        labels_NM, cosines_NM = nearest(data, split, n_wanted + most_known(known))
        with np.errstate(divide="ignore"):
            scores_NM = np.log(np.clip(cosines_NM, 0, 1))  # the files have exp(score)
        labels_Nk = labels_NM[:, :n_wanted]
        scores_Nk = scores_NM[:, :n_wanted]
        # 2. What is known beforehand is no prediction. First, what it would have spoilt.
        if known is not None:
            if split == "test":
                first, n_own = own_label_first(data, labels_NM)
                right_Nk = stages.train.hits(labels_NM[:, :1], data.splits[split])
                print(
                    f"a document's own label stands first in {first:,} of the {n_own:,} test "
                    f"documents that are labels; P@1 with it {100 * right_Nk.mean():.1f}"
                )
            labels_Nk, scores_Nk = without_known(labels_NM, scores_NM, known, n_wanted)
        # 3. The file, and the metrics without it.
        seconds = time.perf_counter() - start
        common.save_predictions(
            out, data, labels_Nk, scores_Nk, NAME, seconds, made_from=("data.npz",), split=split
        )


if __name__ == "__main__":
    main(run, Config, __doc__)
