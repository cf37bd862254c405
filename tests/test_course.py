"""The course: its labs can be solved with the stages' own functions, and the check answers wrong
solutions with a hint that fits.
"""

import ast
import dataclasses
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import HAS_VARIANTS, ROOT, make_corpus, needs_variants, stages
from scipy.sparse import csr_matrix
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from course import check, toy, worked_numbers

LABS = sorted((ROOT / "course").glob("lab[0-9]_*.py"))
NUMBERS = range(len(LABS))


def is_blank(node: ast.stmt) -> bool:
    """Whether this is a function of a lab that a student fills in."""
    return isinstance(node, ast.FunctionDef) and "NotImplementedError" in ast.unparse(node.body[-1])


def blanks(lab: int) -> list[str]:
    """The names of a lab's blanks, in its order."""
    return [node.name for node in ast.parse(LABS[lab].read_text()).body if is_blank(node)]


def filled(lab: int, functions: dict, name: str = "lab", **constants) -> ModuleType:
    """The lab as a module whose blanks are these functions, and whose constants are these values.

    A blank without a function stays a blank. With the name "__main__" its computing cells run.
    """
    tree = ast.parse(LABS[lab].read_text())
    for i, node in enumerate(tree.body):
        if is_blank(node) and node.name in functions:
            tree.body[i] = ast.parse(f"{node.name} = FUNCTIONS[{node.name!r}]").body[0]
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in constants:
            constant = ast.unparse(node.targets[0])
            tree.body[i] = ast.parse(f"{constant} = {constants[constant]!r}").body[0]
    module = ModuleType("lab")
    module.__dict__.update(__name__=name, FUNCTIONS=functions)
    exec(compile(ast.fix_missing_locations(tree), str(LABS[lab]), "exec"), module.__dict__)
    return module


def solved(lab: int, **others) -> dict:
    """The stages' own functions for all blanks of a lab, and others in place of some."""
    return {step.name: step.oracle for step in check.steps_of(lab)} | others


@pytest.mark.parametrize("lab", NUMBERS)
def test_a_lab_has_a_blank_for_each_step_and_no_other(lab):
    assert blanks(lab) == [step.name for step in check.steps_of(lab)]


@pytest.mark.parametrize("lab", NUMBERS)
def test_the_lab_as_it_comes_has_blanks_alone(lab, capsys):
    assert check.main([str(lab)]) == 1
    printed = capsys.readouterr().out
    n = len(check.steps_of(lab))
    assert printed.count("still a blank (step ") == n and f"0 of {n} steps pass" in printed


@pytest.mark.parametrize("lab", NUMBERS)
def test_the_stages_own_functions_pass(lab):
    module = filled(lab, solved(lab))
    assert set(check.answers(module, lab, LABS[lab]).values()) == {None}


@pytest.mark.parametrize("lab", NUMBERS)
def test_a_lab_says_what_a_student_needs_to_know(lab):
    for word in ("Goal  ", "Reading  ", "Commands  ", "Minutes  ", "Target  "):
        assert f"\n{word}" in LABS[lab].read_text(), word


def centre_scale_of(x, limit=None):
    """Centre and scale; whoever compares the variance with a constant has a limit of his own."""
    variance = x.var(0, dtype=np.float64).mean(1)
    limit = 1e-6 * (x**2).mean((0, 2)) if limit is None else limit
    return x.mean(0), 1 / np.sqrt(np.where(variance > limit, variance, 1))


def has_node(doc_P, node_P, n_documents, n_nodes):
    """(documents, nodes): which document has a label below which node."""
    has = np.zeros((n_documents, n_nodes))
    has[doc_P, node_P] = 1
    return has


def without_neighbours(doc_P, node_P):
    """The pairs that differ from the one before them."""
    differs = (np.diff(doc_P, prepend=-1) != 0) | (np.diff(node_P, prepend=-1) != 0)
    return doc_P[differs], node_P[differs]


def log_odds_of(doc_P, node_P, n_documents, n_nodes, half=0.5, of_all=False, distinct=True):
    pairs = np.stack([doc_P, node_P])
    if distinct:
        pairs = np.unique(pairs, axis=1)
    count_C = np.bincount(pairs[1], minlength=n_nodes)
    others_C = n_documents + 0.5 if of_all else n_documents - count_C
    with np.errstate(divide="ignore"):
        return np.log((count_C + half) / (others_C + half))


# 1. Wrong solutions. For each step at least three, and a part of the hint that each should get.


def wrong_ranks(hit_Nk, function):
    """(k,): the mean over documents of function(the first j hits, j, k), rank by rank."""
    k = hit_Nk.shape[1]
    ranks = range(1, k + 1)
    return np.array([np.mean([function(hits[:j], j, k) for hits in hit_Nk]) for j in ranks])


def classes_of(count_L, head, torso, tail):
    """How many labels have at least so many documents, and fewer than the class before."""
    above = np.array([np.sum(count_L >= limit) for limit in (head, torso, tail, 0)])
    return np.diff(above, prepend=0)


def dcg(hits):
    return sum(hit / np.log2(r + 1) for r, hit in enumerate(hits, 1))


def gains(j, hit_Nk, labels_Nk, weight_L):
    return sum(
        weight_L[label]
        for hits, labels in zip(hit_Nk, labels_Nk, strict=True)
        for hit, label in zip(hits[:j], labels[:j], strict=True)
        if hit
    )


def by_votes(X, X_transposed, Y_train, choose):
    """Votes, document by document: choose(cosines) gives the weight of each training document."""
    return np.stack([choose(row) @ Y_train.toarray() for row in (X @ X_transposed).toarray()])


def halves(Z, draws, iterations, at_length_1=True, equal=True):
    """2-means with a fault: centroids of any length, or halves by the sign of the gap."""
    a, b = Z[np.argsort(draws)[:2]]
    for _ in range(iterations):
        gap = Z @ a - Z @ b
        order = np.argsort(-gap)
        n_left = (len(Z) + 1) // 2 if equal else int((gap > 0).sum())
        left, right = order[:n_left], order[n_left:]
        a, b = Z[left].mean(axis=0), Z[right].mean(axis=0)
        if at_length_1:
            a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return left, right


def fewer_levels(Z, depth, iterations, seed):
    order, bounds = stages.tree.balanced_kmeans(csr_matrix(Z), depth - 1, iterations, seed)
    return np.split(order, bounds[1:-1])


def places_of_nodes(Z, depth, iterations, seed):
    """Someone who forgets that two_means numbers the rows of the node, not the labels."""
    return [leaf % (len(Z) // 2) for leaf in solved(2)["leaves"](Z, depth, iterations, seed)]


def recursion(Z, depth, iterations, seed, rows_L=None, numbers_of="all", draws_move=False):
    """The recursion in plain form, with a fault."""
    start_L, draws = lab_2().random_start(len(Z), depth, seed)
    nodes = [(start_L if rows_L is None else rows_L, draws)]
    for _ in range(depth):
        below = []
        for rows, own in nodes:
            for half, places in zip(halves(Z[rows], own[0], iterations), two_parts(len(rows)),
                                    strict=True):  # fmt: skip
                labels = rows[half] if numbers_of == "all" else half
                below.append((labels, own[1:, half if draws_move else places]))
        nodes = below
    return [rows for rows, _ in nodes]


def two_parts(n):
    """The places of the left half of a node of n rows, and of the right half."""
    return np.split(np.arange(n), [(n + 1) // 2])


def lab_2():
    return filled(2, {})


def padded(leaves, filler, together=False):
    """Blocks of equal width, filled up with anything, or all labels first."""
    width = max(len(leaf) for leaf in leaves)
    blocks = [list(leaf) + [filler] * (width - len(leaf)) for leaf in leaves]
    flat = np.concatenate(blocks)
    return np.array(sorted(flat, key=lambda label: label == filler)) if together else flat


def pair_by_pair(node_P, doc_P, parents_BK, fan, by_number=False, everyone=False, lost_at_0=False):
    """Target matching with a fault."""
    targets = torch.zeros(*parents_BK.shape, fan)
    for node, document in zip(node_P.tolist(), doc_P.tolist(), strict=True):
        for row in range(len(parents_BK)) if everyone else [document]:
            clusters = parents_BK[row].tolist()
            if by_number:
                clusters = list(range(len(clusters)))
            at = clusters.index(node // fan) if node // fan in clusters else None
            if at is None and lost_at_0:
                at = 0
            if at is not None:
                targets[row, at, node % fan] = 1
    return targets


def layers_with_fault(depth, n_levels, add=0.5, lowest=1):
    """choose_layers with a fault: cut off instead of rounded, or down to the embeddings."""
    read = [max(1, int(depth * (6 - n_levels + t + 1) / 6 + add)) for t in range(n_levels)]
    groups = [[layer] for layer in read]
    if n_levels > 1 and read[0] > lowest:
        groups[0] = [read[0] - 1, read[0]]
    return groups


def faulty_descent(
    model, features, batch, teacher, places=False, masked=True, matched=True, dropped=True
):
    """The descent with a fault: places for clusters, empty slots scored, never a target, or no
    dropout.
    """
    parents, picked = torch.zeros(len(batch.ids_BT), 1, dtype=torch.int64), None
    for t, head in enumerate(model.heads):
        fan = model.counts[t + 1] // model.counts[t]
        x_BD = model.dropout[t](features[t]) if dropped else features[t]
        logits, targets = head(x_BD, parents), None
        if masked and t == len(model.topk):
            logits[model.empty[parents]] = -torch.inf
        if teacher and matched:
            nodes = model.nodes(batch.label_P, t)
            targets = stages.tree.match(nodes, batch.doc_P, parents, fan)
        yield stages.model.Level(parents, picked, logits, targets)
        if t < len(model.topk):
            picked = model.shortlist(t, logits, targets, batch)
            parents = picked if places else stages.tree.expand(parents, fan).gather(1, picked)


RIGHT_PREDICTION = {
    "kept by level 1": [0, 1],
    "scored at level 2": [0, 1, 2, 3],
    "kept by level 2": [0, 2],
    "labels scored": [6, 2, 7, 1],
    "best label": [7],
}
RIGHT_TRAINING = {
    "kept by level 1": [0, 1],
    "scored at level 2": [0, 1, 2, 3],
    "kept by level 2": [0, 3],
    "labels scored": [6, 2, 4, 3],
    "hard negatives": [6, 2, 3],
}
WRONG = [
    # Lab 0
    (0, "node_of", lambda s, n, S: [slot // n for slot in s], "number of slots of one node"),
    (0, "node_of", lambda s, n, S: [slot % n for slot in s], "stand side by side"),
    (0, "node_of", lambda s, n, S: [slot * n / S for slot in s], "// instead of /"),
    (0, "children",
     lambda c, F: np.array([[p * F + f for f in range(F) for p in row] for row in c]),
     "wrong order"),
    (0, "children", lambda c, F: np.array([[p + f for p in row for f in range(F)] for row in c]),
     "begin at c * fan"),
    (0, "children", lambda c, F: c * F, "the shape should be (1, 4) and is (1, 2)"),
    (0, "trace_of_prediction", lambda: RIGHT_PREDICTION | {"best label": [4]},
     "is it among the labels scored"),
    (0, "trace_of_prediction", lambda: RIGHT_TRAINING | {"best label": [4]}, "nobody knows"),
    (0, "trace_of_prediction",
     lambda: RIGHT_PREDICTION | {"labels scored": [0, 1, 4, 5], "best label": [4]}, "are slots"),
    (0, "trace_of_training", lambda: RIGHT_PREDICTION | {"hard negatives": [6, 2, 7, 1]},
     "whatever its logit"),
    (0, "trace_of_training", lambda: RIGHT_TRAINING | {"hard negatives": [6, 2, 4, 3]},
     "it is no negative"),
    (0, "trace_of_training", lambda: {"kept by level 1": [0, 1]}, "each of the five keys"),
    (0, "trace_of_training", lambda: RIGHT_TRAINING | {"kept by level 2": [1, 3]},
     "the wrong node with the largest logit"),
    # Lab 1
    (1, "tail_and_head", lambda n: classes_of(n, 51, 6, 1), ">=, not >"),
    (1, "tail_and_head", lambda n: classes_of(n, 50, 5, 0), "unseen"),
    (1, "tail_and_head", lambda n: [350, 54, 5, 0], "not their documents"),
    (1, "precision", lambda h: wrong_ranks(h, lambda hits, j, k: sum(hits) / k), "by j, not by k"),
    (1, "precision", lambda h: wrong_ranks(h, lambda hits, j, k: hits[-1]), "a running sum"),
    (1, "precision", lambda h: len(h) * wrong_ranks(h, lambda hits, j, k: sum(hits) / j),
     "take the mean"),
    (1, "ndcg", lambda h, n: wrong_ranks(h, lambda hits, j, k: dcg(hits)), "this is DCG"),
    (1, "ndcg", lambda h, n: wrong_ranks(h, lambda hits, j, k: dcg(hits) / dcg([1] * j)),
     "min(j, n)"),
    (1, "ndcg", lambda h, n: np.array([
        np.mean([sum(hits[:j]) / min(j, m) for hits, m in zip(h, n, strict=True)])
        for j in range(1, h.shape[1] + 1)]), "this is RP@j"),
    (1, "ndcg", lambda h, n: np.mean([
        np.cumsum(hits / np.log(np.arange(2, h.shape[1] + 2)))
        / [dcg([1] * min(j, m)) for j in range(1, h.shape[1] + 1)]
        for hits, m in zip(h, n, strict=True)], axis=0), "both sums need log2"),
    (1, "inverse_propensity",
     lambda c, n, a=0.55, b=1.5: 1 / (1 + (np.log(n) - 1) * (b + 1) ** a / (c + b) ** a),
     "one over it"),
    (1, "inverse_propensity",
     lambda c, n, a=0.55, b=1.5: 1 + np.log(n) * (b + 1) ** a / (c + b) ** a, "the 1 is missing"),
    (1, "inverse_propensity",
     lambda c, n, a=0.55, b=1.5: 1 + (np.log10(n) - 1) * (b + 1) ** a / (c + b) ** a, "np.log"),
    (1, "propensity_scored_precision", lambda h, y, b, w: np.array([
        np.mean([gains(j, h[i:i + 1], y[i:i + 1], w) / b[i, :j].sum() for i in range(len(h))])
        for j in range(1, 6)]), "document by document"),
    (1, "propensity_scored_precision", lambda h, y, b, w: np.array([
        gains(j, h, y, w) / len(h) / j for j in range(1, 6)]), "not by j"),
    (1, "propensity_scored_precision", lambda h, y, b, w: np.array([
        gains(j, h | True, y, w) / b[:, :j].sum() for j in range(1, 6)]), "wrong predictions"),
    (1, "neighbour_votes", lambda X, T, Y, n: by_votes(
        X, T, Y, lambda c: 1.0 * (c >= np.sort(c)[-n])), "not 1"),
    (1, "neighbour_votes", lambda X, T, Y, n: by_votes(
        X, T, Y, lambda c: c * (c <= np.sort(c)[n - 1])), "sorts upwards"),
    (1, "neighbour_votes", lambda X, T, Y, n: by_votes(
        X, T, Y, lambda c: c), "only the nearest"),
    # Lab 2
    (2, "label_features", lambda X, Y: Y.T @ X, "bring each row to length 1"),
    (2, "label_features", lambda X, Y: np.stack([
        X[Y[:, i].toarray().ravel() > 0].toarray().mean(axis=0) for i in range(Y.shape[1])]),
     "these are means"),
    (2, "label_features", lambda X, Y: np.stack([row / row.sum() for row in (Y.T @ X).toarray()]),
     "root of the sum of squares"),
    (2, "two_means", lambda Z, r, n: halves(Z, r, n, equal=False), "balanced"),
    (2, "two_means", lambda Z, r, n: halves(Z, r, n, at_length_1=False), "to length 1"),
    (2, "two_means", lambda Z, r, n: halves(Z, r, 1), "after one round"),
    (2, "two_means", lambda Z, r, n: [np.isin(np.arange(len(Z)), half) for half in halves(Z, r, n)],
     "np.flatnonzero"),
    (2, "two_means", lambda Z, r, n: [Z[half] for half in halves(Z, r, n)], "not the rows"),
    (2, "two_means", lambda Z, r, n: [np.sort(half) for half in halves(Z, r, n)],
     "falling order of the gap"),
    (2, "leaves", fewer_levels, "2^depth leaves"),
    (2, "leaves", places_of_nodes, "missing or twice"),
    (2, "leaves", lambda *case: solved(2)["leaves"](*case)[::-1], "wrong order"),
    (2, "leaves", lambda Z, *others: recursion(Z, *others, rows_L=np.arange(len(Z))),
     "first result of random_start"),
    (2, "leaves", lambda *case: recursion(*case, numbers_of="node"), "places within the node"),
    (2, "leaves", lambda *case: recursion(*case, draws_move=True), "does not move with it"),
    (2, "lay_out", lambda leaves: padded(leaves, 0), "0 is a label"),
    (2, "lay_out", lambda leaves: padded(leaves, -1, together=True), "a block of its own"),
    (2, "lay_out", lambda leaves: [label for leaf in leaves for label in leaf],
     "the width of the largest"),
    # Lab 3
    (3, "match", lambda n, d, p, F: pair_by_pair(n, d, p, F, by_number=True),
     "look it up in parents_BK"),
    (3, "match", lambda n, d, p, F: pair_by_pair(n, d, p, F, everyone=True), "whose correct node"),
    (3, "match", lambda n, d, p, F: pair_by_pair(n, d, p, F, lost_at_0=True), "must be left out"),
    (3, "shortlist", lambda z, y, k: z.flatten(1).argsort(dim=1, descending=True)[:, :k],
     "with a target go first"),
    (3, "shortlist", lambda z, y, k: z.add(0 if y is None else y).flatten(1).topk(k).indices,
     "1 more does not"),
    (3, "shortlist", lambda z, y, k: (z.sigmoid() if y is None else y).flatten(1).topk(k).indices,
     "not by the target alone"),
    (3, "shortlist", lambda z, y, k: z.flatten(1).topk(k).values, "topk(...).indices"),
    (3, "shortlist", lambda z, y, k: z[:, 0].topk(3).indices, "flatten(1) before topk"),
    (3, "descend", lambda *case: faulty_descent(*case, places=True), "are places among the"),
    (3, "descend", lambda *case: faulty_descent(*case, masked=False), "masked_fill"),
    (3, "descend", lambda *case: faulty_descent(*case, matched=False), "targets_BKF is None"),
    (3, "descend", lambda model, features, batch, teacher: (yield from
        stages.model.Cascade.descend(model, features, batch, True)), "unless `teacher` is true"),
    (3, "descend", lambda *case: faulty_descent(*case, dropped=False), "model.dropout[t]"),
    (3, "descend", lambda model, features, batch, teacher: (yield from
        faulty_descent(model, features[::-1][:1] * 3, batch, teacher)), "a feature of its own"),
    (3, "nodes_scored", lambda c, k: [c[1], k[0] * c[2] // c[1], k[0] * k[1] * c[3] // c[2]],
     "kept in all"),
    (3, "nodes_scored", lambda c, k: c[1:], "all nodes of each level"),
    (3, "nodes_scored", lambda c, k: [c[1]] + k, "are the clusters kept"),
    (3, "nodes_scored", lambda c, k: [k[t] * (c[t + 2] // c[t + 1]) for t in range(len(k))],
     "the first level is missing"),
    # Lab 4
    (4, "level_loss", lambda z, y: binary_cross_entropy_with_logits(z, y), "summed over"),
    (4, "level_loss", lambda z, y: (softplus(z) - z * y).sum() / len(z), "no number"),
    (4, "level_loss", lambda z, y: (softplus(z) - z.where(y > 0, 0)).sum(), "divide by B"),
    (4, "random_shortlist", lambda noise, y, k: noise.flatten(1).topk(k).indices,
     "correct candidates go first"),
    (4, "random_shortlist", lambda noise, y, k: (noise + y).flatten(1).topk(k).indices,
     "noise has no bounds"),
    (4, "random_shortlist", lambda noise, y, k: y.flatten(1).argmax(dim=1)[:, None].repeat(1, k),
     "is there twice"),
    (4, "choose_layers", lambda depth, n: [
        [max(1, int(depth * (1 - (n - 1 - t) / 6) + 0.5))] for t in range(n)], "reads two layers"),
    (4, "choose_layers", lambda depth, n: layers_with_fault(depth, n, add=0), "int(x + 0.5)"),
    (4, "choose_layers", lambda depth, n: layers_with_fault(depth, n, lowest=0), "begin at 1"),
    # Lab 5
    (5, "mean_of_tokens", lambda h, mask: h.mean(1), "the padding counts"),
    (5, "mean_of_tokens", lambda h, mask: (h * mask[:, :, None]).sum(1) / h.shape[1], "not by T"),
    (5, "mean_of_tokens", lambda h, mask: h[:, 0], "first token"),
    (5, "mean_of_tokens", lambda h, mask: h[mask.bool()].mean(0), "a mean of its own"),
    (5, "mean_of_tokens", lambda h, mask: (h * mask[:, :, None]).sum(1) / mask.sum(),
     "not by those of the batch"),
    (5, "mean_of_tokens", lambda h, mask: (h * mask[:, :, None]).sum(1) / mask.sum(1),
     "Do the shapes meet"),
    (5, "mean_of_tokens", lambda h, mask: h.mean(2), "is axis 1"),
    (5, "mean_of_tokens", lambda h, mask: (h * mask[:, :, None]).amax(1), "largest number"),
    (5, "mean_of_tokens", lambda h, mask: torch.stack([
        one[here == 0].mean(0) for one, here in zip(h, mask, strict=True)]), "mean of the padding"),
    (5, "mean_of_tokens", lambda h, mask: torch.stack([
        one[here == 1].mean(0) / one[here == 1].mean(0).norm()
        for one, here in zip(h, mask, strict=True)]), "to length 1"),
    (5, "centre_and_scale", lambda x: (x.mean(0), 1 / x.std((0, 2))), "from the centre"),
    (5, "centre_and_scale", lambda x: centre_scale_of(x)[::-1], "the centre first"),
    (5, "centre_and_scale", lambda x: (x - x.mean(0), centre_scale_of(x)[1]), "what is taken away"),
    (5, "centre_and_scale", lambda x: (x.mean(0) * centre_scale_of(x)[1][:, None],
                                       centre_scale_of(x)[1]), "before anything is multiplied"),
    (5, "centre_and_scale", lambda x: centre_scale_of(x, limit=0), "up to rounding"),
    (5, "centre_and_scale", lambda x: centre_scale_of(x, limit=1e-6), "up to rounding"),
    (5, "centre_and_scale", lambda x: (x.mean(0), 1 / np.sqrt(x.var(0).sum(1))), "not their sum"),
    (5, "centre_and_scale", lambda x: (x.mean(0), 1 / np.abs(x - x.mean(0)).mean((0, 2))),
     "one root"),
    (5, "centre_and_scale", lambda x: (x.mean(0), 1 / x.std(0).mean(1)), "one root"),
    (5, "centre_and_scale", lambda x: (x.mean(0), 1 / (x.std(0) + 1e-6)), "not for a feature"),
    (5, "centre_and_scale", lambda x: (x.mean(0), 1 / (x - x.mean(0)).var((0, 2))), "the root"),
    (5, "centre_and_scale", lambda x: (x.mean(0), (x - x.mean(0)).std((0, 2))), "one over"),
    (5, "centre_and_scale", lambda x: (x.mean(0), 1 / np.sqrt((x**2).mean((0, 2)))),
     "take the mean away"),
    (5, "centre_and_scale", lambda x: (x.mean(0), 1 / (x - x.mean(0)).std((0, 2)).clip(1e-12)),
     "keeps the scale 1"),
    (5, "log_odds", lambda d, v, n, c: np.log((np.bincount(v, minlength=c) + 0.5)
                                              / (n - np.bincount(v, minlength=c) + 0.5)), "once"),
    (5, "log_odds", lambda d, v, n, c: -log_odds_of(d, v, n, c), "upside down"),
    (5, "log_odds", lambda d, v, n, c: log_odds_of(d, v, n, 0), "minlength"),
    (5, "log_odds", lambda d, v, n, c: log_odds_of(d, v, n, c, half=0), "half a document"),
    (5, "log_odds", lambda d, v, n, c: log_odds_of(d, v, n, c, of_all=True), "not over all"),
    (5, "log_odds", lambda d, v, n, c: log_odds_of(d, v, n, c) / np.log(10), "natural logarithm"),
    (5, "log_odds", lambda d, v, n, c: has_node(d, v, n, c).mean(0), "a share is a probability"),
    (5, "log_odds", lambda d, v, n, c: log_odds_of(0 * d, v, n, c), "np.bincount counts"),
    (5, "log_odds", lambda d, v, n, c: log_odds_of(d, v, len(d), c), "not of the pairs"),
    (5, "log_odds", lambda d, v, n, c: log_odds_of(d, v, len(set(d)), c), "without labels count"),
    (5, "log_odds", lambda d, v, n, c: log_odds_of(d, v, n, c, half=1), "not a whole one"),
    (5, "log_odds", lambda d, v, n, c: np.log((has_node(d, v, n, c).sum(0) + 0.5)
                                              / (n - (has_node(d, v, n, c).sum(0) + 0.5))),
     "is it taken away"),
    (5, "log_odds", lambda d, v, n, c: log_odds_of(*without_neighbours(d, v), n, c, distinct=False),
     "counts once"),
]  # fmt: skip


def name_of(value) -> str:
    """What a test calls a part of a wrong solution; nothing of the function itself."""
    return "" if callable(value) else str(value)


@pytest.mark.parametrize(("lab", "step", "wrong", "hint"), WRONG, ids=name_of)
def test_a_wrong_solution_gets_a_hint_that_fits(lab, step, wrong, hint, capsys):
    found = check.answers(filled(lab, solved(lab, **{step: wrong})), lab, LABS[lab])
    # The other steps pass, but for those that call the wrong one.
    answer = found.pop(step)
    assert answer is not None and hint in answer.hint
    check.print_answers(lab, {step: answer})
    printed = capsys.readouterr().out
    for word in (f"step 1, {step}: not yet", "case  ", "expected  ", "found  ", "hint  "):
        assert word in printed
    assert set(found.values()) <= {None}


def test_an_answer_that_a_student_writes_down_is_not_given_away(capsys):
    """Of the trace by hand, the check says which lists are right, and shows the first wrong one."""
    wrong = RIGHT_PREDICTION | {"kept by level 2": [1, 2], "best label": [4]}
    found = check.answers(filled(0, solved(0, trace_of_prediction=lambda: wrong)), 0, LABS[0])
    answer = found["trace_of_prediction"]
    assert answer.expected == (
        "kept by level 1 right, scored at level 2 right, kept by level 2 wrong, "
        "labels scored right, best label wrong"
    )
    assert answer.found == "kept by level 2 [1 2]"
    assert answer.hint == "of the nodes scored, the two with the largest logits"
    blank = check.answers(filled(0, {}), 0, LABS[0])["trace_of_prediction"]
    assert not re.search(r"\d \d", blank.expected)


def test_a_step_that_calls_a_wrong_one_says_so():
    """Lab 2's recursion calls a two_means that gives both halves in the wrong order."""
    module = filled(2, solved(2, two_means=lambda *case: solved(2)["two_means"](*case)[::-1]))
    module.leaves = lambda Z, depth, n, seed: recursion(Z, depth, n, seed)[::-1]
    answer = check.answers(module, 2, LABS[2])["leaves"]
    assert answer.hint == "it calls two_means, which does not pass yet: mend that step first"


def test_every_step_has_three_wrong_solutions():
    for lab in NUMBERS:
        for step in check.steps_of(lab):
            assert sum(wrong[:2] == (lab, step.name) for wrong in WRONG) >= 3, step.name


@pytest.mark.parametrize("lab", NUMBERS)
def test_no_typical_mistake_is_right(lab):
    for step in check.steps_of(lab):
        for mistake in step.mistakes:
            answer = step.answer(mistake.function, "lab")
            assert answer is not None, f"{step.name}: {mistake.hint}"


# 2. What a student's file may have in it.


def printed_for(text: str, tmp_path, capsys) -> tuple[int, str]:
    """(exit status, what the check prints) of a lab with this text."""
    path = tmp_path / "mine.py"
    path.write_text(text)
    status = check.main([str(path)])
    return status, capsys.readouterr().out


def test_an_error_in_a_function_names_the_line_and_is_no_traceback(tmp_path, capsys):
    lab = (
        LABS[1]
        .read_text()
        .replace('raise NotImplementedError("step 2: P@j for all j")', "return hit_Nk + missing")
    )
    line = 1 + lab[: lab.index("return hit_Nk + missing")].count("\n")
    status, printed = printed_for(lab, tmp_path, capsys)
    assert status == 1 and f"NameError on line {line} of the lab" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("LAB = 1\ndef precision(:\n", "mine.py, line 2: "),
        ("LAB = 1\nimport no_such_module\n", "ModuleNotFoundError on line 2"),
        ("x = 1\n", "no line such as LAB = 1"),
    ],
)
def test_a_file_that_is_no_lab_is_refused_in_words(text, said, tmp_path, capsys):
    status, printed = printed_for(text, tmp_path, capsys)
    assert status == 2 and said in printed


def test_a_function_that_returns_nothing_or_is_gone(tmp_path, capsys):
    status, printed = printed_for("LAB = 1\ndef precision(hit_Nk): pass\n", tmp_path, capsys)
    assert status == 1 and "does your function return?" in printed
    assert "put back: def ndcg(...)" in printed


def test_a_loop_that_a_student_interrupts_is_an_answer_and_the_next_steps_are_checked():
    def endless(hit_Nk):
        raise KeyboardInterrupt

    found = check.answers(filled(1, solved(1, precision=endless)), 1, LABS[1])
    assert found["precision"].hint == "does your loop end?" and found["ndcg"] is None


@pytest.mark.parametrize("word", ["9", "no_such_file.py"])
def test_a_lab_that_does_not_exist(word, capsys):
    assert check.main([word]) == 2 and "there is no" in capsys.readouterr().out


def test_the_command_checks_a_lab_from_the_shell():
    done = subprocess.run(
        [sys.executable, "-m", "course.check", "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "0 of 4 steps pass" in done.stdout and not done.stderr


@pytest.mark.parametrize("module", ["course.check 1", "course.worked_numbers size"])
def test_a_reader_that_has_enough_gets_no_traceback(module):
    """As `head -1` does, which ends before the command has written all."""
    process = subprocess.Popen(
        [sys.executable, "-m", *module.split()],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait()


# 3. The labs run.


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """What the labs' commands make of the demo's corpus, of a small one."""
    folder = tmp_path_factory.mktemp("course")
    corpus = make_corpus(folder / "corpus")
    stages.data.run(stages.data.Config(run=str(folder), corpus=str(corpus), vocab=400))
    stages.tree.run(stages.tree.Config(run=str(folder), levels="4,8"))
    stages.train.run(stages.train.Config(run=str(folder), topk="2,4", epochs=1, tiny="1,32"))
    return folder


def test_the_picture_of_lab_0_shows_the_toy():
    picture = LABS[0].read_text()
    rows = {name: re.findall(rf"^    {name} +([-\d. ]+)$", picture, re.MULTILINE) for name in
            ("logit", "label")}  # fmt: skip
    logits = [[float(number) for number in row.split()] for row in rows["logit"]]
    labels = [int(number) for number in rows["label"][0].split()]
    assert logits == [*toy.CLUSTER_LOGITS, toy.SLOT_LOGITS]
    assert labels == toy.SLOT_TO_LABEL


def test_lab_0_runs(capsys):
    filled(0, solved(0), "__main__")
    printed = capsys.readouterr().out
    assert "hard negatives       [2, 3, 6]" in printed and "best label           [7]" in printed


def test_lab_1_runs_and_agrees_with_stage_5(small_run, capsys):
    filled(1, solved(1), "__main__", RUN=str(small_run))
    assert capsys.readouterr().out.count("the same as stage 5's") == 2


def test_lab_2_runs(small_run, capsys):
    filled(2, solved(2), "__main__", RUN=str(small_run), TOPK="2,4", EPOCHS=1)
    printed = capsys.readouterr().out
    cosines = dict(re.findall(r"^    (plain|stage 2|shuffled) +(0\.\d+)", printed, re.MULTILINE))
    assert cosines["plain"] == cosines["stage 2"] > cosines["shuffled"]
    assert re.search(r"^shuffled tree +\d+\.\d +\d+\.\d +\d+\.\d +\d+\.\d$", printed, re.MULTILINE)
    trees = [stages.tree.load(run) for run in (small_run, f"{small_run}-shuffled")]
    assert (trees[0].slot_to_label != trees[1].slot_to_label).any()
    assert sorted(trees[0].slot_to_label) == sorted(trees[1].slot_to_label)


def test_lab_3_runs_and_its_widest_beam_is_exact(small_run, capsys):
    filled(3, solved(3), "__main__", RUN=str(small_run), BEAMS=["1,1", "2,4", "4,8"])
    printed = capsys.readouterr().out
    assert "the beam that keeps everything equals every label" in printed
    rows = re.findall(r"^ +(\d,\d) +(\d+) +[\d,]+ +([\d.]+) ", printed, re.MULTILINE)
    assert [row[:2] for row in rows] == [("1,1", "11"), ("2,4", "28"), ("4,8", "52")]
    recalls = [float(row[2]) for row in rows]
    assert recalls == sorted(recalls) and recalls[-1] == 100


def test_lab_5_runs_and_trains_five_models_that_differ(small_run, capsys):
    settings = {"MAX_LEN": 32, "EPOCHS": 1, "HEAD_EPOCHS": 1, "LOOKED_AT": 20}
    filled(5, solved(5), "__main__", RUN=str(small_run), **settings)
    printed = capsys.readouterr().out
    # Of each hidden state: documents look more alike before centring than after it.
    states = re.findall(r"^ +\d +(-?\d\.\d+) +(-?\d\.\d+) +[\d.]+$", printed, re.MULTILINE)
    assert states and all(float(as_it_is) > float(centred) for as_it_is, centred in states)
    names = ("heads alone", "    not centred, not scaled", "    all biases the same",
             "all from the start", "heads first, then all")  # fmt: skip
    for name in names:
        assert re.search(rf"^{name}( +[\d.]+){{4}}$", printed, re.MULTILINE), name
    folders = ("heads", "not-centred", "no-prior", "all", "heads-first")
    logs = [(Path(f"{small_run}-{name}") / "log.jsonl").read_text() for name in folders]
    first = [re.findall(r'"loss": \[[^]]*\]', log)[-1] for log in logs]
    assert len(set(first)) == 5


def test_lab_4_runs_and_trains_five_models_that_differ(small_run, capsys):
    settings = {"TOPK": "2,4", "EPOCHS": 1, "DEEP": "2,32"}
    filled(4, solved(4), "__main__", RUN=str(small_run), **settings)
    printed = capsys.readouterr().out
    for row in ("hard negatives", "random negatives", "hard negatives, no teacher",
                "a layer for each: 1,2,2", "one layer for all: 2,2,2"):  # fmt: skip
        assert re.search(rf"^{row}( +[\d.]+){{6}}$", printed, re.MULTILINE), row
    names = ("hard", "random", "no-teacher", "layers", "one-layer")
    losses = [(Path(f"{small_run}-{name}") / "log.jsonl").read_text() for name in names]
    last = [re.findall(r'"loss": \[[^]]*\]', log)[-1] for log in losses]
    assert len(set(last)) == 5


@pytest.mark.parametrize("lab", NUMBERS)
def test_a_lab_computes_nothing_before_its_steps_pass(lab, tmp_path):
    *first, last = blanks(lab)
    done = {name: solved(lab)[name] for name in first}
    said = f"have to pass: {last}; run: python -m course.check {lab}"
    with pytest.raises(SystemExit, match=said):
        filled(lab, done, "__main__", RUN=str(tmp_path))


def test_a_lab_without_its_run_folder_says_what_is_missing(tmp_path):
    for lab in (1, 2, 3, 4, 5):
        with pytest.raises(SystemExit, match="data.npz is missing; run the"):
            filled(lab, solved(lab), "__main__", RUN=str(tmp_path))


# 4. The lecture and the page for lecturers.

LECTURE = (ROOT / "course" / "lecture.md").read_text()
PAGES = [ROOT / "course" / name for name in ("lecture.md", "README.md", "answers.md")]
ANSWERS = PAGES[2].read_text()
FUNCTION = r"`((?:plumbing/|variants/|data/|tools/)?\w+)\.py:\s+([\w.]+)`"


def thing_of(file: str, name: str):
    """The function, method or class that a page names."""
    thing = import_module(file.replace("/", "."))
    for part in name.split("."):
        assert hasattr(thing, part), f"{file}.py has no {name}"
        thing = getattr(thing, part)
    return thing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_that_a_page_names_exist(page):
    named = re.findall(FUNCTION, page.read_text())
    assert len(named) >= (30 if page.name == "lecture.md" else 0)
    for file, name in named:
        if HAS_VARIANTS or not file.startswith("variants/"):
            assert callable(thing_of(file, name))


def test_every_formula_stands_next_to_the_function_that_computes_it():
    formulas = re.findall(r"```math\n.*?```\n\n(.*?)\n\n", LECTURE, re.DOTALL)
    assert len(formulas) == LECTURE.count("```math") >= 15
    for paragraph in formulas:
        assert paragraph.startswith("Computed by") and re.search(FUNCTION, paragraph), paragraph


@pytest.mark.parametrize("part", worked_numbers.PARTS)
def test_the_lecture_shows_what_the_command_prints(part, capsys):
    assert worked_numbers.main([part]) == 0
    assert f"\n```text\n{capsys.readouterr().out}```\n" in LECTURE
    assert re.search(rf"`python\s+-m\s+course.worked_numbers\s+{part}`", LECTURE)


def test_a_part_that_does_not_exist_is_refused_in_words(capsys):
    assert worked_numbers.main(["no"]) == 2 and "there are corpus, size" in capsys.readouterr().out


def test_the_tree_traced_by_hand_has_the_logits_of_the_command():
    section = LECTURE[LECTURE.index("**By hand.**") :]
    picture = section[: section.index("In training:")]
    rows = re.findall(r"^logit +([-\d. ]+)$", picture, re.MULTILINE)
    assert [[float(number) for number in row.split()] for row in rows] == worked_numbers.LOGITS


def test_the_example_document_is_in_the_corpus():
    quoted = re.search(r"^> (.*?)\n\n", LECTURE, re.DOTALL | re.MULTILINE)[1].replace("\n> ", " ")
    splits = ("train", "val", "test")
    documents = [line for split in splits for line in worked_numbers.lines_of(split)]
    (found,) = [document for document in documents if document["text"].startswith(quoted)]
    assert all(f"`{label}`" in LECTURE for label in found["labels"])
    assert len(found["labels"]) == 2


@needs_variants
def test_the_table_of_the_family_is_that_of_the_variants_and_the_results():
    sources = [ROOT / "variants" / "README.md", ROOT / "docs" / "results.md"]
    measured_lines = [line for source in sources for line in source.read_text().splitlines()]
    section = LECTURE[LECTURE.index("## 12.") : LECTURE.index("## 13.")]
    row = r"^\| ([\w+,\- ]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$"
    rows = re.findall(row, section, re.MULTILINE)
    assert len(rows) == 6
    for name, *numbers in rows:
        measured = [line for line in measured_lines if line.startswith(f"| {name}")]
        assert any(all(f" {number} " in line for number in numbers) for line in measured), name


@pytest.mark.parametrize("lab", NUMBERS)
def test_each_question_of_a_lab_has_an_answer(lab):
    cell = LABS[lab].read_text().split('"""Questions to talk about')[1].split('"""')[0]
    section = ANSWERS.split(f"## Lab {lab}\n")[1].split("\n## ")[0]
    numbers = [re.findall(r"^(\d)\. ", text, re.MULTILINE) for text in (cell, section)]
    assert numbers[0] == numbers[1] == ["1", "2", "3"]


def test_the_answers_about_the_toy_are_those_of_the_cascade():
    """Lab 0: what gets no gradient, and three clusters in place of two."""
    logits = [*toy.CLUSTER_LOGITS, toy.SLOT_LOGITS]
    with_three = toy.cascade(toy.SLOT_TO_LABEL, logits, [2, 3], toy.LEVELS)
    in_training = toy.trace(toy.toy_cascade(), [toy.CORRECT], teacher=True)
    not_scored = [label for label in toy.SLOT_TO_LABEL if label not in in_training["labels scored"]]
    assert not_scored == [5, 0, 7, 1] and "not scored: 5, 0, 7 and 1" in ANSWERS
    for teacher in (False, True):
        found = toy.trace(with_three, [toy.CORRECT], teacher)
        assert found["kept by level 2"] == [0, 2, 3]
        assert found["labels scored"] == sorted([6, 2, 7, 1, 4, 3])
    assert toy.trace(with_three, [toy.CORRECT], False)["best label"] == [toy.CORRECT]


def test_the_figures_of_the_answers_stand_on_the_other_pages():
    """Of labs 1 to 4; what an answer works out itself is left out."""
    worked_out = {"0.6", "1.2", "3.3"}
    answers = ANSWERS[ANSWERS.index("## Lab 1") : ANSWERS.index("## Lab 5")]
    pages = LECTURE + PAGES[1].read_text()
    figures = set(re.findall(r"\b\d+\.\d+\b", answers)) - worked_out
    assert len(figures) > 10
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", pages), figure


def test_the_readme_leads_to_the_course():
    assert "(course/README.md)" in (ROOT / "README.md").read_text()


def test_the_commands_of_the_labs_have_flags_that_exist():
    configs = {f"{stage.__name__}.py": stage.Config for stage in vars(stages).values()}
    pages = "\n".join(page.read_text() for page in (*LABS, *PAGES))
    commands = re.findall(r"python (0\d_\w+\.py)([^\n`]*)", pages)
    assert len(commands) > 5
    for script, words in commands:
        known = {field.name for field in dataclasses.fields(configs[script])}
        flags = re.findall(r"--([a-z-]+)", words)
        assert {flag.replace("-", "_") for flag in flags} <= known, (script, words)


def test_the_page_for_lecturers_shows_an_answer_of_the_check(capsys):
    wrong = next(wrong for lab, step, wrong, hint in WRONG if hint == "wrong order")
    found = check.answers(filled(0, solved(0, children=wrong)), 0, LABS[0])
    check.print_answers(0, found)
    shown = re.search(r"```text\n(step 2.*?)```", PAGES[1].read_text(), re.DOTALL)[1]
    assert shown in capsys.readouterr().out
