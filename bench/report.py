"""What the full evaluation of tools/report.py costs, on synthetic predictions of many documents.

    python bench/report.py
    python bench/report.py --documents 500000 --labels 131072 --k 100

Half of a document's labels are among its first predictions, the other predictions are drawn.
Predictions on a tenth of as many documents stand for the validation split. CPU seconds are those of
all threads.
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, Report, offsets_of, peak_bytes, random_documents, stages

from plumbing.store import save_npz
from tools import report


def predictions(split, n_labels: int, k: int, seed: int = 0) -> dict[str, np.ndarray]:
    """{"labels" (N, k), "scores" (N, k)}: no label twice for a document, falling scores."""
    rng = np.random.default_rng(seed)
    n = len(split)
    # 1. A start and an odd stride for each document. As the number of labels is a power of two, no
    #    label comes twice.
    start = rng.integers(n_labels, size=(n, 1))
    stride = 2 * rng.integers(n_labels // 2, size=(n, 1)) + 1
    drawn = (start + stride * np.arange(k)) % n_labels

    # 2. Half of the correct labels take the place that they have in their document's list.
    labels = drawn.copy()
    offsets = split.label_offsets
    doc_P, place_P, _ = stages.data.flatten(offsets[:-1], np.diff(offsets))
    is_found_P = (rng.random(len(doc_P)) < 0.5) & (place_P < k)
    labels[doc_P[is_found_P], place_P[is_found_P]] = split.labels[is_found_P]

    # 3. A document in which a label now stands twice keeps what was drawn.
    in_order = np.sort(labels, axis=1)
    has_twice = (np.diff(in_order) == 0).any(axis=1)
    labels[has_twice] = drawn[has_twice]
    scores = np.cumprod(1 - rng.random((n, k), np.float32) / 5, axis=1)
    return {"labels": labels.astype(np.int32), "scores": scores}


def write_run(folder: Path, documents: int, n_labels: int, k: int) -> None:
    """Write data.npz and the predictions of both splits into a run folder."""
    sizes = {
        "train": documents,
        "val": max(1, documents // 10),
        "test": documents,
        "label": n_labels,
    }
    arrays = {}
    splits = {}
    for seed, (name, n) in enumerate(sizes.items()):
        splits[name] = random_documents(n, n_labels, 1000, 4, seed)
        for key, value in splits[name]._asdict().items():
            arrays[f"{name}_{key}"] = value
    for name in stages.data.SPLITS:
        arrays[f"{name}_known"] = np.zeros(0, np.int32)
        arrays[f"{name}_known_offsets"] = np.zeros(sizes[name] + 1, np.int64)
    names = [str(i).encode() for i in range(n_labels)]
    arrays["names"] = np.frombuffer(b"".join(names), np.uint8)
    arrays["names_offsets"] = offsets_of([len(name) for name in names])
    arrays["tokenizer"] = np.zeros(1000, np.uint8)
    save_npz(folder / "data.npz", stages.data.Config(), arrays, vocab_size=1000)

    for name, file in (("test", "predictions.npz"), ("val", "predictions.val.npz")):
        # To have loaded data.npz is part of a prediction: its digest goes into the file.
        stages.data.load(folder)
        found = predictions(splits[name], n_labels, k)
        save_npz(folder / file, stages.eval.Config(split=name), found, ("data.npz",))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = ROOT / "bench" / "results" / "report.json"
    parser.add_argument("--documents", type=int, default=500000, help="of the test split [500000]")
    parser.add_argument("--labels", type=int, default=131072, help="a power of two [131072]")
    parser.add_argument("--k", type=int, default=100, help="predicted labels of a document [100]")
    parser.add_argument("--out", default=str(out))
    args = parser.parse_args()
    row = Report(args).row
    printed = io.StringIO()

    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), args.documents, args.labels, args.k)

        def full_report() -> None:
            with contextlib.redirect_stdout(printed):
                report.run(report.Config(run=folder, isotonic=True))

        wall = time.perf_counter()
        cpu = time.process_time()
        peak = peak_bytes(full_report)
        wall = time.perf_counter() - wall
        cpu = time.process_time() - cpu

    what = f"report of {args.documents:,} documents, {args.labels:,} labels, top {args.k}"
    row(f"{what}: seconds", wall, "", ".1f")
    row(f"{what}: CPU seconds", cpu, "< 20", ".1f")
    row(f"{what}: peak memory, GiB", peak / 2**30)
    print(printed.getvalue())


if __name__ == "__main__":
    main()
