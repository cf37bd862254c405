"""Make a corpus from a corpus. The same input gives the same files byte for byte, so others can
repeat it.

    python data/derive.py sample --source FOLDER --out FOLDER --train 5000 --val 1000 --test 1000
    python data/derive.py eurlex-titles --source eurlex57k --out FOLDER
    python data/derive.py debian-short --source data/debian --out FOLDER

sample          documents drawn at random, from any corpus that data/formats.py reads. For each
                split a fresh random.Random(seed).sample(range(n), k) says which documents, in
                which order. All labels stay, so that their ids stay the same. --val 0: without a
                validation split. A CSV column of labels needs --separator.
eurlex-titles   EURLEX57K as its authors publish it, but of each document the title alone, in
                ascending order of the CELEX ids within a split. The labels are in the order that
                data/formats.py gives them.
debian-short    the corpus that ships, but of each document the first sentence alone: its name and
                its short description. The rest is as it was.

Writes   OUT/{train,val,test}.jsonl.gz       {"text": "...", "labels": ["name", ...]},
                                             perhaps with "celex_id"
         OUT/labels.jsonl.gz                 {"name": "...", "text": "..."}
         OUT/filter_labels_{split}.txt.gz    where the source has filter files: their pairs, with
                                             the new lines
         Where names of labels repeat, so that only ids tell them apart: trn.json.gz, val.json.gz,
         tst.json.gz and lbl.json.gz, as in the LF data sets.

OUT must not be there yet, or be empty. Nothing else is written.

The first sentence of a Debian package: data/build_debian.py joins "name: short description. long
description". For a document that is a label, labels.jsonl.gz has the short description. We cut the
other documents at the first full stop with a blank behind it. That is sometimes too early, as in
"Operating system (e.g. diagnostics) library": of the 9,613 documents whose short description we
know, it would be so for 14. So expect some 55 of the other 37,506.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Run as a script, Python looks for modules in data/ alone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import formats  # noqa: E402
from data.build_debian import write  # noqa: E402
from data.corpus import label_list  # noqa: E402
from plumbing.cli import natural, positive  # noqa: E402
from plumbing.errors import UserError  # noqa: E402

SPLITS = ("train", "val", "test")
LF_NAMES = {"train": "trn", "val": "val", "test": "tst"}  # how the LF data sets name their files


class Derived(NamedTuple):
    """A corpus, ready to be written."""

    documents: dict[str, list[dict]]  # by split: "text", "labels" (names or ids), and what else
    labels: list[tuple[str, str]]  # (name, text) by id
    by_name: bool  # whether documents have the names of their labels, or their ids
    known: dict[str, list[tuple[int, int]]]  # by split: (line of a document, id of a label)


# ------------------------------------------------------------------------------------------- sample


def sample(source: Path, sizes: dict[str, int], seed: int, separator: str = ";") -> Derived:
    """sizes[split] documents of each split, drawn at random, in the order in which they were drawn.

    UserError where a split is missing or has fewer documents.
    """
    # All labels stay, those too that no document drawn has: so their ids stay the same.
    corpus = formats.open_corpus(source, separator)
    labels = label_list(corpus, source)
    documents = {}
    known = {}
    for split, size in sizes.items():
        if size == 0:  # the user wants no such split
            continue
        lines = draw(corpus, source, split, size, seed)
        documents[split] = rows_at(lines, corpus, split, labels)
        if split in corpus.known:
            known[split] = known_pairs(corpus, split, len(labels), lines)
    # Names are easier to read than ids. But they must tell the labels apart.
    by_name = corpus.by_name or names_are_unique(labels)
    return Derived(documents, labels, by_name, known)


def draw(corpus: formats.Corpus, source: Path, split: str, size: int, seed: int) -> list[int]:
    """The lines of the documents that are drawn from a split."""
    if split not in corpus.documents:
        raise UserError(f"--{split} {size}: {source} has no {split} split; give --{split} 0")
    # Nothing says how many documents a file has, so they are counted.
    n = sum(1 for _ in corpus.documents[split]())
    if size > n:
        raise UserError(
            f"--{split} {size}: {source} has {n:,} {split} documents; ask for at most so many"
        )
    # A generator of its own for each split: the draw of one does not depend on the sizes of others.
    generator = random.Random(seed)
    return generator.sample(range(n), size)


def rows_at(
    lines: list[int], corpus: formats.Corpus, split: str, labels: list[tuple[str, str]]
) -> list[dict]:
    """The documents in some lines of a split, in the order of `lines`."""
    # The corpus is read once from top to bottom, and each document goes to its place.
    place = {line: i for i, line in enumerate(lines)}
    rows: list[dict] = [{}] * len(lines)  # every place is filled below
    for line, document in enumerate(corpus.documents[split]()):
        if line in place:
            row_labels = named_labels(document, labels, corpus.by_name)
            row = {"text": document.text, "labels": row_labels}
            rows[place[line]] = row
    return rows


def known_pairs(
    corpus: formats.Corpus, split: str, n_labels: int, lines: list[int]
) -> list[tuple[int, int]]:
    """The filter pairs of some lines of a split, numbered by their places in `lines`."""
    # Row i of the matrix belongs to lines[i], so the rows are the new line numbers.
    path = corpus.known.get(split)
    lines_N = np.array(lines, np.int64)
    known = formats.read_known(path, n_labels, lines_N)
    rows, labels = known.nonzero()
    return list(zip(rows.tolist(), labels.tolist(), strict=True))


def names_are_unique(labels: list[tuple[str, str]]) -> bool:
    """Whether no two labels have the same name."""
    different_names = {name for name, _ in labels}
    return len(different_names) == len(labels)


def named_labels(document: formats.Document, labels: list[tuple[str, str]], by_name: bool) -> list:
    """The names of a document's labels; their ids, where names repeat."""
    if by_name:
        return document.labels
    # Nobody has looked at these ids yet: a negative one would name a label from the end.
    for label in document.labels:
        if not 0 <= label < len(labels):
            raise UserError(
                f"{document.where}: label {label} is not among the {len(labels)} labels; "
                "add it to them"
            )
    if names_are_unique(labels):
        return [labels[label][0] for label in document.labels]
    return document.labels


# ------------------------------------------------------------------------------------ eurlex-titles


def eurlex_titles(source: Path) -> Derived:
    """The titles of EURLEX57K's documents, in ascending order of their CELEX ids within a split."""
    corpus = formats.open_corpus(source)
    if corpus.layout != "EURLEX57K":
        raise UserError(
            f"--source {source} looks like {corpus.layout}; expected EURLEX57K as its authors "
            "publish it: train/, dev/ and test/ with a JSON file for each document"
        )
    labels = label_list(corpus, source)
    documents = {}
    known = {}
    for split in ordered(corpus):
        rows = [title_of(document) for document in corpus.documents[split]()]
        # Which line comes first, which second, and so on: the filter pairs have to move along.
        celex_ids = [row["celex_id"] for row in rows]
        order = sorted(range(len(rows)), key=celex_ids.__getitem__)
        documents[split] = [rows[line] for line in order]
        if split in corpus.known:
            known[split] = known_pairs(corpus, split, len(labels), order)
    return Derived(documents, labels, True, known)


def title_of(document: formats.Document) -> dict:
    """CELEX id, title and labels of a document; `where` is its file.

    The CELEX id is the number that EUR-Lex gives every document of European law.
    """
    # The corpus has read this file, but a Document has no room for an id and a title.
    content = Path(document.where).read_text("utf-8-sig")
    number, title = formats.read_json(document.where, content, "celex_id", "title")
    for value in (number, title):
        formats.document(document.where, value, document.labels, str)  # an error unless a string
    # A title may run over several lines.
    words = title.split()
    return {"celex_id": number, "text": " ".join(words), "labels": document.labels}


# ------------------------------------------------------------------------------------- debian-short


def debian_short(source: Path) -> Derived:
    """The first sentences of the documents; all else as it was."""
    corpus = formats.open_corpus(source)
    if corpus.layout != "JSON lines" or corpus.labels is None:
        raise UserError(
            f"--source {source} is not as data/build_debian.py writes it: train.jsonl.gz, "
            "val.jsonl.gz, test.jsonl.gz and labels.jsonl.gz; give data/debian"
        )
    text_of = dict(corpus.labels)
    documents = {}
    known = {}
    for split in ordered(corpus):
        rows = []
        for document in corpus.documents[split]():
            text = first_sentence(document.text, text_of)
            rows.append({"text": text, "labels": document.labels})
        documents[split] = rows
        if split in corpus.known:
            lines = list(range(len(rows)))  # every document stays in its line
            known[split] = known_pairs(corpus, split, len(corpus.labels), lines)
    return Derived(documents, corpus.labels, True, known)


def first_sentence(text: str, label_texts: dict[str, str]) -> str:
    """ "name: short description." of a document.

    `label_texts` has "name: short description" of the documents that are labels.
    """
    # Is the document a label? Then the label's text says where the first sentence ends.
    name, _, _ = text.partition(": ")
    own = " ".join(label_texts.get(name, "").split())
    if own and text.startswith(own + "."):
        return own + "."
    # If not, it ends at the first full stop with a blank behind it.
    short, end, _ = text.partition(". ")
    if end:
        return short + "."
    return text if text.endswith(".") else text + "."


def ordered(corpus: formats.Corpus) -> list[str]:
    """The splits that a corpus has: train, val, test."""
    return [split for split in SPLITS if split in corpus.documents]


# ------------------------------------------------------------------------------------------ writing


def check_out(out: Path) -> None:
    """UserError unless nothing is lost when a corpus is written there."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder that is not there yet")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"--out {out} is not empty, and nothing is overwritten; name another folder, or empty "
            "it"
        )


def files_of(derived: Derived) -> Iterator[tuple[str, list[str]]]:
    """Yield (name of a file, its lines) of the corpus."""
    # 1. Documents and labels.
    layout = json_lines_files if derived.by_name else lf_files
    yield from layout(derived)
    # 2. The filter files, where the source has them. They are the same in both layouts.
    for split, pairs in derived.known.items():
        lines = [f"{line} {label}" for line, label in pairs]
        yield f"filter_labels_{split}.txt.gz", lines


def json_lines_files(derived: Derived) -> Iterator[tuple[str, list[str]]]:
    """The layout in which documents have the names of their labels."""
    for split, rows in derived.documents.items():
        lines = [json_line(row) for row in rows]
        yield f"{split}.jsonl.gz", lines
    labels = [json_line({"name": name, "text": text}) for name, text in derived.labels]
    yield "labels.jsonl.gz", labels


def lf_files(derived: Derived) -> Iterator[tuple[str, list[str]]]:
    """The layout in which documents have the ids of their labels, as in the LF data sets."""
    for split, rows in derived.documents.items():
        lines = []
        for row in rows:
            # A reader of this layout joins title and content, so an empty title adds nothing.
            lf_row = {"title": "", "content": row["text"], "target_ind": row["labels"]}
            lines.append(json_line(lf_row))
        yield f"{LF_NAMES[split]}.json.gz", lines
    titles = [json_line({"title": name}) for name, _ in derived.labels]
    yield "lbl.json.gz", titles


def json_line(row: dict) -> str:
    """UTF-8 cannot say half a character: it becomes a question mark, as in stage 1."""
    text = json.dumps(row, ensure_ascii=False)
    return formats.encodable(text)


def save(derived: Derived, out: Path) -> None:
    """Write the corpus; of one that cannot be written whole, nothing is left."""
    check_out(out)
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, lines in files_of(derived):
            # It is noted before it is written: a file that fails halfway is there, too.
            written.append(out / name)
            write(out / name, lines)
    except OSError as error:
        # Half a corpus would look like a whole one.
        for path in written:
            path.unlink(missing_ok=True)
        raise UserError(
            f"--out {out} cannot be written ({error}); make room, or name another folder"
        ) from error


# ------------------------------------------------------------------------------------- command line


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command and its flags. --help shows the text at the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ("sample", "eurlex-titles", "debian-short")
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(names))
    for name in names:
        # Every command has --source and --out. Only `sample` has choices to make.
        command = commands.add_parser(name, allow_abbrev=False)
        command.add_argument(
            "--source", type=Path, required=True, help="folder of the corpus that is there"
        )
        command.add_argument(
            "--out", type=Path, required=True, help="folder of the corpus to be made"
        )
        if name == "sample":
            add_sample_flags(command)
    return parser.parse_args(argv)


def add_sample_flags(command: argparse.ArgumentParser) -> None:
    """How many documents to draw, and how."""
    command.add_argument("--train", type=positive, default=5000, help="training documents [5000]")
    command.add_argument(
        "--val", type=natural, default=1000, help="documents for validation; 0: none [1000]"
    )
    command.add_argument("--test", type=positive, default=1000, help="test documents [1000]")
    command.add_argument("--seed", type=natural, default=0, help="seed of the draw [0]")
    command.add_argument(
        "--separator", default=";", help="what stands between labels in a CSV column [;]"
    )


def run(args: argparse.Namespace) -> None:
    """Make the corpus that the command asks for, write it, and say how large it is."""
    # 1. Refuse what cannot work before anything is read, which may take a while.
    if not args.source.is_dir():
        raise UserError(f"--source {args.source}: no such folder; name the folder of a corpus")
    check_out(args.out)
    # 2. Make it, in memory.
    if args.command == "sample":
        sizes = {"train": args.train, "val": args.val, "test": args.test}
        derived = sample(args.source, sizes, args.seed, args.separator)
    elif args.command == "eurlex-titles":
        derived = eurlex_titles(args.source)
    else:
        derived = debian_short(args.source)
    # 3. Write it.
    save(derived, args.out)
    describe(derived)
    print(f"{args.out}: {len(derived.labels):,} labels")


def describe(derived: Derived) -> None:
    """Print how many documents each split has, and how long they are."""
    for split, rows in derived.documents.items():
        n_words = [len(row["text"].split()) for row in rows]
        mean = np.mean(n_words)
        # How many labels the filter files say are known, where there are such files.
        pairs = ""
        if split in derived.known:
            n_pairs = len(derived.known[split])
            pairs = f", {n_pairs:,} pairs of a document and a label known beforehand"
        print(f"{split:5}  {len(rows):8,} documents   {mean:.1f} words each{pairs}")


if __name__ == "__main__":
    try:
        run(parse())
    except (UserError, OSError) as error:
        # Errors about a corpus name stage 1's flag; here it is called --source.
        said = str(error).replace("--corpus", "--source", 1)
        print(f"derive.py: error: {said}", file=sys.stderr)
        sys.exit(2)
