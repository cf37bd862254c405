"""The bug clinic: eight bugs that do not crash.

    python -m course.clinic --list     the names of the bugs
    python -m course.clinic NAME       healthy and sick figures side by side, in half a CPU minute

The script copies the code into a temporary folder, and puts the bug into this copy. Your own files
are not changed. Then it trains and measures twice, with the code as it is and with the bug.

First look at the figures. What would you look at next? The page course/clinic/NAME.md says what the
bug is, below a line. NAME.patch is the bug itself.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from course.clinic import pipeline
from course.clinic.corpus import make_small_corpus
from course.clinic.dead_encoder import make_dead_encoder

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CODE = ("*.py", "data/*.py", "plumbing/*.py", "course/*.py", "course/clinic/*.py")
NAMES = sorted(path.stem for path in HERE.glob("*.patch"))
# Two bugs need another encoder, or longer documents, to be seen (pipeline.py: SETTINGS).
KINDS = {"04_the_size_of_a_batch": "long", "08_weights_that_grow": "dead"}


def copy_code(folder: Path) -> None:
    """Copy the code of the repository, without corpora and runs, into `folder`."""
    for pattern in CODE:
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def put_bug(name: str, folder: Path) -> None:
    """Apply the patch to a copy. CalledProcessError if it does not fit."""
    patch = HERE / f"{name}.patch"
    # Where the copy lies within another repository, git would look for the files there.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", str(patch)], cwd=folder, env=environment, check=True)


def run_in_copy(folder: Path, run: Path, kind: str) -> dict[str, float]:
    """Train and measure with the code in `folder`; the figures."""
    command = [sys.executable, "-m", "course.clinic.pipeline", str(run), kind]
    with open(run / "printed.txt", "w") as printed:
        done = subprocess.run(command, cwd=folder, stdout=printed, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit((run / "printed.txt").read_text()[-2000:])
    return json.loads((run / "figures.json").read_text())


def compare(name: str, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """(healthy figures, sick figures). All files go into `folder`."""
    kind = KINDS.get(name, "tiny")
    # 1. The corpus, and for one bug an encoder, too.
    corpus = folder / "corpus"
    make_small_corpus(ROOT / "data" / "debian", corpus)
    encoder = "tiny"
    if kind == "dead":
        encoder = str(folder / "encoder")
        make_dead_encoder(corpus, Path(encoder))
    # 2. Stages 1 and 2 are healthy in both runs: no bug is in them.
    first = folder / "first"
    pipeline.prepare(corpus, encoder, first)
    # 3. Two copies of the code, one of them sick, and a run of each.
    figures = []
    for state in ("healthy", "sick"):
        code = folder / f"code-{state}"
        copy_code(code)
        if state == "sick":
            put_bug(name, code)
        run = folder / f"run-{state}"
        run.mkdir()
        for file in ("data.npz", "tree.npz"):
            shutil.copy(first / file, run)
        print(f"{state}: stages 4 and 5 run ...", flush=True)
        figures.append(run_in_copy(code, run, kind))
    return figures[0], figures[1]


def print_figures(healthy: dict[str, float], sick: dict[str, float]) -> None:
    """A figure a line."""
    print(f"\n{'':42}{'healthy':>9}{'sick':>9}")
    for name, value in healthy.items():
        print(f"{name:42}{value:9.2f}{sick[name]:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m course.clinic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", choices=NAMES, metavar="NAME", help="a bug")
    parser.add_argument("--list", action="store_true", help="name the bugs")
    args = parser.parse_args()
    if args.list:
        print("\n".join(NAMES))
        return
    if args.name is None:
        parser.error("expected the NAME of a bug, or --list")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        healthy, sick = compare(args.name, Path(folder))
    print_figures(healthy, sick)


if __name__ == "__main__":
    main()
