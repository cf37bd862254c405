"""Every family of encoders that the transformers library has, each as a tiny random model: it works
through stages 1, 2, 4 and 5, or stage 1 refuses it in one line. None fails later.

    python tests/encoder_families.py                   all of them, half an hour on two cores
    python tests/encoder_families.py bert t5 gpt2      some

A tiny model is the family's default configuration with small numbers. Where that makes no model,
the family is counted as not tried, with the reason. Each family runs in a process of its own, with
a limit of time. All get the same tokeniser, of the kind of BERT's.

Exit code 1 where a family fails late.
"""

import argparse
import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from plumbing.errors import UserError
from plumbing.stages import load_stages

stages = load_stages()

SECONDS = 120  # for a family, from its configuration to its predictions
MEMORY = 12 * 2**30  # bytes of addresses
MOST = 30_000_000  # parameters of a model that counts as tiny
# What makes a model small: the end of a setting's name, and its value.
SMALL = {
    "vocab_size": None,  # that of the tokeniser
    "layers": 2,
    "n_layer": 2,
    "blocks": 2,
    "heads": 2,
    "n_head": 2,
    "n_embd": 32,
    "hidden_size": 32,
    "d_model": 32,
    "dim": 32,
    "width": 32,
    "projection_size": 32,
    "embedding_size": 32,
    "d_embed": 32,
    "head_dim": 16,
    "d_kv": 16,
    "d_head": 16,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "d_ff": 64,
    "d_inner": 64,
    "dim_ff": 64,
    "hidden_dim": 64,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "experts_per_tok": 2,
    "max_position_embeddings": 128,
    "n_positions": 128,
}
LONGEST_NAME_FIRST = sorted(SMALL, key=len, reverse=True)


def make_small(config: Any, n_words: int) -> Any:
    """The configuration with small numbers, in its parts, too."""
    depth = getattr(config, "num_hidden_layers", None)
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            make_small(value, n_words)
        elif isinstance(value, list) and depth and len(value) == depth:
            setattr(config, key, value[:2])  # a value for each layer
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            for end in LONGEST_NAME_FIRST:
                if key.endswith(end):
                    small = n_words if end == "vocab_size" else SMALL[end]
                    setattr(config, key, min(value, small))
                    break
    if getattr(config, "pad_token_id", 0) is not None:
        config.pad_token_id = 0
    return config


def make_model(family: str, n_words: int) -> torch.nn.Module:
    """A tiny random model. ValueError where it is not tiny."""
    config = make_small(transformers.CONFIG_MAPPING[family](), n_words)
    classes = MODEL_MAPPING_NAMES[family]
    if isinstance(classes, tuple):  # the library asks for one of several
        config.architectures = [classes[0]]
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config)


def documents(n: int, seed: int) -> list[dict]:
    """Documents made of the words of their labels."""
    found = []
    for i in range(n):
        label = (7 * i + seed) % 6
        words = [f"w{label}x{j} noise{(i + j) % 5}" for j in range(3 + i % 4)]
        found.append({"text": " ".join(words), "labels": [f"topic{label}"]})
    return found


def make_corpus(folder: Path) -> Path:
    folder.mkdir()
    for split, n in (("train", 24), ("val", 8), ("test", 8)):
        lines = [json.dumps(row) + "\n" for row in documents(n, len(split))]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def through_all_stages(encoder: Path, corpus: Path, run: Path) -> tuple[str, str]:
    """(what became of it, why)."""
    small = {"max_len": 32, "batch_size": 8, "amp": "off", "head_epochs": 1, "epochs": 1}
    steps = {
        1: lambda: stages.data.run(
            stages.data.Config(run=str(run), corpus=str(corpus), encoder=str(encoder))
        ),
        2: lambda: stages.tree.run(stages.tree.Config(run=str(run), levels="2")),
        4: lambda: stages.train.run(stages.train.Config(run=str(run), **small)),
        5: lambda: stages.eval.run(stages.eval.Config(run=str(run), k=3)),
    }
    for stage, step in steps.items():
        try:
            step()
        except UserError as error:
            if stage == 1:
                return "refused", str(error).replace(str(encoder), "FOLDER")
            return "fails late", f"stage {stage}: {error}"
        except Exception as error:
            return "fails late", f"stage {stage}: {type(error).__name__}: {error}"
    with np.load(run / "predictions.npz", allow_pickle=False) as predictions:
        if not np.isfinite(predictions["scores"]).all():
            return "fails late", "stage 5: scores that are not finite"
    return "works", ""


def try_family(family: str, folder: Path, tokenizer: Any, corpus: Path) -> tuple[str, str]:
    """(works, refused, fails late or not tried; why)."""
    encoder = folder / family
    try:
        make_model(family, len(tokenizer)).save_pretrained(encoder)
        tokenizer.save_pretrained(encoder)
    except Exception as error:
        return "not tried", f"no tiny model: {type(error).__name__}: {error}"
    return through_all_stages(encoder, corpus, folder / f"run-{family}")


def in_a_process(function, *args) -> tuple[str, str]:
    """What function(*args) returns, in a child with limits that prints nothing."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.write(write, json.dumps(function(*args)).encode())
        except BaseException as error:
            os.write(write, json.dumps(["fails late", repr(error)[:500]]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if said:
        return tuple(json.loads(said))
    reason = f"no answer within {SECONDS} s" if status == -signal.SIGALRM else f"exit {status}"
    return "no answer", reason


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="model types of the library [all]")
    args = parser.parse_args()
    unknown = set(args.families) - set(MODEL_MAPPING_NAMES)
    if unknown:
        parser.error(f"not in transformers {transformers.__version__}: {', '.join(unknown)}")
    torch.set_num_threads(1)
    found = Counter()
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(BrokenPipeError):
        folder = Path(name)
        corpus = make_corpus(folder / "corpus")
        texts = [row["text"] for row in documents(24, 5)]
        tokenizer = stages.data.train_tokenizer(lambda: texts, 200)
        # What all families import, once for all children.
        try_family("bert", folder / "first", tokenizer, corpus)
        for family in args.families or sorted(MODEL_MAPPING_NAMES):
            start = time.perf_counter()
            what, why = in_a_process(try_family, family, folder, tokenizer, corpus)
            found[what] += 1
            seconds = time.perf_counter() - start
            why = " ".join(why.split())
            print(f"{family:32} {what:11} {seconds:4.0f} s  {why[:300]}", flush=True)
        print(f"transformers {transformers.__version__}: {sum(found.values())} families; ", end="")
        print(", ".join(f"{n} {what}" for what, n in sorted(found.items())))
    return int(found["fails late"] + found["no answer"] > 0)


if __name__ == "__main__":
    sys.exit(main())
