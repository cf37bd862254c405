"""Compare the predictions of several runs, and make an ensemble of them.

    python -m tools.compare runs/a runs/b                           two: a paired bootstrap
    python -m tools.compare runs/seed-0 runs/seed-1 runs/seed-2     more: mean and standard deviation over the runs
    python -m tools.compare --ensemble runs/a runs/b runs/c --out runs/abc

Reads    RUN/data.npz and RUN/predictions.npz of each run; with --split val, RUN/predictions.val.npz
Writes   with --ensemble, OUT/predictions.npz, and OUT/data.npz, a link to that of the first run: OUT is a run folder

All runs must have predicted the same documents with the same true and known labels; only their tokens may differ.
Metrics are in percent, over the documents that have labels; PSP takes its weights from the training labels of the first
run. A dash: fewer labels were predicted than the metric asks for.
The bootstrap (paired, as in Koehn, EMNLP 2004) draws the documents anew, with replacement, the same ones for both runs:
the middle 95% of the differences, and the share of the draws in which the second run is better, half of the equal ones
counted. That is about which documents are in the split; for the seed of training, compare runs with several seeds.
The ensemble's score of a label is the mean of its probabilities in the runs. Where a run does not have it among its k
labels, its probability there is unknown, at most that of the last one, and is taken to be 0: predict with a larger --k
than is needed. Labels with equal scores are ordered by their ids.

Shapes   N documents, L labels, B documents in a chunk, k labels predicted, K those of all runs, M metrics, R resamples
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
PSP = [name == "PSP" for name, _ in COLUMNS]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, two or more")
    parser.add_argument("--ensemble", action="store_true", help="write the mean of the runs' predictions to --out")
    parser.add_argument("--out", default="", metavar="FOLDER", help="run folder of the ensemble")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test", help="documents [test]")
    parser.add_argument("--seed", type=natural, default=0, metavar="", help="seed of the bootstrap [0]")
    return Config(**vars(parser.parse_args(argv)))


def load_predictions(path: Path, split: str, n_documents: int, n_labels: int) -> tuple[dict[str, np.ndarray], str]:
    """({"labels" (N, k), "scores" (N, k)}, sha256). UserError unless they are what the README says, for that split."""
    arrays, meta = load_npz(path)
    if meta["config"].get("split") != split:
        raise UserError(f"{path} is for the split {meta['config'].get('split')}, expected {split}; predict that again")
    labels, scores = (arrays.get(key, np.zeros(0)) for key in ("labels", "scores"))
    if labels.shape != scores.shape or labels.dtype.kind != "i" or labels.ndim != 2 or len(labels) != n_documents or (
            not ((labels >= -1) & (labels < n_labels) & (scores >= 0) & (scores < 1.001)).all()):
        raise UserError(f"{path}: labels {labels.dtype} {labels.shape}, scores {scores.shape}; expected label ids from "
                        f"-1 to {n_labels - 1:,} and probabilities, both (N, k), for {n_documents:,} documents")
    return {"labels": labels, "scores": scores}, meta["sha256"]


def contributions(labels_Nk: np.ndarray, split: stages.data.Split, weight_L: np.ndarray) -> np.ndarray:
    """(N', M + 1): what each document that has labels adds to each metric, and last the most that it can add to PSP@5.

    A metric is the mean of its column; PSP, as in the XMC repository, the sum of its column over that of the last. nan
    in the columns of metrics that ask for more labels than were predicted."""
    parts, discount_k = [], 1 / np.log2(np.arange(2, 7))
    for start in range(0, len(split), CHUNK):
        offsets, labels_Bk = split.label_offsets[start : start + CHUNK + 1], labels_Nk[start : start + CHUNK]
        part = stages.data.Split(split.ids, offsets, split.labels[offsets[0] : offsets[-1]], offsets - offsets[0])
        hits_Bk, n_B = stages.train.hits(labels_Bk, part), np.diff(offsets)
        # The five of a document's labels with the most weight: what PSP could win.
        doc_P = np.repeat(np.arange(len(n_B)), n_B)
        order = np.lexsort((-weight_L[part.labels], doc_P))
        best = np.arange(len(order)) - part.label_offsets[doc_P] < 5
        most_B = np.bincount(doc_P[best], weight_L[part.labels[order]][best], minlength=len(n_B))
        per_rank = {"P": 1, "R": 1, "nDCG": discount_k[: hits_Bk.shape[1]], "PSP": weight_L[labels_Bk[:, :5]]}
        over = {"R": np.maximum(n_B, 1), "nDCG": np.append(1, discount_k.cumsum())[np.minimum(n_B, 5)], "PSP": 1}
        columns = [(hits_Bk[:, :j] * per_rank[name]).sum(axis=1) / over.get(name, j) if j <= hits_Bk.shape[1]
                   else np.full(len(n_B), np.nan) for name, j in COLUMNS]
        parts.append(np.stack([*columns, most_B], axis=1)[n_B > 0])
    return np.concatenate(parts)


def bootstrap(added_NM: np.ndarray, seed: int, resamples: int = 1000) -> np.ndarray:
    """(R, M) metrics in percent in resamples of the documents, from what the documents add (N, M + 1).

    A resample is how often each document was drawn, N draws in all; its sums are one product with what they add."""
    rng, n, step, sums = np.random.default_rng(seed), len(added_NM), max(1, CELLS // len(added_NM)), []
    for r in (min(step, resamples - start) for start in range(0, resamples, step)):
        drawn_RN = rng.integers(n, size=(r, n)) + n * np.arange(r)[:, None]
        sums.append(np.bincount(drawn_RN.ravel(), minlength=r * n).reshape(r, n).astype(np.float64) @ added_NM)
    return percent(np.concatenate(sums), n)


def percent(sums: np.ndarray, n: int) -> np.ndarray:
    """(..., M) metrics in percent from sums (..., M + 1) over n documents."""
    return 100 * sums[..., :-1] / np.where(PSP, sums[..., -1:], n)


def ensemble(members: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """{"labels" (N, k) int32, "scores" (N, k) float32}: mean scores; k is that of the member with the most."""
    k, found = max(member["labels"].shape[1] for member in members), {"labels": [], "scores": []}
    for start in range(0, len(members[0]["labels"]), CHUNK):
        labels_BK, scores_BK = (np.concatenate([member[key][start : start + CHUNK] for member in members], axis=1)
                                for key in found)
        order = labels_BK.argsort(axis=1, kind="stable")  # a label's scores side by side
        labels_BK, scores_BK = (np.take_along_axis(table, order, axis=1) for table in (labels_BK, scores_BK))
        first = np.diff(labels_BK, axis=1, prepend=-2) > 0
        mean_BK = np.zeros(labels_BK.shape)
        mean_BK[first] = np.add.reduceat(scores_BK.ravel().astype(np.float64), np.flatnonzero(first)) / len(members)
        mean_BK[~first | (labels_BK < 0)] = -1  # below every score: repeats, and places without a label
        best = (-mean_BK).argsort(axis=1, kind="stable")[:, :k]
        mean_Bk, labels_Bk = (np.take_along_axis(table, best, axis=1) for table in (mean_BK, labels_BK))
        found["labels"].append(np.where(mean_Bk < 0, -1, labels_Bk).astype(np.int32))
        found["scores"].append(mean_Bk.clip(min=0).astype(np.float32))
    return {key: np.concatenate(parts) for key, parts in found.items()}


def prepare(config: Config, file: str, n_bytes: int) -> None:
    """The ensemble's folder with the data in it. UserError where it holds what is no ensemble's."""
    source, out = Path(config.runs[0]) / "data.npz", Path(config.out)
    if out.resolve() in [Path(folder).resolve() for folder in config.runs] or (out / "model.pt").exists() or (
            (out / file).exists() and "members" not in load_npz(out / file)[1]):
        raise UserError(f"--out {out} holds a model or predictions that are no ensemble's; choose another folder")
    need_space(out, n_bytes + source.stat().st_size)
    if not (out / "data.npz").exists():
        link(source, out / "data.npz")
    if load_npz(out / "data.npz")[1]["sha256"] != load_npz(source)[1]["sha256"]:
        raise UserError(f"{out / 'data.npz'} is not that of {config.runs[0]}; choose another --out")


def run(config: Config) -> None:
    if len(config.runs) < 2:
        raise UserError(f"{config.runs[0]} is only one run; name two or more")
    if config.ensemble != bool(config.out):
        raise UserError("--ensemble and --out FOLDER go together; give both or none")
    file = "predictions.npz" if config.split == "test" else f"predictions.{config.split}.npz"
    members, digests, truths, knowns, weights, added = [], [], [], [], [], []
    for folder in config.runs:
        data = stages.data.load(folder)
        split, train, names = data.splits[config.split], data.splits["train"], data.names
        truths.append((names, split.labels.tobytes(), split.label_offsets.tobytes()))
        if truths[-1] != truths[0]:
            raise UserError(f"{config.runs[0]} and {folder} differ in the labels of {config.split} documents or in "
                            "their names; make their data.npz from the same corpus")
        # What is known beforehand is no prediction: one run must not be spared wrong labels that the other is not.
        pairs = data.known.get(config.split)
        knowns.append(pairs if pairs is None else (pairs.indices.tobytes(), pairs.indptr.tobytes()))
        if knowns[-1] != knowns[0]:
            raise UserError(f"{config.runs[0]} and {folder} differ in what is known beforehand of {config.split} "
                            "documents (filter files); make their data.npz from the same corpus")
        weights.append(stages.eval.inverse_propensity(np.bincount(train.labels, minlength=len(names)), len(train)))
        found, sha256 = load_predictions(Path(folder) / file, config.split, len(split), len(names))
        members += [found] if config.ensemble else []
        digests.append(sha256)
        added.append(contributions(found["labels"], split, weights[0]))
    if not (n := len(added[0])):
        raise UserError(f"none of the {config.split} documents of {config.runs[0]} has labels; nothing to compare")
    values = np.array([percent(one.sum(axis=0), n) for one in added])

    if config.ensemble:
        prepare(config, file, 2 * max(member["scores"].nbytes for member in members))
        arrays = ensemble(members)
        save_npz(Path(config.out) / file, config, arrays, ("data.npz",), stage="tools/compare.py", ranking="ensemble",
                 members=digests)
        more = {f"ensemble, {config.out}": percent(contributions(arrays["labels"], split, weights[0]).sum(axis=0), n)}
    elif len(values) == 2:
        # Sums are linear: all that is needed is the difference. That of a run with itself is exactly 0.
        drawn = bootstrap(np.column_stack([(added[1] - added[0])[:, :-1], added[0][:, -1]]), config.seed)
        low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
        more = {"second - first": values[1] - values[0], "  95% interval: from": low, "  to": high,
                "  % of resamples: second is better": 50 + 50 * np.sign(drawn.round(9)).mean(axis=0)}
    else:
        more = {"mean": values.mean(axis=0), "standard deviation": values.std(axis=0, ddof=1),
                "lowest": values.min(axis=0), "highest": values.max(axis=0)}
    print(f"{config.split}: {n:,} documents with labels; {len(split) - n:,} without labels are left out")
    print(f"{'%':34}" + "".join(f"{f'{name}@{j}':>8}" for name, j in COLUMNS))
    for name, values_M in [*zip(config.runs, values, strict=True), *more.items()]:
        print(f"{name:34}" + "".join(f"{'-':>8}" if np.isnan(value) else f"{value:8.2f}" for value in values_M))


if __name__ == "__main__":
    try:
        run(parse())
    except (UserError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        sys.exit(2)
