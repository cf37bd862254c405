"""Stage 1 and the artifacts: batches against a loop, errors with their line, the same bytes from
the same seed.
"""

import errno
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import transformers
from conftest import ROOT, make_corpus, sha256, stages, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from data import build_debian
from plumbing.cli import parse
from plumbing.errors import UserError
from plumbing.store import load_pt, save_npz, save_pt

data = stages.data


def split_of(documents, labels):
    offsets, label_offsets = (
        np.cumsum([0] + [len(row) for row in rows]) for rows in (documents, labels)
    )
    flat = [np.array([x for row in rows for x in row], np.int32) for rows in (documents, labels)]
    return data.Split(flat[0], offsets, flat[1], label_offsets)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(5, 99), max_size=9), min_size=1, max_size=6),
    prefix=st.lists(st.integers(1, 2), max_size=2),
    suffix=st.lists(st.integers(3, 4), max_size=2),
    max_len=st.integers(5, 12),
    seed=st.integers(0, 99),
)
def test_batch_equals_a_loop_over_documents(documents, prefix, suffix, max_len, seed):
    rng = np.random.default_rng(seed)
    labels = [sorted(rng.choice(20, rng.integers(0, 4), replace=False).tolist()) for _ in documents]
    meta = {"prefix": prefix, "suffix": suffix, "pad": 0}
    rows = rng.permutation(len(documents))
    batch = data.Data({"train": split_of(documents, labels)}, [], meta).batch(
        "train", rows, max_len
    )
    room = max_len - len(prefix) - len(suffix)
    # Where there is no token at all, the encoder looks at one of padding.
    expected = [prefix + documents[i][:room] + suffix or [0] for i in rows]
    width = max(len(row) for row in expected)
    assert batch.ids_BT.tolist() == [row + [0] * (width - len(row)) for row in expected]
    assert batch.mask_BT.tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in expected]
    pairs = [(b, label) for b, i in enumerate(rows) for label in labels[i]]
    assert list(zip(batch.doc_P.tolist(), batch.label_P.tolist(), strict=True)) == pairs


def test_ids_are_those_of_the_tokeniser_with_its_special_tokens(done, corpus):
    loaded = data.load(done)
    tokenizer = Tokenizer.from_buffer(loaded.tokenizer)
    texts = [row.text for row in data.formats.open_corpus(corpus).documents["test"]()][:5]
    batch = loaded.batch("test", np.arange(5), 64)
    for row, mask, text in zip(batch.ids_BT, batch.mask_BT, texts, strict=True):
        words = [tokenizer.id_to_token(token) for token in row[mask.bool()].tolist()]
        assert words[0] == "[CLS]" and words[-1] == "[SEP]"
        assert "".join(words[1:-1]).replace("##", "") == text.replace(" ", "")


def test_the_same_corpus_gives_the_same_bytes(tmp_path, corpus, done):
    data.run(data.Config(run=str(tmp_path), corpus=str(corpus), vocab=400))
    assert sha256(tmp_path / "data.npz") == sha256(done / "data.npz")


def tokens(texts, of, vocab=300):
    """The pieces of each of the texts `of`, by the tokeniser that is trained on `texts`."""
    tokenizer = data.train_tokenizer(lambda: texts, vocab)
    return [tokenizer.tokenize(text) for text in of]


# Pairs of words that differ in marks alone, with different meanings.
MARKS = {
    "French": ("pêcheur", "pecheur"),
    "Spanish": ("año", "ano"),
    "Swedish": ("får", "far"),
    "Polish": ("łaska", "laska"),
    "Turkish": ("ölü", "olu"),
    "Vietnamese": ("đường", "duong"),
    "Greek": ("νόμος", "νομός"),
    "Russian": ("мой", "мои"),
    "Hebrew": ("שָׁלוֹם", "שלום"),
    "Arabic": ("كَتَبَ", "كُتُب"),
    "Hindi": ("कुल", "कूल"),
    "Bengali": ("বাঁধ", "বাধ"),
    "Tamil": ("கல்", "கல"),
    "Thai": ("ไม้", "ไม่"),
    "Japanese": ("ガラス", "カラス"),
}


@pytest.mark.parametrize("pair", MARKS.values(), ids=MARKS)
def test_words_that_differ_in_marks_have_different_tokens(pair):
    first, second = tokens(pair, pair)
    assert first != second and "[UNK]" not in first + second


@pytest.mark.parametrize("word", ["Café", "Đường", "がっこう", "한국어", "क़लम", "Ångström", "ή"])
def test_a_word_has_the_same_tokens_composed_and_decomposed(word):
    forms = [unicodedata.normalize(form, word) for form in ("NFC", "NFD")]
    assert forms[0] != forms[1] or word == "क़लम"  # which has no composed form
    for training in forms:
        composed, decomposed = tokens([training], forms)
        assert composed == decomposed and "[UNK]" not in composed


CASES = [("ÄRGER", "ärger"), ("ЁЖИК", "ёжик"), ("ΝΌΜΟΙ", "νόμοι"), ("ＡＢＣ", "abc")]


@pytest.mark.parametrize(("upper", "lower"), CASES)
def test_upper_case_has_the_tokens_of_lower_case(upper, lower):
    first, second = tokens([lower], [upper, lower])
    assert first == second


UNSPACED = {
    "Thai": "".join(["ภาษา", "ไทย", "ไม่มี", "ช่องว่าง", "ระหว่าง", "คำ"][i * i % 6] for i in range(60)),
    "kana": "とうきょうときょかきょく" * 20,
    "a checksum": "0123456789abcdef" * 16,
    "an address": "https://example.org/" + "a_long_path/" * 30,
    "emoji": "😀🦀🫠" * 50,
}


@pytest.mark.parametrize("text", UNSPACED.values(), ids=UNSPACED)
def test_a_long_text_without_blanks_is_known_to_its_end(text):
    training = [text[i:] for i in range(0, len(text), 7)]
    (found,) = tokens(training, [text])
    assert "".join(found).replace("##", "") == text


def test_a_character_that_training_does_not_have_is_one_unknown_token():
    training = ["abcde edcba"] * 9
    alone, before, within, long = tokens(
        training, ["ж", "жabc", "abжcde", "abcde" * 19 + "ж" + "edcba" * 19]
    )
    assert alone == ["[UNK]"]
    for found, expected in (
        (before, "[UNK]abc"),
        (within, "ab[UNK]cde"),
        (long, "abcde" * 19 + "[UNK]" + "edcba" * 19),
    ):
        assert "".join(found).replace("##", "") == expected


def test_characters_that_mean_something_to_regular_expressions_are_characters():
    odd = r"a]b^c-d[e\f&&g{1}.h|i$"
    (found,) = tokens([odd], [odd])
    assert "".join(found).replace("##", "") == odd


def test_the_same_texts_give_the_same_tokeniser_in_another_process():
    texts = [" ".join(MARKS[name]) + UNSPACED["Thai"] + UNSPACED["emoji"] for name in MARKS]
    program = (
        "import importlib, json, sys; data = importlib.import_module('01_data'); "
        "made = data.train_tokenizer(lambda: json.loads(sys.argv[1]), 300); "
        "print(made.backend_tokenizer.to_str())"
    )
    command = [sys.executable, "-c", program, json.dumps(texts)]
    first, second = (
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True) for _ in range(2)
    )
    assert first.stdout == second.stdout and len(first.stdout) > 1000


def stage_1(tmp_path, train, test, encoder="tiny"):
    """Stage 1 on texts, all with the same label."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, texts in (("train", train), ("val", train[:5]), ("test", test)):
        write_jsonl(
            folder / f"{name}.jsonl.gz", [{"text": text, "labels": ["a label"]} for text in texts]
        )
    run = str(tmp_path / "run")
    data.run(data.Config(run=run, corpus=str(folder), encoder=str(encoder), vocab=200))
    return data.load(run)


def test_unknown_tokens_are_counted_for_every_split(tmp_path, capsys):
    stage_1(tmp_path, ["abc abd"] * 300, ["abc"] * 399 + ["abж"])
    printed = capsys.readouterr().out.splitlines()
    # 401 tokens in the test documents: "abc" 399 times, "ab", and one unknown.
    assert "unknown tokens, %   train 0.000   val 0.000   test 0.249   label 0.000" in printed
    assert not [line for line in printed if line.startswith("warning")]


def test_many_unknown_tokens_of_a_trained_tokeniser_are_a_warning(tmp_path, capsys):
    stage_1(tmp_path, ["abel l abc"] * 20, ["abc жж", "жжж", "abc"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "test 71.4% (2 of 3 texts are mostly that)" in line
    assert "train" not in line.split(":")[2] and "add some that have them" in line


def test_a_pretrained_tokeniser_that_makes_a_long_line_one_unknown_token_is_a_warning(
    tmp_path, capsys
):
    """Few tokens are unknown then, though nothing is left of the documents: one in fifty here."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "label", "word"]
    encoder = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    transformers.PreTrainedTokenizerFast(tokenizer_object=encoder, **special).save_pretrained(
        tmp_path / "encoder"
    )
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), intermediate_size=16, **shape)
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    train = ["word " * 30] * 98 + [UNSPACED["Thai"]] * 2
    stage_1(tmp_path, train, train, tmp_path / "encoder")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert (
        "train 0.1% (2 of 100 texts are mostly that)" in line
        and "choose an --encoder made for" in line
    )


def test_a_tokeniser_without_an_unknown_token_knows_everything(capsys):
    split = split_of([[0, 1], [2]], [[0], [0]])
    data.describe_unknown({"train": split}, None, "some-encoder")
    assert capsys.readouterr().out == "unknown tokens, %   train 0.000\n"


def test_a_missing_validation_split_is_drawn_from_training(tmp_path, capsys):
    corpus = make_corpus(tmp_path / "corpus", val=False)
    data.run(data.Config(run=str(tmp_path / "a"), corpus=str(corpus), vocab=400))
    data.run(data.Config(run=str(tmp_path / "b"), corpus=str(corpus), vocab=400, limit=100))
    a, b = (data.load(tmp_path / name).splits for name in "ab")
    # 6 of 300 have no labels and are dropped
    assert (len(a["train"]), len(a["val"])) == (294 - 29, 29)
    assert (len(b["train"]), len(b["val"])) == (100, 29)
    assert np.array_equal(a["val"].labels, b["val"].labels)
    assert "note: 165 training documents beyond --limit, left out" in capsys.readouterr().out


def test_drops_are_counted_and_printed(tmp_path, capsys):
    folder = make_corpus(tmp_path / "corpus")
    rows = [
        {"text": "a b c", "labels": ["label-0", "label-0"]},
        {"text": "  ", "labels": ["label-1"]},
        {"text": "d e", "labels": []},
        {"text": "f " * 40, "labels": ["label-2"]},
    ]
    write_jsonl(folder / "train.jsonl.gz", rows)
    data.run(data.Config(run=str(tmp_path / "run"), corpus=str(folder), max_tokens=30, vocab=100))
    printed = capsys.readouterr().out
    for line in (
        "1 labels named twice in one document, taken once",
        "1 training documents without text, left out",
        "1 training documents without labels, left out",
        "1 train texts cut to 30 tokens",
    ):
        assert f"note: {line}\n" in printed
    assert len(data.load(tmp_path / "run").splits["train"]) == 2


def test_artifacts_that_do_not_belong_together_are_refused(tmp_path, corpus):
    run = str(tmp_path)
    with pytest.raises(UserError, match="data.npz does not exist; run: python 01_data.py"):
        stages.tree.run(stages.tree.Config(run=run))
    data.run(data.Config(run=run, corpus=str(corpus), vocab=400))
    stages.tree.run(stages.tree.Config(run=run))
    # another vocabulary: the tree is out of date
    data.run(data.Config(run=run, corpus=str(corpus), vocab=300))
    with pytest.raises(
        UserError, match="tree.npz was made from a data.npz .* run: python 02_label_tree.py"
    ):
        stages.tree.load(run)
    (tmp_path / "data.npz").write_bytes((tmp_path / "data.npz").read_bytes()[:5000])
    with pytest.raises(UserError, match="data.npz cannot be read"):
        data.load(run)


def test_pickles_are_not_executed(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    np.savez(tmp_path / "data.npz", ids=np.array([Attack()], dtype=object), meta=np.array("{}"))
    with pytest.raises(UserError):
        data.load(tmp_path)
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError):
        load_pt(tmp_path / "model.pt")
    assert not (tmp_path / "executed").exists()


def test_a_failed_write_leaves_the_old_artifact(tmp_path, done, monkeypatch):
    path = tmp_path / "data.npz"
    path.write_bytes((done / "data.npz").read_bytes())

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError,
        match="data.npz cannot be written .No space left on device.; what was there before",
    ):
        save_npz(path, data.Config(), {"ids": np.zeros(9)})
    assert path.read_bytes() == (done / "data.npz").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]


@pytest.mark.parametrize("name", ["01_data", "02_label_tree", "03_model", "04_train", "05_eval"])
def test_help_is_the_docstring_and_misspelt_flags_fail(name, capsys):
    stage = importlib.import_module(name)
    for flags, code in ((["--help"], 0), (["--sed", "1"], 2)):
        with pytest.raises(SystemExit) as stopped:
            parse(stage.Config, stage.__doc__, flags)
        assert stopped.value.code == code
    shown = capsys.readouterr()
    assert stage.__doc__.strip() in shown.out and "--seed" in shown.out and "--run" in shown.out
    assert "unrecognized arguments: --sed" in shown.err
    assert "Reads " in stage.__doc__ and "Writes " in stage.__doc__


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "02_label_tree.py", "--run", str(tmp_path)]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stdout == ""
    line = (
        f"02_label_tree.py: error: {tmp_path}/data.npz does not exist; "
        f"run: python 01_data.py --run {tmp_path}"
    )
    assert failed.stderr.splitlines()[-1] == line


def test_the_shipped_corpus_is_what_its_readme_says():
    folder = ROOT / "data" / "debian"
    assert sum(path.stat().st_size for path in folder.glob("*.gz")) <= 6.1e6
    corpus = data.formats.open_corpus(folder)
    names = [name for name, _ in corpus.labels]
    rows = {
        split: [document.labels for document in read()] for split, read in corpus.documents.items()
    }
    in_training = {label for labels in rows["train"] for label in labels}
    assert set(names) == in_training and len(names) == len(set(names))
    assert {split: len(part) for split, part in rows.items()} == {
        "train": 37887,
        "val": 4590,
        "test": 4642,
    }


def test_the_shipped_filters_are_the_labels_that_the_documents_are():
    """Told by the names with which the texts of documents begin; never is such a label right."""
    corpus = data.formats.open_corpus(ROOT / "data" / "debian")
    names = [name for name, _ in corpus.labels]
    is_label = set(names)
    for split, n in (("train", 7778), ("val", 901), ("test", 934)):
        documents = list(corpus.documents[split]())
        known = data.formats.read_known(corpus.known[split], len(names), np.arange(len(documents)))
        assert known.nnz == n
        for i, document in enumerate(documents):
            own = document.text.split(": ")[0]
            listed = [
                names[label] for label in known.indices[known.indptr[i] : known.indptr[i + 1]]
            ]
            assert listed == ([own] if own in is_label else []) and own not in document.labels


def test_the_corpus_builder_says_which_documents_are_labels():
    documents = [
        {"text": "b: one. more"},
        {"text": "x: c. d"},
        {"text": "a: two: b"},
        {"text": "c"},
        {"text": "b-c: "},
    ]
    labels = [{"name": name} for name in ("a", "b", "c", "d")]
    assert build_debian.own_label_pairs(documents, labels) == [(0, 1), (2, 0), (3, 2)]


def test_the_filters_alone_can_be_written_anew(tmp_path, monkeypatch):
    for name in ("train", "val", "test", "labels"):
        shutil.copy(ROOT / "data" / "debian" / f"{name}.jsonl.gz", tmp_path)
    before = {path.name: sha256(path) for path in tmp_path.iterdir()}
    monkeypatch.setattr(sys, "argv", ["build_debian.py", "--only-filters", "--out", str(tmp_path)])
    build_debian.main()
    after = {path.name: sha256(path) for path in tmp_path.iterdir()}
    assert after == before | {
        path.name: sha256(path) for path in (ROOT / "data" / "debian").glob("filter*")
    }
    assert len(after) == 7


def test_the_corpus_builder_drops_what_it_says():
    def package(name, depends, source=None):
        fields = {"Package": name, "Depends": depends, "Description-md5": name}
        return fields | ({"Source": source} if source else {})

    assert build_debian.dependencies(package("a", "b (>= 1) | c, d:any, a, e [amd64],")) == [
        "b",
        "d",
        "e",
    ]
    packages = [
        package(
            f"p{i}",
            "everywhere" + (", pair" if i < 3 else "") + (", lonely" if i in (5, 6) else ""),
            "one (1.0)" if i in (5, 6) else None,
        )
        for i in range(100)
    ]
    said = []
    rows = build_debian.build(
        packages, {f"p{i}": f"short {i}\n long\n .\n text" for i in range(100)}, said.append
    )
    assert rows["labels"] == [{"name": "pair", "text": "pair"}]
    documents = rows["train"] + rows["val"] + rows["test"]
    assert sorted(row["text"] for row in documents) == [
        f"p{i}: short {i}. long text" for i in range(3)
    ]
    assert all(row["labels"] == ["pair"] for row in documents)
    assert "97 documents with no label left dropped" in " ".join(said)


def test_a_result_is_made_from_what_was_read_not_from_what_came_since(tmp_path, prepared, done):
    stages.tree.load(tmp_path)
    (tmp_path / "tree.npz").write_bytes(b"another tree, made meanwhile")
    save_pt(tmp_path / "model.pt", stages.tree.Config(), {}, ("tree.npz",))
    with pytest.raises(UserError, match="model.pt was made from a tree.npz"):
        load_pt(tmp_path / "model.pt")
