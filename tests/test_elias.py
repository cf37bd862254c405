"""variants/elias.py and edges.py: the index against loops in plain Python, and a small training."""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT, stages
from scipy.sparse import csc_matrix

from plumbing.errors import UserError
from plumbing.store import load_npz, load_pt, save_pt

if not (ROOT / "variants").is_dir():
    pytest.skip("variants/ has been deleted", allow_module_level=True)
from variants import common, edges, elias


def made(run, b: int, seed: int = 0):
    """(an ELIAS with random weights and random strengths on the tree's edges, data, settings)."""
    data = stages.data.load(run)
    config = common.cascade_settings(run, run, topk=str(b), layers="")
    model = elias.build(data, stages.tree.load(run), config).eval()
    generator = torch.Generator().manual_seed(seed)
    for head in model.heads:
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
    return model, data, config


def random_edges(model, spread: float = 3.0, shortest: int = 3) -> None:
    """Rows of different labels, some of them short, with random strengths."""
    rng = np.random.default_rng(0)
    n_clusters, n_edges = model.edge_CE.shape
    for c in range(n_clusters):
        model.edge_CE[c] = torch.from_numpy(rng.permutation(model.n_labels)[:n_edges])
        model.edge_CE[c, rng.integers(shortest, n_edges) :] = -1
    torch.nn.init.normal_(model.theta_CE, std=spread, generator=torch.Generator().manual_seed(0))
    model.update_parents()


def scores_of_clusters(model, batch) -> list[list[float]]:
    """s of each document and cluster, in plain form."""
    x_BD = model.features(batch)[1]
    z_BC = x_BD @ model.heads[0].weight[0].T + model.heads[0].bias[0]
    rows = []
    for z_C in z_BC.tolist():
        whole = sum(math.exp(z) for z in z_C)
        rows.append([min(1.0, model.topk[0] * math.exp(z) / whole) for z in z_C])
    return rows


def strengths(model) -> list[dict[int, float]]:
    """For each cluster {label: a}, in plain form."""
    rows = []
    for labels, thetas in zip(model.edge_CE.tolist(), model.theta_CE.tolist(), strict=True):
        weights = {
            label: math.exp(theta)
            for label, theta in zip(labels, thetas, strict=True)
            if label >= 0
        }
        whole = sum(weights.values())
        beta = elias.BETA * model.slots
        rows.append({label: min(1.0, beta * w / whole) for label, w in weights.items()})
    return rows


def best_paths(model, s_C: list[float], beam: list[int]) -> dict[int, float]:
    """{label: q} of one document: the maximum over the clusters of a beam."""
    a = strengths(model)
    q = {}
    for c in beam:
        for label, strength in a[c].items():
            q[label] = max(q.get(label, 0.0), s_C[c] * strength)
    return q


def p_of(model, x_D, label: int, q: float) -> float:
    z = (model.heads[1].weight[label, 0] @ x_D + model.heads[1].bias[label, 0]).item()
    return q / (1 + math.exp(-z))


def labels_of(batch) -> list[list[int]]:
    rows = [[] for _ in batch.ids_BT]
    for doc, label in zip(batch.doc_P.tolist(), batch.label_P.tolist(), strict=True):
        rows[doc].append(label)
    return rows


# 1. The index.


def test_a_fixed_tree_gives_the_labels_of_the_best_clusters(done):
    """Strengths that start alike on the tree's edges are all 1: q is the score of the cluster."""
    model, data, _ = made(done, b=2)
    batch = data.batch("train", np.arange(9), 32)
    x_BD = model.features(batch)[1]
    s_BC = scores_of_clusters(model, batch)
    labels_BK, log_p_BK = model.predict(batch, model.scored)
    for b in range(9):
        best = sorted(range(8), key=lambda c, s=s_BC[b]: -s[c])[:2]
        expected = {}
        for c in best:
            for label in model.slot_to_label.view(8, -1)[c].tolist():
                if label >= 0:
                    expected[label] = p_of(model, x_BD[b], label, s_BC[b][c])
        found = dict(zip(labels_BK[b].tolist(), log_p_BK[b].exp().tolist(), strict=True))
        found.pop(-1, None)
        assert found == pytest.approx(expected, rel=1e-4)


def test_with_all_clusters_and_all_labels_the_prediction_is_p(done):
    model, data, _ = made(done, b=8)
    random_edges(model)
    batch = data.batch("train", np.arange(9), 32)
    x_BD = model.features(batch)[1]
    labels_BK, log_p_BK = model.predict(batch, 40)
    for b, s_C in enumerate(scores_of_clusters(model, batch)):
        q = best_paths(model, s_C, list(range(8)))
        expected = {label: p_of(model, x_BD[b], label, q[label]) for label in q}
        found = dict(zip(labels_BK[b].tolist(), log_p_BK[b].exp().tolist(), strict=True))
        found.pop(-1, None)
        assert found == pytest.approx(expected, rel=1e-4)
        assert (log_p_BK[b].diff() <= 0).all()


def test_q_is_the_best_path_through_the_beam(done):
    model, data, _ = made(done, b=3)
    random_edges(model)
    batch = data.batch("train", np.arange(9), 32)
    log_s_BC = model.log_s(model.features(batch)[1])
    beam_Bb = model.beam_of(log_s_BC, None)
    q_BL = model.log_q(log_s_BC, beam_Bb).exp()
    for b, s_C in enumerate(scores_of_clusters(model, batch)):
        assert sorted(s_C)[-3:] == pytest.approx(sorted(s_C[c] for c in beam_Bb[b].tolist()))
        expected = best_paths(model, s_C, beam_Bb[b].tolist())
        for label in range(40):
            assert q_BL[b, label].item() == pytest.approx(expected.get(label, 0.0), rel=1e-4)


def test_scores_and_strengths_are_bounded(done):
    model, data, _ = made(done, b=3)
    random_edges(model)
    batch = data.batch("train", np.arange(9), 32)
    log_s_BC = model.log_s(5 * model.features(batch)[1])
    s_BC = log_s_BC.exp()
    a_CE = model.log_a().exp()
    q_BL = model.log_q(log_s_BC, model.beam_of(log_s_BC, None)).exp()
    assert (s_BC.sum(1) <= 3 + 1e-5).all()
    assert (a_CE.sum(1) <= elias.BETA * model.slots + 1e-4).all()
    for values in (s_BC, a_CE, q_BL):
        assert values.min() >= 0 and values.max() == 1
    assert (a_CE[model.edge_CE < 0] == 0).all()


def test_clusters_that_hold_all_labels_alike_hold_them_all_by_beta_over_L(done):
    model, data, _ = made(done, b=8)
    # Rows as wide as there are labels.
    model.edge_CE = torch.arange(40).repeat(8, 1)
    model.theta_CE = torch.nn.Parameter(torch.zeros(8, 40))
    batch = data.batch("train", np.arange(9), 32)
    log_s_BC = model.log_s(model.features(batch)[1])
    q_BL = model.log_q(log_s_BC, model.beam_of(log_s_BC, None)).exp()
    for b, s_C in enumerate(scores_of_clusters(model, batch)):
        a = min(1.0, elias.BETA * model.slots / 40)
        torch.testing.assert_close(q_BL[b], torch.full((40,), max(s_C) * a))


def test_a_label_belongs_to_the_cluster_that_holds_it_most(done):
    model, _, _ = made(done, b=2)
    random_edges(model)
    a = strengths(model)
    for label in range(40):
        holds = [row.get(label, 0.0) for row in a]
        if max(holds) > 0:
            assert holds[int(model.parent_L[label])] == pytest.approx(max(holds), rel=1e-5)


# 2. Training.


def test_correct_clusters_go_first_in_training(done):
    model, data, _ = made(done, b=1)
    model.heads[0].bias.data[0, 0] = 50.0  # everybody's favourite
    batch = data.batch("train", np.arange(30), 32)
    log_s_BC = model.log_s(model.features(batch)[1])
    beam_Bb = model.beam_of(log_s_BC, batch)
    assert beam_Bb.shape == (30, 1 + elias.MORE)
    assert (model.beam_of(log_s_BC, None) == 0).all()
    for b, labels in enumerate(labels_of(batch)):
        assert {int(model.parent_L[label]) for label in labels} <= set(beam_Bb[b].tolist())


def test_the_loss_is_cross_entropy_of_p_and_the_pull_on_q(done):
    """By loops. Correct labels that the beam reaches are in the shortlist, whatever their q."""
    model, data, _ = made(done, b=1)
    # No strength is at the bound: no two labels have the same q.
    random_edges(model, spread=0.1, shortest=20)
    assert (model.log_a() < 0).all()
    model.pull = 3.0
    batch = data.batch("train", np.arange(9), 32)
    # A correct label that no cluster holds cannot be reached.
    model.edge_CE[model.edge_CE == batch.label_P[0]] = -1
    x_BD = model.features(batch)[1]
    beam_Bb = model.beam_of(model.log_s(x_BD), batch)
    (of_p, of_q), missed = model.loss(batch)
    expected_p, expected_q, expected_missed = 0.0, 0.0, 0
    for b, s_C in enumerate(scores_of_clusters(model, batch)):
        q = best_paths(model, s_C, beam_Bb[b].tolist())
        correct = labels_of(batch)[b]
        reached = [label for label in correct if label in q]
        expected_missed += len(correct) - len(reached)
        wrong = sorted((label for label in q if label not in correct), key=lambda x, q=q: -q[x])
        for label in reached:
            expected_p -= math.log(p_of(model, x_BD[b], label, q[label]))
            expected_q -= math.log(q[label]) / len(reached)
        for label in wrong[: model.scored - len(reached)]:
            expected_p -= math.log(1 - p_of(model, x_BD[b], label, q[label]))
    assert of_p.item() == pytest.approx(expected_p / 9, rel=1e-4)
    assert of_q.item() == pytest.approx(3 * expected_q / 9, rel=1e-4)
    assert missed == expected_missed > 0


def test_strengths_learn_only_in_the_beam_and_below_the_bound(done):
    model, data, _ = made(done, b=2)
    random_edges(model)
    batch = data.batch("train", np.arange(2), 32)
    log_s_BC = model.log_s(model.features(batch)[1])
    beam_Bb = model.beam_of(log_s_BC, None)
    log_q_BL = model.log_q(log_s_BC, beam_Bb)
    log_q_BL[log_q_BL > -torch.inf].sum().backward()
    in_beam_C = torch.zeros(8, dtype=torch.bool)
    in_beam_C[beam_Bb.flatten()] = True
    gradient_C = model.theta_CE.grad.abs().sum(1)
    assert (gradient_C[~in_beam_C] == 0).all() and (gradient_C[in_beam_C] > 0).all()
    # Nothing flows through an edge at the bound: the gradient of its own strength is 0.
    model.theta_CE.grad = None
    a_CE = model.log_a()
    assert (a_CE == 0).any()
    a_CE[a_CE == 0].sum().backward()
    assert (model.theta_CE.grad == 0).all()
    # Nor through a cluster at the bound.
    model.heads[0].bias.data[0, 0] = 50.0
    log_s_BC = model.log_s(model.features(batch)[1])
    assert (log_s_BC[:, 0] == 0).all()
    model.zero_grad()
    log_s_BC[:, 0].sum().backward()
    assert (model.heads[0].weight.grad == 0).all()


def test_stage_2_moves_encoder_and_clusters_slowly_and_frozen_strengths_not_at_all(done):
    model, _, _ = made(done, b=2)

    def rates() -> dict[str, float]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = model.param_groups(1.0, 0.1)
        return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}

    first = rates()
    model.is_slow = True
    model.theta_CE.requires_grad_(False)
    second = rates()
    assert set(first) - set(second) == {"theta_CE"} and first["theta_CE"] == 1.0
    for name, rate in second.items():
        share = {"encoder": 0.3, "heads.0": 0.1}
        expected = next((s for start, s in share.items() if name.startswith(start)), 1.0)
        assert rate == pytest.approx(first[name] * expected)


# 3. From the tree to the edges.


def test_a_cluster_keeps_its_own_labels_and_its_largest_counts():
    rng = np.random.default_rng(0)
    together_LC = rng.random((12, 3)) * (rng.random((12, 3)) < 0.6)
    tree_CF = rng.permutation(12).reshape(3, 4)
    tree_CF[1, 3] = -1
    edge_CE, is_kept_L = edges.strongest_edges(csc_matrix(together_LC), tree_CF, 6)
    kept = set()
    for c in range(3):
        row = [label for label in edge_CE[c].tolist() if label >= 0]
        assert len(set(row)) == len(row)
        own = {label for label in tree_CF[c].tolist() if label >= 0}
        counted = [label for label in range(12) if together_LC[label, c] > 0]
        by_count = sorted(counted, key=lambda label, c=c: -together_LC[label, c])
        others = [label for label in by_count if label not in own]
        assert set(row) == own | set(others[: 6 - len(own)])
        kept |= set(by_count[:6])
    assert set(np.flatnonzero(is_kept_L)) == kept


def test_edges_come_from_the_beams_of_the_training_documents(done):
    """No teacher; Y^T S by loops."""
    model, data, config = made(done, b=3)
    model.edge_CE = model.edge_CE[:, :8].clone()
    model.theta_CE = torch.nn.Parameter(torch.ones(8, 8))
    train = data.splits["train"]
    batch = data.batch("train", np.arange(len(train)), 32)
    together_LC = np.zeros((40, 8))
    for s_C, labels in zip(scores_of_clusters(model, batch), labels_of(batch), strict=True):
        for c in sorted(range(8), key=lambda c, s=s_C: -s[c])[:3]:
            for label in labels:
                together_LC[label, c] += s_C[c]
    tree_CF = model.slot_to_label.view(8, -1).numpy()
    expected, is_kept_L = edges.strongest_edges(csc_matrix(together_LC), tree_CF, 8)
    alone = edges.find_edges(model, data, config)
    for row, found in zip(expected.tolist(), model.edge_CE.tolist(), strict=True):
        assert set(row) == set(found)
    assert alone == (~is_kept_L).sum()
    assert set(model.edge_CE.flatten().tolist()) >= set(range(40))
    assert (model.theta_CE == 0).all()


def test_label_classifiers_start_at_their_frequency_below_their_cluster(done):
    model, data, _ = made(done, b=3)
    train = data.splits["train"]
    batch = data.batch("train", np.arange(len(train)), 32)
    edges.start_labels(model, train)
    edges.start_clusters(model, train)
    rows = labels_of(batch)
    below = [{int(model.parent_L[label]) for label in labels} for labels in rows]
    for label in range(40):
        n = sum(label in labels for labels in rows)
        within = sum(int(model.parent_L[label]) in clusters for clusters in below)
        expected = math.log((n + 0.5) / (within - n + 0.5))
        assert model.heads[1].bias[label].item() == pytest.approx(expected, abs=1e-5)
    assert (model.heads[1].weight == 0).all()
    # A softmax of the clusters' biases is their share.
    n_C = torch.tensor([sum(c in clusters for clusters in below) + 0.5 for c in range(8)])
    torch.testing.assert_close(model.heads[0].bias[0].softmax(0), n_C / n_C.sum())


# 4. The whole of it.


def run_with(done, folder, **changes):
    """A run of the cascade with other settings than it was trained with itself."""
    for name in ("data.npz", "tree.npz"):
        (folder / name).write_bytes((done / name).read_bytes())
    stages.data.load(folder)
    stages.tree.load(folder)
    content, _ = load_pt(done / "model.pt")
    content["config"] |= changes
    config = stages.train.Config(run=str(folder))
    made_from = ("data.npz", "tree.npz")
    save_pt(folder / "model.pt", config, content, made_from, stage="04_train.py")
    return folder


def test_it_learns_and_is_loaded_as_it_was(tmp_path, done):
    run = run_with(done, tmp_path, epochs=15, lr=0.03, dropout="0.1")
    elias.run(elias.Config(run=str(run), b=3))
    out = run / "elias"
    arrays, _ = load_npz(out / "predictions.npz")
    data = stages.data.load(out)
    hit_Nk = stages.train.hits(arrays["labels"], data.splits["test"])
    # Of 40 labels that are equally frequent: chance would be 0.05.
    assert hit_Nk[:, 0].mean() > 0.6
    model, config, ranking = stages.train.load(out, data, elias.build)
    assert ranking == elias.NAME and (model.theta_CE != 0).any()

    def predict(batch, k):
        labels, scores = model.predict(batch, k)
        return {"labels": labels.numpy(), "scores": scores.exp().numpy()}

    again = stages.train.predict_split(model.eval(), data, "test", config.max_len, 32, predict, 100)
    np.testing.assert_array_equal(again["labels"], arrays["labels"])
    np.testing.assert_allclose(again["scores"], arrays["scores"], rtol=1e-4)


@pytest.mark.parametrize("which", ["alike", "tree", "once"])
def test_the_rivals_have_strengths_that_do_not_learn(tmp_path, done, which):
    """And the cascade's start: with heads first, features are centred."""
    half = which == "tree"  # label weights in half the memory
    run = run_with(done, tmp_path, epochs=3, head_epochs=1, label_bf16=half)
    elias.run(elias.Config(run=str(run), b=3, edges=which, shuffle=True))
    out = run / f"elias-{which}-shuffle"
    model, _, _ = stages.train.load(out, stages.data.load(out), elias.build)
    assert (model.theta_CE == 0).all()
    assert (model.center_HD != 0).any()
    assert (model.heads[1].weight.dtype == torch.bfloat16) == half
    # The tree's edges, and only where edges are found others behind them.
    assert torch.equal(model.edge_CE[:, : model.slots], model.slot_to_label.view(8, -1))
    assert (model.edge_CE[:, model.slots :] >= 0).any() == (which == "alike")
    # A random tree has the labels of the run's tree, elsewhere.
    slots = stages.tree.load(run).slot_to_label
    shuffled = model.slot_to_label.numpy()
    assert sorted(slots) == sorted(shuffled) and (slots != shuffled).any()


@pytest.mark.parametrize("change", [{"edges": "none"}, {"pull": -1.0}, {"pull": float("nan")}])
def test_settings_that_mean_nothing_are_refused(tmp_path, change):
    with pytest.raises(UserError, match="expected"):
        elias.run(elias.Config(run=str(tmp_path), **change))


def test_too_few_passes_are_refused(tmp_path, done):
    run = run_with(done, tmp_path, epochs=1)
    with pytest.raises(UserError, match="too few"):
        elias.run(elias.Config(run=str(run)))
