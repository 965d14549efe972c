"""The data of the lab: text in, memory-mapped token ids out.

    text -> tokenizer -> split -> cache (memory-mapped tokens) -> Corpus -> batches.py

Everything here is a function of the text, the options and the seed: there is no state to save in a checkpoint, and
two machines with the same text see the same micro-batches.
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
from equipoise_lab.train.text import (
    FEWEST_DOCUMENTS,
    Text,
    count_held_out,
    find_text,
    in_hash_order,
    most_held_out,
    without_copies,
)

if TYPE_CHECKING:  # imported where it is used: reading from the cache does not need it
    from tokenizers import Tokenizer

__all__ = ["SPLITS", "Corpus", "end_of_text", "load_corpus"]

SPLITS = ("train", "selection", "test")
FORMAT = 2  # of the cache: count up when the same input gives other files
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>", "<|eot_id|>", "<|im_end|>")
SMALLEST_VOCAB = 300  # 256 bytes, the end of a document, and some merges
TOKENIZER_BYTES = 8_000_000  # of training text for the tokenizer, shared evenly by the domains
MOST_TOKENIZER_BYTES = 1_000_000  # of one domain


Progress = Callable[[str], None]


@final
@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised text by split and domain, memory-mapped and read-only. Made by :func:`load_corpus`.

    ``tokens[split][domain]`` are the documents in hash order, each followed by the end-of-text token.
    ``num_bytes[split][domain]`` are the bytes of the text as UTF-8, without those tokens.
    ``vocab_size`` is one more than the largest token id, so the least size of the embedding. ``fingerprint`` is a hash
    of the tokenizer and all tokens: equal fingerprints mean equal data.
    """

    domains: tuple[str, ...]
    vocab_size: int
    tokenizer_file: Path
    tokens: dict[str, dict[str, UInt[np.ndarray, " tokens"]]]
    num_bytes: dict[str, dict[str, int]]
    fingerprint: str

    def sequences(self, split: str, domain: str, length: int) -> UInt[np.ndarray, "sequences length"]:
        """The tokens cut into rows of ``length``, without overlap; the remainder is dropped. A view, not a copy."""
        if length < 1:
            raise ValueError(f"length must be at least 1 token: got {length}.")
        tokens = self._of(self.tokens, split, domain)
        num = len(tokens) // length
        return tokens[: num * length].reshape(num, length)

    def bytes_per_token(self, split: str, domain: str, num_tokens: int | None = None) -> float:
        """Bytes of text per token, counting end-of-text tokens too: of the whole split, or of its first tokens.

        nats per token / bytes_per_token / ln(2) is bits per byte, which compares across tokenizers. Where unknown words
        are among the first tokens, it is that of the whole split.
        """
        tokens = self._of(self.tokens, split, domain)
        if num_tokens is None:
            return self._of(self.num_bytes, split, domain) / len(tokens)
        tokenizer = _read_tokenizer(self.tokenizer_file)
        unknown = getattr(tokenizer.model, "unk_token", None)
        if unknown is not None and tokenizer.token_to_id(unknown) in tokens[:num_tokens]:
            return self.bytes_per_token(split, domain)  # what it stands for cannot be had back
        text = tokenizer.decode(tokens[:num_tokens].tolist(), skip_special_tokens=True)
        return len(text.encode()) / num_tokens

    def sample(self, domain: str, num_tokens: int = 2000) -> str:
        """The beginning of a domain's test text."""
        tokens = self.tokens["test"][domain][:num_tokens]
        return _read_tokenizer(self.tokenizer_file).decode(tokens.tolist(), skip_special_tokens=True)

    def decoder(self) -> Callable[[int], str]:
        """What gives the text of a token id; a part of a character is U+FFFD."""
        tokenizer = _read_tokenizer(self.tokenizer_file)
        return lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False)

    def _of(self, table: dict[str, dict[str, Any]], split: str, domain: str) -> Any:
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
) -> Corpus:
    """Reads, splits and tokenises text, or takes it from the cache.

    ``data`` is a folder with one file or one sub-folder a domain, one file, the name of a data set, or None for the
    packaged corpus (``text.find_text``). Of each domain, documents in hash order are held out until
    they are 5 % of the bytes and 20,000 tokens, at most a quarter; they alternate between ``selection`` and ``test``.
    ``tokenizer`` is a ``tokenizer.json`` or a folder with one; without it, a byte-level BPE of ``vocab_size`` tokens
    is trained on text that can never be held out (it comes out smaller when there is too little text).
    ``cache`` is a folder, by default ``$EQUIPOISE_CACHE`` or ``~/.cache/equipoise``. ``progress`` is called with a line
    at each stage. Every split of every domain must hold ``sequence_length`` tokens.

    >>> corpus = load_corpus()  # doctest: +SKIP
    >>> corpus.sequences("train", "law_fr", length=128).shape  # doctest: +SKIP
    (3533, 128)
    """
    progress = progress or (lambda line: None)
    text = find_text(data, progress)
    tokenizer_file = None if tokenizer is None else _find_tokenizer(Path(tokenizer).expanduser())
    if tokenizer_file is None and vocab_size < SMALLEST_VOCAB:
        raise UsageError(
            f"vocab_size must be at least {SMALLEST_VOCAB} (256 of them are the bytes): got {vocab_size}. Raise it."
        )
    kind = ["bpe", vocab_size] if tokenizer_file is None else ["file", _digest(tokenizer_file.read_bytes())]
    key = _digest(json.dumps([FORMAT, kind, text.identity]).encode())[:32]
    folder = _cache_folder(cache) / "tokens" / key
    corpus = _open(folder) or _build(folder, text, tokenizer_file, vocab_size, progress)
    _check_length(corpus, sequence_length, text.where)
    return corpus


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content).hexdigest()


def _cache_folder(cache: str | Path | None) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache or os.environ.get("EQUIPOISE_CACHE") or Path(base, "equipoise")).expanduser().absolute()


def _check_length(corpus: Corpus, sequence_length: int, where: str) -> None:
    for split, domain in itertools.product(SPLITS, corpus.domains):
        if not len(corpus.sequences(split, domain, sequence_length)):
            raise EquipoiseError(
                f"Each split of a domain must hold a sequence of {sequence_length} tokens: {split} of {domain!r} in "
                f"{where} has {len(corpus.tokens[split][domain])}. Add text, or take shorter sequences."
            )


def _build(folder: Path, text: Text, tokenizer_file: Path | None, vocab_size: int, progress: Progress) -> Corpus:
    """Writes aside and renames to ``folder``; when another process was quicker, its folder is used."""
    texts, seen, num_copies = {}, set[bytes](), 0
    for domain, documents in text.read(progress).items():  # a text of two domains could be trained on and held out
        ordered = in_hash_order(documents)
        texts[domain] = without_copies(ordered, seen)
        num_copies += len(ordered) - len(texts[domain])
    if num_copies:
        progress(f"{num_copies} documents that an earlier domain has too are left out")
    for domain, documents in texts.items():
        if len(documents) < FEWEST_DOCUMENTS:
            raise EquipoiseError(
                f"A domain must have at least {FEWEST_DOCUMENTS} different documents, to be split in train, selection "
                f"and test: {domain!r} in {text.where} has {len(documents)}. Cut its text into more documents, as with "
                "blank lines in a .txt."
            )
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        aside.mkdir(parents=True)
        if tokenizer_file is None:
            progress("training the tokenizer")
        tokenizer = _read_tokenizer(tokenizer_file) if tokenizer_file else _train_tokenizer(texts, vocab_size)
        _write(aside, texts, tokenizer, progress)
        return _publish(aside, folder)
    except OSError as error:
        raise EquipoiseError(
            f"The cache must be a folder that can be written: {folder.parent}: {error.strerror or error}. Set another "
            "one with EQUIPOISE_CACHE."
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _publish(aside: Path, folder: Path) -> Corpus:
    for _ in range(3):
        try:
            aside.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        corpus = _open(folder)
        if corpus is not None:
            return corpus
        damaged = aside.with_name(f"{aside.name}.damaged")
        with suppress(FileNotFoundError):  # another process moved it out of the way first
            folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    raise EquipoiseError(f"The cache must hold what was written: {folder} does not. Remove it and try again.")


def _train_tokenizer(texts: dict[str, list[str]], vocab_size: int) -> "Tokenizer":
    """Byte-level BPE of the documents that can never be held out, with an even share of each domain."""
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
    share = min(MOST_TOKENIZER_BYTES, TOKENIZER_BYTES // len(texts))
    sample = [document for documents in texts.values() for document in _sample(documents, share)]
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def _sample(documents: list[str], share: int) -> list[str]:
    sample, room = [], share
    for document in documents[most_held_out([len(document.encode()) for document in documents]) :]:
        sample.append(document.encode()[: max(room, 0)].decode(errors="ignore"))
        room -= len(document.encode())
    return sample


def _find_tokenizer(path: Path) -> Path:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"The tokenizer must be a tokenizer.json or a folder with one: {file} does not exist. Check the path, or "
            "leave it out to train one on the text."
        )
    return file


def _read_tokenizer(path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise EquipoiseError(
            f"The tokenizer must be a tokenizer.json of the library tokenizers: {path}: {error}. Restore the file."
        ) from None
    tokenizer.no_truncation()  # some files come with both switched on, and would cut documents without a word
    tokenizer.no_padding()
    return tokenizer


def end_of_text(tokenizer_file: Path) -> str:
    """The token of this tokenizer that ends a document."""
    return _end_of_text(_read_tokenizer(tokenizer_file))


def _end_of_text(tokenizer: "Tokenizer") -> str:
    found = [end for end in ENDS if tokenizer.token_to_id(end) is not None]
    if not found:
        raise EquipoiseError(
            f"The tokenizer must have a token for the end of a document: it has none of {', '.join(ENDS)}. Add one to "
            "its tokenizer.json."
        )
    return found[0]


def _encode(tokenizer: "Tokenizer", documents: list[str], dtype: np.dtype) -> list[np.ndarray]:
    end = tokenizer.token_to_id(_end_of_text(tokenizer))
    encoded = []
    for first in range(0, len(documents), 256):  # in parts: an encoding is many times larger than its tokens
        part = tokenizer.encode_batch_fast(documents[first : first + 256], add_special_tokens=False)
        encoded += [np.array([*document.ids, end], dtype) for document in part]
    return encoded


def _write(folder: Path, texts: dict[str, list[str]], tokenizer: "Tokenizer", progress: Progress) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # not saved: here "<|endoftext|>" within a document is plain text
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    dtype = np.dtype("<u2" if vocab_size < 2**16 else "<u4")
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
        "sizes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")


def _open(folder: Path) -> Corpus | None:
    """The corpus in this folder of the cache; None if there is none or it is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        dtype, entries = np.dtype(manifest["dtype"]), manifest["domains"]
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
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
