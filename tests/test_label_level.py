"""The label level: row-wise Adam against a loop over rows, accumulation, loss scaling, rounding.
ShortlistProduct is tested with the model, in test_model.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import formed

from plumbing import label_level
from plumbing.label_level import Factors, RowAdam, round_stochastically


def factors(clusters, n_rows, width, seed, n_docs=4):
    """Factors of a gradient for the clusters named, in no order; their last row is without any
    gradient.
    """
    rng = torch.Generator().manual_seed(seed)
    dz_BKF = torch.randn(n_docs, len(clusters), n_rows, generator=rng)
    dz_BKF[:, :, -1] = 0
    return asked(clusters, dz_BKF, torch.randn(n_docs, width, generator=rng))


def asked(clusters, dz_BKF, x_BD, n_clusters=9):
    """Factors of a batch whose documents all ask for the same clusters."""
    clusters_BK = torch.tensor(clusters).expand(len(dz_BKF), -1)
    return Factors(clusters_BK, dz_BKF, x_BD, n_clusters)


@pytest.mark.parametrize("shape", [(9, 3, 5), (9, 3)])
def test_row_adam_equals_a_loop_over_rows(monkeypatch, shape):
    monkeypatch.setattr(label_level, "CHUNK", {"cpu": 2 * 3 * 5})  # two clusters at a time
    lr, beta, width = 0.1, 0.9, 5 if len(shape) == 3 else 1
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    weight = torch.nn.Parameter(start.clone())
    optimizer = RowAdam([{"params": [weight], "lr": lr}], beta=beta)
    expected = start.double().view(9, 3, -1)
    history = {}
    feature = torch.zeros(width, dtype=torch.float64)
    for seed, clusters in enumerate([[4, 0, 7], [7, 1], [0, 7, 2, 4]]):
        weight.factors = [factors(clusters, 3, width, seed)]
        dense = formed(shape, weight.factors).double().view(9, 3, -1)
        largest_document = [float((weight.factors[0].x_BD[b]).abs().max()) for b in range(4)]
        assert max(largest_document) < 9  # the cap is far away here
        optimizer.step()
        feature = beta * feature + (1 - beta) * dense.square().sum((0, 1))
        size_of_feature = ((feature + label_level.FLOOR * feature.mean()) / feature.mean()).sqrt()
        for row in [(cluster, i) for cluster in clusters for i in range(2)]:
            scaled = dense[row] / size_of_feature
            squares = history.setdefault(row, [])
            squares.append(float(dense[row].square().mean()))
            # Adam's second moment without its bias: the weighted mean of the squares so far.
            share = np.array([beta ** (len(squares) - 1 - i) for i in range(len(squares))])
            mean = float((share * squares).sum() / share.sum())
            expected[row] -= lr * scaled / mean**0.5
    torch.testing.assert_close(
        weight.detach().double().view(9, 3, -1), expected, rtol=1e-5, atol=1e-6
    )
    untouched = [3, 5, 6, 8]
    assert torch.equal(weight[untouched], start[untouched]) and torch.equal(
        weight[:, 2], start[:, 2]
    )
    state = optimizer.state[weight]
    assert (state["rows"].numel(), state["features"].numel(), state["step"]) == (54, width, 3)


def step_of(weight, optimizer, parts, scale=1.0):
    """The largest move of a weight, in learning rates, in a step with these factors."""
    before = weight.detach().clone()
    weight.factors = [replace(part, dz_BKF=part.dz_BKF * scale) for part in parts]
    optimizer.step(scale=scale)
    assert weight.isfinite().all()
    return float((weight.detach() - before).abs().max()) / optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("n_batches", [1, 2])
@pytest.mark.parametrize("before", [0.0, 1e-33, 1.5e-9, 1e-3])
def test_a_feature_that_wakes_up_moves_no_weight_far(before, n_batches, scale):
    """Features that are zero, or nearly, for twenty steps, as some of a pretrained encoder are
    until training moves their LayerNorm gain; then they are as large as others."""
    weight = torch.nn.Parameter(torch.zeros(9, 3, 8))
    optimizer = RowAdam([{"params": [weight], "lr": 1e-2}])
    moves = []
    for step in range(40):
        parts = [factors([4, 0, 7], 3, 8, 10 * step + i) for i in range(n_batches)]
        for part in parts:
            part.x_BD[:, :2] *= before if step < 20 else 1e-3 if step == 20 else 1.0
        moves.append(step_of(weight, optimizer, parts, scale))
    assert 0.5 < max(moves) <= label_level.BOUND
    assert sorted(moves)[20] < 5


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_row_that_comes_late_moves_no_weight_far(size):
    """Rows whose first gradient comes when the features have a history, and is smaller or larger
    than all before.
    """
    weight = torch.nn.Parameter(torch.zeros(9, 3, 8))
    optimizer = RowAdam([{"params": [weight], "lr": 1e-2}])
    for step in range(30):
        step_of(weight, optimizer, [factors([4, 0, 7], 3, 8, step)])
    late = factors([8, 1], 3, 8, 99)
    late.dz_BKF.mul_(size)
    assert 0.5 < step_of(weight, optimizer, [late]) <= label_level.BOUND


def test_another_encoder_behind_the_features_moves_no_weight_far():
    """A frozen encoder is thawed: which features are large changes from one step to the next."""
    weight = torch.nn.Parameter(torch.zeros(9, 3, 8))
    optimizer = RowAdam([{"params": [weight], "lr": 1e-2}])
    sizes_D = 10.0 ** torch.arange(-4, 4)
    for step in range(60):
        part = factors([4, 0, 7], 3, 8, step)
        part.x_BD.mul_(sizes_D if step < 30 else sizes_D.flip(0))
        assert step_of(weight, optimizer, [part]) <= label_level.BOUND


def test_a_gradient_in_a_single_entry_moves_no_weight_far():
    """Two documents that pull a row in opposite directions, and differ in one feature alone."""
    weight = torch.nn.Parameter(torch.zeros(2, 1, 512))
    optimizer = RowAdam([{"params": [weight], "lr": 1e-2}])
    everything = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    for _ in range(10):  # all features have a history, from another row
        step_of(weight, optimizer, [asked([0], torch.ones(16, 1, 1), everything, 2)])
    x_BD = everything[:2].clone()
    x_BD[1] = x_BD[0]
    x_BD[1, 7] += 1
    one = asked([1], torch.tensor([1.0, -1.0]).view(2, 1, 1), x_BD, 2)
    assert 0.01 < step_of(weight, optimizer, [one]) <= label_level.BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_batches", [1, 3])
@pytest.mark.parametrize("shape", [(9, 3, 8), (9, 3)])
def test_a_step_in_place_over_all_clusters_is_the_step_over_those_touched(
    monkeypatch, shape, n_batches, dtype
):
    """With features that are dead and wake up, accumulated batches, and a scaled loss."""
    width = 8 if len(shape) == 3 else 1
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    gathered, in_place = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = []
    for weight in (gathered, in_place):
        optimizers.append(RowAdam([{"params": [weight], "lr": 0.1}]))
    for step in range(10):
        parts = [factors([4, 0, 7], 3, width, 10 * step + i) for i in range(n_batches)]
        for part in parts:
            part.x_BD[:, :2] *= 0.0 if step < 5 else 1.0
            part.dz_BKF.mul_(1024.0)
        # 0.95 of the clusters are enough to take all: three of nine are not. With 0 they are.
        monkeypatch.setattr(label_level, "ENOUGH", {"cpu": 0.95})
        gathered.factors = parts
        optimizers[0].step(scale=1024.0)
        assert parts[0].touched[0] is not None or n_batches > 1
        monkeypatch.setattr(label_level, "ENOUGH", {"cpu": 0.0})
        again = [replace(part) for part in parts]  # which has not asked yet what is touched
        in_place.factors = again
        optimizers[1].step(scale=1024.0)
        assert again[0].touched[0] is None
    untouched = [1, 2, 3, 5, 6, 8]
    # A bfloat16 rounds up or down at random: by up to 1/128 of the weight, in every step.
    tolerance = 1e-5 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(in_place, gathered, rtol=tolerance, atol=tolerance)
    for weight in (in_place, gathered):
        assert torch.equal(weight[untouched], start[untouched])
    for key, value in optimizers[0].state[gathered].items():
        torch.testing.assert_close(optimizers[1].state[in_place][key], value)


def test_a_weight_decay_that_row_adam_would_ignore_is_refused():
    weight = torch.nn.Parameter(torch.zeros(9, 3, 5))
    with pytest.raises(ValueError, match="RowAdam has no weight decay"):
        RowAdam([{"params": [weight], "weight_decay": 0.01}])


def test_a_step_uses_the_gradient_up():
    weight = torch.nn.Parameter(torch.zeros(9, 3, 5))
    optimizer = RowAdam([{"params": [weight]}])
    weight.factors = [factors([1, 4], 3, 5, 0)]
    optimizer.step()
    once = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, once) and once[1].abs().sum() > 0


def test_row_adam_adds_up_what_was_accumulated(monkeypatch):
    """Two batches that share a cluster, of unequal size, are one batch of all their documents."""
    parts = [factors([4, 1, 3], 3, 5, 0), factors([1, 8, 2], 3, 5, 1, n_docs=2)]
    monkeypatch.setattr(label_level, "CHUNK", {"cpu": 3 * 3 * 5})  # three of five clusters
    whole = label_level.one_batch(parts)
    assert whole.touched[0].tolist() == [1, 2, 3, 4, 8]
    torch.testing.assert_close(formed((9, 3, 5), [whole]), formed((9, 3, 5), parts))
    # The gradient that is spread over the clusters says the same.
    spread = torch.einsum("buf,bd->ufd", whole.dz_BUF, whole.x_BD)
    torch.testing.assert_close(spread, formed((9, 3, 5), parts)[[1, 2, 3, 4, 8]])
    results = []
    for gradient in (parts, [whole]):
        weight = torch.nn.Parameter(torch.zeros(9, 3, 5))
        weight.factors = gradient
        RowAdam([{"params": [weight]}]).step()
        results.append(weight.detach())
    torch.testing.assert_close(*results)
    assert results[0][1].abs().sum() > 0


@pytest.mark.parametrize("n_batches", [1, 3])
def test_what_is_said_of_a_gradient_from_its_factors_is_true(n_batches):
    parts = [factors([4, 1], 3, 5, seed) for seed in range(n_batches)]
    whole = formed((9, 3, 5), parts)
    gradient = label_level.one_batch(parts)
    clusters_U, _ = gradient.touched
    dz_BUF = gradient.dz_BUF
    x_BD = gradient.x_BD
    dz_BR = dz_BUF.flatten(1)
    of_features = label_level.squares_of_features(dz_BUF, x_BD)
    torch.testing.assert_close(of_features, whole.square().sum((0, 1)))
    of_rows = label_level.squares_of_rows(dz_BR, x_BD @ x_BD.T)
    torch.testing.assert_close(of_rows, whole[clusters_U].square().sum(2).flatten())
    largest_R = whole[clusters_U].abs().amax(2).flatten()
    assert (label_level.bound_of_rows(dz_BR, x_BD) >= largest_R * (1 - 1e-6)).all()


def test_a_frozen_head_gathers_no_gradients():
    weight, bias, x = torch.zeros(9, 3, 5), torch.zeros(9, 3), torch.randn(2, 5, requires_grad=True)
    label_level.ShortlistProduct.apply(
        x, weight, bias, torch.tensor([[0, 1], [1, 8]])
    ).sum().backward()
    assert not hasattr(weight, "factors") and not hasattr(bias, "factors") and x.grad is not None


def test_what_the_loss_was_multiplied_by_does_not_matter():
    results = []
    for scale in (1.0, 65536.0):
        weight = torch.nn.Parameter(torch.zeros(9, 3, 5))
        optimizer = RowAdam([{"params": [weight]}])
        for i in range(2):  # and may change from step to step
            part = factors([4, 1], 3, 5, i)
            weight.factors = [replace(part, dz_BKF=part.dz_BKF * scale ** (1 - i))]
            optimizer.step(scale=torch.tensor(scale ** (1 - i)))
        results.append(weight.detach())
    assert torch.equal(*results)


def test_bf16_keeps_small_updates_only_when_rounded_stochastically():
    """A thousand steps of 1e-4 from 1: rounded to the nearest not one is kept, at random all are,
    on average.
    """
    nearest, stochastic = torch.ones(2, 2, 4096).bfloat16()
    torch.manual_seed(0)
    for _ in range(1000):
        nearest = (nearest.float() - 1e-4).bfloat16()
        stochastic = round_stochastically(stochastic.float() - 1e-4)
    assert (nearest == 1).all()
    assert stochastic.float().mean().item() == pytest.approx(0.9, abs=0.002)
    exact = torch.randn(4096).bfloat16()
    assert torch.equal(round_stochastically(exact.float()), exact)


def test_row_adam_trains_bf16_rows_below_their_resolution():
    weight = torch.nn.Parameter(torch.ones(4, 3, 256, dtype=torch.bfloat16))
    optimizer = RowAdam([{"params": [weight], "lr": 1e-4}])
    torch.manual_seed(0)
    for _ in range(500):
        weight.factors = [asked([2], torch.ones(1, 1, 3), torch.ones(1, 256), 4)]
        optimizer.step()
    assert (
        weight[2].float().mean().item() == pytest.approx(0.95, abs=0.005)
        and (weight[[0, 1, 3]] == 1).all()
    )
    state = optimizer.state[weight]
    assert {state["rows"].dtype, state["features"].dtype} == {torch.float32}
