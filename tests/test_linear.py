"""The linear baselines: SVMs at their minimum, the texts of the run, predictions that can be
compared.
"""

import sys

import numpy as np
import pytest
from conftest import HAS_VARIANTS, ROOT, make_corpus, stages
from scipy.sparse import csr_matrix

from plumbing.errors import UserError
from plumbing.store import load_npz
from tools import compare

if not HAS_VARIANTS:
    pytest.skip("variants/ has been deleted; bench/linear.py uses it", allow_module_level=True)
sys.path.insert(0, str(ROOT / "bench"))
import linear  # noqa: E402


@pytest.fixture
def corpus_run(tmp_path, corpus):
    """A run folder with data.npz alone, made from the tests' corpus."""
    run = tmp_path / "run"
    stages.data.run(stages.data.Config(run=str(run), corpus=str(corpus), vocab=400))
    return run


def precision(labels_Nk: np.ndarray, split) -> float:
    """P@1 over the documents that have labels, in percent."""
    right = []
    for i in range(len(split)):
        true = split.labels[split.label_offsets[i] : split.label_offsets[i + 1]]
        if len(true):
            right.append(labels_Nk[i, 0] in true)
    return 100 * float(np.mean(right))


def test_the_svm_of_every_label_is_where_its_loss_is_least():
    rng = np.random.default_rng(0)
    X = (rng.random((60, 20)) * (rng.random((60, 20)) < 0.4)).astype(np.float32)
    positive = rng.random((60, 5)) < [0.02, 0.1, 0.3, 0.5, 0.9]
    positive[0] = True
    W = linear.dual_descent(csr_matrix(X), positive, c=0.7, tolerance=1e-5)
    for f in range(5):
        # There the gradient of |w|^2 / 2 + c sum max(0, 1 - y w.x)^2 is zero.
        y = np.where(positive[:, f], 1, -1)
        slack = np.maximum(0, 1 - y * (X @ W[:, f]))
        gradient = W[:, f] - 2 * 0.7 * X.T @ (slack * y)
        assert np.abs(W[:, f]).max() > 0.1 and np.abs(gradient).max() < 1e-3


def test_one_vs_rest_is_written_as_stage_5_writes_and_can_be_compared(corpus_run, capsys):
    linear.run(linear.Config(run=str(corpus_run), k=50))
    out, data = corpus_run / "linear-one-vs-rest", stages.data.load(corpus_run)
    for file, name in (("predictions.npz", "test"), ("predictions.val.npz", "val")):
        arrays, meta = load_npz(out / file)
        assert arrays["labels"].shape == (60, 50) and arrays["labels"].dtype == np.int32
        assert (np.diff(arrays["scores"]) <= 0).all() and arrays["scores"].dtype == np.float32
        assert (arrays["labels"][:, 40:] == -1).all()  # there are but 40 labels
        assert meta["stage"] == "bench/linear.py" and meta["seconds"] > 0
        assert precision(arrays["labels"], data.splits[name]) > 90
    linear.run(linear.Config(run=str(corpus_run), k=50, max_len=8))
    capsys.readouterr()
    compare.run(compare.Config(runs=[str(out), str(corpus_run / "linear-one-vs-rest-8")]))
    assert "second is better" in capsys.readouterr().out


def test_labels_known_beforehand_are_not_predicted(tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    (folder / "filter_labels_test.txt").write_text("0 3\n0 5\n7 2\n")
    run = tmp_path / "run"
    stages.data.run(stages.data.Config(run=str(run), corpus=str(folder), vocab=400))
    linear.run(linear.Config(run=str(run), k=38))
    labels = load_npz(run / "linear-one-vs-rest" / "predictions.npz")[0]["labels"]
    assert set(labels[0]) == set(range(40)) - {3, 5}
    assert 2 not in labels[7] and (labels >= 0).all()


def test_documents_are_cut_to_what_the_cascade_reads(corpus_run):
    data = stages.data.load(corpus_run)
    short = linear.cut(data.splits["test"], 8 - 2)
    batch = data.batch("test", np.arange(60), 8)
    for i in range(60):
        ids = batch.ids_BT[i][batch.mask_BT[i] == 1][1:-1]  # without [CLS] and [SEP]
        assert short.ids[short.offsets[i] : short.offsets[i + 1]].tolist() == ids.tolist()


def test_the_tf_idf_of_words_is_the_usual_one(corpus_run, corpus):
    data = stages.data.load(corpus_run)
    texts = linear.read_texts(data, str(corpus))
    found = linear.word_features(data, str(corpus))
    frequency = {}
    for text in texts["train"]:
        for word in set(text.lower().split()):
            frequency[word] = frequency.get(word, 0) + 1
    kept = {word for word, n in frequency.items() if n >= 3}
    assert found["test"].shape == (60, len(kept))
    for i in range(60):
        tokens = texts["test"][i].lower().split()
        weights = {}
        for word in kept.intersection(tokens):
            idf = 1 + np.log((1 + len(texts["train"])) / (1 + frequency[word]))
            weights[word] = (1 + np.log(tokens.count(word))) * idf
        expected = np.array(sorted(weights.values()))
        length = np.sqrt((expected**2).sum())
        assert np.allclose(np.sort(found["test"][i].data), expected / length, atol=1e-6)


def test_words_of_one_character_and_capitals_are_no_words():
    assert linear.words("A Regulation (EC) No 1/2003, d'Or") == [
        "regulation",
        "ec",
        "no",
        "2003",
        "or",
    ]


def test_texts_are_those_of_the_documents_that_stage_1_drew(tmp_path):
    folder, run = make_corpus(tmp_path / "corpus", val=False), tmp_path / "run"
    settings = {"run": str(run), "corpus": str(folder), "vocab": 400, "limit": 100, "seed": 5}
    stages.data.run(stages.data.Config(**settings))
    data = stages.data.load(run)
    tokenizer = stages.data.Tokenizer.from_buffer(data.tokenizer)
    texts = linear.read_texts(data, "")
    assert len(texts["train"]) == 100
    for name, split in data.splits.items():
        for i, text in enumerate(texts.get(name, [])):
            ids = split.ids[split.offsets[i] : split.offsets[i + 1]]
            assert tokenizer.encode(text, add_special_tokens=False).ids == ids.tolist()
    with pytest.raises(UserError, match="are not those of data.npz"):
        linear.read_texts(data, str(make_corpus(tmp_path / "other", seed=1)))


@pytest.mark.parametrize(
    ("system", "library"), [("xr-linear", "pecos"), ("parabel", "omikuji"), ("bonsai", "omikuji")]
)
def test_a_library_finds_the_labels_where_it_is_installed(corpus_run, system, library):
    pytest.importorskip(library, reason=f"{linear.INSTALL[system]}")
    linear.run(linear.Config(run=str(corpus_run), system=system, k=20))
    arrays, _ = load_npz(corpus_run / f"linear-{system}" / "predictions.npz")
    assert precision(arrays["labels"], stages.data.load(corpus_run).splits["test"]) > 90
    assert (np.diff(arrays["scores"]) <= 0).all() and 0 <= arrays["scores"].max() <= 1


def test_a_library_that_is_missing_is_named_with_how_to_install_it(corpus_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "omikuji", None)
    with pytest.raises(UserError, match="pip install omikuji"):
        linear.run(linear.Config(run=str(corpus_run), system="parabel"))


@pytest.mark.parametrize(
    "wrong", [{"system": "fasttext"}, {"text": "lines"}, {"text": "words", "max_len": 64}]
)
def test_settings_that_do_not_go_together_are_refused(corpus_run, wrong):
    with pytest.raises(UserError, match="--"):
        linear.run(linear.Config(run=str(corpus_run), **wrong))
