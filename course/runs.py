"""What the computing cells of the labs share: run folders, and what a training has reached."""

import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.stages import load_stages
from plumbing.store import save_npz

stages = load_stages()


def need(run: str, *names: str) -> None:
    """Ends the lab with a sentence if a file of the run folder is missing."""
    for name in names:
        if not (Path(run) / name).exists():
            missing = (Path(run) / name).resolve()
            sys.exit(f"{missing} is missing; run the commands at the top of this lab")


def new_run(run: str, name: str) -> str:
    """A run folder beside `run`, with its data and its tree. What was in it before is deleted."""
    # Data and tree are copied, not made again: all runs of a lab are compared on the same ones.
    folder = Path(f"{run}-{name}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for artifact in ("data.npz", "tree.npz"):
        shutil.copy(Path(run) / artifact, folder / artifact)
    return str(folder)


def save_tree(run: str, slot_to_label: np.ndarray, levels: list[int]) -> None:
    """Put another tree into a run folder."""
    stages.data.load(run)  # what a tree is made from has to be read first
    arrays = {"slot_to_label": slot_to_label.astype(np.int32), "levels": np.array(levels)}
    save_npz(Path(run) / "tree.npz", stages.tree.Config(run=run), arrays, made_from=("data.npz",))


def validations(run: str) -> list[dict]:
    """What stage 4 found on the validation split after each epoch, in percent."""
    records = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "validation" in record]


class Reached(NamedTuple):
    """A run's best epoch on the validation split, in percent."""

    precision: list[float]  # P@1, P@3, P@5 of the ranking that stage 4 chose
    by_label: list[float]  # the same, ranked by p(label) alone
    recall: list[float]  # of the shortlist of each cluster level


def reached(run: str) -> Reached:
    """The best epoch of a training, as stage 4 chooses it: by the sum of P@1, P@3 and P@5."""
    found = []
    for record in validations(run):
        validation = record["validation"]
        precision = validation["P"][record["ranking"]]
        found.append(Reached(precision, validation["P"]["label"], validation["recall"]))
    return max(found, key=lambda epoch: sum(epoch.precision))
