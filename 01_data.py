"""Stage 1: read a corpus, turn its texts into token ids, and say what it looks like.

    python 01_data.py                                       the demo: Debian packages, a tokeniser trained on the spot
    python 01_data.py --run runs/mine --corpus FOLDER --encoder bert-base-uncased

Reads    FOLDER    a corpus in one of the layouts that data/formats.py knows, among them
                   {train,val,test}.jsonl.gz   a document a line: {"text": "...", "labels": ["name", ...]}
                   labels.jsonl.gz             a label a line:    {"name": "...", "text": "what it stands for"}
         Without a validation split a share of the training documents, drawn with --seed, becomes it.
Writes   RUN/data.npz      token ids and label ids of every split, label names, the tokeniser (the README has the table)

Token ids are kept without the special tokens ([CLS] and its like): those belong to the encoder and are put around a
document when a batch is made. Left out here: cleaning of texts, anything that needs two machines.

Shapes   N documents, L labels, B batch, T tokens, P (document, label) pairs of a batch
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from data import formats
from plumbing.cli import flag, main, natural, positive, rate
from plumbing.encoders import pretrained
from plumbing.errors import UserError
from plumbing.memory import need_space
from plumbing.store import check_data, load_npz, save_npz

if TYPE_CHECKING:  # slow to import, and needed only where a corpus is read
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "val", "test", "label")  # the last: the labels' own texts
CHUNK = 1000  # documents tokenised at a time: what is in memory beside the ids
LONGEST_WORD = 100  # characters of a word for 'tiny': a longer one is cut into several
MANY_UNKNOWN = 0.01  # a larger share of unknown tokens, or of documents made of them, is worth a warning


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")
    corpus: str = flag("data/debian", "folder with the documents and labels")
    encoder: str = flag("tiny", "hub name or local folder of a transformer, or 'tiny': a small one from scratch")
    limit: int = flag(0, "keep at most this many training documents, drawn with --seed (0: all)", natural)
    val: float = flag(0.1, "share of the training documents for validation, without such a split", rate)
    text_limit: int = flag(0, "read at most this many characters of a document (0: all)", natural)
    separator: str = flag(";", "what stands between labels in a CSV column")
    max_tokens: int = flag(512, "keep at most this many tokens of a document", positive)
    vocab: int = flag(16000, "size of the vocabulary trained for 'tiny'", positive)
    seed: int = flag(0, "seed of every random choice", natural)


class Split(NamedTuple):
    """Documents as flat arrays: document i has ids[offsets[i]:offsets[i+1]] and labels likewise."""

    ids: np.ndarray  # token ids of all documents, one after the other
    offsets: np.ndarray  # (N+1,) int64
    labels: np.ndarray  # label ids of all documents, ascending within a document
    label_offsets: np.ndarray  # (N+1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def label_matrix(self, n_labels: int) -> csr_matrix:
        """Y (N, L), 1 where the document has the label."""
        ones = np.ones(len(self.labels), np.float32)
        return csr_matrix((ones, self.labels, self.label_offsets), shape=(len(self), n_labels))


class Batch(NamedTuple):
    """What a model reads. Labels are (document of the batch, label id) pairs: no (B, L) matrix anywhere."""

    ids_BT: torch.Tensor  # int64, right-padded
    mask_BT: torch.Tensor  # int64, 1 at tokens, 0 at padding
    doc_P: torch.Tensor  # int64
    label_P: torch.Tensor  # int64
    pooled_BHD: torch.Tensor | None = None  # float16, the encoder's features where they are known beforehand (stage 4)

    def to(self, device: torch.device) -> "Batch":
        return move(self, device)


def move(batch: tuple, device: torch.device) -> tuple:
    """A batch of any kind on a device; what it does not have, None, stays None."""
    moved = [None if tensor is None else tensor.to(device, non_blocking=True) for tensor in batch]
    return type(batch)(*moved)


class Data(NamedTuple):
    """data.npz in memory."""

    splits: dict[str, Split]  # by the names in SPLITS
    names: list[str]  # (L,)
    meta: dict  # encoder, vocab_size, prefix, suffix, pad and the record of the artifact
    tokenizer: bytes = b""  # for tokenizers.Tokenizer.from_buffer
    known: Mapping[str, csr_matrix] = {}  # (N, L) by split: labels known beforehand, no predictions
    encoded: Mapping[str, np.ndarray] = {}  # (N, H, D) by split: what an encoder that does not learn says of them

    def batch(self, split: str, rows: np.ndarray, max_len: int) -> Batch:
        """Documents `rows` of a split, cut to max_len tokens with the special ones: one gather, no loop over rows."""
        part, prefix, suffix = self.splits[split], self.meta["prefix"], self.meta["suffix"]
        room = max_len - len(prefix) - len(suffix)
        if room < 1:
            raise UserError(f"--max-len {max_len} leaves no room beside the special tokens; raise it")
        length_B = np.minimum(part.offsets[rows + 1] - part.offsets[rows], room)
        end_B = len(prefix) + length_B
        ids_BT = np.full((len(rows), end_B.max() + len(suffix)), self.meta["pad"], np.int64)
        ids_BT[:, : len(prefix)] = prefix
        doc, position, place = flatten(part.offsets[rows], length_B)
        ids_BT[doc, len(prefix) + position] = part.ids[place]
        for i, token in enumerate(suffix):
            ids_BT[np.arange(len(rows)), end_B + i] = token
        mask_BT = (np.arange(ids_BT.shape[1]) < (end_B + len(suffix))[:, None]).astype(np.int64)

        doc_P, _, place = flatten(part.label_offsets[rows], part.label_offsets[rows + 1] - part.label_offsets[rows])
        label_P = part.labels[place].astype(np.int64)
        pooled_BHD = torch.from_numpy(self.encoded[split][rows]) if split in self.encoded else None
        return Batch(*(torch.from_numpy(array) for array in (ids_BT, mask_BT, doc_P, label_P)), pooled_BHD)


def flatten(start_B: np.ndarray, length_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, position in the row, place in the flat array) of every element of ragged rows."""
    row = np.repeat(np.arange(len(length_B)), length_B)
    position = np.arange(len(row)) - (np.cumsum(length_B) - length_B)[row]
    return row, position, start_B[row] + position


def read_documents(corpus: formats.Corpus, split: str, label_id: dict, limit: int, drops: Counter
                   ) -> Iterator[tuple[int, str, list[int]]]:
    """Yield (line from 0, text cut to `limit` characters, sorted label ids); counts in `drops` what it leaves out."""
    for line, (where, text, labels) in enumerate(corpus.documents[split]()):
        try:
            ids = sorted({label_id[label] for label in labels})
        except KeyError as error:
            raise UserError(f"{where}: label {error} is not among the {len(label_id)} labels; add it to them") from None
        clean = formats.encodable(text)
        drops["labels named twice in one document, taken once"] += len(labels) - len(ids)
        drops["texts with half a character, replaced by a question mark"] += clean != text
        if split == "train" and not (ids and text.strip()):
            drops[f"training documents without {'text' if ids else 'labels'}, left out"] += 1
            continue
        drops[f"{split} documents without text, kept"] += not text.strip()
        drops[f"{split} texts cut to {limit} characters"] += 0 < limit < len(clean)
        yield line, clean[:limit] if limit else clean, ids


def train_tokenizer(texts: Callable[[], Iterable[str]], vocab: int) -> "PreTrainedTokenizerBase":
    """A lower-cased WordPiece tokeniser for any script; the same texts give the same tokeniser.

    It has at most `vocab` pieces, or each character twice (at the start of a word, and within one) where that is more.
    Accents and other marks are kept: in most languages they tell words apart.
    """
    from transformers import PreTrainedTokenizerFast

    # The same word in two encodings becomes the same characters: e + accent is é, and a wide letter is a letter. Then
    # upper case goes, control characters go, and a Chinese character becomes a word of its own.
    normalizer = normalizers.Sequence([
        normalizers.Replace(Regex(r"[\s\u200b]"), " "),  # \u200b: a blank of width zero, as between Khmer words
        normalizers.NFKC(),
        normalizers.BertNormalizer(strip_accents=False, lowercase=True),
    ])
    found = set()
    for text in texts():
        found.update(normalizer.normalize_str(text))
    characters = sorted(found - {" "})

    # Words end at blanks and at punctuation. WordPiece turns a word into one [UNK] if it is very long, or if a single
    # one of its characters is new. So we cut long words, such as a line of Thai, and set new characters apart.
    known = "".join(f"\\x{{{ord(character):X}}}" for character in characters)
    cut = Regex(f"[{known}]{{1,{LONGEST_WORD}}}|." if known else ".")
    words = pre_tokenizers.Sequence([
        pre_tokenizers.BertPreTokenizer(),
        pre_tokenizers.Split(cut, behavior="isolated"),
    ])

    # The trainer numbers the pieces "##a", "##b", ... in the order of a hash table and breaks ties by those numbers;
    # naming them beforehand, as if they were special, makes the vocabulary reproducible.
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    within_words = ["##" + character for character in characters]
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizer
    trained.pre_tokenizer = words
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab, special_tokens=special + within_words, show_progress=False
    )
    trained.train_from_iterator(texts(), trainer)

    # A new tokeniser with these pieces, in which the characters are not special any more.
    tokenizer = Tokenizer(
        models.WordPiece(
            trained.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = words
    around = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=around
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int], int]:
    """(ids before a text, ids after it, padding id), found by asking: every family has its own."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
    if tokenizer.pad_token_id is None or start is None:
        raise UserError(f"the tokeniser of {tokenizer.name_or_path} is of no known kind; use another --encoder")
    return full[:start], full[start + len(bare) :], tokenizer.pad_token_id


def encode(documents: Iterable[tuple[str, list[int]]], tokenizer: "PreTrainedTokenizerBase", max_tokens: int,
           name: str, drops: Counter) -> Split:
    """Tokenise a stream of (text, label ids) in chunks."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32  # the smallest type that holds the vocabulary
    ids, labels, lengths, counts = [], [], [], []

    def flush(chunk: list[tuple[str, list[int]]]) -> None:
        texts = [text for text, _ in chunk]
        for row in tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]:
            drops[f"{name} texts cut to {max_tokens} tokens"] += len(row) > max_tokens
            ids.append(np.array(row[:max_tokens], dtype))
            lengths.append(len(ids[-1]))
        for _, row in chunk:
            labels.append(np.array(row, np.int32))
            counts.append(len(row))

    chunk = []
    for document in tqdm(documents, desc=name, unit=" documents", disable=None):
        chunk.append(document)
        if len(chunk) == CHUNK:
            flush(chunk)
            chunk = []
    if chunk:
        flush(chunk)
    if not lengths:
        raise UserError(f"no documents are left in the split '{name}'")
    offsets, label_offsets = (np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64) for sizes in (lengths, counts))
    return Split(np.concatenate(ids), offsets, np.concatenate(labels), label_offsets)


def run(config: Config) -> None:
    corpus, out, drops = formats.open_corpus(Path(config.corpus), config.separator), Path(config.run), Counter()
    need_space(out, 3 * sum(path.stat().st_size for path in corpus.files))
    labels = corpus.labels
    if labels is None:
        found = {label for read in corpus.documents.values() for document in read() for label in document.labels}
        labels = [(formats.named(config.corpus, name), "") for name in sorted(found, key=formats.natural_order)]
        print(f"no list of labels: {len(labels):,} names are found in the documents")
    label_id = {name if corpus.by_name else i: i for i, (name, _) in enumerate(labels)}

    # Which line goes where is settled before any text is kept, so that memory holds one chunk of texts.
    rng = np.random.default_rng(config.seed)
    line = np.array([line for line, _, _ in read_documents(corpus, "train", label_id, 0, Counter())], np.int64)
    part = np.full(len(line), "train", object)
    if "val" not in corpus.documents:
        part[rng.permutation(len(part))[: max(1, int(len(part) * config.val))]] = "val"
        print(f"no validation split: {(part == 'val').sum()} training documents become it")
    training = np.flatnonzero(part == "train")
    if 0 < config.limit < len(training):
        cut = rng.permutation(training)[config.limit :]
        part[cut] = ""
        drops["training documents beyond --limit, left out"] = len(cut)

    def documents(split: str, drops: Counter) -> Iterator[tuple[str, list[int]]]:
        own = split in corpus.documents and split != "train"
        source = read_documents(corpus, split if own else "train", label_id, config.text_limit,
                                drops if own or split == "train" else Counter())
        yield from ((text, ids) for i, (_, text, ids) in enumerate(source) if own or part[i] == split)

    if config.encoder == "tiny":
        tokenizer = train_tokenizer(lambda: (text for text, _ in documents("train", Counter())), config.vocab)
    else:
        tokenizer = pretrained("AutoTokenizer", config.encoder)
    if not tokenizer.is_fast:
        raise UserError(f"--encoder {config.encoder}: its tokeniser has no fast version; use another encoder")
    tokenizer.model_max_length = int(1e9)  # no warning: cutting is done, and counted, here
    prefix, suffix, pad = special_tokens(tokenizer)

    arrays = {}
    splits = {name: encode(documents(name, drops), tokenizer, config.max_tokens, name, drops)
              for name in SPLITS[:3]}
    label_texts = ((formats.encodable(text), []) for _, text in labels)
    splits["label"] = encode(label_texts, tokenizer, config.max_tokens, "label", drops)
    for name, split in splits.items():
        arrays |= {f"{name}_{key}": array for key, array in split._asdict().items()}
    for name in SPLITS[:3]:
        source = name if name in corpus.documents else "train"
        lines = np.arange(len(splits[name])) if source != "train" else line[part == name]
        known = formats.read_known(corpus.known.get(source), len(labels), lines)
        arrays |= {f"{name}_known": known.indices, f"{name}_known_offsets": known.indptr.astype(np.int64)}
    encoded = [name.encode() for name, _ in labels]
    arrays["names"] = np.frombuffer(b"".join(encoded), np.uint8)
    arrays["names_offsets"] = np.cumsum([0] + [len(name) for name in encoded], dtype=np.int64)
    arrays["tokenizer"] = np.frombuffer(tokenizer.backend_tokenizer.to_str().encode(), np.uint8)
    save_npz(out / "data.npz", config, arrays, encoder=config.encoder, vocab_size=len(tokenizer), prefix=prefix,
             suffix=suffix, pad=pad)
    describe(splits, len(labels), drops)
    describe_unknown(splits, tokenizer.unk_token_id, config.encoder)


def describe(splits: dict[str, Split], n_labels: int, drops: Counter) -> None:
    """Print the corpus' shape and every drop."""
    for name in SPLITS[:3]:
        split = splits[name]
        tokens, labels = np.diff(split.offsets), np.diff(split.label_offsets)
        print(f"{name:5}  {len(split):8,} documents   {labels.mean():5.2f} labels each (most {labels.max()}, "
              f"none: {(labels == 0).sum()})   {np.median(tokens):4.0f} tokens at the median, "
              f"{np.quantile(tokens, 0.9):.0f} at 90%")
    n = np.bincount(splits["train"].labels, minlength=n_labels)
    bins = ((50, 1 << 62, "head, 50 or more"), (5, 50, "torso, 5 to 49"), (1, 5, "tail, 1 to 4"), (0, 1, "unseen, 0"))
    shares = "   ".join(f"{text}: {((n >= low) & (n < high)).sum():,}" for low, high, text in bins)
    print(f"{n_labels:,} labels by training documents   {shares}")
    for reason, count in drops.items():
        if count:
            print(f"note: {count:,} {reason}")
    text_of = {name: [hash(splits[name].ids[a:b].tobytes()) for a, b in pairwise(splits[name].offsets)]
               for name in SPLITS[:3]}
    for name in ("val", "test"):
        if leaked := np.isin(text_of[name], text_of["train"]).sum():
            print(f"leakage: {leaked:,} {name} documents have the tokens of a training document")


def describe_unknown(splits: dict[str, Split], unknown: int | None, encoder: str) -> None:
    """Print the share of tokens that the tokeniser did not know; a warning where it is large.

    An unknown token may stand for a character, a word or a whole line of Thai. So we also count the documents of which
    at least half of the tokens are unknown: there are few tokens in them, and little is left of their texts.
    """
    shares = []
    warnings = []
    for name, split in splits.items():
        is_unknown = split.ids == (-1 if unknown is None else unknown)  # None: it knows every text
        before = np.concatenate([[0], np.cumsum(is_unknown)])  # unknown tokens before each token
        unknown_N = before[split.offsets[1:]] - before[split.offsets[:-1]]
        mostly = int((2 * unknown_N >= np.diff(split.offsets).clip(1)).sum())
        share = is_unknown.sum() / max(1, len(is_unknown))
        shares.append(f"{name} {100 * share:.3f}")
        if share > MANY_UNKNOWN or mostly > MANY_UNKNOWN * len(split):
            warnings.append(f"{name} {100 * share:.1f}% ({mostly:,} of {len(split):,} texts are mostly that)")
    print(f"unknown tokens, %   {'   '.join(shares)}")
    if warnings:
        advice = "choose an --encoder made for this language, such as a multilingual one, or 'tiny'"
        if encoder == "tiny":
            advice = "their characters are in no training document; add some that have them"
        print(f"warning: many tokens are unknown: {'; '.join(warnings)}. The tokeniser has no pieces for what stands "
              f"there, and the model reads the same token for all of it: {advice}")


def load(folder: str | Path) -> Data:
    """RUN/data.npz as stage 1 wrote it."""
    arrays, meta = load_npz(Path(folder) / "data.npz")
    check_data(Path(folder) / "data.npz", arrays, meta)
    splits = {name: Split(*(arrays[f"{name}_{key}"] for key in Split._fields)) for name in SPLITS}
    text, ends = arrays["names"].tobytes(), arrays["names_offsets"]
    names = [text[a:b].decode() for a, b in pairwise(ends)]
    known = {name: csr_matrix((np.ones(len(pairs), bool), pairs, offsets), shape=(len(splits[name]), len(names)))
             for name in SPLITS[:3]
             for pairs, offsets in [(arrays[f"{name}_known"], arrays[f"{name}_known_offsets"])] if len(pairs)}
    return Data(splits, names, meta, arrays["tokenizer"].tobytes(), known)


if __name__ == "__main__":
    main(run, Config, __doc__)
