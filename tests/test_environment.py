"""Where a script runs: streams that are closed, full or of another encoding, a run folder that
somebody else works in, flags that a checkpoint knows better.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, SMALL, needs_variants, stages

from plumbing import ownership
from plumbing.errors import UserError
from plumbing.ownership import NAME, owned
from plumbing.store import load_pt

train = stages.train


def config_of(run, **changes):
    return train.Config(run=str(run), **SMALL | changes)


def flags(run, **changes) -> list[str]:
    """The same on a command line."""
    words = ["--run", str(run)]
    for key, value in (SMALL | changes).items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words


def start(script: str, *words, **how) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, text=True, **how)


def shell(line: str, *words) -> subprocess.CompletedProcess:
    """A line of shell, in which "$@" are the words."""
    command = ["bash", "-c", line, "bash", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# 1. Streams.


def test_a_sample_of_stops_in_every_phase():
    """python tests/stops.py tries all phases, signals and streams."""
    command = [sys.executable, str(ROOT / "tests" / "stops.py"), "--sample", "4", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^4 stops in \d+ s: 0 losses, the same model$", done.stdout, re.MULTILINE)


def test_closed_streams_do_not_end_a_stage_and_nothing_is_printed_into_its_files(prepared):
    """Without the numbers 0 to 2 taken, tree.npz would be opened as number 1."""
    before = (prepared / "tree.npz").read_bytes()
    (prepared / "tree.npz").unlink()
    line = 'exec "$0" "$@" <&- >&- 2>&-'
    command = [sys.executable, ROOT / "02_label_tree.py", "--run", prepared, "--levels", "8"]
    done = subprocess.run(["sh", "-c", line, *map(str, command)], cwd=ROOT)
    assert done.returncode == 0
    assert (prepared / "tree.npz").read_bytes() == before


def test_a_full_disk_below_the_output_is_said_when_the_work_is_done(prepared):
    done = shell(f"{sys.executable} 02_label_tree.py --run $1 --levels 4 > /dev/full", prepared)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the work is done and its files are whole, but a part of what was printed is lost" in (
        done.stderr
    )
    assert stages.tree.load(prepared).levels == [4]


def test_a_reader_that_has_enough_is_no_error(done, tmp_path):
    run = shutil.copytree(done, tmp_path / "copied")
    line = f"{sys.executable} 05_eval.py --run $1 --k 20 | head -1; echo ${{PIPESTATUS[0]}}"
    said = shell(line, run)
    assert said.stdout.splitlines()[-1] == "0" and "Traceback" not in said.stderr
    line = f"{sys.executable} -m tools.tag --run $1 --text word1x1 | true; echo ${{PIPESTATUS[0]}}"
    assert shell(line, run).stdout.split()[-1] in ("0", "1")


@pytest.mark.parametrize("script", ["01_data.py", "04_train.py", "tools/tag.py"])
def test_help_goes_into_any_stream(script):
    name = ["-m", "tools.tag"] if "tag" in script else [script]
    command = [sys.executable, *name, "--help"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0 and done.stdout


# 2. A run folder has one owner.


class Owner:
    """A child process that owns a folder until it is told to end, or killed."""

    def __init__(self, run) -> None:
        ready, says_ready = os.pipe()
        waits, self.tells = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.tells)
            try:
                with owned(run):
                    os.write(says_ready, b"1")
                    os.read(waits, 1)
            finally:
                os._exit(0)
        os.close(waits)
        os.read(ready, 1)

    def end(self) -> None:
        os.write(self.tells, b"1")
        os.waitpid(self.pid, 0)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def test_a_second_writer_is_refused_while_the_first_lives(prepared, done, corpus):
    owner = Owner(prepared)
    said = f"in use: .*process {owner.pid} on .*, since 20.*; wait until it has ended"
    before = {path.name: path.read_bytes() for path in prepared.iterdir()}
    for call in (
        lambda: train.run(config_of(prepared)),
        lambda: train.run(config_of(prepared, resume=True)),
        lambda: stages.tree.run(stages.tree.Config(run=str(prepared))),
        lambda: stages.data.run(stages.data.Config(run=str(prepared), corpus=str(corpus))),
    ):
        with pytest.raises(UserError, match=said):
            call()
    assert {path.name: path.read_bytes() for path in prepared.iterdir()} == before
    # Stage 5 reads what is whole, and may.
    (prepared / "model.pt").write_bytes((done / "model.pt").read_bytes())
    stages.eval.run(stages.eval.Config(run=str(prepared), k=5))
    owner.end()
    assert not (prepared / NAME).exists()
    train.run(config_of(prepared, epochs=1))


def test_what_was_killed_owns_nothing(prepared):
    Owner(prepared).kill()
    assert (prepared / NAME).exists()
    train.run(config_of(prepared, epochs=1))
    assert not (prepared / NAME).exists()


def race(run, begins: int, says: int) -> None:
    """In a child: become the owner at the signal, and say what came of it."""
    os.read(begins, 1)
    try:
        with owned(run):
            os.write(says, b"owner\n")
            time.sleep(1)
    except UserError as error:
        os.write(says, f"{error}\n".encode())
    finally:
        os._exit(0)


@pytest.mark.parametrize("folder", [".", "not/there/yet"])
def test_of_many_that_start_at_the_same_moment_one_is_the_owner(tmp_path, folder):
    begins, begin = os.pipe()
    found, says = os.pipe()
    children = []
    for _ in range(6):
        pid = os.fork()
        if pid == 0:
            race(tmp_path / folder, begins, says)
        children.append(pid)
    os.write(begin, b"123456")
    for pid in children:
        os.waitpid(pid, 0)
    os.close(says)
    with os.fdopen(found) as pipe:
        said = pipe.read().splitlines()
    refusals = [text for text in said if text != "owner"]
    assert len(said) == 6 and len(refusals) == 5
    assert all(re.search(r"process \d+ on ", text) for text in refusals)
    # The folder that was made for the owner alone is gone with it.
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_nothing_was_made_is_not_left_behind(tmp_path):
    run = tmp_path / "new" / "run"
    with pytest.raises(UserError, match="no corpus is recognised"):
        stages.data.run(stages.data.Config(run=str(run), corpus=str(tmp_path)))
    assert not (tmp_path / "new").exists()
    with owned(run):
        (run / "data.npz").touch()
    assert (run / "data.npz").exists()


def test_an_owner_that_leaves_while_another_comes(tmp_path):
    """The file that was locked may have lost its name: then it is no lock of the folder."""
    for _ in range(3):
        with owned(tmp_path):
            old = os.open(tmp_path / NAME, os.O_RDWR)
        assert not ownership.is_still_there(old, tmp_path / NAME)
        os.close(old)


def test_a_folder_that_was_removed_and_made_again_is_the_new_owners(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with owned(run):
        run.rename(tmp_path / "old")
        run.mkdir()
        (run / NAME).write_text("the new owner")
    assert (run / NAME).read_text() == "the new owner"


def test_where_files_cannot_be_locked_it_is_said(prepared, monkeypatch, capsys):
    def unable(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ownership.fcntl, "flock", unable)
    train.run(config_of(prepared, epochs=1))
    said = capsys.readouterr().out
    assert "cannot be locked (No locks available): nothing keeps a second" in said
    assert not (prepared / NAME).exists()


def test_a_planted_link_is_not_written_through(prepared, tmp_path, capsys):
    target = prepared.parent / "precious"
    target.write_text("precious")
    (prepared / NAME).symlink_to(target)
    with owned(prepared):
        pass
    assert target.read_text() == "precious"
    assert "cannot be locked" in capsys.readouterr().out


@needs_variants
def test_a_variant_owns_its_folder_and_may_train_in_it(done, tmp_path):
    from variants import common

    out = common.folder(str(done), "mine", "data.npz")
    with owned(out), owned(out):
        assert (out / NAME).exists()
    assert not (out / NAME).exists()


# 3. --resume knows its settings.


@pytest.fixture
def stopped(prepared, monkeypatch):
    """A training that stopped in its second epoch."""
    validate = train.validate
    calls = []

    def press(*args):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args)

    monkeypatch.setattr(train, "validate", press)
    with pytest.raises(KeyboardInterrupt):
        train.run(config_of(prepared))
    monkeypatch.setattr(train, "validate", validate)
    return prepared


def test_resume_alone_goes_on_with_the_settings_of_the_checkpoint(stopped, done):
    train.run(train.Config(run=str(stopped), resume=True))
    assert load_pt(stopped / "model.pt")[1]["sha256"] == load_pt(done / "model.pt")[1]["sha256"]


def test_all_flags_that_differ_are_refused_at_once(stopped):
    process = start(
        "04_train.py", "--run", stopped, "--resume", "--seed", 1, "--epochs", 9, "--batch-size", 8,
        "--tiny", "2,32", stderr=subprocess.PIPE,
    )  # fmt: skip
    _, said = process.communicate()
    assert process.returncode == 2
    for words in ("seed=0, not 1", "epochs=2, not 9", "batch_size=16, not 8"):
        assert words in said
    assert "tiny=" not in said and "leave these flags out" in said


def test_a_flag_with_the_value_of_its_default_counts_as_given(stopped):
    """max_len is 32 in the checkpoint; --join map is its default, and that of the checkpoint."""
    words = ("04_train.py", "--run", stopped, "--resume", "--join", "map", "--dropout", "")
    assert start(*words, stdout=subprocess.DEVNULL).wait() == 0
    train.run(config_of(stopped, seed=1, epochs=1))
    words = ("04_train.py", "--run", stopped, "--resume", "--seed", 0)
    process = start(*words, stderr=subprocess.PIPE)
    assert "seed=1, not 0" in process.communicate()[1] and process.returncode == 2


def test_resume_without_a_checkpoint(prepared):
    with pytest.raises(UserError, match="checkpoint.pt does not exist; run: python 04_train.py"):
        train.run(train.Config(run=str(prepared), resume=True))


def test_the_log_of_a_resumed_run_is_in_order(stopped):
    train.run(train.Config(run=str(stopped), resume=True))
    steps = [json.loads(line)["step"] for line in (stopped / "log.jsonl").read_text().splitlines()]
    assert (np.diff(steps) >= 0).all() and steps[-1] == 38
