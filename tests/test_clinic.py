"""The bug clinic: every patch applies to a copy, shows the figures that its page tells of, and is
found by its check. One process for each sick copy, and one small model that most of them share.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import ROOT

from course.clinic import __main__ as clinic
from course.clinic import checks, pipeline
from course.clinic.corpus import make_small_corpus
from course.clinic.dead_encoder import make_dead_encoder

SIZES = {"train": 1500, "val": 60, "test": 150}
# Bugs in how the model learns: the sick code trains a model of its own.
IN_TRAINING = {
    "03_labels_that_do_not_learn": "tiny",
    "06_the_best_loss": "tiny",
    "08_weights_that_grow": "dead",
}
EPOCHS = {"tiny": 4, "dead": 2}
MAX_LEN = {"tiny": 128, "dead": 32}
IN_A_COPY = """
import json, sys
from pathlib import Path
from course.clinic import checks, pipeline
run, kind, epochs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if epochs:
    pipeline.train(run, kind, epochs=epochs, max_len=int(sys.argv[4]))
found = {"figures": pipeline.measure(run), "failing": checks.failing()}
(run / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """{kind: run folder and figures} of a model that the healthy code has trained."""
    root = tmp_path_factory.mktemp("healthy")
    make_small_corpus(ROOT / "data" / "debian", root / "corpus", SIZES)
    make_dead_encoder(root / "corpus", root / "encoder", vocab=1500)
    kinds = {}
    for kind, encoder in (("tiny", "tiny"), ("dead", str(root / "encoder"))):
        run = root / kind
        pipeline.prepare(root / "corpus", encoder, run)
        pipeline.train(run, kind, epochs=EPOCHS[kind], max_len=MAX_LEN[kind])
        kinds[kind] = SimpleNamespace(run=run, figures=pipeline.measure(run))
    return kinds


@pytest.fixture(scope="module")
def sick(healthy, tmp_path_factory) -> dict[str, dict]:
    """{bug: what its copy has found}: "figures", and "failing" checks."""

    def find(name: str) -> dict:
        code = tmp_path_factory.mktemp(name)
        clinic.copy_code(code)
        clinic.put_bug(name, code)
        kind = IN_TRAINING.get(name, "tiny")
        files = ["data.npz", "tree.npz"]
        if name not in IN_TRAINING:
            files.append("model.pt")
        run = code / "run"
        run.mkdir()
        for file in files:
            shutil.copy(healthy[kind].run / file, run)
        epochs = EPOCHS[kind] if name in IN_TRAINING else 0
        command = [sys.executable, "-c", IN_A_COPY, str(run), kind]
        command += [str(epochs), str(MAX_LEN[kind])]
        environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=code, env=environment, check=True, capture_output=True)
        return json.loads((run / "found.json").read_text())

    # Two copies at a time: each is a process with one thread.
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(clinic.NAMES, pool.map(find, clinic.NAMES), strict=True))


def figures_of(name, healthy, sick) -> tuple[dict, dict]:
    kind = IN_TRAINING.get(name, "tiny")
    return healthy[kind].figures, sick[name]["figures"]


def same(before, after, *names) -> bool:
    return all(before[name] == after[name] for name in names)


@pytest.mark.parametrize("name", clinic.NAMES)
def test_a_patch_applies_to_a_copy(name, tmp_path):
    clinic.copy_code(tmp_path)
    clinic.put_bug(name, tmp_path)
    changed = [
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*.py")
        if path.read_bytes() != (ROOT / path.relative_to(tmp_path)).read_bytes()
    ]
    # the one file that the patch names
    patch = (clinic.HERE / f"{name}.patch").read_text()
    assert changed == re.findall(r"^\+\+\+ b/(.+)$", patch, re.MULTILINE)


def test_healthy_code_passes_all_checks():
    assert set(checks.CHECKS) == set(clinic.NAMES)
    assert checks.failing() == []


@pytest.mark.parametrize("name", clinic.NAMES)
def test_a_bug_is_found_by_its_check_and_by_no_other(name, sick):
    assert sick[name]["failing"] == [name]


def test_documents_out_of_order_lose_p_at_1_and_keep_the_recall(healthy, sick):
    before, after = figures_of("01_close_to_guessing", healthy, sick)
    assert after["test: P@1"] < 0.5 * before["test: P@1"]
    assert same(before, after, "test: shortlist recall", "test, neighbours: P@1")


def test_a_teacher_in_prediction_lifts_the_recall(healthy, sick):
    before, after = figures_of("02_better_than_everything", healthy, sick)
    assert before["test: shortlist recall"] < 80
    assert after["test: shortlist recall"] > 95
    assert after["test: R@100"] > before["test: R@100"] + 10


def test_rows_that_are_never_stepped_are_zero(healthy, sick):
    before, after = figures_of("03_labels_that_do_not_learn", healthy, sick)
    assert before["label rows that are zero, %"] == 0
    assert after["label rows that are zero, %"] > 10


def test_padding_in_the_mean_makes_the_batch_size_matter(healthy, sick):
    before, after = figures_of("04_the_size_of_a_batch", healthy, sick)
    n_test = SIZES["test"]
    alone = "test, --batch-size 1: nDCG@5"
    together = f"test, --batch-size {n_test}: nDCG@5"
    assert before[alone] == before[together]
    assert after[alone] == before[alone]
    assert after[together] != after[alone]


def test_propensities_of_the_test_split_move_psp_alone(healthy, sick):
    before, after = figures_of("05_three_columns", healthy, sick)
    assert same(before, after, "test: P@1", "test: P@5", "test: nDCG@5", "test: R@100")
    assert not same(before, after, "test: PSP@5")
    assert not same(before, after, "test, neighbours: PSP@5")


def test_a_reversed_shortlist_loses_the_labels(healthy, sick):
    before, after = figures_of("06_the_best_loss", healthy, sick)
    assert after["last loss of level 3"] < 0.1 * before["last loss of level 3"]
    assert after["test: shortlist recall"] < 0.5 * before["test: shortlist recall"]


def test_documents_without_labels_that_count_lower_all_but_psp(healthy, sick):
    before, after = figures_of("07_the_same_factor", healthy, sick)
    factor = after["test: P@1"] / before["test: P@1"]
    assert factor < 0.8
    for name in ("test: P@5", "test: nDCG@5", "test: R@100", "test, neighbours: P@1"):
        assert after[name] / before[name] == pytest.approx(factor, abs=0.01)
    assert same(before, after, "test: PSP@1", "test: PSP@5", "test, neighbours: PSP@5")


def test_a_second_moment_that_stays_zero_makes_weights_large(healthy, sick):
    before, after = figures_of("08_weights_that_grow", healthy, sick)
    assert after["largest weight of a label"] > 5 * before["largest weight of a label"]
    assert after["last loss of level 3"] > before["last loss of level 3"]


def test_the_list_names_the_bugs_and_each_has_a_page_with_its_answer_below_a_line():
    command = [sys.executable, "-m", "course.clinic", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == clinic.NAMES
    assert len(clinic.NAMES) == 8
    for name in clinic.NAMES:
        page = (clinic.HERE / f"{name}.md").read_text()
        symptom, answer = page.split("\n---\n")
        assert f"python -m course.clinic {name}" in symptom
        assert f"`{checks.CHECKS[name].__name__}`" in answer
