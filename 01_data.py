"""Stage 1: read a corpus, turn its texts into token ids, and say what it looks like.

    python 01_data.py                   the demo: Debian packages, a tokeniser trained on the spot
    python 01_data.py --run runs/mine --corpus FOLDER --encoder bert-base-uncased

Reads    FOLDER    a corpus in one of the layouts that data/formats.py knows, among them
                   {train,val,test}.jsonl.gz   a document a line:
                                               {"text": "...", "labels": ["name", ...]}
                   labels.jsonl.gz             a label a line:
                                               {"name": "...", "text": "what it stands for"}
                   filter_labels_{split}.txt.gz    labels known of a document beforehand, which are
                                                   no predictions (docs/glossary.md)
         Without a validation split a share of the training documents, drawn with --seed,
         becomes it.
Writes   RUN/data.npz      token ids and label ids of every split, label names, the tokeniser
                           (docs/artifacts.md has the table)

Every text becomes a list of token ids, and every label a number. The later stages work on these
numbers alone. The steps are read, tokenise, save and describe: `run`, at the end of the file, calls
them in this order.

Token ids are kept without the special tokens ([CLS] and its like). Special tokens belong to the
encoder, and they are put around a document when a batch is made. Left out here: cleaning of texts,
anything that needs two machines.

The letters at the end of a name give its shape: tokens_N has one number for each document, and
ids_BT is B x T. They mean the same in all stages.
Shapes   N documents of a split, L labels, B documents of a batch, T tokens of a document,
         P (document, label) pairs of a batch, H hidden states that are read, D width of a feature
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

from data import formats
from data.corpus import Documents, label_list
from data.surprises import surprises
from plumbing.cli import flag, main, natural, positive, rate
from plumbing.encoder_trial import try_encoder
from plumbing.encoders import pretrained
from plumbing.errors import UserError
from plumbing.memory import need_space
from plumbing.ownership import owns_its_folder
from plumbing.store import check_data, load_npz, save_npz

if TYPE_CHECKING:  # slow to import, and needed only where a corpus is read
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "val", "test")
CHUNK = 1000  # documents tokenised at a time: the only texts that are in memory
LONGEST_WORD = 100  # characters of a word for 'tiny': a longer one is cut into several
HEAD = 50  # training documents that a label of the head has at least
TORSO = 5  # the same for the torso; the tail has fewer
MANY_UNKNOWN = 0.01  # share of unknown tokens, or of documents made of them: above it, a warning


@dataclass(frozen=True)
class Config:
    run: str = flag("runs/demo", "folder of this run's artifacts")
    corpus: str = flag("data/debian", "folder with the documents and labels")
    encoder: str = flag(
        "tiny", "hub name or local folder of a transformer, or 'tiny': a small one from scratch"
    )
    limit: int = flag(
        0, "keep at most this many training documents, drawn with --seed (0: all)", natural
    )
    max_tokens: int = flag(512, "keep at most this many tokens of a document", positive)
    vocab: int = flag(16000, "size of the vocabulary trained for 'tiny'", positive)
    val: float = flag(
        0.1, "share of the training documents for validation, where there is no such split", rate
    )
    seed: int = flag(0, "seed of every random choice", natural)
    text_limit: int = flag(0, "read at most this many characters of a document (0: all)", natural)
    separator: str = flag(";", "what stands between labels in a CSV column")


class Split(NamedTuple):
    """The documents of a split as flat arrays.

    The token ids of all documents stand one after the other in `ids`, and `offsets` says where each
    document begins: document i has ids[offsets[i]:offsets[i+1]]. Its labels are stored likewise.

        three documents   [5 8 8]  [7]  [5 9]
        ids               5 8 8 7 5 9
        offsets           0 3 4 6
    """

    ids: np.ndarray  # (tokens of all documents,) uint16 or int32
    offsets: np.ndarray  # (N+1,) int64
    labels: np.ndarray  # (labels of all documents,) int32, ascending within a document
    label_offsets: np.ndarray  # (N+1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def documents(self, rows: np.ndarray) -> "Split":
        """A split of some of the documents."""
        ids = [self.ids[self.offsets[i] : self.offsets[i + 1]] for i in rows]
        labels = [self.labels[self.label_offsets[i] : self.label_offsets[i + 1]] for i in rows]
        offsets = np.append(0, np.cumsum([len(part) for part in ids]))
        label_offsets = np.append(0, np.cumsum([len(part) for part in labels]))
        return Split(np.concatenate(ids), offsets, np.concatenate(labels), label_offsets)

    def label_matrix(self, n_labels: int) -> csr_matrix:
        """Y (N, L), 1 where the document has the label."""
        ones = np.ones(len(self.labels), np.float32)
        shape = (len(self), n_labels)
        return csr_matrix((ones, self.labels, self.label_offsets), shape=shape)


# -------------------------------------------------------------------------------------------- read


def read(config: Config, drops: Counter) -> Documents:
    """The corpus, with its documents shared out among the splits. No text is in memory yet."""
    corpus = formats.open_corpus(Path(config.corpus), config.separator)
    # Is there room for data.npz? It may be larger than a corpus that is compressed.
    corpus_bytes = sum(path.stat().st_size for path in corpus.files)
    need_space(Path(config.run), 3 * corpus_bytes)

    # A label's id is its place in this list.
    labels = label_list(corpus, config.corpus)
    if corpus.labels is None:
        print(f"no list of labels: {len(labels):,} names are found in the documents")
    for note in corpus.notes:
        print(f"note: {note}")

    # Which documents are for training, and which for validation and testing. Where the corpus has
    # no validation split, one is drawn from the training documents first; then --limit draws from
    # what is left (data/corpus.py).
    documents = Documents(corpus, labels, config.text_limit, drops)
    documents.share_out(config.val, config.limit, np.random.default_rng(config.seed))
    if "val" not in corpus.documents:
        n_drawn = documents.n_drawn_for_validation()
        print(f"no validation split: {n_drawn} training documents become it")
    return documents


# ---------------------------------------------------------------------------------------- tokenise


def make_tokenizer(config: Config, documents: Documents) -> "PreTrainedTokenizerBase":
    """The tokeniser that belongs to the encoder; for 'tiny', a new one trained on the corpus."""
    if config.encoder == "tiny":
        tokenizer = train_tokenizer(documents.train_texts, config.vocab)
    else:
        tokenizer = pretrained("AutoTokenizer", config.encoder)
    if not tokenizer.is_fast:
        raise UserError(
            f"--encoder {config.encoder}: its tokeniser has no fast version; use another encoder"
        )
    tokenizer.model_max_length = int(1e9)  # no warning: we cut documents ourselves, and count it
    return tokenizer


def train_tokenizer(texts: Callable[[], Iterable[str]], vocab: int) -> "PreTrainedTokenizerBase":
    """A lower-cased WordPiece tokeniser for any script; the same texts give the same tokeniser.

    WordPiece has a vocabulary of pieces of words. In training, every character is a piece at first.
    Then the two pieces that most often stand side by side in a word are joined to a new piece. This
    is repeated until there are `vocab` pieces. A piece that does not begin a word is written with
    ##. To tokenise a word, we take the longest piece that it begins with, then the longest piece
    that the rest begins with, and so on. So a frequent word is one token, and a rare word is
    several. The tokeniser of the demo does this:

        "a lightweight tokeniser for cheminformatics"
        a   lightweight   token ##iser   for   chem ##informatics

    Every character is a piece, twice: at the start of a word, and within one. Joined pieces fill
    the vocabulary up to `vocab`, if the characters leave room. Accents and other marks are kept: in
    most languages they tell words apart. `texts` is a function that gives the texts, and it is
    called twice.
    """
    from transformers import PreTrainedTokenizerFast

    # What happens to a text before WordPiece: one spelling, then words.
    normalizer = one_spelling()
    characters = characters_of(texts(), normalizer)
    splitter = into_words(characters)
    pieces = train_pieces(texts(), vocab, characters, normalizer, splitter)

    # A tokeniser with these pieces. It can also put [CLS] and [SEP] around a text, as BERT's does.
    model = models.WordPiece(pieces, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", pieces["[CLS]"]), ("[SEP]", pieces["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def one_spelling() -> normalizers.Normalizer:
    """Gives a word the same characters however it is encoded, and in lower case.

    NFKC is the standard form of Unicode: e + accent becomes é, and a wide letter becomes a letter.
    BERT's normaliser removes control characters and makes each Chinese character a word of its own.
    """
    return normalizers.Sequence(
        [
            # Every kind of blank, among them the one of width zero that stands between Khmer words.
            normalizers.Replace(Regex(r"[\s\u200b]"), " "),
            normalizers.NFKC(),
            normalizers.BertNormalizer(strip_accents=False, lowercase=True),
        ]
    )


def characters_of(texts: Iterable[str], normalizer: normalizers.Normalizer) -> list[str]:
    """Every character that occurs in the texts, but the blank."""
    found = set()
    for text in texts:
        found.update(normalizer.normalize_str(text))
    return sorted(found - {" "})


def into_words(characters: list[str]) -> pre_tokenizers.PreTokenizer:
    """Cuts a text into words, at blanks and at punctuation.

    WordPiece turns a word into one unknown token, [UNK], if the word is very long, or if a single
    one of its characters is new. Little would be left of a line of Thai, which has no blanks. So we
    cut long words, and we set characters apart that are not among `characters`.
    """
    # A regular expression: up to LONGEST_WORD known characters, or any one character. Each known
    # character is written by its number, such as \x{61}, since some, such as ], have a meaning.
    known = "".join(f"\\x{{{ord(character):X}}}" for character in characters)
    pattern = f"[{known}]{{1,{LONGEST_WORD}}}|." if known else "."
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.BertPreTokenizer(),
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        ]
    )


def train_pieces(
    texts: Iterable[str],
    vocab: int,
    characters: list[str],
    normalizer: normalizers.Normalizer,
    splitter: pre_tokenizers.PreTokenizer,
) -> dict[str, int]:
    """{piece: id}, trained on the texts."""
    # Two pairs of pieces may stand side by side equally often. Then the trainer joins the pair with
    # the smaller numbers first, and it numbers ##a, ##b, ... in an order that differs from run to
    # run. Special tokens get their numbers in the order in which they are given. So we give it ##a,
    # ##b, ... as special tokens, and the vocabulary is the same each time.
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    within_words = ["##" + character for character in characters]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab, special_tokens=special + within_words, show_progress=False
    )
    # This tokeniser is used for nothing but training: it would find the special token ##a even in a
    # text that has "##a" in it.
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizer
    trained.pre_tokenizer = splitter
    trained.train_from_iterator(texts, trainer)
    return trained.get_vocab()


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[int] | int]:
    """The ids before a text (prefix) and after it (suffix), and the id of padding (pad).

    Every family of encoders has its own, so we ask: what does the tokeniser put around "a"?
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full)):
        end = start + len(bare)
        if full[start:end] == bare and tokenizer.pad_token_id is not None:
            return {"prefix": full[:start], "suffix": full[end:], "pad": tokenizer.pad_token_id}
    raise UserError(
        f"the tokeniser of {tokenizer.name_or_path} is of no known kind; use another --encoder"
    )


def tokenise(
    documents: Documents, tokenizer: "PreTrainedTokenizerBase", max_tokens: int, drops: Counter
) -> dict[str, Split]:
    """The token ids of all splits; "label" has the labels' own texts."""
    splits = {}
    for name in SPLITS:
        splits[name] = encode(documents.read(name), tokenizer, max_tokens, name, drops)
    label_texts = ((text, []) for text in documents.label_texts())
    splits["label"] = encode(label_texts, tokenizer, max_tokens, "label", drops)
    return splits


def encode(
    documents: Iterable[tuple[str, list[int]]],
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    name: str,
    drops: Counter,
) -> Split:
    """Tokenise the (text, label ids) of the split `name`; UserError where there are none."""
    # Token ids take the smallest type that holds the vocabulary: two bytes, where that is enough.
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    ids = []  # an array of token ids for each document
    labels = []  # an array of label ids for each document
    with_progress = tqdm(documents, desc=name, unit=" documents", disable=None)
    for chunk in chunks(with_progress):
        # The library tokenises many texts at once, faster than one after the other.
        texts = [text for text, _ in chunk]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        for tokens in encoded["input_ids"]:
            drops[f"{name} texts cut to {max_tokens} tokens"] += len(tokens) > max_tokens
            if name in SPLITS:  # many labels have no text of their own
                drops[f"{name} documents of which no token is left, kept"] += not tokens
            ids.append(np.array(tokens[:max_tokens], dtype))
        for _, label_ids in chunk:
            labels.append(np.array(label_ids, np.int32))

    if not ids:
        raise UserError(f"no documents are left in the split '{name}'")
    # From one array for each document to one array for all of them.
    return Split(
        ids=np.concatenate(ids),
        offsets=offsets_of(ids),
        labels=np.concatenate(labels),
        label_offsets=offsets_of(labels),
    )


def chunks(documents: Iterable) -> Iterator[list]:
    """Yield lists of CHUNK documents; the last one may be shorter."""
    remaining = iter(documents)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


def offsets_of(rows: list) -> np.ndarray:
    """(N+1,) int64: where each of N rows begins when they stand one after the other."""
    return np.cumsum([0] + [len(row) for row in rows], dtype=np.int64)


# -------------------------------------------------------------------------------------------- save


def save(
    config: Config,
    documents: Documents,
    splits: dict[str, Split],
    tokenizer: "PreTrainedTokenizerBase",
    special: dict[str, list[int] | int],
) -> None:
    """Write RUN/data.npz: plain arrays alone, so that reading it can execute nothing."""
    # Each split's flat arrays, such as train_ids and train_offsets.
    arrays = {}
    for name, split in splits.items():
        for key, array in split._asdict().items():
            arrays[f"{name}_{key}"] = array

    # Labels that are known beforehand, and so never predicted: in the demo, the label that the
    # document itself is, since no package depends on itself.
    for name in SPLITS:
        known = documents.known(name, len(splits[name]))
        arrays[f"{name}_known"] = known.indices
        arrays[f"{name}_known_offsets"] = known.indptr.astype(np.int64)

    # Strings are kept as their bytes, one after the other, as token ids are.
    names = [name.encode() for name, _ in documents.labels]
    arrays["names"] = np.frombuffer(b"".join(names), np.uint8)
    arrays["names_offsets"] = offsets_of(names)
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    arrays["tokenizer"] = np.frombuffer(tokenizer_json.encode(), np.uint8)

    save_npz(
        Path(config.run) / "data.npz",
        config,
        arrays,
        encoder=config.encoder,
        vocab_size=len(tokenizer),
        **special,
    )


# ---------------------------------------------------------------------------------------- describe


def describe(splits: dict[str, Split], n_labels: int, drops: Counter) -> None:
    """Print the shape of the corpus, every drop, and test documents that training has, too."""
    for name in SPLITS:
        describe_split(name, splits[name])
    describe_labels(splits["train"], n_labels)
    for reason, count in drops.items():
        if count:
            print(f"note: {count:,} {reason}")
    describe_leakage(splits)


def describe_split(name: str, split: Split) -> None:
    """Print how many documents, labels and tokens there are."""
    tokens_N = np.diff(split.offsets)  # tokens of each document
    labels_N = np.diff(split.label_offsets)  # labels of each document
    print(
        f"{name:5}  {len(split):8,} documents   {labels_N.mean():5.2f} labels each "
        f"(most {labels_N.max()}, none: {(labels_N == 0).sum()})   "
        f"{np.median(tokens_N):4.0f} tokens at the median, {np.quantile(tokens_N, 0.9):.0f} at 90%"
    )


def describe_labels(train: Split, n_labels: int) -> None:
    """Print how many labels are frequent (the head), less frequent (the torso) and rare (the tail).

    In extreme classification most labels are in the tail, with few documents to learn from.
    """
    count_L = np.bincount(train.labels, minlength=n_labels)  # training documents of each label
    head = (count_L >= HEAD).sum()
    torso = ((count_L >= TORSO) & (count_L < HEAD)).sum()
    tail = ((count_L >= 1) & (count_L < TORSO)).sum()
    unseen = (count_L == 0).sum()
    print(
        f"{n_labels:,} labels by training documents   head, {HEAD} or more: {head:,}   "
        f"torso, {TORSO} to {HEAD - 1}: {torso:,}   tail, 1 to {TORSO - 1}: {tail:,}   "
        f"unseen, 0: {unseen:,}"
    )


def describe_leakage(splits: dict[str, Split]) -> None:
    """Print how many documents of val and test are in training, too: they make scores too good."""
    in_training = set(fingerprints(splits["train"]))
    for name in ("val", "test"):
        leaked = sum(mark in in_training for mark in fingerprints(splits[name]))
        if leaked:
            print(f"leakage: {leaked:,} {name} documents have the tokens of a training document")


def fingerprints(split: Split) -> Iterator[int]:
    """Yield a number for each document, the same for documents with the same tokens."""
    for start, end in pairwise(split.offsets):
        yield hash(split.ids[start:end].tobytes())


def describe_unknown(splits: dict[str, Split], unknown: int | None, encoder: str) -> None:
    """Print the share of tokens that the tokeniser did not know; a warning where it is large.

    An unknown token may stand for a character, a word or a whole line of Thai. So we also count the
    documents of which at least half of the tokens are unknown: there are few tokens in them, and
    little is left of their texts. `unknown` is the id of [UNK]; None: every text is known.
    """
    shares = []
    warnings = []
    for name, split in splits.items():
        is_unknown = split.ids == (-1 if unknown is None else unknown)
        # Unknown tokens of each document: the ones before its end, less the ones before its start.
        before = np.concatenate([[0], np.cumsum(is_unknown)])  # unknown tokens before each token
        unknown_N = before[split.offsets[1:]] - before[split.offsets[:-1]]
        tokens_N = np.diff(split.offsets)
        n_mostly = int((2 * unknown_N >= tokens_N.clip(1)).sum())

        share = is_unknown.sum() / max(1, len(is_unknown))
        shares.append(f"{name} {100 * share:.3f}")
        if share > MANY_UNKNOWN or n_mostly > MANY_UNKNOWN * len(split):
            mostly = f"{n_mostly:,} of {len(split):,} texts are mostly that"
            warnings.append(f"{name} {100 * share:.1f}% ({mostly})")

    print(f"unknown tokens, %   {'   '.join(shares)}")
    if warnings:
        if encoder == "tiny":
            advice = "their characters are in no training document; add some that have them"
        else:
            advice = (
                "choose an --encoder made for this language, such as a multilingual one, or 'tiny'"
            )
        print(
            f"warning: many tokens are unknown: {'; '.join(warnings)}. The tokeniser has no pieces "
            "for what stands there, and the model reads the same token for all of it: " + advice
        )


# ------------------------------------------------------------------ what the later stages work with


class Batch(NamedTuple):
    """What a model reads: some documents, padded to the length of the longest, and their labels.

    The labels are P pairs (document of the batch, label id). A matrix (B, L) of zeros and ones
    would say the same, but with a million labels almost all of it would be zeros.

        document 0 has labels 3 and 7,      doc_P     0 0 1
        document 1 has label 3              label_P   3 7 3
    """

    ids_BT: torch.Tensor  # int64, padded at the right
    mask_BT: torch.Tensor  # int64, 1 at tokens, 0 at padding
    doc_P: torch.Tensor  # int64, from 0 to B-1
    label_P: torch.Tensor  # int64, from 0 to L-1
    # float16. Only where stage 4 has run the encoder before: what came out, for each of the H of
    # its layers that the model reads.
    pooled_BHD: torch.Tensor | None = None
    # With several GPUs each has some of the documents: their share of all.
    share: float = 1.0

    def to(self, device: torch.device) -> "Batch":
        return move(self, device)


def move(batch: tuple, device: torch.device) -> tuple:
    """A batch of any kind on a device. A field that is no tensor stays as it is."""
    to_gpu = torch.device(device).type == "cuda"
    moved = []
    for field in batch:
        if isinstance(field, torch.Tensor):
            # From pinned memory, which the system never moves, a copy needs nobody to wait for it.
            if to_gpu:
                field = field.pin_memory()
            field = field.to(device, non_blocking=True)
        moved.append(field)
    return type(batch)(*moved)


class Data(NamedTuple):
    """data.npz in memory."""

    splits: dict[str, Split]  # train, val, test; and label, the labels' own texts
    names: list[str]  # (L,)
    meta: dict  # encoder, vocab_size, prefix, suffix, pad and the record of the artifact
    tokenizer: bytes = b""  # for tokenizers.Tokenizer.from_buffer
    # Labels known beforehand, by split, each (N, L). They are never predicted.
    known: Mapping[str, csr_matrix] = {}
    # The features of an encoder that does not learn, by split, each (N, H, D) float16.
    encoded: Mapping[str, np.ndarray] = {}

    def batch(self, split: str, rows: np.ndarray, max_len: int, round_to: int = 1) -> Batch:
        """The documents `rows` (B,) of a split, cut to `max_len` tokens with the special ones.

        They are padded to the length of the longest, or up to the next multiple of `round_to`.
        """
        part = self.splits[split]
        ids_BT, mask_BT = self._padded(part, rows, max_len, round_to)

        # The labels of these documents, one pair for each.
        n_labels_B = part.label_offsets[rows + 1] - part.label_offsets[rows]
        doc_P, _, place_P = flatten(part.label_offsets[rows], n_labels_B)
        label_P = part.labels[place_P].astype(np.int64)

        # Where the encoder does not learn, stage 4 computes its features once and keeps them.
        pooled_BHD = None
        if split in self.encoded:
            pooled_BHD = torch.from_numpy(self.encoded[split][rows])
        return Batch(
            torch.from_numpy(ids_BT),
            torch.from_numpy(mask_BT),
            torch.from_numpy(doc_P),
            torch.from_numpy(label_P),
            pooled_BHD,
        )

    def _padded(
        self, part: Split, rows: np.ndarray, max_len: int, round_to: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids_BT, mask_BT). A row holds the prefix, the document's tokens, the suffix and padding.

        The plain form is a loop over the documents, which tests/test_data.py has:
            row = prefix + tokens[: max_len - len(prefix) - len(suffix)] + suffix
        Here all documents are copied at once.
        """
        prefix = self.meta["prefix"]  # such as the id of [CLS]
        suffix = self.meta["suffix"]  # such as the id of [SEP]
        room = max_len - len(prefix) - len(suffix)
        if room < 1:
            raise UserError(
                f"--max-len {max_len} leaves no room beside the special tokens; raise it"
            )

        # How many tokens we keep of each document, and where its suffix begins.
        length_B = np.minimum(part.offsets[rows + 1] - part.offsets[rows], room)
        end_B = len(prefix) + length_B
        # An encoder cannot read nothing at all. A document without any token, special ones
        # included, is one token of padding that the encoder looks at.
        end_B = np.maximum(end_B, 1 - len(suffix))

        # Start with padding alone, then write the prefix, the tokens and the suffix over it.
        longest = end_B.max() + len(suffix)
        rounded_up = math.ceil(longest / round_to) * round_to
        # Rounding must not go beyond max_len: the encoder may have no more positions.
        width = max(longest, min(rounded_up, max_len))  # T
        ids_BT = np.full((len(rows), width), self.meta["pad"], np.int64)
        ids_BT[:, : len(prefix)] = prefix
        doc, position, place = flatten(part.offsets[rows], length_B)
        ids_BT[doc, len(prefix) + position] = part.ids[place]
        for i, token in enumerate(suffix):
            ids_BT[np.arange(len(rows)), end_B + i] = token

        # The encoder does not look at the padding: the mask is 0 there.
        mask_BT = np.arange(width) < (end_B + len(suffix))[:, None]
        return ids_BT, mask_BT.astype(np.int64)


def flatten(start_B: np.ndarray, length_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, position in the row, place in the flat array) of every element of some rows.

    rows that start at 10 and 40       row        0  0  1  1  1
    and have 2 and 3 elements          position   0  1  0  1  2
                                       place     10 11 40 41 42
    """
    row = np.repeat(np.arange(len(length_B)), length_B)
    # Count all elements through, and subtract how many there are in the rows before.
    elements_before_B = np.cumsum(length_B) - length_B
    position = np.arange(len(row)) - elements_before_B[row]
    return row, position, start_B[row] + position


def load(folder: str | Path) -> Data:
    """RUN/data.npz as stage 1 wrote it; UserError where it is missing, damaged or made up."""
    path = Path(folder) / "data.npz"
    arrays, meta = load_npz(path)
    check_data(path, arrays, meta)

    splits = {}
    for name in (*SPLITS, "label"):
        splits[name] = Split(*(arrays[f"{name}_{key}"] for key in Split._fields))

    # The names of the labels are stored like documents: bytes one after the other, and offsets.
    text = arrays["names"].tobytes()
    names = [text[start:end].decode() for start, end in pairwise(arrays["names_offsets"])]

    # Only splits that have labels known beforehand (a filter file) are in `known`.
    known = {}
    for name in SPLITS:
        labels = arrays[f"{name}_known"]
        if len(labels):
            is_known = np.ones(len(labels), bool)
            shape = (len(splits[name]), len(names))
            known[name] = csr_matrix((is_known, labels, arrays[f"{name}_known_offsets"]), shape)
    return Data(splits, names, meta, arrays["tokenizer"].tobytes(), known)


# --------------------------------------------------------------------------------------- the stage


@owns_its_folder
def run(config: Config) -> None:
    drops = Counter()  # what is left out, cut or changed, and how often

    documents = read(config, drops)
    tokenizer = make_tokenizer(config, documents)
    special = special_tokens(tokenizer)
    if config.encoder != "tiny":
        # Does it work at all? What it finds out about the encoder is stored, too.
        special |= try_encoder(config.encoder, special, len(tokenizer))
    splits = tokenise(documents, tokenizer, config.max_tokens, drops)
    save(config, documents, splits, tokenizer, special)
    describe(splits, len(documents.labels), drops)
    describe_unknown(splits, tokenizer.unk_token_id, config.encoder)
    for surprise in surprises(documents.corpus, documents.labels, splits["train"], config.corpus):
        print(f"surprise: {surprise}")


if __name__ == "__main__":
    main(run, Config, __doc__)
