"""The plumbing that every stage needs and no student needs to read: command line, artifacts on disk.

An artifact is one file in the run folder. It carries, beside its arrays, a JSON record `meta`: the format version, the
stage that wrote it, that stage's settings, the library versions and the sha256 of every artifact that it was made from.
Nothing in here executes what it reads: no pickle, np.load(allow_pickle=False), torch.load(weights_only=True).

The transformers library is imported inside the functions that need it: its models take longer to import than torch and
everything else together, and much here has no need of them.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

try:
    import resource
except ImportError:  # Windows
    resource = None

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
    """What decides the result: all but where the run lies, whether it goes on and how often it is saved."""
    others = ("run", "resume", "save_every")
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in others}


def settle(config: Any, recipes: dict[str, dict], encoder: str) -> Any:
    """The settings, with those left open (None) taken from the recipe for 'tiny' or for 'pretrained' encoders."""
    recipe = recipes["tiny" if encoder == "tiny" else "pretrained"]
    return dataclasses.replace(config, **{key: value for key, value in recipe.items() if getattr(config, key) is None})


def set_up_torch() -> None:
    """After training, weights and optimiser states may hold denormal numbers, which a CPU multiplies many times more
    slowly: flush them to zero. Let big tensors lie in pages of 2 MB where Linux has them: in small ones, weights take
    longer to find the more there are. On a GPU float32 products, in the heads, use TF32: ten bits to bfloat16's 7."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks at it when the first tensor is made
    torch.set_flush_denormal(True)
    torch.backends.cuda.matmul.allow_tf32 = True


def stages() -> SimpleNamespace:
    """The five stages as modules, for what builds on them: their names begin with digits."""
    names = {"data": "01_data", "tree": "02_label_tree", "model": "03_model", "train": "04_train", "eval": "05_eval"}
    return SimpleNamespace(**{name: import_module(file) for name, file in names.items()})


def main(stage: Callable[[Any], Any], config_class: type, doc: str) -> None:
    """Run a stage from the command line and print the time and the memory it took. A UserError ends it with exit code
    2, Ctrl-C with 130."""
    start, name = time.perf_counter(), Path(sys.argv[0]).name
    config = parse(config_class, doc)
    set_up_torch()
    try:
        stage(config)
    except UserError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"{name}: interrupted{interrupt}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a screen or a disk that fails is no fault of the program
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"[{name} took {time.perf_counter() - start:.0f} s{peak_memory()}]")


def peak_memory() -> str:
    """The most memory that this process had, in words; the system may not tell."""
    found, status = [], Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss is also that of the process that started this one
        peak = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        found.append(f"{int(peak) / 2**20:.1f} GiB of memory")
    elif resource:  # macOS, in bytes
        found.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30:.1f} GiB of memory")
    if torch.cuda.is_available():
        found.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the GPU's")
    return ", at the peak " + " and ".join(found) if found else ""


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is the memory of this machine or of its GPU that there is too little of."""
    said = isinstance(error, RuntimeError) and str(error)
    return isinstance(error, MemoryError) or said and any(
        words in said for words in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))


@contextlib.contextmanager
def memory_advice(config: Any, n_labels: int) -> Iterator[None]:
    """Turn running out of memory in here into a UserError with the sizes that matter and the flags that lower them."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "no more is to be had").splitlines()[0]
        flags = {"batch_size": "documents in a batch", "max_len": "tokens of a document at most",
                 "topk": "clusters kept per level"}
        sizes = [f"--{key.replace('_', '-')} {getattr(config, key)} ({what})" for key, what in flags.items()
                 if getattr(config, key, None)]
        more = "; --label-bf16 halves the weights of the labels" if hasattr(config, "label_bf16") else ""
        raise UserError(f"out of memory ({reason}) with {n_labels:,} labels; lower {', '.join(sizes)}{more}") from error


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C has come since, or a wish to end; a second one stops at once."""
    came, before = [], {}

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    if threading.current_thread() is threading.main_thread():  # only there may signals be handled
        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        numbers = [getattr(signal, name) for name in names]
        before = {number: signal.signal(number, note) for number in numbers
                  if signal.getsignal(number) is not signal.SIG_IGN}  # under nohup a closed terminal is nothing
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LossWatch:
    """Stops a training whose loss is no longer finite, or grows a thousandfold.

    What a step gives is looked at while the next one is computed, so that a GPU is never waited for with nothing to do.
    """

    STEPS = 100  # the last losses of a level, whose median counts as usual
    GROWTH = 1000  # times the usual loss: no batch is that much harder than others

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pending = None
        self.first = None
        self.last = collections.deque(maxlen=self.STEPS)

    def __call__(self, losses: torch.Tensor, norm: torch.Tensor, step: int, lr: float) -> None:
        """Look at what came before; take the losses (levels,) and the gradient's norm () of this step."""
        self.check()
        copy = torch.cat([losses, norm.view(1)]).to("cpu", non_blocking=True)
        there = torch.cuda.Event() if losses.is_cuda else None
        if there:
            there.record()
        self.pending = copy, there, step, lr

    def check(self) -> None:
        """UserError when what came last is not finite, or far beyond what it was."""
        if self.pending is None:
            return
        copy, there, step, lr = self.pending
        self.pending = None
        if there:
            there.synchronize()
        *losses, norm = copy.tolist()
        for level, loss in enumerate(losses):
            if not math.isfinite(loss):
                self.stop(f"the loss of level {level + 1} of {len(losses)} is no longer finite", level, step, lr)
        if not math.isfinite(norm):
            self.stop("the gradient is no longer finite", None, step, lr)
        if self.first is None:
            self.first = losses
        usual = np.median(self.last, axis=0) if self.last else self.first
        for level, loss in enumerate(losses):
            if loss > self.GROWTH * usual[level] and loss > self.first[level]:
                self.stop(f"the loss of level {level + 1} of {len(losses)} is {loss:.3g}, more than a thousand times "
                          f"its median of the last {len(self.last)} steps, {usual[level]:.3g}", level, step, lr)
        self.last.append(losses)

    def state_dict(self) -> dict:
        """What was seen so far, for a training that goes on later."""
        return {"first": self.first, "last": list(self.last)}

    def load_state_dict(self, state: dict) -> None:
        self.first = state["first"]
        self.last.extend(state["last"])

    def stop(self, what: str, level: int | None, step: int, lr: float) -> None:
        """UserError that says what happened, where, and what to do."""
        heads = getattr(self.model, "heads", None)
        part = self.model if level is None or heads is None or level >= len(heads) else heads[level]
        largest = max(float(parameter.detach().abs().max()) for parameter in part.parameters())
        raise UserError(f"{what}: step {step}, learning rate {lr:.1e}, largest weight {largest:.1e}; the checkpoints "
                        "are those of before. Start over with a lower --lr or --lr-encoder (of the heads alone: "
                        "--head-lr), after deleting them")


def positive(text: str) -> int:
    """A flag's whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def natural(text: str) -> int:
    """A flag's whole number of at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return int(text)


def rate(text: str) -> float:
    """A flag's number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return float(text)


def int_list(text: str, what: str, n: int | None = None) -> list[int]:
    """'64,192' -> [64, 192]; exactly n of them where n is given."""
    numbers = text.split(",")
    if not all(part.strip().isdigit() for part in numbers) or n not in (None, len(numbers)):
        raise UserError(f"{what} {text!r}: expected {n or 'some'} whole numbers separated by commas, such as 64,192")
    return [int(part) for part in numbers]


def pair(text: str, what: str) -> tuple[float, float]:
    """'0.55,1.5' -> (0.55, 1.5)."""
    try:
        first, second = (float(part) for part in text.split(","))
        return first, second
    except ValueError:
        raise UserError(f"{what} {text}: expected two numbers such as 0.55,1.5") from None


def pretrained(kind: str, name: str) -> Any:
    """A tokeniser ("AutoTokenizer") or a model ("AutoModel") from a local folder or from the hub."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--encoder {name}: no such folder, and not to be had from the hub ({reason})") from error


def pretrained_encoder(meta: dict) -> nn.Module:
    """The encoder that data.npz was made for. UserError when its vocabulary is smaller than that of the token ids."""
    backbone = pretrained("AutoModel", meta["encoder"])
    n = backbone.get_input_embeddings().num_embeddings
    if n < meta["vocab_size"]:
        raise UserError(f"--encoder {meta['encoder']} knows {n:,} tokens, data.npz has {meta['vocab_size']:,}: it is "
                        "not the encoder that data.npz was made for; run 01_data.py again")
    return backbone


def tiny_bert(depth: int, width: int, meta: dict) -> nn.Module:
    """A small BERT to be trained from scratch, without dropout: the heads have theirs. `meta` is that of data.npz."""
    from transformers import AutoModel, BertConfig

    return AutoModel.from_config(BertConfig(
        vocab_size=meta["vocab_size"], pad_token_id=meta["pad"], type_vocab_size=1, num_hidden_layers=depth,
        hidden_size=width, intermediate_size=2 * width, num_attention_heads=math.gcd(width, max(1, width // 64)),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def bare_encoder(config: dict, weights: dict[str, torch.Tensor]) -> nn.Module:
    """An encoder from its stored configuration, without weights; needs no hub. The configuration may come from
    anywhere: whatever makes the library fetch code is left out, and UserError is raised before an encoder is made that
    is bigger than the `weights` that belong to it."""
    from transformers import AutoConfig, AutoModel

    safe = {key: value for key, value in config.items()
            if not key.startswith("_") and key not in ("auto_map", "attn_implementation", "quantization_config")}
    kind = str(safe.pop("model_type", ""))
    try:
        # Under whatever name: num_hidden_layers, n_layers, ...
        layers = [value for key, value in safe.items() if key.endswith("layers") and not isinstance(value, list)]
        if any(value is not None and (not isinstance(value, int) or value > len(weights)) for value in layers):
            raise ValueError(f"{layers} layers")
        shape = AutoConfig.for_model(kind, **safe)
        with torch.device("meta"):
            model = AutoModel.from_config(shape)
            claimed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        if claimed > 2 * sum(weight.numel() for weight in weights.values()) + 2**24:
            raise ValueError(f"{claimed:,} parameters")
        return AutoModel.from_config(shape)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"model.pt: its encoder's configuration does not fit its weights ({error}); train it again"
                        ) from error


def set_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path, made_by: str) -> None:
    """UserError where the weights are not those of such a model: a variant's, say."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} was made by {made_by}, and its weights are not those of this model "
                        f"({str(error).splitlines()[-1].strip():.80}); {_anew(path)}") from error


def without_waiting(backbone: nn.Module) -> nn.Module:
    """The same encoder, with an attention mask for every batch. By itself the library asks the device first whether
    anything is padded, and a GPU's queue runs empty meanwhile."""
    if backbone.config._attn_implementation == "sdpa":
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register("sdpa_masked", sdpa_attention_forward)
        AttentionMaskInterface.register("sdpa_masked", lambda *args, **kwargs: sdpa_mask(
            *args, **kwargs | {"allow_is_bidirectional_skip": False}))
        backbone.set_attn_implementation("sdpa_masked")
    return backbone


def positions(backbone: nn.Module) -> float:
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
    model.amp = amp
    return amp


def logger(folder: Path, config: Any) -> Callable[[dict], None]:
    """A function that appends a record to RUN/log.jsonl, to be followed while it grows, and prints it for a person."""

    def log(record: dict) -> None:
        try:
            with open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{folder / 'log.jsonl'} cannot be written ({error.strerror}); make room") from error
        print(progress(record, config), flush=True)

    return log


def progress(record: dict, config: Any) -> str:
    """The line that a person reads for a record of the log."""
    phase = "heads, epoch" if record.get("phase") == "heads" else "epoch"
    if "validation" in record:
        precision, recall = record["validation"]["P"][record["ranking"]], record["validation"]["recall"]
        return (f"{phase} {record['epoch']} validation P@1/3/5 {'/'.join(f'{p:.1f}' for p in precision)} ranked by "
                f"{record['ranking']}; shortlist recall {' '.join(f'{r:.1f}' for r in recall)}")
    rate = record["batches_per_s"]
    left = (record["total"] - record["step"]) * config.accumulate / rate
    return (f"{phase} {record['epoch']}/{record['epochs']} step {record['step']}/{record['total']}"
            f"  loss {' '.join(f'{loss:.2f}' for loss in record['loss'])}  lr {record['lr']:.1e}"
            f"  {rate * config.batch_size:,.0f} documents/s  {left / 60:.1f} min left"
            + (f"  ({record['surplus']} positive nodes beyond k)" if record["surplus"] else "")
            + (f"  ({record['skipped']} steps skipped so far: fp16 overflow)" if record.get("skipped") else ""))


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


def over_split(model: Any, data: Any, name: str, max_len: int, batch_size: int,
               predict: Callable[[Any, int], dict[str, np.ndarray]], k: int) -> dict[str, np.ndarray]:
    """Apply predict(batch, k), which gives arrays with a row per document, to a whole split; rows in the corpus' order.
    Of every pair "labels ...", "scores ..." what is known beforehand is no prediction: the next ones move up."""
    model.eval()
    order = np.argsort(np.diff(data.splits[name].offsets), kind="stable")
    device, known = model.slot_to_label.device, data.known.get(name)
    more = most_known(known)
    parts = [predict(data.batch(name, order[i : i + batch_size], max_len).to(device), k + more)
             for i in range(0, len(order), batch_size)]
    back = np.argsort(order)
    found = {key: np.concatenate([part[key] for part in parts])[back] for key in parts[0]}
    for key in [key for key in found if more and key.startswith("labels")]:
        scores = key.replace("labels", "scores")
        found[key], found[scores] = without_known(found[key], found[scores], known, k)
    return found


def most_known(known: Any) -> int:
    """How many labels are known of one document, at most: so many more than k have to be found for k to be left."""
    return 0 if known is None else int(np.diff(known.indptr).max(initial=0))


def labels_without_known(labels_NK: np.ndarray, known: Any, k: int) -> np.ndarray:
    """The first k labels of each ranking that are not in known (N, L), or simply the first k where that is None."""
    if known is None:
        return labels_NK[:, :k]
    labels_Nk, _ = without_known(labels_NK, np.zeros(labels_NK.shape), known, k)
    return labels_Nk


def without_known(labels_NK: np.ndarray, scores_NK: np.ndarray, known: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k labels and scores of each ranking that are not in known (N, L), a CSR matrix."""
    stride = known.shape[1] + 1  # one key per (document, label), ascending
    known_P = np.repeat(np.arange(known.shape[0]), np.diff(known.indptr)) * stride + known.indices + 1
    out_NK = np.isin(np.arange(len(labels_NK))[:, None] * stride + labels_NK + 1, known_P) & (labels_NK >= 0)
    place_Nk = np.argsort(out_NK, axis=1, kind="stable")[:, :k]
    gone_Nk = np.take_along_axis(out_NK, place_Nk, axis=1)  # more known than there is room for
    labels_Nk, scores_Nk = (np.take_along_axis(array, place_Nk, axis=1) for array in (labels_NK, scores_NK))
    return np.where(gone_Nk, -1, labels_Nk), np.where(gone_Nk, -np.inf, scores_Nk)


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


def keep_log(path: Path, step: int) -> None:
    """Cut a log of JSON lines back to what was known after `step`."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # the line that was being written when the run stopped
    _write_whole(path, lambda file: file.write("".join(kept).encode()))


def need_space(folder: Path, n_bytes: float, replaced: tuple[str, ...] = (), advice: str = "") -> None:
    """UserError unless the folder can be written to and has room for that much, in place of the files `replaced`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise UserError(f"--run {folder}: cannot be written to ({error}); choose another folder") from None
    free += sum(path.stat().st_size for name in replaced for path in folder.glob(name))
    if free < n_bytes:
        raise UserError(f"--run {folder}: this stage writes about {n_bytes / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB "
                        f"are free; make room, or choose another folder{advice and f'; {advice}'}")


def room_for_training(folder: Path, model: torch.nn.Module, cache: int) -> None:
    """UserError unless three checkpoints, with AdamW's moments, and two models can be written, as happens in a save,
    and `cache` bytes of features for the heads."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    advice = f"or do without the features for the heads, {cache / 2**20:,.0f} MiB: --head-epochs 0" if cache else ""
    need_space(folder, 11 * size + cache, ("checkpoint*", "model.pt*"), advice)


def _write_whole(path: Path, write: Callable[[Any], None], keep: Path | None = None) -> None:
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
    _write_whole(path, lambda file: np.savez(file, meta=record, **arrays))


def save_pt(path: Path, config: Any, content: dict, made_from: tuple[str, ...] = (), keep: Path | None = None,
            **extra) -> None:
    """Write tensors (nested dicts and lists of plain values) and their record; `keep` as for _write_whole."""
    content = {"meta": _record(path, config, made_from, extra, content), **content}
    # Through a file object: torch would otherwise put the temporary name inside the archive.
    _write_whole(path, lambda file: torch.save(content, file), keep)


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


def _anew(path: Path) -> str:
    """The same for one that was there already: only the flags of before make the same again."""
    return _again(path) + " with the flags of before"


def check_data(path: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """UserError unless the arrays of data.npz are within what offsets and the numbers of tokens and labels say."""
    n_labels, most = len(arrays["names_offsets"]) - 1, len(arrays["tokenizer"])  # a token takes some of its bytes
    if not 0 < meta["vocab_size"] <= most:
        raise UserError(f"{path}: a tokeniser of {most} bytes has no {meta['vocab_size']} tokens; {_anew(path)}")
    ends = {"ids": ("offsets", meta["vocab_size"]), "labels": ("label_offsets", n_labels),
            "known": ("known_offsets", n_labels)}
    for key in arrays:
        split, _, kind = key.partition("_")
        if kind in ends:
            values, offsets, most = arrays[key], arrays[f"{split}_{ends[kind][0]}"], ends[kind][1]
            rising = len(offsets) and offsets[0] == 0 and offsets[-1] == len(values) and (np.diff(offsets) >= 0).all()
            if not rising or len(values) and not 0 <= values.min() <= values.max() < most:
                raise UserError(f"{path}: {key} is not what its offsets say, or not below {most}; {_anew(path)}")


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
        raise UserError(f"{path} cannot be read ({reason}); {_anew(path)}") from error


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
        raise UserError(f"{path} carries no record of how it was made; {_anew(path)}") from None
    if written != FORMAT:
        raise UserError(f"{path} has format {written}, expected {FORMAT}; {_anew(path)}")
    try:
        # Twice the size: a value that the file holds once may occur several times.
        found = _digest(meta, content, 2 * path.stat().st_size + 2**20)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {_anew(path)}") from None
    if found != sha256:
        raise UserError(f"{path} is damaged: expected content with sha256 {sha256[:12]}, found {found[:12]}; "
                        f"{_anew(path)}")
    for name, expected in made_from:
        found = _made(path.parent / name) if name in MADE_BY else "no artifact of that name"
        if found != expected:
            raise UserError(
                f"{path} was made from a {name} with sha256 {str(expected)[:12]}, found "
                f"{found[:12] if len(found) == 64 else found}; {_anew(path)}"
            )
    _READ[path.resolve()] = sha256
    return {**meta, "sha256": sha256}
