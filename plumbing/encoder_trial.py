"""Stage 1 tries a pretrained encoder on two documents: whatever is wrong with it shows now, and not
in stage 4, after hours of other work.

The trial asks what training will ask: hidden states of every layer, one per token, finite, from
documents of different lengths; a gradient; as many tokens as the encoder says it has positions for;
and that the encoder can be made again from its description. What is unusual about an encoder, but
no fault, is said in a note.

Shapes   B documents of a batch, T tokens, D width of a hidden state
"""

from typing import Any

import torch
from torch import nn

from plumbing.encoders import (
    bare_encoder,
    description_of,
    positions,
    pretrained_encoder,
    usable,
    whole_reason,
    width_and_depth,
)
from plumbing.errors import UserError
from plumbing.memory import is_out_of_memory

LONGEST = 512  # tokens of the longest document that is tried
MEAN = {"pooling": "mean"}
SAME = 1e-2  # share of a feature's size by which padding may change it


def try_encoder(name: str, special: dict[str, Any], vocab_size: int) -> dict[str, str]:
    """{"pooling": what suits the encoder}, or {} for the usual 'first'. UserError if it is no good.

    special: prefix, suffix and pad, the ids that the tokeniser puts around a document.
    """
    try:
        whole = pretrained_encoder({"encoder": name, "vocab_size": vocab_size})
        backbone = usable(whole).float()
        check_shape_of_batch(backbone, special, vocab_size)
        check_gradient(backbone, special, vocab_size)
        check_longest(backbone, special, vocab_size)
        check_description(backbone)
        return {} if first_token_sees_all(name, backbone, special, vocab_size) else MEAN
    except (KeyboardInterrupt, UserError):
        raise
    except Exception as error:  # an encoder that reads sounds, images, ... may raise anything
        if is_out_of_memory(error):
            raise UserError(
                f"--encoder {name}: two documents do not fit into memory ({whole_reason(error)})"
            ) from error
        raise UserError(
            f"--encoder {name} cannot encode two documents here, and so not be trained "
            f"({whole_reason(error)})"
        ) from error


def document(special: dict[str, Any], vocab_size: int, length: int, first: int = 7) -> list[int]:
    """Ids of a document of `length` tokens, special ones included. `first`: where its ids begin."""
    around = len(special["prefix"]) + len(special["suffix"])
    kept_for = {*special["prefix"], *special["suffix"], special["pad"]}
    body = []
    token = first % vocab_size
    while len(body) < length - around:
        # RoBERTa counts positions by what is not padding, so no padding in the middle.
        if token not in kept_for or vocab_size <= len(kept_for):
            body.append(token)
        token = (token + 1) % vocab_size
    return [*special["prefix"], *body, *special["suffix"]]


def padded(documents: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids_BT, mask_BT), padded at the right, as stage 1 makes batches."""
    n_tokens = max(len(ids) for ids in documents)
    ids_BT = torch.full((len(documents), n_tokens), pad)
    mask_BT = torch.zeros(len(documents), n_tokens, dtype=torch.int64)
    for row, ids in enumerate(documents):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = 1
    return ids_BT, mask_BT


def hidden_states(
    backbone: nn.Module, documents: list[list[int]], pad: int
) -> tuple[torch.Tensor, ...]:
    """(B, T, D) of each layer, as stage 3 asks for them."""
    ids_BT, mask_BT = padded(documents, pad)
    output = backbone(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True)
    hidden = getattr(output, "hidden_states", None)
    if hidden is None:
        raise ValueError("it does not give its hidden states")
    return hidden


def check_shape_of_batch(backbone: nn.Module, special: dict[str, Any], vocab_size: int) -> None:
    """ValueError unless there is a finite state (B, T, D) for the embeddings and every layer.

    A note where the padding beside a document changes what the encoder says of it.
    """
    backbone.eval()
    width, depth = width_and_depth(backbone)
    pad = special["pad"]
    short = document(special, vocab_size, 9)
    with torch.no_grad():
        both = hidden_states(backbone, [document(special, vocab_size, 14), short], pad)
        alone = hidden_states(backbone, [short], pad)
    if len(both) != depth + 1:
        raise ValueError(f"it has {depth} layers, and gives {len(both)} hidden states")
    for layer, hidden_BTD in enumerate(both):
        shape = tuple(hidden_BTD.shape)
        if shape != (2, 14, width):
            raise ValueError(
                f"hidden state {layer} of 2 documents of 14 tokens has the shape {shape}, expected "
                f"one of width {width} for each token"
            )
        if not hidden_BTD.isfinite().all():
            raise ValueError(f"hidden state {layer} of two documents is not finite")
    last_D = both[-1][1, : len(short)].mean(0)
    difference = (last_D - alone[-1][0].mean(0)).abs().max()
    if difference > SAME * last_D.abs().max():
        print(
            "note: what this encoder says of a document depends on the padding beside it, so a "
            "document may get other labels in another batch"
        )


def check_gradient(backbone: nn.Module, special: dict[str, Any], vocab_size: int) -> None:
    """An error unless the encoder can learn."""
    backbone.train()
    documents = [document(special, vocab_size, 14), document(special, vocab_size, 9)]
    hidden = hidden_states(backbone, documents, special["pad"])
    sum(hidden_BTD.float().mean() for hidden_BTD in hidden).backward()
    backbone.zero_grad()
    backbone.eval()


def check_longest(backbone: nn.Module, special: dict[str, Any], vocab_size: int) -> None:
    """An error unless the encoder reads as many tokens as it says it does."""
    length = int(min(LONGEST, positions(backbone)))
    with torch.no_grad():
        hidden_states(backbone, [document(special, vocab_size, length)], special["pad"])


def check_description(backbone: nn.Module) -> None:
    """ValueError unless the encoder that stage 5 will make has the same weights."""
    weights = backbone.state_dict()
    try:
        with torch.device("meta"):
            again = usable(bare_encoder(description_of(backbone), weights)).state_dict()
    except UserError as error:  # speaks of model.pt, which is not there yet
        raise ValueError("its configuration does not make it again") from error.__cause__
    shapes = {key: weight.shape for key, weight in weights.items()}
    if shapes != {key: weight.shape for key, weight in again.items()}:
        raise ValueError("its configuration does not make the same encoder again")


def first_token_sees_all(
    name: str, backbone: nn.Module, special: dict[str, Any], vocab_size: int
) -> bool:
    """Whether the first token can stand for a document; a note where it cannot."""
    if not special["prefix"]:
        print(
            f"note: the tokeniser of {name} puts no special token before a document, so a "
            "document's feature is the mean of all tokens, unless you choose --pooling first"
        )
        return False
    # The same document but for its tokens behind the first: does the first one notice?
    n_special = len(special["prefix"])
    one = document(special, vocab_size, 12 + n_special, first=7)
    other = document(special, vocab_size, 12 + n_special, first=11)
    with torch.no_grad():
        last_BTD = hidden_states(backbone, [one, other], special["pad"])[-1]
    if torch.equal(last_BTD[0, 0], last_BTD[1, 0]):
        print(
            f"note: {name} reads from left to right, so its first token knows nothing of the "
            "others, and a document's feature is the mean of all tokens; leave --pooling as it is"
        )
        return False
    return True
