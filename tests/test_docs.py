"""What the pages in docs/ show is run, and what they name exists."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, make_corpus, stages

from plumbing.store import load_pt

PAGES = sorted((ROOT / "docs").glob("*.md"))
MARKDOWN = [
    ROOT / "README.md",
    *PAGES,
    ROOT / "bench" / "README.md",
    ROOT / "variants" / "README.md",
]
SMALL = ["--tiny", "1,32", "--epochs", "1", "--amp", "off", "--batch-size", "16", "--max-len", "32"]


def python(*words, **environment) -> str:
    """What a command prints; a failure shows its errors."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with data and tree of a small corpus."""
    folder = tmp_path_factory.mktemp("fork")
    corpus = make_corpus(folder / "corpus")
    stages.data.run(stages.data.Config(run=str(folder), corpus=str(corpus), vocab=300))
    stages.tree.run(stages.tree.Config(run=str(folder), levels="8"))
    return folder


def blocks_of_forking() -> dict[str, str]:
    """{heading: the Python block below it} of docs/forking.md."""
    page = (ROOT / "docs" / "forking.md").read_text()
    found = re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", page, flags=re.DOTALL | re.MULTILINE
    )
    return dict(found)


def start(name: str, run, *flags) -> str:
    """Run a block of docs/forking.md as the script that a reader would save."""
    script = run / "fork.py"
    script.write_text(blocks_of_forking()[name])
    return python(script, "--run", run, *flags, PYTHONPATH=str(ROOT))


def test_there_is_an_example_for_each_part_that_forks_change():
    assert list(blocks_of_forking()) == [
        "Another loss",
        "Other negatives",
        "Another tree",
        "Another encoder",
    ]


@pytest.mark.parametrize("name", ["Another loss", "Other negatives"])
def test_a_fork_with_another_loss_or_other_negatives_learns_otherwise(run, name):
    python("04_train.py", "--run", run, *SMALL)
    before = load_pt(run / "model.pt")[0]["model"]
    start(name, run, *SMALL)
    after = load_pt(run / "model.pt")[0]["model"]
    assert set(before) == set(after)
    assert any(not np.array_equal(before[key].numpy(), after[key].numpy()) for key in before)
    assert "cascade, p(label)" in python("05_eval.py", "--run", run)


def test_a_fork_with_another_encoder_is_trained_and_judged(run):
    printed = start("Another encoder", run, *SMALL)
    assert "cascade, p(label)" in printed
    content = load_pt(run / "model.pt")[0]
    assert content["encoder"]["width"] == 128 and "encoder.words.weight" in content["model"]


def test_a_fork_with_another_tree_is_trained_and_judged(run):
    start("Another tree", run)
    tree = stages.tree.load(run)
    names = stages.data.load(run).names
    order = [names[label] for label in tree.slot_to_label if label >= 0]
    assert tree.levels == [3, 9] and order == sorted(names)
    python("04_train.py", "--run", run, *SMALL)
    assert "of 9 clusters" in python("05_eval.py", "--run", run)


def test_functions_that_the_paper_s_page_names_exist():
    page = (ROOT / "docs" / "paper.md").read_text()
    named = re.findall(r"`(0\d_\w+)\.py: ([\w.]+)`", page)
    assert len(named) >= 15
    modules = {module.__name__: module for module in vars(stages).values()}
    for file, name in named:
        thing = modules[file]
        for part in name.split("."):
            assert hasattr(thing, part), f"{file}.py has no {name}"
            thing = getattr(thing, part)


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_the_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(\s*([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page}: {target}"
