"""The cascade beside its neighbours: same corpus, encoder, label tree and number of passes.

    python -m variants.compare --run runs/demo
    python -m variants.compare --run runs/seed-0,runs/seed-1,runs/seed-2     mean and spread
    python -m variants.compare --systems one_vs_all,light_xml                only these

Reads    each RUN, in which the cascade has been trained and tested (stages 1, 2, 4, 5)
Writes   RUN/{ranker,xr_transformer,xr_transformer/ranker,one_vs_all,light_xml}/, where there are no
         predictions yet: what is missing is trained

Metrics are of the test split: P@k, the share of correct labels among the first k; PSP@k, the same
with rare labels weighing more; R@k, the share of a document's labels that are among the first k.

The bootstrap asks how much of a difference may be chance. It is paired: it draws the test documents
anew, the same ones for both systems, each document with its mean over the runs, and prints the
middle 95% of a system minus the cascade. This is about which documents are in the split. What the
seed of training does is the standard deviation.

Costs. Scored: labels scored for a document at most. Training time: the steps as the logs have them,
without validation; of XR-Transformer also what it finds between the stages; of a ranker its model's
and its own. Documents per second: the systems of the first run in turn, in this process.
Parameters: those that prediction needs here, in millions; of XR-Transformer an encoder for each
stage (its authors keep the last), of a ranker the weights that are left. All but XR-Transformer
keep the epoch that is best on validation.

Shapes   N documents, L labels, k labels predicted, Q metrics
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.cli import flag, main, natural, positive
from plumbing.errors import UserError
from plumbing.precision import in_turn
from plumbing.store import load_npz, load_pt
from tools.compare import COLUMNS as ADDED
from tools.compare import bootstrap, contributions, load_predictions
from variants import light_xml, one_vs_all, ranker, xr_transformer
from variants.common import stages

# name: (folder in RUN, module, folder in RUN that it is run on)
# They are trained in this order: a ranker comes after the model that it is run on.
SYSTEMS = {
    "cascade": ("", None, ""),
    "cascade + ranker": ("ranker", ranker, ""),
    "XR-Transformer, neural only": (xr_transformer.NAME, xr_transformer, ""),
    "XR-Transformer + ranker": (f"{xr_transformer.NAME}/ranker", ranker, xr_transformer.NAME),
    "one-vs-all": (one_vs_all.NAME, one_vs_all, ""),
    "LightXML": (light_xml.NAME, light_xml, ""),
}
METRICS = [("P", 1), ("P", 3), ("P", 5), ("PSP", 1), ("PSP", 3), ("PSP", 5), ("R", 10), ("R", 100)]
TESTED = ("P@1", "P@5", "PSP@5")  # by the bootstrap


@dataclass(frozen=True)
class Config:
    run: str = flag(
        "runs/demo", "folders of the cascade's runs, with several seeds, separated by commas"
    )
    systems: str = flag(
        "all",
        "folders of the systems to train and compare with the cascade, separated by commas, such "
        "as one_vs_all,xr_transformer/ranker",
    )
    documents: int = flag(1000, "test documents to measure the speed of prediction with", positive)
    seed: int = flag(0, "seed of the bootstrap", natural)


# Settings in which a variant may differ from its cascade.
ITS_OWN = ("topk", "layers", "dropout")


# 1. Which systems, and training what is missing.


def chosen(systems: str) -> list[str]:
    """The names, in the order of SYSTEMS, of the systems that --systems asks for.

    The cascade is always among them: the others are compared with it. So is the system that a
    ranker is run on. UserError where there is no such system.
    """
    if systems == "all":
        return list(SYSTEMS)
    folders = systems.split(",")
    known = {folder: on for folder, module, on in SYSTEMS.values() if module is not None}
    wanted = {""}  # the folder of the cascade is RUN itself
    for folder in folders:
        if folder not in known:
            raise UserError(f"--systems {systems}: choose from {', '.join(known)}, or all")
        wanted.add(folder)
        wanted.add(known[folder])
    return [name for name, (folder, *_) in SYSTEMS.items() if folder in wanted]


def train_missing(run: str, names: list[str]) -> None:
    """Train the systems that have no predictions in RUN yet; check those that have some."""
    # The cascade itself is for stages 1 to 5 to make.
    load_npz(Path(run) / "predictions.npz")
    for name in names:
        folder, module, on = SYSTEMS[name]
        if not (Path(run) / folder / "predictions.npz").exists():
            print(f"\n{name} in {run}", flush=True)
            module.run(module.Config(run=str(Path(run) / on)))
        # Predictions of an earlier day may belong to a cascade that has been trained anew since.
        check(Path(run), folder, on)


def check(run: Path, folder: str, on: str) -> None:
    """UserError unless a system in RUN was made from the cascade that is there now."""
    # 1. Every artifact records the digests of the files that it was made from. A system needs the
    #    same data, and a ranker the very model that it ranks for.
    _, predicted = load_npz(run / folder / "predictions.npz")
    _, data = load_npz(run / "data.npz")
    now = {"data.npz": data["sha256"]}
    if "ranker" in folder:
        _, ranked = load_pt(run / on / "model.pt")
        now["model.pt"] = ranked["sha256"]
    is_other = any(predicted["made_from"][name] != digest for name, digest in now.items())
    # 2. The settings: those of the cascade, but for what makes the variant another system.
    cascade, _ = load_pt(run / "model.pt")
    own, _ = load_pt(run / (on or folder) / "model.pt")
    for key, value in own["config"].items():
        if key not in ITS_OWN and value != cascade["config"][key]:
            is_other = True
    if is_other:
        raise UserError(
            f"{run / folder} was made from other data, or beside a cascade with other settings or "
            f"weights, than those in {run}; delete it, and it is made again"
        )


# 2. What a system costs.


def training_seconds(folder: Path) -> float:
    """What predictions.npz of a variant says, or the steps of log.jsonl."""
    _, meta = load_npz(folder / "predictions.npz")
    # 1. XR-Transformer and the rankers took the time themselves. A ranker needs its model first.
    if "seconds" in meta:
        seconds = meta["seconds"]
        if "ranker" in folder.name:
            seconds += training_seconds(folder.parent)
        return seconds
    # 2. The others were trained by stage 4, whose log has a record of every few steps: how far they
    #    went, and how fast.
    lines = (folder / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record["step"] for record in records if "loss" in record]
    rates = [record["batches_per_s"] for record in records if "loss" in record]
    # 3. The batches since the record before, over their speed. Several batches may share a step.
    content, _ = load_pt(folder / "model.pt")
    batches = content["config"]["accumulate"] * np.diff(steps, prepend=0)
    return float((batches / rates).sum())


class Predictor(NamedTuple):
    """A system, ready to predict some test documents."""

    predict: Callable[[], object]
    scored: int  # labels for each document
    parameters: float  # in millions


def predictor(run: str, name: str, documents: int) -> Predictor:
    """A system of a run and its first test documents."""
    # 1. The model. A ranker has none of its own: it ranks what another system finds.
    folder, module, on = SYSTEMS[name]
    is_ranker = module is ranker
    at = Path(run) / (on if is_ranker else folder)
    data = stages.data.load(at)
    model, settings, ranking = ranker.load_model(at, getattr(module, "build", None))
    # 2. A few documents are enough to measure a speed. The table of labels known beforehand has a
    #    row for every document, so it is left out.
    test = data.splits["test"]
    few = test.documents(np.arange(min(documents, len(test))))
    data = data._replace(splits={**data.splits, "test": few}, known={})
    # 3. How many labels are scored: all slots of the leaf clusters kept. Without cluster levels
    #    that is the root.
    kept = [1, *model.topk][-1]
    slots_per_leaf = model.counts[-1] // model.counts[-2]
    scored = kept * slots_per_leaf
    size = sum(parameter.numel() for parameter in model.parameters())
    # 4. What is timed.
    if is_ranker:
        predict, n_weights = ranker.load(Path(run) / folder)
        again = partial(predict, model, data, settings, ranking)
        return Predictor(again, scored, (size + n_weights) / 1e6)

    def one(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        labels, _ = model.predict(batch, k, ranking)
        return {"labels": labels.cpu().numpy()}

    def predict() -> object:
        batch_size = 2 * settings.batch_size
        return stages.train.predict_split(
            model, data, "test", settings.max_len, batch_size, one, 100
        )

    return Predictor(predict, scored, size / 1e6)


# 3. How good it is.


def measure(folder: Path) -> tuple[list[float], np.ndarray]:
    """(METRICS in percent, what each document adds to them) of predictions.npz."""
    data = stages.data.load(folder)
    train = data.splits["train"]
    split = data.splits["test"]
    n_labels = len(data.names)
    # How rare a label is, is counted on the training documents.
    count_L = np.bincount(train.labels, minlength=n_labels)
    weight_L = stages.eval.inverse_propensity(count_L, len(train))
    member = load_predictions(folder / "predictions.npz", "test", len(split), n_labels)
    labels_Nk = member.labels_Nk
    found = stages.eval.metrics(labels_Nk, split, weight_L)
    # A metric at more labels than were predicted is not known.
    k = labels_Nk.shape[1]
    values = []
    for name, j in METRICS:
        values.append(float(found[name][j - 1]) if j <= k else np.nan)
    return values, contributions(labels_Nk, split, weight_L)


def minus_cascade(system: np.ndarray, cascade: np.ndarray, seed: int) -> np.ndarray:
    """(3, Q): 2.5%, median and 97.5% of a system minus the cascade, by the bootstrap."""
    # Every metric is a sum over documents, divided by something that both systems share. So the
    # difference of two metrics is the metric of the documents' differences. The last column is what
    # PSP is divided by, the best possible. It stays as it is.
    gap = (system - cascade)[:, :-1]
    best_psp = system[:, -1]
    drawn = bootstrap(np.column_stack([gap, best_psp]), seed)
    return np.quantile(drawn, (0.025, 0.5, 0.975), axis=0)


# 4. The tables.


def cells(values, form: str = "8.2f") -> str:
    """The cells of a row."""
    return "".join(f"{value:{form}}" for value in values)


def print_metrics(
    runs: list[str],
    systems: dict[str, Predictor],
    seconds: dict[str, float],
    n_documents: int,
) -> dict[str, np.ndarray]:
    """Print metrics and costs; {system: what each document adds to the metrics, mean of runs}.

    `seconds` is what each system took for `n_documents`.
    """
    titles = [f"{metric}@{j}" for metric, j in METRICS]
    costs = ["scored", "train s", "doc/s", "M par."]
    header = f"%, mean of {len(runs)} runs; +- standard deviation"
    print(f"\n{header:44}" + cells([*titles, *costs], ">8"))
    added = {}
    for name, system in systems.items():
        # 1. Measure each run, and take the means.
        folder, *_ = SYSTEMS[name]
        measured = [measure(Path(one) / folder) for one in runs]
        values = [row for row, _ in measured]
        added[name] = np.mean([part for _, part in measured], axis=0)
        train_seconds = np.mean([training_seconds(Path(one) / folder) for one in runs])
        # 2. Print them beside the costs.
        speed = n_documents / seconds[name]
        of_system = (
            f"{system.scored:8,.0f}{train_seconds:8,.0f}{speed:8,.0f}{system.parameters:8,.1f}"
        )
        print(f"{name:44}" + cells(np.mean(values, axis=0)) + of_system)
        # 3. How far the runs are apart.
        if len(runs) > 1:
            print(f"{'  +-':44}" + cells(np.std(values, axis=0, ddof=1)))
    return added


def print_differences(added: dict[str, np.ndarray], seed: int) -> None:
    """Print the bootstrap of every system against the cascade."""
    header = "minus the cascade: 95% from, median, 95% to"
    print(f"\n{header:44}" + cells(TESTED, "^24"))
    # Where the metrics that are tested stand among those of tools.compare.
    titles = [f"{metric}@{j}" for metric, j in ADDED]
    columns = [titles.index(title) for title in TESTED]
    for name in added:
        if name == "cascade":
            continue
        quantiles = minus_cascade(added[name], added["cascade"], seed)
        # Three numbers for each metric.
        row = []
        for column in columns:
            row.extend(quantiles[:, column])
        print(f"{name:44}" + cells(row))


def run(config: Config) -> None:
    # 1. Train what is missing, in every run.
    runs = config.run.split(",")
    names = chosen(config.systems)
    for one in runs:
        train_missing(one, names)
    # 2. The speeds, all systems in turn: if the machine is busy for a while, all suffer alike.
    systems = {name: predictor(runs[0], name, config.documents) for name in names}
    passes = {name: system.predict for name, system in systems.items()}
    seconds = in_turn(passes, rounds=3)
    n_documents = min(config.documents, len(stages.data.load(runs[0]).splits["test"]))
    # 3. The two tables.
    added = print_metrics(runs, systems, seconds, n_documents)
    print_differences(added, config.seed)


if __name__ == "__main__":
    main(run, Config, __doc__)
