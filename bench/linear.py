"""What linear models reach on the documents of a run: the baselines for the cascade.

    python bench/linear.py --run runs/demo                         one-vs-rest; no other library
    python bench/linear.py --run runs/demo --system xr-linear      by PECOS
    python bench/linear.py --run runs/demo --system parabel        by Omikuji; so is bonsai
    python bench/linear.py --run runs/demo --max-len 64           the tokens that the cascade reads
    python bench/linear.py --run runs/mine --text words            words of the corpus, not tokens

Reads    RUN/data.npz; with --text words, also the corpus that it was made from
Writes   RUN/linear-SYSTEM[-words][-MAX_LEN]/    data.npz (a link), predictions.npz and
                                                 predictions.val.npz, as stage 5 writes them

Then `python -m tools.compare RUN RUN/linear-one-vs-rest` is a paired bootstrap of the two.

All systems read the same TF-IDF matrix, whose rows have length 1. With `tokens` it is the one of
stage 2: it counts the token ids that the cascade reads, too. With `words` it is the usual one of
linear models: lower case, words of two characters or more that at least three training documents
have, (1 + ln count) (1 + ln((N + 1) / (documents with the word + 1))).

    one-vs-rest   for each label, min_w |w|^2 / 2 + C sum_i max(0, 1 - y_i w.x_i)^2 with C = 1 and
                  x = [TF-IDF ; 1]; every label is scored (DiSMEC: Babbar and Schoelkopf, WSDM 2017)
    xr-linear     such SVMs for the nodes of a label tree, each trained on the documents that belong
                  to its parent; PECOS' own settings, beam 10 (Yu et al., JMLR 2022)
    parabel       three balanced binary trees; Omikuji's own settings, beam 10
                  (Prabhu et al., WWW 2018)
    bonsai        three trees of depth three with 100 children to a node, not balanced; otherwise as
                  parabel (Khandagale, Xiao and Babbar, 2020)

The scores of one-vs-rest are 1 / (1 + exp(-margin)): they have the order of the margins and are no
calibrated probabilities. A label without a training document is not predicted by one-vs-rest.
Its weights are kept as one dense array of 4 V L bytes; trained are a thousand labels at a time.
CPU seconds are those of all threads; Omikuji's include the file that it reads the documents from.
Left out here: the choice of C, stop words, n-grams and stems. Some published figures use them.

Shapes   N documents, L labels, V words or tokens (+ 1 for the bias), F labels trained at once,
         k labels predicted, K the same and as many more as may be known beforehand
"""

import re
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import machine, stages
from scipy.sparse import csr_matrix, diags_array, hstack

from data import formats
from data.corpus import read_documents
from plumbing.cli import flag, main, natural, positive, settings
from plumbing.errors import UserError
from plumbing.known_labels import most_known, without_known
from plumbing.store import save_npz
from variants import common as variants

SPLITS = ("train", "val", "test")
SYSTEMS = ("one-vs-rest", "xr-linear", "parabel", "bonsai")
INSTALL = {
    "xr-linear": "pip install --no-deps libpecos==1.2.8 && pip install scikit-learn",
    "parabel": "pip install omikuji==0.5.2",
    "bonsai": "pip install omikuji==0.5.2",
}
BEAM = 10  # nodes that a tree keeps at each level
MIN_DF = 3  # training documents that have a word, at least
C = 1.0  # weight of the loss against |w|^2 / 2
TOLERANCE = 0.1  # liblinear's, for this solver
PASSES = 100  # over the documents, at most
CHUNK = 1024  # labels that are trained at the same time
ROWS = 256  # documents whose labels are scored at the same time

# (labels (N, k), scores (N, k)) of documents (N, V), best first; -1 and 0 where there are fewer.
Predict = Callable[[csr_matrix, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of a run, of which only data.npz is needed")
    system: str = flag("one-vs-rest", ", ".join(SYSTEMS))
    text: str = flag("tokens", "what TF-IDF counts: tokens (of data.npz) or words (of the corpus)")
    corpus: str = flag("", "folder of the corpus, for --text words (default: as data.npz says)")
    max_len: int = flag(0, "cut documents as stage 4 does with it (0: all tokens stored)", natural)
    k: int = flag(100, "labels to predict for each document", positive)
    seed: int = flag(0, "seed of the order of the documents in one-vs-rest", natural)


# --------------------------------------------------------------------------------------- documents


def cut(split: stages.data.Split, room: int) -> stages.data.Split:
    """The same documents with their first `room` tokens."""
    length_N = np.minimum(np.diff(split.offsets), room)
    # The tokens of all documents stand in one flat array: `place` is where those that stay are.
    _, _, place = stages.data.flatten(split.offsets[:-1], length_N)
    offsets = np.append(0, np.cumsum(length_N))
    return stages.data.Split(split.ids[place], offsets, split.labels, split.label_offsets)


def read_features(data: stages.data.Data, config: Config) -> dict[str, csr_matrix]:
    """{split: TF-IDF (N, V)}: what every system reads."""
    if config.text == "words":
        return word_features(data, config.corpus)
    return token_features(data, config.max_len)


def token_features(data: stages.data.Data, max_len: int) -> dict[str, csr_matrix]:
    """{split: TF-IDF (N, V)} of the token ids in data.npz."""
    splits = {name: data.splits[name] for name in SPLITS}
    if max_len:
        # Some of a document's max_len tokens are special ones; stage 4 leaves this room.
        room = max_len - len(data.meta["prefix"]) - len(data.meta["suffix"])
        if room < 1:
            raise UserError(f"--max-len {max_len} leaves no room for a text; raise it")
        splits = {name: cut(split, room) for name, split in splits.items()}
    # How rare a word is (idf) is counted on the training documents. The others are new documents,
    # about which nothing may be known.
    vocab = data.meta["vocab_size"]
    found = {}
    found["train"], idf_V = stages.tree.tfidf(splits["train"], None, vocab)
    for name in ("val", "test"):
        found[name], _ = stages.tree.tfidf(splits[name], idf_V, vocab)
    return found


def word_features(data: stages.data.Data, folder: str) -> dict[str, csr_matrix]:
    """{split: TF-IDF (N, V)} of the words in the corpus."""
    texts = read_texts(data, folder)

    # 1. The vocabulary is that of the training documents, by first occurrence.
    column: dict[str, int] = {}
    for text in texts["train"]:
        for word in words(text):
            column.setdefault(word, len(column))
    counts = {name: count(texts[name], column) for name in texts}

    # 2. Rare words say nothing about new documents. A row has a word once, so how often the word
    #    stands among the columns is the number of documents that have it: df.
    df_V = np.bincount(counts["train"].indices, minlength=len(column))
    kept = np.flatnonzero(df_V >= MIN_DF)
    idf_V = 1 + np.log((1 + len(texts["train"])) / (1 + df_V[kept]))
    idf_VV = diags_array(idf_V.astype(np.float32))

    # 3. Counts become weights. By the logarithm, the tenth occurrence adds less than the second.
    found = {}
    for name in texts:
        X_NV = counts[name][:, kept]
        X_NV.data = 1 + np.log(X_NV.data)
        found[name] = stages.tree.normalize(X_NV @ idf_VV)
    return found


def words(text: str) -> list[str]:
    """The words of two characters or more, in lower case."""
    return re.findall(r"\b\w\w+\b", text.lower())


def count(texts: list[str], column: dict[str, int]) -> csr_matrix:
    """(N, V) float32: how often a text has a word; words without a column are left out."""
    # An array of plain numbers: a list would take several times the memory.
    indices = array("i")
    indptr = array("q", [0])
    for text in texts:
        for word in words(text):
            if word in column:
                indices.append(column[word])
        indptr.append(len(indices))
    # Each occurrence is an entry 1 in its document's row; equal ones are added up.
    ones = np.ones(len(indices), np.float32)
    X_NV = csr_matrix(
        (ones, np.frombuffer(indices, np.int32), np.frombuffer(indptr, np.int64)),
        shape=(len(texts), len(column)),
    )
    X_NV.sum_duplicates()
    return X_NV


def read_texts(data: stages.data.Data, folder: str) -> dict[str, list[str]]:
    """{split: texts} of the very documents that data.npz holds, in its order.

    What stage 1 chose is chosen again, with the settings in data.npz. The labels must come out the
    same, or this is another corpus.
    """
    settings = data.meta["config"]
    folder = folder or settings["corpus"]
    corpus = formats.open_corpus(Path(folder), settings["separator"])
    # 1. Documents name their labels or give their ids. A label's id is its place in the names.
    label_id = {}
    for i, name in enumerate(data.names):
        label_id[name if corpus.by_name else i] = i

    # 2. All usable documents, as (text, labels).
    def documents(split: str) -> list[tuple[str, list[int]]]:
        drops = Counter()  # stage 1 has printed what is left out
        source = read_documents(corpus, split, label_id, settings["text_limit"], drops)
        return [(text, labels) for _, text, labels in source]

    rows = {split: documents(split) for split in SPLITS if split in corpus.documents}

    # 3. Those that stage 1 chose, and the check that they are the same.
    share_out(rows, settings)
    for split, found in rows.items():
        expected = data.splits[split]
        labels = []
        for _, labels_of_document in found:
            labels.extend(labels_of_document)
        if len(found) != len(expected) or not np.array_equal(labels, expected.labels):
            raise UserError(
                f"--corpus {folder}: its {split} documents are not those of data.npz; "
                "name the corpus that 01_data.py read, as it was then"
            )
    return {split: [text for text, _ in found] for split, found in rows.items()}


def share_out(rows: dict[str, list[tuple[str, list[int]]]], settings: dict) -> None:
    """Choose the documents for validation and training as stage 1 does. Changes `rows`.

    The numbers must be drawn in the same order as there, from the same seed.
    """
    rng = np.random.default_rng(settings["seed"])
    training = np.arange(len(rows["train"]))
    # 1. Validation, where the corpus does not have it. Documents stay in the corpus' order.
    if "val" not in rows:
        n_drawn = max(1, int(len(training) * settings["val"]))
        drawn = rng.permutation(training)[:n_drawn]
        rows["val"] = [rows["train"][i] for i in np.sort(drawn)]
        training = np.setdiff1d(training, drawn)
    # 2. A part of the others, if stage 1 had a --limit.
    limit = settings["limit"]
    if 0 < limit < len(training):
        training = np.sort(rng.permutation(training)[:limit])
    rows["train"] = [rows["train"][i] for i in training]


# ------------------------------------------------------------------------------------- one-vs-rest


def one_vs_rest(X_NV: csr_matrix, Y_NL: csr_matrix, config: Config) -> tuple[Predict, float]:
    """(predict, size in MB): an SVM for each label on all documents; every label is scored.

    A support vector machine (SVM) is a linear classifier: it has one weight per word, and predicts
    by the margin w.x, which is large where a document should have the label.
    """
    X_NV = with_bias(X_NV)
    # Column by column: one label's documents stand together.
    Y_NL = Y_NL.tocsc()
    count_L = np.diff(Y_NL.indptr)
    # 1. Labels with about as many documents need about as many passes: they go together. Labels
    #    without a document, which come last, have nothing to learn from.
    n_seen = (count_L > 0).sum()
    seen = np.argsort(-count_L, kind="stable")[:n_seen]
    # 2. Train some labels at a time: what is kept for each document and label would not fit into
    #    memory for all of them.
    W_VL = np.empty((X_NV.shape[1], len(seen)), np.float32)
    for start in range(0, len(seen), CHUNK):
        part = slice(start, start + CHUNK)
        positive_NF = Y_NL[:, seen[part]].toarray() > 0
        W_VL[:, part] = dual_descent(X_NV, positive_NF, C, config.seed)

    # 3. Predict: the margins of all labels, for some documents at a time.
    def predict(X_NV: csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
        X_NV = with_bias(X_NV)
        places = []
        margins = []
        for start in range(0, X_NV.shape[0], ROWS):
            margin_NL = X_NV[start : start + ROWS] @ W_VL
            place_Nk, margin_Nk = best(margin_NL, min(k, len(seen)))
            places.append(place_Nk)
            margins.append(margin_Nk)
        place_Nk = np.concatenate(places)
        margin_Nk = np.concatenate(margins)
        # A column of W is a label of `seen`, and scores are to lie between 0 and 1.
        return seen[place_Nk], 1 / (1 + np.exp(-margin_Nk))

    return predict, W_VL.nbytes / 1e6


def with_bias(X_NV: csr_matrix) -> csr_matrix:
    """A last column of ones: its weight is the bias, regularised as the others are."""
    ones_N1 = csr_matrix(np.ones((X_NV.shape[0], 1), np.float32))
    return csr_matrix(hstack([X_NV, ones_N1], dtype=np.float32))


def best(score_NL: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(places (N, k), scores (N, k)) of the k largest, falling."""
    # The k largest in no order, and only these sorted: to sort all labels would take much longer.
    place_Nk = np.argpartition(-score_NL, k - 1, axis=1)[:, :k]
    score_Nk = np.take_along_axis(score_NL, place_Nk, axis=1)
    order_Nk = np.argsort(-score_Nk, axis=1, kind="stable")
    place_Nk = np.take_along_axis(place_Nk, order_Nk, axis=1)
    return place_Nk, np.take_along_axis(score_Nk, order_Nk, axis=1)


def dual_descent(
    X_NV: csr_matrix, positive_NF: np.ndarray, c: float, seed: int = 0, tolerance: float = TOLERANCE
) -> np.ndarray:
    """Weights (V, F) of F linear SVMs with squared hinge, by dual coordinate descent.

    The squared hinge is the loss max(0, 1 - y_i w.x_i)^2, where y_i is 1 if document i has the
    label and -1 if not. It is 0 for a document whose margin has the right sign and is at least 1.

    This is what liblinear does (Hsieh et al., ICML 2008, its solver 1), for F labels at once: what
    is a number there is a row of F numbers here. The weights are w = sum_i alpha_i x_i, where
    alpha_i has the sign of y_i, or is 0. One step puts one document's alpha_i at its best value
    while the others stay, and w follows. For one label, this is a pass in full:

        for i in random order:
            gap = w.x_i - y_i
            new = alpha_i - (gap + alpha_i / 2C) / (x_i.x_i + 1 / 2C)
            if new has not the sign of y_i:
                new = 0
            w = w + (new - alpha_i) x_i
            alpha_i = new

    Nearly all alpha_i of a label are 0 and stay 0: they belong to documents that are far from it.
    So a step costs one product, for the margins of the F labels, and little more. A label is done
    when no step of a pass moved a margin by more than `tolerance`, alpha_i / 2C included.
    """
    rng = np.random.default_rng(seed)
    N, F = positive_NF.shape
    found_VF = np.empty((X_NV.shape[1], F), np.float32)
    # 1. All alpha are 0 at first, and so are the weights.
    W_VF = np.zeros_like(found_VF)
    alpha_NF = np.zeros((N, F), np.float32)
    busy_F = np.arange(F)  # labels that are not done; the arrays hold these alone
    # What is the same in all passes: 1 / 2C, and x_i.x_i + 1 / 2C.
    soft = np.float32(1 / (2 * c))
    squares_N1 = X_NV.multiply(X_NV).sum(axis=1)
    square_N = np.asarray(squares_N1, np.float32).ravel() + soft
    # With the type of the weights, so that no product is made in float64.
    one = np.float32(1)
    minus_one = np.float32(-1)
    for _ in range(PASSES):
        most_F = np.zeros(len(busy_F), np.float32)  # the largest step of this pass
        # 2. A pass: one step for each document, in an order that is new in each pass.
        for i in rng.permutation(N):
            row = slice(X_NV.indptr[i], X_NV.indptr[i + 1])
            columns = X_NV.indices[row]
            x = X_NV.data[row]
            positive_F = positive_NF[i]
            alpha_F = alpha_NF[i]

            # The best alpha, were its sign free; then 0 where it has not the sign of y.
            y_F = np.where(positive_F, one, minus_one)
            gap_F = x @ W_VF[columns] - y_F
            new_F = alpha_F - (gap_F + soft * alpha_F) / square_N[i]
            new_F[(new_F > 0) != positive_F] = 0

            # The weights follow, at the words of this document and only for labels that moved.
            step_F = new_F - alpha_F
            moved = np.flatnonzero(step_F)
            if len(moved):
                alpha_NF[i] = new_F
                W_VF[columns[:, None], moved] += x[:, None] * step_F[moved]
                # By this much the step changed the document's own gap + alpha / 2C.
                change = square_N[i] * np.abs(step_F[moved])
                most_F[moved] = np.maximum(most_F[moved], change)
        # 3. Labels that are done leave: the next passes cost less.
        done_F = most_F <= tolerance
        found_VF[:, busy_F] = W_VF
        if done_F.all():
            break
        if done_F.any():
            busy_F = busy_F[~done_F]
            W_VF = np.ascontiguousarray(W_VF[:, ~done_F])
            alpha_NF = alpha_NF[:, ~done_F]
            positive_NF = positive_NF[:, ~done_F]
    return found_VF


# ----------------------------------------------------------------------------------- the libraries


def xr_linear(X_NV: csr_matrix, Y_NL: csr_matrix, config: Config) -> tuple[Predict, float]:
    """(predict, size in MB): PECOS XR-Linear, all settings as they come."""
    from scipy import sparse

    # PECOS 1.2.8 was written for older versions of scipy and numpy: it asks for names that have
    # gone elsewhere and for arrays that are never copied.
    sparse.sputils = sparse._sputils
    from pecos.utils import smat_util

    smat_util.cs_matrix = plain_matrix
    from pecos.xmc import Indexer, LabelEmbeddingFactory
    from pecos.xmc.xlinear.model import XLinearModel

    # The label tree is found by clustering the labels, each described by the sum of its documents'
    # TF-IDF vectors (PIFA, as in stage 2).
    label_features = LabelEmbeddingFactory.create(Y_NL, X_NV, method="pifa")
    tree = Indexer.gen(label_features, threads=1, seed=config.seed)
    model = XLinearModel.train(X_NV, Y_NL, C=tree, threads=1)

    def predict(X_NV: csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = csr_matrix(model.predict(X_NV, beam_size=BEAM, only_topk=k, threads=1))
        labels_Nk, scores_Nk = no_predictions(X_NV.shape[0], k)
        for i in range(X_NV.shape[0]):
            # A row of a sparse matrix is in no order of scores, and may have fewer than k.
            row = slice(found.indptr[i], found.indptr[i + 1])
            order = np.argsort(-found.data[row], kind="stable")
            labels_Nk[i, : len(order)] = found.indices[row][order]
            scores_Nk[i, : len(order)] = found.data[row][order]
        return labels_Nk, scores_Nk

    return predict, size_on_disk(model)


def plain_matrix(content, kind: type, shape=None, dtype=None, copy=False, check_contents=False):
    """What PECOS' smat_util.cs_matrix gives, by scipy itself."""
    return kind(content, shape=shape, dtype=dtype, copy=copy)


def omikuji(X_NV: csr_matrix, Y_NL: csr_matrix, config: Config) -> tuple[Predict, float]:
    """(predict, size in MB): Omikuji's Parabel, all settings as they come, or its Bonsai."""
    from omikuji import Model

    hyper = Model.default_hyper_param()
    if config.system == "bonsai":
        hyper.cluster_balanced = False
        hyper.cluster_k = 100
        hyper.max_depth = 3
    # Omikuji reads its training documents from a file, not from arrays.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        write_svm(path, X_NV, Y_NL)
        model = Model.train_on_data(str(path), hyper, n_threads=1)

    def predict(X_NV: csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
        labels_Nk, scores_Nk = no_predictions(X_NV.shape[0], k)
        for i in range(X_NV.shape[0]):
            row = slice(X_NV.indptr[i], X_NV.indptr[i + 1])
            # Omikuji takes one document at a time, as plain numbers.
            columns = X_NV.indices[row].tolist()
            values = X_NV.data[row].tolist()
            pairs = list(zip(columns, values, strict=True))
            found = model.predict(pairs, beam_size=BEAM, top_k=k)
            for j, (label, score) in enumerate(found):
                labels_Nk[i, j] = label
                scores_Nk[i, j] = score
        return labels_Nk, scores_Nk

    return predict, size_on_disk(model)


def no_predictions(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels (N, k), scores (N, k)) as Predict has them where there is nothing: -1 and 0."""
    return np.full((n, k), -1), np.zeros((n, k), np.float32)


def write_svm(path: Path, X_NV: csr_matrix, Y_NL: csr_matrix) -> None:
    """The file that Omikuji reads: N, V and L, then a document a line, "label,label word:value"."""
    with open(path, "w") as file:
        file.write(f"{X_NV.shape[0]} {X_NV.shape[1]} {Y_NL.shape[1]}\n")
        for i in range(X_NV.shape[0]):
            row = slice(X_NV.indptr[i], X_NV.indptr[i + 1])
            label_row = slice(Y_NL.indptr[i], Y_NL.indptr[i + 1])
            labels = ",".join(map(str, Y_NL.indices[label_row]))
            # Seven digits are what a float32 has.
            pairs = zip(X_NV.indices[row], X_NV.data[row], strict=True)
            features = " ".join(f"{word}:{value:.7g}" for word, value in pairs)
            file.write(f"{labels} {features}\n")


def size_on_disk(model) -> float:
    """The MB of a saved model of PECOS or Omikuji: its memory cannot be seen from Python."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        return megabytes(folder)


def megabytes(folder: str) -> float:
    """The size of all files in a folder."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files) / 1e6


TRAIN = {"one-vs-rest": one_vs_rest, "xr-linear": xr_linear, "parabel": omikuji, "bonsai": omikuji}


# ----------------------------------------------------------------------------------------- the run


def run(config: Config) -> None:
    """Train a system on the documents of a run, write its predictions and print its metrics."""
    check(config)
    where = machine(config)
    print(", ".join(f"{key} {value}" for key, value in where.items() if value is not None))
    # 1. The documents: sparse matrices of words and of labels.
    out = variants.folder(config.run, folder_name(config), "data.npz")
    data = stages.data.load(out)
    train = data.splits["train"]
    features = read_features(data, config)
    X_NV = features["train"]
    Y_NL = train.label_matrix(len(data.names))
    print(
        f"{len(train):,} training documents, {len(data.names):,} labels, "
        f"{X_NV.shape[1]:,} {config.text}, {X_NV.nnz / len(train):.0f} of them in a document"
    )

    # 2. Train.
    start = time.process_time()  # of all threads
    predict, size = train_system(X_NV, Y_NL, config)
    seconds = time.process_time() - start
    print(f"training took {seconds:.0f} CPU seconds, the model takes {size:.0f} MB")

    # 3. Predict, and measure as stage 5 does. In some of its metrics a rare label counts more.
    count_L = np.bincount(train.labels, minlength=len(data.names))
    weight_L = stages.eval.inverse_propensity(count_L, len(train))
    print(f"{'%':34}" + "".join(f"{column:>7}" for column in stages.eval.COLUMNS))
    for name in ("val", "test"):
        split = data.splits[name]
        known = data.known.get(name)
        start = time.process_time()
        labels_Nk, scores_Nk = ranking(predict, features[name], known, config.k)
        milliseconds = 1000 * (time.process_time() - start) / len(split)
        save(out, name, config, labels_Nk, scores_Nk, seconds)
        result = stages.eval.metrics(labels_Nk, split, weight_L)
        what = f"{config.system}, {name}, {milliseconds:.1f} ms each"
        print(stages.eval.row(what, result), flush=True)


def check(config: Config) -> None:
    """UserError where the settings do not go together."""
    if config.system not in SYSTEMS:
        raise UserError(f"--system {config.system}: expected one of {', '.join(SYSTEMS)}")
    if config.text not in ("tokens", "words"):
        raise UserError(f"--text {config.text}: expected tokens or words")
    if config.text == "words" and config.max_len:
        raise UserError("--max-len counts tokens; it does not go with --text words")


def folder_name(config: Config) -> str:
    """linear-SYSTEM[-words][-MAX_LEN]: a folder for each of the texts that can be read."""
    name = f"linear-{config.system}"
    if config.text == "words":
        name += "-words"
    if config.max_len:
        name += f"-{config.max_len}"
    return name


def train_system(X_NV: csr_matrix, Y_NL: csr_matrix, config: Config) -> tuple[Predict, float]:
    """(predict, size in MB) of config.system; UserError if its library is not installed."""
    try:
        return TRAIN[config.system](X_NV, Y_NL, config)
    except ImportError as error:
        advice = INSTALL.get(config.system)
        raise UserError(f"--system {config.system} ({error}): {advice}") from error


def ranking(
    predict: Predict, X_NV: csr_matrix, known: csr_matrix | None, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(labels (N, k), scores (N, k)) without the labels known beforehand: the next ones move up."""
    # As many more as may be taken out: k are left.
    more = most_known(known)
    labels_NK, scores_NK = predict(X_NV, k + more)
    if more:
        labels_NK, scores_NK = without_known(labels_NK, scores_NK, known, k)
    # Where a corpus has fewer labels than k, the places left over are empty.
    room = ((0, 0), (0, max(0, k - labels_NK.shape[1])))
    labels_Nk = np.pad(labels_NK[:, :k], room, constant_values=-1)
    scores_Nk = np.pad(scores_NK[:, :k], room)
    # The score of an empty place is 0, also where without_known left -inf.
    return labels_Nk, np.where(labels_Nk < 0, 0, scores_Nk)


def save(
    out: Path,
    split: str,
    config: Config,
    labels_Nk: np.ndarray,
    scores_Nk: np.ndarray,
    seconds: float,
) -> None:
    """Write predictions as stage 5 does, with how they were made."""
    file = "predictions.npz" if split == "test" else f"predictions.{split}.npz"
    # The tools that read predictions look for the settings of stage 5.
    written = stages.eval.Config(run=str(out), split=split, k=config.k)
    arrays = {"labels": labels_Nk.astype(np.int32), "scores": scores_Nk.astype(np.float32)}
    save_npz(
        out / file,
        written,
        arrays,
        made_from=("data.npz",),
        stage="bench/linear.py",
        ranking=config.system,
        linear=settings(config),
        seconds=seconds,
    )


if __name__ == "__main__":
    main(run, Config, __doc__)
