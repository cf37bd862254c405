"""The cascade beside its neighbours: same corpus, encoder, label tree and number of passes.

    python -m variants.compare --run runs/demo
    python -m variants.compare --run runs/seed-0,runs/seed-1,runs/seed-2     mean and spread
    python -m variants.compare --systems one_vs_all,light_xml                only these

Reads    each RUN, in which the cascade has been trained and tested (stages 1, 2, 4, 5)
Writes   RUN/SYSTEM/, such as RUN/light_xml, where there are no predictions yet: what is missing is
         trained
         RUN/SYSTEM/compare.json (of the cascade RUN/compare.json): what each document adds to the
         metrics, costs, settings. The tables are made of these files alone

So a comparison may grow over several sittings, and goes on after an interruption: a system with
such a file, made from the predictions that are there, is neither trained nor measured again.

A new system is one line of SYSTEMS: the folder in RUN, a function that trains and tests it, and the
`build` with which stage 4 loads it.

Metrics are of the test split: P@k, the share of correct labels among the first k; PSP@k, the same
with rare labels weighing more; R@k, the share of a document's labels that are among the first k.

The bootstrap asks how much of a difference may be chance. It is paired: it draws the test documents
anew, the same ones for both systems, each document with its mean over the runs, and prints the
middle 95% of a system minus the cascade. This is about which documents are in the split. What the
seed of training does is the standard deviation.

Costs. Scored: labels scored for a document at most. Training time: the steps as the logs have them,
without validation; of XR-Transformer and ELIAS also what they find and measure between the stages;
of a ranker its model's and its own. Documents per second: measured when a system is added, in turn
with the cascade, and "x" is how many times as fast as the cascade it was then. Parameters: those
that prediction needs here, in millions; of XR-Transformer an encoder for each stage (its authors
keep the last), of a ranker the weights that are left.

Every system keeps the pass that is best on validation, ELIAS that of its last stage. XR-Transformer
keeps its last one: a stage goes on from where the one before has ended.

Shapes   N documents, L labels, k labels predicted, Q metrics
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plumbing.cli import flag, main, natural, positive
from plumbing.errors import UserError
from plumbing.precision import in_turn
from plumbing.store import anew, load_npz, load_pt, write_whole
from tools.compare import COLUMNS as ADDED
from tools.compare import bootstrap, contributions, load_predictions
from variants import (
    alc,
    common,
    elias,
    gandalf,
    inception_xml,
    light_xml,
    one_vs_all,
    ranker,
    unidec,
    xr_transformer,
)
from variants.common import stages

# Settings in which a variant may differ from its cascade.
ITS_OWN = ("topk", "layers", "dropout")


class System(NamedTuple):
    """What it takes to train a system, to load it, and to tell it from a changed cascade."""

    folder: str  # in RUN
    train: Callable[[str], None] | None  # trains and tests it in a run; the cascade itself: None
    build: Callable | None = None  # its model; None: the file says who made it
    on: str = ""  # a ranker: the folder in RUN whose model it ranks for
    its_own: tuple[str, ...] = ITS_OWN
    is_ranker: bool = False
    needs_texts: bool = False  # reads the texts of labels, which not every corpus has


def trains(module: Any, **flags) -> Callable[[str], None]:
    """The function that runs a module of variants/ in a run, with some flags."""

    def train(run: str) -> None:
        module.run(module.Config(run=run, **flags))

    return train


def short_text(system: str) -> System:
    """A system of inception_xml.py."""
    train = trains(inception_xml, system=system)
    build = inception_xml.builder(system)
    return System(system, train, build, its_own=inception_xml.ITS_OWN)


# They are trained in this order: a ranker comes after the model that it is run on.
XR = xr_transformer.NAME
ALC = alc.folder_name(alc.Config())
SYSTEMS = {
    "cascade": System("", None),
    "cascade + ranker": System("ranker", trains(ranker), is_ranker=True),
    "XR-Transformer, neural only": System(XR, trains(xr_transformer), xr_transformer.build),
    "XR-Transformer + ranker": System(f"{XR}/ranker", trains(ranker), on=XR, is_ranker=True),
    "one-vs-all": System(one_vs_all.NAME, trains(one_vs_all), one_vs_all.build),
    "LightXML": System(light_xml.NAME, trains(light_xml), light_xml.build),
    "SyncXML": short_text("sync_xml"),
    "InceptionXML": short_text("inception_xml"),
    "ELIAS": System(elias.NAME, trains(elias), elias.build),
    "Gandalf": System(gandalf.NAME, trains(gandalf), needs_texts=True),
    "UniDEC": System(unidec.NAME, trains(unidec), unidec.build, needs_texts=True),
    "ALC, reconstructed": System(ALC, trains(alc), alc.build, needs_texts=True),
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


# 1. Which systems, and training what is missing.


def chosen(systems: str, has_texts: bool = True) -> list[str]:
    """The names, in the order of SYSTEMS, of the systems that --systems asks for.

    The cascade is always among them: the others are compared with it. So is the system that a
    ranker is run on. UserError where there is no such system. "all" leaves out what needs texts of
    labels where there are none.
    """
    if systems == "all":
        return [name for name, one in SYSTEMS.items() if has_texts or not one.needs_texts]
    folders = systems.split(",")
    known = {one.folder: one.on for one in SYSTEMS.values() if one.train}
    wanted = {""}  # the folder of the cascade is RUN itself
    for folder in folders:
        if folder not in known:
            raise UserError(f"--systems {systems}: choose from {', '.join(known)}, or all")
        wanted.add(folder)
        wanted.add(known[folder])
    return [name for name, system in SYSTEMS.items() if system.folder in wanted]


def check(run: Path, system: System) -> None:
    """UserError unless a system in RUN was made from the cascade that is there now."""
    folder, on = system.folder, system.on
    # 1. Every artifact records the digests of the files that it was made from. A system needs the
    #    same data, and a ranker the very model that it ranks for.
    _, predicted = load_npz(run / folder / "predictions.npz")
    _, data = load_npz(run / "data.npz")
    now = {"data.npz": data["sha256"]}
    if system.is_ranker:
        _, ranked = load_pt(run / on / "model.pt")
        now["model.pt"] = ranked["sha256"]
    is_other = any(predicted["made_from"][name] != digest for name, digest in now.items())
    # 2. The settings: those of the cascade, but for what makes the variant another system.
    cascade, _ = load_pt(run / "model.pt")
    own, _ = load_pt(run / (on or folder) / "model.pt")
    for key, value in own["config"].items():
        if key in system.its_own:
            continue
        if key not in cascade["config"]:
            raise UserError(
                f"{run}/model.pt is older than the setting {key!r}, so it cannot be told whether "
                f"{run / folder} was trained alike; {anew(run / 'model.pt')}"
            )
        if value != cascade["config"][key]:
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


def labels_scored(model: Any) -> int:
    """How many labels a model scores for a document: it says so itself, or it is a cascade."""
    if hasattr(model, "scored"):
        return model.scored
    # All slots of the leaf clusters kept. Without cluster levels that is the root.
    kept = [1, *model.topk][-1]
    slots_per_leaf = model.counts[-1] // model.counts[-2]
    return kept * slots_per_leaf


def parameters_needed(model: Any) -> int:
    """How many weights prediction needs: all of them, unless the model says so itself."""
    if hasattr(model, "parameters_needed"):
        return model.parameters_needed
    return sum(parameter.numel() for parameter in model.parameters())


class Predictor(NamedTuple):
    """A system, ready to predict some test documents."""

    predict: Callable[[], object]
    scored: int  # labels for each document
    parameters: float  # in millions


def predictor(run: str, name: str, documents: int) -> Predictor:
    """A system of a run and its first test documents."""
    # 1. The model. A ranker has none of its own: it ranks what another system finds.
    system = SYSTEMS[name]
    at = Path(run) / (system.on if system.is_ranker else system.folder)
    data = stages.data.load(at)
    model, settings, ranking = ranker.load_model(at, system.build)
    # 2. A few documents are enough to measure a speed. The table of labels known beforehand has a
    #    row for every document, so it is left out.
    test = data.splits["test"]
    few = test.documents(np.arange(min(documents, len(test))))
    data = data._replace(splits={**data.splits, "test": few}, known={})
    # 3. How many labels are scored, and with how many weights.
    scored = labels_scored(model)
    size = parameters_needed(model)
    # 4. What is timed.
    if system.is_ranker:
        predict, n_weights = ranker.load(Path(run) / system.folder)
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
    split = data.splits["test"]
    weight_L = common.label_weights(data)
    member = load_predictions(folder / "predictions.npz", "test", len(split), len(data.names))
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


# 4. A file for each system and run.


def record_path(run: str, name: str) -> Path:
    return Path(run) / SYSTEMS[name].folder / "compare.json"


def read_record(run: str, name: str) -> dict | None:
    """What is known of a system; None if it is not there, or is of other predictions."""
    path = record_path(run, name)
    try:
        record = json.loads(path.read_text())
        _, predicted = load_npz(path.parent / "predictions.npz")
        return record if record["predictions"] == predicted["sha256"] else None
    except (OSError, ValueError, LookupError, UserError):
        return None


def add_system(run: str, name: str, documents: int) -> None:
    """Train a system if it has no predictions yet, measure it, and write its file."""
    system = SYSTEMS[name]
    folder = Path(run) / system.folder
    began = time.perf_counter()
    took = None
    if not (folder / "predictions.npz").exists():
        system.train(str(Path(run) / system.on))
        took = time.perf_counter() - began
    # Predictions of an earlier day may belong to a cascade that has been trained anew since.
    check(Path(run), system)
    # 1. How good it is.
    values, added = measure(folder)
    _, predicted = load_npz(folder / "predictions.npz")
    content, _ = load_pt(Path(run) / (system.on or system.folder) / "model.pt")
    # 2. How fast, in turn with the cascade: if the machine is busy for a while, both suffer alike.
    own = predictor(run, name, documents)
    passes = {name: own.predict}
    if name != "cascade":
        passes["cascade"] = predictor(run, "cascade", documents).predict
    seconds = in_turn(passes, rounds=3)
    n_documents = min(documents, len(stages.data.load(run).splits["test"]))
    record = {
        "system": name,
        "predictions": predicted["sha256"],
        "metrics": values,
        "scored": own.scored,
        "training_seconds": training_seconds(folder),
        "documents_per_second": n_documents / seconds[name],
        "times_the_cascade": seconds["cascade"] / seconds[name],
        "million_parameters": own.parameters,
        "took": took,  # seconds of this command; None: it had been trained before
        "settings": content["config"],
        "added": np.round(added, 9).tolist(),
    }
    # 3. All of it or nothing: this command may be stopped at any moment.
    content = json.dumps(record).encode()
    write_whole(record_path(run, name), lambda file: file.write(content))


def add_missing(runs: list[str], names: list[str], documents: int) -> None:
    """Add all systems that have no file yet, and say how long it may take."""
    for run in runs:
        # The cascade itself is for stages 1 to 5 to make.
        load_npz(Path(run) / "predictions.npz")
        for name in names:
            if read_record(run, name):
                check(Path(run), SYSTEMS[name])
    missing = [(run, name) for run in runs for name in names if not read_record(run, name)]
    for i, (run, name) in enumerate(missing):
        seconds = sum(seconds_of(*one, runs) for one in missing[i:])
        left = f"about {seconds / 60:.0f} min left" if seconds >= 60 else "less than a minute left"
        print(f"\n[{i + 1} of {len(missing)}] {name} in {run}; {left}", flush=True)
        add_system(run, name, documents)


def seconds_of(run: str, name: str, runs: list[str]) -> float:
    """How long a system will take: as long as in another run, or else as the cascade's training."""
    if (Path(run) / SYSTEMS[name].folder / "predictions.npz").exists():
        return 0.0
    for other in runs:
        record = read_record(other, name)
        if record and record["took"]:
            return record["took"]
    return training_seconds(Path(run))


# 5. The tables.


def cells(values, form: str = "8.2f") -> str:
    """The cells of a row."""
    return "".join(f"{value:{form}}" for value in values)


def print_metrics(records: dict[str, list[dict]]) -> dict[str, np.ndarray]:
    """Print metrics and costs; {system: what each document adds to the metrics, mean of runs}.

    `records`: of each system, one for each run.
    """
    n_runs = len(records["cascade"])
    titles = [f"{metric}@{j}" for metric, j in METRICS]
    costs = ["scored", "train s", "doc/s", "x", "M par."]
    header = f"%, mean of {n_runs} runs; +- standard deviation"
    print(f"\n{header:44}" + cells([*titles, *costs], ">8"))
    added = {}
    for name, of_runs in records.items():
        # 1. The means over runs.
        values = np.array([record["metrics"] for record in of_runs], dtype=float)
        added[name] = np.mean([record["added"] for record in of_runs], axis=0)

        def mean(key: str, of_runs: list[dict] = of_runs) -> float:
            return float(np.mean([record[key] for record in of_runs]))

        # 2. Print them beside the costs.
        of_system = f"{mean('scored'):8,.0f}{mean('training_seconds'):8,.0f}"
        of_system += f"{mean('documents_per_second'):8,.0f}{mean('times_the_cascade'):8.2f}"
        of_system += f"{mean('million_parameters'):8,.1f}"
        print(f"{name:44}" + cells(values.mean(axis=0)) + of_system)
        # 3. How far the runs are apart.
        if n_runs > 1:
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
    # 1. Train and measure what is missing, in every run.
    runs = config.run.split(",")
    has_texts = config.systems != "all" or unidec.has_texts(stages.data.load(runs[0]))
    if not has_texts:
        print("the labels have no texts: without the systems that read them")
    names = chosen(config.systems, has_texts)
    add_missing(runs, names, config.documents)
    # 2. The two tables, of the files alone.
    records = {name: [read_record(run, name) for run in runs] for name in names}
    added = print_metrics(records)
    print_differences(added, config.seed)


if __name__ == "__main__":
    main(run, Config, __doc__)
