"""Build data/debian, the corpus that ships.

The texts are the descriptions of Debian packages. The labels are the packages that they depend on.

    python data/build_debian.py                      with the apt sources of this machine
    python data/build_debian.py --sources FILE       with another apt source file that names a
                                                     bookworm mirror
    python data/build_debian.py --only-filters       the filter files alone, from the documents
                                                     that are there

Reads    the package index of Debian bookworm (main, amd64, English descriptions). apt-get fetches
         it into a private folder and verifies it: the machine's own package lists are not touched,
         nothing is installed.
Writes   data/debian/{train,val,test}.jsonl.gz
                                     {"text": "name: short. long", "labels": ["dependency", ...]}
         data/debian/labels.jsonl.gz
                                     {"name": "...", "text": "name: short description"}
         data/debian/filter_labels_{train,val,test}.txt.gz
                                     "line id": the label that the document itself is

One document in five is a label, too: other packages depend on it. Its text begins with the name and
the text of that label, and the label is never right, since no package depends on itself. So the
filter files say that it is known beforehand, and it is not predicted. The filter files that ship
were made with --only-filters, when the other files had been there for a while.

The same index gives the same content byte for byte, before compression. A hash of the source
package decides the split. So the binary packages of one source, whose descriptions are nearly the
same, are all in the same split.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SPLITS = ("train", "val", "test")
TOO_FREQUENT = 0.05  # share of documents; labels on more of them (libc6, say) teach nothing
MIN_SOURCES = 2  # a label used by one source package alone would sit in one split alone
MAX_CHARS = 1500  # keeps the corpus at 6 MB; cuts about one document in a hundred, after a word


# ---------------------------------------------------------------------------------------- the index


def fetch_index(folder: Path, sources: str) -> tuple[Path, Path]:
    """The paths of (Packages, Translation-en) of bookworm, which apt-get fetches into `folder`."""
    apt = apt_command(folder, sources)
    # A source that has nothing to do with bookworm may fail. What counts is whether the two files
    # below are there.
    subprocess.run([*apt, "update"], check=False)
    return index_file(apt, "Packages"), index_file(apt, "Translations")


def apt_command(folder: Path, sources: str) -> list[str]:
    """apt-get with options that keep it inside `folder`, and with the apt source file, if any."""
    # apt-get expects this folder to be there already.
    lists = folder / "lists"
    partial = lists / "partial"
    partial.mkdir(parents=True)
    options = {
        # What it fetches goes into our folder, not among the package lists of this machine.
        "Dir::State::Lists": lists,
        "Dir::Cache": folder,
        # The same corpus on every machine, whatever its processor and its language are.
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        "Acquire::Languages": "en",
        # Plain text, since `stanzas` reads the files as they are.
        "Acquire::GzipIndexes": "false",
        # By default apt-get fetches as a user of its own, who may not write into our folder.
        "APT::Sandbox::User": "root",
    }
    if sources:
        options["Dir::Etc::sourcelist"] = Path(sources).resolve()
        options["Dir::Etc::sourceparts"] = "-"  # and none of the machine's other source files
    # Every option is given as -o key=value.
    command = ["apt-get"]
    for key, value in options.items():
        command += ["-o", f"{key}={value}"]
    return command


def index_file(apt: list[str], created_by: str) -> Path:
    """The one file of bookworm/main that apt-get has fetched of a kind."""
    # 1. Ask apt-get where it keeps the files of this kind. It knows their names, which depend on
    #    the mirror.
    filters = [
        "Codename: bookworm",
        "Component: main",
        "Origin: Debian",
        f"Created-By: {created_by}",
    ]
    command = [*apt, "indextargets", "--format", "$(FILENAME)", *filters]
    listed = subprocess.run(command, check=True, capture_output=True, text=True)
    # 2. It also names files that it could not fetch.
    paths = []
    for line in listed.stdout.split("\n"):
        if line and Path(line).exists():
            paths.append(Path(line))
    # 3. With several mirrors there are several files, and we would not know which one was meant.
    if len(paths) != 1:
        raise SystemExit(
            f"apt gave {len(paths)} {created_by} files of bookworm/main, expected 1; see --sources"
        )
    return paths[0]


def stanzas(path: Path) -> Iterator[dict[str, str]]:
    """Yield the paragraphs of a Debian control file as {field: value}.

    A paragraph (stanza) describes one package. It ends with an empty line. A line that begins with
    a blank continues the value above it:

        Package: bash
        Description-en: GNU Bourne Again SHell
         Bash is an sh-compatible command language interpreter

    Continuation lines keep their newline.
    """
    fields: dict[str, str] = {}  # of the paragraph that is being read
    key = ""  # the field that a continuation line belongs to
    with open(path, encoding="utf-8") as file:
        for line in file:
            line = line.rstrip("\n")
            if not line:
                # Several empty lines in a row are no empty paragraphs.
                if fields:
                    yield fields
                fields = {}
            elif line[0] in " \t":
                fields[key] += "\n" + line
            else:
                key, _, value = line.partition(":")
                fields[key] = value.strip()
    # The last paragraph may have no empty line behind it.
    if fields:
        yield fields


def dependencies(package: dict[str, str]) -> list[str]:
    """The names in Depends and Pre-Depends, sorted, without versions and architectures.

    Of several alternatives, "a | b", the first counts.

        Depends: libc6 (>= 2.36), python3:any, exim4 | mail-transport-agent
        exim4   libc6   python3
    """
    # Pre-Depends has what must be there even before the package is unpacked.
    depends = package.get("Depends", "")
    pre_depends = package.get("Pre-Depends", "")
    both = depends + "," + pre_depends
    names = set()
    for alternatives in both.split(","):
        first = alternatives.split("|")[0].strip()
        # Without either field, or behind a last comma, nothing is left.
        if first:
            # The name ends where a version (, an architecture : or a condition [ begins.
            name = re.split(r"[\s(:\[]", first)[0]
            names.add(name)
    # A package that names itself says nothing.
    itself = {package["Package"]}
    return sorted(names - itself)


def side(source: str) -> str:
    """The split of a source package: about 80/10/10.

    A hash instead of a random draw: a package stays in its split when others come or go.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()
    tenth = int(digest, 16) % 10
    if tenth == 8:
        return "val"
    if tenth == 9:
        return "test"
    return "train"


# --------------------------------------------------------------------------------------- the corpus


class Package(NamedTuple):
    """What we need of a binary package."""

    source: str  # the source package that it is built from
    short: str  # description of one line
    long: str  # description of several lines
    labels: list[str]  # what it depends on


def build(
    packages: list[dict[str, str]], descriptions: dict[str, str], say=print
) -> dict[str, list[dict]]:
    """{"train" | "val" | "test" | "labels": rows}; `descriptions` by Description-md5.

    Every drop is said.
    """
    # 1. The packages. Where one has several versions, the last in the index stays.
    by_name = {}
    for fields in packages:
        by_name[fields["Package"]] = package_of(fields, descriptions)
    n_dropped = len(packages) - len(by_name)
    say(f"{len(packages)} packages; {n_dropped} second versions dropped")

    # 2. The labels that are worth predicting, and the documents that have one.
    kept = labels_to_keep(by_name, say)
    rows = documents_of(by_name, kept, say)

    # 3. The labels' own texts. Virtual packages, such as mail-transport-agent, are provided by
    #    others and have no text.
    virtual = sum(label not in by_name for label in kept)
    say(f"{virtual} labels are virtual packages or not in the index: their text is their name")
    rows["labels"] = []
    for label in sorted(kept):
        text = label
        if label in by_name and by_name[label].short:
            text = f"{label}: {by_name[label].short}"
        rows["labels"].append({"name": label, "text": text})
    say("; ".join(f"{len(part)} {name}" for name, part in rows.items()))
    return rows


def package_of(fields: dict[str, str], descriptions: dict[str, str]) -> Package:
    """A package from its paragraph in the index."""
    name = fields["Package"]
    # "Source: glibc (2.36-9)", without the version. A package without this field is built from a
    # source package of its own name.
    source = fields.get("Source", name).split(" ")[0]
    # The full description is in the file of translations, and its md5 says which one it is. The
    # index itself may have a short one.
    md5 = fields.get("Description-md5", "")
    in_index = fields.get("Description", "")
    description = descriptions.get(md5, in_index)
    # The first line is the short description, the lines below it are the long one.
    short, _, long = description.partition("\n")
    return Package(
        source=source,
        short=short.strip(),
        long=long,
        labels=dependencies(fields),
    )


def labels_to_keep(by_name: dict[str, Package], say) -> set[str]:
    """The labels, without those that are too frequent, too rare, or never seen in training."""
    # 1. On how many documents is each label, and which source packages do these come from?
    frequency = Counter()
    users = defaultdict(set)  # the source packages that depend on a label
    for package in by_name.values():
        frequency.update(package.labels)
        for label in package.labels:
            users[label].add(package.source)

    # 2. A label on very many documents says little about any of them.
    most = TOO_FREQUENT * len(by_name)
    frequent = {label for label, count in frequency.items() if count > most}
    # 3. All documents of a label with one source package alone would be in the same split.
    rare = {label for label in frequency if len(users[label]) < MIN_SOURCES}
    # 4. Nothing can be learned about a label that no training document has.
    left = set(frequency) - frequent - rare
    unseen = set()
    for label in left:
        splits = {side(source) for source in users[label]}
        if "train" not in splits:
            unseen.add(label)
    # 5. Say what was dropped. The frequent labels are few, so they are named.
    frequent_names = ", ".join(sorted(frequent))
    say(
        f"{len(frequency)} labels; dropped: {len(frequent)} on more than {TOO_FREQUENT:.0%} of the "
        f"documents ({frequent_names}), {len(rare)} used by fewer than {MIN_SOURCES} "
        f"source packages, {len(unseen)} without a training document"
    )
    return left - unseen


def documents_of(by_name: dict[str, Package], kept: set[str], say) -> dict[str, list[dict]]:
    """The documents that have a label, by split."""
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    n_without = 0  # documents without a label that is kept
    n_cut = 0  # texts that are too long

    def by_source(name: str) -> tuple[str, str]:
        return by_name[name].source, name

    # Packages of the same source stand together, which halves the size after gzip. Training
    # shuffles the documents anyway.
    for name in sorted(by_name, key=by_source):
        package = by_name[name]
        # 1. Its labels. Without one a document is of no use.
        labels = [label for label in package.labels if label in kept]
        if not labels:
            n_without += 1
            continue
        # 2. Its text, on one line. In a long description, a line with a full stop alone separates
        #    paragraphs.
        long = package.long.replace("\n .", " ")
        words = f"{name}: {package.short}. {long}".split()
        text = " ".join(words)
        # 3. A text that is too long is cut, and the word that the cut goes through is left out.
        if len(text) > MAX_CHARS:
            text = text[:MAX_CHARS].rsplit(" ", 1)[0]
            n_cut += 1
        # 4. Its split.
        split = side(package.source)
        rows[split].append({"text": text, "labels": labels})
    say(
        f"{n_without} documents with no label left dropped; "
        f"{n_cut} texts cut to {MAX_CHARS} characters"
    )
    return rows


# ---------------------------------------------------------------------------------------- the files


def own_label_pairs(documents: list[dict], labels: list[dict]) -> list[tuple[int, int]]:
    """(line, label id), both from 0, of the documents that are a label themselves."""
    label_id = {label["name"]: i for i, label in enumerate(labels)}
    pairs = []
    for line, document in enumerate(documents):
        # A text begins with the name of its package: "name: short description. ..."
        name, _, _ = document["text"].partition(": ")
        if name in label_id:
            pairs.append((line, label_id[name]))
    return pairs


def write(path: Path, lines: list[str]) -> None:
    """Gzipped lines; the same lines give the same bytes, whenever they are written."""
    text = "".join(line + "\n" for line in lines)
    # gzip notes the time of writing (mtime), which must not make a difference.
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def write_filters(out: Path, rows: dict[str, list[dict]]) -> None:
    """Write the filter files: the label that a document itself is."""
    for split in SPLITS:
        pairs = own_label_pairs(rows[split], rows["labels"])
        lines = [f"{line} {label}" for line, label in pairs]
        write(out / f"filter_labels_{split}.txt.gz", lines)
        print(f"{len(pairs)} of {len(rows[split])} {split} documents are a label themselves")


def read(out: Path) -> dict[str, list[dict]]:
    """What build() gave, from the files that were written then."""
    rows = {}
    for name in (*SPLITS, "labels"):
        with gzip.open(out / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows[name] = [json.loads(line) for line in file]
    return rows


def read_index(sources: str) -> tuple[list[dict[str, str]], dict[str, str]]:
    """(packages, descriptions by Description-md5), fetched into a folder that goes again."""
    with tempfile.TemporaryDirectory() as folder:
        index, translations = fetch_index(Path(folder), sources)
        packages = list(stanzas(index))
        # The index has the md5 of a description, and the translations have its text.
        descriptions = {}
        for fields in stanzas(translations):
            descriptions[fields["Description-md5"]] = fields["Description-en"]
    return packages, descriptions


# ------------------------------------------------------------------------------------- command line


def parse() -> argparse.Namespace:
    """The flags. --help shows the text at the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sources", default="", help="apt source file to use instead of this machine's"
    )
    parser.add_argument(
        "--out", default=str(Path(__file__).parent / "debian"), help="folder to write"
    )
    parser.add_argument(
        "--only-filters",
        action="store_true",
        help="write the filter files alone, from the files in --out; needs no apt",
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    out = Path(args.out)
    # 1. The filter files need nothing but the documents that are there.
    if args.only_filters:
        write_filters(out, read(out))
        return
    # 2. From the package index to documents and labels.
    packages, descriptions = read_index(args.sources)
    out.mkdir(parents=True, exist_ok=True)
    rows = build(packages, descriptions)
    # 3. Write them, and say how large the corpus is.
    for name, part in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in part]
        write(out / f"{name}.jsonl.gz", lines)
    write_filters(out, rows)
    size = sum(path.stat().st_size for path in out.glob("*.gz"))
    print(f"{out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
