"""What a prediction costs, how good the beam is, and how long the metrics take.

    python bench/predict.py                         the run in runs/demo, trained before by the five scripts
    python bench/predict.py --run "" --labels 131072     an untrained model of that many labels: speed alone
    python bench/predict.py --run "" --device cuda --labels 670091     the same, BERT-base and 128 tokens

Passes are run in turn over the same batches. The beam's recall is the share of the exact top 5, of the ranking that
validation chose or, where that is p(label), of p(label) p(cluster), that its own top 5 holds. Denormal numbers: time
of the exact pass without flushing them to zero, as every stage has them flushed, over the time with it, on one
thread.
"""

import argparse

import numpy as np
import torch
from common import Report, random_data, random_documents, random_model, spread_shortlists, stages

from plumbing.precision import in_turn, set_up_torch

SHAPE = {"cpu": {"depth": 2, "width": 64}, "cuda": {"depth": 12, "width": 768}}


def models(args) -> tuple:
    """(model, data, tokens, ranking, name) of the run, or untrained."""
    if args.run:
        data = stages.data.load(args.run)
        model, config, ranking = stages.train.load(args.run, data)
        # p(label) alone is a ranking of the beam; over all labels it orders otherwise.
        return model, data, config.max_len, "parent" if ranking == "label" else ranking, args.run
    spread_shortlists()
    levels = stages.tree.choose_levels(args.labels)
    topk = [min(n, k) for n, k in zip(levels, [128, 128, 256, 400][-len(levels):], strict=True)]
    model = random_model(args.labels, levels, topk, max_len=128, device=args.device, **SHAPE[args.device])
    model.amp = {"cpu": "off", "cuda": "bf16"}[args.device]
    return model, random_data(100, args.labels, n_test=args.documents), 128, "parent", f"{args.labels:,} labels"


@torch.no_grad()
def speed(model, data, tokens: int, ranking: str, name: str, args, row) -> None:
    order = np.argsort(np.diff(data.splits["test"].offsets), kind="stable")[: args.documents]
    batches = [data.batch("test", order[i : i + args.batch], tokens).to(args.device)
               for i in range(0, len(order), args.batch)]
    found: dict[str, list] = {}

    def over(what: str, predict) -> callable:
        def run() -> None:
            found[what] = [predict(batch) for batch in batches]
        return run

    passes = {
        "encoder": over("encoder", lambda batch: model.features(batch)[-1][0, 0].item()),
        "beam": over("beam", lambda batch: [x.cpu() for x in model.predict(batch, 5, ranking)]),
        "exact": over("exact", lambda batch: [x.cpu() for x in stages.eval.predict_exact(model, batch, 5, ranking)]),
    }
    seconds = in_turn(passes, args.rounds)
    for what, took in seconds.items():
        row(f"{name}: documents per second, {what}", len(order) / took, "", ",.0f")
    row(f"{name}: beam / encoder-only documents per second", seconds["encoder"] / seconds["beam"], ">= 0.85 on a GPU")
    if args.run:
        beam, exact = (torch.cat([labels for labels, _ in found[what]]) for what in ("beam", "exact"))
        recall = (beam[:, :, None] == exact[:, None, :]).any(1).float().mean().item()
        row(f"{name}: share of the exact top 5 that the beam finds", recall, ">= 0.99", ".4f")
    one = data.batch("test", order[len(order) // 2 :][:1], tokens).to(args.device)
    single = in_turn({"one": lambda: [x.cpu() for x in model.predict(one, 5, ranking)]}, 10 * args.rounds)
    row(f"{name}: milliseconds for one document", 1000 * single["one"], "", ".1f")
    if args.run and args.device == "cpu":
        denormals(model, name, passes["exact"], args, row)


def denormals(model, name: str, run, args, row) -> None:
    weights = torch.cat([p.flatten() for p in model.parameters()])
    small = ((weights != 0) & (weights.abs() < torch.finfo(torch.float32).tiny)).float().mean().item()
    row(f"{name}: share of the weights that are denormal numbers", small, "", ".5f")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the switch belongs to a thread

    def switched(flush: bool) -> None:
        torch.set_flush_denormal(flush)
        run()

    seconds = in_turn({"kept": lambda: switched(False), "flushed": lambda: switched(True)}, args.rounds)
    torch.set_num_threads(threads)
    row(f"{name}: denormal numbers kept / flushed, time of the exact pass", seconds["kept"] / seconds["flushed"])


def metric_time(n: int, n_labels: int, args, row) -> None:
    split = random_documents(n, n_labels, 1000, 4)
    labels = np.random.default_rng(1).integers(0, n_labels, (n, 5))
    count_L = np.bincount(split.labels, minlength=n_labels)
    weight_L = stages.eval.inverse_propensity(count_L, n)
    seconds = in_turn({"metrics": lambda: stages.eval.metrics(labels, split, weight_L)}, args.rounds)
    row(f"metrics of {n:,} documents, {n_labels:,} labels, top 5: seconds", seconds["metrics"], "< 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/demo", help='a trained run, or "" for an untrained model [runs/demo]')
    parser.add_argument("--labels", type=int, default=131072, help="of the untrained model [131072]")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--documents", type=int, default=1000, help="of the test split [1000]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--metrics", type=int, default=500000, help="documents for the metrics' time [500000]")
    parser.add_argument("--out", default="bench/results/predict.json")
    args = parser.parse_args()
    set_up_torch()
    row = Report(args).row
    model, *rest = models(args)
    speed(model.to(args.device).eval(), *rest, args, row)
    metric_time(args.metrics, 131072, args, row)


if __name__ == "__main__":
    main()
