# %% [markdown]
"""Lab 5: a pretrained encoder. For an evening, or for those who have a GPU.

Goal      You know what an encoder that somebody has trained needs before its heads can learn, and
          what it is worth to train the heads first, or all of it.
Reading   course/lecture.md, section 7; functions: Encoder.forward in 03_model.py; train_heads,
          center and set_prior in 04_train.py (try it yourself first: these are the solutions)
Commands  python 01_data.py --run runs/pretrained --limit 4000 --encoder ENCODER
          python 02_label_tree.py --run runs/pretrained
          python -m course.check 5                                            after every step
          python -m course.lab5_pretrained                                    at the end
          python -m variants.compare --run runs/pretrained-heads-first        if you have the time
          ENCODER is a folder with all-MiniLM-L6-v2, or, with a network,
          sentence-transformers/all-MiniLM-L6-v2
Minutes   computing: 20 (two cores), without the table of variants; of yours: 60
Target    3 of 3 steps pass, and you can explain both tables of the last cells

Fill in every function that raises NotImplementedError. Shape letters: B and N documents, T tokens,
H hidden states, D width, P (document, node) pairs, C nodes (docs/glossary.md has all).
"""

# %%

import sys
import time

# Start this lab from the folder of the stages, or, as some editors do, from course/.
sys.path.extend([".", ".."])

import numpy as np
import torch
from torch import Tensor

from course import check, runs
from plumbing.stages import load_stages

stages = load_stages()
LAB = 5
RUN = "runs/pretrained"  # the folder that the commands have made
MAX_LEN = 64
EPOCHS = 2  # of the whole cascade; the heads alone take HEAD_EPOCHS
HEAD_EPOCHS = 10
LOOKED_AT = 200  # documents whose features are compared

# %% Step 1: one feature for a document


def mean_of_tokens(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """(B, D): the mean of a document's own tokens.

    mask_BT is 1 where a document has a token, and 0 where it was filled up to the length of the
    longest one of its batch. What stands there must not count.
    """
    raise NotImplementedError("step 1: the mean of the tokens that are there")


# %% Step 2: centre and scale


def centre_and_scale(encoded_NHD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(centre (H, D), scale (H,)): what is taken away from the features, and what multiplies them.

    encoded_NHD holds H hidden states of N documents. The centre is the mean over the documents. The
    scale is one number for each hidden state: one over its spread. The spread is the root of the
    mean, over documents and features, of the squared distance from the centre. A hidden state that
    is the same for all documents, up to rounding (its variance is at most a millionth of its mean
    square), keeps the scale 1.
    """
    raise NotImplementedError("step 2: centre and scale of each hidden state")


# %% Step 3: what a head says before it has learnt anything


def log_odds(doc_P: np.ndarray, node_P: np.ndarray, n_documents: int, n_nodes: int) -> np.ndarray:
    """(C,): a bias for each node, the log odds of how many documents have a label below it.

    Pair p says that document doc_P[p] has a label below node node_P[p]. A document with several
    labels below a node counts once. Odds are those that have one over those that have none, each
    with half a document more: no logarithm of 0.
    """
    raise NotImplementedError("step 3: the log odds of each node")


# %% [markdown]
"""Questions to talk about

1. Why one scale for a hidden state, and not one for each feature? (Some encoders have features
   that are zero in every document. What would their scale be, and what happens when training wakes
   them up?)
2. Where do the heads alone stop learning, and why? What can the whole cascade change that they
   cannot?
3. Without heads first, the first steps of the loss are the highest of all trainings. What do the
   heads send into the encoder then?
"""

# %% Documents look alike before they are centred


def mean_cosine(x_ND: np.ndarray) -> float:
    """The mean cosine of two different documents."""
    unit_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    n = len(unit_ND)
    # The square of the sum has all pairs, and each document with itself.
    return float((np.sum(unit_ND.sum(axis=0) ** 2) - n) / (n * (n - 1)))


if __name__ == "__main__":
    check.need_all_steps(LAB, globals())
    runs.need(RUN, "data.npz", "tree.npz")
    data = stages.data.load(RUN)
    tree = stages.tree.load(RUN)
    settings = stages.train.Config(run=RUN, max_len=MAX_LEN, pooling="mean")
    settings = stages.model.settle(settings, stages.model.RECIPES, data.meta)
    model = stages.model.build(data, tree, settings).eval()
    rows = np.arange(min(LOOKED_AT, len(data.splits["train"])))
    batch = data.batch("train", rows, MAX_LEN)
    with torch.no_grad():
        output = model.encoder.backbone(
            input_ids=batch.ids_BT, attention_mask=batch.mask_BT, output_hidden_states=True
        )
    pooled = [mean_of_tokens(output.hidden_states[layer], batch.mask_BT) for layer in model.hidden]
    encoded_NHD = torch.stack(pooled, dim=1).numpy()
    centre_HD, scale_H = centre_and_scale(encoded_NHD)
    scaled_NHD = (encoded_NHD - centre_HD) * scale_H[:, None]
    print(f"{'hidden state':>12}   mean cosine of two documents: as it is, centred;   scale")
    for place, layer in enumerate(model.hidden):
        as_it_is = mean_cosine(encoded_NHD[:, place])
        centred = mean_cosine(scaled_NHD[:, place])
        print(f"{layer:12} {as_it_is:39.2f} {centred:8.2f} {scale_H[place]:10.2f}")

# %% The heads alone, all from the start, and the heads first


def train(name: str, **settings) -> tuple[runs.Reached, float]:
    """(what it reaches on validation, seconds) of a training in a folder of its own."""
    run = runs.new_run(RUN, name)
    start = time.perf_counter()
    stages.train.run(stages.train.Config(run=run, max_len=MAX_LEN, pooling="mean", **settings))
    return runs.reached(run), time.perf_counter() - start


if __name__ == "__main__":
    trained = {
        "heads alone": train("heads", head_epochs=HEAD_EPOCHS, epochs=0),
        "all from the start": train("all", head_epochs=0, epochs=EPOCHS),
        "heads first, then all": train("heads-first", head_epochs=HEAD_EPOCHS, epochs=EPOCHS),
    }
    print(f"{'validation, %':24} {'P@1':>6} {'P@5':>6} {'seconds':>8}")
    for name, (best, seconds) in trained.items():
        print(f"{name:24} {best.precision[0]:6.1f} {best.precision[2]:6.1f} {seconds:8,.0f}")
