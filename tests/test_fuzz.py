"""Corpora that nobody would think of go through all five stages, or are refused with a sentence;
nothing in between.

FUZZ=300 python -m pytest tests/test_fuzz.py -s      more of them than the tests run by default
"""

import gzip
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from conftest import SMALL, has_exact, stages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plumbing.errors import UserError
from plumbing.store import load_npz

PIECES = [
    "",
    " ",
    "\t\n",
    "a",
    "A",
    "word",
    "#",
    "##a",
    "[CLS]",
    "[UNK]",
    "\u0000",
    "\ud800",
    "\u200b",
    "\u202e",
    "ß",
    "日本",
    "🙂",
    "\ufeff",
    "e\u0301",
    "x" * 3000,
    "0" * 70,
    "<s>",
    "\\",
    '"',
    "\x7f",
    "\u2028",
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join) | st.text(max_size=40)
NAME = st.sampled_from(["l0", "l1", "l2", "l3", "l4", "l5", "l6"])
ODD = st.sampled_from(["", " ", "ß 日本", "../l0", "a\nb", "x" * 300, "\ufeff", "🙂"])
GARBAGE = st.sampled_from(
    [None, 7, True, [], {}, {"text": "a"}, {"text": 1, "labels": []}, {"text": "a", "labels": [[]]}]
)
DOCUMENT = st.fixed_dictionaries({"text": TEXT, "labels": st.lists(NAME, max_size=7)})
ROWS = st.lists(DOCUMENT, min_size=1, max_size=10)
found = Counter()


@st.composite
def corpora(draw) -> dict:
    """{file: rows}, most of them sound; the labels come in any number, with any text."""
    names = draw(st.lists(NAME | ODD, min_size=1, max_size=9, unique=draw(st.integers(0, 9)) > 0))
    rows = {split: draw(ROWS) for split in ("train", "val", "test")}
    if draw(st.integers(0, 3)):  # the labels that are used are there
        names += sorted(
            {label for part in rows.values() for row in part for label in row["labels"]}
            - set(names)
        )
    if not draw(st.integers(0, 7)):
        rows[draw(st.sampled_from(sorted(rows)))].append(draw(GARBAGE))
    if draw(st.booleans()):
        del rows["val"]
    return rows | {"labels": [{"name": name, "text": draw(TEXT)} for name in names]}


@given(corpora())
@settings(
    max_examples=int(os.environ.get("FUZZ", 20)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="FUZZ" not in os.environ,
)
def test_any_corpus_goes_through_or_is_refused(rows):
    folder = Path(tempfile.mkdtemp())
    try:
        for name, part in rows.items():
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        run = str(folder / "run")
        try:
            stages.data.run(
                stages.data.Config(run=run, corpus=str(folder), vocab=120, max_tokens=100)
            )
        except UserError as error:
            found[str(error).split(": ", 1)[-1].split("'")[0][:60]] += 1
            assert not (folder / "run" / "data.npz").exists()
            return
        data = stages.data.load(run)
        stages.tree.run(stages.tree.Config(run=run))
        stages.train.run(
            stages.train.Config(run=run, **SMALL | {"tiny": "1,16", "topk": None, "epochs": 1})
        )
        stages.eval.run(stages.eval.Config(run=run, k=5, show=2, exact=has_exact(run)))
        result, _ = load_npz(folder / "run" / "predictions.npz")
        n_labels = len(data.names)
        assert result["labels"].shape == (len(data.splits["test"]), 5)
        assert ((result["labels"] >= 0).sum(axis=1) == min(5, n_labels)).all() and result[
            "labels"
        ].max() < n_labels
        assert np.isfinite(result["scores"][result["labels"] >= 0]).all()
        found["through all five stages"] += 1
    finally:
        shutil.rmtree(folder)


def test_what_the_fuzzing_met():
    """Both ends were met; -s shows the counts."""
    print(json.dumps(found, indent=1))
    assert not found or 0 < found["through all five stages"] < sum(found.values())
