"""Encoders of the transformers library, made safely: from the hub, a folder, or a stored
description.

The library is imported inside the functions that need it. Its models take longer to import than
torch and everything else together, and much has no need of them.
"""

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plumbing.errors import UserError
from plumbing.memory import is_out_of_memory
from plumbing.store import anew

# Parts of a configuration that make the library fetch code, or change how it computes.
UNSAFE = ("auto_map", "attn_implementation", "quantization_config")
SMALL = 2**24  # parameters that nobody need mind, in buffers for example
MOST_MISSING = 0.1  # share of an encoder's weights that may be missing in its files


# 1. From a folder or from the hub.


def pretrained(kind: str, name: str, **how) -> Any:
    """A tokeniser ("AutoTokenizer") or a model ("AutoModel"), from a folder or from the hub."""
    import transformers

    try:
        with without_log():
            return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False, **how)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a missing package, a damaged file: the library raises anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"--encoder {name}: {why_not(name, error)}") from error


@contextlib.contextmanager
def without_log() -> Iterator[None]:
    """In here the library logs errors alone: what it notes besides, we say ourselves."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def whole_reason(error: BaseException) -> str:
    """All that an error says, in one line."""
    said = " ".join(str(error).split())
    if len(said) > 1000:  # the library may list all of its models
        said = said[:1000] + " ..."
    # An error such as KeyError('bert') says little without its name.
    name = type(error).__name__
    return f"{name}: {said}" if said else name


def why_not(name: str, error: BaseException) -> str:
    """Why an encoder cannot be loaded, with what we see in its folder, in one line."""
    reason = whole_reason(error)
    folder = Path(name)
    if folder.is_dir():
        seen = look_into(folder)
        return f"cannot be loaded: {seen} ({reason})" if seen else f"cannot be loaded ({reason})"
    if folder.exists():
        return f"is a file; name the folder that it is in ({reason})"
    if isinstance(error, OSError):
        return f"no such folder, and not to be had from the hub ({reason})"
    return f"cannot be loaded ({reason})"


def look_into(folder: Path) -> str:
    """What is wrong with the folder of an encoder, if that can be seen."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    # 1. A folder that was cloned without git-lfs: big files are a few lines of text.
    pointers = []
    for path in files:
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                pointers.append(path.name)
    if pointers:
        return (
            f"{', '.join(pointers)}: no file, but a pointer of git-lfs to one; "
            "run `git lfs pull` in the folder"
        )
    # 2. A folder of the library sentence-transformers, which keeps the encoder in a folder in it.
    if not (folder / "config.json").exists():
        for config in sorted(folder.glob("*/config.json")):
            inside = config.parent
            if any(inside.glob("*.safetensors")) or any(inside.glob("*.bin")):
                return f"the encoder is in a folder in it: --encoder {inside}"
        return "it has no config.json"
    # 3. A tokeniser that only one library can read.
    has_fast = (folder / "tokenizer.json").exists()
    models = [path.name for path in files if path.suffix == ".model"]
    if models and not has_fast and importlib.util.find_spec("sentencepiece") is None:
        return (
            f"its tokeniser, {models[0]}, needs the packages sentencepiece and protobuf; install "
            "them, or save the tokeniser as tokenizer.json where they are"
        )
    return ""


def pretrained_encoder(meta: dict, say: Callable[[str], None] = print) -> nn.Module:
    """The encoder that data.npz was made for, all of whose weights are there.

    say(note) is called where a few weights are missing. UserError where more are, and where the
    encoder knows fewer tokens than data.npz has.
    """
    name = meta["encoder"]
    # A weight of another shape than the model's counts as missing. We say it in our own words.
    backbone, found = pretrained(
        "AutoModel", name, output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_weights(name, backbone, found, say)
    n_known = tokens_known(backbone)
    if n_known < meta["vocab_size"]:
        raise UserError(
            f"--encoder {name} knows {n_known:,} tokens, its tokeniser has "
            f"{meta['vocab_size']:,}: they do not belong together. If the folder has changed since "
            "01_data.py, run that again"
        )
    return backbone


def tokens_known(backbone: nn.Module) -> float:
    """Rows of the table of word embeddings; infinite where there is no table."""
    try:
        table = backbone.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return math.inf
    return getattr(table, "num_embeddings", math.inf)


def check_weights(name: str, backbone: nn.Module, found: dict, say: Callable[[str], None]) -> None:
    """UserError unless nearly all weights that are read were in the encoder's files.

    The library leaves what it does not find at random numbers, and goes on. `found` is its report.
    """
    wrong_shape = {key for key, *_ in found["mismatched_keys"]}
    absent = set(found["missing_keys"]) | wrong_shape
    # Of an encoder with a decoder only the encoder is read, and never a pooler.
    read = {id(parameter) for parameter in usable(backbone).parameters()}
    names = []
    missing = []
    for key, parameter in backbone.named_parameters(remove_duplicate=False):
        if id(parameter) in read:
            names.append(key)
            if key in absent:
                missing.append(key)
    if not missing:
        return
    some = ", ".join(missing[:3])
    # Too many: the files are of another model, or their names begin otherwise.
    if wrong_shape or len(missing) > MOST_MISSING * len(names):
        there = ", ".join(sorted(found["unexpected_keys"])[:3])
        has = f"; what they have instead: {there}, ..." if there else ""
        other = "with these shapes " if wrong_shape else ""
        raise UserError(
            f"--encoder {name}: {len(missing)} of the {len(names)} weights of "
            f"{type(backbone).__name__} are not in its files {other}({some}, ...{has}). They would "
            "be random numbers; save the encoder by save_pretrained of the class that config.json "
            "names"
        )
    say(
        f"note: --encoder {name}: {len(missing)} of {len(names)} weights are not in its files and "
        f"begin as random numbers: {some}{', ...' if len(missing) > 3 else ''}"
    )


# 2. From a stored description.


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
        # Make it without memory first, and count. A decoder is made, too, and thrown away.
        with torch.device("meta"):
            model = AutoModel.from_config(shape)
        claimed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        there = sum(weight.numel() for weight in weights.values())
        times = 2 if usable(model) is model else 4
        if claimed > times * there + SMALL:
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


# 3. The part that reads documents.


class NoPooler(nn.Module):
    """In place of an extra layer on the last hidden state, which nothing reads. It has no weights.

    Some encoders call their pooler whether there is one or not, and some work on with what it
    gives, so it cannot be None, and gives back what it gets.
    """

    def forward(self, hidden: Any = None, *args, **more) -> Any:
        return hidden


def usable(backbone: nn.Module) -> nn.Module:
    """The part of an encoder that reads documents: without a decoder, and without a pooler.

    A second call changes nothing.
    """
    is_whole = getattr(backbone.config, "is_encoder_decoder", False)
    if is_whole and getattr(backbone, "decoder", None) is not None:
        whole_config = backbone.config
        backbone = backbone.get_encoder()
        backbone.whole_config = whole_config
    if isinstance(getattr(backbone, "pooler", None), nn.Module):
        backbone.pooler = NoPooler()
    # A model that writes text would keep what it needs for the next word, in every batch.
    if getattr(backbone.config, "use_cache", False) and not hasattr(backbone.config, "is_decoder"):
        backbone.config.use_cache = False
    # The library asks a GPU in every batch whether there is padding, and waits: not here.
    return without_waiting(backbone)


def description_of(backbone: nn.Module) -> dict:
    """The configuration from which `bare_encoder` makes it again, with the decoder it had."""
    return getattr(backbone, "whole_config", backbone.config).to_dict()


def width_and_depth(backbone: nn.Module) -> tuple[int, int]:
    """(width of a hidden state, number of the last hidden state)."""
    config = backbone.config
    if not hasattr(config, "hidden_size") and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return config.hidden_size, config.num_hidden_layers


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
    if not isinstance(most, (int, float)) or most < 0:  # -1 says in XLNet that there is no limit
        most = math.inf
    embeddings = getattr(backbone, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    first = 0 if padding is None else padding + 1
    return most - first
