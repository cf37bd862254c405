"""Encoders of the transformers library, made safely: from the hub, a folder, or a stored
description.

The library is imported inside the functions that need it. Its models take longer to import than
torch and everything else together, and much has no need of them.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plumbing.errors import UserError
from plumbing.store import anew

# Parts of a configuration that make the library fetch code, or change how it computes.
UNSAFE = ("auto_map", "attn_implementation", "quantization_config")
SMALL = 2**24  # parameters that nobody need mind, in buffers for example


def pretrained(kind: str, name: str) -> Any:
    """A tokeniser ("AutoTokenizer") or a model ("AutoModel"), from a folder or from the hub."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--encoder {name}: no such folder, and not to be had from the hub ({reason})"
        ) from error


def pretrained_encoder(meta: dict) -> nn.Module:
    """The encoder that data.npz was made for. UserError when it knows fewer tokens."""
    backbone = pretrained("AutoModel", meta["encoder"])
    n_known = backbone.get_input_embeddings().num_embeddings
    if n_known < meta["vocab_size"]:
        raise UserError(
            f"--encoder {meta['encoder']} knows {n_known:,} tokens, data.npz has "
            f"{meta['vocab_size']:,}: it is not the encoder that data.npz was made for; "
            "run 01_data.py again"
        )
    return backbone


def bare_encoder(config: dict, weights: dict[str, torch.Tensor]) -> nn.Module:
    """An encoder from its stored configuration, without weights; needs no hub.

    The configuration may come from anywhere. Whatever makes the library fetch code is left out, and
    UserError is raised before an encoder is made that is bigger than the `weights` that belong to
    it.
    """
    from transformers import AutoConfig, AutoModel

    safe = {}
    for key, value in config.items():
        if not key.startswith("_") and key not in UNSAFE:
            safe[key] = value
    kind = str(safe.pop("model_type", ""))
    if not kind:
        raise UserError(
            "model.pt: its encoder is not of the transformers library; "
            "run the script that it was trained with"
        )
    try:
        check_depth(safe, len(weights))
        shape = AutoConfig.for_model(kind, **safe)
        # Make it without memory first, and count.
        with torch.device("meta"):
            model = AutoModel.from_config(shape)
        claimed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        there = sum(weight.numel() for weight in weights.values())
        if claimed > 2 * there + SMALL:
            raise ValueError(f"{claimed:,} parameters")
        return AutoModel.from_config(shape)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise UserError(
            "model.pt: its encoder's configuration does not fit its weights "
            f"({error}); train it again"
        ) from error


def check_own_encoder(
    encoder: nn.Module, layers: set[int], make_again: Callable[[dict, dict], nn.Module]
) -> None:
    """TypeError unless a fork's encoder is what EncoderProtocol in 03_model.py says.

    make_again(description, weights) is what loading a trained model will do.
    """
    name = type(encoder).__name__
    for member in ("width", "depth", "table", "description"):
        if not hasattr(encoder, member):
            raise TypeError(f"{name} has no {member}: see EncoderProtocol in 03_model.py")
    # Two documents of three tokens.
    ids_BT = torch.zeros(2, 3, dtype=torch.int64)
    with torch.no_grad():
        features = encoder(ids_BT, torch.ones_like(ids_BT), layers)
    for layer in layers:
        shape = tuple(features[layer].shape)
        if shape != (2, encoder.width):
            raise TypeError(
                f"{name}: hidden state {layer} of 2 documents has the shape {shape}, expected one "
                f"feature a document, (2, {encoder.width}): see EncoderProtocol in 03_model.py"
            )
    weights = encoder.state_dict()
    again = make_again(encoder.description(), weights).state_dict()
    shapes = {key: weight.shape for key, weight in weights.items()}
    if shapes != {key: weight.shape for key, weight in again.items()}:
        raise TypeError(f"make_encoder makes another {name} from its description()")


def check_depth(config: dict, n_weights: int) -> None:
    """ValueError where a configuration asks for more layers than there are weights.

    The number of layers has many names: num_hidden_layers, n_layers, ...
    """
    for key, value in config.items():
        if not key.endswith("layers") or isinstance(value, list) or value is None:
            continue
        if not isinstance(value, int) or value > n_weights:
            raise ValueError(f"{value} layers")


def set_weights(
    model: nn.Module, weights: dict[str, torch.Tensor], path: Path, made_by: str
) -> None:
    """Load weights. UserError where they belong to another model: a variant, for example."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{path} was made by {made_by}, and its weights are not those of this model "
            f"({reason:.80}); {anew(path)}"
        ) from error


def without_waiting(backbone: nn.Module) -> nn.Module:
    """The same encoder, with an attention mask for every batch.

    By itself the library asks the device first whether anything is padded. A GPU's queue would run
    empty meanwhile.
    """
    if backbone.config._attn_implementation != "sdpa":
        return backbone
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def always_a_mask(*args, **kwargs):
        return sdpa_mask(*args, **kwargs | {"allow_is_bidirectional_skip": False})

    AttentionInterface.register("sdpa_masked", sdpa_attention_forward)
    AttentionMaskInterface.register("sdpa_masked", always_a_mask)
    backbone.set_attn_implementation("sdpa_masked")
    return backbone


def positions(backbone: nn.Module) -> float:
    """The most tokens of a document that the encoder has positions for.

    RoBERTa and MPNet count positions from behind their padding id.
    """
    most = getattr(backbone.config, "max_position_embeddings", None) or math.inf
    embeddings = getattr(backbone, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    first = 0 if padding is None else padding + 1
    return most - first
