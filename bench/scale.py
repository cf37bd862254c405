"""The whole path at the size of a large corpus: what each stage takes in time, memory and disk.

    python bench/scale.py                          670,091 labels, 490,000 documents: an hour
    python bench/scale.py --labels 20000 --documents 15000 --test 2000 --steps 50        a minute

The corpus is made up, as large as Amazon-670K: texts of 60 words at the median, five labels each,
and a vocabulary of 200,000 words that follows Zipf's law. Labels form a hierarchy of topics, so
that the tree has something to find. The stages run as the README runs them, one process each.
Stages 1, 2 and 5 run in full; of the epoch of stage 4, which would take hours on a CPU, --steps
batches are trained, and the validation after it is in full. Quality means nothing here.

Writes   WORK/corpus, WORK/run   the corpus and the artifacts; both must not be there yet
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import ROOT, Report, stages, topic_tokens

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
WORDS = 200_000
PART = 10_000  # documents that are made, and in memory, at a time
LABELS_EACH = 5


# 1. A corpus.


def word(number: int) -> str:
    """Word 0, 1, 2, ... of the made-up language: syllables for digits, two at least."""
    syllables = []
    while number or len(syllables) < 2:
        number, digit = divmod(number, len(SYLLABLES))
        syllables.append(SYLLABLES[digit])
    return "".join(syllables)


def documents(n: int, n_labels: int, seed: int) -> Iterator[dict]:
    """Documents as JSON lines hold them, each about one label and labelled with its neighbours."""
    rng = np.random.default_rng(seed)
    words = [word(number) for number in range(WORDS)]
    for start in range(0, n, PART):
        size = min(PART, n - start)
        # 1. What a document is about, and its labels: that one and some near it in the hierarchy.
        main = rng.integers(0, n_labels, size)
        near = main[:, None] + rng.integers(-8, 9, (size, LABELS_EACH))
        near[:, 0] = main
        near = np.clip(near, 0, n_labels - 1)
        # 2. Its text. Lengths are log-normal, as those of product texts are.
        length = np.exp(rng.normal(np.log(60), 0.7, size)).clip(4, 600).astype(int)
        tokens = topic_tokens(main, n_labels, WORDS, int(length.max()), rng)
        for i in range(size):
            text = " ".join([words[number] for number in tokens[i, : length[i]]])
            labels = [f"label {label}" for label in np.unique(near[i])]
            yield {"text": text, "labels": labels}


def write_lines(path: Path, rows: Iterator[dict]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def write_corpus(folder: Path, n_labels: int, n_train: int, n_test: int) -> None:
    """Train, validation and test documents, and every label with a text of its own."""
    folder.mkdir(parents=True)
    sizes = {"train": n_train, "val": n_test // 10, "test": n_test}
    for seed, (name, size) in enumerate(sizes.items()):
        write_lines(folder / f"{name}.jsonl.gz", documents(size, n_labels, seed))
    labels = ({"name": f"label {i}", "text": word(i)} for i in range(n_labels))
    write_lines(folder / "labels.jsonl.gz", labels)


# 2. A stage, watched.


def watch(command: list[str]) -> dict[str, float]:
    """Run a command; its wall-clock seconds, its CPU seconds, and its peak memory in bytes."""
    before = os.times()
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    peak = 0
    # The kernel keeps the peak for us, as long as the process lives.
    while process.poll() is None:
        peak = max(peak, peak_of(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    seconds = time.perf_counter() - start
    after = os.times()
    cpu_before = before.children_user + before.children_system
    cpu_after = after.children_user + after.children_system
    return {"seconds": seconds, "cpu": cpu_after - cpu_before, "peak": peak}


def peak_of(process_id: int) -> int:
    """Bytes: the most memory that a process has had so far; 0 when it has just ended."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    return 0


def disk(folder: Path) -> int:
    """Bytes of the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def train_some_steps(run: str, steps: int, shape: str) -> None:
    """Stage 4, with the first batches of one epoch instead of all: in a process of its own."""
    train_stage = stages.train
    whole_epoch = train_stage.Batches.rows
    train_stage.Batches.rows = lambda self, epoch: whole_epoch(self, epoch)[:steps]
    train_stage.Batches.__len__ = lambda self: len(self.rows(0))
    train_stage.run(train_stage.Config(run=run, epochs=1, tiny=shape))


# 3. All of them.


def measure(args: argparse.Namespace) -> None:
    work = Path(args.work)
    corpus = work / "corpus"
    run = work / "run"
    if corpus.exists() or run.exists():
        raise SystemExit(f"{work} holds a corpus or a run: remove it, or choose another --work")
    row = Report(args).row
    start = time.perf_counter()
    write_corpus(corpus, args.labels, args.documents, args.test)
    row("the corpus: seconds to make it", time.perf_counter() - start, "", ".0f")
    row("the corpus: GiB on disk, gzipped", disk(corpus) / 2**30)

    train = ["bench/scale.py", "--train", str(run), "--steps", str(args.steps)]
    train += ["--shape", args.shape]
    commands = {
        "stage 1": ["01_data.py", "--run", str(run), "--corpus", str(corpus)],
        "stage 2": ["02_label_tree.py", "--run", str(run)],
        f"stage 4, {args.steps} steps": train,
        "stage 5": ["05_eval.py", "--run", str(run)],
    }
    # Seconds and GiB that a corpus as large as Amazon-670K should take, on two CPU cores.
    targets = {"stage 1": ("< 1200", "< 4"), "stage 2": ("< 300", "< 4"), "stage 4": ("", "< 8")}
    on_disk = 0
    for stage, command in commands.items():
        found = watch(command)
        seconds_target, memory_target = targets.get(stage[:7], ("", ""))
        row(f"{stage}: seconds", found["seconds"], seconds_target, ".0f")
        row(f"{stage}: CPU seconds", found["cpu"], "", ".0f")
        row(f"{stage}: peak memory, GiB", found["peak"] / 2**30, memory_target, ".1f")
        row(f"{stage}: files written, GiB", (disk(run) - on_disk) / 2**30)
        on_disk = disk(run)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, default=670_091, help="labels [670091]")
    parser.add_argument("--documents", type=int, default=490_000, help="to train on [490000]")
    parser.add_argument("--test", type=int, default=20_000, help="test documents [20000]")
    parser.add_argument("--steps", type=int, default=300, help="training steps [300]")
    parser.add_argument("--shape", default="1,128", help="of the encoder 'tiny' [1,128]")
    parser.add_argument("--work", default="bench/results/scale", help="folder for all files")
    parser.add_argument("--out", default="bench/results/scale.json")
    parser.add_argument("--train", default="", help=argparse.SUPPRESS)  # used by this script itself
    args = parser.parse_args()
    if args.train:
        train_some_steps(args.train, args.steps, args.shape)
    else:
        measure(args)


if __name__ == "__main__":
    main()
