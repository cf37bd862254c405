"""Kill the pipeline again and again, and compare what comes out in the end with a run that was
never interrupted.

    python tests/kills.py --kills 100
    python tests/kills.py --kills 100 --processes 2      stage 4 in two processes, as with torchrun

Half of the kills come at a random moment, half right before or after a random one of the calls that
put a file in its place. After each, every artifact must be whole or absent. In the end what the
artifacts hold must be the same bit for bit, and so must the log, but for the speed in it.

Where stage 4 has several processes, it alone is killed: one of the processes, now the first, now
another. The rest cannot go on. They have to end by themselves soon, and all of them go on together.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: its threads do not survive a fork
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from conftest import SMALL, make_corpus, stages  # noqa: E402

from plumbing import several_devices  # noqa: E402
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


def start(run: Callable, before: Callable = lambda number: None, n_processes: int = 1) -> list[int]:
    """Children that run it together, silently. Each leaves with 0, or with 1 when it fails.

    before(number) is called in each of them. Returns their process ids.
    """
    # What torchrun would tell them.
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    meeting["WORLD_SIZE"] = str(n_processes)
    pids = []
    for number in range(n_processes):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            os.environ.update(meeting, RANK=str(number), LOCAL_RANK=str(number))
            several_devices.join(may=True)
            before(number)
            run()
            several_devices.leave()
        except BaseException as error:  # noqa: BLE001
            # Of several, the others fail when one is killed, and that is no news.
            if n_processes == 1:
                print(f"failed: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pids


def killed(pids: list[int], victim: int = 0, seconds: float | None = None) -> bool:
    """Whether the victim was killed, by itself or by us after that many seconds."""
    if seconds is not None:
        time.sleep(seconds)
        # A child that has ended is still there until it is waited for.
        os.kill(pids[victim], signal.SIGKILL)
    status = ended(pids[victim])
    assert status in (0, -signal.SIGKILL), f"a stage ended with {status}"
    for pid in pids:
        if pid != pids[victim]:
            # One that had come to its end before the kill has nothing to complain of.
            expected = (0,) if status == 0 else (0, 1)
            other = ended(pid)
            assert other in expected, f"beside one that ended with {status}: {other}"
    return status != 0


def ended(pid: int) -> int:
    """The exit code of a child. AssertionError when it does not end by itself within a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("a process does not end")


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


def kill_at_random(
    run: Callable, n_processes: int, seconds: float, n_calls: int, choose: random.Random
) -> bool:
    """Start it, and kill one of its processes. False where the kill came too late.

    It takes so many seconds, and makes so many calls that put a file in its place.
    """
    if choose.random() < 0.5:
        victim = choose.randrange(n_processes)
        pids = start(run, n_processes=n_processes)
        return killed(pids, victim, choose.uniform(0, seconds))
    # With several processes, the first one alone writes.
    n = choose.randrange(1, n_calls)
    after = choose.random() < 0.5
    pids = start(run, lambda number: number == 0 and die_at(n, after), n_processes)
    return killed(pids)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1, help="of stage 4")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    choose = random.Random(args.seed)
    count = dict.fromkeys(("data", "tree", "train", "eval"), 0)
    processes = dict.fromkeys(count, 1) | {"train": args.processes}
    pipelines = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder / "corpus")
        whole, broken = folder / "whole", folder / "broken"
        # 1. The run that is never interrupted.
        took = {}
        for stage, run in runs_of(whole, corpus).items():
            begin = time.perf_counter()
            assert not killed(start(run, n_processes=processes[stage]))
            took[stage] = time.perf_counter() - begin
        # 2. Others that are, until there were enough kills.
        while sum(count.values()) < args.kills:
            shutil.rmtree(broken, ignore_errors=True)
            for stage, run in runs_of(broken, corpus).items():
                n_calls = 12 if stage == "train" else 3
                tries = choose.randrange(1, 4)
                if args.processes > 1 and stage != "train":
                    tries = 0
                is_done = False
                while tries and not is_done and sum(count.values()) < args.kills:
                    tries -= 1
                    dead = kill_at_random(run, processes[stage], took[stage], n_calls, choose)
                    count[stage] += dead
                    digests(broken)
                    is_done = not dead
                if not is_done:
                    assert not killed(start(run, n_processes=processes[stage]))
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
