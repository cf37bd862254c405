"""Heads first: a pretrained encoder's features are cached, centred, and the heads are trained on
them before the encoder learns. And the pretrained recipe as a whole, with an encoder that has dead
features."""

import json
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
import transformers
from conftest import make_corpus, stages

from plumbing import store
from plumbing.errors import UserError
from plumbing.loss_watch import LossWatch
from plumbing.store import load_npz, load_pt

train = stages.train
DEAD = {3: 0.0, 5: 1e-33}  # features of the last layer, and the gain that makes them so
SETTINGS = {
    "pooling": "mean",
    "max_len": 32,
    "batch_size": 16,
    "topk": "4",
    "amp": "off",
    "head_epochs": 2,
    "epochs": 2,
}


def save_encoder(folder, texts):
    """A small random BERT with features that are always zero, as all-MiniLM-L6-v2 has them, and its
    tokeniser.
    """
    tokenizer = stages.data.train_tokenizer(lambda: texts, 400)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **shape))
    norm = model.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        for feature, gain in DEAD.items():
            norm.weight[feature] = gain
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run folder with stages 1 and 2 done for such an encoder; not to be changed by a test."""
    root = tmp_path_factory.mktemp("pretrained")
    corpus = make_corpus(root / "corpus")
    texts = [row.text for row in stages.data.formats.open_corpus(corpus).documents["train"]()]
    encoder = save_encoder(root / "encoder", texts)
    run = root / "run"
    stages.data.run(stages.data.Config(run=str(run), corpus=str(corpus), encoder=str(encoder)))
    stages.tree.run(stages.tree.Config(run=str(run), levels="8"))
    return run


@pytest.fixture
def run(pretrained, tmp_path):
    """The test's own run folder."""
    for name in ("data.npz", "tree.npz"):
        shutil.copy(pretrained / name, tmp_path)
    return tmp_path


def config_of(run, **changes):
    return train.Config(
        run=str(run), **{**SETTINGS, "lr": 1e-3, "lr_encoder": 1e-4, "head_lr": 5e-3, **changes}
    )


def built(run, **changes):
    """(model, data, settings) before training."""
    data = stages.data.load(run)
    config = config_of(run, **changes)
    return stages.model.build(data, stages.tree.load(run), config), data, config


def records(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def never():
    return False


def test_the_cache_holds_what_the_encoder_says_of_each_document(run):
    model, data, config = built(run)
    before = sorted(os.listdir(run))
    seen = train.encode(model, data, config, never)
    assert sorted(os.listdir(run)) == before  # the file has no name
    for name in ("train", "val"):
        assert seen.encoded[name].dtype == np.float16
        for row in (0, 17, 59):
            alone = model.eval().pooled(data.batch(name, np.array([row]), 32))
            cached = seen.batch(name, np.array([row]), 32).pooled_BHD
            torch.testing.assert_close(cached.float(), alone.detach(), atol=2e-3, rtol=2e-3)


def test_centred_features_have_mean_zero_and_one_scale_for_each_hidden_state(run):
    model, data, config = built(run)
    seen = train.encode(model, data, config, never)
    train.center(model, seen.encoded["train"])
    rows = np.arange(len(data.splits["train"]))
    for x_ND in (x.detach() for x in model.eval().features(seen.batch("train", rows, 32))[-1:]):
        torch.testing.assert_close(x_ND.mean(0), torch.zeros(16), atol=1e-3, rtol=0)
        assert float(x_ND.square().mean()) == pytest.approx(1, abs=1e-3)
        # one scale per feature would make infinities of these
        assert (x_ND[:, list(DEAD)] == 0).all()
    assert model.scale_H.shape == (2,) and (model.scale_H > 0).all()


def test_biases_start_at_the_log_odds_of_their_node(run):
    model, data, _ = built(run)
    split = data.splits["train"]
    train.set_prior(model, split)
    slots = model.slot_to_label.tolist()
    for head, n_nodes in zip(model.heads, model.counts[1:], strict=True):
        count = np.zeros(n_nodes)
        for i in range(len(split)):
            labels = split.labels[split.label_offsets[i] : split.label_offsets[i + 1]]
            for node in {slots.index(label) * n_nodes // len(slots) for label in labels}:
                count[node] += 1
        expected = np.log((count + 0.5) / (len(split) - count + 0.5))
        np.testing.assert_allclose(head.bias.detach().flatten(), expected, rtol=1e-4)


def test_the_heads_alone_leave_the_encoder_as_it_was_and_learn(run):
    untrained, data, _ = built(run)
    train.run(config_of(run, epochs=0, head_epochs=4))
    model, _, _ = train.load(run, data)
    for (name, before), after in zip(
        untrained.encoder.named_parameters(), model.encoder.parameters(), strict=True
    ):
        assert torch.equal(before, after), name
    validations = [record for record in records(run) if "validation" in record]
    assert [record["phase"] for record in validations] == ["heads"] * 4
    scores = [sum(record["validation"]["P"][record["ranking"]]) for record in validations]
    assert max(scores[1:]) > scores[0]
    # and what was cached is not needed any more
    stages.eval.run(stages.eval.Config(run=str(run), k=20))


def test_the_log_counts_the_steps_of_both_phases(run):
    train.run(config_of(run, head_epochs=1))
    steps = [record for record in records(run) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 3 * 19 + 1))
    assert {record["total"] for record in steps if record["phase"] == "heads"} == {19}
    assert {record["total"] for record in steps if record["phase"] == "all"} == {57}
    assert [record["phase"] for record in records(run) if "validation" in record] == [
        "heads",
        "all",
        "all",
    ]


def test_the_encoder_goes_on_from_where_the_heads_are(run):
    """The first loss end to end is about the last one of the heads, not that of heads that know
    nothing.
    """
    train.run(config_of(run, head_epochs=20, epochs=1))
    phases = {
        phase: [
            sum(record["loss"])
            for record in records(run)
            if "loss" in record and record["phase"] == phase
        ]
        for phase in ("heads", "all")
    }
    assert np.mean(phases["all"][:4]) < 0.5 * (phases["heads"][0] + np.mean(phases["heads"][-4:]))


def test_nothing_to_train_is_refused(run):
    with pytest.raises(UserError, match="--head-epochs 0 --epochs 0: nothing to train"):
        train.run(config_of(run, head_epochs=0, epochs=0))


def test_too_little_room_for_the_cache_is_said_before_anything_is_removed(run, monkeypatch):
    train.run(config_of(run, head_epochs=0, epochs=1))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(
        UserError,
        match=r"MiB are free; make room, .*features for the heads, \d+ MiB: --head-epochs 0",
    ):
        train.run(config_of(run))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_hidden_state_that_never_varies_and_one_too_large_for_float16(run):
    model, _, _ = built(run)
    encoded = np.random.default_rng(0).normal(3, 1, (50, 2, 16)).astype(np.float16)
    encoded[:, 0] = encoded[0, 0]
    train.center(model, encoded)
    assert model.scale_H[0] == 1 and model.scale_H[1] == pytest.approx(1, abs=0.1)
    train.center(model, encoded[:1])  # a single document
    assert model.scale_H.tolist() == [1, 1]
    encoded[7, 1, 3] = np.inf
    with pytest.raises(UserError, match="hidden state 2 of the encoder is too large for float16"):
        train.center(model, encoded)


def test_without_labels_in_the_validation_split_the_last_epoch_is_kept(run, capsys):
    data, tree = stages.data.load(run), stages.tree.load(run)
    val = data.splits["val"]
    unlabelled = stages.data.Split(
        val.ids, val.offsets, val.labels[:0], np.zeros_like(val.label_offsets)
    )
    data = data._replace(splits=data.splits | {"val": unlabelled})
    train.train(config_of(run, head_epochs=1, epochs=1), data, tree, stages.model.build)
    assert "no validation document has a label: the last epoch is kept" in capsys.readouterr().out
    kept = load_pt(run / "model.pt")[0]["model"]
    last = load_pt(run / "checkpoint.pt")[0]["model"]
    assert all(torch.equal(kept[name], last[name]) for name in kept)


def test_ctrl_c_while_the_encoder_runs_ends_it(run):
    model, data, config = built(run)
    with pytest.raises(KeyboardInterrupt, match="nothing new was saved"):
        train.encode(model, data, config, lambda: True)


def test_ctrl_c_in_the_head_phase_saves_a_checkpoint(run, monkeypatch):
    calls = []

    def ask():
        calls.append(1)
        return len(calls) > 20

    class Asked:
        def __enter__(self):
            return ask

        def __exit__(self, *_):
            return False

    with monkeypatch.context() as patch:
        patch.setattr(train, "asked_to_stop", Asked)
        with pytest.raises(
            KeyboardInterrupt, match="a checkpoint was saved after step .*; go on with --resume"
        ):
            train.run(config_of(run))
    state, _ = load_pt(run / "checkpoint.pt")
    assert state["phase"] == "heads" and not state["finished"] and state["batch"] > 0
    train.run(config_of(run, resume=True))
    state, _ = load_pt(run / "checkpoint.pt")
    assert state["phase"] == "all" and state["finished"]


@pytest.mark.parametrize(
    "changes",
    [
        # end to end at once: the gains of dead features move off zero while rows know nothing
        {"head_epochs": 0},
        {"head_epochs": 2},  # a frozen encoder that is thawed
        {"head_epochs": 0, "accumulate": 2},
        {"head_epochs": 0, "amp": "fp16"},
        {"head_epochs": 2, "amp": "bf16", "label_bf16": True},
    ],
)
def test_dead_features_of_a_pretrained_encoder_do_not_make_weights_explode(run, changes):
    config = config_of(run, lr=5e-3, lr_encoder=5e-4, epochs=3, **changes)
    train.run(config)
    model, _, _ = train.load(run, stages.data.load(run))
    norm = model.encoder.backbone.encoder.layer[-1].output.LayerNorm
    assert (norm.weight[list(DEAD)].abs() > 1e-4).all()  # training has moved the gains
    steps = sum("loss" in record for record in records(run))
    largest = float(model.heads[-1].weight.detach().abs().max())
    assert largest < 2 * steps * 5e-3
    losses = [record["loss"][-1] for record in records(run) if "loss" in record]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_a_loss_that_grows_a_thousandfold_ends_the_run(run, monkeypatch):
    loss, calls = stages.model.Cascade.loss, []

    def growing(self, batch):
        calls.append(1)
        losses, surplus = loss(self, batch)
        return losses * torch.tensor([1.0, 3000.0 if len(calls) >= 9 else 1.0]), surplus

    monkeypatch.setattr(stages.model.Cascade, "loss", growing)
    message = (
        "loss of level 2 of 2 is .*, more than a thousand times its median .*: "
        "step 9, .*largest weight .*--lr"
    )
    with pytest.raises(UserError, match=message):
        train.run(config_of(run, head_epochs=0))


def test_a_loss_that_was_tiny_may_come_back_to_where_it_began():
    watch = LossWatch(torch.nn.Linear(1, 1))
    for step, loss in enumerate([5.0, 1e-4, 1e-4, 1e-4, 4.9, 1e-4]):
        watch(torch.tensor([loss]), torch.tensor(1.0), step, 1e-3)
    watch.check()


def test_a_loss_that_grows_step_by_step_is_found():
    watch = LossWatch(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="more than a thousand times its median"):
        for step in range(300):
            watch(torch.tensor([1.2**step]), torch.tensor(1.0), step, 1e-3)


def test_a_single_document_may_be_a_thousand_times_harder_than_the_others():
    """A batch of one: first all documents are hard, then most of them are easy."""
    losses = [0.5, *19 * [5.0], *400 * [1e-4], 8.0, 8.0, *90 * [1e-4], 8.0]
    watch = LossWatch(torch.nn.Linear(1, 1))
    for step, loss in enumerate(losses):
        watch(torch.tensor([loss]), torch.tensor(1.0), step, 1e-3)
    watch.check()


def test_p_label_may_be_chosen_as_a_ranking_of_the_beam_and_exact_scoring_refuses_it(
    run, monkeypatch
):
    validate = train.validate

    def said(model, data, config):
        result = validate(model, data, config)
        return result | {"P": {name: [9.0 if name == "label" else 0.0] * 3 for name in result["P"]}}

    monkeypatch.setattr(train, "validate", said)
    train.run(config_of(run, head_epochs=0, epochs=1))
    stages.eval.run(stages.eval.Config(run=str(run), k=20))
    assert load_npz(run / "predictions.npz")[1]["ranking"] == "label"
    with pytest.raises(
        UserError, match="--exact: validation chose p.label. as the ranking of the beam"
    ):
        stages.eval.run(stages.eval.Config(run=str(run), k=20, exact=True))


def test_an_old_model_is_refused_with_the_command_that_makes_it_anew(run, monkeypatch):
    train.run(config_of(run, head_epochs=0, epochs=1))
    assert store.FORMAT == 3  # since models have a centre and a scale
    data = stages.data.load(run)
    monkeypatch.setattr(store, "FORMAT", 4)
    with pytest.raises(
        UserError,
        match=r"has format 3, expected 4; run: python 04_train.py --run .* with the flags",
    ):
        train.load(run, data)
