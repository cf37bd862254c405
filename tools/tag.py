"""Name the labels of new texts with a trained model: one text, or JSON lines from a file or a pipe.

    python -m tools.tag --run runs/demo --text "libfoo: reads and writes PNG images"
    python -m tools.tag --run runs/demo --input new.jsonl --output tags.jsonl
    cat new.jsonl | python -m tools.tag --run runs/demo --input - > tags.jsonl

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt, and --input: UTF-8, a JSON object a line,
         {"text": "...", ...}
Writes   --output, for each of these a line in the same order, the best label first:
         {..., "labels": [{"name": "...", "score": 0.93}, ...]}
         All keys but "text" stay as they were; "labels", if there is one, is replaced.

A text is cut into tokens as stage 1 did it, with its --max-tokens, and to the model's --max-len.
The labels are ranked as validation chose, and a score is a probability under that ranking.
--batch-size lines are read, tagged and written at a time: with 1, every line is answered at once. A
line that is no such object is reported with its number and passed over; nothing is written for it.
All messages go to stderr.

Exit code 0: every line was tagged. 1: some were passed over, or nobody read the output to its end.
2: an error. Left out here: files that are compressed, and more than one model.

Shapes   B texts of a batch, k labels of a text
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
from plumbing.streams import output_failure

stages = load_stages()

Tags = list[dict[str, str | float]]  # the labels of a text: name and score, the best first


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


# 1. Texts to labels.


def tagger(config: Config) -> Callable[[list[str]], list[Tags]]:
    """A function from texts to the labels of each. UserError when the run is not in order."""
    # 1. The model, and a tokeniser that cuts as the one of stage 1 did.
    data = stages.data.load(config.run)
    model, trained, ranking = stages.train.load(config.run, data)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    data = data._replace(splits={})  # the corpus is not needed any more
    tokenizer = Tokenizer.from_buffer(data.tokenizer)
    max_tokens = data.meta["config"]["max_tokens"]

    # 2. The best labels of a batch. The model gives logarithms of probabilities.
    def predict(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        labels_Bk, scores_Bk = model.predict(batch, k, ranking)
        return {"labels": labels_Bk.cpu().numpy(), "scores": scores_Bk.exp().cpu().numpy()}

    def tag(texts: list[str]) -> list[Tags]:
        # 3. The texts become a split, so that prediction is the one of stage 4.
        split = documents(texts, tokenizer, max_tokens)
        batch = data._replace(splits={"new": split})
        found = stages.train.predict_split(
            model, batch, "new", trained.max_len, config.batch_size, predict, config.k
        )
        # 4. From label ids to names.
        tags = []
        for labels, scores in zip(found["labels"], found["scores"], strict=True):
            tags.append(tags_of(labels, scores))
        return tags

    def tags_of(labels: np.ndarray, scores: np.ndarray) -> Tags:
        """The tags of one text, from its label ids (k,) and their scores (k,)."""
        tags = []
        for label, score in zip(labels, scores, strict=True):
            # -1 stands where fewer than k labels were found.
            if label >= 0 and score >= config.threshold:
                # A float32 has about 7 digits. By way of its text it gets no others.
                tags.append({"name": data.names[label], "score": float(str(score))})
        return tags

    return tag


def documents(texts: list[str], tokenizer: Tokenizer, max_tokens: int) -> stages.data.Split:
    """The texts as documents without labels, with the token ids that stage 1 would give them."""
    # 1. The tokens. A tokeniser may cut and pad by settings of its own; stage 1 does without.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    clean = [encodable(text) for text in texts]
    encodings = tokenizer.encode_batch_fast(clean, add_special_tokens=False)
    rows = [encoding.ids[:max_tokens] for encoding in encodings]
    # 2. All of them one after the other in one array, and where each text begins.
    ids = np.fromiter(chain.from_iterable(rows), np.int64)
    lengths = [len(row) for row in rows]
    offsets = np.cumsum([0, *lengths])
    # 3. Nobody knows the labels yet: every text has none.
    no_labels = np.zeros(0, np.int32)
    label_offsets = np.zeros_like(offsets)
    return stages.data.Split(ids, offsets, no_labels, label_offsets)


# 2. Lines in.


def finite(text: str) -> float:
    """A number for json.loads. NaN and infinities, which it reads too, are no JSON."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is no finite number")
    return float(text)


def read(file: BinaryIO, complain: Callable[[int, str], None]) -> Iterator[dict]:
    """Yield the objects of JSON lines that have a text; complain(line number, reason) of others."""
    number = 0
    # Never more than LONGEST bytes at a time: a file without line ends must not fill the memory.
    while line := file.readline(LONGEST):
        number += 1
        if len(line) == LONGEST:
            raise UserError(f"--input line {number}: longer than {LONGEST >> 20} MiB")
        # 1. Is it JSON? Some editors put a mark (BOM) before the first letter of a UTF-8 file.
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        try:
            text = line.decode(encoding)
            row = json.loads(text, parse_float=finite, parse_constant=finite)
        except (ValueError, RecursionError) as error:
            complain(number, f"no JSON in UTF-8 ({error})")
            continue
        # 2. Is it what was asked for?
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            yield row
        else:
            complain(number, f"expected an object with a text, a string: {line[:80]!r}")


def opened(path: str, mode: str, flag: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """A file, or with - standard input or output. UserError if it cannot be opened."""
    if path == "-":
        # They are not ours to close: a nullcontext leaves them open at the end of `with`.
        standard = sys.stdin if mode == "rb" else sys.stdout
        return contextlib.nullcontext(standard.buffer)
    try:
        return open(path, mode)
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise UserError(
            f"{flag} {path} cannot be opened ({error}); name another file, or - for a pipe"
        ) from None


# 3. One text, or lines in and lines out.


def run(config: Config) -> int:
    """The exit code: 1 when lines were passed over, else 0."""
    if (config.text is None) == (config.input is None):
        raise UserError(
            "give either --text with a text, or --input with a file of JSON lines "
            "(- for standard input)"
        )
    if config.text is not None:
        tag_one(config)
        return 0
    return tag_lines(config)


def tag_one(config: Config) -> None:
    """Print the labels of --text."""
    tag = tagger(config)
    tags = tag([config.text])[0]
    for found in tags:
        print(f"{found['score']:.3f} {found['name']}")
    if not tags:
        print(f"none of the {config.k} best labels has a score of at least {config.threshold}")


def tag_lines(config: Config) -> int:
    """Tag the lines of --input; the exit code."""
    # 1. To open a file for writing empties it, so the input must not be the output. It may have
    #    another name there: a link.
    same_file = (
        config.output != "-"
        and Path(config.output).exists()
        and Path(config.input).exists()
        and Path(config.output).samefile(config.input)
    )
    if same_file:
        raise UserError(f"--output {config.output} is the input; name another file")
    # 2. Lines that are no good are counted, and do not end the work.
    n_tagged = 0
    n_passed_over = 0

    def complain(number: int, reason: str) -> None:
        nonlocal n_passed_over
        n_passed_over += 1
        print(f"tag.py: line {number} passed over: {reason}", file=sys.stderr)

    # 3. Tag some lines at a time. The output is opened last: when the input or the model cannot be
    #    read, an older output stays.
    with opened(config.input, "rb", "--input") as source:
        tag = tagger(config)
        rows = read(source, complain)
        with opened(config.output, "wb", "--output") as out:
            while chunk := list(islice(rows, config.batch_size)):
                texts = [row.pop("text") for row in chunk]
                for row, labels in zip(chunk, tag(texts), strict=True):
                    line = json.dumps({**row, "labels": labels})
                    out.write(line.encode() + b"\n")
                # Whoever waits at the other end of a pipe gets the answers now.
                out.flush()
                n_tagged += len(chunk)
    print(f"tag.py: {n_tagged:,} lines tagged, {n_passed_over:,} passed over", file=sys.stderr)
    return int(n_passed_over > 0)


def command(config: Config) -> None:
    """run, ended by its exit code: main would print the time it took among the tagged lines."""
    try:
        code = run(config)
    except BrokenPipeError:
        # Whoever read the output has enough, as `head` has after ten lines. When Python ends, it
        # would try to write the rest, and complain. So its output goes nowhere from here on.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        code = 1
    if output_failure():  # of --text
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main(command, Config, __doc__)
