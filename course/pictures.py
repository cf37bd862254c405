"""The pictures of the lecture, drawn from a run.

    python -m course.pictures                                into course/pictures
    python -m course.pictures --run runs/mine --out FOLDER

Reads    RUN/data.npz, RUN/tree.npz, RUN/model.pt
Writes   OUT/funnel.gif         a document goes down the tree, level by level: what was scored, what
                                was kept, and where its correct labels are
         OUT/tree.png           the tree as a map, with the names of frequent labels
         OUT/tail.png           how many labels have a document, five, or fifty, as the corpus grows
         OUT/recall-cost.png    what a beam finds, against what it scores

They are made for a lecture hall: few words, large letters, colours that colour-blind readers can
tell apart. tools/plots.py draws more about a run, for a reader at a desk.

Needs matplotlib.
Shapes   N documents, L labels, C clusters, F children of each, K clusters kept, S slots,
         X places of a strip from left to right
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from plumbing.cli import flag, main
from plumbing.errors import UserError
from plumbing.stages import load_stages
from tools.plots import names_by_cluster, shortened, treemap

stages = load_stages()

FIRST = 5  # predicted labels that a reader looks at
MAPPED = 16  # clusters on the map: more would have no room for names
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
LETTERS = 15  # points
SECONDS = 2.5  # that a picture of the funnel stands
PLACES = 900  # of a strip: about one for each pixel


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/course", "folder of a run's artifacts")
    out: str = flag("course/pictures", "folder for the pictures")


# 1. A document goes down the tree.


class Descent(NamedTuple):
    """What the beam did with one document."""

    text: str
    correct: list[str]  # names of its labels
    slots: np.ndarray  # the slot of each
    scored: list[np.ndarray]  # nodes that each level scored
    kept: list[np.ndarray]  # nodes that each cluster level kept
    counts: list[int]  # nodes of each level, the slots last
    best: list[str]  # names of the first labels found
    n_lost: list[int]  # correct labels that cannot be reached any more, after each cluster level


def descent_of(model: Any, data: Any, max_len: int, document: int, ranking: str) -> Descent:
    """Let one test document go down."""
    split = data.splits["test"]
    batch = data.batch("test", np.array([document]), max_len)
    tokenizer = Tokenizer.from_buffer(data.tokenizer)
    ids = split.ids[split.offsets[document] : split.offsets[document + 1]]
    labels = split.labels[split.label_offsets[document] : split.label_offsets[document + 1]]
    with torch.no_grad():
        levels = list(model.descend(model.features(batch), batch, teacher=False))
        found, _ = model.predict(batch, FIRST, ranking)
    # 1. The nodes that a level scores are the children of those that the level above kept.
    scored = []
    kept = []
    for t, level in enumerate(levels):
        fan = level.logits_BKF.shape[2]
        scored.append(stages.tree.expand(level.parents_BK, fan)[0].numpy())
        if t > 0:
            kept.append(level.parents_BK[0].numpy())
    # 2. A correct label is lost where the node above it was not kept.
    n_lost = []
    label_P = torch.from_numpy(labels).long()
    for t, nodes in enumerate(kept):
        n_lost.append(int((~np.isin(model.nodes(label_P, t).numpy(), nodes)).sum()))
    return Descent(
        # The parts of a word begin with ##.
        text=tokenizer.decode(ids.tolist()).replace(" ##", ""),
        correct=[data.names[label] for label in labels],
        slots=model.label_to_slot[label_P].numpy(),
        scored=scored,
        kept=kept,
        counts=model.counts[1:],
        best=[data.names[label] for label in found[0].tolist() if label >= 0],
        n_lost=n_lost,
    )


def telling(model: Any, data: Any, max_len: int, ranking: str) -> Descent:
    """The first test document that shows most: some of its labels are found, and some are lost."""
    split = data.splits["test"]
    n_labels_N = np.diff(split.label_offsets)
    for document in np.flatnonzero((n_labels_N >= 3) & (n_labels_N <= 6)):
        descent = descent_of(model, data, max_len, document, ranking)
        is_found = set(descent.best) & set(descent.correct)
        if is_found and descent.n_lost[-1]:
            return descent
    return descent_of(model, data, max_len, int(n_labels_N.argmax()), ranking)


def strip(n_nodes: int, scored: np.ndarray, kept: np.ndarray | None) -> np.ndarray:
    """(X,) 0 where a level scored nothing, 1 where it scored, 2 where it kept."""
    state_X = np.zeros(PLACES)
    for nodes, value in ((scored, 1), (kept, 2)):
        if nodes is None:
            continue
        # A node is narrower than a place, or wider: it takes all places that it touches.
        first = nodes * PLACES // n_nodes
        last = np.maximum(first + 1, (nodes + 1) * PLACES // n_nodes)
        for start, end in zip(first, last, strict=True):
            state_X[start:end] = value
    return state_X


def draw_funnel(figure: Any, descent: Descent, shown: int) -> None:
    """The levels down to number `shown`; 0 shows the document alone."""
    from matplotlib.colors import ListedColormap

    n_levels = len(descent.counts)
    head, *axes = figure.subplots(n_levels + 1, height_ratios=[1.7, *[1] * n_levels])
    head.axis("off")
    text = textwrap.fill(textwrap.shorten(descent.text, 150, placeholder=" ..."), 76)
    correct = textwrap.shorten("correct: " + ", ".join(descent.correct), 76, placeholder=" ...")
    legend = "grey: scored    blue: kept    ▼ a correct label within reach    ✕ a lost one"
    head.text(0, 1, text, fontsize=LETTERS, va="top", parse_math=False)
    head.text(0, 0.42, correct, fontsize=LETTERS, va="top", color=GREEN, parse_math=False)
    head.text(0, 0.12, legend, fontsize=LETTERS - 2, va="top")
    colors = ListedColormap(["#EEEEEE", "#AAAAAA", BLUE])
    for t, axis in enumerate(axes):
        is_last = t == n_levels - 1
        axis.set(xlim=(0, 1), ylim=(0, 1.5), xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if t >= shown:
            axis.set_title(" ", fontsize=LETTERS, loc="left")
            axis.imshow([np.zeros(PLACES)], cmap=colors, vmin=0, vmax=2, aspect="auto",
                        extent=(0, 1, 0, 1))  # fmt: skip
            axis.set(ylim=(0, 1.5))
            continue
        # 1. What was scored is grey, what was kept blue.
        kept = None if is_last else descent.kept[t]
        state_X = strip(descent.counts[t], descent.scored[t], kept)
        axis.imshow([state_X], cmap=colors, vmin=0, vmax=2, aspect="auto", extent=(0, 1, 0, 1))
        axis.set(ylim=(0, 1.5))
        # 2. Where the correct labels are: still within reach, or lost.
        nodes = descent.slots * descent.counts[t] // descent.counts[-1]
        alive = np.isin(nodes, descent.scored[t] if is_last else kept)
        place = (descent.slots + 0.5) / descent.counts[-1]
        axis.scatter(place[alive], np.full(alive.sum(), 1.22), s=130, marker="v", color=GREEN)
        axis.scatter(place[~alive], np.full((~alive).sum(), 1.22), s=110, marker="x",
                     color=ORANGE, linewidths=3)  # fmt: skip
        # 3. In words.
        what = "labels" if is_last else f"level {t + 1}"
        title = f"{what}: {len(descent.scored[t]):,} of {descent.counts[t]:,} scored"
        if not is_last:
            title += f", {len(kept):,} kept"
        lost = (~alive).sum()
        title += f"; {alive.sum()} of {len(alive)} correct ones within reach" if lost else ""
        axis.set_title(title, fontsize=LETTERS, loc="left")
        if is_last:
            right = [f"{name} ✓" if name in descent.correct else name for name in descent.best]
            first = textwrap.fill("first five: " + ", ".join(right), 84)
            axis.set_xlabel(first, fontsize=LETTERS - 2, loc="left", parse_math=False)


# 2. The tree as a map.


def draw_tree(figure: Any, slot_to_label: np.ndarray, names: list[str], count_L: np.ndarray) -> str:
    """Some clusters as rectangles, whose areas are the documents of their labels."""
    axis = figure.subplots(subplot_kw={"xticks": [], "yticks": []})
    axis.spines[:].set_visible(False)
    slots_CF = slot_to_label.reshape(MAPPED, -1)
    pairs_C = np.array([count_L[slots[slots >= 0]].sum() for slots in slots_CF])
    names_C = names_by_cluster(slots_CF, names, count_L)
    figure.draw_without_rendering()  # from here on the axis has its size
    width, height = axis.get_window_extent().size * 72 / figure.dpi  # in points
    rectangles = treemap(pairs_C, 0, 0, width, height)
    for i, (x, y, w, h) in enumerate(rectangles):
        # Neighbours in the tree have colours that are near to each other.
        share = i / (MAPPED - 1)
        color = (0.80 - 0.3 * share, 0.88, 0.78 + 0.2 * share)
        axis.bar(x, h, w, y, align="edge", color=color, edgecolor="white", linewidth=3)
        n_lines = int(h / (LETTERS * 1.35))
        n_letters = int(w / (LETTERS * 0.62))
        if n_letters < 6:
            continue
        text = "\n".join(shortened(name, n_letters) for name in names_C[i][: max(1, n_lines)])
        axis.text(x + 6, y + 5, text, fontsize=LETTERS, va="top", parse_math=False)
    axis.set(xlim=(0, width), ylim=(height, 0))
    return f"{MAPPED} parts of the tree; the larger, the more documents; frequent labels by name"


# 3. The growth of the tail.


def draw_tail(figure: Any, train: Any, n_labels: int) -> str:
    """Labels with at least so many documents, as documents come in."""
    axis = figure.subplots()
    n_documents = len(train)
    # Documents in random order: those of a corpus may be sorted.
    order = np.random.default_rng(0).permutation(n_documents)
    doc_P = np.repeat(np.argsort(order), np.diff(train.label_offsets))
    first = np.argsort(doc_P, kind="stable")
    label_P = train.labels[first]
    doc_P = doc_P[first]
    ends = np.linspace(0, n_documents, 41).astype(int)
    counted = {1: [], 5: [], 50: []}
    for end in ends:
        count_L = np.bincount(label_P[: np.searchsorted(doc_P, end)], minlength=n_labels)
        for limit, values in counted.items():
            values.append(int((count_L >= limit).sum()))
    colors = {1: BLUE, 5: ORANGE, 50: GREEN}
    for limit, values in counted.items():
        axis.plot(ends, values, color=colors[limit], linewidth=3)
        said = "a document" if limit == 1 else f"{limit} or more"
        axis.annotate(
            f"{said}: {values[-1]:,}", (ends[-1], values[-1]), xytext=(8, 0),
            textcoords="offset points", fontsize=LETTERS, color=colors[limit], va="center",
        )  # fmt: skip
    axis.set_xlabel("training documents", fontsize=LETTERS)
    axis.set_ylabel("labels", fontsize=LETTERS)
    axis.tick_params(labelsize=LETTERS - 2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.locator_params(nbins=5)
    axis.spines[["top", "right"]].set_visible(False)
    return "new labels never stop coming, and most stay rare"


# 4. Recall against cost.


def beams_of(counts: list[int]) -> list[list[int]]:
    """Beams from a narrow one to one that keeps everything, each twice as wide as the one before.

    counts: nodes per level, the root first and the slots last.
    """
    beams = []
    width = 4
    while not beams or beams[-1] != counts[1:-1]:
        # The next level keeps at least as much as its share of the widest.
        beams.append([min(count, width * 2**t) for t, count in enumerate(counts[1:-1])])
        width *= 2
    return beams


def measure_beams(model: Any, data: Any, trained: Any, ranking: str) -> list[tuple[int, ...]]:
    """(nodes scored, recall of the shortlist, P@5, R@100), in percent, for each beam."""
    split = data.splits["test"]
    n_labels_N = np.diff(split.label_offsets)
    has_labels_N = n_labels_N > 0
    as_trained = model.topk
    points = []

    def find(batch: Any, k: int) -> dict[str, np.ndarray]:
        return stages.train.predict_rankings(model, batch, k)

    for topk in beams_of(model.counts):
        model.topk = topk
        found = stages.train.predict_split(model, data, "test", trained.max_len, 128, find, 100)
        fans = np.divide(model.counts[1:], model.counts[:-1])
        scored = int((np.array([1, *topk]) * fans).sum())
        recall = 100 * found[f"kept {len(topk) - 1}"].sum() / len(split.labels)
        hit_Nk = stages.train.hits(found[f"labels {ranking}"], split)[has_labels_N]
        precision_k = 100 * stages.eval.precision(hit_Nk)
        recall_k = 100 * stages.eval.recall(hit_Nk, n_labels_N[has_labels_N])
        points.append((scored, recall, precision_k[4], recall_k[99]))
    model.topk = as_trained
    return points


def draw_recall_cost(figure: Any, points: list[tuple[int, ...]]) -> str:
    """Three curves over the nodes scored."""
    axis = figure.subplots()
    scored, *curves = np.array(points).T
    named = {"recall of the shortlist": BLUE, "P@5": ORANGE, "R@100": GREEN}
    for (name, color), values in zip(named.items(), curves, strict=True):
        axis.plot(scored, values, "o-", color=color, linewidth=3, markersize=8)
        axis.annotate(
            name, (scored[-1], values[-1]), xytext=(10, 0), textcoords="offset points",
            fontsize=LETTERS, color=color, va="center",
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlabel("nodes scored for a document", fontsize=LETTERS)
    axis.set_ylabel("%", fontsize=LETTERS)
    axis.set(ylim=(0, 105))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.tick_params(labelsize=LETTERS - 2)
    axis.spines[["top", "right"]].set_visible(False)
    return "a wider beam reaches more labels; the first five hardly notice"


# 5. All of them.


def save_small(figure: Any, path: Path, title: str) -> None:
    """Write a picture of 64 colours at most, with its title."""
    from PIL import Image  # comes with matplotlib

    if title:
        figure.suptitle(title, fontsize=LETTERS + 1)
    figure.savefig(path)
    image = Image.open(path).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE)
    image.save(path, optimize=True)


def save_funnel(figure_of: Any, path: Path, descent: Descent) -> None:
    """One picture for each level that comes in, as an animation that begins anew at its end."""
    from PIL import Image

    frames = []
    for shown in range(len(descent.counts) + 1):
        figure = figure_of()
        draw_funnel(figure, descent, shown)
        figure.canvas.draw()
        rgba = np.asarray(figure.canvas.buffer_rgba())
        frames.append(Image.fromarray(rgba[..., :3]).quantize(128))
    durations = [int(1000 * SECONDS)] * len(frames)
    durations[-1] *= 2
    first, *others = frames
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)


def run(config: Config) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a screen
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None

    def figure_of(size: tuple[float, float] = (10.5, 6)) -> Figure:
        figure = Figure(size, dpi=90, layout="constrained")
        FigureCanvasAgg(figure)
        return figure

    # 1. The run.
    data = stages.data.load(config.run)
    tree = stages.tree.load(config.run)
    if not tree.levels or tree.levels[0] < MAPPED:
        raise UserError(
            f"{config.run}: the tree has {tree.levels} clusters, the pictures need a first level "
            f"of at least {MAPPED}; run 02_label_tree.py with --levels 16,128"
        )
    model, trained, ranking = stages.train.load(config.run, data)
    model.eval()
    train = data.splits["train"]
    count_L = np.bincount(train.labels, minlength=len(data.names))
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)

    # 2. The funnel.
    descent = telling(model, data, trained.max_len, ranking)
    save_funnel(figure_of, out / "funnel.gif", descent)
    # 3. The others. Each function returns its title.
    figure = figure_of()
    title = draw_tree(figure, tree.slot_to_label, data.names, count_L)
    save_small(figure, out / "tree.png", title)
    figure = figure_of()
    title = draw_tail(figure, train, len(data.names))
    save_small(figure, out / "tail.png", title)
    figure = figure_of()
    title = draw_recall_cost(figure, measure_beams(model, data, trained, ranking))
    save_small(figure, out / "recall-cost.png", title)
    for path in sorted(out.iterdir()):
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(run, Config, __doc__)
