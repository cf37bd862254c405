"""variants/inception_xml.py: the paper's shapes and counts, what an attention without gates does,
and which gradient goes where.
"""

import numpy as np
import pytest
import torch
from conftest import HAS_VARIANTS, gradient, run_pipeline, stages

from plumbing.errors import UserError
from plumbing.store import load_npz

if not HAS_VARIANTS:
    pytest.skip("variants/ has been deleted", allow_module_level=True)
from variants import common, inception_xml

W, E, D = inception_xml.W, inception_xml.E, inception_xml.D


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    return run_pipeline(tmp_path_factory.mktemp("cascade"), corpus, epochs=1)


def model_of(run, system="sync_xml", **changes):
    """(an untrained model of the system, its data) on the run's tree."""
    data = stages.data.load(run)
    tree = stages.tree.load(run)
    if system != "sync_xml":
        tree = stages.tree.Tree(tree.slot_to_label[tree.slot_to_label >= 0], [])
    n_levels = len(tree.levels) + 1
    settings = {"topk": "4" if tree.levels else "", "layers": ",".join(["1"] * n_levels)}
    settings |= {"dropout": "0.4", "epochs": 10, "batch_size": 16, "head_epochs": 0} | changes
    config = common.cascade_settings(str(run), run, **settings)
    return inception_xml.builder(system)(data, tree, config), data


def batch_of(data, n=16):
    max_len = W + len(data.meta["prefix"]) + len(data.meta["suffix"])
    return data.batch("train", np.arange(n), max_len)


def test_the_trunk_has_the_papers_shapes_and_parameters():
    trunk = inception_xml.Inception().eval()
    assert sum(parameter.numel() for parameter in trunk.parameters()) == 170_354
    e_BWE = torch.randn(3, W, E)
    for view in trunk.views:
        assert view(e_BWE).shape == (3, W, 75)
    assert trunk(e_BWE, torch.ones(3, W, dtype=torch.bool)).shape == (3, D)
    # Circular: an empty place at the edge sees the other edge, so a shift by a stride is a shift.
    view = trunk.views[1]
    shifted = view(e_BWE.roll(4, dims=2))
    torch.testing.assert_close(shifted, view(e_BWE).roll(1, dims=2))


def test_an_attention_is_the_identity_at_first_and_then_the_formula():
    attention = inception_xml.Attention().double().eval()
    e_BWE = torch.randn(2, W, E, dtype=torch.float64)
    assert torch.equal(attention(e_BWE), e_BWE)
    attention.gates.data = torch.tensor([0.3, 0.7], dtype=torch.float64)
    W1, W2 = attention.words.weight, attention.dimensions.weight
    for e, found in zip(e_BWE, attention(e_BWE), strict=True):
        u = e + 0.3 * (e @ e.T) @ (W1 @ e)
        v = u.T + 0.7 * (u.T @ e) @ (W2 @ u.T)
        torch.testing.assert_close(found, v.T)


def test_words_are_the_pieces_without_special_tokens():
    meta = {"prefix": [2], "suffix": [3], "pad": 0, "vocab_size": 50}
    trunk = inception_xml.Trunk(inception_xml.WordMean(), meta).eval()
    ids = torch.tensor([[2, 11, 12, 13, 3], [2, 21, 3, 0, 0], [2, 3, 0, 0, 0]])
    mask = (torch.arange(5) < torch.tensor([[5], [3], [2]])).long()
    words = trunk.words(ids, mask)
    assert words.shape == (3, W)
    assert [row[row > 0].tolist() for row in words] == [[11, 12, 13], [21], []]
    long = torch.arange(4, 44)[None]
    long[0, 0], long[0, -1] = 2, 3
    assert trunk.words(long, torch.ones_like(long))[0].tolist() == list(range(5, 5 + W))
    # Padding is the vector 0.
    assert trunk.vectors(words)[1, 1:].abs().max() == 0


def test_the_labels_teach_the_trunk_nothing_while_they_only_look(run):
    model, data = model_of(run)
    n_batches = -(-len(data.splits["train"]) // 16)
    assert model.detached == 2 * n_batches
    batch = batch_of(data)
    for head in model.heads:  # they begin as zeros, and send nothing down
        torch.nn.init.normal_(head.weight)
    model.train()
    for n_before, is_learning in ((0, False), (model.detached - 1, False), (model.detached, True)):
        for level in (0, 1):
            model.zero_grad(set_to_none=True)
            model.n_batches.fill_(n_before)
            losses, _ = model.loss(batch)
            assert model.n_batches == n_before + 1
            losses[level].backward()
            norms = [
                float(parameter.grad.norm())
                for name, parameter in model.encoder.named_parameters()
                if parameter.grad is not None and "gates" not in name
            ]
            if level == 1 and not is_learning:
                assert max(norms) == 0
            else:
                # W1 and W2 have no gradient as long as the gates are 0.
                assert sum(norm > 0 for norm in norms) >= len(norms) - 2
    model.eval()
    model.predict(batch, 3)
    assert model.n_batches == model.detached + 1  # prediction is no training


def test_the_mean_does_not_see_the_order_of_words_and_the_trunk_does():
    """The order of words is not irrelevant to InceptionXML: its projection has a weight for each
    place.
    """
    torch.manual_seed(0)
    e_BWE = torch.randn(2, W, E)
    there = torch.ones(2, W, dtype=torch.bool)
    other = e_BWE[:, torch.randperm(W)]
    mean = inception_xml.WordMean().eval()
    torch.testing.assert_close(mean(other, there), mean(e_BWE, there))
    for control in (inception_xml.WordCnn(), inception_xml.Inception()):
        control.eval()
        assert (control(other, there) - control(e_BWE, there)).abs().max() > 1e-2


@pytest.mark.parametrize("with_norm", [True, False])
def test_a_layer_has_a_shortcut_around_it(with_norm):
    layer = inception_xml.Layer(with_norm).eval()
    layer.linear.bias.data.fill_(-1e4)  # whatever comes in, GELU gives 0
    x_BD = torch.randn(3, D)
    torch.testing.assert_close(layer(x_BD), x_BD)


def test_every_cluster_kept_is_every_label_scored(run):
    model, data = model_of(run)
    model.eval()
    for head in model.heads:
        torch.nn.init.normal_(head.weight)
    model.topk = [model.counts[1]]
    batch = batch_of(data)
    labels, scores = model.predict(batch, 5, "parent")
    exact_labels, exact_scores = stages.eval.predict_exact(model, batch, 5, "parent")
    assert torch.equal(labels, exact_labels)
    torch.testing.assert_close(scores, exact_scores)


@pytest.mark.parametrize("system", list(inception_xml.SYSTEMS))
def test_a_batch_can_be_learnt_by_heart(run, system):
    torch.manual_seed(0)
    model, data = model_of(run, system, dropout="0")
    batch = batch_of(data)
    model.detached = 0
    model.train()
    for part in model.modules():  # no randomness
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    groups = model.param_groups(5e-3, 5e-3)
    rows = stages.train.RowAdam([group for group in groups if group["rows"]])
    adam = torch.optim.AdamW([group for group in groups if not group["rows"]])
    assert {group["weight_decay"] for group in groups} == {0.0}
    for _ in range(60):
        losses, _ = model.loss(batch)
        losses.sum().backward()
        adam.step()
        rows.step()
        adam.zero_grad()
    model.eval()
    labels, _ = model.predict(batch, 1, "label")
    correct = set(zip(batch.doc_P.tolist(), batch.label_P.tolist(), strict=True))
    hits = [(i, label) in correct for i, label in enumerate(labels[:, 0].tolist())]
    assert np.mean(hits) == 1


def test_training_from_the_command_line(run, capsys):
    """What stage 5 finds in what was saved is what was trained."""
    for system in ("sync_xml", "word_mean"):
        inception_xml.run(inception_xml.Config(run=str(run), system=system))
        printed = capsys.readouterr().out
        assert "cascade, p(label)" in printed
        out = run / system
        labels = load_npz(out / "predictions.npz")[0]["labels"]
        split = stages.data.load(out).splits["test"]
        hit = stages.train.hits(labels, split)[np.diff(split.label_offsets) > 0]
        # Ten passes over 300 documents find much more than the most frequent labels do.
        assert hit[:, 0].mean() > 0.3
    with pytest.raises(UserError, match="--system fasttext: expected one of sync_xml"):
        inception_xml.run(inception_xml.Config(run=str(run), system="fasttext"))


def test_shuffling_moves_whole_words_and_no_piece_that_is_not_read():
    # Pieces from 100 on go on: words are [1], [2 102 103], [3 104], ...
    goes_on_V = np.arange(200) >= 100
    word_of = {1: [1], 2: [2, 102, 103], 3: [3, 104]}
    text = word_of[1] + word_of[2] + word_of[3] * 20
    ids = np.array(text + word_of[2], np.uint16)
    offsets = np.array([0, len(text), len(text), len(ids)])
    nothing = np.zeros(0, np.int32)
    split = stages.data.Split(ids, offsets, nothing, np.zeros(4, np.int64))
    found = inception_xml.shuffled(split, goes_on_V, seed=0)
    assert found[:W].tolist() != ids[:W].tolist()
    assert sorted(found[:W]) == sorted(ids[:W])
    assert found[W:].tolist() == ids[W:].tolist()
    # Read word by word, there are the same words as before.
    words = found[:W].tolist()
    counts = {1: 0, 2: 0, 3: 0}
    while words:
        first = words[0]
        assert words[: len(word_of[first])] == word_of[first]
        words = words[len(word_of[first]) :]
        counts[first] += 1
    assert counts == {1: 1, 2: 1, 3: 14}


def test_flags_have_a_folder_of_their_own_and_reach_the_model(run):
    flags = {"topk": 3, "detach": 0, "epochs": 1, "shuffle": True}
    inception_xml.run(inception_xml.Config(run=str(run), **flags))
    out = run / "sync_xml-epochs1-topk3-detach0-shuffle"
    plain, other = stages.data.load(run), stages.data.load(out)
    for name in stages.data.SPLITS:
        before, after = plain.splits[name], other.splits[name]
        assert before.ids.tolist() != after.ids.tolist()
        assert before.labels.tolist() == after.labels.tolist()
        for start, end in zip(before.offsets, before.offsets[1:], strict=False):
            assert sorted(before.ids[start:end]) == sorted(after.ids[start:end])
    model, settings, _ = stages.train.load(out, other, inception_xml.builder("sync_xml", 0))
    assert model.topk == [3]
    assert settings.epochs == 1
    assert model.detached == 0


def test_the_gradient_of_the_label_rows_is_that_of_a_dense_head(run):
    """The rows see the feature of their own layer."""
    model, data = model_of(run)
    batch = batch_of(data)
    model.train()
    model.encoder.eval()
    for dropout in model.dropout:
        dropout.p = 0.0
    for layer in model.own_layers:
        layer.eval()
    x_BD = model.features(batch)[1]
    head = model.heads[1]
    *_, level = model.descend(model.features(batch), batch, teacher=True)
    loss = model.level_loss(level.logits_BKF, level.targets_BKF)
    loss.backward()
    dz = (level.logits_BKF.sigmoid() - level.targets_BKF) / len(batch.ids_BT)
    expected = torch.zeros_like(head.weight)
    for clusters, dz_KF, x_D in zip(level.parents_BK, dz, x_BD, strict=True):
        expected.index_add_(0, clusters, dz_KF[..., None] * x_D)
    found = gradient(head.weight)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-5)
