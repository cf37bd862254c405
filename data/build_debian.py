"""Build data/debian, the corpus that ships: Debian packages (text) and the packages that they depend on (labels).

    python data/build_debian.py                         with the apt sources of this machine
    python data/build_debian.py --sources FILE          with another apt source file that names a bookworm mirror
    python data/build_debian.py --only-filters          the filter files alone, from the documents that are there

Reads    the package index of Debian bookworm (main, amd64, English descriptions), fetched and verified by apt-get into
         a private folder: the machine's own package lists are not touched, nothing is installed.
Writes   data/debian/{train,val,test}.jsonl.gz   {"text": "name: short. long", "labels": ["name of a dependency", ...]}
         data/debian/labels.jsonl.gz             {"name": "...", "text": "name: short description"}
         data/debian/filter_labels_{train,val,test}.txt.gz   "line id": the label that the document itself is

One document in five is a label, too: other packages depend on it. Its text begins with that label's name and text, and
it is never right, since no package depends on itself. So it is said to be known beforehand, and is no prediction. The
filter files that ship were made with --only-filters, when the other files had been there for a while.

The same index gives the same content byte for byte, before compression. Split by a hash of the source package, so that
the binary packages of one source, whose descriptions are nearly the same, never sit on both sides.
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

TOO_FREQUENT = 0.05  # labels on more than this share of the documents (libc6 and its like) teach nothing
MIN_SOURCES = 2  # a label used by one source package alone would sit in one split alone
MAX_CHARS = 1500  # keeps the corpus at 6 MB; cuts about one document in a hundred, after a word


def fetch_index(folder: Path, sources: str) -> tuple[Path, Path]:
    """Have apt-get fetch the bookworm index into `folder`; the paths of (Packages, Translation-en)."""
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    options = {"Dir::State::Lists": lists, "Dir::Cache": folder, "APT::Architecture": "amd64",
               "APT::Architectures": "amd64", "Acquire::Languages": "en", "Acquire::GzipIndexes": "false",
               "APT::Sandbox::User": "root"}
    if sources:
        options |= {"Dir::Etc::sourcelist": Path(sources).resolve(), "Dir::Etc::sourceparts": "-"}
    apt = ["apt-get"] + [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    # A source that has nothing to do with bookworm may fail; what counts is whether the two files below are there.
    subprocess.run([*apt, "update"], check=False)
    found = []
    for created_by in ("Packages", "Translations"):
        filters = ["Codename: bookworm", "Component: main", "Origin: Debian", f"Created-By: {created_by}"]
        listed = subprocess.run([*apt, "indextargets", "--format", "$(FILENAME)", *filters],
                                check=True, capture_output=True, text=True)
        paths = [Path(line) for line in listed.stdout.split("\n") if line and Path(line).exists()]
        if len(paths) != 1:
            raise SystemExit(f"apt gave {len(paths)} {created_by} files of bookworm/main, expected 1; see --sources")
        found.append(paths[0])
    return found[0], found[1]


def stanzas(path: Path) -> Iterator[dict[str, str]]:
    """The paragraphs of a Debian control file as {field: value}; continuation lines keep their newline."""
    fields: dict[str, str] = {}
    key = ""
    with open(path, encoding="utf-8") as file:
        for line in file:
            line = line.rstrip("\n")
            if not line:
                if fields:
                    yield fields
                fields = {}
            elif line[0] in " \t":
                fields[key] += "\n" + line
            else:
                key, _, value = line.partition(":")
                fields[key] = value.strip()
    if fields:
        yield fields


def dependencies(package: dict[str, str]) -> list[str]:
    """Names in Depends and Pre-Depends: the first of each alternative, without versions and architectures, sorted."""
    both = package.get("Depends", "") + "," + package.get("Pre-Depends", "")
    firsts = (alternatives.split("|")[0].strip() for alternatives in both.split(","))
    return sorted({re.split(r"[\s(:\[]", first)[0] for first in firsts if first} - {package["Package"]})


def side(source: str) -> str:
    """The split of a source package: about 80/10/10."""
    tenth = int(hashlib.sha256(source.encode()).hexdigest(), 16) % 10
    return {8: "val", 9: "test"}.get(tenth, "train")


def build(packages: list[dict[str, str]], descriptions: dict[str, str], say=print) -> dict[str, list[dict]]:
    """{"train" | "val" | "test" | "labels": rows}; `descriptions` by Description-md5. Every drop is said."""
    by_name = {package["Package"]: package for package in packages}  # of several versions the index' last
    source = {name: p.get("Source", name).split(" ")[0] for name, p in by_name.items()}
    parts = {name: descriptions.get(p.get("Description-md5", ""), p.get("Description", "")).partition("\n")
             for name, p in by_name.items()}
    short = {name: part[0].strip() for name, part in parts.items()}
    labels_of = {name: dependencies(p) for name, p in by_name.items()}
    say(f"{len(packages)} packages; {len(packages) - len(by_name)} second versions dropped")

    frequency = Counter(label for labels in labels_of.values() for label in labels)
    users, training = defaultdict(set), set()
    for name, labels in labels_of.items():
        for label in labels:
            users[label].add(source[name])
            if side(source[name]) == "train":
                training.add(label)
    frequent = {label for label, n in frequency.items() if n > TOO_FREQUENT * len(by_name)}
    rare = {label for label in frequency if len(users[label]) < MIN_SOURCES}
    unseen = set(frequency) - training - frequent - rare
    kept = set(frequency) - frequent - rare - unseen
    say(f"{len(frequency)} labels; dropped: {len(frequent)} on more than {TOO_FREQUENT:.0%} of the documents "
        f"({', '.join(sorted(frequent))}), {len(rare)} used by fewer than {MIN_SOURCES} source packages, "
        f"{len(unseen)} without a training document")

    rows: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    without = cut = 0
    # Sorted by source: siblings stand together, which halves what gzip makes of them. Training shuffles.
    for name in sorted(by_name, key=lambda name: (source[name], name)):
        labels = [label for label in labels_of[name] if label in kept]
        text = " ".join(f"{name}: {short[name]}. {parts[name][2].replace(chr(10) + ' .', ' ')}".split())
        if not labels:
            without += 1
            continue
        if len(text) > MAX_CHARS:
            text, cut = text[:MAX_CHARS].rsplit(" ", 1)[0], cut + 1
        rows[side(source[name])].append({"text": text, "labels": labels})
    say(f"{without} documents with no label left dropped; {cut} texts cut to {MAX_CHARS} characters")
    virtual = sum(label not in by_name for label in kept)
    say(f"{virtual} labels are virtual packages or not in the index: their text is their name")
    rows["labels"] = [{"name": label, "text": f"{label}: {short[label]}" if short.get(label) else label}
                      for label in sorted(kept)]
    say("; ".join(f"{len(part)} {name}" for name, part in rows.items()))
    return rows


def own_label_pairs(documents: list[dict], labels: list[dict]) -> list[tuple[int, int]]:
    """(line of a document, id of the label that it is itself), both from 0, for the documents that are a label."""
    label_id = {label["name"]: i for i, label in enumerate(labels)}
    pairs = []
    for line, document in enumerate(documents):
        name, _, _ = document["text"].partition(": ")
        if name in label_id:
            pairs.append((line, label_id[name]))
    return pairs


def write(path: Path, lines: list[str]) -> None:
    """Gzipped lines; the same lines give the same bytes, whenever they are written."""
    text = "".join(line + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def write_filters(out: Path, rows: dict[str, list[dict]]) -> None:
    for split in ("train", "val", "test"):
        pairs = own_label_pairs(rows[split], rows["labels"])
        write(out / f"filter_labels_{split}.txt.gz", [f"{line} {label}" for line, label in pairs])
        print(f"{len(pairs)} of {len(rows[split])} {split} documents are a label themselves")


def read(out: Path) -> dict[str, list[dict]]:
    """What build() gave, from the files that were written then."""
    rows = {}
    for name in ("train", "val", "test", "labels"):
        with gzip.open(out / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows[name] = [json.loads(line) for line in file]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", default="", help="apt source file to use instead of this machine's")
    parser.add_argument("--out", default=str(Path(__file__).parent / "debian"), help="folder to write")
    parser.add_argument("--only-filters", action="store_true",
                        help="write the filter files alone, from the other files in --out; needs no apt")
    args = parser.parse_args()
    out = Path(args.out)
    if args.only_filters:
        write_filters(out, read(out))
        return
    with tempfile.TemporaryDirectory() as folder:
        index, translations = fetch_index(Path(folder), args.sources)
        packages = list(stanzas(index))
        descriptions = {t["Description-md5"]: t["Description-en"] for t in stanzas(translations)}
    out.mkdir(parents=True, exist_ok=True)
    rows = build(packages, descriptions)
    for name, part in rows.items():
        write(out / f"{name}.jsonl.gz", [json.dumps(row, ensure_ascii=False) for row in part])
    write_filters(out, rows)
    size = sum(path.stat().st_size for path in out.glob("*.gz"))
    print(f"{out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
