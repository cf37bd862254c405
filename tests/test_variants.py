"""variants/: each against brute force or a closed form, and all of them on a small corpus."""

import dataclasses
import importlib
import re
import shutil

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import HAS_VARIANTS, ROOT, gradient, make_corpus, stages
from scipy.optimize import minimize

from plumbing.cli import parse
from plumbing.errors import UserError
from plumbing.store import load_npz, load_pt, save_pt
from tools import report

if not HAS_VARIANTS:
    pytest.skip("variants/ has been deleted", allow_module_level=True)
from variants import (
    alc,
    common,
    compare,
    elias,
    light_xml,
    one_vs_all,
    ranker,
    staging,
    svm,
    unidec,
    xr_transformer,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the cascade with two cluster levels; the variants are trained inside it."""
    corpus, folder = (
        make_corpus(tmp_path_factory.mktemp("corpus"), n_labels=43),
        tmp_path_factory.mktemp("run"),
    )
    stages.data.run(stages.data.Config(run=str(folder), corpus=str(corpus), vocab=400))
    stages.tree.run(stages.tree.Config(run=str(folder), levels="4,16"))
    stages.train.run(
        stages.train.Config(
            run=str(folder), tiny="2,32", max_len=32, amp="off", epochs=6, batch_size=16, topk="3,6"
        )
    )
    stages.eval.run(stages.eval.Config(run=str(folder), k=20))
    return folder


@pytest.fixture
def model(run):
    """An XR-Transformer with random weights, its data and settings."""
    data, tree = stages.data.load(run), stages.tree.load(run)
    config = common.cascade_settings(run, run, topk="3,3")
    model = xr_transformer.build(data, tree, config)
    generator = torch.Generator().manual_seed(0)
    for head in model.heads:
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
    return model.eval(), data, config


def labels_of(batch):
    rows = [[] for _ in batch.ids_BT]
    for doc, label in zip(batch.doc_P.tolist(), batch.label_P.tolist(), strict=True):
        rows[doc].append(label)
    return rows


def test_one_vs_all_is_every_label_scored(run):
    data = stages.data.load(run)
    config = common.cascade_settings(run, run, topk="", layers="")
    L = len(data.names)
    tree = stages.tree.Tree(np.random.default_rng(0).permutation(L).astype(np.int32), [])
    model = one_vs_all.build(data, tree, config)
    head = model.heads[0]
    torch.nn.init.normal_(head.weight)
    model.eval()
    batch = data.batch("train", np.arange(9), 32)
    x = model.features(batch)[0]
    z = torch.empty(9, L)
    z[:, model.slot_to_label] = x @ head.weight[0].T + head.bias[0]
    y = torch.zeros(9, L)
    y[batch.doc_P, batch.label_P] = 1
    losses, surplus = model.loss(batch)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / 9
    assert losses.shape == (1,) and surplus == 0
    torch.testing.assert_close(losses[0], expected)
    labels, scores = model.predict(batch, 5)
    torch.testing.assert_close(scores, torch.nn.functional.logsigmoid(z).topk(5).values)
    torch.testing.assert_close(labels, z.topk(5).indices)


def test_light_xml_has_one_feature_for_two_levels(run):
    data = stages.data.load(run)
    tree = stages.tree.load(run)._replace(levels=[16])
    config = common.cascade_settings(run, run, topk="6", layers=light_xml.last_five(2))
    model = light_xml.build(data, tree, config).eval()
    assert model.layers == [[1, 2]] * 2 and model.counts[:2] == [1, 16]
    batch = data.batch("train", np.arange(9), 32)
    coarse, fine = model.features(batch)
    assert torch.equal(coarse, fine) and coarse.shape == (9, 32)
    assert model.join[0] is model.join[1] and len({id(p) for p in model.join.parameters()}) == 2
    assert (
        light_xml.last_five(1) == "1,1" and light_xml.last_five(12) == "8+9+10+11+12,8+9+10+11+12"
    )


def test_the_candidates_are_what_is_true_and_what_was_found():
    rng = np.random.default_rng(0)
    found = np.stack([rng.permutation(9)[:3] for _ in range(20)])
    doc = np.sort(rng.integers(0, 20, 30))
    parent = rng.integers(0, 9, 30)
    union = staging.union(found, doc, parent)
    for i in range(20):
        assert sorted(union[i][union[i] >= 0]) == sorted(set(found[i]) | set(parent[doc == i]))
    assert (union == -1).any() and (union >= 0).any(0).all()


def test_teacher_forcing_reaches_every_positive_and_padding_has_no_gradient(model):
    """And the loss is the squared hinge over the candidates, a positive weighted by the document's
    labels below it.
    """
    model, data, config = model
    n = len(data.splits["train"])
    for stage in range(3):
        model.stage = stage
        model.heads.zero_grad()
        parent_L = model.nodes(torch.arange(len(data.names)), stage - 1).numpy()
        above = np.random.default_rng(0).integers(0, model.counts[stage], (n, 2))
        batch = next(staging.Batches(data, config, above, parent_L)(0))
        (loss,), missed = model.loss(batch)
        assert missed == 0
        x, width = model.features(batch)[stage], model.counts[-1] // model.counts[stage + 1]
        fan, expected = model.counts[stage + 1] // model.counts[stage], 0.0
        for b, labels in enumerate(labels_of(batch)):
            below = [int(model.label_to_slot[label]) // width for label in labels]
            for parent in batch.parents_BK[b].tolist():
                for child in range(parent * fan, parent * fan + fan) if parent >= 0 else ():
                    if stage == 2 and model.slot_to_label[child] < 0:
                        continue
                    z = (
                        model.heads[stage].weight.flatten(0, 1)[child] @ x[b]
                        + model.heads[stage].bias.flatten()[child]
                    )
                    w, y = (below.count(child), 1) if child in below else (1, -1)
                    expected += w * max(0.0, 1 - y * z.item()) ** 2
        assert loss.item() == pytest.approx(expected / len(x), rel=1e-4)
        assert stage == 0 or (batch.parents_BK < 0).any()
        loss.backward()
        # Whether there is padding or not makes no difference, and nodes that are nobody's
        # candidates have no gradient.
        found = gradient(model.heads[stage].weight).clone()
        here = torch.zeros(model.counts[stage], dtype=torch.bool)
        here[batch.parents_BK[batch.parents_BK >= 0]] = True
        assert (found[~here] == 0).all() and (found[here] != 0).any()
        more = torch.full((len(x), 4), -1)
        model.heads.zero_grad()
        vars(model.heads[stage].weight).pop("factors", None)
        model.loss(batch._replace(parents_BK=torch.cat([batch.parents_BK, more], 1)))[
            0
        ].sum().backward()
        torch.testing.assert_close(gradient(model.heads[stage].weight), found)


def test_with_all_clusters_and_without_a_teacher_the_last_level_is_one_vs_all(model):
    model, data, _ = model
    batch = data.batch("train", np.arange(5), 32)
    x, head = model.features(batch)[2], model.heads[2]
    everything = torch.arange(model.counts[2]).expand(5, -1)
    z = model.logits(x, everything, 2).flatten(1)
    dense = x @ head.weight.flatten(0, 1).T + head.bias.flatten()
    full = model.slot_to_label >= 0
    torch.testing.assert_close(z[:, full], dense[:, full])
    assert (z[:, ~full] == -torch.inf).all() and (~full).any()


def test_a_full_beam_equals_scoring_every_label(run):
    data, tree = stages.data.load(run), stages.tree.load(run)
    model = xr_transformer.build(data, tree, common.cascade_settings(run, run, topk="4,16")).eval()
    for head in model.heads:  # margins of 1 and more would all score the same
        torch.nn.init.normal_(head.weight, std=0.1)
        torch.nn.init.normal_(head.bias, -1, 0.1)
    batch = data.batch("test", np.arange(6), 32)
    labels, scores = model.predict(batch, 43)
    x, total = model.features(batch), torch.zeros(6, 1)
    for t, head in enumerate(model.heads):
        z = x[t] @ head.weight.flatten(0, 1).T + head.bias.flatten()
        total = total.repeat_interleave(z.shape[1] // total.shape[1], 1) - (1 - z).clamp(min=0) ** 3
    total = total[:, model.slot_to_label >= 0]
    names = model.slot_to_label[model.slot_to_label >= 0]
    torch.testing.assert_close(scores, total.sort(descending=True).values)
    assert torch.equal(labels, names[total.sort(descending=True, stable=True).indices])


def test_what_a_stage_finds_for_the_next(model):
    """match: stage by stage the same nodes as the beam from the root."""
    model, data, config = model
    n, above = len(data.splits["train"]), None
    above = [np.zeros((n, 1), np.int64), np.zeros((n, 1), np.float32)]
    for t in range(2):
        model.stage = t
        above, features = model.match(
            staging.Batches(data, config, above[0], np.zeros(43, np.int64)), above
        )
    rows = np.array([7, 200, 3])
    batch, nodes, scores = (
        data.batch("train", rows, 32),
        torch.zeros(3, 1, dtype=torch.int64),
        torch.zeros(3, 1),
    )
    for t in range(2):
        nodes, scores = model.down(model.features(batch)[t], nodes, scores, t)
    assert (above[0][rows] == nodes.numpy()).all()
    np.testing.assert_allclose(above[1][rows], scores.detach().numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(features[rows], model.features(batch)[1].detach().numpy(), atol=1e-5)


def test_ridge_against_the_normal_equations():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)) + 1
    has = np.pad(rng.random((200, 3)) < (0.3, 0.1, 0.01), ((0, 0), (0, 1)))
    Y = sp.csr_matrix(has * rng.integers(1, 4, (200, 4)))
    w, b = staging.ridge(x, Y, shrink=0.2)
    full = np.append(x, np.ones((200, 1)), axis=1)
    penalty = 0.2 * np.cov(x.T, bias=True).trace() / 5 * 200 * np.diag([1, 1, 1, 1, 1, 0])
    expected = np.linalg.solve(full.T @ full + penalty, full.T @ np.where(Y.toarray() > 0, 1, -1))
    np.testing.assert_allclose(np.append(w, b[:, None], axis=1), expected.T, atol=1e-5)
    assert (w[3] == 0).all() and b[3] == -1


def test_warm_starts():
    rng = np.random.default_rng(0)
    above, x, Y = (
        stages.model.Head(1, 4, 3),
        rng.normal(size=(50, 3)),
        sp.csr_matrix(rng.random((50, 8)) < 0.3),
    )
    torch.nn.init.normal_(above.weight)
    heads = {}
    for way in staging.WARM_STARTS:
        heads[way] = stages.model.Head(4, 2, 3)
        staging.warm_start(way, above, heads[way], x, Y)
    w, b = staging.ridge(x, Y)
    for child in range(8):
        parent, place = divmod(child, 2)
        assert torch.equal(heads["inherit"].weight[parent, place], above.weight[0, parent])
        assert heads["inherit"].bias[parent, place] == above.bias[0, parent]
        np.testing.assert_allclose(heads["linear"].weight[parent, place].detach(), w[child])
        np.testing.assert_allclose(heads["linear"].bias[parent, place].detach(), b[child])
    assert (heads["none"].weight == 0).all()


def test_passes_of_the_stages():
    assert [staging.shares(epochs, 3) for epochs in (3, 5, 13, 26)] == [
        [1, 1, 1],
        [1, 2, 2],
        [3, 4, 6],
        [6, 8, 12],
    ]
    assert staging.shares(4, 1) == [4]
    with pytest.raises(UserError, match="2 epochs give"):
        staging.shares(2, 3)


def svm_objective(w, x, y, c):
    return w @ w / 2 + c * (np.maximum(0, 1 - y * (x @ w)) ** 2).sum()


def svm_problem(seed=0):
    rng = np.random.default_rng(seed)
    words, dense = (
        sp.random(120, 40, 0.1, random_state=seed, format="csr", dtype=np.float32),
        rng.normal(size=(120, 6)),
    )
    dense = np.append(
        dense / np.linalg.norm(dense, axis=1, keepdims=True), np.ones((120, 1)), 1
    ).astype(np.float32)
    positive, mask = rng.random((120, 4)) < (0.5, 0.1, 0.01, 0.0), rng.random((120, 4)) < 0.7
    return words, dense, positive, mask, np.append(words.toarray(), dense, 1).astype(np.float64)


def test_the_ranker_is_a_squared_hinge_svm():
    words, dense, positive, mask, x = svm_problem()
    W = svm.fit(words, dense, positive, mask, 1.5, rounds=50, inner=60, tolerance=1e-4)
    for f in range(4):
        rows, y = mask[:, f], np.where(positive[:, f], 1, -1)[mask[:, f]]
        best = minimize(
            svm_objective, np.zeros(47), (x[rows], y, 1.5), "BFGS", options={"gtol": 1e-7}
        )
        assert svm_objective(W[:, f], x[rows], y, 1.5) <= best.fun * (1 + 1e-4) + 1e-6
    # As it is used, with a looser tolerance, still near.
    loose = svm.fit(words, dense, positive, mask, 1.5)
    for f in range(4):
        rows, y = mask[:, f], np.where(positive[:, f], 1, -1)[mask[:, f]]
        assert (
            svm_objective(loose[:, f], x[rows], y, 1.5)
            <= svm_objective(W[:, f], x[rows], y, 1.5) * 1.02 + 1e-6
        )


def test_the_ranker_agrees_with_liblinear():
    theirs = pytest.importorskip("sklearn.svm", reason="scikit-learn is not installed")
    words, dense, positive, mask, x = svm_problem(1)
    W = svm.fit(words, dense, positive, mask, 1.0, rounds=50, inner=60, tolerance=1e-4)
    for f in range(2):
        rows = mask[:, f]
        found = theirs.LinearSVC(C=1.0, fit_intercept=False, tol=1e-6, max_iter=100000).fit(
            x[rows], positive[rows, f]
        )
        np.testing.assert_allclose(W[:, f], found.coef_[0], atol=2e-3)


def test_every_label_is_ranked_by_its_own_documents_and_shortlists():
    """train() against an SVM made label by label; rerank() against a loop."""
    rng = np.random.default_rng(0)
    words, dense, *_ = svm_problem()
    tree = stages.tree.Tree(np.array([3, 1, -1, 0, 2, 4], np.int32), [2])
    Y = sp.csr_matrix(rng.random((120, 5)) < 0.2)
    split = stages.data.Split(
        np.zeros(0, np.uint16), np.zeros(121, np.int64), Y.indices, Y.indptr.astype(np.int64)
    )
    shortlist = np.stack([rng.permutation(5)[:2] for _ in range(120)])
    shortlist[::7, 1] = -1
    W, E = ranker.train(words, dense, split, shortlist, tree, 1.0)
    for label in range(5):
        rows = Y[:, [label]].toarray().ravel() | (shortlist == label).any(1)
        positive = Y[:, [label]].toarray()[rows]
        alone = svm.fit(words[rows], dense[rows], positive, np.ones_like(positive), 1.0)[:, 0]
        alone[:40] *= np.abs(alone[:40]) >= ranker.DROP
        found = np.append(W[:, [label]].toarray().ravel(), E[:, label])
        np.testing.assert_allclose(found, alone, atol=0.05)
    scores = -np.sort(rng.random((120, 2)), axis=1).astype(np.float32)
    scores[shortlist < 0] = -np.inf
    slack = ranker.slacks(words, dense, shortlist, W, E, chunk=50)
    labels, new = ranker.reorder(shortlist, scores, slack, 0.5)
    margin = words @ W.toarray() + dense @ E
    for i in range(120):
        expected = {
            int(label): score / 2 - max(0, 1 - margin[i, label]) ** 3
            for label, score in zip(shortlist[i], scores[i], strict=True)
            if label >= 0
        }
        order = sorted(expected, key=lambda label: -expected[label])
        assert labels[i].tolist() == order + [-1] * (2 - len(order))
        for label, score in zip(labels[i], new[i], strict=True):
            assert score == (
                pytest.approx(expected[label], rel=1e-4, abs=1e-5) if label >= 0 else -np.inf
            )
    labels, new = ranker.reorder(shortlist, scores, slack, 0.0)  # the SVM alone
    assert ((new == -np.inf) == (labels < 0)).all()
    for i in range(120):
        expected = [max(0, 1 - margin[i, label]) ** 3 for label in labels[i] if label >= 0]
        assert expected == sorted(expected)


def test_all_systems_side_by_side(run, capsys, tmp_path):
    compare.run(compare.Config(run=str(run), documents=30))
    printed = capsys.readouterr().out
    table = printed[printed.index("%, mean of 1 runs") :].splitlines()
    for name, system in compare.SYSTEMS.items():
        folder = system.folder
        rows = [line[44:].split() for line in table if line.startswith(f"{name:44}")]
        # Metrics and costs; below, minus the cascade, three times three.
        assert [len(row) for row in rows] == ([13] if name == "cascade" else [13, 9])
        data = stages.data.load(run / folder)
        labels = load_npz(run / folder / "predictions.npz")[0]["labels"]
        expected = (
            100
            * stages.train.hits(labels[:, :1], data.splits["test"])[
                np.diff(data.splits["test"].label_offsets) > 0
            ].mean()
        )
        assert float(rows[0][0]) == pytest.approx(expected, abs=0.01)
        assert expected > 10  # chance is 2
    n = len(compare.SYSTEMS)
    numbers = re.findall(rf"^\[(\d+) of {n}\] ", printed, re.MULTILINE)
    assert numbers == [str(i + 1) for i in range(n)]
    patterns = ("*.npz", "compare.json")
    made = {path: path.stat().st_mtime_ns for what in patterns for path in run.rglob(what)}
    compare.run(compare.Config(run=f"{run},{run}", documents=30))
    printed = capsys.readouterr().out
    # nothing was trained again
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert f" of {n}]" not in printed
    assert printed.count("+-") == 1 + len(compare.SYSTEMS)
    copy = shutil.copytree(run, tmp_path / "copy")
    changed = load_pt(run / "model.pt")[0]
    load_npz(copy / "data.npz"), load_npz(copy / "tree.npz")
    save_pt(
        copy / "model.pt",
        stages.train.Config(run=str(copy)),
        changed | {"config": changed["config"] | {"epochs": 9}},
        ("data.npz", "tree.npz"),
    )
    stages.eval.run(stages.eval.Config(run=str(copy), k=20))
    with pytest.raises(
        UserError, match="ranker was made from other data, or beside a cascade with other settings"
    ):
        compare.run(compare.Config(run=str(copy)))


def test_chosen_systems_come_in_order_with_what_they_need():
    assert compare.chosen("all") == list(compare.SYSTEMS)
    # Without texts of labels, all but three.
    without = compare.chosen("all", has_texts=False)
    assert set(compare.SYSTEMS) - set(without) == {"Gandalf", "UniDEC", "ALC, reconstructed"}
    # The cascade first, whatever the order asked for.
    assert compare.chosen("light_xml,one_vs_all") == ["cascade", "one-vs-all", "LightXML"]
    # A ranker brings the system that it is run on, and nothing else.
    assert compare.chosen("xr_transformer/ranker") == [
        "cascade",
        "XR-Transformer, neural only",
        "XR-Transformer + ranker",
    ]
    assert compare.chosen("ranker") == ["cascade", "cascade + ranker"]
    for unknown in ("astec", "", "one_vs_all,"):
        with pytest.raises(UserError, match="choose from ranker, xr_transformer"):
            compare.chosen(unknown)


def test_a_comparison_goes_on_where_it_was_interrupted(run, capsys, tmp_path, monkeypatch):
    """What has been trained and measured is kept; what was being trained is trained again."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("data.npz", "tree.npz", "model.pt", "log.jsonl", "predictions.npz"):
        shutil.copy(run / name, copy / name)
    config = compare.Config(run=str(copy), systems="one_vs_all,light_xml", documents=30)
    train_on_tree = light_xml.train_on_tree

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(light_xml, "train_on_tree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare.run(config)
    first = capsys.readouterr().out
    assert "[3 of 3] LightXML" in first and "P@1" not in first.split("[3 of 3]")[1]
    monkeypatch.setattr(light_xml, "train_on_tree", train_on_tree)
    kept = (copy / "one_vs_all" / "compare.json").stat().st_mtime_ns
    compare.run(config)
    second = capsys.readouterr().out
    assert "[1 of 1] LightXML" in second and "one-vs-all in" not in second
    assert (copy / "one_vs_all" / "compare.json").stat().st_mtime_ns == kept
    # A file that is damaged, or made from other predictions, is no file.
    (copy / "light_xml" / "compare.json").write_text("{")
    labels, _ = load_npz(copy / "one_vs_all" / "predictions.npz")
    assert compare.read_record(str(copy), "LightXML") is None
    path = copy / "one_vs_all" / "compare.json"
    path.write_text(path.read_text().replace('"predictions": "', '"predictions": "0'))
    assert compare.read_record(str(copy), "one-vs-all") is None
    compare.run(config)
    assert "[2 of 2] LightXML" in capsys.readouterr().out


def test_the_time_left_is_what_the_system_took_elsewhere(run, tmp_path, monkeypatch):
    """And as long as the cascade where nobody knows."""
    there, here = str(tmp_path / "there"), str(tmp_path / "here")
    monkeypatch.setattr(compare, "training_seconds", lambda folder: 100.0)
    known = {(there, "SyncXML"): {"took": 7.0}, (there, "LightXML"): {"took": None}}
    monkeypatch.setattr(compare, "read_record", lambda run, name: known.get((run, name)))
    assert compare.seconds_of(here, "SyncXML", [there, here]) == 7
    assert compare.seconds_of(here, "LightXML", [there, here]) == 100
    assert compare.seconds_of(str(run), "cascade", [there]) == 0  # only measured


def test_only_the_chosen_systems_are_trained(run, capsys, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("data.npz", "tree.npz", "model.pt", "log.jsonl", "predictions.npz"):
        shutil.copy(run / name, copy / name)
    compare.run(compare.Config(run=str(copy), systems="one_vs_all", documents=30))
    folders = [path.name for path in copy.iterdir() if path.is_dir()]
    assert folders == ["one_vs_all"]
    # Both systems are in the first table, and one-vs-all in that of the differences.
    printed = capsys.readouterr().out
    table = printed[printed.index("%, mean of 1 runs") :].splitlines()
    names = [line[:44].strip() for line in table]
    assert [name for name in names if name in compare.SYSTEMS] == [
        "cascade",
        "one-vs-all",
        "one-vs-all",
    ]


def test_the_commands_of_the_readme(run, capsys):
    """In this process: as main runs them."""
    commands, *_ = re.findall(
        r"```sh\n(.*?)```", (ROOT / "variants" / "README.md").read_text(), flags=re.DOTALL
    )
    for command in commands.strip().splitlines():
        python, m, name, *flags = command.replace("runs/demo", str(run)).split()
        module = importlib.import_module(name)
        assert (python, m) == ("python", "-m")
        module.run(parse(module.Config, module.__doc__, flags))
    assert (
        run / "xr_transformer-none" / "predictions.npz"
    ).exists() and "cascade + ranker" in capsys.readouterr().out


def test_a_staged_model_is_not_taken_for_a_cascade(run):
    folder = run / xr_transformer.NAME
    if not folder.exists():
        xr_transformer.run(xr_transformer.Config(run=str(run)))
    with pytest.raises(
        UserError, match="was made by variants/xr_transformer.py, and its weights are not"
    ):
        stages.train.load(folder, stages.data.load(folder))
    assert isinstance(ranker.load_model(str(folder))[0], xr_transformer.XRTransformer)


def test_a_staged_model_predicts_the_validation_split_too(run, capsys):
    folder = run / xr_transformer.NAME
    if not folder.exists():
        xr_transformer.run(xr_transformer.Config(run=str(run)))
    # The file is what the trained model finds for these documents.
    data = stages.data.load(folder)
    model, settings, _ = ranker.load_model(str(folder))
    rows = np.arange(len(data.splits["val"]))
    batch = data.batch("val", rows, settings.max_len)
    with torch.no_grad():
        labels, scores = model.eval().predict(batch, 5)
    arrays, meta = load_npz(folder / "predictions.val.npz")
    assert meta["config"]["split"] == "val"
    np.testing.assert_allclose(arrays["scores"][:, :5], scores.exp().numpy(), rtol=1e-3)
    same = arrays["labels"][:, 0] == labels[:, 0].numpy()
    assert same.mean() > 0.95  # all but ties
    # With it the report has thresholds.
    capsys.readouterr()
    report.run(report.Config(run=str(folder)))
    assert "nothing chosen on validation" not in capsys.readouterr().out


def test_what_cannot_be_is_refused(run, tmp_path):
    for module, flags, message in (
        (xr_transformer, {"warm": "hot"}, "--warm hot"),
        (ranker, {"features": "none"}, "--features none"),
    ):
        with pytest.raises(UserError, match=message):
            module.run(module.Config(run=str(run), **flags))
    for name in ("data.npz", "tree.npz"):
        shutil.copy(run / name, tmp_path / name)
    for module in (one_vs_all, light_xml, xr_transformer, ranker):
        with pytest.raises(UserError, match="model.pt does not exist; run: python 04_train.py"):
            module.run(module.Config(run=str(tmp_path)))
    with pytest.raises(UserError, match="predictions.npz does not exist; run: python 05_eval.py"):
        compare.run(compare.Config(run=str(tmp_path)))
    assert {field.name for field in dataclasses.fields(compare.Config)} == {
        "run",
        "systems",
        "documents",
        "seed",
    }


@pytest.mark.parametrize("system", [elias, unidec, alc], ids=lambda module: module.NAME)
def test_a_system_keeps_its_best_pass(system, run, tmp_path, monkeypatch):
    """The passes are judged ever worse, so the first one that is judged must be kept."""
    for name in ("data.npz", "tree.npz", "model.pt"):
        shutil.copy(run / name, tmp_path)
    one_pass = stages.train.train_one_epoch
    latest = {}
    passes = []

    def spied(training, *args):
        one_pass(training, *args)
        latest.update({key: value.clone() for key, value in training.model.state_dict().items()})

    def worse_and_worse(labels_Nk, split):
        passes.append(dict(latest))
        return 10 - len(passes)

    monkeypatch.setattr(stages.train, "train_one_epoch", spied)
    monkeypatch.setattr(common, "precision_sum", worse_and_worse)
    config = system.Config(run=str(tmp_path))
    system.run(config)
    kept = load_pt(tmp_path / system.folder_name(config) / "model.pt")[0]["model"]
    first, last = passes[0], passes[-1]
    assert all(torch.equal(kept[key], first[key]) for key in first)
    assert not all(torch.equal(kept[key], last[key]) for key in last)


def test_a_tree_without_cluster_levels_is_refused(run, tmp_path):
    shutil.copy(run / "data.npz", tmp_path)
    stages.data.load(tmp_path)
    common.save_tree(tmp_path, np.arange(43), [])
    with pytest.raises(UserError, match="tree.npz has no cluster level.*02_label_tree.py"):
        common.tree_with_clusters(str(tmp_path))
