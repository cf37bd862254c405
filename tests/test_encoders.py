"""Encoders as people have them: each is trained, or stage 1 refuses it in one line with the reason.

tests/encoder_families.py does the same for all families of the transformers library.
"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, stages, write_jsonl
from safetensors.torch import load_file, save_file

from plumbing.encoders import usable
from plumbing.errors import UserError
from plumbing.store import load_npz

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
TRAINING = {
    "max_len": 32,
    "batch_size": 16,
    "topk": "2",
    "amp": "off",
    "head_epochs": 1,
    "epochs": 1,
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 440449768\n"


def rows(n: int, seed: int) -> list[dict]:
    """Documents made of the words of their label."""
    found = []
    for i in range(n):
        label = (5 * i + seed) % 6
        text = " ".join(f"word{label}x{j} noise{(i + j) % 5}" for j in range(3 + i % 3))
        found.append({"text": text, "labels": [f"label-{label}"]})
    return found


def write_corpus(folder, **more):
    """A corpus of 40 documents, and those of `more` in the splits of that name."""
    folder.mkdir(parents=True)
    for split, n in (("train", 40), ("val", 8), ("test", 8)):
        write_jsonl(folder / f"{split}.jsonl.gz", rows(n, len(split)) + more.get(split, []))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("encoders") / "corpus")


@pytest.fixture(scope="module")
def tokenizer():
    texts = [row["text"] for row in rows(40, 5)]
    return stages.data.train_tokenizer(lambda: texts, 150)


@pytest.fixture(scope="module")
def bare_tokenizer(tokenizer):
    """One that puts nothing around a text."""
    backend = tokenizer.backend_tokenizer.__class__.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    )


def save(folder, config, tokenizer):
    """The folder of a random encoder."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path, tokenizer):
    config = transformers.BertConfig(vocab_size=len(tokenizer), **SHAPE)
    return save(tmp_path / "bert", config, tokenizer)


def stage_1(encoder, corpus, tmp_path):
    """The record of data.npz."""
    run = tmp_path / "run"
    config = stages.data.Config(run=str(run), corpus=str(corpus), encoder=str(encoder))
    stages.data.run(config)
    return load_npz(run / "data.npz")[1]


def refused(encoder, corpus, tmp_path) -> str:
    """What stage 1 says when it refuses the encoder: one line, and it writes nothing."""
    with pytest.raises(UserError) as error:
        stage_1(encoder, corpus, tmp_path)
    said = str(error.value)
    assert "\n" not in said and said.startswith(f"--encoder {encoder}")
    assert not (tmp_path / "run" / "data.npz").exists()
    return said


def through_all_stages(encoder, corpus, tmp_path, **changes) -> np.ndarray:
    """The scores that stage 5 writes."""
    stage_1(encoder, corpus, tmp_path)
    run = str(tmp_path / "run")
    stages.tree.run(stages.tree.Config(run=run, levels="2"))
    stages.train.run(stages.train.Config(run=run, **TRAINING | changes))
    stages.eval.run(stages.eval.Config(run=run, k=3))
    return load_npz(tmp_path / "run" / "predictions.npz")[0]["scores"]


# 1. Encoders that work.


def configs(n_words: int) -> dict:
    """A few families that are unlike BERT, small."""
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    bart = {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    }
    return {
        "T5": transformers.T5Config(vocab_size=n_words, **t5),
        "BART": transformers.BartConfig(vocab_size=n_words, **bart),
        "LayoutLM": transformers.LayoutLMConfig(vocab_size=n_words, **SHAPE),
        "XLNet": transformers.XLNetConfig(
            vocab_size=n_words, d_model=16, n_layer=2, n_head=2, d_inner=32
        ),
        "GPT-2": transformers.GPT2Config(
            vocab_size=n_words, n_embd=16, n_layer=2, n_head=2, n_positions=40
        ),
    }


@pytest.mark.parametrize("family", ["T5", "BART", "LayoutLM", "XLNet", "GPT-2"])
def test_encoders_with_a_decoder_a_pooler_or_no_limit_are_trained(
    family, tokenizer, corpus, tmp_path
):
    encoder = save(tmp_path / "encoder", configs(len(tokenizer))[family], tokenizer)
    scores = through_all_stages(encoder, corpus, tmp_path)
    assert np.isfinite(scores).all() and len(np.unique(scores)) > 3


def test_of_an_encoder_with_a_decoder_the_encoder_is_kept_alone(tokenizer):
    whole = transformers.AutoModel.from_config(configs(len(tokenizer))["BART"]).eval()
    kept = stages.model.Encoder(whole, "mean", 30)
    assert not any("decoder" in name for name in kept.state_dict())
    ids = torch.arange(5, 15)[None]
    mask = torch.ones_like(ids)
    expected = whole.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.mean(1)
    torch.testing.assert_close(kept(ids, mask, {2})[2], expected)
    assert usable(kept.backbone) is kept.backbone


def test_the_first_token_stands_for_the_document_only_where_it_sees_the_others(
    tokenizer, bare_tokenizer, bert, corpus, tmp_path, capsys
):
    assert "pooling" not in stage_1(bert, corpus, tmp_path)
    assert "note:" not in capsys.readouterr().out
    gpt2 = save(tmp_path / "gpt2", configs(len(tokenizer))["GPT-2"], tokenizer)
    assert stage_1(gpt2, corpus, tmp_path)["pooling"] == "mean"
    assert "reads from left to right" in capsys.readouterr().out
    bare_tokenizer.save_pretrained(bert)
    assert stage_1(bert, corpus, tmp_path)["pooling"] == "mean"
    assert "puts no special token before a document" in capsys.readouterr().out
    # What stage 1 has found is the default of stage 4, and a flag decides otherwise.
    data = stages.data.load(tmp_path / "run")
    for given, expected in ((None, "mean"), ("first", "first")):
        config = stages.train.Config(pooling=given)
        assert stages.train.settle(config, stages.model.RECIPES, data.meta).pooling == expected


def test_padding_that_changes_a_document_is_noted(tokenizer, corpus, tmp_path, capsys):
    """FNet mixes all tokens, those of the padding, too."""
    shape = {key: value for key, value in SHAPE.items() if key != "num_attention_heads"}
    config = transformers.FNetConfig(vocab_size=len(tokenizer), **shape)
    stage_1(save(tmp_path / "fnet", config, tokenizer), corpus, tmp_path)
    assert "depends on the padding beside it" in capsys.readouterr().out


def test_a_few_missing_weights_are_named(bert, corpus, tmp_path, capsys):
    path = bert / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layer.1.output.LayerNorm.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    stage_1(bert, corpus, tmp_path)
    said = capsys.readouterr().out
    assert "1 of 37 weights are not in its files" in said
    assert "encoder.layer.1.output.LayerNorm.bias" in said


def test_documents_of_which_no_token_is_left(bare_tokenizer, bert, tmp_path, capsys):
    """The tokeniser puts nothing around them, so nothing at all is left."""
    bare_tokenizer.save_pretrained(bert)
    empty = [{"text": "\u200b\u0001", "labels": ["label-0"]}]
    corpus = write_corpus(tmp_path / "odd", train=empty, test=[{"text": "", "labels": []}])
    scores = through_all_stages(bert, corpus, tmp_path)
    assert np.isfinite(scores).all()
    said = capsys.readouterr().out
    assert "1 train documents of which no token is left, kept" in said


# 2. Encoders that do not: what is changed in the folder of one that works, and what is said.


def change_json(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename_weights(folder, prefix: str) -> None:
    path = folder / "model.safetensors"
    weights = {prefix + name: weight for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def spoil_a_weight(folder) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["encoder.layer.0.output.dense.bias"][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


def lose_a_shard(folder) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:n_bytes])


def move_into(folder, name: str) -> None:
    (folder / name).mkdir()
    for path in list(folder.iterdir()):
        if path.is_file():
            path.rename(folder / name / path.name)


BROKEN = {
    "names of DataParallel": (
        lambda folder: rename_weights(folder, "module."),
        "37 of the 37 weights of BertModel are not in its files.*instead: module.embeddings",
    ),
    "other shapes": (
        lambda folder: change_json(folder / "config.json", hidden_size=32),
        "weights of BertModel are not in its files with these shapes",
    ),
    "more layers than there are": (
        lambda folder: change_json(folder / "config.json", num_hidden_layers=4),
        "32 of the 69 weights of BertModel are not in its files",
    ),
    "a pointer of git-lfs": (
        lambda folder: (folder / "model.safetensors").write_text(POINTER),
        "cannot be loaded: model.safetensors: no file, but a pointer of git-lfs.*git lfs pull",
    ),
    "a pointer in place of the tokeniser": (
        lambda folder: (folder / "tokenizer.json").write_text(POINTER),
        "tokenizer.json: no file, but a pointer of git-lfs",
    ),
    "half of the weights' file": (
        lambda folder: cut(folder / "model.safetensors", 9000),
        "cannot be loaded .*incomplete metadata",
    ),
    "a shard that is not there": (lose_a_shard, "cannot be loaded .*model-00001-of-00001"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "cannot be loaded .*no file named model.safetensors",
    ),
    "half of config.json": (
        lambda folder: cut(folder / "config.json", 100),
        "cannot be loaded .*config.json",
    ),
    "another kind of model": (
        lambda folder: change_json(folder / "config.json", model_type="my-own"),
        "cannot be loaded .*model type `my-own`",
    ),
    "one folder too high": (
        lambda folder: move_into(folder, "0_Transformer"),
        "the encoder is in a folder in it: --encoder .*0_Transformer",
    ),
    "a weight that is no number": (spoil_a_weight, "hidden state 1 of two documents is not finite"),
    "fewer positions than it says": (
        lambda folder: change_json(folder / "config.json", max_position_embeddings=80),
        "weights of BertModel are not in its files with these shapes",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_folders_that_are_refused_in_stage_1(fault, bert, corpus, tmp_path):
    breaks, said = BROKEN[fault]
    breaks(bert)
    assert re.search(said, refused(bert, corpus, tmp_path))


def test_a_tokeniser_that_needs_a_package(bert, corpus, tmp_path):
    """spm.model alone, as deberta-v3-base is published; a Japanese BERT."""
    (bert / "tokenizer.json").rename(bert / "spm.model")
    (bert / "tokenizer_config.json").write_text('{"vocab_type": "spm"}')
    change_json(bert / "config.json", model_type="deberta-v2")
    assert "packages sentencepiece and protobuf" in refused(bert, corpus, tmp_path)
    (bert / "spm.model").unlink()
    (bert / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    kind = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
    (bert / "tokenizer_config.json").write_text(json.dumps(kind))
    assert "You need to install fugashi" in refused(bert, corpus, tmp_path)


def test_a_file_and_a_model_that_reads_no_text(tokenizer, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file; name the folder" in refused(tmp_path / "file", corpus, tmp_path)
    shape = {key: SHAPE[key] for key in list(SHAPE)[:4]}
    config = transformers.ViTConfig(image_size=8, patch_size=4, **shape)
    said = refused(save(tmp_path / "vit", config, tokenizer), corpus, tmp_path)
    assert "cannot encode two documents here" in said


def test_an_encoder_whose_layers_merge_tokens(tokenizer, corpus, tmp_path):
    blocks = {"block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 1}
    sizes = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}
    config = transformers.FunnelConfig(vocab_size=len(tokenizer), **blocks, **sizes)
    config.architectures = ["FunnelModel"]
    said = refused(save(tmp_path / "funnel", config, tokenizer), corpus, tmp_path)
    assert "hidden state" in said


# 3. All families.


def test_a_sample_of_all_families():
    """python tests/encoder_families.py tries all of them."""
    some = ["albert", "mt5", "led", "squeezebert", "clip", "opt"]
    command = [sys.executable, str(ROOT / "tests" / "encoder_families.py"), *some]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "6 families; 1 refused, 5 works" in done.stdout
