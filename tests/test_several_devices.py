"""Two processes, started by torchrun, do what one does: the same steps, the same predictions, a
checkpoint that either can go on from."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, stages

from plumbing import several_devices
from plumbing.store import load_npz, load_pt

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def flags(**settings) -> list[str]:
    return [
        part
        for key, value in settings.items()
        for part in (f"--{key.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]


def start(n_processes: int, *command: str) -> subprocess.Popen:
    launcher = [*TORCHRUN, str(n_processes), "--"] if n_processes > 1 else [sys.executable]
    return subprocess.Popen(
        [*launcher, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> str:
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, printed + said
    return printed


@pytest.mark.parametrize("label_bf16", [False, True])
def test_two_processes_take_the_steps_of_one(prepared, label_bf16):
    """Eleven steps, with unequal shares, and a batch of a single document at the end."""
    found = []
    running = []
    for n_processes in (1, 2):
        out = prepared / f"weights-{n_processes}.pt"
        more = ["--label-bf16"] if label_bf16 else []
        script = ["tests/fit_a_few_steps.py", str(prepared), str(out), *more]
        running.append((start(n_processes, *script), out))
    for process, out in running:
        finish(process)
        found.append(torch.load(out, weights_only=True))
    one, two = found
    assert one["steps"] == two["steps"] == 11
    torch.testing.assert_close(one["loss"], two["loss"], rtol=1e-5, atol=1e-5)
    moved = 0
    for key, weight in one["model"].items():
        other = two["model"][key]
        if weight.dtype != torch.bfloat16:
            tolerance = 1e-4 if label_bf16 else 1e-9
            torch.testing.assert_close(weight, other, rtol=tolerance, atol=tolerance)
            continue
        # Rounding depends on step and row, not on the process. Sums in another order may still fall
        # on the other side: then by one step of a bfloat16, whose bits are those of its neighbour.
        apart = (weight.view(torch.int16).int() - other.view(torch.int16).int()).abs()
        assert apart.max() <= 1 and (apart == 0).float().mean() >= 0.9999
        moved += int((weight != 0).sum())
    assert moved > 0 or not label_bf16


def test_training_and_prediction_in_two_processes(prepared):
    """Heads first, then all; the same log, model and predictions as in one, and one writes."""
    settings = SMALL | {"head_epochs": 1, "epochs": 1, "dropout": 0}
    runs = [prepared / "one", prepared / "two"]
    for run in runs:
        run.mkdir()
        for name in ("data.npz", "tree.npz"):
            (run / name).write_bytes((prepared / name).read_bytes())
    for script, more in (("04_train.py", settings), ("05_eval.py", {"k": 20})):
        running = []
        for n_processes, run in enumerate(runs, 1):
            running.append(start(n_processes, script, *flags(run=run, **more)))
        printed = [finish(process) for process in running]
    # The table of stage 5 is printed once, and the same but for the speeds.
    tables = [re.findall(r"^.*TF-IDF.*$|^cascade.*$|^shortlist.*$", text, re.M) for text in printed]
    assert len(tables[0]) == 5 and tables[0] == tables[1]
    logs = []
    for run in runs:
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        logs.append([record for record in records if "loss" in record])
    assert len(logs[0]) == len(logs[1]) > 10
    for one, two in zip(*logs, strict=True):
        assert one["step"] == two["step"] and one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    one, two = (load_npz(run / "predictions.npz")[0] for run in runs)
    assert (one["labels"] == two["labels"]).mean() > 0.99
    np.testing.assert_allclose(one["scores"], two["scores"], atol=1e-3)


@pytest.mark.parametrize("how", ["ctrl-c", "killed"])
def test_what_is_left_when_two_processes_are_stopped_can_go_on_in_one(prepared, how):
    """A Ctrl-C reaches all processes and torchrun, too; a kill reaches a single one."""
    settings = flags(run=prepared, **SMALL | {"save_every": 2})
    process = start(2, "04_train.py", *settings)
    for line in process.stdout:
        if " step 6/" in line:
            break
    workers = children(process.pid)
    assert len(workers) == 2
    if how == "ctrl-c":
        for number in (*workers, process.pid):
            os.kill(number, signal.SIGINT)
    else:
        os.kill(workers[1], signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - began < 60, said
    if how == "ctrl-c":
        assert "a checkpoint was saved after step" in said
    step = load_pt(prepared / "checkpoint.pt")[0]["step"]
    assert 4 <= step < 38
    printed = finish(start(1, "04_train.py", *settings, "--resume"))
    assert f"going on after step {step}" in printed
    assert load_pt(prepared / "checkpoint.pt")[0]["finished"]


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for folder in os.listdir("/proc"):
        if not folder.isdigit():
            continue
        try:
            with open(f"/proc/{folder}/stat") as file:
                # number (name) state parent ...; a name may hold blanks
                fields = file.read().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        if int(fields[1]) == parent:
            found.append(int(folder))
    return sorted(found)


def test_other_scripts_do_not_run_in_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(stages.data.UserError, match="torchrun is for"):
        several_devices.join(may=False)


def test_a_single_process_has_everything():
    rows = np.arange(5)
    own, share = several_devices.share(rows)
    assert own.tolist() == rows.tolist() and share == 1.0
    tensor = torch.ones(3)
    several_devices.add_up([tensor])
    assert several_devices.gather([tensor])[0] is tensor and tensor.tolist() == [1, 1, 1]
