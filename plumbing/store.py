"""Artifacts: files in the run folder that are whole or absent, and say what they were made from.

An artifact is one file in the run folder. It carries, beside its arrays, a JSON record `meta`: the format version, the
stage that wrote it, that stage's settings, the library versions and the sha256 of every artifact that it was made from.
Nothing in here executes what it reads: no pickle, np.load(allow_pickle=False), torch.load(weights_only=True).
"""

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plumbing.cli import settings
from plumbing.errors import UserError
from plumbing.memory import is_out_of_memory

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


def write_whole(path: Path, write: Callable[[Any], None], keep: Path | None = None) -> None:
    """Write under a temporary name, flush to disk, rename: a reader never sees half a file, a failure changes nothing.
    What was there before is kept under the name `keep`."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # left by a run that was killed
        with open(partial, "xb") as file:  # never through a link that somebody put there
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
        if os.name == "posix":  # the names, too, are to survive a power cut
            parent = os.open(path.parent, os.O_RDONLY)
            os.fsync(parent)
            os.close(parent)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch hides what went wrong
        if not isinstance(reason, OSError):
            raise
        raise UserError(f"{path} cannot be written ({reason.strerror}); what was there before is as it was: make room, "
                        "or choose another folder with --run") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """The same artifact in another run folder, in place of what is there: stages never write into a file, they put a
    new one in its place. A copy where there can be no link: another disk, say."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


_READ: dict[Path, str] = {}  # digest of what this process has read: what a result is made from, whatever came since


def _record(path: Path, config: Any, made_from: tuple[str, ...], extra: dict, content: dict) -> str:
    versions = {name: version(name) for name in ("torch", "transformers", "numpy", "scipy")}
    inputs = {name: _READ[(path.parent / name).resolve()] for name in made_from}
    meta = {"format": FORMAT, "stage": MADE_BY.get(path.name), "config": settings(config), "versions": versions,
            "made_from": inputs, **extra}
    return json.dumps({**meta, "sha256": _digest(meta, content)})


def _digest(meta: dict, content: dict, room: float = math.inf) -> str:
    """sha256 of a record and of what it is about: nested dicts and lists of arrays, tensors and plain values.
    ValueError for anything else, and for more than `room` bytes: a small file may claim to hold a big tensor."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        nonlocal room
        is_array = isinstance(value, (np.ndarray, torch.Tensor))
        room -= value.nbytes if is_array else 1
        if room < 0:
            raise ValueError("it claims to hold more than the file does")
        if is_array:
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            flat = value if isinstance(value, np.ndarray) else value.cpu().reshape(-1).view(torch.uint8).numpy()
            found.update(np.ascontiguousarray(flat))
        elif isinstance(value, dict):
            add(len(value))
            for key in value:
                add(key)
                add(value[key])
        elif isinstance(value, (list, tuple)):
            add(len(value))
            for item in value:
                add(item)
        elif value is None or isinstance(value, (bool, int, float, str)):
            found.update(f"{type(value).__name__} {value!r};".encode("utf-8", "surrogatepass"))
        else:
            raise ValueError(f"it holds a {type(value).__name__}")

    add(json.loads(json.dumps(meta)))
    add(content)
    return found.hexdigest()


def save_npz(path: Path, config: Any, arrays: dict[str, np.ndarray], made_from: tuple[str, ...] = (), **extra) -> None:
    """Write arrays and their record; `made_from` names the artifacts of the same run folder that were read."""
    record = np.array(_record(path, config, made_from, extra, arrays))
    write_whole(path, lambda file: np.savez(file, meta=record, **arrays))


def save_pt(path: Path, config: Any, content: dict, made_from: tuple[str, ...] = (), keep: Path | None = None,
            **extra) -> None:
    """Write tensors (nested dicts and lists of plain values) and their record; `keep` as for write_whole."""
    content = {"meta": _record(path, config, made_from, extra, content), **content}
    # Through a file object: torch would otherwise put the temporary name inside the archive.
    write_whole(path, lambda file: torch.save(content, file), keep)


def load_npz(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, meta). UserError when the file is missing, damaged or does not belong with its neighbours."""
    content = _read(path, lambda: _npz(path))
    return content, _check(path, str(content.pop("meta", "")), content)


def load_pt(path: Path) -> tuple[dict, dict]:
    """(content, meta) on the CPU. UserError as for load_npz."""
    content = _read(path, lambda: torch.load(path, map_location="cpu", weights_only=True))
    return content, _check(path, content.pop("meta", ""), content)


def _npz(path: Path, *keys: str) -> dict[str, np.ndarray]:
    """Arrays of an .npz file (default: all); first, the size that a header claims is compared with the file's."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, dtype = header[version](file)
                if math.prod(shape) * dtype.itemsize + file.tell() != member.file_size:
                    raise ValueError(f"{member.filename} does not have the size that it claims")
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in keys or archive.files}


def _again(path: Path) -> str:
    """The command that makes an artifact."""
    if path.name not in MADE_BY:
        return "make it again"
    return f"run: python {MADE_BY[path.name]} --run {shlex.quote(str(path.parent))}"


def anew(path: Path) -> str:
    """The same for one that was there already: only the flags of before make the same again."""
    return _again(path) + " with the flags of before"


def check_data(path: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """UserError unless the arrays of data.npz are within what offsets and the numbers of tokens and labels say."""
    n_labels, most = len(arrays["names_offsets"]) - 1, len(arrays["tokenizer"])  # a token takes some of its bytes
    if not 0 < meta["vocab_size"] <= most:
        raise UserError(f"{path}: a tokeniser of {most} bytes has no {meta['vocab_size']} tokens; {anew(path)}")
    ends = {"ids": ("offsets", meta["vocab_size"]), "labels": ("label_offsets", n_labels),
            "known": ("known_offsets", n_labels)}
    for key in arrays:
        split, _, kind = key.partition("_")
        if kind in ends:
            values, offsets, most = arrays[key], arrays[f"{split}_{ends[kind][0]}"], ends[kind][1]
            rising = len(offsets) and offsets[0] == 0 and offsets[-1] == len(values) and (np.diff(offsets) >= 0).all()
            if not rising or len(values) and not 0 <= values.min() <= values.max() < most:
                raise UserError(f"{path}: {key} is not what its offsets say, or not below {most}; {anew(path)}")


def _read(path: Path, read: Callable[[], dict]) -> dict:
    """What read() reads; UserError where it is missing or damaged."""
    if not path.exists():
        raise UserError(f"{path} does not exist; {_again(path)}")
    try:
        _no_bomb(path)
        content = read()
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except Exception as error:  # there is nothing that a damaged file, or one that somebody made up, may not raise
        if is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); {anew(path)}") from error


def _no_bomb(path: Path) -> None:
    """ValueError where reading the file, a zip archive as .pt is too, could take more memory than its size."""
    with zipfile.ZipFile(path) as archive:  # what this program writes is never compressed
        members = archive.infolist()
        size = sum(member.file_size for member in members)
        if any(member.compress_type for member in members) or size > path.stat().st_size:
            raise ValueError("it claims to hold more than the file does")
        # The one name that torch's safe unpickler calls with a size: bytearray(10**12).
        if any(b"bytearray" in archive.read(member) for member in members if member.filename.endswith("data.pkl")):
            raise ValueError("it holds a bytearray")


def _made(path: Path) -> str:
    """The digest in an artifact's record, without reading the rest; says what is wrong when there is none."""
    if not path.exists():
        return "nothing"
    try:
        _no_bomb(path)
        meta = (_npz(path, "meta") if path.suffix == ".npz"
                else torch.load(path, map_location="cpu", weights_only=True, mmap=True))["meta"]
        return json.loads(str(meta))["sha256"]
    except Exception:
        return "something unreadable"


def _check(path: Path, record: str, content: dict) -> dict:
    """The artifact's record; refuses another format, changed content, and inputs that have changed since."""
    try:
        meta = json.loads(record)
        written, made_from, sha256 = meta["format"], meta["made_from"].items(), str(meta.pop("sha256", ""))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} carries no record of how it was made; {anew(path)}") from None
    if written != FORMAT:
        raise UserError(f"{path} has format {written}, expected {FORMAT}; {anew(path)}")
    try:
        # Twice the size: a value that the file holds once may occur several times.
        found = _digest(meta, content, 2 * path.stat().st_size + 2**20)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {anew(path)}") from None
    if found != sha256:
        raise UserError(f"{path} is damaged: expected content with sha256 {sha256[:12]}, found {found[:12]}; "
                        f"{anew(path)}")
    for name, expected in made_from:
        found = _made(path.parent / name) if name in MADE_BY else "no artifact of that name"
        if found != expected:
            raise UserError(
                f"{path} was made from a {name} with sha256 {str(expected)[:12]}, found "
                f"{found[:12] if len(found) == 64 else found}; {anew(path)}"
            )
    _READ[path.resolve()] = sha256
    return {**meta, "sha256": sha256}
