"""Stage 5: predict, measure, and put the numbers beside their yardsticks.

    python 05_eval.py
    python 05_eval.py --run runs/mine --split val --exact --show 5

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt
Writes   RUN/predictions.npz    labels (N, k) int32, -1 where there are fewer; scores (N, k) float32, descending;
                                documents in the corpus' order; of another split than test: RUN/predictions.SPLIT.npz

The rankings of the cascade (p(label) p(its cluster); the product down the whole path; p(label) alone) stand side by
side; the one that is written was chosen on the validation split by stage 4. p(label) alone is a ranking of the beam:
it was trained inside shortlists, and orders all labels in another way, so --exact refuses it. The yardsticks are
computed in the same run, from the same tokens: the most frequent labels, and 20 nearest neighbours on TF-IDF. Metrics
are means over the documents that have labels, in percent. Labels known beforehand (filter files) are in no row. Left
out here: pictures, comparisons between runs and their
significance, which are in tools/.

Shapes   N documents, L labels, V vocabulary, B batch, K candidates, k labels predicted
"""

import time
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from tokenizers import Tokenizer
from tqdm import tqdm

from plumbing.cli import flag, main, natural, pair, positive
from plumbing.errors import UserError
from plumbing.label_level import product
from plumbing.memory import memory_advice, need_space
from plumbing.prediction import labels_without_known, most_known, over_split
from plumbing.store import save_npz

data_stage = import_module("01_data")
tree_stage = import_module("02_label_tree")
model_stage = import_module("03_model")
train_stage = import_module("04_train")

COLUMNS = ["P@1", "P@3", "P@5", "nDCG@3", "nDCG@5", "PSP@1", "PSP@3", "PSP@5", "RP@5", "R@10", "R@100"]
NAMES = {"label": "p(label)", "parent": "p(label) p(cluster)", "path": "product of the path"}


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")
    split: str = flag("test", "documents to predict: test, val or train")
    k: int = flag(100, "labels to predict for each document", positive)
    exact: bool = flag(False, "also score every label, the oracle of the beam, and write that ranking")
    show: int = flag(0, "documents to print with their predicted and true labels", natural)
    propensity: str = flag("0.55,1.5", "constants A,B of the propensity model")
    batch_size: int = flag(128, "documents predicted at a time", positive)
    seed: int = flag(0, "seed of the choice of documents to show", natural)


def inverse_propensity(count_L: np.ndarray, n_documents: int, a: float = 0.55, b: float = 1.5) -> np.ndarray:
    """(L,) weights 1 + C (N_l + b)^-a with C = (ln N - 1)(b + 1)^a (Jain, Prabhu and Varma, KDD 2016)."""
    c = (np.log(n_documents) - 1) * (b + 1) ** a
    return 1 + c * (count_L + b) ** -a


def metrics(labels_Nk: np.ndarray, split: data_stage.Split, weight_L: np.ndarray) -> dict[str, np.ndarray]:
    """{"P", "nDCG", "PSP", "R", "RP"}: arrays (k,) whose entry j - 1 is the metric at j, in percent.

    P@j: right ones among the first j, over j. R@j: over the document's labels. RP@j: over the smaller of the two.
    nDCG@j: right ones discounted by log2(rank + 1), over the best possible. PSP@j: right ones weighted by `weight_L`,
    summed over all documents, over the best possible sum, as in the XMC repository. Documents without labels are left
    out; nan when none has any.
    """
    n_N = np.diff(split.label_offsets)
    has = n_N > 0
    if not has.any():
        return {name: np.full(labels_Nk.shape[1], np.nan) for name in ("P", "R", "RP", "nDCG", "PSP")}
    hits_Nk, n_N, labels_Nk = train_stage.hits(labels_Nk, split)[has], n_N[has, None], labels_Nk[has]
    k = labels_Nk.shape[1]
    rank_k = np.arange(1, k + 1)
    discount_k = 1 / np.log2(rank_k + 1)
    right_Nk = hits_Nk.cumsum(axis=1)
    ideal_Nk = discount_k.cumsum()[np.minimum(rank_k, n_N) - 1]
    # Best possible PSP: each document's labels by falling weight, as a (N, k) table filled with zeros.
    doc_P = np.repeat(np.arange(len(split)), np.diff(split.label_offsets))
    order = np.lexsort((-weight_L[split.labels], doc_P))
    place_P = np.arange(len(order)) - split.label_offsets[doc_P]
    best = np.zeros((len(split), k))
    first = place_P < k
    best[doc_P[first], place_P[first]] = weight_L[split.labels[order]][first]
    result = {
        "P": (right_Nk / rank_k).mean(axis=0),
        "R": (right_Nk / n_N).mean(axis=0),
        "RP": (right_Nk / np.minimum(rank_k, n_N)).mean(axis=0),
        "nDCG": ((hits_Nk * discount_k).cumsum(axis=1) / ideal_Nk).mean(axis=0),
        "PSP": (hits_Nk * weight_L[labels_Nk]).sum(axis=0).cumsum() / best.sum(axis=0).cumsum(),
    }
    return {name: 100 * values for name, values in result.items()}


def row(name: str, result: dict[str, np.ndarray]) -> str:
    """One line of the table; a dash where fewer labels than the metric asks for were predicted."""
    cells = []
    for column in COLUMNS:
        metric, j = column.split("@")
        values = result[metric]
        cells.append(f"{values[int(j) - 1]:7.1f}" if int(j) <= len(values) else f"{'-':>7}")
    return f"{name:34}" + "".join(cells)


def most_frequent(train: data_stage.Split, n_documents: int, n_labels: int, k: int,
                  known: csr_matrix | None = None) -> np.ndarray:
    """(N, k): the k labels with the most training documents, for everyone; -1 where there are fewer labels.

    What is `known` (N, L) of a document is no prediction for it: the next label moves up, as in the cascade's rows.
    """
    found = k + most_known(known)
    count_L = np.bincount(train.labels, minlength=n_labels)
    best = np.argsort(-count_L, kind="stable")[:found]
    best = np.pad(best, (0, found - len(best)), constant_values=-1)
    return labels_without_known(np.tile(best, (n_documents, 1)), known, k)


def nearest_neighbours(train: data_stage.Split, split: data_stage.Split, vocab: int, n_labels: int, k: int,
                       neighbours: int = 20, known: csr_matrix | None = None) -> np.ndarray:
    """(N, k): labels of the training documents nearest by TF-IDF cosine, by the sum of the cosines; -1 where fewer.
    What is `known` (N, L) of a document is no prediction for it.
    """
    found = k + most_known(known)
    X_train, idf_V = tree_stage.tfidf(train, None, vocab)
    X, _ = tree_stage.tfidf(split, idf_V, vocab)
    Y, columns = train.label_matrix(n_labels), X_train.T.tocsr()
    neighbours, chunk = min(neighbours, len(train)), max(1, 2**24 // len(train))  # 64 MB of cosines at a time
    labels = np.full((len(split), found), -1, np.int64)
    for start in tqdm(range(0, len(split), chunk), desc="neighbours", unit=" chunks", disable=None):
        cosine = (X[start : start + chunk] @ columns).toarray()
        near = np.argpartition(-cosine, neighbours - 1, axis=1)[:, :neighbours]
        weights = np.take_along_axis(cosine, near, axis=1).ravel()
        votes = csr_matrix((weights, near.ravel(), np.arange(len(near) + 1) * neighbours), (len(near), len(train))) @ Y
        doc = np.repeat(np.arange(len(near)), np.diff(votes.indptr))
        order = np.lexsort((votes.indices, -votes.data, doc))  # by votes, then by label id
        place = np.arange(len(doc)) - votes.indptr[doc]
        first = place < found
        labels[start + doc[first], place[first]] = votes.indices[order][first]
    return labels_without_known(labels, known, k)


@torch.no_grad()
def predict_exact(model: model_stage.Cascade, batch: data_stage.Batch, k: int, ranking: str,
                  chunk: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """As model.predict, but with every label scored: `chunk` leaf clusters at a time and a running top k."""
    features, scores, best = model.features(batch), None, None
    for head, x_BD in zip(model.heads[:-1], features, strict=False):
        scores = model_stage.rank(product(x_BD, head.weight, head.bias), scores)
    leaf = model.heads[-1]
    for start in range(0, model.counts[-2], chunk):
        part = slice(start, start + chunk)
        labels_S = model.slot_to_label.view(model.counts[-2], -1)[part].flatten()
        logits_BCF = product(features[-1], leaf.weight[part], leaf.bias[part])
        above = scores and {name: score_BC[:, part] for name, score_BC in scores.items()}
        score_BS = model_stage.rank(logits_BCF, above)[ranking]
        found = labels_S.expand(score_BS.shape), score_BS.masked_fill(labels_S < 0, -torch.inf)
        best = model_stage.best_k(*(torch.cat(pair, 1) for pair in zip(best, found, strict=True)) if best else found, k)
    return best


def run(config: Config) -> None:
    if config.split not in ("train", "val", "test"):
        raise UserError(f"--split {config.split}: expected test, val or train")
    a, b = pair(config.propensity, "--propensity")
    data = data_stage.load(config.run)
    split, train, n_labels = data.splits[config.split], data.splits["train"], len(data.names)
    weight_L = inverse_propensity(np.bincount(train.labels, minlength=n_labels), len(train), a, b)
    model, trained, ranking = train_stage.load(config.run, data)
    if config.exact and ranking == "label" and model.topk:
        raise UserError("--exact: validation chose p(label) as the ranking of the beam. It was trained inside the beam "
                        "and orders all labels in another way, so it has no exact counterpart; leave --exact out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    k = config.k

    def every_label(batch: data_stage.Batch, k: int) -> dict[str, np.ndarray]:
        labels, scores = predict_exact(model, batch, k, ranking)
        return {"labels": labels.cpu().numpy(), "scores": scores.cpu().numpy()}

    def timed(predict) -> tuple[dict[str, np.ndarray], float]:
        predict(data.batch(config.split, np.arange(1), trained.max_len).to(device), k)  # what is set up only once
        start = time.perf_counter()
        found = over_split(model, data, config.split, trained.max_len, config.batch_size, predict, k)
        return found, len(split) / (time.perf_counter() - start)

    need_space(Path(config.run), 9 * k * len(split))
    with memory_advice(config, n_labels):
        beam, beam_rate = timed(partial(train_stage.predict_rankings, model))
        exact, exact_rate = timed(every_label) if config.exact else (None, None)
    labels, scores = beam[f"labels {ranking}"], beam[f"scores {ranking}"]
    if config.exact:
        same = (exact["labels"][:, :5] == labels[:, :5]).all(axis=1).mean()
        labels, scores = exact["labels"], exact["scores"]
    file = "predictions.npz" if config.split == "test" else f"predictions.{config.split}.npz"
    save_npz(Path(config.run) / file, config,
             {"labels": labels.astype(np.int32), "scores": np.exp(scores)},
             made_from=("data.npz", "tree.npz", "model.pt"), ranking=ranking)

    unlabelled = int((np.diff(split.label_offsets) == 0).sum())
    print(f"{config.split}: {len(split):,} documents, {unlabelled} of them without labels and left out of the metrics")
    print(f"{'%':34}" + "".join(f"{column:>7}" for column in COLUMNS))
    known = data.known.get(config.split)
    frequent = most_frequent(train, len(split), n_labels, k, known)
    print(row("most frequent labels", metrics(frequent, split, weight_L)))
    near = nearest_neighbours(train, split, data.meta["vocab_size"], n_labels, k, known=known)
    print(row("20 nearest neighbours, TF-IDF", metrics(near, split, weight_L)))
    for name in model_stage.RANKINGS:
        mark = " *" if name == ranking else ""
        print(row(f"cascade, {NAMES[name]}{mark}", metrics(beam[f"labels {name}"], split, weight_L)))
    if config.exact:
        print(row(f"every label, {NAMES[ranking]}", metrics(labels, split, weight_L)))
    print(f"* chosen on validation; {file} holds {'it with every label scored' if config.exact else 'this'}")
    pairs = max(1, len(split.labels))
    recalls = ", ".join(f"{k_t} of {n:,} clusters {100 * beam[f'kept {t}'].sum() / pairs:.1f}"
                        for t, (k_t, n) in enumerate(zip(model.topk, model.counts[1:], strict=False)))
    if recalls:  # a tree of the root alone keeps everything
        print(f"shortlist recall (share of the labels whose cluster is kept): {recalls}")
    print(f"beam, all three rankings: {beam_rate:,.0f} documents per second")
    if config.exact:
        print(f"every label, one ranking: {exact_rate:,.0f} documents per second; "
              f"the same top 5 in the same order for {100 * same:.2f}% of the documents")
    if config.show:
        show(config, data, labels, np.exp(scores))


def show(config: Config, data: data_stage.Data, labels: np.ndarray, scores: np.ndarray) -> None:
    """Print some documents, as their tokens say them, with predicted and true labels."""
    split = data.splits[config.split]
    tokenizer = Tokenizer.from_buffer(data.tokenizer)
    rows = np.random.default_rng(config.seed).permutation(len(split))[: config.show]
    for i in rows:
        true = split.labels[split.label_offsets[i] : split.label_offsets[i + 1]]
        text = tokenizer.decode(split.ids[split.offsets[i] : split.offsets[i + 1]][:80].tolist())
        print(f"\n{config.split} {i}: {text}")
        for label, score in zip(labels[i, :5], scores[i, :5], strict=True):
            if label >= 0:
                print(f"  {'+' if label in true else ' '} {score:.3f} {data.names[label]}")
        print("  true: " + ", ".join(data.names[label] for label in true))


if __name__ == "__main__":
    main(run, Config, __doc__)
