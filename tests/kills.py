"""Kill the pipeline again and again, and compare what comes out in the end with a run that was
never interrupted.

    python tests/kills.py --kills 100

Half of the kills come at a random moment, half right before or after a random one of the calls that
put a file in its place. After each, every artifact must be whole or absent. In the end what the
artifacts hold must be the same bit for bit, and so must the log, but for the speed in it.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: its threads do not survive a fork
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from conftest import SMALL, make_corpus, stages  # noqa: E402

from plumbing.store import load_npz, load_pt  # noqa: E402

ARTIFACTS = (
    "data.npz",
    "tree.npz",
    "model.pt",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "predictions.npz",
)
CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")


def runs_of(folder: Path, corpus: Path) -> dict:
    """{stage: a function that runs it in the folder, going on where there is something to go on
    from}.
    """

    def train():
        resume = any((folder / name).exists() for name in CHECKPOINTS)
        # The heads alone first, as with a pretrained encoder: kills come in both phases, and
        # between them.
        config = stages.train.Config(
            run=str(folder), resume=resume, save_every=2, **SMALL | {"head_epochs": 1}
        )
        stages.train.run(config)

    return {
        "data": lambda: stages.data.run(
            stages.data.Config(run=str(folder), corpus=str(corpus), vocab=400)
        ),
        "tree": lambda: stages.tree.run(stages.tree.Config(run=str(folder), levels="8")),
        "train": train,
        "eval": lambda: stages.eval.run(stages.eval.Config(run=str(folder), k=20)),
    }


def die_at(n: int, after: bool) -> None:
    """Let this process be killed at its n-th call of what brings a file to the disk and into its
    place.
    """
    calls = 0

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            result = function(*args, **kwargs) if after or calls != n else None
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)


def start(run, before=lambda: None) -> int:
    """Process id of a child that runs it silently and leaves with 0, or with 1 when it fails."""
    pid = os.fork()
    if pid:
        return pid
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        before()
        run()
    except BaseException as error:  # noqa: BLE001
        print(f"failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def killed(pid: int, seconds: float | None) -> bool:
    """Whether the child was killed, by itself or by us after that many seconds."""
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # a child that has ended is still there until it is waited for
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), f"a stage ended with {status}"
    return status != 0


def digests(folder: Path) -> dict[str, str]:
    """{artifact: sha256 of what it holds}; every artifact that is there can be loaded and belongs
    with the others.
    """
    loads = {name: load_npz if name.endswith("npz") else load_pt for name in ARTIFACTS}
    return {
        name: load(folder / name)[1]["sha256"]
        for name, load in loads.items()
        if (folder / name).exists()
    }


def log_of(folder: Path) -> list[dict]:
    return [
        {key: value for key, value in json.loads(line).items() if key != "batches_per_s"}
        for line in (folder / "log.jsonl").read_text().splitlines()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    choose, count, pipelines = (
        random.Random(args.seed),
        dict.fromkeys(("data", "tree", "train", "eval"), 0),
        0,
    )
    with tempfile.TemporaryDirectory() as folder:
        corpus, whole, broken = (
            make_corpus(Path(folder) / "corpus"),
            Path(folder) / "whole",
            Path(folder) / "broken",
        )
        took = {}
        for stage, run in runs_of(whole, corpus).items():
            begin = time.perf_counter()
            assert not killed(start(run), None)
            took[stage] = time.perf_counter() - begin
        while sum(count.values()) < args.kills:
            shutil.rmtree(broken, ignore_errors=True)
            for stage, run in runs_of(broken, corpus).items():
                # At a random moment for some tries, then at a random call; a try that comes too
                # late ends the stage.
                tries = choose.randrange(1, 4)
                for _ in range(tries if sum(count.values()) < args.kills else 0):
                    if choose.random() < 0.5:
                        dead = killed(start(run), choose.uniform(0, took[stage]))
                    else:
                        n, after = (
                            choose.randrange(1, 12 if stage == "train" else 3),
                            choose.random() < 0.5,
                        )
                        dead = killed(start(run, lambda n=n, after=after: die_at(n, after)), None)
                    count[stage] += dead
                    digests(broken)
                    if not dead:
                        break
                else:
                    assert not killed(start(run), None)
            pipelines += 1
            assert digests(whole) == digests(broken), "the artifacts differ"
            assert log_of(whole) == log_of(broken), "log.jsonl differs"
            assert sorted(os.listdir(broken)) == sorted(os.listdir(whole)), "files are left over"
    shares = ", ".join(f"{n} in {stage}" for stage, n in count.items())
    print(
        f"{sum(count.values())} kills ({shares}) over {pipelines} pipelines: "
        "0 losses, the same artifacts and log"
    )


if __name__ == "__main__":
    main()
