"""Shared by the tests: the stages as modules, and a small corpus on which all five have run."""

import gzip
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from plumbing.stages import load_stages
from plumbing.store import load_pt

ROOT = Path(__file__).parent.parent
# Small models on small batches: threads would only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

stages = load_stages()


# A fork may delete them. All tests that are not about them still pass.
HAS_VARIANTS = (ROOT / "variants").is_dir()
needs_variants = pytest.mark.skipif(not HAS_VARIANTS, reason="variants/ has been deleted")


def links_of(page: Path) -> list[Path]:
    """The files that a page in Markdown links to, without what was deleted on purpose."""
    targets = re.findall(r"\]\(\s*([^)#\s]+)[^)]*\)", page.read_text())
    links = [page.parent / target for target in targets if not target.startswith("http")]
    return [link for link in links if HAS_VARIANTS or "variants" not in link.parts]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def formed(shape, parts):
    """The gradient (C, F, D) of `shape`, or (C, F) of a bias, that factors stand for."""
    is_bias = len(shape) == 2
    width = 1 if is_bias else shape[2]
    found = parts[0].x_BD.new_zeros(*shape[:2], width)
    for part in parts:
        x_BD = torch.ones_like(part.x_BD[:, :1]) if is_bias else part.x_BD
        for clusters_K, dz_KF, x_D in zip(part.clusters_BK, part.dz_BKF, x_BD, strict=True):
            found.index_add_(0, clusters_K, dz_KF[..., None] * x_D)
    return found.view(shape)


def gradient(parameter):
    """What .grad would be, of a sparse head from the factors."""
    return (
        formed(parameter.shape, parameter.factors)
        if hasattr(parameter, "factors")
        else parameter.grad
    )


def has_exact(run) -> bool:
    """Whether validation chose a ranking that all labels can be scored by: p(label) is one of the
    beam alone.
    """
    return load_pt(Path(run) / "model.pt")[0]["ranking"] != "label"


def write_jsonl(path: Path, rows: list[dict]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_corpus(
    folder: Path, n_documents: int = 300, n_labels: int = 40, seed: int = 0, val: bool = True
) -> Path:
    """Documents made of the words of their labels and noise. In the test split some have none."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"label-{i}" for i in range(n_labels)]

    def document(i: int) -> dict:
        mine = rng.choice(n_labels, size=rng.integers(1, 4), replace=False)
        words = [f"word{label}x{j}" for label in mine for j in range(3)] + [
            f"noise{j}" for j in rng.integers(0, 50, 8)
        ]
        rng.shuffle(words)
        return {
            "text": " ".join(words),
            "labels": [names[label] for label in mine] if i % 50 != 49 else [],
        }

    for split, n in (("train", n_documents), ("val", 60), ("test", 60)):
        if split != "val" or val:
            write_jsonl(folder / f"{split}.jsonl.gz", [document(i) for i in range(n)])
    write_jsonl(
        folder / "labels.jsonl.gz", [{"name": name, "text": f"what {name} means"} for name in names]
    )
    return folder


SMALL = {"tiny": "2,32", "max_len": 32, "amp": "off", "epochs": 2, "batch_size": 16, "topk": "4"}


def run_pipeline(run: Path, corpus: Path, **train) -> Path:
    """Stages 1, 2, 4 and 5 with a tiny encoder."""
    stages.data.run(stages.data.Config(run=str(run), corpus=str(corpus), vocab=400))
    stages.tree.run(stages.tree.Config(run=str(run), levels="8"))
    stages.train.run(stages.train.Config(run=str(run), **{**SMALL, **train}))
    stages.eval.run(stages.eval.Config(run=str(run), k=20))
    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def done(tmp_path_factory, corpus) -> Path:
    """A run folder in which the whole path has been run; not to be changed by a test."""
    return run_pipeline(tmp_path_factory.mktemp("run"), corpus)


@pytest.fixture
def prepared(tmp_path, done) -> Path:
    """The test's own folder, with what training needs in it."""
    for name in ("data.npz", "tree.npz"):
        (tmp_path / name).write_bytes((done / name).read_bytes())
    return tmp_path
