"""Train and tag for hours, and watch what the two processes take: memory, open files and disk have
to stay flat.

    python tests/soak.py --minutes 120
    python tests/soak.py --minutes 120 --corpus data/debian --limit 4000

Stage 4 trains without end: heads first, then epochs with validation, and a checkpoint every few
steps. Beside it tools.tag has a pipe into which a line comes every few moments, and each line has
to be answered. Both are the very commands that a user types. This script only looks at them from
outside, once a second, through /proc (so it needs Linux).

The first quarter of the time is for caches to fill. From then on nothing may grow: the second
quarter is compared with the last one. Only log.jsonl may: it gets a line for some steps.
"""

import argparse
import gzip
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from conftest import ROOT, make_corpus, stages  # noqa: E402

MIB = 2**20
# What may be more in the last quarter than in the second one, as a share: the memory allocator
# keeps a little more or less from one minute to the next.
MEMORY_SHARE = 0.03
SECONDS_BETWEEN_LINES = 0.2
MEASURES = ("MiB of memory", "open files", "threads", "MiB on disk", "files on disk")


# 1. What a process takes.


def memory(pid: int) -> float:
    """MiB of memory that the process has now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            kilobytes = int(line.split()[1])
            return kilobytes / 1024
    raise RuntimeError(f"process {pid} has ended")


def process(pid: int) -> list[float]:
    """The first three MEASURES, those of a process."""
    open_files = len(os.listdir(f"/proc/{pid}/fd"))
    threads = len(os.listdir(f"/proc/{pid}/task"))
    return [memory(pid), open_files, threads]


def disk(folders: list[Path]) -> list[float]:
    """The last two, those of folders."""
    sizes = []
    for folder in folders:
        for file in folder.rglob("*"):
            try:
                if file.is_file() and file.name != "log.jsonl":
                    sizes.append(file.stat().st_size)
            except FileNotFoundError:  # a temporary file that is renamed meanwhile
                continue
    return [sum(sizes) / MIB, len(sizes)]


# 2. The two commands.


def start_training(run: Path, settings: list[str], temporary: Path) -> subprocess.Popen:
    """Stage 4, with more epochs than there is time for."""
    command = [sys.executable, "04_train.py", "--run", str(run), "--epochs", "100000"]
    command += ["--head-epochs", "2", "--save-every", "20", "--amp", "off", *settings]
    return start(command, temporary, stdout=subprocess.DEVNULL)


def start_tagging(run: Path, temporary: Path) -> subprocess.Popen:
    """The tagger, which answers every line at once."""
    command = [sys.executable, "-m", "tools.tag", "--run", str(run)]
    command += ["--input", "-", "--batch-size", "1"]
    return start(command, temporary, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def start(command: list[str], temporary: Path, **streams) -> subprocess.Popen:
    """The command, with temporary files in a folder of its own, after everything else in the queue
    for the processor."""
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(["nice", *command], cwd=ROOT, env=environment, **streams)


def texts(corpus: Path) -> Iterator[str]:
    """The texts of the test split, again and again."""
    with gzip.open(corpus / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        found = [json.loads(line)["text"] for line in file]
    return itertools.cycle(found)


def answered(tagging: subprocess.Popen, text: str) -> bool:
    """Whether a line for the text comes back, with its labels."""
    line = json.dumps({"text": text}).encode() + b"\n"
    tagging.stdin.write(line)
    tagging.stdin.flush()
    return "labels" in json.loads(tagging.stdout.readline())


# 3. Whether it stays flat.


def judge(name: str, samples: list[list[float]]) -> list[str]:
    """Print how each measure went; what grew, in words."""
    quarter = len(samples) // 4
    grew = []
    # The tagger writes nothing, so it has fewer measures.
    for what, values in zip(MEASURES, zip(*samples, strict=True), strict=False):
        second, last = values[quarter : 2 * quarter], values[3 * quarter :]
        # The middle of memory, which rises and falls within an epoch. The peak of what is counted:
        # a file is there only while a checkpoint is written.
        typical = statistics.median if "memory" in what else max
        before, after = typical(second), typical(last)
        allowed = before * (1 + MEMORY_SHARE) if "MiB" in what else before
        print(f"{name:9} {what:14} {before:10.1f} {after:10.1f}   at most {max(values):.1f}")
        if after > allowed:
            grew.append(f"{name}: {what} grew from {before:.1f} to {after:.1f}")
    return grew


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--corpus", help="a corpus in JSON lines (default: a small made-up one)")
    parser.add_argument("--limit", type=int, default=0, help="documents (0: all)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = Path(args.corpus) if args.corpus else make_corpus(folder / "corpus")
        run, temporary = folder / "run", folder / "temporary"
        temporary.mkdir()
        stages.data.run(stages.data.Config(run=str(run), corpus=str(corpus), limit=args.limit))
        settings = []
        if not args.corpus:
            settings = ["--tiny", "2,32", "--max-len", "32"]
        stages.tree.run(stages.tree.Config(run=str(run)))

        # 1. Train until there is a first model, which the tagger takes.
        training = start_training(run, settings, temporary)
        while not (run / "model.pt").exists():
            assert training.poll() is None, "the training has ended"
            time.sleep(1)
        tagging = start_tagging(run, temporary)
        source = texts(corpus)
        assert answered(tagging, next(source))

        # 2. Look at both, until the time is over.
        samples = {"training": [], "tagging": []}
        n_answers = 0
        end = time.monotonic() + 60 * args.minutes
        next_look = time.monotonic()
        while time.monotonic() < end:
            assert training.poll() is None, "the training has ended"
            assert answered(tagging, next(source)), "a line was not answered"
            n_answers += 1
            if time.monotonic() >= next_look:
                samples["training"].append(process(training.pid) + disk([run, temporary]))
                samples["tagging"].append(process(tagging.pid))
                next_look += 1
            time.sleep(SECONDS_BETWEEN_LINES)

        # 3. Both have to end as they should when they are asked to.
        tagging.stdin.close()
        assert tagging.wait(60) == 0, "the tagger ended with an error"
        training.terminate()
        assert training.wait(600) == 130, "the training did not end with a checkpoint"
        log = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        n_steps = json.loads(log[-1])["step"]
        print(f"{args.minutes:.0f} minutes, {n_steps:,} steps, {n_answers:,} lines tagged")
        print(f"{'':24} {'2nd quarter':>10} {'the last':>10}")
        grew = judge("training", samples["training"]) + judge("tagging", samples["tagging"])
    if grew:
        sys.exit("\n".join(grew))
    print("nothing grew")


if __name__ == "__main__":
    main()
