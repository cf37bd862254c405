"""The benchmarks run, at toy size, and write what they print; their synthetic corpora are what they
claim.
"""

import json
import os
import subprocess
import sys

import numpy as np
from conftest import ROOT, make_corpus, stages

sys.path.insert(0, str(ROOT / "bench"))
import common  # noqa: E402


def bench(command: list[str], **environment) -> str:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def rows_of(path) -> dict[str, float]:
    content = json.loads(path.read_text())
    assert {"commit", "date", "cpu", "torch"} <= set(content["machine"])
    return {row["what"]: row["value"] for row in content["rows"]}


def test_what_a_gpu_is_to_show_runs_on_a_cpu(tmp_path):
    printed = bench(
        ["bash", "bench/gpu.sh"], TOY="1", DEVICE="cpu", OUT=str(tmp_path), PYTHON=sys.executable
    )
    for name in ("step", "predict"):
        rows = rows_of(tmp_path / f"{name}-cpu.json")
        assert len(rows) > 5
        for what, value in rows.items():
            # Memory is what the process grew by, and a difference of two times is noise: at this
            # size both may be nothing, or less.
            may_be_less = "peak" in what or "full step - encoder-only" in what
            assert np.isfinite(value) and (value >= 0 or may_be_less), rows
        assert all(what in printed for what in rows)


def test_the_tree_benchmark_runs(tmp_path):
    bench(
        [
            sys.executable,
            "bench/tree.py",
            "--labels",
            "256",
            "--whole",
            "300",
            "--out",
            str(tmp_path / "tree.json"),
        ]
    )
    rows = rows_of(tmp_path / "tree.json")
    gain = next(value for what, value in rows.items() if "gain, ours / recursion" in what)
    assert 0.7 < gain < 1.4  # 256 labels: luck counts; tests/test_tree.py has the arithmetic


def test_the_prediction_benchmark_runs_on_a_trained_run(tmp_path, done):
    out = tmp_path / "predict.json"
    bench(
        [
            sys.executable,
            "bench/predict.py",
            "--run",
            str(done),
            "--documents",
            "40",
            "--rounds",
            "1",
            "--metrics",
            "100",
            "--out",
            str(out),
        ]
    )
    recall = next(
        value for what, value in rows_of(out).items() if "share of the exact top 5" in what
    )
    assert 0.3 < recall <= 1


def test_the_benchmark_of_the_report_runs(tmp_path):
    out = tmp_path / "report.json"
    printed = bench(
        [
            sys.executable,
            "bench/report.py",
            "--documents",
            "300",
            "--labels",
            "256",
            "--k",
            "20",
            "--out",
            str(out),
        ]
    )
    assert (
        len(rows_of(out)) == 3
        and "300 test documents" in printed
        and "ECE@5 after isotonic" in printed
    )


def test_the_comparison_of_label_optimisers_runs(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", n_documents=60, n_labels=30)
    printed = bench(
        [
            sys.executable,
            "bench/parity.py",
            "--corpus",
            str(corpus),
            "--runs",
            str(tmp_path / "runs"),
            "--seeds",
            "0",
            "--epochs",
            "1",
            "--out",
            str(tmp_path / "parity.json"),
        ]
    )
    rows = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert [row["what"].split()[0] for row in rows] == [
        kind for kind in ("rows", "dense", "bf16") for _ in range(6)
    ]
    assert all(0 <= row["seeds"][0] <= 100 for row in rows) and "seed 0 bf16" in printed


def test_synthetic_corpora_have_the_shape_that_was_asked_for():
    split = common.random_documents(2000, 500, 1000, 60)
    length = np.diff(split.offsets)
    assert (
        50 < np.median(length) < 70 and length.max() > 200 and len(split.ids) == split.offsets[-1]
    )
    assert split.labels.max() < 500 and 3 < np.diff(split.label_offsets).mean() <= 5
    topics = common.topic_split(900, 600, 1000, 20, 5)
    assert len(topics) == 900 and (np.bincount(topics.labels, minlength=600) > 0).all()
    for part in (split, topics):
        for i in range(0, 100):
            row = part.labels[part.label_offsets[i] : part.label_offsets[i + 1]]
            assert (np.diff(row) > 0).all()
    tree = common.random_tree(45, [4, 16])
    assert sorted(tree.slot_to_label[tree.slot_to_label >= 0]) == list(range(45))
    assert stages.data.Data({"train": split}, [], {"prefix": [2], "suffix": [3], "pad": 0}).batch(
        "train", np.arange(4), 16
    ).ids_BT.shape == (4, 16)
