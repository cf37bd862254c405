"""Name the labels of new texts with a trained model: one text, or JSON lines from a file or a pipe.

    python -m tools.tag --run runs/demo --text "libfoo: reads and writes PNG images"
    python -m tools.tag --run runs/demo --input new.jsonl --output tags.jsonl
    cat new.jsonl | python -m tools.tag --run runs/demo --input - > tags.jsonl

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt, and --input: UTF-8, a JSON object a line, {"text": "...", ...}
Writes   --output, for each of these a line in the same order, {..., "labels": [{"name": "...", "score": 0.93}, ...]}:
         all keys but "text" as they were ("labels", if there is one, is replaced), the best label first

A text is cut into tokens as stage 1 did it, with its --max-tokens, and to the model's --max-len; the labels are ranked
as validation chose; a score is a probability under that ranking. --batch-size lines are read, tagged and written at a
time: with 1, every line is answered at once. A line that is no such object is reported with its number and passed over;
nothing is written for it. All messages go to stderr.

Exit code 0: every line was tagged; 1: some were passed over, or nobody read the output any more; 2: an error. Left out
here: files that are compressed, and more than one model.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tokenizers import Tokenizer

from data.formats import LONGEST, encodable
from plumbing.cli import flag, main, positive
from plumbing.errors import UserError
from plumbing.stages import load_stages

stages = load_stages()


def probability(text: str) -> float:
    """A flag's number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")
    text: str = flag(None, "a text to tag; prints its labels for a person to read", str)
    input: str = flag(None, "JSON lines to tag: a file, or - for standard input", str)
    output: str = flag("-", "file for the tagged lines, or - for standard output")
    k: int = flag(5, "labels of a text, at most", positive)
    threshold: float = flag(0.0, "give only labels with at least this score, 0 to 1", probability)
    batch_size: int = flag(64, "lines that are read, tagged and written at a time", positive)


Tags = list[dict[str, str | float]]


def tagger(config: Config) -> Callable[[list[str]], list[Tags]]:
    """A function from texts to the labels of each, best first. UserError when the run's artifacts are not in order."""
    data = stages.data.load(config.run)
    model, trained, ranking = stages.train.load(config.run, data)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    data = data._replace(splits={})  # the corpus is not needed any more
    tokenizer, most = Tokenizer.from_buffer(data.tokenizer), data.meta["config"]["max_tokens"]

    def predict(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        labels_Bk, scores_Bk = model.predict(batch, k, ranking)
        return {"labels": labels_Bk.cpu().numpy(), "scores": scores_Bk.exp().cpu().numpy()}

    def tag(texts: list[str]) -> list[Tags]:
        batch = data._replace(splits={"new": documents(texts, tokenizer, most)})
        found = stages.train.predict_split(model, batch, "new", trained.max_len, config.batch_size, predict, config.k)
        # A float32 has about 7 digits: as text, and back, it has no others.
        return [[{"name": data.names[label], "score": float(str(score))}
                 for label, score in zip(*row, strict=True) if label >= 0 and score >= config.threshold]
                for row in zip(found["labels"], found["scores"], strict=True)]

    return tag


def documents(texts: list[str], tokenizer: Tokenizer, most: int) -> stages.data.Split:
    """The texts as documents without labels, with the token ids that stage 1 would give them: at most `most` each."""
    tokenizer.no_truncation()  # a tokeniser may have settings of its own; stage 1 does without them
    tokenizer.no_padding()
    encodings = tokenizer.encode_batch_fast([encodable(text) for text in texts], add_special_tokens=False)
    rows = [encoding.ids[:most] for encoding in encodings]
    ids, ends = np.fromiter(chain.from_iterable(rows), np.int64), np.cumsum([0] + [len(row) for row in rows])
    return stages.data.Split(ids, ends, np.zeros(0, np.int32), np.zeros_like(ends))


def finite(text: str) -> float:
    """A number for json.loads, which would also read NaN and infinities, and could not write them as JSON again."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is no finite number")
    return float(text)


def read(file: BinaryIO, complain: Callable[[int, str], None]) -> Iterator[dict]:
    """Yield the objects of JSON lines that have a text; complain(line number, reason) of each of the others."""
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        if len(line) == LONGEST:
            raise UserError(f"--input line {number}: longer than {LONGEST >> 20} MiB")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            row = json.loads(text, parse_float=finite, parse_constant=finite)
        except (ValueError, RecursionError) as error:
            complain(number, f"no JSON in UTF-8 ({error})")
            continue
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            yield row
        else:
            complain(number, f"expected an object with a text, a string: {line[:80]!r}")


def opened(path: str, mode: str, flag: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """A file, or with - standard input or output, which stays open. UserError where that cannot be."""
    if path == "-":
        return contextlib.nullcontext(sys.stdin.buffer if mode == "rb" else sys.stdout.buffer)
    try:
        return open(path, mode)
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise UserError(f"{flag} {path} cannot be opened ({error}); name another file, or - for a pipe") from None


def run(config: Config) -> int:
    """The exit code: 1 when lines were passed over, else 0."""
    if (config.text is None) == (config.input is None):
        raise UserError("give either --text with a text, or --input with a file of JSON lines (- for standard input)")
    if config.text is not None:
        found = tagger(config)([config.text])[0]
        print("\n".join(f"{tag['score']:.3f} {tag['name']}" for tag in found)
              or f"none of the {config.k} best labels has a score of at least {config.threshold}")
        return 0
    if config.output != "-" and Path(config.output).exists() and Path(config.input).exists() and (
            Path(config.output).samefile(config.input)):
        raise UserError(f"--output {config.output} is the input; name another file")
    tagged, passed_over = 0, 0

    def complain(number: int, reason: str) -> None:
        nonlocal passed_over
        passed_over += 1
        print(f"tag.py: line {number} passed over: {reason}", file=sys.stderr)

    with opened(config.input, "rb", "--input") as source:
        tag, rows = tagger(config), read(source, complain)
        with opened(config.output, "wb", "--output") as out:
            while chunk := list(islice(rows, config.batch_size)):
                for row, labels in zip(chunk, tag([row.pop("text") for row in chunk]), strict=True):
                    out.write(json.dumps({**row, "labels": labels}).encode() + b"\n")
                out.flush()
                tagged += len(chunk)
    print(f"tag.py: {tagged:,} lines tagged, {passed_over:,} passed over", file=sys.stderr)
    return int(passed_over > 0)


def command(config: Config) -> None:
    """run, ended by its exit code: main would otherwise print the time it took among the tagged lines."""
    try:
        code = run(config)
    except BrokenPipeError:  # whoever read the output has enough; Python is kept from writing the rest when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main(command, Config, __doc__)
