"""What the pages in docs/ show is run, and what they name exists."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, links_of, make_corpus, stages

from plumbing.encoders import check_own_encoder
from plumbing.store import load_pt

PAGES = sorted((ROOT / "docs").glob("*.md"))
MARKDOWN = [
    ROOT / "README.md",
    *PAGES,
    ROOT / "bench" / "README.md",
    *sorted((ROOT / "course").rglob("*.md")),
    *sorted((ROOT / "variants").glob("*.md")),
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


def failure(*words) -> str:
    """What a command says that fails."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    return done.stderr


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


def weights_of(run) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in load_pt(run / "model.pt")[0]["model"].items()}


def test_a_fork_with_another_loss_is_trained_and_judged_with_its_setting(run):
    weights = []
    for gamma in ("2", "0"):
        printed = start("Another loss", run, *SMALL, "--gamma", gamma)
        assert f"gamma={gamma}.0" in printed and "cascade, p(label)" in printed
        weights.append(weights_of(run))
    # Gamma 0 is the plain loss.
    python("04_train.py", "--run", run, *SMALL)
    plain = weights_of(run)
    assert set(plain) == set(weights[0]) == set(weights[1])
    assert all(np.allclose(plain[key], weights[1][key], atol=1e-4) for key in plain)
    assert not all(np.allclose(plain[key], weights[0][key], atol=1e-4) for key in plain)


def test_a_fork_with_a_setting_of_its_own_is_judged_by_its_own_script(run):
    start("Another loss", run, *SMALL)
    error = failure("05_eval.py", "--run", run)
    assert "has settings that 04_train.py does not know (gamma); run the script" in error


def test_a_fork_with_other_negatives_learns_otherwise(run):
    python("04_train.py", "--run", run, *SMALL)
    before = weights_of(run)
    start("Other negatives", run, *SMALL)
    after = weights_of(run)
    assert set(before) == set(after)
    assert any(not np.array_equal(before[key], after[key]) for key in before)
    printed = python("05_eval.py", "--run", run)
    assert "was trained as RandomNegatives, this is Cascade" in printed
    assert "cascade, p(label)" in printed


def test_a_training_goes_on_only_with_the_script_that_began_it(run):
    start("Other negatives", run, *SMALL)
    error = failure("04_train.py", "--run", run, *SMALL, "--resume")
    assert "was trained as RandomNegatives, this is Cascade; go on with the script" in error


def test_a_fork_with_another_encoder_is_trained_and_judged(run):
    printed = start("Another encoder", run, *SMALL)
    assert "cascade, p(label)" in printed
    content = load_pt(run / "model.pt")[0]
    assert content["encoder"]["width"] == 128 and "encoder.words.weight" in content["model"]
    error = failure("05_eval.py", "--run", run)
    assert "is not of the transformers library; run the script that it was trained with" in error


class OwnEncoder(torch.nn.Module):
    """As EncoderProtocol says; the tests take something away."""

    depth = 0
    table = None

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.words = torch.nn.Embedding(300, width)

    def forward(self, ids_BT, mask_BT, layers):
        return {0: self.words(ids_BT).mean(1)}

    def description(self):
        return {"width": self.width}


class Unpooled(OwnEncoder):
    def forward(self, ids_BT, mask_BT, layers):
        return {0: self.words(ids_BT)}


class Forgetful(OwnEncoder):
    def description(self):
        return {}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (OwnEncoder, ""),
        (Unpooled, r"hidden state 0 of 2 documents has the shape \(2, 3, 8\)"),
        (Forgetful, "another Forgetful from its description"),
        (torch.nn.Identity, "Identity has no width: see EncoderProtocol"),
    ],
)
def test_a_mistake_in_an_encoder_of_a_fork_shows_before_the_training(make, said):
    def make_again(description, weights):
        return make(**description)

    encoder = make() if make is torch.nn.Identity else make(8)
    if not said:
        check_own_encoder(encoder, {0}, make_again)
        return
    with pytest.raises(TypeError, match=said):
        check_own_encoder(encoder, {0}, make_again)


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
    for target in links_of(page):
        assert target.exists(), f"{page}: {target}"
