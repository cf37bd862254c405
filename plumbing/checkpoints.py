"""Checkpoints: everything that a training needs to go on as if it had never stopped.

The newest lies in RUN/checkpoint.pt, the one before it in RUN/checkpoint.previous.pt: at any moment
one of the two is whole.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from plumbing import several_devices
from plumbing.cli import GIVEN
from plumbing.errors import UserError
from plumbing.store import load_pt, save_pt
from plumbing.training_log import keep_log

NEWEST = "checkpoint.pt"
BEFORE = "checkpoint.previous.pt"


# 1. Files.


def save_checkpoint(folder: Path, config: Any, content: dict) -> None:
    """Write RUN/checkpoint.pt and keep the one before."""
    made_from = ("data.npz", "tree.npz")
    save_pt(folder / NEWEST, config, content, made_from, keep=folder / BEFORE)


def load_checkpoint(folder: Path) -> dict:
    """The newest checkpoint of a run that is whole."""
    newest = folder / NEWEST
    before = folder / BEFORE
    try:
        return load_pt(newest)[0]
    except UserError as error:
        if not before.exists():
            raise
        state = load_pt(before)[0]
        # Put it first, or the next checkpoint would put the damaged one in its place.
        several_devices.wait_for_all()
        if several_devices.is_first():
            os.replace(before, newest)
        step = state["steps_before"] + state["step"]
        print(f"{without_advice(error)}; taking the checkpoint before it, of step {step}")
        return state


def without_advice(error: UserError) -> str:
    """What an error of the store says, without the command that mends it."""
    return str(error).split("; run: ")[0]


# 2. Going on, and starting over.


def to_go_on_from(folder: Path, config: Any) -> tuple[dict, Any]:
    """(the checkpoint to go on from, the settings it was made with).

    UserError, with all of them, where settings are given that differ from those.
    """
    state = load_checkpoint(folder)
    trained_with = state["config"]
    fields = {field.name: field for field in dataclasses.fields(config)}
    unknown = sorted(set(trained_with) - set(fields))
    if unknown:
        raise UserError(
            f"--resume: {folder} was trained with {', '.join(unknown)}, which this script does not "
            "know; go on with the script that began it"
        )
    differ = []
    for key, before in trained_with.items():
        given = getattr(config, key)
        is_given = key in GIVEN or given != fields[key].default
        if is_given and given != "auto" and without_blanks(given) != before:
            differ.append(f"{key}={before}, not {given}")
    if differ:
        raise UserError(
            f"--resume: {folder} was trained with {'; '.join(differ)}. A checkpoint brings its "
            "settings: leave these flags out, or start over without --resume"
        )
    return state, dataclasses.replace(config, **trained_with)


def without_blanks(value: Any) -> Any:
    """'1, 2' as it is saved: '1,2'."""
    return value.replace(" ", "") if isinstance(value, str) else value


def go_on(folder: Path, state: dict, cascade: str) -> None:
    """Say where the training goes on, and cut the log back to there.

    UserError unless the name of the model's class is that of the checkpoint.
    """
    trained_as = state.get("cascade", "Cascade")  # older files do not say
    if trained_as != cascade:
        raise UserError(
            f"--resume: {folder} was trained as {trained_as}, this is {cascade}; "
            "go on with the script that began it"
        )
    # The best model so far may have been lost. Then the next epoch is the best.
    if state["best"] > -1:
        try:
            load_pt(folder / "model.pt")
        except UserError as error:
            print(f"{without_advice(error)}; the next epoch counts as the best so far")
            state["best"] = -1.0
    step = state["steps_before"] + state["step"]
    if several_devices.is_first():
        keep_log(folder / "log.jsonl", step)
    if state["finished"]:
        print("this run has finished; nothing is left to do")
    else:
        print(f"going on after step {step}, in {where_in(state)}")


def where_in(state: dict) -> str:
    """The epoch that a checkpoint stands in, in words."""
    is_heads = state["phase"] == "heads"
    epochs = state["config"]["head_epochs" if is_heads else "epochs"]
    epoch = min(state["epoch"] + 1, epochs)
    which = " of the heads alone" if is_heads else ""
    return f"epoch {epoch} of {epochs}{which}"


def start_over(folder: Path) -> None:
    """Clear away what is left of a run that has finished. UserError when it could still go on."""
    try:
        state = load_checkpoint(folder)
    except UserError:  # none, or damaged, or of other data: nothing can go on from it
        state = None
    if state and not state["finished"]:
        raise UserError(
            f"{folder} holds a run that stopped in {where_in(state)}: go on with --resume, or "
            f"delete {folder}/checkpoint*.pt to start over"
        )
    # The checkpoint of the finished run goes after the one before it: if this is interrupted, what
    # is left still says that the run has finished.
    old = [folder / name for name in (BEFORE, NEWEST, "log.jsonl")]
    if any(path.exists() for path in old):
        print("starting over: the checkpoints and the log of the run before are removed")
    for path in old:
        path.unlink(missing_ok=True)


# 3. The state of the parts of a training.


class Randomness:
    """The random generators of torch, as a part with a state.

    Every process has generators of its own: it draws other numbers than the others do. So the state
    is that of all of them, with a row for each process.
    """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{generator: (processes, bytes)}"""
        own = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            own["cuda"] = torch.cuda.get_rng_state()
        rows = [state.unsqueeze(0) for state in own.values()]
        of_all = several_devices.gather(rows)
        return dict(zip(own, of_all, strict=True))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        number = several_devices.number()
        if number >= len(state["cpu"]):
            return  # there were fewer processes then: this one keeps the generators that it has
        # A copy: torch reads a state from where the memory of a tensor begins, which for a row is
        # where the first row begins.
        torch.set_rng_state(state["cpu"][number].clone())
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"][number].clone())


def get_state(parts: dict[str, Any]) -> dict:
    """The states of the parts, or lists of parts, of a training. All processes call it together."""
    state = {}
    for name, part in parts.items():
        if isinstance(part, list):
            state[name] = [one.state_dict() for one in part]
        else:
            state[name] = part.state_dict()
    return state


def set_state(parts: dict[str, Any], state: dict) -> dict:
    """Give all that get_state read its state back. What is left says where the training stood.

    UserError if a part has another form than the one that was saved, as in a changed code.
    """
    for name, part in parts.items():
        try:
            saved = state.pop(name)  # or it would stay in memory as long as the training lasts
            if isinstance(part, list):
                for one, its in zip(part, saved, strict=True):
                    one.load_state_dict(its)
            else:
                part.load_state_dict(saved)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"the checkpoint was saved by other code than this, and its {name} does not fit: "
                f"{error}; go on with that code, or train anew, without --resume"
            ) from error
    return state
