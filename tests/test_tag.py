"""tools/tag.py: the labels and scores of stage 5 for the same texts, lines that are no good, pipes,
the order.
"""

import gzip
import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_corpus, stages
from tokenizers import Tokenizer

from plumbing.cli import parse
from plumbing.errors import UserError
from plumbing.store import load_npz
from tools import tag


def texts_of(corpus: Path, split: str = "test") -> list[str]:
    with gzip.open(corpus / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(done) -> list[list[tuple[str, float]]]:
    """(name, score) of the labels that stage 5 wrote for the test split."""
    names, (arrays, _) = stages.data.load(done).names, load_npz(done / "predictions.npz")
    return [
        [(names[label], score) for label, score in zip(*row, strict=True) if label >= 0]
        for row in zip(arrays["labels"].tolist(), arrays["scores"].tolist(), strict=True)
    ]


def same(labels: list[dict], pairs: list[tuple[str, float]]) -> bool:
    """Scores as those of stage 5; names too, up to the order of labels that have about the same
    score.
    """
    assert [one["score"] for one in labels] == pytest.approx(
        [score for _, score in pairs], rel=1e-4
    )
    return [one["name"] for one in labels] == [name for name, _ in pairs]


def test_labels_and_scores_are_those_of_stage_5(done, corpus, expected, tmp_path):
    rows = [
        {"text": text, "id": i, "more": {"a": [1, None, "ä"]}}
        for i, text in enumerate(texts_of(corpus))
    ]
    rows[3]["labels"] = ["the true ones"]
    for k, size in ((5, 7), (20, 64)):
        config = tag.Config(
            run=str(done),
            input=str(write(tmp_path / "new.jsonl", rows)),
            k=k,
            batch_size=size,
            output=str(tmp_path / "tags.jsonl"),
        )
        assert tag.run(config) == 0
        found = read(tmp_path / "tags.jsonl")
        assert [row["id"] for row in found] == list(range(60))  # in the order given
        assert all(
            row.keys() == {"id", "more", "labels"} and row["more"] == rows[0]["more"]
            for row in found
        )
        assert (
            np.mean(
                [same(row["labels"], pairs[:k]) for row, pairs in zip(found, expected, strict=True)]
            )
            > 0.95
        )
        assert all(len(row["labels"]) == k for row in found)


def test_token_ids_are_those_of_stage_1(tmp_path):
    """With the cut of --max-tokens, half a character, no text, and settings of its own in the
    tokeniser.
    """
    corpus = make_corpus(tmp_path / "corpus", 60)
    odd = [
        "",
        "  ",
        "half \ud83d of one",
        "Größe 中文 \u0000 x",
        "[SEP] word1x1 [CLS]",
        "word3x1 " * 500,
    ]
    with gzip.open(corpus / "test.jsonl.gz", "at") as file:
        file.writelines(json.dumps({"text": text, "labels": []}) + "\n" for text in odd)
    stages.data.run(
        stages.data.Config(run=str(tmp_path), corpus=str(corpus), vocab=300, max_tokens=12)
    )
    data = stages.data.load(tmp_path)
    tokenizer = Tokenizer.from_buffer(data.tokenizer)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    found = tag.documents([*texts_of(corpus)], tokenizer, data.meta["config"]["max_tokens"])
    assert (np.diff(found.offsets) == 12).sum() > 1
    np.testing.assert_array_equal(found.ids, data.splits["test"].ids)
    np.testing.assert_array_equal(found.offsets, data.splits["test"].offsets)
    batch = data._replace(splits={"new": found}).batch("new", np.arange(len(found)), 16)
    np.testing.assert_array_equal(
        batch.ids_BT, data.batch("test", np.arange(len(found)), 16).ids_BT
    )


def test_the_cut_of_stage_1_reaches_the_model(done, monkeypatch):
    """What lies beyond --max-tokens changes nothing, although the model would take more."""
    data, texts = stages.data.load(done), ["word1x1 word2x2 " + "word3x1 " * n for n in (2, 5)]
    a, b = tag.tagger(tag.Config(run=str(done)))(texts)
    assert a != b
    settings = {**data.meta["config"], "max_tokens": 4}
    monkeypatch.setattr(
        stages.data, "load", lambda run: data._replace(meta={**data.meta, "config": settings})
    )
    a, b = tag.tagger(tag.Config(run=str(done)))(texts)
    assert a == b


def test_threshold_and_k(done, corpus, expected):
    texts = texts_of(corpus)
    limit = float(np.median([score for pairs in expected for _, score in pairs[:20]]))
    found = tag.tagger(tag.Config(run=str(done), k=20, threshold=limit))(texts)
    for labels, pairs in zip(found, expected, strict=True):
        assert abs(len(labels) - sum(score >= limit for _, score in pairs)) <= 1
        assert all(one["score"] >= limit * (1 - 1e-6) for one in labels)
    assert 0 < sum(map(len, found)) < 60 * 20
    assert tag.tagger(tag.Config(run=str(done), threshold=1.0))(texts[:2]) == [[], []]
    # More labels than the beam has candidates: those that there are, no -1.
    most = tag.tagger(tag.Config(run=str(done), k=1000))(texts[:3])
    assert all(
        0 < len(labels) < 41 and all(one["name"].startswith("label-") for one in labels)
        for labels in most
    )


BAD = [
    b"",
    b"no json",
    b"[1, 2]",
    b'"text"',
    b'{"id": 3}',
    b'{"text": 7}',
    b'{"text": null}',
    b'{"text": "\xff"}',
    b'{"text": "a", "x": NaN}',
    b'{"text": "a", "x": 1e999}',
    b'{"text": "a"',
    b"[" * 100000,
]


def test_bad_lines_are_reported_and_passed_over(done, tmp_path, capsys):
    lines = [b'\xef\xbb\xbf{"text": "word1x1", "id": 0}']  # with a byte order mark
    for i, bad in enumerate(BAD):
        lines += [bad, json.dumps({"text": "word2x1 " * i, "id": i + 1}).encode()]
    (tmp_path / "new.jsonl").write_bytes(b"\n".join(lines))  # no newline at the end
    config = tag.Config(
        run=str(done), input=str(tmp_path / "new.jsonl"), output=str(tmp_path / "out"), batch_size=4
    )
    assert tag.run(config) == 1
    assert [row["id"] for row in read(tmp_path / "out")] == list(range(len(BAD) + 1))
    *complaints, last = capsys.readouterr().err.splitlines()
    assert [line.split(" passed over")[0] for line in complaints] == [
        f"tag.py: line {2 * i + 2}" for i in range(len(BAD))
    ]
    assert last == f"tag.py: {len(BAD) + 1} lines tagged, {len(BAD)} passed over"
    (tmp_path / "new.jsonl").write_bytes(b"")
    assert tag.run(config) == 0 and (tmp_path / "out").read_bytes() == b""


def test_a_line_longer_than_memory_allows_is_an_error(monkeypatch):
    monkeypatch.setattr(tag, "LONGEST", 50)
    file = io.BytesIO(b'{"text": "a"}\n' + b'{"text": "' + b"b" * 100 + b'"}\n')
    rows = tag.read(file, lambda number, reason: None)
    assert next(rows) == {"text": "a"}
    with pytest.raises(UserError, match="--input line 2: longer than"):
        next(rows)


def test_wrong_settings_are_refused(done, tmp_path, capsys):
    path = write(tmp_path / "new.jsonl", [{"text": "a"}])
    for settings, message in (
        ({}, "either --text"),
        ({"text": "a", "input": "-"}, "either --text"),
        ({"input": str(tmp_path / "none.jsonl")}, "--input .*none.jsonl cannot be opened"),
        (
            {"input": str(path), "output": str(tmp_path / "none" / "out")},
            "--output .* cannot be opened",
        ),
        ({"input": str(path), "output": str(path)}, "is the input"),
        ({"text": "a", "run": str(tmp_path)}, "data.npz does not exist; run: python 01_data.py"),
    ):
        with pytest.raises(UserError, match=message):
            tag.run(tag.Config(**{"run": str(done), **settings}))
    assert read(path) == [{"text": "a"}]
    for words in (
        ["--threshold", "1.5"],
        ["--threshold", "nan"],
        ["--k", "0"],
        ["--batch-size", "x"],
    ):
        with pytest.raises(SystemExit, match="2"):
            parse(tag.Config, tag.__doc__, words)


def test_one_text(done, corpus, expected, capsys):
    assert tag.run(tag.Config(run=str(done), text=texts_of(corpus)[0], k=3)) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [[f"{score:.3f}", name] for name, score in expected[0][:3]]
    assert tag.run(tag.Config(run=str(done), text="", threshold=1.0)) == 0
    assert "none of the 5 best labels" in capsys.readouterr().out


def test_what_needs_no_encoder_does_not_wait_for_the_library():
    """transformers and torch._dynamo take longer to import than all else; tools start, and show
    their help, without.
    """
    code = (
        "import sys; from tools import compare, plots, report, tag; "
        "slow = ('transformers', 'torch._dynamo', 'sympy', 'scipy.optimize', 'scipy.stats'); "
        "print([name for name in slow if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.splitlines()[-1:] == ["[]"], found.stdout + found.stderr


def test_pipes_answer_every_chunk_before_the_input_ends(done, corpus, expected):
    """Two lines in, two lines out, while the pipe stays open; then nobody reads any more."""
    texts = texts_of(corpus)
    command = [
        sys.executable,
        "-m",
        "tools.tag",
        "--run",
        str(done),
        "--input",
        "-",
        "--batch-size",
        "2",
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        # an answer that does not come fails, and is not waited for
        watch = threading.Timer(300, process.kill)
        watch.start()
        for start in (0, 2):
            process.stdin.write(b"bad\n")
            for text in texts[start : start + 2]:
                process.stdin.write(json.dumps({"text": text, "id": start}).encode() + b"\n")
            process.stdin.flush()
            for pairs in expected[start : start + 2]:
                row = json.loads(process.stdout.readline())
                assert row["id"] == start and same(row["labels"], pairs[:5])
        process.stdout.close()
        process.stdin.write(b'{"text": "a"}\n' * 3)
        process.stdin.close()
        messages = process.stderr.read().decode().splitlines()
        watch.cancel()
    assert process.returncode == 1
    assert [line.split(":")[1] for line in messages] == [
        " line 1 passed over",
        " line 4 passed over",
    ]


def test_exit_code_and_nothing_else_on_the_output(done, tmp_path, capsysbinary):
    for rows, code in (([{"text": "a"}], "0"), ([{"text": "a"}, {}], "1")):
        path = write(tmp_path / "new.jsonl", rows)
        with pytest.raises(SystemExit, match=code):
            tag.command(tag.Config(run=str(done), input=str(path)))
        assert [
            row.keys() for row in map(json.loads, capsysbinary.readouterr().out.splitlines())
        ] == [{"labels"}]
