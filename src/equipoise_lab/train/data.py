"""Turns text into memory-mapped token ids.

    text -> tokenizer -> split -> cache (memory-mapped tokens) -> Corpus -> batches.py

Everything here is a function of the text, the options and the seed. So a checkpoint holds no state of the data, and two
machines with the same text see the same micro-batches.
"""

import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from jaxtyping import UInt

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.train.location import find_tokenizer
from equipoise_lab.train.text import (
    MIN_DOCUMENTS,
    Text,
    count_held_out,
    find_text,
    in_hash_order,
    max_held_out,
    without_copies,
)
from equipoise_lab.train.text_files import TEXT_KEY
from equipoise_lab.train.text_problems import Problems

if TYPE_CHECKING:  # imported lazily: reading from the cache does not need it
    from tokenizers import Tokenizer

__all__ = ["SPLITS", "Corpus", "cache_folder", "end_of_text", "load_corpus"]

SPLITS = ("train", "selection", "test")
FORMAT = 2  # of the cache: increase it when the same input gives different files
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>", "<|eot_id|>", "<|im_end|>")
TOKEN_DTYPES = ("<u2", "<u4")
MIN_VOCAB_SIZE = 300  # 256 bytes, the end-of-text token and some merges
MAX_VOCAB_SIZE = 1_000_000  # tokenizers crashes on numbers that are much larger
TOKENIZER_BYTES = 8_000_000  # training text of the tokenizer, with equal shares of the domains
MAX_TOKENIZER_BYTES_PER_DOMAIN = 1_000_000

Progress = Callable[[str], None]


@final
@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised text by split and domain, memory-mapped and read-only. Made by :func:`load_corpus`.

    ``tokens[split][domain]`` holds the documents in hash order, each followed by the end-of-text token.
    ``num_bytes[split][domain]`` is the size of the text as UTF-8, without those tokens.
    ``vocab_size`` is one more than the largest token id, which is the minimum size of the embedding. ``fingerprint`` is
    a hash of the tokenizer and all tokens: equal fingerprints mean equal data.
    """

    domains: tuple[str, ...]
    vocab_size: int
    tokenizer_file: Path
    tokens: dict[str, dict[str, UInt[np.ndarray, " tokens"]]]
    num_bytes: dict[str, dict[str, int]]
    fingerprint: str
    notes: tuple[str, ...] = ()  # what was left out of the files that were read

    def sequences(self, split: str, domain: str, length: int) -> UInt[np.ndarray, "sequences length"]:
        """The tokens in rows of ``length``, without overlap. The remainder is dropped. A view, not a copy."""
        if length < 1:
            raise ValueError(f"length must be at least 1 token: got {length}.")
        tokens = self._get(self.tokens, split, domain)
        num = len(tokens) // length
        return tokens[: num * length].reshape(num, length)

    def bytes_per_token(self, split: str, domain: str, num_tokens: int | None = None) -> float:
        """Bytes of text per token, of the whole split or of its first ``num_tokens``. Counts end-of-text tokens too.

        nats per token / bytes_per_token / ln(2) is bits per byte, which can be compared across tokenizers. If there are
        unknown words among the first tokens, the value of the whole split is returned.
        """
        tokens = self._get(self.tokens, split, domain)
        if num_tokens is None:
            return self._get(self.num_bytes, split, domain) / len(tokens)
        tokenizer = _read_tokenizer(self.tokenizer_file)
        unknown = getattr(tokenizer.model, "unk_token", None)
        if unknown is not None and tokenizer.token_to_id(unknown) in tokens[:num_tokens]:
            return self.bytes_per_token(split, domain)  # the text of an unknown word is lost
        text = tokenizer.decode(tokens[:num_tokens].tolist(), skip_special_tokens=True)
        return len(text.encode()) / num_tokens

    def sample(self, domain: str, num_tokens: int = 2000) -> str:
        """The start of a domain's test text."""
        tokens = self.tokens["test"][domain][:num_tokens]
        return _read_tokenizer(self.tokenizer_file).decode(tokens.tolist(), skip_special_tokens=True)

    def decoder(self) -> Callable[[int], str]:
        """A function from a token id to its text. A token that is part of a character gives U+FFFD."""
        tokenizer = _read_tokenizer(self.tokenizer_file)
        return lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False)

    def _get(self, table: dict[str, dict[str, Any]], split: str, domain: str) -> Any:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}: got {split!r}.")
        if domain not in self.domains:
            raise ValueError(f"domain must be one of {', '.join(self.domains)}: got {domain!r}.")
        return table[split][domain]


def load_corpus(
    data: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = 4096,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    sequence_length: int = 128,
    text_key: str = TEXT_KEY,
) -> Corpus:
    """Reads, splits and tokenises text, or loads it from the cache.

    Args:
        data: a folder with one file or one sub-folder per domain, a file, ``hf:NAME`` for a data set of the Hub, or
            None for the packaged corpus (see ``text.find_text``).
        tokenizer: a ``tokenizer.json`` or a folder with one. Without it a byte-level BPE is trained, only on text that
            can never be held out.
        vocab_size: tokens of that BPE. It gets fewer if there is too little text.
        cache: a folder; default ``$EQUIPOISE_CACHE`` or ``~/.cache/equipoise``.
        progress: called with a line of text at each stage, and with what is left out of the text.
        sequence_length: tokens that every split of every domain must have at least.
        text_key: the field or column of a row that holds its text.

    In each domain, the first documents in hash order are held out: until they reach 5 % of the bytes and 20,000 tokens,
    but at most a quarter of the bytes. They alternate between ``selection`` and ``test``.

    >>> corpus = load_corpus()  # doctest: +SKIP
    >>> corpus.sequences("train", "law_fr", length=128).shape  # doctest: +SKIP
    (3533, 128)
    """
    progress = progress or (lambda line: None)
    tokenizer_file = None if tokenizer is None else find_tokenizer(Path(tokenizer))
    if tokenizer_file is None and vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(
            f"--vocab-size must be at least {MIN_VOCAB_SIZE}, of which 256 are single bytes: got {vocab_size}. Raise "
            "it."
        )
    if tokenizer_file is None and vocab_size > MAX_VOCAB_SIZE:
        raise UsageError(f"--vocab-size must be at most {MAX_VOCAB_SIZE:,}: got {vocab_size:,}. Lower it.")
    kind = ["bpe", vocab_size] if tokenizer_file is None else ["file", _digest(tokenizer_file.read_bytes())]
    text = find_text(data, progress, text_key)
    of_key = [] if text_key == TEXT_KEY else [text_key]
    key = _digest(json.dumps([FORMAT, kind, text.identity, *of_key]).encode())[:32]
    folder = cache_folder(cache) / "tokens" / key
    corpus = _open(folder)
    for note in () if corpus is None else corpus.notes:
        progress(note)
    corpus = corpus or _build(folder, text, tokenizer_file, vocab_size, progress)
    _check_length(corpus, sequence_length, text.where)
    return corpus


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content).hexdigest()


def cache_folder(cache: str | Path | None = None) -> Path:
    """The folder ``cache``, or the lab's own."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache or os.environ.get("EQUIPOISE_CACHE") or Path(base, "equipoise")).expanduser().absolute()


def _check_length(corpus: Corpus, sequence_length: int, where: str) -> None:
    problems = Problems()
    for split, domain in itertools.product(SPLITS, corpus.domains):
        if not len(corpus.sequences(split, domain, sequence_length)):
            problems.add(
                f"Each split of a domain must hold a sequence of {sequence_length} tokens",
                f"the {split} text of {domain!r} in {where} has {len(corpus.tokens[split][domain])} tokens",
                "Add text, or use shorter sequences.",
            )
    problems.raise_error()


def _build(folder: Path, text: Text, tokenizer_file: Path | None, vocab_size: int, progress: Progress) -> Corpus:
    """Writes to a temporary folder and renames it to ``folder``. If another process was faster, uses its folder."""
    texts, seen, num_copies, notes = {}, set[bytes](), 0, list[str]()

    def note(line: str) -> None:
        notes.append(line)
        progress(line)

    # A document in two domains is kept in the first only: else it could be trained on in one and held out in the other.
    for domain, documents in text.read(progress, note).items():
        ordered = in_hash_order(documents)
        texts[domain] = without_copies(ordered, seen)
        num_copies += len(ordered) - len(texts[domain])
    if num_copies:
        note(f"left out {num_copies} documents that an earlier domain has too")
    problems = Problems()
    for domain, documents in texts.items():
        if len(documents) < MIN_DOCUMENTS:
            problems.add(
                f"A domain must have at least {MIN_DOCUMENTS} different documents, to be split into train, selection "
                "and test",
                f"{domain!r} in {text.where} has {len(documents)}",
                "Split its text into more documents, for example with blank lines, or put files of one kind into one "
                "sub-folder: there each is a document.",
            )
    problems.raise_error()
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        if tokenizer_file is None:
            progress("training the tokenizer")
        tokenizer = _read_tokenizer(tokenizer_file) if tokenizer_file else _train_tokenizer(texts, vocab_size)
        _write(temporary, texts, tokenizer, notes, progress)
        return _publish(temporary, folder)
    except OSError as error:
        raise EquipoiseError(
            f"The cache must be a writable folder: {folder.parent}: {error.strerror or error}. Set another one with "
            "EQUIPOISE_CACHE."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, folder: Path) -> Corpus:
    for _ in range(3):
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        corpus = _open(folder)
        if corpus is not None:
            return corpus
        damaged = temporary.with_name(f"{temporary.name}.damaged")
        with suppress(FileNotFoundError):  # another process moved it away first
            folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    raise EquipoiseError(
        f"The cache must return what was written to it: {folder} cannot be read back. Remove it and try again."
    )


def _train_tokenizer(texts: dict[str, list[str]], vocab_size: int) -> "Tokenizer":
    """Trains a byte-level BPE on documents that can never be held out, with an equal share of each domain."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[ENDS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    share = min(MAX_TOKENIZER_BYTES_PER_DOMAIN, TOKENIZER_BYTES // len(texts))
    sample = [document for documents in texts.values() for document in _sample(documents, share)]
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def _sample(documents: list[str], share: int) -> list[str]:
    """The start of the training text, ``share`` bytes at most, cut between characters."""
    sample, room = [], share
    for document in documents[max_held_out([len(document.encode()) for document in documents]) :]:
        sample.append(document.encode()[: max(room, 0)].decode(errors="ignore"))
        room -= len(document.encode())
    return sample


def _read_tokenizer(path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise EquipoiseError(
            f"The tokenizer must be a tokenizer.json of the library tokenizers: {path}: {error}. Restore the file."
        ) from None
    tokenizer.no_truncation()  # some files enable both, which would silently cut documents
    tokenizer.no_padding()
    return tokenizer


def end_of_text(tokenizer_file: Path) -> str:
    """The token of this tokenizer that marks the end of a document."""
    return _end_of_text(_read_tokenizer(tokenizer_file))


def _end_of_text(tokenizer: "Tokenizer") -> str:
    known = [end for end in ENDS if tokenizer.token_to_id(end) is not None]
    if not known:
        raise EquipoiseError(
            f"The tokenizer must have a token for the end of a document: it has none of {', '.join(ENDS)}. Add one to "
            "its tokenizer.json."
        )
    return known[0]


def _encode(tokenizer: "Tokenizer", documents: list[str], dtype: np.dtype) -> list[np.ndarray]:
    end = tokenizer.token_to_id(_end_of_text(tokenizer))
    encoded = []
    for first in range(0, len(documents), 256):  # in parts: encodings need many times the memory of their tokens
        part = tokenizer.encode_batch_fast(documents[first : first + 256], add_special_tokens=False)
        encoded += [np.array([*document.ids, end], dtype) for document in part]
    return encoded


def _write(
    folder: Path, texts: dict[str, list[str]], tokenizer: "Tokenizer", notes: list[str], progress: Progress
) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # set after saving: "<|endoftext|>" inside a document is plain text
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    dtype = np.dtype(TOKEN_DTYPES[vocab_size >= 2**16])
    fingerprint = hashlib.blake2b((folder / "tokenizer.json").read_bytes(), digest_size=16)
    entries: dict[str, dict[str, dict[str, Any]]] = {}
    for number, (domain, documents) in enumerate(texts.items(), start=1):
        progress(f"tokenising {number} of {len(texts)} domains")
        num_bytes = [len(document.encode()) for document in documents]
        tokens = _encode(tokenizer, documents, dtype)
        cut = count_held_out(num_bytes, [len(document) for document in tokens])
        entries[domain] = {}
        for split, part in zip(SPLITS, (slice(cut, None), slice(0, cut, 2), slice(1, cut, 2)), strict=True):
            packed = np.concatenate(tokens[part])
            name = f"{number:04d}-{split}.bin"
            packed.tofile(folder / name)
            counts = {"documents": len(tokens[part]), "tokens": len(packed), "bytes": sum(num_bytes[part])}
            entries[domain][split] = {"file": name, **counts}
            fingerprint.update(json.dumps([domain, split, counts]).encode())
            fingerprint.update(packed.tobytes())
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint.hexdigest(),
        "vocab_size": vocab_size,
        "dtype": dtype.str,
        "domains": entries,
        "notes": notes,
        "sizes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")


def _open(folder: Path) -> Corpus | None:
    """The corpus in this folder of the cache; None if there is none, or if it is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        dtype, entries = np.dtype(manifest["dtype"]), manifest["domains"]
        if dtype.str not in TOKEN_DTYPES:
            return None
        if any((folder / name).stat().st_size != size for name, size in manifest["sizes"].items()):
            return None
        tokens: dict[str, dict[str, np.ndarray]] = {split: {} for split in SPLITS}
        for (domain, splits), split in itertools.product(entries.items(), SPLITS):
            tokens[split][domain] = np.memmap(folder / splits[split]["file"], dtype, mode="r")
        return Corpus(
            domains=tuple(sorted(entries)),
            vocab_size=manifest["vocab_size"],
            tokenizer_file=folder / "tokenizer.json",
            tokens=tokens,
            num_bytes={split: {name: entries[name][split]["bytes"] for name in entries} for split in SPLITS},
            fingerprint=manifest["fingerprint"],
            notes=tuple(map(str, manifest.get("notes", []))),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
