"""--graphs: batches of a few shapes, and recorded steps that do what the others do.

There is no GPU here. A recording is imitated: to replay it is to run the step again on the batch
that it was recorded with, whose tensors have got other contents by then."""

import shutil

import numpy as np
import pytest
import torch
from conftest import stages

from plumbing import cuda_graphs
from plumbing.cli import settle
from plumbing.errors import UserError

train = stages.train


class Imitation(cuda_graphs.RecordedSteps):
    """Recorded steps on a CPU."""

    def record(self, batch):
        with self.rates_as_tensors():
            assert all(group["capturable"] for group in self.groups())
        found = [torch.zeros(2), torch.zeros(()), torch.zeros(())]
        steps = self

        class Graph:
            replays = 0

            def replay(self):
                self.replays += 1
                with steps.rates_as_tensors():
                    for place, new in zip(found, steps.step(batch), strict=True):
                        place.copy_(new)

        return cuda_graphs.Recording(Graph(), batch, tuple(found))


def trained(folder, recorded: bool, device: str = "cpu") -> tuple[train.Training, list[dict]]:
    """A training of two epochs on the small corpus of the tests, and its log."""
    data = stages.data.load(folder)
    given = train.Config(run=str(folder), tiny="1,16", batch_size=16, epochs=2, topk="4", amp="off")
    config = settle(given, stages.model.RECIPES, {"encoder": "tiny"})
    torch.manual_seed(0)
    model = stages.model.build(data, stages.tree.load(folder), config).to(device)
    for dropout in model.dropout:
        dropout.p = 0.0
    batches = train.Batches(data, 16, 32, 0, cuda_graphs.TOKENS)
    training = train.Training(model, config, len(batches))
    if recorded:
        kind = Imitation if device == "cpu" else cuda_graphs.RecordedSteps
        size = config.batch_size
        training.recorded = kind(training.on_the_device, training.groups, size, training.device)
    log = []
    for _ in range(config.epochs):
        train.train_one_epoch(training, batches, log.append)
    return training, log


def test_recorded_steps_are_the_usual_steps(done):
    usual, usual_log = trained(done, recorded=False)
    replayed, replayed_log = trained(done, recorded=True)
    # Most steps were replayed, and every batch was one of a few shapes.
    recordings = replayed.recorded.recordings.values()
    n_replays = sum(recording.graph.replays for recording in recordings)
    assert n_replays > usual.steps / 2
    for expected, found in zip(usual_log, replayed_log, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["lr"] == expected["lr"]
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    for key, expected in usual.model.state_dict().items():
        torch.testing.assert_close(replayed.model.state_dict()[key], expected, rtol=1e-3, atol=1e-4)


def test_after_a_recording_the_rates_are_numbers_again(done):
    training, _ = trained(done, recorded=True)
    for group in training.groups():
        assert isinstance(group["lr"], float)
        assert not group.get("capturable")


def test_more_pairs_say_nothing_new():
    doc_P = torch.tensor([0, 0, 1])
    label_P = torch.tensor([3, 7, 3])
    batch = stages.data.Batch(torch.ones(2, 4), torch.ones(2, 4), doc_P, label_P)
    more = cuda_graphs.padded(batch)
    assert len(more.doc_P) == cuda_graphs.PAIRS
    parents_BK = torch.tensor([[0, 1], [1, 0]])
    expected = stages.tree.match(label_P, doc_P, parents_BK, 4)
    assert torch.equal(stages.tree.match(more.label_P, more.doc_P, parents_BK, 4), expected)
    many = cuda_graphs.padded(more._replace(doc_P=torch.arange(257), label_P=torch.arange(257)))
    assert len(many.doc_P) == 2 * cuda_graphs.PAIRS


def test_lengths_are_rounded_up_but_not_beyond_the_longest_allowed(done):
    data = stages.data.load(done)
    rows = np.arange(8)
    plain = data.batch("train", rows, 32)
    longest = plain.ids_BT.shape[1]
    rounded = data.batch("train", rows, 32, round_to=5)
    assert rounded.ids_BT.shape[1] == min(-(-longest // 5) * 5, 32)
    assert torch.equal(rounded.ids_BT[:, :longest], plain.ids_BT)
    assert not rounded.mask_BT[:, longest:].any()
    assert (rounded.ids_BT[:, longest:] == data.meta["pad"]).all()
    assert data.batch("train", rows, 32, round_to=1000).ids_BT.shape[1] == 32


@pytest.mark.parametrize("reason", ["accumulate", "fp16", "label-bf16", "CUDA"])
def test_what_cannot_be_recorded_is_refused(reason):
    changes = {"accumulate": {"accumulate": 2}, "fp16": {"amp": "fp16"}}
    changes |= {"label-bf16": {"label_bf16": True}}
    device = torch.device("cpu" if reason == "CUDA" else "cuda")
    config = train.Config(graphs=True, **changes.get(reason, {}))
    with pytest.raises(UserError, match=reason):
        cuda_graphs.refuse_what_cannot_be_recorded(config, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_flag_is_refused_and_nothing_is_lost(tmp_path, done):
    for name in ("data.npz", "tree.npz", "model.pt"):
        shutil.copy(done / name, tmp_path)
    before = (tmp_path / "model.pt").read_bytes()
    with pytest.raises(UserError, match="--graphs: it needs a CUDA device"):
        train.run(train.Config(run=str(tmp_path), tiny="1,16", topk="4", graphs=True))
    assert (tmp_path / "model.pt").read_bytes() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: a CUDA graph")
def test_a_gpu_replays_the_usual_steps(done):
    usual, usual_log = trained(done, recorded=False, device="cuda")
    replayed, replayed_log = trained(done, recorded=True, device="cuda")
    assert replayed.recorded.recordings
    for expected, found in zip(usual_log, replayed_log, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2)
        assert found["lr"] == expected["lr"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: a CUDA graph")
def test_a_step_that_asks_a_gpu_for_a_number_is_refused(done):
    training, _ = trained(done, recorded=True, device="cuda")
    usual = training.recorded.step

    def asks(batch):
        found = usual(batch)
        found[0].tolist()
        return found

    recorded = cuda_graphs.RecordedSteps(asks, training.groups, 16, training.device)
    data = stages.data.load(done)
    batch = next(train.Batches(data, 16, 32, 0, cuda_graphs.TOKENS)(0))
    recorded(batch)
    with pytest.raises(UserError, match="--graphs: a step of this model cannot be recorded"):
        recorded(batch)
