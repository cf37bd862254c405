"""Compare the predictions of several runs, and make an ensemble of them.

    python -m tools.compare runs/a runs/b                           two: a paired bootstrap
    python -m tools.compare runs/seed-0 runs/seed-1 runs/seed-2     more: mean and deviation
    python -m tools.compare --ensemble runs/a runs/b runs/c --out runs/abc

Reads    RUN/data.npz and RUN/predictions.npz of each run; with --split val, RUN/predictions.val.npz
Writes   with --ensemble, a run folder: OUT/predictions.npz, and OUT/data.npz, a link to the first
         run's

P@k is the share of correct labels among the first k, R@k the share of a document's labels that are
among the first k, nDCG@k a sum in which early ranks count more, and PSP@k a P@k in which rare
labels count more. 05_eval.py has the formulas.

All runs must have predicted the same documents with the same true and known labels; only their
tokens may differ. Metrics are in percent, over the documents that have labels. PSP takes its
weights from the training labels of the first run. A dash: fewer labels were predicted than the
metric asks for.

The bootstrap (paired, as in Koehn, EMNLP 2004) asks: would the second run still be better on other
documents of the same kind? It draws the documents anew, with replacement, the same ones for both
runs, a thousand times. It prints the middle 95% of the differences, and the share of the draws in
which the second run is better; a draw without a difference counts half. This is about which
documents are in the split. For the seed of training, compare runs with several seeds.

In an ensemble, a label's score is the mean of its probabilities in the runs. Where a run does not
have it among its k labels, its probability there is unknown, at most that of the last one, and is
taken to be 0: predict with a larger --k than you need. Labels with equal scores are ordered by
their ids.

Shapes   N documents, L labels, B documents in a chunk, k labels predicted by a run, M labels
         predicted by any run, P (document, label) pairs, Q metrics, R resamples
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.cli import natural
from plumbing.errors import UserError
from plumbing.memory import need_space
from plumbing.stages import load_stages
from plumbing.store import link, load_npz, save_npz

stages = load_stages()

COLUMNS = [("P", 1), ("P", 3), ("P", 5), ("nDCG", 5), ("PSP", 5), ("R", 10), ("R", 100)]
IS_PSP = [name == "PSP" for name, _ in COLUMNS]
CHUNK = 2**13  # documents whose predictions are looked at at a time
CELLS = 2**22  # (resample, document) cells in memory at a time


@dataclass(frozen=True)
class Config:
    runs: list[str]
    ensemble: bool = False
    out: str = ""
    split: str = "test"
    seed: int = 0


def parse(argv: list[str] | None = None) -> Config:
    """The command line; plumbing.cli.parse knows only flags."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, two or more")
    parser.add_argument(
        "--ensemble", action="store_true", help="write the mean of the runs' predictions to --out"
    )
    parser.add_argument("--out", default="", metavar="FOLDER", help="run folder of the ensemble")
    parser.add_argument(
        "--split", choices=("test", "val", "train"), default="test", help="documents [test]"
    )
    parser.add_argument(
        "--seed", type=natural, default=0, metavar="", help="seed of the bootstrap [0]"
    )
    return Config(**vars(parser.parse_args(argv)))


# 1. Reading runs that can be compared.


@dataclass
class Truth:
    """What a run was to predict."""

    folder: str
    names: list[str]
    split: stages.data.Split
    known: tuple | None  # what is known beforehand, as something that can be compared
    weight_L: np.ndarray  # inverse propensities


@dataclass
class Member:
    """What a run of an ensemble has predicted."""

    labels_Nk: np.ndarray
    scores_Nk: np.ndarray
    ranking: str
    sha256: str


def load_predictions(path: Path, split: str, n_documents: int, n_labels: int) -> Member:
    """What a run has predicted for a split. UserError unless it is as in docs/artifacts.md."""
    arrays, meta = load_npz(path)
    # 1. The right split?
    of = meta["config"].get("split")
    if of != split:
        raise UserError(f"{path} is for the split {of}, expected {split}; predict that again")
    # 2. Two tables of the same shape, with a row for each document? The labels are integers.
    labels = arrays.get("labels", np.zeros(0))
    scores = arrays.get("scores", np.zeros(0))
    has_shape = labels.ndim == 2 and labels.shape == scores.shape and len(labels) == n_documents
    fits = has_shape and labels.dtype.kind == "i"
    # 3. Label ids and probabilities? Rounding may bring one a little above 1.
    if fits:
        are_labels = (labels >= -1) & (labels < n_labels)
        are_probabilities = (scores >= 0) & (scores < 1.001)
        fits = (are_labels & are_probabilities).all()
    if not fits:
        raise UserError(
            f"{path}: labels {labels.dtype} {labels.shape}, scores {scores.shape}; expected label "
            f"ids from -1 to {n_labels - 1:,} and probabilities, both (N, k), for "
            f"{n_documents:,} documents"
        )
    return Member(labels, scores, meta.get("ranking", ""), meta["sha256"])


def load_truth(folder: str, split_name: str) -> Truth:
    """The true labels of a run's documents."""
    data = stages.data.load(folder)
    train = data.splits["train"]
    # The table of labels known beforehand, as bytes that can be compared.
    known = data.known.get(split_name)
    if known is not None:
        known = (known.indices.tobytes(), known.indptr.tobytes())
    count_L = np.bincount(train.labels, minlength=len(data.names))
    weight_L = stages.eval.inverse_propensity(count_L, len(train))
    return Truth(folder, data.names, data.splits[split_name], known, weight_L)


def check_same(first: Truth, other: Truth, split_name: str) -> None:
    """UserError unless two runs had the same documents to predict, under the same conditions."""
    # Tokens may differ, so documents are told by their labels.
    same_names = first.names == other.names
    same_labels = np.array_equal(first.split.labels, other.split.labels)
    same_offsets = np.array_equal(first.split.label_offsets, other.split.label_offsets)
    if not (same_names and same_labels and same_offsets):
        raise UserError(
            f"{first.folder} and {other.folder} differ in the labels of {split_name} documents or "
            "in their names; make their data.npz from the same corpus"
        )
    # What is known beforehand is no prediction: one run must not be spared wrong labels that the
    # other is not spared.
    if first.known != other.known:
        raise UserError(
            f"{first.folder} and {other.folder} differ in what is known beforehand of {split_name} "
            "documents (filter files); make their data.npz from the same corpus"
        )


# 2. What each document adds to each metric.


def contributions(
    labels_Nk: np.ndarray, split: stages.data.Split, weight_L: np.ndarray
) -> np.ndarray:
    """(N', Q + 1): what each document with labels adds to each metric; last, its best possible
    PSP@5.

    A metric is the mean of its column. PSP, as in the XMC repository, is the sum of its column over
    the sum of the last one. nan in the columns of metrics that ask for more labels than were
    predicted.
    """
    parts = []
    for start in range(0, len(split), CHUNK):
        # Some documents as a split of their own: its label offsets begin at 0.
        offsets = split.label_offsets[start : start + CHUNK + 1]
        labels = split.labels[offsets[0] : offsets[-1]]
        chunk = stages.data.Split(split.ids, offsets, labels, offsets - offsets[0])
        part = contributions_of_chunk(labels_Nk[start : start + CHUNK], chunk, weight_L)
        has_labels = np.diff(offsets) > 0
        parts.append(part[has_labels])
    return np.concatenate(parts)


def contributions_of_chunk(
    labels_Bk: np.ndarray, chunk: stages.data.Split, weight_L: np.ndarray
) -> np.ndarray:
    """(B, Q + 1): the same for a few documents."""
    hit_Bk = stages.train.hits(labels_Bk, chunk)
    n_B = np.diff(chunk.label_offsets)
    k = hit_Bk.shape[1]
    # A correct label counts 1 at rank 1, and less and less below it.
    discount_5 = 1 / np.log2(np.arange(2, 7))
    # The best possible DCG of a document with 0, 1, ..., 5 labels. With 0 labels its DCG is 0, and
    # may be divided by anything but 0.
    best_dcg_by_number = np.append(1, discount_5.cumsum())
    best_dcg_B = best_dcg_by_number[np.minimum(n_B, 5)]
    columns = []
    for name, j in COLUMNS:
        if j > k:
            columns.append(np.full(len(n_B), np.nan))
            continue
        hit_Bj = hit_Bk[:, :j]
        if name == "P":
            column = hit_Bj.sum(axis=1) / j
        elif name == "R":
            column = hit_Bj.sum(axis=1) / np.maximum(n_B, 1)
        elif name == "nDCG":
            column = (hit_Bj * discount_5[:j]).sum(axis=1) / best_dcg_B
        else:  # PSP: its division comes after the sum over documents
            weight_Bj = weight_L[labels_Bk[:, :j]]
            column = (hit_Bj * weight_Bj).sum(axis=1)
        columns.append(column)
    best_psp = stages.eval.best_weights(chunk, weight_L, 5).sum(axis=1)
    return np.stack([*columns, best_psp], axis=1)


def percent(sums: np.ndarray, n: int) -> np.ndarray:
    """(..., Q) metrics in percent from sums (..., Q + 1) over n documents."""
    # A mean over the documents; PSP alone is divided by the best possible sum of weights.
    best_psp = sums[..., -1:]
    return 100 * sums[..., :-1] / np.where(IS_PSP, best_psp, n)


def bootstrap(added_NQ: np.ndarray, seed: int, resamples: int = 1000) -> np.ndarray:
    """(R, Q) metrics in percent in resamples of the documents, from what the documents add,
    (N, Q + 1).

    In plain form, for each resample:

        drawn = N documents at random, with replacement
        percent(added_NQ[drawn].sum(axis=0), N)

    To know a resample is to know how often each document was drawn. So its sums are a product of
    these numbers with what the documents add, and many resamples are one product of matrices.
    """
    rng = np.random.default_rng(seed)
    n = len(added_NQ)
    step = max(1, CELLS // n)  # resamples at a time
    sums = []
    for start in range(0, resamples, step):
        r = min(step, resamples - start)
        drawn_RN = rng.integers(n, size=(r, n))
        # Count the draws of all resamples at once: every resample has n numbers of its own.
        cell_RN = drawn_RN + n * np.arange(r)[:, None]
        times = np.bincount(cell_RN.ravel(), minlength=r * n)
        times_RN = times.reshape(r, n)
        sums.append(times_RN.astype(np.float64) @ added_NQ)
    return percent(np.concatenate(sums), n)


# 3. The ensemble.


def ensemble(members: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{"labels" (N, k) int32, "scores" (N, k) float32}: mean scores; k is the members' largest."""
    k = max(member["labels"].shape[1] for member in members)
    n_documents = len(members[0]["labels"])
    labels = []
    scores = []
    for start in range(0, n_documents, CHUNK):
        # The predictions of all members side by side: a label may come several times.
        part = slice(start, start + CHUNK)
        labels_BM = np.concatenate([member["labels"][part] for member in members], axis=1)
        scores_BM = np.concatenate([member["scores"][part] for member in members], axis=1)
        labels_Bk, mean_Bk = mean_scores(labels_BM, scores_BM, len(members), k)
        labels.append(labels_Bk)
        scores.append(mean_Bk)
    return {"labels": np.concatenate(labels), "scores": np.concatenate(scores)}


def mean_scores(
    labels_BM: np.ndarray, scores_BM: np.ndarray, n_members: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best labels of each document by their mean score; every label comes once.

    In plain form, for each document:

        total = {}
        for label, score in its labels and scores, without those of label -1:
            total[label] = total.get(label, 0) + score
        the k labels with the largest total / n_members
    """
    # 1. Sort by label: the scores of one label stand side by side.
    order = labels_BM.argsort(axis=1, kind="stable")
    labels_BM = np.take_along_axis(labels_BM, order, axis=1)
    scores_BM = np.take_along_axis(scores_BM, order, axis=1)
    # A label begins where it differs from its left neighbour, and in the first place: none is -2.
    is_first_BM = np.diff(labels_BM, axis=1, prepend=-2) > 0
    # 2. Sum them up, from where a label begins to where the next one begins.
    sums = np.add.reduceat(scores_BM.ravel().astype(np.float64), np.flatnonzero(is_first_BM))
    mean_BM = np.zeros(labels_BM.shape)
    mean_BM[is_first_BM] = sums / n_members
    # 3. The mean stands where a label begins. Repeats, and places without a label, go below every
    #    score.
    mean_BM[~is_first_BM | (labels_BM < 0)] = -1
    # 4. The k best. Of equal scores the smaller label goes first: they are sorted by label.
    best = (-mean_BM).argsort(axis=1, kind="stable")[:, :k]
    mean_Bk = np.take_along_axis(mean_BM, best, axis=1)
    labels_Bk = np.take_along_axis(labels_BM, best, axis=1)
    labels_Bk = np.where(mean_Bk < 0, -1, labels_Bk)
    return labels_Bk.astype(np.int32), mean_Bk.clip(min=0).astype(np.float32)


def prepare(config: Config, file: str, n_bytes: int) -> None:
    """The ensemble's folder with the data in it. UserError if it holds what is no ensemble's."""
    # 1. Never write over what is no ensemble's: a run would lose its own predictions.
    source = Path(config.runs[0]) / "data.npz"
    out = Path(config.out)
    is_a_member = out.resolve() in [Path(folder).resolve() for folder in config.runs]
    has_model = (out / "model.pt").exists()
    has_others = (out / file).exists() and "members" not in load_npz(out / file)[1]
    if is_a_member or has_model or has_others:
        raise UserError(
            f"--out {out} holds a model or predictions that are no ensemble's; choose another "
            "folder"
        )
    # 2. The data, so that the folder is a run folder for the other tools. A link may turn out to be
    #    a copy, so there must be room for it.
    need_space(out, n_bytes + source.stat().st_size)
    if not (out / "data.npz").exists():
        link(source, out / "data.npz")
    # 3. Data that was there before must be the same.
    _, in_folder = load_npz(out / "data.npz")
    _, in_run = load_npz(source)
    if in_folder["sha256"] != in_run["sha256"]:
        raise UserError(f"{out / 'data.npz'} is not that of {config.runs[0]}; choose another --out")


def write_ensemble(config: Config, file: str, members: list[Member]) -> np.ndarray:
    """Write the ensemble's predictions; its labels (N, k)."""
    # 1. A warning: p(label) of one run and p(label) p(cluster) of another are no like numbers.
    rankings = {member.ranking for member in members}
    if len(rankings) > 1:
        names = ", ".join(sorted(rankings))
        print(f"note: the runs are ranked by {names}; their scores mean different things")
    # 2. The folder. Labels and scores take four bytes each.
    n_bytes = 2 * max(member.scores_Nk.nbytes for member in members)
    prepare(config, file, n_bytes)
    # 3. The mean, and a record of the runs that it was made of.
    predictions = [{"labels": member.labels_Nk, "scores": member.scores_Nk} for member in members]
    arrays = ensemble(predictions)
    save_npz(
        Path(config.out) / file,
        config,
        arrays,
        ("data.npz",),
        stage="tools/compare.py",
        ranking="ensemble",
        members=[member.sha256 for member in members],
    )
    return arrays["labels"]


# 4. What is printed.


def difference(added: list[np.ndarray], values: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The rows that compare two runs."""
    # Sums are linear: the difference is all that is needed. A run minus itself is exactly 0.
    minus = (added[1] - added[0])[:, :-1]
    best_psp = added[0][:, -1]
    drawn = bootstrap(np.column_stack([minus, best_psp]), seed)
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    # 1 where the second is better, -1 where the first is, 0 for a tie: from -1 to 1 on average, and
    # from 0 to 100 in percent. Differences behind the ninth digit are rounding.
    sign = np.sign(drawn.round(9))
    is_better = 50 + 50 * sign.mean(axis=0)
    return {
        "second - first": values[1] - values[0],
        "  95% interval: from": low,
        "  to": high,
        "  % of resamples: second is better": is_better,
    }


def spread(values: np.ndarray) -> dict[str, np.ndarray]:
    """The rows that sum up more than two runs."""
    return {
        "mean": values.mean(axis=0),
        "standard deviation": values.std(axis=0, ddof=1),
        "lowest": values.min(axis=0),
        "highest": values.max(axis=0),
    }


def print_row(name: str, values: np.ndarray) -> None:
    """One line of the table; a dash for what is not known."""
    cells = [f"{'-':>8}" if np.isnan(value) else f"{value:8.2f}" for value in values]
    print(f"{name:34}" + "".join(cells))


def run(config: Config) -> None:
    # 1. Refuse what makes no sense.
    if len(config.runs) < 2:
        raise UserError(f"{config.runs[0]} is only one run; name two or more")
    if config.ensemble != bool(config.out):
        raise UserError("--ensemble and --out FOLDER go together; give both or none")
    file = stages.eval.file_of(config.split)

    # 2. Look at one run after the other. Only an ensemble needs the predictions of all at once.
    first = None
    members = []
    added = []
    for folder in config.runs:
        truth = load_truth(folder, config.split)
        first = first or truth
        check_same(first, truth, config.split)
        path = Path(folder) / file
        member = load_predictions(path, config.split, len(truth.split), len(truth.names))
        added.append(contributions(member.labels_Nk, truth.split, first.weight_L))
        if config.ensemble:
            members.append(member)
    n = len(added[0])
    if not n:
        raise UserError(
            f"none of the {config.split} documents of {config.runs[0]} has labels; nothing to "
            "compare"
        )
    values = np.array([percent(one.sum(axis=0), n) for one in added])

    # 3. What is said of all of them together.
    if config.ensemble:
        labels_Nk = write_ensemble(config, file, members)
        of_ensemble = contributions(labels_Nk, first.split, first.weight_L)
        more = {f"ensemble, {config.out}": percent(of_ensemble.sum(axis=0), n)}
    elif len(values) == 2:
        more = difference(added, values, config.seed)
    else:
        more = spread(values)

    # 4. The table.
    n_unlabelled = len(first.split) - n
    print(
        f"{config.split}: {n:,} documents with labels; {n_unlabelled:,} without labels are left out"
    )
    titles = [f"{name}@{j}" for name, j in COLUMNS]
    print(f"{'%':34}" + "".join(f"{title:>8}" for title in titles))
    for folder, values_Q in zip(config.runs, values, strict=True):
        print_row(folder, values_Q)
    for name, values_Q in more.items():
        print_row(name, values_Q)


if __name__ == "__main__":
    try:
        run(parse())
    except (UserError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        sys.exit(2)
