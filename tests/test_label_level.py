"""The label level: row-wise Adam against a loop over rows, accumulation, loss scaling, rounding. ShortlistProduct is
tested with the model, in test_model.py."""

import numpy as np
import pytest
import torch
from conftest import formed

import label_level
from label_level import Factors, RowAdam, round_stochastically


def factors(clusters, n_rows, width, seed, n_docs=4):
    """Factors of a gradient for the clusters named, in no order; their last row is without any gradient."""
    rng = torch.Generator().manual_seed(seed)
    dz_BUF = torch.randn(n_docs, len(clusters), n_rows, generator=rng)
    dz_BUF[:, :, -1] = 0
    return Factors(torch.tensor(clusters), dz_BUF, torch.randn(n_docs, width, generator=rng))


@pytest.mark.parametrize(("shape", "decay"), [((9, 3, 5), 0.1), ((9, 3), 0.0)])
def test_row_adam_equals_a_loop_over_rows(monkeypatch, shape, decay):
    monkeypatch.setattr(label_level, "CHUNK", {"cpu": 2 * 3 * 5})  # two clusters at a time
    lr, beta, width = 0.1, 0.9, 5 if len(shape) == 3 else 1
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    weight = torch.nn.Parameter(start.clone())
    optimizer = RowAdam([{"params": [weight], "lr": lr, "weight_decay": decay}], beta=beta)
    expected, history, feature = start.double().view(9, 3, -1), {}, torch.ones(width)
    for seed, clusters in enumerate([[4, 0, 7], [7, 1], [0, 7, 2, 4]]):
        weight.factors = [factors(clusters, 3, width, seed)]
        dense = formed(shape, weight.factors).double().view(9, 3, -1)
        optimizer.step()
        for row in [(cluster, i) for cluster in clusters for i in range(2)]:
            squares = history.setdefault(row, [])
            squares.append(float(dense[row].square().mean()))
            # Adam's second moment without its bias: the weighted mean of the squares so far.
            share = np.array([beta ** (len(squares) - 1 - i) for i in range(len(squares))])
            mean = float((share * squares).sum() / share.sum())
            expected[row] -= lr * (dense[row] / (mean * feature / feature.mean()) ** 0.5 + decay * expected[row])
        # The features' squares are those of the steps before.
        feature = beta * feature * (seed > 0) + dense.square().sum((0, 1))
    torch.testing.assert_close(weight.detach().double().view(9, 3, -1), expected, rtol=1e-5, atol=1e-6)
    untouched = [3, 5, 6, 8]
    assert torch.equal(weight[untouched], start[untouched]) and torch.equal(weight[:, 2], start[:, 2])
    assert [value.numel() for value in optimizer.state[weight].values()] == [54, width]


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
    parts = [factors([4, 1], 3, 5, 0), factors([1, 8, 2], 3, 5, 1, n_docs=2)]
    clusters_U = torch.tensor([1, 2, 4, 8])
    monkeypatch.setattr(label_level, "CHUNK", {"cpu": 3 * 3 * 5})  # three of four clusters
    dz_BUF, x_BD = torch.zeros(6, 4, 3), torch.cat([part.x_BD for part in parts])
    dz_BUF[:4, [2, 0]], dz_BUF[4:, [0, 3, 1]] = parts[0].dz_BUF, parts[1].dz_BUF
    results = []
    for gradient in (parts, [Factors(clusters_U, dz_BUF, x_BD)]):
        weight = torch.nn.Parameter(torch.zeros(9, 3, 5))
        weight.factors = gradient
        clusters, g = zip(*label_level.chunks(gradient, 3), strict=True)
        assert [len(part) for part in clusters] == [len(part) for part in g] == [3, 1]
        found = torch.zeros(9, 3, 5).index_add_(0, torch.cat(clusters), torch.cat(g))
        torch.testing.assert_close(found, formed(weight.shape, parts))
        RowAdam([{"params": [weight]}]).step()
        results.append(weight.detach())
    torch.testing.assert_close(*results)
    assert results[0][1].abs().sum() > 0


def test_a_frozen_head_gathers_no_gradients():
    weight, bias, x = torch.zeros(9, 3, 5), torch.zeros(9, 3), torch.randn(2, 5, requires_grad=True)
    label_level.ShortlistProduct.apply(x, weight, bias, torch.tensor([[0, 1], [1, 8]])).sum().backward()
    assert not hasattr(weight, "factors") and not hasattr(bias, "factors") and x.grad is not None


def test_what_the_loss_was_multiplied_by_does_not_matter():
    results = []
    for scale in (1.0, 65536.0):
        weight = torch.nn.Parameter(torch.zeros(9, 3, 5))
        optimizer = RowAdam([{"params": [weight]}])
        for i in range(2):  # and may change from step to step
            clusters_U, dz_BUF, x_BD = factors([4, 1], 3, 5, i)
            weight.factors = [Factors(clusters_U, dz_BUF * scale ** (1 - i), x_BD)]
            optimizer.step(scale=torch.tensor(scale ** (1 - i)))
        results.append(weight.detach())
    assert torch.equal(*results)


def test_bf16_keeps_small_updates_only_when_rounded_stochastically():
    """A thousand steps of 1e-4 from 1: rounded to the nearest not one is kept, at random all are, on average."""
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
        weight.factors = [Factors(torch.tensor([2]), torch.ones(1, 1, 3), torch.ones(1, 256))]
        optimizer.step()
    assert weight[2].float().mean().item() == pytest.approx(0.95, abs=0.005) and (weight[[0, 1, 3]] == 1).all()
    assert {value.dtype for value in optimizer.state[weight].values()} == {torch.float32}
