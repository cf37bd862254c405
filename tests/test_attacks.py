"""Files that somebody made up to run code, or to take all the memory: each attack is tried, and
refused.
"""

import gzip
import io
import json
import pickle
import resource
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, make_corpus, stages, write_jsonl

from data import formats
from plumbing.encoders import bare_encoder
from plumbing.errors import UserError
from plumbing.store import FORMAT, digest, load_npz, load_pt


class Attack:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def npz(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def header(shape: tuple, kind: str = "<f8", version: int = 1, pad: int = 0) -> bytes:
    text = (
        str({"descr": kind, "fortran_order": False, "shape": shape}).encode() + b" " * pad + b"\n"
    )
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", len(text))
        + text
    )


def saved(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("what", ["object array", "object meta", "pickle instead of a zip"])
def test_a_pickle_in_an_npz_is_not_executed(tmp_path, what):
    attack = np.array([Attack(tmp_path / "executed")], dtype=object)
    if what == "pickle instead of a zip":
        (tmp_path / "data.npz").write_bytes(pickle.dumps(attack))
    else:
        members = {"ids": saved(attack), "meta": saved(np.array("{}"))}
        npz(tmp_path / "data.npz", **members if what == "object array" else {"meta": saved(attack)})
    with pytest.raises(UserError, match="data.npz cannot be read"):
        stages.data.load(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_in_a_pt_is_not_executed(tmp_path, zipped):
    content = {"meta": "{}", "model": Attack(tmp_path / "executed")}
    for name in ("model.pt", "checkpoint.pt"):
        torch.save(content, tmp_path / name) if zipped else (tmp_path / name).write_bytes(
            pickle.dumps(content)
        )
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            load_pt(tmp_path / name)
    assert not (tmp_path / "executed").exists()


BOMBS = {
    "an array of 8 TB in a header": lambda: {"ids": header((10**12,))},
    "an array of 8 TB in a header of version 2": lambda: {"ids": header((10**12,), version=2)},
    "a header of 100 MB": lambda: {"ids": header((1,), version=2, pad=10**8)},
    "a shape whose product overflows": lambda: {"ids": header((2**33, 2**33))},
    "a negative shape": lambda: {"ids": header((-1, -8))},
    "no array at all": lambda: {"ids": b"#!/bin/sh"},
}


@pytest.mark.parametrize("members", BOMBS.values(), ids=BOMBS)
def test_what_a_small_npz_claims_is_not_allocated(tmp_path, members):
    npz(tmp_path / "data.npz", **members(), meta=saved(np.array("{}")))
    before = peak()
    with pytest.raises(UserError, match="data.npz cannot be read"):
        load_npz(tmp_path / "data.npz")
    assert peak() - before < 2**28


def test_compressed_and_overlapping_members_are_refused(tmp_path):
    for name in ("data.npz", "model.pt"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("ids.npy", bytes(2**28))
        assert (tmp_path / name).stat().st_size < 2**20
        before = peak()
        with pytest.raises(
            UserError, match=f"{name} cannot be read .it claims to hold more than the file does"
        ):
            (load_npz if name == "data.npz" else load_pt)(tmp_path / name)
        assert peak() - before < 2**27
    # Many entries of the directory that all lead to the same bytes.
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("a.npy", saved(np.zeros(2**16)))
        archive.infolist().extend(archive.infolist() * 500)
        archive.filelist *= 500
    with pytest.raises(UserError, match="it claims to hold more than the file does"):
        load_npz(tmp_path / "data.npz")


def nested(depth: int, width: int):
    value = "x"
    for _ in range(depth):
        value = [value] * width
    return value


class Block:
    """Is loaded as bytearray(2**33), a name that torch's safe unpickler calls."""

    def __reduce__(self):
        return bytearray, (2**33,)


TENSORS = {
    "a tensor of 8 TB in one number": lambda: torch.zeros(1).expand(2**41),
    "a tensor that exists in no memory": lambda: torch.zeros(2**41, device="meta"),
    "a list of lists of lists ...": lambda: nested(12, 10),
    "a list that holds itself": lambda: (lambda a: a.append(a) or a)([]),
    "a sparse tensor": lambda: torch.ones(1).to_sparse(),
    "a block of bytes": lambda: bytearray(10),
    "a block of 8 GB of bytes": lambda: Block(),
}


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_what_a_small_pt_claims_is_not_allocated(tmp_path, make):
    record = json.dumps({"format": FORMAT, "made_from": {}, "sha256": ""})
    torch.save({"meta": record, "model": make()}, tmp_path / "model.pt")
    before = peak()
    with pytest.raises(UserError, match="model.pt"):
        load_pt(tmp_path / "model.pt")
    assert peak() - before < 2**28


def test_a_storage_that_claims_more_than_its_record_holds(tmp_path):
    """The number of elements in the pickle of an honest file is made a million times bigger."""
    torch.save({"meta": "{}", "w": torch.zeros(3, 7)}, tmp_path / "honest.pt")
    with (
        zipfile.ZipFile(tmp_path / "honest.pt") as honest,
        zipfile.ZipFile(tmp_path / "model.pt", "w") as forged,
    ):
        for member in honest.infolist():
            content = honest.read(member)
            if member.filename.endswith("data.pkl"):
                assert content.count(b"K\x15") == 1  # BININT1 21
                content = content.replace(b"K\x15", b"J" + struct.pack("<i", 21 * 10**7))
            forged.writestr(member.filename, content)
    before = peak()
    with pytest.raises(UserError, match="model.pt"):
        load_pt(tmp_path / "model.pt")
    assert peak() - before < 2**28


@pytest.mark.parametrize(
    "record",
    [
        "[" * 10**5,
        '"a"',
        "7",
        "null",
        '{"format": 2}',
        '{"format": 2, "made_from": 1}',
        '{"format": {}, "made_from": {}}',
        "9" * 5000,
    ],
)
def test_records_that_are_none(tmp_path, record):
    npz(tmp_path / "data.npz", meta=saved(np.array(record)), ids=saved(np.zeros(3)))
    torch.save({"meta": record}, tmp_path / "model.pt")
    for load, name in ((load_npz, "data.npz"), (load_pt, "model.pt")):
        with pytest.raises(UserError, match=f"{name} (carries no record|has format)"):
            load(tmp_path / name)


def test_a_neighbour_is_not_unpacked_to_read_its_record(tmp_path):
    """What a model was made from is looked up in tree.npz, which may be a bomb itself."""
    with zipfile.ZipFile(tmp_path / "tree.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("meta.npy", header((2**28,), "<U1") + bytes(2**30))
    meta = {"format": FORMAT, "made_from": {"tree.npz": "0" * 64}}
    torch.save({"meta": json.dumps(meta | {"sha256": digest(meta, {})})}, tmp_path / "model.pt")
    before = peak()
    with pytest.raises(
        UserError,
        match="tree.npz with sha256 0+, found something unreadable; run: python 04_train.py",
    ):
        load_pt(tmp_path / "model.pt")
    assert peak() - before < 2**27


def forge(path: Path, change) -> None:
    """Change the arrays of an artifact, and put a right checksum beside them."""
    arrays, meta = load_npz(path)
    change(arrays, meta)
    del meta["sha256"]
    np.savez(path, meta=np.array(json.dumps(meta | {"sha256": digest(meta, arrays)})), **arrays)


FORGED = {
    "67 million clusters": (
        "tree.npz",
        lambda a, m: a.update(levels=np.array([2**26])),
        "67108864 clusters > 40",
    ),
    "no cluster": (
        "tree.npz",
        lambda a, m: a.update(levels=np.array([0])),
        "expected rising numbers",
    ),
    "a label far out": (
        "tree.npz",
        lambda a, m: a["slot_to_label"].__setitem__(0, 10**6),
        "are no permutation",
    ),
    "a million million tokens": (
        "data.npz",
        lambda a, m: m.update(vocab_size=2**40),
        "has no 1099511627776 tokens",
    ),
    "a label out of range": (
        "data.npz",
        lambda a, m: a["train_labels"].__setitem__(3, 40),
        "train_labels is not what",
    ),
    "a token out of range": (
        "data.npz",
        lambda a, m: a["test_ids"].__setitem__(3, 60000),
        "test_ids is not what",
    ),
    "offsets far out": (
        "data.npz",
        lambda a, m: a["val_offsets"].__setitem__(-1, 2**40),
        "val_ids is not what its",
    ),
    "offsets that fall": (
        "data.npz",
        lambda a, m: a["val_label_offsets"].__setitem__(1, -5),
        "val_labels is not what",
    ),
}


@pytest.mark.parametrize(("file", "change", "said"), FORGED.values(), ids=FORGED)
def test_arrays_that_do_not_fit_together_are_refused(prepared, file, change, said):
    (prepared / "tree.npz").unlink() if file == "data.npz" else None
    forge(prepared / file, change)
    before = peak()
    with pytest.raises(UserError, match=said):
        (stages.data if file == "data.npz" else stages.tree).load(prepared)
    assert peak() - before < 2**28


def test_a_record_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "run").mkdir()
    for source in ("../secret", "/etc/passwd", "run"):
        meta = {"format": FORMAT, "made_from": {source: "0" * 64}}
        content = {"ids": np.zeros(3)}
        record = json.dumps(meta | {"sha256": digest(meta, content)})
        np.savez(tmp_path / "run" / "data.npz", meta=np.array(record), **content)
        with pytest.raises(UserError, match="found no artifact"):
            load_npz(tmp_path / "run" / "data.npz")


def test_a_link_laid_for_the_temporary_file_is_not_followed(tmp_path, prepared):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (prepared / "tree.npz.partial").symlink_to(victim)
    stages.tree.run(stages.tree.Config(run=str(prepared), levels="8"))
    assert victim.read_text() == "precious" and not (prepared / "tree.npz.partial").exists()
    assert not (prepared / "tree.npz").is_symlink()


def test_names_in_a_corpus_stay_names(tmp_path):
    """Labels and texts that look like paths, flags or terminal commands go through all stages as
    what they are.
    """
    corpus = make_corpus(tmp_path / "corpus")
    names = ["../../../etc/passwd", "--run=/tmp", "a\nb", "\x1b[2J", "$(touch x)"]
    rows = [{"text": f"word{i} {names[i % 5]}", "labels": [names[i % 5]]} for i in range(40)]
    for split in ("train", "val", "test"):
        write_jsonl(corpus / f"{split}.jsonl.gz", rows)
    write_jsonl(corpus / "labels.jsonl.gz", [{"name": name, "text": name} for name in names])
    run = tmp_path / "run"
    before = sorted(tmp_path.rglob("*"))
    stages.data.run(stages.data.Config(run=str(run), corpus=str(corpus), vocab=200))
    stages.tree.run(stages.tree.Config(run=str(run)))
    train = SMALL | {"topk": None, "epochs": 1}
    stages.train.run(stages.train.Config(run=str(run), **train))
    stages.eval.run(stages.eval.Config(run=str(run), show=3))
    assert stages.data.load(run).names == names
    assert (
        sorted(path for path in tmp_path.rglob("*") if run not in (path, *path.parents)) == before
    )


def test_an_encoder_in_a_model_cannot_fetch_code_or_take_all_memory(done):
    content, _ = load_pt(done / "model.pt")
    honest, weights = content["encoder"], content["model"]
    evil = {
        "auto_map": {"AutoModel": "evil--repo.Model"},
        "_attn_implementation": "evil/kernel",
        "attn_implementation": "evil/kernel",
        "_attn_implementation_internal": "evil/kernel",
    }
    encoder = bare_encoder(honest | evil, weights)
    assert type(encoder).__module__.startswith("transformers.models.bert")
    assert "evil" not in str(encoder.config.to_dict()) and "evil" not in str(
        encoder.config._attn_implementation
    )
    before = peak()
    for changes in (
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "many"},
        {"intermediate_size": 2**40},
        {"hidden_size": 2**20, "num_attention_heads": 1},
        {"vocab_size": 10**11},
        {"model_type": "evil"},
    ):
        with pytest.raises(UserError, match="its encoder's configuration does not fit its weights"):
            bare_encoder(honest | changes, weights)
    distil = {
        "model_type": "distilbert",
        "n_layers": 10**6,
        "dim": 8,
        "hidden_dim": 8,
        "n_heads": 1,
    }
    deberta = {
        "model_type": "deberta",
        "position_biased_input": False,
        "max_position_embeddings": 2**28,
    }
    for config in (distil, deberta):
        with pytest.raises(UserError, match="its encoder's configuration does not fit its weights"):
            bare_encoder(config, weights)
    assert peak() - before < 2**28


def test_a_tokeniser_with_code_of_its_own_is_refused(tmp_path, corpus):
    """A folder whose configuration names a Python file beside it."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    names = {
        "AutoTokenizer": ["evil.Tokenizer"] * 2,
        "AutoConfig": "evil.Config",
        "AutoModel": "evil.Model",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": names, "tokenizer_class": "Evil"})
    )
    (folder / "config.json").write_text(json.dumps({"auto_map": names, "model_type": "evil"}))
    with pytest.raises(UserError, match="--encoder"):
        stages.data.run(
            stages.data.Config(run=str(tmp_path / "run"), corpus=str(corpus), encoder=str(folder))
        )
    assert not (tmp_path / "executed").exists() and "evil" not in sys.modules


def test_a_small_gzip_with_an_endless_line_is_refused(tmp_path, monkeypatch):
    """Shorter here than in earnest: 256 MiB of a line are read, and no more."""
    assert formats.LONGEST == 2**28
    monkeypatch.setattr(formats, "LONGEST", 2**22)
    folder = make_corpus(tmp_path / "corpus")
    with gzip.open(folder / "train.jsonl.gz", "wb") as file:
        for _ in range(64):
            file.write(b" " * 2**22)
    before = peak()
    with pytest.raises(UserError, match="train.jsonl.gz line 1: longer than 4 MiB"):
        stages.data.run(stages.data.Config(run=str(tmp_path / "run"), corpus=str(folder)))
    assert (folder / "train.jsonl.gz").stat().st_size < 2**20 and peak() - before < 2**27
