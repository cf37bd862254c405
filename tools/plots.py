"""Pictures of a run: how it learned, where labels get lost, which it finds, and whether its scores
can be believed.

    python -m tools.plots --run runs/demo

Reads    RUN/data.npz, RUN/tree.npz, RUN/log.jsonl, RUN/model.pt (its settings), RUN/predictions.npz
Writes   RUN/plot-curves.png        loss per level, validation P@1/3/5 and learning rate by step
         RUN/plot-funnel.png        share of each level that is scored, and of its correct labels
         RUN/plot-frequency.png     labels found, and first predictions that are correct, by label
                                    frequency, beside two baselines
         RUN/plot-coverage.png      precision of the surest first predictions, by their number
         RUN/plot-reliability.png   score of the first prediction against the share that is correct
         RUN/plot-tree.png          coarsest clusters: most frequent names, share of labels found

Needs matplotlib. Documents without labels are left out, as in 05_eval.py. Where nothing was
predicted, that counts as wrong.
Shapes   N documents, L labels, k predicted, C clusters, M classes of labels by frequency, T levels,
         R records of steps in the log, E epochs
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

stages = load_stages()

FIRST = 5  # predicted labels that a reader looks at
FEW = 10  # a share of fewer predictions than this says nothing
# Classes of labels by their number of training documents: 0, 1, 2 to 3, 4 to 7, and so on.
CLASSES = ["0", "1"]
for power in range(1, 10):
    CLASSES.append(f"{2**power}-{2 ** (power + 1) - 1}")
CLASSES.append("1,024+")
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"]  # safe for colour-blind readers
MARKERS = ["o", "s", "^", "D", "v"]


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")


# 1. What is drawn.


def read_log(path: Path) -> tuple[list[dict], list[dict], dict]:
    """(records of steps, records of epochs, the record of the epoch kept) of log.jsonl.

    UserError if it has no epoch.
    """
    # The epoch that stage 4 kept has the largest sum of P@1, P@3 and P@5. P@k is the share of
    # correct labels among the first k.
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        epochs = [record for record in records if "validation" in record]
        kept = max(epochs, key=lambda record: sum(record["validation"]["P"][record["ranking"]]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        command = f"python 04_train.py --run {path.parent}"
        raise UserError(f"{path}: no epoch ({error}); run: {command}") from error
    steps = [record for record in records if "loss" in record]
    return steps, epochs, kept


def class_of(count_L: np.ndarray) -> np.ndarray:
    """(L,) which of CLASSES each label belongs to, by its number of training documents."""
    # frexp: count = fraction * 2^exponent with a fraction from 1/2 to 1, so 2 and 3 have exponent
    # 2, and 4 to 7 have exponent 3.
    _, exponent_L = np.frexp(count_L)
    return np.minimum(exponent_L, len(CLASSES) - 1)


def found_by_class(
    class_L: np.ndarray, n_classes: int, labels_Nk: np.ndarray, split: Any
) -> np.ndarray:
    """(2, n_classes): correct labels of all documents per class, and how many were predicted."""
    is_hit_Nk = stages.train.hits(labels_Nk, split)
    found = labels_Nk[is_hit_Nk]  # the correct predictions of all documents, in one row
    n_correct = np.bincount(class_L[split.labels], minlength=n_classes)
    n_found = np.bincount(class_L[found], minlength=n_classes)
    return np.stack([n_correct, n_found])


def treemap(weight_C: np.ndarray, x: float, y: float, w: float, h: float) -> list[tuple]:
    """Rectangles (x, y, width, height) with areas as the weights.

    The plane is halved as the label tree is, so clusters that are related lie side by side.
    """
    # 1. A single cluster takes the whole rectangle.
    if len(weight_C) == 1:
        return [(x, y, w, h)]
    # 2. Two halves of the clusters, and the first one's share of the area.
    one, two = np.split(weight_C, [len(weight_C) // 2])
    share = one.sum() / max(1, weight_C.sum())
    # 3. Cells shall be wider than tall, because names are. So a rectangle is cut into left and
    #    right only if it is more than twice as wide as it is tall.
    if w > 2 * h:
        left = treemap(one, x, y, w * share, h)
        right = treemap(two, x + w * share, y, w * (1 - share), h)
        return left + right
    upper = treemap(one, x, y, w, h * share)
    lower = treemap(two, x, y + h * share, w, h * (1 - share))
    return upper + lower


# 2. The pictures. Each function draws one on an empty figure, and returns its title.


def plot(axis: Any, x: Any, lines: dict[str, Any], xlabel: str, ylabel: str, **more) -> None:
    """Lines over a common x, the first on top, with the legend above the data, not over it."""
    for i, (name, y) in enumerate(lines.items()):
        # Colours and markers are used in turn. A hundred markers would hide their line.
        color = COLORS[i % len(COLORS)]
        marker = MARKERS[i % len(MARKERS)]
        if len(y) >= 99:
            marker = ""
        axis.plot(x, y, color=color, marker=marker, markersize=4, label=name, zorder=9 - i)
    axis.set(xlabel=xlabel, ylabel=ylabel, **more)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=4, frameon=False)


def draw_curves(figure: Any, steps: list[dict], epochs: list[dict], kept: dict) -> str:
    """Three curves by step. The arguments are what read_log returns."""
    losses, precisions, rates = figure.subplots(3, sharex=True, height_ratios=(3, 3, 1.5))
    step_R = np.array([record["step"] for record in steps])
    loss_RT = np.array([record["loss"] for record in steps])
    lr_R = np.array([record["lr"] for record in steps])
    step_E = [record["step"] for record in epochs]
    precision_E3 = np.array([record["validation"]["P"][record["ranking"]] for record in epochs])
    best = epochs.index(kept)

    # 1. The loss of each level. Between powers of ten the axis has room for more numbers only if
    #    it spans little.
    by_level = {f"level {t}": y for t, y in enumerate(loss_RT.T, 1)}
    plot(losses, step_R, by_level, "", "training loss")
    losses.set_yscale("log", subs=(2, 5))
    spans_little = loss_RT.max() < 999 * loss_RT.min()
    losses.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}" if spans_little else "")

    # 2. Precision on validation, and the epoch that was kept.
    named = {}
    for k, y in zip((1, 3, 5), precision_E3.T, strict=True):
        named[f"P@{k}: {y[best]:.1f}"] = y
    kept_label = f"epoch {best + 1}, kept"
    precisions.axvline(step_E[best], color="black", linestyle=":", label=kept_label)
    top = 1.1 * precision_E3.max() + 1
    plot(precisions, step_E, named, "", "validation, %", ylim=(0, top))

    # 3. The learning rate.
    of_heads = {"of the heads": lr_R}
    plot(rates, step_R, of_heads, "training step", "learning rate", ylim=(0, None))
    p1 = precision_E3[best, 0]
    return f"validation P@1 {p1:.1f}% in epoch {best + 1} of {len(epochs)}, the one kept"


def draw_funnel(figure: Any, counts: list[int], topk: list[int], recall: list[float]) -> str:
    """How much of each level is scored, and how much of what is correct is among that.

    counts: nodes per level, the slots of labels last. topk: clusters kept per cluster level.
    recall: correct labels (%) below the clusters kept, per cluster level.
    """
    # 1. How many nodes of a level are scored: the children of the clusters kept one level up.
    #    Everything begins at the root, one node.
    nodes = np.array([1, *counts])
    fans = nodes[1:] // nodes[:-1]
    scored = np.array([1, *topk]) * fans
    # 2. A correct label is among them if its cluster was kept one level up. The root always is.
    reach = [100, *recall]
    # 3. What stands below each level.
    kinds = [f"clusters: {k:,} kept" for k in topk]
    kinds.append("labels")
    ticks = []
    for kind, m, n, share in zip(kinds, scored, counts, reach, strict=True):
        ticks.append(f"{kind}\n{m:,} of {n:,} scored\n{share:.1f}% of the correct labels")
    # 4. The two lines.
    shares = {"correct labels among those scored": reach, "nodes scored": 100 * scored / counts}
    rows = range(len(counts))
    settings = {"ylim": (0, 105), "xticks": rows, "xticklabels": ticks}
    plot(figure.subplots(), rows, shares, "", "% of all at this level", **settings)
    return (
        f"{reach[-1]:.1f}% of validation's correct labels are among the "
        f"{scored[-1]:,} of {counts[-1]:,} slots scored"
    )


def draw_frequency(
    figure: Any, count_L: np.ndarray, split: Any, systems: dict[str, np.ndarray]
) -> str:
    """How rare and frequent labels are found.

    count_L: training documents of each label. systems: {name: labels (N, k), best first}.
    """
    upper, lower = figure.subplots(2, sharex=True)
    # Only the classes that have labels are drawn.
    class_L = class_of(count_L)
    here_M, n_labels_M = np.unique(class_L, return_counts=True)
    has_labels_N = np.diff(split.label_offsets) > 0
    n_documents = max(1, has_labels_N.sum())
    recall = {}
    precision = {}
    for name, labels_Nk in systems.items():
        # 1. Of the correct labels of a class: the share that is predicted.
        by_class = found_by_class(class_L, len(CLASSES), labels_Nk[:, :FIRST], split)
        correct_M, found_M = by_class[:, here_M]
        share = 100 * found_M.sum() / max(1, correct_M.sum())
        # Where a class has no correct label there is no share: a gap in the line.
        one_or_none_M = np.where(correct_M, correct_M, np.nan)
        recall[f"{name}: {share:.1f}%"] = 100 * found_M / one_or_none_M

        # 2. Of the first predictions that are a label of the class: the share that is correct.
        by_class = found_by_class(class_L, len(CLASSES), labels_Nk[:, :1], split)
        right_M = by_class[1, here_M]
        first_N = labels_Nk[has_labels_N, 0]
        first_labels = first_N[first_N >= 0]
        predicted = np.bincount(class_L[first_labels], minlength=len(CLASSES))
        predicted_M = predicted[here_M]
        # All classes together are P@1.
        p1 = 100 * right_M.sum() / n_documents
        enough_M = np.where(predicted_M < FEW, np.nan, predicted_M)
        precision[f"{name}: {p1:.1f}%"] = 100 * right_M / enough_M

    # 3. Below a class: its name, its labels, and how often one of them is correct.
    ticks = []
    for m, n, times in zip(here_M, n_labels_M, correct_M, strict=True):
        ticks.append(f"{CLASSES[m]}\n{n:,}\n{times:,}")
    rows = range(len(here_M))
    found_label = f"correct labels found\nin the first {FIRST}, %"
    first_label = f"first predictions that\nare correct, %, where\nthere are {FEW} or more"
    legend = (
        "rows: training documents of a label, number of such labels, "
        "how often one of them is correct"
    )
    # 4. One picture above the other, over the same classes.
    plot(upper, rows, recall, "", found_label, ylim=(0, None))
    settings = {"ylim": (0, None), "xticks": rows, "xticklabels": ticks}
    plot(lower, rows, precision, legend, first_label, **settings)
    # The title says the figures of the first system, the run itself.
    best_recall = next(iter(recall))
    best_precision = next(iter(precision))
    return f"correct labels found in the first {FIRST}: {best_recall}; P@1: {best_precision}"


def draw_coverage(figure: Any, score_N: np.ndarray, right_N: np.ndarray) -> str:
    """Precision of first predictions, surest first. A score of -1 means: none."""
    axis = figure.subplots()
    share_M, right_M = report.precision_coverage(score_N, right_N)
    # For how many documents are 95 or 90 in 100 of the first labels right?
    said = []
    for target, color in ((95, COLORS[1]), (90, COLORS[2])):
        _, covered = report.coverage(score_N, right_N, target / 100)
        said.append(f"{target}% right: the surest {100 * covered:.1f}%")
        axis.axhline(target, color=color, linestyle="--", label=said[-1])
    line = {"first labels": 100 * right_M}
    plot(axis, 100 * share_M, line, "documents, surest first, %", "right, %", ylim=(0, 102))
    return f"first label {'; '.join(said)} of the documents"


def draw_reliability(figure: Any, score_N: np.ndarray, right_N: np.ndarray) -> str:
    """Mean score against the share correct, in bins of about equally many documents."""
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    # 1. If scores were probabilities, all points would be on the diagonal: of the first labels with
    #    a score of 0.8, eight in ten would be right.
    *_, score, share = report.reliability(score_N, right_N)
    upper.plot((0, 1), (0, 1), ":", color="black", label="as scores say")
    line = {f"first labels, {len(score)} bins of about equal size": share}
    plot(upper, score, line, "", "share right", ylim=(-0.02, 1.02))
    # 2. How many documents have such a score.
    _, _, bars = lower.hist(score_N, np.linspace(0, 1, 11), rwidth=0.9, color="#999999")
    lower.bar_label(bars, fmt="{:,.0f}")
    lower.set(xlabel="score", ylabel="documents", xlim=(-0.02, 1.02), ymargin=0.3)
    error = report.calibration(score_N, right_N)
    return f"scores of first labels are off by {error:.1f} points on average"


def draw_tree(
    figure: Any, names_C: list[list[str]], pairs_C: np.ndarray, found_C: np.ndarray
) -> str:
    """The coarsest clusters as a map.

    Areas are the numbers of correct labels, pairs_C. Colours are the share that was found.
    names_C: the names of each cluster's labels, most frequent first.
    """
    axis = figure.subplots(subplot_kw={"xticks": [], "yticks": []})
    share_C = 100 * found_C / np.maximum(pairs_C, 1)
    # A scatter plot of nothing: it brings the scale of colours, safe for colour-blind readers.
    scale = axis.scatter([], [], c=[], cmap="cividis", vmin=0, vmax=100)
    label = f"correct labels found in the first {FIRST}, %"
    figure.colorbar(scale, label=label, pad=0.01, aspect=40)
    # This lays the figure out. From here on the axis has its size.
    figure.draw_without_rendering()

    # 1. The cells, measured in points, as letters are.
    points_per_pixel = 72 / figure.dpi
    width, height = axis.get_window_extent().size * points_per_pixel
    rectangles_C4 = np.array(treemap(pairs_C, 0, 0, width, height))
    x, y, w, h = rectangles_C4.T
    cells = axis.bar(
        x,
        h,
        w,
        y,
        align="edge",
        color=scale.to_rgba(share_C),
        edgecolor="white",
        linewidth=0.5,
    )

    # 2. Names, where a cell has room for them. A letter of 7.5 points takes 4.4 by 9.8.
    letters_C = (w / 4.4).astype(int)  # in a line
    lines_C = (h / 9.8).astype(int)
    named = np.flatnonzero((letters_C > 8) & (lines_C > 1))
    for i in named:
        # The last line is for the figures.
        names = names_C[i][: lines_C[i] - 1]
        names = [*names, f"{share_C[i]:.0f}% of {pairs_C[i]:,}"]
        text = "\n".join(shortened(name, letters_C[i]) for name in names)
        # Large shares have bright colours.
        color = "black" if share_C[i] > 50 else "white"
        drawn = axis.text(
            x[i] + 2, y[i] + 2, text, fontsize=7.5, va="top", parse_math=False, color=color
        )
        # Letters are of different widths: what is too long ends at the edge of its cell.
        drawn.set_clip_path(cells[i])
    # y grows downwards, as one reads.
    axis.set(xlim=(0, width), ylim=(height, 0))
    n_found = (found_C > 0).sum()
    return (
        f"labels of {n_found} of {len(x)} clusters are found; area: correct labels; "
        f"{len(named)} are named"
    )


def shortened(name: str, room: int) -> str:
    """A name on one line of at most `room` letters."""
    if len(name) >= room:
        name = name[: room - 2] + "…"
    return " ".join(name.split())


# 3. All pictures of a run.


def names_by_cluster(slots_CF: np.ndarray, names: list[str], count_L: np.ndarray) -> list[list]:
    """The names of the eight most frequent labels of each cluster."""
    result = []
    for slots in slots_CF:
        # Without the empty slots, -1. Labels that are equally frequent stay in tree order.
        labels = sorted(slots[slots >= 0], key=lambda label: -count_L[label])
        result.append([names[label] for label in labels[:8]])
    return result


def pictures_of(out: Path) -> list[tuple]:
    """(name, size in inches, function that draws, its arguments after the figure) of each."""
    # 1. What the run left behind.
    data = stages.data.load(out)
    tree = stages.tree.load(out)
    steps, epochs, kept = read_log(out / "log.jsonl")
    model, _ = load_pt(out / "model.pt")
    labels_Nk, scores_Nk, right_Nk = report.load(out / "predictions.npz", "test", data)
    split = data.splits["test"]
    train = data.splits["train"]
    n_labels = len(data.names)
    count_L = np.bincount(train.labels, minlength=n_labels)
    # The first prediction of each document that has labels.
    has_labels_N = np.diff(split.label_offsets) > 0
    first_scores = scores_Nk[has_labels_N, 0]
    first_right = right_Nk[has_labels_N, 0]

    # 2. The baselines of stage 5.
    known = data.known.get("test")
    near = stages.eval.nearest_neighbours(
        train, split, data.meta["vocab_size"], n_labels, FIRST, known=known
    )
    frequent = stages.eval.most_frequent(train, len(split), n_labels, FIRST, known)
    systems = {
        "this run": labels_Nk,
        "20 nearest neighbours": near,
        "most frequent labels": frequent,
    }

    # 3. The coarsest clusters. Without cluster levels the whole tree is one.
    n_clusters = tree.levels[0] if tree.levels else 1
    slots_CF = tree.slot_to_label.reshape(n_clusters, -1)
    # The cluster of a label is a division of its slot. Empty slots, -1, are sorted first.
    slot_L = np.argsort(tree.slot_to_label)[-n_labels:]
    cluster_L = slot_L // slots_CF.shape[1]
    pairs_C, found_C = found_by_class(cluster_L, n_clusters, labels_Nk[:, :FIRST], split)
    names_C = names_by_cluster(slots_CF, data.names, count_L)
    map_size = (17, 10) if n_clusters > 32 else (10, 6)

    # 4. What the beam kept.
    counts = [*tree.levels, slots_CF.size]
    topk = model["config"]["topk"]
    topk = int_list(topk, "--topk") if topk else []
    recall = kept["validation"]["recall"]

    return [
        ("curves", (9, 8), draw_curves, (steps, epochs, kept)),
        ("funnel", (9, 4), draw_funnel, (counts, topk, recall)),
        ("frequency", (9, 7), draw_frequency, (count_L, split, systems)),
        ("coverage", (9, 5), draw_coverage, (first_scores, first_right)),
        ("reliability", (9, 7), draw_reliability, (first_scores, first_right)),
        ("tree", map_size, draw_tree, (names_C, pairs_C, found_C)),
    ]


def run(config: Config) -> None:
    # Imported here: whoever draws nothing need not have it installed.
    try:
        from matplotlib.figure import Figure  # without pyplot: it is drawn without a screen
        from PIL import Image  # comes with matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    out = Path(config.run)
    for name, size, draw, values in pictures_of(out):
        # 1. Draw. matplotlib warns of letters that no font here has.
        figure = Figure(size, dpi=110, layout="constrained")
        path = out / f"plot-{name}.png"
        with warnings.catch_warnings(record=True) as caught:
            title = draw(figure, *values)
            figure.suptitle(title, fontsize=10)
            figure.savefig(path)
        # 2. A palette of 256 colours makes the file a third as big.
        image = Image.open(path).convert("RGB")
        image = image.quantize(256, Image.Quantize.MAXCOVERAGE)
        image.save(path, optimize=True)
        # 3. Say what can be seen, and how many warnings there were.
        line = f"{path}: {title}"
        if caught:
            line += f"; {len(caught)} warnings: {caught[0].message}"
        print(line)


if __name__ == "__main__":
    main(run, Config, __doc__)
