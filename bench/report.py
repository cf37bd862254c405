"""What the full evaluation of tools/report.py costs: everything it prints, of synthetic predictions of many documents.

    python bench/report.py
    python bench/report.py --documents 500000 --labels 131072 --k 100

Predictions on a tenth of as many documents stand for the validation split. Half of a document's labels are among its
first predictions, the other predictions are drawn. CPU seconds are those of all threads.
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, Report, peak_bytes, random_documents, stages

from plumbing.store import save_npz
from tools import report


def predictions(split, n_labels: int, k: int, seed: int = 0) -> dict[str, np.ndarray]:
    """{"labels" (N, k), "scores" (N, k)}: no label twice for a document, falling scores."""
    rng, n = np.random.default_rng(seed), len(split)
    # A start and an odd stride for each document: with a power of two labels no label comes twice.
    labels = (rng.integers(n_labels, size=(n, 1)) + (2 * rng.integers(n_labels // 2, size=(n, 1)) + 1) * np.arange(k))
    labels %= n_labels
    drawn, offsets = labels.copy(), split.label_offsets
    doc_P, place_P, _ = stages.data.flatten(offsets[:-1], np.diff(offsets))
    found = (rng.random(len(doc_P)) < 0.5) & (place_P < k)
    labels[doc_P[found], place_P[found]] = split.labels[found]
    twice = (np.diff(np.sort(labels, axis=1)) == 0).any(axis=1)
    labels[twice] = drawn[twice]
    scores = np.cumprod(1 - rng.random((n, k), np.float32) / 5, axis=1)
    return {"labels": labels.astype(np.int32), "scores": scores}


def write_run(folder: Path, documents: int, n_labels: int, k: int) -> None:
    """data.npz and predictions of both splits in a run folder."""
    sizes = {"train": documents, "val": max(1, documents // 10), "test": documents, "label": n_labels}
    splits = {name: random_documents(n, n_labels, 1000, 4, seed) for seed, (name, n) in enumerate(sizes.items())}
    arrays = {f"{name}_{key}": value for name, split in splits.items() for key, value in split._asdict().items()}
    for name in stages.data.SPLITS:
        arrays |= {f"{name}_known": np.zeros(0, np.int32),
                   f"{name}_known_offsets": np.zeros(sizes[name] + 1, np.int64)}
    names = [str(i).encode() for i in range(n_labels)]
    arrays |= {"names": np.frombuffer(b"".join(names), np.uint8), "tokenizer": np.zeros(1000, np.uint8),
               "names_offsets": np.cumsum([0] + [len(name) for name in names])}
    save_npz(folder / "data.npz", stages.data.Config(), arrays, vocab_size=1000)
    stages.data.load(folder)  # which predictions are made from
    for name, file in (("test", "predictions.npz"), ("val", "predictions.val.npz")):
        save_npz(folder / file, stages.eval.Config(split=name), predictions(splits[name], n_labels, k),
                           ("data.npz",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=500000, help="of the test split [500000]")
    parser.add_argument("--labels", type=int, default=131072, help="a power of two [131072]")
    parser.add_argument("--k", type=int, default=100, help="predicted labels of a document [100]")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "report.json"))
    args = parser.parse_args()
    row, printed = Report(args).row, io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), args.documents, args.labels, args.k)

        def measured() -> None:
            with contextlib.redirect_stdout(printed):
                report.run(report.Config(run=folder, isotonic=True))

        wall, cpu = time.perf_counter(), time.process_time()
        peak = peak_bytes(measured)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    what = f"report of {args.documents:,} documents, {args.labels:,} labels, top {args.k}"
    row(f"{what}: seconds", wall, "", ".1f")
    row(f"{what}: CPU seconds", cpu, "< 20", ".1f")
    row(f"{what}: peak memory, GiB", peak / 2**30)
    print(printed.getvalue())


if __name__ == "__main__":
    main()
