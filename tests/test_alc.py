"""variants/alc.py: its losses against brute force, the answered share, and a small training."""

import numpy as np
import pytest
import torch
from conftest import HAS_VARIANTS, run_pipeline, stages
from torch.nn import functional

from plumbing.errors import UserError
from tools import report

if not HAS_VARIANTS:
    pytest.skip("variants/ has been deleted", allow_module_level=True)
from variants import alc, common, label_pool


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    return run_pipeline(tmp_path_factory.mktemp("run"), corpus, tiny="1,32", epochs=3)


@pytest.fixture
def model(run):
    data = stages.data.load(run)
    config = common.cascade_settings(run, run)
    return alc.build(data, stages.tree.load(run), config).eval(), data


def a_pool(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosines (8, 12), and what is positive and what is negative; the rest is known beforehand."""
    rng = np.random.default_rng(seed)
    cosine_BA = torch.from_numpy(rng.uniform(-1, 1, (8, 12))).float()
    kind_BA = torch.from_numpy(rng.choice(3, (8, 12), p=[0.2, 0.7, 0.1]))
    return cosine_BA, kind_BA == 0, kind_BA == 1


# The threshold-consistent margin.


def test_tcm_gives_what_the_public_code_gives():
    """Its own test: four vectors of two classes, positive part .1929, negative part .325."""
    vectors = torch.tensor([[0, 1], [0.43, 0.9], [1, 0], [0.5, 0.5]])
    classes = torch.tensor([0, 0, 1, 1])
    unit = functional.normalize(vectors)
    cosine = unit @ unit.T
    is_same = classes[:, None] == classes
    is_itself = torch.eye(4, dtype=torch.bool)
    nothing = torch.zeros_like(is_same)
    positive = alc.tcm(cosine, is_same & ~is_itself, nothing)
    negative = alc.tcm(cosine, nothing, ~is_same)
    assert round(float(positive), 4) == 0.1929
    assert round(float(negative), 3) == 0.325
    both = alc.tcm(cosine, is_same & ~is_itself, ~is_same)
    torch.testing.assert_close(both, positive + negative)


def test_tcm_is_0_within_the_margins_and_has_a_gradient_beyond_them_only():
    cosine_BA = torch.tensor([[0.95, 0.3], [0.4, 0.8]], requires_grad=True)
    is_positive_BA = torch.tensor([[True, False], [True, False]])
    loss = alc.tcm(cosine_BA, is_positive_BA, ~is_positive_BA)
    loss.backward()
    assert (cosine_BA.grad != 0).tolist() == [[False, False], [True, True]]
    assert cosine_BA.grad[1, 0] < 0 < cosine_BA.grad[1, 1]  # one goes up, the other down
    fine = torch.tensor([[0.95, 0.3]])
    assert alc.tcm(fine, is_positive_BA[:1], ~is_positive_BA[:1]) == 0


def test_tcm_sees_what_a_softmax_does_not():
    cosine_BA, is_positive_BA, is_negative_BA = a_pool()
    moved_BA = cosine_BA - 0.2
    before = alc.tcm(cosine_BA, is_positive_BA, is_negative_BA)
    assert not torch.isclose(before, alc.tcm(moved_BA, is_positive_BA, is_negative_BA))
    torch.testing.assert_close(cosine_BA.softmax(1), moved_BA.softmax(1))


# Pairs.


def test_a_pair_is_four_vectors_wide_and_half_of_it_does_not_know_which_is_which():
    one, other = torch.randn(2, 5, 6)
    pair, turned = alc.pair_of(one, other), alc.pair_of(other, one)
    assert pair.shape == (5, 24)
    torch.testing.assert_close(pair[:, 12:], turned[:, 12:])
    torch.testing.assert_close(pair[:, :6], turned[:, 6:12])
    torch.testing.assert_close(pair[:, 18:].sum(1), (one * other).sum(1))


def test_the_hardest_negative_is_the_nearest_label_that_is_not_right():
    cosine_BA, _, is_negative_BA = a_pool()
    found = alc.hardest_negative(cosine_BA, is_negative_BA)
    for i, place in enumerate(found.tolist()):
        negatives = [j for j in range(12) if is_negative_BA[i, j]]
        assert place == max(negatives, key=lambda j: float(cosine_BA[i, j]))


def test_what_others_have_brought_is_hard_for_them_and_wrong_for_the_document():
    cosine_BA, _, is_negative_BA = a_pool()
    hardest_B = alc.hardest_negative(cosine_BA, is_negative_BA)
    place_BJ, counts_BJ = alc.brought_by_others(cosine_BA, is_negative_BA, hardest_B)
    assert place_BJ.shape == counts_BJ.shape == (8, alc.OTHERS)
    n_found = 0
    for i in range(8):
        wrong = {j for j in range(12) if is_negative_BA[i, j]}
        expected = (set(hardest_B.tolist()) & wrong) - {int(hardest_B[i])}
        found = place_BJ[i][counts_BJ[i]].tolist()
        assert len(expected) <= alc.OTHERS and set(found) == expected
        n_found += len(found)
    assert n_found > 8


def test_the_pair_losses_are_cross_entropies(model):
    model, _ = model
    heads = model.pairs
    x_BE, positive_BE, negative_BE = functional.normalize(torch.randn(3, 5, 256), dim=-1)
    loss = heads.query_label_loss(x_BE, positive_BE, negative_BE)
    right = heads.query_label(alc.pair_of(x_BE, positive_BE)).softmax(1)[:, 1]
    wrong = heads.query_label(alc.pair_of(x_BE, negative_BE)).softmax(1)[:, 0]
    torch.testing.assert_close(loss, -(right.log().mean() + wrong.log().mean()) / 2)
    # Among three labels, of which the last does not count for the first document.
    label_BJE = torch.stack([positive_BE, negative_BE, negative_BE.flip(0)], dim=1)
    counts_BJ = torch.ones(5, 3, dtype=torch.bool)
    counts_BJ[0, 2] = False
    loss = heads.query_batch_loss(x_BE, label_BJE, counts_BJ)
    expected = []
    for i in range(5):
        scores = [
            heads.query_batch(alc.pair_of(x_BE[i], label_BJE[i, j])).item()
            for j in range(3)
            if counts_BJ[i, j]
        ]
        expected.append(-torch.tensor(scores).log_softmax(0)[0])
    torch.testing.assert_close(loss, torch.stack(expected).mean())


# The model.


def batch_of(run) -> label_pool.Batch:
    data = stages.data.load(run)
    config = common.cascade_settings(run, run)
    batches = label_pool.Batches(data, config, 24, 0, lambda: None)
    return next(batches(0))


def test_without_weights_only_the_base_is_left(model, run):
    model, _ = model
    batch = batch_of(run)
    base, margin = model.loss(batch)[0]
    assert margin == 0
    torch.testing.assert_close(base, super(alc.ALC, model).loss(batch)[0][0])
    model.tcm = 2.0
    model.beta = 0.5
    same_base, margin, pairs = model.loss(batch)[0]
    torch.testing.assert_close(same_base, base)
    assert margin > 0 and pairs > 0
    model.tcm = 1.0
    torch.testing.assert_close(model.loss(batch)[0][1], margin / 2)


def test_a_batch_without_any_positive_costs_nothing(model, run):
    model, _ = model
    model.beta = 1.0
    batch = batch_of(run)
    empty = batch._replace(is_positive_BA=torch.zeros_like(batch.is_positive_BA))
    losses, _ = model.loss(empty)
    assert losses[0] == 0 and losses[2] == 0


def test_the_pair_heads_leave_prediction_as_it_is(model):
    model, data = model
    batch = data.batch("test", np.arange(9), 32)
    before = model.predict(batch, 5)
    for parameter in model.pairs.parameters():
        torch.nn.init.normal_(parameter)
    after = model.eval().predict(batch, 5)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


# The answered share.


def some_predictions(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, and first labels that are right the more often the larger they are."""
    rng = np.random.default_rng(seed)
    confidence = rng.random(n)
    return confidence, rng.random(n) < confidence


def test_the_answered_share_does_not_change_under_a_rising_function():
    val, test = some_predictions(seed=1), some_predictions(seed=2)
    share, right = alc.answered(val, test, 0.9)
    assert 0.05 < share < 0.9 and right > 0.8
    exp_val, exp_test = (np.exp(val[0]), val[1]), (np.exp(test[0]), test[1])
    assert alc.answered(exp_val, exp_test, 0.9) == (share, right)


def test_all_are_answered_where_no_more_is_asked_than_precision_at_1():
    val = some_predictions()
    share, right = alc.answered(val, val, val[1].mean())
    assert share == 1 and right == val[1].mean()


def test_the_threshold_is_chosen_on_validation():
    val, test = some_predictions(seed=1), some_predictions(seed=2)
    threshold, _ = report.coverage(*val, 0.9)
    share, right = alc.answered(val, test, 0.9)
    above = test[0] >= threshold
    assert share == above.mean() and right == test[1][above].mean()
    nothing_right = (val[0], np.zeros(400, bool))
    share, right = alc.answered(nothing_right, test, 0.9)
    assert share == 0 and np.isnan(right)


def test_confidences_come_from_the_cosines_of_the_files():
    cosine_Nk = -np.sort(-np.random.default_rng(0).uniform(-1, 1, (5, 6)), axis=1)
    found = alc.confidences(1 / (1 + np.exp(-cosine_Nk)))
    ahead = cosine_Nk[:, 0] - cosine_Nk[:, 1]
    np.testing.assert_allclose(2 * found["ahead of the second"], ahead)
    share = np.exp(18 * cosine_Nk[:, 0]) / np.exp(18 * cosine_Nk).sum(1)
    np.testing.assert_allclose(found["softmax over the best"], share)
    assert (found["score"].argsort() == cosine_Nk[:, 0].argsort()).all()


# All of it.


def test_base_and_all_losses_train_and_are_compared(run, capsys):
    alc.run(alc.Config(run=str(run), tcm=0.0, beta=0.0, pool=24))
    alc.run(alc.Config(run=str(run), pool=24))
    printed = capsys.readouterr().out
    assert printed.count("softmax over the best") == 2
    for name in ("alc-0-0-pool24", "alc-1-0.1-pool24"):
        data = stages.data.load(run / name)
        predictions = np.load(run / name / "predictions.npz", allow_pickle=False)
        right = stages.train.hits(predictions["labels"][:, :1], data.splits["test"]).mean()
        count_L = np.bincount(data.splits["train"].labels, minlength=len(data.names))
        guess = np.full((60, 1), count_L.argmax())
        assert right > 2 * stages.train.hits(guess, data.splits["test"]).mean(), name
        loaded, _, _ = stages.train.load(run / name, data, alc.build)
        assert isinstance(loaded, alc.ALC)
    assert printed.count("minus the base's") == len(alc.TARGETS)


def test_the_difference_is_paired_and_has_a_sign():
    right = np.arange(200) % 4 > 0
    confidence, _ = some_predictions(200)
    # One is sure of what is right, and the other of anything.
    good = ({"score": np.where(right, 0.9, 0.1)}, right)
    poor = ({"score": confidence}, right)
    base, other = {"val": poor, "test": poor}, {"val": good, "test": good}
    low, middle, high = alc.difference(base, other, 0.95)
    assert 0.4 < low <= middle <= high < 1
    assert alc.difference(base, base, 0.95).tolist() == [0, 0, 0]
    assert alc.difference(other, base, 0.95)[1] < 0


def test_negative_weights_are_refused(run):
    for changes in ({"tcm": -1.0}, {"beta": float("nan")}):
        with pytest.raises(UserError, match=next(iter(changes))):
            alc.run(alc.Config(run=str(run), **changes))
