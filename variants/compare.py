"""The cascade beside its neighbours: same corpus, encoder, label tree and number of passes.

    python -m variants.compare --run runs/demo
    python -m variants.compare --run runs/seed-0,runs/seed-1,runs/seed-2     mean and spread

Reads    each RUN, in which the cascade has been trained and tested (stages 1, 2, 4, 5)
Writes   RUN/{ranker,xr_transformer,xr_transformer/ranker,one_vs_all,light_xml}/, where there are no
         predictions yet: what is missing is trained

Metrics are of the test split. The paired bootstrap draws the test documents anew, the same ones for
both systems, each document with its mean over the runs, and prints the middle 95% of a system minus
the cascade. This is about which documents are in the split. What the seed of training does is the
standard deviation.

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
    documents: int = flag(1000, "test documents to measure the speed of prediction with", positive)
    seed: int = flag(0, "seed of the bootstrap", natural)


# Settings in which a variant may differ from its cascade.
ITS_OWN = ("topk", "layers", "dropout")


# 1. Training what is missing.


def train_missing(run: str) -> None:
    """Train the systems that have no predictions in RUN yet; check those that have some."""
    load_npz(Path(run) / "predictions.npz")  # the cascade itself is for stages 1 to 5 to make
    for name, (folder, module, on) in SYSTEMS.items():
        if not (Path(run) / folder / "predictions.npz").exists():
            print(f"\n{name} in {run}", flush=True)
            module.run(module.Config(run=str(Path(run) / on)))
        check(Path(run), folder, on)


def check(run: Path, folder: str, on: str) -> None:
    """UserError unless a system in RUN was made from the cascade that is there now."""
    made_from = load_npz(run / folder / "predictions.npz")[1]["made_from"]
    now = {"data.npz": load_npz(run / "data.npz")[1]["sha256"]}
    if "ranker" in folder:
        now["model.pt"] = load_pt(run / on / "model.pt")[1]["sha256"]
    is_other = any(made_from[name] != digest for name, digest in now.items())
    of_cascade = load_pt(run / "model.pt")[0]["config"]
    own = load_pt(run / (on or folder) / "model.pt")[0]["config"]
    for key, value in own.items():
        if key not in ITS_OWN and value != of_cascade[key]:
            is_other = True
    if is_other:
        raise UserError(
            f"{run / folder} was made from other data, or beside a cascade with other settings or "
            f"weights, than those in {run}; delete it, and it is made again"
        )


# 2. What a system costs.


def training_seconds(folder: Path) -> float:
    """What predictions.npz of a variant says, or the steps of log.jsonl."""
    meta = load_npz(folder / "predictions.npz")[1]
    if "seconds" in meta:
        of_its_model = training_seconds(folder.parent) if "ranker" in folder.name else 0
        return meta["seconds"] + of_its_model
    lines = (folder / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record["step"] for record in records if "loss" in record]
    rates = [record["batches_per_s"] for record in records if "loss" in record]
    accumulate = load_pt(folder / "model.pt")[0]["config"]["accumulate"]
    batches = accumulate * np.diff(steps, prepend=0)
    return float((batches / rates).sum())


class Predictor(NamedTuple):
    """A system, ready to predict some test documents."""

    predict: Callable[[], object]
    scored: int  # labels for each document
    parameters: float  # in millions


def predictor(run: str, name: str, documents: int) -> Predictor:
    """A system of a run and its first test documents."""
    folder, module, on = SYSTEMS[name]
    at = Path(run) / (on if module is ranker else folder)
    data = stages.data.load(at)
    model, settings, ranking = ranker.load_model(at, getattr(module, "build", None))
    data = data._replace(
        splits={**data.splits, "test": first(data.splits["test"], documents)}, known={}
    )
    kept = [1, *model.topk][-1]
    slots_per_leaf = model.counts[-1] // model.counts[-2]
    scored = kept * slots_per_leaf
    size = sum(parameter.numel() for parameter in model.parameters())
    if module is ranker:
        predict, n_weights = ranker.load(Path(run) / folder)
        again = partial(predict, model, data, settings, ranking)
        return Predictor(again, scored, (size + n_weights) / 1e6)

    def one(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        return {"labels": model.predict(batch, k, ranking)[0].cpu().numpy()}

    def predict() -> object:
        batch_size = 2 * settings.batch_size
        return stages.train.predict_split(
            model, data, "test", settings.max_len, batch_size, one, 100
        )

    return Predictor(predict, scored, size / 1e6)


def first(split: stages.data.Split, n: int) -> stages.data.Split:
    """The first n documents of a split."""
    offsets = split.offsets[: n + 1]
    label_offsets = split.label_offsets[: n + 1]
    return stages.data.Split(
        split.ids[: offsets[-1]], offsets, split.labels[: label_offsets[-1]], label_offsets
    )


# 3. How good it is.


def measure(folder: Path) -> tuple[list[float], np.ndarray]:
    """(METRICS in percent, what each document adds to them) of predictions.npz."""
    data = stages.data.load(folder)
    train = data.splits["train"]
    split = data.splits["test"]
    n_labels = len(data.names)
    count_L = np.bincount(train.labels, minlength=n_labels)
    weight_L = stages.eval.inverse_propensity(count_L, len(train))
    member = load_predictions(folder / "predictions.npz", "test", len(split), n_labels)
    labels_Nk = member.labels_Nk
    found = stages.eval.metrics(labels_Nk, split, weight_L)
    values = []
    for name, j in METRICS:
        values.append(float(found[name][j - 1]) if j <= labels_Nk.shape[1] else np.nan)
    return values, contributions(labels_Nk, split, weight_L)


def minus_cascade(system: np.ndarray, cascade: np.ndarray, seed: int) -> np.ndarray:
    """(3, Q): 2.5%, median and 97.5% of a system minus the cascade, by the bootstrap."""
    gap = (system - cascade)[:, :-1]
    best_psp = system[:, -1]
    drawn = bootstrap(np.column_stack([gap, best_psp]), seed)
    return np.quantile(drawn, (0.025, 0.5, 0.975), axis=0)


# 4. The tables.


def cells(values, form: str = "8.2f") -> str:
    return "".join(f"{value:{form}}" for value in values)


def run(config: Config) -> None:
    runs = config.run.split(",")
    for one in runs:
        train_missing(one)

    # The speeds, all systems in turn.
    systems = {name: predictor(runs[0], name, config.documents) for name in SYSTEMS}
    passes = {name: system.predict for name, system in systems.items()}
    seconds = in_turn(passes, rounds=3)
    n_documents = min(config.documents, len(stages.data.load(runs[0]).splits["test"]))

    titles = [f"{metric}@{j}" for metric, j in METRICS] + ["scored", "train s", "doc/s", "M par."]
    header = f"%, mean of {len(runs)} runs; +- standard deviation"
    print(f"\n{header:44}" + cells(titles, ">8"))
    added = {}
    for name, (folder, *_) in SYSTEMS.items():
        measured = [measure(Path(one) / folder) for one in runs]
        values = [row for row, _ in measured]
        added[name] = np.mean([part for _, part in measured], axis=0)
        took = np.mean([training_seconds(Path(one) / folder) for one in runs])
        costs = (
            f"{systems[name].scored:8,.0f}{took:8,.0f}{n_documents / seconds[name]:8,.0f}"
            f"{systems[name].parameters:8,.1f}"
        )
        print(f"{name:44}" + cells(np.mean(values, axis=0)) + costs)
        if len(runs) > 1:
            print(f"{'  +-':44}" + cells(np.std(values, axis=0, ddof=1)))

    header = "minus the cascade: 95% from, median, 95% to"
    print(f"\n{header:44}" + cells(TESTED, "^24"))
    columns = [[f"{metric}@{j}" for metric, j in ADDED].index(title) for title in TESTED]
    for name in SYSTEMS:
        if name != "cascade":
            quantiles = minus_cascade(added[name], added["cascade"], config.seed)
            row = [q for column in columns for q in quantiles[:, column]]
            print(f"{name:44}" + cells(row))


if __name__ == "__main__":
    main(run, Config, __doc__)
