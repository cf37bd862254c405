"""Stage 3: index arithmetic, loss and gradients against dense brute force; every encoder family;
the full beam.
"""

from functools import partial

import numpy as np
import pytest
import torch
import transformers
from conftest import gradient, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from plumbing import label_level
from plumbing.errors import UserError

model_stage = stages.model
COUNTS = [1, 4, 16, 48]  # root, two cluster levels, slots: fans 4, 4, 3


def make_tree(seed=0, n_labels=43):
    """43 labels in 48 slots, laid out at random: five slots at the ends of clusters are empty."""
    sizes = np.full(16, 3)
    sizes[np.random.default_rng(seed).permutation(16)[: 48 - n_labels]] = 2
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    order = np.random.default_rng(seed).permutation(n_labels)
    return stages.tree.Tree(stages.tree.lay_out(order, bounds), [4, 16])


def make_model(topk=(2, 5), seed=0, layers=((0,), (1,), (1,)), width=16):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    encoder = model_stage.Encoder(transformers.BertModel(config), "mean", 32)
    model = model_stage.Cascade(
        encoder, make_tree(seed), list(topk), [list(group) for group in layers]
    )
    for head in model.heads:
        torch.nn.init.normal_(head.weight)
        torch.nn.init.normal_(head.bias)
    return model.eval()


def make_batch(seed=0, n=6, labels=None, n_labels=43):
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(5, 50, (n, 7)))
    mask = torch.from_numpy((np.arange(7) < rng.integers(2, 8, n)[:, None]).astype(np.int64))
    if labels is None:  # the last document has none
        labels = [
            sorted(rng.choice(n_labels, rng.integers(1, 5), replace=False)) for _ in range(n - 1)
        ] + [[]]
    doc = torch.tensor([i for i, row in enumerate(labels) for _ in row], dtype=torch.int64)
    label = torch.tensor([int(x) for row in labels for x in row], dtype=torch.int64)
    return stages.data.Batch(ids * mask, mask, doc, label), labels


def positive_nodes(model, labels, n_nodes):
    """[{nodes above a positive label}] by walking over the slots."""
    slots = model.slot_to_label.tolist()
    return [{slots.index(label) * n_nodes // len(slots) for label in row} for row in labels]


@settings(max_examples=40, deadline=None)
@given(
    n_parents=st.integers(1, 9),
    fan=st.integers(1, 4),
    k=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_targets_and_shortlist_equal_brute_force(n_parents, fan, k, seed):
    rng = np.random.default_rng(seed)
    k = min(k, n_parents)
    parents = np.stack([rng.permutation(n_parents)[:k] for _ in range(3)])
    positive = [
        set(rng.choice(n_parents * fan, rng.integers(0, n_parents * fan + 1), replace=False))
        for _ in range(3)
    ]
    # a node may come twice
    pairs = [(b, node) for b in range(3) for node in positive[b] for _ in range(2)]
    doc, node = (torch.tensor([pair[i] for pair in pairs], dtype=torch.int64) for i in (0, 1))
    targets = stages.tree.match(node, doc, torch.from_numpy(parents), fan)
    candidates = stages.tree.expand(torch.from_numpy(parents), fan)
    for b in range(3):
        children = [p * fan + i for p in parents[b] for i in range(fan)]
        assert candidates[b].tolist() == children
        assert targets[b].flatten().tolist() == [float(child in positive[b]) for child in children]
    logits = torch.from_numpy(rng.normal(size=(3, k, fan)))
    m = min(3, k * fan)
    for teacher in (None, targets):
        picked = model_stage.shortlist(logits, teacher, m)
        score = logits.sigmoid().flatten(1) + (0 if teacher is None else teacher.flatten(1))
        for b in range(3):
            best = sorted(range(k * fan), key=lambda c: -float(score[b, c]))[:m]  # noqa: B023
            assert sorted(picked[b].tolist()) == sorted(best)


@pytest.mark.parametrize("wait", [True, False])
@settings(max_examples=30, deadline=None)
@given(n_clusters=st.integers(1, 9), k=st.integers(1, 9), seed=st.integers(0, 999))
def test_the_touched_clusters(wait, n_clusters, k, seed):
    """Each once, those that occur first, found again by place; without waiting as many as there can
    be. Where these are nearly all clusters, None stands for all of them.
    """
    shortlists = torch.from_numpy(np.random.default_rng(seed).integers(0, n_clusters, (3, k)))
    found, place = label_level.touched(shortlists, n_clusters, wait)
    occur = sorted(set(shortlists.flatten().tolist()))
    n_found = len(occur) if wait else min(3 * k, n_clusters)
    if n_found >= label_level.ENOUGH["cpu"] * n_clusters:
        assert found is None
        found = torch.arange(n_clusters)
    else:
        assert len(found) == n_found and found[: len(occur)].tolist() == occur
    assert len(set(found.tolist())) == len(found)
    assert torch.equal(found[place], shortlists)


@pytest.mark.parametrize(("wait", "enough"), [(True, 0.95), (False, 0.95), (True, 0.0)])
def test_a_sparse_head_equals_a_dense_one(wait, enough, monkeypatch):
    monkeypatch.setattr(label_level, "ENOUGH", {"cpu": enough})
    touched = label_level.touched
    monkeypatch.setattr(label_level, "touched", lambda clusters, n, **_: touched(clusters, n, wait))
    monkeypatch.setattr(label_level, "CHUNK", {"cpu": 2 * 3 * 16})  # two clusters at a time
    dense, sparse = (
        model_stage.Head(30, 3, 16).double(),
        model_stage.Head(30, 3, 16, sparse=True).double(),
    )
    torch.nn.init.normal_(dense.weight)
    sparse.load_state_dict(dense.state_dict())
    clusters, grads = torch.tensor([[1, 7, 4], [3, 7, 29]]), {}
    for name, head in (("dense", dense), ("sparse", sparse)):
        x = torch.randn(
            2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        for _ in range(2):  # gradients of several batches add up
            logits = head(x, clusters)
            logits.pow(2).sum().backward()
        grads[name] = (
            logits,
            x.grad,
            *(gradient(parameter) for parameter in (head.weight, head.bias)),
        )
        for b in range(2):
            torch.testing.assert_close(
                logits[b], head.weight[clusters[b]] @ x[b] + head.bias[clusters[b]]
            )
    assert sparse.weight.grad is None and len(sparse.weight.factors) == 2
    for expected, found in zip(grads["dense"], grads["sparse"], strict=True):
        torch.testing.assert_close(found, expected)


def test_both_heads_compute_the_plain_logits_gradients_and_step():
    """Each document gathers its candidates' weights, autograd does the rest, and one step of plain
    gradient descent with the sizes that RowAdam divides by is RowAdam's step."""
    generator = torch.Generator().manual_seed(0)
    clusters = torch.tensor([[1, 7, 4], [3, 7, 29]])
    x = torch.randn(2, 16, generator=generator)
    weight = torch.randn(30, 3, 16, generator=generator)
    bias = torch.randn(30, 3, generator=generator)

    def backward(logits_of):
        feature = x.clone().requires_grad_()
        logits = logits_of(feature)
        logits.sin().sum().backward()
        return logits.detach(), feature.grad

    plain_weight = weight.clone().requires_grad_()
    plain_bias = bias.clone().requires_grad_()
    plain = backward(
        lambda feature: model_stage.plain_logits(feature, plain_weight, plain_bias, clusters)
    )
    for sparse in (False, True):
        head = model_stage.Head(30, 3, 16, sparse=sparse)
        head.load_state_dict({"weight": weight, "bias": bias})
        results = backward(partial(head, clusters_BK=clusters))
        for found, expected in zip(results, plain, strict=True):
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient(head.weight), plain_weight.grad)
        torch.testing.assert_close(gradient(head.bias), plain_bias.grad)
    # One step of RowAdam, in the plain form: in the first step v and f are this step's mean
    # squares.
    g = plain_weight.grad.double()
    v = g.square().mean(2, keepdim=True)
    f = g.square().sum((0, 1))
    scale = (f.mean() / (f + label_level.FLOOR * f.mean())).sqrt()
    expected = weight - 1e-2 * (g * scale / (v.sqrt() + 1e-12)).float()
    label_level.RowAdam([{"params": [head.weight], "lr": 1e-2}]).step()
    torch.testing.assert_close(head.weight.detach(), expected, rtol=1e-4, atol=1e-5)


def test_another_optimiser_refuses_the_weights_of_a_sparse_head():
    head = model_stage.Head(30, 3, 16, sparse=True)
    optimizer = torch.optim.AdamW(head.parameters())
    optimizer.step()  # nothing waits for a step yet
    head(torch.ones(2, 16), torch.tensor([[1], [2]])).sum().backward()
    with pytest.raises(
        RuntimeError, match="AdamW cannot train the weights of a sparse head.*RowAdam"
    ):
        optimizer.step()
    label_level.RowAdam([{"params": list(head.parameters())}]).step()
    optimizer.step()


class Watch(TorchDispatchMode):
    """Notes every operation that makes the computer wait for a GPU, and the size of the largest
    tensor made.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if any(
            part in name
            for part in (
                "_local_scalar_dense",
                "nonzero",
                "unique",
                "masked_select",
                "equal.default",
            )
        ):
            self.waits.append(name)
        old = {x.data_ptr() for x in args if isinstance(x, torch.Tensor) and not x.is_sparse}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if (
                isinstance(tensor, torch.Tensor)
                and not tensor.is_sparse
                and tensor.data_ptr() not in old
            ):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("enough", [0.0, 0.95])
def test_a_step_waits_for_nothing(enough, monkeypatch):
    monkeypatch.setattr(label_level, "ENOUGH", {"cpu": enough})
    touched = label_level.touched
    model, (batch, _) = make_model().train(), make_batch()
    optimizer = label_level.RowAdam([{"params": list(model.heads[2].parameters())}])
    monkeypatch.setattr(
        label_level, "touched", lambda clusters, n, **_: touched(clusters, n, wait=False)
    )
    for n_batches in (1, 2):
        with Watch() as watch:
            for _ in range(n_batches):
                model.loss(batch)[0].sum().backward()
            optimizer.step()
        assert watch.waits == []
    monkeypatch.setattr(label_level, "touched", touched)
    with Watch() as watch:
        model.loss(batch)
    assert watch.waits == ["aten._unique2.default"]  # on a CPU, to know how many are touched


def test_a_step_makes_nothing_as_big_as_the_touched_clusters(monkeypatch):
    monkeypatch.setattr(label_level, "CHUNK", {"cpu": 4 * 3 * 256})
    head = model_stage.Head(500, 3, 256, sparse=True)
    clusters = torch.stack([torch.randperm(20)[:16] for _ in range(6)])
    optimizer = label_level.RowAdam([{"params": list(head.parameters())}])
    with Watch() as watch:
        head(torch.randn(6, 256, requires_grad=True), clusters).sum().backward()
        optimizer.step()
    # a part of the touched clusters, not (U, F, D), (B, K, F, D) or (C, F, D)
    assert watch.largest == 4 * 3 * 256


def dense_loss(model, batch, labels):
    """One-vs-all over all nodes of every level, masked by sets: candidates are chosen one document
    at a time.
    """
    features, total = model.features(batch), []
    for t, head in enumerate(model.heads):
        logits = features[t] @ head.weight.flatten(0, 1).T + head.bias.flatten()
        positive = positive_nodes(model, labels, COUNTS[t + 1])
        if t == 0:
            chosen = [{0}] * len(labels)
        fan, loss, kept = COUNTS[t + 1] // COUNTS[t], 0.0, []
        for b in range(len(labels)):
            candidates = [c * fan + i for c in sorted(chosen[b]) for i in range(fan)]
            for node in candidates:
                if t < 2 or model.slot_to_label[node] >= 0:
                    y = logits.new_tensor(float(node in positive[b]))
                    loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(
                        logits[b, node], y
                    )
            if t < 2:
                key = {
                    node: float(logits[b, node].detach().sigmoid()) + (node in positive[b])
                    for node in candidates
                }
                kept.append(set(sorted(candidates, key=lambda node: -key[node])[: model.topk[t]]))  # noqa: B023
        chosen = kept
        total.append(loss / len(labels))
    return torch.stack(total)


@pytest.mark.parametrize("topk", [(2, 5), (1, 2), (4, 16)])
def test_loss_and_gradients_equal_a_dense_masked_one_vs_all(topk):
    model = make_model(topk).double()
    batch, labels = make_batch()
    losses, _ = model.loss(batch)
    expected = dense_loss(model, batch, labels)
    torch.testing.assert_close(losses, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    theirs = torch.autograd.grad(expected.sum(), parameters, allow_unused=True)
    losses.sum().backward()
    for ours, reference in zip(map(gradient, parameters), theirs, strict=True):
        assert (ours is None) == (reference is None)
        if ours is not None:
            torch.testing.assert_close(ours, reference)


def test_positives_are_always_among_the_candidates_unless_they_exceed_k():
    model = make_model((4, 8))
    batch, labels = make_batch()
    for level, count in zip(
        model.descend(model.features(batch), batch, teacher=True), COUNTS[1:], strict=True
    ):
        assert level.targets_BKF.sum((1, 2)).tolist() == [
            len(nodes) for nodes in positive_nodes(model, labels, count)
        ]
    assert model.loss(batch)[1] == 0
    model = make_model((1, 2))
    many, labels = make_batch(labels=[[0, 1, 2, 3, 4, 5, 6, 7]] + [[]] * 5)
    first = len(positive_nodes(model, labels, 4)[0])
    second = next(
        level for t, level in enumerate(model.descend(model.features(many), many, True)) if t == 1
    )
    assert model.loss(many)[1] == first - 1 + max(0, int(second.targets_BKF.sum()) - 2) > 0


def test_the_full_beam_equals_scoring_every_label():
    model, (batch, _) = make_model((4, 16)), make_batch()
    for ranking in model_stage.RANKINGS:
        for chunk in (3, 16, 100):
            exact = stages.eval.predict_exact(model, batch, 43, ranking, chunk)
            beam = model.predict(batch, 43, ranking)
            assert torch.equal(exact[0], beam[0])
            torch.testing.assert_close(exact[1], beam[1])
    # And both equal a dense product of everything.
    features = model.features(batch)
    logits = features[2] @ model.heads[2].weight.flatten(0, 1).T + model.heads[2].bias.flatten()
    best = logits.masked_fill(model.slot_to_label < 0, -torch.inf).argmax(1)
    assert torch.equal(model.predict(batch, 1, "label")[0][:, 0], model.slot_to_label[best])


def test_rankings_are_products_along_the_path():
    model, (batch, _) = make_model((4, 16)), make_batch()
    labels, scores, kept = model.beam(batch)
    features = model.features(batch)
    logp = [
        torch.nn.functional.logsigmoid(x @ h.weight.flatten(0, 1).T + h.bias.flatten())
        for x, h in zip(features, model.heads, strict=True)
    ]
    assert [k.shape[1] for k in kept] == [4, 16]
    for b in range(3):
        for place, label in enumerate(labels[b].tolist()):
            if label < 0:
                assert scores["path"][b, place] == -torch.inf
                continue
            slot = int(model.label_to_slot[label])
            parts = [logp[2][b, slot], logp[1][b, slot // 3], logp[0][b, slot // 12]]
            for ranking, n in (("label", 1), ("parent", 2), ("path", 3)):
                torch.testing.assert_close(scores[ranking][b, place], sum(parts[:n]))


def test_empty_slots_get_no_gradient_and_are_never_predicted():
    model, (batch, _) = make_model((4, 16)), make_batch()
    with torch.no_grad():
        model.heads[2].bias.flatten()[model.slot_to_label < 0] = 100.0
    losses, _ = model.loss(batch)
    assert torch.isfinite(losses).all()
    losses.sum().backward()
    empty = model.slot_to_label < 0
    assert empty.sum() == 5
    assert (gradient(model.heads[2].weight).flatten(0, 1)[empty] == 0).all()
    assert (gradient(model.heads[2].bias).flatten()[empty] == 0).all()
    assert (gradient(model.heads[2].bias).flatten()[~empty] != 0).all()
    for labels, scores in (
        model.predict(batch, 48),
        stages.eval.predict_exact(model, batch, 48, "path"),
    ):
        assert (labels[:, :43] >= 0).all() and (labels[:, 43:] == -1).all()
        assert (scores[:, 43:] == -torch.inf).all()
        assert all(sorted(row) == list(range(43)) for row in labels[:, :43].tolist())


def test_a_batch_without_any_labels_trains():
    model, (batch, _) = make_model(), make_batch(labels=[[]] * 6)
    losses, surplus = model.loss(batch)
    losses.sum().backward()
    assert (
        torch.isfinite(losses).all() and surplus == 0 and model.heads[0].weight.grad.abs().sum() > 0
    )


def test_one_batch_is_learnt_by_heart():
    model, (batch, labels) = (
        make_model((2, 8)).train(),
        make_batch(labels=[[0, 7], [1], [2, 30, 41], [3], [4], [5]]),
    )
    groups = model.param_groups(1e-2, 1e-2)
    optimizers = [
        torch.optim.AdamW([group for group in groups if not group["rows"]]),
        label_level.RowAdam([group for group in groups if group["rows"]]),
    ]
    for _ in range(150):
        model.zero_grad()
        model.loss(batch)[0].sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    for ranking in model_stage.RANKINGS:
        predicted, _ = model.eval().predict(batch, 3, ranking)
        for row, mine in zip(predicted.tolist(), labels, strict=True):
            assert set(row[: len(mine)]) == set(mine)


FAMILIES = {
    "BERT": transformers.BertConfig,
    "RoBERTa": transformers.RobertaConfig,
    "DistilBERT": transformers.DistilBertConfig,
    "MPNet": transformers.MPNetConfig,
    "DeBERTa-v2": transformers.DebertaV2Config,
    "ModernBERT": transformers.ModernBertConfig,
    "ELECTRA": transformers.ElectraConfig,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_encoders_of_every_family(family, pooling):
    sizes = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "pad_token_id": 1,
    }
    if family == "DistilBERT":
        sizes = {
            "vocab_size": 60,
            "dim": 16,
            "n_layers": 3,
            "n_heads": 2,
            "hidden_dim": 32,
            "max_position_embeddings": 40,
            "pad_token_id": 1,
        }
    torch.manual_seed(0)
    backbone = transformers.AutoModel.from_config(FAMILIES[family](**sizes)).eval()
    encoder = model_stage.Encoder(backbone, pooling, 30)
    ids = torch.randint(5, 60, (3, 12))
    mask = (torch.arange(12) < torch.tensor([[12], [5], [8]])).long()
    features = encoder(torch.where(mask > 0, ids, 1), mask, {0, 1, 3})
    assert set(features) == {0, 1, 3} and all(x.shape == (3, 16) for x in features.values())
    # A document says the same alone, without padding; and the family's own call gives the hidden
    # state that is read.
    alone = encoder(ids[1:2, :5], mask[1:2, :5], {3})[3]
    torch.testing.assert_close(features[3][1:2], alone, atol=1e-5, rtol=1e-4)
    last = backbone(input_ids=ids[1:2, :5], attention_mask=mask[1:2, :5]).last_hidden_state[0]
    torch.testing.assert_close(
        alone[0], last[0] if pooling == "first" else last.mean(0), atol=1e-5, rtol=1e-4
    )
    model = model_stage.Cascade(encoder, make_tree(), [2, 5], model_stage.choose_layers(3, 3))
    torch.nn.init.normal_(model.heads[2].weight)  # at 0, as they start, heads hand nothing down
    batch, _ = make_batch()
    model.loss(batch)[0].sum().backward()
    assert backbone.get_input_embeddings().weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match="--max-len 41"):
        model_stage.Encoder(backbone, pooling, 41)


def test_a_level_reads_its_hidden_states_side_by_side_or_mapped_to_one_feature():
    encoder = make_model().encoder
    batch, _ = make_batch()
    layers = [[0], [1], [0, 1]]
    hidden = encoder(batch.ids_BT, batch.mask_BT, {0, 1})
    model = model_stage.Cascade(
        encoder, make_tree(), [2, 5], layers, "none", [0.1, 0.0, 0.2]
    ).eval()
    model.center_HD.copy_(torch.randn(2, 16))
    model.scale_H.copy_(torch.tensor([2.0, 3.0]))
    expected = torch.cat(
        [2 * (hidden[0] - model.center_HD[0]), 3 * (hidden[1] - model.center_HD[1])], dim=1
    )
    torch.testing.assert_close(model.features(batch)[2], expected)
    assert [head.weight.shape[2] for head in model.heads] == [16, 16, 32]
    assert [dropout.p for dropout in model.dropout] == [0.1, 0.0, 0.2]
    model.loss(batch)[0].sum().backward()
    assert gradient(model.heads[2].weight).abs().sum() > 0
    mapped = model_stage.Cascade(encoder, make_tree(), [2, 5], layers)
    assert [head.weight.shape[2] for head in mapped.heads] == [16, 16, 16]
    assert mapped.features(batch)[2].shape == (6, 16)
    assert model_stage.rates("0.2", 3) == [0.2] * 3 and model_stage.rates("", 3) is None


def test_positions_start_behind_the_padding_id_in_roberta():
    config = transformers.RobertaConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
        pad_token_id=1,
    )
    backbone = transformers.RobertaModel(config)
    model_stage.Encoder(backbone, "first", 38)(
        torch.full((1, 38), 7), torch.ones(1, 38, dtype=torch.int64), {1}
    )
    with pytest.raises(UserError, match="--max-len 39"):
        model_stage.Encoder(backbone, "first", 39)


@pytest.mark.parametrize(
    ("depth", "levels", "expected"),
    [
        (12, 4, [[5, 6], [8], [10], [12]]),
        (12, 3, [[7, 8], [10], [12]]),
        (6, 3, [[3, 4], [5], [6]]),
        (24, 3, [[15, 16], [20], [24]]),
        (2, 3, [[1], [2], [2]]),
        (1, 3, [[1], [1], [1]]),
        (1, 2, [[1], [1]]),
    ],
)
def test_layers_are_spaced_as_published(depth, levels, expected):
    assert model_stage.choose_layers(depth, levels) == expected


@pytest.mark.parametrize(
    ("topk", "message"),
    [((5, 5), "candidates"), ((1, 5), "candidates"), ((2,), "levels"), ((2, 0), "candidates")],
)
def test_a_shortlist_longer_than_its_candidates_is_refused(topk, message):
    with pytest.raises(UserError, match=message):
        make_model(topk)


def test_layers_that_the_encoder_does_not_have_are_refused():
    with pytest.raises(UserError, match="hidden states between 0 and 1"):
        make_model(layers=((1,), (1,), (2,)))


@pytest.mark.parametrize("n_labels", [1, 2, 3, 9, 31, 100, 5000])
def test_defaults_fit_any_number_of_labels(done, n_labels, monkeypatch):
    """Levels, shortlists and layers that nobody named work from one label up; the encoder is kept
    in float32.
    """
    levels = stages.tree.choose_levels(n_labels)
    bounds = np.array([0, n_labels])
    while len(bounds) - 1 < levels[-1]:
        bounds = stages.tree.halve(bounds)
    tree = stages.tree.Tree(stages.tree.lay_out(np.arange(n_labels), bounds), levels)
    config = model_stage.Config(max_len=16, pooling="mean", tiny="1,24")
    loaded = stages.data.load(done)
    tiny_bert = model_stage.tiny_bert
    monkeypatch.setattr(model_stage, "tiny_bert", lambda *args: tiny_bert(*args).half())
    model = model_stage.build(loaded, tree, config).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    batch, _ = make_batch(labels=[[0], [n_labels - 1], [], [], [], []])
    assert torch.isfinite(model.loss(batch)[0]).all()
    labels, _ = model.predict(batch, n_labels + 3)
    assert (labels[:, -3:] == -1).all()
