"""Artifacts: files in the run folder that are whole or absent, and say what they were made from.

An artifact is one file. It carries, beside its arrays, a JSON record `meta`: the format version,
the stage that wrote it, the settings of that stage, the library versions, the sha256 of its
content, and the sha256 of every artifact that it was made from. Loading compares all of this, and
an artifact that does not belong with its neighbours is refused with the command that makes it anew.
"""

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plumbing.cli import settings
from plumbing.errors import UserError
from plumbing.memory import is_out_of_memory
from plumbing.safe_files import read_npz, read_pt, refuse_bomb

FORMAT = 3
MADE_BY = {
    "data.npz": "01_data.py",
    "tree.npz": "02_label_tree.py",
    "model.pt": "04_train.py",
    "checkpoint.pt": "04_train.py",
    "checkpoint.previous.pt": "04_train.py",
    "predictions.npz": "05_eval.py",
    "predictions.val.npz": "05_eval.py --split val",
    "predictions.train.npz": "05_eval.py --split train",
}
LIBRARIES = ("torch", "transformers", "numpy", "scipy")
# The digests of the artifacts that this process has read. A result is made from these, even if
# another process has put a new file in the place of one since.
READ: dict[Path, str] = {}


# 1. Saving and loading.


def save_npz(
    path: Path,
    config: Any,
    arrays: dict[str, np.ndarray],
    made_from: tuple[str, ...] = (),
    **extra,
) -> None:
    """Write arrays and their record. `made_from`: the artifacts of the same run that were read."""
    record = np.array(make_record(path, config, made_from, extra, arrays))
    write_whole(path, lambda file: np.savez(file, meta=record, **arrays))


def save_pt(
    path: Path,
    config: Any,
    content: dict,
    made_from: tuple[str, ...] = (),
    keep: Path | None = None,
    **extra,
) -> None:
    """Write tensors (nested dicts and lists of plain values) and their record.

    What was there before is kept under the name `keep`.
    """
    content = {"meta": make_record(path, config, made_from, extra, content), **content}
    # Through a file object: torch would otherwise put the temporary name inside the archive.
    write_whole(path, lambda file: torch.save(content, file), keep)


def load_npz(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, meta). UserError when the file is missing, damaged or of other neighbours."""
    content = read(path, lambda: read_npz(path))
    record = str(content.pop("meta", ""))
    return content, check_record(path, record, content)


def load_pt(path: Path) -> tuple[dict, dict]:
    """(content, meta) on the CPU. UserError as for load_npz."""
    content = read(path, lambda: read_pt(path))
    record = content.pop("meta", "")
    return content, check_record(path, record, content)


def read(path: Path, reader: Callable[[], dict]) -> dict:
    """What reader() reads. UserError where the file is missing or damaged."""
    if not path.exists():
        raise UserError(f"{path} does not exist; {again(path)}")
    try:
        refuse_bomb(path)
        content = reader()
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except Exception as error:  # a damaged or a forged file may raise anything
        if is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); {anew(path)}") from error


def write_whole(path: Path, write: Callable[[Any], None], keep: Path | None = None) -> None:
    """Write a file so that a reader never sees half of it, and a failure changes nothing.

    It is written under a temporary name, flushed to the disk, and then renamed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # left by a run that was killed
        with open(partial, "xb") as file:  # x: never through a link that somebody put there
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
        if os.name == "posix":  # the new names should survive a power cut, too
            parent = os.open(path.parent, os.O_RDONLY)
            os.fsync(parent)
            os.close(parent)
    except (OSError, RuntimeError) as error:
        # torch raises an error of its own that hides what went wrong.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise UserError(
            f"{path} cannot be written ({reason.strerror}); what was there before is as it was: "
            "make room, or choose another folder with --run"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """The same artifact in another run folder, in place of what is there.

    Stages never write into a file, they put a new one in its place, so two names for one file are
    safe. Where there can be no link, on another disk for example, it is a copy.
    """
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# 2. Records and digests.


def make_record(
    path: Path, config: Any, made_from: tuple[str, ...], extra: dict, content: dict
) -> str:
    """The record of an artifact that is about to be written, as JSON."""
    meta = {
        "format": FORMAT,
        "stage": MADE_BY.get(path.name),
        "config": settings(config),
        "versions": {name: version(name) for name in LIBRARIES},
        "made_from": {name: READ[(path.parent / name).resolve()] for name in made_from},
        **extra,
    }
    return json.dumps({**meta, "sha256": digest(meta, content)})


def digest(meta: dict, content: dict, room: float = math.inf) -> str:
    """sha256 of a record and its content: nested dicts and lists of arrays, tensors, plain values.

    ValueError for anything else, and for more than `room` bytes: a small file may claim to hold a
    big tensor.
    """
    found = hashlib.sha256()

    def use_room(n_bytes: int) -> None:
        nonlocal room
        room -= n_bytes
        if room < 0:
            raise ValueError("it claims to hold more than the file does")

    def add_array(array: np.ndarray | torch.Tensor) -> None:
        use_room(array.nbytes)
        found.update(f"{array.dtype}{tuple(array.shape)}".encode())
        if isinstance(array, torch.Tensor):
            array = array.cpu().reshape(-1).view(torch.uint8).numpy()
        found.update(np.ascontiguousarray(array))

    def add(value: Any) -> None:
        if isinstance(value, (np.ndarray, torch.Tensor)):
            add_array(value)
            return
        use_room(1)
        if isinstance(value, dict):
            add(len(value))
            for key in value:
                add(key)
                add(value[key])
        elif isinstance(value, (list, tuple)):
            add(len(value))
            for item in value:
                add(item)
        elif value is None or isinstance(value, (bool, int, float, str)):
            text = f"{type(value).__name__} {value!r};"
            found.update(text.encode("utf-8", "surrogatepass"))
        else:
            raise ValueError(f"it holds a {type(value).__name__}")

    add(json.loads(json.dumps(meta)))  # as it will be read: tuples are lists then
    add(content)
    return found.hexdigest()


def check_record(path: Path, record: str, content: dict) -> dict:
    """The artifact's record. UserError for another format, changed content, or changed inputs."""
    # 1. Is there a record?
    try:
        meta = json.loads(record)
        sha256 = str(meta.pop("sha256", ""))
        written = meta["format"]
        made_from = meta["made_from"].items()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} carries no record of how it was made; {anew(path)}") from None
    if written != FORMAT:
        raise UserError(f"{path} has format {written}, expected {FORMAT}; {anew(path)}")
    # 2. Is the content the one that was written? Twice the size of the file is room enough: a value
    #    that the file holds once may occur several times.
    try:
        found = digest(meta, content, 2 * path.stat().st_size + 2**20)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {anew(path)}") from None
    if found != sha256:
        raise UserError(
            f"{path} is damaged: expected content with sha256 {sha256[:12]}, "
            f"found {found[:12]}; {anew(path)}"
        )
    # 3. Are the artifacts that it was made from still there?
    for name, expected in made_from:
        found = digest_in(path.parent / name) if name in MADE_BY else "no artifact of that name"
        if found != expected:
            shown = found[:12] if len(found) == 64 else found
            raise UserError(
                f"{path} was made from a {name} with sha256 {str(expected)[:12]}, "
                f"found {shown}; {anew(path)}"
            )
    READ[path.resolve()] = sha256
    return {**meta, "sha256": sha256}


def digest_in(path: Path) -> str:
    """The digest in an artifact's record, without reading the rest; or what is wrong with it."""
    if not path.exists():
        return "nothing"
    try:
        refuse_bomb(path)
        content = read_npz(path, "meta") if path.suffix == ".npz" else read_pt(path, mmap=True)
        return json.loads(str(content["meta"]))["sha256"]
    except Exception:
        return "something unreadable"


def again(path: Path) -> str:
    """The command that makes an artifact."""
    if path.name not in MADE_BY:
        return "make it again"
    return f"run: python {MADE_BY[path.name]} --run {shlex.quote(str(path.parent))}"


def anew(path: Path) -> str:
    """The same for one that was there already: only the flags of before make the same again."""
    return again(path) + " with the flags of before"


# 3. The content of data.npz.


def check_data(path: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """UserError unless the arrays of data.npz fit their offsets and what they count."""
    n_labels = len(arrays["names_offsets"]) - 1
    n_words = meta["vocab_size"]
    n_bytes = len(arrays["tokenizer"])
    if not 0 < n_words <= n_bytes:  # every token takes some bytes of the tokeniser
        raise UserError(
            f"{path}: a tokeniser of {n_bytes} bytes has no {n_words} tokens; {anew(path)}"
        )
    # Kind of array: its offsets, and what its values stay below.
    kinds = {
        "ids": ("offsets", n_words),
        "labels": ("label_offsets", n_labels),
        "known": ("known_offsets", n_labels),
    }
    for key, values in arrays.items():
        split, _, kind = key.partition("_")
        if kind not in kinds:
            continue
        offsets_name, most = kinds[kind]
        offsets = arrays[f"{split}_{offsets_name}"]
        begins_and_ends = len(offsets) and offsets[0] == 0 and offsets[-1] == len(values)
        is_rising = (np.diff(offsets) >= 0).all()
        in_range = not len(values) or (values.min() >= 0 and values.max() < most)
        if not (begins_and_ends and is_rising and in_range):
            raise UserError(
                f"{path}: {key} is not what its offsets say, or not below {most}; {anew(path)}"
            )
