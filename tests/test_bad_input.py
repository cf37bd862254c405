"""What people feed in, and what they get: an error that says where and how to mend it, or a count
of what was changed.

A case is (what is wrong, what makes it so, what is said). First come corpora, then flags.
"""

import gzip
import json
import shutil

import numpy as np
import pytest
from conftest import ROOT, SMALL, has_exact, make_corpus, stages, write_jsonl

from data import formats
from plumbing.cli import main
from plumbing.errors import UserError
from plumbing.store import load_npz

GOOD = [{"text": f"word{i} word{i % 3}", "labels": [f"label-{i % 5}"]} for i in range(12)]
LABELS = [{"name": f"label-{i}", "text": f"what {i} means"} for i in range(5)]


def corpus_of(folder, **files):
    """A corpus whose files are rows, or bytes as they stand; None leaves a file out."""
    folder.mkdir()
    files = {"train": GOOD, "val": GOOD[:3], "test": GOOD[:4], "labels": LABELS} | files
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(content))
        elif content is not None:
            write_jsonl(folder / f"{name}.jsonl.gz", content)
    return folder


def line(text="a", labels=("label-0",)) -> bytes:
    return json.dumps({"text": text, "labels": list(labels)}).encode() + b"\n"


def stage_1(folder, **files) -> None:
    corpus = corpus_of(folder / "corpus", **files)
    stages.data.run(stages.data.Config(run=str(folder / "run"), corpus=str(corpus), vocab=100))


REFUSED = [
    ("no training file", {"train": None}, "looks like JSON lines, but has no train split"),
    (
        "nothing at all",
        {"train": None, "val": None, "test": None, "labels": None},
        "no corpus is recognised, found nothing",
    ),
    ("empty training file", {"train": b""}, "no documents are left in the split 'train'"),
    ("empty test file", {"test": b""}, "no documents are left in the split 'test'"),
    ("empty validation file", {"val": b""}, "no documents are left in the split 'val'"),
    ("empty label file", {"labels": b""}, "the file of the labels has none, expected at least one"),
    (
        "a single document, to be split in two",
        {"train": GOOD[:1], "val": None},
        "no documents are left in the split 't",
    ),
    (
        "no training document has a label",
        {"train": [{"text": "a", "labels": []}]},
        "no documents are left in the split",
    ),
    (
        "no training document has a text",
        {"train": [{"text": " \t", "labels": ["label-0"]}]},
        "no documents are left in",
    ),
    (
        "invalid UTF-8",
        {"train": line() + b'{"text": "\xff\xfe", "labels": []}\n'},
        "train.jsonl.gz line 2: no UTF-8 ('utf-8' codec",
    ),
    (
        "a NUL byte",
        {"train": line() + b'{"text": "a\x00", "labels": []}\n'},
        "line 2: a NUL byte, so this is no UTF-8",
    ),
    (
        "UTF-16",
        {"test": '{"text": "a", "labels": []}'.encode("utf-16")},
        "test.jsonl.gz line 1: a NUL byte, so this is no UTF-8",
    ),
    ("no JSON", {"train": line() + b"text,labels\n"}, "line 2: no JSON (Expecting value"),
    ("a blank line", {"train": line() + b"\n" + line()}, "line 2: no JSON (Expecting value"),
    ("a line cut short", {"train": line() + line()[:-9]}, "line 2: no JSON ("),
    (
        "nested 100,000 deep",
        {"train": b"[" * 100000 + b"]" * 100000},
        "line 1: no JSON (maximum recursion",
    ),
    (
        "a number of 5,000 digits",
        {"train": b'{"text": "a", "labels": [' + b"9" * 5000 + b"]}"},
        "line 1: no JSON (Exceeds the limit",
    ),
    (
        "a list instead of an object",
        {"train": b'["a"]\n'},
        'line 1: expected an object with text, labels: \'["a"]',
    ),
    (
        "a string instead of an object",
        {"train": b'"text"\n'},
        "line 1: expected an object with text, labels",
    ),
    (
        "no text",
        {"test": b'{"labels": []}\n'},
        "test.jsonl.gz line 1: expected an object with text, labels",
    ),
    (
        "a text that is a number",
        {"train": line(7)},
        "line 1: text must be a string and labels a list of names",
    ),
    ("a text that is null", {"train": line(None)}, "line 1: text must be a string"),
    (
        "labels in a string",
        {"train": b'{"text": "a", "labels": "label-0"}'},
        "labels a list of names, found 'a' and 'label-0'",
    ),
    (
        "a label that is nowhere",
        {"train": line("a", ["nobody"])},
        "line 1: label 'nobody' is not among the 5 labels; add it",
    ),
    (
        "a label number out of range",
        {"train": line("a", [99])},
        "line 1: text must be a string and labels a list of names, found",
    ),
    (
        "a list as a label",
        {"train": line("a", [["label-0"]])},
        "line 1: text must be a string and labels a list of names, found",
    ),
    (
        "a label named twice",
        {"labels": [*LABELS, LABELS[2]]},
        "labels named more than once: 'label-2'",
    ),
    (
        "a label name that is a number",
        {"labels": [{"name": 3, "text": ""}]},
        "labels.jsonl.gz line 1: name and text must be strings",
    ),
    (
        "half a character in a name",
        {"labels": [{"name": "\ud800", "text": ""}]},
        "line 1: name and text must be strings of",
    ),
]


@pytest.mark.parametrize(
    ("files", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_corpora_that_are_refused(tmp_path, files, said):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.npz").write_bytes(b"what was there before")
    with pytest.raises(UserError) as error:
        stage_1(tmp_path, **files)
    assert said in str(error.value)
    assert (tmp_path / "run" / "data.npz").read_bytes() == b"what was there before"
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_files_that_are_no_gzip_or_end_early(tmp_path):
    folder = corpus_of(tmp_path / "corpus")
    whole = (folder / "train.jsonl.gz").read_bytes()
    for content, said in (
        (b"{}", "train.jsonl.gz cannot be read after line 0: Not a gzipped"),
        (whole[:-20], r"train.jsonl.gz cannot be read after line \d+: Compressed file ended"),
        (whole[:60] + b"\x00\x01" + whole[62:], "train.jsonl.gz"),
    ):
        (folder / "train.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match=said):
            stages.data.run(stages.data.Config(run=str(tmp_path / "run"), corpus=str(folder)))
    with pytest.raises(UserError, match="nowhere: no corpus is recognised, found no such folder"):
        stages.data.run(
            stages.data.Config(run=str(tmp_path / "run"), corpus=str(tmp_path / "nowhere"))
        )


COUNTED = [
    ("a byte order mark", {"train": b"\xef\xbb\xbf" + line() * 3}, "train 3 documents"),
    ("lines that end in CR LF", {"train": line().replace(b"\n", b"\r\n") * 3}, "train 3 documents"),
    ("no newline at the end", {"train": line() * 3 + line()[:-1]}, "train 4 documents"),
    (
        "an escaped NUL",
        {"train": [*GOOD, {"text": "a\u0000b", "labels": ["label-0"]}]},
        "train 13 documents",
    ),
    (
        "a document without text to train on",
        {"train": [*GOOD, {"text": "", "labels": ["label-0"]}]},
        "note: 1 training documents without text, left out",
    ),
    (
        "only blanks to train on",
        {"train": [*GOOD, {"text": " \n\t\u3000", "labels": ["label-0"]}]},
        "note: 1 training documents without text, left out",
    ),
    (
        "a document without labels to train on",
        {"train": [*GOOD, {"text": "a", "labels": []}]},
        "note: 1 training documents without labels, left out",
    ),
    (
        "a document without text to test on",
        {"test": [*GOOD, {"text": "", "labels": []}]},
        "note: 1 test documents without text, kept",
    ),
    (
        "a label twice in a row",
        {"train": [*GOOD, {"text": "a", "labels": ["label-0", "label-0"]}]},
        "note: 1 labels named twice in one document, taken once",
    ),
    (
        "half a character in a text",
        {"train": [*GOOD, {"text": "a \ud800 b", "labels": ["label-0"]}]},
        "note: 1 texts with half a character, replaced by a question mark",
    ),
    (
        "a document of 2 MB",
        {"train": [*GOOD, {"text": "long words " * 180000, "labels": ["label-0"]}]},
        "note: 1 train texts cut to 512 tokens",
    ),
    (
        "test documents that are training documents",
        {"test": [{"text": "unheard of", "labels": []}, *GOOD[:2]]},
        "leakage: 2 test documents have the tokens of a training document",
    ),
    (
        "labels that no training document has",
        {"labels": [*LABELS, {"name": "never", "text": ""}]},
        "unseen, 0: 1",
    ),
]


@pytest.mark.parametrize(
    ("files", "said"), [case[1:] for case in COUNTED], ids=[case[0] for case in COUNTED]
)
def test_corpora_that_are_read_and_what_is_counted(tmp_path, capsys, files, said):
    stage_1(tmp_path, **files)
    assert said in " ".join(capsys.readouterr().out.split())
    stages.data.load(tmp_path / "run")


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST", 1 << 20)
    with pytest.raises(UserError, match="train.jsonl.gz line 2: longer than 1 MiB"):
        stage_1(tmp_path, train=line() + b'{"text": "' + b"a" * 2**21)


EXTREME = [
    ("one label", {"labels": LABELS[:1], "train": GOOD[::5], "val": GOOD[:1], "test": GOOD[:1]}),
    ("one document each", {"train": GOOD[:1], "val": GOOD[:1], "test": GOOD[:1]}),
    (
        "all documents with the same label",
        {"train": [row | {"labels": ["label-2"]} for row in GOOD]},
    ),
    (
        "every label in every document",
        {"train": [row | {"labels": [r["name"] for r in LABELS]} for row in GOOD]},
    ),
    ("test documents without labels", {"test": [{"text": "a", "labels": []}] * 3}),
    ("no text in the test split", {"test": [{"text": "", "labels": ["label-0"]}] * 3}),
    ("labels without a document", {"train": [row for row in GOOD if row["labels"] != ["label-4"]]}),
]


@pytest.mark.parametrize("files", [case[1] for case in EXTREME], ids=[case[0] for case in EXTREME])
def test_extreme_corpora_go_through_all_stages(tmp_path, files):
    stage_1(tmp_path, **files)
    run = str(tmp_path / "run")
    stages.tree.run(stages.tree.Config(run=run))
    stages.train.run(
        stages.train.Config(run=run, **SMALL | {"topk": None, "tiny": "1,16", "epochs": 1})
    )
    stages.eval.run(stages.eval.Config(run=run, show=2, exact=has_exact(run)))
    found, _ = load_npz(tmp_path / "run" / "predictions.npz")
    n_labels = len(files.get("labels", LABELS))
    assert ((found["labels"] >= 0).sum(axis=1) == n_labels).all() and np.isfinite(
        found["scores"]
    ).all()


def test_more_positives_than_a_shortlist_holds(tmp_path, capsys):
    corpus = make_corpus(tmp_path / "corpus", n_documents=40)
    run = str(tmp_path)
    stages.data.run(stages.data.Config(run=run, corpus=str(corpus), vocab=400))
    stages.tree.run(stages.tree.Config(run=run, levels="8"))
    stages.train.run(stages.train.Config(run=run, **SMALL | {"topk": "1", "epochs": 1}))
    assert "positive nodes beyond k)" in capsys.readouterr().out


FLAGS = [
    ("01_data", ["--limit", "-1"], "-1 is less than 0"),
    ("01_data", ["--seed", "-1"], "-1 is less than 0"),
    ("01_data", ["--max-tokens", "0"], "0 is less than 1"),
    ("01_data", ["--limit", "many"], "invalid natural value: 'many'"),
    ("02_label_tree", ["--features", "-5"], "-5 is less than 0"),
    ("02_label_tree", ["--smoothing", "nan"], "--smoothing nan: expected a number of at least 0"),
    ("02_label_tree", ["--levels", "3"], "--levels [3]: expected rising powers of two"),
    ("02_label_tree", ["--levels", "8,4"], "--levels [8, 4]: expected rising powers of two"),
    ("02_label_tree", ["--levels", "64"], "64 clusters > 40 labels; lower the last level"),
    ("02_label_tree", ["--levels", "few"], "--levels 'few': expected some whole numbers"),
    ("03_model", ["--topk", "0"], "--topk [0]: levels [8] have at most [8] candidates"),
    ("03_model", ["--join", "both"], "--join both: expected map or none"),
    (
        "03_model",
        ["--dropout", "0.2,0.3,0.4"],
        "--dropout 0.2,0.3,0.4: expected one number from 0 to 1",
    ),
    ("03_model", ["--dropout", "1"], "--dropout 1: expected one number from 0 to 1"),
    ("03_model", ["--topk", "9"], "--topk [9]: levels [8] have at most [8] candidates"),
    (
        "03_model",
        ["--layers", "1,9"],
        "--layers [[1], [9]]: expected 2 groups of hidden states between 0 and 1",
    ),
    ("03_model", ["--pooling", "max"], "--pooling max: expected 'first' or 'mean'"),
    ("03_model", ["--max-len", "9999"], "--max-len 9999 > 512 positions of the encoder; lower it"),
    (
        "03_model",
        ["--max-len", "2"],
        "--max-len 2 leaves no room beside the special tokens; raise it",
    ),
    ("03_model", ["--tiny", "1"], "--tiny '1': expected 2 whole numbers"),
    ("04_train", ["--epochs", "-1"], "-1 is less than 0"),
    (
        "04_train",
        ["--epochs", "0"],
        "--head-epochs 0 --epochs 0: nothing to train; raise one of them",
    ),
    ("04_train", ["--lr", "nan"], "nan is no number above 0"),
    ("04_train", ["--lr-encoder", "0"], "0 is no number above 0"),
    ("04_train", ["--amp", "fp8"], "--amp fp8: expected bf16, fp16, off or auto"),
    ("04_train", ["--sed", "1"], "unrecognized arguments: --sed 1"),
    ("05_eval", ["--k", "-1"], "-1 is less than 1"),
    ("05_eval", ["--split", "all"], "--split all: expected test, val or train"),
    ("05_eval", ["--propensity", "0.5"], "--propensity 0.5: expected two numbers"),
]


@pytest.mark.parametrize(
    ("stage", "flags", "said"), FLAGS, ids=[" ".join(case[1]) for case in FLAGS]
)
def test_flags_that_make_no_sense(monkeypatch, capsys, prepared, done, stage, flags, said):
    """As on the command line: exit code 2, one line that says it, no traceback."""
    module = {
        "01_data": stages.data,
        "02_label_tree": stages.tree,
        "03_model": stages.model,
        "04_train": stages.train,
        "05_eval": stages.eval,
    }[stage]
    for name in ("model.pt", "checkpoint.pt"):
        shutil.copy(done / name, prepared)
    before = {path.name: path.read_bytes() for path in prepared.iterdir()}
    monkeypatch.setattr("sys.argv", [f"{stage}.py", "--run", str(prepared), *flags])
    with pytest.raises(SystemExit) as stopped:
        main(module.run, module.Config, module.__doc__)
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in prepared.iterdir()} == before


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("{}/data.npz", "Not a directory|File exists|exists"),
        ("a\0b", "null byte"),
        ("/proc/nowhere", "No such file|not permitted|denied"),
    ],
)
def test_run_folders_that_cannot_be(prepared, run, said):
    with pytest.raises(
        UserError, match=f"cannot be written to .*({said}).*; choose another folder"
    ):
        stages.data.run(
            stages.data.Config(run=run.format(prepared), corpus=str(ROOT / "data" / "debian"))
        )


def test_an_encoder_that_is_not_there_or_of_another_vocabulary(tmp_path, corpus):
    import transformers

    with pytest.raises(UserError, match="--encoder .*nowhere: no such folder"):
        stages.data.run(
            stages.data.Config(
                run=str(tmp_path), corpus=str(corpus), encoder=str(tmp_path / "nowhere")
            )
        )
    encoder, run = tmp_path / "encoder", str(tmp_path / "run")
    texts = [row.text for row in formats.open_corpus(corpus).documents["train"]()]
    stages.data.train_tokenizer(lambda: texts, 300).save_pretrained(encoder)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    transformers.BertModel(transformers.BertConfig(vocab_size=100, **shape)).save_pretrained(
        encoder
    )
    with pytest.raises(UserError, match=r"knows 100 tokens, its tokeniser has \d+: they do not"):
        stages.data.run(stages.data.Config(run=run, corpus=str(corpus), encoder=str(encoder)))
