"""data/derive.py: what it makes is read again and compared with what was asked for; what it
refuses, and how.
"""

import json
import random
import subprocess
import sys

import pytest
import test_formats
from conftest import ROOT, sha256, stages, write_jsonl

from data import derive, formats
from plumbing.errors import UserError

SIZES = {"train": 7, "val": 3, "test": 8}


def made(*words) -> None:
    derive.run(derive.parse([str(word) for word in words]))


def content(folder) -> dict[str, list[tuple[str, list[str]]]]:
    """(text, names of labels) of the documents, by split."""
    corpus = formats.open_corpus(folder)
    found = {}
    for split, read in corpus.documents.items():
        rows = [(document.text, document.labels) for document in read()]
        if not corpus.by_name:
            rows = [(text, [corpus.labels[label][0] for label in labels]) for text, labels in rows]
        found[split] = rows
    return found


def pairs(path) -> list[list[int]]:
    return [[int(word) for word in line.split()] for _, line in formats.lines(path)]


LAYOUTS = test_formats.LAYOUTS | test_formats.NAMELESS


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_a_sample_of_every_layout_has_the_documents_drawn_in_the_order_drawn(tmp_path, make):
    source = tmp_path / "source"
    source.mkdir()
    make(source)
    made(
        "sample",
        "--source",
        source,
        "--out",
        tmp_path / "out",
        "--train",
        7,
        "--val",
        3,
        "--test",
        8,
        "--seed",
        5,
    )
    before, after = content(source), content(tmp_path / "out")
    assert list(after) == ["train", "val", "test"]
    for split, size in SIZES.items():
        drawn = random.Random(5).sample(range(len(before[split])), size)
        assert after[split] == [before[split][line] for line in drawn]
    names = [name for name, _ in formats.open_corpus(tmp_path / "out").labels]
    assert names == test_formats.NAMES  # all of them, and in their order: ids stay what they were


def test_filter_pairs_go_along_with_their_documents(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    test_formats.text_pairs(source)
    test_formats.write(source / "filter_labels_test.txt", ["0 1", "0 4", "2 8", "5 0", "7 3"])
    test_formats.write(source / "filter_labels_dev.txt", ["1 1"], zipped=True)
    made(
        "sample",
        "--source",
        source,
        "--out",
        tmp_path / "out",
        "--train",
        7,
        "--val",
        6,
        "--test",
        4,
    )
    drawn = random.Random(0).sample(range(8), 4)
    known = {0: [1, 4], 2: [8], 5: [0], 7: [3]}
    expected = [[new, label] for new, old in enumerate(drawn) for label in known.get(old, [])]
    assert pairs(tmp_path / "out" / "filter_labels_test.txt.gz") == expected and len(expected) > 1
    assert pairs(tmp_path / "out" / "filter_labels_val.txt.gz") == [
        [random.Random(0).sample(range(6), 6).index(1), 1]
    ]
    assert not (tmp_path / "out" / "filter_labels_train.txt.gz").exists()


def test_labels_whose_names_repeat_are_told_apart_by_their_ids(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    test_formats.text_pairs(source)
    names = ["bank", "river", "bank", "money"] + [f"label {i}" for i in range(5)]
    test_formats.write(source / "label_texts.txt", names)
    made(
        "sample",
        "--source",
        source,
        "--out",
        tmp_path / "out",
        "--train",
        30,
        "--val",
        0,
        "--test",
        8,
    )
    before, after = formats.open_corpus(source), formats.open_corpus(tmp_path / "out")
    assert after.labels == before.labels and "val" not in after.documents
    for split, n in (("train", 30), ("test", 8)):
        rows = [document.labels for document in before.documents[split]()]
        drawn = random.Random(0).sample(range(n), n)
        assert [document.labels for document in after.documents[split]()] == [
            rows[line] for line in drawn
        ]
    stages.data.run(
        stages.data.Config(run=str(tmp_path / "run"), corpus=str(tmp_path / "out"), vocab=150)
    )
    assert stages.data.load(tmp_path / "run").names == names


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--train", 7, "--val", 3, "--test", 2],
        ["eurlex-titles"],
        ["debian-short"],
    ],
    ids=lambda words: words[0],
)
def test_the_same_command_gives_the_same_bytes(tmp_path, command):
    source = tmp_path / "source"
    source.mkdir()
    make = test_formats.eurlex if command[0] == "eurlex-titles" else test_formats.json_lines
    make(source)
    for out in ("first", "second"):
        made(*command, "--source", source, "--out", tmp_path / out)
    first, second = (
        {path.name: sha256(path) for path in (tmp_path / out).iterdir()}
        for out in ("first", "second")
    )
    assert first == second and len(first) == 4


def write_eurlex(folder, split, name, celex_id, title, concepts) -> None:
    (folder / split).mkdir(parents=True, exist_ok=True)
    row = {
        "celex_id": celex_id,
        "uri": "",
        "type": "Decision",
        "title": title,
        "header": "the header",
        "recitals": "some",
        "main_body": ["one", "two"],
        "attachments": "none",
        "concepts": concepts,
    }
    (folder / split / f"{name}.json").write_text(json.dumps(row), encoding="utf-8")


def test_eurlex_titles_are_sorted_by_celex_id_and_have_nothing_but_the_title(tmp_path):
    source = tmp_path / "eurlex57k"
    write_eurlex(source, "train", "1", "32003R0002", "Regulation  on\n fruit", ["1309", "20"])
    write_eurlex(source, "train", "2", "31990D0001(01)", "Décision", ["100"])
    write_eurlex(source, "train", "3", "31990D0001", "Decision", ["20"])
    write_eurlex(source, "dev", "4", "31970L0003", "Directive", ["c_9"])
    write_eurlex(source, "test", "5", "31999R0004", "", ["100", "20"])
    concepts = {
        concept: {"label": f"what {concept} is"} for concept in ("1309", "20", "100", "c_9", "7")
    }
    (source / "EURLEX57K.json").write_text(json.dumps(concepts))
    made("eurlex-titles", "--source", source, "--out", tmp_path / "out")
    assert content(tmp_path / "out") == {
        "train": [
            ("Decision", ["20"]),
            ("Décision", ["100"]),
            ("Regulation on fruit", ["1309", "20"]),
        ],
        "val": [("Directive", ["c_9"])],
        "test": [("", ["100", "20"])],
    }
    labels = formats.open_corpus(tmp_path / "out").labels
    assert labels == [(name, f"what {name} is") for name in ("20", "100", "1309", "c_9")]
    assert labels == formats.open_corpus(source).labels


SHORT = {
    "what is no label ends at the first full stop": (
        "x: reads files. It does. More.",
        "x: reads files.",
    ),
    "a full stop within a word ends nothing": (
        "x: needs Python 3.11 or so. Long.",
        "x: needs Python 3.11 or so.",
    ),
    "a label's own text says where it ends": (
        "lib: an OS (e.g. Linux). Long.",
        "lib: an OS (e.g. Linux).",
    ),
    "blanks in a label's text are single ones": ("two: some blanks. Long.", "two: some blanks."),
    "there may be no long description": ("x: reads files.", "x: reads files."),
    "a label that only has a name": (
        "virtual: not in the index. Long.",
        "virtual: not in the index.",
    ),
    "a full stop of the short description stays": ("x: reads files.. Long.", "x: reads files.."),
    "a text that was cut has no full stop": ("x: reads", "x: reads."),
}


@pytest.mark.parametrize(("text", "expected"), SHORT.values(), ids=SHORT)
def test_the_first_sentence_of_a_package(text, expected):
    labels = {"lib": "lib: an OS (e.g. Linux)", "two": "two: some  blanks", "virtual": "virtual"}
    assert derive.first_sentence(text, labels) == expected


def test_debian_short_changes_nothing_but_the_texts(tmp_path):
    source, out = ROOT / "data" / "debian", tmp_path / "out"
    made("debian-short", "--source", source, "--out", out)
    before, after = content(source), content(out)
    for split, rows in before.items():
        assert [labels for _, labels in after[split]] == [labels for _, labels in rows]
        for (short, _), (text, _) in zip(after[split], rows, strict=True):
            assert short == text or text.startswith(short + " ")
    for path in source.glob("*.gz"):
        if path.name.startswith(("labels", "filter")):
            assert sha256(out / path.name) == sha256(path)
    # A document that is a label has that label's text, with a full stop.
    texts = {" ".join(text.split()) + "." for _, text in formats.open_corpus(source).labels}
    assert sum(text in texts for text, _ in after["test"]) == 934


REFUSED = [
    (
        ["sample", "--source", "{}/nowhere"],
        "--source .*/nowhere: no such folder; name the folder of a corpus",
    ),
    (["sample", "--source", "{}/empty"], "no corpus is recognised, found nothing"),
    (
        ["sample", "--source", "{}/source", "--train", "31"],
        "--train 31: .*/source has 30 train documents; ask for at most so many",
    ),
    (
        ["sample", "--source", "{}/source", "--train", "1", "--val", "7"],
        "--val 7: .* has 6 val documents",
    ),
    (
        ["sample", "--source", "{}/noval", "--train", "1"],
        "--val 1000: .* has no val split; give --val 0",
    ),
    (
        ["eurlex-titles", "--source", "{}/source"],
        "source looks like JSON lines; expected EURLEX57K as its authors",
    ),
    (["debian-short", "--source", "{}/noval"], "noval is not as data/build_debian.py writes it"),
]


@pytest.mark.parametrize(("command", "said"), REFUSED, ids=[case[1] for case in REFUSED])
def test_bad_input_is_refused_before_anything_is_written(tmp_path, command, said):
    for name in ("source", "noval", "empty"):
        (tmp_path / name).mkdir()
    test_formats.json_lines(tmp_path / "source")
    test_formats.text_pairs(tmp_path / "noval")
    for word in ("texts", "labels"):
        (tmp_path / "noval" / f"dev_{word}.txt").unlink()
    with pytest.raises(UserError, match=said):
        made(*(word.format(tmp_path) for word in command), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_id_that_is_no_label_is_named(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    test_formats.lf(source, zipped=False)
    test_formats.spoil(
        source / "tst.json", lambda text: text.replace('_ind": [', '_ind": [99, ', 1)
    )
    with pytest.raises(UserError, match="tst.json line 1: label 99 is not among the 9 labels"):
        made(
            "sample",
            "--source",
            source,
            "--out",
            tmp_path / "out",
            "--train",
            9,
            "--val",
            1,
            "--test",
            8,
        )


def test_nothing_that_is_there_is_overwritten(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    test_formats.json_lines(source)
    command = ["sample", "--source", source, "--train", 7, "--val", 3, "--test", 2, "--out"]
    (out / "notes.txt").write_text("mine")
    for place, said in (
        (out, "out is not empty, and nothing is overwritten; name another folder"),
        (source, "source is not empty"),
        (out / "notes.txt", "notes.txt is a file"),
    ):
        with pytest.raises(UserError, match=said):
            made(*command, place)
    assert [path.name for path in out.iterdir()] == ["notes.txt"] and len(
        list(source.iterdir())
    ) == 4
    (out / "notes.txt").unlink()
    made(*command, out)  # a folder that is empty is no loss


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    test_formats.json_lines(tmp_path / "source")
    write = derive.write

    def fails_at_last(path, lines):
        write(path, lines)
        if path.name.startswith("labels"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(derive, "write", fails_at_last)
    with pytest.raises(UserError, match="out cannot be written .*No space left.*; make room"):
        made("debian-short", "--source", tmp_path / "source", "--out", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_command_line_from_any_folder(tmp_path):
    rows = [{"text": f"text {i}\nof two lines", "labels": ["a"]} for i in range(9)]
    (tmp_path / "source").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "source" / f"{split}.jsonl.gz", rows)
    command = [
        sys.executable,
        str(ROOT / "data" / "derive.py"),
        "sample",
        "--source",
        "source",
        "--out",
        "out",
        "--train",
        "9",
        "--val",
        "0",
    ]
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 2 and not failed.stdout
    assert failed.stderr == (
        "derive.py: error: --test 1000: source has 9 test documents; ask for at most so many\n"
    )
    done = subprocess.run([*command, "--test", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "train         9 documents   5.0 words each" in done.stdout
        and "out: 1 labels" in done.stdout
    )
