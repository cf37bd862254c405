"""The cascade beside its neighbours: same corpus, encoder, label tree and number of passes. Trains
what is missing.

    python -m variants.compare --run runs/demo
    python -m variants.compare --run runs/seed-0,runs/seed-1,runs/seed-2        mean and standard deviation over seeds

Reads    each RUN, in which the cascade has been trained and tested (stages 1, 2, 4, 5)
Writes   RUN/{ranker,xr_transformer,xr_transformer/ranker,one_vs_all,light_xml}/, where there are no predictions yet

Metrics are of the test split. The paired bootstrap draws the test documents anew, the same ones for
the two systems, each document with its mean over the runs: the middle 95% of a system minus the
cascade. What it says is about which documents are in the split; what the seed of training does is
the standard deviation. Scored: labels scored for a document at most. Training time: the steps as
the logs have them, without validation; of XR-Transformer also what it finds between the stages; of
a ranker its model's and its own. Documents per second: the systems of the first run in turn, in
this process. Parameters: those that prediction needs here, in millions; of XR-Transformer an
encoder for each stage (its authors keep the last), of a ranker the weights that are left. All but
XR-Transformer keep the epoch that is best on validation.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    run: str = flag("runs/demo", "folders of the cascade's runs, with several seeds, separated by commas")
    documents: int = flag(1000, "test documents to measure the speed of prediction with", positive)
    seed: int = flag(0, "seed of the bootstrap", natural)


def training_seconds(folder: Path) -> float:
    """What predictions.npz of a variant says, or the steps of log.jsonl."""
    meta = load_npz(folder / "predictions.npz")[1]
    if "seconds" in meta:
        return meta["seconds"] + (training_seconds(folder.parent) if "ranker" in folder.name else 0)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps, rates = zip(*((r["step"], r["batches_per_s"]) for r in records if "loss" in r), strict=True)
    batches = load_pt(folder / "model.pt")[0]["config"]["accumulate"] * np.diff(steps, prepend=0)
    return float((batches / rates).sum())


def check(run: Path, folder: str, on: str) -> None:
    """UserError unless a system in RUN was made from the cascade that is there now."""
    same = {"data.npz": load_npz(run / "data.npz")[1]["sha256"]}
    meta = load_npz(run / folder / "predictions.npz")[1]
    if "ranker" in folder:
        same["model.pt"] = load_pt(run / on / "model.pt")[1]["sha256"]
    settings = [load_pt(run / place / "model.pt")[0]["config"] for place in ("", on or folder)]
    if any(meta["made_from"][name] != digest for name, digest in same.items()) or any(
            one[key] != settings[0][key] for one in settings for key in one
            if key not in ("topk", "layers", "dropout")):
        raise UserError(f"{run / folder} was made from other data, or beside a cascade with other settings or weights, "
                        f"than those in {run}; delete it, and it is made again")


def predictor(run: str, name: str, documents: int) -> tuple[Callable[[], object], int, float]:
    """(a pass of a system over some test documents, labels scored for each, its parameters in millions)."""
    folder, module, on = SYSTEMS[name]
    at = Path(run) / (on if module is ranker else folder)
    data, (model, settings, ranking) = stages.data.load(at), ranker.load_model(at, getattr(module, "build", None))
    split, size = data.splits["test"], sum(parameter.numel() for parameter in model.parameters())
    scored = [1, *model.topk][-1] * (model.counts[-1] // model.counts[-2])
    ends = [offsets[: documents + 1] for offsets in (split.offsets, split.label_offsets)]
    few = stages.data.Split(split.ids[: ends[0][-1]], ends[0], split.labels[: ends[1][-1]], ends[1])
    data = data._replace(splits=data.splits | {"test": few}, known={})
    if module is ranker:
        predict, n = ranker.load(Path(run) / folder)
        return partial(predict, model, data, settings, ranking), scored, (size + n) / 1e6

    def one(batch: stages.data.Batch, k: int) -> dict[str, np.ndarray]:
        return {"labels": model.predict(batch, k, ranking)[0].cpu().numpy()}

    return partial(stages.train.predict_split, model, data, "test", settings.max_len, 2 * settings.batch_size, one, 100
                   ), scored, size / 1e6


def measure(folder: Path) -> tuple[list[float], np.ndarray]:
    """(METRICS in percent, what each document adds to them) of predictions.npz."""
    data = stages.data.load(folder)
    train, split = data.splits["train"], data.splits["test"]
    weight_L = stages.eval.inverse_propensity(np.bincount(train.labels, minlength=len(data.names)), len(train))
    labels = load_predictions(folder / "predictions.npz", "test", len(split), len(data.names)).labels_Nk
    values = stages.eval.metrics(labels, split, weight_L)
    return ([float(values[name][j - 1]) if j <= labels.shape[1] else np.nan for name, j in METRICS],
            contributions(labels, split, weight_L))


def run(config: Config) -> None:
    runs = config.run.split(",")
    for run in runs:
        load_npz(Path(run) / "predictions.npz")  # what is missing of the cascade is for stages 1 to 5 to make
        for name, (folder, module, on) in SYSTEMS.items():
            if not (Path(run) / folder / "predictions.npz").exists():
                print(f"\n{name} in {run}", flush=True)
                module.run(module.Config(run=str(Path(run) / on)))
            check(Path(run), folder, on)
    passes = {name: predictor(runs[0], name, config.documents) for name in SYSTEMS}
    seconds = in_turn({name: run for name, (run, *_) in passes.items()}, rounds=3)
    n = min(config.documents, len(stages.data.load(runs[0]).splits["test"]))
    titles = [f"{metric}@{j}" for metric, j in METRICS] + ["scored", "train s", "doc/s", "M par."]
    print(f"\n{f'%, mean of {len(runs)} runs; +- standard deviation':44}" + "".join(f"{t:>8}" for t in titles))
    added, differences = {}, []
    for name, (folder, *_) in SYSTEMS.items():
        values, parts = zip(*(measure(Path(run) / folder) for run in runs), strict=True)
        took = np.mean([training_seconds(Path(run) / folder) for run in runs])
        cost = [passes[name][1], took, n / seconds[name], passes[name][2]]
        print(f"{name:44}" + "".join(f"{value:8.2f}" for value in np.mean(values, axis=0))
              + "".join(f"{value:8,.{digits}f}" for value, digits in zip(cost, (0, 0, 0, 1), strict=True)))
        if len(runs) > 1:
            print(f"{'  +-':44}" + "".join(f"{value:8.2f}" for value in np.std(values, axis=0, ddof=1)))
        added[name] = np.mean(parts, axis=0)
        if name != "cascade":
            gap = np.column_stack([(added[name] - added["cascade"])[:, :-1], added[name][:, -1]])
            differences.append((name, np.quantile(bootstrap(gap, config.seed), (0.025, 0.5, 0.975), axis=0)))
    print(f"\n{'minus the cascade: 95% from, median, 95% to':44}" + "".join(f"{title:^24}" for title in TESTED))
    for name, quantiles_3M in differences:
        columns = [[f"{m}@{j}" for m, j in ADDED].index(title) for title in TESTED]
        print(f"{name:44}" + "".join("".join(f"{q:8.2f}" for q in quantiles_3M[:, column]) for column in columns))


if __name__ == "__main__":
    main(run, Config, __doc__)
