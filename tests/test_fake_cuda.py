"""The path on a GPU, without a GPU: nothing makes it wait in a step, and memory keeps its bounds.

Each in a process of its own, because bench/fake_cuda.py patches torch."""

import ast
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

CPU_BUILD = torch.version.cuda is None and torch.__version__.startswith("2.13.0")
pytestmark = pytest.mark.skipif(
    not CPU_BUILD, reason="a CUDA device can be pretended only with the CPU build of torch 2.13.0"
)


def python(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def test_nothing_makes_a_gpu_wait_but_the_progress_line_and_the_predictions():
    done = python("bench/fake_cuda.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults" in done.stdout
    # Something is watched at all: the allowed waits are there.
    assert "a number is asked for at 04_train.py:record" in done.stdout
    assert "a blocking copy to cpu at 04_train.py:predict_rankings" in done.stdout


def test_planted_faults_are_found():
    done = python("bench/fake_cuda.py", "--plant")
    assert done.returncode == 0, done.stdout + done.stderr
    faults = [line for line in done.stdout.splitlines() if line.endswith("A FAULT")]
    for what in ("_unique2", "with a tensor of the CPU", "a number is asked for"):
        assert any(what in line for line in faults), done.stdout


# What a step with BERT-base may take: GiB at the peak, and what RowAdam moves, as a multiple of
# reading and writing every row that takes part once. Where clusters are gathered it is more.
BOUNDS = [(8.0, 5.0), (8.0, 3.0), (16.0, 5.0)]


def test_memory_and_traffic_of_a_step_keep_their_bounds():
    done = python("bench/simulate.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SIMULATED") == len(simulate_sizes())
    peaks = re.findall(r"peak ([0-9.]+) GiB", done.stdout)
    moved = re.findall(r"RowAdam +([0-9.]+)", done.stdout)
    for size, peak, gigabytes, bounds in zip(simulate_sizes(), peaks, moved, BOUNDS, strict=True):
        n_labels, levels, topk = size
        most_peak, most_moved = bounds
        # The weights of the labels, and weights and moments of BERT-base, are there in any case.
        slots = levels[-1] * -(-n_labels // levels[-1])
        row_bytes = 4 * 768 * slots
        assert row_bytes + 1.2e9 < float(peak) * 2**30 <= most_peak * 2**30
        # 64 documents keep so many of the clusters; beyond 0.4 of them all take part.
        share = 64 * topk[-1] / levels[-1]
        least = 2 * row_bytes * (1 if share >= 0.4 else share)
        assert least <= float(gigabytes) * 1e9 <= most_moved * least


def simulate_sizes() -> list:
    """SIZES of bench/simulate.py, read from its source: only bench/ can import it."""
    source = (ROOT / "bench" / "simulate.py").read_text()
    text = re.search(r"SIZES = (\[.*?\n\])", source, flags=re.DOTALL).group(1)
    return ast.literal_eval(text)
