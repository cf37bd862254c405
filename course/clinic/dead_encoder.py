"""A small BERT with random weights and with dead features, as some published encoders have them.

A feature is dead if it is zero for every document. The last layer of a BERT ends with a
normalisation, which multiplies every feature by a number of its own, its gain. Where the gain is
zero, the feature is dead. all-MiniLM-L6-v2, a popular small encoder, has such features.
"""

from importlib import import_module
from pathlib import Path

import torch

from data import formats

data_stage = import_module("01_data")

WIDTH = 64
DEAD = (3, 17, 40)  # features of the last layer


def make_dead_encoder(corpus: Path, folder: Path, vocab: int = 3000) -> None:
    """Write the encoder and a tokeniser, trained on the corpus, into `folder`."""
    from transformers import BertConfig, BertModel

    # 1. The tokeniser of stage 1.
    documents = list(formats.open_corpus(corpus).documents["train"]())

    def texts() -> list[str]:
        return [document.text for document in documents]

    tokenizer = data_stage.train_tokenizer(texts, vocab)
    tokenizer.save_pretrained(folder)
    # 2. Two layers with random weights.
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
    )
    model = BertModel(config)
    # 3. Some features die.
    normalisation = model.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        normalisation.weight[list(DEAD)] = 0.0
    model.save_pretrained(folder)
