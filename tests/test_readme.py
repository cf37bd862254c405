"""What the README shows is run: its commands, its expected output, its table of artifacts, its
examples.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, make_corpus, stages, write_jsonl

from plumbing.store import load_npz, load_pt

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
ARTIFACTS = (ROOT / "docs" / "artifacts.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [block for kind, block in BLOCKS if kind == "sh"]
# The demo takes minutes: the tests run its very commands on a part of the corpus with a smaller
# encoder.
SMALLER = {
    "01_data.py": ["--limit", "1000", "--vocab", "4000"],
    "04_train.py": ["--epochs", "1", "--tiny", "1,64", "--max-len", "24"],
}


def shell(command: str, cwd) -> str:
    words = command.split()
    assert words[0] == "python"
    done = subprocess.run([sys.executable, *words[1:]], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def shape_of(line: str) -> str:
    """A line of output without its numbers and without the names that depend on what was learnt."""
    line = re.sub(r"\d[\d,.]*(e[-+]\d+)?", "0", line)
    line = re.sub(r"leaf cluster 0: .*", "leaf cluster 0:", line)
    line = re.sub(r"ranked by \w+", "ranked by", line).replace(" *", "  ")
    return re.sub(r"\s+", " ", line).strip()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The first command of the README after the installation, on a part of the corpus: (what it
    printed, folder).
    """
    run = tmp_path_factory.mktemp("demo") / "demo"
    install, *stages = COMMANDS[0].strip().split(" && ")
    assert install == "pip install -r requirements.txt"
    assert [stage.split()[1] for stage in stages] == sorted(
        path.name for path in ROOT.glob("0[1-5]_*.py")
    )
    printed = ""
    for stage in stages:
        printed += shell(
            " ".join([stage, "--run", str(run), *SMALLER.get(stage.split()[1], [])]), ROOT
        )
    return printed, run


def test_the_demo_prints_what_the_readme_shows(demo):
    shown = next(
        block for kind, block in BLOCKS if not kind and "cascade" in block and "P@1" in block
    )
    printed = {shape_of(line) for line in demo[0].splitlines()}
    for line in shown.strip().splitlines():
        if line != "...":
            assert shape_of(line) in printed, line


def test_the_test_command_is_the_one_that_ci_runs():
    install, test = COMMANDS[1].strip().split(" && ")
    ci = (ROOT / ".ci" / "run").read_text()
    assert test == "python -m pytest" and test in ci.splitlines()
    for file in re.findall(r"-r (\S+)", install):
        assert (ROOT / file).exists() and f"-r {file}" in ci


def test_own_corpus_as_the_readme_says(tmp_path):
    folder = make_corpus(tmp_path / "corpus", val=False)
    example = [
        json.loads(line)
        for line in next(block for kind, block in BLOCKS if kind == "json").splitlines()
    ]
    others = [
        {"name": name, "text": ""} for name in example[0]["labels"] if name != example[1]["name"]
    ]
    write_jsonl(folder / "test.jsonl.gz", [example[0]] * 3)
    write_jsonl(folder / "train.jsonl.gz", [example[0]] * 60)
    write_jsonl(folder / "labels.jsonl.gz", [example[1], *others])
    run = tmp_path / "run"
    for command in COMMANDS[2].strip().splitlines():
        for word, ours in (
            ("runs/mine", str(run)),
            ("FOLDER", str(folder)),
            ("bert-base-uncased", "tiny"),
        ):
            command = command.replace(word, ours)
        if "04_train" in command:
            command += " --tiny 1,32 --epochs 2 --amp off"
        printed = shell(command, ROOT)
    assert "true: " + ", ".join(example[0]["labels"]) in printed
    labels = load_npz(run / "predictions.npz")[0]["labels"]
    assert labels.shape == (3, 100) and (labels[:, :2] >= 0).all() and (labels[:, 2:] == -1).all()


def test_a_pretrained_encoder_as_in_the_results(tmp_path):
    """The commands of the results, with a small random BERT in a local folder instead of the
    pretrained one.
    """
    folder, encoder = make_corpus(tmp_path / "corpus"), tmp_path / "encoder"
    texts = [row.text for row in stages.data.formats.open_corpus(folder).documents["train"]()]
    tokenizer = stages.data.train_tokenizer(lambda: texts, 400)
    tokenizer.save_pretrained(encoder)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    transformers.BertModel(
        transformers.BertConfig(vocab_size=len(tokenizer), **shape)
    ).half().save_pretrained(encoder)
    run = tmp_path / "run"
    titles = next(
        block
        for block in re.findall(r"```sh\n(.*?)```", RESULTS, flags=re.DOTALL)
        if "runs/eurlex" in block
    )
    for command in titles.strip().splitlines():
        every = "0+1+2+3+4+5+6"  # this tree has one level less
        for word, ours in (
            ("runs/eurlex", str(run)),
            ("--corpus eurlex57k", f"--corpus {folder}"),
            ("64,384", "4"),
            (f"{every},{every},{every}", f"{every},{every}"),
            ("all-MiniLM-L6-v2", str(encoder)),
        ):
            command = command.replace(word, ours)
        printed = shell(command, ROOT)
    assert "cascade, p(label) p(cluster)" in printed
    model, config, _ = stages.train.load(run, stages.data.load(run))
    assert config.pooling == "mean" and model.layers == [list(range(7))] * 2
    assert (
        model.heads[-1].weight.shape[2] == 7 * 16 and model.encoder.backbone.config.vocab_size > 50
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_table_of_artifacts_is_what_the_scripts_write(demo):
    run = demo[1]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in ARTIFACTS.splitlines()
        if re.match(r"\| \w+\.(npz|pt) \|", line)
    ]
    listed = {}
    for file, keys, dtype, shape, _ in rows:
        match = re.match(r"\{(.*)\}(\w+)", keys)
        names = [name + match[2] for name in match[1].split(",")] if match else keys.split(", ")
        for name in names:
            listed[file, name] = (dtype, shape)
    for file in ("data.npz", "tree.npz", "predictions.npz"):
        arrays, meta = load_npz(run / file)
        assert set(arrays) == {key for name, key in listed if name == file}
        for key, array in arrays.items():
            dtype, shape = listed[file, key]
            assert str(array.dtype) in dtype.split(" or "), (file, key, array.dtype)
            assert array.ndim == len([part for part in shape.strip("()").split(",") if part]), (
                file,
                key,
            )
        assert set(meta) >= {"format", "stage", "config", "versions", "made_from"}
    for file in ("model.pt", "checkpoint.pt"):
        content, meta = load_pt(run / file)
        assert set(content) == {key for name, key in listed if name == file}
        assert set(meta["made_from"]) == {"data.npz", "tree.npz"}
    labels = load_npz(run / "predictions.npz")[0]["labels"]
    assert labels.shape == (4642, 100) and len(np.unique(labels[0])) > 5


def test_the_pictures_are_there_and_their_command_makes_them(demo):
    image = pytest.importorskip("matplotlib.image", reason="tools/plots.py draws with matplotlib")
    pictures = re.findall(r"\]\((\S+\.png)\)", RESULTS)
    (command,) = re.findall(r"`(python -m tools\.plots)`", RESULTS)
    printed = shell(f"{command} --run {demo[1]}", ROOT)
    assert len(pictures) == 2 and printed.count(".png: ") == 6
    for path in [ROOT / "docs" / picture for picture in pictures]:
        shown, made = (image.imread(one) for one in (path, demo[1] / f"plot-{path.name}"))
        assert shown.shape[:2] == made.shape[:2] and path.stat().st_size < 80_000, (
            f"copy plot-{path.name} there again"
        )


def test_the_pages_name_only_flags_that_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    flags = set()
    for page in pages:
        flags |= set(re.findall(r"--[a-z][a-z0-9-]+", page.read_text()))
    configs = [stage.Config for stage in vars(stages).values()]
    known = {
        "--" + field.name.replace("_", "-")
        for config in configs
        for field in dataclasses.fields(config)
    }
    scripts = [
        path for folder in ("bench", "data", "tools") for path in ROOT.glob(f"{folder}/*.py")
    ]
    tries = [ROOT / "tests" / name for name in ("kills.py", "soak.py", "stops.py")]
    for script in (*scripts, *tries):
        known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', script.read_text()))
    # Settings of the variants, and of the examples for forks.
    for path in (*(ROOT / "variants").glob("*.py"), ROOT / "docs" / "forking.md"):
        for name in re.findall(r"^    (\w+): .* = flag\(", path.read_text(), flags=re.MULTILINE):
            known.add("--" + name.replace("_", "-"))
    known |= {
        "--help",
        "--nproc-per-node",
        "--nnodes",
        "--node-rank",
        "--master-addr",
    }  # torchrun's
    assert flags <= known, flags - known


def test_the_script_that_runs_several_seeds(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    environment = os.environ | {"SEEDS": "3", "RUNS": str(tmp_path), "PYTHON": sys.executable}
    command = [
        "bash",
        "bench/seeds.sh",
        "toy",
        str(corpus),
        "tiny",
        "--tiny",
        "1,32",
        "--epochs",
        "1",
        "--amp",
        "off",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    tables = done.stdout.split("== seed ")[1:]
    assert len(tables) == 1 and tables[0].startswith("3\n") and tables[0].count("cascade") == 3
