"""Nothing lost, nothing silent: kills, Ctrl-C, full disks, damaged artifacts, numbers that are no
longer finite.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, stages

from plumbing import checkpoints, stopping, training_log
from plumbing.errors import UserError
from plumbing.stopping import asked_to_stop
from plumbing.store import MADE_BY, load_npz, load_pt

train = stages.train
ARTIFACTS = ("data.npz", "tree.npz", "model.pt", "checkpoint.pt", "predictions.npz")
LOAD = {".npz": load_npz, ".pt": load_pt}


def config_of(run: Path, **changes):
    return train.Config(run=str(run), **SMALL | changes)


def digest(path: Path) -> str:
    return LOAD[path.suffix](path)[1]["sha256"]


@pytest.fixture
def copied(tmp_path, done) -> Path:
    """The test's own copy of a run folder in which the whole path has been run."""
    return Path(shutil.copytree(done, tmp_path / "copied"))


@pytest.mark.parametrize(("n_processes", "n_kills"), [(1, 4), (2, 1)])
def test_killed_at_any_moment(n_processes, n_kills):
    """A few kills; python tests/kills.py --kills 100 for more."""
    command = [sys.executable, str(ROOT / "tests" / "kills.py"), "--kills", str(n_kills)]
    command += ["--processes", str(n_processes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = re.match(r"(\d+) kills .* 0 losses, the same artifacts and log", done.stdout)
    assert int(said[1]) >= n_kills


def heard() -> None:
    """Whoever runs the tests in the background has them ignore Ctrl-C, and so would all that they
    start.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def listening():
    before = signal.getsignal(signal.SIGINT)
    heard()
    yield
    signal.signal(signal.SIGINT, before)


def test_what_is_to_be_ignored_stays_ignored():
    """A job in the background: Ctrl-C in the terminal is not for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with asked_to_stop() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert not asked()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(prepared, done, number):
    flags = [
        part
        for key, value in (SMALL | {"run": prepared}).items()
        for part in (f"--{key.replace('_', '-')}", str(value))
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "04_train.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        preexec_fn=heard,
    )
    for line in process.stdout:
        if " step 2/" in line:
            process.send_signal(number)
            break
    _, said = process.communicate()
    assert process.returncode == 130, said
    step = int(
        re.search(
            r"interrupted; a checkpoint was saved after step (\d+); go on with --resume", said
        )[1]
    )
    assert load_pt(prepared / "checkpoint.pt")[0]["step"] == step < 38
    train.run(config_of(prepared, resume=True))
    assert digest(prepared / "model.pt") == digest(done / "model.pt")


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    monkeypatch.setattr(stopping, "ONCE_MORE", 0.05)
    with asked_to_stop() as asked, pytest.raises(KeyboardInterrupt):
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_comes_twice_is_one_wish(name, monkeypatch):
    """`timeout` sends SIGTERM twice, a terminal that is closed SIGHUP, and whoever has started this
    process may pass on a Ctrl-C. However late it comes, only Ctrl-C stops at once.
    """
    if name != "SIGINT":
        monkeypatch.setattr(stopping, "ONCE_MORE", -1.0)
    number = getattr(signal, name)
    before = signal.signal(number, signal.default_int_handler)  # nohup ignores SIGHUP
    try:
        with asked_to_stop() as asked:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert asked()
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def stopped_at(monkeypatch, step: int):
    """Ctrl-C is pressed when this step is logged."""
    say = training_log.progress

    def press(record, config):
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)
        return say(record, config)

    monkeypatch.setattr(training_log, "progress", press)
    with pytest.raises(KeyboardInterrupt, match=f"saved after step {step}; go on with --resume"):
        yield
    monkeypatch.setattr(training_log, "progress", say)


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(prepared, done, monkeypatch, capsys):
    with stopped_at(monkeypatch, 25):
        train.run(config_of(prepared, save_every=4))
    newest, before = prepared / "checkpoint.pt", prepared / "checkpoint.previous.pt"
    assert [load_pt(path)[0]["step"] for path in (before, newest)] == [24, 25]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    train.run(config_of(prepared, resume=True))
    printed = capsys.readouterr().out
    assert re.search(
        r"checkpoint.pt is damaged: expected content with sha256 \w+, found \w+; "
        "taking the checkpoint before it, of step 24",
        printed,
    )
    assert "going on after step 24, in epoch 2 of 2" in printed
    for name in ("model.pt", "checkpoint.pt"):
        assert digest(prepared / name) == digest(done / name)
    newest.unlink()
    before.write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint.pt does not exist|cannot be read"):
        train.run(config_of(prepared, resume=True))


def test_a_damaged_checkpoint_does_not_push_out_the_whole_one(prepared, done, monkeypatch):
    """The newest is damaged, the one before is taken, and the next save is killed between its two
    renames.
    """
    with stopped_at(monkeypatch, 25):
        train.run(config_of(prepared, save_every=4))
    (prepared / "checkpoint.pt").write_bytes(b"damaged")
    replace, calls = os.replace, []

    def killed(source, target):
        replace(source, target)
        calls.append(str(target))
        if len(calls) > 1 and str(target).endswith("previous.pt"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train.run(config_of(prepared, resume=True, save_every=2))
    monkeypatch.setattr(os, "replace", replace)
    assert load_pt(prepared / "checkpoint.previous.pt")[0]["step"] == 24
    train.run(config_of(prepared, resume=True))
    assert digest(prepared / "checkpoint.pt") == digest(done / "checkpoint.pt")


def test_a_missing_best_model_is_made_again(prepared, monkeypatch, capsys):
    with stopped_at(monkeypatch, 25):
        train.run(config_of(prepared))
    (prepared / "model.pt").write_bytes(b"damaged")
    train.run(config_of(prepared, resume=True))
    assert re.search(
        "model.pt cannot be read .*; the next epoch counts as the best so far",
        capsys.readouterr().out,
    )
    assert digest(prepared / "model.pt")


def test_starting_over_in_a_finished_run_killed_half_way_goes_on_with_neither(copied, monkeypatch):
    unlink = Path.unlink

    def killed(path, **more):
        unlink(path, **more)
        if path.name.startswith("checkpoint"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        train.run(config_of(copied, seed=1))
    monkeypatch.setattr(Path, "unlink", unlink)
    train.run(config_of(copied, seed=1))  # not "go on with --resume"


def test_a_checkpoint_of_other_code_says_so():
    """As a fork that groups the weights otherwise finds it."""
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    saved = checkpoints.get_state({"optimizers": [torch.optim.AdamW(weights)]})
    groups = [{"params": [weight]} for weight in weights]
    with pytest.raises(UserError, match="saved by other code.* its optimizers .*without --resume"):
        checkpoints.set_state({"optimizers": [torch.optim.AdamW(groups)]}, saved)


def test_memory_that_runs_out_is_no_damage(prepared, monkeypatch):
    with stopped_at(monkeypatch, 3):
        train.run(config_of(prepared))

    def short(*args, **more):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", short)
    with pytest.raises(UserError, match="out of memory"):
        train.run(config_of(prepared))
    assert (prepared / "checkpoint.pt").exists()


def test_a_finished_run_resumed_has_nothing_left_to_do(copied, capsys):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    train.run(config_of(copied, resume=True))
    assert "this run has finished; nothing is left to do" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_flipped_bit_or_a_missing_end_is_found(copied, name):
    """Wherever it is: the artifact is refused with its name and the command, or nothing that it
    says has changed.
    """
    path, rng, refused = copied / name, np.random.default_rng(0), 0
    whole, expected = path.read_bytes(), digest(path)
    for place in rng.integers(0, len(whole), 60):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            assert digest(path) == expected
        except UserError as error:
            refused += 1
            assert str(path) in str(error) and f"run: python {MADE_BY[name]} --run" in str(error)
    assert refused > 30
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"{name} cannot be read .*; run: python"):
            digest(path)


def test_artifacts_of_another_run_are_refused(copied, tmp_path, corpus):
    """A tree of other data, a model of another tree, a checkpoint of another run."""
    other = tmp_path / "other"
    stages.data.run(stages.data.Config(run=str(other), corpus=str(corpus), vocab=300))
    stages.tree.run(stages.tree.Config(run=str(other), levels="8", seed=5))
    train.run(train.Config(run=str(other), **SMALL | {"epochs": 1}))
    for name, inputs in (
        ("tree.npz", "data.npz"),
        ("model.pt", "data.npz"),
        ("checkpoint.pt", "data.npz"),
    ):
        kept = (copied / name).read_bytes()
        shutil.copy(other / name, copied)
        with pytest.raises(
            UserError,
            match=f"{name} was made from a {inputs} with sha256 .*, found .*; run: python",
        ):
            digest(copied / name)
        (copied / name).write_bytes(kept)
    stages.tree.run(stages.tree.Config(run=str(copied), levels="8", seed=5))
    with pytest.raises(
        UserError, match="model.pt was made from a tree.npz .*; run: python 04_train.py"
    ):
        stages.eval.run(stages.eval.Config(run=str(copied)))


def test_an_artifact_of_version_1_is_refused(prepared):
    shutil.copy(ROOT / "tests" / "version1" / "tree.npz", prepared)
    with pytest.raises(
        UserError, match="tree.npz has format 1, expected 3; run: python 02_label_tree.py --run"
    ):
        stages.tree.load(prepared)


def limited(limit: int, bound: int, run) -> tuple[int, str]:
    """(exit code, what it said) of run() in a child process with a resource limit."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(write, 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(limit, (bound, bound))
        try:
            run()
        except UserError as error:
            os.write(2, str(error).encode())
            os._exit(2)
        except BaseException as error:  # noqa: BLE001
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


@pytest.mark.parametrize(
    ("name", "most"), [("tree.npz", 1500), ("model.pt", 30000), ("predictions.npz", 3000)]
)
def test_a_file_that_cannot_grow_leaves_what_was_there(copied, name, most):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    run = {
        "tree.npz": lambda: stages.tree.run(
            stages.tree.Config(run=str(copied), levels="8", seed=1)
        ),
        "model.pt": lambda: train.run(config_of(copied, seed=1)),
        "predictions.npz": lambda: stages.eval.run(stages.eval.Config(run=str(copied), k=30)),
    }[name]
    code, said = limited(resource.RLIMIT_FSIZE, most, run)
    assert (
        code == 2
        and f"{name} cannot be written (File too large); what was there before is as it was" in said
    )
    # of the run before: it says so
    lost = {"checkpoint.pt", "checkpoint.previous.pt"} if name == "model.pt" else set()
    assert {path.name for path in copied.iterdir()} == set(before) - lost
    for path in copied.iterdir():
        assert path.name == "log.jsonl" or path.read_bytes() == before[path.name]
    assert digest(copied / name)


def test_a_full_disk_and_a_read_only_one(tmp_path, prepared):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(small)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        for name in ("data.npz", "tree.npz"):
            shutil.copy(prepared / name, small)
        with pytest.raises(
            UserError, match="this stage writes about .* MiB, .* MiB are free; make room, or choose"
        ):
            train.run(config_of(small, tiny="2,128"))
        (small / "ballast").write_bytes(
            bytes(os.statvfs(small).f_bavail * os.statvfs(small).f_frsize)
        )
        with pytest.raises(UserError, match="No space left on device|MiB are free"):
            stages.tree.run(stages.tree.Config(run=str(small), levels="4"))
        assert sorted(path.name for path in small.iterdir()) == ["ballast", "data.npz", "tree.npz"]
        assert digest(small / "tree.npz") == digest(prepared / "tree.npz")
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        with pytest.raises(
            UserError, match="cannot be written to .*Read-only file system.*; choose another folder"
        ):
            stages.tree.run(stages.tree.Config(run=str(small), levels="4"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_out_of_memory_says_what_was_big_and_what_lowers_it(prepared):
    def run():
        train.run(config_of(prepared, tiny="1,4096", batch_size=300))

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    code, said = limited(resource.RLIMIT_AS, used + 2**30, run)
    assert code == 2 and re.search(
        r"out of memory .* with 40 labels; lower --batch-size 300 .documents in a batch., "
        "--max-len 32 .*, --topk 4 .*; --label-bf16 halves",
        said,
    ), said


def test_a_loss_that_is_not_finite_stops_within_a_step_and_keeps_the_checkpoint(
    prepared, monkeypatch
):
    """From the ninth batch on the second level gives nan; seen one step later at the latest."""
    loss, calls = stages.model.Cascade.loss, []

    def broken(self, batch):
        calls.append(1)
        losses, surplus = loss(self, batch)
        return losses * torch.tensor([1.0, torch.nan if len(calls) >= 9 else 1.0]), surplus

    monkeypatch.setattr(stages.model.Cascade, "loss", broken)
    monkeypatch.setattr(train, "INTERVALS", 1)
    message = (
        "level 2 of 2 is no longer finite: step 9, learning rate 1.0e-02, largest weight .*; the ch"
    )
    with pytest.raises(UserError, match=message):
        train.run(config_of(prepared, save_every=4))
    assert len(calls) == 10
    state, _ = load_pt(prepared / "checkpoint.pt")
    assert state["step"] == 8 and all(value.isfinite().all() for value in state["model"].values())


def test_a_gradient_that_is_not_finite_stops_too(prepared, monkeypatch):
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda parameters, most: torch.tensor(torch.inf)
    )
    with pytest.raises(UserError, match="the gradient is no longer finite: step 1"):
        train.run(config_of(prepared))


def test_fp16_overflow_is_skipped_by_the_scaler_and_counted(prepared, monkeypatch):
    """The scaler starts so high that early steps overflow."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda kind, enabled: scaler(kind, init_scale=2.0**26, enabled=enabled),
    )
    train.run(config_of(prepared, amp="fp16"))
    skipped = [
        record["skipped"]
        for record in map(json.loads, (prepared / "log.jsonl").read_text().splitlines())
        if "loss" in record
    ]
    assert skipped == sorted(skipped) and 1 < skipped[-1] < len(skipped) // 2
    assert all(
        value.isfinite().all() for value in load_pt(prepared / "model.pt")[0]["model"].values()
    )


def test_a_run_can_be_watched(done):
    records = [json.loads(line) for line in (done / "log.jsonl").read_text().splitlines()]
    assert {
        "phase",
        "epoch",
        "epochs",
        "step",
        "total",
        "loss",
        "lr",
        "grad_norm",
        "batches_per_s",
        "surplus",
    } == set(records[0])
    assert all(record["grad_norm"] > 0 for record in records if "loss" in record)
    assert [record["epoch"] for record in records if "validation" in record] == [1, 2]
    command = [
        sys.executable,
        str(ROOT / "03_model.py"),
        "--run",
        str(done),
        "--tiny",
        "1,32",
        "--topk",
        "4",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\[03_model.py took \d+ s, at the peak 0\.\d GiB of memory", printed)


def huge_pages() -> bool:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.exists() and "[never]" not in path.read_text()


@pytest.mark.skipif(not huge_pages(), reason="needs a Linux that offers huge pages")
def test_big_tensors_lie_in_huge_pages():
    """Nothing that the stages import may make a tensor before they are asked for."""
    code = (
        "import torch; from plumbing.stages import load_stages; "
        "from plumbing.precision import set_up_torch; "
        "load_stages(); set_up_torch(); big = torch.ones(2**26);"
        "print(*[line for line in open('/proc/self/smaps_rollup') if 'AnonHugePages' in line])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert int(out.split()[1]) > 2**17
