"""Asks stage 4 to stop, by every signal, in every phase, with every kind of broken output, and lets
it go on: nothing is lost, and the model is that of a training that never stopped.

    python tests/stops.py                  all of them
    python tests/stops.py --sample 6       some, drawn with --seed

The signal comes at a chosen place, from within: while the features are computed, in a step of the
heads, in a step of all, in validation, and while a checkpoint is written. Stage 4 runs as from the
command line, in a child process.

A stop has to end with exit code 130, and leave a checkpoint with which --resume, and no other flag,
goes on. Only while the features are computed there is nothing to save yet: then the training begins
once more.
"""

import argparse
import io
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: its threads do not survive a fork
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from conftest import SMALL, make_corpus, stages  # noqa: E402

from plumbing.cli import main as run_script  # noqa: E402
from plumbing.store import load_pt  # noqa: E402

train = stages.train
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
PLACES = ("features", "heads", "all", "validation", "saving")
STREAMS = ("a file", "closed", "a broken pipe", "a full disk", "ascii")
SETTINGS = SMALL | {"head_epochs": 1}


# 1. Where the signal comes.


def at_call(function: Callable, n: int, number: int) -> Callable:
    """The function, which sends the signal to this process at its n-th call."""
    calls = itertools.count(1)

    def call(*args, **more):
        if next(calls) == n:
            os.kill(os.getpid(), number)
        return function(*args, **more)

    return call


def arm(place: str, number: int) -> None:
    """Let the signal come there. An epoch has 19 steps; the first epoch is of the heads alone."""
    if place == "features":
        model = stages.model.Cascade
        model.pooled = at_call(model.pooled, 3, number)
    elif place == "heads":
        train.Training.step = at_call(train.Training.step, 5, number)
    elif place == "all":
        train.Training.step = at_call(train.Training.step, 19 + 5, number)
    elif place == "validation":
        train.validate = at_call(train.validate, 2, number)
    elif place == "saving":
        train.save_checkpoint = at_call(train.save_checkpoint, 1, number)


# 2. Where the output goes.


def set_streams(kind: str, log: Path) -> None:
    """Replace stdout and stderr by streams as Python would make them for such an output."""
    if kind == "closed":
        os.close(1)
        os.close(2)
        sys.stdout = None
        sys.stderr = None
        return
    if kind == "a broken pipe":
        read, target = os.pipe()
        os.close(read)
    elif kind == "a full disk":
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    encoding = "ascii" if kind == "ascii" else "utf-8"
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding)
    sys.stderr = io.TextIOWrapper(
        os.fdopen(2, "wb", closefd=False), encoding, errors="backslashreplace"
    )


# 3. Stage 4 in a child.


def stage_4(run: Path, flags: list[str], kind: str, log: Path, before: Callable) -> int:
    """The exit code of 04_train.py."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        # Whoever runs this in the background has it ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        set_streams(kind, log)
        before()
        sys.argv = ["04_train.py", "--run", str(run), *flags]
        run_script(train.run, train.Config, train.__doc__)
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


def flags_of(settings: dict) -> list[str]:
    flags = []
    for key, value in settings.items():
        flags += [f"--{key.replace('_', '-')}", str(value)]
    return flags


def content(run: Path) -> str:
    """The digest of what was trained."""
    return load_pt(run / "model.pt")[1]["sha256"]


def stopped(data: Path, folder: Path, place: str, name: str, kind: str) -> Path:
    """A run that was stopped there and has gone on. AssertionError when something is lost."""
    what = f"{name} in {place}, output: {kind}"
    run = folder / what.replace(" ", "_").replace(",", "").replace(":", "")
    run.mkdir()
    for file in ("data.npz", "tree.npz"):
        os.link(data / file, run / file)
    log = run / "printed.txt"
    flags = flags_of(SETTINGS)
    number = getattr(signal, name)
    code = stage_4(run, flags, kind, log, lambda: arm(place, number))
    assert code == 130, f"{what}: exit code {code}"
    is_saved = (run / "checkpoint.pt").exists()
    assert is_saved == (place != "features"), f"{what}: checkpoint.pt: {is_saved}"
    if is_saved:
        flags = ["--resume"]
    code = stage_4(run, flags, "a file", log, lambda: None)
    assert code == 0, f"{what}: going on ended with {code}: {log.read_text()[-300:]}"
    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=0, help="how many (0: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cases = list(itertools.product(PLACES, SIGNALS, STREAMS))
    if args.sample:
        cases = random.Random(args.seed).sample(cases, args.sample)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = folder / "whole"
        corpus = make_corpus(folder / "corpus")
        stages.data.run(stages.data.Config(run=str(whole), corpus=str(corpus), vocab=400))
        stages.tree.run(stages.tree.Config(run=str(whole), levels="8"))
        log = folder / "whole.txt"
        code = stage_4(whole, flags_of(SETTINGS), "a file", log, lambda: None)
        assert code == 0, log.read_text()
        expected = content(whole)
        for case in cases:
            run = stopped(whole, folder, *case)
            assert content(run) == expected, f"{case}: another model"
    seconds = time.perf_counter() - start
    print(f"{len(cases)} stops in {seconds:.0f} s: 0 losses, the same model")


if __name__ == "__main__":
    main()
