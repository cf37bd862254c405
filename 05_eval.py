"""Stage 5: predict, measure, and put the numbers beside two baselines.

    python 05_eval.py
    python 05_eval.py --run runs/mine --split val --exact --show 5

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt
Writes   RUN/predictions.npz    labels (N, k) int32, best first, -1 where there are fewer;
                                scores (N, k) float32, probabilities, descending; documents in
                                the corpus' order.
                                Of another split than test: RUN/predictions.SPLIT.npz

A number says little alone. So the table has two baselines, computed in the same run from the same
tokens: the most frequent labels, for everyone, and the labels of the 20 nearest neighbours.

The cascade can rank its labels in three ways (03_model.py), and all three are in the table. Stage 4
chose one on the validation split, and that one is written. p(label) was trained only against the
labels of clusters on the shortlist. Elsewhere it can be high for no reason. In the other rankings a
low p(cluster) corrects this. So p(label) alone makes sense only within the beam, and --exact
refuses it.

Metrics are means over the documents that have labels, in percent. Labels known beforehand (filter
files) are in no row of the table.

Left out: pictures, comparisons between runs and their significance, which are in tools/.
Shapes   N documents of a split, L labels, V words of the vocabulary, B documents of a batch,
         C clusters, F children of each (fan), D width, P (document, label) pairs,
         k labels predicted, M labels scored, n a part of the clusters
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from tokenizers import Tokenizer
from tqdm import tqdm

from plumbing import several_devices
from plumbing.cli import flag, int_list, main, natural, pair, positive
from plumbing.errors import UserError
from plumbing.known_labels import labels_without_known, most_known
from plumbing.label_level import product
from plumbing.memory import memory_advice, need_space
from plumbing.store import save_npz

data_stage = import_module("01_data")
tree_stage = import_module("02_label_tree")
model_stage = import_module("03_model")
train_stage = import_module("04_train")

COLUMNS = [
    "P@1", "P@3", "P@5", "nDCG@3", "nDCG@5", "PSP@1", "PSP@3", "PSP@5", "RP@5", "R@10", "R@100",
]  # fmt: skip
NAMES = {"label": "p(label)", "parent": "p(label) p(cluster)", "path": "product of the path"}
COSINES = 2**24  # cosines of documents with documents in memory at a time: 64 MB
MOST_COSINES = 2 * 10**9  # for all documents that get neighbours: ten minutes or so


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")
    split: str = flag("test", "documents to predict: test, val or train")
    show: int = flag(0, "documents to print with their predicted and true labels", natural)
    k: int = flag(100, "labels to predict for each document", positive)
    exact: bool = flag(
        False, "also score every label, as a beam that loses nothing would, and write that ranking"
    )
    topk: str = flag("", "clusters kept per cluster level (default: as in training)")
    batch_size: int = flag(128, "documents predicted at a time", positive)
    propensity: str = flag("0.55,1.5", "constants A,B of the propensity model")
    seed: int = flag(
        0, "seed of the choice of documents to show, or to find neighbours of", natural
    )


# 1. Metrics. `hit_Nk` says which of the first k predicted labels are correct. Every function gives
#    an array (k,) whose entry j - 1 is the metric at j, between 0 and 1. n_N counts a document's
#    labels.


def precision(hit_Nk: np.ndarray) -> np.ndarray:
    """P@j = correct labels among the first j / j.

    Two of the first three are correct: P@3 = 2/3. A document with one label has at most P@3 = 1/3.
    """
    k = hit_Nk.shape[1]
    # A running count along each row: correct labels among the first 1, 2, ..., k.
    correct_Nk = hit_Nk.cumsum(axis=1)
    rank_k = np.arange(1, k + 1)
    # Over the rank, and averaged over documents.
    return (correct_Nk / rank_k).mean(axis=0)


def recall(hit_Nk: np.ndarray, n_N: np.ndarray) -> np.ndarray:
    """R@j = correct labels among the first j / all labels of the document."""
    correct_Nk = hit_Nk.cumsum(axis=1)
    return (correct_Nk / n_N[:, None]).mean(axis=0)


def r_precision(hit_Nk: np.ndarray, n_N: np.ndarray) -> np.ndarray:
    """RP@j = correct labels among the first j / the most that could be: min(j, labels).

    A document with one label, found first, has RP@5 = 1 where P@5 is 1/5.
    """
    k = hit_Nk.shape[1]
    correct_Nk = hit_Nk.cumsum(axis=1)
    rank_k = np.arange(1, k + 1)
    possible_Nk = np.minimum(rank_k, n_N[:, None])
    return (correct_Nk / possible_Nk).mean(axis=0)


def ndcg(hit_Nk: np.ndarray, n_N: np.ndarray) -> np.ndarray:
    """nDCG@j = sum over ranks r <= j of [correct at r] / log2(r + 1), over the best possible sum.

    A correct label counts 1 at rank 1, 0.63 at rank 2, 0.5 at rank 3 and 0.39 at rank 5. The best
    possible ranking has all correct labels first.
    """
    k = hit_Nk.shape[1]
    rank_k = np.arange(1, k + 1)
    # What a correct label at each rank is worth, summed up along each document's ranking.
    discount_k = 1 / np.log2(rank_k + 1)
    gain_Nk = (hit_Nk * discount_k).cumsum(axis=1)
    # The best possible sum at rank j: min(j, labels) correct ones at the first ranks.
    best_by_number_k = discount_k.cumsum()  # for 1, 2, ..., k correct labels
    possible_Nk = np.minimum(rank_k, n_N[:, None])
    best_Nk = best_by_number_k[possible_Nk - 1]
    return (gain_Nk / best_Nk).mean(axis=0)


def propensity_scored_precision(
    hit_Nk: np.ndarray, labels_Nk: np.ndarray, best_Nk: np.ndarray, weight_L: np.ndarray
) -> np.ndarray:
    """PSP@j = the weights of correct labels among the first j, over the best possible sum of
    weights.

    Both are summed over all documents before the division, as in the XMC repository. A rare label
    has a large weight: see `inverse_propensity`.
    """
    # The weight of every prediction, 0 where it is wrong. (-1, no prediction, is never a hit.)
    weight_Nk = hit_Nk * weight_L[labels_Nk]
    # Sum over documents, then a running sum over the ranks.
    gained_k = weight_Nk.sum(axis=0).cumsum()
    possible_k = best_Nk.sum(axis=0).cumsum()
    return gained_k / possible_k


def inverse_propensity(
    count_L: np.ndarray, n_documents: int, a: float = 0.55, b: float = 1.5
) -> np.ndarray:
    """(L,) weights 1 + c (n_l + b)^-a with c = (ln n - 1)(b + 1)^a.

    n counts the training documents, and n_l those that have label l.

    People who label documents overlook rare labels. The propensity of a label is the probability
    that it was noted where it is correct, and its inverse is the weight (Jain, Prabhu and Varma,
    KDD 2016). In the demo a label with one training document weighs 10, one with a thousand
    documents 1.4.
    """
    c = (np.log(n_documents) - 1) * (b + 1) ** a
    return 1 + c * (count_L + b) ** -a


def best_weights(split: data_stage.Split, weight_L: np.ndarray, k: int) -> np.ndarray:
    """(N, k): the weights of a document's own labels, largest first, and 0 where it has fewer."""
    n_documents = len(split)
    doc_P = np.repeat(np.arange(n_documents), np.diff(split.label_offsets))
    # Sort the pairs by document, and within a document by falling weight.
    order_P = np.lexsort((-weight_L[split.labels], doc_P))
    sorted_weight_P = weight_L[split.labels[order_P]]
    # The place of a pair among those of its document: 0, 1, 2, ...
    place_P = np.arange(len(order_P)) - split.label_offsets[doc_P]
    # The first k of each document go into its row.
    is_first_P = place_P < k
    best_Nk = np.zeros((n_documents, k))
    best_Nk[doc_P[is_first_P], place_P[is_first_P]] = sorted_weight_P[is_first_P]
    return best_Nk


def metrics(
    labels_Nk: np.ndarray, split: data_stage.Split, weight_L: np.ndarray
) -> dict[str, np.ndarray]:
    """{"P", "R", "RP", "nDCG", "PSP"}: arrays (k,) whose entry j - 1 is the metric at j, in
    percent.

    Documents without labels are left out; nan when none has any. `weight_L`: `inverse_propensity`.
    """
    k = labels_Nk.shape[1]
    n_N = np.diff(split.label_offsets)
    has_labels_N = n_N > 0
    if not has_labels_N.any():
        return {name: np.full(k, np.nan) for name in ("P", "R", "RP", "nDCG", "PSP")}
    # Documents without labels have no best weights: their rows are zeros, which add nothing.
    best_Nk = best_weights(split, weight_L, k)
    # From all other arrays they are taken out.
    hit_Nk = train_stage.hits(labels_Nk, split)[has_labels_N]
    labels_Nk = labels_Nk[has_labels_N]
    n_N = n_N[has_labels_N]
    result = {
        "P": precision(hit_Nk),
        "R": recall(hit_Nk, n_N),
        "RP": r_precision(hit_Nk, n_N),
        "nDCG": ndcg(hit_Nk, n_N),
        "PSP": propensity_scored_precision(hit_Nk, labels_Nk, best_Nk, weight_L),
    }
    return {name: 100 * values for name, values in result.items()}


def row(name: str, result: dict[str, np.ndarray]) -> str:
    """One line of the table; a dash where fewer labels than the metric asks for were predicted."""
    cells = []
    for column in COLUMNS:
        metric, j = column.split("@")
        values = result[metric]
        if int(j) <= len(values):
            cells.append(f"{values[int(j) - 1]:7.1f}")
        else:
            cells.append(f"{'-':>7}")
    return f"{name:34}" + "".join(cells)


# 2. The two baselines: a model that is not better has learned nothing.


def most_frequent(
    train: data_stage.Split,
    n_documents: int,
    n_labels: int,
    k: int,
    known: csr_matrix | None = None,
) -> np.ndarray:
    """(N, k): the k labels with the most training documents, for everyone; -1 if there are fewer.

    What is `known` (N, L) of a document is no prediction for it: the next label moves up.
    """
    n_wanted = k + most_known(known)
    # Labels from the most to the least frequent; of two equal ones the smaller number first.
    count_L = np.bincount(train.labels, minlength=n_labels)
    best = np.argsort(-count_L, kind="stable")[:n_wanted]
    n_missing = n_wanted - len(best)
    best = np.pad(best, (0, n_missing), constant_values=-1)
    the_same_for_all = np.tile(best, (n_documents, 1))
    return labels_without_known(the_same_for_all, known, k)


def neighbour_votes(
    X: csr_matrix, X_transposed: csr_matrix, Y_train: csr_matrix, neighbours: int
) -> csr_matrix:
    """(N, L): a label's score is the sum of the cosines of the neighbours that have it.

    X (N, V) are documents, X_transposed (V, training documents) the others, all of length 1, and
    Y_train (training documents, L) says who has which labels.
    """
    # 1. The cosines of all documents with all training documents: the vectors have length 1.
    cosine = (X @ X_transposed).toarray()
    # 2. The nearest of each, in no order.
    near = np.argpartition(-cosine, neighbours - 1, axis=1)[:, :neighbours]
    weight = np.take_along_axis(cosine, near, axis=1)
    # 3. Each neighbour votes for its labels: a sparse matrix of weights, times Y.
    ends = np.arange(len(cosine) + 1) * neighbours
    voters = csr_matrix((weight.ravel(), near.ravel(), ends), cosine.shape)
    return voters @ Y_train


def nearest_neighbours(
    train: data_stage.Split,
    split: data_stage.Split,
    vocab: int,
    n_labels: int,
    k: int,
    neighbours: int = 20,
    known: csr_matrix | None = None,
) -> np.ndarray:
    """(N, k): the labels of the nearest training documents; -1 where there are fewer.

    Near is what has a large cosine of the TF-IDF vectors (02_label_tree.py), and `neighbour_votes`
    scores the labels. What is `known` (N, L) is no prediction.
    """
    n_wanted = k + most_known(known)
    n_train = len(train)
    # Vectors of all documents. How rare a word is (idf) is counted on training documents alone.
    X_train, idf_V = tree_stage.tfidf(train, None, vocab)
    X, _ = tree_stage.tfidf(split, idf_V, vocab)
    Y_train = train.label_matrix(n_labels)
    X_transposed = X_train.T.tocsr()
    neighbours = min(neighbours, n_train)
    # All cosines at once would not fit into memory.
    chunk = max(1, COSINES // n_train)
    labels = np.full((len(split), n_wanted), -1, np.int64)
    for start in tqdm(range(0, len(split), chunk), desc="neighbours", unit=" chunks", disable=None):
        # 1. The neighbours of some documents vote for their labels.
        votes = neighbour_votes(X[start : start + chunk], X_transposed, Y_train, neighbours)
        # 2. Sort the labels of each document by votes, and equal ones by their number.
        doc_P = np.repeat(np.arange(votes.shape[0]), np.diff(votes.indptr))
        order_P = np.lexsort((votes.indices, -votes.data, doc_P))
        sorted_labels_P = votes.indices[order_P]
        # 3. The first of each document go into its row, as in best_weights.
        place_P = np.arange(len(doc_P)) - votes.indptr[doc_P]
        is_first_P = place_P < n_wanted
        labels[start + doc_P[is_first_P], place_P[is_first_P]] = sorted_labels_P[is_first_P]
    return labels_without_known(labels, known, k)


# 3. Predictions.


@torch.no_grad()
def predict_exact(
    model: model_stage.Cascade,
    batch: data_stage.Batch,
    k: int,
    ranking: str,
    chunk: int = 4096,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As model.predict, but with every label scored: what a beam as wide as the tree would find.

    `chunk` leaf clusters are scored at a time, and the best k so far are kept.
    """
    features = model.features(batch)
    # 1. The cluster levels: every node, each under its parent's score.
    scores = None
    for head, x_BD in zip(model.heads[:-1], features, strict=False):
        logits_BCF = product(x_BD, head.weight, head.bias)
        scores = model_stage.rank(logits_BCF, scores)
    # 2. The labels, some leaf clusters at a time.
    label_head = model.heads[-1]
    n_clusters = model.counts[-2]  # leaf clusters, whose children are labels
    slot_to_label_CF = model.slot_to_label.view(n_clusters, -1)
    best = None
    for start in range(0, n_clusters, chunk):
        part = slice(start, start + chunk)
        weight_nFD = label_head.weight[part]
        bias_nF = label_head.bias[part]
        logits_BCF = product(features[-1], weight_nFD, bias_nF)
        # Each under the score of its cluster; a tree of the root alone has no clusters.
        above = None
        if scores is not None:
            above = {name: score_BC[:, part] for name, score_BC in scores.items()}
        score_BM = model_stage.rank(logits_BCF, above)[ranking]
        # A slot without a label (-1) must never win.
        labels_M = slot_to_label_CF[part].flatten()
        score_BM = score_BM.masked_fill(labels_M < 0, -torch.inf)
        labels_BM = labels_M.expand(score_BM.shape)
        # 3. They compete with the best so far.
        if best is not None:
            labels_BM = torch.cat([best[0], labels_BM], 1)
            score_BM = torch.cat([best[1], score_BM], 1)
        best = model_stage.best_k(labels_BM, score_BM, k)
    return best


@dataclass
class Predictions:
    """The predictions of a split, and how fast they were made."""

    beam: dict[str, np.ndarray]  # "labels NAME", "scores NAME" (N, k) per ranking, "kept t" (N,)
    beam_rate: float  # documents per second
    exact: dict[str, np.ndarray] | None  # "labels", "scores" (N, k) of --exact
    exact_rate: float | None
    labels: np.ndarray  # (N, k), what is written
    scores: np.ndarray  # (N, k), log-probabilities


def predict(
    config: Config,
    data: data_stage.Data,
    model: model_stage.Cascade,
    max_len: int,
    ranking: str,
) -> Predictions:
    """Predict a split by the beam, and with --exact by scoring every label."""

    def timed(one_batch: Callable) -> tuple[dict[str, np.ndarray], float]:
        """(what was found, documents per second)."""
        device = model.slot_to_label.device
        # One document first: some things are set up only once, and should not be timed.
        first_document = data.batch(config.split, np.arange(1), max_len).to(device)
        one_batch(first_document, config.k)
        start = time.perf_counter()
        found = train_stage.predict_split(
            model, data, config.split, max_len, config.batch_size, one_batch, config.k
        )
        seconds = time.perf_counter() - start
        return found, len(data.splits[config.split]) / seconds

    def every_label(batch: data_stage.Batch, k: int) -> dict[str, np.ndarray]:
        labels, scores = predict_exact(model, batch, k, ranking)
        return {"labels": labels.cpu().numpy(), "scores": scores.cpu().numpy()}

    # 1. The beam finds the best k by all rankings at once; one of them is written.
    beam, beam_rate = timed(partial(train_stage.predict_rankings, model))
    labels = beam[f"labels {ranking}"]
    scores = beam[f"scores {ranking}"]
    # 2. With --exact, what is written is the ranking of all labels.
    exact = None
    exact_rate = None
    if config.exact:
        exact, exact_rate = timed(every_label)
        labels = exact["labels"]
        scores = exact["scores"]
    return Predictions(beam, beam_rate, exact, exact_rate, labels, scores)


def file_of(split: str) -> str:
    """The name of the artifact with a split's predictions."""
    return "predictions.npz" if split == "test" else f"predictions.{split}.npz"


def save(config: Config, found: Predictions, ranking: str) -> None:
    """Write the predictions: labels, and probabilities under the ranking."""
    arrays = {"labels": found.labels.astype(np.int32), "scores": np.exp(found.scores)}
    made_from = ("data.npz", "tree.npz", "model.pt")
    path = Path(config.run) / file_of(config.split)
    save_npz(path, config, arrays, made_from=made_from, ranking=ranking)


# 4. What is printed.


def print_table(config: Config, data: data_stage.Data, found: Predictions, ranking: str) -> None:
    """The two baselines, and the cascade by each of its rankings."""
    split = data.splits[config.split]
    train = data.splits["train"]
    known = data.known.get(config.split)
    n_labels = len(data.names)
    # How rare a label is, is counted on the training documents.
    a, b = pair(config.propensity, "--propensity")
    count_L = np.bincount(train.labels, minlength=n_labels)
    weight_L = inverse_propensity(count_L, len(train), a, b)

    def print_row(name: str, labels_Nk: np.ndarray) -> None:
        print(row(name, metrics(labels_Nk, split, weight_L)))

    # 1. What the columns are.
    n_unlabelled = int((np.diff(split.label_offsets) == 0).sum())
    print(
        f"{config.split}: {len(split):,} documents, {n_unlabelled} of them without labels and left "
        "out of the metrics"
    )
    print(f"{'%':34}" + "".join(f"{column:>7}" for column in COLUMNS))
    # 2. The baselines.
    frequent = most_frequent(train, len(split), n_labels, config.k, known)
    print_row("most frequent labels", frequent)
    # Neighbours cost test documents x training documents. Where that is too many, some have to do.
    rows = np.arange(len(split))
    name = "20 nearest neighbours, TF-IDF"
    n_affordable = max(1, MOST_COSINES // len(train))
    if n_affordable < len(split):
        rng = np.random.default_rng(config.seed)
        rows = np.sort(rng.choice(len(split), n_affordable, replace=False))
        name = f"20 neighbours, {n_affordable:,} documents"
    some = split.documents(rows)
    known_of_some = None if known is None else known[rows]
    vocab = data.meta["vocab_size"]
    near = nearest_neighbours(train, some, vocab, n_labels, config.k, known=known_of_some)
    print(row(name, metrics(near, some, weight_L)))
    # 3. The cascade.
    for name in model_stage.RANKINGS:
        mark = " *" if name == ranking else ""
        print_row(f"cascade, {NAMES[name]}{mark}", found.beam[f"labels {name}"])
    holds = "this"
    if config.exact:
        print_row(f"every label, {NAMES[ranking]}", found.labels)
        holds = "it with every label scored"
    print(f"* chosen on validation; {file_of(config.split)} holds {holds}")


def print_recall(split: data_stage.Split, model: model_stage.Cascade, beam: dict) -> None:
    """At each cluster level: how many correct labels were still within reach?"""
    n_pairs = max(1, len(split.labels))
    recalls = []
    for t, k in enumerate(model.topk):
        n_clusters = model.counts[t + 1]
        percent = 100 * beam[f"kept {t}"].sum() / n_pairs
        recalls.append(f"{k} of {n_clusters:,} clusters {percent:.1f}")
    if recalls:  # a tree of the root alone keeps everything
        shown = ", ".join(recalls)
        print(f"shortlist recall (share of the labels whose cluster is kept): {shown}")


def print_speed(found: Predictions, ranking: str) -> None:
    """Documents per second, and how often the beam finds what scoring every label finds."""
    print(f"beam, all three rankings: {found.beam_rate:,.0f} documents per second")
    if found.exact is not None:
        beam_top_5 = found.beam[f"labels {ranking}"][:, :5]
        exact_top_5 = found.exact["labels"][:, :5]
        same = (exact_top_5 == beam_top_5).all(axis=1).mean()
        print(
            f"every label, one ranking: {found.exact_rate:,.0f} documents per second; "
            f"the same top 5 in the same order for {100 * same:.2f}% of the documents"
        )


def show(config: Config, data: data_stage.Data, labels: np.ndarray, scores: np.ndarray) -> None:
    """Print some documents, as their tokens say them, with predicted and true labels."""
    split = data.splits[config.split]
    tokenizer = Tokenizer.from_buffer(data.tokenizer)
    # A random choice, the same for the same seed.
    shuffled = np.random.default_rng(config.seed).permutation(len(split))
    for i in shuffled[: config.show]:
        true = split.labels[split.label_offsets[i] : split.label_offsets[i + 1]]
        ids = split.ids[split.offsets[i] : split.offsets[i + 1]]
        text = tokenizer.decode(ids[:80].tolist())
        print(f"\n{config.split} {i}: {text}")
        # The first five predictions with their probabilities; + marks a correct one.
        for label, score in zip(labels[i, :5], scores[i, :5], strict=True):
            if label >= 0:
                mark = "+" if label in true else " "
                print(f"  {mark} {score:.3f} {data.names[label]}")
        print("  true: " + ", ".join(data.names[label] for label in true))


# 5. From the command line to a table.


def run(
    config: Config,
    build: Callable = model_stage.build,
    train_config: type[train_stage.Config] = train_stage.Config,
) -> None:
    """Predict and measure. `build` and `train_config`: of a fork, as in 04_train.py: load."""
    # 1. Refuse what cannot work now, not after minutes of prediction.
    if config.split not in ("train", "val", "test"):
        raise UserError(f"--split {config.split}: expected test, val or train")
    pair(config.propensity, "--propensity")
    # 2. The data, and the model that stage 4 kept.
    data = data_stage.load(config.run)
    model, trained, ranking = train_stage.load(config.run, data, build, train_config)
    # A wider or narrower beam than in training?
    if config.topk:
        model.topk = int_list(config.topk, "--topk")
        model.check(trained.join)
    # (A tree without cluster levels has no beam: there every label is scored, and trained, anyway.)
    if config.exact and ranking == "label" and model.topk:
        raise UserError(
            "--exact: validation chose p(label) as the ranking of the beam. It was trained inside "
            "the beam and orders all labels in another way, so it has no exact counterpart; "
            "leave --exact out"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    split = data.splits[config.split]
    need_space(Path(config.run), 9 * config.k * len(split))

    # 3. Predict, and write the predictions.
    with memory_advice(config, len(data.names)):
        found = predict(config, data, model, trained.max_len, ranking)
    if not several_devices.is_first():
        return  # with several GPUs, one process writes and speaks
    save(config, found, ranking)
    # 4. Say how good they are.
    print_table(config, data, found, ranking)
    print_recall(split, model, found.beam)
    print_speed(found, ranking)
    if config.show:
        show(config, data, found.labels, np.exp(found.scores))


if __name__ == "__main__":
    main(run, Config, __doc__, several=True)
