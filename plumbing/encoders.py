"""Encoders of the transformers library: made safely, from the hub, from a folder, or from a stored configuration.

The library is imported inside the functions that need it: its models take longer to import than torch and everything
else together, and much has no need of them.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plumbing.errors import UserError
from plumbing.store import anew


def pretrained(kind: str, name: str) -> Any:
    """A tokeniser ("AutoTokenizer") or a model ("AutoModel") from a local folder or from the hub."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--encoder {name}: no such folder, and not to be had from the hub ({reason})") from error


def pretrained_encoder(meta: dict) -> nn.Module:
    """The encoder that data.npz was made for. UserError when its vocabulary is smaller than that of the token ids."""
    backbone = pretrained("AutoModel", meta["encoder"])
    n = backbone.get_input_embeddings().num_embeddings
    if n < meta["vocab_size"]:
        raise UserError(f"--encoder {meta['encoder']} knows {n:,} tokens, data.npz has {meta['vocab_size']:,}: it is "
                        "not the encoder that data.npz was made for; run 01_data.py again")
    return backbone


def bare_encoder(config: dict, weights: dict[str, torch.Tensor]) -> nn.Module:
    """An encoder from its stored configuration, without weights; needs no hub. The configuration may come from
    anywhere: whatever makes the library fetch code is left out, and UserError is raised before an encoder is made that
    is bigger than the `weights` that belong to it."""
    from transformers import AutoConfig, AutoModel

    safe = {key: value for key, value in config.items()
            if not key.startswith("_") and key not in ("auto_map", "attn_implementation", "quantization_config")}
    kind = str(safe.pop("model_type", ""))
    try:
        # Under whatever name: num_hidden_layers, n_layers, ...
        layers = [value for key, value in safe.items() if key.endswith("layers") and not isinstance(value, list)]
        if any(value is not None and (not isinstance(value, int) or value > len(weights)) for value in layers):
            raise ValueError(f"{layers} layers")
        shape = AutoConfig.for_model(kind, **safe)
        with torch.device("meta"):
            model = AutoModel.from_config(shape)
            claimed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        if claimed > 2 * sum(weight.numel() for weight in weights.values()) + 2**24:
            raise ValueError(f"{claimed:,} parameters")
        return AutoModel.from_config(shape)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"model.pt: its encoder's configuration does not fit its weights ({error}); train it again"
                        ) from error


def set_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path, made_by: str) -> None:
    """UserError where the weights are not those of such a model: a variant's, say."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} was made by {made_by}, and its weights are not those of this model "
                        f"({str(error).splitlines()[-1].strip():.80}); {anew(path)}") from error


def without_waiting(backbone: nn.Module) -> nn.Module:
    """The same encoder, with an attention mask for every batch. By itself the library asks the device first whether
    anything is padded, and a GPU's queue runs empty meanwhile."""
    if backbone.config._attn_implementation == "sdpa":
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register("sdpa_masked", sdpa_attention_forward)
        AttentionMaskInterface.register("sdpa_masked", lambda *args, **kwargs: sdpa_mask(
            *args, **kwargs | {"allow_is_bidirectional_skip": False}))
        backbone.set_attn_implementation("sdpa_masked")
    return backbone


def positions(backbone: nn.Module) -> float:
    """Most tokens of a document that the encoder has positions for; RoBERTa and MPNet count from behind their padding
    id."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    first = -1 if getattr(table, "padding_idx", None) is None else table.padding_idx
    return (getattr(backbone.config, "max_position_embeddings", None) or math.inf) - first - 1
