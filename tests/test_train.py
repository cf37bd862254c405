"""Stage 4: batches, schedule, accumulation; going on after an interruption; the same seed, the same
bytes.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import SMALL, sha256, stages

from plumbing.cli import settle
from plumbing.errors import UserError
from plumbing.label_level import RowAdam
from plumbing.precision import choose_amp
from plumbing.store import load_pt

train = stages.train


def config_of(run, **changes):
    return train.Config(run=str(run), **{**SMALL, **changes})


def test_every_document_comes_once_an_epoch_with_hardly_any_padding():
    rng = np.random.default_rng(0)
    length = np.minimum(rng.geometric(0.02, 20000), 128)
    split = stages.data.Split(None, np.concatenate([[0], np.cumsum(length)]), None, None)
    batches = train.Batches(stages.data.Data({"train": split}, [], {}), 64, 128, 0)
    epochs = [batches.rows(epoch) for epoch in (0, 1, 0)]
    for rows in epochs:
        assert len(rows) == len(batches) == 313 and sorted(np.concatenate(rows)) == list(
            range(20000)
        )
        assert (
            sum(length[row].sum() for row in rows)
            / sum(length[row].max() * len(row) for row in rows)
            > 0.97
        )
    assert all(np.array_equal(a, b) for a, b in zip(epochs[0], epochs[2], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(epochs[0], epochs[1], strict=True))


def test_learning_rate_rises_stays_and_falls():
    scales = [train.lr_scale(step, 100, 10) for step in range(100)]
    assert scales[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(scales[10:80]) == {1.0}
    assert scales[80:] == pytest.approx([1 - i / 20 for i in range(20)])


def test_two_accumulated_halves_make_one_batch(done):
    loaded = stages.data.load(done)
    results = []
    for size, accumulate in ((32, 1), (16, 2)):
        config = config_of(done, batch_size=size, accumulate=accumulate, epochs=1)
        config = settle(config, stages.model.RECIPES, {"encoder": "tiny"})
        model = stages.model.build(loaded, stages.tree.load(done), config)
        model.dropout = torch.nn.ModuleList(torch.nn.Identity() for _ in model.heads)
        whole = loaded.batch("train", np.arange(32), 32)
        halves = [loaded.batch("train", np.arange(32)[i : i + 16], 32) for i in (0, 16)]

        class Fixed:
            def __len__(self):
                return accumulate  # noqa: B023

            def __call__(self, epoch, first):
                return iter([whole] if accumulate == 1 else halves)  # noqa: B023

        train.fit(model, Fixed(), config, lambda record: None)
        results.append(torch.cat([p.detach().flatten() for p in model.heads.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=2e-4, rtol=1e-3)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path, prepared, done, corpus):
    stages.tree.run(stages.tree.Config(run=str(tmp_path), levels="8"))
    train.run(config_of(tmp_path))
    stages.eval.run(stages.eval.Config(run=str(tmp_path), k=20, show=0))
    for name in ("tree.npz", "model.pt", "checkpoint.pt", "predictions.npz"):
        assert sha256(tmp_path / name) == sha256(done / name), name
    train.run(config_of(tmp_path, seed=1))
    assert sha256(tmp_path / "model.pt") != sha256(done / "model.pt")


def plain(value):
    """Nested tensors as lists: equal only when every bit that counts is."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def without_rates(path):
    return [
        {key: value for key, value in json.loads(line).items() if key != "batches_per_s"}
        for line in path.read_text().splitlines()
    ]


@pytest.mark.parametrize(
    ("changes", "stopped_in"),
    [
        ({}, "all"),
        ({"label_bf16": True, "accumulate": 3, "amp": "bf16"}, "all"),
        ({"head_epochs": 2}, "heads"),
        ({"head_epochs": 2, "accumulate": 3}, "heads"),
        ({"head_epochs": 1}, "all"),
        ({"head_epochs": 1, "amp": "fp16"}, "all"),
    ],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    tmp_path, prepared, done, monkeypatch, changes, stopped_in
):
    """Stopped in the middle of the second epoch, of the heads alone or of all, with a log line half
    written.
    """
    train_one_epoch = train.train_one_epoch
    if changes:  # a whole run of its own to compare with
        whole = tmp_path / "whole"
        whole.mkdir()
        for name in ("data.npz", "tree.npz"):
            (whole / name).write_bytes((done / name).read_bytes())
        train.run(config_of(whole, **changes))
        done = whole

    def interrupted(training, batches, log, *others):
        def stop(record):
            log(record)
            if record["epoch"] == 2 and (batches.data.encoded or stopped_in == "all"):
                raise KeyboardInterrupt

        train_one_epoch(training, batches, stop, *others)

    monkeypatch.setattr(train, "train_one_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(config_of(tmp_path, **changes))
    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 2, "st')
    with pytest.raises(UserError, match="trained with lr=.*, not 1"):
        train.run(config_of(tmp_path, resume=True, **changes, lr=1.0))
    with pytest.raises(UserError, match="stopped in epoch 2 of 2.*: go on with --resume"):
        train.run(config_of(tmp_path, **changes))
    train.run(config_of(tmp_path, resume=True, **changes))
    assert sha256(tmp_path / "model.pt") == sha256(done / "model.pt")
    ours, theirs = (load_pt(folder / "checkpoint.pt")[0] for folder in (tmp_path, done))
    assert plain(ours) == plain(theirs) and set(ours) > {
        "model",
        "optimizers",
        "scaler",
        "randomness",
        "best",
    }
    row_state = ours["optimizers"][1]["state"][0]
    assert {row_state["rows"].dtype, row_state["features"].dtype} == {torch.float32}
    assert without_rates(tmp_path / "log.jsonl") == without_rates(done / "log.jsonl")


def test_the_best_epoch_is_kept_by_validation(tmp_path, prepared, done, monkeypatch):
    """Whatever validation says is followed: here the first of three epochs is made the best."""
    said = iter([3.0, 1.0, 2.0])
    weights = []

    def validate(model, data, config):
        weights.append(model.heads[0].weight.detach().clone())
        value = next(said)
        return {"P": {"label": [0.4], "parent": [value], "path": [0.5]}, "recall": [1.0]}

    monkeypatch.setattr(train, "validate", validate)
    train.run(config_of(tmp_path, epochs=3))
    model, _, ranking = train.load(tmp_path, stages.data.load(tmp_path))
    assert ranking == "parent" and torch.equal(model.heads[0].weight, weights[0])
    assert not torch.equal(weights[0], weights[1])


def test_a_loss_that_is_not_finite_stops_the_run(done):
    loaded = stages.data.load(done)
    config = settle(config_of(done), stages.model.RECIPES, {"encoder": "tiny"})
    model = stages.model.build(loaded, stages.tree.load(done), replace(config, pooling="mean"))
    with torch.no_grad():
        model.heads[0].weight.fill_(torch.nan)
    with pytest.raises(
        UserError, match="loss of level 1 of 2 is no longer finite: step 1, .* lower --lr"
    ):
        train.fit(model, train.Batches(loaded, 16, 32, 0), config, lambda record: None)


@pytest.mark.parametrize("amp", ["bf16", "off", "auto"])
def test_every_precision_trains_on_this_machine(tmp_path, prepared, done, amp):
    train.run(config_of(tmp_path, amp=amp, epochs=1))
    _, config, _ = train.load(tmp_path, stages.data.load(tmp_path))
    assert config.amp == amp if amp != "auto" else config.amp in ("bf16", "off")


@pytest.mark.parametrize(
    ("flags", "tried"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({}, True),
    ],
)
def test_a_processor_without_bf16_arithmetic_is_not_made_to_try_it(
    done, monkeypatch, capsys, flags, tried
):
    """Where nothing tells, the trial does."""
    loaded = stages.data.load(done)
    model, config, _ = train.load(done, loaded)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    amp = choose_amp("auto", model, loaded.batch("train", np.arange(4), config.max_len))
    said = capsys.readouterr().out
    assert ("one batch takes" in said) == tried and (
        tried or amp == "off" and "no bf16 arithmetic" in said
    )


def test_bf16_rows_go_with_every_precision_of_the_encoder(prepared):
    losses = {}
    for amp in ("off", "fp16"):
        train.run(config_of(prepared, amp=amp, label_bf16=True, epochs=4))
        lines = (prepared / "log.jsonl").read_text().splitlines()
        losses[amp] = [json.loads(line)["loss"][-1] for line in lines if "loss" in line]
    assert losses["off"] == pytest.approx(losses["fp16"], rel=0.02)
    assert sum(losses["off"][-8:]) < 0.9 * sum(losses["off"][:8])


def test_the_label_level_does_not_see_the_loss_scale(prepared, monkeypatch):
    """A scale that doubles with every step makes the same weights as a constant one."""
    scaler, weights = torch.amp.GradScaler, []
    for init, every in ((2.0**10, 1000), (1.0, 1)):
        settings = {"init_scale": init, "growth_interval": every}
        monkeypatch.setattr(torch.amp, "GradScaler", partial(scaler, **settings))
        train.run(config_of(prepared, amp="fp16", epochs=1))
        weights.append(load_pt(prepared / "model.pt")[0]["model"]["heads.1.weight"])
    assert (weights[0] - weights[1]).norm() < 0.05 * weights[0].norm()


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: fp16 with a gradient scaler"
)
def test_fp16_with_a_scaler_trains_on_a_gpu(tmp_path, prepared, done):
    train.run(config_of(tmp_path, amp="fp16", epochs=1))
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
        if "loss" in line
    ]
    assert np.isfinite(losses).all()


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: whether a step waits for it"
)
def test_a_step_on_a_gpu_waits_for_nothing(done):
    loaded = stages.data.load(done)
    config = settle(config_of(done), stages.model.RECIPES, {"encoder": "tiny"})
    model = stages.model.build(loaded, stages.tree.load(done), config).cuda().train()
    batch = loaded.batch("train", np.arange(16), 32).to("cuda")
    groups = model.param_groups(1e-3, 1e-4)
    optimizers = [
        torch.optim.AdamW([group for group in groups if not group["rows"]], fused=True),
        RowAdam([group for group in groups if group["rows"]]),
    ]
    model.amp = "bf16"
    for mode in ("default", "error"):
        model.zero_grad()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model.loss(batch)[0].sum().backward()
            torch.nn.utils.clip_grad_norm_(optimizers[0].param_groups[0]["params"], 1.0)
            for optimizer in optimizers:
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_validation_counts_what_the_metrics_count(done):
    loaded = stages.data.load(done)
    model, config, _ = train.load(done, loaded)
    result = train.validate(model, loaded, config)
    split = loaded.splits["val"]
    predict = partial(train.predict_rankings, model)
    for ranking in stages.model.RANKINGS:
        found = train.predict_split(model, loaded, "val", config.max_len, 7, predict, 5)
        metrics = stages.eval.metrics(found[f"labels {ranking}"], split, np.ones(len(loaded.names)))
        assert result["P"][ranking] == pytest.approx([metrics["P"][j - 1] for j in (1, 3, 5)])
    # Shortlist recall, label by label.
    kept, pairs = 0, 0
    for i in range(len(split)):
        batch = loaded.batch("val", np.array([i]), config.max_len)
        clusters = set(model.beam(batch)[2][0][0].tolist())
        for label in batch.label_P.tolist():
            kept, pairs = (
                kept + (int(model.label_to_slot[label]) // (model.counts[-1] // 8) in clusters),
                pairs + 1,
            )
    assert result["recall"][0] == pytest.approx(100 * kept / pairs)
