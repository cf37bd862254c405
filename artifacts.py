"""The plumbing that every stage needs and no student needs to read: command line, artifacts on disk.

An artifact is one file in the run folder. It carries, beside its arrays, a JSON record `meta`: the format version, the
stage that wrote it, that stage's settings, the library versions and the sha256 of every artifact that it was made from.
Nothing in here executes what it reads: no pickle, np.load(allow_pickle=False), torch.load(weights_only=True).
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import pickle
import sys
import time
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy
import torch
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    BertConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FORMAT = 1
MADE_BY = {
    "data.npz": "01_data.py",
    "tree.npz": "02_label_tree.py",
    "model.pt": "04_train.py",
    "checkpoint.pt": "04_train.py",
    "predictions.npz": "05_eval.py",
}


class UserError(ValueError):
    """Something that whoever runs the script can mend: shown as one line, without a traceback."""


def flag(default: Any, help: str, type: Callable | None = None) -> Any:
    """A dataclass field that becomes a command-line flag; `type` is needed only where the default is None."""
    return dataclasses.field(default=default, metadata={"help": help, "type": type or default.__class__})


def parse(config_class: type, doc: str, argv: list[str] | None = None) -> Any:
    """The frozen dataclass `config_class`, filled from the command line. --help shows `doc` and every flag."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for field in dataclasses.fields(config_class):
        name = "--" + field.name.replace("_", "-")
        if field.metadata["type"] is bool:
            parser.add_argument(name, action="store_true", help=field.metadata["help"])
        else:
            shown = "" if field.default in (None, "") else f" [{field.default}]"
            text = (field.metadata["help"] + shown).replace("%", "%%")
            parser.add_argument(name, type=field.metadata["type"], default=field.default, help=text, metavar="")
    return config_class(**vars(parser.parse_args(argv)))


def settings(config: Any) -> dict:
    """What decides the result: all but where the run lies and whether it goes on."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in ("run", "resume")}


def settle(config: Any, recipes: dict[str, dict], encoder: str) -> Any:
    """The settings, with those left open (None) taken from the recipe for 'tiny' or for 'pretrained' encoders."""
    recipe = recipes["tiny" if encoder == "tiny" else "pretrained"]
    return dataclasses.replace(config, **{key: value for key, value in recipe.items() if getattr(config, key) is None})


def set_arithmetic() -> None:
    """After training, weights and optimiser states may hold denormal numbers, which a CPU multiplies many times more
    slowly: flush them to zero. On a GPU float32 products, in the heads, use TF32: ten bits to bfloat16's seven."""
    torch.set_flush_denormal(True)
    torch.backends.cuda.matmul.allow_tf32 = True


def stages() -> SimpleNamespace:
    """The five stages as modules, for what builds on them: their names begin with digits."""
    names = {"data": "01_data", "tree": "02_label_tree", "model": "03_model", "train": "04_train", "eval": "05_eval"}
    return SimpleNamespace(**{name: import_module(file) for name, file in names.items()})


def main(stage: Callable[[Any], Any], config_class: type, doc: str) -> None:
    """Run a stage from the command line and print the time it took; a UserError ends it with exit code 2."""
    start = time.perf_counter()
    config = parse(config_class, doc)
    set_arithmetic()
    try:
        stage(config)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"[{Path(sys.argv[0]).name} took {time.perf_counter() - start:.0f} s]")


def positive(text: str) -> int:
    """A flag's whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def int_list(text: str, what: str, n: int | None = None) -> list[int]:
    """'64,192' -> [64, 192]; exactly n of them where n is given."""
    numbers = text.split(",")
    if not all(part.strip().isdigit() for part in numbers) or n not in (None, len(numbers)):
        raise UserError(f"{what} {text!r}: expected {n or 'some'} whole numbers separated by commas, such as 64,192")
    return [int(part) for part in numbers]


def pretrained(kind: Any, name: str) -> Any:
    """kind.from_pretrained(name): a tokeniser or a model from a local folder or from the hub."""
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--encoder {name}: no such folder, and not to be had from the hub ({reason})") from error


def tiny_bert(depth: int, width: int, meta: dict) -> PreTrainedModel:
    """A small BERT to be trained from scratch, without dropout: the heads have theirs. `meta` is that of data.npz."""
    return AutoModel.from_config(BertConfig(
        vocab_size=meta["vocab_size"], pad_token_id=meta["pad"], type_vocab_size=1, num_hidden_layers=depth,
        hidden_size=width, intermediate_size=2 * width, num_attention_heads=math.gcd(width, max(1, width // 64)),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def bare_encoder(config: dict) -> PreTrainedModel:
    """An encoder from its stored configuration, without weights; needs no hub."""
    config = dict(config)
    return AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config))


def without_waiting(backbone: PreTrainedModel) -> PreTrainedModel:
    """The same encoder, with an attention mask for every batch. By itself the library asks the device first whether
    anything is padded, and a GPU's queue runs empty meanwhile."""
    if backbone.config._attn_implementation == "sdpa":
        AttentionInterface.register("sdpa_masked", sdpa_attention_forward)
        AttentionMaskInterface.register("sdpa_masked", _always_a_mask)
        backbone.set_attn_implementation("sdpa_masked")
    return backbone


def _always_a_mask(*args, **kwargs) -> torch.Tensor:
    return sdpa_mask(*args, **kwargs | {"allow_is_bidirectional_skip": False})


def positions(backbone: PreTrainedModel) -> float:
    """Most tokens of a document that the encoder has positions for; RoBERTa and MPNet count from behind their padding
    id."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    first = -1 if getattr(table, "padding_idx", None) is None else table.padding_idx
    return (getattr(backbone.config, "max_position_embeddings", None) or math.inf) - first - 1


def in_turn(passes: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """{name: median seconds}: the passes run in turn, so that what else the machine does hits all alike; the first
    round, which sets things up, is not counted. A GPU's work is waited for."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def choose_amp(amp: str, model: Any, batch: Any) -> str:
    """Set model.amp, and return it: 'auto' is bf16 or fp16 on a GPU; on a CPU bf16 only if a forward and backward pass
    of the encoder is faster so."""

    def encode(amp: str) -> None:
        model.amp = amp
        sum(x_BD.sum() for x_BD in model.features(batch)).backward()

    if amp not in ("auto", "bf16", "fp16", "off"):
        raise UserError(f"--amp {amp}: expected bf16, fp16, off or auto")
    if amp == "auto" and batch.ids_BT.is_cuda:
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":
        seconds = in_turn({"off": lambda: encode("off"), "bf16": lambda: encode("bf16")}, rounds=3)
        model.zero_grad()
        fp32, bf16 = (1000 * seconds[amp] for amp in ("off", "bf16"))
        print(f"precision: one batch takes {fp32:.0f} ms in fp32 and {bf16:.0f} ms in bf16")
        amp = "bf16" if bf16 < fp32 else "off"
    if amp == "fp16" and any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        raise UserError("--label-bf16 does not go with fp16, whose scaler knows no bfloat16: --amp bf16 or off")
    model.amp = amp
    return amp


def progress(record: dict, config: Any) -> str:
    """The line that a person reads for a record of the log."""
    if "validation" in record:
        precision, recall = record["validation"]["P"][record["ranking"]], record["validation"]["recall"]
        return (f"epoch {record['epoch']} validation P@1/3/5 {'/'.join(f'{p:.1f}' for p in precision)} ranked by "
                f"{record['ranking']}; shortlist recall {' '.join(f'{r:.1f}' for r in recall)}")
    rate = record["batches_per_s"]
    left = (record["total"] - record["step"]) * config.accumulate / rate
    return (f"epoch {record['epoch']}/{config.epochs} step {record['step']}/{record['total']}"
            f"  loss {' '.join(f'{loss:.2f}' for loss in record['loss'])}  lr {record['lr']:.1e}"
            f"  {rate * config.batch_size:,.0f} documents/s  {left / 60:.1f} min left"
            + (f"  ({record['surplus']} positive nodes beyond k)" if record["surplus"] else ""))


def load_checkpoint(path: Path, config: Any) -> dict:
    """The checkpoint to go on from; UserError unless it was made with these settings."""
    state, _ = load_pt(path)
    if "optimizers" not in state:
        raise UserError(f"--resume: {path} is of an older version of this program; start over without --resume")
    for key, before in state["config"].items():
        if getattr(config, key) not in (before, "auto"):
            raise UserError(f"--resume: {path} was made with {key}={before}, not {getattr(config, key)}; "
                            "give the same settings, or start over without --resume")
    return state


def refuse_unfinished(path: Path) -> None:
    """UserError when starting over would overwrite the checkpoint of a run that could still go on."""
    try:
        state, _ = load_pt(path)
    except UserError:
        return  # none, or damaged, or of other data: nothing can go on from it
    if state["epochs_done"] < state["config"]["epochs"]:
        raise UserError(f"{path} is of a run that stopped after epoch {state['epochs_done']} of "
                        f"{state['config']['epochs']}: go on with --resume, or delete it to start over")


def over_split(model: Any, data: Any, name: str, max_len: int, batch_size: int,
               predict: Callable[[Any], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Apply `predict`, which gives arrays with a row per document, to a whole split; rows in the corpus' order."""
    model.eval()
    order = np.argsort(np.diff(data.splits[name].offsets), kind="stable")
    device = model.slot_to_label.device
    parts = [predict(data.batch(name, order[i : i + batch_size], max_len).to(device))
             for i in range(0, len(order), batch_size)]
    back = np.argsort(order)
    return {key: np.concatenate([part[key] for part in parts])[back] for key in parts[0]}


def get_random() -> dict[str, torch.Tensor]:
    """State of torch's generators, the GPU's too where there is one."""
    on_gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state()} | on_gpu


def set_random(state: dict[str, torch.Tensor]) -> None:
    """Give the generators the state that get_random returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def keep_log(path: Path, epochs: int) -> None:
    """Cut a log of JSON lines back to the records of finished epochs."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["epoch"] <= epochs:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # the line that was being written when the run stopped
    path.write_text("".join(kept))


def _write_whole(path: Path, write: Callable[[Any], None]) -> None:
    """Write under a temporary name, flush to disk, rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


_READ: dict[Path, str] = {}  # sha256 of what this process has read: what a result is made from, whatever came since


def _meta(path: Path, config: Any, made_from: tuple[str, ...], extra: dict) -> dict:
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np, scipy)}
    inputs = {name: _READ[(path.parent / name).resolve()] for name in made_from}
    return {"format": FORMAT, "stage": MADE_BY[path.name], "config": settings(config), "versions": versions,
            "made_from": inputs, **extra}


def save_npz(path: Path, config: Any, arrays: dict[str, np.ndarray], made_from: tuple[str, ...] = (), **extra) -> None:
    """Write arrays and their record; `made_from` names the artifacts of the same run folder that were read."""
    record = np.array(json.dumps(_meta(path, config, made_from, extra)))
    _write_whole(path, lambda file: np.savez(file, meta=record, **arrays))


def save_pt(path: Path, config: Any, content: dict, made_from: tuple[str, ...] = (), **extra) -> None:
    """Write tensors (nested dicts and lists of plain values) and their record."""
    content = {"meta": json.dumps(_meta(path, config, made_from, extra)), **content}
    # Through a file object: torch would otherwise put the temporary name inside the archive.
    _write_whole(path, lambda file: torch.save(content, file))


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_npz(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, meta). UserError when the file is missing, damaged or does not belong with its neighbours."""

    def read():
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    content = _read(path, read)
    return content, _check(path, str(content.pop("meta", "")))


def load_pt(path: Path) -> tuple[dict, dict]:
    """(content, meta) on the CPU. UserError as for load_npz."""
    content = _read(path, lambda: torch.load(path, map_location="cpu", weights_only=True))
    return content, _check(path, content.pop("meta", ""))


def _again(path: Path) -> str:
    return f"run: python {MADE_BY[path.name]} --run {path.parent}"


def _read(path: Path, read: Callable[[], dict]) -> dict:
    if not path.exists():
        raise UserError(f"{path} does not exist; {_again(path)}")
    try:
        _READ[path.resolve()] = sha256(path)
        return read()
    except (OSError, ValueError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); {_again(path)}") from error


def _check(path: Path, record: str) -> dict:
    """The artifact's record; refuses another format and inputs that have changed since the artifact was made."""
    try:
        meta = json.loads(record)
        if meta["format"] != FORMAT:
            raise UserError(f"{path} has format {meta['format']}, expected {FORMAT}; {_again(path)}")
        made_from = meta["made_from"].items()
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} carries no record of how it was made; {_again(path)}") from None
    for name, expected in made_from:
        source = path.parent / name
        found = sha256(source) if source.exists() else "nothing"
        if found != expected:
            raise UserError(
                f"{path} was made from a {name} with sha256 {expected[:12]}, found {found[:12]}; {_again(path)}"
            )
    return meta
