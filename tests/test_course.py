"""The course: its labs can be solved with the stages' own functions, and the check answers wrong
solutions with a hint that fits.
"""

import ast
import re
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT, make_corpus, stages

from course import check, toy

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


# 1. Wrong solutions. For each step three, and a part of the hint that each should get.


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
    (0, "children", lambda c, F: np.array([[p * F + f for f in range(F) for p in row] for row in c]),
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
    (0, "trace_of_training", lambda: {"kept by level 1": [0, 1]}, "in slot 6"),
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
    lab = LABS[1].read_text().replace(
        'raise NotImplementedError("step 2: P@j for all j")', "return hit_Nk + missing"
    )
    line = 1 + lab[: lab.index("return hit_Nk + missing")].count("\n")
    status, printed = printed_for(lab, tmp_path, capsys)
    assert status == 1 and f"NameError on line {line} of the lab" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("LAB = 1\ndef precision(:\n", "line 2"),
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


@pytest.mark.parametrize("word", ["9", "no_such_file.py"])
def test_a_lab_that_does_not_exist(word, capsys):
    assert check.main([word]) == 2 and "there is no" in capsys.readouterr().out


def test_the_command_checks_a_lab_from_the_shell():
    done = subprocess.run(
        [sys.executable, "-m", "course.check", "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "0 of 4 steps pass" in done.stdout and not done.stderr


# 3. The labs run.


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Data and tree of a small corpus, as the labs' commands make them of the demo's."""
    folder = tmp_path_factory.mktemp("course")
    corpus = make_corpus(folder / "corpus")
    stages.data.run(stages.data.Config(run=str(folder), corpus=str(corpus), vocab=400))
    stages.tree.run(stages.tree.Config(run=str(folder), levels="4,8"))
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
