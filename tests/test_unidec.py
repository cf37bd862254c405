"""variants/unidec.py and its label pool: against brute force, and trained on a small corpus."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HAS_VARIANTS, make_corpus, stages
from scipy.sparse import csr_matrix
from torch.nn import functional

from plumbing.errors import UserError

if not HAS_VARIANTS:
    pytest.skip("variants/ has been deleted", allow_module_level=True)
from variants import common, label_pool, lexical, unidec


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the cascade whose training split has labels known beforehand."""
    corpus = make_corpus(tmp_path_factory.mktemp("corpus"))
    # Label i is known of document i. Of some it is a correct label, too.
    for split, n in (("train", 300), ("test", 60)):
        pairs = [f"{i} {i}" for i in range(min(n, 40))]
        (corpus / f"filter_labels_{split}.txt").write_text("\n".join(pairs) + "\n")
    folder = tmp_path_factory.mktemp("run")
    stages.data.run(stages.data.Config(run=str(folder), corpus=str(corpus), vocab=400))
    stages.tree.run(stages.tree.Config(run=str(folder), levels="8"))
    settings = {"tiny": "1,32", "max_len": 32, "amp": "off", "epochs": 6, "batch_size": 16}
    stages.train.run(stages.train.Config(run=str(folder), topk="4", **settings))
    return folder


@pytest.fixture(scope="module")
def trained(run):
    """The folder of UniDEC, trained in that run."""
    unidec.run(unidec.Config(run=str(run), pool=24))
    return run / "unidec-pool24"


@pytest.fixture
def model(run):
    """An untrained model that is ready to predict, and its data."""
    data = stages.data.load(run)
    config = common.cascade_settings(run, run)
    return unidec.build(data, stages.tree.load(run), config).eval(), data


def random_scores(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (6, 9), and positives of which every document has 1 to 4."""
    rng = np.random.default_rng(seed)
    score_BA = torch.from_numpy(rng.normal(size=(6, 9))).float()
    is_positive_BA = torch.zeros(6, 9, dtype=torch.bool)
    for i in range(6):
        is_positive_BA[i, rng.permutation(9)[: rng.integers(1, 5)]] = True
    return score_BA, is_positive_BA


# The losses.


def test_with_all_labels_psl_is_the_softmax_against_uniform_targets():
    score_BA, is_positive_BA = random_scores()
    for i, loss in enumerate(unidec.pick_some_labels(score_BA, is_positive_BA)):
        exps = [math.exp(score) for score in score_BA[i].tolist()]
        positives = is_positive_BA[i].nonzero().flatten().tolist()
        expected = -sum(math.log(exps[p] / sum(exps)) for p in positives) / len(positives)
        assert math.isclose(loss, expected, rel_tol=1e-5)


def test_decoupled_leaves_the_other_positives_out():
    score_BA, is_positive_BA = random_scores()
    for i, loss in enumerate(unidec.decoupled(score_BA, is_positive_BA)):
        exps = [math.exp(score) for score in score_BA[i].tolist()]
        positives = is_positive_BA[i].nonzero().flatten().tolist()
        negatives = sum(exp for j, exp in enumerate(exps) if j not in positives)
        shares = [exps[p] / (exps[p] + negatives) for p in positives]
        expected = -sum(math.log(share) for share in shares) / len(positives)
        assert math.isclose(loss, expected, rel_tol=1e-5)


def test_with_one_positive_psl_and_decoupled_are_infonce():
    score_BA, _ = random_scores()
    positive_B = torch.tensor([0, 8, 3, 3, 1, 5])
    is_positive_BA = functional.one_hot(positive_B, 9).bool()
    infonce = functional.cross_entropy(score_BA, positive_B, reduction="none")
    for form in (unidec.pick_some_labels, unidec.decoupled):
        torch.testing.assert_close(form(score_BA, is_positive_BA), infonce)


def test_bce_is_yes_or_no_for_each_label():
    score_BA, is_positive_BA = random_scores()
    expected = functional.binary_cross_entropy_with_logits(
        score_BA, is_positive_BA.float(), reduction="none"
    ).sum(1)
    torch.testing.assert_close(unidec.bce(score_BA, is_positive_BA), expected)


def test_psl_does_not_see_a_documents_constant_nor_the_order_of_the_pool():
    score_BA, is_positive_BA = random_scores()
    loss_B = unidec.pick_some_labels(score_BA, is_positive_BA)
    moved_BA = score_BA + torch.arange(6.0)[:, None]
    torch.testing.assert_close(unidec.pick_some_labels(moved_BA, is_positive_BA), loss_B)
    order = torch.randperm(9)
    shuffled = unidec.pick_some_labels(score_BA[:, order], is_positive_BA[:, order])
    torch.testing.assert_close(shuffled, loss_B)


def test_the_least_psl_is_the_log_of_the_number_of_positives_and_the_least_decoupled_is_0():
    _, is_positive_BA = random_scores()
    best_BA = torch.where(is_positive_BA, 50.0, -50.0)
    log_n_B = is_positive_BA.sum(1).float().log()
    psl_B = unidec.pick_some_labels(best_BA, is_positive_BA)
    torch.testing.assert_close(psl_B, log_n_B)
    decoupled_B = unidec.decoupled(best_BA, is_positive_BA)
    torch.testing.assert_close(decoupled_B, torch.zeros(6))


@pytest.mark.parametrize("loss", unidec.LOSSES)
def test_what_is_known_and_pools_of_positives_alone_have_a_finite_gradient(loss):
    model = SimpleNamespace(form=unidec.LOSSES[loss])
    batch = SimpleNamespace(
        is_known_BA=torch.tensor([[True, False, False], [False, False, False]]),
        is_positive_BA=torch.tensor([[False, True, True], [True, True, True]]),
    )
    score_BA = torch.zeros(2, 3, requires_grad=True)
    unidec.DualEncoder.mean_loss(model, score_BA, batch).backward()
    assert score_BA.grad.isfinite().all() and score_BA.grad[0, 0] == 0


# The pool.


def pairs_of(labels: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    doc_P = np.repeat(np.arange(len(labels)), [len(row) for row in labels])
    return doc_P, np.array([label for row in labels for label in row])


def test_the_pool_has_drawn_positives_then_mined_labels_then_the_others():
    # 20 documents with one label each, and one with 20 labels of its own, of which 3 are drawn.
    labels = [[i] for i in range(20)] + [list(range(100, 120))]
    doc_P, label_P = pairs_of(labels)
    # 7 mined labels for each, of which 6 are drawn: 200 for all, others for each document.
    mined_BM = np.array([[200, *range(1000 + 10 * i, 1006 + 10 * i)] for i in range(21)])
    rng = np.random.default_rng(0)
    pool = label_pool.make_pool(doc_P, label_P, mined_BM, 300, rng)
    assert len(pool) == len(set(pool))
    n_drawn = int(np.flatnonzero(pool == 200)[0])
    drawn = set(pool[:n_drawn].tolist())
    assert set(range(20)) <= drawn and 1 <= len(drawn - set(range(20))) <= label_pool.DRAWN
    mined = [label for label in pool if label >= 1000]
    assert 21 * 5 <= len(mined) <= 21 * 6
    for i in range(21):
        assert 5 <= sum(label // 10 == 100 + i for label in mined) <= 6
    # Behind the mined ones, the positives that were not drawn.
    behind = pool[n_drawn + 1 + len(mined) :]
    assert set(behind) == set(range(100, 120)) - drawn


def test_a_full_pool_keeps_the_most_frequent():
    labels = [[7]] * 5 + [[8]] * 3 + [[9]] + [[1]]
    doc_P, label_P = pairs_of(labels)
    rng = np.random.default_rng(0)
    assert label_pool.make_pool(doc_P, label_P, None, 2, rng).tolist() == [7, 8]
    assert label_pool.make_pool(doc_P, label_P, None, 9, rng).tolist() == [7, 8, 1, 9]


def test_nothing_is_mined_for_fewer_places_than_the_gap():
    doc_P, label_P = pairs_of([[0, 1, 2, 3, 4, 5, 6, 7]])
    mined_BM = np.arange(100, 106)[None]
    for room, n_mined in ((label_pool.GAP, 0), (label_pool.GAP + 1, 6)):
        rng = np.random.default_rng(0)
        drawn = len(label_pool.make_pool(doc_P, label_P, None, 3, rng))
        rng = np.random.default_rng(0)
        pool = label_pool.make_pool(doc_P, label_P, mined_BM, drawn + room, rng)
        assert (pool >= 100).sum() == n_mined


def test_a_positive_counts_whoever_brought_it():
    doc_P, label_P = pairs_of([[3, 7], [3], [8, 7]])
    pool_A = np.array([8, 3, 5, 7])
    found = label_pool.mark(doc_P, label_P, pool_A, 4)
    pairs = set(zip(doc_P.tolist(), label_P.tolist(), strict=True))
    expected = [[(i, label) in pairs for label in pool_A.tolist()] for i in range(4)]
    assert found.tolist() == expected


def test_a_batch_without_labels_has_an_empty_pool():
    nothing = np.zeros(0, np.int64)
    pool = label_pool.make_pool(nothing, nothing, None, 5, np.random.default_rng(0))
    assert len(pool) == 0
    assert label_pool.mark(np.array([0]), np.array([2]), pool, 3).shape == (3, 0)


def test_what_is_mined_is_the_nearest_that_may_be():
    rng = np.random.default_rng(0)
    x_NE = torch.from_numpy(rng.normal(size=(30, 4))).float()
    label_LE = torch.from_numpy(rng.normal(size=(12, 4))).float()
    never = rng.random((30, 12)) < 0.4
    never[5] = True
    mined = label_pool.mine(x_NE, label_LE, csr_matrix(never), 6)
    for i in range(30):
        by_cosine = (-(label_LE @ x_NE[i])).argsort().tolist()
        expected = [label for label in by_cosine if not never[i, label]][:6]
        assert mined[i][mined[i] >= 0].tolist() == expected
    assert (mined[5] == -1).all()


def batches_of(run, model, **changes):
    data = stages.data.load(run)
    config = common.cascade_settings(run, run)

    def find():
        return unidec.embeddings(model, data, config)

    return label_pool.Batches(data, config, find=find, **{"size": 24, "refresh": 2, **changes})


def test_mined_lists_and_batches_of_a_corpus(run, model):
    model, data = model
    batches = batches_of(run, model)
    model.train()
    before = list(batches(1))
    assert batches.mined_NM is None
    after = list(batches(2))
    assert model.training  # the model has been asked, and goes on as it was
    # 1. No positive is mined, and nothing that is known of a document.
    train = data.splits["train"]
    for i, mined in enumerate(batches.mined_NM):
        own = set(train.labels[train.label_offsets[i] : train.label_offsets[i + 1]].tolist())
        known = set(data.known["train"][i].indices.tolist())
        mined = mined[mined >= 0].tolist()
        assert len(mined) == len(set(mined)) == 12 and not (own | known) & set(mined)
    # 2. Clustered or not, an epoch has every document once, in as many batches.
    for epoch in (before, after):
        assert len(epoch) == len(batches) and sum(len(b.ids_BT) for b in epoch) == len(train)
    rows = np.sort(np.concatenate(batches.rows(2)))
    assert rows.tolist() == list(range(len(train)))
    # 3. What each label of a pool is to each document.
    for epoch in (before, after):
        for batch in epoch:
            assert len(batch.pool_A) <= 24
            for place, label in enumerate(batch.pool_A.tolist()):
                has = set(batch.doc_P[batch.label_P == label].tolist())
                knows = set(batch.is_known_BA[:, place].nonzero().flatten().tolist())
                found = set(batch.is_positive_BA[:, place].nonzero().flatten().tolist())
                assert found == has - knows
    assert any(batch.is_known_BA.any() for batch in after)


def test_clustered_batches_are_of_similar_documents():
    rng = np.random.default_rng(0)
    centre = rng.integers(0, 4, 64)
    x_NE = np.eye(4)[centre] + 0.01 * rng.normal(size=(64, 4))
    order = label_pool.in_clusters(x_NE, 16, 0)
    pure = [len(set(centre[part])) for part in np.split(order, 4)]
    # The four groups are not equally large, but far from mixed.
    assert np.mean(pure) < 2.5


def test_labels_without_documents_are_not_mined(run, model):
    model, data = model
    train = data.splits["train"]
    is_kept = train.labels != 3
    doc_P = np.repeat(np.arange(len(train)), np.diff(train.label_offsets))
    sizes = np.bincount(doc_P[is_kept], minlength=len(train))
    offsets = np.append(0, sizes.cumsum()).astype(train.label_offsets.dtype)
    without = stages.data.Split(train.ids, train.offsets, train.labels[is_kept], offsets)
    data = data._replace(splits={**data.splits, "train": without})
    config = common.cascade_settings(run, run)
    rng = np.random.default_rng(0)
    # A label vector 3 that is near to all documents.
    x_NE = torch.from_numpy(1 + 0.1 * rng.normal(size=(len(train), 4))).float()
    label_LE = torch.from_numpy(rng.normal(size=(len(data.names), 4))).float()
    label_LE[3] = 10
    batches = label_pool.Batches(data, config, 24, 2, lambda: (x_NE, label_LE))
    batches.look_again(2)
    assert not (batches.mined_NM == 3).any() and (batches.mined_NM >= 0).any()


# The model.


def test_the_loss_is_half_of_each_and_leaves_out_what_is_known(model, run):
    model, _ = model
    batch = next(b for b in batches_of(run, model, refresh=0)(0) if b.is_known_BA.any())
    losses, n_missed = model.loss(batch)
    assert n_missed == len(batch.label_P) - batch.is_positive_BA.sum()
    # By hand, document by document: only the labels that are not known.
    mean_BD = model.mean_pooled(batch.ids_BT, batch.mask_BT)
    text_AE = model.texts(batch.pool_A)
    scores = [
        18 * model.dual(mean_BD) @ text_AE.T,
        18 * model.to_classifier(mean_BD) @ model.table_LE[batch.pool_A].T,
    ]
    for loss, score_BA in zip(losses, scores, strict=True):
        by_document = []
        for i in range(len(score_BA)):
            counts = ~batch.is_known_BA[i]
            own = batch.label_P[batch.doc_P == i]
            is_positive = torch.isin(batch.pool_A, own)[counts]
            if is_positive.any():
                log_share = score_BA[i][counts].log_softmax(0)
                by_document.append(-log_share[is_positive].mean())
        torch.testing.assert_close(loss, 0.5 * torch.stack(by_document).mean())


def test_documents_without_a_positive_in_the_pool_are_dropped(model):
    model, data = model
    batch = data.batch("train", np.arange(3), 32)
    pool_A = torch.tensor([1, 2, 4])
    positive = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 1]]).bool()
    full = label_pool.Batch(*batch, pool_A, positive, torch.zeros_like(positive))
    some = label_pool.Batch(
        batch.ids_BT[[0, 2]], batch.mask_BT[[0, 2]], *full[2:6], pool_A, positive[[0, 2]],
        torch.zeros_like(positive[[0, 2]]),
    )  # fmt: skip
    torch.testing.assert_close(model.loss(full)[0], model.loss(some)[0])
    nothing = full._replace(is_positive_BA=torch.zeros_like(positive))
    assert model.loss(nothing)[0].tolist() == [0, 0]


def test_a_documents_and_a_labels_vector_come_from_the_same_encoder(model):
    model, data = model
    texts = data.batch("label", np.arange(4), 24)
    as_documents = model.dual(model.mean_pooled(texts.ids_BT, texts.mask_BT))
    torch.testing.assert_close(model.texts(torch.arange(4)), as_documents)
    torch.testing.assert_close(as_documents.norm(dim=1), torch.ones(4))


def test_vectors_side_by_side_give_the_sum_of_both_rankings(model):
    model, data = model
    batch = data.batch("test", np.arange(5), 32)
    mean_BD = model.mean_pooled(batch.ids_BT, batch.mask_BT)
    one_BE = torch.cat(
        [model.dual(mean_BD), functional.normalize(model.to_classifier(mean_BD))], dim=1
    )
    other_LE = torch.cat([model.all_texts(), functional.normalize(model.table_LE)], dim=1)
    joint_BL = one_BE @ other_LE.T
    labels, scores = model.predict(batch, 7)
    best = joint_BL.topk(7)
    assert labels.tolist() == best.indices.tolist()
    torch.testing.assert_close(scores, functional.logsigmoid(best.values))
    cosines = model.cosines(batch)
    for name in ("dual", "classifier"):
        expected = cosines[name].topk(7).indices
        assert model.predict(batch, 7, name)[0].tolist() == expected.tolist()


def test_label_vectors_are_encoded_anew_when_the_weights_have_moved(model):
    model, _ = model
    before = model.all_texts()
    assert model.all_texts() is before
    with torch.no_grad():
        model.to_dual.weight.mul_(-1)
    model.train()
    after = model.eval().all_texts()
    assert not torch.allclose(before, after)


def test_rates_are_1_to_2_to_10_and_every_parameter_has_one(model):
    model, _ = model
    rate_of = {}
    for group in model.param_groups(1e-2, 1e-3):
        for parameter in group["params"]:
            assert id(parameter) not in rate_of
            rate_of[id(parameter)] = group["lr"]
    names = dict(model.named_parameters())
    assert len(rate_of) == len(names)
    assert rate_of[id(model.table_LE)] == 1e-2
    assert rate_of[id(model.encoder.table)] == 1e-2
    assert rate_of[id(model.to_dual.weight)] == 2e-3
    layer = next(name for name in names if "layer.0" in name)
    assert rate_of[id(names[layer])] == 1e-3


# All of it.


def precision_at_1(folder) -> float:
    predictions = np.load(folder / "predictions.npz", allow_pickle=False)
    split = stages.data.load(folder).splits["test"]
    return stages.train.hits(predictions["labels"][:, :1], split).mean()


def test_it_learns_and_both_halves_do(trained):
    data = stages.data.load(trained)
    count_L = np.bincount(data.splits["train"].labels, minlength=len(data.names))
    guess = np.full((60, 1), count_L.argmax())
    chance = stages.train.hits(guess, data.splits["test"]).mean()
    for half in ("", "dual", "classifier"):
        assert precision_at_1(trained / half) > 3 * chance + 0.1, half
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert (np.array(losses[-1]) < 0.7 * np.array(losses[0])).all()


def test_what_is_known_is_not_predicted(trained):
    known = stages.data.load(trained).known["test"]
    predictions = np.load(trained / "predictions.npz", allow_pickle=False)
    for i, labels in enumerate(predictions["labels"]):
        assert not set(known[i].indices.tolist()) & set(labels.tolist())


def test_the_model_on_disk_predicts_the_same(trained, capsys):
    data = stages.data.load(trained)
    model, _, ranking = stages.train.load(trained, data, unidec.build)
    assert capsys.readouterr().out == ""  # it is read by the class that wrote it
    model.eval()
    rows = np.arange(40, 60)  # of these nothing is known beforehand
    labels, scores = model.predict(data.batch("test", rows, 32), 20, ranking)
    predictions = np.load(trained / "predictions.npz", allow_pickle=False)
    np.testing.assert_allclose(scores.exp(), predictions["scores"][rows, :20], atol=1e-5)
    assert (labels.numpy() == predictions["labels"][rows, :20]).mean() > 0.9


def test_bad_settings_and_labels_without_texts_are_refused(run):
    with pytest.raises(UserError, match="--loss"):
        unidec.run(unidec.Config(run=str(run), loss="hinge"))
    data = stages.data.load(run)
    label = data.splits["label"]
    offsets = np.zeros_like(label.offsets)
    empty = stages.data.Split(label.ids[:0], offsets, label.labels, label.label_offsets)
    with pytest.raises(UserError, match="text"):
        unidec.label_texts(data._replace(splits={**data.splits, "label": empty}))


def test_the_folder_says_what_is_not_the_default():
    default = unidec.Config()
    assert unidec.folder_name(default) == "unidec"
    other = dataclasses.replace(default, loss="bce", refresh=0)
    assert unidec.folder_name(other) == "unidec-bce-refresh0"


# The yardstick.


def test_the_lexical_yardstick_is_a_cosine_of_words(run, capsys):
    data = stages.data.load(run)
    labels, cosines = lexical.nearest(data, "test", 5)
    vocab = data.meta["vocab_size"]
    _, idf = stages.tree.tfidf(data.splits["train"], None, vocab)
    documents = stages.tree.tfidf(data.splits["test"], idf, vocab)[0].toarray()
    texts = stages.tree.tfidf(data.splits["label"], idf, vocab)[0].toarray()
    expected = np.sort(documents @ texts.T, axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose(cosines, expected, atol=1e-6)
    lexical.run(lexical.Config(run=str(run)))
    assert "of the 40 test documents" in capsys.readouterr().out
    predictions = np.load(run / "lexical" / "predictions.npz", allow_pickle=False)
    for i, row in enumerate(predictions["labels"]):
        assert not set(data.known["test"][i].indices.tolist()) & set(row.tolist())


def test_own_labels_are_counted():
    known = csr_matrix(np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0]]))
    data = SimpleNamespace(known={"test": known})
    assert lexical.own_label_first(data, np.array([[1, 0], [0, 2], [0, 1]])) == (1, 2)
