"""variants/gandalf.py: what label texts are given to learn, against loops over the documents."""

import numpy as np
import pytest
from conftest import HAS_VARIANTS, run_pipeline, stages
from scipy.sparse import csr_matrix

from plumbing.store import load_npz

if not HAS_VARIANTS:
    pytest.skip("variants/ has been deleted", allow_module_level=True)
from variants import gandalf


def test_shares_are_those_of_the_documents_with_a_label():
    Y = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]], np.float32)
    shares = gandalf.together(csr_matrix(Y)).toarray()
    for label in range(3):
        with_label = Y[Y[:, label] > 0]
        np.testing.assert_allclose(shares[label], with_label.mean(axis=0))
    assert shares[3].sum() == 0  # it has no document


def test_a_target_is_drawn_with_its_own_probability():
    shares = csr_matrix(np.tile([1.0, 0.5, 0.1, 0.0], (4000, 1)))
    found = gandalf.drawn(shares, seed=0).toarray()
    assert set(np.unique(found)) == {0, 1}
    np.testing.assert_allclose(found.mean(axis=0), [1, 0.5, 0.1, 0], atol=0.03)
    assert np.array_equal(gandalf.drawn(shares, seed=0).toarray(), found)
    assert not np.array_equal(gandalf.drawn(shares, seed=1).toarray(), found)


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    return run_pipeline(tmp_path_factory.mktemp("cascade"), corpus, epochs=1)


@pytest.mark.parametrize("alone", [True, False])
def test_label_texts_stand_behind_the_documents(run, alone, capsys):
    data = stages.data.load(run)
    train, texts = data.splits["train"], data.splits["label"]
    more = gandalf.grown(data, seed=0, alone=alone).splits["train"]
    n = len(train)
    assert len(more) == n + 40 and "40 label texts" in capsys.readouterr().out
    for i in range(n):  # the documents are as they were
        for name, offsets in (("ids", "offsets"), ("labels", "label_offsets")):
            parts = []
            for split in (train, more):
                start, end = getattr(split, offsets)[i : i + 2]
                parts.append(getattr(split, name)[start:end])
            assert np.array_equal(*parts)
    Y = train.label_matrix(40).toarray()
    for label in range(40):
        start, end = more.offsets[n + label : n + label + 2]
        text = texts.ids[texts.offsets[label] : texts.offsets[label + 1]]
        assert np.array_equal(more.ids[start:end], text)
        start, end = more.label_offsets[n + label : n + label + 2]
        targets = more.labels[start:end].tolist()
        assert label in targets
        if alone:
            assert targets == [label]
        else:
            # Only labels that come with it.
            comes_with_it = Y[Y[:, label] > 0].sum(axis=0) > 0
            assert comes_with_it[targets].all()
    # The rest is the run's own.
    assert more.label_offsets[-1] == len(more.labels) and more.offsets[-1] == len(more.ids)


def test_labels_without_a_text_or_a_document_are_left_out(run, capsys):
    data = stages.data.load(run)
    train, texts = data.splits["train"], data.splits["label"]
    without_text = stages.data.Split(
        texts.ids[texts.offsets[1] :],
        np.maximum(texts.offsets - texts.offsets[1], 0),
        texts.labels,
        texts.label_offsets,
    )
    has_label_1 = train.label_matrix(40).toarray()[:, 1] > 0
    without_document = train.documents(np.flatnonzero(~has_label_1))
    splits = {**data.splits, "label": without_text, "train": without_document}
    more = gandalf.grown(data._replace(splits=splits), 0, alone=True).splits["train"]
    added = more.labels[more.label_offsets[len(without_document)] :]
    assert added.tolist() == list(range(2, 40))
    assert "2 labels have no text or no document" in capsys.readouterr().out


def test_training_from_the_command_line(run, capsys):
    gandalf.run(gandalf.Config(run=str(run)))
    assert "label texts, with" in capsys.readouterr().out
    # Stage 5 measured on the data as they are: the folder's data are those of the run.
    digests = [load_npz(folder / "data.npz")[1]["sha256"] for folder in (run, run / "gandalf")]
    assert digests[0] == digests[1]
    assert (run / "gandalf" / "predictions.npz").exists()
