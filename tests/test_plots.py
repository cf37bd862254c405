"""tools/plots.py: what is drawn against loops over documents and labels; the files; the errors."""

import json
import shutil
import struct
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import stages
from scipy.sparse import csr_matrix

from plumbing.errors import UserError
from plumbing.store import load_npz, save_npz
from tools import plots, report

NAMES = ("curves", "funnel", "frequency", "coverage", "reliability", "tree")


@pytest.fixture
def figure():
    pytest.importorskip("matplotlib", reason="tools/plots.py draws with it")
    from matplotlib.figure import Figure

    return Figure((9, 6), layout="constrained")


def random_split(n: int, n_labels: int, seed: int) -> tuple[list[list[int]], object]:
    rng = np.random.default_rng(seed)
    true = [
        sorted(rng.choice(n_labels, rng.integers(0, 4), replace=False).tolist()) for _ in range(n)
    ]
    ends = np.cumsum([0] + [len(row) for row in true])
    return true, stages.data.Split(None, np.arange(n + 1), np.array(sum(true, []), np.int32), ends)


def line(axis, name: str) -> np.ndarray:
    (found,) = [line.get_xydata() for line in axis.lines if str(line.get_label()).startswith(name)]
    return found


def test_labels_found_by_frequency_equal_a_loop(figure, monkeypatch):
    monkeypatch.setattr(plots, "FEW", 3)
    rng = np.random.default_rng(0)
    count = np.array([0, 0, 1, 2, 3, 4, 7, 8, 40, 1023, 1024, 5000])
    true, split = random_split(60, len(count) - 1, 1)  # the last label is never right
    predicted = np.array([rng.permutation(len(count))[:7] for _ in range(60)])
    predicted[3, 2:] = -1
    predicted[4] = -1
    said = plots.draw_frequency(
        figure, count, split, {"ours": predicted, "theirs": predicted[:, ::-1]}
    )
    upper, lower = figure.axes
    # those that have labels
    kinds = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (32, 63), (512, 1023), (1024, 10**9)]
    ticks = [tick.get_text().split("\n") for tick in lower.get_xticklabels()]
    assert [tick[0] for tick in ticks] == [
        "0",
        "1",
        "2-3",
        "4-7",
        "8-15",
        "32-63",
        "512-1023",
        "1,024+",
    ]
    for name, rows in (("ours", predicted), ("theirs", predicted[:, ::-1])):
        for i, (low, high) in enumerate(kinds):
            right = [
                (row, label)
                for row, mine in zip(rows[:, :5], true, strict=True)
                for label in mine
                if low <= count[label] <= high
            ]
            assert line(upper, name)[i, 1] == pytest.approx(
                100 * np.mean([label in row for row, label in right])
            )
            assert ticks[i][1:] == [str(sum(low <= n <= high for n in count)), str(len(right))]
            first = [
                row[0] in mine
                for row, mine in zip(rows, true, strict=True)
                if mine and row[0] >= 0 and low <= count[row[0]] <= high
            ]
            drawn = line(lower, name)[i, 1]
            assert (
                np.isnan(drawn) if len(first) < 3 else drawn == pytest.approx(100 * np.mean(first))
            )
    p1 = np.mean([row[0] in mine for row, mine in zip(predicted, true, strict=True) if mine])
    assert said.endswith(f"P@1: ours: {100 * p1:.1f}%")


def test_a_frequency_without_right_labels_is_a_gap(figure):
    split = stages.data.Split(None, np.arange(3), np.array([0, 0], np.int32), np.array([0, 1, 2]))
    plots.draw_frequency(figure, np.array([1, 2]), split, {"ours": np.array([[0], [1]])})
    assert np.array_equal(line(figure.axes[0], "ours")[:, 1], [50, np.nan], equal_nan=True)


def test_coverage_and_reliability_show_what_the_report_says(figure):
    """Those figures are tested with tools/report.py; here, that they are drawn, and that -1 stands
    for no label.
    """
    rng = np.random.default_rng(2)
    score = np.append(rng.integers(0, 30, 200) / 30, np.full(50, -1))  # many ties
    right = np.append(rng.random(200) < 0.8, np.zeros(50, bool))
    said = plots.draw_coverage(figure, score, right)
    expected = [
        (100 * (score >= s).sum() / 250, 100 * right[score >= s].mean())
        for s in sorted(set(score))[:0:-1]
    ]
    np.testing.assert_allclose(line(figure.axes[0], "first labels"), expected)
    widest = [max([c for c, p in expected if p >= target], default=0) for target in (95, 90)]
    assert f"95% right: the surest {widest[0]:.1f}%; 90% right: the surest {widest[1]:.1f}%" in said
    figure.clear()
    assert "95% right: the surest 0.0%" in plots.draw_coverage(
        figure, np.array([0.5]), np.array([False])
    )
    figure.clear()
    said = plots.draw_reliability(figure, score, right)
    upper, lower = figure.axes
    np.testing.assert_allclose(
        line(upper, "first labels"), np.transpose(report.reliability(score, right)[-2:])
    )
    assert f"off by {report.calibration(score, right):.1f} points" in said
    edges = np.linspace(0, 1, 11)
    assert [bar.get_height() for bar in lower.patches] == np.histogram(score[:200], edges)[
        0
    ].tolist()


def test_funnel_counts_what_a_beam_scores(figure):
    levels, topk, width = [4, 16], [2, 5], 3
    said = plots.draw_funnel(figure, [4, 16, 16 * width], topk, [80.0, 60.0])
    # The children of the nodes kept, written out: which of them are kept does not change how many
    # are scored.
    children = [
        set(range(4)),
        {4 * c + i for c in (0, 3) for i in range(4)},
        {width * c + i for c in (0, 2, 3, 12, 15) for i in range(width)},
    ]
    shares = [100 * len(nodes) / n for nodes, n in zip(children, [*levels, 48], strict=True)]
    assert line(figure.axes[0], "nodes")[:, 1].tolist() == pytest.approx(shares)
    assert line(figure.axes[0], "correct")[:, 1].tolist() == [100, 80, 60]
    assert "60.0%" in said and "15 of 48 slots" in said


def test_curves_show_the_log_and_the_epoch_kept(figure, done):
    steps, epochs, kept = plots.read_log(done / "log.jsonl")
    assert kept == stages_best(epochs)
    said = plots.draw_curves(figure, steps, epochs, kept)
    losses, precisions, rates = figure.axes
    assert line(losses, "level 2").tolist() == [[r["step"], r["loss"][1]] for r in steps]
    assert line(rates, "of the heads").tolist() == [[r["step"], r["lr"]] for r in steps]
    values = [r["validation"]["P"][r["ranking"]] for r in epochs]
    for j, name in enumerate(("P@1", "P@3", "P@5")):
        assert line(precisions, name)[:, 1].tolist() == [row[j] for row in values]
    assert f"epoch {kept['epoch']} of 2" in said and line(precisions, "epoch")[0, 0] == kept["step"]


def stages_best(epochs: list[dict]) -> dict:
    """As stage 4 keeps a model: only a larger sum replaces what is there."""
    best, kept = -1.0, None
    for record in epochs:
        if sum(record["validation"]["P"][record["ranking"]]) > best:
            best, kept = sum(record["validation"]["P"][record["ranking"]]), record
    return kept


def test_treemap_areas_are_the_weights_and_tile_the_plane():
    weight = np.random.default_rng(4).integers(0, 9, 16)
    boxes = plots.treemap(weight, 0, 0, 20, 10)
    assert [w * h for _, _, w, h in boxes] == pytest.approx((200 * weight / weight.sum()).tolist())
    point = np.random.default_rng(5).random((500, 2)) * (20, 10)
    inside = [sum(x <= a < x + w and y <= b < y + h for x, y, w, h in boxes) for a, b in point]
    assert inside == [1] * 500
    assert plots.treemap(np.array([3]), 0, 0, 2, 1) == [(0, 0, 2, 1)]
    # nothing right anywhere: no division by zero
    assert len(plots.treemap(np.zeros(4, int), 0, 0, 2, 1)) == 4


def test_pictures_of_a_run(done, tmp_path, capsys, monkeypatch):
    image = pytest.importorskip("matplotlib.image", reason="tools/plots.py draws with matplotlib")
    run, seen = shutil.copytree(done, tmp_path / "run"), {}
    draw_tree, tree = plots.draw_tree, stages.tree.load(run)
    # as if each cluster had an empty slot
    slots = np.insert(tree.slot_to_label.reshape(8, 5), 5, -1, axis=1).ravel()
    monkeypatch.setattr(stages.tree, "load", lambda folder: stages.tree.Tree(slots, tree.levels))
    monkeypatch.setattr(
        plots, "draw_tree", lambda figure, *data: seen.update(tree=data) or draw_tree(figure, *data)
    )
    plots.run(plots.Config(run=str(run)))
    printed = capsys.readouterr().out.splitlines()
    for name, text in zip(NAMES, printed, strict=True):
        path = run / f"plot-{name}.png"
        assert text.startswith(f"{path}: ") and any(c.isdigit() for c in text.split(": ", 1)[1])
        head = path.read_bytes()[:24]
        width, height = struct.unpack(">II", head[16:24])
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and 800 <= width <= 2000 and 400 <= height <= 1200
        pixels = image.imread(path)[..., :3]
        # not empty
        assert pixels.shape[:2] == (height, width) and (pixels < 0.9).any(axis=2).mean() > 0.02
    # The clusters, label by label.
    data = stages.data.load(run)
    labels = load_npz(run / "predictions.npz")[0]["labels"]
    cluster = {label: slot // 6 for slot, label in enumerate(slots.tolist()) if label >= 0}
    test, pairs, found = data.splits["test"], Counter(), Counter()
    for i in range(len(test)):
        for label in test.labels[test.label_offsets[i] : test.label_offsets[i + 1]]:
            pairs[cluster[label]] += 1
            found[cluster[label]] += label in labels[i, :5]
    names, pairs_C, found_C = seen["tree"]
    assert pairs_C.tolist() == [pairs[c] for c in range(8)] and found_C.tolist() == [
        found[c] for c in range(8)
    ]
    count = Counter(data.splits["train"].labels.tolist())
    for c, row in enumerate(names):
        mine = [label for label in cluster if cluster[label] == c]
        assert sorted(row) == sorted(data.names[label] for label in mine)[:8]
        often = [count[data.names.index(name)] for name in row]
        assert often == sorted(often, reverse=True)


def test_no_system_in_the_pictures_predicts_what_is_known(done, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="tools/plots.py draws with it")
    run, seen = shutil.copytree(done, tmp_path / "run"), {}
    loaded = stages.data.load(run)
    # Of each document its first prediction, and the most frequent label, are known.
    n, n_labels = len(loaded.splits["test"]), len(loaded.names)
    labels = load_npz(run / "predictions.npz")[0]["labels"]
    frequent = np.bincount(loaded.splits["train"].labels).argmax()
    mask = np.zeros((n, n_labels), bool)
    mask[:, frequent] = mask[np.arange(n), labels[:, 0]] = True
    monkeypatch.setattr(
        stages.data, "load", lambda folder: loaded._replace(known={"test": csr_matrix(mask)})
    )
    draw = plots.draw_frequency
    monkeypatch.setattr(
        plots, "draw_frequency", lambda *data: seen.update(systems=data[-1]) or draw(*data)
    )
    plots.run(plots.Config(run=str(run)))
    for name in ("20 nearest neighbours", "most frequent labels"):
        found = seen["systems"][name]
        assert found.shape == (n, 5) and not mask[np.arange(n)[:, None], found][found >= 0].any()


def test_odd_names_and_empty_clusters(figure, tmp_path):
    names = [["$x_1^2$", "_y", "a\nb", "é" * 300], ["標籤"], []]
    said = plots.draw_tree(
        figure, [*names, ["z"]], np.array([50, 20, 0, 1]), np.array([25, 0, 0, 1])
    )
    drawn = [text.get_text().split("\n") for text in figure.axes[0].texts]
    assert (
        drawn[0][:3] == ["$x_1^2$", "_y", "a b"]
        and drawn[0][3].endswith("…")
        and drawn[0][-1] == "50% of 50"
    )
    assert drawn[1] == ["標籤", "0% of 20"] and "labels of 2 of 4 clusters" in said
    with pytest.warns(UserWarning, match="Glyph"):
        figure.savefig(tmp_path / "tree.png")


def test_errors_say_what_to_do(done, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="^pictures need matplotlib: pip install matplotlib$"):
        plots.run(plots.Config(run=str(done)))
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="tools/plots.py draws with it")
    run = shutil.copytree(done, tmp_path / "run")
    config, log = plots.Config(run=str(run)), run / "log.jsonl"
    arrays, _ = load_npz(run / "predictions.npz")
    evaluated = stages.eval.Config(run=str(run))
    for change in (
        {"scores": arrays["scores"] * 50},
        {"labels": arrays["labels"] + 40},
        {key: array[1:] for key, array in arrays.items()},
    ):
        save_npz(run / "predictions.npz", evaluated, arrays | change)
        with pytest.raises(UserError, match="predictions.npz holds .*expected"):
            plots.run(config)
    (run / "predictions.npz").unlink()
    with pytest.raises(
        UserError, match=r"predictions.npz does not exist; run: python 05_eval.py --run"
    ):
        plots.run(config)
    lines = [line for line in log.read_text().splitlines() if "validation" not in json.loads(line)]
    for text in ("\n".join(lines), "", "{", "[1]\n"):
        log.write_text(text)
        with pytest.raises(UserError, match=r"log.jsonl: no epoch .*run: python 04_train.py --run"):
            plots.run(config)
    log.unlink()
    with pytest.raises(
        UserError, match=r"log.jsonl: no epoch .*No such file.*run: python 04_train.py --run"
    ):
        plots.run(config)
