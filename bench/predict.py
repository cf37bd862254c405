"""What a prediction costs, how good the beam is, and how long the metrics take.

    python bench/predict.py                            a trained run, runs/demo
    python bench/predict.py --run "" --labels 131072   an untrained model of that many labels: speed
    python bench/predict.py --run "" --device cuda --labels 670091     with BERT-base's shape

Passes are run in turn over the same batches. The beam's recall is the share of the exact top 5 that
is among the beam's own top 5, in the ranking that validation chose. (If that was p(label), then in
p(label) p(cluster), as p(label) alone orders all labels in another way than those of the beam.)

Denormal numbers are numbers near zero that some processors handle very slowly. Every stage has them
rounded to zero. The last row is the time of the exact pass without this over the time with it, on
one thread.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from common import Report, random_data, random_documents, random_model, spread_shortlists, stages

from plumbing.precision import in_turn, set_up_torch

SHAPE = {"cpu": {"depth": 2, "width": 64}, "cuda": {"depth": 12, "width": 768}}
K = 5  # labels predicted for a document


def models(args) -> tuple:
    """(model, data, tokens, ranking, name) of the run, or of an untrained model."""
    if args.run:
        data = stages.data.load(args.run)
        model, config, ranking = stages.train.load(args.run, data)
        if ranking == "label":  # a ranking of the beam alone
            ranking = "parent"
        return model, data, config.max_len, ranking, args.run
    spread_shortlists()
    levels = stages.tree.choose_levels(args.labels)
    wanted = [128, 128, 256, 400][-len(levels) :]
    topk = [min(n, k) for n, k in zip(levels, wanted, strict=True)]
    shape = SHAPE[args.device]
    model = random_model(args.labels, levels, topk, max_len=128, device=args.device, **shape)
    model.amp = {"cpu": "off", "cuda": "bf16"}[args.device]
    data = random_data(100, args.labels, n_test=args.documents)
    return model, data, 128, "parent", f"{args.labels:,} labels"


def make_passes(model, batches: list, ranking: str) -> tuple[dict[str, Callable], dict[str, list]]:
    """({name: a pass over all batches}, {name: what its last call found})."""
    found: dict[str, list] = {}

    def encoder_alone(batch):
        return model.features(batch)[-1][0, 0].item()  # a number on the CPU: this waits for a GPU

    def beam(batch):
        return [x.cpu() for x in model.predict(batch, K, ranking)]

    def exact(batch):
        return [x.cpu() for x in stages.eval.predict_exact(model, batch, K, ranking)]

    def over_batches(name: str, predict: Callable) -> Callable[[], None]:
        def run() -> None:
            found[name] = [predict(batch) for batch in batches]

        return run

    passes = {
        "encoder": over_batches("encoder", encoder_alone),
        "beam": over_batches("beam", beam),
        "exact": over_batches("exact", exact),
    }
    return passes, found


def recall_of_beam(found: dict[str, list]) -> float:
    """Share of the exact top K that is among the top K of the beam."""
    beam_NK = torch.cat([labels for labels, _ in found["beam"]])
    exact_NK = torch.cat([labels for labels, _ in found["exact"]])
    same_NKK = beam_NK[:, :, None] == exact_NK[:, None, :]
    return same_NKK.any(1).float().mean().item()


@torch.no_grad()
def speed(model, data, tokens: int, ranking: str, name: str, args, row) -> None:
    # The shortest documents first, so that a batch holds documents of about one length.
    length_N = np.diff(data.splits["test"].offsets)
    order = np.argsort(length_N, kind="stable")[: args.documents]
    batches = []
    for start in range(0, len(order), args.batch):
        rows = order[start : start + args.batch]
        batches.append(data.batch("test", rows, tokens).to(args.device))
    passes, found = make_passes(model, batches, ranking)

    seconds = in_turn(passes, args.rounds)
    for what, took in seconds.items():
        row(f"{name}: documents per second, {what}", len(order) / took, "", ",.0f")
    ratio = seconds["encoder"] / seconds["beam"]
    row(f"{name}: beam / encoder-only documents per second", ratio, ">= 0.85 on a GPU")
    if args.run:
        recall = recall_of_beam(found)
        row(f"{name}: share of the exact top 5 that the beam finds", recall, ">= 0.99", ".4f")

    one = data.batch("test", order[len(order) // 2 :][:1], tokens).to(args.device)

    def one_document() -> None:
        for x in model.predict(one, K, ranking):
            x.cpu()

    single = in_turn({"one": one_document}, 10 * args.rounds)
    row(f"{name}: milliseconds for one document", 1000 * single["one"], "", ".1f")
    if args.run and args.device == "cpu":
        denormals(model, name, passes["exact"], args, row)


def denormals(model, name: str, run: Callable, args, row) -> None:
    weights = torch.cat([parameter.flatten() for parameter in model.parameters()])
    smallest_normal = torch.finfo(torch.float32).tiny
    is_denormal = (weights != 0) & (weights.abs() < smallest_normal)
    share = is_denormal.float().mean().item()
    row(f"{name}: share of the weights that are denormal numbers", share, "", ".5f")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the switch belongs to a thread

    def kept() -> None:
        torch.set_flush_denormal(False)
        run()

    def flushed() -> None:
        torch.set_flush_denormal(True)
        run()

    seconds = in_turn({"kept": kept, "flushed": flushed}, args.rounds)
    torch.set_num_threads(threads)
    ratio = seconds["kept"] / seconds["flushed"]
    row(f"{name}: denormal numbers kept / flushed, time of the exact pass", ratio)


def metric_time(n: int, n_labels: int, args, row) -> None:
    split = random_documents(n, n_labels, 1000, 4)
    labels_NK = np.random.default_rng(1).integers(0, n_labels, (n, K))
    count_L = np.bincount(split.labels, minlength=n_labels)
    weight_L = stages.eval.inverse_propensity(count_L, n)

    def all_metrics() -> None:
        stages.eval.metrics(labels_NK, split, weight_L)

    seconds = in_turn({"metrics": all_metrics}, args.rounds)
    what = f"metrics of {n:,} documents, {n_labels:,} labels, top 5: seconds"
    row(what, seconds["metrics"], "< 1")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run_help = 'a trained run, or "" for an untrained model [runs/demo]'
    metrics_help = "documents for the metrics' time [500000]"
    parser.add_argument("--run", default="runs/demo", help=run_help)
    parser.add_argument("--labels", type=int, default=131072, help="of the untrained model")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--documents", type=int, default=1000, help="of the test split [1000]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--metrics", type=int, default=500000, help=metrics_help)
    parser.add_argument("--out", default="bench/results/predict.json")
    args = parser.parse_args()
    set_up_torch()
    row = Report(args).row
    model, data, tokens, ranking, name = models(args)
    speed(model.to(args.device).eval(), data, tokens, ranking, name, args, row)
    metric_time(args.metrics, 131072, args, row)


if __name__ == "__main__":
    main()
