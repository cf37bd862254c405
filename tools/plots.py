"""Pictures of a run: how it learned, where labels get lost, which it finds, and whether its scores can be believed.

    python -m tools.plots --run runs/demo

Reads    RUN/data.npz, RUN/tree.npz, RUN/log.jsonl, RUN/model.pt (its settings), RUN/predictions.npz
Writes   RUN/plot-curves.png        loss per level, validation P@1/3/5 and learning rate against the step
         RUN/plot-funnel.png        share of each level that is scored, and share of the right labels among that
         RUN/plot-frequency.png     by training documents of labels: right ones found, first ones right; yardsticks
         RUN/plot-coverage.png      share right of the surest first labels, against the documents they are for
         RUN/plot-reliability.png   score of the first label against the share that is right: tools/report.py's bins
         RUN/plot-tree.png          coarsest clusters: most frequent names, share of their labels found

Needs matplotlib. Documents without labels are left out, as in 05_eval.py; where nothing was predicted, that is wrong.
Shapes: N documents, L labels, k predicted, C clusters, M classes of labels, T levels.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plumbing.cli import flag, int_list, main
from plumbing.errors import UserError
from plumbing.stages import load_stages
from plumbing.store import load_pt
from tools import report

stages, FIRST, FEW = load_stages(), 5, 10  # predicted labels that a reader looks at; a share of fewer says nothing
CLASSES = ["0", "1", *(f"{1 << i}-{(2 << i) - 1}" for i in range(1, 10)), "1,024+"]  # training documents of a label
STYLES = [*zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"), "os^Dv", strict=True)]  # colour-blind-safe


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")


def read_log(path: Path) -> tuple[list[dict], list[dict], dict]:
    """(records of steps, records of epochs, that of the epoch kept) of log.jsonl. UserError where there is none."""
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        epochs = [record for record in records if "validation" in record]
        kept = max(epochs, key=lambda record: sum(record["validation"]["P"][record["ranking"]]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: no epoch ({error}); run: python 04_train.py --run {path.parent}") from error
    return [record for record in records if "loss" in record], epochs, kept


def found_by_class(class_L: np.ndarray, n: int, labels_Nk: np.ndarray, split: Any) -> np.ndarray:
    """(2, n): per class of labels, (document, label) pairs that are right, and those of them that were predicted."""
    found = labels_Nk[stages.train.hits(labels_Nk, split)]
    return np.stack([np.bincount(class_L[labels], minlength=n) for labels in (split.labels, found)])


def treemap(weight_C: np.ndarray, x: float, y: float, w: float, h: float) -> list[tuple[float, ...]]:
    """Rectangles (x, y, width, height), areas as the weights, halved as the tree is: what lies together is related."""
    if len(weight_C) == 1:
        return [(x, y, w, h)]
    one, two = np.split(weight_C, [len(weight_C) // 2])
    share = one.sum() / max(1, weight_C.sum())
    if w > 2 * h:  # so that cells are rather wide than tall, as names are
        return treemap(one, x, y, w * share, h) + treemap(two, x + w * share, y, w * (1 - share), h)
    return treemap(one, x, y, w, h * share) + treemap(two, x, y + h * share, w, h * (1 - share))


def plot(axis: Any, x: Any, lines: dict[str, np.ndarray], xlabel: str, ylabel: str, **more) -> None:
    """Lines over a common x, the first on top, with the legend above the data, not over it."""
    for i, ((name, y), (color, marker)) in enumerate(zip(lines.items(), STYLES * len(lines), strict=False)):
        axis.plot(x, y, color=color, marker=marker if len(y) < 99 else "", markersize=4, label=name, zorder=9 - i)
    axis.set(xlabel=xlabel, ylabel=ylabel, **more)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=4, frameon=False)


def draw_curves(figure: Any, steps: list[dict], epochs: list[dict], kept: dict) -> str:
    """Records of the log: of intervals, of epochs, and of the epoch that was kept."""
    losses, precisions, rates = figure.subplots(3, sharex=True, height_ratios=(3, 3, 1.5))
    step_R, loss_RT, lr_R = (np.array([record[key] for record in steps]) for key in ("step", "loss", "lr"))
    step_E, best = [record["step"] for record in epochs], epochs.index(kept)
    precision_E3 = np.array([record["validation"]["P"][record["ranking"]] for record in epochs])
    named = {f"P@{j}: {y[best]:.1f}": y for j, y in zip((1, 3, 5), precision_E3.T, strict=True)}
    plot(losses, step_R, {f"level {t}": y for t, y in enumerate(loss_RT.T, 1)}, "", "training loss")
    losses.set_yscale("log", subs=(2, 5))
    losses.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}" if loss_RT.max() < 999 * loss_RT.min() else "")
    precisions.axvline(step_E[best], color="black", linestyle=":", label=f"epoch {best + 1}, kept")
    plot(precisions, step_E, named, "", "validation, %", ylim=(0, 1.1 * precision_E3.max() + 1))
    plot(rates, step_R, {"of the heads": lr_R}, "training step", "learning rate", ylim=(0, None))
    return f"validation P@1 {precision_E3[best, 0]:.1f}% in epoch {best + 1} of {len(epochs)}, the one kept"


def draw_funnel(figure: Any, counts: list[int], topk: list[int], recall: list[float]) -> str:
    """`counts`: nodes per level, slots of labels last; `recall`: right labels (%) below the clusters kept per level."""
    rows, nodes, reach = range(len(counts)), np.array([1, *counts]), [100, *recall]
    scored = np.array([1, *topk]) * (nodes[1:] // nodes[:-1])  # the children of what is kept one level up
    ticks = [f"{kind}\n{m:,} of {n:,} scored\n{share:.1f}% of the right labels" for kind, m, n, share in
             zip([f"clusters: {k:,} kept" for k in topk] + ["labels"], scored, counts, reach, strict=True)]
    shares = {"right labels among those scored": reach, "nodes scored": 100 * scored / counts}
    plot(figure.subplots(), rows, shares, "", "% of all at this level", ylim=(0, 105), xticks=rows, xticklabels=ticks)
    return f"{reach[-1]:.1f}% of validation's right labels are among the {scored[-1]:,} of {counts[-1]:,} slots scored"


def draw_frequency(figure: Any, count_L: np.ndarray, split: Any, systems: dict[str, np.ndarray]) -> str:
    """`count_L`: training documents; `systems`: labels (N, k) by name, best first."""
    class_L = np.minimum(np.frexp(count_L)[1], len(CLASSES) - 1)  # count = f 2^class with 1/2 <= f < 1: see CLASSES
    (here_M, n_M), (upper, lower) = np.unique(class_L, return_counts=True), figure.subplots(2, sharex=True)
    has_N, recall, precision = np.diff(split.label_offsets) > 0, {}, {}
    for name, labels in systems.items():
        pairs, found = found_by_class(class_L, len(CLASSES), labels[:, :FIRST], split)[:, here_M]
        recall[f"{name}: {100 * found.sum() / max(1, pairs.sum()):.1f}%"] = 100 * found / np.where(pairs, pairs, np.nan)
        right = found_by_class(class_L, len(CLASSES), labels[:, :1], split)[1, here_M]
        n = np.bincount(class_L[labels[has_N & (labels[:, 0] >= 0), 0]], minlength=len(CLASSES))[here_M]
        p1 = 100 * right.sum() / max(1, has_N.sum())
        precision[f"{name}: {p1:.1f}%"] = 100 * right / np.where(n < FEW, np.nan, n)
    ticks = [f"{CLASSES[m]}\n{n:,}\n{times:,}" for m, n, times in zip(here_M, n_M, pairs, strict=True)]
    plot(upper, range(len(n_M)), recall, "", f"right labels found\nin the first {FIRST}, %", ylim=(0, None))
    plot(lower, range(len(n_M)), precision, "rows: training documents of a label, number of such labels, how often one "
         "of them is right", f"first predictions that\nare right, %, where\nthere are {FEW} or more", ylim=(0, None),
         xticks=range(len(n_M)), xticklabels=ticks)
    return f"right labels found in the first {FIRST}: {next(iter(recall))}; P@1: {next(iter(precision))}"


def draw_coverage(figure: Any, score_N: np.ndarray, right_N: np.ndarray) -> str:
    """Precision of first labels, surest first; score -1: none."""
    axis, (share_M, right_M), said = figure.subplots(), report.precision_coverage(score_N, right_N), []
    for target, (color, _) in zip((95, 90), STYLES[1:], strict=False):
        said.append(f"{target}% right: the surest {100 * report.coverage(score_N, right_N, target / 100)[1]:.1f}%")
        axis.axhline(target, color=color, linestyle="--", label=said[-1])
    plot(axis, 100 * share_M, {"first labels": 100 * right_M}, "documents, surest first, %", "right, %", ylim=(0, 102))
    return f"first label {'; '.join(said)} of the documents"


def draw_reliability(figure: Any, score_N: np.ndarray, right_N: np.ndarray) -> str:
    """Mean score against share right in bins of about equally many documents; score -1: none."""
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    *_, score, share = report.reliability(score_N, right_N)
    upper.plot((0, 1), (0, 1), ":", color="black", label="as scores say")
    plot(upper, score, {f"first labels, {len(score)} bins of about equal size": share}, "", "share right",
         ylim=(-0.02, 1.02))
    lower.bar_label(lower.hist(score_N, np.linspace(0, 1, 11), rwidth=0.9, color="#999999")[2], fmt="{:,.0f}")
    lower.set(xlabel="score", ylabel="documents", xlim=(-0.02, 1.02), ymargin=0.3)
    return f"scores of first labels are off by {report.calibration(score_N, right_N):.1f} points on average"


def draw_tree(figure: Any, names_C: list[list[str]], pairs_C: np.ndarray, found_C: np.ndarray) -> str:
    """Areas as the right labels `pairs_C`, coloured by the share of them that was found; names: most frequent first."""
    axis, share_C = figure.subplots(subplot_kw={"xticks": [], "yticks": []}), 100 * found_C / np.maximum(pairs_C, 1)
    scale = axis.scatter([], [], c=[], cmap="cividis", vmin=0, vmax=100)  # made for colour-blind readers too
    figure.colorbar(scale, label=f"right labels found in the first {FIRST}, %", pad=0.01, aspect=40)
    figure.draw_without_rendering()  # lays out: from here on cells are measured in points, as letters are
    width, height = axis.get_window_extent().size * 72 / figure.dpi
    x, y, w, h = np.array(treemap(pairs_C, 0, 0, width, height)).T
    cells = axis.bar(x, h, w, y, align="edge", color=scale.to_rgba(share_C), edgecolor="white", linewidth=0.5)
    room_C, lines_C = (w / 4.4).astype(int), (h / 9.8).astype(int)  # letters in a line, lines in a cell: 7.5 points
    for i in (named := np.flatnonzero((room_C > 8) & (lines_C > 1))):
        room, names = room_C[i], [*names_C[i][: lines_C[i] - 1], f"{share_C[i]:.0f}% of {pairs_C[i]:,}"]
        text = "\n".join(" ".join((name if len(name) < room else name[: room - 2] + "…").split()) for name in names)
        axis.text(x[i] + 2, y[i] + 2, text, fontsize=7.5, va="top", parse_math=False,
                  color="black" if share_C[i] > 50 else "white").set_clip_path(cells[i])
    axis.set(xlim=(0, width), ylim=(height, 0))
    return f"labels of {(found_C > 0).sum()} of {len(x)} clusters are found; area: right labels; {len(named)} are named"


def run(config: Config) -> None:
    try:
        from matplotlib.figure import Figure  # without pyplot: drawn by Agg, with no screen
        from PIL import Image  # comes with it
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    out = Path(config.run)
    data, tree, log = stages.data.load(out), stages.tree.load(out), read_log(out / "log.jsonl")
    kept = load_pt(out / "model.pt")[0]["config"]["topk"]  # nothing, where the tree is only its root
    labels, scores, right = report.load(out / "predictions.npz", "test", data)
    split, train, n_labels = data.splits["test"], data.splits["train"], len(data.names)
    count_L, has_N = np.bincount(train.labels, minlength=n_labels), np.diff(split.label_offsets) > 0
    known = data.known.get("test")
    near = stages.eval.nearest_neighbours(train, split, data.meta["vocab_size"], n_labels, FIRST, known=known)
    frequent = stages.eval.most_frequent(train, len(split), n_labels, FIRST, known)
    systems = {"this run": labels, "20 nearest neighbours": near, "most frequent labels": frequent}
    slots_CF = tree.slot_to_label.reshape([*tree.levels, 1][0], -1)
    cluster_L = np.argsort(tree.slot_to_label)[-n_labels:] // slots_CF.shape[1]  # empty slots, -1, sort first
    names_C = [[data.names[i] for i in sorted(row[row >= 0], key=lambda i: -count_L[i])[:8]] for row in slots_CF]
    for name, size, draw, *values in (
        ("curves", (9, 8), draw_curves, *log),
        ("funnel", (9, 4), draw_funnel, [*tree.levels, slots_CF.size],
         int_list(kept, "--topk") if kept else [], log[2]["validation"]["recall"]),
        ("frequency", (9, 7), draw_frequency, count_L, split, systems),
        ("coverage", (9, 5), draw_coverage, scores[has_N, 0], right[has_N, 0]),
        ("reliability", (9, 7), draw_reliability, scores[has_N, 0], right[has_N, 0]),
        ("tree", (17, 10) if len(slots_CF) > 32 else (10, 6), draw_tree, names_C,
         *found_by_class(cluster_L, len(slots_CF), labels[:, :FIRST], split)),
    ):
        figure, path = Figure(size, dpi=110, layout="constrained"), out / f"plot-{name}.png"
        with warnings.catch_warnings(record=True) as caught:  # of letters that no font here has
            figure.suptitle(said := draw(figure, *values), fontsize=10)
            figure.savefig(path)
        Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)  # a third
        print(f"{path}: {said}" + (f"; {len(caught)} warnings: {caught[0].message}" if caught else ""))


if __name__ == "__main__":
    main(run, Config, __doc__)
