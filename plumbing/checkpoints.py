"""Checkpoints: everything that a training needs to go on as if it had never stopped."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from plumbing.errors import UserError
from plumbing.store import load_pt, save_pt
from plumbing.training_log import keep_log


def save_checkpoint(folder: Path, config: Any, content: dict) -> None:
    """Write RUN/checkpoint.pt and keep the one before: one of the two is whole at any moment."""
    save_pt(folder / "checkpoint.pt", config, content, ("data.npz", "tree.npz"), keep=folder / "checkpoint.previous.pt")


def load_checkpoint(folder: Path) -> dict:
    """The newest checkpoint of a run that is whole."""
    paths = [folder / "checkpoint.pt", folder / "checkpoint.previous.pt"]
    try:
        return load_pt(paths[0])[0]
    except UserError as error:
        if not paths[1].exists():
            raise
        state = load_pt(paths[1])[0]
        os.replace(paths[1], paths[0])  # or the next checkpoint would put the damaged one in the place of this one
        print(f"{str(error).split('; run: ')[0]}; taking the checkpoint before it, of step "
              f"{state['steps_before'] + state['step']}")
        return state


def go_on(folder: Path, config: Any) -> tuple[dict, Any]:
    """(the checkpoint to go on from, the settings it was made with). UserError unless these are the settings given; the
    log is cut back to it."""
    state = load_checkpoint(folder)
    for key, before in state["config"].items():
        if getattr(config, key, None) not in (before, "auto"):
            raise UserError(f"--resume: {folder} was trained with {key}={before}, not {getattr(config, key)}; "
                            "give the same settings, or start over without --resume")
    if state["best"] > -1:
        try:
            load_pt(folder / "model.pt")
        except UserError as error:
            print(f"{str(error).split('; run: ')[0]}; the next epoch counts as the best so far")
            state["best"] = -1.0
    step = state["steps_before"] + state["step"]
    keep_log(folder / "log.jsonl", step)
    print("this run has finished; nothing is left to do" if state["finished"]
          else f"going on after step {step}, in {where_in(state)}")
    return state, dataclasses.replace(config, **state["config"])


def where_in(state: dict) -> str:
    """The epoch that a checkpoint stands in, in words."""
    heads = state["phase"] == "heads"
    epochs = state["config"]["head_epochs" if heads else "epochs"]
    epoch = min(state["epoch"] + 1, epochs)
    return f"epoch {epoch} of {epochs}" + (" of the heads alone" if heads else "")


def start_over(folder: Path) -> None:
    """Clear away the checkpoints and the log of a run that has finished; UserError when it could still go on."""
    try:
        state = load_checkpoint(folder)
    except UserError:  # none, or damaged, or of other data: nothing can go on from it
        state = None
    if state and not state["finished"]:
        raise UserError(f"{folder} holds a run that stopped in {where_in(state)}: go on with --resume, or delete "
                        f"{folder}/checkpoint*.pt to start over")
    old = [folder / name for name in ("checkpoint.previous.pt", "checkpoint.pt", "log.jsonl")]  # the finished one last
    if any(path.exists() for path in old):
        print("starting over: the checkpoints and the log of the run before are removed")
    for path in old:
        path.unlink(missing_ok=True)


def get_state(parts: dict[str, Any]) -> dict:
    """The states of the parts, or lists of parts, of a training, and of torch's generators, the GPU's too where there
    is one."""
    state = {name: [one.state_dict() for one in part] if isinstance(part, list) else part.state_dict()
             for name, part in parts.items()}
    on_gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return state | {"random": {"cpu": torch.get_rng_state()} | on_gpu}


def set_state(parts: dict[str, Any], state: dict) -> dict:
    """Give all that get_state read its state back; returns what is left: where the training stood."""
    for name, part in parts.items():
        saved = state.pop(name)  # or it would stay in memory as long as the training lasts
        for one, its in zip(part, saved, strict=True) if isinstance(part, list) else [(part, saved)]:
            one.load_state_dict(its)
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random"]["cuda"])
    return state
